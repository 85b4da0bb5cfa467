r"""Classify noisy images: a small network on a frozen denoiser's features, against a network trained on noisy images.

    python examples/noisy_classifier.py --model_name_or_path runs/cifar10_ddpm_unet --dataset_name uoft-cs/cifar10 \
        --num_views 10 --random_flip --wide_resnet 10 --random_crop 4 --output_dir runs/noisy_classifier

Both are told the noise level and learn at levels drawn log-uniformly from [--sigma_min, --sigma_max]. The denoiser runs
once over the training images for each of `--num_views` draws of level and noise; the multi-layer perceptron (MLP) then
learns from these stored features. The other is a Wide ResNet (Zagoruyko and Komodakis 2016, arXiv 1605.07146) from
random weights, with fresh noise in every step. It is shown what the denoiser is shown: of a checkpoint with a VAE the
noisy latents, in whose unit noise levels are. Test images, each with noise of its own, serve for the final figures
alone: `accuracy.png`, `eval_results.json`. `mlp/` and `wide_resnet/` hold the weights. The same command resumes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from data import add_data_arguments, images_hash, parse_with_config
from ddae_hf import DDAEImageProcessor, DDAEModel, pool_hidden_states
from ddae_hf.augment import random_changes
from ddae_hf.experiments.arrays import fill, write_json, written_whole
from ddae_hf.experiments.devices import best_device
from ddae_hf.experiments.draws import POSTERIOR, indexed_noise
from ddae_hf.experiments.features import evaluating
from ddae_hf.experiments.noisy_networks import NoiseConditionalMLP, WideResNet
from ddae_hf.hidden_states import check_layers
from ddae_hf.noise import family_of
from ddae_hf.weights import fingerprint
from labelled import LabelledImages, add_label_arguments, check_null_class, ready
from training_run import check_weights, largest, not_finite

TEST_VIEW, FIRST_TRAIN_VIEW = 1, 2  # training and test images never share noise
# What both the stored features and the Wide ResNet depend on; then either one alone.
COMMON = ["dataset_name", "dataset_config_name", "train_data_dir", "train_split", "image_column", "label_column"]
COMMON += ["max_train_samples", "sigma_min", "sigma_max", "random_flip", "random_crop", "seed"]
OF_FEATURES = ["layers", "null_class", "noise_seed", "batch_size"]
OF_WIDE_RESNET = ["wide_resnet", "wide_resnet_steps", "wide_resnet_batch_size", "wide_resnet_learning_rate"]
Predictor = Callable[[Tensor, Tensor, float], Tensor]


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser)
    add_label_arguments(parser)
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    add("--model_name_or_path", required=True, help="Checkpoint, folder or Hub id, in any layout.")
    add("--output_dir", default="runs/noisy_classifier", help="Folder of figures, weights and stored features.")
    add("--layers", nargs="+", help="Layers whose features are put side by side; by default the checkpoint's one.")
    add("--null_class", type=int, help="The label that stands for none, for a class-conditional denoiser.")
    add("--sigma_min", type=float, default=0.02, help="Lowest noise level to learn at.")
    add("--sigma_max", type=float, default=10.0, help="Highest noise level to learn at.")
    add("--sigmas", nargs="+", type=float, help="Noise levels to test at; by default 8 from lowest to highest.")
    add("--random_flip", action=flag, default=False, help="Mirror half of the training images.")
    add("--random_crop", type=int, default=0, metavar="PADDING", help="Shift them by up to this many pixels.")
    add("--batch_size", type=int, default=250, help="Images that networks which do not learn see at a time.")
    add("--num_views", type=int, default=8, help="Draws of level and noise for every training image's features.")
    add("--hidden_size", type=int, default=512, help="Width of the MLP's hidden layers.")
    add("--num_hidden_layers", type=int, default=2)
    add("--dropout", type=float, default=0.1, help="In the MLP.")
    add("--num_train_epochs", type=int, default=10, help="Passes of the MLP over all stored features.")
    add("--train_batch_size", type=int, default=256, help="Features a step of the MLP.")
    add("--learning_rate", type=float, default=1e-3, help="Of the MLP.")
    add("--weight_decay", type=float, default=0.01, help="Of the MLP.")
    add("--wide_resnet", type=int, default=10, help="Widening factor k of WRN-28-k; 0 leaves it out.")
    add("--wide_resnet_steps", type=int, default=39000)
    add("--wide_resnet_batch_size", type=int, default=128)
    add("--wide_resnet_learning_rate", type=float, default=0.1)
    add("--checkpointing_steps", type=int, default=500, help="Save the Wide ResNet's training every N steps.")
    add("--noise_seed", type=int, default=0, help="Seed of levels and noise of stored features and test images.")
    add("--seed", type=int, default=0, help="Seed of everything else that is random in training.")
    args = parse_with_config(parser, argv)
    if not 0 < args.sigma_min < args.sigma_max:
        parser.error(f"--sigma_min is {args.sigma_min:g} and --sigma_max {args.sigma_max:g}: 0 < min < max must hold.")
    args.sigmas = sorted(args.sigmas or np.geomspace(args.sigma_min, args.sigma_max, 8).tolist())
    if args.sigmas[0] < args.sigma_min or args.sigmas[-1] > args.sigma_max:
        parser.error(f"--sigmas are {args.sigmas}: they must lie between --sigma_min and --sigma_max.")
    return args


def log_uniform(args: argparse.Namespace, count: int, seed: list[int]) -> Tensor:
    """Draw noise levels (count,), float32."""
    low, high = args.sigma_min, args.sigma_max
    logs = np.random.default_rng(seed).uniform(np.log(low), np.log(high), count)
    return torch.from_numpy(np.exp(logs).clip(low, high)).float()  # rounding must not leave the schedule


def draw(model: DDAEModel, images: Tensor, indices: range, seed: int, view: int) -> tuple[Tensor, Tensor]:
    """Return what noise is added to, images or their latents, and the noise, both (B, C, H, W), of a data set's images.

    The noise, and that of latents which are draws, depends on (seed, an image's index, view) alone.
    """
    shape, own = model.config.sample_shape, None
    if model.config.sample_posterior:
        own = indexed_noise(shape, indices, seed, view, purpose=POSTERIOR)
    clean = model.encode(images.to(model.device), own)
    return clean, indexed_noise(shape, indices, seed, view).to(model.device)


def features(model: DDAEModel, layers: list[str], clean: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
    """Return the pooled hidden states of noisy images or latents at the layers, side by side, (B, C)."""
    with evaluating(model):
        states = model.read_layers(clean, layers, sigma=sigma, noise=noise)
        return torch.cat([pool_hidden_states(states[layer], model.config.pooling) for layer in layers], dim=1)


def set_seed(*seed: int) -> None:
    """Make what is random from here on depend on these numbers alone."""
    torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]))


def store_view(
    args: argparse.Namespace, model: DDAEModel, data: LabelledImages, view: int
) -> tuple[np.ndarray, Tensor]:
    """Return the training images' features (N, C) in this draw, kept on disk, and their levels."""
    count = len(data.labels["train"])
    name = f"view-{view}"
    sigmas = log_uniform(args, count, [args.noise_seed, view])
    size = sum(model.config.from_dict(model.config.to_dict(), layer=layer).hidden_size for layer in args.layers)

    def batches(start: int, missing: list[str]) -> Iterator[dict[str, Tensor]]:
        set_seed(args.seed, view)
        done = 0
        for images in data.batches("train", np.arange(count), f"features, view {view + 1} of {args.num_views}"):
            rows = slice(done, done := done + len(images))
            # Drawn in order: also of the images whose features are there.
            images = random_changes(images, args.random_flip, args.random_crop)
            if rows.start >= start:
                clean, noise = draw(model, images, range(count)[rows], args.noise_seed, FIRST_TRAIN_VIEW + view)
                found = features(model, args.layers, clean, noise, sigmas[rows].to(model.device))
                if not found.isfinite().all():
                    raise SystemExit("Some features are no finite numbers: the network overflows, run it in float32.")
                yield {name: found}

    return fill(Path(args.output_dir) / "features", {name: (size,)}, count, batches)[name], sigmas


def train_mlp(
    args: argparse.Namespace, views: list[tuple[np.ndarray, Tensor]], data: LabelledImages
) -> NoiseConditionalMLP:
    """Return the MLP trained on stored features, which it standardises, and save it."""
    stored = [view for view, _ in views]
    sigmas = [sigma for _, sigma in views]
    labels, device = torch.from_numpy(data.labels["train"]).long(), best_device()
    config = {"in_features": stored[0].shape[1], "num_labels": len(data.names), "hidden_size": args.hidden_size}
    config |= {"num_hidden_layers": args.num_hidden_layers, "dropout": args.dropout}
    set_seed(args.seed)
    mlp = NoiseConditionalMLP(**config).to(device).train()
    moments = np.mean([[view.mean(0, np.float64), np.square(view, dtype=np.float64).mean(0)] for view in stored], 0)
    mlp.mean.copy_(torch.from_numpy(moments[0]))
    mlp.deviation.copy_(torch.from_numpy(np.sqrt(np.maximum(moments[1] - moments[0] ** 2, 1e-12))))
    optimizer = torch.optim.AdamW(mlp.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay)
    passes = [view for _ in range(args.num_train_epochs) for view in torch.randperm(len(stored)).tolist()]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(passes))
    for view in tqdm(passes, desc="MLP"):
        for batch in torch.randperm(len(labels)).split(args.train_batch_size):
            inputs, level, target = torch.from_numpy(stored[view][batch.numpy()]), sigmas[view][batch], labels[batch]
            loss = F.cross_entropy(mlp(inputs.to(device), level.to(device)), target.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    check_finite(mlp.state_dict(), loss, len(passes), args.learning_rate, "--learning_rate")
    save(mlp, Path(args.output_dir) / "mlp", config | {"layers": args.layers})
    return mlp.eval()


def check_finite(
    state: dict[str, Tensor], loss: Tensor, step: int, rate: float, option: str, saved: Path | None = None
) -> None:
    """Stop unless the last loss and all that is about to be saved are finite."""
    if not (loss.isfinite() and largest(state.values()).isfinite()):
        checkpoint = saved if saved is not None and saved.exists() else None
        how = "it keeps its options, so start again in another --output_dir"
        raise not_finite(step, loss.item(), rate, checkpoint, how, option)


def save(network: nn.Module, folder: Path, config: dict[str, Any]) -> None:
    """Write a network's weights, and what it is built from as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(network.state_dict(), folder / "model.safetensors")
    write_json(folder / "config.json", config)


def write_tensors(tensors: dict[str, Tensor], path: Path, **metadata: str) -> None:
    """Write a file complete or not at all."""
    with written_whole(path) as partial:
        save_file({name: value.contiguous() for name, value in tensors.items()}, partial, metadata=metadata or None)


def training_steps(
    args: argparse.Namespace, model: DDAEModel, data: LabelledImages, first: int
) -> Iterator[tuple[int, list[Tensor]]]:
    """Yield step numbers from `first`, noisy images or latents, their levels and labels, functions of seed and step."""
    dataset, size = data.dataset("train"), args.wide_resnet_batch_size
    epoch_steps = -(-len(dataset) // size)
    for step in range(first, args.wide_resnet_steps):
        epoch, place = divmod(step, epoch_steps)
        order = np.random.default_rng([args.seed, epoch]).permutation(len(dataset))
        batch = dataset[order[place * size : (place + 1) * size]]
        set_seed(args.seed, step)
        images = random_changes(batch["pixel_values"], args.random_flip, args.random_crop)
        sigma = log_uniform(args, len(images), [args.seed, step])
        noise = torch.randn(len(images), *model.config.sample_shape)
        clean = model.encode(images.to(model.device), torch.randn_like(noise)).cpu()
        yield step, [clean + sigma[:, None, None, None] * noise, sigma, batch["labels"]]


def train_wide_resnet(args: argparse.Namespace, model: DDAEModel, data: LabelledImages) -> WideResNet:
    """Return the Wide ResNet trained on what the denoiser sees, from where an earlier run stopped, and save it."""
    device, folder = best_device(), Path(args.output_dir) / "wide_resnet"
    config = {"k": args.wide_resnet, "num_labels": len(data.names), "num_channels": model.config.sample_shape[0]}
    set_seed(args.seed)
    network = WideResNet(**config).to(device, memory_format=torch.channels_last).train()
    rate, steps = args.wide_resnet_learning_rate, args.wide_resnet_steps
    optimizer = torch.optim.SGD(network.parameters(), rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    first = load_state(folder / "state.safetensors", network, optimizer)
    progress = tqdm(initial=first, total=steps, desc=f"WRN-28-{args.wide_resnet}")
    for step, batch in training_steps(args, model, data, first):
        noisy, sigma, labels = (x.to(device) for x in batch)
        optimizer.param_groups[0]["lr"] = rate * (1 + np.cos(np.pi * step / steps)) / 2
        loss = F.cross_entropy(network(noisy.to(memory_format=torch.channels_last), sigma), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress.update()
        if (step + 1) % args.checkpointing_steps == 0 or step + 1 == steps:
            save_state(folder / "state.safetensors", network, optimizer, step + 1, loss)
            progress.set_postfix(loss=f"{loss.item():.3f}")
    save(network, folder, config)
    return network.eval()


def save_state(path: Path, network: nn.Module, optimizer: torch.optim.Optimizer, step: int, loss: Tensor) -> None:
    """Write weights, statistics, momentum and step, or stop if they or the loss are not finite."""
    momentum = {f"momentum.{n}": optimizer.state[p]["momentum_buffer"] for n, p in network.named_parameters()}
    state = network.state_dict() | momentum
    check_finite(state, loss, step, optimizer.param_groups[0]["lr"], "--wide_resnet_learning_rate", path)
    write_tensors(state, path, step=str(step))


def load_state(path: Path, network: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Restore what `save_state` wrote, if it did, and return the step."""
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        network.load_state_dict({name: file.get_tensor(name) for name in network.state_dict()})
        check_weights(path, network.state_dict().values())
        for name, parameter in network.named_parameters():
            buffer = torch.empty_like(parameter).copy_(file.get_tensor(f"momentum.{name}"))
            optimizer.state[parameter]["momentum_buffer"] = buffer
        return int(file.metadata()["step"])


@torch.no_grad()
def accuracies(
    args: argparse.Namespace, model: DDAEModel, data: LabelledImages, predictors: dict[str, Predictor]
) -> dict[str, list[float]]:
    """Return every classifier's accuracy at every level; the noise of a test image is the same for all of them."""
    labels, start = data.labels["test"], 0
    right = {name: [0] * len(args.sigmas) for name in predictors}
    for images in data.batches("test", np.arange(len(labels)), "test"):
        rows = slice(start, start := start + len(images))
        clean, noise = draw(model, images, range(len(labels))[rows], args.noise_seed, TEST_VIEW)
        for name, predict in predictors.items():
            for i, sigma in enumerate(args.sigmas):
                predicted = predict(clean, noise, sigma).argmax(-1).cpu().numpy()
                right[name][i] += int((predicted == labels[rows]).sum())
    return {name: [count / len(labels) for count in counts] for name, counts in right.items()}


def plot(path: Path, report: dict[str, Any]) -> None:
    """Draw accuracies over noise levels, with their standard errors."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), clear=True, num="accuracy")
    sigmas, count = report["options"]["sigmas"], report["num_test_images"]
    for (name, values), marker in zip(report["test_accuracies"].items(), "os", strict=False):
        shares = np.array(values)
        errors = np.sqrt(shares * (1 - shares) / count)
        axes.errorbar(sigmas, 100 * shares, 100 * errors, marker=marker, capsize=3, label=name)
    axes.axhline(100 * report["chance"], color="grey", linestyle="--", label="chance")
    axes.set(xscale="log", xlabel=f"Noise level sigma (standard deviation of the noise on {report['noise_on']})")
    axes.set(ylabel="Test accuracy in %", title=f"Classifying noisy images, {count:,} test images", ylim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def table(report: dict[str, Any]) -> str:
    """Return the figures as a Markdown table."""
    columns = report["test_accuracies"]
    lines = [f"Test accuracy in %, {report['num_test_images']:,} test images:", ""]
    lines += [f"| sigma | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for i, sigma in enumerate(report["options"]["sigmas"]):
        lines.append(f"| {sigma:.3g} | " + " | ".join(f"{100 * a[i]:.2f}" for a in columns.values()) + " |")
    return "\n".join(lines)


def open_model(args: argparse.Namespace) -> DDAEModel:
    """Return the frozen denoiser, or stop where it does not have the layers or the levels."""
    options = {"layer": args.layers[0]} if args.layers else {}
    options |= {} if args.null_class is None else {"null_class": args.null_class}
    model = DDAEModel.from_pretrained(args.model_name_or_path, **options, cache_dir=args.cache_dir)
    args.layers = args.layers or [model.config.layer]
    check_layers(model.denoiser, args.layers)
    check_null_class(model)
    for sigma in (args.sigma_min, args.sigma_max):
        family_of(model.scheduler).check_sigma(sigma)
    if args.random_crop >= min(model.config.image_size):
        raise ValueError(f"--random_crop is {args.random_crop}: the images' sides are {model.config.image_size}.")
    return ready(model.eval())


def check_folder(args: argparse.Namespace, name: str, names: list[str], **more: Any) -> None:
    """Note what a sub-folder's contents depend on, or stop if it holds others."""
    path = Path(args.output_dir) / name / "options.json"
    options = json.loads(json.dumps({name: getattr(args, name) for name in COMMON + names} | more))
    old = json.loads(path.read_text()) if path.exists() else options
    if different := sorted(name for name in options if options[name] != old.get(name)):
        raise SystemExit(f"{path.parent} was made with other options ({', '.join(different)}): choose another folder.")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, options)


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    args = parse_arguments(argv)
    started = time.monotonic()
    try:
        model = open_model(args)
        processor = DDAEImageProcessor.from_pretrained(args.model_name_or_path, cache_dir=args.cache_dir)
        data = LabelledImages(args, processor)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error
    content = {"images": images_hash(data.splits["train"], data.images), "labels": data.labels["train"].tolist()}
    content = {"preprocessing": processor.to_dict(), "data": sha256(json.dumps(content).encode()).hexdigest()}
    source = {"scheduler": model.config.scheduler, "pooling": model.config.pooling}
    source |= {"weights": fingerprint(model.denoiser, model.vae, dtype=None), "dtype": str(model.denoiser.dtype)}
    if model.vae is not None:  # which both networks see images by
        content |= {"vae": fingerprint(model.vae, dtype=None), "sample_posterior": model.config.sample_posterior}
    check_folder(args, "features", OF_FEATURES, **source, **content)
    if args.wide_resnet:
        check_folder(args, "wide_resnet", OF_WIDE_RESNET, **content)
    try:
        views = [store_view(args, model, data, view) for view in range(args.num_views)]
    except (ValueError, OSError) as error:  # a damaged file, no space
        raise SystemExit(str(error)) from error
    mlp = train_mlp(args, views, data)

    def on_features(clean: Tensor, noise: Tensor, sigma: float) -> Tensor:
        return mlp(features(model, args.layers, clean, noise, sigma), clean.new_full((len(clean),), sigma))

    predictors, networks = {"MLP on the denoiser": on_features}, {"MLP on the denoiser": mlp}
    if args.wide_resnet:
        network = train_wide_resnet(args, model, data)

        def on_noisy(clean: Tensor, noise: Tensor, sigma: float) -> Tensor:
            return network(clean + sigma * noise, clean.new_full((len(clean),), sigma))

        predictors[f"WRN-28-{args.wide_resnet}"], networks[f"WRN-28-{args.wide_resnet}"] = on_noisy, network
    report = {"options": vars(args), "num_train_images": len(data.labels["train"])}
    report |= {"num_test_images": len(data.labels["test"]), "chance": 1 / len(data.names)}
    report["noise_on"] = "images in [-1, 1]" if model.vae is None else "scaled latents"
    report["trained_parameters"] = {name: sum(p.numel() for p in n.parameters()) for name, n in networks.items()}
    report["test_accuracies"] = accuracies(args, model, data, predictors)
    report["seconds_this_run"] = round(time.monotonic() - started, 1)
    folder = Path(args.output_dir)
    write_json(folder / "eval_results.json", report)
    plot(folder / "accuracy.png", report)
    print(f"{table(report)}\n\nThe curves are in {folder / 'accuracy.png'}.")


if __name__ == "__main__":
    main()
