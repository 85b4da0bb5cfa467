"""The benchmarks of sampling and of pretraining, on tiny networks and real digits."""

import json
from argparse import Namespace
from itertools import islice

import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

from benchmarks import measure, quality_per_minute, sample, training_speed, training_ways
from ddae_hf import DDAEPipeline
from ddae_hf.experiments.evaluation import frechet_distance

from .conftest import make_unet

GREY = {"in_channels": 1, "out_channels": 1, "block_out_channels": (32, 32)}
NETWORK = (
    "{sample_size: 8, in_channels: 1, out_channels: 1, block_out_channels: [32, 32], layers_per_block: 1, "
    "down_block_types: [DownBlock2D, DownBlock2D], up_block_types: [UpBlock2D, UpBlock2D]}"
)
pytestmark = pytest.mark.filterwarnings("ignore:.*their covariance is singular")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    schedulers = {"ddpm": DDIMScheduler(), "edm": EDMEulerScheduler(), "flow": FlowMatchEulerDiscreteScheduler()}
    for name, scheduler in schedulers.items():
        DDAEPipeline(make_unet(**GREY), scheduler).save_pretrained(folder / name)
    return folder


def test_sampling_is_measured(checkpoints, digits, tmp_path, small_limits, capsys):
    options = ["--model_name_or_path", str(checkpoints / "ddpm"), "--edm_model_name_or_path", str(checkpoints / "edm")]
    options += ["--flow_model_name_or_path", str(checkpoints / "flow")]
    options += ["--dataset_name", str(digits), "--max_train_samples", "40", "--num_images", "20", "--calls", "4", "2"]
    options += ["--timestep_spacings", "trailing", "--batch_sizes", "4", "8", "--speed_calls", "2", "--repeats", "2"]
    sample.main([*options, "--device", "cpu", "--output", str(tmp_path / "out" / "sample.json")])
    report = json.loads((tmp_path / "out" / "sample.json").read_text())
    speed, quality = report["speed"], report["quality"]
    assert speed["plain"]["ratio"] == 1
    for row in speed.values():
        assert len(row["seconds"]) == 2 and row["batch_size"] in (4, 8)
        assert row["images_per_second"]["most"] == pytest.approx(row["batch_size"] / min(row["seconds"]))
    # The same noise through the same network: only rounding is between the two.
    ddim = next(row for row in quality if row["sampler"] == "DDIM, trailing" and row["calls"] == 4)
    assert report["precision"]["float32"] == ddim["distance"]
    assert 0 < abs(report["precision"]["ratio"] - 1) < 0.05
    for name in ("EDM, Heun", "Flow, Heun"):
        assert {(row["calls"], row["calls_taken"]) for row in quality if row["sampler"] == name} == {(2, 1), (4, 3)}
    assert all(0 < row["brightness"] < 1 for row in [*quality, report["reference"]])
    table = capsys.readouterr().out
    assert "| sampler | 2 | 4 |" in table and f"{ddim['distance']:.4g}" in table
    assert (tmp_path / "out" / "sample.png").stat().st_size > 0


@pytest.mark.parametrize("framework", ["ddpm", "edm", "flow"])
def test_samplers_call_the_network_as_often_as_is_said(checkpoints, framework):
    pipeline = DDAEPipeline.from_pretrained(checkpoints / framework)
    pipeline.set_progress_bar_config(disable=True)
    fed = []
    pipeline.denoiser.register_forward_pre_hook(lambda network, inputs: fed.append(float(inputs[1][0])))
    args = Namespace(timestep_spacings=["leading", "trailing"])
    starts = {}
    for name, scheduler, sampler in sample.variants(args, pipeline.scheduler, framework):
        pipeline.scheduler, (steps, calls) = scheduler, sample.steps_for(6, scheduler, sampler)
        fed.clear()
        pipeline(1, num_inference_steps=steps, sampler=sampler)
        assert len(fed) == calls in (5, 6), name
        starts[name] = fed[0]
    if framework == "ddpm":
        assert all((start == 999) == ("trailing" in name) for name, start in starts.items())


def test_a_ratio_of_distances_has_the_jackknife_s_error():
    generator = torch.Generator().manual_seed(0)
    reference, base = (torch.randn(40, 3, generator=generator) for _ in range(2))
    other = base + 0.1 * torch.randn(40, 3, generator=generator)
    ratio, half_width = sample.ratio_with_error(reference, base, other)
    assert ratio == pytest.approx(frechet_distance(reference, other) / frechet_distance(reference, base))
    without = []
    for group in range(10):
        kept = [i for i in range(40) if i % 10 != group]
        without.append(frechet_distance(reference, other[kept]) / frechet_distance(reference, base[kept]))
    mean = sum(without) / 10
    error = (0.9 * sum((r - mean) ** 2 for r in without)) ** 0.5
    assert half_width == pytest.approx(2.262157 * error)  # Student's t of nine degrees of freedom
    assert sample.ratio_with_error(reference, base, base) == (1, 0)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--num_images", "19"], "at least 20"),
        (["--calls", "0"], "at least 1"),
        (["--extractor", "nothing:here"], "allowed are ddae:PATH"),
        (["--num_image", "30"], "there is no option 'num_image': the nearest are num_images"),
    ],
)
def test_sampling_refuses_what_cannot_work(option, message, capsys):
    with pytest.raises(SystemExit):
        sample.main(["--model_name_or_path", "x", *option])
    assert message in capsys.readouterr().err


def test_sampling_refuses_checkpoints_of_another_framework(checkpoints):
    args = sample.Arguments(model_name_or_path="x", device="cpu")
    with pytest.raises(ValueError, match="was trained with edm"):
        sample.open_pipeline(args, str(checkpoints / "edm"), "ddpm", torch.float32)


@pytest.mark.slow
def test_pretraining_is_measured(digits, tmp_path, small_limits, capsys):
    config = tmp_path / "network.yaml"
    config.write_text(f"denoiser: {NETWORK}\n")
    options = ["--config", str(config), "--dataset_name", str(digits), "--batch_size", "32", "--workers", "1"]
    options += ["--steps", "4", "--repeats", "2", "--curve_images", "400", "--ways", "bfloat16", "--device", "cpu"]
    options += ["--learning_rate", "2e-3", "--lr_warmup_steps", "1", "--output", str(tmp_path / "pretrain.json")]
    training_speed.main(options)
    report = json.loads((tmp_path / "pretrain.json").read_text())
    plain, ours = (report["ways"][name] for name in ("plain", "bfloat16"))
    for row in (plain, ours):
        assert len(row["losses"]) == 16 and len(row["chunk_seconds"]) == 4  # 400 images are 13 steps, 4 chunks
        # The first chunk, which sets up and warms up, is not counted.
        assert row["images_per_second"]["least"] == pytest.approx(4 * 32 / max(row["chunk_seconds"][1:]))
        # Both start from the same weights, whose answer is far from what both learn.
        assert row["losses"][0] == pytest.approx(plain["losses"][0], rel=0.1)
        assert row["loss_last_half"] < 0.8 * row["losses"][0]
    assert ours["difference"]["mean"] == pytest.approx(ours["loss_last_half"] - plain["loss_last_half"])
    differences = [a - b for a, b in zip(ours["losses"][8:], plain["losses"][8:], strict=True)]
    assert ours["difference"] == measure.interval(differences)
    assert plain["curve"]["images"][-1] == 15.5 * 32
    assert "| ddae pretrain, bfloat16 |" in capsys.readouterr().out
    assert (tmp_path / "pretrain.png").stat().st_size > 0


def test_the_plain_loop_sees_every_image_once_an_epoch_and_mirrors_half(digits):
    options = ["--dataset_name", str(digits), "--train_batch_size", "100", "--max_train_samples", "400"]
    data, args = training_ways.read_options([*options, "--random_flip", "--denoiser", NETWORK])
    config = Namespace(in_channels=1, sample_size=8)
    found = training_ways.training_images(data, args)
    torch.manual_seed(0)
    images = torch.cat(list(islice(training_ways.plain_batches(found, args, config, workers=0), 4)))
    pixels = training_ways.prepare("L", 8, False, {"image": found.pil(range(400))})["pixels"]
    seen = sorted(min(image.flatten().tolist(), image.flip(-1).flatten().tolist()) for image in images)
    assert seen == sorted(min(p.flatten().tolist(), p.flip(-1).flatten().tolist()) for p in pixels)
    unmirrored = {tuple(image.flatten().tolist()) for image in pixels}
    assert 0.4 < sum(tuple(image.flatten().tolist()) in unmirrored for image in images) / 400 < 0.6


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--width", "48"], "multiple of 32"),
        (["--width", "64", "--config", "x.yaml"], "not allowed with"),
        (["--ways", "plain"], "invalid choice"),
        (["--steps", "0"], "at least 1"),
        (["--train_batch_size=64"], "see --batch_size"),
    ],
)
def test_pretraining_refuses_what_cannot_work(option, message, capsys):
    with pytest.raises(SystemExit):
        training_speed.parse_arguments(option)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--augment", "0.1", "--no-random_flip"], "--augment: the plain loop cannot"),
        (["--low_resolution", "16"], "--low_resolution: the plain loop cannot"),
        (["--resume_from_checkpoint", "latest"], "--resume_from_checkpoint: the plain loop cannot"),
        (["--gradient_accumulation_steps", "2"], "a step of every batch"),
        (["--scheduler", "{_class_name: EDMEulerScheduler}"], "not under a EDMEulerScheduler"),
    ],
)
def test_pretraining_refuses_what_the_plain_loop_has_not(option, message, tmp_path):
    args, rest = training_speed.parse_arguments(option)
    with pytest.raises(SystemExit, match=message):
        training_speed.shared_options(args, rest, tmp_path)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--minutes", "0"], "must be positive"),
        (["--seeds", "1", "1"], "must be different"),
        (["--sigma_s", "0.1"], "there is no option 'sigma_s': the nearest is sigmas"),
        (["--features_dir", "elsewhere"], "leave it out"),
        (["--l2", "-1"], "it must be positive"),
        (["--device", "cuda"], "torch finds no such device; give cpu"),
    ],
)
def test_recipes_are_not_trained_for_what_cannot_be_probed(option, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        quality_per_minute.parse_arguments(["--dataset_name", "x", *option])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_both_recipes_run_on_the_device_that_they_are_told(device, tmp_path, monkeypatch):
    """Commands see no GPU where the processor is asked for; the plain loop and the timed steps are told the device."""
    told = []

    class Told:
        def __init__(self, *given):
            told.append(given[2])

        def steps(self, count):
            return 1e9, []

        def close(self):
            pass

        def train(self, folder):
            pass

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(quality_per_minute, "Process", Told)
    monkeypatch.setattr(quality_per_minute, "Plain", Told)
    commands = []
    monkeypatch.setattr(quality_per_minute.subprocess, "run", lambda *words, env, **given: commands.append(env))
    options = ["--dataset_name", "x", "--device", device, "--output_dir", str(tmp_path)]
    args, _ = quality_per_minute.parse_arguments(options)
    seconds = quality_per_minute.step_seconds(args)
    for name, rate in {"plain": 1e-3, "ours": None}.items():
        quality_per_minute.Run(name, 0, 1.0, rate).train(args, seconds)
    assert told == [device] * 4  # three ways are timed, and the plain loop trains
    assert [environment.get("CUDA_VISIBLE_DEVICES") for environment in commands] == ["" if device == "cpu" else None]


def test_runs_of_other_options_are_not_taken_for_these(tmp_path):
    for data in ("mistyped", "x", "x"):  # what did not begin leaves nothing that is in the way
        args, rest = quality_per_minute.parse_arguments(["--dataset_name", data, "--output_dir", str(tmp_path)])
        quality_per_minute.begin(args, rest)
    (tmp_path / quality_per_minute.STEP_SECONDS).write_text("{}")
    quality_per_minute.begin(args, rest)
    rest = ["--sigmas", "0.1"]
    with pytest.raises(SystemExit, match="runs of another --config"):
        quality_per_minute.begin(args, rest)
