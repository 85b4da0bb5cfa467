"""Work shared by processes: what the first one gets is what one process computes, however it ends."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler

from ddae_hf import DDAEPipeline
from ddae_hf.experiments import encoding, generation, models, sharing
from ddae_hf.experiments.sharing import Team, held_back, this_process

from .conftest import make_unet, make_vae

ROOT = Path(__file__).parent.parent

PROGRAM = """
import json, os, signal, sys
import torch
from accelerate.state import PartialState
from ddae_hf.experiments.sharing import FirstFailed, Team

failed = []

def powers(parts, power, fail=None, kill=None):
    for part in parts:
        if part == fail:
            raise ValueError(f"part {part} cannot be computed")
        if part == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        yield {"power": torch.tensor([part**power]), "by": team.number}

def whole():
    for count in (0, 1, 5, 8):
        yield [[r["power"].item(), r["by"]] for r in team.each("powers", range(count), power=3)]

def fails():
    yield list(team.each("powers", range(9), power=1, fail=4))

def stops():
    for result in team.each("powers", range(100), power=1):  # whoever takes no more ends it
        break
    yield [r["power"].item() for r in team.each("powers", range(3), power=2)]
    results = team.each("powers", range(100), power=1)
    next(results)
    raise KeyboardInterrupt

def killed():
    yield list(team.each("powers", range(9), power=1, kill=7))

for case in sys.argv[1:]:
    team = Team({"powers": powers})
    if team.helps:
        try:
            team.serve()
        except FirstFailed:
            failed.append(case)
        continue
    found = []
    try:
        with team:
            found += globals()[case]()
    except (ValueError, KeyboardInterrupt) as error:
        found.append(repr(error))
    sys.stdout.write(f"{case} {json.dumps(found)}\\n")  # at once: the processes share a pipe
sys.stdout.write(" ".join(["process", str(team.number), "ends", *failed]) + "\\n")
PartialState().destroy_process_group()
"""


def launch(folder, processes, *cases):
    """Run cases on processes, one after the other, and return the finished process."""
    (folder / "program.py").write_text(PROGRAM)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", "program.py", *cases]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=90)


def found_in(done, case):
    (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"{case} ")]
    return json.loads(line.removeprefix(case))


@pytest.mark.parametrize("processes", [2, 3])
def test_the_first_process_gets_what_one_computes_in_order_and_however_it_ends_the_others_go(processes, tmp_path):
    done = launch(tmp_path, processes, "whole", "fails", "stops", "whole")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    first, again = (json.loads(line.removeprefix("whole")) for line in lines if line.startswith("whole"))
    assert first == again
    for count, results in zip((0, 1, 5, 8), first, strict=True):
        assert results == [[part**3, part % processes] for part in range(count)]
    assert "part 4 cannot be computed" in found_in(done, "fails")[-1]
    assert found_in(done, "stops") == [[0, 1, 4], "KeyboardInterrupt()"]
    ends = sorted(line for line in lines if "ends" in line)
    assert ends == ["process 0 ends", *(f"process {number} ends fails stops" for number in range(1, processes))]


def test_where_another_process_is_killed_nobody_waits(tmp_path):
    started = time.monotonic()
    assert launch(tmp_path, 2, "killed").returncode != 0 and time.monotonic() - started < 60


def test_one_process_computes_alone():
    team = Team({"doubles": lambda parts, by: (by * part for part in parts)})
    assert not team.helps
    with team:
        assert list(team.each("doubles", range(4), by=2)) == [0, 2, 4, 6]


def test_two_processes_on_one_gpu_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(sharing, "PartialState", lambda **options: options)
    monkeypatch.setattr(sharing, "_meet", dict)  # the other one is not there
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    with pytest.raises(ValueError, match=r"2 processes were launched on a machine with 1 GPU\(s\)"):
        this_process()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert this_process()["cpu"]
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # on two machines
    assert not this_process()["cpu"]


def test_a_signal_waits_until_processes_are_in_step():
    done = []
    with pytest.raises(KeyboardInterrupt):
        with held_back():
            signal.raise_signal(signal.SIGINT)
            done.append("in step")
        done.append("not reached")
    assert done == ["in step"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("ask", ["a model is opened", "a VAE is opened", "a pipeline is opened"])
def test_a_process_knows_its_gpu_before_anything_goes_there(ask, monkeypatch):
    """Else every network would go to the first GPU."""
    known = []
    for module in (models, encoding, generation):
        monkeypatch.setattr(module, "this_process", lambda: known.append("process") or this_process())
        monkeypatch.setattr(module, "best_device", lambda: known.append("device") or "cpu")
    if ask == "a model is opened":
        models.ready(torch.nn.Linear(1, 1))
    elif ask == "a VAE is opened":
        with encoding.encoding_team(make_vae(), {}, "float32"):
            pass
    else:
        pipeline = DDAEPipeline.for_denoiser(make_unet(), DDIMScheduler())
        generation.open_pipeline(pipeline, generation.GenerationOptions(output_dir="nowhere"))
    assert known[0] == "process"


APART = """
import os, signal, sys, types
from ddae_hf.commands.running import run_command
from ddae_hf.experiments import sharing

sharing._MEET_SECONDS = 3.0

def main():
    sharing.this_process()
    if os.environ["RANK"] == sys.argv[1]:
        os.kill(os.getpid(), signal.SIGKILL)

command = types.SimpleNamespace(__name__="ddae_hf.commands.sweep", KINDS=(), main=main)
run_command(command, [])
"""


def run_apart(ranks, killed):
    """Run a program on processes of a launch of two, without a launcher; return how each of `ranks` ended, and said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    known = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    known |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", APART, str(killed)], cwd=ROOT, text=True, stderr=subprocess.PIPE,
            env={**os.environ, **known, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in ranks
    ]  # fmt: skip
    return [(process, process.communicate(timeout=120)[1]) for process in started]


@pytest.mark.processes
def test_a_process_that_the_other_never_meets_says_so():
    """It was killed before, and nothing says that it does not start slowly; once they have met, they wait for days."""
    ((process, said),) = run_apart([1], killed=0)
    assert process.returncode == 1 and "another process of this launch is gone" in said and "Traceback" not in said


@pytest.mark.processes
@pytest.mark.parametrize("killed", [0, 1])
def test_no_process_ends_as_if_all_were_well_where_the_other_is_killed(killed):
    """Its own share is done, and the other one still writes."""
    ended = run_apart([0, 1], killed)
    assert ended[killed][0].returncode == -signal.SIGKILL
    left, said = ended[1 - killed]
    assert left.returncode == 1 and "another process of this launch is gone" in said
