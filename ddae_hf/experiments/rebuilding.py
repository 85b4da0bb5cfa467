"""Averages of a trained network's weights, of any length: `rebuild_average`, from what its training has stored."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..image_processing_ddae import DDAEImageProcessor
from ..pipeline_ddae import DDAEPipeline
from ..weights import open_weights, plain_state, tensor_shapes
from .arrays import StrPath
from .averages import Combination, Profile, Snapshot, combined, snapshots_in
from .options import Options, option
from .report import in_memory
from .results import AverageReport
from .run_folder import saved_checkpoints, saving, what_is_wrong

MOST = 0.1  # of a profile that may be missed
REACHED = np.geomspace(0.001, 0.28, 100)  # lengths that are tried to say which ones can be made
logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class RebuildingOptions(Options):
    """Options of `rebuild_average`."""

    length: float = option(help="Length of the average: its profile's deviation over the steps, EDM2's sigma_rel.")
    step: int | None = option(None, "The step that it is the average after, which has a snapshot; by default the last.")
    output_dir: str | None = option(None, "Folder to write the checkpoint to; without one, none is written.")


@dataclass(kw_only=True)
class AverageResult(AverageReport):
    """An average's figures, with the pipeline of the averaged network."""

    pipeline: DDAEPipeline = in_memory()
    processor: DDAEImageProcessor = in_memory()

    def save(self, folder: StrPath) -> None:
        """Write a checkpoint that opens as the run's does, and the report (`OSError`)."""
        with saving(folder) as path:
            self.pipeline.save_pretrained(path)
            self.processor.save_pretrained(path)
            self.write(path)


@dataclass(frozen=True)
class Plan:
    """Which stored averages make another one, and by which coefficients."""

    wanted: Profile
    snapshots: list[Snapshot]
    combination: Combination


def rebuild_average(run: StrPath, options: RebuildingOptions | None = None, **changes: Any) -> AverageResult:
    """Make the average of a length of a training run's weights, of the snapshots that it keeps (`average_lengths`).

    Args:
        run: The run's folder.
        options: Length, step and folder.
        **changes: Fields of the options to replace, by name.

    Returns:
        The pipeline of the averaged network, and how exactly its profile is met.

    Raises:
        ValueError: A folder without snapshots or without a network, a length that the snapshots cannot make, a step
            without a snapshot, a damaged file, or an `output_dir` that holds something else.
        OSError: A folder that cannot be written to.
    """
    options = RebuildingOptions.of(options, changes)
    plan = planned(run, options.length, options.step)
    check_output(options.output_dir)
    result = made(run, plan)
    result.options = {"model_name_or_path": str(run), **options.to_dict()}
    if options.output_dir is not None:
        result.save(options.output_dir)
    return result


def planned(run: StrPath, length: float, step: int | None = None) -> Plan:
    """Return which snapshots make an average, or raise `ValueError` where none do."""
    path = Path(run)
    stored = snapshots_in(path)
    if not stored:
        raise ValueError(
            f"{run} has no snapshots of averages: give the folder of a training run that kept some (average_lengths)."
        )
    steps = sorted({each.profile.step for each in stored})
    last = steps[-1] if step is None else step
    if last not in steps:
        near = sorted(sorted(steps, key=lambda known: abs(known - last))[:3])
        raise ValueError(f"step is {last}, which has no snapshot: the nearest are {', '.join(map(str, near))}.")
    found = [each for each in stored if each.profile.step <= last]
    profiles = [each.profile for each in found]
    combination = combined(profiles, Profile(last, length))
    if combination.residual > MOST:
        makes = [known for known in REACHED if combined(profiles, Profile(last, float(known))).residual <= MOST]
        allowed = f"from {makes[0]:.3g} to {makes[-1]:.3g}" if makes else "none but those that are stored"
        raise ValueError(
            f"length is {length:g}: the {len(found)} stored averages up to step {last} miss its profile by "
            f"{100 * combination.residual:.3g} %, and {100 * MOST:.0f} are allowed. Lengths that they can make are "
            f"{allowed}; a training with smaller average_steps can make others."
        )
    return Plan(Profile(last, length), found, combination)


def check_output(folder: StrPath | None) -> None:
    """Raise `ValueError` where a folder holds anything but an average that was made before."""
    if folder is None or not Path(folder).is_dir() or not any(Path(folder).iterdir()):
        return
    if not (Path(folder) / AverageReport.file).is_file():
        raise ValueError(f"output_dir is {folder}, which holds something else than an average: give another folder.")


def made(run: StrPath, plan: Plan) -> AverageResult:
    """Return the average of a plan, in the network of the run or, before its end, of its newest checkpoint."""
    used = [each for each in zip(plan.snapshots, plan.combination.coefficients, strict=True) if each[1] != 0]
    for snapshot in {each.folder: each for each, _ in used}.values():
        if reason := what_is_wrong(snapshot.folder, [snapshot.file]):
            raise ValueError(f"{snapshot.folder} is damaged: {reason}. Remove it, and make the average of the others.")
    places = [place for place in (Path(run), *saved_checkpoints(run)[::-1]) if (place / "model_index.json").is_file()]
    if not places:
        raise ValueError(f"{run} has no network beside its averages: give the folder of a training run.")
    pipeline = DDAEPipeline.from_pretrained(places[0])
    with torch.no_grad():
        fill(pipeline.denoiser, [(each.folder / each.file, coefficient) for each, coefficient in used])
    logger.info("The average of length %g is the sum of %d stored ones.", plan.wanted.length, len(used))
    return AverageResult(
        run=str(run),
        length=plan.wanted.length,
        step=plan.wanted.step,
        coefficients={f"{each.folder.name}/{Path(each.file).stem}": coefficient for each, coefficient in used},
        residual=plan.combination.residual,
        pipeline=pipeline,
        processor=DDAEImageProcessor.from_pretrained(places[0]),
    )


def fill(network: nn.Module, terms: list[tuple[Path, float]]) -> None:
    """Give a network's parameters a weighted sum of those in files, one file after another, computed in float64.

    Raises:
        ValueError: A file that has other tensors than the network, or others of their shapes.
    """
    parameters = plain_state(dict(network.named_parameters()))
    shapes = {name: tuple(value.shape) for name, value in parameters.items()}
    sums = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in parameters.items()}
    for file, coefficient in terms:
        if tensor_shapes([str(file)]) != shapes:
            raise ValueError(f"{file} is of another network than the run's: give the folder of the run that it is of.")
        with open_weights(str(file)) as tensors:
            for name, total in sums.items():
                total.add_(tensors.get_tensor(name), alpha=coefficient)
    for name, parameter in parameters.items():
        parameter.copy_(sums[name])
