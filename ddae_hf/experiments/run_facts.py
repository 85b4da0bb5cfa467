"""What reports say of a run beside its figures: the machine, the versions, the model it began with."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ("ddae_hf", "torch", "diffusers", "transformers", "accelerate", "datasets", "huggingface_hub")


def machine(device: str, processes: int = 1, libraries: Sequence[str] = ()) -> dict[str, Any]:
    """Return the hardware that computed, on `cuda` or the `cpu`, and the versions of `LIBRARIES` and of others."""
    hardware = {"cpu": processor(), "cores": os.cpu_count()}
    if device == "cuda":
        hardware = {"gpu": torch.cuda.get_device_name(), **hardware}
    versions = {"python": platform.python_version()}
    for name in (*LIBRARIES, *libraries):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # used from its folder, not installed
            versions[name] = importlib.metadata.version(name)
    return {"hardware": hardware, "processes": processes, "threads": torch.get_num_threads(), "versions": versions}


def processor() -> str:
    """Return the processor's name, where Linux tells it, or its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def base_model(checkpoint: Any) -> dict[str, Any]:
    """Return the Hub repository that a run began with, as `base_model`; nothing of a folder, an object, or of None."""
    return {"base_model": checkpoint} if isinstance(checkpoint, str) and not os.path.exists(checkpoint) else {}
