"""Every experiment takes the same images of a data set, and gives them the same classes."""

import json
import warnings

import numpy as np
import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, Value
from diffusers import DDPMScheduler

from ddae_hf import DDAEImageProcessor, DDAEPipeline
from ddae_hf.experiments import CurveOptions, correspondences, evaluation, probing, training_curve
from ddae_hf.experiments.encoding import encode
from ddae_hf.experiments.images import DataOptions, ImageInputs, labelled_splits
from ddae_hf.experiments.models import open_model
from ddae_hf.experiments.pairs import Pair
from ddae_hf.experiments.pretraining import PretrainingOptions
from ddae_hf.experiments.pretraining_data import training_data

from . import commands
from .conftest import make_unet, make_vae, put, splits_of
from .test_classes import tables


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


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    denoiser = make_unet(in_channels=1, out_channels=1)
    DDAEPipeline.for_denoiser(denoiser, DDPMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vae():
    return make_vae(in_channels=1, out_channels=1, sample_size=8)


def test_few_images_of_a_folder_are_of_all_classes_and_the_same_everywhere(sorted_digits, checkpoint, tmp_path):
    images = DataOptions(train_data_dir=sorted_digits).open()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train, test = labelled_splits(images, splits_of(max_train_samples=40, max_test_samples=20))
    for found, count in ((train, 40), (test, 20)):
        assert len(found) == count and set(found.labels) == set(range(10))
    for class_conditional in (False, True):
        options = PretrainingOptions(max_train_samples=40, class_conditional=class_conditional)
        known = training_data(images, options)
        assert known.rows.hash == train.hash and known.num_classes == 10 * class_conditional
    options = evaluation.EvaluationOptions(extractor="inception", max_reference_samples=40)
    assert evaluation.real_images(images, options, 4)["reference"].images.hash == train.hash
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(correspondences, "tqdm", lambda pixels, desc: seen.append(pixels) or exit("enough"))
        with pytest.raises(SystemExit, match="enough"):
            data = ["--train_data_dir", sorted_digits, "--max_samples", 40]
            commands.run("correspondence", "--model_name_or_path", checkpoint, *data, "--output_dir", tmp_path / "out")
    processor = DDAEImageProcessor.from_pretrained(checkpoint)
    assert np.allclose(seen[0], ImageInputs(train, processor).read(range(40)))


def test_latents_of_few_images_are_those_of_the_same_images(sorted_digits, vae, tmp_path):
    """A denoiser of latents is trained on the images that one of pixels is trained on."""
    vae.save_pretrained(tmp_path / "vae")
    images = DataOptions(train_data_dir=sorted_digits).open()
    folder = encode(tmp_path / "vae", images, output_dir=tmp_path / "latents")
    found = images["train"].take(12)
    options = PretrainingOptions(max_train_samples=12, class_conditional=True)
    latents = training_data(folder, options).rows.with_format(None)
    assert latents["labels"][:] == found.labels.tolist()
    assert images["train"].select(latents["index"][:]).hash == found.hash
    with pytest.warns(UserWarning, match="The split 'train' has no images of 5 of the 10 classes"):
        training_data(folder, PretrainingOptions(max_train_samples=5, class_conditional=True))


def test_what_a_sweep_measures_on_few_images_is_measured_on_all_classes(
    sorted_digits, checkpoint, tmp_path, monkeypatch
):
    images = DataOptions(train_data_dir=sorted_digits).open()
    options = CurveOptions(layers=["mid_block"], sigmas=[0.1], alignment=True, max_selection_samples=150)
    train, test = labelled_splits(images, options)
    processor = DDAEImageProcessor.from_pretrained(checkpoint)
    inputs = [ImageInputs(each, processor) for each in (train, test)]
    monkeypatch.setattr(probing, "ALIGNMENT_IMAGES", 15)
    monkeypatch.setattr(training_curve, "LOSS_IMAGES", 15)
    prober = probing.Prober(open_model(checkpoint), *inputs, options, ["mid_block"], [0.1], tmp_path)
    rows = []
    features, parts = prober.features, inputs[1].parts
    monkeypatch.setattr(prober, "features", lambda *a, **k: rows.append(k["rows"]) or features(*a, **k))
    prober.add_other_figures([Pair(layer="mid_block", sigma=0.1)], 0.1)
    monkeypatch.setattr(inputs[1], "parts", lambda *a, **k: rows.extend(part for part, _ in a[0]) or parts(*a, **k))
    training_curve.test_loss(checkpoint, inputs[1], options)
    few = [some for some in rows if some is not None and len(some) == 15]
    assert [len(set(each.labels[some])) for each, some in zip((train, test), few, strict=True)] == [10, 10]


def test_experiments_that_need_no_labels_take_images_without(checkpoint, tmp_path):
    put(tmp_path / "photos", "train/0.png", "train/1.png", "test/0.png")
    make_vae().save_pretrained(tmp_path / "vae")
    data = ["--train_data_dir", tmp_path / "photos", "--output_dir"]
    model = ["--model_name_or_path", checkpoint, "--layers", "mid_block"]
    commands.run("export", *model, *data, tmp_path / "features")
    assert list(pd.read_parquet(tmp_path / "features" / "features.parquet")) == ["index", "mid_block"]
    commands.run("encode", "--vae", tmp_path / "vae", *data, tmp_path / "latents")
    assert json.loads((tmp_path / "latents" / "latents.json").read_text())["names"] is None


@pytest.mark.parametrize(
    ("kind", "labels", "words"),
    [
        (Value("int64"), [900000, 0, 100000, 0], ["900000", "0", "100000", "0"]),
        (Value("string"), ["b", "a, c", "b"], ["b", "a, c", "b"]),
        (ClassLabel(names=["x", "y", "z"]), [2, 0, 2], ["z", "x", "z"]),
    ],
)
@pytest.mark.filterwarnings("ignore:The split")
def test_classes_are_the_same_in_training_latents_and_features(checkpoint, vae, tmp_path, kind, labels, words):
    folder = tmp_path / "tables"
    folder.mkdir()
    images = tables(folder, kind, train=labels, test=labels[:2])
    names = images["train"].names
    assert [names[label] for label in images["train"].labels] == words
    known = training_data(images, PretrainingOptions(class_conditional=True))
    assert known.names == names and known.num_classes == len(names)
    encode(vae, images, output_dir=tmp_path / "latents")
    assert np.load(tmp_path / "latents" / "train-labels.npy").tolist() == images["train"].labels.tolist()
    assert json.loads((tmp_path / "latents" / "latents.json").read_text())["names"] == names
    data = ["--dataset_name", folder, "--cache_dir", folder / ".cache", "--label_column", "kind"]
    model = ["--model_name_or_path", checkpoint, "--layers", "mid_block"]
    commands.run("export", *model, *data, "--output_dir", tmp_path / "features")
    assert json.loads((tmp_path / "features" / "features.json").read_text())["class_names"] == names
    exported = pd.read_parquet(tmp_path / "features" / "features.parquet")
    assert exported["label"].tolist() == images["train"].labels.tolist()
