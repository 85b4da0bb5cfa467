"""The loop that trains: resumable steps with accelerate, averaged weights, checkpoints, signals, progress.

    with accelerated(mixed_precision="bf16") as accelerator:
        loop = Loop(accelerator, network, optimizer, loader, total_steps=1000, seed=0, output_dir="runs/mine",
                    checkpointing_steps=100, save=lambda folder: network.save_pretrained(folder))
        loop.restore(checkpoint_to_resume("runs/mine", "latest", (*STATE, "config.json")))
        loop.run(lambda batch: F.mse_loss(loop.module(batch["x"]), batch["y"]))

What is random in a step depends on (seed, number of the batch, process) alone, so that a resumed run repeats it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from .arrays import write_text
from .batches import Batches
from .progress import PROGRESS, Progress
from .run_facts import machine
from .run_folder import check_folder, clear_rubbish, discard, note_files, saved_checkpoints, saving, step_of
from .stopping import Interrupted, Stopping, check_weights, look, not_finite

logger = logging.getLogger(__name__)

NUM_LOSSES = 100  # batches over which the loss is averaged
LOOKS = 10  # steps between two looks at losses and weights


class Loop:
    """Trains a module, on all of accelerate's devices.

    Args:
        accelerator: Of `accelerated`.
        module: What is trained.
        optimizer: Its optimiser.
        loader: Gives batches. One of rows has a `Batches` for its `batch_sampler`; one of a stream none.
        total_steps: Steps after which training ends.
        seed: Seed of all that is random in a step.
        schedule: Returns the schedule of an optimiser's rates, by default a constant one. Where a run may be resumed it
            is a `LambdaLR`, whose rates depend on the step alone.
        max_grad_norm: Largest norm of the gradient; 0 leaves it as it is.
        average: A copy of the module, to hold averaged weights; after its ramp, with decay `ema_decay`.
        output_dir: Folder of checkpoints; without one there are none, and signals act as always.
        checkpointing_steps: Steps between two checkpoints; the newest `checkpoints_total_limit` are kept, or all.
        save: Writes into a checkpoint's folder what accelerate does not: weights and options. `average` is up to date.
        keep_weights: Whether accelerate writes the module's weights into checkpoints, and `restore` reads them.
        desc: What the progress bar says.
        option: Name of the option that is the learning rate, for messages.

    Attributes:
        module: What is trained, prepared.
        progress: How far it has come.
        resumed: How far it had come when it was resumed.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        loader: DataLoader[Any],
        *,
        total_steps: int,
        seed: int,
        schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
        max_grad_norm: float = 0.0,
        average: nn.Module | None = None,
        ema_decay: float = 0.0,
        output_dir: str | os.PathLike[str] | None = None,
        checkpointing_steps: int | None = None,
        checkpoints_total_limit: int | None = None,
        save: Callable[[Path], None] = lambda folder: None,
        keep_weights: bool = False,
        desc: str = "Training",
        option: str = "learning_rate",
    ):
        self.accelerator, self.total_steps, self.seed, self.save = accelerator, total_steps, seed, save
        self.max_grad_norm, self.desc, self.option = max_grad_norm, desc, option
        self.folder = None if output_dir is None else Path(output_dir)
        self.checkpointing_steps, self.limit = checkpointing_steps, checkpoints_total_limit
        if output_dir is not None:
            check_folder(output_dir)
        self.order = loader.batch_sampler if isinstance(loader.batch_sampler, Batches) else None
        size = loader.batch_size if self.order is None else self.order.batch_size
        self.schedule = None if schedule is None else schedule(optimizer)
        self.module, self.optimizer, self.loader = accelerator.prepare(module, optimizer, loader)
        self.average, self.ema = average, None
        if average is not None:
            average.to(accelerator.device)
            self.ema = EMAModel(average.parameters(), decay=ema_decay, foreach=True)
        if not keep_weights:
            accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
            accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())
        self.progress = Progress(batch_images=(size or 1) * accelerator.num_processes)
        self.resumed = dataclasses.replace(self.progress)
        self.losses: deque[Tensor] = deque(maxlen=NUM_LOSSES)
        self.checkpoint_before: Path | None = None
        self.started = time.monotonic()

    def restore(self, checkpoint: Path | None) -> None:
        """Go on from a checkpoint, whose weights the module has already, but for `keep_weights`.

        The learning rate, and what else options say of the optimiser, are this run's.

        Raises:
            ValueError: A damaged checkpoint, one beyond the last step, or weights that are not finite.
        """
        if self.folder is not None and self.accelerator.is_main_process:
            clear_rubbish(self.folder)
        if checkpoint is None:
            return
        given = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        size = self.progress.batch_images
        try:
            self.accelerator.load_state(str(checkpoint / "state"))
            self.progress = Progress.read(checkpoint)
        except (RuntimeError, ValueError, KeyError, EOFError, UnpicklingError, SafetensorError) as error:
            raise ValueError(f"{checkpoint} cannot be resumed: {error}. Resume an earlier checkpoint.") from error
        self.accelerator.step = 0  # batches of a step that are done: checkpoints are written between steps
        self.progress.cut_into(size or 1)
        step = self.progress.steps
        if step > self.total_steps:
            raise ValueError(
                f"{checkpoint} is at step {step}, beyond the {self.total_steps} asked for: resume an earlier one."
            )
        for group, options in zip(self.optimizer.param_groups, given, strict=True):
            group.update(options)
        if self.schedule is not None:
            self.schedule.last_epoch = step
            rates = zip(self.optimizer.param_groups, self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True)
            for group, rate, factor in rates:
                group["lr"] = rate * factor(step)
        check_weights(checkpoint, self._weights())
        if self.ema is not None:
            self.ema.optimization_step = step
        self.losses.extend(torch.tensor(self.progress.losses, device=self.accelerator.device))
        self.checkpoint_before = checkpoint
        self.resumed = dataclasses.replace(self.progress)
        self.started = time.monotonic()
        logger.info(f"Resuming from {checkpoint}.")

    def _weights(self) -> Iterable[Tensor]:
        return [*self.module.state_dict().values(), *([] if self.ema is None else self.ema.shadow_params)]

    def run(
        self, loss: Callable[[Any], Tensor], sample: Callable[[int], None] | None = None, sample_steps: int = 0
    ) -> None:
        """Train to the last step, with the loss of a batch; `sample` is called after every `sample_steps` of them.

        Raises:
            NotFinite: A loss or weights that are no finite numbers; nothing of them is saved.
            Interrupted: SIGTERM or Ctrl-C came, and a checkpoint is written.
            OSError: A checkpoint could not be written.
            ValueError: An epoch without a batch.
        """
        step = self.progress.steps
        bar = tqdm(
            initial=step, total=self.total_steps, desc=self.desc, disable=not self.accelerator.is_local_main_process
        )
        with contextlib.nullcontext() if self.folder is None else Stopping() as stopping, bar:
            for step in self.steps(loss):
                bar.update()
                stop = None if stopping is None else self._agreed(stopping.requested, step)
                due = self.checkpointing_steps and step % self.checkpointing_steps == 0
                saved = self.folder is not None and (stop is not None or due)
                drawn = sample_steps and step % sample_steps == 0
                if step % LOOKS == 0 or saved or drawn or step == self.total_steps:
                    self.look(bar)
                if saved:
                    self.checkpoint()
                if stop is not None:
                    raise Interrupted(
                        f"Stopped by {signal.Signals(stop).name} after step {step} of {self.total_steps}: "
                        f"{self._last_checkpoint()} is saved. The same options go on from it, with "
                        "resume_from_checkpoint latest where that is one of them.",
                        stop,
                    )
                if drawn and sample is not None:
                    sample(step)
        self._count_seconds()

    def steps(self, loss: Callable[[Any], Tensor]) -> Iterator[int]:
        """Train, and yield the number of every step that is done, up to the last."""
        self.module.train()
        if self.progress.steps == self.total_steps:
            return
        accelerator, progress = self.accelerator, self.progress
        for batch in self.batches():
            sequence = np.random.SeedSequence([self.seed, progress.batches, accelerator.process_index])
            torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))
            with accelerator.accumulate(self.module):
                found = loss(batch)
                accelerator.backward(found)
                if accelerator.sync_gradients and self.max_grad_norm:
                    accelerator.clip_grad_norm_(self.module.parameters(), self.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.losses.append(found.detach())
            count = len(next(iter(batch.values()))) * accelerator.num_processes
            progress.count(count, accelerator.gradient_state.end_of_dataloader)
            if not accelerator.sync_gradients:
                continue
            if self.schedule is not None:
                self.schedule.step()
            progress.steps += 1
            if self.ema is not None:
                self.ema.step(self.module.parameters())
            yield progress.steps
            if progress.steps == self.total_steps:
                return

    def batches(self) -> Iterator[dict[str, Any]]:
        """Yield batches without end, from where `progress` is, which whoever takes them counts."""
        progress = self.progress
        while True:
            done = progress.batch
            self.loader.set_epoch(progress.epoch)
            loader = self.loader
            if self.order is not None:
                self.order.begin(progress.epoch, done * self.accelerator.num_processes)
            elif done:
                loader = self.accelerator.skip_first_batches(loader, done)
            came = False
            for batch in loader:
                came = True
                yield batch
            if not came:
                raise ValueError(
                    f"Epoch {progress.epoch + 1} has no batch after the {done} that are done, and needs more than "
                    "those: give the images, the batch size and the number of processes that the run began with."
                )

    def look(self, bar: tqdm[Any] | None = None) -> None:
        """Show the mean of the last losses, and stop unless these and all weights are finite."""
        step = self.progress.steps
        self.progress.losses, finite = look(self.accelerator, self.losses, self._weights())
        loss, rate = self.progress.loss(), self.optimizer.param_groups[0]["lr"]
        if not finite:
            raise not_finite(step, loss, rate, self._last_checkpoint(), option=self.option)
        if bar is not None:
            bar.set_postfix(loss=f"{loss:.4f}", lr=f"{rate:.1e}")
        self.accelerator.log({"loss": loss, "lr": rate}, step=step)

    def _agreed(self, requested: int | None, step: int) -> int | None:
        """Return the signal that any process has got, which all learn of at the same step."""
        if self.accelerator.num_processes == 1:
            return requested
        if step % LOOKS and step != self.total_steps:
            return None
        mine = torch.tensor([requested or 0], device=self.accelerator.device)
        return int(self.accelerator.gather(mine).max()) or None

    def _last_checkpoint(self) -> Path | None:
        """Return the newest checkpoint until now, be it the one that was resumed."""
        found = [] if self.folder is None else saved_checkpoints(self.folder)
        found = [folder for folder in found if step_of(folder) <= self.progress.steps]
        return found[-1] if found else self.checkpoint_before

    def is_finished(self, results: str) -> bool:
        """Return whether the run that was resumed has left all it leaves; this file of its folder comes last."""
        if self.folder is None or self.checkpoint_before is None or not (self.folder / results).is_file():
            return False
        finished = json.loads((self.folder / results).read_text(encoding="utf-8"))["steps"] == self.total_steps
        if finished:
            logger.info(f"{self.folder} is complete, after {self.total_steps} steps: there is nothing left to do.")
        return finished

    def facts(self) -> dict[str, Any]:
        """Return what the report of a training says of the loop."""
        progress = self.progress
        images = progress.images - self.resumed.images
        seconds = progress.seconds - self.resumed.seconds
        return {
            "steps": progress.steps,
            "loss_last_100_batches": progress.loss(),
            "images": progress.images,
            "images_this_run": images,
            "seconds": round(progress.seconds, 1),
            "seconds_this_run": round(seconds, 1),
            # Where nothing was left to train, the rate until then.
            "images_per_second": round(images / seconds if images else progress.images / self.resumed.seconds, 1),
            **machine(self.accelerator.device.type, self.accelerator.num_processes),
        }

    def _count_seconds(self) -> None:
        """Bring the seconds of all runs up to now."""
        self.progress.seconds = self.resumed.seconds + time.monotonic() - self.started

    def averaged(self) -> nn.Module | None:
        """Return `average` with the averaged weights of now."""
        if self.average is not None and self.ema is not None:
            self.ema.copy_to(self.average.parameters())
        return self.average

    def checkpoint(self) -> None:
        """Write `checkpoint-STEP`, complete or not at all (`OSError`), and drop the oldest others beyond the limit."""
        folder, accelerator = self.folder, self.accelerator
        assert folder is not None
        self._count_seconds()
        partial, final = folder / "partial-checkpoint", folder / f"checkpoint-{self.progress.steps}"
        with saving(folder):
            if accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
            accelerator.wait_for_everyone()
            accelerator.save_state(str(partial / "state"))
            accelerator.wait_for_everyone()  # every process has written its random state: the folder can be renamed
            if accelerator.is_main_process:
                write_text(partial / PROGRESS, json.dumps(dataclasses.asdict(self.progress), indent=2) + "\n")
                self.averaged()
                self.save(partial)
                note_files(partial)
                if final.exists():
                    discard(final)
                partial.rename(final)
                others = [old for old in saved_checkpoints(folder) if old != final]
                for old in others[: max(0, len(others) + 1 - self.limit)] if self.limit else []:
                    discard(old)
                logger.info(f"Saved {final}.")
        accelerator.wait_for_everyone()

    def raw(self) -> Any:
        """Return the module as it came, with the weights that the optimiser left."""
        return self.accelerator.unwrap_model(self.module, keep_torch_compile=False)
