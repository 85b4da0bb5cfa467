"""What the page's fields lead to: the two views of a denoiser and the sweep, asked by whoever looks."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import DIGITS_CHECKPOINT
from ..configuration_ddae import DDAEConfig
from ..experiments.devices import best_device
from ..experiments.features import FeatureCache, batch_features
from ..experiments.image_set import ImageSet
from ..experiments.images import ImageInputs, Images, SplitOptions, labelled_splits, noise_view
from ..experiments.models import ready
from ..experiments.options import option
from ..experiments.pairs import Pair
from ..experiments.plots import image_grid
from ..experiments.results import ProbeReport
from ..image_processing_ddae import DDAEImageProcessor
from ..modeling_ddae import DDAEForImageClassification
from ..pipeline_ddae import DDAEPipeline
from ..weights import fingerprint
from .maps import Maps, whole_number
from .nearness import Nearness
from .pictures import figures, heat_map, notice, progress, to_pil
from .steps import own_pipeline, stream, visible

RUN = Path("runs/demo")  # where what the page needs is kept
FIRST = 16  # images that are drawn before anyone asks
STEPS = 50
MAX_IMAGES = 64
MAX_STEPS = 250
MAX_NEIGHBOURS = 48
MAX_SEED = 2**31
SKETCHED = 64  # pixels, the largest images that are drawn on the page
STRIP = 8  # steps of which the network's estimate is shown
SECONDS_A_FRAME = 0.1
FIGURES = {
    "validation_accuracy": "Linear probe, held-out images",
    "knn_20": "Nearest 20 images, held-out images",
    "knn_200": "Nearest 200 images, held-out images",
    "l2": "Regularisation l2",
    "alignment": "Alignment",
    "uniformity": "Uniformity",
}
OWN_SAMPLER = "the scheduler's"
NO_CLASS = -1
UNKNOWN = "This looks like nothing that the network was trained on; the answer below means little."


def sweep_of(denoiser: torch.nn.Module, folder: str) -> tuple[ProbeReport | None, str]:
    """Return the sweep of this very network that a folder holds, or None and why there is none."""
    if not (Path(folder) / ProbeReport.file).exists():
        return None, f"There is no sweep in `{folder}`."
    report = ProbeReport.read(folder)
    if report.fingerprint is None:
        return None, f"The sweep in `{folder}` does not say of which network it is."
    if report.fingerprint != fingerprint(denoiser):
        return None, f"The sweep in `{folder}` is of another network than this one."
    if min(len({pair.layer for pair in report.pairs}), len({pair.sigma for pair in report.pairs})) < 2:
        return None, f"What is in `{folder}` is of one layer or one noise level, which makes no map."
    return report, ""


@dataclass(kw_only=True)
class DemoOptions(SplitOptions):
    """What the page shows."""

    model_name_or_path: str | None = option(
        None, "Generator, folder or Hub id, in any layout; by default the package's own, of handwritten digits."
    )
    classifier: str | None = option(
        None, "Classifier, folder or Hub id, as `ddae probe` or `ddae sweep` saves it; by default the generator's."
    )
    sweep: str | None = option(None, "Folder that `ddae sweep` wrote; by default the classifier's.")
    features_dir: str = option(str(RUN / "features"), "Folder where the features of the images are kept.")
    train_split: str = option("train", "Split of the images that neighbours are found among.")
    test_split: str = option("test", "Split of the images to click on.")
    batch_size: int = option(250, "Of the pass that computes the features.")


def check_classifier(path: str, cache_dir: str | None) -> None:
    """Raise `ValueError` if a folder or a repository of the Hub has no classifier, or one of several taps."""
    config = DDAEConfig.from_pretrained(path, cache_dir=cache_dir)
    if DDAEForImageClassification.__name__ not in (config.architectures or ()):
        raise ValueError(
            f"{path} has no classifier: `ddae probe --model_name_or_path {path}` with --output_dir makes one; name it "
            "with --classifier."
        )
    if config.taps is not None:
        raise ValueError(
            f"{path} has a classifier of {len(config.taps)} taps, but the page reads one layer, at a level that is "
            "moved: name another with --classifier."
        )


class Reading(NamedTuple):
    """What is said of an image: probabilities by class, and pieces of HTML."""

    probabilities: dict[str, float] | None = None
    warning: str = ""  # or why nothing is said
    seen: str = ""  # the image as the network sees it
    maps: str = ""  # what the network makes of it
    neighbours: str = ""  # the training images that are nearest to it


class Demo(Maps):
    """What the page shows: the two views of a denoiser, the images, the sweep.

    Attributes:
        checkpoint: Where the generator is.
        one_network: Whether generator and classifier are of the same weights.
        sweep: The sweep of the generator's network, or None.
        sweep_missing: Why there is none.

    Raises:
        ValueError: What cannot be opened, or images without labels.
        OSError: No such checkpoint.
    """

    def __init__(self, options: DemoOptions, images: Images):
        self.options = options
        self.images = images
        where: dict[str, Any] = {"cache_dir": options.cache_dir}
        self.checkpoint = options.model_name_or_path or DIGITS_CHECKPOINT
        classifier = options.classifier or self.checkpoint
        check_classifier(classifier, options.cache_dir)
        self.pipeline = DDAEPipeline.from_pretrained(self.checkpoint, **where).to(best_device())
        self.model = DDAEForImageClassification.from_pretrained(classifier, **where)
        self.network = self.model.ddae
        self.processor = DDAEImageProcessor.from_pretrained(classifier, **where)
        ready(self.model.eval())
        if self.pipeline.vae is not None:
            self.pipeline.vae.enable_slicing()
        self.train, self.test = labelled_splits(images, options)
        known = list(self.model.config.id2label.values())
        if not set(known) & set(self.train.names):
            raise ValueError(
                f"The classes of the images are {self.train.names[:10]}, and the classifier's {known[:10]}: name "
                "the images that it was fitted on, with --dataset_name or --train_data_dir."
            )
        self.one_network = fingerprint(self.model.ddae.denoiser) == fingerprint(self.pipeline.denoiser)
        self.sweep, self.sweep_missing = sweep_of(self.pipeline.denoiser, options.sweep or classifier)

    def sweep_command(self) -> str:
        """Return the command that makes the sweep."""
        options = self.options
        given = {"model_name_or_path": self.checkpoint, **self.images.opened_with}
        for name in ("train_split", "test_split", "cache_dir"):
            if getattr(options, name) != getattr(DemoOptions, name):
                given[name] = getattr(options, name)
        words = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
        return shlex.join(["ddae", "sweep", *words, "--knn", "--output_dir", options.sweep or str(RUN / "sweep")])

    @property
    def side(self) -> int:
        """The width of generated images on the page: that of the page's smallest pictures, more for large images."""
        return max(76, min(160, self.model.config.image_size[1]))

    @property
    def class_names(self) -> dict[int, str]:
        """The names of the generator's classes by label: its own, or those of the images' classes."""
        own = self.pipeline.config["id2label"] or dict(enumerate(self.train.names or []))
        return {int(label): name for label, name in own.items()}

    @property
    def sketched(self) -> bool:
        """Whether the network's images can be drawn on the page: small square grey ones."""
        channels, height, width = self.model.config.sample_shape
        return self.pipeline.vae is self.model.ddae.vae is None and channels == 1 and height == width <= SKETCHED

    @cached_property
    def examples(self) -> list[Image.Image]:
        """Test images to click on: the first of each of ten classes."""
        labels = self.test.labels
        return self.test.pil([np.flatnonzero(labels == k)[0] for k in np.unique(labels)[:10]])

    def features_of(self, images: ImageSet, view: int) -> Tensor:
        """Return the features (N, C) of images, from disk if they were computed before."""
        layer, sigma = self.tap
        inputs = ImageInputs(images, self.processor)
        title, device = "Features of the images", self.model.ddae.device
        batches = partial(inputs.batches, self.options.batch_size, None, title=title, device=device)
        cache = FeatureCache(self.options.features_dir, self.model.ddae, self.model.config.noise_seed)
        found = cache.features(batches, len(inputs), [layer], sigma, view=view, data=inputs.identity)
        return torch.from_numpy(np.array(found[layer]))

    @cached_property
    def nearness(self) -> Nearness:
        """How far an image is from all training images, and how far test images are."""
        train, test = (
            self.features_of(images, noise_view(held_out, 0))
            for images, held_out in ((self.train, False), (self.test, True))
        )
        return Nearness(train, test)

    @cached_property
    def first_samples(self) -> tuple[str, str, str]:
        """What `generate` ends with before anyone asks for something else."""
        *_, last = self.generate(FIRST, STEPS, 0, OWN_SAMPLER, NO_CLASS, 1)
        return last

    def generate(
        self, count: int, steps: int, seed: int, sampler: str, label: int, guidance: float
    ) -> Iterator[tuple[str, str, str]]:
        """Yield how far it is, the images, and the first one's way, after steps of the sampling."""
        try:
            count = whole_number("Images", count, 1, MAX_IMAGES)
            steps = whole_number("Steps", steps, 1, MAX_STEPS)
            seed = whole_number("Seed", seed, 0, MAX_SEED)
        except ValueError as error:
            yield notice(str(error)), "", ""
            return
        seeds = range(seed, seed + count)
        sampling = stream(
            own_pipeline(self.pipeline), STRIP, batch_size=count, num_inference_steps=steps, guidance_scale=guidance,
            generator=[torch.Generator("cpu").manual_seed(each) for each in seeds],
            class_labels=None if label == NO_CLASS else label,
            sampler=None if sampler == OWN_SAMPLER else sampler,
        )  # fmt: skip
        way: list[Image.Image] = []
        levels: list[str] = []
        shown = ""
        shown_at = 0.0
        vae = self.pipeline.vae
        try:
            for step, sigma, estimate in sampling:
                if estimate is None and time.monotonic() - shown_at < SECONDS_A_FRAME:
                    continue
                last = step.following is None
                if estimate is not None or vae is None:  # a VAE would take longer than the steps between
                    images = visible(vae, step.sample)
                    images = images.clamp(-1, 1) if last else images
                    shown = figures([to_pil(x) for x in images], [f"seed {each}" for each in seeds], self.side)
                if estimate is not None:
                    pair = [to_pil(images[0]), to_pil(visible(vae, estimate[None])[0].clamp(-1, 1))]
                    way.append(image_grid(pair, columns=1))
                    levels.append(f"sigma {sigma:.2g}")
                shown_at = time.monotonic()
                state = "done" if last else f"noise level sigma {sigma:.3g} is left"
                yield progress(step.number, len(step.timesteps), state), shown, figures(way, levels, self.side)
        except ValueError as error:  # options that this checkpoint does not take
            yield notice(str(error)), "", ""

    @torch.no_grad()
    def read(self, pixels: Tensor, sigma: float, count: int) -> Iterator[Reading]:
        """Yield what the classifier says of an image (1, C, H, W), and then how far to trust it."""
        model = self.model
        diffusion = model.ddae.diffusion
        pixels = pixels.to(model.device)
        try:
            count = whole_number("Neighbours", count, 1, MAX_NEIGHBOURS)
            self.check_level(sigma)
        except ValueError as error:
            yield Reading(warning=notice(str(error)))
            return
        layer, level = self.tap
        outputs = model(pixels, sigma=sigma, output_hidden_states=[layer])
        probabilities = outputs.logits[0].float().softmax(-1).tolist()
        clean = model.ddae.encode(pixels)
        noise = model.ddae.fixed_noise[:1]
        noisy, _ = diffusion.family.noisy(clean, noise, sigma)
        denoised = diffusion.denoise(clean + sigma * noise, sigma, diffusion.conditions(None, 1, clean.device))
        seen = [pixels, visible(model.ddae.vae, noisy), visible(model.ddae.vae, denoised).clamp(-1, 1)]
        captions = [
            f"Image, {pixels.shape[-1]} x {pixels.shape[-2]} pixels",
            f"With noise, sigma {sigma:g}",
            "Denoised",
        ]
        reading = Reading(
            probabilities={model.config.id2label[k]: value for k, value in enumerate(probabilities)},
            seen=figures([to_pil(x[0]) for x in seen], captions, 104),
            maps=self.layer_maps(pixels, layer, sigma),
        )
        if "nearness" not in vars(self):  # which takes seconds the first time
            yield reading
        found = batch_features(
            model.ddae, pixels, [0], [layer], level, noise_seed=model.config.noise_seed,
            view=noise_view(True, 0),  # noise that no training image has
        )  # fmt: skip
        query = found[layer].cpu()
        yield reading._replace(warning=self.warning(query), neighbours=self.neighbours(query, count))

    def warning(self, query: Tensor) -> str:
        """Return a warning if features (1, C) are those of no image that the network knows, and else nothing."""
        times = self.nearness.strangeness(query)
        if times <= 1:
            return ""
        far = f"By its features it is {times:.1f} times as far from the training images as 99 in 100 test images are."
        return notice(f"{UNKNOWN} {far}")

    def neighbours(self, query: Tensor, count: int) -> str:
        """Return the training images whose features are nearest to given ones (1, C)."""
        distances, places = (found[0] for found in self.nearness.nearest(query, count))
        images = self.train.pil(places.tolist())
        names = [self.train.names[label] for label in self.train.labels[places.numpy()]]
        captions = [f"{name}, at {distance:.1f}" for name, distance in zip(names, distances.tolist(), strict=True)]
        return figures(images, captions, self.side)

    def pair(self, number: int, image: Tensor | None) -> tuple[str, str, str]:
        """Return the sweep's table with a pair marked in it, its figures, and an image's feature maps there."""
        assert self.sweep is not None
        pair = self.sweep.pairs[number]
        maps = "" if image is None else self.layer_maps(image, pair.layer, pair.sigma)
        return heat_map(self.sweep.pairs, pair), pair_figures(pair), maps


def pair_figures(pair: Pair) -> str:
    """Return the figures of a pair of a sweep."""
    lines = [f"**{pair.layer}, sigma {pair.sigma:g}**\n"]
    for name, title in FIGURES.items():
        if (value := getattr(pair, name)) is not None:
            lines.append(f"- {title}: {100 * value:.2f} %" if "held-out" in title else f"- {title}: {value:.4g}")
    return "\n".join(lines)
