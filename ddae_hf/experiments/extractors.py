"""The networks whose features generated images are compared by.

- `ddae:PATH`: the pooled hidden state of a denoiser, of a checkpoint in any layout. Compare generators by one and the
  same checkpoint; a generator's own features may be blind to its faults.
- `transformers:PATH`: a vision model of transformers, with its image processor. It is given RGB of 8 bits, as
  Inception is: images of 16 bits are scaled.
- `inception`, or `inception:FILE` (`.safetensors` or `.pth`): the Inception network of the published FID, in
  torch-fidelity's conversion, which needs torch-fidelity and torchvision. The network itself resizes images. We have
  not computed a FID by this path yet.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel

# Imported by its module: without torchvision, which it does not need, some versions hide the name in the package.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from ..hidden_states import pool_hidden_states
from ..image_values import as_rgb
from ..weights import fingerprint
from .devices import best_device, made_fast
from .features import evaluating, extract_features, told_text
from .libraries import pip_line
from .models import open_model, open_processor

# Takes batches of images and the number of the draw of noise; returns features (N, C).
Compute = Callable[[Iterable[list[Image.Image]], int], torch.Tensor]
COLOURS = "RGB of 8 bits, as `as_rgb` gives them"  # features of images that were clipped to 8 bits are not reused


@dataclass
class Extractor:
    """A network whose features are compared."""

    identity: dict[str, Any]  # what features depend on besides the images, as JSON
    compute: Compute
    name: str  # the name by which it was asked for
    width: int  # of the features, C


def check_extractor(name: str, layer: str | None = None, sigma: float | None = None) -> None:
    """Raise `ValueError` for a name of no extractor, and for a layer or noise level of a kind that has none."""
    kind, _, path = name.partition(":")
    if kind not in EXTRACTORS or not (path or kind == "inception"):
        raise ValueError(f"extractor is {name}: allowed are ddae:PATH, transformers:PATH, inception[:FILE].")
    if kind != "ddae" and (layer is not None or sigma is not None):
        raise ValueError(f"extractor_layer and extractor_sigma are for a DDAE extractor, not for {kind}.")


def open_extractor(
    name: str, *, layer: str | None = None, sigma: float | None = None, cache_dir: str | None = None
) -> Extractor:
    """Return an extractor on the best device there is, tried on an image, or raise `ValueError`.

    `layer` and `sigma` are for a DDAE extractor, by default those of its configuration.
    """
    check_extractor(name, layer, sigma)
    kind, _, path = name.partition(":")
    try:
        identity, compute = EXTRACTORS[kind](path, layer, sigma, cache_dir)
        return Extractor(identity, compute, name, compute([[Image.new("RGB", (64, 64))]], 0).shape[1])
    except Exception as error:  # checkpoints and networks raise a dozen kinds of errors
        raise ValueError(f"extractor {name} cannot be used: {error}") from error


def _ddae(path: str, layer: str | None, sigma: float | None, cache_dir: str | None) -> tuple[dict[str, Any], Compute]:
    """Return pooled hidden states of a denoiser, under noise that depends on each image's number and the view."""
    model = open_model(path, layer=layer, sigma=sigma, cache_dir=cache_dir)
    processor = open_processor(path, cache_dir)
    config = model.config
    names = ["layer", "sigma", "pooling", "noise_seed", "num_noise_samples", "null_class", "denoiser", "scheduler"]
    names += [] if config.vae is None else ["vae", "sample_posterior"]

    def compute(batches: Iterable[list[Image.Image]], view: int) -> torch.Tensor:
        pixels = (processor(images, return_tensors="pt")["pixel_values"] for images in batches)
        found = extract_features(model, pixels, [config.layer], config.sigma, noise_seed=config.noise_seed, view=view)
        return found[config.layer]

    identity = _identity(processor, model.denoiser, model.vae)
    return identity | {name: getattr(config, name) for name in names} | told_text(model), compute


def open_vision_model(path: str, cache_dir: str | None = None) -> Any:
    """Return a vision model of transformers, float32 and in the processor's memory.

    Of a model of images and texts, such as CLIP, it is the part that sees. A pooler without weights is left out.

    Raises:
        ValueError: A model of something else, or weights that are missing.
        OSError: No such model.
    """
    model, info = AutoModel.from_pretrained(
        path, dtype=torch.float32, use_safetensors=True, output_loading_info=True, cache_dir=cache_dir
    )
    missing = sorted(name for name in info["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise ValueError(f"its weights {missing[:3]} are missing.")
    seeing = getattr(model, "vision_model", None)
    if model.main_input_name != "pixel_values" and seeing is not None:
        model = seeing
    if model.main_input_name != "pixel_values":
        raise ValueError(f"{type(model).__name__} takes {model.main_input_name}: give a model of images alone.")
    if info["missing_keys"]:
        model.pooler = None  # it would have random weights
    return model


def _transformers(path: str, layer: None, sigma: None, cache_dir: str | None) -> tuple[dict[str, Any], Compute]:
    """Return the pooled output of a vision model, or the mean of its last hidden state where it has none."""
    model = open_vision_model(path, cache_dir)
    processor = AutoImageProcessor.from_pretrained(path, backend="pil", cache_dir=cache_dir)
    made_fast(model, best_device()).to(best_device())

    @evaluating(model)
    def run(images: list[Image.Image]) -> Any:
        pixels = processor([as_rgb(image) for image in images], return_tensors="pt")["pixel_values"]
        return model(pixel_values=pixels.to(model.device))

    has_pooler = run([Image.new("RGB", (64, 64))]).get("pooler_output") is not None

    def features(images: list[Image.Image]) -> torch.Tensor:
        outputs = run(images)
        if has_pooler:
            return outputs.pooler_output.flatten(1).float().cpu()
        return pool_hidden_states(outputs.last_hidden_state).cpu()

    identity = _identity(processor, model) | {"colours": COLOURS}
    identity["features"] = "pooler_output" if has_pooler else "mean of last_hidden_state"
    return identity, lambda batches, view: torch.cat([features(images) for images in batches])


def _inception(path: str, layer: None, sigma: None, cache_dir: str | None) -> tuple[dict[str, Any], Compute]:
    """Return the 2048 features of the Inception network of the published FID; downloaded if no file is given."""
    try:
        from torch_fidelity import feature_extractor_inceptionv3 as fidelity
    except ImportError as error:
        needed = "it needs torch-fidelity, which needs a torchvision of your torch's build"
        raise ValueError(f"{needed}: {pip_line('inception', error.name)} ({error}).") from error
    if path.endswith(".safetensors"):
        state = load_file(path)
    elif path:
        state = torch.load(path, map_location="cpu", weights_only=True)
    else:
        state = torch.hub.load_state_dict_from_url(fidelity.URL_INCEPTION_V3, map_location="cpu", weights_only=True)
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        # torch-fidelity unpickles what it is given, so it is given weights that were read without unpickling.
        torch.save(state, file.name)
        network = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], file.name)
    made_fast(network, best_device()).to(best_device())

    @evaluating(network)
    def features(images: list[Image.Image]) -> torch.Tensor:
        arrays = [torch.from_numpy(np.array(as_rgb(image))).permute(2, 0, 1) for image in images]
        alike = len({array.shape for array in arrays}) == 1
        batches = [torch.stack(arrays)] if alike else [array[None] for array in arrays]
        return torch.cat([network(pixels.to(best_device()))[0].flatten(1).float().cpu() for pixels in batches])

    identity = _identity(None, network) | {"colours": COLOURS, "features": "last pooling"}
    return identity, lambda batches, view: torch.cat([features(images) for images in batches])


EXTRACTORS: dict[str, Callable[..., Any]] = {"ddae": _ddae, "transformers": _transformers, "inception": _inception}


def _identity(processor: Any, network: torch.nn.Module, vae: torch.nn.Module | None = None) -> dict[str, Any]:
    """Return what tells a network, with its VAE, and the preparation of its images from others."""
    return {
        "network": type(network).__name__,
        "weights": fingerprint(network, vae, dtype=None),
        "dtype": str(next(network.parameters()).dtype),
        "preprocessing": {k: v for k, v in processor.to_dict().items() if v is not None} if processor else {},
    }
