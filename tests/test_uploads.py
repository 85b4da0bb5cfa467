"""What the demo's visitors hand in, as images."""

import base64
import io

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

from ddae_hf.demo import uploads
from ddae_hf.experiments.digits import mnist


def address(image, **options):
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def drawing(*points, width=20, side=280):
    paper = Image.new("L", (side, side), 255)
    ImageDraw.Draw(paper).line(points, fill=0, width=width, joint="curve")
    return paper


def centre(digit):
    pixels = np.asarray(digit, float)
    return [np.average(index, weights=pixels) for index in np.indices(pixels.shape)]


def test_a_drawing_becomes_a_digit_in_mnists_box_around_its_centre_of_mass():
    digit = uploads.as_mnist(drawing((40, 30), (120, 20), (110, 200), (30, 210)))
    assert (digit.mode, digit.size) == ("L", (28, 28))
    left, top, right, bottom = digit.getbbox()
    assert bottom - top == 20 and 8 < right - left < 20
    assert max(abs(place - 13.5) for place in centre(digit)) <= 0.5
    assert digit.getextrema() == (0, 255)


@pytest.mark.parametrize("side", [8, 28, 64])
def test_where_and_how_large_it_is_drawn_plays_no_part(side):
    points = np.array([(0, 0), (60, 0), (60, 80), (0, 80)])
    found = [
        np.asarray(uploads.as_mnist(drawing(*map(tuple, scale * points + place), width=10 * scale), side), float)
        for scale, place in ((1, 30), (1, 150), (2, 60))
    ]
    assert np.array_equal(found[0], found[1])
    assert np.abs(found[0] - found[2]).mean() < 12


def test_digits_of_mnist_stay_what_they_are():
    """They were made so, and turned to drawings come back, up to a pixel's difference in places by rounding."""
    for pixels in mnist()["test"][0][:50]:
        paper = ImageOps.invert(Image.fromarray(pixels))
        again = np.asarray(uploads.as_mnist(paper), float)
        shifts = [np.roll(pixels.astype(float), (dy, dx), (0, 1)) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
        assert min(np.abs(again - shifted).mean() for shifted in shifts) < 12


def test_an_empty_paper_is_no_digit():
    with pytest.raises(ValueError, match="Nothing is drawn yet"):
        uploads.as_mnist(Image.new("RGB", (280, 280), "white"))


def test_a_file_is_opened_upright():
    image = Image.new("RGB", (4, 2), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    assert uploads.open_upload(address(image, exif=exif)).size == (2, 4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "holds no image that can be read"),
        ("data:image/png;base64,", "holds no image that can be read"),
        ("data:text/plain;base64," + base64.b64encode(b"no image").decode(), "holds no image that can be read"),
        ("data:image/png;base64,%%%", "holds no image that can be read"),
        ("data:image/png;base64," + 21_000_000 * "A", "too large: send one of at most 15 MB"),
    ],
)
def test_what_is_no_image_is_refused_in_words(given, message):
    with pytest.raises(ValueError, match=message):
        uploads.open_upload(given)


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded():
    with pytest.raises(ValueError, match="81 million pixels, and at most 50 are taken"):
        uploads.open_upload(address(Image.new("1", (9000, 9000))))
