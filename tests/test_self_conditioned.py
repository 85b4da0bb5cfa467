"""Self-conditioned networks: their formula, that they are the stock ones where they should be, and all that opens them.

Wherever the maps matter they are drawn, since they are zero at first.
"""

import ast
import copy
import functools
import inspect
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    DiTTransformer2DModel,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from safetensors.torch import load_file

from ddae_hf import (
    DDAEBackbone,
    DDAEForImageClassification,
    DDAEModel,
    DDAEPipeline,
    collect_hidden_states,
    layer_names,
)
from ddae_hf.checkpoints import plain_config
from ddae_hf.diffusion import Diffusion
from ddae_hf.experiments import generate, make_card, pretrain, sweep
from ddae_hf.experiments.images import Images
from ddae_hf.hidden_states import learning_parameters, run_with_hidden_states, run_with_hooks
from ddae_hf.networks import PAPER_UNET, build_denoiser, network_of
from ddae_hf.self_conditioned import SelfConditionedDiTTransformer2DModel, SelfConditionedUNet2DModel

from .conftest import TINY, make_vae
from .hub_server import HubServer, run_client
from .stock import CountedOperations
from .test_sharding import distance, launch, options_of

DIT = {
    "sample_size": 8, "in_channels": 3, "num_layers": 4, "num_attention_heads": 2, "attention_head_dim": 16,
    "num_embeds_ada_norm": 5,
}  # fmt: skip
SKIP = TINY | {
    "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
    "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
}
STOCK = {SelfConditionedUNet2DModel: UNet2DModel, SelfConditionedDiTTransformer2DModel: DiTTransformer2DModel}
# A network of each class with each layer that it can have, and the options of others.
KINDS = {
    "unet": (SelfConditionedUNet2DModel, TINY, "mid_block"),
    "unet-decoder": (SelfConditionedUNet2DModel, TINY, "up_blocks.0"),
    "unet-labels": (SelfConditionedUNet2DModel, TINY | {"num_class_embeds": 6}, "mid_block"),
    "unet-skips": (SelfConditionedUNet2DModel, SKIP, "up_blocks.0"),
    "dit": (SelfConditionedDiTTransformer2DModel, DIT, "transformer_blocks.1"),
    "dit-early": (SelfConditionedDiTTransformer2DModel, DIT, "transformer_blocks.0"),
}


def make(kind, layer=None, seed=0, drawn=True):
    """A small network, by default with the layer of its kind and with maps that are drawn."""
    model, options, own = KINDS[kind]
    torch.manual_seed(seed)
    network = model(**options, self_condition_layer=own if layer is None else layer).eval()
    if drawn:
        draw(network)
    return network


def draw(network):
    for parameter in network.self_conditioning.parameters():
        torch.nn.init.normal_(parameter, std=0.5)


def fed(network, count=2, seed=0):
    """Images, timesteps and, where it takes them, labels."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 8, 8, generator=generator)
    timesteps = torch.rand(count, generator=generator) * 900
    told = {"class_labels": torch.arange(count) % 5} if network_of(network).is_conditional(network) else {}
    return (images, timesteps), told


def answer(network, **options):
    arguments, told = fed(network, **options)
    return network(*arguments, **told).sample


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [None, "its own"])
def test_training_starts_at_the_stock_network_and_turned_off_it_is_the_stock_network(kind, layer):
    model, options, own = KINDS[kind]
    torch.manual_seed(3)
    stock = STOCK[model](**options)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    network = model(**options, self_condition_layer=layer and own)
    assert torch.equal(torch.get_rng_state(), state)
    weights, expected = network.state_dict(), stock.state_dict()
    added = [name for name in weights if name not in expected]
    assert [name for name in weights if name in expected] == list(expected)
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    assert bool(added) == (layer is not None)
    assert all(name.startswith("self_conditioning.") and not weights[name].any() for name in added)
    for network_of_two in (network, stock):
        network_of_two.eval()
    assert torch.equal(answer(network), answer(stock))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(answer(network), answer(stock))


def used_by_blocks(network, images, timesteps, told):
    """What each block makes its shifts and scales of, by the name of the map that takes it, and the layer's output."""
    maps = "time_emb_proj" if isinstance(network, UNet2DModel) else "norm1.linear"
    found = {}
    handles = [
        module.register_forward_pre_hook(functools.partial(lambda name, _, args: found.update({name: args[0]}), name))
        for name, module in network.named_modules()
        if name.endswith(maps)
    ]
    layer = network.config.self_condition_layer
    states = run_with_hooks(network, images, timesteps, [layer], None, told)[1]
    for handle in handles:
        handle.remove()
    return found, states[layer]


@pytest.mark.parametrize("kind", KINDS)
def test_later_blocks_are_told_the_pooled_output_of_the_layer_scaled_by_the_timestep(kind):
    """Against the formula, in float64, of what each block makes its shifts and scales of."""
    network, plain = make(kind).double(), make(kind, drawn=False).double()
    (images, timesteps), told = fed(network)
    found, hidden = used_by_blocks(network, images.double(), timesteps, told)
    before, _ = used_by_blocks(plain, images.double(), timesteps, told)
    unet, maps = isinstance(network, UNet2DModel), network.self_conditioning
    pooled = hidden.mean((2, 3) if unet else 1)
    times = (network.time_proj if unet else network.transformer_blocks[0].norm1.emb.time_proj)(timesteps).double()
    scale = 1 + times @ maps.scale.weight.T + maps.scale.bias
    added = scale * (pooled @ maps.features.weight.T + maps.features.bias)
    later = {name for name in found if is_after(name, network.config.self_condition_layer)}
    assert later and found.keys() - later
    silu = torch.nn.functional.silu
    for name, condition in conditions_of(plain, timesteps, told, found).items():
        torch.testing.assert_close(before[name], silu(condition), rtol=1e-10, atol=1e-10)
        expected = silu(condition + added) if name in later else before[name]
        torch.testing.assert_close(found[name], expected, rtol=1e-10, atol=1e-10)


def conditions_of(network, timesteps, told, names):
    """The stock condition of each block, by the name of the map that takes it."""
    labels = told.get("class_labels")
    if not isinstance(network, UNet2DModel):
        of = {name: network.get_submodule(name.removesuffix(".linear")).emb for name in names}
        return {name: emb(timesteps, labels, hidden_dtype=torch.float64) for name, emb in of.items()}
    condition = network.time_embedding(network.time_proj(timesteps).double())
    condition = condition if labels is None else condition + network.class_embedding(labels)
    return dict.fromkeys(names, condition)


def is_after(name, layer):
    """Whether a module is in a block that comes after a layer."""
    block = ".".join(name.split(".")[:2])
    if layer == "mid_block":
        return block.startswith("up_blocks.")
    kind, number = layer.split(".")
    return block.startswith(f"{kind}.") and int(block.split(".")[1]) > int(number)


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_comes_after_the_layer_depends_on_it_and_learns_of_it(kind):
    network, zero = make(kind), make(kind, drawn=False)
    arguments, told = fed(network)
    layer = network.config.self_condition_layer
    for name in layer_names(network):
        [one], [other] = (collect_hidden_states(each, *arguments, [name], **told).values() for each in (network, zero))
        own = {f"self_conditioning.{part}" for part in ("features.weight", "scale.weight")}
        parameters = learning_parameters(json.dumps(plain_config(network)), (name,))
        assert torch.equal(one, other) != is_after(name, layer), name
        assert (own <= parameters) == is_after(name, layer), name


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_are_those_of_the_whole_pass_to_the_bit(kind):
    """By a view that ends early, by one that does not, and by hooks."""
    network = make(kind)
    (images, timesteps), told = fed(network)
    names = layer_names(network, inner=True)
    expected, states = run_with_hooks(network, images, timesteps, names, None, told)
    assert torch.equal(expected, network(images, timesteps, **told).sample)
    if kind != "unet-skips":
        assert network_of(network).runs_as_seen(network, names)
    found, every = run_with_hidden_states(network, images, timesteps, names, told)
    assert torch.equal(found, expected) and all(torch.equal(every[name], states[name]) for name in names)
    for name in names:
        [early] = collect_hidden_states(network, images, timesteps, [name], **told).values()
        _, stopped = run_with_hooks(network, images, timesteps, [name], name, told)
        assert torch.equal(early, states[name]) and torch.equal(stopped[name], states[name]), name


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_the_layers_and_their_names_are_those_of_the_stock_class(kind):
    model, options, _ = KINDS[kind]
    assert layer_names(make(kind), inner=True) == layer_names(STOCK[model](**options), inner=True)
    own, stock = (inspect.signature(each).parameters for each in (model, STOCK[model]))
    assert list(own) == [*stock, "self_condition_layer"]


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_gives_the_same_gradients(kind):
    plain, saving = make(kind).train(), make(kind).train()
    saving.enable_gradient_checkpointing()
    for network in (plain, saving):
        network_of(network).stop_own_dropping(network)
        answer(network).square().mean().backward()
    expected = dict(plain.named_parameters())
    assert all(p.grad is not None and p.grad.any() for p in plain.self_conditioning.parameters())
    for name, parameter in saving.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, msg=name)


def test_checkpointing_that_would_lose_gradients_fails():
    """Reentrant checkpoints see only tensors that are arguments themselves."""
    network = make("dit").train()
    checkpoint = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=True)
    network.enable_gradient_checkpointing(lambda module, *args: checkpoint(module.__call__, *args))
    with pytest.raises(RuntimeError, match="a second time"):
        answer(network).square().mean().backward()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_it_compiles_to_one_graph_and_exports_as_do_its_blocks(kind):
    network = make(kind)
    arguments, told = fed(network)
    expected, last = network(*arguments, **told).sample, layer_names(network)[-2]
    whole = torch.compile(copy.deepcopy(network), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(*arguments, **told).sample, expected)
    [hidden] = collect_hidden_states(network, *arguments, [last], **told).values()

    class Tap(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, images, timesteps):
            return collect_hidden_states(self.network, images, timesteps, [last], **told)[last]

    torch.testing.assert_close(torch.compile(Tap(), fullgraph=True, backend="aot_eager")(*arguments), hidden)
    assert torch.equal(torch.export.export(Tap(), arguments).module()(*arguments), hidden)
    parts = copy.deepcopy(network)
    for block in parts.up_blocks if kind == "unet" else parts.transformer_blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(parts(*arguments, **told).sample, expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_threads_that_share_a_network_do_not_see_each_other(kind):
    network = make(kind)
    expected = [answer(network, seed=seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            found = pool.map(lambda seed: answer(network, seed=seed), range(8))
            assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(
    ("model", "options", "layer", "message"),
    [
        (SelfConditionedUNet2DModel, TINY, "up_blocks.1", "Allowed are mid_block, up_blocks.0, middle, and None"),
        (SelfConditionedUNet2DModel, TINY, "down_blocks.0", "it must be a layer of this network that has blocks"),
        (SelfConditionedUNet2DModel, TINY, ["mid_block"], r"self_condition_layer is \['mid_block'\]"),
        (SelfConditionedDiTTransformer2DModel, DIT, "transformer_blocks.3", "transformer_blocks.2, middle, and None"),
        (
            SelfConditionedDiTTransformer2DModel,
            DIT | {"num_layers": 1},
            "middle",
            "Here is none, which leaves None, which turns",
        ),
        (SelfConditionedDiTTransformer2DModel, DIT | {"num_layers": 20}, 3, r"blocks\.1, \.\.\., transformer_blocks\."),
    ],
)
def test_a_layer_that_has_no_blocks_after_it_is_refused(model, options, layer, message):
    config = {**options, "_class_name": model.__name__, "self_condition_layer": layer}
    with pytest.raises(ValueError, match=message):
        build_denoiser(config)


def test_the_middle_is_stored_by_its_name():
    def layer(model, options):
        network = model.from_config(model(**options).config)
        return network.config.self_condition_layer

    assert layer(SelfConditionedUNet2DModel, TINY) == "mid_block"
    assert layer(SelfConditionedUNet2DModel, TINY | {"mid_block_type": None}) == "up_blocks.0"
    for count, block in ((2, 0), (3, 0), (4, 1), (12, 5)):
        options = DIT | {"num_layers": count}
        assert layer(SelfConditionedDiTTransformer2DModel, options) == f"transformer_blocks.{block}"


SCHEDULERS = [DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_in_every_framework_training_reaches_the_scale_which_differs_between_noise_levels(kind, scheduler):
    network = make(kind, drawn=False).train()
    network_of(network).stop_own_dropping(network)
    pair, optimizer = Diffusion(network, scheduler()), torch.optim.Adam(network.parameters(), 1e-3)
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    for _ in range(3):
        optimizer.zero_grad()
        pair.loss(images, generator=torch.Generator().manual_seed(2)).mean().backward()
        optimizer.step()
    maps, hidden = network.self_conditioning, torch.ones(1, 32 if kind == "dit" else 64, 2, 2)
    hidden = hidden.flatten(2).transpose(1, 2) if kind == "dit" else hidden
    family = pair.family
    low, high = (family.noisy(images[:1], images[:1], torch.tensor([sigma]))[1] for sigma in (0.1, 2.0))
    project = network.time_proj if kind == "unet" else network.transformer_blocks[0].norm1.emb.time_proj
    told = [maps(hidden, project(level)) for level in (low, high)]
    assert all(each.isfinite().all() and each.any() for each in told) and not torch.equal(*told)


def counted(network, *arguments, **told):
    with CountedOperations() as operations:
        network(*arguments, **told)
    return operations.count


def test_it_costs_less_than_a_percent():
    """Of the paper's U-Net, and of a DiT-B for latents of 32 x 32."""
    base = {"num_layers": 12, "num_attention_heads": 12, "attention_head_dim": 64, "num_embeds_ada_norm": 0}
    paper = {name: value for name, value in PAPER_UNET.items() if name != "_class_name"}
    of_each = ((SelfConditionedUNet2DModel, paper, 197_632), (SelfConditionedDiTTransformer2DModel, base, 787_968))
    for model, options, added in of_each:
        with torch.device("meta"):
            on, off = model(**options), model(**options, self_condition_layer=None)
            images, times = torch.empty(1, on.config.in_channels, 32, 32), torch.empty(1)
            told = {} if model is SelfConditionedUNet2DModel else {"class_labels": torch.zeros(1, dtype=torch.long)}
            parameters = [sum(p.numel() for p in network.parameters()) for network in (on, off)]
            operations = [counted(network, images, times, **told) for network in (on, off)]
        assert parameters[0] - parameters[1] == added < 0.006 * parameters[1]
        assert 0 < operations[0] - operations[1] < 0.00004 * operations[1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """By kind, a pipeline with drawn maps, and the folder of its folders: `plain`, and `code`, with our modules."""
    found = {}
    for kind in ("unet", "dit"):
        root = tmp_path_factory.mktemp(kind)
        names = {0: "cat", 1: "dog"} if kind == "dit" else None
        pipeline = DDAEPipeline.for_denoiser(make(kind), DDPMScheduler(), id2label=names)
        pipeline.save_pretrained(root / "plain")
        pipeline.save_pretrained(root / "code", include_code=True)
        found[kind] = root, pipeline
    return found


@pytest.fixture(params=["unet", "dit"])
def saved(request, folders):
    """The folder and the pipeline of one kind."""
    return folders[request.param]


def images_of(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(batch_size=2, generator=generator, num_inference_steps=2, output_type="np").images


def component(folder):
    """The entry of a pipeline's denoiser in its index."""
    index = json.loads((folder / "model_index.json").read_text())
    return index.get("unet") or index["transformer"]


def test_a_pipeline_opens_and_says_which_package_opens_it(saved, tmp_path):
    root, pipeline = saved
    expected, name = images_of(pipeline), type(pipeline.denoiser).__name__
    assert component(root / "plain") == ["ddae_hf.self_conditioned", name]
    assert component(root / "code") == ["self_conditioned", name]
    for folder in ("plain", "code"):
        opened = DDAEPipeline.from_pretrained(root / folder)
        assert type(opened.denoiser) is type(pipeline.denoiser) and opened.labels == pipeline.labels
        assert np.array_equal(images_of(opened), expected)
        opened.save_pretrained(tmp_path / folder)
        assert component(tmp_path / folder) == component(root / "plain")
    pipeline.denoiser.save_pretrained(tmp_path / "bare")
    bare = DDAEPipeline.from_pretrained(tmp_path / "bare", scheduler=pipeline.scheduler)
    assert np.array_equal(images_of(bare), expected)
    half = DDAEPipeline.from_pretrained(root / "plain", dtype=torch.bfloat16)
    assert half.denoiser.dtype == torch.bfloat16 and np.isfinite(images_of(half)).all()
    card = str(make_card(root / "plain"))
    assert "The package `ddae_hf` opens it" in card and f"which is a `ddae_hf` `{name}`" in card


def test_the_code_of_a_component_is_one_file_that_imports_nothing_of_the_package(saved):
    """Since diffusers takes no other file of it from a repository."""
    root, _ = saved
    [file] = (root / "code").glob("*/*.py")
    assert file.name == "self_conditioned.py"
    imports = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
    assert imports and not any(node.level or "ddae_hf" in node.module for node in imports)


def test_a_denoiser_of_latents_opens_with_its_vae(tmp_path):
    torch.manual_seed(0)
    network = SelfConditionedDiTTransformer2DModel(**DIT | {"in_channels": 4}).eval()
    draw(network)
    pipeline = DDAEPipeline(transformer=network, scheduler=DDPMScheduler(), vae=make_vae())
    pipeline.save_pretrained(tmp_path)
    opened = DDAEPipeline.from_pretrained(tmp_path)
    assert opened.vae is not None and np.array_equal(images_of(opened), images_of(pipeline))


@torch.no_grad()
def test_models_read_save_and_open_it(saved, tmp_path):
    """A model, a backbone, a classifier whole and as a head; the generator comes back of each."""
    root, pipeline = saved
    layer, images = layer_names(pipeline.denoiser)[-1], torch.randn(2, 3, 8, 8)
    drawn = images_of(pipeline)
    model = DDAEModel.from_pretrained(root / "plain", layer=layer, sigma=0.1)
    zero = copy.deepcopy(model)
    for parameter in zero.denoiser.self_conditioning.parameters():
        torch.nn.init.zeros_(parameter)
    assert not torch.equal(zero(images).pooler_output, model(images).pooler_output)
    backbone = DDAEBackbone.from_pretrained(root / "plain", out_features=[layer], sigma=0.1)
    classifier = DDAEForImageClassification.from_pretrained(root / "plain", layer=layer, sigma=0.1, num_labels=3)
    torch.nn.init.normal_(classifier.classifier.weight)
    for name, of in (("model", model), ("backbone", backbone), ("classifier", classifier)):
        of.save_pretrained(tmp_path / name)
        again = type(of).from_pretrained(tmp_path / name)
        found, expected = again(images), of(images)
        which = {"model": "pooler_output", "backbone": "feature_maps", "classifier": "logits"}[name]
        torch.testing.assert_close(found[which], expected[which], rtol=0, atol=0)
        assert np.array_equal(images_of(DDAEPipeline.from_pretrained(tmp_path / name)), drawn)
    pipeline.save_pretrained(tmp_path / "both")
    classifier.save_head(tmp_path / "both")
    opened = DDAEForImageClassification.from_pretrained(tmp_path / "both")
    assert torch.equal(opened(images).logits, classifier(images).logits)
    assert np.array_equal(images_of(DDAEPipeline.from_pretrained(tmp_path / "both")), drawn)


DIFFUSERS_ALONE = """
import sys
from diffusers import AutoModel, DDPMPipeline, DiTTransformer2DModel, UNet2DModel
unet, dit = sys.argv[1:]
for cls, folder in ((DDPMPipeline, unet), (AutoModel, unet + "/unet"), (AutoModel, dit + "/transformer")):
    try:
        cls.from_pretrained(folder)
    except Exception as error:
        print(cls.__name__, error)
for cls, folder in ((UNet2DModel, unet + "/unet"), (DiTTransformer2DModel, dit + "/transformer")):
    sys.stderr.write(cls.__name__)
    cls.from_pretrained(folder)
"""


def run_python(script, folder, *arguments):
    """Run a script in a folder where the package is not found, and return what it printed and its warnings."""
    environment = {**os.environ, "HF_HOME": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, done.stderr


def test_diffusers_alone_says_what_is_missing_or_what_it_leaves_out(folders, tmp_path):
    """Where the package is installed, its pipeline opens the folder; of a bare network it warns of what it lacks."""
    plain = {kind: root / "plain" for kind, (root, _) in folders.items()}
    said, warned = run_python(
        f"import sys\nsys.modules['ddae_hf'] = None\n{DIFFUSERS_ALONE}", tmp_path, *plain.values()
    )
    pipeline, *networks = said.strip().splitlines()
    assert pipeline.startswith("DDPMPipeline") and "ddae_hf" in pipeline
    for line, cls in zip(networks, STOCK, strict=True):
        assert line.startswith("AutoModel") and cls.__name__ in line
    for part in warned.split("DiTTransformer2DModel", 1):
        assert "'self_condition_layer'" in part and "self_conditioning.scale.weight" in part
    assert type(DDPMPipeline.from_pretrained(plain["unet"]).unet) is SelfConditionedUNet2DModel


WITHOUT_THE_PACKAGE = """
import sys
sys.modules["ddae_hf"] = None  # importing it fails, as where it is not installed
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from transformers import AutoModel
known = {"trust_remote_code": True}
options = {"batch_size": 2, "num_inference_steps": 2, "output_type": "pt"}

def draw(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(generator=torch.Generator().manual_seed(0), **options).images

for code, folder in zip(sys.argv[1::2], sys.argv[2::2]):
    pipeline = DiffusionPipeline.from_pretrained(code, custom_pipeline="pipeline", **known)
    images = draw(pipeline)
    pipeline.save_pretrained(folder + "/again")
    assert torch.equal(draw(type(pipeline).from_pretrained(folder + "/again")), images)
    model = AutoModel.from_pretrained(folder + "/model", **known).eval()
    features = model(torch.zeros(2, 3, 8, 8)).pooler_output.detach()
    save_file({"images": images.contiguous(), "features": features}, folder + "/found.safetensors")
"""


@torch.no_grad()
def test_copies_with_their_code_need_no_package(folders, tmp_path):
    models, arguments = {}, []
    for kind, (root, _) in folders.items():
        models[kind] = DDAEModel.from_pretrained(root / "code", sigma=0.1)
        models[kind].save_pretrained(tmp_path / kind / "model", include_code=True)
        arguments += [root / "code", tmp_path / kind]
    (tmp_path / "home").mkdir()
    run_python(WITHOUT_THE_PACKAGE, tmp_path / "home", *arguments)
    for kind, (root, pipeline) in folders.items():
        found = load_file(tmp_path / kind / "found.safetensors")
        np.testing.assert_allclose(found["images"].permute(0, 2, 3, 1), images_of(pipeline), rtol=0, atol=1e-6)
        torch.testing.assert_close(found["features"], models[kind](torch.zeros(2, 3, 8, 8)).pooler_output)
        assert component(tmp_path / kind / "again") == component(root / "plain")


PUBLISH = """
from ddae_hf import DDAEPipeline
for kind in ("unet", "dit"):
    DDAEPipeline.from_pretrained(f"{root}/{kind}").save_pretrained(
        f"{root}/code-{kind}", push_to_hub=True, repo_id=f"tester/{kind}", include_code=True
    )
"""
FROM_THE_HUB = """
import torch
from safetensors.torch import save_file
found = {}
for kind in ("unet", "dit"):
    pipeline = Pipeline.from_pretrained(f"tester/{kind}", **options)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(2, generator=torch.Generator().manual_seed(0), num_inference_steps=2, output_type="pt")
    found[kind] = drawn.images.contiguous()
save_file(found, file)
"""
WITH_IT = "from ddae_hf import DDAEPipeline as Pipeline\noptions = {}\n"
WITHOUT_IT = """
import sys
sys.modules["ddae_hf"] = None
from diffusers import DiffusionPipeline as Pipeline
options = {"custom_pipeline": "pipeline", "trust_remote_code": True}
"""


@pytest.mark.slow
@pytest.mark.hub
def test_it_opens_from_the_hub_with_the_package_and_without(folders, tmp_path):
    for kind, (_, pipeline) in folders.items():
        pipeline.save_pretrained(tmp_path / kind)
    (tmp_path / "server").mkdir()
    with HubServer(tmp_path / "server") as server:
        programs = {"publisher": f"root = {str(tmp_path)!r}\n{PUBLISH}"}
        for name, start in (("with", WITH_IT), ("without", WITHOUT_IT)):
            programs[name] = f"file = {str(tmp_path / name)!r}\n{start}{FROM_THE_HUB}"
        for name, program in programs.items():
            done = run_client(server, program, cache=tmp_path / f"cache-{name}", OMP_NUM_THREADS="1")
            assert done.returncode == 0, done.stderr[-3000:]
    for name in ("with", "without"):
        found = load_file(tmp_path / name)
        for kind, (_, pipeline) in folders.items():
            drawn = found[kind].permute(0, 2, 3, 1)
            np.testing.assert_allclose(drawn, images_of(pipeline), rtol=0, atol=1e-6)


@pytest.mark.parametrize("library", ["os", "ddae_hf", "ddae_hf.checkpoints", "torch"])
def test_an_index_that_names_another_module_is_refused(saved, tmp_path, library):
    _, pipeline = saved
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    name = "unet" if "unet" in index else "transformer"
    index[name][0] = library
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"takes its {name} from '{library}': allowed is diffusers"):
        DDAEPipeline.from_pretrained(tmp_path)


DENOISERS = {
    "unet": {"_class_name": "SelfConditionedUNet2DModel", **TINY, "in_channels": 1, "out_channels": 1},
    "dit": {"_class_name": "SelfConditionedDiTTransformer2DModel", **DIT, "in_channels": 1, "num_layers": 3},
}
del DENOISERS["dit"]["num_embeds_ada_norm"]


@pytest.mark.parametrize("kind", DENOISERS)
def test_it_is_pretrained_resumed_exactly_swept_and_sampled(digits, tmp_path, kind):
    images = Images.open(str(digits))
    short = {"max_train_samples": 96, "total_batch_size": 32, "sample_steps": 0, "num_inference_steps": 2}
    short |= {"denoiser": DENOISERS[kind], "checkpointing_steps": 3, "lr_warmup_steps": 1, "learning_rate": 1e-3}
    short |= {"class_conditional": kind == "dit", "seed": 1, "grid_images": 2}
    pretrain(images, output_dir=str(tmp_path / "whole"), max_train_steps=6, **short)
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "checkpoint-3").symlink_to(tmp_path / "whole" / "checkpoint-3")
    options = {"resume_from_checkpoint": "latest", "max_train_steps": 6}
    pretrain(images, output_dir=str(tmp_path / "again"), **options, **short)
    assert distance(tmp_path / "whole", tmp_path / "again") == 0
    opened = DDAEPipeline.from_pretrained(tmp_path / "whole")
    assert type(opened.denoiser).__name__ == DENOISERS[kind]["_class_name"]
    assert all(p.any() for p in opened.denoiser.self_conditioning.parameters())
    with pytest.raises(ValueError, match="denoiser.self_condition_layer was"):
        other = DENOISERS[kind] | {"self_condition_layer": None}
        pretrain(images, output_dir=str(tmp_path / "again"), **options, **short | {"denoiser": other})
    assert len(generate(str(tmp_path / "whole"), num_images=2, num_inference_steps=2).images) == 2
    layers = layer_names(opened.denoiser)[-2:]
    found = sweep(str(tmp_path / "whole"), images, layers=layers, sigmas=[0.1], max_train_samples=200, output_dir=None)
    assert {pair.layer for pair in found.pairs} == set(layers)


def test_an_option_of_neither_class_is_refused(digits, tmp_path):
    images, wrong = Images.open(str(digits)), DENOISERS["unet"] | {"self_condition": "mid_block"}
    with pytest.raises(ValueError, match=r"SelfConditionedUNet2DModel has no options \['self_condition'\]"):
        pretrain(images, output_dir=str(tmp_path), denoiser=wrong, max_train_steps=1)


@pytest.mark.processes
def test_processes_that_share_or_divide_it_train_the_same_network(digits, tmp_path):
    """The U-Net's weights do not depend on how it was trained; nor do the DiT's, whose blocks are checkpointed."""

    def run(kind, name, *more):
        options = options_of(digits, tmp_path / f"{kind}-{name}", "--sample_steps", 0, "--checkpointing_steps", 4)
        return [*options, "--denoiser", json.dumps(DENOISERS[kind]), *more]

    dit = ["--class_conditional", "--gradient_checkpointing", "--max_train_steps", 2]
    ways = {"shared": ["--train_batch_size", 3], "divided": ["--shard"]}
    runs = [run("unet", name, *more) for name, more in ways.items()]
    runs += [run("dit", name, *more, *dit) for name, more in ways.items()]
    done = launch(tmp_path, *runs)
    assert done.returncode == 0, done.stderr[-4000:]
    for kind in DENOISERS:
        assert distance(tmp_path / f"{kind}-shared", tmp_path / f"{kind}-divided") < 1e-6
