"""A classifier without its denoiser: beside the generator in one folder, or naming a base elsewhere."""

import json
import os

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, pipeline

from ddae_hf import DDAEBackbone, DDAEConfig, DDAEForImageClassification, DDAEImageProcessor, DDAEModel, DDAEPipeline
from ddae_hf.weights import HEAD_FILE, head_metadata

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


def contents(folder):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def as_version_0_1_0(folder):
    """Leave out of a folder's config what version 0.1.0 did not write."""
    config = json.loads((folder / "config.json").read_text())
    del config["weights"]
    config.pop("generator_fingerprint_float16", None)
    (folder / "config.json").write_text(json.dumps(config))


def set_base(folder, base, subfolder=None):
    """Let the head in a folder name another base."""
    known = {**head_metadata(str(folder / HEAD_FILE)), "base": str(base)}
    known |= {} if subfolder is None else {"subfolder": subfolder}
    save_file(load_file(folder / HEAD_FILE), folder / HEAD_FILE, known)


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
    for cls in (DDAEForImageClassification, DDAEPipeline):
        with pytest.raises(ValueError, match=r"have changed since.*Restore the base"):
            cls.from_pretrained(tmp_path / "head")
    given = DDAEPipeline.from_pretrained(tmp_path / "head", unet=make_unet(seed=2)).unet  # which needs no base
    assert torch.equal(given.conv_in.weight, make_unet(seed=2).conv_in.weight)


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


@torch.no_grad()
def test_what_is_saved_last_is_what_opens_and_nothing_else_is_deleted(generator, images):
    """Whatever files of what was saved before lie there, and whatever files are the user's own."""
    (generator / "model_ema.safetensors").write_bytes(b"mine")
    head, whole = classifier_of(generator), classifier_of(generator)
    whole.ddae.denoiser.conv_in.weight.mul_(1.1)
    expected = {model: model(images).logits for model in (head, whole)}
    for model in (whole, head, whole, head):
        model.save_head(generator) if model is head else model.save_pretrained(generator)
        opened = DDAEForImageClassification.from_pretrained(generator)
        assert torch.equal(opened(images).logits, expected[model])
        assert opened.config.weights == ("head" if model is head else "whole")
        assert (generator / "model_ema.safetensors").read_bytes() == b"mine"
    assert (generator / HEAD_FILE).exists() and (generator / "model.safetensors").exists()
    # What was opened as the one is saved as the other.
    opened.save_pretrained(generator / "whole")
    assert DDAEConfig.from_pretrained(generator / "whole").weights == "whole"


@pytest.mark.parametrize("openers", [DDAEConfig, DDAEForImageClassification, DDAEModel, DDAEPipeline])
def test_a_config_that_says_head_needs_one(generator, tmp_path, openers):
    classifier_of(generator).save_head(tmp_path / "head", base=generator)
    classifier_of(generator).save_pretrained(tmp_path / "head" / "other")
    (tmp_path / "head" / "other" / "model.safetensors").rename(tmp_path / "head" / "model.safetensors")
    (tmp_path / "head" / HEAD_FILE).unlink()
    with pytest.raises(ValueError, match=r"without its denoiser, but its head.safetensors is missing"):
        openers.from_pretrained(tmp_path / "head")


def test_a_config_that_says_whole_needs_weights(generator, tmp_path):
    model = classifier_of(generator)
    model.save_head(tmp_path, base=generator)
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for cls in (DDAEForImageClassification, DDAEModel, DDAEBackbone, DDAEPipeline):
        with pytest.raises(ValueError, match=r"has no model.safetensors in its root"):
            cls.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"weights": "half"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"says `weights: 'half'`: allowed are whole, head"):
        DDAEModel.from_pretrained(tmp_path)


@torch.no_grad()
def test_what_version_0_1_0_saved_opens(generator, images, tmp_path):
    model, stale = classifier_of(generator), classifier_of(generator)
    expected = model(images).logits
    model.save_head(tmp_path / "head", base=generator)
    stale.save_pretrained(generator)
    model.save_head(generator)
    model.save_pretrained(tmp_path / "whole")
    for folder in (tmp_path / "head", generator, tmp_path / "whole"):
        as_version_0_1_0(folder)
        opened = DDAEForImageClassification.from_pretrained(folder)
        assert torch.equal(opened(images).logits, expected)
        assert DDAEPipeline.from_pretrained(folder)._fine_tuned_from is None


@pytest.mark.parametrize("way", ["path", "relative", "link"])
def test_a_folder_is_no_base_of_its_own_head(generator, tmp_path, monkeypatch, way):
    model = classifier_of(generator)
    model.save_pretrained(tmp_path / "whole")
    (tmp_path / "link").symlink_to(tmp_path / "whole")
    monkeypatch.chdir(tmp_path)
    base = {"path": tmp_path / "whole", "relative": os.path.join("generator", "..", "whole"), "link": "link"}[way]
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"would replace what it needs"):
        model.save_head(tmp_path / "whole", base=base)
    with pytest.raises(ValueError, match=r"would replace what it needs"):
        model.save_head(tmp_path / "whole", base=tmp_path, subfolder="whole")
    # Nor is what reaches it: the head elsewhere needs the folder.
    model.save_head(tmp_path / "head", base=base)
    before |= {file.relative_to(tmp_path): file.read_bytes() for file in (tmp_path / "head").iterdir()}
    with pytest.raises(ValueError, match=r"or depends on it"):
        model.save_head(tmp_path / "whole", base=tmp_path / "head")
    assert contents(tmp_path) == before


@torch.no_grad()
def test_the_base_of_a_head_may_be_a_head(generator, images, tmp_path):
    model = classifier_of(generator)
    model.save_head(generator)
    model.save_head(tmp_path / "first", base=generator)
    model.save_head(tmp_path / "second", base=tmp_path / "first")
    opened = DDAEForImageClassification.from_pretrained(tmp_path / "second")
    assert torch.equal(opened(images).logits, model(images).logits)
    weight = DDAEPipeline.from_pretrained(tmp_path / "second").unet.conv_in.weight
    assert torch.equal(weight, make_unet().conv_in.weight)


@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("openers", [DDAEConfig, DDAEForImageClassification, DDAEPipeline])
def test_heads_that_are_each_others_base_are_refused(generator, tmp_path, length, openers):
    for i in range(length):
        classifier_of(generator).save_head(tmp_path / "heads" / str(i), base=generator)
    for i in range(length):
        folder = tmp_path / "heads" / str((i + 1) % length)
        # Some are named as a sub-folder.
        parts = (folder.parent, folder.name) if i else (folder, None)
        set_base(tmp_path / "heads" / str(i), *parts)
    with pytest.raises(ValueError, match=r"is its own base, directly or by way of others"):
        openers.from_pretrained(tmp_path / "heads" / "0")


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_head_in_half_precision_opens_as_it_was(generator, images, tmp_path, dtype):
    """Its base stays in float32; what is compared is rounded to the classifier's own type."""
    opened = classifier_of(generator, dtype=dtype)
    cast = classifier_of(generator).to(dtype)
    for model in (opened, cast):
        model.save_head(tmp_path, base=generator)
        model.save_head(generator)
        for folder in (tmp_path, generator):
            again = DDAEForImageClassification.from_pretrained(folder)
            assert again.dtype == again.ddae.denoiser.dtype == dtype
            assert torch.equal(again(images).logits, model(images).logits)
    assert DDAEForImageClassification.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32
    opened.ddae.denoiser.conv_in.weight.mul_(1.1)
    with pytest.raises(ValueError, match="fine-tuned"):
        opened.save_head(generator)


def test_a_denoiser_that_was_fine_tuned_a_little_is_not_its_base(generator):
    """By less than bfloat16 could tell."""
    model = classifier_of(generator)
    with torch.no_grad():
        model.ddae.denoiser.conv_in.weight.mul_(1 + 1e-6)
    with pytest.raises(ValueError, match="fine-tuned"):
        model.save_head(generator)


@torch.no_grad()
@pytest.mark.parametrize("place", ["beside", "elsewhere"])
def test_a_head_knows_the_variant_of_its_base(generator, images, tmp_path, place):
    averaged = make_unet(seed=1)
    DDAEPipeline(averaged, DDIMScheduler()).save_pretrained(generator, variant="ema")
    model = classifier_of(generator, variant="ema")
    assert torch.equal(model.ddae.denoiser.conv_in.weight, averaged.conv_in.weight)
    folder, base = (generator, None) if place == "beside" else (tmp_path / "head", generator)
    with pytest.raises(ValueError, match="pass its name as `variant`"):
        model.save_head(folder, base=base)
    model.save_head(folder, base=base, variant="ema")
    opened = DDAEForImageClassification.from_pretrained(folder)
    assert torch.equal(opened(images).logits, model(images).logits)
    with pytest.raises(ValueError, match="leave `variant` out"):
        DDAEForImageClassification.from_pretrained(folder, variant="ema")
    # A pipeline with a classifier beside it opens as it does without; elsewhere the head names its generator.
    plain = DDAEPipeline.from_pretrained(folder).unet.conv_in.weight
    assert torch.equal(plain, (make_unet() if place == "beside" else averaged).conv_in.weight)
    DDAEPipeline(make_unet(seed=2), DDIMScheduler()).save_pretrained(generator, variant="ema")
    with pytest.raises(ValueError, match="have changed since"):
        DDAEForImageClassification.from_pretrained(folder)


@torch.no_grad()
def test_a_dits_head(images, tmp_path):
    DDAEPipeline(transformer=make_dit(), scheduler=DDIMScheduler()).save_pretrained(tmp_path)
    model = classifier_of(tmp_path)
    model.save_head(tmp_path)
    assert torch.equal(DDAEForImageClassification.from_pretrained(tmp_path)(images).logits, model(images).logits)


@pytest.mark.parametrize("way", ["opened", "stored"])
def test_a_probe_in_half_precision_is_saved_beside_its_generator(generator, tmp_path, way):
    """It is not taken for one whose denoiser was fine-tuned, and written whole."""
    from ddae_hf.experiments.probing import make_classifier, save_classifier

    options = {"dtype": torch.float16} if way == "opened" else {}
    classifier_of(generator).half().save_pretrained(tmp_path / "stored")
    checkpoint = generator if way == "opened" else tmp_path / "stored"
    weight, bias = torch.randn(2, 64), torch.zeros(2)
    processor = DDAEImageProcessor.from_pretrained(generator)
    made = make_classifier(checkpoint, ["cat", "dog"], weight, bias, layer="mid_block", **options)
    save_classifier(tmp_path / "probe", made, checkpoint, processor)
    opened = DDAEForImageClassification.from_pretrained(tmp_path / "probe")
    assert opened.config.weights == "head" and opened.dtype == torch.float16
    assert torch.equal(opened.classifier.weight, weight.half())
