"""Generate images into a folder, and a grid of the first ones.

    python examples/generate.py --model_name_or_path runs/cifar10_ddpm_unet --num_images 1000 --output_dir runs/samples

Image number i comes from seed `--seed` + i, whatever the batch size, and an image that is there already is not made
again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image
from tqdm.auto import tqdm

from data import image_grid, parse_with_config
from ddae_hf import DDAEPipeline
from ddae_hf.checkpoints import fingerprint
from ddae_hf.noise import family


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model_name_or_path", required=True, help="Checkpoint, folder or Hub id, in any layout.")
    add("--output_dir", default="runs/samples", help="Folder of the images 00000.png, ... and grid.png.")
    add("--num_images", type=int, default=64)
    add("--batch_size", type=int, default=64)
    add("--num_inference_steps", type=int, default=100)
    add("--scheduler", help="Another diffusers scheduler of the same framework, such as DDIMScheduler.")
    add("--sampler", choices=["heun"], help="EDM's second-order sampler, in place of the scheduler's steps.")
    add("--class_label", type=int, help="Class to generate, for a class-conditional denoiser.")
    add("--guidance_scale", type=float, default=1.0, help="Strength of classifier-free guidance; at 1 there is none.")
    add("--seed", type=int, default=0)
    add("--grid_images", type=int, default=64, help="Images in grid.png.")
    args = parse_with_config(parser, argv)
    if args.num_images < 1 or args.batch_size < 1 or args.num_inference_steps < 1:
        parser.error("--num_images, --batch_size and --num_inference_steps must be at least 1.")
    known = getattr(diffusers, args.scheduler or "DDIMScheduler", None)
    if not (isinstance(known, type) and issubclass(known, diffusers.SchedulerMixin)):
        parser.error(f"--scheduler {args.scheduler}: diffusers has no such scheduler.")
    return args


def open_pipeline(args: argparse.Namespace) -> DDAEPipeline:
    """Return the pipeline on the best device there is, with the scheduler asked for."""
    pipeline = DDAEPipeline.from_pretrained(args.model_name_or_path)
    if args.scheduler:
        chosen = getattr(diffusers, args.scheduler).from_config(pipeline.scheduler.config)
        trained, wanted = family(pipeline.scheduler), family(chosen)
        if trained != wanted:
            raise SystemExit(
                f"--scheduler {args.scheduler} is of {wanted}, but the network was trained with {trained}."
            )
        pipeline.scheduler = chosen
    pipeline.set_progress_bar_config(desc="Denoising", leave=False)
    pipeline.denoiser.to(memory_format=torch.channels_last)
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


def check_folder(args: argparse.Namespace, note: Path, pipeline: DDAEPipeline) -> dict[str, Any]:
    """Return what the images depend on, or stop if the folder's note says that it holds others."""
    names = (
        "model_name_or_path",
        "num_inference_steps",
        "scheduler",
        "sampler",
        "class_label",
        "guidance_scale",
        "seed",
    )
    options = {name: getattr(args, name) for name in names} | {"weights": fingerprint(pipeline.denoiser)}
    if note.exists() and json.loads(note.read_text()) != options:
        raise SystemExit(f"{note.parent} holds images made with other options or weights: choose another --output_dir.")
    return options


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    args = parse_arguments(argv)
    folder = Path(args.output_dir)
    pipeline = open_pipeline(args)
    note = folder / "options.json"
    options = check_folder(args, note, pipeline)
    paths = [folder / f"{i:05d}.png" for i in range(args.num_images)]
    missing = [i for i, path in enumerate(paths) if not path.exists()]
    for start in tqdm(range(0, len(missing), args.batch_size), desc="Batches"):
        numbers = missing[start : start + args.batch_size]
        generators = [torch.Generator("cpu").manual_seed(args.seed + i) for i in numbers]
        try:
            images = pipeline(
                len(numbers),
                class_labels=args.class_label,
                generator=generators,
                num_inference_steps=args.num_inference_steps,
                sampler=args.sampler,
                guidance_scale=args.guidance_scale,
            ).images
        except ValueError as error:  # options that this checkpoint does not take
            raise SystemExit(str(error)) from error
        folder.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(options, indent=2) + "\n")
        for i, image in zip(numbers, images, strict=True):
            image.save(paths[i])
    shown = [Image.open(path) for path in paths[: args.grid_images]]
    image_grid(shown).save(folder / "grid.png")
    print(f"{args.num_images} images in {folder}, {len(missing)} of them made now; look at {folder / 'grid.png'}.")


if __name__ == "__main__":
    main()
