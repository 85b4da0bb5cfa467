"""`DDAEBackbone`: a denoiser's hidden states as feature maps at several depths, for dense tasks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput

from .configuration_ddae import DDAEConfig
from .modeling_ddae import DDAEModel, one_condition
from .networks import network_of, tap_of
from .pretrained_ddae import DDAEPreTrainedModel


class ReadsMaps(DDAEPreTrainedModel):
    """A model on the feature maps of the layers `config.out_features`, by default of `config.layer` alone."""

    ddae: DDAEModel

    @staticmethod
    def complete(config: DDAEConfig) -> DDAEConfig:
        """Let a configuration say which layers are read."""
        if config.out_features is None:
            config.set_output_features_output_indices([str(config.layer)], None)
        return config

    def restrict_gradients(self) -> None:
        """Ask for gradients only of what the feature maps depend on: see `DDAEModel.restrict_gradients`."""
        self.ddae.restrict_gradients(self.config.out_features)

    def read_maps(
        self, pixel_values: Tensor, every: bool | None = None, generator: Any = None, **given: Any
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None]:
        """Return a feature map (B, channels, height, width) of each of `config.out_features`.

        With them come the raw hidden states of all `config.stage_names`, if they are asked for by `every`, or by
        `config.output_hidden_states` where that is None. The other arguments are those of `DDAEModel.read_layers`.
        """
        every = self.config.output_hidden_states if every is None else every
        wanted = list(self.config.out_features)
        clean = self.ddae.encode(pixel_values, generator=generator)
        layers = self.config.stage_names if every else wanted
        found = self.ddae.read_layers(clean, layers, generator=generator, **given)
        denoiser = self.ddae.denoiser
        size = self.config.sample_shape[1:]
        maps = tuple(network_of(denoiser).on_grid(found[name], tap_of(denoiser, name), size) for name in wanted)
        return maps, tuple(found[name] for name in self.config.stage_names) if every else None


class DDAEBackbone(BackboneMixin, ReadsMaps):
    """Feature maps of the layers that `out_features` or `out_indices` name, as transformers' backbones give them.

    `stage_names` are the denoiser's layers in forward order, and `channels` the widths of the layers asked for. Every
    layout of checkpoint opens:
    `DDAEBackbone.from_pretrained(repo, out_features=["mid_block", "up_blocks.2.attentions.0"])`.
    Nothing after the deepest of `out_features` is computed or asks for gradients: to train with deeper maps, name them
    when the backbone is made. As in `DDAEModel`, evaluation adds fixed noise at the level `config.sigma`, and training
    adds fresh noise.
    """

    has_attentions = False
    _auto_name = "AutoBackbone"

    def __init__(self, config: DDAEConfig):
        super().__init__(self.complete(config))
        self.ddae = DDAEModel(config)
        self.num_features = config.stage_channels
        self.restrict_gradients()
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        sigma: float | Tensor | None = None,
        timestep: float | Tensor | None = None,
        class_labels: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        condition: Any = None,
        **kwargs: Any,
    ) -> BackboneOutput | tuple[Any, ...]:
        """Return feature maps; for the arguments see `DDAEModel.forward`.

        Returns:
            `feature_maps`, a tensor (B, channels, height, width) for each of `out_features`; a DiT's tokens are laid
            out on the grid of its patches. With `output_hidden_states`, also the raw hidden states of all
            `stage_names`.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        maps, hidden_states = self.read_maps(
            pixel_values,
            output_hidden_states,
            generator,
            condition=one_condition(condition, class_labels),
            sigma=sigma,
            timestep=timestep,
            noise=noise,
        )
        output = BackboneOutput(feature_maps=maps, hidden_states=hidden_states)  # type: ignore[arg-type]
        return output if return_dict else output.to_tuple()
