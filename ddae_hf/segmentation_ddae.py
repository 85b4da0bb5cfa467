"""`DDAEForSemanticSegmentation`: a linear head on a denoiser's feature maps, which gives every pixel a class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import SemanticSegmenterOutput

from .backbone_ddae import ReadsMaps
from .class_maps import map_cross_entropy
from .configuration_ddae import DDAEConfig
from .hidden_states import hidden_size
from .modeling_ddae import DDAEModel, one_condition
from .networks import skeleton
from .saved_heads import SavesHead


class DDAEForSemanticSegmentation(ReadsMaps, SavesHead):
    """A linear head on the joined feature maps of the layers `config.out_features`, by default of `config.layer`.

    All maps are resized bilinearly to the finest of them and joined along their channels; a 1x1 convolution, behind the
    batch norm that `config.feature_norm` may ask for, makes logits of them. After `freeze_denoiser()` only the head
    learns; otherwise the network up to the deepest of the layers does too. What lies after it asks for no gradients.
    """

    accepts_loss_kwargs = False  # the loss is the mean over a batch's pixels
    _auto_name = "AutoModelForSemanticSegmentation"

    def __init__(self, config: DDAEConfig):
        super().__init__(self.complete(config))
        self.num_labels = int(config.num_labels or 0)
        self.ddae = DDAEModel(config)
        width = self._width(config)
        self.map_norm = nn.BatchNorm2d(width, affine=False) if config.feature_norm == "batch_norm" else nn.Identity()
        self.segmenter = nn.Conv2d(width, self.num_labels, 1)
        self.restrict_gradients()
        self.post_init()

    @staticmethod
    def _width(config: DDAEConfig) -> int:
        """Return the number of channels of the joined maps."""
        return sum(hidden_size(skeleton(config.denoiser), layer) for layer in config.out_features or [config.layer])

    @classmethod
    def _head_shapes(cls, config: DDAEConfig) -> dict[str, tuple[int, ...]]:
        width = cls._width(config)
        count = int(config.num_labels or 0)
        shapes = {"segmenter.weight": (count, width, 1, 1), "segmenter.bias": (count,)}
        return shapes | {"map_norm.running_mean": (width,), "map_norm.running_var": (width,)}

    def reset_head(self) -> None:
        """Draw the head anew, as for another task; the statistics of a batch norm stay."""
        self.segmenter.reset_parameters()

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        sigma: float | Tensor | None = None,
        timestep: float | Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        condition: Any = None,
        **kwargs: Any,
    ) -> SemanticSegmenterOutput | tuple[Tensor, ...]:
        """Give every place of images a class; for all arguments but `labels` see `DDAEModel.forward`.

        `labels` are the classes (B, H, W) of pixels, for the loss, at any size; pixels of the class
        `config.semantic_loss_ignore_index` are left out. The denoiser's `condition` can be given as `class_labels` too.

        Returns:
            `logits` (B, num_labels, h, w) at the size of the finest map: `post_process_semantic_segmentation` of the
            image processor makes maps of the images' own sizes of them. If `labels` came, the mean cross-entropy
            `loss` of their pixels, with the logits resized bilinearly to their size. With `output_hidden_states`, the
            raw hidden states of all `config.stage_names`.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        maps, hidden_states = self.read_maps(
            pixel_values,
            output_hidden_states,
            generator,
            condition=one_condition(condition, kwargs.pop("class_labels", None)),
            sigma=sigma,
            timestep=timestep,
            noise=noise,
        )
        joined = joined_maps(maps).to(self.segmenter.weight.dtype)
        logits = self.segmenter(self.map_norm(joined))
        loss = None
        if labels is not None:
            loss = map_cross_entropy(logits, labels, self.config.semantic_loss_ignore_index)
        output = SemanticSegmenterOutput(loss=loss, logits=logits, hidden_states=hidden_states)  # type: ignore[arg-type]
        return output if return_dict else output.to_tuple()


def joined_maps(maps: Sequence[Tensor]) -> Tensor:
    """Return feature maps (B, C, h, w) as one, resized bilinearly to the finest of them and joined by channels."""
    size = max((each.shape[-2:] for each in maps), key=math.prod)
    same = (
        each if each.shape[-2:] == size else F.interpolate(each, size, mode="bilinear", align_corners=False)
        for each in maps
    )
    return torch.cat(list(same), dim=1)
