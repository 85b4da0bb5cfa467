"""What a denoiser is trained for besides denoising: formulas in float64, what gradients reach, and whole runs."""

import copy
import json
import math
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from diffusers import (
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from PIL import Image
from safetensors.torch import load_file, save_file

from ddae_hf import DDAEPipeline
from ddae_hf.experiments import Images, encode
from ddae_hf.experiments.auxiliary import TERMS, WEIGHTS, Seen, Setting, Terms, less_noisy
from ddae_hf.experiments.draws import RowDraws
from ddae_hf.experiments.latent_folder import LatentFolder
from ddae_hf.experiments.pretraining import Pretraining, PretrainingOptions, pretrain, training_inputs
from ddae_hf.experiments.pretraining_data import training_data
from ddae_hf.experiments.results import PretrainingReport
from ddae_hf.experiments.run_folder import note_files
from ddae_hf.generators import normal
from ddae_hf.hidden_states import learning_parameters
from ddae_hf.noise import family_of

from .conftest import assert_equal, files_of, make_dit, make_unet, make_vae

UNET = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": [16, 32], "layers_per_block": 1}
UNET |= {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}
UNET |= {"norm_num_groups": 8, "attention_head_dim": 8}
DIT = {"_class_name": "DiTTransformer2DModel", "sample_size": 8, "in_channels": 1, "num_layers": 3}
DIT |= {"num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 2}
EDM, FLOW = {"_class_name": "EDMEulerScheduler"}, {"_class_name": "FlowMatchEulerDiscreteScheduler"}
EARLY, LATE = "down_blocks.1.attentions.0", "up_blocks.1.resnets.0"
DISPERSIVE = {"term": "dispersive", "layer": EARLY}
ALIGNMENT = {"term": "self_alignment", "layer": EARLY, "averaged_layer": LATE}
DISTILLATION = {"term": "self_distillation", "layer": EARLY, "hidden_size": 24, "output_size": 6}
ALL = [DISPERSIVE, ALIGNMENT, DISTILLATION]
OF_DIT = [{**term, "layer": "transformer_blocks.0"} for term in ALL]
OF_DIT[1] = {**OF_DIT[1], "averaged_layer": "transformer_blocks.1"}


# Levels of the averaged network

SCHEDULERS = {"DDPM": DDPMScheduler, "EDM": EDMEulerScheduler, "flow": FlowMatchEulerDiscreteScheduler}


@pytest.mark.parametrize("learned", [0.0, 0.5])
@pytest.mark.parametrize("lowered", [0.2, 1.0])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_levels_are_lowered_in_the_time_of_flow_matching(name, lowered, learned):
    family = family_of(SCHEDULERS[name]())
    lowest = max(family.sigma_range()[0], learned)
    sigma = torch.tensor([0.02, 0.05, 0.24, 0.25, 0.26, 1.0, 7.0, 80.0, *family.training_range("sigma")]).repeat(50)
    found = less_noisy(sigma, lowest, lowered, RowDraws(3, range(len(sigma)), "cpu"))
    shares = RowDraws(3, range(len(sigma)), "cpu").uniform(tuple(sigma.shape)).double().numpy()
    before = sigma.double().numpy()
    with np.errstate(divide="ignore"):
        time = np.maximum(1 / (1 + 1 / before) - lowered * shares, 0)
        expected = np.minimum(np.maximum(time / (1 - time), lowest), before)
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=1e-4, atol=1e-7)
    assert (found <= sigma).all() and (found < sigma).any()
    clean = torch.zeros(len(sigma), 1, 2, 2)
    noisy, timestep = family.noisy(clean, clean + 1, found)  # which refuses levels that the family does not have
    assert noisy.isfinite().all() and timestep.isfinite().all()


def test_equal_levels_draw_nothing():
    sigma = torch.tensor([0.5, 2.0])
    draws = RowDraws(0, range(2), "cpu")
    assert less_noisy(sigma, 0.002, 0.0, draws) is sigma and draws.drawn == 0


# Formulas


def made(given, network, states, averaged=None):
    """A term alone, and what it is of hidden states."""
    terms = Terms([given], Setting(network, None, torch.device("cpu"), 0))
    count = len(next(iter(states.values())))
    seen = Seen(
        torch.zeros(count, 3, 8, 8), torch.zeros(count, 3, 8, 8), torch.ones(count), states, averaged or {}, None
    )
    name = given["term"]
    return terms.terms[name], terms(seen, [name])[name]


def weights_of(module):
    return [value.detach().double().numpy() for value in module.parameters()]


def projected(layers, positions):
    """A projection of (..., C) in float64."""
    first, first_bias, second, second_bias = layers
    inside = positions @ first.T + first_bias
    return inside / (1 + np.exp(-inside)) @ second.T + second_bias


def drawn(*shape, scale=1.0):
    return torch.from_numpy(np.random.default_rng(len(shape)).normal(1.0, scale, shape)).float()


@pytest.mark.parametrize("shape", [(6, 64, 4, 4), (5, 16, 32)])
def test_dispersion_is_the_log_of_a_mean_over_all_pairs(shape):
    network, layer = (make_unet(), "mid_block") if len(shape) == 4 else (make_dit(), "transformer_blocks.1")
    state = drawn(*shape, scale=0.7)
    _, found = made({"term": "dispersive", "layer": layer, "temperature": 0.4, "weight": 3.0}, network, {layer: state})
    flat = state.double().numpy().reshape(len(state), -1)
    pairs = [[np.exp(-np.square(a - b).sum() / (flat.shape[1] * 0.4)) for b in flat] for a in flat]
    assert found.item() == pytest.approx(3.0 * np.log(np.mean(pairs)), rel=1e-4)


def averaged_over(maps, side):
    """Means over squares of maps (B, H, W, C)."""
    count, height, width, channels = maps.shape
    return maps.reshape(count, side, height // side, side, width // side, channels).mean((2, 4))


# The layer and its map, and those of the averaged network; the sides of their maps in the test are 8 and 4, or equal.
ALIGNED = {
    "U-Net, equal": ("down_blocks.1.attentions.0", (64, 4, 4), "mid_block", (64, 4, 4)),
    "U-Net, larger": ("down_blocks.0.resnets.0", (32, 8, 8), "mid_block", (64, 4, 4)),
    "U-Net, smaller": ("mid_block", (64, 4, 4), "up_blocks.1.resnets.0", (32, 8, 8)),
    "DiT": ("transformer_blocks.0", (16, 32), "transformer_blocks.2", (16, 32)),
}


@pytest.mark.parametrize("distance", ["smooth_l1", "cosine"])
@pytest.mark.parametrize("name", ALIGNED)
def test_self_alignment_is_the_mean_distance_of_projected_maps(name, distance):
    layer, shape, averaged_layer, wanted_shape = ALIGNED[name]
    network = make_dit() if name == "DiT" else make_unet()
    state, wanted = drawn(3, *shape), drawn(3, *wanted_shape, scale=0.5)
    given = {"term": "self_alignment", "layer": layer, "averaged_layer": averaged_layer, "distance": distance}
    term, found = made({**given, "weight": 2.0, "hidden_size": 24}, network, {layer: state}, {averaged_layer: wanted})
    one, other = (value.double().numpy() for value in (state, wanted))
    if name != "DiT":
        one, other = one.transpose(0, 2, 3, 1), other.transpose(0, 2, 3, 1)
    one = projected(weights_of(term.projection), one)
    if name != "DiT" and one.shape != other.shape:
        side = min(one.shape[1], other.shape[1])
        one, other = averaged_over(one, side), averaged_over(other, side)
    error = np.abs(one - other)
    if distance == "smooth_l1":
        expected = np.where(error < 0.05, error**2 / 0.1, error - 0.025).mean()
    else:
        lengths = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
        expected = (1 - (one * other).sum(-1) / lengths).mean()
    assert found.item() == pytest.approx(2.0 * expected, rel=1e-4)


def test_a_projection_is_as_wide_inside_as_both_layers_together():
    term, _ = made(
        {"term": "self_alignment", "layer": "down_blocks.0.resnets.0", "averaged_layer": "mid_block"},
        make_unet(), {"down_blocks.0.resnets.0": drawn(2, 32, 8, 8)}, {"mid_block": drawn(2, 64, 4, 4)},
    )  # fmt: skip
    assert [tuple(value.shape) for value in term.parameters()] == [(96, 32), (96,), (64, 96), (64,)]


@pytest.mark.parametrize("name", ["U-Net", "DiT"])
def test_self_distillation_is_the_cross_entropy_of_finding_an_image_again(name):
    network, layer = (make_unet(), "mid_block") if name == "U-Net" else (make_dit(), "transformer_blocks.1")
    shape = (5, 64, 4, 4) if name == "U-Net" else (5, 16, 32)
    state = drawn(*shape)
    averaged = state + 0.3 * drawn(*shape).flip(0)
    given = {"term": "self_distillation", "layer": layer, "hidden_size": 24, "output_size": 6, "temperature": 0.3}
    term, found = made({**given, "weight": 1.0}, network, {layer: state}, {layer: averaged})

    def pooled(hidden):
        hidden = hidden.double().numpy()
        means = hidden.mean((2, 3)) if name == "U-Net" else hidden.mean(1)
        return (means - means.mean(1, keepdims=True)) / np.sqrt(means.var(1, keepdims=True) + 1e-5)

    projector, predictor = weights_of(term.projector), weights_of(term.predictor)
    asked = projected(predictor, projected(projector, pooled(state)))
    known = projected(projector, pooled(averaged))
    losses = []
    for i, own in enumerate(asked):
        cosines = [own @ other / np.linalg.norm(own) / np.linalg.norm(other) for other in known]
        likely = np.exp(np.array(cosines) / 0.3)
        losses.append(-np.log(likely[i] / likely.sum()))
    assert found.item() == pytest.approx(np.mean(losses), rel=1e-4)


def test_self_distillation_has_no_gradient_through_the_averaged_network_s_side():
    """The projector, which both sides have, learns of the network in training alone."""
    state, averaged = drawn(5, 16, 32), drawn(5, 16, 32).flip(0)
    given = {"term": "self_distillation", "layer": "transformer_blocks.1", "hidden_size": 24, "output_size": 6}
    term, found = made(given, make_dit(), {given["layer"]: state}, {given["layer"]: averaged})
    found.backward()
    exact = copy.deepcopy(term).double()
    exact.zero_grad()
    one, other = (torch.nn.functional.layer_norm(each.double().mean(1), (32,)) for each in (state, averaged))
    asked = torch.nn.functional.normalize(exact.predictor(exact.projector(one)))
    known = torch.nn.functional.normalize(exact.projector(other)).detach()
    (0.1 * torch.nn.functional.cross_entropy(asked @ known.T / 0.2, torch.arange(5))).backward()
    for weight, expected in zip(term.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(weight.grad.double(), expected.grad, rtol=1e-3, atol=1e-7)


# Gradients


@pytest.fixture(scope="module")
def images():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    return Images.open([Image.fromarray(image) for image in pixels], labels=np.arange(40) % 4)


def small(**changes):
    """Options of a small training."""
    given = {"denoiser": UNET, "total_batch_size": 8, "max_train_steps": 4, "sample_steps": 0, "learning_rate": 1e-3}
    return {**given, "lr_warmup_steps": 0, "mixed_precision": "no", "seed": 1, **changes}


def first_losses(images, steps=0, **changes):
    """A run, and the parts of the loss of its first batch, as if so many steps were done."""
    options = PretrainingOptions(**small(**changes))
    with options.accelerated() as accelerator:
        run = Pretraining(options, accelerator, training_data(images, options), None)
        batch = next(run.loop.batches())
        run.loop.progress.steps = steps
        torch.manual_seed(0)
        return run, run.loss(batch, run.loop.draws(8))


@pytest.mark.parametrize("network", ["U-Net", "DiT"])
@pytest.mark.parametrize("number", range(len(ALL)))
def test_gradients_reach_what_is_before_the_layer_and_nothing_else(images, network, number):
    denoiser, terms = (UNET, ALL) if network == "U-Net" else (DIT, OF_DIT)
    run, parts = first_losses(images, denoiser=denoiser, auxiliary=[terms[number]])
    name = terms[number]["term"]
    assert list(parts) == ["denoising", name]
    parts[name].backward()
    reached = {name for name, weight in run.loop.module.named_parameters() if weight.grad is not None}
    config = json.dumps(dict(run.loop.module.config) | {"_class_name": type(run.loop.module).__name__})
    assert reached == learning_parameters(config, (terms[number]["layer"],))
    assert reached < {name for name, _ in run.loop.module.named_parameters()}
    assert all(weight.grad.abs().max() > 0 for weight in run.terms.parameters())
    assert all(weight.grad is None for weight in run.average.parameters())
    assert not any(weight.requires_grad for weight in run.average.parameters())


# The passes of a step


@pytest.fixture
def computed(monkeypatch):
    """How often each convolution and linear layer was computed."""
    counts = Counter()
    for kind in (torch.nn.Conv2d, torch.nn.Linear):

        def counted(module, hidden, forward=kind.forward):
            counts[module] += 1
            return forward(module, hidden)

        monkeypatch.setattr(kind, "forward", counted)
    return counts


def test_a_step_is_one_pass_of_each_u_net_and_the_averaged_one_ends_early(images, computed):
    """All terms share the pass, which ends at the deepest layer that one of them reads."""
    run, _ = first_losses(images, auxiliary=ALL)
    own, averaged = run.loop.module, run.average
    first, second = averaged.up_blocks[1].resnets
    assert [computed[own.conv_in], computed[own.conv_out]] == [1, 1]
    assert [computed[averaged.conv_in], computed[first.conv2]] == [1, 1]
    assert [computed[second.conv1], computed[averaged.conv_out]] == [0, 0]


def test_a_step_is_one_pass_of_each_dit_and_the_averaged_one_ends_early(images, computed):
    run, _ = first_losses(images, denoiser=DIT, auxiliary=OF_DIT)
    own, averaged = run.loop.module, run.average
    _, second, third = averaged.transformer_blocks
    assert [computed[own.pos_embed.proj], computed[own.proj_out_2]] == [1, 1]
    assert [computed[averaged.pos_embed.proj], computed[second.attn1.to_q]] == [1, 1]
    assert computed[third.attn1.to_q] == 0


@pytest.mark.parametrize("auxiliary", [[DISPERSIVE], [DISPERSIVE, {**ALIGNMENT, "until": 0.25}]])
def test_the_averaged_network_is_left_alone_where_no_term_asks_for_it(images, computed, auxiliary):
    run, _ = first_losses(images, steps=1, auxiliary=auxiliary)
    assert computed[run.loop.module.conv_in] == 1 and computed[run.average.conv_in] == 0


READ = {
    "DDPM": {},
    "DDPM, no low levels": {"sigma_min": 0.5, "sigma_max": 1.0},
    "DDPM, the same levels": {"auxiliary": [{**ALIGNMENT, "lowered": 0.0}]},
    "EDM": {"scheduler": EDM, "log_sigma": [0.0, 2.0]},
    "flow": {"scheduler": FLOW},
}


@pytest.mark.parametrize("name", READ)
def test_the_averaged_network_sees_the_same_images_noise_and_classes_at_lower_levels(images, name, monkeypatch):
    """It is not in training: nothing in it is dropped. What denoising draws comes first, as without terms."""
    given = {"auxiliary": [ALIGNMENT], "denoiser": {**UNET, "dropout": 0.3}, **READ[name]}
    options = PretrainingOptions(**small(class_conditional=True, label_dropout=0.5, random_flip=True, **given))
    handed, forward = [], Terms.forward
    monkeypatch.setattr(Terms, "forward", lambda terms, seen, names: handed.append(seen) or forward(terms, seen, names))
    with options.accelerated() as accelerator:
        run = Pretraining(options, accelerator, training_data(images, options), None)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in run.average.parameters():  # else both networks would be the same
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
        batch = next(run.loop.batches())
        draws = run.loop.draws(8)
        clean, labels = training_inputs(options, dict(batch), run.diffusion.own, draws)
        family = run.diffusion.family
        sigma = family.draw(8, clean.device, draws, **run.levels)
        noise = normal(clean.shape, clean.device, draws)
        lowered = options.auxiliary[0].get("lowered", 0.2)
        shares = draws.uniform((8,)).double() if lowered else torch.zeros(8)
        run.loss(batch, run.loop.draws(8))
    seen = handed[0]
    assert torch.equal(seen.clean, clean) and torch.equal(seen.noise, noise) and torch.equal(seen.sigma, sigma)
    assert len(set(labels.tolist())) > 1
    time = (sigma.double() / (1 + sigma.double()) - lowered * shares).clamp(min=0)
    lowest = max(family.sigma_range()[0], options.sigma_min or 0)
    lower = torch.minimum((time / (1 - time)).clamp(min=lowest), sigma.double()).float()
    read = []
    run.average.get_submodule(LATE).register_forward_hook(lambda module, inputs, output: read.append(output))
    noisy, timestep = family.noisy(clean, noise, lower)
    run.average.eval()(noisy, timestep, class_labels=labels)
    torch.testing.assert_close(seen.averaged[LATE], read[0], rtol=1e-3, atol=1e-4)
    assert not seen.averaged[LATE].requires_grad and seen.states[EARLY].requires_grad


# Whole runs


@pytest.fixture(scope="module")
def plain(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    return folder, pretrain(images, **small(output_dir=str(folder)))


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    """A run with every term, one of which stops early, and with a term twice."""
    folder = tmp_path_factory.mktemp("trained")
    given = small(auxiliary=[*ALL, {**DISPERSIVE, "until": 0.5}], checkpointing_steps=2)
    return folder, pretrain(images, output_dir=str(folder), **given), given


def test_without_terms_nothing_changes(images, plain, tmp_path):
    folder, result = plain
    again = pretrain(images, **small(output_dir=str(tmp_path), auxiliary=[]))
    assert_equal(files_of(folder), files_of(tmp_path))
    assert again.loss_last_100_batches == result.loss_last_100_batches
    assert again.parts_last_100_batches == result.parts_last_100_batches == {}


@pytest.mark.parametrize("scheduler", [{}, EDM, FLOW])
def test_the_denoising_part_is_the_plain_loss_to_the_bit(images, scheduler):
    denoiser = {**UNET, "dropout": 0.1}
    _, loss = first_losses(images, denoiser=denoiser, scheduler=scheduler, random_flip=True)
    _, parts = first_losses(images, denoiser=denoiser, scheduler=scheduler, random_flip=True, auxiliary=ALL)
    assert torch.equal(parts["denoising"], loss)


def test_terms_of_no_weight_leave_the_training_as_it_was(images, plain, tmp_path):
    terms = [{**term, "weight": 0.0} for term in ALL]
    pretrain(images, **small(output_dir=str(tmp_path), auxiliary=terms))
    assert_equal(files_of(plain[0]), files_of(tmp_path))


def test_parts_are_logged_and_add_up(images, monkeypatch):
    logged = []
    monkeypatch.setattr(Accelerator, "log", lambda accelerator, values, step: logged.append((step, values)))
    monkeypatch.setattr("ddae_hf.experiments.training.LOOKS", 1)
    result = pretrain(images, **small(auxiliary=ALL))
    assert [step for step, _ in logged] == [1, 2, 3, 4]
    for _, values in logged:
        parts = {name: value for name, value in values.items() if name not in ("loss", "lr")}
        assert list(parts) == ["denoising", "dispersive", "self_alignment", "self_distillation"]
        assert sum(parts.values()) == pytest.approx(values["loss"], abs=1e-6)
    assert result.parts_last_100_batches == pytest.approx(parts)
    assert sum(result.parts_last_100_batches.values()) == pytest.approx(result.loss_last_100_batches, abs=1e-6)


def test_a_term_stops_after_its_share_of_the_steps(images, trained):
    folder, result, _ = trained
    assert list(result.parts_last_100_batches) == [
        "denoising", "dispersive", "self_alignment", "self_distillation", "dispersive_2",
    ]  # fmt: skip
    progress = json.loads((folder / "checkpoint-4" / "state" / "progress.json").read_text())
    assert {name: len(values) for name, values in progress["parts"].items()} == {
        "denoising": 4, "dispersive": 4, "self_alignment": 4, "self_distillation": 4, "dispersive_2": 2,
    }  # fmt: skip
    assert progress["parts"]["dispersive_2"] == progress["parts"]["dispersive"][:2]


def test_a_term_that_has_stopped_has_no_share_in_gradients(images):
    """Its weights get zeros, as a distributed one waits for all; where all have stopped they get none."""
    stopped = {**ALIGNMENT, "until": 0.25}
    run, parts = first_losses(images, steps=1, auxiliary=[stopped, DISTILLATION])
    assert list(parts) == ["denoising", "self_distillation"]
    parts["self_distillation"].backward()
    assert all(weight.grad.abs().max() == 0 for weight in run.terms.terms["self_alignment"].parameters())
    _, parts = first_losses(images, steps=1, auxiliary=[stopped])
    assert list(parts) == ["denoising"]


def resumed(images, source, folder, given, step=2):
    (folder / f"checkpoint-{step}").symlink_to(source / f"checkpoint-{step}")
    return pretrain(images, **{**given, "output_dir": str(folder), "resume_from_checkpoint": "latest"})


def test_a_run_with_every_term_resumes_exactly(images, trained, tmp_path):
    folder, result, given = trained
    again = resumed(images, folder, tmp_path, given)
    assert again.images_this_run == 16
    for part in ("unet", "raw", "checkpoint-4"):
        assert_equal(files_of(folder / part), files_of(tmp_path / part))
    heads, before = (load_file(folder / f"checkpoint-{step}" / WEIGHTS) for step in (4, 2))
    assert len(heads) == 4 + 8 and not any(torch.equal(heads[name], before[name]) for name in heads)
    assert again.loss_last_100_batches == result.loss_last_100_batches
    assert again.parts_last_100_batches == result.parts_last_100_batches


@pytest.mark.parametrize(
    "auxiliary",
    [[], ALL, [{**DISPERSIVE, "weight": 0.3}, *ALL[1:], {**DISPERSIVE, "until": 0.5}]],
)
def test_a_run_does_not_go_on_with_other_terms(images, trained, tmp_path, auxiliary):
    folder, _, given = trained
    with pytest.raises(ValueError, match="trained with other options: auxiliary was"):
        resumed(images, folder, tmp_path, {**given, "auxiliary": auxiliary})


def test_a_run_without_terms_does_not_go_on_with_some(images, tmp_path):
    pretrain(images, **small(output_dir=str(tmp_path / "plain"), checkpointing_steps=2))
    (tmp_path / "resumed").mkdir()
    with pytest.raises(ValueError, match="trained with other options: auxiliary was"):
        resumed(images, tmp_path / "plain", tmp_path / "resumed", small(auxiliary=[ALIGNMENT]))


@pytest.mark.parametrize("damage", ["lost", "cut", "another"])
def test_weights_of_terms_that_are_lost_or_damaged_are_refused(images, trained, tmp_path, damage):
    folder, _, given = trained
    checkpoint = tmp_path / "run" / "checkpoint-2"
    shutil.copytree(folder / "checkpoint-2", checkpoint)
    path = checkpoint / WEIGHTS
    if damage == "lost":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    else:
        save_file({"terms": torch.zeros(3)}, path)
    note_files(checkpoint)  # so that what is whole is another question
    words = "has no state/auxiliary.safetensors" if damage == "lost" else "auxiliary.safetensors is damaged"
    with pytest.raises(ValueError, match=words):
        pretrain(images, **{**given, "output_dir": str(tmp_path / "run"), "resume_from_checkpoint": "latest"})


def test_what_is_saved_is_a_stock_checkpoint_without_terms(images, plain, trained):
    bare, folder = plain[0], trained[0]
    names = {str(path.relative_to(bare)) for path in bare.rglob("*") if path.is_file()}
    for place in (folder, folder / "checkpoint-2"):
        found = {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()}
        assert {name for name in found if "checkpoint-" not in name and "state" not in name} - names <= {"files.json"}
    assert not [key for key in files_of(folder / "unet") | files_of(folder / "raw") if "project" in str(key)]
    for part in ("unet", "raw/unet"):
        assert files_of(folder / part).keys() == files_of(bare / part).keys()
        network, info = UNet2DModel.from_pretrained(folder / part, output_loading_info=True)
        assert not info["unexpected_keys"] and not info["missing_keys"]
        assert type(network) is UNet2DModel
    counts = [PretrainingReport.read(place).parameters for place in (bare, folder)]
    assert counts[0] == counts[1] == sum(weight.numel() for weight in network.parameters())
    assert DDAEPipeline.from_pretrained(folder / "raw").denoiser.config.block_out_channels == [16, 32]


def test_terms_of_single_images_take_a_step_in_any_pieces(images, tmp_path):
    terms = [{**ALIGNMENT, "until": 0.75}]
    given = small(auxiliary=terms, adam_epsilon=1e-4, checkpointing_steps=2)
    pretrain(images, **given, output_dir=str(tmp_path / "whole"))
    pretrain(images, **given, output_dir=str(tmp_path / "pieces"), train_batch_size=2)
    (tmp_path / "resumed").mkdir()
    resumed(images, tmp_path / "whole", tmp_path / "resumed", {**given, "train_batch_size": 4})
    expected = files_of(tmp_path / "whole" / "checkpoint-4")
    assert ("state/auxiliary.safetensors", "self_alignment.projection.0.weight") in expected
    for name in ("pieces", "resumed"):
        found = files_of(tmp_path / name / "checkpoint-4")
        assert found.keys() == expected.keys()
        assert max((found[key] - expected[key]).abs().max() for key in expected) < 1e-5


@pytest.mark.parametrize("term", [DISPERSIVE, DISTILLATION])
def test_terms_that_compare_images_go_on_with_the_same_batches_alone(images, tmp_path, term):
    given = small(auxiliary=[term], checkpointing_steps=2)
    pretrain(images, **given, output_dir=str(tmp_path / "whole"))
    (tmp_path / "resumed").mkdir()
    with pytest.raises(ValueError, match="trained with other options: train_batch_size was 8 and is 4"):
        resumed(images, tmp_path / "whole", tmp_path / "resumed", {**given, "train_batch_size": 4})


COMBINED = {
    "U-Net, EDM, classes, bfloat16": {
        "scheduler": EDM, "class_conditional": True, "label_dropout": 0.5, "mixed_precision": "bf16",
    },
    "U-Net, EDM, augmentation, pieces": {"scheduler": EDM, "augment": 0.5, "train_batch_size": 4},
    "U-Net, DDPM, low resolution": {"low_resolution": 4, "low_resolution_share": 0.5, "random_flip": True},
    "U-Net, DDPM, weighted, averages": {
        "loss_weighting": "min_snr", "sigma_min": 0.1, "sigma_max": 10.0, "max_grad_norm": 1.0,
    },
    "self-conditioned U-Net, EDM": {
        "denoiser": {**UNET, "_class_name": "SelfConditionedUNet2DModel"}, "scheduler": EDM,
    },
    "self-conditioned DiT, flow": {
        "denoiser": {**DIT, "_class_name": "SelfConditionedDiTTransformer2DModel"}, "scheduler": FLOW,
    },
    "DiT, flow, classes": {"denoiser": DIT, "scheduler": FLOW, "class_conditional": True, "log_sigma": [0.0, 1.0]},
    "DiT, DDPM, bfloat16, pieces": {"denoiser": DIT, "mixed_precision": "bf16", "train_batch_size": 4},
}  # fmt: skip


@pytest.mark.parametrize("name", COMBINED)
def test_terms_go_with_other_options(images, name, tmp_path):
    terms = OF_DIT if "DiT" in name else ALL
    result = pretrain(images, **small(**COMBINED[name], auxiliary=terms, output_dir=str(tmp_path)))
    parts = result.parts_last_100_batches
    assert list(parts) == ["denoising", "dispersive", "self_alignment", "self_distillation"]
    assert all(math.isfinite(value) for value in parts.values())
    assert parts["self_alignment"] > 0 > parts["dispersive"] and 0 < parts["self_distillation"] < 0.1 * 8
    DDAEPipeline.from_pretrained(tmp_path)


def test_the_averaged_network_is_told_of_augmentation_and_only_where_it_is_read(images):
    run, _ = first_losses(images, augment=0.5, auxiliary=[ALIGNMENT])
    read = run.averaged.own
    assert read is not run.average
    assert all(one is other for one, other in zip(read.parameters(), run.average.parameters(), strict=True))
    assert read.class_embedding is not None and run.average.class_embedding is None
    run, _ = first_losses(images, auxiliary=[ALIGNMENT])
    assert run.averaged.own is run.average


@pytest.mark.parametrize("denoiser", [UNET, DIT])
def test_hidden_states_that_are_computed_twice_give_the_same_training(images, denoiser, tmp_path):
    terms = ALL if denoiser is UNET else OF_DIT
    for name, twice in (("once", False), ("twice", True)):
        given = small(denoiser=denoiser, auxiliary=terms, gradient_checkpointing=twice, max_train_steps=2)
        pretrain(images, **given, output_dir=str(tmp_path / name))
    assert_equal(files_of(tmp_path / "once"), files_of(tmp_path / "twice"))


def test_terms_are_trained_with_on_latents(images, tmp_path):
    make_vae(in_channels=1, out_channels=1, latent_channels=2).save_pretrained(tmp_path / "vae")
    encode(str(tmp_path / "vae"), images, resolution=16, output_dir=str(tmp_path / "latents"))
    denoiser = {name: value for name, value in DIT.items() if name not in ("sample_size", "in_channels")}
    given = small(denoiser=denoiser, scheduler=FLOW, auxiliary=OF_DIT, output_dir=str(tmp_path / "out"))
    result = pretrain(LatentFolder(tmp_path / "latents"), **given)
    assert list(result.parts_last_100_batches) == ["denoising", "dispersive", "self_alignment", "self_distillation"]
    assert DDAEPipeline.from_pretrained(tmp_path / "out").vae is not None


def test_the_guide_shows_options_that_are_there():
    text = (Path(__file__).parent.parent / "docs" / "guides" / "auxiliary.md").read_text()
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]
    for block in blocks:
        PretrainingOptions(**block)
    shown = {term["term"] for block in blocks for term in block.get("auxiliary", [])}
    assert shown == set(TERMS)


# What cannot work


@pytest.mark.parametrize(
    ("auxiliary", "message"),
    [
        ([{"term": "dispersiv", "layer": EARLY}], r"auxiliary: term is 'dispersiv': allowed are dispersive, .*self_al"),
        ([{"layer": EARLY}], "auxiliary: term is None: allowed are"),
        ([{**DISPERSIVE, "temprature": 1.0}], "auxiliary: dispersive: there is no option 'temprature': the nearest"),
        ([{"term": "dispersive"}], "auxiliary: dispersive: layer is not given"),
        ([{"term": "self_alignment", "layer": EARLY}], "auxiliary: self_alignment: averaged_layer is not given"),
        ([{**DISPERSIVE, "weight": -1}], "auxiliary: dispersive: weight is -1.0: it must be at least 0"),
        ([{**DISPERSIVE, "until": 0}], "until is 0.0: it must be above 0 and at most 1"),
        ([{**DISTILLATION, "temperature": 0}], "temperature is 0.0: it must be positive"),
        ([{**ALIGNMENT, "lowered": 1.5}], "lowered is 1.5: it must be between 0 and 1"),
        ([{**ALIGNMENT, "distance": "l2"}], "distance is 'l2': allowed are smooth_l1, cosine"),
        ([{**DISPERSIVE, "layer": "mid_blocks"}], "There is no layer 'mid_blocks' .* The nearest are mid_block,"),
        ([{**ALIGNMENT, "averaged_layer": "up_blocks.1.resnet.0"}], "no layer 'up_blocks.1.resnet.0'.* The nearest"),
        (
            [ALIGNMENT, {**DISTILLATION, "lowered": 0.1}],
            r"passes at different noise levels \(self_alignment: 0.2, self_distillation: 0.1\)",
        ),
        (
            [ALIGNMENT, {**ALIGNMENT, "lowered": 0.0}],
            r"passes at different noise levels \(self_alignment: 0.2, self_alignment_2: 0\)",
        ),
    ],
)  # fmt: skip
def test_terms_that_cannot_work_are_refused_before_training(images, tmp_path, auxiliary, message):
    with pytest.raises(ValueError, match=message):
        pretrain(images, **small(auxiliary=auxiliary, output_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_terms_do_not_go_with_sharding_or_compiling(images, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="auxiliary does not go with shard: hidden states of a divided network"):
        PretrainingOptions(**small(auxiliary=ALL, shard=True))
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    with pytest.raises(ValueError, match="auxiliary does not go with compiling: launch with --dynamo_backend no"):
        pretrain(images, **small(auxiliary=ALL, output_dir=str(tmp_path / "out")))
