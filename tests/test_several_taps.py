"""Several taps in one classifier: against diffusers' own network at each level, counted, trained, saved and refused."""

import copy
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageClassification, pipeline

from ddae_hf import (
    DDAEBackbone,
    DDAEConfig,
    DDAEForImageClassification,
    DDAEImageProcessor,
    DDAEModel,
    DDAEPipeline,
    add_noise,
    collect_hidden_states,
)
from ddae_hf.checkpoints import plain_config
from ddae_hf.experiments.probing import make_classifier
from ddae_hf.experiments.trainer import parameter_groups

from .conftest import make_dit, make_unet, make_vae

DEEPEST = "up_blocks.0.attentions.0"
TAPS = [["mid_block", 0.1], [DEEPEST, 0.4], ["down_blocks.1.attentions.0", 0.4], ["mid_block", 0.4]]
WIDTH = 4 * 64
HEADS = ("linear", "attention", "fusion")


def make_model(cls=DDAEForImageClassification, network=None, **options):
    torch.manual_seed(0)
    denoiser = plain_config(make_unet() if network is None else network)
    return cls(DDAEConfig(**{"denoiser": denoiser, "taps": TAPS, "num_labels": 4, **options})).eval()


@pytest.fixture
def generator(tmp_path):
    DDAEPipeline(make_unet(), DDIMScheduler()).save_pretrained(tmp_path / "generator")
    return tmp_path / "generator"


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_logits_are_those_of_stock_networks_read_at_each_level(images, pooling):
    """In float64, where the way in which a sum is computed plays no part."""
    model = make_model(pooling=pooling).double()
    stock = copy.deepcopy(model.ddae.denoiser)
    noise = torch.randn_like(images)
    features = []
    for layer, sigma in TAPS:
        noisy, timestep = add_noise(model.ddae.scheduler, images, noise, sigma)
        hidden = collect_hidden_states(stock, noisy.double(), timestep, [layer], stop_early=False)[layer]
        features.append(hidden.float().mean((2, 3)) if pooling == "mean" else hidden.float().amax((2, 3)))
    joined = torch.cat(features, dim=1).double()
    expected = joined @ model.classifier.weight.T + model.classifier.bias
    torch.testing.assert_close(model(images, noise=noise).logits, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(model.ddae(images, noise=noise).pooler_output, joined.float(), rtol=1e-6, atol=1e-7)


@torch.no_grad()
def test_a_single_tap_is_layer_and_sigma(images):
    given = make_model(taps=[("mid_block", 0.3)])
    plain = make_model(taps=None, layer="mid_block", sigma=0.3)
    assert given.config.to_dict() == plain.config.to_dict() and given.config.taps is None
    assert torch.equal(given(images).logits, plain(images).logits)


@torch.no_grad()
@pytest.mark.parametrize("head", HEADS)
def test_there_is_one_pass_a_level_which_ends_at_its_deepest_layer(images, head):
    model = make_model(head=head)
    denoiser = model.ddae.denoiser
    expected = model(images).logits
    calls = {"conv_in": 0, "mid_block": 0, "up_blocks.0.resnets.0": 0, "up_blocks.0.resnets.1": 0}

    def count(name):
        def note(*args):
            calls[name] += 1

        return denoiser.get_submodule(name).register_forward_hook(note)

    handles = [count(name) for name in calls]
    torch.testing.assert_close(model(images).logits, expected)
    for handle in handles:
        handle.remove()
    # The level of 0.1 ends in the middle; nothing after the deepest tap is computed at all.
    assert calls == {"conv_in": 2, "mid_block": 2, "up_blocks.0.resnets.0": 1, "up_blocks.0.resnets.1": 0}


@torch.no_grad()
def test_all_levels_get_the_same_noise_and_images_are_encoded_once(monkeypatch):
    model = make_model(network=make_unet(in_channels=4, out_channels=4), vae=plain_config(make_vae()))
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    encoded, seen = [], []
    encode, hidden = model.ddae.vae.encode, type(model.ddae.diffusion).hidden_states
    monkeypatch.setattr(model.ddae.vae, "encode", lambda *args: encoded.append(1) or encode(*args))

    def watched(self, clean, noise, sigma, layers, condition=None):
        seen.append((clean, noise, sigma))
        return hidden(self, clean, noise, sigma, layers, condition)

    monkeypatch.setattr(type(model.ddae.diffusion), "hidden_states", watched)
    model(images)
    assert len(encoded) == 1 and [sigma for *_, sigma in seen] == [0.1, 0.4]
    model.train()
    model(images)
    assert torch.equal(seen[0][0], seen[1][0]) and torch.equal(seen[0][1], seen[1][1])
    assert torch.equal(seen[2][1], seen[3][1]) and not torch.equal(seen[2][1], seen[0][1])


@torch.no_grad()
@pytest.mark.parametrize("head", HEADS)
def test_a_prediction_depends_on_the_image_alone(images, head):
    model = make_model(head=head)
    one_by_one = torch.cat([model(image[None]).logits for image in images])
    torch.testing.assert_close(one_by_one, model(images).logits, rtol=1e-4, atol=1e-5)
    draws = [model(images, generator=torch.Generator().manual_seed(seed)).logits for seed in (5, 5, 6)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@torch.no_grad()
def test_hidden_states_of_all_taps_are_returned_in_their_order(images):
    model = make_model()
    outputs = model(images, output_hidden_states=True)
    for state, (layer, sigma) in zip(outputs.hidden_states, TAPS, strict=True):
        one = model.ddae.read_layers(model.ddae.encode(images), [layer], sigma=sigma)[layer]
        torch.testing.assert_close(state, one, rtol=1e-4, atol=1e-5)
    assert model(images).hidden_states is None
    assert torch.equal(model.ddae(images).last_hidden_state, outputs.hidden_states[1])  # of the deepest tap


@pytest.mark.parametrize("make", [make_unet, make_dit])
@pytest.mark.parametrize("head", HEADS)
def test_gradients_reach_the_head_and_all_before_the_deepest_tap_and_nothing_after(images, head, make):
    taps = TAPS if make is make_unet else [["transformer_blocks.0", 0.1], ["transformer_blocks.2", 0.4]]
    model = make_model(network=make(), taps=taps, head=head).train()
    model(images, labels=torch.arange(5) % 4).loss.backward()
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {name for name, p in model.named_parameters() if p.grad is not None}
    own = {name for name, _ in model.named_parameters() if not name.startswith("ddae.")}
    assert own <= learning and all(model.get_parameter(name).grad.abs().sum() > 0 for name in own)
    after = {"up_blocks.0.resnets.1", "conv_out"} if make is make_unet else {"transformer_blocks.3", "proj_out_2"}
    assert not [name for name in learning if any(f".{part}." in name for part in after)]
    before = "up_blocks.0.attentions.0" if make is make_unet else "transformer_blocks.2"
    assert [name for name in learning if f".{before}." in name]
    model.zero_grad(set_to_none=True)
    model.freeze_denoiser()
    model.train()(images, labels=torch.arange(5) % 4).loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == own


@pytest.mark.parametrize("head", HEADS)
def test_learning_rates_are_counted_up_to_the_deepest_tap_and_the_head_has_the_highest(head):
    """Layers up to it: down 0, down 1 (resnet, attention), mid, up 0's first attention."""
    several = make_model(head=head)
    one = make_model(taps=None, layer=DEEPEST, sigma=0.4)
    rates, expected = (
        {names[p]: (g["lr"], g["weight_decay"]) for g in parameter_groups(model, 0.1, 0.5, 0.03) for p in g["params"]}
        for model in (several, one)
        for names in [{p: name for name, p in model.named_parameters()}]
    )
    assert {n: v for n, v in rates.items() if n.startswith("ddae.")} == {
        name: value for name, value in expected.items() if name.startswith("ddae.")
    }
    own = {name: value for name, value in rates.items() if not name.startswith("ddae.")}
    assert own.keys() == {name for name, _ in several.named_parameters() if not name.startswith("ddae.")}
    assert {rate for rate, _ in own.values()} == {0.1}
    gains = ("norm", "query", "class_token", "bias")
    for name, (_, decay) in own.items():
        assert decay == (0 if any(part in name for part in gains) else 0.03), name


# Saving and opening


def assert_opens_equal(folder, model, images, **options):
    opened = DDAEForImageClassification.from_pretrained(folder, **options)
    with torch.no_grad():
        assert torch.equal(opened(images).logits, model(images).logits)
    assert opened.config.taps == TAPS and opened.config.head == model.config.head
    return opened


@pytest.mark.parametrize("head", HEADS)
def test_every_layout_opens_as_it_was(generator, images, tmp_path, head):
    torch.manual_seed(1)
    options = {"num_labels": 3, "taps": [tuple(tap) for tap in TAPS], "head": head}
    model = DDAEForImageClassification.from_pretrained(generator, **options).eval()
    model.save_pretrained(tmp_path / "whole")
    model.save_head(tmp_path / "head", base=generator)
    stored = load_file(tmp_path / "head" / "head.safetensors")
    assert stored.keys() == {name for name in model.state_dict() if not name.startswith("ddae.")}
    model.save_head(generator)
    for folder in (tmp_path / "whole", tmp_path / "head", generator):
        assert_opens_equal(folder, model, images)
        config = json.loads((folder / "config.json").read_text())
        assert config["taps"] == TAPS and (config["layer"], config["sigma"]) == (DEEPEST, 0.4)
    assert DDPMPipeline.from_pretrained(generator).unet.config.sample_size == 8
    features = DDAEModel.from_pretrained(tmp_path / "whole")(images).pooler_output
    assert torch.equal(features, model.ddae(images).pooler_output) and features.shape == (5, WIDTH)
    assert DDAEBackbone.from_pretrained(tmp_path / "whole").config.out_features == [DEEPEST]
    DDAEImageProcessor.from_pretrained(generator).save_pretrained(tmp_path / "whole")
    assert pipeline("image-classification", model=str(tmp_path / "whole")).model.config.head == head
    opened = AutoModelForImageClassification.from_pretrained(tmp_path / "whole")
    opened.save_pretrained(tmp_path / "again")
    assert_opens_equal(tmp_path / "again", model, images)
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "whole" / "config.json").read_text()


@pytest.mark.parametrize("head", HEADS)
def test_adapters_are_up_to_the_deepest_tap_and_open_as_they_were(generator, images, tmp_path, head):
    pytest.importorskip("peft")
    model = DDAEForImageClassification.from_pretrained(generator, num_labels=3, taps=TAPS, head=head).eval()
    model.add_lora(2, targets=["convolutions"])
    adapted = model.config.lora["modules"]
    assert "up_blocks.0.resnets.0.conv1" in adapted and "up_blocks.0.resnets.1.conv1" not in adapted
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    model.save_head(tmp_path / "adapters", base=generator)
    assert_opens_equal(tmp_path / "adapters", model, images)
    model.save_pretrained(tmp_path / "whole")
    assert_opens_equal(tmp_path / "whole", model, images)


FROM_CODE = """
import sys, torch
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
assert not any(name == "ddae_hf" or name.startswith("ddae_hf.") for name in sys.modules)
images = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
with torch.no_grad():
    torch.save(model(images).logits, sys.argv[2])
"""


@pytest.mark.parametrize("head", ["attention", "fusion"])
def test_it_opens_by_the_code_that_it_carries(images, tmp_path, head):
    model = make_model(head=head)
    model.save_pretrained(tmp_path / "code", include_code=True)
    assert (tmp_path / "code" / "classification_heads.py").is_file()
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HOME": str(tmp_path / "home")}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", FROM_CODE, str(tmp_path / "code"), str(tmp_path / "logits.pt")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), model(images).logits, rtol=1e-5, atol=1e-6)


def test_a_file_of_one_tap_says_what_it_did_before(tmp_path):
    make_model(taps=None).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert not {"taps", "head", "head_width"} & config.keys()
    assert {name for name in load_file(tmp_path / "model.safetensors") if not name.startswith("ddae.")} == {
        "classifier.weight",
        "classifier.bias",
    }
    opened = DDAEForImageClassification.from_pretrained(tmp_path)
    assert (opened.config.taps, opened.config.head, opened.config.head_width) == (None, "linear", None)


@torch.no_grad()
@pytest.mark.parametrize("source", ["path", "model"])
def test_a_probe_of_joined_features_becomes_a_classifier(generator, images, source):
    weight, bias = torch.randn(2, WIDTH), torch.randn(2)
    model = str(generator) if source == "path" else DDAEModel.from_pretrained(generator)
    made = make_classifier(model, ["cat", "dog"], weight, bias, taps=TAPS)
    assert made.config.taps == TAPS and made.config.id2label == {0: "cat", 1: "dog"}
    torch.testing.assert_close(made(images).logits, made.ddae(images).pooler_output @ weight.T + bias)


@torch.no_grad()
def test_denoisers_that_are_told_a_text_are_read_at_several_taps(stock_layout):
    _, folder = stock_layout("sd1")
    taps = [("mid_block", 0.2), ("up_blocks.1.attentions.0.transformer_blocks.0", 0.5), ("mid_block", 0.5)]
    for head in HEADS:
        options = {"num_labels": 3, "prompt": "a photo", "taps": taps, "head": head}
        model = DDAEForImageClassification.from_pretrained(folder, **options).eval()
        config = model.config
        images = torch.rand(2, 3, *config.image_size, generator=torch.Generator().manual_seed(1)) * 2 - 1
        logits = model(images).logits
        assert logits.shape == (2, 3) and logits.isfinite().all()


# What cannot work


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"taps": []}, "it must be a list of 1 to 100 pairs"),
        ({"taps": "mid_block@0.1"}, "must be a list"),
        ({"taps": {"mid_block": 0.1}}, "must be a list"),
        ({"taps": [["mid_block", 0.1]] * 101}, "1 to 100 pairs"),
        ({"taps": ["mid_block"]}, "must be a pair"),
        ({"taps": [["mid_block"]]}, "must be a pair"),
        ({"taps": [["mid_block", "0.1"]]}, "must be a pair"),
        ({"taps": [["mid_block", None]]}, "must be a pair"),
        ({"taps": [["mid_block", True]]}, "must be a pair"),
        ({"taps": [[3, 0.1]]}, "must be a pair"),
        ({"taps": [["mid_block", 10**400]]}, "whose level is no number"),
        ({"taps": [["mid_block", math.nan]]}, "outside the schedule"),
        ({"taps": [["mid_block", 0.1], ["mid_block", 1000.0]]}, "outside the schedule"),
        ({"taps": [["mid_block", 0.1], ("mid_block", 0.10)]}, "more than once"),
        ({"taps": [["mid_blok", 0.1]]}, "nearest are mid_block"),
        ({"taps": TAPS, "layer": "mid_block"}, "but of the deepest tap it is 'up_blocks"),
        ({"taps": TAPS, "sigma": 0.1}, "but of the deepest tap it is 0.4"),
        ({"taps": TAPS, "timestep": 10}, "Both taps and timestep"),
        ({"taps": [["mid_block", 0.1]], "layer": DEEPEST}, "of the deepest tap it is 'mid_block'"),
        ({"head": "mlp"}, "allowed are linear, attention, fusion"),
        ({"head": None}, "head is None: it must be text"),
        ({"head": "attention", "head_width": 12}, "a multiple of 8"),
        ({"head": "attention", "head_width": 0}, "a multiple of 8"),
        ({"head": "fusion", "head_width": 8192}, "up to 4096"),
        ({"head": "fusion", "head_width": "64"}, "must be a whole number"),
        ({"head_width": 64}, "the head 'linear' has no width"),
        ({"head": "attention", "feature_norm": "batch_norm"}, "leave feature_norm out"),
    ],
)
def test_what_cannot_work_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DDAEConfig(denoiser=plain_config(make_unet()), **options)
    with pytest.raises(ValueError, match=message):  # as a damaged file says it
        DDAEConfig.from_dict({"denoiser": plain_config(make_unet()), **options})


def test_what_is_given_replaces_the_taps_of_a_file(tmp_path):
    make_model(head="attention", head_width=64).config.save_pretrained(tmp_path)
    opened = DDAEConfig.from_pretrained(tmp_path)
    assert (opened.taps, opened.layer, opened.sigma, opened.hidden_size) == (TAPS, DEEPEST, 0.4, WIDTH)
    one = DDAEConfig.from_pretrained(tmp_path, layer="mid_block", sigma=0.2)
    assert (one.taps, one.layer, one.sigma) == (None, "mid_block", 0.2)
    assert DDAEConfig.from_pretrained(tmp_path, timestep=10).taps is None
    others = DDAEConfig.from_pretrained(tmp_path, taps=TAPS[2:])
    assert (others.layer, others.sigma) == ("mid_block", 0.4)
    linear = DDAEConfig.from_pretrained(tmp_path, head="linear")
    assert (linear.head, linear.head_width) == ("linear", None)
    again = DDAEConfig.from_dict(opened.to_dict())
    assert again.to_dict() == opened.to_dict()
    with pytest.raises(ValueError, match="Both taps and layer"):
        DDAEConfig.from_pretrained(tmp_path, taps=TAPS, layer="mid_block")


def test_calls_that_cannot_work_are_refused(images):
    for model in (make_model(), make_model(DDAEModel), make_model(head="fusion")):
        for level in ({"sigma": 0.1}, {"timestep": 10}, {"sigma": torch.full((5,), 0.1)}):
            with pytest.raises(ValueError, match="several taps, with levels of their own"):
                model(images, **level)
        with pytest.raises(ValueError, match="give True"):
            model(images, output_hidden_states=["mid_block"])


@pytest.mark.parametrize("saved", ["linear", "attention", "fusion"])
@pytest.mark.parametrize("asked", ["linear", "attention", "fusion"])
def test_a_head_does_not_open_as_another(images, tmp_path, saved, asked):
    """Even where the last layer has the same shape; a new one can be asked for."""
    model = make_model(taps=TAPS[2:], head=saved, head_width=None if saved == "linear" else 128)
    model.save_pretrained(tmp_path)
    width = {} if asked == "linear" else {"head_width": 128}
    if saved == asked:
        with pytest.raises(ValueError, match="holds a classifier with another head|are not of the shapes|shape"):
            DDAEForImageClassification.from_pretrained(tmp_path, taps=TAPS, head=asked, **width)
        return
    with pytest.raises(ValueError, match="holds a classifier with another head"):
        DDAEForImageClassification.from_pretrained(tmp_path, head=asked, **width)
    anew = {"num_labels": 4, "ignore_mismatched_sizes": True}
    opened = DDAEForImageClassification.from_pretrained(tmp_path, head=asked, **width, **anew)
    assert not torch.equal(opened.classifier.weight[:, :8], model.classifier.weight[:, :8])
    assert opened(images).logits.isfinite().all()


def test_a_head_with_a_missing_tensor_is_refused(tmp_path):
    from safetensors.torch import save_file

    model = make_model(head="attention")
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["head.query"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="another head"):
        DDAEForImageClassification.from_pretrained(tmp_path)
