"""The stage `train` of `gpu_campaign`: a training of so many minutes, what its features are worth, and samples.

Every training has a folder of its own in `train`: `plan.json` says how many steps were planned and by what measurement,
`result.json` what came of it. One that was not finished goes on, with the schedules that it began with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ddae_hf.commands.parsing import find_config, read_config
from ddae_hf.experiments.arrays import read_json, write_json
from ddae_hf.experiments.results import PretrainingReport, ProbeReport
from ddae_hf.experiments.run_folder import PROGRESS, saved_checkpoints

from . import measure
from .gpu_stage import Campaign

# What schedules span, as shares of all steps: see "The speedrun" in docs/appendix/performance.md.
WARM_UP, REACH = 0.02, 0.02
QUARTERS = 4  # of a training, at whose ends are checkpoints
# Seconds, estimates: of the training besides its steps (start, compiling, files), and of what follows it.
AROUND, QUICK, SAMPLES, WHOLE = 60, 45, 40, 75
PASSES = 12  # times the seconds of the quick probe that one of all labels takes
TRIED = {  # what is probed: around the paper's best layers and noise level, the sixth and seventh block and 0.05
    "layers": ["up_blocks.0.resnets.2", "up_blocks.1.resnets.1", "up_blocks.1.resnets.2", "up_blocks.2.attentions.0"],
    "sigmas": [0.03, 0.05, 0.08, 0.14],
}


def train(campaign: Campaign) -> str:
    """Train for the minutes that are left, probe and sample, and return a table of all trainings."""
    folder = open_training(campaign)
    if folder is not None:
        go_on(campaign, folder)
        probe_and_sample(campaign, folder)
    results = {path.parent.name: read_json(path) for path in sorted(campaign.folder.glob("train/*/result.json"))}
    write_json(campaign.folder / "train.json", {"trainings": results})
    rows = []
    for name, found in results.items():
        probes = [f"{100 * p['accuracy']:.2f} (`{p['layer']}`, {p['sigma']:g})" for p in found["probes"].values()]
        steps = f"{found['steps']:,} of {found['planned_steps']:,}"
        rows.append([name, f"{found['minutes']:.1f}", steps, f"{found['images']:,}",
                     f"{found['images_per_second']:,.0f}", ", ".join(probes)])  # fmt: skip
    columns = ["training", "minutes", "steps", "images", "images/s", "test accuracy (%): 10,000 labels, all labels"]
    return measure.table(columns, rows)


def config_of(campaign: Campaign) -> str:
    """Return the configuration that is trained."""
    return "digits" if campaign.args.tiny else "cifar10_speedrun"


def reserved(campaign: Campaign) -> float:
    """Return how many seconds of a stage are kept for what follows a training."""
    return 0.0 if campaign.args.tiny else QUICK + SAMPLES + WHOLE


def open_training(campaign: Campaign) -> Path | None:
    """Return the folder of the training to go on with, or of a new one; None where its steps could not be timed."""
    args = campaign.args
    asked = {"config": read_config(find_config(config_of(campaign))), "train_minutes": args.train_minutes}
    begun = sorted(campaign.folder.glob("train/*/plan.json"))
    if begun and not (begun[-1].parent / PretrainingReport.file).exists():
        if read_json(begun[-1])["asked"] == asked:
            return begun[-1].parent
        print(f"{begun[-1].parent} is left as it is: its training was begun with other options.")
    folder = campaign.folder / "train" / f"{len(begun):02d}"
    output = folder / "step_seconds.json"
    words = ["benchmarks.gpu_parts", "steps", "--config", config_of(campaign), "--dataset_name", args.dataset_name]
    words += ["--device", args.device, "--output", output, *(["--tiny"] if args.tiny else [])]
    name = f"train/{folder.name}: step seconds"
    if not campaign.run(name, [*words, *small_images(campaign)], needed=30, reserve=reserved(campaign)):
        return None
    timed = read_json(output)
    seconds = campaign.left() - reserved(campaign) - AROUND
    if args.tiny:
        seconds = 10 * timed["mean"]
    elif args.train_minutes is not None:
        seconds = 60 * args.train_minutes
    steps = max(1, int(seconds / timed["mean"] / QUARTERS)) * QUARTERS
    write_json(folder / "plan.json", {"asked": asked, "steps": steps, "seconds": seconds, "timed": timed})
    return folder


def small_images(campaign: Campaign) -> list[str]:
    """Return the options that make the tiny training begin on small images too."""
    return ["--low_resolution", "4", "--low_resolution_share", "0.5"] if campaign.args.tiny else []


def go_on(campaign: Campaign, folder: Path) -> None:
    """Train to the planned end, or until the time is over: an interrupted training writes a checkpoint."""
    steps = read_json(folder / "plan.json")["steps"]
    words = ["ddae_hf", "pretrain", "--config", config_of(campaign), "--dataset_name", campaign.args.dataset_name]
    words += ["--max_train_steps", steps, "--lr_warmup_steps", max(1, round(WARM_UP * steps))]
    words += ["--ema_decay", 1 - 1 / max(2.0, REACH * steps), "--checkpointing_steps", steps // QUARTERS]
    words += ["--checkpoints_total_limit", QUARTERS, "--sample_steps", 0, "--resume_from_checkpoint", "latest"]
    words += ["--output_dir", folder, *small_images(campaign)]
    campaign.run(f"train/{folder.name}: training", words, needed=AROUND, reserve=reserved(campaign), compiled=True)


def probe_and_sample(campaign: Campaign, folder: Path) -> None:
    """Probe the last weights on 10,000 labels, draw samples, probe on all labels if that fits, and write it down."""
    done = (folder / PretrainingReport.file).exists()
    saved = saved_checkpoints(folder)
    if not done and not saved:
        return
    checkpoint = folder if done else saved[-1]
    outputs = folder / "outputs" / checkpoint.name
    data = ["--dataset_name", campaign.args.dataset_name]
    probe = ["ddae_hf", "sweep", "--model_name_or_path", checkpoint, *data, "--num_noise_seeds", 1]
    if campaign.args.tiny:
        probe += ["--layers", "decoder", "--sigmas", 0.1, "--max_train_samples", 200]
    else:
        probe += ["--layers", *TRIED["layers"], "--sigmas", *TRIED["sigmas"], "--dtype", "bfloat16"]
        probe += ["--batch_size", 1000]
    samples = ["ddae_hf", "generate", "--model_name_or_path", checkpoint, "--num_images", 64, "--batch_size", 64]
    samples += ["--num_inference_steps", 4 if campaign.args.tiny else 50, "--output_dir", outputs / "samples"]
    name = f"train/{folder.name}"
    quick = [*probe, "--max_train_samples", 200 if campaign.args.tiny else 10_000, "--output_dir", outputs / "quick"]
    before = campaign.left()
    campaign.run(f"{name}: probe of 10,000 labels", quick, needed=QUICK / 2)
    seconds = before - campaign.left()
    campaign.run(f"{name}: samples", samples, needed=SAMPLES / 2)
    whole = [*probe, "--max_selection_samples", 10_000, "--num_views", 2, "--random_flip", "--num_noise_samples", 4]
    campaign.run(f"{name}: probe of all labels", [*whole, "--output_dir", outputs / "whole"], needed=PASSES * seconds)
    write_json(folder / "result.json", result(folder, checkpoint, outputs, done))


def result(folder: Path, checkpoint: Path, outputs: Path, done: bool) -> dict[str, Any]:
    """Return what came of a training so far."""
    plan = read_json(folder / "plan.json")
    trained = read_json(checkpoint / (PretrainingReport.file if done else PROGRESS))
    found = {
        "planned_steps": plan["steps"],
        "step_seconds": {name: seconds for name, seconds in plan["timed"].items() if name in ("low", "high", "mean")},
        **{name: trained[name] for name in ("steps", "images")},
        "minutes": trained["seconds"] / 60,
        "images_per_second": trained["images"] / trained["seconds"],
        "facts": {name: plan["timed"]["facts"][name] for name in ("hardware", "versions")},
        "probes": {},
    }
    for name in ("quick", "whole"):
        if (outputs / name / ProbeReport.file).exists():
            report = read_json(outputs / name / ProbeReport.file)
            accuracy = next(iter(report["test_accuracies"].values()))
            found["probes"][name] = {**report["best"], "accuracy": accuracy, "seconds": report["seconds"]}
    return found
