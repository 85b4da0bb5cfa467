"""Convert a published checkpoint of another code base into a folder that `ddae_hf` opens.

    python examples/convert.py DiT-XL-2-256x256.pt --vae stabilityai/sd-vae-ft-ema --output_dir runs/dit_xl_2
    python examples/convert.py model_1999.pth --framework ddpm --output_dir runs/ddpm_unet

What a file holds is seen from its content; which files are known, and how exact their conversions are, says
`docs/converting.md`. Nothing that a file names is run.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from diffusers import DiTPipeline

from ddae_hf import DDAEConfig, DDAEImageProcessor, DDAEModel, DDAEPipeline
from ddae_hf.checkpoints import load_vae, plain_config
from ddae_hf.conversion import FRAMEWORKS, Conversion, convert
from ddae_hf.weights import fingerprint


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("checkpoint", help="The file.")
    add("--output_dir", required=True, help="Folder to write; it must not hold anything yet.")
    dit = parser.add_argument_group("official DiT").add_argument
    dit("--vae", help="Folder or Hub id of its AutoencoderKL, or of a pipeline that has it; kept beside the network.")
    dit("--num_heads", type=int, help="Attention heads; needed if the width is none of the published networks'.")
    dit("--num_classes", type=int, help="Classes, by default what the training run noted, or 1000.")
    unet = parser.add_argument_group("U-Net of the DDAE paper's authors").add_argument
    unet("--framework", choices=FRAMEWORKS, help="What it was trained under; required, as the file does not say it.")
    unet("--sample_size", type=int, help="Side of its images in pixels, by default 32.")
    return parser.parse_args(argv)


def write_generator(conversion: Conversion, vae: Any, folder: Path) -> str:
    """Write a network that samples, as a pipeline; return which class opens it."""
    pipeline: Any = DDAEPipeline.for_denoiser(conversion.denoiser, conversion.scheduler, vae=vae)
    if vae is not None:
        pipeline = DiTPipeline(pipeline.transformer, vae, pipeline.scheduler)
    pipeline.save_pretrained(folder)
    return type(pipeline).__name__


def write_features(conversion: Conversion, folder: Path) -> str:
    """Write a network whose hidden states alone are right, as a model; return which class opens it."""
    config = DDAEConfig(
        denoiser=plain_config(conversion.denoiser),
        scheduler=plain_config(conversion.scheduler),
        generator_fingerprint=fingerprint(conversion.denoiser),
        **conversion.config,
    )
    model = DDAEModel(config)
    model.denoiser.load_state_dict(conversion.denoiser.state_dict())
    model.save_pretrained(folder)
    DDAEImageProcessor.for_denoiser(config.denoiser).save_pretrained(folder)
    return type(model).__name__


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    args = parse_arguments(argv)
    folder = Path(args.output_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SystemExit(f"{folder} is not an empty folder: choose another --output_dir.")
    names = ("num_heads", "num_classes", "framework", "sample_size")
    try:
        vae = None if args.vae is None else load_vae(args.vae)
        conversion = convert(args.checkpoint, **{name: getattr(args, name) for name in names})
        print(f"{args.checkpoint} holds {conversion.source}; {conversion.source_parameters:,} parameters.")
        reason = conversion.config.get("features_only")
        if reason and vae is not None:
            raise ValueError("--vae came, but this network works on pixels: leave it out.")
        written = write_features(conversion, folder) if reason else write_generator(conversion, vae, folder)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error
    denoiser, parts = conversion.denoiser, "" if vae is None else " and its VAE"
    print(
        f"{folder} holds it as a {type(denoiser).__name__} of {denoiser.num_parameters():,} parameters, under "
        f"{type(conversion.scheduler).__name__}{parts} ({written})."
    )
    if reason:
        print(f"It gives features and no images: {reason}")
    elif vae is None and denoiser.config.in_channels not in (1, 3):
        print("It works on latents: without --vae its images are those.")


if __name__ == "__main__":
    main()
