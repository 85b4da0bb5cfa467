"""Two processes train as one does with the same images a step: losses, weights, and where one went on for the other."""

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from diffusers import DDIMScheduler
from PIL import Image
from safetensors.torch import load_file

from ddae_hf import DDAEPipeline
from ddae_hf.experiments.run_folder import OPTIONS

from . import launched
from .conftest import make_unet, make_vae

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parent.parent
UNET = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": [16, 16], "layers_per_block": 1}
UNET |= {"norm_num_groups": 8}
UNET |= {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}
DIT = {"_class_name": "DiTTransformer2DModel", "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}
VAE = {"in_channels": 1, "latent_channels": 2, "block_out_channels": [8, 16], "norm_num_groups": 4}
ALIGNMENT = {"term": "self_alignment", "layer": "down_blocks.0.resnets.0", "averaged_layer": "up_blocks.1.resnets.0"}
ALIGNMENT |= {"until": 0.7}
COMPARED = [ALIGNMENT, *({"term": name, "layer": "mid_block"} for name in ("dispersive", "self_distillation"))]
STEPS = 50
SECONDS = 120  # of a launch that fails, half of which it may take to begin
IMAGES = 100  # twelve steps of eight an epoch, and four images are left over
# The options of each training, and how many images one process and each of two take at a time.
TRAININGS = {
    "flips": (["--random_flip"], 8, 4),
    "classes": (["--class_conditional", "--label_dropout", 0.3], 4, 4),
    "edm": (["--augment", 0.5, "--scheduler", json.dumps({"_class_name": "EDMEulerScheduler"})], 8, 2),
    "latents": (["--class_conditional"], 2, 4),
    "aligned": (["--auxiliary", json.dumps(ALIGNMENT)], 8, 4),
    "taught": (["--random_flip"], 8, 4),
    "compared": (["--auxiliary", *map(json.dumps, COMPARED)], 4, 4),  # the images of a pass, which must be as many
    "stream": (["--streaming", "--shuffle_buffer", 20, "--random_flip"], 8, 4),
    "vae": (["--random_flip"], 8, 4),
    "finetuned": (
        ["--random_flip", "--random_crop", 1, "--mixup", 0.4, "--ema_decay", 0.9, "--layer_decay", 0.8],
        4,
        4,
    ),
    "adapted": (["--lora_rank", 2, "--lora_targets", "attention", "convolutions", "--ema_decay", 0.9], 8, 4),
}
FINETUNED = ("finetuned", "adapted")

# Those that go on after half of the steps on another number of processes, and how many images each then takes.
RESUMED = [("flips", 2), ("aligned", 2), ("taught", 2), ("compared", 4), ("stream", 4), ("vae", 2), ("finetuned", 2)]
RESUMED += [("adapted", 2)]
STREAMED = 50
STREAMS = {"one": 1, "five": 5}  # files of a stream
WORKERS = (0, 1, 2, 3)


def write_streams(folder):
    """Write images whose grey says their number, as streams of several files or one."""
    for name, count in STREAMS.items():
        (folder / name).mkdir(parents=True)
        for number, rows in enumerate(np.arange(STREAMED).reshape(count, -1)):
            images = [Image.fromarray(np.full((8, 8), 2 * row, np.uint8)) for row in rows]
            Dataset.from_dict({"image": images}).to_parquet(folder / name / f"train-{number}.parquet")


def counting(root, folder):
    """The work of going through streams with workers, five images at a time."""
    return [
        ["count_stream", folder / f"{name}-{workers}", root / "streams" / name, 5, workers]
        for name in STREAMS
        for workers in WORKERS
    ]


def plain_work(root, folder):
    """The work of fine-tuning with transformers' Trainer, with gradient checkpointing too."""
    return [["train_plainly", folder / f"plain-{on}", root / "unet", root / "digits", on] for on in (False, True)]


def job(name, root, folder, batch, processes):
    """The command that trains so many steps, as its name and options."""
    own = TRAININGS[name][0]
    options = ["--output_dir", folder, "--seed", 1, "--max_train_steps", STEPS, "--checkpointing_steps", STEPS // 2]
    options += ["--mixed_precision", "no", "--train_batch_size", batch]
    data = ["--dataset_name", root / "digits", "--max_train_samples", IMAGES]
    if name in FINETUNED:
        options += ["--gradient_accumulation_steps", 8 // batch // processes, "--max_test_samples", 30]
        # Steps of eight of 100 images end an epoch with four.
        return ["finetune", *options, *data, "--model_name_or_path", root / "unet", "--sigma", 0.3, *own]
    options += ["--total_batch_size", 8, "--lr_warmup_steps", 5]
    if name == "vae":
        held = ["--held_out", 20, "--resolution", 8, "--autoencoder", json.dumps(VAE)]
        return ["train-vae", *options, *data, *held, *own]
    options += ["--lr_scheduler", "linear", "--learning_rate", 1e-3, "--adam_epsilon", 1e-4]
    options += ["--sample_steps", STEPS // 5, "--grid_images", 1, "--num_inference_steps", 1]  # averages go on after it
    if name == "latents":
        return ["pretrain", *options, "--latents_dir", root / "latents", "--denoiser", json.dumps(DIT), *own]
    if name == "stream":
        data = data[:2]
    if name == "taught":
        term = {"term": "representation_alignment", "layer": "mid_block", "hidden_size": 32}
        own = [*own, "--auxiliary", json.dumps({**term, "encoder": str(root / "unet")})]
    return ["pretrain", *options, *data, "--denoiser", json.dumps(UNET), *own]


def going_on(name, root, folder, batch, processes, checkpoint):
    """The command that goes on from a checkpoint of another folder."""
    folder.mkdir()
    (folder / checkpoint.name).symlink_to(checkpoint)
    (folder / OPTIONS).symlink_to(checkpoint.parent / OPTIONS)
    return [*job(name, root, folder, batch, processes), "--resume_from_checkpoint", "latest"]


def launch(jobs):
    """Do work on two processes, one job after the other, and return what did it."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [str(ROOT / "examples" / "accelerate_configs" / "two_cpu_processes.yaml"), "-m", "tests.launched"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = json.dumps(jobs, default=str)
    return subprocess.run([*command, words], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=500)


def alone(jobs):
    """Do work in this process."""
    with pytest.MonkeyPatch.context() as patch:
        launched.calm(patch.setattr)
        for each in jobs:
            launched.do(*each)


@pytest.fixture(scope="module")
def root(digits, tmp_path_factory):
    """Folders of trainings by one process, `one`, and two, `two`, and of those that went on where the other stopped."""
    root = tmp_path_factory.mktemp("two")
    (root / "digits").symlink_to(digits)
    DDAEPipeline.for_denoiser(make_unet(in_channels=1, out_channels=1), DDIMScheduler()).save_pretrained(root / "unet")
    make_vae(in_channels=1, out_channels=1, latent_channels=2).save_pretrained(root / "vae")
    for name in ("one", "two", "one-went-on", "two-went-on"):
        (root / name).mkdir()
    encode = ["encode", "--vae", root / "vae", "--dataset_name", digits, "--max_samples", IMAGES]
    encode += ["--resolution", 16, "--mirror", "--sample_posterior", "--output_dir", root / "latents"]
    alone([encode, *(job(name, root, root / "one" / name, TRAININGS[name][1], 1) for name in TRAININGS)])
    write_streams(root / "streams")
    shared = [job(name, root, root / "two" / name, TRAININGS[name][2], 2) for name in TRAININGS]
    shared += [
        going_on(name, root, root / "two-went-on" / name, batch, 2, root / "one" / name / f"checkpoint-{STEPS // 2}")
        for name, batch in RESUMED
    ]
    done = launch([*plain_work(root, root / "two"), *counting(root, root / "two"), *shared])
    assert done.returncode == 0, done.stderr[-6000:]
    back = [
        going_on(name, root, root / "one-went-on" / name, batch, 1, root / "two" / name / f"checkpoint-{STEPS // 2}")
        for name, batch in RESUMED
    ]
    alone([*back, *counting(root, root / "one"), *plain_work(root, root / "one")])
    return root


def weights_of(folder, step):
    """All weights of a training at a step, by the file and the name."""
    checkpoint = folder / f"checkpoint-{step}"
    files = [path.relative_to(checkpoint) for path in checkpoint.rglob("*.safetensors")]
    return {(file, name): value for file in files for name, value in load_file(checkpoint / file).items()}


def losses_of(folder):
    """The last losses of a training, of its forward passes."""
    return json.loads((folder / f"checkpoint-{STEPS}" / "state" / "progress.json").read_text())["losses"]


def assert_alike(one, two, step=STEPS):
    expected, found = weights_of(one, step), weights_of(two, step)
    assert expected.keys() == found.keys() and expected
    furthest = max((expected[name] - found[name]).abs().max().item() for name in expected)
    assert furthest < 1e-5


@pytest.mark.parametrize("name", TRAININGS)
def test_two_processes_have_the_weights_of_one(root, name):
    assert_alike(root / "one" / name, root / "two" / name)


@pytest.mark.parametrize("name", [name for name in TRAININGS if name not in FINETUNED])
def test_two_processes_have_the_losses_of_one(root, name):
    expected, found = (np.array(losses_of(root / which / name)) for which in ("one", "two"))
    passes = 8 // TRAININGS[name][1]
    shares = 8 // TRAININGS[name][2] // 2
    steps = min(len(expected) // passes, len(found) // shares)  # the last hundred losses are kept
    assert steps >= 25
    by_step = (
        losses[-steps * count :].reshape(steps, count).mean(1)
        for losses, count in ((expected, passes), (found, shares))
    )
    np.testing.assert_allclose(*by_step, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, _ in RESUMED])
def test_one_process_goes_on_for_two_and_two_for_one_with_smaller_batches(root, name):
    for folder in ("one-went-on", "two-went-on"):
        assert_alike(root / "one" / name, root / folder / name)
        assert (root / folder / name / f"checkpoint-{STEPS}").is_dir()


@pytest.mark.parametrize("training", FINETUNED)
def test_a_fine_tuned_classifier_has_the_figures_of_one_process(root, training):
    expected = json.loads((root / "one" / training / "eval_results.json").read_text())
    for folder in ("two", "one-went-on", "two-went-on"):
        found = json.loads((root / folder / training / "eval_results.json").read_text())
        assert found["images"] == expected["images"] == STEPS * 8 - 3 * 4
        for name, value in expected.items():
            if name.startswith("test_"):
                assert found[name] == pytest.approx(value, abs=1e-5), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_transformers_trainer_has_on_two_processes_the_weights_of_one(root, checkpointing):
    expected, found = (
        load_file(root / which / f"plain-{checkpointing}" / "model.safetensors") for which in ("one", "two")
    )
    assert max((expected[name] - found[name]).abs().max().item() for name in expected) < 1e-5


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("name", STREAMS)
def test_of_a_stream_no_image_comes_twice_and_all_but_a_batch_per_worker_come(root, name, workers):
    alone, *both = (
        json.loads((root / f"{name}-{workers}-process-{number}.json").read_text())
        for name, number in ((f"one/{name}", 0), (f"two/{name}", 0), (f"two/{name}", 1))
    )
    for epoch in range(2):
        seen = [sum(batches, []) for batches in (alone[epoch], both[0][epoch], both[1][epoch])]
        assert len(both[0][epoch]) == len(both[1][epoch])  # else one would wait for the other
        for images, left_out in ((seen[0], 4 * max(workers, 1)), (seen[1] + seen[2], 4 * max(workers, 1) + 5)):
            assert max(Counter(images).values()) == 1
            assert STREAMED - left_out <= len(images) <= STREAMED
        together = sum((a + b for a, b in zip(both[0][epoch], both[1][epoch], strict=True)), [])
        assert together == seen[0][: len(together)]  # the same images in the same order


def faulty(digits, folder):
    """A training of which every second image of a step is read by the second process."""
    options = ["--dataset_name", digits, "--output_dir", folder, "--total_batch_size", 8, "--max_train_steps", 20]
    options += ["--checkpointing_steps", 5, "--sample_steps", 0, "--mixed_precision", "no"]
    return ["pretrain", *options, "--denoiser", json.dumps(UNET)]


def test_where_one_of_two_processes_is_killed_the_other_ends_and_what_is_saved_goes_on(digits, tmp_path):
    started = time.monotonic()
    done = launch([["lose_a_process", *faulty(digits, tmp_path / "run")]])
    assert done.returncode != 0 and "SIGKILL" in done.stderr
    assert time.monotonic() - started < SECONDS
    assert {path.name for path in (tmp_path / "run").glob("*checkpoint*")} == {"checkpoint-5", "checkpoint-10"}
    alone(
        [faulty(digits, tmp_path / "whole"), [*faulty(digits, tmp_path / "run"), "--resume_from_checkpoint", "latest"]]
    )
    assert_alike(tmp_path / "whole", tmp_path / "run", 20)


def test_an_image_that_one_of_two_processes_cannot_read_ends_both_with_its_name(tmp_path):
    for number in range(32):
        path = tmp_path / "images" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8), number, np.uint8)).save(path)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "images" / f"{sorted(map(str, range(32)))[order[12]]}.png"
    path.write_bytes(path.read_bytes()[:-40])  # in the second step, of the second process
    started = time.monotonic()
    done = launch([faulty(tmp_path / "images", tmp_path / "run")])
    assert done.returncode != 0 and f"{path} cannot be read" in done.stderr
    assert re.search(r"Process 0 stops|\[rank0\]: RuntimeError", done.stderr)  # which did not read it
    assert time.monotonic() - started < SECONDS
