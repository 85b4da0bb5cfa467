"""Networks that are told a text, of every layout: what they are told, and their hidden states."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import load_file, save_file

from ddae_hf import (
    DDAEBackbone,
    DDAEConfig,
    DDAEForImageClassification,
    DDAEModel,
    collect_hidden_states,
    embed_prompts,
    layer_names,
)

from .stock import LAYOUTS, batched, denoiser_of, first_call, noisy_input, outputs_of

PROMPTS = ["a cat", "the red dog"]
TIMESTEP = 261


@pytest.fixture(params=list(LAYOUTS))
def layout(request, stock_layout):
    return stock_layout(request.param)


@pytest.fixture(scope="module")
def opened(stock_layout):
    """A model of each layout that is only read, by the folder."""
    return {}


def model_of(folder, opened):
    if folder not in opened:
        opened[folder] = DDAEModel.from_pretrained(folder).eval()
    return opened[folder]


def batch(model):
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(2, 3, *model.config.image_size, generator=generator) * 2 - 1
    return images, torch.randn(2, *model.config.sample_shape, generator=generator)


@torch.no_grad()
@pytest.mark.parametrize("told", ["no text", "one text each"])
def test_every_tap_is_that_of_the_stock_pipelines_call(layout, opened, told):
    pipeline, folder = layout
    model = model_of(folder, opened)
    assert all(map(torch.equal, model.denoiser.parameters(), denoiser_of(pipeline).parameters()))
    if told == "no text":
        args, keywords = first_call(pipeline, PROMPTS[:1])
        keywords = batched(keywords, lambda value: value.chunk(2)[0].repeat(2, *[1] * (value.ndim - 1)))
    else:
        args, keywords = first_call(pipeline, PROMPTS)
        keywords = batched(keywords, lambda value: value.chunk(2)[1].clone())
    images, noise = batch(model)
    clean = model.encode(images)
    noisy, timestep = noisy_input(pipeline, clean, noise, TIMESTEP)
    if "timestep" in keywords:
        keywords["timestep"] = timestep.expand(2)
    condition = None if told == "no text" else embed_prompts(folder, PROMPTS)
    diffusion = model.diffusion
    own = diffusion.network.keywords(diffusion.conditions(condition, 2, "cpu"))
    torch.testing.assert_close(own, {name: keywords[name] for name in own}, rtol=1e-5, atol=1e-6)
    # The last bit of a product may differ with where factors lie in memory: the model's own network is called, with
    # copies of its own embeddings.
    keywords |= batched(own, torch.clone)
    names = layer_names(model.denoiser, inner=True)
    expected = outputs_of(model.denoiser, names, noisy, *([timestep] if len(args) > 1 else []), **keywords)
    fed = diffusion.family.noisy(clean, noise, diffusion.family.sigma(TIMESTEP))
    torch.testing.assert_close(fed[0], noisy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fed[1], timestep.expand(2).float(), rtol=1e-6, atol=0)
    for stop_early in (False, True):
        found = collect_hidden_states(model.denoiser, noisy, timestep.expand(2), names, stop_early=stop_early, **own)
        for name in names:
            assert torch.equal(found[name], expected[name]), name
            alone = collect_hidden_states(
                model.denoiser, noisy, timestep.expand(2), [name], stop_early=stop_early, **own
            )
            assert torch.equal(alone[name], expected[name]), name
    read = model.read_layers(clean, names, condition, timestep=TIMESTEP, noise=noise)
    for name in names:
        torch.testing.assert_close(read[name], expected[name], rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_what_is_given_for_each_image_is_for_that_image(layout, opened):
    model = model_of(layout[1], opened)
    images, noise = batch(model)
    condition = embed_prompts(layout[1], PROMPTS)
    together = model(images, condition=condition, noise=noise).pooler_output
    for i in range(2):
        own = {name: value[i : i + 1] if len(value) == 2 else value for name, value in condition.items()}
        alone = model(images[i : i + 1], condition=own, noise=noise[i : i + 1]).pooler_output
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-4, atol=1e-5)
        for_all = model(images, condition=own, noise=noise).pooler_output
        torch.testing.assert_close(for_all[i], together[i], rtol=1e-4, atol=1e-5)
    null = model(images, noise=noise).pooler_output
    assert not torch.allclose(null, together, rtol=1e-3, atol=1e-4)
    stored = {name: value.clone() for name, value in model.condition().items()}
    assert torch.equal(model(images, noise=noise, condition=stored).pooler_output, null)
    draws = torch.stack([noise, -noise])
    both = model(images, condition=condition, noise=draws).last_hidden_state
    each = [model(images, condition=condition, noise=draw).last_hidden_state for draw in draws]
    torch.testing.assert_close(both, torch.stack(each).mean(0), rtol=1e-4, atol=1e-5)


def refused(model, condition, images):
    with pytest.raises(ValueError) as error:
        model(images, condition=condition)
    return str(error.value)


def test_conditions_that_cannot_be_are_refused(layout, opened):
    model = model_of(layout[1], opened)
    images, _ = batch(model)
    good = model.condition()
    sequence = good["encoder_hidden_states"]
    with pytest.raises(ValueError, match="Both condition and class_labels came: pass one of them"):
        model(images, condition=good, class_labels=torch.tensor([0, 1]))
    for labels in (torch.tensor([0, 1]), 3, [0, 1], "a cat"):
        assert "is told a text, and no class labels: give what `embed_prompts` makes" in refused(model, labels, images)
    three = {name: value.repeat(3, *[1] * (value.ndim - 1)) for name, value in good.items()}
    assert "is for 3 images, but 2 came: give it for one, or for all" in refused(model, three, images)
    narrow = good | {"encoder_hidden_states": sequence[..., 1:]}
    assert "encoder_hidden_states has the shape (B, " in refused(model, narrow, images)
    numbers = good | {"encoder_hidden_states": sequence.long()}
    assert "encoder_hidden_states is of type int64: it must be floats" in refused(model, numbers, images)
    assert "encoder_hidden_states is 1: it must be a tensor" in refused(
        model, good | {"encoder_hidden_states": 1}, images
    )
    assert "this " in refused(model, good | {"other": sequence}, images)
    for name in good.keys() - {"time_ids", "resolution", "aspect_ratio"}:
        without = {other: value for other, value in good.items() if other != name}
        message = refused(model, without, images)
        assert f"is told {', '.join(good)[:21]}" in message or "came without text encoders" in message


def test_a_network_without_its_text_encoders_needs_a_condition(layout, opened):
    known = model_of(layout[1], opened)
    model = DDAEModel(config_of(known, condition_shapes=None)).eval()
    images, _ = batch(model)
    assert model.condition is None and not any("condition" in name for name in model.state_dict())
    with pytest.raises(ValueError, match="is told a text, and its checkpoint came without text encoders"):
        model(images)
    model.load_state_dict({k: v for k, v in known.state_dict().items() if not k.startswith("condition.")})
    found = model(images, condition=known.condition(), sigma=0.3).pooler_output
    assert torch.equal(found, known(images, sigma=0.3).pooler_output)


def asked_and_got(model):
    model.train()
    images, _ = batch(model.base_model)
    out = model(images)
    loss = out.logits.square().mean() if hasattr(out, "logits") else sum(m.square().mean() for m in out.feature_maps)
    loss.backward()
    parameters = dict(model.named_parameters())
    asked = {name for name, p in parameters.items() if p.requires_grad}
    return asked, {name for name, p in parameters.items() if p.grad is not None}


def config_of(model, **options):
    """The config of a model of the same networks and conditions."""
    known = ("denoiser", "scheduler", "vae", "condition_shapes")
    return DDAEConfig(**{name: getattr(model.config, name) for name in known} | options)


def test_what_asks_for_a_gradient_gets_one_wherever_the_tap_is(layout, opened):
    """So that DistributedDataParallel waits for no parameter; tensors of what is told are no parameters."""
    known = model_of(layout[1], opened)
    names = layer_names(known.denoiser, inner=True)
    sizes = []
    for layer in names[:: max(1, len(names) // 6)]:
        model = DDAEForImageClassification(config_of(known, num_labels=3, layer=layer))
        asked, got = asked_and_got(model)
        assert asked == got and not any("vae" in name or "condition" in name for name in asked)
        sizes.append(len(got))
        model.zero_grad(set_to_none=True)
        model.freeze_denoiser()
        asked, got = asked_and_got(model)
        assert asked == got == {"classifier.weight", "classifier.bias"}
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1] < len(list(model.ddae.denoiser.parameters()))
    backbone = DDAEBackbone(config_of(known, out_features=[names[2], names[-3]]))
    asked, got = asked_and_got(backbone)
    assert asked == got


def test_opening_keeps_apart_what_learns(layout):
    for cls, options in ((DDAEForImageClassification, {"num_labels": 3}), (DDAEBackbone, {})):
        asked, got = asked_and_got(cls.from_pretrained(layout[1], **options))
        assert asked == got


def test_hidden_states_around_a_tap_inside_of_an_attention(layout, opened):
    """Those of every layer up to it; in training, those whose parameters learn nothing are refused."""
    known = model_of(layout[1], opened)
    outer = layer_names(known.denoiser)
    every = layer_names(known.denoiser, inner=True)
    layer = [name for name in every if name not in outer][-1]
    after = every[every.index(layer) + 1]  # what has it inside
    model = DDAEForImageClassification(config_of(known, num_labels=3, layer=layer)).eval()
    images, _ = batch(known)
    states = model(images, output_hidden_states=True).hidden_states
    assert len(states) == outer.index(after) + 1
    assert torch.equal(states[-1], model.ddae(images).last_hidden_state)
    (first,) = model(images, output_hidden_states=[every[0]]).hidden_states
    assert len(first) == 2
    assert len(model(images, output_hidden_states=[after]).hidden_states) == 1
    model.train()
    assert model(images, output_hidden_states=[every[0], layer]).hidden_states[0].requires_grad
    with pytest.raises(ValueError, match=f"{after} are asked for in training, but the parameters after {layer}"):
        model(images, output_hidden_states=[after])


def test_gradients_are_the_same_with_checkpointing(layout, opened):
    known = model_of(layout[1], opened)
    names = layer_names(known.denoiser, inner=True)
    images, noise = batch(known)
    labels = torch.tensor([0, 2])
    for layer in (names[-1], names[-3]):
        model = DDAEForImageClassification(config_of(known, num_labels=3, layer=layer)).train()
        gradients = []
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable()
            model.zero_grad(set_to_none=True)
            model(images, labels, noise=noise).loss.backward()
            gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == gradients[1].keys()
        for name, gradient in gradients[0].items():
            assert torch.equal(gradient, gradients[1][name]), name


def test_gradients_reach_a_condition(layout, opened):
    """As where a text is learnt."""
    model = model_of(layout[1], opened)
    images, _ = batch(model)
    condition = {name: value.clone() for name, value in model.condition().items()}
    condition["encoder_hidden_states"].requires_grad_(True)
    model(images, condition=condition).pooler_output.square().mean().backward()
    model.zero_grad(set_to_none=True)
    assert condition["encoder_hidden_states"].grad.abs().max() > 0


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_what_is_stored_in_it(layout, opened, dtype, tmp_path):
    folder = layout[1]
    known = model_of(folder, opened)
    images, noise = batch(known)
    cast = DDAEModel.from_pretrained(folder).eval().to(dtype)
    expected = known(images, noise=noise).pooler_output
    assert torch.equal(cast.fixed_noise, known.fixed_noise)
    model = DDAEModel.from_pretrained(folder, dtype=dtype).eval()
    for half in (cast, model):
        for name, value in half.condition().items():
            stored = known.condition()[name]
            assert value.dtype == (stored.dtype if name == "encoder_attention_mask" else dtype)
            torch.testing.assert_close(value.float(), stored.float(), rtol=0.1, atol=0.1)
        found = half(images.to(dtype), noise=noise).pooler_output
        assert (found - expected).norm() < 0.1 * expected.norm()
        as_given = half(images.to(dtype), noise=noise, condition=half.condition()).pooler_output
        assert torch.equal(as_given, found)
    model.save_pretrained(tmp_path)
    kept = {k: v for k, v in load_file(tmp_path / "model.safetensors").items() if k.startswith("condition.")}
    assert {k.removeprefix("condition."): v.dtype for k, v in kept.items()} == {
        name: value.dtype for name, value in model.condition().items()
    }
    again = DDAEModel.from_pretrained(tmp_path).eval()
    assert again.dtype == dtype and torch.equal(again(images.to(dtype), noise=noise).pooler_output, found)


@torch.no_grad()
def test_whole_models_heads_and_states_give_the_same(layout, opened, tmp_path):
    """None of them needs a text encoder, and a head beside its base leaves the pipeline as it is."""
    folder = layout[1]
    known = model_of(folder, opened)
    images, _ = batch(known)
    model = DDAEForImageClassification.from_pretrained(folder, num_labels=3, prompt="a cat").eval()
    expected = model(images).logits
    assert model.config.prompt == "a cat" and known.config.prompt is None
    model.save_pretrained(tmp_path / "whole")
    names = set(load_file(tmp_path / "whole" / "model.safetensors"))
    assert {f"ddae.condition.{name}" for name in known.condition()} == {name for name in names if ".condition." in name}
    shutil.copytree(folder, tmp_path / "pipeline")
    model.save_head(tmp_path / "pipeline")
    model.save_head(tmp_path / "head", base=folder)
    written = load_file(tmp_path / "head" / "head.safetensors")
    own = {f"ddae.condition.{name}" for name in known.condition()}
    assert set(written) == own | {"classifier.weight", "classifier.bias"}
    for part in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        shutil.rmtree(tmp_path / "pipeline" / part, ignore_errors=True)
    for place in ("whole", "pipeline", "head"):
        opened_again = DDAEForImageClassification.from_pretrained(tmp_path / place).eval()
        assert opened_again.config.prompt == "a cat"
        assert torch.equal(opened_again(images).logits, expected), place
        features = DDAEModel.from_pretrained(tmp_path / place).eval()(images).pooler_output
        assert torch.equal(features, model.ddae(images).pooler_output), place
    other = DDAEForImageClassification(config_of(known, num_labels=3)).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(images, sigma=model.config.sigma).logits, expected)


@torch.no_grad()
def test_feature_maps_inside_of_attentions_are_on_the_grid(layout, opened, tmp_path):
    known = model_of(layout[1], opened)
    names = layer_names(known.denoiser, inner=True)
    wanted = [names[0], names[2], names[-1]]
    backbone = DDAEBackbone.from_pretrained(layout[1], out_features=wanted).eval()
    images, noise = batch(known)
    maps = backbone(images, noise=noise).feature_maps
    assert [m.shape[1] for m in maps] == backbone.channels
    clean = known.encode(images)
    states = known.read_layers(clean, wanted, noise=noise)
    for name, found in zip(wanted, maps, strict=True):
        state = states[name]
        tokens = state if state.ndim == 3 else state.flatten(2).transpose(1, 2)
        assert found.ndim == 4 and torch.equal(found.flatten(2).transpose(1, 2), tokens), name
    backbone.save_pretrained(tmp_path)
    again = DDAEBackbone.from_pretrained(tmp_path).eval()
    assert again.out_features == wanted and again.stage_names == backbone.stage_names
    assert all(map(torch.equal, again(images, noise=noise).feature_maps, maps))
    every = backbone(images, noise=noise, output_hidden_states=True).hidden_states
    assert len(every) == len({*layer_names(known.denoiser), *wanted})


@torch.no_grad()
def test_guidance_is_the_pipelines(layout, opened):
    """The answer that a stock pipeline's guidance makes of the network's, without a learned variance."""
    model = model_of(layout[1], opened)
    images, noise = batch(model)
    diffusion = model.diffusion
    told, null = (diffusion.conditions(c, 2, "cpu") for c in (embed_prompts(layout[1], PROMPTS), None))
    fed, timestep = diffusion.family.noisy(model.encode(images), noise, 0.7)
    with_text, without = (diffusion.predict(fed, timestep, c) for c in (told, null))
    guided = diffusion.predict(fed, timestep, told, 3.0, null)
    assert guided.shape == fed.shape
    torch.testing.assert_close(guided, without + 3 * (with_text - without), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="or the conditions of a text and of no text"):
        diffusion.predict(fed, timestep, told, 3.0)
    shorter = {name: value[:, 1:] if name.startswith("encoder") else value for name, value in null.items()}
    with pytest.raises(ValueError, match="null condition's encoder_hidden_states are of the shapes"):
        diffusion.predict(fed, timestep, told, 3.0, shorter)


@torch.no_grad()
def test_models_on_other_devices_fetch_what_they_are_told(layout, opened, tmp_path):
    known = model_of(layout[1], opened)
    images, _ = batch(known)
    expected = known(images).pooler_output
    known.save_pretrained(tmp_path)
    model = cpu_offload(DDAEModel.from_pretrained(tmp_path).eval(), execution_device="cpu", offload_buffers=True)
    assert all(buffer.is_meta for buffer in model.condition.buffers())
    assert torch.equal(model(images).pooler_output, expected)
    for places in ({"": "cpu"}, "auto"):
        placed = DDAEModel.from_pretrained(tmp_path, device_map=places).eval()
        assert torch.equal(placed(images).pooler_output, expected)
    classifier = DDAEForImageClassification(config_of(known, num_labels=3)).eval()
    classifier.save_pretrained(tmp_path / "classifier")
    places = {"ddae": "disk", "feature_norm": "cpu", "classifier": "cpu"}
    placed = DDAEForImageClassification.from_pretrained(
        tmp_path / "classifier", device_map=places, offload_folder=tmp_path / "offloaded"
    )
    assert any(parameter.is_meta for parameter in placed.parameters())
    assert torch.equal(placed(images).logits, classifier(images).logits)


def classifier_of(known):
    torch.manual_seed(5)
    model = DDAEForImageClassification(config_of(known, num_labels=3)).eval()
    model.ddae.load_state_dict(known.state_dict())
    return model


BATCH = {"pixel_values": {0: torch.export.Dim("batch", min=2, max=63)}}  # diffusers' up-sampling branches on 64


@torch.no_grad()
@pytest.mark.parametrize("name", ["xl", "alpha of 1024 pixels"])
def test_a_classifier_is_one_graph_that_holds_what_it_is_told(stock_layout, opened, name):
    model = classifier_of(model_of(stock_layout(name)[1], opened))
    images = torch.rand(5, 3, *model.config.image_size) * 2 - 1
    expected = model(images).logits
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(images).logits, expected)
    exported = torch.export.export(model, (images,), dynamic_shapes=BATCH).module()
    for count in (5, 2):
        torch.testing.assert_close(exported(images[:count]).logits, expected[:count], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", [pytest.param("xl", marks=pytest.mark.slow), "alpha"])
def test_onnxruntime_gives_the_same_logits_without_a_text(stock_layout, opened, name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = classifier_of(model_of(stock_layout(name)[1], opened))
    images = torch.rand(5, 3, *model.config.image_size) * 2 - 1
    torch.onnx.export(
        model, (images,), tmp_path / "model.onnx", input_names=["pixel_values"], output_names=["logits"],
        dynamic_shapes=BATCH, verbose=False,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for count in (5, 2):
        (logits,) = session.run(["logits"], {"pixel_values": images[:count].numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(images[:count]).logits, rtol=0, atol=1e-4)


WITHOUT_THE_PACKAGE = """
import sys
sys.modules["ddae_hf"] = None  # importing it fails, as where it is not installed
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification
found = {}
for folder in sys.argv[2:]:
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
    images = load_file(folder + "/images.safetensors")["images"]
    found[folder] = model(images).logits.detach()
save_file(found, sys.argv[1])
"""


@torch.no_grad()
def test_copies_with_their_code_need_neither_the_package_nor_text_encoders(stock_layout, opened, tmp_path):
    expected = {}
    for name in ("xl", "sigma"):
        model = classifier_of(model_of(stock_layout(name)[1], opened))
        folder = tmp_path / name
        model.save_pretrained(folder, include_code=True)
        images = torch.rand(2, 3, *model.config.image_size) * 2 - 1
        save_file({"images": images}, folder / "images.safetensors")
        expected[str(folder)] = model(images).logits
    home = tmp_path / "home"
    home.mkdir()
    environment = {**os.environ, "HF_HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", WITHOUT_THE_PACKAGE, str(tmp_path / "found.safetensors"), *expected]
    done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    torch.testing.assert_close(load_file(tmp_path / "found.safetensors"), expected, rtol=1e-4, atol=1e-5)
