"""Pixels of a data set's images: decoded when they are first asked for, kept where they fit, scaled on the device."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Image
from PIL import Image as PILImage
from torch.utils.data import get_worker_info

from ..image_processing_ddae import DDAEImageProcessor

SHARE = 4  # of the memory that is left, one part in so many may be filled
ELSEWHERE = 4 * 2**30  # bytes that are taken to be left where the system is not Linux, which tells


class Pixels:
    """The pixels of a data set's images, as integers from 0 to 255 that `scaled` makes floats of.

    An image is decoded when it is first asked for and, with `keep`, only then, if all of them fit into memory. Where
    some have more than 8 bits, none are kept, and batches with such images are floats.
    """

    def __init__(self, dataset: Dataset, column: str, processor: DDAEImageProcessor, keep: bool = True):
        if processor.do_normalize and not processor.do_rescale:
            raise ValueError(
                "The image processor has do_rescale=False: images of files count from 0 to 255, leave it out."
            )
        self.images, self.column, self.processor = dataset.select_columns([column]), column, processor
        self.keep = keep
        self.kept: tuple[torch.Tensor, torch.Tensor] | None = None  # of all images, and which of them are there

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: Sequence[int] | np.ndarray) -> torch.Tensor:
        """Return pixels (B, C, H, W) of the images at `indices`, in that order: uint8, or floats in [-1, 1]."""
        rows, kept = torch.as_tensor(indices), self.kept
        missing = rows if kept is None else rows[~kept[1][rows]]
        if kept is not None and len(missing) == 0:
            return kept[0][rows]
        pixels = self._decode(missing)
        if pixels.dtype != torch.uint8 or (kept is not None and pixels.shape[1:] != kept[0].shape[1:]):
            self.keep, self.kept = False, None
            return pixels if kept is None else self._decode(rows)
        if kept is None:
            self.keep = self.keep and fits(len(self) * pixels[0].numel())
            if not self.keep:
                return pixels
            # Of empty memory only what is written to is taken.
            room = torch.empty(len(self), *pixels.shape[1:], dtype=torch.uint8)
            kept = self.kept = room, torch.zeros(len(self), dtype=torch.bool)
        kept[0][missing] = pixels
        kept[1][missing] = True
        return kept[0][rows]

    def _decode(self, rows: torch.Tensor) -> torch.Tensor:
        images = read_images(self.images, rows.tolist(), self.column)
        raw = {"do_rescale": False, "do_normalize": False, "data_format": "channels_first"}
        counts = self.processor(images, **raw, return_tensors="pt")["pixel_values"]
        return counts if counts.dtype == torch.uint8 else _scale(counts, self.processor)


def read_images(dataset: Dataset, rows: list[int], column: str) -> list[PILImage.Image]:
    """Return the images of these rows, or stop with the name of the first that cannot be decoded."""
    try:
        return dataset[rows][column]
    except Exception as error:  # Pillow raises several kinds, some of which do not say of which file
        for row in rows:
            try:
                dataset[row]
            except Exception as reason:
                path = dataset.cast_column(column, Image(decode=False))[row][column]["path"]
                where = f"The image {path}" if path and os.path.isfile(path) else f"Image {row} (from 0) of {column!r}"
                # A worker's `SystemExit` would end it without a word.
                stop = SystemExit if get_worker_info() is None else OSError
                raise stop(f"{where} cannot be read: {reason}. Replace it, or leave it out.") from error
        raise


def scaled(pixels: torch.Tensor, processor: DDAEImageProcessor) -> torch.Tensor:
    """Return what the processor makes of pixels in uint8, on their device; floats are that already."""
    return _scale(pixels, processor) if pixels.dtype == torch.uint8 else pixels


def _scale(pixels: torch.Tensor, processor: DDAEImageProcessor) -> torch.Tensor:
    """Scale and shift in the processor's order of operations, from which every rounding follows.

    In place, for new memory for each of three results takes many times as long as these do.
    """
    if processor.do_rescale or processor.do_normalize:
        pixels = pixels.float()
    if processor.do_rescale:
        pixels.mul_(processor.rescale_factor)
    if processor.do_normalize:
        mean, std = (_factor(value, pixels.device) for value in (processor.image_mean, processor.image_std))
        pixels.sub_(mean).div_(std)
    return pixels


def _factor(value: float | Sequence[float], device: torch.device) -> float | torch.Tensor:
    # A number waits for no copy to the device.
    if isinstance(value, (int, float)):
        return float(value)
    return torch.tensor(value, dtype=torch.float32, device=device).reshape(-1, 1, 1)


def fits(count: int) -> bool:
    """Return whether so many bytes can be kept by each process of this machine."""
    return count * SHARE * int(os.environ.get("LOCAL_WORLD_SIZE", 1)) <= available_memory()


def available_memory() -> int:
    """Return how many bytes can still be filled without others having to leave."""
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text(encoding="utf-8").splitlines() if meminfo.is_file() else []
    found = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return 1024 * found[0] if found else ELSEWHERE
