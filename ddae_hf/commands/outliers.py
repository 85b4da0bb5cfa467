r"""Tell images of other data sets from those that a denoiser knows, without having seen any of them.

    ddae outliers --model_name_or_path runs/digits --dataset_name runs/mnist \
        --outside runs/photographs runs/inverted --max_test_samples 1000 --output_dir runs/outliers

Scores are the denoising error at some noise levels and distances of features to those of training images. See
`ddae_hf.experiments.detect_outliers`. The figures go to `eval_results.json`, and a picture to `scores.png`. The same
command resumes an interrupted run.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..experiments.images import DataOptions
from ..experiments.options import option
from ..experiments.outlier_detection import OutlierOptions, detect_outliers, outside_sets


@dataclass(kw_only=True)
class Arguments(OutlierOptions):
    """What tells images apart, the others, and where the results go."""

    model_name_or_path: str = option(help="Checkpoint, folder or Hub id, in any layout.")
    outside: list[str] = option(help="The other data sets: Hub ids, local folders or parquet files.")
    output_dir: str = option("runs/outliers", "Folder of the figures, the picture, errors and features.")


KINDS = (DataOptions, Arguments)


def main(data: DataOptions, options: Arguments) -> None:
    """Run the command."""
    images = data.open(options.cache_dir)
    result = detect_outliers(options.model_name_or_path, images, outside_sets(options.outside), options)
    if result is None:  # another process has it
        return
    print(f"{result.table()}\n\nHistograms of the scores are in {options.output_dir}/scores.png.")
