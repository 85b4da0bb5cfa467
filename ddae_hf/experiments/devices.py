"""What a network computes on, which decides its speed: device, type, layout, memory and libraries."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import logging
import os
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import DynamoBackend

logger = logging.getLogger(__name__)

T = TypeVar("T", bound=torch.nn.Module)
LIBRARIES = ("ddae_hf", "torch", "diffusers", "transformers", "accelerate", "datasets", "huggingface_hub")
GRAPHS = 64  # that a compiled training may have of one class of blocks, which differ in their channels; torch has 8
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
HELP = (
    "Type that the network computes in; by default its checkpoint's. bfloat16 is two to three times as fast as float32 "
    "on GPUs and on processors with bfloat16 arithmetic (AVX512-BF16, AMX), and slower on others."
)
PRECISION = (
    "Type of most operations: by default what `accelerate launch` says, else what a resumed run had, else bf16 on GPUs "
    "with bfloat16 arithmetic and no (float32) elsewhere."
)


def best_device() -> str:
    """Return the device that features are computed on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def fast_layout(device: str | torch.device) -> torch.memory_format:
    """Return the layout that is fastest: on processors a group norm is slower channels-last (torch 2.13)."""
    return torch.channels_last if torch.device(device).type == "cuda" else torch.contiguous_format


def keep_freed_memory() -> None:
    """Let glibc keep the memory that tensors free for the next ones, however large, until the process ends.

    By default the kernel clears every page of tensors above 32 MiB, which takes up to a third of a forward pass of
    large batches (docs/appendix/performance.md). Settings of `MALLOC_...` or `GLIBC_TUNABLES` in the environment stay.
    """
    chosen = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if platform.libc_ver()[0] == "glibc" and not chosen:
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def compiling_by_blocks(accelerator: Any) -> contextlib.AbstractContextManager[Any]:
    """Let accelerate, where it compiles, compile block by block, every block, and each kind once for all sizes.

    As a whole, torch 2.13 compiles a U-Net in minutes, and on a processor it has computed wrong gradients: of 154 of
    184 parameters of the network of `cifar10_minutes`, on images of 16 pixels. The numbers of images and the sizes of
    images are always left open, whatever `ACCELERATE_DYNAMO_USE_DYNAMIC` says, which `accelerate launch` sets itself.
    """
    plugin = accelerator.state.dynamo_plugin
    plugin.use_regional_compilation = True
    plugin.dynamic = True
    return contextlib.nullcontext() if plugin.backend == DynamoBackend.NO else _sizes_left_open()


@contextlib.contextmanager
def _sizes_left_open() -> Iterator[None]:
    """Let what is compiled inside serve every size of images, and up to `GRAPHS` kinds of a class of blocks.

    In torch 2.13 two parts of inductor hold the size of the image fixed where a convolution is trained, also where
    shapes are dynamic: the layout that it chooses on processors, and its own lowering of a convolution's gradient,
    which asks for strides before it calls the operator. Both are left out, and afterwards they are as before. By
    default torch also takes two sizes that are equal in the first batch, such as 16 images of 16 pixels, for one.
    """
    from torch._inductor import config, lowering  # takes a second

    gradient = torch.ops.aten.convolution_backward.default
    lowered = lowering.lowerings[gradient]
    lowering.lowerings[gradient] = lowering.fallback_handler(gradient, add_to_fallback_set=False)
    try:
        with (
            torch._dynamo.config.patch(recompile_limit=GRAPHS),  # type: ignore[no-untyped-call]
            config.patch(layout_optimization=False),  # type: ignore[no-untyped-call]
            torch.fx.experimental._config.patch(use_duck_shape=False),  # type: ignore[attr-defined]
        ):
            yield
    finally:
        lowering.lowerings[gradient] = lowered


@contextlib.contextmanager
def products_as_before(precision: str | None = None) -> Iterator[None]:
    """Restore afterwards in which precision GPUs multiply float32 matrices; inside it is as before, or `precision`.

    `ieee` is float32 in full, `tf32` has its range and ten bits after the leading one.
    """
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    try:
        if precision is not None:
            products.fp32_precision = precision
        yield
    finally:
        products.fp32_precision = before


def made_fast(network: T, device: str | torch.device) -> T:
    """Return a network in `fast_layout` on the device where it is; on a processor, freed memory is kept from now on."""
    if torch.device(device).type == "cpu":
        keep_freed_memory()
    return network.to(memory_format=fast_layout(device))  # type: ignore[call-overload]


def laid_out_as(values: torch.Tensor, pattern: torch.Tensor) -> torch.Tensor:
    """Return a tensor with the strides of another one of its shape.

    torch's fused and `foreach` operations take their fast path, one kernel for many tensors, only where a parameter and
    what goes with it have the same strides.
    """
    if values.stride() == pattern.stride():
        return values
    return torch.empty_like(pattern, dtype=values.dtype, device=values.device).copy_(values)


def has_bfloat16(device: torch.device) -> bool:
    """Return whether bfloat16 is computed by the hardware itself; of Apple's GPUs it is not known, and not said."""
    if device.type == "cpu":
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def training_precision(given: str | None, before: str | None, device: torch.device) -> str:
    """Return the type that most operations of a training compute in: accelerate's `mixed_precision`.

    It is what is `given`, or what `accelerate launch` says (its own default, `no`, too), or what a resumed run had
    `before`, or `bf16` on a GPU with bfloat16 arithmetic, which is logged, and `no` elsewhere.
    """
    chosen = given or os.environ.get("ACCELERATE_MIXED_PRECISION") or before
    if chosen is None and device.type == "cuda" and has_bfloat16(device):
        logger.info("This GPU has bfloat16 arithmetic: mixed_precision is bf16. With mixed_precision no it is float32.")
        return "bf16"
    return (chosen or "no").lower()


def machine(device: str, processes: int = 1, libraries: Sequence[str] = ()) -> dict[str, Any]:
    """Return the hardware of the device, `cuda` or `cpu`, and the versions of `LIBRARIES` and of others."""
    hardware = {"cpu": _processor(), "cores": os.cpu_count()}
    if device == "cuda":
        hardware = {"gpu": torch.cuda.get_device_name(), **hardware}
    versions = {"python": platform.python_version()}
    for name in (*LIBRARIES, *libraries):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # used from its folder, not installed
            versions[name] = importlib.metadata.version(name)
    return {"hardware": hardware, "processes": processes, "threads": torch.get_num_threads(), "versions": versions}


def _processor() -> str:
    """Return the processor's name, where Linux tells it, or its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
