r"""Measure how far a checkpoint's images are from real ones: Frechet and kernel distance, precision and recall.

    ddae evaluate --model_name_or_path runs/cifar10_ddpm_unet \
        --dataset_name uoft-cs/cifar10 --baseline_split test --extractor transformers:facebook/dinov2-base \
        --output_dir runs/cifar10_generation

Images are sampled into the folder `images` of the output folder, and image number i comes from seed `--seed` + i. The
same command goes on with interrupted sampling. Several processes can share it: `accelerate launch -m ddae_hf evaluate`.
`--images_dir` measures images that exist already. `--extractor` is `ddae:PATH`, `transformers:PATH` or `inception`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..experiments.evaluation import EvaluationOptions, evaluate_generation, is_images_folder
from ..experiments.images import DataOptions
from ..experiments.options import option


@dataclass(kw_only=True)
class Arguments(EvaluationOptions):
    """What is measured, and where the results go."""

    model_name_or_path: str | None = option(None, "Checkpoint to sample from, folder or Hub id, in any layout.")
    images_dir: str | None = option(None, "In place of a checkpoint: a folder of images, also in sub-folders.")
    output_dir: str = option("runs/generation", "Folder of the images and their figures.")
    features_dir: str = option("runs/features", "Where features are kept.")

    def check(self) -> None:
        """Refuse a checkpoint together with images, or neither."""
        super().check()
        if (self.model_name_or_path is None) == (self.images_dir is None):
            raise ValueError("Give one of model_name_or_path and images_dir.")
        if self.images_dir is not None and not is_images_folder(self.images_dir):
            raise ValueError(f"images_dir is {self.images_dir}: there is no such folder, or it holds a checkpoint.")


KINDS = (DataOptions, Arguments)


def main(data: DataOptions, options: Arguments) -> None:
    """Run the command."""
    measured = options.model_name_or_path or str(options.images_dir)
    result = evaluate_generation(measured, data.open(options.cache_dir), options)
    if result is not None:  # in a process that does more than sampling
        print(result.table())
