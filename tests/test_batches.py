"""Batches to train on: integers that become the processor's images, in orders that neither workers nor stops change."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from ddae_hf import DDAEImageProcessor
from ddae_hf.experiments.batches import BatchSizes, image_batches
from ddae_hf.experiments.devices import fast_layout
from ddae_hf.experiments.image_set import DamagedImageError
from ddae_hf.experiments.images import DataOptions, Images
from ddae_hf.experiments.pretraining import PretrainingOptions, pretrain, training_inputs
from ddae_hf.experiments.run_folder import Progress
from ddae_hf.experiments.training import Loop

from .conftest import TINY, make_unet, put
from .test_image_set import COUNT, SIDE, pictures

SIZES = BatchSizes(total=4, per_device=4, accumulation=1, processes=1)


def images():
    return Images.open(pictures(), labels=[i % 3 for i in range(COUNT)])["train"]


def loader(workers=0, labels=True):
    options = SimpleNamespace(seed=0, dataloader_num_workers=workers, sizes=SIZES)
    return image_batches(images(), DDAEImageProcessor.for_denoiser(make_unet().config), options, labels)


def epochs(workers=0, count=3, start=None):
    """The batches of some epochs as training takes them: pixels as they travel, what the network gets, and labels."""
    options, network = PretrainingOptions(class_conditional=True), make_unet(num_class_embeds=4)
    optimizer = torch.optim.SGD(network.parameters())
    loop = Loop(Accelerator(cpu=True), network, optimizer, loader(workers), total_steps=1, seed=0)
    loop.progress = progress = start or Progress()
    for batch in loop.batches():
        clean, _ = training_inputs(options, batch, network, loop.draws(len(batch["labels"])))
        yield batch["pixel_values"], clean, batch["labels"]
        progress.count(len(clean), loop.accelerator.gradient_state.end_of_dataloader)
        if progress.epoch == count:
            return


def test_batches_travel_as_integers_and_are_the_processors_images_with_their_labels():
    expected = DDAEImageProcessor(size={"height": SIDE, "width": SIDE})(pictures(), return_tensors="pt")["pixel_values"]
    orders = [[]]
    for travelling, clean, labels in epochs():
        assert travelling.dtype == torch.uint8 and clean.is_contiguous(memory_format=fast_layout(clean.device))
        if len(orders[-1]) == COUNT:
            orders.append([])
        for image, label in zip(clean, labels.tolist(), strict=True):
            (found,) = (i for i in range(COUNT) if torch.equal(image, expected[i]))
            assert label == found % 3
            orders[-1].append(found)
    assert all(sorted(order) == list(range(COUNT)) for order in orders) and len(set(map(tuple, orders))) == 3


def test_workers_and_a_resumed_run_give_the_same_batches():
    alone = list(epochs())
    later = Progress(epoch=1, batch=2, batches=5)
    assert [loader(workers).collate_fn.args[0].keep for workers in (0, 1)] == [True, False]
    for others, wanted in ((epochs(1, 2), alone[:6]), (epochs(0, 3, later), alone[5:])):
        for found, expected in zip(others, wanted, strict=True):
            assert found[0].dtype == torch.uint8
            assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_a_batch_has_labels_only_where_there_are_classes():
    assert set(next(iter(loader(labels=False)))) == {"pixel_values"}
    assert loader().collate_fn([5, 1])["labels"].tolist() == [2, 1]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_named_among_others(tmp_path, workers):
    for i in range(4):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 32), dtype=np.uint8)).save(tmp_path / f"{i}.jpg")
    cut = tmp_path / "2.jpg"
    cut.write_bytes(cut.read_bytes()[:400])  # Pillow opens it, and does not say which file ends too soon
    options = SimpleNamespace(seed=0, dataloader_num_workers=workers, sizes=SIZES)
    processor = DDAEImageProcessor.for_denoiser(make_unet().config)
    batches = image_batches(Images.open(tmp_path)["train"], processor, options)
    with pytest.raises(DamagedImageError, match=r"^The image .*2\.jpg cannot be read: .*truncated.*skip_bad_images\.$"):
        next(iter(batches))


@pytest.mark.parametrize(("streaming", "workers"), [(False, 0), (True, 0), (True, 1)])
@pytest.mark.filterwarnings("ignore:1 of 8 images", "ignore:Left out of the stream")
def test_damaged_images_are_left_out_of_a_training_and_counted_in_its_report(tmp_path, streaming, workers):
    put(tmp_path, *(f"train/{i}.png" for i in range(8)))
    (tmp_path / "train" / "5.png").write_text("<html>")
    images = DataOptions(train_data_dir=tmp_path, skip_bad_images=True).open(streaming=streaming)
    trained = pretrain(
        images,
        denoiser={name: list(value) if isinstance(value, tuple) else value for name, value in TINY.items()},
        resolution=8,
        train_batch_size=2,
        max_train_steps=2,
        sample_steps=0,
        mixed_precision="no",
        dataloader_num_workers=workers,
    )
    assert trained.steps == 2 and trained.dataset["skipped_images"] == 1
    assert trained.dataset.get("num_images") == (None if streaming else 7)
