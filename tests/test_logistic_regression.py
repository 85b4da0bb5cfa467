"""Probes against scikit-learn and formulas in float64, the minimisations below them against closed forms and scipy."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize, rosen, rosen_der
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch.utils._python_dispatch import TorchDispatchMode

from ddae_hf.experiments import logistic_regression, pieces
from ddae_hf.experiments.logistic_regression import (
    alignment,
    fit_logistic_regression,
    knn_predict,
    minimise,
    uniformity,
)

from .test_pieces import counted

L2 = [1e-4, 1e-2, 1.0]


def make_features(seed=0, count=600, width=12, classes=4):
    """Correlated features on very different scales, far from zero, as pooled hidden states are."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    points = rng.normal(size=(classes, width))[labels] * 0.7 + rng.normal(size=(count, width))
    points = points @ rng.normal(size=(width, width)) * 10.0 ** rng.uniform(-2, 2, width) + rng.normal(size=width) * 20
    return points.astype(np.float32), labels


def objective(weight, bias, features, labels, l2):
    """Return the module's formula for weights on raw features, in float64."""
    weight, bias, features = (np.asarray(x, dtype=np.float64) for x in (weight, bias, features))
    logits = features @ weight.T + bias
    logits -= logits.max(1, keepdims=True)
    loss = -(logits[np.arange(len(labels)), labels] - np.log(np.exp(logits).sum(1))).mean()
    return loss + 0.5 * l2 * ((weight * features.std(0)) ** 2).sum()


def sklearn_optimum(features, labels, l2):
    z = StandardScaler().fit_transform(features.astype(np.float64))
    model = LogisticRegression(C=1 / (l2 * len(labels)), max_iter=5000, tol=1e-9).fit(z, labels)
    loss = log_loss(labels, model.predict_proba(z)) + 0.5 * l2 * (model.coef_**2).sum()
    return loss, model.predict(z)


@pytest.mark.parametrize("chunk_bytes", [64 * 2**20, 20_000])
def test_every_probe_reaches_scikit_learns_optimum(chunk_bytes, monkeypatch):
    monkeypatch.setattr(logistic_regression, "_CHUNK_BYTES", chunk_bytes)
    (first, labels), (second, _) = make_features(), make_features(seed=1)
    second = second + first  # so that it says something of the labels
    features = {"a": [first], "b": [second], "narrow": [first[:, :5]]}
    probes = fit_logistic_regression(features, labels, L2)
    assert list(probes) == ["a", "b", "narrow"]
    for name, (values,) in features.items():
        predicted = probes[name].predict([values])
        assert probes[name].converged.all()
        for i, l2 in enumerate(L2):
            expected, classes = sklearn_optimum(values, labels, l2)
            found = objective(probes[name].weight[i], probes[name].bias[i], values, labels, l2)
            assert abs(found - expected) < 1e-5
            assert probes[name].loss[i].item() == pytest.approx(found, abs=1e-5)
            assert (predicted[i] == classes).mean() > 0.99


def test_features_far_from_zero_are_classified_as_they_were_fitted():
    features, labels = make_features()
    (near,) = fit_logistic_regression({"a": [features]}, labels, L2).values()
    features = features + 1e5 * features.std(0)
    (probe,) = fit_logistic_regression({"a": [features]}, labels, L2).values()
    for i, l2 in enumerate(L2):
        found = objective(probe.weight[i], probe.bias[i], features, labels, l2)
        assert found == pytest.approx(probe.loss[i].item(), abs=1e-4)
    assert (probe.predict([features]) == near.predict([make_features()[0]])).mean() > 0.97


def test_features_may_be_centred_alone():
    features, labels = make_features()
    features = features / features.std(0) * np.linspace(0.5, 2, features.shape[1], dtype=np.float32)
    (probe,) = fit_logistic_regression({"a": [features]}, labels, [1e-2], standardise=False).values()
    x = features - features.mean(0, dtype=np.float64)
    model = LogisticRegression(C=1 / (1e-2 * len(labels)), max_iter=5000, tol=1e-9).fit(x, labels)
    expected = log_loss(labels, model.predict_proba(x)) + 0.5 * 1e-2 * (model.coef_**2).sum()
    assert probe.loss.item() == pytest.approx(expected, abs=1e-5)
    np.testing.assert_allclose(probe.weight[0].numpy(), model.coef_, atol=2e-2 * abs(model.coef_).max())


def test_too_few_iterations_are_told():
    features, labels = make_features()
    with pytest.warns(UserWarning, match="3 of 3 probes did not reach their optimum in 2 iterations"):
        (probe,) = fit_logistic_regression({"a": [features]}, labels, L2, max_iterations=2).values()
    assert not probe.converged.any()


def test_two_classes_agree_with_scikit_learn():
    """scikit-learn's two-class model has one row w; two rows w / 2 and -w / 2 have half its penalty."""
    features, labels = make_features(classes=2)
    (probe,) = fit_logistic_regression({"a": [features]}, labels, [1e-2]).values()
    z = StandardScaler().fit_transform(features.astype(np.float64))
    model = LogisticRegression(C=2 / (1e-2 * len(labels)), max_iter=5000, tol=1e-9).fit(z, labels)
    expected = log_loss(labels, model.predict_proba(z)) + 0.25 * 1e-2 * (model.coef_**2).sum()
    assert objective(probe.weight[0], probe.bias[0], features, labels, 1e-2) == pytest.approx(expected, abs=1e-5)


def test_fitting_on_some_images_is_fitting_on_those_alone():
    features, labels = make_features()
    some = np.random.default_rng(0).permutation(len(labels))[:200]
    (part,) = fit_logistic_regression({"a": [features]}, labels, L2, indices=some, num_classes=4).values()
    (alone,) = fit_logistic_regression({"a": [features[some]]}, labels[some], L2, num_classes=4).values()
    torch.testing.assert_close(part.loss, alone.loss, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(part.predict([features], some), part.predict([features])[:, some])


def test_views_count_as_more_images_in_fitting_and_are_averaged_in_predicting():
    first, labels = make_features()
    second = first + np.random.default_rng(3).normal(size=first.shape).astype(np.float32) * first.std(0)
    (probe,) = fit_logistic_regression({"a": [first, second]}, labels, L2).values()
    (stacked,) = fit_logistic_regression({"a": [np.concatenate([first, second])]}, np.tile(labels, 2), L2).values()
    torch.testing.assert_close(probe.loss, stacked.loss, rtol=0, atol=1e-5)
    logits = [np.einsum("nc,lkc->lnk", x, probe.weight) + probe.bias.numpy()[:, None] for x in (first, second)]
    agreement = (probe.predict([first, second]) == np.mean(logits, axis=0).argmax(2)).mean()
    assert agreement > 0.999


def test_features_are_read_from_disk_in_pieces(tmp_path, monkeypatch):
    features, labels = make_features()
    np.save(tmp_path / "x.npy", features)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    (expected,) = fit_logistic_regression({"a": [features]}, labels, L2).values()
    monkeypatch.setattr(logistic_regression, "_CHUNK_BYTES", 5_000)
    (found,) = fit_logistic_regression({"a": [mapped]}, labels, L2).values()
    torch.testing.assert_close(found.loss, expected.loss, rtol=0, atol=1e-5)


def test_features_are_read_once_where_they_fit_and_at_every_evaluation_where_not(monkeypatch):
    """Twice more for their moments; in pieces of 60 images, which are the same in both cases."""
    features, labels = make_features()
    monkeypatch.setattr(logistic_regression, "_chunk_size", lambda *shape: 60)
    evaluations = []
    original = logistic_regression._Problem.evaluate
    monkeypatch.setattr(logistic_regression._Problem, "evaluate", lambda *a: (evaluations.append(1), original(*a))[1])
    found = {}
    for share in (0.25, 0.0):
        monkeypatch.setattr(pieces, "_SHARE", share)
        evaluations.clear()
        views = [counted(features), counted(features + 1)]
        (found[share],) = fit_logistic_regression({"a": views}, labels, L2).values()
        passes = 1 if share else 2 + len(evaluations)
        assert all(view.reads == [60] * 10 * passes for view in views)
    torch.testing.assert_close(found[0.0].weight, found[0.25].weight, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[0.0].loss, found[0.25].loss, rtol=0, atol=1e-9)


def test_features_are_read_once_for_predictions_and_for_neighbours(monkeypatch):
    features, labels = make_features(count=2500)
    (probe,) = fit_logistic_regression({"a": [features]}, labels, L2).values()
    view = counted(features)
    probe.predict([view, view])
    assert sum(view.reads) == 2 * len(features)
    found = {}
    for share, passes in ((0.25, 1), (0.0, 3)):  # of 1024 images each that are asked for
        monkeypatch.setattr(pieces, "_SHARE", share)
        train, test = counted(features), counted(features)
        found[share] = knn_predict(train, labels, test, [5])[5]
        assert sum(train.reads) == passes * len(features) and sum(test.reads) == len(features)
    np.testing.assert_array_equal(found[0.0], found[0.25])


def test_what_is_large_is_computed_in_float32():
    """So that devices without float64 can do it: no tensor of float64 has a number for every image."""
    features, labels = make_features(count=5000)
    large = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, arguments=(), options=None):
            made = operation(*arguments, **(options or {}))
            if isinstance(made, torch.Tensor) and made.dtype == torch.float64 and made.numel() >= len(features):
                large.append(operation)
            return made

    with Watch():
        fit_logistic_regression({"a": [features]}, labels, L2)
        knn_predict(features, labels, features, [5])
    assert not large


@pytest.mark.gpu
@pytest.mark.parametrize("share", [0.25, 0.0])
def test_probes_and_neighbours_on_a_gpu_are_those_of_a_processor(share, monkeypatch):
    monkeypatch.setattr(pieces, "_SHARE", share)
    features, labels = make_features(count=3000)
    found, expected = (
        fit_logistic_regression({"a": [features]}, labels, L2, device=device)["a"] for device in ("cuda", "cpu")
    )
    torch.testing.assert_close(found.loss.cpu(), expected.loss, rtol=0, atol=1e-5)
    assert (found.predict([features]) == expected.predict([features])).mean() > 0.99
    near = [knn_predict(features, labels, features, [5], device=device)[5] for device in ("cuda", "cpu")]
    assert (near[0] == near[1]).mean() > 0.99


def test_a_feature_that_never_varies_changes_nothing():
    features, labels = make_features()
    dead = np.concatenate([features, np.full((len(labels), 1), 7.0, dtype=np.float32)], axis=1)
    (with_dead,) = fit_logistic_regression({"a": [dead]}, labels, L2).values()
    (without,) = fit_logistic_regression({"a": [features]}, labels, L2).values()
    torch.testing.assert_close(with_dead.loss, without.loss, rtol=0, atol=1e-5)
    assert with_dead.weight.isfinite().all()


def test_a_class_without_images_is_never_predicted():
    features, labels = make_features(classes=3)
    (probe,) = fit_logistic_regression({"a": [features]}, labels, [1e-2], num_classes=5).values()
    assert probe.weight.shape == (1, 5, 12)
    assert probe.predict([features]).max() <= 2


def test_what_cannot_be_fitted_is_refused():
    features, labels = make_features()
    for l2 in ([0.0], [-1.0], [math.nan], [math.inf]):
        with pytest.raises(ValueError, match="every strength must be positive"):
            fit_logistic_regression({"a": [features]}, labels, l2)
    with pytest.raises(ValueError, match="Labels are 0 to 3: allowed are 0 to 2"):
        fit_logistic_regression({"a": [features]}, labels, L2, num_classes=3)
    with pytest.raises(ValueError, match="every layer must have as many views"):
        fit_logistic_regression({"a": [features], "b": [features, features]}, labels, L2)
    with pytest.raises(ValueError, match="the 600 images of the labels"):
        fit_logistic_regression({"a": [features[:10]]}, labels, L2)
    for nothing in ({}, {"a": []}):
        with pytest.raises(ValueError, match="nothing to fit"):
            fit_logistic_regression(nothing, labels, L2)
    with pytest.raises(ValueError, match="features are not finite"):
        fit_logistic_regression({"a": [np.where(features > 50, np.nan, features)]}, labels, L2)


def test_quadratics_of_very_different_scale_all_reach_their_minimum():
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(4, 12, 12, generator=generator, dtype=torch.float64)
    matrices = factors @ factors.mT + 0.1 * torch.eye(12)
    matrices *= torch.tensor([1e-2, 1.0, 1e2, 1e3], dtype=torch.float64)[:, None, None]
    targets = torch.randn(4, 12, generator=generator, dtype=torch.float64)

    def evaluate(x):
        gradient = ((x - targets)[:, None] @ matrices).squeeze(1)
        return 0.5 * ((x - targets) * gradient).sum(1), gradient

    x, value, done = minimise(evaluate, torch.zeros(4, 12, dtype=torch.float64), 1e-14, 500)
    assert done.all() and value.max() < 1e-10
    torch.testing.assert_close(x, targets, rtol=1e-4, atol=1e-4)


def test_a_curved_valley_agrees_with_scipy():
    starts = np.array([[-1.2, 1.0], [2.0, -1.0], [0.3, 0.7]])

    def evaluate(x):
        points = x.numpy()
        values = np.array([rosen(p) for p in points]), np.array([rosen_der(p) for p in points])
        return torch.from_numpy(values[0]), torch.from_numpy(values[1])

    x, value, done = minimise(evaluate, torch.from_numpy(starts), 1e-12, 500)
    expected = [minimize(rosen, start, jac=rosen_der, method="L-BFGS-B").x for start in starts]
    assert done.all()
    np.testing.assert_allclose(x.numpy(), expected, atol=1e-3)


def test_what_is_solved_together_is_solved_as_it_would_be_alone():
    centres = torch.tensor([[1.0, -2.0], [30.0, 5.0]], dtype=torch.float64)

    def problem(centre):
        def evaluate(x):
            distance = x - centre
            return distance.pow(4).sum(1) + distance.square().sum(1), 4 * distance.pow(3) + 2 * distance

        return evaluate

    start = torch.zeros(2, 2, dtype=torch.float64)
    together, *_ = minimise(problem(centres), start, 1e-12, 200)
    for i in range(2):
        alone, *_ = minimise(problem(centres[i : i + 1]), start[i : i + 1], 1e-12, 200)
        torch.testing.assert_close(together[i], alone[0], rtol=1e-9, atol=1e-9)


def test_the_host_waits_for_the_device_once_an_evaluation(monkeypatch):
    """And once at the start. A valley in which some steps are halved."""
    evaluations, waits = [], []

    def evaluate(x):
        evaluations.append(1)
        first, second = x[:, 0], x[:, 1]
        value = 100 * (second - first**2) ** 2 + (1 - first) ** 2
        gradient = [-400 * first * (second - first**2) - 2 * (1 - first), 200 * (second - first**2)]
        return value, torch.stack(gradient, 1)

    for name in ("tolist", "item", "__bool__", "__float__", "__int__", "nonzero", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda *a, of=original, **k: (waits.append(1), of(*a, **k))[1])
    x, _, done = minimise(evaluate, torch.tensor([[-1.2, 1.0], [2.0, -1.0]], dtype=torch.float64), 1e-12, 500)
    counts = len(evaluations), len(waits)
    monkeypatch.undo()
    assert done.all() and counts[0] == counts[1] > 20
    np.testing.assert_allclose(x.numpy(), 1.0, atol=1e-3)


def test_a_minimum_to_rounding_is_done():
    """A function that no step lets descend, beside one that does."""

    def evaluate(x):
        value = (x - 1).square().sum(1)
        return torch.where(torch.tensor([True, False]), value, 5.0), 2 * (x - 1)

    x, value, done = minimise(evaluate, torch.zeros(2, 3, dtype=torch.float64), 1e-12, 100)
    assert done.all() and value.tolist() == [0.0, 5.0]
    assert torch.equal(x, torch.tensor([[1.0], [0.0]], dtype=torch.float64).expand(2, 3))


def test_a_minimisation_tells_that_it_is_not_done():
    def evaluate(x):
        return x.pow(4).sum(1), 4 * x.pow(3)

    *_, done = minimise(evaluate, torch.full((1, 2), 100.0, dtype=torch.float64), 1e-12, 2)
    assert not done.any()


@pytest.mark.parametrize("k", [1, 5, 30])
def test_nearest_neighbours_agree_with_scikit_learn(k):
    (train, labels), (test, _) = make_features(count=300), make_features(seed=2, count=100)
    mean = train.mean(0, dtype=np.float64)

    def votes(distances):  # cosine distances
        return np.exp(-distances / 0.07)

    judge = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=votes).fit(train - mean, labels)
    found = knn_predict(train, labels, test, [k, 2])[k]
    assert (found == judge.predict(test - mean)).mean() >= 0.99


def test_nearest_neighbours_of_many_images_are_found_in_pieces(monkeypatch):
    """More images than one piece holds, each beside its double."""
    rng = np.random.default_rng(0)
    train = rng.normal(size=(9000, 8)).astype(np.float32)
    labels = rng.integers(0, 50, 9000)
    found = knn_predict(train, labels, train[::3] * 1.0001, [1])[1]
    assert (found == labels[::3]).mean() > 0.99


def test_more_neighbours_than_images_are_refused():
    features, labels = make_features(count=20)
    with pytest.raises(ValueError, match=r"allowed are 1 to the 20"):
        knn_predict(features, labels, features, [21])


def test_alignment_and_uniformity_are_their_formulas():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(40, 6)), rng.normal(size=(40, 6))
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b)]
    assert alignment(a, b) == pytest.approx(((unit[0] - unit[1]) ** 2).sum(1).mean(), abs=1e-12)
    assert alignment(a, 5 * a) == pytest.approx(0, abs=1e-12)
    distances = [((x - y) ** 2).sum() for i, x in enumerate(unit[0]) for j, y in enumerate(unit[0]) if i != j]
    assert uniformity(a) == pytest.approx(np.log(np.mean(np.exp(-2 * np.array(distances)))), abs=1e-12)
    assert uniformity(np.tile(a[:1], (5, 1))) == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="must show the same images"):
        alignment(a, b[:5])
    with pytest.raises(ValueError, match="at least two"):
        uniformity(a[:1])


def test_probes_are_fitted_in_full_float32_whatever_is_set(monkeypatch):
    products = torch.backends.cuda.matmul
    seen = []
    evaluate = logistic_regression._Problem.evaluate
    watched = lambda self, x: seen.append(products.fp32_precision) or evaluate(self, x)  # noqa: E731
    monkeypatch.setattr(logistic_regression._Problem, "evaluate", watched)
    before = products.fp32_precision
    try:
        products.fp32_precision = "tf32"
        rng = np.random.default_rng(0)
        features = rng.standard_normal((40, 3)).astype(np.float32)
        logistic_regression.fit_logistic_regression({"layer": [features]}, rng.integers(0, 2, 40), [0.1])
        assert set(seen) == {"ieee"} and products.fp32_precision == "tf32"
    finally:
        products.fp32_precision = before
