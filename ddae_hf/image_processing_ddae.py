"""`DDAEImageProcessor`: any image in, `pixel_values` in [-1, 1] of the denoiser's size and channel count out."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from huggingface_hub.dataclasses import validate_typed_dict
from PIL import Image, ImageOps
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import ChannelDimension, PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs

from .building import refusing
from .checkpoints import read_checkpoint
from .class_maps import maps_of_classes, read_mask, single_masks
from .image_values import (
    channels_first,
    checked_values,
    convert_channels,
    from_pil,
    read_pixels,
    single_images,
    upright,
)
from .latents import downsampling
from .network_class import height_and_width
from .weights import HUB_ARGUMENTS, read_json

# Options of transformers' image processors that have no effect here, and why.
WITHOUT_EFFECT = {
    "do_pad": "images are brought to one size",
    "pad_size": "images are brought to one size",
    "device": "images are prepared on the CPU, and `.to(device)` moves the result",
    "disable_grouping": "it is for processors that run on a GPU",
    "image_seq_length": "it is for language models",
}
# What preprocessor_config.json says besides the options.
NO_OPTIONS = {"transformers_version", "image_processor_type", "feature_extractor_type", "processor_class", "auto_map"}


class DDAEImageProcessorKwargs(ImagesKwargs, total=False):
    """The options of transformers' image processors, and the number of channels."""

    num_channels: int


class DDAEImageProcessor(PilBackend):
    """Prepares images for `DDAEModel`, with Pillow and NumPy alone.

    It takes files, PIL images of any mode, and arrays or tensors (H, W), (H, W, C) or (C, H, W), singly or in lists,
    and batches (N, C, H, W) or (N, H, W, C), of any size. It returns `pixel_values` (B, num_channels, height, width) in
    [-1, 1]: colours are turned to grey for one channel, grey is repeated for three, and transparency is dropped; any
    other number of channels must be the images' own. PIL images are turned upright, as their EXIF orientation says.

    The type alone says how values are read: uint8 and other integers count from 0 to 255, uint16 from 0 to 65,535 (as
    do PIL's modes `I` and `I;16`, in which Pillow opens 16-bit files), and floats from 0 to 1 (as does PIL's mode `F`).
    An array that can be read in two ways is refused: (2, H, W) may be two grey images, or one with transparency. Images
    at web addresses are fetched by transformers, which keeps only 8 bits. `transformers.pipeline` does the same to
    files and PIL images, before this class sees them: a 16-bit image comes out white, so pass it as an array.

    Args:
        size: `{"height": ..., "width": ...}` in pixels.
        num_channels: Channels of the denoiser's images.
        do_center_crop: Whether images of another shape keep their proportions: they are resized so that they just cover
            `size`, and their centre is cut out. Otherwise they are squashed to `size`. It is true by default, but false
            for processors that version 0.1.0 saved, which squashed images.
        do_resize: Without it, images are only cut if `do_center_crop` is true, and otherwise stay as they are.
        do_rescale: False says that values are floats from 0 to 1 already, as torchvision's `ToTensor` makes them. With
            `do_normalize=False` too, integers and PIL images keep their own values.
        resample: Pillow's filter for images of another size; bilinear by default.
        data_format: `"channels_last"` gives (B, height, width, num_channels).
        **kwargs: The other options of transformers' image processors; those that have no effect here are refused.
    """

    valid_kwargs = DDAEImageProcessorKwargs
    resample = PILImageResampling.BILINEAR
    image_mean = 0.5
    image_std = 0.5
    size = {"height": 32, "width": 32}
    num_channels = 3
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True

    def __init__(self, **kwargs: Any):
        options = {name: value for name, value in kwargs.items() if name not in NO_OPTIONS and name[0] != "_"}
        allowed = self.valid_kwargs.__annotations__
        if unknown := sorted(options.keys() - allowed.keys()):
            raise ValueError(f"An image processor has no options {unknown}: allowed are {sorted(allowed)}.")
        with refusing("The options of the image processor cannot be used"):
            validate_typed_dict(self.valid_kwargs, _given(options))  # type: ignore[type-var]
            super().__init__(**kwargs)

    @classmethod
    def for_denoiser(cls, config: Any, vae: Any = None, **kwargs: Any) -> DDAEImageProcessor:
        """Return the processor of a denoiser, from its diffusers config or a mapping like it, and from its VAE's."""
        return cls(**_options_for(config, vae), **kwargs)

    @classmethod
    def get_image_processor_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict, dict]:
        """Return a checkpoint's options, from `preprocessor_config.json` or, where it has none, from its denoiser."""
        hub = _given(kwargs)
        if read_json(os.fspath(pretrained_model_name_or_path), "preprocessor_config.json", hub) is not None:
            return super().get_image_processor_dict(pretrained_model_name_or_path, **kwargs)
        checkpoint = read_checkpoint(pretrained_model_name_or_path, **hub)
        options = _options_for(checkpoint.denoiser, checkpoint.vae) | {"do_center_crop": cls.do_center_crop}
        return options, {k: v for k, v in kwargs.items() if k not in HUB_ARGUMENTS}

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the processor that saved options describe; options in `kwargs` take precedence."""
        # Version 0.1.0 had no such option, and squashed images.
        options = {"do_center_crop": False} | _given(image_processor_dict)
        with refusing("The options of the image processor cannot be used"):
            return super().from_dict(options, **_given(kwargs))

    def save_pretrained(self, save_directory: str | os.PathLike[str], include_code: bool = False, **kwargs: Any) -> Any:
        """Write `preprocessor_config.json`, as in transformers; `include_code` as in `DDAEModel.save_pretrained`."""
        vars(self).pop("auto_map", None)  # it is written again below, where it is wanted
        if not include_code or self._auto_class is not None:
            return super().save_pretrained(save_directory, **kwargs)
        # transformers writes the code of a class that is registered, in time for its push.
        type(self).register_for_auto_class()
        try:
            return super().save_pretrained(save_directory, **kwargs)
        finally:
            type(self)._auto_class = None

    def preprocess(self, images: Any, segmentation_maps: Any = None, **kwargs: Any) -> BatchFeature:
        """Return the `pixel_values` of images; an option that is None keeps the processor's value.

        `segmentation_maps` are masks, one for each image and of its size: PIL images or arrays (H, W), with the number
        of a class for each pixel. They are resized and cut like the images, without mixing classes, and returned as
        `labels` (B, height, width), int64.
        """
        return super().preprocess(images, segmentation_maps, **_given(kwargs))

    def post_process_semantic_segmentation(self, outputs: Any, target_sizes: Any = None) -> list[torch.Tensor]:
        """Return the class of every pixel (H, W), int64, of each image.

        Args:
            outputs: What `DDAEForSemanticSegmentation` returned, with its `logits`.
            target_sizes: Heights and widths of the maps, one pair for each image, as its own size before it was
                prepared; by default the logits' size.

        Raises:
            ValueError: Another number of sizes, or a size of which the processor cuts out the centre, so that the
                logits are not of the whole image.
        """
        if target_sizes is None:
            return maps_of_classes(outputs.logits)
        sizes = [(int(height), int(width)) for height, width in target_sizes]
        if len(sizes) != len(outputs.logits):
            raise ValueError(
                f"There are {len(outputs.logits)} images and {len(sizes)} target_sizes: give one for each."
            )
        rows, columns = self.size["height"], self.size["width"]
        for height, width in sizes:
            whole = height * columns == width * rows if self.do_resize else (height, width) == (rows, columns)
            if self.do_center_crop and not whole:
                raise ValueError(
                    f"Of an image of {height}x{width} pixels only the centre is left, in the proportions of {rows}x"
                    f"{columns}, since the image processor has do_center_crop: open it with do_center_crop=False, so "
                    "that the model sees the whole image."
                )
        return maps_of_classes(outputs.logits, sizes)

    def _standardize_kwargs(self, **kwargs: Any) -> dict[str, Any]:
        options = super()._standardize_kwargs(**kwargs)
        _check_options(options)
        return options | {"crop_size": None}  # the crop has the `size`, which a call may change

    def _validate_preprocess_kwargs(self, **kwargs: Any) -> None:
        super()._validate_preprocess_kwargs(**kwargs | {"crop_size": kwargs["size"]})

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Open files here, since transformers would keep only 8 bits; it fetches what web addresses name."""
        if isinstance(image_url_or_urls, str) and os.path.isfile(image_url_or_urls):
            return Image.open(image_url_or_urls)
        return super().fetch_images(image_url_or_urls)

    def _prepare_image_like_inputs(self, images: Any, *args: Any, **kwargs: Any) -> list[np.ndarray]:
        images = self.fetch_images(images)
        found = list(single_images(images, kwargs["num_channels"], kwargs["input_data_format"]))
        if not found:
            raise ValueError("No image came: pass at least one.")
        return [self.process_image(image, **kwargs) for image in found]

    def _preprocess_image_like_inputs(self, images: Any, segmentation_maps: Any = None, **kwargs: Any) -> BatchFeature:
        found = self._prepare_image_like_inputs(images, **kwargs)
        if segmentation_maps is None:
            return self._preprocess(found, **kwargs)
        masks = list(single_masks(self.fetch_images(segmentation_maps)))
        if len(masks) != len(found):
            raise ValueError(f"There are {len(found)} images and {len(masks)} segmentation_maps: give one for each.")
        turned = (upright(mask) if isinstance(mask, Image.Image) else mask for mask in masks)
        read = [read_mask(mask, image.shape[1:]) for mask, image in zip(turned, found, strict=True)]
        batch = self._preprocess(found, **kwargs | {"return_tensors": None})
        batch["labels"] = self.fit_masks(read, **kwargs)
        return BatchFeature(batch.data, tensor_type=kwargs["return_tensors"])

    def fit_masks(self, masks: list[np.ndarray], **kwargs: Any) -> list[np.ndarray]:
        """Return masks (H, W) of whole images, int32 as `read_mask` gives them, resized and cut like these, int64.

        Options in `kwargs` take precedence over the processor's own.
        """
        options = {name: getattr(self, name) for name in ("size", "do_resize", "do_center_crop")} | kwargs
        options |= {"do_rescale": False, "do_normalize": False, "data_format": None, "return_tensors": None}
        options |= {"resample": PILImageResampling.NEAREST}
        planes = self._preprocess([mask[None] for mask in masks], **options)["pixel_values"]
        return [plane[0].astype(np.int64) for plane in planes]

    def process_image(self, image: Any, input_data_format: Any = None, **kwargs: Any) -> np.ndarray:
        """Return one image as (num_channels, H, W): uint8 or float32 with values from 0 to 255.

        Floats that are not to be rescaled keep values from 0 to 1.
        """
        options = {n: getattr(self, n) for n in ("num_channels", "do_rescale", "do_normalize")} | _given(kwargs)
        channels, rescale, of_pil = options["num_channels"], options["do_rescale"], isinstance(image, Image.Image)
        if isinstance(image, torch.Tensor):
            image = (image.float() if image.is_floating_point() else image).detach().cpu().numpy()
        if options["do_normalize"] and not rescale and (of_pil or image.dtype.kind != "f"):
            kind = f"a PIL image of mode {image.mode}" if of_pil else f"an image of type {image.dtype}"
            raise ValueError(
                f"do_rescale=False says that values are floats from 0 to 1 already, but {kind} came: leave do_rescale "
                "out, or pass do_normalize=False too, with which such images keep their own values."
            )
        if of_pil:
            return read_pixels(image, channels)
        image = checked_values(channels_first(image, input_data_format, channels), 255 if rescale else 1)
        if image.dtype == np.uint8 and image.shape[0] <= 4:
            pixels = np.ascontiguousarray(np.moveaxis(image, 0, -1))
            return from_pil(Image.fromarray(pixels[..., 0] if image.shape[0] == 1 else pixels), channels)
        return convert_channels(image, channels)

    def resize(
        self, image: np.ndarray, size: SizeDict, resample: Any = None, crop: bool = False, **kwargs: Any
    ) -> np.ndarray:
        """Resize (C, H, W) with Pillow, floats without rounding; an image that has the size already stays as it is.

        With `crop`, cut an image of another shape so that it keeps its proportions; otherwise squash it.
        """
        shape = (size["height"], size["width"])
        if image.shape[1:] == shape:
            return image
        filter = PILImageResampling.BILINEAR if resample is None else resample
        fit = ImageOps.fit if crop else Image.Image.resize
        return np.stack([np.asarray(fit(Image.fromarray(plane), shape[::-1], filter)) for plane in image])

    def center_crop(self, image: np.ndarray, size: SizeDict, **kwargs: Any) -> np.ndarray:
        """Return the centre of (C, H, W), or refuse an image that is smaller."""
        height, width = image.shape[1:]
        rows = size["height"]
        columns = size["width"]
        if height < rows or width < columns:
            raise ValueError(
                f"An image of {height}x{width} pixels came, which is too small to cut {rows}x{columns} pixels out of "
                "it: leave do_resize out, or pass do_center_crop=False too."
            )
        top, left = (height - rows) // 2, (width - columns) // 2
        return image[:, top : top + rows, left : left + columns]

    def _preprocess(self, images: list[np.ndarray], size: SizeDict, **options: Any) -> BatchFeature:
        """Resize each image; scale and shift those of one size together."""
        crop = options["do_center_crop"]
        if options["do_resize"]:
            images = [self.resize(image, size, options["resample"], crop) for image in images]
        elif crop:
            images = [self.center_crop(image, size) for image in images]
        alike = len({image.shape for image in images}) == 1
        batches = [np.stack(images)] if alike else [image[None] for image in images]
        if options["do_rescale"]:
            batches = [batch * np.float32(options["rescale_factor"]) for batch in batches]
        if options["do_normalize"]:
            mean, std = (np.asarray(options[n], np.float32).reshape(-1, 1, 1) for n in ("image_mean", "image_std"))
            batches = [(batch - mean) / std for batch in batches]
        if options["data_format"] == ChannelDimension.LAST:
            batches = [np.ascontiguousarray(np.moveaxis(batch, 1, -1)) for batch in batches]
        pixel_values = batches[0] if alike else [batch[0] for batch in batches]
        return BatchFeature({"pixel_values": pixel_values}, tensor_type=options["return_tensors"])


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _options_for(denoiser: Any, vae: Any = None) -> dict[str, Any]:
    denoiser, factor = dict(denoiser), 1 if vae is None else downsampling(vae)
    side = denoiser.get("sample_size")
    if side is None:
        raise ValueError("The denoiser's config has no sample_size: pass size={'height': ..., 'width': ...} in pixels.")
    height, width = height_and_width(side)
    channels = dict(denoiser if vae is None else vae).get("in_channels", 3)
    return {"size": {"height": height * factor, "width": width * factor}, "num_channels": channels}


def _check_options(options: dict[str, Any]) -> None:
    for name, reason in WITHOUT_EFFECT.items():
        value = options.get(name)
        if value not in (None, False) and (name != "device" or str(value) != "cpu"):
            raise ValueError(f"{name} is {value}, which has no effect here ({reason}): leave it out.")
    size, crop_size, channels = options["size"], options["crop_size"], options["num_channels"]
    if set(dict(size)) != {"height", "width"} or min(size.height, size.width) < 1:
        raise ValueError(
            f"size is {dict(size)}: it must give only 'height' and 'width', the ones that the denoiser was made for."
        )
    if crop_size is not None and dict(crop_size) != dict(size):
        raise ValueError(f"crop_size is {dict(crop_size)}: it must equal size, {dict(size)}, or be left out.")
    if not isinstance(channels, int) or channels < 1:
        raise ValueError(f"num_channels is {channels}: it must be a whole number, at least 1.")
    if options["do_convert_rgb"] not in (None, channels == 3):
        raise ValueError(
            f"do_convert_rgb is {options['do_convert_rgb']}, but num_channels, {channels}, says what images are turned "
            "into: leave do_convert_rgb out."
        )
    for name in ("data_format", "input_data_format"):
        if options[name] not in (None, ChannelDimension.FIRST, ChannelDimension.LAST):
            raise ValueError(f"{name} is {options[name]!r}: allowed are 'channels_first' and 'channels_last'.")
    for name in ("image_mean", "image_std"):
        values = np.asarray(options[name], np.float64)
        if values.shape not in ((), (1,), (channels,)) or not np.isfinite(values).all():
            raise ValueError(
                f"{name} is {options[name]}: it must be one number, or {channels} numbers, as many as num_channels."
            )
    if not np.all(options["image_std"]):
        raise ValueError(f"image_std is {options['image_std']}: it must not be 0.")
