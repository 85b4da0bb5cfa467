r"""Train a denoiser on images, which need no labels, or on the latents that `encode_latents.py` made of them.

    accelerate launch examples/pretrain.py --config examples/configs/cifar10_ddpm_unet.yaml \
        --dataset_name uoft-cs/cifar10 --output_dir runs/cifar10_ddpm_unet
    accelerate launch examples/pretrain.py --config examples/configs/cifar10_latent_dit.yaml \
        --latents_dir runs/cifar10_latents --output_dir runs/cifar10_latent_dit

The output folder opens with `DDAEPipeline.from_pretrained` and `DDAEForImageClassification.from_pretrained` as the
network of averaged (EMA) weights; the weights that the optimiser left are in its sub-folder `raw`, which opens alike.
Both hold the VAE of the latents that they were trained on.
"""

from __future__ import annotations

from dataclasses import dataclass

from ddae_hf.commands.parsing import parse, sentences, show_log
from ddae_hf.experiments.images import DataOptions
from ddae_hf.experiments.latent_folder import LatentFolder
from ddae_hf.experiments.options import option
from ddae_hf.experiments.pretraining import PretrainingOptions, pretrain
from ddae_hf.experiments.publishing import PRIVATE, HubOptions, prepare, publish
from ddae_hf.experiments.training import this_process


@dataclass(kw_only=True)
class Arguments(PretrainingOptions):
    """What is trained on, and where to."""

    output_dir: str = option("runs/pretrain", "Folder of checkpoints, samples and logs.")
    latents_dir: str | None = option(None, "Folder that encode_latents.py wrote, in place of a data set of images.")
    streaming: bool = option(
        False, "Read images while training, without ever downloading or holding the whole data set."
    )


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    data, options, hub = parse([DataOptions, Arguments, HubOptions], __doc__, argv)
    first = this_process().is_main_process
    show_log(first)
    with sentences():
        if first:
            prepare(hub, options.output_dir)
        if options.latents_dir is None:
            images = data.open(options.cache_dir, options.streaming)
        else:
            given = [name for name, value in (data.to_dict() | {"streaming": options.streaming}).items() if value]
            if given:
                raise ValueError(f"{given[0]} does not go with latents_dir, which says what its latents are of.")
            images = LatentFolder(options.latents_dir)
        result = pretrain(images, options)
        if first:
            print(result.table())
            print(publish(hub, options.output_dir, "Pretrain", (*PRIVATE, f"{options.logging_dir}/*")) or "")
    this_process().destroy_process_group()


if __name__ == "__main__":
    main()
