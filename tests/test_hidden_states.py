"""Hidden states against hooks on diffusers' own forward, and what stopping early saves."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from torch.utils.flop_counter import FlopCounterMode

from ddae_hf import collect_hidden_states, layer_names, pool_hidden_states
from ddae_hf.checkpoints import build_denoiser
from ddae_hf.conditioning import disable_label_dropout
from ddae_hf.configuration_ddae import DEFAULT_DENOISER
from ddae_hf.hidden_states import decoder_layer_names, default_layer, hidden_size, with_float32_output

from .conftest import make_dit, make_unet

NETWORKS = {
    "plain": {},
    "attention everywhere": {
        "down_block_types": ("AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D"),
        "layers_per_block": 2,
    },
    "residual sampling": {
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
    },
    "skips of the image": {  # not a plain walk: read by hooks
        "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
    },
    "no middle": {"mid_block_type": None},
    "three levels": {
        "sample_size": 16,
        "block_out_channels": (32, 32, 64),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    },
}


@pytest.fixture(params=list(NETWORKS))
def network(request):
    return make_unet(**NETWORKS[request.param])


def inputs(network):
    side = network.config.sample_size
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0)), torch.tensor([3.0, 700.0])


def by_hooks(network, *args):
    """Every submodule's output in diffusers' own full forward, in the order of computation."""
    outputs = {}
    handles = [
        module.register_forward_hook(lambda m, a, out, name=name: outputs.__setitem__(name, out))
        for name, module in network.named_modules()
    ]
    network(*args)
    for handle in handles:
        handle.remove()
    return outputs


@torch.no_grad()
def test_every_layer_equals_diffusers_own_forward(network):
    names = layer_names(network)
    reference = by_hooks(network, *inputs(network))
    assert sorted(names, key=list(reference).index) == names
    for stop_early in (True, False):
        together = collect_hidden_states(network, *inputs(network), names, stop_early=stop_early)
        assert list(together) == names
        for name in names:
            alone = collect_hidden_states(network, *inputs(network), [name], stop_early=stop_early)[name]
            assert torch.equal(alone, reference[name]) and torch.equal(together[name], reference[name])
            assert hidden_size(network, name) == alone.shape[1]


def test_the_tap_is_the_attention_where_one_follows(unet):
    assert layer_names(unet) == [
        "down_blocks.0.resnets.0", "down_blocks.1.attentions.0", "mid_block", "up_blocks.0.attentions.0",
        "up_blocks.0.attentions.1", "up_blocks.1.resnets.0", "up_blocks.1.resnets.1",
    ]  # fmt: skip


@torch.no_grad()
def test_nothing_after_the_deepest_layer_is_computed(network):
    """Removing what comes later, weights and all, changes nothing."""
    names = layer_names(network)
    ran = []
    for module in network.modules():
        if not list(module.children()):
            module.register_forward_pre_hook(lambda m, a: ran.append(m))
    costs = []
    for name in names:
        ran.clear()
        collect_hidden_states(network, *inputs(network), [name])
        assert network.conv_out not in ran
        costs.append(len(ran))
    assert costs == sorted(costs)


def test_stopping_early_costs_a_third_of_the_papers_network():
    network = build_denoiser(DEFAULT_DENOISER).eval()
    assert sum(p.numel() for p in network.parameters()) == 35_746_307
    assert default_layer(network) == decoder_layer_names(network)[6 - 1] == "up_blocks.1.resnets.2"
    sample, timestep = torch.randn(1, 3, 32, 32), torch.tensor([10.0])
    counts = []
    for run in (
        lambda: network(sample, timestep),
        lambda: collect_hidden_states(network, sample, timestep, ["up_blocks.1.resnets.2"]),
    ):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run()
        counts.append(counter.get_total_flops())
    assert counts[0] == pytest.approx(12.1e9, rel=0.01) and counts[1] <= 4.3e9


def test_gradients_are_the_full_forwards_with_checkpointing_too(unet):
    name = "up_blocks.0.attentions.0"
    gradients = []
    for stop_early, checkpointing in [(False, False), (True, False), (True, True), (False, True)]:
        unet.enable_gradient_checkpointing() if checkpointing else unet.disable_gradient_checkpointing()
        unet.train().zero_grad(set_to_none=True)
        states = collect_hidden_states(unet, *inputs(unet), ["mid_block", name], stop_early=stop_early)
        (states[name].square().mean() + states["mid_block"].square().mean()).backward()
        gradients.append({k: p.grad.clone() for k, p in unet.named_parameters() if p.grad is not None})
    assert any(k.startswith("up_blocks.0") for k in gradients[0])
    for other in gradients[1:]:
        assert other.keys() == gradients[0].keys()
        for k, gradient in other.items():
            torch.testing.assert_close(gradient, gradients[0][k])


@torch.no_grad()
def test_hooks_never_survive_not_even_an_exception():
    network = make_unet(**NETWORKS["skips of the image"])
    collect_hidden_states(network, *inputs(network), ["mid_block"])
    with pytest.raises(RuntimeError):
        collect_hidden_states(network, torch.randn(2, 5, 8, 8), torch.tensor([1.0, 2.0]), ["mid_block"])
    assert not any(m._forward_hooks for m in network.modules())


@torch.no_grad()
def test_offloaded_networks_give_the_same(unet):
    name = "up_blocks.0.attentions.1"
    expected = collect_hidden_states(unet, *inputs(unet), [name])[name]
    cpu_offload(unet, execution_device="cpu")
    assert torch.equal(collect_hidden_states(unet, *inputs(unet), [name])[name], expected)


@torch.no_grad()
def test_compiles_to_one_graph_and_exports(unet):
    names = ["down_blocks.1.attentions.0", "mid_block", "up_blocks.0.attentions.0"]

    class Tap(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unet = unet

        def forward(self, sample, timestep):
            return collect_hidden_states(self.unet, sample, timestep, names)

    expected = Tap()(*inputs(unet))
    compiled = torch.compile(Tap(), fullgraph=True, backend="aot_eager")(*inputs(unet))
    exported = torch.export.export(Tap(), inputs(unet)).module()(*inputs(unet))
    for name in names:
        torch.testing.assert_close(compiled[name], expected[name])
        assert torch.equal(exported[name], expected[name])


@pytest.mark.parametrize("layer", ["up_blocks.0.atentions.1", "up_blocks.0.resnets.1", "up_blocks.9.resnets.0", ""])
def test_an_unknown_layer_names_the_nearest(unet, layer):
    with pytest.raises(ValueError, match=r"There is no layer .*nearest are up_blocks\.[01]|nearest are"):
        collect_hidden_states(unet, *inputs(unet), [layer])


@pytest.mark.parametrize("layers", ["mid_block", []])
def test_layers_must_be_a_list(unet, layers):
    with pytest.raises(ValueError, match="must be a list"):
        collect_hidden_states(unet, *inputs(unet), layers)


def test_pooling_is_over_positions_in_float32():
    maps = torch.randn(3, 7, 4, 5)
    tokens = maps.flatten(2).transpose(1, 2)
    for pooling, expected in [("mean", maps.mean((2, 3))), ("max", maps.amax((2, 3)))]:
        torch.testing.assert_close(pool_hidden_states(maps, pooling), expected)
        torch.testing.assert_close(pool_hidden_states(tokens, pooling), expected)
    assert pool_hidden_states(maps.bfloat16()).dtype == torch.float32
    with pytest.raises(ValueError, match="allowed are mean, max"):
        pool_hidden_states(maps, "median")
    with pytest.raises(ValueError, match="must be"):
        pool_hidden_states(maps[0, 0])


DIT_INPUTS = (torch.randn(3, 3, 8, 8), torch.tensor([3.0, 20.0, 700.0]))
LABELS = {"class_labels": torch.tensor([0, 4, 5])}


@torch.no_grad()
def test_a_dits_taps_are_its_blocks_and_stopping_early_is_bit_equal():
    dit = make_dit()
    assert layer_names(dit) == decoder_layer_names(dit) == [f"transformer_blocks.{k}" for k in range(4)]
    assert default_layer(dit) == "transformer_blocks.1" and hidden_size(dit, "transformer_blocks.3") == 32
    expected = by_hooks(dit, *DIT_INPUTS, *LABELS.values())
    for layers in (["transformer_blocks.0"], ["transformer_blocks.2", "transformer_blocks.1"], layer_names(dit)):
        for stop_early in (True, False):
            found = collect_hidden_states(dit, *DIT_INPUTS, layers, stop_early=stop_early, **LABELS)
            assert list(found) == layers and all(torch.equal(found[name], expected[name]) for name in layers)


@torch.no_grad()
def test_nothing_is_computed_after_a_dits_deepest_block():
    dit, called = make_dit(), []
    for k, block in enumerate(dit.transformer_blocks):
        block.attn1.register_forward_hook(lambda m, a, out, k=k: called.append(k))
    collect_hidden_states(dit, *DIT_INPUTS, ["transformer_blocks.1"], **LABELS)
    assert called == [0, 1]


@torch.no_grad()
def test_an_offloaded_dit_gives_the_same_hidden_states():
    dit = make_dit()
    expected = collect_hidden_states(dit, *DIT_INPUTS, ["transformer_blocks.2"], **LABELS)
    cpu_offload(dit, execution_device="cpu")
    found = collect_hidden_states(dit, *DIT_INPUTS, ["transformer_blocks.2"], **LABELS)
    assert torch.equal(found["transformer_blocks.2"], expected["transformer_blocks.2"])


def test_gradients_through_a_dits_checkpointed_blocks_are_the_same():
    gradients = []
    for checkpointing in (False, True):
        dit = make_dit()
        if checkpointing:
            dit.train().enable_gradient_checkpointing()
            disable_label_dropout(dit)
        collect_hidden_states(dit, *DIT_INPUTS, ["transformer_blocks.2"], **LABELS)[
            "transformer_blocks.2"
        ].sum().backward()
        gradients.append(dit.pos_embed.proj.weight.grad)
    torch.testing.assert_close(*gradients)


def test_output_layers_compute_in_float32_whatever_the_type_of_a_unet():
    network = make_unet(0)
    assert with_float32_output(network) is network
    network.to(torch.bfloat16)
    sample, timestep, kept = torch.randn(2, 3, 8, 8).bfloat16(), torch.tensor(5.0), []
    with torch.no_grad():
        handle = network.up_blocks[-1].register_forward_hook(lambda block, inputs, output: kept.append(output))
        stock = network(sample, timestep).sample
        seen = with_float32_output(network)(sample, timestep).sample
        handle.remove()
        assert torch.equal(*kept)
        norm, convolution = (copy.deepcopy(layer).float() for layer in (network.conv_norm_out, network.conv_out))
        expected = convolution(torch.nn.functional.silu(norm(kept[0].float())))
    torch.testing.assert_close(seen, expected)
    assert stock.dtype == network.dtype == torch.bfloat16 and not torch.equal(stock.float(), seen)


def test_a_network_that_is_called_through_a_hook_or_is_no_unet_keeps_its_output_layers():
    network = make_unet(0).to(torch.bfloat16)
    network.register_forward_hook(lambda module, inputs, output: output)
    for denoiser in (network, make_dit(0).to(torch.bfloat16)):
        assert with_float32_output(denoiser) is denoiser
