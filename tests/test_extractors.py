"""The networks whose features generated images are compared by: tiny ones, real digits."""

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import ExifTags, Image
from safetensors.torch import save_file
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

# By its module: some versions hide the name in the package where torchvision is missing.
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from ddae_hf import DDAEModel, DDAEPipeline
from ddae_hf.experiments.extractors import open_extractor

from .conftest import drawn, make_unet

GREY = {"in_channels": 1, "out_channels": 1, "block_out_channels": (32, 32)}


def save_pipeline(folder, **options):
    DDAEPipeline(make_unet(**GREY | options), DDIMScheduler()).save_pretrained(folder)
    return str(folder)


def save_vit(folder):
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    ViTModel(ViTConfig(**shape, image_size=16, patch_size=4)).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return save_vit(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("denoiser"))


@pytest.fixture(scope="module")
def images(digits):
    return drawn(digits, "train", 8)["image"][:]


def test_opening_leaves_global_random_states_as_they_are(vit, denoiser, images):
    for name in (f"transformers:{vit}", f"ddae:{denoiser}"):
        states = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
        extractor = open_extractor(name)
        found = extractor.compute([images[:5], images[5:]], 0)
        assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
        assert found.shape == (8, extractor.width) and extractor.name == name


def test_vision_models_without_a_pooled_output_are_averaged(vit, images, tmp_path):
    assert open_extractor(f"transformers:{vit}").identity["features"] == "pooler_output"
    model = ViTModel.from_pretrained(vit, add_pooling_layer=False)
    model.save_pretrained(tmp_path)
    shutil.copy(Path(vit) / "preprocessor_config.json", tmp_path)
    extractor = open_extractor(f"transformers:{tmp_path}")
    assert extractor.identity["features"] == "mean of last_hidden_state"
    pixels = ViTImageProcessorPil.from_pretrained(vit)([i.convert("RGB") for i in images], return_tensors="pt")
    with torch.no_grad():
        expected = model(**pixels).last_hidden_state.mean(1)
    torch.testing.assert_close(extractor.compute([images], 0), expected)


def test_deep_and_turned_images_are_the_same_to_every_extractor(vit, denoiser, tmp_path):
    """An image of 16 bits, or with an EXIF orientation, has the features of the 8-bit image that it shows."""
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = 6
    grey = np.random.default_rng(0).integers(0, 256, (20, 12), dtype=np.uint8)
    Image.fromarray(grey).save(tmp_path / "plain.png")
    Image.fromarray(np.rot90(grey)).save(tmp_path / "turned.png", exif=tags)
    for suffix in ("png", "tif", "pgm"):
        Image.fromarray(grey * np.uint16(257)).save(tmp_path / f"deep.{suffix}")
    files = ["plain.png", "turned.png", "deep.png", "deep.tif", "deep.pgm"]
    # The denoiser's processor resizes images of 16 bits without rounding.
    for name, close in ((f"transformers:{vit}", 0.0), (f"ddae:{denoiser}", 0.02)):
        extractor = open_extractor(name)
        plain, *others = (extractor.compute([[Image.open(tmp_path / file)]], 0) for file in files)
        white = extractor.compute([[Image.new("RGB", (12, 20), "white")]], 0)
        scale = (plain - white).abs().max()
        assert scale > 0.05
        for features in others:
            assert (features - plain).abs().max() <= close * scale


def test_networks_that_cannot_be_used_are_refused(vit, denoiser, tmp_path):
    torch.manual_seed(0)
    whole = Dinov2Model(Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28))
    state = {name: value for name, value in whole.state_dict().items() if not name.startswith("layernorm.")}
    whole.save_pretrained(tmp_path, state_dict=state)
    shutil.copy(Path(vit) / "preprocessor_config.json", tmp_path)
    for name, options, message in (
        (f"transformers:{tmp_path}", {}, r"its weights \['layernorm.bias', 'layernorm.weight'\] are missing"),
        (f"transformers:{vit}", {"layer": "mid_block"}, "are for a DDAE extractor, not for transformers"),
        ("transformers:nowhere/at/all", {}, "extractor transformers:nowhere/at/all cannot be used"),
        ("ddae:nowhere/at/all", {}, "extractor ddae:nowhere/at/all cannot be used"),
        ("ddae:", {}, "extractor is ddae:: allowed are ddae:PATH"),
        ("vgg", {}, "extractor is vgg: allowed are ddae:PATH"),
        (f"ddae:{denoiser}", {"layer": "up_blocks.7"}, "cannot be used: There is no layer"),
        (f"ddae:{denoiser}", {"sigma": -1.0}, "cannot be used: .*outside the schedule"),
    ):
        with pytest.raises(ValueError, match=message):
            open_extractor(name, **options)


def test_inception_says_what_it_needs():
    if _has_fidelity():
        pytest.skip("torch-fidelity is installed")
    with pytest.raises(ValueError, match='pip install "torch-fidelity>='):
        open_extractor("inception")


def _has_fidelity():
    try:
        import torch_fidelity  # noqa: F401
    except ImportError:
        return False
    return True


@pytest.mark.slow  # the whole Inception network
def test_inception_reads_weights_without_unpickling(images, tmp_path, monkeypatch):
    if not _has_fidelity():
        pytest.skip("torch-fidelity is not installed")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Inception

    torch.save({}, tmp_path / "empty.pth")
    with monkeypatch.context() as untrained:
        untrained.setattr(Inception, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        network = Inception("inception-v3-compat", ["2048"], str(tmp_path / "empty.pth"))
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    torch.save(network, tmp_path / "object.pth")
    pixels = torch.stack([torch.from_numpy(np.array(i.convert("RGB"))).permute(2, 0, 1) for i in images[:5]])
    for name in ("weights.safetensors", "weights.pth"):
        extractor = open_extractor(f"inception:{tmp_path / name}")
        assert extractor.width == 2048
        torch.testing.assert_close(extractor.compute([images[:5]], 0), network(pixels)[0])
    with pytest.raises(ValueError, match="cannot be used: Weights only load failed"):
        open_extractor(f"inception:{tmp_path / 'object.pth'}")


def test_features_of_another_pooling_are_other_features(denoiser, tmp_path):
    options = {"layer": "mid_block", "sigma": 0.1}
    found = {}
    for pooling in ("mean", "mean_2x2"):
        DDAEModel.from_pretrained(denoiser, pooling=pooling, **options).save_pretrained(tmp_path / pooling)
        found[pooling] = open_extractor(f"ddae:{tmp_path / pooling}")
    assert found["mean"].identity != found["mean_2x2"].identity
    assert 4 * found["mean"].width == found["mean_2x2"].width
