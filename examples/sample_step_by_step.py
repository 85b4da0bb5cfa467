"""Sampling in a loop of your own, with diffusers' scheduler and the checkpoint's network: from noise to an image.

In the picture, the upper rows begin with pure noise. The lower rows begin half-way, with images of the data under as
much noise as the scheduler has there, and end as other images of the same kind.

ddae quickstart
python examples/sample_step_by_step.py --checkpoint runs/quickstart/checkpoint --data runs/quickstart/digits
"""

import argparse
from pathlib import Path

import torch
from datasets import load_dataset
from PIL import Image

from ddae_hf import DDAEImageProcessor, DDAEPipeline, add_noise, timestep_to_sigma

NUM_STEPS = 50
NUM_IMAGES = 4  # of each kind
SHOWN = 10  # columns of the strip


@torch.no_grad()
def denoised_step_by_step(pipeline, sample, timesteps):
    """Yield images (B, C, H, W) in [-1, 1]: the sample as it is given, and then as it is after every timestep."""
    yield sample
    for timestep in timesteps:
        answer = pipeline.denoiser(pipeline.scheduler.scale_model_input(sample, timestep), timestep).sample
        sample = pipeline.scheduler.step(answer, timestep, sample).prev_sample
        yield sample


def strip(steps):
    """Put some of the steps side by side, with the images of each in a column, as bytes (height, width).

    Images of one channel are expected. Each has a white frame of one pixel.
    """
    chosen = torch.linspace(0, len(steps) - 1, SHOWN).round().int().tolist()
    framed = [torch.nn.functional.pad(steps[number][:, 0], (1, 1, 1, 1), value=1.0) for number in chosen]
    return torch.cat([torch.cat([*images]) for images in framed], dim=1).add(1).mul(127.5).clamp(0, 255).byte()


def main():
    """Sample from noise and from noisy images, and save a strip of both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="runs/quickstart/checkpoint", help="of a DDPM or DDIM scheduler")
    parser.add_argument("--data", default="runs/quickstart/digits", help="with the column `image`")
    arguments = parser.parse_args()

    pipeline = DDAEPipeline.from_pretrained(arguments.checkpoint)
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(NUM_STEPS)
    processor = DDAEImageProcessor.from_pretrained(arguments.checkpoint)
    images = load_dataset(arguments.data, split="test")["image"][:NUM_IMAGES]
    clean = processor(images, return_tensors="pt")["pixel_values"]
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))

    from_noise = list(denoised_step_by_step(pipeline, noise * scheduler.init_noise_sigma, scheduler.timesteps))
    half = scheduler.timesteps[NUM_STEPS // 2 :]
    sigma = timestep_to_sigma(scheduler, half[0])
    noisy, _ = add_noise(scheduler, clean, noise, sigma)
    from_images = list(denoised_step_by_step(pipeline, noisy, half))
    start = timestep_to_sigma(scheduler, scheduler.timesteps[0])
    print(f"Noise begins at sigma {start:.1f}, and images begin at sigma {sigma:.2f}.")

    pixels = torch.cat([strip(from_noise), strip(from_images)])
    picture = Path("runs", "sample_step_by_step.png")
    picture.parent.mkdir(exist_ok=True)
    image = Image.fromarray(pixels.numpy())
    image.resize((image.width * 6, image.height * 6), Image.Resampling.NEAREST).save(picture)
    print(f"The steps from noise to images, from left to right, are in {picture}.")


if __name__ == "__main__":
    main()
