"""Generating images, into a folder where an interrupted run goes on, or into memory.

Image number i comes from seed + i, whatever the batch size and the number of processes.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import diffusers
import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from ..checkpoints import plain_config
from ..modeling_ddae import DDAEModel
from ..networks import network_of
from ..noise import change_scheduler, family_of
from ..pipeline_ddae import DDAEPipeline
from ..weights import fingerprint
from .arrays import StrPath, differences, read_json, write_json, written_whole
from .devices import HELP, best_device, made_fast
from .features import evaluating
from .options import Options, option
from .sharing import this_process

# A generator's folder or Hub id, in any layout, or an open pipeline or model.
Generator = StrPath | DDAEPipeline | DDAEModel

NOTE = "options.json"  # what the images of a folder depend on


@dataclass(kw_only=True)
class GenerationOptions(Options):
    """Options of `generate`."""

    num_images: int = option(64, "Images to generate.")
    batch_size: int = option(64, "Images that are sampled at once.")
    num_inference_steps: int = option(100, "Sampling steps.")
    sampling_scheduler: str | None = option(
        None, "Another diffusers scheduler of the same framework, such as DDIMScheduler."
    )
    sampler: Literal["heun"] | None = option(None, "EDM's second-order sampler, in place of the scheduler's steps.")
    class_label: list[str] | None = option(None, "Classes to generate in turn, by number or name, or `all`.")
    guidance_scale: float = option(1.0, "Strength of classifier-free guidance; at 1 there is none.")
    seed: int = option(0, "Image number i comes from the seed + i.")
    dtype: Literal["float32", "bfloat16"] | None = option(None, HELP)
    cache_dir: str | None = option(None, "Where downloaded checkpoints and data are kept.")
    output_dir: str | None = option(None, "Folder of the images; by default they are kept in memory.")

    def __post_init__(self) -> None:
        given = self.class_label
        if given is not None:  # one class needs no list, and a number is as good as its digits
            self.class_label = [str(k) for k in ([given] if isinstance(given, (str, int, np.integer)) else given)]
        super().__post_init__()

    def check(self) -> None:
        """Refuse schedulers that diffusers does not have, and an empty list of classes."""
        known = getattr(diffusers, self.sampling_scheduler or "DDIMScheduler", None)
        if not (isinstance(known, type) and issubclass(known, diffusers.SchedulerMixin)):
            raise ValueError(f"sampling_scheduler is {self.sampling_scheduler}: diffusers has no such scheduler.")
        if self.class_label == []:
            raise ValueError("class_label names no class: give some, or leave it out.")


@dataclass
class Samples(Sequence[Image.Image]):
    """Generated images by number, in memory or in `paths`, opened when asked for; this run made `made` of them."""

    images: list[Image.Image]
    paths: list[Path]
    made: int

    def __len__(self) -> int:
        return len(self.images or self.paths)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[i] for i in range(len(self))[number]]
        return self.images[number] if self.images else Image.open(self.paths[number])


def generate(model: Generator, options: GenerationOptions | None = None, **changes: Any) -> Samples:
    """Generate images with a checkpoint, or with a pipeline or a model, which stays on its device.

    Each of the launched processes returns all images. With `output_dir` they are its files 00000.png, ...: existing
    ones are not made again, and launched processes (`accelerate launch`, `torchrun`) share the work. Global random
    states play no part, and stay as they are.

    Raises:
        ValueError: Options that cannot work, or a folder of images that were made otherwise.
        OSError: No such checkpoint, or no space left for the images.
    """
    options = GenerationOptions.of(options, changes)
    pipeline = open_pipeline(model, options)
    if options.output_dir is not None:
        return sample(pipeline, options, Path(options.output_dir))
    batches = tqdm(_batches(options), desc="Batches", leave=False)
    images = [image for batch in batches for image in sample_batch(pipeline, options, batch)]
    return Samples(images, [], options.num_images)


def open_pipeline(model: Generator, options: GenerationOptions) -> DDAEPipeline:
    """Return a pipeline with its own scheduler, the one asked for; one opened from a path is on the best device.

    Refused are a scheduler of another framework, unknown classes, another type than an open model's, and processes
    without a folder to share images through.
    """
    count = this_process().num_processes  # asked first: of several processes each has a GPU of its own
    if options.output_dir is None and count > 1:
        raise ValueError(f"output_dir is None: {count} processes share images through a folder.")
    wanted = None if options.dtype is None else getattr(torch, options.dtype)
    if isinstance(model, DDAEModel):
        if reason := model.config.features_only:
            raise ValueError(f"The model has features, but cannot generate: {reason}")
        model = DDAEPipeline.for_denoiser(model.denoiser, model.scheduler, model.config.null_class, vae=model.vae)
    if isinstance(model, DDAEPipeline):
        if wanted not in (None, model.denoiser.dtype):
            raise ValueError(f"dtype is {options.dtype}, but the pipeline is open in {model.denoiser.dtype}.")
        pipeline = copy.copy(model)
        pipeline.scheduler = type(model.scheduler).from_config(model.scheduler.config)  # it counts the steps
    elif not isinstance(model, (str, os.PathLike)):
        raise ValueError(f"{type(model).__name__} generates nothing: give a path, a DDAEPipeline or a DDAEModel.")
    else:
        pipeline = DDAEPipeline.from_pretrained(model, dtype=wanted, cache_dir=options.cache_dir).to(best_device())
        pipeline.set_progress_bar_config(desc="Denoising", leave=False, disable=None)
        made_fast(pipeline.denoiser, best_device())
        if pipeline.vae is not None:
            pipeline.vae.enable_slicing()  # one image at a time, which bounds the memory of decoding
    if options.sampling_scheduler:
        trained = pipeline.scheduler
        pipeline.scheduler = change_scheduler(trained, getattr(diffusers, options.sampling_scheduler))
        if (kind := family_of(pipeline.scheduler).name) != (wants := family_of(trained).name):
            given = f"sampling_scheduler {options.sampling_scheduler} is of {kind}"
            raise ValueError(f"{given}, but the network was trained with {wants}.")
    chosen_classes(pipeline, options)
    return pipeline


def chosen_classes(pipeline: DDAEPipeline, options: GenerationOptions) -> list[int] | None:
    """Return the labels that images get in turn, or None where no class is asked for."""
    given = options.class_label
    if given is None:
        if options.guidance_scale != 1:
            raise ValueError(f"guidance_scale is {options.guidance_scale}: guidance needs classes (class_label).")
        return None
    count = network_of(pipeline.denoiser).num_labels(pipeline.denoiser.config)
    if not count:
        raise ValueError(f"class_label is {' '.join(given)}: the denoiser is unconditional, so it has no classes.")
    if given == ["all"]:
        return [k for k in range(count) if k != pipeline.null_class]
    if "all" in given:
        raise ValueError(f"class_label is {' '.join(given)}: `all` takes no other class beside it.")
    try:
        labels = [int(k) if k.lstrip("-").isdigit() else pipeline.get_label_ids(k)[0] for k in given]
    except ValueError as error:  # no such name
        raise ValueError(f"class_label: {error}") from error
    if wrong := [k for k in labels if not 0 <= k < count]:
        raise ValueError(f"class_label is {wrong[0]}: allowed are 0 to {count - 1}.")
    return labels


def made_by(pipeline: DDAEPipeline, options: GenerationOptions) -> dict[str, Any]:
    """Return what images depend on, as JSON, except the null class and the scheduler."""
    names = ("num_inference_steps", "sampler", "class_label", "guidance_scale", "seed")
    facts = {name: getattr(options, name) for name in names}
    classes = [int(k) if k.lstrip("-").isdigit() else k for k in options.class_label or []]
    facts["class_label"] = classes[0] if len(classes) == 1 else classes or None  # as version 0.2.0 noted it
    return facts | {"weights": fingerprint(pipeline.denoiser, pipeline.vae, dtype=None)}


def sample(pipeline: DDAEPipeline, options: GenerationOptions, folder: Path) -> Samples:
    """Write the images that a folder lacks, with a note of what they depend on, and return all.

    Batches have fixed members, and one that lacks an image is computed whole: another size may round differently.
    """
    processes = this_process()
    paths = [folder / f"{i:05d}.png" for i in range(options.num_images)]
    facts = made_by(pipeline, options)
    facts |= {"null_class": pipeline.null_class, "scheduler": plain_config(pipeline.scheduler)}
    _check_folder(folder, paths, facts)
    lacking = {i for i, path in enumerate(paths) if not path.exists()}
    batches = [batch for batch in _batches(options) if not lacking.isdisjoint(batch)]
    processes.wait_for_everyone()  # all processes count before any of them writes
    with processes.split_between_processes(batches) as own:
        for batch in tqdm(own, desc="Batches", disable=not own or not processes.is_main_process):
            images = sample_batch(pipeline, options, batch)
            write_json(folder / NOTE, facts)  # every process does
            for path, image in zip(paths[batch.start : batch.stop], images, strict=True):
                if not path.exists():
                    with written_whole(path) as partial:
                        image.save(partial, format="PNG")
    processes.wait_for_everyone()
    return Samples([], paths, len(lacking))


def sample_batch(pipeline: DDAEPipeline, options: GenerationOptions, numbers: Sequence[int]) -> list[Image.Image]:
    """Return the images of these numbers."""
    classes = chosen_classes(pipeline, options)
    with evaluating(pipeline.denoiser):
        [images] = pipeline(
            len(numbers),
            class_labels=classes and [classes[i % len(classes)] for i in numbers],
            generator=[torch.Generator("cpu").manual_seed(options.seed + i) for i in numbers],
            num_inference_steps=options.num_inference_steps,
            sampler=options.sampler,
            guidance_scale=options.guidance_scale,
            return_dict=False,
        )
    return images


def _batches(options: GenerationOptions) -> list[range]:
    """Return the numbers of the images of every batch."""
    numbers = range(options.num_images)
    return [numbers[start : start + options.batch_size] for start in numbers[:: options.batch_size]]


def _check_folder(folder: Path, paths: Sequence[Path], facts: dict[str, Any]) -> None:
    """Raise `ValueError` if a folder holds images that were made otherwise, or in an unknown way."""
    note = folder / NOTE
    if not note.exists():
        if any(path.exists() for path in paths):
            raise ValueError(f"{folder} holds images without {NOTE}, which says how they were made: choose another.")
        return
    found = read_json(note)
    if different := differences(found, dict.fromkeys(found) | facts):
        raise ValueError(
            f"The images in {folder} were made otherwise ({'; '.join(different)}): choose another output_dir."
        )
