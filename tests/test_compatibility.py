"""Checkpoints that earlier versions wrote, and code that travels with checkpoints, where the package is not installed.

`tests/checkpoints/VERSION.zip` is what `write_checkpoints.py` wrote with that version, and what it then answered.
"""

import ast
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, parse_eval_result_entries
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import ddae_hf
from ddae_hf import DDAEConfig, DDAEForImageClassification, DDAEModel, DDAEPipeline
from ddae_hf.experiments import make_card
from ddae_hf.experiments.results import ProbeReport

from . import write_checkpoints as writer

ARCHIVES = sorted((Path(__file__).parent / "checkpoints").glob("*.zip"))
VERSIONS = [archive.stem for archive in ARCHIVES]
CODE = [name for name in writer.FOLDERS if name.startswith("code_")]
pytestmark = pytest.mark.filterwarnings("ignore:.*without its scheduler", "ignore:.*trained as a classifier")


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """The folders of every archive, by its version."""
    root = tmp_path_factory.mktemp("saved")
    for archive in ARCHIVES:
        with zipfile.ZipFile(archive) as zipped:
            zipped.extractall(root / archive.stem)
    return root


@pytest.fixture(scope="session")
def present(tmp_path_factory):
    """Folders with their code, as the present version writes them, of every class."""
    root = tmp_path_factory.mktemp("present")
    writer.write_generators(root)
    writer.write_code(root)
    DDAEModel.from_pretrained(root / "flat").save_pretrained(root / "code_model", include_code=True)
    return root


def expected_of(root, name):
    """What a folder answered when it was written."""
    expected = load_file(root / "expected.safetensors")
    return {key.removeprefix(f"{name}/"): value for key, value in expected.items() if key.startswith(f"{name}/")}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        # Processors add up in orders of their own: on others than wrote the archives, logits differed by 1.4e-5.
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", writer.FOLDERS)
@pytest.mark.parametrize("version", VERSIONS)
def test_what_a_version_wrote_answers_as_it_did(saved, version, name):
    assert_same(writer.answers(saved / version, name), expected_of(saved / version, name))


@torch.no_grad()
@pytest.mark.parametrize("version", VERSIONS)
def test_configurations_and_auto_classes_open_what_a_version_wrote(saved, version):
    root = saved / version
    where, names = {"cache_dir": root / "hub"}, writer.NAMES["id2label"]
    for name in writer.FOLDERS:
        config = DDAEConfig.from_pretrained(root / name, **where)
        assert config.id2label == names or name not in writer.CLASSIFIERS
    for name in ("whole", "head"):
        expected = expected_of(root, name)
        assert type(AutoConfig.from_pretrained(root / name, **where)) is DDAEConfig
        assert type(AutoImageProcessor.from_pretrained(root / name)) is ddae_hf.DDAEImageProcessor
        model = AutoModelForImageClassification.from_pretrained(root / name, **where).eval()
        features = AutoModel.from_pretrained(root / name, **where).eval()(expected["pixel_values"]).pooler_output
        assert_same(
            {"logits": model(expected["pixel_values"]).logits, "features": features},
            {"logits": expected["logits"], "features": expected["features"]},
        )
    assert DDAEForImageClassification.from_pretrained(root / "flat", num_labels=7).classifier.out_features == 7
    for name in ("pipeline", "latent"):
        assert DDAEPipeline.from_pretrained(root / name).get_label_ids(["frog", "hound", "dog, hound"]) == [2, 1, 1]


@pytest.mark.parametrize("version", VERSIONS)
def test_cards_that_a_version_wrote_load(saved, version):
    root = saved / version
    card, probe = (ModelCard.load(root / name / "README.md") for name in ("pipeline", "probe"))
    assert (card.data.library_name, card.data.license) == ("diffusers", "mit") and card.data.eval_results is None
    assert probe.data.model_name == "probe" and probe.data.base_model == "tester/base"
    results = probe.data.eval_results
    assert all(isinstance(result, EvalResult) for result in results)
    assert [(result.metric_type, result.metric_value) for result in results] == [
        ("accuracy", writer.PROBE["saved_classifier_test_accuracy"]),
        ("accuracy", writer.PROBE["results"]["DDAE"]["test_accuracy"]),
        ("f1", writer.PROBE["results"]["DDAE"]["test_f1"]),
    ]
    (entry,) = parse_eval_result_entries(yaml.safe_load((root / "probe/.eval_results/linear_probe.yaml").read_text()))
    assert (entry.dataset_id, entry.value) == ("tester/pets", 0.8125)


@pytest.mark.parametrize("version", VERSIONS)
def test_results_that_a_version_wrote_are_shown_by_the_present_card(saved, version):
    """With the figures of then; the table's layout and the protocol's words are of now."""
    folder, figures = saved / version / "probe", writer.PROBE["results"]["DDAE"]
    report = ProbeReport.read(folder)
    assert (report.best.layer, report.best.sigma) == (figures["layer"], figures["sigma"])
    assert report.test_accuracies == {"0": figures["test_accuracy"]} and report.test_f1 == figures["test_f1"]
    card = make_card(folder, repo_id="tester/probe", license="mit", base_model="tester/base")
    assert card.data.to_dict() == ModelCard.load(folder / "README.md").data.to_dict()
    assert "| DDAE | `mid_block`, sigma 0.3 | all 64 | 87.50 | 75.00 |" in card.text
    assert "accuracy of 81.25 %" in card.text


# What each root's folders answer where `ddae_hf` cannot be imported. Each has a process of its own, since diffusers
# has one place for the code of all local pipelines, but the libraries are imported once.
WITHOUT_THE_PACKAGE = """
import os, sys
sys.modules["ddae_hf"] = None  # importing it fails, as where it is not installed
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import AutoBackbone, AutoConfig, AutoModel, AutoModelForImageClassification
from transformers.models.auto.image_processing_auto import AutoImageProcessor
torch.set_grad_enabled(False)
TRUST = {"trust_remote_code": True}

def sample(pipeline, **options):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(2)
    return pipeline(2, generator=generator, num_inference_steps=3, output_type="latent", **options).images

def answer(folder, images):
    config, name = AutoConfig.from_pretrained(folder, **TRUST), folder.name
    if name == "code_backbone":  # which transformers opens from the Hub alone
        model = AutoBackbone.from_config(config, **TRUST).eval()
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return {f"feature_maps.{i}": maps for i, maps in enumerate(model(images).feature_maps)}
    found = {"features": AutoModel.from_pretrained(folder, **TRUST).eval()(images).pooler_output}
    if name == "code_model":
        return found
    model = AutoModelForImageClassification.from_pretrained(folder, **TRUST).eval()
    assert type(model).__module__.startswith("transformers_modules.") and model.config.id2label[2] == "frog"
    processor = AutoImageProcessor.from_pretrained(folder, **TRUST)
    picture = Image.open(folder.parent / "picture.png")
    found |= {"logits": model(images).logits, "processed": processor(picture, return_tensors="pt")["pixel_values"]}
    if name == "code_head":
        pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline="pipeline", **TRUST)
        found["samples"] = sample(pipeline)
        found["guided"] = sample(pipeline, class_labels=[0, 2], guidance_scale=2.0)
    return found

for root in map(Path, sys.argv[1:]):
    child = os.fork()
    if child == 0:
        found = {}
        for folder in sorted(root.glob("code_*")):
            images = load_file(root / "images.safetensors")[folder.name]
            found |= {f"{folder.name}/{key}": torch.as_tensor(value) for key, value in answer(folder, images).items()}
        save_file({key: value.contiguous() for key, value in found.items()}, root / "found.safetensors")
        sys.stderr.flush()
        os._exit(0)
    if os.waitpid(child, 0)[1] != 0:
        sys.exit(f"{root}: see above")
"""


@pytest.fixture(scope="session")
def without_the_package(saved, present, tmp_path_factory):
    """What folders with their code answer, by root and name."""
    roots = {**{version: saved / version for version in VERSIONS}, "present": present}
    for root in roots.values():
        writer.picture().save(root / "picture.png")
        folders = sorted(root.glob("code_*"))
        images = {folder.name: writer.images(DDAEConfig.from_pretrained(folder)) for folder in folders}
        writer.save_file(images, root / "images.safetensors")
    home = tmp_path_factory.mktemp("home")
    environment = {**os.environ, "HF_HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", WITHOUT_THE_PACKAGE, *map(str, roots.values())]
    done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: load_file(root / "found.safetensors") for name, root in roots.items()}


def found_of(found, name):
    return {key.partition("/")[2]: value for key, value in found.items() if key.startswith(f"{name}/")}


@pytest.mark.parametrize("name", CODE)
@pytest.mark.parametrize("version", VERSIONS)
def test_the_code_that_a_version_wrote_opens_its_folder_without_the_package(saved, without_the_package, version, name):
    found, expected = found_of(without_the_package[version], name), expected_of(saved / version, name)
    assert found and found.keys() <= expected.keys()
    assert_same(found, {key: expected[key] for key in found})


@pytest.mark.parametrize("name", [*CODE, "code_model"])
def test_the_present_code_opens_what_it_travels_with_without_the_package(present, without_the_package, name):
    found, expected = found_of(without_the_package["present"], name), writer.answers(present, name)
    assert found and found.keys() <= expected.keys()
    assert_same(found, {key: expected[key] for key in found})


def imported(path):
    """Every module that a file imports, at its top or inside of a function; of packages, what comes from them too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield module
            yield from (
                f"{module.rstrip('.')}.{alias.name}" for alias in node.names if module.strip(".") in ("", "ddae_hf")
            )
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_code_that_travels_needs_no_module_that_does_not(present):
    """Flat modules alone: transformers follows every relative import, and fails at a sub-package."""
    folders = sorted(present.glob("code_*"))
    assert len(folders) == len(CODE) + 1
    for folder in folders:
        modules = {path.stem: path for path in folder.glob("*.py")}
        assert len(modules) > 5
        assert all(reference.split(".")[0] in modules for reference in auto_map(folder).values())
        for name, path in modules.items():
            for module in imported(path):
                assert module.split(".")[0] != "ddae_hf", f"{name} imports {module}"
                assert not {"experiments", "commands"} & set(module.split(".")), f"{name} imports {module}"
                if module.startswith("."):
                    assert module[1:] in modules, f"{name} imports {module}, which {folder.name} lacks"


def auto_map(folder):
    return json.loads((folder / "config.json").read_text())["auto_map"]
