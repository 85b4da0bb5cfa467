"""`ddae probe` as a user runs it, at tiny size, on real digits."""

import signal

import numpy as np
import pytest
import torch
from PIL import Image

from ddae_hf import DDAEForImageClassification, DDAEImageProcessor, DDAEPipeline
from ddae_hf.commands import probe as command
from ddae_hf.commands.parsing import parse
from ddae_hf.experiments.probing import Prober
from ddae_hf.experiments.results import ProbeReport

from . import commands
from .conftest import drawn
from .test_sweeping import checkpoint  # noqa: F401 (a fixture)


@pytest.fixture(scope="module")
def probed(checkpoint, digits, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("probed")
    options = ["--model_name_or_path", checkpoint, "--dataset_name", digits, "--output_dir", folder, "--baselines"]
    options += ["--layers", "mid_block", "up_blocks.0.attentions.1", "--sigmas", "0.05", "0.3", "--few_labels", "10"]
    options += ["--num_draws", "3", "--max_train_samples", "600", "--max_test_samples", "150"]
    commands.run("probe", *options, "--l2", "1e-3", "1e-2")
    return folder


def test_the_probe_leaves_a_classifier_and_every_figure(probed, digits):
    report = ProbeReport.read(probed)
    probes = {"DDAE": report, **report.baselines}
    assert list(probes) == ["DDAE", "raw pixels", "untrained network"]
    assert report.test_f1 == pytest.approx(report.test_accuracies["0"], abs=0.1)
    for probe in probes.values():
        assert 0.5 < probe.test_accuracies["0"] <= 1 and len(probe.few_label_test_accuracies["10"]) == 3
        assert set(probe.best.by_l2) == {"0.001", "0.01"}
    assert len(report.pairs) == 4
    assert report.best.validation_accuracy == max(pair.validation_accuracy for pair in report.pairs)
    model = DDAEForImageClassification.from_pretrained(probed)
    assert model.config.layer == report.best.layer and model.config.id2label[3] == "3"
    processor = DDAEImageProcessor.from_pretrained(probed)
    test = drawn(digits, "test", 150)
    with torch.no_grad():
        predicted = model(**processor(test["image"][:], return_tensors="pt")).logits.argmax(-1)
    accuracy = (predicted.numpy() == np.array(test["label"][:])).mean()
    assert accuracy == pytest.approx(report.saved_classifier_test_accuracy)
    assert abs(accuracy - report.test_accuracies["0"]) < 0.1
    assert DDAEPipeline.from_pretrained(probed).unet is not None
    for name in ("confusion.png", "heat_map.png"):
        assert Image.open(probed / name).size[0] > 200


def test_an_interrupted_probe_goes_on_from_its_output_dir(checkpoint, digits, tmp_path, monkeypatch):  # noqa: F811
    options = ["--model_name_or_path", checkpoint, "--dataset_name", digits, "--output_dir", tmp_path]
    options += ["--max_train_samples", "200", "--max_test_samples", "50", "--sigmas", "0.1", "1"]
    with monkeypatch.context() as stopping:
        stopping.setattr(Prober, "tested", lambda *a: signal.raise_signal(signal.SIGINT))
        with pytest.raises(SystemExit, match="130"):
            commands.run("probe", *options)
    assert len(list((tmp_path / "levels").iterdir())) == 2
    with monkeypatch.context() as again:
        again.setattr(Prober, "level", lambda *a: pytest.fail("a level that is done is probed again"))
        commands.run("probe", *options)
    assert len(ProbeReport.read(tmp_path).pairs) == 2
    DDAEForImageClassification.from_pretrained(tmp_path)
    assert not (tmp_path / "classifier").exists() and (tmp_path / "features").is_dir()


def test_by_default_the_checkpoints_own_pair_is_probed(probed, digits, tmp_path, capsys):
    own = DDAEForImageClassification.from_pretrained(probed).config
    options = ["--model_name_or_path", probed, "--dataset_name", digits, "--output_dir", tmp_path]
    commands.run("probe", *options, "--max_train_samples", "200", "--max_test_samples", "50")
    (pair,) = ProbeReport.read(tmp_path).pairs
    assert (pair.layer, pair.sigma) == (own.layer, own.sigma)
    assert f"`{own.layer}`" in capsys.readouterr().out


def test_the_configuration_says_what_the_script_takes():
    options = ["--config", "cifar10_cpu_probe", "--model_name_or_path", "somewhere"]
    _, found, _ = parse(command.KINDS, None, options)
    assert found.layers == ["decoder"] and found.max_selection_samples == 5000 and found.baselines


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "up_blocks.8.resnets.0"], "There is no layer"),
        (["--sigmas", "1000"], "outside the schedule"),
        (["--label_column", "image"], "no column of labels 'image'"),
        (["--test_split", "holdout"], "has no split 'holdout'"),
        (["--few_labels", "1000"], "the smallest class has"),
        (["--model_name_or_path", "/nowhere/at/all"], "is not a folder"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_computed(checkpoint, digits, tmp_path, options, message):  # noqa: F811
    arguments = ["--model_name_or_path", checkpoint, "--dataset_name", digits, "--output_dir", tmp_path / "out"]
    with pytest.raises(SystemExit, match=message):
        commands.run("probe", *arguments, *options)
    assert not (tmp_path / "out").exists()
