"""Maps of words: against probabilities that diffusers' own plain attention computes, and the tokens of words."""

import json

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor
from PIL import Image

from ddae_hf import DDAEModel, embed_prompts
from ddae_hf.checkpoints import read_checkpoint
from ddae_hf.experiments import word_maps
from ddae_hf.experiments.cross_attention import (
    layers_with_words,
    positions_of,
    read_shares,
    read_word_maps,
    tell_words,
)
from ddae_hf.texts import MASK

from . import stock
from .conftest import make_unet

PROMPT = "a photo of the red cat"
MAKERS = {"sd": stock.stable_diffusion, "xl": stock.stable_diffusion_xl, "pixart": stock.pixart}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A small checkpoint of each layout."""
    found = {name: tmp_path_factory.mktemp(name) for name in MAKERS}
    for name, folder in found.items():
        MAKERS[name](folder)
    return found


@pytest.fixture(scope="module", params=MAKERS)
def folder(request, folders):
    return folders[request.param]


@pytest.fixture
def images():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


class Keeping(AttnProcessor):
    """diffusers' plain attention, whose probabilities are kept."""

    def __init__(self, kept, name):
        super().__init__()
        self.kept, self.name = kept, name

    def __call__(self, attention, *args, **kwargs):
        scores = attention.get_attention_scores

        def keep(*given):
            self.kept[self.name] = scores(*given)
            return self.kept[self.name]

        attention.get_attention_scores = keep
        try:
            return super().__call__(attention, *args, **kwargs)
        finally:
            del attention.get_attention_scores


@torch.no_grad()
def by_diffusers(model, images, condition, sigma):
    """The probabilities (B, heads, N, L) of every cross-attention of a model, by name, in a pass of all of it."""
    kept = {}
    for name, module in model.denoiser.named_modules():
        if isinstance(module, Attention) and name.endswith(".attn2"):
            module.set_processor(Keeping(kept, name))
    diffusion = model.diffusion
    clean = model.encode(images)
    noisy, timestep = diffusion.family.noisy(clean, model.fixed_noise[:1].expand_as(clean), sigma)
    diffusion.predict(noisy, timestep, diffusion.conditions(condition, len(images), "cpu"))
    return {name.removesuffix(".attn2"): each.unflatten(0, (len(images), -1)) for name, each in kept.items()}


def test_shares_are_those_of_diffusers_plain_attention(folder, images):
    model = DDAEModel.from_pretrained(folder).eval()
    condition = embed_prompts(folder, PROMPT)
    everywhere = ["transformer_blocks"] if MASK in condition else ["down_blocks", "mid_block", "up_blocks"]
    taps = layers_with_words(model, everywhere)
    shares = read_shares(model, images, condition, taps, 0.5)
    expected = by_diffusers(model, images, condition, 0.5)
    assert {tap.name for tap in taps} == expected.keys()
    for tap, each in zip(taps, shares, strict=True):
        torch.testing.assert_close(each, expected[tap.name].mean(1), atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(each.sum(-1), torch.ones(each.shape[:2]))
        assert each.std() > 1e-4  # far enough from uniform to tell a wrong scale
    if MASK in condition:
        assert (each[..., condition[MASK][0] == 0] == 0).all() and not condition[MASK].all()


def test_maps_are_means_of_a_words_tokens_on_the_image(folder, images):
    model = DDAEModel.from_pretrained(folder).eval()
    checkpoint = read_checkpoint(folder)
    told = tell_words(checkpoint, PROMPT, ["Cat", "the red"])
    places = positions_of(checkpoint, PROMPT, None, None)
    assert told.places["Cat"] == places["cat"] and told.places["the red"] == places["the"] + places["red"]
    taps = layers_with_words(model)
    assert len({tap.stride for tap in taps}) == 1
    shares = torch.stack(read_shares(model, images, told.condition, taps, 0.5)).mean(0)
    found = read_word_maps(model, images, told, sigma=0.5)
    assert list(found) == ["Cat", "the red"]
    for word, each in found.items():
        side = 8 // taps[0].stride
        expected = shares[..., told.places[word]].mean(-1).unflatten(1, (1, side, side))
        torch.testing.assert_close(each, F.interpolate(expected, (16, 16), mode="bilinear")[:, 0])


def test_an_image_and_a_path_are_enough(folder):
    image = Image.effect_noise((40, 30), 90).convert("RGB")
    found = word_maps(folder, image, PROMPT)
    assert list(found) == PROMPT.split()
    assert all(each.shape == (1, 16, 16) and 0 <= each.min() and each.max() <= 1 for each in found.values())
    model = DDAEModel.from_pretrained(folder)
    before = [module.training for module in model.modules()]
    again = word_maps(model, [image], PROMPT, "cat", texts=folder)
    assert torch.equal(again["cat"], found["cat"]) and list(again) == ["cat"]
    assert [module.training for module in model.modules()] == before
    with pytest.raises(ValueError, match="name its checkpoint as texts"):
        word_maps(model, image, PROMPT)


def test_positions_are_those_of_the_tokens_that_the_encoder_reads(folder):
    """Of the ids that the stock pipeline gives its encoder, those at a word's places spell the word."""
    checkpoint = read_checkpoint(folder)
    pipeline = MAKERS[folder.name.rstrip("0123456789")](folder / "again")
    read = []
    pipeline.text_encoder.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    prompt = " A cat, Doga CAT"
    pipeline.encode_prompt(prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    places = positions_of(checkpoint, prompt, None, read[0].shape[1])
    assert list(places) == ["a", "cat", "doga"]
    for word, numbers in places.items():
        said = pipeline.tokenizer.decode(read[0][0, numbers]).replace(" ", "")
        assert said == word * (2 if word == "cat" else 1)
    assert len(places["cat"]) == 2 and len(places["doga"]) > 1


def test_draws_of_noise_are_averaged(folders, images):
    one = DDAEModel.from_pretrained(folders["pixart"]).eval()
    two = DDAEModel.from_pretrained(folders["pixart"], num_noise_samples=2).eval()
    told = tell_words(read_checkpoint(folders["pixart"]), PROMPT, "cat")
    expected = read_word_maps(one, images, told, sigma=2.0)["cat"] / 2
    one.fixed_noise = two.fixed_noise[1:]
    expected += read_word_maps(one, images, told, sigma=2.0)["cat"] / 2
    torch.testing.assert_close(read_word_maps(two, images, told, sigma=2.0)["cat"], expected)


def test_layers_are_blocks_or_what_has_some_inside(folders):
    model = DDAEModel.from_pretrained(folders["xl"])
    names = [tap.name for tap in layers_with_words(model, ["up_blocks.0", "mid_block"])]
    assert names == [name for name in names if name.startswith(("mid_block", "up_blocks.0"))] and len(names) > 2
    assert names[0].startswith("mid_block")
    assert [tap.name for tap in layers_with_words(model, names[1:2])] == names[1:2]
    for layers, message in (
        (["up_blocks.1"], "no cross-attention in the layer 'up_blocks.1': allowed are down_blocks.1.attentions.0"),
        (["up_blocks.0.attentions.0.transformer_block"], "no cross-attention in the layer"),
        ("mid_block", "must be a list"),
        ([], "must be a list"),
    ):
        with pytest.raises(ValueError, match=message):
            layers_with_words(model, layers)


@pytest.mark.parametrize(("side", "stride"), [(8, 1), (16, 1), (32, 2), (64, 2)])
def test_the_default_layers_are_the_coarsest_of_sixteen_places_a_side(tmp_path, side, stride):
    stock.stable_diffusion(tmp_path, sample_size=side)
    taps = layers_with_words(DDAEModel.from_pretrained(tmp_path))
    assert {tap.stride for tap in taps} == {stride}


def test_what_has_no_words_is_refused(folders, tmp_path):
    checkpoint = read_checkpoint(folders["sd"])
    for prompt, words, message in (
        (PROMPT, ["dog"], "'dog' is not in the prompt 'a photo of the red cat': its words are a, photo, of, the, red"),
        (PROMPT, ["ca"], "'ca' is not in"),
        (PROMPT, [" "], "is not in"),
        (PROMPT, [], "no words"),
        ("", None, "no words"),
        (None, None, "must be a text"),
        ("a a a a a a a a a cat", ["cat"], "comes after the 9 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            positions_of(checkpoint, prompt, words, stock.LENGTH)
    with pytest.raises(ValueError, match="is not in the prompt"):
        word_maps(folders["sd"], Image.new("RGB", (8, 8)), PROMPT, "dog")
    DDAEModel.from_pretrained(folders["sd"]).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="no tokenizers"):
        word_maps(tmp_path / "model", Image.new("RGB", (8, 8)), PROMPT)
    make_unet().save_pretrained(tmp_path / "unet")
    with pytest.raises(ValueError, match="no maps of words"):
        layers_with_words(DDAEModel.from_pretrained(tmp_path / "unet"))


def test_tokenizers_that_disagree_are_refused(tmp_path):
    stock.stable_diffusion_xl(tmp_path)
    file = tmp_path / "tokenizer_2" / "tokenizer.json"
    known = json.loads(file.read_text())
    known["model"]["merges"] = [each for each in known["model"]["merges"] if "".join(each) != "cat</w>"]
    file.write_text(json.dumps(known))
    with pytest.raises(ValueError, match="tokenizers that divide"):
        positions_of(read_checkpoint(tmp_path), PROMPT, None, None)
    file.write_text("{}")
    with pytest.raises(ValueError, match="its tokenizer_2 cannot be opened as a CLIPTokenizer"):
        positions_of(read_checkpoint(tmp_path), PROMPT, None, None)


def test_no_hook_survives_even_an_error(folders, images, monkeypatch):
    model = DDAEModel.from_pretrained(folders["sd"]).eval()
    condition = embed_prompts(folders["sd"], PROMPT)
    taps = layers_with_words(model)
    read_shares(model, images, condition, taps)
    last = model.denoiser.get_submodule(f"{taps[-1].name}.attn2.to_k")

    def fail(hidden):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(last, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        read_shares(model, images, condition, taps)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_half_precision_gives_nearly_the_same(folders, images):
    told = tell_words(read_checkpoint(folders["sd"]), PROMPT, "cat")
    exact = read_word_maps(DDAEModel.from_pretrained(folders["sd"]).eval(), images, told)["cat"]
    model = DDAEModel.from_pretrained(folders["sd"], dtype=torch.bfloat16).eval()
    found = read_word_maps(model, images, told)["cat"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0.005)
