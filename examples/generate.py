"""Generate images into a folder, and a grid of the first ones.

    python examples/generate.py --model_name_or_path runs/cifar10_ddpm_unet --num_images 1000 --output_dir runs/samples

Image number i comes from seed `--seed` + i, whatever the batch size and the number of processes, and an image that is
there already is not made again. Several GPUs share the work: `accelerate launch` or `torchrun`. `--class_label` takes
labels or, where the checkpoint has them, names of classes: `--class_label 207 "tabby cat"`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ddae_hf.commands.parsing import parse, sentences
from ddae_hf.experiments.generation import GenerationOptions, generate, open_processes
from ddae_hf.experiments.options import option
from ddae_hf.experiments.plots import image_grid


@dataclass(kw_only=True)
class Arguments(GenerationOptions):
    """The options of the script."""

    model_name_or_path: str = option(help="Checkpoint, folder or Hub id, in any layout.")
    output_dir: str = option("runs/samples", "Folder of the images 00000.png, ... and grid.png.")
    grid_images: int = option(64, "Images in grid.png.")


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    [args] = parse([Arguments], __doc__, argv)
    with sentences():
        samples = generate(args.model_name_or_path, args)
        if open_processes().is_main_process:
            grid = Path(args.output_dir) / "grid.png"
            image_grid(samples[: args.grid_images]).save(grid)
            print(f"{len(samples)} images in {args.output_dir}, {samples.made} of them made now; look at {grid}.")


if __name__ == "__main__":
    main()
