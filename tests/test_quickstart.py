"""`ddae quickstart`: what it leaves, and what it does where some of that is there already."""

import contextlib
import importlib
import io
import json
import logging
import re
import shlex
import shutil
from pathlib import Path

import pytest

from ddae_hf import DDAEForImageClassification, DDAEPipeline
from ddae_hf.commands import generate, pretrain, probe, quickstart
from ddae_hf.commands.parsing import parse
from ddae_hf.experiments import Images
from ddae_hf.experiments.digits import Judge, digits, mnist, shuffled_pixels, write_digits

from . import commands

ROOT = Path(__file__).parent.parent
STEPS = ("--max_train_steps", 3)


@pytest.fixture(scope="module", autouse=True)
def fewer():
    """A part of the digits, and fewer samples, which take less time."""
    parts = {
        name: (images[:count], labels[:count])
        for (name, (images, labels)), count in zip(mnist().items(), (600, 200), strict=True)
    }
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(quickstart, "mnist", lambda: parts)
        patched.setattr(quickstart, "NUM_SAMPLES", 20)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What a first run leaves, with `said.txt` of what it said."""
    folder = tmp_path_factory.mktemp("first") / "quickstart"
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        commands.run("quickstart", *STEPS, "--output_dir", folder)
    (folder.parent / "said.txt").write_text(said.getvalue())
    return folder


def files(folder):
    """The files of a folder, with when each was last written."""
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def is_long_work(path):
    """Whether a file is of the work that takes long; pictures of it, cards and reports are written every time."""
    return path.match("digits/*") or path.match("samples/0*.png") or "features" in path.parts or is_training(path)


def is_training(path):
    return path.parts[0] == "checkpoint" and path.name != "README.md"


def pixels(folder):
    return [(folder / "samples" / f"{number:05d}.png").read_bytes() for number in range(quickstart.NUM_SAMPLES)]


def test_it_leaves_all_that_it_names(folder):
    said = (folder.parent / "said.txt").read_text()
    named = {Path(path) for path in re.findall(rf"{re.escape(str(folder))}[\w/.]*", said)}
    named = {path if path.exists() else path.with_name(path.name.rstrip(".")) for path in named}
    assert {path.relative_to(folder).as_posix() for path in named} == {
        "digits", "checkpoint", "samples", "samples/grid.png", "classifier", "samples_beside_real.png",
        "test_image.png", "sweep",
    }  # fmt: skip
    assert {path.name for path in named if not path.exists()} == {"sweep"}  # which comes next
    shown = [line.split()[2] for line in said.splitlines() if line.startswith("$ ddae")]
    assert shown == ["pretrain", "generate", "probe"]
    assert re.search(r"^It prints: \d$", said, re.MULTILINE)
    announced = re.findall(r"^=== (\d) of 4: .* \(about \d+ (?:s|min) on two CPU cores\)$", said, re.MULTILINE)
    assert announced == ["1", "2", "3", "4"]
    assert "| raw pixels |" in said and "| untrained network |" in said


def test_what_to_do_next_is_understood(folder, monkeypatch):
    said = (folder.parent / "said.txt").read_text().partition("What to do next:")[2]
    lines = [shlex.split(line) for line in said.splitlines() if line.startswith("  ddae ")]
    assert [line[1] for line in lines] == ["sweep", "demo", "pretrain"]
    for line in lines:
        parse(importlib.import_module(f"ddae_hf.commands.{line[1]}").KINDS, None, line[2:])


def test_what_it_leaves_opens(folder):
    images = Images.open(folder / "digits")
    assert (len(images["train"]), len(images["test"])) == (600, 200)
    assert DDAEPipeline.from_pretrained(folder / "checkpoint").denoiser.config.sample_size == 28
    classifier = DDAEForImageClassification.from_pretrained(folder / "classifier")
    assert classifier.config.id2label == {number: str(number) for number in range(10)}
    assert json.loads((folder / "checkpoint" / "train_results.json").read_text())["steps"] == 3
    counts = json.loads((folder / "recognised.json").read_text())
    assert counts["real test images"] > counts["test images with their pixels shuffled"]


def test_the_commands_that_it_shows_are_those_that_it_ran(folder):
    lines = [line for line in (folder.parent / "said.txt").read_text().splitlines() if line.startswith("$ ddae")]
    run = ((pretrain, "checkpoint"), (generate, "samples"), (probe, "classifier"))
    for line, (command, place) in zip(lines, run, strict=True):
        options = parse(command.KINDS, command.__doc__, shlex.split(line)[3:])
        assert [each.output_dir for each in options if hasattr(each, "output_dir")] == [str(folder / place)]


def test_another_run_keeps_what_is_there_and_trains_nothing_again(folder, capsys, caplog):
    before = files(folder)
    samples = pixels(folder)
    caplog.set_level(logging.INFO)
    commands.run("quickstart", *STEPS, "--output_dir", folder)
    after = files(folder)
    assert before.keys() <= after.keys()
    assert "is complete, after 3 steps: there is nothing left to do" in caplog.text
    said, shown = capsys.readouterr()
    assert f"{quickstart.NUM_SAMPLES} images are in {folder}/samples, 0 of them made now" in said
    assert "Training:" not in shown and "Batches:" not in shown  # no bar of what there is nothing of
    kept = [path for path in before if is_long_work(path)]
    assert len(kept) > quickstart.NUM_SAMPLES + 20 and [path for path in kept if before[path] != after[path]] == []
    assert pixels(folder) == samples


def test_other_steps_than_those_of_a_finished_training_are_refused_before_anything_is_changed(folder):
    before = files(folder)
    for steps, wanted in ((("--max_train_steps", 5), 5), ((), 700)):
        with pytest.raises(SystemExit) as stopped:
            commands.run("quickstart", *steps, "--output_dir", folder)
        assert stopped.value.code == (
            f"{folder}/checkpoint was trained for 3 steps, but {wanted} are asked for: give max_train_steps 3, which "
            "keeps it, or another output_dir."
        )
    assert files(folder) == before


@pytest.mark.slow
def test_it_goes_on_where_it_was_interrupted(folder, tmp_path, caplog):
    """Here after the training, and in the middle of writing the digits."""
    shutil.copytree(folder / "checkpoint", tmp_path / "checkpoint")
    (tmp_path / "digits").mkdir()
    shutil.copy(folder / "digits" / "train.parquet", tmp_path / "digits")
    before = files(tmp_path)
    caplog.set_level(logging.INFO)
    commands.run("quickstart", *STEPS, "--output_dir", tmp_path)
    assert "there is nothing left to do" in caplog.text
    after = files(tmp_path)
    assert [path for path in before if is_long_work(path) and before[path] != after[path]] == []
    assert pixels(tmp_path) == pixels(folder)
    results = [json.loads((each / "classifier" / "eval_results.json").read_text()) for each in (folder, tmp_path)]
    for figure in ("best", "test_accuracies", "few_label_test_accuracies", "baselines"):
        assert results[0][figure] == results[1][figure]


def test_make_quickstart_is_the_command():
    lines = (ROOT / "Makefile").read_text().splitlines()
    rule = next(number for number, line in enumerate(lines) if line.startswith("quickstart:"))
    assert lines[rule + 1].split() == ["$(BIN)/ddae", "quickstart"] and not lines[rule + 2].startswith("\t")


@pytest.mark.parametrize("room", [digits, mnist])
def test_a_judge_knows_real_digits_from_none(room):
    judge = Judge(room())
    real = room()["test"][0][:100]
    assert judge.accuracy > 95
    assert judge.recognised(real) > 85 and judge.recognised(shuffled_pixels(real)) < 5


def test_a_folder_of_an_earlier_version_is_refused(tmp_path):
    write_digits(tmp_path / "digits", digits())
    before = files(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        commands.run("quickstart", *STEPS, "--output_dir", tmp_path)
    assert "train.parquet holds 1,437 images, and not these 600" in stopped.value.code
    assert files(tmp_path) == before
