"""What experiments leave is pushed to a Hub, over HTTP, with the real client, by scripts and by hand."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from diffusers import DDPMScheduler
from huggingface_hub import ModelCard

from ddae_hf import DDAEPipeline
from ddae_hf.experiments import publishing
from ddae_hf.experiments.model_card import save_card
from ddae_hf.experiments.publishing import HubOptions, prepare, publish
from ddae_hf.experiments.results import Report

from . import commands
from .conftest import make_unet
from .hub_server import HubServer, run_client

TINY = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": [32], "layers_per_block": 1}
TINY |= {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
COMMANDS = """
from tests import commands
for command, options in {}:
    commands.run(command, *options)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with HubServer(tmp_path_factory.mktemp("objects")) as server:
        yield server


@pytest.fixture(scope="module")
def pushed(server, digits, tmp_path_factory):
    """All scripts, one after the other: the classifiers are of the network that the first has pushed."""
    root = tmp_path_factory.mktemp("runs")
    data = ["--dataset_name", str(digits), "--max_train_samples", "120", "--push_to_hub"]
    probed = [*data, "--model_name_or_path", "tester/denoiser", "--max_test_samples", "50"]
    options = ["--denoiser", json.dumps(TINY), "--train_batch_size", "16", "--num_samples", "4", "--license", "mit"]
    options += ["--max_train_steps", "2", "--checkpointing_steps", "1", "--num_inference_steps", "2"]
    tuned = ["--max_train_steps", "1", "--hub_model_id", "tester/other-name"]
    jobs = [
        ("pretrain", [*data, *options, "--hub_private", "--output_dir", str(root / "denoiser")]),
        ("probe", [*probed, "--output_dir", str(root / "probe"), "--sigmas", "0.1"]),
        ("sweep", [*probed, "--output_dir", str(root / "sweep"), "--sigmas", "0.1", "--num_noise_seeds", "1"]),
        ("finetune", [*probed, *tuned, "--output_dir", str(root / "tuned"), "--checkpointing_steps", "1"]),
    ]
    done = run_client(server, COMMANDS.format(jobs), cache=root / "home")
    assert done.returncode == 0, done.stderr
    return root, done.stdout


def files(server, name):
    return set(server.repositories[f"tester/{name}"].resolve("main").files)


def content(server, name, path):
    return (server.root / server.repositories[f"tester/{name}"].resolve("main").files[path].sha256).read_bytes()


def test_every_script_pushes_its_result_and_not_what_only_training_needs(pushed, server):
    root, printed = pushed
    assert server.repositories["tester/denoiser"].private and not server.repositories["tester/probe"].private
    assert {n.split("/")[0] for n in files(server, "denoiser")} == {
        *(".gitattributes", "README.md", "model_index.json", "unet", "scheduler", "samples"),
        *("training_options.yaml", "train_results.json", "preprocessor_config.json"),
    }
    beside = {"probe": "confusion.png", "sweep": "heat_map.png", "other-name": "training_options.yaml"}
    for name, own in beside.items():
        found = files(server, name)
        assert found >= {"README.md", "config.json", "preprocessor_config.json", "eval_results.json", own}
        assert not any(
            word in path for path in found for word in ("checkpoint-", "partial", "features", "levels", ".lock")
        )
        assert any(path.endswith(".safetensors") for path in found)
        assert f"{server.url}/tester/{name}" in printed
    weights = {("denoiser", "denoiser"): "unet/diffusion_pytorch_model.safetensors"}
    weights |= {("other-name", "tuned"): "model.safetensors"}
    for (name, folder), path in weights.items():
        assert content(server, name, path) == (root / folder / path).read_bytes()
    assert (root / "denoiser" / "checkpoint-2" / "state").is_dir() and (root / "tuned" / "checkpoint-1").is_dir()


def test_cards_tell_the_repository_and_the_network_it_began_with(pushed, server, tmp_path):
    root, _ = pushed
    card = ModelCard(content(server, "denoiser", "README.md").decode())
    assert card.data.license == "mit" and 'from_pretrained("tester/denoiser")' in card.text
    results = json.loads((root / "denoiser" / "train_results.json").read_text())
    assert results["dataset"]["num_images"] == 120 and results["hardware"]["cpu"] in card.text
    for name in ("probe", "sweep", "other-name"):
        card = ModelCard(content(server, name, "README.md").decode())
        assert card.data.base_model == "tester/denoiser" and f"tester/{name}" in card.text
        (tmp_path / "eval_results.json").write_bytes(content(server, name, "eval_results.json"))
        report = Report.read(tmp_path / "eval_results.json")
        assert report.dataset["test_split"] == "test" and report.seconds and report.versions["torch"]
        assert 0 < report.test_f1 <= 1 and f"{100 * report.test_f1:.2f}" in card.text


@pytest.fixture
def local(server, monkeypatch):
    """This process's client, set on the server."""
    monkeypatch.setattr(publishing.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(publishing.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(publishing, "HfApi", lambda: hub_api(endpoint=server.url))
    monkeypatch.setenv("HF_TOKEN", server.token)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


hub_api = publishing.HfApi


def options(**given):
    return HubOptions(push_to_hub=True, **given)


def save_pipeline(folder):
    DDAEPipeline.for_denoiser(make_unet(), DDPMScheduler()).save_pretrained(folder)


@pytest.mark.parametrize("command", ["pretrain", "probe", "sweep", "finetune"])
def test_what_cannot_be_pushed_is_refused_before_any_work(command, tmp_path, capsys):
    out = ["--output_dir", str(tmp_path / "out"), "--dataset_name", "x"]
    out += [] if command == "pretrain" else ["--model_name_or_path", "nowhere"]
    for options, message in (
        (["--hub_model_id", "a/b"], "hub_model_id is given without push_to_hub"),
        (["--hub_private"], "hub_private is given without push_to_hub"),
        (["--push_to_hub"], "HF_HUB_OFFLINE is set"),
    ):
        with pytest.raises(SystemExit) as stopped:
            commands.run(command, *out, *options)
        assert message in f"{stopped.value.code} {capsys.readouterr().err}"
    assert not (tmp_path / "out").exists()


def test_a_sweep_over_a_run_is_not_pushed():
    with pytest.raises(SystemExit, match="pushes one classifier"):
        commands.run("sweep", "--checkpoints", "runs/x", "--push_to_hub", "--dataset_name", "x")


def test_a_token_is_needed_and_must_be_good(local, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ValueError, match="the repository name cannot be written to"):
        prepare(options(), "runs/name")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(publishing.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="needs a token that may write: log in with `hf auth login`"):
        prepare(options(), "runs/name")


def test_repositories_that_do_not_fit_are_refused(local, server):
    hub = options(hub_model_id="open")
    assert prepare(hub, "runs/name") == hub.hub_model_id == "tester/open"
    assert not server.repositories["tester/open"].private
    assert prepare(hub, "runs/name") == "tester/open"  # it may be there already
    assert prepare(options(), "runs/name") == "tester/name" and prepare(HubOptions(), "runs/name") is None
    with pytest.raises(ValueError, match="tester/open is there already, and public"):
        prepare(options(hub_model_id="open", hub_private=True), "runs/name")
    with pytest.raises(ValueError, match="the repository someone/else cannot be written to"):
        prepare(options(hub_model_id="someone/else"), "runs/name")
    with pytest.raises(ValueError, match="the repository a b cannot be written to"):
        prepare(options(hub_model_id="a b"), "runs/name")


def test_a_push_that_fails_says_how_to_push_and_that_works(local, server, tmp_path):
    folder = tmp_path / "a run"
    save_pipeline(folder)
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "model.safetensors").write_bytes(b"state")
    hub = options(hub_model_id="late")
    prepare(hub, folder)
    repository = server.repositories.pop("tester/late")
    with pytest.raises(ValueError) as failed:
        publish(hub, folder, "Push")
    assert f"{folder} is complete, but it was not pushed" in str(failed.value)
    server.repositories["tester/late"] = repository
    command = shlex.split(str(failed.value).splitlines()[-1])
    assert command[:4] == ["hf", "upload", "tester/late", str(folder)]
    environment = os.environ | {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "no_proxy": "127.0.0.1"}
    done = subprocess.run([Path(sys.executable).parent / "hf", *command[1:]], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    found = files(server, "late")
    assert "README.md" in found and "unet/config.json" in found and not any("checkpoint" in path for path in found)


def test_a_push_says_where_it_is(local, server, tmp_path, capsys):
    save_pipeline(tmp_path)
    hub = options(hub_model_id="said")
    prepare(hub, tmp_path)
    assert publish(hub, tmp_path, "Push").startswith(f"Pushed {tmp_path} to {server.url}/tester/said, commit ")
    assert capsys.readouterr().out == ""


def test_a_card_is_written_without_a_push_too(local, server, tmp_path):
    save_pipeline(tmp_path)
    before = len(server.requests)
    assert publish(HubOptions(license="mit"), tmp_path, "Nothing") is None
    written = yaml.safe_load((tmp_path / "README.md").read_text().split("---")[1])
    assert (written["library_name"], written["license"]) == ("diffusers", "mit")
    save_card(tmp_path)  # keeps what nothing but the card says
    assert yaml.safe_load((tmp_path / "README.md").read_text().split("---")[1]) == written
    assert len(server.requests) == before
    with pytest.raises(ValueError, match="is complete, but for its card: .* no checkpoint"):
        publish(HubOptions(), tmp_path / "scheduler", "Nothing")
