"""A Space: a folder with the page, the package, and what the page shows, which runs as it is."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import yaml

from .. import DIGITS_CHECKPOINT
from ..experiments.images import DataOptions
from .views import Demo, DemoOptions

PACKAGE = Path(__file__).parent.parent
TEMPLATE = Path(__file__).parent / "template"
# Where a Space has what these options name.
PLACES = {
    "model_name_or_path": "checkpoint",
    "classifier": "classifier",
    "sweep": "sweep",
    "features_dir": "features",
    "dataset_name": "images",
}


def lay_space(folder: str | os.PathLike[str], data: DataOptions, options: DemoOptions) -> str:
    """Lay a Space in a folder, new or empty, and return why it has no sweep, or nothing if it has one.

    The Space has the images, those of a folder that is `dataset_name`, and `options` as its `demo.yaml`, with the
    places that things have in it.

    Raises:
        ValueError: A data set that is no folder, a folder that has something in it, or what cannot be opened.
        OSError: No such checkpoint, or no space left.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: give space_dir a new folder.")
    if data.dataset_name is None or not Path(data.dataset_name).is_dir():
        raise ValueError(
            f"dataset_name is {data.dataset_name}, which is no folder: a Space holds its images, so give their folder."
        )
    demo = Demo(options, data.open(options.cache_dir))
    without_caches = shutil.ignore_patterns("__pycache__")
    shutil.copytree(TEMPLATE, folder, ignore=without_caches, dirs_exist_ok=True)
    apart = shutil.ignore_patterns("__pycache__", Path(DIGITS_CHECKPOINT).name)  # the Space has what it shows beside it
    shutil.copytree(PACKAGE, folder / "ddae_hf", ignore=apart)
    demo.pipeline.save_pretrained(folder / "checkpoint")
    demo.model.save_pretrained(folder / "classifier")
    demo.processor.save_pretrained(folder / "classifier")
    shutil.copytree(data.dataset_name, folder / "images")
    if demo.sweep is not None:
        # Its checkpoint and options name places of this machine.
        dataclasses.replace(demo.sweep, checkpoint=None, options={}).write(folder / "sweep")
    defaults = DataOptions().to_dict() | DemoOptions().to_dict()
    del defaults["cache_dir"]
    given = data.to_dict() | options.to_dict()
    changed = {name: given[name] for name, default in defaults.items() if given[name] != default}
    text = yaml.safe_dump(changed | PLACES, sort_keys=False)
    (folder / "demo.yaml").write_text(f"# What the page shows: options of `ddae demo`.\n{text}", encoding="utf-8")
    return demo.sweep_missing
