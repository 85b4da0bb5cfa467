"""Benchmarks that only make sense as a whole, at a size that takes a minute."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from . import commands

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent


def run(name, *options):
    command = [sys.executable, "-m", f"benchmarks.{name}", *map(str, options)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout


def test_every_lever_is_measured_against_the_first(tmp_path):
    output = tmp_path / "levers.json"
    printed = run("levers", "--width", 64, "--batch_size", 4, "--repeats", 1, "--output", output)
    report = json.loads(output.read_text())
    for job in ("training step", "features", "reading images"):
        rates = list(report["images_per_second"][job].values())
        assert rates[0]["ratio"] == 1 and all(rate["median"] > 0 for rate in rates)
        assert f"| {job} | images/s | ratio |" in printed


def test_a_start_is_measured(tmp_path, digits):
    options = ["--config", "digits", "--dataset_name", digits, "--max_train_steps", 1, "--sample_steps", 0]
    commands.run("pretrain", *options, "--output_dir", tmp_path / "run")
    output = tmp_path / "start.json"
    run("start", "--model_name_or_path", tmp_path / "run", "--repeats", 1, "--output", output)
    whole, added, feature = json.loads(output.read_text())["seconds"].values()
    assert len(whole) == len(added) == len(feature) == 1
    assert 0 < added[0] < whole[0]


def test_two_recipes_are_compared_after_the_same_minutes(tmp_path, digits):
    options = ["--config", "digits", "--dataset_name", digits]
    options += ["--minutes", 0.05, "--seeds", 0, 1, "--learning_rates", 1e-5, 1e-3, "--output_dir", tmp_path]
    printed = run("quality_per_minute", *options, "--sigmas", 0.1, "--max_train_samples", 300)
    report = json.loads((tmp_path / "results.json").read_text())
    tried = report["learning_rates"]
    assert tried[str(report["learning_rate"])] == max(tried.values())
    for runs in report["runs"].values():
        assert [len(run["points"]) for run in runs] == [4, 1]
        minutes = [point["minutes"] for point in runs[0]["points"]]
        assert minutes == sorted(minutes) and minutes[-1] > 0
    ends = {name: [run["points"][-1]["test_accuracy"] for run in runs] for name, runs in report["runs"].items()}
    gains = [100 * (ours - plain) for ours, plain in zip(ends["ours"], ends["plain"], strict=True)]
    assert report["gain"]["by_seed"] == pytest.approx(gains)
    for over in report["gain"]["over"].values():
        assert over["mean"] == pytest.approx(sum(gains) / 2) and over["half_width"] > 0
        assert f"{over['mean']:+.2f} ± {over['half_width']:.2f}" in printed
    assert (tmp_path / "quality_per_minute.png").exists()


def test_what_a_denoiser_of_true_size_costs_is_measured():
    found = json.loads(run("denoisers", "--name", "stable-diffusion-1-5", "--repeats", 1))
    assert found["parameters"] == 859_520_964  # as its repository's weights have
    to_layer, whole = found["gflop"].values()
    assert 0 < to_layer < whole and found["peak_memory_gib"] < 4 and found["images_per_second"] > 0


def test_ways_of_training_are_compared_on_the_same_images(tmp_path, digits):
    """The teacher is the plain network of seed 0; figures are those of the reports; what is done is not done again."""
    options = ["--data", "digits", "--dataset_name", digits, "--networks", "unet", "--sigmas", 0.1, "--num_images", 20]
    options += ["--max_train_steps", 2, "--judge_steps", 2, "--timed_steps", 1, "--seeds", 0, 1]
    options += ["--output_dir", tmp_path]
    printed = run("ablation", *options, "--methods", "min-SNR", "dispersive")
    found = json.loads((tmp_path / "digits" / "results.json").read_text())["unet"]
    assert list(found) == ["plain", "min-SNR", "dispersive"] and all(len(runs) == 2 for runs in found.values())
    folder = tmp_path / "digits" / "unet" / "dispersive" / "1"
    report = json.loads((folder / "probe" / "eval_results.json").read_text())
    assert found["dispersive"][1]["probe"] == pytest.approx(100 * report["test_accuracies"]["0"])
    assert found["min-SNR"][1]["loss"] < found["plain"][1]["loss"]  # for velocities all weights are below 1
    parts = json.loads((folder / "trained" / "train_results.json").read_text())["parts_last_100_batches"]
    assert list(parts) == ["denoising", "dispersive"] and found["dispersive"][1]["loss"] == parts["denoising"]
    means = [sum(each["probe"] for each in runs) / 2 for runs in found.values()]
    assert all(f"{mean:.2f} ±" in printed for mean in means)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("figures.json")}
    assert len(before) == 6 and printed.endswith(run("ablation", *options, "--methods", "min-SNR", "dispersive"))
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("figures.json")}
    (folder / "figures.json").unlink()  # as an interruption after the training leaves it
    assert printed.endswith(run("ablation", *options, "--methods", "min-SNR", "dispersive").splitlines()[-1])
    assert json.loads((tmp_path / "digits" / "results.json").read_text())["unet"] == found
