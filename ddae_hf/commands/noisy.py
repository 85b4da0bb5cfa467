r"""Classify noisy images: a small network on a frozen denoiser's features, against a network trained on noisy images.

    ddae noisy --model_name_or_path runs/cifar10_ddpm_unet --dataset_name uoft-cs/cifar10 \
        --num_views 10 --random_flip --wide_resnet 10 --random_crop 4 --output_dir runs/noisy_classifier

See `ddae_hf.experiments.classify_noisy`. The output folder holds `accuracy.png`, `eval_results.json`, and the
weights in `mlp` and `wide_resnet`. The same command resumes an interrupted run.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..experiments.images import DataOptions
from ..experiments.noisy_classification import NoisyOptions, classify_noisy
from ..experiments.options import option


@dataclass(kw_only=True)
class Arguments(NoisyOptions):
    """The options of the experiment, and where it begins and ends."""

    model_name_or_path: str = option(help="Checkpoint, folder or Hub id, in any layout.")
    output_dir: str = option("runs/noisy_classifier", "Folder of figures, weights and stored features.")


KINDS = (DataOptions, Arguments)


def main(data: DataOptions, options: Arguments) -> None:
    """Run the command."""
    result = classify_noisy(options.model_name_or_path, data.open(options.cache_dir), options)
    if result is None:  # another process has it
        return
    print(f"{result.table()}\n\nThe curves are in {options.output_dir}/accuracy.png.")
