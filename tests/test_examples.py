"""The scripts as a user runs them, at tiny size, on real digits."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import linear_probe
from ddae_hf import DDAEForImageClassification, DDAEImageProcessor

from . import scripts
from .conftest import drawn
from .test_pretraining import trained  # noqa: F401


@pytest.fixture(scope="module")
def probed(trained, digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("probed")
    options = ["--model_name_or_path", str(trained), "--dataset_name", str(digits), "--output_dir", str(folder)]
    options += ["--layers", "mid_block", "up_blocks.0.attentions.1", "--sigmas", "0.05", "0.3", "--baselines"]
    options += [
        "--labels_per_class",
        "10",
        "--num_draws",
        "3",
        "--max_train_samples",
        "600",
        "--max_test_samples",
        "150",
    ]
    scripts.run("linear_probe", *options, "--regularisation", "0.1", "1.0")
    return folder


def test_the_probe_leaves_a_classifier_and_every_figure(probed, digits):
    report = json.loads((probed / "eval_results.json").read_text())
    assert list(report["results"]) == ["DDAE", "raw pixels", "untrained network"]
    assert report["results"]["DDAE"]["test_f1"] == pytest.approx(report["results"]["DDAE"]["test_accuracy"], abs=0.1)
    for name, result in report["results"].items():
        assert 0.5 < result["test_accuracy"] <= 1 and len(result["few_label_test_accuracies"]) == 3
        best = max(t["validation_accuracy"] for t in result["tried"])
        assert result["validation_accuracy"] == best
        assert len(result["tried"]) == (2 if name == "raw pixels" else 8)
    model = DDAEForImageClassification.from_pretrained(probed)
    assert model.config.layer == report["results"]["DDAE"]["layer"] and model.config.id2label[3] == "3"
    processor = DDAEImageProcessor.from_pretrained(probed)
    test = drawn(digits, "test", 150)
    with torch.no_grad():
        predicted = model(**processor(test["image"][:], return_tensors="pt")).logits.argmax(-1)
    accuracy = (predicted.numpy() == np.array(test["label"][:])).mean()
    assert accuracy == pytest.approx(report["saved_classifier_test_accuracy"])
    assert abs(accuracy - report["results"]["DDAE"]["test_accuracy"]) < 0.1
    assert Image.open(probed / "confusion.png").size[0] > 200


def test_the_saved_weights_are_scikit_learns_on_raw_features():
    rng = np.random.default_rng(0)
    features = rng.normal(3, [1, 10, 0.1], (200, 3))
    for classes in (2, 4):
        labels = rng.integers(0, classes, 200)
        scaler, model = linear_probe.fit(features, labels, 1.0)
        weight, bias = linear_probe.raw_weights(scaler, model, classes)
        logits = torch.from_numpy(features) @ weight.T + bias
        probabilities = torch.softmax(logits, -1).numpy()
        np.testing.assert_allclose(probabilities, model.predict_proba(scaler.transform(features)), atol=1e-8)


def test_a_class_without_training_images_never_wins():
    features = np.array([[0.0], [1.0], [2.0]])
    scaler = StandardScaler().fit(features)
    weight, bias = linear_probe.raw_weights(scaler, LogisticRegression().fit(scaler.transform(features), [0, 2, 3]), 5)
    logits = torch.from_numpy(features) @ weight.T + bias
    assert set(logits.argmax(1).tolist()) <= {0, 2, 3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "up_blocks.8.resnets.0"], "There is no layer"),
        (["--sigmas", "-1"], "outside the schedule"),
        (["--label_column", "image"], "no column of labels 'image'"),
        (["--test_split", "holdout"], "has no split 'holdout'"),
        (["--labels_per_class", "1000"], "the smallest class has"),
        (["--model_name_or_path", "nowhere/at/all"], "is not a folder"),
    ],
)
def test_probing_refuses_bad_input_before_it_computes(trained, digits, tmp_path, options, message):
    arguments = [
        "--model_name_or_path",
        str(trained),
        "--dataset_name",
        str(digits),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    with pytest.raises(SystemExit, match=message):
        scripts.run("linear_probe", *arguments, *options)
    assert not (tmp_path / "out").exists()
