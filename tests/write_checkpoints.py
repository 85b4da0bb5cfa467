"""Write tiny checkpoints of every kind, and what they answer, with the version of ddae_hf that is imported.

    git worktree add --detach /tmp/0.1.0 ef4166e  # the last commit whose configurations do not say `weights`
    export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
    PYTHONPATH=/tmp/0.1.0 python tests/write_checkpoints.py tests/checkpoints/0.1.0.zip
    PYTHONPATH=$PWD python tests/write_checkpoints.py tests/checkpoints/0.2.0.zip

An archive stays as its version wrote it: `test_compatibility.py` opens each with the code of today. So there is one
archive a version, written just before its release, and nothing of it is written again later.
"""

import contextlib
import json
import os
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiTTransformer2DModel,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from PIL import Image
from safetensors.torch import save_file

from ddae_hf import DDAEBackbone, DDAEForImageClassification, DDAEImageProcessor, DDAEModel, DDAEPipeline
from ddae_hf.experiments import save_card

GENERATORS = ["pipeline", "flat", "bare", "latent"]
CLASSIFIERS = ["whole", "probe", "head", "latent_classifier", "code_whole", "code_head"]
FOLDERS = [*GENERATORS, *CLASSIFIERS, "backbone", "code_backbone"]
NAMES = {"id2label": {0: "cat", 1: "dog, hound", 2: "frog"}, "label2id": {"cat": 0, "dog, hound": 1, "frog": 2}}
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PROBE = {
    "results": {"DDAE": {"layer": "mid_block", "sigma": 0.3, "test_accuracy": 0.875, "test_f1": 0.75}},
    "saved_classifier_test_accuracy": 0.8125,
    "num_train_images": 64,
    "num_test_images": 16,
    "dataset": {"id": "tester/pets"},
    "options": {"labels_per_class": None, "max_selection_samples": 100, "noise_seed": 0, "num_noise_samples": 1}
    | {"seed": 0, "test_split": "test", "train_split": "train"},
}


def rounded(network, seed, deviation=None):
    """Give a network weights of few digits, which an archive keeps small; those of a deviation are drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if deviation is not None:
                parameter.normal_(0, deviation, generator=generator)
            elif parameter.ndim > 1:
                bound = parameter[0].numel() ** -0.5
                parameter.uniform_(-bound, bound, generator=generator)
            parameter.copy_(torch.round(parameter * 16) / 16)
    return network.eval()


def make_unet(seed, **options):
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    tiny = {"sample_size": 8, "block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    return rounded(UNet2DModel(**{**tiny, **blocks, "attention_head_dim": 4, **options}), seed)


def make_dit(seed, **options):
    tiny = {"sample_size": 4, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 2}
    return rounded(DiTTransformer2DModel(**{**tiny, "norm_num_groups": 4, **options}), seed, 0.1)


def make_vae(seed):
    """A VAE whose latents of 4 pixels are of images of 8."""
    tiny = {"block_out_channels": (8, 8), "norm_num_groups": 4, "sample_size": 8, "scaling_factor": 0.7}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return rounded(AutoencoderKL(**tiny, **blocks), seed)


def make_classifier(folder, seed, **options):
    """Return a classifier on a generator's denoiser, with a head of its own."""
    model = DDAEForImageClassification.from_pretrained(folder, **NAMES, **options)
    generator = torch.Generator().manual_seed(seed)
    for parameter in (model.classifier.weight, model.classifier.bias):
        torch.nn.init.normal_(parameter, generator=generator)
    if model.config.feature_norm == "batch_norm":
        model.feature_norm.running_mean.normal_(generator=generator)
        model.feature_norm.running_var.uniform_(0.5, 2, generator=generator)
    return model.eval()


def write_generators(root):
    """Write a pipeline of a U-Net, one of a DiT of latents, the flat layout, and a network without its scheduler."""
    labels = {0: "cat", 1: "dog, hound", 2: "frog"}
    scheduler = DDIMScheduler(prediction_type="v_prediction")
    conditional = DDAEPipeline(make_unet(1, num_class_embeds=4), scheduler, null_class=3, id2label=labels)
    conditional.save_pretrained(root / "pipeline")
    make_unet(2).save_pretrained(root / "flat")
    EDMEulerScheduler().save_pretrained(root / "flat")
    index = {"_class_name": "DDPMPipeline", "_diffusers_version": "0.1.1"}
    index |= {"scheduler": ["diffusers", "EDMEulerScheduler"], "unet": ["diffusers", "UNet2DModel"]}
    (root / "flat" / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    make_dit(3, in_channels=3, num_embeds_ada_norm=0).save_pretrained(root / "bare")
    dit = make_dit(4, in_channels=4, out_channels=8, num_embeds_ada_norm=3)
    latent = DDAEPipeline(
        transformer=dit, scheduler=FlowMatchEulerDiscreteScheduler(), vae=make_vae(5), id2label=labels
    )
    latent.save_pretrained(root / "latent")
    for name in ("pipeline", "latent"):
        DDAEImageProcessor.from_pretrained(root / name).save_pretrained(root / name)
    save_card(root / "pipeline", repo_id="tester/pipeline", license="mit", dataset_id="tester/pets")


def write_classifiers(root):
    """Write classifiers whole, beside their generator, and on one that the Hub has."""
    whole = make_classifier(root / "flat", 6, sigma=0.3, feature_norm="batch_norm", num_noise_samples=2)
    with torch.no_grad():
        whole.ddae.denoiser.conv_in.weight.mul_(1.25)  # fine-tuned
    whole.save_pretrained(root / "whole")
    DDAEPipeline.from_pretrained(root / "flat").save_pretrained(root / "probe")
    make_classifier(root / "flat", 7, layer="mid_block", sigma=0.3).save_head(root / "probe")
    (root / "probe" / "eval_results.json").write_text(json.dumps(PROBE, indent=2) + "\n")
    base = root / "hub" / "models--tester--base"
    DDAEPipeline(make_unet(8), DDPMScheduler()).save_pretrained(base / "snapshots" / COMMIT)
    (base / "refs").mkdir()
    (base / "refs" / "main").write_text(COMMIT)
    cache = {"cache_dir": root / "hub"}
    remote = make_classifier("tester/base", 9, timestep=11, noise_seed=5, pooling="max", **cache)
    remote.save_head(root / "head", base="tester/base", **cache)
    latent = make_classifier(root / "latent", 10, sample_posterior=True, layer="transformer_blocks.0")
    latent.save_pretrained(root / "latent_classifier")
    sources = {"whole": "flat", "probe": "flat", "head": base / "snapshots" / COMMIT, "latent_classifier": "latent"}
    for name, source in sources.items():
        DDAEImageProcessor.from_pretrained(root / source).save_pretrained(root / name)
    save_card(root / "probe", repo_id="tester/probe", license="mit", base_model="tester/base")


def write_code(root):
    """Write folders that open where the package is not installed, and backbones."""
    code = {"include_code": True}
    make_classifier(root / "pipeline", 11, sigma=0.2).save_pretrained(root / "code_whole", **code)
    DDAEPipeline.from_pretrained(root / "latent").save_pretrained(root / "code_head", **code)
    make_classifier(root / "latent", 12, sigma=0.5).save_head(root / "code_head", **code)
    for name, source in {"code_whole": "pipeline", "code_head": "latent"}.items():
        DDAEImageProcessor.from_pretrained(root / source).save_pretrained(root / name, **code)
    layers = {"out_features": ["down_blocks.0.resnets.0", "mid_block"]}
    backbone = DDAEBackbone.from_pretrained(root / "flat", **layers)
    backbone.save_pretrained(root / "backbone")
    backbone.save_pretrained(root / "code_backbone", **code)


def picture():
    """Return a picture that is not square, which processors cut or squash."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (10, 14, 3)).astype(np.uint8))


def images(config):
    """Return `pixel_values` (2, C, H, W) for a model."""
    shape = (2, config.num_channels, *config.image_size)
    return torch.round(torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 64) / 32 - 1


def sample(pipeline, **options):
    """Return a pipeline's last tensor, of two images."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(2)
    return pipeline(2, generator=generator, num_inference_steps=3, output_type="latent", **options).images


@torch.no_grad()
def answers(root, name):
    """Return what a checkpoint answers by each of the classes that open it."""
    folder, where = root / name, {"cache_dir": root / "hub"}
    model = DDAEModel.from_pretrained(folder, **where).eval()
    pixel_values = images(model.config)
    found = {"pixel_values": pixel_values, "features": model(pixel_values).pooler_output}
    given = {} if name.endswith("backbone") else {"out_indices": [1]}
    backbone = DDAEBackbone.from_pretrained(folder, **given, **where).eval()
    found |= {f"feature_maps.{i}": maps for i, maps in enumerate(backbone(pixel_values).feature_maps)}
    pipeline = DDAEPipeline.from_pretrained(folder, **where)
    found["samples"] = sample(pipeline)
    if pipeline.null_class is not None and name != "bare":
        found["guided"] = sample(pipeline, class_labels=[0, 2], guidance_scale=2.0)
    if isinstance(pipeline.scheduler, EDMEulerScheduler):
        found["heun"] = sample(pipeline, sampler="heun")
    processor = DDAEImageProcessor.from_pretrained(folder, **where)
    processed = torch.as_tensor(processor(picture(), return_tensors="pt")["pixel_values"])
    if (folder / "preprocessor_config.json").is_file():  # otherwise it is a new one, which is the version's affair
        found["processed"] = processed
    if name in CLASSIFIERS:
        found["logits"] = DDAEForImageClassification.from_pretrained(folder, **where).eval()(pixel_values).logits
    return {key: value.contiguous() for key, value in found.items()}


def write(root):
    """Write every folder, and `expected.safetensors`: what each answers, under its name."""
    torch.manual_seed(0)
    # Configurations note where they came from: that is to be no place on this machine.
    with contextlib.chdir(root), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a network without its scheduler, and of one that was fine-tuned
        here = Path()
        write_generators(here)
        write_classifiers(here)
        write_code(here)
        expected = {f"{name}/{key}": value for name in FOLDERS for key, value in answers(here, name).items()}
        save_file(expected, "expected.safetensors")


def main(archive):
    """Write an archive."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(archive, "w") as zipped:
        root = Path(folder)
        write(root)
        for file in sorted(file for file in root.rglob("*") if file.is_file() and ".locks" not in file.parts):
            # A date of its own would make every archive another one.
            zipped.writestr(zipfile.ZipInfo(file.relative_to(root).as_posix()), file.read_bytes(), zipfile.ZIP_LZMA)
    print(f"{archive}: {os.path.getsize(archive):,} bytes")


if __name__ == "__main__":
    main(sys.argv[1])
