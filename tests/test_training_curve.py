"""Sweeps over the checkpoints of a training run, at tiny size, on real digits."""

import json
import shutil

import pytest
from PIL import Image

from ddae_hf.experiments import Images, sweep_run, training_curve
from ddae_hf.experiments.results import CurveReport

from . import commands
from .quiet import quiet
from .test_sweeping import checkpoint, save_checkpoint  # noqa: F401 (a fixture)

FEW = {"max_train_samples": 100, "max_test_samples": 50, "sigmas": [0.1], "num_noise_seeds": 1, "layers": ["mid_block"]}


@pytest.fixture
def run_folder(checkpoint, tmp_path):  # noqa: F811
    folder = tmp_path / "run"
    shutil.copytree(checkpoint, folder / "checkpoint-20")
    save_checkpoint(folder, seed=1)
    (folder / "train_results.json").write_text(json.dumps({"steps": 3}))
    return folder


def test_a_training_run_is_drawn_over_its_steps(run_folder, digits, tmp_path):
    options = ["--checkpoints", run_folder, "--dataset_name", digits, "--output_dir", tmp_path / "sweep"]
    options += ["--max_train_samples", "100", "--max_test_samples", "50", "--sigmas", "0.1", "--num_noise_seeds", "1"]
    options += ["--quality_extractor", f"ddae:{run_folder / 'checkpoint-20'}", "--num_quality_images", "50"]
    commands.run("sweep", *options, "--num_inference_steps", "2", "--layers", "mid_block")
    points = CurveReport.read(tmp_path / "sweep").points
    assert [point.step for point in points] == [3, 20]
    assert len({point.test_loss for point in points}) == len({point.frechet_distance for point in points}) == 2
    assert min(Image.open(tmp_path / "sweep" / "training_curve.png").size) > 200
    for name in ("eval_results.json", "classifier/config.json", "generation/generation_results.json"):
        assert (tmp_path / "sweep" / "checkpoint-20" / name).is_file()


def test_a_run_is_swept_without_a_folder(run_folder, digits, capsys):
    with quiet(capsys):
        report = sweep_run(run_folder, Images.open(str(digits)), **FEW)
    assert [point.step for point in report.points] == [3, 20] and report.points[0].frechet_distance is None
    assert "| 20 | `mid_block`, sigma 0.1 |" in report.table()


def test_the_loss_is_of_images_of_all_classes(run_folder, digits, monkeypatch):
    monkeypatch.setattr(training_curve, "LOSS_IMAGES", 15)
    seen, original = [], training_curve.Inputs.batches

    def watched(self, batch_size, rows=None, **options):
        if options["title"] == "loss on test images":
            seen.append(self.labels[rows])
        return original(self, batch_size, rows, **options)

    monkeypatch.setattr(training_curve.Inputs, "batches", watched)
    sweep_run(run_folder, Images.open(str(digits)), **FEW)
    assert [len(labels) for labels in seen] == [15, 15] and {len(set(labels)) for labels in seen} == {10}


def test_what_cannot_work_is_refused_at_once(run_folder, digits, tmp_path):
    options = ["--dataset_name", digits, "--output_dir", tmp_path / "sweep", "--checkpoints"]
    with pytest.raises(SystemExit, match="extractor ddae:nowhere cannot be used"):
        commands.run("sweep", *options, run_folder, "--quality_extractor", "ddae:nowhere")
    with pytest.raises(SystemExit, match="push_to_hub pushes one classifier"):
        commands.run("sweep", *options, run_folder, "--push_to_hub")
    (run_folder / "checkpoint-6").mkdir()
    with pytest.raises(SystemExit, match="checkpoint-6 is no checkpoint"):
        commands.run("sweep", *options, run_folder)
    with pytest.raises(SystemExit, match="no folder `checkpoint-STEP`"):
        commands.run("sweep", *options, tmp_path)
    assert not (tmp_path / "sweep").exists()
