"""Which file of a folder of tables is of which split, and what no path is taken for."""

import pytest
from datasets import Dataset

from ddae_hf.experiments.data_files import read_source

from .conftest import put
from .test_image_folder import content, read


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
    "contest.parquet test.parquet": "beside test.parquet, no split is named by contest.parquet",
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
    with pytest.warns(UserWarning, match="read are its .parquet files, not a/0.png, labels.csv; train_data_dir"):
        assert len(load(tmp_path)["train"]) == 1
