"""Every layout opens everywhere; what cannot be opened is refused by name."""

import json
import shutil

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DConditionModel, UNet2DModel
from safetensors.torch import load_file, save_file

from ddae_hf import DDAEConfig, DDAEForImageClassification, DDAEImageProcessor, DDAEModel, DDAEPipeline
from ddae_hf.checkpoints import fingerprint, plain_config, read_checkpoint

from .conftest import make_unet

LAYOUTS = ["pipeline", "flat", "model"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_model_and_classifier_open_every_layout(layouts, images, layout):
    expected = make_unet()
    model, info = DDAEModel.from_pretrained(layouts / layout, sigma=0.1, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, value in expected.state_dict().items():
        assert torch.equal(model.denoiser.state_dict()[name], value)
    classifier = DDAEForImageClassification.from_pretrained(
        layouts / layout, num_labels=4, layer="mid_block", sigma=0.1
    )
    assert classifier(images).logits.shape == (5, 4) and not classifier.training
    assert classifier.config.layer == "mid_block" and classifier.config.sigma == 0.1
    if layout != "model":
        assert model.config.scheduler["_class_name"] == "DDIMScheduler"
        assert model.config.scheduler["prediction_type"] == "v_prediction"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_config_and_processor_open_every_layout(layouts, layout):
    config = DDAEConfig.from_pretrained(layouts / layout)
    assert config.denoiser["block_out_channels"] == [32, 64] and config.image_size == (8, 8)
    processor = DDAEImageProcessor.from_pretrained(layouts / layout)
    assert dict(processor.size) == {"height": 8, "width": 8} and processor.num_channels == 3


def test_pipeline_opens_every_layout_and_samples_the_same(layouts):
    scheduler = DDAEPipeline.from_pretrained(layouts / "pipeline").scheduler
    images = []
    for layout in LAYOUTS:
        given = {"scheduler": scheduler} if layout == "model" else {}
        pipeline = DDAEPipeline.from_pretrained(layouts / layout, **given)
        generator = torch.Generator().manual_seed(0)
        images.append(pipeline(2, generator=generator, num_inference_steps=3, output_type="pt").images)
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])


def test_a_bare_network_says_which_schedule_it_takes(layouts):
    with pytest.warns(UserWarning, match="DDPM's defaults are taken"):
        pipeline = DDAEPipeline.from_pretrained(layouts / "model")
    with pytest.warns(UserWarning, match="DDPMScheduler is taken"):
        DDAEModel.from_pretrained(layouts / "model")
    assert isinstance(pipeline.scheduler, DDPMScheduler)
    given = {"_class_name": "DDIMScheduler"}
    assert DDAEModel.from_pretrained(layouts / "model", scheduler=given).config.scheduler == given


def test_early_files_with_old_attention_names_open(layouts, tmp_path):
    """`google/ddpm-cifar10-32` names its attention weights as diffusers did in 2022."""
    old = tmp_path / "old"
    shutil.copytree(layouts / "flat", old)
    weights = load_file(old / "diffusion_pytorch_model.safetensors")
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for key, value in weights.items():
        for new, early in names.items():
            key = key.replace(f".{new}.", f".{early}.")
        renamed[key] = value
    assert renamed.keys() != weights.keys()
    save_file(renamed, old / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    assert fingerprint(DDAEModel.from_pretrained(old).denoiser) == fingerprint(make_unet())


def test_subfolders_are_followed(layouts):
    assert DDAEModel.from_pretrained(layouts, subfolder="pipeline").config.image_size == (8, 8)
    assert DDAEConfig.from_pretrained(layouts, subfolder="flat").image_size == (8, 8)


def test_the_stored_precision_is_kept_unless_another_is_asked_for(tmp_path, layouts):
    DDPMPipeline(make_unet().bfloat16(), DDPMScheduler()).save_pretrained(tmp_path)
    model = DDAEForImageClassification.from_pretrained(tmp_path, num_labels=3)
    assert model.dtype == model.ddae.denoiser.dtype == torch.bfloat16
    assert DDAEModel.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32
    assert DDAEModel.from_pretrained(layouts / "pipeline", dtype=torch.bfloat16).dtype == torch.bfloat16
    assert read_checkpoint(tmp_path).load_denoiser().dtype == torch.bfloat16


def test_half_precision_storage_does_not_change_the_fingerprint():
    unet = make_unet()
    before = fingerprint(unet)
    assert fingerprint(make_unet().bfloat16()) == before
    with torch.no_grad():
        unet.conv_in.weight[0, 0, 0, 0] += 0.1
    assert fingerprint(unet) != before


def test_sharded_weights_open(tmp_path, images):
    model = DDAEForImageClassification(DDAEConfig(denoiser=plain_config(make_unet()), num_labels=3)).eval()
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert torch.equal(DDAEForImageClassification.from_pretrained(tmp_path)(images).logits, model(images).logits)
    assert fingerprint(read_checkpoint(tmp_path).load_denoiser()) == fingerprint(model.ddae.denoiser)


OPENERS = [
    DDAEModel.from_pretrained, DDAEForImageClassification.from_pretrained, DDAEPipeline.from_pretrained,
    DDAEConfig.from_pretrained, DDAEImageProcessor.from_pretrained,
]  # fmt: skip


@pytest.mark.parametrize("open_checkpoint", OPENERS)
def test_what_is_no_checkpoint_is_refused(open_checkpoint, tmp_path):
    with pytest.raises(ValueError, match="is no checkpoint that ddae_hf can open"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ValueError, match="found: vit"):
        open_checkpoint(tmp_path)
    with pytest.raises(OSError, match="is not a folder"):
        open_checkpoint(tmp_path / "missing")


@pytest.mark.parametrize("open_checkpoint", OPENERS)
def test_other_denoisers_are_refused_with_those_supported(open_checkpoint, tmp_path):
    """Stable Diffusion's layout: its denoiser is conditioned on text."""
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.30.0"}
    for name, cls in [("unet", "UNet2DConditionModel"), ("scheduler", "PNDMScheduler"), ("vae", "AutoencoderKL")]:
        index[name] = ["diffusers", cls]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="'UNet2DConditionModel', which is not supported: allowed are UNet2DModel"):
        open_checkpoint(tmp_path)
    bare = tmp_path / "bare"
    UNet2DConditionModel(
        sample_size=8, block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        layers_per_block=1, cross_attention_dim=8,
    ).save_pretrained(bare)  # fmt: skip
    with pytest.raises(ValueError, match="allowed are UNet2DModel"):
        open_checkpoint(bare)


def test_latent_pipelines_are_refused(layouts, tmp_path):
    index = json.loads((layouts / "pipeline" / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"vqvae": ["diffusers", "VQModel"]}))
    with pytest.raises(ValueError, match=r"vqvae.*not supported"):
        read_checkpoint(tmp_path)


def test_pickles_are_never_read(layouts, tmp_path):
    model = tmp_path / "pickled"
    UNet2DModel.from_pretrained(layouts / "model").save_pretrained(model, safe_serialization=False)
    assert (model / "diffusion_pytorch_model.bin").exists()
    for open_checkpoint in (DDAEModel.from_pretrained, DDAEPipeline.from_pretrained):
        with pytest.raises(ValueError, match="Only safetensors weights are read"):
            open_checkpoint(model)


def test_an_incomplete_pipeline_says_what_is_missing(layouts, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(layouts / "flat", broken)
    (broken / "scheduler_config.json").unlink()
    with pytest.raises(ValueError, match=r"incomplete: scheduler_config.json is missing"):
        DDAEModel.from_pretrained(broken)


def test_a_repository_that_is_not_in_the_cache_says_so(tmp_path):
    with pytest.raises(OSError, match=r"nobody/nothing"):
        DDAEModel.from_pretrained("nobody/nothing", cache_dir=tmp_path)
