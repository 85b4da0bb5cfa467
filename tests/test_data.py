"""Which images a data set is taken to have, of which splits and classes; and which of them are taken."""

import argparse
import json
import math
import warnings
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, IterableDataset, Value, load_dataset
from datasets import Image as ImageFeature
from diffusers import DDPMScheduler
from PIL import Image

from data import add_data_arguments, images_hash, load_splits, load_training_images, pick_split
from ddae_hf import DDAEImageProcessor, DDAEPipeline
from ddae_hf.experiments import image_folder
from ddae_hf.experiments.classes import Classes, draw_images
from labelled import LabelledImages, add_label_arguments

from . import scripts
from .conftest import make_unet, make_vae


def put(folder, *paths):
    """Write pictures that all differ."""
    for path in paths:
        file = Path(folder, path)
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(zlib.crc32(str(path).encode())).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(file, format="PNG")


def options(*words, **values):
    parser = argparse.ArgumentParser()
    add_data_arguments(parser)
    add_label_arguments(parser)
    parser.set_defaults(batch_size=10, class_conditional=False, streaming=False)
    args = parser.parse_args([str(word) for word in words])
    vars(args).update(values)
    return args


def read(folder, **values):
    return load_splits(options("--train_data_dir", folder, **values))


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


def labelled(folder, *words, **values):
    args = options("--train_data_dir", folder, *words, **values)
    return LabelledImages(args, DDAEImageProcessor(size={"height": 8, "width": 8}, num_channels=1))


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
    with pytest.raises(SystemExit, match=f"can be read in two ways: it {named}"):
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
        assert images_hash(split, "image") == images_hash(known[name], "image")


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
    with pytest.raises(SystemExit, match="it has no images; skipped 2 files: 2 .heic"):
        read(tmp_path / "only")
    with pytest.raises(SystemExit, match="there is no such folder"):
        read(tmp_path / "none")


def test_classes_that_are_named_like_splits_are_doubted(tmp_path):
    put(tmp_path, "Train/0.png", "Val/0.png")
    with pytest.warns(UserWarning, match="Train, Val are taken for classes"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["a[1]b", "[x]", "a*b", "what?"])
def test_no_character_of_a_path_is_a_pattern(tmp_path, name):
    folder = tmp_path / name
    put(folder / "images", "train/[cat]/0.png", "train/d*g/0.png")
    put(tmp_path / "aXb" / "images", "train/cat/9.png")  # which a pattern would match too
    assert len(read(folder / "images")["train"]) == 2
    for place, count in ((folder, 1), (tmp_path / "aXb", 2)):
        (place / "table").mkdir()
        Dataset.from_dict({"x": [0] * count}).to_parquet(place / "table" / "train.parquet")
    cache = ["--cache_dir", tmp_path / "cache", "--dataset_name"]
    for source in (folder / "table", folder / "table" / "train.parquet"):
        args = options(*cache, source)
        assert len(load_splits(args)["train"]) == 1
        assert len(list(load_splits(args, streaming=True)["train"])) == 1


def test_a_folder_of_images_may_come_as_a_data_sets_name(tmp_path):
    put(tmp_path, "train/cat/0.png", "test/cat/0.png", "train/eval/0.png")
    by_name = load_splits(options("--dataset_name", tmp_path))
    assert content(by_name) == content(read(tmp_path)) and len(by_name["train"]) == 2


def test_a_stream_of_a_folder_has_its_images_and_workers_share_them(tmp_path):
    put(tmp_path, *(f"train/{name}/{i}.png" for name in ("cat", "dog") for i in range(10)))
    args = options("--train_data_dir", tmp_path)
    whole, stream = load_splits(args)["train"], load_splits(args, streaming=True)["train"]
    assert isinstance(stream, IterableDataset) and stream.features == whole.features
    rows = [(row["image"].tobytes(), row["label"]) for row in stream]
    assert rows == [(row["image"].tobytes(), row["label"]) for row in whole]
    parts = [[(row["image"].tobytes(), row["label"]) for row in stream.shard(3, i)] for i in range(3)]
    assert sorted(sum(parts, [])) == sorted(rows) and all(parts)
    shuffled = [row["label"] for row in stream.shuffle(seed=0, buffer_size=1)]
    assert shuffled != sorted(shuffled)
    with pytest.warns(UserWarning, match="The first 3 images of the stream 'train' are taken"):
        assert [row["label"] for row in pick_split({"train": stream}, "train", 3)] == [0, 0, 0]


def test_a_stream_of_many_images_has_few_parts_and_every_image_once(tmp_path):
    put(tmp_path, "0.png")
    rows = {"image": [str(tmp_path / "0.png")] * 2500, "label": range(2500)}
    found = image_folder.stream(Dataset.from_dict(rows).cast_column("image", ImageFeature(decode=False)))
    assert found.num_shards == image_folder.SHARDS < 2500
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
    with pytest.raises(SystemExit, match="does not say of which classes its images are: name the column of labels"):
        labelled(tmp_path / "photos")
    given = options("--train_data_dir", tmp_path / "photos")
    assert len(load_training_images(given)[0]) == len(paths) - 1
    with pytest.raises(SystemExit, match="or put images into a folder for each class"):
        load_training_images(argparse.Namespace(**{**vars(given), "class_conditional": True}))


def test_scripts_that_need_no_labels_take_images_without(tmp_path):
    put(tmp_path / "photos", "train/0.png", "train/1.png", "test/0.png")
    denoiser = make_unet(in_channels=1, out_channels=1)
    DDAEPipeline.for_denoiser(denoiser, DDPMScheduler()).save_pretrained(tmp_path / "checkpoint")
    make_vae().save_pretrained(tmp_path / "vae")
    data = ["--train_data_dir", tmp_path / "photos", "--output_dir"]
    model = ["--model_name_or_path", tmp_path / "checkpoint", "--layers", "mid_block"]
    scripts.run("export_features", *model, *data, tmp_path / "features")
    assert list(pd.read_parquet(tmp_path / "features" / "features.parquet")) == ["index", "mid_block"]
    scripts.run("encode_latents", "--vae", tmp_path / "vae", *data, tmp_path / "latents")
    assert json.loads((tmp_path / "latents" / "latents.json").read_text())["names"] is None


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
    found = labelled(tmp_path, "--label_column", "animal")
    assert found.names == ["NA", "dog, red"] and found.labels["train"].tolist() == [1, 0]
    numbers = labelled(tmp_path, "--label_column", "age")
    assert numbers.names == ["3", "7"] and numbers.labels["test"].tolist() == [1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file_name,x\na/0.png,1\n", "leaves 1 images without a row, such as b/0.png"),
        ("file_name,x\na/0.png,1\nb/0.png,1\nc.png,2\n", "leaves 1 rows without an image, such as c.png"),
        ("file_name,x\na/0.png,1\nb/0.png,1\na/0.png,2\n", "a second row of the image a/0.png"),
        ("name,x\na/0.png,1\nb/0.png,1\n", "has a row without `file_name`"),
        ("file_name,x,x\na/0.png,1,1\nb/0.png,1,1\n", "which must all differ"),
        ("file_name,x\na/0.png,1,1\nb/0.png,1\n", "every line must have as many values"),
        ("file_name,image\na/0.png,1\nb/0.png,1\n", "has a column `image`"),
    ],
)
def test_metadata_of_other_images_is_refused(tmp_path, text, message):
    put(tmp_path, "a/0.png", "b/0.png")
    (tmp_path / "metadata.csv").write_text(text)
    with pytest.raises(SystemExit, match=message):
        read(tmp_path)


@pytest.mark.parametrize(("name", "content"), [("csv", b"file_name,x\na.png,caf\xe9\n"), ("jsonl", b"{'x': 1}\n")])
def test_metadata_that_is_no_table_is_named(tmp_path, name, content):
    put(tmp_path, "a.png")
    (tmp_path / f"metadata.{name}").write_bytes(content)
    with pytest.raises(SystemExit, match=rf"metadata\.{name} cannot be read as a table in UTF-8"):
        read(tmp_path)


def test_metadata_elsewhere_and_labels_said_twice_are_not_passed_over(tmp_path):
    put(tmp_path, "a/0.png", "b/0.png")
    write_table(tmp_path / "a" / "metadata.csv", [{"file_name": "0.png", "x": 1}])
    with pytest.raises(SystemExit, match=r"a/metadata.csv: metadata is read right inside .* move it"):
        read(tmp_path)
    (tmp_path / "a" / "metadata.csv").unlink()
    write_table(tmp_path / "metadata.csv", [{"file_name": f"{name}/0.png", "label": "same"} for name in "ab"])
    with pytest.warns(UserWarning, match="labels are those of its metadata, not the names of its folders"):
        assert read(tmp_path)["train"]["label"][:] == ["same"] * 2


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
    "contest.parquet test.parquet": "contest.parquet is of no split, beside test.parquet",
}


@pytest.mark.parametrize("files", FILES)
def test_files_of_tables_are_of_the_split_that_they_name_or_refused(tmp_path, files):
    paths, expected = files.split(".parquet"), FILES[files]
    for path in paths[:-1]:
        file = tmp_path / "data set" / f"{path.strip()}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_dict({"x": [0]}).to_parquet(file)
    args = options("--dataset_name", tmp_path / "data set", "--cache_dir", tmp_path / "cache")
    if isinstance(expected, str):
        with pytest.raises(SystemExit, match=f"can be read in two ways: {expected}"):
            load_splits(args)
    else:
        assert {name: len(split) for name, split in load_splits(args).items()} == expected


def test_a_folder_of_tables_that_a_card_describes_is_read_as_it_says(tmp_path):
    for name in ("a", "b", "bullet-train"):
        Dataset.from_dict({"x": [0]}).to_parquet(tmp_path / f"{name}.parquet")
    args = options("--dataset_name", tmp_path, "--cache_dir", tmp_path / ".cache")
    card = {"default": "- {split: train, path: [a.parquet, b.parquet]}\n  - {split: test, path: bullet-train.parquet}"}
    text = "".join(f"- config_name: {name}\n  data_files:\n  {files}\n" for name, files in card.items())
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{text}---\n")
    assert {name: len(split) for name, split in load_splits(args).items()} == {"train": 2, "test": 1}
    (tmp_path / "README.md").unlink()
    args.dataset_config_name = "other"
    with pytest.raises(SystemExit, match="has no card that names configurations"):
        load_splits(args)


def test_tables_beside_tables_and_pictures_are_named(tmp_path):
    Dataset.from_dict({"x": [0]}).to_parquet(tmp_path / "train.parquet")
    (tmp_path / "labels.csv").write_text("x\n1\n")
    put(tmp_path, "a/0.png")
    args = options("--dataset_name", tmp_path, "--cache_dir", tmp_path / ".cache")
    with pytest.warns(UserWarning, match="read are its .parquet files, not a/0.png, labels.csv; --train_data_dir"):
        assert len(load_splits(args)["train"]) == 1


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


@pytest.fixture(scope="module")
def sorted_digits(digits, tmp_path_factory):
    """A folder of digits: as every folder of classes, sorted by class."""
    folder = tmp_path_factory.mktemp("sorted") / "digits"
    for split in ("train", "test"):
        for i, row in enumerate(Dataset.from_parquet(str(digits / f"{split}.parquet")).select(range(300))):
            place = folder / split / str(row["label"])
            place.mkdir(parents=True, exist_ok=True)
            row["image"].save(place / f"{i:04d}.png")
    return folder


def test_few_images_of_a_folder_are_of_all_classes_and_the_same_everywhere(sorted_digits, tmp_path):
    few = ["--max_train_samples", 40, "--max_test_samples", 20]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = labelled(sorted_digits, *few)
    for split, count in (("train", 40), ("test", 20)):
        assert len(found.labels[split]) == count and set(found.labels[split]) == set(range(10))
    training = load_training_images(options("--train_data_dir", sorted_digits, *few))[0]
    assert images_hash(training, "image") == found.hash("train")
    classes, count = load_training_images(options("--train_data_dir", sorted_digits, *few, class_conditional=True))
    assert count == 10 and classes["labels"][:] == found.labels["train"].tolist()
    DDAEPipeline.for_denoiser(make_unet(in_channels=1, out_channels=1), DDPMScheduler()).save_pretrained(tmp_path)
    import correspondence
    import evaluate_generation

    arguments = ["--images_dir", "x", "--extractor", f"ddae:{tmp_path}", "--max_reference_samples", "40"]
    args = evaluate_generation.parse_arguments([*arguments, "--train_data_dir", str(sorted_digits)])
    assert images_hash(evaluate_generation.real_images(args, 4)["reference"].dataset, "image") == found.hash("train")
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(correspondence, "look_up", lambda args, pixels, backbones: seen.append(pixels) or exit("enough"))
        with pytest.raises(SystemExit, match="enough"):
            data = ["--train_data_dir", sorted_digits, "--num_images", 40, "--max_shift", 1, "--max_bend", 1]
            scripts.run("correspondence", "--model_name_or_path", tmp_path, *data, "--output_dir", tmp_path / "out")
    (pixels,) = seen
    assert np.allclose(pixels, found.pixel_values("train", np.arange(40)))


def test_latents_of_few_images_are_those_of_the_same_images(sorted_digits, tmp_path):
    """A denoiser of latents is trained on the images that one of pixels is trained on."""
    import pretrain
    from training_data import load_training_data

    make_vae(in_channels=1, out_channels=1, sample_size=8).save_pretrained(tmp_path / "vae")
    data = ["--train_data_dir", sorted_digits, "--output_dir", tmp_path / "latents"]
    scripts.run("encode_latents", "--vae", tmp_path / "vae", *data)
    found = labelled(sorted_digits, "--max_train_samples", 12)
    given = ["--latents_dir", str(tmp_path / "latents"), "--max_train_samples", "12", "--class_conditional"]
    latents = load_training_data(pretrain.parse_arguments(given)).dataset
    assert latents.with_format(None)["labels"][:] == found.labels["train"].tolist()
    rows = latents.with_format(None)["index"][:]
    whole = labelled(sorted_digits)
    assert np.allclose(whole.pixel_values("train", np.array(rows)), found.pixel_values("train", np.arange(12)))
    with pytest.warns(UserWarning, match="The split 'train' has no images of 5 of the 10 classes"):
        load_training_data(pretrain.parse_arguments([*given, "--max_train_samples", "5"]))


def test_what_a_sweep_measures_on_few_images_is_measured_on_all_classes(sorted_digits, tmp_path, monkeypatch):
    import sweep
    import training_curve

    DDAEPipeline.for_denoiser(make_unet(in_channels=1, out_channels=1), DDPMScheduler()).save_pretrained(tmp_path)
    arguments = ["--model_name_or_path", str(tmp_path), "--train_data_dir", str(sorted_digits), "--alignment"]
    arguments += ["--layers", "mid_block", "--sigmas", "0.1", "--max_selection_samples", "150"]
    args, data, rows = sweep.parse_arguments(arguments), labelled(sorted_digits), []
    monkeypatch.setattr(sweep, "ALIGNMENT_IMAGES", 15)
    monkeypatch.setattr(training_curve, "LOSS_IMAGES", 15)
    swept = sweep.Sweep(args, str(tmp_path), data)
    features, batches = swept.features, data.batches
    monkeypatch.setattr(swept, "features", lambda *a, **k: rows.append(k["rows"]) or features(*a, **k))
    sweep.add_other_figures(swept, [{"layer": "mid_block"}], 0.1)
    monkeypatch.setattr(data, "batches", lambda *a: rows.append(a[1]) or batches(*a))
    training_curve.test_loss(args, tmp_path, data)
    few = [some for some in rows if some is not None and len(some) == 15]
    assert [len(set(labels[some])) for labels, some in zip(data.labels.values(), few, strict=True)] == [10, 10]


def test_generated_images_are_found_through_links_and_the_rest_is_said(tmp_path):
    from evaluate_generation import find_images

    put(tmp_path, "store/1.png", "images/0.png", "images/grid.png", "images/sub/grid.png", "images/2.heic")
    (tmp_path / "images" / "linked").symlink_to(tmp_path / "store")
    with pytest.warns(UserWarning, match=r"skipped 2 files: 1 \.?\w+(\.png)?, 1 "):
        found = find_images(tmp_path / "images")
    assert [str(path.relative_to(tmp_path / "images")) for path in found] == ["0.png", "linked/1.png", "sub/grid.png"]


# Classes


def test_classes_that_a_split_lacks_are_named(tmp_path):
    put(tmp_path, *(f"train/{i:02d}/0.png" for i in range(13)), "train/99/0.png", "test/99/0.png", "test/zoo/0.png")
    with pytest.warns(UserWarning) as told:
        found = labelled(tmp_path)
    text = [str(warning.message) for warning in told]
    ten = ", ".join(f"{i:02d}" for i in range(10))
    assert text == [
        "The split 'train' has no images of 1 of the 15 classes: zoo.",
        f"The split 'test' has no images of 13 of the 15 classes: {ten} and 3 more.",
    ]
    assert len(found.names) == 15
    with pytest.warns(UserWarning, match="The split 'train' has no images of 12 of the 15 classes"):
        labelled(tmp_path, "--max_train_samples", 3)
    with pytest.warns(UserWarning, match="The split 'train' has no images of 1 of the 15 classes: zoo"):
        load_training_images(options("--train_data_dir", tmp_path, class_conditional=True))


def tables(tmp_path, kind=None, **labels):
    """Write splits whose images have these labels, of that type; return the options that read them."""
    features = Features({"image": ImageFeature(), "kind": kind or Value("int64")})
    for name, values in labels.items():
        pictures = [Image.fromarray(np.full((8, 8), i, np.uint8)) for i in range(len(values))]
        Dataset.from_dict({"image": pictures, "kind": values}, features).to_parquet(tmp_path / f"{name}.parquet")
    return ["--dataset_name", tmp_path, "--cache_dir", tmp_path / ".cache", "--label_column", "kind"]


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
    arguments = tables(tmp_path, kind, train=train, test=test)
    args = options(*arguments, class_conditional=True)
    found = LabelledImages(args, DDAEImageProcessor(size={"height": 8, "width": 8}, num_channels=1))
    spoken = {name: [kind.names[v] if isinstance(kind, ClassLabel) else str(v) for v in values]
              for name, values in {"train": train, "test": test}.items()}  # fmt: skip
    assert found.names == names
    for name, words in spoken.items():
        assert [names[label] for label in found.labels[name]] == words
    dataset, count = load_training_images(args)
    own = dataset.features["labels"].names
    assert count == len(own) and [own[label] for label in dataset["labels"]] == spoken["train"]
    make_vae(in_channels=1, out_channels=1, sample_size=8).save_pretrained(tmp_path / "vae")
    denoiser = make_unet(in_channels=1, out_channels=1)
    DDAEPipeline.for_denoiser(denoiser, DDPMScheduler()).save_pretrained(tmp_path / "model")
    scripts.run("encode_latents", "--vae", tmp_path / "vae", *arguments, "--output_dir", tmp_path / "latents")
    labels = np.load(tmp_path / "latents" / "train-labels.npy")
    written = json.loads((tmp_path / "latents" / "latents.json").read_text())["names"]
    assert [written[label] for label in labels] == spoken["train"] and written == own
    model = ["--model_name_or_path", tmp_path / "model", "--layers", "mid_block"]
    scripts.run("export_features", *model, *arguments, "--output_dir", tmp_path / "features")
    written = json.loads((tmp_path / "features" / "features.json").read_text())["class_names"]
    labels = pd.read_parquet(tmp_path / "features" / "features.parquet")["label"]
    assert [written[label] for label in labels] == spoken["train"] and written == own


@pytest.mark.parametrize(
    ("kind", "labels", "message"),
    [
        (Value("int64"), [0, -1, 3], "Labels of the split 'train' are -1 to 3: allowed are 0 and more"),
        (ClassLabel(names=["a", "b"]), [0, -1, 1], "Labels of the split 'train' are -1 to 1: allowed are 0 to 1"),
        (Value("string"), ["a", None, "b"], "Some images have no label"),
        (Value("float32"), [0.0, 1.0], "There is no column of labels 'kind', whole numbers or names"),
    ],
)
def test_labels_that_stand_for_none_are_refused(tmp_path, kind, labels, message):
    arguments = tables(tmp_path, kind, train=labels, test=labels)
    args = options(*arguments, class_conditional=True)
    for load in (load_training_images, lambda args: LabelledImages(args, DDAEImageProcessor())):
        with pytest.raises(SystemExit, match=message):
            load(args)


def test_splits_without_the_column_or_with_other_classes_are_refused(tmp_path):
    put(tmp_path, "train/a/0.png", "train/b/0.png", "test/0.png")
    with pytest.raises(SystemExit, match=r"The split 'test' has no column 'label' of labels; it has \['image'\]"):
        labelled(tmp_path)
    one, two = (Dataset.from_dict({"x": [0]}, Features({"x": ClassLabel(names=names)})) for names in ("ab", "ba"))
    with pytest.raises(SystemExit, match="is not the same in all splits"):
        Classes({"train": one, "test": two}, "x")


def test_two_classes_of_one_name_are_refused(tmp_path):
    """No configuration could tell them apart: it has the number of each name."""
    arguments = tables(tmp_path, ClassLabel(names=["crane", "other"]), train=[0, 1], test=[0, 1])
    for name in ("train", "test"):
        table = pq.read_table(tmp_path / f"{name}.parquet")
        said = table.schema.metadata[b"huggingface"].replace(b"other", b"crane")
        pq.write_table(table.replace_schema_metadata({b"huggingface": said}), tmp_path / f"{name}.parquet")
    with pytest.raises(SystemExit, match="Some label names are duplicated"):
        load_splits(options(*arguments))
