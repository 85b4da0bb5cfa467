"""The sweep's probes against the paper's, on one grid: seconds a noise level, and accuracies on the same test images.

    python benchmarks/probe_protocols.py --model_name_or_path runs/cifar10_cpu --dataset_name uoft-cs/cifar10 \
        --max_train_samples 20000 --paper_sigmas 0.02 --output_dir runs/probe_protocols

Logistic regression reads every image once a noise level; the paper's protocol trains linear layers for 15 epochs of
fresh noise, flips and crops. Both probe all layers of the decoder, choose on the same held-out images, and are tested
once. `--paper_sigmas` runs the paper's at some of the levels only, where it takes hours. Options that are not named
here go to `examples/sweep.py`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

SWEEP = Path(__file__).parent.parent / "examples" / "sweep.py"


def run(folder: Path, options: list[str]) -> dict[str, Any]:
    """Run a sweep, or go on with it, and return its report, its test predictions and the seconds of its levels."""
    subprocess.run([sys.executable, str(SWEEP), "--output_dir", str(folder), *options], check=True)
    report = json.loads((folder / "eval_results.json").read_text(encoding="utf-8"))
    levels = [json.loads(path.read_text(encoding="utf-8")) for path in (folder / "levels").glob("*.json")]
    seconds = [level["seconds"] for level in levels]
    return report | {"predicted": np.load(folder / "test_predictions.npy"), "level_seconds": seconds}


def paired(ours: dict[str, Any], theirs: dict[str, Any], labels: np.ndarray) -> tuple[float, float]:
    """Return the gain in accuracy on the same images, in points, and the half-width of its 95 % interval."""
    gain = (ours["predicted"] == labels).astype(float) - (theirs["predicted"] == labels)
    return 100 * gain.mean(), 100 * 1.96 * gain.std(ddof=1) / len(gain) ** 0.5


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output_dir", type=Path, default=Path("runs/probe_protocols"))
    parser.add_argument("--paper_sigmas", nargs="+", help="Noise levels of the paper's protocol; by default all.")
    args, options = parser.parse_known_args()
    common = [*options, "--num_noise_seeds", "1"]
    ours = run(args.output_dir / "logistic_regression", common)
    some = ["--sigmas", *args.paper_sigmas] if args.paper_sigmas else []
    theirs = run(args.output_dir / "paper", [*common, *some, "--protocol", "paper"])
    labels = np.load(args.output_dir / "logistic_regression" / "test_labels.npy")
    seconds = [np.array(report["level_seconds"]) for report in (ours, theirs)]
    print("| protocol | levels | seconds a level: mean, least, most | best pair | test accuracy |\n" + "|---" * 5 + "|")
    for name, report, times in zip(("logistic regression", "the paper's"), (ours, theirs), seconds, strict=True):
        best, accuracy = report["best"], next(iter(report["test_accuracies"].values()))
        figures = f"{times.mean():.1f}, {times.min():.1f}, {times.max():.1f}"
        where = f"{best['layer']}, {best['sigma']:g}"
        print(f"| {name} | {len(times)} | {figures} | {where} | {100 * accuracy:.2f} |")
    gain, half = paired(ours, theirs, labels)
    print(f"\nSeconds a level, the paper's over logistic regression's: {seconds[1].mean() / seconds[0].mean():.1f}")
    print(
        f"Gain of logistic regression on the same {len(labels):,} test images: {gain:+.2f} ± {half:.2f} points (95 %)"
    )


if __name__ == "__main__":
    main()
