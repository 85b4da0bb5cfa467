"""Networks that are told a text, of every layout: what they are told, and their hidden states."""

import pytest
import torch

from ddae_hf import DDAEModel, collect_hidden_states, embed_prompts, layer_names

from .stock import LAYOUTS, batched, denoiser_of, first_call, noisy_input, outputs_of

PROMPTS = ["a cat", "the red dog"]
TIMESTEP = 261


@pytest.fixture(params=list(LAYOUTS))
def layout(request, stock_layout):
    return stock_layout(request.param)


@pytest.fixture(scope="module")
def opened(stock_layout):
    """A model of each layout that is only read, by the folder."""
    return {}


def model_of(folder, opened):
    if folder not in opened:
        opened[folder] = DDAEModel.from_pretrained(folder).eval()
    return opened[folder]


def batch(model):
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(2, 3, *model.config.image_size, generator=generator) * 2 - 1
    return images, torch.randn(2, *model.config.sample_shape, generator=generator)


@torch.no_grad()
@pytest.mark.parametrize("told", ["no text", "one text each"])
def test_every_tap_is_that_of_the_stock_pipelines_call(layout, opened, told):
    pipeline, folder = layout
    model = model_of(folder, opened)
    assert all(map(torch.equal, model.denoiser.parameters(), denoiser_of(pipeline).parameters()))
    if told == "no text":
        args, keywords = first_call(pipeline, PROMPTS[:1])
        keywords = batched(keywords, lambda value: value.chunk(2)[0].repeat(2, *[1] * (value.ndim - 1)))
    else:
        args, keywords = first_call(pipeline, PROMPTS)
        keywords = batched(keywords, lambda value: value.chunk(2)[1].clone())
    images, noise = batch(model)
    clean = model.encode(images)
    noisy, timestep = noisy_input(pipeline, clean, noise, TIMESTEP)
    if "timestep" in keywords:
        keywords["timestep"] = timestep.expand(2)
    condition = None if told == "no text" else embed_prompts(folder, PROMPTS)
    diffusion = model.diffusion
    own = diffusion.network.keywords(diffusion.conditions(condition, 2, "cpu"))
    torch.testing.assert_close(own, {name: keywords[name] for name in own}, rtol=1e-5, atol=1e-6)
    # The last bit of a product may differ with where factors lie in memory: the model's own network is called, with
    # copies of its own embeddings.
    keywords |= batched(own, torch.clone)
    names = layer_names(model.denoiser, inner=True)
    expected = outputs_of(model.denoiser, names, noisy, *([timestep] if len(args) > 1 else []), **keywords)
    fed = diffusion.family.noisy(clean, noise, diffusion.family.sigma(TIMESTEP))
    torch.testing.assert_close(fed[0], noisy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fed[1], timestep.expand(2).float(), rtol=1e-6, atol=0)
    for stop_early in (False, True):
        found = collect_hidden_states(model.denoiser, noisy, timestep.expand(2), names, stop_early=stop_early, **own)
        for name in names:
            assert torch.equal(found[name], expected[name]), name
            alone = collect_hidden_states(
                model.denoiser, noisy, timestep.expand(2), [name], stop_early=stop_early, **own
            )
            assert torch.equal(alone[name], expected[name]), name
    read = model.read_layers(clean, names, condition, timestep=TIMESTEP, noise=noise)
    for name in names:
        torch.testing.assert_close(read[name], expected[name], rtol=1e-3, atol=1e-4)
