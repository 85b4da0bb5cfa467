"""Training objectives: how far a denoiser's output is from its target, averaged over noise levels.

For every scheduler the loss is `mean((denoiser(noisy, timestep) - target) ** 2)`; what `noisy`, `timestep` and `target`
are, and how levels are drawn, is the scheduler family's business (`noise.py`). So written it is

- for noise prediction `L_simple` of Ho et al. 2020 (arXiv 2006.11239, equation 14);
- for EDM equation 8 of Karras et al. 2022 (arXiv 2206.00364): the paper's weight of the denoised image's error,
  `(sigma^2 + sigma_data^2) / (sigma * sigma_data)^2`, is `1 / c_out^2`, which leaves the plain error of the output;
- for flow matching the conditional flow-matching loss of Lipman et al. 2022 (arXiv 2210.02747) on straight paths.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .conditioning import class_conditioning, fed_timestep
from .noise import add_noise, prediction_target, sample_training_sigma


def denoising_loss(
    denoiser: torch.nn.Module,
    scheduler: Any,
    clean: Tensor,
    *,
    sigma: Tensor | None = None,
    noise: Tensor | None = None,
    class_labels: Tensor | None = None,
    log_normal: tuple[float, float] | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the denoising loss of each image.

    Args:
        denoiser: A diffusers network, or a wrapped (compiled, distributed) one. Output channels beyond those of
            `clean`, a learned variance, play no part.
        scheduler: Its diffusers scheduler, which says what is predicted.
        clean: Images (B, C, H, W) in [-1, 1], or scaled latents.
        sigma: Noise levels (B,), as `add_noise` takes them; drawn from the family's training distribution if not given.
        noise: Standard-normal noise (B, C, H, W); drawn if not given.
        class_labels: Labels (B,) of a class-conditional network, or vectors (B, width) of one that takes vectors.
        log_normal: Mean and deviation of log sigma, in place of the family's own training distribution.
        generator: Random generator on the device of `clean`.

    Returns:
        Squared errors averaged over pixels, float32 (B,).

    Raises:
        ValueError: A level at which no network of the scheduler's family is trained.
    """
    if sigma is None:
        sigma = sample_training_sigma(scheduler, clean.shape[0], clean.device, generator, log_normal)
    if noise is None:
        noise = torch.randn(clean.shape, generator=generator, device=clean.device, dtype=torch.float32)
    noisy, timestep = add_noise(scheduler, clean, noise, sigma)
    network = getattr(denoiser, "module", denoiser)
    conditioning = class_conditioning(network, class_labels, clean.shape[0], clean.device)
    output = denoiser(noisy, fed_timestep(network, timestep), **conditioning).sample
    target = prediction_target(scheduler, clean, noise, sigma)
    return (output[:, : clean.shape[1]].float() - target).square().mean(dim=tuple(range(1, clean.ndim)))
