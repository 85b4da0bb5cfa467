"""EDM's Heun sampler against closed forms; samples of perfect denoisers in every framework."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from ddae_hf import DDAEPipeline
from ddae_hf.noise import change_scheduler
from ddae_hf.sampling import Heun

from .conftest import make_unet
from .ideal import MEAN, STD, Dim, Ideal, closed_form

TRAILING = {"clip_sample": False, "timestep_spacing": "trailing"}


@pytest.fixture
def latents():
    return torch.randn(16, 1, 4, 4, generator=torch.Generator().manual_seed(3))


def sample(denoiser, scheduler, latents, steps, **options):
    pipeline = DDAEPipeline(denoiser, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(len(latents), latents=latents, num_inference_steps=steps, output_type="pt", **options).images
    return images.double() * 2 - 1


def karras_levels(steps, low=0.002, high=80.0, rho=7.0):
    """Equation 5 of Karras et al. 2022, in float64."""
    ramp = np.arange(steps) / (steps - 1)
    levels = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    return [*levels.tolist(), 0.0]


def integrate(latents, steps):
    """Follow the steps of the sampler on Gaussian data in float64."""
    *_, last = Heun().steps(karras_levels(steps), torch.arange(steps), latents.double(), closed_form)
    return last.sample


def exact(latents, sigma=80.0):
    """Return the end of the probability-flow path of Gaussian data that starts at `sigma * latents`."""
    return MEAN + (sigma * latents.double() - MEAN) * STD / (STD**2 + sigma**2) ** 0.5


def test_the_error_falls_with_the_square_of_the_step_size(latents):
    errors = [(integrate(latents, steps) - exact(latents)).abs().max().item() for steps in (20, 40, 80, 160)]
    ratios = [a / b for a, b in zip(errors, errors[1:], strict=False)]
    assert all(3.5 < ratio < 4.5 for ratio in ratios), ratios
    assert errors[-1] < 1e-3


def test_the_pipeline_takes_the_samplers_steps_and_18_are_35_calls(latents):
    ideal = Ideal("edm")
    images = sample(ideal, EDMEulerScheduler(), latents, 18, sampler="heun")
    assert len(ideal.calls) == 35
    torch.testing.assert_close(images, integrate(latents, 18).clamp(-1, 1), rtol=1e-4, atol=1e-4)


def test_the_initial_noise_has_standard_deviation_sigma_max_exactly(latents):
    ideal = Ideal("edm")
    sample(ideal, EDMEulerScheduler(sigma_max=50.0), latents, 3, sampler="heun")
    first, timestep = ideal.calls[0]
    torch.testing.assert_close(first, 50 * latents / (50**2 + 0.5**2) ** 0.5)
    torch.testing.assert_close(timestep, torch.full((16,), np.log(50.0) / 4, dtype=torch.float32))


def test_heun_with_one_step_is_eulers(latents):
    scheduler = EDMEulerScheduler()
    heun = sample(Ideal("edm"), scheduler, latents, 1, sampler="heun")
    scale = scheduler.config.sigma_max / scheduler.init_noise_sigma
    torch.testing.assert_close(heun, sample(Ideal("edm"), scheduler, latents * scale, 1), rtol=0, atol=1e-4)


def test_heun_is_nearer_to_the_path_than_euler(latents):
    target = exact(latents).clamp(-1, 1)
    heun = sample(Ideal("edm"), EDMEulerScheduler(), latents, 60, sampler="heun")
    euler = sample(Ideal("edm"), EDMEulerScheduler(), latents, 119)  # as many calls of the network
    assert (heun - target).abs().mean() < (euler - target).abs().mean() / 3


def test_churn_keeps_the_distribution():
    """Noise that is added and removed again leaves Gaussian data Gaussian, of the same mean and deviation."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(4000, 1, 2, 2, generator=generator, dtype=torch.float64)
    heun = Heun(s_churn=40, s_min=0.05, s_max=50)
    *_, last = heun.steps(karras_levels(200), torch.arange(200), start, closed_form, generator)
    x = last.sample
    assert x.mean().item() == pytest.approx(MEAN, abs=0.02) and x.std().item() == pytest.approx(STD, rel=0.03)
    assert abs(torch.corrcoef(torch.stack([x.flatten(), start.flatten()]))[0, 1]) < 0.5  # it is another image


def raised(sigma, num_steps, **churn):
    """By what factor the first step raises a noise level before the denoiser is called."""
    levels = [sigma * (1 - i / num_steps) for i in range(num_steps)] + [0.0]
    seen = []
    zero, look = torch.zeros(1, 1, 2, 2), lambda x, level: seen.append(level) or x
    steps = Heun(**churn).steps(levels, torch.arange(num_steps), zero, look)
    next(steps)
    return seen[0] / sigma


def test_churn_is_bounded_as_in_the_paper():
    assert raised(1.0, 100, s_churn=9) == pytest.approx(1.09)
    assert raised(1.0, 10, s_churn=9) == pytest.approx(2**0.5)
    assert raised(1.0, 18) == raised(0.01, 18, s_churn=9, s_min=0.05) == raised(60.0, 18, s_churn=9, s_max=50) == 1


@pytest.mark.parametrize("s_noise", [0.0, 1.0, 2.0])
def test_added_noise_has_the_deviation_asked_for(s_noise):
    levels, seen = [1.0, 0.5, 0.0], []
    zero = torch.zeros(1, 1, 64, 64)
    heun = Heun(s_churn=2 * (2**0.5 - 1), s_noise=s_noise)  # which raises the first level to the root of 2
    next(heun.steps(levels, torch.arange(2), zero, lambda x, level: seen.append(x) or x, torch.Generator()))
    assert seen[0].std().item() == pytest.approx(s_noise, abs=0.05)


def test_a_sample_that_is_put_in_a_steps_place_is_what_the_next_one_goes_on_with(latents):
    seen = []
    for step in Heun().steps([2.0, 1.0, 0.0], torch.arange(2), latents, lambda x, level: seen.append(x) or x / 2):
        step.sample = torch.full_like(latents, step.number)
    assert len(seen) == 3 and torch.equal(seen[2], torch.ones_like(latents))


def test_churn_needs_a_generator_to_repeat(latents):
    options = {"sampler": "heun", "s_churn": 20.0}
    seeded = [
        sample(Ideal("edm"), EDMEulerScheduler(), latents, 8, generator=torch.Generator().manual_seed(s), **options)
        for s in (1, 1, 2)
    ]
    assert torch.equal(seeded[0], seeded[1]) and not torch.equal(seeded[0], seeded[2])


def test_nothing_is_clipped_unless_asked():
    far = torch.full((1, 1, 4, 4), 8.0)
    plain = sample(Ideal("edm"), EDMEulerScheduler(), far, 8, sampler="heun", clip_denoised=False)
    torch.testing.assert_close(integrate(far, 8).clamp(-1, 1), plain, rtol=0, atol=1e-4)
    seen = {}

    def last(pipeline, step, timestep, tensors):
        seen[len(seen)] = tensors["latents"]
        return {}

    for clip in (False, True):
        sample(Ideal("edm"), EDMEulerScheduler(), far, 8, sampler="heun", clip_denoised=clip, callback_on_step_end=last)
    assert seen[7].max() > 2 and seen[15].max() <= 1


@pytest.mark.parametrize(
    ("framework", "scheduler", "steps", "options", "tolerance"),
    [
        ("ddpm", DDIMScheduler(**TRAILING), 500, {}, 0.02),
        ("ddpm", DDIMScheduler(**TRAILING, beta_schedule="squaredcos_cap_v2", prediction_type="sample"), 500, {}, 0.02),
        ("ddpm", DDIMScheduler(**TRAILING, rescale_betas_zero_snr=True, prediction_type="v_prediction"), 500, {}, 0.02),
        ("edm", EDMEulerScheduler(), 500, {}, 0.02),
        ("edm", EDMEulerScheduler(), 40, {"sampler": "heun"}, 0.02),
        ("edm", EDMDPMSolverMultistepScheduler(), 40, {}, 0.02),
        ("flow", FlowMatchEulerDiscreteScheduler(), 500, {}, 0.02),
        ("flow", FlowMatchHeunDiscreteScheduler(), 40, {}, 0.02),
    ],
)
def test_every_framework_samples_the_same_images_of_perfect_denoisers(
    latents, framework, scheduler, steps, options, tolerance
):
    """Each follows a path from noise n to the image `MEAN + STD * n`, whatever its units on the way."""
    abar = getattr(scheduler, "alphas_cumprod", None)
    prediction = scheduler.config.get("prediction_type")
    images = sample(Ideal(framework, prediction, abar), scheduler, latents, steps, **options)
    torch.testing.assert_close(images, (MEAN + STD * latents.double()).clamp(-1, 1), rtol=0, atol=tolerance)


def test_noise_image_and_velocity_prediction_sample_the_same_images(latents):
    images = []
    for kind in ("epsilon", "sample", "v_prediction"):
        scheduler = DDIMScheduler(prediction_type=kind, clip_sample=False)
        images.append(sample(Ideal("ddpm", kind, scheduler.alphas_cumprod), scheduler, latents, 20))
    torch.testing.assert_close(images[0], images[1], rtol=0, atol=1e-4)
    torch.testing.assert_close(images[0], images[2], rtol=0, atol=1e-4)
    both = [
        sample(Ideal("edm", kind), EDMEulerScheduler(prediction_type=kind), latents, 8, sampler="heun")
        for kind in ("epsilon", "v_prediction")
    ]
    torch.testing.assert_close(both[0], both[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("clips", [True, False])
def test_solvers_of_higher_order_need_fewer_calls_of_a_perfect_denoiser(latents, clips):
    """Linear betas, which begin at a sigma of 157, and trailing timesteps, clipped or not."""
    trained = DDIMScheduler(clip_sample=clips)
    ideal = Ideal("ddpm", "epsilon", trained.alphas_cumprod)
    end = (MEAN + STD * latents.double()).clamp(-1, 1)
    errors = {}
    for kind in (DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler):
        solver = change_scheduler(trained, kind, timestep_spacing="trailing")
        samples = [sample(ideal, solver, latents, calls) for calls in (10, 20, 50)]
        errors[kind] = [(images - end).square().mean().sqrt().item() for images in samples]
    first = errors.pop(DDIMScheduler)
    assert first[0] > 1.8 * first[1] > 3.6 * first[2] > 0.08, first  # the error falls as the step size does
    for higher in errors.values():
        assert higher[0] > 3 * higher[1] > 15 * higher[2], errors
        assert all(a < share * b for a, b, share in zip(higher, first, (0.9, 0.6, 0.2), strict=True)), errors


def brightness_errors(kind, **options):
    """Return how far the images' brightness is off after 10 and 50 calls of a `Dim` network, root mean square."""
    latents = torch.randn(64, 1, 32, 32, generator=torch.Generator().manual_seed(3))
    trained = DDIMScheduler(clip_sample=True)
    dim = Dim("ddpm", "epsilon", trained.alphas_cumprod, size=32)
    end = Dim.end(latents.double()).clamp(-1, 1)
    errors = []
    for calls in (10, 50):
        scheduler = change_scheduler(trained, kind, timestep_spacing="trailing", **options)
        off = (sample(dim, scheduler, latents, calls) - end).mean((1, 2, 3))
        errors.append(off.square().mean().sqrt().item())
    return errors


def test_where_a_network_mistakes_brightness_at_high_noise_only_ddim_gets_better_with_calls():
    """DDIM keeps the network's noise beside a clipped image. The others' noise holds what was clipped.

    DPM-Solver++ of order 1 differs from DDIM in nothing else. Not clipping is worse still, so `change_scheduler` clips.
    """
    ddim = brightness_errors(DDIMScheduler)
    assert ddim[1] < 0.75 * ddim[0], ddim
    order_1 = brightness_errors(DPMSolverMultistepScheduler, solver_order=1)
    assert order_1[1] > 1.25 * ddim[1], (order_1, ddim)
    for kind in (DPMSolverMultistepScheduler, UniPCMultistepScheduler):
        other = brightness_errors(kind)
        assert other[1] > 0.9 * other[0] and other[1] > 1.25 * ddim[1], (kind, other, ddim)
        unclipped = brightness_errors(kind, thresholding=False)
        assert all(a > 1.1 * b for a, b in zip(unclipped, other, strict=True)), (kind, unclipped, other)


@pytest.mark.parametrize(
    ("scheduler", "options", "message"),
    [
        (DDIMScheduler(), {"sampler": "heun"}, "needs an EDMEulerScheduler, not a DDIMScheduler"),
        (EDMDPMSolverMultistepScheduler(), {"sampler": "heun"}, "needs an EDMEulerScheduler"),
        (EDMEulerScheduler(), {"sampler": "euler"}, "allowed are 'heun'"),
        (EDMEulerScheduler(), {"s_churn": 3.0}, "s_churn came, which only sampler='heun' takes"),
        (EDMEulerScheduler(), {"clip_denoised": True}, "clip_denoised came"),
    ],
)
def test_samplers_that_cannot_work_are_refused(scheduler, options, message):
    with pytest.raises(ValueError, match=message):
        DDAEPipeline(make_unet(), scheduler)(**options)
