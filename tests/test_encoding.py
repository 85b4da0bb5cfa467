"""`encode`, alone and by its script: what is written, what is found again, and what is refused."""

import dataclasses
import hashlib
import json
import logging
import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch
from datasets import Dataset

from ddae_hf import DDAEImageProcessor
from ddae_hf.experiments.encoding import EncodingOptions, LatentInputs, encode
from ddae_hf.experiments.images import Images
from ddae_hf.experiments.latent_folder import LatentFolder
from ddae_hf.latents import encode as encoded_by
from ddae_hf.weights import fingerprint

from . import commands
from .conftest import drawn, make_vae
from .quiet import quiet

COUNT, SIDE = 10, 16


@pytest.fixture(scope="module")
def vae():
    return make_vae()


@pytest.fixture(scope="module")
def images(digits):
    return Images.open(digits)


@pytest.fixture(scope="module")
def encoded(vae, digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoded")
    vae.save_pretrained(folder / "vae")
    options = ["--vae", folder / "vae", "--dataset_name", digits, "--max_train_samples", COUNT, "--mirror"]
    commands.run("encode", *options, "--output_dir", folder / "latents", "--batch_size", 4)
    return folder


def pixels_of(digits):
    processor = DDAEImageProcessor(size={"height": SIDE, "width": SIDE}, num_channels=3)
    return processor(drawn(digits, "train", COUNT)["image"][:], return_tensors="pt")["pixel_values"]


@torch.no_grad()
def test_the_script_encodes_images_and_their_mirror_images(encoded, vae, digits):
    images, folder = pixels_of(digits), LatentFolder(encoded / "latents")
    for view, pixels in enumerate((images, images.flip(-1))):
        expected = encoded_by(vae, pixels).numpy()
        np.testing.assert_allclose(folder.latents("train", view).astype(np.float32), expected, rtol=2e-3, atol=1e-4)
    assert np.array_equal(folder.labels("train"), drawn(digits, "train", COUNT)["label"][:])
    index = folder.index
    assert index["names"] == [str(i) for i in range(10)] and index["vae_source"] == str(encoded / "vae")
    assert index["dataset"] == {"name": digits.name, "train_split": "train", "num_images": COUNT}


def test_nothing_is_computed_twice(encoded, vae, images, caplog):
    caplog.set_level(logging.INFO)
    files = {path: path.stat().st_mtime_ns for path in (encoded / "latents").glob("train-?.npy")}
    options = EncodingOptions(max_train_samples=COUNT, mirror=True, output_dir=encoded / "latents")
    encode(encoded / "vae", images, options)
    encode(vae, images, options)  # the same VAE, as an object
    assert "0.0 MiB of them still to be computed" in caplog.text and "Encoded in" not in caplog.text
    assert len(files) == 2 and all(path.stat().st_mtime_ns == changed for path, changed in files.items())
    with pytest.raises(ValueError, match=r"splits.train.count is 10 there, 9 here; splits.train.images differs"):
        encode(vae, images, options, max_train_samples=9)


def test_latents_are_described_as_the_released_versions_did(encoded, vae, images, digits, tmp_path):
    """Otherwise folders that they wrote could not be continued."""
    digest = hashlib.sha256()
    for image in Dataset.from_parquet(str(digits / "train.parquet")).data.column("image"):
        digest.update(hashlib.sha256(image["bytes"].as_py()).digest())
    index = encode(vae, images, mirror=True, output_dir=tmp_path / "cut").index
    assert index["shape"] == [4, 8, 8] and index["sample_posterior"] is False and index["seed"] is None
    assert index["vae_fingerprint"] == fingerprint(vae, dtype=torch.float32)
    preprocessing = DDAEImageProcessor(size={"height": SIDE, "width": SIDE}, num_channels=3).to_dict()
    assert "do_center_crop" in preprocessing
    known = {"count": len(images["train"]), "views": 2, "images": digest.hexdigest(), "changes": {"mirror": True}}
    cut = preprocessing | {"do_center_crop": True}
    assert index["splits"] == {"train": known | {"preprocessing": json.loads(json.dumps(cut))}}
    squashed = encode(vae, images, center_crop=False, output_dir=tmp_path / "squashed").index
    del preprocessing["do_center_crop"]  # version 0.1.0 knew of none
    assert squashed["splits"]["train"]["preprocessing"] == json.loads(json.dumps(preprocessing))


@torch.no_grad()
def test_a_notebook_encodes_its_own_images_by_its_own_vae(digits, tmp_path, capsys):
    part = drawn(digits, "train", COUNT)
    vae = make_vae().train().to(torch.bfloat16)
    with quiet(capsys):
        images = Images.open({"train": (part["image"][:], part["label"][:])})
        folder = encode(vae, images, output_dir=tmp_path, sample_posterior=True, seed=3, batch_size=3)
    assert vae.dtype == torch.bfloat16 and vae.training  # as it was
    assert folder.latents("train").shape == (COUNT, 4, 8, 8)
    assert np.array_equal(folder.labels("train"), part["label"][:])


def test_images_without_labels_are_encoded_without(encoded, digits, tmp_path):
    Dataset.from_parquet(str(digits / "train.parquet")).select(range(3)).remove_columns("label").to_parquet(
        tmp_path / "images.parquet"
    )
    options = ["--vae", encoded / "vae", "--dataset_name", tmp_path / "images.parquet"]
    commands.run("encode", *options, "--sample_posterior", "--output_dir", tmp_path / "out")
    index = json.loads((tmp_path / "out" / "latents.json").read_text())
    assert index["names"] is None and index["sample_posterior"] is True
    assert not list((tmp_path / "out").glob("*labels*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resolution", "15"], "resolution is 15: it must be a multiple of 2"),
        (["--batch_size", "0"], "batch_size is 0: it must be at least 1"),
        (["--seed", "-1"], "seed is -1: it must be at least 0"),
        (["--vae", "nowhere/at/all"], "is not a folder"),
        (["--label_column", "image"], "no column of labels 'image'"),
        (["--train_split", "validation"], "has no split 'validation'"),
        (["--output_dir", f"{__file__}/x"], f"output_dir is {__file__}/x, and {__file__} is a file: give a folder"),
    ],
)
def test_what_cannot_be_encoded_is_refused_first(encoded, digits, tmp_path, capsys, options, message):
    arguments = ["--vae", str(encoded / "vae"), "--dataset_name", str(digits), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as refusal:
        commands.run("encode", *arguments, *options)
    assert message in str(refusal.value) + capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_stream_is_refused_in_words(vae, digits, tmp_path):
    with pytest.raises(ValueError, match="leave out streaming"):
        encode(vae, Images.open(digits, streaming=True), output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_option_that_there_is_not_gets_the_nearest(vae, images):
    with pytest.raises(ValueError, match="there is no option 'mirrored': the nearest are mirror"):
        encode(vae, images, mirrored=True)


def test_a_full_disk_and_damaged_latents_are_told_and_the_rest_stays(vae, images, tmp_path, monkeypatch):
    Usage = namedtuple("Usage", "total used free")
    options = EncodingOptions(max_train_samples=COUNT, mirror=True, output_dir=tmp_path)
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda path: Usage(10, 10, 0))
        with pytest.raises(OSError, match=r"are needed in .*, where 0.0 MiB are free: give another folder"):
            encode(vae, images, options)
    whole = np.array(encode(vae, images, options).latents("train"))
    path = tmp_path / "train-1.npy"
    content = path.read_bytes()
    path.write_bytes(content[:-8] + bytes(8))
    folder = encode(vae, images, options)
    with pytest.raises(ValueError, match=r"train-1.npy is damaged .* Delete this file"):
        folder.latents("train", 1)
    assert np.array_equal(folder.latents("train"), whole)
    path.unlink()
    encode(vae, images, options)
    assert path.read_bytes() == content


def test_an_interrupted_run_goes_on_and_leaves_the_vae_as_it_was(vae, images, tmp_path, monkeypatch):
    options = EncodingOptions(max_train_samples=COUNT, batch_size=4, output_dir=tmp_path / "parts")
    brief, calls = make_vae().to(torch.bfloat16), []

    def stop(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt

    hook = brief.encoder.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        encode(brief, images, options)
    assert brief.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="has 8 of 10 latents"):
        LatentFolder(tmp_path / "parts").latents("train")
    (path,) = (tmp_path / "parts").glob("*.npy.partial")
    content = path.read_bytes()
    path.write_bytes(bytes(len(content)))
    with pytest.raises(ValueError, match="train-0.npy.partial is damaged"):
        encode(brief, images, options)
    path.write_bytes(content)
    found = encode(brief, images, options).latents("train")
    assert len(calls) == 4
    hook.remove()
    whole = encode(brief, images, dataclasses.replace(options, output_dir=str(tmp_path / "whole")))
    assert np.array_equal(found, whole.latents("train"))


def test_latents_stand_in_for_the_images_that_they_are_of(vae, images, encoded):
    folder, train = LatentFolder(encoded / "latents"), images["train"].take(COUNT)
    inputs = LatentInputs(train, folder, "train")
    rows = np.array([3, 0])
    for view in range(5):  # epochs beyond the views begin again
        wanted = torch.from_numpy(folder.latents("train", view % 2)[rows]).float()
        assert torch.equal(inputs.read(rows, view), wanted)
    assert len(inputs) == COUNT and np.array_equal(inputs.labels, train.labels) and inputs.names == train.names
    names = ("vae", "vae_fingerprint", "shape", "sample_posterior", "seed")
    assert inputs.identity == {name: folder.index[name] for name in names} | folder.index["splits"]["train"]
    with pytest.raises(ValueError, match="has no latents of these train images"):
        LatentInputs(images["train"].take(COUNT - 1), folder, "train")
    with pytest.raises(ValueError, match="has no latents of these test images"):
        LatentInputs(train, folder, "test")
