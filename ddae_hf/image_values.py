"""What the values of an image mean: PIL images of any mode, and arrays, as channels of numbers from 0 to 255."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps
from transformers.image_utils import ChannelDimension


def read_pixels(image: Image.Image, channels: int) -> np.ndarray:
    """Return any PIL image upright, as (channels, H, W) with values from 0 to 255: uint8, or float32 for more bits.

    Modes `I` and `I;16`, in which Pillow opens 16-bit files, count to 65,535, and mode `F` from 0 to 1. Other values
    are refused, and so are images that cannot be turned into that many channels.
    """
    image = upright(image)
    if not (image.mode.startswith("I") or image.mode == "F"):
        return from_pil(image, channels)
    plane = np.asarray(image)[None]
    if image.mode == "I":
        if plane.size and not 0 <= plane.min() <= plane.max() <= 65535:
            raise ValueError(
                f"An image of PIL's mode I with values from {plane.min()} to {plane.max()} came: allowed are 0 to "
                "65535, as in the 16-bit files that Pillow opens in it."
            )
        plane = plane.astype(np.uint16)
    return convert_channels(checked_values(plane, 255), channels)


def upright(image: Image.Image) -> Image.Image:
    """Return an image as its EXIF orientation says that it is looked at."""
    image.load()  # this turns TIFF files upright
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # broken EXIF may raise anything, or nothing, depending on the file's format
        orientation = 1
    return image if orientation == 1 else ImageOps.exif_transpose(image)


def as_rgb(image: Image.Image) -> Image.Image:
    """Return any PIL image upright and in mode RGB, rounded to 8 bits where it has more: see `read_pixels`."""
    pixels = read_pixels(image, 3)
    pixels = pixels if pixels.dtype == np.uint8 else np.rint(pixels).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(np.moveaxis(pixels, 0, -1)))


def single_images(images: Any, channels: int, layout: Any) -> Iterator[Any]:
    """Yield the images of nested lists and batches, (N, C, H, W) or (N, H, W, C); refuse what may be a grey batch."""
    if isinstance(images, (list, tuple)):
        for entry in images:
            yield from single_images(entry, channels, layout)
        return
    shape = images.size if isinstance(images, Image.Image) else tuple(images.shape)
    if len(shape) not in (2, 3, 4):
        raise ValueError(f"An array of shape {shape} came: images have 2 or 3 dimensions, batches 4.")
    if len(shape) == 3 and not layout and shape[0] in {2, 3, 4} - {channels} and shape[2] not in (1, 2, 3, 4):
        raise ValueError(
            f"An array of shape {shape} came, which may be {shape[0]} grey images or one of {shape[0]} channels: pass "
            f"a batch as {(shape[0], 1, *shape[1:])}, and an image with input_data_format='channels_first'."
        )
    yield from images if len(shape) == 4 else [images]


def channels_first(image: np.ndarray, layout: Any, channels: int) -> np.ndarray:
    """Return (H, W), (C, H, W) or (H, W, C) as (C, H, W); refuse what may be either where no layout is given."""
    if image.ndim == 2:
        return image[None]
    if layout is None:
        first, last = (image.shape[axis] in {1, 2, 3, 4, channels} for axis in (0, 2))
        if first and last:
            raise ValueError(
                f"An array of shape {image.shape} came, whose channels may be its first or its last dimension: say "
                "which, with input_data_format='channels_first' or 'channels_last'."
            )
        if not (first or last):
            raise ValueError(
                f"An array of shape {image.shape} came: neither its first nor its last dimension can be channels, of "
                f"which there are 1 to 4 or num_channels, {channels}. Pass a batch of grey images as "
                f"{(image.shape[0], 1, *image.shape[1:])}."
            )
        layout = ChannelDimension.FIRST if first else ChannelDimension.LAST
    return image if layout == ChannelDimension.FIRST else np.moveaxis(image, -1, 0)


def from_pil(image: Image.Image, channels: int) -> np.ndarray:
    """Return a PIL image as uint8 (channels, H, W)."""
    mode = {1: "L", 3: "RGB"}.get(channels)
    if mode is None and len(image.getbands()) != channels:
        raise ValueError(f"An image of mode {image.mode} came: it cannot be turned into {channels} channels.")
    if mode is not None and image.mode != mode:
        image = image.convert(mode)
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)


def checked_values(image: np.ndarray, top: int) -> np.ndarray:
    """Return an array's values as uint8, or as float32 from 0 to 255; floats come out from 0 to `top`.

    The array's type alone says how they are read, so that an image's content never changes this.
    """
    if image.size == 0:
        raise ValueError(f"An image without pixels came, of {image.shape[1]}x{image.shape[2]}.")
    kind, low, high = image.dtype.kind, image.min(), image.max()
    if image.dtype == np.uint8:
        return image
    if kind == "b":
        return image.astype(np.uint8) * 255
    if kind == "u" and image.dtype.itemsize == 2:
        return image.astype(np.float32) / 257
    if kind in "iu" and low >= 0 and high <= 255:
        return image.astype(np.uint8)
    if kind == "f" and low >= -1e-4 and high <= 1 + 1e-4:
        return image.astype(np.float32) * top
    raise ValueError(
        f"An image of type {image.dtype} with values from {low} to {high} came: allowed are integers from 0 to 255, "
        "uint16 for images of 16 bits, and floats from 0 to 1. Images in [-1, 1] are `pixel_values` already, or need "
        "`x / 2 + 0.5`."
    )


def convert_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """Return float (C, H, W) with another number of channels, by Pillow's rules."""
    if image.shape[0] == channels:
        return image
    colours = image[:-1] if image.shape[0] in (2, 4) else image
    if colours.shape[0] == channels:
        return colours
    if colours.shape[0] == 1 and channels == 3:
        return np.repeat(colours, 3, axis=0)
    if colours.shape[0] == 3 and channels == 1:
        return np.tensordot(np.array([[0.299, 0.587, 0.114]], image.dtype), colours, axes=1)
    raise ValueError(f"An image of {image.shape[0]} channels came: it cannot be turned into {channels} channels.")
