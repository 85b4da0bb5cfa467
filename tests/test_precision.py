"""bfloat16 in place of float32: features and samples stay what they are, within its rounding."""

import json
import os
import platform

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDPMScheduler

from ddae_hf import DDAEForImageClassification, DDAEModel, DDAEPipeline
from ddae_hf.experiments.devices import fast_layout, keep_freed_memory, training_precision
from ddae_hf.experiments.features import extract_features
from ddae_hf.experiments.results import ProbeReport
from ddae_hf.experiments.run_folder import OPTIONS
from ddae_hf.hidden_states import decoder_layer_names

from . import commands
from .conftest import TINY, make_unet
from .test_sweeping import run, save_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def test_features_are_those_of_float32_within_rounding(checkpoint):
    found = {}
    images = torch.rand(8, 1, 8, 8) * 2 - 1
    for dtype in (torch.float32, torch.bfloat16):
        model = DDAEModel.from_pretrained(checkpoint, dtype=dtype)
        layers = decoder_layer_names(model.denoiser)
        found[dtype] = extract_features(model, [images], layers, 0.1)
    for layer, exact in found[torch.float32].items():
        rounded = found[torch.bfloat16][layer]
        assert rounded.dtype == torch.float32
        assert 0 < (rounded - exact).norm() < 0.02 * exact.norm()


def test_a_sweep_in_bfloat16_finds_what_one_in_float32_does_and_saves_the_checkpoint_as_it_is(
    checkpoint, digits, tmp_path
):
    exact = run(checkpoint, digits, tmp_path / "exact")
    rounded = run(checkpoint, digits, tmp_path / "rounded", "--dtype", "bfloat16")
    for one, other in zip(exact["pairs"], rounded["pairs"], strict=True):
        assert abs(one["validation_accuracy"] - other["validation_accuracy"]) <= 0.1
    assert exact["pairs"] != rounded["pairs"] or exact["test_accuracies"] != rounded["test_accuracies"]
    identities = [json.loads(p.read_text()) for p in (tmp_path / "rounded" / "features").glob("*/identity.json")]
    assert {identity["dtype"] for identity in identities} == {"torch.bfloat16"}
    model = DDAEForImageClassification.from_pretrained(tmp_path / "rounded" / "classifier")
    assert model.dtype == torch.float32
    weights = DDAEPipeline.from_pretrained(checkpoint).denoiser.state_dict()
    for name, values in model.ddae.denoiser.state_dict().items():
        assert torch.equal(values, weights[name])


def test_the_probe_and_its_untrained_network_compute_in_the_type_that_is_chosen(checkpoint, digits, tmp_path):
    options = ["--model_name_or_path", checkpoint, "--dataset_name", str(digits), "--max_train_samples", "100"]
    options += ["--max_test_samples", "50", "--sigmas", "0.1", "--baselines"]
    accuracies = {}
    for dtype in ("float32", "bfloat16"):
        commands.run("probe", *options, "--dtype", dtype, "--output_dir", str(tmp_path / dtype))
        report = ProbeReport.read(tmp_path / dtype)
        accuracies[dtype] = {name: probe.test_accuracies["0"] for name, probe in report.baselines.items()}
        accuracies[dtype]["DDAE"] = report.test_accuracies["0"]
    assert accuracies["float32"]["raw pixels"] == accuracies["bfloat16"]["raw pixels"]
    for name, accuracy in accuracies["float32"].items():
        assert abs(accuracy - accuracies["bfloat16"][name]) <= 0.1


def test_samples_are_those_of_float32_within_rounding_and_do_not_share_a_folder(checkpoint, tmp_path):
    options = ["--model_name_or_path", checkpoint, "--num_images", "4", "--num_inference_steps", "5"]
    images = {}
    for dtype in ("float32", "bfloat16"):
        commands.run("generate", *options, "--dtype", dtype, "--output_dir", str(tmp_path / dtype))
        pipeline = DDAEPipeline.from_pretrained(checkpoint, dtype=getattr(torch, dtype))
        assert pipeline.denoiser.dtype == getattr(torch, dtype)
        generator = torch.Generator().manual_seed(0)
        images[dtype] = pipeline(4, generator=generator, num_inference_steps=5, output_type="np").images
    difference = np.abs(images["float32"] - images["bfloat16"])
    assert 0 < difference.mean() < 0.05
    with pytest.raises(SystemExit, match="made otherwise.*weights"):
        commands.run("generate", *options, "--dtype", "float32", "--output_dir", str(tmp_path / "bfloat16"))


def test_the_layout_of_training_changes_nothing_but_rounding():
    images = torch.rand(4, 3, 8, 8) * 2 - 1
    gradients = []
    for layout in (torch.contiguous_format, torch.channels_last):
        network = make_unet(0).to(memory_format=layout)
        output = network(images.to(memory_format=layout), torch.tensor(5.0)).sample
        output.square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-7)
    assert fast_layout(torch.device("cpu")) == torch.contiguous_format
    assert fast_layout(torch.device("cuda")) == torch.channels_last


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="Only glibc is told to keep memory.")
def test_freed_memory_is_kept(monkeypatch):
    resource = pytest.importorskip("resource")
    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_TUNABLES"))]:
        monkeypatch.delenv(name)
    keep_freed_memory()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(40):
        torch.ones(2**24)  # 64 MiB, twice what glibc keeps by itself
    cleared = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert cleared < 40 * 2**26 / resource.getpagesize() / 2


CHOICES = {
    "nothing is said": ({}, "bf16"),
    "the option": ({"given": "no"}, "no"),
    "the launcher": ({"launcher": "no", "before": "fp16"}, "no"),
    "the option, not the launcher": ({"given": "fp16", "launcher": "no"}, "fp16"),
    "a resumed run": ({"before": "no"}, "no"),
    "no such GPU": ({"supported": False}, "no"),
    "a CPU": ({"device": "cpu"}, "no"),
    "a CPU, a resumed run": ({"device": "cpu", "before": "bf16"}, "bf16"),
    "an Apple GPU": ({"device": "mps"}, "no"),
}


@pytest.mark.parametrize(("said", "expected"), CHOICES.values(), ids=CHOICES)
def test_training_is_in_bfloat16_on_gpus_unless_something_else_is_said(said, expected, monkeypatch, caplog):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if "launcher" in said:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", said["launcher"])
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: said.get("supported", True))
    device = torch.device(said.get("device", "cuda"))
    with caplog.at_level("INFO"):
        assert training_precision(said.get("given"), said.get("before"), device) == expected
    assert ("mixed_precision is bf16" in caplog.text) is (not said)


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_a_run_that_goes_on_keeps_its_precision(command, digits, tmp_path, monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    folder = tmp_path / command
    options = ["--dataset_name", str(digits), "--max_train_samples", "40", "--train_batch_size", "20"]
    options += ["--output_dir", str(folder), "--checkpointing_steps", "1"]
    if command == "finetune":
        DDAEPipeline(make_unet(in_channels=1, out_channels=1), DDPMScheduler()).save_pretrained(tmp_path / "network")
        options += ["--model_name_or_path", str(tmp_path / "network"), "--max_test_samples", "20"]
    else:
        options += ["--denoiser", json.dumps({**TINY, "in_channels": 1, "out_channels": 1}), "--sample_steps", "0"]
    kept = []
    for steps, more in (("1", ["--mixed_precision", "bf16"]), ("2", ["--resume_from_checkpoint", "latest"])):
        commands.run(command, *options, "--max_train_steps", steps, *more)
        kept.append(yaml.safe_load((folder / OPTIONS).read_text())["mixed_precision"])
    assert kept == ["bf16", "bf16"]
