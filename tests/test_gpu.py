"""On a GPU: every command at tiny size, and what it computes equal to the processor's. `pytest -m gpu` runs it.

    DDAE_TEST_DEVICE=cpu python -m pytest -m gpu tests/test_gpu.py

runs the same tests on a machine without a GPU. Then the processor is compared with itself, bfloat16 with float32.
"""

import copy
import json
import math
import os
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

from ddae_hf import DDAEForImageClassification, DDAEModel, DDAEPipeline, layer_names
from ddae_hf.diffusion import Diffusion
from ddae_hf.experiments.devices import made_fast
from ddae_hf.experiments.draws import CHANGES, NOISE, POSTERIOR, SAMPLING, augment_view, indexed_noise
from ddae_hf.experiments.features import extract_features
from ddae_hf.experiments.latent_folder import LatentFolder
from ddae_hf.experiments.logistic_regression import fit_logistic_regression
from ddae_hf.experiments.training import Loop

from . import commands
from .conftest import make_dit, make_unet, make_vae

DEVICE = os.environ.get("DDAE_TEST_DEVICE", "cuda")
SCHEDULERS = {"ddpm": DDIMScheduler, "edm": EDMEulerScheduler, "flow": FlowMatchEulerDiscreteScheduler}
PRECISIONS = {"float32": "no", "bfloat16": "bf16"}
SIGMA = 0.3
# How far figures may be from the processor's in float32: of features and gradients in norm, of losses relatively, of
# samples from 0 to 1 on average. TF32 is off here.
CLOSE = {
    "float32": {"features": 1e-4, "loss": 1e-4, "gradient": 1e-3, "samples": 1e-3},
    "bfloat16": {"features": 0.03, "loss": 0.05, "gradient": 0.1, "samples": 0.03},
}
TINY_VAE = {"in_channels": 1, "latent_channels": 2, "block_out_channels": [8, 16], "norm_num_groups": 4}
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:.*their covariance is singular"),
]
every_dtype = pytest.mark.parametrize("dtype", CLOSE)
every_network = pytest.mark.parametrize("network", ["unet", "dit"])
every_framework = pytest.mark.parametrize("framework", SCHEDULERS)


@pytest.fixture
def device():
    """Where what is tested computes."""
    return DEVICE


@pytest.fixture
def without_tf32():
    """Compute float32 in full, so that bounds can be narrow."""
    convolutions, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = convolutions.allow_tf32, products.allow_tf32
    convolutions.allow_tf32 = products.allow_tf32 = False
    yield
    convolutions.allow_tf32, products.allow_tf32 = before


def make_network(name, seed=0, channels=1):
    if name == "unet":
        return make_unet(seed, in_channels=channels, out_channels=channels)
    network = make_dit(seed, in_channels=channels, num_layers=2, num_embeds_ada_norm=0)
    for parameter in network.parameters():  # diffusers' own start ends in zeros
        torch.nn.init.normal_(parameter, std=0.1)
    return network


def make_pipeline(network, framework):
    return DDAEPipeline.for_denoiser(make_network(network), SCHEDULERS[framework]())


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder of random networks, NETWORK_FRAMEWORK each, a denoiser of latents, and a VAE."""
    root = tmp_path_factory.mktemp("checkpoints")
    for network in ("unet", "dit"):
        for framework in SCHEDULERS:
            make_pipeline(network, framework).save_pretrained(root / f"{network}_{framework}")
    make_vae().save_pretrained(root / "vae")
    latent = DDAEPipeline.for_denoiser(make_network("dit", channels=4), DDIMScheduler(), vae=make_vae())
    latent.save_pretrained(root / "latent")
    return root


def on_device(module, device, dtype=torch.float32):
    """A copy of a network as the commands lay it out."""
    return made_fast(copy.deepcopy(module).to(device, dtype), device)


def distance(found, expected):
    """How far tensors are from others, in norm."""
    expected = expected.double().cpu()
    return ((found.double().cpu() - expected).norm() / expected.norm()).item()


def some_images(count=6):
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


# What is computed.


@every_dtype
@every_framework
@every_network
def test_features_are_the_processors(checkpoints, network, framework, dtype, device, without_tf32):
    model = DDAEModel.from_pretrained(checkpoints / f"{network}_{framework}")
    layers = layer_names(model.denoiser)
    expected = extract_features(model, [some_images()], layers, SIGMA)
    other = on_device(model, device, getattr(torch, dtype))
    found = extract_features(other, [some_images()], layers, SIGMA)
    for layer in layers:
        assert distance(found[layer], expected[layer]) < CLOSE[dtype]["features"], layer


@every_network
def test_compiled_features_are_the_processors(checkpoints, network, device, without_tf32):
    model = DDAEModel.from_pretrained(checkpoints / f"{network}_ddpm")
    noise = torch.randn(some_images().shape, generator=torch.Generator().manual_seed(2))
    compiled = torch.compile(on_device(model, device))
    with torch.inference_mode():
        expected = model(some_images(), noise=noise).pooler_output
        found = compiled(some_images().to(device), noise=noise.to(device)).pooler_output
    assert distance(found, expected) < CLOSE["float32"]["features"]


@every_dtype
@every_framework
@every_network
def test_losses_and_gradients_are_the_processors(network, framework, dtype, device, without_tf32):
    clean = some_images()
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(2))
    sigma = torch.tensor([0.02, 0.1, 0.3, 0.6, 0.7, 0.8])
    pipeline = make_pipeline(network, framework)
    found = {}
    for place, precision in (("cpu", "float32"), (device, dtype)):
        denoiser = on_device(pipeline.denoiser, place)
        diffusion = Diffusion(denoiser, pipeline.scheduler)
        with torch.autocast(torch.device(place).type, torch.bfloat16, enabled=precision == "bfloat16"):
            losses = diffusion.loss(clean.to(place), sigma=sigma.to(place), noise=noise.to(place))
        losses.mean().backward()
        gradients = [p.grad.flatten().cpu() for p in denoiser.parameters() if p.grad is not None]
        found[len(found)] = losses.detach().cpu(), torch.cat(gradients)
    (expected, slopes), (losses, others) = found.values()
    torch.testing.assert_close(losses, expected, rtol=CLOSE[dtype]["loss"], atol=1e-6)
    assert distance(others, slopes) < CLOSE[dtype]["gradient"]


@every_dtype
@every_framework
@every_network
def test_samples_are_the_processors(network, framework, dtype, device, without_tf32):
    noise = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    found = []
    for place, precision in (("cpu", "float32"), (device, dtype)):
        pipeline = make_pipeline(network, framework)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.to(place, getattr(torch, precision))
        made_fast(pipeline.denoiser, place)
        found.append(pipeline(4, latents=noise, num_inference_steps=4, output_type="np").images)
    assert np.isfinite(found[1]).all()
    assert np.abs(found[1] - found[0]).mean() < CLOSE[dtype]["samples"]


def test_latents_are_the_processors(device, without_tf32):
    vae = make_vae()
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(4)) * 2 - 1
    with torch.no_grad():
        expected = vae.encode(images).latent_dist.mode()
        found = copy.deepcopy(vae).to(device).encode(images.to(device)).latent_dist.mode()
    assert distance(found, expected) < CLOSE["float32"]["features"]


@pytest.mark.parametrize("purpose", [NOISE, CHANGES, POSTERIOR, SAMPLING])
def test_draws_are_the_processors(purpose, device):
    indices = [5, 0, 49_999, 3]
    draw = partial(indexed_noise, (2, 3, 8, 8), indices, seed=7, view=3, purpose=purpose)
    expected, found = draw(device="cpu"), draw(device=device)
    assert found.device.type == torch.device(device).type
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-5)


def test_crops_and_mirrors_are_the_processors(device):
    images = torch.rand(32, 3, 8, 8, generator=torch.Generator().manual_seed(5)) * 2 - 1
    changed = augment_view(images, range(32), 7, 1, flip=True, crop_padding=2)
    assert not torch.equal(changed, images)
    assert torch.equal(augment_view(images.to(device), range(32), 7, 1, flip=True, crop_padding=2).cpu(), changed)


def test_probes_are_the_processors(device):
    rng = np.random.default_rng(0)
    labels = np.arange(300) % 4
    features = rng.standard_normal((300, 16), dtype=np.float32) + np.eye(4, 16, dtype=np.float32)[labels]
    fitted = [fit_logistic_regression({"x": [features]}, labels, [1e-3, 1e-1], device=d)["x"] for d in ("cpu", device)]
    expected, found = fitted
    assert found.converged.all()
    torch.testing.assert_close(found.loss.cpu(), expected.loss, rtol=1e-5, atol=1e-6)
    assert (found.predict([features]) == expected.predict([features])).mean() > 0.99


# Every command.


def run(name, folder, digits, *options):
    """Run a command on few digits."""
    data = [] if digits is None else ["--dataset_name", digits]
    commands.run(name, *data, "--output_dir", folder, *options)
    return folder


def report(folder, name):
    return json.loads((folder / name).read_text())


def pretrain(folder, digits, checkpoint, precision, resumed=True):
    """Train a checkpoint's network for four steps, the last two resumed if asked for, and return its report."""
    given = ["--init_from", checkpoint, "--mixed_precision", PRECISIONS[precision], "--max_train_samples", 64]
    given += ["--total_batch_size", 16, "--lr_warmup_steps", 1, "--random_flip", "--low_resolution", 4]
    given += ["--low_resolution_share", 0.5, "--checkpointing_steps", 2, "--grid_images", 2]
    given += ["--num_inference_steps", 2, "--sample_steps", 4]
    if resumed:
        run("pretrain", folder, digits, *given, "--max_train_steps", 2)
        given += ["--resume_from_checkpoint", "latest"]
    run("pretrain", folder, digits, *given, "--max_train_steps", 4)
    return report(folder, "train_results.json")


def check_training(folder, found, device):
    assert found["steps"] == 4 and math.isfinite(found["loss_last_100_batches"])
    assert ("gpu" in found["hardware"]) == (device == "cuda")
    assert all(p.isfinite().all() for p in DDAEPipeline.from_pretrained(folder).denoiser.parameters())
    assert (folder / "samples" / "step-0000004.png").is_file()


@every_dtype
@every_framework
@every_network
def test_pretrain(checkpoints, digits, tmp_path, network, framework, dtype, device):
    found = pretrain(tmp_path / "run", digits, checkpoints / f"{network}_{framework}", dtype)
    check_training(tmp_path / "run", found, device)


@every_network
def test_pretrain_compiled(checkpoints, digits, tmp_path, network, device, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "inductor")
    wrapped = []
    prepared = Loop.__post_init__

    def watch(loop):
        prepared(loop)
        wrapped.append(loop.module)

    monkeypatch.setattr(Loop, "__post_init__", watch)
    found = pretrain(tmp_path / "run", digits, checkpoints / f"{network}_ddpm", "bfloat16", resumed=False)
    check_training(tmp_path / "run", found, device)
    assert all(any(is_compiled(module) for module in network.modules()) for network in wrapped)


def is_compiled(module):
    """Whether a module was compiled, by `torch.compile` or in its place."""
    return isinstance(module, torch._dynamo.eval_frame.OptimizedModule) or module._compiled_call_impl is not None


@every_dtype
@every_network
@pytest.mark.parametrize("framework, options", [("ddpm", []), ("edm", ["--sampler", "heun"]), ("flow", [])])
def test_generate(checkpoints, tmp_path, network, framework, options, dtype):
    given = ["--model_name_or_path", checkpoints / f"{network}_{framework}", "--num_images", 3, *options]
    folder = run("generate", tmp_path, None, *given, "--num_inference_steps", 2, "--dtype", dtype)
    assert len(list(folder.glob("0000?.png"))) == 3 and (folder / "grid.png").is_file()


PART = ["--max_train_samples", 80, "--max_test_samples", 40, "--batch_size", 32]


def check_classifier(folder, device):
    """The saved classifier gives on the device what it gives on the processor."""
    model = DDAEForImageClassification.from_pretrained(folder)
    with torch.no_grad():
        expected = model(some_images()).logits
        found = on_device(model, device)(some_images().to(device)).logits
    assert distance(found, expected) < 10 * CLOSE["float32"]["features"]  # the digits' own features divide it


@every_dtype
@every_network
@pytest.mark.parametrize("command", ["probe", "sweep"])
def test_probes(checkpoints, digits, tmp_path, command, network, dtype, device, without_tf32):
    given = ["--model_name_or_path", checkpoints / f"{network}_edm", *PART, "--layers", "all", "--sigmas", 0.1, 0.5]
    given += ["--num_views", 2, "--random_flip", "--random_crop", 1, "--num_noise_samples", 2, "--dtype", dtype]
    folder = run(command, tmp_path, digits, *given, "--num_noise_seeds", 1, "--knn", "--baselines")
    found = report(folder, "eval_results.json")
    assert next(iter(found["test_accuracies"].values())) > 0.3  # of ten classes
    check_classifier(folder if command == "probe" else folder / "classifier", device)


@pytest.mark.parametrize("protocol", ["paper", "batch_norm"])
def test_probes_that_train_online(checkpoints, digits, tmp_path, protocol):
    given = ["--model_name_or_path", checkpoints / "unet_ddpm", *PART, "--layers", "decoder", "--sigmas", 0.1]
    folder = run("sweep", tmp_path, digits, *given, "--protocol", protocol, "--random_crop", 1, "--num_train_epochs", 2)
    assert next(iter(report(folder, "eval_results.json")["test_accuracies"].values())) > 0


@every_network
@pytest.mark.parametrize("dtype, options", [("float32", []), ("bfloat16", []), ("bfloat16", ["--torch_compile"])])
def test_finetune(checkpoints, digits, tmp_path, network, dtype, options, device, without_tf32):
    given = ["--model_name_or_path", checkpoints / f"{network}_ddpm", *PART[:4], "--max_train_steps", 2, *options]
    given += ["--train_batch_size", 16, "--random_flip", "--random_crop", 1, "--mixup", 0.2, "--ema_decay", 0.9]
    folder = run("finetune", tmp_path, digits, *given, "--mixed_precision", PRECISIONS[dtype])
    assert report(folder, "eval_results.json")["steps"] == 2
    check_classifier(folder, device)


@every_network
def test_noisy(checkpoints, digits, tmp_path, network):
    given = ["--model_name_or_path", checkpoints / f"{network}_edm", *PART, "--num_views", 2, "--num_train_epochs", 1]
    given += ["--wide_resnet", 1, "--wide_resnet_steps", 2, "--wide_resnet_batch_size", 16, "--hidden_size", 16]
    folder = run("noisy", tmp_path, digits, *given, "--random_flip", "--random_crop", 1, "--sigmas", 0.1, 1)
    assert (folder / "accuracy.png").is_file() and (folder / "wide_resnet").is_dir()


@every_dtype
def test_evaluate(checkpoints, digits, tmp_path, dtype):
    given = ["--model_name_or_path", checkpoints / "unet_flow", "--extractor", f"ddae:{checkpoints / 'unet_ddpm'}"]
    given += ["--num_images", 20, "--batch_size", 8, "--num_inference_steps", 2, "--max_reference_samples", 40]
    given += ["--features_dir", tmp_path / "features", "--dtype", dtype]
    folder = run("evaluate", tmp_path / "out", digits, *given)
    assert math.isfinite(report(folder, "generation_results.json")["results"]["generated"]["frechet_distance"])


@every_dtype
def test_transfer(checkpoints, digits, tmp_path, dtype, device, without_tf32):
    given = ["--model_name_or_path", checkpoints / "latent", *PART, "--sigmas", 0.2, "--num_noise_seeds", 1]
    given += ["--num_views", 2, "--random_flip", "--random_crop", 2, "--dtype", dtype]
    tuned = {"max_train_steps": 2, "train_batch_size": 16, "mixed_precision": PRECISIONS[dtype]}
    folder = run("transfer", tmp_path, digits, *given, "--layers", "all", "--finetune", json.dumps(tuned))
    assert report(folder / "finetuned", "eval_results.json")["steps"] == 2


@every_dtype
def test_train_vae(digits, tmp_path, dtype):
    given = ["--autoencoder", json.dumps(TINY_VAE), "--resolution", 8, "--train_batch_size", 16, "--held_out", 40]
    given += ["--lr_warmup_steps", 1, "--mixed_precision", PRECISIONS[dtype], "--max_train_samples", 100]
    folder = run("train-vae", tmp_path, digits, *given, "--max_train_steps", 3)
    assert math.isfinite(report(folder, "train_results.json")["held_out"]["psnr"])
    assert all(p.isfinite().all() for p in AutoencoderKL.from_pretrained(folder).parameters())


def test_encode_and_pretrain_on_latents(checkpoints, digits, tmp_path, device):
    given = ["--vae", checkpoints / "vae", "--max_samples", 64, "--batch_size", 8]
    latents = run("encode", tmp_path / "latents", digits, *given, "--mirror", "--sample_posterior")
    assert LatentFolder(latents).views("train") == 2
    denoiser = {"_class_name": "DiTTransformer2DModel", "num_layers": 2, "num_attention_heads": 2}
    denoiser |= {"attention_head_dim": 16, "patch_size": 2}
    given = ["--latents_dir", latents, "--denoiser", json.dumps(denoiser), "--class_conditional"]
    given += ["--total_batch_size", 16, "--max_train_steps", 4, "--lr_warmup_steps", 1, "--mixed_precision", "bf16"]
    given += ["--sample_steps", 4, "--grid_images", 2, "--num_inference_steps", 2]
    folder = run("pretrain", tmp_path / "run", None, *given)
    check_training(folder, report(folder, "train_results.json"), device)


@every_dtype
@pytest.mark.parametrize("format", ["parquet", "npy"])
def test_export(checkpoints, digits, tmp_path, format, dtype):
    given = ["--model_name_or_path", checkpoints / "dit_flow", "--max_samples", 40, "--layers", "all", "--sigma", 0.3]
    folder = run("export", tmp_path, digits, *given, "--format", format, "--dtype", dtype)
    assert list(folder.glob(f"*.{format}"))
