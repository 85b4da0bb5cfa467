"""Commands on two processes give the figures of one, into one folder, and one goes on where two stopped."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from ddae_hf import DDAEPipeline
from ddae_hf.experiments.latent_folder import LatentFolder

from . import commands
from .conftest import make_dit, make_unet, make_vae, put

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parent.parent
RUN = """
import json, sys
from accelerate.state import PartialState
from ddae_hf.experiments.sharing import Team
from ddae_hf.experiments.training import Loop
from tests import commands

def counted(team, task, parts, details):
    shares[task] = shares.get(task, 0) + len(parts[team.number :: team.count])
    return results(team, task, parts, details)

def trained(loop, *words):
    shares["trainings"] += 1
    return run(loop, *words)

results, Team._results = Team._results, counted
run, Loop.run = Loop.run, trained
PartialState.destroy_process_group = lambda state: None  # the next command needs it
for name, options in json.loads(sys.argv[1]):
    shares = {"trainings": 0}
    commands.run(name, *options)
    with open(f"shares-of-{name}-{PartialState().process_index}.json", "w") as file:
        json.dump(shares, file)
"""
SHARED = {"sweep", "probe", "export", "noisy", "encode", "transfer", "diffusion-classifier", "outliers"}
COUNTS = ["--max_train_samples", 60, "--max_test_samples", 30]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    DDAEPipeline.for_denoiser(make_unet(in_channels=1, out_channels=1), DDIMScheduler()).save_pretrained(root / "unet")
    told = make_unet(in_channels=1, out_channels=1, num_class_embeds=11)
    DDAEPipeline.for_denoiser(told, DDIMScheduler(), 10).save_pretrained(root / "told")
    dit = make_dit(in_channels=4, num_layers=2, num_embeds_ada_norm=0)
    for parameter in dit.parameters():  # diffusers' own start ends in zeros
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    DDAEPipeline.for_denoiser(dit, DDIMScheduler(), vae=make_vae()).save_pretrained(root / "dit")
    make_vae().save_pretrained(root / "vae")
    put(root / "others", *(f"{number}.png" for number in range(20)))
    return root


def commands_into(folder, checkpoints, digits):
    """The commands that processes share, by name, with their options."""
    data = ["--dataset_name", str(digits)]
    unet = ["--model_name_or_path", str(checkpoints / "unet"), *data]
    small = [*unet, *COUNTS, "--layers", "decoder", "--sigmas", 0.1, 0.5, "--batch_size", 7, "--num_views", 2]
    noisy = [*unet, *COUNTS, "--num_views", 2, "--num_train_epochs", 2, "--hidden_size", 16, "--sigmas", 0.1, 1]
    noisy += ["--wide_resnet", 1, "--wide_resnet_steps", 3, "--wide_resnet_batch_size", 16, "--batch_size", 7]
    latent = ["--model_name_or_path", str(checkpoints / "dit"), *data, *COUNTS, "--sigmas", 0.3, "--batch_size", 7]
    latent += ["--num_views", 2, "--finetune", "{max_train_steps: 2, train_batch_size: 8}", "--encode_batch_size", 7]
    online = [*unet, *COUNTS, "--protocol", "batch_norm", "--num_train_epochs", 2, "--train_batch_size", 16]
    online += ["--layers", "decoder", "--sigmas", 0.1, "--batch_size", 7]
    encode = ["--vae", str(checkpoints / "vae"), *data, "--max_samples", 40, "--mirror", "--sample_posterior"]
    told = ["--model_name_or_path", str(checkpoints / "told"), *data, "--max_samples", 30, "--stage_draws", 2, 6]
    told += ["--stage_classes", 4, 1, "--image_sigmas", 0, 0.5, "--batch_size", 70]
    outliers = [*unet, *COUNTS, "--outside", str(checkpoints / "others"), "--error_sigmas", 0.2, 1, "--num_draws", 2]
    outliers += ["--scores", "error", "nearest", "--neighbour", 4, "--layer", "mid_block", "--batch_size", 7]
    export = [*unet, "--max_samples", 40, "--sigma", 0.3, "--batch_size", 7, "--format", "npy"]
    small += ["--random_flip", "--knn", "--baselines", "--few_labels", 2, "--num_noise_seeds", 2, "--fuse", 2]
    found = [
        ("sweep", small),
        ("probe", online),
        ("export", export),
        ("noisy", [*noisy, "--random_crop", 1, "--random_flip"]),
        ("encode", [*encode, "--batch_size", 7, "--resolution", 16]),
        ("transfer", latent),
        ("diffusion-classifier", told),
        ("outliers", outliers),
    ]
    return [(name, [*options, "--output_dir", str(folder / name)]) for name, options in found]


def launch(folder, shared):
    """Run commands on two processes, one after the other, and return what ran them."""
    (folder / "run.py").write_text(RUN)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [str(ROOT / "examples" / "accelerate_configs" / "two_cpu_processes.yaml"), str(folder / "run.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = json.dumps([(name, [str(option) for option in options]) for name, options in shared])
    return subprocess.run([*command, words], env=environment, cwd=folder, capture_output=True, text=True, timeout=250)


@pytest.fixture(scope="module")
def folders(checkpoints, digits, tmp_path_factory):
    """Folders of the commands' files, of one process and of two, of which one process had begun the first."""
    root = tmp_path_factory.mktemp("many")
    alone, shared = (commands_into(root / name, checkpoints, digits) for name in ("one", "two"))
    for name, options in alone:
        commands.run(name, *options)
    name, options = shared[0]
    commands.run(name, *options, "--sigmas", 0.5)
    done = launch(root, shared)
    assert done.returncode == 0, done.stderr[-4000:]
    return root / "one", root / "two", done.stdout


TIMES = {"seconds", "seconds_this_run", "train_seconds", "images_per_second", "options", "threads", "processes"}


def figures(path):
    """The figures of a report, without those that tell times."""

    def numbers(value, where):
        if isinstance(value, dict):
            for name in value.keys() - TIMES:
                yield from numbers(value[name], (*where, name))
        elif isinstance(value, list):
            for place, each in enumerate(value):
                yield from numbers(each, (*where, place))
        elif isinstance(value, float):
            yield where, value

    return dict(numbers(json.loads(path.read_text()), ()))


@pytest.mark.parametrize("name", ["sweep", "probe", "noisy", "transfer", "diffusion-classifier", "outliers"])
def test_figures_are_those_of_one_process(folders, name):
    one, two, _ = folders
    reports = sorted((one / name).rglob("eval_results.json"))
    assert len(reports) == {"transfer": 3, "sweep": 2}.get(name, 1)
    for path in (path for path in reports if path.parent.name != "finetuned"):  # whose batches are twice as large
        expected, found = figures(path), figures(two / path.relative_to(one))
        assert expected.keys() == found.keys() and len(expected) > 3
        for figure, value in expected.items():
            assert found[figure] == pytest.approx(value, rel=1e-3, abs=1e-4), (path, figure)


def test_features_and_latents_are_those_of_one_process(folders):
    one, two, _ = folders
    files = sorted(path.relative_to(one) for path in one.rglob("*.npy"))
    assert {path.parts[0] for path in files} == SHARED
    assert set(files) <= {path.relative_to(two) for path in two.rglob("*.npy")}
    for path in files:
        expected, found = np.load(one / path), np.load(two / path)
        np.testing.assert_allclose(found.astype(float), expected.astype(float), rtol=1e-3, atol=2e-3, err_msg=str(path))
    folder = LatentFolder(two / "encode")
    assert folder.missing_bytes() == 0 and len(folder.latents("train", 1)) == 40


def test_every_process_computes_its_share_and_the_first_alone_prints(folders):
    _, two, printed = folders
    for name in SHARED:
        files = (two.parent / f"shares-of-{name}-{number}.json" for number in (0, 1))
        first, second = (json.loads(file.read_text()) for file in files)
        trainings = first.pop("trainings"), second.pop("trainings")
        assert (trainings[0] > 0) == (name in ("noisy", "probe")) and trainings[1] == 0  # nobody trains the same again
        assert first.keys() == second.keys() and first
        assert all(abs(first[task] - second[task]) <= first[task] / 2 for task in first), (name, first, second)
    assert printed.count("The classifier is in") == 2 and printed.count("Features of 40 images") == 1


def test_a_run_of_checkpoints_has_the_figures_of_one_process(checkpoints, digits, tmp_path):
    for step in (10, 20):
        unet = make_unet(seed=step, in_channels=1, out_channels=1)
        DDAEPipeline.for_denoiser(unet, DDIMScheduler()).save_pretrained(tmp_path / "run" / f"checkpoint-{step}")
    options = ["--checkpoints", str(tmp_path / "run"), "--dataset_name", str(digits), *COUNTS, "--batch_size", 7]
    options += ["--layers", "mid_block", "--sigmas", 0.1, "--num_noise_seeds", 1, "--num_inference_steps", 2]
    options += ["--extractor", f"ddae:{checkpoints / 'unet'}", "--num_images", 70]  # in two batches
    folders = [tmp_path / "one", tmp_path / "two"]
    commands.run("sweep", *options, "--output_dir", folders[0])
    done = launch(tmp_path, [("sweep", [*options, "--output_dir", str(folders[1])])])
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("Pictures and every figure are in") == 1
    for report in ("training_curve.json", "checkpoint-10/eval_results.json", "checkpoint-20/eval_results.json"):
        expected, found = (figures(folder / report) for folder in folders)
        assert expected.keys() == found.keys() and len(expected) > 3
        for figure, value in expected.items():
            assert found[figure] == pytest.approx(value, rel=1e-3, abs=1e-4), (report, figure)
    files = [{path.relative_to(folder) for path in folder.rglob("*") if path.is_file()} for folder in folders]
    assert files[0] == files[1]
    first, second = (json.loads((tmp_path / f"shares-of-sweep-{number}.json").read_text()) for number in (0, 1))
    assert first["loss"] == 2 * 3 and second["loss"] == 2 * 2  # of five parts of each checkpoint's 30 images


def test_an_error_is_said_once(checkpoints, digits, tmp_path):
    _, options = commands_into(tmp_path, checkpoints, digits)[2]
    done = launch(tmp_path, [("export", [*options, "--layers", "nowhere"])])
    assert done.returncode != 0 and done.stderr.count("nowhere") == 1
