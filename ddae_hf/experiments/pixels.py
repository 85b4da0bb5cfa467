"""Pixels of a data set's images: decoded when they are first asked for, kept where they fit, scaled on the device."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Image
from PIL import Image as PILImage

from ..image_processing_ddae import DDAEImageProcessor

Rows = Sequence[int] | np.ndarray  # places of images
SHARE = 4  # of the memory that is left, one part in so many may be filled
HINT = " Replace it, or leave such images out with skip_bad_images."
ELSEWHERE = 4 * 2**30  # bytes that are taken to be left where the system is not Linux, which tells


class DamagedImageError(ValueError):
    """An image that cannot be read: what was said of it, alone, where a loader's worker sends a traceback as text."""

    def __init__(self, words: str):
        super().__init__(words.rpartition(f"{DamagedImageError.__name__}: ")[2].strip())


class Pixels:
    """The pixels of an `ImageSet`, as integers from 0 to 255 that `scaled` makes floats of.

    With `keep`, an image is decoded once, if all fit into memory. Where some have more than 8 bits, none are kept, and
    batches with such images are floats.
    """

    def __init__(self, images: Any, processor: DDAEImageProcessor, keep: bool = True):
        if processor.do_normalize and not processor.do_rescale:
            reason = "images of files count from 0 to 255, leave it out"
            raise ValueError(f"The image processor has do_rescale=False: {reason}.")
        self.images, self.processor, self.keep = images, processor, keep
        self.kept: tuple[torch.Tensor, torch.Tensor] | None = None  # of all images, and which of them are there

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: Rows) -> torch.Tensor:
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
        images = self.images.pil(rows.tolist())
        counts = self.processor(
            images, do_rescale=False, do_normalize=False, data_format="channels_first", return_tensors="pt"
        )["pixel_values"]
        return counts if counts.dtype == torch.uint8 else _scale(counts, self.processor)


def decode(file: dict[str, Any] | None, feature: Image, where: str) -> PILImage.Image:
    """Return the image of a file, given as its `path` and `bytes`, or raise an error that says which it is.

    `where` is what is said of images that are no files of their own.
    """
    try:
        if file is None:
            raise ValueError("there is none")
        return feature.decode_example(file)
    except Exception as error:  # Pillow raises several kinds, most of which do not say of which file
        path, content = (file or {}).get("path"), (file or {}).get("bytes")
        if path and os.path.isfile(path):
            where = f"The image {path}"
        elif path:
            where = f"{where} ({path})"
        elif content:
            where = f"{where} ({len(content)} bytes, SHA-256 {hashlib.sha256(content).hexdigest()[:16]})"
        reason = str(error).partition(" <_io")[0].rstrip(".")  # without the name of an object
        raise DamagedImageError(f"{where} cannot be read: {reason}.{HINT}") from error


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
        for change, value in ((pixels.sub_, processor.image_mean), (pixels.div_, processor.image_std)):
            # A number waits for no copy to the device.
            one = isinstance(value, (int, float))
            change(float(value) if one else torch.tensor(value, device=pixels.device).float().reshape(-1, 1, 1))
    return pixels


def fits(count: int) -> bool:
    """Return whether so many bytes can be kept by each process of this machine."""
    return count * SHARE * int(os.environ.get("LOCAL_WORLD_SIZE", 1)) <= available_memory()


def available_memory() -> int:
    """Return how many bytes can still be filled without others having to leave."""
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text(encoding="utf-8").splitlines() if meminfo.is_file() else []
    found = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return 1024 * found[0] if found else ELSEWHERE
