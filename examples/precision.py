"""In which type and layout a network computes, which decides how fast it is: the scripts' options and choices."""

from __future__ import annotations

import argparse
from typing import Any

import torch

HELP = (
    "Type that the network computes in; by default its checkpoint's. bfloat16 is two to three times as fast as float32 "
    "on GPUs and on processors with bfloat16 arithmetic (AVX512-BF16, AMX), and slower on others."
)


def add_dtype_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--dtype`, for a network that is not trained."""
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help=HELP)


def chosen_dtype(args: argparse.Namespace) -> dict[str, Any]:
    """Return `dtype` for `from_pretrained`, or nothing where it is not chosen."""
    return {} if args.dtype is None else {"dtype": getattr(torch, args.dtype)}


def fast_layout(device: str | torch.device) -> torch.memory_format:
    """Return the layout of images and weights that networks are fastest in.

    On processors oneDNN's convolutions take either, and a group norm is slower channels-last, its gradient several
    times (torch 2.13).
    """
    return torch.channels_last if torch.device(device).type == "cuda" else torch.contiguous_format


def has_bfloat16(device: torch.device) -> bool:
    """Return whether bfloat16 is computed by the hardware itself."""
    if device.type == "cpu":
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.cuda.is_bf16_supported(including_emulation=False)
