"""Feature maps at several depths."""

import pytest
import torch
from diffusers import DDPMScheduler

from ddae_hf import DDAEBackbone, DDAEConfig, DDAEForImageClassification, DDAEModel, DDAEPipeline, layer_names
from ddae_hf.checkpoints import plain_config

from .conftest import make_dit, make_unet


def make_backbone(denoiser=None, **options):
    return DDAEBackbone(DDAEConfig(denoiser=plain_config(denoiser or make_unet()), **options)).eval()


@torch.no_grad()
def test_feature_maps_are_the_models_hidden_states(images):
    names = ["down_blocks.0.resnets.0", "mid_block", "up_blocks.1.resnets.1"]
    backbone = make_backbone(out_features=names)
    model = DDAEModel(backbone.config).eval()
    model.load_state_dict(backbone.ddae.state_dict())
    expected = model(images, output_hidden_states=names).hidden_states
    outputs = backbone(images)
    assert outputs.hidden_states is None
    for found, hidden, channels in zip(outputs.feature_maps, expected, backbone.channels, strict=True):
        assert torch.equal(found, hidden) and hidden.shape[1] == channels
    (maps,) = backbone(images, return_dict=False)
    assert all(map(torch.equal, maps, outputs.feature_maps))
    every = backbone(images, output_hidden_states=True).hidden_states
    assert len(every) == len(backbone.stage_names) and torch.equal(every[-1], expected[-1])


def test_nothing_after_the_deepest_map_is_computed(images):
    backbone = make_backbone(out_features=["down_blocks.0.resnets.0"], layer="up_blocks.1.resnets.1")
    backbone(images).feature_maps[0].sum().backward()
    used = {name for name, p in backbone.named_parameters() if p.grad is not None}
    assert "ddae.denoiser.conv_in.weight" in used and not any("up_blocks" in name for name in used)


def test_names_and_indices_say_the_same():
    names = layer_names(make_unet())
    by_index = make_backbone(out_indices=[0, 2]).config
    assert by_index.out_features == [names[0], names[2]] and by_index.stage_names == names
    assert make_backbone(out_features=[names[0], names[2]]).out_indices == [0, 2]
    default = make_backbone(layer="mid_block")
    assert default.out_features == ["mid_block"]
    for options, message in (
        ({"out_features": ["mid_blok"]}, "must be a subset of stage_names"),
        ({"out_indices": [99]}, "must be valid indices"),
        ({"out_features": ["mid_block", names[0]]}, "same order"),
    ):
        with pytest.raises(ValueError, match=message):
            make_backbone(**options)


@torch.no_grad()
def test_a_dits_tokens_are_laid_out_on_its_patches():
    dit = make_dit(sample_size=8, patch_size=2)
    backbone = make_backbone(dit, out_features=["transformer_blocks.1"])
    images = torch.rand(2, 3, 8, 8)
    (grid,) = backbone(images).feature_maps
    tokens = backbone.ddae(images, output_hidden_states=["transformer_blocks.1"]).hidden_states[0]
    assert grid.shape == (2, 32, 4, 4)
    assert torch.equal(grid[:, :, 1, 3], tokens[:, 1 * 4 + 3])


@torch.no_grad()
def test_opens_every_checkpoint_and_saves(images, layouts, tmp_path):
    names = ["mid_block", "up_blocks.0.attentions.0"]
    expected = DDAEBackbone.from_pretrained(layouts / "pipeline", out_features=names)
    expected.save_pretrained(tmp_path / "backbone")
    DDAEForImageClassification.from_pretrained(layouts / "pipeline", num_labels=3).save_pretrained(tmp_path / "whole")
    sources = [layouts / "flat", tmp_path / "whole"]
    opened = [DDAEBackbone.from_pretrained(tmp_path / "backbone")]
    opened += [DDAEBackbone.from_pretrained(source, out_features=names) for source in sources]
    for backbone in opened:
        assert all(map(torch.equal, backbone(images).feature_maps, expected(images).feature_maps))
    assert (
        DDAEBackbone.from_pretrained(tmp_path / "backbone", out_indices=[0]).out_features
        == layer_names(make_unet())[:1]
    )


def test_a_frozen_backbone_trains_only_what_stands_on_it(images):
    backbone = make_backbone(out_features=["mid_block"])
    backbone.freeze_denoiser()
    backbone.train()
    assert not any(p.requires_grad for p in backbone.parameters())
    assert not any(module.training for module in backbone.ddae.denoiser.modules())


def test_a_backbones_pipeline_is_its_denoisers(tmp_path):
    make_backbone(scheduler=plain_config(DDPMScheduler())).save_pretrained(tmp_path)
    assert type(DDAEPipeline.from_pretrained(tmp_path).denoiser).__name__ == "UNet2DModel"
