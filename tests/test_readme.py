"""The Python of the README and of the guides, every line as it stands there, beside tiny checkpoints of its names."""

import json
import re
import shlex
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
from ddae_hf.experiments.results import ProbeReport

from . import commands
from .conftest import make_dit, make_unet, make_vae
from .stock import stable_diffusion

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
    told = DDAEPipeline.for_denoiser(make_unet(sample_size=16, num_class_embeds=4), DDIMScheduler(), 3)
    told.save_pretrained(root / "runs/conditional")
    dit = make_dit(num_layers=14, in_channels=4, out_channels=8, num_embeds_ada_norm=1000)
    DiTPipeline(dit, make_vae(), DDIMScheduler()).save_pretrained(root / "facebook/DiT-XL-2-256")
    index = root / "facebook/DiT-XL-2-256/model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": {0: "golden retriever", 1: "volcano"}}))
    stable_diffusion(root / "stable-diffusion-v1-5/stable-diffusion-v1-5")
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


# What shortens the commands; the rest of a line is as it stands in the README.
SHORTER = {
    "pretrain": "--max_train_steps 2 --checkpointing_steps 2 --sample_steps 2 --num_inference_steps 2",
    "generate": "--num_images 2 --num_inference_steps 2",
    "sweep": "--sigmas 0.1 --layers own --num_noise_seeds 1 --num_draws 2",
}


def test_the_readmes_commands_run(tmp_path, monkeypatch):
    """One after the other, on folders of images; the others install, and are the make targets that tests compare."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 6)):
        for name in ("cat", "dog"):
            folder = tmp_path / "labelled" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (9, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    shutil.copytree(tmp_path / "labelled" / "train", tmp_path / "photos")
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.replace("\\\n", "").splitlines()]
    run = [line[1:] for line in lines if line[:1] == ["ddae"]]
    assert [line[0] for line in run] == ["pretrain", "generate", "sweep"]
    assert {line[0] for line in lines if line} == {"ddae", "pip", "make"}
    for words in run:
        commands.run(words[0], *words[1:], *SHORTER[words[0]].split())
    assert len([*Path("runs/mine_samples").glob("0*.png")]) == 2
    report = ProbeReport.read("runs/mine_sweep")
    assert report.images == {"fitted": 38, "held_out": 10, "train": 48, "test": 12} and report.baselines


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
