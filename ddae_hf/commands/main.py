"""The program `ddae NAME`, which is `python -m ddae_hf NAME` and `accelerate launch -m ddae_hf NAME` as well.

ddae --help
ddae pretrain --train_data_dir photos --output_dir runs/photos
accelerate launch -m ddae_hf pretrain --config cifar10_ddpm_unet --dataset_name uoft-cs/cifar10
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

COMMANDS = {
    "quickstart": "pretrain, generate and classify handwritten digits, in a few minutes",
    "pretrain": "train a denoiser on images, which need no labels, or on latents",
    "generate": "generate images into a folder",
    "probe": "train a linear classifier on a denoiser's hidden states",
    "sweep": "find a denoiser's best layer and noise level",
    "finetune": "fine-tune a denoiser as a classifier",
    "segment": "train a head that gives every pixel a class, on images with masks",
    "noisy": "classify noisy images, beside a network that is trained on them",
    "diffusion-classifier": "classify images by a denoiser's error under each class, without training",
    "outliers": "tell images of other data sets from those that a denoiser knows",
    "evaluate": "measure how far generated images are from real ones",
    "transfer": "transfer a denoiser of latents to a labelled data set",
    "train-vae": "train a small autoencoder, for denoisers of latents",
    "encode": "encode images as latents, once",
    "export": "write features to parquet or npy files",
    "correspondence": "find the points of an image again in a warped copy of it",
    "ema": "make the average of a trained network's weights over another length",
    "convert": "convert a published checkpoint of another code base",
    "demo": "show a checkpoint on a local web page, or write a Space of it",
    "configs": "list the configurations that --config takes by name",
}
# Commands that several processes can share.
SHARED = (
    "pretrain",
    "generate",
    "probe",
    "sweep",
    "finetune",
    "segment",
    "noisy",
    "diffusion-classifier",
    "outliers",
    "evaluate",
    "transfer",
    "train-vae",
    "encode",
    "export",
)
EXTRAS = {"demo": "demo", "quickstart": "quickstart"}  # what commands need in place of `experiments`
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def run(argv: Sequence[str] | None = None) -> None:
    """Run a command, by default the one that this process was given, with threads that yield the cores while waiting.

    torch's threads spin at every barrier. That gains a little on an idle machine, and costs several times as much where
    other programs use the cores. The OpenMP library reads its settings when it is loaded, which happens when this
    package is imported, so the program starts itself again. Settings of the user's own stay.
    """
    waits = any(name in os.environ for name in WAITING) or os.environ.get("OMP_NUM_THREADS") == "1"
    words = list(sys.argv[1:] if argv is None else argv)
    computes = words and words[0] != "configs" and {"-h", "--help", "--version"}.isdisjoint(words)
    if sys.platform == "linux" and computes and not waits:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    main(words)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        argv: Its name and options; by default the words after this process's own name.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        return
    name = words[0].replace("_", "-")
    if name == "--version":
        from .. import __version__

        print(f"ddae_hf {__version__}")
        return
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=3, cutoff=0.5) or COMMANDS
        print(f"ddae: there is no command {words[0]!r}. The nearest: {', '.join(near)}.", file=sys.stderr)
        raise SystemExit(2)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1 and name not in SHARED:
        raise SystemExit(
            f"ddae {name} runs as one process, but {processes} were launched: start it without `accelerate launch`. "
            f"The commands that several processes can share are {', '.join(SHARED)}."
        )
    try:
        from . import running

        command = importlib.import_module(f".{name.replace('-', '_')}", __package__)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == __package__.partition(".")[0]:
            raise
        from ..experiments.libraries import not_installed  # `ddae --help` does not need it

        raise SystemExit(not_installed(f"ddae {name}", error.name, EXTRAS.get(name, "experiments"))) from error
    running.run_command(command, words[1:])


def overview() -> str:
    """Return what `ddae --help` says: a line for every command."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:{width}}{line}" for name, line in COMMANDS.items()]
    head = "usage: ddae COMMAND [options]\n\nOne network generates images and classifies them.\n\ncommands:"
    return "\n".join([head, *lines, "", "`ddae COMMAND --help` shows a command's options, with their defaults."])
