r"""Train a small variational autoencoder on images, which need no labels, for denoisers that work on latents.

    python examples/train_vae.py --config examples/configs/cifar10_vae.yaml \
        --dataset_name uoft-cs/cifar10 --output_dir runs/cifar10_vae

The output folder opens with diffusers' `AutoencoderKL.from_pretrained`, and `encode_latents.py --vae` takes it; its
`scaling_factor` is measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from ddae_hf.commands.parsing import parse, sentences, show_log
from ddae_hf.experiments.images import DataOptions
from ddae_hf.experiments.options import option
from ddae_hf.experiments.training import this_process
from ddae_hf.experiments.vae_training import VAEOptions, train_vae


@dataclass(kw_only=True)
class Arguments(VAEOptions):
    """Where the autoencoder is written."""

    output_dir: str = option("runs/vae", "Folder of the autoencoder, its checkpoints and results.")


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    data, options = parse([DataOptions, Arguments], __doc__, argv)
    first = this_process().is_main_process
    show_log(first)
    with sentences():
        result = train_vae(data.open(options.cache_dir), options)
        if first:
            print(result.table())
    this_process().destroy_process_group()


if __name__ == "__main__":
    main()
