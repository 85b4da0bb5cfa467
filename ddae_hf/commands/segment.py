r"""Train a head that gives every pixel a class on a denoiser's feature maps: see `ddae_hf.experiments.segment`.

    ddae segment --model_name_or_path runs/NAME --train_data_dir photos --layers mid_block up_blocks.1.resnets.0 \
        --class_names background cat dog --baselines

The folder has `train/images`, `train/masks`, `test/images` and `test/masks`, with files of the same names; a mask has
the number of a class for each pixel, 255 for none. The output folder opens with
`DDAEForSemanticSegmentation.from_pretrained`, and holds `eval_results.json` and a picture, `masks.png`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..experiments.images import DataOptions
from ..experiments.options import option
from ..experiments.publishing import HubOptions, prepare, publish
from ..experiments.segmenting import SegmentationOptions, segment
from ..experiments.sharing import is_first_process


@dataclass(kw_only=True)
class Arguments(SegmentationOptions):
    """The options of training on masks, and where it begins and ends."""

    model_name_or_path: str = option(help="Checkpoint, folder or Hub id, in any layout.")
    output_dir: str = option("runs/segmenter", "Folder of the model, its figures and checkpoints.")


KINDS = (DataOptions, Arguments, HubOptions)


def main(data: DataOptions, options: Arguments, hub: HubOptions) -> None:
    """Run the command."""
    if is_first_process():
        prepare(hub, options.output_dir, options.model_name_or_path)
    result = segment(options.model_name_or_path, data.open(options.cache_dir), options)
    if is_first_process():
        print(result.table())
        print(publish(hub, options.output_dir, "Masks") or f"The model is in {options.output_dir}.")
