r"""Transfer a denoiser of latents, such as an ImageNet DiT, to a labelled data set that it was never trained on.

    ddae transfer --model_name_or_path facebook/DiT-XL-2-256 --dataset_name uoft-cs/cifar10 \
        --num_views 10 --random_flip --random_crop 32 --output_dir runs/dit_cifar10

See `ddae_hf.experiments.transfer`. The command says before it begins what this will take, and an interrupted run goes
on where it stopped. `--finetune '{num_train_epochs: 5}'` then trains the network itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..experiments.images import DataOptions
from ..experiments.options import option
from ..experiments.publishing import HubOptions, prepare, publish
from ..experiments.results import FineTuningReport
from ..experiments.sharing import is_first_process
from ..experiments.transferring import TransferOptions, transfer


@dataclass(kw_only=True)
class Arguments(TransferOptions):
    """What is transferred, and where the results go."""

    model_name_or_path: str = option(help="Checkpoint, folder or Hub id, in any layout, with its VAE.")
    output_dir: str = option("runs/transfer", "Folder of latents, features, figures and classifiers.")


KINDS = (DataOptions, Arguments, HubOptions)


def main(data: DataOptions, options: Arguments, hub: HubOptions) -> None:
    """Run the command."""
    if is_first_process():
        prepare(hub, options.output_dir, options.model_name_or_path)
    result = transfer(options.model_name_or_path, data.open(options.cache_dir), options)
    if result is None:  # another process has it
        return
    print(result.table())
    if options.finetune is not None:
        print(f"\nFine-tuned:\n\n{FineTuningReport.read(f'{options.output_dir}/finetuned').table()}")
    classifier = f"{options.output_dir}/classifier"
    said = publish(hub, classifier, "Add the classifier of a transfer", generator=options.model_name_or_path)
    print(said or f"The classifier is in {classifier}.")
    print(f"Pictures and every figure are in {options.output_dir}.")
