r"""Fine-tune a denoiser and a linear classifier on it as one network: see `ddae_hf.experiments.finetune`.

    ddae finetune --model_name_or_path runs/cifar10_ddpm_unet --dataset_name uoft-cs/cifar10 \
        --few_labels 500 --layer_decay 0.75 --random_flip --random_crop 4 --ema_decay 0.999

The output folder opens with `DDAEForImageClassification.from_pretrained`, and holds `eval_results.json`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..experiments.finetuning import FinetuningOptions, finetune
from ..experiments.images import DataOptions
from ..experiments.options import option
from ..experiments.publishing import HubOptions, prepare, publish
from ..experiments.sharing import is_first_process


@dataclass(kw_only=True)
class Arguments(FinetuningOptions):
    """The options of fine-tuning, and where it begins and ends."""

    model_name_or_path: str = option(help="Checkpoint, folder or Hub id, in any layout.")
    output_dir: str = option("runs/finetuned", "Folder of the classifier, its figures and checkpoints.")


KINDS = (DataOptions, Arguments, HubOptions)


def main(data: DataOptions, options: Arguments, hub: HubOptions) -> None:
    """Run the command."""
    if is_first_process():
        prepare(hub, options.output_dir)
    result = finetune(options.model_name_or_path, data.open(options.cache_dir), options)
    if is_first_process():
        print(result.table())
        print(publish(hub, options.output_dir, "Fine-tune") or f"The classifier is in {options.output_dir}.")
