"""`transfer`, alone and by its script: latents once, then the denoiser alone."""

import json
import logging
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline

from ddae_hf import DDAEForImageClassification, DDAEImageProcessor, DDAEModel, DDAEPipeline
from ddae_hf.experiments.features import extract_features
from ddae_hf.experiments.images import Images
from ddae_hf.experiments.latent_folder import LatentFolder, LatentInputs
from ddae_hf.experiments.transferring import TransferOptions, transfer

from . import commands
from .conftest import drawn, make_dit, make_vae
from .quiet import quiet

TRAIN, TEST = 120, 40
COUNTS = {"max_train_samples": TRAIN, "max_test_samples": TEST, "max_selection_samples": 80, "num_noise_seeds": 1}
VIEWS = {"num_views": 2, "random_flip": True, "random_crop": 2, "few_labels": [2], "num_draws": 2}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latent_checkpoint")
    dit = make_dit(in_channels=4, num_layers=2, num_embeds_ada_norm=3)
    DDAEPipeline(transformer=dit, scheduler=DDIMScheduler(), vae=make_vae()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(digits):
    return Images.open(digits)


def chosen(output, **changes):
    return TransferOptions(sigmas=[0.2, 0.5], output_dir=str(output), **{**COUNTS, **changes})


@pytest.fixture(scope="module")
def transferred(checkpoint, digits, tmp_path_factory):
    output = tmp_path_factory.mktemp("transferred")
    words = ["--model_name_or_path", checkpoint, "--dataset_name", digits, "--output_dir", output, "--sigmas", 0.2, 0.5]
    for name, value in {**COUNTS, **VIEWS}.items():
        words += [f"--{name}", *(value if isinstance(value, list) else [] if value is True else [value])]
    commands.run("transfer", *words)
    return output


def figures(folder):
    return json.loads((folder / "eval_results.json").read_text())


def pixels_of(checkpoint, digits, split, count):
    images = drawn(digits, split, count)["image"][:]
    return DDAEImageProcessor.from_pretrained(checkpoint)(images, return_tensors="pt")["pixel_values"]


def test_latents_are_encoded_once_and_their_features_are_those_of_the_images(checkpoint, digits, transferred):
    folder = LatentFolder(transferred / "latents")
    pixels = pixels_of(checkpoint, digits, "train", TRAIN)
    model = DDAEModel.from_pretrained(checkpoint)
    latents = torch.from_numpy(folder.latents("train")[:]).float()
    torch.testing.assert_close(latents, model.encode(pixels), rtol=2**-10, atol=1e-4)
    assert folder.views("test") == 2 and not np.array_equal(folder.latents("train", 1), folder.latents("train"))
    best = figures(transferred)["best"]
    wanted = extract_features(model, [pixels], [best["layer"]], best["sigma"])[best["layer"]].numpy()
    kept = [np.load(path) for path in transferred.glob(f"features/*/{best['layer']}.npy")]
    close = [len(array) == TRAIN and np.abs(array - wanted).max() < 1e-2 * np.abs(wanted).max() for array in kept]
    assert sum(close) == 1


def test_the_pair_is_chosen_on_a_part_and_probed_on_all(transferred):
    report = figures(transferred)
    assert report["images"] == {"fitted": 64, "held_out": 16, "train": TRAIN, "test": TEST}
    assert len(report["pairs"]) == 4 and len(report["few_label_test_accuracies"]["2"]) == 2
    best = max(report["pairs"], key=lambda pair: pair["validation_accuracy"])
    assert report["best"] == best
    # Only the images as they are are chosen on.
    kept = [json.loads(path.read_text()) for path in transferred.glob("features/*/identity.json")]
    assert {(k["count"], k["view"]) for k in kept if "rows" in k["data"]} == {(80, 0)}
    assert {k["view"] for k in kept if k["count"] == TRAIN} == {0, 2}


@torch.no_grad()
def test_the_classifier_takes_images_and_still_generates(checkpoint, digits, transferred):
    classifier = transferred / "classifier"
    model = DDAEForImageClassification.from_pretrained(classifier)
    labels = model(pixels_of(checkpoint, digits, "test", TEST)).logits.argmax(-1).numpy()
    right = (labels == drawn(digits, "test", TEST)["label"][:]).mean()
    assert right == figures(transferred)["saved_classifier_test_accuracy"]
    assert isinstance(DiTPipeline.from_pretrained(classifier).vae, AutoencoderKL)
    assert "latents" in (classifier / "README.md").read_text()


def test_a_second_run_encodes_nothing_and_finds_the_same(
    checkpoint, images, transferred, tmp_path, monkeypatch, caplog, capsys
):
    for part in ("latents", "features"):
        shutil.copytree(transferred / part, tmp_path / part)

    def refuse(*args):
        raise AssertionError("images are encoded again")

    monkeypatch.setattr(LatentFolder, "encode", refuse)
    caplog.set_level(logging.INFO)
    with quiet(capsys):
        result = transfer(checkpoint, images, chosen(tmp_path, **VIEWS))
    assert "320 of 4x8x8" in caplog.text and "0.0 MiB of them still to be computed" in caplog.text
    assert "2 noise levels" in caplog.text
    again, before = figures(tmp_path), figures(transferred)
    assert again["pairs"] == before["pairs"] and again["test_accuracies"] == before["test_accuracies"]
    assert result.best.layer == before["best"]["layer"]


@torch.no_grad()
def test_a_notebook_transfers_its_own_model_and_images(checkpoint, digits, transferred, capsys):
    """The model keeps its VAE; nothing stays on disk where no folder is given."""
    parts = {split: drawn(digits, split, count) for split, count in (("train", TRAIN), ("test", TEST))}
    model = DDAEModel.from_pretrained(checkpoint)
    with quiet(capsys):
        images = Images.open({split: (part["image"][:], part["label"][:]) for split, part in parts.items()})
        result = transfer(model, images, sigmas=[0.2, 0.5], max_selection_samples=80, num_noise_seeds=1)
    by_path = transfer(checkpoint, images, sigmas=[0.2, 0.5], max_selection_samples=80, num_noise_seeds=1)
    assert result.best == by_path.best and result.test_accuracies == by_path.test_accuracies
    pixels = pixels_of(checkpoint, digits, "test", TEST)
    assert model.vae is not None and model(pixels[:2]).pooler_output.isfinite().all()
    right = result.classifier(pixels).logits.argmax(-1).numpy() == parts["test"]["label"][:]
    assert right.mean() == result.saved_classifier_test_accuracy


def test_online_probes_go_through_the_views(checkpoint, images, tmp_path, monkeypatch):
    seen = []
    fetch = LatentInputs.fetch

    def spy(self, rows, view=0, device="cpu"):
        seen.append((self.split, view % self.folder.views(self.split)))
        return fetch(self, rows, view, device)

    monkeypatch.setattr(LatentInputs, "fetch", spy)
    protocol = {"protocol": "paper", "num_train_epochs": 3, "num_views": 2, "layers": ["transformer_blocks.1"]}
    transfer(checkpoint, images, chosen(tmp_path, **protocol))
    assert {view for split, view in seen if split == "train"} == {0, 1}
    assert {view for split, view in seen if split == "test"} == {0}


def test_another_scale_of_latents_is_not_taken_for_the_same(checkpoint, images, transferred, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "scaled")
    config = json.loads((tmp_path / "scaled" / "vae" / "config.json").read_text())
    (tmp_path / "scaled" / "vae" / "config.json").write_text(json.dumps(config | {"scaling_factor": 1.0}))
    shutil.copytree(transferred / "features", tmp_path / "features")
    before = {path.name for path in (tmp_path / "features").iterdir()}
    transfer(tmp_path / "scaled", images, chosen(tmp_path, layers=["transformer_blocks.1"]))
    new = {path.name for path in (tmp_path / "features").iterdir()} - before
    assert len(new) == 4  # two levels to choose on, and the best pair's training and test images
    with pytest.raises(ValueError, match="vae.scaling_factor is 1.0 there, 0.18215 here"):
        transfer(checkpoint, images, chosen(tmp_path))


def test_a_processor_of_another_size_stops_before_anything_is_encoded(checkpoint, images, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "small")
    DDAEImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match=r"make latents \(4, 4, 4\), but its denoiser takes \(4, 8, 8\)"):
        transfer(tmp_path / "small", images, chosen(tmp_path / "out"))
    assert not list((tmp_path / "out").glob("latents/*.npy"))


def test_fine_tuning_goes_on_from_the_best_pair_and_where_it_stopped(checkpoint, images, transferred, capsys):
    options = chosen(transferred, **VIEWS)
    with quiet(capsys):
        for _ in range(2):  # the second run finds it done
            transfer(checkpoint, images, options, finetune={"max_train_steps": 2, "train_batch_size": 16})
    report, best = figures(transferred / "finetuned"), figures(transferred)["best"]
    assert (report["layer"], report["sigma"]) == (best["layer"], best["sigma"])
    assert report["steps"] == 2 and report["saved_classifier_test_accuracy"] >= 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoints": "runs"}, "there is no option 'checkpoints'"),
        ({"encode_batch_size": 0}, "must be at least 1"),
        ({"finetune": "5"}, "is not a mapping: give options"),
        ({"finetune": {"max_train_step": 5}}, "finetune: there is no option 'max_train_step': the nearest are max_t"),
        ({"finetune": {"learning_rate": -1}}, "finetune: learning_rate is -1.0: it must be positive"),
        ({"finetune": {}, "output_dir": None}, "finetune needs an output_dir"),
        *(
            ({"finetune": {name: value}}, f"finetune has {name}: leave it out; it follows from the transfer")
            for name, value in {
                "layer": "nope",
                "sigma": -1,
                "resume_from_checkpoint": "x",
                "output_dir": "x",
                "latents_dir": "x",
                "train_split": "test",
                "max_train_samples": 3,
                "null_class": 1,
            }.items()
        ),
        ({"finetune": {"report_to": "nothing"}}, "finetune: report_to is nothing, which cannot be used"),
        ({"latents_dir": f"{__file__}/x"}, "latents_dir is .* is a file: give a folder"),
        ({"num_views": 2, "random_crop": 16}, "must be below the sides of the images"),
        ({"layers": ["transformer_blocks.9"]}, "There is no layer 'transformer_blocks.9'"),
        ({"sigmas": [1000]}, "sigma"),
        ({"few_labels": [1000]}, "1000 labels a class"),
    ],
)
def test_what_cannot_work_stops_before_anything_is_encoded(checkpoint, images, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        transfer(checkpoint, images, chosen(tmp_path), **changes)
    assert not list(tmp_path.glob("latents/*.npy"))


def test_a_network_that_cannot_be_trained_so_is_refused_before_anything_is_encoded(checkpoint, images, tmp_path):
    model = DDAEModel.from_pretrained(checkpoint, feature_norm="batch_norm")
    for options, message in (({"ema_decay": 0.9}, "leave out ema_decay"), ({"train_batch_size": 17}, "batch of one")):
        with pytest.raises(ValueError, match=message):
            transfer(model, images, chosen(tmp_path), finetune=options)
    assert not list(tmp_path.glob("latents/*.npy"))


def test_the_script_refuses_options_of_fine_tuning_before_it_opens_anything(capsys):
    for given in ("5", "{nothing: 5}"):
        with pytest.raises(SystemExit):
            commands.run("transfer", "--model_name_or_path", "nowhere", "--finetune", given)
        assert "finetune: " in capsys.readouterr().err


def test_a_network_of_pixels_is_refused(layouts, images, tmp_path):
    with pytest.raises(ValueError, match="has no vae. If its denoiser works on latents, save it with the VAE"):
        transfer(layouts / "pipeline", images, chosen(tmp_path))
    with pytest.raises(ValueError, match="The model has no vae"):
        transfer(DDAEModel.from_pretrained(layouts / "pipeline"), images, chosen(tmp_path))
