"""An `Accelerator` for one run, after which the process is as it was."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import (
    DataLoaderConfiguration,
    GradientAccumulationPlugin,
    ProjectConfiguration,
    parse_flag_from_env,
)

from .devices import has_bfloat16
from .draws import separate_randomness

logger = logging.getLogger(__name__)


def this_process() -> PartialState:
    """Return accelerate's state of this process among all, as an `Accelerator` sets it up."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


@contextlib.contextmanager
def accelerated(
    *,
    seed: int | None = None,
    mixed_precision: str | None = None,
    accumulation: int = 1,
    allow_tf32: bool | None = None,
    report_to: str | None = None,
    output_dir: str | None = None,
    logging_dir: str = "logs",
    tracked: Mapping[str, Any] | None = None,
    place: bool = True,
) -> Iterator[Accelerator]:
    """Give an `Accelerator` of its own: accelerate's state, TF32 and global random generators are afterwards as before.

    Args:
        seed: What Python's, NumPy's and torch's global generators begin with.
        mixed_precision: `no`, `fp16` or `bf16`; by default what accelerate is configured for.
        accumulation: Batches whose gradients make a step.
        allow_tf32: Whether to multiply and convolve float32 in TF32; without it torch's defaults stand.
        report_to: Tracker, such as `tensorboard`.
        output_dir: Folder of the run.
        logging_dir: Folder of the tracker's files inside it.
        tracked: What the tracker is told of the run.
        place: Whether to put modules and batches on accelerate's device; without it they stay where they are.

    Raises:
        ValueError: A tracker that is not installed, or a precision that the device has not.
    """
    kinds: tuple[Any, ...] = (AcceleratorState, GradientState)
    before = [dict(kind._shared_state) for kind in kinds]
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    flags = (matmul.allow_tf32, cudnn.allow_tf32) if allow_tf32 else None
    project = None
    if output_dir is not None:
        project = ProjectConfiguration(output_dir, os.path.join(output_dir, logging_dir))
    accelerator = None
    with separate_randomness(seed):
        try:
            for kind in kinds:
                kind._shared_state.clear()
            accelerator = Accelerator(
                gradient_accumulation_plugin=GradientAccumulationPlugin(accumulation, sync_with_dataloader=False),
                mixed_precision=mixed_precision,
                log_with=report_to,
                project_config=project,
                dataloader_config=DataLoaderConfiguration(non_blocking=True),
                device_placement=place,
            )
            if report_to and not accelerator.log_with:
                raise ValueError(f"report_to is {report_to}: that tracker is not installed.")
            if accelerator.mixed_precision == "bf16" and not has_bfloat16(accelerator.device):
                logger.warning("This hardware has no bfloat16 arithmetic: mixed_precision no will be faster.")
            if report_to:
                accelerator.init_trackers("ddae_hf", {name: str(value) for name, value in (tracked or {}).items()})
            if flags is not None:
                matmul.allow_tf32 = cudnn.allow_tf32 = True
            yield accelerator
        finally:
            for tracker in accelerator.trackers if accelerator is not None else []:
                tracker.finish()
            if flags is not None:
                matmul.allow_tf32, cudnn.allow_tf32 = flags
            for kind, state in zip(kinds, before, strict=True):
                kind._shared_state.clear()
                kind._shared_state.update(state)
