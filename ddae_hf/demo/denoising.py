"""A pipeline's sampling as the page shows it: its steps, and what the network sees on the way."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..diffusion import Diffusion
from ..latents import decode
from ..pipeline_ddae import DDAEPipeline
from ..sampling import Step


@dataclass
class Look:
    """What there is to see after a step.

    Attributes:
        number: The step, from 1.
        total: Number of steps.
        sigma: Noise level that is left.
        images: Noisy images or latents (B, C, H, W), as the scheduler keeps them; after the last step, those generated.
        estimate: What the network takes the first of them for, (C, H, W), at some of the steps.
    """

    number: int
    total: int
    sigma: float
    images: Tensor
    estimate: Tensor | None


def own_pipeline(pipeline: DDAEPipeline) -> DDAEPipeline:
    """Return a pipeline on the same network with a scheduler of its own, for schedulers count their steps."""
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    return DDAEPipeline.for_denoiser(pipeline.denoiser, scheduler, pipeline.null_class, vae=pipeline.vae)


@torch.no_grad()
def stream(pipeline: DDAEPipeline, num_estimates: int, **options: Any) -> Generator[Look, None, None]:
    """Sample and yield what there is after every step; closing the iterator stops the sampling.

    Args:
        pipeline: The pipeline, used by nobody else meanwhile.
        num_estimates: At how many steps, the first and the last among them, the network's estimate is computed.
        **options: Those of the pipeline's `steps`.

    Raises:
        ValueError: What the pipeline refuses.
    """
    diffusion = Diffusion(pipeline.denoiser, pipeline.scheduler, pipeline.null_class)
    for step in pipeline.steps(**options):
        total = len(step.timesteps)
        sigma = 0.0 if step.following is None else diffusion.family.sigma(step.following).item()
        estimate = None
        if step.number in np.linspace(1, total, num_estimates).round():
            estimate = estimate_of(step, diffusion, options.get("class_labels"))
        yield Look(step.number, total, sigma, step.sample, estimate)


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
