"""Write images that a denoiser of MNIST's digits never saw, near to them and far, as data sets for `ddae outliers`.

    python -m benchmarks.outlier_sets --output_dir runs/outlier_sets

`mnist` are the known images, with 4,000 to train on and 1,000 to test on. Of all others there is a split `test` of
1,000 images at most, of 28x28 pixels but for `small_digits`:

- `small_digits`: scikit-learn's digits, 8x8 pixels, which the image processor enlarges;
- `upside_down`: MNIST's test digits on their heads, of which 0, 1 and 8 are hardly other images;
- `inverted`: the same digits, black on white;
- `shuffled`: the same digits, with the pixels of each shuffled in its own way;
- `photographs`: patches of scikit-learn's two photographs, in grey;
- `constant`: images of one grey each, from black to white.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from datasets import Dataset, Features
from datasets import Image as ImageColumn
from PIL import Image
from sklearn.datasets import load_sample_images

from ddae_hf.experiments.digits import digits, mnist, shuffled_pixels, write_digits

COUNT = 1000
SIDE = 28


def photographs(count: int, seed: int = 0) -> np.ndarray:
    """Return patches (count, 28, 28), uint8, from places of scikit-learn's two photographs that a seed draws."""
    random = np.random.default_rng(seed)
    greys = [np.asarray(Image.fromarray(photograph).convert("L")) for photograph in load_sample_images().images]
    patches = []
    for number in range(count):
        grey = greys[number % len(greys)]
        top, left = (random.integers(side - SIDE + 1) for side in grey.shape)
        patches.append(grey[top : top + SIDE, left : left + SIDE])
    return np.stack(patches)


def constant(count: int) -> np.ndarray:
    """Return images (count, 28, 28), uint8, of one grey each, evenly spaced from black to white."""
    greys = np.linspace(0, 255, count).round().astype(np.uint8)
    return np.broadcast_to(greys[:, None, None], (count, SIDE, SIDE))


def main(arguments: list[str] | None = None) -> None:
    """Write the data sets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/outlier_sets"), help="Folder of the data sets.")
    folder = parser.parse_args(arguments).output_dir
    known = mnist()
    write_digits(folder / "mnist", known)
    test = known["test"][0][:COUNT]
    outside = {
        "small_digits": digits()["train"][0][:COUNT],
        "upside_down": test[:, ::-1],
        "inverted": 255 - test,
        "shuffled": shuffled_pixels(test),
        "photographs": photographs(COUNT),
        "constant": constant(COUNT),
    }
    for name, images in outside.items():
        path = folder / name / "test.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = {"image": [Image.fromarray(np.ascontiguousarray(image)) for image in images]}
        Dataset.from_dict(columns, Features({"image": ImageColumn()})).to_parquet(path)
    print(f"The data sets mnist, {', '.join(outside)} are in {folder}.")


if __name__ == "__main__":
    main()
