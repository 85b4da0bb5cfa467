"""The Python of the README and of the guides, every line as it stands there, beside tiny checkpoints of its names."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageColumn
from diffusers import DDIMScheduler, DDPMPipeline, DiTPipeline
from PIL import Image

from ddae_hf import DDAEForImageClassification, DDAEImageProcessor, DDAEModel, DDAEPipeline

from .conftest import make_dit, make_unet, make_vae

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "guides").glob("*.md"))]
BLOCKS = {page.stem: re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL) for page in PAGES}
CIFAR = "google/ddpm-cifar10-32"


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """What the pages open, tiny: with the blocks that the named layers are of, and images of the named columns."""
    root = tmp_path_factory.mktemp("pages")
    digits = DDPMPipeline(make_unet(in_channels=1, out_channels=1), DDIMScheduler())
    generator, classifier = root / "runs/quickstart/checkpoint", root / "runs/quickstart/classifier"
    digits.save_pretrained(generator)
    options = {"layer": "up_blocks.0.attentions.1", "sigma": 0.1, "num_labels": 10}
    DDAEForImageClassification.from_pretrained(generator, **options).save_pretrained(classifier)
    DDAEImageProcessor.from_pretrained(generator).save_pretrained(classifier)
    down = ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"]
    up = ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"]
    thin = {"block_out_channels": (32,) * 4, "layers_per_block": 2, "down_block_types": down, "up_block_types": up}
    cifar = DDPMPipeline(make_unet(sample_size=16, **thin), DDIMScheduler())
    cifar.save_pretrained(root / CIFAR)
    cifar.save_pretrained(root / "owner/name", variant="ema")
    dit = make_dit(num_layers=14, in_channels=4, out_channels=8, num_embeds_ada_norm=1000)
    DiTPipeline(dit, make_vae(), DDIMScheduler()).save_pretrained(root / "facebook/DiT-XL-2-256")
    index = root / "facebook/DiT-XL-2-256/model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": {0: "golden retriever", 1: "volcano"}}))
    features = Features({"img": ImageColumn(), "label": ClassLabel(names=["airplane", "automobile", "bird"])})
    for seed, split in enumerate(("train", "test")):
        pixels = np.random.default_rng(seed).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
        columns = {"img": [Image.fromarray(each) for each in pixels], "label": 4 * [0, 1, 2]}
        Dataset.from_dict(columns, features).to_parquet(root / f"uoft-cs/cifar10/{split}.parquet")
    for name in ("cat", "dog"):
        Image.fromarray(pixels[0]).resize((40, 30)).save(root / f"{name}.png")
    return root


@pytest.mark.parametrize("page", [page for page, blocks in BLOCKS.items() if blocks])
def test_the_code_of_a_page_runs(page, here, tmp_path, monkeypatch):
    """From top to bottom, as its reader goes, in a folder of its own; a push is noted, and not made."""
    shutil.copytree(here, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    pushed = []
    monkeypatch.setattr(DDAEForImageClassification, "push_to_hub", lambda self, name: pushed.append(name))
    names = {"pixel_values": torch.rand(2, 3, 16, 16) * 2 - 1}
    for number, code in enumerate(BLOCKS[page], start=1):
        if "save_head" in code:  # of a classifier, and of its generator
            names["model"] = DDAEForImageClassification.from_pretrained(CIFAR, num_labels=3)
            names["pipeline"] = DDAEPipeline.from_pretrained(CIFAR)
        exec(compile(code, f"{page}.md, block {number}", "exec"), names)
        if "Trainer(" in code:
            check_training(names)
        if "save_head" in code:
            check_saved(names["model"], torch.rand(2, 3, 16, 16) * 2 - 1)
        for file in re.findall(r'^[^#\n]*\.(?:save|savefig)\("([^"]+)"\)', code, re.MULTILINE):
            assert Path(file).exists(), file
    assert pushed == (["me/classifier"] if any("push_to_hub(" in code for code in BLOCKS[page]) else [])


def check_training(names):
    """What was trained is what was saved, and opens as it was."""
    assert names["trainer"].state.global_step > 0
    saved = Path("runs/cifar10_probe")
    assert (saved / "config.json").is_file()
    images = names["dataset"]["test"].with_format(None)["img"][:]
    inputs = DDAEImageProcessor.from_pretrained(saved)(images, return_tensors="pt")
    with torch.no_grad():
        trained = names["model"].eval().cpu()(**inputs).logits
        torch.testing.assert_close(DDAEForImageClassification.from_pretrained(saved)(**inputs).logits, trained)


@torch.no_grad()
def check_saved(model, pixel_values):
    """Every folder has the same classifier."""
    expected = model.eval()(pixel_values).logits
    for folder in ("mine", "head_only", "head_of_ema", "alone"):
        opened = DDAEForImageClassification.from_pretrained(folder)
        torch.testing.assert_close(opened(pixel_values).logits, expected)
    assert DDAEModel.from_pretrained("mine")(pixel_values).pooler_output.shape[0] == len(pixel_values)
    assert list(Path("alone").glob("*.py"))
