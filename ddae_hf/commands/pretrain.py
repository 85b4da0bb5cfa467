r"""Train a denoiser on images, which need no labels, or on the latents that `ddae encode` made of them.

    ddae pretrain --train_data_dir photos --output_dir runs/photos
    accelerate launch -m ddae_hf pretrain --config cifar10_ddpm_unet --dataset_name uoft-cs/cifar10 \
        --output_dir runs/cifar10_ddpm_unet
    ddae pretrain --config cifar10_latent_dit --latents_dir runs/cifar10_latents --output_dir runs/cifar10_latent_dit

The output folder opens with `DDAEPipeline.from_pretrained` and `DDAEForImageClassification.from_pretrained` as the
network of averaged (EMA) weights. The weights that the optimiser left are in its sub-folder `raw`, which opens too.
Both hold the VAE of the latents that they were trained on.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..experiments.images import DataOptions, Images
from ..experiments.latent_folder import LatentFolder
from ..experiments.options import option
from ..experiments.pretraining import PretrainingOptions, pretrain
from ..experiments.publishing import HubOptions, prepare, publish
from ..experiments.sharing import is_first_process


@dataclass(kw_only=True)
class Arguments(PretrainingOptions):
    """What is trained on, and where the checkpoint goes."""

    output_dir: str = option("runs/pretrain", "Folder of checkpoints, samples and logs.")
    latents_dir: str | None = option(None, "Folder that `ddae encode` wrote, in place of a data set of images.")
    streaming: bool = option(
        False, "Read images while training, without ever downloading or holding the whole data set."
    )


KINDS = (DataOptions, Arguments, HubOptions)


def main(data: DataOptions, options: Arguments, hub: HubOptions) -> None:
    """Run the command."""
    if is_first_process():
        prepare(hub, options.output_dir)
    if options.latents_dir is None:
        images: Images | LatentFolder = data.open(options.cache_dir, options.streaming)
    else:
        given = [name for name, value in (data.to_dict() | {"streaming": options.streaming}).items() if value]
        if given:
            raise ValueError(f"{given[0]} does not go with latents_dir, which fixes what is trained on: leave it out.")
        images = LatentFolder(options.latents_dir)
    result = pretrain(images, options)
    if is_first_process():
        print(result.table())
        print(publish(hub, options.output_dir, "Pretrain") or f"The checkpoint is in {options.output_dir}.")
