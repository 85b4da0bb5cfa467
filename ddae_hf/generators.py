"""Where random numbers come from: torch's global generator, one of its own, or whatever draws for each row apart."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor


class Draws(Protocol):
    """Where random numbers come from, in place of a `torch.Generator`: numbers of a shape (B, ...), float32."""

    def uniform(self, shape: tuple[int, ...]) -> Tensor:
        """Draw numbers between 0 and 1."""
        ...

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """Draw standard-normal numbers."""
        ...


Generator = torch.Generator | Draws | None


def uniform(shape: tuple[int, ...], device: Any, generator: Generator = None) -> Tensor:
    """Draw numbers between 0 and 1, float32, by torch's global generator or by one on the device."""
    if not (generator is None or isinstance(generator, torch.Generator)):
        return generator.uniform(shape)
    return torch.rand(shape, device=device, **_drawn_by(generator))


def normal(shape: tuple[int, ...], device: Any, generator: Generator = None) -> Tensor:
    """Draw standard-normal numbers, likewise."""
    if not (generator is None or isinstance(generator, torch.Generator)):
        return generator.normal(shape)
    return torch.randn(shape, device=device, dtype=torch.float32, **_drawn_by(generator))


def normal_quantile(share: Tensor) -> Tensor:
    """Return the numbers below which these shares, between 0 and 1, of the standard normal distribution are."""
    if share.device.type == "mps":  # which has no kernel for the function itself
        return math.sqrt(2) * torch.erfinv(2 * share - 1)
    return torch.special.ndtri(share)


def _drawn_by(generator: torch.Generator | None) -> dict[str, Any]:
    """Return the arguments of torch's random functions: graphs for batches of any size reject `generator=None`."""
    return {} if generator is None else {"generator": generator}
