"""Which images a folder is taken to have, of which splits and classes, and which table is of which split."""

import json
import warnings
from pathlib import Path

import pandas as pd
import pytest
from datasets import Dataset, IterableDataset, load_dataset
from datasets import Image as ImageFeature

from ddae_hf.experiments import data_files
from ddae_hf.experiments.data_files import read_image_folder, read_source
from ddae_hf.experiments.images import DataOptions, Images

from .conftest import put


def read(folder):
    return read_image_folder(str(folder))


def content(splits):
    """By split, each image's path inside the folder of the test, and its class."""
    found = {}
    for name, split in splits.items():
        paths = [Path(image["path"]) for image in split.cast_column("image", ImageFeature(decode=False))["image"]]
        labels = [None] * len(paths)
        if "label" in split.features:
            labels = [split.features["label"].names[label] for label in split["label"]]
        found[name] = [("/".join(path.parts[-2:]), label) for path, label in zip(paths, labels, strict=True)]
    return found


def opened(folder, **options):
    return DataOptions(train_data_dir=folder, **options).open()


ODD = ["train", "bullet train", "test tube", "eval", "testing ground", "dev", "val", "validation", "test", "train.png"]


@pytest.mark.parametrize("odd", ODD)
def test_a_class_of_any_name_keeps_its_images_in_their_split(tmp_path, odd):
    for split, count in (("train", 4), ("test", 2)):
        put(tmp_path, *(f"{split}/{name}/{i}.png" for name in ("cat", odd) for i in range(count)))
    expected = {
        split: [(f"{name}/{i}.png", name) for name in sorted(["cat", odd]) for i in range(count)]
        for split, count in (("train", 4), ("test", 2))
    }
    assert content(read(tmp_path)) == expected


@pytest.mark.parametrize("odd", ["bullet train", "test tube", "eval", "Train", "dev", "val"])
def test_without_folders_of_splits_every_folder_is_a_class(tmp_path, odd):
    put(tmp_path, *(f"{name}/{i}.png" for name in ("cat", "dog", odd) for i in range(3)))
    found = content(read(tmp_path))
    assert found.keys() == {"train"} and len(found["train"]) == 9
    assert {label for _, label in found["train"]} == {"cat", "dog", odd}


def test_a_photo_of_any_name_is_one_of_its_folder(tmp_path):
    put(tmp_path, "train.png", "test.png", "eval_1.png", *(f"{i}.png" for i in range(5)))
    splits = read(tmp_path)
    assert list(splits) == ["train"] and len(splits["train"]) == 8 and list(splits["train"].features) == ["image"]


@pytest.mark.parametrize(
    ("paths", "named"),
    [
        (["cat/0.png", "dog/0.png", "train/0.png"], "has images in train/, .* beside them cat/, dog/"),
        (["train/cat/0.png", "val/cat/0.png"], "has images in train/, .* beside them val/"),
        (["train/cat/0.png", "test/cat/0.png", "cover.png"], "has images in train/, test/, .* beside them cover.png"),
    ],
)
def test_folders_that_may_be_splits_or_classes_are_refused(tmp_path, paths, named):
    put(tmp_path, *paths)
    with pytest.raises(ValueError, match=f"can be read in two ways: it {named}"):
        read(tmp_path)


def test_a_plain_folder_is_read_as_datasets_reads_it(tmp_path):
    """The images, their order, classes and columns, and so all features that are kept from before."""
    names = ["cat", "cat-1", "Dog", "a b"]
    put(tmp_path / "photos", *(f"{s}/{c}/{i}.png" for s in ("train", "test") for c in names for i in (0, 1, 10)))
    found = read(tmp_path / "photos")
    known = load_dataset("imagefolder", data_dir=str(tmp_path / "photos"), cache_dir=str(tmp_path / "cache"))
    assert found.keys() == known.keys()
    for name, split in found.items():
        assert split.features == known[name].features and split["label"][:] == known[name]["label"][:]
        assert Images.open(found)[name].hash == Images.open(known)[name].hash


def test_classes_are_the_first_folders_of_a_split_and_the_same_in_all(tmp_path):
    put(tmp_path, "train/cat/a/b/0.png", "train/cat/1.png", "train/dog/c/0.png", "test/dog/0.png", "test/emu/0.png")
    splits = read(tmp_path)
    assert all(split.features["label"].names == ["cat", "dog", "emu"] for split in splits.values())
    assert splits["train"]["label"][:] == [0, 0, 1] and splits["test"]["label"][:] == [1, 2]


def test_links_are_followed_and_lead_nowhere_twice(tmp_path):
    put(tmp_path, "store/cats/0.png", "store/cats/1.png", "store/train/dog/0.png", "one.png")
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "train").symlink_to(tmp_path / "store" / "train")
    (tmp_path / "store" / "train" / "cat").symlink_to(tmp_path / "store" / "cats")
    (tmp_path / "store" / "train" / "dog" / "1.png").symlink_to(tmp_path / "one.png")
    (tmp_path / "store" / "cats" / "up").symlink_to(tmp_path / "store" / "train")
    (tmp_path / "store" / "cats" / "gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "store" / "cats" / "self").symlink_to(tmp_path / "store" / "cats" / "self")
    with pytest.warns(UserWarning, match="skipped 3 files: 2 broken links, 1 links to a folder around them"):
        found = content(read(folder))
    cats = [("cat/0.png", "cat"), ("cat/1.png", "cat")]
    assert found == {"train": [*cats, ("dog/0.png", "dog"), ("dog/1.png", "dog")]}


def test_what_is_skipped_is_counted_and_said(tmp_path):
    put(tmp_path, "a/0.png", "a/1.JPG", "b/0.heic", "a/2.heic", ".hidden.png")
    Path(tmp_path, "a/notes.txt").write_text("")
    with pytest.warns(UserWarning) as told:
        assert len(read(tmp_path)["train"]) == 2
    text = " ".join(str(warning.message) for warning in told)
    assert "skipped 4 files: 2 .heic, " in text and "1 .txt" in text and "1 hidden" in text
    assert "no images of the split 'train' are in b" in text
    put(tmp_path / "only", "0.heic", "1.heic")
    with pytest.raises(ValueError, match="it has no images; skipped 2 files: 2 .heic"):
        read(tmp_path / "only")
    with pytest.raises(ValueError, match="there is no such folder"):
        read(tmp_path / "none")


def test_classes_that_are_named_like_splits_are_doubted(tmp_path):
    put(tmp_path, "Train/0.png", "Val/0.png")
    with pytest.warns(UserWarning, match="Train, Val are taken for classes"):
        read(tmp_path)


def test_a_stream_of_a_folder_has_its_images_and_workers_share_them(tmp_path):
    put(tmp_path, *(f"train/{name}/{i}.png" for name in ("cat", "dog") for i in range(10)))
    whole = read(tmp_path)["train"]
    stream = read_image_folder(str(tmp_path), streaming=True)["train"]
    assert isinstance(stream, IterableDataset) and stream.features == whole.features
    rows = [(row["image"].tobytes(), row["label"]) for row in stream]
    assert rows == [(row["image"].tobytes(), row["label"]) for row in whole]
    parts = [[(row["image"].tobytes(), row["label"]) for row in stream.shard(3, i)] for i in range(3)]
    assert sorted(sum(parts, [])) == sorted(rows) and all(parts)
    shuffled = [row["label"] for row in stream.shuffle(seed=0, buffer_size=1)]
    assert shuffled != sorted(shuffled)


def test_a_stream_of_many_images_has_few_parts_and_every_image_once(tmp_path):
    put(tmp_path, "0.png")
    rows = {"image": [str(tmp_path / "0.png")] * 2500, "label": range(2500)}
    found = data_files.stream(Dataset.from_dict(rows).cast_column("image", ImageFeature(decode=False)))
    assert found.num_shards == data_files.SHARDS < 2500
    assert [row["label"] for row in found] == list(range(2500))


@pytest.mark.parametrize(
    ("paths", "warned"),
    [
        (["train/0.png", "train/1.png", "test/0.png"], False),
        (["train/0.png", "train/cat/1.png", "train/dog/1.png", "test/0.png"], True),
    ],
)
def test_images_in_no_folder_of_a_class_have_no_label_and_need_none(tmp_path, paths, warned):
    put(tmp_path / "photos", *paths)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        splits = read(tmp_path / "photos")
    assert any("1 of its 3 images lie in no folder of a class: train/0.png" in str(w.message) for w in told) == warned
    assert all(list(split.features) == ["image"] for split in splits.values())
    with pytest.raises(ValueError, match="does not say of which classes its images are: name the column of labels"):
        opened(tmp_path / "photos")["train"].labelled()
    images = opened(tmp_path / "photos")["train"]
    assert len(images) == len(paths) - 1 and images.labels is None and images.names is None
    with pytest.raises(ValueError, match="or put images into a folder for each class"):
        images.labelled()


def write_table(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        pd.DataFrame(rows).to_csv(path, index=False)
    elif path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("place", ["root", "split"])
def test_metadata_is_joined_to_the_images(tmp_path, kind, place):
    put(tmp_path, "train/1.png", "train/0.png", "test/0.png")
    what = [("train", "1.png", "NA", 7), ("train", "./0.png", "dog, red", 3), ("test", "0.png", "NA", 7)]
    rows = [{"split": s, "file_name": f, "animal": a, "age": n} for s, f, a, n in what]
    if place == "root":
        rows = [{**row, "file_name": f"{row['split']}/{row['file_name']}"} for row in rows]
        write_table(tmp_path / f"metadata.{kind}", rows)
    else:
        for split in ("train", "test"):
            write_table(tmp_path / split / f"metadata.{kind}", [row for row in rows if row["split"] == split])
    splits = read(tmp_path)
    assert splits["train"]["animal"][:] == ["dog, red", "NA"] and splits["train"]["age"][:] == [3, 7]
    assert content(splits)["train"] == [("train/0.png", None), ("train/1.png", None)]
    found = opened(tmp_path, label_column="animal")["train"]
    assert found.names == ["NA", "dog, red"] and found.labels.tolist() == [1, 0]
    numbers = opened(tmp_path, label_column="age")["test"]
    assert numbers.names == ["3", "7"] and numbers.labels.tolist() == [1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file_name,x\na/0.png,1\n", "leaves 1 images without a row, such as b/0.png"),
        ("file_name,x\na/0.png,1\nb/0.png,1\nc.png,2\n", "leaves 1 rows without an image, such as c.png"),
        ("file_name,x\na/0.png,1\nb/0.png,1\na/0.png,2\n", "a second row for the image a/0.png"),
        ("name,x\na/0.png,1\nb/0.png,1\n", "has a row without `file_name`"),
        ("file_name,x,x\na/0.png,1,1\nb/0.png,1,1\n", "which must all differ"),
        ("file_name,x\na/0.png,1,1\nb/0.png,1\n", "every line must have as many values"),
        ("file_name,image\na/0.png,1\nb/0.png,1\n", "has a column `image`"),
    ],
)
def test_metadata_of_other_images_is_refused(tmp_path, text, message):
    put(tmp_path, "a/0.png", "b/0.png")
    (tmp_path / "metadata.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


@pytest.mark.parametrize(("name", "content"), [("csv", b"file_name,x\na.png,caf\xe9\n"), ("jsonl", b"{'x': 1}\n")])
def test_metadata_that_is_no_table_is_named(tmp_path, name, content):
    put(tmp_path, "a.png")
    (tmp_path / f"metadata.{name}").write_bytes(content)
    with pytest.raises(ValueError, match=rf"metadata\.{name} cannot be read as a table in UTF-8"):
        read(tmp_path)


def test_metadata_elsewhere_and_labels_said_twice_are_not_passed_over(tmp_path):
    put(tmp_path, "a/0.png", "b/0.png")
    write_table(tmp_path / "a" / "metadata.csv", [{"file_name": "0.png", "x": 1}])
    with pytest.raises(ValueError, match=r"a/metadata.csv: metadata is read only right inside .* move it"):
        read(tmp_path)
    (tmp_path / "a" / "metadata.csv").unlink()
    write_table(tmp_path / "metadata.csv", [{"file_name": f"{name}/0.png", "label": "same"} for name in "ab"])
    with pytest.warns(UserWarning, match="its metadata gives the labels, not the names of its folders"):
        assert read(tmp_path)["train"]["label"][:] == ["same"] * 2


# Tables


def load(source, streaming=False, config=None):
    return read_source(source, config, streaming, str(source.parent / ".cache"))


@pytest.mark.parametrize("name", ["a[1]b", "[x]", "a*b", "what?"])
def test_no_character_of_a_path_is_a_pattern(tmp_path, name):
    folder = tmp_path / name
    put(folder / "images", "train/[cat]/0.png", "train/d*g/0.png")
    put(tmp_path / "aXb" / "images", "train/cat/9.png")  # which a pattern would match too
    assert len(read(folder / "images")["train"]) == 2
    for place, count in ((folder, 1), (tmp_path / "aXb", 2)):
        (place / "table").mkdir()
        Dataset.from_dict({"x": [0] * count}).to_parquet(place / "table" / "train.parquet")
    for source in (folder / "table", folder / "table" / "train.parquet"):
        assert len(load(source)["train"]) == 1
        assert len(list(load(source, streaming=True)["train"])) == 1


def test_a_folder_of_images_may_come_as_a_data_sets_name(tmp_path):
    put(tmp_path, "train/cat/0.png", "test/cat/0.png", "train/eval/0.png")
    by_name = load(tmp_path)
    assert content(by_name) == content(read(tmp_path)) and len(by_name["train"]) == 2


FILES = {
    "train.parquet test.parquet": {"train": 1, "test": 1},
    "train-00000-of-00002.parquet train-00001-of-00002.parquet": {"train": 2},
    "data/train-00000-of-00001-0123.parquet data/fold_1-00000-of-00001.parquet": {"train": 1, "fold_1": 1},
    "train-0-of-4.parquet train-1-of-4.parquet test_0.parquet": {"train": 2, "test": 1},
    "default/train/0000.parquet default/test/0000.parquet": {"train": 1, "test": 1},
    "trains.parquet contest.parquet latest.parquet": {"train": 3},
    "train/contest.parquet": {"train": 1},
    "bullet-train.parquet cat.parquet": "the split of bullet-train.parquet cannot be told",
    "eval.parquet train.parquet": "the split of eval.parquet cannot be told",
    "Train.parquet Test.parquet": "the split of Test.parquet cannot be told",
    "test tube/0.parquet": "the split of test tube/0.parquet cannot be told",
    "train/test.parquet": "the split of train/test.parquet cannot be told",
    "contest.parquet test.parquet": "some files name a split, such as test.parquet, and others do not",
}


@pytest.mark.parametrize("files", FILES)
def test_files_of_tables_are_of_the_split_that_they_name_or_refused(tmp_path, files):
    paths, expected = files.split(".parquet"), FILES[files]
    for path in paths[:-1]:
        file = tmp_path / "data set" / f"{path.strip()}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_dict({"x": [0]}).to_parquet(file)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=f"can be read in two ways: {expected}"):
            load(tmp_path / "data set")
    else:
        assert {name: len(split) for name, split in load(tmp_path / "data set").items()} == expected


def test_a_folder_of_tables_that_a_card_describes_is_read_as_it_says(tmp_path):
    for name in ("a", "b", "bullet-train"):
        Dataset.from_dict({"x": [0]}).to_parquet(tmp_path / f"{name}.parquet")
    card = {"default": "- {split: train, path: [a.parquet, b.parquet]}\n  - {split: test, path: bullet-train.parquet}"}
    text = "".join(f"- config_name: {name}\n  data_files:\n  {files}\n" for name, files in card.items())
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{text}---\n")
    assert {name: len(split) for name, split in load(tmp_path).items()} == {"train": 2, "test": 1}
    (tmp_path / "README.md").unlink()
    with pytest.raises(ValueError, match="has no card that names configurations"):
        load(tmp_path, config="other")


def test_tables_beside_tables_and_pictures_are_named(tmp_path):
    Dataset.from_dict({"x": [0]}).to_parquet(tmp_path / "train.parquet")
    (tmp_path / "labels.csv").write_text("x\n1\n")
    put(tmp_path, "a/0.png")
    with pytest.warns(UserWarning, match="its .parquet files are read, not a/0.png, labels.csv; train_data_dir"):
        assert len(load(tmp_path)["train"]) == 1
