"""Heads: a classifier's own weights, kept beside its generator or apart from it, in place of a second copy of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers.utils.hub import extract_commit_hash

from .checkpoints import Checkpoint, read_checkpoint, read_pipeline
from .weights import HEAD_FILE, find_file, fingerprint, location, plain_state


def write_head(
    folder: str | os.PathLike[str],
    tensors: dict[str, torch.Tensor],
    denoiser: torch.nn.Module,
    vae: torch.nn.Module | None = None,
    base: str | os.PathLike[str] | None = None,
    variant: str | None = None,
    **hub: Any,
) -> None:
    """Write a classifier's own tensors into a folder, and what they say of their base.

    Args:
        folder: The folder.
        tensors: The classifier's parameters and buffers.
        denoiser: The denoiser that it was trained on.
        vae: The VAE that made the denoiser's latents, where it works on them.
        base: The checkpoint that has their weights; by default the pipeline in `folder`.
        variant: Which of the base's weights they are, where it has several.
        **hub: Where the base's files are.

    Raises:
        ValueError: No base, `folder` itself as a base, or one with another denoiser or VAE.
    """
    folder = Path(folder)
    if base is None and not (folder / "model_index.json").is_file():
        raise ValueError(
            f"{folder} holds no pipeline: save the generative checkpoint there first (`DDAEPipeline.save_pretrained`), "
            "or name another one as `base`."
        )
    name = "." if base is None else os.path.abspath(base) if os.path.isdir(base) else os.fspath(base)
    # Without `base`, what the folder holds of an earlier classifier plays no part.
    checkpoint = read_pipeline(folder, variant) if base is None else read_checkpoint(base, variant, **hub)
    if base is not None and location(folder) in (location(link.path, **link.hub) for link in checkpoint.chain()):
        raise ValueError(
            f"The base {checkpoint.path} is {folder}, or reaches it: the head would take the place of what it needs. "
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


def _originals(checkpoint: Checkpoint, denoiser: torch.nn.Module, vae: torch.nn.Module | None) -> tuple[Any, Any]:
    """Return the denoiser and the VAE of a base, or refuse one that a classifier with these was not trained on."""
    original, original_vae = checkpoint.load_denoiser(), checkpoint.load_vae()
    if vae is None and original_vae is not None:
        raise ValueError(
            f"This classifier was opened without the VAE of {checkpoint.path} and takes latents: put its weights into "
            "one that was opened with the VAE, or write it whole with `save_pretrained`."
        )
    for part, own, its in (("denoiser", denoiser, original), ("VAE", vae, original_vae)):
        if own is not None and not _is_same(own, its):
            raise ValueError(
                f"The {part} of this classifier is not that of {checkpoint.path}, whether it was fine-tuned or came "
                "from elsewhere: `save_pretrained` writes it whole. (One of the base's variants needs its name as "
                "`variant`.)"
            )
    return original, original_vae


def _is_same(own: torch.nn.Module, base: torch.nn.Module | None) -> bool:
    """Return whether a network has the base's weights, rounded to its own types."""
    if base is None:
        return False
    weights = plain_state(own)
    originals = plain_state(base)
    return weights.keys() == originals.keys() and all(
        torch.equal(value, originals[name].to(value)) for name, value in weights.items()
    )
