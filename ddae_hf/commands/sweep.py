r"""Find a denoiser's best layer and noise level: probe every pair of them, and save the best as a classifier.

    ddae sweep --model_name_or_path runs/cifar10_ddpm_unet --dataset_name uoft-cs/cifar10 \
        --layers decoder --sigmas 0.02 0.05 0.1 0.2 --output_dir runs/cifar10_sweep

Features are kept in `--features_dir`: another run, another kind of probe or an interrupted run starts from what is
there. With `--checkpoints RUN`, every checkpoint of a training run is swept. With `--lengths`, averages of the weights
of the run that `--model_name_or_path` names are, one of each length.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..experiments.images import DataOptions
from ..experiments.options import option
from ..experiments.publishing import HubOptions, prepare, publish
from ..experiments.sharing import is_first_process
from ..experiments.sweeping import sweep
from ..experiments.training_curve import CurveOptions, sweep_run


@dataclass(kw_only=True)
class Arguments(CurveOptions):
    """The options of a sweep, and what is swept."""

    model_name_or_path: str | None = option(None, "Checkpoint, folder or Hub id, in any layout.")
    checkpoints: str | None = option(None, "Sweep every checkpoint of a training run's folder.", metavar="RUN")
    output_dir: str = option("runs/sweep", "Folder of the figures, the pictures and the best classifier.")

    def check(self) -> None:
        """Refuse two things to sweep or none, and options that only one of them has."""
        super().check()
        if (self.model_name_or_path is None) == (self.checkpoints is None):
            raise ValueError("Give one of model_name_or_path and checkpoints.")
        if self.lengths and self.checkpoints is not None:
            raise ValueError("lengths sweeps averages in place of checkpoints: give the run as model_name_or_path.")
        if self.extractor is not None and self.run is None:
            raise ValueError("extractor measures samples over a training run: give checkpoints or lengths with it.")

    @property
    def run(self) -> str | None:
        """The folder of the training run whose checkpoints or averages are swept, if any are."""
        return self.model_name_or_path if self.lengths else self.checkpoints


KINDS = (DataOptions, Arguments, HubOptions)


def main(data: DataOptions, options: Arguments, hub: HubOptions) -> None:
    """Run the command."""
    if options.run and hub.push_to_hub:
        raise ValueError("push_to_hub pushes one classifier: sweep one checkpoint, with model_name_or_path.")
    if is_first_process():
        prepare(hub, options.output_dir, options.model_name_or_path)
    images = data.open(options.cache_dir)
    if options.run is not None:
        report = sweep_run(options.run, images, options)
        if report is None:  # another process has it
            return
        print(report.table())
    elif options.model_name_or_path is not None:
        result = sweep(options.model_name_or_path, images, options)
        if result is None:  # another process has it
            return
        print(result.table())
        classifier = f"{options.output_dir}/classifier"
        said = publish(hub, classifier, "Add the classifier of a sweep", generator=options.model_name_or_path)
        print(said or f"The classifier is in {classifier}.")
    print(f"Pictures and every figure are in {options.output_dir}.")
