"""Pretrain a denoiser on real handwritten digits, generate from it and classify with it, in a few minutes on a CPU.

    ddae quickstart

The command writes 5,000 digits of MNIST as a data set, runs the commands that a user would run, and shows the results.
Only training images are ever trained on, and only the classifiers use labels. What exists already is kept, and an
interrupted run goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import io
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from ..experiments.arrays import write_json
from ..experiments.digits import Judge, Splits, mnist, shuffled_pixels, write_digits
from ..experiments.options import Options, option
from ..experiments.plots import image_grid
from ..experiments.report import markdown, spread
from ..experiments.results import PretrainingReport, ProbeReport
from .main import main as run
from .parsing import find_config, read_config

CONFIG = "mnist"
NUM_SAMPLES = 100
SECONDS_A_STEP = 0.25  # of the training, on two CPU cores
CLASSIFY = """\
from PIL import Image
from ddae_hf import DDAEForImageClassification, DDAEImageProcessor

model = DDAEForImageClassification.from_pretrained({folder!r})
processor = DDAEImageProcessor.from_pretrained({folder!r})
inputs = processor(Image.open({image!r}), return_tensors="pt")
print(model.config.id2label[model(**inputs).logits.argmax().item()])
"""
NEXT = """
What to do next:
  ddae sweep --model_name_or_path {checkpoint} --dataset_name {data} --pooling mean_2x2 --output_dir {sweep}
      every layer at every noise level, as a map
  ddae demo --model_name_or_path {checkpoint} --classifier {classifier} --sweep {sweep}
      a page in the browser: generate, draw a digit, look at layers and noise levels
  ddae pretrain --train_data_dir PHOTOS --output_dir runs/mine
      your own images: any folder of them, without labels"""


@dataclass(kw_only=True)
class Arguments(Options):
    """Where the results go, and how long the training takes."""

    output_dir: str = option("runs/quickstart", "Folder of all results; what it holds already is kept.")
    max_train_steps: int | None = option(
        None, "Training steps in place of the configuration's; a finished folder cannot change their number."
    )


KINDS = (Arguments,)


def main(options: Arguments) -> None:
    """Run the command."""
    folder = Path(options.output_dir)
    data, checkpoint, samples, classifier = (folder / n for n in ("digits", "checkpoint", "samples", "classifier"))
    if samples.exists() and not (checkpoint / PretrainingReport.file).is_file():
        raise ValueError(f"{samples} holds images of a network that is gone: remove that folder, and start again.")
    wanted = options.max_train_steps or read_config(find_config(CONFIG))["max_train_steps"]
    digits = mnist()
    write_digits(data, digits)
    check_steps(checkpoint, wanted)
    steps: list[Any] = []
    if options.max_train_steps is not None:  # the last step's checkpoint says that nothing is left to train
        steps = ["--max_train_steps", wanted, "--checkpointing_steps", wanted]
    model = ["--model_name_or_path", checkpoint]
    count = len(digits["train"][0])
    announce(f"1 of 4: a network learns to denoise {count:,} digits, without labels", wanted * SECONDS_A_STEP)
    show("pretrain", "--config", CONFIG, "--dataset_name", data, *steps, "--resume_from_checkpoint", "latest",
         "--output_dir", checkpoint)  # fmt: skip
    announce(f"2 of 4: it draws {NUM_SAMPLES} digits, from noise", 10)
    show("generate", *model, "--num_images", NUM_SAMPLES, "--batch_size", NUM_SAMPLES, "--output_dir", samples)
    announce("3 of 4: a linear classifier reads its features, beside raw pixels and an untrained network", 60)
    show("probe", *model, "--dataset_name", data, "--sigmas", 0.1, 0.2, "--pooling", "mean_2x2", "--few_labels", 10,
         "--baselines", "--output_dir", classifier)  # fmt: skip
    announce("4 of 4: what came out", 10)
    compare(folder, digits, [Image.open(samples / f"{number:05d}.png") for number in range(NUM_SAMPLES)])
    classify(folder / "test_image.png", digits, classifier)
    print(f"\nTest accuracy of linear probes, in %:\n\n{summary(ProbeReport.read(classifier))}")
    print(f"\nThe checkpoint, a generator:        {checkpoint}")
    print(f"The same network as a classifier:   {classifier}")
    places = {"data": data, "checkpoint": checkpoint, "classifier": classifier, "sweep": folder / "sweep"}
    print(NEXT.format(**{name: shlex.quote(str(place)) for name, place in places.items()}))


def summary(report: ProbeReport) -> str:
    """Return the test accuracies of the network's features and of what they are compared with, as a small table."""
    rows = [
        [name, *map(spread, ([*probe.test_accuracies.values()], *probe.few_label_test_accuracies.values()))]
        for name, probe in {"hidden states": report, **report.baselines}.items()
    ]
    few = [f"{count} labels a class" for count in report.few_label_test_accuracies]
    return markdown(["features", f"all {report.images['train']:,} labels", *few], rows)


def check_steps(checkpoint: Path, wanted: int) -> None:
    """Raise `ValueError` if a finished training had other steps, since its samples would be an older network's."""
    if not (checkpoint / PretrainingReport.file).is_file():
        return
    done = PretrainingReport.read(checkpoint).steps
    if done != wanted:
        raise ValueError(
            f"{checkpoint} was trained for {done} steps, but {wanted} are asked for: give max_train_steps {done}, "
            "which keeps it, or another output_dir."
        )


def announce(title: str, seconds: float) -> None:
    """Say what is done next, and how long it takes on two CPU cores."""
    time = f"{seconds / 60:.0f} min" if seconds > 90 else f"{max(10, round(seconds, -1)):.0f} s"
    print(f"\n=== {title} (about {time} on two CPU cores)", flush=True)


def show(name: str, *options: Any) -> None:
    """Show a command as a user types it, and run it."""
    words = [name, *map(str, options)]
    print(f"\n$ ddae {shlex.join(words)}", flush=True)
    run(words)


def compare(folder: Path, digits: Splits, samples: list[Image.Image]) -> None:
    """Put generated digits beside real ones, and count those that a judge recognises."""
    judge = Judge(digits)
    test = digits["test"][0]
    counts = {
        "generated": judge.recognised(samples),
        "real test images": judge.recognised(test[:NUM_SAMPLES]),
        "test images with their pixels shuffled": judge.recognised(shuffled_pixels(test[:NUM_SAMPLES])),
    }
    write_json(folder / "recognised.json", counts)
    print(f"\nA support vector machine on real digits' pixels recognises {judge.accuracy:.1f} % of the test images.")
    print(f"Of {NUM_SAMPLES} images of each kind, it names so many with a confidence over 0.9:")
    print("\n".join(f"  {name}: {count}" for name, count in counts.items()))
    grids = [image_grid(images[:64], columns=8, min_side=48) for images in (samples, list(map(Image.fromarray, test)))]
    picture = folder / "samples_beside_real.png"
    image_grid([ImageOps.expand(grid, 12, "white") for grid in grids], columns=2).save(picture)
    print(f"\nGenerated images beside real ones: {picture}")


def classify(image: Path, digits: Splits, classifier: Path) -> None:
    """Show the lines that classify an image, run them, and show what they print."""
    images, labels = digits["test"]
    Image.fromarray(images[0]).save(image)
    code = CLASSIFY.format(folder=classifier.as_posix(), image=image.as_posix())
    print(f"\nClassify an image in Python (this one is a {labels[0]}):\n\n{code}")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(code, "quickstart", "exec"), {})
    print(f"It prints: {said.getvalue().strip()}")
