r"""Train a denoiser on images.

    accelerate launch examples/pretrain.py --config cifar10_ddpm_unet --dataset_name uoft-cs/cifar10 \
        --output_dir runs/cifar10_ddpm_unet

This is `ddae pretrain`, as a script, and takes the same options.
"""

import sys

from ddae_hf.commands.main import run

if __name__ == "__main__":
    run(["pretrain", *sys.argv[1:]])
