"""Any image in, `pixel_values` in [-1, 1] out, against Pillow."""

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps
from transformers.image_utils import ChannelDimension
from transformers.processing_utils import ImagesKwargs

from ddae_hf import DDAEImageProcessor
from ddae_hf.image_values import as_rgb, read_pixels

from .conftest import make_unet

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (8, 8), dtype=np.uint16)


def process(image, side=8, channels=3, made_with=(), **options):
    processor = DDAEImageProcessor(size={"height": side, "width": side}, num_channels=channels, **dict(made_with))
    return processor(image, return_tensors="pt", **options)["pixel_values"]


def squashed(image, mode="RGB", side=8):
    array = np.asarray(image.convert(mode).resize((side, side), Image.Resampling.BILINEAR), dtype=np.float32)
    array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    return torch.from_numpy(array / 127.5 - 1)[None]


def expected(image, mode="RGB", side=8):
    """The centre of the image whose shorter side is `side`, as diffusers' training scripts take it."""
    width, height = (side * edge // min(image.size) for edge in image.size)
    left, top = round((width - side) / 2), round((height - side) / 2)
    resized = image.convert(mode).resize((width, height), Image.Resampling.BILINEAR)
    return squashed(resized.crop((left, top, left + side, top + side)), mode, side)


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


def deep_images(folder):
    """One image of 16 bits in every mode in which Pillow opens such files, and in those files."""
    yield Image.fromarray(DEEP)
    yield Image.frombytes("I;16B", DEEP.shape[::-1], DEEP.astype(">u2").tobytes())
    yield Image.fromarray(DEEP.astype(np.int32))
    for suffix, mode in {"png": "I;16", "tif": "I;16", "pgm": "I"}.items():
        path = folder / f"deep.{suffix}"
        Image.fromarray(DEEP).save(path)
        opened = Image.open(path)
        assert opened.mode == mode
        yield opened
        yield str(path)


def test_images_of_sixteen_bits(tmp_path):
    """They keep all their bits, in any byte order, and are never clipped."""
    want = torch.from_numpy(DEEP.astype(np.float32) / 65535 * 2 - 1)[None, None]
    forms = [*deep_images(tmp_path), DEEP, DEEP.astype(">u2"), torch.from_numpy(DEEP)]
    for form in forms:
        torch.testing.assert_close(process(form, channels=1), want, rtol=0, atol=1e-5)
        torch.testing.assert_close(process(form), want.expand(-1, 3, -1, -1), rtol=0, atol=1e-5)


def test_images_of_sixteen_bits_in_eight(tmp_path):
    rounded = np.rint(DEEP / 257).astype(np.uint8)
    for image in deep_images(tmp_path):
        if isinstance(image, Image.Image):
            assert np.array_equal(np.asarray(as_rgb(image)), np.stack([rounded] * 3, axis=-1))
    for mode in MODES:
        image = Image.fromarray(RGB).convert("L" if mode == "LA" else "RGB").convert(mode)
        assert np.array_equal(np.asarray(as_rgb(image)), np.asarray(image.convert("RGB")))
    floats = Image.fromarray(np.array([[0, 0.5, 1]], np.float32))
    assert np.asarray(as_rgb(floats))[0, :, 0].tolist() == [0, 128, 255]


def test_a_dark_image_of_sixteen_bits_is_dark():
    """Values never decide how an image counts."""
    dark = np.full((8, 8), 200)
    for form in (Image.fromarray(dark.astype(np.int32)), Image.fromarray(dark.astype(np.uint16)), np.uint16(dark)):
        assert process(form).max() == pytest.approx(200 / 65535 * 2 - 1)
    for kind in (np.uint8, np.int16, np.int32, np.uint32, np.int64):
        assert process(np.full((8, 8, 3), 255, kind)).unique() == 1
        assert process(np.zeros((8, 8, 3), kind)).unique() == -1
    assert torch.equal(process(RGB[:8, :8] > 99), process(np.where(RGB[:8, :8] > 99, 255, 0).astype(np.uint8)))


def turned(orientation):
    """A file whose EXIF says how to turn it, and its pixels as they are to be seen."""
    file, exif = io.BytesIO(), Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(RGB).save(file, "PNG", exif=exif)
    return file, np.asarray(ImageOps.exif_transpose(Image.open(file)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright_once(orientation, tmp_path):
    file, upright = turned(orientation)
    flips = {2: RGB[:, ::-1], 3: RGB[::-1, ::-1], 4: RGB[::-1], 6: np.rot90(RGB, -1), 8: np.rot90(RGB)}
    assert np.array_equal(upright, flips.get(orientation, upright))
    opened = Image.open(file)
    for image in (opened, ImageOps.exif_transpose(opened)):  # datasets and transformers' pipelines turn images, too
        assert torch.equal(process(image), process(upright))
        assert np.array_equal(np.asarray(as_rgb(image)), upright)
    assert opened.size == (30, 20), "the image itself stays as it is"
    Image.fromarray(RGB).save(tmp_path / "a.tif", exif=opened.getexif())  # Pillow turns TIFF files itself
    assert torch.equal(process(Image.open(tmp_path / "a.tif")), process(upright))


def test_deep_images_are_turned_upright():
    image = Image.fromarray(DEEP[:4])
    image.getexif()[ExifTags.Base.Orientation] = 6
    assert np.array_equal(read_pixels(image, 1)[0], np.rot90(DEEP[:4], -1).astype(np.float32) / 257)


def test_values_that_are_not_rescaled_are_floats_from_zero_to_one():
    """As `ToTensor` makes them: the same numbers as of images that are rescaled."""
    for image in (RNG.random((3, 8, 8), dtype=np.float32), RNG.random((3, 20, 30), dtype=np.float32)):
        for options in ({}, {"do_center_crop": False}, {"resample": Image.Resampling.BICUBIC}):
            found = process(torch.from_numpy(image), do_rescale=False, **options)
            torch.testing.assert_close(found, process(image, **options), rtol=0, atol=1e-6)
    exact = torch.rand(3, 8, 8)
    assert torch.equal(process(exact, do_rescale=False)[0], (exact - 0.5) / 0.5)
    assert torch.equal(process(exact, made_with={"do_rescale": False, "do_normalize": False})[0], exact)
    for image in (RGB, torch.from_numpy(RGB), RGB.astype(np.int64), Image.fromarray(RGB), Image.fromarray(DEEP)):
        with pytest.raises(ValueError, match="do_rescale=False says .* came"):
            process(image, do_rescale=False)
    raw = DDAEImageProcessor(size=8, do_rescale=False, do_normalize=False)
    assert np.array_equal(raw(RGB[:8, :8])["pixel_values"][0], RGB[:8, :8].transpose(2, 0, 1))
    assert np.array_equal(raw(Image.fromarray(DEEP))["pixel_values"][0, 0], DEEP.astype(np.float32) / 257)


def circle(height, width, radius):
    y, x = np.mgrid[:height, :width] + 0.5
    return np.where((y - height / 2) ** 2 + (x - width / 2) ** 2 < radius**2, 255, 0).astype(np.uint8)


@pytest.mark.parametrize("shape", [(64, 256), (256, 64), (100, 333)])
def test_photographs_keep_their_shape(shape):
    """A circle stays one; version 0.1.0 squashed it."""
    image = circle(*shape, 24)
    disc = process(image, side=32, channels=1)[0, 0] > 0
    want = circle(32, 32, 24 * 32 / min(shape)) > 0
    assert (disc.numpy() != want).mean() < 0.02
    flat = process(image, side=32, channels=1, do_center_crop=False)[0, 0] > 0
    heights = [int(side.any(axis).sum()) for side in (disc, flat) for axis in (0, 1)]
    assert heights[0] == heights[1] and max(heights[2:]) > 2.5 * min(heights[2:])


def test_the_centre_is_what_diffusers_scripts_take():
    for image in (RGB, RGB.transpose(1, 0, 2), RNG.integers(0, 256, (32, 128, 3), dtype=np.uint8)):
        photograph = Image.fromarray(image)
        torch.testing.assert_close(process(photograph), expected(photograph), rtol=0, atol=1e-6)
        torch.testing.assert_close(process(photograph, do_center_crop=False), squashed(photograph), rtol=0, atol=1e-6)
    tall = DDAEImageProcessor(size={"height": 12, "width": 6})(RGB, return_tensors="pt")["pixel_values"]
    resized = Image.fromarray(RGB).resize((18, 12), Image.Resampling.BILINEAR).crop((6, 0, 12, 12))
    assert np.array_equal(((tall[0] + 1) * 127.5).round().permute(1, 2, 0).numpy(), np.asarray(resized))


@pytest.mark.parametrize("size", [(20, 20), (8, 8), (5, 9)])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_images_of_the_right_proportions_are_not_cut(size, kind):
    image = Image.fromarray(RNG.integers(0, 255, (4 * size[0], 4 * size[1]), dtype=np.uint8).astype(kind))
    crop, squash = (
        DDAEImageProcessor(size={"height": size[0], "width": size[1]}, do_center_crop=c) for c in (True, False)
    )
    for form in (image, image.resize(size[::-1], Image.Resampling.NEAREST)):
        assert np.array_equal(crop(form)["pixel_values"], squash(form)["pixel_values"])


def test_without_resizing_images_are_cut_or_left_as_they_are():
    image = RGB.transpose(2, 0, 1)
    raw = {"do_resize": False, "do_rescale": False, "do_normalize": False}
    assert np.array_equal(process(RGB, **raw)[0], image[:, 6:14, 11:19])
    assert np.array_equal(process(RGB, do_center_crop=False, **raw)[0], image)
    with pytest.raises(ValueError, match="20x30 pixels .* to cut 32x32 pixels"):
        process(RGB, side=32, **raw)


def test_how_a_checkpoint_treats_other_shapes(tmp_path):
    """New processors cut; what version 0.1.0 saved squashes, as it did; the choice is kept."""
    assert DDAEImageProcessor().do_center_crop and DDAEImageProcessor.for_denoiser(make_unet().config).do_center_crop
    make_unet().save_pretrained(tmp_path / "unet")
    assert DDAEImageProcessor.from_pretrained(tmp_path / "unet").do_center_crop
    assert not DDAEImageProcessor.from_pretrained(tmp_path / "unet", do_center_crop=False).do_center_crop
    for choice in (True, False):
        DDAEImageProcessor(do_center_crop=choice).save_pretrained(tmp_path / "chosen")
        assert DDAEImageProcessor.from_pretrained(tmp_path / "chosen").do_center_crop is choice
        assert DDAEImageProcessor(**DDAEImageProcessor(do_center_crop=choice).to_dict()).do_center_crop is choice
    file = tmp_path / "chosen" / "preprocessor_config.json"
    for old in ({}, {"do_center_crop": None}):
        saved = json.loads(file.read_text())
        saved.pop("do_center_crop", None)
        file.write_text(json.dumps(saved | old))
        opened = DDAEImageProcessor.from_pretrained(file.parent)
        assert opened.do_center_crop is False
        assert DDAEImageProcessor.from_pretrained(file.parent, do_center_crop=True).do_center_crop is True
        assert torch.equal(opened(RGB, size=8, return_tensors="pt")["pixel_values"], process(RGB, do_center_crop=False))


def test_grey_and_colour_arrays():
    grey = RGB[..., 0]
    torch.testing.assert_close(process(grey, channels=1), expected(Image.fromarray(grey), "L"), rtol=0, atol=1e-6)
    assert torch.equal(process(grey)[0, 0], process(grey)[0, 2])
    for width in (1, 2, 3, 4):  # what has two dimensions has no channels
        assert torch.equal(process(grey[:, :width]), process(np.stack([grey[:, :width]] * 3, axis=-1)))
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
    nested = process([[RGB, Image.fromarray(RGB)], [np.stack([RGB, RGB])]])
    assert len(nested) == 4 and all(torch.equal(row, nested[0]) for row in nested)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_grey_batches_never_collapse_to_one_image(count):
    batch = RNG.random((count, 8, 9), dtype=np.float32)
    as_batch = process(batch[:, None], channels=1)
    assert torch.equal(as_batch, torch.cat([process(image, channels=1) for image in batch]))
    as_image = process(batch, channels=1, input_data_format="channels_first")
    assert as_image.shape == (1, 1, 8, 8)
    for form in (batch, torch.from_numpy(batch), [batch]):
        with pytest.raises(ValueError, match=rf"{count} grey images or .*\({count}, 1, 8, 9\).*'channels_first'"):
            process(form, channels=1)
    if count != 3:
        with pytest.raises(ValueError, match="grey images"):
            process(batch)
    # A batch that says it is one leaves no doubt.
    assert torch.equal(process(batch[None], channels=1), as_image)


@pytest.mark.parametrize(
    ("shape", "channels", "first", "size"),
    [
        ((3, 8, 9), 3, True, (8, 9)),
        ((1, 8, 9), 3, True, (8, 9)),
        ((1, 8, 9), 1, True, (8, 9)),
        ((4, 8, 9), 4, True, (8, 9)),
        ((8, 9, 1), 1, False, (8, 9)),
        ((8, 9, 2), 3, False, (8, 9)),
        ((8, 9, 4), 1, False, (8, 9)),
        ((6, 9, 6), 6, None, None),
        ((3, 8, 3), 3, None, None),
        ((4, 8, 1), 1, None, None),
        ((5, 8, 9), 1, None, None),
        ((5, 8, 9), 3, None, None),
        ((28, 28, 28), 3, None, None),
    ],
)
def test_three_dimensions_are_one_image_or_are_refused(shape, channels, first, size):
    image = RNG.random(shape, dtype=np.float32)
    options = {"do_resize": False, "do_center_crop": False}
    if first is None:
        with pytest.raises(ValueError, match=r"first (or|nor) its last dimension"):
            process(image, channels=channels, **options)
    else:
        layout = "channels_first" if first else ChannelDimension.LAST
        found = process(image, channels=channels, **options)
        assert found.shape == (1, channels, *size)
        assert torch.equal(found, process(image, channels=channels, input_data_format=layout, **options))
    if shape == (3, 8, 3):
        pair = [process(image, input_data_format=f"channels_{layout}") for layout in ("first", "last")]
        assert torch.equal(pair[1], process(image.transpose(2, 0, 1), input_data_format="channels_first"))
        assert not torch.equal(*pair)


def test_an_image_of_the_right_size_keeps_its_pixels():
    image = RGB[:8, :8]
    restored = (process(Image.fromarray(image))[0].permute(1, 2, 0) / 2 + 0.5) * 255
    assert np.array_equal(restored.round().numpy().astype(np.uint8), image)


def test_other_channel_counts_pass_through():
    assert process(Image.fromarray(RGB).convert("RGBA"), channels=4).shape == (1, 4, 8, 8)
    assert process(RNG.random((6, 8, 8)), channels=6).shape == (1, 6, 8, 8)


@pytest.mark.parametrize("kind", [np.uint8, np.float32, Image])
@pytest.mark.parametrize(("mean", "std"), [(0.5, 0.5), ([0.1, 0.2, 0.3, 0.4], [1.0, 0.5, 0.25, 2.0])])
def test_four_channels_are_normalised_each_as_said(kind, mean, std):
    image = RNG.integers(0, 256, (8, 8, 4), dtype=np.uint8)
    forms = {
        Image: lambda: Image.fromarray(image),
        np.uint8: lambda: image,
        np.float32: lambda: np.float32(image / 255),
    }
    found = process(forms[kind](), channels=4, made_with={"image_mean": mean, "image_std": std})
    want = ((image / 255 - np.array(mean)) / np.array(std)).transpose(2, 0, 1)
    np.testing.assert_allclose(found[0].numpy(), want, rtol=0, atol=1e-5)
    drop = process(forms[kind]())
    torch.testing.assert_close(drop, process(np.ascontiguousarray(image[..., :3])), rtol=0, atol=1e-6)
    for channels in (2, 5, 6):
        with pytest.raises(ValueError, match=f"turned into {channels} channels"):
            process(forms[kind](), channels=channels)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.full((8, 8, 3), -0.5), "values from -0.5"),
        (np.full((8, 8, 3), 200.0), "floats from 0 to 1"),
        (np.full((8, 8, 3), np.nan), "values from nan"),
        (np.full((8, 8, 3), -3), "integers from 0 to 255"),
        (np.full((8, 8, 3), 256), "uint16 for images of 16 bits"),
        (np.full((8, 8, 3), 65535, np.int32), "uint16 for images of 16 bits"),
        (np.where(np.arange(64).reshape(8, 8) == 9, np.inf, 0.5), "values from 0.5 to inf"),
        (torch.where(torch.arange(64).view(8, 8) == 9, torch.nan, 0.5), "values from nan"),
        (Image.fromarray(np.full((8, 8), np.nan, np.float32)), "values from nan"),
        (Image.fromarray(np.full((8, 8), 2.0, np.float32)), "floats from 0 to 1"),
        (Image.fromarray(np.full((8, 8), 65536, np.int32)), "mode I with values from 65536"),
        (Image.fromarray(np.full((8, 8), -1, np.int32)), "mode I with values from -1"),
        (np.full((8, 8), 1j), "of type complex128"),
        (np.zeros((0, 8, 3)), "without pixels"),
        (np.zeros((1, 1, 8, 8, 3)), "batches 4"),
        (np.zeros(8), "images have 2 or 3 dimensions"),
        ([], "pass at least one"),
        ([[]], "pass at least one"),
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


HONOURED = {
    "do_resize": False,
    "size": 4,
    "resample": 0,
    "do_center_crop": False,
    "do_rescale": False,
    "rescale_factor": 1 / 300,
    "do_normalize": False,
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": 0.25,
    "num_channels": 1,
    "data_format": "channels_last",
    "return_tensors": "np",
}
HARMLESS = {
    "do_convert_rgb": True,
    "default_to_square": True,
    "crop_size": 8,
    "do_pad": False,
    "device": "cpu",
    "disable_grouping": False,
    "input_data_format": "channels_last",
}
REFUSED = {
    "do_convert_rgb": False,
    "size": {"shortest_edge": 8},
    "crop_size": 4,
    "do_pad": True,
    "pad_size": 16,
    "device": "meta",
    "disable_grouping": True,
    "image_seq_length": 4,
    "data_format": "last",
    "input_data_format": "none",
    "num_channels": 0,
    "image_mean": [0.5, 0.5],
    "image_std": [0.5, 0.0, 0.5],
}


def test_every_option_of_transformers_is_tried_below():
    known = HONOURED.keys() | HARMLESS.keys() | REFUSED.keys()
    assert set(DDAEImageProcessor.valid_kwargs.__annotations__) >= set(ImagesKwargs.__annotations__)
    assert known == set(DDAEImageProcessor.valid_kwargs.__annotations__)


@pytest.mark.parametrize("name", HONOURED)
def test_options_have_an_effect_when_given_at_either_place(name):
    option, plain = {name: HONOURED[name]}, DDAEImageProcessor(size=8)
    image = RGB / np.float32(255)
    expected, default = plain(image, **option)["pixel_values"], plain(image)["pixel_values"]
    found = DDAEImageProcessor(**{"size": 8} | option)(image)["pixel_values"]
    assert type(found) is type(expected) and np.array_equal(found, expected)
    if name != "return_tensors":
        assert found.shape != default.shape or not np.array_equal(found, default)
    if name == "data_format":
        assert np.array_equal(found, default.transpose(0, 2, 3, 1))


@pytest.mark.parametrize("name", HARMLESS)
def test_options_that_ask_for_what_is_done_change_nothing(name):
    option, plain = {name: HARMLESS[name]}, DDAEImageProcessor(size=8)
    for found in (plain(RGB, **option), DDAEImageProcessor(size=8, **option)(RGB)):
        assert np.array_equal(found["pixel_values"], plain(RGB)["pixel_values"])
    assert plain(RGB, **{name: None})["pixel_values"].shape == (1, 3, 8, 8), "None is the processor's own"
    made = DDAEImageProcessor(size=8, **option)
    assert made(RGB, size=6)["pixel_values"].shape[2:] == (6, 6)


@pytest.mark.parametrize("name", REFUSED)
def test_options_without_an_effect_are_refused_by_name(name):
    option = {name: REFUSED[name]}
    with pytest.raises(ValueError, match=f"^{name} is "):
        DDAEImageProcessor(**{"size": 8} | option)
    with pytest.raises(ValueError, match=f"^{name} is "):
        DDAEImageProcessor(size=8)(RGB, **option)


def test_options_of_another_name_or_type_are_refused():
    with pytest.raises(ValueError, match="do_centre_crop"):
        DDAEImageProcessor(do_centre_crop=True)
    with pytest.raises(TypeError, match="do_centre_crop"):
        DDAEImageProcessor()(RGB, do_centre_crop=True)
    for name, value in {"do_resize": "yes", "num_channels": 2.5, "image_mean": "grey"}.items():
        with pytest.raises(Exception, match=name):  # some are huggingface_hub's, of its own kind
            DDAEImageProcessor(**{name: value})


def test_torchvision_is_not_needed():
    assert DDAEImageProcessor().backend == "pil"


@pytest.mark.parametrize("name, content", [("exif", b"no EXIF"), ("Raw profile type exif", "\nexif\n 4\nzz")])
def test_an_image_whose_exif_is_broken_is_taken_as_it_lies(name, content):
    plain = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    broken = plain.copy()
    broken.info[name] = content
    processor = DDAEImageProcessor(size={"height": 8, "width": 8})
    assert np.array_equal(processor(broken)["pixel_values"], processor(plain)["pixel_values"])


def checkers(height, width):
    """A mask whose classes lie in quarters: 0 and 1 above, 2 and 7 below."""
    mask = np.zeros((height, width), np.uint8)
    mask[: height // 2, width // 2 :] = 1
    mask[height // 2 :, : width // 2] = 2
    mask[height // 2 :, width // 2 :] = 7
    return mask


@pytest.mark.parametrize("crop", [False, True])
def test_masks_are_resized_and_cut_as_their_images_are_without_mixing_classes(crop):
    processor = DDAEImageProcessor(size={"height": 8, "width": 8}, do_center_crop=crop)
    mask = checkers(16, 32)
    images = [Image.fromarray(mask).convert("RGB")] * 2
    palette = Image.fromarray(mask).convert("P")
    palette.putpalette(list(range(255, -1, -1)) * 3)
    batch = processor(images, [Image.fromarray(mask), palette], return_tensors="pt")
    assert batch["labels"].dtype == torch.int64 and batch["pixel_values"].shape == (2, 3, 8, 8)
    shown = torch.from_numpy(checkers(8, 8)).long()
    assert torch.equal(batch["labels"][0], shown) and torch.equal(batch["labels"][1], shown)
    seen = ((batch["pixel_values"][0, 0] / 2 + 0.5) * 255).round().long()
    assert torch.equal(seen[:2, :2], shown[:2, :2]) and torch.equal(seen[6:, 6:], shown[6:, 6:])  # away from the edges
    uncut = processor(images[0], torch.from_numpy(mask), do_resize=False, return_tensors="np")
    assert uncut["labels"][0].shape == ((8, 8) if crop else (16, 32))
    alone = processor(images, segmentation_maps=np.stack([mask, mask]))
    assert [each.shape for each in alone["labels"]] == [(8, 8)] * 2
    assert "labels" not in processor(images)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Image.new("RGB", (8, 8)), "mode RGB came: it must have one number a pixel"),
        (Image.new("F", (8, 8)), "mode F"),
        (np.zeros((8, 8)), r"type float64 and shape \(8, 8\)"),
        (np.zeros(8, int), r"shape \(8,\)"),
        (np.full((8, 8), -1), "classes -1 to -1"),
        (np.zeros((8, 9), int), "8x9 pixels came with an image of 8x8"),
        ([np.zeros((8, 8), int)] * 2, "1 images and 2 segmentation_maps"),
        ([], "1 images and 0 segmentation_maps"),
    ],
)
def test_masks_that_are_none_are_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        DDAEImageProcessor()(Image.new("RGB", (8, 8)), segmentation_maps=mask)


def test_maps_of_classes_have_the_sizes_that_are_asked_for():
    outputs = SimpleNamespace(logits=torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)))
    squashes = DDAEImageProcessor(size={"height": 8, "width": 8}, do_center_crop=False)
    small = squashes.post_process_semantic_segmentation(outputs)
    assert torch.equal(torch.stack(small), outputs.logits.argmax(1))
    first, second = squashes.post_process_semantic_segmentation(outputs, torch.tensor([[8, 8], [6, 12]]))
    resized = torch.nn.functional.interpolate(outputs.logits[1:], (6, 12), mode="bilinear", align_corners=False)
    assert first.shape == (8, 8) and torch.equal(second, resized[0].argmax(0))
    cuts = DDAEImageProcessor(size={"height": 8, "width": 8})
    assert cuts.post_process_semantic_segmentation(outputs, [(16, 16), (8, 8)])[0].shape == (16, 16)
    with pytest.raises(ValueError, match="Of an image of 6x12 pixels only the centre is left"):
        cuts.post_process_semantic_segmentation(outputs, [(8, 8), (6, 12)])
    with pytest.raises(ValueError, match="There are 2 images and 1 target_sizes"):
        squashes.post_process_semantic_segmentation(outputs, [(8, 8)])
