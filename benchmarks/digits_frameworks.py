"""Every framework with every network on handwritten digits: pretrain, generate, probe, compare.

    python -m benchmarks.digits_frameworks --output_dir runs/digits_frameworks

Runs commands with the configurations `digits*`, one after the other; a step that is done is not done again. Writes
`results.json`, `table.md` and `samples.png`. Few labels: mean ± standard deviation over draws.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from ddae_hf.commands.quickstart import NUM_SAMPLES, show
from ddae_hf.experiments.digits import Judge, digits, write_digits
from ddae_hf.experiments.plots import image_grid
from ddae_hf.experiments.report import spread
from ddae_hf.experiments.results import ProbeReport

FRAMEWORKS = {"ddpm": "DDPM", "edm": "EDM", "flow": "flow matching"}
NETWORKS = {"unet": "U-Net", "ddpmpp": "DDPM++", "dit": "DiT"}
SAMPLERS = {
    "ddpm": ["--num_inference_steps", "50"],
    "edm": ["--num_inference_steps", "18", "--sampler", "heun"],
    "flow": ["--num_inference_steps", "50"],
}


def run_steps(framework: str, network: str, data: Path, folder: Path, steps: list[Any]) -> None:
    """Pretrain, generate and probe one pair, as far as that is not done."""
    config = "digits" if (framework, network) == ("ddpm", "unet") else f"digits_{framework}_{network}"
    if not (folder / "checkpoint" / "train_results.json").exists():
        options = ["--config", config, "--dataset_name", data, "--resume_from_checkpoint", "latest", *steps]
        show("pretrain", *options, "--output_dir", folder / "checkpoint")
    model = ["--model_name_or_path", folder / "checkpoint"]
    if not (folder / "samples" / "grid.png").exists():
        options = ["--num_images", NUM_SAMPLES, "--batch_size", NUM_SAMPLES, *SAMPLERS[framework]]
        show("generate", *model, *options, "--output_dir", folder / "samples")
    if not (folder / "classifier" / "eval_results.json").exists():
        options = ["--dataset_name", data, "--layers", "decoder", "--sigmas", 0.05, 0.1, 0.2, "--few_labels", 10]
        show("probe", *model, *options, "--num_noise_samples", 4, "--output_dir", folder / "classifier")


def figures(folder: Path, judge: Judge) -> dict[str, Any]:
    """Return what was measured of one pair."""
    training = json.loads((folder / "checkpoint" / "train_results.json").read_text())
    probe = ProbeReport.read(folder / "classifier")
    return {
        "parameters": training["parameters"],
        "steps": training["steps"],
        "seconds": training["seconds"],
        "loss": training["loss_last_100_batches"],
        "recognised": judge.recognised([Image.open(path) for path in sample_files(folder)]),
        "layer": probe.best.layer,
        "sigma": probe.best.sigma,
        "test_accuracy": next(iter(probe.test_accuracies.values())),
        "few_label_test_accuracies": probe.few_label_test_accuracies["10"],
    }


def sample_files(folder: Path) -> list[Path]:
    """Return the generated images."""
    return [folder / "samples" / f"{i:05d}.png" for i in range(NUM_SAMPLES)]


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return the figures as a Markdown table."""
    lines = [
        "| framework, network | parameters | steps, seconds | loss | samples recognised, of 100 | layer, sigma "
        "| all labels | 10 labels a class |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, r in results.items():
        framework, network = name.split("_")
        cells = [
            f"{FRAMEWORKS[framework]}, {NETWORKS[network]}",
            f"{r['parameters']:,}",
            f"{r['steps']}, {r['seconds']:.0f}",
            f"{r['loss']:.3f}",
            f"{r['recognised']}",
            f"`{r['layer']}`, {r['sigma']:.2g}",
            f"{100 * r['test_accuracy']:.2f}",
            spread(r["few_label_test_accuracies"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def save_picture(path: Path, folder: Path, names: list[str]) -> None:
    """Write 32 samples of every pair: a row a framework, a column a network."""
    tiles = [image_grid([Image.open(f) for f in sample_files(folder / n)[:32]], columns=8, min_side=40) for n in names]
    width, height = tiles[0].width + 16, tiles[0].height + 28
    picture = Image.new("RGB", (width * len(NETWORKS), height * len(FRAMEWORKS)), "white")
    for i, (name, tile) in enumerate(zip(names, tiles, strict=True)):
        framework, network = name.split("_")
        x, y = i % len(NETWORKS) * width, i // len(NETWORKS) * height
        ImageDraw.Draw(picture).text((x + 2, y + 8), f"{FRAMEWORKS[framework]}, {NETWORKS[network]}", "black")
        picture.paste(tile, (x, y + 24))
    picture.save(path)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output_dir", type=Path, default=Path("runs/digits_frameworks"))
    parser.add_argument("--max_train_steps", type=int, help="Fewer steps than the configurations', to try it out.")
    args = parser.parse_args()
    folder = args.output_dir
    write_digits(folder / "digits", digits())
    steps = ["--max_train_steps", args.max_train_steps] if args.max_train_steps else []
    names = [f"{framework}_{network}" for framework in FRAMEWORKS for network in NETWORKS]
    for name in names:
        run_steps(*name.split("_"), folder / "digits", folder / name, steps)
    judge = Judge(digits())
    results = {name: figures(folder / name, judge) for name in names}
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (folder / "table.md").write_text(table(results), encoding="utf-8")
    save_picture(folder / "samples.png", folder, names)
    print(f"\n{table(results)}\nSamples: {folder / 'samples.png'}")


if __name__ == "__main__":
    main()
