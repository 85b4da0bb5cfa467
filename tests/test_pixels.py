"""Pixels of images: the processor's numbers, decoded once where they fit."""

import argparse

import dill
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

import pretrain
from data import ImageBatches, training_batches, training_inputs
from ddae_hf import DDAEImageProcessor
from ddae_hf.experiments import pixels
from ddae_hf.experiments.devices import fast_layout
from ddae_hf.experiments.pixels import Pixels, read_images, scaled
from labelled import Images, LabelledImages
from training_run import Progress

from .conftest import make_unet

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
    labels = [i % 3 for i in range(len(images))]
    features = Features({"image": ImageFeature(), "labels": ClassLabel(names=["a", "b", "c"])})
    return Dataset.from_dict({"image": images, "labels": labels}, features)


class Counted:
    """Pixels of images, and how many of these were decoded."""

    def __init__(self, images, keep=True):
        self.decoded, plain = 0, data_set(images)
        self.processor = DDAEImageProcessor(size={"height": SIDE, "width": SIDE}, num_channels=3)

        def decode(batch):
            self.decoded += len(batch["image"])
            return {"image": [image.copy() for image in plain[batch["image"]]["image"]]}

        rows = Dataset.from_dict({"image": list(range(len(images)))}).with_transform(decode)
        self.images, self.pixels = images, Pixels(rows, "image", self.processor, keep)

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
    counts = Pixels(data_set(images), "image", processor).read(range(COUNT))
    found, expected = scaled(counts, processor), processor(images, return_tensors="pt")["pixel_values"]
    assert counts.dtype == torch.uint8 and found.dtype == expected.dtype and torch.equal(found, expected)
    floats = torch.rand(2, 3, SIDE, SIDE)
    assert scaled(floats, processor) is floats


def test_a_processor_that_does_not_rescale_takes_no_files():
    """Their pixels are integers; with `do_normalize` they would end far outside [-1, 1]."""
    with pytest.raises(ValueError, match="do_rescale=False"):
        Pixels(data_set(pictures()), "image", DDAEImageProcessor(do_rescale=False))


def test_pixels_are_channels_first_whatever_the_processor_gives():
    last = DDAEImageProcessor(size=SIDE, data_format="channels_last", image_mean=[0.3, 0.4, 0.7])
    found = scaled(Pixels(data_set(pictures()), "image", last).read(range(COUNT)), last)
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
        monkeypatch.setattr(pixels, "available_memory", lambda: available)
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


def test_the_memory_that_is_left_is_the_systems_own_figure():
    assert 2**20 < pixels.available_memory() < 2**50


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
    read = Pixels(data_set(images), "image", processor).read
    for indices in ([0, 3], [1, 4], [0, 3, 6]):
        expected = processor([images[i] for i in indices], return_tensors="pt")["pixel_values"]
        assert torch.equal(scaled(read(indices), processor), expected)


def options_of_training(**options):
    given = ["--dataset_name", "x", "--train_batch_size", "4", "--mixed_precision", "no"]
    for name, value in options.items():
        given += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return pretrain.parse_arguments(given)


def epochs(args, count=3, start=None):
    """The batches of some epochs as training takes them: pixels as they travel, what the network gets, and labels."""
    progress, accelerator = start or Progress(), pretrain.make_accelerator(args)
    network = make_unet(num_class_embeds=4)
    dataloader = accelerator.prepare(training_batches(args, data_set(pictures()), network, 3))
    for batch in pretrain.batches_from(accelerator, dataloader, progress):
        clean, labels = training_inputs(args, batch, network)
        yield batch["pixel_values"], clean, batch["labels"]
        progress.count(len(clean), accelerator.gradient_state.end_of_dataloader)
        if progress.epoch == count:
            return


def test_batches_travel_as_integers_and_are_the_processors_images_with_their_labels():
    args = options_of_training(class_conditional=True)
    expected = DDAEImageProcessor(size={"height": SIDE, "width": SIDE})(pictures(), return_tensors="pt")["pixel_values"]
    orders = [[]]
    for travelling, clean, labels in epochs(args):
        assert travelling.dtype == torch.uint8 and clean.is_contiguous(memory_format=fast_layout(clean.device))
        if len(orders[-1]) == COUNT:
            orders.append([])
        for image, label in zip(clean, labels.tolist(), strict=True):
            (found,) = (i for i in range(COUNT) if torch.equal(image, expected[i]))
            assert label == found % 3
            orders[-1].append(found)
    assert all(sorted(order) == list(range(COUNT)) for order in orders) and len(set(map(tuple, orders))) == 3


def test_workers_and_a_resumed_run_give_the_same_batches():
    args = options_of_training(class_conditional=True)
    alone = list(epochs(args))
    workers = options_of_training(class_conditional=True, dataloader_num_workers=1)
    later = Progress(epoch=1, batch=2, batches=5)
    kept = [
        training_batches(each, data_set(pictures()), make_unet(), 3).dataset.pixels.keep for each in (args, workers)
    ]
    assert kept == [True, False]
    for others, wanted in ((epochs(workers, 2), alone[:6]), (epochs(args, 3, later), alone[5:])):
        for found, expected in zip(others, wanted, strict=True):
            assert found[0].dtype == torch.uint8
            assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_a_batch_has_labels_only_where_there_are_classes():
    read = Pixels(data_set(pictures()), "image", DDAEImageProcessor(size={"height": SIDE, "width": SIDE}))
    assert set(ImageBatches(read).__getitems__([1, 2])) == {"pixel_values"}
    assert ImageBatches(read, np.arange(COUNT)).__getitems__([5, 1])["labels"].tolist() == [5, 1]


def test_a_split_is_decoded_in_its_first_pass_alone(tmp_path):
    """Its files are gone in the second."""
    for i, image in enumerate(pictures()):
        image.save(tmp_path / f"{i}.png")
    names = [str(tmp_path / f"{i}.png") for i in range(COUNT)]
    dataset = Dataset.from_dict({"image": names}).cast_column("image", ImageFeature())
    processor = DDAEImageProcessor(size={"height": SIDE, "width": SIDE})
    images = Images({"train": dataset}, "image", processor, batch_size=5)
    expected = processor(pictures(), return_tensors="pt")["pixel_values"]
    for _ in range(2):
        assert torch.equal(torch.cat(list(images.batches("train", np.arange(COUNT), "images"))), expected)
        for name in names:
            (tmp_path / name).unlink(missing_ok=True)


def test_a_data_set_of_images_does_not_carry_their_pixels(tmp_path):
    """datasets pickles transforms, and what they hold with them."""
    data_set(pictures()).to_parquet(tmp_path / "train.parquet")
    data_set(pictures()[::-1]).to_parquet(tmp_path / "test.parquet")
    args = argparse.Namespace(dataset_name=str(tmp_path), dataset_config_name=None, train_data_dir=None)
    args.cache_dir, args.train_split, args.test_split = str(tmp_path / "cache"), "train", "test"
    args.image_column = args.label_column = args.max_train_samples = args.max_test_samples = None
    args.batch_size, side = 4, 64
    data = LabelledImages(args, DDAEImageProcessor(size={"height": side, "width": side}))
    data.pixel_values("train", np.arange(COUNT))
    transform = data.dataset("train").format["format_kwargs"]["transform"]
    assert len(dill.dumps(transform, recurse=True)) < COUNT * 3 * side**2
    assert torch.equal(data.dataset("test")[:]["pixel_values"], data.pixel_values("test", np.arange(COUNT)))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_named_among_others(tmp_path, workers):
    files = [tmp_path / f"{i}.jpg" for i in range(4)]
    for file in files:
        Image.effect_noise((32, 32), 50).save(file)
    files[2].write_bytes(files[2].read_bytes()[:400])  # Pillow opens it, and does not say which file ends too soon
    images = Dataset.from_dict({"image": [str(file) for file in files]}).cast_column("image", ImageFeature())
    options = argparse.Namespace(
        center_crop=True, train_batch_size=4, dataloader_num_workers=workers, seed=0, shuffle_buffer=1
    )
    batches = training_batches(options, images, make_unet(), 0)
    with pytest.raises(OSError if workers else SystemExit, match=r"2\.jpg cannot be read: .*truncated.*leave it out"):
        next(iter(batches))


def test_an_image_of_a_table_that_cannot_be_read_is_numbered():
    rows = {"image": [{"bytes": b"no image", "path": None}] * 3}
    images = Dataset.from_dict(rows, Features({"image": ImageFeature()}))
    with pytest.raises(SystemExit, match=r"Image 1 \(from 0\) of 'image' cannot be read: cannot identify"):
        read_images(images, [1, 2], "image")
