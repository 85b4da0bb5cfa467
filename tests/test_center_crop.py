"""`--center_crop` of the scripts: what networks are trained on, and that checkpoints say it to whoever opens them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from diffusers import AutoencoderKL, DDPMPipeline
from PIL import Image
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from ddae_hf import DDAEImageProcessor
from ddae_hf.experiments import pretraining, vae_training
from ddae_hf.experiments.images import Images
from ddae_hf.experiments.latent_folder import LatentFolder

from . import commands
from .conftest import make_vae

TINY = {"in_channels": 1, "out_channels": 1, "block_out_channels": [32, 32], "layers_per_block": 1}
TINY |= {"down_block_types": ["DownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "UpBlock2D"]}
TINY_DIT = {"_class_name": "DiTTransformer2DModel", "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
COUNT, SIDE = 12, 16


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Images twice as wide as high, in a folder that `--dataset_name` takes."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("photographs")
    images = [Image.fromarray(rng.integers(0, 256, (SIDE, 2 * SIDE), dtype=np.uint8)) for _ in range(COUNT)]
    Dataset.from_dict({"image": images}, Features({"image": ImageFeature()})).to_parquet(folder / "train.parquet")
    return folder, [np.asarray(image) for image in images]


def shown(images, center_crop):
    """The images in [-1, 1] as a network of their height gets them, by NumPy and Pillow alone."""
    if center_crop:
        prepared = [image[:, SIDE // 2 : 3 * SIDE // 2] for image in images]
    else:
        prepared = [Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BILINEAR) for image in images]
    return torch.from_numpy(np.stack(prepared).astype(np.float32) / 127.5 - 1)[:, None]


def train(folder, *options, steps=1):
    arguments = ["--output_dir", folder, "--train_batch_size", COUNT, "--sample_steps", 0, "--mixed_precision", "no"]
    arguments += ["--num_inference_steps", 2, "--max_train_steps", steps, "--checkpointing_steps", 1]
    commands.run("pretrain", *arguments, *options)


@pytest.mark.parametrize("option", [None, "--center_crop", "--no-center_crop"])
def test_a_network_is_trained_on_what_its_checkpoint_says(photographs, tmp_path, monkeypatch, option):
    seen, inputs = [], pretraining.training_inputs

    def training_inputs(*given):
        seen.append(inputs(*given)[0])
        return seen[-1], None

    monkeypatch.setattr(pretraining, "training_inputs", training_inputs)
    data, denoiser = ["--dataset_name", photographs[0]], ["--denoiser", json.dumps(TINY), "--resolution", SIDE]
    train(tmp_path, *data, *denoiser, *([option] if option else []))
    center_crop = option != "--no-center_crop"
    wanted = shown(photographs[1], center_crop)
    found = seen[0][[int((seen[0] - image).abs().sum((1, 2, 3)).argmin()) for image in wanted]]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    checkpoint = tmp_path / "checkpoint-1"
    for place in (tmp_path, tmp_path / "raw", checkpoint, checkpoint / "raw"):
        for opened in (DDAEImageProcessor.from_pretrained(place), AutoImageProcessor.from_pretrained(place)):
            assert opened.do_center_crop is center_crop
            pixels = opened([Image.fromarray(image) for image in photographs[1]], return_tensors="pt")["pixel_values"]
            torch.testing.assert_close(pixels, wanted, rtol=0, atol=1e-5)
        assert type(DDPMPipeline.from_pretrained(place)) is DDPMPipeline


def test_resuming_with_images_prepared_otherwise_is_refused(photographs, tmp_path):
    options = ["--dataset_name", photographs[0], "--denoiser", json.dumps(TINY), "--resolution", SIDE]
    train(tmp_path / "new", *options)
    resume = [*options, "--resume_from_checkpoint", "latest"]
    with pytest.raises(SystemExit, match="trained with other options: center_crop was"):
        train(tmp_path / "new", *resume, "--no-center_crop", steps=2)
    # A checkpoint of version 0.1.0, which had no such option, and squashed.
    shutil.copytree(tmp_path / "new" / "checkpoint-1", tmp_path / "old" / "checkpoint-1")
    saved = tmp_path / "old" / "checkpoint-1" / "training_options.yaml"
    trained = yaml.safe_load(saved.read_text())
    assert trained.pop("center_crop") is True
    saved.write_text(yaml.safe_dump(trained))
    (tmp_path / "old" / "checkpoint-1" / "files.json").unlink()  # nor did it note its files
    with pytest.raises(SystemExit, match="trained with other options: center_crop was"):
        train(tmp_path / "old", *resume, steps=2)
    train(tmp_path / "old", *resume, "--no-center_crop", steps=2)
    assert DDAEImageProcessor.from_pretrained(tmp_path / "old").do_center_crop is False


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    make_vae(in_channels=1, out_channels=1, sample_size=SIDE).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("center_crop", [True, False])
def test_a_denoiser_of_latents_says_how_those_were_made(photographs, vae, tmp_path, center_crop):
    option = [] if center_crop else ["--no-center_crop"]
    where = ["--vae", vae, "--dataset_name", photographs[0], "--output_dir", tmp_path / "latents"]
    commands.run("encode", *where, *option)
    latents = LatentFolder(tmp_path / "latents").latents("train")
    network = AutoencoderKL.from_pretrained(vae)
    with torch.no_grad():
        wanted = network.encode(shown(photographs[1], center_crop)).latent_dist.mode() * network.config.scaling_factor
    np.testing.assert_allclose(latents, wanted.numpy(), rtol=0, atol=5e-3)
    options = ["--latents_dir", tmp_path / "latents", "--denoiser", json.dumps(TINY_DIT)]
    train(tmp_path / "run", *options)
    for place in (tmp_path / "run", tmp_path / "run" / "checkpoint-1" / "raw"):
        opened = DDAEImageProcessor.from_pretrained(place)
        assert (opened.do_center_crop, opened.num_channels) == (center_crop, 1)
        assert dict(opened.size) == {"height": SIDE, "width": SIDE}
    train(tmp_path / "run", *options, "--resume_from_checkpoint", "latest", steps=2)
    for given in ("--center_crop", "--no-center_crop"):
        with pytest.raises(SystemExit, match="center_crop does not go with latents, so leave it out"):
            train(tmp_path / "other", *options, given)


def test_latents_of_version_0_1_0_were_squashed(photographs, vae, tmp_path):
    where = ["--vae", vae, "--dataset_name", photographs[0], "--output_dir", tmp_path / "latents"]
    commands.run("encode", *where)
    options = ["--latents_dir", tmp_path / "latents", "--denoiser", json.dumps(TINY_DIT)]
    train(tmp_path / "cut", *options)
    rewrite(tmp_path / "latents" / "latents.json", lambda index: drop(index["splits"]["train"]["preprocessing"]))
    with pytest.raises(SystemExit, match="trained with other options: latents was"):
        train(tmp_path / "cut", *options, "--resume_from_checkpoint", "latest", steps=2)
    with pytest.raises(SystemExit, match="do_center_crop is None there, True here"):
        commands.run("encode", *where)
    commands.run("encode", *where, "--no-center_crop")  # the same latents: nothing is refused
    train(tmp_path / "squashed", *options)
    checkpoint = tmp_path / "squashed" / "checkpoint-1"
    assert DDAEImageProcessor.from_pretrained(checkpoint).do_center_crop is False
    rewrite(checkpoint / "state" / "latents.json", lambda latents: latents.pop("center_crop"))
    trained = yaml.safe_load((checkpoint / "training_options.yaml").read_text())
    del trained["center_crop"]
    (checkpoint / "training_options.yaml").write_text(yaml.safe_dump(trained))
    (checkpoint / "files.json").unlink()
    train(tmp_path / "squashed", *options, "--resume_from_checkpoint", "latest", steps=2)


def drop(preprocessing):
    assert preprocessing.pop("do_center_crop") is True


def rewrite(path: Path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_an_autoencoder_is_trained_and_measured_on_the_same(photographs, tmp_path, monkeypatch):
    seen, inputs = [], vae_training.clean_images

    def clean_images(*given):
        seen.append(inputs(*given))
        return seen[-1]

    monkeypatch.setattr(vae_training, "clean_images", clean_images)
    tiny = {"in_channels": 1, "latent_channels": 2, "block_out_channels": [8, 8], "norm_num_groups": 4}
    arguments = [
        "--dataset_name",
        photographs[0],
        "--autoencoder",
        json.dumps(tiny),
        "--resolution",
        SIDE,
        "--held_out",
        4,
    ]
    arguments += ["--train_batch_size", 8, "--max_train_steps", 1, "--checkpointing_steps", 1]
    arguments += ["--mixed_precision", "no"]
    found = {}
    for option in ("--center_crop", "--no-center_crop"):
        commands.run("train-vae", *arguments, "--output_dir", tmp_path / option, option)
        options = vae_training.VAEOptions(center_crop=option == "--center_crop")
        images = Images.open([Image.fromarray(image) for image in photographs[1]])["train"]
        network = AutoencoderKL.from_pretrained(tmp_path / option)
        found[option] = vae_training.measure(network, images, options)[0]["psnr"]
        clean = shown(photographs[1], option == "--center_crop")
        with torch.no_grad():
            restored = network.decode(network.encode(clean).latent_dist.mode()).sample.clamp(-1, 1)
        psnr = -10 * ((restored - clean) / 2).square().mean((1, 2, 3)).log10().mean().item()
        assert found[option] == pytest.approx(psnr, abs=1e-3)
        nearest = [(seen[-1] - image).abs().amax((1, 2, 3)).min().item() for image in clean]
        assert sorted(nearest)[7] < 1e-5 < sorted(nearest)[8]  # eight of the twelve are trained on
    with pytest.raises(SystemExit, match="other options: center_crop was"):
        resume = ["--output_dir", tmp_path / "--center_crop", "--resume_from_checkpoint", "latest"]
        commands.run("train-vae", *arguments, *resume, "--no-center_crop")
