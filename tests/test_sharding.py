"""A network that is divided among processes is trained as one that each of them has, and its runs go on as either."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from accelerate.utils import DynamoBackend
from PIL import Image
from safetensors.torch import load_file

from ddae_hf.experiments.finetuning import finetune
from ddae_hf.experiments.pretraining import PretrainingOptions, pretrain
from ddae_hf.experiments.run_folder import read_options
from ddae_hf.experiments.sharding import check_sharding, load_moments
from ddae_hf.experiments.sharing import this_process
from ddae_hf.experiments.vae_training import VAEOptions

from . import commands

pytestmark = pytest.mark.processes

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
    """Four steps of 12 images; a checkpoint after every second, and samples at the end."""
    options = ["--dataset_name", digits, "--max_train_samples", 100, "--output_dir", folder, "--seed", 1]
    options += ["--denoiser", json.dumps(UNET), "--total_batch_size", 12, "--max_train_steps", 4, "--random_flip"]
    options += ["--checkpointing_steps", 2, "--sample_steps", 4, "--grid_images", 2, "--num_inference_steps", 2]
    options += ["--lr_warmup_steps", 1, "--learning_rate", 1e-3, "--mixed_precision", "no"]
    return [*options, "--adam_epsilon", 1e-4, *more]  # Adam would follow the sign of gradients that are only rounding


def launch(folder, *runs, processes=2, config="two_cpu_processes", launcher=()):
    """Run pretraining on so many processes, with each of these options in turn, and return what ran it."""
    (folder / "run.py").write_text(RUN)
    config = ROOT / "examples" / "accelerate_configs" / f"{config}.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), *launcher]
    command += ["--num_processes", str(processes), "--mixed_precision", "no", str(folder / "run.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = json.dumps([[str(option) for option in options] for options in runs])
    return subprocess.run([*command, words], env=environment, cwd=folder, capture_output=True, text=True, timeout=500)


@pytest.fixture(scope="module")
def runs(digits, tmp_path_factory):
    """The folder of runs by name: whole ones and sharded ones, and those that go on from either's second step."""
    root = tmp_path_factory.mktemp("runs")

    def run(name, *more):
        return options_of(digits, root / name, *more)

    def resumed(name, of, *more):
        return run(name, "--sample_steps", 0, "--resume_from_checkpoint", root / of / "checkpoint-2", *more)

    sharded = run("sharded", "--train_batch_size", 3, "--shard")
    short = ["--sample_steps", 0, "--checkpointing_steps", 4]
    dit = [*short, "--denoiser", json.dumps(DIT), "--class_conditional", "--gradient_checkpointing"]
    dit += ["--max_train_steps", 2]
    half = [*short, "--mixed_precision", "bf16"]
    done = launch(
        root,
        run("whole", "--train_batch_size", 3),
        sharded,
        [*sharded, "--resume_from_checkpoint", "latest"],
        resumed("resumed", "sharded", "--train_batch_size", 3, "--shard"),
        resumed("divided", "whole", "--shard"),
        resumed("united", "sharded"),
        run("whole-dit", *dit),
        run("sharded-dit", *dit, "--shard"),
        run("whole-bf16", *half),
        run("sharded-bf16", *half, "--shard"),
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (root / "printed.txt").write_text(done.stdout + done.stderr)
    done = launch(root, resumed("three", "sharded", "--shard"), processes=3)
    assert done.returncode == 0, done.stderr[-4000:]
    done = launch(root, run("fsdp", "--train_batch_size", 3), config="fsdp2")
    assert done.returncode == 0, done.stderr[-4000:]
    commands.run("pretrain", *resumed("one", "sharded"))
    return root


def weights(folder):
    """The averaged and the raw weights of a folder, by name."""
    found = {}
    for kind, place in (("averaged", folder), ("raw", folder / "raw")):
        [file] = place.glob("*/diffusion_pytorch_model.safetensors")
        found |= {f"{kind} {name}": value for name, value in load_file(file).items()}
    return found


def files_of(folder):
    """The files of a folder that runs write themselves, by their paths inside of it."""
    paths = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    return {path.as_posix() for path in paths if not path.name.startswith("counts-")}


def distance(one, two):
    """The largest difference of two folders' weights."""
    ours, theirs = weights(one), weights(two)
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


@pytest.mark.parametrize("name", ["sharded", "resumed", "divided", "united", "three", "one"])
def test_weights_are_those_of_a_run_that_was_not_sharded(runs, name):
    assert distance(runs / "whole", runs / "whole" / "checkpoint-2") > 1e-3
    for place in (".", "checkpoint-4"):
        assert distance(runs / "whole" / place, runs / name / place) < 1e-6


def test_a_run_that_is_resumed_is_the_uninterrupted_one_to_the_bit(runs):
    assert distance(runs / "sharded", runs / "resumed") == 0


def test_a_run_of_accelerates_fsdp_configuration_is_the_sharded_one_to_the_bit(runs):
    sharded, found = (runs / name for name in ("sharded", "fsdp"))
    assert distance(sharded, found) == 0
    assert files_of(sharded) == files_of(found)
    ours, theirs = (read_options(folder) for folder in (sharded, found))
    assert theirs == ours | {"output_dir": str(found), "resume_from_checkpoint": None} and theirs["shard"]


def test_a_dit_with_gradient_checkpointing_has_the_weights_of_one_that_was_not_sharded(runs):
    assert distance(runs / "whole-dit", runs / "sharded-dit") < 1e-6


def test_in_bfloat16_the_weights_are_near_those_of_a_run_that_was_not_sharded(runs):
    whole, sharded, exact, before = (
        torch.cat([value.flatten() for value in weights(runs / name).values()])
        for name in ("whole-bf16", "sharded-bf16", "sharded", "sharded/checkpoint-2")
    )
    assert (sharded - exact).abs().max() > 1e-5  # it was computed in bfloat16
    assert (sharded - whole).abs().mean() < 0.05 * (exact - before).abs().mean()


def test_a_folder_has_the_files_of_a_run_that_was_not_sharded(runs):
    whole, sharded = files_of(runs / "whole"), files_of(runs / "sharded")
    assert whole - sharded == {f"checkpoint-{step}/state/optimizer.bin" for step in (2, 4)}
    parts = sharded - whole
    folders = {f"checkpoint-{step}/state/optimizer" for step in (2, 4)}
    assert len(parts) == 4 and {Path(part).parent.as_posix() for part in parts} == folders
    known = json.loads((runs / "sharded" / "checkpoint-4" / "files.json").read_text())
    written = {name for name in sharded if name.startswith("checkpoint-4/")}
    assert {f"checkpoint-4/{name}" for name in known} == written - {"checkpoint-4/files.json"}


def test_samples_are_those_of_a_run_that_was_not_sharded(runs):
    one, two = (np.asarray(Image.open(runs / name / "samples" / "step-0000004.png")) for name in ("whole", "sharded"))
    assert one.std() > 10 and np.abs(one.astype(int) - two).max() <= 1


@pytest.mark.parametrize("name", ["sharded", "divided", "fsdp", "sharded-dit", "sharded-bf16"])
def test_each_process_keeps_half(runs, name):
    total = sum(value.numel() for key, value in weights(runs / name).items() if key.startswith("raw "))
    counts = [json.loads((runs / name / f"counts-{process}.json").read_text()) for process in (0, 1)]
    for what, copies in (("weights", 1), ("moments", 2), ("averages", 1), ("modules", 1)):
        kept = [each[what] for each in counts]
        assert sum(kept) == copies * total and min(kept) > 0.45 * sum(kept), what


def test_a_run_that_is_complete_says_so(runs):
    assert (runs / "printed.txt").read_text().count("is complete, after 4 steps") == 1


def test_a_part_that_is_damaged_or_of_another_network_is_refused(runs, tmp_path):
    state = runs / "sharded" / "checkpoint-4" / "state"
    network = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"^optimizer: Missing key .* bias\.exp_avg"):
        load_moments(state, network, torch.optim.AdamW(network.parameters()))
    checkpoint = tmp_path / "checkpoint-4"
    shutil.copytree(state.parent, checkpoint)
    part = sorted((checkpoint / "state" / "optimizer").iterdir())[1]
    part.write_bytes(part.read_bytes()[:-4])
    with pytest.raises(ValueError, match=f"state/optimizer/{part.name} is not what was written"):
        PretrainingOptions(resume_from_checkpoint=str(checkpoint)).checkpoint()
    part.unlink()
    with pytest.raises(ValueError, match=f"it has no state/optimizer/{part.name}"):
        PretrainingOptions(resume_from_checkpoint=str(checkpoint)).checkpoint()


def test_what_cannot_be_sharded_is_refused(digits):
    with pytest.raises(ValueError, match="shard divides a network among processes, and there is one"):
        pretrain(str(digits), shard=True, max_train_steps=1)

    def launched(precision, backend):
        state = SimpleNamespace(dynamo_plugin=SimpleNamespace(backend=backend))
        return SimpleNamespace(num_processes=2, mixed_precision=precision, state=state)

    check_sharding(launched("bf16", DynamoBackend.NO))
    with pytest.raises(ValueError, match="mixed_precision is fp16, which shard does not go with: give bf16 or no"):
        check_sharding(launched("fp16", DynamoBackend.NO))
    with pytest.raises(ValueError, match="--dynamo_backend no"):
        check_sharding(launched("no", DynamoBackend.INDUCTOR))


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("FSDP_VERSION", None, "has fsdp_version: 1. For `ddae pretrain` it must be 2"),
        ("FSDP_RESHARD_AFTER_FORWARD", "false", "fsdp_reshard_after_forward: false.* it must be true"),
        ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params: true.* it must be false"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "fsdp_activation_checkpointing: true.* --gradient_checkpointing"),
        ("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT", "FULL_STATE_DICT.* it must be SHARDED_STATE_DICT"),
        ("FSDP_AUTO_WRAP_POLICY", "SIZE_BASED_WRAP", "SIZE_BASED_WRAP.* it must be TRANSFORMER_BASED_WRAP"),
        ("FSDP_TRANSFORMER_CLS_TO_WRAP", "ResnetBlock2D", "fsdp_transformer_cls_to_wrap: ResnetBlock2D.* leave it out"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "has use_parallelism_config: true"),
    ],
)
def test_fsdp_of_another_kind_is_refused_before_any_work(told_fsdp2, variable, value, message):
    PretrainingOptions()
    told_fsdp2.delenv(variable, raising=False)
    if value is not None:
        told_fsdp2.setenv(variable, value)
    with pytest.raises(ValueError, match=message):
        PretrainingOptions()


def test_fsdp_is_taken_over_by_pretraining_and_refused_elsewhere(told_fsdp2, digits):
    with pytest.raises(ValueError, match="there is one: .* leave shard, and accelerate's FSDP, out"):
        pretrain(str(digits), max_train_steps=1)
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"  # what comes after is refused in its turn
    for refused in (VAEOptions, this_process, lambda: finetune("nowhere", str(digits))):
        with pytest.raises(ValueError, match="FSDP .*, which only `ddae pretrain` takes"):
            refused()
    for command in ("sweep", "generate"):
        with pytest.raises(SystemExit, match="FSDP .*, which only `ddae pretrain` takes"):
            commands.run(command, "--model_name_or_path", "nowhere")


@pytest.fixture
def told_fsdp2(monkeypatch):
    """The environment that `accelerate launch` makes of the configuration in the examples."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    config = yaml.safe_load((ROOT / "examples" / "accelerate_configs" / "fsdp2.yaml").read_text())
    for name, value in config["fsdp_config"].items():
        monkeypatch.setenv(name.upper(), str(value).lower() if isinstance(value, bool) else str(value))
    return monkeypatch
