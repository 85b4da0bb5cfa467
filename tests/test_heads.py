"""A classifier without its denoiser: beside the generator in one folder, or naming a base elsewhere."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline
from transformers import AutoModelForImageClassification, pipeline

from ddae_hf import DDAEBackbone, DDAEForImageClassification, DDAEImageProcessor, DDAEModel, DDAEPipeline
from ddae_hf.checkpoints import HEAD_FILE

from .conftest import make_dit, make_unet


@pytest.fixture
def generator(tmp_path):
    DDAEPipeline(make_unet(), DDIMScheduler()).save_pretrained(tmp_path / "generator")
    return tmp_path / "generator"


def classifier_of(generator, **options):
    options = {"num_labels": 3, "sigma": 0.2, "feature_norm": "batch_norm", **options}
    model = DDAEForImageClassification.from_pretrained(generator, **options).eval()
    torch.nn.init.normal_(model.classifier.weight)
    model.feature_norm.running_mean.normal_()
    return model


@torch.no_grad()
def test_one_folder_serves_both_jobs_with_one_copy_of_the_weights(generator, images):
    model = classifier_of(generator)
    model.save_head(generator)
    DDAEImageProcessor.from_pretrained(generator).save_pretrained(generator)
    assert [f.name for f in generator.glob("*.safetensors")] == [HEAD_FILE]
    assert (generator / HEAD_FILE).stat().st_size < 4096
    for cls in (DDAEForImageClassification, AutoModelForImageClassification):
        opened = cls.from_pretrained(generator)
        assert torch.equal(opened(images).logits, model(images).logits)
    assert torch.equal(DDAEModel.from_pretrained(generator)(images).pooler_output, model.ddae(images).pooler_output)
    assert DDAEBackbone.from_pretrained(generator, out_indices=[0]).channels == [32]
    assert pipeline("image-classification", model=str(generator)).model.num_labels == 3
    weight = make_unet().conv_in.weight
    for pipe in (DDPMPipeline.from_pretrained(generator), DDAEPipeline.from_pretrained(generator)):
        assert torch.equal(pipe.unet.conv_in.weight, weight) and isinstance(pipe.scheduler, DDIMScheduler)
    half = DDAEForImageClassification.from_pretrained(generator, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half(images).logits.isfinite().all()


@torch.no_grad()
def test_a_head_alone_takes_the_denoiser_from_its_base(generator, images, tmp_path):
    model = classifier_of(generator)
    model.save_head(tmp_path / "head", base=generator)
    assert sum(f.stat().st_size for f in (tmp_path / "head").iterdir()) < 8192
    opened = DDAEForImageClassification.from_pretrained(tmp_path / "head")
    assert torch.equal(opened(images).logits, model(images).logits)
    assert opened.config.sigma == 0.2 and opened.config.generator_fingerprint == model.config.generator_fingerprint
    pipe = DDAEPipeline.from_pretrained(tmp_path / "head")
    assert torch.equal(pipe.unet.conv_in.weight, make_unet().conv_in.weight)
    opened.save_pretrained(tmp_path / "whole")  # which needs the base no more
    assert torch.equal(
        DDAEForImageClassification.from_pretrained(tmp_path / "whole")(images).logits, opened(images).logits
    )


def test_a_base_whose_weights_changed_is_refused(generator, tmp_path):
    classifier_of(generator).save_head(tmp_path / "head", base=generator)
    changed = make_unet()
    with torch.no_grad():
        changed.conv_in.bias[0] += 1e-6  # less than bfloat16 could tell
    DDAEPipeline(changed, DDIMScheduler()).save_pretrained(generator)
    with pytest.raises(ValueError, match=r"have changed since.*Bring back the base"):
        DDAEForImageClassification.from_pretrained(tmp_path / "head")


def test_a_head_needs_a_base_that_is_its_own(generator, tmp_path):
    model = classifier_of(generator)
    with pytest.raises(ValueError, match="holds no pipeline: save the generative checkpoint there first"):
        model.save_head(tmp_path / "empty")
    DDAEPipeline(make_unet(seed=1), DDIMScheduler()).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="is not that of .*other.*save_pretrained"):
        model.save_head(tmp_path / "new", base=tmp_path / "other")
    assert not (tmp_path / "new").exists()
    with torch.no_grad():
        model.ddae.denoiser.conv_in.weight.mul_(1.1)
    with pytest.raises(ValueError, match="fine-tuned"):
        model.save_head(generator)


def test_what_is_saved_last_is_what_opens(generator, tmp_path):
    first, second = classifier_of(generator), classifier_of(generator)
    for save in (lambda m: m.save_pretrained(generator), lambda m: m.save_head(generator)):
        save(first)
        save(second)
        opened = DDAEForImageClassification.from_pretrained(generator)
        assert torch.equal(opened.classifier.weight, second.classifier.weight)
    second.save_pretrained(generator)
    assert not (generator / HEAD_FILE).exists()


@torch.no_grad()
def test_a_dits_head(images, tmp_path):
    DDAEPipeline(transformer=make_dit(), scheduler=DDIMScheduler()).save_pretrained(tmp_path)
    model = classifier_of(tmp_path)
    model.save_head(tmp_path)
    assert torch.equal(DDAEForImageClassification.from_pretrained(tmp_path)(images).logits, model(images).logits)
