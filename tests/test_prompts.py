"""Checkpoints in the layouts of Stable Diffusion's and PixArt's pipelines: texts as conditions, and what is opened."""

import copy
import gc
import json
import shutil
import sys
import weakref

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    Transformer2DModel,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from ddae_hf import (
    DDAEBackbone,
    DDAEConfig,
    DDAEForImageClassification,
    DDAEImageProcessor,
    DDAEModel,
    DDAEPipeline,
    embed_prompts,
    layer_names,
    prompts,
)

from .conftest import make_unet
from .stock import pixart, stable_diffusion, stable_diffusion_xl

LAYOUTS = ["sd", "xl", "alpha", "sigma"]
NAMES = {
    "sd": ["encoder_hidden_states"],
    "xl": ["encoder_hidden_states", "text_embeds"],
    "alpha": ["encoder_hidden_states", "encoder_attention_mask"],
    "sigma": ["encoder_hidden_states", "encoder_attention_mask"],
}
DENOISER = {"sd": "unet", "xl": "unet", "alpha": "transformer", "sigma": "transformer"}
FP16 = {"sd": "model.fp16.safetensors", "sigma": "model.fp16.safetensors"}


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """A folder with each layout, and the stock pipelines that wrote them."""
    root = tmp_path_factory.mktemp("stock")
    pipelines = {
        "sd": stable_diffusion(root / "sd", prediction_type="v_prediction"),
        "xl": stable_diffusion_xl(root / "xl"),
        "alpha": pixart(root / "alpha", use_additional_conditions=True),
        "sigma": pixart(root / "sigma", "PixArtSigmaPipeline"),
    }
    return root, pipelines


@pytest.fixture
def pixels():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def edit(file, **changes):
    """Change entries of a JSON file; None leaves one out."""
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def edited_copy(stock, layout, folder, file="model_index.json", **changes):
    shutil.copytree(stock[0] / layout, folder)
    edit(folder / file, **changes)
    return folder


def stock_embeddings(pipeline, texts, guided=False):
    """What a stock pipeline tells its denoiser of texts and, if guided, of none."""
    found = pipeline.encode_prompt(texts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=guided)
    # XL returns pairs of the text's and of none, the others each of them together.
    if isinstance(pipeline, StableDiffusionXLPipeline):
        return (found[0], found[2]), (found[1], found[3])
    half = len(found) // 2
    return found[:half], found[half:]


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_texts_are_embedded_as_the_stock_pipeline_does(stock, layout):
    root, pipelines = stock
    for given in ("a cat", ["a cat", "the red dog of a photo, a photo of a cat, a dog"]):
        texts = [given] if isinstance(given, str) else given
        expected, _ = stock_embeddings(pipelines[layout], texts)
        found = embed_prompts(root / layout, given)
        assert list(found)[:2] == [*NAMES[layout], *list(found)[len(NAMES[layout]) : 2]]
        for name, tensor in zip(NAMES[layout], expected, strict=True):
            assert torch.equal(found[name], tensor) and not found[name].is_inference(), name
    _, expected = stock_embeddings(pipelines[layout], ["a cat"], guided=True)
    found = embed_prompts(root / layout)
    for name, tensor in zip(NAMES[layout], expected, strict=True):
        assert torch.equal(found[name], tensor), name
    assert (found["encoder_hidden_states"] == 0).all() == (layout == "xl")


@torch.no_grad()
def test_xl_without_forced_zeros_is_told_an_empty_text(stock, tmp_path):
    folder = edited_copy(stock, "xl", tmp_path / "xl", force_zeros_for_empty_prompt=False)
    _, expected = stock_embeddings(StableDiffusionXLPipeline.from_pretrained(folder), ["a cat"], guided=True)
    found = embed_prompts(folder)
    assert all(torch.equal(found[name], tensor) for name, tensor in zip(NAMES["xl"], expected, strict=True))
    assert (found["text_embeds"] != 0).any()
    edit(folder / "model_index.json", force_zeros_for_empty_prompt="no")
    with pytest.raises(ValueError, match="force_zeros_for_empty_prompt is 'no': it must be true or false"):
        embed_prompts(folder)


def told_by_pipeline(pipeline, text, **options):
    """The last keyword arguments with which a stock pipeline calls its denoiser."""
    told = {}
    denoiser = pipeline.components.get("unet") or pipeline.components["transformer"]

    def note(module, args, kwargs):
        told.update(kwargs)

    handle = denoiser.register_forward_pre_hook(note, with_kwargs=True)
    pipeline.set_progress_bar_config(disable=True)
    pipeline(text, num_inference_steps=2, guidance_scale=0.0, output_type="latent", **options)
    handle.remove()
    return told


@torch.no_grad()
def test_sizes_are_those_that_the_stock_pipelines_tell(stock, tmp_path):
    """PixArt's tells them to networks of 128 latents alone."""
    root, pipelines = stock
    xl = pipelines["xl"]
    expected = xl._get_add_time_ids((16, 16), (0, 0), (16, 16), torch.float32, xl.text_encoder_2.config.projection_dim)
    found = embed_prompts(root / "xl", "a cat")
    assert torch.equal(found["time_ids"], expected)
    told = told_by_pipeline(xl, "a cat")["added_cond_kwargs"]
    assert all(torch.equal(found[name], told[name]) for name in ("time_ids", "text_embeds"))
    large = pixart(tmp_path, sample_size=128, num_layers=1)
    found = embed_prompts(tmp_path, "a cat")
    told = told_by_pipeline(large, "a cat", use_resolution_binning=False)
    assert found["resolution"].tolist() == [[256, 256]]
    assert all(torch.equal(found[name], told["added_cond_kwargs"][name]) for name in ("resolution", "aspect_ratio"))
    assert torch.equal(found["encoder_attention_mask"], told["encoder_attention_mask"])
    assert "resolution" not in embed_prompts(root / "sigma", "a cat")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_text_encoders_are_let_go_before_the_denoiser_is_loaded(stock, layout, monkeypatch):
    """At once, and not when Python next looks for circles of references."""
    opened = []
    once = prompts._open_encoders

    def note(*args):
        pipeline = once(*args)
        parts = [part for part in pipeline.components.values() if part is not None]
        opened.extend(map(weakref.ref, [pipeline, *parts]))
        return pipeline

    def loads(checkpoint, *args):
        assert opened and not any(reference() is not None for reference in opened)
        raise KeyboardInterrupt

    monkeypatch.setattr(prompts, "_open_encoders", note)
    monkeypatch.setattr("ddae_hf.checkpoints.Checkpoint.load", loads)
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(KeyboardInterrupt):
            DDAEModel.from_pretrained(stock[0] / layout, prompt="a cat")
    finally:
        gc.enable()


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_everything_opens_such_a_checkpoint(stock, layout, pixels, tmp_path):
    root, pipelines = stock
    config = DDAEConfig.from_pretrained(root / layout)
    denoiser = pipelines[layout].components[DENOISER[layout]]
    assert config.scheduler["_class_name"] == type(pipelines[layout].scheduler).__name__
    assert dict(DDAEImageProcessor.from_pretrained(root / layout).size) == {"height": 16, "width": 16}
    model = DDAEModel.from_pretrained(root / layout)
    for name, tensor in denoiser.state_dict().items():
        assert torch.equal(model.denoiser.state_dict()[name], tensor), name
    null = embed_prompts(root / layout)
    assert {name: tuple(shape) for name, shape in model.config.condition_shapes.items()} == {
        name: tuple(tensor.shape[1:]) for name, tensor in null.items()
    }
    plain = model(pixels).pooler_output
    assert torch.equal(model(pixels, condition=null).pooler_output, plain)
    cat = DDAEModel.from_pretrained(root / layout, prompt="a cat")
    of_cat = cat(pixels).pooler_output
    assert cat.config.prompt == "a cat" and not torch.allclose(of_cat, plain)
    given = embed_prompts(root / layout, "a cat")
    for other in (model(pixels, condition=given), DDAEModel.from_pretrained(root / layout, condition=given)(pixels)):
        assert torch.equal(other.pooler_output, of_cat)
    two = model(pixels, condition=embed_prompts(root / layout, ["a cat", "the red dog"])).pooler_output
    torch.testing.assert_close(two[:1], of_cat[:1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(two[1], of_cat[1])
    cat.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert torch.equal(DDAEModel.from_pretrained(tmp_path)(pixels).pooler_output, of_cat)
    classifier = DDAEForImageClassification.from_pretrained(root / layout, num_labels=3, prompt="a cat")
    assert torch.equal(classifier.ddae(pixels).pooler_output, of_cat)
    backbone = DDAEBackbone.from_pretrained(root / layout, out_features=layer_names(model.denoiser)[-1:])
    assert backbone(pixels).feature_maps[0].shape[0] == 2
    latents = DDAEModel.from_pretrained(root / layout, vae=None)
    assert torch.equal(latents(model.encode(pixels)).pooler_output, plain)


@torch.no_grad()
def test_a_state_dict_brings_what_is_told(stock, pixels):
    folder = stock[0] / "sd"
    cat = DDAEModel.from_pretrained(folder, prompt="a cat")
    again = DDAEModel.from_pretrained(folder, state_dict=cat.state_dict(), prompt="a cat")
    assert torch.equal(again(pixels).pooler_output, cat(pixels).pooler_output)
    with pytest.raises(ValueError, match="Both state_dict and condition came"):
        DDAEModel.from_pretrained(folder, state_dict=cat.state_dict(), condition=embed_prompts(folder))


@pytest.mark.parametrize("layout", ["sd", "sigma"])
@pytest.mark.parametrize("encoders", ["with the variant", "without"])
def test_variants_and_types(stock, layout, encoders, tmp_path, pixels):
    """Encoders that lack the variant are opened with their plain weights, as in the stock pipelines."""
    pipeline = stock[1][layout]
    half = type(pipeline).from_pretrained(stock[0] / layout, torch_dtype=torch.float16)
    half.save_pretrained(tmp_path / "half", variant="fp16")
    encoder = tmp_path / "half" / "text_encoder"
    if encoders == "without":
        (encoder / FP16[layout]).unlink()
        pipeline.text_encoder.save_pretrained(encoder)
    for kind in (half, pipeline):
        model = DDAEModel.from_pretrained(tmp_path / "half", variant="fp16", dtype=kind.vae.dtype)
        assert model.dtype == kind.vae.dtype
        if encoders == "with the variant" or kind is half:
            assert model.condition()["encoder_hidden_states"].dtype == kind.vae.dtype
    model = DDAEModel.from_pretrained(tmp_path / "half", variant="fp16")
    assert model.dtype == torch.float16 and model.vae.dtype == torch.float32
    with torch.no_grad():
        expected = half.encode_prompt("", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)[0]
    assert torch.equal(model.condition()["encoder_hidden_states"], expected)
    with pytest.raises(ValueError, match=r"has no .*\.ema\.safetensors in .*available variants: fp16"):
        DDAEModel.from_pretrained(tmp_path / "half", variant="ema")


@torch.no_grad()
def test_text_encoders_may_be_in_pieces(stock, tmp_path):
    shutil.copytree(stock[0] / "sigma", tmp_path / "sigma")
    encoder = tmp_path / "sigma" / "text_encoder"
    (encoder / "model.safetensors").unlink()
    stock[1]["sigma"].text_encoder.save_pretrained(encoder, max_shard_size="5KB")
    shards = sorted(encoder.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert all(
        torch.equal(tensor, expected)
        for tensor, expected in zip(
            embed_prompts(tmp_path / "sigma", "a cat").values(),
            embed_prompts(stock[0] / "sigma", "a cat").values(),
            strict=True,
        )
    )
    shards[0].unlink()
    with pytest.raises(ValueError, match=f"lacks {shards[0].name}, which model.safetensors.index.json names"):
        embed_prompts(tmp_path / "sigma")


@pytest.mark.parametrize("layout", ["sd", "alpha"])
def test_networks_alone_must_be_told_each_time(stock, layout, tmp_path, pixels):
    stock[1][layout].components[DENOISER[layout]].save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="holds a network without its scheduler"):
        model = DDAEModel.from_pretrained(tmp_path)
    latents = torch.randn(2, 4, 8, 8)
    with pytest.raises(ValueError, match="is told a text, and its checkpoint came without text encoders"):
        model(latents)
    condition = embed_prompts(stock[0] / layout, "a cat")
    assert model(latents, condition=condition).pooler_output.isfinite().all()
    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match="has no text encoders and tokenizers"),
    ):
        DDAEModel.from_pretrained(tmp_path, prompt="a cat")
    with pytest.warns(UserWarning):
        again = DDAEModel.from_pretrained(tmp_path, condition=condition)
    assert again(latents).pooler_output.shape == model(latents, condition=condition).pooler_output.shape


@torch.no_grad()
def test_pixarts_of_2023_open_as_todays(stock, tmp_path, pixels):
    """diffusers kept them in a more general class, as PixArt-alpha was published."""
    folder = tmp_path / "old"
    shutil.copytree(stock[0] / "alpha", folder)
    transformer = stock[1]["alpha"].transformer
    known = {name: value for name, value in transformer.config.items() if name[0] != "_"}
    known.pop("interpolation_scale"), known.pop("use_additional_conditions")
    torch.manual_seed(0)
    old = Transformer2DModel(**known | {"norm_type": "ada_norm_single"}, use_additional_conditions=True)
    shutil.rmtree(folder / "transformer")
    old.save_pretrained(folder / "transformer")
    edit(folder / "model_index.json", transformer=["diffusers", "Transformer2DModel"])
    model = DDAEModel.from_pretrained(folder)
    assert type(model.denoiser) is PixArtTransformer2DModel
    noisy = torch.randn(2, 4, 8, 8)
    null = model.condition()
    told = {name: tensor.expand(2, *tensor.shape[1:]) for name, tensor in null.items()}
    sizes = {name: told.pop(name) for name in ("resolution", "aspect_ratio")}
    timestep = torch.tensor([5, 500])
    expected = old(noisy, timestep=timestep, added_cond_kwargs=sizes, **told).sample
    found = model.denoiser(noisy, timestep=timestep, added_cond_kwargs=sizes, **told).sample
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


class Reads:
    """Notes which of a folder's files this process opens."""

    def __init__(self):
        self.folder, self.names = None, set()
        sys.addaudithook(self)

    def __call__(self, event, args):
        if event == "open" and self.folder and isinstance(args[0], str) and args[0].startswith(str(self.folder)):
            self.names.add(args[0].removeprefix(str(self.folder)).lstrip("/"))


READS = Reads()
EXTRAS = {
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
}


@pytest.fixture(scope="module")
def with_extras(stock, tmp_path_factory):
    """A pipeline with a safety checker and all else that one may have besides; their files are empty."""
    folder = edited_copy(stock, "sd", tmp_path_factory.mktemp("extras") / "sd", **EXTRAS)
    for name in EXTRAS:
        (folder / name).mkdir()
        for file in ("config.json", "model.safetensors", "preprocessor_config.json"):
            (folder / name / file).write_bytes(b"")
    return folder


def test_only_the_parts_that_are_needed_are_read(with_extras, tmp_path):
    model = DDAEForImageClassification.from_pretrained(with_extras, num_labels=2)
    model.save_head(tmp_path / "head", base=with_extras)
    READS.folder, READS.names = with_extras, set()
    found = {}
    try:
        for kind in (DDAEConfig, DDAEImageProcessor, DDAEModel, embed_prompts):
            READS.names = set()
            getattr(kind, "from_pretrained", kind)(with_extras)
            found[kind] = {name.split("/")[0] for name in READS.names}
        READS.names = set()
        DDAEForImageClassification.from_pretrained(tmp_path / "head")
        found["head"] = {name.split("/")[0] for name in READS.names}
    finally:
        READS.folder = None
    described = {"", "model_index.json", "unet", "scheduler", "vae"}
    assert found[DDAEConfig] - {""} == found[DDAEImageProcessor] - {""} == found["head"] - {""} == described - {""}
    assert found[DDAEModel] - {""} == (described | {"tokenizer", "text_encoder"}) - {""}
    assert found[embed_prompts] - {""} == found[DDAEModel] - {""}


def test_a_head_needs_no_text_encoder_and_goes_by_its_denoiser_alone(stock, tmp_path, pixels):
    base = tmp_path / "base"
    shutil.copytree(stock[0] / "xl", base)
    options = {"num_labels": 3, "prompt": "a cat", "sigma": 0.3}
    model = DDAEForImageClassification.from_pretrained(base, **options).eval()
    expected = model(pixels).logits
    model.save_head(tmp_path / "away", base=base)
    model.save_head(base)
    stored = load_file(tmp_path / "away" / "head.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) < 1000
    for name in ("text_encoder", "text_encoder_2"):
        encoder = base / name / "model.safetensors"
        save_file({key: torch.zeros_like(tensor) for key, tensor in load_file(encoder).items()}, encoder)
    for folder in (tmp_path / "away", base):
        opened = DDAEForImageClassification.from_pretrained(folder).eval()
        assert torch.equal(opened(pixels).logits, expected) and opened.config.prompt == "a cat"
        features = DDAEModel.from_pretrained(folder)(pixels).pooler_output
        assert torch.equal(features, opened.ddae(pixels).pooler_output)
    for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        shutil.rmtree(base / name)
    assert torch.equal(DDAEForImageClassification.from_pretrained(tmp_path / "away").eval()(pixels).logits, expected)
    weights = base / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file(tensors | {"conv_in.bias": tensors["conv_in.bias"] + 1}, weights)
    for folder in (tmp_path / "away", base):
        with pytest.raises(ValueError, match="are not those that the classifier in .* was trained on"):
            DDAEForImageClassification.from_pretrained(folder)


def test_what_is_told_is_part_of_a_saved_model(stock, tmp_path):
    folder = stock[0] / "sd"
    DDAEModel.from_pretrained(folder, prompt="a cat").save_pretrained(tmp_path / "whole")
    model = DDAEForImageClassification.from_pretrained(folder, num_labels=2)
    model.save_head(tmp_path / "head", base=folder)
    condition = embed_prompts(folder, "a dog")
    refused = [
        (
            tmp_path / "whole",
            {"prompt": "a dog"},
            r"\(the prompt 'a cat'\): leave prompt and condition",
        ),
        (tmp_path / "whole", {"prompt": None}, r"\(the prompt 'a cat'\)"),
        (tmp_path / "whole", {"condition": condition}, r"\(the prompt 'a cat'\)"),
        (
            tmp_path / "whole",
            {"config": DDAEConfig.from_pretrained(folder)},
            r"\(the prompt 'a cat'\)",
        ),
        (tmp_path / "head", {"prompt": "a dog"}, r"was saved with what its denoiser is told \(no prompt\)"),
        (folder, {"prompt": "a dog", "condition": condition}, "Both prompt and condition came"),
        (folder, {"prompt": ["a dog", "a cat"]}, r"prompt is \['a dog', 'a cat'\]: it must be text"),
        (folder, {"condition": {"encoder_hidden_states": torch.zeros(1, 9, 3)}}, "encoder_hidden_states has the shape"),
        (folder, {"condition": embed_prompts(folder, ["a dog", "a cat"])}, "is for 2 images, but 1 came"),
    ]
    for place, options, says in refused:
        with pytest.raises(ValueError, match=says):
            DDAEModel.from_pretrained(place, **options)
    assert DDAEModel.from_pretrained(tmp_path / "whole", prompt="a cat").config.prompt == "a cat"
    with pytest.raises(ValueError, match="has no text encoders and tokenizers: give the whole pipeline that it is of"):
        embed_prompts(tmp_path / "whole")
    found = embed_prompts(tmp_path / "head", "a dog")  # by its base
    assert torch.equal(found["encoder_hidden_states"], condition["encoder_hidden_states"])


def test_stock_pipelines_alone_sample(stock, tmp_path):
    root, pipelines = stock
    for layout in LAYOUTS:
        kind = type(pipelines[layout]).__name__
        with pytest.raises(
            ValueError, match=rf"told a text: `diffusers\.{kind}\.from_pretrained\('{root / layout}'\)`"
        ):
            DDAEPipeline.from_pretrained(root / layout)
    model = DDAEForImageClassification.from_pretrained(root / "sd", num_labels=2)
    model.save_head(tmp_path / "head", base=root / "sd")
    with pytest.raises(ValueError, match=rf"StableDiffusionPipeline\.from_pretrained\('{root / 'sd'}'\)` does"):
        DDAEPipeline.from_pretrained(tmp_path / "head")
    model.save_pretrained(tmp_path / "whole")
    pipelines["sd"].unet.save_pretrained(tmp_path / "bare")
    either = "sample with diffusers' StableDiffusionPipeline or StableDiffusionXLPipeline"
    for folder in ("whole", "bare"):
        with pytest.raises(ValueError, match=either):
            DDAEPipeline.from_pretrained(tmp_path / folder)
    with pytest.raises(ValueError, match=either):
        DDAEPipeline(unet=pipelines["sd"].unet, scheduler=pipelines["sd"].scheduler, vae=pipelines["sd"].vae)
    with pytest.raises(ValueError, match="diffusers' PixArtAlphaPipeline or PixArtSigmaPipeline"):
        DDAEPipeline.for_denoiser(pipelines["alpha"].transformer, pipelines["alpha"].scheduler)
    assert StableDiffusionPipeline.from_pretrained(root / "sd").unet.config.sample_size == 8


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("StableDiffusionInpaintPipeline", {}),
        ("StableDiffusionUpscalePipeline", {"low_res_scheduler": ["diffusers", "DDPMScheduler"]}),
        ("LatentConsistencyModelPipeline", {}),
        ("StableDiffusionImageVariationPipeline", {"text_encoder": None, "tokenizer": None}),
        ("StableDiffusionInstructPix2PixPipeline", {}),
        ("DDPMPipeline", {"text_encoder": None, "tokenizer": None}),
    ],
)
def test_other_pipelines_of_such_networks_are_refused_by_name(stock, tmp_path, kind, parts):
    folder = edited_copy(stock, "sd", tmp_path / "other", _class_name=kind, **parts)
    allowed = "allowed with a UNet2DConditionModel are StableDiffusionPipeline, StableDiffusionXLPipeline"
    for opener in (DDAEModel, DDAEConfig, DDAEPipeline, DDAEImageProcessor):
        with pytest.raises(ValueError, match=f"The pipeline {kind} in {folder} is not supported: {allowed}"):
            opener.from_pretrained(folder)


def test_text_encoders_have_no_place_beside_other_networks(stock, tmp_path):
    folder = edited_copy(stock, "sd", tmp_path / "other", unet=["diffusers", "UNet2DModel"])
    shutil.rmtree(folder / "unet")
    make_unet(in_channels=4, out_channels=4).save_pretrained(folder / "unet")
    with pytest.raises(ValueError, match="it has text_encoder, tokenizer, but a UNet2DModel is told no text"):
        DDAEModel.from_pretrained(folder)
    DDAEPipeline(make_unet(), DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    with pytest.raises(ValueError, match="prompt is 'x', but this denoiser is told no text"):
        DDAEModel.from_pretrained(tmp_path / "ddpm", prompt="x")
    with pytest.raises(ValueError, match="has a UNet2DModel, which is told no text: leave prompts out"):
        embed_prompts(tmp_path / "ddpm", "x")


@pytest.mark.parametrize(
    ("layout", "remove", "says"),
    [
        (
            "sd",
            ["tokenizer/tokenizer.json", "tokenizer/vocab.json"],
            "needs tokenizer.json or vocab.json and",
        ),
        (
            "sd",
            ["tokenizer/tokenizer.json", "tokenizer/merges.txt"],
            "needs tokenizer.json or vocab.json and",
        ),
        (
            "sd",
            ["tokenizer/tokenizer_config.json"],
            "texts of .* tokens .*but its text_encoder takes 2 to 9",
        ),
        ("xl", ["tokenizer_2/tokenizer.json"], "its tokenizer_2 needs tokenizer.json or vocab.json and merges.txt"),
        ("xl", ["text_encoder_2/config.json"], "its text_encoder_2 has no config.json"),
        ("xl", ["text_encoder/model.safetensors"], r"has no model.safetensors in text_encoder.*never pickles"),
        ("sigma", ["tokenizer/tokenizer.json"], "its tokenizer needs tokenizer.json or spiece.model"),
    ],
)
def test_parts_that_are_incomplete_are_refused(stock, tmp_path, layout, remove, says):
    folder = tmp_path / layout
    shutil.copytree(stock[0] / layout, folder)
    for file in remove:
        (folder / file).unlink(missing_ok=True)
    if remove[0].startswith("tokenizer_2"):
        for file in ("vocab.json", "merges.txt"):
            (folder / "tokenizer_2" / file).unlink(missing_ok=True)
    for opener in (DDAEModel.from_pretrained, embed_prompts):
        with pytest.raises(ValueError, match=says):
            opener(folder)
    assert DDAEConfig.from_pretrained(folder).image_size == (16, 16)


def test_words_of_clip_may_be_in_two_files_as_they_were_published(stock, tmp_path):
    shutil.copytree(stock[0] / "sd", tmp_path / "sd")
    (tmp_path / "sd" / "tokenizer" / "tokenizer.json").unlink()
    found, expected = (embed_prompts(root / "sd", "the red dog") for root in (tmp_path, stock[0]))
    assert torch.equal(found["encoder_hidden_states"], expected["encoder_hidden_states"])


def test_a_tokenizer_of_sentencepiece_says_what_it_needs(stock, tmp_path, monkeypatch):
    shutil.copytree(stock[0] / "alpha", tmp_path / "alpha")
    (tmp_path / "alpha" / "tokenizer" / "tokenizer.json").rename(tmp_path / "alpha" / "tokenizer" / "spiece.model")
    monkeypatch.setattr(prompts, "is_sentencepiece_available", lambda: False)
    for opener in (DDAEModel.from_pretrained, embed_prompts):
        with pytest.raises(ValueError, match="as a spiece.model alone.*`pip install sentencepiece protobuf`"):
            opener(tmp_path / "alpha")


@pytest.mark.parametrize(
    ("layout", "part", "entry", "says"),
    [
        (
            "sd",
            "text_encoder",
            ["evil", "CLIPTextModel"],
            "text_encoder from 'evil': allowed is transformers",
        ),
        ("sd", "tokenizer", ["diffusers", "CLIPTokenizer"], "tokenizer from 'diffusers': allowed is transformers"),
        (
            "sd",
            "text_encoder",
            ["transformers", "GPT2Model"],
            "a text_encoder of class 'GPT2Model': allowed are",
        ),
        ("sd", "tokenizer", ["transformers", "AutoTokenizer"], "has a tokenizer of class 'AutoTokenizer': allowed are"),
        ("xl", "tokenizer_2", ["transformers", "PreTrainedModel"], "has a tokenizer_2 of class 'PreTrainedModel'"),
        ("sd", "text_encoder", ["transformers", "T5EncoderModel"], "its text_encoder|The condition"),
        ("xl", "text_encoder_2", ["transformers", "CLIPTextModel"], "text_encoder_2|cannot embed|The condition"),
    ],
)
def test_other_libraries_and_classes_of_text_encoders_are_refused(stock, tmp_path, layout, part, entry, says):
    folder = edited_copy(stock, layout, tmp_path / layout, **{part: entry})
    with pytest.raises(ValueError, match=says):
        DDAEModel.from_pretrained(folder)


def test_text_encoders_that_lack_weights_or_that_are_anothers_are_refused(stock, tmp_path):
    folder = tmp_path / "sd"
    shutil.copytree(stock[0] / "sd", folder)
    weights = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    some = next(name for name in tensors if name.endswith("fc1.weight"))
    save_file({name: tensor for name, tensor in tensors.items() if name != some}, weights, {"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 of the .* tensors of its text_encoder: .*fc1.weight"):
        embed_prompts(folder)
    save_file(tensors | {some: tensors[some][:1].clone()}, weights, {"format": "pt"})
    with pytest.raises(ValueError, match="text_encoder cannot be opened as a CLIPTextModel"):
        embed_prompts(folder)
    config = CLIPTextModel.from_pretrained(stock[0] / "sd", subfolder="text_encoder").config
    other = copy.deepcopy(config)
    other.hidden_size = other.intermediate_size = 32
    CLIPTextModel(other).save_pretrained(folder / "text_encoder")
    with pytest.raises(ValueError, match=r"encoder_hidden_states has the shape \(B, 9, 32\): allowed is"):
        embed_prompts(folder)


@pytest.mark.parametrize(("given", "says"), [([], r"are \[\]"), (3, "are 3"), ([1], r"are \[1\]"), ({"a": 1}, "are {")])
def test_prompts_are_texts(stock, given, says):
    with pytest.raises(ValueError, match=f"prompts {says}.*: they must be a text, or a list of texts"):
        embed_prompts(stock[0] / "sd", given)
