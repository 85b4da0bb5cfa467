"""Sweeps as a user runs them, of a checkpoint and over those of a training run, at tiny size, on real digits."""

import dataclasses
import errno
import io
import json
import os
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors import SafetensorError
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from ddae_hf import DDAEForImageClassification, DDAEImageProcessor, DDAEModel, DDAEPipeline
from ddae_hf.commands import sweep as command
from ddae_hf.commands.parsing import parse
from ddae_hf.experiments import (
    Images,
    SweepOptions,
    classify_noisy,
    export_features,
    features,
    finetune,
    pairs,
    probing,
    sweep,
    sweep_run,
    sweeping,
    training_curve,
)
from ddae_hf.experiments.features import FeatureCache
from ddae_hf.experiments.probing import classify
from ddae_hf.experiments.results import CurveReport, ProbeReport
from ddae_hf.hidden_states import decoder_layer_names, layer_names
from ddae_hf.weights import fingerprint

from . import commands
from .conftest import make_dit, make_unet
from .quiet import quiet

FEW = {"max_train_samples": 100, "max_test_samples": 50, "sigmas": [0.1], "num_noise_seeds": 1, "layers": ["mid_block"]}
GREY = {"in_channels": 1, "out_channels": 1, "block_out_channels": (32, 32)}
SCHEDULERS = {"ddpm": DDIMScheduler, "edm": EDMEulerScheduler, "flow": FlowMatchEulerDiscreteScheduler}


def save_checkpoint(folder, network="unet", framework="ddpm", seed=0, **options):
    """Random networks have features too."""
    if network == "unet":
        denoiser = make_unet(seed, **GREY, **options)
    else:
        denoiser = make_dit(seed, in_channels=1, num_layers=2, num_embeds_ada_norm=0)
        for parameter in denoiser.parameters():  # diffusers' own start ends in zeros
            torch.nn.init.normal_(parameter, std=0.1)
    DDAEPipeline.for_denoiser(denoiser, SCHEDULERS[framework]()).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def run(checkpoint, digits, folder, *options):
    arguments = ["--model_name_or_path", checkpoint, "--dataset_name", str(digits), "--output_dir", str(folder)]
    arguments += ["--max_train_samples", "300", "--max_test_samples", "100", "--sigmas", "0.1", "2"]
    arguments += ["--batch_size", "50", "--layers", "decoder", "--num_noise_seeds", "1"]
    commands.run("sweep", *arguments, *options)
    return json.loads((Path(folder) / "eval_results.json").read_text())


def opened(checkpoint, digits, **changes):
    """What a sweep of a checkpoint reads: the model, its inputs and their options."""
    few = {"max_train_samples": 300, "max_test_samples": 100, "sigmas": [0.1, 2.0], "batch_size": 50}
    options = SweepOptions(**few | {"layers": ["decoder"], "num_noise_seeds": 1} | changes)
    processor = DDAEImageProcessor.from_pretrained(checkpoint)
    parts = sweeping.labelled_splits(Images.open(str(digits)), options)
    inputs = [sweeping.changed_inputs(images, processor, options) for images in parts]
    return sweeping.open_for(checkpoint, options), *inputs, processor, options


@pytest.fixture(scope="module")
def swept(checkpoint, digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("swept")
    return folder, run(checkpoint, digits, folder)


@pytest.mark.parametrize(("network", "framework"), [("unet", "flow"), ("dit", "edm")])
def test_every_pair_is_probed_and_the_best_becomes_a_classifier(network, framework, digits, tmp_path):
    checkpoint = save_checkpoint(tmp_path / "checkpoint", network, framework)
    options = ["--knn", "--alignment", "--few_labels", "1", "5", "--num_draws", "2", "--num_noise_seeds", "2"]
    report = run(checkpoint, digits, tmp_path / "sweep", *options)
    pairs = {(row["layer"], row["sigma"]): row for row in report["pairs"]}
    denoiser = DDAEPipeline.from_pretrained(checkpoint).denoiser
    assert pairs.keys() == {(layer, sigma) for layer in decoder_layer_names(denoiser) for sigma in (0.1, 2)}
    assert report["fingerprint"] == fingerprint(denoiser)
    best = report["best"]
    assert best["validation_accuracy"] == max(row["validation_accuracy"] for row in pairs.values())
    for row in pairs.values():
        assert row["validation_accuracy"] == max(row["by_l2"].values()) == row["by_l2"][str(row["l2"])]
        assert 0 < row["knn_20"] < 1 and 0 < row["knn_200"] < 1
        assert row["uniformity"] < 0 < row["alignment"]
    # What noise hides is told apart less.
    for layer in decoder_layer_names(denoiser):
        assert pairs[layer, 2]["validation_accuracy"] < pairs[layer, 0.1]["validation_accuracy"]
        assert pairs[layer, 2]["alignment"] > pairs[layer, 0.1]["alignment"]
    layers = decoder_layer_names(denoiser)
    clear, hidden = (np.mean([pairs[layer, sigma]["knn_20"] for layer in layers]) for sigma in (0.1, 2))
    assert hidden <= clear
    assert list(report["test_accuracies"]) == ["0", "1"] and 0.5 < report["test_accuracies"]["0"] <= 1
    few = report["few_label_test_accuracies"]
    assert len(few["1"]) == 2 and np.mean(few["1"]) < np.mean(few["5"]) < report["test_accuracies"]["0"]
    model = DDAEForImageClassification.from_pretrained(tmp_path / "sweep" / "classifier")
    assert (model.config.layer, model.config.sigma) == (best["layer"], best["sigma"])
    assert report["saved_classifier_test_accuracy"] == pytest.approx(report["test_accuracies"]["0"], abs=0.1)
    for name in ("heat_map.png", "accuracy_over_sigma.png"):
        assert min(Image.open(tmp_path / "sweep" / name).size) > 200


def test_the_chosen_probe_is_scikit_learns_on_the_cached_features(swept, checkpoint, digits):
    """The whole way from cached features to test predictions."""
    folder, report = swept
    best, found = report["best"], {}
    for path in (folder / "features").glob("*/identity.json"):
        identity = json.loads(path.read_text())
        if identity["sigma"] != best["sigma"]:
            continue
        split = "test" if identity["view"] == 1 else "train"
        found[split] = np.load(path.parent / f"{best['layer']}.npy").astype(np.float64)
    assert {name: len(values) for name, values in found.items()} == {"train": 300, "test": 100}
    images = Images.open(str(digits))
    labels = {split: images[split].take(count).labels for split, count in {"train": 300, "test": 100}.items()}
    scaler = StandardScaler().fit(found["train"])
    model = LogisticRegression(C=1 / (best["l2"] * 300), max_iter=5000)
    predicted = model.fit(scaler.transform(found["train"]), labels["train"]).predict(scaler.transform(found["test"]))
    ours = np.load(folder / "test_predictions.npy")
    assert (predicted == ours).mean() >= 0.98
    expected = (ours == labels["test"]).mean()
    assert report["test_accuracies"]["0"] == pytest.approx(expected)


def test_held_out_images_are_not_fitted_on_nor_test_images_chosen_on(checkpoint, digits, tmp_path):
    model, train, test, *rest = opened(checkpoint, digits)
    prober = sweeping.check_sweep(model, train, test, *rest, tmp_path)
    assert len(prober.held_out) == 60
    assert sorted([*prober.held_out, *prober.fitted]) == list(range(300))
    assert train.identity["images"] != test.identity["images"]


def test_a_second_run_and_another_probe_read_the_features_that_are_there(
    swept, checkpoint, digits, tmp_path, monkeypatch
):
    (folder, first), calls = swept, []
    options = ["--features_dir", str(folder / "features")]
    monkeypatch.setattr("ddae_hf.experiments.features.batch_features", lambda *a, **k: calls.append(a))
    again = run(checkpoint, digits, tmp_path, *options)
    assert again["pairs"] == first["pairs"] and again["test_accuracies"] == first["test_accuracies"]
    other = run(checkpoint, digits, tmp_path, *options, "--l2", "0.03", "--few_labels", "2")
    assert other["pairs"] != first["pairs"]
    assert not calls


def test_an_interrupted_sweep_gives_what_an_uninterrupted_one_gives(swept, checkpoint, digits, tmp_path, monkeypatch):
    expected = swept[1]
    original, calls = FeatureCache.kept, []

    def stop(self, batches, *arguments, **options):
        def some(start, missing):
            for batch in batches(start, missing):
                calls.append(len(next(iter(batch.values()))))
                if len(calls) == 9:  # in the second noise level
                    raise KeyboardInterrupt
                yield batch

        return original(self, some, *arguments, **options)

    monkeypatch.setattr(FeatureCache, "kept", stop)
    with pytest.raises(SystemExit, match="130"):
        run(checkpoint, digits, tmp_path)
    resumed = run(checkpoint, digits, tmp_path)
    assert sum(calls) == 2 * 300 + 100 + 50  # the batch that was interrupted is read once more
    assert resumed["pairs"] == expected["pairs"] and resumed["test_accuracies"] == expected["test_accuracies"]


def test_a_level_that_is_done_is_not_probed_again_unless_its_options_change(swept, checkpoint, digits, monkeypatch):
    folder, report = swept
    given, probed = opened(checkpoint, digits), []
    prober = sweeping.check_sweep(*given, folder / "features")
    monkeypatch.setattr(prober, "level", lambda sigma: probed.append(sigma) or [])
    kept = [dataclasses.asdict(pair) for pair in sweeping.sweep_levels(prober, folder / "levels")]
    assert [{name: pair[name] for name in row} for pair, row in zip(kept, report["pairs"], strict=True)] == report[
        "pairs"
    ]
    assert not probed
    prober.sigmas = [2.0, 3.0]
    sweeping.sweep_levels(prober, folder / "levels")
    assert probed == [3.0]
    prober.labels["train"] = prober.labels["train"][::-1].copy()
    sweeping.sweep_levels(prober, folder / "levels")
    assert probed == [3.0, 2.0, 3.0]


def test_the_shape_over_noise_levels_is_kept_with_the_levels(checkpoint, digits, tmp_path):
    """What became of each image is in their files and not in the report; of earlier versions' files it is unknown."""
    several = ["--sigmas", "5", "0.1", "2", "--layers", "mid_block"]
    report = run(checkpoint, digits, tmp_path, *several)
    curve = report["noise_curve"]
    by_level = {pair["sigma"]: pair["validation_accuracy"] for pair in report["pairs"]}
    assert curve["sigmas"] == [0.1, 2, 5] and curve["accuracies"] == [by_level[sigma] for sigma in curve["sigmas"]]
    assert curve["layer"] == "mid_block" and curve["shape"] == "falling"  # what noise hides is told apart less
    assert "correct" not in report["pairs"][0] and report["best"]["temperature"] == report["calibration"]["temperature"]
    again = run(checkpoint, digits, tmp_path, *several)
    assert again["noise_curve"] == curve and again["calibration"] == report["calibration"]
    for path in (tmp_path / "levels").iterdir():
        level = json.loads(path.read_text())
        for row in level["rows"]:
            assert len(row.pop("correct")) == 2 * 8 and row.pop("temperature") > 0  # bits of 60 images
        path.write_text(json.dumps(level | {"sha256": pairs._hash_of(level["rows"])}))
    old = run(checkpoint, digits, tmp_path, *several)
    assert "noise_curve" not in old and "temperature" not in old["calibration"]
    assert old["calibration"]["calibration_error"] == report["calibration"]["calibration_error"]
    assert old["test_accuracies"] == report["test_accuracies"] and Image.open(tmp_path / "reliability.png").size


@pytest.mark.parametrize(
    "name", ["levels/sigma-2.0.json", "features/*/rows.json", "features/*/up_blocks.1.resnets.1.npy"]
)
def test_what_is_damaged_ends_a_sweep_with_the_files_name(swept, checkpoint, digits, tmp_path, name):
    shutil.copytree(swept[0], tmp_path / "out")
    if "features" in name:
        shutil.rmtree(tmp_path / "out" / "levels")
    paths = sorted((tmp_path / "out").glob(name))
    for path in paths:
        path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(SystemExit, match=f"({'|'.join(map(str, paths))}) is damaged .*delete this folder"):
        run(checkpoint, digits, tmp_path / "out")


def test_figures_of_a_level_that_were_changed_are_not_used(swept, checkpoint, digits, tmp_path):
    shutil.copytree(swept[0], tmp_path / "out")
    run(checkpoint, digits, tmp_path / "out")
    path = tmp_path / "out" / "levels" / "sigma-2.0.json"
    level = json.loads(path.read_text())
    level["rows"].append({"layer": "mid_block", "sigma": 2.0, "validation_accuracy": 1.0})
    path.write_text(json.dumps(level))
    with pytest.raises(SystemExit, match=f"{path} is damaged .its checksum"):
        run(checkpoint, digits, tmp_path / "out")


def test_more_views_are_trained_on_and_averaged(checkpoint, digits, tmp_path):
    options = ["--sigmas", "1", "--layers", "mid_block"]
    one = run(checkpoint, digits, tmp_path, *options)
    many = run(checkpoint, digits, tmp_path, *options, "--num_views", "4")
    assert many["test_accuracies"]["0"] > one["test_accuracies"]["0"] + 0.02
    cropped = run(checkpoint, digits, tmp_path, *options, "--num_views", "2", "--random_crop", "2")
    assert cropped["pairs"] != many["pairs"]
    views = sorted(json.loads(p.read_text())["view"] for p in (tmp_path / "features").glob("*/identity.json"))
    assert views == sorted([*range(8), 2, 3])  # the views that are changed are others than those that are not


@pytest.mark.parametrize("protocol", ["paper", "batch_norm"])
def test_online_protocols_train_on_fresh_noise(protocol, checkpoint, digits, tmp_path):
    options = ["--sigmas", "0.1", "--protocol", protocol, "--num_train_epochs", "5", "--learning_rate", "0.3"]
    options += ["--no-random_flip", "--random_crop", "0", "--train_batch_size", "32", "--layers", "mid_block"]
    options += ["--max_train_samples", "200", "--batch_size", "200"]
    report = run(checkpoint, digits, tmp_path, *options)
    assert report["test_accuracies"]["0"] > 0.2
    assert not (tmp_path / "features").exists()
    test = Images.open(str(digits))["test"].take(100)
    classifier = DDAEForImageClassification.from_pretrained(tmp_path / "classifier").eval()
    predicted = classify(classifier, test, DDAEImageProcessor.from_pretrained(checkpoint))
    accuracy = (predicted == test.labels).mean()
    assert accuracy == report["saved_classifier_test_accuracy"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num_views", "0"], "num_views is 0: it must be at least 1"),
        (["--num_draws", "0"], "num_draws is 0: it must be at least 1"),
        (["--batch_size", "0"], "batch_size is 0: it must be at least 1"),
        (["--protocol", "paper", "--num_train_epochs", "0"], "num_train_epochs is 0: it must be at least 1"),
        (["--noise_seed", "-1"], "noise_seed is -1: it must be at least 0"),
        (["--random_crop", "-1"], "random_crop is -1: it must be at least 0"),
        (["--learning_rate", "0"], "learning_rate is 0.0: it must be positive"),
        (["--validation_fraction", "1"], "must be above 0 and below 1"),
        (["--l2", "0"], "l2 is 0.0: it must be positive"),
        (["--few_labels", "0"], "few_labels is 0: it must be at least 1"),
        (["--max_train_samples", "-5"], "max_train_samples is -5: it must be at least 1"),
        (["--max_selection_samples", "1"], "max_selection_samples is 1: it must be at least 2"),
        (["--random_flip"], "give num_views 2 or more"),
        (["--protocol", "paper", "--num_views", "2"], "is for logistic regression, not for the protocol paper"),
        (["--protocol", "batch_norm", "--baselines"], "is for logistic regression, not for the protocol batch_norm"),
        (["--protocol", "best"], "invalid choice"),
        (["--checkpoints", "runs"], "Give one of model_name_or_path and checkpoints"),
        (["--extractor", "inception"], "extractor measures samples over a training run: give"),
        (["--output_dir", ""], "output_dir is empty: give a folder"),
        (["--features_dir", ""], "features_dir is empty: give a folder"),
        (["--layers", "up_blocks.7"], "no layer 'up_blocks.7'"),
        (["--sigmas", "1000"], "sigma 1000.0 is outside the schedule"),
        (["--sigmas", "-1"], "sigmas is -1.0: it must be at least 0"),
        (["--few_labels", "100"], "100 labels a class are asked for: allowed are 1 to"),
        (["--test_split", "train"], "test_split is 'train', like train_split"),
        (["--validation_fraction", "0.999"], "leave 0 to fit on and 300 to choose on"),
        (["--knn", "--max_train_samples", "24"], "leave 19 to fit on"),
        (["--alignment", "--max_train_samples", "5"], "1 and 2 are needed"),
        (["--num_views", "2", "--random_crop", "8"], "random_crop is 8: it must be below the sides of the images"),
        (["--model_name_or_path", "/nowhere/at/all"], "is not a folder"),
    ],
)
def test_what_cannot_work_is_refused_at_once(checkpoint, digits, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as stopped:
        run(checkpoint, digits, tmp_path / "out", *options)
    assert message in str(stopped.value) + capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_the_data_or_the_network_forbid_is_refused_at_once(checkpoint, digits, tmp_path):
    labelled = save_checkpoint(tmp_path / "conditional", num_class_embeds=11)
    with pytest.raises(SystemExit, match="without a null class: give null_class"):
        run(labelled, digits, tmp_path / "out")
    train = Images.open(str(digits))["train"]
    same = Images.open({"train": train.dataset, "other": train.dataset})
    with pytest.raises(ValueError, match="are the same images"):
        sweep(checkpoint, same, test_split="other")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="output_dir is .* is a file: give a folder"):
        SweepOptions(output_dir=tmp_path / "file")
    with pytest.raises(ValueError, match="here is no option 'sigma': the nearest is sigmas"):
        sweep(checkpoint, same, sigma=[0.1])
    assert not list(tmp_path.rglob("*.npy"))


ONE = {"sigmas": [0.1], "layers": ["mid_block"]}
SMALL = {"max_train_samples": 200, "max_test_samples": 60, "sigmas": [0.1, 1.0], "num_noise_seeds": 1}


def test_a_notebook_sweeps_a_path_or_an_object_and_leaves_nothing(checkpoint, digits, tmp_path, capsys):
    """As the package's documentation has it, without a folder."""
    images = Images.open(str(digits))
    model = DDAEModel.from_pretrained(checkpoint)
    before = {path for path in tmp_path.parent.iterdir()}
    with quiet(capsys):
        result = sweep(checkpoint, images, **SMALL, few_labels=[2], num_draws=2)
        other = sweep(model, images, **SMALL)
    assert {path for path in tmp_path.parent.iterdir()} == before
    assert other.pairs == result.pairs and other.test_accuracies == result.test_accuracies
    layers = {pair.layer for pair in result.pairs}
    assert layers == set(layer_names(model.denoiser)) and (result.best.layer in layers)  # encoder, middle, decoder
    assert "layer and noise level were chosen with all labels" in result.table()
    result.heat_map().savefig(tmp_path / "map.png")
    assert min(Image.open(tmp_path / "map.png").size) > 200
    shown = Image.open(io.BytesIO(result.heat_map()._repr_png_()))  # as the last line of a cell is
    assert shown.format == "PNG" and min(shown.size) > 200
    pixels = result.processor(images["test"].pil(range(60)), return_tensors="pt")["pixel_values"]
    for found, folder in ((result, tmp_path / "of_path"), (other, tmp_path / "of_object")):
        found.save(folder)
        (found.classifier if found is result else found.classifier).save_pretrained(folder / "whole")
        logits = [
            DDAEForImageClassification.from_pretrained(where)(pixels).logits.detach()
            for where in (folder, folder / "whole")
        ]
        assert torch.equal(*logits)
        assert torch.equal(logits[0], result.classifier(pixels).logits)
        assert ProbeReport.read(folder).best == result.best
        assert len(np.load(folder / "test_predictions.npy")) == 60
        for name in ("heat_map.png", "accuracy_over_sigma.png", "confusion.png", "reliability.png"):
            assert min(Image.open(folder / name).size) > 200
        assert DDAEPipeline.from_pretrained(folder)(1, num_inference_steps=1, output_type="np").images.shape == (
            1,
            8,
            8,
            1,
        )


@pytest.mark.parametrize("source", [make_unet(**GREY), DDAEPipeline, None], ids=["unet", "pipeline", "none"])
def test_what_is_no_model_is_refused(source, checkpoint, digits):
    model = DDAEPipeline.from_pretrained(checkpoint) if source is DDAEPipeline else source
    for experiment in (sweep, export_features, classify_noisy, finetune):
        with pytest.raises(ValueError, match=f"model is of type {type(model).__name__}: allowed are a checkpoint's"):
            experiment(model, Images.open(str(digits)))


@pytest.mark.parametrize("kind", ["path", "DatasetDict"])
def test_a_sweep_opens_images_that_are_not_open(kind, checkpoint, digits):
    opened = Images.open(str(digits))
    splits = {name: opened[name].dataset for name in opened.splits}
    result = sweep(checkpoint, str(digits) if kind == "path" else datasets.DatasetDict(splits), **SMALL | ONE)
    assert result.pairs == sweep(checkpoint, opened, **SMALL | ONE).pairs
    for wrong in (None, 3):
        with pytest.raises(ValueError, match=f"An object of type {type(wrong).__name__} came (as|among) images"):
            sweep(checkpoint, wrong)


@pytest.mark.parametrize("training", [True, False])
def test_a_model_keeps_its_mode(training, checkpoint, digits, tmp_path):
    model = DDAEModel.from_pretrained(checkpoint).train(training)
    images = Images.open(str(digits))
    expected = sweep(checkpoint, images, **SMALL | ONE).pairs
    assert sweep(model, images, **SMALL | ONE).pairs == expected and model.training == training
    assert model.denoiser.training == training
    export_features(model, images, max_samples=10, output_dir=tmp_path)
    with pytest.raises(ValueError, match="no layer"):
        classify_noisy(model, images, layers=["nowhere"])
    assert model.training == training and model.denoiser.training == training


def fails(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_ends_a_sweep_with_a_sentence_that_names_the_folder(checkpoint, digits, tmp_path, monkeypatch):
    with monkeypatch.context() as full:
        full.setattr("ddae_hf.experiments.arrays.os.fsync", fails)
        with pytest.raises(
            SystemExit, match=f"^{tmp_path}/features/.* could not be written: No space left on device. "
        ):
            run(checkpoint, digits, tmp_path)
    original = Path.write_text
    with monkeypatch.context() as full:
        full.setattr(
            Path, "write_text", lambda path, *a, **k: (fails if "sigma" in path.name else original)(path, *a, **k)
        )
        with pytest.raises(SystemExit, match=f"^{tmp_path}/levels/sigma-0.1.json could not be written: No space left"):
            run(checkpoint, digits, tmp_path)
    message = "Error while serializing: I/O error: No space left on device (os error 28)"
    with monkeypatch.context() as full:
        full.setattr(sweeping, "save_classifier", lambda *a: (_ for _ in ()).throw(SafetensorError(message)))
        with pytest.raises(
            SystemExit, match=f"^{tmp_path}/classifier could not be written to: .*os error 28.*Make room"
        ):
            run(checkpoint, digits, tmp_path)
    assert ProbeReport.read(tmp_path).best == ProbeReport.read(tmp_path / "classifier").best
    assert len(list((tmp_path / "levels").iterdir())) == 2
    assert not list(tmp_path.rglob("*.json.*partial"))
    assert run(checkpoint, digits, tmp_path)["pairs"]


def test_a_damaged_image_ends_a_sweep_with_its_row(checkpoint, digits, tmp_path):
    train = Images.open(str(digits))["train"].take(50)
    files = train.dataset.cast_column("image", datasets.Image(decode=False))[:]
    files["image"][7] = {"bytes": b"no image", "path": None}
    dataset = datasets.Dataset.from_dict(files, features=train.dataset.features)
    images = Images.open({"train": dataset, "test": Images.open(str(digits))["test"].take(20).dataset})
    with pytest.raises(ValueError, match="Image 7 "):
        sweep(checkpoint, images, sigmas=[0.1])


def test_the_network_runs_once_over_the_training_images_of_a_single_pair(checkpoint, digits, monkeypatch):
    seen, original = [], features.batch_features

    def counted(model, images, *arguments, **options):
        seen.append(len(images))
        return original(model, images, *arguments, **options)

    monkeypatch.setattr(features, "batch_features", counted)
    few = {"max_train_samples": 100, "max_test_samples": 40, "sigmas": [0.1], "layers": ["mid_block"]}
    sweep(checkpoint, Images.open(str(digits)), **few, num_noise_seeds=1, max_selection_samples=50)
    assert sum(seen) == 100 + 40


def test_alignment_is_measured_on_few_images_of_all_classes(checkpoint, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(probing, "ALIGNMENT_IMAGES", 15)
    prober = sweeping.check_sweep(*opened(checkpoint, digits, alignment=True), tmp_path)
    original, seen = prober.features, []
    monkeypatch.setattr(prober, "features", lambda *a, **k: seen.append(k["rows"]) or original(*a, **k))
    prober.level(0.1)
    (some,) = [rows for rows in seen if rows is not None]
    assert len(some) == 15 and len(set(prober.labels["train"][some])) == 10


def test_baselines_are_chosen_and_fitted_as_the_network_is(checkpoint, digits):
    images = Images.open(str(digits))
    result = sweep(checkpoint, images, **SMALL, baselines=True, few_labels=[3], num_draws=2, layers=["decoder"])
    pixels, untrained = (result.baselines[name] for name in ("raw pixels", "untrained network"))
    assert pixels.best.layer == "pixels" and untrained.best.layer in {pair.layer for pair in result.pairs}
    assert all(len(probe.few_label_test_accuracies["3"]) == 2 for probe in (pixels, untrained))
    assert pixels.test_accuracies["0"] > 0.6 and "| raw pixels |" in result.table()
    # The checkpoint's weights are random too, but others.
    assert untrained.test_accuracies != result.test_accuracies or untrained.best != result.best
    train, test = (images[split].take(SMALL[f"max_{split}_samples"]) for split in ("train", "test"))
    values = [
        np.stack([np.asarray(image, np.float64).ravel() for image in part.pil(range(len(part)))])
        for part in (train, test)
    ]
    # Pixels are centred alone, of images in [-1, 1].
    values = [2 * part / 255 for part in values]
    inputs = [part - values[0].mean(0) for part in values]
    for scaled, alike in ((inputs, True), ([part / (values[0].std(0) + 1e-9) for part in inputs], False)):
        model = LogisticRegression(C=1 / (pixels.best.l2 * len(train)), max_iter=5000).fit(scaled[0], train.labels)
        assert (pixels.test_accuracies["0"] == pytest.approx(model.score(scaled[1], test.labels), abs=0.005)) == alike


def test_the_configuration_says_what_the_script_takes():
    options = ["--config", "cifar10_cpu_sweep", "--model_name_or_path", "somewhere"]
    _, found, _ = parse(command.KINDS, None, options)
    assert found.layers == ["decoder"] and found.knn and found.few_labels == [1, 5, 10, 100]


@pytest.fixture
def run_folder(checkpoint, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(checkpoint, folder / "checkpoint-20")
    save_checkpoint(folder, seed=1)
    (folder / "train_results.json").write_text(json.dumps({"steps": 3}))
    return folder


def test_a_training_run_is_drawn_over_its_steps(run_folder, digits, tmp_path):
    options = ["--checkpoints", run_folder, "--dataset_name", digits, "--output_dir", tmp_path / "sweep"]
    options += ["--max_train_samples", "100", "--max_test_samples", "50", "--sigmas", "0.1", "--num_noise_seeds", "1"]
    options += ["--extractor", f"ddae:{run_folder / 'checkpoint-20'}", "--num_images", "50"]
    commands.run("sweep", *options, "--num_inference_steps", "2", "--layers", "mid_block")
    points = CurveReport.read(tmp_path / "sweep").points
    assert [point.step for point in points] == [3, 20]
    assert len({point.test_loss for point in points}) == len({point.frechet_distance for point in points}) == 2
    assert min(Image.open(tmp_path / "sweep" / "training_curve.png").size) > 200
    for name in ("eval_results.json", "classifier/config.json", "generation/generation_results.json"):
        assert (tmp_path / "sweep" / "checkpoint-20" / name).is_file()


def test_a_run_is_swept_without_a_folder(run_folder, digits, capsys):
    with quiet(capsys):
        report = sweep_run(run_folder, Images.open(str(digits)), **FEW)
    assert [point.step for point in report.points] == [3, 20] and report.points[0].frechet_distance is None
    assert "| 20 | `mid_block`, sigma 0.1 |" in report.table()


def test_the_loss_is_of_images_of_all_classes(run_folder, digits, monkeypatch):
    monkeypatch.setattr(training_curve, "LOSS_IMAGES", 15)
    seen, original = [], training_curve.Inputs.parts

    def watched(self, parts, **options):
        if options["title"] == "loss on test images":
            seen.append(np.concatenate([self.labels[rows] for rows, _ in parts]))
        return original(self, parts, **options)

    monkeypatch.setattr(training_curve.Inputs, "parts", watched)
    sweep_run(run_folder, Images.open(str(digits)), **FEW)
    assert [len(labels) for labels in seen] == [15, 15] and {len(set(labels)) for labels in seen} == {10}


def test_a_run_that_cannot_be_swept_is_refused_at_once(run_folder, digits, tmp_path):
    options = ["--dataset_name", digits, "--output_dir", tmp_path / "sweep", "--checkpoints"]
    with pytest.raises(SystemExit, match="extractor ddae:nowhere cannot be used"):
        commands.run("sweep", *options, run_folder, "--extractor", "ddae:nowhere")
    with pytest.raises(SystemExit, match="push_to_hub pushes one classifier"):
        commands.run("sweep", *options, run_folder, "--push_to_hub")
    (run_folder / "checkpoint-6").mkdir()
    with pytest.raises(SystemExit, match="checkpoint-6 is not a checkpoint"):
        commands.run("sweep", *options, run_folder)
    with pytest.raises(SystemExit, match="no folder `checkpoint-STEP`"):
        commands.run("sweep", *options, tmp_path)
    assert not (tmp_path / "sweep").exists()


def test_another_pooling_has_features_of_its_own_and_goes_along_with_the_classifier(checkpoint, digits, tmp_path):
    plain = run(checkpoint, digits, tmp_path)
    quarters = run(checkpoint, digits, tmp_path, "--pooling", "mean_2x2")  # what is kept there is of the mean
    assert quarters["pairs"] != plain["pairs"]
    assert "means of the four quarters" in ProbeReport.read(tmp_path).table()
    classifier = DDAEForImageClassification.from_pretrained(tmp_path / "classifier")
    channels = DDAEModel.from_pretrained(checkpoint, layer=quarters["best"]["layer"]).config.hidden_size
    assert classifier.config.pooling == "mean_2x2" and classifier.classifier.in_features == 4 * channels
    tested = quarters["test_accuracies"]["0"]
    assert abs(quarters["saved_classifier_test_accuracy"] - tested) < 0.1
