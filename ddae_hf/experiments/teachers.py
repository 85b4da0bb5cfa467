"""Teachers: frozen networks that say what is where in an image, for a denoiser in training to be aligned with.

- A vision model of transformers, with the mean, the deviation and the size of its own image processor: one that gives
  tokens of patches, such as ViT, DINOv2, DINOv3 or the part of CLIP that sees, or feature maps, such as ResNet or
  ConvNeXt.
- A checkpoint of a denoiser, in any layout, at one layer and noise level. Its noise is the fixed one of `DDAEModel`, so
  that what it says depends on the image alone, as a vision model's answer does, and nothing is drawn in training.

A teacher is no module: it is no part of what is trained, moved or saved with the term that has it.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Imported by its module: without torchvision, which it does not need, some versions hide the name in the package.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from ..configuration_ddae import DDAEConfig
from ..networks import network_of, tap_of
from ..weights import fingerprint, read_json
from .auxiliary import Setting
from .devices import made_fast
from .extractors import open_vision_model
from .features import told_text
from .models import open_model

BILINEAR = 2  # Pillow's number of this way of resizing; all others are taken for the bicubic one
# What the features of a denoiser depend on besides its weights and the image.
READ_AT = "layer sigma noise_seed num_noise_samples sample_posterior null_class scheduler".split()


class Teacher(ABC):
    """A frozen network: what it says of images, and a hash of all that this depends on."""

    identity: str

    @abstractmethod
    def maps(self, clean: Tensor) -> Tensor:
        """Return maps (B, D, H, W), float32, of images (B, C, h, w) in [-1, 1], or of scaled latents."""


def open_teacher(path: str, layer: str | None, sigma: float | None, setting: Setting) -> tuple[Teacher, Tensor]:
    """Return a teacher, on the device of the training, and its maps (1, D, H, W) of an image that is all 0.

    Args:
        path: Folder or Hub id of a vision model, or of a checkpoint of a denoiser.
        layer: The layer of a denoiser that is read, by default its checkpoint's.
        sigma: The noise level at which it is read, likewise.
        setting: What the teacher is for.

    Raises:
        ValueError: A network that cannot be opened, that reads something else than the training's images or latents, or
            that gives no maps and no tokens of patches.
    """
    network = network_of(setting.denoiser)
    config = setting.denoiser.config
    try:
        teacher: Teacher
        if is_vision_model(path, setting.cache_dir):
            if layer is not None or sigma is not None:
                raise ValueError("encoder_layer and encoder_sigma are for a checkpoint of a denoiser: leave them out.")
            teacher = VisionTeacher(path, setting)
        else:
            teacher = DenoiserTeacher(path, layer, sigma, setting)
        with torch.no_grad():
            blank = torch.zeros(1, config.in_channels, *network.size(config), device=setting.device)
            return teacher, teacher.maps(blank)
    except Exception as error:  # checkpoints and networks raise a dozen kinds of errors
        raise ValueError(f"encoder {path} cannot be used: {error}") from error


def is_vision_model(path: str, cache_dir: str | None) -> bool:
    """Return whether a folder or repository holds a model of transformers that is none of this package."""
    where = {"cache_dir": cache_dir}
    config = read_json(path, "config.json", where) or {}
    kind = config.get("model_type")
    return kind not in (None, DDAEConfig.model_type) and read_json(path, "model_index.json", where) is None


class VisionTeacher(Teacher):
    """The last hidden state of a vision model; `ValueError` for latents and for images that are neither grey nor RGB.

    Tokens before those of the patches, which stand for classes or are registers, are left out.
    """

    def __init__(self, path: str, setting: Setting):
        if setting.latents is not None:
            raise ValueError(
                "it sees images, and the denoiser is trained on latents: give a checkpoint of a denoiser of these "
                "latents."
            )
        self.network = frozen(open_vision_model(path, setting.cache_dir), setting.device)
        self.preparation = Preparation.of(image_preparation(path, setting.cache_dir))
        self.identity = hash_of({**asdict(self.preparation), "weights": fingerprint(self.network, dtype=None)})

    def maps(self, clean: Tensor) -> Tensor:
        """Return maps, float32; `ValueError` where there are none."""
        pixels = self.preparation(clean)
        found = self.network(pixel_values=pixels).last_hidden_state.float()
        if found.ndim == 4:
            return found
        config = self.network.config
        sides = patch_sides(config)
        grid = (pixels.shape[2] // sides[0], pixels.shape[3] // sides[1])
        return on_patches(found, grid, getattr(config, "num_register_tokens", 0))


def image_preparation(path: str, cache_dir: str | None) -> Mapping[str, Any]:
    """Return what a vision model's image processor says of itself, or raise `OSError` where there is none.

    Some processors, such as DINOv3's, cannot be made without torchvision. Their file says all that is needed.
    """
    try:
        return AutoImageProcessor.from_pretrained(path, backend="pil", cache_dir=cache_dir).to_dict()
    except ImportError:
        return read_json(path, "preprocessor_config.json", {"cache_dir": cache_dir}) or {}


def patch_sides(config: Any) -> Sequence[int]:
    """Return height and width of the patches of a vision model's configuration, or raise `ValueError`."""
    size = getattr(config, "patch_size", None)
    sides = [size, size] if isinstance(size, int) else size
    if not isinstance(sides, (list, tuple)) or len(sides) != 2:
        raise ValueError("it gives tokens, and its configuration says no patch_size of images: they have no places.")
    return sides


def on_patches(tokens: Tensor, grid: tuple[int, int], registers: int = 0) -> Tensor:
    """Return the tokens of patches (B, N, D) as a map (B, D, height, width), without those that come before them.

    Raises:
        ValueError: Too few or too many tokens. Before the patches there may be a token of the class, another one that
            was distilled, and so many registers.
    """
    count = grid[0] * grid[1]
    before = tokens.shape[1] - count
    if before not in (0, 1, 2, 1 + registers):
        raise ValueError(
            f"it gives {tokens.shape[1]} tokens for {grid[0]} x {grid[1]} patches: those of the patches cannot be told "
            "from the others."
        )
    return tokens[:, before:].transpose(1, 2).unflatten(2, grid)


class DenoiserTeacher(Teacher):
    """A layer of a denoiser at a noise level, under the model's fixed noise; `ValueError` for what it cannot read.

    Where the training is on latents, its own must be of the same VAE. Where it is on images, a denoiser of latents
    encodes them.
    """

    def __init__(self, path: str, layer: str | None, sigma: float | None, setting: Setting):
        model = open_model(path, dtype="float32", cache_dir=setting.cache_dir, layer=layer, sigma=sigma)
        self.on_latents = setting.latents is not None
        if setting.latents is not None:
            if model.vae is None:
                raise ValueError("it sees images, and the denoiser is trained on latents: give one of these latents.")
            setting.latents.check_vae(model.vae)
        told = {name: getattr(model.config, name) for name in READ_AT} | told_text(model)
        self.identity = hash_of({**told, "weights": fingerprint(model.denoiser, model.vae, dtype=None)})
        if self.on_latents:
            model.vae = None  # latents come encoded
        self.model = frozen(model, setting.device)

    def maps(self, clean: Tensor) -> Tensor:
        """Return maps, float32; `ValueError` for other channels, or latents of another size."""
        config, denoiser = self.model.config, self.model.denoiser
        if not self.on_latents:
            clean = self.model.encode(resized(with_channels(clean, config.num_channels), config.image_size))
        elif clean.shape[1:] != config.sample_shape:
            raise ValueError(f"it reads latents of {config.sample_shape}, and those here are {tuple(clean.shape[1:])}.")
        hidden = self.model.read_layers(clean, [config.layer])[config.layer]
        place = tap_of(denoiser, config.layer)
        return network_of(denoiser).on_grid(hidden, place, config.sample_shape[1:]).float()


@dataclass(frozen=True)
class Preparation:
    """What an image processor of transformers makes of square images, as operations on a device.

    Images are resized to the size that the network gets, without cutting anything off: maps are compared place by
    place.
    """

    size: tuple[int, int]  # height and width
    mode: str  # of resizing
    factor: float  # of values from 0 to 255
    mean: tuple[float, ...]  # of the values that come, by channel
    std: tuple[float, ...]

    @classmethod
    def of(cls, known: Mapping[str, Any]) -> Preparation:
        """Return what an image processor's configuration says.

        Raises:
            ValueError: It says no size, or neither mean and deviation nor that there are none.
        """
        size = (known.get("crop_size") if known.get("do_center_crop") else None) or known.get("size") or {}
        height = size.get("height") or size.get("shortest_edge")
        width = size.get("width") or size.get("shortest_edge")
        if not height or not width:
            raise ValueError(f"its image processor says no size of images (it says {dict(size)}).")
        normalised = known.get("do_normalize", True)
        if normalised and not (known.get("image_mean") and known.get("image_std")):
            raise ValueError("its image processor says no image_mean and image_std.")
        return cls(
            size=(int(height), int(width)),
            mode="bilinear" if known.get("resample") == BILINEAR else "bicubic",
            factor=float(known.get("rescale_factor") or 1 / 255) if known.get("do_rescale", True) else 1.0,
            mean=tuple(known["image_mean"]) if normalised else (0.0,) * 3,
            std=tuple(known["image_std"]) if normalised else (1.0,) * 3,
        )

    def __call__(self, clean: Tensor) -> Tensor:
        """Return images (B, C, H, W) in [-1, 1] as the network takes them, (B, 3, *size)."""
        values = resized(with_channels(clean, len(self.mean)), self.size, self.mode)
        values = (values + 1) * (self.factor * 255 / 2)
        mean, std = (
            torch.tensor(each)[:, None, None].to(clean.device, non_blocking=True) for each in (self.mean, self.std)
        )
        return (values - mean) / std


def with_channels(clean: Tensor, channels: int) -> Tensor:
    """Return images with so many channels, of which grey ones have as many copies; `ValueError` for all others."""
    if clean.shape[1] == channels:
        return clean
    if clean.shape[1] != 1:
        raise ValueError(f"it reads images of {channels} channels, and those here have {clean.shape[1]}.")
    return clean.expand(-1, channels, -1, -1)


def resized(images: Tensor, size: tuple[int, int], mode: str = "bicubic") -> Tensor:
    """Return images (B, C, H, W) in [-1, 1] of another height and width, smoothed where they become smaller."""
    if tuple(images.shape[2:]) == tuple(size):
        return images
    return F.interpolate(images, size, mode=mode, antialias=True).clamp(-1, 1)  # beyond edges it overshoots


def frozen(network: Any, device: torch.device) -> Any:
    """Return a network on a device, in evaluation mode and without gradients."""
    return made_fast(network, device).to(device).requires_grad_(False).eval()


def hash_of(facts: Mapping[str, Any]) -> str:
    """Return a SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
