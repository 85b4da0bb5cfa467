"""`examples/latent_transfer.py`: latents once, then the denoiser alone."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline

import latent_transfer
from ddae_hf import DDAEForImageClassification, DDAEImageProcessor, DDAEModel, DDAEPipeline
from ddae_hf.experiments.features import extract_features
from ddae_hf.experiments.latent_folder import LatentFolder

from . import scripts
from .conftest import drawn, make_dit, make_vae


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latent_checkpoint")
    dit = make_dit(in_channels=4, num_layers=2, num_embeds_ada_norm=3)
    DDAEPipeline(transformer=dit, scheduler=DDIMScheduler(), vae=make_vae()).save_pretrained(folder)
    return folder


def options(checkpoint, digits, output, *more):
    words = ["--model_name_or_path", checkpoint, "--dataset_name", digits, "--output_dir", output, "--sigmas", 0.2, 0.5]
    words += ["--max_train_samples", 120, "--max_test_samples", 40, "--max_selection_samples", 80]
    return [str(word) for word in (*words, "--num_noise_seeds", 1, *more)]


@pytest.fixture(scope="module")
def transferred(checkpoint, digits, tmp_path_factory):
    output = tmp_path_factory.mktemp("transferred")
    views = ("--num_views", 2, "--random_flip", "--random_crop", 2, "--few_labels", 2, "--num_draws", 2)
    scripts.run("latent_transfer", *options(checkpoint, digits, output, *views))
    return output


def pixels_of(checkpoint, digits, split, count):
    images = drawn(digits, split, count)["image"][:]
    return DDAEImageProcessor.from_pretrained(checkpoint)(images, return_tensors="pt")["pixel_values"]


def test_latents_are_encoded_once_and_their_features_are_those_of_the_images(checkpoint, digits, transferred):
    folder = LatentFolder(transferred / "latents")
    pixels = pixels_of(checkpoint, digits, "train", 120)
    model = DDAEModel.from_pretrained(checkpoint)
    latents = torch.from_numpy(folder.latents("train")[:]).float()
    torch.testing.assert_close(latents, model.encode(pixels), rtol=2**-10, atol=1e-4)
    assert folder.views("test") == 2 and not np.array_equal(folder.latents("train", 1), folder.latents("train"))
    report = json.loads((transferred / "eval_results.json").read_text())
    layer, sigma = report["best"]["layer"], report["best"]["sigma"]
    wanted = extract_features(model, [pixels], [layer], sigma)[layer].numpy()
    kept = [np.load(path) for path in transferred.glob(f"features/*/{layer}.npy")]
    close = [len(array) == 120 and np.abs(array - wanted).max() < 1e-2 * np.abs(wanted).max() for array in kept]
    assert sum(close) == 1


def test_the_pair_is_chosen_on_a_part_and_probed_on_all(transferred):
    report = json.loads((transferred / "eval_results.json").read_text())
    assert report["images"] == {"fitted": 64, "held_out": 16, "train": 120, "test": 40}
    assert len(report["pairs"]) == 4 and len(report["few_label_test_accuracies"]["2"]) == 2
    best = max(report["pairs"], key=lambda pair: pair["validation_accuracy"])
    assert report["best"] == best
    # Only the images as they are are chosen on.
    kept = [json.loads(path.read_text()) for path in transferred.glob("features/*/identity.json")]
    assert {(k["count"], k["view"]) for k in kept if "rows" in k["data"]} == {(80, 0)}
    assert {k["view"] for k in kept if k["count"] == 120} == {0, 2}


@torch.no_grad()
def test_the_classifier_takes_images_and_still_generates(checkpoint, digits, transferred):
    classifier = transferred / "classifier"
    model = DDAEForImageClassification.from_pretrained(classifier)
    labels = model(pixels_of(checkpoint, digits, "test", 40)).logits.argmax(-1).numpy()
    report = json.loads((transferred / "eval_results.json").read_text())
    assert (labels == np.load(transferred / "test_labels.npy")).mean() == report["saved_classifier_test_accuracy"]
    assert isinstance(DiTPipeline.from_pretrained(classifier).vae, AutoencoderKL)
    assert "latents" in (classifier / "README.md").read_text()


def test_a_second_run_encodes_nothing_and_finds_the_same(
    checkpoint, digits, transferred, tmp_path, monkeypatch, capsys
):
    for part in ("latents", "features"):
        shutil.copytree(transferred / part, tmp_path / part)

    def refuse(*args):
        raise AssertionError("images are encoded again")

    monkeypatch.setattr(latent_transfer.LatentFolder, "encode", refuse)
    views = ("--num_views", 2, "--random_flip", "--random_crop", 2, "--few_labels", 2, "--num_draws", 2)
    scripts.run("latent_transfer", *options(checkpoint, digits, tmp_path, *views))
    said = capsys.readouterr().out
    assert "320 of 4x8x8" in said and "0.0 MiB of them still to be computed" in said and "2 noise levels" in said
    again, before = (json.loads((folder / "eval_results.json").read_text()) for folder in (tmp_path, transferred))
    assert again["pairs"] == before["pairs"] and again["test_accuracies"] == before["test_accuracies"]


def test_online_probes_go_through_the_views(checkpoint, digits, tmp_path, monkeypatch):
    seen = []
    read = latent_transfer.EncodedImages.pixel_values

    def spy(self, split, indices, view=0):
        seen.append((split, view))
        return read(self, split, indices, view)

    monkeypatch.setattr(latent_transfer.EncodedImages, "pixel_values", spy)
    protocol = ("--protocol", "paper", "--num_epochs", 3, "--num_views", 2, "--layers", "transformer_blocks.1")
    scripts.run("latent_transfer", *options(checkpoint, digits, tmp_path, *protocol))
    assert {view for split, view in seen if split == "train"} == {0, 1}
    assert {view for split, view in seen if split == "test"} == {0}


def test_another_scale_of_latents_is_not_taken_for_the_same(checkpoint, digits, transferred, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "scaled")
    config = json.loads((tmp_path / "scaled" / "vae" / "config.json").read_text())
    (tmp_path / "scaled" / "vae" / "config.json").write_text(json.dumps(config | {"scaling_factor": 1.0}))
    shutil.copytree(transferred / "features", tmp_path / "features")
    before = {path.name for path in (tmp_path / "features").iterdir()}
    scripts.run("latent_transfer", *options(tmp_path / "scaled", digits, tmp_path, "--layers", "transformer_blocks.1"))
    new = {path.name for path in (tmp_path / "features").iterdir()} - before
    assert len(new) == 4  # two levels to choose on, and the best pair's training and test images
    with pytest.raises(SystemExit, match="vae.scaling_factor is 1.0 there, 0.18215 here"):
        scripts.run("latent_transfer", *options(checkpoint, digits, tmp_path))


def test_a_processor_of_another_size_stops_before_anything_is_encoded(checkpoint, digits, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "small")
    DDAEImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "small")
    with pytest.raises(SystemExit, match=r"make latents \(4, 4, 4\), but its denoiser takes \(4, 8, 8\)"):
        scripts.run("latent_transfer", *options(tmp_path / "small", digits, tmp_path / "out"))
    assert not list((tmp_path / "out").glob("latents/*.npy"))


def test_fine_tuning_goes_on_from_the_best_pair_and_where_it_stopped(checkpoint, digits, transferred, capsys):
    views = ("--num_views", 2, "--random_flip", "--random_crop", 2, "--few_labels", 2, "--num_draws", 2)
    for steps in (2, 2):  # the second run finds it done
        tune = json.dumps({"max_train_steps": steps, "batch_size": 16})
        scripts.run("latent_transfer", *options(checkpoint, digits, transferred, *views, "--finetune", tune))
    report, best = (
        json.loads((transferred / name / "eval_results.json").read_text()) for name in ("finetuned", "classifier")
    )
    assert (report["layer"], report["sigma"]) == (best["best"]["layer"], best["best"]["sigma"])
    assert report["steps"] == 2 and report["saved_classifier_test_accuracy"] >= 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--checkpoints", "runs"], "Give one of"),
        (["--encode_batch_size", "0"], "must be at least 1"),
        (["--finetune", "5"], "it takes options"),
        (["--finetune", "{nothing: 5}"], "finetune.py does not take this"),
        (["--num_views", "2", "--random_crop", "16"], "must be below the sides of the images"),
        (["--layers", "transformer_blocks.9"], "There is no layer 'transformer_blocks.9'"),
        (["--sigmas", "1000"], "sigma"),
    ],
)
def test_what_cannot_work_stops_before_anything_is_encoded(checkpoint, digits, tmp_path, capsys, more, message):
    with pytest.raises(SystemExit) as stopped:
        scripts.run("latent_transfer", *options(checkpoint, digits, tmp_path, *more))
    assert message in str(stopped.value) + capsys.readouterr().err
    assert not list(tmp_path.glob("latents/*.npy"))


def test_a_network_of_pixels_is_refused(layouts, digits, tmp_path):
    with pytest.raises(SystemExit, match="has no vae. If its denoiser works on latents, save it with the VAE"):
        scripts.run("latent_transfer", *options(layouts / "pipeline", digits, tmp_path))
