"""Classifying noisy images: a small network on a frozen denoiser's features, against one trained on noisy images.

    from ddae_hf.experiments import Images, classify_noisy
    result = classify_noisy("runs/cifar10_ddpm_unet", Images.open("uoft-cs/cifar10"), output_dir="runs/noisy")
    print(result.table())
    result.curves().savefig("accuracy.png")

Both are told the noise level and learn at levels drawn log-uniformly. The denoiser runs once over the training images
for each view, a draw of level and noise; the multi-layer perceptron (MLP) then learns from these stored features. The
other is a Wide ResNet (Zagoruyko and Komodakis 2016, arXiv 1605.07146) from random weights, with fresh noise in every
step. It sees what the denoiser sees: of a checkpoint with a VAE these are the noisy latents, whose units the noise
levels then have. Test images, each with noise of its own, serve for the final figures alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..augment import random_changes
from ..hidden_states import hidden_size
from ..modeling_ddae import DDAEModel
from ..weights import fingerprint
from .arrays import StrPath, differences, fill, kept_or_temporary, read_json, write_json
from .batches import Batches, whole
from .devices import machine
from .draws import GENERATOR, POSTERIOR, RowDraws, indexed_noise, seed_by, separate_randomness
from .features import FeatureCache, batch_features, features_of_parts, told_text
from .images import ImageInputs, Images, Inputs, Part, SplitOptions, labelled_splits, noise_view, parts_of
from .loading import to_device
from .models import Model, check_taps, open_model, open_processor, report_facts
from .noisy_networks import NoiseConditionalMLP, WideResNet
from .options import PROMPT, option
from .plots import curves, save_picture
from .report import in_memory
from .results import NoisyReport
from .run_folder import STATE, check_same_run, checkpoint_to_resume, saved_checkpoints, saving, step_of
from .sharing import Team
from .stopping import largest, not_finite
from .trainer import LabelledRows
from .training import Loop, accelerated

MLP = "mlp"  # its folder
WIDE_RESNET = "wide_resnet"  # likewise
TEST_VIEW = noise_view(True, 0)  # of noise; the views of training images begin at 2
OF_RIVAL = ["wide_resnet_steps", "wide_resnet_learning_rate"]  # they hold for the steps that are to come
# What stored features and the Wide ResNet both depend on.
COMMON = ["sigma_min", "sigma_max", "random_flip", "random_crop", "seed"]


@dataclass(kw_only=True)
class NoisyOptions(SplitOptions):
    """Options of `classify_noisy`."""

    output_dir: str | None = option(None, "Folder of figures, weights and stored features; the same options resume.")
    features_dir: str | None = option(None, "Folder of test images' features, by default one in output_dir.")
    layers: list[str] | None = option(None, "Layers whose features are put side by side; by default the model's one.")
    null_class: int | None = option(None, "For a class-conditional denoiser: the label that stands for no class.")
    prompt: str | None = option(None, PROMPT)
    sigma_min: float = option(0.02, "Lowest noise level to learn at.")
    sigma_max: float = option(10.0, "Highest noise level to learn at.")
    sigmas: list[float] | None = option(None, "Noise levels to test at; by default 8 from lowest to highest.")
    random_flip: bool = option(False, "Mirror half of the training images.")
    random_crop: int = option(0, "Shift them by up to this many pixels.", metavar="PADDING")
    batch_size: int = option(250, "Images at a time for networks that are not trained.")
    num_views: int = option(8, "Draws of level and noise for every training image's features.")
    hidden_size: int = option(512, "Width of the MLP's hidden layers.")
    num_hidden_layers: int = option(2, "Number of the MLP's hidden layers.")
    dropout: float = option(0.1, "Dropout in the MLP.")
    num_train_epochs: int = option(10, "Passes of the MLP over all stored features.")
    train_batch_size: int = option(256, "Features per step of the MLP.")
    learning_rate: float = option(1e-3, "Learning rate of the MLP.")
    weight_decay: float = option(0.01, "Weight decay of the MLP.")
    wide_resnet: int = option(10, "Widening factor k of WRN-28-k; 0 leaves it out.")
    wide_resnet_steps: int = option(39000, "Steps of the Wide ResNet.")
    wide_resnet_batch_size: int = option(128, "Images per step of the Wide ResNet.")
    wide_resnet_learning_rate: float = option(0.1, "Learning rate of the Wide ResNet.")
    checkpointing_steps: int = option(500, "Save the Wide ResNet's training every N steps.")
    noise_seed: int = option(0, "Seed of levels and noise of stored features and test images.")
    seed: int = option(0, "Seed of everything else that is random in training.")

    def check(self) -> None:
        """Settle the levels to test at, and refuse options that do not go together."""
        low = self.sigma_min
        high = self.sigma_max
        if low >= high:
            raise ValueError(f"sigma_min is {low:g} and sigma_max {high:g}: the first must be the smaller one.")
        self.sigmas = sorted(self.sigmas or np.geomspace(low, high, 8).tolist())
        if self.sigmas[0] < low or self.sigmas[-1] > high:
            raise ValueError(f"sigmas are {self.sigmas}: they must lie between sigma_min and sigma_max.")


@dataclass(kw_only=True)
class NoisyResult(NoisyReport):
    """What `classify_noisy` found: the figures, and in memory the networks with what they are built from."""

    networks: dict[str, tuple[nn.Module, dict[str, Any]]] = in_memory()

    def curves(self) -> Figure:
        """Return a picture of accuracies over noise levels, with their standard errors."""
        lines: dict[str, Any] = {name: 100 * np.array(values) for name, values in self.test_accuracies.items()}
        errors = {name: np.sqrt(y * (100 - y) / self.num_test_images) for name, y in lines.items()}
        sigmas = self.options["sigmas"]
        title = f"Classifying noisy images, {self.num_test_images:,} test images"
        level = f"noise level sigma (standard deviation of the noise on {self.noise_on})"
        lines["chance"] = np.full(len(sigmas), 100 * self.chance)
        return curves(sigmas, lines, title=title, xlabel=level, ylabel="test accuracy (%)", errors=errors)

    def save(self, folder: StrPath) -> None:
        """Write the networks into `mlp` and `wide_resnet`, `accuracy.png`, and at last `eval_results.json`."""
        for name, (network, config) in self.networks.items():
            write_json(Path(folder, name, "config.json"), config)
            save_model(network, str(Path(folder, name, "model.safetensors")))
        save_picture(self.curves(), Path(folder, "accuracy.png"), dpi=120, bbox_inches="tight")
        self.write(Path(folder))


def classify_noisy(
    model: Model, images: Images, options: NoisyOptions | None = None, **changes: Any
) -> NoisyResult | None:
    """Train both classifiers of noisy images, which have labels, and test them at every level.

    The processes of `accelerate launch` share the images whose features are computed. The first one trains the
    classifiers and gets the result, the others get None.

    Raises:
        ValueError: Options that cannot work, a folder of other options, or a training that diverges.
        OSError: No such checkpoint, or no room on the disk.
        Interrupted: A signal came while the Wide ResNet was trained; there is a checkpoint of it.
    """
    options = NoisyOptions.of(options, changes)
    images = Images.open(images, cache_dir=options.cache_dir)
    started = time.monotonic()
    with separate_randomness(), kept_or_temporary(options.output_dir) as folder, contextlib.ExitStack() as stack:
        told: dict[str, Any] = {"null_class": options.null_class, "prompt": options.prompt}
        network = open_model(model, cache_dir=options.cache_dir, num_noise_samples=1, **told)
        options = dataclasses.replace(options, layers=options.layers or [network.config.layer])
        check_taps(network, options.layers or [], (options.sigma_min, options.sigma_max))
        if options.random_crop >= min(sides := network.config.image_size):
            raise ValueError(f"random_crop is {options.random_crop}: it must be below the sides, {sides}.")
        processor = open_processor(model, options.cache_dir)
        train, test = (ImageInputs(part, processor) for part in labelled_splits(images, options))
        study = Study(network, train, test, options, folder)
        if study.team.helps:
            study.team.serve()
            return None
        stack.enter_context(study.team)
        study.checkpoint = check_folders(folder, network, train, options)
        networks: dict[str, tuple[nn.Module, dict[str, Any]]] = {MLP: study.train_mlp()}
        if options.wide_resnet:
            networks[WIDE_RESNET] = study.train_wide_resnet()
        titles = {MLP: "MLP on the denoiser", WIDE_RESNET: f"WRN-28-{options.wide_resnet}"}
        trained = [(titles[name], name, trained) for name, (trained, _) in networks.items()]
        result = NoisyResult(
            num_train_images=len(train),
            num_test_images=len(test),
            chance=1 / len(train.names),
            noise_on="images in [-1, 1]" if network.vae is None else "scaled latents",
            trained_parameters={title: sum(p.numel() for p in found.parameters()) for title, _, found in trained},
            test_accuracies={title: study.accuracies(name, found) for title, name, found in trained},
            seconds_this_run=round(time.monotonic() - started, 1),
            networks=networks,
            **report_facts(model, images, options, train.images, test.images),
            **machine(network.device.type),
        )
        if options.output_dir is not None:
            with saving(folder):
                result.save(folder)
        return result


def check_folders(folder: Path, model: DDAEModel, train: Inputs, options: NoisyOptions) -> Path | None:
    """Note what each sub-folder depends on, or refuse other contents; return the Wide ResNet's last checkpoint."""
    content = {"images": train.images.hash, "labels": train.labels.tolist()}
    data = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    shared = {"preprocessing": train.identity["preprocessing"], "data": data}
    if model.vae is not None:  # both networks see images through it
        shared |= {"vae": fingerprint(model.vae, dtype=None), "sample_posterior": model.config.sample_posterior}
    source = {"scheduler": model.config.scheduler, "pooling": model.config.pooling}
    source |= {"weights": fingerprint(model.denoiser, model.vae, dtype=None), "dtype": str(model.denoiser.dtype)}
    source |= {"generator": GENERATOR, **told_text(model)}
    folders = {"features": (["layers", "null_class", "noise_seed"], source | shared)}
    if options.wide_resnet:
        folders[WIDE_RESNET] = (["wide_resnet", "wide_resnet_batch_size"], shared)
    for name, (names, more) in folders.items():
        path = folder / name / "options.json"
        now = json.loads(json.dumps({name: getattr(options, name) for name in COMMON + names} | more))
        old = read_json(path) if path.exists() else now
        if different := differences(old, now):
            what = f"was made with other options ({'; '.join(different)})"
            raise ValueError(f"{path.parent} {what}: choose another output_dir.")
        write_json(path, now)
    if not options.wide_resnet:
        return None
    rival = folder / WIDE_RESNET
    if (rival / "state.safetensors").exists() and not saved_checkpoints(rival):
        made = f"{rival} holds a training of a version before 0.3.0, which this one does not resume"
        raise ValueError(f"{made}: delete that folder, or choose another output_dir.")
    checkpoint = checkpoint_to_resume(rival, "latest", (*STATE, "model.safetensors", "options.json"))
    if checkpoint is not None and step_of(checkpoint) >= options.wide_resnet_steps:
        now = {name: getattr(options, name) for name in OF_RIVAL}
        check_same_run(now, read_json(checkpoint / "options.json"), (), rival)
    return checkpoint


def log_uniform(options: NoisyOptions, share: Tensor) -> Tensor:
    """Return the noise levels (N,) below which these shares (N,) of their log-uniform distribution are."""
    low = float(options.sigma_min or 0)
    high = float(options.sigma_max or 0)
    sigmas = torch.exp(math.log(low) + share * math.log(high / low))
    return sigmas.clamp(low, high)  # rounding must not lead out of the schedule


@dataclass
class Study:
    """Trains and tests the classifiers of one denoiser."""

    model: DDAEModel
    train: Inputs
    test: Inputs
    options: NoisyOptions
    folder: Path  # of features and checkpoints
    checkpoint: Path | None = None  # from which the Wide ResNet goes on

    def __post_init__(self) -> None:
        self.layers = self.options.layers or []
        self.sigmas = self.options.sigmas or []
        known = partial(features_of_parts, self.model, self.test, layers=self.layers, view=TEST_VIEW)
        self.team = Team({"view": self.computed, "test": known})

    def stored_view(self, view: int) -> tuple[np.ndarray, Tensor]:
        """Return the training images' features (N, C) in a draw, kept on disk, and their levels (N,)."""
        options = self.options
        device = self.model.device
        count = len(self.train)
        size = sum(hidden_size(self.model.denoiser, layer, self.model.config.pooling) for layer in self.layers)

        def batches(start: int, missing: list[str]) -> Iterator[dict[str, Tensor]]:
            return self.team.each("view", parts_of(np.arange(count), options.batch_size, start), view=view)

        name = f"view-{view}"
        features = fill(self.folder / "features", {name: (size,)}, count, batches)[name]
        if not np.isfinite(features).all():
            raise ValueError("Some features are not finite: the network overflows. Run it in float32.")
        levels = RowDraws(options.seed, range(count), device, view).uniform((count,))  # as the batches drew them first
        return features, log_uniform(options, levels)

    def computed(self, parts: Sequence[Part], view: int) -> Iterator[dict[str, Tensor]]:
        """Compute the features, of all layers joined, of parts of the training images in a draw: see `stored_view`."""
        options = self.options
        device = self.model.device
        title = f"features, view {view + 1} of {options.num_views}"
        for (_, rows), images in zip(parts, self.train.parts(parts, title=title, device=device), strict=True):
            draws = RowDraws(options.seed, rows, device, view)
            sigma = log_uniform(options, draws.uniform((len(rows),)))
            changed = random_changes(images, options.random_flip, options.random_crop, draws)
            found = batch_features(
                self.model, changed, rows, self.layers, sigma, noise_seed=options.noise_seed, view=2 + view
            )
            yield {f"view-{view}": torch.cat([found[layer] for layer in self.layers], dim=1)}

    def train_mlp(self) -> tuple[NoiseConditionalMLP, dict[str, Any]]:
        """Return the MLP trained on stored features, which it standardises, and what it is built from."""
        options = self.options
        device = self.model.device
        stored, sigmas = zip(*(self.stored_view(view) for view in range(options.num_views)), strict=True)
        labels = torch.from_numpy(self.train.labels).to(device)
        config = {"in_features": stored[0].shape[1], "num_labels": len(self.train.names)}
        config |= {name: getattr(options, name) for name in ("hidden_size", "num_hidden_layers", "dropout")}
        seed_by(options.seed)
        mlp: Any = NoiseConditionalMLP(**config).to(device).train()
        moments = np.mean([[view.mean(0, np.float64), np.square(view, dtype=np.float64).mean(0)] for view in stored], 0)
        mlp.mean.copy_(torch.from_numpy(moments[0]))
        mlp.deviation.copy_(torch.from_numpy(np.sqrt(np.maximum(moments[1] - moments[0] ** 2, 1e-12))))
        optimizer = torch.optim.AdamW(mlp.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay)
        passes = [view for _ in range(options.num_train_epochs) for view in torch.randperm(len(stored)).tolist()]
        schedule = CosineAnnealingLR(optimizer, len(passes))
        for view in tqdm(passes, desc="MLP"):
            for batch in torch.randperm(len(labels)).split(options.train_batch_size):
                inputs = to_device(torch.from_numpy(stored[view][batch.numpy()]), device)
                some = to_device(batch, device)
                loss = F.cross_entropy(mlp(inputs, sigmas[view][some]), labels[some])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            schedule.step()
        if not (loss.isfinite() and largest(mlp.state_dict().values()).isfinite()):
            raise not_finite(len(passes), loss.item(), options.learning_rate, None)
        return mlp.eval(), config | {"layers": self.layers}

    def train_wide_resnet(self) -> tuple[WideResNet, dict[str, Any]]:
        """Return the Wide ResNet trained on what the denoiser sees, from where an earlier run stopped."""
        options = self.options
        size = options.wide_resnet_batch_size
        steps = options.wide_resnet_steps
        kept = None if options.output_dir is None else self.folder / WIDE_RESNET
        config = {"k": options.wide_resnet, "num_labels": len(self.train.names)}
        config["num_channels"] = self.model.config.sample_shape[0]
        seed_by(options.seed)
        network: Any = WideResNet(**config).to(self.model.device)
        network.to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(
            network.parameters(), options.wide_resnet_learning_rate, momentum=0.9, weight_decay=5e-4, nesterov=True
        )

        def of_epoch(epoch: int) -> list[np.ndarray]:
            order = np.random.default_rng([options.seed, epoch]).permutation(len(self.train))
            return [order[first : first + size] for first in range(0, len(order), size)]

        def loss(batch: dict[str, Tensor], draws: RowDraws) -> Tensor:
            noisy, sigma = self.noisy_batch(batch["pixel_values"], draws)
            logits = network(noisy.to(memory_format=torch.channels_last), sigma)
            return F.cross_entropy(logits, batch["labels"])

        def save(partial: Path) -> None:
            save_model(network, str(partial / "model.safetensors"))
            write_json(partial / "options.json", {name: getattr(options, name) for name in OF_RIVAL})

        if self.checkpoint is not None:
            load_model(network, self.checkpoint / "model.safetensors")
        order = Batches(of_epoch, size)
        rows = LabelledRows(self.train, device=self.model.device)
        loader = DataLoader(rows, batch_sampler=order, collate_fn=cast(Any, whole))
        with accelerated(alone=True, mixed_precision="no", device_placement=False) as accelerator:
            loop = Loop(
                accelerator, network, optimizer, loader, total_steps=steps, seed=options.seed,
                schedule=LambdaLR(optimizer, lambda step: float(1 + np.cos(np.pi * step / steps)) / 2),
                output_dir=kept, checkpointing_steps=options.checkpointing_steps, checkpoints_total_limit=2, save=save,
                desc=f"WRN-28-{options.wide_resnet}", option="wide_resnet_learning_rate",
            )  # fmt: skip
            loop.restore(self.checkpoint)
            loop.run(loss)
            if kept is not None and loop.resumed.steps < steps:
                loop.checkpoint()
        return network.eval(), config

    def noisy_batch(self, images: Tensor, draws: RowDraws) -> tuple[Tensor, Tensor]:
        """Return noisy images or latents (B, C, H, W) and their levels (B,), with draws for the images."""
        shape = (len(images), *self.model.config.sample_shape)
        sigma = log_uniform(self.options, draws.uniform(shape[:1]))
        images = random_changes(images, self.options.random_flip, self.options.random_crop, draws)
        clean = self.model.encode(images, draws.normal(shape))
        return clean + sigma[:, None, None, None] * draws.normal(shape), sigma

    @torch.no_grad()
    def accuracies(self, name: str, network: nn.Module) -> list[float]:
        """Return a classifier's accuracy at every level; the noise of a test image is the same for all of them."""
        answers = self.of_features(network) if name == MLP else self.of_noisy(network)
        device = self.model.device
        labels = torch.from_numpy(self.test.labels).to(device)
        right = torch.zeros(len(self.sigmas), dtype=torch.int64, device=device)
        for number, rows, logits in answers:
            right[number] += (logits.argmax(-1) == labels[rows]).sum()
        return [count / len(self.test) for count in right.tolist()]

    def of_features(self, mlp: nn.Module) -> Iterator[tuple[int, slice, Tensor]]:
        """Yield the MLP's answers to test images: a level's number, rows, and logits (B, K)."""
        size = self.options.batch_size
        count = len(self.test)
        where = self.options.features_dir or self.folder / "features"
        cache = FeatureCache(where, self.model, self.options.noise_seed)
        for number, sigma in enumerate(self.sigmas):

            def batches(start: int, missing: list[str], sigma: float = sigma) -> Iterator[Any]:
                parts = parts_of(np.arange(count), size, start)
                return self.team.each("test", parts, sigma=sigma, noise_seed=self.options.noise_seed, title="test")

            found = cache.kept(batches, count, self.layers, sigma, view=TEST_VIEW, data=self.test.identity)
            for start in range(0, count, size):
                rows = slice(start, start + size)
                values = np.concatenate([found[layer][rows] for layer in self.layers], axis=1)
                features = to_device(torch.from_numpy(values), self.model.device)
                yield number, rows, mlp(features, features.new_full((len(features),), sigma))

    def of_noisy(self, network: nn.Module) -> Iterator[tuple[int, slice, Tensor]]:
        """Yield the Wide ResNet's answers, likewise."""
        config = self.model.config
        seed = self.options.noise_seed
        first = 0
        for images in self.test.batches(self.options.batch_size, title="test", device=self.model.device):
            rows = slice(first, first := first + len(images))
            indices = range(rows.start, rows.stop)
            draws = partial(indexed_noise, indices=indices, seed=seed, view=TEST_VIEW, device=self.model.device)
            own = None
            if config.sample_posterior:
                own = draws(config.sample_shape, purpose=POSTERIOR)
            clean = self.model.encode(images, own)
            noise = draws(config.sample_shape).to(clean)
            for number, sigma in enumerate(self.sigmas):
                yield number, rows, network(clean + sigma * noise, clean.new_full((len(clean),), sigma))
