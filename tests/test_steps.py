"""What the demo's page shows of sampling: steps, and what the network takes the image for; without gradio."""

import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

from ddae_hf import DDAEPipeline
from ddae_hf.demo import steps as sampling
from ddae_hf.latents import decode

from .conftest import make_unet
from .ideal import Ideal, closed_form

GREY = {"in_channels": 1, "out_channels": 1, "block_out_channels": (32, 32)}
SCHEDULERS = {"ddpm": DDIMScheduler, "edm": EDMEulerScheduler, "flow": FlowMatchEulerDiscreteScheduler}
LATENTS = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("framework", SCHEDULERS)
def test_a_stream_of_steps_ends_with_the_pipelines_images(framework):
    pipeline = DDAEPipeline.for_denoiser(make_unet(**GREY), SCHEDULERS[framework]())
    pipeline.set_progress_bar_config(disable=True)
    seeded = {"batch_size": 2, "num_inference_steps": 6}
    own = sampling.own_pipeline(pipeline)
    steps = list(sampling.stream(own, 3, generator=torch.Generator().manual_seed(0), **seeded))
    expected = pipeline(generator=torch.Generator().manual_seed(0), output_type="pt", **seeded).images
    last, _, final = steps[-1]
    torch.testing.assert_close((last.sample / 2 + 0.5).clamp(0, 1), expected)
    assert [step.number for step, _, _ in steps] == [1, 2, 3, 4, 5, 6]
    assert [step.number for step, _, estimate in steps if estimate is not None] == [1, 4, 6]
    sigmas = [sigma for _, sigma, _ in steps]
    assert sigmas == sorted(sigmas, reverse=True) and sigmas[-1] == 0
    torch.testing.assert_close(final, last.sample[0])


@pytest.mark.parametrize(("framework", "sampler"), [*((name, None) for name in SCHEDULERS), ("edm", "heun")])
def test_a_perfect_networks_estimates_are_what_it_expects(framework, sampler):
    options = {"clip_sample": False, "prediction_type": "v_prediction"} if framework == "ddpm" else {}
    scheduler = SCHEDULERS[framework](**options)
    ideal = Ideal(framework, options.get("prediction_type"), getattr(scheduler, "alphas_cumprod", None))
    pipeline = sampling.own_pipeline(DDAEPipeline(ideal, scheduler))
    generator = torch.Generator().manual_seed(0)
    steps = list(sampling.stream(pipeline, 5, generator=generator, num_inference_steps=5, sampler=sampler))
    for step, sigma, estimate in steps[:-1]:
        share = {"ddpm": (1 + sigma**2) ** -0.5, "edm": 1, "flow": 1 / (1 + sigma)}[framework]
        torch.testing.assert_close(estimate.double(), closed_form(step.sample[0] / share, sigma), atol=2e-3, rtol=0)


def test_the_first_of_several_classes_is_estimated():
    """At its first step, after which rounding makes batches of two sizes drift apart."""
    unet, found = make_unet(**GREY, num_class_embeds=4), []
    for options in ({"class_labels": [1, 2], "latents": LATENTS}, {"class_labels": 1, "latents": LATENTS[:1]}):
        _, _, estimate = next(sampling.stream(DDAEPipeline(unet, DDIMScheduler()), 3, **options))
        found.append(estimate)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-2)


def test_closing_a_stream_ends_the_sampling():
    pipeline = DDAEPipeline.for_denoiser(make_unet(**GREY), DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    calls = []
    pipeline.denoiser.register_forward_hook(lambda *_: calls.append(None))
    steps = sampling.stream(pipeline, 2, num_inference_steps=300)
    assert next(steps)[0].number == 1
    steps.close()
    assert len(calls) == 2  # a step's, and an estimate's


def test_latents_are_shown_decoded(latent_dit):
    pipeline = DDAEPipeline.from_pretrained(latent_dit)
    options = {"batch_size": 2, "class_labels": 1, "num_inference_steps": 4}
    own = sampling.own_pipeline(pipeline)
    steps = list(sampling.stream(own, 2, generator=torch.Generator().manual_seed(0), **options))
    estimates = [estimate for _, _, estimate in steps]
    assert [estimate is not None for estimate in estimates] == [True, False, False, True]
    assert estimates[0].shape == (4, 8, 8)
    last = steps[-1][0].sample
    shown = sampling.visible(own.vae, last)
    expected = pipeline(generator=torch.Generator().manual_seed(0), output_type="pt", **options).images
    torch.testing.assert_close((shown / 2 + 0.5).clamp(0, 1), expected)
    with torch.no_grad():
        torch.testing.assert_close(shown, decode(pipeline.vae, last))
