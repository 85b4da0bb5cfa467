r"""Train a small variational autoencoder on images, which need no labels, for denoisers that work on latents.

    ddae train-vae --config cifar10_vae --dataset_name uoft-cs/cifar10 --output_dir runs/cifar10_vae

The output folder opens with diffusers' `AutoencoderKL.from_pretrained`, and `ddae encode --vae` takes it; its
`scaling_factor` is measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..experiments.images import DataOptions
from ..experiments.options import option
from ..experiments.sharing import is_first_process
from ..experiments.vae_training import VAEOptions, train_vae


@dataclass(kw_only=True)
class Arguments(VAEOptions):
    """The options of the training, and where the autoencoder is written."""

    output_dir: str = option("runs/vae", "Folder of the autoencoder, its checkpoints and results.")


KINDS = (DataOptions, Arguments)


def main(data: DataOptions, options: Arguments) -> None:
    """Run the command."""
    result = train_vae(data.open(options.cache_dir), options)
    if is_first_process():
        print(result.table())
