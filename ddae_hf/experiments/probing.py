"""A probe: how well a linear layer classifies images by a network's features, and the classifier that it makes.

A probe is fitted on a part of the training images, chosen on the rest of them, fitted again on all, and tested once.
Its features come from `Inputs`, images or latents, and are kept on disk: the network runs once for a noise level. But
the paper's probes, `OnlineProbes`, are trained by gradient descent with a forward pass of the network for every batch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..checkpoints import still_generates
from ..configuration_ddae import DDAEConfig
from ..hidden_states import hidden_size
from ..image_processing_ddae import DDAEImageProcessor
from ..modeling_ddae import DDAEForImageClassification, DDAEModel
from ..networks import network_of
from ..pipeline_ddae import DDAEPipeline
from ..saved_heads import SavesHead
from ..weights import location
from .arrays import StrPath
from .batches import Batch, Batches
from .calibration import calibration_of, fitted_temperature
from .classes import draw_images, draw_labels
from .devices import made_fast
from .draws import RowDraws, separate_randomness
from .features import FeatureCache, features_of_parts
from .images import ImageInputs, ImageSet, Inputs, Part, noise_view, parts_of
from .loading import to_device
from .logistic_regression import LinearProbes, Views, alignment, fit_logistic_regression, knn_predict, uniformity
from .metrics import F1
from .models import Model, stock_pipeline_of
from .noise_curve import packed
from .online_probes import OnlineProbes
from .pairs import Pair, Probe
from .sharing import Team
from .training import Loop, accelerated

PIXELS = "pixels"  # the name in place of a layer's where no network is read
NEIGHBOURS = (20, 200)
ALIGNMENT_IMAGES = 2000


class Fitted(NamedTuple):
    """A linear classifier, weights (K, C) and biases (K,) for features as they are, and what it says of test images.

    `predicted` (N,) are their classes, `logits` (N, K) what these were taken from, on the CPU.
    """

    weight: Tensor
    bias: Tensor
    predicted: np.ndarray
    logits: Tensor


@dataclass(eq=False)
class Prober:
    """Linear probes of one network: its features of training and test images, and figures of them.

    Attributes:
        layers: The layers to choose from; `PIXELS` alone is the network's input, whatever the noise level.
        folder: Where features are kept.
        selection_views: The views of the training images that the choice is made on; by default all of the options'.
        rows: Sorted indices of the training images that the choice is made with, `fitted` and `held_out`.
        random: Whether `model` is the one with random weights, `random_model` of another prober.
        team: The processes that compute features, which may be this one alone.
        chosen_on: Indices of the images whose features are read to choose: `rows`; but for a single pair all images, as
            the last fit needs them anyway.
    """

    model: DDAEModel
    train: Inputs
    test: Inputs
    options: Any  # `SweepOptions`
    layers: list[str]
    sigmas: list[float]
    folder: StrPath = ""
    selection_views: Sequence[int] | None = None
    random: bool = False

    def __post_init__(self) -> None:
        self.team = Team({"features": self.computed})
        self.labels: dict[str, Any] = {"train": self.train.labels, "test": self.test.labels}
        order = np.random.default_rng(self.options.seed).permutation(len(self.train))
        order = order[: self.options.max_selection_samples]
        count = max(1, round(self.options.validation_fraction * len(order)))
        self.held_out, self.fitted, self.rows = (np.sort(part) for part in (order[:count], order[count:], order))
        self.chosen_on = np.arange(len(self.train)) if len(self.layers) * len(self.sigmas) == 1 else self.rows

    def features(
        self, split: str, layers: list[str], sigma: float, noise_seed: int, *,
        views: Sequence[int] | None = None, rows: np.ndarray | None = None,
    ) -> dict[str, list[np.ndarray]]:  # fmt: skip
        """Return the features of a split's images, or of those at `rows`: for each layer, an array (N, C) per view."""
        options, inputs = self.options, self.train if split == "train" else self.test
        part = {} if rows is None else {"rows": hashlib.sha256(rows.tobytes()).hexdigest()}
        found: dict[str, list[np.ndarray]] = {layer: [] for layer in layers}
        chosen = np.arange(len(inputs)) if rows is None else rows
        for view in range(options.num_views) if views is None else views:
            if layers == [PIXELS]:
                images = inputs.batches(options.batch_size, rows, view=view, title=f"{split} images, view {view}")
                found[PIXELS].append(torch.cat([batch.flatten(1) for batch in images]).numpy())
                continue
            known = {**inputs.identity, **part, **(options.changes if view else {})}
            number = noise_view(split == "test", view)

            def batches(start: int, missing: list[str], view: int = view, number: int = number) -> Iterator[Any]:
                parts = parts_of(chosen, options.batch_size, start)
                return self.each(parts, split, missing, sigma, noise_seed, view=number, image_view=view)

            cache = FeatureCache(self.folder, self.model, noise_seed)
            for layer, values in cache.kept(batches, len(chosen), layers, sigma, view=number, data=known).items():
                found[layer].append(values)
        return found

    def each(
        self, parts: Sequence[Part], split: str, layers: list[str], sigma: float, noise_seed: int, *,
        view: int, image_view: int,
    ) -> Iterator[dict[str, Tensor]]:  # fmt: skip
        """Yield the features of parts of a split's images, which the team computes: see `features_of_parts`."""
        return self.team.each(
            "features", parts, split=split, layers=layers, sigma=sigma, noise_seed=noise_seed,
            view=view, image_view=image_view, random=self.random,
        )  # fmt: skip

    def computed(
        self, parts: Sequence[Part], *, split: str, layers: list[str], sigma: float, noise_seed: int,
        view: int, image_view: int, random: bool,
    ) -> Iterator[dict[str, Tensor]]:  # fmt: skip
        """Compute this process's share of `each`."""
        return features_of_parts(
            self.model if random == self.random else self.random_model,
            self.train if split == "train" else self.test, parts, layers, sigma, noise_seed=noise_seed,
            view=view, image_view=image_view, title=f"sigma {sigma:g}, {split} images, view {image_view}",
        )  # fmt: skip

    def selection_features(self, sigma: float, views: Sequence[int] | None = None) -> dict[str, list[np.ndarray]]:
        """Return the features of the images `chosen_on`: for each layer, an array (N, C) per view."""
        rows = None if len(self.chosen_on) == len(self.labels["train"]) else self.chosen_on
        views = self.selection_views if views is None else views
        return self.features("train", self.layers, sigma, self.options.noise_seed, views=views, rows=rows)

    def positions(self, indices: np.ndarray) -> np.ndarray:
        """Return the places of images, given by their indices, in `chosen_on`."""
        return np.searchsorted(self.chosen_on, indices)

    def solve(
        self, features: Mapping[str, Views], labels: np.ndarray, l2: Sequence[float], indices: np.ndarray | None = None
    ) -> dict[str, LinearProbes]:
        """Fit every layer: see `fit_logistic_regression`. Pixels, which have one scale already, are only centred."""
        return fit_logistic_regression(
            features, labels, l2, num_classes=len(self.train.names or ()), indices=indices,
            device=self.model.device, standardise=self.layers != [PIXELS],
        )  # fmt: skip

    def level(self, sigma: float) -> list[Pair]:
        """Probe every layer at one noise level, and return the figures of each on held-out training images."""
        options, truth = self.options, self.labels["train"][self.held_out]
        if options.online:
            probes = train_online(self, self.layers, sigma, self.fitted, options.noise_seed)
            found = logits_online(self, probes, "train", sigma, self.held_out, options.noise_seed)
            predicted = {layer: logits.argmax(1).numpy()[None] for layer, logits in found.items()}
        else:
            features, labels = self.selection_features(sigma), self.labels["train"][self.chosen_on]
            solved = self.solve(features, labels, options.l2, self.positions(self.fitted))
            at = self.positions(self.held_out)
            predicted = {layer: solved[layer].predict(features[layer], at) for layer in self.layers}
        pairs = []
        for layer in self.layers:
            scores = [float((classes == truth).mean()) for classes in predicted[layer]]
            best = int(np.argmax(scores))
            logits = found[layer] if options.online else solved[layer].logits(features[layer], best, at)
            pair = Pair(
                layer=layer, sigma=sigma, validation_accuracy=scores[best],
                temperature=fitted_temperature(logits, truth), correct=packed(predicted[layer][best] == truth),
            )  # fmt: skip
            if not options.online:
                pair.l2, pair.by_l2 = options.l2[best], dict(zip(map(str, options.l2), scores, strict=True))
            pairs.append(pair)
        if options.knn or options.alignment:
            self.add_other_figures(pairs, sigma)
        return pairs

    def add_other_figures(self, pairs: list[Pair], sigma: float) -> None:
        """Add to each layer's figures at a noise level what else is asked for, on held-out training images."""
        options, labels = self.options, self.labels["train"]
        views = self.selection_features(sigma, views=[0])
        fitted, tested = self.positions(self.fitted), self.positions(self.held_out)
        counts = [k for k in NEIGHBOURS if k <= len(self.fitted)]
        some = draw_images(labels[self.held_out], ALIGNMENT_IMAGES)  # which of them
        if options.alignment:
            drawn = self.held_out[some]
            others = self.features("train", self.layers, sigma, options.noise_seed, views=[1], rows=drawn)
        for pair in tqdm(pairs, desc=f"sigma {sigma:g}, other figures", leave=False):
            view = views[pair.layer][0]
            if options.knn:
                known = labels[self.fitted]
                predicted = knn_predict(view[fitted], known, view[tested], counts, device=self.model.device)
                for count, classes in predicted.items():
                    setattr(pair, f"knn_{count}", float((classes == labels[self.held_out]).mean()))
            if options.alignment:
                first = view[tested[some]]
                pair.alignment = alignment(first, others[pair.layer][0])
                pair.uniformity = uniformity(first)

    def fit(self, best: Pair, noise_seed: int) -> Fitted:
        """Fit the chosen pair on all training images, and classify the test images."""
        layer, sigma = best.layer, best.sigma
        if self.options.online:
            online = train_online(self, [layer], sigma, np.arange(len(self.train)), noise_seed)
            logits = logits_online(self, online, "test", sigma, np.arange(len(self.test)), noise_seed)[layer]
            return Fitted(*online.linear(layer), logits.argmax(1).numpy(), logits)
        train = self.features("train", [layer], sigma, noise_seed)
        strength: Any = best.l2
        probes = self.solve(train, self.labels["train"], [strength])[layer]
        test = self.features("test", [layer], sigma, noise_seed)[layer]
        return Fitted(probes.weight[0], probes.bias[0], probes.predict(test)[0], probes.logits(test))

    def few_labels(self, best: Pair) -> dict[str, list[float]]:
        """Return the pair's test accuracies with few labels a class, by their number, one for every draw of them."""
        options, labels, layer = self.options, self.labels["train"], best.layer
        figures: dict[str, list[float]] = {}
        if not options.few_labels:
            return figures
        train = self.features("train", [layer], best.sigma, options.noise_seed)
        test = self.features("test", [layer], best.sigma, options.noise_seed)[layer]
        for per_class in options.few_labels:
            scores = figures[str(per_class)] = []
            for draw in range(options.num_draws):
                few = draw_labels(labels, per_class, options.seed + draw)
                # So few labels leave none for choosing l2: it is scikit-learn's default, C = 1 (for two classes, 2).
                probes = self.solve(train, labels, [1 / len(few)], few)[layer]
                scores.append(float((probes.predict(test)[0] == self.labels["test"]).mean()))
        return figures

    def tested(self, pairs: Sequence[Pair], num_noise_seeds: int) -> tuple[Probe, Fitted]:
        """Choose, fit with each noise seed, and test; return the figures, and what was fitted with the first seed."""
        truth, first = self.labels["test"], self.options.noise_seed
        best = max(pairs, key=lambda pair: pair.validation_accuracy or 0.0)  # the first of equals
        fitted = {seed: self.fit(best, seed) for seed in range(first, first + num_noise_seeds)}
        accuracies = {str(seed): float((each.predicted == truth).mean()) for seed, each in fitted.items()}
        f1 = F1().compute(predictions=fitted[first].predicted, references=truth)["f1"]
        found = Probe(
            best=best, test_accuracies=accuracies, test_f1=f1, few_label_test_accuracies=self.few_labels(best),
            calibration=calibration_of(fitted[first].logits, truth, best.temperature),
        )  # fmt: skip
        return found, fitted[first]

    @cached_property
    def random_model(self) -> DDAEModel:
        """The same network with random weights, but with its own VAE and told the same text."""
        config: Any = self.model.config
        with separate_randomness(self.options.seed):
            untrained = DDAEModel(config).eval().to(dtype=self.model.dtype)
        untrained.vae = self.model.vae
        untrained.condition = self.model.condition
        return made_fast(untrained, self.model.device).to(self.model.device)

    def baselines(self) -> dict[str, Probe]:
        """Return the baselines: the network's input, and the same network with random weights, but with its own VAE."""
        fed = "raw pixels" if isinstance(self.train, ImageInputs) else "raw latents"
        probers = {fed: dataclasses.replace(self, layers=[PIXELS], sigmas=[0.0])}
        probers["untrained network"] = dataclasses.replace(self, model=self.random_model, random=True)
        levels = {name: [pair for sigma in each.sigmas for pair in each.level(sigma)] for name, each in probers.items()}
        return {name: each.tested(levels[name], 1)[0] for name, each in probers.items()}


def train_online(prober: Prober, layers: list[str], sigma: float, rows: np.ndarray, noise_seed: int) -> OnlineProbes:
    """Train the probes of some layers on some training images as the paper does, or raise `ValueError` at a NaN loss.

    Every epoch has fresh noise, flips and crops; the optimiser is Adam, on a cosine schedule.
    """
    options, model = prober.options, prober.model
    labels = torch.from_numpy(prober.labels["train"]).to(model.device)
    widths = {layer: hidden_size(model.denoiser, layer, model.config.pooling) for layer in layers}
    steps = math.ceil(len(rows) / options.train_batch_size)

    def of_epoch(epoch: int) -> list[np.ndarray]:
        return np.array_split(np.random.default_rng([options.seed, epoch + 1]).permutation(rows), steps)

    with accelerated(seed=options.seed, alone=True, mixed_precision="no", device_placement=False) as accelerator:
        probes = OnlineProbes(widths, len(prober.train.names or ()), options.protocol == "batch_norm").to(model.device)
        numbers: Any = range(len(labels))  # of the images, which `loss` reads
        order = Batches(of_epoch, options.train_batch_size)
        loader = DataLoader(numbers, batch_sampler=order, collate_fn=lambda some: {"rows": torch.tensor(some)})
        optimizer = torch.optim.Adam(probes.parameters(), lr=options.learning_rate)
        loop = Loop(
            accelerator, probes, optimizer, loader, total_steps=options.num_train_epochs * steps, seed=options.seed,
            schedule=CosineAnnealingLR(optimizer, options.num_train_epochs * steps), desc=f"sigma {sigma:g}, training",
        )  # fmt: skip

        def loss(batch: Batch, draws: RowDraws) -> Tensor:
            epoch = loop.progress.epoch + 1  # the view 0 is of the images as they are
            some = to_device(batch["rows"], model.device)
            parts = [(part, part) for part in np.array_split(batch["rows"].numpy(), prober.team.count) if len(part)]
            view = noise_view(False, epoch)
            found = list(prober.each(parts, "train", layers, sigma, noise_seed, view=view, image_view=epoch))
            features = {layer: torch.cat([part[layer] for part in found]).to(model.device) for layer in layers}
            losses = (F.cross_entropy(logits, labels[some]) for logits in loop.module(features).values())
            return sum(losses, torch.zeros((), device=model.device))

        loop.run(loss)
    return probes.eval()


@torch.no_grad()
def logits_online(
    prober: Prober, probes: OnlineProbes, split: str, sigma: float, rows: np.ndarray, noise_seed: int
) -> dict[str, Tensor]:
    """Return the logits (N, K) that probes give a split's images at `rows`, by layer name, on the CPU."""
    found: dict[str, list[Tensor]] = {layer: [] for layer in probes.layers}
    parts = [(part, part) for part, _ in parts_of(rows, prober.options.batch_size)]
    view = noise_view(split == "test", 0)
    for features in prober.each(parts, split, probes.layers, sigma, noise_seed, view=view, image_view=0):
        for layer, logits in probes({n: each.to(prober.model.device) for n, each in features.items()}).items():
            found[layer].append(logits.cpu())
    return {layer: torch.cat(parts) for layer, parts in found.items()}


def make_classifier(
    model: Model, names: Sequence[str], weight: Tensor, bias: Tensor, *,
    dtype: torch.dtype | str = "auto", cache_dir: str | None = None, **config: Any,
) -> DDAEForImageClassification:  # fmt: skip
    """Return a network with a linear classifier, in evaluation mode, on the CPU if the network comes from a path.

    The network is a checkpoint of any layout, opened in `dtype`, by default its own, or an open model, whose weights
    are copied. The classifier, `weight` (K, C) and `bias` (K,), is for features as they are, and tells K classes apart
    by their `names`; weights that are not finite raise `ValueError`. `config` is what the configuration says,
    such as `layer`, `sigma` and `noise_seed`; with `taps`, C is the number of their features, joined.
    """
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise ValueError("The classifier's weights are not finite: it is not saved. Regularise it more.")
    config |= {"feature_norm": "none", "head": "linear", "id2label": dict(enumerate(names))}
    config["label2id"] = {name: i for i, name in enumerate(names)}
    base: Any
    if isinstance(model, (str, os.PathLike)):
        base = DDAEModel.from_pretrained(model, dtype=dtype, cache_dir=cache_dir, **config)
        described = base.config
    else:
        base = model.base_model  # of a classifier
        described = DDAEConfig.from_dict(base.config.to_dict(), **config)
    state = {f"ddae.{name}": value.clone() for name, value in base.state_dict().items()}
    for name, value in {"classifier.weight": weight, "classifier.bias": bias}.items():
        state[name] = value.to(base.device, base.dtype, copy=True)
    made = DDAEForImageClassification.from_pretrained(None, config=described, state_dict=state, dtype=base.dtype)
    return made.to(base.device).eval()


def save_classifier(
    folder: StrPath, classifier: SavesHead, model: Model,
    processor: DDAEImageProcessor, cache_dir: str | None = None,
) -> None:  # fmt: skip
    """Write a classifier that stands on a model, such as `make_classifier` makes, as one folder.

    It holds the generator as a pipeline, and beside it the classifier's head. A denoiser that was fine-tuned no longer
    generates: then it holds the whole classifier. Of a denoiser that is told a text, whose pipeline is not this
    package's, it holds the head alone, with the embedded text, if the model is in the layout of such a pipeline, whose
    weights then stay where they are; otherwise the whole classifier.
    """
    base = classifier.ddae
    generates = classifier.config.features_only is None and still_generates(base.denoiser, vars(classifier.config))
    if generates and (stock := stock_pipeline_of(model, cache_dir)) is not None:
        here = location(stock.path, **stock.hub) == location(folder)
        classifier.save_head(folder, None if here else stock.path, variant=stock.variant, **stock.hub)
    elif not generates or network_of(base.denoiser).stock_pipelines:
        classifier.save_pretrained(folder)
    else:
        if isinstance(model, (str, os.PathLike)):
            generator = DDAEPipeline.from_pretrained(model, cache_dir=cache_dir)
        else:
            parts = {} if base.vae is None else {"vae": base.vae}
            generator = DDAEPipeline.for_denoiser(base.denoiser, base.scheduler, classifier.config.null_class, **parts)
        generator.save_pretrained(folder)
        classifier.save_head(folder)
    processor.save_pretrained(folder)


@torch.no_grad()
def classify(
    classifier: DDAEForImageClassification, images: ImageSet, processor: DDAEImageProcessor, batch_size: int = 250
) -> np.ndarray:
    """Return the classes (N,) that a classifier gives images."""
    read = ImageInputs(images, processor).batches(batch_size, title="classifier", device=classifier.device)
    answers: Any = (classifier(batch) for batch in read)
    return torch.cat([answer.logits.argmax(-1) for answer in answers]).cpu().numpy()
