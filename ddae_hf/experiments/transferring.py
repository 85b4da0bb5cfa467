"""Transfer a denoiser of latents, such as an ImageNet DiT, to a labelled data set that it was never trained on.

Every image, and changed copies of it, are resized to the size that the network was trained on and encoded once; then
the denoiser alone reads the latents from the disk, in a sweep. `finetune` then trains the network itself.
"""

from __future__ import annotations

import copy
import logging
import os
from dataclasses import dataclass
from typing import Any, ClassVar

from ..checkpoints import load_vae
from ..configuration_ddae import DDAEConfig
from ..hidden_states import hidden_size
from ..image_processing_ddae import DDAEImageProcessor
from ..modeling_ddae import DDAEModel
from .arrays import kept_or_temporary, num_bytes, size
from .draws import GENERATOR
from .encoding import describe_splits, encode_views, encoding_team
from .finetuning import FinetuningOptions, check_finetuning, finetune
from .images import ImageInputs, Images, labelled_splits
from .latent_folder import FLOAT32, LatentFolder, LatentInputs
from .models import Model, open_for, open_processor, path_of
from .options import Table, option
from .probing import Prober
from .sweeping import SweepOptions, SweepResult, check_sweep, sweep_inputs

# Options of the fine-tuning that the transfer itself sets: what follows from it, and what both share.
SETTLED = {"output_dir", "layer", "sigma", "latents_dir", "resume_from_checkpoint"}
SHARED = {"train_split", "test_split", "max_train_samples", "max_test_samples", "null_class", "prompt"}
FIRST = [0]  # the view that the pair is chosen on: the images as they are
logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class TransferOptions(SweepOptions):
    """Options of `transfer`: those of a sweep, and of its latents."""

    encoded: ClassVar[bool] = True

    # About a DiT's timesteps 42, 82, 122 and 160.
    sigmas: list[float] = option([0.15, 0.28, 0.42, 0.56], "Noise levels, of scaled latents.")
    max_selection_samples: int | None = option(
        10000, "Choose layer and noise level on this many training images; None takes all."
    )
    latents_dir: str | None = option(None, "Where latents are kept; by default `latents` in output_dir.")
    encode_batch_size: int = option(16, "Images that are encoded at a time.")
    sample_posterior: bool = option(False, "Draw latents from the VAE's distribution.")
    finetune: Table | None = option(
        None, "Then train the network from the best pair on, with these options of fine-tuning, as YAML."
    )

    def check(self) -> None:
        """Refuse what cannot work, also among the options of fine-tuning."""
        super().check()
        if self.finetune is not None:
            if self.output_dir is None:
                raise ValueError("finetune needs an output_dir, where its classifier and its checkpoints are kept.")
            if settled := sorted((SETTLED | SHARED) & set(self.finetune)):
                raise ValueError(f"finetune has {settled[0]}: leave it out; it follows from the transfer.")
            try:
                self.finetuning(layer="", sigma=1.0, latents_dir="latents")
            except ValueError as error:
                raise ValueError(f"finetune: {error}") from error

    def finetuning(self, layer: str, sigma: float, latents_dir: str) -> FinetuningOptions:
        """Return the options of the fine-tuning that goes on from a pair, those of `finetune` last."""
        shared = FinetuningOptions(
            output_dir=f"{self.output_dir}/finetuned", layer=layer, sigma=sigma, latents_dir=latents_dir,
            resume_from_checkpoint="latest",
            **{name: getattr(self, name) for name in (*SHARED, "seed", "noise_seed", "cache_dir")},
        )  # fmt: skip
        return FinetuningOptions.of(shared, self.finetune or {})


def transfer(
    model: Model, images: Images, options: TransferOptions | None = None, **changes: Any
) -> SweepResult | None:
    """Encode labelled images once, probe a denoiser of latents on them and, with `finetune`, train it further.

    The model must have its VAE with it. What this will take is logged before it begins; an interrupted transfer goes on
    where it stopped. The result is that of the sweep, whose classifier takes images; the fine-tuned one is in
    `finetuned` in `output_dir`.

    Raises:
        ValueError: A model without a VAE, options that cannot work, images that cannot be read, or a damaged file.
        OSError: No such checkpoint, or not enough space on disk.
    """
    options = TransferOptions.of(options, changes)
    images = Images.open(images, cache_dir=options.cache_dir)
    train, test = labelled_splits(images, options)
    processor = open_processor(model, options.cache_dir)
    denoiser, vae = _open(model, options)
    sides = processor.size["height"], processor.size["width"]
    views: Any = {"flip": options.flips, "crop_padding": options.crop_padding, "seed": options.seed}
    changes = {**views, "generator": GENERATOR} if options.num_views > 1 else {}
    pixels = {"train": ImageInputs(train, processor, **views), "test": ImageInputs(test, processor, **views)}
    with kept_or_temporary(options.output_dir) as kept:
        where = options.latents_dir or str(kept / "latents")
        with encoding_team(vae, pixels, FLOAT32) as team:
            if options.output_dir is None and team.count > 1:
                raise ValueError(f"output_dir is None: {team.count} processes share latents through a folder.")
            if team.helps:
                team.serve()
                folder = LatentFolder(where)
            else:
                with team:
                    splits = describe_splits(pixels, options.num_views, changes)
                    folder = LatentFolder.create(
                        where, vae, sides, splits, sample_posterior=options.sample_posterior, seed=options.seed,
                        names=train.names, vae_source=path_of(model),
                    )  # fmt: skip
                    prober = check_transfer(denoiser, folder, pixels, processor, options)
                    logger.info(features_use(prober, options))
                    encode_views(folder, pixels, options.encode_batch_size, team)
        result = sweep_inputs(
            model, denoiser, images, LatentInputs(train, folder, "train"), LatentInputs(test, folder, "test"),
            processor, options, FIRST, sample_posterior=options.sample_posterior,
        )  # fmt: skip
        if options.finetune is not None:
            best = team.agree(result and result.best)
            finetune(model, images, options.finetuning(best.layer, best.sigma, where))
    return result


def check_transfer(
    denoiser: DDAEModel, folder: LatentFolder, pixels: dict[str, ImageInputs], processor: DDAEImageProcessor,
    options: TransferOptions,
) -> Prober:  # fmt: skip
    """Return the probes of latents that are to be made, or raise `ValueError` for what cannot work."""
    if folder.shape != denoiser.config.sample_shape:
        what = f"The checkpoint's VAE and image size make latents {folder.shape}, but its denoiser takes"
        mend = "mend its preprocessor_config.json, or give the VAE that it was trained with"
        raise ValueError(f"{what} {denoiser.config.sample_shape}: {mend}.")
    learnt, tested = (LatentInputs(known.images, folder, split) for split, known in pixels.items())
    prober = check_sweep(denoiser, learnt, tested, processor, options, selection_views=FIRST)
    if options.finetune is not None:
        given = options.finetuning(prober.layers[0], prober.sigmas[0], str(folder.folder))
        check_finetuning(given, denoiser.config, learnt.labels)
    return prober


def _open(model: Model, options: TransferOptions) -> tuple[DDAEModel, Any]:
    """Return a denoiser of latents as a model that takes them in place of images, and their VAE."""
    if isinstance(model, (str, os.PathLike)):
        vae = load_vae(model, cache_dir=options.cache_dir).requires_grad_(False)  # like an open model's
        return open_for(model, options, vae=False), vae
    whole = open_for(model, options)
    if whole.vae is None:
        raise ValueError("The model has no vae: open it with the VAE that its denoiser was trained with.")
    bare = copy.copy(whole)
    bare._modules = dict(whole._modules)  # a copy, as the whole model is to keep its VAE
    bare.vae = None
    bare.config = DDAEConfig.from_dict(whole.config.to_dict() | {"vae": None, "sample_posterior": False})
    return bare, whole.vae


def features_use(prober: Prober, options: TransferOptions) -> str:
    """Return what features of latents will take, and how often the denoiser will run, in words."""
    if options.online:
        return "These probes keep no features: the denoiser runs on every image at each noise level and epoch."
    pooling = prober.model.config.pooling
    widths = [num_bytes((hidden_size(prober.model.denoiser, layer, pooling),), 1) for layer in prober.layers]
    choosing = len(prober.chosen_on) * len(prober.sigmas)
    probing = (len(prober.train) + len(prober.test)) * options.num_views * options.num_noise_seeds
    return (
        f"To choose among {len(widths)} layers and {len(prober.sigmas)} noise levels, the denoiser runs on "
        f"{choosing:,} latents, whose features take {size(choosing * sum(widths))}; to probe the best pair, on "
        f"{probing:,}, whose features take at most {size(probing * max(widths))}."
    )
