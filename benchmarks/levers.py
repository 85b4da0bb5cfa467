r"""What every lever of speed gives alone: each is taken away or added while all others stay as they are.

    python -m benchmarks.levers --compile

Three jobs: a training step (the paper's U-Net at half its width, batches of 64), features at `up_blocks.1.resnets.2` of
the U-Net at full width (35.7 M), and reading images (decoded from PNG files in memory, and drawing their noise). Random
weights and images: the time depends on neither. The variants of a job run in turn; ratios are to its first.
"""

from __future__ import annotations

import argparse
import copy
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from diffusers.training_utils import EMAModel
from diffusers.utils import logging
from PIL import Image

from ddae_hf import DDAEImageProcessor
from ddae_hf.checkpoints import build_scheduler
from ddae_hf.commands.parsing import CONFIGS, read_config
from ddae_hf.diffusion import Diffusion
from ddae_hf.experiments.arrays import write_json
from ddae_hf.experiments.devices import best_device, fast_layout, keep_freed_memory
from ddae_hf.experiments.draws import indexed_noise
from ddae_hf.experiments.image_set import ImageSet, Pixels
from ddae_hf.hidden_states import collect_hidden_states, pool_hidden_states
from ddae_hf.networks import build_denoiser
from ddae_hf.pretrained_ddae import use_attention

from . import measure

LAYER = "up_blocks.1.resnets.2"
LAYOUTS = {torch.channels_last: "channels-last", torch.contiguous_format: "contiguous"}
IMAGES = 1000  # as many are read
Variants = dict[str, tuple[int, Callable[[], Any]]]  # how many images a call takes, and the call


def paper_unet(width: int) -> Any:
    """Return the paper's U-Net, with random weights, at this width."""
    options = read_config(CONFIGS / "networks" / "unet.yaml")["denoiser"]
    torch.manual_seed(0)
    return build_denoiser({**options, "block_out_channels": [width, *[2 * width] * 3]})


def training_step(
    network: Any,
    device: str,
    batch_size: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    layout: torch.memory_format | None = None,
    attention: str = "sdpa",
    fused: bool = True,
    foreach: bool = True,
    average_every: int = 1,
    compiled: bool = False,
) -> Callable[[], Any]:
    """Return a step as `ddae pretrain` makes it, or changed."""
    layout = fast_layout(device) if layout is None else layout
    network = copy.deepcopy(network).to(device, memory_format=layout).train()
    use_attention(network, attention)
    scheduler = build_scheduler({"_class_name": "DDIMScheduler"})
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=fused, foreach=None if fused else False)
    ema = EMAModel(network.parameters(), foreach=foreach)
    images = torch.rand(batch_size, 3, 32, 32, device=device).to(memory_format=layout) * 2 - 1
    diffusion = Diffusion(torch.compile(network) if compiled else network, scheduler)
    steps = [0]

    def step() -> None:
        with measure.autocast(device, dtype):
            loss = diffusion.loss(images).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps[0] += 1
        if steps[0] % average_every == 0:
            ema.step(network.parameters())

    return step


def other_layout(device: str) -> torch.memory_format:
    """Return the layout that is not the faster one."""
    return torch.contiguous_format if fast_layout(device) == torch.channels_last else torch.channels_last


def training_variants(device: str, compiled: bool, batch_size: int, width: int) -> Variants:
    """Return a training step, and the same with each lever changed."""
    network = paper_unet(width)
    layout = other_layout(device)
    changes: dict[str, dict[str, Any]] = {
        "as ddae pretrain does it, bfloat16": {},
        "float32": {"dtype": torch.float32},
        LAYOUTS[layout]: {"layout": layout},
        "attention in plain steps": {"attention": "eager"},
        "AdamW one weight at a time": {"fused": False},
        "averaging one weight at a time": {"foreach": False},
        "averaging every 10 steps": {"average_every": 10},
    }
    if compiled:
        changes["compiled"] = {"compiled": True}
    return {name: (batch_size, training_step(network, device, batch_size, **c)) for name, c in changes.items()}


def feature_pass(
    network: Any,
    device: str,
    batch_size: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    layout: torch.memory_format | None = None,
    attention: str = "sdpa",
    stop_early: bool = True,
    mixed: bool = False,
    compiled: bool = False,
) -> Callable[[], Any]:
    """Return a pass of pooled features as `DDAEModel` makes it, or changed."""
    own = torch.float32 if mixed else dtype
    layout = fast_layout(device) if layout is None else layout
    network = copy.deepcopy(network).to(device, own, memory_format=layout).eval().requires_grad_(False)
    use_attention(network, attention)
    images = torch.randn(batch_size, 3, 32, 32, device=device).to(own, memory_format=layout)
    timestep = torch.full((batch_size,), 10.0, device=device)

    def features() -> torch.Tensor:
        found = collect_hidden_states(network, images, timestep, [LAYER], stop_early=stop_early)
        return pool_hidden_states(found[LAYER])

    run = torch.compile(features) if compiled else features

    def call() -> None:
        with torch.inference_mode(), measure.autocast(device, dtype if mixed else torch.float32):
            run()

    return call


def feature_variants(device: str, compiled: bool, batch_size: int, width: int) -> Variants:
    """Return a pass of features, and the same with each lever changed."""
    network, layout = paper_unet(width), other_layout(device)
    changes: dict[str, dict[str, Any]] = {
        "bfloat16, stopped early": {},
        "float32": {"dtype": torch.float32},
        f"float32, {LAYOUTS[layout]}": {"dtype": torch.float32, "layout": layout},
        LAYOUTS[layout]: {"layout": layout},
        "the whole forward": {"stop_early": False},
        "autocast in place of bfloat16 weights": {"mixed": True},
        "attention in plain steps": {"attention": "eager"},
    }
    if compiled:
        changes["compiled"] = {"compiled": True}
    found = {name: (batch_size, feature_pass(network, device, batch_size, **c)) for name, c in changes.items()}
    for size in (batch_size // 4, batch_size // 2, batch_size * 2):
        found[f"batches of {size}"] = size, feature_pass(network, device, size)
    return found


def reading_variants() -> Variants:
    """Return ways of getting at images in memory, and the drawing of their noise, on the CPU."""
    rng, rows = np.random.default_rng(0), []
    for _ in range(IMAGES):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, format="PNG")
        rows.append({"bytes": file.getvalue(), "path": None})
    dataset = Dataset.from_dict({"image": rows}, Features({"image": ImageFeature()}))
    processor = DDAEImageProcessor(size={"height": 32, "width": 32}, num_channels=3)
    kept, indices = Pixels(ImageSet(dataset), processor), np.arange(IMAGES)
    kept.read(indices)
    return {
        "decoded once and kept": (IMAGES, lambda: kept.read(indices)),
        "decoded each time": (IMAGES, lambda: processor(dataset[:]["image"], return_tensors="pt")),
        "each image's own noise": (IMAGES, lambda: indexed_noise((3, 32, 32), indices)),
    }


def measured(variants: Variants, repeats: int, device: str) -> dict[str, dict[str, Any]]:
    """Return images a second of every variant, and their ratio to the first's."""
    seconds = measure.in_turn({name: call for name, (_, call) in variants.items()}, repeats, device)
    found = {name: measure.rates(variants[name][0], each) for name, each in seconds.items()}
    first = next(iter(found.values()))["median"]
    return {name: {**rate, "ratio": rate["median"] / first} for name, rate in found.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--compile", action="store_true", help="Also time compiled variants, which takes minutes.")
    add("--batch_size", type=int, default=64)
    add("--width", type=int, default=128, help="Width of the U-Net whose features are read; half of it is trained.")
    add("--repeats", type=int, default=5)
    add("--device", choices=["cpu", "cuda"], default=best_device())
    add("--output", type=Path, default=Path("runs/benchmarks/levers.json"))
    args = parser.parse_args(argv)
    for name, least in {"batch_size": 4, "width": 64, "repeats": 1}.items():
        if getattr(args, name) < least:
            parser.error(f"--{name} is {getattr(args, name)}: it must be at least {least}.")
    if args.width % 64:
        parser.error(f"--width is {args.width}: it must be a multiple of 64, twice the groups of the norms.")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no such device; give cpu.")
    logging.set_verbosity_error()  # a denoiser is cast here as a whole, of which diffusers warns
    if args.device == "cpu":
        keep_freed_memory()  # as the experiments do
    limits = measure.limits(args.device)
    options = {"device": args.device, "compiled": args.compile, "batch_size": args.batch_size}
    jobs = {
        "training step": lambda: training_variants(**options, width=args.width // 2),
        "features": lambda: feature_variants(**options, width=args.width),
        "reading images": reading_variants,
    }
    found = {}
    for job, variants in jobs.items():
        found[job] = measured(variants(), args.repeats, "cpu" if job == "reading images" else args.device)
        rows = [
            [name, f"{r['median']:,.1f} ({r['least']:,.1f} to {r['most']:,.1f})", f"{r['ratio']:.2f}"]
            for name, r in found[job].items()
        ]
        print(f"\n{measure.table([job, 'images/s', 'ratio'], rows)}", flush=True)
    print(measure.describe_limits(limits))
    report = {"options": {**vars(args), "output": str(args.output)}, "facts": measure.facts(args.device)}
    write_json(args.output, {**report, "limits": limits, "images_per_second": found})


if __name__ == "__main__":
    main()
