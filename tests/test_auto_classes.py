"""transformers' Auto classes and pipelines on our checkpoints; the same from code that a checkpoint carries."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import ExifTags, Image
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    pipeline,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import ddae_hf
from ddae_hf import DDAEForImageClassification, DDAEImageProcessor, DDAEPipeline

from .conftest import make_unet


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A classifier with its processor and the code of both; a pipeline with its code in `generator`."""
    root = tmp_path_factory.mktemp("auto")
    DDAEPipeline(make_unet(), DDPMScheduler()).save_pretrained(root / "generator", include_code=True)
    names = {"id2label": {0: "cat", 1: "dog", 2: "frog"}, "label2id": {"cat": 0, "dog": 1, "frog": 2}}
    model = DDAEForImageClassification.from_pretrained(root / "generator", sigma=0.1, **names)
    torch.nn.init.normal_(model.classifier.weight, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(root / "classifier")
    DDAEImageProcessor.from_pretrained(root / "generator").save_pretrained(root / "classifier")
    model.save_pretrained(root / "code", include_code=True)
    DDAEImageProcessor.from_pretrained(root / "generator").save_pretrained(root / "code", include_code=True)
    return root


@pytest.fixture
def picture():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 16, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def test_auto_classes_know_the_model_type(folder):
    classes = {
        AutoConfig: ddae_hf.DDAEConfig,
        AutoModel: ddae_hf.DDAEModel,
        AutoModelForImageClassification: ddae_hf.DDAEForImageClassification,
        AutoImageProcessor: ddae_hf.DDAEImageProcessor,
    }
    for auto, own in classes.items():
        assert type(auto.from_pretrained(folder / "classifier")) is own
    config = AutoConfig.from_pretrained(folder / "classifier", out_indices=[0, -1])
    assert type(AutoBackbone.from_config(config)) is ddae_hf.DDAEBackbone
    assert type(AutoModelForImageClassification.from_config(config)) is ddae_hf.DDAEForImageClassification


def test_classification_pipeline_takes_paths_images_and_lists(folder, picture, tmp_path):
    classify = pipeline("image-classification", model=str(folder / "classifier"))
    picture.save(tmp_path / "picture.png")
    expected = classify(picture)
    assert {row["label"] for row in expected} == {"cat", "dog", "frog"}
    assert sum(row["score"] for row in expected) == pytest.approx(1)
    assert classify(str(tmp_path / "picture.png")) == expected == classify(picture)
    other = Image.new("L", (8, 8), 200)
    for rows in (classify([other, picture]), classify([other, picture], batch_size=2)):
        assert [row["label"] for row in rows[1]] == [row["label"] for row in expected]
        scores = [[row["score"] for row in answer] for answer in (rows[1], expected)]
        np.testing.assert_allclose(*scores, rtol=0, atol=1e-6)  # an image's neighbours change nothing
    assert classify(picture, top_k=1) == expected[:1]


def test_classification_pipeline_turns_photographs_and_takes_deep_images_as_arrays(folder, picture, tmp_path):
    """Files and PIL images it would clip to 8 bits before the processor sees them."""
    classify, tags = pipeline("image-classification", model=str(folder / "classifier")), Image.Exif()
    tags[ExifTags.Base.Orientation] = 6
    picture.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=tags)
    assert classify(str(tmp_path / "turned.png")) == classify(picture)
    grey = np.asarray(picture.convert("L").resize((8, 8)))
    Image.fromarray(grey * np.uint16(257)).save(tmp_path / "deep.png")
    found = classify(np.asarray(Image.open(tmp_path / "deep.png")))
    expected = classify(Image.fromarray(grey))
    assert [row["label"] for row in found] == [row["label"] for row in expected]
    np.testing.assert_allclose(*([row["score"] for row in rows] for rows in (found, expected)), rtol=0, atol=1e-6)


@torch.no_grad()
def test_feature_extraction_pipeline_gives_the_models_features(folder, picture):
    extract = pipeline("image-feature-extraction", model=str(folder / "classifier"))
    processor = AutoImageProcessor.from_pretrained(folder / "classifier")
    outputs = extract.model(**processor(picture, return_tensors="pt"))
    np.testing.assert_allclose(extract(picture), outputs.last_hidden_state, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(extract(picture, pool=True), outputs.pooler_output, rtol=1e-5, atol=1e-6)


def test_code_travels_only_when_asked_for(folder, tmp_path):
    assert not list((folder / "classifier").glob("*.py"))
    config = json.loads((folder / "code" / "config.json").read_text())
    assert config["auto_map"]["AutoModelForImageClassification"] == "modeling_ddae.DDAEForImageClassification"
    for reference in config["auto_map"].values():
        assert (folder / "code" / f"{reference.split('.')[0]}.py").is_file()
    # Saved again without it, a folder does not name code that it lacks.
    DDAEForImageClassification.from_pretrained(folder / "code").save_pretrained(tmp_path)
    DDAEImageProcessor.from_pretrained(folder / "code").save_pretrained(tmp_path)
    for file in ("config.json", "preprocessor_config.json"):
        assert "auto_map" not in json.loads((tmp_path / file).read_text())


WITHOUT_THE_PACKAGE = """
import json, sys
sys.modules["ddae_hf"] = None  # importing it fails, as where it is not installed
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from transformers import AutoModel, AutoModelForImageClassification, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor
folder, generator = sys.argv[1:3]
def refusal(function):
    try: return str(function())
    except Exception as error: return f"refused: {type(error).__name__}: {error}"
def sample(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe(1, generator=torch.Generator().manual_seed(0), num_inference_steps=2, output_type="pt").images.tolist()
found = {"refusals": [
    refusal(lambda: AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=False)),
    refusal(lambda: AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)),
    refusal(lambda: pipeline("image-classification", model=folder, trust_remote_code=False)),
    refusal(lambda: DiffusionPipeline.from_pretrained(generator, custom_pipeline="pipeline")),
]}
found["executed"] = [name for name in sys.modules if name.endswith(("ing_ddae", "ion_ddae", "pipeline_ddae"))]
model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
found["base"] = type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__
found["logits"] = model(torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8)).logits.tolist()
classify = pipeline("image-classification", model=folder, trust_remote_code=True)
found["label"] = classify(Image.new("RGB", (9, 9), "red"))[0]["label"]
remote = {"custom_pipeline": "pipeline", "trust_remote_code": True}
found["images"] = sample(DiffusionPipeline.from_pretrained(generator, **remote))
model.save_pretrained(sys.argv[3])
model.save_head(sys.argv[3] + "/head", base=generator)
print(json.dumps(found))
"""


@pytest.mark.slow  # `test_compatibility.py` opens folders of every class
def test_a_folder_with_its_code_opens_without_the_package(folder, tmp_path):
    again = tmp_path / "again"
    command = [sys.executable, "-c", WITHOUT_THE_PACKAGE, folder / "code", folder / "generator", again]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for message in found["refusals"]:
        assert message.startswith("refused") and "trust_remote_code=True" in message
    assert not found["executed"]
    model = DDAEForImageClassification.from_pretrained(folder / "classifier")
    with torch.no_grad():
        logits = model(torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8)).logits
    torch.testing.assert_close(torch.tensor(found["logits"]), logits, rtol=1e-4, atol=1e-5)
    classify = pipeline("image-classification", model=str(folder / "classifier"))
    assert found["label"] == classify(Image.new("RGB", (9, 9), "red"))[0]["label"]
    assert found["base"] == "DDAEModel"
    generate = DDAEPipeline.from_pretrained(folder / "generator")
    generate.set_progress_bar_config(disable=True)
    options = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": 2, "output_type": "pt"}
    torch.testing.assert_close(torch.tensor(found["images"]), generate(1, **options).images, rtol=0, atol=1e-5)
    # What is saved from there carries its code on.
    for saved in (again, again / "head"):
        assert {path.name for path in Path(saved).glob("*.py")} >= {"modeling_ddae.py", "configuration_ddae.py"}
