"""Several taps of a sweep, against scikit-learn on concatenated features, at tiny size, on real digits."""

import dataclasses
import json
import re
import shutil
import tracemalloc

import numpy as np
import pytest
from diffusers import DDIMScheduler
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from ddae_hf import DDAEForImageClassification, DDAEImageProcessor, DDAEPipeline
from ddae_hf.experiments import (
    Images,
    SweepOptions,
    features,
    fusing,
    logistic_regression,
    make_card,
    pieces,
    sweep,
    sweeping,
)
from ddae_hf.experiments.fusing import add_taps, paired_gain
from ddae_hf.experiments.logistic_regression import fit_logistic_regression
from ddae_hf.experiments.pairs import FusedProbe, Pair
from ddae_hf.experiments.pieces import Joined
from ddae_hf.experiments.probing import classify
from ddae_hf.experiments.results import ProbeReport

from . import commands
from .conftest import make_unet
from .test_logistic_regression import L2, make_features
from .test_pieces import counted

LAYERS = ["down_blocks.0.resnets.0", "mid_block", "up_blocks.1.resnets.1"]
SIGMAS = [0.1, 0.7]
FEW = {"max_train_samples": 300, "max_test_samples": 100, "layers": LAYERS, "sigmas": SIGMAS, "l2": [1e-3, 1e-2]}
FEW |= {"num_noise_seeds": 1, "validation_fraction": 0.4}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Random networks have features too."""
    folder = tmp_path_factory.mktemp("checkpoint")
    denoiser = make_unet(0, in_channels=1, out_channels=1, block_out_channels=(16, 16), norm_num_groups=8)
    DDAEPipeline.for_denoiser(denoiser, DDIMScheduler()).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def swept(checkpoint, digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("swept")
    images = Images.open(str(digits))
    return folder, sweep(checkpoint, images, **FEW, fuse=3, few_labels=[5], num_draws=2, output_dir=str(folder))


def opened(checkpoint, digits, folder, **changes):
    """The prober of a sweep, with features in a folder."""
    options = SweepOptions(**FEW | {"fuse": 3} | changes)
    processor = DDAEImageProcessor.from_pretrained(checkpoint)
    parts = sweeping.labelled_splits(Images.open(str(digits)), options)
    inputs = [sweeping.changed_inputs(images, processor, options) for images in parts]
    return sweeping.check_sweep(sweeping.open_for(checkpoint, options), *inputs, processor, options, folder)


def names(steps):
    return [(step.layer, step.sigma) for step in steps]


def by_scikit_learn(known, labels, fitted, held_out, strengths):
    """Return the held-out accuracy of features (N, C) with each strength of regularisation."""
    scaled = StandardScaler().fit(known[fitted].astype(np.float64)).transform(known.astype(np.float64))
    models = (LogisticRegression(C=1 / (l2 * len(fitted)), max_iter=5000, tol=1e-8) for l2 in strengths)
    return [model.fit(scaled[fitted], labels[fitted]).score(scaled[held_out], labels[held_out]) for model in models]


def test_taps_are_those_of_a_greedy_search_by_scikit_learn(swept, checkpoint, digits):
    folder, result = swept
    prober = opened(checkpoint, digits, folder / "features")
    known = {
        (layer, sigma): found[0]
        for sigma in SIGMAS
        for layer, found in prober.features("train", LAYERS, sigma, 0).items()
    }
    labels, taps = prober.labels["train"], []
    for step in result.fused.steps:
        scores = {}
        for tap in known:
            if tap not in taps:
                joined = np.concatenate([known[each] for each in [*taps, tap]], axis=1)
                scores[tap] = max(by_scikit_learn(joined, labels, prober.fitted, prober.held_out, FEW["l2"]))
        taps.append(max(scores, key=scores.get))
        assert (step.layer, step.sigma) == taps[-1]
        assert step.validation_accuracy == pytest.approx(scores[taps[-1]], abs=1e-9)
    assert len(set(taps)) == 3
    accuracies = [step.validation_accuracy for step in result.fused.steps]
    assert result.fused.best == result.fused.steps[int(np.argmax(accuracies))]


def test_the_set_is_fitted_on_all_training_images_and_tested_beside_the_best_pair(swept, checkpoint, digits):
    folder, result = swept
    fused, prober = result.fused, opened(checkpoint, digits, folder / "features")
    assert len(fused.taps) > 1  # or nothing below says anything
    train, test = (
        np.concatenate([prober.features(split, [t.layer], t.sigma, 0)[t.layer][0] for t in fused.taps], axis=1)
        for split in ("train", "test")
    )
    scaler = StandardScaler().fit(train.astype(np.float64))
    model = LogisticRegression(C=1 / (fused.best.l2 * len(train)), max_iter=5000, tol=1e-8)
    model.fit(scaler.transform(train), prober.labels["train"])
    predicted = model.predict(scaler.transform(test))
    assert (predicted == result.predicted).mean() >= 0.99
    truth = prober.labels["test"]
    assert fused.test_accuracies == {"0": (result.predicted == truth).mean()}
    assert fused.gain == pytest.approx(fused.test_accuracies["0"] - result.test_accuracies["0"])
    assert fused.gain_interval[0] < fused.gain < fused.gain_interval[1]
    assert len(fused.few_label_test_accuracies["5"]) == 2 and 0 < fused.test_f1 < 1
    assert np.array_equal(np.load(folder / "test_predictions.npy"), result.predicted)


def test_the_saved_classifier_reads_all_taps(swept, checkpoint, digits):
    folder, result = swept
    classifier = DDAEForImageClassification.from_pretrained(folder / "classifier").eval()
    assert classifier.config.taps == [[tap.layer, tap.sigma] for tap in result.fused.taps]
    images = Images.open(str(digits))["test"].take(100)
    predicted = classify(classifier, images, DDAEImageProcessor.from_pretrained(folder / "classifier"))
    accuracy = (predicted == images.labels).mean()
    assert accuracy == result.saved_classifier_test_accuracy
    assert accuracy == pytest.approx(result.fused.test_accuracies["0"], abs=0.1)  # other noise


def test_a_classifier_with_another_head_and_several_taps_is_swept_like_its_denoiser(swept, checkpoint, digits):
    folder, result = swept
    options = {"head": "attention", "head_width": 8, "taps": [["mid_block", 0.3], [LAYERS[0], 0.1]], "num_labels": 10}
    model = DDAEForImageClassification.from_pretrained(checkpoint, **options)
    found = sweep(model, Images.open(str(digits)), **FEW, fuse=3, features_dir=str(folder / "features"))
    assert found.fused.steps == result.fused.steps and found.fused.test_accuracies == result.fused.test_accuracies
    assert found.classifier.config.taps == result.classifier.config.taps and found.classifier.head is None
    assert found.saved_classifier_test_accuracy == result.saved_classifier_test_accuracy
    alone = sweep(model, Images.open(str(digits)), **FEW, features_dir=str(folder / "features"))
    assert alone.classifier.config.taps is None and alone.classifier.config.layer == result.best.layer
    assert alone.test_accuracies == result.test_accuracies


def test_the_card_of_the_classifier_names_its_taps(swept):
    folder, result = swept
    card = make_card(folder / "classifier", results=[folder])
    figures = card.data.eval_results
    assert figures[0].metric_args == {"taps": result.classifier.config.taps, "noise_seed": 0}
    assert figures[0].metric_value == result.saved_classifier_test_accuracy
    assert f"DDAE, {len(result.fused.taps)} taps joined" in card.content and "with tap 3" in card.content
    first = result.fused.taps[0]
    assert f"reads {len(result.fused.taps)} taps joined, `{first.layer}` at the noise level sigma" in card.content


def test_without_it_a_sweep_is_what_it_was_and_the_best_pair_is_the_same_with_it(swept, checkpoint, digits, tmp_path):
    folder, result = swept
    plain = sweep(
        checkpoint, Images.open(str(digits)), **FEW, few_labels=[5], num_draws=2, output_dir=str(tmp_path),
        features_dir=str(folder / "features"),
    )  # fmt: skip
    assert plain.fused is None and plain.classifier.config.layer == plain.best.layer
    for name in ("pairs", "best", "test_accuracies", "test_f1", "few_label_test_accuracies"):
        assert getattr(plain, name) == getattr(result, name)
    for path in (tmp_path / "levels").iterdir():
        assert path.read_bytes() == (folder / "levels" / path.name).read_bytes()
    assert "fused" not in json.loads((tmp_path / "eval_results.json").read_text())
    assert "held out |" not in plain.table() and "taps" not in plain.table()


def test_the_network_does_not_run_for_the_choice(checkpoint, digits, tmp_path, monkeypatch):
    prober = opened(checkpoint, digits, tmp_path / "features", max_selection_samples=200)
    seen, original = [], features.batch_features
    monkeypatch.setattr(features, "batch_features", lambda *a, **k: (seen.append(len(a[1])), original(*a, **k))[1])
    pairs = sweeping.sweep_levels(prober, None)
    assert sum(seen) == 200 * len(SIGMAS)
    steps = add_taps(prober, pairs, None, {})
    assert len(steps) == 3 and sum(seen) == 200 * len(SIGMAS)


def test_of_a_grid_every_pair_may_be_a_tap(checkpoint, digits, tmp_path, monkeypatch):
    """Also where one pair is left at the end, whose features are those of the images that the choice is made on."""
    prober = opened(checkpoint, digits, tmp_path, layers=LAYERS[:2], sigmas=[0.1], fuse=2, max_selection_samples=200)
    pairs = sweeping.sweep_levels(prober, None)
    monkeypatch.setattr(features, "batch_features", None)
    assert sorted(names(add_taps(prober, pairs, None, {}))) == sorted((layer, 0.1) for layer in LAYERS[:2])


def test_views_are_joined_view_by_view(checkpoint, digits, tmp_path):
    prober = opened(checkpoint, digits, tmp_path, num_views=2)
    first, second = Pair(layer=LAYERS[0], sigma=0.1), Pair(layer=LAYERS[1], sigma=0.7)
    joined = fusing.JoinedProber.of(prober, [first], [second.layer])
    found = joined.features("test", [second.layer], second.sigma, 0)[second.layer]
    for view, array in enumerate(found):
        parts = [prober.features("test", [tap.layer], tap.sigma, 0)[tap.layer][view] for tap in (first, second)]
        assert np.array_equal(array[np.arange(100)], np.concatenate(parts, axis=1))
    assert len(found) == 2 and not np.array_equal(found[0][:5], found[1][:5])


def test_an_interrupted_search_goes_on_and_gives_the_same(swept, checkpoint, digits, tmp_path, monkeypatch):
    folder, result = swept
    prober, fitted = opened(checkpoint, digits, folder / "features"), []
    original = fusing.JoinedProber.level

    def stopped(self, sigma):
        if len(fitted) == 3:  # in the second level of the third tap
            raise KeyboardInterrupt
        fitted.append((len(self.taps), sigma))
        return original(self, sigma)

    monkeypatch.setattr(fusing.JoinedProber, "level", stopped)
    known = sweeping.known_of(prober)
    with pytest.raises(KeyboardInterrupt):
        add_taps(prober, result.pairs, tmp_path, known)
    fitted[2:] = []  # so that one more is fitted
    monkeypatch.setattr(fusing.JoinedProber, "level", lambda *a: (fitted.append(None), original(*a))[1])
    assert add_taps(prober, result.pairs, tmp_path, known) == result.fused.steps
    assert len(fitted) == 3
    assert add_taps(prober, result.pairs, tmp_path, known) == result.fused.steps
    assert len(fitted) == 3
    # With another beginning other sets are compared.
    others = [dataclasses.replace(pair, validation_accuracy=pair == result.pairs[-1]) for pair in result.pairs]
    assert names(add_taps(prober, others, tmp_path, known))[0] == names(result.pairs)[-1]
    assert len(fitted) == 7


def test_figures_of_a_step_that_were_changed_are_not_used(swept, checkpoint, digits, tmp_path):
    folder, result = swept
    shutil.copytree(folder / "levels", tmp_path / "levels")
    prober = opened(checkpoint, digits, folder / "features")
    path = tmp_path / "levels" / "tap-2-sigma-0.7.json"
    kept = json.loads(path.read_text())
    kept["rows"][0]["validation_accuracy"] = 1.0
    path.write_text(json.dumps(kept))
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} is damaged .its checksum"):
        add_taps(prober, result.pairs, tmp_path / "levels", sweeping.known_of(prober))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fuse", "0"], "fuse is 0: it must be between 1 and 100"),
        (["--fuse", "-2"], "fuse is -2: it must be between 1 and 100"),
        (["--fuse", "101"], "fuse is 101: it must be between 1 and 100"),
        (["--fuse", "2", "--protocol", "paper"], "fuse is for logistic regression, not for the protocol paper"),
        (["--fuse", "3", "--layers", "mid_block"], "fuse is 3, but the number of pairs of layer and noise level is 2"),
        (["--fuse", "1.5"], "invalid int value"),
    ],
)
def test_what_cannot_be_fused_is_refused_at_once(options, message, checkpoint, digits, tmp_path, capsys):
    arguments = ["--model_name_or_path", checkpoint, "--dataset_name", digits, "--output_dir", tmp_path / "out"]
    with pytest.raises(SystemExit) as stopped:
        commands.run("sweep", *arguments, "--max_train_samples", 300, "--sigmas", 0.1, 2, *options)
    assert message in f"{stopped.value} {capsys.readouterr().err}"
    assert not (tmp_path / "out" / "levels").exists()


def test_more_features_than_correlations_can_be_kept_of_are_refused(checkpoint, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(fusing, "MOST_FEATURES", 47)
    with pytest.raises(ValueError, match="fuse is 3: so many taps may have 48 features together, where 47 are allowed"):
        opened(checkpoint, digits, tmp_path)
    assert opened(checkpoint, digits, tmp_path, fuse=2)


def test_a_report_is_read_back_and_says_what_each_tap_adds(swept):
    folder, result = swept
    report = ProbeReport.read(folder)
    assert isinstance(report.fused, FusedProbe) and report.fused == result.fused
    assert report.to_dict() == result.to_dict() and report.table() == result.table()
    lines = report.table().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    assert rows[0] == ["features", "tap", "labels", "held out", "adds", "test accuracy", "macro F1"]
    assert {len(row) for row in rows} == {7}
    accuracies = [step.validation_accuracy for step in report.fused.steps]
    assert [float(row[3]) for row in rows[2:5]] == pytest.approx([100 * each for each in accuracies], abs=0.01)
    gains = [100 * (after - before) for before, after in zip(accuracies, accuracies[1:], strict=False)]
    assert [float(row[4]) for row in rows[3:5]] == pytest.approx(gains, abs=0.01)
    assert rows[3][0] == "with tap 2" and rows[3][1] == report.fused.steps[1].words
    name = f"DDAE, {len(report.fused.taps)} taps joined"
    (tested,) = [row for row in rows if row[0] == name and row[2].startswith("all")]
    assert float(tested[5]) == pytest.approx(100 * report.fused.test_accuracies["0"], abs=0.01)
    assert f"{100 * report.fused.gain:+.2f} points over the best pair alone" in report.table()
    assert report.section().figures[-1].value == report.fused.test_accuracies["0"]


def test_where_no_tap_helps_the_best_pair_is_what_is_tested(swept, checkpoint, digits):
    folder, result = swept
    prober = opened(checkpoint, digits, folder / "features")
    best = max(result.pairs, key=lambda pair: pair.validation_accuracy)
    worse = [dataclasses.replace(step, validation_accuracy=0.1) for step in result.fused.steps[1:]]
    _, alone = prober.tested(result.pairs, 1)
    fused, fitted = fusing.tested_taps(prober, [best, *worse], alone)
    assert fused.taps == [best] and fused.test_accuracies == result.test_accuracies and fused.gain == 0
    assert np.array_equal(fitted[2], alone[2]) and sweeping.tap_of(fused) == {"layer": best.layer, "sigma": best.sigma}
    report = dataclasses.replace(ProbeReport.read(folder), fused=fused)
    assert "taps joined" not in report.table() and "| with tap 3 |" in report.table()
    assert len(report.section().figures) == 2


def test_the_gains_interval_is_that_of_agresti_and_min():
    """Their formula of the table's four shares, each with half an image more."""
    right, before = (np.repeat(values, [53, 8, 16, 9]) for values in ([1, 1, 0, 0], [1, 0, 1, 0]))
    gain, (low, high) = paired_gain(right.astype(bool), before.astype(bool))
    share = (np.array([53, 8, 16, 9]) + 0.5) / 88
    centre = share[1] - share[2]
    deviation = np.sqrt((share[1] + share[2] - centre**2) / 88)
    assert gain == pytest.approx(-8 / 86)
    assert (low, high) == pytest.approx((centre - 1.959964 * deviation, centre + 1.959964 * deviation))


def test_equal_answers_gain_nothing_but_have_an_interval():
    gain, (low, high) = paired_gain(np.ones(50, bool), np.ones(50, bool))
    assert gain == 0 and low == -high and 0 < high < 0.05


@pytest.mark.parametrize("chunk_bytes", [64 * 2**20, 20_000])
def test_a_solution_on_joined_arrays_is_that_on_one_array(chunk_bytes, monkeypatch):
    monkeypatch.setattr(logistic_regression, "_CHUNK_BYTES", chunk_bytes)
    values, labels = make_features(width=20)
    views = [values, values + np.random.default_rng(0).normal(size=values.shape).astype("f4")]
    parts = [[view[:, :3], view[:, 3:11], view[:, 11:]] for view in views]
    some = np.arange(0, len(labels), 2)
    expected = fit_logistic_regression({"a": views}, labels, L2, indices=some)["a"]
    joined = [Joined(each) for each in parts]
    found = fit_logistic_regression({"a": joined}, labels, L2, indices=some)["a"]
    for name in ("weight", "bias", "loss"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-6, atol=1e-9)
    assert np.array_equal(found.predict(joined, some), expected.predict(views, some))


def test_joined_arrays_are_read_a_piece_at_a_time(monkeypatch):
    values, labels = make_features(width=12)
    parts = [counted(values[:, :4]), counted(values[:, 4:])]
    monkeypatch.setattr(logistic_regression, "_chunk_size", lambda *shape: 60)
    monkeypatch.setattr(pieces, "_SHARE", 0.0)
    joined = Joined(parts)
    fit_logistic_regression({"a": [joined]}, labels, L2)["a"].predict([joined])
    assert all(set(part.reads) == {60} and len(part.reads) > 30 for part in parts)


def test_memory_does_not_grow_with_joined_arrays_that_are_on_disk(tmp_path, monkeypatch):
    """Three taps, of 14 MiB together, in pieces of half a MiB."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 20_000)
    for number in range(3):
        np.save(tmp_path / f"{number}.npy", rng.normal(size=(20_000, 60)).astype("f4") + labels[:, None] * 0.1)
    monkeypatch.setattr(logistic_regression, "_CHUNK_BYTES", 2**19)
    monkeypatch.setattr(pieces, "_SHARE", 0.0)
    joined = Joined([np.load(tmp_path / f"{number}.npy", mmap_mode="r") for number in range(3)])
    tracemalloc.start()
    fit_logistic_regression({"a": [joined]}, labels, [1e-2])["a"].predict([joined])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * 2**20  # what NumPy takes; the whole of them would be 14 MiB


def test_few_layers_are_solved_together_where_their_correlations_are_large(monkeypatch):
    """So that they fit into memory; of usual widths all layers of a network are."""
    assert logistic_regression._most_together(1152, 40) >= 28
    assert logistic_regression._most_together(12_288, 40) == 1
    solved, original = [], logistic_regression._Problem.__init__
    monkeypatch.setattr(
        logistic_regression._Problem, "__init__", lambda self, *a: (solved.append(len(a[0])), original(self, *a))[1]
    )
    values, labels = make_features()
    fit_logistic_regression({str(number): [values] for number in range(5)}, labels, L2)
    monkeypatch.setattr(logistic_regression, "_CORRELATION_BYTES", 2 * 8 * 12**2 * 6)
    fit_logistic_regression({str(number): [values] for number in range(5)}, labels, L2)
    assert solved == [5, 2, 2, 1]


def test_arrays_that_cannot_be_joined_are_refused():
    for arrays in ([], [np.zeros((3, 2)), np.zeros((4, 2))]):
        with pytest.raises(ValueError, match="give one or more, all of as many rows"):
            Joined(arrays)
