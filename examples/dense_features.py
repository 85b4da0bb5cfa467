"""Feature maps of images as a picture: the three main directions of a layer's features as red, green and blue.

ddae quickstart
python examples/dense_features.py --checkpoint runs/quickstart/checkpoint --data runs/quickstart/digits
"""

import argparse
from pathlib import Path

import torch
from datasets import load_dataset
from PIL import Image

from ddae_hf import DDAEBackbone, DDAEImageProcessor
from ddae_hf.experiments import main_directions

NUM_IMAGES = 8
SIDE = 96  # of an image in the picture, in pixels
FRAME = 4


def row(images):
    """Put images (B, 3, H, W) in [0, 1] side by side in white frames, as bytes (height, width, 3)."""
    larger = torch.nn.functional.interpolate(images, (SIDE, SIDE), mode="nearest")
    framed = torch.nn.functional.pad(larger, (FRAME, FRAME, FRAME, FRAME), value=1.0)
    return torch.cat([*framed], dim=-1).mul(255).byte().movedim(0, -1)


@torch.no_grad()
def main():
    """Save a picture with the images in the first row, and the maps of a layer in each of the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="runs/quickstart/checkpoint")
    parser.add_argument("--data", default="runs/quickstart/digits", help="with the column `image`")
    arguments = parser.parse_args()

    # `stage_names` are all layers in the order in which they are computed. Here are the one at three quarters of them,
    # and the last.
    names = DDAEBackbone.from_pretrained(arguments.checkpoint).stage_names
    layers = [names[3 * len(names) // 4], names[-1]]
    backbone = DDAEBackbone.from_pretrained(arguments.checkpoint, out_features=layers, sigma=0.1)
    processor = DDAEImageProcessor.from_pretrained(arguments.checkpoint)

    images = load_dataset(arguments.data, split="test")["image"][:NUM_IMAGES]
    inputs = processor(images, return_tensors="pt")
    maps = backbone(**inputs).feature_maps
    colours = (inputs["pixel_values"].expand(-1, 3, -1, -1) + 1) / 2
    shown = [row(colours), *(row(main_directions(each)) for each in maps)]
    picture = Path("runs", "dense_features.png")
    picture.parent.mkdir(exist_ok=True)
    Image.fromarray(torch.cat(shown).numpy()).save(picture)
    for layer, each in zip(layers, maps, strict=True):
        print(f"{layer}: {each.shape[1]} channels of {each.shape[2]}x{each.shape[3]}")
    print(f"The images, and below them their features in these layers: {picture}")


if __name__ == "__main__":
    main()
