r"""Train a linear classifier on a denoiser's hidden states, and save both as one model.

    ddae probe --model_name_or_path runs/cifar10_ddpm_unet --dataset_name uoft-cs/cifar10 \
        --layers decoder --sigmas 0.02 0.05 0.14 --baselines --output_dir runs/cifar10_classifier

This is `ddae sweep` with other defaults: the checkpoint's own layer and noise level, and one noise seed. Where several
are given, the pair is chosen on a part of the training images, never on test images. The output folder opens with
`DDAEForImageClassification.from_pretrained`; `eval_results.json` in it holds every figure. Features and finished levels
are kept there too, so that an interrupted run can go on; they are not pushed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..experiments.images import DataOptions
from ..experiments.options import option
from ..experiments.publishing import HubOptions, prepare, publish
from ..experiments.sharing import is_first_process
from ..experiments.sweeping import SweepOptions, sweep


@dataclass(kw_only=True)
class Arguments(SweepOptions):
    """The options of a sweep, with the defaults of a probe."""

    classifier_dir: ClassVar[str] = "."
    model_name_or_path: str = option(help="Checkpoint, folder or Hub id, in any layout.")
    output_dir: str = option("runs/classifier", "Folder of the classifier and its figures.")
    layers: list[str] = option(["own"], "Layers to choose from, or `all`, `decoder`, or `own`, the checkpoint's.")
    sigmas: list[float] = option([], "Noise levels to choose from; by default the checkpoint's own.")
    max_selection_samples: int | None = option(10000, "Training images used for choosing.")
    num_noise_seeds: int = option(1, "Noise seeds that the best pair is tested with.")


KINDS = (DataOptions, Arguments, HubOptions)


def main(data: DataOptions, options: Arguments, hub: HubOptions) -> None:
    """Run the command."""
    model = options.model_name_or_path
    if is_first_process():
        prepare(hub, options.output_dir, model)
    result = sweep(model, data.open(options.cache_dir), options)
    if result is None:  # another process has it
        return
    print(result.table())
    said = publish(hub, options.output_dir, "Add a linear classifier", generator=model)
    print(said or f"The classifier, pictures and every figure are in {options.output_dir}.")
