r"""Ways of adapting a pretrained network to labels: a probe, LoRA on attention, LoRA on convolutions too, all weights.

    python -m benchmarks.finetuning_ways --model_name_or_path ddae_hf/digits_checkpoint --sigma 0.14 \
        --dataset_name runs/digits_checkpoint/digits --few_labels 10 100 400

For each number of labels a class and each seed, which draws the labels: accuracy on all test images, how many numbers
were trained, seconds, and by how much the memory of the process grew at its peak. Each way is a process of its own, and
all take the same steps of the same size, from a new classification head; they are timed one after the other. The probe
is that of `ddae probe`, at the checkpoint's own layer; it computes features of all images, and its seconds are of that,
too.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddae_hf.experiments import Images, finetune, sweep
from ddae_hf.experiments.arrays import write_json
from ddae_hf.experiments.devices import machine
from ddae_hf.experiments.finetuning import FinetuningOptions
from ddae_hf.experiments.models import open_model
from ddae_hf.experiments.sweeping import SweepOptions

# The options of each way of fine-tuning; the probe has none of them.
WAYS: dict[str, dict[str, Any] | None] = {
    "probe": None,
    "LoRA, attention": {"lora_rank": 8},
    "LoRA, attention and convolutions": {"lora_rank": 8, "lora_targets": ["attention", "convolutions"]},
    "all weights": {"layer_decay": 0.75},
}


def memory() -> float:
    """Return the most memory that this process has had so far, in MiB: of the GPU if there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes, on macOS bytes
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def measure_way(way: str, few_labels: int, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of one way with so many labels a class, measured in this process."""
    images = Images.open(args.dataset_name)
    images["train"].take(1)  # the libraries that reading needs are loaded
    before = memory()
    started = time.monotonic()
    options = WAYS[way]
    if options is None:
        with tempfile.TemporaryDirectory() as folder:
            found: Any = sweep(
                args.model_name_or_path, images, layers=["own"], sigmas=[args.sigma], num_noise_seeds=1, seed=seed,
                few_labels=[few_labels], num_draws=1, features_dir=folder,
            )  # fmt: skip
        (accuracy,) = found.few_label_test_accuracies[str(few_labels)]
        trained = sum(value.numel() for value in found.classifier.classifier.parameters())
        seconds = time.monotonic() - started
    else:
        rate = args.lora_learning_rate if "lora_rank" in options else args.learning_rate
        found = finetune(
            args.model_name_or_path, images, few_labels=few_labels, seed=seed, sigma=args.sigma, learning_rate=rate,
            max_train_steps=args.max_train_steps, train_batch_size=args.train_batch_size, **options,
        )  # fmt: skip
        accuracy = found.test_accuracy
        trained = found.num_trained_parameters
        seconds = found.train_seconds
    return {"accuracy": float(accuracy), "trained": trained, "seconds": seconds, "memory": memory() - before}


def measured_apart(way: str, few_labels: int, seed: int, words: list[str]) -> dict[str, Any]:
    """Return the figures of one way, measured in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.finetuning_ways", *words, "--one", way, str(few_labels), str(seed)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(results: dict[int, dict[str, list[dict[str, Any]]]]) -> str:
    """Return the table of all figures; ± is the standard deviation over seeds."""
    lines = [
        "| labels a class | way | test accuracy | trained numbers | seconds | memory, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for few_labels, ways in results.items():
        for way, runs in ways.items():
            each = [100 * run["accuracy"] for run in runs]
            spread = f" ± {np.std(each, ddof=1):.2f}" if len(each) > 1 else ""
            seconds, most = (np.median([run[name] for run in runs]) for name in ("seconds", "memory"))
            accuracy = f"{np.mean(each):.2f}{spread}"
            lines.append(f"| {few_labels} | {way} | {accuracy} | {runs[0]['trained']:,} | {seconds:.0f} | {most:.0f} |")
    return "\n".join(lines) + "\n"


def parsed(words: list[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model_name_or_path", required=True, help="Checkpoint, folder or Hub id.")
    parser.add_argument("--dataset_name", required=True, help="Labelled images: a folder or a Hub id.")
    parser.add_argument("--few_labels", type=int, nargs="+", default=[10, 100], help="Labels a class.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="They draw labels, heads and noise.")
    parser.add_argument("--sigma", type=float, required=True, help="Noise level that all ways read at.")
    parser.add_argument("--max_train_steps", type=int, default=100)
    parser.add_argument("--train_batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="Of all weights.")
    parser.add_argument("--lora_learning_rate", type=float, default=1e-2)
    parser.add_argument("--output", type=Path, help="JSON file of all figures.")
    parser.add_argument("--one", nargs=3, metavar=("WAY", "LABELS", "SEED"), help=argparse.SUPPRESS)
    return parser.parse_args(words)


def check(args: argparse.Namespace) -> None:
    """Raise `ValueError` or `OSError` for what a way would refuse, before the first one."""
    Images.open(args.dataset_name)
    open_model(args.model_name_or_path, sigma=args.sigma)
    rates = {"learning_rate": args.learning_rate, "lora_learning_rate": args.lora_learning_rate}
    counts = {"max_train_steps": args.max_train_steps, "train_batch_size": args.train_batch_size}
    for name, value in (rates | counts).items():
        FinetuningOptions.of(None, {name.removeprefix("lora_"): value})
    for seed in args.seeds:
        SweepOptions(few_labels=args.few_labels, seed=seed)


def main() -> None:
    """Run the benchmark."""
    words = sys.argv[1:]
    args = parsed(words)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if args.one is not None:
        way, few_labels, seed = args.one
        print(json.dumps(measure_way(way, int(few_labels), int(seed), args)))
        return
    try:
        check(args)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error
    results: dict[int, dict[str, list[dict[str, Any]]]] = {}
    for count in args.few_labels:
        results[count] = {way: [measured_apart(way, count, seed, words) for seed in args.seeds] for way in WAYS}
        print(table({count: results[count]}), flush=True)
    if args.output is not None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        write_json(args.output, {"results": results, "options": vars(args) | {"output": None}, **machine(device)})
    print(table(results))


if __name__ == "__main__":
    main()
