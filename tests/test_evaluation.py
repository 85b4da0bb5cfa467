"""Measuring generated images, as a function and as the script that its users run: tiny networks, real digits."""

import builtins
import json
import logging
import os
import random
import re
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
import scipy.linalg
import torch
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.neighbors import NearestNeighbors

from ddae_hf import DDAEImageProcessor, DDAEModel, DDAEPipeline
from ddae_hf.experiments import evaluate_generation
from ddae_hf.experiments.evaluation import (
    EvaluationOptions,
    compare_samples,
    find_images,
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from ddae_hf.experiments.extractors import open_extractor
from ddae_hf.experiments.features import extract_features
from ddae_hf.experiments.images import Images
from ddae_hf.experiments.plots import image_grid
from ddae_hf.experiments.results import GenerationReport

from . import commands
from .conftest import drawn, put
from .test_extractors import save_pipeline, save_vit

pytestmark = pytest.mark.filterwarnings("ignore:.*their covariance is singular")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("generator"))


@pytest.fixture(scope="module")
def extractor(tmp_path_factory):
    return "ddae:" + save_pipeline(tmp_path_factory.mktemp("extractor"), seed=1)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return save_vit(tmp_path_factory.mktemp("vit"))


@pytest.fixture
def measure(digits, tmp_path):
    """Run the script on few digits, and return its report."""

    def run(*options, output="out", data=digits):
        arguments = ["--dataset_name", str(data), "--max_reference_samples", "60", "--num_inference_steps", "2"]
        arguments += ["--features_dir", str(tmp_path / "features"), "--output_dir", str(tmp_path / output)]
        commands.run("evaluate", *arguments, *options)
        return json.loads((tmp_path / output / "generation_results.json").read_text())

    return run


def write_digits(digits, folder, count, start=0, split="train"):
    folder.mkdir(parents=True, exist_ok=True)
    images = drawn(digits, split, start + count).select(range(start, start + count))["image"][:]
    for i, image in enumerate(images):
        image.save(folder / f"{i:04d}.png")
    return images


def test_a_run_leaves_every_figure_and_its_origin(measure, checkpoint, extractor, tmp_path, capsys, caplog):
    options = ["--model_name_or_path", checkpoint, "--num_images", "40", "--extractor", extractor, "--seed", "3"]
    report = measure(*options, "--baseline_split", "test")
    generated, real = report["results"]["generated"], report["results"]["real (test)"]
    assert generated["num_images"] == real["num_images"] == generated["kernel_distance_subset_size"] == 40
    assert report["reference"] == {
        "source": report["options"]["dataset_name"],
        "name": "real (train)",
        "num_images": 60,
    }
    # The networks are untrained: what they make is far from digits.
    assert real["frechet_distance"] < 0.2 * generated["frechet_distance"]
    assert real["kernel_distance"] < 0.2 * generated["kernel_distance"]
    assert real["precision"] > 0.5 > generated["precision"]
    assert len(report["generator"]["weights"]) == 64 and report["generator"]["scheduler"] == "DDIMScheduler"
    assert report["extractor"]["sigma"] == 0.05 and report["extractor"]["weights"] != report["generator"]["weights"]
    assert report["versions"].keys() > {"python", "torch", "diffusers", "transformers", "torchmetrics", "pillow"}
    assert Image.open(tmp_path / "out" / "grid.png").size[0] > 800
    text = capsys.readouterr().out
    assert "sampled by DDIMScheduler in 2 steps, with seeds from 3" in text
    assert f"| generated | 40 | {generated['frechet_distance']:.4g} |" in text and "| real (test) | 40 |" in text
    assert report["dataset"]["num_images"] == 60 and report["hardware"]
    caplog.set_level(logging.INFO, "ddae_hf")
    assert measure(*options, "--baseline_split", "test")["results"] == report["results"]
    assert caplog.text.count("reused from") == 3


def test_figures_are_those_of_features_computed_by_hand(measure, checkpoint, extractor, digits, tmp_path):
    options = ["--extractor_layer", "mid_block", "--extractor_sigma", "0.3", "--extractor_batch_size", "7"]
    report = measure("--model_name_or_path", checkpoint, "--num_images", "12", "--extractor", extractor, *options)
    path = extractor.removeprefix("ddae:")
    model, processor = DDAEModel.from_pretrained(path), DDAEImageProcessor.from_pretrained(path)
    real = drawn(digits, "train", 60)["image"][:]
    made = [Image.open(file) for file in sorted((tmp_path / "out" / "images").glob("*.png"))]
    features = [
        extract_features(model, [processor(images, return_tensors="pt")["pixel_values"]], ["mid_block"], 0.3, view=view)
        for view, images in enumerate([real, made])
    ]
    real, made = (found["mid_block"] for found in features)
    found = report["results"]["generated"]
    assert found["frechet_distance"] == pytest.approx(frechet_distance(real, made), rel=1e-4)
    assert (found["precision"], found["recall"]) == precision_recall(real, made)


def test_a_resumed_run_gives_the_same_figures(measure, checkpoint, extractor, tmp_path):
    options = ["--model_name_or_path", checkpoint, "--num_images", "11", "--batch_size", "4", "--extractor", extractor]
    first = measure(*options)
    images = tmp_path / "out" / "images"
    kept = (images / "00000.png").stat().st_mtime_ns
    before = {path.name: path.read_bytes() for path in images.glob("*.png")}
    for number in (1, 6, 10):
        (images / f"{number:05d}.png").unlink()
    shutil.rmtree(tmp_path / "features")
    assert measure(*options)["results"] == first["results"]
    assert {path.name: path.read_bytes() for path in images.glob("*.png")} == before and len(before) == 11
    assert (images / "00000.png").stat().st_mtime_ns == kept
    with pytest.raises(SystemExit, match=r"made otherwise \(seed is 0 there, 5 here\)"):
        measure(*options, "--seed", "5")


def read_images(folder, count):
    return np.stack([np.asarray(Image.open(folder / f"{i:05d}.png"), dtype=int) for i in range(count)])


@pytest.mark.slow  # three processes import everything
def test_two_processes_share_the_images(checkpoint, extractor, digits, tmp_path):
    options = ["--model_name_or_path", checkpoint, "--num_images", "10", "--batch_size", "3", "--extractor", extractor]
    options += ["--dataset_name", str(digits), "--max_reference_samples", "40", "--num_inference_steps", "2"]
    options += ["--features_dir", str(tmp_path / "features"), "--output_dir"]
    commands.run("evaluate", *options, str(tmp_path / "one"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "ddae_hf", "evaluate"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *options, str(tmp_path / "two")], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| generated | 10 |") == 1
    np.testing.assert_allclose(
        read_images(tmp_path / "two" / "images", 10), read_images(tmp_path / "one" / "images", 10), atol=1
    )


@pytest.mark.parametrize("name", ["features.npy", "identity.json"])
def test_features_that_are_damaged_are_not_used(measure, vit, digits, tmp_path, name):
    write_digits(digits, tmp_path / "given", 8)
    options = ["--images_dir", str(tmp_path / "given"), "--extractor", f"transformers:{vit}"]
    measure(*options)
    for path in (tmp_path / "features").glob(f"*/{name}"):
        content = path.read_bytes()
        path.write_bytes(content[:-40] + bytes(40))
    with pytest.raises(SystemExit, match=f"{name} is damaged .*delete this folder"):
        measure(*options)


def test_features_are_kept_for_the_same_images_and_network_only(vit, extractor, digits, tmp_path, caplog):
    data, features, given = tmp_path / "data", tmp_path / "features", tmp_path / "given"
    shutil.copytree(digits, data)
    write_digits(digits, given, 8)
    caplog.set_level(logging.INFO, "ddae_hf")
    known = {"reference_split": "train", "max_reference_samples": 20, "features_dir": features}

    def reused(extractor, **changes):
        caplog.clear()
        before = len(list(features.glob("*/features.npy")))
        evaluate_generation(given, Images.open(data), extractor=extractor, **{**known, **changes})
        again = "Features of real" in caplog.text and "reused from" in caplog.text
        assert len(list(features.glob("*/features.npy"))) - before in ([0] if again else [1, 2])
        return again

    assert not reused(extractor)
    assert reused(extractor)
    assert not reused(extractor, max_reference_samples=19)
    assert not reused(extractor, extractor_sigma=0.1)
    assert not reused(extractor, extractor_layer="mid_block")
    assert not reused(extractor, reference_split="test")
    assert not reused(f"transformers:{vit}")
    other = tmp_path / "other"
    shutil.copytree(extractor.removeprefix("ddae:"), other)
    assert reused(f"ddae:{other}")  # the same weights in another place
    weights = other / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    state["conv_in.weight"] *= 1 + 1e-5
    save_file(state, weights, metadata={"format": "pt"})
    assert not reused(f"ddae:{other}")
    rows = Dataset.from_parquet(str(digits / "train.parquet"))
    rows.select(range(len(rows))[::-1]).to_parquet(data / "train.parquet")
    assert not reused(extractor)
    for path in features.glob("*/features.npy"):
        identity = json.loads(path.with_name("identity.json").read_text())
        assert identity["images"]["number"] == len(np.load(path))


def test_only_features_under_noise_differ_for_the_same_images(measure, vit, extractor, digits, tmp_path):
    write_digits(digits, tmp_path / "given", 60)
    given = ["--images_dir", str(tmp_path / "given"), "--extractor"]
    same = measure(*given, f"transformers:{vit}")
    assert same["extractor"]["features"] == "pooler_output" and same["extractor"]["width"] == 16
    assert same["generator"] == {"images_dir": str(tmp_path / "given")}
    figures = same["results"]["generated"]
    assert abs(figures["frechet_distance"]) < 1e-6 and (figures["precision"], figures["recall"]) == (1, 1)
    noisy = measure(*given, extractor, "--extractor_sigma", "0.5")["results"]["generated"]
    assert noisy["frechet_distance"] > 1e-3 and noisy["precision"] > 0.8


def test_images_of_any_folder_size_and_mode_are_measured(measure, vit, digits, tmp_path):
    folder = tmp_path / "given"
    write_digits(digits, folder / "a", 4)
    write_digits(digits, folder / "b", 4, start=10)
    for i, mode in enumerate(["RGB", "RGBA", "P", "L"]):
        Image.open(folder / "a" / f"{i:04d}.png").convert(mode).resize((9 + i, 20)).save(folder / f"{mode}.png")
    Image.new("RGB", (30, 30)).save(folder / "c.JPG")
    Image.new("RGB", (500, 500)).save(folder / "grid.png")
    (folder / "notes.txt").write_text("no image")
    for extractor in (
        f"transformers:{vit}",
        "ddae:" + save_pipeline(tmp_path / "colour", in_channels=3, out_channels=3),
    ):
        report = measure("--images_dir", str(folder), "--extractor", extractor)
        assert report["results"]["generated"]["num_images"] == 13


def test_images_are_found_through_links_and_the_rest_is_said(tmp_path):
    put(tmp_path, "store/1.png", "images/0.png", "images/grid.png", "images/sub/grid.png", "images/2.heic")
    (tmp_path / "images" / "linked").symlink_to(tmp_path / "store")
    with pytest.warns(UserWarning, match=r"skipped 2 files: 1 \.?\w+(\.png)?, 1 "):
        found = find_images(tmp_path / "images")
    assert [str(path.relative_to(tmp_path / "images")) for path in found] == ["0.png", "linked/1.png", "sub/grid.png"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--extractor", "vgg"], "extractor is vgg: allowed are ddae:PATH"),
        (["--extractor", "inception", "--extractor_sigma", "0.1"], "are for a DDAE extractor, not for inception"),
        (["--images_dir", "somewhere"], "Give one of model_name_or_path and images_dir"),
        (["--num_images", "3"], "num_images is 3: it must be at least 4"),
        (["--extractor_batch_size", "0"], "extractor_batch_size is 0: it must be at least 1"),
        (["--sampling_scheduler", "Adam"], "diffusers has no such scheduler"),
        (["--baseline_split", "holdout"], "has no split 'holdout'"),
        (["--baseline_split", "train"], "baseline_split is 'train', like reference_split: compare other images"),
        (["--features_dir", __file__], "features_dir is .* is a file: give a folder"),
        (["--max_reference_samples", "3"], r"There are 3 images 'real \(train\)': at least 4 are needed"),
        (["--extractor_layer", "up_blocks.7"], "cannot be used: There is no layer"),
        (["--extractor", "ddae:nowhere/at/all"], "extractor ddae:nowhere/at/all cannot be used"),
        (["--sampler", "heun"], "needs an EDMEulerScheduler"),
        (["--class_label", "3"], "the denoiser is unconditional"),
    ],
)
def test_what_cannot_work_ends_the_run_before_it_samples(
    measure, checkpoint, extractor, tmp_path, capsys, options, message
):
    with pytest.raises(SystemExit) as refusal:
        measure("--model_name_or_path", checkpoint, "--num_images", "5", "--extractor", extractor, *options)
    assert re.search(message, str(refusal.value) + capsys.readouterr().err)
    assert not (tmp_path / "out").exists() and not (tmp_path / "features").exists()


def test_folders_that_cannot_be_measured_are_refused(measure, vit, digits, checkpoint, tmp_path, capsys):
    for folder in (tmp_path / "none", checkpoint):
        with pytest.raises(SystemExit):
            measure("--images_dir", folder, "--extractor", f"transformers:{vit}")
        assert "there is no such folder, or it holds a checkpoint" in capsys.readouterr().err
    write_digits(digits, tmp_path / "few", 3)
    with pytest.raises(SystemExit, match="There are 3 images 'generated'"):
        measure("--images_dir", str(tmp_path / "few"), "--extractor", f"transformers:{vit}")


def test_a_function_measures_an_open_pipeline_without_a_word(measure, checkpoint, extractor, digits, tmp_path, capsys):
    """Into nowhere, of images in memory, with global random states as they were: the figures are the script's."""
    rows = drawn(digits, "train", 60)
    images = Images.open(rows["image"][:], labels=rows["label"][:])
    pipeline = DDAEPipeline.from_pretrained(checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    states = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    options = EvaluationOptions(extractor=extractor, num_images=8, num_inference_steps=2)
    result = evaluate_generation(pipeline, images, options, batch_size=3)
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert capsys.readouterr().out == "" and list(tmp_path.iterdir()) == []
    expected = measure("--model_name_or_path", checkpoint, "--num_images", "8", "--extractor", extractor)
    figures, generated = expected["results"]["generated"], result.results["generated"]
    assert generated == {name: pytest.approx(value, rel=1e-3) for name, value in figures.items()}
    assert result.picture().axes[0].get_title() == "generated, 8 of 8"
    result.save(tmp_path / "saved")
    saved = GenerationReport.read(tmp_path / "saved")
    assert saved.results == result.results and saved.table() == result.table()
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["generation_results.json", "grid.png"]


def test_a_folder_gets_the_images_of_a_model_their_figures_and_a_picture(checkpoint, extractor, digits, tmp_path):
    options = {"num_images": 6, "num_inference_steps": 2, "max_reference_samples": 30, "extractor": extractor}
    model = DDAEModel.from_pretrained(checkpoint)
    result = evaluate_generation(model, Images.open(digits), output_dir=tmp_path, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["generation_results.json", "grid.png", "images"]
    assert GenerationReport.read(tmp_path).results == result.results


def test_no_extractor_and_a_stream_are_refused_in_words(checkpoint, extractor, digits):
    with pytest.raises(ValueError, match="extractor is not given: ddae:PATH, transformers:PATH, inception"):
        evaluate_generation(checkpoint, Images.open(digits))
    with pytest.raises(ValueError, match="The stream 'train' does not say how many images it has: leave out streaming"):
        evaluate_generation(checkpoint, Images.open(digits, streaming=True), extractor=extractor)


def test_one_extractor_compares_several_checkpoints(checkpoint, extractor, digits, tmp_path):
    images, options = Images.open(digits), EvaluationOptions(extractor=extractor, num_images=6, num_inference_steps=2)
    known = open_extractor(extractor)
    for name, model in {"a": checkpoint, "b": extractor.removeprefix("ddae:")}.items():
        found = EvaluationOptions.of(options, {"output_dir": tmp_path / name, "max_reference_samples": 30})
        assert compare_samples(model, images, found, known).results["generated"]["num_images"] == 6
        assert len(list((tmp_path / name / "images").glob("*.png"))) == 6


def test_a_damaged_image_is_named(vit, digits, tmp_path):
    extractor = f"transformers:{vit}"
    write_digits(digits, tmp_path / "given", 5)
    rows = Dataset.from_parquet(str(digits / "train.parquet"))[:6]["image"]
    for i, image in enumerate(rows):
        (tmp_path / "real").mkdir(exist_ok=True)
        image.save(tmp_path / "real" / f"{i}.png")
    (tmp_path / "real" / "3.png").write_bytes((tmp_path / "real" / "3.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"3\.png"):
        evaluate_generation(tmp_path / "given", Images.open(tmp_path / "real"), extractor=extractor)
    (tmp_path / "given" / "0004.png").write_text("<html>")
    with pytest.raises(ValueError, match=r"0004\.png"):
        evaluate_generation(tmp_path / "given", Images.open(digits), extractor=extractor, max_reference_samples=8)


def test_a_full_disk_is_a_sentence(vit, digits, tmp_path, monkeypatch):
    write_digits(digits, tmp_path / "given", 5)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    options = {"extractor": f"transformers:{vit}", "features_dir": tmp_path / "features", "max_reference_samples": 8}
    with pytest.raises(OSError, match=r"are needed in .*features.*, where .* are free"):
        evaluate_generation(tmp_path / "given", Images.open(digits), **options)


def test_pictures_of_deep_images_are_not_white():
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    deep = image_grid([Image.fromarray(grey * np.uint16(257))])
    assert np.array_equal(np.asarray(deep), np.asarray(image_grid([Image.fromarray(grey)])))


# Figures of features: closed forms, float64 formulas, scikit-learn and torch-fidelity


def draw(count, width, seed, scale=1.0, shift=0.0):
    """Correlated features, far from the origin."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((count, width)) @ np.random.default_rng(9).standard_normal((width, width))
    return torch.from_numpy(scale * mixed + 20 + shift).float()


@pytest.fixture
def real():
    return draw(300, 8, 0)


@pytest.fixture
def generated():
    return draw(200, 8, 1, scale=1.3, shift=0.5)


def frechet_formula(real, generated):
    first, second = real.double().numpy(), generated.double().numpy()
    cov_1, cov_2 = np.cov(first.T), np.cov(second.T)
    root = scipy.linalg.sqrtm(cov_1 @ cov_2).real
    return np.sum((first.mean(0) - second.mean(0)) ** 2) + np.trace(cov_1 + cov_2 - 2 * root)


def test_frechet_is_the_formula(real, generated):
    assert frechet_distance(real, generated) == pytest.approx(frechet_formula(real, generated), rel=1e-9)


def test_frechet_of_a_set_with_itself_is_zero(real):
    assert abs(frechet_distance(real, real)) < 1e-8 * real.var(0).sum()
    assert abs(frechet_distance(real, real.flip(0))) < 1e-8 * real.var(0).sum()


def test_frechet_of_gaussians_with_one_set_of_axes():
    """Two diagonal covariances: the squared differences of means and of standard deviations, summed."""
    signs = torch.tensor(np.stack(np.meshgrid(*[[-1.0, 1.0]] * 4), -1).reshape(-1, 4))
    unit = signs * np.sqrt(15 / 16)  # 16 points of mean 0 and covariance 1, divided by N - 1
    stds = torch.tensor([[1.0, 2.0, 0.5, 3.0], [1.5, 1.0, 0.5, 2.0]], dtype=torch.float64)
    means = torch.tensor([[0.0, 1.0, 2.0, -4.0], [0.5, 1.0, -1.0, 100.0]], dtype=torch.float64)
    first, second = (unit * std + mean for std, mean in zip(stds, means, strict=True))
    expected = (means[0] - means[1]).square().sum() + (stds[0] - stds[1]).square().sum()
    assert frechet_distance(first, second) == pytest.approx(expected.item(), rel=1e-9)


def test_every_figure_is_the_same_in_turned_space_and_in_another_order(real, generated):
    rotation = torch.from_numpy(scipy.linalg.qr(np.random.default_rng(3).standard_normal((8, 8)))[0])
    turned = [(x.double() @ rotation)[torch.randperm(len(x))] for x in (real, generated)]
    assert frechet_distance(*turned) == pytest.approx(frechet_distance(real, generated), rel=1e-9)
    assert precision_recall(*turned) == precision_recall(real, generated)
    first, second = real[:200].double(), generated.double()
    options = {"subsets": 1, "subset_size": 200}
    expected = kernel_distance(first, second, **options)[0]
    assert kernel_distance(first @ rotation, second.flip(0) @ rotation, **options)[0] == pytest.approx(expected)


def test_distances_do_not_mind_which_set_is_real(real, generated):
    assert frechet_distance(real, generated) == pytest.approx(frechet_distance(generated, real), rel=1e-9)
    assert precision_recall(real, generated) == precision_recall(generated, real)[::-1]


def kernel_formula(first, second):
    """The unbiased estimate, written as sums over pairs."""
    count, width = first.shape

    def kernel(x, y):
        return (x @ y / width + 1) ** 3

    pairs = [(i, j) for i in range(count) for j in range(count)]
    within = sum(kernel(x[i], x[j]) for x in (first, second) for i, j in pairs if i != j) / (count * (count - 1))
    return within - 2 * sum(kernel(first[i], second[j]) for i, j in pairs) / count**2


def test_the_kernel_distance_of_whole_sets_is_the_unbiased_estimate(real, generated):
    first, second = real[:40], generated[:40]
    mean, spread = kernel_distance(first, second, subsets=3, subset_size=40)
    assert mean == pytest.approx(kernel_formula(first.double().numpy(), second.double().numpy()), rel=1e-9)
    assert spread < 1e-9 * abs(mean)


def test_the_kernel_distance_of_one_distribution_is_zero_on_average():
    """As an unbiased estimate is; a biased one would be above 0 by as much as the spread or more."""
    first, second = (torch.from_numpy(np.random.default_rng(seed).standard_normal((4000, 4))) for seed in (0, 1))
    mean, spread = kernel_distance(first, second, subsets=200, subset_size=20)
    assert abs(mean) < 4 * spread / 200**0.5 + 0.02 and spread > 0.01
    other = second + 1
    assert kernel_distance(first, other, subsets=200, subset_size=20)[0] > 10 * abs(mean)


def test_subsets_depend_on_the_seed_alone(real, generated):
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    first = kernel_distance(real, generated, subsets=5, subset_size=50, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(7)
    assert kernel_distance(real, generated, subsets=5, subset_size=50, seed=1) == first
    assert kernel_distance(real, generated, subsets=5, subset_size=50, seed=2)[0] != pytest.approx(first[0], rel=1e-6)
    assert first[1] > 0


def manifold_formula(real, generated, k):
    def share(points, of):
        radii = NearestNeighbors(n_neighbors=k + 1, algorithm="brute").fit(of).kneighbors(of)[0][:, -1]
        return np.mean([(np.linalg.norm(of - point, axis=1) <= radii).any() for point in points])

    return share(generated, real), share(real, generated)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_precision_and_recall_are_those_of_scikit_learns_neighbours(k):
    real, generated = draw(150, 3, 0), draw(120, 3, 1, scale=1.6)
    expected = manifold_formula(real.double().numpy(), generated.double().numpy(), k)
    found = precision_recall(real, generated, k)
    assert found == pytest.approx(expected, abs=1e-12)
    assert all(0 < share < 1 for share in found)


@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
def test_chunks_change_nothing(real, generated, chunk_size):
    assert precision_recall(real, generated, chunk_size=chunk_size) == precision_recall(real, generated)


def test_a_set_lies_among_itself_and_not_among_one_far_away(real):
    assert precision_recall(real, real) == (1.0, 1.0)
    repeated = real[:20].repeat(5, 1)  # more copies than neighbours: the radius is 0
    assert precision_recall(repeated, repeated.flip(0)) == (1.0, 1.0)
    assert precision_recall(real, real + 1000) == (0.0, 0.0)


def test_one_mode_of_two_is_precise_and_recalls_half():
    first, second = draw(100, 4, 0), draw(100, 4, 1) + 500
    assert precision_recall(torch.cat([first, second]), first) == (1.0, 0.5)
    assert precision_recall(first, torch.cat([first, second])) == (0.5, 1.0)


def test_too_few_images_for_a_covariance_are_told():
    with pytest.warns(UserWarning, match="8 images came for features of 8 numbers: their covariance is singular"):
        frechet_distance(draw(8, 8, 0), draw(50, 8, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frechet_distance(draw(9, 8, 0), draw(50, 8, 1))


FIGURES = [frechet_distance, kernel_distance, precision_recall]


@pytest.mark.parametrize("figure", FIGURES)
def test_features_that_cannot_be_compared_are_refused(figure, real):
    options = {"subset_size": 10} if figure is kernel_distance else {}
    with pytest.raises(ValueError, match=r"shapes \(300, 8\) and \(300, 7\)"):
        figure(real, real[:, :7], **options)
    with pytest.raises(ValueError, match=r"must be \(N, C\)"):
        figure(real[0], real[0], **options)
    with pytest.raises(ValueError, match="there must be at least"):
        figure(real, real[:1], **options)
    broken = real.clone()
    broken[3, 2], broken[3, 3], broken[5, 0] = torch.nan, torch.inf, torch.nan
    with pytest.raises(ValueError, match="2 of 300 generated images have features that are not finite"):
        figure(real, broken, **options)
    with pytest.raises(ValueError, match="2 of 300 real images"):
        figure(broken, real, **options)


def test_options_that_cannot_work_are_refused(real):
    with pytest.raises(ValueError, match="at least 1000 images of each kind"):
        kernel_distance(real, real)
    with pytest.raises(ValueError, match="0 subsets of 10 images are asked for"):
        kernel_distance(real, real, subsets=0, subset_size=10)
    with pytest.raises(ValueError, match="100 subsets of 1 images"):
        kernel_distance(real, real, subset_size=1)
    with pytest.raises(ValueError, match="k is 0"):
        precision_recall(real, real, k=0)
    with pytest.raises(ValueError, match="at least 4 images of each kind"):
        precision_recall(real, real[:3])


def test_without_torchmetrics_it_says_what_to_install(monkeypatch, real):
    found = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("torchmetrics"):
            raise ImportError(name)
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    for figure in (frechet_distance, lambda a, b: kernel_distance(a, b, subset_size=10)):
        with pytest.raises(ImportError, match='pip install .*"torchmetrics>=1.6"'):
            figure(real, real)


def test_figures_are_torch_fidelitys(real, generated):
    pytest.importorskip("torch_fidelity", exc_type=ImportError)
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kernel_mmd
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    statistics = [fid_features_to_statistics(features.double()) for features in (generated, real)]
    expected = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(real, generated) == pytest.approx(expected, rel=1e-6)
    kernel = {"kid_kernel": "poly", "kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None}
    expected = kernel_mmd(generated.double().numpy(), real[:200].double().numpy(), kid_kernel_poly_coef0=1, **kernel)
    assert kernel_distance(real[:200], generated, subset_size=200)[0] == pytest.approx(expected, rel=1e-6)
    # Its versions differ in which set they take first.
    expected = calculate_precision_recall_full(generated.double(), real.double(), 3)
    assert sorted(precision_recall(real, generated)) == pytest.approx(sorted(expected), abs=1e-6)
