"""The scripts as a user runs them, at tiny size, on real digits."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import generate
import linear_probe
import numpy as np
import pretrain
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression

from data import image_grid, parse_with_config
from ddae_hf import DDAEForImageClassification, DDAEImageProcessor, DDAEPipeline
from ddae_hf.checkpoints import build_denoiser

EXAMPLES = Path(__file__).parent.parent / "examples"
TINY = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": [32, 32], "layers_per_block": 1}
TINY |= {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}
TINY |= {"dropout": 0.1}  # so that resuming has its randomness to repeat


def train(digits, folder, *options):
    arguments = [
        "--dataset_name",
        str(digits),
        "--output_dir",
        str(folder),
        "--denoiser",
        json.dumps(TINY),
        "--seed",
        "1",
    ]
    arguments += [
        "--train_batch_size",
        "32",
        "--max_train_samples",
        "100",
        "--lr_warmup_steps",
        "2",
        "--num_samples",
        "4",
    ]
    arguments += ["--num_inference_steps", "2", "--sample_steps", "4", "--mixed_precision", "no", "--random_flip"]
    pretrain.main([*arguments, *options])


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train(digits, folder, "--max_train_steps", "8", "--checkpointing_steps", "5")
    return folder


def weights(folder):
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def test_pretraining_leaves_a_checkpoint_that_opens_and_says_how_it_was_made(trained):
    averaged, raw = DDAEPipeline.from_pretrained(trained), DDAEPipeline.from_pretrained(trained / "raw")
    difference = (averaged.denoiser.conv_in.weight - raw.denoiser.conv_in.weight).abs().max()
    assert 0 < difference < 0.1
    options = yaml.safe_load((trained / "training_options.yaml").read_text())
    assert options["seed"] == 1 and options["denoiser"] == TINY
    results = json.loads((trained / "train_results.json").read_text())
    assert results["steps"] == 8 and results["images_this_run"] == 8 * 32 and results["images_per_second"] > 0
    assert {f.name for f in (trained / "samples").iterdir()} == {"step-0000004.png", "step-0000008.png"}


def test_an_interrupted_run_resumes_exactly(trained, digits, tmp_path):
    """Step 5 is inside the second epoch of three batches."""
    (tmp_path / "checkpoint-5").symlink_to(trained / "checkpoint-5")
    train(
        digits, tmp_path, "--max_train_steps", "8", "--resume_from_checkpoint", "latest", "--checkpointing_steps", "100"
    )
    for part in (".", "raw"):
        expected, resumed = weights(trained / part), weights(tmp_path / part)
        assert all(torch.equal(expected[name], resumed[name]) for name in expected)


def test_resuming_another_or_a_finished_run_is_refused(trained, digits, tmp_path):
    (tmp_path / "checkpoint-5").symlink_to(trained / "checkpoint-5")
    resume = ["--resume_from_checkpoint", "latest", "--max_train_steps"]
    with pytest.raises(SystemExit, match="trained with other options: block_out_channels"):
        train(digits, tmp_path, *resume, "8", "--denoiser", json.dumps(TINY | {"block_out_channels": [32, 64]}))
    with pytest.raises(SystemExit, match="nothing left to train"):
        train(digits, tmp_path, *resume, "5")


def test_a_fresh_run_does_not_mix_with_an_earlier_one(trained, digits):
    with pytest.raises(SystemExit, match="holds checkpoints of an earlier run"):
        train(digits, trained, "--max_train_steps", "1")


def test_averaged_weights_follow_the_rule(digits, tmp_path):
    """EMA's decay at step n is min(decay, (1 + n) / (10 + n)), with n counted from 0 after the first step."""
    train(digits, tmp_path, "--max_train_steps", "3", "--checkpointing_steps", "1", "--learning_rate", "0.01")
    average = None
    for step in (1, 2, 3):
        raw, saved = (
            weights(tmp_path / f"checkpoint-{step}" / part)["conv_in.weight"].double() for part in ("raw", ".")
        )
        if average is None:
            average = saved
        else:
            decay = min(0.9999, step / (9 + step))
            average = decay * average + (1 - decay) * raw
        torch.testing.assert_close(saved, average, rtol=1e-5, atol=1e-6)


def test_old_checkpoints_are_dropped(digits, tmp_path):
    train(digits, tmp_path, "--max_train_steps", "3", "--checkpointing_steps", "1", "--checkpoints_total_limit", "2")
    assert {f.name for f in tmp_path.glob("*checkpoint*")} == {"checkpoint-2", "checkpoint-3"}


def test_accumulated_batches_are_counted_as_one_step(digits, tmp_path):
    """An epoch has three batches of 32: one step of two, and one of the one that is left."""
    train(
        digits, tmp_path, "--max_train_steps", "2", "--gradient_accumulation_steps", "2", "--checkpointing_steps", "2"
    )
    results = json.loads((tmp_path / "train_results.json").read_text())
    assert results["steps"] == 2 and results["images_this_run"] == 96


def test_a_run_can_start_from_a_checkpoint(trained, digits, tmp_path):
    arguments = ["--dataset_name", str(digits), "--output_dir", str(tmp_path), "--init_from", str(trained)]
    arguments += ["--max_train_steps", "1", "--learning_rate", "0", "--sample_steps", "0", "--train_batch_size", "8"]
    pretrain.main([*arguments, "--mixed_precision", "no"])
    before, after = weights(trained), weights(tmp_path)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_folder_of_images_is_a_data_set(tmp_path):
    for i in range(4):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(np.full((20, 16, 3), 60 * i, np.uint8)).save(tmp_path / "images" / f"{i}.png")
    arguments = ["--train_data_dir", str(tmp_path / "images"), "--output_dir", str(tmp_path / "out"), "--seed", "0"]
    arguments += [
        "--denoiser",
        json.dumps(TINY),
        "--max_train_steps",
        "1",
        "--train_batch_size",
        "2",
        "--sample_steps",
        "0",
    ]
    pretrain.main([*arguments, "--mixed_precision", "no"])
    assert DDAEPipeline.from_pretrained(tmp_path / "out").denoiser.config.sample_size == 8


def test_two_processes_train_one_network(digits, tmp_path):
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    launch += ["--config_file", str(EXAMPLES / "accelerate_configs" / "two_cpu_processes.yaml")]
    script = [str(EXAMPLES / "pretrain.py"), "--dataset_name", str(digits), "--output_dir", str(tmp_path / "two")]
    options = ["--denoiser", json.dumps(TINY), "--max_train_steps", "2", "--train_batch_size", "16", "--seed", "0"]
    options += ["--sample_steps", "0", "--checkpointing_steps", "2"]
    subprocess.run([*launch, *script, *options], check=True, env=environment, capture_output=True)
    results = json.loads((tmp_path / "two" / "train_results.json").read_text())
    assert results["processes"] == 2 and results["images_this_run"] == 64
    states = list((tmp_path / "two" / "checkpoint-2" / "state").glob("random_states_*.pkl"))
    assert len(states) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image_column", "picture"], "There is no column of images 'picture'"),
        (["--train_split", "validation"], "has no split 'validation'; it has"),
        (["--dataset_name", "nobody/nothing"], "cannot be read"),
        (["--train_data_dir", "nowhere", "--dataset_name", "x"], "Give one of"),
        (["--resolution", "16"], "--resolution is 16, but"),
        (["--denoiser", json.dumps(TINY | {"class_embed_type": "timestep"})], "Only unconditional"),
        (["--scheduler", '{"_class_name": "Nothing"}'], "must name a diffusers scheduler"),
        (["--scheduler", '{"rescale_betas_zero_snr": true}'], "zero-terminal SNR"),
        (["--denoiser", json.dumps(TINY | {"block_out_chanels": [32]})], "no options ['block_out_chanels']"),
        (["--denoiser", json.dumps(TINY | {"sample_size": 9})], "must be a multiple of 2"),
        (["--report_to", "wandb"], "that tracker is not installed"),
        (["--resume_from_checkpoint", "nowhere"], "there is no checkpoint with a training state"),
        (["--init_from", "somewhere"], "leave out --denoiser"),
        (["--train_batch_size", "0"], "must be at least 1"),
    ],
)
def test_pretraining_refuses_bad_input_before_it_trains(digits, tmp_path, capsys, options, message):
    with pytest.raises((SystemExit, ValueError)) as refusal:
        train(digits, tmp_path, "--max_train_steps", "1", *options)
    assert message in str(refusal.value) + capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_unreadable_or_empty_data_set_is_refused(tmp_path):
    from datasets import Features
    from datasets import Image as ImageFeature

    broken = {"image": [{"bytes": b"no image", "path": None}]}
    Dataset.from_dict(broken, Features({"image": ImageFeature()})).to_parquet(tmp_path / "broken.parquet")
    with pytest.raises(SystemExit, match="cannot be read"):
        train(tmp_path / "broken.parquet", tmp_path / "out")
    pq.write_table(Features({"image": ImageFeature()}).arrow_schema.empty_table(), tmp_path / "empty.parquet")
    with pytest.raises(SystemExit, match="empty|cannot be read"):
        train(tmp_path / "empty.parquet", tmp_path / "out")


def test_options_of_a_file_give_way_to_the_command_line(tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text("learning_rate: 1e-3\nlr_warmup_steps: 7\nrandom_flip: true\nema_decay:\n")
    args = pretrain.parse_arguments(["--config", str(config), "--lr_warmup_steps", "9", "--no-random_flip"])
    assert (args.learning_rate, args.lr_warmup_steps, args.random_flip, args.ema_decay) == (1e-3, 9, False, 0.9999)
    config.write_text("sigmas: [1e-2, 0.05]\nregularisation: 0.1\nmodel_name_or_path: somewhere")
    args = linear_probe.parse_arguments(["--config", str(config)])
    assert args.sigmas == [0.01, 0.05] and args.regularisation == [0.1] and args.model_name_or_path == "somewhere"
    config.write_text("mixed_precision: no")
    assert pretrain.parse_arguments(["--config", str(config)]).mixed_precision == "no"
    config.write_text("lr_scheduler: cosin")
    with pytest.raises(SystemExit):
        pretrain.parse_arguments(["--config", str(config)])
    assert "invalid choice: 'cosin'" in capsys.readouterr().err
    config.write_text("learning_speed: 1")
    with pytest.raises(SystemExit):
        pretrain.parse_arguments(["--config", str(config)])
    assert "unknown options ['learning_speed']" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["digits", "cifar10_cpu", "cifar10_ddpm"])
def test_configurations_name_networks_that_can_be_built(name):
    args = pretrain.parse_arguments(["--config", str(EXAMPLES / "configs" / f"{name}.yaml")])
    with torch.device("meta"):
        unet = build_denoiser({**pretrain.DENOISER, "sample_size": 32, **args.denoiser})
    count = sum(p.numel() for p in unet.parameters())
    expected = {"cifar10_ddpm": (35_746_307, 35_746_307), "cifar10_cpu": (1e6, 2e6), "digits": (0.5e6, 1e6)}[name]
    assert expected[0] <= count <= expected[1]


def test_generated_images_depend_on_their_number_alone(trained, tmp_path):
    options = ["--model_name_or_path", str(trained), "--num_inference_steps", "2"]
    generate.main([*options, "--num_images", "3", "--batch_size", "3", "--output_dir", str(tmp_path / "a")])
    generate.main([*options, "--num_images", "2", "--batch_size", "1", "--output_dir", str(tmp_path / "b")])
    first = (tmp_path / "b" / "00000.png").stat().st_mtime_ns
    generate.main([*options, "--num_images", "3", "--batch_size", "2", "--output_dir", str(tmp_path / "b")])
    assert (tmp_path / "b" / "00000.png").stat().st_mtime_ns == first
    for i in range(3):
        a, b = (np.asarray(Image.open(tmp_path / f / f"0000{i}.png"), dtype=int) for f in "ab")
        assert np.abs(a - b).max() <= 1
    assert Image.open(tmp_path / "b" / "grid.png").size == (2 * 65 - 1, 2 * 65 - 1)
    with pytest.raises(SystemExit, match="made with other options"):
        generate.main([*options, "--seed", "5", "--output_dir", str(tmp_path / "b")])
    with pytest.raises(SystemExit, match="made with other options or weights"):
        raw = ["--model_name_or_path", str(trained / "raw"), "--num_inference_steps", "2"]
        generate.main([*raw, "--output_dir", str(tmp_path / "b")])


@pytest.fixture(scope="module")
def probed(trained, digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("probed")
    options = ["--model_name_or_path", str(trained), "--dataset_name", str(digits), "--output_dir", str(folder)]
    options += ["--layers", "mid_block", "up_blocks.0.attentions.1", "--sigmas", "0.05", "0.3", "--baselines"]
    options += [
        "--labels_per_class",
        "10",
        "--num_draws",
        "3",
        "--max_train_samples",
        "600",
        "--max_test_samples",
        "150",
    ]
    linear_probe.main([*options, "--regularisation", "0.1", "1.0"])
    return folder


def test_the_probe_leaves_a_classifier_and_every_figure(probed, digits):
    report = json.loads((probed / "eval_results.json").read_text())
    assert list(report["results"]) == ["DDAE", "raw pixels", "untrained network"]
    for name, result in report["results"].items():
        assert 0.5 < result["test_accuracy"] <= 1 and len(result["few_label_test_accuracies"]) == 3
        best = max(t["validation_accuracy"] for t in result["tried"])
        assert result["validation_accuracy"] == best
        assert len(result["tried"]) == (2 if name == "raw pixels" else 8)
    model = DDAEForImageClassification.from_pretrained(probed)
    assert model.config.layer == report["results"]["DDAE"]["layer"] and model.config.id2label[3] == "3"
    processor = DDAEImageProcessor.from_pretrained(probed)
    test = Dataset.from_parquet(str(digits / "test.parquet")).select(range(150))
    with torch.no_grad():
        predicted = model(**processor(test["image"][:], return_tensors="pt")).logits.argmax(-1)
    accuracy = (predicted.numpy() == np.array(test["label"][:])).mean()
    assert accuracy == pytest.approx(report["saved_classifier_test_accuracy"])
    assert abs(accuracy - report["results"]["DDAE"]["test_accuracy"]) < 0.1
    assert Image.open(probed / "confusion.png").size[0] > 200


def test_the_saved_weights_are_scikit_learns_on_raw_features():
    rng = np.random.default_rng(0)
    features = rng.normal(3, [1, 10, 0.1], (200, 3))
    for classes in (2, 4):
        labels = rng.integers(0, classes, 200)
        scaler, model = linear_probe.fit(features, labels, 1.0)
        weight, bias = linear_probe.class_weights(model, classes)
        logits = (weight / scaler.scale_) @ features.T + (bias - weight / scaler.scale_ @ scaler.mean_)[:, None]
        probabilities = torch.softmax(torch.from_numpy(logits.T), -1).numpy()
        np.testing.assert_allclose(probabilities, model.predict_proba(scaler.transform(features)), atol=1e-8)


def test_a_class_without_training_images_never_wins():
    model = LogisticRegression().fit(np.array([[0.0], [1.0], [2.0]]), [0, 2, 3])
    weight, bias = linear_probe.class_weights(model, 5)
    logits = weight @ np.array([[0.0, 1.0, 2.0]]) + bias[:, None]
    assert set(logits.argmax(0)) <= {0, 2, 3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "up_blocks.8.resnets.0"], "There is no layer"),
        (["--sigmas", "-1"], "outside the schedule"),
        (["--label_column", "image"], "no column of integer labels 'image'"),
        (["--test_split", "holdout"], "has no split 'holdout'"),
        (["--labels_per_class", "1000"], "the smallest class has"),
        (["--model_name_or_path", "nowhere/at/all"], "is not a folder"),
    ],
)
def test_probing_refuses_bad_input_before_it_computes(trained, digits, tmp_path, options, message):
    arguments = [
        "--model_name_or_path",
        str(trained),
        "--dataset_name",
        str(digits),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    with pytest.raises((SystemExit, ValueError, OSError), match=message):
        linear_probe.main([*arguments, *options])
    assert not (tmp_path / "out").exists()


def test_labels_that_training_never_shows_are_refused(trained, tmp_path):
    from datasets import Features, Value
    from datasets import Image as ImageFeature

    features = Features({"image": ImageFeature(), "label": Value("int64")})
    for name, labels in {"train": [0, 1, 0, 1], "test": [0, 1, 2, 1]}.items():
        columns = {"image": [Image.fromarray(np.zeros((8, 8), np.uint8))] * 4, "label": labels}
        Dataset.from_dict(columns, features).to_parquet(tmp_path / f"{name}.parquet")
    options = ["--model_name_or_path", str(trained), "--dataset_name", str(tmp_path), "--label_column", "label"]
    with pytest.raises(SystemExit, match="Labels of the split 'test' are 0 to 2: allowed are 0 to 1"):
        linear_probe.main(options)


def test_grids_enlarge_without_smoothing():
    images = [Image.fromarray(np.full((8, 8), i * 60, np.uint8)) for i in range(3)]
    grid = np.asarray(image_grid(images, columns=2, min_side=16))
    assert grid.shape == (33, 33, 3) and (grid[:16, 17:] == 60).all() and (grid[17:, :16] == 120).all()
    assert math.prod(np.asarray(grid[17:, 17:] == 255).shape) and (grid[17:, 17:] == 255).all()


def test_a_config_that_is_not_there_is_named(capsys):
    import argparse

    with pytest.raises(SystemExit):
        parse_with_config(argparse.ArgumentParser(), ["--config", "nowhere.yaml"])
    assert "nowhere.yaml: there is no such file" in capsys.readouterr().err
