"""Convert a published checkpoint of another code base into a folder that `ddae_hf` opens.

    python examples/convert.py DiT-XL-2-256x256.pt --vae stabilityai/sd-vae-ft-ema --output_dir runs/dit_xl_2
    python examples/convert.py model_1999.pth --framework ddpm --output_dir runs/ddpm_unet

The file comes first. What it holds is seen from its content; which files are known, and how exact their conversions
are, says `docs/converting.md`. Nothing that a file names is run.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from ddae_hf.commands.parsing import parse, sentences
from ddae_hf.experiments.converting import ConversionOptions, convert
from ddae_hf.experiments.options import option


@dataclass(kw_only=True)
class Arguments(ConversionOptions):
    """What is converted, and where to."""

    checkpoint: str = option(help="The file; its name alone, in front of all options, will do.")
    output_dir: str = option(help="Folder to write; it must not hold anything yet.")


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    words = sys.argv[1:] if argv is None else argv
    if words and not words[0].startswith("-"):
        words = ["--checkpoint", *words]
    (options,) = parse([Arguments], __doc__, words)
    with sentences():
        print(convert(options.checkpoint, options.output_dir, options))


if __name__ == "__main__":
    main()
