"""Exported features, as another program would read them."""

import json
import shutil
from collections import namedtuple

import numpy as np
import pandas as pd
import pytest
from diffusers import DDPMScheduler
from PIL import Image

from ddae_hf import DDAEModel, DDAEPipeline
from ddae_hf.experiments import arrays, feature_export
from ddae_hf.experiments.feature_export import export_features
from ddae_hf.experiments.images import Images

from . import commands
from .conftest import drawn, make_unet
from .quiet import quiet

LAYERS = ["mid_block", "up_blocks.0.attentions.1"]


@pytest.fixture
def checkpoint(tmp_path):
    denoiser = make_unet(in_channels=1, out_channels=1)
    DDAEPipeline.for_denoiser(denoiser, DDPMScheduler()).save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture(scope="module")
def images(digits):
    return Images.open(digits)


def export(checkpoint, folder, *options):
    arguments = ["--model_name_or_path", str(checkpoint), "--output_dir", str(folder), "--layers", *LAYERS]
    commands.run("export", *arguments, *options)


def test_parquet_and_npy_hold_the_same_features_with_their_labels(checkpoint, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_export, "ROW_GROUP", 15)
    options = ["--dataset_name", str(digits), "--max_samples", "40", "--sigma", "0.3"]
    options += ["--features_dir", str(tmp_path / "features")]
    export(checkpoint, tmp_path / "a", *options)
    with monkeypatch.context() as patched:
        patched.setattr(arrays, "_compute", None)  # the second export finds them on disk
        export(checkpoint, tmp_path / "b", *options, "--format", "npy")
    table = pd.read_parquet(tmp_path / "a" / "features.parquet")
    assert list(table) == ["index", "label", *LAYERS] and list(table["index"]) == list(range(40))
    for layer in LAYERS:
        values = np.load(tmp_path / "b" / f"{layer}.npy")
        assert values.dtype == np.float32 and values.std(0).min() > 0
        np.testing.assert_array_equal(np.stack(table[layer]), values)
    labels = drawn(digits, "train", 40)["label"][:]
    assert list(table["label"]) == labels == np.load(tmp_path / "b" / "label.npy").tolist()
    about = json.loads((tmp_path / "a" / "features.json").read_text())
    assert about["sigma"] == 0.3 and about["images"] == 40 and about["class_names"][3] == "3"
    assert about["options"]["model_name_or_path"] == str(checkpoint)
    assert about["options"]["dataset_name"] == str(digits) and about["options"]["max_samples"] == 40


def test_a_notebook_gets_the_features_of_its_own_model_and_images(checkpoint, digits, tmp_path, capsys):
    part, model = drawn(digits, "train", 12), DDAEModel.from_pretrained(checkpoint, layer="mid_block", sigma=0.2)
    with quiet(capsys):
        images = Images.open({"train": (part["image"][:], part["label"][:])})
        found = export_features(model, images, output_dir=tmp_path / "own")
        by_path = export_features(checkpoint, images, layers=["all"], sigma=0.2, output_dir=tmp_path / "by_path")
    assert list(found.features) == ["mid_block"] and found.sigma == 0.2 and found.folder == tmp_path / "own"
    assert np.array_equal(found.labels, part["label"][:]) and len(found.names) == 10
    assert list(by_path.features) == model.layer_names()
    np.testing.assert_allclose(by_path.features["mid_block"], found.features["mid_block"], rtol=0, atol=1e-5)
    about = json.loads((tmp_path / "own" / "features.json").read_text())
    assert about["options"]["model_name_or_path"] is None and about["layers"] == ["mid_block"]
    with pytest.raises(ValueError, match="open already, with another num_noise_samples than is asked for"):
        export_features(model, images, num_noise_samples=2, output_dir=tmp_path / "other")


def test_a_folder_of_images_without_labels_is_exported(checkpoint, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(photos / f"{i}.png")
    export(checkpoint, tmp_path / "out", "--train_data_dir", str(photos))
    table = pd.read_parquet(tmp_path / "out" / "features.parquet")
    assert list(table) == ["index", *LAYERS] and len(table) == 5


def test_what_is_not_there_is_refused(checkpoint, digits, tmp_path, capsys):
    given = ["--dataset_name", str(digits)]
    with pytest.raises(SystemExit, match="no layer 'mid'"):
        export(checkpoint, tmp_path, *given, "--layers", "mid")
    with pytest.raises(SystemExit, match="sigma"):
        export(checkpoint, tmp_path, *given, "--sigma", "1e9")
    with pytest.raises(SystemExit, match="no column of labels 'image'"):
        export(checkpoint, tmp_path, *given, "--label_column", "image")
    for option, message in (("batch_size", "at least 1"), ("view", "at least 0"), ("num_noise_samples", "at least 1")):
        with pytest.raises(SystemExit):
            export(checkpoint, tmp_path, *given, f"--{option}", "-1")
        assert f"{option} is -1: it must be {message}" in capsys.readouterr().err
    for option in ("output_dir", "features_dir"):
        with pytest.raises(SystemExit):
            export(checkpoint, tmp_path, *given, f"--{option}", __file__)
        assert f"{option} is {__file__}, and {__file__} is a file: give a folder" in capsys.readouterr().err
    with pytest.raises(ValueError, match="The stream 'train' does not say how many images it has: leave out streaming"):
        export_features(checkpoint, Images.open(digits, streaming=True), output_dir=tmp_path)
    assert not (tmp_path / "cache").exists()


def test_a_full_disk_and_damaged_features_are_told_and_the_rest_stays(checkpoint, images, tmp_path, monkeypatch):
    Usage = namedtuple("Usage", "total used free")
    options = {"max_samples": 20, "layers": LAYERS, "output_dir": tmp_path / "out"}
    before = {
        name: np.array(values) for name, values in export_features(checkpoint, images, **options).features.items()
    }
    written = (tmp_path / "out" / "features.parquet").read_bytes()
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda path: Usage(10, 10, 0))
        for changes in ({}, {"sigma": 0.5}):  # no room for the files, and none for new features
            with pytest.raises(OSError, match=r"are needed in .*, where 0.0 MiB are free: give another folder"):
                export_features(checkpoint, images, **options, **changes)
    assert (tmp_path / "out" / "features.parquet").read_bytes() == written
    (path,) = (tmp_path / "out" / "cache").glob("*/mid_block.npy")
    path.write_bytes(path.read_bytes()[:-8] + bytes(8))
    with pytest.raises(ValueError, match=r"mid_block.npy is damaged .* Delete this file"):
        export_features(checkpoint, images, **options)
    path.unlink()
    again = export_features(checkpoint, images, **options)
    assert all(np.array_equal(again.features[layer], before[layer]) for layer in LAYERS)
