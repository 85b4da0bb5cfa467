"""Handwritten digits: a small data set that scikit-learn brings along, and a judge of generated digits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC

Splits = dict[str, tuple[np.ndarray, np.ndarray]]


def digits() -> Splits:
    """Return scikit-learn's digits by split, 80 % of 1,797 for training: images (N, 8, 8) in uint8 and labels (N,)."""
    found = load_digits()
    images = np.round(found.images * 255 / 16).astype(np.uint8)
    train, test, train_labels, test_labels = train_test_split(
        images, found.target, test_size=0.2, random_state=0, stratify=found.target
    )
    return {"train": (train, train_labels), "test": (test, test_labels)}


def write_digits(folder: Path) -> None:
    """Write the digits as a data set of parquet files."""
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=[str(i) for i in range(10)])})
    folder.mkdir(parents=True, exist_ok=True)
    for name, (images, labels) in digits().items():
        columns = {"image": [Image.fromarray(image) for image in images], "label": labels.tolist()}
        Dataset.from_dict(columns, features).to_parquet(folder / f"{name}.parquet")


class Judge:
    """A support vector machine on pixels, which names an image as a digit, or as none.

    Its eleventh class is training digits with their pixels shuffled, so that what is no digit need not be named as one.

    Attributes:
        accuracy: On the test digits, in %.
    """

    def __init__(self) -> None:
        splits = digits()
        images = _pixels(splits["train"][0])
        shuffled = np.random.default_rng(0).permuted(images, axis=1)
        none = np.full(len(images), 10)
        self._machine = CalibratedClassifierCV(SVC(), ensemble=False)
        self._machine.fit(np.concatenate([images, shuffled]), np.concatenate([splits["train"][1], none]))
        self.accuracy = 100 * self._machine.score(_pixels(splits["test"][0]), splits["test"][1])

    def recognised(self, images: np.ndarray | Sequence[Image.Image]) -> int:
        """Return how many of the images (N, 8, 8) are named as a digit with a confidence over 0.9."""
        named = self._machine.predict_proba(_pixels(np.stack([np.asarray(image) for image in images])))
        return int((named[:, :10].max(axis=1) > 0.9).sum())


def shuffled_pixels(images: np.ndarray) -> np.ndarray:
    """Return images (N, 8, 8) whose pixels are shuffled, each in its own way: what no judge should recognise."""
    return np.random.default_rng(1).permuted(images.reshape(len(images), -1), axis=1).reshape(images.shape)


def _pixels(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1) / 255.0
