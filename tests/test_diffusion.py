"""The pair of denoiser and scheduler: losses against their definitions, answers and hidden states of one pass."""

import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.models.unets.unet_2d import UNet2DOutput

from ddae_hf import collect_hidden_states, layer_names, timestep_to_sigma
from ddae_hf.diffusion import Diffusion
from ddae_hf.noise import family_of

from .conftest import make_dit, make_unet
from .ideal import MEAN, STD, Ideal, Stub, closed_form


def denoising_loss(denoiser, scheduler, clean, **options):
    return Diffusion(denoiser, scheduler).loss(clean, **options)


def draw(scheduler, count):
    return family_of(scheduler).draw(count)


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
    noise, sigma = torch.randn_like(images), draw(scheduler, 5)
    perfect = Perfect(family_of(scheduler).target(images, noise, sigma))
    assert denoising_loss(perfect, scheduler, images, sigma=sigma, noise=noise).max() == 0


class Perfect(Stub):
    """Answers with the target."""

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


class Scaled(Stub):
    """A network with its output scaled."""

    def __init__(self, network, gain):
        super().__init__()
        self.network, self.gain = network, gain

    def forward(self, sample, timestep):
        return UNet2DOutput(sample=self.gain * self.network(sample, timestep).sample)


class Affine(Stub):
    """Answers with a multiple of its input and a constant."""

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
    noise, sigma = torch.randn_like(images), draw(scheduler, 5)
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


def test_a_weighting_scales_each_images_loss_by_its_level(unet, scheduler, images):
    """As min-SNR's does (Hang et al. 2023, arXiv 2303.09556)."""
    sigma, noise = torch.tensor([0.05, 0.1, 0.5, 2.0, 50.0]), torch.randn_like(images)
    plain = denoising_loss(unet, scheduler, images, sigma=sigma, noise=noise)
    weighted = denoising_loss(
        unet, scheduler, images, sigma=sigma, noise=noise, weighting=lambda level: (5 * level**2).clamp(max=1)
    )
    assert torch.equal(weighted, (5 * sigma**2).clamp(max=1) * plain) and weighted[0] < plain[0] / 50


CONDITIONED = [(make_unet, {}), (make_unet, {"num_class_embeds": 4}), (make_dit, {}), (make_dit, {"out_channels": 6})]


@pytest.mark.parametrize(("make", "options"), CONDITIONED)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_one_pass_gives_the_answer_and_the_hidden_states(images, scheduler, make, options):
    """Both bit-equal to passes of their own, with the gradients of both; and the network runs once."""
    denoiser, calls = make(**options), []
    labels = torch.arange(5) % 4 if "num_class_embeds" in options or make is make_dit else None
    diffusion = Diffusion(denoiser, scheduler)
    noisy, timestep = diffusion.family.noisy(images, torch.randn_like(images), draw(scheduler, 5))
    conditions = diffusion.conditions(labels, 5, "cpu")
    layers = layer_names(denoiser)[1:4]
    alone = diffusion.predict(noisy, timestep, conditions)
    states = collect_hidden_states(denoiser, noisy, timestep, layers, **conditions)
    denoiser.get_submodule("conv_in" if make is make_unet else "pos_embed").register_forward_hook(
        lambda *_: calls.append(None)
    )
    answer, found = diffusion.predict_with_hidden_states(noisy, timestep, layers, conditions)
    assert torch.equal(answer, alone[:, :3]) and answer.shape == images.shape and len(calls) == 1
    assert list(found) == layers and all(torch.equal(found[layer], states[layer]) for layer in layers)
    (answer.square().mean() + found[layers[0]].mean()).backward()
    last = denoiser.conv_out if make is make_unet else denoiser.proj_out_2
    assert last.weight.grad.abs().sum() > 0 and all(p.grad is not None for p in first_parameters(denoiser, make))


def first_parameters(denoiser, make):
    return (denoiser.conv_in if make is make_unet else denoiser.pos_embed.proj).parameters()


def test_a_pass_with_hooks_gives_the_same_and_so_does_a_compiled_network(unet, scheduler, images):
    diffusion, timestep = Diffusion(unet, scheduler), torch.full((5,), 20.0)
    answer, found = diffusion.predict_with_hidden_states(images, timestep, ["mid_block"], {})
    compiled = torch.compile(unet, backend="eager")
    handle = unet.register_forward_hook(lambda *_: None)
    for denoiser in (unet, compiled):
        again, states = Diffusion(denoiser, scheduler).predict_with_hidden_states(images, timestep, ["mid_block"], {})
        assert torch.equal(again, answer) and torch.equal(states["mid_block"], found["mid_block"])
    handle.remove()


FRAMEWORKS = {"ddpm": DDPMScheduler, "edm": EDMEulerScheduler, "flow": FlowMatchEulerDiscreteScheduler}


@torch.no_grad()
@pytest.mark.parametrize("framework", list(FRAMEWORKS))
def test_the_denoised_image_of_gaussian_data_is_the_closed_form(framework):
    """By `denoise`, whose sample is `x + sigma * n`, and by `estimate`, whose sample is the scheduler's own."""
    scheduler = FRAMEWORKS[framework]()
    diffusion = Diffusion(Ideal(framework, "epsilon", getattr(scheduler, "alphas_cumprod", None)), scheduler)
    scheduler.set_timesteps(10)
    timestep = scheduler.timesteps[5]
    sigma = timestep_to_sigma(scheduler, timestep).item()
    sample = torch.randn(16, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * (STD**2 + sigma**2) ** 0.5 + MEAN
    expected = closed_form(sample, sigma)
    torch.testing.assert_close(diffusion.denoise(sample, sigma, {}).double(), expected, atol=1e-4, rtol=0)
    # What the scheduler keeps: the network's input, but for EDM, which keeps `x + sigma * n`.
    own = sample if framework == "edm" else diffusion.family.scaled(sample, sigma)[0]
    torch.testing.assert_close(diffusion.estimate(own, timestep, {}).double(), expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_the_pair_that_samples_in_half_precision_gives_hidden_states_too(images, scheduler):
    """Its answers come by output layers in float32, its hidden states as those of the network as it is."""
    unet = make_unet().to(torch.bfloat16)
    plain, exact = Diffusion(unet, scheduler), Diffusion(unet, scheduler, float32_output=True)
    fed = images, torch.full((5,), 20.0)
    answers = [pair.predict(*fed, {}) for pair in (plain, exact)]
    assert not torch.equal(*answers) and (answers[0] - answers[1]).abs().max() < 0.02
    for pair in (plain, exact):
        answer, states = pair.predict_with_hidden_states(*fed, ["mid_block"], {})
        assert torch.equal(answer, answers[0]) and states["mid_block"].dtype == torch.bfloat16


@torch.no_grad()
def test_several_draws_at_levels_of_their_own_are_the_means_of_single_ones(unet, images, scheduler):
    noise, sigma = torch.randn(2, *images.shape), torch.tensor([0.1, 0.2, 0.5, 1.0, 5.0])
    diffusion = Diffusion(unet, scheduler)
    together = diffusion.hidden_states(images, noise, sigma, ["mid_block"])["mid_block"]
    alone = [diffusion.hidden_states(images, draw[None], sigma, ["mid_block"])["mid_block"] for draw in noise]
    torch.testing.assert_close(together, sum(alone) / 2)


@torch.no_grad()
def test_guidance_mixes_answers_and_takes_the_variance_of_the_label(images):
    dit = make_dit(out_channels=6)
    diffusion, fed = Diffusion(dit, DDPMScheduler(variance_type="learned_range")), (images, torch.full((5,), 20.0))
    label, null = (diffusion.conditions(labels, 5, "cpu") for labels in (2, None))
    guided = diffusion.predict(*fed, label, 3.0, null)
    told, untold = (diffusion.predict(*fed, conditions) for conditions in (label, null))
    torch.testing.assert_close(guided[:, :3], untold[:, :3] + 3 * (told[:, :3] - untold[:, :3]), rtol=0, atol=1e-5)
    torch.testing.assert_close(guided[:, 3:], told[:, 3:], rtol=0, atol=1e-6)
    assert (told[:, 3:] - untold[:, 3:]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="guidance needs labels and a null class"):
        diffusion.predict(*fed, label, 3.0)


def test_a_distributed_network_is_not_trained_by_passes_that_end_early(images, scheduler):
    """Its gradients would not be those of all processes, without a word."""

    class Distributed(torch.nn.Module):  # as DistributedDataParallel wraps a network
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    unet = make_unet()
    wrapped, plain = (Diffusion(denoiser, scheduler) for denoiser in (Distributed(unet), unet))
    noise = torch.randn(1, *images.shape)
    with pytest.raises(ValueError, match="The denoiser is distributed"):
        wrapped.hidden_states(images, noise, 0.1, ["mid_block"])
    with torch.no_grad():
        found = wrapped.hidden_states(images, noise, 0.1, ["mid_block"])["mid_block"]
        assert torch.equal(found, plain.hidden_states(images, noise, 0.1, ["mid_block"])["mid_block"])
    fed = images, torch.full((5,), 20.0), ["mid_block"], {}
    assert torch.equal(wrapped.predict_with_hidden_states(*fed)[0], plain.predict_with_hidden_states(*fed)[0])


class Echo(Stub):
    """Answers with what it is fed."""

    def forward(self, sample, timestep):
        return UNet2DOutput(sample=sample)


@pytest.mark.parametrize("scheduler", SCHEDULERS[-3:])
def test_losses_compile_for_batches_of_any_size(scheduler, images):
    """The last batch of an epoch is smaller: the graph is recorded again, for any size."""
    pair = Diffusion(Echo(), scheduler)
    loss = torch.compile(lambda clean: pair.loss(clean), backend="eager", fullgraph=True)
    torch._dynamo.reset()
    assert [len(loss(images[:count])) for count in (4, 3, 5)] == [4, 3, 5]
