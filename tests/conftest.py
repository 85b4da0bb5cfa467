"""Tiny real networks, checkpoints in every layout, and a small data set of real digits."""

import functools
import json
import multiprocessing
import os
import signal
import zlib
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"
# Tiny networks gain nothing from threads, which get into each other's way where tests run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    UNet2DModel,
)
from PIL import Image
from safetensors.torch import load_file

TINY = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}


def files_of(folder):
    """All weights below a folder, by file and name."""
    paths = sorted(folder.rglob("*.safetensors"))
    return {(str(path.relative_to(folder)), name): value for path in paths for name, value in load_file(path).items()}


def assert_equal(one, two):
    assert one.keys() == two.keys() and one
    assert all(torch.equal(value, two[key]) for key, value in one.items())


def make_unet(seed=0, **options):
    torch.manual_seed(seed)
    return UNet2DModel(**{**TINY, **options}).eval()


def make_dit(seed=0, **options):
    torch.manual_seed(seed)
    tiny = {"sample_size": 8, "in_channels": 3, "num_layers": 4, "num_attention_heads": 2, "attention_head_dim": 16}
    return DiTTransformer2DModel(**{**tiny, "num_embeds_ada_norm": 5, **options}).eval()


def make_vae(seed=0, **options):
    """A VAE whose latents have half the side of its images, and four channels."""
    torch.manual_seed(seed)
    tiny = {"block_out_channels": (8, 8), "norm_num_groups": 4, "sample_size": 16}
    tiny |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(**{**tiny, **options}).eval()


def together(*calls):
    """Run functions in processes of their own that start at once, and return how they ended."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(len(calls))

    def run(call):
        torch.set_num_threads(1)  # the threads of the parent are not there
        barrier.wait()
        call()

    processes = [context.Process(target=run, args=(call,), daemon=True) for call in calls]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def drawn(digits, split, count):
    """The digits that every script takes when it is asked for so many of a split."""
    from datasets import Dataset

    from ddae_hf.experiments.classes import draw_images

    dataset = Dataset.from_parquet(str(digits / f"{split}.parquet"))
    return dataset.select(draw_images(dataset["label"][:], count))


def put(folder, *paths):
    """Write pictures that all differ."""
    for path in paths:
        file = Path(folder, path)
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(zlib.crc32(str(path).encode())).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(file, format="PNG")


def splits_of(**changes):
    """Options that say which images are trained and tested on: all of the splits `train` and `test`, unless changed."""
    given = {"train_split": "train", "test_split": "test", "max_train_samples": None, "max_test_samples": None}
    return SimpleNamespace(**given | changes)


class Source:
    """Images in batches from any index on, which counts how many were asked for."""

    def __init__(self, images, size=2, stop_after=None):
        self.images, self.size, self.stop_after, self.read = images, size, stop_after, 0

    def __call__(self, start):
        for first in range(start, len(self.images), self.size):
            if self.stop_after is not None and self.read >= self.stop_after:
                raise KeyboardInterrupt
            batch = self.images[first : first + self.size]
            self.read += len(batch)
            yield batch


@pytest.fixture(scope="session")
def latent_dit(tmp_path_factory):
    """A DiT of latents as `facebook/DiT-XL-2-256` has its parts: 1000 classes, their names, a learned variance.

    Its transformer is described as diffusers did when that one was published. Images are 16 pixels wide, latents 8.
    """
    folder = tmp_path_factory.mktemp("latent_dit")
    dit = make_dit(in_channels=4, out_channels=8, num_embeds_ada_norm=1000)
    DiTPipeline(dit, make_vae(), DDIMScheduler()).save_pretrained(folder)
    old = json.loads((folder / "transformer" / "config.json").read_text())
    old |= {"_class_name": "Transformer2DModel", "cross_attention_dim": None, "num_vector_embeds": None}
    (folder / "transformer" / "config.json").write_text(json.dumps(old))
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"transformer": ["diffusers", "Transformer2DModel"]}
    index["id2label"] = {"0": "tench, Tinca tinca", "1": "goldfish, Carassius auratus"}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="session")
def stock_layout(tmp_path_factory):
    """What makes a small stock pipeline of a name in `stock.LAYOUTS`, once: the pipeline and its folder."""
    from . import stock  # not among what every test imports

    root = tmp_path_factory.mktemp("stock")

    @functools.cache
    def make(name):
        folder = root / name.replace(" ", "_")
        pipeline = stock.LAYOUTS[name](folder)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline, folder

    return make


@pytest.fixture(autouse=True)
def ctrl_c():
    """A shell that starts a job in the background has it ignore Ctrl-C: tests of it must not depend on that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def unet():
    return make_unet()


@pytest.fixture
def scheduler():
    return DDPMScheduler()


@pytest.fixture
def images():
    return torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture(scope="session")
def layouts(tmp_path_factory):
    """The same network as a pipeline, as flat files side by side, and without its scheduler."""
    root = tmp_path_factory.mktemp("layouts")
    unet, scheduler = make_unet(), DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    DDPMPipeline(unet, scheduler).save_pretrained(root / "pipeline")
    unet.save_pretrained(root / "model")
    flat = root / "flat"
    unet.save_pretrained(flat)
    scheduler.save_pretrained(flat)
    index = {"_class_name": "DDPMPipeline", "_diffusers_version": "0.1.1"}
    index |= {"scheduler": ["diffusers", "DDIMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
    (flat / "model_index.json").write_text(json.dumps(index))
    return root


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """scikit-learn's digits as a data set."""
    from ddae_hf.experiments import digits as room

    folder = tmp_path_factory.mktemp("digits")
    room.write_digits(folder, room.digits())
    return folder


@pytest.fixture
def small_limits(monkeypatch):
    """Measure the machine on matrices and images that take no time."""
    from benchmarks import measure  # not among what every test imports

    monkeypatch.setattr(measure, "MATRIX_SIDE", {"cpu": 64})
    monkeypatch.setattr(measure, "CONVOLUTION", {"cpu": (1, 8, 8)})
    monkeypatch.setattr(measure, "COPIED", 2**12)
