"""Classifying noisy images, at tiny size, on real digits; and the networks that learn it."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from diffusers import DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file

from ddae_hf import DDAEImageProcessor, DDAEModel, DDAEPipeline
from ddae_hf.experiments import Images, NoisyOptions, classify_noisy, features, noisy_classification
from ddae_hf.experiments.arrays import rows_done
from ddae_hf.experiments.draws import RowDraws, indexed_noise
from ddae_hf.experiments.noisy_networks import NoiseConditionalMLP, WideResNet
from ddae_hf.experiments.options import RANGES
from ddae_hf.experiments.results import NoisyReport
from ddae_hf.experiments.run_folder import saved_checkpoints
from ddae_hf.experiments.stopping import Interrupted, NotFinite
from ddae_hf.hidden_states import hidden_size

from . import commands
from .conftest import drawn, make_dit, make_unet
from .quiet import quiet

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


OPTIONS = {
    "max_train_samples": 60, "max_test_samples": 40, "batch_size": 25, "num_views": 2, "num_train_epochs": 2,
    "hidden_size": 16, "sigmas": [0.1, 1], "train_batch_size": 32, "wide_resnet": 1, "wide_resnet_steps": 3,
    "wide_resnet_batch_size": 16, "checkpointing_steps": 2, "random_flip": True, "random_crop": 1,
}  # fmt: skip
TWO = {"layers": ["mid_block", "up_blocks.0.attentions.1"]}


def run(checkpoint, digits, folder, **options):
    return classify_noisy(checkpoint, Images.open(digits), **{**OPTIONS, "output_dir": folder, **options})


@pytest.fixture(scope="module")
def trained(checkpoints, digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("noisy")
    return folder, run(checkpoints / "ddpm", digits, folder, **TWO)


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
    noise = indexed_noise((1, 8, 8), range(40), 0, noisy_classification.TEST_VIEW)
    mlp = open_network(NoiseConditionalMLP, folder / "mlp")
    wide_resnet = open_network(WideResNet, folder / "wide_resnet")
    with torch.no_grad():
        for i, sigma in enumerate([0.1, 1.0]):
            levels = torch.full((40,), sigma)
            states = model(clean, sigma=sigma, noise=noise, output_hidden_states=TWO["layers"]).hidden_states
            features = torch.cat([state.mean((2, 3)) for state in states], 1)
            for name, logits in {
                "MLP on the denoiser": mlp(features, levels),
                "WRN-28-1": wide_resnet(clean + sigma * noise, levels),
            }.items():
                accuracy = (logits.argmax(-1) == labels).float().mean().item()
                assert report.test_accuracies[name][i] == pytest.approx(accuracy)
    assert report.num_test_images == 40 and report.chance == 0.1
    assert report.trained_parameters["WRN-28-1"] == sum(p.numel() for p in wide_resnet.parameters())
    assert Image.open(folder / "accuracy.png").size[0] > 400


def test_stored_features_are_those_of_each_images_own_level_and_noise(checkpoints, digits, tmp_path):
    run(checkpoints / "ddpm", digits, tmp_path, random_flip=False, random_crop=0, wide_resnet=0)
    model = DDAEModel.from_pretrained(checkpoints / "ddpm").eval()
    train = drawn(digits, "train", 60).select([7, 50])
    clean = DDAEImageProcessor.from_pretrained(checkpoints / "ddpm")(train["image"][:], return_tensors="pt")
    for view in range(2):
        stored = np.load(tmp_path / "features" / f"view-{view}.npy")
        shares = RowDraws(0, [7, 50], "cpu", view).uniform((2,))
        logs = np.log(0.02) + shares.numpy() * np.log(10 / 0.02)
        noise = indexed_noise((1, 8, 8), [7, 50], 0, 2 + view)
        with torch.no_grad():
            expected = model(clean["pixel_values"], sigma=torch.from_numpy(np.exp(logs)).float(), noise=noise)
        np.testing.assert_allclose(stored[[7, 50]], expected.pooler_output, rtol=1e-3, atol=1e-4)
        assert stored.shape[0] == 60 and np.isfinite(stored).all()


@pytest.mark.parametrize("name", ["edm", "flow"])
def test_every_framework_and_network_serves(checkpoints, digits, tmp_path, name):
    report = run(checkpoints / name, digits, tmp_path, sigma_max=5, wide_resnet=0)
    assert set(report.test_accuracies) == {"MLP on the denoiser"} and not (tmp_path / "wide_resnet").exists()
    assert np.isfinite(np.load(tmp_path / "features" / "view-1.npy")).all()


def test_it_prints_nothing_and_leaves_the_global_generators_alone(checkpoints, digits, capsys):
    """Without a folder nothing is left but the result."""
    with quiet(capsys):
        result = run(checkpoints / "ddpm", digits, None, **TWO, num_views=1)
    assert isinstance(result.curves(), Figure) and set(result.networks) == {"mlp", "wide_resnet"}
    model = DDAEModel.from_pretrained(checkpoints / "ddpm")
    assert run(model, digits, None, **TWO, num_views=1).test_accuracies == result.test_accuracies


def test_its_report_is_one_of_results(trained):
    folder, result = trained
    assert NoisyReport.read(folder).to_dict() == result.to_dict() and "| 0.1 |" in result.table()
    assert result.dataset["num_images"] == 60 and result.options["model_name_or_path"]


def test_features_of_test_images_are_those_of_a_sweep(trained, checkpoints, digits, monkeypatch, tmp_path):
    """They lie where `features_dir` says, and are not computed again."""
    run(checkpoints / "ddpm", digits, tmp_path / "first", **TWO, wide_resnet=0, features_dir=tmp_path / "kept")
    names = {path.name for path in (tmp_path / "kept").iterdir()}
    assert len(names) == 2 and names < {path.name for path in (trained[0] / "features").iterdir()}
    monkeypatch.setattr(features, "batch_features", None)
    again = run(checkpoints / "ddpm", digits, tmp_path / "first", **TWO, wide_resnet=0, features_dir=tmp_path / "kept")
    mlp = "MLP on the denoiser"
    assert again.test_accuracies[mlp] == trained[1].test_accuracies[mlp]


def test_an_interrupted_run_resumes_exactly(trained, checkpoints, digits, tmp_path, monkeypatch):
    folder, report = trained
    with monkeypatch.context() as patch:

        def interrupted(*args):
            os.kill(os.getpid(), signal.SIGTERM)
            return noisy(*args)

        noisy = noisy_classification.Study.noisy_batch
        patch.setattr(noisy_classification.Study, "noisy_batch", interrupted)
        with pytest.raises(Interrupted, match="wide_resnet/checkpoint-1 is saved. To go on from it, give the same"):
            run(checkpoints / "ddpm", digits, tmp_path, **TWO)
    views = [tmp_path / "features" / f"view-{view}.npy" for view in range(2)]
    views[1].unlink()  # as if it had stopped before; what is there is kept
    kept = views[0].stat().st_mtime_ns
    with monkeypatch.context() as patch:
        calls = []

        def stopped(*args, **kwargs):
            calls.append(args)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return read(*args, **kwargs)

        read = noisy_classification.batch_features
        patch.setattr(noisy_classification, "batch_features", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(checkpoints / "ddpm", digits, tmp_path, **TWO)
    assert rows_done(tmp_path / "features") == {"view-0": 60, "view-1": 25}
    again = run(checkpoints / "ddpm", digits, tmp_path, **TWO)
    assert views[0].stat().st_mtime_ns == kept
    for view in views:
        assert np.array_equal(np.load(view), np.load(folder / "features" / view.name))
    kept = [f.name for f in saved_checkpoints(tmp_path / "wide_resnet")]
    assert kept == ["checkpoint-2", "checkpoint-3"]
    for file in (
        "mlp/model.safetensors",
        "wide_resnet/model.safetensors",
        "wide_resnet/checkpoint-3/model.safetensors",
    ):
        expected, resumed = load_file(folder / file), load_file(tmp_path / file)
        assert expected.keys() == resumed.keys() and all(torch.equal(expected[n], resumed[n]) for n in expected)
    assert again.test_accuracies == report.test_accuracies


def test_the_rival_is_resumed_at_another_learning_rate(trained, checkpoints, digits, tmp_path):
    shutil.copytree(trained[0], tmp_path / "out")
    options = {"wide_resnet_learning_rate": 0.01, "wide_resnet_steps": 5, "checkpointing_steps": 4}
    run(checkpoints / "ddpm", digits, tmp_path / "out", **TWO, **options)
    state = torch.load(tmp_path / "out" / "wide_resnet" / "checkpoint-5" / "state" / "optimizer.bin")
    assert state["param_groups"][0]["initial_lr"] == 0.01


@pytest.mark.parametrize(("name", "value"), [("learning_rate", 0.01), ("steps", 2)])
def test_a_finished_rival_of_other_options_is_refused_at_once(
    trained, checkpoints, digits, tmp_path, monkeypatch, name, value
):
    shutil.copytree(trained[0], tmp_path / "out")
    monkeypatch.setattr(noisy_classification.Study, "train_mlp", None)
    with pytest.raises(ValueError, match=f"other options: wide_resnet_{name} was .* and is {value}. Resuming cannot"):
        run(checkpoints / "ddpm", digits, tmp_path / "out", **TWO, **{f"wide_resnet_{name}": value})


def test_a_damaged_checkpoint_of_the_rival_is_passed_over(trained, checkpoints, digits, tmp_path, caplog):
    shutil.copytree(trained[0], tmp_path / "out")
    (tmp_path / "out" / "wide_resnet" / "checkpoint-3" / "model.safetensors").write_bytes(b"half")
    again = run(checkpoints / "ddpm", digits, tmp_path / "out", **TWO)
    assert "Resuming from" in caplog.text and again.test_accuracies == trained[1].test_accuracies
    expected = load_file(trained[0] / "wide_resnet" / "model.safetensors")
    resumed = load_file(tmp_path / "out" / "wide_resnet" / "model.safetensors")
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


def test_without_a_folder_a_signal_acts_as_always(checkpoints, digits, monkeypatch):
    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(noisy_classification.Study, "noisy_batch", interrupted)
    with pytest.raises(KeyboardInterrupt) as stopped:
        run(checkpoints / "ddpm", digits, None, **TWO)
    assert not isinstance(stopped.value, Interrupted)


def test_an_unfinished_rival_of_an_older_version_is_refused_and_its_features_are_found(
    trained, checkpoints, digits, tmp_path, monkeypatch
):
    """Version 0.2.0 noted more options, and the training of the Wide ResNet in one file."""
    shutil.copytree(trained[0] / "features", tmp_path / "features")
    options = json.loads((tmp_path / "features" / "options.json").read_text())
    options |= {"dataset_name": str(digits), "dataset_config_name": None, "max_train_samples": 60}
    (tmp_path / "features" / "options.json").write_text(json.dumps(options))
    (tmp_path / "wide_resnet").mkdir()
    (tmp_path / "wide_resnet" / "state.safetensors").touch()
    with pytest.raises(
        ValueError, match="wide_resnet holds a training of a version before 0.3.0, .*: delete that folder"
    ):
        run(checkpoints / "ddpm", digits, tmp_path, **TWO)
    shutil.rmtree(tmp_path / "wide_resnet")
    monkeypatch.setattr(noisy_classification, "batch_features", None)
    assert run(checkpoints / "ddpm", digits, tmp_path, **TWO).test_accuracies == trained[1].test_accuracies


def test_stored_features_that_are_damaged_are_not_used(trained, checkpoints, digits, tmp_path):
    shutil.copytree(trained[0], tmp_path / "out")
    path = tmp_path / "out" / "features" / "view-1.npy"
    path.write_bytes(path.read_bytes()[:-4000] + bytes(4000))
    with pytest.raises(ValueError, match=r"view-1\.npy is damaged .*delete this folder"):
        run(checkpoints / "ddpm", digits, tmp_path / "out", **TWO)


@pytest.mark.parametrize("name", ["features", "wide_resnet"])
def test_damaged_notes_of_options_are_named(trained, checkpoints, digits, tmp_path, name):
    shutil.copytree(trained[0], tmp_path / "out")
    (tmp_path / "out" / name / "options.json").write_text("{")
    with pytest.raises(ValueError, match=f"{name}/options.json is damaged"):
        run(checkpoints / "ddpm", digits, tmp_path / "out", **TWO)


def test_a_folder_of_other_options_is_refused(trained, checkpoints, digits, tmp_path):
    folder, _ = trained
    with pytest.raises(ValueError, match=r"features was made with other options \(seed is 0 there, 5 here; layers is"):
        run(checkpoints / "ddpm", digits, folder, layers=["mid_block"], seed=5)
    with pytest.raises(ValueError, match=r"wide_resnet was made with other options \(wide_resnet_batch_size is"):
        run(checkpoints / "ddpm", digits, folder, **TWO, wide_resnet_batch_size=9)
    with pytest.raises(ValueError, match=r"\(scheduler differs\)"):  # its weights are the same
        run(checkpoints / "flow", digits, folder, **TWO)
    DDAEPipeline.for_denoiser(make_unet(seed=1, **GREY), DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"\(weights differs\)"):
        run(tmp_path, digits, folder, **TWO)
    changed = tmp_path / "changed"
    shutil.copytree(digits, changed)
    run(checkpoints / "ddpm", changed, tmp_path / "out", **TWO)
    rows = Dataset.from_parquet(str(digits / "train.parquet")).select(range(100, 300))
    rows.to_parquet(changed / "train.parquet")
    with pytest.raises(ValueError, match=r"\(data differs\)"):  # the same folder's name, other images in it
        run(checkpoints / "ddpm", changed, tmp_path / "out", **TWO)


@pytest.mark.parametrize("option", ["learning_rate", "wide_resnet_learning_rate"])
def test_what_diverges_is_not_saved(option, checkpoints, digits, tmp_path):
    with pytest.raises(NotFinite, match=f"none of it is saved. There is no checkpoint .* with a lower {option}, or"):
        run(checkpoints / "ddpm", digits, tmp_path, checkpointing_steps=500, num_train_epochs=3, **{option: 1e30})
    failed = "mlp" if option == "learning_rate" else "wide_resnet"
    assert not list((tmp_path / failed).glob("*.safetensors")) and not (tmp_path / "eval_results.json").exists()


@pytest.mark.parametrize(("k", "parameters"), [(10, 36_479_194), (2, 1_467_610)])
def test_the_wide_resnet_is_the_papers_beside_the_maps_of_the_level(k, parameters):
    with torch.device("meta"):
        network = WideResNet(k, 10)
    of_level = sum(p.numel() for name, p in network.named_parameters() if ".shift." in name)
    assert sum(p.numel() for p in network.parameters()) - of_level == parameters
    # 28 layers: the first convolution, two in each of 12 blocks and the classifier, and three shortcuts beside them.
    convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    assert sum(c.kernel_size == (3, 3) for c in convolutions) == 25
    assert sum(c.kernel_size == (1, 1) for c in convolutions) == 3
    assert sum(c.stride == (2, 2) and c.kernel_size == (3, 3) for c in convolutions) == 2


def test_the_wide_resnet_learns_to_tell_the_signs_of_noisy_images():
    torch.manual_seed(0)
    network = WideResNet(1, 2, 1).train()
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
    mlp = NoiseConditionalMLP(6, 4, 8, 2, 0.0).eval()
    features = torch.randn(3, 6)
    assert not torch.allclose(mlp(features, low), mlp(features, high), atol=1e-4)
    network, scale = WideResNet(1, 4).eval(), (0.5**2 + 0.25) ** 0.5
    unit = torch.randn(3, 3, 8, 8)  # what the first convolution sees is the same at both levels
    at_low, at_high = network(unit * (0.1**2 + 0.25) ** 0.5, low), network(unit * scale, high)
    assert not torch.allclose(at_low, at_high, atol=1e-4)
    for block in network.blocks:
        torch.nn.init.zeros_(block.shift.weight)
    at_low, at_high = network(unit * (0.1**2 + 0.25) ** 0.5, low), network(unit * scale, high)
    torch.testing.assert_close(at_low, at_high, rtol=1e-4, atol=1e-5)


def test_levels_are_log_uniform_in_their_range():
    options = NoisyOptions(sigma_min=0.02, sigma_max=5)
    sigma = noisy_classification.log_uniform(options, torch.linspace(0, 1, 20000))
    shares = (sigma.log() - np.log(0.02)) / (np.log(5) - np.log(0.02))
    assert shares.min() > -1e-6 and shares.max() < 1 + 1e-6
    assert np.histogram(shares, 4, (0, 1))[0] == pytest.approx([5000] * 4, rel=0.06)
    assert options.sigmas[0] == 0.02 and options.sigmas[-1] == pytest.approx(5) and len(options.sigmas) == 8


def test_every_number_has_a_range():
    hints = NoisyOptions.__annotations__
    numbers = {name for name, hint in hints.items() if "int" in str(hint) or "float" in str(hint)}
    assert numbers <= set(RANGES) and len(numbers) > 15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": ["mid_block", "up_blocks.8.resnets.0"]}, "There is no layer 'up_blocks.8.resnets.0'"),
        ({"sigma_min": 0.001, "sigmas": None}, "outside the schedule"),
        ({"sigma_max": 1000, "sigmas": None}, "outside the schedule"),
        ({"sigma_min": 2, "sigma_max": 1}, "sigma_min is 2 and sigma_max 1: the first must be the smaller one"),
        ({"sigmas": [0.001, 1]}, "they must lie between sigma_min and sigma_max"),
        ({"sigmas": [-1]}, "sigmas is -1.0: it must be at least 0"),
        ({"num_views": 0}, "num_views is 0: it must be at least 1"),
        ({"batch_size": 0}, "batch_size is 0: it must be at least 1"),
        ({"wide_resnet": -1}, "wide_resnet is -1: it must be at least 0"),
        ({"random_crop": 8}, "random_crop is 8: it must be below the sides"),
        ({"null_class": 3}, "takes no labels"),
        ({"test_split": "holdout"}, "has no split 'holdout'"),
        ({"test_split": "train"}, "test on other images"),
        ({"num_view": 3}, "here is no option 'num_view': the nearest are num_views"),
    ],
)
def test_bad_input_is_refused_before_anything_is_computed(checkpoints, digits, tmp_path, options, message):
    with pytest.raises(ValueError) as refusal:
        run(checkpoints / "ddpm", digits, tmp_path / "out", **options)
    assert message in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_is_not_there_and_a_folder_that_is_a_file_are_refused(checkpoints, digits, tmp_path):
    with pytest.raises(OSError, match="is not a folder"):
        run("nowhere/at/all", digits, tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file: give a folder"):
        run("nowhere/at/all", digits, tmp_path / "file")


def test_the_command_is_a_caller(checkpoints, digits, tmp_path, capsys):
    config = "cifar10_cpu_noisy"
    options = ["--model_name_or_path", checkpoints / "ddpm", "--dataset_name", digits, "--output_dir", tmp_path]
    options += ["--max_train_samples", 60, "--max_test_samples", 40, "--num_views", 1, "--wide_resnet", 0]
    commands.run("noisy", "--config", config, *options, "--layers", "mid_block", "--num_train_epochs", 1)
    kept = NoisyReport.read(tmp_path).options
    assert kept["wide_resnet_steps"] == 750 and kept["random_flip"] is True and kept["layers"] == ["mid_block"]
    assert "The curves are in" in capsys.readouterr().out and (tmp_path / "accuracy.png").is_file()
    with pytest.raises(SystemExit, match="choose another output_dir"):
        commands.run("noisy", "--config", config, *options, "--layers", "down_blocks.0.resnets.0")


def test_features_of_four_quarters_are_read(checkpoints, digits, tmp_path):
    model = DDAEModel.from_pretrained(checkpoints / "ddpm", pooling="mean_2x2")
    result = run(model, digits, tmp_path, **TWO, wide_resnet=0)
    channels = sum(hidden_size(model.denoiser, layer) for layer in TWO["layers"])
    assert open_network(NoiseConditionalMLP, tmp_path / "mlp").layers[0].in_features == 4 * channels
    assert result.test_accuracies
