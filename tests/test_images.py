"""Images of any source: their splits, labels, subsets and hash, and what becomes of damaged ones."""

import hashlib
import io
import pickle
import warnings

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDatasetDict, Value
from datasets import Image as ImageFeature
from PIL import Image
from torch.utils.data import DataLoader

from ddae_hf import DDAEImageProcessor
from ddae_hf.experiments.draws import augment_view
from ddae_hf.experiments.image_set import DamagedImageError, Pixels
from ddae_hf.experiments.images import DataOptions, ImageInputs, Images, ImageSet, labelled_splits, noise_view

from .conftest import put, splits_of

NAMES = ["cat", "dog", "emu"]
COUNTS = {"train": 12, "test": 6}


def picture(number):
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8 + number % 2, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def pictures(split):
    return [picture(1000 * (split == "test") + i) for i in range(COUNTS[split])]


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def data_sets():
    """Data sets of files, whose labels are 0, 1, 2, 0, ..."""
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=NAMES)})
    return {
        split: Dataset.from_dict(
            {"image": [{"bytes": png(image), "path": None} for image in pictures(split)], "label": numbers(split)},
            features,
        )
        for split in COUNTS
    }


def numbers(split):
    return [i % 3 for i in range(COUNTS[split])]


def names(split):
    return [NAMES[number] for number in numbers(split)]


def folder_of_images(folder):
    for split in COUNTS:
        for i, (image, name) in enumerate(zip(pictures(split), names(split), strict=True)):
            path = folder / split / name / f"{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(image))
    return folder


def folder_of_tables(folder):
    for split, dataset in data_sets().items():
        dataset.to_parquet(folder / f"{split}.parquet")
    return folder


SOURCES = {
    "folder of tables": folder_of_tables,
    "folder of images": folder_of_images,
    "DatasetDict": lambda folder: DatasetDict(data_sets()),
    "mapping of data sets": lambda folder: data_sets(),
    "mapping of lists and labels": lambda folder: {split: (pictures(split), names(split)) for split in COUNTS},
    "data sets in another format": lambda folder: {k: v.with_format("numpy") for k, v in data_sets().items()},
}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_kind_of_source_gives_the_same_images(tmp_path, kind):
    images = Images.open(SOURCES[kind](tmp_path), cache_dir=str(tmp_path / ".cache"))
    assert sorted(images.splits) == ["test", "train"]
    for split, count in COUNTS.items():
        found = images[split]
        assert len(found) == count and found.names == NAMES and found.labels.dtype == np.int64
        order = np.argsort(numbers(split), kind="stable") if kind == "folder of images" else np.arange(count)
        assert found.labels.tolist() == np.array(numbers(split))[order].tolist()
        shown = found.pil(range(count))
        assert all(np.array_equal(a, pictures(split)[i]) for a, i in zip(shown, order, strict=True))
        digest = hashlib.sha256()
        for i in order:
            digest.update(hashlib.sha256(png(pictures(split)[i])).digest())
        assert found.hash == digest.hexdigest() and images[split] is found


def test_one_data_set_a_file_or_a_list_is_the_split_train(tmp_path):
    dataset = data_sets()["train"]
    dataset.to_parquet(tmp_path / "test.parquet")
    from_file = Images.open(tmp_path / "test.parquet", cache_dir=str(tmp_path / ".cache"))
    given = [picture(i) for i in range(12)]
    from_list = Images.open(given, labels=np.array(numbers("train")))
    for images in (from_file, from_list, Images.open(dataset), Images.open(given)):
        assert images.splits == ["train"] and images["train"].hash == Images.open(dataset)["train"].hash
    assert from_list["train"].names == ["0", "1", "2"] and from_list["train"].labels.tolist() == numbers("train")
    assert Images.open(given)["train"].labels is None
    words = Images.open(given, labels=["b", "a"] * 6)["train"]
    assert words.names == ["a", "b"] and words.labels.tolist() == [1, 0] * 6


def test_the_options_that_opened_images_open_them_again_and_say_what_they_are(tmp_path):
    (tmp_path / "birds").mkdir()
    folder = folder_of_tables(tmp_path / "birds")
    cache = str(tmp_path / ".cache")
    images = Images.open(folder, label_column="label", cache_dir=cache)
    assert images.opened_with == {"dataset_name": str(folder), "label_column": "label"}
    again = DataOptions(**images.opened_with).open(cache)
    assert again["train"].hash == images["train"].hash
    facts = {"name": "birds", "train_split": "train", "num_images": 5}
    assert images.facts(images["train"].take(5)) == facts
    assert images.facts(images["train"].take(5), images["test"]) == {**facts, "test_split": "test"}
    assert Images.open(data_sets()).opened_with == {}
    in_memory = Images.open(data_sets())
    assert in_memory.facts(in_memory["test"]) == {"train_split": "test", "num_images": 6}
    put(tmp_path / "photos", "a/0.png", "b/1.png")
    options = DataOptions(train_data_dir=tmp_path / "photos")
    assert options.open().opened_with == {"train_data_dir": str(tmp_path / "photos")}
    stream = options.open(streaming=True)
    assert stream.facts(stream["train"]) == {"name": "photos", "train_split": "train"}
    with pytest.raises(ValueError, match="Give one of dataset_name and train_data_dir"):
        DataOptions().open()


def test_images_of_the_hub_are_known_by_their_id(tmp_path):
    images = Images(data_sets(), None, None, False, {"dataset_name": "someone/birds", "dataset_config_name": "small"})
    facts = images.facts(images["train"])
    assert (facts["name"], facts["id"], facts["config"]) == ("birds", "someone/birds", "small")


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("nowhere/none", {}, "The data set nowhere/none cannot be read: "),
        ([], {}, "The split 'train' is empty"),
        ({}, {}, "The data set has no splits"),
        ([1, 2], {}, "An object of type int came among images: they must be PIL images"),
        (7, {}, "An object of type int came among images"),
        (None, {}, "An object of type NoneType came as images: give a path, a data set, a list of images, a pair"),
        ((picture(0),) * 10, {}, r"An object of type tuple came as images: .* a pair \(images, labels\)"),
        ((picture(0), picture(1)), {}, "An object of type Image came as labels: give a path"),
        ([picture(0)] * 2, {"labels": [1]}, "There are 2 images and 1 labels"),
        ("x", {"labels": [1]}, "labels are for a list of images"),
        ([picture(0)], {"streaming": True}, "streaming and config_name are for data that is not in memory"),
        (data_sets(), {"label_column": "kind"}, "There is no column of labels 'kind'"),
        (data_sets(), {"image_column": "label"}, "There is no column of images 'label'"),
        (Dataset.from_dict({"x": [1]}), {}, r"Name the column of images, image_column; columns are \['x'\]"),
    ],
)
def test_what_cannot_be_opened_is_refused_in_words(tmp_path, source, options, message):
    with pytest.raises(ValueError, match=message):
        _ = Images.open(source, cache_dir=str(tmp_path), **options)["train"]
    with pytest.raises(ValueError, match=r"The data set has no split 'val'; it has \['test', 'train'\]"):
        _ = Images.open(data_sets())["val"]


def test_a_part_has_the_labels_and_the_hash_of_its_images():
    whole = Images.open(data_sets())["train"]
    some = whole.take(7)
    assert len(some) == 7 and set(some.labels) == {0, 1, 2} and some.names == NAMES
    assert whole.take(None) is whole and whole.take(12) is whole and whole.take(99) is whole
    rows = [next(i for i in range(12) if np.array_equal(image, picture(i))) for image in some.pil(range(7))]
    assert rows == sorted(rows) and whole.select(rows).hash == some.hash != whole.hash
    assert whole.labels[rows].tolist() == some.labels.tolist()
    assert some.select([3, 0]).labels.tolist() == [some.labels[3], some.labels[0]]
    with pytest.raises(ValueError, match="0 images of the split 'train' are asked for: it must be at least 1"):
        whole.take(0)


def test_training_and_test_images_are_others_and_of_several_classes():
    images = Images.open(data_sets())
    train, test = labelled_splits(images, splits_of(max_train_samples=6, max_test_samples=3))
    assert (len(train), len(test), train.split, test.split) == (6, 3, "train", "test")
    with pytest.raises(ValueError, match="test_split is 'train', like train_split"):
        labelled_splits(images, splits_of(test_split="train"))
    same = data_sets()["train"]
    with pytest.raises(ValueError, match="The splits 'train' and 'test' are the same images"):
        labelled_splits(Images.open({"train": same, "test": same}), splits_of(max_test_samples=3))
    with pytest.raises(ValueError, match="The training images are all of one class"):
        labelled_splits(Images.open({"train": same.select([0, 3]), "test": same}), splits_of())
    with pytest.raises(ValueError, match="does not say of which classes its images are"):
        labelled_splits(Images.open({split: pictures(split) for split in COUNTS}), splits_of())
    with pytest.warns(UserWarning, match="The split 'test' has no images of 2 of the 3 classes: dog, emu"):
        labelled_splits(images, splits_of(max_test_samples=1))


def test_inputs_are_the_processors_pixels_and_later_views_are_changed():
    images = Images.open(data_sets())["train"]
    processor = DDAEImageProcessor(size={"height": 8, "width": 8})
    inputs = ImageInputs(images, processor, flip=True, crop_padding=2, seed=3)
    plain = processor([picture(i) for i in range(12)], return_tensors="pt")["pixel_values"]
    assert len(inputs) == 12 and inputs.names == NAMES and inputs.labels is images.labels
    assert inputs.identity == {"images": images.hash, "preprocessing": processor.to_dict()}
    assert torch.equal(inputs.read([4, 1]), plain[[4, 1]])
    assert torch.equal(inputs.read([4, 1], 1), augment_view(plain[[4, 1]], [4, 1], 3, 1, True, 2))
    assert torch.equal(inputs.read([4, 1], 2, [0, 1]), augment_view(plain[[4, 1]], [0, 1], 3, 2, True, 2))
    rows = np.array([5, 2, 7, 9])
    for view in (0, 1):
        expected = augment_view(plain[rows], range(4), 3, 1, True, 2) if view else plain[rows]
        assert torch.equal(torch.cat(list(inputs.batches(3, rows, view=view))), expected)
        assert torch.equal(torch.cat(list(inputs.batches(3, rows, view=view, start=1))), expected[1:])
    assert len({noise_view(test, view) for test in (False, True) for view in range(3)}) == 6


# Streams


def streams():
    return IterableDatasetDict({split: dataset.to_iterable_dataset(3) for split, dataset in data_sets().items()})


def test_a_stream_gives_images_and_labels_row_by_row(tmp_path):
    for images in (Images.open(streams()), Images.open(folder_of_tables(tmp_path), streaming=True)):
        stream = images["train"].labelled()
        assert stream.streaming and stream.labels is None and stream.names == NAMES
        rows = list(stream.stream(labels=True))
        assert [row["labels"] for row in rows] == numbers("train")
        assert all(np.array_equal(row["image"], picture(i)) for i, row in enumerate(rows))
        assert [set(row) for row in stream.stream()] == [{"image"}] * 12
        with pytest.warns(UserWarning, match="The first 4 images of the stream 'train' are taken"):
            assert len(list(stream.take(4).stream())) == 4
        for ask, argument in ((getattr, "hash"), (ImageSet.pil, [0]), (ImageSet.select, [0])):
            with pytest.raises(ValueError, match="A stream has no .*: leave out streaming"):
                ask(stream, argument)
        with pytest.raises(ValueError, match="A stream knows its labels only row by row"):
            labelled_splits(images, splits_of())


def test_a_shuffled_stream_has_every_image_once_and_another_order_each_epoch():
    shuffled = Images.open(streams())["train"].stream(labels=True, buffer_size=4, seed=1)
    epochs = []
    for epoch in (0, 1, 0):
        shuffled.set_epoch(epoch)
        epochs.append([(png(row["image"]), row["labels"]) for row in shuffled])
    assert epochs[0] == epochs[2] != epochs[1]
    expected = sorted((png(picture(i)), i % 3) for i in range(12))
    assert all(sorted(epoch) == expected for epoch in epochs)


def test_a_stream_whose_labels_are_no_classes_is_refused_where_they_are_needed():
    dataset = data_sets()["train"].cast_column("label", Value("int64")).to_iterable_dataset()
    stream = Images.open(dataset, label_column="label")["train"]
    with pytest.raises(ValueError, match="must name its classes"):
        stream.labelled()
    assert len(list(stream.stream())) == 12
    wrong = data_sets()["train"].remove_columns("label").add_column("label", [0] * 11 + [-1])
    wrong = wrong.cast_column("label", ClassLabel(names=NAMES)).to_iterable_dataset()
    with pytest.raises(ValueError, match="An image has the label -1: allowed are 0 to 2"):
        list(Images.open(wrong)["train"].stream(labels=True))


# Damaged images

DAMAGES = {"truncated": png(picture(2))[:80], "HTML": b"<html>404</html>", "nothing": None}
REASONS = {"truncated": ".*truncated", "HTML": "cannot identify", "nothing": "there is none"}


def damaged(damage, count=8, bad=(2, 5)):
    """A data set of images of which some are damaged; labels are the images' numbers."""
    files = [{"bytes": DAMAGES[damage] if i in bad else png(picture(i)), "path": None} for i in range(count)]
    files = [None if file["bytes"] is None else file for file in files]
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=[str(i) for i in range(count)])})
    return Dataset.from_dict({"image": files, "label": list(range(count))}, features)


class Rows(torch.utils.data.Dataset):
    """Images as a loader reads them."""

    def __init__(self, images):
        self.pixels = Pixels(images, DDAEImageProcessor(size={"height": 8, "width": 8}), keep=False)

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, row):
        return self.pixels.read([row])[0]


@pytest.mark.parametrize(("damage", "workers"), [*((damage, 0) for damage in DAMAGES), ("truncated", 1)])
def test_a_damaged_image_is_named_in_workers_too(damage, workers):
    images = Images.open(damaged(damage))["train"]
    said = rf"^Image 5 \(from 0\) of the split 'train'.* cannot be read: {REASONS[damage]}.*skip_bad_images\.$"
    later = images.select([7, 5])  # which is not the place in this part
    for rows in (later, images.select([6, 7, 5, 2])):
        with pytest.raises(DamagedImageError, match=said):
            list(DataLoader(Rows(rows), num_workers=workers))
    with pytest.raises(ValueError, match=said):
        later.pil([1])
    if damage == "nothing":
        with pytest.raises(ValueError, match=said):
            _ = later.hash


@pytest.mark.parametrize(("damage", "workers"), [*((damage, 0) for damage in DAMAGES), ("truncated", 1)])
def test_a_damaged_image_of_a_stream_is_named_in_workers_too(tmp_path, damage, workers):
    stream = Images.open(damaged(damage).to_iterable_dataset())["train"].stream(buffer_size=3)
    said = rf"^An image of the stream 'train'.* cannot be read: {REASONS[damage]}.*skip_bad_images\.$"
    with pytest.raises(DamagedImageError, match=said):
        list(DataLoader(stream, num_workers=workers, collate_fn=list))
    if damage != "nothing":
        put(tmp_path, "a/0.png", "a/1.png")
        (tmp_path / "a" / "1.png").write_bytes(DAMAGES[damage])
        stream = Images.open(tmp_path, streaming=True)["train"].stream()
        with pytest.raises(DamagedImageError, match=r"^The image .*a/1\.png cannot be read"):
            list(DataLoader(stream, num_workers=workers, collate_fn=list))


def test_the_first_image_is_read_when_a_split_is_opened(tmp_path):
    bad = damaged("HTML", bad=(0,))
    for source in (bad, bad.to_iterable_dataset()):
        images = Images.open(source)
        for _ in range(2):
            with pytest.raises(DamagedImageError, match="cannot be read: cannot identify"):
                _ = images["train"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_images_are_left_out_and_counted(damage):
    with pytest.warns(UserWarning, match=r"2 of 8 images of the split 'train' are left out: Image 2 \(from 0\)"):
        images = Images.open(damaged(damage), skip_bad_images=True)
        found = images["train"]
    left = [0, 1, 3, 4, 6, 7]
    assert len(found) == 6 and found.labels.tolist() == left
    assert found.hash == Images.open(damaged(damage))["train"].select(left).hash
    assert all(np.array_equal(image, picture(i)) for image, i in zip(found.pil(range(6)), left, strict=True))
    assert images.facts(found.take(3))["skipped_images"] == 2 and images.facts(found)["num_images"] == 6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = Images.open(data_sets(), skip_bad_images=True)
        assert "skipped_images" not in whole.facts(whole["train"])
        assert whole["train"].hash == Images.open(data_sets())["train"].hash
    with pytest.raises(ValueError, match="8 of 8 images of the split 'train' cannot be read"):
        _ = Images.open(damaged(damage, bad=range(8)), skip_bad_images=True)["train"]


@pytest.mark.parametrize(("damage", "workers"), [*((damage, 0) for damage in DAMAGES), ("truncated", 2)])
@pytest.mark.filterwarnings("ignore:Left out of the stream", "ignore:The first 3 images of the stream")
def test_damaged_images_of_a_stream_are_left_out_and_counted(damage, workers):
    images = Images.open(damaged(damage).to_iterable_dataset(2), skip_bad_images=True)
    stream = images["train"]
    loader = DataLoader(stream.stream(labels=True, buffer_size=3), num_workers=workers, collate_fn=list)
    assert sorted(row["labels"] for rows in loader for row in rows) == [0, 1, 3, 4, 6, 7]
    assert images.facts(stream)["skipped_images"] == 2
    assert [row["labels"] for row in stream.take(3).stream(labels=True)] == [0, 1, 3]


def test_images_travel_to_other_processes_without_their_pixels():
    images = Images.open(data_sets())["train"]
    inputs = ImageInputs(images, DDAEImageProcessor(size={"height": 64, "width": 64}))
    inputs.read(range(12))
    assert len(pickle.dumps(images)) < 12 * 3 * 64**2
    assert isinstance(images, ImageSet) and pickle.loads(pickle.dumps(images)).hash == images.hash
