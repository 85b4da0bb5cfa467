"""`SavesHead`: models of which what stands on the denoiser can be written without it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers.utils.hub import extract_commit_hash

from .adapters import write_adapters
from .checkpoints import Checkpoint, read_checkpoint, read_pipeline
from .pretrained_ddae import DDAEPreTrainedModel
from .remote_code import module_of, save_code
from .weights import HEAD_FILE, base_state, find_file, fingerprint, location, plain_state


class SavesHead(DDAEPreTrainedModel):
    """A model with weights of its own on a `DDAEModel`, its `ddae`."""

    ddae: Any
    _has_head = True

    def save_head(
        self,
        save_directory: str | os.PathLike[str],
        base: str | os.PathLike[str] | None = None,
        *,
        variant: str | None = None,
        include_code: bool = False,
        **hub: Any,
    ) -> None:
        """Write the head without its denoiser: `config.json` and a `head.safetensors` of some kilobytes.

        `from_pretrained` of the folder takes the denoiser from its base, pinned to the base's commit, and refuses a
        base whose weights have changed since. A model in half precision opens in half precision again. Whole weights
        that the folder holds stay there, but are no longer opened. Adapters (`add_lora`) are written beside the head,
        in `adapters/`, which peft opens too.

        Args:
            save_directory: The folder. Without `base` it holds the generative checkpoint already, as `DDAEPipeline` or
                diffusers saved it, and then serves both jobs with one copy of the weights.
            base: The generative checkpoint, a Hub repository id or a folder, if it is not in `save_directory`.
            variant: Which of the base's weights this model was opened with, where the base has several.
            include_code: See `save_pretrained`.
            **hub: `revision`, `subfolder`, `token` and so on, which say where the base's files are.

        Raises:
            ValueError: The denoiser is not that of the base, rounded to its own type (it was fine-tuned, so
                `save_pretrained` is needed), or the base is the folder itself.
        """
        state = plain_state(self).items()
        head = {k: v for k, v in state if not k.startswith("ddae.") or k.startswith("ddae.condition.")}
        lora = self.config.lora
        write_head(Path(save_directory), head, self.ddae.denoiser, self.ddae.vae, base, variant, lora, **hub)
        self._set_auto_map(include_code)
        if include_code or self._auto_class is not None:  # remote code saves its own code again
            save_code(save_directory, module_of(self._auto_name))
        self.config.weights = "head" if lora is None else "adapters"
        self.config.architectures, self.config.dtype = [type(self).__name__], str(self.dtype).removeprefix("torch.")
        self.config.save_pretrained(save_directory)


def write_head(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    denoiser: nn.Module,
    vae: nn.Module | None,
    base: str | os.PathLike[str] | None,
    variant: str | None,
    lora: dict[str, Any] | None = None,
    **hub: Any,
) -> None:
    """Write a head's tensors, adapters too, and what identifies their base: see `SavesHead.save_head`."""
    if base is None and not (folder / "model_index.json").is_file():
        raise ValueError(
            f"{folder} holds no pipeline: save the generative checkpoint there first (`DDAEPipeline.save_pretrained`), "
            "or name another one as `base`."
        )
    name = "." if base is None else os.path.abspath(base) if os.path.isdir(base) else os.fspath(base)
    # Without `base`, what the folder holds of an earlier head plays no part.
    checkpoint = read_pipeline(folder, variant) if base is None else read_checkpoint(base, variant, **hub)
    if base is not None and location(folder) in (location(link.path, **link.hub) for link in checkpoint.chain()):
        raise ValueError(
            f"The base {checkpoint.path} is {folder}, or depends on it: the head would replace what it needs. "
            "Write it to another folder or, if this one holds a pipeline too, leave out `base`."
        )
    original, original_vae = _originals(checkpoint, denoiser, vae)
    found = None
    if base is not None and not os.path.isdir(base):
        found = find_file(base, "model_index.json", **hub) or find_file(base, "config.json", **hub)
    known = {
        "format": "pt",
        "base": name,
        "fingerprint": fingerprint(original, dtype=None),
        "vae_fingerprint": original_vae and fingerprint(original_vae, dtype=None),
        "variant": variant,
        "revision": extract_commit_hash(found, None),
        "subfolder": base and hub.get("subfolder"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    own_tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    save_file(own_tensors, folder / HEAD_FILE, {k: v for k, v in known.items() if v})
    if lora is not None:
        write_adapters(folder, denoiser, lora, None if base is None else name)


def _originals(checkpoint: Checkpoint, denoiser: nn.Module, vae: nn.Module | None) -> tuple[Any, Any]:
    """Return the denoiser and the VAE of a base, or refuse a base that this model does not stand on."""
    original, original_vae = checkpoint.load("denoiser"), checkpoint.load("vae")
    if vae is None and original_vae is not None:
        raise ValueError(
            f"This model was opened without the VAE of {checkpoint.path} and takes latents: put its weights into "
            "one that was opened with the VAE, or write it whole with `save_pretrained`."
        )
    for part, own, its in (("denoiser", denoiser, original), ("VAE", vae, original_vae)):
        if own is not None and not _is_same(own, its):
            raise ValueError(
                f"The {part} of this model is not that of {checkpoint.path}, whether it was fine-tuned or came "
                "from elsewhere: `save_pretrained` writes it whole. (If it is one of the base's variants, pass its "
                "name as `variant`.)"
            )
    return original, original_vae


def _is_same(own: nn.Module, base: nn.Module | None) -> bool:
    """Return whether a network, its adapters aside, has the base's weights, rounded to its own types."""
    weights = base_state(own)
    originals = {} if base is None else plain_state(base)
    return weights.keys() == originals.keys() and all(
        torch.equal(value, originals[name].to(value)) for name, value in weights.items()
    )
