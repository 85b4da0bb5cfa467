"""The auxiliary term that aligns a hidden state with a frozen network's view of the same image: see `auxiliary`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..networks import network_of, tap_of
from .auxiliary import Seen, Setting, Term, TermOptions, register
from .options import option
from .teachers import open_teacher
from .terms import on_one_grid

SMALL = 1e-6  # what iREPA adds to the deviation that it divides by


@dataclass(kw_only=True)
class AlignmentOptions(TermOptions):
    """Options of `RepresentationAlignment`."""

    encoder: str = option(
        help="Folder or Hub id of what is aligned with: a vision model of transformers, or a denoiser's checkpoint."
    )
    encoder_layer: str | None = option(None, "Layer of a denoiser that is aligned with; by default its checkpoint's.")
    encoder_sigma: float | None = option(None, "Noise level that this layer is read at; by default its checkpoint's.")
    weight: float = option(0.5, "What the term is multiplied by; 1 is usual with a convolution and normalise.")
    projection: Literal["mlp", "convolution"] = option(
        "mlp", "What the hidden state goes through: three layers at each position, or one convolution of 3x3."
    )
    hidden_size: int = option(2048, "Width inside the mlp.")
    normalise: bool = option(
        False, "Subtract the mean of each channel of an image's map from the network, and divide by its deviation."
    )
    mean_share: float = option(1.0, "Share of this mean that normalise subtracts; iREPA's code begins with 0.6.")

    def check(self) -> None:
        """Raise `ValueError` for a share of means that nothing subtracts."""
        if self.mean_share != 1.0 and not self.normalise:
            raise ValueError(f"mean_share is {self.mean_share:g}, and nothing is subtracted without normalise: true.")


@register
class RepresentationAlignment(Term):
    """Aligns a hidden state with the maps of a frozen network: REPA (Yu et al. 2024, arXiv 2410.06940).

    With the projected hidden state `h(z)` of the network in training, for the noisy image, and the frozen network's map
    `y` of the clean one, the term is minus the mean over images and positions of the cosine of the angle between them.
    The clean image is what the denoiser is trained on: it is mirrored and cropped like it.

    - `mlp` is REPA's projection: three linear layers with SiLU between them. The paper's weight is 0.5, its layer the
      eighth, its network DINOv2.
    - `convolution` with `normalise` and the weight 1 is iREPA (Singh et al. 2025, arXiv 2512.10794): a convolution of
      3x3, and each channel of `y` becomes `(y - mean_share mean(y)) / (std(y) + 1e-6)`, with mean and standard
      deviation over the image's positions. What is left is where something is, which is what the paper finds to help.
      Its code subtracts a share `gamma` of the mean, by default 0.6; the whole of it leaves nothing that all positions
      have in common.

    The larger one of the two maps is first averaged over the positions of the smaller one: an enlarged map would ask
    for details that the other one does not have, and so projections cost least.
    """

    kind = "representation_alignment"
    options_class = AlignmentOptions
    places = frozenset({"encoder"})

    def __init__(self, options: AlignmentOptions, setting: Setting):
        super().__init__(options, setting)
        self.network = network_of(setting.denoiser)
        self.tap = tap_of(setting.denoiser, options.layer)
        try:
            self.teacher, blank = open_teacher(options.encoder, options.encoder_layer, options.encoder_sigma, setting)
        except ValueError as error:
            raise ValueError(f"auxiliary: {self.kind}: {error}") from error
        own = [side // self.tap.stride for side in self.network.size(setting.denoiser.config)]
        grid = [min(sides) for sides in zip(own, blank.shape[2:], strict=True)]
        if options.normalise and grid == [1, 1]:
            raise ValueError(
                f"auxiliary: {self.kind}: normalise needs maps of several positions, and {options.layer} and the "
                "encoder's have one in common: leave it out, or give another layer or encoder."
            )
        channels = blank.shape[1]
        if options.projection == "convolution":
            self.projection: nn.Module = nn.Conv2d(self.tap.channels, channels, 3, padding=1)
        else:
            widths = [self.tap.channels, options.hidden_size, options.hidden_size, channels]
            layers = [nn.Conv2d(before, after, 1) for before, after in zip(widths, widths[1:], strict=False)]
            self.projection = nn.Sequential(layers[0], nn.SiLU(), layers[1], nn.SiLU(), layers[2])

    @property
    def identity(self) -> str:
        """A hash of the frozen network and of how it is read."""
        return self.teacher.identity

    def forward(self, seen: Seen) -> Tensor:
        """Return the term, float32 ()."""
        with torch.no_grad():
            wanted = self.teacher.maps(seen.clean)
        state = self.network.on_grid(seen.states[self.options.layer], self.tap, seen.clean.shape[2:])
        state, wanted = on_one_grid(state.float(), wanted)
        projected = self.projection(state)
        with torch.autocast(seen.sigma.device.type, enabled=False):
            if self.options.normalise:
                deviation, mean = torch.std_mean(wanted, dim=(2, 3), correction=0, keepdim=True)
                wanted = (wanted - self.options.mean_share * mean) / (deviation + SMALL)
            return -F.cosine_similarity(projected.float(), wanted, dim=1).mean()
