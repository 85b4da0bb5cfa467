"""Exported features, as another program would read them."""

import json

import numpy as np
import pandas as pd
import pytest
from diffusers import DDPMScheduler
from PIL import Image

import export_features
from ddae_hf import DDAEPipeline, arrays

from . import scripts
from .conftest import drawn, make_unet

LAYERS = ["mid_block", "up_blocks.0.attentions.1"]


@pytest.fixture
def checkpoint(tmp_path):
    denoiser = make_unet(in_channels=1, out_channels=1)
    DDAEPipeline.for_denoiser(denoiser, DDPMScheduler()).save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def export(checkpoint, folder, *options):
    arguments = ["--model_name_or_path", str(checkpoint), "--output_dir", str(folder), "--layers", *LAYERS]
    scripts.run("export_features", *arguments, *options)


def test_parquet_and_npy_hold_the_same_features_with_their_labels(checkpoint, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(export_features, "ROW_GROUP", 15)
    options = ["--dataset_name", str(digits), "--max_train_samples", "40", "--sigma", "0.3"]
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
    with pytest.raises(SystemExit, match="no layer 'mid'"):
        export(checkpoint, tmp_path, "--dataset_name", str(digits), "--layers", "mid")
    with pytest.raises(SystemExit, match="sigma"):
        export(checkpoint, tmp_path, "--dataset_name", str(digits), "--sigma", "1e9")
    with pytest.raises(SystemExit, match="no column of labels 'image'"):
        export(checkpoint, tmp_path, "--dataset_name", str(digits), "--label_column", "image")
    with pytest.raises(SystemExit):
        export(checkpoint, tmp_path, "--dataset_name", str(digits), "--batch_size", "0")
    assert "--batch_size is 0: it must be at least 1" in capsys.readouterr().err
