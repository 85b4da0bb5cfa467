"""Telling images of other data sets from known ones, against formulas in float64 of its own."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from matplotlib.figure import Figure
from PIL import Image

from ddae_hf import DDAEImageProcessor, DDAEModel, DDAEPipeline
from ddae_hf.experiments import (
    Images,
    OutlierOptions,
    Report,
    detect_outliers,
    export_features,
    features,
    make_card,
)
from ddae_hf.experiments.arrays import rows_done
from ddae_hf.experiments.draws import indexed_noise
from ddae_hf.experiments.outlier_detection import Study, outside_sets
from ddae_hf.experiments.outlier_report import OutlierReport

from . import commands
from .conftest import drawn, make_dit, make_unet, make_vae, put

SIGMAS = [0.3, 1.5]
SMALL = {"max_train_samples": 90, "max_test_samples": 7, "num_draws": 2, "error_sigmas": SIGMAS, "neighbour": 3}
SMALL |= {"sigma": 0.2, "batch_size": 3}
LAYERS = {"ddpm": "mid_block", "ddim": "transformer_blocks.1", "edm": "mid_block", "flow": "transformer_blocks.1"}
ERRORS = ["mean of levels", "sigma 0.3", "sigma 1.5"]


def unet():
    return make_unet(in_channels=1, out_channels=1)


def dit():
    """An unconditional DiT whose answers depend on its input: diffusers' own start ends in zeros."""
    network = make_dit(in_channels=1, num_layers=2, num_embeds_ada_norm=0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    return network


PAIRS = {
    "ddpm": (unet, DDPMScheduler),
    "ddim": (dit, lambda: DDIMScheduler(prediction_type="v_prediction")),
    "edm": (unet, EDMEulerScheduler),
    "flow": (dit, FlowMatchEulerDiscreteScheduler),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    for name, (make, scheduler) in PAIRS.items():
        DDAEPipeline.for_denoiser(make(), scheduler()).save_pretrained(root / name)
    put(root / "others", *(f"test/{number}.png" for number in range(9)))
    return root


@pytest.fixture(scope="module")
def result(checkpoints, digits, tmp_path_factory):
    """What is found of the first checkpoint, with its folder."""
    return run(checkpoints, "ddpm", digits, output_dir=tmp_path_factory.mktemp("result"))


def run(checkpoints, name, digits, outside=None, **options):
    outside = {"noise": checkpoints / "others"} if outside is None else outside
    layer = {"layer": LAYERS[name]} if name in LAYERS else {}
    return detect_outliers(checkpoints / name, Images.open(digits), outside, **{**SMALL, **layer, **options})


def pixels(checkpoint, images):
    return DDAEImageProcessor.from_pretrained(checkpoint)(images, return_tensors="pt")["pixel_values"]


def answer_of(network, fed, timestep):
    with torch.no_grad():
        given = {"class_labels": torch.zeros(1, dtype=torch.int64)} if hasattr(network, "transformer_blocks") else {}
        return network(fed, torch.as_tensor(timestep)[None], **given).sample


def ddpm_error(network, scheduler, clean, noise, sigma):
    levels = ((1 - scheduler.alphas_cumprod.double()) / scheduler.alphas_cumprod.double()).sqrt()
    right = (levels > sigma).int().argmax()  # a level between two timesteps has one between them
    low, high = levels[right - 1].log(), levels[right].log()
    timestep = right - 1 + (np.log(sigma) - low) / (high - low)
    kept = 1 / np.sqrt(1 + sigma**2)
    spread = sigma * kept
    target = noise
    if scheduler.config.prediction_type == "v_prediction":
        target = kept * noise - spread * clean
    return answer_of(network, kept * clean + spread * noise, timestep) - target


def edm_error(network, scheduler, clean, noise, sigma):
    noisy = clean + sigma * noise
    level = torch.tensor(sigma, dtype=torch.float64)
    answer = answer_of(network, scheduler.precondition_inputs(noisy, level), scheduler.precondition_noise(level))
    denoised = scheduler.precondition_outputs(noisy, answer, level)
    return (denoised - clean) * np.sqrt(sigma**2 + 0.25) / (sigma * 0.5)


def flow_error(network, scheduler, clean, noise, sigma):
    time = sigma / (1 + sigma)
    return answer_of(network, (1 - time) * clean + time * noise, 1000 * time) - (noise - clean)


FORMULAS = {"ddpm": ddpm_error, "ddim": ddpm_error, "edm": edm_error, "flow": flow_error}


@pytest.mark.parametrize("name", FORMULAS)
def test_errors_are_those_of_a_formula_in_float64(checkpoints, digits, name):
    found = run(checkpoints, name, digits, scores=["error"]).scores
    pipeline = DDAEPipeline.from_pretrained(checkpoints / name)
    network = pipeline.denoiser.double().eval()
    images = {"known": drawn(digits, "test", 7)["image"][:], "noise": others(checkpoints, 7)}
    for which, each in images.items():
        clean = pixels(checkpoints / name, each).double()[5:6]
        means = [
            np.mean([
                FORMULAS[name](network, pipeline.scheduler, clean, noise_of(draw), sigma).square().mean().item()
                for draw in range(2)
            ])
            for sigma in SIGMAS
        ]  # fmt: skip
        scores = [found[f"denoising error, {score}"][which][5] for score in ERRORS]
        np.testing.assert_allclose(scores, [np.mean(means), *means], rtol=2e-4)


def noise_of(draw, shape=(1, 8, 8)):
    return indexed_noise(shape, [5], 0, 1 + 2 * draw).double()


def others(checkpoints, count):
    """The images of the other data set that are taken."""
    chosen = Images.open(checkpoints / "others")["test"].take(count)
    return chosen.pil(range(len(chosen)))


@pytest.mark.parametrize("name", LAYERS)
def test_distances_are_those_of_exported_features(checkpoints, digits, name, tmp_path):
    found = run(checkpoints, name, digits).scores
    given = {"layers": [LAYERS[name]], "sigma": 0.2}
    train = export_features(
        checkpoints / name, digits, split="train", max_samples=90, output_dir=tmp_path / "train", **given
    )
    outside = export_features(
        checkpoints / name, checkpoints / "others", split="test", max_samples=7, view=1,
        output_dir=tmp_path / "outside", **given,
    )  # fmt: skip
    known, new = (np.float64(each.features[LAYERS[name]]) for each in (train, outside))
    unit = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in (known, new)]
    near = np.sort(np.linalg.norm(unit[1][:, None] - unit[0], axis=2), axis=1)[:, 2]
    np.testing.assert_allclose(found["nearest training image 3, features of length 1"]["noise"], near, rtol=1e-4)
    away = (new[:, None] - known) / known.std(0)
    near = np.sort(np.linalg.norm(away, axis=2), axis=1)[:, 2]
    np.testing.assert_allclose(found["nearest training image 3, standardised features"]["noise"], near, rtol=1e-4)
    moved = new - known.mean(0)
    far = np.einsum("ni,ij,nj->n", moved, np.linalg.inv(np.cov(known.T, bias=True)), moved)
    np.testing.assert_allclose(found["Mahalanobis distance"]["noise"], far, rtol=2e-2)
    means = {label: known[train.labels == label].mean(0) for label in range(10)}
    left = known - np.stack([means[label] for label in train.labels])
    inverse = np.linalg.inv(left.T @ left / len(left))
    far = [np.einsum("ni,ij,nj->n", new - mean, inverse, new - mean) for mean in means.values()]
    np.testing.assert_allclose(found["Mahalanobis distance, nearest class"]["noise"], np.min(far, 0), rtol=2e-2)


def test_outside_images_score_higher(result):
    """Images of noise are far from digits for any network, by all distances."""
    for score, found in result.separations.items():
        if not score.startswith("denoising"):
            assert found["noise"].auroc > 0.9, (score, found["noise"], result.separations)


def test_batches_play_no_part(checkpoints, digits, result):
    other = run(checkpoints, "ddpm", digits, batch_size=100).scores
    assert other.keys() == result.scores.keys()
    for score, sets in other.items():
        for name, values in sets.items():
            np.testing.assert_allclose(values, result.scores[score][name], rtol=2e-3, err_msg=score)


def test_an_interrupted_run_resumes_to_the_bit(checkpoints, digits, result, tmp_path, monkeypatch):
    numbers = []

    def stopping(study, clean, indices):
        numbers.extend(indices)
        if len(numbers) == 6:
            raise KeyboardInterrupt
        return errors_of(study, clean, indices)

    errors_of = Study.errors_of
    monkeypatch.setattr(Study, "errors_of", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoints, "ddpm", digits, output_dir=tmp_path)
    (folder,) = (tmp_path / "errors").iterdir()
    assert rows_done(folder) == {"errors": 3} and not (tmp_path / "eval_results.json").exists()
    found = run(checkpoints, "ddpm", digits, output_dir=tmp_path)
    assert numbers == [*range(6), *range(3, 7), *range(7)]
    for score, sets in found.scores.items():
        for name, values in sets.items():
            np.testing.assert_array_equal(values, result.scores[score][name])
    assert found.separations == result.separations
    run(checkpoints, "ddpm", digits, output_dir=tmp_path)
    assert len(numbers) == 17
    run(checkpoints, "ddpm", digits, output_dir=tmp_path, noise_seed=1)
    assert len(numbers) == 17 + 14 and len(list((tmp_path / "errors").iterdir())) == 4


def test_features_that_a_sweep_has_left_are_used(checkpoints, digits, tmp_path, monkeypatch):
    commands.run(
        "sweep", "--model_name_or_path", checkpoints / "ddpm", "--dataset_name", digits, "--max_train_samples", 90,
        "--max_test_samples", 7, "--layers", "mid_block", "--sigmas", 0.2, "--num_noise_seeds", 1,
        "--features_dir", tmp_path / "features", "--output_dir", tmp_path / "sweep",
    )  # fmt: skip
    read = []
    batch_features = features.batch_features

    def counted(model, images, indices, *args, **given):
        read.append(len(images))
        return batch_features(model, images, indices, *args, **given)

    monkeypatch.setattr(features, "batch_features", counted)
    run(checkpoints, "ddpm", digits, scores=["nearest"], features_dir=tmp_path / "features")
    assert sum(read) == 7  # the other data set's


def test_a_denoiser_of_latents_scores_latents(digits, checkpoints, tmp_path):
    network = make_unet(in_channels=4, out_channels=4)
    vae = make_vae(in_channels=1, out_channels=1)
    DDAEPipeline.for_denoiser(network, DDPMScheduler(), vae=vae).save_pretrained(tmp_path / "latent")
    (tmp_path / "others").symlink_to(checkpoints / "others")
    found = run(tmp_path, "latent", digits, layer="mid_block")
    model = DDAEModel.from_pretrained(tmp_path / "latent").eval()
    with torch.no_grad():
        clean = model.encode(pixels(tmp_path / "latent", drawn(digits, "test", 7)["image"][:]))[5:6].double()
    each = [
        ddpm_error(model.denoiser.double(), DDPMScheduler(), clean, noise_of(draw, (4, 8, 8)), 0.3).square().mean()
        for draw in range(2)
    ]
    assert found.scores["denoising error, sigma 0.3"]["known"][5] == pytest.approx(np.mean(each), rel=2e-4)
    assert len(found.separations) == 7


def test_errors_need_no_training_images_and_classes_no_labels(checkpoints, digits):
    images = drawn(digits, "test", 20)["image"][:]
    colours = [image.convert("RGB").resize((12, 20)) for image in images]  # other sizes and colours are converted
    found = detect_outliers(
        checkpoints / "ddpm", {"test": images}, {"colours": colours}, scores=["error"], num_draws=1, error_sigmas=[0.5]
    )
    assert list(found.separations) == ["denoising error, sigma 0.5"] and found.layer is None
    assert found.outside == {"colours": {"num_images": 20, "split": "train"}} and found.num_images == 20
    assert "Distances" not in found.table() and "training images" not in found.table()
    train = drawn(digits, "train", 90)["image"][:]
    found = detect_outliers(
        checkpoints / "ddpm", {"train": train, "test": images}, {"noise": checkpoints / "others"},
        scores=["mahalanobis"], layer="mid_block",
    )  # fmt: skip
    assert list(found.separations) == ["Mahalanobis distance"] and found.num_features == 64
    assert "denoising error" not in found.table()


REFUSED = {
    "no score": ({"scores": []}, "scores is empty: give at least one"),
    "another score": ({"scores": ["error", "typicality"]}, "scores has 'typicality': allowed are error, nearest, mah"),
    "no level": ({"error_sigmas": []}, "error_sigmas is empty"),
    "a level of 0": ({"error_sigmas": [0]}, "error_sigmas is 0.0: it must be positive"),
    "a level outside the schedule": ({"error_sigmas": [1e6]}, "sigma 1000000.0 is outside the schedule"),
    "features at such a level": ({"sigma": 1e6}, "sigma 1000000.0 is outside the schedule"),
    "no such layer": ({"layer": "nowhere"}, "nowhere"),
    "too far a neighbour": ({"neighbour": 91}, "neighbour is 91: allowed are 1 to the 90 training images"),
    "too few training images": (
        {"max_train_samples": 70},
        "70 training images are too few for the covariance of 64 features and the means of 10 classes: give at least "
        "74, or leave mahalanobis out of scores",
    ),
    "no such split": ({"test_split": "nowhere"}, "no split 'nowhere'"),
    "no such split of the others": ({"outside_split": "nowhere"}, "no split 'nowhere'"),
    "one split twice": ({"test_split": "train"}, "are the same, the training images and the known test images"),
    "no draws": ({"num_draws": 0}, "num_draws is 0: it must be at least 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_before_any_work(checkpoints, digits, case, monkeypatch):
    monkeypatch.setattr(Study, "scores", None)
    options, said = REFUSED[case]
    with pytest.raises(ValueError, match=said):
        run(checkpoints, "ddpm", digits, **options)


def test_sets_that_cannot_be_told_apart_are_refused(checkpoints, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(Study, "scores", None)
    grey = [Image.new("L", (8, 8), number) for number in range(3)]
    for outside, said in (
        ({}, "outside is empty or no mapping"),
        ([checkpoints / "others"], "outside is empty or no mapping"),
        ({"": grey}, "a data set of the name ''"),
        ({"known": grey}, "neither empty nor 'known'"),
        ({3: grey}, "a data set of the name 3"),
        ({"Same": digits}, "are the same, the known test images and the images of 'Same'"),
        ({"a": grey, "b": grey}, "are the same, the images of 'a' and the images of 'b'"),
        ({"split": {"one": grey, "two": grey[:2]}}, "has the splits one, two, and no 'test': say with outside_split"),
        ({"nothing": tmp_path / "nothing"}, "nothing"),
    ):
        with pytest.raises((ValueError, OSError), match=said):
            run(checkpoints, "ddpm", digits, outside)
    with pytest.raises(ValueError, match="outside has x/cifar10 and y/cifar10, which have one name, cifar10"):
        outside_sets(["x/cifar10", "y/cifar10"])


def test_a_network_that_overflows_is_refused(checkpoints, digits):
    model = DDAEModel.from_pretrained(checkpoints / "ddpm", layer="mid_block").eval()
    model.denoiser.conv_in.weight.data.fill_(torch.inf)
    for scores, said in ((["error"], "Some errors are not finite"), (["nearest"], "Some features are not finite")):
        with pytest.raises(ValueError, match=said):
            detect_outliers(model, Images.open(digits), {"noise": checkpoints / "others"}, **SMALL, scores=scores)


def test_options_are_one_of_a_kind():
    options = OutlierOptions(scores=["nearest", "error", "nearest"], error_sigmas=[1, 0.5, 1.0])
    assert options.scores == ["nearest", "error"] and options.error_sigmas == [1.0, 0.5]
    assert not OutlierOptions(scores=["error"]).reads_features and options.reads_features


def test_the_report_is_read_again_and_shown(result, checkpoints, tmp_path):
    report = Report.read(result.folder)
    assert type(report) is OutlierReport and report.separations == result.separations
    assert report.table() == result.table()
    assert len(report.section().rows) == len(report.separations) == 7
    assert isinstance(result.histograms(), Figure) and Image.open(result.folder / "scores.png").size[0] > 400
    checkpoint = shutil.copytree(checkpoints / "ddpm", tmp_path / "checkpoint")
    card = make_card(checkpoint, results=[result.folder]).content
    assert "### Out-of-distribution detection" in card and "Mahalanobis distance, nearest class" in card
    content = json.loads((result.folder / "eval_results.json").read_text())
    assert content["outside"]["noise"]["split"] == "test" and content["num_train_images"] == 90


def test_the_command_prints_the_table(checkpoints, digits, result, tmp_path, capsys):
    words = [f"--{name}={value}" for name, value in SMALL.items() if name != "error_sigmas"]
    commands.run(
        "outliers", "--model_name_or_path", checkpoints / "ddpm", "--dataset_name", digits, *words,
        "--error_sigmas", *SIGMAS, "--layer", "mid_block", "--outside", checkpoints / "others",
        "--output_dir", tmp_path,
    )  # fmt: skip
    shown = capsys.readouterr().out
    rows = [row.replace("noise", "others") for row in map(str, result.table().splitlines()) if row.startswith("| n")]
    assert len(rows) == 7 and all(row in shown for row in rows)
    assert (tmp_path / "scores.png").is_file() and f"{tmp_path}/scores.png" in shown
