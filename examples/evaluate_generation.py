r"""Measure how far a checkpoint's images are from real ones: Frechet and kernel distance, precision and recall.

    accelerate launch examples/evaluate_generation.py --model_name_or_path runs/cifar10_ddpm_unet \
        --dataset_name uoft-cs/cifar10 --baseline_split test --extractor transformers:facebook/dinov2-base \
        --output_dir runs/cifar10_generation

Images are sampled into `images` of the output folder, number i from seed `--seed` + i; interrupted sampling goes on
with the same command, and several processes share it. `--images_dir` measures images that are there already.
`ddae_hf/experiments/extractors.py` says what `--extractor` may be.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers.utils import logging

from ddae_hf.commands.parsing import parse, sentences, show_log
from ddae_hf.experiments.evaluation import EvaluationOptions, evaluate_generation, is_images_folder
from ddae_hf.experiments.images import DataOptions
from ddae_hf.experiments.options import option


@dataclass(kw_only=True)
class Arguments(EvaluationOptions):
    """The options of the script."""

    model_name_or_path: str | None = option(None, "Checkpoint to sample from, folder or Hub id, in any layout.")
    images_dir: str | None = option(None, "In place of a checkpoint: a folder of images, and of folders of them.")
    output_dir: str = option("runs/generation", "Folder of the images and their figures.")
    features_dir: str = option("runs/features", "Where features are kept.")

    def check(self) -> None:
        """Refuse both of a checkpoint and images, or neither."""
        super().check()
        if (self.model_name_or_path is None) == (self.images_dir is None):
            raise ValueError("Give one of model_name_or_path and images_dir.")
        if self.images_dir is not None and not is_images_folder(self.images_dir):
            raise ValueError(f"images_dir is {self.images_dir}: there is no such folder, or it holds a checkpoint.")


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    data, args = parse([DataOptions, Arguments], __doc__, argv)
    logging.set_verbosity_error()  # what is missing from a checkpoint is looked at by the experiment
    logging.disable_progress_bar()
    show_log()
    with sentences():
        images = data.open(args.cache_dir)
        result = evaluate_generation(args.model_name_or_path or args.images_dir, images, args)
        if result is not None:  # in a process that does more than sampling
            print(result.table())


if __name__ == "__main__":
    main()
