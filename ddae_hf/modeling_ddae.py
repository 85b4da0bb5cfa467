"""`DDAEModel` and `DDAEForImageClassification`: a denoiser's hidden states as features, and a classifier on them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput

from .adapters import build_adapted, still_learns
from .checkpoints import build_scheduler
from .classification_heads import build_head, draw_anew, head_shapes, head_size
from .configuration_ddae import DDAEConfig
from .diffusion import Diffusion
from .generators import normal
from .hidden_states import check_learning, layer_names, learning_parameters, pool_hidden_states
from .labels import cross_entropy, warn_of_shared_names
from .latents import build_vae, check_images, encode
from .networks import network_of
from .pretrained_ddae import DDAEPreTrainedModel, use_attention
from .saved_heads import SavesHead
from .texts import StoredCondition
from .weights import COMPILED


class DDAEModel(DDAEPreTrainedModel):
    """A denoiser whose hidden states are features, at one layer and one noise level, or at several: `config.taps`.

    Where the denoiser works on latents and `config.vae` describes their VAE, images are encoded first; the VAE is never
    trained, and its decoder plays no part. `model.vae.enable_slicing()` and `enable_tiling()` bound its memory.

    In evaluation every image gets the same fixed noise, drawn from `config.noise_seed`, so that a feature depends on
    the image alone; in training the noise is fresh.

    Any layer may be asked for, so the whole denoiser asks for gradients; `restrict_gradients([layer])` leaves out what
    lies after a layer, which DistributedDataParallel needs.
    """

    denoiser: Any
    vae: Any
    fixed_noise: Tensor
    _auto_name = "AutoModel"
    _inner_prefix = ""

    def __init__(self, config: DDAEConfig):
        super().__init__(config)
        self.denoiser = build_adapted(config.denoiser, config.lora)
        network = network_of(self.denoiser)
        network.stop_own_dropping(self.denoiser)
        self._no_split_modules = list(network.indivisible)
        self.vae = None if config.vae is None else build_vae(config.vae)
        self.condition = None if config.condition_shapes is None else StoredCondition(config.condition_shapes)
        self._keep_in_fp32_modules = set() if self.vae is None else {"vae"}  # float16 overflows in common VAEs
        self._keep_in_fp32_modules_strict = network.float32_modules(self.denoiser)
        self.restrict_gradients()
        if config._attn_implementation == "eager":
            use_attention(self.denoiser, "eager")
        # With `sample_posterior` the last draw is the VAE's.
        shape = (config.num_noise_samples + config.sample_posterior, *config.sample_shape)
        self.register_buffer("fixed_noise", torch.empty(shape, dtype=torch.float32), persistent=False)
        if not self.fixed_noise.is_meta:
            self.fixed_noise.copy_(self.draw_fixed_noise())
        # These are built on the CPU even while the model's own tensors are without memory.
        with torch.device("cpu"):
            self.scheduler = build_scheduler(config.scheduler)
            self._sigma_range = self.diffusion.family.sigma_range()  # as numbers, so that no graph has to compute them
        self._frozen = False
        self.post_init()

    def draw_fixed_noise(self) -> Tensor:
        """Return evaluation's noise (draws, C, H, W) from `config.noise_seed`; the last draw may be for the VAE."""
        generator = torch.Generator("cpu").manual_seed(self.config.noise_seed)
        noise = torch.randn(self.fixed_noise.shape, generator=generator, device="cpu", dtype=torch.float32)
        return noise.to(self.fixed_noise)

    def _apply(self, *args: Any, **kwargs: Any) -> DDAEModel:
        """Move or cast the model; its fixed noise stays in float32, as in a model that is opened in another type."""
        super()._apply(*args, **kwargs)
        if self.fixed_noise.dtype != torch.float32:
            self.fixed_noise = self.fixed_noise.float()
            self.fixed_noise.copy_(self.draw_fixed_noise())
        return self

    def freeze_denoiser(self) -> None:
        """Keep the denoiser as it is: no gradients, and evaluation mode even under `.train()`."""
        self._frozen = True
        self.denoiser.requires_grad_(False).eval()

    def restrict_gradients(self, layers: Iterable[str] = ()) -> None:
        """Ask for no gradients of what the hidden states of `layers` do not depend on, nor of what has adapters.

        Without `layers` these are only the VAE and what the denoiser's class keeps fixed. Loading makes new parameters,
        so `from_pretrained` calls this again.
        """
        if self.vae is not None:
            self.vae.requires_grad_(False).eval()
        self._restricted_to = list(layers)
        learning = learning_parameters(self._described(), tuple(self._restricted_to))
        for name, parameter in self.denoiser.named_parameters():
            if not still_learns(name.replace(COMPILED, ""), learning, self.config.lora):
                parameter.requires_grad_(False)

    def _described(self) -> str:
        return json.dumps(self.config.denoiser, sort_keys=True)

    def train(self, mode: bool = True) -> DDAEModel:
        """Set the mode; the VAE, and a frozen denoiser, stay in evaluation mode, without dropout."""
        super().train(mode)
        if self.vae is not None:
            self.vae.eval()
        if self._frozen:
            self.denoiser.eval()
        return self

    @property
    def diffusion(self) -> Diffusion:
        """The denoiser with its scheduler and its null condition."""
        stored = self.config.null_class if self.condition is None else self.condition()
        return Diffusion(self.denoiser, self.scheduler, stored)

    def layer_names(self) -> list[str]:
        """Return the denoiser's taps in forward order."""
        return layer_names(self.denoiser)

    def _draw(self, shape: tuple[int, ...], device: Any, generator: Any, fixed: Tensor) -> Tensor:
        """Return noise (draws, B, C, H, W): from the generator, fresh in training, or fixed (draws, C, H, W)."""
        if generator is not None or self.training:
            source = device if generator is None else generator.device
            return normal(shape, source, generator).to(device)
        return fixed[:, None].to(device).expand(shape)

    def _noise_draws(self, clean: Tensor, noise: Tensor | None, generator: Any) -> Tensor:
        """Return the noise (draws, B, C, H, W) that is added."""
        if noise is not None:
            if noise.shape[-4:] != clean.shape or noise.ndim not in (4, 5):
                raise ValueError(f"noise has shape {tuple(noise.shape)}: it is added to {tuple(clean.shape)}.")
            return noise if noise.ndim == 5 else noise[None]
        count = self.config.num_noise_samples
        return self._draw((count, *clean.shape), clean.device, generator, self.fixed_noise[:count])

    def encode(self, pixel_values: Tensor, noise: Tensor | None = None, generator: Any = None) -> Tensor:
        """Return what noise is added to: scaled latents or, without a VAE, the images themselves, float32.

        `pixel_values` are images (B, C, H, W) in [-1, 1]; `noise` is standard-normal noise of the latents' shape, for
        the draw of `config.sample_posterior`. Without it and without a generator, evaluation takes one fixed draw, and
        training draws anew. It raises `ValueError` for images of another size or type.
        """
        check_images(pixel_values, (self.config.num_channels, *self.config.image_size))
        if self.vae is None:
            return pixel_values.float()
        if self.config.sample_posterior and noise is None:
            shape = (1, len(pixel_values), *self.config.sample_shape)
            noise = self._draw(shape, pixel_values.device, generator, self.fixed_noise[-1:])[0]
        # Under autocast the VAE would lose precision, and in float16 overflow.
        with torch.autocast(pixel_values.device.type, enabled=False):
            return encode(self.vae, pixel_values, noise if self.config.sample_posterior else None)

    def _layers_to_return(self, output_hidden_states: bool | list[str | int] | None) -> list[str]:
        known = self.layer_names()
        if output_hidden_states is True:
            every = layer_names(self.denoiser, inner=True)
            before = every[: every.index(str(self.config.layer))]
            return [*(layer for layer in before if layer in known), str(self.config.layer)]
        if not output_hidden_states:
            return []
        if outside := [i for i in output_hidden_states if isinstance(i, int) and not -len(known) <= i < len(known)]:
            raise ValueError(f"output_hidden_states names the layers {outside}: indices are 0 to {len(known) - 1}.")
        return [known[i] if isinstance(i, int) else i for i in output_hidden_states]

    def forward(
        self,
        pixel_values: Tensor,
        sigma: float | Tensor | None = None,
        timestep: float | Tensor | None = None,
        class_labels: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        output_hidden_states: bool | list[str | int] | None = None,
        return_dict: bool | None = None,
        condition: Any = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
        """Add noise to images and read the denoiser's hidden states.

        Args:
            pixel_values: Images (B, C, H, W) in [-1, 1].
            sigma: Noise level, of images or scaled latents, scalar or (B,), within the scheduler's range; by default
                `config.sigma`. On a device, and in a graph that is compiled or exported, tensors are not checked, and a
                level outside the range gives NaN. With several taps, which have their own, it is refused.
            timestep: The noise level as the timestep that the denoiser is fed, in place of `sigma`.
            class_labels: The same as `condition`, where that is labels.
            noise: Standard-normal noise to add, (B, *config.sample_shape) or several draws, (draws, B, ...).
            generator: Generator of fresh noise, including the draw of `config.sample_posterior`. Without `noise` and
                `generator`, evaluation adds the fixed noise, and training draws anew.
            output_hidden_states: `True` for the hidden states of every layer up to the configured one, or a list of
                names or indices of the layers wanted. With several taps only `True`, for the hidden states of these.
            return_dict: Whether to return a `BaseModelOutputWithPooling` or a tuple.
            condition: What the denoiser is told about the images: labels (B,) of a class-conditional one; what
                `embed_prompts` makes of texts, for one that is told texts. By default its null class, or the
                embeddings that are stored with the model.
            **kwargs: Ignored: what Trainer passes on to the loss.

        Returns:
            `last_hidden_state` at `config.layer`, `pooler_output` (B, C), and `hidden_states` if asked for. With
            several draws of noise, these are means over the draws. With several taps, `pooler_output` (B, sum of C) has
            the pooled features of all in their order. They are read in one pass of the network for each level, all
            with the same noise.

        Raises:
            ValueError: Images of another size, a noise level outside the schedule, both `sigma` and `timestep`, an
                unknown layer, or a condition that the denoiser needs or does not take.
        """
        condition = one_condition(condition, class_labels)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        states: tuple[Tensor, ...] | None
        if self.config.taps is None:
            wanted = self._layers_to_return(output_hidden_states)
            clean = self.encode(pixel_values, generator=generator)
            found = self.read_layers(clean, [*wanted, self.config.layer], condition, sigma, timestep, noise, generator)
            last = found[self.config.layer]
            pooled = pool_hidden_states(last, self.config.pooling)
            states = tuple(found[name] for name in wanted) or None
        else:
            if sigma is not None or timestep is not None:
                raise ValueError("sigma or timestep came, but this model has several taps, with levels of their own.")
            if not isinstance(output_hidden_states, (bool, type(None))):
                raise ValueError("output_hidden_states names layers, but this model has several taps: give True.")
            clean = self.encode(pixel_values, generator=generator)
            several = self.read_taps(clean, condition, noise, generator)
            last = several[self.config.pairs.index((self.config.layer, self.config.sigma))]
            pooled = torch.cat([pool_hidden_states(state, self.config.pooling) for state in several], dim=1)
            states = tuple(several) if output_hidden_states else None
        output = BaseModelOutputWithPooling(last_hidden_state=last, pooler_output=pooled, hidden_states=states)
        return output if return_dict else output.to_tuple()

    def read_layers(
        self,
        clean: Tensor,
        layers: list[str],
        condition: Any = None,
        sigma: float | Tensor | None = None,
        timestep: float | Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Return the hidden states of `layers` by name, and compute nothing after the deepest.

        `clean` (B, *config.sample_shape) is what `encode` returns; for the rest see `forward`.
        """
        if self._restricted_to and self.training and torch.is_grad_enabled():
            check_learning(self.denoiser, self._described(), self._restricted_to, layers)
        draws = self._noise_draws(clean, noise, generator)
        diffusion = self.diffusion
        level = diffusion.family.level_of(sigma, timestep, self.config.sigma, self._sigma_range)
        return diffusion.hidden_states(clean, draws, level, list(dict.fromkeys(layers)), condition)

    def read_taps(
        self, clean: Tensor, condition: Any = None, noise: Tensor | None = None, generator: Any = None
    ) -> list[Tensor]:
        """Return the hidden states of all taps in their order, by one pass of the network for each noise level.

        All levels get the same noise. For the arguments see `read_layers`.
        """
        draws = self._noise_draws(clean, noise, generator)
        found = {
            sigma: self.read_layers(clean, layers, condition, sigma, noise=draws)
            for sigma, layers in self.config.levels.items()
        }
        return [found[sigma][layer] for layer, sigma in self.config.pairs]


def one_condition(condition: Any, class_labels: Any) -> Any:
    """Return the condition that was given by either name, or raise `ValueError` where both were."""
    if condition is not None and class_labels is not None:
        raise ValueError("Both condition and class_labels came: pass one of them.")
    return class_labels if condition is None else condition


class DDAEForImageClassification(SavesHead):
    """A classifier on a denoiser's hidden states: linear on pooled features, or one of `ddae_hf.classification_heads`.

    After `freeze_denoiser()` only the classifier learns (a linear probe); otherwise the network up to its deepest tap
    does too. What lies after it asks for no gradients, so that DistributedDataParallel trains the classifier as it is.
    """

    # The loss is the batch's mean: Trainer's count of labels, which it would divide by, counts a soft label K times.
    accepts_loss_kwargs = False
    _auto_name = "AutoModelForImageClassification"
    _keys_to_ignore_on_load_unexpected = [r"^(feature_norm|segmenter|map_norm)\.", r"^(ddae\.)?vae\."]

    def __init__(self, config: DDAEConfig):
        super().__init__(config)
        self.num_labels = int(config.num_labels or 0)
        warn_of_shared_names(config.id2label, self.num_labels)
        self.ddae = DDAEModel(config)
        self.head = build_head(config)
        if self.head is not None and config._attn_implementation == "eager":
            use_attention(self.head, "eager")
        size = head_size(config, self.head)
        self.feature_norm = nn.BatchNorm1d(size, affine=False) if config.feature_norm == "batch_norm" else nn.Identity()
        self.classifier = nn.Linear(size, self.num_labels)
        self.restrict_gradients()
        self.post_init()

    @classmethod
    def _head_shapes(cls, config: DDAEConfig) -> dict[str, tuple[int, ...]]:
        return head_shapes(config)

    def restrict_gradients(self) -> None:
        """Ask for gradients only of what the logits depend on: see `DDAEModel.restrict_gradients`."""
        self.ddae.restrict_gradients(dict.fromkeys(layer for layer, _ in self.config.pairs))

    def reset_head(self) -> None:
        """Draw the classifier anew, as for another task; the statistics of a batch norm stay."""
        if self.head is not None:
            draw_anew(self.head)
        self.classifier.reset_parameters()

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        sigma: float | Tensor | None = None,
        timestep: float | Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        output_hidden_states: bool | list[str | int] | None = None,
        return_dict: bool | None = None,
        condition: Any = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput | tuple[Tensor, ...]:
        """Classify images; for all arguments but `labels` see `DDAEModel.forward`.

        `labels` are classes (B,), or probabilities of classes (B, num_labels), for the loss; batches of both kinds may
        follow each other. The denoiser's `condition` is not what is classified. As `class_labels` it can be given too,
        but that is not a named argument, since Trainer would take it for a second target.

        Returns:
            `logits` (B, num_labels), the batch's mean cross-entropy `loss` if `labels` came, and `hidden_states` if
            asked for. Where `config.problem_type` is `"multi_label_classification"` or `"regression"`, the loss is
            transformers'.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        several = self.config.taps is not None
        outputs = self.ddae(
            pixel_values,
            sigma=sigma,
            timestep=timestep,
            condition=one_condition(condition, kwargs.pop("class_labels", None)),
            noise=noise,
            generator=generator,
            output_hidden_states=(output_hidden_states or True) if several else output_hidden_states,
            return_dict=True,
        )
        if self.head is None:
            features = outputs.pooler_output
        else:
            features = self.head(outputs.hidden_states if several else [outputs.last_hidden_state])
        logits = self.classifier(self.feature_norm(features.to(self.classifier.weight.dtype)))
        loss = None
        if labels is not None and self.config.problem_type in (None, "single_label_classification"):
            loss = cross_entropy(logits, labels)
        elif labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        hidden_states = outputs.hidden_states if output_hidden_states else None
        output = ImageClassifierOutput(loss=loss, logits=logits, hidden_states=hidden_states)
        return output if return_dict else output.to_tuple()
