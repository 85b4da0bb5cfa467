"""Out-of-distribution detection: does a denoiser know images of its own kind from others, without having seen these?

    from ddae_hf.experiments import Images, detect_outliers

    outside = {"photographs": "runs/photographs", "inverted": "runs/inverted"}
    result = detect_outliers("runs/digits", Images.open("runs/mnist"), outside, max_test_samples=1000)
    print(result.table())

Images of the known data set that were not trained on, and images of others, get scores, of which a higher one says that
an image is from elsewhere: the denoising error at some noise levels, which needs no training images, and distances of
features to those of training images (see `outlier_scores`). A score is judged by how well it tells the sets apart; no
score is chosen or fitted by images of the others.

The error is the training loss of an image, `Diffusion.loss`: of the network's own answer, a mean of squares. It is a
part of a bound on the likelihood, and shares its weakness: a network may denoise simple images of a kind that it never
saw better than those that it knows (Nalisnick et al. 2019, arXiv 1810.09136).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from ..hidden_states import hidden_size
from ..modeling_ddae import DDAEModel
from ..weights import fingerprint
from .arrays import StrPath, described_folder, fill, kept_or_temporary
from .devices import HELP, machine
from .diffusion_classification import check_denoises
from .draws import GENERATOR, POSTERIOR, indexed_noise, separate_randomness
from .features import FeatureCache, evaluating, features_of_parts, told_text
from .image_set import ImageSet
from .images import ImageInputs, Images, Part, SplitOptions, noise_view, parts_of
from .models import Model, check_taps, open_for, open_processor, report_facts
from .options import PROMPT, option
from .outlier_report import OutlierReport
from .outlier_scores import (
    class_mahalanobis,
    mahalanobis,
    nearest_distance,
    separation,
    standardised,
    unit_length,
)
from .plots import histograms, save_picture
from .report import in_memory
from .run_folder import saving
from .sharing import Team

KNOWN = "known"  # in place of a data set's name: the test images of the known one
KINDS = ("error", "nearest", "mahalanobis")
TRAIN_VIEW = noise_view(False, 0)
TEST_VIEW = noise_view(True, 0)


@dataclass(kw_only=True)
class OutlierOptions(SplitOptions):
    """Options of `detect_outliers`."""

    output_dir: str | None = option(None, "Folder of the figures, the picture, errors and features; it resumes.")
    features_dir: str | None = option(None, "Folder where features are kept; by default `features` in output_dir.")
    outside_split: str | None = option(None, "Split of the other data sets; by default test_split, or their only one.")
    scores: list[str] = option(
        list(KINDS),
        "Kinds of scores: `error`, of denoising; `nearest` and `mahalanobis`, distances between features.",
    )
    error_sigmas: list[float] = option([0.1, 0.25, 0.5, 1.0, 2.0], "Noise levels of the denoising error.")
    num_draws: int = option(4, "Draws of noise that an image's errors are means over.")
    layer: str | None = option(None, "Layer of the features; by default the checkpoint's.")
    sigma: float | None = option(None, "Noise level of the features; by default the checkpoint's.")
    neighbour: int = option(50, "Which of the nearest training images a distance is to: the k-th.")
    pooling: Literal["mean", "max", "mean_2x2"] | None = option(
        None,
        "How hidden states become features: their mean, maximum, or the means of their four quarters; by default the "
        "checkpoint's.",
    )
    num_noise_samples: int | None = option(None, "Draws of noise that features are averaged over.")
    null_class: int | None = option(None, "For a class-conditional denoiser: the label that stands for no class.")
    prompt: str | None = option(None, PROMPT)
    batch_size: int = option(250, "Images that the network is given at a time.")
    dtype: Literal["float32", "bfloat16"] | None = option(None, HELP)
    noise_seed: int = option(0, "Seed of all noise.")
    seed: int = option(0, "Seed of the resamples of images, for intervals.")

    def check(self) -> None:
        """Refuse scores that there are not, and settle the levels, each once."""
        if wrong := [name for name in self.scores if name not in KINDS]:
            raise ValueError(f"scores has {wrong[0]!r}: allowed are {', '.join(KINDS)}.")
        if not self.scores or (not self.error_sigmas and "error" in self.scores):
            raise ValueError(f"{'error_sigmas' if self.scores else 'scores'} is empty: give at least one.")
        self.scores = list(dict.fromkeys(self.scores))
        self.error_sigmas = list(dict.fromkeys(self.error_sigmas))

    @property
    def reads_features(self) -> bool:
        """Whether a score is made of features, so that training images are needed."""
        return self.scores != ["error"]


@dataclass(kw_only=True)
class OutlierResult(OutlierReport):
    """What `detect_outliers` found: the figures and, in memory, the scores.

    Attributes:
        scores: By score, those of the known images (N,), as `known`, and of each other data set, float64.
    """

    scores: dict[str, dict[str, np.ndarray]] = in_memory()

    def histograms(self) -> Figure:
        """Return a picture of how the scores of each set are spread."""
        return histograms(self.scores, title=f"Scores of {self.num_images:,} known images and of others")

    def save(self, folder: StrPath) -> None:
        """Write `eval_results.json` and `scores.png`."""
        with saving(folder):
            save_picture(self.histograms(), self.write(Path(folder)).parent / "scores.png", dpi=120)


def detect_outliers(
    model: Model, images: Images, outside: Mapping[str, Any], options: OutlierOptions | None = None, **changes: Any
) -> OutlierResult | None:
    """Score images that are like a denoiser's training images and images of other data sets, and tell them apart.

    `images` are the known ones, with a split to compare with and one to test on, and `outside` are other data sets by
    name, each anything that `Images.open` takes. All pass the checkpoint's image processor. Labels are needed by the
    distance to the nearest class alone, and left unused where there are none.

    With `output_dir` everything is kept there, and an interrupted run goes on; without, it lies in a temporary folder.
    All processes of `accelerate launch` call this: they share the images. The first one gets the result, the others
    get None.

    Raises:
        ValueError: Options that cannot work, images that cannot be read, sets that are the same, too few training
            images, or a damaged file.
        OSError: No such checkpoint, or no room on the disk.
    """
    options = OutlierOptions.of(options, changes)
    images = Images.open(images, cache_dir=options.cache_dir)
    started = time.monotonic()
    with separate_randomness(), kept_or_temporary(options.output_dir) as folder, contextlib.ExitStack() as stack:
        study = open_study(model, images, outside, options)
        if study.team.helps:
            study.team.serve()
            return None
        stack.enter_context(study.team)
        scores = study.scores(folder)
        known = {score: found[KNOWN] for score, found in scores.items()}
        result = OutlierResult(
            num_images=len(study.tested[KNOWN]),
            outside={name: {"num_images": len(study.tested[name]), **study.sources[name]} for name in study.sources},
            separations={
                score: {name: separation(known[score], found[name], options.seed) for name in study.sources}
                for score, found in scores.items()
            },
            scores=scores,
            seconds_this_run=round(time.monotonic() - started, 1),
            **study.read_at(),
            **report_facts(model, images, options, *study.used),
            **machine(study.model.device.type),
        )
    if options.output_dir is not None:
        result.save(options.output_dir)
    return result


def outside_sets(paths: Sequence[str]) -> dict[str, str]:
    """Return data sets by the last part of their path or Hub id, or raise `ValueError` where two share it."""
    named: dict[str, str] = {}
    for path in paths:
        name = Path(path).resolve().name
        if name in named:
            raise ValueError(f"outside has {named[name]} and {path}, which have one name, {name}: rename one of them.")
        named[name] = path
    return named


def open_study(model: Model, images: Images, outside: Mapping[str, Any], options: OutlierOptions) -> Study:
    """Return what scores the images, or raise `ValueError` where model, images and options do not go together."""
    if not isinstance(outside, Mapping) or not outside:
        raise ValueError("outside is empty or no mapping: give at least one other data set, by its name.")
    if wrong := [name for name in outside if not isinstance(name, str) or name in ("", KNOWN)]:
        raise ValueError(
            f"outside has a data set of the name {wrong[0]!r}: a name must be text, neither empty nor {KNOWN!r}."
        )
    chosen = {KNOWN: images[options.test_split]}
    sources: dict[str, dict[str, Any]] = {}
    for name, source in outside.items():
        others = Images.open(source, cache_dir=options.cache_dir)
        split = outside_split(name, others, options)
        chosen[name] = others[split]
        sources[name] = {"split": split, **others.opened_with}
    train = images[options.train_split] if options.reads_features else None
    check_apart(train, chosen)
    chosen = {name: each.take(options.max_test_samples) for name, each in chosen.items()}
    network = open_for(model, options)
    check_denoises(model, network)
    processor = open_processor(model, options.cache_dir)
    tested = {name: ImageInputs(each, processor) for name, each in chosen.items()}
    learnt = None if train is None else ImageInputs(train.take(options.max_train_samples), processor)
    study = Study(network, learnt, tested, sources, options)
    study.check()
    return study


def outside_split(name: str, images: Images, options: OutlierOptions) -> str:
    """Return the split of another data set that is scored."""
    if options.outside_split is not None:
        return options.outside_split
    if options.test_split in images.splits:
        return options.test_split
    if len(images.splits) > 1:
        raise ValueError(
            f"The data set {name!r} has the splits {', '.join(images.splits)}, and no {options.test_split!r}: say with "
            "outside_split which one is scored."
        )
    return images.splits[0]


def check_apart(train: ImageSet | None, chosen: Mapping[str, ImageSet]) -> None:
    """Raise `ValueError` where two of the sets are a stream or the same images."""
    named = {} if train is None else {"the training images": train}
    named |= {
        "the known test images" if name == KNOWN else f"the images of {name!r}": each for name, each in chosen.items()
    }
    known: dict[str, str] = {}
    for name, each in named.items():
        if each.streaming:
            raise ValueError("A stream has no images by their number: leave out streaming.")
        if each.hash in known:
            raise ValueError(f"Two of the sets are the same, {known[each.hash]} and {name}: give others.")
        known[each.hash] = name


class Study:
    """Scores images by a denoiser.

    Attributes:
        train: Training images, which features are compared with; none where no score is made of features.
        tested: The known images, as `known`, and the other data sets' by name.
        sources: What is said of the other data sets, by name.
    """

    def __init__(
        self, model: DDAEModel, train: ImageInputs | None, tested: dict[str, ImageInputs],
        sources: dict[str, dict[str, Any]], options: OutlierOptions,
    ):  # fmt: skip
        self.model = model
        self.train = train
        self.tested = tested
        self.sources = sources
        self.options = options
        self.layer = str(options.layer or model.config.layer)
        self.sigma = float(model.config.sigma if options.sigma is None else options.sigma)  # type: ignore[arg-type]
        self.team = Team({"errors": self.computed_errors, "features": self.computed_features})

    @property
    def used(self) -> list[ImageSet]:
        """The splits of the known data set that were used."""
        return [each.images for each in (self.train, self.tested[KNOWN]) if each is not None]

    @property
    def num_features(self) -> int:
        """The number of features of an image."""
        return hidden_size(self.model.denoiser, self.layer, self.model.config.pooling)

    def read_at(self) -> dict[str, Any]:
        """Return what a report says of the features; nothing where there are none."""
        if self.train is None:
            return {}
        facts = {"layer": self.layer, "sigma": self.sigma, "num_features": self.num_features}
        return facts | {"num_train_images": len(self.train)}

    def check(self) -> None:
        """Raise `ValueError` where the network or the numbers of images do not allow a score."""
        options = self.options
        if "error" in options.scores:
            check_taps(self.model, [], options.error_sigmas)
        for inputs in self.tested.values():
            inputs.read([0])  # the processor says which images it cannot take
        if self.train is None:
            return
        check_taps(self.model, [self.layer], [self.sigma])
        count = len(self.train)
        if "nearest" in options.scores and options.neighbour > count:
            raise ValueError(f"neighbour is {options.neighbour}: allowed are 1 to the {count} training images.")
        means = 1 if self.train.labels is None else len(np.unique(self.train.labels))
        if "mahalanobis" in options.scores and count < self.num_features + means:
            raise ValueError(
                f"{count} training images are too few for the covariance of {self.num_features} features"
                f"{f' and the means of {means} classes' if means > 1 else ''}: give at least "
                f"{self.num_features + means}, or leave mahalanobis out of scores."
            )

    def scores(self, folder: Path) -> dict[str, dict[str, np.ndarray]]:
        """Return every score of every set's images (N,), float64: by score and by the set's name."""
        options = self.options
        found: dict[str, dict[str, np.ndarray]] = {}
        for name in self.tested:
            of_images = self.error_scores(folder, name) if "error" in options.scores else {}
            if self.train is not None:
                of_images |= self.feature_scores(Path(options.features_dir or folder / "features"), name)
            for score, values in of_images.items():
                found.setdefault(score, {})[name] = values
        return found

    def error_scores(self, folder: Path, name: str) -> dict[str, np.ndarray]:
        """Return the mean errors of a set's images at every level, and their mean over levels."""
        errors = self.kept_errors(folder / "errors", name).mean(1, dtype=np.float64)
        levels = self.options.error_sigmas
        found = {f"denoising error, sigma {sigma}": errors[:, place] for place, sigma in enumerate(levels)}
        return found if len(levels) == 1 else {"denoising error, mean of levels": errors.mean(1), **found}

    def feature_scores(self, folder: Path, name: str) -> dict[str, np.ndarray]:
        """Return the distances of a set's images to training images, by their features."""
        options = self.options
        assert self.train is not None
        train = self.kept_features(folder, self.train, TRAIN_VIEW).astype(np.float64)
        features = self.kept_features(folder, self.tested[name], TEST_VIEW, name).astype(np.float64)
        if not (np.isfinite(train).all() and np.isfinite(features).all()):
            raise ValueError("Some features are not finite: the network overflows. Run it in float32.")
        found: dict[str, np.ndarray] = {}
        if "nearest" in options.scores:
            nearest = f"nearest training image {options.neighbour}"
            near = nearest_distance(unit_length(features), unit_length(train), options.neighbour)
            found[f"{nearest}, features of length 1"] = near
            near = nearest_distance(standardised(features, train), standardised(train, train), options.neighbour)
            found[f"{nearest}, standardised features"] = near
        if "mahalanobis" in options.scores:
            found["Mahalanobis distance"] = mahalanobis(features, train)
            if self.train.labels is not None:
                found["Mahalanobis distance, nearest class"] = class_mahalanobis(features, train, self.train.labels)
        return found

    def kept_features(self, folder: Path, inputs: ImageInputs, view: int, name: str | None = None) -> np.ndarray:
        """Return the features (N, C) of training images or, by name, of a set, computing those that are missing."""

        def batches(start: int, missing: list[str]) -> Iterator[dict[str, Tensor]]:
            parts = parts_of(np.arange(len(inputs)), self.options.batch_size, start)
            return self.team.each("features", parts, name=name, view=view)

        cache = FeatureCache(folder, self.model, self.options.noise_seed)
        found = cache.kept(batches, len(inputs), [self.layer], self.sigma, view=view, data=inputs.identity)
        return found[self.layer]

    def computed_features(self, parts: Sequence[Part], name: str | None, view: int) -> Iterator[dict[str, Tensor]]:
        """Yield the features of parts of the training images or, by name, of a set."""
        inputs = self.train if name is None else self.tested[name]
        title = f"Features, {'training images' if name is None else name}"
        return features_of_parts(
            self.model, inputs, parts, [self.layer], self.sigma,
            noise_seed=self.options.noise_seed, view=view, title=title,
        )  # fmt: skip

    def kept_errors(self, folder: Path, name: str) -> np.ndarray:
        """Return the errors (N, draws, levels) of a set's images, mapped from disk, computing the missing ones."""
        inputs = self.tested[name]

        def batches(start: int, missing: list[str]) -> Iterator[dict[str, Tensor]]:
            parts = parts_of(np.arange(len(inputs)), self.options.batch_size, start)
            return self.team.each("errors", parts, name=name)

        shape = (self.options.num_draws, len(self.options.error_sigmas))
        where = described_folder(folder, self.identity | {"data": inputs.identity, "count": len(inputs)})
        return fill(where, {"errors": shape}, len(inputs), batches)["errors"]

    @property
    def identity(self) -> dict[str, Any]:
        """What errors depend on besides the images, as JSON."""
        model = self.model
        names = ["denoiser", "scheduler", "null_class", *(["vae", "sample_posterior"] if model.vae is not None else [])]
        return {name: getattr(model.config, name) for name in names} | {
            "weights": fingerprint(model.denoiser, model.vae, dtype=None),
            "dtype": str(model.denoiser.dtype),
            **{name: getattr(self.options, name) for name in ("error_sigmas", "num_draws", "noise_seed")},
            "generator": GENERATOR,
            **told_text(model),
        }

    def computed_errors(self, parts: Sequence[Part], name: str) -> Iterator[dict[str, Tensor]]:
        """Yield the errors (B, draws, levels) of the images of parts of a set."""
        config = self.model.config
        seed = self.options.noise_seed
        inputs = self.tested[name].parts(parts, title=f"Errors, {name}", device=self.model.device)
        # The images have no name here, as their thread then ends at an error: see `Inputs.parts`.
        for (_, numbers), batch in zip(parts, inputs, strict=True):
            own = None
            if config.sample_posterior:
                own = indexed_noise(config.sample_shape, numbers, seed, TEST_VIEW, POSTERIOR, batch.device)
            with evaluating(self.model):
                yield {"errors": self.errors_of(self.model.encode(batch, own), numbers)}

    def errors_of(self, clean: Tensor, numbers: Sequence[int]) -> Tensor:
        """Return the errors (B, draws, levels), float32, of images (B, C, H, W) in [-1, 1] or scaled latents.

        A draw of noise depends on the image's number in its set alone, and is the same at all levels.
        """
        diffusion = self.model.diffusion
        levels = [torch.full((len(clean),), sigma, device=clean.device) for sigma in self.options.error_sigmas]
        found = []
        for draw in range(self.options.num_draws):
            view = noise_view(True, draw)
            noise = indexed_noise(clean.shape[1:], numbers, self.options.noise_seed, view, device=clean.device)
            found.append(torch.stack([diffusion.loss(clean, sigma=level, noise=noise) for level in levels], 1))
        errors = torch.stack(found, 1)
        if not errors.isfinite().all():
            raise ValueError("Some errors are not finite: the network overflows. Run it in float32.")
        return errors
