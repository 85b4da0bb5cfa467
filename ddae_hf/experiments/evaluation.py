"""How far generated images are from real ones: Frechet and kernel distance, precision and recall.

All figures are taken between features of one network (see `extractors`), and cannot be compared with those of another.
Where the data has some of the classes of a class-conditional checkpoint, name them with `class_label`, so that images
of the same classes are compared; `all` takes every class in turn, and needs as many images as there are classes.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import tempfile
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
from tqdm.auto import tqdm

from .arrays import described_folder, fill
from .classes import draw_images
from .data_files import list_folder
from .devices import best_device, machine
from .extractors import Extractor, check_extractor, open_extractor
from .generation import GenerationOptions, Generator, chosen_classes, made_by, open_pipeline, open_processes, sample
from .generation_metrics import frechet_distance, kernel_distance, precision_recall
from .images import Images, ImageSet
from .options import option
from .plots import image_grid
from .report import in_memory
from .results import GenerationReport

REFERENCE_VIEW, GENERATED_VIEW, BASELINE_VIEW = 0, 1, 2  # images that are compared never share noise
FEWEST = 4  # the third neighbour of an image must be there
KID_SUBSET_SIZE = 1000
SHOWN = 36  # images of each set in the picture
CHECKPOINT_FILES = ("model_index.json", "config.json")
logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class EvaluationOptions(GenerationOptions):
    """What is generated, and what it is compared with, by which features: see `evaluate_generation`."""

    num_images: int = option(50000, "Images to sample; of a folder of images all are taken.")
    extractor: str = option(help="ddae:PATH, transformers:PATH, inception or inception:FILE.")
    extractor_layer: str | None = option(None, "Layer of a DDAE extractor; by default its configuration's.")
    extractor_sigma: float | None = option(None, "Noise level of a DDAE extractor; by default its configuration's.")
    extractor_batch_size: int = option(100, "Images whose features are computed at once.")
    reference_split: str = option("train", "Split of the real images to compare with.")
    max_reference_samples: int | None = option(None, "Use N images of it, of all classes.")
    baseline_split: str | None = option(
        None, "Also compare real images of this split, at most as many as generated ones."
    )
    features_dir: str | None = option(None, "Where features are kept, to be used again; by default nowhere.")

    def check(self) -> None:
        """Refuse what no extractor is named, real images against themselves, and fewer than figures are of."""
        super().check()
        check_extractor(self.extractor, self.extractor_layer, self.extractor_sigma)
        if self.baseline_split == self.reference_split:
            raise ValueError(f"baseline_split is {self.baseline_split!r}, as reference_split: compare other images.")
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
            raise ValueError(f"The images {self.name!r} are {len(self.images)}: at least {FEWEST} are needed.")

    def batches(self, size: int) -> Iterator[list[PILImage.Image]]:
        """Yield the images, `size` at a time."""
        count = len(self.images)
        for start in tqdm(range(0, count, size), desc=f"Features of {self.name}", leave=False):
            yield self.images.pil(range(start, min(start + size, count)))


@dataclass(kw_only=True)
class GenerationResult(GenerationReport):
    """What was measured, with some of the images."""

    shown: dict[str, list[PILImage.Image]] = in_memory()  # by their set's name, generated ones first

    def picture(self) -> Figure:
        """Return some generated images beside some of the reference."""
        figure = Figure(figsize=(12, 6))
        counts = {"generated": self.results["generated"]["num_images"]}
        counts[self.reference["name"]] = self.reference["num_images"]
        for axes, (name, count) in zip(figure.subplots(1, 2), counts.items(), strict=True):
            axes.imshow(image_grid(self.shown[name], columns=6), interpolation="nearest")
            axes.set_title(f"{name}, {len(self.shown[name])} of {count:,}")
            axes.axis("off")
        return figure

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `generation_results.json`, and the picture as `grid.png`."""
        self.write(Path(folder))
        self.picture().savefig(Path(folder) / "grid.png", dpi=120, bbox_inches="tight")


def evaluate_generation(
    model: Generator, images: Images, options: EvaluationOptions | None = None, **changes: Any
) -> GenerationResult | None:
    """Compare generated images with real ones.

    With `output_dir` images are sampled into its folder `images`: see `generate`; the figures and a picture are left
    beside it. Features are kept in `features_dir`, each array beside a JSON file that says what they are of.

    Args:
        model: Checkpoint, folder or Hub id, in any layout, or a pipeline or a model; or a folder of images, and of
            folders of them, which are measured as they are.
        images: The real images.
        options: What is generated, and how it is compared; `extractor` must be among them or the changes.
        **changes: Fields of `EvaluationOptions` that differ from `options`.

    Returns:
        The figures; None in processes that only helped to sample.

    Raises:
        ValueError: Options that cannot work, an image that cannot be read, or a folder of images made otherwise.
        OSError: No such checkpoint, or no space left.
    """
    options = EvaluationOptions.of(options, changes)
    result = compare_samples(model, Images.open(images, cache_dir=options.cache_dir), options)
    if result is not None and options.output_dir is not None:
        result.save(options.output_dir)
    return result


def compare_samples(
    model: Generator, images: Images, options: EvaluationOptions, extractor: Extractor | None = None
) -> GenerationResult | None:
    """Do what `evaluate_generation` does, with an extractor that is open already, if one came."""
    started = time.monotonic()
    processes = open_processes()
    given = os.fspath(model) if isinstance(model, (str, os.PathLike)) else None
    with contextlib.ExitStack() as stack:
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
            if options.output_dir is None and processes.num_processes > 1:
                raise ValueError("output_dir is None: processes share images through a folder.")
            output = options.output_dir or stack.enter_context(tempfile.TemporaryDirectory())
            paths = sample(pipeline, options, processes, Path(output) / "images").paths
            generator = {"model_name_or_path": given, **made_by(pipeline, options)}
            generator["scheduler"] = type(pipeline.scheduler).__name__
            if (classes := chosen_classes(pipeline, options)) is not None:
                generator["num_classes"] = [min(options.num_images, len(classes)), len(classes)]
            del pipeline  # whose memory the features need
        if not processes.is_main_process or extractor is None or paths is None:
            return None
        files = Dataset.from_dict({"image": [str(path) for path in paths]}).cast_column("image", Image())
        compared["generated"] = Compared("generated", ImageSet(files), GENERATED_VIEW)
        features = {role: kept_features(extractor, each, options) for role, each in compared.items()}
        both = [compared["generated"], compared["reference"]]
        shown = {each.name: each.images.pil(draw_images(len(each.images), SHOWN)) for each in both}
    reference, known = features.pop("reference"), images.opened_with
    about = {"source": known.get("dataset_name") or known.get("train_data_dir"), "name": compared["reference"].name}
    facts = machine(best_device(), processes.num_processes)
    packages = ["torchmetrics", "pillow"] + ["torch-fidelity"] * extractor.name.startswith("inception")
    facts["versions"] |= {name: importlib.metadata.version(name) for name in packages}
    return GenerationResult(
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
        **facts,
    )


def real_images(images: Images, options: EvaluationOptions, count: int) -> dict[str, Compared]:
    """Return the reference, and the baseline if asked for: at most `count` images, as distances depend on it."""
    wanted = [("reference", options.reference_split, options.max_reference_samples, REFERENCE_VIEW)]
    if options.baseline_split is not None:
        wanted.append(("baseline", options.baseline_split, count, BASELINE_VIEW))
    return {role: Compared(f"real ({split})", images[split].take(most), view) for role, split, most, view in wanted}


def is_images_folder(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is a local folder that is no checkpoint."""
    return Path(path).is_dir() and not any((Path(path) / name).exists() for name in CHECKPOINT_FILES)


def find_images(folder: Path) -> list[Path]:
    """Return the images under a folder, in the order of their names, but not the grid that `generate.py` leaves."""
    found = list_folder(folder)
    if "grid.png" in found.files:
        found.files.remove("grid.png")
        found.skipped["grid.png"] += 1
    if found.skipped:
        warnings.warn(f"{folder}: {found.what_was_skipped()}.", stacklevel=3)
    return [folder / path for path in found.files]


def kept_features(extractor: Extractor, compared: Compared, options: EvaluationOptions) -> torch.Tensor:
    """Return features (N, C), from disk if they were computed before."""
    images = compared.images
    content = {"number": len(images), "sha256": images.hash}
    identity = {"extractor": extractor.identity, "images": content, "view": compared.view}
    reused = True

    def batches(start: int, missing: list[str]) -> Iterator[dict[str, torch.Tensor]]:
        nonlocal reused
        reused = False
        yield {"features": extractor.compute(compared.batches(options.extractor_batch_size), compared.view)[start:]}

    with contextlib.ExitStack() as stack:
        parent = options.features_dir or stack.enter_context(tempfile.TemporaryDirectory())
        folder = described_folder(Path(parent), identity)
        features = fill(folder, {"features": (extractor.width,)}, len(images), batches)["features"]
        if reused:
            logger.info("Features of %s, %d images: reused from %s.", compared.name, len(images), folder)
        return torch.from_numpy(np.array(features))


def compare(reference: torch.Tensor, features: torch.Tensor) -> dict[str, Any]:
    """Return all figures of one set against the reference, from features (N, C) and (M, C)."""
    size = min(KID_SUBSET_SIZE, len(reference), len(features))
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
