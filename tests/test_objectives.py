"""What the denoising loss counts, against formulas of the papers in float64."""

import json

import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

from ddae_hf.diffusion import Diffusion
from ddae_hf.experiments.objectives import shares_between, weighting
from ddae_hf.noise import family_of

from . import commands
from .conftest import make_unet

SCHEDULERS = {
    "epsilon": DDPMScheduler(),
    "sample": DDPMScheduler(prediction_type="sample"),
    "v_prediction": DDPMScheduler(prediction_type="v_prediction"),
    "edm": EDMEulerScheduler(),
    "flow": FlowMatchEulerDiscreteScheduler(),
}
SIGMAS = torch.tensor([0.02, 0.1, 0.5, 1.0, 3.0, 20.0])


@pytest.mark.parametrize("name", SCHEDULERS)
def test_min_snr_weighs_as_its_paper_says(name):
    """Hang et al. 2023, section 3.4: for the signal-to-noise ratio 1 / sigma^2, weights of each prediction's loss."""
    found = weighting(family_of(SCHEDULERS[name]), "min_snr", 5.0)(SIGMAS)
    snr = 1 / SIGMAS.double() ** 2
    clamped = snr.clamp(max=5.0)
    spread = 0.5  # sigma_data
    expected = {
        "epsilon": clamped / snr,
        "sample": clamped,
        "v_prediction": clamped / (snr + 1),
        "edm": clamped * (SIGMAS.double() * spread) ** 2 / (SIGMAS.double() ** 2 + spread**2),
        "flow": clamped * (SIGMAS.double() / (1 + SIGMAS.double())) ** 2,
    }[name]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_loss_of_velocities_is_that_of_flow_matching(name):
    """The mean squared error of `n - x` that a network's answer stands for, wherever time is not below 0.05."""
    torch.manual_seed(0)
    network = make_unet(sample_size=8)
    pair = Diffusion(network, SCHEDULERS[name])
    count = len(SIGMAS)
    clean, noise = torch.rand(count, 3, 8, 8) * 2 - 1, torch.randn(count, 3, 8, 8)
    weigh = weighting(pair.family, "velocity", 5.0)
    with torch.no_grad():
        found = pair.loss(clean, sigma=SIGMAS, noise=noise, weighting=weigh)
        noisy, timestep = pair.family.noisy(clean, noise, SIGMAS)
        answer = pair.predict(noisy, timestep, {})
        denoised = pair.family.denoised(noisy, answer, SIGMAS).double()
    sigma = SIGMAS.double()[:, None, None, None]
    velocity = (clean + sigma * noise - denoised) / sigma  # of straight paths, `n - x`, from the noise that is left
    time = sigma / (1 + sigma)
    clipped = (time / time.clamp(min=0.05)).square()
    errors = (velocity - noise).square()  # as x is known, an error of the velocity is one of n alone
    expected = (errors * (sigma / time).square() * clipped).mean((1, 2, 3))
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("log_normal", [None, (-0.5, 1.0)])
@pytest.mark.parametrize("name", ["epsilon", "edm", "flow"])
def test_a_cut_draws_the_distribution_between_two_levels(name, log_normal):
    family = family_of(SCHEDULERS[name])
    shares = shares_between(family, 0.1, 0.8, log_normal)
    torch.manual_seed(0)
    cut = family.draw(200_000, log_normal=log_normal, shares=shares)
    torch.manual_seed(0)
    whole = family.draw(1_000_000, log_normal=log_normal)
    assert cut.min() >= 0.1 and cut.max() <= 0.8
    kept = whole[(whole >= 0.1) & (whole <= 0.8)]
    parts = torch.linspace(0.05, 0.95, 19)
    torch.testing.assert_close(cut.quantile(parts), kept.quantile(parts), rtol=0.03, atol=0)
    assert abs((shares[1] - shares[0]) - len(kept) / len(whole)) < 0.003


def test_a_cut_at_one_end_leaves_the_other():
    family = family_of(SCHEDULERS["epsilon"])
    assert shares_between(family, None, None, None) is None
    sigmas = family.sigma(torch.arange(1000.0))
    first, last = shares_between(family, float(sigmas[100]), None, None)
    assert (first, last) == (pytest.approx(0.1, abs=1e-6), 1.0)
    assert set(family.draw(20_000, shares=(first, last)).tolist()) <= set(sigmas[100:].tolist())
    first, last = shares_between(family, None, float(sigmas[99]), None)
    assert (first, last) == (0.0, pytest.approx(0.1, abs=1e-6))
    assert family.draw(20_000, shares=(first, last)).max() == sigmas[99]


def test_a_cut_that_leaves_nothing_is_refused(digits, tmp_path):
    family = family_of(SCHEDULERS["epsilon"])
    for low, high in ((200.0, None), (None, 1e-4), (0.8, 0.1), (0.5, 0.5)):
        with pytest.raises(ValueError, match=r"of the levels that this framework draws lie between them"):
            shares_between(family, low, high, None)
    options = ["--dataset_name", str(digits), "--output_dir", str(tmp_path / "cut"), "--sigma_min", "500"]
    options += ["--denoiser", json.dumps({"sample_size": 8, "in_channels": 1, "out_channels": 1})]
    with pytest.raises(SystemExit, match=r"sigma_min is 500.0 and sigma_max None: 0.00% of the levels"):
        commands.run("pretrain", *options)
    assert not (tmp_path / "cut").exists()


def test_options_reach_the_loss(digits, tmp_path):
    """Training is at the levels of the cut alone, and its loss is weighed."""
    tiny = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": [32, 32]}
    tiny |= {"layers_per_block": 1, "down_block_types": ["DownBlock2D", "DownBlock2D"]}
    tiny |= {"up_block_types": ["UpBlock2D", "UpBlock2D"]}
    options = ["--dataset_name", str(digits), "--denoiser", json.dumps(tiny), "--max_train_steps", "2"]
    options += ["--total_batch_size", "16", "--sample_steps", "0", "--learning_rate", "1e-9", "--max_train_samples"]
    losses = {}
    for name, more in {
        "low": ["--sigma_max", "0.05"],
        "high": ["--sigma_min", "20"],
        "weighed": ["--sigma_max", "0.05", "--loss_weighting", "min_snr", "--min_snr_gamma", "1"],
    }.items():
        commands.run("pretrain", *options, "64", *more, "--output_dir", str(tmp_path / name))
        losses[name] = json.loads((tmp_path / name / "train_results.json").read_text())["loss_last_100_batches"]
    assert losses["weighed"] < 0.05**2 * losses["low"] * 1.01  # noise prediction: min(snr, 1) / snr = sigma^2
    assert losses["high"] != losses["low"]
