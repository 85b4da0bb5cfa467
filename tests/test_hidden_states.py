"""Hidden states against hooks on diffusers' own forward, and what stopping early saves."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import DDIMScheduler, UNet2DModel
from diffusers.hooks import HookRegistry
from diffusers.hooks import ModelHook as DiffusersHook
from torch.nn.modules import module as torch_modules

from ddae_hf import (
    DDAEConfig,
    DDAEForImageClassification,
    DDAEModel,
    DDAEPipeline,
    collect_hidden_states,
    layer_names,
    pool_hidden_states,
)
from ddae_hf.checkpoints import plain_config
from ddae_hf.hidden_states import decoder_layer_names, default_layer, hidden_size
from ddae_hf.networks import PAPER_UNET, build_denoiser, network_of

from .conftest import make_dit, make_unet
from .stock import CountedOperations

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


def with_float32_output(denoiser):
    return network_of(denoiser).with_float32_output(denoiser)


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


@torch.no_grad()
@pytest.mark.parametrize("layer", ["down_blocks.0.resnets.0", "up_blocks.0.attentions.1"])
def test_nothing_is_resampled_after_the_last_tap_of_a_block(unet, layer):
    ran = []
    for block in (*unet.down_blocks, *unet.up_blocks):
        for resampler in (*(getattr(block, "downsamplers", None) or ()), *(getattr(block, "upsamplers", None) or ())):
            resampler.register_forward_hook(lambda module, *_: ran.append(module))
    collect_hidden_states(unet, *inputs(unet), [layer])
    assert ran == ([] if layer.startswith("down") else [unet.down_blocks[0].downsamplers[0]])


def test_stopping_early_costs_a_third_of_the_papers_network():
    network = build_denoiser(PAPER_UNET).eval()
    assert sum(p.numel() for p in network.parameters()) == 35_746_307
    assert default_layer(network) == decoder_layer_names(network)[6 - 1] == "up_blocks.1.resnets.2"
    sample, timestep = torch.randn(1, 3, 32, 32), torch.tensor([10.0])
    counts = []
    for run in (
        lambda: network(sample, timestep),
        lambda: collect_hidden_states(network, sample, timestep, ["up_blocks.1.resnets.2"]),
    ):
        with CountedOperations() as counted, torch.no_grad():  # torch's own counter sets hooks, and views are not used
            run()
        counts.append(counted.count)
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


@pytest.mark.parametrize(("height", "width"), [(4, 6), (7, 7), (5, 8), (1, 3)])
def test_quarters_are_those_of_torchs_own_pooling(height, width):
    maps = torch.randn(3, 5, height, width)
    expected = torch.nn.functional.adaptive_avg_pool2d(maps, 2).flatten(1)
    torch.testing.assert_close(pool_hidden_states(maps, "mean_2x2"), expected)
    if height == width:
        torch.testing.assert_close(pool_hidden_states(maps.flatten(2).transpose(1, 2), "mean_2x2"), expected)


def test_quarters_of_tokens_need_a_square():
    with pytest.raises(ValueError, match="12 tokens do not form a square"):
        pool_hidden_states(torch.randn(2, 12, 4), "mean_2x2")


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
            network_of(dit).stop_own_dropping(dit)
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


def doubled(values):
    """Double every floating tensor in nested arguments."""
    if isinstance(values, dict):
        return {name: doubled(value) for name, value in values.items()}
    if isinstance(values, tuple):
        return tuple(map(doubled, values))
    return 2 * values if isinstance(values, torch.Tensor) and values.is_floating_point() else values


def pre_hook(module, args, kwargs=None):
    return doubled(args) if kwargs is None else (doubled(args), doubled(kwargs))


def own_forward(module):
    plain = module.forward
    module.forward = lambda *args, **kwargs: plain(*doubled(args), **doubled(kwargs))


class OfAccelerate(ModelHook):
    def pre_forward(self, module, *args, **kwargs):
        return doubled(args), doubled(kwargs)


class OfDiffusers(DiffusersHook):
    def pre_forward(self, module, *args, **kwargs):
        return doubled(args), doubled(kwargs)


# What can make a call of a module more than its class's forward. All but the last two hold for any module.
CHANGES = {
    "pre-hook": lambda m: m.register_forward_pre_hook(pre_hook, with_kwargs=True),
    "hook": lambda m: m.register_forward_hook(lambda module, args, output: doubled(output)),
    "own forward": own_forward,
    "accelerate": lambda m: add_hook_to_module(m, OfAccelerate()),
    "diffusers": lambda m: HookRegistry.check_if_exists_or_initialize(m).register_hook(OfDiffusers(), "doubled"),
    "gradient hook": lambda m: m.register_full_backward_hook(lambda module, into, out: doubled(into)),
    "gradient pre-hook": lambda m: m.register_full_backward_pre_hook(lambda module, out: doubled(out)),
    "global pre-hook": lambda m: torch_modules.register_module_forward_pre_hook(
        lambda module, args: pre_hook(module, args) if module is m else None
    ),
    "global hook": lambda m: torch_modules.register_module_forward_hook(
        lambda module, args, output: doubled(output) if module is m else None
    ),
}


def read_with_gradients(network, layers, read):
    network.zero_grad(set_to_none=True)
    found = read()
    sum(found[name].square().mean() for name in layers).backward()
    return found, {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", list(CHANGES))
def test_hooks_of_every_kind_are_in_force(kind):
    """As in the plain forward, wherever they are: on a block that is read, on one before it, on the network."""
    layers, effects = ["down_blocks.1.attentions.0", "up_blocks.1.resnets.0"], []
    for where in ("up_blocks.1", "up_blocks.0", "down_blocks.1", "mid_block", "down_blocks.0.resnets.0", ""):
        network = make_unet()
        before, plain = read_with_gradients(network, layers, lambda n=network: by_hooks(n, *inputs(n)))
        handle = CHANGES[kind](network.get_submodule(where))
        expected, gradients = read_with_gradients(network, layers, lambda n=network: by_hooks(n, *inputs(n)))
        for stop_early in (True, False):
            found, own = read_with_gradients(
                network,
                layers,
                lambda n=network, stop=stop_early: collect_hidden_states(n, *inputs(n), layers, stop_early=stop),
            )
            assert all(torch.equal(found[name], expected[name]) for name in layers)
            assert own.keys() == gradients.keys() and all(torch.equal(own[k], gradients[k]) for k in own)
        if "global" in kind:
            handle.remove()
        unchanged = all(torch.equal(before[name], expected[name]) for name in layers)
        effects.append(not unchanged or any(not torch.equal(plain[k], gradients[k]) for k in plain))
    assert sum(effects) > 1  # so that being in force makes a difference


@torch.no_grad()
def test_a_pre_hook_on_a_dit_is_in_force():
    dit = make_dit()
    dit.register_forward_pre_hook(lambda module, args: (2 * args[0], *args[1:]))
    expected = by_hooks(dit, *DIT_INPUTS, *LABELS.values())
    found = collect_hidden_states(dit, *DIT_INPUTS, ["transformer_blocks.1"], **LABELS)
    assert torch.equal(found["transformer_blocks.1"], expected["transformer_blocks.1"])


# What compiles fastest.
SMALL = {
    "block_out_channels": (32,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "mid_block_type": None,
}


class CountedRuns:
    """A backend of `torch.compile` that runs graphs as they are and counts their runs."""

    def __init__(self):
        self.runs = 0

    def __call__(self, graph, example_inputs):
        def run(*args):
            self.runs += 1
            return graph.forward(*args)

        return run


@pytest.fixture
def backend():
    torch._dynamo.reset()
    yield CountedRuns()
    torch._dynamo.reset()


def compile_part(network, part, in_place, backend):
    """Compile a network, or a part of it, and return the network."""
    if in_place:
        network.get_submodule(part).compile(backend=backend)
        return network
    compiled = torch.compile(network.get_submodule(part), backend=backend)
    if not part:
        return compiled
    parent, _, name = part.rpartition(".")
    network.get_submodule(parent).register_module(name, compiled)
    return network


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize(
    ("part", "hooked"),
    [("", "never"), ("", "before"), ("", "after"), ("up_blocks.0", "after"), ("up_blocks.0", "never")],
)
@torch.no_grad()
def test_compiled_networks_and_parts_give_the_same_hidden_states(backend, part, hooked, in_place):
    """Compiled by a call before they are read; hooks that were set afterwards are in force too."""
    names = ["down_blocks.0.resnets.0", "up_blocks.0.resnets.0"]
    network, reference, hook = make_unet(**SMALL), make_unet(**SMALL), CHANGES["pre-hook"]
    if hooked == "before":
        hook(network.down_blocks[0])
    compiled = compile_part(network, part, in_place, backend)
    whole = compiled(*inputs(network)).sample
    assert backend.runs
    if hooked == "after":
        hook(network.down_blocks[0])
    if hooked != "never":
        hook(reference.down_blocks[0])
    expected = by_hooks(reference, *inputs(reference))
    for stop_early in (True, False):
        found = collect_hidden_states(compiled, *inputs(network), names, stop_early=stop_early)
        assert all(torch.equal(found[name], expected[name]) for name in names)
    backend.runs = 0  # and the compiled network is what it was
    output = compiled(*inputs(network)).sample
    assert backend.runs
    if hooked != "after":
        assert torch.equal(output, whole) and torch.equal(output, expected[""].sample)


@torch.no_grad()
def test_compiled_networks_that_are_no_plain_walk_are_read(backend):
    network = make_unet(**SMALL | {"up_block_types": ("SkipUpBlock2D",)} | {"down_block_types": ("SkipDownBlock2D",)})
    names = layer_names(network)
    expected = collect_hidden_states(network, *inputs(network), names)
    network.compile(backend=backend)
    network(*inputs(network))
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(lambda _: collect_hidden_states(network, *inputs(network), names), range(8)):
            assert all(torch.equal(found[name], expected[name]) for name in names)
    before = backend.runs
    network(*inputs(network))
    assert backend.runs > before  # reading has left compilation on


@pytest.mark.parametrize(
    ("in_place", "dtype"), [(True, torch.bfloat16), (False, torch.bfloat16), (True, torch.float32)]
)
@torch.no_grad()
def test_a_model_and_a_pipeline_with_a_compiled_denoiser(backend, images, in_place, dtype):
    """The model's features are the same; sampling runs the compiled graphs, at every step."""
    config = DDAEConfig(denoiser=plain_config(make_unet(**SMALL)), num_labels=3)
    model = DDAEForImageClassification(config).eval().to(dtype)
    network = model.ddae.denoiser
    pipeline = DDAEPipeline(unet=network, scheduler=DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def sample():
        return pipeline(latents=latents, batch_size=2, num_inference_steps=3, output_type="pt").images

    expected = model(images).logits
    handle = network.register_forward_hook(lambda module, args, output: None)  # as it is, to its last layers
    sampled = sample()
    handle.remove()
    compiled = compile_part(network, "", in_place, backend)
    model.ddae.denoiser, pipeline.unet = compiled, compiled
    assert torch.equal(sample(), sampled) and backend.runs == 3
    assert torch.equal(model(images).logits, expected) and torch.equal(sample(), sampled) and backend.runs == 6
    if not in_place or dtype == torch.float32:
        whole = torch.compile(model, fullgraph=True, backend=backend)
        assert torch.equal(whole(images).logits, expected) and backend.runs == 7


@torch.no_grad()
def test_blocks_that_are_compiled_run_compiled_beside_float32_output_layers(backend):
    network = make_unet(**SMALL).to(torch.bfloat16)
    sample, timestep = torch.randn(2, 3, 8, 8).bfloat16(), torch.tensor(5.0)
    expected = with_float32_output(network)(sample, timestep).sample
    network.up_blocks[0].compile(backend=backend)
    assert torch.equal(with_float32_output(network)(sample, timestep).sample, expected) and backend.runs == 1
    network.conv_out.compile(backend=backend)
    assert with_float32_output(network) is network


@torch.no_grad()
@pytest.mark.parametrize("kind", ["device map", "a hook"])
def test_threads_that_read_one_model_get_their_own_features(kind):
    config = DDAEConfig(denoiser=plain_config(make_unet()), layer="up_blocks.0.attentions.0")
    model = DDAEModel(config).eval()
    images = [torch.full((2, 3, 8, 8), value) for value in (-1.0, 1.0)]
    expected = [model(batch, output_hidden_states=["mid_block"]) for batch in images]
    if kind == "device map":
        dispatch_model(model, {"denoiser": "cpu", "": "cpu"}, main_device="cpu", force_hooks=True)
    elif kind == "a hook":
        model.denoiser.register_forward_pre_hook(lambda module, args: None)
    start = threading.Barrier(2)

    def read(thread):
        start.wait()
        for _ in range(20):
            found = model(images[thread], output_hidden_states=["mid_block"])
            assert torch.equal(found.pooler_output, expected[thread].pooler_output)
            assert torch.equal(found.hidden_states[0], expected[thread].hidden_states[0])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(read, range(2)))
    assert not any(hook for m in model.denoiser.modules() for hook in m._forward_hooks.values())


@torch.no_grad()
def test_threads_that_sample_in_bfloat16_leave_the_weights_as_they_are():
    network = make_unet(**SMALL).to(torch.bfloat16)
    sample, timestep = torch.randn(2, 3, 64, 64).bfloat16(), torch.tensor(5.0)
    expected = with_float32_output(network)(sample, timestep).sample

    def run(_):
        return [with_float32_output(network)(sample, timestep).sample for _ in range(5)]

    with ThreadPoolExecutor(2) as pool:
        assert all(torch.equal(output, expected) for outputs in pool.map(run, range(2)) for output in outputs)
    assert network.conv_out.weight.dtype == torch.bfloat16


@torch.no_grad()
def test_hooks_of_a_compiled_network_itself_are_in_force():
    network, ran = make_unet(**SMALL), []
    compiled = torch.compile(network, backend="eager")
    compiled.register_forward_pre_hook(lambda module, args: ran.append(args))
    collect_hidden_states(compiled, *inputs(network), ["up_blocks.0.resnets.0"])
    assert len(ran) == 1


class Alike(torch.nn.Module):
    """A network with the parts of a `UNet2DModel`, and none of its classes."""

    forward = UNet2DModel.forward

    def __init__(self, unet):
        super().__init__()
        self.config, self.dtype, self.class_embedding = unet.config, unet.dtype, unet.class_embedding
        for name, child in unet.named_children():
            self.add_module(name, child)


@torch.no_grad()
def test_networks_that_resemble_a_known_class_are_read():
    network = Alike(make_unet())
    names = layer_names(network)
    expected = by_hooks(network, *inputs(network))
    found = collect_hidden_states(network, *inputs(network), names)
    assert all(torch.equal(found[name], expected[name]) for name in names)
