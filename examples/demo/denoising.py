"""A pipeline's sampling as an iterator over its steps, so that a page can show them and stop them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddae_hf import DDAEPipeline, timestep_to_sigma
from ddae_hf.conditioning import class_conditioning, fed_timestep
from ddae_hf.latents import decode
from ddae_hf.noise import denoised


class _Stopped(Exception):
    """Nobody looks any more."""


@dataclass
class Step:
    """What there is after a step.

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
    own = DDAEPipeline.for_denoiser(pipeline.denoiser, scheduler, pipeline.null_class, vae=pipeline.vae)
    own.set_progress_bar_config(disable=True)
    return own


def stream(pipeline: DDAEPipeline, num_estimates: int, **options: Any) -> Iterator[Step]:
    """Sample in a thread and yield every step; closing the iterator stops the sampling.

    Args:
        pipeline: The pipeline, used by nobody else meanwhile.
        num_estimates: At how many steps, the first and the last among them, the network's estimate is computed.
        **options: Those of the pipeline's call.

    Raises:
        ValueError: What the pipeline refuses.
    """
    steps: queue.SimpleQueue[Step | None] = queue.SimpleQueue()
    stopped = threading.Event()

    def after_step(pipeline: DDAEPipeline, i: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if stopped.is_set():
            raise _Stopped
        samples, timesteps = tensors["latents"], pipeline.scheduler.timesteps
        number, total, following = i + 1, len(timesteps), timesteps[i + 1 : i + 2]
        estimate = None
        if number in np.linspace(1, total, num_estimates).round():
            estimate = _estimate(pipeline, samples[:1], following, options.get("class_labels"))[0]
        sigma = timestep_to_sigma(pipeline.scheduler, following).item() if len(following) else 0.0
        steps.put(Step(number, total, sigma, samples, estimate))
        return {}

    with ThreadPoolExecutor(1) as pool:
        sampling = pool.submit(pipeline, **options, output_type="latent", callback_on_step_end=after_step)
        sampling.add_done_callback(lambda _: steps.put(None))
        try:
            yield from iter(steps.get, None)
        finally:
            stopped.set()
    sampling.result()


@torch.no_grad()
def visible(vae: Any, samples: Tensor) -> Tensor:
    """Return samples (B, C, H, W) as images: what a VAE decodes, where they are its latents."""
    return samples if vae is None else decode(vae, samples)


@torch.no_grad()
def _estimate(pipeline: DDAEPipeline, sample: Tensor, timestep: Tensor, class_labels: Any) -> Tensor:
    """Return the clean image, or latents, that the network sees in a noisy one, (1, C, H, W); in the end, the sample.

    `timestep` is the next step's, (1,), or empty.
    """
    if not len(timestep):
        return sample
    denoiser, scheduler = pipeline.denoiser, pipeline.scheduler
    # Flow-matching schedulers feed the sample as it is.
    if hasattr(scheduler, "scale_model_input"):
        sample = scheduler.scale_model_input(sample, timestep[0])
    conditioning = class_conditioning(denoiser, class_labels, 1, sample.device, pipeline.null_class)
    output = denoiser(sample.to(denoiser.dtype), fed_timestep(denoiser, timestep), **conditioning).sample
    output = output[:, : denoiser.config.in_channels]
    return denoised(scheduler, sample, output, timestep_to_sigma(scheduler, timestep))
