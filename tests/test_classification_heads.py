"""The heads on hidden states against formulas of their own, in float64; how they begin, run and travel."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler

from ddae_hf import DDAEConfig, DDAEForImageClassification, DDAEPipeline
from ddae_hf.checkpoints import plain_config
from ddae_hf.classification_heads import AttentionPooling, Fusion, draw_anew

from .conftest import make_dit, make_unet

TAPS = [("mid_block", 0.1), ("up_blocks.0.attentions.0", 0.4), ("down_blocks.0.resnets.0", 0.4), ("mid_block", 0.4)]
DIT_TAPS = [("transformer_blocks.0", 0.1), ("transformer_blocks.2", 0.4), ("transformer_blocks.0.attn1.to_k", 0.4)]
NETWORKS = {"unet": (make_unet, TAPS), "dit": (make_dit, DIT_TAPS)}


def make_config(network="unet", **options):
    make, taps = NETWORKS[network]
    given = {"denoiser": plain_config(make()), "taps": taps, "num_labels": 4, "head_width": 32}
    return DDAEConfig(**{**given, **options})


def make_model(network="unet", **options):
    torch.manual_seed(0)
    return DDAEForImageClassification(make_config(network, **options)).eval()


def states_of(network):
    """Hidden states as the networks give them: maps, or tokens."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "unet": [(3, 64, 4, 4), (3, 64, 4, 4), (3, 32, 8, 8), (3, 64, 4, 4)],
        "dit": [(3, 16, 32)] * 3,
    }[network]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 1 for shape in shapes]


def varied(head):
    """A head in float64 whose every number is another, gains and biases included."""
    generator = torch.Generator().manual_seed(1)
    for parameter in head.double().parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
    return head


def norm(values, module, axes):
    """LayerNorm over the last axes, by its formula."""
    mean = values.mean(axes, keepdim=True)
    deviation = ((values - mean) ** 2).mean(axes, keepdim=True) + module.eps
    return (values - mean) / deviation.sqrt() * module.weight + module.bias


def attend(queries, tokens, attention):
    """Eight heads of softmax(q k / sqrt(d)) v, one at a time."""

    def projected(name, values):
        layer = getattr(attention, f"to_{name}")
        return values @ layer.weight.T + (0 if layer.bias is None else layer.bias)

    q = projected("q", queries)
    k = projected("k", tokens)
    v = projected("v", tokens)
    width = q.shape[-1] // 8
    outputs = []
    for i in range(8):
        part = slice(i * width, (i + 1) * width)
        shares = torch.softmax(q[..., part] @ k[..., part].mT / math.sqrt(width), dim=-1)
        outputs.append(shares @ v[..., part])
    return torch.cat(outputs, dim=-1) @ attention.to_out[0].weight.T + attention.to_out[0].bias


@torch.no_grad()
@pytest.mark.parametrize("network", NETWORKS)
def test_attention_pooling_is_one_query_over_all_positions_of_all_taps(network):
    head = varied(AttentionPooling(make_config(network, head="attention")))
    states = states_of(network)
    tokens = []
    for state, own, project in zip(states, head.norms, head.projections, strict=True):
        positions = state if network == "dit" else torch.stack(
            [state[:, :, row, column] for row in range(state.shape[2]) for column in range(state.shape[3])], dim=1
        )  # fmt: skip
        tokens.append(norm(positions, own, (-1,)) @ project.weight.T + project.bias)
    expected = attend(head.query.expand(3, 1, -1), torch.cat(tokens, dim=1), head.attention)[:, 0]
    torch.testing.assert_close(head(states), expected, rtol=1e-10, atol=1e-10)
    assert head.size == 32


@torch.no_grad()
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("side", [16, 2])
def test_the_fusion_head_is_that_of_its_paper(network, side, monkeypatch):
    """With two blocks a level, layers that two levels read sharing their projection, and class tokens joined."""
    monkeypatch.setattr("ddae_hf.classification_heads.LARGEST_SIDE", side)
    config = make_config(network, head="fusion")
    head, states = varied(Fusion(config)), states_of(network)
    layers = list(dict.fromkeys(layer for layer, _ in config.taps))
    found = []
    for level in (0.1, 0.4):
        tokens = [head.class_token.expand(3, 1, -1)]
        for (layer, sigma), state in zip(config.taps, states, strict=True):
            if sigma != level:
                continue
            if network == "dit":  # row by row
                state = torch.stack([state[:, row * 4 : row * 4 + 4] for row in range(4)], dim=1).permute(0, 3, 1, 2)
            if state.shape[2] > side:
                step = state.shape[2] // side
                state = F.avg_pool2d(state, step)
            own, project = head.norms[layers.index(layer)], head.projections[layers.index(layer)]
            state = norm(state, own, (1, 2, 3))
            positions = state.flatten(2).mT
            tokens.append(positions @ project.weight[:, :, 0, 0].T + project.bias)
        rows = torch.cat(tokens, dim=1)
        for block in head.blocks:
            normed = norm(rows, block.norm1, (-1,))
            rows = rows + attend(normed, normed, block.attn1)
            first, last = block.ff.net[0].proj, block.ff.net[2]
            inside = norm(rows, block.norm3, (-1,)) @ first.weight.T + first.bias
            inside = inside * (1 + torch.erf(inside / math.sqrt(2))) / 2
            rows = rows + inside @ last.weight.T + last.bias
        found.append(rows[:, 0])
    torch.testing.assert_close(head(states), torch.cat(found, dim=1), rtol=1e-10, atol=1e-10)
    assert head.size == 64 and len(head.blocks) == 2 and head.blocks[0].ff.net[0].proj.out_features == 4 * 32
    assert len(head.projections) == len(layers)


def test_the_width_is_256_where_none_is_asked_for():
    assert make_config(head="attention", head_width=None).head_width == 256
    assert make_model(head="fusion", head_width=None).classifier.in_features == 2 * 256


@pytest.mark.parametrize("head", ["attention", "fusion"])
def test_one_tap_has_heads_too(images, head):
    model = make_model(taps=None, layer="mid_block", sigma=0.2, head=head)
    with torch.no_grad():
        hidden = model.ddae(images).last_hidden_state
        torch.testing.assert_close(model(images).logits, model.classifier(model.head([hidden])))
        assert len(model(images, output_hidden_states=True).hidden_states) == 3
        assert not torch.equal(model(images, sigma=0.3).logits, model(images).logits)
    model.train()(images, labels=torch.arange(5) % 4).loss.backward()
    assert all(p.grad is not None for p in model.head.parameters())


@pytest.mark.parametrize("head", ["attention", "fusion"])
def test_a_new_head_on_a_checkpoint_begins_as_one_that_is_built(tmp_path, head):
    """transformers makes it without memory first: what it fills in must be what the parts' classes draw."""
    DDAEPipeline(make_unet(), DDIMScheduler()).save_pretrained(tmp_path)
    options = {"num_labels": 4, "taps": TAPS, "head": head}
    torch.manual_seed(3)
    opened = DDAEForImageClassification.from_pretrained(tmp_path, **options)
    built = DDAEForImageClassification(opened.config)
    assert opened.head is not None and opened.head.state_dict().keys() == built.head.state_dict().keys()
    for name, value in opened.head.state_dict().items():
        other = built.head.state_dict()[name]
        assert value.isfinite().all() and value.shape == other.shape, name
        if value.std() == 0:
            assert torch.equal(value, other), name  # gains are one and offsets zero
        elif value.numel() >= 1000:
            assert math.isclose(value.std(), other.std(), rel_tol=0.2), name
    token = opened.head.query if head == "attention" else opened.head.class_token
    assert 0.01 < token.std() < 0.03
    assert torch.equal(opened.ddae.denoiser.conv_in.weight, make_unet().conv_in.weight)
    torch.manual_seed(3)
    again = DDAEForImageClassification.from_pretrained(tmp_path, **options)
    assert all(torch.equal(value, opened.state_dict()[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize("head", ["attention", "fusion"])
def test_a_head_is_drawn_anew_as_a_whole(head):
    model = make_model(head=head)
    before = copy.deepcopy(model.state_dict())
    for parameter in model.head.parameters():
        parameter.data.fill_(7.0)
    model.reset_head()
    after = model.state_dict()
    assert not any((after[name] == 7.0).any() for name in after if name.startswith("head."))
    assert not torch.equal(after["classifier.weight"], before["classifier.weight"])
    assert all(torch.equal(after[name], value) for name, value in before.items() if name.startswith("ddae."))
    torch.manual_seed(5)
    draw_anew(model.head)
    first = copy.deepcopy(model.head.state_dict())
    torch.manual_seed(5)
    draw_anew(model.head)
    assert all(torch.equal(value, first[name]) for name, value in model.head.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head", ["attention", "fusion"])
def test_heads_run_in_half_precision_and_open_so(images, tmp_path, head, dtype):
    model = make_model(head=head)
    expected = model(images).logits
    half = model.to(dtype)
    half.save_pretrained(tmp_path)
    opened = DDAEForImageClassification.from_pretrained(tmp_path)
    assert opened.dtype == opened.classifier.weight.dtype == dtype
    assert torch.equal(opened(images).logits, half(images).logits)
    torch.testing.assert_close(half(images).logits.float(), expected, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("head", ["attention", "fusion"])
def test_heads_learn_under_autocast_and_with_checkpointed_blocks(images, head):
    model = make_model(head=head).train()
    model.gradient_checkpointing_enable()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(images, labels=torch.arange(5) % 4).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("head", ["attention", "fusion"])
def test_heads_compile_to_one_graph_and_export(images, head):
    model = make_model(head=head)
    expected = model(images).logits
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")(images).logits
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-5)
    batch = torch.export.Dim("batch", min=2, max=63)
    exported = torch.export.export(model, (images,), dynamic_shapes={"pixel_values": {0: batch}}).module()
    torch.testing.assert_close(exported(images[:3]).logits, expected[:3], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("head", ["attention", "fusion"])
def test_heads_whose_weights_are_on_disk_give_the_same_logits(images, tmp_path, head):
    model = make_model(head=head)
    model.save_pretrained(tmp_path / "model")
    places = {"ddae": "cpu", "head": "disk", "feature_norm": "cpu", "classifier": "cpu"}
    opened = DDAEForImageClassification.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offloaded"
    )
    assert any(p.device.type == "meta" for p in opened.head.parameters())
    torch.testing.assert_close(opened(images).logits, model(images).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("head", ["attention", "fusion"])
def test_attention_in_plain_steps_is_the_heads_too(images, head, tmp_path):
    model = make_model(head=head)
    expected = model(images).logits
    model.save_pretrained(tmp_path)
    model.set_attn_implementation("eager")
    opened = DDAEForImageClassification.from_pretrained(tmp_path, attn_implementation="eager")
    for eager in (model, opened):
        kinds = {type(part.processor).__name__ for part in eager.head.modules() if hasattr(part, "processor")}
        assert kinds == {"AttnProcessor"}
        torch.testing.assert_close(eager(images).logits, expected, rtol=1e-4, atol=1e-5)
