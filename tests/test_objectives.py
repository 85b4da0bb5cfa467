"""Training losses against their definitions."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.models.unets.unet_2d import UNet2DOutput

from ddae_hf.noise import prediction_target, sample_training_sigma, timestep_to_sigma
from ddae_hf.objectives import denoising_loss

from .conftest import make_unet


def test_noise_prediction_loss_is_ho_et_als(unet, scheduler, images):
    """Equation 14: the squared error of the predicted noise, at diffusers' own noisy image."""
    noise = torch.randn_like(images)
    timesteps = torch.tensor([0, 10, 200, 600, 999])
    with torch.no_grad():
        loss = denoising_loss(unet, scheduler, images, sigma=timestep_to_sigma(scheduler, timesteps), noise=noise)
        predicted = unet(scheduler.add_noise(images, noise, timesteps), timesteps).sample
    torch.testing.assert_close(loss, (predicted - noise).square().mean((1, 2, 3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_a_perfect_denoiser_has_no_loss(images, kind):
    scheduler = DDPMScheduler(prediction_type=kind)
    noise, sigma = torch.randn_like(images), sample_training_sigma(scheduler, 5)
    perfect = Perfect(prediction_target(scheduler, images, noise, sigma))
    assert denoising_loss(perfect, scheduler, images, sigma=sigma, noise=noise).max() == 0


class Perfect(torch.nn.Module):
    """Answers with the target."""

    config = make_unet().config

    def __init__(self, target):
        super().__init__()
        self.target = target

    def forward(self, sample, timestep):
        return UNet2DOutput(sample=self.target)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_every_parameter_gets_a_gradient_and_training_lowers_the_loss(images, kind):
    torch.manual_seed(0)
    unet, scheduler = make_unet().train(), DDPMScheduler(prediction_type=kind)
    noise, sigma = torch.randn_like(images), sample_training_sigma(scheduler, 5)
    optimizer = torch.optim.Adam(unet.parameters(), 1e-3)
    losses = []
    for _ in range(15):
        loss = denoising_loss(unet, scheduler, images, sigma=sigma, noise=noise).mean()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in unet.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_the_generator_makes_a_loss_reproducible(unet, scheduler, images):
    losses = [
        denoising_loss(unet, scheduler, images, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
    ]
    assert torch.equal(losses[0], losses[1]) and not torch.equal(losses[0], losses[2])
    assert losses[0].shape == (5,) and losses[0].dtype == torch.float32
