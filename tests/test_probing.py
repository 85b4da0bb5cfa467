"""Probes that learn by gradient descent, and classifiers made of probes: what they say, and how they are saved."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from ddae_hf import DDAEForImageClassification, DDAEImageProcessor, DDAEModel, DDAEPipeline
from ddae_hf.experiments import Images, logistic_regression
from ddae_hf.experiments.logistic_regression import fit_logistic_regression
from ddae_hf.experiments.online_probes import OnlineProbes
from ddae_hf.experiments.probing import classify, make_classifier, save_classifier

from .conftest import make_unet
from .quiet import quiet
from .test_logistic_regression import make_features

NAMES = ["cat", "dog", "cow"]
TAP = {"layer": "mid_block", "sigma": 0.2, "noise_seed": 3}


@pytest.fixture
def generator(tmp_path):
    DDAEPipeline(make_unet(), DDIMScheduler()).save_pretrained(tmp_path / "generator")
    return tmp_path / "generator"


@pytest.fixture
def head():
    numbers = torch.Generator().manual_seed(0)
    return torch.randn(3, 64, generator=numbers), torch.randn(3, generator=numbers)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["path", "object"])
def test_a_classifier_has_the_networks_features_and_the_probes_weights(generator, head, images, kind, tmp_path, capsys):
    model = DDAEModel.from_pretrained(generator)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    source = generator if kind == "path" else model
    with quiet(capsys):
        classifier = make_classifier(source, NAMES, *head, **TAP)
    assert capsys.readouterr().err.count("newly initialized") == 0
    assert classifier.config.id2label == dict(enumerate(NAMES)) and not classifier.training
    expected = DDAEModel.from_pretrained(generator, **TAP)(images).pooler_output @ head[0].T + head[1]
    assert torch.equal(classifier(images).logits, expected)
    for parameter in classifier.parameters():
        parameter += 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    classifier = make_classifier(source, NAMES, *head, **TAP)
    save_classifier(tmp_path / "saved", classifier, source, DDAEImageProcessor.from_pretrained(generator))
    opened = DDAEForImageClassification.from_pretrained(tmp_path / "saved")
    assert torch.equal(opened(images).logits, expected)
    assert opened.config.weights == "head"  # of the generator that lies beside it
    kept = DDAEPipeline.from_pretrained(tmp_path / "saved").unet.state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in model.denoiser.state_dict().items())


@torch.no_grad()
def test_the_classifier_of_a_changed_network_is_saved_whole(generator, head, images, tmp_path):
    model = DDAEModel.from_pretrained(generator)
    model.denoiser.conv_in.weight += 0.1
    classifier = make_classifier(model, NAMES, *head, **TAP)
    save_classifier(tmp_path / "saved", classifier, model, DDAEImageProcessor.from_pretrained(generator))
    opened = DDAEForImageClassification.from_pretrained(tmp_path / "saved")
    assert opened.config.weights == "whole"
    assert torch.equal(opened(images).logits, classifier(images).logits)


def test_weights_that_are_no_numbers_are_refused(generator, head):
    weight, bias = head
    weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="are not finite: it is not saved. Regularise it more"):
        make_classifier(generator, NAMES, weight, bias, **TAP)


def test_classifying_is_what_the_model_says(generator, digits):
    network = make_unet(in_channels=1, out_channels=1)
    DDAEPipeline(network, DDIMScheduler()).save_pretrained(generator)
    weight, bias = torch.randn(10, 64, generator=torch.Generator().manual_seed(1)), torch.zeros(10)
    classifier = make_classifier(generator, [str(i) for i in range(10)], weight, bias, **TAP)
    processor, test = DDAEImageProcessor.from_pretrained(generator), Images.open(str(digits))["test"].take(30)
    pixels = processor(test.pil(range(30)), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = classifier(pixels).logits.argmax(-1).numpy()
    assert np.array_equal(classify(classifier, test, processor, batch_size=7), expected)


def test_the_weights_of_a_probe_are_scikit_learns_on_raw_features(monkeypatch):
    monkeypatch.setattr(logistic_regression, "_TOLERANCE", 1e-10)
    rng = np.random.default_rng(0)
    features = rng.normal(3, [1, 10, 0.1], (200, 3)).astype(np.float32)
    for classes in (2, 4):
        labels = rng.integers(0, classes, 200)
        scaler = StandardScaler().fit(features)
        model = LogisticRegression(tol=1e-10, max_iter=5000).fit(scaler.transform(features), labels)
        strength = (2 if classes == 2 else 1) / 200
        probe = fit_logistic_regression({"layer": [features]}, labels, [strength])["layer"]
        logits = torch.from_numpy(features).double() @ probe.weight[0].T + probe.bias[0]
        expected = model.predict_proba(scaler.transform(features))
        np.testing.assert_allclose(torch.softmax(logits, -1).numpy(), expected, atol=1e-3)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_online_probes_learn_apart_and_give_their_weights(batch_norm):
    torch.manual_seed(0)
    features, labels = make_features()
    features = torch.from_numpy(features / features.std(0))
    inputs, y = {"a.0": features, "b": features[:, :5]}, torch.from_numpy(labels)
    probes = OnlineProbes({"a.0": 12, "b": 5}, 4, batch_norm)
    optimizer = torch.optim.Adam(probes.parameters(), lr=0.05)
    for _ in range(300):
        loss = sum(torch.nn.functional.cross_entropy(logits, y) for logits in probes(inputs).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    logits = probes.eval()(inputs)
    for layer, values in inputs.items():
        weight, bias = probes.linear(layer)
        torch.testing.assert_close(values @ weight.T + bias, logits[layer], rtol=1e-3, atol=1e-3)
    assert (logits["a.0"].argmax(1) == y).float().mean() > (logits["b"].argmax(1) == y).float().mean() > 0.3
