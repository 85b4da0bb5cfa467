"""Pretrain a denoiser on real handwritten digits, generate from it and classify with it, in a few minutes on a CPU.

    ddae quickstart

Writes scikit-learn's 1,797 digits of 8x8 pixels as a data set, then runs the commands that a user runs, and shows what
came out. Only training images are ever trained on; labels are used by the classifiers alone. What is there already is
kept, and an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from ..experiments.arrays import write_json
from ..experiments.digits import Judge, digits, shuffled_pixels, write_digits
from ..experiments.options import Options, option
from ..experiments.plots import image_grid
from ..experiments.results import PretrainingReport
from .main import main as run
from .parsing import find_config, read_config

CONFIG = "digits"
NUM_SAMPLES = 100
CLASSIFY = """\
from PIL import Image; from ddae_hf import DDAEForImageClassification as Model, DDAEImageProcessor as Processor
model, processor = Model.from_pretrained("{folder}"), Processor.from_pretrained("{folder}")
print(model.config.id2label[model(**processor(Image.open("{image}"), return_tensors="pt")).logits.argmax().item()])
"""


@dataclass(kw_only=True)
class Arguments(Options):
    """Where to, and how long."""

    output_dir: str = option("runs/quickstart", "Folder of all that is made; what it holds already is kept.")
    max_train_steps: int | None = option(
        None, "Steps in place of the configuration's 560, to try it out: a folder keeps to its number."
    )


KINDS = (Arguments,)


def main(options: Arguments) -> None:
    """Run the command."""
    folder = Path(options.output_dir)
    data, checkpoint, samples, classifier = (folder / n for n in ("digits", "checkpoint", "samples", "classifier"))
    if samples.exists() and not (checkpoint / PretrainingReport.file).is_file():
        raise ValueError(f"{samples} holds images of a network that is gone: remove that folder, and start again.")
    check_steps(checkpoint, options.max_train_steps)
    write_digits(data)
    steps: list[Any] = []
    if options.max_train_steps is not None:  # the last step's checkpoint says that nothing is left to train
        steps = ["--max_train_steps", options.max_train_steps, "--checkpointing_steps", options.max_train_steps]
    model = ["--model_name_or_path", checkpoint]
    show("pretrain", "--config", CONFIG, "--dataset_name", data, *steps, "--resume_from_checkpoint", "latest",
         "--output_dir", checkpoint)  # fmt: skip
    show("generate", *model, "--num_images", NUM_SAMPLES, "--batch_size", NUM_SAMPLES, "--output_dir", samples)
    show("probe", *model, "--dataset_name", data, "--sigmas", 0.1, 0.2, "--num_noise_samples", 4,
         "--few_labels", 10, "--baselines", "--output_dir", classifier)  # fmt: skip
    compare(folder, [Image.open(samples / f"{number:05d}.png") for number in range(NUM_SAMPLES)])
    print(f"The checkpoint, a generator:        {checkpoint}")
    print(f"The same network as a classifier:   {classifier}")
    classify(folder / "test_image.png", classifier)


def check_steps(checkpoint: Path, wanted: int | None) -> None:
    """Raise `ValueError` if a finished training had other steps: the samples beside it would be of an older network."""
    if not (checkpoint / PretrainingReport.file).is_file():
        return
    done = PretrainingReport.read(checkpoint).steps
    wanted = wanted or read_config(find_config(CONFIG))["max_train_steps"]
    if done != wanted:
        raise ValueError(
            f"{checkpoint} was trained for {done} steps, and {wanted} are asked for: give max_train_steps {done}, "
            "which keeps it, or another output_dir."
        )


def show(name: str, *options: Any) -> None:
    """Show a command as a user types it, and run it."""
    words = [name, *map(str, options)]
    print(f"\n$ ddae {shlex.join(words)}", flush=True)
    run(words)


def compare(folder: Path, samples: list[Image.Image]) -> None:
    """Put generated digits beside real ones, and count those that a judge recognises."""
    judge = Judge()
    test = digits()["test"][0]
    counts = {
        "generated": judge.recognised(samples),
        "real test images": judge.recognised(test[:NUM_SAMPLES]),
        "test images with their pixels shuffled": judge.recognised(shuffled_pixels(test[:NUM_SAMPLES])),
    }
    write_json(folder / "recognised.json", counts)
    print(f"\nA support vector machine on real digits' pixels is right for {judge.accuracy:.1f} % of test images.")
    print(f"Of {NUM_SAMPLES} images it names with confidence over 0.9:")
    print("\n".join(f"  {name}: {count}" for name, count in counts.items()))
    grids = [image_grid(images[:64], columns=8, min_side=48) for images in (samples, list(map(Image.fromarray, test)))]
    picture = folder / "samples_beside_real.png"
    image_grid([ImageOps.expand(grid, 12, "white") for grid in grids], columns=2).save(picture)
    print(f"\nGenerated images beside real ones: {picture}")


def classify(image: Path, classifier: Path) -> None:
    """Show the lines that classify an image, and what a new process prints that runs them."""
    images, labels = digits()["test"]
    Image.fromarray(images[0]).save(image)
    code = CLASSIFY.format(folder=classifier.as_posix(), image=image.as_posix())
    print(f"\nClassify an image (this one is a {labels[0]}):\n\n{code}")
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    print(f"It prints: {done.stdout.strip()}")
