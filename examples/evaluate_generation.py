r"""Measure how far a checkpoint's images are from real ones: Frechet and kernel distance, precision and recall.

    accelerate launch examples/evaluate_generation.py --model_name_or_path runs/cifar10_ddpm_unet \
        --dataset_name uoft-cs/cifar10 --baseline_split test --extractor transformers:facebook/dinov2-base \
        --output_dir runs/cifar10_generation

Images are sampled into `images` of the output folder, number i from seed `--seed` + i; interrupted sampling goes on
with the same command, and several processes share it. `--images_dir` measures images that are there already.

All figures are taken between features of one network, and cannot be compared with those of another:

- `ddae:PATH`: the pooled hidden state of a denoiser, of a checkpoint in any layout. Compare generators by one and the
  same checkpoint; a generator's own features may be blind to its faults.
- `transformers:PATH`: a vision model of transformers, with its image processor, which is given RGB of 8 bits, as is
  Inception: images of 16 bits are scaled.
- `inception`, or `inception:FILE` (`.safetensors` or `.pth`): the Inception network of the published FID, in
  torch-fidelity's conversion, which needs torch-fidelity and torchvision. The network itself resizes images. A FID by
  this path has not been run by us.

Where the data has some of the classes of a class-conditional checkpoint, name them with `--class_label`, so that images
of the same classes are compared; `all` takes every class in turn, and needs as many images as there are classes.

Features are kept in `--features_dir`, each array beside a JSON file that says what they are of, and are reused.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Image
from PIL import Image as PILImage
from safetensors.torch import load_file
from tqdm.auto import tqdm
from transformers import AutoModel

# By its module: some versions hide the name in the package where torchvision is missing, though it is not needed.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import logging

import ddae_hf
from data import image_column, images_hash, load_splits, parse_with_config, pick_split
from ddae_hf import DDAEImageProcessor, DDAEModel, DDAEPipeline
from ddae_hf.experiments.arrays import described_folder, fill
from ddae_hf.experiments.classes import draw_images
from ddae_hf.experiments.devices import best_device, made_fast
from ddae_hf.experiments.features import evaluating, extract_features
from ddae_hf.experiments.generation_metrics import frechet_distance, kernel_distance, precision_recall
from ddae_hf.experiments.image_folder import image_extensions, list_folder
from ddae_hf.experiments.pixels import read_images
from ddae_hf.experiments.plots import image_grid
from ddae_hf.hidden_states import pool_hidden_states
from ddae_hf.image_processing_ddae import as_rgb
from ddae_hf.weights import fingerprint
from generate import (
    IMAGE_OPTIONS,
    add_sampling_arguments,
    check_sampling_arguments,
    chosen_classes,
    image_paths,
    open_pipeline,
    open_processes,
    sample,
)
from labelled import ready

REFERENCE_VIEW, GENERATED_VIEW, BASELINE_VIEW = 0, 1, 2  # images that are compared never share noise
FEWEST = 4  # the third neighbour of an image must be there
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
COLOURS = "RGB of 8 bits, as `as_rgb` gives them"  # features of images that were clipped to 8 bits are not reused


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model_name_or_path", help="Checkpoint to sample from, folder or Hub id, in any layout.")
    add("--images_dir", help="In place of a checkpoint: a folder of images, and of folders of them.")
    add("--num_images", type=int, default=50000, help="Images to sample; of --images_dir all are taken.")
    add("--output_dir", default="runs/generation", help="Folder of the images and their figures.")
    add("--extractor", required=True, help="ddae:PATH, transformers:PATH, inception or inception:FILE.")
    add("--extractor_layer", help="Layer of a DDAE extractor; by default its configuration's.")
    add("--extractor_sigma", type=float, help="Noise level of a DDAE extractor; by default its configuration's.")
    add("--extractor_batch_size", type=int, default=100)
    add("--features_dir", default="runs/features", help="Where features are kept.")
    add_sampling_arguments(parser)
    add = parser.add_argument_group("real images").add_argument
    add("--dataset_name", help="Hub id, a local folder, or a parquet file.")
    add("--dataset_config_name", help="Configuration of a Hub data set.")
    add("--train_data_dir", help="Folder of images, in place of --dataset_name.")
    add("--reference_split", default="train", help="Split of the images to compare with.")
    add("--max_reference_samples", type=int, help="Use N images of it, of all classes.")
    add("--baseline_split", help="Also compare real images of this split, at most as many as generated ones.")
    add("--image_column", help="Column of images; by default the only one that holds images.")
    args = parse_with_config(parser, argv)
    check_arguments(parser, args)
    return args


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Stop at options that cannot work."""
    check_sampling_arguments(parser, args)
    if (args.model_name_or_path is None) == (args.images_dir is None):
        parser.error("Give one of --model_name_or_path and --images_dir.")
    kind, _, path = args.extractor.partition(":")
    if kind not in EXTRACTORS or not (path or kind == "inception"):
        parser.error(f"--extractor {args.extractor}: allowed are ddae:PATH, transformers:PATH, inception[:FILE].")
    if kind != "ddae" and (args.extractor_layer or args.extractor_sigma is not None):
        parser.error(f"--extractor_layer and --extractor_sigma are for a DDAE extractor, not for {kind}.")
    if args.num_images < FEWEST or args.extractor_batch_size < 1:
        parser.error(f"--num_images must be at least {FEWEST}, --extractor_batch_size at least 1.")


@dataclass
class ImageSet:
    """Images to compare: what they are called, where they are, which draw of noise their features take."""

    name: str
    dataset: Dataset
    column: str
    view: int

    def __post_init__(self) -> None:
        if len(self) < FEWEST:
            raise SystemExit(f"The images {self.name!r} are {len(self)}: at least {FEWEST} are needed.")

    def __len__(self) -> int:
        return len(self.dataset)

    def batches(self, size: int) -> Iterator[list[PILImage.Image]]:
        """Yield the images, `size` at a time."""
        for start in tqdm(range(0, len(self), size), desc=f"Features of {self.name}", leave=False):
            yield read_images(self.dataset, [*range(len(self))[start : start + size]], self.column)


def real_images(args: argparse.Namespace, count: int) -> dict[str, ImageSet]:
    """Return the reference, and the baseline if asked for: at most `count` images, as distances depend on it."""
    splits = load_splits(argparse.Namespace(**vars(args), train_split=args.reference_split))
    wanted = {"reference": (args.reference_split, args.max_reference_samples, REFERENCE_VIEW)}
    if args.baseline_split is not None:
        wanted["baseline"] = (args.baseline_split, count, BASELINE_VIEW)
    found = {}
    for role, (split, limit, view) in wanted.items():
        dataset = pick_split(splits, split, limit)
        column = image_column(dataset, args.image_column)
        found[role] = ImageSet(f"real ({split})", dataset.select_columns(column), column, view)
    return found


def folder_images(paths: list[Path]) -> ImageSet:
    """Return image files as a set."""
    dataset = Dataset.from_dict({"image": [str(path) for path in paths]}).cast_column("image", Image())
    return ImageSet("generated", dataset, "image", GENERATED_VIEW)


def find_images(folder: Path) -> list[Path]:
    """Return the images under a folder, in the order of their names, but not the grid that `generate.py` leaves."""
    if not folder.is_dir():
        raise SystemExit(f"--images_dir {folder}: there is no such folder.")
    found = list_folder(folder, image_extensions())
    if "grid.png" in found.files:
        found.files.remove("grid.png")
        found.skipped["grid.png"] += 1
    if found.skipped:
        warnings.warn(f"--images_dir {folder}: {found.what_was_skipped()}.", stacklevel=2)
    return [folder / path for path in found.files]


@dataclass
class Extractor:
    """A network whose features are compared.

    Attributes:
        identity: What features depend on beside the images, as JSON.
        compute: Function of images in batches and the number of the draw of noise that returns features (N, C).
        width: Their width C, which is known once an image was tried.
    """

    identity: dict[str, Any]
    compute: Callable[[Iterable[list[PILImage.Image]], int], torch.Tensor]
    width: int = 0


def ddae_extractor(path: str, args: argparse.Namespace) -> Extractor:
    """Return pooled hidden states of a denoiser, under noise that depends on each image's number and the view."""
    tap = {"layer": args.extractor_layer, "sigma": args.extractor_sigma}
    model = DDAEModel.from_pretrained(path, **{n: v for n, v in tap.items() if v is not None}, cache_dir=args.cache_dir)
    ready(model)
    processor = DDAEImageProcessor.from_pretrained(path, cache_dir=args.cache_dir)
    config = model.config
    names = ["layer", "sigma", "pooling", "noise_seed", "num_noise_samples", "null_class", "denoiser", "scheduler"]
    names += [] if config.vae is None else ["vae", "sample_posterior"]

    def compute(batches: Iterable[list[PILImage.Image]], view: int) -> torch.Tensor:
        pixels = (processor(images, return_tensors="pt")["pixel_values"] for images in batches)
        options: dict[str, Any] = {"noise_seed": config.noise_seed, "view": view}
        return extract_features(model, pixels, [config.layer], config.sigma, **options)[config.layer]

    identity = identity_of(processor, model.denoiser, model.vae)
    return Extractor(identity | {n: getattr(config, n) for n in names}, compute)


def transformers_extractor(path: str, args: argparse.Namespace) -> Extractor:
    """Return the pooled output of a vision model, or the mean of its last hidden state where it has none."""
    model, info = AutoModel.from_pretrained(
        path, dtype=torch.float32, use_safetensors=True, output_loading_info=True, cache_dir=args.cache_dir
    )
    if model.main_input_name != "pixel_values":
        raise ValueError(f"{type(model).__name__} takes {model.main_input_name}: give a model of images alone.")
    missing = set(info["missing_keys"])
    if any(name.startswith("pooler.") for name in missing):
        model.pooler = None  # it would be a random one
        missing = {name for name in missing if not name.startswith("pooler.")}
    if missing:
        raise ValueError(f"its weights {sorted(missing)[:3]} are missing.")
    made_fast(model, best_device()).to(best_device()).eval()
    processor = AutoImageProcessor.from_pretrained(path, backend="pil", cache_dir=args.cache_dir)

    @evaluating(model)
    def run(images: list[PILImage.Image]) -> Any:
        pixels = processor([as_rgb(image) for image in images], return_tensors="pt")["pixel_values"]
        return model(pixel_values=pixels.to(model.device))

    has_pooler = run([PILImage.new("RGB", (64, 64))]).get("pooler_output") is not None

    def features(images: list[PILImage.Image]) -> torch.Tensor:
        outputs = run(images)
        if has_pooler:
            return outputs.pooler_output.flatten(1).float().cpu()
        return pool_hidden_states(outputs.last_hidden_state).cpu()

    identity = identity_of(processor, model) | {"colours": COLOURS}
    identity["features"] = "pooler_output" if has_pooler else "mean of last_hidden_state"
    return Extractor(identity, lambda batches, view: torch.cat([features(images) for images in batches]))


def inception_extractor(path: str, args: argparse.Namespace) -> Extractor:
    """Return the 2048 features of the Inception network of the published FID; downloaded if no file is given."""
    try:
        from torch_fidelity import feature_extractor_inceptionv3 as fidelity
    except ImportError as error:
        raise ValueError(
            "it needs torch-fidelity, and that a torchvision of your torch's build: pip install torchvision "
            f"torch-fidelity ({error})."
        ) from error
    if path.endswith(".safetensors"):
        state = load_file(path)
    elif path:
        state = torch.load(path, map_location="cpu", weights_only=True)
    else:
        state = torch.hub.load_state_dict_from_url(fidelity.URL_INCEPTION_V3, map_location="cpu", weights_only=True)
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        # torch-fidelity unpickles what it is given: it gets what was read without.
        torch.save(state, file.name)
        network = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], file.name)
    made_fast(network, best_device()).to(best_device())

    @evaluating(network)
    def features(images: list[PILImage.Image]) -> torch.Tensor:
        arrays = [torch.from_numpy(np.array(as_rgb(image))).permute(2, 0, 1) for image in images]
        alike = len({array.shape for array in arrays}) == 1
        batches = [torch.stack(arrays)] if alike else [array[None] for array in arrays]
        return torch.cat([network(pixels.to(best_device()))[0].flatten(1).float().cpu() for pixels in batches])

    identity = identity_of(None, network) | {"colours": COLOURS, "features": "last pooling"}
    return Extractor(identity, lambda batches, view: torch.cat([features(images) for images in batches]))


def identity_of(processor: Any, network: torch.nn.Module, vae: torch.nn.Module | None = None) -> dict[str, Any]:
    """Return what tells a network, with its VAE, and the preparation of its images from others."""
    return {
        "network": type(network).__name__,
        "weights": fingerprint(network, vae, dtype=None),
        "dtype": str(next(network.parameters()).dtype),
        "preprocessing": {k: v for k, v in processor.to_dict().items() if v is not None} if processor else {},
    }


EXTRACTORS = {"ddae": ddae_extractor, "transformers": transformers_extractor, "inception": inception_extractor}


def open_extractor(args: argparse.Namespace, images: ImageSet) -> Extractor:
    """Return the extractor, tried on one image, so that what cannot work ends the run before any long work."""
    kind, _, path = args.extractor.partition(":")
    try:
        extractor = EXTRACTORS[kind](path, args)
        extractor.width = extractor.compute([images.dataset[:1][images.column]], images.view).shape[1]
    except Exception as error:  # checkpoints and networks raise a dozen kinds
        raise SystemExit(f"--extractor {args.extractor} cannot be used: {error}") from error
    return extractor


def kept_features(extractor: Extractor, images: ImageSet, args: argparse.Namespace) -> torch.Tensor:
    """Return features (N, C), from disk if they were computed before."""
    content = {"number": len(images), "sha256": images_hash(images.dataset, images.column)}
    identity = {"extractor": extractor.identity, "images": content, "view": images.view}
    reused = True

    def batches(start: int, missing: list[str]) -> Iterator[dict[str, torch.Tensor]]:
        nonlocal reused
        reused = False
        yield {"features": extractor.compute(images.batches(args.extractor_batch_size), images.view)[start:]}

    try:
        folder = described_folder(Path(args.features_dir), identity)
        features = fill(folder, {"features": (extractor.width,)}, len(images), batches)["features"]
    except (ValueError, OSError) as error:  # a damaged file, no space
        raise SystemExit(str(error)) from error
    if reused:
        print(f"Features of {images.name}, {len(images):,} images: reused from {folder}.")
    return torch.from_numpy(np.array(features))


def compare(reference: torch.Tensor, features: torch.Tensor) -> dict[str, Any]:
    """Return all figures of one set against the reference."""
    size = min(KID_SUBSET_SIZE, len(reference), len(features))
    kernel, spread = kernel_distance(reference, features, subsets=KID_SUBSETS, subset_size=size)
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


def generator_report(args: argparse.Namespace, pipeline: DDAEPipeline | None) -> dict[str, Any]:
    """Return what the generated images were made by."""
    if pipeline is None:
        return {"images_dir": args.images_dir}
    made = {name: getattr(args, name) for name in ("model_name_or_path", *IMAGE_OPTIONS)}
    made |= {"weights": fingerprint(pipeline.denoiser, pipeline.vae, dtype=None)}
    classes = chosen_classes(args, pipeline)
    made |= {} if classes is None else {"num_classes": [min(args.num_images, len(classes)), len(classes)]}
    return made | {"scheduler": type(pipeline.scheduler).__name__}


def versions(args: argparse.Namespace) -> dict[str, str]:
    """Return the versions of what figures may depend on."""
    names = ["torch", "diffusers", "transformers", "torchmetrics", "pillow"]
    names += ["torch-fidelity"] if args.extractor.startswith("inception") else []
    return {"ddae_hf": ddae_hf.__version__} | {name: importlib.metadata.version(name) for name in names}


def save_picture(path: Path, sets: dict[str, ImageSet], count: int = 36) -> None:
    """Draw some generated images beside some of the reference."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 6))
    for axis, role in zip(axes, ("generated", "reference"), strict=True):
        images = sets[role].dataset[draw_images(len(sets[role]), count)][sets[role].column]
        axis.imshow(image_grid(images, columns=6), interpolation="nearest")
        axis.set_title(f"{sets[role].name}, {len(images)} of {len(sets[role]):,}")
        axis.axis("off")
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def table(report: dict[str, Any]) -> str:
    """Return the report as two Markdown tables: what was compared, and the figures."""
    generator, extractor = report["generator"], report["extractor"]
    rows = {"generator": generator.get("images_dir", generator.get("model_name_or_path"))}
    if "weights" in generator:
        sampler = generator["sampler"] or generator["scheduler"]
        rows["generator's weights"] = f"SHA-256 {generator['weights'][:16]}"
        rows["sampling"] = f"{sampler}, {generator['num_inference_steps']} steps, seeds from {generator['seed']}"
        if generator["class_label"] is not None:
            labels, (made, asked) = generator["class_label"], generator["num_classes"]
            names = ", ".join(map(str, labels)) if isinstance(labels, list) else labels
            few = "" if made == asked else f" (images of the first {made:,} of {asked:,})"
            rows["classes"] = f"{names}{few}, guidance {generator['guidance_scale']:g}"
    tap = f"{extractor['layer']} at sigma {extractor['sigma']:.3g}" if "layer" in extractor else extractor["features"]
    rows["features"] = f"{extractor['name']}, {tap}, {extractor['width']} numbers an image"
    rows["extractor's weights"] = f"SHA-256 {extractor['weights'][:16]}"
    reference = report["reference"]
    rows["reference"] = f"{reference['num_images']:,} images, {reference['name']} of {reference['source']}"
    rows["versions"] = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = ["| setting | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items()), ""]
    lines += ["| images | number | Frechet distance | kernel distance x 1000 | precision | recall |", "|---" * 6 + "|"]
    for name, r in report["results"].items():
        kernel, spread = f"{1000 * r['kernel_distance']:.3g}", r["kernel_distance_std_over_subsets"]
        kernel += "" if spread is None else f" ± {1000 * spread:.2g}"
        figures = f"{r['frechet_distance']:.4g} | {kernel} | {r['precision']:.3f} | {r['recall']:.3f}"
        lines.append(f"| {name} | {r['num_images']:,} | {figures} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    args = parse_arguments(argv)
    logging.set_verbosity_error()  # what is missing from a checkpoint is looked at here
    logging.disable_progress_bar()
    started, output = time.monotonic(), Path(args.output_dir)
    processes = open_processes()
    if args.images_dir is None:
        pipeline, paths = open_pipeline(args), image_paths(output / "images", args.num_images)
    else:
        pipeline, paths = None, find_images(Path(args.images_dir))
    if processes.is_main_process:
        sets = real_images(args, len(paths))
        extractor = open_extractor(args, sets["reference"])
    if pipeline is not None:
        sample(args, pipeline, processes, output / "images")
        pipeline.to("cpu")
    if not processes.is_main_process:
        return
    sets["generated"] = folder_images(paths)
    features = {role: kept_features(extractor, images, args) for role, images in sets.items()}
    reference = features.pop("reference")
    report = {
        "options": vars(args),
        "generator": generator_report(args, pipeline),
        "extractor": {"name": args.extractor, "width": reference.shape[1], **extractor.identity},
        "reference": {
            "source": args.dataset_name or args.train_data_dir,
            "name": sets["reference"].name,
            "num_images": len(reference),
        },
        "versions": versions(args),
        "results": {
            sets[role].name: compare(reference, values) for role, values in tqdm(features.items(), desc="Comparing")
        },
        "seconds": round(time.monotonic() - started, 1),
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "generation_results.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    save_picture(output / "grid.png", sets)
    print(table(report))


if __name__ == "__main__":
    main()
