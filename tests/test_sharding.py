"""A network that is divided among processes is trained as one that each of them has, and its runs go on as either."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from ddae_hf.experiments.pretraining import PretrainingOptions

from . import commands

ROOT = Path(__file__).parent.parent
UNET = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": [32, 32], "layers_per_block": 1}
UNET |= {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}
DIT = {"_class_name": "DiTTransformer2DModel", "sample_size": 8, "in_channels": 1, "num_layers": 2}
DIT |= {"num_attention_heads": 2, "attention_head_dim": 8}
# Runs one after the other; each process notes how many numbers it keeps.
RUN = """
import json, shutil, sys
from accelerate.state import PartialState
from ddae_hf.experiments import pretraining
from ddae_hf.experiments.sharding import own_parts
from tests import commands

PartialState.destroy_process_group = lambda state: None  # the next command needs it
train = pretraining.Pretraining.train

def counted(run):
    result = train(run)
    loop = run.loop
    moments = [value for kept in loop.optimizer.state.values() for key, value in kept.items() if key != "step"]
    tensors = {"weights": loop.raw().parameters(), "moments": moments, "averages": loop.ema.shadow_params}
    counts = {name: sum(part.numel() for part in own_parts(found)) for name, found in tensors.items()}
    counts["modules"] = sum(part.numel() for part in own_parts(loop.average.parameters()))
    with open(f"{run.options.output_dir}/counts-{PartialState().process_index}.json", "w") as file:
        json.dump(counts, file)
    return result

pretraining.Pretraining.train = counted
for options in json.loads(sys.argv[1]):
    commands.run("pretrain", *options)
"""


def options_of(digits, folder, *more):
    """Six steps of 12 images; a checkpoint and samples after every second."""
    options = ["--dataset_name", digits, "--max_train_samples", 100, "--output_dir", folder, "--seed", 1]
    options += ["--denoiser", json.dumps(UNET), "--total_batch_size", 12, "--max_train_steps", 6, "--random_flip"]
    options += ["--checkpointing_steps", 2, "--sample_steps", 2, "--grid_images", 2, "--num_inference_steps", 2]
    # Adam would follow the sign of gradients that are nothing but rounding.
    return [*options, "--lr_warmup_steps", 1, "--adam_epsilon", 1e-4, "--mixed_precision", "no", *more]


def launch(folder, *runs, processes=2):
    """Run pretraining on so many processes, with each of these options in turn, and return what ran it."""
    (folder / "run.py").write_text(RUN)
    config = ROOT / "examples" / "accelerate_configs" / "two_cpu_processes.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--num_processes", str(processes), str(folder / "run.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = json.dumps([[str(option) for option in options] for options in runs])
    return subprocess.run([*command, words], env=environment, cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def runs(digits, tmp_path_factory):
    """The folder of runs by name: whole ones and sharded ones, and those that go on from either's second step."""
    root = tmp_path_factory.mktemp("runs")

    def run(name, *more):
        return options_of(digits, root / name, *more)

    half = ["--denoiser", json.dumps(DIT), "--class_conditional", "--gradient_checkpointing", "--mixed_precision", "bf16"]
    done = launch(
        root,
        run("whole", "--train_batch_size", 3),
        run("sharded", "--train_batch_size", 3, "--shard"),
        run("resumed", "--shard", "--resume_from_checkpoint", root / "sharded" / "checkpoint-2"),
        run("divided", "--shard", "--resume_from_checkpoint", root / "whole" / "checkpoint-2"),
        run("united", "--resume_from_checkpoint", root / "sharded" / "checkpoint-2"),
        run("whole-bf16", *half),
        run("sharded-bf16", *half, "--shard"),
    )
    assert done.returncode == 0, done.stderr[-9000:]
    done = launch(
        root, run("three", "--shard", "--resume_from_checkpoint", root / "sharded" / "checkpoint-2"), processes=3
    )
    assert done.returncode == 0, done.stderr[-9000:]
    commands.run("pretrain", *run("one", "--resume_from_checkpoint", root / "sharded" / "checkpoint-2"))
    return root


def weights(folder):
    """The averaged and the raw weights of a folder, by name."""
    files = sorted(folder.glob("*/diffusion_pytorch_model.safetensors")) + sorted(folder.glob("raw/*/*.safetensors"))
    assert len(files) == 2
    return {f"{file.parent.parent.name}:{name}": value for file in files for name, value in load_file(file).items()}


def distance(one, two):
    one, two = weights(one), {name.replace(two.name, one.name): value for name, value in weights(two).items()}
    assert one.keys() == two.keys()
    return max((one[name] - two[name]).abs().max().item() for name in one)


@pytest.mark.parametrize("name", ["sharded", "resumed", "divided", "united", "three", "one"])
def test_weights_are_those_of_a_run_that_was_not_sharded(runs, name):
    assert distance(runs / "whole", runs / "whole" / "checkpoint-2") > 1e-3
    assert distance(runs / "whole", runs / name) < 1e-6
    for step in (4, 6):
        assert distance(runs / "whole" / f"checkpoint-{step}", runs / name / f"checkpoint-{step}") < 1e-6


def test_a_folder_has_the_files_of_a_run_that_was_not_sharded(runs):
    def files(name, where):
        return {str(path.relative_to(runs / name)) for path in (runs / name / where).rglob("*") if path.is_file()}

    state = {f"checkpoint-{step}/state" for step in (2, 4, 6)}
    whole = {name for name in files("whole", ".") if not any(name.startswith(each) for each in state)}
    sharded = {name for name in files("sharded", ".") if not any(name.startswith(each) for each in state)}
    assert whole == sharded
    kept = files("whole", "checkpoint-4/state") - files("sharded", "checkpoint-4/state")
    assert kept == {"checkpoint-4/state/optimizer.bin"}
    parts = files("sharded", "checkpoint-4/state") - files("whole", "checkpoint-4/state")
    assert len(parts) == 2 and all(part.startswith("checkpoint-4/state/optimizer/") for part in parts)
    known = json.loads((runs / "sharded" / "checkpoint-4" / "files.json").read_text())
    assert {f"checkpoint-4/{name}" for name in known} == files("sharded", "checkpoint-4") - {"checkpoint-4/files.json"}


def test_samples_are_those_of_a_run_that_was_not_sharded(runs):
    pictures = [np.asarray(Image.open(runs / name / "samples" / "step-0000006.png")) for name in ("whole", "sharded")]
    assert np.abs(pictures[0].astype(int) - pictures[1]).max() <= 1


@pytest.mark.parametrize("name", ["sharded", "divided", "sharded-bf16"])
def test_each_process_keeps_half(runs, name):
    total = sum(value.numel() for key, value in weights(runs / name).items() if key.startswith("raw:"))
    counts = [json.loads((runs / name / f"counts-{process}.json").read_text()) for process in (0, 1)]
    for what, factor in (("weights", 1), ("moments", 2), ("averages", 1), ("modules", 1)):
        kept = [each[what] for each in counts]
        assert sum(kept) == factor * total and min(kept) > 0.45 * sum(kept), what
    assert json.loads((runs / "whole" / "counts-1.json").read_text())["weights"] > 0


def test_in_bfloat16_the_network_learns_the_same(runs):
    for folder in ("raw", "."):
        assert distance(runs / "whole-bf16", runs / "sharded-bf16") < 1e-3
    moved = distance(runs / "sharded-bf16" / "checkpoint-2", runs / "sharded-bf16")
    assert moved > 1e-3
