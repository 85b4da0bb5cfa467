"""What torch's threads cost while they wait: spinning, as by default, against leaving the processor, which `ddae` sets.

    python -m benchmarks.waiting

Trains two small networks on a processor for some steps, in processes of their own: on the machine as it is, and beside
as many busy processes as it has cores. Ways are timed in turn; the table has medians, and the fastest and slowest.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from ddae_hf.commands.parsing import find_config, read_config
from ddae_hf.experiments.arrays import write_json
from ddae_hf.experiments.devices import machine

WAYS = {"spinning (torch's default)": {}, "passive (OMP_WAIT_POLICY=PASSIVE)": {"OMP_WAIT_POLICY": "PASSIVE"}}
NETWORKS = {"digits": (128, 8), "cifar10_cpu": (32, 32)}  # images a step, and their side
STEPS = """
import json, sys, time, torch
from ddae_hf.networks import build_denoiser
described, (images, side), steps = json.loads(sys.argv[1])
network = build_denoiser(described)
optimizer = torch.optim.AdamW(network.parameters())
batch = torch.randn(images, network.config.in_channels, side, side)
for step in range(steps + 2):
    if step == 2:
        started = time.perf_counter()
    network(batch, 5).sample.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
print((time.perf_counter() - started) / steps)
"""


def seconds_a_step(name: str, way: str, steps: int) -> float:
    """Return how long a step of a configuration's network takes in a new process."""
    described = {"_class_name": "UNet2DModel", "sample_size": 32, **read_config(find_config(name))["denoiser"]}
    unset = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    command = [sys.executable, "-c", STEPS, json.dumps([described, NETWORKS[name], steps])]
    done = subprocess.run(command, env={**unset, **WAYS[way]}, check=True, capture_output=True, text=True)
    return float(done.stdout)


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/waiting.json"))
    args = parser.parse_args(argv)
    found: dict[str, list[float]] = {}
    for beside in (0, os.cpu_count() or 1):
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(beside)]
        try:
            for _ in range(args.repeats):
                for name in NETWORKS:
                    for way in WAYS:
                        row = f"| {name} | {beside} busy processes | {way} |"
                        found.setdefault(row, []).append(seconds_a_step(name, way, args.steps))
        finally:
            for process in busy:
                process.kill()
    print("| network | beside it | threads wait | ms a step |\n|---|---|---|---|")
    for row, seconds in found.items():
        low, middle, high = (1000 * f(seconds) for f in (min, statistics.median, max))
        print(f"{row} {middle:.0f} ({low:.0f} to {high:.0f}) |")
    write_json(args.output, {**machine("cpu"), "seconds_a_step": found})


if __name__ == "__main__":
    main()
