"""Sampling against diffusers' own pipelines; saving; one checkpoint for two jobs."""

import json
import math
import warnings

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    PNDMScheduler,
    RePaintScheduler,
    ScoreSdeVeScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image
from safetensors.torch import load_file

from ddae_hf import DDAEConfig, DDAEForImageClassification, DDAEPipeline
from ddae_hf.checkpoints import plain_config
from ddae_hf.networks import network_of
from ddae_hf.sampling import Heun

from .conftest import make_dit, make_unet


def sample(pipeline, batch_size=2, seed=0, output_type="np", **options):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    options = {"num_inference_steps": 4, **options}
    return pipeline(batch_size=batch_size, generator=generator, output_type=output_type, **options).images


@pytest.fixture
def pipeline(unet, scheduler):
    return DDAEPipeline(unet, scheduler)


@pytest.mark.parametrize(
    ("theirs", "scheduler"),
    [
        (DDPMPipeline, DDPMScheduler()),
        (DDIMPipeline, DDIMScheduler()),
        (DDPMPipeline, DDPMScheduler(prediction_type="sample")),
    ],
)
def test_images_are_diffusers_own(unet, theirs, scheduler):
    np.testing.assert_allclose(
        sample(DDAEPipeline(unet, scheduler)), sample(theirs(unet, scheduler)), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(
    "scheduler_class",
    [DDIMScheduler, PNDMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler, EulerDiscreteScheduler],
)
def test_every_sampler_of_the_schedule_works(unet, scheduler, scheduler_class):
    images = sample(DDAEPipeline(unet, scheduler_class.from_config(scheduler.config)))
    assert images.shape == (2, 8, 8, 3) and np.isfinite(images).all() and images.std() > 0.01


def test_generators_make_each_image_independent_of_its_batch(pipeline):
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    pipeline.set_progress_bar_config(disable=True)
    together = pipeline(3, generator=generators, num_inference_steps=4, output_type="np").images
    for i in range(3):
        np.testing.assert_allclose(sample(pipeline, 1, seed=i)[0], together[i], rtol=0, atol=1e-4)


def test_latents_are_standard_normal_noise_scaled_inside(unet, scheduler):
    euler = DDAEPipeline(unet, EulerDiscreteScheduler.from_config(scheduler.config))
    latents = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(sample(euler, latents=latents, seed=7), sample(euler, seed=0), rtol=0, atol=1e-6)


def test_output_types(pipeline):
    array, tensor, pil = (sample(pipeline, output_type=kind) for kind in ("np", "pt", "pil"))
    assert torch.equal(tensor.permute(0, 2, 3, 1), torch.from_numpy(array))
    assert isinstance(pil[0], Image.Image) and np.abs(np.asarray(pil[0]) / 255 - array[0]).max() < 0.003
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(num_inference_steps=2, return_dict=False)
    assert isinstance(images, tuple) and images[0][0].size == (8, 8)
    grey = DDAEPipeline(make_unet(in_channels=1, out_channels=1), DDPMScheduler())
    assert sample(grey, output_type="pil")[0].mode == "L"


def test_callbacks_see_and_change_the_latents(pipeline):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, int(timestep), tensors["latents"].shape))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 3 else {}

    images = sample(pipeline, callback_on_step_end=callback)
    assert [s[0] for s in seen] == [0, 1, 2, 3] and pipeline.num_timesteps == 4
    assert [s[1] for s in seen] == pipeline.scheduler.timesteps.tolist() and seen[0][2] == (2, 3, 8, 8)
    assert (images == 0.5).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "at least 1"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0: it must be a whole number of at least 1"),
        ({"output_type": "jpeg"}, "allowed are 'pil'"),
        ({"batch_size": 2.0}, "batch_size is 2.0: it must be a whole number of at least 1"),
        ({"batch_size": True}, "batch_size is True"),
        ({"num_inference_steps": 2.5}, "num_inference_steps is 2.5: it must be a whole number of at least 1"),
        ({"num_inference_steps": math.nan}, "num_inference_steps is nan"),
        ({"guidance_scale": math.nan}, "guidance_scale is nan: it must be a finite number"),
        ({"guidance_scale": -math.inf}, "guidance_scale is -inf"),
        ({"guidance_scale": None}, "guidance_scale is None"),
        ({"s_churn": math.nan}, "s_churn is nan: it must be a finite number of at least 0"),
        ({"s_churn": -1.0}, "s_churn is -1.0"),
        ({"s_min": -0.1}, "s_min is -0.1"),
        ({"s_min": math.inf}, "s_min is inf"),
        ({"s_max": math.nan}, "s_max is nan: it must be a number of at least 0.0"),
        ({"s_min": 2.0, "s_max": 1.0}, "s_max is 1.0: it must be a number of at least 2.0"),
        ({"s_noise": -1.0}, "s_noise is -1.0"),
        ({"s_noise": math.inf}, "s_noise is inf"),
        ({"latents": torch.zeros(2, 3, 4, 4)}, "must be standard-normal noise"),
        ({"latents": torch.full((2, 3, 8, 8), math.nan)}, "must be standard-normal noise"),
        ({"latents": torch.zeros(2, 3, 8, 8, dtype=torch.long)}, "must be standard-normal noise"),
        ({"class_labels": [1, 2]}, "unconditional"),
        ({"generator": [torch.Generator()]}, "batch_size says 2, generator says 1"),
        ({"callback_on_step_end_tensor_inputs": ["prompt"]}, "unknown"),
    ],
)
def test_wrong_arguments_are_refused_before_any_step(pipeline, options, message):
    pipeline.unet.forward = None  # any step would fail
    with pytest.raises(ValueError, match=message):
        pipeline(**{"batch_size": 2, **options})


def test_class_labels_reach_a_conditional_denoiser():
    conditional = DDAEPipeline(make_unet(num_class_embeds=5), DDPMScheduler())
    with pytest.raises(ValueError, match="pass class_labels, or set its null_class"):
        conditional()
    np.testing.assert_array_equal(sample(conditional, class_labels=3), sample(conditional, class_labels=[3, 3]))
    assert not np.allclose(sample(conditional, class_labels=3), sample(conditional, class_labels=4))
    with pytest.raises(ValueError, match="class_labels are of shape .* they must be whole numbers"):
        conditional(class_labels=[1.5])


def test_what_comes_one_for_an_image_says_how_many_there_are():
    conditional = DDAEPipeline(make_unet(num_class_embeds=5), DDIMScheduler())
    expected = sample(conditional, batch_size=3, class_labels=[0, 1, 2])
    noise = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for options in (
        {"class_labels": [0, 1, 2]},
        {"class_labels": torch.arange(3)},
        {"class_labels": np.arange(3)},
        {"class_labels": (0, 1, 2), "latents": noise},
    ):
        np.testing.assert_allclose(sample(conditional, batch_size=None, **options), expected, rtol=0, atol=1e-6)
    conditional.set_progress_bar_config(disable=True)
    few = {"num_inference_steps": 1, "output_type": "np"}
    assert len(conditional(class_labels=1, **few).images) == 1
    assert len(conditional(4, class_labels=1, **few).images) == 4
    assert len(conditional(class_labels=1, latents=noise, **few).images) == 3
    assert len(conditional(class_labels=1, generator=[torch.Generator()] * 2, **few).images) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 3, "class_labels": [1]}, "batch_size says 3, class_labels says 1"),
        ({"batch_size": 2, "class_labels": [1, 2, 3]}, "batch_size says 2, class_labels says 3"),
        ({"class_labels": [1, 2], "generator": [torch.Generator()] * 3}, "class_labels says 2, generator says 3"),
        ({"class_labels": 1, "latents": torch.zeros(2, 3, 8, 8), "batch_size": 1}, "batch_size says 1, latents says 2"),
        ({"class_labels": []}, "class_labels says 0"),
    ],
)
def test_numbers_of_images_that_do_not_agree_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DDAEPipeline(make_unet(num_class_embeds=5), DDIMScheduler())(**options)


def test_what_another_schedule_or_label_would_do_is_refused(unet):
    with pytest.raises(ValueError, match="ScoreSdeVeScheduler is not supported"):
        DDAEPipeline(unet, ScoreSdeVeScheduler())()
    with pytest.raises(ValueError, match="RePaintScheduler takes steps that need more"):
        DDAEPipeline(unet, RePaintScheduler())()
    learned = make_unet(time_embedding_type="learned", num_train_timesteps=1000)
    with pytest.raises(ValueError, match="cannot take the timesteps of EDMEulerScheduler"):
        DDAEPipeline(learned, EDMEulerScheduler())
    conditional = DDAEPipeline(make_unet(num_class_embeds=5), DDPMScheduler())
    with pytest.raises(ValueError, match="class_labels are 5 to 5: allowed are 0 to 4"):
        conditional(class_labels=5)


def test_denoisers_that_could_not_be_sampled_are_refused_when_they_are_opened(scheduler, tmp_path):
    DDPMPipeline(make_unet(time_embedding_type="fourier"), scheduler).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="time_embedding_type is 'fourier'"):
        DDAEPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("denoiser", [make_unet(sample_size=9), make_dit(sample_size=9), make_unet(sample_size=None)])
def test_sizes_are_refused_by_the_pipeline_as_by_the_model(scheduler, denoiser):
    """A U-Net of two levels halves its images, a DiT has patches of 2."""
    with pytest.raises(ValueError, match=r"must be a multiple of 2|has no sample_size") as of_the_model:
        DDAEConfig(denoiser=plain_config(denoiser))
    with pytest.raises(ValueError) as of_the_pipeline:
        DDAEPipeline.for_denoiser(denoiser, scheduler)
    assert str(of_the_pipeline.value) == str(of_the_model.value)
    assert DDAEPipeline(make_unet(sample_size=(8, 6)), scheduler).unet.config.sample_size == (8, 6)


def test_a_subfolder_opens_as_what_it_is(scheduler, tmp_path):
    DDAEPipeline(make_unet(seed=0), scheduler).save_pretrained(tmp_path)
    DDAEPipeline(make_unet(seed=1), scheduler).save_pretrained(tmp_path / "raw")
    raw = DDAEPipeline.from_pretrained(tmp_path, subfolder="raw").denoiser
    assert torch.equal(raw.conv_in.weight, make_unet(seed=1).conv_in.weight)


def test_other_denoisers_are_refused(scheduler):
    with pytest.raises(ValueError, match="allowed are UNet2DModel, DiTTransformer2DModel"):
        DDAEPipeline(torch.nn.Linear(1, 1), scheduler)
    with pytest.raises(ValueError, match="pass it as `transformer`"):
        DDAEPipeline(make_dit(), scheduler)
    with pytest.raises(ValueError, match="unet and transformer came"):
        DDAEPipeline(make_unet(), scheduler, transformer=make_dit())
    with pytest.raises(ValueError, match="Pass one denoiser.*none came"):
        DDAEPipeline(scheduler=scheduler)
    with pytest.raises(ValueError, match="Pass a `scheduler`"):
        DDAEPipeline(make_unet())


@pytest.mark.parametrize("scheduler", [DDIMScheduler(), EDMEulerScheduler(), FlowMatchEulerDiscreteScheduler()])
@pytest.mark.parametrize("classes", [0, 5])
def test_a_dit_samples_saves_and_opens_in_every_framework(scheduler, classes, tmp_path):
    dit = make_dit(num_embeds_ada_norm=classes)
    pipeline = DDAEPipeline(scheduler=scheduler, transformer=dit)
    assert pipeline.denoiser is dit and pipeline.null_class == classes
    expected = sample(pipeline)
    assert expected.shape == (2, 8, 8, 3) and np.isfinite(expected).all() and expected.std() > 0.01
    pipeline.save_pretrained(tmp_path / "pipeline")
    index = json.loads((tmp_path / "pipeline" / "model_index.json").read_text())
    assert {name for name in index if not name.startswith("_")} == {"scheduler", "transformer"}
    np.testing.assert_array_equal(sample(DDAEPipeline.from_pretrained(tmp_path / "pipeline")), expected)
    classifier = DDAEForImageClassification.from_pretrained(tmp_path / "pipeline", num_labels=4)
    classifier.save_pretrained(tmp_path / "classifier")
    np.testing.assert_array_equal(sample(DDAEPipeline.from_pretrained(tmp_path / "classifier")), expected)


def test_the_null_class_of_a_unet_travels_with_its_checkpoint(images, tmp_path):
    pipeline = DDAEPipeline(make_unet(num_class_embeds=5), DDIMScheduler(), null_class=4)
    np.testing.assert_array_equal(sample(pipeline), sample(pipeline, class_labels=4))
    pipeline.save_pretrained(tmp_path)
    assert DDAEPipeline.from_pretrained(tmp_path).null_class == 4
    classifier = DDAEForImageClassification.from_pretrained(tmp_path, num_labels=3)
    assert classifier.config.null_class == 4 and classifier(images).logits.shape == (5, 3)
    classifier.save_pretrained(tmp_path / "classifier")
    np.testing.assert_array_equal(sample(DDAEPipeline.from_pretrained(tmp_path / "classifier")), sample(pipeline))
    with pytest.raises(ValueError, match="null_class is 5, but this denoiser has the labels 0 to 4"):
        DDAEPipeline(make_unet(num_class_embeds=5), DDIMScheduler(), null_class=5)
    with pytest.raises(ValueError, match="takes no labels"):
        DDAEPipeline(make_unet(), DDIMScheduler(), null_class=0)


@pytest.mark.parametrize("network", ["unet", "transformer"])
def test_guidance_moves_away_from_the_null_class(network):
    """One step of DDIM from pure noise: the predictions combine linearly, and so do the images."""
    denoiser = make_unet(num_class_embeds=6) if network == "unet" else make_dit(num_embeds_ada_norm=5)
    scheduler = DDIMScheduler(prediction_type="sample", clip_sample=False)
    pipeline = DDAEPipeline.for_denoiser(denoiser, scheduler, null_class=5)

    def predicted(**options):
        found = []
        callback = lambda pipe, i, t, tensors: found.append(tensors["latents"]) or {}  # noqa: E731
        sample(pipeline, num_inference_steps=1, callback_on_step_end=callback, **options)
        return found[0]

    label, null = predicted(class_labels=[1, 2]), predicted()
    guided = predicted(class_labels=[1, 2], guidance_scale=3.0)
    torch.testing.assert_close(guided, null + 3 * (label - null), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="guidance needs `class_labels`"):
        sample(pipeline, guidance_scale=2.0)
    with pytest.raises(ValueError, match="guidance needs a null class"):
        sample(DDAEPipeline(make_unet(num_class_embeds=6), scheduler), class_labels=1, guidance_scale=2.0)


def test_a_learned_variance_is_left_to_schedulers_that_use_it():
    """As in DiT's own checkpoints: twice as many output channels as input channels."""
    dit = make_dit(out_channels=6)
    plain = sample(DDAEPipeline(scheduler=DDIMScheduler(), transformer=dit), class_labels=1, guidance_scale=2.0)
    learned = DDAEPipeline(scheduler=DDPMScheduler(variance_type="learned_range"), transformer=dit)
    images = sample(learned, class_labels=1, guidance_scale=2.0)
    assert plain.shape == images.shape == (2, 8, 8, 3) and np.isfinite(images).all()


def test_a_saved_pipeline_opens_in_diffusers(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    expected = sample(pipeline)
    np.testing.assert_allclose(sample(DDPMPipeline.from_pretrained(tmp_path)), expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(sample(DDAEPipeline.from_pretrained(tmp_path)), expected)


def test_components_can_be_replaced_when_opening(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    opened = DDAEPipeline.from_pretrained(tmp_path, scheduler=DDIMScheduler(), dtype=torch.bfloat16)
    assert isinstance(opened.scheduler, DDIMScheduler) and opened.denoiser.dtype == torch.bfloat16
    assert np.isfinite(sample(opened)).all()


def test_a_classifier_samples_what_its_generator_does(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "generator")
    classifier = DDAEForImageClassification.from_pretrained(tmp_path / "generator", num_labels=4)
    classifier.freeze_denoiser()
    torch.nn.init.ones_(classifier.classifier.weight)
    classifier.save_pretrained(tmp_path / "probe")
    opened = DDAEPipeline.from_pretrained(tmp_path / "probe")
    np.testing.assert_array_equal(sample(opened), sample(pipeline))
    assert opened._fine_tuned_from is None
    for dtype in (torch.bfloat16, torch.float16):
        half = DDAEPipeline.from_pretrained(tmp_path / "probe", dtype=dtype)
        assert half._fine_tuned_from is None and half.denoiser.dtype == dtype
    with pytest.raises(ValueError, match=r"\['custom_pipeline'\] cannot be given"):
        DDAEPipeline.from_pretrained(tmp_path / "probe", custom_pipeline="other")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_classifier_in_half_precision_is_its_generator_still(pipeline, tmp_path, dtype):
    """Whether it was opened so or cast later; one that was trained further is not."""
    pipeline.save_pretrained(tmp_path / "generator")
    opened = DDAEForImageClassification.from_pretrained(tmp_path / "generator", num_labels=4, dtype=dtype)
    cast = DDAEForImageClassification.from_pretrained(tmp_path / "generator", num_labels=4).to(dtype)
    for classifier in (opened, cast, cast.float()):
        classifier.save_pretrained(tmp_path / "half")
        assert DDAEPipeline.from_pretrained(tmp_path / "half")._fine_tuned_from is None
    with torch.no_grad():
        cast.ddae.denoiser.conv_in.weight.mul_(1.1)
    cast.save_pretrained(tmp_path / "tuned")
    assert DDAEPipeline.from_pretrained(tmp_path / "tuned")._fine_tuned_from is not None


@pytest.mark.parametrize("way", ["component", "in place", "blocks"])
def test_a_compiled_pipeline_is_saved_as_what_it_is(pipeline, tmp_path, way):
    expected, names = sample(pipeline), pipeline.unet.state_dict().keys()
    if way == "component":
        pipeline.unet = torch.compile(pipeline.unet)
    elif way == "in place":
        pipeline.unet.compile()
    else:
        pipeline.unet.mid_block = torch.compile(pipeline.unet.mid_block)
    pipeline.save_pretrained(tmp_path)
    assert load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors").keys() == names
    for cls in (DDAEPipeline, DDPMPipeline):
        np.testing.assert_array_equal(sample(cls.from_pretrained(tmp_path)), expected)
    assert any("_orig_mod" in name for name in pipeline.unet.state_dict()) == (way != "in place")


@pytest.mark.parametrize("options", [{"low_cpu_mem_usage": False}, {"device_map": "cpu"}, {"disable_mmap": True}])
def test_diffusers_own_options_of_opening_work(pipeline, tmp_path, options):
    pipeline.save_pretrained(tmp_path)
    np.testing.assert_array_equal(sample(DDAEPipeline.from_pretrained(tmp_path, **options)), sample(pipeline))


def test_sampling_from_a_fine_tuned_classifier_warns(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "generator")
    classifier = DDAEForImageClassification.from_pretrained(tmp_path / "generator", num_labels=4).train()
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.1)
    classifier(torch.zeros(2, 3, 8, 8), labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    classifier.save_pretrained(tmp_path / "fine_tuned")
    opened = DDAEPipeline.from_pretrained(tmp_path / "fine_tuned")
    with pytest.warns(UserWarning, match="no longer the generator"):
        sample(opened)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no longer the generator")
        sample(DDAEPipeline.from_pretrained(tmp_path / "generator"))


def test_an_offloaded_denoiser_gives_the_same_images(pipeline):
    """A hook of accelerate's, as CPU offloading puts there, changes nothing."""
    expected = sample(pipeline)
    cpu_offload(pipeline.unet, execution_device="cpu")
    np.testing.assert_array_equal(sample(pipeline), expected)


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        (DDIMScheduler(), {}),
        (DDPMScheduler(), {}),
        (FlowMatchHeunDiscreteScheduler(), {}),
        (EDMEulerScheduler(), {"sampler": "heun"}),
    ],
)
def test_steps_are_those_of_a_call(scheduler, options):
    pipeline = DDAEPipeline(make_unet(), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    options = {**options, "batch_size": 2, "num_inference_steps": 4}
    seen = []

    def look(pipeline, i, timestep, tensors):
        seen.append((i + 1, timestep, tensors["latents"]))
        return {}

    generator = torch.Generator().manual_seed(0)
    called = pipeline(**options, generator=generator, output_type="latent", callback_on_step_end=look).images
    steps = list(pipeline.steps(**options, generator=torch.Generator().manual_seed(0)))
    assert len(steps) == pipeline.num_timesteps == len(seen) and torch.equal(steps[-1].sample, called)
    for step, (number, timestep, latents) in zip(steps, seen, strict=True):
        assert step.number == number and step.timestep == timestep and torch.equal(step.sample, latents)
        assert not step.sample.requires_grad
    following = [step.following for step in steps]
    assert following[-1] is None and [*following[:-1]] == [step.timestep for step in steps[1:]]


def test_steps_can_be_left_early_and_a_sample_can_be_replaced():
    pipeline, calls = DDAEPipeline(make_unet(), DDIMScheduler()), []
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.register_forward_pre_hook(lambda module, inputs: calls.append(inputs[0]))
    steps = pipeline.steps(num_inference_steps=50)
    assert not calls  # nothing runs before it is asked for
    first = next(steps)
    first.sample = torch.full_like(first.sample, 0.25)
    next(steps)
    steps.close()
    assert len(calls) == 2 and torch.equal(calls[1], torch.full((1, 3, 8, 8), 0.25))
    assert pipeline(num_inference_steps=2, output_type="pt").images.isfinite().all()


def test_steps_that_cannot_be_taken_are_refused_before_one_is_asked_for():
    pipeline = DDAEPipeline(make_unet(), DDIMScheduler())
    for options in ({"num_inference_steps": 0}, {"sampler": "heun"}, {"heun": Heun(1.0)}, {"class_labels": 3}):
        with pytest.raises(ValueError):
            pipeline.steps(**options)


def test_sampling_in_half_precision_computes_output_layers_in_float32():
    pipeline = DDAEPipeline(make_unet(), DDIMScheduler(clip_sample=False)).to(torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    sampled = pipeline(latents=latents, num_inference_steps=1, output_type="latent").images
    exact, timestep = network_of(pipeline.unet).with_float32_output(pipeline.unet), pipeline.scheduler.timesteps[0]
    with torch.no_grad():
        answers = [network(latents.bfloat16(), timestep.expand(2)).sample.float() for network in (exact, pipeline.unet)]
    ours, other = (pipeline.scheduler.step(answer, timestep, latents).prev_sample for answer in answers)
    assert torch.equal(sampled, ours) and not torch.equal(sampled, other)
