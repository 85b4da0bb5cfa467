"""The script that measures generated images, as a user runs it: tiny networks, real digits."""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from diffusers import DDIMScheduler
from PIL import ExifTags, Image
from safetensors.torch import load_file, save_file
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

# By its module: some versions hide the name in the package where torchvision is missing.
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import evaluate_generation
from ddae_hf import DDAEImageProcessor, DDAEModel, DDAEPipeline
from ddae_hf.experiments.features import extract_features
from ddae_hf.experiments.generation_metrics import frechet_distance, precision_recall
from ddae_hf.experiments.plots import image_grid

from . import scripts
from .conftest import drawn, make_unet

SCRIPT = Path(evaluate_generation.__file__)
GREY = {"in_channels": 1, "out_channels": 1, "block_out_channels": (32, 32)}
pytestmark = pytest.mark.filterwarnings("ignore:.*their covariance is singular")


def save_pipeline(folder, **options):
    DDAEPipeline(make_unet(**GREY | options), DDIMScheduler()).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("generator"))


@pytest.fixture(scope="module")
def extractor(tmp_path_factory):
    return "ddae:" + save_pipeline(tmp_path_factory.mktemp("extractor"), seed=1)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    ViTModel(ViTConfig(**shape, image_size=16, patch_size=4)).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def measure(digits, tmp_path):
    """Run the script on few digits, and return its report."""

    def run(*options, output="out", data=digits):
        arguments = ["--dataset_name", str(data), "--max_reference_samples", "60", "--num_inference_steps", "2"]
        arguments += ["--features_dir", str(tmp_path / "features"), "--output_dir", str(tmp_path / output)]
        scripts.run("evaluate_generation", *arguments, *options)
        return json.loads((tmp_path / output / "generation_results.json").read_text())

    return run


def write_digits(digits, folder, count, start=0, split="train"):
    folder.mkdir(parents=True, exist_ok=True)
    images = drawn(digits, split, start + count).select(range(start, start + count))["image"][:]
    for i, image in enumerate(images):
        image.save(folder / f"{i:04d}.png")
    return images


def test_a_run_leaves_every_figure_and_its_origin(measure, checkpoint, extractor, tmp_path, capsys):
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
    assert report["versions"].keys() == {"ddae_hf", "torch", "diffusers", "transformers", "torchmetrics", "pillow"}
    assert Image.open(tmp_path / "out" / "grid.png").size[0] > 800
    text = capsys.readouterr().out
    assert "| sampling | DDIMScheduler, 2 steps, seeds from 3 |" in text and "reused" not in text
    assert f"| generated | 40 | {generated['frechet_distance']:.4g} |" in text
    assert measure(*options, "--baseline_split", "test")["results"] == report["results"]
    assert capsys.readouterr().out.count("reused from") == 3


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
    with pytest.raises(SystemExit, match="holds images made with other options or weights"):
        measure(*options, "--seed", "5")


def read_images(folder, count):
    return np.stack([np.asarray(Image.open(folder / f"{i:05d}.png"), dtype=int) for i in range(count)])


def test_images_do_not_depend_on_the_batch_size(checkpoint, tmp_path):
    options = ["--model_name_or_path", checkpoint, "--num_images", "9", "--num_inference_steps", "2"]
    for size in ("4", "9"):
        scripts.run("generate", *options, "--batch_size", size, "--output_dir", str(tmp_path / size))
    first, other = (read_images(tmp_path / size, 9) for size in ("4", "9"))
    assert np.abs(other - first).max() <= 1
    assert len({image.tobytes() for image in first}) == 9


@pytest.mark.slow  # three processes import everything
def test_two_processes_share_the_images(checkpoint, extractor, digits, tmp_path):
    options = ["--model_name_or_path", checkpoint, "--num_images", "10", "--batch_size", "3", "--extractor", extractor]
    options += ["--dataset_name", str(digits), "--max_reference_samples", "40", "--num_inference_steps", "2"]
    options += ["--features_dir", str(tmp_path / "features"), "--output_dir"]
    scripts.run("evaluate_generation", *options, str(tmp_path / "one"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(SCRIPT)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *options, str(tmp_path / "two")], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| generated | 10 |") == 1
    np.testing.assert_allclose(
        read_images(tmp_path / "two" / "images", 10), read_images(tmp_path / "one" / "images", 10), atol=1
    )


def test_features_are_kept_for_the_same_images_and_network_only(vit, extractor, digits, tmp_path, capsys):
    data, features = tmp_path / "data", tmp_path / "features"
    shutil.copytree(digits, data)
    kept: dict[str, torch.Tensor] = {}

    def reused(extractor, *options):
        arguments = ["--images_dir", "unused", "--dataset_name", str(data), "--max_reference_samples", "20"]
        arguments += ["--features_dir", str(features), "--extractor", extractor, *options]
        args = evaluate_generation.parse_arguments(arguments)
        images = evaluate_generation.real_images(args, 20)["reference"]
        found = evaluate_generation.kept_features(evaluate_generation.open_extractor(args, images), images, args)
        again = "reused from" in capsys.readouterr().out
        assert again == any(torch.equal(found, other) for other in kept.values())
        kept[str(len(kept))] = found
        assert len(list(features.glob("*/features.npy"))) == len({f.numpy().tobytes() for f in kept.values()})
        return again

    assert not reused(extractor)
    assert reused(extractor)
    assert not reused(extractor, "--max_reference_samples", "19")
    assert not reused(extractor, "--extractor_sigma", "0.1")
    assert not reused(extractor, "--extractor_layer", "mid_block")
    assert not reused(extractor, "--reference_split", "test")
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


def test_vision_models_without_a_pooled_output_are_averaged(measure, vit, digits, tmp_path):
    images = write_digits(digits, tmp_path / "given", 8)
    model = ViTModel.from_pretrained(vit, add_pooling_layer=False)
    model.save_pretrained(tmp_path / "bare")
    shutil.copy(Path(vit) / "preprocessor_config.json", tmp_path / "bare")
    report = measure("--images_dir", str(tmp_path / "given"), "--extractor", f"transformers:{tmp_path / 'bare'}")
    assert report["extractor"]["features"] == "mean of last_hidden_state"
    pixels = ViTImageProcessorPil.from_pretrained(vit)([i.convert("RGB") for i in images], return_tensors="pt")
    with torch.no_grad():
        expected = model(**pixels).last_hidden_state.mean(1)
    kept = [np.load(path) for path in (tmp_path / "features").glob("*/features.npy")]
    (found,) = [features for features in kept if len(features) == 8]
    torch.testing.assert_close(torch.from_numpy(found), expected)


def test_deep_and_turned_images_are_the_same_to_every_extractor(vit, tmp_path):
    """An image of 16 bits, or with an EXIF orientation, has the features of the 8-bit image that it shows."""
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = 6
    grey = np.random.default_rng(0).integers(0, 256, (20, 12), dtype=np.uint8)
    Image.fromarray(grey).save(tmp_path / "plain.png")
    Image.fromarray(np.rot90(grey)).save(tmp_path / "turned.png", exif=tags)
    for suffix in ("png", "tif", "pgm"):
        Image.fromarray(grey * np.uint16(257)).save(tmp_path / f"deep.{suffix}")
    files = ["plain.png", "turned.png", "deep.png", "deep.tif", "deep.pgm"]
    args = argparse.Namespace(cache_dir=None, extractor_layer=None, extractor_sigma=None)
    # The denoiser's processor resizes images of 16 bits without rounding.
    for name, path, close in (("transformers", vit, 0.0), ("ddae", save_pipeline(tmp_path / "grey"), 0.02)):
        extractor = evaluate_generation.EXTRACTORS[name](path, args)
        plain, *others = (extractor.compute([[Image.open(tmp_path / file)]], 0) for file in files)
        white = extractor.compute([[Image.new("RGB", (12, 20), "white")]], 0)
        scale = (plain - white).abs().max()
        assert scale > 0.05
        for features in others:
            assert (features - plain).abs().max() <= close * scale


def test_pictures_of_deep_images_are_not_white():
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    deep = image_grid([Image.fromarray(grey * np.uint16(257))])
    assert np.array_equal(np.asarray(deep), np.asarray(image_grid([Image.fromarray(grey)])))


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


def test_every_class_takes_its_turn(tmp_path, checkpoint):
    # Norms of several channels each: a norm of one channel would take away what a class adds to it.
    network = make_unet(**GREY, num_class_embeds=4, norm_num_groups=4)
    folder = str(tmp_path / "conditional")
    DDAEPipeline(network, DDIMScheduler(), null_class=1).save_pretrained(folder)
    options = [
        "--model_name_or_path",
        folder,
        "--num_inference_steps",
        "2",
        "--guidance_scale",
        "3",
        "--num_images",
        "4",
    ]
    for label in ("all", "0", "2", "3"):
        scripts.run("generate", *options, "--class_label", label, "--output_dir", str(tmp_path / label))
    images = {label: read_images(tmp_path / label, 4) for label in ("all", "0", "2", "3")}
    for i, label in enumerate(["0", "2", "3", "0"]):
        assert np.abs(images["all"][i] - images[label][i]).max() <= 1
    assert (images["0"] != images["2"]).any()
    with pytest.raises(SystemExit, match="--class_label all: .* is unconditional"):
        scripts.run(
            "generate", "--model_name_or_path", checkpoint, "--class_label", "all", "--output_dir", tmp_path / "no"
        )
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--extractor", "vgg"], "--extractor vgg: allowed are ddae:PATH"),
        (["--extractor", "ddae:"], "--extractor ddae:: allowed are ddae:PATH"),
        (["--extractor", "inception", "--extractor_sigma", "0.1"], "are for a DDAE extractor, not for inception"),
        (["--images_dir", "somewhere"], "Give one of --model_name_or_path and --images_dir"),
        (["--num_images", "3"], "--num_images must be at least 4"),
        (["--extractor_batch_size", "0"], "--extractor_batch_size at least 1"),
        (["--scheduler", "Adam"], "diffusers has no such scheduler"),
        (["--baseline_split", "holdout"], "has no split 'holdout'"),
        (["--max_reference_samples", "3"], r"The images 'real \(train\)' are 3: at least 4 are needed"),
        (["--extractor_layer", "up_blocks.7"], "cannot be used: There is no layer"),
        (["--extractor_sigma", "-1"], "cannot be used: .*outside the schedule"),
        (["--extractor", "ddae:nowhere/at/all"], "--extractor ddae:nowhere/at/all cannot be used"),
        (["--extractor", "transformers:nowhere/at/all"], "--extractor transformers:nowhere/at/all cannot be used"),
        (["--sampler", "heun"], "needs an EDMEulerScheduler"),
    ],
)
def test_what_cannot_work_ends_the_run_before_it_samples(
    measure, checkpoint, extractor, tmp_path, capsys, options, message
):
    with pytest.raises(SystemExit) as refusal:
        measure("--model_name_or_path", checkpoint, "--num_images", "5", "--extractor", extractor, *options)
    assert re.search(message, str(refusal.value) + capsys.readouterr().err)
    assert not (tmp_path / "out").exists() and not (tmp_path / "features").exists()


def test_folders_and_vision_models_that_cannot_be_measured_are_refused(measure, vit, digits, tmp_path):
    with pytest.raises(SystemExit, match="there is no such folder"):
        measure("--images_dir", str(tmp_path / "none"), "--extractor", f"transformers:{vit}")
    write_digits(digits, tmp_path / "few", 3)
    with pytest.raises(SystemExit, match="The images 'generated' are 3"):
        measure("--images_dir", str(tmp_path / "few"), "--extractor", f"transformers:{vit}")
    torch.manual_seed(0)
    whole = Dinov2Model(Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28))
    state = {name: value for name, value in whole.state_dict().items() if not name.startswith("layernorm.")}
    whole.save_pretrained(tmp_path / "damaged", state_dict=state)
    shutil.copy(Path(vit) / "preprocessor_config.json", tmp_path / "damaged")
    with pytest.raises(SystemExit, match=r"its weights \['layernorm.bias', 'layernorm.weight'\] are missing"):
        measure("--images_dir", str(tmp_path / "few"), "--extractor", f"transformers:{tmp_path / 'damaged'}")


def test_inception_says_what_it_needs(measure, digits, tmp_path):
    if _has_fidelity():
        pytest.skip("torch-fidelity is installed")
    write_digits(digits, tmp_path / "given", 5)
    with pytest.raises(SystemExit, match="pip install torchvision torch-fidelity"):
        measure("--images_dir", str(tmp_path / "given"), "--extractor", "inception")


def _has_fidelity():
    try:
        import torch_fidelity  # noqa: F401
    except ImportError:
        return False
    return True


@pytest.mark.slow  # the whole Inception network
def test_inception_reads_weights_without_unpickling(measure, digits, tmp_path, monkeypatch):
    if not _has_fidelity():
        pytest.skip("torch-fidelity is not installed")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Inception

    torch.save({}, tmp_path / "empty.pth")
    with monkeypatch.context() as untrained:
        untrained.setattr(Inception, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        network = Inception("inception-v3-compat", ["2048"], str(tmp_path / "empty.pth"))
    images = write_digits(digits, tmp_path / "given", 5)
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    torch.save(network, tmp_path / "object.pth")
    given = ["--images_dir", str(tmp_path / "given"), "--max_reference_samples", "4", "--extractor"]
    reports = [measure(*given, f"inception:{tmp_path / name}") for name in ("weights.safetensors", "weights.pth")]
    assert reports[0]["results"] == reports[1]["results"] and reports[0]["extractor"]["width"] == 2048
    pixels = torch.stack([torch.from_numpy(np.array(i.convert("RGB"))).permute(2, 0, 1) for i in images])
    kept = [np.load(path) for path in (tmp_path / "features").glob("*/features.npy")]
    (found,) = [features for features in kept if len(features) == 5]
    torch.testing.assert_close(torch.from_numpy(found), network(pixels)[0])
    with pytest.raises(SystemExit, match="cannot be used: Weights only load failed"):
        measure(*given, f"inception:{tmp_path / 'object.pth'}")
