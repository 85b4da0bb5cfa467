"""Convert a published checkpoint of another code base into a folder that `ddae_hf` opens.

    ddae convert DiT-XL-2-256x256.pt --vae stabilityai/sd-vae-ft-ema --output_dir runs/dit_xl_2
    ddae convert model_1999.pth --framework ddpm --output_dir runs/ddpm_unet

The command recognises what the file holds by its content. `docs/guides/converting.md` says which files are known, and
how exact their conversions are. Nothing that a file names is run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..experiments.converting import ConversionOptions, convert
from ..experiments.options import option


@dataclass(kw_only=True)
class Arguments(ConversionOptions):
    """What is converted, and where it goes."""

    first_word: ClassVar[str] = "checkpoint"
    checkpoint: str = option(help="The file; its name alone, in front of all options, is enough.")
    output_dir: str = option(help="Folder to write; it must not hold anything yet.")


KINDS = (Arguments,)


def main(options: Arguments) -> None:
    """Run the command."""
    print(convert(options.checkpoint, options.output_dir, options))
