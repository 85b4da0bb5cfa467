"""`DDAEPreTrainedModel`: how models are opened, initialised and saved, including a classifier without its denoiser."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .adapters import Adapted, adapted_state, adapter_shapes
from .checkpoints import GENERATOR_FINGERPRINTS, Checkpoint, take_checkpoint
from .classification_heads import same_head
from .configuration_ddae import DDAEConfig
from .networks import NETWORKS, network_of, skeleton
from .prompts import check_told, null_condition
from .remote_code import auto_map
from .weights import (
    COMPILED,
    WHOLE_FILE,
    fingerprint,
    plain_state,
    refuse_missing,
    refuse_other_shapes,
    refuse_unexpected,
    replaced_weights,
    stored_dtype,
    tensor_shapes,
    uncompiled_names,
)


class DDAEPreTrainedModel(Adapted, PreTrainedModel):
    """Opens every layout of checkpoint, and leaves a denoiser's initialisation to diffusers."""

    config_class = DDAEConfig
    base_model_prefix = "ddae"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _auto_name: str  # the Auto class that opens it
    _inner_prefix = "ddae."  # where the denoiser's weights are among the model's
    _has_head = False  # whether it has weights of its own, which `head.safetensors` keeps
    # Weights of another model's head, or of a checkpoint whose VAE is left out.
    _keys_to_ignore_on_load_unexpected = [
        r"^(classifier|feature_norm|head|segmenter|map_norm)\.", r"^(ddae\.)?vae\.",
    ]  # fmt: skip
    _supports_sdpa = True
    _no_split_modules = [block for network in NETWORKS.values() for block in network.indivisible]

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        """Initialise what a checkpoint did not bring. transformers' own rule would re-draw the denoiser."""
        if hasattr(module, "draw_fixed_noise"):
            init.copy_(module.fixed_noise, module.draw_fixed_noise())
            # Buffers that no checkpoint holds, such as a DiT's positions, come from the meta device without values.
            config = module.config.denoiser
            for key, values in network_of(config).computed_buffers(config).items():
                init.copy_(module.denoiser.get_buffer(key), values)
        elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            init.zeros_(module.get_buffer("running_mean"))
            init.ones_(module.get_buffer("running_var"))
            init.zeros_(module.get_buffer("num_batches_tracked"))
        elif callable(reset := getattr(module, "reset_parameters", None)):
            own = list(module.parameters(recurse=False))
            if own and not any(getattr(p, "_is_hf_initialized", False) for p in own):
                reset()

    def freeze_denoiser(self) -> None:
        """Train only what stands on the denoiser: see `DDAEModel.freeze_denoiser`."""
        inner: Any = self.base_model
        inner.freeze_denoiser()

    def restrict_gradients(self) -> None:
        """Ask for gradients only of parameters that can have one."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """Open a checkpoint of any layout: see `ddae_hf.checkpoints`.

        For a generative checkpoint, `layer` and either `sigma` or `timestep` say where to tap it, and `num_labels` (or
        `id2label`) says how many classes the new classifier has. With `vae=None` a denoiser of latents comes without
        its VAE, and takes latents as its images. A denoiser that is told a text is read with a `prompt`, or with a
        `condition` as `embed_prompts` makes it, for all images; by default with the null prompt, if the checkpoint has
        text encoders. `variant` says which of several sets of weights is opened, and
        `state_dict` replaces all of them. Everything else is as in transformers, except that every tensor must be
        there: only those of a new classifier may be missing.

        Raises:
            ValueError: No checkpoint, an unsupported denoiser, a tap or variant that it lacks, or missing tensors; a
                prompt or condition for a model that stores another one.
        """
        condition = kwargs.pop("condition", None)
        if pretrained_model_name_or_path is None:
            made = super().from_pretrained(None, *model_args, **kwargs)
            (made[0] if isinstance(made, tuple) else made).restrict_gradients()
            return made
        wants_info = kwargs.pop("output_loading_info", False)
        state = kwargs.pop("state_dict", None)
        # A new classifier, with classes other than the checkpoint's, may be asked for.
        asked = bool({"num_labels", "id2label"} & set(kwargs))
        anew = asked and bool(kwargs.get("ignore_mismatched_sizes"))
        checkpoint, dtype = take_checkpoint(pretrained_model_name_or_path, kwargs)
        config = kwargs.pop("config", None)
        scheduler = kwargs.get("scheduler", checkpoint.scheduler)
        if config is None:
            config, kwargs = DDAEConfig.from_dict(checkpoint.config, return_unused_kwargs=True, **kwargs)
            if state is None and not asked:
                cls._check_stored(checkpoint, config)
            if scheduler is None:
                warnings.warn(
                    f"{checkpoint.path} holds a network without its scheduler: {config.scheduler['_class_name']} is "
                    "taken. If it was trained otherwise, pass `scheduler=` with the scheduler's config.",
                    stacklevel=2,
                )
        check_told(checkpoint, condition, config.prompt)
        if dtype in (None, "auto") and checkpoint.keeps_dtype:
            dtype = config.dtype
        if state is None:
            state = checkpoint.compiled_state()
        elif not checkpoint.holds_model:
            config = cls._described_by(state, config, condition)
        if state is None and not checkpoint.opens_in_transformers:
            config = copy.deepcopy(config)
            state, dtype = cls._read_parts(checkpoint, config, dtype, condition)
        with _load_reports(checkpoint.path) as reports:
            opened: Any = super().from_pretrained(
                checkpoint.path if state is None else None,
                *model_args,
                config=config,
                state_dict=state and plain_state(state),
                dtype=dtype,
                variant=checkpoint.variant,
                use_safetensors=True,
                output_loading_info=True,
                **(checkpoint.hub if state is None else {}),
                **kwargs,
            )
            model, info = opened
            model._check_loaded(checkpoint, info, anew)
            if anew and cls._has_head and not same_head(checkpoint.config, model.config):
                model.reset_head()
            if asked:  # nothing but the classifier that was asked for is missing
                reports.clear()
        model.restrict_gradients()  # loading has made new parameters
        return (model, info) if wants_info else model

    @classmethod
    def _check_stored(cls, checkpoint: Checkpoint, config: DDAEConfig) -> None:
        """Refuse a model of this package whose stored tensors are not of the shapes that its configuration says."""
        if not checkpoint.holds_model:
            return
        if checkpoint.head is None:
            for part in ("denoiser", "vae"):
                if getattr(config, part) is not None:
                    checkpoint.check(part)
        files = checkpoint.weight_files()[0] if checkpoint.head is None else [checkpoint.head]
        stored = tensor_shapes(files)
        own = cls._head_shapes(config)
        of_head = {name for name in stored if name.startswith("head.")}
        classifies = "classifier.weight" in own and "classifier.weight" in stored
        if classifies and of_head != {name for name in own if name.startswith("head.")}:
            raise ValueError(
                f"{checkpoint.path} holds a classifier with another head than the configuration describes, "
                f"{config.head!r} on {len(config.pairs)} taps. For a new one pass `num_labels` and "
                "`ignore_mismatched_sizes=True`."
            )
        added = adapter_shapes(config.denoiser, config.lora, "denoiser.") if checkpoint.head is None else {}
        for what, shapes in {"head": own, "adapters": added}.items():
            whole = shapes | {f"ddae.{name}": shape for name, shape in shapes.items()}
            expected = {name: shape for name, shape in whole.items() if name in stored}
            refuse_other_shapes(checkpoint.path, what, expected, stored)

    @classmethod
    def _head_shapes(cls, config: DDAEConfig) -> dict[str, tuple[int, ...]]:
        """Return the shapes of what stands on the denoiser, by the names of the tensors."""
        return {}

    @classmethod
    def _described_by(cls, state: dict[str, Any], config: DDAEConfig, condition: Any) -> DDAEConfig:
        """Return a generator's configuration with the shapes of the null condition among the tensors that came."""
        if condition is not None:
            raise ValueError("Both state_dict and condition came, but the state_dict holds what is told: pass one.")
        kept = f"{cls._inner_prefix}condition."
        told = {name.removeprefix(kept): value for name, value in plain_state(state).items() if name.startswith(kept)}
        config = copy.deepcopy(config)
        config.condition_shapes = {name: list(value.shape[1:]) for name, value in told.items()} or None
        return config

    @classmethod
    def _read_parts(
        cls, checkpoint: Checkpoint, config: DDAEConfig, dtype: Any, condition: Any
    ) -> tuple[dict[str, Any], Any]:
        """Return the tensors of a generator, or of a head and its base, and their type.

        It sets the fingerprints of `config`, and the shapes of a null condition.
        """
        known_dtype = dtype if isinstance(dtype, torch.dtype) else None
        told: dict[str, torch.Tensor] = {}
        if not checkpoint.head:  # text encoders are let go before the denoiser is loaded
            files, _ = checkpoint.check("denoiser")
            told = null_condition(checkpoint, known_dtype or stored_dtype(files[0]), config.prompt, condition)
            config.condition_shapes = {name: list(value.shape[1:]) for name, value in told.items()} or None
        denoiser = checkpoint.load("denoiser", known_dtype)
        for name, rounded in GENERATOR_FINGERPRINTS.items():
            setattr(config, name, fingerprint(denoiser, dtype=rounded))
        parts = {"denoiser": denoiser}
        if config.vae is not None:
            parts["vae"] = checkpoint.load("vae")
            if parts["vae"] is None:
                raise ValueError(f"{checkpoint.path} has no vae: a vae's config is of no use without its weights.")
        for part, network in parts.items():
            expected = _shapes(skeleton(getattr(config, part)))
            stored = _shapes(network)
            known = {name: shape for name, shape in expected.items() if name in stored}  # others are refused later
            refuse_other_shapes(checkpoint.path, part, known, stored)
        prefix = cls._inner_prefix
        states = {part: network.state_dict() for part, network in parts.items()}
        stored_too = checkpoint.config.get("weights") == "adapters"
        states["denoiser"] = adapted_state(states["denoiser"], config, checkpoint.path, checkpoint.hub, stored_too)
        state = {f"{prefix}{part}.{k}": v for part, tensors in states.items() for k, v in tensors.items()}
        head = load_file(checkpoint.head) if checkpoint.head else {}
        state |= head if cls._has_head else {}
        kept = "ddae.condition."
        told |= {name.removeprefix(kept): value for name, value in head.items() if name.startswith(kept)}
        state |= {f"{prefix}condition.{name}": value for name, value in told.items()}
        return state, denoiser.dtype if dtype in (None, "auto") else dtype

    def _check_loaded(self, checkpoint: Checkpoint, info: dict[str, Any], anew: bool) -> None:
        """Refuse missing tensors, except of a head that the checkpoint lacks or that was asked for `anew`."""
        mismatched = {name for name, *_ in info["mismatched_keys"]}
        missing = set(info["missing_keys"]) | mismatched
        every = set(self.state_dict())
        own = {name for name in every if not name.startswith("ddae.")} if self._has_head else set()
        saved_as = checkpoint.config.get("architectures") or []
        kinds = {kind.__name__ for kind in type(self).__mro__}
        headless = kinds.isdisjoint(saved_as) and own <= missing
        # `ignore_mismatched_sizes` has let sizes that differ pass.
        spared = own if headless or anew else own & mismatched
        refuse_missing(checkpoint.path, type(self).__name__, every, every - (missing - spared))
        replaced = {name for name in info["unexpected_keys"] if anew and name.startswith("head.")}
        refuse_unexpected(checkpoint.path, type(self).__name__, set(info["unexpected_keys"]) - replaced)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load tensors under compiled or plain names into a model that is compiled, in whole or in part, or not."""
        tensors = (*self.named_parameters(remove_duplicate=False), *self.named_buffers(remove_duplicate=False))
        names = {name.replace(COMPILED, ""): name for name, _ in tensors}
        for key in [key for key in state_dict if key.startswith(prefix)]:
            name = names.get(key.removeprefix(prefix).replace(COMPILED, ""))
            if name is not None and prefix + name != key:
                state_dict[prefix + name] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, include_code: bool = False, **kwargs: Any
    ) -> Any:
        """Write `config.json` and `model.safetensors`, as in transformers.

        A `head.safetensors` that the folder holds stays there, but is no longer opened. With `include_code` this
        package's modules are written beside them, so that the folder, or the repository that it becomes, opens with
        transformers' Auto classes and `trust_remote_code=True` where `ddae_hf` is not installed.
        """
        self.config.weights = "whole"
        self._set_auto_map(include_code)
        if kwargs.get("state_dict") is not None:
            kwargs["state_dict"] = plain_state(kwargs["state_dict"])
        registers = include_code and self._auto_class is None
        if registers:  # transformers writes the code of a class that is registered, in time for its push
            type(self).register_for_auto_class(self._auto_name)
        try:
            with uncompiled_names(self), replaced_weights(save_directory, WHOLE_FILE, kwargs.get("variant")):
                return super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            if registers:
                type(self)._auto_class = None

    def _set_auto_map(self, include_code: bool) -> None:
        """Let `config.auto_map` name code that is in the folder or in a repository, and no other."""
        known = vars(self.config).pop("auto_map", None) or {}
        if self._auto_class is None:  # otherwise it came as remote code itself, which is written again
            own = auto_map(self._auto_name)
            known = own if include_code else {name: code for name, code in known.items() if "--" in code}
        if known:
            self.config.auto_map = dict(known)

    def set_attn_implementation(self, attn_implementation: str | dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Compute attention with torch's fused function (`"sdpa"`) or in plain steps (`"eager"`)."""
        super().set_attn_implementation(attn_implementation, *args, **kwargs)
        inner: Any = self.base_model
        for part in (inner.denoiser, getattr(self, "head", None)):
            if part is not None:
                use_attention(part, self.config._attn_implementation)

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        function = args[0] if args else kwargs.get("gradient_checkpointing_func")
        if enable and getattr(function, "keywords", {}).get("use_reentrant"):
            raise ValueError(
                "use_reentrant=True computes blocks without gradients, so that their hidden states could not be "
                'trained: use gradient_checkpointing_kwargs={"use_reentrant": False}, the default.'
            )
        super()._set_gradient_checkpointing(enable, *args, **kwargs)


@contextlib.contextmanager
def _load_reports(where: str) -> Iterator[list[logging.LogRecord]]:
    """Yield a list of transformers' reports on a load in this thread; at the end log what it holds, with the source.

    transformers itself names no source where it is given a state dict.
    """
    reporting = logging.getLogger("transformers.modeling_utils")
    thread = threading.get_ident()
    reports: list[logging.LogRecord] = []

    def is_other(record: logging.LogRecord) -> bool:
        if record.thread != thread or "LOAD REPORT" not in record.getMessage():
            return True
        reports.append(record)
        return False

    reporting.addFilter(is_other)
    try:
        yield reports
    finally:
        reporting.removeFilter(is_other)
        for record in reports:
            record.msg = record.msg.replace("from: None\n", f"from: {where}\n")
            reporting.handle(record)


def use_attention(denoiser: nn.Module, implementation: str | None) -> None:
    """Let a denoiser's attention layers compute as transformers' name for it says."""
    processor: Any = AttnProcessor() if implementation == "eager" else AttnProcessor2_0()
    for module in denoiser.modules():
        if isinstance(module, Attention):
            module.set_processor(processor)


def _shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in plain_state(network).items()}
