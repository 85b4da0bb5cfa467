"""What is pushed to a Hub opens from it: over HTTP, with huggingface_hub's own client, in processes of their own."""

import inspect
import json
import shutil
import urllib.request
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import save_file

from ddae_hf import DDAEForImageClassification, DDAEPipeline
from ddae_hf.weights import head_metadata

from .conftest import make_unet
from .hub_server import HubServer, run_client
from .stock import pixart, stable_diffusion, stable_diffusion_xl

pytestmark = pytest.mark.hub
GENERATORS = ["pipeline", "model", "flat", "bare"]
CLASSIFIERS = ["classifier", "both", "shared", "head", "head-then-whole", "whole-then-head", "of-a-variant"]
FLAT_WEIGHTS = "diffusion_pytorch_model.safetensors"
# Small pieces, so that a small file is written to disk in several, as a large one is.
SMALL_PIECES = "from huggingface_hub import constants\nconstants.DOWNLOAD_CHUNK_SIZE = 2**14\n"


def publish(folders):
    """Push to several repositories, and to one twice; return the ids of its two commits."""
    import torch
    from huggingface_hub import HfApi

    from ddae_hf import DDAEForImageClassification, DDAEImageProcessor, DDAEModel, DDAEPipeline

    api = HfApi()
    pipeline = DDAEPipeline.from_pretrained(f"{folders}/pipeline")
    classifier = DDAEForImageClassification.from_pretrained(f"{folders}/classifier")
    processor = DDAEImageProcessor.from_pretrained(f"{folders}/pipeline")
    first = pipeline.push_to_hub("pipeline").oid
    api.create_tag("tester/pipeline", tag="v1")
    api.create_branch("tester/pipeline", branch="before/second")
    second = DDAEPipeline.from_pretrained(f"{folders}/second").push_to_hub("pipeline").oid
    DDAEModel.from_pretrained(f"{folders}/pipeline").push_to_hub("model")
    pipeline.push_to_hub("both")
    for repository in "classifier", "both":
        classifier.push_to_hub(repository)
        processor.push_to_hub(repository)
    classifier.push_to_hub("secret", private=True)
    pipeline.save_pretrained(f"{folders}/shared")
    classifier.save_head(f"{folders}/shared")
    classifier.save_head(f"{folders}/head", base="tester/pipeline", revision="v1")
    for name in "shared", "head":
        processor.save_pretrained(f"{folders}/{name}")
    for name in "flat", "bare", "shared", "head":
        api.upload_folder(repo_id=api.create_repo(name).repo_id, folder_path=f"{folders}/{name}")
    # One over the other: the files of both stay in the repository.
    tuned = DDAEForImageClassification.from_pretrained(f"{folders}/classifier")
    torch.nn.init.normal_(tuned.ddae.denoiser.conv_in.weight)
    tuned.save_pretrained(f"{folders}/tuned")
    processor.save_pretrained(f"{folders}/tuned")
    for name, order in {"head-then-whole": ("head", "tuned"), "whole-then-head": ("tuned", "head")}.items():
        for folder in order:
            api.upload_folder(repo_id=api.create_repo(name, exist_ok=True).repo_id, folder_path=f"{folders}/{folder}")
    # A classifier on one of its base's variants.
    DDAEPipeline.from_pretrained(f"{folders}/second").push_to_hub("variants")
    pipeline.push_to_hub("variants", variant="ema")
    classifier.save_head(f"{folders}/of-a-variant", base="tester/variants", variant="ema")
    processor.save_pretrained(f"{folders}/of-a-variant")
    api.upload_folder(repo_id=api.create_repo("of-a-variant").repo_id, folder_path=f"{folders}/of-a-variant")
    classifier.save_pretrained(f"{folders}/code", push_to_hub=True, repo_id="tester/code", include_code=True)
    processor.save_pretrained(f"{folders}/code", push_to_hub=True, repo_id="tester/code", include_code=True)
    pipeline.save_pretrained(f"{folders}/drawing", push_to_hub=True, repo_id="tester/drawing", include_code=True)
    train(classifier, processor, f"{folders}/trained")
    return [first, second]


def train(model, processor, folder):
    """Let transformers' Trainer train and push."""
    import torch
    from transformers import Trainer, TrainingArguments

    options = {"max_steps": 1, "push_to_hub": True, "hub_model_id": "tester/trained", "report_to": []}
    data = [{"pixel_values": torch.zeros(3, 8, 8), "labels": i % 2} for i in range(4)]
    arguments = TrainingArguments(folder, use_cpu=True, disable_tqdm=True, logging_strategy="no", **options)
    trainer = Trainer(model, arguments, train_dataset=data, processing_class=processor)
    trainer.train()
    trainer.push_to_hub()


def without_the_package():
    """Open repositories that carry their code where importing `ddae_hf` fails."""
    import sys

    sys.modules["ddae_hf"] = None
    import torch
    from diffusers import DiffusionPipeline
    from transformers import AutoModelForImageClassification
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    def refusal(auto, path, **options):
        try:
            return str(auto.from_pretrained(path, **options))
        except ValueError as error:
            return str(error)

    found = {
        "refusals": [
            refusal(AutoModelForImageClassification, "tester/code", trust_remote_code=False),
            refusal(AutoImageProcessor, "tester/code", trust_remote_code=False),
            refusal(DiffusionPipeline, "tester/drawing", custom_pipeline="pipeline"),
        ],
        "executed": [name for name in sys.modules if name.endswith(("ing_ddae", "ion_ddae", "pipeline_ddae"))],
    }
    model = AutoModelForImageClassification.from_pretrained("tester/code", trust_remote_code=True)
    found["answer"] = model(torch.zeros(1, 3, 8, 8)).logits.tolist()
    processor = AutoImageProcessor.from_pretrained("tester/code", trust_remote_code=True)
    found["processor"] = [type(processor).__name__, processor.size["height"]]
    remote = {"custom_pipeline": "pipeline", "trust_remote_code": True}
    pipeline = DiffusionPipeline.from_pretrained("tester/drawing", **remote)
    options = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": 2, "output_type": "pt"}
    found["images"] = pipeline(1, **options).images.flatten().tolist()
    return found


def publish_texts(folders):
    """Push stock pipelines, and a classifier on one, over whose base other weights are pushed then."""
    import shutil

    from huggingface_hub import HfApi

    from ddae_hf import DDAEForImageClassification

    api = HfApi()
    for name in "sd", "xl", "sigma":
        api.upload_folder(repo_id=api.create_repo(name).repo_id, folder_path=f"{folders}/{name}")
    api.create_tag("tester/sd", tag="v1")
    model = DDAEForImageClassification.from_pretrained("tester/sd", num_labels=3, prompt="a cat", sigma=0.3)
    model.save_head(f"{folders}/told", base="tester/sd")
    shutil.copytree(f"{folders}/sd", f"{folders}/beside")
    model.save_head(f"{folders}/beside")
    for name in "told", "beside":
        api.upload_folder(repo_id=api.create_repo(name).repo_id, folder_path=f"{folders}/{name}")
    api.upload_folder(repo_id="tester/sd", folder_path=f"{folders}/later")
    return answer_to_ramp(model)


def answer_to_ramp(model):
    """Return what a model answers to an image of 16 x 16 pixels."""
    import torch

    with torch.no_grad():
        found = model.eval()(torch.linspace(-1, 1, 768).reshape(1, 3, 16, 16))
    return (found.logits if "logits" in found else found.pooler_output).flatten().tolist()


def told(path, classify=False, **options):
    """Return what a model that is told a text answers."""
    from ddae_hf import DDAEForImageClassification, DDAEModel

    return answer_to_ramp((DDAEForImageClassification if classify else DDAEModel).from_pretrained(path, **options))


def described(path):
    """Return what the configuration of a pipeline with text encoders and its processor say."""
    from ddae_hf import DDAEConfig, DDAEImageProcessor

    config = DDAEConfig.from_pretrained(path)
    return [config.scheduler["_class_name"], DDAEImageProcessor.from_pretrained(path).size["height"]]


def sampled(path):
    """Return why a pipeline does not open."""
    from ddae_hf import DDAEPipeline

    try:
        return str(DDAEPipeline.from_pretrained(path))
    except ValueError as error:
        return str(error)


def look(path, images, classify=False, **hub):
    """Open everything that a checkpoint holds, and return what it says of itself and answers."""
    import torch
    from safetensors.torch import load_file

    from ddae_hf import DDAEConfig, DDAEForImageClassification, DDAEImageProcessor, DDAEModel, DDAEPipeline
    from ddae_hf.weights import fingerprint

    pixel_values = load_file(images)["images"]
    pipeline = DDAEPipeline.from_pretrained(path, **hub)
    generator = torch.Generator().manual_seed(0)
    generated = pipeline(2, generator=generator, num_inference_steps=2, output_type="pt").images
    model = (DDAEForImageClassification if classify else DDAEModel).from_pretrained(path, **hub)
    with torch.no_grad():
        answer = model(pixel_values)
    network = model.ddae.denoiser if classify else model.denoiser
    config = DDAEConfig.from_pretrained(path, **hub)
    return {
        "weights": [fingerprint(pipeline.denoiser), fingerprint(network)],
        "schedulers": [type(pipeline.scheduler).__name__, config.scheduler["_class_name"]],
        "sizes": [config.image_size[0], DDAEImageProcessor.from_pretrained(path, **hub).size["height"]],
        "labels": model.config.id2label,
        "generated": generated.flatten().tolist(),
        "answer": (answer.logits if classify else answer.pooler_output).flatten().tolist(),
    }


def stock(path):
    """Return what diffusers' own pipeline generates."""
    import torch
    from diffusers import DDPMPipeline

    pipeline = DDPMPipeline.from_pretrained(path)
    images = pipeline(generator=torch.Generator().manual_seed(0), num_inference_steps=2, output_type="np").images
    return images.flatten().tolist()


def backbone(path):
    """Return what the Auto class of backbones makes of a repository."""
    from transformers import AutoBackbone

    import ddae_hf  # noqa: F401 (which registers it)

    model = AutoBackbone.from_pretrained(path, out_features=["mid_block"])
    return [type(model).__name__, model.channels]


def weights(path, **hub):
    """Return the fingerprints of the generator and of the model in a repository."""
    from ddae_hf import DDAEModel, DDAEPipeline
    from ddae_hf.weights import fingerprint

    opened = DDAEPipeline.from_pretrained(path, **hub), DDAEModel.from_pretrained(path, **hub)
    return [fingerprint(each.denoiser) for each in opened]


def refusals(path, **hub):
    """Return the messages with which everything refuses to open."""
    from ddae_hf import DDAEConfig, DDAEForImageClassification, DDAEImageProcessor, DDAEModel, DDAEPipeline

    messages = []
    for cls in DDAEConfig, DDAEForImageClassification, DDAEImageProcessor, DDAEModel, DDAEPipeline:
        try:
            cls.from_pretrained(path, **hub)
        except (OSError, ValueError) as error:
            messages.append(str(error))
        else:
            messages.append(f"{cls.__name__} opened")
    return messages


def die_downloading(repository, files):
    """Download files, and end this process, as a power cut would, when a part of the last one has arrived."""
    import os
    import threading
    import time
    from pathlib import Path

    from huggingface_hub import hf_hub_download

    def watch():
        while not any(part.stat().st_size for part in Path(os.environ["HF_HOME"]).rglob("*.incomplete")):
            time.sleep(0.01)
        os._exit(3)

    for file in files[:-1]:
        hf_hub_download(repository, file)
    threading.Thread(target=watch, daemon=True).start()
    hf_hub_download(repository, files[-1])


def answer(process):
    """Return what a client's process printed last."""
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.splitlines()[-1])


def program(call, *functions):
    """Return a program that prints the value of `call`, an expression of these functions."""
    return "\n".join(map(inspect.getsource, functions)) + f"\nimport json\nprint(json.dumps({call}))\n"


def ask(hub, questions, **options):
    """Return the values that these expressions have for a client, and what it asked the Hub for."""
    before = len(hub.server.requests)
    call = "{" + ", ".join(f"{name!r}: {question}" for name, question in questions.items()) + "}"
    code = SMALL_PIECES + program(
        call, look, stock, backbone, weights, refusals, answer_to_ramp, told, described, sampled
    )
    found = answer(run_client(hub.server, code, OMP_NUM_THREADS="1", **options))
    return found | {"requests": hub.server.requests[before:]}


@pytest.fixture(scope="module")
def hub(tmp_path_factory, layouts):
    """A Hub to which a signed-in user has pushed, and the folders from which she did."""
    root = tmp_path_factory.mktemp("hub")
    folders = root / "folders"
    for name, layout in {"pipeline": "pipeline", "flat": "flat", "bare": "model"}.items():
        shutil.copytree(layouts / layout, folders / name)
    DDAEPipeline(make_unet(seed=1), DDIMScheduler()).save_pretrained(folders / "second")
    torch.manual_seed(0)
    names = {"id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}}
    classifier = DDAEForImageClassification.from_pretrained(layouts / "pipeline", sigma=0.1, layer="mid_block", **names)
    classifier.save_pretrained(folders / "classifier")
    generator = torch.Generator().manual_seed(1)
    save_file({"images": torch.rand(5, 3, 8, 8, generator=generator) * 2 - 1}, root / "images.safetensors")
    (root / "server").mkdir()
    with HubServer(root / "server") as server:
        code = program(f"publish({str(folders)!r})", publish, train)
        commits = answer(run_client(server, code, cache=root / "publisher", OMP_NUM_THREADS="1"))
        images = str(root / "images.safetensors")
        names = GENERATORS + CLASSIFIERS
        everything = f"{{n: look('tester/' + n, {images!r}, n in {CLASSIFIERS}) for n in {names}}}"
        yield SimpleNamespace(
            server=server, root=root, folders=folders, images=images, commits=commits, everything=everything
        )


@pytest.fixture(scope="module")
def killed(hub):
    """The cache of a client that died in the middle of the weights, and a copy of it."""
    cache = hub.root / "killed"
    files = ["model_index.json", "config.json", "scheduler_config.json", FLAT_WEIGHTS]
    code = SMALL_PIECES + program(f"die_downloading('tester/flat', {files})", die_downloading)
    hub.server.cut_downloads_after = 100_000
    process = run_client(hub.server, code, cache=cache)
    assert process.returncode == 3, process.stderr
    hub.server.cut_downloads_after = None
    shutil.copytree(cache, hub.root / "killed_copy", symlinks=True)
    return cache


@pytest.fixture(scope="module")
def opened(hub, killed):
    """What another user, who is not signed in, finds; her first download of weights is interrupted."""
    questions = {
        "interrupted": "weights('tester/model')",
        "all": hub.everything,
        "stock": "stock('tester/pipeline')",
        "trained": f"look('tester/trained', {hub.images!r}, True)",
        "backbone": "backbone('tester/trained')",
        "revisions": f"[weights('tester/pipeline', revision=r) for r in ({hub.commits[0]!r}, 'v1', 'before/second')]",
        "unknown revision": "refusals('tester/pipeline', revision='v2')",
        "private": "refusals('tester/secret')",
        "private with a token": f"look('tester/secret', {hub.images!r}, True, token={hub.server.token!r})",
        "after a kill": f"look('tester/flat', {hub.images!r}, cache_dir={str(killed / 'hub')!r})",
    }
    hub.server.cut_downloads_after = 100_000
    return ask(hub, questions, token=False, cache=hub.root / "reader") | {"cut": hub.server.cut_downloads_after is None}


@pytest.fixture(scope="module")
def offline(hub, opened):
    """What the same user finds without a network."""
    questions = {
        "all": hub.everything,
        "revision": "weights('tester/pipeline', revision='v1')",
        "elsewhere": "refusals('tester/elsewhere')",
        "unknown revision": "refusals('tester/pipeline', revision='v2')",
        "after a kill": f"refusals('tester/flat', cache_dir={str(hub.root / 'killed_copy' / 'hub')!r})",
    }
    return ask(hub, questions, token=False, cache=hub.root / "reader", offline=True)


@pytest.fixture(scope="module")
def local(hub):
    """What the folders hold that were pushed, by the repository's name."""
    classifiers = {**dict.fromkeys(CLASSIFIERS, "classifier"), "head-then-whole": "tuned"}
    pushed_from = {"pipeline": "second", "model": "pipeline", **classifiers}
    names = [*GENERATORS, *CLASSIFIERS]
    folders = {name: str(hub.folders / pushed_from.get(name, name)) for name in names}
    return {name: look(folder, hub.images, name in CLASSIFIERS) for name, folder in folders.items()}


def assert_same(found, expected):
    expected = json.loads(json.dumps(expected))
    for name in "weights", "schedulers", "sizes", "labels":
        assert found[name] == expected[name]
    for name in "generated", "answer":
        assert found[name] == pytest.approx(expected[name], abs=1e-5)


def test_what_is_compared_differs_between_the_checkpoints(local):
    assert local["classifier"]["labels"] == {0: "cat", 1: "dog"}
    for name in "weights", "generated", "answer":
        assert local["pipeline"][name] != local["model"][name]
        assert local["head-then-whole"][name] != local["whole-then-head"][name]


@pytest.mark.parametrize("repository", GENERATORS + CLASSIFIERS)
def test_what_was_pushed_opens_as_it_was(opened, local, repository):
    assert_same(opened["all"][repository], local[repository])


def test_weights_are_in_one_repository_once(hub):
    """A head names the commit of its base, whatever the name of the revision was, and the base has moved on since."""
    assert head_metadata(str(hub.folders / "head" / "head.safetensors"))["revision"] == hub.commits[0]
    sizes = {name: sum(f.stat().st_size for f in (hub.folders / name).rglob("*")) for name in ("head", "shared")}
    assert sizes["head"] < 8192 and sizes["shared"] < 1.05 * (hub.folders / "flat" / FLAT_WEIGHTS).stat().st_size


def test_diffusers_own_pipeline_opens_what_was_pushed(opened, hub):
    assert opened["stock"] == pytest.approx(stock(str(hub.folders / "second")), abs=1e-5)


def test_trainer_pushes_what_it_trained(opened, hub):
    """The network is no longer the one that it began with, and a backbone opens it as well."""
    folder = str(hub.folders / "trained")
    assert_same(opened["trained"], look(folder, hub.images, True))
    assert opened["trained"]["weights"] != look(str(hub.folders / "classifier"), hub.images, True)["weights"]
    assert opened["backbone"] == ["DDAEBackbone", [64]]


@pytest.mark.slow  # `test_compatibility.py` opens code that travels in folders
def test_code_travels_to_where_the_package_is_not_installed(hub):
    """It runs for those who trust it, and for nobody else."""
    client = {"cache": hub.root / "stranger", "token": False, "OMP_NUM_THREADS": "1"}
    found = answer(run_client(hub.server, program("without_the_package()", without_the_package), **client))
    for message in found["refusals"]:
        assert "trust_remote_code=True" in message
    assert not found["executed"]
    model = DDAEForImageClassification.from_pretrained(hub.folders / "classifier")
    expected = model(torch.zeros(1, 3, 8, 8)).logits
    torch.testing.assert_close(torch.tensor(found["answer"]), expected, rtol=1e-4, atol=1e-5)
    assert found["processor"] == ["DDAEImageProcessor", 8]
    options = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": 2, "output_type": "pt"}
    images = DDAEPipeline.from_pretrained(hub.folders / "pipeline")(1, **options).images
    assert found["images"] == pytest.approx(images.flatten().tolist(), abs=1e-5)


def test_a_commit_a_tag_and_a_branch_give_the_weights_of_their_time(opened, local, hub):
    # The first commit pushed the network of "model", the second, which is on main, another one.
    first, second = local["model"]["weights"], local["pipeline"]["weights"]
    assert opened["revisions"] == [first] * 3
    assert opened["all"]["pipeline"]["weights"] == second != first
    pushed = [commit.id for commit in hub.server.repositories["tester/pipeline"].history("main")]
    assert pushed[:2] == hub.commits[::-1]


def test_an_unknown_revision_is_named(opened):
    assert len(opened["unknown revision"]) == 5
    for message in opened["unknown revision"]:
        assert "v2 is not a valid git identifier" in message and "tester/pipeline" in message


def test_a_private_repository_opens_with_a_token_only(opened, local):
    assert_same(opened["private with a token"], local["classifier"])
    assert len(opened["private"]) == 5
    for message in opened["private"]:
        assert message.startswith("tester/secret is not") and "token" in message


def test_a_dropped_connection_is_taken_up_again(opened, local):
    assert opened["interrupted"] == local["model"]["weights"]
    weights = [path for method, path in opened["requests"] if method == "GET" and path.endswith(".safetensors")]
    assert opened["cut"] and weights[0] == weights[1] != weights[2]


def test_the_server_sends_the_range_that_is_asked_for(hub):
    url = f"{hub.server.url}/tester/flat/resolve/main/{FLAT_WEIGHTS}"
    whole = (hub.folders / "flat" / FLAT_WEIGHTS).read_bytes()
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Range": "bytes=100000-"})) as reply:
        assert reply.status == 206 and reply.read() == whole[100_000:]


def test_half_a_file_is_never_opened(hub, killed, opened, offline, local):
    """A client died in the middle of the weights: the next call completes them, and without a network it refuses."""
    copy = hub.root / "killed_copy"
    parts = [part.stat().st_size for part in copy.rglob("*.incomplete")]
    assert len(parts) == 1 and 0 < parts[0] <= 100_000
    assert not list(copy.rglob("*.safetensors")) and len(list(killed.rglob("*.safetensors"))) == 1
    assert_same(opened["after a kill"], local["flat"])
    messages = offline["after a kill"]
    assert [message.endswith("opened") for message in messages] == [True, False, True, False, False]
    assert all("flat" in message and FLAT_WEIGHTS in message for message in messages if not message.endswith("opened"))


@pytest.mark.parametrize("repository", GENERATORS + CLASSIFIERS)
def test_what_was_opened_once_opens_without_a_network(offline, local, repository):
    assert_same(offline["all"][repository], local[repository])
    assert not offline["requests"]


def test_without_a_network_what_is_not_in_the_cache_is_refused(offline, local):
    assert offline["revision"] == local["model"]["weights"]
    for name in "elsewhere", "unknown revision":
        assert len(offline[name]) == 5
        for message in offline[name]:
            assert "the Hub is not asked in offline mode" in message


UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
OF_TEXTS = ("text_encoder", "tokenizer")


@pytest.fixture(scope="module")
def stock_hub(tmp_path_factory):
    """A Hub with stock pipelines, one of which has parts that nobody needs, and with classifiers on it."""
    root = tmp_path_factory.mktemp("stock_hub")
    folders = root / "folders"
    stable_diffusion(folders / "sd")
    extras = {name: ["stable_diffusion", "StableDiffusionSafetyChecker"] for name in UNUSED}
    index = folders / "sd" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | extras))
    for name in UNUSED:
        (folders / "sd" / name).mkdir()
        (folders / "sd" / name / "config.json").write_bytes(b"")
    stable_diffusion_xl(folders / "xl").save_pretrained(folders / "xl", variant="fp16")
    pixart(folders / "sigma", "PixArtSigmaPipeline")
    later = stable_diffusion(folders / "later", act_fn="gelu")
    for part in (later.unet, later.text_encoder):
        for parameter in part.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    later.save_pretrained(folders / "later")
    (root / "server").mkdir()
    with HubServer(root / "server") as server:
        code = program(f"publish_texts({str(folders)!r})", publish_texts, answer_to_ramp)
        logits = answer(run_client(server, code, cache=root / "publisher", OMP_NUM_THREADS="1"))
        yield SimpleNamespace(server=server, root=root, folders=folders, logits=logits)


def files_of(requests, repository):
    """The files of a repository that a client asked for."""
    start = f"/tester/{repository}/resolve/"
    return {path.removeprefix(start).split("/", 1)[1] for _, path in requests if path.startswith(start)}


def test_a_head_on_a_stock_pipeline_opens_from_the_hub_without_its_text_encoders(stock_hub):
    """Its base was told by commit, and has other weights now."""
    client = {"token": False, "cache": stock_hub.root / "of_heads"}
    found = ask(stock_hub, {"away": "told('tester/told', True)", "beside": "told('tester/beside', True)"}, **client)
    assert found["away"] == pytest.approx(stock_hub.logits, abs=1e-5)
    assert found["beside"] == pytest.approx(stock_hub.logits, abs=1e-5)
    for repository in ("sd", "beside"):
        asked = files_of(found["requests"], repository)
        assert "unet/diffusion_pytorch_model.safetensors" in asked
        assert not [file for file in asked if file.startswith((*UNUSED, *OF_TEXTS))]
    offline = ask(stock_hub, {"away": "told('tester/told', True)"}, offline=True, **client)
    assert offline["away"] == found["away"] and not offline["requests"]


def test_stock_pipelines_open_from_the_hub_by_the_parts_that_are_needed(stock_hub):
    folders = stock_hub.folders
    client = {"token": False, "cache": stock_hub.root / "of_pipelines"}
    described_only = ask(stock_hub, {"config": "described('tester/sd')", "sampled": "sampled('tester/sd')"}, **client)
    assert described_only["config"] == ["PNDMScheduler", 16]
    assert "`diffusers.StableDiffusionPipeline.from_pretrained('tester/sd')` does" in described_only["sampled"]
    assert not [file for file in files_of(described_only["requests"], "sd") if file.endswith(".safetensors")]
    questions = {
        "v1": "told('tester/sd', revision='v1', prompt='a cat')",
        "main": "told('tester/sd')",
        "xl": "told('tester/xl', variant='fp16', prompt='the red dog')",
        "sigma": "told('tester/sigma')",
    }
    found = ask(stock_hub, questions, **client)
    expected = {
        "v1": told(folders / "sd", prompt="a cat"),
        "main": told(folders / "later"),
        "xl": told(folders / "xl", variant="fp16", prompt="the red dog"),
        "sigma": told(folders / "sigma"),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-5), name
    asked = {name: files_of(found["requests"], name) for name in ("sd", "xl", "sigma")}
    assert not [file for file in asked["sd"] if file.startswith(UNUSED)]
    assert {"text_encoder/model.safetensors", "tokenizer/tokenizer.json"} <= asked["sd"]
    weights = {file for file in asked["xl"] if file.endswith(".safetensors")}
    assert weights and all(".fp16." in file for file in weights), weights
    offline = ask(stock_hub, questions, offline=True, **client)
    assert {name: offline[name] for name in questions} == {name: found[name] for name in questions}
    assert not offline["requests"]
