"""What transformers, torch and ONNX expect of any image classifier: Trainer, checkpointing, attention, devices."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import default_collate
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ddae_hf import DDAEConfig, DDAEForImageClassification, DDAEImageProcessor
from ddae_hf.checkpoints import plain_config

from .conftest import make_dit, make_unet


def make_model(denoiser=None, **options):
    options = {"num_labels": 3, "scheduler": {"_class_name": "DDPMScheduler"}, **options}
    return DDAEForImageClassification(DDAEConfig(denoiser=plain_config(denoiser or make_unet()), **options)).eval()


@pytest.fixture(scope="module")
def coloured():
    return coloured_images()


def coloured_images():
    """Images of three classes, told apart by their colour."""
    generator = torch.Generator().manual_seed(0)
    rows = [{"pixel_values": torch.rand(3, 8, 8, generator=generator) - 1, "labels": i % 3} for i in range(12)]
    for row in rows:
        row["pixel_values"][row["labels"]] += 1
    return rows


def arguments(folder, **options):
    return TrainingArguments(
        folder, per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True, **options
    )


def test_trainer_evaluates_keeps_the_best_and_resumes(coloured, tmp_path):
    scores = []

    def accuracy(prediction):
        right = prediction.predictions.argmax(-1) == prediction.label_ids
        scores.append(float(right.mean()))
        return {"accuracy": scores[-1]}

    def trainer(folder, epochs):
        torch.manual_seed(0)
        options = {"eval_strategy": "epoch", "save_strategy": "epoch", "metric_for_best_model": "accuracy"}
        options |= {"load_best_model_at_end": True, "learning_rate": 1e-3, "num_train_epochs": epochs, "seed": 1}
        processor = DDAEImageProcessor.for_denoiser(make_unet().config)
        sets = {"train_dataset": coloured, "eval_dataset": coloured}
        model = make_model(make_unet())
        model.gradient_checkpointing_enable()
        made = arguments(folder, lr_scheduler_type="constant", **options)
        return Trainer(model, made, compute_metrics=accuracy, processing_class=processor, **sets)

    whole = trainer(tmp_path / "whole", 2)
    whole.train()
    assert len(scores) == 2 and whole.state.best_metric == max(scores)
    best = DDAEForImageClassification.from_pretrained(whole.state.best_model_checkpoint)
    for key, value in best.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[key])
    trainer(tmp_path / "part", 1).train()
    resumed = trainer(tmp_path / "part", 2)
    resumed.train(resume_from_checkpoint=get_last_checkpoint(tmp_path / "part"))
    assert resumed.state.global_step == whole.state.global_step == 6
    losses = [row["eval_loss"] for t in (whole, resumed) for row in t.state.log_history if "eval_loss" in row]
    assert losses[:2] == pytest.approx(losses[2:], rel=1e-5)
    resumed.save_model(tmp_path / "saved")
    assert DDAEImageProcessor.from_pretrained(tmp_path / "saved").size["height"] == 8


def softened(rows):
    """Give each image a probability of every class, as mixing does."""
    generator = torch.Generator().manual_seed(1)
    return [row | {"labels": torch.rand(3, generator=generator).softmax(0)} for row in rows]


class OwnNoise(Trainer):
    """Adds to every image noise of its own, in place of fresh one, so that runs can be compared."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        return super().compute_loss(model, inputs | {"noise": own_noise(inputs["pixel_values"])}, *args, **kwargs)


def own_noise(images):
    return torch.sin(50 * images)


def trained(folder, rows, size=12, steps=2, **options):
    """Return Trainer after some steps, and the losses of these."""
    made = arguments(
        folder, max_steps=steps, logging_steps=1, save_strategy="no", learning_rate=0.01, optim="sgd", max_grad_norm=0,
        lr_scheduler_type="constant", **options
    )  # fmt: skip
    made.per_device_train_batch_size = size
    trainer = OwnNoise(make_model(make_unet()), made, train_dataset=rows)
    trainer.train()
    return trainer, [row["loss"] for row in trainer.state.log_history if "loss" in row]


@torch.no_grad()
def expected_loss(model, rows, **options):
    batch = default_collate(rows)
    logits = model.eval()(batch["pixel_values"], noise=own_noise(batch["pixel_values"])).logits
    return pytest.approx(F.cross_entropy(logits, batch["labels"], **options).item(), rel=1e-5)


def test_trainer_takes_probabilities_in_training_and_classes_in_evaluation(coloured, tmp_path):
    trainer, losses = trained(tmp_path, softened(coloured))
    assert losses[0] == expected_loss(make_model(make_unet()), softened(coloured)) and losses[0] > 0.5
    for rows in (coloured, softened(coloured), coloured):
        assert trainer.evaluate(rows)["eval_loss"] == expected_loss(trainer.model, rows)
    trainer.train()
    assert trainer.model.config.problem_type is None


@pytest.mark.parametrize("prepare", [list, softened])
def test_accumulated_batches_are_one_large_batch(coloured, tmp_path, prepare):
    whole, losses = trained(tmp_path, prepare(coloured))
    parts, of_parts = trained(tmp_path, prepare(coloured), size=4, gradient_accumulation_steps=3)
    assert of_parts == pytest.approx(losses, rel=1e-5)
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(parts.model.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_trainers_label_smoothing_is_torchs(coloured, tmp_path):
    _, losses = trained(tmp_path, coloured, steps=1, label_smoothing_factor=0.2)
    assert losses == [expected_loss(make_model(make_unet()), coloured, label_smoothing=0.2)]


def three_steps(model, rows):
    batch = default_collate(rows)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        model(batch["pixel_values"], labels=batch["labels"], noise=own_noise(batch["pixel_values"])).loss.backward()
        optimizer.step()


TWO_PROCESSES = """
import sys
import torch
import torch.distributed
from torch.nn.parallel import DistributedDataParallel
from ddae_hf import DDAEForImageClassification
from tests.test_transformers import coloured_images, three_steps, trained

folder, rows = sys.argv[1], coloured_images()
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
plain = DDAEForImageClassification.from_pretrained(f"{folder}/start")
three_steps(DistributedDataParallel(plain), rows[rank::2])
found = {"plain": plain.state_dict()}
for checkpointing in (False, True):
    trainer, losses = trained(f"{folder}/trainer", rows, size=6, steps=3, gradient_checkpointing=checkpointing)
    assert trainer.args.world_size == 2 and isinstance(trainer.model_wrapped, DistributedDataParallel)
    found[f"checkpointing {checkpointing}"] = trainer.model.state_dict()
if rank == 0:
    torch.save(found, f"{folder}/found.pt")
torch.distributed.barrier()  # neither tears gloo's connections down while the other one is still at work
torch.distributed.destroy_process_group()
"""


def test_two_processes_train_as_one_does_with_their_images_together(coloured, tmp_path):
    """With torch's DistributedDataParallel as it is, and with Trainer; one start of two processes for both."""
    make_model(make_unet()).save_pretrained(tmp_path / "start")
    (tmp_path / "two.py").write_text(TWO_PROCESSES)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment["PYTHONPATH"] = str(Path(__file__).parent.parent)
    run = [*launch, str(tmp_path / "two.py"), str(tmp_path)]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "found.pt")
    plain = DDAEForImageClassification.from_pretrained(tmp_path / "start")
    three_steps(plain, coloured)
    alone, _ = trained(tmp_path / "alone", coloured, steps=3)
    start = make_model(make_unet()).state_dict()
    for name, states in found.items():
        expected = (plain if name == "plain" else alone.model).state_dict()
        for key, value in states.items():
            torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-6)
        assert not torch.equal(states["ddae.denoiser.conv_in.weight"], start["ddae.denoiser.conv_in.weight"])


def test_checkpointed_blocks_give_the_same_gradients(images):
    labels, noise = torch.tensor([0, 1, 2, 0, 1]), torch.randn(5, 3, 8, 8)
    for denoiser in (make_unet(), make_dit()):
        model = make_model(denoiser, layer=None).train()
        gradients = []
        for enabled in (False, True):
            if enabled:
                model.gradient_checkpointing_enable()
            model.zero_grad()
            model(images, labels=labels, noise=noise).loss.backward()
            gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        assert model.is_gradient_checkpointing and gradients[0].keys() == gradients[1].keys()
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], gradient)
        with pytest.raises(ValueError, match='use gradient_checkpointing_kwargs={"use_reentrant": False}'):
            model.gradient_checkpointing_enable({"use_reentrant": True})


@torch.no_grad()
@pytest.mark.parametrize("make", [make_unet, make_dit])
def test_attention_is_fused_or_plain_with_equal_results(images, make, tmp_path):
    make_model(make()).save_pretrained(tmp_path)
    fused = DDAEForImageClassification.from_pretrained(tmp_path)
    plain = DDAEForImageClassification.from_pretrained(tmp_path, attn_implementation="eager")

    def processors(model):
        return {type(m.processor).__name__ for m in model.modules() if hasattr(m, "processor")}

    assert processors(fused) == {"AttnProcessor2_0"} and processors(plain) == {"AttnProcessor"}
    torch.testing.assert_close(plain(images).logits, fused(images).logits, rtol=1e-4, atol=1e-5)
    plain.set_attn_implementation("sdpa")
    assert processors(plain) == {"AttnProcessor2_0"}
    with pytest.raises(ValueError, match="does not support Flash Attention 2"):
        DDAEForImageClassification.from_pretrained(tmp_path, attn_implementation="flash_attention_2")


@torch.no_grad()
def test_types_and_devices_are_those_asked_for(images, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "float32")
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(tmp_path / "bfloat16")
    for stored in ("float32", "bfloat16"):
        opened = DDAEForImageClassification.from_pretrained(tmp_path / stored, dtype="auto")
        assert str(opened.dtype) == f"torch.{stored}" and opened.ddae.fixed_noise.dtype == torch.float32
    expected = model(images).logits
    spread = {"ddae": "cpu", "feature_norm": "cpu", "classifier": "cpu"}
    for device_map in ("auto", "cpu", spread):
        opened = DDAEForImageClassification.from_pretrained(tmp_path / "float32", device_map=device_map)
        torch.testing.assert_close(opened(images).logits, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_weights_on_disk_give_the_same_logits(images, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    places = {"ddae": "disk", "feature_norm": "cpu", "classifier": "cpu"}
    opened = DDAEForImageClassification.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offloaded"
    )
    assert any(p.device.type == "meta" for p in opened.parameters())  # they are fetched when they are needed
    torch.testing.assert_close(opened(images).logits, model(images).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [make_unet, pytest.param(make_dit, marks=pytest.mark.slow)])
def test_onnxruntime_gives_the_same_logits(images, make, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = make_model(make())
    batch = torch.export.Dim("batch", min=2, max=63)  # diffusers' up-sampling branches on 64
    torch.onnx.export(
        model, (images,), tmp_path / "model.onnx", input_names=["pixel_values"], output_names=["logits"],
        dynamic_shapes={"pixel_values": {0: batch}}, verbose=False,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for count in (5, 2):
        (logits,) = session.run(["logits"], {"pixel_values": images[:count].numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(logits, model(images[:count]).logits, rtol=0, atol=1e-4)
