"""What visitors hand in: files and drawings, as images, or a message to who sent them."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 50_000_000
MAX_BYTES = 15_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
INK = 48  # of 255: what is darker on paper counts as drawn


def open_upload(address: str) -> Image.Image:
    """Return the image in a `data:` address, turned upright; raise `ValueError`, to be read by who sent it, if none is.

    The browser sends files so, and so the page can answer what is wrong with one.
    """
    if len(address) > 4 * MAX_BYTES / 3 + 100:
        raise ValueError(f"This file is too large: send one of at most {MAX_BYTES / 1e6:.0f} MB.")
    try:
        file = io.BytesIO(base64.b64decode(address.partition(",")[2], validate=True))
        with Image.open(file, formats=FORMATS) as image:
            if (pixels := image.width * image.height) <= MAX_PIXELS:
                return ImageOps.exif_transpose(image)
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"This image has far more than the {MAX_PIXELS / 1e6:.0f} million pixels that are taken: make it smaller."
        ) from error
    except Exception as error:  # Pillow raises a dozen kinds
        raise ValueError("This file holds no image that can be read: send a PNG, JPEG or WebP file.") from error
    raise ValueError(
        f"This image has {pixels / 1e6:.0f} million pixels, and at most {MAX_PIXELS / 1e6:.0f} are taken: make it "
        "smaller. The network sees a few pixels of it anyway."
    )


def as_mnist(drawing: Image.Image, side: int = 28) -> Image.Image:
    """Return a drawing, dark on white paper, as MNIST has its digits: (side, side), white on black.

    As LeCun, Cortes and Burges describe them (The MNIST database of handwritten digits, 1998): what is drawn is scaled
    to fit in a box of 20x20 pixels, its proportions kept and its edges anti-aliased, and moved so that the centre of
    mass of its pixels is the centre of the 28x28 image. For another `side` the box is the same part of it.

    Raises:
        ValueError: Nothing is drawn.
    """
    ink = ImageOps.invert(drawing.convert("L"))
    where = ink.point(lambda value: 255 * (value > INK)).getbbox()
    if where is None:
        raise ValueError("Nothing is drawn yet: draw on the paper, or click one of the images below it.")
    ink = ink.crop(where)
    box = round(20 / 28 * side)
    scale = box / max(ink.size)
    size = (max(1, round(ink.width * scale)), max(1, round(ink.height * scale)))
    pixels = np.asarray(ink.resize(size, Image.Resampling.BOX if scale < 1 else Image.Resampling.BILINEAR), float)
    rows, columns = (np.average(index, weights=pixels) for index in np.indices(pixels.shape))
    middle = (side - 1) / 2
    digit = Image.new("L", (side, side))
    digit.paste(Image.fromarray(pixels.astype(np.uint8)), (round(middle - columns), round(middle - rows)))
    return digit
