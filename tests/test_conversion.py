"""Published checkpoints: equal to an evaluation of the original formulas, or refused; nothing in a file runs."""

import argparse
import io
import math
import os
import pickle
import resource
import struct
import sys
import time
import zipfile
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DiTPipeline, DiTTransformer2DModel, UNet2DModel
from torch import nn

from ddae_hf import (
    DDAEForImageClassification,
    DDAEImageProcessor,
    DDAEModel,
    DDAEPipeline,
    add_noise,
    layer_names,
    timestep_to_sigma,
)
from ddae_hf.conversion import DIT_HEADS, convert, convert_dit, convert_unet
from ddae_hf.experiments.probing import make_classifier, save_classifier
from ddae_hf.hidden_states import collect_hidden_states
from ddae_hf.networks import PAPER_UNET, network_of
from ddae_hf.pickles import read_weights

from . import commands
from .conftest import make_vae, together


def random_state(shapes, seed=0):
    """Weights of which every part matters: norms near one, the others of a layer's usual size."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator)
        fan = math.prod(shape[1:])
        state[name] = 1 + 0.3 * value if "norm" in name and name.endswith("weight") else value / max(fan, 10) ** 0.5
    return state


def linear(name, outputs, inputs, kernel=()):
    return {f"{name}.weight": (outputs, inputs, *kernel), f"{name}.bias": (outputs,)}


def apply(state, name, x):
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


# --- DiT, after the paper: adaLN-Zero blocks on patches, cosine and sine of t * 10000 ** (-i / 128) ---


def dit_state(width=64, depth=3, patch=2, channels=4, grid=4, classes=1000, learn_sigma=True):
    shapes = linear("x_embedder.proj", width, channels, (patch, patch))
    shapes |= linear("t_embedder.mlp.0", width, 256) | linear("t_embedder.mlp.2", width, width)
    shapes |= {"y_embedder.embedding_table.weight": (classes + 1, width)}
    for i in range(depth):
        shapes |= linear(f"blocks.{i}.attn.qkv", 3 * width, width) | linear(f"blocks.{i}.attn.proj", width, width)
        shapes |= linear(f"blocks.{i}.mlp.fc1", 4 * width, width) | linear(f"blocks.{i}.mlp.fc2", width, 4 * width)
        shapes |= linear(f"blocks.{i}.adaLN_modulation.1", 6 * width, width)
    outputs = patch**2 * channels * (2 if learn_sigma else 1)
    shapes |= linear("final_layer.linear", outputs, width)
    shapes |= linear("final_layer.adaLN_modulation.1", 2 * width, width)
    angles = torch.arange(grid)[:, None] * 10000 ** (-torch.arange(width // 4) / (width / 4))
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    column, row = line.repeat(grid, 1), line.repeat_interleave(grid, dim=0)
    return random_state(shapes) | {"pos_embed": torch.cat([column, row], dim=1)[None]}


def evaluate_dit(state, x, t, labels, heads):
    """Return the output, and the hidden states after each block."""

    def normed(h, shift, scale):
        h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
        return h * (1 + scale[:, None]) + shift[:, None]

    angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    time = apply(state, "t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], dim=1))
    c = F.silu(apply(state, "t_embedder.mlp.2", F.silu(time)) + state["y_embedder.embedding_table.weight"][labels])
    kernel = state["x_embedder.proj.weight"]
    patch = kernel.shape[-1]
    patches = F.unfold(x, patch, stride=patch).mT
    h = patches @ kernel.flatten(1).T + state["x_embedder.proj.bias"] + state["pos_embed"]
    hidden = []
    for i in range(sum(name.endswith("attn.qkv.bias") for name in state)):
        shift1, scale1, gate1, shift2, scale2, gate2 = apply(state, f"blocks.{i}.adaLN_modulation.1", c).chunk(6, dim=1)
        qkv = apply(state, f"blocks.{i}.attn.qkv", normed(h, shift1, scale1))
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        attended = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        h = h + gate1[:, None] * apply(state, f"blocks.{i}.attn.proj", attended.transpose(1, 2).flatten(2))
        inner = F.gelu(apply(state, f"blocks.{i}.mlp.fc1", normed(h, shift2, scale2)), approximate="tanh")
        h = h + gate2[:, None] * apply(state, f"blocks.{i}.mlp.fc2", inner)
        hidden.append(h)
    out = apply(
        state, "final_layer.linear", normed(h, *apply(state, "final_layer.adaLN_modulation.1", c).chunk(2, dim=1))
    )
    # Each token is a patch: rows of pixels, pixels, channels.
    out = out.unflatten(-1, (patch * patch, -1)).transpose(2, 3).flatten(2).mT
    return F.fold(out, x.shape[-1], patch, stride=patch), hidden


@pytest.fixture(scope="module")
def dit(tmp_path_factory):
    """A training checkpoint of a DiT, converted by the script, and its weights."""
    root = tmp_path_factory.mktemp("dit")
    state, args = dit_state(classes=7), argparse.Namespace(num_classes=7, model="DiT")
    other = {name: torch.zeros_like(value) for name, value in state.items()}
    torch.save({"model": other, "ema": state, "opt": {"state": {}, "param_groups": []}, "args": args}, root / "a.pt")
    make_vae().save_pretrained(root / "vae")
    commands.run(
        "convert", str(root / "a.pt"), "--num_heads", "4", "--vae", str(root / "vae"), "--output_dir", str(root / "out")
    )
    return root / "out", state


def dit_inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    times = torch.tensor([0.0, 3.0, 120.0, 511.0, 999.0])
    return torch.randn(5, 4, 8, 8, generator=generator), times, torch.tensor([0, 6, 3, 7, 2])


def test_a_dit_computes_what_the_original_does(dit):
    folder, state = dit
    x, t, labels = dit_inputs()
    expected, hidden = evaluate_dit(state, x, t, labels, heads=4)
    assert expected.std() > 0.3
    pipeline, model = DDAEPipeline.from_pretrained(folder), DDAEModel.from_pretrained(folder)
    for denoiser in (pipeline.denoiser, model.denoiser):
        output = denoiser(x, t, class_labels=labels).sample
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    states = collect_hidden_states(model.denoiser, x, t, layer_names(model.denoiser), class_labels=labels)
    for mine, theirs in zip(states.values(), hidden, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_frequencies_survive_saving_and_stock_diffusers_has_its_own(dit, tmp_path):
    folder, state = dit
    x, t, labels = dit_inputs()
    expected, _ = evaluate_dit(state, x, t, labels, heads=4)
    DDAEPipeline.from_pretrained(folder).save_pretrained(tmp_path / "again")
    again = DDAEPipeline.from_pretrained(tmp_path / "again").transformer
    torch.testing.assert_close(again(x, t, class_labels=labels).sample, expected, rtol=1e-5, atol=1e-5)
    DDAEForImageClassification.from_pretrained(folder, num_labels=2).save_pretrained(tmp_path / "classifier")
    again = DDAEForImageClassification.from_pretrained(tmp_path / "classifier").ddae.denoiser
    torch.testing.assert_close(again(x, t, class_labels=labels).sample, expected, rtol=1e-5, atol=1e-5)
    stock = DiTPipeline.from_pretrained(folder).transformer
    plain = stock(x, t, class_labels=labels).sample
    torch.testing.assert_close(plain[0], expected[0], rtol=1e-5, atol=1e-5)  # at t = 0 frequencies play no part
    assert (plain[2:] - expected[2:]).std() > 0.01 * expected.std()
    for _ in range(2):
        network_of(stock).complete(stock)
        torch.testing.assert_close(stock(x, t, class_labels=labels).sample, expected, rtol=1e-5, atol=1e-5)


def test_a_dit_that_says_nothing_of_frequencies_keeps_those_of_diffusers():
    dit = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=1, num_embeds_ada_norm=2)
    network_of(dit).complete(dit)
    assert dit.transformer_blocks[0].norm1.emb.time_proj.downscale_freq_shift == 1


def test_a_converted_dit_samples(dit):
    pipeline = DDAEPipeline.from_pretrained(dit[0])
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    (image,) = pipeline(class_labels=[3], guidance_scale=2.0, num_inference_steps=2, generator=generator).images
    assert image.size == (16, 16) and pipeline.null_class == 7


def test_a_pixel_dit_without_learned_variance():
    state = dit_state(width=384, depth=1, channels=3, grid=2, classes=1000, learn_sigma=False)
    conversion = convert_dit(state)
    config = conversion.denoiser.config
    assert (config.num_attention_heads, config.out_channels, config.sample_size) == (DIT_HEADS[384], 3, 4)
    torch.manual_seed(0)
    x, t, labels = torch.randn(2, 3, 4, 4), torch.tensor([50.0, 900.0]), torch.tensor([1, 1000])
    expected, _ = evaluate_dit(state, x, t, labels, heads=6)
    torch.testing.assert_close(conversion.denoiser(x, t, class_labels=labels).sample, expected, rtol=1e-5, atol=1e-5)
    assert conversion.source_parameters == sum(v.numel() for v in state.values()) - state["pos_embed"].numel()


def test_what_a_dit_file_does_not_say_is_asked_for():
    state = dit_state(depth=1)
    with pytest.raises(ValueError, match=r"width 64.*Pass num_heads"):
        convert_dit(state)
    for heads in (5, 0, -4):
        with pytest.raises(ValueError, match="must divide the width"):
            convert_dit(state, num_heads=heads)
    with pytest.raises(ValueError, match=r"1001 rows for 1001 classes.*null class"):
        convert_dit(state, num_heads=4, num_classes=1001)
    state["pos_embed"] = state["pos_embed"] + 0.01
    with pytest.raises(ValueError, match="sine-cosine"):
        convert_dit(state, num_heads=4)
    with pytest.raises(ValueError, match=r"has parts that networks of its kind lack: blocks.0.ls1"):
        convert_dit({**dit_state(depth=1), "blocks.0.ls1": torch.ones(64)}, num_heads=4)
    state = dit_state(depth=1)
    state |= random_state(linear("blocks.0.mlp.fc1", 128, 64) | linear("blocks.0.mlp.fc2", 64, 128))
    with pytest.raises(ValueError, match=r"cannot hold these weights.*\(\(128,\) in the file, \(256,\) in the"):
        convert_dit(state, num_heads=4)


# --- The authors' U-Net, after their description: norms of 32 groups, one attention head, sine and cosine of time ---


def residual(name, inputs, outputs, time):
    shapes = {f"{name}.norm1.{part}": (inputs,) for part in ("weight", "bias")}
    shapes |= {f"{name}.norm2.{part}": (outputs,) for part in ("weight", "bias")}
    shapes |= linear(f"{name}.conv1", outputs, inputs, (3, 3)) | linear(f"{name}.conv2.1", outputs, outputs, (3, 3))
    shapes |= linear(f"{name}.time_emb.1", outputs, time)
    return shapes | (linear(f"{name}.shortcut", outputs, inputs, (1, 1)) if inputs != outputs else {})


def attention(name, width):
    shapes = {f"{name}.norm.{part}": (width,) for part in ("weight", "bias")}
    return shapes | linear(f"{name}.projection", 3 * width, width) | linear(f"{name}.output", width, width)


def unet_shapes(stem=32, multiples=(1, 2), attends=(False, True), blocks=1):
    time = 4 * stem
    shapes = linear("image_proj", stem, 3, (3, 3)) | linear("time_emb.lin1", time, stem)
    shapes |= linear("time_emb.lin2", time, time)
    widths = [stem * m for m in multiples]
    width, skips, i = stem, [stem], 0
    for level, outputs in enumerate(widths):
        for _ in range(blocks):
            shapes |= residual(f"down.{i}.res", width, outputs, time)
            shapes |= attention(f"down.{i}.attn", outputs) if attends[level] else {}
            width, i = outputs, i + 1
            skips.append(width)
        if level < len(widths) - 1:
            shapes |= linear(f"down.{i}.conv", width, width, (3, 3))
            i += 1
            skips.append(width)
    shapes |= residual("middle.res1", width, width, time) | residual("middle.res2", width, width, time)
    shapes |= attention("middle.attn", width)
    i = 0
    for level in reversed(range(len(widths))):
        for _ in range(blocks + 1):
            shapes |= residual(f"up.{i}.res", width + skips.pop(), widths[level], time)
            width = widths[level]
            shapes |= attention(f"up.{i}.attn", width) if attends[level] else {}
            i += 1
        if level:
            shapes |= linear(f"up.{i}.conv", width, width, (3, 3))
            i += 1
    shapes |= {f"norm.{part}": (width,) for part in ("weight", "bias")}
    return shapes | linear("final", 3, width, (3, 3))


def evaluate_unet(state, x, time):
    """Return the output, and the hidden states of encoder blocks, middle and decoder blocks in order."""

    def norm(name, h, groups=32):
        return F.group_norm(h, groups, state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-5)

    def conv(name, h, stride=1):
        weight = state[f"{name}.weight"]
        return F.conv2d(h, weight, state[f"{name}.bias"], stride=stride, padding=weight.shape[-1] // 2)

    def residual_block(name, h):
        inner = conv(f"{name}.conv1", F.silu(norm(f"{name}.norm1", h)))
        inner = inner + apply(state, f"{name}.time_emb.1", F.silu(embedded))[:, :, None, None]
        inner = conv(f"{name}.conv2.1", F.silu(norm(f"{name}.norm2", inner)))
        return inner + (conv(f"{name}.shortcut", h) if f"{name}.shortcut.weight" in state else h)

    def attend(name, h):
        if f"{name}.norm.weight" not in state:
            return h
        q, k, v = apply(state, f"{name}.projection", norm(f"{name}.norm", h).flatten(2).mT).chunk(3, dim=-1)
        mixed = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        return h + apply(state, f"{name}.output", mixed).mT.unflatten(2, h.shape[2:])

    half = state["time_emb.lin1.weight"].shape[1] // 2
    angles = time[:, None] * torch.exp(-math.log(10000) * torch.arange(half) / (half - 1))
    embedded = apply(state, "time_emb.lin1", torch.cat([angles.sin(), angles.cos()], dim=1))
    embedded = apply(state, "time_emb.lin2", F.silu(embedded))
    h, hidden = conv("image_proj", x), []
    skips, count = [h], {side: len({k.split(".")[1] for k in state if k.startswith(side)}) for side in ("down", "up")}
    for i in range(count["down"]):
        if f"down.{i}.conv.weight" in state:
            h = conv(f"down.{i}.conv", h, stride=2)
        else:
            h = attend(f"down.{i}.attn", residual_block(f"down.{i}.res", h))
            hidden.append(h)
        skips.append(h)
    h = residual_block("middle.res2", attend("middle.attn", residual_block("middle.res1", h)))
    hidden.append(h)
    for i in range(count["up"]):
        if f"up.{i}.conv.weight" in state:
            h = conv(f"up.{i}.conv", h.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
        else:
            h = attend(f"up.{i}.attn", residual_block(f"up.{i}.res", torch.cat([h, skips.pop()], dim=1)))
            hidden.append(h)
    return conv("final", F.silu(norm("norm", h, groups=8))), hidden


@pytest.fixture(scope="module")
def unet_file(tmp_path_factory):
    state = random_state(unet_shapes())
    ema = {f"ema_model.nn_model.{name}": value for name, value in state.items()}
    ema |= {f"online_model.nn_model.{name}": value * 0 for name, value in state.items()}
    ema |= {"initted": torch.tensor(True), "step": torch.tensor(5)}
    path = tmp_path_factory.mktemp("unet") / "model_1999.pth"
    torch.save({"MODEL": {"module.nn_model.x": torch.zeros(1)}, "EMA": ema, "opt": {"state": {}}}, path)
    return path, state


def test_the_default_network_has_the_size_of_the_authors():
    shapes = unet_shapes(128, (1, 2, 2, 2), (False, True, False, False), 2)
    with torch.device("meta"):
        ours = UNet2DModel.from_config(PAPER_UNET).num_parameters()
    assert sum(map(math.prod, shapes.values())) == ours == 35_746_307


@pytest.mark.parametrize("framework", ["ddpm", "edm"])
def test_a_unet_has_the_hidden_states_of_the_original(unet_file, framework, tmp_path):
    path, state = unet_file
    commands.run(
        "convert", str(path), "--framework", framework, "--resolution", "8", "--output_dir", str(tmp_path / "out")
    )
    model = DDAEModel.from_pretrained(tmp_path / "out")
    torch.manual_seed(0)
    clean, noise = torch.rand(5, 3, 8, 8) * 2 - 1, torch.randn(5, 3, 8, 8)
    if framework == "ddpm":  # they count t from 1, and feed t / 1000
        betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        t = torch.tensor([1, 2, 11, 500, 1000])
        abar = (1 - betas).cumprod(0)[t - 1]
        sigma, time = timestep_to_sigma(model.scheduler, t - 1), t / 1000
        x = (abar.sqrt()[:, None, None, None] * clean + (1 - abar).sqrt()[:, None, None, None] * noise).float()
        assert model.config.sigma == pytest.approx(sigma[2].item(), rel=1e-6)
    else:
        sigma = torch.tensor([0.002, 0.06, 0.5, 7.0, 80.0])
        time, level = sigma.log() / 4, sigma[:, None, None, None]
        x = (clean + level * noise) / (level**2 + 0.25).sqrt()
    sample, timestep = add_noise(model.scheduler, clean, noise, sigma)
    timestep = network_of(model.denoiser).fed_timestep(model.denoiser, timestep)
    torch.testing.assert_close(sample, x, rtol=1e-4, atol=1e-4)
    assert framework == "edm" or torch.equal(timestep, t - 1)
    expected, hidden = evaluate_unet(state, x, time)
    taps = layer_names(model.denoiser)
    states = collect_hidden_states(model.denoiser, x, timestep, taps)
    for tap, theirs in zip(taps, hidden, strict=True):
        torch.testing.assert_close(states[tap], theirs, rtol=1e-5, atol=1e-5)
    features = model(clean, sigma=sigma, noise=noise).last_hidden_state
    torch.testing.assert_close(features, states[model.config.layer], rtol=1e-3, atol=1e-3)
    wrong = model.denoiser(x, timestep).sample
    assert (wrong - expected).abs().max() > 1e-2  # why sampling is refused
    with pytest.raises(ValueError, match=r"cannot generate.*8 groups"):
        DDAEPipeline.from_pretrained(tmp_path / "out")
    classifier = DDAEForImageClassification.from_pretrained(tmp_path / "out", num_labels=2)
    assert classifier(clean).logits.shape == (5, 2)


def test_what_a_unet_cannot_be_is_said(unet_file, tmp_path):
    path, state = unet_file
    with pytest.raises(ValueError, match="does not say under which one"):
        convert(path)
    with pytest.raises(ValueError, match=r"num_heads came.*allowed are framework, sample_size"):
        convert(path, framework="ddpm", num_heads=4)
    with pytest.raises(ValueError, match=r"64 channels behind a stem of 32.*DDPM\+\+"):
        convert_unet(random_state({**unet_shapes(), **residual("down.0.res", 32, 64, 128)}), "ddpm")
    with pytest.raises(ValueError, match=r"has parts that networks of its kind lack: time_emb.aug_emb"):
        convert_unet({**state, "time_emb.aug_emb.weight": torch.zeros(32, 9)}, "edm")
    missing = {f"ema_model.nn_model.{k}": v for k, v in state.items() if k != "final.bias"}
    torch.save({"EMA": missing}, tmp_path / "missing.pth")
    with pytest.raises(ValueError, match=r"lacks the tensor 'final.bias'"):
        convert(tmp_path / "missing.pth", framework="ddpm")


# --- Pickles ---

OLD_START = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)  # of torch files before version 1.6


def edm_pickle(folder, network="SongUNet"):
    """A pickle in EDM's format, whose source code would leave a file behind if it ran."""
    module = ModuleType("torch_utils.persistence")
    exec("def _reconstruct_persistent_obj(meta): raise SystemError", module.__dict__)
    source = f"open({str(folder / 'ran')!r}, 'w')"

    class Persistent:
        def __init__(self, class_name, **state):
            meta = {"type": "class", "version": 6, "module_src": source, "class_name": class_name, "state": state}
            self.meta = meta

        def __reduce__(self):
            return module._reconstruct_persistent_obj, (self.meta,)

    inner = {"_parameters": {"weight": nn.Parameter(torch.zeros(5, 2))}, "_modules": nn.ModuleDict()}
    inner = Persistent(network, skip_scale=np.sqrt(0.5), **inner)
    content = {"ema": Persistent("EDMPrecond", sigma_data=0.5, _modules={"model": inner}), "augment_pipe": None}
    modules = {"torch_utils": ModuleType("torch_utils"), "torch_utils.persistence": module}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in modules.items():
            patch.setitem(sys.modules, name, value)
        (folder / "edm.pkl").write_bytes(pickle.dumps(content))
    return folder / "edm.pkl"


@pytest.mark.parametrize(
    "network, reason", [("SongUNet", r"sqrt\(1/2\)"), ("DhariwalUNet", "worked out"), ("Other", "none of SongUNet")]
)
def test_a_pickle_of_edm_is_refused_by_name(tmp_path, network, reason):
    with pytest.raises(ValueError, match=rf"is a pickle of EDM.*It cannot be converted.*{reason}") as error:
        convert(edm_pickle(tmp_path, network))
    assert (network in str(error.value)) is (network != "Other") and not (tmp_path / "ran").exists()


class Evil:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("save", [lambda content, path: path.write_bytes(pickle.dumps(content)), torch.save])
def test_a_file_that_names_a_function_does_not_run_it(tmp_path, save):
    mark = tmp_path / "ran"
    code = f"open({str(mark)!r}, 'w')"
    for function, args, name in (
        (os.system, (f"touch {mark}",), r"(posix|nt)\.system"),
        (eval, (code,), r"(builtins|__builtin__)\.eval"),
        (getattr, ("", "join"), r"(builtins|__builtin__)\.getattr"),
    ):
        save({"ema": Evil(function, *args)}, tmp_path / "evil.pkl")
        with pytest.raises(ValueError, match=f"names {name}" if save is torch.save else "it is not a torch file"):
            convert(tmp_path / "evil.pkl")
    assert not mark.exists()


def test_what_an_allowed_name_is_given_does_not_run_either(tmp_path):
    mark, inner = tmp_path / "ran", io.BytesIO()
    torch.save(Evil(eval, f"open({str(mark)!r}, 'w')"), inner)
    evil = Evil(torch.storage._load_from_bytes, inner.getvalue())
    # The class itself is given a state, and an entry of a module is asked for by a dotted name.
    states = (b"ccollections\nOrderedDict\n}b.", b"\x80\x04\x8c\x02os\x8c\x04path\x93.")
    for pickled in (pickle.dumps({"ema": evil}), *states):
        for start, reason in ((b"", "it is not a torch file"), (OLD_START, "restricted loader")):
            (tmp_path / "evil.pkl").write_bytes(start + pickled)
            with pytest.raises(ValueError, match=reason):
                convert(tmp_path / "evil.pkl")
    assert not mark.exists()


def test_files_of_no_known_kind_are_refused(tmp_path):
    for name, content in (("other.pt", {"state_dict": {}, "epoch": 3}), ("list.pt", [1, 2])):
        torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match="not a checkpoint of a known kind"):
            convert(tmp_path / name)
    torch.save(dit_state(depth=1), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert convert(tmp_path / "old.pt", num_heads=4).denoiser.config.num_layers == 1
    (tmp_path / "cut.pt").write_bytes((tmp_path / "old.pt").read_bytes()[:20_000])
    (tmp_path / "text.pt").write_text("Not found")
    for name, reason in (("cut.pt", "restricted loader"), ("text.pt", "not a torch file"), ("no.pt", "is not a file")):
        with pytest.raises(ValueError, match=reason):
            convert(tmp_path / name)


def test_a_small_file_cannot_claim_a_large_network(tmp_path):
    state = dit_state(depth=1)
    expanded = torch.zeros(1).expand(1, 2000**2, 64)
    claims = {
        "blocks": (state | {"blocks.19999.x": torch.zeros(1)}, "not numbered from 0 on"),
        "positions": (state | {"pos_embed": expanded}, "pos_embed of shape .* has fewer values"),
        "kernel": (state | {"x_embedder.proj.weight": torch.zeros(64)}, "it must have four dimensions"),
        "classes": ({"ema": state, "args": argparse.Namespace(num_classes="ten")}, "not laid out as networks"),
    }
    for name, (content, reason) in claims.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match=reason):
            convert(tmp_path / name, num_heads=4)
    shared = ("SongUNet",)
    for _ in range(40):  # as words it would have a million million parts
        shared = (shared, shared)
    (tmp_path / "nested.pkl").write_bytes(edm_pickle(tmp_path, shared).read_bytes())
    with pytest.raises(ValueError, match="is a pickle of EDM"):
        convert(tmp_path / "nested.pkl")


def claims_of_pickles():
    """Short pickles that claim much, and what is said of each."""
    size, text, ends = struct.pack("<Q", 3 << 30), struct.pack("<I", 3 << 30), "it ends where .* more bytes should"
    yield "room for 268 million objects", b"\x80\x02Nr\xff\xff\xff\x0f.", "cannot be read"
    yield "bytes", b"\x80\x04\x8e" + size + b".", ends
    yield "short bytes", b"\x80\x03B" + text + b".", ends
    yield "text", b"\x80\x04\x8d" + size + b".", ends
    yield "short text", b"\x80\x02X" + text + b".", ends
    yield "old text", b"\x80\x02T" + struct.pack("<i", 2**31 - 1) + b".", ends
    yield "a frame", b"\x80\x04\x95" + size + b"N.", ends
    yield "a byte array", b"\x80\x05\x96" + size + b".", "holds the instruction"
    yield "a number", b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b".", "holds the instruction"
    pairs = b"N" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60))  # a pair of one pair twice, and so on
    for kind, pickled in (
        ("key", b"}" + pairs + b"Ns."),
        ("keys", b"}(" + pairs + b"Nu."),
        ("set", b"\x8f(" + pairs + b"\x90."),
    ):
        yield kind, b"\x80\x04" + pickled, "a key that is neither text nor a number"
    call = b"ccollections\nOrderedDict\nq\x00"
    for kind, arguments in (
        ("nulls", b"B" + struct.pack("<I", 10**6) + bytes(10**6)),
        ("nones", b"(" + b"N" * 10**6 + b"t"),
    ):
        calls = b"](" + call + arguments + b"q\x01R" + b"h\x00h\x01R" * 200 + b"e."
        yield f"calls with {kind}", b"\x80\x03" + calls, "a call without a tuple of at most 16 arguments"


def claims_of_torch_files(folder):
    """Small torch files, of both formats, that claim much."""
    tensor, many = {"a": torch.zeros(4)}, b"J" + struct.pack("<i", 10**9)
    torch.save(tensor, folder / "zip")
    torch.save(tensor, folder / "old", _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(folder / "zip") as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    (pickled,) = (name for name in entries if name.endswith("data.pkl"))
    whole = (folder / "old").read_bytes()
    torch.save(Evil(bytearray, 3 << 30), folder / "evil", _use_new_zipfile_serialization=False)
    yield "old", "a buffer", (folder / "evil").read_bytes(), r"names \w+\.bytearray"
    yield "old", "text", OLD_START + b"\x80\x02X" + struct.pack("<I", 3 << 30), "it ends where"
    # One number is the storage's, and one the tensor's.
    for kind, content in (("old", whole), ("zip", entries[pickled])):
        longer = content.replace(b"K\x04\x85", many + b"\x85")
        both = longer.replace(b"K\x04t", many + b"t").replace(b"K\x04N", many + b"N")
        assert content != longer != both
        yield kind, "a tensor", longer, "a tensor of 1,000,000,000 numbers in a storage of 4"
        yield kind, "both", both, "its tensors claim more than the"
        yield kind, "a call", content.replace(b"torch\nFloatStorage", b"torch\nFloatTensor"), "names torch.FloatTensor"
    keys = whole.rindex(b"\x80\x02]")
    yield "old", "no storages", whole[:keys] + b"\x80\x02].", "does not hold the storages"
    for name, content in (("compressed", bytes(80 << 20)), ("twice", entries[pickled])):
        with zipfile.ZipFile(folder / "made", "w", zipfile.ZIP_DEFLATED if name == "compressed" else 0) as archive:
            archive.writestr(pickled, content)
            if name == "twice":
                archive.writestr("other/data.pkl", content)
        reason = "claim more than" if name == "compressed" else "has 2 pickles"
        yield "made", name, (folder / "made").read_bytes(), reason


def torch_file(folder, kind, content):
    """Return a torch file's bytes, of the zip format given its pickle."""
    if kind != "zip":
        return content
    with zipfile.ZipFile(folder / "zip") as old, zipfile.ZipFile(folder / "new", "w") as new:
        for name in old.namelist():
            new.writestr(name, content if name.endswith("data.pkl") else old.read(name))
    return (folder / "new").read_bytes()


def test_what_a_file_costs_is_bounded_by_its_size(tmp_path):
    """In a process of its own, whose memory is measured, and which is stopped where a file takes too long."""
    files = [(name, content, "it is not a torch file") for name, content, _ in claims_of_pickles()]
    files += [(f"torch: {name}", OLD_START + content, reason) for name, content, reason in claims_of_pickles()]
    for kind, name, content, reason in claims_of_torch_files(tmp_path):
        files.append((f"{kind}: {name}", torch_file(tmp_path, kind, content), reason))

    def read():
        for name, content, reason in files:
            (tmp_path / "file").write_bytes(content)
            before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
            with pytest.raises(ValueError, match=reason):
                convert(tmp_path / "file")
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            assert grown < 64 << 10 and time.monotonic() - started < 3, (name, grown)

    assert together(read) == [0]


@pytest.mark.parametrize("zipped", [True, False])
def test_what_a_training_run_keeps_beside_its_weights_is_read(zipped, tmp_path):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    network(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer = torch.optim.AdamW(network.parameters())
    optimizer.step()
    content = {
        "args": argparse.Namespace(sizes=[1, 2], dtype=torch.float32, device=torch.device("cpu"), size=torch.Size([3])),
        "schedule": torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5]).state_dict(),
        "parameters": dict(network.named_parameters()),
        "others": [torch.zeros(0), torch.zeros(1).expand(3, 4), torch.eye(3)[1:].T, torch.ones(2, dtype=torch.bool)],
        "half": torch.ones(3, dtype=torch.bfloat16),
        "plain": {"text": "ü" * 300, "number": -(2**200), "pair": (1, (2.5, None))},
    }
    state = {"ema": network.state_dict(), "opt": optimizer.state_dict()}
    torch.save(content | state, tmp_path / "run.pt", _use_new_zipfile_serialization=zipped)
    found = read_weights(tmp_path / "run.pt")
    assert vars(found["args"]) == vars(content["args"]) and found["schedule"] == content["schedule"]
    assert found["plain"] == content["plain"] and torch.equal(found["half"], content["half"])
    pairs = [*zip(found["others"], content["others"], strict=True)]
    for name in ("parameters", "ema"):
        assert found[name].keys() == (content | state)[name].keys()
        pairs += zip(found[name].values(), (content | state)[name].values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert all(torch.equal(found["opt"]["state"][0][k], v) for k, v in state["opt"]["state"][0].items())


def test_tensors_that_share_their_values_claim_no_large_network(tmp_path):
    state, values = dit_state(depth=1), torch.zeros(200_000)
    shared = {f"blocks.{i}.attn.qkv.weight": values.view(400, 500) for i in range(100)}
    torch.save(state | shared, tmp_path / "shared.pt")
    with pytest.raises(ValueError, match="The tensors share their values: they claim .* bytes, but the file holds"):
        convert(tmp_path / "shared.pt", num_heads=4)
    wide = {"x_embedder.proj.weight": torch.zeros(200_000, 4, 1, 1), "pos_embed": torch.zeros(1, 16, 200_000)}
    torch.save(state | wide, tmp_path / "wide.pt")

    def read():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(ValueError, match="cannot hold these weights: .* differ in shape"):
            convert(tmp_path / "wide.pt", num_heads=4)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10

    assert together(read) == [0]


def test_a_probe_of_features_alone_is_saved_whole(unet_file, tmp_path):
    commands.run(
        "convert", str(unet_file[0]), "--framework", "edm", "--resolution", "8", "--output_dir", str(tmp_path / "net")
    )
    options = {"layer": "mid_block", "sigma": 0.1}
    processor = DDAEImageProcessor.from_pretrained(tmp_path / "net")
    width = DDAEModel.from_pretrained(tmp_path / "net", **options).config.hidden_size
    weight, bias = torch.randn(2, width), torch.randn(2)
    classifier = make_classifier(str(tmp_path / "net"), ["a", "b"], weight, bias, **options)
    save_classifier(tmp_path / "probe", classifier, str(tmp_path / "net"), processor)
    model = DDAEForImageClassification.from_pretrained(tmp_path / "probe")
    assert torch.equal(model.classifier.weight, weight) and model.config.layer == "mid_block"


def test_the_script_writes_into_empty_folders_only(unet_file, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    with pytest.raises(SystemExit, match="is not an empty folder"):
        commands.run("convert", str(unet_file[0]), "--framework", "ddpm", "--output_dir", str(tmp_path / "full"))
    with pytest.raises(SystemExit, match="does not say under which one"):
        commands.run("convert", str(unet_file[0]), "--output_dir", str(tmp_path / "new"))
    make_vae().save_pretrained(tmp_path / "vae")
    common = ["--framework", "ddpm", "--vae", str(tmp_path / "vae"), "--output_dir", str(tmp_path / "new")]
    with pytest.raises(SystemExit, match="works on pixels"):
        commands.run("convert", str(unet_file[0]), *common)
    assert not (tmp_path / "new").exists() and len(list((tmp_path / "full").iterdir())) == 1
