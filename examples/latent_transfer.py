r"""Transfer a denoiser of latents, such as an ImageNet DiT, to a labelled data set that it was never trained on.

    python examples/latent_transfer.py --model_name_or_path facebook/DiT-XL-2-256 --dataset_name uoft-cs/cifar10 \
        --num_views 10 --random_flip --random_crop 32 --output_dir runs/dit_cifar10

See `ddae_hf.experiments.transferring`. What this will take is said before it begins; what was interrupted goes on where
it stopped. `--finetune '{num_train_epochs: 5}'` then trains the network itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from ddae_hf.commands.parsing import parse, sentences, show_log
from ddae_hf.experiments.images import DataOptions
from ddae_hf.experiments.options import option
from ddae_hf.experiments.publishing import HubOptions, prepare, publish
from ddae_hf.experiments.results import FineTuningReport
from ddae_hf.experiments.transferring import TransferOptions, transfer


@dataclass(kw_only=True)
class Arguments(TransferOptions):
    """What is transferred, and where to."""

    model_name_or_path: str = option(help="Checkpoint, folder or Hub id, in any layout, with its VAE.")
    output_dir: str = option("runs/latent_transfer", "Folder of latents, features, figures and classifiers.")


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    data, options, hub = parse([DataOptions, Arguments, HubOptions], __doc__, argv)
    show_log()
    with sentences():
        prepare(hub, options.output_dir)
        print(transfer(options.model_name_or_path, data.open(options.cache_dir), options).table())
        if options.finetune is not None:
            print(f"\nFine-tuned:\n\n{FineTuningReport.read(f'{options.output_dir}/finetuned').table()}")
        classifier = f"{options.output_dir}/classifier"
        said = publish(hub, classifier, "Add the classifier of a transfer", generator=options.model_name_or_path)
        print(said or f"The classifier is in {classifier}.")
    print(f"Pictures and every figure are in {options.output_dir}.")


if __name__ == "__main__":
    main()
