"""What the page's fields lead to: the two views of a denoiser and the sweep, asked by whoever looks."""

from __future__ import annotations

import shlex
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..diffusion import Diffusion
from ..experiments.devices import best_device
from ..experiments.features import FeatureCache, batch_features
from ..experiments.images import ImageInputs, Images, SplitOptions, labelled_splits, noise_view
from ..experiments.models import ready
from ..experiments.options import option
from ..experiments.pairs import Pair
from ..experiments.plots import image_grid
from ..experiments.results import ProbeReport
from ..image_processing_ddae import DDAEImageProcessor
from ..latents import decode
from ..modeling_ddae import DDAEForImageClassification
from ..networks import tap_of
from ..pipeline_ddae import DDAEPipeline
from ..sampling import Step
from ..weights import fingerprint
from .pictures import feature_maps, figures, heat_map, notice, progress, to_pil

RUN = Path("runs/quickstart")  # where `ddae quickstart` writes
MAX_PIXELS = 50_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
STRIP = 8  # steps of which the network's estimate is shown
CHANNELS = 6  # of a hidden state that are shown
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


def open_upload(path: str | None) -> Image.Image:
    """Return the image in a file, turned upright; raise `ValueError`, to be read by who sent it, if there is none."""
    if path is None:
        raise ValueError("No image yet: upload one, or click an example.")
    try:
        with Image.open(path, formats=FORMATS) as image:
            if (pixels := image.width * image.height) <= MAX_PIXELS:
                return ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow raises a dozen kinds
        raise ValueError("This file holds no image that can be read: send a PNG, JPEG or WebP file.") from error
    raise ValueError(
        f"This image has {pixels / 1e6:.0f} million pixels, and at most {MAX_PIXELS / 1e6:.0f} are taken: make it "
        "smaller. The network sees a few pixels of it anyway."
    )


def sweep_of(denoiser: torch.nn.Module, folder: str) -> tuple[ProbeReport | None, str]:
    """Return the sweep of this very network that a folder holds, or None and why there is none."""
    if not (Path(folder) / ProbeReport.file).exists():
        return None, f"There is no sweep in `{folder}`."
    report = ProbeReport.read(folder)
    if report.fingerprint is None:
        return None, f"The sweep in `{folder}` does not say of which network it is."
    if report.fingerprint != fingerprint(denoiser):
        return None, f"The sweep in `{folder}` is of another network than this one."
    return report, ""


@dataclass(kw_only=True)
class DemoOptions(SplitOptions):
    """What the page shows."""

    model_name_or_path: str = option(str(RUN / "checkpoint"), "Generator, folder or Hub id, in any layout.")
    classifier: str = option(
        str(RUN / "classifier"), "Classifier, folder or Hub id, as `ddae probe` or `ddae sweep` saves it."
    )
    sweep: str = option(str(RUN / "sweep"), "Folder that `ddae sweep` wrote.")
    features_dir: str = option(str(RUN / "features"), "Folder where the features of the training images are kept.")
    train_split: str = option("train", "Split of the images that neighbours are found among.")
    test_split: str = option("test", "Split of the images to click on.")
    batch_size: int = option(250, "Of the pass that computes the features.")


class Demo:
    """What the page shows: the two views of a denoiser, the images, the sweep. Nothing in it changes between calls.

    Attributes:
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
        self.pipeline = DDAEPipeline.from_pretrained(options.model_name_or_path, **where).to(best_device())
        self.model = DDAEForImageClassification.from_pretrained(options.classifier, **where)
        self.processor = DDAEImageProcessor.from_pretrained(options.classifier, **where)
        ready(self.model.eval())
        if self.pipeline.vae is not None:
            self.pipeline.vae.enable_slicing()
        self.train, self.test = labelled_splits(images, options)
        self.one_network = fingerprint(self.model.ddae.denoiser) == fingerprint(self.pipeline.denoiser)
        self.sweep, self.sweep_missing = sweep_of(self.pipeline.denoiser, options.sweep)

    def sweep_command(self) -> str:
        """Return the command that makes the sweep."""
        options = self.options
        given = {"model_name_or_path": options.model_name_or_path, **self.images.opened_with}
        for name in ("train_split", "test_split", "cache_dir"):
            if getattr(options, name) != getattr(DemoOptions, name):
                given[name] = getattr(options, name)
        words = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
        return shlex.join(["ddae", "sweep", *words, "--knn", "--output_dir", options.sweep])

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
    def tap(self) -> tuple[str, float]:
        """The layer and the noise level of the classifier."""
        return self.model.config.layer, self.model.config.sigma

    @cached_property
    def features(self) -> Tensor:
        """The features (N, C) of the training images, from disk if they were computed before."""
        layer, sigma = self.tap
        inputs = ImageInputs(self.train, self.processor)
        batches = partial(inputs.batches, self.options.batch_size, None, title="Features of the training images")
        cache = FeatureCache(self.options.features_dir, self.model.ddae, self.model.config.noise_seed)
        found = cache.features(batches, len(inputs), [layer], sigma, view=noise_view(False, 0), data=inputs.identity)
        return torch.from_numpy(np.array(found[layer]))

    def pixel_values(self, image: Image.Image) -> Tensor:
        """Return an image as the network takes it, (1, C, H, W)."""
        return self.processor(image, return_tensors="pt")["pixel_values"].to(self.model.device)

    def generate(
        self, count: int, steps: int, seed: int | None, sampler: str, label: int, guidance: float
    ) -> Iterator[tuple[str, str, str]]:
        """Yield how far it is, the images, and the first one's way, after steps of the sampling."""
        if seed is None:
            yield notice("Give a seed, a whole number from 0 on: image number i comes from seed + i."), "", ""
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
    def classify(self, path: str | None, sigma: float) -> tuple[dict[str, float] | None, str, str]:
        """Return the classes' probabilities, what the network sees, and what it makes of it."""
        try:
            image = open_upload(path)
        except ValueError as error:
            return None, notice(str(error)), ""
        model = self.model
        vae = model.ddae.vae
        layer = model.config.layer
        clean = self.pixel_values(image)
        outputs = model(clean, sigma=sigma, output_hidden_states=[layer])
        probabilities = outputs.logits[0].float().softmax(-1).tolist()
        diffusion = model.ddae.diffusion
        tap = tap_of(diffusion.denoiser, layer)
        grid = diffusion.network.on_grid(outputs.hidden_states[0], tap, model.config.sample_shape[1:])
        noisy, _ = diffusion.family.noisy(model.ddae.encode(clean), model.ddae.fixed_noise[:1], sigma)
        noisy = visible(vae, noisy)
        captions = [f"The image, {clean.shape[-1]} x {clean.shape[-2]} pixels", f"With noise, sigma {sigma:g}"]
        captions[1] += "" if vae is None else ", on its latents; as the VAE decodes them"
        seen = figures([to_pil(clean[0]), to_pil(noisy[0])], captions, 150)
        made = figures(*feature_maps(grid[0], CHANNELS), 104)
        return {model.config.id2label[k]: value for k, value in enumerate(probabilities)}, seen, made

    def neighbours(self, path: str | None, count: int) -> str:
        """Return the training images whose features are the most like an image's."""
        try:
            image = open_upload(path)
        except ValueError as error:
            return notice(str(error))
        layer, sigma = self.tap
        pixels = self.pixel_values(image)
        view = noise_view(True, 0)  # noise that no training image has
        found = batch_features(
            self.model.ddae, pixels, [0], [layer], sigma, noise_seed=self.model.config.noise_seed, view=view
        )
        query = found[layer].cpu()
        # Centred as in `knn_predict`: features share an offset beside which all are alike.
        mean = self.features.mean(0)
        likeness = torch.cosine_similarity(query - mean, self.features - mean)
        nearest = likeness.topk(min(count, len(likeness)))
        images = self.train.pil(nearest.indices.tolist())
        names = [self.train.names[label] for label in self.train.labels[nearest.indices.numpy()]]
        captions = [f"{name}, cosine {value:.2f}" for name, value in zip(names, nearest.values.tolist(), strict=True)]
        return figures([to_pil(pixels[0]), *images], ["Your image", *captions], 100)


def pair_figures(pairs: Sequence[Pair], layer: str, sigma: float) -> tuple[str, str]:
    """Return a sweep's table with a pair marked in it, and the pair's figures."""
    pair = next((pair for pair in pairs if (pair.layer, pair.sigma) == (layer, sigma)), None)
    if pair is None:
        return heat_map(pairs, None), "This pair was not swept."
    lines = [f"**{layer}, sigma {sigma:g}**\n"]
    for name, title in FIGURES.items():
        if (value := getattr(pair, name)) is not None:
            lines.append(f"- {title}: {100 * value:.2f} %" if "held-out" in title else f"- {title}: {value:.4g}")
    return heat_map(pairs, pair), "\n".join(lines)


def own_pipeline(pipeline: DDAEPipeline) -> DDAEPipeline:
    """Return a pipeline on the same network with a scheduler of its own, for schedulers count their steps."""
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    return DDAEPipeline.for_denoiser(pipeline.denoiser, scheduler, pipeline.null_class, vae=pipeline.vae)


@torch.no_grad()
def stream(
    pipeline: DDAEPipeline, num_estimates: int, **options: Any
) -> Generator[tuple[Step, float, Tensor | None], None, None]:
    """Sample with the options of the pipeline's `steps`; closing the iterator stops the sampling.

    Yield every step, the noise level that is left after it and, at `num_estimates` of them, the first and the last
    among these, what the network takes the first image for, (C, H, W). The pipeline is used by nobody else meanwhile.
    """
    diffusion = Diffusion(pipeline.denoiser, pipeline.scheduler, pipeline.null_class)
    for step in pipeline.steps(**options):
        sigma = 0.0 if step.following is None else diffusion.family.sigma(step.following).item()
        shown = step.number in np.linspace(1, len(step.timesteps), num_estimates).round()
        yield step, sigma, estimate_of(step, diffusion, options.get("class_labels")) if shown else None


def estimate_of(step: Step, diffusion: Diffusion, class_labels: Any) -> Tensor:
    """Return what the network takes the first image of a step for, (C, H, W); of the last step, that image."""
    first = step.sample[:1]
    if step.following is None:
        return first[0]
    conditions = diffusion.conditions(class_labels, len(step.sample), first.device)
    conditions = {name: value[:1] for name, value in conditions.items()}
    if step.sigma is None:
        return diffusion.estimate(first, step.following, conditions)[0]
    return diffusion.denoise(first, step.sigma, conditions)[0]


@torch.no_grad()
def visible(vae: Any, samples: Tensor) -> Tensor:
    """Return samples (B, C, H, W) as images: what a VAE decodes, where they are its latents."""
    return samples if vae is None else decode(vae, samples)
