"""Averages of weights whose length is chosen after training.

While a network trains, power-function averages of its weights are kept beside it, and snapshots of them on disk
(Karras et al. 2023, arXiv 2312.02696, section 3 and appendix C). After step t such an average has given the
weights of step s the share (s^(g + 1) - (s - 1)^(g + 1)) / t^(g + 1), which is the integral from s - 1 to s of its
profile p(s) = (g + 1) s^g / t^(g + 1). The profile's shape does not depend on t, and so its length is a fraction of the
training: `length`, the paper's sigma_rel, is the profile's standard deviation over t. A weighted sum of snapshots has
the sum of their profiles, weighted alike: `combined` finds the sum that is nearest to a profile of any length.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..weights import plain_state
from .arrays import StrPath
from .run_folder import discard, note_files, saving

AVERAGES = "averages"  # the folder of snapshots in that of a run, and that of the running ones in a checkpoint's state
SNAPSHOTS = 32  # of a whole training, by default


def exponent_of(length: float) -> float:
    """Return the exponent g of the profile of a length, which is above 0 and below 1 / sqrt(12).

    It is the largest root of (g + 2)^2 (g + 3) = (g + 1) / length^2, the only one whose profile grows.
    """
    inverse = length**-2
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


def length_of(exponent: float) -> float:
    """Return the length of a profile, its standard deviation over the number of steps, from its exponent."""
    return math.sqrt((exponent + 1) / ((exponent + 2) ** 2 * (exponent + 3)))


def check_lengths(lengths: Sequence[float], run: StrPath | None, shard: bool) -> None:
    """Raise `ValueError` for averages that come twice, have no folder, or whose weights no process has as a whole."""
    given = f"average_lengths is {' '.join(f'{length:g}' for length in lengths)}"
    if len(set(lengths)) < len(lengths):
        raise ValueError(f"{given}: give every length once.")
    if lengths and run is None:
        raise ValueError(f"{given}: snapshots of them are kept in output_dir, so give one.")
    if lengths and shard:
        raise ValueError(f"{given}: one process keeps them whole, and shard divides the network. Leave one out.")


def new_share(step: int, exponent: float) -> float:
    """Return the share 1 - beta that an average gives the weights of a step, counted from 1, as it takes them in.

    beta is (1 - 1 / step)^(exponent + 1), so that of the weights before the first step nothing is left.
    """
    return 1.0 if step == 1 else -math.expm1((exponent + 1) * math.log1p(-1 / step))


@dataclass(frozen=True)
class Profile:
    """How an average of a length has weighted the steps up to one, the last."""

    step: int
    length: float


@dataclass(frozen=True)
class Combination:
    """A weighted sum of stored averages that stands for another average.

    Attributes:
        coefficients: What each stored average is multiplied by; their sum is 1.
        residual: The norm of the difference between the sum's profile and the one that is wanted, over the norm of the
            latter: 0 where the sum is exactly the average.
    """

    coefficients: list[float]
    residual: float


def combined(stored: Sequence[Profile], wanted: Profile) -> Combination:
    """Return the weighted sum of stored averages whose profile is nearest to the one that is wanted.

    It is the least-squares solution by the profiles' inner products, as in the paper. Here the coefficients also add up
    to 1, so that weights that did not change stay as they are where the profile cannot be met.
    """
    if wanted in stored:
        return Combination([float(each == wanted) for each in stored], 0.0)
    steps = np.array([profile.step for profile in (*stored, wanted)], dtype=np.float64) / wanted.step
    exponents = np.array([exponent_of(profile.length) for profile in (*stored, wanted)])
    norms = (exponents + 1) / np.sqrt((2 * exponents + 1) * steps)
    products = _inner_products(steps, exponents) / np.outer(norms, norms)
    sums = norms[-1] / norms[:-1]  # what a profile adds to the sum of 1, over what the wanted one does
    system = np.block([[products[:-1, :-1], sums[:, None]], [sums[None], np.zeros((1, 1))]])
    found = np.linalg.lstsq(system, np.append(products[:-1, -1], 1.0), rcond=None)[0][:-1]
    difference = np.append(found, -1.0)
    squared = float(difference @ products @ difference)
    return Combination([float(value) for value in found * sums], math.sqrt(max(0.0, squared)))


def _inner_products(steps: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    """Return the integrals of the product of any two profiles, of which each is 0 after its last step."""
    last = np.minimum.outer(steps, steps)
    powers = exponents[:, None] * np.log(last / steps[:, None]) + exponents * np.log(last / steps)
    heights = np.outer((exponents + 1) / steps, (exponents + 1) / steps)
    return heights * np.exp(powers) * last / (np.add.outer(exponents, exponents) + 1)


@dataclass(frozen=True)
class Snapshot:
    """A stored average: its profile, its folder, which has a list of its files, and the file there."""

    profile: Profile
    folder: Path
    file: str


def file_of(length: float) -> str:
    """Return the name of the file of an average."""
    return f"length-{length!r}.safetensors"


def snapshots_in(run: Path) -> list[Snapshot]:
    """Return the stored averages in a run's folder, by step and length; files of other names are left alone."""
    found = []
    for path in (run / AVERAGES).glob("step-*/length-*.safetensors"):
        step = path.parent.name.removeprefix("step-")
        try:
            profile = Profile(int(step), float(path.stem.removeprefix("length-")))
        except ValueError:
            continue
        if path.name == file_of(profile.length) and path.parent.name == _folder_of(profile.step):
            found.append(Snapshot(profile, path.parent, path.name))
    return sorted(found, key=lambda snapshot: (snapshot.profile.step, snapshot.profile.length))


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in tensors.items()}


def _folder_of(step: int) -> str:
    return f"step-{step:07d}"


class PowerAverages:
    """The averages of a network in training, one of each length, in memory, with snapshots of them in a run's folder.

    They have the type and the place of the network's weights. Snapshots are of that type too, float32: a short length
    is the difference of large multiples of snapshots, which multiplies what rounding to 16 bits would lose.

    Args:
        lengths: Their lengths; without any, nothing is kept or written.
        run: The run's folder; they need one.
        every: Steps between two snapshots; by default a 32nd of the training. The last step has one in any case.
    """

    def __init__(self, lengths: Sequence[float] = (), run: StrPath | None = None, every: int | None = None):
        self.lengths = list(lengths)
        self.run = Path(run or ".")
        self.folder = self.run / AVERAGES
        self.every = every
        self.averages: list[list[Tensor]] = []

    def begin(self, network: nn.Module, total_steps: int) -> None:
        """Hold averages of a network, which is on its device, for a training of so many steps."""
        named = plain_state(dict(network.named_parameters()))
        self.names = list(named)
        self.parameters = list(named.values())
        self.averages = [[value.detach().clone() for value in self.parameters] for _ in self.lengths]
        self.total_steps = total_steps
        self.every = self.every or max(1, total_steps // SNAPSHOTS)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the network's weights after a step, counted from 1."""
        for length, average in zip(self.lengths, self.averages, strict=True):
            torch._foreach_lerp_(average, self.parameters, new_share(step, exponent_of(length)))

    def is_due(self, step: int) -> bool:
        """Whether a step has a snapshot."""
        return bool(self.lengths) and (step % (self.every or 1) == 0 or step == self.total_steps)

    def snapshot(self, step: int) -> None:
        """Write the averages of a step into a folder, complete or not at all (`OSError`)."""
        final = self.folder / _folder_of(step)
        partial = final.with_name(f"partial-{final.name}")
        with saving(self.run):
            shutil.rmtree(partial, ignore_errors=True)
            self.write(partial)
            note_files(partial)
            if final.exists():
                discard(final)
            partial.rename(final)

    def write(self, folder: Path) -> None:
        """Write the averages as they are into a folder, a file each."""
        if self.lengths:
            folder.mkdir(parents=True, exist_ok=True)
        for length, average in zip(self.lengths, self.averages, strict=True):
            values = (value.cpu().contiguous() for value in average)
            save_file(dict(zip(self.names, values, strict=True)), folder / file_of(length))

    @torch.no_grad()
    def read(self, folder: Path) -> None:
        """Go on from the averages in a folder.

        Raises:
            ValueError: Averages of another network.
            OSError: No file of a length; `SafetensorError` where it is damaged.
        """
        for length, average in zip(self.lengths, self.averages, strict=True):
            stored = load_file(folder / file_of(length))
            own = dict(zip(self.names, average, strict=True))
            if _shapes(stored) != _shapes(own):
                raise ValueError(f"{file_of(length)} is of another network")
            for name, value in own.items():
                value.copy_(stored[name])

    def forget_after(self, step: int) -> None:
        """Remove the snapshots of later steps, which a run that goes on from this one writes anew."""
        if not self.lengths:
            return
        for rubbish in self.folder.glob("partial-step-*"):
            shutil.rmtree(rubbish)
        for later in {each.folder for each in snapshots_in(self.run) if each.profile.step > step}:
            discard(later)
