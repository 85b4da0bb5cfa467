"""A linear head on feature maps: its logits, its loss, the layouts that it is saved in, transformers' tools."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from PIL import Image
from transformers import AutoModelForSemanticSegmentation, Trainer, TrainingArguments, pipeline

from ddae_hf import (
    DDAEBackbone,
    DDAEConfig,
    DDAEForImageClassification,
    DDAEForSemanticSegmentation,
    DDAEImageProcessor,
    DDAEModel,
    DDAEPipeline,
)
from ddae_hf.checkpoints import plain_config
from ddae_hf.class_maps import map_cross_entropy

from .conftest import assert_equal, make_dit, make_unet, make_vae

LAYERS = ["mid_block", "up_blocks.0.attentions.0", "up_blocks.1.resnets.0"]  # of 4, 4 and 8 places a side


@pytest.fixture
def generator(tmp_path):
    DDAEPipeline(make_unet(), DDIMScheduler()).save_pretrained(tmp_path / "generator")
    return tmp_path / "generator"


def segmenter_of(generator, **options):
    options = {"num_labels": 3, "sigma": 0.2, "out_features": LAYERS, "feature_norm": "batch_norm", **options}
    model = DDAEForSemanticSegmentation.from_pretrained(generator, **options).eval()
    if options["feature_norm"] == "batch_norm":
        model.map_norm.running_mean.normal_()
    return model


def labels_for(images, count=3, size=8, seed=0):
    return torch.randint(0, count, (len(images), size, size), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_logits_are_those_of_a_convolution_on_the_joined_maps(generator, images):
    model = segmenter_of(generator)
    maps = DDAEBackbone.from_pretrained(generator, sigma=0.2, out_features=LAYERS)(images).feature_maps
    assert [each.shape[-1] for each in maps] == [4, 4, 8]
    resized = [F.interpolate(each, (8, 8), mode="bilinear", align_corners=False) for each in maps]
    joined = (torch.cat(resized, 1) - model.map_norm.running_mean.view(-1, 1, 1)) / (1 + 1e-5) ** 0.5
    expected = F.conv2d(joined, model.segmenter.weight, model.segmenter.bias)
    outputs = model(images)
    torch.testing.assert_close(outputs.logits, expected, rtol=1e-4, atol=1e-5)
    assert outputs.loss is None and outputs.hidden_states is None
    every = model(images, output_hidden_states=True).hidden_states
    assert len(every) == len(model.config.stage_names)


def test_the_loss_is_the_cross_entropy_of_counted_pixels_at_the_labels_size(generator, images):
    model = segmenter_of(generator, feature_norm="none")
    for size in (8, 20):
        labels = labels_for(images, size=size)
        labels[:, :3] = 255
        outputs = model(images, labels=labels)
        resized = F.interpolate(outputs.logits, (size, size), mode="bilinear", align_corners=False)
        torch.testing.assert_close(outputs.loss, F.cross_entropy(resized, labels, ignore_index=255))
    assert model(images, labels=torch.full((5, 8, 8), 255)).loss == 0
    model.config.semantic_loss_ignore_index = 0
    labels = labels_for(images)
    other = model(images, labels=labels)
    torch.testing.assert_close(other.loss, F.cross_entropy(other.logits, labels, ignore_index=0))


def test_a_batch_without_a_counted_pixel_has_gradients_of_zero():
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    map_cross_entropy(logits, torch.full((2, 8, 8), 255), 255).backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(5, 8, dtype=torch.int64), r"shape \(5, 8\): they must be the classes of pixels"),
        (torch.zeros(5, 8, 8), "torch.float32"),
        (torch.zeros(4, 8, 8, dtype=torch.int64), r"\(5, height, width\)"),
        (torch.full((5, 8, 8), 3), "labels are 3 to 3: allowed are 0 to 2"),
        (torch.full((5, 8, 8), -1), "labels are -1 to -1"),
    ],
)
def test_labels_that_are_no_classes_of_pixels_are_refused(generator, images, labels, message):
    with pytest.raises(ValueError, match=message):
        segmenter_of(generator)(images, labels=labels)


def test_a_single_class_is_refused(generator, images):
    with pytest.raises(ValueError, match="a single class"):
        segmenter_of(generator, num_labels=1)(images, labels=torch.zeros(5, 8, 8, dtype=torch.int64))


@torch.no_grad()
def test_every_layout_opens_as_what_was_saved(generator, images, tmp_path):
    model = segmenter_of(generator, id2label={0: "background", 1: "cat", 2: "dog"})
    expected = model(images).logits
    model.save_head(tmp_path / "head", base=generator)
    model.save_pretrained(tmp_path / "whole", include_code=True)
    DDAEPipeline.from_pretrained(generator).save_pretrained(tmp_path / "both")
    model.save_head(tmp_path / "both")
    assert (tmp_path / "head" / "head.safetensors").stat().st_size < 8192
    for folder in ("head", "whole", "both"):
        for cls in (DDAEForSemanticSegmentation, AutoModelForSemanticSegmentation):
            opened = cls.from_pretrained(tmp_path / folder)
            assert type(opened) is DDAEForSemanticSegmentation
            assert_equal(opened.state_dict(), model.state_dict())
            torch.testing.assert_close(opened(images).logits, expected)
            assert opened.config.out_features == LAYERS and opened.config.id2label[1] == "cat"
        assert torch.equal(DDAEModel.from_pretrained(tmp_path / folder)(images)[0], model.ddae(images)[0])
        assert DDAEPipeline.from_pretrained(tmp_path / folder).denoiser.config.sample_size == 8
    code = {path.stem for path in (tmp_path / "whole").glob("*.py")}
    named = {
        reference.partition(".")[0] for reference in DDAEConfig.from_pretrained(tmp_path / "whole").auto_map.values()
    }
    assert named <= code and "segmentation_ddae" in named


def test_adapters_are_saved_beside_the_head(generator, images, tmp_path):
    model = segmenter_of(generator)
    model.add_lora(rank=2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_head(tmp_path / "adapters", base=generator)
    assert (tmp_path / "adapters" / "adapters" / "adapter_model.safetensors").is_file()
    opened = DDAEForSemanticSegmentation.from_pretrained(tmp_path / "adapters")
    torch.testing.assert_close(opened(images).logits, model(images).logits)


@torch.no_grad()
def test_heads_of_classifiers_and_of_maps_are_not_taken_for_each_other(generator, images, tmp_path):
    """Each opens the other's checkpoints with a new head, at other layers too, and the denoiser as it is."""
    classifier = DDAEForImageClassification.from_pretrained(generator, num_labels=3, feature_norm="batch_norm").eval()
    model = segmenter_of(generator)
    for saved, folder in ((classifier, "classifier"), (model, "maps")):
        saved.save_pretrained(tmp_path / folder)
        saved.save_head(tmp_path / f"{folder}_head", base=generator)
    for kind in ("", "_head"):
        new = DDAEForSemanticSegmentation.from_pretrained(tmp_path / f"classifier{kind}", out_features=["mid_block"])
        assert new.segmenter.weight.shape == (3, 64, 1, 1) and new.segmenter.weight.std() > 0
        bound = new.segmenter.in_channels**-0.5
        assert new.segmenter.weight.abs().max() <= bound and new.segmenter.bias.abs().max() <= bound
        assert torch.equal(new.map_norm.running_var, torch.ones(64)) and not new.map_norm.running_mean.any()
        assert_equal(new.ddae.denoiser.state_dict(), model.ddae.denoiser.state_dict())
        other = DDAEForImageClassification.from_pretrained(tmp_path / f"maps{kind}", layer="mid_block")
        assert other.classifier.weight.shape == (3, 64) and other(images).logits.isfinite().all()


def test_a_head_is_missing_only_where_no_such_model_was_saved(generator, tmp_path):
    model = segmenter_of(generator)
    model.save_pretrained(tmp_path)
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("segmenter.")}
    with pytest.raises(ValueError, match=r"segmenter\.bias"):
        DDAEForSemanticSegmentation.from_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match="in other shapes"):
        DDAEForSemanticSegmentation.from_pretrained(tmp_path, out_features=["mid_block"])
    anew = {"num_labels": 7, "ignore_mismatched_sizes": True}
    assert DDAEForSemanticSegmentation.from_pretrained(tmp_path, **anew).segmenter.out_channels == 7


@torch.no_grad()
def test_a_dit_and_a_denoiser_of_latents_are_read_too(tmp_path):
    """Latents of 8 places, images of 16; a DiT's tokens lie on the grid of its patches."""
    dit = make_dit(in_channels=4, patch_size=2)
    config = DDAEConfig(
        denoiser=plain_config(dit), vae=plain_config(make_vae()), num_labels=4,
        out_features=["transformer_blocks.0", "transformer_blocks.2"],
    )  # fmt: skip
    model = DDAEForSemanticSegmentation(config).eval()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    outputs = model(images, labels=labels_for(images, 4, 16))
    assert outputs.logits.shape == (2, 4, 4, 4) and outputs.loss.isfinite()
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(DDAEForSemanticSegmentation.from_pretrained(tmp_path)(images).logits, outputs.logits)
    half = DDAEForSemanticSegmentation.from_pretrained(tmp_path, dtype=torch.float16)
    assert half.segmenter.weight.dtype == torch.float16 and half(images).logits.shape == (2, 4, 4, 4)


def test_a_class_conditional_denoiser_is_told_a_condition(images):
    config = DDAEConfig(denoiser=plain_config(make_unet(num_class_embeds=4)), null_class=3, num_labels=3)
    model = DDAEForSemanticSegmentation(config).eval()
    told = torch.tensor([0, 1, 2, 0, 1])
    given = model(images, condition=told).logits
    assert torch.equal(given, model(images, class_labels=told).logits)
    assert not torch.allclose(given, model(images).logits)
    assert torch.equal(model(images).logits, model(images, condition=torch.full((5,), 3)).logits)


def test_frozen_only_the_head_learns_and_otherwise_what_the_maps_depend_on(generator, images):
    model = segmenter_of(generator, out_features=["mid_block"]).train()
    model(images, labels=labels_for(images)).loss.backward()
    learnt = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    asked = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learnt == asked and not any("up_blocks" in name for name in learnt)
    assert {"segmenter.weight", "ddae.denoiser.conv_in.weight"} <= learnt
    model.freeze_denoiser()
    model.train()
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["segmenter.weight", "segmenter.bias"]
    assert not any(module.training for module in model.ddae.denoiser.modules()) and model.map_norm.training


def picture(seed=0, size=(12, 10)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3))
    return Image.fromarray(pixels.astype(np.uint8))


@torch.no_grad()
def test_the_pipeline_gives_masks_of_the_images_size(generator, tmp_path, caplog):
    model = segmenter_of(generator, id2label={0: "background", 1: "cat", 2: "dog"})
    model.save_head(tmp_path / "head", base=generator)
    processor = DDAEImageProcessor.from_pretrained(generator, do_center_crop=False)
    processor.save_pretrained(tmp_path / "head")
    segment = pipeline("image-segmentation", model=str(tmp_path / "head"))
    assert "not supported" not in caplog.text
    found = segment(picture())
    names = list(model.config.id2label.values())
    logits = model(**processor(picture(), return_tensors="pt")).logits
    expected = F.interpolate(logits, (12, 10), mode="bilinear", align_corners=False)[0].argmax(0).numpy()
    assert {row["label"] for row in found} == {model.config.id2label[i] for i in np.unique(expected).tolist()}
    for row in found:
        mask = np.asarray(row["mask"])
        assert mask.shape == (12, 10)
        np.testing.assert_array_equal(mask == 255, expected == names.index(row["label"]))
    own = pipeline("image-segmentation", model=model, image_processor=processor)
    assert [row["label"] for row in own([picture()])[0]] == [row["label"] for row in found]


def test_trainer_takes_prepared_images_with_masks(generator, tmp_path):
    model = segmenter_of(generator)
    model.freeze_denoiser()
    processor = DDAEImageProcessor.from_pretrained(generator, do_center_crop=False)
    masks = [np.random.default_rng(seed).integers(0, 3, (12, 10)) for seed in range(4)]
    batch = processor([picture(seed) for seed in range(4)], segmentation_maps=masks, return_tensors="pt")
    rows = [{name: values[i] for name, values in batch.items()} for i in range(4)]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, learning_rate=0.1, report_to="none", use_cpu=True,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    assert np.isfinite(trainer.train().training_loss) and np.isfinite(trainer.evaluate()["eval_loss"])
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value.cpu(), before[name])}
    norms = {f"map_norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert changed == {"segmenter.weight", "segmenter.bias"} | norms
