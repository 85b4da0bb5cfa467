"""Denoisers of latents: encoding, features, sampling, checkpoints."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    EDMEulerScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from transformers import AutoModelForImageClassification, pipeline

from ddae_hf import (
    DDAEBackbone,
    DDAEConfig,
    DDAEForImageClassification,
    DDAEImageProcessor,
    DDAEModel,
    DDAEPipeline,
    latents,
)
from ddae_hf.checkpoints import plain_config
from ddae_hf.experiments.draws import NOISE, POSTERIOR, indexed_noise
from ddae_hf.experiments.features import batch_features, extract_features
from ddae_hf.experiments.models import open_model
from ddae_hf.latents import decode, encode
from ddae_hf.noise import add_noise

from .conftest import make_dit, make_unet, make_vae
from .stock import stable_diffusion_xl


@pytest.fixture
def pixels():
    return torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def no_decoder(model):
    def refuse(*args):
        raise AssertionError("the decoder ran")

    model.base_model.vae.decoder.register_forward_pre_hook(refuse)
    return model


@torch.no_grad()
def test_latents_are_the_scaled_mean_or_a_scaled_draw(pixels):
    vae = make_vae(scaling_factor=0.7, shift_factor=0.2)
    posterior = vae.encode(pixels).latent_dist
    noise = torch.randn(5, 4, 8, 8)
    torch.testing.assert_close(encode(vae, pixels), (posterior.mean - 0.2) * 0.7)
    draw = posterior.mean + (0.5 * posterior.logvar).exp() * noise
    torch.testing.assert_close(encode(vae, pixels, noise), (draw - 0.2) * 0.7)
    torch.testing.assert_close(decode(vae, encode(vae, pixels)), vae.decode(posterior.mean).sample, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("channels", [4, 16, 32])
def test_channels_with_a_mean_and_a_deviation_of_their_own_are_scaled_by_them(channels):
    """As in the VAEs that are trained together with a denoiser; the decoder gets back what was encoded."""
    rng = np.random.default_rng(channels)
    mean, deviation = rng.normal(size=channels).tolist(), rng.uniform(0.5, 3, channels).tolist()
    vae = make_vae(latent_channels=channels, latents_mean=mean, latents_std=deviation, scaling_factor=0.7)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    posterior = vae.encode(images).latent_dist
    expected = [(posterior.mean[:, k] - mean[k]) * 0.7 / deviation[k] for k in range(channels)]
    latents = encode(vae, images)
    torch.testing.assert_close(latents, torch.stack(expected, 1), rtol=1e-6, atol=1e-6)
    got = []
    vae.decoder.register_forward_pre_hook(lambda module, args: got.append(args[0]))
    decoded = decode(vae, latents)
    vae.decode(posterior.mean)
    torch.testing.assert_close(got[0], got[1], rtol=0, atol=1e-6)
    assert decoded.dtype == torch.float32


@torch.no_grad()
def test_latents_with_a_mean_and_a_deviation_are_those_of_diffusers_own_pipelines(tmp_path):
    scales = {"latents_mean": [0.1, -0.2, 0.3, 1.0], "latents_std": [0.5, 2.0, 1.5, 0.7], "scaling_factor": 0.7}
    parts = stable_diffusion_xl(tmp_path / "unscaled").components
    pipeline = StableDiffusionXLPipeline(**{**parts, "vae": make_vae(**scales)}, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    drawn = [
        pipeline("a cat", height=16, width=16, num_inference_steps=2, output_type=kind,
                 generator=torch.Generator().manual_seed(0)).images
        for kind in ("latent", "pt")
    ]  # fmt: skip
    assert torch.equal((decode(pipeline.vae, drawn[0]) / 2 + 0.5).clamp(0, 1), drawn[1])
    editing = StableDiffusionXLImg2ImgPipeline(**pipeline.components, add_watermarker=False)
    images = torch.rand(1, 3, 16, 16)
    noise = torch.Generator().manual_seed(0)
    theirs = editing.prepare_latents(images * 2 - 1, 0, 1, 1, torch.float32, "cpu", noise, add_noise=False)
    draw = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(encode(pipeline.vae, images * 2 - 1, draw), theirs)
    pipeline.save_pretrained(tmp_path / "scaled")
    model = DDAEModel.from_pretrained(tmp_path / "scaled", sample_posterior=True)
    assert torch.equal(model.encode(images * 2 - 1, draw), theirs)


@pytest.mark.parametrize("kind", ["AutoencoderTiny", "AutoencoderDC", "AutoencoderKLQwenImage", "AutoencoderKLFlux2"])
def test_other_vaes_are_refused_by_name(latent_dit, tmp_path, kind):
    shutil.copytree(latent_dit, tmp_path / "other")
    index = json.loads((tmp_path / "other" / "model_index.json").read_text())
    index["vae"][1] = kind
    (tmp_path / "other" / "model_index.json").write_text(json.dumps(index))
    for opener in (DDAEModel, DDAEConfig, DDAEPipeline):
        with pytest.raises(ValueError, match=f"its `vae` is of class '{kind}', which is not supported: allowed"):
            opener.from_pretrained(tmp_path / "other")


@torch.no_grad()
def test_features_are_those_of_the_noisy_latents_with_the_null_class(latent_dit, pixels):
    model = no_decoder(DDAEModel.from_pretrained(latent_dit, layer="transformer_blocks.2", timestep=121))
    assert model.config.image_size == (16, 16) and model.config.sample_shape == (4, 8, 8)
    transformer, vae = DiTPipeline.from_pretrained(latent_dit).transformer, make_vae()
    latents = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(2))
    abar = DDIMScheduler().alphas_cumprod[121]
    noisy = abar.sqrt() * latents + (1 - abar).sqrt() * noise
    kept = []
    transformer.transformer_blocks[2].register_forward_hook(lambda *args: kept.append(args[-1]))
    transformer(noisy, torch.full((5,), 121), torch.full((5,), 1000))
    outputs = model(pixels, noise=noise)
    torch.testing.assert_close(outputs.last_hidden_state, kept[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs.pooler_output, kept[0].mean(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_sampling_equals_the_stock_pipeline(latent_dit, guidance_scale):
    ours, stock = DDAEPipeline.from_pretrained(latent_dit), DiTPipeline.from_pretrained(latent_dit)
    labels = ours.get_label_ids(["goldfish", "Tinca tinca"])
    assert labels == stock.get_label_ids(["goldfish", "Tinca tinca"]) == [1, 0]
    whole = {"tench, Tinca tinca": 0, "goldfish, Carassius auratus": 1}
    assert ours.labels == stock.labels | whole and list(ours.labels) == sorted(ours.labels)
    options = {"guidance_scale": guidance_scale, "num_inference_steps": 5, "output_type": "np"}
    images = [
        pipe(class_labels=labels, generator=torch.Generator().manual_seed(3), **options).images
        for pipe in (ours, stock)
    ]
    assert images[0].shape == (2, 16, 16, 3) and images[0].std() > 0
    np.testing.assert_allclose(images[0], images[1], rtol=0, atol=1e-6)


def test_a_pipeline_is_saved_whole_and_opens_in_the_stock_one(latent_dit, tmp_path):
    DDAEPipeline.from_pretrained(latent_dit).save_pretrained(tmp_path)
    again, stock = DDAEPipeline.from_pretrained(tmp_path), DiTPipeline.from_pretrained(tmp_path)
    assert again.get_label_ids("goldfish") == stock.get_label_ids(["goldfish"]) == [1]
    assert torch.equal(stock.vae.quant_conv.weight, make_vae().quant_conv.weight)
    with pytest.raises(ValueError, match="No class is named 'godlfish'.*goldfish"):
        again.get_label_ids("godlfish")
    latents = again(2, 0, output_type="latent", num_inference_steps=1).images
    assert latents.shape == (2, 4, 8, 8)
    with pytest.raises(ValueError, match="Images of 4 channels have no PIL form"):
        DDAEPipeline.from_pretrained(tmp_path, vae=None)(num_inference_steps=1)


@torch.no_grad()
def test_without_its_vae_a_denoiser_takes_latents_as_its_images(latent_dit, pixels, tmp_path):
    whole, bare = DDAEModel.from_pretrained(latent_dit), DDAEModel.from_pretrained(latent_dit, vae=None)
    assert bare.vae is None and (bare.config.num_channels, *bare.config.image_size) == whole.config.sample_shape
    features = whole(pixels).pooler_output
    torch.testing.assert_close(bare(whole.encode(pixels)).pooler_output, features)
    whole.save_pretrained(tmp_path)
    again = DDAEModel.from_pretrained(tmp_path, vae=None)
    torch.testing.assert_close(again(whole.encode(pixels)).pooler_output, features)


@torch.no_grad()
def test_every_layout_keeps_the_vae(latent_dit, pixels, tmp_path):
    options = {"num_labels": 3, "layer": "transformer_blocks.1", "sigma": 0.3}
    model = no_decoder(DDAEForImageClassification.from_pretrained(latent_dit, **options))
    logits = model(pixels).logits
    model.save_pretrained(tmp_path / "whole")
    model.save_head(tmp_path / "head", base=latent_dit)
    DDAEPipeline.from_pretrained(latent_dit).save_pretrained(tmp_path / "both")
    model.save_head(tmp_path / "both")
    for folder in ("whole", "head", "both"):
        for cls in (DDAEForImageClassification, AutoModelForImageClassification):
            torch.testing.assert_close(cls.from_pretrained(tmp_path / folder)(pixels).logits, logits)
        images = DDAEPipeline.from_pretrained(tmp_path / folder)(1, 0, num_inference_steps=1, output_type="pt").images
        assert images.shape == (1, 3, 16, 16)
    assert sum(f.stat().st_size for f in (tmp_path / "head").iterdir()) < 16384
    processor = DDAEImageProcessor.from_pretrained(tmp_path / "both")
    assert dict(processor.size) == {"height": 16, "width": 16} and processor.num_channels == 3
    processor.save_pretrained(tmp_path / "both")
    found = pipeline("image-classification", str(tmp_path / "both"))(np.zeros((40, 30, 3), np.uint8))
    assert len(found) == 3


def test_a_head_refuses_a_base_with_another_vae(latent_dit, tmp_path):
    pipe = DDAEPipeline.from_pretrained(latent_dit)
    pipe.save_pretrained(tmp_path / "base")
    model = DDAEForImageClassification.from_pretrained(tmp_path / "base", num_labels=2)
    model.save_head(tmp_path / "head", base=tmp_path / "base")
    pipe.vae = make_vae(seed=1)
    pipe.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="have changed since"):
        DDAEForImageClassification.from_pretrained(tmp_path / "head")
    with pytest.raises(ValueError, match="The VAE of this model is not that of"):
        model.save_head(tmp_path / "other", base=tmp_path / "base")


@torch.no_grad()
def test_draws_of_latents_are_fixed_in_evaluation_and_each_image_s_own_in_features(latent_dit, pixels, tmp_path):
    model = DDAEModel.from_pretrained(latent_dit, sample_posterior=True)
    mean = DDAEModel.from_pretrained(latent_dit)
    assert torch.equal(model.encode(pixels), model.encode(pixels))
    assert not torch.equal(model.encode(pixels), mean.encode(pixels))
    # The noise of the draw is not the noise that is added.
    draw = (model.encode(pixels) - mean.encode(pixels))[0].flatten()
    assert abs(torch.corrcoef(torch.stack([draw, model.fixed_noise[0].flatten()]))[0, 1]) < 0.3
    by_generator = [model.encode(pixels, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(by_generator[0], by_generator[1]) and not torch.equal(by_generator[0], by_generator[2])
    assert not torch.equal(model.train().encode(pixels), model.encode(pixels))
    model.eval().save_pretrained(tmp_path)
    torch.testing.assert_close(DDAEModel.from_pretrained(tmp_path).encode(pixels), model.encode(pixels))
    assert not DDAEModel.from_pretrained(tmp_path, vae=None).config.sample_posterior
    layers = ["transformer_blocks.0", "transformer_blocks.3"]
    whole = extract_features(model, [pixels], layers, 0.3)
    pieces = extract_features(model, [pixels[:2], pixels[2:]], layers, 0.3)
    torch.testing.assert_close(whole[layers[1]], pieces[layers[1]], rtol=0, atol=1e-5)
    own = [indexed_noise((4, 8, 8), range(5), 7, 1, purpose=purpose) for purpose in (NOISE, POSTERIOR)]
    latents = encode(model.vae, pixels, own[1])
    noisy, fed = add_noise(model.scheduler, latents, own[0], torch.tensor(0.3))
    tokens = model.denoiser.pos_embed(noisy)
    for block in model.denoiser.transformer_blocks[:1]:
        tokens = block(tokens, timestep=fed.expand(5), class_labels=torch.full((5,), 1000))
    found = batch_features(model, pixels, range(5), layers[:1], 0.3, noise_seed=7, view=1)
    torch.testing.assert_close(found[layers[0]], tokens.mean(1), rtol=1e-5, atol=1e-5)


def test_the_vae_is_never_trained(latent_dit, pixels, tmp_path):
    DDAEForImageClassification.from_pretrained(latent_dit, num_labels=2).save_pretrained(tmp_path)
    for source in (latent_dit, tmp_path):
        model = DDAEForImageClassification.from_pretrained(source, num_labels=2).train()
        pixels.grad = None
        model(pixels.requires_grad_(), labels=torch.zeros(5, dtype=torch.long)).loss.backward()
        assert not model.ddae.vae.training and all(p.grad is None for p in model.ddae.vae.parameters())
        assert model.ddae.denoiser.pos_embed.proj.weight.grad.abs().sum() > 0
        assert pixels.grad.abs().sum() > 0  # attributions go through the VAE
        model.freeze_denoiser()
        assert [n for n, p in model.named_parameters() if p.requires_grad] == ["classifier.weight", "classifier.bias"]
    model, info = DDAEModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not any(p.requires_grad for p in model.vae.parameters())


@torch.no_grad()
@pytest.mark.parametrize(("at_once", "together"), [(2**20, [5]), (2 * 16**2, [2, 2, 1]), (1, [1] * 5)])
def test_images_are_encoded_together_as_far_as_the_memory_is_bounded(
    latent_dit, pixels, monkeypatch, at_once, together
):
    """An experiment's model too, which is opened from its path."""
    model, noise = open_model(latent_dit, sample_posterior=True), torch.randn(5, 4, 8, 8)
    expected, sizes = [encode(model.vae, pixels, draw) for draw in (None, noise)], []
    monkeypatch.setattr(latents, "AT_ONCE", at_once)
    model.vae.encoder.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    found = [encode(model.vae, pixels, draw) for draw in (None, noise)]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert sizes == together * 2
    torch.testing.assert_close(model.encode(pixels, noise), found[1], rtol=0, atol=0)


@torch.no_grad()
def test_slicing_and_tiling_bound_the_memory_of_the_vae(latent_dit, pixels):
    model = DDAEModel.from_pretrained(latent_dit)
    before, sizes = model.encode(pixels), []
    model.vae.encoder.register_forward_pre_hook(lambda module, args: sizes.append(tuple(args[0].shape)))
    model.vae.enable_slicing()
    torch.testing.assert_close(model.encode(pixels), before, rtol=1e-5, atol=1e-5)
    assert sizes == [(1, 3, 16, 16)] * 5
    model.vae.disable_slicing()
    model.vae.enable_tiling()
    model.vae.tile_sample_min_size, model.vae.tile_latent_min_size = 8, 4
    sizes.clear()
    assert model.encode(pixels).shape == before.shape
    assert max(max(size[2:]) for size in sizes) == 8


@torch.no_grad()
def test_a_u_net_of_latents_and_half_precision(tmp_path, pixels):
    DDAEPipeline(make_unet(in_channels=4, out_channels=4), DDIMScheduler(), vae=make_vae()).save_pretrained(tmp_path)
    model = DDAEBackbone.from_pretrained(tmp_path, out_features=["mid_block"])
    assert model(pixels).feature_maps[0].shape == (5, 64, 4, 4)
    half = DDAEModel.from_pretrained(tmp_path, dtype=torch.float16)
    assert half.denoiser.dtype == torch.float16
    assert torch.equal(half.vae.quant_conv.weight, make_vae().quant_conv.weight)  # in float32, and unrounded
    brief = DDAEModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert brief.vae.dtype == torch.bfloat16 and brief(pixels).pooler_output.isfinite().all()


def test_a_bare_network_of_latents_is_completed_and_not_clipped(tmp_path, latent_dit):
    make_dit(in_channels=4).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="DDPM's defaults are taken"):
        pipe = DDAEPipeline.from_pretrained(tmp_path, vae=make_vae())
    latents = pipe(2, 0, torch.Generator().manual_seed(0), num_inference_steps=3, output_type="latent").images
    assert latents.abs().max() > 1
    pipe.scheduler = EDMEulerScheduler()
    with pytest.raises(ValueError, match="clip_denoised clips to"):
        pipe(2, 0, num_inference_steps=3, sampler="heun", clip_denoised=True)
    with pytest.raises(ValueError, match="`get_label_ids` turns names into them"):
        DDAEPipeline.from_pretrained(latent_dit)(class_labels=["goldfish"])


def test_a_classifier_of_latents_does_not_pass_for_one_of_images(latent_dit, tmp_path):
    model = DDAEForImageClassification.from_pretrained(latent_dit, num_labels=2, vae=None)
    assert model.config.sigma == DDAEModel.from_pretrained(latent_dit).config.sigma == 0.42
    with pytest.raises(ValueError, match="was opened without the VAE of"):
        model.save_head(tmp_path, base=latent_dit)


def test_what_does_not_go_together_is_refused(latent_dit, tmp_path):
    dit, vae = plain_config(make_dit(in_channels=4)), plain_config(make_vae())
    with pytest.raises(ValueError, match="latents of 4 channels, but the denoiser takes 3"):
        DDAEConfig(denoiser=plain_config(make_dit()), vae=vae)
    with pytest.raises(ValueError, match="sample_posterior is set, but there is no vae"):
        DDAEConfig(denoiser=dit, sample_posterior=True)
    with pytest.raises(ValueError, match="the vae is of class 'VQModel'.*allowed is AutoencoderKL"):
        DDAEConfig(denoiser=dit, vae={**vae, "_class_name": "VQModel"})
    scales = {"latents_mean": [0.5] * 4, "latents_std": [2.0] * 4}
    DDAEConfig(denoiser=dit, vae={**vae, **scales})
    for wrong, value, says in [
        ("latents_mean", None, "give latents_mean and latents_std together and without a shift, or neither"),
        ("latents_std", [2.0, 2.0, 2.0, 0.0], "it must be positive numbers, one for each of its 4 channels"),
        ("shift_factor", 0.1, "and shift_factor 0.1: give"),
    ]:
        with pytest.raises(ValueError, match=says):
            DDAEConfig(denoiser=dit, vae={**vae, **scales, wrong: value})
    for mean in ([0.5] * 3, 0.5, ["0.5"] * 4, [math.nan] * 4):
        with pytest.raises(ValueError, match="latents_mean is .*it must be numbers, one for each of its 4 channels"):
            DDAEConfig(denoiser=dit, vae={**vae, **scales, "latents_mean": mean})
    with pytest.raises(ValueError, match="latents of 4 channels, but the denoiser takes 3"):
        DDAEPipeline(transformer=make_dit(), scheduler=DDIMScheduler(), vae=make_vae())
    with pytest.raises(ValueError, match=r"takes \(batch, 3, 16, 16\)"):
        DDAEModel.from_pretrained(latent_dit)(torch.zeros(1, 4, 8, 8))
    make_dit(in_channels=4).save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="has no vae: a vae's config is of no use"):
        DDAEModel.from_pretrained(tmp_path / "bare", vae=vae, scheduler={"_class_name": "DDIMScheduler"})
    pipe = DDAEPipeline(transformer=make_dit(in_channels=4), scheduler=DDIMScheduler(), vae=make_vae())
    pipe.save_pretrained(tmp_path / "half")
    (tmp_path / "half" / "vae" / "config.json").unlink()
    with pytest.raises(ValueError, match="is incomplete: vae's config.json is missing"):
        DDAEModel.from_pretrained(tmp_path / "half")
    index = json.loads((tmp_path / "half" / "model_index.json").read_text())
    index["vae"][1] = "AutoencoderTiny"
    (tmp_path / "half" / "model_index.json").write_text(json.dumps(index))
    AutoencoderKL().save_config(tmp_path / "half" / "vae")
    with pytest.raises(ValueError, match="its `vae` is of class 'AutoencoderTiny'"):
        DDAEModel.from_pretrained(tmp_path / "half")


def test_a_network_with_features_only_is_refused_as_a_generator(tmp_path):
    config = DDAEConfig(denoiser=plain_config(make_unet()), features_only="its output layer is another network's.")
    DDAEModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has features, but cannot generate: its output layer is another network's"):
        DDAEPipeline.from_pretrained(tmp_path)


@torch.no_grad()
def test_autocast_leaves_the_vae_in_full_precision(latent_dit, pixels):
    model = DDAEModel.from_pretrained(latent_dit)
    wanted = model.encode(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.encode(pixels), wanted)


@torch.no_grad()
def test_it_exports(latent_dit, pixels):
    model = DDAEForImageClassification.from_pretrained(latent_dit, num_labels=3, layer="transformer_blocks.0").eval()
    exported = torch.export.export(model, (pixels,)).module()
    torch.testing.assert_close(exported(pixels).logits, model(pixels).logits)
