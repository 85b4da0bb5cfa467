"""What users of diffusers expect of any pipeline: saving, types, devices, callbacks, components that are exchanged."""

import inspect
import json
from functools import partial

import diffusers
import numpy as np
import pytest
import torch
from accelerate.hooks import CpuOffload
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DiffusionPipeline,
    DiTPipeline,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.models.attention_processor import Attention, AttnProcessor

from ddae_hf import DDAEForImageClassification, DDAEPipeline

from .conftest import make_dit, make_unet, make_vae

BUILDERS = {
    "unet": lambda: DDAEPipeline(make_unet(), DDIMScheduler()),
    "dit": lambda: DDAEPipeline(transformer=make_dit(), scheduler=DDIMScheduler()),
    "class_unet": lambda: DDAEPipeline(make_unet(num_class_embeds=5), DDIMScheduler(), null_class=4),
}


@pytest.fixture(params=["dit", "class_unet"])
def pipeline(request):
    pipeline = BUILDERS[request.param]()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def unet_pipeline():
    return BUILDERS["unet"]()


def sample(pipeline, device="cpu", **options):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator(device).manual_seed(0)
    return pipeline(**{"generator": generator, "num_inference_steps": 2, "output_type": "np", **options}).images


def assert_same_images(first, second, atol=1e-4):
    np.testing.assert_allclose(sample(first), sample(second), rtol=0, atol=atol)


def index_of(folder):
    return json.loads((folder / "model_index.json").read_text())


def test_every_argument_of_a_call_is_optional_and_explained():
    arguments = dict(inspect.signature(DDAEPipeline.__call__).parameters)
    del arguments["self"]
    assert {"batch_size", "class_labels", "generator", "latents", "num_inference_steps", "guidance_scale"} < set(
        arguments
    )
    assert {"output_type", "return_dict", "callback_on_step_end", "callback_on_step_end_tensor_inputs"} < set(arguments)
    for name, argument in arguments.items():
        assert argument.default is not argument.empty, name
        assert f"\n            {name}: " in DDAEPipeline.__call__.__doc__, name


def test_output_types_show_the_same_tensor(pipeline):
    latent, tensor, array = (sample(pipeline, output_type=kind) for kind in ("latent", "pt", "np"))
    assert latent.shape == (1, 3, 8, 8) and latent.min() < 0 and not latent.requires_grad
    assert torch.equal((latent / 2 + 0.5).clamp(0, 1), tensor)
    np.testing.assert_array_equal(sample(pipeline, return_dict=True), array)
    as_tuple = pipeline(
        generator=torch.Generator().manual_seed(0), num_inference_steps=2, output_type="np", return_dict=False
    )
    assert isinstance(as_tuple, tuple) and len(as_tuple) == 1
    np.testing.assert_array_equal(as_tuple[0], array)


def test_an_image_is_the_same_in_any_batch(pipeline):
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 0, 7)]
    batch = sample(pipeline, batch_size=3, generator=generators)
    np.testing.assert_allclose(batch[1], sample(pipeline)[0], rtol=0, atol=1e-4)


def test_inference_mode_changes_nothing(pipeline):
    expected = sample(pipeline)
    with torch.inference_mode():
        inside = sample(pipeline)
    np.testing.assert_array_equal(inside, expected)
    np.testing.assert_array_equal(sample(pipeline), expected)


def test_the_progress_bar_counts_steps_and_can_be_silenced(unet_pipeline, capsys):
    unet_pipeline(num_inference_steps=3)
    assert "3/3" in capsys.readouterr().err
    unet_pipeline.set_progress_bar_config(desc="Digits")
    unet_pipeline(num_inference_steps=2)
    assert "Digits" in capsys.readouterr().err
    unet_pipeline.set_progress_bar_config(disable=True)
    unet_pipeline(num_inference_steps=2)
    assert capsys.readouterr().err == ""


def test_what_is_saved_is_json_and_safetensors(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path, max_shard_size="200KB")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    assert len([path for path in files if path.suffix == ".safetensors"]) > 1
    assert pipeline.to_json_string() == (tmp_path / "model_index.json").read_text()
    assert None not in index_of(tmp_path).values() and [None, None] not in index_of(tmp_path).values()
    assert_same_images(DDAEPipeline.from_pretrained(str(tmp_path), local_files_only=True), pipeline)


def test_pickles_are_neither_written_nor_read(unet_pipeline, tmp_path):
    with pytest.raises(ValueError, match="only safetensors weights are written"):
        unet_pipeline.save_pretrained(tmp_path / "pickle", safe_serialization=False)
    assert not (tmp_path / "pickle").exists()
    unet_pipeline.save_pretrained(tmp_path / "pipeline")
    with pytest.raises(ValueError, match="only safetensors weights are read"):
        DDAEPipeline.from_pretrained(tmp_path / "pipeline", use_safetensors=False)
    (tmp_path / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(unet_pipeline.unet.state_dict(), tmp_path / "pipeline" / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="has no diffusion_pytorch_model.safetensors"):
        DDAEPipeline.from_pretrained(tmp_path / "pipeline")


def test_a_variant_opens_under_its_name_alone(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "variant", variant="fp16")
    names = [path.name for path in (tmp_path / "variant").rglob("*.safetensors")]
    assert names == ["diffusion_pytorch_model.fp16.safetensors"]
    assert_same_images(DDAEPipeline.from_pretrained(tmp_path / "variant", variant="fp16"), pipeline)
    with pytest.raises(ValueError, match="has no diffusion_pytorch_model.safetensors"):
        DDAEPipeline.from_pretrained(tmp_path / "variant")
    pipeline.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="has no diffusion_pytorch_model.fp16.safetensors"):
        DDAEPipeline.from_pretrained(tmp_path / "plain", variant="fp16")


@pytest.mark.parametrize("layout", ["pipeline", "model", "transformers"])
def test_types_on_loading_are_those_asked_for_in_every_layout(unet_pipeline, layout, tmp_path):
    unet_pipeline.to(torch.bfloat16)
    if layout == "model":
        unet_pipeline.unet.save_pretrained(tmp_path)
    else:
        unet_pipeline.save_pretrained(tmp_path)
    if layout == "transformers":
        DDAEForImageClassification.from_pretrained(tmp_path, num_labels=2).save_pretrained(tmp_path / "classifier")
        tmp_path = tmp_path / "classifier"

    def opened(**options):
        return DDAEPipeline.from_pretrained(tmp_path, scheduler=DDIMScheduler(), **options).denoiser.dtype

    assert opened() == torch.float32
    assert opened(dtype=torch.float16) == torch.float16
    assert opened(dtype={"unet": torch.float16, "default": torch.bfloat16}) == torch.float16
    assert opened(dtype={"default": torch.bfloat16}) == torch.bfloat16
    with pytest.raises(ValueError, match="dtype is 'float16': pass a torch.dtype"):
        opened(dtype="float16")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_samples_nearly_the_same_images_and_survives_saving(pipeline, dtype, tmp_path):
    expected = sample(pipeline)
    assert pipeline.to(dtype) is pipeline and pipeline.dtype == pipeline.denoiser.dtype == dtype
    half = sample(pipeline)
    assert half.dtype == np.float32 and np.abs(half - expected).max() < 0.1
    pipeline.save_pretrained(tmp_path)
    assert_same_images(DDAEPipeline.from_pretrained(tmp_path, dtype=dtype), pipeline, atol=0.02)


def test_components_and_parameters_are_what_the_class_takes(pipeline):
    taken = set(inspect.signature(DDAEPipeline).parameters)
    assert set(pipeline.components) | set(pipeline.parameters) == taken
    assert set(pipeline.components) == {"unet", "transformer", "scheduler", "vae"}
    named = DDAEPipeline(**pipeline.components, **pipeline.parameters | {"id2label": {1: "cat"}})
    other = DDAEPipeline(**named.components, **named.parameters)
    assert other.denoiser is pipeline.denoiser and other.null_class == pipeline.null_class
    assert other.labels == {"cat": 1} and other.to_json_string() == named.to_json_string()
    assert_same_images(other, pipeline)


def test_a_stock_pipeline_is_made_of_ours(unet_pipeline):
    theirs = DDPMPipeline.from_pipe(unet_pipeline)
    assert theirs.unet is unet_pipeline.unet and theirs.scheduler is unet_pipeline.scheduler


def test_from_pipe_carries_everything_over(pipeline):
    other = DDAEPipeline.from_pipe(pipeline)
    assert other.denoiser is pipeline.denoiser and other.null_class == pipeline.null_class
    assert_same_images(other, pipeline)
    replaced = DDAEPipeline.from_pipe(pipeline, scheduler=EulerDiscreteScheduler())
    assert isinstance(replaced.scheduler, EulerDiscreteScheduler) and isinstance(pipeline.scheduler, DDIMScheduler)


def test_the_scheduler_is_no_optional_component(pipeline, tmp_path):
    """As diffusers sees it, from wherever a folder is opened; it stands where that of stock pipelines does."""
    for opener in (DDAEPipeline, DiffusionPipeline):
        required, optional = opener._get_signature_keys(DDAEPipeline)
        assert "scheduler" in required and "scheduler" not in optional
    assert "scheduler" not in DDAEPipeline._optional_components
    pipeline.save_pretrained(tmp_path / "pipeline")
    pipeline.denoiser.save_pretrained(tmp_path / "model")
    for folder in ("pipeline", "model"):
        with pytest.raises(ValueError, match="Pass a `scheduler`"):
            DDAEPipeline.from_pretrained(tmp_path / folder, scheduler=None)


def test_from_pipe_takes_a_stock_pipeline_of_latents(latent_dit):
    stock = DiTPipeline.from_pretrained(latent_dit)
    ours = DDAEPipeline.from_pipe(stock)
    assert ours.transformer is stock.transformer and ours.vae is stock.vae and ours.unet is None
    again = DiTPipeline.from_pipe(ours)
    assert again.scheduler is stock.scheduler and again.vae is stock.vae
    assert again.transformer is stock.transformer


@pytest.mark.parametrize("name", ["unet", "class_unet"])
def test_from_pipe_goes_to_diffusers_and_back(name, tmp_path):
    pipeline = BUILDERS[name]()
    theirs = DDPMPipeline.from_pipe(pipeline)
    back = DDAEPipeline.from_pipe(theirs)
    assert theirs.unet is pipeline.unet and back.null_class == pipeline.null_class
    assert_same_images(back, pipeline)
    back.save_pretrained(tmp_path)
    assert index_of(tmp_path) == json.loads(pipeline.to_json_string())


def test_a_new_scheduler_samples_and_is_saved(pipeline, tmp_path):
    before = sample(pipeline)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    assert not np.allclose(sample(pipeline), before)
    pipeline.save_pretrained(tmp_path)
    opened = DDAEPipeline.from_pretrained(tmp_path)
    assert isinstance(opened.scheduler, EulerDiscreteScheduler)
    assert_same_images(opened, pipeline)


def test_a_new_denoiser_samples_and_is_saved(unet_pipeline, tmp_path):
    """Also under the other key, where diffusers has none in its index."""
    unet_pipeline.unet, unet_pipeline.transformer = None, make_dit()
    assert_same_images(unet_pipeline, BUILDERS["dit"]())
    unet_pipeline.save_pretrained(tmp_path)
    assert index_of(tmp_path)["transformer"] == ["diffusers", "DiTTransformer2DModel"]
    assert_same_images(DDAEPipeline.from_pretrained(tmp_path), unet_pipeline)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"unet": None}, "Pass one denoiser.*none came"),
        ({"scheduler": None}, "Pass a `scheduler`"),
        ({"transformer": make_dit()}, "unet and transformer came"),
        ({"unet": make_dit()}, "pass it as `transformer`"),
        ({"unet": make_unet(num_class_embeds=3)}, "null_class is 4, but this denoiser has the labels 0 to 2"),
    ],
)
def test_components_that_make_no_pipeline_are_neither_sampled_nor_saved(parts, message, tmp_path):
    pipeline = BUILDERS["class_unet"]()
    for name, part in parts.items():
        setattr(pipeline, name, part)
    with pytest.raises(ValueError, match=message):
        sample(pipeline)
    with pytest.raises(ValueError, match=message):
        pipeline.save_pretrained(tmp_path / "broken")
    assert not (tmp_path / "broken").exists()


def test_the_null_class_can_be_set(tmp_path):
    pipeline = DDAEPipeline(make_unet(num_class_embeds=5), DDIMScheduler())
    pipeline.null_class = 4
    assert_same_images(pipeline, BUILDERS["class_unet"]())
    pipeline.save_pretrained(tmp_path)
    assert DDAEPipeline.from_pretrained(tmp_path).null_class == 4
    with pytest.raises(ValueError, match="null_class is 5, but this denoiser has the labels 0 to 4"):
        pipeline.null_class = 5
    assert pipeline.null_class == 4


def test_attention_may_be_computed_otherwise(pipeline):
    expected = sample(pipeline)
    for slices in (1, "max"):
        pipeline.enable_attention_slicing(slices)
        np.testing.assert_allclose(sample(pipeline), expected, rtol=0, atol=1e-4)
    pipeline.disable_attention_slicing()
    layers = [module for module in pipeline.denoiser.modules() if isinstance(module, Attention)]
    for layer in layers:
        layer.set_processor(AttnProcessor())
    np.testing.assert_allclose(sample(pipeline), expected, rtol=0, atol=1e-4)
    assert layers


def test_a_compiled_denoiser_is_a_denoiser(pipeline, tmp_path):
    compiled = torch.compile(pipeline.denoiser, backend="eager")
    other = DDAEPipeline.for_denoiser(compiled, pipeline.scheduler, pipeline.config["null_class"])
    assert other.denoiser is compiled and other.null_class == pipeline.null_class
    if pipeline.unet is None:  # tracing takes seconds
        assert_same_images(other, pipeline)
    other.save_pretrained(tmp_path)
    assert index_of(tmp_path) == json.loads(pipeline.to_json_string())
    assert_same_images(DDAEPipeline.from_pretrained(tmp_path), pipeline)


class Blank(PipelineCallback):
    """A callback as diffusers writes them: it makes the last image black."""

    tensor_inputs = ["latents"]

    def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
        last = step_index == pipeline.num_timesteps - 1
        return {"latents": torch.full_like(callback_kwargs["latents"], -1)} if last else {}


class WantsPrompt(Blank):
    tensor_inputs = ["prompt_embeds"]


def test_callbacks_of_diffusers_name_their_tensors(pipeline):
    for callback in (Blank(), MultiPipelineCallbacks([Blank()])):
        assert (sample(pipeline, callback_on_step_end=callback) == 0).all()
    with pytest.raises(ValueError, match=r"unknown callback tensors \['prompt_embeds'\]: allowed are \['latents'\]"):
        sample(pipeline, callback_on_step_end=WantsPrompt())


def test_a_callback_gets_the_tensors_that_it_names(pipeline):
    def given(**options):
        found = []
        sample(pipeline, callback_on_step_end=lambda p, i, t, tensors: found.append(set(tensors)) or tensors, **options)
        return found

    assert given() == given(callback_on_step_end_tensor_inputs=["latents"]) == [{"latents"}] * 2
    assert given(callback_on_step_end_tensor_inputs=[]) == [set()] * 2
    with pytest.raises(ValueError, match="callback_on_step_end returned None: it must return a dictionary"):
        sample(pipeline, callback_on_step_end=lambda *_: None)


@pytest.mark.parametrize("sampler", [None, "heun"])
def test_a_callback_can_stop_sampling(pipeline, sampler):
    pipeline.scheduler = EDMEulerScheduler()
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append(tensors["latents"])
        pipe._interrupt = step == 1
        return tensors

    options = {"num_inference_steps": 4, "sampler": sampler}
    images = sample(pipeline, output_type="latent", callback_on_step_end=callback, **options)
    assert len(seen) == 2 and torch.equal(images, seen[1])
    assert len(sample(pipeline, **options)) == 1 and not pipeline._interrupt


def test_a_callback_can_change_guidance():
    pipeline = BUILDERS["class_unet"]()
    call = partial(sample, pipeline, class_labels=1, guidance_scale=3.0)
    sizes = []
    pipeline.unet.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))

    def raise_guidance(pipe, step, timestep, tensors):
        pipe._guidance_scale += 1
        return tensors

    def end_guidance(pipe, step, timestep, tensors):
        pipe._guidance_scale = 1.0
        return tensors

    constant = call()
    assert pipeline.guidance_scale == 3 and sizes == [2, 2]
    assert not np.allclose(call(callback_on_step_end=raise_guidance), constant)
    assert pipeline.guidance_scale == 3 + pipeline.num_timesteps
    sizes.clear()
    assert not np.allclose(call(callback_on_step_end=end_guidance), constant)
    assert sizes == [2, 1]


def test_guidance_that_a_callback_asks_for_in_vain_is_refused(unet_pipeline):
    def callback(pipe, step, timestep, tensors):
        pipe._guidance_scale = 2.0
        return tensors

    with pytest.raises(ValueError, match="guidance_scale is 2.0: guidance needs `class_labels`"):
        sample(unet_pipeline, callback_on_step_end=callback)
    assert len(sample(unet_pipeline)) == 1


def test_guidance_that_a_callback_makes_no_number_is_refused():
    pipeline = BUILDERS["class_unet"]()

    def callback(pipe, step, timestep, tensors):
        pipe._guidance_scale = float("nan")
        return tensors

    with pytest.raises(ValueError, match="guidance_scale is nan: it must be a finite number"):
        sample(pipeline, class_labels=1, callback_on_step_end=callback)


IMAGENET = {0: "tench, Tinca tinca", 134: "crane", 517: "crane", 638: "maillot", 639: "maillot, tank suit"}


def test_classes_are_found_by_whole_names_and_by_parts_of_them():
    """As in `DiTPipeline`, where a name is one class's alone; of two cranes that takes the later one."""
    dit = make_dit(num_embeds_ada_norm=1000, in_channels=4)
    ours = DDAEPipeline(transformer=dit, scheduler=DDIMScheduler(), id2label=IMAGENET)
    stock = DiTPipeline(dit, make_vae(), DDIMScheduler(), id2label=IMAGENET)
    names = ["Tinca tinca", "tench", "tank suit"]
    assert ours.get_label_ids(names) == stock.get_label_ids(names) == [0, 0, 639]
    assert ours.get_label_ids(["maillot, tank suit", "tench, Tinca tinca"]) == [639, 0]
    assert stock.get_label_ids(["crane", "maillot"]) == [517, 639]
    for name, labels in (("crane", r"\[134, 517\]"), ("maillot", r"\[638, 639\]")):
        with pytest.raises(ValueError, match=f"'{name}' names the classes {labels}: give `class_labels` as numbers"):
            ours.get_label_ids(["tench", name])
    assert ours.labels == {
        "maillot, tank suit": 639,
        "tank suit": 639,
        "tench": 0,
        "tench, Tinca tinca": 0,
        "Tinca tinca": 0,
    }


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({5: "cat"}, "id2label names the class 5, but this network has the labels 0 to 4"),
        ({-1: "cat"}, "id2label names the class -1"),
        ({1.5: "cat"}, "id2label names the class 1.5"),
        ({"cat": 0}, "id2label names the class 'cat'"),
        ({1: "cat", "1": "dog"}, "id2label names the class 1 twice: 'cat' and 'dog'"),
        ({1: 2}, "id2label names the class 1 2: names must be text"),
    ],
)
def test_names_of_classes_that_there_are_not_are_refused(names, message):
    with pytest.raises(ValueError, match=message):
        DDAEPipeline(make_unet(num_class_embeds=5), DDIMScheduler(), id2label=names)
    with pytest.raises(ValueError, match="this network has no classes"):
        DDAEPipeline(make_unet(), DDIMScheduler(), id2label={0: "cat"})


def test_a_device_map_places_the_denoiser(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    placed = DDAEPipeline.from_pretrained(tmp_path, device_map="cpu")
    assert placed.hf_device_map == "cpu" and placed.device.type == placed._execution_device.type == "cpu"
    assert_same_images(placed, pipeline)


def test_offloading_the_whole_denoiser_changes_nothing(pipeline):
    expected = sample(pipeline)
    pipeline.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        hook = pipeline.denoiser._hf_hook
        assert isinstance(hook, CpuOffload) and pipeline._execution_device.type == "cpu"
        np.testing.assert_array_equal(sample(pipeline), expected)
        assert pipeline.denoiser._hf_hook is not hook  # each call ends with the denoiser off the device, hooked anew
    pipeline.remove_all_hooks()
    assert not hasattr(pipeline.denoiser, "_hf_hook")


@pytest.mark.skipif(
    diffusers.__version__ < "0.42" and torch.accelerator.current_accelerator() is None,
    reason="older versions of diffusers need an accelerator for it",
)
def test_offloading_groups_of_layers_changes_nothing(unet_pipeline):
    """diffusers' DiT does not support it."""
    expected = sample(unet_pipeline)
    unet_pipeline.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    np.testing.assert_array_equal(sample(unet_pipeline), expected)


def test_weights_may_be_stored_in_eight_bits(pipeline):
    pipeline.to(torch.bfloat16)
    full = sample(pipeline)
    pipeline.denoiser.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert torch.float8_e4m3fn in {parameter.dtype for parameter in pipeline.denoiser.parameters()}
    images = sample(pipeline)
    assert np.isfinite(images).all() and 0 < np.abs(images - full).mean() < 0.1


@pytest.mark.gpu
def test_a_gpu_gives_the_same_images(pipeline):
    noise = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = sample(pipeline, latents=noise)
    pipeline.to("cuda")
    assert pipeline.device.type == pipeline._execution_device.type == "cuda"
    np.testing.assert_allclose(sample(pipeline, "cuda", latents=noise), expected, rtol=0, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading_from_a_gpu_changes_nothing(pipeline, way):
    expected = sample(pipeline.to("cuda"), "cuda")
    pipeline.to("cpu")
    getattr(pipeline, way)()
    for _ in range(2):
        np.testing.assert_allclose(sample(pipeline, "cuda"), expected, rtol=0, atol=1e-3)
        assert pipeline._execution_device.type == "cuda" and pipeline.denoiser.device.type in ("cpu", "meta")
