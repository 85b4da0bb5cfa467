"""How far a training run has come, in epochs, batches, steps, images and seconds."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from statistics import fmean

from .run_folder import read_options, step_of

PROGRESS = Path("state") / "progress.json"
# What a checkpoint has beside weights, without which a run would not go on as it was.
STATE = ("state/optimizer.bin", "state/random_states_0.pkl", PROGRESS.as_posix())
WEIGHTS = "state/model.safetensors"  # where accelerate keeps them


@dataclasses.dataclass
class Progress:
    """How far a run has come, with all that it was resumed from."""

    epoch: int = 0  # that it is in
    batch: int = 0  # batches of this epoch that are done, each of all processes
    batches: int = 0  # those of all epochs
    images: int = 0
    seconds: float = 0.0
    num_images: int | None = None  # of the data set; of a stream nobody knows it
    losses: list[float] = dataclasses.field(default_factory=list)  # of the last batches, means over all processes
    steps: int = 0  # of the optimiser
    batch_images: int | None = None  # images of a batch of all processes
    images_hash: str | None = None  # of the images or latents, where they are no stream

    @classmethod
    def read(cls, checkpoint: Path) -> Progress:
        """Return how far a run had come when it wrote a checkpoint, of this version or of an earlier one."""
        known = json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8"))
        names = {field.name for field in dataclasses.fields(cls)}
        progress = cls(**{name: value for name, value in known.items() if name in names})
        if "steps" not in known:  # before version 0.3.0
            progress.steps = step_of(checkpoint)
            processes = len(list((checkpoint / "state").glob("random_states_*")))
            progress.batch_images = read_options(checkpoint)["train_batch_size"] * processes
        return progress

    def count(self, images: int, last: bool) -> None:
        """Add a batch, which may be the last of its epoch."""
        self.batches += 1
        self.images += images
        self.epoch, self.batch = (self.epoch + 1, 0) if last else (self.epoch, self.batch + 1)

    def cut_into(self, batch_images: int) -> None:
        """Count in batches of another size, which the images done must fill, or raise `ValueError`."""
        if self.batch_images in (None, batch_images):
            self.batch_images = batch_images
            return
        before = self.batch_images or 1
        if self.batch * before % batch_images:
            raise ValueError(
                f"{self.batch * before} images of the epoch are done, which are no whole number of batches of "
                f"{batch_images}: give the train_batch_size and the number of processes that the run began with."
            )
        self.batch = self.batch * before // batch_images
        self.batches = self.batches * before // batch_images
        self.batch_images = batch_images

    def loss(self) -> float | None:
        """Return the mean of the last losses; a checkpoint of version 0.1.0 has kept none."""
        return fmean(self.losses) if self.losses else None
