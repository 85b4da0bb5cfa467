"""The commands on CIFAR-10, where the environment variable DDAE_CIFAR10_DIR names a folder of its parquet files."""

import json
import os

import pytest

from . import commands

DATA = os.environ.get("DDAE_CIFAR10_DIR", "")


@pytest.mark.slow
@pytest.mark.skipif(not DATA, reason="DDAE_CIFAR10_DIR is not set")
def test_a_short_run_on_cifar10_learns_features_better_than_chance(tmp_path):
    options = ["--dataset_name", DATA, "--output_dir", str(tmp_path / "checkpoint"), "--mixed_precision", "no"]
    options += ["--max_train_steps", "100", "--sample_steps", "0", "--checkpointing_steps", "1000"]
    commands.run("pretrain", "--config", "cifar10_cpu", *options)
    results = json.loads((tmp_path / "checkpoint" / "train_results.json").read_text())
    assert results["loss_last_100_batches"] < 1
    options = ["--model_name_or_path", str(tmp_path / "checkpoint"), "--dataset_name", DATA]
    options += ["--output_dir", str(tmp_path / "probe"), "--max_train_samples", "2000", "--max_test_samples", "1000"]
    commands.run("probe", *options)
    report = json.loads((tmp_path / "probe" / "eval_results.json").read_text())
    accuracy = report["test_accuracies"]["0"]
    assert accuracy > 0.2
    options[options.index(str(tmp_path / "probe"))] = str(tmp_path / "sweep")
    commands.run("sweep", *options, "--sigmas", "0.05", "--num_noise_seeds", "1")
    report = json.loads((tmp_path / "sweep" / "eval_results.json").read_text())
    assert report["test_accuracies"]["0"] > accuracy - 0.03
