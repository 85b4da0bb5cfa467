"""LoRA: adapters on the denoiser, alone and in fine-tuning, in files of their own, in peft, and merged."""

import importlib
import json
import shutil
import warnings

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments

from ddae_hf import (
    DDAEBackbone,
    DDAEConfig,
    DDAEForImageClassification,
    DDAEImageProcessor,
    DDAEModel,
    DDAEPipeline,
    collect_hidden_states,
    layer_names,
)
from ddae_hf.adapters import FOLDER, HIGHEST_RANK
from ddae_hf.experiments import Images, finetune, finetuning, sweep
from ddae_hf.experiments.libraries import not_installed
from ddae_hf.experiments.results import FineTuningReport
from ddae_hf.experiments.run_folder import OPTIONS
from ddae_hf.experiments.trainer import parameter_groups
from ddae_hf.hidden_states import run_with_hooks
from ddae_hf.networks import network_of

from . import commands
from .conftest import drawn, make_dit, make_unet

peft = pytest.importorskip("peft")

GREY = {"in_channels": 1, "out_channels": 1}
# Networks, and a layer of each that some attentions and convolutions lie behind.
NETWORKS = {
    "unet": (lambda: make_unet(**GREY), "up_blocks.0.attentions.0"),
    "dit": (lambda: make_dit(in_channels=1, num_embeds_ada_norm=0), "transformer_blocks.2"),
}
BOTH = ["attention", "convolutions"]
PIXELS = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(2)) * 2 - 1
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Generative checkpoints, by network."""
    root = tmp_path_factory.mktemp("bases")
    for name, (make, _) in NETWORKS.items():
        DDAEPipeline.for_denoiser(make(), DDIMScheduler()).save_pretrained(root / name)
    return root


def classifier_of(base, *, trained=True, rank=4, targets=BOTH, **options):
    """A classifier with adapters, which have been trained or are as they begin."""
    torch.manual_seed(1)
    options = {"num_labels": 10, "layer": NETWORKS[base.name][1], "sigma": 0.2, **options}
    model = DDAEForImageClassification.from_pretrained(base, **options).eval()
    model.add_lora(rank, targets=targets)
    if trained:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    return model


def learning_of(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def forget_peft(monkeypatch):
    """Let this package find no peft, which diffusers has found already."""
    import_module = importlib.import_module

    def imports(name, *args):
        if name == "peft":
            raise ModuleNotFoundError("No module named 'peft'", name="peft")
        return import_module(name, *args)

    monkeypatch.setattr(importlib, "import_module", imports)


# The network


@torch.no_grad()
@pytest.mark.parametrize("targets", [["attention"], ["convolutions"], BOTH])
@pytest.mark.parametrize("name", NETWORKS)
def test_adapters_that_are_not_trained_change_nothing(bases, name, targets):
    plain = DDAEForImageClassification.from_pretrained(bases / name, num_labels=10, layer=NETWORKS[name][1])
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    expected = plain(PIXELS).logits
    plain.add_lora(4, targets=targets)
    assert torch.equal(plain(PIXELS).logits, expected)
    state = {key.replace(".base_layer.", "."): value for key, value in plain.state_dict().items()}
    assert before.keys() < state.keys() and all(torch.equal(value, state[key]) for key, value in before.items())
    kinds = {type(plain.ddae.denoiser.get_submodule(key).base_layer) for key in plain.config.lora["modules"]}
    wanted = {"attention": torch.nn.Linear, "convolutions": torch.nn.Conv2d}
    assert kinds == {wanted[target] for target in targets}


@pytest.mark.parametrize("name", NETWORKS)
def test_only_adapters_before_the_tap_and_the_classifier_have_gradients(bases, name):
    """And every one of them has."""
    model = classifier_of(bases / name).train()
    model(PIXELS, labels=torch.arange(4)).loss.backward()
    adapters = {key for key, _ in model.named_parameters() if ".lora_" in key}
    moved = {key for key, parameter in model.named_parameters() if parameter.grad is not None}
    assert learning_of(model) == moved == adapters | {"classifier.weight", "classifier.bias"}
    deeper = ("up_blocks.0.resnets.1", "up_blocks.1", "conv_out", "transformer_blocks.3", "proj_out")
    assert adapters and not any(key.startswith(tuple(f"ddae.denoiser.{part}" for part in deeper)) for key in adapters)


def test_a_classifier_with_batch_statistics_learns_them_beside_adapters(bases, tmp_path):
    model = classifier_of(bases / "unet", feature_norm="batch_norm").train()
    model(PIXELS)
    model.eval().save_head(tmp_path, base=bases / "unet")
    opened = DDAEForImageClassification.from_pretrained(tmp_path)
    assert opened.feature_norm.running_mean.abs().sum() > 0
    assert torch.equal(opened(PIXELS).logits, model(PIXELS).logits)


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_views_of_a_network_with_adapters_are_equal_to_hooks(bases, name):
    """Also inside of what is adapted: queries and keys are layers themselves."""
    denoiser = classifier_of(bases / name).ddae.denoiser
    network = network_of(denoiser)
    timestep = torch.full((4,), 50.0)
    told = network.keywords(network.conditions(denoiser, None, 4, "cpu"))
    layers = layer_names(denoiser, inner=True)
    assert network.runs_as_seen(denoiser, layers)
    _, expected = run_with_hooks(denoiser, PIXELS, timestep, layers, None, told)
    for layer in layers:
        found = collect_hidden_states(denoiser, PIXELS, timestep, [layer], **told)[layer]
        assert torch.equal(found, expected[layer]), layer


@pytest.mark.parametrize("name", NETWORKS)
def test_learning_rates_fall_by_layer_for_adapters_too(bases, name):
    model = classifier_of(bases / name)
    groups = parameter_groups(model, 0.1, 0.5, 0.03)
    names = {parameter: key for key, parameter in model.named_parameters()}
    rates = {names[parameter]: group["lr"] for group in groups for parameter in group["params"]}
    assert rates.keys() == learning_of(model)
    last = {"unet": "up_blocks.0.attentions.0.to_q", "dit": "transformer_blocks.2.attn1.to_q"}[name]
    first = {"unet": "conv_in", "dit": "pos_embed.proj"}[name]
    assert rates[f"ddae.denoiser.{last}.lora_A.default.weight"] == pytest.approx(0.1 * 0.5)
    layers = {"unet": 4, "dit": 3}[name]
    assert rates[f"ddae.denoiser.{first}.lora_B.default.weight"] == pytest.approx(0.1 * 0.5 ** (layers + 1))
    assert rates["classifier.weight"] == 0.1


def test_gradient_checkpointing_and_bfloat16_train_adapters(bases):
    gradients = []
    noise = torch.randn(1, *PIXELS.shape)
    for checkpointing in (False, True):
        model = classifier_of(bases / "unet").train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        with torch.autocast("cpu", torch.bfloat16):
            model(PIXELS, labels=torch.arange(4), noise=noise).loss.backward()
        gradients.append({key: parameter.grad for key, parameter in model.named_parameters()})
        assert all(value.dtype == torch.float32 for value in gradients[-1].values() if value is not None)
    for key, value in gradients[0].items():
        other = gradients[1][key]
        assert (value is None) == (other is None), key
        if value is not None:
            torch.testing.assert_close(other, value)


@torch.no_grad()
def test_an_adapted_model_is_exported(bases):
    model = classifier_of(bases / "unet")
    expected = model(PIXELS).logits
    exported = torch.export.export(model, (PIXELS,)).module()
    torch.testing.assert_close(exported(PIXELS).logits, expected, rtol=0, atol=1e-6)
    model.merge_lora()
    exported = torch.export.export(model, (PIXELS,)).module()
    torch.testing.assert_close(exported(PIXELS).logits, expected, rtol=0, atol=1e-6)


# Files


@torch.no_grad()
@pytest.mark.parametrize("where", ["beside", "elsewhere"])
@pytest.mark.parametrize("name", NETWORKS)
def test_adapters_are_saved_beside_the_head_and_open_as_they_were(bases, tmp_path, name, where):
    base = shutil.copytree(bases / name, tmp_path / name)
    model = classifier_of(base)
    folder = base if where == "beside" else tmp_path / "adapted"
    model.save_head(folder, base=None if where == "beside" else base)
    assert DDAEConfig.from_pretrained(folder).weights == "adapters"
    written = {file.name for file in folder.rglob("*") if file.is_file()} - {file.name for file in base.rglob("*")}
    if where == "elsewhere":
        assert written == {"head.safetensors", "adapter_config.json", "adapter_model.safetensors"}
        size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
        assert size < sum(file.stat().st_size for file in base.rglob("*.safetensors")) / 3
    for opener in (DDAEForImageClassification, AutoModelForImageClassification):
        opened = opener.from_pretrained(folder)
        assert torch.equal(opened(PIXELS).logits, model(PIXELS).logits) and not opened.training
        assert learning_of(opened) == learning_of(model)
    expected = model.ddae(PIXELS).last_hidden_state
    assert torch.equal(DDAEModel.from_pretrained(folder)(PIXELS).last_hidden_state, expected)
    maps = DDAEBackbone.from_pretrained(folder, out_features=[model.config.layer])(PIXELS).feature_maps[0]
    assert torch.equal(maps, expected if name == "unet" else expected.transpose(1, 2).unflatten(2, maps.shape[2:]))


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_peft_opens_adapters_by_itself(bases, tmp_path, name):
    model = classifier_of(bases / name)
    model.save_head(tmp_path, base=bases / name)
    plain = NETWORKS[name][0]()
    opened = peft.PeftModel.from_pretrained(plain, tmp_path, subfolder=FOLDER).get_base_model()
    layer = model.config.layer
    network = network_of(plain)
    told = network.keywords(network.conditions(opened, None, 4, "cpu"))
    timestep = torch.full((4,), 50.0)
    own = model.ddae.denoiser.requires_grad_(False)  # torch multiplies otherwise, to rounding, where it is asked for
    found, expected = (collect_hidden_states(each, PIXELS, timestep, [layer], **told)[layer] for each in (opened, own))
    assert torch.equal(found, expected)
    described = json.loads((tmp_path / FOLDER / "adapter_config.json").read_text())
    assert described["r"] == 4 and described["base_model_name_or_path"] == str(bases / name)


@torch.no_grad()
def test_a_whole_model_keeps_its_adapters_and_opens_as_it_was(bases, tmp_path):
    model = classifier_of(bases / "unet")
    model.save_head(tmp_path, base=bases / "unet")
    model.save_pretrained(tmp_path)  # peft's files of the head beside it play no part
    for opener in (DDAEForImageClassification, AutoModelForImageClassification):
        assert torch.equal(opener.from_pretrained(tmp_path)(PIXELS).logits, model(PIXELS).logits)
    hidden = model.ddae(PIXELS).last_hidden_state
    assert torch.equal(DDAEModel.from_pretrained(tmp_path)(PIXELS).last_hidden_state, hidden)
    model.ddae.save_pretrained(tmp_path / "model")
    assert torch.equal(DDAEModel.from_pretrained(tmp_path / "model")(PIXELS).last_hidden_state, hidden)


@pytest.mark.parametrize("whole", [False, True])
def test_a_pipeline_samples_from_the_base_without_adapters(bases, tmp_path, whole, monkeypatch):
    """For which it needs no peft."""
    model = classifier_of(bases / "unet")
    if whole:
        model.save_pretrained(tmp_path)
    else:
        model.save_head(tmp_path, base=bases / "unet")
    forget_peft(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = DDAEPipeline.from_pretrained(tmp_path).unet.state_dict()
    expected = NETWORKS["unet"][0]().state_dict()
    assert opened.keys() == expected.keys() and all(torch.equal(opened[key], expected[key]) for key in expected)


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_merged_adapters_are_a_plain_model_that_computes_the_same(bases, tmp_path, name, monkeypatch):
    """Without peft."""
    model = classifier_of(bases / name)
    expected = model(PIXELS).logits
    model.merge_lora()
    forget_peft(monkeypatch)
    torch.testing.assert_close(model(PIXELS).logits, expected, rtol=0, atol=1e-6)
    plain = DDAEForImageClassification.from_pretrained(bases / name, num_labels=10, layer=model.config.layer)
    assert model.state_dict().keys() == plain.state_dict().keys() and learning_of(model) == learning_of(plain)
    model.save_pretrained(tmp_path)
    opened = DDAEForImageClassification.from_pretrained(tmp_path)
    assert opened.config.lora is None and torch.equal(opened(PIXELS).logits, model(PIXELS).logits)
    assert DDAEPipeline.from_pretrained(tmp_path)._fine_tuned_from == str(tmp_path)  # of which sampling warns
    with pytest.raises(ValueError, match="fine-tuned"):
        model.save_head(tmp_path / "head", base=bases / name)
    model.merge_lora()  # there is nothing to merge, and nothing happens
    assert torch.equal(opened(PIXELS).logits, model(PIXELS).logits)


def test_a_base_that_has_changed_is_refused(bases, tmp_path):
    base = shutil.copytree(bases / "unet", tmp_path / "unet")
    classifier_of(base).save_head(tmp_path / "adapted", base=base)
    DDAEPipeline.for_denoiser(make_unet(seed=5, **GREY), DDIMScheduler()).save_pretrained(base)
    for opener in (DDAEForImageClassification, DDAEModel, DDAEPipeline):
        with pytest.raises(ValueError, match="have changed since"):
            opener.from_pretrained(tmp_path / "adapted")


def test_adapters_on_another_base_are_not_saved(bases, tmp_path):
    other = tmp_path / "other"
    DDAEPipeline.for_denoiser(make_unet(seed=5, **GREY), DDIMScheduler()).save_pretrained(other)
    with pytest.raises(ValueError, match="is not that of"):
        classifier_of(bases / "unet").save_head(tmp_path / "adapted", base=other)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_in_half_precision_open_as_they_were(bases, tmp_path, dtype):
    model = classifier_of(bases / "unet", dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    model.save_head(tmp_path, base=bases / "unet")
    opened = DDAEForImageClassification.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in opened.parameters()} == {dtype}
    assert torch.equal(opened(PIXELS).logits, model(PIXELS).logits)


def change_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: (f / FOLDER / "adapter_model.safetensors").unlink(),
            "its adapters/adapter_model.safetensors is mis",
        ),
        (lambda f: (f / FOLDER / "adapter_config.json").unlink(), "its adapters/adapter_config.json is missing"),
        (lambda f: change_json(f / FOLDER / "adapter_config.json", lora_alpha=16), "describes other adapters"),
        (
            lambda f: change_json(f / FOLDER / "adapter_config.json", target_modules=["to_q"]),
            "describes other adapters",
        ),
        (lambda f: change_json(f / FOLDER / "adapter_config.json", use_rslora=True), "describes other adapters"),
        (lambda f: change_json(f / "config.json", lora=None), "lora describes none"),
        (lambda f: change_json(f / "config.json", weights="head"), "lora describes adapters, which .* does not have"),
        (lambda f: (f / FOLDER / "adapter_model.safetensors").write_bytes(b"short"), "cannot be read"),
        (lambda f: change_tensors(f, lambda t: t.popitem()), "lacks 1 of the .* tensors of its adapters"),
        (lambda f: change_tensors(f, lambda t: t.update({"more.lora_A.weight": torch.ones(1)})), "has no place for"),
        (lambda f: change_tensors(f, lambda t: t.update({min(t): torch.ones(2)})), "in other shapes"),
    ],
)
def test_adapters_that_are_damaged_are_refused(bases, tmp_path, damage, message):
    classifier_of(bases / "unet").save_head(tmp_path, base=bases / "unet")
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        DDAEForImageClassification.from_pretrained(tmp_path)


def change_tensors(folder, change):
    path = folder / FOLDER / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_a_whole_model_whose_adapters_have_other_shapes_is_refused(bases, tmp_path):
    classifier_of(bases / "unet").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    change_json(tmp_path / "config.json", lora=config["lora"] | {"rank": 5})
    with pytest.raises(ValueError, match="of its adapters in other shapes"):
        DDAEForImageClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 4, "alpha": 4}, "it must have the entries rank, alpha and modules"),
        ({"rank": 0}, "rank is 0: it must be a whole number, 1 to 1024"),
        ({"rank": HIGHEST_RANK + 1}, "rank is 1025"),
        ({"rank": 4.0}, "rank is 4.0"),
        ({"alpha": float("nan")}, "alpha is nan: it must be a positive number"),
        ({"alpha": True}, "alpha is True"),
        ({"alpha": 10**400}, "alpha is a number of more than 30 digits"),
        ({"modules": []}, "modules is .*: it must be a list of one or more names"),
        ({"modules": "conv_in"}, "modules is 'conv_in'"),
        ({"modules": ["conv_in", "conv_in"]}, "modules has a name twice"),
        ({"modules": ["conv_norm_out"]}, "no linear layer and no plain convolution 'conv_norm_out'"),
        ({"modules": ["nothing"]}, "no linear layer and no plain convolution 'nothing'"),
    ],
)
def test_what_cannot_be_adapters_is_refused(bases, lora, message):
    given = lora if "rank" in lora and "alpha" in lora else {"rank": 4, "alpha": 4.0, "modules": ["conv_in"], **lora}
    with pytest.raises(ValueError, match=message):
        DDAEConfig.from_pretrained(bases / "unet", lora=given)


def test_what_cannot_be_added_is_refused(bases):
    model = classifier_of(bases / "unet")
    with pytest.raises(ValueError, match="has adapters already"):
        model.add_lora()
    plain = DDAEForImageClassification.from_pretrained(bases / "unet", num_labels=2, layer="down_blocks.0.resnets.0")
    with pytest.raises(ValueError, match="no attention before down_blocks.0.resnets.0: give convolutions as targets"):
        plain.add_lora()
    with pytest.raises(ValueError, match="targets has 'mlp': it must be a list of some of attention, convolutions"):
        plain.add_lora(targets=["attention", "mlp"])
    with pytest.raises(ValueError, match="rank is 0"):
        plain.add_lora(0, targets=BOTH)
    plain.ddae.denoiser.compile(backend="eager")
    with pytest.raises(ValueError, match="The denoiser is compiled"):
        plain.add_lora(targets=BOTH)
    assert plain.config.lora is None and not any("lora_" in key for key in plain.state_dict())


def test_without_peft_it_is_said_how_to_install_it(bases, digits, tmp_path, monkeypatch):
    classifier_of(bases / "unet").save_head(tmp_path, base=bases / "unet")
    forget_peft(monkeypatch)
    for opener in (DDAEForImageClassification, DDAEModel):
        with pytest.raises(ValueError, match=r'LoRA needs peft, which is not installed: pip install "peft>=0.19.1"'):
            opener.from_pretrained(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError) as refusal:
        finetune(bases / "unet", Images.open(digits), lora_rank=4)
    assert str(refusal.value) == not_installed("lora_rank", "peft", "lora") and "peft" in str(refusal.value)


# Fine-tuning

OPTIONS_OF_ALL = {
    "max_train_samples": 100, "max_test_samples": 50, "train_batch_size": 32, "learning_rate": 1e-2, "mixup": 0.4,
    "layer_decay": 0.8, "ema_decay": 0.9, "lora_rank": 4, "lora_targets": BOTH,
}  # fmt: skip
SIX = {"max_train_steps": 6, "checkpointing_steps": 3}


def run(base, digits, folder, **options):
    return finetune(base, Images.open(digits), **{**OPTIONS_OF_ALL, **SIX, "output_dir": folder, **options})


@pytest.fixture(scope="module")
def finetuned(bases, digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetuned")
    return folder, run(bases / "unet", digits, folder)


def accuracy(folder, digits):
    model, processor = DDAEForImageClassification.from_pretrained(folder), DDAEImageProcessor.from_pretrained(folder)
    test = drawn(digits, "test", 50)
    with torch.no_grad():
        classes = model(processor(test["image"][:], return_tensors="pt")["pixel_values"]).logits.argmax(-1)
    return (classes == torch.tensor(test["label"][:])).float().mean().item()


def test_fine_tuning_trains_adapters_and_saves_them(finetuned, bases, digits):
    folder, result = finetuned
    assert not (folder / WEIGHTS).exists() and DDAEConfig.from_pretrained(folder).weights == "adapters"
    assert accuracy(folder, digits) == pytest.approx(result.test_accuracy)
    opened = DDAEForImageClassification.from_pretrained(folder)
    state, kept = opened.state_dict(), NETWORKS["unet"][0]().state_dict()
    changed = [key for key, value in state.items() if "lora_B" in key and value.abs().max() > 0]
    assert len(changed) == len(opened.config.lora["modules"])
    base = {key.replace(".base_layer.", ".").removeprefix("ddae.denoiser."): value for key, value in state.items()}
    assert all(torch.equal(base[key], value) for key, value in kept.items())
    count = sum(parameter.numel() for parameter in opened.parameters() if parameter.requires_grad)
    assert result.num_trained_parameters == count == FineTuningReport.read(folder).num_trained_parameters
    assert "LoRA adapters of rank 4 on the frozen network were trained" in result.table()


def test_an_interrupted_run_resumes_exactly_and_a_finished_one_is_left_as_it_is(
    finetuned, bases, digits, tmp_path, monkeypatch
):
    folder, result = finetuned
    (tmp_path / "checkpoint-3").symlink_to(folder / "checkpoint-3")
    (tmp_path / OPTIONS).write_text((folder / OPTIONS).read_text())
    again = run(bases / "unet", digits, tmp_path, resume_from_checkpoint="latest")
    for file in ("head.safetensors", f"{FOLDER}/adapter_model.safetensors", "checkpoint-6/averaged.safetensors"):
        expected, found = load_file(folder / file), load_file(tmp_path / file)
        assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)
    assert (again.test_loss, again.images) == (result.test_loss, result.images)
    with pytest.raises(ValueError, match="lora_rank was 4 and is 2"):
        run(bases / "unet", digits, tmp_path, resume_from_checkpoint="latest", lora_rank=2)
    monkeypatch.setattr(finetuning, "train_further", None)
    complete = run(bases / "unet", digits, tmp_path, resume_from_checkpoint="latest")
    assert complete.test_loss == result.test_loss and complete.classifier.config.lora["rank"] == 4


def test_a_finished_run_is_merged_on_demand(finetuned, bases, digits, tmp_path):
    folder = shutil.copytree(finetuned[0], tmp_path / "run")
    merged = run(bases / "unet", digits, folder, resume_from_checkpoint="latest", merge_lora=True)
    assert (folder / WEIGHTS).is_file() and merged.test_loss == finetuned[1].test_loss
    plain = DDAEForImageClassification.from_pretrained(folder)
    assert plain.config.lora is None and accuracy(folder, digits) == pytest.approx(merged.test_accuracy)
    adapted = DDAEForImageClassification.from_pretrained(finetuned[0])
    with torch.no_grad():
        torch.testing.assert_close(plain(PIXELS).logits, adapted(PIXELS).logits, rtol=0, atol=1e-6)
    whole = finetune(folder, Images.open(digits), max_train_samples=40, max_test_samples=20, max_train_steps=1)
    assert whole.num_trained_parameters > merged.num_trained_parameters


def test_adapters_are_not_trained_further(finetuned, digits):
    for options in ({"lora_rank": 4}, {"lora_rank": None, "lora_targets": None}):
        with pytest.raises(ValueError, match="has adapters, which are not trained further: .*merge_lora"):
            run(finetuned[0], digits, None, **options)


def test_an_open_model_which_has_no_place_is_saved_whole(bases, digits, tmp_path):
    model = DDAEModel.from_pretrained(bases / "dit")
    result = run(model, digits, tmp_path, max_train_steps=2)
    assert (tmp_path / WEIGHTS).is_file() and not (tmp_path / FOLDER).exists()
    assert DDAEConfig.from_pretrained(tmp_path).lora["rank"] == 4
    assert accuracy(tmp_path, digits) == pytest.approx(result.test_accuracy)


def test_a_head_is_a_base_too(finetuned, bases, digits, tmp_path):
    """As of a probe beside its generator."""
    base = shutil.copytree(bases / "unet", tmp_path / "unet")
    DDAEForImageClassification.from_pretrained(base, num_labels=10).save_head(base)
    result = run(base, digits, tmp_path / "out", max_train_steps=1)
    assert accuracy(tmp_path / "out", digits) == pytest.approx(result.test_accuracy)


def test_a_sweep_reads_an_adapted_network(finetuned, bases, digits, tmp_path):
    images = Images.open(digits)
    options = {"layers": ["own"], "sigmas": [0.2], "max_train_samples": 100, "max_test_samples": 50}
    result = sweep(finetuned[0], images, **options, num_noise_seeds=1, output_dir=tmp_path)
    plain = sweep(bases / "unet", images, **options, num_noise_seeds=1)
    assert result.fingerprint != plain.fingerprint
    opened = DDAEForImageClassification.from_pretrained(tmp_path / "classifier")
    assert opened.config.lora["rank"] == 4


def test_the_network_is_compiled_if_asked_for(bases, digits, tmp_path, monkeypatch):
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **given: compile_(model, backend="eager"))
    plain = run(bases / "dit", digits, tmp_path / "plain", max_train_steps=2)
    result = run(bases / "dit", digits, tmp_path / "compiled", max_train_steps=2, torch_compile=True)
    assert result.test_loss == pytest.approx(plain.test_loss, rel=1e-3)
    assert accuracy(tmp_path / "compiled", digits) == pytest.approx(result.test_accuracy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_rank": 0}, "lora_rank is 0: it must be between 1 and 1024"),
        ({"lora_alpha": 0.0}, "lora_alpha is 0.0: it must be positive"),
        ({"lora_targets": ["all"]}, "lora_targets has 'all': allowed are attention, convolutions"),
        ({"lora_rank": None}, "lora_targets is of LoRA, which lora_rank asks for"),
        ({"lora_rank": None, "lora_targets": None, "merge_lora": True}, "merge_lora is of LoRA"),
        ({"from_scratch": True}, "from_scratch: adapters stand on pretrained weights"),
        ({"lora_targets": None, "layer": "down_blocks.0.resnets.0"}, "has no attention before down_blocks.0.resnets.0"),
    ],
)
def test_options_that_cannot_work_are_refused_before_anything_is_trained(bases, digits, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(bases / "unet", digits, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_command_is_a_caller(bases, digits, tmp_path, capsys):
    options = ["--model_name_or_path", bases / "unet", "--dataset_name", digits, "--output_dir", tmp_path]
    options += ["--max_train_samples", 40, "--max_test_samples", 20, "--max_train_steps", 1, "--lora_rank", 2]
    commands.run("finetune", *options, "--lora_alpha", 4, "--lora_targets", *BOTH)
    assert "adapters of rank 2" in capsys.readouterr().out and (tmp_path / "README.md").is_file()
    lora = DDAEConfig.from_pretrained(tmp_path).lora
    assert (lora["rank"], lora["alpha"]) == (2, 4.0) and "conv_in" in lora["modules"]


def test_transformers_trainer_resumes_adapters_exactly(bases, tmp_path):
    """And saves them whole; the base stays as it is."""
    rows = [{"pixel_values": pixels, "labels": number, "noise": -pixels} for number, pixels in enumerate(PIXELS)]

    def together(chosen):
        pixels, noise = (torch.stack([row[name] for row in chosen]) for name in ("pixel_values", "noise"))
        return {"pixel_values": pixels, "noise": noise[None], "labels": torch.tensor([row["labels"] for row in chosen])}

    def trained(folder, resume=None):
        model = classifier_of(bases / "unet", trained=False)
        arguments = TrainingArguments(
            str(folder), per_device_train_batch_size=2, max_steps=4, save_steps=2, learning_rate=1e-2, use_cpu=True,
            gradient_checkpointing=True, remove_unused_columns=False, report_to="none", disable_tqdm=True,
        )  # fmt: skip
        Trainer(model, arguments, together, rows).train(resume_from_checkpoint=resume)
        return model.state_dict()

    whole = trained(tmp_path / "whole")
    resumed = trained(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-2"))
    assert whole.keys() == resumed.keys() and all(torch.equal(value, resumed[key]) for key, value in whole.items())
    opened = DDAEForImageClassification.from_pretrained(tmp_path / "whole" / "checkpoint-4")
    assert all(torch.equal(value, whole[key]) for key, value in opened.state_dict().items())
    start = classifier_of(bases / "unet", trained=False).state_dict()
    moved = {key for key, value in whole.items() if not torch.equal(value, start[key])}
    assert moved and all(".lora_" in key or key.startswith("classifier.") for key in moved)
