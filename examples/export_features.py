r"""Write the features of a data set's images to parquet or npy files, for use elsewhere.

    python examples/export_features.py --model_name_or_path runs/cifar10_ddpm_unet --train_data_dir photos \
        --layers up_blocks.1.resnets.2 --sigma 0.05 --output_dir runs/photos

`features.parquet` has one row an image, in the data set's order: `index`, `label` where there are labels, and one
column of lists of float32 a layer, named like it. `--format npy` writes `LAYER.npy` (N, C), and `label.npy`. Both come
with `features.json`, which says what they are of. Features are computed into `--features_dir` first: an interrupted run
goes on, and what a sweep has left there is used.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers.utils import logging

from data import add_data_arguments, image_column, images_hash, load_splits, parse_with_config, pick_split
from ddae_hf import DDAEImageProcessor, DDAEModel
from ddae_hf.experiments.arrays import write_json, written_whole
from ddae_hf.experiments.classes import find_labels
from ddae_hf.experiments.devices import add_dtype_argument, chosen_dtype
from ddae_hf.experiments.features import FeatureCache
from ddae_hf.experiments.pixels import read_images
from ddae_hf.hidden_states import decoder_layer_names
from labelled import check_null_class, ready

ROW_GROUP = 10_000


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser)
    add = parser.add_argument
    add("--model_name_or_path", required=True, help="Checkpoint, folder or Hub id, in any layout.")
    add("--output_dir", default="runs/features_export", help="Folder of the files.")
    add("--features_dir", help="Folder where features are kept; by default `cache` in --output_dir.")
    add("--format", choices=["parquet", "npy"], default="parquet")
    add("--layers", nargs="+", help="Names of layers, `decoder` or `all`; by default the checkpoint's one.")
    add("--sigma", type=float, help="Noise level; by default the checkpoint's.")
    add("--view", type=int, default=0, help="Number of the draw of noise; sweeps take 0 in training, 1 in tests.")
    add("--num_noise_samples", type=int, default=1, help="Draws of noise that features are averaged over.")
    add("--null_class", type=int, help="The label that stands for none, for a class-conditional denoiser.")
    add("--noise_seed", type=int, default=0)
    add("--batch_size", type=int, default=250)
    add_dtype_argument(parser)
    args = parse_with_config(parser, argv)
    for name, least in (("batch_size", 1), ("num_noise_samples", 1), ("noise_seed", 0), ("view", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name} is {getattr(args, name)}: it must be at least {least}.")
    return args


def open_model(args: argparse.Namespace) -> tuple[DDAEModel, list[str], float]:
    """Return the model, the layers and the noise level that the options name, or stop."""
    options = {"num_noise_samples": args.num_noise_samples}
    options |= {} if args.null_class is None else {"null_class": args.null_class}
    options |= chosen_dtype(args)
    model = DDAEModel.from_pretrained(args.model_name_or_path, **options, cache_dir=args.cache_dir)
    groups = {"decoder": decoder_layer_names(model.denoiser), "all": model.layer_names()}
    layers = [name for entry in args.layers or [model.config.layer] for name in groups.get(entry, [entry])]
    sigma = model.config.sigma if args.sigma is None else args.sigma
    for layer in layers:  # refuse what is not there before any long work
        model.config.from_dict(model.config.to_dict(), layer=layer, sigma=sigma)
    check_null_class(model)
    return ready(model), list(dict.fromkeys(layers)), sigma


def compute(
    args: argparse.Namespace, model: DDAEModel, dataset: Dataset, column: str, layers: list[str], sigma: float
) -> dict[str, np.ndarray]:
    """Return the features (N, C) by layer name, mapped from disk."""
    processor = DDAEImageProcessor.from_pretrained(args.model_name_or_path, cache_dir=args.cache_dir)

    def images(start: int) -> Iterable[torch.Tensor]:
        for first in tqdm(range(start, len(dataset), args.batch_size), desc="Features"):
            batch = read_images(dataset, [*range(len(dataset))[first : first + args.batch_size]], column)
            yield processor(batch, return_tensors="pt")["pixel_values"]

    data = {"images": images_hash(dataset, column), "preprocessing": processor.to_dict()}
    cache = FeatureCache(args.features_dir or Path(args.output_dir) / "cache", model, args.noise_seed)
    return cache.features(images, len(dataset), layers, sigma, view=args.view, data=data)


def write_parquet(path: Path, features: dict[str, np.ndarray], labels: np.ndarray | None) -> None:
    """Write one row an image, in pieces."""
    fields = [("index", pa.int64())] + ([("label", pa.int64())] if labels is not None else [])
    fields += [(layer, pa.list_(pa.float32(), values.shape[1])) for layer, values in features.items()]
    count = len(next(iter(features.values())))
    with written_whole(path) as partial, pq.ParquetWriter(partial, pa.schema(fields)) as writer:
        for start in tqdm(range(0, count, ROW_GROUP), desc="Writing"):
            rows = slice(start, min(start + ROW_GROUP, count))
            columns: dict[str, Any] = {"index": np.arange(count)[rows]}
            if labels is not None:
                columns["label"] = labels[rows]
            for layer, values in features.items():
                flat = pa.array(np.ascontiguousarray(values[rows]).reshape(-1))
                columns[layer] = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
            writer.write_table(pa.table(columns, schema=pa.schema(fields)))


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    args = parse_arguments(argv)
    logging.disable_progress_bar()
    splits = load_splits(args)
    dataset = pick_split(splits, args.train_split, args.max_train_samples, args.label_column)
    column = image_column(dataset, args.image_column)
    labels, names = find_labels(splits[args.train_split], dataset, args.label_column)
    try:
        model, layers, sigma = open_model(args)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error
    try:
        features = compute(args, model, dataset, column, layers, sigma)
    except (ValueError, OSError) as error:  # a damaged cache, no space
        raise SystemExit(str(error)) from error
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if args.format == "parquet":
        write_parquet(folder / "features.parquet", features, labels)
    else:
        for layer, values in features.items():
            with written_whole(folder / f"{layer}.npy") as partial:
                shutil.copyfile(values.filename, partial)
        if labels is not None:
            with written_whole(folder / "label.npy") as partial, partial.open("wb") as file:
                np.save(file, labels)
    about = {"options": vars(args), "layers": layers, "sigma": sigma, "images": len(dataset), "class_names": names}
    write_json(folder / "features.json", about)
    widths = ", ".join(f"{layer} ({values.shape[1]})" for layer, values in features.items())
    print(f"Features of {len(dataset):,} images at sigma {sigma:g} are in {folder}: {widths}.")


if __name__ == "__main__":
    main()
