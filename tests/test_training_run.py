"""What must never be lost of a run: its options, its place in the data, its checkpoints, its end."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from datasets import Dataset
from diffusers import DDIMScheduler
from safetensors.torch import load_file
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainerCallback

import finetune
import noisy_classifier
import pretrain
import train_vae
import training_run
from ddae_hf import DDAEPipeline
from ranges import RANGES
from training_run import Progress

from . import scripts
from .conftest import make_unet
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
    options += ["--checkpointing_steps", 2, "--sample_steps", 2, "--num_samples", 1, "--num_inference_steps", 1]
    return [*options, "--lr_warmup_steps", 1, "--mixed_precision", "no"]


def vae_options(digits, folder):
    options = ["--dataset_name", digits, "--max_train_samples", 120, "--held_out", 20, "--output_dir", folder]
    options += ["--vae", json.dumps(TINY_VAE), "--resolution", 8, "--train_batch_size", 25, "--max_train_steps", 6]
    return [*options, "--checkpointing_steps", 2, "--lr_warmup_steps", 1, "--mixed_precision", "no"]


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory):
    folder = tmp_path_factory.mktemp("denoiser")
    DDAEPipeline.for_denoiser(make_unet(in_channels=1, out_channels=1), DDIMScheduler()).save_pretrained(folder)
    return folder


def finetune_options(digits, folder, denoiser):
    options = ["--model_name_or_path", denoiser, "--dataset_name", digits, "--output_dir", folder]
    options += ["--max_train_samples", 64, "--max_test_samples", 20, "--batch_size", 16, "--max_train_steps", 4]
    return [*options, "--checkpointing_steps", 2, "--ema_decay", 0.9]


@pytest.fixture(scope="module")
def pretrained(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    scripts.run("pretrain", *pretrain_options(digits, folder))
    return folder


@pytest.fixture(scope="module")
def vae(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    scripts.run("train_vae", *vae_options(digits, folder))
    return folder


@pytest.fixture(scope="module")
def finetuned(digits, denoiser, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetuned")
    scripts.run("finetune", *finetune_options(digits, folder, denoiser))
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


# Options


SCRIPTS = sorted(
    path
    for folder in ("examples", "examples/demo", "benchmarks", "model_cards")
    for path in (ROOT / folder).glob("*.py")
    if '__name__ == "__main__"' in path.read_text()
)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_no_script_takes_an_abbreviated_option(path, monkeypatch, capsys):
    """Where abbreviations are allowed, `--hel` is `--help`, and ends with 0."""
    if path.parent.name == "demo":
        pytest.importorskip("gradio")
    monkeypatch.setattr(sys, "argv", [str(path), "--hel"])
    monkeypatch.setattr(sys, "path", [*sys.path, str(path.parent)])  # where two share a name, after the examples
    spec = importlib.util.spec_from_file_location(f"script_{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    with pytest.raises(SystemExit) as refusal:
        module.main()
    assert refusal.value.code == 2 and "error: " in capsys.readouterr().err


def test_a_configuration_whose_option_is_abbreviated_is_not_lost(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("seed: 7")
    with pytest.raises(SystemExit):
        pretrain.parse_arguments(["--conf", str(tmp_path / "config.yaml")])
    assert "unrecognized arguments: --conf" in capsys.readouterr().err


NEEDED = {pretrain: [], train_vae: [], finetune: ["--model_name_or_path", "x"]}
NEEDED[noisy_classifier] = NEEDED[finetune]
# The first are checked with the network or its schedule, the others when the split is read.
CHECKED_LATER = {"log_sigma", "sigma", "sigmas", "max_train_samples", "max_test_samples"}


def numeric_options(module, monkeypatch):
    found = []
    with monkeypatch.context() as patch:
        patch.setattr(module, "parse_with_config", lambda parser, argv: found.append(parser) or sys.exit())
        with pytest.raises(SystemExit):
            module.parse_arguments(NEEDED[module])
    return {action.dest: action.type for action in found[0]._actions if action.type in (int, float)}


@pytest.mark.parametrize("module", NEEDED, ids=lambda module: module.__name__)
def test_every_number_that_training_takes_has_a_range(module, monkeypatch, capsys, tmp_path):
    options = numeric_options(module, monkeypatch)
    assert set(options) - set(RANGES) <= CHECKED_LATER and len(options) > 10
    for name, kind in options.items():
        if name in CHECKED_LATER:
            continue
        for value in ["-1"] + ["nan", "inf", "-inf"] * (kind is float):
            with pytest.raises(SystemExit):
                module.parse_arguments([*NEEDED[module], f"--{name}={value}"])
            assert f"--{name} is {float(value) if kind is float else value}: it must be" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text("learning_rate: .nan")
    with pytest.raises(SystemExit):
        module.parse_arguments([*NEEDED[module], "--config", str(tmp_path / "config.yaml")])
    assert "--learning_rate is nan: it must be finite and positive" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "allowed", "refused"),
    [
        ("checkpoints_total_limit", 1, 0),
        ("learning_rate", 1e-30, 0),
        ("adam_epsilon", 1e-30, 0),
        ("max_grad_norm", 0, -1e-9),
        ("adam_weight_decay", 0, -1e-9),
        ("lr_warmup_steps", 0, -1),
        ("sample_steps", 0, -1),
        ("ema_decay", 0, 1),
        ("adam_beta1", 0.999, 1),
        ("adam_beta2", 0, 1.5),
        ("label_dropout", 1, 1.01),
        ("seed", 2**32 - 1, 2**32),
    ],
)
def test_ranges_end_where_they_should(option, allowed, refused, capsys):
    assert getattr(pretrain.parse_arguments([f"--{option}={allowed}"]), option) == allowed
    with pytest.raises(SystemExit):
        pretrain.parse_arguments([f"--{option}={refused}"])
    assert f"--{option} is {refused}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["pretrain", "train_vae", "finetune"])
def test_no_largest_norm_of_the_gradient_is_one_that_is_never_reached(name, digits, denoiser, tmp_path):
    def run(folder, norm):
        arguments = {"pretrain": pretrain_options, "train_vae": vae_options}.get(name)
        options = arguments(digits, folder) if arguments else finetune_options(digits, folder, denoiser)
        options += ["--max_train_steps", 2, "--max_grad_norm", norm]
        scripts.run(name, *options, *(["--sample_steps", 0] if name == "pretrain" else []))
        return tensors(folder)

    free, high, low = run(tmp_path / "free", 0), run(tmp_path / "high", 1e9), run(tmp_path / "low", 1e-9)
    assert all(torch.equal(free[key], high[key]) for key in free)
    assert not all(torch.equal(free[key], low[key]) for key in free)


# The place in the data


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.zeros(4, 1))


@pytest.mark.parametrize(
    ("data", "progress"), [([], Progress()), (torch.zeros(4, 1), Progress(2, 2, 6)), (Stream(), Progress(2, 2, 6))]
)
def test_an_epoch_that_yields_nothing_is_an_error(data, progress, in_time):
    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(DataLoader(data, batch_size=2))
    with pytest.raises(SystemExit, match=f"Epoch {progress.epoch + 1} has no batch after the {progress.batch} that"):
        next(pretrain.batches_from(accelerator, loader, progress))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train_batch_size", 100], r"batches of 25 images \(--train_batch_size 25, processes: 1\), and this .* 100"),
        (["--train_batch_size", 50], "give --train_batch_size 25, or begin another run from its weights"),
        (["--max_train_samples", 25], "was trained on 100 images, and here are 25. .* give the same images, or begin"),
        (["--seed", 2], "other options: seed differ"),
    ],
)
def test_a_run_is_not_resumed_where_its_place_in_the_data_would_be_lost(
    pretrained, digits, tmp_path, options, message, in_time
):
    link(pretrained / "checkpoint-2", tmp_path)
    with pytest.raises(SystemExit, match=message):
        scripts.run("pretrain", *pretrain_options(digits, tmp_path), "--resume_from_checkpoint", "latest", *options)
    assert [f.name for f in tmp_path.iterdir()] == ["checkpoint-2"]


def test_an_old_checkpoint_of_more_images_does_not_hang(pretrained, digits, tmp_path, in_time):
    """Version 0.1.0 did not note how many images there were."""
    shutil.copytree(pretrained / "checkpoint-2", tmp_path / "checkpoint-2")
    path = tmp_path / "checkpoint-2" / training_run.PROGRESS
    old = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("num_images", "losses")}
    path.write_text(json.dumps(old))
    options = [*pretrain_options(digits, tmp_path), "--resume_from_checkpoint", "latest"]
    with pytest.raises(SystemExit, match="Epoch 1 has no batch after the 2 that are done"):
        scripts.run("pretrain", *options, "--max_train_samples", 50)
    scripts.run("pretrain", *options)
    expected, found = tensors(pretrained), tensors(tmp_path)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_an_autoencoder_is_resumed_on_the_same_batches(vae, digits, tmp_path, in_time):
    options = [*vae_options(digits, tmp_path), "--resume_from_checkpoint", vae / "checkpoint-6"]
    with pytest.raises(SystemExit, match="batches of 25 images .* give --train_batch_size 25[.]"):
        scripts.run("train_vae", *options, "--train_batch_size", 50)
    with pytest.raises(SystemExit, match="was trained on 100 images, and here are 60"):
        scripts.run("train_vae", *options, "--max_train_samples", 80)


def test_finetuning_is_resumed_on_the_same_batches(digits, denoiser, tmp_path):
    shutil.copytree(digits, tmp_path / "digits")
    options = [*finetune_options(tmp_path / "digits", tmp_path / "out", denoiser), "--max_train_samples", 1437]
    scripts.run("finetune", *options, "--max_train_steps", 2)
    options += ["--max_train_steps", 2, "--resume_from_checkpoint", "latest"]
    (tmp_path / "out" / finetune.RESULTS).unlink()
    (tmp_path / "out" / "checkpoint-best-3").mkdir()  # the user's own
    Dataset.from_parquet(str(digits / "train.parquet")).select(range(64)).to_parquet(
        tmp_path / "digits" / "train.parquet"
    )
    with pytest.raises(SystemExit, match="checkpoint-2 was trained on 1437 images, and here are 64: give the same"):
        scripts.run("finetune", *options)
    (tmp_path / "out" / "checkpoint-2" / "rng_state.pth").rename(tmp_path / "out" / "checkpoint-2" / "rng_state_0.pth")
    (tmp_path / "out" / "checkpoint-2" / "rng_state_1.pth").touch()  # as two processes leave them
    with pytest.raises(SystemExit, match=r"was trained by 2 process\(es\), and here are 1: start as many as then"):
        scripts.run("finetune", *options)


# Checkpoints


def test_the_checkpoint_just_saved_is_kept_whatever_lies_beside_it(pretrained, digits, tmp_path):
    """Who goes back to an earlier checkpoint has later ones, which count as older than what is saved now."""
    for step in (2, 4, 6):
        shutil.copytree(pretrained / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-4-best").mkdir()  # the user's own
    options = ["--resume_from_checkpoint", tmp_path / "checkpoint-2", "--max_train_steps", 3, "--sample_steps", 0]
    options += ["--checkpointing_steps", 1, "--checkpoints_total_limit", 2]
    scripts.run("pretrain", *pretrain_options(digits, tmp_path), *options)
    assert {f.name for f in tmp_path.glob("*checkpoint*")} == {"checkpoint-3", "checkpoint-4-best", "checkpoint-6"}


def test_options_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    args = pretrain.parse_arguments(["--seed", "1"])
    training_run.write_options(args, tmp_path)

    def stopped(path, text, **options):
        write(path, text[: len(text) // 2], **options)
        raise KeyboardInterrupt

    args.seed, write = 2, Path.write_text
    monkeypatch.setattr(Path, "write_text", stopped)
    with pytest.raises(KeyboardInterrupt):
        training_run.write_options(args, tmp_path)
    assert yaml.safe_load((tmp_path / training_run.OPTIONS).read_text())["seed"] == 1


# The end


def killed(patch, owner, name, when=lambda *args: True):
    """Make a function stop the program where a condition on its arguments holds."""
    original = getattr(owner, name)

    def stopping(*args, **options):
        if when(*args):
            raise KeyboardInterrupt
        return original(*args, **options)

    patch.setattr(owner, name, stopping)


KILLS = {
    "a checkpoint": (training_run.Run, "save", lambda run, network, folder: folder.name == "partial-checkpoint"),
    "sampling after a checkpoint": (training_run.Run, "sample", lambda run, step: step == 4),
    "sampling after the last": (training_run.Run, "sample", lambda run, step: step == 6),
    "the final save": (training_run.Run, "save", lambda run, network, folder: folder.name != "partial-checkpoint"),
    "the results": (training_run, "base_model", lambda source: True),
}


@pytest.mark.parametrize("kill", KILLS)
def test_resuming_does_what_is_not_done_yet(pretrained, digits, tmp_path, monkeypatch, kill):
    options = pretrain_options(digits, tmp_path)
    with monkeypatch.context() as patch:
        killed(patch, *KILLS[kill])
        with pytest.raises(KeyboardInterrupt):
            scripts.run("pretrain", *options)
    assert not (tmp_path / "train_results.json").exists()
    assert (tmp_path / "partial-checkpoint").exists() == (kill == "a checkpoint")
    scripts.run("pretrain", *options, "--resume_from_checkpoint", "latest")
    assert_same(pretrained, tmp_path, "train_results.json")


def test_a_complete_run_is_left_as_it_is(pretrained, digits, caplog):
    files = {f: f.stat().st_mtime_ns for f in pretrained.rglob("*") if f.is_file() and f.name != "README.md"}
    (pretrained / "partial-checkpoint").mkdir()
    options = [*pretrain_options(digits, pretrained), "--resume_from_checkpoint", "latest"]
    with caplog.at_level("INFO"):
        scripts.run("pretrain", *options)
    assert f"{pretrained} is complete, after 6 steps" in caplog.text
    assert files == {f: f.stat().st_mtime_ns for f in pretrained.rglob("*") if f.is_file() and f.name != "README.md"}
    assert not (pretrained / "partial-checkpoint").exists()
    with pytest.raises(SystemExit, match="checkpoint-6 is at step 6, beyond the 5 asked for"):
        scripts.run("pretrain", *options, "--max_train_steps", 5)


def test_an_autoencoder_is_finished_where_its_end_was_interrupted(vae, digits, tmp_path, monkeypatch, caplog):
    options = vae_options(digits, tmp_path)
    with monkeypatch.context() as patch:
        killed(patch, train_vae.AutoencoderKL, "save_pretrained")
        with pytest.raises(KeyboardInterrupt):
            scripts.run("train_vae", *options)
    (tmp_path / "partial-checkpoint").mkdir()
    scripts.run("train_vae", *options, "--resume_from_checkpoint", "latest")
    assert_same(vae, tmp_path, "train_results.json")
    with caplog.at_level("INFO"):
        scripts.run("train_vae", *options, "--resume_from_checkpoint", "latest")
    assert "is complete, after 6 steps" in caplog.text


def test_a_finetuned_network_is_finished_where_its_end_was_interrupted(
    finetuned, digits, denoiser, tmp_path, monkeypatch, capsys
):
    options = finetune_options(digits, tmp_path, denoiser)
    with monkeypatch.context() as patch:
        killed(patch, finetune, "write_json", lambda path, content: path.name == finetune.RESULTS)
        with pytest.raises(KeyboardInterrupt):
            scripts.run("finetune", *options)
    (tmp_path / "checkpoint-3").mkdir()  # as of an interrupted save
    scripts.run("finetune", *options, "--resume_from_checkpoint", "latest")
    assert_same(finetuned, tmp_path, finetune.RESULTS)
    scripts.run("finetune", *options, "--resume_from_checkpoint", "latest")
    assert "is complete, its figures are in eval_results.json" in capsys.readouterr().out


# Numbers that are not finite


def spoilt(steps_of, weight_of, at):
    """Steps of a training, after one of which a weight is no number."""

    def steps(args, accelerator, training):
        for step in steps_of(args, accelerator, training):
            if step == at:
                with torch.no_grad():
                    weight_of(training).view(-1)[0] = float("nan")
            yield step

    return steps


TRAININGS = {
    "pretrain": (pretrain, pretrain_options, lambda training: training.denoiser.conv_in.weight),
    "train_vae": (train_vae, vae_options, lambda training: training.vae.encoder.conv_in.weight),
}


@pytest.mark.parametrize("name", TRAININGS)
def test_nothing_is_saved_of_weights_that_are_not_finite(name, request, digits, tmp_path, monkeypatch):
    module, arguments, weight_of = TRAININGS[name]
    whole = request.getfixturevalue("pretrained" if name == "pretrain" else "vae")
    options = arguments(digits, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module, "training_steps", spoilt(module.training_steps, weight_of, at=4))
        message = (
            "Some weights are no finite numbers, after a loss of .* at step 4, at a learning rate of .* none of it"
        )
        with pytest.raises(SystemExit, match=f"{message} is saved. .*checkpoint-2 is the last good .* resume from it"):
            scripts.run(name, *options)
    assert [f.name for f in tmp_path.glob("*checkpoint*")] == ["checkpoint-2"]
    assert not list(tmp_path.glob("*.json")) and not (tmp_path / "samples" / "step-0000004.png").exists()
    scripts.run(name, *options, "--resume_from_checkpoint", "latest")
    assert_same(whole, tmp_path, "train_results.json")


@pytest.mark.parametrize("name", TRAININGS)
def test_nothing_is_saved_of_a_training_that_diverges(name, digits, tmp_path):
    _, arguments, _ = TRAININGS[name]
    with pytest.raises(SystemExit, match="at step 2, at a learning rate of .*; none of it is saved. There is no"):
        scripts.run(name, *arguments(digits, tmp_path), "--learning_rate", 1e30, "--lr_warmup_steps", 0)
    assert not [f for f in tmp_path.rglob("*") if f.is_file()]


def test_a_run_is_resumed_at_another_learning_rate(pretrained, digits, tmp_path):
    """Else the advice to lower it would be of no use."""
    rates = []
    for rate in (1e-4, 1e-5):
        folder = tmp_path / str(rate)
        link(pretrained / "checkpoint-2", folder)
        options = ["--resume_from_checkpoint", "latest", "--learning_rate", rate, "--adam_beta1", 0.5]
        options += ["--lr_scheduler", "linear", "--sample_steps", 0, "--max_train_steps", 5, "--checkpointing_steps", 1]
        scripts.run("pretrain", *pretrain_options(digits, folder), *options)
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
    with pytest.raises(SystemExit, match="checkpoint-2 holds weights that are no finite numbers: resume an earlier"):
        scripts.run("pretrain", *pretrain_options(digits, tmp_path), "--resume_from_checkpoint", "latest")


def test_finetuning_saves_nothing_that_is_not_finite(finetuned, digits, denoiser, tmp_path, monkeypatch):
    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 4:
                with torch.no_grad():
                    model.classifier.bias[0] = float("nan")

    def spoiling(*args):
        trainer = make_trainer(*args)
        trainer.add_callback(Spoil())
        return trainer

    make_trainer, options = finetune.make_trainer, finetune_options(digits, tmp_path, denoiser)
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "make_trainer", spoiling)
        with pytest.raises(SystemExit, match="no finite numbers, .* at step 4, .*checkpoint-2 is the last good"):
            scripts.run("finetune", *options)
    assert [f.name for f in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (tmp_path / "model.safetensors").exists()
    scripts.run("finetune", *options, "--resume_from_checkpoint", "latest")
    assert_same(finetuned, tmp_path, finetune.RESULTS)


def test_finetuning_that_diverges_saves_nothing(digits, denoiser, tmp_path):
    options = [*finetune_options(digits, tmp_path, denoiser), "--lr_warmup_ratio", 0, "--learning_rate", 1e30]
    with pytest.raises(SystemExit, match="at step 2, at a learning rate of .*; none of it is saved. There is no"):
        scripts.run("finetune", *options)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("option", ["--learning_rate", "--wide_resnet_learning_rate"])
def test_classifiers_of_noisy_images_that_diverge_are_not_saved(option, digits, denoiser, tmp_path):
    options = ["--model_name_or_path", denoiser, "--dataset_name", digits, "--output_dir", tmp_path, "--num_views", 1]
    options += ["--max_train_samples", 40, "--max_test_samples", 20, "--hidden_size", 8, "--num_train_epochs", 3]
    options += ["--train_batch_size", 20, "--wide_resnet", 1, "--wide_resnet_steps", 4, "--wide_resnet_batch_size", 8]
    with pytest.raises(SystemExit, match=f"none of it is saved. There is no checkpoint .* with a lower {option}, or"):
        scripts.run("noisy_classifier", *options, option, 1e30)
    failed = "mlp" if option == "--learning_rate" else "wide_resnet"
    assert not list((tmp_path / failed).glob("*.safetensors")) and not (tmp_path / "eval_results.json").exists()


# Several processes


TWO = """
import json, sys
import pretrain
from accelerate.state import PartialState
from ddae_hf.diffusion import Diffusion
from tests import scripts
from tests.watch import watched

def failing(*args, **options):
    losses.append(loss_of(*args, **options))
    one = PartialState().process_index == 1
    return losses[-1] * float("nan") if one and len(losses) == 6 else losses[-1]

losses = []
pretrain.training_inputs = watched(pretrain.training_inputs)
loss_of, Diffusion.loss = Diffusion.loss, failing
pretrain.Accelerator.end_training = lambda accelerator: None  # it would close the process group of the next run
for options in json.loads(sys.argv[1]):
    try:
        scripts.run("pretrain", *options)
    except SystemExit as stop:
        print(f"Process {PartialState().process_index}: {stop}")
"""


def test_two_processes_go_on_where_one_stopped_and_stop_together(digits, tmp_path, monkeypatch):
    """Four images a batch on one, two on each of two: the same images in the same order, at the same rates.

    Of the second run's second step, the loss is no number on one process alone, and both stop.
    """
    options = ["--lr_scheduler", "linear", "--sample_steps", 0]
    alone = [*pretrain_options(digits, tmp_path / "alone"), *options, "--train_batch_size", 4]
    both = [*pretrain_options(digits, tmp_path / "both"), *options, "--train_batch_size", 2]
    both += ["--resume_from_checkpoint", tmp_path / "alone" / "checkpoint-2"]
    fails = [*pretrain_options(digits, tmp_path / "fails"), *options, "--checkpointing_steps", 1]
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "training_inputs", watched(pretrain.training_inputs))
        scripts.run("pretrain", *alone)
    (tmp_path / "two.py").write_text(TWO)
    config = ROOT / "examples" / "accelerate_configs" / "two_cpu_processes.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += [str(tmp_path / "two.py"), json.dumps([both, fails], default=str)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, [ROOT / "examples", ROOT]))
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
    for process in (0, 1):
        assert f"Process {process}: The loss is nan at step 2" in done.stdout
    assert [f.name for f in (tmp_path / "fails").glob("*checkpoint*")] == ["checkpoint-1"]
