r"""What ways of reading a denoiser gain, and what they cost: accuracy against operations of an image.

    python -m benchmarks.reading_costs --model_name_or_path ddae_hf/digits_checkpoint \
        --dataset_name runs/outlier_sets/mnist --max_train_samples 2000 --output_dir runs/reading_costs

A sweep on held-out training images chooses a layer and a level once. Around this pair, the readings are: the image
without noise, with the network told the level; one draw of noise; means over 2, 4 and 16 draws; the mean over the image
and its mirror, a draw each, which costs what two draws do; the features of the two or three layers that the sweep found
best at this level, joined, from one pass; those of the best two or three levels, each at its best layer, a pass each.

Each reading's features get the same logistic regression, whose regularisation is chosen on the same held-out images;
then it is fitted on all training images and tested, with each of the noise seeds. Operations are those of products and
convolutions in passes that end at the deepest layer that is read. Seconds are of all readings in turn, a batch each.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import facts, gflop, in_turn, interval, median, table
from ddae_hf import DDAEModel, pool_hidden_states
from ddae_hf.experiments import Images
from ddae_hf.experiments.arrays import StrPath, write_json
from ddae_hf.experiments.draws import POSTERIOR, indexed_noise, separate_randomness
from ddae_hf.experiments.features import evaluating
from ddae_hf.experiments.images import Inputs, labelled_splits, noise_view, parts_of
from ddae_hf.experiments.logistic_regression import fit_logistic_regression
from ddae_hf.experiments.models import open_for, open_processor
from ddae_hf.experiments.pairs import Pair
from ddae_hf.experiments.probing import Prober
from ddae_hf.experiments.sweeping import SweepOptions, changed_inputs, check_sweep, sweep_levels

ONE_DRAW = "one draw"


@dataclass(frozen=True)
class Reading:
    """A way of reading: the layers of each pass, at its level, the draws of noise, and whether the mirror counts."""

    taps: tuple[tuple[float, tuple[str, ...]], ...]
    draws: int = 1  # 0: an image without noise
    mirrored: bool = False

    @torch.no_grad()
    def features(self, model: DDAEModel, images: Any, numbers: Sequence[int], seed: int, view: int) -> torch.Tensor:
        """Return the features (B, C) of images (B, C, H, W), whose noise depends on their numbers, as sweeps' does."""
        found = self._of(model, images, numbers, seed, view)
        if self.mirrored:  # with noise of its own, that of a view that nothing else has
            found = (found + self._of(model, images.flip(-1), numbers, seed, view + 1000)) / 2
        return found

    def _of(self, model: DDAEModel, images: Any, numbers: Sequence[int], seed: int, view: int) -> torch.Tensor:
        config = model.config
        shape = (max(1, self.draws), *config.sample_shape)
        noise = indexed_noise(shape, numbers, seed, view, device=images.device).transpose(0, 1)
        if not self.draws:
            noise = torch.zeros_like(noise)
        own = None
        if config.sample_posterior:
            own = indexed_noise(config.sample_shape, numbers, seed, view, POSTERIOR, images.device)
        clean = model.encode(images, own)
        found = []
        for sigma, layers in self.taps:
            hidden = model.read_layers(clean, list(layers), sigma=sigma, noise=noise)
            found += [pool_hidden_states(hidden[layer], config.pooling) for layer in layers]
        return torch.cat(found, dim=1)


def readings(pairs: Sequence[Pair]) -> dict[str, Reading]:
    """Return the readings around the best of some pairs, each with its accuracy on held-out images."""
    ranked = sorted(pairs, key=lambda pair: -(pair.validation_accuracy or 0.0))
    best = ranked[0]
    own = ((best.sigma, (best.layer,)),)
    found = {ONE_DRAW: Reading(own), "without noise": Reading(own, draws=0)}
    found |= {f"{draws} draws": Reading(own, draws) for draws in (2, 4, 16)}
    found["image and mirror"] = Reading(own, mirrored=True)
    layers = [pair.layer for pair in ranked if pair.sigma == best.sigma]
    levels: dict[float, tuple[str, ...]] = {}
    for pair in ranked:
        levels.setdefault(pair.sigma, (pair.layer,))
    for count in range(2, 1 + min(3, len(layers))):
        found[f"{count} layers"] = Reading(((best.sigma, tuple(layers[:count])),))
    for count in range(2, 1 + min(3, len(levels))):
        found[f"{count} levels"] = Reading(tuple(levels.items())[:count])
    return found


def all_features(model: DDAEModel, inputs: Inputs, reading: Reading, seed: int, test: bool, size: int) -> np.ndarray:
    """Return the features (N, C) of a split's images by a reading."""
    parts = parts_of(np.arange(len(inputs)), size)
    batches = inputs.parts(parts, title="test images" if test else "training images", device=model.device)
    view = noise_view(test, 0)
    with evaluating(model):
        found = [
            reading.features(model, batch, numbers, seed, view).cpu()
            for (_, numbers), batch in zip(parts, batches, strict=True)
        ]
    return torch.cat(found).numpy()


def accuracies(prober: Prober, reading: Reading, seeds: Sequence[int]) -> dict[str, Any]:
    """Return the l2 that is best on held-out images, with the first seed, and the test accuracy with each seed."""
    options = prober.options
    labels = prober.labels["train"]
    found: dict[str, Any] = {"test_accuracies": []}
    for seed in seeds:
        train = all_features(prober.model, prober.train, reading, seed, False, options.batch_size)
        if "l2" not in found:
            features = {"": [train]}
            probes = prober.solve(features, labels, options.l2, prober.fitted)[""]
            right = probes.predict([train], prober.held_out) == labels[prober.held_out]
            found |= {"l2": options.l2[int(right.mean(1).argmax())], "held_out_accuracy": float(right.mean(1).max())}
        probes = fit_logistic_regression(
            {"": [train]}, labels, [found["l2"]], num_classes=len(prober.train.names), device=prober.model.device
        )[""]
        test = all_features(prober.model, prober.test, reading, seed, True, options.batch_size)
        found["test_accuracies"].append(float((probes.predict([test])[0] == prober.labels["test"]).mean()))
    return found | {"num_features": train.shape[1]}


def measure(prober: Prober, seeds: Sequence[int], timed_images: int, repeats: int) -> dict[str, dict[str, Any]]:
    """Return the figures of every reading by its name."""
    model = prober.model
    pairs = sweep_levels(prober, Path(prober.folder) / "levels")
    ways = readings(pairs)
    rows = np.arange(timed_images) % len(prober.test)
    images = prober.test.read(rows, device=model.device)
    found: dict[str, dict[str, Any]] = {}
    with evaluating(model):
        calls = {
            name: (lambda way=way: way.features(model, images, range(timed_images), 0, 1)) for name, way in ways.items()
        }
        seconds = in_turn(calls, repeats, model.device.type)
    for name, way in ways.items():
        with evaluating(model):
            operations = gflop(lambda way=way: way.features(model, images[:1], [0], 0, 1))
        found[name] = asdict(way) | {"gflop": operations, "seconds": seconds[name]}
        found[name] |= accuracies(prober, way, seeds)
        print(table(HEAD, [row(name, found)]).splitlines()[-1], flush=True)
    return found


HEAD = ("reading", "sigma, layers", "numbers", "test accuracy", "more than one draw", "GFLOP an image", "time")


def row(name: str, results: dict[str, dict[str, Any]]) -> list[str]:
    """Return a reading's line of the table; ± is half of a 95 % interval over noise seeds."""
    found = results[name]
    base = results[ONE_DRAW]
    taps = "; ".join(f"{sigma:g}: {', '.join(f'`{layer}`' for layer in layers)}" for sigma, layers in found["taps"])
    each = 100 * np.array(found["test_accuracies"])
    gain = each - 100 * np.array(base["test_accuracies"])
    ratio = median(found["seconds"]) / median(base["seconds"])
    gained = "" if name == ONE_DRAW else _with_interval(gain, "+")
    figures = [_with_interval(each, ""), gained, f"{found['gflop']:.4g}", f"{ratio:.2f}"]
    return [name, taps, f"{found['num_features']:,}", *figures]


def _with_interval(values: np.ndarray, sign: str) -> str:
    found = interval(values)
    half = found["half_width"]
    return f"{found['mean']:{sign}.2f}" + ("" if half is None else f" ± {half:.2f}")


def parsed(words: list[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model_name_or_path", required=True, help="Checkpoint, folder or Hub id.")
    parser.add_argument("--dataset_name", required=True, help="Labelled images: a folder or a Hub id.")
    parser.add_argument("--max_train_samples", type=int, help="Use N training images of all classes.")
    parser.add_argument("--max_test_samples", type=int, help="Use N test images of all classes.")
    parser.add_argument("--layers", nargs="+", default=["decoder"], help="Layers that the sweep chooses from.")
    parser.add_argument("--sigmas", type=float, nargs="+", default=[0.05, 0.14, 0.25, 0.5], help="Its levels.")
    parser.add_argument("--l2", type=float, nargs="+", default=[1e-5, 1e-4, 1e-3, 1e-2, 1e-1])
    parser.add_argument("--noise_seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batch_size", type=int, default=250)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--timed_images", type=int, default=64, help="Images of a batch that is timed.")
    parser.add_argument("--repeats", type=int, default=5, help="Rounds of timing, after one that is not counted.")
    parser.add_argument("--output_dir", type=Path, help="Folder of the figures and of the sweep's features.")
    args = parser.parse_args(words)
    if min(args.timed_images, args.repeats) < 1:
        parser.error("timed_images and repeats must be at least 1.")
    if len(set(args.noise_seeds)) < len(args.noise_seeds):
        parser.error(f"noise_seeds are {args.noise_seeds}: each must be another one.")
    return args


def opened(args: argparse.Namespace, folder: StrPath) -> Prober:
    """Return the probes of the sweep, with its features in a folder."""
    options = SweepOptions(
        layers=args.layers, sigmas=args.sigmas, l2=args.l2, noise_seed=args.noise_seeds[0], batch_size=args.batch_size,
        dtype=args.dtype, max_train_samples=args.max_train_samples, max_test_samples=args.max_test_samples,
        num_noise_samples=1,
    )  # fmt: skip
    train, test = labelled_splits(Images.open(args.dataset_name), options)
    model = open_for(args.model_name_or_path, options)
    processor = open_processor(args.model_name_or_path)
    learnt, tested = (changed_inputs(each, processor, options) for each in (train, test))
    return check_sweep(model, learnt, tested, processor, options, folder)


def main(words: list[str] | None = None) -> None:
    """Run the benchmark."""
    args = parsed(words)
    with separate_randomness(), tempfile.TemporaryDirectory() as temporary:
        try:
            prober = opened(args, temporary if args.output_dir is None else args.output_dir / "features")
        except (ValueError, OSError) as error:
            raise SystemExit(str(error)) from error
        results = measure(prober, args.noise_seeds, args.timed_images, args.repeats)
        device = prober.model.device.type
    if args.output_dir is not None:
        options = vars(args) | {"output_dir": None}
        write_json(args.output_dir / "results.json", {"readings": results, "options": options, **facts(device)})
    print(table(HEAD, [row(name, results) for name in results]))


if __name__ == "__main__":
    main()
