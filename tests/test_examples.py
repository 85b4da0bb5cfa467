"""The scripts of `examples/`, each run as it is on a tiny checkpoint and some digits."""

import ast
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from ddae_hf import DDAEForImageClassification, DDAEImageProcessor, DDAEPipeline
from ddae_hf.experiments import Report

from .conftest import drawn, make_unet

EXAMPLES = Path(__file__).parent.parent / "examples"
OF_PYTHON = [path for path in sorted(EXAMPLES.glob("*.py")) if path.stem != "pretrain"]  # which is a command's


@pytest.fixture(scope="module")
def made(tmp_path_factory, digits):
    """A checkpoint as the quickstart leaves it, and some of its digits."""
    folder = tmp_path_factory.mktemp("made")
    unet = make_unet(in_channels=1, out_channels=1, block_out_channels=(32, 32))
    DDAEPipeline.for_denoiser(unet, DDIMScheduler()).save_pretrained(folder / "checkpoint")
    DDAEImageProcessor.for_denoiser(unet.config).save_pretrained(folder / "checkpoint")
    (folder / "digits").mkdir()
    for split, count in (("train", 200), ("test", 50)):
        drawn(digits, split, count).to_parquet(folder / "digits" / f"{split}.parquet")
    return folder


@pytest.fixture
def run(made, tmp_path, monkeypatch, capsys):
    """Run a script in an empty folder, as its users do, and return what it prints."""

    def run(name):
        monkeypatch.chdir(tmp_path)
        words = ["--checkpoint", str(made / "checkpoint"), "--data", str(made / "digits")]
        monkeypatch.setattr(sys, "argv", [name, *words])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_features_serve_scikit_learn(run):
    said = run("classify_features").splitlines()
    assert said[0] == "32 features of 200 + 50 images, at up_blocks.0.attentions.1"
    for line, name in zip(said[1:], ("logistic regression", "5 nearest neighbours"), strict=True):
        assert line.startswith(f"{name}: ") and line.endswith(" of the test images")
        assert float(line.split(": ")[1].split("%")[0]) > 30  # where chance is 10


def test_a_sweep_is_at_hand_in_python(run, tmp_path):
    said = run("sweep_layers")
    result = Report.read(tmp_path / "runs" / "sweep_layers")
    assert {pair.sigma for pair in result.pairs} == {0.05, 0.1, 0.3}
    assert f"{result.best.layer} at sigma {result.best.sigma:g} is the classifier in runs/sweep_layers." in said
    assert said.count("\n  sigma ") == 3 and said.rstrip()[-2].isdigit()
    classifier = DDAEForImageClassification.from_pretrained(tmp_path / "runs" / "sweep_layers")
    assert classifier.config.layer == result.best.layer


def test_trainer_fine_tunes_a_checkpoint(run, tmp_path):
    said = run("finetune_with_trainer")
    assert "% of the test images are recognised.\nThe classifier is in runs/finetuned_with_trainer." in said
    tuned = DDAEForImageClassification.from_pretrained(tmp_path / "runs" / "finetuned_with_trainer")
    assert tuned.config.id2label == {number: str(number) for number in range(10)}
    assert DDAEImageProcessor.from_pretrained(tmp_path / "runs" / "finetuned_with_trainer").num_channels == 1


def test_feature_maps_become_a_picture(run, tmp_path):
    said = run("dense_features")
    assert "up_blocks.1.resnets.1: 32 channels of 8x8" in said
    picture = np.asarray(Image.open(tmp_path / "runs" / "dense_features.png")).astype(int)
    assert picture.shape == (3 * 104, 8 * 104, 3)
    digits, *layers = picture.reshape(3, 104, 8 * 104, 3)
    assert np.ptp(digits, axis=-1).max() == 0  # which are grey
    for layer in layers:
        assert np.ptp(layer, axis=-1).mean() > 20


def test_sampling_is_a_loop_of_ones_own(run, tmp_path, made):
    said = run("sample_step_by_step")
    strip = np.asarray(Image.open(tmp_path / "runs" / "sample_step_by_step.png"))[::6, ::6]
    assert strip.shape == (8 * 10, 10 * 10) and "sample_step_by_step.png" in said
    script = runpy.run_path(str(EXAMPLES / "sample_step_by_step.py"))
    pipeline = DDAEPipeline.from_pretrained(made / "checkpoint")
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    pipeline.scheduler.set_timesteps(script["NUM_STEPS"])
    *_, last = script["denoised_step_by_step"](pipeline, noise, pipeline.scheduler.timesteps)
    [expected] = pipeline(2, latents=noise, num_inference_steps=50, output_type="latent", return_dict=False)
    torch.testing.assert_close(last, expected)  # as the pipeline samples


@pytest.mark.parametrize("path", OF_PYTHON, ids=lambda path: path.stem)
def test_an_example_is_short_and_begins_with_what_the_quickstart_leaves(path):
    text = path.read_text()
    assert text.count("\n") <= 80
    tree = ast.parse(text)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and "add_argument" in ast.unparse(node.func)]
    options = {call.args[0].value: {word.arg: word.value for word in call.keywords}["default"].value for call in calls}
    assert options == {"--checkpoint": "runs/quickstart/checkpoint", "--data": "runs/quickstart/digits"}
    assert f"python examples/{path.name} --checkpoint {options['--checkpoint']} --data {options['--data']}" in text
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name for name in modules if name.startswith("ddae_hf")} <= {"ddae_hf", "ddae_hf.experiments"}


def test_every_example_has_a_test():
    assert {path.stem for path in OF_PYTHON} == {
        "classify_features", "dense_features", "finetune_with_trainer", "sample_step_by_step", "sweep_layers",
    }  # fmt: skip
