r"""Fine-tune a denoiser and a linear classifier on it as one network: see `ddae_hf.experiments.finetune`.

    python examples/finetune.py --model_name_or_path runs/cifar10_ddpm_unet --dataset_name uoft-cs/cifar10 \
        --label_fraction 0.1 --layer_decay 0.75 --random_flip --random_crop 4 --ema_decay 0.999

The output folder opens with `DDAEForImageClassification.from_pretrained`, and holds `eval_results.json`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from transformers.utils import logging

from ddae_hf.commands.parsing import parse, sentences
from ddae_hf.experiments.finetuning import FinetuningOptions, finetune
from ddae_hf.experiments.images import DataOptions
from ddae_hf.experiments.options import option
from ddae_hf.experiments.publishing import PRIVATE, HubOptions, prepare, publish


@dataclass(kw_only=True)
class Arguments(FinetuningOptions):
    """The options of fine-tuning, and where it begins and ends."""

    model_name_or_path: str = option(help="Checkpoint, folder or Hub id, in any layout.")
    output_dir: str = option("runs/finetuned", "Folder of the classifier, its figures and checkpoints.")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script."""
    data, options, hub = parse([DataOptions, Arguments, HubOptions], __doc__, argv)
    logging.set_verbosity_error()  # a new classifier is what is wanted here
    logging.disable_progress_bar()
    with sentences():
        prepare(hub, options.output_dir)
        result = finetune(options.model_name_or_path, data.open(options.cache_dir), options)
        if os.environ.get("RANK", "0") == "0":
            print(f"{result.table()}\n\nThe classifier is in {options.output_dir}.")
            ignore = (*PRIVATE, f"{options.logging_dir}/*")
            print(publish(hub, options.output_dir, "Fine-tune", ignore) or "", end="")


if __name__ == "__main__":
    main()
