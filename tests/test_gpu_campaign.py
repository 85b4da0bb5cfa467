"""The campaign on a GPU, as far as a processor can go through it: deadlines, what goes on, and parts at tiny size."""

import json
import time

import pytest
import torch
from diffusers import DDPMScheduler

from benchmarks import gpu_campaign, gpu_parts, gpu_stage, gpu_training
from ddae_hf import DDAEPipeline

from .conftest import make_unet

TINY = ["--device", "cpu", "--tiny"]
TESTS = [f"tests/test_gpu.py::test_{name}" for name in ("one", "two[edm]", "three", "four")]


def campaign(folder, *options, seconds=100.0):
    args = gpu_campaign.parse_arguments(["--output_dir", str(folder), "--device", "cpu", *map(str, options)])
    return gpu_stage.Campaign(args, time.monotonic() + seconds)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    DDAEPipeline.for_denoiser(make_unet(in_channels=1, out_channels=1), DDPMScheduler()).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stage", "smoke"], "torch finds no GPU: run this where there is one, or try it out with --device cpu"),
        (["--stage", "speed", *TINY], "--stage speed needs --dataset_name"),
        (["--stage", "train", *TINY, "--dataset_name", "x", "--minutes", "0"], "--minutes is 0: it must be positive"),
        (["--stage", "everything"], "invalid choice"),
    ],
)
def test_what_cannot_work_is_refused(options, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu_campaign.main(options)
    assert message in capsys.readouterr().err


def test_a_part_is_not_begun_that_would_not_end_in_time(tmp_path):
    stage = campaign(tmp_path, "--stage", "smoke", seconds=50)
    assert not stage.run("long", ["timeit", "-n", "1", "pass"], needed=30, reserve=25)
    assert stage.left_out == ["long (25 s left, 30 s needed)"]
    assert stage.run("short", ["timeit", "-n", "1", "pass"], needed=20, reserve=25)
    assert "best of" in (tmp_path / "logs" / "short.log").read_text()


def test_a_part_is_interrupted_when_its_time_is_over(tmp_path, capsys):
    stage = campaign(tmp_path, "--stage", "smoke", seconds=2)
    started = time.monotonic()
    assert not stage.run("endless", ["timeit", "-n", "1", "import time; time.sleep(100)"], needed=0)
    assert time.monotonic() - started < 2 + gpu_stage.GRACE
    assert "interrupted, as its time was over" in capsys.readouterr().out
    assert stage.left_out[0].startswith("endless (interrupted after")


def test_the_end_of_a_failure_is_shown(tmp_path, capsys):
    stage = campaign(tmp_path, "--stage", "smoke")
    assert not stage.run("broken", ["timeit", "-n", "1", "raise OSError('no such card')"], needed=0)
    assert "broken: ended with 1" in (shown := capsys.readouterr().out) and "OSError: no such card" in shown
    assert stage.left_out == []  # it was not left out: it was tried


def test_tests_that_have_not_passed_run_first_and_what_did_not_run_is_named(tmp_path, monkeypatch):
    outcomes = [
        f"{TESTS[0]} PASSED [25%]\n{TESTS[1]} FAILED [50%]\n{TESTS[2]} PASSED [75%]\nFAILED {TESTS[1]} - it is slow\n",
        f"{TESTS[3]} PASSED [25%]\n{TESTS[1]} PASSED [50%]\n{TESTS[0]} FAILED [75%]\n",
    ]
    ran = []

    def run(stage, name, words, needed):
        log = stage.folder / "logs" / f"{name}.log"
        log.parent.mkdir(exist_ok=True)
        log.write_text("\n".join(TESTS) + "\n\n4 tests collected\n" if name == "collect" else outcomes[len(ran)])
        ran.extend([[word for word in words if word in TESTS]] if name == "tests" else [])

    monkeypatch.setattr(gpu_stage.Campaign, "run", run)
    stage = campaign(tmp_path, "--stage", "smoke")
    table = gpu_campaign.smoke(stage)
    report = json.loads((tmp_path / "smoke.json").read_text())
    assert report["passed"] == sorted([TESTS[0], TESTS[2]]) and report["failed"] == {TESTS[1]: "it is slow"}
    assert stage.left_out == [TESTS[3]] and f"{TESTS[1]}\n    it is slow" in table
    stage = campaign(tmp_path, "--stage", "smoke")
    gpu_campaign.smoke(stage)
    assert ran[1] == [TESTS[1], TESTS[3], TESTS[0], TESTS[2]]
    report = json.loads((tmp_path / "smoke.json").read_text())
    assert report["passed"] == sorted(TESTS[1:]) and list(report["failed"]) == [TESTS[0]]


def test_speed_goes_on_with_what_has_no_figures_yet(tmp_path, monkeypatch):
    rate = {"median": 1234.5, "least": 1.0, "most": 2e3}
    ran = []

    def run(stage, name, words, needed):
        ran.append(name)
        if name == "training":
            report = {"ways": {"plain": {"images_per_second": rate, "ratio": 1.0, "share_of_matrix_rate": 0.25}}}
            output = words[words.index("--output") + 1]
            output.parent.mkdir(exist_ok=True)
            output.write_text(json.dumps(report))

    monkeypatch.setattr(gpu_stage.Campaign, "run", run)
    for _ in range(2):
        table = gpu_campaign.speed(campaign(tmp_path, "--stage", "speed", "--tiny", "--dataset_name", "x"))
    assert "| training | plain | 1,234.5 | 1.00 | 25 % |" in table
    assert ran.count("training") == 1 and ran.count("layouts") == 2
    assert list(json.loads((tmp_path / "speed.json").read_text())["parts"]) == ["training"]


def test_a_training_takes_the_steps_that_fit_and_goes_on_until_it_is_done(tmp_path, monkeypatch):
    commands = []

    def run(stage, name, words, needed, reserve=0.0, compiled=False):
        commands.append(words)
        if "step seconds" in name:
            output = words[words.index("--output") + 1]
            output.parent.mkdir(parents=True)
            output.write_text(json.dumps({"mean": 0.05, "facts": {}}))
        return True

    monkeypatch.setattr(gpu_stage.Campaign, "run", run)
    stage = campaign(tmp_path, "--stage", "train", "--dataset_name", "x", "--train_minutes", 25)
    first = gpu_training.open_training(stage)
    assert json.loads((first / "plan.json").read_text())["steps"] == 25 * 60 / 0.05
    gpu_training.go_on(stage, first)
    words = commands[-1]
    assert words[words.index("--max_train_steps") + 1] == 30000
    assert words[words.index("--lr_warmup_steps") + 1] == 600
    assert words[words.index("--ema_decay") + 1] == pytest.approx(1 - 1 / 600)
    assert gpu_training.open_training(stage) == first  # it is not finished
    (first / "train_results.json").write_text("{}")
    assert gpu_training.open_training(stage) != first
    seconds = 300 + gpu_training.reserved(stage) + gpu_training.AROUND
    stage = campaign(tmp_path / "other", "--stage", "train", "--dataset_name", "x", seconds=seconds)
    steps = json.loads((gpu_training.open_training(stage) / "plan.json").read_text())["steps"]
    assert steps == pytest.approx(300 / 0.05, abs=40)


def part(name, folder, *options):
    gpu_parts.main([name, *TINY, "--output", str(folder / "part.json"), *options])
    return json.loads((folder / "part.json").read_text())


def check_rows(rows):
    assert all(row["images_per_second"]["median"] > 0 and row["ratio"] > 0 for row in rows)
    return {row["what"]: row for row in rows}


def test_what_a_pass_needs_besides_the_network_is_measured(checkpoint, digits, tmp_path):
    found = part("host", tmp_path, "--checkpoint", checkpoint, "--dataset_name", str(digits))
    rows = check_rows(found["rows"])
    assert len(rows) == 7
    (whole,) = (row for what, row in rows.items() if what.startswith("the whole pass in memory"))
    assert whole["ratio"] == 1
    assert rows["one draw of noise"]["images_per_second"]["median"] > whole["images_per_second"]["median"]


def test_layouts_are_measured(tmp_path, small_limits):
    rows = check_rows(part("layouts", tmp_path)["rows"])
    assert {what.split(", ")[3] for what in rows} == {"channels-last", "contiguous"} and len(rows) == 4
    assert all(row["share"] > 0 for row in rows.values())


def test_sampling_is_measured(checkpoint, tmp_path, small_limits):
    rows = part("sampling", tmp_path, "--checkpoint", checkpoint)["rows"]
    assert [row["what"].split(",")[0] for row in rows] == ["plain", "float32", "bfloat16"]
    assert check_rows(rows)["plain, batches of 4"]["ratio"] == 1


@pytest.mark.slow
def test_steps_on_small_and_on_whole_images_are_timed(digits, tmp_path):
    options = ["--config", "digits", "--dataset_name", str(digits), "--low_resolution", "4"]
    options += ["--low_resolution_share", "0.25", "--total_batch_size", "16"]
    found = part("steps", tmp_path, *options)
    assert found["mean"] == pytest.approx(0.25 * found["low"] + 0.75 * found["high"])
    assert found["batch"] == 16 and found["low"] > 0 and found["high"] > 0


@pytest.mark.slow
def test_every_stage_on_a_processor(digits, tmp_path, capsys):
    for stage in ("smoke", "speed", "train", "train"):
        options = ["--stage", stage, "--output_dir", str(tmp_path), "--dataset_name", str(digits), *TINY]
        gpu_campaign.main([*options, "--minutes", "20"])
        assert "Left out" not in capsys.readouterr().out
    assert len(json.loads((tmp_path / "smoke.json").read_text())["passed"]) == 4
    assert len(json.loads((tmp_path / "speed.json").read_text())["parts"]) == 6
    trainings = json.loads((tmp_path / "train.json").read_text())["trainings"]
    assert list(trainings) == ["00", "01"]
    for found in trainings.values():
        assert found["steps"] == found["planned_steps"] == 8
        assert set(found["probes"]) == {"quick", "whole"}
    assert (tmp_path / "train" / "00" / "outputs" / "00" / "samples" / "grid.png").is_file()
