"""`DDAEPreTrainedModel`: what the models have in common, which is how they are opened, initialised and saved."""

from __future__ import annotations

import copy
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .checkpoints import HEAD_FILE, HUB_ARGUMENTS, computed_buffers, fingerprint, read_checkpoint
from .configuration_ddae import DDAEConfig
from .remote_code import AUTO_MAP


class DDAEPreTrainedModel(PreTrainedModel):
    """Opens every layout of checkpoint, and leaves a denoiser's initialisation to diffusers."""

    config_class = DDAEConfig
    base_model_prefix = "ddae"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _auto_name: str  # the Auto class that opens it
    _inner_prefix = "ddae."  # where the denoiser's weights are among the model's
    _has_head = False  # whether it has weights of its own, which `head.safetensors` keeps
    # Of a classifier's checkpoint, or of one with a VAE that is left out.
    _keys_to_ignore_on_load_unexpected = [r"^classifier\.", r"^feature_norm\.", r"^(ddae\.)?vae\."]
    _supports_sdpa = True
    _no_split_modules = ["ResnetBlock2D", "BasicTransformerBlock"]

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        """Initialise what a checkpoint did not bring. transformers' own rule would re-draw the denoiser."""
        if hasattr(module, "draw_fixed_noise"):
            init.copy_(module.fixed_noise, module.draw_fixed_noise())
            # What no checkpoint holds, such as a DiT's positions, comes without values from the meta device.
            for key, values in computed_buffers(module.config.denoiser).items():
                init.copy_(module.denoiser.get_buffer(key), values)
        elif isinstance(module, nn.BatchNorm1d):
            for buffer, initialise in (("running_mean", init.zeros_), ("running_var", init.ones_)):
                initialise(module.get_buffer(buffer))
            init.zeros_(module.get_buffer("num_batches_tracked"))
        elif callable(reset := getattr(module, "reset_parameters", None)):
            own = list(module.parameters(recurse=False))
            if own and not any(getattr(p, "_is_hf_initialized", False) for p in own):
                reset()

    def restrict_gradients(self) -> None:
        """Ask for gradients only of parameters that can have one."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """Open a checkpoint of any layout: see `ddae_hf.checkpoints`.

        From a generative checkpoint, `layer` and one of `sigma` and `timestep` say where to tap it, and `num_labels`
        (or `id2label`) how many classes the new classifier has. With `vae=None` a denoiser of latents comes without its
        VAE, and takes latents as its images. Everything else is as in transformers.

        Raises:
            ValueError: No checkpoint, a denoiser that is not supported, or a tap that it does not have.
        """
        opened = cls._open(pretrained_model_name_or_path, *model_args, **kwargs)
        (opened[0] if isinstance(opened, tuple) else opened).restrict_gradients()  # loading has made new parameters
        return opened

    @classmethod
    def _open(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        if pretrained_model_name_or_path is None:
            return super().from_pretrained(None, *model_args, **kwargs)
        checkpoint = read_checkpoint(pretrained_model_name_or_path, **kwargs)
        if checkpoint.layout == "transformers" and checkpoint.head is None:
            return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
        config = kwargs.pop("config", None)
        scheduler_given = config is not None or "scheduler" in kwargs
        if config is None:
            config, kwargs = DDAEConfig.from_pretrained(
                pretrained_model_name_or_path, return_unused_kwargs=True, **kwargs
            )
        base = checkpoint.base or checkpoint
        if base.scheduler is None and not scheduler_given and checkpoint.head is None:
            warnings.warn(
                f"{checkpoint.path} holds a network without its scheduler: {config.scheduler['_class_name']} is taken. "
                "If it was trained otherwise, pass `scheduler=` with the scheduler's config.",
                stacklevel=2,
            )
        config = copy.deepcopy(config)
        kwargs = {name: value for name, value in kwargs.items() if name not in HUB_ARGUMENTS}
        own_dtype = dtype if isinstance(dtype, torch.dtype) else None
        denoiser = checkpoint.load_denoiser(own_dtype)
        config.generator_fingerprint = fingerprint(denoiser)
        parts = {"denoiser": denoiser}
        if config.vae is not None:
            parts["vae"] = checkpoint.load_vae()
            if parts["vae"] is None:
                raise ValueError(f"{checkpoint.path} has no vae: a config of one without its weights is of no use.")
        prefix = cls._inner_prefix
        state = {f"{prefix}{part}.{k}": v for part, net in parts.items() for k, v in net.state_dict().items()}
        if checkpoint.head is not None and cls._has_head:
            state |= load_file(checkpoint.head)
        dtype = denoiser.dtype if dtype in (None, "auto") else dtype
        return super().from_pretrained(None, *model_args, config=config, state_dict=state, dtype=dtype, **kwargs)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, include_code: bool = False, **kwargs: Any
    ) -> Any:
        """Write `config.json` and `model.safetensors`, as in transformers.

        Args:
            save_directory: The folder.
            *args: See `PreTrainedModel.save_pretrained`.
            include_code: Whether to write this package's modules beside them, so that the folder, or the repository
                that it becomes, opens with transformers' Auto classes and `trust_remote_code=True` where `ddae_hf` is
                not installed.
            **kwargs: See `PreTrainedModel.save_pretrained`, `push_to_hub` among them.
        """
        Path(save_directory, HEAD_FILE).unlink(missing_ok=True)  # of a classifier that was there before
        self._set_auto_map(include_code)
        if not include_code or self._auto_class is not None:
            return super().save_pretrained(save_directory, *args, **kwargs)
        # transformers writes the code of a class that is registered so, in time for its push.
        type(self).register_for_auto_class(self._auto_name)
        try:
            return super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            type(self)._auto_class = None

    def _set_auto_map(self, include_code: bool) -> None:
        """Let `config.auto_map` name code that is in the folder or in a repository, and no other."""
        known = vars(self.config).pop("auto_map", None) or {}
        if self._auto_class is None:  # otherwise it came as remote code itself, which is written again
            known = AUTO_MAP if include_code else {name: code for name, code in known.items() if "--" in code}
        if known:
            self.config.auto_map = dict(known)

    def set_attn_implementation(self, attn_implementation: str | dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Compute attention with torch's fused function (`"sdpa"`) or in plain steps (`"eager"`)."""
        super().set_attn_implementation(attn_implementation, *args, **kwargs)
        inner: Any = self.base_model
        use_attention(inner.denoiser, self.config._attn_implementation)

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        function = args[0] if args else kwargs.get("gradient_checkpointing_func")
        if enable and getattr(function, "keywords", {}).get("use_reentrant"):
            raise ValueError(
                "use_reentrant=True computes blocks without gradients, so that their hidden states could not be "
                'trained: use gradient_checkpointing_kwargs={"use_reentrant": False}, the default.'
            )
        super()._set_gradient_checkpointing(enable, *args, **kwargs)


def use_attention(denoiser: nn.Module, implementation: str | None) -> None:
    """Let a denoiser's attention layers compute as transformers' name for it says."""
    processor: Any = AttnProcessor() if implementation == "eager" else AttnProcessor2_0()
    for module in denoiser.modules():
        if isinstance(module, Attention):
            module.set_processor(processor)
