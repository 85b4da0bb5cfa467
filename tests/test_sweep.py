"""The sweep as a user runs it, at tiny size, on real digits."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import sweep
from data import images_hash
from ddae_hf import DDAEForImageClassification, DDAEImageProcessor, DDAEPipeline
from ddae_hf.hidden_states import decoder_layer_names
from labelled import LabelledImages, classify

from . import scripts
from .conftest import make_dit, make_unet

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
    arguments += [
        "--max_train_samples",
        "300",
        "--max_test_samples",
        "100",
        "--sigmas",
        "0.1",
        "2",
        "--batch_size",
        "50",
    ]
    scripts.run("sweep", *arguments, "--num_noise_seeds", "1", *options)
    return json.loads((Path(folder) / "eval_results.json").read_text())


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
    options = sweep.parse_arguments(["--model_name_or_path", checkpoint, "--dataset_name", str(digits)])
    options.max_train_samples, options.max_test_samples = 300, 100
    labels = LabelledImages(options, DDAEImageProcessor.from_pretrained(checkpoint)).labels
    scaler = StandardScaler().fit(found["train"])
    model = LogisticRegression(C=1 / (best["l2"] * 300), max_iter=5000)
    predicted = model.fit(scaler.transform(found["train"]), labels["train"]).predict(scaler.transform(found["test"]))
    ours = np.load(folder / "test_predictions.npy")
    assert (predicted == ours).mean() >= 0.98
    expected = (ours == labels["test"]).mean()
    assert report["test_accuracies"]["0"] == pytest.approx(expected)


def test_held_out_images_are_not_fitted_on_nor_test_images_chosen_on(checkpoint, digits, tmp_path):
    arguments = ["--model_name_or_path", checkpoint, "--dataset_name", str(digits), "--output_dir", str(tmp_path)]
    args = sweep.parse_arguments([*arguments, "--max_train_samples", "300"])
    data = LabelledImages(args, DDAEImageProcessor.from_pretrained(checkpoint))
    parts = sweep.Sweep(args, checkpoint, data)
    assert len(parts.held_out) == 60
    assert sorted([*parts.held_out, *parts.fitted]) == list(range(300))
    train, test = (images_hash(data.splits[name], data.images) for name in ("train", "test"))
    assert train != test and train == parts.identity["train"]["images"]


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
    original, calls = sweep.FeatureCache.features, []

    def stop(self, images, *arguments, **options):
        def some(start):
            for batch in images(start):
                calls.append(len(batch))
                if len(calls) == 9:  # in the second noise level
                    raise KeyboardInterrupt
                yield batch

        return original(self, some, *arguments, **options)

    monkeypatch.setattr(sweep.FeatureCache, "features", stop)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, digits, tmp_path)
    resumed = run(checkpoint, digits, tmp_path)
    assert sum(calls) == 2 * 300 + 100 + 50  # the batch that was interrupted is read once more
    assert resumed["pairs"] == expected["pairs"] and resumed["test_accuracies"] == expected["test_accuracies"]


def test_a_level_that_is_done_is_not_probed_again_unless_its_options_change(swept, checkpoint, digits, monkeypatch):
    folder, report = swept
    args = sweep.parse_arguments(report_options(report))
    parts = sweep.Sweep(args, checkpoint, LabelledImages(args, DDAEImageProcessor.from_pretrained(checkpoint)))
    probed = []
    monkeypatch.setattr(sweep, "probe_level", lambda parts, sigma: probed.append(sigma) or [])
    assert sweep.sweep_levels(parts, folder) == report["pairs"] and not probed
    args.sigmas = [2.0, 3.0]
    sweep.sweep_levels(parts, folder)
    assert probed == [3.0]
    parts.data.labels["train"] = parts.data.labels["train"][::-1].copy()
    sweep.sweep_levels(parts, folder)
    assert probed == [3.0, 2.0, 3.0]


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


def report_options(report):
    names = ("model_name_or_path", "dataset_name", "output_dir", "max_train_samples", "max_test_samples")
    return [word for name in names for word in (f"--{name}", str(report["options"][name]))] + ["--sigmas", "0.1", "2"]


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
    options = ["--sigmas", "0.1", "--protocol", protocol, "--num_epochs", "5", "--learning_rate", "0.3"]
    options += ["--no-random_flip", "--random_crop", "0", "--online_batch_size", "32", "--layers", "mid_block"]
    options += ["--max_train_samples", "200", "--batch_size", "200"]
    report = run(checkpoint, digits, tmp_path, *options)
    assert report["test_accuracies"]["0"] > 0.2
    assert not (tmp_path / "features").exists()
    data_options = sweep.parse_arguments(["--model_name_or_path", checkpoint, "--dataset_name", str(digits)])
    data_options.max_test_samples = 100
    data = LabelledImages(data_options, DDAEImageProcessor.from_pretrained(checkpoint))
    accuracy = (classify(tmp_path / "classifier", data) == data.labels["test"]).mean()
    assert accuracy == report["saved_classifier_test_accuracy"]


def test_a_training_run_is_drawn_over_its_steps(checkpoint, digits, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(checkpoint, folder / "checkpoint-20")
    save_checkpoint(folder, seed=1)
    (folder / "train_results.json").write_text(json.dumps({"steps": 3}))
    arguments = ["--checkpoints", str(folder), "--dataset_name", str(digits), "--output_dir", str(tmp_path / "sweep")]
    arguments += ["--max_train_samples", "100", "--max_test_samples", "50", "--sigmas", "0.1", "--num_noise_seeds", "1"]
    arguments += ["--quality_extractor", f"ddae:{checkpoint}", "--num_quality_images", "50"]
    scripts.run("sweep", *arguments, "--num_inference_steps", "2", "--layers", "mid_block")
    points = json.loads((tmp_path / "sweep" / "training_curve.json").read_text())["points"]
    assert [point["step"] for point in points] == [3, 20]
    assert len({point["test_loss"] for point in points}) == len({point["frechet_distance"] for point in points}) == 2
    assert min(Image.open(tmp_path / "sweep" / "training_curve.png").size) > 200


def test_what_cannot_work_is_refused_at_once(checkpoint, digits, tmp_path, capsys):
    for options, message in [
        (["--num_views", "0"], "--num_views is 0: it must be at least 1"),
        (["--protocol", "paper", "--num_epochs", "0"], "--num_epochs is 0: it must be at least 1"),
        (["--noise_seed", "-1"], "--noise_seed is -1: it must be at least 0"),
        (["--random_crop", "-1"], "--random_crop is -1: it must be at least 0"),
        (["--learning_rate", "0"], "--learning_rate is 0.0: it must be positive"),
        (["--validation_fraction", "1"], "must be between 0 and 1"),
        (["--l2", "0"], "every strength must be positive"),
        (["--random_flip"], "give --num_views 2 or more"),
        (["--protocol", "paper", "--num_views", "2"], "is of logistic regression, not of --protocol paper"),
        (["--protocol", "best"], "invalid choice"),
        (["--checkpoints", "runs"], "Give one of --model_name_or_path and --checkpoints"),
    ]:
        with pytest.raises(SystemExit):
            run(checkpoint, digits, tmp_path, *options)
        assert message in capsys.readouterr().err
    for options, message in [
        (["--layers", "up_blocks.7"], "no layer 'up_blocks.7'"),
        (["--sigmas", "1000"], "sigma"),
        (["--few_labels", "100"], "100 labels a class are asked for: allowed are 1 to"),
        (["--few_labels", "0"], "0 labels a class are asked for: allowed are 1 to"),
        (["--max_train_samples", "-5"], "-5 images of the split 'train' are asked for: it must be at least 1"),
        (["--test_split", "train", "--max_test_samples", "300"], "The test images are the training images"),
        (["--validation_fraction", "0.999"], "leave 0 to fit on and 300 to choose on"),
        (["--knn", "--max_train_samples", "24"], "leave 19 to fit on"),
        (["--alignment", "--max_train_samples", "5"], "1 and 2 are needed"),
        (["--model_name_or_path", str(tmp_path / "nowhere")], "is not a folder"),
    ]:
        with pytest.raises(SystemExit, match=message):
            run(checkpoint, digits, tmp_path, *options)
    labelled = save_checkpoint(tmp_path / "conditional", num_class_embeds=11)
    with pytest.raises(SystemExit, match="without a null class: give --null_class"):
        run(labelled, digits, tmp_path)
    run_options = ["--dataset_name", str(digits), "--output_dir", str(tmp_path / "sweep")]
    shutil.copytree(checkpoint, tmp_path / "run" / "checkpoint-5")
    with pytest.raises(SystemExit, match="--extractor ddae:nowhere cannot be used"):
        scripts.run(
            "sweep", "--checkpoints", str(tmp_path / "run"), "--quality_extractor", "ddae:nowhere", *run_options
        )
    (tmp_path / "run" / "checkpoint-6").mkdir()
    with pytest.raises(SystemExit, match="checkpoint-6 is no checkpoint"):
        scripts.run("sweep", "--checkpoints", str(tmp_path / "run"), *run_options)
    with pytest.raises(SystemExit, match="no folder `checkpoint-STEP`"):
        scripts.run("sweep", "--checkpoints", str(tmp_path), "--dataset_name", str(digits))
    assert not list(tmp_path.rglob("*.npy"))
