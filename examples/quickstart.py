"""The main job on real handwritten digits, in a few minutes on a CPU: pretrain, generate, classify.

    python examples/quickstart.py --output_dir runs/quickstart

Writes scikit-learn's 1,797 digits of 8x8 pixels as a parquet data set, then runs the scripts that a user runs, and
shows what came out. Only training images are ever trained on; labels are used by the classifiers alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image, ImageOps
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC

from ddae_hf.experiments.plots import image_grid

EXAMPLES = Path(__file__).parent
NUM_SAMPLES = 100

CLASSIFY = """\
from PIL import Image; from ddae_hf import DDAEForImageClassification as Model, DDAEImageProcessor as Processor
model, processor = Model.from_pretrained("{folder}"), Processor.from_pretrained("{folder}")
print(model.config.id2label[model(**processor(Image.open("{image}"), return_tensors="pt")).logits.argmax().item()])
"""


def write_digits(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Write the digits as parquet files, 80 % for training, and return images (N, 8, 8) from 0 to 255 and labels."""
    digits = load_digits()
    images = np.round(digits.images * 255 / 16).astype(np.uint8)
    parts = train_test_split(images, digits.target, test_size=0.2, random_state=0, stratify=digits.target)
    splits = {"train": (parts[0], parts[2]), "test": (parts[1], parts[3])}
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=[str(i) for i in range(10)])})
    folder.mkdir(parents=True, exist_ok=True)
    for name, (x, y) in splits.items():
        columns = {"image": [Image.fromarray(image) for image in x], "label": y.tolist()}
        Dataset.from_dict(columns, features).to_parquet(folder / f"{name}.parquet")
    return splits


def run(script: str, *options: Any, launch: bool = False) -> None:
    """Show the command that runs a script of this folder, and run it; on all cores with accelerate, if asked for."""
    command = [sys.executable]
    if launch:
        config = EXAMPLES / "accelerate_configs" / "single.yaml"
        command += ["-m", "accelerate.commands.launch", "--config_file", str(config)]
        command += ["--num_cpu_threads_per_process", str(os.cpu_count())]
    command += [str(word) for word in (EXAMPLES / script, *options)]
    print(f"\n$ {shlex.join(command)}", flush=True)
    subprocess.run(command, check=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})


def recognised(splits: dict[str, tuple[np.ndarray, np.ndarray]], samples: np.ndarray) -> dict[str, int]:
    """Count the images that a classifier of real digits names with confidence over 0.9: samples, real ones, noise."""
    (images, labels), (test_images, test_labels) = ((x.reshape(len(x), -1) / 255.0, y) for x, y in splits.values())
    rng = np.random.default_rng(0)
    # An eleventh class, digits with their pixels shuffled, so that what is no digit need not be named as one.
    shuffled, none = rng.permuted(images, axis=1), np.full(len(images), 10)
    judge = CalibratedClassifierCV(SVC(), ensemble=False)
    judge.fit(np.concatenate([images, shuffled]), np.concatenate([labels, none]))
    groups = {
        "generated": samples.reshape(len(samples), -1) / 255.0,
        "real test images": test_images[:NUM_SAMPLES],
        "test images with their pixels shuffled": rng.permuted(test_images[:NUM_SAMPLES], axis=1),
    }
    counts = {name: int((judge.predict_proba(x)[:, :10].max(axis=1) > 0.9).sum()) for name, x in groups.items()}
    accuracy = 100 * judge.score(test_images, test_labels)
    print(f"\nA support vector machine on real digits' pixels is right for {accuracy:.1f} % of test images.")
    print(f"Of {NUM_SAMPLES} images it names with confidence over 0.9:")
    print("\n".join(f"  {name}: {count}" for name, count in counts.items()))
    return counts


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output_dir", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--max_train_steps", type=int, help="Fewer steps than the configuration's, to try it out.")
    args = parser.parse_args(argv)
    folder = args.output_dir
    data, checkpoint, classifier = folder / "digits", folder / "checkpoint", folder / "classifier"
    splits = write_digits(data)
    for old in (checkpoint, classifier, folder / "samples"):
        shutil.rmtree(old, ignore_errors=True)
    config = ["--config", EXAMPLES / "configs" / "digits.yaml"]
    steps = ["--max_train_steps", args.max_train_steps] if args.max_train_steps else []
    run("pretrain.py", *config, "--dataset_name", data, "--output_dir", checkpoint, *steps, launch=True)
    model = ["--model_name_or_path", checkpoint]
    size = ["--num_images", NUM_SAMPLES, "--batch_size", NUM_SAMPLES]
    run("generate.py", *model, *size, "--output_dir", folder / "samples")
    probe = ["--sigmas", 0.1, 0.2, "--num_noise_samples", 4, "--few_labels", 10, "--baselines"]
    run("linear_probe.py", *model, "--dataset_name", data, *probe, "--output_dir", classifier)
    samples = [Image.open(folder / "samples" / f"{i:05d}.png") for i in range(NUM_SAMPLES)]
    real = [Image.fromarray(image) for image in splits["test"][0]]
    grids = [image_grid(images[:64], columns=8, min_side=48) for images in (samples, real)]
    grids = [ImageOps.expand(grid, 12, "white") for grid in grids]
    image_grid(grids, columns=2).save(folder / "samples_beside_real.png")
    counts = recognised(splits, np.stack([np.asarray(image) for image in samples]))
    (folder / "recognised.json").write_text(json.dumps(counts, indent=2) + "\n")
    image = folder / "test_image.png"
    real[0].save(image)
    print(f"\nGenerated images beside real ones: {folder / 'samples_beside_real.png'}")
    print(f"The checkpoint, a generator:        {checkpoint}")
    print(f"The same network as a classifier:   {classifier}")
    code = CLASSIFY.format(folder=classifier.as_posix(), image=image.as_posix())
    print(f"\nClassify an image (this one is a {splits['test'][1][0]}):\n\n{code}")
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    print(f"It prints: {result.stdout.strip()}")


if __name__ == "__main__":
    main()
