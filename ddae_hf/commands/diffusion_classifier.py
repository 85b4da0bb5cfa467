r"""Classify images by the error with which a denoiser denoises them under each class: it learns no classifier.

    ddae diffusion-classifier --model_name_or_path runs/conditional --dataset_name uoft-cs/cifar10 \
        --max_samples 500 --image_sigmas 0 0.1 0.3 --classifier runs/conditional_sweep/classifier \
        --output_dir runs/diffusion_classifier

The checkpoint must be told classes, as labels (`ddae pretrain --class_conditional`) or as texts (`--prompt_template`).
See `ddae_hf.experiments.classify_by_denoising`. The figures go to `eval_results.json`, and a picture to
`accuracy_over_calls.png`. The same command resumes an interrupted run.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..experiments.diffusion_classification import DenoisingClassifierOptions, classify_by_denoising
from ..experiments.images import DataOptions
from ..experiments.options import option


@dataclass(kw_only=True)
class Arguments(DenoisingClassifierOptions):
    """What classifies, and where the results go."""

    model_name_or_path: str = option(help="Checkpoint, folder or Hub id, in any layout.")
    output_dir: str = option("runs/diffusion_classifier", "Folder of the figures, the picture and the errors.")


KINDS = (DataOptions, Arguments)


def main(data: DataOptions, options: Arguments) -> None:
    """Run the command."""
    result = classify_by_denoising(options.model_name_or_path, data.open(options.cache_dir), options)
    if result is None:  # another process has it
        return
    print(f"{result.table()}\n\nThe curves are in {options.output_dir}/accuracy_over_calls.png.")
