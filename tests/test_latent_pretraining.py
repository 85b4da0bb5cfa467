"""Pretraining on latents: what it leaves, that it resumes exactly, and what it refuses."""

import json
import shutil

import dill
import numpy as np
import pytest
import torch
from diffusers import DiTPipeline
from PIL import Image
from safetensors.torch import load_file

from ddae_hf import DDAEModel, DDAEPipeline
from ddae_hf.experiments import make_card
from ddae_hf.experiments.latent_folder import LatentFolder, latent_dataset, one_view
from ddae_hf.experiments.pretraining import PretrainingOptions
from ddae_hf.experiments.pretraining_data import training_data
from ddae_hf.weights import fingerprint

from . import commands
from .conftest import make_dit, make_vae

TINY = {"_class_name": "DiTTransformer2DModel", "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}
COUNT = 40


@pytest.fixture(scope="module")
def latents(digits, tmp_path_factory):
    """Forty digits and their mirror images as latents of 4x8x8, and the VAE that made them."""
    folder = tmp_path_factory.mktemp("encoded")
    make_vae().save_pretrained(folder / "vae")
    options = ["--vae", str(folder / "vae"), "--dataset_name", str(digits), "--max_samples", str(COUNT)]
    commands.run("encode", *options, "--mirror", "--output_dir", str(folder / "latents"))
    return folder / "latents"


def train(latents, folder, *options):
    arguments = ["--latents_dir", str(latents), "--output_dir", str(folder), "--train_batch_size", "16", "--seed", "1"]
    arguments += ["--lr_warmup_steps", "2", "--grid_images", "4", "--num_inference_steps", "2", "--sample_steps", "5"]
    denoiser = [] if "--init_from" in options else ["--denoiser", json.dumps(TINY)]
    commands.run("pretrain", *arguments, *denoiser, "--mixed_precision", "no", "--max_train_steps", "5", *options)


CONDITIONAL = ["--class_conditional", "--label_dropout", "0.5", "--gradient_checkpointing"]


@pytest.fixture(scope="module")
def trained(latents, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train(latents, folder, *CONDITIONAL, "--checkpointing_steps", "3")
    return folder


def weights(folder):
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def test_a_run_leaves_pipelines_that_hold_the_vae_and_the_names_of_classes(trained, latents):
    for folder in (trained, trained / "raw", trained / "checkpoint-3", trained / "checkpoint-3" / "raw"):
        pipeline = DDAEPipeline.from_pretrained(folder)
        assert fingerprint(pipeline.vae, dtype=None) == LatentFolder(latents).index["vae_fingerprint"]
        assert pipeline.get_label_ids(["7", "0"]) == [7, 0] and pipeline.null_class == 10
        assert pipeline(2, [1, 2], num_inference_steps=1, output_type="pt").images.shape == (2, 3, 16, 16)
    config = pipeline.denoiser.config
    assert (config.in_channels, config.sample_size, config.num_embeds_ada_norm) == (4, 8, 10)
    assert config.out_channels == 4
    features = DDAEModel.from_pretrained(trained)(torch.zeros(2, 3, 16, 16)).pooler_output
    assert features.shape == (2, 16)
    stock = DiTPipeline.from_pretrained(trained)
    assert "null_class" not in stock.config  # a DiT implies it, and the stock class would warn
    # With guidance it takes 1000 for the null class, whatever the network.
    images = stock(stock.get_label_ids(["7"]), guidance_scale=1, num_inference_steps=1, output_type="np").images
    assert images.shape == (1, 16, 16, 3)


def test_the_grid_shows_images_of_the_averaged_network(trained):
    """The grid's images come enlarged four times, with a white line between them."""
    grid = np.asarray(Image.open(trained / "samples" / "step-0000005.png"))
    pipeline, generator = DDAEPipeline.from_pretrained(trained), torch.Generator().manual_seed(1)
    images = pipeline(4, torch.arange(4), generator, num_inference_steps=2, output_type="np").images
    assert grid.shape == (2 * 65 - 1, 2 * 65 - 1, 3)
    for i, image in enumerate(images):
        top, left = i // 2 * 65, i % 2 * 65
        shown = grid[top : top + 64 : 4, left : left + 64 : 4].astype(float)
        assert np.abs(shown - 255 * image).max() < 2


def test_results_and_card_say_what_was_trained_on(trained, digits):
    results = json.loads((trained / "train_results.json").read_text())
    described = {"shape": [4, 8, 8], "views": 2, "sample_posterior": False, "center_crop": True}
    assert results["latents"] == described
    assert results["dataset"] == {"name": digits.name, "train_split": "train", "num_images": COUNT}
    assert results["parameters"] == sum(tensor.numel() for tensor in weights(trained).values())
    with pytest.raises(SystemExit, match="holds checkpoints of an earlier run"):  # the options can be given again
        commands.run("pretrain", "--config", trained / "training_options.yaml")
    card = str(make_card(trained))
    assert "for images of 16 x 16 pixels and 3 channels" in card
    trained_on = f"{COUNT} images of {digits.name}, split `train`, for 5 steps"
    assert f"with class labels as its condition only on {trained_on}" in card


def test_an_interrupted_run_resumes_exactly(trained, latents, tmp_path):
    """An epoch has two batches of 16: step 3 is inside the second. Views, labels and noise are drawn as before."""
    (tmp_path / "checkpoint-3").symlink_to(trained / "checkpoint-3")
    train(latents, tmp_path, *CONDITIONAL, "--resume_from_checkpoint", "latest", "--sample_steps", "0")
    for part in (".", "raw"):
        expected, resumed = weights(trained / part), weights(tmp_path / part)
        assert all(torch.equal(expected[name], resumed[name]) for name in expected)


def test_resuming_on_other_latents_is_refused(trained, latents, tmp_path):
    (tmp_path / "checkpoint-3").symlink_to(trained / "checkpoint-3")
    resume = ["--resume_from_checkpoint", "latest"]
    with pytest.raises(
        SystemExit, match="other options: class_conditional was True and is False; .*denoiser.num_embeds_ada_norm was"
    ):
        train(latents, tmp_path, *resume)
    single = copied(latents, tmp_path / "single", lambda index: index["splits"]["train"].update(views=1))
    with pytest.raises(SystemExit, match="trained with other options: latents was .*'views': 2"):
        train(single, tmp_path, *CONDITIONAL, *resume)
    other = copied(latents, tmp_path / "other", lambda index: encoded_by_another_vae(index, tmp_path / "vae"))
    with pytest.raises(SystemExit, match="checkpoint-3 cannot be trained on these latents.*by another VAE"):
        train(other, tmp_path, *CONDITIONAL, *resume)


def copied(latents, folder, change):
    """A folder of latents whose description is changed."""
    shutil.copytree(latents, folder)
    index = json.loads((folder / "latents.json").read_text())
    change(index)
    (folder / "latents.json").write_text(json.dumps(index))
    return folder


def encoded_by_another_vae(index, folder):
    vae = make_vae(seed=1)
    vae.save_pretrained(folder)
    index.update(vae_source=str(folder), vae_fingerprint=fingerprint(vae, dtype=None))


def test_each_step_sees_the_latents_of_one_view_of_an_image(latents):
    """Both views come, about equally often, and with the label of their image."""
    folder = LatentFolder(latents)
    options = PretrainingOptions(train_batch_size=40, class_conditional=True)
    data = training_data(folder, options)
    views = [torch.from_numpy(np.array(folder.latents("train", k))).float() for k in (0, 1)]
    torch.manual_seed(0)
    drawn = []
    for _ in range(5):
        (batch,) = data.batches(make_dit(in_channels=4).config, options)
        seen = one_view(batch["pixel_values"])
        for latent, label in zip(seen, batch["labels"], strict=True):
            (found,) = [(i, k) for i in range(COUNT) for k in (0, 1) if torch.equal(latent, views[k][i])]
            assert folder.labels("train")[found[0]] == label
            drawn.append(found)
    assert {i for i, _ in drawn} == set(range(COUNT)) and 60 < sum(k for _, k in drawn) < 140


def test_only_the_first_images_are_trained_on_where_that_is_asked(latents, tmp_path):
    train(latents, tmp_path, "--max_train_samples", "16", "--sample_steps", "0")
    results = json.loads((tmp_path / "train_results.json").read_text())
    assert results["dataset"]["num_images"] == 16 and results["images"] == 5 * 16
    pipeline = DDAEPipeline.from_pretrained(tmp_path)
    assert pipeline.labels == {} and pipeline.denoiser.config.num_embeds_ada_norm == 0


def test_a_data_set_of_latents_stays_on_the_disk(latents):
    """datasets pickles transforms, which would read what they hold."""
    folder = LatentFolder(latents)
    transform = latent_dataset(folder, "train", None).format["format_kwargs"]["transform"]
    assert len(dill.dumps(transform, recurse=True)) < folder.latents("train").nbytes


def test_a_run_can_start_from_a_denoiser_of_the_same_latents(trained, latents, tmp_path, layouts):
    start = ["--init_from", str(trained), "--max_train_steps", "1", "--sample_steps", "0"]
    train(latents, tmp_path / "out", *start, "--class_conditional")
    before, after = weights(trained), weights(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)
    other = DDAEPipeline.from_pretrained(trained)
    other.register_modules(vae=make_vae(seed=1))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit, match="other cannot be trained on these latents.*by another VAE"):
        train(latents, tmp_path / "no", "--init_from", str(tmp_path / "other"), "--class_conditional")
    with pytest.raises(SystemExit, match="pipeline has no vae, so what its denoiser works on is not known"):
        train(latents, tmp_path / "no", "--init_from", str(layouts / "pipeline"))


def test_images_do_not_go_on_with_a_denoiser_of_latents(trained, digits, tmp_path):
    options = ["--dataset_name", str(digits), "--init_from", str(trained), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="works on latents: give a folder of them .latents_dir."):
        commands.run("pretrain", *options, "--mixed_precision", "no")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset_name", "x"], "dataset_name does not go with latents_dir"),
        (["--train_data_dir", "x"], "train_data_dir does not go with latents_dir"),
        (["--resolution", "16"], "resolution does not go with latents"),
        (["--low_resolution", "4"], "means of latents are no latents"),
        (["--streaming"], "streaming does not go with latents_dir"),
        (
            ["--random_flip"],
            "latents are not changed; `encode` with mirror makes",
        ),
        (["--augment", "0.1"], "augment does not go with latents"),
        (["--train_split", "test"], "has no split 'test': it has ['train']"),
        (["--max_train_samples", "0"], "must be at least 1"),
        (["--latents_dir", "nowhere"], "nowhere holds no latents"),
        (["--vae", "nowhere/at/all"], "is not a folder"),
        (["--denoiser", json.dumps({**TINY, "in_channels": 3})], "but has 3 and 8"),
        (["--denoiser", json.dumps({**TINY, "sample_size": 16})], "but has 4 and 16"),
        (["--denoiser", json.dumps({**TINY, "out_channels": 8})], "as many output as input channels"),
        (["--denoiser", json.dumps({**TINY, "patch_size": 3})], "must be a multiple of 3"),
    ],
)
def test_what_cannot_be_trained_on_latents_is_refused_first(latents, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as refusal:
        train(latents, tmp_path / "out", *options)
    assert message in str(refusal.value) + capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_vae_of_the_latents_is_looked_for_where_it_was_and_must_be_theirs(latents, tmp_path):
    moved = copied(latents, tmp_path / "moved", lambda index: index.update(vae_source=str(tmp_path / "gone")))
    with pytest.raises(SystemExit, match="gone.*If the VAE of the latents is elsewhere now, give its place .vae."):
        train(moved, tmp_path / "out")
    make_vae(seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit, match="made by another VAE"):
        train(moved, tmp_path / "out", "--vae", str(tmp_path / "other"))
    make_vae(scaling_factor=0.5).save_pretrained(tmp_path / "scaled")
    with pytest.raises(SystemExit, match="a scaling_factor of 0.18215: this VAE has 0.5"):
        train(moved, tmp_path / "out", "--vae", str(tmp_path / "scaled"))
    train(
        moved, tmp_path / "out", "--vae", str(latents.parent / "vae"), "--max_train_steps", "1", "--sample_steps", "0"
    )
    assert DDAEPipeline.from_pretrained(tmp_path / "out").vae is not None
