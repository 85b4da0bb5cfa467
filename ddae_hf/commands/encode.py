r"""Encode images by a VAE once, so that denoisers of latents train on them without it.

    ddae encode --vae runs/cifar10_vae --dataset_name uoft-cs/cifar10 --mirror --output_dir runs/cifar10_latents
    ddae pretrain --config cifar10_latent_dit --latents_dir runs/cifar10_latents --output_dir runs/latent_dit

Latents are kept in float16, in files that are read a batch at a time. With the usual VAE, an image of 256x256 pixels
takes 8 KiB.
An interrupted run goes on where it stopped. Labels are kept beside them where the data set has any.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..experiments.encoding import EncodingOptions, encode
from ..experiments.images import DataOptions
from ..experiments.options import option


@dataclass(kw_only=True)
class Arguments(EncodingOptions):
    """The options of encoding, and the VAE that encodes."""

    vae: str = option(help="Folder or Hub id of an AutoencoderKL, or of a checkpoint that has one.")


KINDS = (DataOptions, Arguments)


def main(data: DataOptions, options: Arguments) -> None:
    """Run the command."""
    folder = encode(options.vae, data.open(options.cache_dir), options)
    if folder is None:  # another process has it
        return
    count = folder.index["splits"]["train"]["count"]
    print(f"{count:,} images are in {folder.folder}, with {folder.views('train')} view(s) of each.")
