"""LoRA in fine-tuning: its options, the adapters that a training begins with, and what is saved of them."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..adapters import TARGETS
from ..modeling_ddae import DDAEForImageClassification
from .arrays import StrPath
from .images import SplitOptions
from .libraries import not_installed
from .options import option

OPEN_MODEL = "weights "  # how the origin of a run begins that was given an open model: then follows its fingerprint


@dataclass(kw_only=True)
class LoRAOptions(SplitOptions):
    """Options of LoRA, and those of the images."""

    lora_rank: int | None = option(
        None, "Train LoRA adapters of this rank and the classifier, on a frozen network; needs peft."
    )
    lora_alpha: float | None = option(None, "Adapters are scaled by lora_alpha / lora_rank; by default that is 1.")
    lora_targets: list[str] | None = option(
        None, "What gets adapters: attention, convolutions or both; by default attention."
    )
    merge_lora: bool = option(False, "Save a plain classifier, with the adapters added to the weights.")


def check_low_rank(options: Any) -> None:
    """Refuse fine-tuning's options of LoRA that do not go together, and LoRA without peft."""
    if options.lora_rank is None:
        for name in ("lora_alpha", "lora_targets", "merge_lora"):
            if getattr(options, name) not in (None, False):
                raise ValueError(f"{name} is of LoRA, which lora_rank asks for: give that too, or leave {name} out.")
        return
    if wrong := [target for target in options.lora_targets or TARGETS if target not in TARGETS]:
        raise ValueError(f"lora_targets has {wrong[0]!r}: allowed are {', '.join(TARGETS)}.")
    if options.from_scratch:
        raise ValueError("from_scratch: adapters stand on pretrained weights, which stay as they are: leave it out.")
    if importlib.util.find_spec("peft") is None:
        raise ValueError(not_installed("lora_rank", "peft", "lora"))


def with_adapters(classifier: DDAEForImageClassification, path: str, options: Any) -> DDAEForImageClassification:
    """Return a classifier that was opened from a path with the adapters that fine-tuning's options ask for, if any.

    Raises:
        ValueError: The classifier has adapters already, or its network has nothing that could get those asked for.
    """
    if classifier.config.lora is not None:
        raise ValueError(
            f"{path} has adapters, which are not trained further: open it, call `merge_lora()` and `save_pretrained`, "
            "and fine-tune what that writes."
        )
    if options.lora_rank is not None:
        classifier.add_lora(options.lora_rank, options.lora_alpha, options.lora_targets or ["attention"])
    return classifier


def settled(classifier: DDAEForImageClassification, options: Any) -> DDAEForImageClassification:
    """Return a trained classifier in evaluation mode, with its adapters merged if `merge_lora` asks for that."""
    if options.merge_lora:
        classifier.merge_lora()
    return classifier.eval()


def write_classifier(classifier: DDAEForImageClassification, folder: StrPath, options: Mapping[str, Any]) -> None:
    """Write a fine-tuned classifier: the whole of it or, of one with adapters, these and the head.

    The base of adapters is the checkpoint that the training began with, which `options`, those of the run, name. If
    that was an open model, which has no place, the whole classifier is written, with the adapters in it.
    """
    base = str(options["model_name_or_path"])
    if classifier.config.lora is None or base.startswith(OPEN_MODEL):
        classifier.save_pretrained(folder)
    else:
        classifier.save_head(folder, base, cache_dir=options["cache_dir"])
