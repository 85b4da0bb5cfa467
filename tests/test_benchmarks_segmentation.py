"""Digits pasted onto photographs: their masks, what tests share with training, and the ways that are compared."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import segmentation

ROOT = Path(__file__).parent.parent


def test_digits_are_pasted_where_their_masks_say():
    """Each mask holds one digit; away from its strokes the photograph is as it was, and all is drawn by the seed."""
    images, masks = segmentation.pasted(20, "train", 0)
    numbers = set()
    for image, mask in zip(images, masks, strict=True):
        assert image.size == mask.size == (32, 32) and image.mode == "RGB"
        background, *digits = np.unique(np.asarray(mask))
        assert background == 0 and len(digits) == 1
        numbers.update(digits)
    assert len(numbers) > 4 and max(numbers) <= 10
    again, _ = segmentation.pasted(20, "train", 0)
    assert [image.tobytes() for image in again] == [image.tobytes() for image in images]
    others, _ = segmentation.pasted(20, "test", 0)
    assert not {image.tobytes() for image in others} & {image.tobytes() for image in images}


def test_test_images_are_of_other_halves_and_other_digits(monkeypatch):
    """The left half of each photograph is made black, and the right one white: no image mixes them."""
    photo = np.zeros((60, 120, 3), np.uint8)
    photo[:, 60:] = 255
    monkeypatch.setattr(segmentation, "PHOTOS", [photo, photo])
    monkeypatch.setattr(segmentation, "CROPS", (32, 40))
    drawn = {"train": [], "test": []}
    given = {split: (np.full((1, 8, 8), 0 if split == "train" else 1, np.uint8), np.array([3])) for split in drawn}
    monkeypatch.setattr(segmentation, "digits", lambda: given)
    for split, shade in (("train", 0), ("test", 255)):
        for image in segmentation.pasted(10, split, 0)[0]:
            assert abs(np.asarray(image).astype(int) - shade).max() <= 1


@pytest.mark.slow
def test_all_ways_are_measured_on_the_same_images(tmp_path):
    options = ["--train_images", 32, "--test_images", 4, "--pretrain_steps", 1, "--max_train_steps", 1]
    command = [sys.executable, "-m", "benchmarks.segmentation", "--output_dir", tmp_path, *options]
    done = subprocess.run([*map(str, command)], check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    found = json.loads((tmp_path / "results.json").read_text())["scores"]
    names = ["DDAE", "untrained network", "pixels' colours", "5x5 patches", "DDAE, fine-tuned"]
    assert list(found) == [*names, "all weights from scratch"]
    for name, scores in found.items():
        assert 0 <= scores["mean_iou"] <= 1 and f"| {name} | {100 * scores['mean_iou']:.2f} |" in done.stdout
    assert found["DDAE"]["trained"] == found["untrained network"]["trained"] < found["DDAE, fine-tuned"]["trained"]
    assert (tmp_path / "masks.png").is_file()
