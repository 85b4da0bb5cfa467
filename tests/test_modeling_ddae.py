"""The models against diffusers' own forward; randomness; training; saving."""

import copy
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from safetensors.torch import load_file, save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import Trainer, TrainingArguments

from ddae_hf import (
    DDAEBackbone,
    DDAEConfig,
    DDAEForImageClassification,
    DDAEModel,
    DDAEPipeline,
    add_noise,
    layer_names,
    timestep_to_sigma,
)
from ddae_hf.checkpoints import plain_config
from ddae_hf.hidden_states import learning_parameters
from ddae_hf.labels import cross_entropy
from ddae_hf.weights import fingerprint

from .conftest import make_dit, make_unet, make_vae


def make_config(**options):
    unet_options = options.pop("unet", {})
    return DDAEConfig(**{"denoiser": plain_config(make_unet(**unet_options)), "num_labels": 4, **options})


def make_model(cls=DDAEForImageClassification, **options):
    torch.manual_seed(0)
    return cls(make_config(**options)).eval()


@torch.no_grad()
def test_features_are_the_pooled_hidden_states_of_diffusers_forward(images, scheduler):
    model = make_model(DDAEModel, layer="up_blocks.0.attentions.0", timestep=10)
    noise = torch.randn_like(images)
    found = {}
    model.denoiser.up_blocks[0].attentions[0].register_forward_hook(lambda m, a, out: found.update(out=out))
    timesteps = torch.full((5,), 10)
    model.denoiser(scheduler.add_noise(images, noise, timesteps), timesteps)
    expected = found["out"].clone()
    outputs = model(images, noise=noise)
    torch.testing.assert_close(outputs.last_hidden_state, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs.pooler_output, expected.mean((2, 3)), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_prediction_depends_on_the_image_alone(images, tmp_path):
    model = make_model()
    logits = model(images).logits
    one_by_one = torch.cat([model(image[None]).logits for image in images])
    backwards = model(images.flip(0)).logits.flip(0)
    torch.manual_seed(99)
    again = model(images).logits
    model.save_pretrained(tmp_path)
    loaded = DDAEForImageClassification.from_pretrained(tmp_path)(images).logits
    for other in (one_by_one, backwards, again, loaded):
        torch.testing.assert_close(other, logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_fixed_noise_is_a_function_of_its_seed(images, tmp_path):
    first, second = make_model(DDAEModel, noise_seed=1), make_model(DDAEModel, noise_seed=2)
    expected = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(first.fixed_noise, expected) and not torch.equal(second.fixed_noise, expected)
    first.save_pretrained(tmp_path)
    assert torch.equal(DDAEModel.from_pretrained(tmp_path).fixed_noise, expected)
    assert torch.equal(first(images).pooler_output, first(images, noise=expected.expand(5, -1, -1, -1)).pooler_output)
    assert "fixed_noise" not in first.state_dict()


@torch.no_grad()
def test_noise_is_fresh_in_training_and_from_the_generator_when_given(images):
    model = make_model(DDAEModel)
    draws = [model(images, generator=torch.Generator().manual_seed(s)).pooler_output for s in (5, 5, 6)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    model.train()
    assert not torch.equal(model(images).pooler_output, model(images).pooler_output)


@torch.no_grad()
def test_several_draws_are_averaged(images):
    model = make_model(DDAEModel, num_noise_samples=3, sigma=1.0)
    singles = [model(images, noise=noise.expand(5, -1, -1, -1)) for noise in model.fixed_noise]
    outputs = model(images)
    mean = torch.stack([s.last_hidden_state for s in singles]).mean(0)
    torch.testing.assert_close(outputs.last_hidden_state, mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs.pooler_output, mean.mean((2, 3)), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_levels_as_sigma_timestep_scalar_or_tensor_agree(images, scheduler):
    model = make_model(DDAEModel)
    sigma = timestep_to_sigma(scheduler, 300)
    expected = model(images, timestep=300).pooler_output
    for level in ({"sigma": sigma.item()}, {"sigma": sigma.expand(5)}, {"timestep": torch.full((5,), 300)}):
        torch.testing.assert_close(model(images, **level).pooler_output, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(images).pooler_output, expected)


# Levels at which no sampler evaluates a network, with the ends of the schedule.
OUTSIDE = {
    "DDPMScheduler": ([1e6, 0.0, -1.0, math.nan, math.inf], "0.010001 to 157.41", [5000, -1, math.nan], "0 to 999"),
    "EDMEulerScheduler": (
        [0.0, 81.0, -1.0, math.nan, math.inf],
        "0.002 to 80",
        [5000, -2, math.nan],
        "-1.5537 to 1.0955",
    ),
    "FlowMatchEulerDiscreteScheduler": ([-1.0, math.nan], "0 to inf", [5000, -1, math.nan], "0 to 1000"),
}


@torch.no_grad()
@pytest.mark.parametrize("scheduler", OUTSIDE)
def test_a_level_outside_the_schedule_is_refused_however_it_comes(images, scheduler):
    model = make_model(scheduler={"_class_name": scheduler}, sigma=0.5)
    sigmas, sigma_range, timesteps, timestep_range = OUTSIDE[scheduler]
    levels = [("sigma", level, sigma_range) for level in sigmas]
    levels += [("timestep", level, timestep_range) for level in timesteps]
    for unit, level, allowed in levels:
        one_image = torch.full((5,), 0.5)
        one_image[3] = level
        for value in (level, np.float32(level), torch.tensor(float(level), dtype=torch.float64), one_image):
            with pytest.raises(
                ValueError, match=rf"{unit} \S+ is outside the schedule of {scheduler}: .* {allowed} \("
            ):
                model(images, **{unit: value})
            with pytest.raises(ValueError, match=f"{unit} .* is outside the schedule"):
                model.ddae.read_layers(images, ["mid_block"], **{unit: value})


@torch.no_grad()
def test_a_scalar_level_is_checked_where_the_model_is_compiled_too(images):
    """One inside is `config.sigma`, which the tests below compile."""
    compiled = torch.compile(make_model(), fullgraph=True, backend="eager")
    for level in ({"sigma": 1e6}, {"timestep": 5000}):
        with pytest.raises(
            (ValueError, RuntimeError), match=r"(sigma|timestep) \S+ is outside the schedule of DDPMSch"
        ):
            compiled(images, **level)


@torch.no_grad()
def test_hidden_states_by_name_index_or_all(images):
    model = make_model(DDAEModel, layer="up_blocks.0.attentions.0")
    names = layer_names(model.denoiser)
    every = model(images, output_hidden_states=True)
    assert len(every.hidden_states) == names.index("up_blocks.0.attentions.0") + 1
    assert torch.equal(every.hidden_states[-1], every.last_hidden_state)
    chosen = model(images, output_hidden_states=["up_blocks.1.resnets.1", 0, -1]).hidden_states
    assert torch.equal(chosen[0], chosen[2]) and torch.equal(chosen[1], every.hidden_states[0])
    assert model(images).hidden_states is None
    last, pooled = model(images, return_dict=False)
    assert torch.equal(last, every.last_hidden_state) and pooled.shape == (5, 64)
    with pytest.raises(ValueError, match="indices are 0 to 6"):
        model(images, output_hidden_states=[7])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pixel_values": torch.zeros(2, 1, 8, 8)}, r"takes \(batch, 3, 8, 8\)"),
        ({"pixel_values": torch.zeros(2, 3, 16, 16)}, r"takes \(batch, 3, 8, 8\)"),
        ({"pixel_values": torch.zeros(3, 8, 8)}, r"takes \(batch, 3, 8, 8\)"),
        ({"pixel_values": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}, "must be floats"),
        ({"sigma": 0.1, "timestep": 10}, "pass one of them"),
        ({"sigma": -0.1}, "outside the schedule"),
        ({"sigma": 500.0}, "outside the schedule"),
        ({"timestep": 1000}, "outside the schedule"),
        ({"output_hidden_states": ["up_blocks.3.resnets.0"]}, "There is no layer"),
        ({"noise": torch.zeros(1, 3, 8, 8)}, "noise has shape"),
        ({"class_labels": torch.tensor([0, 1])}, "unconditional"),
        ({"labels": torch.tensor([0, 4])}, "allowed are 0 to 3"),
        ({"labels": torch.tensor([-1, 3])}, "allowed are 0 to 3"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_model()(**{"pixel_values": torch.zeros(2, 3, 8, 8), **arguments})


@torch.no_grad()
def test_a_conditional_denoiser_takes_its_null_class_or_labels(images):
    unet = {"num_class_embeds": 11}
    with pytest.raises(ValueError, match="pass class_labels, or set its null_class"):
        make_model(DDAEModel, unet=unet)(images)
    model = make_model(DDAEModel, unet=unet, null_class=10)
    null = model(images, class_labels=torch.full((5,), 10)).pooler_output
    assert torch.equal(model(images).pooler_output, null)
    assert not torch.equal(model(images, class_labels=torch.arange(5)).pooler_output, null)
    with pytest.raises(ValueError, match="class_labels are 0 to 11: allowed are 0 to 10"):
        model(images, class_labels=torch.tensor([0, 1, 2, 3, 11]))


def test_names_are_of_the_classes_that_there_are():
    with pytest.raises(ValueError, match="id2label names the class 5, but this network has the labels 0 to 1"):
        make_model(num_labels=2, id2label={0: "cat", 5: "dog"})
    with pytest.warns(UserWarning, match="Several classes are named 'crane'.*`label2id`"):
        make_model(num_labels=3, id2label={0: "crane", 1: "cat", 2: "crane"})


FRAMEWORKS = ["DDPMScheduler", "EDMEulerScheduler", "FlowMatchHeunDiscreteScheduler"]


@pytest.mark.parametrize("scheduler", FRAMEWORKS)
@pytest.mark.parametrize("classes", [0, 5])
def test_a_dit_is_read_saved_and_loaded_in_every_framework(images, tmp_path, scheduler, classes):
    """Its positions are in no checkpoint; the null class is its last label."""
    dit = make_dit(num_embeds_ada_norm=classes)
    options = {"denoiser": plain_config(dit), "scheduler": {"_class_name": scheduler}, "sigma": 0.3, "num_labels": 4}
    model = DDAEForImageClassification(DDAEConfig(**options)).eval()
    model.ddae.denoiser.load_state_dict(dit.state_dict())
    assert torch.equal(model.ddae.denoiser.pos_embed.pos_embed, dit.pos_embed.pos_embed)
    noise = torch.randn_like(images)
    with torch.no_grad():
        outputs = model.ddae(images, noise=noise, output_hidden_states=["transformer_blocks.0", -1])
        noisy, timestep = add_noise(model.ddae.scheduler, images, noise, 0.3)
        hidden = dit.pos_embed(noisy)
        for block in dit.transformer_blocks[:2]:
            hidden = block(hidden, timestep=timestep, class_labels=torch.full((5,), classes))
    torch.testing.assert_close(outputs.last_hidden_state, hidden, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs.pooler_output, hidden.mean(1), rtol=1e-5, atol=1e-5)
    assert [h.shape for h in outputs.hidden_states] == [(5, 16, 32), (5, 16, 32)]
    model.save_pretrained(tmp_path)
    loaded = DDAEForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(images).logits, model(images).logits)
    if not classes:
        with pytest.raises(ValueError, match="unconditional"):
            model(images, class_labels=torch.zeros(5, dtype=torch.long))


def test_a_dit_is_fine_tuned_or_probed(images):
    labels = torch.tensor([0, 1, 2, 3, 0])
    model = DDAEForImageClassification(DDAEConfig(denoiser=plain_config(make_dit()), num_labels=4)).train()
    model(images, labels=labels).loss.backward()
    used = [*model.ddae.denoiser.transformer_blocks[:2].parameters(), *model.ddae.denoiser.pos_embed.parameters()]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in used)
    assert all(p.grad is None for p in model.ddae.denoiser.transformer_blocks[2:].parameters())
    model.freeze_denoiser()
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["classifier.weight", "classifier.bias"]


@pytest.mark.parametrize("scheduler", FRAMEWORKS[1:])
@pytest.mark.parametrize("network", ["unet", pytest.param("dit", marks=pytest.mark.slow)])
def test_every_framework_compiles_and_exports(images, scheduler, network):
    denoiser = plain_config(make_unet() if network == "unet" else make_dit())
    model = DDAEForImageClassification(DDAEConfig(denoiser=denoiser, scheduler={"_class_name": scheduler})).eval()
    with torch.no_grad():
        expected = model(images).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images).logits, expected, rtol=1e-4, atol=1e-5)
        exported = torch.export.export(model, (images,)).module()
        torch.testing.assert_close(exported(images).logits, expected, rtol=1e-4, atol=1e-5)


def formula(logits, probabilities):
    """The mean over the batch of -sum_k q_k log p_k."""
    return -(probabilities * logits.log_softmax(-1)).sum(-1).mean()


@pytest.mark.parametrize("problem_type", [None, "single_label_classification"])
def test_the_loss_is_the_batchs_mean_cross_entropy(images, problem_type):
    """Of classes and of probabilities, in any order, whatever count comes from outside."""
    model = make_model(problem_type=problem_type)
    logits = model(images).logits
    hard, soft = torch.tensor([0, 3, 1, 2, 2]), torch.softmax(torch.randn(5, 4), -1)
    for labels, expected in [
        (soft, formula(logits, soft)),
        (hard, formula(logits, F.one_hot(hard, 4))),
        (soft.double(), formula(logits, soft)),
        (hard.int(), formula(logits, F.one_hot(hard, 4))),
        (torch.tensor([0, -100, 1, -100, 2]), formula(logits[[0, 2, 4]], F.one_hot(torch.tensor([0, 1, 2]), 4))),
        (soft, formula(logits, soft)),
    ]:
        loss, again = model(images, labels=labels, return_dict=False)
        torch.testing.assert_close(loss, expected)
        assert torch.equal(again, logits)
        assert torch.equal(model(images, labels=labels, num_items_in_batch=20).loss, loss)
        assert model.config.problem_type == problem_type


def test_losses_compile_into_the_graph():
    compiled, logits = torch.compile(cross_entropy, fullgraph=True, backend="eager"), torch.randn(3, 4)
    for labels in (torch.tensor([0, -100, 3]), torch.softmax(torch.randn(3, 4), -1)):
        torch.testing.assert_close(compiled(logits, labels), cross_entropy(logits, labels))


def test_other_problems_keep_transformers_loss(images):
    model, several = make_model(problem_type="multi_label_classification"), torch.eye(5, 4)
    expected = F.binary_cross_entropy_with_logits(model(images).logits, several)
    torch.testing.assert_close(model(images, labels=several).loss, expected)
    model, numbers = make_model(problem_type="regression", num_labels=1), torch.randn(5, 1)
    torch.testing.assert_close(model(images, labels=numbers).loss, F.mse_loss(model(images).logits, numbers))


@pytest.mark.parametrize(
    "labels", [torch.eye(5, 4).long(), torch.rand(5), torch.rand(5, 3), torch.zeros(5, 1).long(), torch.zeros(4).long()]
)
def test_labels_that_are_neither_classes_nor_probabilities_are_refused(images, labels):
    with pytest.raises(ValueError, match=r"integers \(5,\), and probabilities of classes, floats \(5, 4\)"):
        make_model()(images, labels=labels)


@pytest.mark.parametrize(
    "labels",
    [torch.ones(5, 4), torch.zeros(5, 4), torch.tensor([2.0, -1, 0, 0]).expand(5, 4), torch.full((5, 4), float("nan"))],
)
def test_numbers_that_are_no_probabilities_are_refused(images, labels):
    with pytest.raises(ValueError, match='add up to 1. For several .* problem_type="multi_label_classification"'):
        make_model()(images, labels=labels)


def test_probabilities_in_half_precision_are_probabilities(images):
    model, many = make_model(num_labels=1000), torch.softmax(torch.randn(5, 1000), -1)
    for dtype in (torch.bfloat16, torch.float16):
        torch.testing.assert_close(
            model(images, labels=many.to(dtype)).loss, model(images, labels=many).loss, rtol=1e-2, atol=0
        )


def test_a_single_class_is_refused(images):
    with pytest.raises(ValueError, match="always 0"):
        make_model(num_labels=1)(images, labels=torch.zeros(5, dtype=torch.long))


def test_a_frozen_denoiser_learns_nothing_and_drops_nothing(images):
    model = make_model(unet={"dropout": 0.5})
    model.freeze_denoiser()
    model.train()
    assert model.training and not any(m.training for m in model.ddae.denoiser.modules())
    model(images, labels=torch.zeros(5, dtype=torch.long)).loss.backward()
    learning = {name for name, p in model.named_parameters() if p.grad is not None}
    assert learning == {"classifier.weight", "classifier.bias"}
    noise = torch.randn_like(images)
    assert torch.equal(model(images, noise=noise).logits, model(images, noise=noise).logits)


def test_fine_tuning_reaches_every_parameter_up_to_the_tap(images):
    model = make_model(layer="up_blocks.0.attentions.0").train()
    model(images, labels=torch.zeros(5, dtype=torch.long)).loss.backward()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    assert "ddae.denoiser.conv_in.weight" in with_gradient
    assert "ddae.denoiser.up_blocks.0.attentions.0.to_q.weight" in with_gradient
    assert "ddae.denoiser.up_blocks.0.resnets.1.conv1.weight" not in with_gradient


# A denoiser and what else a config of it needs.
DENOISERS = {
    "unet": (make_unet, {}, {}),
    "conditional unet": (make_unet, {"num_class_embeds": 6}, {"null_class": 5}),
    "learned times": (make_unet, {"time_embedding_type": "learned", "num_train_timesteps": 1000}, {}),
    "dit": (make_dit, {}, {}),
    "latents": (make_unet, {"in_channels": 4, "out_channels": 4}, {"vae": plain_config(make_vae())}),
}


def asks_and_gets(model):
    """The parameters that ask for a gradient in training, and those that get one."""
    model.train()
    batch = torch.rand(2, 3, *model.config.image_size)
    out = model(batch)
    (out.logits if hasattr(out, "logits") else out.feature_maps[0]).square().mean().backward()
    parameters = dict(model.named_parameters())
    return {n for n, p in parameters.items() if p.requires_grad}, {
        n for n, p in parameters.items() if p.grad is not None
    }


@pytest.mark.parametrize("kind", list(DENOISERS))
def test_what_asks_for_a_gradient_gets_one(kind, tmp_path):
    """After construction and after every kind of opening."""
    make, options, own = DENOISERS[kind]
    config = DDAEConfig(denoiser=plain_config(make(**options)), num_labels=3, **own)
    model = DDAEForImageClassification(config)
    model.save_pretrained(tmp_path / "whole")
    parts = {"vae": model.ddae.vae} if "vae" in own else {}
    pipeline = DDAEPipeline.for_denoiser(model.ddae.denoiser, model.ddae.scheduler, config.null_class, **parts)
    pipeline.save_pretrained(tmp_path / "pipeline")
    model.save_head(tmp_path / "head", base=tmp_path / "pipeline")
    opened = [
        DDAEForImageClassification.from_pretrained(tmp_path / "whole"),
        DDAEForImageClassification.from_pretrained(tmp_path / "whole", output_loading_info=True)[0],
        DDAEForImageClassification.from_pretrained(tmp_path / "pipeline", num_labels=3),
        DDAEForImageClassification.from_pretrained(tmp_path / "head"),
        DDAEBackbone.from_pretrained(tmp_path / "pipeline"),
    ]
    for one in (model, *opened):
        asked, got = asks_and_gets(one)
        assert asked == got
        assert any("block" in name for name in got) and len(got) < len(list(one.parameters()))
    whole = DDAEModel.from_pretrained(tmp_path / "pipeline")
    assert all(p.requires_grad for p in whole.denoiser.parameters())
    assert whole.vae is None or not any(p.requires_grad for p in whole.vae.parameters())


def test_frequencies_that_a_denoiser_has_fixed_do_not_learn():
    network = make_unet(time_embedding_type="fourier")
    learning = learning_parameters(json.dumps(plain_config(network)), ())
    assert {name for name, _ in network.named_parameters()} - learning == {"time_proj.weight"}


def test_hidden_states_that_would_not_learn_are_refused_in_training(images):
    model, last = make_model(layer="mid_block"), ["up_blocks.1.resnets.1"]
    backbone = DDAEBackbone(make_config(out_features=["mid_block"]))
    for made in (model, backbone):
        deeper = {"output_hidden_states": last if made is model else True}
        assert made.eval()(images, **deeper).hidden_states
        made.train()
        with torch.no_grad():
            made(images, **deeper)
        with pytest.raises(ValueError, match=r"up_blocks\.1\.resnets\.1 are asked for in training"):
            made(images, **deeper)
        made.freeze_denoiser()
        assert made(images, **deeper).hidden_states
        made.ddae.denoiser.requires_grad_(True)
        made(images, **deeper).hidden_states[-1].mean().backward()
        assert made.ddae.denoiser.up_blocks[1].resnets[1].conv1.weight.grad is not None


@pytest.mark.parametrize("kind", list(DENOISERS))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_stays_in_float32_is_there(kind, dtype, tmp_path):
    make, options, own = DENOISERS[kind]
    config = DDAEConfig(denoiser=plain_config(make(**options)), num_labels=3, **own)
    DDAEForImageClassification(config).save_pretrained(tmp_path)
    for cls in (DDAEForImageClassification, DDAEModel, DDAEBackbone):
        model = cls.from_pretrained(tmp_path, dtype=dtype)
        types = {name: p.dtype for name, p in model.named_parameters()}
        for kept in model._keep_in_fp32_modules | model._keep_in_fp32_modules_strict:
            assert any(f".{kept}." in f".{name}" for name in types)
        exact = ("time_proj.", "vae.") if dtype == torch.float16 else ("time_proj.",)
        for name, found in types.items():
            assert found == (torch.float32 if any(part in name for part in exact) else dtype)


@torch.no_grad()
def test_batch_norm_statistics_survive_saving(images, tmp_path):
    model = make_model(feature_norm="batch_norm")
    model.feature_norm.running_mean.normal_()
    model.feature_norm.running_var.uniform_(1, 2)
    model.save_pretrained(tmp_path)
    loaded = DDAEForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded.feature_norm.running_mean, model.feature_norm.running_mean)
    torch.testing.assert_close(loaded(images).logits, model(images).logits)


def test_opening_a_denoiser_does_not_redraw_it(layouts):
    model = DDAEForImageClassification.from_pretrained(layouts / "pipeline", num_labels=4)
    assert fingerprint(model.ddae.denoiser) == fingerprint(make_unet()) == model.config.generator_fingerprint
    assert model.classifier.weight.std() > 0 and model.classifier.weight.isfinite().all()


def test_a_model_without_weights_starts_as_diffusers_does():
    """Not from transformers' N(0, 0.02)."""
    weights = make_model(DDAEModel).denoiser.conv_in.weight
    reference = make_unet(seed=5).conv_in.weight
    assert weights.std().item() == pytest.approx(reference.std().item(), rel=0.1) and weights.std() > 0.08


def test_base_model_weights_open_in_a_classifier(images, tmp_path):
    base = make_model(DDAEModel)
    base.save_pretrained(tmp_path)
    classifier = DDAEForImageClassification.from_pretrained(tmp_path, num_labels=3)
    with torch.no_grad():
        assert torch.equal(classifier.ddae(images).pooler_output, base(images).pooler_output)


@torch.no_grad()
def test_compiles_to_one_graph_and_exports(images):
    model = make_model()
    expected = model(images).logits
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")(images).logits
    torch.testing.assert_close(compiled, expected)
    batch = torch.export.Dim("batch", min=2, max=63)
    exported = torch.export.export(model, (images,), dynamic_shapes={"pixel_values": {0: batch}}).module()
    torch.testing.assert_close(exported(images).logits, expected)
    torch.testing.assert_close(exported(images[:3]).logits, expected[:3], rtol=1e-4, atol=1e-5)


def compile_whole(model):
    return torch.compile(model)


def compile_denoiser(model):
    model.base_model.denoiser = torch.compile(model.base_model.denoiser)
    return model


def compile_denoiser_in_place(model):
    model.base_model.denoiser.compile()
    return model


def compile_base_model(model):
    model.ddae = torch.compile(model.ddae)
    return model


def compile_blocks(model):
    denoiser = model.base_model.denoiser
    denoiser.mid_block = torch.compile(denoiser.mid_block)
    denoiser.up_blocks[0].resnets[0] = torch.compile(denoiser.up_blocks[0].resnets[0])
    return model


COMPILED = [compile_whole, compile_denoiser, compile_denoiser_in_place, compile_base_model, compile_blocks]


@torch.no_grad()
@pytest.mark.parametrize("compiled", COMPILED)
@pytest.mark.parametrize("cls", [DDAEModel, DDAEForImageClassification, DDAEBackbone])
def test_what_is_compiled_is_saved_as_the_network_that_it_is(cls, compiled, tmp_path):
    if cls is DDAEModel and compiled is compile_base_model:
        pytest.skip("a model is its own base model")
    plain = make_model(cls)
    model = compiled(copy.deepcopy(plain))
    assert fingerprint(model) == fingerprint(plain)
    denoiser, same = model.base_model.denoiser, plain.base_model.denoiser
    assert fingerprint(denoiser, dtype=None) == fingerprint(same, dtype=None)
    assert plain_config(denoiser) == plain_config(same)
    model.save_pretrained(tmp_path / "whole")
    assert load_file(tmp_path / "whole" / "model.safetensors").keys() == plain.state_dict().keys()
    opened = cls.from_pretrained(tmp_path / "whole")
    assert fingerprint(opened, dtype=None) == fingerprint(plain, dtype=None)
    # Tensors go in under either names, into what is compiled and into what is not.
    target = getattr(model, "_orig_mod", model)
    inside = dict(target.named_parameters())
    assert any("_orig_mod" in name for name in inside) == (compiled not in (compile_whole, compile_denoiser_in_place))
    for into, names in ((target, plain.state_dict()), (plain, inside), (target, inside)):
        into.load_state_dict({name: torch.full_like(value, len(names)) for name, value in names.items()})
        assert all((value == len(names)).all() for value in into.state_dict().values())
        with torch.no_grad():
            for parameter in into.parameters():
                parameter.zero_()
    with pytest.raises(RuntimeError, match="Missing key"):
        target.load_state_dict({})


@pytest.mark.parametrize("compiled", COMPILED)
def test_state_dicts_have_the_names_of_torchs_parameters(compiled):
    """As torch's own functions and what has the model inside count on."""
    model = compiled(make_model())
    whole = nn.ModuleDict({"other": torch.compile(nn.Linear(2, 2)), "model": model})
    for module in (model, whole):
        names = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
        assert set(module.state_dict()) == {name for name in names if not name.endswith("fixed_noise")}
        module.load_state_dict(module.state_dict())
        set_model_state_dict(module, get_model_state_dict(module))


@torch.no_grad()
def test_levels_and_labels_without_values_are_not_looked_at(images):
    """As where memory is estimated, and where a graph is recorded below autograd."""
    model, levels, labels = make_model(), torch.full((5,), 0.5), torch.zeros(5).long()
    recorded = make_fx(lambda images, levels, labels: model(images, labels, sigma=levels).loss)(images, levels, labels)
    torch.testing.assert_close(recorded(images, levels, labels), model(images, labels, sigma=levels).loss)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert model(torch.rand(2, 3, 8, 8), torch.zeros(2).long(), sigma=torch.ones(2)).loss.shape == ()


@torch.no_grad()
@pytest.mark.parametrize("compiled", COMPILED)
def test_a_compiled_classifiers_head_knows_its_base(compiled, images, tmp_path):
    DDAEPipeline(make_unet(), DDIMScheduler()).save_pretrained(tmp_path)
    plain = DDAEForImageClassification.from_pretrained(tmp_path, num_labels=3)
    compiled(copy.deepcopy(plain)).save_head(tmp_path)
    assert load_file(tmp_path / "head.safetensors").keys() == {"classifier.weight", "classifier.bias"}
    assert torch.equal(DDAEForImageClassification.from_pretrained(tmp_path)(images).logits, plain(images).logits)


def test_what_version_0_1_0_saved_of_a_compiled_network_opens(tmp_path):
    """It wrote the names that the network has under `torch.compile`, and could not read them."""
    model = make_model()
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    renamed = {name.replace("ddae.denoiser.", "ddae.denoiser._orig_mod."): value for name, value in state.items()}
    save_file(renamed, tmp_path / "model.safetensors", {"format": "pt"})
    assert fingerprint(DDAEForImageClassification.from_pretrained(tmp_path)) == fingerprint(model)
    for cls in (DDAEModel, DDAEPipeline):
        assert fingerprint(cls.from_pretrained(tmp_path).denoiser) == fingerprint(model.ddae.denoiser)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_that_was_cast_is_the_one_that_opens(images, tmp_path, dtype):
    """Whose fixed noise is the same, in float32."""
    model = make_model().to(dtype)
    assert torch.equal(model.ddae.fixed_noise, make_model().ddae.fixed_noise)
    model.save_pretrained(tmp_path)
    opened = DDAEForImageClassification.from_pretrained(tmp_path)
    assert opened.dtype == dtype and torch.equal(opened(images).logits, model(images).logits)


@torch.no_grad()
def test_channels_last_and_bfloat16_stay_close(images):
    model = make_model()
    expected = model(images).logits
    channels_last = copy.deepcopy(model).to(memory_format=torch.channels_last)(images).logits
    torch.testing.assert_close(channels_last, expected, rtol=1e-4, atol=1e-5)
    half = copy.deepcopy(model).bfloat16()(images).logits
    assert half.dtype == torch.bfloat16 and (half - expected).norm() < 0.1 * expected.norm()


def test_transformers_trainer_trains_a_probe(images, tmp_path):
    model = make_model()
    model.freeze_denoiser()
    before = fingerprint(model.ddae.denoiser)
    data = [{"pixel_values": image, "labels": i % 4} for i, image in enumerate(images)]
    arguments = TrainingArguments(
        tmp_path, max_steps=30, learning_rate=0.05, per_device_train_batch_size=5, report_to=[], save_strategy="no",
        use_cpu=True, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    labels = torch.tensor([d["labels"] for d in data])
    loss = model(images, labels=labels).loss.item()
    accuracy = lambda p: {"accuracy": (p.predictions.argmax(-1) == p.label_ids).mean()}  # noqa: E731
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data, compute_metrics=accuracy)
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy"] == 1 and metrics["eval_loss"] < 0.5 * loss
    model.eval()
    assert model(images, labels=labels).loss.item() < 0.5 * loss
    assert fingerprint(model.ddae.denoiser) == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
def test_a_gpu_gives_the_cpus_predictions(images):
    model = make_model()
    expected = model(images).logits
    logits = copy.deepcopy(model).to("cuda", memory_format=torch.channels_last)(images.cuda()).logits.cpu()
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("kind", [DDAEModel, DDAEForImageClassification])
def test_weights_that_were_cut_short_are_refused_by_their_files_name(kind, share, tmp_path):
    DDAEForImageClassification(make_config()).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=f"{path} cannot be read: .* save or download it again"):
        kind.from_pretrained(tmp_path)
