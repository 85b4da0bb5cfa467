"""`DDAEPipeline`: images from noise, with a diffusers denoiser and scheduler."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDPMScheduler, SchedulerMixin, UNet2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .checkpoints import (
    HUB_ARGUMENTS,
    Checkpoint,
    build_scheduler,
    check_denoiser_class,
    fingerprint,
    read_checkpoint,
)
from .noise import fed_timestep, sigma_range


class DDAEPipeline(DiffusionPipeline):
    """Generates images with a denoiser whose hidden states `DDAEModel` reads.

    Saves as an ordinary diffusers pipeline: `DDPMPipeline.from_pretrained` opens it too.

    Args:
        unet: The denoiser, for images of its `sample_size`.
        scheduler: The scheduler it was trained under, or another of the same noise schedule.
    """

    unet: Any
    scheduler: Any
    model_cpu_offload_seq = "unet"  # type: ignore[assignment]
    _callback_tensor_inputs = ["latents"]
    _fine_tuned_from: str | None = None  # the classifier's checkpoint, where its denoiser is not a generator's

    def __init__(self, unet: UNet2DModel, scheduler: SchedulerMixin):
        super().__init__()
        check_denoiser_class(type(unet).__name__, "`unet`")
        self.register_modules(unet=unet, scheduler=scheduler)

    @property
    def denoiser(self) -> Any:
        """The denoiser, under whichever key diffusers keeps it."""
        return self.unet

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the last call."""
        return self._num_timesteps

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> DDAEPipeline:
        """Open a pipeline from any layout: see `ddae_hf.checkpoints`.

        Takes what `DiffusionPipeline.from_pretrained` takes. A bare network has no scheduler: pass `scheduler=`, or
        DDPM's defaults are taken, with a warning. A classifier's checkpoint opens as the generator it came from; if its
        denoiser was fine-tuned since, sampling warns.

        Raises:
            ValueError: No checkpoint, or a denoiser that is not supported.
        """
        checkpoint = read_checkpoint(pretrained_model_name_or_path, **kwargs)
        if checkpoint.layout in ("pipeline", "flat") and not checkpoint.hub["subfolder"]:
            return super().from_pretrained(pretrained_model_name_or_path, **{**kwargs, "use_safetensors": True})
        allowed = {*HUB_ARGUMENTS, "dtype", "torch_dtype", "unet", "scheduler", "use_safetensors"}
        if unknown := sorted(set(kwargs) - allowed):
            raise ValueError(
                f"For a checkpoint of this layout {unknown} cannot be given: allowed are {sorted(allowed)}."
            )
        unet = kwargs.get("unet") or checkpoint.load_denoiser()
        origin = checkpoint.config.get("generator_fingerprint")
        tuned = checkpoint.layout == "transformers" and "unet" not in kwargs and fingerprint(unet) != origin
        dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
        unet = unet.to(dtype) if isinstance(dtype, torch.dtype) else unet
        pipeline = cls(unet=unet, scheduler=kwargs.get("scheduler") or _scheduler_of(checkpoint))
        pipeline._fine_tuned_from = checkpoint.path if tuned else None
        return pipeline

    def _initial_noise(self, batch_size: int, generator: Any, latents: Tensor | None) -> Tensor:
        """Return standard-normal noise (B, C, H, W), drawn or checked."""
        config = self.denoiser.config
        size = (config.sample_size,) * 2 if isinstance(config.sample_size, int) else tuple(config.sample_size)
        shape = (batch_size, config.in_channels, *size)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"{len(generator)} generators came for a batch of {batch_size}: pass one, or one an image."
            )
        if latents is None:
            return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        if tuple(latents.shape) != shape:
            raise ValueError(f"`latents` has shape {tuple(latents.shape)}: it must be standard-normal noise {shape}.")
        return latents.to(self._execution_device, torch.float32)

    def _check_inputs(self, batch_size: int, class_labels: Any, output_type: str, callback_tensors: list[str]) -> None:
        sigma_range(self.scheduler)  # refuses a scheduler of another family
        config = self.denoiser.config
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: it must be at least 1.")
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type is {output_type!r}: allowed are 'pil', 'np' and 'pt'.")
        if output_type == "pil" and config.out_channels not in (1, 3):
            raise ValueError(
                f"Images of {config.out_channels} channels have no PIL form: use output_type='np' or 'pt'."
            )
        unknown = set(callback_tensors) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"callback tensors {sorted(unknown)} are unknown: allowed are {self._callback_tensor_inputs}."
            )
        conditional = self.denoiser.class_embedding is not None
        if conditional != (class_labels is not None):
            needed = "needs `class_labels`" if conditional else "is unconditional and takes no `class_labels`"
            raise ValueError(f"This denoiser {needed}.")

    def _labels(self, class_labels: Any, batch_size: int) -> dict[str, Tensor]:
        if class_labels is None:
            return {}
        labels = torch.as_tensor(class_labels, device=self._execution_device).reshape(-1)
        if len(labels) not in (1, batch_size):
            raise ValueError(f"{len(labels)} class_labels came for a batch of {batch_size}: pass one, or one an image.")
        classes = self.denoiser.config.num_class_embeds
        if classes and not (0 <= labels.min() and labels.max() < classes):
            raise ValueError(f"class_labels are {labels.min()} to {labels.max()}: allowed are 0 to {classes - 1}.")
        return {"class_labels": labels.expand(batch_size)}

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        class_labels: int | list[int] | Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        num_inference_steps: int = 100,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate images.

        Args:
            batch_size: Number of images.
            class_labels: One label, or one an image, for a class-conditional denoiser.
            generator: Random generator, or one for every image; makes the images reproducible.
            latents: Standard-normal noise (B, C, H, W) to start from; scaled inside as the scheduler wants it.
            num_inference_steps: Number of steps, each one call of the network for first-order schedulers.
            output_type: `"pil"`, `"np"` (B, H, W, C) in [0, 1] or `"pt"` (B, C, H, W) in [0, 1].
            return_dict: Whether to return an `ImagePipelineOutput` or a tuple.
            callback_on_step_end: Called as `callback(pipeline, step, timestep, tensors)` after every step; tensors that
                it returns replace the pipeline's.
            callback_on_step_end_tensor_inputs: Which tensors the callback gets; `"latents"`, the noisy image.

        Raises:
            ValueError: An argument that cannot work, before any step is taken.
        """
        tensors = callback_on_step_end_tensor_inputs or ["latents"]
        self._check_inputs(batch_size, class_labels, output_type, tensors)
        if self._fine_tuned_from is not None:
            warnings.warn(
                f"The denoiser in {self._fine_tuned_from} was trained as a classifier and is no longer the generator "
                f"that "
                "was pretrained: its images may be noise. Sample from the generative checkpoint instead.",
                stacklevel=2,
            )
        conditioning = self._labels(class_labels, batch_size)
        sample = self._initial_noise(batch_size, generator, latents)
        self.scheduler.set_timesteps(num_inference_steps, device=sample.device)
        sample = sample * self.scheduler.init_noise_sigma
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        step_arguments = {"generator": generator} if _takes(self.scheduler.step, "generator") else {}
        with self.progress_bar(total=len(timesteps)) as progress:
            for i, timestep in enumerate(timesteps):
                scaled = self.scheduler.scale_model_input(sample, timestep).to(self.denoiser.dtype)
                fed = fed_timestep(self.denoiser, timestep.expand(batch_size))
                output = self.denoiser(scaled, fed, **conditioning).sample.float()
                sample = self.scheduler.step(output, timestep, sample, **step_arguments).prev_sample
                if callback_on_step_end is not None:
                    outputs = callback_on_step_end(self, i, timestep, dict.fromkeys(tensors, sample))
                    sample = outputs.pop("latents", sample)
                progress.update()
        images = self._postprocess(sample, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _postprocess(self, sample: Tensor, output_type: str) -> Any:
        images = (sample / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        array = images.cpu().permute(0, 2, 3, 1).numpy()
        return array if output_type == "np" else self.numpy_to_pil(array)


def _takes(function: Callable[..., Any], argument: str) -> bool:
    return argument in inspect.signature(function).parameters


def _scheduler_of(checkpoint: Checkpoint) -> Any:
    if checkpoint.scheduler is not None:
        return build_scheduler(checkpoint.scheduler)
    warnings.warn(
        f"{checkpoint.path} holds a network without its scheduler: DDPM's defaults are taken (linear betas from 1e-4 "
        f"to "
        "0.02, 1000 timesteps, noise prediction). If it was trained otherwise, pass `scheduler=`.",
        stacklevel=3,
    )
    return DDPMScheduler()
