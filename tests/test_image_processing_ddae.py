"""Any image in, `pixel_values` in [-1, 1] out, against Pillow."""

import numpy as np
import pytest
import torch
from PIL import Image

from ddae_hf import DDAEImageProcessor

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)


def process(image, side=8, channels=3, **options):
    processor = DDAEImageProcessor(size={"height": side, "width": side}, num_channels=channels)
    return processor(image, return_tensors="pt", **options)["pixel_values"]


def expected(image, mode="RGB", side=8):
    array = np.asarray(image.convert(mode).resize((side, side), Image.Resampling.BILINEAR), dtype=np.float32)
    array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    return torch.from_numpy(array / 127.5 - 1)[None]


MODES = ["RGB", "L", "RGBA", "LA", "P", "CMYK", "1", "YCbCr", "HSV"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("channels", "target"), [(3, "RGB"), (1, "L")])
def test_every_pil_mode(mode, channels, target):
    image = Image.fromarray(RGB).convert("L" if mode == "LA" else "RGB").convert(mode)
    torch.testing.assert_close(process(image, channels=channels), expected(image, target), rtol=0, atol=1e-6)


def test_arrays_and_tensors_of_any_layout_are_the_same_image():
    want = process(Image.fromarray(RGB))
    forms = [RGB, RGB.transpose(2, 0, 1), torch.from_numpy(RGB), RGB.astype(np.int64)]
    for form in forms:
        torch.testing.assert_close(process(form), want, rtol=0, atol=1e-6)


def test_floats_count_from_zero_to_one_and_are_not_rounded():
    image = RNG.random((8, 8, 3), dtype=np.float32)
    for form in (image, torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(image).double()):
        torch.testing.assert_close(
            process(form)[0], torch.from_numpy(image * 2 - 1).permute(2, 0, 1), rtol=0, atol=1e-5
        )
    resized = process(image, side=4)
    rounded = process((image * 255).round().astype(np.uint8), side=4)
    torch.testing.assert_close(resized, rounded, rtol=0, atol=0.02)


def test_images_of_sixteen_bits():
    deep = RNG.integers(0, 65536, (8, 8), dtype=np.uint16)
    want = torch.from_numpy(deep.astype(np.float32) / 65535 * 2 - 1)[None, None]
    for form in (deep, Image.fromarray(deep)):
        torch.testing.assert_close(process(form, channels=1), want, rtol=0, atol=1e-5)


def test_grey_and_colour_arrays():
    grey = RGB[..., 0]
    torch.testing.assert_close(process(grey, channels=1), expected(Image.fromarray(grey), "L"), rtol=0, atol=1e-6)
    assert torch.equal(process(grey)[0, 0], process(grey)[0, 2])
    as_floats = process(RGB[:8, :8] / np.float64(255), channels=1)
    torch.testing.assert_close(as_floats, process(RGB[:8, :8], channels=1), rtol=0, atol=0.01)


def test_lists_batches_and_sizes():
    images = [Image.fromarray(RGB), Image.fromarray(RGB[:8, :8]), Image.fromarray(RGB[:3])]
    batch = process(images)
    assert batch.shape == (3, 3, 8, 8) and batch.min() >= -1 and batch.max() <= 1
    for image, row in zip(images, batch, strict=True):
        assert torch.equal(process(image)[0], row)
    assert process(np.stack([RGB, RGB])).shape == (2, 3, 8, 8)
    assert process([RGB[..., 0], RGB[..., 1]], channels=1).shape == (2, 1, 8, 8)


def test_an_image_of_the_right_size_keeps_its_pixels():
    image = RGB[:8, :8]
    restored = (process(Image.fromarray(image))[0].permute(1, 2, 0) / 2 + 0.5) * 255
    assert np.array_equal(restored.round().numpy().astype(np.uint8), image)


def test_other_channel_counts_pass_through():
    assert process(Image.fromarray(RGB).convert("RGBA"), channels=4).shape == (1, 4, 8, 8)
    assert process(RNG.random((6, 8, 8)), channels=6).shape == (1, 6, 8, 8)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.full((8, 8, 3), -0.5), "values from -0.5"),
        (np.full((8, 8, 3), 200.0), "floats from 0 to 1"),
        (np.full((8, 8, 3), np.nan), "values from nan"),
        (np.full((8, 8, 3), -3), "integers from 0 to 255"),
        ([], "pass at least one"),
    ],
)
def test_what_is_no_image_is_refused(image, message):
    with pytest.raises(ValueError, match=message):
        process(image)


def test_saves_and_loads(tmp_path):
    saved = DDAEImageProcessor(size={"height": 12, "width": 10}, num_channels=1)
    saved.save_pretrained(tmp_path)
    loaded = DDAEImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == saved.to_dict() and dict(loaded.size) == {"height": 12, "width": 10}
    assert torch.equal(loaded(RGB, return_tensors="pt").pixel_values, saved(RGB, return_tensors="pt").pixel_values)


def test_torchvision_is_not_needed():
    assert DDAEImageProcessor().backend == "pil"
