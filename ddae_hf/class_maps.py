"""Maps of classes: what the values of a mask mean, the loss of logits for every pixel, maps that logits give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .labels import check_label_range

MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")  # of PIL images with one whole number a pixel


def read_mask(mask: Any, size: tuple[int, int] | None = None) -> np.ndarray:
    """Return the class of every pixel (H, W), int32, that a mask gives.

    Args:
        mask: A PIL image of a mode with one whole number a pixel, where that of a palette is the colour's number, not
            the colour; or an array or tensor (H, W) of whole numbers.
        size: Height and width that the mask must have, those of its image.

    Raises:
        ValueError: A mask in colours, of numbers that are not whole or are negative, or of another size.
    """
    if isinstance(mask, Image.Image):
        if mask.mode not in MODES:
            raise ValueError(
                f"A mask of PIL's mode {mask.mode} came: it must have one number a pixel, that of the class, as modes "
                f"{', '.join(MODES[:4])} have. Turn colours into numbers of classes first."
            )
        found = np.asarray(mask)
    else:
        found = np.asarray(mask.detach().cpu() if isinstance(mask, Tensor) else mask)
    if found.ndim != 2 or found.dtype.kind not in "bui":
        raise ValueError(
            f"A mask of type {found.dtype} and shape {found.shape} came: it must have a whole number, the class, for "
            "each pixel, as (height, width)."
        )
    if found.size and not 0 <= found.min() <= found.max() < 2**31:
        raise ValueError(f"A mask has the classes {found.min()} to {found.max()}: they count from 0.")
    if size is not None and found.shape != tuple(size):
        raise ValueError(
            f"A mask of {found.shape[0]}x{found.shape[1]} pixels came with an image of {size[0]}x{size[1]}: it must "
            "have a class for every pixel of its image."
        )
    return found.astype(np.int32)


def single_masks(masks: Any) -> Iterator[Any]:
    """Yield the masks of nested lists, and of arrays or tensors (N, H, W)."""
    if isinstance(masks, (list, tuple)):
        for entry in masks:
            yield from single_masks(entry)
    elif getattr(masks, "ndim", None) == 3:
        yield from masks
    else:
        yield masks


def map_cross_entropy(logits: Tensor, labels: Tensor, ignored: int) -> Tensor:
    """Return the mean cross-entropy of all pixels of a batch, with the logits resized bilinearly to the labels' size.

    Logits are (B, K, h, w), labels the classes (B, H, W) of pixels. Those of the class `ignored` are left out; of a
    batch that has no others the loss is 0.

    Raises:
        ValueError: A single class, labels of another shape or type, or classes outside 0 to K - 1, where they can be
            read (on the CPU, in a graph that is not compiled).
    """
    batch_size, count = logits.shape[:2]
    if count < 2:
        raise ValueError(
            "The model has a single class, whose cross-entropy is always 0: set num_labels to the number of classes, "
            "the background among them."
        )
    if labels.ndim != 3 or len(labels) != batch_size or labels.is_floating_point():
        raise ValueError(
            f"labels are {labels.dtype} of shape {tuple(labels.shape)}: they must be the classes of pixels, integers "
            f"({batch_size}, height, width)."
        )
    counted = labels != ignored
    check_label_range("labels", labels.where(counted, 0), count)
    logits = F.interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False)
    total = F.cross_entropy(logits, labels.long(), ignore_index=ignored, reduction="sum")
    return total / counted.sum().clamp(min=1)


def maps_of_classes(logits: Tensor, sizes: Sequence[tuple[int, int]] | None = None) -> list[Tensor]:
    """Return the most probable class of every pixel (H, W) of each image.

    Logits (B, K, h, w) are resized bilinearly to the heights and widths, one for each image; without them the maps are
    of the logits' size.
    """
    if sizes is None:
        return list(logits.argmax(1))
    one_by_one = zip(logits.float(), sizes, strict=True)
    resized = (F.interpolate(each[None], size, mode="bilinear", align_corners=False) for each, size in one_by_one)
    return [each[0].argmax(0) for each in resized]
