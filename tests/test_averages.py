"""Averages whose length is chosen after training: against direct sums in float64, and as their users make them."""

import json
import math
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ddae_hf import DDAEModel, DDAEPipeline
from ddae_hf.commands import sweep as sweep_command
from ddae_hf.experiments import averages, rebuilding
from ddae_hf.experiments.averages import (
    PowerAverages,
    Profile,
    combined,
    exponent_of,
    length_of,
    new_share,
    snapshots_in,
)
from ddae_hf.experiments.images import Images
from ddae_hf.experiments.pretraining import PretrainingOptions
from ddae_hf.experiments.rebuilding import rebuild_average
from ddae_hf.experiments.results import AverageReport, CurveReport, Report
from ddae_hf.experiments.run_folder import note_files
from ddae_hf.experiments.training_curve import sweep_run

from . import commands

STEPS = 64
LENGTHS = (0.05, 0.1)
TINY = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": [32], "layers_per_block": 1}
TINY |= {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}


def shares(step, length):
    """How much an average after a step has of the weights of each step, by integrals of the profile."""
    borders = np.arange(step + 1, dtype=np.float64) / step
    return np.diff(borders ** (exponent_of(length) + 1))


@pytest.mark.parametrize("length", [0.001, 0.01, 0.05, 0.1, 0.2, 0.28])
def test_a_length_is_the_deviation_of_its_profile(length):
    exponent = exponent_of(length)
    assert exponent > 0 and length_of(exponent) == pytest.approx(length, rel=1e-9)
    assert exponent_of(length_of(exponent)) == pytest.approx(exponent, rel=1e-9)
    count = 200_000
    middles = (np.arange(count) + 0.5) / count
    weights = shares(count, length)
    mean = weights @ middles
    assert math.sqrt(weights @ (middles - mean) ** 2) == pytest.approx(length, rel=1e-4)


def test_known_exponents():
    """The paper has 0.05 and 0.10 for what are exponents of 16.97 and 6.94."""
    assert exponent_of(0.05) == pytest.approx(16.97, abs=0.005) and exponent_of(0.1) == pytest.approx(6.94, abs=0.005)
    assert length_of(0) == pytest.approx(math.sqrt(1 / 12))


class Walk(torch.nn.Module):
    """Two parameters of float64 on a random walk."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Parameter(torch.zeros(3, 2, dtype=torch.float64))
        self.second = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
        self.generator = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def step(self):
        for parameter in self.parameters():
            parameter += torch.randn(parameter.shape, generator=self.generator, dtype=torch.float64)


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """A run's folder with snapshots of every eighth step, and the weights of every step."""
    folder = tmp_path_factory.mktemp("walked")
    walk = Walk()
    kept = PowerAverages(LENGTHS, folder, every=8)
    kept.begin(walk, STEPS)
    path = []
    for step in range(1, STEPS + 1):
        walk.step()
        path.append({name: value.detach().clone() for name, value in walk.named_parameters()})
        kept.update(step)
        if kept.is_due(step):
            kept.snapshot(step)
    return folder, path


def direct(path, step, length):
    weights = torch.from_numpy(shares(step, length))
    return {
        name: torch.einsum("s,s...->...", weights, torch.stack([each[name] for each in path[:step]]))
        for name in path[0]
    }


def rebuilt(plan):
    network = Walk()
    terms = zip(plan.snapshots, plan.combination.coefficients, strict=True)
    with torch.no_grad():
        rebuilding.fill(network, [(each.folder / each.file, coefficient) for each, coefficient in terms])
    return dict(network.named_parameters())


def test_the_update_is_the_weighted_sum_of_all_steps(walked):
    folder, path = walked
    found = snapshots_in(folder)
    assert [(each.profile.step, each.profile.length) for each in found] == [
        (step, length) for step in range(8, STEPS + 1, 8) for length in LENGTHS
    ]
    for each in found:
        stored = load_file(each.folder / each.file)
        for name, expected in direct(path, each.profile.step, each.profile.length).items():
            assert stored[name].dtype == torch.float64
            torch.testing.assert_close(stored[name], expected, rtol=1e-12, atol=1e-12)
    assert new_share(1, 5.0) == 1 and new_share(4, 0.0) == pytest.approx(1 / 4)


def test_an_average_that_is_stored_is_given_back_bit_by_bit(walked):
    folder, _ = walked
    for each in snapshots_in(folder):
        plan = rebuilding.planned(folder, each.profile.length, each.profile.step)
        assert plan.combination.residual == 0
        stored = load_file(each.folder / each.file)
        assert all(torch.equal(value, stored[name]) for name, value in rebuilt(plan).items())


def test_the_solution_gives_a_stored_average_without_being_told_so():
    stored = [Profile(step, length) for step in range(8, STEPS + 1, 8) for length in LENGTHS]
    near = combined(stored, Profile(STEPS, math.nextafter(0.1, 1)))
    assert near.coefficients == pytest.approx([*[0] * (len(stored) - 1), 1], abs=1e-6)
    assert near.residual < 1e-6


@pytest.mark.parametrize(("length", "step"), [(0.07, 64), (0.06, 40), (0.035, 64), (0.15, 56), (0.045, 16)])
def test_another_length_is_the_sum_that_its_coefficients_say_and_the_average_but_for_the_residual(walked, length, step):
    folder, path = walked
    plan = rebuilding.planned(folder, length, step)
    found = rebuilt(plan)
    # The sum's own shares of every step: exactly what the files' weights must have.
    mixed = np.zeros(step)
    for each, coefficient in zip(plan.snapshots, plan.combination.coefficients, strict=True):
        assert each.profile.step <= step
        mixed[: each.profile.step] += coefficient * shares(each.profile.step, each.profile.length)
    assert mixed.sum() == pytest.approx(1, abs=1e-9)
    wanted = shares(step, length)
    exponent = exponent_of(length)
    norm = (exponent + 1) / math.sqrt((2 * exponent + 1) * step)  # of the profile
    difference = plan.combination.residual * norm
    assert np.linalg.norm(mixed - wanted) <= difference + 1e-12  # means over a step are no further apart
    expected = direct(path, step, length)
    for name, value in found.items():
        steps = torch.stack([each[name] for each in path[:step]])
        sums = torch.einsum("s,s...->...", torch.from_numpy(mixed), steps)
        torch.testing.assert_close(value.detach(), sums, rtol=1e-9, atol=1e-9)
        bound = difference * steps.norm(dim=0) + 1e-9
        assert ((value - expected[name]).abs() <= bound).all()
        assert 0 < (value - expected[name]).abs().max()


def test_the_residual_is_the_distance_of_the_profiles():
    """By sums over a fine grid, of profiles that are not stored at their own last step."""
    stored = [Profile(step, length) for step in (16, 32, 48, 64) for length in LENGTHS]
    wanted = Profile(64, 0.08)
    found = combined(stored, wanted)
    places = (np.arange(640_000) + 0.5) / 10_000

    def heights(profile):
        exponent = exponent_of(profile.length)
        inside = places <= profile.step
        return inside * (exponent + 1) * (places / profile.step) ** exponent / profile.step

    mixed = sum(value * heights(profile) for value, profile in zip(found.coefficients, stored, strict=True))
    target = heights(wanted)
    assert found.residual == pytest.approx(np.linalg.norm(mixed - target) / np.linalg.norm(target), rel=1e-4)
    rng = np.random.default_rng(0)
    for _ in range(20):  # no other sum with coefficients that add up to 1 is nearer
        shift = rng.normal(size=len(stored))
        shift -= shift.mean()
        other = mixed + 1e-3 * sum(value * heights(profile) for value, profile in zip(shift, stored, strict=True))
        assert np.linalg.norm(other - target) > np.linalg.norm(mixed - target)


def test_more_snapshots_leave_less_of_a_profile_out():
    residuals = []
    for every in (16, 8, 4, 2):
        stored = [Profile(step, length) for step in range(every, STEPS + 1, every) for length in LENGTHS]
        residuals.append(combined(stored, Profile(STEPS, 0.03)).residual)
    assert residuals == sorted(residuals, reverse=True) and residuals[-1] < residuals[0] / 10


def test_weights_that_stay_are_left_as_they_are_however_badly_a_profile_is_met():
    found = combined([Profile(32, 0.05), Profile(64, 0.1)], Profile(64, 0.01))
    assert found.residual > 0.5 and sum(found.coefficients) == pytest.approx(1, abs=1e-12)


def train(digits, folder, *options, steps=12):
    arguments = ["--dataset_name", digits, "--output_dir", folder, "--denoiser", json.dumps(TINY | {"dropout": 0.1})]
    arguments += ["--max_train_samples", 100, "--total_batch_size", 16, "--mixed_precision", "no", "--seed", 1]
    arguments += ["--lr_warmup_steps", 2, "--learning_rate", 1e-2, "--sample_steps", 0, "--max_train_steps", steps]
    commands.run("pretrain", *arguments, "--checkpointing_steps", 5, *options)


KEPT = ("--average_lengths", *LENGTHS, "--average_steps", 2)


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train(digits, folder, *KEPT)
    return folder


def weights(folder):
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*.safetensors")
        if "checkpoint-" not in str(file.relative_to(folder))
    }


def test_averages_beside_a_training_do_not_change_it(trained, digits, tmp_path):
    train(digits, tmp_path)
    plain, kept = weights(tmp_path), weights(trained)
    assert plain.keys() == {"unet/diffusion_pytorch_model.safetensors", "raw/unet/diffusion_pytorch_model.safetensors"}
    assert {name: kept[name] for name in plain} == plain
    assert not (tmp_path / "averages").exists() and not (tmp_path / "checkpoint-5" / "state" / "averages").exists()
    steps = sorted(path.name for path in (trained / "averages").iterdir())
    assert steps == [f"step-{step:07d}" for step in (2, 4, 6, 8, 10, 12)]
    for step in steps:
        files = {path.name for path in (trained / "averages" / step).iterdir()}
        assert files == {"files.json", "length-0.05.safetensors", "length-0.1.safetensors"}


def test_by_default_there_are_32_snapshots_of_a_training_and_its_last_step(digits, tmp_path):
    train(digits, tmp_path, "--average_lengths", 0.1, "--checkpointing_steps", 1000, steps=70)
    steps = [each.profile.step for each in snapshots_in(tmp_path)]
    assert steps == list(range(2, 71, 2))


def test_a_resumed_run_leaves_the_same_snapshots(trained, digits, tmp_path):
    """Those of later steps, which another end of the run has left, are not among them."""
    (tmp_path / "checkpoint-5").symlink_to(trained / "checkpoint-5")
    shutil.copytree(trained / "averages", tmp_path / "averages")
    later = tmp_path / "averages" / "step-0000007"
    shutil.copytree(trained / "averages" / "step-0000006", later)
    (tmp_path / "averages" / "partial-step-0000008").mkdir()
    (tmp_path / "averages" / "step-0000008" / "length-0.05.safetensors").write_bytes(b"of another training")
    train(digits, tmp_path, *KEPT, "--resume_from_checkpoint", "latest")
    assert weights(tmp_path) == weights(trained)
    assert not later.exists() and not list((tmp_path / "averages").glob("partial*"))


def test_a_run_is_not_resumed_with_other_averages_or_without_their_state(trained, digits, tmp_path):
    (tmp_path / "checkpoint-5").symlink_to(trained / "checkpoint-5")
    resume = ("--resume_from_checkpoint", "latest")
    with pytest.raises(SystemExit, match=r"average_lengths was \[0.05, 0.1\] and is \[0.05\]"):
        train(digits, tmp_path, "--average_lengths", 0.05, *resume)
    with pytest.raises(SystemExit, match=r"average_lengths was \[0.05, 0.1\] and is \[\]"):
        train(digits, tmp_path, *resume)
    shutil.copytree(trained / "checkpoint-5", tmp_path / "checkpoint-6")
    file = tmp_path / "checkpoint-6" / "state" / "averages" / "length-0.1.safetensors"
    stored = load_file(file)
    save_file({name: value[:1].contiguous() for name, value in stored.items()}, file)
    note_files(tmp_path / "checkpoint-6")
    with pytest.raises(SystemExit, match="checkpoint-6 cannot be resumed: length-0.1.safetensors is of another"):
        train(digits, tmp_path, *KEPT, *resume)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"average_lengths": [0.05, 0.05], "output_dir": "runs"}, "average_lengths is 0.05 0.05: give every length"),
        ({"average_lengths": [0.05]}, "average_lengths is 0.05: snapshots of them are kept in output_dir"),
        ({"average_lengths": [0.1], "output_dir": "runs", "shard": True}, "average_lengths is 0.1: .* shard divides"),
        ({"average_lengths": [0.3], "output_dir": "runs"}, "average_lengths is 0.3: it must be between 0.001 and 0.28"),
        ({"average_lengths": [-0.1], "output_dir": "runs"}, "average_lengths is -0.1: it must be between"),
        ({"average_steps": 0}, "average_steps is 0: it must be at least 1"),
    ],
)
def test_averages_that_cannot_be_kept_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        PretrainingOptions(**changes)


def test_a_snapshot_is_whole_or_not_there(digits, tmp_path, monkeypatch):
    real, calls = averages.note_files, []

    def full(folder):
        calls.append(folder)
        if len(calls) == 2:
            raise OSError(28, os.strerror(28))
        return real(folder)

    monkeypatch.setattr(averages, "note_files", full)
    with pytest.raises(SystemExit, match="could not be written to: No space left on device"):
        train(digits, tmp_path, *KEPT)
    assert {each.profile.step for each in snapshots_in(tmp_path)} == {2}


def test_the_command_writes_a_checkpoint_that_opens_as_the_runs_does(trained, tmp_path, capsys):
    run = ("ema", "--model_name_or_path", trained)
    commands.run(*run, "--length", 0.07, "--output_dir", tmp_path / "new")
    said = capsys.readouterr().out
    report = Report.read(tmp_path / "new")
    assert isinstance(report, AverageReport) and report.step == 12 and report.length == 0.07
    assert 0 < report.residual < 0.05 and f"but for {100 * report.residual:.2g} % of it" in said
    assert sum(report.coefficients.values()) == pytest.approx(1) and len(report.coefficients) == 12
    made, own = DDAEPipeline.from_pretrained(tmp_path / "new"), DDAEPipeline.from_pretrained(trained)
    for part in ("scheduler", "denoiser"):
        first, second = ({**getattr(pipeline, part).config, "_name_or_path": None} for pipeline in (made, own))
        assert first == second
    assert {file.name for file in (tmp_path / "new").iterdir()} >= {"model_index.json", "preprocessor_config.json"}
    expected = {name: torch.zeros_like(value).double() for name, value in made.denoiser.state_dict().items()}
    for place, coefficient in report.coefficients.items():
        for name, value in load_file(trained / "averages" / f"{place}.safetensors").items():
            expected[name] += coefficient * value.double()
    for name, value in made.denoiser.state_dict().items():
        assert torch.equal(value, expected[name].float())
    assert DDAEModel.from_pretrained(tmp_path / "new").config.generator_fingerprint
    commands.run(*run, "--length", 0.1, "--step", 8, "--output_dir", tmp_path / "new")  # in place of the first one
    assert "exactly, as it was stored" in capsys.readouterr().out
    stored = load_file(trained / "averages" / "step-0000008" / "length-0.1.safetensors")
    found = DDAEPipeline.from_pretrained(tmp_path / "new").denoiser.state_dict()
    assert all(torch.equal(value, stored[name]) for name, value in found.items())


def test_a_run_that_goes_on_has_averages_too(trained, tmp_path):
    for name in ("averages", "checkpoint-5", "checkpoint-10"):
        (tmp_path / name).symlink_to(trained / name)
    found, whole = (rebuild_average(folder, length=0.08).pipeline.denoiser for folder in (tmp_path, trained))
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in found.state_dict().items())


def test_averages_that_cannot_be_made_are_refused_before_anything_is_written(trained, tmp_path):
    def fails(message, run=trained, **options):
        with pytest.raises(ValueError, match=message):
            rebuild_average(run, output_dir=tmp_path / "new", **{"length": 0.07} | options)
        assert not (tmp_path / "new").exists()

    fails("has no snapshots of averages: give the folder of a training run", trained / "checkpoint-5")
    fails("length is 0.01: the 12 stored averages up to step 12 miss its profile by .* can make are from", length=0.01)
    fails("step is 7, which has no snapshot: the nearest are 4, 6, 8", step=7)
    fails("length is -0.1: it must be between 0.001 and 0.28", length=-0.1)
    copy = tmp_path / "copy"
    shutil.copytree(trained / "averages", copy / "averages")
    fails("has no network beside its averages", copy)
    shutil.copytree(trained, copy, dirs_exist_ok=True)
    file = copy / "averages" / "step-0000004" / "length-0.1.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    fails("step-0000004 is damaged: length-0.1.safetensors is not what was written", copy)
    save_file({"conv_in.weight": torch.zeros(1)}, file)
    note_files(file.parent)
    fails("length-0.1.safetensors is of another network than the run's", copy)
    with pytest.raises(ValueError, match="which holds something else than an average"):
        rebuild_average(trained, length=0.07, output_dir=trained)


def test_lengths_are_swept_as_checkpoints_are(trained, digits, tmp_path):
    options = ["--dataset_name", digits, "--max_train_samples", 100, "--max_test_samples", 50, "--sigmas", 0.1]
    options += ["--num_noise_seeds", 1, "--layers", "mid_block", "--model_name_or_path", trained]
    options += ["--extractor", f"ddae:{trained}", "--num_images", 20, "--num_inference_steps", 2]
    commands.run("sweep", *options, "--lengths", 0.1, 0.06, "--output_dir", tmp_path)
    report = CurveReport.read(tmp_path)
    assert [(point.length, point.step) for point in report.points] == [(0.06, 12), (0.1, 12)]
    assert len({point.test_loss for point in report.points}) == 2
    assert all(point.frechet_distance is not None for point in report.points)
    assert "| 0.06 | `mid_block`, sigma 0.1 |" in report.table() and "| length |" in report.table()
    assert min(Image.open(tmp_path / "training_curve.png").size) > 200
    for name in ("eval_results.json", "classifier/config.json", "checkpoint/average.json", "generation/grid.png"):
        assert (tmp_path / "length-0.06" / name).is_file()
    few = {"max_train_samples": 100, "max_test_samples": 50, "sigmas": [0.1], "num_noise_seeds": 1}
    again = sweep_run(trained, Images.open(str(digits)), **few, layers=["mid_block"], lengths=[0.06])
    assert again.points[0].test_accuracy == report.points[0].test_accuracy
    assert again.points[0].test_loss == report.points[0].test_loss


def test_lengths_that_cannot_be_swept_are_refused_at_once(trained, digits, tmp_path):
    with pytest.raises(ValueError, match="lengths sweeps averages in place of checkpoints"):
        sweep_command.Arguments(checkpoints=trained, lengths=[0.1])
    options = ["--dataset_name", digits, "--output_dir", tmp_path / "sweep"]
    of_run = ("--model_name_or_path", trained)
    with pytest.raises(SystemExit, match="length is 0.002: the 12 stored averages"):
        commands.run("sweep", *options, *of_run, "--lengths", 0.1, 0.002)
    with pytest.raises(SystemExit, match="extractor ddae:nowhere cannot be used"):
        commands.run("sweep", *options, *of_run, "--lengths", 0.1, "--extractor", "ddae:nowhere")
    with pytest.raises(SystemExit, match="push_to_hub pushes one classifier"):
        commands.run("sweep", *options, *of_run, "--lengths", 0.1, "--push_to_hub")
    assert not (tmp_path / "sweep").exists()
