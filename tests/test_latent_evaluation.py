"""The scripts that evaluate, as a user runs them, on a checkpoint whose denoiser works on a VAE's latents."""

import json

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline
from PIL import Image
from safetensors.torch import load_file

from ddae_hf import DDAEConfig, DDAEForImageClassification, DDAEImageProcessor, DDAEModel, DDAEPipeline
from ddae_hf.checkpoints import load_vae, plain_config
from ddae_hf.experiments import correspondences, make_card, trainer
from ddae_hf.experiments.draws import POSTERIOR, RowDraws, indexed_noise
from ddae_hf.experiments.encoding import describe_splits, encode_views, encoding_team
from ddae_hf.experiments.evaluation import frechet_distance
from ddae_hf.experiments.features import FeatureCache, extract_features
from ddae_hf.experiments.finetuning import FinetuningOptions
from ddae_hf.experiments.images import ImageInputs, Images, labelled_splits
from ddae_hf.experiments.latent_folder import LatentFolder
from ddae_hf.experiments.noisy_classification import TEST_VIEW, NoisyOptions, Study
from ddae_hf.experiments.noisy_networks import NoiseConditionalMLP, WideResNet
from ddae_hf.experiments.trainer import AVERAGED
from ddae_hf.latents import encode
from ddae_hf.weights import fingerprint

from . import commands
from .conftest import drawn, make_unet, make_vae

TRAIN, TEST, LAYER = 40, 20, "transformer_blocks.2"
COUNTS = ["--max_train_samples", str(TRAIN), "--max_test_samples", str(TEST)]
pytestmark = pytest.mark.filterwarnings("ignore:.*their covariance is singular")


@pytest.fixture(scope="module")
def vae(latent_dit):
    return load_vae(latent_dit)


@pytest.fixture(scope="module")
def other(latent_dit, tmp_path_factory):
    """The same denoiser with another VAE."""
    folder = tmp_path_factory.mktemp("other")
    pipeline = DDAEPipeline.from_pretrained(latent_dit)
    pipeline.vae = make_vae(seed=1)
    pipeline.save_pretrained(folder)
    return folder


def pixels_and_labels(checkpoint, digits, split, count):
    part = drawn(digits, split, count)
    processor = DDAEImageProcessor.from_pretrained(checkpoint)
    return processor(part["image"][:], return_tensors="pt")["pixel_values"], torch.tensor(part["label"][:])


@pytest.fixture(scope="module")
def tested(latent_dit, digits):
    return pixels_and_labels(latent_dit, digits, "test", TEST)


def common(checkpoint, digits, folder):
    options = ["--model_name_or_path", checkpoint, "--dataset_name", digits, "--output_dir", folder]
    return [str(option) for option in options]


def share_right(logits, labels):
    return (logits.argmax(-1) == labels).float().mean().item()


def test_generated_images_are_the_pipeline_s_of_classes_by_number_or_name(latent_dit, other, tmp_path):
    def run(checkpoint, *classes):
        options = ["--output_dir", str(tmp_path), "--num_images", "3", "--num_inference_steps", "2", "--class_label"]
        commands.run("generate", "--model_name_or_path", str(checkpoint), *options, *classes, "--guidance_scale", "2")

    run(latent_dit, "goldfish", "7")
    expected = DDAEPipeline.from_pretrained(latent_dit)(
        3,
        [1, 7, 1],
        [torch.Generator().manual_seed(i) for i in range(3)],
        num_inference_steps=2,
        guidance_scale=2,
    ).images
    for i, image in enumerate(expected):
        assert np.abs(np.asarray(Image.open(tmp_path / f"0000{i}.png"), int) - np.asarray(image, int)).max() <= 1
    with pytest.raises(SystemExit, match="made otherwise.*weights"):
        run(other, "goldfish", "7")
    with pytest.raises(SystemExit, match="No class is named 'godlfish'.*goldfish"):
        run(latent_dit, "godlfish")
    with pytest.raises(SystemExit, match="`all` takes no other class beside it"):
        run(latent_dit, "all", "7")


def test_generated_images_are_measured_by_features_of_latents(latent_dit, other, digits, tmp_path, capsys):
    arguments = [*common(latent_dit, digits, tmp_path), "--num_images", "4", "--num_inference_steps", "1"]
    arguments += ["--max_reference_samples", "40", "--features_dir", str(tmp_path / "features"), "--class_label", "all"]
    found = {}
    for path in (latent_dit, other):
        commands.run("evaluate", *arguments, "--extractor", f"ddae:{path}", "--extractor_layer", LAYER)
        found[path] = json.loads((tmp_path / "generation_results.json").read_text())
    assert "of the classes all (images of the first 4 of 1,000), guidance 1" in capsys.readouterr().out
    report, model = found[latent_dit], DDAEModel.from_pretrained(latent_dit)
    assert report["generator"]["weights"] == fingerprint(model.denoiser, model.vae, dtype=None)
    assert report["extractor"]["weights"] != found[other]["extractor"]["weights"]
    processor = DDAEImageProcessor.from_pretrained(latent_dit)
    files = sorted((tmp_path / "images").glob("*.png"))
    made = processor([Image.open(file) for file in files], return_tensors="pt")["pixel_values"]
    real, _ = pixels_and_labels(latent_dit, digits, "train", 40)
    features = [
        extract_features(model, [x], [LAYER], model.config.sigma, view=v)[LAYER] for v, x in enumerate([real, made])
    ]
    distance = report["results"]["generated"]["frechet_distance"]
    assert distance == pytest.approx(frechet_distance(*features), rel=1e-3)
    assert distance != found[other]["results"]["generated"]["frechet_distance"]


def test_a_probe_is_saved_with_generator_and_vae(latent_dit, vae, digits, tested, tmp_path, monkeypatch):
    seen = []

    features = FeatureCache.kept

    def watched(self, *args, **kwargs):
        seen.append((fingerprint(self.model.denoiser), fingerprint(self.model.vae)))
        return features(self, *args, **kwargs)

    monkeypatch.setattr(FeatureCache, "kept", watched)
    commands.run("probe", *common(latent_dit, digits, tmp_path), *COUNTS, "--baselines", "--layers", LAYER)
    denoisers, vaes = map(set, zip(*seen, strict=True))
    assert len(denoisers) == 2 and vaes == {fingerprint(vae)}  # the untrained network sees the same latents
    report = json.loads((tmp_path / "eval_results.json").read_text())
    images, labels = tested
    with torch.no_grad():
        logits = DDAEForImageClassification.from_pretrained(tmp_path)(images).logits
    assert report["saved_classifier_test_accuracy"] == pytest.approx(share_right(logits, labels))
    stock = DiTPipeline.from_pretrained(tmp_path)
    assert fingerprint(stock.vae, dtype=None) == fingerprint(vae, dtype=None) and stock.labels["goldfish"] == 1
    assert (tmp_path / "head.safetensors").is_file() and not (tmp_path / "model.safetensors").exists()
    card = (tmp_path / "README.md").read_text()
    assert "for images of 16 x 16 pixels and 3 channels" in card
    assert "works on latents of an `AutoencoderKL`, which is part of the checkpoint: an image becomes 4 x 8 x 8" in card


def tune(checkpoint, digits, folder, *options):
    arguments = [
        "--max_train_steps",
        "2",
        "--train_batch_size",
        "8",
        "--layer",
        LAYER,
        "--sigma",
        "0.2",
        "--layer_decay",
    ]
    commands.run(
        "finetune", *common(checkpoint, digits, folder), *COUNTS, *arguments, "0.8", "--ema_decay", "0.5", *options
    )
    return json.loads((folder / "eval_results.json").read_text())


def test_fine_tuning_leaves_the_vae_as_it_is(latent_dit, vae, digits, tested, tmp_path):
    changes = ["--random_flip", "--random_crop", "1", "--mixup", "0.4", "--checkpointing_steps", "2"]
    report = tune(latent_dit, digits, tmp_path / "tuned", *changes)
    scratch = ["--from_scratch", "--max_train_steps", "1"]  # at a learning rate of 0
    tune(latent_dit, digits, tmp_path / "scratch", *scratch)
    start = DDAEModel.from_pretrained(latent_dit)
    for name in ("tuned", "scratch"):
        model = DDAEForImageClassification.from_pretrained(tmp_path / name)
        assert fingerprint(model.ddae.vae, dtype=None) == fingerprint(vae, dtype=None)
        for part in ("pos_embed.proj", "transformer_blocks.2.attn1.to_q"):
            own = model.ddae.denoiser.get_parameter(f"{part}.weight")
            assert not torch.equal(own, start.denoiser.get_parameter(f"{part}.weight"))
    averaged = load_file(tmp_path / "tuned" / "checkpoint-2" / AVERAGED)
    assert averaged and all(name.startswith(("ddae.denoiser.", "classifier.")) for name in averaged)
    model, (images, labels) = DDAEForImageClassification.from_pretrained(tmp_path / "tuned"), tested
    own = indexed_noise((4, 8, 8), range(TEST), 0, 1)
    with torch.no_grad():
        found = [share_right(model(images, noise=noise).logits, labels) for noise in (None, own)]
    assert [report["test_accuracy"], report["test_own_noise_accuracy"]] == pytest.approx(found)


@pytest.fixture(scope="module")
def latents(latent_dit, vae, digits, tmp_path_factory):
    """The latents of the images, two views of each, as `latent_transfer.py` writes them."""
    folder = tmp_path_factory.mktemp("latents")
    options = FinetuningOptions(max_train_samples=TRAIN, max_test_samples=TEST)
    processor = DDAEImageProcessor.from_pretrained(latent_dit)
    changes = {"seed": 0, "flip": False, "crop_padding": 2}
    both = zip(("train", "test"), labelled_splits(Images.open(digits), options), strict=True)
    inputs = {name: ImageInputs(images, processor, **changes) for name, images in both}
    splits = describe_splits(inputs, 2, changes)
    encoded = LatentFolder.create(folder, vae, (16, 16), splits, sample_posterior=True, seed=3)
    with encoding_team(vae, inputs, "float32") as team:
        encode_views(encoded, inputs, 16, team)
    return folder


def test_fine_tuning_on_latents_saves_a_classifier_of_images(
    latent_dit, vae, digits, latents, tested, tmp_path, monkeypatch
):
    seen, chosen = [], trainer.one_view
    monkeypatch.setattr(trainer, "one_view", lambda *given: seen.append(chosen(*given)) or seen[-1])
    options = ["--latents_dir", str(latents), "--mixup", "0.3", "--max_train_steps", "4"]
    report = tune(latent_dit, digits, tmp_path, *options)
    views = [torch.from_numpy(np.array(LatentFolder(latents).latents("train", view))).float() for view in (0, 1)]
    assert len(seen) == 2 * 4  # those of partners, too
    of_view = [[any(torch.equal(row, known) for known in view) for row in torch.cat(seen)] for view in views]
    assert all(a or b for a, b in zip(*of_view, strict=True)) and any(of_view[0]) and any(of_view[1])
    whole, (images, labels) = DDAEForImageClassification.from_pretrained(tmp_path), tested
    bare = DDAEForImageClassification.from_pretrained(tmp_path, vae=None, sample_posterior=False)
    assert whole.config.sample_posterior and whole.config.image_size == (16, 16)
    assert fingerprint(whole.ddae.vae, dtype=None) == fingerprint(vae, dtype=None)
    stored = torch.from_numpy(np.array(LatentFolder(latents).latents("test"))).float()
    with torch.no_grad():
        torch.testing.assert_close(bare(whole.ddae.encode(images)).logits, whole(images).logits, rtol=1e-4, atol=1e-4)
        draw = whole.ddae.encode(images, indexed_noise((4, 8, 8), range(TEST), 3, 0, purpose=POSTERIOR))
        torch.testing.assert_close(bare(stored).logits, bare(draw).logits, rtol=0, atol=0.01)
        assert report["test_accuracy"] == pytest.approx(share_right(bare(stored).logits, labels))
        assert report["saved_classifier_test_accuracy"] == pytest.approx(share_right(whole(images).logits, labels))
    card = make_card(tmp_path).content
    assert "learnt from latents that were encoded beforehand" in card and "which are drawn from the VAE" in card
    assert f"has a test accuracy of {100 * report['saved_classifier_test_accuracy']:.2f} %" in card


def test_adapters_that_learn_from_latents_classify_images(latent_dit, vae, digits, latents, tested, tmp_path):
    report = tune(latent_dit, digits, tmp_path, "--latents_dir", str(latents), "--lora_rank", "2")
    whole, (images, labels) = DDAEForImageClassification.from_pretrained(tmp_path), tested
    assert whole.config.weights == "adapters"
    assert fingerprint(whole.ddae.vae, dtype=None) == fingerprint(vae, dtype=None)
    with torch.no_grad():
        found = share_right(whole(images).logits, labels)
    assert report["saved_classifier_test_accuracy"] == pytest.approx(found)


def test_latents_of_others_are_refused(latent_dit, other, digits, latents, tmp_path, capsys):
    options = ["--latents_dir", str(latents)]
    with pytest.raises(SystemExit, match="were made by another VAE than this one"):
        tune(other, digits, tmp_path, *options)
    with pytest.raises(SystemExit, match="has no latents of these train images"):
        tune(latent_dit, digits, tmp_path, *options, "--max_train_samples", "39")
    with pytest.raises(SystemExit, match="holds no latents"):
        tune(latent_dit, digits, tmp_path, "--latents_dir", str(tmp_path))
    with pytest.raises(SystemExit):
        tune(latent_dit, digits, tmp_path, *options, "--random_crop", "1")
    assert "random_crop: images in latents_dir were changed before they were encoded" in capsys.readouterr().err


def test_both_classifiers_of_noisy_images_see_noisy_latents(latent_dit, vae, digits, tested, tmp_path):
    options = ["--num_views", "1", "--num_train_epochs", "1", "--hidden_size", "16", "--sigmas", "0.1", "1"]
    options += ["--wide_resnet", "1", "--wide_resnet_steps", "2", "--wide_resnet_batch_size", "16", "--random_crop"]
    commands.run("noisy", *common(latent_dit, digits, tmp_path), *COUNTS, *options, "1", "--layers", LAYER)
    report = json.loads((tmp_path / "eval_results.json").read_text())
    networks = []
    for cls, name in ((NoiseConditionalMLP, "mlp"), (WideResNet, "wide_resnet")):
        config = json.loads((tmp_path / name / "config.json").read_text())
        config.pop("layers", None)
        networks.append(cls(**config))
        networks[-1].load_state_dict(load_file(tmp_path / name / "model.safetensors"))
    (mlp, wide_resnet), (images, labels) = (network.eval() for network in networks), tested
    noise = indexed_noise((4, 8, 8), range(TEST), 0, TEST_VIEW)
    model = DDAEModel.from_pretrained(latent_dit, layer=LAYER)
    with torch.no_grad():
        for i, sigma in enumerate([0.1, 1.0]):
            levels = torch.full((TEST,), sigma)
            logits = {
                "MLP on the denoiser": mlp(model(images, sigma=sigma, noise=noise).pooler_output, levels),
                "WRN-28-1": wide_resnet(encode(vae, images) + sigma * noise, levels),
            }
            for name, answer in logits.items():
                assert report["test_accuracies"][name][i] == pytest.approx(share_right(answer, labels))
    assert report["noise_on"] == "scaled latents"
    note = json.loads((tmp_path / "wide_resnet" / "options.json").read_text())
    assert note["vae"] == fingerprint(vae, dtype=None)


def test_the_rival_learns_from_latents_with_standard_normal_noise(latent_dit, vae, digits, tmp_path):
    options = NoisyOptions(sigma_min=0.5, max_train_samples=TRAIN, max_test_samples=TEST)
    processor = DDAEImageProcessor.from_pretrained(latent_dit)
    train, test = (ImageInputs(images, processor) for images in labelled_splits(Images.open(digits), options))
    study = Study(DDAEModel.from_pretrained(latent_dit).eval(), train, test, options, tmp_path)
    images = train.read(range(TRAIN))
    with torch.no_grad():
        noisy, sigma = study.noisy_batch(images, RowDraws(0, range(TRAIN), "cpu"))
        noise = (noisy - encode(vae, images)) / sigma[:, None, None, None]
    assert noise.shape == (TRAIN, 4, 8, 8) and abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    assert abs(np.corrcoef(noise[0].flatten(), noise[1].flatten())[0, 1]) < 0.3


def test_exported_features_are_those_of_the_library(latent_dit, digits, tmp_path):
    options = ["--max_samples", "10", "--layers", LAYER, "--sigma", "0.3", "--format", "npy", "--view", "2"]
    commands.run("export", *common(latent_dit, digits, tmp_path), *options)
    images, labels = pixels_and_labels(latent_dit, digits, "train", 10)
    expected = extract_features(DDAEModel.from_pretrained(latent_dit), [images], [LAYER], 0.3, view=2)[LAYER]
    np.testing.assert_allclose(np.load(tmp_path / f"{LAYER}.npy"), expected, rtol=1e-4, atol=1e-5)
    assert np.array_equal(np.load(tmp_path / "label.npy"), labels)


def test_points_are_looked_up_by_maps_of_latents(latent_dit, vae, digits, tmp_path, monkeypatch):
    opened = []
    open_backbones = correspondences.open_backbones

    def keep(*args):
        opened.append(open_backbones(*args))
        return opened[0]

    monkeypatch.setattr(correspondences, "open_backbones", keep)
    for name in ("ROTATION", "SHIFT", "BEND"):
        monkeypatch.setattr(correspondences, name, 0)
    options = ["--max_samples", "2", "--sigma", "0.02"]
    commands.run("correspondence", *common(latent_dit, digits, tmp_path), *options)
    trained, untrained = (backbone.ddae for backbone in opened[0].values())
    assert fingerprint(trained.denoiser) != fingerprint(untrained.denoiser)
    assert fingerprint(trained.vae) == fingerprint(untrained.vae) == fingerprint(vae)
    results = json.loads((tmp_path / "eval_results.json").read_text())["results"]
    # What does not move is found but for noise, which is the two images' own.
    assert 0 < results["denoiser"]["mean_error"] < 3 and results["denoiser"]["pck@4"] > 0.9


def test_the_card_of_a_network_with_features_only_has_no_code_that_generates(tmp_path):
    reason = "its output layer is another network's."
    DDAEModel(DDAEConfig(denoiser=plain_config(make_unet()), features_only=reason)).save_pretrained(tmp_path)
    card = make_card(tmp_path).content
    assert f"This checkpoint has features but cannot generate images: {reason}" in card and "DDAEPipeline" not in card
    assert "This checkpoint is an extractor of features: a" in card and "latents" not in card
