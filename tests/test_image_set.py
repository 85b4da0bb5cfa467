"""Pixels of a split's images: the processor's numbers, decoded once where they fit."""

from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

from ddae_hf import DDAEImageProcessor
from ddae_hf.experiments.image_set import ImageSet, Pixels, scaled
from ddae_hf.experiments.images import ImageInputs, Images

COUNT, SIDE = 12, 8


def pictures(bits=8):
    """Grey or coloured images of several sizes."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(COUNT):
        shape = (SIDE + i % 3, SIDE)
        if bits == 16:
            made.append(Image.fromarray(rng.integers(0, 65536, shape, dtype=np.uint16)))
        else:
            made.append(Image.fromarray(rng.integers(0, 256, (*shape, 3) if i % 2 else shape, dtype=np.uint8)))
    return made


def data_set(images):
    return Images.open(images)["train"]


class Counted:
    """Pixels of images, and how many of these were decoded."""

    def __init__(self, images, keep=True):
        self.decoded, self.images = 0, images
        self.processor = DDAEImageProcessor(size={"height": SIDE, "width": SIDE}, num_channels=3)
        self.pixels = Pixels(self, self.processor, keep)

    def __len__(self):
        return len(self.images)

    def pil(self, rows):
        self.decoded += len(rows)
        return [self.images[row].copy() for row in rows]

    def check(self, indices):
        """Read and compare with what the processor makes of the images alone."""
        found = scaled(self.pixels.read(indices), self.processor)
        expected = self.processor([self.images[i] for i in indices], return_tensors="pt")["pixel_values"]
        assert found.dtype == torch.float32 and torch.equal(found, expected)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"image_mean": [0.3, 0.4, 0.7], "image_std": [0.2, 0.21, 0.9]},
        {"image_mean": 0.123, "image_std": 0.377, "rescale_factor": 1 / 127.5},
        {"do_normalize": False},
        {"data_format": "channels_first"},
        {"do_rescale": False, "do_normalize": False},
        {"num_channels": 1},
    ],
)
def test_scaled_pixels_are_the_processors_to_the_bit(options):
    processor = DDAEImageProcessor(**{"size": {"height": SIDE, "width": SIDE}, "num_channels": 3} | options)
    images = pictures()
    counts = Pixels(data_set(images), processor).read(range(COUNT))
    found, expected = scaled(counts, processor), processor(images, return_tensors="pt")["pixel_values"]
    assert counts.dtype == torch.uint8 and found.dtype == expected.dtype and torch.equal(found, expected)
    floats = torch.rand(2, 3, SIDE, SIDE)
    assert scaled(floats, processor) is floats


def test_a_processor_that_does_not_rescale_takes_no_files():
    """Their pixels are integers; with `do_normalize` they would end far outside [-1, 1]."""
    with pytest.raises(ValueError, match="do_rescale=False"):
        Pixels(data_set(pictures()), DDAEImageProcessor(do_rescale=False))


def test_pixels_are_channels_first_whatever_the_processor_gives():
    last = DDAEImageProcessor(size=SIDE, data_format="channels_last", image_mean=[0.3, 0.4, 0.7])
    found = scaled(Pixels(data_set(pictures()), last).read(range(COUNT)), last)
    assert torch.equal(found, last(pictures(), data_format="channels_first", return_tensors="pt")["pixel_values"])


def test_every_image_is_decoded_once_and_when_it_is_asked_for():
    counted = Counted(pictures())
    assert counted.decoded == 0
    counted.check([7, 2, 5])
    assert counted.decoded == 3
    counted.check(np.array([2, 0, 7, 7]))
    assert counted.decoded == 4
    for _ in range(2):
        counted.check(range(COUNT))
    assert counted.decoded == COUNT


def test_images_are_kept_only_where_they_fit_and_that_is_wanted(monkeypatch):
    """All of them must fit into a quarter of the memory that is left, shared among the machine's processes."""
    needed = COUNT * 3 * SIDE * SIDE

    def decoded_in_two_passes(available, processes=1, **options):
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        counted = Counted(pictures(), **options)
        for _ in range(2):
            counted.check(range(0, 6))
            counted.check(range(6, COUNT))
        return counted.decoded

    assert decoded_in_two_passes(4 * needed) == COUNT
    assert decoded_in_two_passes(4 * needed - 1) == 2 * COUNT
    assert decoded_in_two_passes(8 * needed, processes=2) == COUNT
    assert decoded_in_two_passes(8 * needed - 1, processes=2) == 2 * COUNT
    assert decoded_in_two_passes(4 * needed, keep=False) == 2 * COUNT


def test_images_of_more_bits_are_floats_alone_and_among_others():
    deep = Counted(pictures(16))
    deep.check(range(COUNT))
    deep.check(range(COUNT))
    assert deep.pixels.read([0]).dtype == torch.float32 and deep.decoded == 2 * COUNT + 1
    mixed = Counted(pictures()[:6] + pictures(16)[6:])
    for indices in ([0, 1, 2], [1, 2, 8], [8, 9], [0, 1], [2, 7]):
        mixed.check(indices)


def test_images_that_are_not_resized_are_read_by_those_of_one_size():
    """Kept pixels have one shape: where it turns out not to be that of all, none are kept."""
    images = pictures()
    processor = DDAEImageProcessor(do_resize=False, do_center_crop=False, num_channels=3)
    read = Pixels(data_set(images), processor).read
    for indices in ([0, 3], [1, 4], [0, 3, 6]):
        expected = processor([images[i] for i in indices], return_tensors="pt")["pixel_values"]
        assert torch.equal(scaled(read(indices), processor), expected)


def test_a_split_is_decoded_in_its_first_pass_alone(tmp_path):
    """Its files are gone in the second."""
    for i, image in enumerate(pictures()):
        image.save(tmp_path / f"{i}.png")
    names = [str(tmp_path / f"{i}.png") for i in range(COUNT)]
    dataset = Dataset.from_dict({"image": names}).cast_column("image", ImageFeature())
    processor = DDAEImageProcessor(size={"height": SIDE, "width": SIDE})
    images = ImageInputs(ImageSet(dataset), processor)
    expected = processor(pictures(), return_tensors="pt")["pixel_values"]
    for _ in range(2):
        assert torch.equal(torch.cat(list(images.batches(5))), expected)
        for name in names:
            (tmp_path / name).unlink(missing_ok=True)
