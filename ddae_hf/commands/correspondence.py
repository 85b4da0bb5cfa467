r"""Find the points of an image again in a warped copy of it, by the feature maps of a denoiser not trained for it.

    ddae correspondence --model_name_or_path runs/cifar10_ddpm_unet --dataset_name uoft-cs/cifar10 \
        --split test --max_samples 64 --sigma 0.02 --output_dir runs/correspondence

See `ddae_hf.experiments.find_correspondences`. The figures go to `eval_results.json`, and a picture to
`correspondence.png`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..experiments.correspondences import CorrespondenceOptions, find_correspondences
from ..experiments.images import DataOptions
from ..experiments.options import option


@dataclass(kw_only=True)
class Arguments(CorrespondenceOptions):
    """What is looked at, and where the results go."""

    model_name_or_path: str = option(help="Checkpoint, folder or Hub id, in any layout.")
    output_dir: str = option("runs/correspondence", "Folder of the figures and the picture.")


KINDS = (DataOptions, Arguments)


def main(data: DataOptions, options: Arguments) -> None:
    """Run the command."""
    print(find_correspondences(options.model_name_or_path, data.open(options.cache_dir), options).table())
    print(f"\nLook at {options.output_dir}/correspondence.png.")
