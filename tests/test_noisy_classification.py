"""Classifying noisy images as a user does, at tiny size, on real digits; and the networks that learn it."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from diffusers import DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file

import noisy_classifier as script
from ddae_hf import DDAEImageProcessor, DDAEModel, DDAEPipeline
from ddae_hf.experiments.arrays import rows_done
from ddae_hf.experiments.draws import indexed_noise

from . import scripts
from .conftest import drawn, make_dit, make_unet

GREY = {"in_channels": 1, "out_channels": 1}
PAIRS = {
    "ddpm": (make_unet, GREY, DDPMScheduler),
    "edm": (make_dit, {"in_channels": 1, "num_embeds_ada_norm": 0}, EDMEulerScheduler),
    "flow": (make_unet, GREY, FlowMatchEulerDiscreteScheduler),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("denoisers")
    for name, (make, options, scheduler) in PAIRS.items():
        DDAEPipeline.for_denoiser(make(**options), scheduler()).save_pretrained(root / name)
    return root


def run(checkpoint, digits, folder, *options):
    arguments = ["--model_name_or_path", str(checkpoint), "--dataset_name", str(digits), "--output_dir", str(folder)]
    arguments += ["--max_train_samples", "60", "--max_test_samples", "40", "--batch_size", "25", "--num_views", "2"]
    arguments += ["--num_train_epochs", "2", "--hidden_size", "16", "--sigmas", "0.1", "1", "--train_batch_size", "32"]
    arguments += ["--wide_resnet", "1", "--wide_resnet_steps", "3", "--wide_resnet_batch_size", "16"]
    scripts.run(
        "noisy_classifier", *arguments, "--checkpointing_steps", "2", "--random_flip", "--random_crop", "1", *options
    )
    return json.loads((folder / "eval_results.json").read_text())


TWO = ["--layers", "mid_block", "up_blocks.0.attentions.1"]


@pytest.fixture(scope="module")
def trained(checkpoints, digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("noisy")
    return folder, run(checkpoints / "ddpm", digits, folder, *TWO)


def open_network(cls, folder):
    config = json.loads((folder / "config.json").read_text())
    config.pop("layers", None)
    network = cls(**config)
    network.load_state_dict(load_file(folder / "model.safetensors"))
    return network.eval()


def test_the_saved_networks_have_the_reported_accuracies(trained, checkpoints, digits):
    folder, report = trained
    model = DDAEModel.from_pretrained(checkpoints / "ddpm").eval()
    test = drawn(digits, "test", 40)
    clean = DDAEImageProcessor.from_pretrained(checkpoints / "ddpm")(test["image"][:], return_tensors="pt")
    clean, labels = clean["pixel_values"], torch.tensor(test["label"][:])
    noise = indexed_noise((1, 8, 8), range(40), 0, script.TEST_VIEW)
    mlp = open_network(script.NoiseConditionalMLP, folder / "mlp")
    wide_resnet = open_network(script.WideResNet, folder / "wide_resnet")
    with torch.no_grad():
        for i, sigma in enumerate([0.1, 1.0]):
            levels = torch.full((40,), sigma)
            states = model(clean, sigma=sigma, noise=noise, output_hidden_states=TWO[1:]).hidden_states
            features = torch.cat([state.mean((2, 3)) for state in states], 1)
            for name, logits in {
                "MLP on the denoiser": mlp(features, levels),
                "WRN-28-1": wide_resnet(clean + sigma * noise, levels),
            }.items():
                accuracy = (logits.argmax(-1) == labels).float().mean().item()
                assert report["test_accuracies"][name][i] == pytest.approx(accuracy)
    assert report["num_test_images"] == 40 and report["chance"] == 0.1
    assert report["trained_parameters"]["WRN-28-1"] == sum(p.numel() for p in wide_resnet.parameters())
    assert Image.open(folder / "accuracy.png").size[0] > 400


def test_stored_features_are_those_of_each_images_own_level_and_noise(checkpoints, digits, tmp_path):
    run(checkpoints / "ddpm", digits, tmp_path, "--no-random_flip", "--random_crop", "0", "--wide_resnet", "0")
    model = DDAEModel.from_pretrained(checkpoints / "ddpm").eval()
    train = drawn(digits, "train", 60).select([7, 50])
    clean = DDAEImageProcessor.from_pretrained(checkpoints / "ddpm")(train["image"][:], return_tensors="pt")
    for view in range(2):
        stored = np.load(tmp_path / "features" / f"view-{view}.npy")
        logs = np.random.default_rng([0, view]).uniform(np.log(0.02), np.log(10), 60)[[7, 50]]
        noise = indexed_noise((1, 8, 8), [7, 50], 0, 2 + view)
        with torch.no_grad():
            expected = model(clean["pixel_values"], sigma=torch.from_numpy(np.exp(logs)).float(), noise=noise)
        np.testing.assert_allclose(stored[[7, 50]], expected.pooler_output, rtol=1e-3, atol=1e-4)
        assert stored.shape[0] == 60 and np.isfinite(stored).all()


@pytest.mark.parametrize("name", ["edm", "flow"])
def test_every_framework_and_network_serves(checkpoints, digits, tmp_path, name):
    report = run(checkpoints / name, digits, tmp_path, "--sigma_max", "5", "--wide_resnet", "0")
    assert set(report["test_accuracies"]) == {"MLP on the denoiser"} and not (tmp_path / "wide_resnet").exists()
    assert np.isfinite(np.load(tmp_path / "features" / "view-1.npy")).all()


def test_an_interrupted_run_resumes_exactly(trained, checkpoints, digits, tmp_path, monkeypatch):
    folder, report = trained
    with monkeypatch.context() as patch:

        def interrupted(*args):
            save(*args)
            raise KeyboardInterrupt

        save = script.save_state
        patch.setattr(script, "save_state", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(checkpoints / "ddpm", digits, tmp_path, *TWO)
    views = [tmp_path / "features" / f"view-{view}.npy" for view in range(2)]
    views[1].unlink()  # as if it had stopped before; what is there is kept
    kept = views[0].stat().st_mtime_ns
    with monkeypatch.context() as patch:
        calls = []

        def stopped(*args):
            calls.append(args)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return read(*args)

        read = script.features
        patch.setattr(script, "features", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(checkpoints / "ddpm", digits, tmp_path, *TWO)
    assert rows_done(tmp_path / "features") == {"view-0": 60, "view-1": 25}
    again = run(checkpoints / "ddpm", digits, tmp_path, *TWO)
    assert views[0].stat().st_mtime_ns == kept
    for view in views:
        assert np.array_equal(np.load(view), np.load(folder / "features" / view.name))
    for file in ("mlp/model.safetensors", "wide_resnet/model.safetensors", "wide_resnet/state.safetensors"):
        expected, resumed = load_file(folder / file), load_file(tmp_path / file)
        assert expected.keys() == resumed.keys() and all(torch.equal(expected[n], resumed[n]) for n in expected)
    assert again["test_accuracies"] == report["test_accuracies"]


def test_stored_features_that_are_damaged_are_not_used(trained, checkpoints, digits, tmp_path):
    shutil.copytree(trained[0], tmp_path / "out")
    path = tmp_path / "out" / "features" / "view-1.npy"
    path.write_bytes(path.read_bytes()[:-4000] + bytes(4000))
    with pytest.raises(SystemExit, match=r"view-1\.npy is damaged .*delete this folder"):
        run(checkpoints / "ddpm", digits, tmp_path / "out", *TWO)


@torch.no_grad()
def test_features_of_noisy_images_are_those_of_evaluation_whatever_the_callers_state(checkpoints):
    model = DDAEModel.from_pretrained(checkpoints / "ddpm").eval()
    clean, noise = torch.rand(2, 3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = script.features(model, TWO[1:], clean, noise, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(script.features(model.train(), TWO[1:], clean, noise, 0.5), expected)
    assert model.denoiser.training


def test_a_folder_of_other_options_is_refused(trained, checkpoints, digits, tmp_path):
    folder, _ = trained
    with pytest.raises(SystemExit, match=r"features was made with other options \(layers, seed\)"):
        run(checkpoints / "ddpm", digits, folder, "--layers", "mid_block", "--seed", "5")
    with pytest.raises(SystemExit, match=r"wide_resnet was made with other options \(wide_resnet_steps\)"):
        run(checkpoints / "ddpm", digits, folder, *TWO, "--wide_resnet_steps", "9")
    with pytest.raises(SystemExit, match=r"\(scheduler\)"):  # its weights are the same
        run(checkpoints / "flow", digits, folder, *TWO)
    DDAEPipeline.for_denoiser(make_unet(seed=1, **GREY), DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match=r"\(weights\)"):
        run(tmp_path, digits, folder, *TWO)
    with pytest.raises(SystemExit, match=r"\(data\)"):  # the same folder's name, other images in it
        changed = tmp_path / "changed"
        shutil.copytree(digits, changed)
        run(checkpoints / "ddpm", changed, tmp_path / "out", *TWO)
        rows = Dataset.from_parquet(str(digits / "train.parquet")).select(range(100, 300))
        rows.to_parquet(changed / "train.parquet")
        run(checkpoints / "ddpm", changed, tmp_path / "out", *TWO)


@pytest.mark.parametrize(("k", "parameters"), [(10, 36_479_194), (2, 1_467_610)])
def test_the_wide_resnet_is_the_papers_beside_the_maps_of_the_level(k, parameters):
    with torch.device("meta"):
        network = script.WideResNet(k, 10)
    of_level = sum(p.numel() for name, p in network.named_parameters() if ".shift." in name)
    assert sum(p.numel() for p in network.parameters()) - of_level == parameters
    # 28 layers: the first convolution, two in each of 12 blocks and the classifier, and three shortcuts beside them.
    convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    assert sum(c.kernel_size == (3, 3) for c in convolutions) == 25
    assert sum(c.kernel_size == (1, 1) for c in convolutions) == 3
    assert sum(c.stride == (2, 2) and c.kernel_size == (3, 3) for c in convolutions) == 2


def test_the_wide_resnet_learns_to_tell_the_signs_of_noisy_images():
    torch.manual_seed(0)
    network = script.WideResNet(1, 2, 1).train()
    optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)
    for step in range(25):
        labels = torch.arange(32) % 2
        sigma = torch.full((32,), 0.1 if step % 2 else 1.0)
        images = (labels * 2.0 - 1)[:, None, None, None] * torch.ones(32, 1, 8, 8) / 2
        loss = F.cross_entropy(network(images + sigma[:, None, None, None] * torch.randn_like(images), sigma), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    right = network.eval()(images + 0.1 * torch.randn_like(images), torch.full((32,), 0.1)).argmax(-1) == labels
    assert right.float().mean() > 0.9


def test_both_networks_are_told_the_level():
    torch.manual_seed(0)
    low, high = torch.full((3,), 0.1), torch.full((3,), 0.5)
    mlp = script.NoiseConditionalMLP(6, 4, 8, 2, 0.0).eval()
    features = torch.randn(3, 6)
    assert not torch.allclose(mlp(features, low), mlp(features, high), atol=1e-4)
    network, scale = script.WideResNet(1, 4).eval(), (0.5**2 + 0.25) ** 0.5
    unit = torch.randn(3, 3, 8, 8)  # what the first convolution sees is the same at both levels
    at_low, at_high = network(unit * (0.1**2 + 0.25) ** 0.5, low), network(unit * scale, high)
    assert not torch.allclose(at_low, at_high, atol=1e-4)
    for block in network.blocks:
        torch.nn.init.zeros_(block.shift.weight)
    at_low, at_high = network(unit * (0.1**2 + 0.25) ** 0.5, low), network(unit * scale, high)
    torch.testing.assert_close(at_low, at_high, rtol=1e-4, atol=1e-5)


def test_levels_are_log_uniform_in_their_range():
    args = script.parse_arguments(["--model_name_or_path", "x", "--sigma_min", "0.02", "--sigma_max", "5"])
    sigma = script.log_uniform(args, 20000, [0, 1])
    shares = (sigma.log() - np.log(0.02)) / (np.log(5) - np.log(0.02))
    assert shares.min() > -1e-6 and shares.max() < 1 + 1e-6
    assert np.histogram(shares, 4, (0, 1))[0] == pytest.approx([5000] * 4, rel=0.06)
    assert args.sigmas[0] == 0.02 and args.sigmas[-1] == 5 and len(args.sigmas) == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "mid_block", "up_blocks.8.resnets.0"], "There is no layer 'up_blocks.8.resnets.0'"),
        (["--sigma_min", "0.001"], "outside the schedule"),
        (["--sigma_max", "1000"], "outside the schedule"),
        (["--sigma_min", "2", "--sigma_max", "1"], "0 < min < max must hold"),
        (["--sigmas", "0.001", "1"], "they must lie between --sigma_min and --sigma_max"),
        (["--num_views", "0"], "--num_views is 0: it must be at least 1"),
        (["--wide_resnet", "-1"], "--wide_resnet is -1: it must be at least 0"),
        (["--random_crop", "8"], "--random_crop is 8: the images' sides are"),
        (["--null_class", "3"], "it takes no labels"),
        (["--test_split", "holdout"], "has no split 'holdout'"),
        (["--model_name_or_path", "nowhere/at/all"], "is not a folder"),
    ],
)
def test_bad_input_is_refused_before_anything_is_computed(checkpoints, digits, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as refusal:
        run(checkpoints / "ddpm", digits, tmp_path / "out", *options)
    assert message in f"{refusal.value} {capsys.readouterr().err}"
    assert not (tmp_path / "out").exists()


def test_the_configuration_is_one_of_this_script():
    path = script.Path(script.__file__).parent / "configs" / "cifar10_cpu_noisy.yaml"
    args = script.parse_arguments(["--config", str(path), "--model_name_or_path", "x"])
    assert args.wide_resnet == 2 and args.max_train_samples == 20000
