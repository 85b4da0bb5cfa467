"""Features as a user of diffusers writes them, without this library: what the benchmarks compare with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from ddae_hf import DDAEPipeline, sigma_to_timestep
from ddae_hf.networks import network_of
from ddae_hf.noise import family_of


class PlainFeatures:
    """Hidden states of some layers, averaged over positions: hooks on a network in float32 that runs to its end.

    Args:
        checkpoint: A generative checkpoint whose scheduler adds noise at whole timesteps (DDPM, DDIM and their kin).
        layers: Names of layers.
        device: Where to compute.
        null_class: The label that stands for no class in a class-conditional U-Net; a DiT's is its last.
        cache_dir: Where downloads are kept.

    Raises:
        ValueError: No such checkpoint, another kind of scheduler, or a conditional network without a null class.
    """

    def __init__(
        self,
        checkpoint: str,
        layers: Sequence[str],
        device: str,
        null_class: int | None = None,
        cache_dir: str | None = None,
    ):
        pipeline = DDAEPipeline.from_pretrained(checkpoint, cache_dir=cache_dir)
        if family_of(pipeline.scheduler).name != "ddpm":
            raise ValueError(
                f"{checkpoint} has a {type(pipeline.scheduler).__name__}: the plain way adds noise with the scheduler, "
                "at whole timesteps, so give a checkpoint of DDPM, DDIM or their kin."
            )
        self.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        self.denoiser = pipeline.denoiser.float().to(device).eval().requires_grad_(False)
        self.null_class = pipeline.null_class if null_class is None else null_class
        if network_of(self.denoiser).is_conditional(self.denoiser) and self.null_class is None:
            raise ValueError(f"The network of {checkpoint} is class-conditional, and nothing says which is no class.")
        self.found: dict[str, Tensor] = {}
        for layer in layers:
            self.denoiser.get_submodule(layer).register_forward_hook(partial(self._keep, layer))

    def _keep(self, layer: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.found[layer] = output.mean((2, 3)) if output.ndim == 4 else output.mean(1)

    def nearest_timestep(self, sigma: float) -> int:
        """Return the whole timestep whose noise level is nearest to `sigma`."""
        return round(sigma_to_timestep(self.scheduler, sigma).item())

    @torch.no_grad()
    def __call__(self, clean: Tensor, noise: Tensor, timestep: int) -> dict[str, Tensor]:
        """Return the features (B, C) by layer name of images or latents (B, C, H, W)."""
        timesteps = torch.full((len(clean),), timestep, device=clean.device)
        labels = {} if self.null_class is None else {"class_labels": torch.full_like(timesteps, self.null_class)}
        self.denoiser(self.scheduler.add_noise(clean, noise, timesteps), timesteps, **labels)
        found, self.found = self.found, {}
        return found
