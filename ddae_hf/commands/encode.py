r"""Encode images by a VAE once, so that denoisers of latents train on them without it.

    ddae encode --vae runs/cifar10_vae --dataset_name uoft-cs/cifar10 --mirror --output_dir runs/cifar10_latents
    ddae pretrain --config cifar10_latent_dit --latents_dir runs/cifar10_latents --output_dir runs/latent_dit

Latents are kept in float16: 8 KiB an image of 256 pixels with the usual VAE, in files that are read a batch at a time.
An interrupted run goes on where it stopped. Labels are kept beside them where the data set has any.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..experiments.encoding import EncodingOptions, encode
from ..experiments.images import DataOptions
from ..experiments.options import option


@dataclass(kw_only=True)
class Arguments(EncodingOptions):
    """What encodes."""

    vae: str = option(help="Folder or Hub id of an AutoencoderKL, or of a checkpoint that has one.")


KINDS = (DataOptions, Arguments)


def main(data: DataOptions, options: Arguments) -> None:
    """Run the command."""
    folder = encode(options.vae, data.open(options.cache_dir), options)
    count = folder.index["splits"]["train"]["count"]
    print(f"{count:,} images in {folder.folder}, {folder.views('train')} view(s) each.")
