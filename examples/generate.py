"""Generate images into a folder, and a grid of the first ones.

    python examples/generate.py --model_name_or_path runs/cifar10_ddpm_unet --num_images 1000 --output_dir runs/samples

Image number i comes from seed `--seed` + i, whatever the batch size and the number of processes, and an image that is
there already is not made again. Several GPUs share the work: `accelerate launch` or `torchrun`. `--class_label` takes
labels or, where the checkpoint has them, names of classes: `--class_label 207 "tabby cat"`.
"""

from __future__ import annotations

import argparse
import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import PartialState
from PIL import Image
from tqdm.auto import tqdm

from data import parse_with_config
from ddae_hf import DDAEPipeline
from ddae_hf.checkpoints import plain_config
from ddae_hf.experiments.arrays import write_text, written_whole
from ddae_hf.experiments.devices import add_dtype_argument, best_device, chosen_dtype, made_fast
from ddae_hf.experiments.plots import image_grid
from ddae_hf.networks import network_of
from ddae_hf.noise import change_scheduler, family
from ddae_hf.weights import fingerprint

# What the images of a folder depend on, beside the weights.
IMAGE_OPTIONS = ("num_inference_steps", "sampler", "class_label", "guidance_scale", "seed")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model_name_or_path", required=True, help="Checkpoint, folder or Hub id, in any layout.")
    add("--output_dir", default="runs/samples", help="Folder of the images 00000.png, ... and grid.png.")
    add("--num_images", type=int, default=64)
    add_sampling_arguments(parser)
    add("--grid_images", type=int, default=64, help="Images in grid.png.")
    args = parse_with_config(parser, argv)
    check_sampling_arguments(parser, args)
    return args


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how images are sampled."""
    add = parser.add_argument_group("sampling").add_argument
    add("--batch_size", type=int, default=64)
    add_dtype_argument(parser)
    add("--num_inference_steps", type=int, default=100)
    add("--scheduler", help="Another diffusers scheduler of the same framework, such as DDIMScheduler.")
    add("--sampler", choices=["heun"], help="EDM's second-order sampler, in place of the scheduler's steps.")
    add("--class_label", nargs="+", type=class_label, help="Classes to generate in turn, by number or name, or `all`.")
    add("--guidance_scale", type=float, default=1.0, help="Strength of classifier-free guidance; at 1 there is none.")
    add("--seed", type=int, default=0)
    add("--cache_dir", help="Where downloaded checkpoints and data are kept.")


def class_label(value: str) -> int | str:
    """Return a class's number, or a word: its name, or `all`."""
    return int(value) if value.lstrip("-").isdigit() else value


def check_sampling_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Stop at options of `add_sampling_arguments` that cannot work."""
    if args.num_images < 1 or args.batch_size < 1 or args.num_inference_steps < 1:
        parser.error("--num_images, --batch_size and --num_inference_steps must be at least 1.")
    if args.class_label is not None and len(args.class_label) == 1:
        [args.class_label] = args.class_label
    known = getattr(diffusers, args.scheduler or "DDIMScheduler", None)
    if not (isinstance(known, type) and issubclass(known, diffusers.SchedulerMixin)):
        parser.error(f"--scheduler {args.scheduler}: diffusers has no such scheduler.")


def open_processes() -> PartialState:
    """Return which of the launched processes this is; they may end at times that are hours apart."""
    return PartialState(cpu=best_device() == "cpu", timeout=timedelta(days=7))


def open_pipeline(args: argparse.Namespace) -> DDAEPipeline:
    """Return the pipeline on the best device there is, with the scheduler asked for."""
    try:
        options = {**chosen_dtype(args), "cache_dir": args.cache_dir}
        pipeline = DDAEPipeline.from_pretrained(args.model_name_or_path, **options)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error
    if args.scheduler:
        chosen = change_scheduler(pipeline.scheduler, getattr(diffusers, args.scheduler))
        trained, wanted = family(pipeline.scheduler), family(chosen)
        if trained != wanted:
            raise SystemExit(
                f"--scheduler {args.scheduler} is of {wanted}, but the network was trained with {trained}."
            )
        pipeline.scheduler = chosen
    chosen_classes(args, pipeline)  # stops here at those that there are not
    pipeline.set_progress_bar_config(desc="Denoising", leave=False)
    made_fast(pipeline.denoiser, best_device())
    if pipeline.vae is not None:
        pipeline.vae.enable_slicing()  # one image at a time, which bounds what decoding needs
    return pipeline.to(best_device())


def check_folder(args: argparse.Namespace, note: Path, pipeline: DDAEPipeline) -> dict[str, Any]:
    """Return what the images depend on, or stop if the folder's note says that it holds others."""
    options = {name: getattr(args, name) for name in IMAGE_OPTIONS} | {"null_class": pipeline.null_class}
    options |= {"weights": fingerprint(pipeline.denoiser, pipeline.vae, dtype=None)}
    options |= {"scheduler": plain_config(pipeline.scheduler)}
    if note.exists() and json.loads(note.read_text()) != options:
        raise SystemExit(f"{note.parent} holds images made with other options or weights: choose another --output_dir.")
    return options


def image_paths(folder: Path, count: int) -> list[Path]:
    """Return the files of the images that are asked for."""
    return [folder / f"{i:05d}.png" for i in range(count)]


def sample(args: argparse.Namespace, pipeline: DDAEPipeline, processes: PartialState, folder: Path) -> int:
    """Write the images that the folder lacks, with a note of what they depend on; return how many it lacked.

    Batches have fixed members, and one that lacks an image is computed whole: arithmetic in a batch of another size may
    round differently, and so what is resumed is bit-equal to what was never interrupted.
    """
    note = folder / "options.json"
    options = check_folder(args, note, pipeline)
    paths = image_paths(folder, args.num_images)
    batches = [range(i, min(i + args.batch_size, len(paths))) for i in range(0, len(paths), args.batch_size)]
    lacking = sum(not path.exists() for path in paths)
    batches = [batch for batch in batches if not all(paths[i].exists() for i in batch)]
    processes.wait_for_everyone()  # all count before any writes
    with processes.split_between_processes(batches) as own:
        for batch in tqdm(own, desc="Batches", disable=not processes.is_main_process):
            images = sample_batch(args, pipeline, batch)
            folder.mkdir(parents=True, exist_ok=True)
            write_text(note, json.dumps(options, indent=2) + "\n")  # every process does
            for i, image in zip(batch, images, strict=True):
                if not paths[i].exists():
                    with written_whole(paths[i]) as partial:
                        image.save(partial, format="PNG")
    processes.wait_for_everyone()
    return lacking


def chosen_classes(args: argparse.Namespace, pipeline: DDAEPipeline) -> list[int] | None:
    """Return the labels of the classes that images are of in turn, or None where no class is asked for; or stop."""
    if args.class_label is None:
        return None
    count = network_of(pipeline.denoiser).num_labels(pipeline.denoiser.config)
    classes = [k for k in range(count) if k != pipeline.null_class]
    if args.class_label == "all" and classes:
        return classes
    given = args.class_label if isinstance(args.class_label, list) else [args.class_label]
    if "all" in given:
        reason = "it takes no other class beside it" if classes else "the denoiser is unconditional, it has no classes"
        raise SystemExit(f"--class_label all: {reason}.")
    try:
        return [k if isinstance(k, int) else pipeline.get_label_ids(k)[0] for k in given]
    except ValueError as error:  # no such name
        raise SystemExit(f"--class_label: {error}") from error


def sample_batch(args: argparse.Namespace, pipeline: DDAEPipeline, numbers: range) -> list[Image.Image]:
    """Return the images of these numbers."""
    classes = chosen_classes(args, pipeline)
    try:
        return pipeline(
            len(numbers),
            class_labels=classes and [classes[i % len(classes)] for i in numbers],
            generator=[torch.Generator("cpu").manual_seed(args.seed + i) for i in numbers],
            num_inference_steps=args.num_inference_steps,
            sampler=args.sampler,
            guidance_scale=args.guidance_scale,
        ).images
    except ValueError as error:  # options that this checkpoint does not take
        raise SystemExit(str(error)) from error


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    args = parse_arguments(argv)
    folder = Path(args.output_dir)
    processes = open_processes()
    made = sample(args, open_pipeline(args), processes, folder)
    if not processes.is_main_process:
        return
    shown = [Image.open(path) for path in image_paths(folder, args.num_images)[: args.grid_images]]
    image_grid(shown).save(folder / "grid.png")
    print(f"{args.num_images} images in {folder}, {made} of them made now; look at {folder / 'grid.png'}.")


if __name__ == "__main__":
    main()
