"""What depends on the class of a network: labels and the null class, taps, sizes."""

import json

import numpy as np
import pytest
import torch
from diffusers import (
    ConfigMixin,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    ModelMixin,
)
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from PIL import Image
from torch import nn

from ddae_hf import (
    DDAEConfig,
    DDAEForImageClassification,
    DDAEModel,
    DDAEPipeline,
    collect_hidden_states,
    layer_names,
)
from ddae_hf.checkpoints import build_scheduler, plain_config
from ddae_hf.cut import Cut, Recorder, identity
from ddae_hf.diffusion import Diffusion
from ddae_hf.experiments import Images, pretrain
from ddae_hf.hidden_states import learning_parameters
from ddae_hf.labels import drop_labels
from ddae_hf.network_class import NetworkClass, Tap
from ddae_hf.networks import NETWORKS, build_denoiser, network_of, register

from .conftest import make_dit, make_unet


def class_conditioning(denoiser, class_labels, batch_size, device, null_class=None):
    return network_of(denoiser).conditions(denoiser, class_labels, batch_size, device, null_class)


@pytest.mark.parametrize("classes", [0, 4])
def test_labels_and_null_class_follow_from_the_number_of_classes(classes):
    of_unets, of_dits = NETWORKS["UNet2DModel"], NETWORKS["DiTTransformer2DModel"]
    unet, dit = make_unet(**of_unets.label_options(classes)), make_dit(**of_dits.label_options(classes))
    assert of_unets.is_conditional(unet) == of_dits.is_conditional(dit) == bool(classes)
    assert of_dits.num_labels(dit.config) == classes + 1
    assert of_unets.num_labels(unet.config) == (classes + 1 if classes else 0)
    assert of_dits.default_null_class(dit.config) == classes and of_unets.default_null_class(unet.config) is None


def test_none_means_the_null_class():
    assert class_conditioning(make_dit(), None, 3, "cpu")["class_labels"].tolist() == [5, 5, 5]
    assert class_conditioning(make_dit(num_embeds_ada_norm=0), None, 2, "cpu")["class_labels"].tolist() == [0, 0]
    conditional = make_unet(num_class_embeds=4)
    assert class_conditioning(conditional, None, 2, "cpu", null_class=3)["class_labels"].tolist() == [3, 3]
    assert class_conditioning(make_unet(), None, 2, "cpu") == {}
    with pytest.raises(ValueError, match="pass class_labels, or set its null_class"):
        class_conditioning(conditional, None, 2, "cpu")


@pytest.mark.parametrize(
    ("network", "labels", "message"),
    [
        (make_unet(), [1, 2, 3], "this denoiser is unconditional"),
        (make_dit(num_embeds_ada_norm=0), [0, 0, 0], "this denoiser is unconditional"),
        (make_dit(), [1, 2], "2 class_labels came for 3 images"),
        (make_dit(), [1.0, 2.0, 3.0], "they must be whole numbers"),
        (make_dit(), [True, False, True], "they must be whole numbers"),
        (make_unet(num_class_embeds=4), [[0], [1], [2]], r"of shape \(3, 1\)"),
        (make_dit(), 6, "class_labels are 6 to 6: allowed are 0 to 5"),
        (make_unet(num_class_embeds=4), [0, -1, 3], "class_labels are -1 to 3: allowed are 0 to 3"),
    ],
)
def test_labels_that_cannot_be_are_refused(network, labels, message):
    with pytest.raises(ValueError, match=message):
        class_conditioning(network, labels, 3, "cpu")


def test_one_label_stands_for_all_and_vectors_pass():
    assert class_conditioning(make_dit(), 2, 3, "cpu")["class_labels"].tolist() == [2, 2, 2]
    unet = make_unet(class_embed_type="identity")
    assert class_conditioning(unet, torch.zeros(3, 128), 3, "cpu")["class_labels"].shape == (3, 128)


def test_labels_are_dropped_at_their_rate():
    labels = drop_labels(torch.full((10_000,), 2), 7, 0.1)
    assert set(labels.tolist()) == {2, 7} and (labels == 7).float().mean().item() == pytest.approx(0.1, abs=0.015)
    assert (drop_labels(labels, 9, 0.0) == labels).all() and (drop_labels(labels, 9, 1.0) == 9).all()


def test_a_dit_stops_dropping_labels_by_itself():
    dit = make_dit().train()
    fed = torch.randn(64, 3, 8, 8), torch.ones(64), torch.ones(64, dtype=torch.long)
    assert not torch.equal(dit(*fed).sample, dit(*fed).sample)
    network_of(dit).stop_own_dropping(dit)
    assert torch.equal(dit(*fed).sample, dit(*fed).sample)


def test_a_model_of_a_dit_drops_no_labels_in_training(images):
    model = DDAEModel(DDAEConfig(denoiser=plain_config(make_dit()))).train()
    noise, labels = torch.randn(5, 3, 8, 8), torch.arange(5)
    first, second = (model(images, noise=noise, class_labels=labels).pooler_output for _ in range(2))
    assert torch.equal(first, second) and set(model._no_split_modules) == {"BasicTransformerBlock"}


def test_a_learned_embedding_is_fed_integers():
    learned, times = make_unet(time_embedding_type="learned", num_train_timesteps=1000), torch.tensor([9.6, 20.2])
    assert torch.equal(network_of(learned).fed_timestep(learned, times), torch.tensor([10, 20]))
    assert network_of(learned).fed_timestep(make_unet(), times).dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize(
    "denoiser",
    [
        make_unet(sample_size=16, block_out_channels=(32, 32, 64), down_block_types=("AttnDownBlock2D",) * 3,
                  up_block_types=("AttnUpBlock2D",) * 3),
        make_unet(down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"),
                  up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D")),
        make_dit(num_embeds_ada_norm=0), make_dit(num_embeds_ada_norm=0, patch_size=1),
    ],
)  # fmt: skip
def test_a_taps_channels_and_stride_are_those_of_its_hidden_state(denoiser):
    network, side = network_of(denoiser), denoiser.config.sample_size
    conditions = class_conditioning(denoiser, None, 2, "cpu")
    for tap in network.taps(denoiser):
        hidden = collect_hidden_states(denoiser, torch.zeros(2, 3, side, side), torch.ones(2), [tap.name], **conditions)
        grid = network.on_grid(hidden[tap.name], tap, (side, side))
        assert grid.shape == (2, tap.channels, side // tap.stride, side // tap.stride), tap


def test_parts_follow_each_other_in_forward_order():
    parts = [tap.part for tap in network_of(make_unet()).taps(make_unet()) if not tap.inner]
    assert parts == ["encoder"] * 2 + ["middle"] + ["decoder"] * 4
    assert {tap.part for tap in network_of(make_dit()).taps(make_dit())} == {"decoder"}


def test_options_that_no_network_or_scheduler_can_be_built_from_are_refused():
    network = {"_class_name": "UNet2DModel", "sample_size": 32}
    for wrong in ({"layers_per_block": "x"}, {"block_out_channels": 3}):
        with pytest.raises(ValueError, match="denoiser: UNet2DModel cannot be built from this config: "):
            build_denoiser(network | wrong)
    for wrong in ({"beta_start": "x"}, {"beta_schedule": "x"}, {"num_train_timesteps": -3}):
        with pytest.raises(ValueError, match="scheduler: DDPMScheduler cannot be built from this config: "):
            build_scheduler({"_class_name": "DDPMScheduler", **wrong})
    with pytest.raises(ValueError, match="The scheduler's sigma is from nan to nan: give it betas between 0 and 1"):
        DDAEConfig(denoiser=plain_config(make_unet()), scheduler=plain_config(DDPMScheduler(beta_start=-1)), timestep=0)


def test_networks_of_other_classes_are_refused_by_name():
    with pytest.raises(ValueError, match="of class 'Linear', which is not supported: allowed are UNet2DModel, DiT"):
        layer_names(torch.nn.Linear(1, 1))
    assert network_of(torch.compile(make_unet())) is NETWORKS["UNet2DModel"]


class TwoBlocks(ModelMixin, ConfigMixin):
    """A network that diffusers lacks: two residual blocks, told the timestep by a linear map."""

    @register_to_config
    def __init__(self, sample_size=8, in_channels=3, width=16):
        super().__init__()
        self.enter, self.leave = (
            nn.Conv2d(in_channels, width, 2, stride=2),
            nn.ConvTranspose2d(width, in_channels, 2, 2),
        )
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.time = nn.Linear(1, width)

    def forward(self, sample, timestep, return_dict=True):
        hidden = self.enter(sample) + self.time(timestep[:, None] / 1000)[:, :, None, None]
        for block in self.blocks:
            hidden = block(torch.relu(hidden))
        hidden = self.leave(hidden)
        return UNet2DOutput(sample=hidden) if return_dict else (hidden,)


class DescribedTwoBlocks(NetworkClass):
    """What the package has to be told of it."""

    model = TwoBlocks
    component = "unet"

    def divisor(self, config):
        return 2, "which it halves"

    def taps(self, denoiser):
        width = denoiser.config["width"]
        return [Tap(f"blocks.{i}", width, 2, "decoder") for i in range(len(denoiser.blocks))]

    def view(self, denoiser, layers, found, stop_early):
        names = [tap.name for tap in self.taps(denoiser)]
        count = 1 + max(map(names.index, layers)) if stop_early else None
        blocks = [Recorder(b, n, found) if n in layers else b for b, n in zip(denoiser.blocks, names, strict=True)]
        return Cut(denoiser, {"blocks": blocks[:count], **({"leave": identity} if stop_early else {})})


@pytest.fixture
def two_blocks():
    register(DescribedTwoBlocks())
    torch.manual_seed(0)
    yield TwoBlocks().eval()
    del NETWORKS["TwoBlocks"]


@torch.no_grad()
@pytest.mark.parametrize("scheduler", [DDPMScheduler(), EDMEulerScheduler(), FlowMatchEulerDiscreteScheduler()])
def test_adding_a_network(two_blocks, scheduler, images, tmp_path):
    """It is tapped, cut, read, trained, sampled, saved and opened like those that the package knows."""
    fed, calls = (images, torch.full((5,), 20.0)), []
    assert layer_names(two_blocks) == ["blocks.0", "blocks.1"]
    two_blocks.blocks[1].register_forward_pre_hook(lambda *_: calls.append(None))
    by_view = collect_hidden_states(two_blocks, *fed, ["blocks.0"])["blocks.0"]
    assert not calls and by_view.shape == (5, 16, 4, 4)
    handle = two_blocks.register_forward_hook(lambda *_: None)
    assert torch.equal(collect_hidden_states(two_blocks, *fed, ["blocks.0"])["blocks.0"], by_view)
    handle.remove()
    with pytest.raises(ValueError, match="sample_size is 7: which it halves, it must be a multiple of 2"):
        DDAEConfig(denoiser={"_class_name": "TwoBlocks", "sample_size": 7})
    DDAEPipeline.for_denoiser(two_blocks, scheduler).save_pretrained(tmp_path / "pipeline")
    pipeline = DDAEPipeline.from_pretrained(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    samples = pipeline(2, generator=torch.Generator().manual_seed(0), num_inference_steps=3, output_type="pt").images
    assert samples.shape == (2, 3, 8, 8) and samples.isfinite().all()
    model = DDAEForImageClassification.from_pretrained(tmp_path / "pipeline", num_labels=3).eval()
    assert model.config.layer == "blocks.0" and model.config.hidden_size == 16
    model.freeze_denoiser()
    with torch.enable_grad():
        model(images, labels=torch.arange(5) % 3).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == [
        "classifier.weight", "classifier.bias"
    ]  # fmt: skip
    model.save_pretrained(tmp_path / "classifier")
    again = DDAEForImageClassification.from_pretrained(tmp_path / "classifier")
    assert torch.equal(again(images).logits, model(images).logits)
    assert "blocks.1.weight" not in learning_parameters(json.dumps(model.config.denoiser), ("blocks.0",))
    assert Diffusion(two_blocks, scheduler).loss(images).isfinite().all()


def test_a_network_that_was_added_is_trained(two_blocks):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), dtype=np.uint8)
    images = Images.open([Image.fromarray(each) for each in pixels])
    options = {"mixed_precision": "no", "max_train_steps": 1, "train_batch_size": 4}
    result = pretrain(images, denoiser={"_class_name": "TwoBlocks"}, **options)
    assert type(result.pipeline.denoiser) is TwoBlocks and result.steps == 1
