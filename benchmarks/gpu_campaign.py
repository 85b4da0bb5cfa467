r"""On a machine with a GPU: do the commands work there, how fast are they, and how good is what minutes train.

    python -m benchmarks.gpu_campaign --stage smoke
    python -m benchmarks.gpu_campaign --stage speed --dataset_name path/to/cifar10
    python -m benchmarks.gpu_campaign --stage train --dataset_name path/to/cifar10 --minutes 8.5

Everything lands in `--output_dir`, `runs/gpu_campaign` by default: `smoke.json`, `speed.json` and `train.json` with the
figures of the tables that are printed, the JSON of every part, checkpoints, and what each part printed, in `logs`. A
stage takes at most `--minutes`: what does not fit is left out and named, and the same command goes on with it.

- `smoke` runs the tests marked `gpu`: first those that have not passed in this folder.
- `speed` measures features, training, sampling, sweeps, layouts and what the host limits. A part whose JSON is there is
  not measured again.
- `train` trains `cifar10_speedrun` from scratch for as long as the minutes allow, probes what came of it on 10,000
  labels, draws samples, and probes it on all labels if there is time. How many steps fit is measured first, and the
  schedules of learning rate and averaging span these. `--train_minutes` spreads one training over several calls.

Needed are a clone and the libraries of `setup.py`, at their lower bounds or newer, and no network. Libraries that the
machine lacks are fetched elsewhere, by the same Python on the same kind of system, and installed from their files:

    python -m pip download --only-binary :all: --dest wheels diffusers==0.40.0 datasets==4.8.0 evaluate==0.4.3 \
        multiprocess dill huggingface_hub==1.33.0 matplotlib psutil pytest
    python -m pip install --no-index --find-links wheels diffusers datasets evaluate matplotlib psutil pytest

`--device cpu --tiny` goes through all of it in minutes on a processor, on small networks, and measures nothing of use.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler

from ddae_hf import DDAEPipeline
from ddae_hf.commands.parsing import find_config, read_config
from ddae_hf.experiments.arrays import read_json, write_json
from ddae_hf.networks import build_denoiser

from . import measure
from .gpu_stage import ROOT, Campaign
from .gpu_training import train

MINUTES = 8.5  # of a stage by default
LAST_SECONDS = 15  # of a stage, for its table
OUTCOME = re.compile(r"^(tests/\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)", re.MULTILINE)
REASON = re.compile(r"^(?:FAILED|ERROR) (tests/\S+::.+?) - (.+)$", re.MULTILINE)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--stage", choices=list(STAGES), required=True)
    add("--minutes", type=float, default=MINUTES, help=f"What the stage may take in all; by default {MINUTES:g}.")
    add("--train_minutes", type=float, help="Minutes of a training, over several calls; by default what one allows.")
    add("--dataset_name", help="CIFAR-10 as a local folder; of speed and train.")
    add("--output_dir", type=Path, default=Path("runs/gpu_campaign"), help="Folder of everything.")
    add("--device", choices=["cpu", "cuda"], default="cuda", help="cpu is for trying it out, with --tiny.")
    add("--tiny", action="store_true", help="Small networks and few images, to try it out.")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU: run this where there is one, or try it out with --device cpu --tiny.")
    if args.stage != "smoke" and args.dataset_name is None:
        parser.error(f"--stage {args.stage} needs --dataset_name: a folder of CIFAR-10, where there is no network.")
    for name in ("minutes", "train_minutes"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            parser.error(f"--{name} is {getattr(args, name):g}: it must be positive.")
    args.output_dir = args.output_dir.absolute()
    return args


# The stage smoke.


def smoke(campaign: Campaign) -> str:
    """Run the tests marked `gpu`, those first that have not passed, and return a table of how they ended."""
    path = campaign.folder / "smoke.json"
    passed = set(read_json(path)["passed"]) if path.exists() else set()
    marked = [p for p in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in p.read_text(encoding="utf-8")]
    files = [str(p.relative_to(ROOT)) for p in marked]
    pytest = ["pytest", "-m", "gpu", "-p", "no:cacheprovider", "--color", "no"]
    chosen = ["-k", "draws"] if campaign.args.tiny else []
    campaign.run("collect", [*pytest, "--collect-only", *files, *chosen], needed=30)
    tests = [line for line in campaign.printed("collect") if line.startswith("tests/") and "::" in line]
    if not tests:
        raise SystemExit(f"No tests were found in the time that there was: {campaign.log('collect')} may say why.")
    ordered = sorted(tests, key=lambda test: test in passed)
    campaign.run("tests", [*pytest, "-vv", "-rfE", *ordered], needed=30)
    log = "\n".join(campaign.printed("tests"))
    found: dict[str, str] = dict(OUTCOME.findall(log))
    reasons = dict(REASON.findall(log))
    failed = {test: reasons.get(test, "see logs/tests.log") for test in tests if found.get(test) in ("FAILED", "ERROR")}
    passed = {test for test in tests if found.get(test, "PASSED" if test in passed else "") == "PASSED"}
    others = [test for test in tests if test not in passed and test not in failed]
    campaign.left_out += [test for test in others if found.get(test) != "SKIPPED"]
    report = {"facts": measure.facts(campaign.args.device), "passed": sorted(passed), "failed": failed}
    write_json(path, {**report, "skipped": [test for test in others if found.get(test) == "SKIPPED"]})
    rows = [["passed, here or before", len(passed)], ["failed", len(failed)], ["skipped or left out", len(others)]]
    named = "".join(f"\n{test}\n    {reason}" for test, reason in failed.items())
    return f"{measure.table(['tests on the device', 'number'], rows)}{named}"


# The stage speed.


@dataclass
class Part:
    """A part of the stage speed: its module with its options, and the rows that its JSON gives."""

    words: list[Any]
    rows: Callable[[dict[str, Any]], list[dict[str, Any]]]
    needed: float  # seconds that it may take on one H100, an estimate


def checkpoint(campaign: Campaign) -> Path:
    """Return the folder of a DDPM checkpoint with random weights, of the paper or a tiny one, written once."""
    folder = campaign.folder / ("checkpoint_tiny" if campaign.args.tiny else "checkpoint")
    if not (folder / "model_index.json").exists():
        config = find_config("digits" if campaign.args.tiny else "cifar10_ddpm_unet")
        torch.manual_seed(0)
        network = build_denoiser(read_config(config)["denoiser"])
        DDAEPipeline.for_denoiser(network, DDPMScheduler()).save_pretrained(folder)
    return folder


def of_features(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of `feature_speed`."""
    return [
        {"what": f"{way}, batches of {r['batch_size']}", "share": r["of_matrix_rate"], **r}
        for network in report["networks"].values()
        for way, r in network["ways"].items()
    ]


def of_training(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of `training_speed`."""
    return [{"what": way, "share": r["share_of_matrix_rate"], **r} for way, r in report["ways"].items()]


def of_sweeps(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of `sweep_speed`: images through all layers at one noise level, noise views counted."""
    summary, (seed,) = report["summary"], report["summary"]["seeds"]
    rates = {way: seed[f"{way}_gflop_per_second"] / summary["gflop_per_image"] for way in ("plain", "ours")}
    limits = {"plain": report["limits"]["matrix_float32"], "ours": report["limits"]["matrix_bfloat16"]}
    return [
        {
            "what": {"plain": "the paper's protocol", "ours": "ddae sweep, with its start and probes"}[way],
            "images_per_second": {"median": rate},
            "ratio": 1.0 if way == "plain" else seed["ratio_levels"],  # the paper reads each image in every epoch
            "share": seed[f"{way}_gflop_per_second"] / limits[way],
        }
        for way, rate in rates.items()
    ]


def of_part(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of `gpu_parts`."""
    return report["rows"]


def parts(campaign: Campaign) -> dict[str, Part]:
    """Return the parts of the stage speed by name, what matters most first."""
    args, network = campaign.args, checkpoint(campaign)
    device = ["--device", args.device, *(["--tiny"] if args.tiny else [])]
    data = ["--dataset_name", args.dataset_name]
    features = ["benchmarks.feature_speed", "--repeats", 1 if args.tiny else 5]
    training = ["benchmarks.training_speed", *data, "--device", args.device, "--curve_images", 0]
    sweep = ["benchmarks.sweep_speed", "--model_name_or_path", network, *data, "--seeds", 0]
    sweep += ["--output_dir", campaign.folder / "sweep"]
    if args.tiny:
        features += ["--checkpoint", network, "--batch_sizes", 8]
        training += ["--config", "digits", "--batch_size", 16, "--steps", 2, "--repeats", 1, "--ways", "bfloat16"]
        sweep += ["--max_train_samples", 100, "--max_test_samples", 50, "--sigmas", 0.1, "--plain_steps", 2]
        sweep += ["--workers", 0]
    else:
        training += ["--width", 128, "--batch_size", 256, "--steps", 20, "--repeats", 4, "--workers", 8]
        training += ["--ways", "bfloat16", "compiled"]
        sweep += ["--max_train_samples", 10_000, "--sigmas", 0.05, 0.14, "--batch_size", 1000, "--workers", 8]
    tried = [] if args.tiny else ["--batch_sizes", 128, 256, 512, 1024, "--num_images", 4096, "--compile"]
    unet = [*features, *(tried and ["--networks", "unet", *tried])]
    dit = [*features, "--networks", "dit", "--batch_sizes", 64, 128, 256, "--num_images", 512]
    own = ["--checkpoint", network, *device]
    found = {
        "features of the U-Net": Part(unet, of_features, 90),
        "training": Part(training, of_training, 150),
        "host": Part(["benchmarks.gpu_parts", "host", *own, *data], of_part, 60),
        "sampling": Part(["benchmarks.gpu_parts", "sampling", *own], of_part, 60),
        "layouts": Part(["benchmarks.gpu_parts", "layouts", *device], of_part, 120),
        "sweep": Part(sweep, of_sweeps, 120),
    }
    return found if args.tiny else {**found, "features of DiT-XL/2": Part(dit, of_features, 120)}


def speed(campaign: Campaign) -> str:
    """Measure the parts that have no JSON yet, and return a table of all that have one."""
    found: dict[str, list[dict[str, Any]]] = {}
    limits: dict[str, float] = {}
    for name, part in parts(campaign).items():
        output = campaign.folder / "speed" / f"{name.replace(' ', '_').replace('/', '-')}.json"
        own = campaign.folder / "sweep" / "results.json" if name == "sweep" else output
        if not own.exists():
            campaign.run(name, [*part.words, *([] if name == "sweep" else ["--output", output])], part.needed)
        if own.exists():
            report = read_json(own)
            rows = part.rows(report)
            found[name] = [{key: r[key] for key in ("what", "images_per_second", "ratio", "share")} for r in rows]
            limits = limits or report.get("limits") or {}
    facts = measure.facts(campaign.args.device)
    write_json(campaign.folder / "speed.json", {"facts": facts, "limits": limits, "parts": found})
    lines = [
        [name, r["what"], f"{r['images_per_second']['median']:,.1f}", f"{r['ratio']:.2f}",
         "" if r["share"] is None else f"{100 * r['share']:.0f} %"]
        for name, rows in found.items()
        for r in rows
    ]  # fmt: skip
    columns = ["part", "way", "images/s", "ratio to the plain way or the first", "of the type's matrix rate"]
    return measure.table(columns, lines) + (f"\n{measure.describe_limits(limits)}" if limits else "")


STAGES: dict[str, Callable[[Campaign], str]] = {"smoke": smoke, "speed": speed, "train": train}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a stage."""
    args = parse_arguments(argv)
    campaign = Campaign(args, time.monotonic() + 60 * args.minutes - LAST_SECONDS)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    said = STAGES[args.stage](campaign)
    print(f"\n{said}")
    hardware = measure.facts(args.device)["hardware"]
    print(f"On {hardware.get('gpu', hardware['cpu'])}. Every figure is in {args.output_dir}.")
    if campaign.left_out:
        print("Left out; the same command goes on with it:")
        print("\n".join(f"- {what}" for what in campaign.left_out))


if __name__ == "__main__":
    main()
