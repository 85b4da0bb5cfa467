"""Calibration: whether a classifier is as often right as it is sure to be, and the temperature that makes it so.

A classifier's confidence is the probability of the class that it names. Its logits divided by a temperature T give the
same classes with other confidences (Guo et al. 2017, arXiv 1706.04599). Logits are tensors (N, K) of N images and K
classes, labels arrays (N,).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .report import percent

BINS = 15


@dataclass(kw_only=True)
class Calibration:
    """How far a probe's confidence on test images can be trusted, as it is and at a temperature.

    Attributes:
        calibration_error: The expected calibration error: see `Reliability.error`.
        negative_log_likelihood: The mean over the images, in nats.
        temperature: What the logits are divided by. It was fitted on held-out images, which the probe that gave their
            logits had not seen; None if that was impossible.
        calibration_error_at_temperature: With the logits divided by it.
        negative_log_likelihood_at_temperature: Likewise.
        num_bins: Number of bins of confidence that calibration errors were measured in.
    """

    calibration_error: float
    negative_log_likelihood: float
    temperature: float | None = None
    calibration_error_at_temperature: float | None = None
    negative_log_likelihood_at_temperature: float | None = None
    num_bins: int = BINS

    def words(self, num_held_out: int, held_out_accuracy: float | None) -> str:
        """Return the figures in sentences, with what the temperature was fitted on and what it is applied to."""
        text = (
            f"With the first noise seed, the probe's expected calibration error on the test images is "
            f"{percent(self.calibration_error)} % ({self.num_bins} bins of confidence), and its mean negative log "
            f"likelihood {self.negative_log_likelihood:.4f} nats"
        )
        if self.temperature is None:
            perfect = ": the probe classifies all held-out images correctly" if held_out_accuracy == 1 else ""
            return f"{text}. No temperature was fitted{perfect}."
        return (
            f"{text}; with its logits divided by a temperature of {self.temperature:.3f} they are "
            f"{percent(self.calibration_error_at_temperature)} % and "
            f"{self.negative_log_likelihood_at_temperature:.4f} nats. The temperature was fitted on the "
            f"{num_held_out:,} held-out images before the probe learnt from them, and is not part of the saved "
            "classifier."
        )


@dataclass
class Reliability:
    """Images in `BINS` bins of confidence, of equal width: how many, how sure they were and how often right.

    Attributes:
        count: Number of images in each bin (B,); a confidence on an edge belongs to the bin above, 1 to the last.
        confidence: Mean confidence in each bin (B,), 0 where it is empty.
        accuracy: Share of the images whose class was named, likewise.
    """

    count: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray

    @property
    def error(self) -> float:
        """The expected calibration error: the mean over images of |accuracy - confidence| of their bins."""
        return float((self.count * np.abs(self.accuracy - self.confidence)).sum() / self.count.sum())


def reliability(logits: Tensor, labels: np.ndarray) -> Reliability:
    """Sort images by the confidence with which they were classified: see `Reliability`."""
    highest, named = torch.softmax(logits.double(), 1).max(1)
    confidence, right = highest.numpy(), named.numpy() == labels
    places = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    count = np.bincount(places, minlength=BINS)
    some = np.maximum(count, 1)
    sums = (np.bincount(places, weights=values, minlength=BINS) for values in (confidence, right))
    return Reliability(count, *(each / some for each in sums))


def negative_log_likelihood(logits: Tensor, labels: np.ndarray) -> float:
    """Return the mean over images of minus the logarithm of their class's probability, in nats."""
    return F.cross_entropy(logits.double(), torch.tensor(labels)).item()


def fitted_temperature(logits: Tensor, labels: np.ndarray) -> float | None:
    """Return the temperature T of the smallest negative log likelihood, or None where there is none.

    The likelihood's negative logarithm is convex in 1 / T. Its derivative, whose zero `scipy.optimize.brentq` finds, is
    the mean over images of the expected logit minus that of their class. There is no zero where all images are
    classified correctly, as the best temperature would be 0, nor where their classes' logits are on average no larger
    than others, as it would be infinite.
    """
    from scipy.optimize import brentq

    logits = logits.double()
    own = logits.gather(1, torch.tensor(labels)[:, None]).squeeze(1)
    sharpest, flattest = (logits.amax(1) - own).mean(), (logits.mean(1) - own).mean()  # derivatives where T is 0, inf
    if not (sharpest > 0 > flattest):
        return None

    def derivative(inverse: float) -> float:
        expected = (torch.softmax(inverse * logits, 1) * logits).sum(1)
        return (expected - own).mean().item()

    above = 1.0
    while derivative(above) <= 0:
        above *= 2
    return 1 / float(brentq(derivative, 0, above, xtol=1e-300, rtol=1e-12))


def calibration_of(logits: Tensor, labels: np.ndarray, temperature: float | None) -> Calibration:
    """Return the figures of test images' logits, as they are and divided by a temperature that is known already.

    Logits that are not finite raise `ValueError`.
    """
    if not logits.isfinite().all():
        raise ValueError("Some logits of test images are not finite: the network overflows. Run it in float32.")
    found = Calibration(
        calibration_error=reliability(logits, labels).error,
        negative_log_likelihood=negative_log_likelihood(logits, labels),
        temperature=temperature,
    )
    if temperature is not None:
        found.calibration_error_at_temperature = reliability(logits / temperature, labels).error
        found.negative_log_likelihood_at_temperature = negative_log_likelihood(logits / temperature, labels)
    return found
