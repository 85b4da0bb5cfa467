"""What the page's fields lead to: the two views of a denoiser and the sweep, asked by whoever looks."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import torch
from denoising import own_pipeline, stream, visible
from pictures import feature_maps, figures, heat_map, notice, progress, to_pil
from PIL import Image, ImageOps

from ddae_hf import DDAEForImageClassification, DDAEImageProcessor, DDAEPipeline
from ddae_hf.experiments.devices import best_device
from ddae_hf.experiments.features import FeatureCache, batch_features
from ddae_hf.experiments.images import ImageInputs, Images, labelled_splits, noise_view
from ddae_hf.experiments.models import ready
from ddae_hf.experiments.options import Options, option
from ddae_hf.experiments.plots import image_grid
from ddae_hf.experiments.results import ProbeReport
from ddae_hf.networks import tap_of

HERE = Path(__file__).resolve().parent
RUN = HERE if (HERE / "checkpoint").is_dir() else Path("runs/quickstart")
MAX_PIXELS = 50_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
STRIP, CHANNELS, SECONDS_A_FRAME = 8, 6, 0.1
FIGURES = {
    "validation_accuracy": "Linear probe, held-out images",
    "knn_20": "Nearest 20 images, held-out images",
    "knn_200": "Nearest 200 images, held-out images",
    "l2": "Regularisation l2",
    "alignment": "Alignment",
    "uniformity": "Uniformity",
}
OWN_SAMPLER, NO_CLASS = "the scheduler's", -1


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


def of_run(name: str, help: str) -> Any:
    """Return the option of a path: of what lies in the run's folder, or what an environment variable names."""
    variable = f"DDAE_{name.upper()}"
    return field(
        default_factory=lambda: os.environ.get(variable, str(RUN / name)),
        metadata={"help": f"{help} Or ${variable}."},
    )


@dataclass(kw_only=True)
class DemoOptions(Options):
    """What the page shows."""

    checkpoint: str = of_run("checkpoint", "Generator, folder or Hub id, in any layout.")
    classifier: str = of_run("classifier", "Classifier, folder or Hub id, as linear_probe.py or sweep.py save it.")
    sweep: str = of_run("sweep", "Folder that sweep.py wrote.")
    features_dir: str = of_run("features", "Folder where the features of the training images are kept.")
    train_split: str = option("train", "Split of the images that neighbours are found among.")
    test_split: str = option("test", "Split of the images to click on.")
    max_train_samples: int | None = option(None, "Use N training images of all classes, always the same ones.")
    max_test_samples: int | None = option(None, "Use N test images of all classes, always the same ones.")
    batch_size: int = option(250, "Of the pass that computes the features.")
    cache_dir: str | None = option(None, "Where downloads are kept.")
    host: str | None = option(None, "Address to listen on; by default this machine's own alone.")
    port: int | None = option(None, "Port; by default the first free one from 7860 on.")


class Demo:
    """What the page shows: the two views of a denoiser, the images, the sweep. Nothing in it changes between calls.

    Raises:
        ValueError: What cannot be opened, or images without labels.
        OSError: No such checkpoint, or no space left for the features.
    """

    def __init__(self, options: DemoOptions, images: Images):
        self.options, self.images = options, images
        self.pipeline = DDAEPipeline.from_pretrained(options.checkpoint, cache_dir=options.cache_dir).to(best_device())
        self.model = DDAEForImageClassification.from_pretrained(options.classifier, cache_dir=options.cache_dir)
        self.processor = DDAEImageProcessor.from_pretrained(options.classifier, cache_dir=options.cache_dir)
        ready(self.model.eval())
        if self.pipeline.vae is not None:
            self.pipeline.vae.enable_slicing()
        self.train, self.test = labelled_splits(images, options)
        there = (Path(options.sweep) / ProbeReport.file).exists()
        self.sweep = ProbeReport.read(options.sweep) if there else None
        self.features = torch.from_numpy(self.training_features())

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

    def training_features(self) -> np.ndarray:
        """Return the features (N, C) of the training images, from disk if they were computed before."""
        layer, sigma = self.tap
        inputs, size = ImageInputs(self.train, self.processor), self.options.batch_size
        cache = FeatureCache(self.options.features_dir, self.model.ddae, self.model.config.noise_seed)
        found = cache.features(
            lambda start: inputs.batches(size, start=start, title="Features of the training images"),
            len(inputs),
            [layer],
            sigma,
            view=noise_view(False, 0),
            data=inputs.identity,
        )
        return np.array(found[layer])

    def pixel_values(self, image: Image.Image) -> torch.Tensor:
        """Return an image as the network takes it, (1, C, H, W)."""
        return self.processor(image, return_tensors="pt")["pixel_values"].to(self.model.device)

    def generate(
        self, count: int, steps: int, seed: int | None, sampler: str, label: int, guidance: float
    ) -> Iterator[tuple[str, str, str]]:
        """Yield how far it is, the images, and the first one's way, after steps of the sampling."""
        if seed is None:
            yield notice("Give a seed, a whole number from 0 on: image number i comes from seed + i."), "", ""
            return
        options = {
            "batch_size": count,
            "num_inference_steps": steps,
            "generator": [torch.Generator("cpu").manual_seed(seed + i) for i in range(count)],
            "class_labels": None if label == NO_CLASS else label,
            "sampler": None if sampler == OWN_SAMPLER else sampler,
            "guidance_scale": guidance,
        }
        way: list[tuple[Image.Image, str]] = []
        shown, shown_at, captions = "", 0.0, [f"seed {seed + i}" for i in range(count)]
        vae, side = self.pipeline.vae, self.side
        try:
            with closing(stream(own_pipeline(self.pipeline), STRIP, **options)) as sampling:
                for step in sampling:
                    last = step.number == step.total
                    if step.estimate is None and time.monotonic() - shown_at < SECONDS_A_FRAME:
                        continue
                    if step.estimate is not None or vae is None:  # a VAE would take longer than the steps between
                        images = visible(vae, step.images)
                        images = images.clamp(-1, 1) if last else images
                        shown = figures([to_pil(x) for x in images], captions, side)
                    if step.estimate is not None:
                        pair = [to_pil(images[0]), to_pil(visible(vae, step.estimate[None])[0].clamp(-1, 1))]
                        way.append((image_grid(pair, columns=1), f"sigma {step.sigma:.2g}"))
                    shown_at = time.monotonic()
                    state = "done" if last else f"noise level sigma {step.sigma:.3g} is left"
                    bar = progress(step.number, step.total, f"Step {step.number} of {step.total}: {state}")
                    yield bar, shown, figures(*zip(*way, strict=True), side)
        except ValueError as error:  # options that this checkpoint does not take
            yield notice(str(error)), "", ""

    @torch.no_grad()
    def classify(self, path: str | None, sigma: float) -> tuple[dict[str, float] | None, str, str]:
        """Return the classes' probabilities, what the network sees, and what it makes of it."""
        try:
            image = open_upload(path)
        except ValueError as error:
            return None, notice(str(error)), ""
        model, layer = self.model, self.tap[0]
        clean = self.pixel_values(image)
        outputs = model(clean, sigma=sigma, output_hidden_states=[layer])
        probabilities = outputs.logits[0].float().softmax(-1).tolist()
        diffusion = model.ddae.diffusion
        tap = tap_of(diffusion.denoiser, layer)
        grid = diffusion.network.on_grid(outputs.hidden_states[0], tap, model.config.sample_shape[1:])
        noisy, _ = diffusion.family.noisy(model.ddae.encode(clean), model.ddae.fixed_noise[:1], sigma)
        noisy, vae = visible(model.ddae.vae, noisy), model.ddae.vae
        captions = [f"The image, {clean.shape[-1]} x {clean.shape[-2]} pixels", f"With noise, sigma {sigma:g}"]
        captions[1] += "" if vae is None else ", on its latents; as the VAE decodes them"
        seen = figures([to_pil(clean[0]), to_pil(noisy[0])], captions, 150)
        names = (model.config.id2label[k] for k in range(len(probabilities)))
        return (
            dict(zip(names, probabilities, strict=True)),
            seen,
            figures(*feature_maps(grid[0], CHANNELS), 104),
        )

    def neighbours(self, path: str | None, count: int) -> str:
        """Return the training images whose features are the most like an image's."""
        try:
            image = open_upload(path)
        except ValueError as error:
            return notice(str(error))
        layer, sigma = self.tap
        seed, view = self.model.config.noise_seed, noise_view(True, 0)  # noise that no training image has
        pixels = self.pixel_values(image)
        query = batch_features(self.model.ddae, pixels, [0], [layer], sigma, noise_seed=seed, view=view)[layer].cpu()
        # Centred as in `knn_predict`: features share an offset beside which all are alike.
        mean = self.features.mean(0)
        likeness = torch.cosine_similarity(query - mean, self.features - mean)
        nearest = likeness.topk(min(count, len(likeness)))
        images = self.train.pil(nearest.indices.tolist())
        names = [self.train.names[label] for label in self.train.labels[nearest.indices.numpy()]]
        captions = [f"{name}, cosine {value:.2f}" for name, value in zip(names, nearest.values.tolist(), strict=True)]
        return figures([to_pil(pixels[0]), *images], ["Your image", *captions], 100)

    def pair_figures(self, layer: str, sigma: float) -> tuple[str, str]:
        """Return the sweep's table with a pair marked in it, and the pair's figures."""
        pair = next((pair for pair in self.sweep.pairs if (pair.layer, pair.sigma) == (layer, sigma)), None)
        if pair is None:
            return heat_map(self.sweep.pairs, None), "This pair was not swept."
        lines = [f"**{layer}, sigma {sigma:g}**\n"]
        for name, title in FIGURES.items():
            if (value := getattr(pair, name)) is not None:
                lines.append(f"- {title}: {100 * value:.2f} %" if "held-out" in title else f"- {title}: {value:.4g}")
        return heat_map(self.sweep.pairs, pair), "\n".join(lines)

    def clicked_pair(self, event: gr.EventData) -> tuple[str, float, str, str]:
        """Return the pair whose button was clicked, and what `pair_figures` says of it."""
        pair = self.sweep.pairs[int(event.pair)]
        return pair.layer, pair.sigma, *self.pair_figures(pair.layer, pair.sigma)
