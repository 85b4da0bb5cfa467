"""Training losses against their definitions."""

import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.models.unets.unet_2d import UNet2DOutput

from ddae_hf.noise import prediction_target, sample_training_sigma, timestep_to_sigma
from ddae_hf.objectives import denoising_loss

from .conftest import make_dit, make_unet
from .ideal import MEAN, STD, Ideal


def test_noise_prediction_loss_is_ho_et_als(unet, scheduler, images):
    """Equation 14: the squared error of the predicted noise, at diffusers' own noisy image."""
    noise = torch.randn_like(images)
    timesteps = torch.tensor([0, 10, 200, 600, 999])
    with torch.no_grad():
        loss = denoising_loss(unet, scheduler, images, sigma=timestep_to_sigma(scheduler, timesteps), noise=noise)
        predicted = unet(scheduler.add_noise(images, noise, timesteps), timesteps).sample
    torch.testing.assert_close(loss, (predicted - noise).square().mean((1, 2, 3)), rtol=1e-4, atol=1e-5)


SCHEDULERS = [DDPMScheduler(prediction_type=kind) for kind in ("epsilon", "sample", "v_prediction")]
SCHEDULERS += [EDMEulerScheduler(), FlowMatchEulerDiscreteScheduler()]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_perfect_answer_has_no_loss(images, scheduler):
    noise, sigma = torch.randn_like(images), sample_training_sigma(scheduler, 5)
    perfect = Perfect(prediction_target(scheduler, images, noise, sigma))
    assert denoising_loss(perfect, scheduler, images, sigma=sigma, noise=noise).max() == 0


class Perfect(torch.nn.Module):
    """Answers with the target."""

    config, class_embedding = make_unet().config, None

    def __init__(self, target):
        super().__init__()
        self.target = target

    def forward(self, sample, timestep):
        return UNet2DOutput(sample=self.target)


def edm_minimum(sigma, sigma_data):
    """The expected loss of the best denoiser: EDM's weight times the variance that the noisy image leaves open."""
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    return weight * STD**2 * sigma**2 / (STD**2 + sigma**2)


@pytest.mark.parametrize("sigma_data", [STD, 0.5, 1.0])
@pytest.mark.parametrize("sigma", [0.05, 0.5, 5.0])
def test_edms_loss_on_gaussian_data_has_its_known_minimum_at_the_perfect_denoiser(sigma, sigma_data):
    generator = torch.Generator().manual_seed(0)
    clean = MEAN + STD * torch.randn(4000, 1, 4, 4, generator=generator)
    noise = torch.randn(4000, 1, 4, 4, generator=generator)
    scheduler, level = EDMEulerScheduler(sigma_data=sigma_data), torch.full((4000,), sigma)
    ideal = Ideal("edm", sigma_data=sigma_data)
    best = denoising_loss(ideal, scheduler, clean, sigma=level, noise=noise).mean().item()
    assert best == pytest.approx(edm_minimum(sigma, sigma_data), rel=0.02)
    for gain in (0.0, 2.0):
        with torch.no_grad():
            worse = denoising_loss(Scaled(ideal, gain), scheduler, clean, sigma=level, noise=noise).mean().item()
        assert worse > best


def test_training_on_gaussian_data_reaches_the_minimum():
    """A network of two numbers, which can be perfect at one level, learns what the closed form says."""
    torch.manual_seed(0)
    scheduler, sigma = EDMEulerScheduler(sigma_data=0.6), 0.5
    affine = Affine()
    optimizer = torch.optim.Adam(affine.parameters(), 0.05)
    for _ in range(400):
        clean = MEAN + STD * torch.randn(256, 1, 4, 4)
        loss = denoising_loss(affine, scheduler, clean, sigma=torch.full((256,), sigma)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    clean = MEAN + STD * torch.randn(8000, 1, 4, 4)
    with torch.no_grad():
        reached = denoising_loss(affine, scheduler, clean, sigma=torch.full((8000,), sigma)).mean().item()
    assert reached == pytest.approx(edm_minimum(sigma, 0.6), rel=0.02)


class Scaled(torch.nn.Module):
    """A network with its output scaled."""

    def __init__(self, network, gain):
        super().__init__()
        self.network, self.gain = network, gain
        self.config, self.class_embedding = network.config, None

    def forward(self, sample, timestep):
        return UNet2DOutput(sample=self.gain * self.network(sample, timestep).sample)


class Affine(torch.nn.Module):
    """Answers with a multiple of its input and a constant."""

    config, class_embedding = make_unet().config, None

    def __init__(self):
        super().__init__()
        self.gain, self.bias = torch.nn.Parameter(torch.zeros(())), torch.nn.Parameter(torch.zeros(()))

    def forward(self, sample, timestep):
        return UNet2DOutput(sample=self.gain * sample + self.bias)


@pytest.mark.parametrize("network", ["unet", "dit"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_parameter_gets_a_gradient_and_training_lowers_the_loss(images, scheduler, network):
    torch.manual_seed(0)
    unet = (make_unet() if network == "unet" else make_dit(num_embeds_ada_norm=0)).train()
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


@pytest.mark.parametrize(
    ("scheduler", "sigma"),
    [
        (SCHEDULERS[0], torch.tensor([0.1, 0.1, 1e6, 0.1, 0.1])),
        (EDMEulerScheduler(), torch.tensor([0.1, 0.1, 0.0, 0.1, 0.1])),
        (FlowMatchEulerDiscreteScheduler(), torch.tensor([0.1, 0.1, float("nan"), 0.1, 0.1])),
    ],
)
def test_levels_at_which_no_network_is_trained_are_refused(unet, images, scheduler, sigma):
    with pytest.raises(ValueError, match=r"sigma \S+ is outside the schedule"):
        denoising_loss(unet, scheduler, images, sigma=sigma)


def test_edm_trains_at_levels_beyond_those_of_its_sampler(unet, images):
    """One log-normal draw in 62,000 is."""
    sigma = torch.tensor([1e-4, 0.001, 0.5, 90.0, 1e4])
    assert denoising_loss(unet, EDMEulerScheduler(), images, sigma=sigma).isfinite().all()
