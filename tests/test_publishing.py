"""Cards of checkpoints that the scripts trained and measured, and pushes to a Hub, over HTTP, with the real client."""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDIMScheduler, DDPMScheduler, EDMEulerScheduler
from huggingface_hub import ModelCard, ModelCardData, parse_eval_result_entries
from huggingface_hub.repocard_data import model_index_to_eval_results
from threadpoolctl import threadpool_limits

from ddae_hf import DDAEModel, DDAEPipeline
from ddae_hf.experiments import make_card, publishing, save_card
from ddae_hf.experiments.publishing import HubOptions, prepare, publish
from ddae_hf.experiments.results import ProbeReport, Report

from . import commands
from .conftest import make_dit, make_unet
from .hub_server import HubServer, run_client

pytestmark = pytest.mark.filterwarnings("ignore:.*their covariance is singular")

NETWORK = """denoiser: {sample_size: 8, in_channels: 1, out_channels: 1, block_out_channels: [32, 32],
  layers_per_block: 1, down_block_types: [DownBlock2D, DownBlock2D], up_block_types: [UpBlock2D, UpBlock2D]}"""
# Sizes that are unlike each other, so that a number in a card has one place it can come from.
FEW = ["--max_train_samples", "211", "--max_test_samples", "97"]
TINY = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": [32], "layers_per_block": 1}
TINY |= {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
COMMANDS = """
from tests import commands
for command, options in {}:
    commands.run(command, *options)
"""


@pytest.fixture(scope="module")
def runs(digits, tmp_path_factory):
    """A pretraining, and every kind of evaluation of it."""
    root = tmp_path_factory.mktemp("runs")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small, more would wait for each other
    (root / "network.yaml").write_text(NETWORK)
    data, model = ["--dataset_name", str(digits)], ["--model_name_or_path", str(root / "pretrained")]

    def run(script, name, *options):
        with contextlib.redirect_stdout(io.StringIO()), threadpool_limits(1):
            commands.run(script, *options, *data, "--output_dir", root / name)

    short = ["--max_train_steps", "3", "--train_batch_size", "16", "--grid_images", "4", "--num_inference_steps", "2"]
    run("pretrain", "pretrained", "--config", str(root / "network.yaml"), *short, "--mixed_precision", "no")
    labels = ["--few_labels", "7", "--num_draws", "3", "--num_noise_seeds", "2"]
    run("probe", "probe", *model, *FEW, *labels, "--batch_size", "64", "--sigmas", "0.11", "0.23", "--baselines")
    run(
        "sweep",
        "sweep",
        *model,
        *FEW,
        "--batch_size",
        "64",
        "--layers",
        "mid_block",
        "up_blocks.0.resnets.0",
        "--sigmas",
        "0.31",
        "0.17",
    )
    run(
        "finetune",
        "tuned",
        *model,
        *FEW,
        "--train_batch_size",
        "64",
        "--max_train_steps",
        "2",
        "--learning_rate",
        "1e-3",
    )
    images = ["--num_images", "23", "--max_reference_samples", "61", "--num_inference_steps", "2"]
    run("evaluate", "generation", *model, *images, "--extractor", f"ddae:{root / 'pretrained'}")
    torch.set_num_threads(threads)
    return root


OTHERS = ("probe", "sweep", "tuned", "generation")


def numbers_of(value):
    """Every number of a file's content, the mean and spreads of its lists, and how many they hold."""
    if isinstance(value, dict):
        found = {n for key, inner in value.items() for n in numbers_of(inner) | numbers_in(str(key))}
        return found | numbers_of(list(value.values()))
    if isinstance(value, list):
        found = {n for inner in value for n in numbers_of(inner)} | {float(len(value))}
        if len(value) > 1 and all(isinstance(v, float) for v in value):
            found |= {float(np.mean(value)), float(np.std(value, ddof=1))}
        return found
    return numbers_in(value) if isinstance(value, str) else {float(value)} if value is not None else set()


def numbers_in(text):
    return {float(n.replace(",", "")) for n in re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?:e-?\d+)?(?![\w])", text)}


def prose(card):
    """What a reader sees of a card, but code, papers and their numbers."""
    papers = r"\(Xiang et al., ICCV 2023,|arXiv 2303.09769|arXiv 2502.05743"
    text = re.sub(rf"```.*?```|{papers}|\]\([^)]*\)", "", card.text, flags=re.DOTALL)
    return re.sub(r"`(?!ddae_hf)[\w.]*[a-z][\w.]*`", "", text)


def test_every_number_is_in_the_files_that_runs_left(runs):
    folders = [runs / name for name in ("pretrained", *OTHERS)]
    card = make_card(runs / "pretrained", results=folders[1:])
    files = [f for folder in folders for f in folder.glob("*") if f.suffix in (".json", ".yaml")]
    assert len(files) >= 7
    known = {n for f in files for n in numbers_of(yaml.safe_load(f.read_text()))}
    known |= {8.0, 1.0}  # the size and the channels of the network's images
    for probe in (ProbeReport.read(runs / name) for name in ("probe", "sweep")):
        for baseline in probe.baselines.values():  # gains are differences, draw by draw
            ours, theirs = (x.few_label_test_accuracies["7"] for x in (probe, baseline))
            known |= numbers_of(np.subtract(ours, theirs).tolist())
            if len(probe.test_accuracies) == len(baseline.test_accuracies):
                ours, theirs = (list(x.test_accuracies.values()) for x in (probe, baseline))
                known |= numbers_of(np.subtract(ours, theirs).tolist())
    known |= {-number for number in known}  # a minus stands apart from its number
    shown = numbers_in(prose(card))
    assert len(shown) > 40
    # As they are, in percent, in thousandths, or seconds in hours.
    for number in shown:
        scales = (1, 100, 1000, 1 / 3600)
        assert any(abs(number - k * scale) <= max(0.0051, 6e-4 * abs(number)) for k in known for scale in scales), (
            number
        )


def test_metadata_is_what_the_hub_reads(runs, tmp_path):
    folder = shutil.copytree(runs / "probe", tmp_path / "probe")
    save_card(folder, repo_id="someone/digits", dataset_id="someone/data", license="mit", base_model="someone/base")
    card = ModelCard.load(folder / "README.md")
    report = ProbeReport.read(folder)
    name, results = model_index_to_eval_results(card.data.to_dict()["model-index"])
    saved = report.saved_classifier_test_accuracy
    assert name == "digits" and [(r.metric_type, r.metric_value) for r in results] == [
        ("accuracy", saved),
        ("accuracy", report.test_accuracies["0"]),
        ("f1", report.test_f1),
    ]
    assert {(r.task_type, r.dataset_type, r.dataset_split) for r in results} == {
        ("image-classification", "someone/data", "test")
    }
    assert results[0].metric_args["sigma"] == report.best.sigma
    data = card.data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "image-classification", "mit")
    assert (data.datasets, data.metrics, data.base_model) == (["someone/data"], ["accuracy", "f1"], "someone/base")
    assert data.base_model_relation == "finetune"
    assert ModelCardData(**yaml.safe_load(data.to_yaml())).to_dict() == data.to_dict()
    (entry,) = parse_eval_result_entries(yaml.safe_load((folder / ".eval_results/linear_probe.yaml").read_text()))
    assert (entry.dataset_id, entry.value) == ("someone/data", saved) and "fixed noise" in entry.notes


def test_the_card_of_other_runs_takes_the_place_of_the_first(runs, tmp_path):
    folder = shutil.copytree(
        runs / "pretrained", tmp_path / "pretrained", ignore=shutil.ignore_patterns("checkpoint-*")
    )
    others = [runs / name for name in OTHERS]
    save_card(folder, results=others, repo_id="someone/digits", dataset_id="someone/data")
    text, entries = (folder / "README.md").read_text(), sorted(f.stem for f in (folder / ".eval_results").iterdir())
    assert entries == ["fine_tuning", "linear_probe"]
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert len(pictures) == 8 and all((folder / picture).is_file() for picture in pictures)
    assert str(runs) not in text and "/" + "tmp" not in text
    assert "frechet_distance" in ModelCard(text).data.metrics
    save_card(folder)
    assert (
        not list((folder / ".eval_results").iterdir())
        and "## Results\n\nNo evaluation" in (folder / "README.md").read_text()
    )


def test_without_results_there_are_no_figures(layouts):
    for layout in ("pipeline", "flat", "model"):
        card = make_card(layouts / layout)
        assert card.data.eval_results is None and card.data.metrics is None and card.data.datasets is None
        assert (card.data.library_name, card.data.pipeline_tag) == ("diffusers", "unconditional-image-generation")
        assert numbers_in(prose(card)) == {8.0, 3.0}
        assert "the card claims no figures" in card.text and "is not recorded" in card.text and "%" not in prose(card)


def test_facts_that_runs_add_are_shown(runs, digits, tmp_path):
    folder = shutil.copytree(
        runs / "pretrained", tmp_path / "pretrained", ignore=shutil.ignore_patterns("checkpoint-*")
    )
    results = json.loads((folder / "train_results.json").read_text())
    results |= {"dataset": {"id": "someone/digits", "name": "Digits", "num_images": 1437}, "images": 4242}
    results |= {
        "hardware": {"processor": "Some CPU", "cores": 2},
        "seconds": 7200,
        "base_model": "someone/before",
        "versions": {"torch": "9.8"},
    }
    (folder / "train_results.json").write_text(json.dumps(results))
    card = make_card(folder)
    assert make_card(runs / "tuned", results=[folder]).data.base_model is None  # it is the folder's own
    assert card.data.datasets == ["someone/digits"] and "on 1,437 images of Digits, split `train`," in card.text
    assert "| pretraining | hardware | processor Some CPU, cores 2 |" in card.text
    assert "| pretraining | time | 7,200 s, 2.00 h |" in card.text and "torch 9.8" in card.text and "4,242" in card.text
    assert card.data.base_model == "someone/before"
    del results["dataset"]
    (folder / "train_results.json").write_text(json.dumps(results))
    assert f"without labels on {digits.name}, split `train`, for" in make_card(folder).text  # not its whole path


def test_what_cannot_be_is_refused(runs, layouts, tmp_path):
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        make_card(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="not a checkpoint that ddae_hf can open"):
        make_card(tmp_path)
    with pytest.raises(ValueError, match="nothing is not a folder"):
        make_card(layouts / "flat", results=[tmp_path / "nothing"])
    with pytest.raises(ValueError, match="not a name"):
        make_card(layouts / "flat", repo_id="not a name")
    folder = shutil.copytree(layouts / "flat", tmp_path / "flat")
    for content, message in (
        ('{"eval_accuracy": 0.5}', "holds eval_accuracy: allowed are the results"),
        ("{", "cannot be read"),
    ):
        (folder / "eval_results.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            save_card(folder)
        assert not (folder / "README.md").exists()
    report = (runs / "probe" / "eval_results.json").read_text()
    twins = [shutil.copytree(runs / "probe", tmp_path / side / "probe") for side in ("left", "right")]
    assert make_card(layouts / "flat", results=twins).text.count("### Linear probe") == 1  # one is the other's copy
    (twins[1] / "eval_results.json").write_text(report.replace('"seconds"', '"took"'))
    with pytest.raises(ValueError, match="same name"):
        make_card(layouts / "flat", results=twins)


def test_pasted_code_runs(runs, tmp_path):
    folders = [runs / "pretrained", runs / "probe", runs / "tuned"]
    conditional = make_unet(num_class_embeds=5)
    for name, denoiser, scheduler, null_class in (
        ("edm", conditional, EDMEulerScheduler(), 4),
        ("dit", make_dit(), DDIMScheduler(), None),
        ("labels", conditional, DDIMScheduler(), None),
    ):
        DDAEPipeline.for_denoiser(denoiser, scheduler, null_class).save_pretrained(tmp_path / name)
        folders.append(tmp_path / name)
    folders[-1] = tmp_path / "features"
    DDAEModel.from_pretrained(tmp_path / "labels").save_pretrained(folders[-1])
    cards = [make_card(folder) for folder in folders]
    blocks = [re.findall(r"```python\n(.*?)```", card.text, re.DOTALL) for card in cards]
    assert [len(code) for code in blocks] == [3, 2, 1, 3, 3, 3]
    code = "\n".join(block for card in blocks for block in card)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("torch.Size([1, ") == 4 and len(re.findall(r"^\d: 0\.\d{3}$", done.stdout, re.M)) == 6


def test_a_card_is_deterministic_markdown(runs):
    card = make_card(runs / "tuned", results=[runs / "pretrained"])
    assert card.content == make_card(runs / "tuned", results=[runs / "pretrained", Path(runs / "tuned")]).content
    assert re.match(r"\n*# tuned\n\n!\[Images generated by", card.text)  # what it makes comes first
    assert card.text.count("pip install .") == 1 and "no longer generates" in card.text
    assert "Options of the fine-tuning" in card.text
    for table in re.findall(r"(?:^\|.*\n)+", card.text, re.M):
        assert len({line.count("|") for line in table.splitlines()}) == 1
    assert "\n\n\n" not in card.text and "{{" not in card.text and "{%" not in card.text and "None" not in card.text


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
    options = ["--denoiser", json.dumps(TINY), "--train_batch_size", "16", "--grid_images", "4", "--license", "mit"]
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
    kept = ("checkpoint-", "raw/", "features/", "levels/")  # all else that the runs wrote is pushed
    for name, folder in {
        "denoiser": "denoiser",
        "probe": "probe",
        "sweep": "sweep/classifier",
        "other-name": "tuned",
    }.items():
        local = {str(path.relative_to(root / folder)) for path in (root / folder).rglob("*") if path.is_file()}
        wanted = {path for path in local if not path.startswith(kept) and not path.endswith(".lock")}
        assert files(server, name) - {".gitattributes"} == wanted
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
    with pytest.raises(ValueError, match="tester/open exists already, and is public"):
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


def test_a_push_says_where_it_is_and_takes_nothing_that_no_run_wrote(local, server, tmp_path, capsys):
    save_pipeline(tmp_path)
    for name in (
        *(".env", "notes.txt", "unet/token.json", "model.pt", "photo.png", "checkpoint-3/config.json"),
        *("private/config.json", "model.safetensors.bak", "old/raw/config.json", "samples/step-1/private.png"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine alone")
    hub = options(hub_model_id="said")
    prepare(hub, tmp_path)
    assert publish(hub, tmp_path, "Push").startswith(f"Pushed {tmp_path} to {server.url}/tester/said, commit ")
    assert capsys.readouterr().out == ""
    network = {"unet/config.json", "unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"}
    assert files(server, "said") - {".gitattributes"} == network | {"README.md", "model_index.json"}


def test_a_card_is_written_without_a_push_too(local, server, tmp_path):
    save_pipeline(tmp_path)
    before = len(server.requests)
    assert publish(HubOptions(license="mit"), tmp_path, "Nothing") is None
    written = yaml.safe_load((tmp_path / "README.md").read_text().split("---")[1])
    assert (written["library_name"], written["license"]) == ("diffusers", "mit")
    save_card(tmp_path)  # keeps what nothing but the card says
    assert yaml.safe_load((tmp_path / "README.md").read_text().split("---")[1]) == written
    assert len(server.requests) == before
    with pytest.raises(ValueError, match="is complete, except for its card: .* not a checkpoint"):
        publish(HubOptions(), tmp_path / "scheduler", "Nothing")
