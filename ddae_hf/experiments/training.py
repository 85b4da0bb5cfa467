"""The loop that trains: resumable steps with accelerate, averaged weights, checkpoints, signals, progress.

What a loss draws depends on (seed, number of the image in the whole run) alone: a resumed run repeats it, and so does
one on another number of processes, or with other batches of the same step. What else is random, which is dropout,
depends on (seed, number of the batch, process).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DataLoaderConfiguration, DistributedType, GradientAccumulationPlugin
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm.auto import tqdm

from .arrays import StrPath, write_json
from .averages import AVERAGES, PowerAverages
from .batches import Batch, Batches
from .devices import compiling_by_blocks, laid_out_as, machine, products_as_before
from .draws import RowDraws, seed_by, separate_randomness
from .run_folder import PARTS, PROGRESS, Progress, alone_in, discard, note_files, saved_checkpoints, saving
from .sharding import Shards, load_moments, own_parts, save_moments
from .sharing import this_process
from .stopping import Look, Stopping, check_weights, interrupted, largest, not_finite

logger = logging.getLogger(__name__)
# What is minimised; where it is a sum, its parts by name, which are added in their order.
Loss = Callable[[Any, RowDraws], Tensor | dict[str, Tensor]]
# What accelerate knows of a process that was launched by itself.
ALONE = {"distributed_type": DistributedType.NO, "num_processes": 1, "process_index": 0, "local_process_index": 0}

NUM_LOSSES = 100  # batches over which the loss is averaged
LOOKS = 10  # steps between two looks at losses and weights


@contextlib.contextmanager
def accelerated(
    *, seed: int | None = None, accumulation: int = 1, alone: bool = False, **options: Any
) -> Iterator[Accelerator]:
    """Give a separate `Accelerator`: accelerate's state and global random generators are afterwards as before.

    The generators begin with `seed`; the gradients of `accumulation` batches make a step. With `alone` this process
    trains by itself, whether or not others were launched with it.
    """
    kinds: tuple[Any, ...] = (AcceleratorState, GradientState, *([PartialState] if alone else []))
    one = {**vars(this_process()), **ALONE}
    before = [dict(kind._shared_state) for kind in kinds]
    with separate_randomness(seed), products_as_before():  # for compiled float32 accelerate switches TF32 on
        try:
            for kind in kinds:
                kind._shared_state.clear()
            if alone:
                PartialState._shared_state.update(one)
            accelerator = Accelerator(
                gradient_accumulation_plugin=GradientAccumulationPlugin(accumulation, sync_with_dataloader=False),
                dataloader_config=DataLoaderConfiguration(non_blocking=True),
                **options,
            )
            with compiling_by_blocks(accelerator):
                yield accelerator
        finally:
            for kind, state in zip(kinds, before, strict=True):
                kind._shared_state.clear()
                kind._shared_state.update(state)


@dataclass
class Loop:
    """Trains a module, on all of accelerate's devices, which the module, optimiser and loader are prepared for."""

    accelerator: Accelerator  # of `accelerated`
    module: nn.Module
    optimizer: torch.optim.Optimizer
    loader: Any  # torch's `DataLoader`: a loader of rows has a `Batches` for its `batch_sampler`, one of a stream none
    _: KW_ONLY
    total_steps: int
    seed: int  # of all that is random in a step
    schedule: Any = None  # of the optimiser; for runs to resume a `LambdaLR`, whose rates follow from the step
    max_grad_norm: float = 0.0  # the largest norm of the gradient; 0 leaves it as it is
    average: Any = None  # a copy of the module, to hold averaged weights
    ema_decay: float = 0.0  # of the averages, after its ramp
    averages: PowerAverages = field(default_factory=PowerAverages)  # further ones, in the first process alone
    output_dir: StrPath | None = None  # without one there are no checkpoints, and signals act as always
    checkpointing_steps: int | None = None  # steps between two checkpoints
    checkpoints_total_limit: int | None = None  # how many of the newest are kept; by default all
    save: Callable[[Path], object] | None = None  # writes weights, such as those of `average`, into checkpoints
    beside: nn.Module | None = None  # what is trained beside the module, if it has weights; the loss calls `beside`
    shards: Shards | None = None  # where each process keeps a part of the module and of `average`; all call `save` then
    keep_weights: bool = False  # whether accelerate writes the module's weights into checkpoints, and `restore` reads
    desc: str = "Training"  # what the progress bar says
    option: str = "learning_rate"  # name of the option that is the learning rate, for messages

    def __post_init__(self) -> None:
        accelerator, loader = self.accelerator, self.loader
        self.folder = None if self.output_dir is None else Path(self.output_dir)
        self.order = loader.batch_sampler if isinstance(loader.batch_sampler, Batches) else None
        size = loader.batch_size if self.order is None else self.order.batch_size
        self.batch_images = (size or 1) * accelerator.num_processes
        if self.shards is None:
            self.module, self.optimizer, self.loader = accelerator.prepare(self.module, self.optimizer, loader)
            if self.beside is not None:
                self.beside = accelerator.prepare(self.beside)
        else:
            self.module = accelerator.prepare_model(self.module, evaluation_mode=True)  # nothing beside its precision
            self.optimizer = AcceleratedOptimizer(self.optimizer, device_placement=False)
            self.loader = accelerator.prepare(loader)
        self.ema: EMAModel | None = None
        if self.average is not None:
            if self.shards is None:
                self.average.to(accelerator.device)
                for own, averaged in zip(self.module.parameters(), self.average.parameters(), strict=True):
                    averaged.data = laid_out_as(averaged.data, own)
            averages = own_parts(self.average.parameters())
            self.ema = EMAModel(averages, decay=self.ema_decay, foreach=True)
            self.ema.shadow_params = [values.detach() for values in averages]  # no copies
        self.averages.begin(self.raw(), self.total_steps)
        if not self.keep_weights:
            accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
            accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())
        self.losses: deque[Tensor] = deque(maxlen=NUM_LOSSES)
        self.parts: dict[str, deque[Tensor]] = {}  # the last of each part of the loss, by name
        self.last_checkpoint: Path | None = None  # that was written, or resumed
        self.waits = accelerator.device.type != "cuda"  # whether every look waits for what it sees
        # Those not waited for, with their step, learning rate and the number of values of each part of the loss.
        self.looks: deque[tuple[int, float, dict[str, int], Look]] = deque()
        self._begin(Progress(batch_images=self.batch_images))

    def _begin(self, progress: Progress) -> None:
        self.progress = progress  # how far it has come
        self.resumed = dataclasses.replace(progress)  # how far it had come when it was resumed
        self.started = time.monotonic()

    def restore(self, checkpoint: Path | None) -> None:
        """Go on from a checkpoint, or raise `ValueError` if it is damaged, beyond the last step, or not finite.

        Unless `keep_weights` is set, the module has its weights already. The optimiser's options are those of this run.
        """
        if checkpoint is None:
            return
        groups = self.optimizer.param_groups
        given = [{name: value for name, value in group.items() if name != "params"} for group in groups]
        try:
            folder = checkpoint / "state"
            in_parts = (folder / PARTS).is_dir()
            if self.shards is not None or not in_parts:
                self.accelerator.load_state(str(folder))
            if self.shards is not None or in_parts:
                load_moments(folder, self.raw(), self.optimizer)
            self.averages.read(folder / AVERAGES)
            progress = Progress.read(checkpoint)
        except (RuntimeError, ValueError, KeyError, EOFError, UnpicklingError, SafetensorError) as error:
            raise ValueError(f"{checkpoint} cannot be resumed: {error}. Resume an earlier checkpoint.") from error
        self.accelerator.step = 0  # batches of a step that are done: checkpoints are written between steps
        progress.cut_into(self.batch_images)
        if progress.steps > self.total_steps:
            beyond = f"at step {progress.steps}, beyond the {self.total_steps} asked for"
            raise ValueError(f"{checkpoint} is {beyond}: resume an earlier one.")
        groups = self.optimizer.param_groups  # not the same objects as before
        for group, options in zip(groups, given, strict=True):
            group.update(options)
        for parameter, state in self.optimizer.state.items():  # another device may have had another layout
            for name, value in state.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    state[name] = laid_out_as(value, parameter)
        if self.schedule is not None:
            self.schedule.last_epoch = progress.steps
            for group, rate, factor in zip(groups, self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True):
                group["lr"] = rate * factor(progress.steps)
        check_weights(checkpoint, [self.accelerator.reduce(largest(self._weights()))])  # of all processes
        if self.ema is not None:
            self.ema.optimization_step = progress.steps
        self.losses.extend(torch.tensor(progress.losses, device=self.accelerator.device))
        for name, values in progress.parts.items():
            self.parts[name] = deque(torch.tensor(values, device=self.accelerator.device), maxlen=NUM_LOSSES)
        self.last_checkpoint = checkpoint
        self._begin(progress)
        logger.info(f"Resuming from {checkpoint}.")

    @property
    def _trained(self) -> list[nn.Module]:
        return [self.module] if self.beside is None else [self.module, self.beside]

    def _weights(self) -> list[Tensor]:
        """Return the weights that are looked at: those that this process keeps, of which small ones may be none."""
        own = own_parts(each for module in self._trained for each in module.state_dict().values())
        return [values for values in (*own, *([] if self.ema is None else self.ema.shadow_params)) if values.numel()]

    def run(self, loss: Loss, sample: Callable[[int], None] | None = None, sample_steps: int = 0) -> None:
        """Train to the last step, with the loss of a batch; `sample` is called after every `sample_steps` of them.

        The loss is a function of the batch and of draws for its rows.

        Raises:
            NotFinite: A loss or weights that are not finite; nothing of them is saved.
            Interrupted: SIGTERM or Ctrl-C came, and a checkpoint is written.
            OSError: The folder, or a checkpoint, could not be written.
            ValueError: An epoch without a batch, or another training in the folder.
        """
        hidden = not self.accelerator.is_local_main_process
        bar = tqdm(initial=self.progress.steps, total=self.total_steps, desc=self.desc, disable=hidden)
        with self._alone(), contextlib.nullcontext() if self.folder is None else Stopping() as stopping, bar:
            self.averages.forget_after(self.progress.steps)
            for step in self.steps(loss):
                bar.update()
                looks = step % LOOKS == 0 or step == self.total_steps
                number = None
                if stopping is not None and (looks or self.accelerator.num_processes == 1):
                    number = stopping.agreed(self.accelerator)
                due = self.checkpointing_steps and step % self.checkpointing_steps == 0
                saved = self.folder is not None and (number is not None or due)
                drawn = sample_steps and step % sample_steps == 0
                kept = self.averages.is_due(step)
                if looks or saved or drawn or kept:
                    self.look(bar, wait=bool(saved or drawn or kept or step == self.total_steps))
                if kept:
                    self.averages.snapshot(step)
                if saved:
                    self.checkpoint()
                if number is not None:
                    raise interrupted(number, step, self.total_steps, self.last_checkpoint)
                if drawn and sample is not None:
                    sample(step)
        self._count_seconds()

    def _alone(self) -> contextlib.AbstractContextManager[None]:
        """Keep other trainings out of the folder, where there is one: the first process does so for all."""
        if self.folder is None or not self.accelerator.is_main_process:
            return contextlib.nullcontext()
        return alone_in(self.folder)

    def steps(self, loss: Loss) -> Iterator[int]:
        """Train, and yield the number of every step that is done, up to the last."""
        self.module.train()
        if self.progress.steps == self.total_steps:
            return
        accelerator, progress = self.accelerator, self.progress
        for batch in self.batches():
            seed_by(self.seed, progress.batches, accelerator.process_index)
            with accelerator.accumulate(*self._trained):
                found = self._total(loss(batch, self.draws(len(next(iter(batch.values()))))))
                accelerator.backward(found)
                if accelerator.sync_gradients and self.max_grad_norm:
                    weights = [each for module in self._trained for each in module.parameters()]
                    accelerator.clip_grad_norm_(weights, self.max_grad_norm)
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
            if self.ema is not None:  # of what `average` has now: `.to("cpu:0")`, as for sampling, copies its tensors
                self.ema.shadow_params = [values.detach() for values in own_parts(self.average.parameters())]
                self.ema.step(own_parts(self.module.parameters()))
            self.averages.update(progress.steps)
            yield progress.steps
            if progress.steps == self.total_steps:
                return

    def _total(self, found: Tensor | dict[str, Tensor]) -> Tensor:
        """Return what is minimised, and keep its parts."""
        if isinstance(found, Tensor):
            return found
        for name, part in found.items():
            self.parts.setdefault(name, deque(maxlen=NUM_LOSSES)).append(part.detach())
        first, *others = found.values()
        return sum(others, start=first)

    def draws(self, count: int) -> RowDraws:
        """Return draws for the next batch of this process, of so many rows: batches of all processes are alike."""
        first = self.progress.images + self.accelerator.process_index * count
        return RowDraws(self.seed, range(first, first + count), self.accelerator.device)

    def batches(self) -> Iterator[Batch]:
        """Yield batches without end, from where `progress` is; whoever takes them counts them."""
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

    def look(self, bar: tqdm[Any], wait: bool = True) -> None:
        """Look at the last losses and at all weights, show what earlier looks saw, and stop unless that was finite.

        Without `wait` a GPU goes on meanwhile, and what this look sees is shown at the next one.
        """
        rate = self.optimizer.param_groups[0]["lr"]
        parts = {name: len(values) for name, values in self.parts.items()}
        losses = [*self.losses, *(each for values in self.parts.values() for each in values)]
        self.looks.append((self.progress.steps, rate, parts, Look(self.accelerator, losses, self._weights())))
        while len(self.looks) > (0 if wait or self.waits else 1):
            self._show(*self.looks.popleft(), bar)

    def _show(self, step: int, rate: float, parts: dict[str, int], seen: Look, bar: tqdm[Any]) -> None:
        """Show the mean of the losses of a look, and raise `NotFinite` unless they and the weights were finite.

        `parts` says how many of each part of the loss there are behind the losses.
        """
        losses, finite = seen.read()
        start = len(losses) - sum(parts.values())
        self.progress.losses = losses[:start]
        for name, count in parts.items():
            self.progress.parts[name] = losses[start : start + count]
            start += count
        loss = self.progress.loss()
        if not finite:
            raise not_finite(step, loss, rate, self.last_checkpoint, option=self.option)
        bar.set_postfix(loss=f"{loss:.4f}", lr=f"{rate:.1e}")
        self.accelerator.log({"loss": loss, "lr": rate} | self.progress.means(), step=step)

    def finished(self, kind: Any) -> Any:
        """Return the resumed run's report, of this kind, if nothing is left to do; the report is written last."""
        if self.folder is None or self.last_checkpoint is None or not (self.folder / kind.file).is_file():
            return None
        report = kind.read(self.folder)
        if report.steps != self.total_steps:
            return None
        with self._alone():
            logger.info(f"{self.folder} is complete, after {self.total_steps} steps: there is nothing left to do.")
        return report

    def facts(self) -> dict[str, Any]:
        """Return what the report of a training says of the loop."""
        progress = self.progress
        images = progress.images - self.resumed.images
        seconds = progress.seconds - self.resumed.seconds
        return {
            "steps": progress.steps,
            "loss_last_100_batches": progress.loss(),
            "parts_last_100_batches": progress.means(),
            "images": progress.images,
            "images_this_run": images,
            "seconds": round(progress.seconds, 1),
            "seconds_this_run": round(seconds, 1),
            # Of the whole training, as a resumed run may have little left to do.
            "images_per_second": round(progress.images / progress.seconds, 1),
            **machine(self.accelerator.device.type, self.accelerator.num_processes),
        }

    def _count_seconds(self) -> None:
        self.progress.seconds = self.resumed.seconds + time.monotonic() - self.started

    def averaged(self) -> Any:
        """Return `average`, which has the averaged weights of this step; where it is sharded, each process its part."""
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
            if self.shards is not None:
                save_moments(partial / "state" / PARTS, self.raw(), self.optimizer)
            accelerator.wait_for_everyone()  # every process has written its random state: the folder can be renamed
            if accelerator.is_main_process:
                write_json(partial / PROGRESS, dataclasses.asdict(self.progress))
                self.averages.write(partial / "state" / AVERAGES)
            if self.save is not None and (accelerator.is_main_process or self.shards is not None):
                self.save(partial)
            if accelerator.is_main_process:
                note_files(partial)
                if final.exists():
                    discard(final)
                partial.rename(final)
                if self.checkpoints_total_limit is not None:
                    others = [old for old in saved_checkpoints(folder) if old != final]
                    for old in others[::-1][self.checkpoints_total_limit - 1 :]:
                        discard(old)
                logger.info(f"Saved {final}.")
        accelerator.wait_for_everyone()
        self.last_checkpoint = final

    def raw(self) -> Any:
        """Return the module as it came, with the weights that the optimiser left."""
        return self.accelerator.unwrap_model(self.module, keep_torch_compile=False)

    def whole(self, network: Any) -> Any:
        """Return `averaged()` or `raw()` with all weights; a sharded one in the first process alone, elsewhere None.

        Where it is sharded every process has to call this, and the copy is in the processor's memory.
        """
        return network if self.shards is None else self.shards.whole(network)
