"""The sweep's probes against those trained online, on one grid: seconds a noise level, accuracies on the same images.

    python benchmarks/probe_protocols.py --model_name_or_path runs/cifar10_cpu --dataset_name uoft-cs/cifar10 \
        --max_train_samples 20000 --rival_sigmas 0.02 --output_dir runs/probe_protocols

Logistic regression reads every image once a noise level; its rivals, the paper's linear layers and the same behind a
batch norm, train for 15 epochs of fresh noise, flips and crops. All probe every layer of the decoder, choose on the
same held-out images, and are tested once. `--rival_sigmas` runs the rivals at some of the levels only, as they take
hours on a CPU. Options that are not named here go to `examples/sweep.py`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

RIVALS = ["paper", "batch_norm"]
SWEEP = Path(__file__).parent.parent / "examples" / "sweep.py"
sys.path.insert(0, str(SWEEP.parent))

import sweep  # noqa: E402


def run(folder: Path, options: list[str]) -> dict[str, Any]:
    """Run a sweep, or go on with it, and return its report, its test predictions and the seconds of its levels."""
    subprocess.run([sys.executable, str(SWEEP), "--output_dir", str(folder), *options], check=True)
    report = json.loads((folder / "eval_results.json").read_text(encoding="utf-8"))
    paths = [folder / "levels" / f"sigma-{sigma}.json" for sigma in report["options"]["sigmas"]]
    seconds = [json.loads(path.read_text(encoding="utf-8"))["seconds"] for path in paths]
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
    parser.add_argument("--rivals", nargs="+", choices=RIVALS, default=RIVALS, help="Protocols to compare with.")
    parser.add_argument("--rival_sigmas", nargs="+", help="Noise levels of the rivals; by default all.")
    args, options = parser.parse_known_args()
    common = [*options, "--num_noise_seeds", "1"]
    some = ["--sigmas", *args.rival_sigmas] if args.rival_sigmas else []
    for rival in args.rivals:  # refuse before any long work what they do not take
        sweep.parse_arguments([*common, *some, "--protocol", rival])
    reports = {"logistic_regression": run(args.output_dir / "logistic_regression", common)}
    for rival in args.rivals:
        reports[rival] = run(args.output_dir / rival, [*common, *some, "--protocol", rival])
    labels = np.load(args.output_dir / "logistic_regression" / "test_labels.npy")
    ours = reports["logistic_regression"]
    print(f"Gain of logistic regression on the same {len(labels):,} test images, in points with a 95 % interval:\n")
    print("| protocol | levels | seconds a level: mean, least, most | ratio | best pair | test accuracy | gain |")
    print("|---" * 7 + "|")
    for name, report in reports.items():
        times, best = np.array(report["level_seconds"]), report["best"]
        figures = f"{times.mean():.1f}, {times.min():.1f}, {times.max():.1f}"
        ratio = times.mean() / np.mean(ours["level_seconds"])
        accuracy = 100 * next(iter(report["test_accuracies"].values()))
        gain, half = paired(ours, report, labels)
        line = (
            f"| {name} | {len(times)} | {figures} | {ratio:.1f} | {best['layer']}, {best['sigma']:g} | {accuracy:.2f} |"
        )
        print(line + (" |" if report is ours else f" {gain:+.2f} ± {half:.2f} |"))


if __name__ == "__main__":
    main()
