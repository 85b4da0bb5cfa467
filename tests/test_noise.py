"""Laws of noise levels, against diffusers' own schedulers and float64 formulas."""

import copy
import math
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    RePaintScheduler,
    SCMScheduler,
    ScoreSdeVeScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from ddae_hf import add_noise, sigma_to_timestep, timestep_to_sigma
from ddae_hf.diffusion import Diffusion
from ddae_hf.families import FAMILIES, Family, register, rounded
from ddae_hf.networks import network_of
from ddae_hf.noise import _kept_schedule, _schedule, family_of, new_scheduler

from .conftest import make_unet
from .ideal import Ideal, closed_form

SCHEDULERS = [
    DDPMScheduler(),
    DDIMScheduler(beta_schedule="squaredcos_cap_v2"),
    EulerDiscreteScheduler(beta_schedule="scaled_linear"),
    DDPMScheduler(num_train_timesteps=50),
]
EDM = [EDMEulerScheduler(), EDMEulerScheduler(sigma_data=1.0, prediction_type="v_prediction")]
EDM += [EDMDPMSolverMultistepScheduler(sigma_data=0.7)]
FLOW = [FlowMatchEulerDiscreteScheduler(), FlowMatchHeunDiscreteScheduler(num_train_timesteps=100)]
FLOW += [FlowMatchEulerDiscreteScheduler(shift=3.0)]
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


@pytest.mark.parametrize("scheduler", EDM)
def test_edms_timesteps_and_sigmas_are_inverse_and_beyond_the_samplers_range_too(scheduler):
    sigma = torch.logspace(-5, 4, 200)
    timestep = sigma_to_timestep(scheduler, sigma)
    np.testing.assert_allclose(timestep, np.log(sigma.double().numpy()) / 4, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(timestep_to_sigma(scheduler, timestep), sigma, rtol=3e-6, atol=0)
    scheduler.set_timesteps(7)
    torch.testing.assert_close(timestep_to_sigma(scheduler, scheduler.timesteps), scheduler.sigmas[:-1])


@pytest.mark.parametrize("scheduler", FLOW)
def test_flow_matchings_timesteps_and_sigmas_are_inverse(scheduler):
    steps = scheduler.config.num_train_timesteps
    s = torch.linspace(0, 1, 1001, dtype=torch.float64)
    sigma = timestep_to_sigma(scheduler, (s * steps).float())
    torch.testing.assert_close(sigma[:-1], (s / (1 - s))[:-1].float(), rtol=1e-4, atol=0)
    assert sigma[0] == 0 and math.isinf(sigma[-1])
    back = sigma_to_timestep(scheduler, sigma)
    torch.testing.assert_close(back, (s * steps).float(), rtol=1e-6, atol=1e-5 * steps)
    assert sigma_to_timestep(scheduler, math.inf).item() == steps and sigma_to_timestep(scheduler, 0.0).item() == 0


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


# The schedulers that published checkpoints come with, and what each of them samples with.
TRAINED_WITH = [
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02, "num_train_timesteps": 200},
    {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
    {"trained_betas": [0.001 * n for n in range(1, 101)], "num_train_timesteps": 100},
]
SAMPLED_WITH = [
    (DDIMScheduler, {"timestep_spacing": "trailing", "steps_offset": 1, "set_alpha_to_one": False}),
    (PNDMScheduler, {"skip_prk_steps": True, "steps_offset": 1, "set_alpha_to_one": False}),
    (EulerDiscreteScheduler, {"use_karras_sigmas": True, "timestep_spacing": "leading", "steps_offset": 1}),
    (EulerDiscreteScheduler, {"use_exponential_sigmas": True, "interpolation_type": "linear"}),
    (EulerDiscreteScheduler, {"use_beta_sigmas": True, "final_sigmas_type": "sigma_min"}),
    (EulerAncestralDiscreteScheduler, {"timestep_spacing": "trailing"}),
    (LMSDiscreteScheduler, {"use_karras_sigmas": True}),
    (HeunDiscreteScheduler, {"use_karras_sigmas": True}),
    (KDPM2DiscreteScheduler, {"use_exponential_sigmas": True}),
    (KDPM2AncestralDiscreteScheduler, {"timestep_spacing": "leading"}),
    (DEISMultistepScheduler, {"solver_order": 3}),
    (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}),
    (DPMSolverMultistepScheduler, {"use_lu_lambdas": True, "lower_order_final": False}),
    (DPMSolverSinglestepScheduler, {"algorithm_type": "dpmsolver++", "solver_order": 1}),
    (UniPCMultistepScheduler, {"solver_order": 3, "use_beta_sigmas": True}),
    (LCMScheduler, {"original_inference_steps": 20, "timestep_scaling": 5.0}),
    (TCDScheduler, {"original_inference_steps": 20}),
]
OF_NO_SNR = [DDIMScheduler, EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, DPMSolverMultistepScheduler]
OF_NO_SNR += [UniPCMultistepScheduler, LCMScheduler, TCDScheduler]


def assert_same_levels(scheduler, trained, images):
    """A network fed by one of two schedulers is fed what the other says."""
    timesteps = torch.linspace(0, len(trained.alphas_cumprod) - 1, 333)
    sigmas = timestep_to_sigma(trained, timesteps)
    assert torch.equal(timestep_to_sigma(scheduler, timesteps), sigmas)
    assert torch.equal(sigma_to_timestep(scheduler, sigmas), sigma_to_timestep(trained, sigmas))
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(3))
    for sigma in (sigmas[0], sigmas[200], sigmas[-1]):
        ours, theirs = (add_noise(each, images, noise, sigma) for each in (scheduler, trained))
        assert all(map(torch.equal, ours, theirs))
        ours, theirs = (family_of(each).target(images, noise, sigma) for each in (scheduler, trained))
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("kind", "options"), SAMPLED_WITH)
@pytest.mark.parametrize("trained_with", TRAINED_WITH)
def test_levels_are_those_of_training_whatever_a_network_is_sampled_with(images, kind, options, trained_with):
    trained = DDPMScheduler(**trained_with)
    scheduler = kind(**options, **trained_with)
    assert_same_levels(scheduler, trained, images)
    assert_same_levels(kind.from_config(trained.config, **options), trained, images)
    scheduler.set_timesteps(7)
    assert_same_levels(scheduler, trained, images)


@pytest.mark.parametrize("kind", OF_NO_SNR)
def test_schedules_that_end_in_pure_noise_are_the_same_for_all_samplers(images, kind):
    options = {**TRAINED_WITH[0], "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    trained = DDPMScheduler(**options)
    scheduler = kind(**options)
    scheduler.set_timesteps(7)
    assert_same_levels(scheduler, trained, images)
    assert timestep_to_sigma(scheduler, 999) == math.inf


@pytest.mark.parametrize("kind", [DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler, UniPCMultistepScheduler])
def test_samplers_that_were_told_other_levels_are_refused_by_that_name(kind):
    with pytest.raises(ValueError, match=f"{kind.__name__} is not supported with use_flow_sigmas"):
        timestep_to_sigma(kind(use_flow_sigmas=True, prediction_type="flow_prediction"), 10)


@pytest.mark.parametrize("scheduler", FLOW)
def test_flow_matchings_input_is_diffusers_own_on_its_grid(scheduler, images):
    noise = torch.randn_like(images)
    scheduler.set_timesteps(7)
    timesteps = scheduler.timesteps.unique()[:5]
    sample, fed = add_noise(scheduler, images, noise, timestep_to_sigma(scheduler, timesteps))
    torch.testing.assert_close(fed, timesteps, rtol=1e-5, atol=1e-3)
    s = (timesteps / scheduler.config.num_train_timesteps).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(sample, (1 - s) * images + s * noise, rtol=1e-4, atol=1e-5)
    if hasattr(scheduler, "scale_noise") and isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        torch.testing.assert_close(sample, scheduler.scale_noise(images, timesteps, noise), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheduler", EDM)
@pytest.mark.parametrize("sigma", [0.002, 0.05, 0.5, 3.0, 80.0, 500.0])
def test_edms_preconditioning_is_the_papers_and_diffusers_own(scheduler, images, sigma):
    """c_in, c_skip, c_out and c_noise of table 1 in Karras et al. 2022, in float64."""
    noise, output = torch.randn_like(images), torch.randn_like(images)
    spread = scheduler.config.sigma_data
    c_in, c_skip = 1 / math.hypot(sigma, spread), spread**2 / (sigma**2 + spread**2)
    c_out = sigma * spread / math.hypot(sigma, spread)
    c_out = -c_out if scheduler.config.prediction_type == "v_prediction" else c_out
    noisy = images.double() + sigma * noise.double()
    sample, fed = add_noise(scheduler, images, noise, torch.tensor(sigma))
    torch.testing.assert_close(sample.double(), c_in * noisy, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fed.double(), torch.full((5,), math.log(sigma) / 4).double(), rtol=1e-6, atol=1e-7)
    clean = family_of(scheduler).denoised(sample, output, sigma)
    torch.testing.assert_close(clean.double(), c_skip * noisy + c_out * output, rtol=1e-5, atol=2e-5)
    theirs = scheduler.precondition_outputs(noisy.float(), output, sigma)
    torch.testing.assert_close(clean, theirs, rtol=1e-4, atol=1e-4)
    target = family_of(scheduler).target(images, noise, torch.tensor(sigma))
    torch.testing.assert_close(target.double(), (images.double() - c_skip * noisy) / c_out, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheduler", EDM)
def test_edms_weighted_error_of_the_image_is_the_error_of_the_output(scheduler, images):
    noise, output = torch.randn_like(images), torch.randn_like(images)
    sigma = torch.tensor([0.01, 0.1, 0.6, 2.0, 10.0])
    spread = scheduler.config.sigma_data
    weight = (sigma**2 + spread**2) / (sigma * spread) ** 2
    sample, _ = add_noise(scheduler, images, noise, sigma)
    of_image = weight * (family_of(scheduler).denoised(sample, output, sigma) - images).square().mean((1, 2, 3))
    of_output = (output - family_of(scheduler).target(images, noise, sigma)).square().mean((1, 2, 3))
    torch.testing.assert_close(of_image, of_output, rtol=1e-3, atol=0)


PREDICTIONS = [DDPMScheduler(prediction_type=kind) for kind in ("epsilon", "sample", "v_prediction")]


@pytest.mark.parametrize("scheduler", [*PREDICTIONS, *EDM, *FLOW, ZERO_SNR])
def test_the_prediction_target_stands_for_the_clean_image(scheduler, images):
    noise, sigma = torch.randn_like(images), torch.tensor([0.02, 0.1, 0.5, 2.0, 30.0])
    sample, _ = add_noise(scheduler, images, noise, sigma)
    target = family_of(scheduler).target(images, noise, sigma)
    torch.testing.assert_close(family_of(scheduler).denoised(sample, target, sigma), images, rtol=1e-3, atol=1e-4)


def test_all_frameworks_denoise_alike_at_equal_sigma(images):
    """The same noisy image, shown to perfect denoisers of Gaussian data, has the same clean image in each."""
    noise, sigma = torch.randn(5, 1, 4, 4), 0.7
    noisy = images[:, :1, :4, :4] + sigma * noise
    found = []
    for scheduler, framework in [(s, "ddpm") for s in PREDICTIONS] + [(EDM[0], "edm"), (FLOW[0], "flow")]:
        level = sigma
        if framework == "ddpm":  # the perfect denoiser knows whole timesteps only
            level = timestep_to_sigma(scheduler, sigma_to_timestep(scheduler, sigma).round()).item()
        clean = noisy - level * noise
        sample, fed = add_noise(scheduler, clean, noise, level)
        ideal = Ideal(framework, scheduler.config.get("prediction_type"), getattr(scheduler, "alphas_cumprod", None))
        found.append(family_of(scheduler).denoised(sample, ideal(sample, fed).sample, level))
        torch.testing.assert_close(found[-1].double(), closed_form(noisy, level), rtol=1e-4, atol=1e-5)


def test_add_noise_keeps_its_precision_at_small_levels():
    scheduler = DDPMScheduler(beta_start=1e-8, beta_end=1e-7, num_train_timesteps=10)
    sigma = family_of(scheduler).sigma_range()[0]
    sample, _ = add_noise(scheduler, torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2), sigma)
    assert sample[0, 0, 0, 0].item() == pytest.approx(sigma / math.sqrt(1 + sigma**2), rel=1e-6)


def test_infinite_sigma_is_pure_noise():
    assert math.isinf(family_of(ZERO_SNR).sigma_range()[1])
    clean, noise = torch.ones(2, 1, 2, 2), torch.randn(2, 1, 2, 2)
    sample, fed = add_noise(ZERO_SNR, clean, noise, math.inf)
    assert torch.equal(sample, noise) and fed.tolist() == [999.0, 999.0]
    assert torch.equal(family_of(ZERO_SNR).target(clean, noise, math.inf), -clean)
    sample, fed = add_noise(FLOW[0], clean, noise, math.inf)
    assert torch.equal(sample, noise) and fed.tolist() == [1000.0, 1000.0]
    assert torch.equal(family_of(FLOW[0]).target(clean, noise, math.inf), noise - clean)
    euler = EulerDiscreteScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    assert math.isinf(family_of(euler).sigma_range()[1])


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


# What a level may come as: all of it can be read.
FORMS = {
    "float": float,
    "float32": np.float32,
    "float64": np.float64,
    "0-dim": torch.tensor,
    "double": lambda level: torch.tensor(level, dtype=torch.float64),
    "bfloat16": lambda level: torch.tensor([level] * 5, dtype=torch.bfloat16),
    "one of five": lambda level: torch.tensor([0.5, 0.5, level, 0.5, 0.5]),
    "array": lambda level: np.array([0.5, 0.5, level, 0.5, 0.5]),
}
OUTSIDE = [
    (scheduler, -0.1, low, high) for scheduler, low, high in ((SCHEDULERS[0], "0.01", "157"), (FLOW[0], "0", "inf"))
]
OUTSIDE += [(SCHEDULERS[0], level, "0.01", "157") for level in (0.0, 0.005, 200.0, 1e6, math.inf, math.nan)]
OUTSIDE += [(EDM[0], level, "1.17", "1.8") for level in (-0.1, 0.0, 1e30, math.inf, math.nan)]
OUTSIDE += [(FLOW[0], math.nan, "0", "inf"), (ZERO_SNR, 0.001, "0.01", "inf")]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("scheduler", "sigma", "low", "high"), OUTSIDE)
def test_a_sigma_that_no_network_is_trained_at_is_refused(images, scheduler, sigma, low, high, form):
    level = FORMS[form](sigma)
    for attempt in (
        lambda: sigma_to_timestep(scheduler, level),
        lambda: add_noise(scheduler, images, images, level),
        lambda: family_of(scheduler).target(images, images, level),
        lambda: family_of(scheduler).denoised(images, images, level),
    ):
        with pytest.raises(ValueError, match=rf"sigma \S+ is outside the schedule of .*allowed are {low}.* to {high}"):
            attempt()


@pytest.mark.parametrize("sigma", [1e6, torch.tensor([0.5, 1e6])])
def test_the_error_names_the_level(scheduler, sigma):
    with pytest.raises(
        ValueError, match=r"sigma 1000000(\.0)? is outside the schedule of DDPMScheduler: allowed are 0.010001"
    ):
        sigma_to_timestep(scheduler, sigma)


@pytest.mark.parametrize("timestep", [-1, 1000, 5000, -math.inf, math.inf, math.nan])
@pytest.mark.parametrize("form", [*FORMS, "int64"])
def test_a_timestep_outside_the_schedule_is_refused(scheduler, timestep, form):
    whole = math.isfinite(timestep) and form == "int64"
    timestep = torch.tensor([10, timestep]) if whole else FORMS.get(form, float)(timestep)
    with pytest.raises(ValueError, match=r"timestep \S+ is outside the schedule.*allowed are 0 to 999"):
        timestep_to_sigma(scheduler, timestep)


@pytest.mark.parametrize("scheduler", [SCHEDULERS[0], EDM[0], FLOW[0], ZERO_SNR])
def test_what_cannot_be_read_is_no_level_where_it_is_outside(scheduler):
    """A graph that is compiled, and what is on a device, is not looked at."""
    sigma_to, timestep_to = (
        torch.compile(lambda level, convert=convert: convert(scheduler, level), fullgraph=True, backend="eager")
        for convert in (sigma_to_timestep, timestep_to_sigma)
    )
    outside, high = (
        torch.tensor([-1.0, 0.5, math.nan]),
        {"ddpm": 1000.0, "edm": 12.0, "flow": 1000.5}[family_of(scheduler).name],
    )
    assert sigma_to(outside).isnan().tolist() == [True, False, True]
    assert timestep_to(torch.tensor([-30.0, 1.0, high])).isnan().tolist() == [True, False, True]
    meta = torch.full((2,), 0.5, device="meta")
    assert sigma_to_timestep(scheduler, meta).shape == timestep_to_sigma(scheduler, meta).shape == (2,)


def test_levels_can_be_mapped_over(scheduler, images):
    levels = torch.tensor([0.1, 0.5, 20.0])
    mapped = torch.func.vmap(lambda sigma: add_noise(scheduler, images, torch.ones_like(images), sigma)[0])
    expected = [add_noise(scheduler, images, torch.ones_like(images), level)[0] for level in levels]
    torch.testing.assert_close(mapped(levels), torch.stack(expected))
    with pytest.raises(ValueError, match="sigma 500 is outside the schedule"):
        mapped(torch.tensor([0.1, 500.0, 20.0]))


def test_one_level_or_one_an_image_comes(scheduler, images):
    for sigma in (torch.full((4,), 0.5), torch.full((5, 1, 1, 1), 0.5)):
        with pytest.raises(ValueError, match="for 5 images: pass a scalar, or one sigma for each image"):
            add_noise(scheduler, images, images, sigma)


def test_ends_written_with_a_few_digits_are_inside(scheduler):
    low, high = family_of(scheduler).sigma_range()
    assert sigma_to_timestep(scheduler, float(f"{low:.6g}")).item() == 0
    assert sigma_to_timestep(scheduler, float(f"{high:.6g}")).item() == pytest.approx(999, abs=1e-2)
    printed = torch.tensor([float(f"{low:.5g}"), float(f"{high:.5g}")])  # the higher one is above the schedule
    compiled = torch.compile(partial(sigma_to_timestep, scheduler), fullgraph=True, backend="eager")
    assert sigma_to_timestep(scheduler, printed).tolist() == compiled(printed).tolist() == [0, 999]
    for outside in (low * (1 - 1e-4), high * (1 + 1e-4)):
        with pytest.raises(ValueError, match="outside the schedule"):
            sigma_to_timestep(scheduler, outside)


@pytest.mark.parametrize(
    "scheduler",
    [
        ScoreSdeVeScheduler(),
        FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
        EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"),
        torch.nn.Identity(),
    ],
)
def test_a_scheduler_of_no_known_framework_is_refused(scheduler, images):
    with pytest.raises(ValueError, match="is not supported.*allowed are DDPMScheduler.*EDMEulerScheduler.*FlowMatch"):
        add_noise(scheduler, images, images, 0.5)


def test_frameworks_have_names():
    assert [family_of(s).name for s in (SCHEDULERS[0], EDM[0], FLOW[0])] == ["ddpm", "edm", "flow"]
    assert {family_of(s).name for s in SCHEDULERS} == {"ddpm"} and {family_of(s).name for s in FLOW} == {"flow"}


@pytest.mark.parametrize(("sigma", "timestep"), [(0.001, -2.0), (81.0, 1.2), (math.inf, math.nan)])
@pytest.mark.parametrize("form", [float, torch.tensor])
def test_edms_levels_outside_the_samplers_range_are_those_of_training_alone(images, sigma, timestep, form):
    with pytest.raises(ValueError, match=r"sigma.*allowed are 0\.002 to 80"):
        family_of(EDM[0]).check_sigma(form(sigma))
    with pytest.raises(ValueError, match=r"timestep.*allowed are -1\.5537 to 1\.0955"):
        family_of(EDM[0]).check_timestep(form(timestep))
    if math.isfinite(sigma):
        sample, fed = add_noise(EDM[0], images, images, form(sigma))
        expected = images * (1 + sigma) / math.hypot(sigma, 0.5)
        torch.testing.assert_close(sample, expected)
        assert fed.tolist() == pytest.approx([math.log(sigma) / 4] * 5)


def test_edms_ends_as_they_are_printed_are_inside():
    for timestep, sigma in ((-1.5537, 0.002), (1.0955, 80.0)):
        family_of(EDM[0]).check_timestep(timestep)
        assert timestep_to_sigma(EDM[0], timestep).item() == pytest.approx(sigma, rel=1e-3)


@pytest.mark.parametrize("options", [{"sigma_data": 0.0}, {"sigma_min": 0.0}, {"sigma_min": 3.0, "sigma_max": 2.0}])
def test_levels_that_cannot_be_are_refused(images, options):
    scheduler = EDMEulerScheduler()
    scheduler.register_to_config(**options)
    with pytest.raises(ValueError, match="they must be positive, and sigma_min must be smaller"):
        family_of(scheduler).sigma_range()


@pytest.mark.parametrize("moments", [(math.nan, 1.0), (0.0, 0.0), (0.0, -1.0), (math.inf, 1.0)])
def test_distributions_that_cannot_be_are_refused(moments):
    with pytest.raises(ValueError, match="must be finite, the deviation positive"):
        family_of(EDM[0]).draw(2, log_normal=moments)


def test_flow_matching_takes_every_level_from_none_to_pure_noise(images):
    assert family_of(FLOW[0]).sigma_range() == (0, math.inf)
    assert torch.equal(add_noise(FLOW[0], images, torch.ones_like(images), 0.0)[0], images)
    with pytest.raises(ValueError, match="allowed are 0 to inf"):
        add_noise(FLOW[0], images, images, -0.1)
    with pytest.raises(ValueError, match="allowed are 0 to 1000"):
        timestep_to_sigma(FLOW[0], 1000.5)


def test_a_learned_time_embedding_has_whole_timesteps_alone():
    unet = make_unet(time_embedding_type="learned", num_train_timesteps=1000)
    network_of(unet).check_timesteps(unet.config, SCHEDULERS[0])
    for scheduler in (EDM[0], FLOW[0]):
        with pytest.raises(ValueError, match="time_embedding_type is 'learned'.*set it to 'positional'"):
            network_of(unet).check_timesteps(unet.config, scheduler)


@pytest.mark.parametrize("scheduler", [SCHEDULERS[0], EDM[0], FLOW[0]])
def test_a_fourier_time_embedding_suits_no_scheduler(scheduler):
    """It takes the logarithm of timesteps, and every family has some that are 0 or below."""
    unet = make_unet(time_embedding_type="fourier")
    assert not unet(torch.zeros(1, 3, 8, 8), 0).sample.isfinite().any()
    with pytest.raises(ValueError, match="time_embedding_type is 'fourier'.*[Ss]et it to 'positional'"):
        network_of(unet).check_timesteps(unet.config, scheduler)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_diffusers_recovers_the_image_from_the_prediction_target(images, kind):
    """A perfect prediction, put through DDIM's own formula for the clean image, gives the clean image."""
    scheduler = DDIMScheduler(prediction_type=kind, clip_sample=False)
    scheduler.set_timesteps(1000)
    noise = torch.randn_like(images)
    for timestep in (0, 300, 900):
        sigma = timestep_to_sigma(scheduler, timestep)
        noisy, _ = add_noise(scheduler, images, noise, sigma)
        target = family_of(scheduler).target(images, noise, sigma)
        recovered = scheduler.step(target, timestep, noisy).pred_original_sample
        torch.testing.assert_close(recovered, images, rtol=1e-3, atol=1e-3)


def test_predictions_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="zero-terminal SNR"):
        family_of(DDPMScheduler(rescale_betas_zero_snr=True)).prediction  # noqa: B018
    with pytest.raises(ValueError, match="'flow' is not supported"):
        family_of(DDPMScheduler(prediction_type="flow")).prediction  # noqa: B018
    with pytest.raises(ValueError, match="'sample' is not supported with EDMDPMSolver.*allowed are epsilon, v_predic"):
        family_of(EDMDPMSolverMultistepScheduler(prediction_type="sample")).prediction  # noqa: B018


def test_training_levels_are_uniform_over_timesteps():
    scheduler = DDPMScheduler(num_train_timesteps=10)
    sigma = family_of(scheduler).draw(20_000, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(sigma_to_timestep(scheduler, sigma).long(), minlength=10)
    assert counts.sum() == 20_000 and ((counts - 2000).abs() < 5 * math.sqrt(2000)).all()


def test_edms_training_levels_are_log_normal():
    log_sigma = family_of(EDM[0]).draw(40_000, generator=torch.Generator().manual_seed(0)).log()
    assert log_sigma.mean().item() == pytest.approx(-1.2, abs=0.03) and log_sigma.std().item() == pytest.approx(
        1.2, 0.02
    )
    other = family_of(EDM[0]).draw(40_000, log_normal=(0.4, 1.0)).log()
    assert other.mean().item() == pytest.approx(0.4, abs=0.03) and other.std().item() == pytest.approx(1.0, 0.02)


def test_flow_matchings_times_are_uniform_or_logit_normal():
    generator = torch.Generator().manual_seed(0)
    s = sigma_to_timestep(FLOW[0], family_of(FLOW[0]).draw(40_000, generator=generator)) / 1000
    counts = torch.histc(s, 10, 0, 1)
    assert counts.sum() == 40_000 and ((counts - 4000).abs() < 5 * math.sqrt(4000)).all()
    s = sigma_to_timestep(FLOW[0], family_of(FLOW[0]).draw(40_000, log_normal=(0.0, 1.0))) / 1000
    assert torch.logit(s).mean().abs() < 0.03 and torch.logit(s).std().item() == pytest.approx(1, abs=0.02)


def test_log_normal_levels_of_a_schedule_of_timesteps_end_where_it_does():
    scheduler = SCHEDULERS[0]
    low, high = family_of(scheduler).sigma_range()
    torch.manual_seed(0)
    sigma = family_of(scheduler).draw(40_000, log_normal=(0.0, 1.5))
    assert sigma.min() == low and sigma.max() <= high
    assert sigma_to_timestep(scheduler, sigma).isfinite().all()
    # The quantiles of a normal distribution, which clamping its ends leaves as they are.
    quartiles = sigma.log().double().quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    torch.testing.assert_close(quartiles, torch.tensor([-1.0117, 0.0, 1.0117], dtype=torch.float64), rtol=0, atol=0.03)
    assert family_of(scheduler).draw(8, log_normal=(50.0, 0.1)).tolist() == [high] * 8


@pytest.mark.parametrize("scheduler", [SCHEDULERS[0], EDM[0], FLOW[0]])
@pytest.mark.parametrize("sigma", [0.3, torch.full((5,), 0.3)])
def test_add_noise_compiles_without_a_graph_break(scheduler, images, sigma):
    def function(x, sigma):
        return add_noise(scheduler, x, torch.ones_like(x), sigma)

    compiled = torch.compile(function, fullgraph=True, backend="eager")(images, sigma)
    torch.testing.assert_close(compiled, function(images, sigma))


@pytest.mark.parametrize("scheduler", [SCHEDULERS[0], EDM[0], FLOW[0]])
def test_a_scalar_is_checked_in_a_compiled_graph_too(scheduler, images):
    def function(x, sigma):
        return add_noise(scheduler, x, torch.ones_like(x), sigma)[0]

    whole, parts = (torch.compile(function, fullgraph=fullgraph, backend="eager") for fullgraph in (True, False))
    for sigma in (0.3, -2.0, 0.4, -3.0, math.nan):  # from its second value on, a scalar is a symbol of the graph
        if sigma > 0:
            torch.testing.assert_close(whole(images, sigma), function(images, sigma))
            continue
        with pytest.raises((ValueError, RuntimeError), match=f"sigma {sigma} is outside the schedule of .*allowed are"):
            whole(images, sigma)
        with pytest.raises(ValueError, match=f"sigma {sigma} is outside the schedule"):
            parts(images, sigma)


def levels_on(device, scheduler):
    return sigma_to_timestep(scheduler, torch.full((2,), 0.5, device=device))


def test_a_schedule_is_converted_once_a_device_and_anew_when_it_is_another(monkeypatch, images):
    conversions = []
    monkeypatch.setattr(
        "ddae_hf.noise._schedule", lambda *schedule: conversions.append(schedule) or _schedule(*schedule)
    )
    scheduler = DDPMScheduler()
    before = pickle.dumps(scheduler)
    _kept_schedule.cache_clear()
    for _ in range(2):
        add_noise(scheduler, images, images, 0.5)
        levels_on("cpu", scheduler)
    assert len(conversions) == 1 and pickle.dumps(scheduler) == before
    levels_on("meta", scheduler)
    levels_on("meta", scheduler)
    assert len(conversions) == 2
    scheduler.alphas_cumprod = scheduler.alphas_cumprod**2
    squared = timestep_to_sigma(scheduler, 10)
    scheduler.alphas_cumprod.sqrt_()
    torch.testing.assert_close(timestep_to_sigma(scheduler, 10), timestep_to_sigma(DDPMScheduler(), 10))
    assert squared > timestep_to_sigma(scheduler, 10)


class Levels(torch.nn.Module):
    scheduler = DDPMScheduler()

    def forward(self, images, sigma):
        return add_noise(self.scheduler, images, torch.ones_like(images), sigma)


def fake(module, inputs):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return module(*map(mode.from_tensor, inputs))


RECORDERS = {
    "compile": lambda module, inputs: torch.compile(module, fullgraph=True, backend="aot_eager")(*inputs),
    "strict export": lambda module, inputs: torch.export.export(module, inputs, strict=True).module()(*inputs),
    "export": lambda module, inputs: torch.export.export(module, inputs, strict=False).module()(*inputs),
    "trace": lambda module, inputs: torch.jit.trace(module, inputs, check_trace=False)(*inputs),
    "symbolic trace": lambda module, inputs: make_fx(module)(*inputs)(*inputs),
    "fake tensors": fake,
}


@pytest.mark.parametrize("recorder", RECORDERS)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_what_is_recorded_keeps_no_schedule(images, recorder):
    _kept_schedule.cache_clear()
    inputs = (images, torch.full((5,), 0.5))
    sample, timestep = RECORDERS[recorder](Levels(), inputs)
    assert _kept_schedule.cache_info().currsize == 0
    expected, fed = Levels()(*inputs)
    assert type(fed) is torch.Tensor and _kept_schedule.cache_info().currsize == 1
    if recorder != "fake tensors":
        torch.testing.assert_close(sample, expected)
        torch.testing.assert_close(timestep, fed)


def test_a_compiled_graph_serves_every_schedule_as_it_is():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(sigma_to_timestep, fullgraph=True, backend=backend)
    sigma = torch.tensor([0.5])
    for i in range(10):
        scheduler = DDPMScheduler(beta_end=0.02 + 0.001 * i)
        assert torch.equal(compiled(scheduler, sigma), sigma_to_timestep(scheduler, sigma))
    scheduler.alphas_cumprod.mul_(0.9)
    assert torch.equal(compiled(scheduler, sigma), sigma_to_timestep(scheduler, sigma))
    assert len(graphs) <= 2  # the second where numbers of the configuration differ


@pytest.mark.parametrize("edit", ["by numpy", "by its data", "by inference"])
def test_a_schedule_that_was_edited_counts(edit):
    scheduler, sigma = DDPMScheduler(), torch.tensor(1.0)
    if edit == "by inference":
        with torch.inference_mode():
            scheduler.alphas_cumprod = scheduler.alphas_cumprod * 1
    before = sigma_to_timestep(scheduler, sigma)
    if edit == "by numpy":
        scheduler.alphas_cumprod.numpy()[:] *= 0.9
    elif edit == "by its data":
        scheduler.alphas_cumprod.data.mul_(0.9)
    else:
        with torch.inference_mode():
            scheduler.alphas_cumprod.mul_(0.9)
    fresh = DDPMScheduler()
    fresh.alphas_cumprod = torch.tensor(scheduler.alphas_cumprod.tolist())
    assert torch.equal(sigma_to_timestep(scheduler, sigma), sigma_to_timestep(fresh, sigma)) and before > 250


@pytest.mark.parametrize("first", [torch.inference_mode(), torch.func.grad])
def test_a_schedule_kept_first_by_inference_or_a_transform_can_be_trained_with(first):
    _kept_schedule.cache_clear()
    scheduler = DDPMScheduler()
    first(lambda sigma: sigma_to_timestep(scheduler, sigma))(torch.tensor(0.5))
    kept = family_of(scheduler).sigmas(torch.device("cpu"))
    assert torch.func.debug_unwrap(kept) is kept and _kept_schedule.cache_info().misses == 1
    sigma = torch.tensor(0.5, requires_grad=True)
    sigma_to_timestep(scheduler, sigma).backward()
    assert sigma.grad > 0


@pytest.mark.parametrize("scheduler", [DDPMScheduler(), DDIMScheduler(), EDMEulerScheduler(), FLOW[0]])
def test_sampling_with_a_family_is_sampling_with_its_scheduler(scheduler, images):
    """The calls that diffusers' own pipelines make, written out."""
    group, generator = family_of(scheduler), torch.Generator()
    scheduler.set_timesteps(4)
    flow = group.name == "flow"
    group.check_steps()
    sample = group.first_sample(images)
    assert torch.equal(sample, images if flow else images * scheduler.init_noise_sigma)
    fed = group.model_input(sample, scheduler.timesteps[0])
    own = copy.deepcopy(scheduler)
    assert torch.equal(fed, sample if flow else own.scale_model_input(sample, own.timesteps[0]))
    stepped = group.step(fed, scheduler.timesteps[0], sample, generator.manual_seed(3))
    seeded = {"generator": generator.manual_seed(3)} if type(scheduler) is not DDIMScheduler else {}
    assert torch.equal(stepped, own.step(fed, own.timesteps[0], sample, **seeded).prev_sample)


def test_schedulers_whose_steps_need_more_are_refused():
    with pytest.raises(ValueError, match="RePaintScheduler takes steps that need more than an image and its noise"):
        family_of(RePaintScheduler()).check_steps()


def test_samplers_are_those_that_suit_the_schedulers_levels():
    assert family_of(EDM[0]).samplers == ("heun",)
    for scheduler in (SCHEDULERS[0], EDM[-1], FLOW[0]):
        group = family_of(scheduler)
        assert group.samplers == ()
        group.check_sampler(None)
        with pytest.raises(
            ValueError, match="sampler='heun' needs an EDMEulerScheduler, not a .*Scheduler: .*EDM, set"
        ):
            group.check_sampler("heun")
    family_of(EDM[0]).check_sampler("heun")
    with pytest.raises(ValueError, match="sampler is 'euler': allowed are 'heun', and None for the scheduler's own"):
        family_of(EDM[0]).check_sampler("euler")


def test_every_framework_has_a_scheduler_to_begin_with():
    for name in ("ddpm", "edm", "flow"):
        assert family_of(new_scheduler(name)).name == name
    assert new_scheduler("edm", sigma_data=1.0).config.sigma_data == 1.0
    with pytest.raises(ValueError, match="framework is 'score': allowed are ddpm, edm, flow"):
        new_scheduler("score")


@pytest.mark.parametrize("scheduler", [SCHEDULERS[0], EDM[0], FLOW[0]])
def test_a_sample_that_holds_its_noise_is_scaled_as_an_image_without(scheduler, images):
    scaled, fed = family_of(scheduler).scaled(images, 0.7)
    expected, timestep = add_noise(scheduler, images, torch.zeros_like(images), 0.7)
    assert torch.equal(scaled, expected) and torch.equal(fed, timestep)


class TrigFlow(Family):
    """The network sees `cos(t) x + sin(t) n` (Lu and Song 2024, arXiv 2410.11081): diffusers' SCMScheduler."""

    name = "trigflow"
    title = "TrigFlow"
    default_scheduler = "SCMScheduler"
    schedulers = (default_scheduler,)
    predictions = ("trigflow",)

    def sigma_range(self):
        return 0.0, math.inf

    def timestep_range(self):
        return 0.0, math.pi / 2

    def to_sigma(self, timestep):
        return rounded(timestep.double(), 0, math.pi / 2).tan().float()

    def to_timestep(self, sigma):
        return rounded(sigma, 0, math.inf).atan()

    def input_shares(self, sigma):
        return sigma.atan().cos(), sigma.atan().sin()

    def target_shares(self, sigma):
        return -sigma.atan().sin(), sigma.atan().cos()

    def usual(self, share):
        return self.to_sigma(share * (math.pi / 2))


def test_adding_a_family(images):
    scheduler, pixels = SCMScheduler(), torch.randn_like(images)
    with pytest.raises(ValueError, match="SCMScheduler is not supported"):
        family_of(scheduler)
    register(TrigFlow)
    try:
        sigma = torch.tensor([0.0, 0.1, 1.0, 30.0, math.inf])
        torch.testing.assert_close(timestep_to_sigma(scheduler, sigma_to_timestep(scheduler, sigma))[:4], sigma[:4])
        noisy, timestep = add_noise(scheduler, images, pixels, sigma)
        assert torch.equal(noisy[0], images[0]) and timestep[2] == pytest.approx(math.pi / 4)
        answer = family_of(scheduler).target(images, pixels, sigma)
        torch.testing.assert_close(family_of(scheduler).denoised(noisy, answer, sigma), images)
        scheduler.set_timesteps(1, intermediate_timesteps=None)
        stepped = scheduler.step(answer[4:], scheduler.timesteps[0], noisy[4:])
        torch.testing.assert_close(stepped.pred_original_sample, images[4:], rtol=1e-4, atol=1e-4)
        loss = Diffusion(make_unet(), new_scheduler("trigflow")).loss(images)
        assert loss.shape == (5,) and loss.isfinite().all()
        with pytest.raises(ValueError, match=r"flow matching's \(.*\) and TrigFlow's \(SCMScheduler\)"):
            family_of(ScoreSdeVeScheduler())
    finally:
        FAMILIES.remove(TrigFlow)
    with pytest.raises(ValueError, match="SCMScheduler is not supported"):
        family_of(scheduler)
