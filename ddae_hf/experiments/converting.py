"""Turn a published checkpoint of another code base into a folder that `ddae_hf` opens: `convert`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from diffusers import DiTPipeline

from .. import conversion
from ..checkpoints import load_vae, plain_config
from ..configuration_ddae import DDAEConfig
from ..image_processing_ddae import DDAEImageProcessor
from ..modeling_ddae import DDAEModel
from ..pipeline_ddae import DDAEPipeline
from ..weights import fingerprint
from .arrays import StrPath
from .options import Options, option


@dataclass(kw_only=True)
class ConversionOptions(Options):
    """What a checkpoint's file does not say."""

    vae: str | None = option(None, "For a DiT: folder or Hub id of its AutoencoderKL, or of a pipeline with it.")
    num_heads: int | None = option(None, "For a DiT: attention heads; needed if no published DiT has its width.")
    num_classes: int | None = option(None, "For a DiT: number of classes; by default what its training noted, or 1000.")
    framework: Literal["ddpm", "edm"] | None = option(
        None, "For a U-Net of the DDAE paper's authors: how it was trained; required, as the file does not say."
    )
    resolution: int | None = option(None, "For a U-Net of these authors: side of its images in pixels; by default 32.")


@dataclass
class Converted:
    """A converted checkpoint: its folder, the network in it, and the class that opens it."""

    folder: Path
    conversion: conversion.Conversion
    opens_in: str
    vae: Any

    def __str__(self) -> str:
        found, denoiser = self.conversion, self.conversion.denoiser
        lines = [
            f"The file holds {found.source}; {found.source_parameters:,} parameters.",
            f"{self.folder} holds it as a {type(denoiser).__name__} of {denoiser.num_parameters():,} parameters, under "
            f"{type(found.scheduler).__name__}{'' if self.vae is None else ' and its VAE'} ({self.opens_in}).",
        ]
        if reason := found.config.get("features_only"):
            lines.append(f"It gives features, but cannot generate images: {reason}")
        elif self.vae is None and denoiser.config.in_channels not in (1, 3):
            lines.append("It works on latents: without a vae, it takes and gives latents in place of images.")
        return "\n".join(lines)


def convert(
    checkpoint: StrPath, output_dir: StrPath, options: ConversionOptions | None = None, **changes: Any
) -> Converted:
    """Convert a published checkpoint. Its kind is recognised by its content, and no code that it names is run.

    Args:
        checkpoint: The file; `docs/guides/converting.md` lists the known kinds, and how exact their conversions are.
        output_dir: Folder to write, which must not hold anything yet.
        options: What the file does not say.
        **changes: Fields of the options to replace, by name.

    Returns:
        What was written; as text, it describes itself.

    Raises:
        ValueError: A folder that is not empty, a file of no known kind, or options that it does not take.
        OSError: A file that is not there, or a full disk.
    """
    options = ConversionOptions.of(options, changes)
    folder = Path(output_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not an empty folder: choose another output_dir.")
    vae = None if options.vae is None else load_vae(options.vae)
    written: Any
    found = conversion.convert(
        checkpoint, num_heads=options.num_heads, num_classes=options.num_classes,
        framework=options.framework, sample_size=options.resolution,
    )  # fmt: skip
    if found.config.get("features_only"):
        if vae is not None:
            raise ValueError("vae came, but this network works on pixels: leave it out.")
        written = DDAEModel(
            DDAEConfig(
                denoiser=plain_config(found.denoiser),
                scheduler=plain_config(found.scheduler),
                generator_fingerprint=fingerprint(found.denoiser),
                **found.config,
            )
        )
        written.denoiser.load_state_dict(found.denoiser.state_dict())
        DDAEImageProcessor.for_denoiser(written.config.denoiser).save_pretrained(folder)
    else:
        written = DDAEPipeline.for_denoiser(found.denoiser, found.scheduler, vae=vae)
        if vae is not None:
            written = DiTPipeline(written.transformer, vae, written.scheduler)
    written.save_pretrained(folder)
    return Converted(folder, found, type(written).__name__, vae)
