"""What a network makes of an image at every place of it: feature maps, and places that are alike in two images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..experiments.correspondences import at_pixels, main_directions, match
from ..experiments.draws import indexed_noise
from ..image_processing_ddae import DDAEImageProcessor
from ..modeling_ddae import DDAEModel
from ..networks import tap_of
from .pictures import feature_maps, figures, heated, notice, spots, to_pil
from .uploads import as_mnist, open_upload

CHANNELS = 5  # of a hidden state that are shown


def whole_number(name: str, value: Any, low: int, high: int) -> int:
    """Return the whole number of a field, or raise `ValueError` for anything else, and outside of the range."""
    if not is_number(value) or not low <= value <= high or value != int(value):
        raise ValueError(f"{name} is {'empty' if value is None else value}: give a whole number from {low} to {high}.")
    return int(value)


def is_number(value: Any) -> bool:
    """Return whether a field holds a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


class Maps:
    """What the page shows of any network. Nothing in it changes between calls.

    Attributes:
        network: The network that is read.
        processor: What prepares images for it.
    """

    network: DDAEModel
    processor: DDAEImageProcessor

    @property
    def examples(self) -> list[Image.Image]:
        """Images to click on."""
        raise NotImplementedError

    @property
    def sketched(self) -> bool:
        """Whether the network's images can be drawn on the page."""
        return False

    @property
    def tap(self) -> tuple[str, float]:
        """The layer and the noise level of the network's own configuration: those of the classifier, if it has one."""
        return self.network.config.layer, self.network.config.sigma

    @property
    def dense_layer(self) -> str:
        """The layer whose features two images are compared by at first: the encoder's last of a quarter of their size.

        Its features tell parts of what is shown apart; those of larger layers, edges and strokes. A network without an
        encoder has the layer of `tap`.
        """
        taps = {name: tap_of(self.network.denoiser, name) for name in self.network.layer_names()}
        encoder = [name for name, tap in taps.items() if name.startswith("down_blocks.") and tap.stride <= 4]
        return (encoder or [self.tap[0]])[-1]

    def pick(self, given: Mapping[str, Any]) -> Tensor:
        """Return the image that was drawn, sent, or clicked on, as the network takes it: (1, C, H, W).

        Raises:
            ValueError: It is none; the message is for who sent it.
        """
        if "example" in given:
            number = str(given["example"])
            if not number.isdecimal() or int(number) >= len(self.examples):
                raise ValueError(f"There is no test image {number}: click on one of those that the page shows.")
            image = self.examples[int(number)]
        elif "drawing" in given:
            image = as_mnist(open_upload(given["drawing"]), self.network.config.image_size[0])
        elif "file" in given:
            image = open_upload(given["file"])
        else:
            raise ValueError("No image came: draw one, send a file, or click on one of the test images.")
        return self.processor(image, return_tensors="pt")["pixel_values"]

    def check_level(self, sigma: Any) -> None:
        """Raise `ValueError` unless a field holds a noise level of the network's schedule."""
        if not is_number(sigma):
            raise ValueError(f"The noise level is {'empty' if sigma is None else sigma}: give a number.")
        self.network.diffusion.family.check_sigma(sigma)

    @torch.no_grad()
    def on_grid(self, images: Tensor, layer: str, sigma: float) -> Tensor:
        """Return the hidden states (B, C, h, w) of images (B, C, H, W), each with noise of its own."""
        model = self.network
        diffusion = model.diffusion
        shape = model.config.sample_shape
        noise = torch.cat([indexed_noise(shape, [0], model.config.noise_seed, view) for view in range(len(images))])
        clean = model.encode(images.to(model.device))
        found = model.read_layers(clean, [layer], sigma=sigma, noise=noise.to(model.device))[layer]
        return diffusion.network.on_grid(found, tap_of(diffusion.denoiser, layer), shape[1:])

    def layer_maps(self, image: Tensor, layer: str, sigma: float) -> str:
        """Return the feature maps of an image (1, C, H, W) in a layer, at a noise level."""
        return figures(*feature_maps(self.on_grid(image, layer, sigma)[0], CHANNELS), 104)

    def compare(self, image: Tensor, example: int, layer: str, sigma: float, point: tuple[float, float] | None) -> str:
        """Return an image (1, C, H, W) beside a test image, both by a layer's features, and where a point is found.

        `point` is a place in the image, of its width and height; without one it is where the image is least like its
        mean.
        """
        try:
            self.check_level(sigma)
            images = torch.cat([image, self.pick({"example": example})])
        except ValueError as error:
            return notice(str(error))
        size = images.shape[-2:]
        if point is None:
            place = int((image[0] - image.mean((0, 2, 3))[:, None, None]).abs().sum(0).argmax())
            x, y = place % size[1], place // size[1]
        else:
            x, y = (min(int(share * side), side - 1) for share, side in zip(point, size[::-1], strict=True))
        maps = self.on_grid(images, layer, sigma)
        first, second = at_pixels(maps, size)
        found = match(first, second, torch.tensor([complex(x, y)]))[0]
        likeness = torch.einsum("c,chw->hw", first[:, y, x], second)
        colours = F.interpolate(main_directions(maps), tuple(size), mode="bilinear")
        shown = [to_pil(image[0]), heated(to_pil(images[1]), likeness), *(to_pil(2 * each - 1) for each in colours)]
        captions = ["Click a point of your image", "Here the features are most like that point's"]
        captions += ["Main directions of the features: like colours, like features", "The same directions here"]
        places = [(x, y), (int(found.real), int(found.imag)), None, None]
        return spots(shown, captions, places, size)
