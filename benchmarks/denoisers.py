"""What reading text-conditioned denoisers costs at their true size: operations, memory and images a second.

    python -m benchmarks.denoisers --name stable-diffusion-2-1 --batch_size 1 --repeats 3

The network has random weights, which cost what trained ones cost, and is read at the layer and timestep of the
literature, in bfloat16, on latents and embeddings that are random too. Operations are counted without computing.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from typing import Any

import torch

from benchmarks.measure import gflop, in_turn, median
from ddae_hf import DDAEConfig, DDAEModel
from ddae_hf.experiments.devices import best_device, machine
from ddae_hf.networks import network_of, skeleton

_LEVELS = ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"]
_STABLE_DIFFUSION: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": _LEVELS,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "sample_size": 64,
}
_SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
# Networks with the configurations that their repositories on the Hub have, and the length of their texts.
DENOISERS: dict[str, tuple[dict[str, Any], int]] = {
    "stable-diffusion-1-5": (_STABLE_DIFFUSION, 77),
    "stable-diffusion-2-1": (
        _STABLE_DIFFUSION
        | {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
        | {"sample_size": 96},
        77,
    ),
    "stable-diffusion-xl": (
        {
            "_class_name": "UNet2DConditionModel",
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            "sample_size": 128,
        },
        77,
    ),
    "pixart-alpha-512": (
        {
            "_class_name": "PixArtTransformer2DModel",
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "num_layers": 28,
            "cross_attention_dim": 1152,
            "caption_channels": 4096,
            "sample_size": 64,
        },
        120,
    ),
}
# Where each is read: Stable Diffusion as for correspondences, the transformer in its middle.
LAYERS = {"pixart-alpha-512": "transformer_blocks.13"}


def make_model(name: str) -> DDAEModel:
    """Return a network with random weights in bfloat16, which is told a text that is stored with it."""
    denoiser, length = DENOISERS[name]
    config = skeleton(denoiser).config
    network = network_of(denoiser)
    parts = network.text_parts(config) | {k: (len(v),) for k, v in network.size_parts(config, 1, 1).items()}
    described = DDAEConfig(
        denoiser=denoiser,
        scheduler={"_class_name": "DDPMScheduler", **_SCALED},
        condition_shapes={part: [n or length for n in shape] for part, shape in parts.items()},
        layer=LAYERS.get(name, "up_blocks.1"),
        timestep=261,
    )
    return DDAEModel._from_config(described, dtype=torch.bfloat16).eval()


@torch.inference_mode()
def measure(name: str, batch_size: int, repeats: int) -> dict[str, Any]:
    """Return the figures of one network: see the module."""
    started = time.perf_counter()
    model = make_model(name).to(best_device())
    seconds = time.perf_counter() - started
    latents = torch.randn(batch_size, *model.config.sample_shape, device=model.device)
    layer = str(model.config.layer)
    last = model.layer_names()[-1]
    operations = {}
    with torch.device("meta"):
        empty = torch.empty(1, *model.config.sample_shape)
        shadow = DDAEModel(model.config).eval()
    for read in (layer, last):
        operations[read] = gflop(
            lambda read=read: shadow.read_layers(empty, [read], timestep=torch.zeros((), device="meta"))
        )
    timed = in_turn({layer: lambda: model.read_layers(latents, [layer])}, repeats, model.device.type)[layer]
    return {
        "name": name,
        "parameters": sum(p.numel() for p in model.denoiser.parameters()),
        "layer": layer,
        "timestep": 261,
        "latents": list(latents.shape),
        "gflop": {read: round(value, 1) for read, value in operations.items()},
        "seconds_to_make": round(seconds, 1),
        "seconds": [round(s, 2) for s in timed],
        "images_per_second": round(batch_size / median(timed), 3),
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "machine": machine(model.device.type),
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure one network, and print its figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", choices=list(DENOISERS), required=True, help="The network.")
    parser.add_argument("--batch_size", type=int, default=1, help="Latents that are read at once.")
    parser.add_argument("--repeats", type=int, default=3, help="Rounds, after one that is not counted.")
    options = parser.parse_args(arguments)
    print(json.dumps(measure(options.name, options.batch_size, options.repeats), indent=1))


if __name__ == "__main__":
    main()
