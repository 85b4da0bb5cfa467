"""`DDAEConfig`: a denoiser, its scheduler, and where to read its hidden states."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import field, fields
from typing import Any, SupportsFloat, SupportsIndex

import torch
from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

from .adapters import check_lora
from .building import LARGEST, refusing, short
from .checkpoints import WEIGHTS, build_scheduler, plain_config, read_checkpoint
from .classification_heads import DEFAULT_HEAD, HEADS, checked_width
from .hidden_states import POOLINGS, check_layers, default_layer, hidden_size, layer_names
from .labels import checked_names
from .latents import check_vae, check_vae_class, downsampling
from .networks import PAPER_UNET, check_denoiser_class, network_of, skeleton
from .noise import family_of
from .weights import HUB_ARGUMENTS

SIGMA_OF_LATENTS = 0.42
MOST_NOISE = 2**30  # numbers of the fixed noise, and of what else a network has in memory that no checkpoint holds
MOST_TAPS = 100  # each of which may be a pass of the network
NEVER_NONE = (
    "sample_posterior", "pooling", "feature_norm", "noise_seed", "num_noise_samples", "semantic_loss_ignore_index",
    "head",
)  # fmt: skip
# The options of each type, and the type in words.
TYPES: dict[type, tuple[str, str]] = {
    SupportsFloat: ("sigma timestep", "a number"),
    SupportsIndex: (
        "noise_seed num_noise_samples null_class num_labels semantic_loss_ignore_index head_width",
        "a whole number",
    ),
    bool: ("sample_posterior", "true or false"),
    str: (
        "layer pooling feature_norm head prompt generator_fingerprint generator_fingerprint_float16 features_only "
        "weights",
        "text",
    ),
    Mapping: ("id2label label2id condition_shapes lora", "a mapping"),
}


class DDAEConfig(BackboneConfigMixin, PreTrainedConfig):
    """Configuration of `DDAEModel`, and of all that reads its hidden states.

    Args:
        denoiser: The denoiser's diffusers config with its `_class_name`; by default the paper's U-Net of 35.7 M
            parameters.
        scheduler: The scheduler's diffusers config, likewise; by default that of a plain `DDPMScheduler`.
        vae: The diffusers config of the `AutoencoderKL` that makes latents of images, where the denoiser works on them.
            Without it, the model's images are whatever the denoiser works on.
        sample_posterior: Whether latents are draws from the VAE's distribution in place of its mean.
        layer: The tap, one of the names in `layer_names(denoiser)`; by default the decoder's middle one.
        sigma: Noise level of the tap: standard deviation of the noise on images in [-1, 1], or on scaled latents. The
            defaults are close to the paper's best levels: 0.05 on images (0.047 for DDPM, 0.060 for EDM), and 0.42 on
            latents (DiT-XL/2 on CIFAR-10).
        timestep: The noise level as the (0-based) timestep that the denoiser is fed, in place of `sigma`; it is stored
            as `sigma`.
        taps: Several taps in place of `layer` and `sigma`, as pairs `[layer, sigma]` in the order in which their
            features are joined. `layer` and `sigma` are then those of the deepest layer, at its first level in this
            list: what reads one tap alone reads that. A single pair says the same as `layer` and `sigma`, and is stored
            as these.
        pooling: How a hidden state becomes a feature vector: `"mean"` or `"max"` over positions, or `"mean_2x2"`, over
            each quarter of them: see `pool_hidden_states`.
        feature_norm: What stands between features and classifier: `"none"`, or `"batch_norm"` without parameters; of a
            classifier, for the head `"linear"` alone.
        semantic_loss_ignore_index: The class of pixels that the loss of a `DDAEForSemanticSegmentation` leaves out.
        head: What classifies: `"linear"`, on pooled features; `"attention"` or `"fusion"`, on unpooled hidden states.
            See `ddae_hf.classification_heads`.
        head_width: Width of the heads `"attention"` and `"fusion"`, a multiple of 8 up to 4096, by default 256. The
            paper of the fusion head has 1024, for maps of up to 1024 channels; small networks' maps have 64 to 512.
        noise_seed: Seed of the fixed noise used in evaluation, including the draw of `sample_posterior`.
        num_noise_samples: Number of draws of noise that features are averaged over.
        null_class: The label that stands for no class in a class-conditional U-Net; a DiT's is its last label.
        prompt: The text whose embeddings a denoiser that is told a text is read with; None is the null prompt, or
            embeddings that were given. They are stored with the weights.
        condition_shapes: Shapes, without the batch, of the embeddings that are stored with the weights, by name; it is
            set when the model is opened.
        generator_fingerprint: `weights.fingerprint` of the pretrained denoiser; it is set when one is opened.
        generator_fingerprint_float16: The same after rounding to float16 in place of bfloat16.
        features_only: Why the denoiser cannot generate, where its hidden states are right but its output is not;
            converters set it.
        lora: The adapters of the denoiser, `{"rank": 8, "alpha": 8.0, "modules": ["mid_block.attentions.0.to_q"]}`;
            `add_lora` sets it, and `merge_lora` clears it. By default there are none.
        weights: Which weights belong to this configuration's file: `"whole"` (`model.safetensors`), `"head"`
            (`head.safetensors`, on a base) or `"adapters"` (the same, and `adapters/`); saving sets it. `None`, as in
            the files of version 0.1.0, means a head if there is one.
        out_features: Layers whose feature maps a `DDAEBackbone` returns, and a `DDAEForSemanticSegmentation` joins, in
            forward order; by default `layer`.
        out_indices: The same as indices into `stage_names`, in place of names.
        **kwargs: transformers' own options, such as `num_labels`, `id2label` and `label2id`.

    Raises:
        ValueError: A combination that cannot work.
    """

    model_type = "ddae"

    denoiser: dict[str, Any] = field(default_factory=lambda: copy.deepcopy(PAPER_UNET))
    scheduler: dict[str, Any] = field(default_factory=lambda: {"_class_name": "DDPMScheduler"})
    vae: dict[str, Any] | None = None
    sample_posterior: bool = False
    layer: str | None = None
    sigma: float | int | None = None
    taps: list[Any] | tuple[Any, ...] | None = None
    pooling: str = "mean"
    feature_norm: str = "none"
    semantic_loss_ignore_index: int = 255
    head: str = "linear"
    head_width: int | None = None
    noise_seed: int = 0
    num_noise_samples: int = 1
    null_class: int | None = None
    prompt: str | None = None
    condition_shapes: dict[str, Any] | None = None
    generator_fingerprint: str | None = None
    generator_fingerprint_float16: str | None = None
    features_only: str | None = None
    lora: dict[str, Any] | None = None
    weights: str | None = None
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in defaults and refuse what cannot work."""
        timestep = kwargs.pop("timestep", None)
        out_features, out_indices = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        self._check_types(timestep, kwargs.get("num_labels"))
        with refusing("The configuration cannot be used"):
            super().__post_init__(**kwargs)
        if not isinstance(self.dtype, (torch.dtype, type(None))):
            raise ValueError(f"dtype is {short(self.dtype)}: it must be the name of a torch type, such as float32.")
        self.denoiser = plain_config(self.denoiser)
        self.scheduler = plain_config(self.scheduler)
        self._check_choices()
        denoiser = skeleton(self.denoiser)
        self._check_vae(denoiser)
        for name in ("sample_size", "in_channels"):
            self.denoiser.setdefault(name, denoiser.config[name])
        network = network_of(denoiser)
        network.check_config(denoiser.config)
        network.check_condition_shapes(self.condition_shapes, denoiser.config)
        check_lora(self.lora, denoiser, needed=self.weights == "adapters")
        self._check_memory(denoiser)
        network.check_null_class(self.null_class, denoiser.config)
        if self.prompt is not None and not network.stock_pipelines:
            raise ValueError(f"prompt is {short(self.prompt)}, but this denoiser is told no text: leave it out.")
        scheduler = build_scheduler(self.scheduler)
        family = family_of(scheduler)
        family.check_prediction()
        network.check_timesteps(denoiser.config, scheduler)
        self._settle_taps(timestep, denoiser, family)
        if timestep is not None and self.sigma is not None:
            raise ValueError(f"Both sigma ({self.sigma}) and timestep ({timestep}) came: pass one of them.")
        if timestep is not None:
            family.check_timestep(timestep)
            self.sigma = family.sigma(timestep).item()
        elif self.sigma is None:
            self.sigma = 0.05 if self.vae is None else SIGMA_OF_LATENTS
        family.check_sigma(self.sigma)
        if self.layer is None:
            self.layer = default_layer(denoiser)
        check_layers(denoiser, [self.layer])
        if out_features is not None or out_indices is not None:
            with refusing(f"out_features {short(out_features)} or out_indices {short(out_indices)} cannot be used"):
                self.set_output_features_output_indices(out_features, out_indices)

    def _check_types(self, timestep: Any, num_labels: Any) -> None:
        """Refuse values of types that their options do not have, as a damaged file may hold them."""
        given = {"timestep": timestep, "num_labels": num_labels}
        for kind, (names, words) in TYPES.items():
            for name in names.split():
                value = given[name] if name in given else getattr(self, name)
                of_kind = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
                if not (of_kind or (value is None and name not in NEVER_NONE)):
                    raise ValueError(f"{name} is {short(value)}: it must be {words}.")
        if num_labels is not None and not 0 <= num_labels <= LARGEST:
            raise ValueError(f"num_labels is {short(num_labels)}: it must be between 0 and {LARGEST}.")
        checked_names(self.id2label, LARGEST)

    def _settle_taps(self, timestep: Any, denoiser: Any, family: Any) -> None:
        """Store several taps as plain lists, and set `layer` and `sigma` by them; a single one becomes these alone."""
        if self.taps is None:
            return
        taps = _checked_pairs(self.taps)
        check_layers(denoiser, [layer for layer, _ in taps])
        for _, sigma in taps:
            family.check_sigma(sigma)
        if timestep is not None:
            raise ValueError(f"Both taps and timestep ({timestep}) came: taps say their own levels, so leave it out.")
        order = layer_names(denoiser, inner=True)
        deepest = max(taps, key=lambda tap: order.index(tap[0]))  # the first of those that are equally deep
        for name, told in zip(("layer", "sigma"), deepest, strict=True):
            if getattr(self, name) not in (None, told):
                raise ValueError(
                    f"Both taps and {name} ({short(getattr(self, name))}) came, but of the deepest tap it is "
                    f"{short(told)}: give taps alone."
                )
            setattr(self, name, told)
        self.taps = taps if len(taps) > 1 else None

    def _check_choices(self) -> None:
        check_denoiser_class(self.denoiser.get("_class_name"))
        choices = {"pooling": POOLINGS, "feature_norm": ("none", "batch_norm"), "weights": (None, *WEIGHTS)}
        choices["head"] = HEADS
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}: allowed are {', '.join(map(str, allowed))}.")
        if self.head != "linear" and self.feature_norm != "none":
            raise ValueError(
                f"feature_norm is {self.feature_norm!r}, which is of pooled features, but the head {self.head!r} reads "
                "hidden states, and normalises them itself: leave feature_norm out, or say 'none'."
            )
        self.head_width = checked_width(self.head_width, self.head)
        if self.num_noise_samples < 1:
            raise ValueError(f"num_noise_samples is {self.num_noise_samples}: it must be at least 1.")
        if not 0 <= self.noise_seed < 2**64:  # as torch's generators take it
            raise ValueError(f"noise_seed is {short(self.noise_seed)}: it must not be negative, and below 2**64.")

    def _check_vae(self, denoiser: Any) -> None:
        """Complete the VAE's config with the shape of its images and latents, and refuse another denoiser's VAE."""
        if self.vae is None:
            if self.sample_posterior:
                raise ValueError("sample_posterior is set, but there is no vae whose latents could be drawn.")
            return
        self.vae = plain_config(self.vae)
        check_vae_class(self.vae.get("_class_name"))
        vae = skeleton(self.vae)
        for name in ("in_channels", "latent_channels", "block_out_channels"):
            self.vae.setdefault(name, vae.config[name])
        check_vae(self.vae, denoiser.config)

    def _check_memory(self, denoiser: Any) -> None:
        """Refuse sizes for which what no checkpoint holds, fixed noise and positions, would fill the memory."""
        noise = (self.num_noise_samples + self.sample_posterior) * math.prod(self.sample_shape)
        noise += sum(math.prod(shape) for shape in (self.condition_shapes or {}).values())
        if max(noise, sum(buffer.numel() for buffer in denoiser.buffers())) > MOST_NOISE:
            raise ValueError(
                f"The fixed noise or the positions would take more than {MOST_NOISE} numbers, with sample_size "
                f"{short(self.denoiser['sample_size'])} and num_noise_samples {short(self.num_noise_samples)}: one of "
                "them is wrong."
            )

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of what noise is added to: images, or latents where there is a `vae`."""
        return self.denoiser["in_channels"], *network_of(self.denoiser).size(self.denoiser)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the model's images, in pixels."""
        factor = 1 if self.vae is None else downsampling(self.vae)
        return self.sample_shape[1] * factor, self.sample_shape[2] * factor

    @property
    def num_channels(self) -> int:
        """Number of channels of the model's images."""
        return (self.vae or self.denoiser)["in_channels"]

    @property
    def pairs(self) -> list[tuple[str, float]]:
        """The layer and the noise level of every tap, in the order in which features are joined, one or several."""
        given: Any = self.taps or [(self.layer, self.sigma)]
        return [(layer, sigma) for layer, sigma in given]

    @property
    def levels(self) -> dict[float, list[str]]:
        """The layers that are read at each noise level, in the order of the first taps of the levels."""
        found: dict[float, list[str]] = {}
        for layer, sigma in self.pairs:
            found.setdefault(sigma, []).append(layer)
        return found

    @property
    def hidden_size(self) -> int:
        """Width of the features: the channels of all taps, times four with the pooling `"mean_2x2"`."""
        denoiser = skeleton(self.denoiser)
        return sum(hidden_size(denoiser, layer, self.pooling) for layer, _ in self.pairs)

    @property
    def stage_names(self) -> list[str]:
        """Names of the denoiser's layers in forward order: what a backbone calls its stages.

        Those that lie inside of others are stages where `out_features` names them.
        """
        denoiser = skeleton(self.denoiser)
        stages = {*layer_names(denoiser), *(self._out_features if isinstance(self._out_features, list) else [])}
        return [layer for layer in layer_names(denoiser, inner=True) if layer in stages]

    @property
    def stage_channels(self) -> list[int]:
        """Number of channels of each of `stage_names`."""
        return [hidden_size(skeleton(self.denoiser), layer) for layer in self.stage_names]

    def to_dict(self) -> dict[str, Any]:
        """Return what the file holds; taps and head are in it where there are several, and another than the linear."""
        found = super().to_dict()
        return {name: value for name, value in found.items() if DEFAULT_HEAD.get(name, ...) != value}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build a configuration from a dictionary; keyword arguments replace its entries, and are checked with them."""
        own = {f.name for f in fields(cls) if f.name in cls.__annotations__}
        own |= {"timestep", "out_features", "out_indices"}
        overrides = {name: kwargs.pop(name) for name in list(kwargs) if name in own}
        config_dict = dict(config_dict)
        if "vae" in overrides and overrides["vae"] is None:  # nothing draws latents then, but they are still noised
            config_dict.pop("sample_posterior", None)
            if config_dict.get("vae") is not None and overrides.get("timestep") is None:
                config_dict.setdefault("sigma", SIGMA_OF_LATENTS)
        # What is given replaces the entry that says the same in another form.
        others = [("timestep", "sigma"), ("out_features", "out_indices"), ("out_indices", "out_features")]
        others += [("taps", "layer"), ("taps", "sigma"), ("layer", "taps"), ("sigma", "taps"), ("timestep", "taps")]
        for given, other in others:
            if overrides.get(given) is not None and overrides.get(other) is None:
                config_dict.pop(other, None)
        if overrides.get("head") == "linear" and "head_width" not in overrides:
            config_dict.pop("head_width", None)
        with refusing("The configuration cannot be used"):
            return super().from_dict({**config_dict, **overrides}, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Open a checkpoint's configuration, whatever its layout; keyword arguments replace its entries."""
        # transformers 5.17 would lose the token on the way here, and then could not read a private repository.
        config_dict, kwargs = cls.get_config_dict(pretrained_model_name_or_path, **kwargs)
        return cls.from_dict(config_dict, **kwargs)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return a checkpoint's configuration, whatever its layout, and the arguments that did not say where it is."""
        checkpoint = read_checkpoint(pretrained_model_name_or_path, **kwargs)
        used = (*HUB_ARGUMENTS, "trust_remote_code")  # the last one is for the Auto classes
        return checkpoint.config, {name: value for name, value in kwargs.items() if name not in used}


def _checked_pairs(taps: Any) -> list[list[Any]]:
    """Return taps as plain lists of a layer's name and a number, or raise `ValueError` for all else."""
    if not isinstance(taps, (list, tuple)) or not 0 < len(taps) <= MOST_TAPS:
        raise ValueError(f"taps is {short(taps)}: it must be a list of 1 to {MOST_TAPS} pairs [layer, sigma].")
    found: list[list[Any]] = []
    for tap in taps:
        pair = isinstance(tap, (list, tuple)) and len(tap) == 2 and isinstance(tap[0], str)
        if not pair or not isinstance(tap[1], SupportsFloat) or isinstance(tap[1], bool):
            raise ValueError(f"taps has {short(tap)}: it must be a pair [layer, sigma], of a text and a number.")
        with refusing(f"taps has {short(tap)}, whose level is no number"):
            found.append([str(tap[0]), float(tap[1])])
        if found[-1] in found[:-1]:
            raise ValueError(f"taps has {short(tap)} more than once: leave one of them out.")
    return found
