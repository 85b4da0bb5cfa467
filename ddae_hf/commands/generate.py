"""Generate images into a folder, and a grid of the first ones.

    ddae generate --model_name_or_path runs/cifar10_ddpm_unet --num_images 1000 --output_dir runs/samples

Image number i comes from seed `--seed` + i, whatever the batch size and the number of processes, and an image that is
there already is not made again. Several GPUs share the work: `accelerate launch -m ddae_hf generate`. `--class_label`
takes labels or, where the checkpoint has them, names of classes: `--class_label 207 "tabby cat"`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..experiments.generation import GenerationOptions, generate
from ..experiments.options import option
from ..experiments.plots import image_grid, save_picture
from ..experiments.sharing import is_first_process


@dataclass(kw_only=True)
class Arguments(GenerationOptions):
    """What generates, and where the images go."""

    model_name_or_path: str = option(help="Checkpoint, folder or Hub id, in any layout.")
    output_dir: str = option("runs/samples", "Folder of the images 00000.png, ... and grid.png.")
    grid_images: int = option(64, "Images in grid.png.")


KINDS = (Arguments,)


def main(options: Arguments) -> None:
    """Run the command."""
    samples = generate(options.model_name_or_path, options)
    if is_first_process():
        grid = Path(options.output_dir) / "grid.png"
        save_picture(image_grid(samples[: options.grid_images]), grid)
        print(f"{len(samples)} images are in {options.output_dir}, {samples.made} of them made now. Look at {grid}.")
