"""Denoising diffusion autoencoders: one checkpoint that generates images and classifies them.

Importing it makes transformers' Auto classes, and so its pipelines, know the model type `ddae`. Other public names are
imported when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from transformers import AutoBackbone, AutoConfig, AutoModel, AutoModelForImageClassification

# The top level has a stand-in for it where torchvision is missing, in older versions.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .backbone_ddae import DDAEBackbone
from .configuration_ddae import DDAEConfig
from .image_processing_ddae import DDAEImageProcessor
from .modeling_ddae import DDAEForImageClassification, DDAEModel

__version__ = "0.3.0"

_MODULES = {
    "DDAEPipeline": "pipeline_ddae",
    "add_noise": "noise",
    "collect_hidden_states": "hidden_states",
    "layer_names": "hidden_states",
    "pool_hidden_states": "hidden_states",
    "sigma_to_timestep": "noise",
    "timestep_to_sigma": "noise",
}
__all__ = [  # noqa: F822 (found by `__getattr__`)
    "DDAEBackbone",
    "DDAEConfig",
    "DDAEForImageClassification",
    "DDAEImageProcessor",
    "DDAEModel",
    "DDAEPipeline",
    "add_noise",
    "collect_hidden_states",
    "layer_names",
    "pool_hidden_states",
    "sigma_to_timestep",
    "timestep_to_sigma",
]

if TYPE_CHECKING:
    from .hidden_states import collect_hidden_states, layer_names, pool_hidden_states
    from .noise import add_noise, sigma_to_timestep, timestep_to_sigma
    from .pipeline_ddae import DDAEPipeline

AutoConfig.register("ddae", DDAEConfig, exist_ok=True)
AutoModel.register(DDAEConfig, DDAEModel, exist_ok=True)
AutoModelForImageClassification.register(DDAEConfig, DDAEForImageClassification, exist_ok=True)
AutoBackbone.register(DDAEConfig, DDAEBackbone, exist_ok=True)
AutoImageProcessor.register(DDAEConfig, image_processor_classes={"pil": DDAEImageProcessor}, exist_ok=True)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
