"""Heads: a classifier's own weights, kept beside its generator or apart from it, in place of a second copy of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from .checkpoints import HEAD_FILE, commit_of, fingerprint, read_checkpoint, read_pipeline


def write_head(
    folder: str | os.PathLike[str],
    tensors: dict[str, torch.Tensor],
    denoiser: torch.nn.Module,
    vae: torch.nn.Module | None = None,
    base: str | os.PathLike[str] | None = None,
    **hub: Any,
) -> None:
    """Write a classifier's own tensors into a folder, in place of its whole weights, and what they say of their base.

    Args:
        folder: The folder.
        tensors: The classifier's parameters and buffers.
        denoiser: The denoiser that it was trained on.
        vae: The VAE that made the denoiser's latents, where it works on them.
        base: The checkpoint that has their weights; by default the pipeline in `folder`.
        **hub: Where the base's files are.

    Raises:
        ValueError: No base, or one with another denoiser or VAE.
    """
    folder = Path(folder)
    if base is None and not (folder / "model_index.json").is_file():
        raise ValueError(
            f"{folder} holds no pipeline: save the generative checkpoint there first (`DDAEPipeline.save_pretrained`), "
            "or name another one as `base`."
        )
    name = "." if base is None else os.path.abspath(base) if os.path.isdir(base) else os.fspath(base)
    # Without `base`, what the folder holds of an earlier classifier plays no part.
    checkpoint = read_pipeline(folder) if base is None else read_checkpoint(base, **hub)
    original, original_vae = checkpoint.load_denoiser(), checkpoint.load_vae()
    if vae is None and original_vae is not None:
        raise ValueError(
            f"This classifier was opened without the VAE of {checkpoint.path} and takes latents: put its weights into "
            "one that was opened with the VAE, or write it whole with `save_pretrained`."
        )
    for part, own, its in (("denoiser", denoiser, original), ("VAE", vae, original_vae)):
        if fingerprint(its) != fingerprint(own):
            raise ValueError(
                f"The {part} of this classifier is not that of {checkpoint.path}, whether it was fine-tuned or came "
                "from elsewhere: `save_pretrained` writes it whole."
            )
    known = {"base": name, "fingerprint": fingerprint(original, dtype=None)}
    known |= {} if original_vae is None else {"vae_fingerprint": fingerprint(original_vae, dtype=None)}
    if base is not None:
        known |= {"revision": commit_of(base, **hub) or "", "subfolder": hub.get("subfolder") or ""}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {k: v.detach().cpu().contiguous() for k, v in tensors.items()},
        folder / HEAD_FILE,
        {"format": "pt", **{k: v for k, v in known.items() if v}},
    )
    for whole in folder.glob("model*.safetensors*"):
        whole.unlink()
