"""The benchmarks of features and sweeps, at tiny size, on real digits."""

import json
import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler

from benchmarks import feature_speed, measure, sweep_speed
from ddae_hf import DDAEPipeline

from .conftest import make_unet

GREY = {"in_channels": 1, "out_channels": 1, "block_out_channels": (32, 32)}


@pytest.fixture
def small_limits(monkeypatch):
    monkeypatch.setitem(measure.MATRIX_SIDE, "cpu", 64)
    monkeypatch.setitem(measure.CONVOLUTION, "cpu", (1, 16, 8))
    monkeypatch.setattr(measure, "COPIED", 2**20)
    return measure


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    DDAEPipeline.for_denoiser(make_unet(**GREY), DDIMScheduler()).save_pretrained(folder)
    return str(folder)


def data(checkpoint, digits, option):
    return [option, checkpoint, "--dataset_name", str(digits), "--max_train_samples", "80", "--max_test_samples", "100"]


def test_interval_is_students(small_limits):
    found = small_limits.interval([1, 2, 3])
    assert found["mean"] == 2
    assert found["half_width"] == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert small_limits.interval([1]) == {"mean": 1, "half_width": None}


def test_features(checkpoint, digits, small_limits, tmp_path, capsys):
    """Ours computes less, and in float32 the same."""
    output = tmp_path / "features.json"
    options = ["--checkpoint", checkpoint, "--batch_sizes", "2", "4", "--repeats", "1", "--output", str(output)]
    feature_speed.main([*options, *data(checkpoint, digits, "--probe_checkpoint")])
    report = json.loads(output.read_text())
    (network,) = report["networks"].values()
    ways = network["ways"]
    assert ways["float32"]["largest_difference"] < 1e-5 < ways["bfloat16"]["largest_difference"]
    assert ways["bfloat16"]["difference_in_norm"] < 0.02
    assert ways["float32"]["gflop_per_image"] < 0.6 * ways["plain"]["gflop_per_image"]
    for way in ways.values():
        tried = {int(size): seconds for size, seconds in way["seconds_by_batch_size"].items()}
        assert way["batch_size"] == min(tried, key=tried.get)
        assert way["images_per_second"]["median"] == pytest.approx(4 / way["seconds"][0])
    shown = capsys.readouterr().out
    assert f"{report['probe']['gain']['mean']:+.2f}" in shown and "| bfloat16 |" in shown


def test_features_refuses_what_the_plain_way_cannot_do(digits, tmp_path):
    DDAEPipeline.for_denoiser(make_unet(**GREY), EDMEulerScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="whole timesteps"):
        feature_speed.PlainFeatures(str(tmp_path), ["mid_block"], "cpu")
    with pytest.raises(SystemExit):
        feature_speed.parse_arguments(["--batch_sizes", "3", "4"])


def test_changed_images():
    """A crop moves the whole image by at most the padding; without changes pixels are the processor's."""
    pixels = np.zeros((1, 8, 8), np.uint8)
    pixels[0, 4, 4] = 255
    torch.manual_seed(0)
    places = set()
    for _ in range(300):
        image, label = sweep_speed.ChangedImages(pixels, np.array([3]), True)[0]
        assert image.shape == (1, 8, 8) and label == 3
        places |= {tuple(place) for place in (image[0] == 1).nonzero().tolist()}
    rows, columns = ({place[i] for place in places} for i in (0, 1))
    assert rows == set(range(8)) and columns == set(range(8))
    plain, _ = sweep_speed.ChangedImages(pixels, np.array([3]), False)[0]
    assert torch.equal(plain[0], torch.from_numpy(pixels[0]) / 127.5 - 1)


@pytest.mark.slow
def test_sweep(checkpoint, digits, small_limits, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep_speed, "PADDING", 0)  # half of an 8x8 image would be cut off
    options = data(checkpoint, digits, "--model_name_or_path") + ["--sigmas", "0.1", "1", "--plain_sigmas", "0.1"]
    options += ["--num_train_epochs", "20", "--train_batch_size", "32", "--learning_rate", "0.05", "--batch_norm"]
    options += ["--seeds", "0", "--plain_steps", "2", "--workers", "0", "--output_dir", str(tmp_path)]
    sweep_speed.main(options)
    results = json.loads((tmp_path / "results.json").read_text())
    seed = json.loads((tmp_path / "seed-0.json").read_text())
    summary, (row,) = results["summary"], results["summary"]["seeds"]
    # 64 images fitted and 80 in the last fit, in batches of 32.
    assert (summary["steps_per_level"], summary["steps_of_the_last_fit"]) == (20 * 2, 20 * 3)
    assert row["plain_in_all"] == pytest.approx(seed["step_seconds"] * (2 * 40 + 60))
    assert row["ratio_in_all"] == pytest.approx(row["plain_in_all"] / seed["ours"]["seconds"])
    assert {pair["sigma"] for pair in seed["plain"]["pairs"]} == {0.1}
    assert len(seed["ours"]["pairs"]) == 2 * len(seed["plain"]["pairs"])
    plain, ours = (seed[way]["test_accuracy"] for way in ("plain", "ours"))
    assert plain > 0.25  # of ten classes
    assert row["gain"]["mean"] == pytest.approx(100 * (ours - plain))

    capsys.readouterr()
    sweep_speed.main(options)  # nothing is run again
    assert f"{row['gain']['mean']:+.2f}" in capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text())["summary"] == summary
    with pytest.raises(SystemExit, match="other options"):
        sweep_speed.main([*options, "--l2", "1"])
    with pytest.raises(SystemExit):
        sweep_speed.parse_arguments([*options, "--protocol", "paper"])
