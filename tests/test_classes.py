"""Which classes a data set has, which labels stand for none, and images drawn of all of them."""

import math

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from ddae_hf.experiments.classes import Classes, draw_images
from ddae_hf.experiments.images import DataOptions, Images, labelled_splits

from .conftest import put, splits_of

# Drawing


def largest_remainders(sizes, count):
    """Hamilton's method, which is another than the one in use: both are right where shares are whole numbers."""
    shares = [count * size / sum(sizes) for size in sizes]
    seats = [math.floor(share) for share in shares]
    for i in sorted(range(len(sizes)), key=lambda i: seats[i] - shares[i])[: count - sum(seats)]:
        seats[i] += 1
    return seats


@pytest.mark.parametrize("sizes", [[50] * 10, [300, 100, 20], [997, 3, 40, 1], [1] * 30])
def test_a_draw_has_every_class_in_its_share_and_lies_in_larger_ones(sizes):
    labels = np.random.default_rng(5).permutation(np.repeat(np.arange(len(sizes)), sizes))
    before: set[int] = set()
    for count in range(1, len(labels) + 1, 1 + len(labels) // 100):
        drawn = draw_images(labels, count)
        assert len(drawn) == count and (np.diff(drawn) > 0).all()
        assert before <= set(drawn.tolist())
        before = set(drawn.tolist())
        found = np.bincount(labels[drawn], minlength=len(sizes))
        if count >= len(sizes):
            assert found.min() >= 1
            forced = sum(share < 1 for share in (count * size / len(labels) for size in sizes))
            assert np.abs(found - largest_remainders(sizes, count)).max() <= 1 + forced
        else:
            assert found.max() == 1
    whole = 42 if sizes == [300, 100, 20] else len(sizes) * 5
    if sizes in ([300, 100, 20], [50] * 10):
        expected = largest_remainders(sizes, whole)
        assert np.bincount(labels[draw_images(labels, whole)]).tolist() == expected
    assert draw_images(labels, len(labels) + 5).tolist() == list(range(len(labels)))


def test_a_draw_depends_on_which_images_are_alike_alone():
    labels = np.random.default_rng(0).integers(0, 5, 200)
    drawn = draw_images(labels, 37)
    names = [["zebra", None, "cat", "7", "a"][label] for label in labels]
    assert np.array_equal(draw_images(names, 37), drawn) and np.array_equal(draw_images(4 - labels, 37), drawn)
    assert not np.array_equal(draw_images(labels, 37, seed=1), drawn)
    plain = [draw_images(10_000, 1000, seed) for seed in range(2)]
    assert all(abs(rows.mean() - 5000) < 400 for rows in plain) and not np.array_equal(*plain)
    assert np.array_equal(draw_images([0] * 10_000, 1000), plain[0])


# Classes


def labelled(folder, **options):
    return labelled_splits(DataOptions(train_data_dir=folder).open(), splits_of(**options))


def test_classes_that_a_split_lacks_are_named(tmp_path):
    put(tmp_path, *(f"train/{i:02d}/0.png" for i in range(13)), "train/99/0.png", "test/99/0.png", "test/zoo/0.png")
    with pytest.warns(UserWarning) as told:
        found = labelled(tmp_path)[0]
    text = [str(warning.message) for warning in told]
    ten = ", ".join(f"{i:02d}" for i in range(10))
    assert text == [
        "The split 'train' has no images of 1 of the 15 classes: zoo.",
        f"The split 'test' has no images of 13 of the 15 classes: {ten} and 3 more.",
    ]
    assert len(found.names) == 15
    with pytest.warns(UserWarning, match="The split 'train' has no images of 12 of the 15 classes"):
        labelled(tmp_path, max_train_samples=3)


def tables(tmp_path, kind=None, **labels):
    """Write splits whose images have these labels, of that type; return them as they are read."""
    features = Features({"image": ImageFeature(), "kind": kind or Value("int64")})
    for name, values in labels.items():
        pictures = [Image.fromarray(np.full((8, 8), i, np.uint8)) for i in range(len(values))]
        Dataset.from_dict({"image": pictures, "kind": values}, features).to_parquet(tmp_path / f"{name}.parquet")
    return Images.open(tmp_path, label_column="kind", cache_dir=str(tmp_path / ".cache"))


@pytest.mark.parametrize(
    ("kind", "train", "test", "names"),
    [
        (Value("int64"), [900000, 0, 100000, 0], [100000, 0], ["0", "100000", "900000"]),
        (Value("uint8"), [1, 10, 2], [10, 3], ["1", "2", "3", "10"]),
        (Value("string"), ["b", "a, c", "b"], ["a, c", "b"], ["a, c", "b"]),
        (ClassLabel(names=["x", "y", "z"]), [2, 0, 2], [0, 1], ["x", "y", "z"]),
    ],
)
@pytest.mark.filterwarnings("ignore:The split")
def test_classes_are_the_labels_that_there_are_however_far_apart(tmp_path, kind, train, test, names):
    images = tables(tmp_path, kind, train=train, test=test)
    found = dict(zip(("train", "test"), labelled_splits(images, splits_of()), strict=True))
    spoken = {name: [kind.names[v] if isinstance(kind, ClassLabel) else str(v) for v in values]
              for name, values in {"train": train, "test": test}.items()}  # fmt: skip
    for name, words in spoken.items():
        assert found[name].names == names and found[name].labels.dtype == np.int64
        assert [names[label] for label in found[name].labels] == words


@pytest.mark.parametrize(
    ("kind", "labels", "message"),
    [
        (Value("int64"), [0, -1, 3], "Labels of the split 'train' are -1 to 3: allowed are 0 and more"),
        (ClassLabel(names=["a", "b"]), [0, -1, 1], "Labels of the split 'train' are -1 to 1: allowed are 0 to 1"),
        (Value("string"), ["a", None, "b"], "Some images have no label"),
        (Value("float32"), [0.0, 1.0], "There is no column of labels 'kind' with whole numbers or names"),
    ],
)
def test_labels_that_stand_for_none_are_refused(tmp_path, kind, labels, message):
    with pytest.raises(ValueError, match=message):
        tables(tmp_path, kind, train=labels, test=labels)["train"].labelled()


@pytest.mark.parametrize("kind", [ClassLabel(names=["a", "b"]), Value("int64"), Value("string")])
def test_a_test_split_without_labels_hinders_no_training(tmp_path, kind):
    """Published test sets have -1, or nothing, in their column of labels."""
    train, test = (["b", "a", "b"], [None] * 3) if kind == Value("string") else ([1, 0, 1], [-1] * 3)
    images = tables(tmp_path, kind, train=train, test=test)
    found = images["train"].labelled()
    assert found.labels.tolist() == [1, 0, 1] and len(found.names) == 2 and len(images["test"].take(2)) == 2
    with pytest.raises(ValueError, match="the split 'test'|of 'test'"):
        images["test"].labelled()


def test_splits_without_the_column_or_with_other_classes_are_refused(tmp_path):
    put(tmp_path, "train/a/0.png", "train/b/0.png", "test/0.png")
    with pytest.raises(ValueError, match=r"The split 'test' has no column 'label' of labels; it has \['image'\]"):
        labelled(tmp_path)
    images = DataOptions(train_data_dir=tmp_path).open()
    assert images["test"].labels is None and images["train"].labelled().names == ["a", "b"]
    one, two = (Dataset.from_dict({"x": [0]}, Features({"x": ClassLabel(names=names)})) for names in ("ab", "ba"))
    with pytest.raises(ValueError, match="is not the same in all splits"):
        _ = Classes({"train": one, "test": two}, "x").names


def test_two_classes_of_one_name_are_refused(tmp_path):
    """No configuration could tell them apart: it has the number of each name."""
    tables(tmp_path, ClassLabel(names=["crane", "other"]), train=[0, 1], test=[0, 1])
    for name in ("train", "test"):
        table = pq.read_table(tmp_path / f"{name}.parquet")
        said = table.schema.metadata[b"huggingface"].replace(b"other", b"crane")
        pq.write_table(table.replace_schema_metadata({b"huggingface": said}), tmp_path / f"{name}.parquet")
    with pytest.raises(ValueError, match="Some label names are duplicated"):
        Images.open(tmp_path, cache_dir=str(tmp_path / "fresh"))
