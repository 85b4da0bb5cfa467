"""Stable Diffusion's networks: taps inside of attentions, what stopping early saves, hooks, graphs, refusals."""

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers import UNet2DConditionModel

from ddae_hf import DDAEConfig, collect_hidden_states, layer_names
from ddae_hf.checkpoints import plain_config
from ddae_hf.hidden_states import decoder_layer_names, default_layer, hidden_size
from ddae_hf.networks import network_of

from .stock import UNET, XL, CountedOperations, operations_before, outputs_of

NETWORKS = {
    "sd1": UNET,
    "sd2": {**UNET, "use_linear_projection": True, "attention_head_dim": (2, 4), "layers_per_block": 2},
    "xl": XL,
}


def make_network(kind="sd1", **options):
    torch.manual_seed(0)
    return UNet2DConditionModel(**{**NETWORKS[kind], **options}).eval()


def call_of(network):
    """The arguments of its forward."""
    generator = torch.Generator().manual_seed(0)
    described = network_of(network)
    sizes = described.size_parts(network.config, 8, 8)
    shapes = described.text_parts(network.config) | {name: (len(values),) for name, values in sizes.items()}
    condition = {name: torch.randn(2, *(n or 5 for n in shape), generator=generator) for name, shape in shapes.items()}
    told = described.keywords(described.conditions(network, condition, 2, "cpu"))
    return (torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([3.0, 700.0])), told


@pytest.fixture(params=list(NETWORKS))
def network(request):
    return make_network(request.param)


def test_the_taps_of_a_small_network():
    network, block = make_network(), "down_blocks.0.attentions.0.transformer_blocks.0"
    assert layer_names(network) == [
        "down_blocks.0.attentions.0", "down_blocks.1.resnets.0", "mid_block", "up_blocks.0.resnets.0",
        "up_blocks.0.resnets.1", "up_blocks.1.attentions.0", "up_blocks.1.attentions.1",
    ]  # fmt: skip
    assert layer_names(network, inner=True)[:4] == [
        f"{block}.attn1.to_q", f"{block}.attn1.to_k", block, "down_blocks.0.attentions.0",
    ]  # fmt: skip
    assert default_layer(network) == "up_blocks.0.resnets.1"
    assert decoder_layer_names(network) == layer_names(network)[3:]
    assert not any("resnets" in name for name in set(layer_names(network, inner=True)) - set(layer_names(network)))


@torch.no_grad()
def test_taps_are_in_forward_order_and_have_their_width_and_stride(network):
    inputs, told = call_of(network)
    names = layer_names(network, inner=True)
    outputs = outputs_of(network, names, *inputs, **told)
    assert list(outputs) == names
    described = network_of(network)
    for tap in described.taps(network):
        grid = described.on_grid(outputs[tap.name], tap, (8, 8))
        assert grid.shape == (2, tap.channels, 8 // tap.stride, 8 // tap.stride), tap
        assert hidden_size(network, tap.name) == tap.channels


@torch.no_grad()
def test_nothing_after_the_deepest_tap_is_computed(network):
    """Operations, counted: as many as diffusers' own forward has done when it has computed the tap."""
    inputs, told = call_of(network)
    names = layer_names(network, inner=True)
    done, every = operations_before(network, names, *inputs, **told)
    assert 0 < done[names[0]] and list(done.values()) == sorted(done.values()) and done[names[-1]] < every
    for name in names:
        # A tensor of keys needs none of queries.
        wanted = [name.replace("to_k", "to_q"), name] if name.endswith("to_k") else [name]
        with CountedOperations() as counted:
            collect_hidden_states(network, *inputs, wanted, **told)
        assert counted.count == done[name], name
    keys = [name for name in names if name.endswith("to_k")]
    for name in keys:
        with CountedOperations() as counted:
            collect_hidden_states(network, *inputs, [name], **told)
        assert counted.count == done[name.replace("to_k", "to_q")]
    assert keys


def changed(module, args, keywords):
    """Change the hidden state that a part is called with."""
    if args:
        return (2 * args[0] + 1, *args[1:]), keywords
    return args, keywords | {"hidden_states": 2 * keywords["hidden_states"] + 1}


@torch.no_grad()
@pytest.mark.parametrize("part", ["up_blocks.1", "{attention}", "{block}", "{block}.attn1", "{block}.attn1.to_q"])
def test_hooks_on_what_is_cut_are_in_force(part):
    network = make_network()
    attention = "up_blocks.1.attentions.1"
    block = f"{attention}.transformer_blocks.0"
    inputs, told = call_of(network)
    names = [f"{block}.attn1.to_q", block]
    before = outputs_of(network, names, *inputs, **told)
    module = network.get_submodule(part.format(attention=attention, block=block))
    module.register_forward_pre_hook(changed, with_kwargs=True)
    expected = outputs_of(network, names, *inputs, **told)
    assert not torch.equal(before[block], expected[block])
    for stop_early in (True, False):
        for layers in (names, names[:1]):
            found = collect_hidden_states(network, *inputs, layers, stop_early=stop_early, **told)
            assert all(torch.equal(found[name], expected[name]) for name in layers)


@torch.no_grad()
@pytest.mark.parametrize("offload", [cpu_offload, cpu_offload_with_hook])
def test_offloaded_networks_give_the_same(network, offload):
    """`cpu_offload_with_hook` is what a pipeline's `enable_model_cpu_offload` does to its network."""
    inputs, told = call_of(network)
    names = layer_names(network, inner=True)
    expected = outputs_of(network, names, *inputs, **told)
    offload(network, execution_device="cpu")
    for layers in (names, names[:1], names[-3:-2]):
        found = collect_hidden_states(network, *inputs, layers, **told)
        assert all(torch.equal(found[name], expected[name]) for name in layers)


class Reader(torch.nn.Module):
    def __init__(self, network, layers):
        super().__init__()
        self.network, self.layers = network, layers

    def forward(self, inputs, told):
        return collect_hidden_states(self.network, *inputs, self.layers, **told)


INNER = "mid_block.attentions.0.transformer_blocks.0"
# What compiles fastest.
SMALL = {
    "block_out_channels": (8,), "down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("UpBlock2D",),
}  # fmt: skip


@torch.no_grad()
def test_reading_inside_of_attentions_compiles_to_one_graph_and_exports():
    layers = ["down_blocks.0.attentions.0.transformer_blocks.0", f"{INNER}.attn1.to_q", f"{INNER}.attn1.to_k"]
    reader = Reader(make_network(**SMALL), layers)
    inputs, told = call_of(reader.network)
    expected = reader(inputs, told)
    compiled = torch.compile(reader, fullgraph=True, backend="eager")(inputs, told)
    exported = torch.export.export(reader, (inputs, told)).module()(inputs, told)
    for name in layers:
        assert torch.equal(compiled[name], expected[name]) and torch.equal(exported[name], expected[name])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_channels": 9}, "fed 9 channels and answers with 4, as those for inpainting"),
        (
            {"addition_embed_type": "text", "addition_embed_type_num_heads": 2},
            "addition_embed_type is 'text', which is not supported: allowed is None or 'text_time'",
        ),
        ({"class_embed_type": "timestep"}, "class_embed_type is 'timestep'"),
        ({"time_cond_proj_dim": 8}, "time_cond_proj_dim is 8"),
        ({"only_cross_attention": True}, "only_cross_attention is True"),
        ({"mid_block_only_cross_attention": True}, "mid_block_only_cross_attention is True"),
        ({"cross_attention_dim": (16, 16)}, "cross_attention_dim differs from block to block"),
        ({"sample_size": 9}, "with 2 levels, each half the size of the one before, it must be a multiple of 2"),
    ],
)
def test_networks_that_are_told_more_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DDAEConfig(denoiser=plain_config(UNet2DConditionModel(**{**UNET, **options})))
