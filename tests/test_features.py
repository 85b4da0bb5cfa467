"""Features of a data set against the model's own forward."""

import pytest
import torch

from ddae_hf import DDAEConfig, DDAEModel
from ddae_hf.checkpoints import plain_config
from ddae_hf.features import extract_features
from ddae_hf.noise import indexed_noise

from .conftest import make_unet

LAYERS = ["mid_block", "up_blocks.1.resnets.0"]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return DDAEModel(DDAEConfig(denoiser=plain_config(make_unet()))).eval()


def test_features_do_not_depend_on_how_the_images_are_batched(model, images):
    whole = extract_features(model, [images], LAYERS, 0.5)
    pieces = extract_features(model, [images[:2], images[2:3], images[3:]], LAYERS, 0.5)
    for layer in LAYERS:
        assert whole[layer].shape[0] == 5 and whole[layer].dtype == torch.float32
        torch.testing.assert_close(pieces[layer], whole[layer], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_each_image_gets_its_own_noise(model, images):
    noise = indexed_noise((3, 8, 8), range(5), seed=3, view=1)
    expected = [
        model(images[i : i + 1], sigma=0.5, noise=noise[i : i + 1], output_hidden_states=LAYERS) for i in range(5)
    ]
    found = extract_features(model, [images], LAYERS, 0.5, noise_seed=3, view=1)
    for j, layer in enumerate(LAYERS):
        rows = torch.cat([outputs.hidden_states[j].mean((2, 3)) for outputs in expected])
        torch.testing.assert_close(found[layer], rows, rtol=1e-4, atol=1e-5)
    same = extract_features(model, [images[:1].expand(4, -1, -1, -1)], LAYERS, 0.5)
    assert (same["mid_block"][0] - same["mid_block"][1]).abs().max() > 1e-3


@torch.no_grad()
def test_features_are_averaged_over_the_draws_of_noise(model, images):
    noise = indexed_noise((3, 3, 8, 8), range(5))
    model.config.num_noise_samples = 3
    found = extract_features(model, [images], LAYERS, 0.5)
    singles = [model(images, sigma=0.5, noise=noise[:, k], output_hidden_states=LAYERS) for k in range(3)]
    for j, layer in enumerate(LAYERS):
        rows = torch.stack([outputs.hidden_states[j].mean((2, 3)) for outputs in singles]).mean(0)
        torch.testing.assert_close(found[layer], rows, rtol=1e-4, atol=1e-5)


def test_an_empty_data_set_is_refused(model):
    with pytest.raises(ValueError, match="empty"):
        extract_features(model, [], LAYERS, 0.5)
