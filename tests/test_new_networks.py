"""The network that images suggest where none is described."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ddae_hf.experiments import Images, PretrainingOptions, new_networks, pretrain
from ddae_hf.experiments.new_networks import choose, unet
from ddae_hf.networks import build_denoiser


def pictures(count, width, height, mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    return Images.open([Image.fromarray(image).convert(mode) for image in pixels])


@pytest.mark.parametrize(
    ("width", "height", "mode", "side", "channels"),
    [(100, 120, "RGB", 32, 3), (28, 28, "L", 28, 1), (30, 40, "RGB", 28, 3), (8, 8, "L", 8, 1), (5, 9, "RGB", 8, 3)],
)
def test_resolution_and_channels_are_those_of_the_images(width, height, mode, side, channels, caplog):
    with caplog.at_level(logging.INFO):
        chosen = choose(pictures(70, width, height, mode), PretrainingOptions())
    assert (chosen.resolution, chosen.denoiser["in_channels"], chosen.total_batch_size) == (side, channels, 64)
    assert "No network is described" in caplog.text and f"at {side} pixels" in caplog.text


def test_what_is_said_of_resolution_and_batches_stays():
    chosen = choose(pictures(70, 40, 40), PretrainingOptions(resolution=16, train_batch_size=4))
    assert (chosen.resolution, chosen.train_batch_size, chosen.total_batch_size) == (16, 4, None)
    assert chosen.denoiser["sample_size"] == 16
    with pytest.raises(ValueError, match="resolution is 15: give an even number"):
        choose(pictures(2, 40, 40), PretrainingOptions(resolution=15))


@pytest.mark.parametrize("side", [8, 16, 28, 32, 64, 128])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_networks_of_every_side_can_be_built(side, device):
    described = unet(side, 3, device)
    names = ("block_out_channels", "down_block_types", "up_block_types")
    assert len({len(described[name]) for name in names}) == 1
    assert described["down_block_types"].count("AttnDownBlock2D") == 1
    if device == "cpu":
        assert build_denoiser(dict(described)).num_parameters() < 4e6


def test_a_run_that_is_resumed_keeps_its_network_and_its_batch(tmp_path, monkeypatch):
    images = pictures(20, 8, 8, "L")
    fast = {"output_dir": tmp_path, "sample_steps": 0, "grid_images": 1, "num_inference_steps": 1}
    first = pretrain(images, max_train_steps=1, checkpointing_steps=1, **fast)
    assert first.options["total_batch_size"] == 16
    monkeypatch.setattr("ddae_hf.experiments.new_networks.best_device", lambda: "cuda")  # which would choose another
    again = pretrain(images, max_train_steps=2, resume_from_checkpoint="latest", **fast)
    assert (again.steps, again.parameters, again.options["total_batch_size"]) == (2, first.parameters, 16)


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize(("count", "side"), [(None, 64), (50_000, 32), (20, 32), (2, 8)])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_batch_can_be_shared_by_any_number_of_devices(processes, count, side, device, monkeypatch):
    monkeypatch.setattr(new_networks, "this_process", lambda: SimpleNamespace(num_processes=processes))
    memory = SimpleNamespace(total_memory=12 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: memory)
    options = new_networks.with_batch(PretrainingOptions(), side, count, device)
    shared = options.train_batch_size * processes
    assert options.total_batch_size % shared == 0 and options.total_batch_size <= max(128, shared)
    fitting = 0.7 * memory.total_memory / (new_networks.PIXEL_BYTES * side**2)
    assert options.train_batch_size <= (fitting if device == "cuda" else 128)
