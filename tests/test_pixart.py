"""PixArt's network: its taps, what stopping early saves, hooks, graphs, the sizes that it is told."""

import pytest
import torch
from accelerate import cpu_offload
from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel

from ddae_hf import collect_hidden_states, layer_names
from ddae_hf.checkpoints import plain_config
from ddae_hf.diffusion import Diffusion
from ddae_hf.hidden_states import default_layer
from ddae_hf.networks import NETWORKS, network_of, present_config

from .stock import PIXART, CountedOperations, operations_before, outputs_of
from .test_conditional_unets import Reader, call_of, changed

BLOCK = "transformer_blocks.1"


def make_network(**options):
    torch.manual_seed(0)
    return PixArtTransformer2DModel(**{**PIXART, **options}).eval()


@pytest.fixture(params=[False, True])
def network(request):
    return make_network(use_additional_conditions=request.param)


def reference(network, names):
    """The outputs of parts in diffusers' own forward."""
    (sample, timestep), told = call_of(network)
    return outputs_of(network, names, sample, timestep=timestep, **told)


@torch.no_grad()
def test_taps_are_in_forward_order_and_on_the_grid(network):
    names = layer_names(network, inner=True)
    assert layer_names(network) == [f"transformer_blocks.{k}" for k in range(3)]
    assert names[:3] == ["transformer_blocks.0.attn1.to_q", "transformer_blocks.0.attn1.to_k", "transformer_blocks.0"]
    assert default_layer(network) == "transformer_blocks.0"
    outputs = reference(network, names)
    assert list(outputs) == names
    described = network_of(network)
    for tap in described.taps(network):
        grid = described.on_grid(outputs[tap.name], tap, (8, 8))
        assert grid.shape == (2, tap.channels, 4, 4)
        assert torch.equal(grid[:, :, 1, 3], outputs[tap.name][:, 1 * 4 + 3])


@torch.no_grad()
def test_only_the_small_output_layer_is_computed_after_the_deepest_tap(network):
    (sample, timestep), told = call_of(network)
    names = layer_names(network, inner=True)
    done, _ = operations_before(network, (*names, "proj_out"), sample, timestep=timestep, **told)
    output_layer = done["proj_out"] - done[names[-1]]
    assert 0 < output_layer < 0.1 * done[names[-1]]
    for name in names:
        wanted = [name.replace("to_k", "to_q"), name] if name.endswith("to_k") else [name]
        with CountedOperations() as counted:
            collect_hidden_states(network, sample, timestep, wanted, **told)
        assert counted.count == done[name] + output_layer, name


@torch.no_grad()
@pytest.mark.parametrize("part", ["", BLOCK, f"{BLOCK}.attn1", f"{BLOCK}.attn1.to_q"])
def test_hooks_on_what_is_cut_are_in_force(part):
    network = make_network()
    names = [f"{BLOCK}.attn1.to_q", BLOCK]
    before = reference(network, names)
    network.get_submodule(part).register_forward_pre_hook(changed, with_kwargs=True)
    expected = reference(network, names)
    assert not torch.equal(before[BLOCK], expected[BLOCK])
    inputs, told = call_of(network)
    for stop_early in (True, False):
        for layers in (names, names[:1]):
            found = collect_hidden_states(network, *inputs, layers, stop_early=stop_early, **told)
            assert all(torch.equal(found[name], expected[name]) for name in layers)


@torch.no_grad()
def test_an_offloaded_network_gives_the_same(network):
    names = layer_names(network, inner=True)
    expected = reference(network, names)
    inputs, told = call_of(network)
    cpu_offload(network, execution_device="cpu")
    for layers in (names, names[3:4]):
        found = collect_hidden_states(network, *inputs, layers, **told)
        assert all(torch.equal(found[name], expected[name]) for name in layers)


@torch.no_grad()
@pytest.mark.parametrize("layers", [[f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn1.to_k"], ["transformer_blocks.0", BLOCK]])
def test_reading_compiles_to_one_graph_and_exports(layers):
    reader = Reader(make_network(use_additional_conditions=True), layers)
    inputs, told = call_of(reader.network)
    expected = reader(inputs, told)
    compiled = torch.compile(reader, fullgraph=True, backend="aot_eager")(inputs, told)
    exported = torch.export.export(reader, (inputs, told)).module()(inputs, told)
    for name in layers:
        torch.testing.assert_close(compiled[name], expected[name])
        assert torch.equal(exported[name], expected[name])


@torch.no_grad()
def test_what_the_mask_leaves_out_changes_nothing():
    network = make_network()
    inputs, told = call_of(network)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    changed_words = told["encoder_hidden_states"] + 5 * (1 - mask)[..., None]
    found = [
        collect_hidden_states(network, *inputs, [BLOCK], encoder_hidden_states=words, encoder_attention_mask=mask)
        for words in (told["encoder_hidden_states"], changed_words)
    ]
    torch.testing.assert_close(found[0][BLOCK], found[1][BLOCK])


def test_the_sizes_that_it_is_told_are_those_of_the_image():
    described = NETWORKS["PixArtTransformer2DModel"]
    assert described.size_parts(PIXART, 1024, 512) == {}
    sized = {"resolution": [1024, 512], "aspect_ratio": [2.0]}
    assert described.size_parts(PIXART | {"sample_size": 128}, 1024, 512) == sized
    assert described.size_parts(PIXART | {"use_additional_conditions": True}, 1024, 512) == sized
    assert described.size_parts(PIXART | {"sample_size": 128, "use_additional_conditions": False}, 1024, 512) == {}


def test_a_learned_variance_is_no_part_of_the_answer():
    network = make_network()
    diffusion = Diffusion(network, DPMSolverMultistepScheduler())
    conditions = diffusion.conditions(diffusion.network.example_condition(network), 2, "cpu")
    clean = torch.rand(2, 4, 8, 8)
    answer = diffusion.predict(clean, torch.tensor([3.0, 700.0]), conditions)
    assert answer.shape == clean.shape and diffusion.loss(clean, condition=conditions).shape == (2,)


@torch.no_grad()
def test_what_older_versions_of_diffusers_wrote_is_recognised():
    network = make_network()
    old = {
        **plain_config(network), "_class_name": "Transformer2DModel", "norm_type": "ada_norm_single",
        "num_vector_embeds": None, "only_cross_attention": False, "double_self_attention": False,
    }  # fmt: skip
    assert present_config(old) == plain_config(network)
