"""Training an autoencoder on real digits, at tiny size, as a user does."""

import json

import pytest
import torch
import yaml
from datasets import load_dataset
from diffusers import AutoencoderKL
from PIL import Image

from ddae_hf import DDAEImageProcessor
from ddae_hf.commands.parsing import CONFIGS, parse
from ddae_hf.experiments import Images, train_vae
from ddae_hf.experiments.draws import RowDraws
from ddae_hf.experiments.images import DataOptions
from ddae_hf.experiments.vae_training import Autoencoder, VAEOptions, new_vae, reconstruction_loss

from . import commands

TINY = {"in_channels": 1, "latent_channels": 2, "block_out_channels": [8, 16], "norm_num_groups": 4}
TINY |= {"mid_block_add_attention": False}


def train(digits, folder, *options):
    arguments = ["--dataset_name", str(digits), "--output_dir", str(folder), "--autoencoder", json.dumps(TINY)]
    arguments += ["--resolution", "8", "--train_batch_size", "32", "--held_out", "40", "--lr_warmup_steps", "2"]
    commands.run(
        "train_vae", *arguments, "--learning_rate", "5e-3", "--mixed_precision", "no", "--random_flip", *options
    )


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    train(digits, folder, "--max_train_steps", "40", "--checkpointing_steps", "25")
    return folder


def results(folder):
    return json.loads((folder / "train_results.json").read_text())


def digit_pixels(digits, processor_config):
    images = load_dataset(str(digits))["test"]["image"][:]
    return DDAEImageProcessor.for_denoiser(processor_config)(images, return_tensors="pt")["pixel_values"]


def test_the_folder_opens_in_diffusers_and_restores_images_that_it_never_saw(trained, digits):
    vae = AutoencoderKL.from_pretrained(trained)
    images = digit_pixels(digits, vae.config)
    with torch.no_grad():
        restored = vae.decode(vae.encode(images).latent_dist.mode()).sample.clamp(-1, 1)
    error = (restored - images).square().mean((1, 2, 3))
    assert error.mean() < 0.4 * images.var()  # a picture of the mean alone leaves all of it
    # Test images are as new to it as those held out.
    psnr = (-10 * (error / 4).log10()).mean().item()
    assert results(trained)["held_out"]["psnr"] == pytest.approx(psnr, abs=0.5)


def test_scaled_latents_have_unit_deviation(trained, digits):
    vae = AutoencoderKL.from_pretrained(trained)
    with torch.no_grad():
        latents = vae.encode(digit_pixels(digits, vae.config)).latent_dist.sample()
    assert (latents.std() * vae.config.scaling_factor).item() == pytest.approx(1, abs=0.05)
    assert vae.config.shift_factor is None and results(trained)["scaling_factor"] == vae.config.scaling_factor


def test_a_run_says_how_it_was_made_and_what_came_out(trained):
    found = results(trained)
    assert found["steps"] == 40 and found["images"] == 40 * 32 and found["held_out"]["num_images"] == 40
    assert found["dataset"]["num_images"] == 1437 - 40
    assert found["parameters"] == AutoencoderKL.from_pretrained(trained).num_parameters()
    assert yaml.safe_load((trained / "training_options.yaml").read_text())["autoencoder"] == TINY
    pairs = Image.open(trained / "reconstructions.png")
    assert pairs.size == (8 * 65 - 1, 8 * 65 - 1)


def test_a_resumed_run_ends_as_one_that_was_never_stopped(trained, digits, tmp_path):
    train(digits, tmp_path, "--max_train_steps", "40", "--resume_from_checkpoint", str(trained / "checkpoint-25"))
    for ours, theirs in zip(*(AutoencoderKL.from_pretrained(f).parameters() for f in (trained, tmp_path)), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert results(tmp_path)["images"] == results(trained)["images"]
    assert results(tmp_path)["seconds"] > results(trained)["seconds"] / 4


def test_the_divergence_is_the_one_of_the_posterior_and_weighs_as_the_sum_over_an_image():
    autoencoder = Autoencoder(new_vae(options())).eval()
    images = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    reconstruction, divergence = autoencoder(images, RowDraws(0, range(3), "cpu"))
    posterior = autoencoder.vae.encode(images).latent_dist
    normal = torch.distributions.Normal(posterior.mean, posterior.std)
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0, 1)).sum((1, 2, 3))
    torch.testing.assert_close(divergence, expected)
    for loss, power in (("l1", 1), ("l2", 2)):
        found = reconstruction_loss(options(loss=loss, kl_weight=0.5), images, reconstruction, divergence)
        sums = (reconstruction - images).abs().pow(power).sum((1, 2, 3)) + 0.5 * expected
        torch.testing.assert_close(found, sums.mean() / 64)


def options(**more):
    return VAEOptions(autoencoder=TINY, resolution=8, **more)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resolution", "9"], "must be a multiple of 2"),
        (["--autoencoder", json.dumps(TINY | {"norm_num_groups": 3})], "num_groups"),
        (["--autoencoder", json.dumps(TINY | {"scaling_factor": 0.2})], "it is measured after the training"),
        (["--autoencoder", json.dumps(TINY | {"sample_size": 8})], "resolution gives it"),
        (["--autoencoder", json.dumps(TINY | {"channels": 8})], "no options ['channels']"),
        (["--autoencoder", "3"], "is not a mapping"),
        (["--held_out", "1430"], "There are 1437 images: held_out 1430 and a total_batch_size of 32"),
        (["--held_out", "0"], "must be at least 1"),
        (["--kl_weight", "-1"], "kl_weight is -1.0: it must be at least 0"),
        (["--train_split", "validation"], "has no split 'validation'"),
    ],
)
def test_options_that_cannot_work_are_refused_before_training(digits, tmp_path, options, message, capsys):
    with pytest.raises(SystemExit) as caught:
        train(digits, tmp_path, *options)
    said = str(caught.value) if caught.value.code != 2 else capsys.readouterr().err
    assert message in " ".join(said.split()) and not list(tmp_path.iterdir())


def test_a_damaged_held_out_image_is_named_before_the_training(tmp_path, monkeypatch):
    """They are measured after it."""
    for number in range(40):
        Image.new("L", (8, 8), 5 * number).save(tmp_path / f"{number:02}.png")
    (tmp_path / "30.png").write_bytes(b"<html>")
    monkeypatch.setattr("ddae_hf.experiments.training.Loop.run", lambda *args: pytest.fail("It has begun."))
    with pytest.raises(ValueError, match="30.png cannot be read"):
        train_vae(
            Images.open(tmp_path), autoencoder=TINY, resolution=8, held_out=36, total_batch_size=4, max_train_steps=1
        )


def test_a_checkpoint_is_resumed_as_it_was_begun(trained, digits):
    resume = ("--max_train_steps", "41", "--resume_from_checkpoint", "latest")
    with pytest.raises(SystemExit, match="other options: loss was 'l2' and is 'l1'"):
        train(digits, trained, *resume, "--loss", "l1")
    with pytest.raises(SystemExit, match="checkpoint-25 is at step 25, beyond the 24 asked for"):
        train(digits, trained, "--max_train_steps", "24", *resume[2:])
    with pytest.raises(SystemExit, match="holds checkpoints of an earlier run"):
        train(digits, trained)


def test_a_loss_that_is_no_number_stops_the_training(digits, tmp_path):
    with pytest.raises(SystemExit, match=r"The loss is nan at step 10, at a learning rate of .*e\+29; none of it"):
        train(digits, tmp_path, "--max_train_steps", "20", "--learning_rate", "1e30")
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("name", ["cifar10_vae", "digits_vae"])
def test_configurations_describe_autoencoders_that_can_be_trained(name):
    _, given = parse([DataOptions, VAEOptions], None, ["--config", name])
    vae = new_vae(given)
    images = torch.zeros(1, vae.config.in_channels, given.resolution, given.resolution)
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.mode()
        assert vae.decode(latents).sample.shape == images.shape
    assert f"{'x'.join(map(str, latents.shape[:0:-1]))}" in (CONFIGS / f"{name}.yaml").read_text()
