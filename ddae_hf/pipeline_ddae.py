"""`DDAEPipeline`: images from noise, with a diffusers denoiser and scheduler."""

from __future__ import annotations

import inspect
import json
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel, SchedulerMixin, UNet2DModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from torch import Tensor

from .checkpoints import Checkpoint, build_scheduler, still_generates, take_checkpoint
from .cut import uncompiled
from .diffusion import Diffusion
from .families import Family
from .labels import checked_names, label_ids, labels_by_name
from .latents import check_vae, check_vae_class, decode
from .networks import NETWORKS, check_denoiser_class, check_sampled, network_of
from .remote_code import save_pipeline_code
from .sampling import Heun, Step, check_count, check_number, count_images, initial_noise, scheduler_steps
from .weights import DIFFUSERS_FILE, LOADING_ARGUMENTS, replaced_weights, uncompiled_names


class DDAEPipeline(DiffusionPipeline):
    """Generates images with a denoiser whose hidden states `DDAEModel` reads.

    It saves as an ordinary diffusers pipeline. `DDPMPipeline.from_pretrained` also opens one with a U-Net, and samples
    from it if it is unconditional and its framework is DDPM or flow matching; it does not scale EDM's inputs.
    `DiTPipeline` opens one with a DiT and a VAE. `pipeline.vae.enable_slicing()` and `enable_tiling()` bound the memory
    of decoding. Networks that are told a text are refused: diffusers' own pipelines sample from them. One of a class of
    this package needs the package, or its code: see `save_pretrained`.

    Args:
        unet: The denoiser, for images of its `sample_size`, where it is a U-Net.
        transformer: The denoiser, where it is a DiT.
        scheduler: The scheduler it was trained under, or another of the same framework.
        null_class: The label that stands for no class, if a class-conditional U-Net has one. A DiT's is its last label.
        vae: What decodes the denoiser's latents to images, where it works on latents.
        id2label: The names of the denoiser's classes by label; commas separate several names of one class.

    Raises:
        ValueError: Parts that do not make a pipeline.
    """

    unet: Any
    transformer: Any
    scheduler: Any
    vae: Any
    model_cpu_offload_seq = "unet->transformer->vae"  # type: ignore[assignment]
    _optional_components = ["unet", "transformer", "vae"]
    _callback_tensor_inputs = ["latents"]
    _guidance_scale, _interrupt, _num_timesteps = 1.0, False, 0
    _fine_tuned_from: str | None = None  # the classifier's checkpoint, where its denoiser is no longer the generator

    def __init__(
        self,
        unet: UNet2DModel | None = None,
        scheduler: SchedulerMixin | None = None,
        transformer: DiTTransformer2DModel | None = None,
        null_class: int | None = None,
        vae: AutoencoderKL | None = None,
        id2label: dict[int, str] | dict[str, str] | None = None,
    ):
        super().__init__()
        parts = {"unet": unet, "scheduler": scheduler, "transformer": transformer, "vae": vae}
        _check_parts(null_class, **parts)
        self.register_modules(**parts)
        network = network_of(self.denoiser)
        network.complete(self.denoiser)
        names = checked_names(id2label, network.num_labels(self.denoiser.config))
        self.register_to_config(null_class=null_class, id2label=names)

    @classmethod
    def for_denoiser(cls, denoiser: Any, scheduler: Any, null_class: int | None = None, **parts: Any) -> DDAEPipeline:
        """Return the pipeline of a denoiser, under the key that diffusers has for it; `parts` are other components."""
        check_denoiser_class(_class_name(denoiser))
        networks = {NETWORKS[_class_name(denoiser)].component: denoiser}
        return cls(scheduler=scheduler, null_class=null_class, **networks, **parts)

    @property
    def denoiser(self) -> Any:
        """The denoiser, under whichever key diffusers keeps it."""
        return self.transformer if self.unet is None else self.unet

    @property
    def null_class(self) -> int | None:
        """The label that stands for no class, where the denoiser has one."""
        given = self.config["null_class"]
        return network_of(self.denoiser).default_null_class(self.denoiser.config) if given is None else given

    @null_class.setter
    def null_class(self, label: int | None) -> None:
        _check_parts(label, **self.components)
        self.register_to_config(null_class=label)

    @property
    def labels(self) -> dict[str, int]:
        """The label of each name that only one class has, sorted by name; empty where the classes have no names."""
        found = labels_by_name(self.config["id2label"] or {})
        return {name: labels[0] for name, labels in found.items() if len(labels) == 1}

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """Return the labels of classes by their names, as `class_labels` takes them: see `labels.label_ids`."""
        return label_ids(self.config["id2label"] or {}, [label] if isinstance(label, str) else label)

    @property
    def guidance_scale(self) -> float:
        """Strength of guidance of the last call; a callback that sets `_guidance_scale` changes the steps after it."""
        return self._guidance_scale

    def save_pretrained(
        self, save_directory: Any, safe_serialization: bool = True, *, include_code: bool = False, **kwargs: Any
    ) -> None:
        """Write the components and `model_index.json`, as in diffusers; `safe_serialization` is always true.

        With `include_code` this package's modules are written too. Where it is not installed, the folder then opens
        with `DiffusionPipeline.from_pretrained(..., custom_pipeline="pipeline", trust_remote_code=True)`.

        Raises:
            ValueError: Pickled weights are asked for, or components were set that do not make a pipeline.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization is False, but only safetensors weights are written: leave it out.")
        _check_parts(self.config["null_class"], **self.components)
        self.register_modules(**self.components)  # diffusers misses one that is set where there was none
        network = network_of(self.denoiser)
        if network.own_module:
            library = network.libraries[1 if include_code else 0]
            self.register_to_config(**{network.component: (library, network.model.__name__)})
        if include_code:
            save_pipeline_code(save_directory, {network.component: network.own_module})
        with ExitStack() as stack:
            for name, part in self.components.items():
                if isinstance(part, torch.nn.Module):
                    stack.enter_context(uncompiled_names(part))
                    where = Path(save_directory, name)
                    stack.enter_context(replaced_weights(where, DIFFUSERS_FILE, kwargs.get("variant")))
            super().save_pretrained(save_directory, **kwargs)

    def to_json_string(self) -> str:
        """Return `model_index.json` without missing components, so that stock pipelines find only what they know."""
        index = json.loads(super().to_json_string())
        kept = {name: value for name, value in index.items() if value not in (None, [None, None])}
        return json.dumps(kept, indent=2, sort_keys=True) + "\n"

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the last call."""
        return self._num_timesteps

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> DDAEPipeline:
        """Open a pipeline from any layout: see `ddae_hf.checkpoints`.

        It takes what `DiffusionPipeline.from_pretrained` takes, with its default of float32. A bare network has no
        scheduler: pass `scheduler=`, or DDPM's defaults are taken, with a warning. A classifier's checkpoint opens as
        the generator it came from; if its denoiser was fine-tuned since, sampling warns. With `variant`, that variant
        of the denoiser is opened, and of the VAE too if it has one.

        Raises:
            ValueError: No checkpoint, a denoiser that is not supported, pickled weights, missing tensors, no such
                variant, or a wrong `dtype`.
        """
        checkpoint, dtype = take_checkpoint(pretrained_model_name_or_path, kwargs)
        dtypes = _dtypes(dtype)
        source = checkpoint.chain()[-1]
        check_sampled(network_of(checkpoint.denoiser), source.path, (source.index or {}).get("_class_name"))
        checkpoint = checkpoint.generator(kwargs)
        if reason := checkpoint.config.get("features_only"):
            raise ValueError(f"{checkpoint.path} has features, but cannot generate: {reason}")
        if not checkpoint.opens_in_diffusers:
            return cls._from_parts(checkpoint, dtypes, **kwargs)
        if network_of(checkpoint.denoiser).component not in kwargs:
            checkpoint.check("denoiser")
        if "vae" not in kwargs and checkpoint.vae is not None:
            checkpoint.check("vae")
        if "scheduler" not in kwargs and checkpoint.scheduler is not None:
            build_scheduler(checkpoint.scheduler)
        return super().from_pretrained(
            checkpoint.path, dtype=dtype, variant=checkpoint.variant, use_safetensors=True, **checkpoint.hub, **kwargs
        )

    @classmethod
    def _from_parts(cls, checkpoint: Checkpoint, dtypes: dict[str, torch.dtype], **given: Any) -> DDAEPipeline:
        """Open a checkpoint that diffusers cannot open."""
        name = network_of(checkpoint.denoiser).component
        if unknown := sorted(set(given) - (allowed := {name, "scheduler", "null_class", "vae", "id2label"})):
            every = sorted({*allowed, *LOADING_ARGUMENTS})
            raise ValueError(f"For this layout {unknown} cannot be given: allowed are {every}.")
        denoiser = given.get(name)
        tuned = False
        if denoiser is None:
            denoiser = checkpoint.load("denoiser")
            tuned = checkpoint.holds_model and not still_generates(denoiser, checkpoint.config)
            # The network's own `to` would log a warning about an empty list.
            denoiser = torch.nn.Module.to(denoiser, dtypes.get(name, dtypes["default"]))
        vae = given["vae"] if "vae" in given else checkpoint.load("vae", dtypes.get("vae", dtypes["default"]))
        pipeline = cls(
            scheduler=given["scheduler"] if "scheduler" in given else checkpoint.scheduler_or_default(vae is not None),
            null_class=given.get("null_class", checkpoint.config.get("null_class")),
            vae=vae,
            id2label=given.get("id2label", (checkpoint.index or {}).get("id2label")),
            **{name: denoiser},
        )
        pipeline._fine_tuned_from = checkpoint.path if tuned else None
        return pipeline

    def _check_output(self, output_type: str, callback_tensors: list[str]) -> None:
        config = self.denoiser.config
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type is {output_type!r}: allowed are 'pil', 'np', 'pt' and 'latent'.")
        channels = config.in_channels if self.vae is None else self.vae.config.out_channels
        if output_type == "pil" and channels not in (1, 3):
            raise ValueError(f"Images of {channels} channels have no PIL form: use output_type='np' or 'pt'.")
        if unknown := sorted(set(callback_tensors) - set(self._callback_tensor_inputs)):
            raise ValueError(f"unknown callback tensors {unknown}: allowed are {self._callback_tensor_inputs}.")

    def _check_sampler(self, family: Family, sampler: str | None, heun: Heun) -> None:
        family.check_steps()
        if sampler is None and (given := [f.name for f in fields(heun) if getattr(heun, f.name) != f.default]):
            raise ValueError(f"{', '.join(given)} came, which only sampler='heun' takes.")
        if heun.clip_denoised and self.vae is not None:
            raise ValueError("clip_denoised clips to [-1, 1], and latents have no such bounds: leave it out.")
        family.check_sampler(sampler)

    def _check_guidance(self, class_labels: Any) -> None:
        check_number("guidance_scale", self.guidance_scale)
        if self.guidance_scale != 1 and (class_labels is None or self.null_class is None):
            missing = "`class_labels`" if class_labels is None else "a null class, which this denoiser lacks"
            raise ValueError(f"guidance_scale is {self.guidance_scale}: guidance needs {missing}.")

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        class_labels: int | list[int] | Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        num_inference_steps: int = 100,
        sampler: str | None = None,
        guidance_scale: float = 1.0,
        s_churn: float = 0.0,
        s_min: float = 0.0,
        s_max: float = math.inf,
        s_noise: float = 1.0,
        clip_denoised: bool = False,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate images.

        Args:
            batch_size: Number of images. By default it follows from `class_labels`, a list of generators or `latents`,
                which must agree; it is 1 where none of these says it.
            class_labels: One label for all images, or a list or tensor (B,) with one for each, for a class-conditional
                denoiser; by default its null class.
            generator: Random generator, or a list with one for each image; it makes the images reproducible.
            latents: Standard-normal noise (B, C, H, W) to start from; the pipeline scales it as the scheduler needs.
            num_inference_steps: Number of steps, each one call of the network for first-order schedulers.
            sampler: `"heun"` for the second-order sampler of Karras et al. 2022 (algorithm 2), for a network trained
                with EDM: N steps are 2 N - 1 calls of the network. By default the scheduler's own steps are taken.
            guidance_scale: Strength w of classifier-free guidance (Ho and Salimans 2022), `null + w * (label - null)`;
                at 1 there is none.
            s_churn: The Heun sampler's stochasticity, S_churn in the paper; 0 is deterministic.
            s_min: Lowest sigma to which it adds noise.
            s_max: Highest sigma to which it adds noise.
            s_noise: Standard deviation of the added noise, in units of what the levels ask for.
            clip_denoised: Whether the Heun sampler clips the denoised image to [-1, 1] at every step.
            output_type: `"pil"`, `"np"` (B, H, W, C) in [0, 1], `"pt"` (B, C, H, W) in [0, 1], or `"latent"`, the
                last step's tensor: scaled latents or, without a VAE, images in [-1, 1], not clipped.
            return_dict: Whether to return an `ImagePipelineOutput` or a tuple.
            callback_on_step_end: Called as `callback(pipeline, step, timestep, tensors)` after every step; tensors in
                the dictionary that it returns replace the pipeline's. It may set `pipeline._guidance_scale` for the
                steps that follow, and `pipeline._interrupt` to stop there. A `PipelineCallback` of diffusers will do.
            callback_on_step_end_tensor_inputs: The tensors that the callback gets. The only one is `"latents"`, the
                noisy image.

        Raises:
            ValueError: An argument that cannot work, before any step is taken.
        """
        tensors = ["latents"] if callback_on_step_end_tensor_inputs is None else callback_on_step_end_tensor_inputs
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            tensors = callback_on_step_end.tensor_inputs
        _check_parts(self.config["null_class"], **self.components)
        self._check_output(output_type, tensors)
        self._interrupt = False
        heun = Heun(s_churn, s_min, s_max, s_noise, clip_denoised)
        steps = self.steps(
            batch_size, class_labels, generator, latents, num_inference_steps, sampler, guidance_scale, heun
        )
        with self.progress_bar(total=self.num_timesteps) as progress:
            for step in steps:
                if callback_on_step_end is not None:
                    tensor_inputs = dict.fromkeys(tensors, step.sample)
                    step.obey(callback_on_step_end(self, step.number - 1, step.timestep, tensor_inputs))
                progress.update()
                if self._interrupt:
                    break
        images = self._postprocess(step.sample, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def steps(
        self,
        batch_size: int | None = None,
        class_labels: int | list[int] | Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        num_inference_steps: int = 100,
        sampler: str | None = None,
        guidance_scale: float = 1.0,
        heun: Heun | None = None,
    ) -> Iterator[Step]:
        """Return an iterator that generates images, and yields after every step: see `__call__` for the arguments.

        `heun` holds the options of `sampler="heun"`. Until the iterator ends, nothing else may use the scheduler, which
        counts the steps. A caller that stops early must close the iterator.

        Raises:
            ValueError: An argument that cannot work, at once.
        """
        self._guidance_scale = guidance_scale
        _check_parts(self.config["null_class"], **self.components)
        diffusion = Diffusion(self.denoiser, self.scheduler, self.null_class, float32_output=True)
        check_count("num_inference_steps", num_inference_steps)
        heun = heun or Heun()
        self._check_sampler(diffusion.family, sampler, heun)
        batch_size = count_images(batch_size, class_labels=class_labels, generator=generator, latents=latents)
        device = self._execution_device
        conditions = diffusion.conditions(class_labels, batch_size, device)
        without = None if self.null_class is None else diffusion.conditions(None, batch_size, device)
        self._check_guidance(class_labels)
        if self._fine_tuned_from is not None:
            warnings.warn(
                f"The denoiser in {self._fine_tuned_from} was trained as a classifier and is no longer the generator "
                "that was pretrained: its images may be noise. Sample from the generative checkpoint instead.",
                stacklevel=4,
            )
        config = self.denoiser.config
        shape = (batch_size, config.in_channels, *diffusion.network.size(config))
        noise = initial_noise(shape, generator, latents, device)
        diffusion.family.set_timesteps(num_inference_steps)
        self._num_timesteps = len(self.scheduler.timesteps)

        ask = diffusion.predict if sampler is None else diffusion.denoise

        def answer(sample: Tensor, level: Any) -> Tensor:
            self._check_guidance(class_labels)  # a callback may have changed its scale
            return ask(sample, level, conditions, self.guidance_scale, without)

        if sampler is None:
            return scheduler_steps(diffusion.family, noise, answer, generator)
        timesteps = self.scheduler.timesteps.to(noise.device)
        return heun.steps(self.scheduler.sigmas.tolist(), timesteps, noise, answer, generator)

    def _postprocess(self, sample: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return sample
        decoded = sample if self.vae is None else decode(self.vae, sample)
        images = (decoded / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        array = images.cpu().permute(0, 2, 3, 1).numpy()
        return array if output_type == "np" else self.numpy_to_pil(array)


# diffusers reads from the signature which components are required. The scheduler has a default only because Python
# asks for one after `unet`; the signature shows it without.
_arguments = dict(inspect.signature(DDAEPipeline.__init__).parameters)
_scheduler = _arguments.pop("scheduler").replace(default=inspect.Parameter.empty, kind=inspect.Parameter.KEYWORD_ONLY)
DDAEPipeline.__init__.__signature__ = inspect.Signature([*_arguments.values(), _scheduler])  # type: ignore[attr-defined]


def _class_name(network: Any) -> str:
    """Return the name of its class, without what torch's `fully_shard` makes of it."""
    kinds = type(uncompiled(network)).__mro__
    return next(kind.__name__ for kind in kinds if not kind.__module__.startswith("torch.distributed"))


def _check_parts(
    null_class: int | None, unet: Any = None, scheduler: Any = None, transformer: Any = None, vae: Any = None
) -> None:
    """Refuse components that do not make a pipeline."""
    if scheduler is None:
        raise ValueError("Pass a `scheduler`: the one that the denoiser was trained under.")
    found = {key: net for key, net in {"unet": unet, "transformer": transformer}.items() if net is not None}
    if len(found) != 1:
        raise ValueError(f"Pass one denoiser, as `unet` or as `transformer`: {' and '.join(found) or 'none'} came.")
    [(key, denoiser)] = found.items()
    name = _class_name(denoiser)
    check_denoiser_class(name, f"`{key}`")
    network = NETWORKS[name]
    if network.component != key:
        raise ValueError(f"`{key}` is a {name}: pass it as `{network.component}`.")
    check_sampled(network)
    if vae is not None:
        check_vae_class(_class_name(vae))
        check_vae(vae.config, denoiser.config)
    network.check_config(denoiser.config)
    network.check_timesteps(denoiser.config, scheduler)
    network.check_null_class(null_class, denoiser.config)


def _dtypes(asked: Any) -> dict[str, torch.dtype]:
    """Return the type of each component that `from_pretrained` was asked for by name, and of `"default"`."""
    dtypes = asked if isinstance(asked, dict) else {"default": asked or torch.float32}
    if wrong := [dtype for dtype in dtypes.values() if not isinstance(dtype, torch.dtype)]:
        raise ValueError(f"dtype is {wrong[0]!r}: pass a torch.dtype, or a dictionary of them by component.")
    return {"default": torch.float32, **dtypes}
