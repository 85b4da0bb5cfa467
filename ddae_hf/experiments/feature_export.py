"""The features of a data set's images as parquet or npy files, for use elsewhere: `export_features`.

`features.parquet` has one row an image, in the data set's order: `index`, `label` where there are labels, and for
each layer a column of lists of float32, named like it. As `npy` the files are `LAYER.npy` (N, C) and `label.npy`. Both
come with `features.json`, which says what the features are of.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .arrays import check_space, write_json, written_whole
from .devices import HELP
from .features import FeatureCache, features_of_parts
from .images import ImageInputs, Images, parts_of
from .models import Model, check_taps, chosen_layers, open_for, open_processor, path_of
from .options import PROMPT, Options, option
from .sharing import Team

ROW_GROUP = 10_000


@dataclass(kw_only=True)
class ExportOptions(Options):
    """Options of `export_features`."""

    output_dir: str = option("runs/features_export", "Folder of the files.")
    features_dir: str | None = option(None, "Folder where features are kept; by default `cache` in output_dir.")
    format: Literal["parquet", "npy"] = option("parquet", "Kind of the files.")
    split: str = option("train", "Split whose features are exported.")
    max_samples: int | None = option(None, "Use N images of all classes, always the same ones.")
    layers: list[str] = option(["own"], "Names of layers, or `decoder`, `all`, or `own`, the checkpoint's.")
    sigma: float | None = option(None, "Noise level; by default the checkpoint's.")
    view: int = option(0, "Number of the draw of noise; sweeps take 0 in training, 1 in tests.")
    pooling: Literal["mean", "max", "mean_2x2"] | None = option(
        None,
        "How hidden states become features: their mean, maximum, or the means of their four quarters, which tell "
        "where something is in images that are aligned; by default the checkpoint's.",
    )
    num_noise_samples: int = option(1, "Draws of noise that features are averaged over.")
    null_class: int | None = option(None, "For a class-conditional denoiser: the label that stands for no class.")
    prompt: str | None = option(None, PROMPT)
    noise_seed: int = option(0, "Seed of the noise.")
    batch_size: int = option(250, "Images that the network is given at a time.")
    dtype: Literal["float32", "bfloat16"] | None = option(None, HELP)
    cache_dir: str | None = option(None, "Where downloads are kept.")


@dataclass
class ExportedFeatures:
    """Features that were written to files."""

    folder: Path  # of the files
    features: dict[str, np.ndarray]  # (N, C), float32, mapped from disk, by layer name
    labels: np.ndarray | None  # (N,)
    names: list[str] | None  # of the classes
    sigma: float

    def __str__(self) -> str:
        widths = ", ".join(f"{layer} ({values.shape[1]})" for layer, values in self.features.items())
        count = len(next(iter(self.features.values())))
        return f"Features of {count:,} images at sigma {self.sigma:g} are in {self.folder}: {widths}."


def export_features(
    model: Model, images: Images, options: ExportOptions | None = None, **changes: Any
) -> ExportedFeatures | None:
    """Compute the features of a split's images, and write them to files with the labels, where there are any.

    They are computed into `features_dir` first: an interrupted run goes on, and what a sweep has left there is used.
    The processes of `accelerate launch` share the images; the first one writes, and the others return None.

    Raises:
        ValueError: Options that cannot work, images that cannot be read, or a damaged file.
        OSError: No such checkpoint, or not enough space on disk.
    """
    options = ExportOptions.of(options, changes)
    images = Images.open(images, cache_dir=options.cache_dir)
    chosen = images[options.split].take(options.max_samples)
    labels = chosen.labels  # checked before any long work
    network = open_for(model, options)
    layers = chosen_layers(network, options.layers)
    sigma = network.config.sigma if options.sigma is None else options.sigma
    check_taps(network, layers, [sigma])
    inputs = ImageInputs(chosen, open_processor(model, options.cache_dir))

    task = partial(
        features_of_parts, network, inputs, layers=layers, sigma=sigma, noise_seed=options.noise_seed, view=options.view
    )
    team = Team({"features": task})
    if team.helps:
        team.serve()
        return None
    folder = Path(options.output_dir)
    cache = FeatureCache(options.features_dir or folder / "cache", network, options.noise_seed)
    with team:
        features = cache.kept(
            lambda start, missing: team.each(
                "features", parts_of(np.arange(len(inputs)), options.batch_size, start), layers=missing
            ),
            len(inputs), layers, sigma, view=options.view, data=inputs.identity,
        )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    check_space(folder, sum(values.nbytes for values in features.values()))
    labelled = {} if labels is None else {"label": labels}
    if options.format == "parquet":
        columns: dict[str, Any] = {"index": np.arange(len(inputs)), **labelled}
        for layer, values in features.items():
            columns[layer] = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
        with written_whole(folder / "features.parquet") as new:
            pq.write_table(pa.table(columns), new, row_group_size=ROW_GROUP)
    else:
        for name, values in {**features, **labelled}.items():
            with written_whole(folder / f"{name}.npy") as new, new.open("wb") as file:
                np.save(file, values)
    said = {"model_name_or_path": path_of(model), **images.opened_with, **options.to_dict()}
    about = {"options": said, "layers": layers, "sigma": sigma, "images": len(inputs), "class_names": chosen.names}
    write_json(folder / "features.json", about)
    return ExportedFeatures(folder, features, labels, chosen.names, sigma)
