"""`DDAEImageProcessor`: any image in, `pixel_values` in [-1, 1] of the denoiser's size and channel count out."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import ChannelDimension, PILImageResampling, SizeDict, infer_channel_dimension_format
from transformers.processing_utils import ImagesKwargs

from .checkpoints import HUB_ARGUMENTS, find_file, read_checkpoint
from .latents import downsampling


class DDAEImageProcessorKwargs(ImagesKwargs, total=False):
    """The options of transformers' image processors, and the number of channels."""

    num_channels: int


class DDAEImageProcessor(PilBackend):
    """Prepares images for `DDAEModel`, with Pillow and NumPy alone.

    Takes PIL images of any mode, and arrays or tensors (H, W), (H, W, C) or (C, H, W), singly, in lists or in
    batches, of any size. Integers count from 0 to 255 (16-bit ones to 65,535), floats from 0 to 1. Gives `pixel_values`
    (B, num_channels, height, width) in [-1, 1]: colours are turned to grey for one channel, grey is repeated for three,
    transparency is dropped.

    Args:
        size: `{"height": ..., "width": ...}` in pixels.
        num_channels: Channels of the denoiser's images.
        resample: Pillow's filter for images of another size; bilinear by default.
        **kwargs: The other options of transformers' image processors.
    """

    valid_kwargs = DDAEImageProcessorKwargs
    resample = PILImageResampling.BILINEAR
    image_mean = 0.5
    image_std = 0.5
    size = {"height": 32, "width": 32}
    num_channels = 3
    do_resize = True
    do_rescale = True
    do_normalize = True

    @classmethod
    def for_denoiser(cls, config: Any, vae: Any = None, **kwargs: Any) -> DDAEImageProcessor:
        """Return the processor of a denoiser, from its diffusers config or a mapping like it, and that of its VAE."""
        return cls(**_options_for(config, vae), **kwargs)

    @classmethod
    def get_image_processor_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict, dict]:
        """Return a checkpoint's options, from `preprocessor_config.json` or, where it has none, from its denoiser."""
        hub = {k: v for k, v in kwargs.items() if v is not None}
        if find_file(pretrained_model_name_or_path, "preprocessor_config.json", **hub):
            return super().get_image_processor_dict(pretrained_model_name_or_path, **kwargs)
        checkpoint = read_checkpoint(pretrained_model_name_or_path, **hub)
        return _options_for(checkpoint.denoiser, checkpoint.vae), {
            k: v for k, v in kwargs.items() if k not in HUB_ARGUMENTS
        }

    def save_pretrained(self, save_directory: str | os.PathLike[str], include_code: bool = False, **kwargs: Any) -> Any:
        """Write `preprocessor_config.json`, as in transformers; `include_code` as in `DDAEModel.save_pretrained`."""
        vars(self).pop("auto_map", None)  # what is written again below, where it is wanted
        if not include_code or self._auto_class is not None:
            return super().save_pretrained(save_directory, **kwargs)
        # transformers writes the code of a class that is registered so, in time for its push.
        type(self).register_for_auto_class()
        try:
            return super().save_pretrained(save_directory, **kwargs)
        finally:
            type(self)._auto_class = None

    def _prepare_images_structure(self, images: Any, expected_ndims: int = 3) -> Any:
        if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 2:
            images = images[None]
        if isinstance(images, (list, tuple)) and not images:
            raise ValueError("No image came: pass at least one.")
        if isinstance(images, (list, tuple)):
            images = [x[None] if isinstance(x, (np.ndarray, torch.Tensor)) and x.ndim == 2 else x for x in images]
        return super()._prepare_images_structure(images, expected_ndims)

    def process_image(self, image: Any, input_data_format: Any = None, **kwargs: Any) -> np.ndarray:
        """Return one image as (num_channels, H, W), uint8 or float32 counting from 0 to 255."""
        channels = kwargs.get("num_channels") or self.num_channels
        if isinstance(image, Image.Image):
            if image.mode.startswith("I") or image.mode == "F":
                return self.process_image(np.asarray(image), num_channels=channels)
            return _from_pil(image, channels)
        if isinstance(image, torch.Tensor):
            image = (image.float() if image.is_floating_point() else image).detach().cpu().numpy()
        image = np.asarray(image)
        if image.ndim == 2:
            image = image[None]
        elif (
            input_data_format or infer_channel_dimension_format(image, (1, 2, 3, 4, channels))
        ) == ChannelDimension.LAST:
            image = np.moveaxis(image, -1, 0)
        image = _count_to_255(image)
        if image.dtype == np.uint8 and image.shape[0] <= 4:
            pixels = np.ascontiguousarray(np.moveaxis(image, 0, -1))
            return _from_pil(Image.fromarray(pixels[..., 0] if image.shape[0] == 1 else pixels), channels)
        return _convert_channels(image, channels)

    def resize(self, image: np.ndarray, size: SizeDict, resample: Any = None, **kwargs: Any) -> np.ndarray:
        """Resize (C, H, W) with Pillow, floats without rounding; an image of that size already stays as it is."""
        if not (size.height and size.width):
            raise ValueError(
                f"size is {size}: it must name 'height' and 'width', the size that the denoiser was made for."
            )
        if image.shape[1:] == (size.height, size.width):
            return image
        filter = PILImageResampling.BILINEAR if resample is None else resample
        planes = [Image.fromarray(plane).resize((size.width, size.height), filter) for plane in image]
        return np.stack([np.asarray(plane) for plane in planes])

    def _preprocess(
        self,
        images: list[np.ndarray],
        do_resize: bool,
        size: SizeDict,
        resample: Any,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: Any,
        image_std: Any,
        return_tensors: Any,
        **kwargs: Any,
    ) -> BatchFeature:
        """Resize each image; scale and shift those of one size together."""
        if do_resize:
            images = [self.resize(image, size, resample) for image in images]
        alike = len({image.shape for image in images}) == 1
        batches = [np.stack(images)] if alike else [image[None] for image in images]
        if do_rescale:
            batches = [batch * np.float32(rescale_factor) for batch in batches]
        if do_normalize:
            mean, std = (np.asarray(value, np.float32).reshape(-1, 1, 1) for value in (image_mean, image_std))
            batches = [(batch - mean) / std for batch in batches]
        pixel_values = batches[0] if alike else [batch[0] for batch in batches]
        return BatchFeature({"pixel_values": pixel_values}, tensor_type=return_tensors)


def _options_for(denoiser: Any, vae: Any = None) -> dict[str, Any]:
    denoiser, factor = dict(denoiser), 1 if vae is None else downsampling(vae)
    side = denoiser.get("sample_size")
    if side is None:
        raise ValueError("The denoiser's config has no sample_size: pass size={'height': ..., 'width': ...} in pixels.")
    height, width = (side, side) if isinstance(side, int) else side
    channels = dict(denoiser if vae is None else vae).get("in_channels", 3)
    return {"size": {"height": height * factor, "width": width * factor}, "num_channels": channels}


def _from_pil(image: Image.Image, channels: int) -> np.ndarray:
    """Return a PIL image as uint8 (channels, H, W)."""
    mode = {1: "L", 3: "RGB"}.get(channels)
    if mode is None and len(image.getbands()) != channels:
        raise ValueError(f"An image of mode {image.mode} came: it cannot be turned into {channels} channels.")
    if mode is not None and image.mode != mode:
        image = image.convert(mode)
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)


def _count_to_255(image: np.ndarray) -> np.ndarray:
    """Return an array's values counted from 0 to 255, as uint8 or float32; refuse those that fit no way of counting."""
    if image.dtype == np.uint8:
        return image
    if image.dtype == bool:
        return image.astype(np.uint8) * 255
    low, high = image.min(), image.max()
    if np.issubdtype(image.dtype, np.integer):
        if low >= 0 and high <= 255 and image.dtype != np.uint16:
            return image.astype(np.uint8)
        if low >= 0 and high <= 65535:
            return image.astype(np.float32) / 257
    elif np.issubdtype(image.dtype, np.floating) and low >= -1e-4 and high <= 1 + 1e-4:
        return image.astype(np.float32) * 255
    raise ValueError(
        f"An image of type {image.dtype} with values from {low} to {high} came: allowed are integers from 0 to 255 "
        "(16-bit ones to 65535) and floats from 0 to 1. Images in [-1, 1] are `pixel_values` already, or need `x / 2 "
        "+ 0.5`."
    )


def _convert_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """Return float (C, H, W) with another number of channels, by Pillow's rules."""
    if image.shape[0] == channels:
        return image
    colours = image[:-1] if image.shape[0] in (2, 4) else image
    if colours.shape[0] == channels:
        return colours
    if colours.shape[0] == 1 and channels == 3:
        return np.repeat(colours, 3, axis=0)
    if colours.shape[0] == 3 and channels == 1:
        return np.tensordot(np.array([[0.299, 0.587, 0.114]], image.dtype), colours, axes=1)
    raise ValueError(f"An image of {image.shape[0]} channels came: it cannot be turned into {channels} channels.")
