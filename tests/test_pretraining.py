"""Pretraining as its users run it, at tiny size, on real digits."""

import contextlib
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker
from datasets import Dataset
from diffusers import DDPMScheduler
from PIL import Image
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from ddae_hf import DDAEForImageClassification, DDAEImageProcessor, DDAEPipeline
from ddae_hf.commands.parsing import CONFIGS, parse, read_config
from ddae_hf.diffusion import Diffusion
from ddae_hf.experiments import pretraining
from ddae_hf.experiments.images import DataOptions, Images
from ddae_hf.experiments.new_networks import DENOISER, check_networks, new_networks
from ddae_hf.experiments.plots import image_grid
from ddae_hf.experiments.pretraining import Pretraining, PretrainingOptions, pretrain
from ddae_hf.experiments.pretraining_data import TrainingData, training_data
from ddae_hf.experiments.run_folder import Progress
from ddae_hf.networks import build_denoiser, network_of
from ddae_hf.noise import family_of

from . import commands
from .quiet import quiet

ROOT = Path(__file__).parent.parent
TINY = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": [32, 32], "layers_per_block": 1}
TINY |= {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}
TINY |= {"dropout": 0.1}  # so that resuming has its randomness to repeat
TINY_DIT = {"_class_name": "DiTTransformer2DModel", "sample_size": 8, "in_channels": 1, "num_layers": 2}
TINY_DIT |= {"num_attention_heads": 2, "attention_head_dim": 8}


def train(digits, folder, *options):
    train_on(digits, folder, "--train_batch_size", "32", "--max_train_samples", "100", *options)


def train_on(data, folder, *options):
    arguments = ["--dataset_name", str(data), "--output_dir", str(folder), "--denoiser", json.dumps(TINY)]
    arguments += ["--seed", "1", "--lr_warmup_steps", "2", "--grid_images", "4", "--num_inference_steps", "2"]
    commands.run("pretrain", *arguments, "--sample_steps", "4", "--mixed_precision", "no", "--random_flip", *options)


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train(digits, folder, "--max_train_steps", "8", "--checkpointing_steps", "5")
    return folder


def weights(folder, part="unet"):
    return load_file(folder / part / "diffusion_pytorch_model.safetensors")


def test_pretraining_leaves_a_checkpoint_that_opens_and_says_how_it_was_made(trained):
    averaged, raw = DDAEPipeline.from_pretrained(trained), DDAEPipeline.from_pretrained(trained / "raw")
    difference = (averaged.denoiser.conv_in.weight - raw.denoiser.conv_in.weight).abs().max()
    assert 0 < difference < 0.1
    options = yaml.safe_load((trained / "training_options.yaml").read_text())
    assert options["seed"] == 1 and options["denoiser"] == TINY
    results = json.loads((trained / "train_results.json").read_text())
    assert results["steps"] == 8 and results["images_this_run"] == 8 * 32 and results["images_per_second"] > 0
    assert {f.name for f in (trained / "samples").iterdir()} == {"step-0000004.png", "step-0000008.png"}


def test_an_interrupted_run_resumes_exactly(trained, digits, tmp_path):
    """Step 5 is inside the second epoch of three batches."""
    (tmp_path / "checkpoint-5").symlink_to(trained / "checkpoint-5")
    train(
        digits, tmp_path, "--max_train_steps", "8", "--resume_from_checkpoint", "latest", "--checkpointing_steps", "100"
    )
    for part in (".", "raw"):
        expected, resumed = weights(trained / part), weights(tmp_path / part)
        assert all(torch.equal(expected[name], resumed[name]) for name in expected)


def test_resuming_another_or_a_finished_run_is_refused(trained, digits, tmp_path):
    (tmp_path / "checkpoint-5").symlink_to(trained / "checkpoint-5")
    resume = ["--resume_from_checkpoint", "latest", "--max_train_steps"]
    with pytest.raises(SystemExit, match="trained with other options: denoiser.block_out_channels was"):
        train(digits, tmp_path, *resume, "8", "--denoiser", json.dumps(TINY | {"block_out_channels": [32, 64]}))
    with pytest.raises(
        SystemExit, match=r"other options: random_flip was True and is False; augment was 0.0 and is 0.1"
    ):
        train(digits, tmp_path, *resume, "8", "--no-random_flip", "--augment", "0.1")
    with pytest.raises(SystemExit, match="checkpoint-5 is at step 5, beyond the 4 asked for"):
        train(digits, tmp_path, *resume, "4")


def test_a_fresh_run_does_not_mix_with_an_earlier_one(trained, digits):
    with pytest.raises(SystemExit, match="holds checkpoints of an earlier run"):
        train(digits, trained, "--max_train_steps", "1")


@pytest.mark.parametrize("denoiser", [TINY, TINY_DIT])
def test_training_begins_on_images_of_low_resolution_and_resumes_exactly(digits, tmp_path, monkeypatch, denoiser):
    whole, seen, denoised, inputs_of = [], [], Diffusion.denoising, pretraining.training_inputs

    def inputs(*given):
        found = inputs_of(*given)
        whole.append(found[0])
        return found

    def denoising(diffusion, clean, *layers, **levels):
        seen.append(clean)
        return denoised(diffusion, clean, *layers, **levels)

    monkeypatch.setattr(pretraining, "training_inputs", inputs)
    monkeypatch.setattr(Diffusion, "denoising", denoising)
    options = ["--denoiser", json.dumps(denoiser), "--max_train_steps", "5", "--checkpointing_steps", "2"]
    options += ["--low_resolution", "4", "--low_resolution_share", "0.6"]
    train(digits, tmp_path / "whole", *options)
    assert [clean.shape[-1] for clean in seen] == [4, 4, 4, 8, 8]
    for clean, images in zip(seen[:3], whole, strict=False):
        means = images.double().reshape(len(images), 1, 4, 2, 4, 2).mean((3, 5))
        torch.testing.assert_close(clean.double(), means, rtol=0, atol=1e-6)
    (tmp_path / "resumed").mkdir()
    (tmp_path / "resumed" / "checkpoint-2").symlink_to(tmp_path / "whole" / "checkpoint-2")
    train(digits, tmp_path / "resumed", *options, "--resume_from_checkpoint", "latest")
    part = "transformer" if denoiser is TINY_DIT else "unet"
    expected, resumed = weights(tmp_path / "whole", part), weights(tmp_path / "resumed", part)
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    with pytest.raises(SystemExit, match="trained with other options: low_resolution was 4 and is None"):
        other = tmp_path / "other"
        other.mkdir()
        (other / "checkpoint-2").symlink_to(tmp_path / "whole" / "checkpoint-2")
        train(digits, other, *options[:-4], "--resume_from_checkpoint", "latest")


def test_averaged_weights_follow_the_rule(digits, tmp_path):
    """EMA's decay at step n is min(decay, (1 + n) / (10 + n)), with n counted from 0 after the first step."""
    train(digits, tmp_path, "--max_train_steps", "3", "--checkpointing_steps", "1", "--learning_rate", "0.01")
    average = None
    for step in (1, 2, 3):
        raw, saved = (
            weights(tmp_path / f"checkpoint-{step}" / part)["conv_in.weight"].double() for part in ("raw", ".")
        )
        if average is None:
            average = saved
        else:
            decay = min(0.9999, step / (9 + step))
            average = decay * average + (1 - decay) * raw
        torch.testing.assert_close(saved, average, rtol=1e-5, atol=1e-6)


def test_old_checkpoints_are_dropped(digits, tmp_path):
    train(digits, tmp_path, "--max_train_steps", "3", "--checkpointing_steps", "1", "--checkpoints_total_limit", "2")
    assert {f.name for f in tmp_path.glob("*checkpoint*")} == {"checkpoint-2", "checkpoint-3"}


def test_accumulated_batches_are_counted_as_one_step(digits, tmp_path):
    """Three whole batches of 32 are one step of two an epoch, which leaves the third out."""
    train(
        digits, tmp_path, "--max_train_steps", "2", "--gradient_accumulation_steps", "2", "--checkpointing_steps", "2"
    )
    results = json.loads((tmp_path / "train_results.json").read_text())
    assert results["steps"] == 2 and results["images_this_run"] == 128
    progress = json.loads((tmp_path / "checkpoint-2" / "state" / "progress.json").read_text())
    assert (progress["epoch"], progress["batch"], progress["batches"]) == (2, 0, 4)


def test_a_run_can_start_from_a_checkpoint(trained, digits, tmp_path):
    arguments = ["--dataset_name", str(digits), "--output_dir", str(tmp_path), "--init_from", str(trained)]
    arguments += ["--max_train_steps", "1", "--sample_steps", "0", "--train_batch_size", "8"]
    arguments += ["--lr_warmup_steps", "1"]  # so that nothing is learned in the first step
    commands.run("pretrain", *arguments, "--mixed_precision", "no")
    before, after = weights(trained), weights(tmp_path)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_folder_of_images_is_a_data_set(tmp_path):
    for i in range(4):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(np.full((20, 16, 3), 60 * i, np.uint8)).save(tmp_path / "images" / f"{i}.png")
    arguments = ["--train_data_dir", str(tmp_path / "images"), "--output_dir", str(tmp_path / "out"), "--seed", "0"]
    arguments += [
        "--denoiser",
        json.dumps(TINY),
        "--max_train_steps",
        "1",
        "--train_batch_size",
        "2",
        "--sample_steps",
        "0",
    ]
    commands.run("pretrain", *arguments, "--mixed_precision", "no")
    assert DDAEPipeline.from_pretrained(tmp_path / "out").denoiser.config.sample_size == 8


@pytest.fixture(scope="module")
def shards(digits, tmp_path_factory):
    """A hundred digits in four files, so that there is something for workers to share.

    datasets rests for five seconds at a stream's end, for the sake of threads that none of these files has.
    """
    folder = tmp_path_factory.mktemp("shards")
    dataset = Dataset.from_parquet(str(digits / "train.parquet")).select(range(100))
    for i in range(4):
        dataset.shard(4, i).to_parquet(folder / f"train-{i}-of-4.parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
        yield folder


WATCHED = """
import json, sys, time
import datasets, torch
from accelerate.state import PartialState
from ddae_hf.experiments import pretraining
from tests import commands

def watched(args, batch, network, draws):
    numbers = [hash(image.numpy().tobytes()) for image in batch["pixel_values"]]
    with open(f"{args.output_dir}-process-{PartialState().process_index}.jsonl", "a") as file:
        file.write(json.dumps(numbers) + chr(10))
    return inputs(args, batch, network, draws)

def late(content, file, *args, **options):
    time.sleep("random_states_1" in str(file))  # long after the other process has written its own
    save(content, file, *args, **options)

datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0
save, torch.save = torch.save, late
inputs, pretraining.training_inputs = pretraining.training_inputs, watched
PartialState.destroy_process_group = lambda state: None  # the next run needs it
for options in json.loads(sys.argv[1]):
    commands.run("pretrain", *options)
"""


@pytest.mark.slow  # `test_training_run.py` trains on two processes too
def test_two_processes_train_one_network_and_share_every_image(shards, tmp_path):
    """Of 100 images, two processes take three whole batches of 16 each an epoch, from files and from a stream."""
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    launch += ["--config_file", str(ROOT / "examples" / "accelerate_configs" / "two_cpu_processes.yaml")]
    options = ["--dataset_name", str(shards), "--denoiser", json.dumps(TINY), "--train_batch_size", "16"]
    options += ["--sample_steps", "0", "--checkpointing_steps", "2", "--max_train_steps"]
    mapped = [*options, "2", "--output_dir", str(tmp_path / "mapped")]
    streamed = [*options, "6", "--output_dir", str(tmp_path / "streamed"), "--streaming", "--shuffle_buffer", "30"]
    (tmp_path / "watched.py").write_text(WATCHED)
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    environment["PYTHONPATH"] = str(ROOT)
    run = [*launch, str(tmp_path / "watched.py"), json.dumps([mapped, streamed])]
    done = subprocess.run(run, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, steps, epochs in (("mapped", 2, 1), ("streamed", 6, 2)):
        results = json.loads((tmp_path / name / "train_results.json").read_text())
        assert results["processes"] == 2 and results["images"] == steps * 32
        assert len(list((tmp_path / name / "checkpoint-2" / "state").glob("random_states_*.pkl"))) == 2
        seen = [(tmp_path / f"{name}-process-{i}.jsonl").read_text().splitlines() for i in (0, 1)]
        for epoch in range(epochs):
            images = [n for lines in seen for line in lines[3 * epoch : 3 * epoch + 3] for n in json.loads(line)]
            assert len(images) == len(set(images)) == 32 * min(steps, 3)


def stream_batches(shards, progress, count, **changes):
    """The hashes of a stream's next batches, and how far they lead."""
    changes = {"train_batch_size": 16, "class_conditional": True, "max_train_steps": 1, "denoiser": TINY, **changes}
    options = PretrainingOptions(**changes)
    images = Images.open(shards, streaming=True)
    with options.accelerated() as accelerator:
        loop = Pretraining(options, accelerator, training_data(images, options), None).loop
        loop.progress = progress
        found = []
        for batch in itertools.islice(loop.batches(), count):
            rows = zip(batch["pixel_values"], batch["labels"].tolist(), strict=True)
            found.append([(hash(image.numpy().tobytes()), label) for image, label in rows])
            progress.count(16, accelerator.gradient_state.end_of_dataloader)
    return found


def test_a_stream_is_shuffled_anew_in_every_epoch_and_repeats_with_its_seed(shards, digits):
    """An epoch is six batches of a hundred images; the four that are left over are others each time."""
    dataset = Dataset.from_parquet(str(digits / "train.parquet")).select(range(100))
    processor = DDAEImageProcessor(size={"height": 8, "width": 8}, num_channels=1)
    pixels = processor(dataset["image"][:], do_rescale=False, do_normalize=False)["pixel_values"]  # as they travel
    known = [(hash(np.asarray(p).tobytes()), label) for p, label in zip(pixels, dataset["label"][:], strict=True)]
    batches = stream_batches(shards, Progress(), 12, shuffle_buffer=20)
    epochs = [[image for batch in batches[i : i + 6] for image in batch] for i in (0, 6)]
    for epoch in epochs:
        assert len(set(epoch)) == 96 and set(epoch) <= set(known)
    assert epochs[0] != epochs[1] and sorted(epochs[0]) != epochs[0]
    assert stream_batches(shards, Progress(), 12, shuffle_buffer=20) == batches
    assert stream_batches(shards, Progress(), 6, shuffle_buffer=20, seed=1) != batches[:6]
    assert stream_batches(shards, Progress(epoch=1, batch=2, batches=8), 4, shuffle_buffer=20) == batches[8:]
    few = stream_batches(shards, Progress(), 2, max_train_samples=32)
    assert {image for batch in few for image in batch} == set(known[:32])


def test_training_on_a_stream_resumes_exactly_and_adds_up(shards, tmp_path):
    """With two workers an epoch is six batches, three steps of two: step 4 is inside the second."""
    options = ["--streaming", "--class_conditional", "--dataloader_num_workers", "2", "--train_batch_size", "16"]
    options += ["--max_train_steps", "5", "--gradient_accumulation_steps", "2", "--checkpointing_steps", "4"]
    train_on(shards, tmp_path / "whole", *options)
    (tmp_path / "resumed").mkdir()
    (tmp_path / "resumed" / "checkpoint-4").symlink_to(tmp_path / "whole" / "checkpoint-4")
    again = ["--resume_from_checkpoint", "latest", "--checkpointing_steps", "5"]
    train_on(shards, tmp_path / "resumed", *options, *again)
    for part in (".", "raw"):
        expected, resumed = weights(tmp_path / "whole" / part), weights(tmp_path / "resumed" / part)
        assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    results = json.loads((tmp_path / "resumed" / "train_results.json").read_text())
    assert results["images"] == 5 * 32 and results["images_this_run"] == 32
    before, after = (
        json.loads((tmp_path / "resumed" / f"checkpoint-{step}" / "state" / "progress.json").read_text())
        for step in (4, 5)
    )
    assert (before["images"], after["images"]) == (128, 160) and after["seconds"] > before["seconds"]
    assert results["seconds"] == pytest.approx(before["seconds"] + results["seconds_this_run"], abs=0.11)
    assert before["seconds"] > 0 and results["versions"]["torch"] == torch.__version__
    assert results["dataset"] == {"name": shards.name, "train_split": "train"} and results["hardware"]["cores"] >= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "A stream needs max_train_steps"),
        (["--max_train_steps", "1", "--shuffle_buffer", "0"], "shuffle_buffer is 0"),
        (["--max_train_steps", "1", "--max_train_samples", "9", "--dataloader_num_workers", "2"], "none knows"),
        (["--max_train_steps", "1", "--train_batch_size", "101"], "The stream has 100 images"),
        (["--max_train_steps", "1", "--train_batch_size", "60", "--dataloader_num_workers", "2"], "need 120"),
        (["--max_train_steps", "1", "--image_column", "picture"], "no column of images 'picture'"),
        (["--max_train_steps", "1", "--class_conditional", "--label_column", "x"], "no column of labels 'x'"),
        (["--max_train_steps", "1", "--train_split", "test"], "has no split 'test'"),
    ],
)
def test_what_a_stream_cannot_do_is_refused_before_it_trains(shards, tmp_path, capsys, options, message):
    arguments = ["--dataset_name", str(shards), "--streaming", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as refusal:
        commands.run("pretrain", *arguments, "--denoiser", json.dumps(TINY), *options)
    assert message in str(refusal.value) + capsys.readouterr().err
    assert not (tmp_path / "out").exists()


FRAMEWORKS = ["DDIMScheduler", "EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler"]


@pytest.mark.parametrize("denoiser", [TINY, TINY_DIT], ids=["unet", "dit"])
@pytest.mark.parametrize("scheduler", FRAMEWORKS)
def test_every_framework_and_network_trains_samples_and_is_probed(digits, tmp_path, scheduler, denoiser):
    options = ["--scheduler", json.dumps({"_class_name": scheduler}), "--denoiser", json.dumps(denoiser)]
    train(digits, tmp_path / "run", "--max_train_steps", "2", *options)
    results = json.loads((tmp_path / "run" / "train_results.json").read_text())
    assert math.isfinite(results["loss_last_100_batches"])
    sampler = ["--sampler", "heun"] if scheduler.startswith("EDM") else []
    model = ["--model_name_or_path", str(tmp_path / "run"), "--output_dir"]
    commands.run(
        "generate", *model, str(tmp_path / "samples"), "--num_images", "3", "--num_inference_steps", "2", *sampler
    )
    assert len(list((tmp_path / "samples").glob("0*.png"))) == 3
    probe = ["--dataset_name", str(digits), "--max_train_samples", "200", "--max_test_samples", "50"]
    commands.run("probe", *model, str(tmp_path / "classifier"), *probe, "--layers", "decoder", "--sigmas", "0.1")
    opened = DDAEForImageClassification.from_pretrained(tmp_path / "classifier")
    assert opened.config.scheduler["_class_name"] == scheduler and opened.num_labels == 10


@pytest.mark.parametrize("denoiser", [TINY, TINY_DIT], ids=["unet", "dit"])
def test_class_conditional_networks_know_their_null_class_and_resume_exactly(digits, tmp_path, denoiser):
    options = ["--class_conditional", "--denoiser", json.dumps(denoiser), "--checkpointing_steps", "1"]
    options += ["--scheduler", '{"_class_name": "FlowMatchEulerDiscreteScheduler"}', "--log_sigma", "0", "1"]
    train(digits, tmp_path / "whole", "--max_train_steps", "2", *options)
    pipeline = DDAEPipeline.from_pretrained(tmp_path / "whole")
    count = network_of(pipeline.denoiser).num_labels(pipeline.denoiser.config)
    assert pipeline.null_class == 10 and count == 11
    assert DDAEForImageClassification.from_pretrained(tmp_path / "whole", num_labels=2).config.null_class in (None, 10)
    (tmp_path / "resumed").mkdir()
    (tmp_path / "resumed" / "checkpoint-1").symlink_to(tmp_path / "whole" / "checkpoint-1")
    train(digits, tmp_path / "resumed", "--max_train_steps", "2", *options, "--resume_from_checkpoint", "latest")
    resumed = DDAEPipeline.from_pretrained(tmp_path / "resumed").denoiser.state_dict()
    assert all(torch.equal(value, resumed[name]) for name, value in pipeline.denoiser.state_dict().items())
    model = ["--model_name_or_path", str(tmp_path / "whole"), "--output_dir", str(tmp_path / "samples")]
    options = ["--num_images", "2", "--num_inference_steps", "2", "--class_label", "3", "--guidance_scale", "2"]
    commands.run("generate", *model, *options)


def test_an_augmented_network_is_saved_as_a_plain_one_and_resumes_exactly(digits, tmp_path):
    options = ["--augment", "0.5", "--no-random_flip", "--checkpointing_steps", "1"]
    options += ["--scheduler", '{"_class_name": "EDMEulerScheduler"}']
    train(digits, tmp_path / "whole", "--max_train_steps", "2", *options)
    config = json.loads((tmp_path / "whole" / "unet" / "config.json").read_text())
    assert config["class_embed_type"] is None and config["num_class_embeds"] is None
    (tmp_path / "resumed").mkdir()
    (tmp_path / "resumed" / "checkpoint-1").symlink_to(tmp_path / "whole" / "checkpoint-1")
    train(digits, tmp_path / "resumed", "--max_train_steps", "2", *options, "--resume_from_checkpoint", "latest")
    for part in (".", "raw"):
        expected, resumed = weights(tmp_path / "whole" / part), weights(tmp_path / "resumed" / part)
        assert all(torch.equal(expected[name], resumed[name]) for name in expected)


@pytest.mark.slow
def test_a_compiled_network_is_saved_as_a_plain_one(digits, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "aot_eager")
    train(digits, tmp_path, "--max_train_steps", "2", "--checkpointing_steps", "1", "--sample_steps", "0")
    assert DDAEPipeline.from_pretrained(tmp_path / "raw").denoiser.conv_in.weight.isfinite().all()


MANY_KINDS = {"block_out_channels": [12, 20, 28], "norm_num_groups": 4, "sample_size": 16, "layers_per_block": 1}
MANY_KINDS |= {"in_channels": 1, "out_channels": 1, "attention_head_dim": None}
MANY_KINDS |= {"down_block_types": ["DownBlock2D"] * 3, "up_block_types": ["UpBlock2D"] * 3}


@pytest.mark.slow
def test_blocks_that_are_compiled_one_by_one_train_as_they_are_and_again_for_no_size(tmp_path, monkeypatch):
    """With more than eight kinds of residual blocks, on images of two sizes."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 16, 16), dtype=np.uint8)
    images = Images.open([Image.fromarray(image) for image in pixels])
    options = {"denoiser": MANY_KINDS, "low_resolution": 8, "low_resolution_share": 0.5, "mixed_precision": "no"}
    options = PretrainingOptions(**options, total_batch_size=6, max_train_steps=3, sample_steps=0)
    runs = []
    for way in ("no", "eager"):
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", way)
        torch._dynamo.reset()
        counters.clear()
        with options.accelerated() as accelerator:
            run = Pretraining(options, accelerator, training_data(images, options), None)
            steps = run.loop.steps(run.loss)
            assert next(steps) == 1
            graphs = counters["stats"]["unique_graphs"]
            assert [*steps] == [2, 3] and counters["stats"]["unique_graphs"] == graphs
            run.write(tmp_path / way)
        runs.append(run)
    assert graphs > 8 and counters["frames"]["total"] == counters["frames"]["ok"]
    for part in ("", "raw"):
        expected, found = (weights(tmp_path / way / part) for way in ("no", "eager"))
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    noisy = torch.zeros(2, 1, 16, 16), torch.tensor([5.0, 6.0])
    layers = ["mid_block", "up_blocks.1.resnets.0"]
    plain, compiled = (run.diffusion.predict_with_hidden_states(*noisy, layers, {}) for run in runs)
    assert torch.equal(plain[0], compiled[0]) and all(torch.equal(plain[1][name], compiled[1][name]) for name in layers)


PARAMETERS = {"unet": 35_746_307, "ddpmpp": 57_183_491, "dit_s2": 35_187_852, "dit_s4": 35_215_536}
PARAMETERS |= {"dit_b2": 138_205_452, "dit_b4": 138_260_784, "dit_l2": 487_009_292, "dit_l4": 487_083_056}


@pytest.mark.parametrize("name", PARAMETERS)
def test_networks_have_the_parameters_that_their_files_say(name):
    path = CONFIGS / "networks" / f"{name}.yaml"
    options = {**DENOISER, **read_config(path)["denoiser"]}
    with torch.device("meta"):
        denoiser = build_denoiser({**options, **network_of(options).label_options(0)})
    assert sum(p.numel() for p in denoiser.parameters()) == PARAMETERS[name]
    assert f"{PARAMETERS[name]:,} parameters" in path.read_text().replace("\n# ", " ")


PRETRAINING = [
    p for p in sorted(CONFIGS.glob("*.yaml")) if "total_batch_size" in p.read_text() and "_vae" not in p.stem
]


@pytest.mark.parametrize("path", PRETRAINING, ids=lambda path: path.stem)
def test_every_configuration_describes_a_network_that_can_be_trained(path):
    _, options = parse([DataOptions, PretrainingOptions], None, ["--config", str(path)])
    data = TrainingData(rows=None, facts={}, opened_with={}, count=None, hash=None)
    denoiser, scheduler = new_networks(options, data)
    check_networks(options, denoiser, scheduler, data)
    named = [word for word in path.stem.split("_") if word in ("ddpm", "edm", "flow")]
    assert not named or family_of(scheduler).name == named[0]
    assert options.total_batch_size and options.train_batch_size is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image_column", "picture"], "There is no column of images 'picture'"),
        (["--train_split", "validation"], "has no split 'validation'; it has"),
        (["--dataset_name", "nobody/nothing"], "cannot be read"),
        (["--train_data_dir", "nowhere", "--dataset_name", "x"], "Give one of"),
        (["--resolution", "16"], "resolution is 16, but"),
        (["--low_resolution", "8"], "low_resolution is 8: it must be at least 1 and below"),
        (["--low_resolution", "5"], "low_resolution 5 cannot work. sample_size is 5"),
        (["--low_resolution", "4", "--low_resolution_share", "1.5"], "low_resolution_share is 1.5"),
        (["--denoiser", json.dumps(TINY | {"class_embed_type": "timestep"})], "train it with class_conditional"),
        (["--denoiser", json.dumps(TINY | {"out_channels": 2})], "as many output as input channels"),
        (["--augment", "0.1"], "leave out random_flip"),
        (["--augment", "0.1", "--no-random_flip", "--class_conditional"], "leave out class_conditional"),
        (["--augment", "1.2", "--no-random_flip"], "must be between 0 and 1"),
        (["--augment", "0.1", "--no-random_flip", "--denoiser", json.dumps(TINY_DIT)], "a DiTTransformer2DModel came"),
        (["--class_conditional", "--label_column", "image"], "no column of labels 'image'"),
        (["--sampler", "heun"], "sampler='heun' needs an EDMEulerScheduler, not a DDPMScheduler"),
        (["--grid_images", "0"], "must be at least 1"),
        (["--num_inference_steps", "0"], "must be at least 1"),
        (["--num_inference_steps", "2000"], "2000"),
        (["--scheduler", '{"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": true}'], "`mu`"),
        (["--scheduler", '{"_class_name": "EDMEulerScheduler", "sigma_data": 0}'], "must be positive"),
        (["--scheduler", '{"_class_name": "EDMEulerScheduler"}', "--log_sigma", "nan", "1"], "must be finite"),
        (["--scheduler", '{"_class_name": "EDMEulerScheduler"}', "--log_sigma", "0", "-1"], "the deviation positive"),
        (["--class_conditional", "--label_dropout", "0"], "must see both its classes and the null class"),
        (["--denoiser", json.dumps(TINY | {"num_class_embeds": 4})], "leave it out; class_conditional takes it"),
        (["--log_sigma", "0", "inf"], "must be finite"),
        (["--scheduler", '{"_class_name": "ScoreSdeVeScheduler"}'], "is not supported"),
        (["--scheduler", '{"_class_name": "Nothing"}'], "must name a diffusers scheduler"),
        (["--scheduler", '{"rescale_betas_zero_snr": true}'], "zero-terminal SNR"),
        (["--denoiser", json.dumps(TINY | {"block_out_chanels": [32]})], "no options ['block_out_chanels']"),
        (["--denoiser", json.dumps(TINY | {"sample_size": 9})], "must be a multiple of 2"),
        (["--report_to", "wandb"], "that tracker is not installed"),
        (["--resume_from_checkpoint", "nowhere"], "there is no such checkpoint"),
        (["--init_from", "somewhere"], "leave out denoiser"),
        (["--train_batch_size", "0"], "must be at least 1"),
    ],
)
def test_pretraining_refuses_bad_input_before_it_trains(digits, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as refusal:
        train(digits, tmp_path, "--max_train_steps", "1", *options)
    assert message in str(refusal.value) + capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_unreadable_or_empty_data_set_is_refused(tmp_path):
    from datasets import Features
    from datasets import Image as ImageFeature

    broken = {"image": [{"bytes": b"no image", "path": None}]}
    Dataset.from_dict(broken, Features({"image": ImageFeature()})).to_parquet(tmp_path / "broken.parquet")
    with pytest.raises(SystemExit, match="cannot be read"):
        train(tmp_path / "broken.parquet", tmp_path / "out")
    pq.write_table(Features({"image": ImageFeature()}).arrow_schema.empty_table(), tmp_path / "empty.parquet")
    with pytest.raises(SystemExit, match="empty|cannot be read"):
        train(tmp_path / "empty.parquet", tmp_path / "out")


def test_grids_enlarge_without_smoothing():
    images = [Image.fromarray(np.full((8, 8), i * 60, np.uint8)) for i in range(3)]
    grid = np.asarray(image_grid(images, columns=2, min_side=16))
    assert grid.shape == (33, 33, 3) and (grid[:16, 17:] == 60).all() and (grid[17:, :16] == 120).all()
    assert math.prod(np.asarray(grid[17:, 17:] == 255).shape) and (grid[17:, 17:] == 255).all()


def test_classes_are_those_the_data_set_names_and_no_image_may_lack_one(tmp_path):
    from datasets import ClassLabel, Features, Value
    from datasets import Image as ImageFeature

    picture = Image.fromarray(np.zeros((8, 8), np.uint8))
    named = Features({"image": ImageFeature(), "label": ClassLabel(names=list("abcd"))})
    Dataset.from_dict({"image": [picture] * 2, "label": [0, 2]}, named).to_parquet(tmp_path / "named.parquet")
    numbered = Features({"image": ImageFeature(), "label": Value("int64")})
    Dataset.from_dict({"image": [picture] * 2, "label": [0, -1]}, numbered).to_parquet(tmp_path / "numbered.parquet")
    options = ["--class_conditional", "--max_train_steps", "1", "--sample_steps", "0", "--train_batch_size", "2"]
    train(tmp_path / "named.parquet", tmp_path / "out", *options)
    assert DDAEPipeline.from_pretrained(tmp_path / "out").null_class == 4
    other = DDAEPipeline(
        build_denoiser({"_class_name": "UNet2DModel", **TINY, "num_class_embeds": 5}), DDPMScheduler(), None, 0
    )
    other.save_pretrained(tmp_path / "first")
    arguments = ["--dataset_name", str(tmp_path / "named.parquet"), "--output_dir", str(tmp_path / "no")]
    with pytest.raises(SystemExit, match="null class of .*first is 0: it must be the last, 4"):
        commands.run(
            "pretrain", *arguments, "--init_from", str(tmp_path / "first"), *options, "--mixed_precision", "no"
        )
    Dataset.from_dict({"image": [picture] * 2, "label": [0, None]}, numbered).to_parquet(tmp_path / "some.parquet")
    with pytest.raises(SystemExit, match="Some images have no label in the column"):
        train(tmp_path / "some.parquet", tmp_path / "other", *options, "--label_column", "label")
    with pytest.raises(SystemExit, match="Labels of the split .* are -1 to 0"):
        train(tmp_path / "numbered.parquet", tmp_path / "other", *options, "--label_column", "label")


def small(folder=None, **changes):
    return {
        "denoiser": TINY,
        "total_batch_size": 10,
        "lr_warmup_steps": 1,
        "sample_steps": 0,
        "output_dir": folder,
        **changes,
    }


@pytest.fixture(scope="module")
def noise_images():
    rng = np.random.default_rng(0)
    return Images.open([Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)) for _ in range(50)])


def test_pretraining_in_a_notebook_leaves_the_process_as_it_was(noise_images, capsys, tmp_path):
    """One precision after another, without a folder; what comes back samples, and can be saved."""
    before = {**AcceleratorState._shared_state}, torch.backends.cudnn.allow_tf32
    with quiet(capsys):
        for precision in ("no", "bf16"):
            result = pretrain(noise_images, max_train_steps=2, mixed_precision=precision, allow_tf32=True, **small())
    assert ({**AcceleratorState._shared_state}, torch.backends.cudnn.allow_tf32) == before
    assert len(result.pipeline(2, num_inference_steps=1).images) == 2 and "| steps | 2 |" in result.table()
    result.save(tmp_path / "saved")
    saved = DDAEPipeline.from_pretrained(tmp_path / "saved").denoiser.state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in result.pipeline.denoiser.state_dict().items())


def test_a_run_is_the_same_however_its_batches_are_shared_out(noise_images, tmp_path):
    """Without dropout or noise of its own a step of ten images is one of twice five; and options serve again."""
    one = pretrain(noise_images, max_train_steps=3, **small(str(tmp_path / "one"), checkpointing_steps=1))
    config = tmp_path / "one" / "training_options.yaml"
    _, options = parse([DataOptions, PretrainingOptions], None, ["--config", str(config)])
    assert options.total_batch_size == 10 and options.denoiser == TINY
    changes = {"output_dir": str(tmp_path / "two"), "gradient_accumulation_steps": 2, "learning_rate": 1e-5}
    changes["resume_from_checkpoint"] = str(tmp_path / "one" / "checkpoint-2")
    two = pretrain(noise_images, options, **changes)
    assert two.images == one.images == 30 and two.images_this_run == 10
    progress = Progress.read(tmp_path / "two" / "checkpoint-3")
    assert (progress.batch, progress.batches, progress.batch_images) == (6, 6, 5)
    given = yaml.safe_load((tmp_path / "two" / "training_options.yaml").read_text())
    assert given["learning_rate"] == 1e-5 and given["total_batch_size"] == 10
    state = torch.load(tmp_path / "two" / "checkpoint-3" / "state" / "optimizer.bin")
    assert state["param_groups"][0]["lr"] == 1e-5


def test_what_cannot_change_is_refused_by_name_when_a_run_is_resumed(noise_images, tmp_path):
    pretrain(noise_images, max_train_steps=1, **small(str(tmp_path), checkpointing_steps=1))
    again = small(str(tmp_path), resume_from_checkpoint="latest", max_train_steps=2)
    changes = {"seed": 3, "log_sigma": [0.0, 1.0], "random_flip": True, "center_crop": False}
    with pytest.raises(ValueError, match="random_flip was .*center_crop|center_crop was .*random_flip") as refusal:
        pretrain(noise_images, **again, **changes)
    assert all(f"{name} was" in str(refusal.value) for name in changes)
    with pytest.raises(ValueError, match="10 images a step .* but here there are 20: give total_batch_size 10"):
        pretrain(noise_images, **{**again, "total_batch_size": 20})
    rng = np.random.default_rng(1)
    others = Images.open([Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)) for _ in range(50)])
    with pytest.raises(ValueError, match="was trained on other images, as many as these"):
        pretrain(others, **again)
    with pytest.raises(ValueError, match="scheduler.prediction_type was 'epsilon' and is 'v_prediction'"):
        pretrain(noise_images, **again, scheduler={"prediction_type": "v_prediction"})


def test_pictures_go_to_the_tracker(noise_images, tmp_path, monkeypatch):
    class Tracker(GeneralTracker):
        name = "mine"
        requires_logging_directory = False
        seen: dict = {}

        def __init__(self):
            super().__init__(_blank=True)

        def log_images(self, values, step):
            self.seen[step] = values["samples"].shape

    started = PretrainingOptions.accelerated
    changed = lambda options, resume: tracked(started(options, resume), Tracker())  # noqa: E731
    monkeypatch.setattr(PretrainingOptions, "accelerated", changed)
    options = {"sample_steps": 2, "grid_images": 4, "num_inference_steps": 1, "max_train_steps": 2}
    pretrain(noise_images, **{**small(str(tmp_path)), **options})
    assert Tracker.seen == {2: (1, 129, 129, 3)}


@contextlib.contextmanager
def tracked(context, tracker):
    with context as accelerator:
        accelerator.trackers = [tracker]
        yield accelerator
        accelerator.trackers = []
