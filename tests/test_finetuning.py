"""Fine-tuning: its rules one by one, and its runs, at tiny size, on real digits."""

import json
import math
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from datasets import Dataset
from diffusers import DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file
from sklearn.metrics import f1_score
from transformers import TrainerCallback

from ddae_hf import DDAEConfig, DDAEForImageClassification, DDAEImageProcessor, DDAEModel, DDAEPipeline
from ddae_hf.experiments import Images, finetune, finetuning, trainer
from ddae_hf.experiments.classes import draw_labels
from ddae_hf.experiments.draws import indexed_noise
from ddae_hf.experiments.options import RANGES
from ddae_hf.experiments.run_folder import FILES, OPTIONS
from ddae_hf.experiments.stopping import Interrupted, NotFinite
from ddae_hf.experiments.trainer import AVERAGED, PROGRESS, parameter_groups

from . import commands
from .conftest import drawn, make_dit, make_unet
from .quiet import quiet

RESULTS = "eval_results.json"
GREY = {"in_channels": 1, "out_channels": 1}
PAIRS = {
    "ddpm": (make_unet, {**GREY, "dropout": 0.1}, DDIMScheduler),
    "edm": (make_unet, GREY, EDMEulerScheduler),
    "flow": (make_dit, {"in_channels": 1, "num_embeds_ada_norm": 0}, FlowMatchEulerDiscreteScheduler),
}
OPTIONS_OF_ALL = {
    "max_train_samples": 100, "max_test_samples": 70, "train_batch_size": 32, "learning_rate": 1e-3,
    "random_flip": True, "random_crop": 1, "label_smoothing": 0.1, "mixup": 0.4, "layer_decay": 0.8, "ema_decay": 0.9,
}  # fmt: skip
SIX = {"max_train_steps": 6, "checkpointing_steps": 3}
LATEST = {"resume_from_checkpoint": "latest"}
MIXED = ("labels", "partner_labels", "shares")  # of a batch with mixup


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("denoisers")
    for name, (make, options, scheduler) in PAIRS.items():
        DDAEPipeline.for_denoiser(make(**options), scheduler()).save_pretrained(root / name)
    return root


def run(checkpoint, digits, folder, **options):
    images = Images.open(digits)
    return finetune(checkpoint, images, **{**OPTIONS_OF_ALL, "output_dir": folder, **options})


@pytest.fixture(scope="module")
def finetuned(checkpoints, digits, tmp_path_factory):
    """Six steps of four an epoch, with a checkpoint inside the first."""
    folder = tmp_path_factory.mktemp("finetuned")
    return folder, run(checkpoints / "ddpm", digits, folder, **SIX)


def started(finetuned, folder, *steps):
    """A run that stopped after the first of these steps, of which later ones are left too."""
    folder.mkdir(exist_ok=True)
    for step in steps:
        shutil.copytree(finetuned[0] / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    (folder / OPTIONS).write_text((finetuned[0] / OPTIONS).read_text())
    return folder


def assert_same(folder, other, *files):
    for file in files or ("model.safetensors", "checkpoint-6/model.safetensors", f"checkpoint-6/{AVERAGED}"):
        expected, found = load_file(folder / file), load_file(other / file)
        assert expected.keys() == found.keys() and all(torch.equal(expected[n], found[n]) for n in expected)


def make_model(name, checkpoints, **options):
    torch.manual_seed(0)
    return DDAEForImageClassification.from_pretrained(checkpoints / name, num_labels=10, **options)


def answers(folder, digits, count):
    """True classes, and those that a saved folder gives with its fixed noise and with every image's own."""
    model, processor = DDAEForImageClassification.from_pretrained(folder), DDAEImageProcessor.from_pretrained(folder)
    test = drawn(digits, "test", count)
    labels, pixels = torch.tensor(test["label"][:]), processor(test["image"][:], return_tensors="pt")["pixel_values"]
    own = indexed_noise(tuple(pixels.shape[1:]), range(count), model.config.noise_seed, 1)
    with torch.no_grad():
        return labels, [model(pixels, noise=n).logits.argmax(-1) for n in (None, own)]


def accuracies(folder, digits, count):
    labels, given = answers(folder, digits, count)
    return [(classes == labels).float().mean().item() for classes in given]


@pytest.mark.parametrize("name", ["edm", "flow"])
def test_every_framework_and_network_is_finetuned_and_opens_again(checkpoints, digits, tmp_path, name):
    layer = {"edm": "mid_block", "flow": "transformer_blocks.1"}[name]
    result = run(checkpoints / name, digits, tmp_path, layer=layer, sigma=0.1, max_train_steps=2, noise_seed=3)
    assert (result.layer, result.sigma, result.steps) == (layer, 0.1, 2)
    model = DDAEForImageClassification.from_pretrained(tmp_path)
    assert (model.config.layer, model.config.sigma, model.config.noise_seed) == (layer, 0.1, 3)
    assert model.config.id2label[3] == "3"
    assert accuracies(tmp_path, digits, 70) == pytest.approx([result.test_accuracy, result.test_own_noise_accuracy])


def test_the_reported_accuracy_is_that_of_the_saved_folder_on_every_test_image(finetuned, digits):
    folder, result = finetuned
    fixed, own = accuracies(folder, digits, 70)
    assert result.num_test_images == 70 and result.num_train_labels == 100
    assert result.test_accuracy == pytest.approx(fixed) and result.test_own_noise_accuracy == pytest.approx(own)
    assert result.images_per_second > 0 and result.options["mixup"] == 0.4
    labels, given = answers(folder, digits, 70)
    f1 = [f1_score(labels, classes, average="macro", zero_division=0) for classes in given]
    assert [result.test_f1, result.test_own_noise_f1] == pytest.approx(f1) and 0 < f1[0] != fixed
    assert result.dataset["num_images"] == 100 and result.processes == 1
    assert json.loads((folder / RESULTS).read_text()) == json.loads(json.dumps(result.to_dict()))
    assert "| the model's fixed noise |" in result.table()


def test_it_prints_nothing_and_leaves_the_global_generators_alone(checkpoints, digits, tmp_path, capsys):
    with quiet(capsys):
        run(checkpoints / "flow", digits, tmp_path, max_train_steps=1)


def test_an_open_model_gives_what_its_checkpoint_gives_and_stays_as_it_is(checkpoints, digits, tmp_path):
    """Without a folder nothing is left but the result."""
    options = {"output_dir": None, "max_train_steps": 2, "lr_warmup_ratio": 0.0}
    from_path = run(checkpoints / "flow", digits, None, **options)
    model = DDAEModel.from_pretrained(checkpoints / "flow")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = model.config.to_dict()
    result = run(model, digits, None, **options)
    assert model.config.to_dict() == config
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    expected, found = from_path.classifier.state_dict(), result.classifier.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert not torch.equal(found["ddae.denoiser.pos_embed.proj.weight"], before["denoiser.pos_embed.proj.weight"])
    result.save(tmp_path)
    assert_same(tmp_path, tmp_path, "model.safetensors")
    assert accuracies(tmp_path, digits, 70)[0] == pytest.approx(result.test_accuracy)


# Resuming


def test_an_interrupted_run_resumes_exactly(finetuned, checkpoints, digits, tmp_path):
    folder, result = finetuned
    (tmp_path / "checkpoint-3").symlink_to(folder / "checkpoint-3")
    (tmp_path / OPTIONS).write_text((folder / OPTIONS).read_text())
    # A checkpoint that was interrupted while it was written, before its averages, is passed over.
    (tmp_path / "checkpoint-5").mkdir()
    again = run(checkpoints / "ddpm", digits, tmp_path, **SIX, **LATEST)
    assert_same(folder, tmp_path)
    assert (again.test_accuracy, again.test_loss) == (result.test_accuracy, result.test_loss)
    assert again.images == result.images == 100 + 64
    before = json.loads((folder / "checkpoint-3" / PROGRESS).read_text())
    assert before["images"] == 96 and before["seconds"] > 0
    total = before["seconds"] + again.train_seconds_this_run
    assert again.train_seconds == pytest.approx(total, abs=0.11) and again.seconds > again.seconds_this_run


@pytest.mark.parametrize("missing", [("files.json",), ("files.json", "num_images")])
def test_a_run_of_older_versions_resumes_exactly(finetuned, checkpoints, digits, tmp_path, missing):
    """Version 0.2.0 noted no files, and 0.1.0 not even how many images there were."""
    run_folder = started(finetuned, tmp_path / "old", 3)
    checkpoint = run_folder / "checkpoint-3"
    (checkpoint / FILES).unlink()
    progress = json.loads((checkpoint / PROGRESS).read_text())
    known = {"images", "seconds"} | {"num_images"} - set(missing)
    (checkpoint / PROGRESS).write_text(json.dumps({name: progress[name] for name in known}))
    options = yaml.safe_load((run_folder / OPTIONS).read_text())
    new = ("gradient_accumulation_steps", "dataloader_num_workers", "torch_compile", "report_to", "logging_dir")
    old = {name: value for name, value in options.items() if name not in (*new, "skip_bad_images")}
    (run_folder / OPTIONS).write_text(yaml.safe_dump(old | {"push_to_hub": False, "config": None}))
    run(checkpoints / "ddpm", digits, run_folder, **SIX, **LATEST)
    assert_same(finetuned[0], run_folder)


def test_a_finished_run_resumes_to_the_same_figures(finetuned, checkpoints, digits, tmp_path):
    folder, result = finetuned
    again = run(checkpoints / "ddpm", digits, tmp_path, **SIX, resume_from_checkpoint=folder / "checkpoint-6")
    assert again.test_loss == result.test_loss and again.images == result.images


def test_the_rate_is_that_of_the_whole_training_and_not_of_its_last_run(finetuned, checkpoints, digits, tmp_path):
    """Three steps are left after three that took ten seconds, and they take a fraction of one."""
    run_folder = started(finetuned, tmp_path / "slow", 3)
    path = run_folder / "checkpoint-3" / PROGRESS
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": 10.0}))
    (run_folder / "checkpoint-3" / FILES).unlink()
    again = run(checkpoints / "ddpm", digits, run_folder, **SIX, **LATEST)
    assert again.images == 164 and again.train_seconds >= 10
    assert again.images_per_second == pytest.approx(164 / again.train_seconds, rel=0.02)


def test_a_complete_run_is_left_as_it_is(finetuned, checkpoints, digits, caplog, monkeypatch):
    folder, result = finetuned
    monkeypatch.setattr(finetuning, "train_further", None)
    with caplog.at_level("INFO"):
        again = run(checkpoints / "ddpm", digits, folder, **SIX, **LATEST)
    assert "is complete: there is nothing left to do" in caplog.text
    assert again.to_dict() == json.loads(json.dumps(result.to_dict()))
    assert torch.equal(again.classifier.classifier.weight, result.classifier.classifier.weight.cpu())


@pytest.mark.parametrize("complete", [True, False])
def test_a_finished_training_takes_over_no_other_options(finetuned, checkpoints, digits, tmp_path, complete):
    """Also where it stopped before its tests."""
    folder = started(finetuned, tmp_path / "out", 3, 6)
    if complete:
        shutil.copytree(finetuned[0], folder, dirs_exist_ok=True)
    changes = {"learning_rate": 1e-5, "layer_decay": 0.5, "lr_warmup_ratio": 0.0, "weight_decay": 0.3, "ema_decay": 0.5}
    for name, value in (changes | {"max_grad_norm": 2.0, "mixed_precision": "bf16"}).items():
        with pytest.raises(
            ValueError, match=f"checkpoint-6 was trained with other options: {name} was .* is {value!r}"
        ):
            run(checkpoints / "ddpm", digits, folder, **SIX, **LATEST, **{name: value})
    assert yaml.safe_load((folder / OPTIONS).read_text())["learning_rate"] == 1e-3
    state = folder / "checkpoint-6" / "trainer_state.json"
    state.write_text(state.read_text().replace('"max_steps": 6', '"max_steps": 9'))
    (folder / "checkpoint-6" / FILES).unlink()
    with pytest.raises(ValueError, match="max_train_steps was 9 and is 6"):
        run(checkpoints / "ddpm", digits, folder, **SIX, **LATEST)


def test_a_run_goes_on_from_the_same_weights_and_images_wherever_they_lie(finetuned, checkpoints, digits, tmp_path):
    folder = started(finetuned, tmp_path / "out", 3)
    shutil.copytree(checkpoints / "ddpm", tmp_path / "model")
    shutil.copytree(digits, tmp_path / "data")
    run(f"{tmp_path / 'model'}/", tmp_path / "data", folder, **SIX, **LATEST)
    assert_same(finetuned[0], folder)


def test_a_run_goes_on_in_other_batches_of_the_same_steps_and_in_another_precision(
    finetuned, checkpoints, digits, tmp_path, monkeypatch
):
    seen = []
    change = trainer.FineTuner.change
    watched = lambda self, inputs, draws: seen.append(inputs) or change(self, inputs, draws)  # noqa: E731
    monkeypatch.setattr(trainer.FineTuner, "change", watched)
    parts = {"train_batch_size": 16, "gradient_accumulation_steps": 2, "mixed_precision": "bf16"}
    for number, changes in enumerate(({}, parts)):
        folder = started(finetuned, tmp_path / str(number), 3)
        torch.save({}, folder / "checkpoint-3" / "scaler.pt")  # as fp16 leaves it
        result = run(checkpoints / "ddpm", digits, folder, **SIX, **LATEST, **changes)
        assert result.images == finetuned[1].images
    assert len(seen) == 3 + 5 and seen[0].keys() == {*MIXED, "pixel_values", "partner_pixel_values"}
    for name in MIXED:
        assert torch.equal(*(torch.cat([batch[name] for batch in half]) for half in (seen[:3], seen[3:]))), name
    assert yaml.safe_load((folder / OPTIONS).read_text())["mixed_precision"] == "bf16"
    given = {"mixed_precision": "fp16"}
    tuner = SimpleNamespace(args=SimpleNamespace(fp16=True, max_steps=6), known={"options": given})
    tuner.before = {"start": "", "options": {"mixed_precision": "no"}}
    trainer.FineTuner._check_options(tuner, folder / "checkpoint-3")
    with pytest.raises(ValueError, match="mixed_precision was 'no' and is 'fp16'"):
        trainer.FineTuner._check_options(tuner, finetuned[0] / "checkpoint-3")


def test_a_process_that_is_killed_while_it_saves_leaves_no_checkpoint(checkpoints, digits, tmp_path):
    """Else `latest` would be one that cannot be resumed."""
    if not (child := os.fork()):
        trainer.note_files = lambda folder: os._exit(9)  # the last thing before the checkpoint comes to its place
        try:
            run(checkpoints / "ddpm", digits, tmp_path, **SIX)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not list(tmp_path.glob("checkpoint-*")) and list(tmp_path.glob("partial-checkpoint/checkpoint-*"))
    assert run(checkpoints / "ddpm", digits, tmp_path, **SIX, **LATEST).steps == 6
    assert list(tmp_path.glob("checkpoint-*")) and not list(tmp_path.glob("partial*"))


def test_a_run_whose_end_was_interrupted_is_tested(finetuned, checkpoints, digits, tmp_path):
    folder = started(finetuned, tmp_path / "out", 3, 6)
    again = run(checkpoints / "ddpm", digits, folder, **SIX, **LATEST)
    assert again.test_loss == finetuned[1].test_loss and (folder / RESULTS).is_file()
    more = run(checkpoints / "ddpm", digits, folder, **SIX, **LATEST, max_test_samples=50)
    assert more.num_test_images == 50 and more.steps == 6


def test_resuming_another_run_or_mixing_two_is_refused(finetuned, checkpoints, digits, tmp_path):
    folder, _ = finetuned
    with pytest.raises(ValueError, match="holds checkpoints of an earlier run"):
        run(checkpoints / "ddpm", digits, folder, **SIX)
    changes = {"random_flip": False, "seed": 2, "few_labels": 5, "mixup": 0.0, "layer": "mid_block"}
    for name, value in changes.items():
        with pytest.raises(ValueError, match=f"other options: {name} was .* and is {value!r}. Resuming cannot change"):
            run(checkpoints / "ddpm", digits, folder, **SIX, **LATEST, **{name: value})
    for name, value, images in (("train_batch_size", 16, 16), ("gradient_accumulation_steps", 2, 64)):
        with pytest.raises(ValueError, match=f"{trainer.STEP} was 32 and is {images}"):
            run(checkpoints / "ddpm", digits, folder, **SIX, **LATEST, **{name: value})
    with pytest.raises(ValueError, match="was trained on 100 images, but here there are 50, or others"):
        run(checkpoints / "ddpm", digits, folder, **SIX, **LATEST, max_train_samples=50)
    with pytest.raises(ValueError, match="was trained from another model_name_or_path"):
        run(checkpoints / "edm", digits, folder, **SIX, **LATEST)
    with pytest.raises(ValueError, match="checkpoint-6 is past the 5 steps that are asked for"):
        run(checkpoints / "ddpm", digits, folder, **LATEST, max_train_steps=5)
    with pytest.raises(ValueError, match="there is no such checkpoint|cannot be resumed: it has no"):
        run(checkpoints / "ddpm", digits, tmp_path, **SIX, resume_from_checkpoint=str(tmp_path))
    with pytest.raises(ValueError, match="output_dir is not given: without it there is nothing to resume"):
        run(checkpoints / "ddpm", digits, None, **LATEST)


def test_more_processes_than_gpus_are_refused_before_any_work(monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"2 processes were launched on a machine with 1 GPU\(s\)"):
        finetune("nowhere", "nowhere")


def test_averages_cannot_begin_in_the_middle(checkpoints, digits, tmp_path):
    options = {"max_train_steps": 2, "checkpointing_steps": 1}
    run(checkpoints / "flow", digits, tmp_path, ema_decay=None, **options)
    with pytest.raises(ValueError, match="other options: ema_decay was None and is 0.9"):
        run(checkpoints / "flow", digits, tmp_path, **LATEST, **options)


def test_a_run_is_resumed_with_what_may_change(finetuned, checkpoints, digits, tmp_path):
    """Rates, decays, steps and the time of checkpoints are those asked for now, not those kept with the run."""
    folder = started(finetuned, tmp_path / "out", 3)
    changes = {"learning_rate": 1e-5, "layer_decay": 0.5, "weight_decay": 0.3, "ema_decay": 0.5, "lr_warmup_ratio": 0.0}
    run(checkpoints / "ddpm", digits, folder, **LATEST, **changes, max_train_steps=5, checkpointing_steps=1)
    assert {f.name for f in folder.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-5"}
    groups = torch.load(folder / "checkpoint-4" / "optimizer.pt")["param_groups"]
    model = make_model("ddpm", checkpoints)
    expected = parameter_groups(model, 1e-5, 0.5, 0.3)
    factor = (1 + math.cos(math.pi * 4 / 5)) / 2
    assert [g["lr"] for g in groups] == pytest.approx([g["lr"] * factor for g in expected])
    assert [g["weight_decay"] for g in groups] == [g["weight_decay"] for g in expected]
    state = json.loads((folder / "checkpoint-5" / "trainer_state.json").read_text())
    assert (state["max_steps"], state["save_steps"]) == (5, 1)
    averages = [load_file(folder / f"checkpoint-{step}" / AVERAGED)["classifier.weight"] for step in (4, 5)]
    weight = load_file(folder / "checkpoint-5" / "model.safetensors")["classifier.weight"]
    decay = min(0.5, 5 / 14)
    torch.testing.assert_close(averages[1], decay * averages[0] + (1 - decay) * weight, rtol=1e-5, atol=1e-7)
    assert yaml.safe_load((folder / OPTIONS).read_text())["learning_rate"] == 1e-5


def test_the_newest_checkpoint_that_is_whole_is_resumed(finetuned, checkpoints, digits, tmp_path, caplog):
    folder = started(finetuned, tmp_path / "out", 3, 6)
    broken = folder / "checkpoint-6" / "optimizer.pt"
    broken.write_bytes(broken.read_bytes()[:-1000])
    run(checkpoints / "ddpm", digits, folder, **SIX, **LATEST)
    assert "checkpoint-6 cannot be resumed: optimizer.pt is not what was written" in caplog.text
    assert_same(finetuned[0], folder)
    run(checkpoints / "ddpm", digits, folder, **SIX, resume_from_checkpoint=str(folder / "checkpoint-6"))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors", AVERAGED])
def test_a_checkpoint_without_a_part_of_its_state_is_refused(finetuned, checkpoints, digits, tmp_path, name):
    folder = started(finetuned, tmp_path / "out", 3)
    (folder / "checkpoint-3" / name).unlink()
    with pytest.raises(ValueError, match="checkpoint-3 cannot be resumed: it has no"):
        run(checkpoints / "ddpm", digits, folder, **SIX, **LATEST)


def test_a_run_without_its_options_is_refused(finetuned, checkpoints, digits, tmp_path):
    folder = started(finetuned, tmp_path / "out", 3)
    (folder / OPTIONS).unlink()
    with pytest.raises(ValueError, match=f"has no {OPTIONS}, which says how checkpoint-3 was trained"):
        run(checkpoints / "ddpm", digits, folder, **SIX, **LATEST)


def test_a_run_is_resumed_on_the_same_images(finetuned, checkpoints, digits, tmp_path):
    """Even where they are fewer, or others, under the same name."""
    copy = tmp_path / "digits"
    shutil.copytree(digits, copy)
    run(checkpoints / "ddpm", copy, tmp_path / "out", max_train_samples=None, max_train_steps=2)
    (tmp_path / "out" / RESULTS).unlink()
    (tmp_path / "out" / "checkpoint-best-3").mkdir()  # the user's own
    options = {"max_train_samples": None, "max_train_steps": 2, **LATEST}
    train = Dataset.from_parquet(str(digits / "train.parquet"))
    for rows in (range(64), [*range(1, len(train)), 0]):
        train.select(rows).to_parquet(copy / "train.parquet")
        with pytest.raises(ValueError, match=f"was trained on 1437 images, but here there are {len(rows)}, or others"):
            run(checkpoints / "ddpm", copy, tmp_path / "out", **options)
    checkpoint = tmp_path / "out" / "checkpoint-2"
    (checkpoint / FILES).unlink()
    (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
    shutil.copy(checkpoint / "rng_state_0.pth", checkpoint / "rng_state_1.pth")  # as two processes leave them
    with pytest.raises(ValueError, match=f"{trainer.STEP} was 64 and is 32"):
        run(checkpoints / "ddpm", copy, tmp_path / "out", **options)


# Signals, disks, numbers that are not finite


class At(TrainerCallback):
    """Does something after a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.action(model)


def with_callback(patch, callback):
    """Let every trainer have a callback before its own."""

    class Watched(trainer.FineTuner):
        def add_callback(self, given):
            if isinstance(given, trainer.Progress):
                super().add_callback(callback)
            super().add_callback(given)

    patch.setattr(finetuning, "FineTuner", Watched)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_a_checkpoint_and_the_run_goes_on_from_it(
    finetuned, checkpoints, digits, tmp_path, monkeypatch, number
):
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        with_callback(patch, At(2, lambda model: os.kill(os.getpid(), number)))
        with pytest.raises(
            Interrupted, match=f"{number.name} after step 2 .*checkpoint-2 is saved. .* go on"
        ) as stopped:
            run(checkpoints / "ddpm", digits, tmp_path, **SIX)
    assert stopped.value.signal == number and signal.getsignal(number) == before
    assert [f.name for f in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"] and not (tmp_path / RESULTS).exists()
    run(checkpoints / "ddpm", digits, tmp_path, **SIX, **LATEST)
    assert_same(finetuned[0], tmp_path)


FULL = OSError(28, "No space left on device")
OF_TORCH = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 2260928 vs 2260816")
ITS_FIRST = RuntimeError("basic_ios::clear: iostream error")


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("optimizer.pt", FULL),
        ("optimizer.pt", OF_TORCH),
        ("optimizer.pt", ITS_FIRST),
        (AVERAGED, FULL),
        (PROGRESS, FULL),
    ],
)
def test_a_full_disk_is_one_sentence_and_leaves_earlier_checkpoints(
    finetuned, checkpoints, digits, tmp_path, monkeypatch, where, error
):
    with monkeypatch.context() as patch:

        def full(write):
            def writes(content, path, *args, **kwargs):
                path, content = (content, path) if where == PROGRESS else (path, content)
                if "checkpoint-6" in str(path) and str(path).endswith(where):
                    Path(path).write_bytes(b"half")
                    raise error
                return write(*((path, content) if where == PROGRESS else (content, path)), *args, **kwargs)

            return writes

        module, name = {"optimizer.pt": (torch, "save"), AVERAGED: (trainer, "save_file")}.get(
            where, (trainer, "write_json")
        )
        patch.setattr(module, name, full(getattr(module, name)))
        with pytest.raises(
            OSError,
            match="could not be written to: (No space|.*unexpected pos|basic_ios).*checkpoint-3 is the last checkpoint",
        ):
            run(checkpoints / "ddpm", digits, tmp_path, **SIX)
    assert [f.name for f in tmp_path.glob("*checkpoint*")] == ["checkpoint-3"]
    run(checkpoints / "ddpm", digits, tmp_path, **SIX, **LATEST)
    assert_same(finetuned[0], tmp_path)


def test_nothing_is_saved_that_is_not_finite(finetuned, checkpoints, digits, tmp_path, monkeypatch):
    def spoil(model):
        with torch.no_grad():
            model.classifier.bias[0] = float("nan")

    with monkeypatch.context() as patch:
        with_callback(patch, At(6, spoil))
        with pytest.raises(NotFinite, match="are not finite, .* at step 6, .*checkpoint-3 is the last good"):
            run(checkpoints / "ddpm", digits, tmp_path, **SIX)
    assert [f.name for f in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    assert not (tmp_path / "model.safetensors").exists()
    run(checkpoints / "ddpm", digits, tmp_path, **SIX, **LATEST)
    assert_same(finetuned[0], tmp_path)


def test_a_training_that_diverges_gives_no_classifier_where_nothing_is_saved_either(checkpoints, digits):
    with pytest.raises(NotFinite, match="at step 3, .*none of it is saved"):
        finetune(
            str(checkpoints / "ddpm"), Images.open(str(digits)), max_train_samples=64, max_test_samples=20,
            train_batch_size=16, max_train_steps=3, lr_warmup_ratio=0.0, learning_rate=1e30,
        )  # fmt: skip


def test_a_training_that_diverges_saves_nothing(checkpoints, digits, tmp_path):
    with pytest.raises(NotFinite, match="at step 2, at a learning rate of .*; none of it is saved. There is no"):
        run(
            checkpoints / "ddpm", digits, tmp_path, max_train_steps=4, checkpointing_steps=2, lr_warmup_ratio=0.0,
            learning_rate=1e30,
        )  # fmt: skip
    assert not list(tmp_path.rglob("*.safetensors"))


def test_no_largest_norm_of_the_gradient_is_one_that_is_never_reached(checkpoints, digits):
    def weights(norm):
        options = {"max_train_steps": 2, "max_grad_norm": norm, "lr_warmup_ratio": 0.0}
        return run(checkpoints / "flow", digits, None, **options).classifier.state_dict()

    free, high, low = weights(0), weights(1e9), weights(1e-9)
    assert all(torch.equal(free[key], high[key]) for key in free)
    assert not all(torch.equal(free[key], low[key]) for key in free)


# How it trains


def test_batches_that_are_accumulated_have_the_gradient_of_a_large_one(checkpoints, digits, monkeypatch):
    """But for their noise, which is not the same, and so is next to none here."""
    options = {"max_train_steps": 1, "mixup": 0.0, "random_flip": False, "random_crop": 0, "max_grad_norm": 0.0}
    options |= {"sigma": 0.0021, "ema_decay": None, "max_train_samples": 64}
    found = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    with_callback(monkeypatch, Watch())
    for size, count in ((32, 1), (16, 2)):
        result = run(
            checkpoints / "edm", digits, None, **options, train_batch_size=size, gradient_accumulation_steps=count
        )
        assert result.images == 32
    large, accumulated = found
    assert large.keys() == accumulated.keys() and len(large) > 10
    for name in ("classifier.weight", "classifier.bias", "ddae.denoiser.conv_in.weight"):
        assert large[name].norm() > 0 and (large[name] - accumulated[name]).norm() < 0.1 * large[name].norm(), name


def test_every_batch_of_a_step_has_noise_of_its_own(checkpoints, digits, monkeypatch):
    seeds, seed = [], torch.manual_seed
    monkeypatch.setattr(trainer.torch, "manual_seed", lambda number: seeds.append(number) or seed(number))
    options = {"max_train_steps": 2, "train_batch_size": 16, "gradient_accumulation_steps": 2}
    run(checkpoints / "flow", digits, None, **options)
    of_steps = [np.random.SeedSequence([0, step, 0, part]) for step in (0, 1) for part in (0, 1)]
    expected = [int(sequence.generate_state(1, np.uint64)[0]) for sequence in of_steps]
    assert [number for number in seeds if number in expected] == expected and len(set(expected)) == 4


def test_workers_read_the_same_images(finetuned, checkpoints, digits, tmp_path):
    run(checkpoints / "ddpm", digits, tmp_path, **SIX, dataloader_num_workers=2)
    assert_same(finetuned[0], tmp_path)


def test_a_tracker_is_told_of_the_loss(checkpoints, digits, tmp_path):
    pytest.importorskip("tensorboard")
    run(checkpoints / "flow", digits, tmp_path, max_train_steps=2, report_to="tensorboard", logging_dir="curves")
    assert list((tmp_path / "curves").glob("events.*"))
    with pytest.raises(ValueError, match="report_to is nothing, which cannot be used"):
        run(checkpoints / "flow", digits, tmp_path / "other", max_train_steps=2, report_to="nothing")


def test_the_network_is_compiled_if_asked_for(checkpoints, digits, tmp_path, monkeypatch):
    """By Trainer, here with the backend that compiles nothing."""
    compiled = []
    compile_ = torch.compile

    def eager(model, **given):
        compiled.append(model)
        return compile_(model, backend="eager")

    monkeypatch.setattr(torch, "compile", eager)
    plain = run(checkpoints / "flow", digits, tmp_path / "plain", max_train_steps=2)
    result = run(checkpoints / "flow", digits, tmp_path / "compiled", max_train_steps=2, torch_compile=True)
    assert compiled and result.test_loss == pytest.approx(plain.test_loss, rel=1e-3)
    assert accuracies(tmp_path / "compiled", digits, 70)[0] == pytest.approx(result.test_accuracy)


def test_averaged_weights_follow_the_rule(checkpoints, digits, tmp_path, monkeypatch):
    """The decay at step n, from 1, is min(decay, n / (9 + n)); the first step takes the weights as they are."""
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append(model.classifier.weight.detach().double().clone())

    with_callback(monkeypatch, Watch())
    run(checkpoints / "flow", digits, tmp_path, max_train_steps=4, ema_decay=0.15)
    average = seen[0]
    for n, weight in enumerate(seen[1:], start=1):
        decay = min(0.15, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * weight
    saved = load_file(tmp_path / "model.safetensors")["classifier.weight"].double()
    torch.testing.assert_close(saved, average, rtol=1e-6, atol=1e-7)
    assert not torch.equal(saved, seen[-1])


def test_a_run_from_scratch_starts_from_the_same_network_without_its_weights(checkpoints, digits, tmp_path):
    start = load_file(checkpoints / "ddpm" / "unet" / "diffusion_pytorch_model.safetensors")
    weights = {}
    for name in ("pretrained", "scratch"):
        # One step at a learning rate of 0, with which the warm-up begins.
        run(checkpoints / "ddpm", digits, tmp_path / name, max_train_steps=1, from_scratch=name == "scratch")
        weights[name] = load_file(tmp_path / name / "model.safetensors")
    assert weights["pretrained"].keys() == weights["scratch"].keys()
    for key in ("conv_in.weight", "mid_block.resnets.0.conv1.weight"):
        assert torch.equal(weights["pretrained"]["ddae.denoiser." + key], start[key])
        assert not torch.equal(weights["scratch"]["ddae.denoiser." + key], start[key])
    config = json.loads((tmp_path / "scratch" / "config.json").read_text())
    assert config["layer"] == DDAEForImageClassification.from_pretrained(tmp_path / "pretrained").config.layer
    assert config.get("generator_fingerprint") is None


def test_learning_rates_fall_from_the_classifier_to_the_input(checkpoints):
    """Taps up to this one: down 0, down 1 (with attention), mid, up 0 (attention 0, 1)."""
    model = make_model("ddpm", checkpoints, layer="up_blocks.0.attentions.1")
    groups = parameter_groups(model, 0.1, 0.5, 0.03)
    names = {p: name for name, p in model.named_parameters()}
    found = {names[p]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    expected = {  # layers between a parameter and the logits
        "classifier": 0,
        "ddae.denoiser.up_blocks.0.attentions.1.": 1,
        "ddae.denoiser.up_blocks.0.resnets.1.": 1,
        "ddae.denoiser.up_blocks.0.attentions.0.": 2,
        "ddae.denoiser.up_blocks.0.resnets.0.": 2,
        "ddae.denoiser.mid_block.": 3,
        "ddae.denoiser.down_blocks.1.": 4,
        "ddae.denoiser.down_blocks.0.downsamplers.": 4,
        "ddae.denoiser.down_blocks.0.resnets.": 5,
        "ddae.denoiser.conv_in.": 6,
        "ddae.denoiser.time_embedding.": 6,
    }
    counted = 0
    for prefix, distance in expected.items():
        of_prefix = [name for name in found if name.startswith(prefix)]
        counted += len(of_prefix)
        assert of_prefix and all(math.isclose(found[name][0], 0.1 * 0.5**distance) for name in of_prefix), prefix
    assert counted == len(found)
    assert found["classifier.weight"][1] == 0.03 and found["classifier.bias"][1] == 0
    assert found["ddae.denoiser.mid_block.resnets.0.norm1.weight"][1] == 0


@pytest.mark.parametrize(("name", "layer"), [("ddpm", "up_blocks.0.attentions.0"), ("flow", "transformer_blocks.2")])
def test_what_learns_is_what_gets_a_gradient(checkpoints, name, layer):
    model = make_model(name, checkpoints, layer=layer)
    groups = parameter_groups(model, 1.0, 0.9, 0.0)
    model.train()(torch.rand(4, 1, 8, 8), labels=torch.arange(4)).loss.backward()
    learning = [p for g in groups for p in g["params"]]
    assert all(p.grad is not None for p in learning) and len(set(learning)) == len(learning)
    others = set(model.parameters()) - set(learning)
    assert others and not any(p.requires_grad for p in others)
    if name == "flow":
        rates = {p: g["lr"] for g in groups for p in g["params"]}
        for k in range(3):
            block = model.ddae.denoiser.transformer_blocks[k]
            of_block = [rates[p] for p in block.parameters() if p in rates]
            assert of_block and of_block == pytest.approx([0.9 ** (3 - k)] * len(of_block))
        assert rates[model.ddae.denoiser.pos_embed.proj.weight] == pytest.approx(0.9**4)


@pytest.fixture
def tuner(checkpoints, tmp_path):
    options = finetuning.FinetuningOptions(output_dir=tmp_path, train_batch_size=8, label_smoothing=0.1, mixup=0.5)
    arguments = finetuning.training_arguments(options, keeps=False)
    return trainer.FineTuner(options, arguments, make_model("ddpm", checkpoints), Dataset.from_dict({"labels": [0, 1]}))


def test_images_and_targets_are_mixed_and_smoothed_alike(tuner):
    """An image of one value tells its class, so the mixed image tells the share of each class."""
    labels = torch.arange(8)
    values = 10.0 ** -labels.float()  # every pair and share gives another value
    images = values[:, None, None, None].expand(8, 1, 8, 8)
    inputs = {"pixel_values": images, "labels": labels, "shares": torch.linspace(0, 1, 8)}
    inputs |= {"partner_pixel_values": images.roll(3, 0), "partner_labels": labels.roll(3)}
    changed = tuner.change(inputs, tuner.draws(8))
    images, targets = changed["pixel_values"], changed["labels"]
    assert targets.shape == (8, 10)
    torch.testing.assert_close(targets.sum(1), torch.ones(8))
    hard = (targets - 0.1 / 10) / 0.9
    torch.testing.assert_close(images.mean((1, 2, 3)), hard[:, :8] @ values, rtol=1e-4, atol=1e-6)
    assert ((hard > 1e-4).sum(1) <= 2).all() and (hard.max(1).values < 0.999).any()


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_partners_and_shares_of_mixup_are_of_the_papers_distribution(alpha):
    rows = trainer.LabelledRows(range(20_000))
    found = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0)):
        rows.mix(alpha, seed, epoch)
        assert sorted(rows.partners) == list(range(20_000)) and (rows.partners == range(20_000)).mean() < 0.001
        assert rows.shares.mean() == pytest.approx(0.5, abs=0.02)
        assert rows.shares.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.04)
        assert abs(np.corrcoef(rows.shares, rows.partners)[0, 1]) < 0.03
        found.append((rows.partners, rows.shares))
    for again, (partners, shares) in enumerate(found[1:]):
        assert (partners == found[0][0]).mean() == (1 if again == 2 else pytest.approx(0, abs=0.01))
        assert abs(np.corrcoef(shares, found[0][1])[0, 1]) == pytest.approx(1 if again == 2 else 0, abs=0.03)


@pytest.mark.parametrize("views", [None, 2])
def test_a_mixed_batch_has_each_images_own_partner_and_share_whatever_the_batch(views):
    class Numbers:
        labels = np.arange(100) % 7

        def __len__(self):
            return 100

        def read(self, rows, view, device):
            return torch.as_tensor(rows + 1000.0 * view).expand(1, 1, 1, -1).permute(3, 0, 1, 2)

    rows = trainer.LabelledRows(Numbers(), np.arange(0, 100, 2), views)
    rows.mix(0.5, 3, 4)
    whole, part = rows.__getitems__(list(range(50))), rows.__getitems__([7, 30])
    for name in ("pixel_values", "labels", "partner_pixel_values", "partner_labels", "shares"):
        assert torch.equal(whole[name][[7, 30]], part[name])
    partners = whole["partner_pixel_values"].flatten(1)[:, 0].long()
    assert partners.tolist() == (2 * rows.partners).tolist()
    assert torch.equal(whole["partner_labels"], partners % 7)
    assert "shares" not in trainer.LabelledRows(Numbers()).__getitems__([0])


def test_smoothing_alone_is_torchs(tuner, monkeypatch):
    monkeypatch.setattr(tuner.options, "mixup", 0.0)
    labels, logits = torch.tensor([3, 1, 9]), torch.randn(3, 10)
    inputs = {"pixel_values": torch.zeros(3, 1, 8, 8), "labels": labels}
    targets = tuner.change(inputs, tuner.draws(3))["labels"]
    expected = F.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(-(targets * logits.log_softmax(-1)).sum(-1).mean(), expected)


def test_few_labels_are_those_that_a_probe_draws(checkpoints, digits):
    labels = np.array(Images.open(digits)["train"].take(100).labels)
    config = DDAEConfig.from_pretrained(checkpoints / "ddpm")
    rows = finetuning.check_finetuning(finetuning.FinetuningOptions(few_labels=3, seed=2), config, labels)
    assert np.array_equal(rows, np.sort(draw_labels(labels, 3, 2))) and np.bincount(labels[rows]).tolist() == [3] * 10
    assert len(finetuning.check_finetuning(finetuning.FinetuningOptions(), config, labels)) == 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"few_labels": 0}, "few_labels is 0: it must be at least 1"),
        ({"few_labels": 1000}, "1000 labels a class are asked for: allowed are 1 to"),
        ({"layer_decay": 0}, "layer_decay is 0.0"),
        ({"label_smoothing": 1}, "it must be at least 0 and below 1"),
        ({"ema_decay": 1}, "ema_decay is 1.0"),
        ({"ema_decay": 1.5}, "ema_decay is 1.5"),
        ({"mixup": -1}, "mixup is -1.0: it must be at least 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"lr_warmup_ratio": -0.1}, "lr_warmup_ratio is -0.1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0: it must be at least 1"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers is -1: it must be at least 0"),
        ({"seed": -1}, "seed is -1"),
        ({"learning_rat": 1.0}, "here is no option 'learning_rat': the nearest are learning_rate"),
        ({"max_train_steps": 0}, "it must be at least 1"),
        ({"random_crop": 8}, "random_crop is 8: it must be below the sides"),
        ({"layer": "up_blocks.8.resnets.0"}, "There is no layer 'up_blocks.8.resnets.0'"),
        ({"sigma": 1e9}, "outside the schedule"),
        ({"sigma": -1.0}, "sigma is -1.0: it must be at least 0"),
        ({"null_class": 3}, "takes no labels"),
        ({"max_train_samples": 1}, "are all of one class"),
        ({"test_split": "train"}, "test on other images"),
    ],
)
def test_bad_input_is_refused_before_anything_is_trained(checkpoints, digits, tmp_path, options, message):
    with pytest.raises(ValueError) as refusal:
        run(checkpoints / "ddpm", digits, tmp_path / "out", **options)
    assert message in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_is_not_there_and_a_folder_that_is_a_file_are_refused(checkpoints, digits, tmp_path):
    with pytest.raises(OSError, match="is not a folder"):
        run("nowhere/at/all", digits, tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file: give a folder"):
        run("nowhere/at/all", digits, tmp_path / "file")


def test_half_precision_without_a_gpu_is_refused(checkpoints, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        run(checkpoints / "ddpm", digits, tmp_path, mixed_precision="fp16")


def test_what_batch_statistics_cannot_do_is_refused(checkpoints, digits, tmp_path):
    make_model("ddpm", checkpoints, feature_norm="batch_norm").save_pretrained(tmp_path / "start")
    with pytest.raises(ValueError, match="100 images leave a batch of one"):
        run(tmp_path / "start", digits, tmp_path / "out", train_batch_size=33)
    with pytest.raises(ValueError, match="leave out ema_decay"):
        run(tmp_path / "start", digits, tmp_path / "out")


# Several taps, and heads


TAPS = ["mid_block@0.1", "up_blocks.0.attentions.0@0.4", "mid_block@0.4"]
PLAIN = {"layer_decay": 1.0, "ema_decay": None, "max_train_steps": 2}


@pytest.mark.parametrize("head", ["linear", "attention", "fusion"])
def test_several_taps_are_trained_and_open_again(checkpoints, digits, tmp_path, head):
    options = {"head": head, "head_width": None if head == "linear" else 32}
    result = run(checkpoints / "ddpm", digits, tmp_path, taps=TAPS, max_train_steps=2, **options)
    model = DDAEForImageClassification.from_pretrained(tmp_path)
    assert model.config.taps == [["mid_block", 0.1], ["up_blocks.0.attentions.0", 0.4], ["mid_block", 0.4]]
    assert (model.config.head, model.config.head_width) == (head, options["head_width"])
    assert (result.layer, result.sigma, result.taps) == ("up_blocks.0.attentions.0", 0.4, TAPS)
    assert result.head == (None if head == "linear" else head)
    assert accuracies(tmp_path, digits, 70) == pytest.approx([result.test_accuracy, result.test_own_noise_accuracy])
    for words in ("`mid_block`, sigma 0.1; `up_blocks.0.attentions.0`, sigma 0.4; `mid_block`, sigma 0.4",):
        assert words in result.table()
    assert ("with the head" in result.table()) == (head != "linear")
    assert finetuning.FinetuningResult.read(tmp_path).taps == TAPS
    assert yaml.safe_load((tmp_path / OPTIONS).read_text())["taps"] == TAPS


@pytest.mark.parametrize("head", ["linear", "attention", "fusion"])
def test_a_head_alone_is_trained_on_the_network_as_it_is(checkpoints, digits, tmp_path, head):
    options = {**PLAIN, "taps": [("mid_block", 0.1), ("up_blocks.0.attentions.0", 0.4)], "freeze_denoiser": True}
    result = run(checkpoints / "ddpm", digits, tmp_path, head=head, lr_warmup_ratio=0.0, **options)
    before = DDAEModel.from_pretrained(checkpoints / "ddpm").state_dict()
    after = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(value, after[f"ddae.{name}"]) for name, value in before.items())
    own = {name: value for name, value in after.items() if not name.startswith("ddae.")}
    assert result.num_trained_parameters == sum(value.numel() for value in own.values())
    start = make_model("ddpm", checkpoints, taps=options["taps"], head=head)
    assert own.keys() == {name for name in start.state_dict() if not name.startswith("ddae.")}
    assert "A classifier on the frozen network, with its pretrained weights, was trained" in result.table()
    assert DDAEPipeline.from_pretrained(tmp_path)._fine_tuned_from is None


def test_a_frozen_run_of_several_taps_resumes_exactly(checkpoints, digits, tmp_path):
    options = {**SIX, "layer_decay": 1.0, "freeze_denoiser": True, "taps": TAPS, "head": "fusion", "head_width": 32}
    whole = run(checkpoints / "ddpm", digits, tmp_path / "whole", **options)
    folder = tmp_path / "half"
    folder.mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", folder / "checkpoint-3")
    shutil.copy(tmp_path / "whole" / OPTIONS, folder / OPTIONS)
    same = {**options, "taps": [("mid_block", 0.10), ("up_blocks.0.attentions.0", 0.4), "mid_block@4e-1"]}
    again = run(checkpoints / "ddpm", digits, folder, **same, **LATEST)
    assert_same(tmp_path / "whole", folder)
    assert again.test_loss == whole.test_loss
    for change in ({"taps": TAPS[:2]}, {"head": "attention"}, {"head_width": 64}, {"freeze_denoiser": False}):
        with pytest.raises(ValueError, match=f"was trained with other options: {next(iter(change))} was"):
            run(checkpoints / "ddpm", digits, folder, **{**options, **change}, **LATEST)


def test_a_saved_head_is_trained_on_and_another_one_begins_anew(checkpoints, digits, tmp_path):
    """Where the last layer of both has the same shape too; and the batch norm of a linear head is left behind."""
    names = [str(number) for number in range(10)]
    stored = make_model("ddpm", checkpoints, taps=[("mid_block", 0.1), ("mid_block", 0.4)], feature_norm="batch_norm")
    stored.save_pretrained(tmp_path / "linear")
    made = finetuning.FinetuningOptions(head="attention", head_width=128)
    built = finetuning.build_classifier(str(tmp_path / "linear"), made, names)
    assert built.config.taps == [["mid_block", 0.1], ["mid_block", 0.4]] and built.config.feature_norm == "none"
    assert not torch.equal(built.classifier.weight, stored.classifier.weight)
    built.save_pretrained(tmp_path / "attention")
    further = finetuning.build_classifier(str(tmp_path / "attention"), finetuning.FinetuningOptions(), names)
    assert all(torch.equal(value, built.state_dict()[name]) for name, value in further.state_dict().items())
    few = finetuning.build_classifier(str(tmp_path / "attention"), finetuning.FinetuningOptions(few_labels=2), names)
    changed = {name for name, value in few.state_dict().items() if not torch.equal(value, built.state_dict()[name])}
    assert {"classifier.weight", "head.query", "head.attention.to_q.weight"} <= changed
    assert not any(name.startswith("ddae.") for name in changed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"taps": []}, "taps is empty"),
        ({"taps": "mid_block@0.1"}, "must be a list"),
        ({"taps": ["mid_block"]}, "give words"),
        ({"taps": ["mid_block@0.1", "mid_block@0.1"]}, "more than once"),
        ({"taps": ["mid_blok@0.1"]}, "There is no layer 'mid_blok'"),
        ({"taps": ["mid_block@0.1", "mid_block@1000"]}, "outside the schedule"),
        ({"taps": TAPS, "layer": "mid_block"}, "which are of a single tap"),
        ({"taps": TAPS, "sigma": 0.1}, "which are of a single tap"),
        ({"head": "mlp"}, "allowed are linear, attention, fusion"),
        ({"head": "fusion", "pooling": "max"}, "pooling is of the head linear"),
        ({"head": "linear", "head_width": 64}, "head_width is of the heads"),
        ({"head": "fusion", "head_width": 12}, "a multiple of 8"),
        ({"head_width": 64}, "the head 'linear' has no width"),
        ({"freeze_denoiser": True, "lora_rank": 2, "layer_decay": 1.0}, "leave one out"),
        ({"freeze_denoiser": True}, "layer_decay is of the network's layers"),
    ],
)
def test_taps_and_heads_that_cannot_work_are_refused_before_any_training(
    checkpoints, digits, tmp_path, monkeypatch, options, message
):
    monkeypatch.setattr(finetuning, "train_further", None)
    with pytest.raises(ValueError, match=message):
        run(checkpoints / "ddpm", digits, tmp_path / "out", **options)


def test_every_number_has_a_range():
    hints = finetuning.FinetuningOptions.__annotations__
    numbers = {name for name, hint in hints.items() if "int" in str(hint) or "float" in str(hint)}
    assert numbers <= set(RANGES) and len(numbers) > 15


def test_the_command_is_a_caller(checkpoints, digits, tmp_path, capsys):
    config = "cifar10_cpu_finetune"
    options = ["--model_name_or_path", checkpoints / "ddpm", "--dataset_name", digits, "--output_dir", tmp_path]
    options += ["--max_train_samples", 40, "--max_test_samples", 20, "--max_train_steps", 1, "--random_crop", 1]
    commands.run("finetune", "--config", config, *options, "--layer", "mid_block", "--no-random_flip")
    kept = yaml.safe_load((tmp_path / OPTIONS).read_text())
    assert kept["layer_decay"] == 0.9 and kept["random_flip"] is False and kept["dataset_name"] == str(digits)
    assert "The classifier is in" in capsys.readouterr().out and (tmp_path / "README.md").is_file()
    with pytest.raises(SystemExit, match="holds checkpoints of an earlier run"):
        commands.run("finetune", "--config", config, *options)


def test_the_command_takes_taps_as_words_and_its_card_names_them(checkpoints, digits, tmp_path):
    options = ["--model_name_or_path", checkpoints / "ddpm", "--dataset_name", digits, "--output_dir", tmp_path]
    options += ["--max_train_samples", 40, "--max_test_samples", 20, "--max_train_steps", 1]
    commands.run("finetune", *options, "--freeze_denoiser", "--head", "attention", "--taps", *TAPS)
    assert DDAEForImageClassification.from_pretrained(tmp_path).config.head == "attention"
    card = " ".join((tmp_path / "README.md").read_text().split())
    places = ("`mid_block`", 0.1), ("`up_blocks.0.attentions.0`", 0.4), ("`mid_block`", 0.4)
    assert ", ".join(f"{layer} at the noise level sigma {sigma}" for layer, sigma in places) in card
    assert "with the head attention" in card


def test_an_earlier_run_on_a_part_of_the_labels_is_refused_by_name(finetuned, checkpoints, digits, tmp_path):
    folder, _ = finetuned
    shutil.copytree(folder, tmp_path / "run")
    noted = yaml.safe_load((folder / OPTIONS).read_text())
    noted["batch_size"] = noted.pop("train_batch_size")
    for part, message in ((0.1, "a label_fraction of 0.1, which is no longer an option"), (1.0, None)):
        (tmp_path / "run" / OPTIONS).write_text(yaml.safe_dump({**noted, "label_fraction": part}))
        if message is None:  # all labels, and the old name of the batch's size
            assert run(checkpoints / "ddpm", digits, tmp_path / "run", **SIX, **LATEST).steps == 6
            continue
        with pytest.raises(ValueError, match=message):
            run(checkpoints / "ddpm", digits, tmp_path / "run", **SIX, **LATEST)


def test_few_labels_begin_with_a_new_head(finetuned, checkpoints, digits):
    """That of a classifier may have been fitted on more labels; the network and the pooling are the classifier's."""
    folder = finetuned[0]
    names = [str(number) for number in range(10)]
    fitted = finetuning.build_classifier(str(folder), finetuning.FinetuningOptions(), names)
    saved = DDAEForImageClassification.from_pretrained(folder)
    assert torch.equal(fitted.classifier.weight, saved.classifier.weight)
    few = finetuning.build_classifier(str(folder), finetuning.FinetuningOptions(few_labels=2), names)
    assert not torch.equal(few.classifier.weight, saved.classifier.weight)
    assert torch.equal(few.ddae.denoiser.conv_in.weight, saved.ddae.denoiser.conv_in.weight)
    again = finetuning.build_classifier(str(folder), finetuning.FinetuningOptions(few_labels=2), names)
    assert torch.equal(few.classifier.weight, again.classifier.weight)
    quarters = finetuning.FinetuningOptions(few_labels=2, pooling="mean_2x2")
    wide = finetuning.build_classifier(str(checkpoints / "ddpm"), quarters, names)
    assert wide.classifier.in_features == 4 * saved.classifier.in_features
