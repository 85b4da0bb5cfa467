"""Training a linear head on a denoiser's feature maps, which gives every pixel a class, and measuring it by mean IoU.

    from ddae_hf.experiments import Images, segment
    result = segment("runs/NAME", Images.open("photos_with_masks"), layers=["mid_block", "up_blocks.1.resnets.0"])
    print(result.table())
    result.picture.savefig("masks.png")

The denoiser is frozen unless `freeze_denoiser` is off. Images of another shape are squashed, not cut, so that the model
sees all of them. In training they get fresh noise of the model's level, in tests its fixed noise. Maps of classes are
compared with the masks at the masks' own sizes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassJaccardIndex
from tqdm.auto import tqdm
from transformers.modeling_outputs import SemanticSegmenterOutput

from ..augment import random_flip
from ..class_maps import map_cross_entropy
from ..configuration_ddae import DDAEConfig
from ..hidden_states import layer_names
from ..image_processing_ddae import DDAEImageProcessor
from ..modeling_ddae import DDAEModel
from ..segmentation_ddae import DDAEForSemanticSegmentation
from ..weights import fingerprint, plain_state
from .arrays import StrPath
from .batches import Batch, row_batches
from .devices import fast_layout
from .draws import RowDraws, separate_randomness
from .features import evaluating
from .image_set import scaled
from .images import Images, SplitOptions
from .low_rank import OPEN_MODEL
from .masks import IGNORED, MaskedImages, masked_splits, names_of_classes
from .models import Model, base_model, chosen_layers, open_model, open_processor, path_of
from .options import PROMPT, option
from .plots import mask_rows, save_picture
from .probing import save_classifier
from .report import in_memory
from .run_folder import WEIGHTS, Progress, check_same_run, saving, write_options
from .segmentation_report import DENOISER, MaskScores, SegmentationReport
from .sharing import is_first_process, refuse_fsdp
from .training_options import LoopOptions, Schedule, check_resumed

SHOWN = 6  # test images in the picture
TESTED = 64  # test images of a forward pass
PATCHES = {"pixels' colours": 1, "5x5 patches": 5}  # sides of the patches that the head is compared on


@dataclass(kw_only=True)
class SegmentationOptions(SplitOptions, LoopOptions):
    """Options of `segment`."""

    default_batch: ClassVar[int] = 32

    total_batch_size: int | None = option(
        None, "Images per step, of all devices together; by default 32, or what train_batch_size comes to."
    )
    mask_column: str | None = option(None, "Column of masks; by default the only one of images beside the images.")
    class_names: list[str] | None = option(
        None, "Names of the classes, from number 0 on; by default their numbers.", nargs="+"
    )
    layers: list[str] = option(["own"], "Names of layers, or `decoder`, `all`, or `own`, the checkpoint's.")
    sigma: float | None = option(None, "Noise level of the images; by default the checkpoint's.")
    null_class: int | None = option(None, "For a class-conditional denoiser: the label that stands for no class.")
    prompt: str | None = option(None, PROMPT)
    feature_norm: Literal["none", "batch_norm"] = option(
        "batch_norm", "What stands between feature maps and head: a batch norm without weights, or nothing."
    )
    freeze_denoiser: bool = option(True, "Train the head alone; otherwise the network up to the deepest layer, too.")
    from_scratch: bool = option(False, "Start from random weights, to compare.")
    baselines: bool = option(
        False, "Also train the head on the network with random weights, and on clean pixels, to compare."
    )
    num_train_epochs: int = option(20, "Passes over the training images.")
    learning_rate: float = option(1e-3, "Largest learning rate.")
    lr_scheduler: Schedule = option("cosine", "How the learning rate changes.")
    lr_warmup_steps: int = option(20, "Steps in which the learning rate rises from 0.")
    checkpointing_steps: int = option(500, "Save a checkpoint, ready to resume, every N steps.")
    checkpoints_total_limit: int | None = option(2, "Keep only the newest N checkpoints.")

    def check(self) -> None:
        """Refuse names of classes that cannot be told apart, a random network twice, and accelerate's FSDP."""
        super().check()
        refuse_fsdp()
        names = self.class_names
        if names is not None and (len(names) < 2 or len(set(names)) < len(names)):
            raise ValueError(f"class_names are {names}: give at least two, which all differ.")
        if self.baselines and self.from_scratch:
            raise ValueError("baselines have a network with random weights, which from_scratch asks for: give one.")


@dataclass(kw_only=True)
class SegmentationResult(SegmentationReport):
    """What `segment` found: the figures and, in memory, the model with its image processor, and a picture."""

    segmenter: DDAEForSemanticSegmentation = in_memory()
    processor: DDAEImageProcessor = in_memory()
    picture: Any = in_memory()  # of test images, their masks and the classes found
    source: Any = in_memory()  # the model that it began with

    def save(self, folder: StrPath) -> None:
        """Write a folder that `DDAEForSemanticSegmentation.from_pretrained` opens, `eval_results.json`, `masks.png`.

        Where the denoiser is as it was, the folder holds the generator as a pipeline, and the head beside it.
        """
        save_classifier(folder, self.segmenter, self.source, self.processor, self.options["cache_dir"])
        save_picture(self.picture, Path(folder) / "masks.png", dpi=90)
        self.write(Path(folder))


class PatchSegmenter(nn.Module):
    """The same head on clean pixels: on the colours of the patch around each, whose side is odd."""

    def __init__(self, channels: int, side: int, count: int, feature_norm: str):
        super().__init__()
        self.side = side
        width = channels * side**2
        self.map_norm = nn.BatchNorm2d(width, affine=False) if feature_norm == "batch_norm" else nn.Identity()
        self.segmenter = nn.Conv2d(width, count, 1)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> SemanticSegmenterOutput:
        """Return logits (B, K, H, W) of images in [-1, 1], and the loss of labels (B, H, W) if they came."""
        padded = F.pad(pixel_values, [self.side // 2] * 4, mode="replicate")
        patches = F.unfold(padded, self.side).unflatten(2, pixel_values.shape[-2:])
        logits = self.segmenter(self.map_norm(patches))
        loss = None if labels is None else map_cross_entropy(logits, labels, IGNORED)
        return SemanticSegmenterOutput(loss=loss, logits=logits)


class Learner(nn.Module):
    """Gives the loss in one forward pass, which accelerate can distribute; what it trains keeps its own forward."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, labels: Tensor, draws: RowDraws) -> Tensor:
        """Return the loss of images in [-1, 1] and their labels (B, H, W); a denoiser's noise comes of the draws."""
        noise = {}
        if isinstance(self.model, DDAEForSemanticSegmentation):
            config = self.model.config
            shape = (len(images), config.num_noise_samples, *config.sample_shape)
            noise = {"noise": draws.normal(shape).transpose(0, 1)}
        found: Tensor = self.model(images, labels=labels, **noise).loss
        return found


def segment(
    model: Model, images: Images, options: SegmentationOptions | None = None, **changes: Any
) -> SegmentationResult:
    """Train a head on feature maps of images with masks, and measure it on test images.

    With `output_dir` everything is written there, checkpoints included; SIGTERM and Ctrl-C write one too. All processes
    of `accelerate launch` call this, and the first one writes.

    Raises:
        ValueError: Options, images, masks or a checkpoint that cannot work, or a loss that is not finite (`NotFinite`).
        OSError: No such checkpoint, or no room on the disk.
        Interrupted: A signal came, and a checkpoint was written.
    """
    options = SegmentationOptions.of(options, changes)
    images = Images.open(images, cache_dir=options.cache_dir)
    resume = options.checkpoint(WEIGHTS)
    network = open_model(
        model, cache_dir=options.cache_dir, sigma=options.sigma, null_class=options.null_class, prompt=options.prompt
    )
    config = described(network, options)
    processor = open_processor(model, options.cache_dir)
    processor.do_center_crop = False
    train, test = masked_splits(images, options, processor)
    names = names_of_classes(train, options.class_names)
    test.check_classes(names)
    path = path_of(model)
    origin = {"model_name_or_path": OPEN_MODEL + fingerprint(network, dtype=None) if path is None else path}
    segmenter = new_segmenter(network, config, names, options)
    facts, given, finished = trained(segmenter, train, options, origin | images.opened_with, resume)
    if finished is not None:
        folder = str(options.output_dir)
        finished.segmenter = DDAEForSemanticSegmentation.from_pretrained(folder)
        finished.processor = DDAEImageProcessor.from_pretrained(folder)
        return finished
    scores, maps = measured(segmenter, test, names)
    result = SegmentationResult(
        layers=segmenter.config.out_features, sigma=segmenter.config.sigma, classes=names, num_train_images=len(train),
        num_test_images=len(test), scores={DENOISER: scores}, options=given,
        dataset=images.facts(train.images, test.images), segmenter=segmenter.eval(), processor=processor,
        picture=picture_of(test, maps, names), source=model, **base_model(path), **facts,
    )  # fmt: skip
    if options.baselines:
        alone = dataclasses.replace(options, output_dir=None, resume_from_checkpoint=None, report_to=None)
        for name, make in baselines(network, config, names, alone).items():
            other = make()
            trained(other, train, alone, {}, None, name)
            result.scores[name], _ = measured(other, test, names)
    if options.output_dir is not None and is_first_process():
        with saving(options.output_dir):
            result.save(options.output_dir)
    return result


def described(network: DDAEModel, options: SegmentationOptions) -> DDAEConfig:
    """Return the configuration of a model that reads the layers that are asked for, or raise `ValueError`."""
    order = layer_names(network.denoiser, inner=True)
    layers = chosen_layers(network, options.layers)
    if unknown := [layer for layer in layers if layer not in order]:
        raise ValueError(f"layers: the network has no layer {unknown[0]!r}; it has {', '.join(order)}.")
    if not layers:
        raise ValueError("layers is empty: name at least one.")
    found: DDAEConfig = DDAEConfig.from_dict(
        network.config.to_dict(), out_features=sorted(layers, key=order.index), feature_norm=options.feature_norm,
        semantic_loss_ignore_index=IGNORED,
    )  # fmt: skip
    return found


def new_segmenter(
    network: DDAEModel, config: DDAEConfig, names: Sequence[str], options: SegmentationOptions
) -> DDAEForSemanticSegmentation:
    """Return a new head on a copy of the network or, with `from_scratch`, on one with random weights, in float32.

    A VAE, and what the network is told, are the same in both.
    """
    config = DDAEConfig.from_dict(
        config.to_dict(), id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)}
    )
    state = plain_state(network)
    if options.from_scratch:
        config.generator_fingerprint = config.generator_fingerprint_float16 = None
        state = {name: value for name, value in state.items() if not name.startswith("denoiser.")}
    with separate_randomness(options.seed):
        segmenter = DDAEForSemanticSegmentation(config)
    segmenter.ddae.load_state_dict({**segmenter.ddae.state_dict(), **state})
    if options.freeze_denoiser:
        segmenter.freeze_denoiser()
    return segmenter


def baselines(
    network: DDAEModel, config: DDAEConfig, names: Sequence[str], options: SegmentationOptions
) -> dict[str, Callable[[], nn.Module]]:
    """Return what makes each model that the head is compared with, by its name."""
    random = dataclasses.replace(options, baselines=False, from_scratch=True)

    def of_patches(side: int) -> nn.Module:
        with separate_randomness(options.seed):
            return PatchSegmenter(config.num_channels, side, len(names), options.feature_norm)

    found: dict[str, Callable[[], nn.Module]] = {
        "untrained network": partial(new_segmenter, network, config, names, random)
    }
    return found | {name: partial(of_patches, side) for name, side in PATCHES.items()}


def trained(
    module: Any, train: MaskedImages, options: SegmentationOptions, opened_with: dict[str, Any], resume: Path | None,
    desc: str = "Training",
) -> tuple[dict[str, Any], dict[str, Any], SegmentationResult | None]:  # fmt: skip
    """Train a module, and return facts of the training, its options, and the report of one that was finished before."""
    data = Progress(num_images=len(train), images_hash=train.hash)
    with options.accelerated(resume) as accelerator:
        given = options.in_force(accelerator.mixed_precision, opened_with)
        if resume is not None:
            check_same_run(given, check_resumed(given, data, resume), options.may_change, resume)
        place = accelerator.device if options.dataloader_num_workers == 0 else "cpu"  # a GPU cannot be used in workers
        loader = row_batches(
            range(len(train)), options, partial(train.read, device=place), pin=options.dataloader_num_workers > 0
        )
        loop = options.loop(
            accelerator, Learner(module), loader, data, resume, {"weight_decay": 0.0},
            save=partial(write_options, given), keep_weights=True, desc=desc,
        )  # fmt: skip
        if finished := loop.finished(SegmentationResult):
            return {}, given, finished

        def loss(batch: Batch, draws: RowDraws) -> Tensor:
            clean, labels = floats(batch["pixel_values"], train), batch["labels"]
            if options.random_flip:
                both = random_flip(torch.cat([clean, labels[:, None].to(clean)], dim=1), draws)
                clean, labels = both[:, :-1], both[:, -1].long()
            found: Tensor = loop.module(clean, labels, draws)
            return found

        loop.run(loss)
        accelerator.wait_for_everyone()
        facts = loop.facts()
        del facts["parts_last_100_batches"]
        return facts, given, None


def floats(pixels: Tensor, images: MaskedImages) -> Tensor:
    """Return images as floats, in the fastest layout of their device."""
    return scaled(pixels.to(memory_format=fast_layout(pixels.device)), images.processor)


def measured(module: Any, test: MaskedImages, names: Sequence[str]) -> tuple[MaskScores, list[np.ndarray]]:
    """Return how well a module's maps agree with the masks of all test images, and the first of its maps."""
    device = next(module.parameters()).device
    metric = MulticlassJaccardIndex(len(names), average=None, ignore_index=IGNORED)
    shown: list[np.ndarray] = []
    parts = torch.arange(len(test)).split(TESTED)
    with evaluating(module):
        for part in tqdm(parts, desc="Testing", leave=False, disable=not is_first_process()):
            rows = part.tolist()
            outputs = module(floats(test.read(rows, device)["pixel_values"], test))
            truths = test.truths(rows)
            maps = test.processor.post_process_semantic_segmentation(outputs, [tuple(each.shape) for each in truths])
            for found, truth in zip(maps, truths, strict=True):
                metric.update(found.cpu()[None], truth[None])
            shown += [found.cpu().numpy() for found in maps[: SHOWN - len(shown)]]
    counts = metric.confmat.double()
    there = counts.sum(0) + counts.sum(1) > 0
    iou = metric.compute()
    scores = MaskScores(
        mean_iou=iou[there].double().mean().item(),
        pixel_accuracy=(counts.trace() / counts.sum()).item(),
        iou={name: iou[i].item() if there[i] else None for i, name in enumerate(names)},
        trained=sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad),
    )
    return scores, shown


def picture_of(test: MaskedImages, maps: Sequence[np.ndarray], names: Sequence[str]) -> Any:
    """Return a picture of the first test images, their masks, and maps of what was found."""
    rows = range(len(maps))
    truths = [truth.numpy() for truth in test.truths(rows)]
    pairs = list(zip(truths, maps, strict=True))
    return mask_rows(test.images.pil(rows), pairs, ["mask", "found"], names)
