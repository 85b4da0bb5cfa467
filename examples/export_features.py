r"""Write the features of a data set's images to parquet or npy files, for use elsewhere.

    python examples/export_features.py --model_name_or_path runs/cifar10_ddpm_unet --train_data_dir photos \
        --layers up_blocks.1.resnets.2 --sigma 0.05 --output_dir runs/photos

`ddae_hf.experiments.feature_export` says what the files hold. An interrupted run goes on, and features that a sweep has
left in `--features_dir` are used.
"""

from __future__ import annotations

from dataclasses import dataclass

from ddae_hf.commands.parsing import parse, sentences
from ddae_hf.experiments.feature_export import ExportOptions, export_features
from ddae_hf.experiments.images import DataOptions
from ddae_hf.experiments.options import option


@dataclass(kw_only=True)
class Arguments(ExportOptions):
    """Whose features are exported."""

    model_name_or_path: str = option(help="Checkpoint, folder or Hub id, in any layout.")


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    data, options = parse([DataOptions, Arguments], __doc__, argv)
    with sentences():
        print(export_features(options.model_name_or_path, data.open(options.cache_dir), options))


if __name__ == "__main__":
    main()
