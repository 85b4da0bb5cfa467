"""Denoising diffusion autoencoders: one checkpoint that generates images and classifies them.

Importing the package registers the model type `ddae` with transformers' Auto classes, which its pipelines use.
`DDAEPipeline` is imported when it is first used.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
)

# In older versions, transformers' top level has only a stand-in for it where torchvision is missing.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES

from .backbone_ddae import DDAEBackbone
from .configuration_ddae import DDAEConfig
from .hidden_states import collect_hidden_states, layer_names, pool_hidden_states
from .image_processing_ddae import DDAEImageProcessor
from .modeling_ddae import DDAEForImageClassification, DDAEModel
from .noise import add_noise, sigma_to_timestep, timestep_to_sigma
from .prompts import embed_prompts
from .segmentation_ddae import DDAEForSemanticSegmentation

if TYPE_CHECKING:
    from .pipeline_ddae import DDAEPipeline

__version__ = "0.3.0"
# Folder of a small checkpoint that ships with the package: it draws and classifies handwritten digits.
DIGITS_CHECKPOINT = str(Path(__file__).parent / "digits_checkpoint")

__all__ = [
    "DIGITS_CHECKPOINT",
    "DDAEBackbone",
    "DDAEConfig",
    "DDAEForImageClassification",
    "DDAEForSemanticSegmentation",
    "DDAEImageProcessor",
    "DDAEModel",
    "DDAEPipeline",
    "add_noise",
    "collect_hidden_states",
    "embed_prompts",
    "layer_names",
    "pool_hidden_states",
    "sigma_to_timestep",
    "timestep_to_sigma",
]

AutoConfig.register("ddae", DDAEConfig, exist_ok=True)
AutoModel.register(DDAEConfig, DDAEModel, exist_ok=True)
AutoModelForImageClassification.register(DDAEConfig, DDAEForImageClassification, exist_ok=True)
AutoModelForSemanticSegmentation.register(DDAEConfig, DDAEForSemanticSegmentation, exist_ok=True)
# The pipeline "image-segmentation" looks here which models it supports, and not among those that are registered.
MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES.setdefault("ddae", DDAEForSemanticSegmentation.__name__)
AutoBackbone.register(DDAEConfig, DDAEBackbone, exist_ok=True)
AutoImageProcessor.register(DDAEConfig, image_processor_classes={"pil": DDAEImageProcessor}, exist_ok=True)


def __getattr__(name: str) -> Any:
    if name != "DDAEPipeline":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .pipeline_ddae import DDAEPipeline

    return DDAEPipeline


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
