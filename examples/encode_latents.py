r"""Encode images by a VAE once, so that denoisers of latents train on them without it.

    python examples/encode_latents.py --vae runs/cifar10_vae --dataset_name uoft-cs/cifar10 --mirror \
        --output_dir runs/cifar10_latents
    accelerate launch examples/pretrain.py --latents_dir runs/cifar10_latents --output_dir runs/latent_dit

Latents are kept in float16: 8 KiB an image of 256 pixels with the usual VAE, in files that are read a batch at a time.
An interrupted run goes on where it stopped. Labels are kept beside them where the data set has any.
"""

from __future__ import annotations

import argparse

from data import add_center_crop_argument, add_data_arguments, image_column, load_splits, parse_with_config, pick_split
from ddae_hf import DDAEImageProcessor
from ddae_hf.checkpoints import load_vae
from ddae_hf.experiments.classes import find_labels
from ddae_hf.experiments.latent_folder import LatentFolder
from ddae_hf.experiments.run_facts import data_facts
from ddae_hf.latents import downsampling
from labelled import Images
from latents import describe_splits, encode_views, state_use


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser)
    add_center_crop_argument(parser)
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    add("--vae", required=True, help="Folder or Hub id of an AutoencoderKL, or of a checkpoint that has one.")
    add("--output_dir", default="runs/latents", help="Folder of the latents.")
    add("--resolution", type=int, help="Side of the square images; by default the VAE's sample_size.")
    add("--mirror", action=flag, default=False, help="Encode every image's mirror image too, as a second view.")
    add("--sample_posterior", action=flag, default=False, help="Draw latents from the VAE's distribution.")
    add("--batch_size", type=int, default=16, help="Images that are encoded at a time.")
    add("--seed", type=int, default=0, help="Seed of the draws.")
    args = parse_with_config(parser, argv)
    for name in ("batch_size", "resolution"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}: it must be at least 1.")
    return args


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    args = parse_arguments(argv)
    try:
        vae = load_vae(args.vae, cache_dir=args.cache_dir).float()
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error
    side, factor = args.resolution or vae.config.sample_size, downsampling(vae.config)
    if side % factor:
        raise SystemExit(f"--resolution is {side}: it must be a multiple of {factor}, the pixels a latent stands for.")
    data = load_splits(args)
    dataset = pick_split(data, args.train_split, args.max_train_samples, args.label_column)
    size = {"height": side, "width": side}
    processor = DDAEImageProcessor(size=size, num_channels=vae.config.in_channels, do_center_crop=args.center_crop)
    images = Images({"train": dataset}, image_column(dataset, args.image_column), processor, args.batch_size)
    labels, names = find_labels(data[args.train_split], dataset, args.label_column)
    notes = {"names": names, "vae_source": args.vae, "dataset": data_facts(args, len(dataset))}
    splits = describe_splits(images, {"train": 1 + args.mirror}, {"mirror": args.mirror})
    draws = {"sample_posterior": args.sample_posterior, "seed": args.seed}
    try:
        folder = LatentFolder.create(args.output_dir, vae, (side, side), splits, **draws, **notes)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error
    print(state_use(folder, vae, args.batch_size, (side, side)))
    if labels is not None:
        folder.write_labels("train", labels)
    encode_views(folder, vae, images)
    print(f"{len(dataset):,} images in {args.output_dir}, {folder.views('train')} view(s) each.")


if __name__ == "__main__":
    main()
