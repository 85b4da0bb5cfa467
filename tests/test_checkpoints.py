"""Every layout opens everywhere; what cannot be opened is refused by name."""

import json
import logging
import shutil
import sys
import threading

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.models.embeddings import Timesteps
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

from ddae_hf import (
    DDAEBackbone,
    DDAEConfig,
    DDAEForImageClassification,
    DDAEImageProcessor,
    DDAEModel,
    DDAEPipeline,
)
from ddae_hf.checkpoints import plain_config, read_checkpoint
from ddae_hf.networks import build_denoiser
from ddae_hf.pretrained_ddae import _load_reports
from ddae_hf.weights import fingerprint

from .conftest import make_dit, make_unet, make_vae

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


def with_early_names(tensors):
    """Name attention weights as diffusers did in 2022, and `google/ddpm-cifar10-32` still does."""
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for key, value in tensors.items():
        for new, early in names.items():
            key = key.replace(f".{new}.", f".{early}.")
        renamed[key] = value
    return renamed


def change(file, function):
    """Write the tensors that a function makes of a file's."""
    save_file(function(load_file(file)), file, {"format": "pt"})


def without(*names):
    return lambda tensors: {name: value for name, value in tensors.items() if name not in names}


def test_early_files_with_old_attention_names_open(layouts, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(layouts / "flat", old)
    change(old / "diffusion_pytorch_model.safetensors", with_early_names)
    assert "mid_block.attentions.0.query.weight" in load_file(old / "diffusion_pytorch_model.safetensors")
    for opened in (DDAEModel.from_pretrained(old), DDAEPipeline.from_pretrained(old)):
        assert fingerprint(opened.denoiser) == fingerprint(make_unet())


def test_a_vae_with_old_attention_names_opens(tmp_path):
    parts = {"transformer": make_dit(in_channels=4), "scheduler": DDIMScheduler(), "vae": make_vae()}
    DDAEPipeline(**parts).save_pretrained(tmp_path)
    change(tmp_path / "vae" / "diffusion_pytorch_model.safetensors", with_early_names)
    for opened in (DDAEModel.from_pretrained(tmp_path), DDAEPipeline.from_pretrained(tmp_path)):
        assert fingerprint(opened.vae) == fingerprint(make_vae())


def assert_all_refuse(folder, classes, message):
    for cls in classes:
        with pytest.raises(ValueError, match=message):
            cls.from_pretrained(folder)


@pytest.mark.parametrize("layout", [*LAYOUTS, "old names", "shards", "whole", "whole in shards", "head"])
def test_missing_tensors_are_named(layouts, tmp_path, layout):
    """Whatever file they are missing from; never a random or an empty tensor in their place."""
    folder, network = tmp_path / "opened", tmp_path / "opened"
    lost, prefix = ["conv_in.bias", "conv_out.weight"], ""
    if layout in (*LAYOUTS, "old names"):
        shutil.copytree(layouts / ("flat" if layout == "old names" else layout), folder)
        network = folder / "unet" if layout == "pipeline" else folder
    elif layout == "shards":
        DDAEPipeline(make_unet(), DDPMScheduler()).save_pretrained(folder, max_shard_size="200KB")
        network = folder / "unet"
    elif layout == "head":
        DDAEPipeline(make_unet(), DDPMScheduler()).save_pretrained(tmp_path / "base")
        model = DDAEForImageClassification.from_pretrained(tmp_path / "base", num_labels=3)
        model.save_head(folder, base=tmp_path / "base")
        network = tmp_path / "base" / "unet"
    else:
        model = DDAEForImageClassification(DDAEConfig(denoiser=plain_config(make_unet())))
        model.save_pretrained(folder, **({} if layout == "whole" else {"max_shard_size": "200KB"}))
        prefix = "ddae.denoiser."
    if layout == "old names":
        change(network / "diffusion_pytorch_model.safetensors", with_early_names)
        change(network / "diffusion_pytorch_model.safetensors", without("mid_block.attentions.0.key.bias"))
        lost = ["conv_out.weight", "mid_block.attentions.0.to_k.bias"]
    for file in network.glob("*.safetensors"):  # not from a sharded checkpoint's index
        change(file, without(*(prefix + name for name in lost)))
    message = r"lacks 2 of the \d+ tensors of its \w+: " + ", ".join(rf"\S*{name}" for name in lost) + r"\."
    assert_all_refuse(folder, [DDAEModel, DDAEForImageClassification, DDAEBackbone, DDAEPipeline], message)


@pytest.mark.parametrize(("part", "name"), [("transformer", "proj_out_1.bias"), ("vae", "quant_conv.bias")])
def test_missing_tensors_of_a_dit_or_a_vae_are_named(tmp_path, part, name):
    """A DiT's positions, which are in no checkpoint, are not among them."""
    pipeline = DDAEPipeline(transformer=make_dit(in_channels=4), scheduler=DDIMScheduler(), vae=make_vae())
    pipeline.save_pretrained(tmp_path / "pipeline")
    DDAEModel.from_pretrained(tmp_path / "pipeline").save_pretrained(tmp_path / "whole")
    change(tmp_path / "pipeline" / part / "diffusion_pytorch_model.safetensors", without(name))
    change(tmp_path / "whole" / "model.safetensors", without(f"{'vae' if part == 'vae' else 'denoiser'}.{name}"))
    for folder in (tmp_path / "pipeline", tmp_path / "whole"):
        message = rf"lacks 1 of the \d+ tensors of its \w+: \S*{name}\."
        assert_all_refuse(folder, [DDAEModel, DDAEForImageClassification, DDAEPipeline], message)
        # What the caller gives is not looked for.
        given = getattr(pipeline, part)
        assert getattr(DDAEPipeline.from_pretrained(folder, **{part: given}), part) is given


@pytest.fixture
def reports():
    """What transformers reports of loading, as it comes."""
    reporting, found = logging.getLogger("transformers.modeling_utils"), []
    handler, level = logging.Handler(), reporting.level
    handler.emit = lambda record: found.append(record.getMessage())
    reporting.addHandler(handler)
    reporting.setLevel(logging.WARNING)
    yield found
    assert not reporting.filters
    reporting.removeHandler(handler)
    reporting.setLevel(level)


@pytest.mark.parametrize("labels", [{"num_labels": 3}, {"id2label": {0: "cat", 1: "dog", 2: "owl"}}])
def test_a_new_classifier_that_was_asked_for_is_not_reported(layouts, tmp_path, reports, labels):
    model = DDAEForImageClassification.from_pretrained(layouts / "pipeline", **labels)
    assert model.classifier.out_features == 3
    model.save_pretrained(tmp_path / "three")
    five = {"id2label": dict(enumerate("abcde")), "label2id": {name: i for i, name in enumerate("abcde")}}
    DDAEForImageClassification.from_pretrained(tmp_path / "three", ignore_mismatched_sizes=True, **five)
    for cls in (DDAEModel, DDAEBackbone):
        cls.from_pretrained(layouts / "pipeline")
    assert not reports


def test_what_else_is_missing_is_reported_with_where_it_is_missing(layouts, tmp_path, reports):
    DDAEForImageClassification.from_pretrained(layouts / "pipeline")  # as if it were a classifier's checkpoint
    model = DDAEForImageClassification.from_pretrained(layouts / "pipeline", num_labels=3)
    model.save_pretrained(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="look at the above report"):
        DDAEForImageClassification.from_pretrained(tmp_path / "whole", id2label=dict(enumerate("abcde")))
    change(tmp_path / "whole" / "model.safetensors", without("ddae.denoiser.conv_in.bias"))
    with pytest.raises(ValueError, match="lacks 1 of the"):
        DDAEForImageClassification.from_pretrained(tmp_path / "whole", num_labels=3)
    places = (layouts / "pipeline", tmp_path / "whole", tmp_path / "whole")
    tensors = ("classifier.weight", "classifier.weight", "ddae.denoiser.conv_in.bias")
    assert len(reports) == 3
    for report, place, tensor in zip(reports, places, tensors, strict=True):
        assert "LOAD REPORT" in report and f"from: {place}\n" in report and tensor in report


def test_reports_of_other_threads_come_as_they_are(layouts, reports):
    """While this one opens a checkpoint whose report is held back."""
    reporting = logging.getLogger("transformers.modeling_utils")

    def other():
        reporting.warning("Another LOAD REPORT from: None\n")

    with _load_reports("here") as held:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        reporting.warning("A LOAD REPORT from: None\n")
        reporting.warning("Something else")
        assert len(held) == 1
    assert reports == ["Another LOAD REPORT from: None\n", "Something else", "A LOAD REPORT from: here\n"]


def test_only_a_new_classifiers_own_tensors_may_be_missing(layouts, tmp_path):
    saved = DDAEForImageClassification.from_pretrained(layouts / "pipeline", num_labels=3, feature_norm="batch_norm")
    saved.save_pretrained(tmp_path)
    anew = {"num_labels": 5, "ignore_mismatched_sizes": True}
    model, info = DDAEForImageClassification.from_pretrained(tmp_path, **anew, output_loading_info=True)
    assert model.classifier.out_features == 5 and len(info["mismatched_keys"]) == 2
    change(tmp_path / "model.safetensors", without("classifier.weight", "feature_norm.running_var"))
    with pytest.raises(
        ValueError, match=r"lacks 2 of the \d+ tensors .*: classifier.weight, feature_norm.running_var\."
    ):
        DDAEForImageClassification.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lacks 2 of the"):
        DDAEForImageClassification.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    DDAEForImageClassification.from_pretrained(tmp_path, **anew)
    DDAEModel.from_pretrained(tmp_path).save_pretrained(tmp_path / "model")
    DDAEForImageClassification.from_pretrained(tmp_path / "model", num_labels=5)
    DDAEPipeline(make_unet(), DDPMScheduler()).save_pretrained(tmp_path / "generator")
    saved.save_head(tmp_path / "generator")
    change(tmp_path / "generator" / "head.safetensors", lambda tensors: tensors)  # without what it says of its base
    with pytest.raises(ValueError, match="does not name its base"):
        DDAEForImageClassification.from_pretrained(tmp_path / "generator")


def test_tensors_of_another_network_are_refused(tmp_path):
    """Those that are left over: a network with fewer blocks than were saved is another one."""
    DDAEModel(DDAEConfig(denoiser=plain_config(make_dit()))).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["denoiser"]["num_layers"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = r"has \d+ tensors that its \w+ has no place for: \S*transformer_blocks.3"
    assert_all_refuse(tmp_path, [DDAEModel, DDAEForImageClassification, DDAEPipeline], message)


@pytest.mark.parametrize("layout", [*LAYOUTS, "whole", "shards", "sub-folder"])
def test_a_variant_is_what_was_asked_for(layouts, tmp_path, layout):
    averaged, folder, where = make_unet(seed=1), tmp_path, {}
    options = {"variant": "ema", **({"max_shard_size": "200KB"} if layout == "shards" else {})}
    if layout == "whole":
        for unet, names in ((make_unet(), {}), (averaged, options)):
            model = DDAEForImageClassification(DDAEConfig(denoiser=plain_config(unet)))
            model.ddae.denoiser.load_state_dict(unet.state_dict())
            model.save_pretrained(tmp_path, **names)
    elif layout in ("pipeline", "shards", "sub-folder"):
        folder, where = (tmp_path / "inside", {"subfolder": "inside"}) if layout == "sub-folder" else (tmp_path, {})
        DDAEPipeline(make_unet(), DDIMScheduler()).save_pretrained(folder)
        DDAEPipeline(averaged, DDIMScheduler()).save_pretrained(folder, **options)
    else:
        shutil.copytree(layouts / layout, tmp_path, dirs_exist_ok=True)
        averaged.save_pretrained(tmp_path, **options)
    for variant, expected in (("ema", averaged), (None, make_unet())):
        classes = [DDAEModel, DDAEForImageClassification, DDAEPipeline]
        for cls in [*classes, AutoModelForImageClassification] if layout == "whole" else classes:
            opened = cls.from_pretrained(tmp_path, variant=variant, **where)
            denoiser = getattr(opened, "ddae", opened).denoiser
            assert fingerprint(denoiser) == fingerprint(expected)
    for cls in (DDAEModel, DDAEForImageClassification, DDAEPipeline):
        with pytest.raises(ValueError, match=r"has no \w+\.fp16\.safetensors in .* \(available variants: ema\)"):
            cls.from_pretrained(tmp_path, variant="fp16", **where)


def test_a_vae_without_the_variant_is_the_plain_one(tmp_path):
    parts = {"scheduler": DDIMScheduler(), "vae": make_vae()}
    DDAEPipeline(transformer=make_dit(in_channels=4), **parts).save_pretrained(tmp_path)
    make_dit(seed=1, in_channels=4).save_pretrained(tmp_path / "transformer", variant="ema")
    dtypes = {"transformer": torch.bfloat16, "default": torch.float32}
    pipeline = DDAEPipeline.from_pretrained(tmp_path, variant="ema", dtype=dtypes)
    assert pipeline.denoiser.dtype == torch.bfloat16 and pipeline.vae.dtype == torch.float32
    model = DDAEModel.from_pretrained(tmp_path, variant="ema")
    assert fingerprint(model.denoiser) == fingerprint(pipeline.denoiser) == fingerprint(make_dit(seed=1, in_channels=4))
    assert fingerprint(model.vae) == fingerprint(pipeline.vae) == fingerprint(make_vae())


@pytest.mark.parametrize("kind", ["whole", "pipeline"])
@pytest.mark.parametrize("variant", [None, "ema"])
def test_one_file_and_shards_replace_each_other(tmp_path, kind, variant):
    """transformers and diffusers leave the one beside the other, and open one of them whichever was saved last."""
    name = "model" if kind == "whole" else "unet/diffusion_pytorch_model"
    single = tmp_path / (f"{name}.safetensors" if variant is None else f"{name}.{variant}.safetensors")
    for seed, options in enumerate([{}, {"max_shard_size": "200KB"}, {}]):
        unet = make_unet(seed=seed)
        if kind == "whole":
            saved = DDAEModel(DDAEConfig(denoiser=plain_config(unet)))
            saved.denoiser.load_state_dict(unet.state_dict())
        else:
            saved = DDAEPipeline(unet, DDIMScheduler())
        saved.save_pretrained(tmp_path, variant=variant, **options)
        for cls in (DDAEModel, DDAEPipeline):
            opened = cls.from_pretrained(tmp_path, variant=variant).denoiser
            assert torch.equal(opened.conv_in.weight, unet.conv_in.weight)
        if seed == 0:
            first = single.read_bytes()
        if seed == 1:  # as where both were pushed to a repository
            assert not single.exists()
            single.write_bytes(first)
            for cls in (DDAEModel, DDAEPipeline):
                with pytest.raises(ValueError, match="has weights twice"):
                    cls.from_pretrained(tmp_path, variant=variant)


@torch.no_grad()
@pytest.mark.parametrize("layout", ["pipeline", "whole", "head"])
def test_a_state_dict_takes_the_place_of_the_weights(layouts, tmp_path, images, layout):
    opened = DDAEForImageClassification.from_pretrained(layouts / "pipeline", num_labels=3)
    folder = layouts / "pipeline" if layout == "pipeline" else tmp_path
    if layout != "pipeline":
        opened.save_pretrained(folder) if layout == "whole" else opened.save_head(folder, base=layouts / "pipeline")
    given = DDAEForImageClassification(DDAEConfig(**{**opened.config.to_dict(), "sigma": 0.2})).eval()
    state = given.state_dict()
    options = {"num_labels": 3, "sigma": 0.2, "state_dict": state}
    model = DDAEForImageClassification.from_pretrained(folder, **options)
    assert torch.equal(model(images).logits, given(images).logits)
    base = DDAEModel.from_pretrained(folder, sigma=0.2, state_dict=given.ddae.state_dict())
    assert torch.equal(base(images).pooler_output, given.ddae(images).pooler_output)
    # A classifier with these weights is not the generator that the checkpoint holds.
    model.save_pretrained(tmp_path / "saved")
    assert DDAEPipeline.from_pretrained(tmp_path / "saved")._fine_tuned_from is not None
    for lost in ("ddae.denoiser.conv_in.bias", "classifier.weight"):
        with pytest.raises(ValueError, match=rf"lacks 1 of the \d+ tensors of its \w+: {lost}"):
            DDAEForImageClassification.from_pretrained(folder, **{**options, "state_dict": without(lost)(state)})


@pytest.mark.parametrize("opener", [DDAEConfig, DDAEModel, DDAEForImageClassification, DDAEBackbone, DDAEPipeline])
@pytest.mark.parametrize("layout", [*LAYOUTS, "whole", "head beside its base", "head"])
def test_a_checkpoint_is_read_once(layouts, tmp_path, monkeypatch, layout, opener):
    """No file that describes it is opened twice, but for what diffusers does when it opens a folder by itself."""
    folder = layouts / layout if layout in LAYOUTS else tmp_path
    if layout not in LAYOUTS:
        model = DDAEForImageClassification.from_pretrained(layouts / "pipeline", num_labels=3)
        if layout == "whole":
            model.save_pretrained(folder)
        elif layout == "head":
            model.save_head(folder, base=layouts / "pipeline")
        else:
            shutil.copytree(layouts / "pipeline", folder, dirs_exist_ok=True)
            model.save_head(folder)
    own_open, opened = open, []

    def count(file, *args, **kwargs):
        by = sys._getframe(1).f_globals["__name__"].split(".")[0]
        if by in ("ddae_hf", "transformers") and str(file).endswith(".json"):
            opened.append(str(file))
        return own_open(file, *args, **kwargs)

    monkeypatch.setattr("builtins.open", count)
    opener.from_pretrained(folder)
    assert str(folder / ("model_index.json" if layout in ("pipeline", "flat") else "config.json")) in opened
    assert sorted(opened) == sorted(set(opened))


def test_subfolders_are_followed(layouts):
    assert DDAEModel.from_pretrained(layouts, subfolder="pipeline").config.image_size == (8, 8)
    assert DDAEConfig.from_pretrained(layouts, subfolder="flat").image_size == (8, 8)


def test_the_stored_precision_is_kept_unless_another_is_asked_for(tmp_path, layouts):
    DDPMPipeline(make_unet().bfloat16(), DDPMScheduler()).save_pretrained(tmp_path)
    model = DDAEForImageClassification.from_pretrained(tmp_path, num_labels=3)
    assert model.dtype == model.ddae.denoiser.dtype == torch.bfloat16
    assert DDAEModel.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32
    assert DDAEModel.from_pretrained(layouts / "pipeline", dtype=torch.bfloat16).dtype == torch.bfloat16
    assert read_checkpoint(tmp_path).load("denoiser").dtype == torch.bfloat16


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
    assert fingerprint(read_checkpoint(tmp_path).load("denoiser")) == fingerprint(model.ddae.denoiser)


OPENERS = [
    DDAEModel.from_pretrained, DDAEForImageClassification.from_pretrained, DDAEPipeline.from_pretrained,
    DDAEConfig.from_pretrained, DDAEImageProcessor.from_pretrained,
]  # fmt: skip


@pytest.mark.parametrize("open_checkpoint", OPENERS)
def test_what_is_no_checkpoint_is_refused(open_checkpoint, tmp_path):
    with pytest.raises(ValueError, match="is not a checkpoint that ddae_hf can open"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ValueError, match="found: vit"):
        open_checkpoint(tmp_path)
    with pytest.raises(OSError, match="is not a folder"):
        open_checkpoint(tmp_path / "missing")


@pytest.mark.parametrize("open_checkpoint", OPENERS)
def test_other_denoisers_are_refused_with_those_supported(open_checkpoint, tmp_path):
    """The layout of Stable Diffusion 3."""
    index = {"_class_name": "StableDiffusion3Pipeline", "_diffusers_version": "0.30.0"}
    scheduler = "FlowMatchEulerDiscreteScheduler"
    for name, cls in [("transformer", "SD3Transformer2DModel"), ("scheduler", scheduler), ("vae", "AutoencoderKL")]:
        index[name] = ["diffusers", cls]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="'SD3Transformer2DModel', which is not supported: allowed are UNet2DModel"):
        open_checkpoint(tmp_path)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text(json.dumps({"_class_name": "SD3Transformer2DModel", "sample_size": 8}))
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


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_a_type_is_taken_by_either_name_and_not_by_both(layouts, name):
    for cls in (DDAEModel, DDAEPipeline):
        opened = cls.from_pretrained(layouts / "pipeline", **{name: torch.bfloat16})
        assert opened.denoiser.dtype == torch.bfloat16
        with pytest.raises(ValueError, match="both `dtype` and `torch_dtype`"):
            cls.from_pretrained(layouts / "pipeline", dtype=torch.bfloat16, torch_dtype=torch.float16)


@pytest.mark.parametrize("part", ["denoiser", "scheduler"])
def test_a_model_that_describes_no_part_is_refused(layouts, tmp_path, part):
    DDAEModel.from_pretrained(layouts / "pipeline").save_pretrained(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    del described[part]
    (tmp_path / "config.json").write_text(json.dumps(described))
    for cls in (DDAEConfig, DDAEModel, DDAEPipeline):
        with pytest.raises(ValueError, match=f"is incomplete: its config.json describes no {part}"):
            cls.from_pretrained(tmp_path)


def test_the_warning_of_a_bare_network_points_at_its_caller(layouts):
    for cls in (DDAEModel, DDAEPipeline):
        with pytest.warns(UserWarning, match="without its scheduler") as caught:
            cls.from_pretrained(layouts / "model")
        assert {warning.filename for warning in caught if "its scheduler" in str(warning.message)} == {__file__}


def test_a_denoiser_is_complete_when_it_is_loaded(tmp_path):
    """As for training that starts from it: a DiT has the frequencies that its config notes."""
    noted = build_denoiser({**plain_config(make_dit()), "downscale_freq_shift": 0})
    DDAEPipeline(transformer=noted, scheduler=DDPMScheduler()).save_pretrained(tmp_path)
    modules = read_checkpoint(tmp_path).load("denoiser").modules()
    assert {module.downscale_freq_shift for module in modules if isinstance(module, Timesteps)} == {0}
