r"""Write the features of a data set's images to parquet or npy files, for use elsewhere.

    ddae export --model_name_or_path runs/cifar10_ddpm_unet --train_data_dir photos \
        --layers up_blocks.1.resnets.2 --sigma 0.05 --output_dir runs/photos

`ddae_hf.experiments.export_features` says what the files hold. An interrupted run goes on, and features that a sweep
has left in `--features_dir` are used.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..experiments.feature_export import ExportOptions, export_features
from ..experiments.images import DataOptions
from ..experiments.options import option


@dataclass(kw_only=True)
class Arguments(ExportOptions):
    """The options of an export, and the checkpoint whose features are exported."""

    model_name_or_path: str = option(help="Checkpoint, folder or Hub id, in any layout.")


KINDS = (DataOptions, Arguments)


def main(data: DataOptions, options: Arguments) -> None:
    """Run the command."""
    if (exported := export_features(options.model_name_or_path, data.open(options.cache_dir), options)) is not None:
        print(exported)
