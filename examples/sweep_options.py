"""The options of `sweep.py`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from data import add_data_arguments, parse_with_config
from ddae_hf.experiments.devices import add_dtype_argument
from ddae_hf.experiments.publishing import add_hub_arguments
from labelled import add_label_arguments
from training_curve import add_curve_arguments

SIGMAS = [0.02, 0.03, 0.05, 0.08, 0.14, 0.25, 0.5, 1.0]
PROTOCOLS = ("logistic_regression", "paper", "batch_norm")
PROTOCOL_HELP = """protocols:
  logistic_regression  full-batch logistic regression on standardised features that are computed once
  paper                a linear layer trained with Adam for 15 epochs of fresh noise, flips and crops (4 pixels)
  batch_norm           the same behind a batch norm without parameters"""


def parse_arguments(
    argv: list[str] | None = None,
    description: str | None = None,
    extend: Callable[[argparse.ArgumentParser], None] | None = None,
) -> argparse.Namespace:
    """Return the options; `description` is what `--help` says of the script, `extend` adds options of its own."""
    parser = argparse.ArgumentParser(
        description=description, epilog=PROTOCOL_HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data_arguments(parser)
    add_label_arguments(parser)
    add_curve_arguments(parser)
    add_hub_arguments(parser)
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    add("--model_name_or_path", help="Checkpoint, folder or Hub id, in any layout.")
    add("--output_dir", default="runs/sweep", help="Folder of the figures, the pictures and the best classifier.")
    add("--features_dir", help="Folder where features are kept; by default `features` in --output_dir.")
    add("--layers", nargs="+", default=["decoder"], help="Names of layers, or `decoder` or `all`.")
    add("--sigmas", nargs="+", type=float, default=SIGMAS, help="Noise levels.")
    add("--l2", nargs="+", type=float, default=[1e-5, 1e-4, 1e-3, 1e-2], help="Strengths of regularisation.")
    add("--protocol", choices=PROTOCOLS, default=PROTOCOLS[0], help="Kind of probe: see the end of this help.")
    add("--num_epochs", type=int, default=15, help="Epochs of the protocols that train online.")
    add("--learning_rate", type=float, default=1e-3, help="Their learning rate.")
    add("--online_batch_size", type=int, default=128, help="Their batch size.")
    add("--validation_fraction", type=float, default=0.2, help="Share of the training images that is chosen on.")
    views = "Views of each image, each with its own noise: trained on, averaged over in tests."
    add("--num_views", type=int, default=1, help=views)
    add("--random_flip", action=flag, help="Mirror half of the images, in views after the first.")
    add("--random_crop", type=int, metavar="PADDING", help="Crop them at random out of so much padding.")
    add("--num_noise_seeds", type=int, default=3, help="Noise seeds that the best pair is tested with.")
    add("--knn", action=flag, default=False, help="Also classify by the nearest 20 and, of as many images, 200.")
    add("--alignment", action=flag, default=False, help="Also measure alignment and uniformity.")
    few = "Also probe with so many labels a class, such as 1 5 10 100."
    add("--few_labels", nargs="+", type=int, default=[], help=few)
    add("--num_draws", type=int, default=5, help="Draws of those labels.")
    add("--num_noise_samples", type=int, default=1, help="Draws of noise that every view's features are averaged over.")
    add("--null_class", type=int, help="The label that stands for none, for a class-conditional denoiser.")
    add("--batch_size", type=int, default=250)
    add_dtype_argument(parser)
    add("--noise_seed", type=int, default=0, help="First noise seed.")
    add("--seed", type=int, default=0, help="Seed of the validation split and the draws of labels.")
    selection = "Choose layer and noise level on this many training images; by default on all."
    add("--max_selection_samples", type=int, help=selection)
    if extend is not None:
        extend(parser)
    args = parse_with_config(parser, argv)
    check_arguments(parser, args)
    return args


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Stop at options that cannot work, and settle those that depend on the protocol."""
    if (args.model_name_or_path is None) == (args.checkpoints is None):
        parser.error("Give one of --model_name_or_path and --checkpoints.")
    if args.checkpoints and args.push_to_hub:
        parser.error("--push_to_hub pushes one classifier: sweep one checkpoint, with --model_name_or_path.")
    if args.max_selection_samples is not None and args.max_selection_samples < 2:
        parser.error(f"--max_selection_samples is {args.max_selection_samples}: it must be at least 2.")
    counts = ("num_views", "num_noise_seeds", "num_draws", "num_noise_samples", "batch_size")
    least = dict.fromkeys((*counts, "num_epochs", "online_batch_size"), 1) | {"noise_seed": 0, "random_crop": 0}
    for name, smallest in least.items():
        if (value := getattr(args, name)) is not None and value < smallest:
            parser.error(f"--{name} is {value}: it must be at least {smallest}.")
    if not 0 < args.learning_rate < math.inf:
        parser.error(f"--learning_rate is {args.learning_rate}: it must be positive.")
    if not all(0 < l2 < math.inf for l2 in args.l2):
        parser.error(f"--l2 is {args.l2}: every strength must be positive.")
    if not 0 < args.validation_fraction < 1:
        parser.error(f"--validation_fraction is {args.validation_fraction}: it must be between 0 and 1.")
    online = args.protocol != "logistic_regression"
    if not online and args.num_views == 1 and (args.random_flip or args.random_crop):
        parser.error("--random_flip and --random_crop change the views after the first: give --num_views 2 or more.")
    encoded = hasattr(args, "latents_dir")  # views are made beforehand, for every protocol
    for name in ["few_labels"] + ["num_views"] * (not encoded):
        if online and getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name} is of logistic regression, not of --protocol {args.protocol}.")
    args.sigmas = list(dict.fromkeys(args.sigmas))
    args.random_flip = online if args.random_flip is None else args.random_flip
    args.random_crop = 4 * online if args.random_crop is None else args.random_crop
    args.features_dir = args.features_dir or str(Path(args.output_dir) / "features")
