"""How far generated images are from real ones: Frechet and kernel distance, precision and recall.

All figures compare features of one network (see `extractors`), and cannot be compared with figures of another network.
Where the data has some of the classes of a class-conditional checkpoint, name them with `class_label`, so that images
of the same classes are compared; `all` takes every class in turn, and needs as many images as there are classes.

The functions of features take float tensors, (N, C) of real images and (M, C) of generated ones. The two distances are
symmetric; torchmetrics computes them, in float64, and is needed for them (`ImportError`). Features of
different widths, too few images, and values that are not finite raise `ValueError`.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Image
from matplotlib.figure import Figure
from PIL import Image as PILImage
from torch import Tensor
from tqdm.auto import tqdm

from .arrays import StrPath, described_folder, fill, kept_or_temporary
from .classes import draw_images
from .data_files import list_folder
from .devices import best_device, machine
from .extractors import Extractor, check_extractor, open_extractor
from .generation import GenerationOptions, Generator, chosen_classes, made_by, open_pipeline, sample
from .images import Images, ImageSet
from .libraries import pip_line
from .models import path_of
from .options import option
from .plots import Picture, image_grid, save_picture
from .report import in_memory
from .results import GenerationReport
from .sharing import this_process

REFERENCE_VIEW, GENERATED_VIEW, BASELINE_VIEW = 0, 1, 2  # images that are compared never share noise
FEWEST = 4  # every image needs a third neighbour
logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class EvaluationOptions(GenerationOptions):
    """Options of `evaluate_generation`: those of `generate`, and what its images are compared with."""

    num_images: int = option(50000, "Images to sample; a folder's images are all taken.")
    extractor: str = option(help="ddae:PATH, transformers:PATH, inception or inception:FILE.")
    extractor_layer: str | None = option(None, "Layer of a DDAE extractor; by default its configuration's.")
    extractor_sigma: float | None = option(None, "Noise level of a DDAE extractor; by default its configuration's.")
    extractor_batch_size: int = option(100, "Images whose features are computed at once.")
    reference_split: str = option("train", "Split of the real images to compare with.")
    max_reference_samples: int | None = option(None, "Use N of the real images, of all classes.")
    baseline_split: str | None = option(None, "Also compare real images of this split, at most as many as generated.")
    features_dir: str | None = option(None, "Folder where features are kept for later use; by default none is.")

    def check(self) -> None:
        """Refuse unknown extractors, real images compared with themselves, and too few images."""
        super().check()
        check_extractor(self.extractor, self.extractor_layer, self.extractor_sigma)
        if self.baseline_split == self.reference_split:
            raise ValueError(f"baseline_split is {self.baseline_split!r}, like reference_split: compare other images.")
        if self.num_images < FEWEST:
            raise ValueError(f"num_images is {self.num_images}: it must be at least {FEWEST}.")


@dataclass
class Compared:
    """Images to compare: what they are called, and which draw of noise their features take."""

    name: str
    images: ImageSet
    view: int

    def __post_init__(self) -> None:
        if len(self.images) < FEWEST:
            raise ValueError(f"There are {len(self.images)} images {self.name!r}: at least {FEWEST} are needed.")

    def batches(self, size: int) -> Iterator[list[PILImage.Image]]:
        """Yield the images, `size` at a time."""
        numbers = range(len(self.images))
        for start in tqdm(numbers[::size], desc=f"Features of {self.name}", leave=False):
            yield self.images.pil(numbers[start : start + size])


@dataclass(kw_only=True)
class GenerationResult(GenerationReport):
    """What was measured, with some of the images."""

    shown: dict[str, list[PILImage.Image]] = in_memory()  # by their set's name, generated ones first

    def picture(self) -> Figure:
        """Return some generated images beside some of the reference."""
        figure = Picture(figsize=(12, 6))
        counts = (self.results["generated"]["num_images"], self.reference["num_images"])
        for axes, (name, images), count in zip(figure.subplots(1, 2), self.shown.items(), counts, strict=True):
            axes.imshow(image_grid(images, columns=6), interpolation="nearest")
            axes.set_title(f"{name}, {len(images)} of {count:,}")
            axes.axis("off")
        return figure

    def save(self, folder: StrPath) -> None:
        """Write `generation_results.json`, and the picture as `grid.png`."""
        self.write(Path(folder))
        save_picture(self.picture(), Path(folder) / "grid.png", dpi=120, bbox_inches="tight")


def evaluate_generation(
    model: Generator, images: Images, options: EvaluationOptions | None = None, **changes: Any
) -> GenerationResult | None:
    """Compare real images with those of a checkpoint, a pipeline or a model, or with the images of a folder.

    A folder of images may hold folders of them. With `output_dir`, images are sampled into its folder `images` (see
    `generate`); the figures and a picture are written beside it. Features are kept in `features_dir`, each array
    beside a JSON file that says what they are of.

    Returns:
        The figures; None in processes that only helped to sample.

    Raises:
        ValueError: Options that cannot work, an image that cannot be read, or a folder of images made otherwise.
        OSError: No such checkpoint, or no space left.
    """
    options = EvaluationOptions.of(options, changes)
    return compare_samples(model, Images.open(images, cache_dir=options.cache_dir), options)


def compare_samples(
    model: Generator, images: Images, options: EvaluationOptions, extractor: Extractor | None = None
) -> GenerationResult | None:
    """Do what `evaluate_generation` does, with an extractor that is open already, if one is given."""
    started = time.monotonic()
    processes = this_process()
    given = path_of(model)
    with kept_or_temporary(options.output_dir) as folder:
        compared: dict[str, Compared] = {}
        paths = find_images(Path(given)) if given is not None and is_images_folder(given) else None
        pipeline = open_pipeline(model, options) if paths is None else None
        if processes.is_main_process:
            compared = real_images(images, options, options.num_images if paths is None else len(paths))
            extractor = extractor or open_extractor(
                options.extractor, layer=options.extractor_layer, sigma=options.extractor_sigma,
                cache_dir=options.cache_dir,
            )  # fmt: skip
        generator: dict[str, Any] = {"images_dir": given}
        if pipeline is not None:
            paths = sample(pipeline, options, folder / "images").paths
            generator = {"model_name_or_path": given, **made_by(pipeline, options)}
            generator["scheduler"] = type(pipeline.scheduler).__name__
            if (classes := chosen_classes(pipeline, options)) is not None:
                generator["num_classes"] = [min(options.num_images, len(classes)), len(classes)]
            del pipeline  # the features need its memory
        if not processes.is_main_process or extractor is None or paths is None:
            return None
        files = Dataset.from_dict({"image": [str(path) for path in paths]}).cast_column("image", Image())
        compared["generated"] = Compared("generated", ImageSet(files), GENERATED_VIEW)
        features = {role: kept_features(extractor, each, options) for role, each in compared.items()}
        both = [compared["generated"], compared["reference"]]
        shown = {each.name: each.images.pil(draw_images(len(each.images), 36)) for each in both}
    reference = features.pop("reference")
    known = images.opened_with
    about = {"source": known.get("dataset_name") or known.get("train_data_dir"), "name": compared["reference"].name}
    libraries = ["torchmetrics", "pillow"] + ["torch-fidelity"] * extractor.name.startswith("inception")
    result = GenerationResult(
        options={"model_name_or_path": given, **options.to_dict(), **known},
        generator=generator,
        extractor={"name": extractor.name, "width": extractor.width, **extractor.identity},
        reference={**about, "num_images": len(reference)},
        dataset=images.facts(compared["reference"].images),
        results={
            compared[role].name: compare(reference, values)
            for role, values in tqdm(features.items(), desc="Comparing", leave=False)
        },
        seconds=round(time.monotonic() - started, 1),
        shown=shown,
        **machine(best_device(), processes.num_processes, libraries),
    )
    if options.output_dir is not None:
        result.save(options.output_dir)
    return result


def real_images(images: Images, options: EvaluationOptions, count: int) -> dict[str, Compared]:
    """Return the reference, and the baseline if asked for: at most `count` images each, as distances depend on it."""
    wanted = [("reference", options.reference_split, options.max_reference_samples, REFERENCE_VIEW)]
    if options.baseline_split is not None:
        wanted.append(("baseline", options.baseline_split, count, BASELINE_VIEW))
    return {role: Compared(f"real ({split})", images[split].take(most), view) for role, split, most, view in wanted}


def is_images_folder(path: StrPath) -> bool:
    """Return whether a path is a local folder that is no checkpoint."""
    return Path(path).is_dir() and not any(Path(path, name).exists() for name in ("model_index.json", "config.json"))


def find_images(folder: Path) -> list[Path]:
    """Return the images under a folder, in the order of their names, but not the grid that `ddae generate` leaves."""
    found = list_folder(folder)
    if "grid.png" in found.files:
        found.files.remove("grid.png")
        found.skipped["grid.png"] += 1
    if found.skipped:
        warnings.warn(f"{folder}: {found.what_was_skipped()}.", stacklevel=3)
    return [folder / path for path in found.files]


def kept_features(extractor: Extractor, compared: Compared, options: EvaluationOptions) -> Tensor:
    """Return features (N, C), from disk if they were computed before."""

    def computed() -> Tensor:
        return extractor.compute(compared.batches(options.extractor_batch_size), compared.view)

    if options.features_dir is None:
        return computed()
    count = len(compared.images)
    content = {"number": count, "sha256": compared.images.hash}
    identity = {"extractor": extractor.identity, "images": content, "view": compared.view}
    folder = described_folder(Path(options.features_dir), identity)
    if (folder / "features.npy").exists():
        logger.info("Features of %s, %d images: reused from %s.", compared.name, count, folder)
    shapes = {"features": (extractor.width,)}
    features = fill(folder, shapes, count, lambda start, missing: [{"features": computed()[start:]}])["features"]
    return torch.from_numpy(np.array(features))


def compare(reference: Tensor, features: Tensor) -> dict[str, Any]:
    """Return all figures of one set against the reference, from features (N, C) and (M, C)."""
    size = min(1000, len(reference), len(features))
    kernel, spread = kernel_distance(reference, features, subset_size=size)
    whole = size == len(reference) == len(features)  # then every subset is the same
    device = best_device()
    precision, recall = precision_recall(reference.to(device), features.to(device))
    return {
        "num_images": len(features),
        "frechet_distance": frechet_distance(reference, features),
        "kernel_distance": kernel,
        "kernel_distance_std_over_subsets": None if whole else spread,
        "kernel_distance_subset_size": size,
        "precision": precision,
        "recall": recall,
    }


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """Return the squared Frechet distance between Gaussians that have the means and covariances of two sets.

    `|mean_1 - mean_2|^2 + tr(cov_1 + cov_2 - 2 (cov_1 cov_2)^(1/2))`, with covariances divided by N - 1 (Heusel et al.
    2017, arXiv 1706.08500); with Inception features it is the FID. It falls as N grows: compare only figures of one N.
    A warning says where a set has no more than C images: then the distance is far too large.
    """
    _check(real, generated, fewest=2)
    count, width = min(len(real), len(generated)), real.shape[1]
    if count <= width:
        what = f"{count} images came for features of {width} numbers: their covariance is singular, and the Frechet"
        hint = f"Use more than {width} images, or compare only figures of equally many."
        warnings.warn(f"{what} distance far larger than of many images. {hint}", stacklevel=2)
    metric = _torchmetrics("Frechet", width).to(real.device)
    # The distance does not depend on the origin; near it, no digits of covariances are lost to the mean's square.
    origin = real.mean(0, dtype=torch.float64)
    for features, is_real in ((real, True), (generated, False)):
        for rows in features.split(4096):
            metric.update(rows.double() - origin, real=is_real)
    return metric.compute().item()


def kernel_distance(
    real: Tensor, generated: Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Return mean and standard deviation, over random subsets, of the kernel distance between two sets.

    The squared maximum mean discrepancy with the kernel `(x . y / C + 1)^3` (Binkowski et al. 2018, arXiv 1801.01401);
    with Inception features it is the KID. Its estimate is unbiased, so that it may be below 0. A subset has
    `subset_size` images of each set, at least 2, which `seed` draws.
    """
    if subsets < 1 or subset_size < 2:
        asked = f"{subsets} subsets of {subset_size} images are asked for"
        raise ValueError(f"{asked}: allowed are 1 or more subsets of at least 2 images.")
    _check(real, generated, fewest=subset_size)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance` will save all extracted features")
        metric = _torchmetrics("kernel", real.shape[1], subsets=1, subset_size=subset_size)
    values = []
    with torch.random.fork_rng(devices=[]):  # the metric, too, shuffles with the global generator
        torch.default_generator.manual_seed(seed)
        for _ in range(subsets):
            for features, is_real in ((real, True), (generated, False)):
                chosen = torch.randperm(len(features), device="cpu")[:subset_size]
                metric.update(features[chosen.to(features.device)].double(), real=is_real)
            values.append(metric.compute()[0])
            metric.reset()
    found = torch.stack(values)
    return found.mean().item(), found.std(correction=0).item()


def precision_recall(real: Tensor, generated: Tensor, k: int = 3, *, chunk_size: int = 512) -> tuple[float, float]:
    """Return improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991, equation 1).

    They are the shares of generated images that lie among the real ones, and of real images that lie among the
    generated ones. An image lies among others if it is no further from one of them than that one's k-th nearest
    neighbour in its own set is (k is 3 in the paper). `chunk_size` rows of the distance table are held at a
    time, which changes no result.
    """
    if k < 1 or chunk_size < 1:
        raise ValueError(f"k is {k} and chunk_size {chunk_size}: both must be at least 1.")
    _check(real, generated, fewest=k + 1)
    origin = real.mean(0, dtype=torch.float64)
    real, generated = real.double() - origin, generated.double() - origin
    # Differences below float32's precision count as none, so that images that come several times are found.
    rounding = 1e-7 * max(real.norm(dim=1).max(), generated.norm(dim=1).max())
    radii, generated_radii = (_radii(features, k, chunk_size) + rounding for features in (real, generated))
    precise, recalled = 0, torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows, distances in _distances(generated, real, chunk_size):
        precise += int((distances <= radii).any(1).sum())
        recalled |= (distances <= generated_radii[rows, None]).any(0)
    return precise / len(generated), recalled.double().mean().item()


def _radii(features: Tensor, k: int, chunk_size: int) -> Tensor:
    """Return each image's distance (N,) to its k-th nearest neighbour; the nearest of all is the image itself."""
    found = [distances.kthvalue(k + 1, dim=1).values for _, distances in _distances(features, features, chunk_size)]
    return torch.cat(found)


def _distances(rows: Tensor, columns: Tensor, chunk_size: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield Euclidean distances, some rows at a time, with the slice that says which."""
    for start in range(0, len(rows), chunk_size):
        part = slice(start, start + chunk_size)
        yield part, torch.cdist(rows[part], columns, compute_mode="use_mm_for_euclid_dist")


def _check(real: Tensor, generated: Tensor, fewest: int) -> None:
    shapes = f"{tuple(real.shape)} and {tuple(generated.shape)}"
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
        raise ValueError(f"Features have shapes {shapes}: they must be (N, C) and (M, C), of one network.")
    if min(len(real), len(generated)) < fewest:
        raise ValueError(f"Features have shapes {shapes}: there must be at least {fewest} images of each kind.")
    for name, features in (("real", real), ("generated", generated)):
        if bad := int((~torch.isfinite(features)).any(1).sum()):
            what = f"{bad} of {len(features)} {name} images have features that are not finite: the network that"
            raise ValueError(f"{what} computes them overflows on these images, or its weights are damaged.")


def _torchmetrics(name: str, width: int, **options: Any) -> Any:
    """Return a metric of torchmetrics that takes features in place of images."""
    try:
        from torchmetrics.image import fid, kid
    except ImportError as error:
        line = pip_line("experiments", "torchmetrics")
        raise ImportError(f"This distance needs torchmetrics: {line} ({error}).") from error
    metric: Any = fid.FrechetInceptionDistance if name == "Frechet" else kid.KernelInceptionDistance
    identity: Any = torch.nn.Identity()
    identity.num_features = width
    # One process has all the features: it does not wait for others, which may have ended.
    return metric(identity, sync_on_compute=False, **options)
