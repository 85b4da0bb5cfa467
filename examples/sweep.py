r"""Find a denoiser's best layer and noise level: probe every pair of them, and save the best as a classifier.

    python examples/sweep.py --model_name_or_path runs/cifar10_ddpm_unet --dataset_name uoft-cs/cifar10 \
        --layers decoder --sigmas 0.02 0.05 0.1 0.2 --output_dir runs/cifar10_sweep

One pass over the images a noise level serves all layers. Features are kept in `--features_dir`: another run, another
kind of probe or an interrupted run starts from what is there. Layer, noise level and regularisation are chosen on a
part of the training images; test images are looked at once, with the chosen pair.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers.utils import logging

from ddae_hf import DDAEImageProcessor, DDAEModel
from ddae_hf.experiments.arrays import read_json, write_json
from ddae_hf.experiments.classes import draw_images
from ddae_hf.experiments.devices import best_device, chosen_dtype
from ddae_hf.experiments.draws import augment_view
from ddae_hf.experiments.features import FeatureCache
from ddae_hf.experiments.logistic_regression import alignment, fit_logistic_regression, knn_predict, uniformity
from ddae_hf.experiments.metrics import F1
from ddae_hf.experiments.plots import draw_sweep
from ddae_hf.experiments.publishing import prepare, publish
from ddae_hf.experiments.run_facts import base_model, data_facts, machine
from ddae_hf.hidden_states import decoder_layer_names
from labelled import (
    LabelledImages,
    check_null_class,
    classify,
    draw_labels,
    noise_view,
    ready,
    save_classifier,
)
from online_probes import predict_online, train_online
from sweep_options import parse_arguments
from training_curve import (
    check_run,
    draw_training_curve,
    points_table,
    sample_quality,
    test_loss,
    training_checkpoints,
)

NEIGHBOURS = (20, 200)
ALIGNMENT_IMAGES = 2000


class Sweep:
    """One checkpoint, the grid of layers and noise levels, and its features of the data set."""

    def __init__(self, args: argparse.Namespace, checkpoint: str, data: LabelledImages):
        self.args, self.data, self.checkpoint = args, data, checkpoint
        self.conditions = {} if args.null_class is None else {"null_class": args.null_class}
        self.conditions |= {"num_noise_samples": args.num_noise_samples}
        self.model = self.open_model()
        groups = {"decoder": decoder_layer_names(self.model.denoiser), "all": self.model.layer_names()}
        self.layers = list(dict.fromkeys(name for entry in args.layers for name in groups.get(entry, [entry])))
        # The training images that the pair is chosen on, and which of these are fitted and held out.
        order = np.random.default_rng(args.seed).permutation(len(data.labels["train"]))[: args.max_selection_samples]
        held_out = max(1, round(args.validation_fraction * len(order)))
        self.held_out, self.fitted, self.rows = (np.sort(x) for x in (order[:held_out], order[held_out:], order))
        self.check()
        self.identity = self.identify()
        if self.identity["train"] == self.identity["test"]:
            raise ValueError("The test images are the training images: give another --test_split.")
        self.caches: dict[int, FeatureCache] = {}

    def check(self) -> None:
        """Refuse what cannot be probed, before any long work."""
        args, labels = self.args, self.data.labels["train"]
        check_null_class(self.model)
        for layer in self.layers:
            for sigma in args.sigmas:
                self.model.config.from_dict(self.model.config.to_dict(), layer=layer, sigma=sigma)
        for per_class in args.few_labels:
            draw_labels(labels, per_class, args.seed)
        size = dict(self.data.processor.size)
        if args.random_crop >= min(size.values()):
            raise ValueError(f"--random_crop is {args.random_crop}: it must be below the sides of the images, {size}.")
        fewest = min(NEIGHBOURS) if args.knn else 1
        if len(self.fitted) < fewest or (args.alignment and len(self.held_out) < 2):
            raise ValueError(
                f"{len(self.rows)} of the {len(labels)} training images leave {len(self.fitted)} to fit on and "
                f"{len(self.held_out)} to choose on: {fewest} and {1 + args.alignment} are needed. Give more, or "
                "another --validation_fraction."
            )

    def open_model(self) -> DDAEModel:
        """Return the model, in evaluation mode."""
        options = {**self.conditions, **chosen_dtype(self.args)}
        return DDAEModel.from_pretrained(self.checkpoint, **options, cache_dir=self.args.cache_dir)

    def identify(self) -> dict[str, dict[str, Any]]:
        """Return what tells the images of each split from others."""
        data = self.data
        return {name: {"images": data.hash(name), "preprocessing": data.processor.to_dict()} for name in data.splits}

    def view(self, split: str, rows: np.ndarray, numbers: Sequence[int] | np.ndarray, view: int) -> torch.Tensor:
        """Return a view of the images at `rows`, the first being the images themselves; `numbers` seed the changes."""
        args, images = self.args, self.data.pixel_values(split, rows)
        return augment_view(images, numbers, args.seed, view, args.random_flip, args.random_crop) if view else images

    def selection_features(
        self, layers: list[str], sigma: float, views: Sequence[int] | None = None
    ) -> dict[str, list[np.ndarray]]:
        """Return the features of the training images that the pair is chosen on: by layer, an array (N, C) a view."""
        rows = None if len(self.rows) == len(self.data.labels["train"]) else self.rows
        return self.features("train", layers, sigma, self.args.noise_seed, views=views, rows=rows)

    def positions(self, indices: np.ndarray) -> np.ndarray:
        """Return where images, given by their indices, are among `rows`."""
        return np.searchsorted(self.rows, indices)

    def cache(self, noise_seed: int) -> FeatureCache:
        """Return the features on disk of a noise seed."""
        if noise_seed not in self.caches:
            self.caches[noise_seed] = FeatureCache(self.args.features_dir, self.model, noise_seed)
        return self.caches[noise_seed]

    def features(
        self,
        split: str,
        layers: list[str],
        sigma: float,
        noise_seed: int,
        *,
        views: Sequence[int] | None = None,
        rows: np.ndarray | None = None,
    ) -> dict[str, list[np.ndarray]]:
        """Return the features of a split's images, or of those at `rows`: for each layer an array (N, C) a view."""
        args = self.args
        indices = np.arange(len(self.data.labels[split])) if rows is None else rows
        part = {} if rows is None else {"rows": hashlib.sha256(rows.tobytes()).hexdigest()}
        found: dict[str, list[np.ndarray]] = {layer: [] for layer in layers}
        for view in range(args.num_views) if views is None else views:
            title = f"sigma {sigma:g}, {split} images, view {view}"

            def images(start: int, view: int = view, title: str = title) -> Iterable[torch.Tensor]:
                for first in tqdm(range(start, len(indices), args.batch_size), desc=title, leave=False):
                    chosen = indices[first : first + args.batch_size]
                    yield self.view(split, chosen, range(first, first + len(chosen)), view)

            changes = {"flip": args.random_flip, "crop": args.random_crop, "seed": args.seed} if view else {}
            known, number = {**self.identity[split], **part, **changes}, noise_view(split, view)
            cache = self.cache(noise_seed)
            new = cache.features(images, len(indices), layers, sigma, view=number, data=known)
            for layer in layers:
                found[layer].append(new[layer])
        return found


def probe_level(sweep: Sweep, sigma: float) -> list[dict[str, Any]]:
    """Probe every layer at one noise level, and return the figures on held-out training images."""
    args, labels = sweep.args, sweep.data.labels["train"]
    num_classes, held_out = len(sweep.data.names), sweep.held_out
    if args.protocol == "logistic_regression":
        features = sweep.selection_features(sweep.layers, sigma)
        options = {"num_classes": num_classes, "indices": sweep.positions(sweep.fitted), "device": best_device()}
        probes = fit_logistic_regression(features, labels[sweep.rows], args.l2, **options)
        at = sweep.positions(held_out)
        predicted = {layer: probes[layer].predict(features[layer], at) for layer in sweep.layers}
    else:
        online = train_online(sweep, sweep.layers, sigma, sweep.fitted, args.noise_seed)
        predicted = predict_online(sweep, online, "train", sigma, held_out, args.noise_seed)
    rows = []
    for layer in sweep.layers:
        scores = [float((p == labels[held_out]).mean()) for p in predicted[layer]]
        best = int(np.argmax(scores))
        row = {"layer": layer, "sigma": sigma, "validation_accuracy": scores[best]}
        if args.protocol == "logistic_regression":
            row |= {"l2": args.l2[best], "by_l2": dict(zip(map(str, args.l2), scores, strict=True))}
        rows.append(row)
    add_other_figures(sweep, rows, sigma)
    return rows


def add_other_figures(sweep: Sweep, rows: list[dict[str, Any]], sigma: float) -> None:
    """Add to each layer's figures at a noise level what else is asked for, on held-out training images."""
    args, labels, held_out = sweep.args, sweep.data.labels["train"], sweep.held_out
    if not (args.knn or args.alignment):
        return
    views = sweep.selection_features(sweep.layers, sigma, views=[0])
    fitted, tested = sweep.positions(sweep.fitted), sweep.positions(held_out)
    counts = [k for k in NEIGHBOURS if k <= len(sweep.fitted)]
    some = draw_images(labels[held_out], ALIGNMENT_IMAGES)  # which of them
    if args.alignment:
        others = sweep.features("train", sweep.layers, sigma, args.noise_seed, views=[1], rows=held_out[some])
    for row in tqdm(rows, desc=f"sigma {sigma:g}, other figures", leave=False):
        (view,) = views[row["layer"]]
        if args.knn:
            train, truth = view[fitted], labels[sweep.fitted]
            predicted = knn_predict(train, truth, view[tested], counts, device=best_device())
            row |= {f"knn_{k}": float((classes == labels[held_out]).mean()) for k, classes in predicted.items()}
        if args.alignment:
            (other,) = others[row["layer"]]
            first = view[tested[some]]
            row |= {"alignment": alignment(first, other), "uniformity": uniformity(first)}


def fit_best(sweep: Sweep, best: dict[str, Any], noise_seed: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Fit the chosen pair on all training images; return weights (K, C), biases (K,) and the test images' classes."""
    args, data, layer, sigma = sweep.args, sweep.data, best["layer"], best["sigma"]
    count = {split: len(labels) for split, labels in data.labels.items()}
    if args.protocol != "logistic_regression":
        online = train_online(sweep, [layer], sigma, np.arange(count["train"]), noise_seed)
        predicted = predict_online(sweep, online, "test", sigma, np.arange(count["test"]), noise_seed)
        return *online.linear(layer), predicted[layer][0]
    train = sweep.features("train", [layer], sigma, noise_seed)
    options = {"num_classes": len(data.names), "device": best_device()}
    probes = fit_logistic_regression(train, data.labels["train"], [best["l2"]], **options)[layer]
    predicted = probes.predict(sweep.features("test", [layer], sigma, noise_seed)[layer])
    return probes.weight[0], probes.bias[0], predicted[0]


def few_label_figures(sweep: Sweep, best: dict[str, Any]) -> dict[str, list[float]]:
    """Return test accuracies with few labels a class, by their number, one for every draw of them."""
    args, data, layer = sweep.args, sweep.data, best["layer"]
    labels, figures = data.labels["train"], {}
    if not args.few_labels:
        return figures
    train = sweep.features("train", [layer], best["sigma"], args.noise_seed)
    test = sweep.features("test", [layer], best["sigma"], args.noise_seed)[layer]
    for per_class in args.few_labels:
        scores = []
        for draw in range(args.num_draws):
            few = draw_labels(labels, per_class, args.seed + draw)
            # With so few labels none is spared for choosing: scikit-learn's C = 1, its default (of two classes 2).
            options = {"num_classes": len(data.names), "indices": few, "device": best_device()}
            probes = fit_logistic_regression(train, labels, [1 / len(few)], **options)[layer]
            scores.append(float((probes.predict(test)[0] == data.labels["test"]).mean()))
        figures[str(per_class)] = scores
    return figures


def sweep_levels(sweep: Sweep, folder: Path) -> list[dict[str, Any]]:
    """Probe every noise level, and keep each one's figures, so that an interrupted run goes on with the next."""
    args = sweep.args
    online = args.protocol != "logistic_regression"
    own = ("num_epochs", "learning_rate", "online_batch_size") if online else ("l2", "num_views")
    names = ("protocol", "random_flip", "random_crop", "validation_fraction", "knn", "alignment", "seed", *own)
    names += ("max_selection_samples",)
    known = {"features": sweep.cache(args.noise_seed).identity, "data": sweep.identity["train"], "layers": sweep.layers}
    known |= {name: getattr(args, name) for name in names}
    known["labels"] = hashlib.sha256(sweep.data.labels["train"].tobytes()).hexdigest()
    key = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
    rows = []
    for sigma in tqdm(args.sigmas, desc="Noise levels"):
        path = folder / "levels" / f"sigma-{sigma}.json"
        level = read_json(path) if path.exists() else {}
        if level.get("key") != key:
            started, rest = time.monotonic(), level.get("seconds", 0) if level.get("interrupted") == key else 0
            level = {"interrupted": key}
            try:
                level = {"key": key, "rows": probe_level(sweep, sigma)}
            finally:
                write_json(path, level | {"seconds": round(rest + time.monotonic() - started, 1)})
        rows += level["rows"]
    return rows


def open_sweep(args: argparse.Namespace, checkpoint: str, data: LabelledImages, kind: type[Sweep] = Sweep) -> Sweep:
    """Return the sweep of a checkpoint, or stop if it cannot be."""
    try:
        return kind(args, checkpoint, data)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error


def sweep_checkpoint(sweep: Sweep, folder: Path) -> dict[str, Any]:
    """Sweep one checkpoint, test its best pair, save it as a classifier, and return every figure."""
    args, data, checkpoint, started = sweep.args, sweep.data, sweep.checkpoint, time.monotonic()
    ready(sweep.model)
    seeds = range(args.noise_seed, args.noise_seed + args.num_noise_seeds)
    labels = data.labels["test"]
    try:
        rows = sweep_levels(sweep, folder)
        best = max(rows, key=lambda row: row["validation_accuracy"])
        levels_done = time.monotonic()
        fitted = [fit_best(sweep, best, seed) for seed in seeds]
        few = few_label_figures(sweep, best)
    except (ValueError, OSError) as error:  # a damaged file, no space for the features
        raise SystemExit(str(error)) from error
    accuracies = [float((predicted == labels).mean()) for _, _, predicted in fitted]
    weight, bias, predicted = fitted[0]
    where = {"layer": best["layer"], "sigma": best["sigma"], "noise_seed": args.noise_seed, **sweep.conditions}
    where["cache_dir"] = args.cache_dir
    save_classifier(folder / "classifier", checkpoint, data.processor, data.names, weight, bias, **where)
    sweep.model.to("cpu")  # the whole classifier takes its place
    saved = float((classify(folder / "classifier", data.pixels, **chosen_dtype(args)) == labels).mean())
    np.save(folder / "test_predictions.npy", predicted)
    np.save(folder / "test_labels.npy", labels)
    draw_sweep(folder, rows, sweep.layers, args.sigmas, best)
    report = {
        "checkpoint": checkpoint,
        "options": vars(args),
        "images": {
            "fitted": len(sweep.fitted),
            "held_out": len(sweep.held_out),
            "train": len(data.labels["train"]),
            "test": len(labels),
        },
        "pairs": rows,
        "best": best,
        "test_accuracies": dict(zip(map(str, seeds), accuracies, strict=True)),
        "test_f1": F1().compute(predictions=predicted, references=labels)["f1"],
        "few_label_test_accuracies": few,
        "saved_classifier_test_accuracy": saved,
        "seconds": {"levels": round(levels_done - started, 1), "in_all": round(time.monotonic() - started, 1)},
        "dataset": data_facts(args, len(data.labels["train"])),
        **base_model(checkpoint),
        **machine(best_device()),
    }
    write_json(folder / "eval_results.json", report)
    return report


def summary(report: dict[str, Any]) -> str:
    """Return what was found, as text."""
    best, images, scores = report["best"], report["images"], np.array(list(report["test_accuracies"].values()))
    lines = [
        f"Best of {len(report['pairs'])} pairs on {images['held_out']:,} held-out training images: {best['layer']}, "
        f"sigma {best['sigma']:g} ({100 * best['validation_accuracy']:.2f} %).",
        f"Fitted on all {images['train']:,}, on {images['test']:,} test images: "
        f"{100 * scores[0]:.2f} %; "
        + (f"over {len(scores)} noise seeds {spread(scores)} %." if len(scores) > 1 else ""),
        f"The saved classifier, with its fixed noise: {100 * report['saved_classifier_test_accuracy']:.2f} %.",
    ]
    for per_class, values in report["few_label_test_accuracies"].items():
        lines.append(f"With {per_class} labels a class, {len(values)} draws: {spread(np.array(values))} %.")
    return "\n".join(lines)


def spread(values: np.ndarray) -> str:
    """Return mean and standard deviation, in percent."""
    return f"{100 * values.mean():.2f} ± {100 * values.std(ddof=len(values) > 1):.2f}"


def sweep_run(args: argparse.Namespace, data: LabelledImages, checkpoints: dict[int, Path]) -> list[dict[str, Any]]:
    """Sweep every checkpoint of a training run, and draw accuracy, loss and sample quality over its steps."""
    folder, points = Path(args.output_dir), []
    for step, checkpoint in checkpoints.items():
        part = folder / f"checkpoint-{step}"
        report = sweep_checkpoint(open_sweep(args, str(checkpoint), data), part)
        point = {"step": step, **report["best"], "test_accuracy": report["test_accuracies"][str(args.noise_seed)]}
        point["test_loss"] = test_loss(args, checkpoint, data)
        if args.quality_extractor:
            point["frechet_distance"] = sample_quality(args, checkpoint, part / "generation")
        points.append(point)
        print(f"Step {step}:\n{summary(report)}\n")
    draw_training_curve(folder / "training_curve.png", points)
    write_json(folder / "training_curve.json", {"options": vars(args), "points": points})
    return points


def sweep_one(sweep: Sweep) -> dict[str, Any]:
    """Sweep one checkpoint, print what was found, publish the classifier with its figures, and return them all."""
    args, folder = sweep.args, Path(sweep.args.output_dir)
    classifier = folder / "classifier"
    report = sweep_checkpoint(sweep, folder)
    print(summary(report))
    for name in ("eval_results.json", "heat_map.png"):
        shutil.copyfile(folder / name, classifier / name)
    publish(args, classifier, "Add the classifier of a sweep", generator=args.model_name_or_path)
    return report


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    args = parse_arguments(argv, __doc__)
    logging.set_verbosity_error()  # a new classifier is what is wanted here
    logging.disable_progress_bar()
    prepare(args)
    checkpoints = training_checkpoints(args.checkpoints) if args.checkpoints else {}
    first = str(next(iter(checkpoints.values()), args.model_name_or_path))
    try:
        processor = DDAEImageProcessor.from_pretrained(first, cache_dir=args.cache_dir)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error
    data = LabelledImages(args, processor)
    if checkpoints:
        check_run(args, checkpoints)
        print(points_table(sweep_run(args, data, checkpoints)))
    else:
        sweep_one(open_sweep(args, first, data))
    print(f"Classifiers, pictures and every figure are in {args.output_dir}.")


if __name__ == "__main__":
    main()
