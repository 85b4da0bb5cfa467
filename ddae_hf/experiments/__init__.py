"""Experiments as functions of (model, images, options): for notebooks, scripts and commands alike.

    from ddae_hf.experiments import Images, sweep

    images = Images.open("uoft-cs/cifar10")
    result = sweep("google/ddpm-cifar10-32", images, sigmas=[0.02, 0.05, 0.1, 0.2])
    print(result.table())

All experiments are called alike, `sweep(model, images, options=None, **changes)`. A model is a checkpoint's folder or
Hub id, in any layout, or an open model, whose weights stay as they are. Images are those of `Images.open`, or anything
that it takes. Options are a dataclass, by default `SweepOptions()`, in which `changes` replaces fields by name. Nothing
here prints, parses arguments or leaves global random generators changed. Names are imported when first used; the
libraries that they need besides `ddae_hf` are installed by `pip install '.[experiments]'`, from a clone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_ROOMS = {
    "converting": ("ConversionOptions", "convert"),
    "correspondences": ("CorrespondenceOptions", "find_correspondences", "main_directions"),
    "cross_attention": ("word_maps",),
    "diffusion_classification": ("DenoisingClassifierOptions", "classify_by_denoising"),
    "encoding": ("EncodingOptions", "encode"),
    "evaluation": ("EvaluationOptions", "evaluate_generation"),
    "feature_export": ("ExportOptions", "export_features"),
    "finetuning": ("FinetuningOptions", "finetune"),
    "generation": ("GenerationOptions", "generate"),
    "images": ("Images",),
    "noisy_classification": ("NoisyOptions", "classify_noisy"),
    "outlier_detection": ("OutlierOptions", "detect_outliers"),
    "pretraining": ("PretrainingOptions", "pretrain"),
    "publishing": ("make_card", "save_card"),
    "rebuilding": ("RebuildingOptions", "rebuild_average"),
    "results": ("Report",),
    "segmenting": ("SegmentationOptions", "segment"),
    "sweeping": ("SweepOptions", "sweep"),
    "training_curve": ("CurveOptions", "sweep_run"),
    "transferring": ("TransferOptions", "transfer"),
    "vae_training": ("VAEOptions", "train_vae"),
}
_MODULES = {name: room for room, names in _ROOMS.items() for name in names}
__all__ = [
    "ConversionOptions", "CorrespondenceOptions", "CurveOptions", "DenoisingClassifierOptions", "EncodingOptions",
    "EvaluationOptions", "ExportOptions", "FinetuningOptions", "GenerationOptions", "Images", "NoisyOptions",
    "OutlierOptions", "PretrainingOptions", "RebuildingOptions", "Report", "SegmentationOptions", "SweepOptions",
    "TransferOptions", "VAEOptions", "classify_by_denoising", "classify_noisy", "convert", "detect_outliers", "encode",
    "evaluate_generation", "export_features", "find_correspondences", "finetune", "generate", "main_directions",
    "make_card", "pretrain", "rebuild_average", "save_card", "segment", "sweep", "sweep_run", "train_vae", "transfer",
    "word_maps",
]  # fmt: skip

if TYPE_CHECKING:  # for type checkers and editors, which read no table
    from .converting import ConversionOptions, convert
    from .correspondences import CorrespondenceOptions, find_correspondences, main_directions
    from .cross_attention import word_maps
    from .diffusion_classification import DenoisingClassifierOptions, classify_by_denoising
    from .encoding import EncodingOptions, encode
    from .evaluation import EvaluationOptions, evaluate_generation
    from .feature_export import ExportOptions, export_features
    from .finetuning import FinetuningOptions, finetune
    from .generation import GenerationOptions, generate
    from .images import Images
    from .noisy_classification import NoisyOptions, classify_noisy
    from .outlier_detection import OutlierOptions, detect_outliers
    from .pretraining import PretrainingOptions, pretrain
    from .publishing import make_card, save_card
    from .rebuilding import RebuildingOptions, rebuild_average
    from .results import Report
    from .segmenting import SegmentationOptions, segment
    from .sweeping import SweepOptions, sweep
    from .training_curve import CurveOptions, sweep_run
    from .transferring import TransferOptions, transfer
    from .vae_training import VAEOptions, train_vae


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == __package__.partition(".")[0]:
            raise
        from .libraries import not_installed

        raise ImportError(not_installed(f"{__name__}.{name}", error.name, "experiments")) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
