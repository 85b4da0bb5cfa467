"""The pair of a denoiser and its scheduler, from which everything else follows.

Symbols are as in `noise`: for a clean image `x` and standard-normal noise `n`, the denoiser is fed `a * x + b * n` with
the timestep of the level `sigma`, and should answer `c * x + d * n`. The loss of every framework is
`mean((answer - (c * x + d * n)) ** 2)`. In this form it is

- for noise prediction, `L_simple` of Ho et al. 2020 (arXiv 2006.11239, equation 14);
- for EDM, equation 8 of Karras et al. 2022 (arXiv 2206.00364): the paper's weight of the denoised image's error,
  `(sigma^2 + sigma_data^2) / (sigma * sigma_data)^2`, is `1 / c_out^2`, which leaves the plain error of the output;
- for flow matching, the conditional flow-matching loss of Lipman et al. 2022 (arXiv 2210.02747) on straight paths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cut import uncompiled, unwrapped
from .generators import Generator, normal
from .hidden_states import run_with_hidden_states, run_with_hooks
from .networks import network_of
from .noise import family_of

Conditions = dict[str, Tensor]


class Denoised(NamedTuple):
    """Images in training, as a denoiser saw them, and how it did."""

    losses: Tensor  # (B,), float32
    sigma: Tensor  # (B,), their noise levels
    noise: Tensor  # standard-normal, (B, C, H, W)
    hidden_states: dict[str, Tensor]  # raw, (B, ...), by layer name


class Diffusion:
    """A denoiser, its scheduler and its null condition; `ValueError` for what is not supported.

    Args:
        denoiser: A diffusers network, which may be compiled or distributed.
        scheduler: The scheduler that it was trained under, or another of the same framework.
        null_condition: What it is told where no condition is given: the label that stands for no class, for a network
            that does not imply one, or the tensors of a text, by name.
        float32_output: Whether a network in half precision computes its output layers in float32, where that helps.
    """

    def __init__(self, denoiser: Any, scheduler: Any, null_condition: Any = None, float32_output: bool = False):
        self.own = unwrapped(denoiser)
        self.network = network_of(self.own)
        self.family = family_of(scheduler)
        implied = self.network.default_null_class(self.own.config)
        self.null_condition = implied if null_condition is None else null_condition
        self.denoiser = denoiser
        # This is what `predict` calls. A distributed network's own forward has to run.
        exact = float32_output and uncompiled(denoiser) is self.own
        self.answering = self.network.with_float32_output(denoiser) if exact else denoiser

    def conditions(self, condition: Any, batch_size: int, device: Any) -> Conditions:
        """Return what the denoiser is told about its images besides the timestep: see `NetworkClass.conditions`."""
        return self.network.conditions(self.own, condition, batch_size, device, self.null_condition)

    def _fed(self, noisy: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Return an input and a timestep in the types that the denoiser takes."""
        return noisy.to(self.own.dtype), self.network.fed_timestep(self.own, timestep)

    def predict(
        self,
        noisy: Tensor,
        timestep: Tensor,
        conditions: Conditions,
        guidance_scale: float = 1.0,
        null_conditions: Conditions | None = None,
    ) -> Tensor:
        """Return the denoiser's answer (B, C, H, W), float32, with the channels of a learned variance if it is used.

        Args:
            noisy: Its input (B, C, H, W), scaled as `Family.noisy` does.
            timestep: Its timestep (B,), in the scheduler's units.
            conditions: What `conditions` returned.
            guidance_scale: Strength w of classifier-free guidance, `null + w * (told - null)`; at 1 there is none.
            null_conditions: What `conditions` returned for the null condition, which guidance needs.
        """
        fed, told = self._fed(noisy, timestep)
        if guidance_scale != 1:
            if not (conditions and null_conditions):
                raise ValueError(
                    f"guidance_scale is {guidance_scale}: guidance needs labels and a null class, or the conditions of "
                    "a text and of no text."
                )
            for name, value in conditions.items():
                if value.shape != null_conditions[name].shape:
                    lengths = f"{tuple(value.shape)} and {tuple(null_conditions[name].shape)}"
                    raise ValueError(f"The condition's and the null condition's {name} are of the shapes {lengths}.")
            conditions = {name: torch.cat([value, null_conditions[name]]) for name, value in conditions.items()}
            fed = torch.cat([fed, fed])
            told = torch.cat([told, told])
        keywords = self.network.keywords(conditions)
        output = self.network.call(self.answering, fed, told, **keywords).sample.float()
        prediction = output[:, : noisy.shape[1]]
        if guidance_scale != 1:
            told_so, without = prediction.chunk(2)
            prediction = without + guidance_scale * (told_so - without)
        if self.family.learns_variance:
            return torch.cat([prediction, output[: len(noisy), noisy.shape[1] :]], dim=1)
        return prediction

    def predict_with_hidden_states(
        self, noisy: Tensor, timestep: Tensor, layers: Sequence[str], conditions: Conditions
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the denoiser's answer, without a learned variance, and the raw hidden states of the same pass.

        For the arguments see `predict`. A distributed network synchronises its gradients if the answer is in the loss.
        """
        fed, told = self._fed(noisy, timestep)
        keywords = self.network.keywords(conditions)
        states: dict[str, Tensor] = {}
        if layers:
            output, states = run_with_hidden_states(self.denoiser, fed, told, layers, keywords)
        else:
            output = self.network.call(self.denoiser, fed, told, **keywords).sample
        return output[:, : noisy.shape[1]].float(), states

    def hidden_states(
        self, clean: Tensor, noise: Tensor, sigma: float | Tensor, layers: Sequence[str], condition: Any = None
    ) -> dict[str, Tensor]:
        """Return raw hidden states (B, ...) of noisy images by layer name, and compute nothing after the deepest.

        They are means over several draws of standard-normal noise for each image, (draws, B, C, H, W). `clean` are
        images (B, C, H, W) in [-1, 1], or scaled latents; `sigma` is a scalar or (B,), and `condition`, such as labels
        (B,), is by default the null condition. A distributed denoiser that is trained is refused: its gradients would
        not be synchronised.
        """
        count, batch_size = noise.shape[:2]
        fed, told, keywords = self._noisy(clean, noise, sigma, condition)
        _, found = run_with_hidden_states(self.denoiser, fed, told, layers, keywords, stop_early=True)
        if count > 1:
            return {name: hidden.unflatten(0, (count, batch_size)).mean(0) for name, hidden in found.items()}
        return found

    def module_outputs(
        self, clean: Tensor, noise: Tensor, sigma: float | Tensor, names: Sequence[str], condition: Any = None
    ) -> dict[str, Tensor]:
        """Return raw outputs (draws * B, ...) of any modules by name, and compute nothing after the last of `names`.

        Names are those of `named_modules()`, in the order of computation; for the rest see `hidden_states`.
        """
        fed, told, keywords = self._noisy(clean, noise, sigma, condition)
        return run_with_hooks(self.denoiser, fed, told, names, names[-1], keywords)[1]

    def _noisy(
        self, clean: Tensor, noise: Tensor, sigma: float | Tensor, condition: Any
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Return what the denoiser is fed of images with several draws of noise, and what it is told."""
        count, batch_size = noise.shape[:2]
        conditions = self.conditions(condition, batch_size, clean.device)
        conditions = {name: _repeat(value, count) for name, value in conditions.items()}
        level = _repeat(torch.as_tensor(sigma, dtype=torch.float32), count)
        fed, told = self._fed(*self.family.noisy(_repeat(clean, count), noise.flatten(0, 1), level))
        return fed, told, self.network.keywords(conditions)

    def denoise(
        self,
        sample: Tensor,
        sigma: float,
        conditions: Conditions,
        guidance_scale: float = 1.0,
        null_conditions: Conditions | None = None,
    ) -> Tensor:
        """Return the clean image (B, C, H, W), float32, that the denoiser sees in `x + sigma * n`, the paper's `D`."""
        scaled, timestep = self.family.scaled(sample, sigma)
        answer = self.predict(scaled, timestep, conditions, guidance_scale, null_conditions)
        return self.family.denoised(scaled, answer[:, : sample.shape[1]], sigma)

    def estimate(self, sample: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        """Return the clean image (B, C, H, W), float32, that the denoiser sees in its scheduler's own sample.

        `timestep` is the timestep of the next step, a tensor without dimensions.
        """
        fed = self.family.model_input(sample, timestep)
        answer = self.predict(fed, timestep.expand(len(sample)), conditions)
        return self.family.denoised(fed, answer[:, : sample.shape[1]], self.family.sigma(timestep))

    def loss(self, clean: Tensor, **options: Any) -> Tensor:
        """Return the denoising loss of each image, float32 (B,); the options are those of `denoising`."""
        return self.denoising(clean, **options).losses

    def denoising(
        self,
        clean: Tensor,
        layers: Sequence[str] = (),
        *,
        sigma: Tensor | None = None,
        noise: Tensor | None = None,
        condition: Any = None,
        log_normal: tuple[float, float] | None = None,
        shares: tuple[float, float] | None = None,
        generator: Generator = None,
        weighting: Callable[[Tensor], Tensor] | None = None,
    ) -> Denoised:
        """Return the denoising loss of each image, with hidden states of the same pass.

        Args:
            clean: Images (B, C, H, W) in [-1, 1], or scaled latents. Further output channels, which are a learned
                variance, play no part.
            layers: Names of the layers whose hidden states are returned too. Gradients reach them, and a distributed
                network synchronises those if the losses are part of what is minimised.
            sigma: Noise levels (B,); drawn from the family's training distribution if not given.
            noise: Standard-normal noise (B, C, H, W); drawn if not given.
            condition: What the network is told, such as labels (B,); by default the null condition.
            log_normal: Mean and deviation of log sigma, in place of the family's own training distribution.
            shares: Which part of the distribution is drawn, by default all: see `Family.draw`.
            generator: Random generator on the device of `clean`.
            weighting: The weight of an image's loss as a function of the noise levels (B,); by default every weight is
                1.

        Returns:
            Squared errors averaged over pixels, noise levels, noise and hidden states.
        """
        if sigma is None:
            sigma = self.family.draw(len(clean), clean.device, generator, log_normal, shares)
        if noise is None:
            noise = normal(clean.shape, clean.device, generator)
        noisy, timestep = self.family.noisy(clean, noise, sigma)
        conditions = self.conditions(condition, len(clean), clean.device)
        answer, states = self.predict_with_hidden_states(noisy, timestep, layers, conditions)
        target = self.family.target(clean, noise, sigma)
        errors = (answer - target).square().mean(dim=tuple(range(1, clean.ndim)))
        return Denoised(errors if weighting is None else weighting(sigma) * errors, sigma, noise, states)


def _repeat(values: Tensor, count: int) -> Tensor:
    """Repeat a batch `count` times; what holds for the whole batch stays as it is."""
    return values.repeat(count, *[1] * (values.ndim - 1)) if values.ndim else values
