"""Laws of noise levels, against diffusers' own schedulers and float64 formulas."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EDMEulerScheduler, EulerDiscreteScheduler

from ddae_hf import add_noise, sigma_to_timestep, timestep_to_sigma
from ddae_hf.noise import (
    fed_timestep,
    indexed_noise,
    prediction_target,
    prediction_type,
    sample_training_sigma,
    sigma_range,
)

from .conftest import make_unet

SCHEDULERS = [
    DDPMScheduler(),
    DDIMScheduler(beta_schedule="squaredcos_cap_v2"),
    EulerDiscreteScheduler(beta_schedule="scaled_linear"),
    DDPMScheduler(num_train_timesteps=50),
]
ZERO_SNR = DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_sigma_is_the_float64_formula_and_rises_with_the_timestep(scheduler):
    abar = scheduler.alphas_cumprod.numpy().astype(np.float64)
    sigma = timestep_to_sigma(scheduler, torch.arange(len(abar)))
    np.testing.assert_allclose(sigma.numpy(), np.sqrt((1 - abar) / abar), rtol=1e-6)
    assert sigma.dtype == torch.float32 and (sigma.diff() > 0).all()


@pytest.mark.parametrize("scheduler", [*SCHEDULERS, ZERO_SNR])
def test_timesteps_and_sigmas_are_inverse_of_each_other(scheduler):
    last = len(scheduler.alphas_cumprod) - 1
    whole = torch.arange(last + 1).float()
    assert torch.equal(sigma_to_timestep(scheduler, timestep_to_sigma(scheduler, whole)), whole)
    between = torch.linspace(0, last - 1.5, 333)
    back = sigma_to_timestep(scheduler, timestep_to_sigma(scheduler, between))
    torch.testing.assert_close(back, between, rtol=1e-4, atol=2e-3)


def test_between_timesteps_log_sigma_is_linear(scheduler):
    a, middle, b = timestep_to_sigma(scheduler, torch.tensor([10.0, 10.5, 11.0])).double().log()
    torch.testing.assert_close(middle, (a + b) / 2, rtol=1e-6, atol=0)


def test_the_papers_tap_is_sigma_0_047(scheduler):
    assert timestep_to_sigma(scheduler, 10).item() == pytest.approx(0.0469, abs=1e-4)


def test_shapes_follow_the_argument(scheduler):
    assert timestep_to_sigma(scheduler, 3).shape == sigma_to_timestep(scheduler, 0.5).shape == ()
    assert sigma_to_timestep(scheduler, torch.full((4,), 0.5)).shape == (4,)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_add_noise_is_diffusers_own_at_whole_timesteps(scheduler):
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(6, 3, 8, 8, generator=generator) * 2 - 1
    noise = torch.randn(6, 3, 8, 8, generator=generator)
    last = len(scheduler.alphas_cumprod) - 1
    timesteps = torch.tensor([0, 1, last // 4, last // 2, last - 1, last])
    sample, fed = add_noise(scheduler, clean, noise, timestep_to_sigma(scheduler, timesteps))
    reference = DDPMScheduler(trained_betas=scheduler.betas.tolist()).add_noise(clean, noise, timesteps)
    torch.testing.assert_close(sample, reference, rtol=1e-5, atol=1e-5)
    assert torch.equal(fed, timesteps.float())


def test_add_noise_keeps_its_precision_at_small_levels():
    scheduler = DDPMScheduler(beta_start=1e-8, beta_end=1e-7, num_train_timesteps=10)
    sigma = sigma_range(scheduler)[0]
    sample, _ = add_noise(scheduler, torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2), sigma)
    assert sample[0, 0, 0, 0].item() == pytest.approx(sigma / math.sqrt(1 + sigma**2), rel=1e-6)


def test_infinite_sigma_is_pure_noise():
    assert math.isinf(sigma_range(ZERO_SNR)[1])
    clean, noise = torch.ones(2, 1, 2, 2), torch.randn(2, 1, 2, 2)
    sample, fed = add_noise(ZERO_SNR, clean, noise, math.inf)
    assert torch.equal(sample, noise) and fed.tolist() == [999.0, 999.0]
    assert torch.equal(prediction_target(ZERO_SNR, clean, noise, math.inf), -clean)
    euler = EulerDiscreteScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    assert math.isinf(sigma_range(euler)[1])


def test_every_image_can_have_its_own_level(scheduler, images):
    sigma = torch.tensor([0.02, 0.1, 0.5, 2.0, 50.0])
    together, fed = add_noise(scheduler, images, torch.ones_like(images), sigma)
    for i in range(5):
        alone, level = add_noise(scheduler, images[i : i + 1], torch.ones(1, 3, 8, 8), sigma[i].item())
        torch.testing.assert_close(together[i : i + 1], alone)
        torch.testing.assert_close(fed[i : i + 1], level)


def test_add_noise_in_half_precision_feeds_exact_timesteps(scheduler, images):
    sample, fed = add_noise(scheduler, images.bfloat16(), torch.randn_like(images), timestep_to_sigma(scheduler, 999))
    assert sample.dtype == torch.bfloat16 and fed.dtype == torch.float32 and fed.tolist() == [999.0] * 5


@pytest.mark.parametrize("sigma", [-0.1, 0.0, 0.005, 200.0, math.inf, math.nan])
def test_a_scalar_sigma_outside_the_schedule_is_refused(scheduler, images, sigma):
    for attempt in (lambda: sigma_to_timestep(scheduler, sigma), lambda: add_noise(scheduler, images, images, sigma)):
        with pytest.raises(ValueError, match=r"outside the schedule.*allowed are 0\.01"):
            attempt()


@pytest.mark.parametrize("timestep", [-1, 1000, math.nan])
def test_a_scalar_timestep_outside_the_schedule_is_refused(scheduler, timestep):
    with pytest.raises(ValueError, match="allowed are 0 to 999"):
        timestep_to_sigma(scheduler, timestep)


def test_tensors_outside_the_schedule_give_nan_rather_than_an_answer(scheduler):
    assert sigma_to_timestep(scheduler, torch.tensor([0.001, 0.5, 1e4])).isnan().tolist() == [True, False, True]
    assert timestep_to_sigma(scheduler, torch.tensor([-1.0, 5.0, 1000.0])).isnan().tolist() == [True, False, True]


def test_ends_written_with_a_few_digits_are_inside(scheduler):
    low, high = sigma_range(scheduler)
    assert sigma_to_timestep(scheduler, float(f"{low:.6g}")).item() == 0
    assert sigma_to_timestep(scheduler, float(f"{high:.6g}")).item() == pytest.approx(999, abs=1e-2)


def test_a_scheduler_of_another_family_is_refused(images):
    with pytest.raises(ValueError, match="EDMEulerScheduler is not a variance-preserving"):
        add_noise(EDMEulerScheduler(), images, images, 0.5)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_diffusers_recovers_the_image_from_the_prediction_target(images, kind):
    """A perfect prediction, put through DDIM's own formula for the clean image, gives the clean image."""
    scheduler = DDIMScheduler(prediction_type=kind, clip_sample=False)
    scheduler.set_timesteps(1000)
    noise = torch.randn_like(images)
    for timestep in (0, 300, 900):
        sigma = timestep_to_sigma(scheduler, timestep)
        noisy, _ = add_noise(scheduler, images, noise, sigma)
        target = prediction_target(scheduler, images, noise, sigma)
        recovered = scheduler.step(target, timestep, noisy).pred_original_sample
        torch.testing.assert_close(recovered, images, rtol=1e-3, atol=1e-3)


def test_predictions_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="zero-terminal SNR"):
        prediction_type(DDPMScheduler(rescale_betas_zero_snr=True))
    with pytest.raises(ValueError, match="'flow' is not supported"):
        prediction_type(DDPMScheduler(prediction_type="flow"))


def test_training_levels_are_uniform_over_timesteps():
    scheduler = DDPMScheduler(num_train_timesteps=10)
    sigma = sample_training_sigma(scheduler, 20_000, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(sigma_to_timestep(scheduler, sigma).long(), minlength=10)
    assert counts.sum() == 20_000 and ((counts - 2000).abs() < 5 * math.sqrt(2000)).all()


def test_a_learned_embedding_is_fed_integers():
    learned = make_unet(time_embedding_type="learned", num_train_timesteps=1000)
    assert torch.equal(fed_timestep(learned, torch.tensor([9.6, 20.2])), torch.tensor([10, 20]))
    assert fed_timestep(make_unet(), torch.tensor([9.6])).dtype == torch.float32


def test_indexed_noise_depends_on_seed_index_and_view_alone():
    whole = indexed_noise((3, 8, 8), range(10), seed=4)
    assert torch.equal(whole[[7, 2]], indexed_noise((3, 8, 8), [7, 2], seed=4))
    others = [indexed_noise((3, 8, 8), range(10), seed=5), indexed_noise((3, 8, 8), range(10), seed=4, view=1)]
    for other in others:
        assert not torch.isclose(whole, other).all(dim=(1, 2, 3)).any()
    many = indexed_noise((3, 8, 8), range(500))
    assert abs(many.mean()) < 0.01 and abs(many.std() - 1) < 0.01
    assert torch.corrcoef(many.flatten(1)[:50]).fill_diagonal_(0).abs().max() < 0.35


def test_add_noise_compiles_without_a_graph_break(scheduler, images):
    def function(x, sigma):
        return add_noise(scheduler, x, torch.ones_like(x), sigma)

    sigma = torch.full((5,), 0.3)
    compiled = torch.compile(function, fullgraph=True, backend="eager")(images, sigma)
    torch.testing.assert_close(compiled, function(images, sigma))
