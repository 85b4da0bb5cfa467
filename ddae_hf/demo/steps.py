"""Sampling step by step, with what the network takes the image for on its way."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..diffusion import Diffusion
from ..latents import decode
from ..pipeline_ddae import DDAEPipeline
from ..sampling import Step


def own_pipeline(pipeline: DDAEPipeline) -> DDAEPipeline:
    """Return a pipeline on the same network with a scheduler of its own, for schedulers count their steps."""
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    return DDAEPipeline.for_denoiser(pipeline.denoiser, scheduler, pipeline.null_class, vae=pipeline.vae)


@torch.no_grad()
def stream(
    pipeline: DDAEPipeline, num_estimates: int, **options: Any
) -> Generator[tuple[Step, float, Tensor | None], None, None]:
    """Sample with the options of the pipeline's `steps`; closing the iterator stops the sampling.

    Yield every step, the noise level that is left after it and, at `num_estimates` of them, the first and the last
    among these, what the network takes the first image for, (C, H, W). The pipeline is used by nobody else meanwhile.
    """
    diffusion = Diffusion(pipeline.denoiser, pipeline.scheduler, pipeline.null_class)
    for step in pipeline.steps(**options):
        sigma = 0.0 if step.following is None else diffusion.family.sigma(step.following).item()
        shown = step.number in np.linspace(1, len(step.timesteps), num_estimates).round()
        yield step, sigma, estimate_of(step, diffusion, options.get("class_labels")) if shown else None


def estimate_of(step: Step, diffusion: Diffusion, class_labels: Any) -> Tensor:
    """Return what the network takes the first image of a step for, (C, H, W); of the last step, that image."""
    first = step.sample[:1]
    if step.following is None:
        return first[0]
    conditions = diffusion.conditions(class_labels, len(step.sample), first.device)
    conditions = {name: value[:1] for name, value in conditions.items()}
    if step.sigma is None:
        return diffusion.estimate(first, step.following, conditions)[0]
    return diffusion.denoise(first, step.sigma, conditions)[0]


@torch.no_grad()
def visible(vae: Any, samples: Tensor) -> Tensor:
    """Return samples (B, C, H, W) as images: what a VAE decodes, where they are its latents."""
    return samples if vae is None else decode(vae, samples)
