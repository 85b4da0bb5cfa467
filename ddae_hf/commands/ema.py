r"""Make the average of a trained network's weights over another length, after the training.

    ddae pretrain --config digits --dataset_name runs/digits --average_lengths 0.05 0.1 --output_dir runs/mine
    ddae ema --model_name_or_path runs/mine --length 0.07 --output_dir runs/mine_0.07

The run must have kept averages (`--average_lengths`). The folder opens as the run's does. `ddae sweep --lengths` finds
the length that is best for probes or for samples.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..experiments.options import option
from ..experiments.rebuilding import RebuildingOptions, rebuild_average


@dataclass(kw_only=True)
class Arguments(RebuildingOptions):
    """What is averaged, and where it goes."""

    model_name_or_path: str = option(help="Folder of the training run, not of one of its checkpoints.")
    output_dir: str = option(help="Folder to write; it may hold nothing but an average that was made before.")


KINDS = (Arguments,)


def main(options: Arguments) -> None:
    """Run the command."""
    print(rebuild_average(options.model_name_or_path, options).table())
    print(f"The checkpoint is in {options.output_dir}.")
