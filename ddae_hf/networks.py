"""Networks: which classes of denoisers are known. To add one, give its `NetworkClass` to `register`."""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Mapping
from typing import Any

import torch

from .building import building, short
from .conditional_unets import UNet2DConditional
from .cut import uncompiled
from .dits import DiT, SelfConditionedDiT
from .latents import VAES, build_vae
from .network_class import NetworkClass, Tap
from .pixart import PixArt
from .unets import SelfConditionedUNet2D, UNet2D

# The network of Ho et al. 2020 for CIFAR-10, which the paper uses: 35,746,307 parameters.
PAPER_UNET: dict[str, Any] = {
    "_class_name": "UNet2DModel",
    "sample_size": 32,
    "block_out_channels": [128, 256, 256, 256],
    "layers_per_block": 2,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": None,
    "norm_eps": 1e-6,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "dropout": 0.1,
}
_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
NETWORKS: dict[str, NetworkClass] = {}
# The components of stock pipelines that embed texts, with the classes of transformers that they may be.
_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast", "T5Tokenizer", "T5TokenizerFast")
_TEXT_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel")
TEXTS = {f"{kind}{number}": known for number in ("", "_2")
         for kind, known in (("tokenizer", _TOKENIZERS), ("text_encoder", _TEXT_ENCODERS))}  # fmt: skip
IGNORED = ("safety_checker", "feature_extractor", "image_encoder")  # components that reading has no use for


def register(network: NetworkClass) -> NetworkClass:
    """Let networks of another class be opened, read and sampled; it replaces a class of the same name."""
    NETWORKS[network.model.__name__] = network
    return network


def check_denoiser_class(name: str | None, where: str = "the denoiser") -> None:
    """Raise `ValueError` unless `name` is a class of denoiser that this package supports."""
    if not isinstance(name, str) or name not in NETWORKS:
        raise ValueError(
            f"{where} is of class {short(name)}, which is not supported: allowed are {', '.join(NETWORKS)}."
        )


def network_of(denoiser: Any) -> NetworkClass:
    """Return the `NetworkClass` of a denoiser or of its config, or else of a class all of whose parts it has.

    Raises:
        ValueError: A class that is not supported.
    """
    if isinstance(denoiser, Mapping):
        name = denoiser.get("_class_name")
    else:
        names = [kind.__name__ for kind in type(uncompiled(denoiser)).__mro__]
        having = {name: [hasattr(denoiser, part) for part in network.parts] for name, network in NETWORKS.items()}
        alike = [name for name, has in having.items() if has and all(has)]
        name = next((name for name in (*names, *alike) if name in NETWORKS), names[0])
    check_denoiser_class(name)
    return NETWORKS[str(name)]


def component_classes(path: str, index: Mapping[str, Any]) -> dict[str, str]:
    """Return the names of the classes of a pipeline's components, from the `model_index.json` in `path`.

    diffusers loads from the library that an index names beside each class, so only diffusers itself may be named, or
    the module of a class of networks that is known, and transformers for text encoders and their tokenizers.
    Components that check or condition on images, in `IGNORED`, are left out.

    Raises:
        ValueError: Another library, or entries that are not pairs of a library and a class.
    """
    named = {network.component for network in NETWORKS.values()} | {"scheduler", "vae"}
    classes = {}
    if not isinstance(index.get("_class_name"), str):
        raise ValueError(f"{path} is damaged: its model_index.json does not name the class of the pipeline.")
    for name, entry in index.items():
        if name in IGNORED or entry == [None, None] or not (isinstance(entry, list) or name in named):
            continue
        if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(word, str) for word in entry):
            raise ValueError(f"{path} is damaged: its model_index.json says that {name} is {short(entry)}.")
        library, classes[name] = entry
        if name in TEXTS and classes[name] not in TEXTS[name]:
            allowed = ", ".join(TEXTS[name])
            raise ValueError(f"{path} has a {name} of class {short(classes[name])}: allowed are {allowed}.")
        allowed = "transformers" if name in TEXTS else "diffusers"
        known = NETWORKS[entry[1]].libraries if entry[1] in NETWORKS else ()
        if library not in (allowed, *known):
            raise ValueError(
                f"{path} has a model_index.json that takes its {name} from {short(library)}: allowed is {allowed}."
            )
    return classes


def check_components(
    where: str, index: Mapping[str, Any], network: NetworkClass, classes: Mapping[str, str], known: set[str]
) -> None:
    """Refuse a pipeline with components that play no part here, or whose texts only other pipelines embed."""
    name = network.model.__name__
    allowed = network.stock_pipelines
    if allowed and index["_class_name"] not in allowed:
        raise ValueError(f"{where} is not supported: allowed with a {name} are {', '.join(allowed)}.")
    if others := sorted(set(classes) - known - {"scheduler", "vae"}):
        raise ValueError(
            f"{where} has components besides its denoiser, scheduler and vae ({', '.join(others)}), which are not "
            "supported: allowed are pipelines such as DDPMPipeline, DDIMPipeline, DiTPipeline and DDAEPipeline, and "
            "the text encoders of StableDiffusionPipeline and the like."
        )
    if not allowed and (texts := sorted(known & TEXTS.keys())):
        raise ValueError(f"{where} is not supported: it has {', '.join(texts)}, but a {name} is told no text.")


def check_sampled(network: NetworkClass, path: str | None = None, pipeline: str | None = None) -> None:
    """Refuse to sample from a network that is told texts: diffusers' own pipelines do.

    Args:
        network: The class of the network.
        path: Where it is from.
        pipeline: The pipeline that is saved there, if one is.
    """
    if not network.stock_pipelines:
        return
    name = network.model.__name__
    if pipeline is None:
        which = " or ".join(network.stock_pipelines)
        how = f"put it into the pipeline that it is of, and sample with diffusers' {which}"
    else:
        how = f"`diffusers.{pipeline}.from_pretrained({path!r})` does"
    raise ValueError(f"DDAEPipeline does not sample from a {name}, which is told a text: {how}.")


def build_denoiser(config: Mapping[str, Any]) -> Any:
    """Build a randomly initialised denoiser from its diffusers config (with `_class_name`), or raise `ValueError`."""
    network = network_of(config)
    with building("denoiser", config, network.model):
        denoiser = network.build(config)
        network.complete(denoiser)
    return denoiser


def build_network(config: Mapping[str, Any]) -> Any:
    """Build a randomly initialised denoiser or VAE from its diffusers config (with `_class_name`)."""
    return build_vae(config) if config.get("_class_name") in VAES else build_denoiser(config)


def skeleton(config: Mapping[str, Any]) -> Any:
    """Return the denoiser or VAE of a diffusers config (with `_class_name`) without memory for its weights.

    The same config gives the same network every time, so it must only be read, and never changed.
    """
    return _skeleton(json.dumps(config, sort_keys=True))


@functools.lru_cache(maxsize=16)
def _skeleton(config: str) -> Any:
    with torch.device("meta"):
        return build_network(json.loads(config))


def present_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a denoiser's config in today's terms, or as it is where no class of networks knows it."""
    found = (network.present_config(config) for network in NETWORKS.values())
    return next((known for known in found if known is not None), config)


def present_name(name: str) -> str:
    """Return a tensor's name in today's terms: diffusers renames tensors of attention from 2022 on opening them."""
    return re.sub(r"\.(query|key|value|proj_attn)\.(?=\w+$)", lambda found: f".{_ATTENTION[found[1]]}.", name)


def tap_of(denoiser: Any, layer: str) -> Tap:
    """Return a tap by its name, or raise `ValueError` that names the nearest ones."""
    known = {tap.name: tap for tap in network_of(denoiser).taps(denoiser)}
    if layer not in known:
        nearest = difflib.get_close_matches(str(layer), known, n=3, cutoff=0.0)
        raise ValueError(
            f"There is no layer {layer!r} in this denoiser. The nearest are {', '.join(nearest)}; "
            "`layer_names(denoiser, inner=True)` lists all."
        )
    return known[layer]


register(UNet2D())
register(DiT())
register(SelfConditionedUNet2D())
register(SelfConditionedDiT())
register(UNet2DConditional())
register(PixArt())
