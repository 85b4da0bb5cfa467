"""What one process does alone and two do together, for tests that compare them; as a script, what each of two does."""

import itertools
import json
import os
import signal
import sys
import zlib
from types import SimpleNamespace

import datasets
import torch
from accelerate.state import PartialState
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from ddae_hf import DDAEForImageClassification, DDAEImageProcessor
from ddae_hf.experiments import Images, pretraining
from ddae_hf.experiments.batches import BatchSizes, image_batches
from ddae_hf.experiments.sharing import this_process
from ddae_hf.experiments.training import Loop, accelerated

from . import commands
from .watch import watched


class CalmAdamW(torch.optim.AdamW):
    """AdamW, which would otherwise follow the sign of gradients that are nothing but rounding."""

    def __init__(self, parameters, lr=1e-3, **options):
        super().__init__(parameters, lr, **{"eps": 1e-4, **options})


def calm(patch):
    """Let trainings of this process compare with those of others, and note the images of each batch."""
    patch(torch.optim, "AdamW", CalmAdamW)
    patch(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # at the end of every epoch of a stream
    patch(pretraining, "training_inputs", watched(pretraining.training_inputs))


def train_plainly(folder, checkpoint, digits, checkpointing):
    """Fine-tune with transformers' own Trainer, eight images a step."""
    model = DDAEForImageClassification.from_pretrained(checkpoint, num_labels=10)
    torch.manual_seed(0)
    model.classifier.reset_parameters()
    processor = DDAEImageProcessor.from_pretrained(checkpoint)
    rows = Dataset.from_parquet(f"{digits}/train.parquet").select(range(40))
    pixels = processor(rows["image"][:], return_tensors="pt")["pixel_values"]
    noise = torch.randn(len(rows), 1, *pixels.shape[1:], generator=torch.Generator().manual_seed(0))
    names = ("pixel_values", "noise", "labels")
    data = [dict(zip(names, row, strict=True)) for row in zip(pixels, noise, rows["label"][:], strict=True)]
    processes = this_process().num_processes
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=8 // processes, max_steps=10, learning_rate=1e-3, use_cpu=True,
        gradient_checkpointing=checkpointing, remove_unused_columns=False, ddp_find_unused_parameters=False,
        report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip

    def together(rows):
        noise = torch.stack([row["noise"] for row in rows], dim=1)
        labels = torch.tensor([row["labels"] for row in rows])
        return {"pixel_values": torch.stack([row["pixel_values"] for row in rows]), "noise": noise, "labels": labels}

    optimizer = CalmAdamW([p for p in model.parameters() if p.requires_grad])
    Trainer(model, arguments, together, data, optimizers=(optimizer, None)).train()
    if PartialState().is_main_process:
        model.save_pretrained(folder)


def count_stream(path, folder, size, workers):
    """Note every image that each process gets of a stream in two epochs."""
    stream = Images.open(str(folder), streaming=True)["train"]
    processes = this_process().num_processes
    options = SimpleNamespace(seed=0, dataloader_num_workers=workers, shuffle_buffer=5)
    options.sizes = BatchSizes(size * processes, size, 1, processes)
    epochs = []
    with accelerated(mixed_precision="no") as accelerator:
        processor = DDAEImageProcessor(size={"height": 8, "width": 8}, num_channels=1)
        loader = accelerator.prepare(image_batches(stream, processor, options))
        for epoch in range(2):
            loader.set_epoch(epoch)
            epochs.append([[zlib.crc32(i.numpy().tobytes()) for i in batch["pixel_values"]] for batch in loader])
        with open(f"{path}-process-{accelerator.process_index}.json", "w") as file:
            json.dump(epochs, file)


def lose_a_process(*words):
    """Run a command of which the second process is killed in its twelfth batch."""
    begun, count = Loop.draws, itertools.count(1)

    def draws(loop, rows):
        if next(count) == 12 and loop.accelerator.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return begun(loop, rows)

    Loop.draws = draws
    commands.run(*words)


WORK = {"lose_a_process": lose_a_process, "train_plainly": train_plainly, "count_stream": count_stream}


def do(name, *words):
    """Run a command, or a function of this module."""
    if name in WORK:
        WORK[name](*words)
    else:
        commands.run(name, *words)


if __name__ == "__main__":
    calm(setattr)
    PartialState.destroy_process_group = lambda state: None  # the next command needs it
    for job in json.loads(sys.argv[1]):
        do(*job)
