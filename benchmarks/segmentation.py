r"""Heads that give every pixel a class, on digits pasted onto photographs: what feature maps add to pixels.

    python -m benchmarks.segmentation --output_dir runs/segmentation

scikit-learn's digits are pasted, at a random place and size and in a random colour, onto crops of scikit-learn's two
photographs. Classes are the background and the ten digits, and masks are the strokes. Test digits are others than
training digits, and crops for tests come from the right halves of the photographs, others from the left. A small
denoiser is first trained on the training images without their masks. Then the same linear head is trained on its frozen
feature maps, on those of the same network with random weights, on clean pixels alone and in patches, and together with
the network, from the denoiser's weights and from random ones.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from ddae_hf.experiments import Images, pretrain, segment
from ddae_hf.experiments.arrays import write_json
from ddae_hf.experiments.devices import machine
from ddae_hf.experiments.digits import digits
from ddae_hf.experiments.report import markdown, percent

SIDE = 32  # pixels of an image
CROPS = (32, 128)  # pixels of a crop's side, from and below
SIZES = (14, 28)  # pixels of a digit's side, from and to
STROKE = 96  # the least value of a pixel of a digit that the mask counts as the digit
NAMES = ["background", *map(str, range(10))]
NETWORK = {
    "_class_name": "UNet2DModel", "block_out_channels": [16, 32, 64], "layers_per_block": 1, "norm_num_groups": 8,
    "down_block_types": ["DownBlock2D"] * 3, "up_block_types": ["UpBlock2D"] * 3, "add_attention": False,
}  # fmt: skip


PHOTOS: list[np.ndarray] = []  # once they are read


def pasted(count: int, split: str, seed: int) -> tuple[list[Image.Image], list[Image.Image]]:
    """Return images (32 x 32, RGB) of a split, `train` or `test`, and their masks."""
    rng = np.random.default_rng([seed, split == "test"])
    strokes, labels = digits()[split]
    images = []
    masks = []
    for _ in range(count):
        photo = load_photos()[rng.integers(2)]
        half = photo.shape[1] // 2
        side = int(rng.integers(*CROPS))
        top = int(rng.integers(photo.shape[0] - side + 1))
        left = int(rng.integers(half - side + 1)) + (half if split == "test" else 0)
        crop = Image.fromarray(photo[top : top + side, left : left + side]).resize((SIDE, SIDE))
        number = int(rng.integers(len(strokes)))
        size = int(rng.integers(SIZES[0], SIZES[1] + 1))
        digit = Image.fromarray(strokes[number]).resize((size, size), Image.Resampling.BICUBIC)
        place = tuple(int(each) for each in rng.integers(SIDE - size + 1, size=2))
        shade = Image.new("RGB", (size, size), tuple(int(each) for each in rng.integers(256, size=3)))
        crop.paste(shade, place, digit)
        mask = np.zeros((SIDE, SIDE), np.uint8)
        inked = np.asarray(digit) >= STROKE
        mask[place[1] : place[1] + size, place[0] : place[0] + size][inked] = 1 + labels[number]
        images.append(crop)
        masks.append(Image.fromarray(mask))
    return images, masks


def load_photos() -> list[np.ndarray]:
    """Return the two photographs, (427, 640, 3) in uint8."""
    if not PHOTOS:
        PHOTOS.extend(load_sample_images().images)
    return PHOTOS


def write_data(folder: Path, counts: dict[str, int], seed: int) -> None:
    """Write images and masks of every split as PNG files of the same names, unless they are there."""
    for split, count in counts.items():
        if (folder / split / "masks").is_dir():
            continue
        for kind, pictures in zip(("images", "masks"), pasted(count, split, seed), strict=True):
            place = folder / split / kind
            place.mkdir(parents=True)
            for number, picture in enumerate(pictures):
                picture.save(place / f"{number:05}.png")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return the scores of each way, by its name."""
    data, denoiser = args.output_dir / "data", args.output_dir / "denoiser"
    write_data(data, {"train": args.train_images, "test": args.test_images}, args.seed)
    images = Images.open(data)
    if not (denoiser / "model_index.json").is_file():
        pretrain(
            images, denoiser=NETWORK, resolution=SIDE, max_train_steps=args.pretrain_steps, total_batch_size=32,
            learning_rate=5e-4, lr_warmup_steps=20, ema_decay=0.995, seed=args.seed, sample_steps=0,
            output_dir=str(denoiser),
        )  # fmt: skip
    same: dict[str, Any] = {
        "layers": args.layers, "sigma": args.sigma, "class_names": NAMES, "max_train_steps": args.max_train_steps,
        "seed": args.seed,
    }  # fmt: skip
    frozen = segment(denoiser, images, learning_rate=args.learning_rate, baselines=True, **same)
    found = dict(frozen.scores)
    frozen.picture.savefig(args.output_dir / "masks.png", dpi=90)
    whole = same | {"learning_rate": args.whole_learning_rate, "freeze_denoiser": False}
    found["DDAE, fine-tuned"] = segment(denoiser, images, **whole).scores["DDAE"]
    found["all weights from scratch"] = segment(denoiser, images, from_scratch=True, **whole).scores["DDAE"]
    return found


def table(found: dict[str, Any]) -> str:
    """Return the scores as a Markdown table."""
    rows = []
    for name, scores in found.items():
        of_digits = np.mean([value or 0.0 for label, value in scores.iou.items() if label != NAMES[0]])
        figures = [percent(value) for value in (scores.mean_iou, of_digits, scores.pixel_accuracy)]
        rows.append([name, *figures, f"{scores.trained:,}"])
    return markdown(["head on", "mean IoU", "mean IoU of the digits", "pixels right", "trained numbers"], rows)


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder of data, denoiser and figures.")
    parser.add_argument("--train_images", type=int, default=1000)
    parser.add_argument("--test_images", type=int, default=500)
    parser.add_argument("--pretrain_steps", type=int, default=800, help="Steps of 32 images without masks.")
    parser.add_argument("--max_train_steps", type=int, default=300, help="Steps of 32 images with masks.")
    parser.add_argument("--layers", nargs="+", default=["decoder"], help="Layers whose maps are joined.")
    parser.add_argument("--sigma", type=float, default=0.05, help="Noise level of the images.")
    parser.add_argument("--learning_rate", type=float, default=5e-3, help="Of heads alone.")
    parser.add_argument("--whole_learning_rate", type=float, default=1e-3, help="Of all weights.")
    parser.add_argument("--seed", type=int, default=0, help="It draws images, weights, batches and noise.")
    return parser.parse_args(words)


def main() -> None:
    """Run the benchmark."""
    args = parsed()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        found = measure(args)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error
    options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    scores = {name: vars(each) for name, each in found.items()}
    write_json(args.output_dir / "results.json", {"scores": scores, "options": options, **machine("cpu")})
    print(table(found))


if __name__ == "__main__":
    main()
