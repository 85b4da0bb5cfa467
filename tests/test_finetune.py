"""Fine-tuning as a user runs it, at tiny size, on real digits; and its rules one by one."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from datasets import Dataset
from diffusers import DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file
from sklearn.metrics import f1_score
from transformers import TrainerCallback

import finetune
from ddae_hf import DDAEForImageClassification, DDAEImageProcessor, DDAEPipeline
from ddae_hf.experiments.draws import indexed_noise

from . import scripts
from .conftest import drawn, make_dit, make_unet

GREY = {"in_channels": 1, "out_channels": 1}
PAIRS = {
    "ddpm": (make_unet, {**GREY, "dropout": 0.1}, DDIMScheduler),
    "edm": (make_unet, GREY, EDMEulerScheduler),
    "flow": (make_dit, {"in_channels": 1, "num_embeds_ada_norm": 0}, FlowMatchEulerDiscreteScheduler),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("denoisers")
    for name, (make, options, scheduler) in PAIRS.items():
        DDAEPipeline.for_denoiser(make(**options), scheduler()).save_pretrained(root / name)
    return root


def run(checkpoint, digits, folder, *options):
    arguments = ["--model_name_or_path", str(checkpoint), "--dataset_name", str(digits), "--output_dir", str(folder)]
    arguments += ["--max_train_samples", "100", "--max_test_samples", "70", "--batch_size", "32", "--learning_rate"]
    arguments += ["1e-3", "--random_flip", "--random_crop", "1", "--label_smoothing", "0.1", "--mixup", "0.4"]
    scripts.run("finetune", *arguments, "--layer_decay", "0.8", "--ema_decay", "0.9", *options)
    return json.loads((folder / "eval_results.json").read_text())


SIX = ["--max_train_steps", "6", "--checkpointing_steps", "3"]


@pytest.fixture(scope="module")
def finetuned(checkpoints, digits, tmp_path_factory):
    """Six steps of four an epoch, with a checkpoint inside the first."""
    folder = tmp_path_factory.mktemp("finetuned")
    return folder, run(checkpoints / "ddpm", digits, folder, *SIX)


def make_model(name, checkpoints, **options):
    torch.manual_seed(0)
    return DDAEForImageClassification.from_pretrained(checkpoints / name, num_labels=10, **options)


def answers(folder, digits, count):
    """True classes, and those that a saved folder gives with its fixed noise and with every image's own."""
    model, processor = DDAEForImageClassification.from_pretrained(folder), DDAEImageProcessor.from_pretrained(folder)
    test = drawn(digits, "test", count)
    labels, pixels = torch.tensor(test["label"][:]), processor(test["image"][:], return_tensors="pt")["pixel_values"]
    own = indexed_noise(tuple(pixels.shape[1:]), range(count), model.config.noise_seed, 1)
    with torch.no_grad():
        return labels, [model(pixels, noise=n).logits.argmax(-1) for n in (None, own)]


def accuracies(folder, digits, count):
    labels, given = answers(folder, digits, count)
    return [(classes == labels).float().mean().item() for classes in given]


@pytest.mark.parametrize("name", ["edm", "flow"])
def test_every_framework_and_network_is_finetuned_and_opens_again(checkpoints, digits, tmp_path, name):
    layer = {"edm": "mid_block", "flow": "transformer_blocks.1"}[name]
    options = ["--layer", layer, "--sigma", "0.1", "--max_train_steps", "2", "--noise_seed", "3"]
    report = run(checkpoints / name, digits, tmp_path, *options)
    assert (report["layer"], report["sigma"], report["steps"]) == (layer, 0.1, 2)
    model = DDAEForImageClassification.from_pretrained(tmp_path)
    assert (model.config.layer, model.config.sigma, model.config.noise_seed) == (layer, 0.1, 3)
    assert model.config.id2label[3] == "3"
    assert accuracies(tmp_path, digits, 70) == pytest.approx(
        [report["test_accuracy"], report["test_own_noise_accuracy"]]
    )


def test_the_reported_accuracy_is_that_of_the_saved_folder_on_every_test_image(finetuned, digits):
    folder, report = finetuned
    fixed, own = accuracies(folder, digits, 70)
    assert report["num_test_images"] == 70 and report["num_train_labels"] == 100
    assert report["test_accuracy"] == pytest.approx(fixed) and report["test_own_noise_accuracy"] == pytest.approx(own)
    assert report["images_per_second"] > 0 and report["options"]["mixup"] == 0.4
    labels, given = answers(folder, digits, 70)
    f1 = [f1_score(labels, classes, average="macro", zero_division=0) for classes in given]
    assert [report["test_f1"], report["test_own_noise_f1"]] == pytest.approx(f1) and 0 < f1[0] != fixed
    assert report["dataset"]["num_images"] == 100 and report["processes"] == 1


def test_an_interrupted_run_resumes_exactly(finetuned, checkpoints, digits, tmp_path):
    folder, report = finetuned
    (tmp_path / "checkpoint-3").symlink_to(folder / "checkpoint-3")
    (tmp_path / finetune.OPTIONS).write_text((folder / finetune.OPTIONS).read_text())
    # A checkpoint that was interrupted while it was written, before its averages, is passed over.
    (tmp_path / "checkpoint-5").mkdir()
    again = run(checkpoints / "ddpm", digits, tmp_path, *SIX, "--resume_from_checkpoint", "latest")
    for file in ("model.safetensors", "checkpoint-6/model.safetensors", f"checkpoint-6/{finetune.AVERAGED}"):
        expected, resumed = load_file(folder / file), load_file(tmp_path / file)
        assert expected.keys() == resumed.keys() and all(torch.equal(expected[n], resumed[n]) for n in expected)
    assert (again["test_accuracy"], again["test_loss"]) == (report["test_accuracy"], report["test_loss"])
    assert again["images"] == report["images"] == 100 + 64
    before = json.loads((folder / "checkpoint-3" / finetune.PROGRESS).read_text())
    assert before["images"] == 96 and before["seconds"] > 0
    total = before["seconds"] + again["train_seconds_this_run"]
    assert again["train_seconds"] == pytest.approx(total, abs=0.11) and again["seconds"] > again["seconds_this_run"]


def test_a_finished_run_resumes_to_the_same_figures(finetuned, checkpoints, digits, tmp_path):
    folder, report = finetuned
    resume = str(folder / "checkpoint-6")
    again = run(checkpoints / "ddpm", digits, tmp_path, *SIX, "--resume_from_checkpoint", resume)
    assert again["test_loss"] == report["test_loss"] and again["images"] == report["images"]
    before = json.loads((folder / "checkpoint-6" / finetune.PROGRESS).read_text())
    assert again["images_per_second"] == pytest.approx(report["images"] / before["seconds"], abs=0.1)


def test_resuming_another_run_or_mixing_two_is_refused(finetuned, checkpoints, digits, tmp_path):
    folder, _ = finetuned
    with pytest.raises(SystemExit, match="holds checkpoints of an earlier run"):
        run(checkpoints / "ddpm", digits, folder, *SIX)
    with pytest.raises(SystemExit, match="other options: learning_rate, random_flip differ"):
        other = ["--resume_from_checkpoint", "latest", "--no-random_flip", "--learning_rate", "0.5"]
        run(checkpoints / "ddpm", digits, folder, *SIX, *other)
    with pytest.raises(SystemExit, match="other options: ema_decay differ"):
        run(checkpoints / "ddpm", digits, folder, *SIX, "--resume_from_checkpoint", "latest", "--ema_decay", "0.5")
    with pytest.raises(SystemExit, match="there is no checkpoint with a training state"):
        run(checkpoints / "ddpm", digits, tmp_path, *SIX, "--resume_from_checkpoint", str(tmp_path))


def test_checkpoints_without_their_averages_are_not_trained_over(finetuned, checkpoints, digits, tmp_path):
    shutil.copytree(finetuned[0], tmp_path / "run")
    for path in (tmp_path / "run").glob("checkpoint-*/averaged.safetensors"):
        path.unlink()
    with pytest.raises(SystemExit, match="there is no checkpoint with a training state that is complete"):
        run(checkpoints / "ddpm", digits, tmp_path / "run", *SIX, "--resume_from_checkpoint", "latest")


def test_averaged_weights_follow_the_rule(checkpoints, digits, tmp_path, monkeypatch):
    """The decay at step n, from 1, is min(decay, n / (9 + n)); the first step takes the weights as they are."""
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append(model.classifier.weight.detach().double().clone())

    make_trainer = finetune.make_trainer

    def watched(*args):
        trainer = make_trainer(*args)
        trainer.add_callback(Watch())
        return trainer

    monkeypatch.setattr(finetune, "make_trainer", watched)
    run(checkpoints / "flow", digits, tmp_path, "--max_train_steps", "4", "--ema_decay", "0.15")
    average = seen[0]
    for n, weight in enumerate(seen[1:], start=1):
        decay = min(0.15, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * weight
    saved = load_file(tmp_path / "model.safetensors")["classifier.weight"].double()
    torch.testing.assert_close(saved, average, rtol=1e-6, atol=1e-7)
    assert not torch.equal(saved, seen[-1])


def test_a_run_from_scratch_starts_from_the_same_network_without_its_weights(checkpoints, digits, tmp_path):
    still = ["--max_train_steps", "1"]  # at a learning rate of 0, with which the warm-up begins
    start = load_file(checkpoints / "ddpm" / "unet" / "diffusion_pytorch_model.safetensors")
    weights = {}
    for name, options in {"pretrained": [], "scratch": ["--from_scratch"]}.items():
        run(checkpoints / "ddpm", digits, tmp_path / name, *still, *options)
        weights[name] = load_file(tmp_path / name / "model.safetensors")
    assert weights["pretrained"].keys() == weights["scratch"].keys()
    for key in ("conv_in.weight", "mid_block.resnets.0.conv1.weight"):
        assert torch.equal(weights["pretrained"]["ddae.denoiser." + key], start[key])
        assert not torch.equal(weights["scratch"]["ddae.denoiser." + key], start[key])
    config = json.loads((tmp_path / "scratch" / "config.json").read_text())
    assert config["layer"] == DDAEForImageClassification.from_pretrained(tmp_path / "pretrained").config.layer
    assert config.get("generator_fingerprint") is None


def test_learning_rates_fall_from_the_classifier_to_the_input(checkpoints):
    """Taps up to this one: down 0, down 1 (with attention), mid, up 0 (attention 0, 1)."""
    model = make_model("ddpm", checkpoints, layer="up_blocks.0.attentions.1")
    groups = finetune.parameter_groups(model, 0.1, 0.5, 0.03)
    names = {p: name for name, p in model.named_parameters()}
    found = {names[p]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    expected = {  # layers between a parameter and the logits
        "classifier": 0,
        "ddae.denoiser.up_blocks.0.attentions.1.": 1,
        "ddae.denoiser.up_blocks.0.resnets.1.": 1,
        "ddae.denoiser.up_blocks.0.attentions.0.": 2,
        "ddae.denoiser.up_blocks.0.resnets.0.": 2,
        "ddae.denoiser.mid_block.": 3,
        "ddae.denoiser.down_blocks.1.": 4,
        "ddae.denoiser.down_blocks.0.downsamplers.": 4,
        "ddae.denoiser.down_blocks.0.resnets.": 5,
        "ddae.denoiser.conv_in.": 6,
        "ddae.denoiser.time_embedding.": 6,
    }
    counted = 0
    for prefix, distance in expected.items():
        of_prefix = [name for name in found if name.startswith(prefix)]
        counted += len(of_prefix)
        assert of_prefix and all(math.isclose(found[name][0], 0.1 * 0.5**distance) for name in of_prefix), prefix
    assert counted == len(found)
    assert found["classifier.weight"][1] == 0.03 and found["classifier.bias"][1] == 0
    assert found["ddae.denoiser.mid_block.resnets.0.norm1.weight"][1] == 0


@pytest.mark.parametrize(("name", "layer"), [("ddpm", "up_blocks.0.attentions.0"), ("flow", "transformer_blocks.2")])
def test_what_learns_is_what_gets_a_gradient(checkpoints, name, layer):
    model = make_model(name, checkpoints, layer=layer)
    groups = finetune.parameter_groups(model, 1.0, 0.9, 0.0)
    model.train()(torch.rand(4, 1, 8, 8), labels=torch.arange(4)).loss.backward()
    learning = [p for g in groups for p in g["params"]]
    assert all(p.grad is not None for p in learning) and len(set(learning)) == len(learning)
    others = set(model.parameters()) - set(learning)
    assert others and not any(p.requires_grad for p in others)
    if name == "flow":
        rates = {p: g["lr"] for g in groups for p in g["params"]}
        for k in range(3):
            block = model.ddae.denoiser.transformer_blocks[k]
            of_block = [rates[p] for p in block.parameters() if p in rates]
            assert of_block and of_block == pytest.approx([0.9 ** (3 - k)] * len(of_block))
        assert rates[model.ddae.denoiser.pos_embed.proj.weight] == pytest.approx(0.9**4)


@pytest.fixture(scope="module")
def trainer(checkpoints, digits, tmp_path_factory):
    arguments = ["--model_name_or_path", "x", "--output_dir", str(tmp_path_factory.mktemp("trainer"))]
    args = finetune.parse_arguments([*arguments, "--batch_size", "8", "--label_smoothing", "0.1", "--mixup", "0.5"])
    data = Dataset.from_dict({"labels": [0, 1, 2]})
    return finetune.make_trainer(args, make_model("ddpm", checkpoints), data)


def test_images_and_targets_are_mixed_and_smoothed_alike(trainer):
    """An image of one value tells its class, so the mixed image tells the share of each class."""
    labels = torch.arange(8)
    values = 10.0 ** -labels.float()  # every pair and share gives another value
    torch.manual_seed(1)
    changed = trainer.change(values[:, None, None, None].expand(8, 1, 8, 8), labels)
    images, targets = changed["pixel_values"], changed["labels"]
    assert targets.shape == (8, 10)
    torch.testing.assert_close(targets.sum(1), torch.ones(8))
    hard = (targets - 0.1 / 10) / 0.9
    torch.testing.assert_close(images.mean((1, 2, 3)), hard[:, :8] @ values, rtol=1e-4, atol=1e-6)
    assert ((hard > 1e-4).sum(1) <= 2).all() and (hard.max(1).values < 0.999).any()


def test_smoothing_alone_is_torchs(trainer, monkeypatch):
    monkeypatch.setattr(trainer.options, "mixup", 0.0)
    labels, logits = torch.tensor([3, 1, 9]), torch.randn(3, 10)
    targets = trainer.change(torch.zeros(3, 1, 8, 8), labels)["labels"]
    expected = F.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(-(targets * logits.log_softmax(-1)).sum(-1).mean(), expected)


def test_a_fraction_of_labels_is_one_of_every_class():
    labels = np.repeat(np.arange(4), [100, 50, 10, 3])
    tenth, fifth = finetune.draw_fraction(labels, 0.1, 0), finetune.draw_fraction(labels, 0.2, 0)
    assert np.bincount(labels[tenth]).tolist() == [10, 5, 1, 1] and len(np.unique(tenth)) == 17
    assert np.bincount(labels[fifth]).tolist() == [20, 10, 2, 1] and set(tenth) < set(fifth)
    assert np.array_equal(tenth, finetune.draw_fraction(labels, 0.1, 0))
    assert not np.array_equal(tenth, finetune.draw_fraction(labels, 0.1, 1))
    assert np.array_equal(finetune.draw_fraction(labels, 1.0, 5), np.arange(163))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--label_fraction", "0"], "--label_fraction is 0.0: it must be above 0 and at most 1"),
        (["--label_fraction", "1.5"], "it must be above 0 and at most 1"),
        (["--layer_decay", "0"], "--layer_decay is 0.0"),
        (["--label_smoothing", "1"], "it must be at least 0 and below 1"),
        (["--ema_decay", "1"], "--ema_decay is 1.0"),
        (["--mixup", "-1"], "--mixup is -1.0: it must be at least 0"),
        (["--learning_rate", "nan"], "--learning_rate is nan"),
        (["--batch_size", "1"], "--mixup mixes the images of a batch"),
        (["--max_train_steps", "0"], "it must be at least 1"),
        (["--random_crop", "8"], "--random_crop is 8: the images' sides are"),
        (["--layer", "up_blocks.8.resnets.0"], "There is no layer 'up_blocks.8.resnets.0'"),
        (["--sigma", "1e9"], "outside the schedule"),
        (["--null_class", "3"], "it takes no labels"),
        (["--model_name_or_path", "nowhere/at/all"], "is not a folder"),
        (["--max_train_samples", "1"], "are all of one class"),
    ],
)
def test_finetuning_refuses_bad_input_before_it_trains(checkpoints, digits, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as refusal:
        run(checkpoints / "ddpm", digits, tmp_path / "out", *options)
    assert message in f"{refusal.value} {capsys.readouterr().err}"
    assert not (tmp_path / "out").exists()


def test_half_precision_without_a_gpu_is_refused(checkpoints, digits, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        run(checkpoints / "ddpm", digits, tmp_path, "--mixed_precision", "fp16")
    assert "fp16 needs a GPU" in capsys.readouterr().err


def test_what_batch_statistics_cannot_do_is_refused(checkpoints, digits, tmp_path):
    make_model("ddpm", checkpoints, feature_norm="batch_norm").save_pretrained(tmp_path / "start")
    with pytest.raises(SystemExit, match="100 images leave a batch of one"):
        run(tmp_path / "start", digits, tmp_path / "out", "--batch_size", "33")
    with pytest.raises(SystemExit, match="leave out --ema_decay"):
        run(tmp_path / "start", digits, tmp_path / "out")


def test_a_loss_that_is_no_number_ends_training(trainer):
    with pytest.raises(SystemExit, match="The loss is nan at step 0, .* of 0.0005; none of it is saved. There is no"):
        trainer.log({"loss": float("nan")})


def test_options_of_a_run_are_kept_beside_it(finetuned):
    options = yaml.safe_load((finetuned[0] / finetune.OPTIONS).read_text())
    assert options["layer_decay"] == 0.8 and options["label_fraction"] == 1.0
