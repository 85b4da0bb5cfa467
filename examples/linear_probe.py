r"""Train a linear classifier on a denoiser's hidden states, and save both as one model.

    python examples/linear_probe.py --model_name_or_path runs/cifar10_ddpm_unet --dataset_name uoft-cs/cifar10 \
        --layers decoder --sigmas 0.02 0.05 0.14 --baselines --output_dir runs/cifar10_classifier

This is `sweep.py` with other defaults: the checkpoint's own layer and noise level, and one noise seed. Where several
are given, the pair is chosen on a part of the training images, never on test images. The output folder opens with
`DDAEForImageClassification.from_pretrained`; `eval_results.json` in it holds every figure. Features and finished levels
are kept there too, where an interrupted run goes on; they are not pushed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ddae_hf.commands.parsing import parse, sentences
from ddae_hf.experiments.images import DataOptions
from ddae_hf.experiments.options import option
from ddae_hf.experiments.publishing import HubOptions, prepare, publish
from ddae_hf.experiments.sweeping import SweepOptions, sweep


@dataclass(kw_only=True)
class Arguments(SweepOptions):
    """The options of a sweep, with the defaults of a probe."""

    classifier_dir: ClassVar[str] = "."
    model_name_or_path: str = option(help="Checkpoint, folder or Hub id, in any layout.")
    output_dir: str | None = option("runs/classifier", "Folder of the classifier and its figures.")
    layers: list[str] = option(["own"], "Layers to choose from, or `all`, `decoder`, or `own`, the checkpoint's.")
    sigmas: list[float] = option([], "Noise levels to choose from; with none the checkpoint's.", nargs="*")
    max_selection_samples: int | None = option(10000, "Training images used for choosing.")
    num_noise_seeds: int = option(1, "Noise seeds that the best pair is tested with.")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script."""
    data, options, hub = parse([DataOptions, Arguments, HubOptions], __doc__, argv)
    with sentences():
        prepare(hub, options.output_dir)
        model = options.model_name_or_path
        print(sweep(model, data.open(options.cache_dir), options).table())
        said = publish(hub, options.output_dir, "Add a linear classifier", generator=model)
    print(said or f"The classifier, pictures and every figure are in {options.output_dir}.")


if __name__ == "__main__":
    main()
