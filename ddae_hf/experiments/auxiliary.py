"""Auxiliary terms of pretraining: what a denoiser is trained for besides denoising.

Options of pretraining list them, each a kind of term, the layer that it reads, and options of its own:

    auxiliary:
    - {term: dispersive, layer: mid_block, weight: 0.25, until: 0.8}

A term gets hidden states of the pass that the denoising loss is computed of. It may also ask for those of the averaged
network, for the same images and noise, at the same level or a lower one: all terms share one such pass, which ends at
the deepest layer asked for. What a term has of weights is trained with the network, kept for resuming, and left out of
what is saved. Terms that exist are in `terms.py` and `alignment.py`.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..hidden_states import check_layers
from .draws import RowDraws, separate_randomness
from .latent_folder import LatentFolder
from .options import Options, option, unknown

WEIGHTS = Path("state") / "auxiliary.safetensors"  # of terms, in a checkpoint to resume
DENOISING = "denoising"  # the name of the loss that terms are added to


@dataclass(kw_only=True)
class TermOptions(Options):
    """Options that every term has."""

    layer: str = option(help="Name of the layer whose hidden state the term reads.")
    weight: float = option(1.0, "What the term is multiplied by.")
    until: float = option(1.0, "Share of the steps after which the term stops.")


@dataclass
class Setting:
    """What terms are made for: the network in training, what it is trained on, and where."""

    denoiser: Any
    latents: LatentFolder | None  # what it is trained on; None for images
    device: torch.device
    seed: int
    cache_dir: str | None = None


@dataclass
class Seen:
    """A batch as the networks see it."""

    clean: Tensor  # images (B, C, H, W) in [-1, 1], or scaled latents, as the denoiser is trained on them
    noise: Tensor  # standard-normal, (B, C, H, W)
    sigma: Tensor  # (B,), noise levels
    states: Mapping[str, Tensor]  # raw hidden states of the network in training, (B, ...), by layer
    averaged: Mapping[str, Tensor]  # those of the averaged network, without gradients
    draws: RowDraws  # for whatever else is random


class Term(nn.Module):
    """A term of the loss; its parameters are trained with the network."""

    kind: ClassVar[str]  # its name in options
    options_class: ClassVar[type[TermOptions]] = TermOptions
    compares_images: ClassVar[bool] = False  # whether its value depends on which images are in a pass together
    places: ClassVar[frozenset[str]] = frozenset()  # options that say where a network is, which `identity` recognises

    def __init__(self, options: Any, setting: Setting):
        super().__init__()
        self.options = options

    @property
    def averaged_layer(self) -> str | None:
        """The layer of the averaged network that it reads, if any."""
        return None

    @property
    def lowered(self) -> float:
        """How much less time, at most, the averaged network's images have gone towards noise: see `less_noisy`."""
        return 0.0

    @property
    def identity(self) -> str | None:
        """A hash of whatever else the value of a term with weights depends on, which a resumed run must have."""
        return None

    @abstractmethod
    def forward(self, seen: Seen) -> Tensor:
        """Return the term, float32 (), the mean over the images."""


TERMS: dict[str, type[Term]] = {}


def register(term: type[Term]) -> type[Term]:
    """Make a kind of term known."""
    TERMS[term.kind] = term
    return term


def term_options(given: Mapping[str, Any]) -> tuple[type[Term], Any]:
    """Return the kind of term that options describe, and its options, or raise `ValueError`."""
    kind = given.get("term")
    if kind not in TERMS:
        raise ValueError(f"auxiliary: term is {kind!r}: allowed are {', '.join(sorted(TERMS))}.")
    term = TERMS[kind]
    own = {name: value for name, value in given.items() if name != "term"}
    names = [field.name for field in dataclasses.fields(term.options_class)]
    if wrong := [name for name in own if name not in names]:
        raise ValueError(f"auxiliary: {kind}: {unknown(wrong[0], names)}")
    try:
        return term, term.options_class.of(None, own)
    except ValueError as error:
        raise ValueError(f"auxiliary: {kind}: {error}") from error


def lasting(given: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the options of terms that a resumed run must have as before: all but those of where networks are."""
    found = []
    for each in given:
        places = TERMS.get(str(each.get("term")), Term).places
        found.append({name: value for name, value in each.items() if name not in places})
    return found


class Terms(nn.Module):
    """The terms of a run.

    Args:
        given: Their options, with `term`, the kind of each.
        setting: What they are made for.

    Raises:
        ValueError: An unknown kind or option, a layer that the network does not have, or terms that ask the averaged
            network for more than one pass.
    """

    def __init__(self, given: Sequence[Mapping[str, Any]], setting: Setting):
        super().__init__()
        self.terms: dict[str, Term] = {}
        for each in given:
            kind, options = term_options(each)
            check_layers(setting.denoiser, [options.layer])
            same = sum(term.kind == kind.kind for term in self)
            with separate_randomness(setting.seed):
                term = kind(options, setting)
            name = f"{kind.kind}_{same + 1}" if same else kind.kind
            self.terms[name] = term
            self.add_module(name, term)
        reading = {name: term.lowered for name, term in self.terms.items() if term.averaged_layer is not None}
        if len(set(reading.values())) > 1:
            found = ", ".join(f"{name}: {lowered:g}" for name, lowered in reading.items())
            raise ValueError(
                f"auxiliary: the averaged network is asked for passes at different noise levels ({found}), and makes "
                "one a step: give these terms the same levels, or leave all but one out."
            )
        check_layers_of(setting.denoiser, (term.averaged_layer for term in self))
        self.to(setting.device)

    def __iter__(self) -> Iterator[Term]:
        return iter(self.terms.values())

    @property
    def trained(self) -> bool:
        """Whether any term has weights."""
        return any(True for _ in self.parameters())

    @property
    def compares_images(self) -> bool:
        """Whether any term depends on which images are in a pass together."""
        return any(term.compares_images for term in self)

    def active(self, done: float) -> list[str]:
        """Return the names of the terms that count after a share of the steps."""
        return [name for name, term in self.terms.items() if done < term.options.until]

    def layers(self, names: Iterable[str]) -> list[str]:
        """Return the layers of the network in training that these terms read."""
        return _once(self.terms[name].options.layer for name in names)

    def averaged_layers(self, names: Iterable[str]) -> list[str]:
        """Return the layers of the averaged network that these terms read."""
        return _once(self.terms[name].averaged_layer for name in names)

    @property
    def lowered(self) -> float:
        """How much less time, at most, the averaged network's images have gone towards noise."""
        return max((term.lowered for term in self if term.averaged_layer is not None), default=0.0)

    def forward(self, seen: Seen, names: Sequence[str]) -> dict[str, Tensor]:
        """Return these terms, each times its weight, by name; others have no share in any gradient."""
        found = {name: self.terms[name].options.weight * self.terms[name](seen) for name in names}
        resting = [weight for name, term in self.terms.items() if name not in names for weight in term.parameters()]
        if resting and found:  # distributed training waits for every gradient: these are 0
            last = names[-1]
            found[last] = found[last] + 0.0 * sum(weight.sum() for weight in resting)
        return found

    def save(self, folder: Path) -> None:
        """Write the weights into a checkpoint that can be resumed, where there are any."""
        if self.trained and (folder / "state").is_dir():
            weights = {name: value.contiguous().cpu() for name, value in self.state_dict().items()}
            save_file(weights, folder / WEIGHTS, self._identities())

    def _identities(self) -> dict[str, str]:
        """Return the hashes of what the terms depend on besides their weights, by name."""
        return {name: term.identity for name, term in self.terms.items() if term.identity is not None}

    def restore(self, checkpoint: Path) -> None:
        """Read the weights of a checkpoint.

        Raises:
            ValueError: They are not there, or damaged, or were trained beside another network than a term has now.
        """
        if not self.trained:
            return
        if not (checkpoint / WEIGHTS).is_file():
            raise ValueError(f"{checkpoint} has no {WEIGHTS}, the weights of auxiliary terms: resume another one.")
        try:
            with safe_open(checkpoint / WEIGHTS, "pt") as file:
                known = file.metadata() or {}
            if other := [name for name, identity in self._identities().items() if known.get(name) != identity]:
                raise ValueError(
                    f"auxiliary: {other[0]} had another network in {checkpoint}, of other weights, or read in another "
                    "way: give the one that the run began with."
                )
            self.load_state_dict(load_file(checkpoint / WEIGHTS))
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"{checkpoint / WEIGHTS} is damaged ({error}): resume another checkpoint.") from error


def _once(names: Iterable[str | None]) -> list[str]:
    """Return names without repeating any."""
    return list(dict.fromkeys(name for name in names if name is not None))


def check_layers_of(denoiser: Any, names: Iterable[str | None]) -> None:
    """Raise `ValueError` for a name that is not a layer's; None stands for no layer."""
    if layers := _once(names):
        check_layers(denoiser, layers)


def less_noisy(sigma: Tensor, lowest: float, lowered: float, draws: RowDraws) -> Tensor:
    """Return noise levels (B,) that are lower by a random share of `lowered`, uniform and drawn for each image.

    The unit is the time `s = sigma / (1 + sigma)` of flow matching, in which all frameworks go from the image, 0, to
    pure noise, 1. Levels end at `lowest`, or stay where they are below it. With `lowered` 0 nothing is drawn.
    """
    if not lowered:
        return sigma
    time = 1 / (1 + 1 / sigma)
    time = (time - lowered * draws.uniform(tuple(sigma.shape))).clamp(min=0)
    return torch.minimum(sigma, (time / (1 - time)).clamp(min=lowest))
