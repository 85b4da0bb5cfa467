r"""Train a linear classifier on a denoiser's hidden states, and save both as one model.

    python examples/linear_probe.py --model_name_or_path runs/cifar10_ddpm_unet --dataset_name uoft-cs/cifar10 \
        --layers decoder --sigmas 0.02 0.05 0.14 --baselines --output_dir runs/cifar10_classifier

Where several layers or noise levels are given, the pair is chosen on a part of the training images, never on test
images. The output folder opens with `DDAEForImageClassification.from_pretrained`; `eval_results.json` holds every
figure.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from tqdm.auto import tqdm
from transformers.utils import logging

from data import add_data_arguments, parse_with_config
from ddae_hf import DDAEImageProcessor, DDAEModel
from ddae_hf.experiments.arrays import write_json
from ddae_hf.experiments.devices import add_dtype_argument, best_device, chosen_dtype
from ddae_hf.experiments.features import extract_features
from ddae_hf.experiments.metrics import F1
from ddae_hf.experiments.publishing import add_hub_arguments, prepare, publish
from ddae_hf.experiments.run_facts import base_model, data_facts, machine
from ddae_hf.hidden_states import decoder_layer_names
from labelled import (
    LabelledImages,
    add_label_arguments,
    check_null_class,
    classify,
    draw_labels,
    noise_view,
    ready,
    save_classifier,
)

PIXELS = "pixels"
Features = Callable[[str, np.ndarray, list[str], float], dict[str, np.ndarray]]


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser)
    add_label_arguments(parser)
    add_hub_arguments(parser)
    add = parser.add_argument
    add("--model_name_or_path", required=True, help="Checkpoint, folder or Hub id, in any layout.")
    add("--output_dir", default="runs/classifier", help="Folder of the classifier and its figures.")
    add("--layers", nargs="+", help="Layers to choose from, or `decoder` or `all`; by default the checkpoint's one.")
    add("--sigmas", nargs="+", type=float, help="Noise levels to choose from; by default the checkpoint's one.")
    add("--regularisation", nargs="+", type=float, default=[0.01, 0.1, 1.0], help="Values of C to choose from.")
    add("--max_selection_samples", type=int, default=10000, help="Training images used for choosing.")
    add("--labels_per_class", type=int, help="Also probe with only this many labels a class.")
    add("--num_draws", type=int, default=5, help="Draws of those labels.")
    add("--baselines", action="store_true", help="Also probe raw pixels, and the same network untrained.")
    add("--num_noise_samples", type=int, default=1, help="Draws of noise that features are averaged over.")
    add("--null_class", type=int, help="The label that stands for none, for a class-conditional denoiser.")
    add("--batch_size", type=int, default=250)
    add_dtype_argument(parser)
    add("--noise_seed", type=int, default=0)
    add(
        "--seed",
        type=int,
        default=0,
        help="Seed of the validation split, the draws of labels and the untrained network.",
    )
    return parse_with_config(parser, argv)


def network_features(model: DDAEModel, data: LabelledImages, noise_seed: int, title: str) -> Features:
    """Return a function that computes the network's features."""

    def features(split: str, indices: np.ndarray, layers: list[str], sigma: float) -> dict[str, np.ndarray]:
        batches = data.batches(split, indices, f"{title}, {split}, sigma {sigma:g}")
        found = extract_features(model, batches, layers, sigma, noise_seed=noise_seed, view=noise_view(split, 0))
        return {layer: values.numpy() for layer, values in found.items()}

    return features


def pixel_features(data: LabelledImages) -> Features:
    """Return a function that takes an image's pixels, in [-1, 1], as its features, under the layer name `PIXELS`."""

    def features(split: str, indices: np.ndarray, layers: list[str], sigma: float) -> dict[str, np.ndarray]:
        return {layers[0]: torch.cat([b.flatten(1) for b in data.batches(split, indices, "pixels")]).numpy()}

    return features


def fit(
    features: np.ndarray, labels: np.ndarray, c: float, standardise: bool = True
) -> tuple[StandardScaler, LogisticRegression]:
    """Fit logistic regression on standardised features; pixels, of one scale already, are only centred."""
    scaler = StandardScaler(with_std=standardise).fit(features)
    return scaler, LogisticRegression(C=c, max_iter=500).fit(scaler.transform(features), labels)


def choose(
    features: Features, labels: np.ndarray, layers: list[str], sigmas: list[float], args: argparse.Namespace
) -> dict[str, Any]:
    """Return the layer, noise level and C with the best accuracy on held-out training images, and all accuracies."""
    order = np.random.default_rng(args.seed).permutation(len(labels))[: args.max_selection_samples]
    split = max(1, len(order) // 5)
    held_out, fitted = order[:split], order[split:]
    tried = []
    for sigma in sigmas:
        found = features("train", np.concatenate([fitted, held_out]), layers, sigma)
        for layer in tqdm(layers, desc=f"probes, sigma {sigma:g}", leave=False):
            for c in args.regularisation:
                scaler, probe = fit(found[layer][: len(fitted)], labels[fitted], c, layer != PIXELS)
                score = probe.score(scaler.transform(found[layer][len(fitted) :]), labels[held_out])
                tried.append({"layer": layer, "sigma": sigma, "C": c, "validation_accuracy": score})
    return {**max(tried, key=lambda t: t["validation_accuracy"]), "tried": tried}


def probe(
    features: Features, data: LabelledImages, layers: list[str], sigmas: list[float], args: argparse.Namespace
) -> dict[str, Any]:
    """Choose, fit on all training images, test; then with few labels. Returns figures, and the probe under `fitted`."""
    labels, test_labels = data.labels["train"], data.labels["test"]
    result = choose(features, labels, layers, sigmas, args)
    layer, sigma = result["layer"], result["sigma"]
    train = features("train", np.arange(len(labels)), [layer], sigma)[layer]
    test = features("test", np.arange(len(test_labels)), [layer], sigma)[layer]
    scaler, model = fit(train, labels, result["C"], layer != PIXELS)
    predicted = model.predict(scaler.transform(test))
    result |= {
        "test_accuracy": float((predicted == test_labels).mean()),
        "test_f1": F1().compute(predictions=predicted, references=test_labels)["f1"],
        "fitted": (scaler, model),
        "predicted": predicted,
    }
    if args.labels_per_class:
        scores = []
        for draw in range(args.num_draws):
            few = draw_labels(labels, args.labels_per_class, args.seed + draw)
            # With so few labels none is spared for choosing: scikit-learn's default strength.
            scaler, model = fit(train[few], labels[few], 1.0, layer != PIXELS)
            scores.append(float(model.score(scaler.transform(test), test_labels)))
        result["few_label_test_accuracies"] = scores
    return result


def conditions(args: argparse.Namespace) -> dict[str, int]:
    """Return what the options say of the features beside layer and noise level."""
    null_class = {} if args.null_class is None else {"null_class": args.null_class}
    return {"num_noise_samples": args.num_noise_samples, **null_class}


def raw_weights(
    scaler: StandardScaler, model: LogisticRegression, num_labels: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights (num_labels, C) and biases for features as they are.

    A class without training images gets a logit that never wins.
    """
    weight, bias = model.coef_, model.intercept_
    if len(model.classes_) == 2:  # scikit-learn keeps one row, the second class's
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    full_weight, full_bias = np.zeros((num_labels, weight.shape[1])), np.full(num_labels, -1e4)
    full_weight[model.classes_] = weight / scaler.scale_
    full_bias[model.classes_] = bias - full_weight[model.classes_] @ scaler.mean_
    return torch.from_numpy(full_weight), torch.from_numpy(full_bias)


def save_confusion(path: Path, labels: np.ndarray, predicted: np.ndarray, names: list[str]) -> None:
    """Draw the confusion table: rows are true classes, in percent of the row."""
    import matplotlib

    matplotlib.use("Agg")
    from sklearn.metrics import ConfusionMatrixDisplay

    display = ConfusionMatrixDisplay.from_predictions(
        labels, predicted, labels=np.arange(len(names)), display_labels=names, normalize="true",
        values_format=".0%" if len(names) <= 20 else None, include_values=len(names) <= 20,
        xticks_rotation="vertical", cmap="Blues", colorbar=False,
    )  # fmt: skip
    side = max(5.0, 0.6 * min(len(names), 40))
    display.figure_.set_size_inches(side, side)
    display.ax_.set(xlabel="Predicted", ylabel="True", title=f"Test accuracy {(labels == predicted).mean():.1%}")
    display.figure_.savefig(path, dpi=100, bbox_inches="tight")


def mean_and_error(values: np.ndarray) -> str:
    """Return mean and standard error, in percent."""
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{100 * values.mean():.2f} ± {100 * error:.2f}"


def table(results: dict[str, dict[str, Any]], args: argparse.Namespace, counts: tuple[int, int]) -> str:
    """Return the figures as a Markdown table; with few labels, mean and standard error over the draws."""
    head = f"| features | layer, sigma | all {counts[0]:,} labels |"
    if args.labels_per_class:
        head += f" {args.labels_per_class} labels a class ({args.num_draws} draws) | gain of DDAE, draw by draw |"
    lines = [f"Test accuracy in %, {counts[1]:,} test images:", "", head, "|---" * (head.count("|") - 1) + "|"]
    for name, result in results.items():
        where = PIXELS if result["layer"] == PIXELS else f"{result['layer']}, {result['sigma']:.3g}"
        line = f"| {name} | {where} | {100 * result['test_accuracy']:.2f} |"
        if args.labels_per_class:
            scores = np.array(result["few_label_test_accuracies"])
            gain = np.array(results["DDAE"]["few_label_test_accuracies"]) - scores
            line += f" {mean_and_error(scores)} | {'' if name == 'DDAE' else mean_and_error(gain)} |"
        lines.append(line)
    return "\n".join(lines)


def open_model(args: argparse.Namespace) -> tuple[DDAEModel, list[str], list[float]]:
    """Return the denoiser with the layers and noise levels to read, or raise `ValueError` where it lacks them."""
    options = {**conditions(args), **chosen_dtype(args), "cache_dir": args.cache_dir}
    model = DDAEModel.from_pretrained(args.model_name_or_path, **options)
    check_null_class(model)
    groups = {"decoder": decoder_layer_names(model.denoiser), "all": model.layer_names()}
    layers = [name for entry in args.layers or [model.config.layer] for name in groups.get(entry, [entry])]
    sigmas = args.sigmas or [model.config.sigma]
    for layer in layers:
        for sigma in sigmas:
            model.config.from_dict(model.config.to_dict(), layer=layer, sigma=sigma)
    return model, layers, sigmas


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    args = parse_arguments(argv)
    logging.set_verbosity_error()  # a new classifier is what is wanted here
    logging.disable_progress_bar()
    prepare(args)
    started = time.monotonic()
    try:
        processor = DDAEImageProcessor.from_pretrained(args.model_name_or_path, cache_dir=args.cache_dir)
        data = LabelledImages(args, processor)
        model, layers, sigmas = open_model(args)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error
    if args.labels_per_class:
        draw_labels(data.labels["train"], args.labels_per_class, args.seed)
    ready(model)
    results = {"DDAE": probe(network_features(model, data, args.noise_seed, "DDAE"), data, layers, sigmas, args)}
    if args.baselines:
        results["raw pixels"] = probe(pixel_features(data), data, [PIXELS], [0.0], args)
        torch.manual_seed(args.seed)
        untrained = ready(DDAEModel(model.config).eval().to(dtype=model.dtype))
        untrained.vae = model.vae  # only the denoiser is untrained
        features = network_features(untrained, data, args.noise_seed, "untrained")
        results["untrained network"] = probe(features, data, layers, sigmas, args)
    output = Path(args.output_dir)
    best = results["DDAE"]
    weight, bias = raw_weights(*best["fitted"], len(data.names))
    where = {"layer": best["layer"], "sigma": best["sigma"], "noise_seed": args.noise_seed, **conditions(args)}
    save_classifier(
        output, args.model_name_or_path, processor, data.names, weight, bias, **where, cache_dir=args.cache_dir
    )
    saved_accuracy = float((classify(output, data, **chosen_dtype(args)) == data.labels["test"]).mean())
    save_confusion(output / "confusion.png", data.labels["test"], best["predicted"], data.names)
    counts = (len(data.labels["train"]), len(data.labels["test"]))
    for result in results.values():
        del result["fitted"], result["predicted"]
    report = {
        "options": vars(args),
        "num_train_images": counts[0],
        "num_test_images": counts[1],
        "results": results,
        "saved_classifier_test_accuracy": saved_accuracy,
        "seconds": round(time.monotonic() - started, 1),
        "dataset": data_facts(args, counts[0]),
        **base_model(args.model_name_or_path),
        **machine(best_device()),
    }
    write_json(output / "eval_results.json", report)
    print(table(results, args, counts))
    print(f"\nThe saved classifier, with its fixed noise: {100 * saved_accuracy:.2f} %. It is in {output}.")
    publish(args, output, "Add a linear classifier", generator=args.model_name_or_path)


if __name__ == "__main__":
    main()
