r"""Transfer a denoiser of latents, such as an ImageNet DiT, to a labelled data set that it was never trained on.

    python examples/latent_transfer.py --model_name_or_path facebook/DiT-XL-2-256 --dataset_name uoft-cs/cifar10 \
        --num_views 10 --random_flip --random_crop 32 --output_dir runs/dit_cifar10

Every image, and changed copies of it (`--num_views`), are resized to the size that the network was trained on and
encoded once; then the VAE is put away, and the denoiser reads the latents from the disk. Layer and noise level are
chosen on a part of the training images, the best pair is probed on all of them, and tested once. `--finetune` then
trains the network itself. What all this will take is said before it begins; what was interrupted goes on where it
stopped.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers.utils import logging

import finetune
from ddae_hf import DDAEImageProcessor, DDAEModel
from ddae_hf.checkpoints import load_vae
from ddae_hf.experiments.arrays import size
from ddae_hf.experiments.devices import chosen_dtype
from ddae_hf.experiments.latent_folder import LatentFolder
from ddae_hf.experiments.publishing import prepare
from ddae_hf.hidden_states import hidden_size
from labelled import LabelledImages
from latents import EncodedImages, describe_splits, encode_views, state_use
from sweep import Sweep, sweep_one
from sweep_options import parse_arguments

SIGMAS = [0.15, 0.28, 0.42, 0.56]  # of scaled latents: about a DiT's timesteps 42, 82, 122 and 160
FORWARDED = ("dataset_name", "dataset_config_name", "train_data_dir", "train_split", "test_split", "image_column")
FORWARDED += ("label_column", "cache_dir", "max_train_samples", "max_test_samples", "null_class", "seed", "noise_seed")


class LatentSweep(Sweep):
    """A sweep over latents: the denoiser alone, fed what its VAE made of the images."""

    data: EncodedImages

    def open_model(self) -> DDAEModel:
        """Return the denoiser without its VAE."""
        options = {**self.conditions, **chosen_dtype(self.args)}
        model = DDAEModel.from_pretrained(self.checkpoint, vae=None, **options, cache_dir=self.args.cache_dir)
        self.conditions["sample_posterior"] = self.data.folder.index["sample_posterior"]  # of the whole classifier
        return model

    def check(self) -> None:
        """Refuse what cannot be probed, before any long work."""
        folder, shape = self.data.folder, self.model.config.sample_shape
        if folder.shape != shape:
            raise ValueError(
                f"The checkpoint's VAE and image size make latents {folder.shape}, but its denoiser takes {shape}: "
                "mend its preprocessor_config.json, or give the VAE that it was trained with."
            )
        super().check()

    def identify(self) -> dict[str, dict[str, Any]]:
        """Return what tells the latents of each split from others."""
        index = self.data.folder.index
        known = {name: index[name] for name in ("vae", "vae_fingerprint", "shape", "sample_posterior", "seed")}
        return {name: {**known, **index["splits"][name]} for name in self.data.splits}

    def view(self, split: str, rows: np.ndarray, numbers: Sequence[int] | np.ndarray, view: int) -> torch.Tensor:
        """Return the latents of a view of the images at `rows`; epochs beyond the views begin again."""
        return self.data.pixel_values(split, rows, view % self.data.folder.views(split))

    def selection_features(self, layers: list[str], sigma: float, views: Sequence[int] | None = None) -> Any:
        """Return the features that the pair is chosen on: of the images as they are."""
        return super().selection_features(layers, sigma, views=[0])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of latents, and defaults that suit them."""
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    add("--latents_dir", help="Where latents are kept; by default `latents` in --output_dir.")
    add("--encode_batch_size", type=int, default=16, help="Images that are encoded at a time.")
    add("--sample_posterior", action=flag, default=False, help="Draw latents from the VAE's distribution.")
    add(
        "--finetune", type=yaml.safe_load, metavar="OPTIONS",
        help="Then train the network from the best pair on, with these options of finetune.py, as YAML.",
    )  # fmt: skip
    parser.set_defaults(sigmas=SIGMAS, max_selection_samples=10000, output_dir="runs/latent_transfer")


def check(args: argparse.Namespace) -> None:
    """Stop at options that cannot work."""
    if args.checkpoints:
        raise SystemExit("--checkpoints sweeps the checkpoints of a run, which sweep.py does: leave it out.")
    if args.encode_batch_size < 1:
        raise SystemExit(f"--encode_batch_size is {args.encode_batch_size}: it must be at least 1.")
    if args.finetune is not None:
        if not isinstance(args.finetune, dict):
            raise SystemExit(f"--finetune is {args.finetune!r}: it takes options, such as '{{num_train_epochs: 5}}'.")
        try:
            finetune.parse_arguments(finetune_options(args, {"layer": "", "sigma": 1.0}))
        except SystemExit as error:
            raise SystemExit(f"--finetune {args.finetune}: finetune.py does not take this; see above.") from error


def create_folder(args: argparse.Namespace, images: LabelledImages, vae: Any) -> LatentFolder:
    """Return the folder of the images' latents, which are not computed yet."""
    changes: dict[str, Any] = {}
    if args.num_views > 1:
        changes = {"flip": args.random_flip, "crop_padding": args.random_crop, "seed": args.seed}
    splits = describe_splits(images, dict.fromkeys(images.splits, args.num_views), changes)
    draws = {"sample_posterior": args.sample_posterior, "seed": args.seed}
    notes = {"names": images.names, "vae_source": args.model_name_or_path}
    return LatentFolder.create(args.latents_dir, vae, side(images), splits, **draws, **notes)


def side(images: LabelledImages) -> tuple[int, int]:
    """Return the height and the width of the images that the VAE is given."""
    return images.processor.size["height"], images.processor.size["width"]


def features_use(sweep: LatentSweep) -> str:
    """Return what features will take, and how often the denoiser will run, in words."""
    args = sweep.args
    if args.protocol != "logistic_regression":
        return "These probes keep no features: the denoiser runs on every image at each noise level and epoch."
    widths = [4 * hidden_size(sweep.model.denoiser, layer) for layer in sweep.layers]
    choosing, every = len(sweep.rows) * len(args.sigmas), sum(len(labels) for labels in sweep.data.labels.values())
    probing = every * args.num_views * args.num_noise_seeds
    free = shutil.disk_usage(sweep.data.folder.folder).free
    return (
        f"Features take {size(choosing * sum(widths))} to choose on ({len(sweep.layers)} layers, {len(args.sigmas)} "
        f"noise levels, {len(sweep.rows):,} images) and at most {size(probing * max(widths))} of the best pair, in "
        f"{args.features_dir}; {size(free)} are free beside the latents. The denoiser runs on {choosing:,} latents to "
        f"choose, and on {probing:,} to probe the best pair with {args.num_noise_seeds} noise seeds: up to the deepest "
        "layer asked for, no further."
    )


def finetune_options(args: argparse.Namespace, best: dict[str, Any]) -> list[str]:
    """Return the options of `finetune.py` that go on from the best pair, those of `--finetune` last."""
    names = ("model_name_or_path", "latents_dir", *FORWARDED)
    options = {name: getattr(args, name) for name in names} | {"resume_from_checkpoint": "latest"}
    options |= {"layer": best["layer"], "sigma": best["sigma"], "output_dir": str(Path(args.output_dir) / "finetuned")}
    words: list[str] = []
    for name, value in (options | args.finetune).items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            words += [f"--{name}", str(value)]
    return words


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    args = parse_arguments(argv, __doc__, add_arguments)
    args.latents_dir = args.latents_dir or str(Path(args.output_dir) / "latents")
    check(args)
    logging.set_verbosity_error()  # a new classifier is what is wanted here
    logging.disable_progress_bar()
    prepare(args)
    source, cache = args.model_name_or_path, {"cache_dir": args.cache_dir}
    try:
        images = LabelledImages(args, DDAEImageProcessor.from_pretrained(source, **cache))
        vae = load_vae(source, **cache).float().requires_grad_(False)
        folder = create_folder(args, images, vae)
        sweep = LatentSweep(args, source, EncodedImages(images, folder))
        print(f"{state_use(folder, vae, args.encode_batch_size, side(images))}\n{features_use(sweep)}")
        images.batch_size = args.encode_batch_size
        for name, labels in images.labels.items():
            folder.write_labels(name, labels)
        encode_views(folder, vae, images)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error
    report = sweep_one(sweep)
    if args.finetune is not None:
        finetune.main(finetune_options(args, report["best"]))
    print(f"Classifiers, pictures and every figure are in {args.output_dir}.")


if __name__ == "__main__":
    main()
