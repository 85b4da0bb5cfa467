"""What must never be lost of a run: its options, its place in the data, its checkpoints, its end."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import UNet2DModel
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from torch._inductor import lowering
from torch.utils.data import DataLoader, IterableDataset

from ddae_hf import DDAEPipeline
from ddae_hf.experiments import pretraining, run_folder, vae_training
from ddae_hf.experiments.batches import Batches
from ddae_hf.experiments.pretraining import Pretraining
from ddae_hf.experiments.run_folder import FILES, OPTIONS, PROGRESS, STATE, WEIGHTS, Progress
from ddae_hf.experiments.stopping import Interrupted
from ddae_hf.experiments.training import Loop, accelerated

from . import commands
from .watch import watched

ROOT = Path(__file__).parent.parent
TINY = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": [32, 32], "layers_per_block": 1}
TINY |= {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}
TINY |= {"dropout": 0.1}
TINY_VAE = {"in_channels": 1, "latent_channels": 2, "block_out_channels": [8, 16], "norm_num_groups": 4}
TIMES = {"seconds", "seconds_this_run", "images_this_run", "images_per_second"}


def pretrain_options(digits, folder):
    """Four batches of 25 an epoch, six steps, a checkpoint and samples after every second."""
    options = ["--dataset_name", digits, "--max_train_samples", 100, "--output_dir", folder, "--seed", 1]
    options += ["--denoiser", json.dumps(TINY), "--train_batch_size", 25, "--max_train_steps", 6]
    options += ["--checkpointing_steps", 2, "--sample_steps", 2, "--grid_images", 1, "--num_inference_steps", 1]
    return [*options, "--lr_warmup_steps", 1, "--mixed_precision", "no"]


def vae_options(digits, folder):
    options = ["--dataset_name", digits, "--max_train_samples", 120, "--held_out", 20, "--output_dir", folder]
    options += [
        "--autoencoder",
        json.dumps(TINY_VAE),
        "--resolution",
        8,
        "--train_batch_size",
        25,
        "--max_train_steps",
        6,
    ]
    return [*options, "--checkpointing_steps", 2, "--lr_warmup_steps", 1, "--mixed_precision", "no"]


TRAININGS = {"pretrain": pretrain_options, "train-vae": vae_options}


@pytest.fixture(scope="module")
def pretrained(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    commands.run("pretrain", *pretrain_options(digits, folder))
    return folder


@pytest.fixture(scope="module")
def vae(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    commands.run("train-vae", *vae_options(digits, folder))
    return folder


@pytest.fixture
def in_time():
    """Fail a test that hangs."""

    def stop(number, frame):
        raise TimeoutError("This has taken a minute: it hangs.")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def link(checkpoint, folder):
    folder.mkdir(exist_ok=True)
    (folder / checkpoint.name).symlink_to(checkpoint)


def tensors(folder):
    """Every tensor in a folder's own files and its networks', not its checkpoints'."""
    files = [f for f in folder.rglob("*.safetensors") if "checkpoint-" not in str(f.relative_to(folder))]
    return {(str(f.relative_to(folder)), name): value for f in files for name, value in load_file(f).items()}


def assert_same(folder, other, results):
    """Two runs have left the same files, weights bit for bit, and results but for times."""
    assert {f.relative_to(folder) for f in folder.rglob("*")} == {f.relative_to(other) for f in other.rglob("*")}
    expected, found = tensors(folder), tensors(other)
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    first, second = (json.loads((f / results).read_text()) for f in (folder, other))
    changing = TIMES | {"train_seconds", "train_seconds_this_run", "options"}
    assert {k: v for k, v in first.items() if k not in changing} == {
        k: v for k, v in second.items() if k not in changing
    }
    assert second["images_per_second"] > 0


class Stream(IterableDataset):
    def __init__(self, count):
        self.count = count

    def __iter__(self):
        return iter(torch.zeros(self.count, 1))


LATER = Progress(epoch=2, batch=2, batches=6)


@pytest.mark.parametrize(("stream", "progress"), [(False, Progress()), (False, LATER), (True, LATER)])
def test_an_epoch_that_yields_nothing_is_an_error(stream, progress, in_time):
    rows = torch.zeros(4 if progress.batch else 0, 1)
    order = Batches(lambda epoch: torch.arange(len(rows)).split(2) if len(rows) else [], 2)
    loader = DataLoader(Stream(len(rows)), batch_size=2) if stream else DataLoader(rows, batch_sampler=order)
    module = torch.nn.Linear(1, 1)
    with accelerated(mixed_precision="no") as accelerator:
        loop = Loop(accelerator, module, torch.optim.SGD(module.parameters()), loader, total_steps=9, seed=0)
        loop.progress = progress
        with pytest.raises(
            ValueError, match=f"Epoch {progress.epoch + 1} has no batch after the {progress.batch} that"
        ):
            next(loop.batches())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train_batch_size", 100], r"trained on 25 images a step \(total_batch_size\), but here there are 100"),
        (["--train_batch_size", 50], "give total_batch_size 25, or begin another run, in another output_dir"),
        (["--max_train_samples", 25], "trained on 100 images, but here there are 25: give the same images, or begin"),
        (["--seed", 2], "other options: seed was 1 and is 2"),
    ],
)
def test_a_run_is_not_resumed_where_its_place_in_the_data_would_be_lost(
    pretrained, digits, tmp_path, options, message, in_time
):
    link(pretrained / "checkpoint-2", tmp_path)
    with pytest.raises(SystemExit, match=message):
        commands.run("pretrain", *pretrain_options(digits, tmp_path), "--resume_from_checkpoint", "latest", *options)
    assert [f.name for f in tmp_path.iterdir()] == ["checkpoint-2"]


def aged(checkpoint):
    """Make a checkpoint one of version 0.1.0, which noted less."""
    path = checkpoint / PROGRESS
    new = ("num_images", "losses", "steps", "batch_images", "images_hash")
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in new}))
    (checkpoint / FILES).unlink()
    options = yaml.safe_load((checkpoint / OPTIONS).read_text())
    new = ("total_batch_size", "shuffle_buffer", "low_resolution", "low_resolution_share")
    options = {k: v for k, v in options.items() if k not in new}
    (checkpoint / OPTIONS).write_text(yaml.safe_dump(options))


def test_an_old_checkpoint_of_more_images_does_not_hang(pretrained, digits, tmp_path, in_time):
    """Version 0.1.0 did not note how many images there were."""
    shutil.copytree(pretrained / "checkpoint-2", tmp_path / "checkpoint-2")
    aged(tmp_path / "checkpoint-2")
    options = [*pretrain_options(digits, tmp_path), "--resume_from_checkpoint", "latest"]
    with pytest.raises(SystemExit, match="Epoch 1 has no batch after the 2 that are done"):
        commands.run("pretrain", *options, "--max_train_samples", 50)
    commands.run("pretrain", *options)
    expected, found = tensors(pretrained), tensors(tmp_path)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_an_autoencoder_is_resumed_on_the_same_batches(vae, digits, tmp_path, in_time):
    options = [*vae_options(digits, tmp_path), "--resume_from_checkpoint", vae / "checkpoint-6"]
    with pytest.raises(SystemExit, match="25 images a step .* give total_batch_size 25, or"):
        commands.run("train-vae", *options, "--train_batch_size", 50)
    with pytest.raises(SystemExit, match="was trained on 100 images, but here there are 60"):
        commands.run("train-vae", *options, "--max_train_samples", 80)


def test_the_checkpoint_just_saved_is_kept_whatever_lies_beside_it(pretrained, digits, tmp_path):
    """Who goes back to an earlier checkpoint has later ones, which count as older than what is saved now."""
    for step in (2, 4, 6):
        shutil.copytree(pretrained / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-4-best").mkdir()  # the user's own
    options = ["--resume_from_checkpoint", tmp_path / "checkpoint-2", "--max_train_steps", 3, "--sample_steps", 0]
    options += ["--checkpointing_steps", 1, "--checkpoints_total_limit", 2]
    commands.run("pretrain", *pretrain_options(digits, tmp_path), *options)
    assert {f.name for f in tmp_path.glob("*checkpoint*")} == {"checkpoint-3", "checkpoint-4-best", "checkpoint-6"}


@pytest.mark.parametrize("name", ["pretrain", "train-vae"])
def test_the_rate_is_that_of_the_whole_training_and_not_of_its_last_run(name, request, digits, tmp_path):
    """Two steps are left after four that took ten seconds, and they take a fraction of one."""
    whole = request.getfixturevalue("pretrained" if name == "pretrain" else "vae")
    shutil.copytree(whole / "checkpoint-4", tmp_path / "checkpoint-4")
    path = tmp_path / "checkpoint-4" / PROGRESS
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": 10.0}))
    (tmp_path / "checkpoint-4" / FILES).unlink()
    commands.run(name, *TRAININGS[name](digits, tmp_path), "--resume_from_checkpoint", "latest")
    results = json.loads((tmp_path / "train_results.json").read_text())
    assert results["images"] == 150 and results["images_this_run"] == 50 and results["seconds"] >= 10
    assert results["images_per_second"] == pytest.approx(150 / results["seconds"], rel=0.02)


class Killed(BaseException):
    """What ends a program at once."""


def killed(patch, owner, name, when=lambda *args: True):
    """Make a function stop the program where a condition on its arguments holds."""
    original = getattr(owner, name)

    def stopping(*args, **options):
        if when(*args):
            raise Killed
        return original(*args, **options)

    patch.setattr(owner, name, stopping)


KILLS = {
    "a checkpoint": (Pretraining, "write", lambda run, folder: folder.name == "partial-checkpoint"),
    "sampling after a checkpoint": (Pretraining, "sample", lambda run, step: step == 4),
    "sampling after the last": (Pretraining, "sample", lambda run, step: step == 6),
    "the final save": (Pretraining, "write", lambda run, folder: folder.name != "partial-checkpoint"),
    "the results": (pretraining, "base_model", lambda source: True),
}


@pytest.mark.parametrize("kill", KILLS)
def test_resuming_does_what_is_not_done_yet(pretrained, digits, tmp_path, monkeypatch, kill):
    options = pretrain_options(digits, tmp_path)
    with monkeypatch.context() as patch:
        killed(patch, *KILLS[kill])
        with pytest.raises(Killed):
            commands.run("pretrain", *options)
    assert not (tmp_path / "train_results.json").exists()
    assert (tmp_path / "partial-checkpoint").exists() == (kill == "a checkpoint")
    commands.run("pretrain", *options, "--resume_from_checkpoint", "latest")
    assert_same(pretrained, tmp_path, "train_results.json")


def test_a_complete_run_is_left_as_it_is(pretrained, digits, caplog):
    files = {f: f.stat().st_mtime_ns for f in pretrained.rglob("*") if f.is_file() and f.name != "README.md"}
    (pretrained / "partial-checkpoint").mkdir()
    options = [*pretrain_options(digits, pretrained), "--resume_from_checkpoint", "latest"]
    with caplog.at_level("INFO"):
        commands.run("pretrain", *options)
    assert f"{pretrained} is complete, after 6 steps" in caplog.text
    assert files == {f: f.stat().st_mtime_ns for f in pretrained.rglob("*") if f.is_file() and f.name != "README.md"}
    assert not (pretrained / "partial-checkpoint").exists()
    with pytest.raises(SystemExit, match="checkpoint-6 is at step 6, beyond the 5 asked for"):
        commands.run("pretrain", *options, "--max_train_steps", 5)


def test_an_autoencoder_is_finished_where_its_end_was_interrupted(vae, digits, tmp_path, monkeypatch, caplog):
    options = vae_options(digits, tmp_path)
    with monkeypatch.context() as patch:
        killed(patch, vae_training.AutoencoderKL, "save_pretrained")
        with pytest.raises(Killed):
            commands.run("train-vae", *options)
    (tmp_path / "partial-checkpoint").mkdir()
    commands.run("train-vae", *options, "--resume_from_checkpoint", "latest")
    assert_same(vae, tmp_path, "train_results.json")
    with caplog.at_level("INFO"):
        commands.run("train-vae", *options, "--resume_from_checkpoint", "latest")
    assert "is complete, after 6 steps" in caplog.text


def spoilt(steps_of, at):
    """Steps of a training, after one of which a weight is no number."""

    def steps(loop, loss):
        for step in steps_of(loop, loss):
            if step == at:
                with torch.no_grad():
                    next(loop.module.parameters()).view(-1)[0] = float("nan")
            yield step

    return steps


@pytest.mark.parametrize("name", TRAININGS)
def test_nothing_is_saved_of_weights_that_are_not_finite(name, request, digits, tmp_path, monkeypatch):
    arguments = TRAININGS[name]
    whole = request.getfixturevalue("pretrained" if name == "pretrain" else "vae")
    options = arguments(digits, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "steps", spoilt(Loop.steps, at=4))
        message = "Some weights are not finite, after a loss of .* at step 4, at a learning rate of .* none of it"
        with pytest.raises(SystemExit, match=f"{message} is saved. .*checkpoint-2 is the last good .* resume from it"):
            commands.run(name, *options)
    assert [f.name for f in tmp_path.glob("*checkpoint*")] == ["checkpoint-2"]
    assert not list(tmp_path.glob("*.json")) and not (tmp_path / "samples" / "step-0000004.png").exists()
    commands.run(name, *options, "--resume_from_checkpoint", "latest")
    assert_same(whole, tmp_path, "train_results.json")


@pytest.mark.parametrize("name", TRAININGS)
def test_nothing_is_saved_of_a_training_that_diverges(name, digits, tmp_path):
    arguments = TRAININGS[name]
    with pytest.raises(SystemExit, match="at step 2, at a learning rate of .*; none of it is saved. There is no"):
        commands.run(name, *arguments(digits, tmp_path), "--learning_rate", 1e30, "--lr_warmup_steps", 0)
    assert not [f for f in tmp_path.rglob("*") if f.is_file()]


def test_a_run_is_resumed_at_another_learning_rate(pretrained, digits, tmp_path):
    """Else the advice to lower it would be of no use."""
    rates = []
    for rate in (1e-4, 1e-5):
        folder = tmp_path / str(rate)
        link(pretrained / "checkpoint-2", folder)
        options = ["--resume_from_checkpoint", "latest", "--learning_rate", rate, "--adam_beta1", 0.5]
        options += ["--lr_scheduler", "linear", "--sample_steps", 0, "--max_train_steps", 5, "--checkpointing_steps", 1]
        commands.run("pretrain", *pretrain_options(digits, folder), *options)
        saved = [torch.load(folder / f"checkpoint-{k}" / "state" / "optimizer.bin")["param_groups"][0] for k in (3, 4)]
        rates.append([group["lr"] for group in saved])
        assert saved[0]["betas"][0] == 0.5
    # After step n of 5, the first of which warms up, the rate is (5 - n) / 4 of the largest.
    assert rates == [pytest.approx([rate / 2, rate / 4]) for rate in (1e-4, 1e-5)]


def test_a_checkpoint_that_is_not_finite_is_not_resumed(pretrained, digits, tmp_path):
    shutil.copytree(pretrained / "checkpoint-2", tmp_path / "checkpoint-2")
    pipeline = DDAEPipeline.from_pretrained(tmp_path / "checkpoint-2")
    with torch.no_grad():
        pipeline.denoiser.conv_in.weight[0] = float("inf")
    pipeline.save_pretrained(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / FILES).unlink()
    with pytest.raises(SystemExit, match="checkpoint-2 holds weights that are not finite: resume an earlier"):
        commands.run("pretrain", *pretrain_options(digits, tmp_path), "--resume_from_checkpoint", "latest")


TWO = """
import json, signal, sys
from ddae_hf.experiments import pretraining
from accelerate.state import PartialState
from ddae_hf.diffusion import Diffusion
from tests import commands
from tests.watch import watched

def failing(*args, **options):
    found = denoised(*args, **options)
    passes.append(found)
    one = PartialState().process_index == 1
    if one and len(passes) == 7:
        signal.raise_signal(signal.SIGTERM)
    return found._replace(losses=found.losses * float("nan")) if one and len(passes) == 6 else found

passes = []
pretraining.training_inputs = watched(pretraining.training_inputs)
denoised, Diffusion.denoising = Diffusion.denoising, failing
PartialState.destroy_process_group = lambda state: None  # the next run needs it
for options in json.loads(sys.argv[1]):
    try:
        commands.run("pretrain", *options)
    except SystemExit as stop:
        print(f"Process {PartialState().process_index}: {stop}")
"""


def test_two_processes_go_on_where_one_stopped_and_stop_together(digits, tmp_path, monkeypatch):
    """Four images a batch on one, two on each of two: the same images in the same order, at the same rates, with the
    same noise and levels, to the same weights.

    Of the second run's second step, the loss is no number on one process alone, and both stop. So they do in the third
    run, of which one gets a signal.
    """
    options = ["--lr_scheduler", "linear", "--sample_steps", 0]
    # Adam would follow the sign of gradients that are nothing but rounding, and dropout differs between processes.
    options += ["--adam_epsilon", 1e-4, "--denoiser", json.dumps({**TINY, "dropout": 0.0})]
    alone = [*pretrain_options(digits, tmp_path / "alone"), *options, "--train_batch_size", 4]
    both = [*pretrain_options(digits, tmp_path / "both"), *options, "--train_batch_size", 2]
    both += ["--resume_from_checkpoint", tmp_path / "alone" / "checkpoint-2"]
    fails = [*pretrain_options(digits, tmp_path / "fails"), *options, "--checkpointing_steps", 1]
    with monkeypatch.context() as patch:
        patch.setattr(pretraining, "training_inputs", watched(pretraining.training_inputs))
        commands.run("pretrain", *alone)
    (tmp_path / "two.py").write_text(TWO)
    config = ROOT / "examples" / "accelerate_configs" / "two_cpu_processes.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    stops = [*pretrain_options(digits, tmp_path / "stops"), "--sample_steps", 0, "--max_train_steps", 20]
    stops += ["--checkpointing_steps", 100]
    command += [str(tmp_path / "two.py"), json.dumps([both, fails, stops], default=str)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr

    def seen(name, process):
        lines = (tmp_path / f"{name}-process-{process}.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    together = [a + b for a, b in zip(seen("both", 0), seen("both", 1), strict=True)]
    assert together == seen("alone", 0)[2:] and len(together) == 4
    for step in (4, 6):
        one, two = (
            torch.load(tmp_path / name / f"checkpoint-{step}" / "state" / "optimizer.bin")["param_groups"][0]["lr"]
            for name in ("alone", "both")
        )
        assert one == pytest.approx(two)
        weights, same = (
            load_file(tmp_path / name / f"checkpoint-{step}" / "raw" / "unet" / "diffusion_pytorch_model.safetensors")
            for name in ("alone", "both")
        )
        assert max((weights[key] - same[key]).abs().max() for key in weights) < 1e-5  # noise and levels are the same
    for process in (0, 1):
        assert f"Process {process}: The loss is nan at step 2" in done.stdout
    assert [f.name for f in (tmp_path / "fails").glob("*checkpoint*")] == ["checkpoint-1"]
    assert done.stderr.count("Stopped by SIGTERM after step 10 of 20") == 2
    assert [f.name for f in (tmp_path / "stops").glob("*checkpoint*")] == ["checkpoint-10"]


def test_a_stream_that_workers_share_is_resumed_in_the_same_batches(digits, tmp_path):
    """They take turns by batches, so that others would come twice, or not at all."""
    options = [*pretrain_options(digits, tmp_path), "--sample_steps", 0, "--streaming", "--shuffle_buffer", 10]
    options = [word for word in options if word not in ("--max_train_samples", 100)]
    options += ["--dataloader_num_workers", 2, "--total_batch_size", 4, "--train_batch_size", 4]
    commands.run("pretrain", *options, "--max_train_steps", 2)
    options += ["--max_train_steps", 3, "--resume_from_checkpoint", tmp_path / "checkpoint-2"]
    with pytest.raises(SystemExit, match="other options: train_batch_size was 4 and is 2"):
        commands.run("pretrain", *options, "--train_batch_size", 2)
    commands.run("pretrain", *options)


# Signals, disks and damaged files


def run_loop(folder, total=40, resume=None, after=None, save=None):
    """Fit a line, one checkpoint every ten steps; `after` is called after every step."""
    torch.manual_seed(0)
    module = torch.nn.Linear(1, 1)
    rows = torch.linspace(-1, 1, 12)[:, None]
    order = Batches(lambda epoch: torch.randperm(12, generator=torch.Generator().manual_seed(epoch)).split(4), 4)
    loader = DataLoader([{"x": row} for row in rows], batch_sampler=order)
    with accelerated(mixed_precision="no") as accelerator:
        loop = Loop(
            accelerator, module, torch.optim.SGD(module.parameters(), lr=0.1), loader, total_steps=total, seed=0,
            output_dir=folder, checkpointing_steps=10, keep_weights=True, save=save or (lambda folder: None),
        )  # fmt: skip
        loop.restore(None if resume is None else run_folder.checkpoint_to_resume(folder, resume, NEEDED))

        def loss(batch, draws):
            if after is not None:
                after(loop.progress.steps + 1)
            return (loop.module(batch["x"]) - 2 * batch["x"] + torch.rand(())).square().mean()

        loop.run(loss)
        return loop


NEEDED = (*STATE, WEIGHTS)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_from_which_the_run_ends_as_it_would_have(tmp_path, number):
    whole = run_loop(tmp_path / "whole")

    def stop(step):
        if step == 17:
            signal.raise_signal(number)

    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="after step 17 of 40: .*checkpoint-17 is saved. .* latest") as stopped:
        run_loop(tmp_path / "stopped", after=stop)
    assert stopped.value.signal == number and signal.getsignal(number) is before
    resumed = run_loop(tmp_path / "stopped", resume="latest")
    assert torch.equal(resumed.raw().weight, whole.raw().weight)
    assert resumed.progress.losses == whole.progress.losses and len(whole.progress.losses) == 40


def test_without_a_folder_ctrl_c_just_stops():
    with pytest.raises(KeyboardInterrupt) as stopped:
        run_loop(None, after=lambda step: signal.raise_signal(signal.SIGINT))
    assert not isinstance(stopped.value, Interrupted)


def test_the_loss_is_of_the_last_hundred_batches_after_resuming_too(tmp_path):
    whole = run_loop(tmp_path / "whole", total=140)
    shutil.copytree(tmp_path / "whole" / "checkpoint-130", tmp_path / "resumed" / "checkpoint-130")
    resumed = run_loop(tmp_path / "resumed", total=140, resume="latest")
    assert resumed.progress.losses == whole.progress.losses and len(resumed.progress.losses) == 100


def test_latest_is_the_newest_checkpoint_that_is_whole(tmp_path, caplog):
    whole = run_loop(tmp_path)
    (tmp_path / "checkpoint-40" / "state" / "model.safetensors").write_bytes(b"cut")
    (tmp_path / "checkpoint-30" / "state" / "optimizer.bin").unlink()
    resumed = run_loop(tmp_path, resume="latest")
    assert resumed.resumed.steps == 20 and torch.equal(resumed.raw().weight, whole.raw().weight)
    assert "checkpoint-40 cannot be resumed: state/model.safetensors is not what was written" in caplog.text
    assert "checkpoint-30 cannot be resumed: it has no state/optimizer.bin. Resuming from" in caplog.text


@pytest.mark.parametrize("name", ["optimizer.bin", "random_states_0.pkl", "progress.json"])
def test_a_checkpoint_without_its_state_is_refused(tmp_path, name):
    run_loop(tmp_path, total=10)
    (tmp_path / "checkpoint-10" / FILES).unlink()  # as of earlier versions
    (tmp_path / "checkpoint-10" / "state" / name).unlink()
    for wanted in ("latest", tmp_path / "checkpoint-10"):
        with pytest.raises(ValueError, match=f"checkpoint-10 cannot be resumed: it has no state/{name}"):
            run_loop(tmp_path, resume=wanted)


@pytest.mark.parametrize("name", ["state/optimizer.bin", "state/random_states_0.pkl", "state/model.safetensors"])
def test_of_an_old_run_too_the_newest_checkpoint_that_is_whole_is_taken(tmp_path, name, caplog):
    """Versions before 0.3.0 noted no sizes: files of tensors say themselves whether they are whole."""
    run_loop(tmp_path, total=20)
    for folder in tmp_path.iterdir():
        (folder / FILES).unlink()
    path = tmp_path / "checkpoint-20" / name
    path.write_bytes(path.read_bytes()[:-20])
    assert run_loop(tmp_path, resume="latest").resumed.steps == 10
    assert f"checkpoint-20 cannot be resumed: {name} is damaged. Resuming from" in caplog.text


def full(folder):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def full_inside_safetensors(folder):
    raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")


def full_inside_torch(folder):
    """torch's own writer is stopped by the system in the middle of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        torch.save(torch.zeros(100_000), folder / "optimizer.bin")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_second_training_in_a_folder_is_refused_and_the_first_goes_on(tmp_path):
    def another(step):
        if step == 5:
            (tmp_path / "partial-checkpoint").mkdir()  # as if it were being written
            with pytest.raises(ValueError, match=f"^Another training is at work in {tmp_path}: choose another output"):
                run_loop(tmp_path)
            assert (tmp_path / "partial-checkpoint").is_dir()

    (tmp_path / "partial-checkpoint-3").mkdir()  # of a run that was killed
    assert run_loop(tmp_path, after=another).progress.steps == 40
    assert {f.name for f in tmp_path.iterdir()} == {f"checkpoint-{step}" for step in (10, 20, 30, 40)}
    assert run_loop(tmp_path, resume="latest", total=50).progress.steps == 50


def test_a_folder_that_cannot_be_made_is_said_before_any_step(tmp_path, monkeypatch):
    def refused(path, *args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    steps = []
    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(OSError, match="run could not be written to: Permission denied"):
        run_loop(tmp_path / "run", after=steps.append)
    assert not steps


@pytest.mark.parametrize("fails", [full, full_inside_safetensors, full_inside_torch])
def test_a_full_disk_is_one_sentence_and_earlier_checkpoints_stay(tmp_path, fails):
    saved = []

    def save(folder):
        saved.append(folder)
        if len(saved) == 2:
            fails(folder)

    with pytest.raises(OSError, match="could not be written to: (?s:.)*checkpoint-10 is the last checkpoint"):
        run_loop(tmp_path, save=save)
    assert [f.name for f in tmp_path.iterdir()] == ["checkpoint-10"]
    assert run_loop(tmp_path, resume="latest").progress.steps == 40


@pytest.mark.parametrize("name", TRAININGS)
def test_a_file_in_place_of_the_folder_is_refused_before_any_work(tmp_path, name, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        commands.run(name, *TRAININGS[name]("nowhere", tmp_path / "file"))
    assert f"{tmp_path / 'file'} is a file: give a folder" in capsys.readouterr().err


def gradient_lowered():
    """Return how inductor lowers the gradient of a convolution."""
    return lowering.lowerings[torch.ops.aten.convolution_backward.default]


def test_what_is_compiled_is_compiled_block_by_block(monkeypatch):
    """As a whole it took minutes, and gradients were wrong; TF32 is as before, though accelerate switches it on."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_DYNAMIC", "False")  # as `accelerate launch` sets it
    limit, precision = torch._dynamo.config.recompile_limit, torch.backends.cuda.matmul.fp32_precision
    lowered = gradient_lowered()
    with accelerated(mixed_precision="no") as accelerator:
        plugin = accelerator.state.dynamo_plugin
        assert plugin.use_regional_compilation and plugin.dynamic is True
        assert torch._dynamo.config.recompile_limit > limit
        assert gradient_lowered() is not lowered and not inductor.layout_optimization
    assert torch._dynamo.config.recompile_limit == limit
    assert gradient_lowered() is lowered and inductor.layout_optimization
    assert torch.backends.cuda.matmul.fp32_precision == precision


def gradients(module, network, images):
    """Return the gradients of a network's weights, of a loss of what `module`, it or it compiled, makes of images."""
    network.zero_grad()
    module(images, torch.full((len(images),), 5.0)).sample.square().mean().backward()
    return [parameter.grad.clone() for parameter in network.parameters()]


def compiled_gradients(monkeypatch, backend, options):
    """Check that no size is compiled again and that gradients are right; return how many graphs there were."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", backend)
    torch.manual_seed(0)
    network = UNet2DModel(**options)
    torch._dynamo.reset()
    counters.clear()
    graphs = []
    with accelerated(mixed_precision="no") as accelerator:
        compiled = accelerator.prepare(network)
        # At first as many images as pixels. On processors torch convolves fewer than 16 images in another way, and
        # sums up more than 4,096 numbers, here those of a weight's gradient, in another way.
        for count, size in ((16, 16), (16, 8), (20, 12)):
            images = torch.randn(count, 1, size, size)
            found = gradients(compiled, network, images)
            graphs.append(counters["stats"]["unique_graphs"])
            right = gradients(network, network, images)
            largest = max(float(gradient.abs().max()) for gradient in right)
            for own, expected in zip(found, right, strict=True):  # those of an attention's keys' biases are 0, rounded
                near = 1e-4 * float(expected.abs().max()) + 1e-6 * largest
                torch.testing.assert_close(own, expected, rtol=0, atol=near)
    assert graphs == [graphs[0]] * 3 and counters["frames"]["total"] == counters["frames"]["ok"]
    return graphs[0]


BLOCKS = {"sample_size": 16, "in_channels": 1, "out_channels": 1, "norm_num_groups": 4, "block_out_channels": [8]}
BLOCKS |= {"down_block_types": ["AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D"], "attention_head_dim": 8}


def test_a_kind_of_block_is_compiled_once_for_all_blocks_and_sizes(monkeypatch):
    """The backend is the one that takes the least time."""
    few = compiled_gradients(monkeypatch, "eager", {**BLOCKS, "layers_per_block": 1})
    many = compiled_gradients(monkeypatch, "eager", {**BLOCKS, "layers_per_block": 3})
    assert few == many


@pytest.mark.slow
def test_what_inductor_compiles_is_right_and_is_compiled_for_no_size_again(monkeypatch):
    compiled_gradients(monkeypatch, "inductor", {**BLOCKS, "layers_per_block": 1})
