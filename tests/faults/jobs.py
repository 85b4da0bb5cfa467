"""The commands that are put through faults, and what they leave: whether it opens, and whether it is the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from tests.conftest import TINY, make_unet, make_vae

CLOSE = 1e-5  # what two processes may differ by, which add in another order
# What reports and configurations say of times, or of where a training was taken up.
TIMES = {
    "_name_or_path", "images_per_second", "images_this_run", "seconds", "seconds_this_run", "train_seconds",
    "train_seconds_this_run",
}  # fmt: skip
# Files of a run that tell times, or belong to the process that is at work.
APART = ("*.lock", "*.partial", "*/trainer_state.json", "*/files.json", "*/progress.json", "README.md")
TRAINING = ["--checkpointing_steps", 3, "--max_train_steps", 12, "--resume_from_checkpoint", "latest"]


@dataclass(frozen=True)
class Job:
    """A command with its options, on one process or two."""

    name: str
    words: tuple[str, ...]
    opens: Callable[[Path], None]  # opens what is in a folder, or raises `ValueError` or `OSError` with a sentence
    processes: int = 1

    @property
    def command(self) -> str:
        """The command's name."""
        return self.words[0]


def prepare(folder: Path) -> None:
    """Write what the jobs need into a folder: images in one file and in four, a denoiser and a VAE."""
    from diffusers import DDIMScheduler

    from ddae_hf import DDAEPipeline
    from ddae_hf.experiments.digits import digits, write_digits

    splits = {name: (images[:count], labels[:count]) for (name, (images, labels)), count in zip(
        digits().items(), (160, 60), strict=True
    )}  # fmt: skip
    write_digits(folder / "digits", splits)
    for part in range(4):
        images, labels = splits["train"]
        write_digits(folder / "parts", {f"train-{part}-of-4": (images[part::4], labels[part::4])})
    unet = make_unet(in_channels=1, out_channels=1)
    DDAEPipeline.for_denoiser(unet, DDIMScheduler()).save_pretrained(folder / "unet")
    make_vae(in_channels=1, out_channels=1).save_pretrained(folder / "vae")


def all_jobs(data: Path) -> list[Job]:
    """Return the jobs, which read the folder that `prepare` has filled."""
    digits = ["--dataset_name", data / "digits"]
    bfloat16 = ["--mixed_precision", "bf16"]
    workers = ["--dataloader_num_workers", 2]
    train = [*TRAINING, "--lr_warmup_steps", 2, "--total_batch_size", 16]
    pretrain = ["pretrain", *train, "--denoiser", json.dumps(TINY), "--sample_steps", 6, "--grid_images", 4]
    pretrain += ["--num_inference_steps", 2]
    stream = ["--dataset_name", data / "parts", "--streaming", "--shuffle_buffer", 30, "--train_batch_size", 8]
    autoencoder = {"block_out_channels": [8, 8], "norm_num_groups": 4, "in_channels": 1}
    vae = ["train-vae", *digits, *train, "--autoencoder", json.dumps(autoencoder), "--resolution", 8, "--held_out", 20]
    finetune = ["finetune", "--model_name_or_path", data / "unet", *digits, *TRAINING]
    sweep = ["sweep", "--model_name_or_path", data / "unet", *digits, "--layers", "decoder", "--sigmas", 0.1, 0.5]
    sweep += ["--batch_size", 20, "--num_noise_seeds", 1, "--l2", 1e-3]
    encode = ["encode", "--vae", data / "vae", *digits, "--resolution", 16, "--batch_size", 20]
    drawn = ["--mirror", "--sample_posterior", "--dtype", "bfloat16"]
    halves = ["--train_batch_size", 8]
    quarters = ["--train_batch_size", 4]
    averaged = ["--ema_decay", 0.9]
    steps = ["--train_batch_size", 8, "--gradient_accumulation_steps"]
    one = [
        ("pretrain, accumulation", [*pretrain, *digits, *halves], opens_pipeline),
        ("pretrain, bfloat16, workers", [*pretrain, *digits, *bfloat16, *workers], opens_pipeline),
        ("pretrain, stream, workers, accumulation", [*pretrain, *stream, *workers], opens_pipeline),
        ("train-vae, accumulation", [*vae, *halves], opens_vae),
        ("train-vae, bfloat16, workers", [*vae, *bfloat16, *workers], opens_vae),
        ("finetune, accumulation", [*finetune, *steps, 2, *averaged], opens_classifier),
        ("finetune, bfloat16, workers", [*finetune, *steps, 1, *bfloat16, *workers], opens_classifier),
        ("sweep", sweep, opens_nothing),
        ("sweep, bfloat16", [*sweep, "--dtype", "bfloat16"], opens_nothing),
        ("encode", encode, opens_latents),
        ("encode, bfloat16, two drawn views", [*encode, *drawn], opens_latents),
    ]
    two = [
        ("pretrain, accumulation, workers", [*pretrain, *digits, *quarters, *workers], opens_pipeline),
        ("pretrain, stream, bfloat16", [*pretrain, *stream, *bfloat16], opens_pipeline),
        ("train-vae, accumulation", [*vae, *quarters], opens_vae),
        ("finetune", [*finetune, *steps, 1, *averaged], opens_classifier),
        ("sweep", sweep, opens_nothing),
        ("encode, bfloat16, two drawn views", [*encode, *drawn], opens_latents),
    ]
    found = [Job(name, _words(words), opens) for name, words, opens in one]
    return found + [Job(f"two processes: {name}", _words(words), opens, 2) for name, words, opens in two]


def _words(options: list[Any]) -> tuple[str, ...]:
    return (*(str(option) for option in options), "--output_dir", "out")


def opens_nothing(folder: Path) -> None:
    """Open nothing: a sweep's arrays are compared as they are."""


def opens_pipeline(folder: Path) -> None:
    """Open a denoiser."""
    from ddae_hf import DDAEPipeline

    DDAEPipeline.from_pretrained(folder)


def opens_vae(folder: Path) -> None:
    """Open an autoencoder."""
    from ddae_hf.checkpoints import load_vae

    load_vae(folder)


def opens_classifier(folder: Path) -> None:
    """Open a classifier."""
    from ddae_hf import DDAEForImageClassification

    DDAEForImageClassification.from_pretrained(folder)


def opens_latents(folder: Path) -> None:
    """Read all latents of a folder, and their labels."""
    from ddae_hf.experiments.latent_folder import LatentFolder

    latents = LatentFolder(folder)
    latents.labels("train")
    for view in range(latents.views("train")):
        latents.latents("train", view)


def files_of(folder: Path) -> dict[str, Path]:
    """Return the files of a folder whose content a run decides, by their path in it."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    known = {path.relative_to(folder).as_posix(): path for path in found}
    return {name: path for name, path in known.items() if not any(Path("/", name).match(apart) for apart in APART)}


def differences(expected: Path, found: Path, names: list[str], close: float) -> Iterator[str]:
    """Yield in words how files of these names differ in two folders; numbers may differ by so much."""
    for name in names:
        if not (found / name).is_file():
            yield f"{name} is missing"
            continue
        try:
            problem = _difference(expected / name, found / name, close)
        except Exception as error:  # whatever a damaged file may raise
            problem = f"cannot be read: {error!r}"
        if problem:
            yield f"{name} {problem}"


def _difference(expected: Path, found: Path, close: float) -> str | None:
    if expected.suffix in (".safetensors", ".npy"):
        old, new = _arrays(expected), _arrays(found)
        if old.keys() != new.keys():
            return "has other tensors"
        return _largest_difference(old, new, close)
    if expected.suffix == ".json":
        old, new = (json.loads(path.read_text()) for path in (expected, found))
        if expected.name == "rows.json":  # what a cache has forgotten it computes anew when it is asked for it
            old, new = ({name: known[name] for name in old.keys() & new.keys()} for known in (old, new))
        return None if _alike(old, new, close) else "says something else"
    if expected.suffix in (".bin", ".pt", ".pth", ".pkl"):  # torch's archives, which the weights follow from
        return None
    if close and expected.suffix == ".png":
        return None
    return None if expected.read_bytes() == found.read_bytes() else "has other bytes"


def _arrays(path: Path) -> dict[str, np.ndarray]:
    if path.suffix == ".npy":
        return {"": np.load(path)}
    with safe_open(path, "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _largest_difference(old: dict[str, np.ndarray], new: dict[str, np.ndarray], close: float) -> str | None:
    for name, values in old.items():
        if values.shape != new[name].shape or values.dtype != new[name].dtype:
            return f"has {name} of another shape or type"
        if values.dtype.kind != "f":
            apart = float(not np.array_equal(values, new[name]))
        else:
            apart = float(np.abs(values.astype(np.float64) - new[name].astype(np.float64)).max(initial=0.0))
        if not apart <= close * max(1.0, float(np.abs(values.astype(np.float64)).max(initial=0.0))):
            return f"has a {name or 'value'} that differs by {apart:.2g}"
    return None


def _alike(old: Any, new: Any, close: float) -> bool:
    if isinstance(old, dict) and isinstance(new, dict):
        names = (old.keys() | new.keys()) - TIMES
        return all(name in old and name in new and _alike(old[name], new[name], close) for name in names)
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(_alike(one, two, close) for one, two in zip(old, new, strict=True))
    if isinstance(old, float) and isinstance(new, float):
        return old == new or abs(old - new) <= 100 * close * max(1.0, abs(old))
    return old == new
