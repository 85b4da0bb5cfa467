"""Experiments on denoisers that are told a text, in the layouts of their stock pipelines, at tiny size."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image

from ddae_hf import DDAEForImageClassification, DDAEImageProcessor, DDAEModel, DDAEPipeline, embed_prompts
from ddae_hf.checkpoints import read_checkpoint
from ddae_hf.experiments import (
    Images,
    classify_noisy,
    encode,
    evaluate_generation,
    export_features,
    find_correspondences,
    finetune,
    generate,
    make_card,
    pretrain,
    sweep,
    transfer,
)
from ddae_hf.experiments.correspondences import CorrespondenceOptions, open_backbones
from ddae_hf.experiments.extractors import open_extractor
from ddae_hf.experiments.features import FeatureCache
from ddae_hf.experiments.finetuning import FinetuningOptions, build_classifier
from ddae_hf.experiments.probing import classify
from ddae_hf.experiments.publishing import HubOptions, prepare
from ddae_hf.experiments.sweeping import SweepOptions, changed_inputs, check_sweep

from . import commands, stock
from .conftest import make_unet, make_vae

PROMPT = "a photo of a cat"
NAMES = {"sd": "StableDiffusionPipeline", "xl": "StableDiffusionXLPipeline", "pixart": "PixArtAlphaPipeline"}
INNER = {
    "sd": "down_blocks.0.attentions.0.transformer_blocks.0",
    "xl": "up_blocks.0.attentions.0.transformer_blocks.1.attn1.to_k",
    "pixart": "transformer_blocks.1.attn1.to_q",
}
ONE = {"sigmas": [0.2], "num_noise_seeds": 1, "batch_size": 8}


@pytest.fixture(scope="module")
def stocks(tmp_path_factory):
    """The folders of small pipelines, by their names in `NAMES`."""
    folder = tmp_path_factory.mktemp("stocks")
    stock.stable_diffusion(folder / "sd")
    stock.stable_diffusion_xl(folder / "xl")
    stock.pixart(folder / "pixart")
    return {name: str(folder / name) for name in NAMES}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The folder of a small denoiser of latents that is told nothing."""
    folder = tmp_path_factory.mktemp("plain")
    unet = make_unet(in_channels=4, out_channels=4, block_out_channels=(32, 32))
    DDAEPipeline.for_denoiser(unet, DDPMScheduler(), vae=make_vae()).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of noisy images, reddish and bluish ones."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 6)):
        for name, colour in (("red", (200, 40, 40)), ("blue", (40, 40, 200))):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(colour + rng.normal(0, 60, (20, 20, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def images(folder):
    return Images.open(folder)


def told(model):
    """What a model's denoiser is told, by name."""
    return dict(model.condition.named_buffers())


def same(one, other):
    """Whether two conditions are the same tensors."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name].to(one[name])) for name in one)


@pytest.mark.parametrize("name", NAMES)
def test_a_sweep_saves_a_head_that_gives_its_predictions(stocks, images, tmp_path, name):
    layers = [INNER[name], "decoder"]
    result = sweep(stocks[name], images, layers=layers, prompt=PROMPT, output_dir=str(tmp_path), **ONE)
    known = DDAEModel.from_pretrained(stocks[name])
    assert [pair.layer for pair in result.pairs][0] == INNER[name] and len(result.pairs) > 2
    assert {pair.layer for pair in result.pairs[1:]} <= set(known.layer_names())  # inner ones only where they are named
    saved = tmp_path / "classifier"
    assert not list(saved.rglob("diffusion_pytorch_model*")) and not (saved / "model.safetensors").exists()
    opened = DDAEForImageClassification.from_pretrained(saved)
    expected = embed_prompts(stocks[name], PROMPT)
    assert opened.config.prompt == PROMPT and same(told(opened.ddae), expected)
    processor = DDAEImageProcessor.from_pretrained(saved)
    predicted = classify(opened, images["test"], processor)
    assert (predicted == classify(result.classifier, images["test"], result.processor)).all()
    assert (predicted == images["test"].labels).mean() == result.saved_classifier_test_accuracy
    assert result.options["prompt"] == PROMPT


def test_a_probe_on_a_head_stands_on_the_pipeline_itself(stocks, folder, tmp_path):
    given = ["--train_data_dir", folder, "--batch_size", 8]
    for source, name, more in ((stocks["sd"], "one", ["--prompt", PROMPT]), (tmp_path / "one", "two", [])):
        commands.run("probe", "--model_name_or_path", source, "--output_dir", tmp_path / name, *given, *more)
        assert read_checkpoint(tmp_path / name).base.path == stocks["sd"]
        assert json.loads((tmp_path / name / "config.json").read_text())["prompt"] == PROMPT
    figures = [json.loads((tmp_path / name / "eval_results.json").read_text()) for name in ("one", "two")]
    assert figures[0]["test_accuracies"] == figures[1]["test_accuracies"]  # it is told the same
    beside = tmp_path / "beside"
    shutil.copytree(stocks["sd"], beside)
    commands.run("probe", "--model_name_or_path", beside, "--output_dir", beside, *given)
    assert read_checkpoint(beside).base.path == str(beside) and (beside / "head.safetensors").exists()


def test_of_an_open_model_a_sweep_saves_the_whole(stocks, images, tmp_path):
    condition = embed_prompts(stocks["xl"], PROMPT)
    model = DDAEModel.from_pretrained(stocks["xl"], condition=condition).eval()
    result = sweep(model, images, layers=["mid_block"], **ONE)
    result.save(tmp_path)
    opened = DDAEForImageClassification.from_pretrained(tmp_path)
    assert same(told(opened.ddae), condition)
    again = classify(opened, images["test"], result.processor)
    assert (again == classify(result.classifier, images["test"], result.processor)).all()
    with pytest.raises(ValueError, match="open already, with another prompt"):
        sweep(model, images, prompt="a dog", **ONE)


def test_cards_say_what_opens_and_generates(stocks, images, tmp_path, monkeypatch):
    result = sweep(stocks["pixart"], images, layers=["own"], prompt=PROMPT, output_dir=str(tmp_path), **ONE)
    card = make_card(tmp_path / "classifier")
    assert "DDAEPipeline" not in card.text and "class_labels" not in card.text
    assert f'PixArtAlphaPipeline.from_pretrained("{stocks["pixart"]}")' in card.text
    assert "These files hold the classifier alone" in card.text and f'the prompt "{PROMPT}"' in card.text
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (30, 20), "red").save("image.png")
    code = next(code.split("```")[0] for code in card.text.split("```python")[1:] if "Classification" in code)
    exec(compile(code, "card", "exec"), {})
    result.classifier.save_pretrained(tmp_path / "whole")
    whole = make_card(tmp_path / "whole").text
    assert "DDAEPipeline" not in whole and "it has no text encoders" in whole and "holds the classifier" not in whole
    generator = make_card(stocks["sd"])
    assert f'StableDiffusionPipeline.from_pretrained("{stocks["sd"]}")' in generator.text
    code = next(code.split("```")[0] for code in generator.text.split("```python")[1:] if "DDAEModel" in code)
    assert "condition" not in code and "class_labels" not in code
    exec(compile(code, "card", "exec"), {})
    assert 'condition = embed_prompts("PIPELINE")' in make_card(f"{stocks['sd']}/unet").text


def test_features_are_kept_apart_by_what_the_denoiser_is_told(stocks, plain, images, tmp_path):
    given = {"features_dir": str(tmp_path / "kept"), "output_dir": str(tmp_path), "split": "test", "layers": ["all"]}
    found = {text: export_features(stocks["xl"], images, prompt=text, **given) for text in (None, "a cat", "a dog")}
    assert len(list((tmp_path / "kept").iterdir())) == 3
    again = export_features(stocks["xl"], images, prompt="a cat", **given)
    assert len(list((tmp_path / "kept").iterdir())) == 3
    for layer, values in again.features.items():
        assert np.array_equal(values, found["a cat"].features[layer])
    last = list(again.features)[-1]
    assert not np.allclose(found["a dog"].features[last], found["a cat"].features[last])
    model = DDAEModel.from_pretrained(stocks["xl"], condition=embed_prompts(stocks["xl"], "a cat"))
    named = DDAEModel.from_pretrained(stocks["xl"], prompt="a cat")
    keys = [FeatureCache("", each).identity["condition"] for each in (model, named)]
    assert keys[0] == keys[1] and FeatureCache("", named).identity["prompt"] == "a cat"
    # Features that earlier versions kept of other networks are found by the same names.
    assert not {"prompt", "condition"} & FeatureCache("", DDAEModel.from_pretrained(plain)).identity.keys()
    assert "condition" in open_extractor(f"ddae:{stocks['sd']}").identity
    assert not {"prompt", "condition"} & open_extractor(f"ddae:{plain}").identity.keys()


def test_networks_with_random_weights_are_told_the_same(stocks, images, tmp_path):
    expected = embed_prompts(stocks["sd"], PROMPT)
    backbones = open_backbones(stocks["sd"], CorrespondenceOptions(prompt=PROMPT))
    assert all(same(told(backbone.ddae), expected) for backbone in backbones.values())
    model = backbones["denoiser"].ddae
    processor = DDAEImageProcessor.from_pretrained(stocks["sd"])
    options = SweepOptions(layers=["mid_block"], **ONE)
    inputs = [changed_inputs(images[split], processor, options) for split in ("train", "test")]
    prober = check_sweep(model, *inputs, processor, options)
    assert same(told(prober.random_model), expected)
    for path in (stocks["sd"], str(tmp_path)):
        built = build_classifier(path, FinetuningOptions(from_scratch=True, prompt=PROMPT), ["a", "b"])
        assert same(told(built.ddae), expected)
        pairs = zip(built.ddae.denoiser.parameters(), model.denoiser.parameters(), strict=True)
        assert not all(torch.equal(one, other) for one, other in pairs)
        state, own = built.ddae.vae.state_dict(), model.vae.state_dict()
        assert all(torch.equal(state[name], own[name]) for name in own)
        built.save_pretrained(tmp_path)  # what is stored is told again


@pytest.mark.parametrize("name", NAMES)
def test_fine_tuning_saves_what_it_was_told_and_resumes(stocks, images, tmp_path, name):
    given = {"layer": INNER[name], "layer_decay": 0.8, "train_batch_size": 12, "output_dir": str(tmp_path)}
    given |= {"prompt": PROMPT, "checkpointing_steps": 1}
    finetune(stocks[name], images, max_train_steps=1, **given)
    result = finetune(stocks[name], images, max_train_steps=2, resume_from_checkpoint="latest", **given)
    assert result.steps == 2 and result.options["prompt"] == PROMPT
    opened = DDAEForImageClassification.from_pretrained(tmp_path)
    assert same(told(opened.ddae), embed_prompts(stocks[name], PROMPT))
    before = DDAEModel.from_pretrained(stocks[name]).denoiser.state_dict()
    after = opened.ddae.denoiser.state_dict()
    assert not all(torch.equal(before[key], after[key]) for key in before)
    probed = sweep(str(tmp_path), images, layers=["own"], output_dir=str(tmp_path / "probe"), **ONE)
    assert (tmp_path / "probe" / "classifier" / "model.safetensors").exists()  # it no longer is its base's
    with pytest.raises(ValueError, match="other options: prompt was"):
        finetune(stocks[name], images, max_train_steps=3, resume_from_checkpoint="latest", **given | {"prompt": "a"})
    assert probed.classifier.config.prompt == PROMPT


def test_a_transfer_tells_its_fine_tuning_the_same_prompt(stocks, images, tmp_path):
    options = {"num_train_epochs": 1, "train_batch_size": 12}
    result = transfer(
        stocks["xl"], images, layers=["mid_block"], prompt=PROMPT, output_dir=str(tmp_path), finetune=options, **ONE
    )
    assert read_checkpoint(tmp_path / "classifier").head and result.classifier.ddae.vae is not None
    opened = [DDAEForImageClassification.from_pretrained(tmp_path / part) for part in ("classifier", "finetuned")]
    assert all(each.config.prompt == PROMPT and each.ddae.vae is not None for each in opened)
    assert same(told(opened[0].ddae), told(opened[1].ddae))
    latents = encode(stocks["sd"], images, output_dir=str(tmp_path / "encoded"))
    assert latents.shape == (4, 8, 8)


def test_noisy_images_and_points_are_read_with_a_prompt(stocks, images, tmp_path):
    given = {"output_dir": str(tmp_path), "num_views": 1, "wide_resnet": 0, "num_train_epochs": 1, "sigmas": [0.5]}
    given |= {"sigma_min": 0.1, "features_dir": str(tmp_path / "tests"), "layers": [INNER["sd"], "mid_block"]}
    classify_noisy(stocks["sd"], images, prompt="a cat", **given)
    with pytest.raises(ValueError, match="made with other options .*prompt"):
        classify_noisy(stocks["sd"], images, prompt="a dog", **given)
    found = [
        find_correspondences(stocks["pixart"], images, prompt=text, max_samples=1, layers=["transformer_blocks.2"])
        for text in (None, None, "a cat")
    ]
    errors = [result.errors["denoiser"] for result in found]
    assert torch.equal(errors[0], errors[1]) and not torch.equal(errors[0], errors[2])


READING = (sweep, export_features, find_correspondences, classify_noisy, finetune, transfer)


@pytest.mark.parametrize("experiment", READING)
def test_a_prompt_is_refused_where_no_text_is_told(plain, images, experiment):
    with pytest.raises(ValueError, match="prompt is 'a cat', but this denoiser is told no text"):
        experiment(plain, images, prompt="a cat")
    if experiment is not finetune:  # which writes an open model, and opens that
        with pytest.raises(ValueError, match="prompt is 'a cat', but this denoiser is told no text"):
            experiment(DDAEModel.from_pretrained(plain), images, prompt="a cat")


@pytest.mark.filterwarnings("ignore:.*without its scheduler")
def test_a_network_without_text_encoders_needs_a_condition(stocks, images):
    bare = f"{stocks['pixart']}/transformer"
    for experiment in (sweep, export_features, find_correspondences, classify_noisy, finetune):
        with pytest.raises(ValueError, match="told a text, and came without text encoders.*PixArtAlphaPipeline"):
            experiment(bare, images)


@pytest.mark.parametrize("name", NAMES)
def test_generating_is_left_to_the_stock_pipelines(stocks, images, tmp_path, name):
    model = DDAEModel.from_pretrained(stocks[name])
    for source in (stocks[name], model):
        with pytest.raises(ValueError, match=f"told a text: .*{NAMES[name]}"):
            generate(source, num_images=1)
    with pytest.raises(ValueError, match=f"told a text: .*{NAMES[name]}"):
        evaluate_generation(stocks[name], images, extractor=f"ddae:{stocks[name]}", num_images=4)


def test_training_on_texts_is_refused_by_name(stocks, images):
    allowed = "allowed are UNet2DModel, DiTTransformer2DModel"
    with pytest.raises(ValueError, match=f"denoiser is a UNet2DConditionModel, which is told a text.*{allowed}"):
        pretrain(images, denoiser={"_class_name": "UNet2DConditionModel"})
    with pytest.raises(ValueError, match=f"is a PixArtTransformer2DModel, which is told a text.*{allowed}"):
        pretrain(images, init_from=stocks["pixart"])


def test_a_head_on_a_folder_of_this_machine_is_not_pushed(stocks, tmp_path):
    with pytest.raises(ValueError, match="which only this machine has: give the Hub id"):
        prepare(HubOptions(push_to_hub=True), tmp_path, stocks["sd"])
