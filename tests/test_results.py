"""Reports: what is written is read again, tables have every figure once, and earlier versions' files are understood."""

import dataclasses
import json
import re
import statistics

import numpy as np
import pytest

from ddae_hf.experiments.calibration import Calibration
from ddae_hf.experiments.denoising_report import SavedClassifier
from ddae_hf.experiments.devices import machine
from ddae_hf.experiments.models import base_model
from ddae_hf.experiments.noise_curve import Difference, NoiseCurve
from ddae_hf.experiments.outlier_scores import Separation
from ddae_hf.experiments.pairs import Pair, Point, Probe
from ddae_hf.experiments.publishing import read_reports
from ddae_hf.experiments.report import in_memory, markdown, percent, spread
from ddae_hf.experiments.results import (
    CorrespondenceReport,
    CurveReport,
    DenoisingClassifierReport,
    FineTuningReport,
    GenerationReport,
    NoisyReport,
    OutlierReport,
    PretrainingReport,
    ProbeReport,
    Report,
    VAEReport,
)

FIRST = Pair(layer="mid_block", sigma=0.25, validation_accuracy=0.5, l2=1e-3, by_l2={"0.001": 0.5}, knn_20=0.25)
PAIRS = [FIRST, Pair(layer="up|down", sigma=0.5, validation_accuracy=0.25, alignment=0.1, uniformity=-2.0)]
CURVE = NoiseCurve(
    layer="mid_block", sigmas=[0.1, 0.25, 1.0], accuracies=[0.4, 0.5, 0.1], shape="inner peak", peak=0.25,
    intervals=[[0.2, 0.6], [0.3, 0.7], [0.0, 0.3]],
    differences=[Difference(sigmas=[0.1, 0.25], gain=0.1, p=0.03), Difference(sigmas=[0.25, 1.0], gain=-0.4, p=1e-6)],
)  # fmt: skip
PIXELS = Probe(
    best=Pair(layer="pixels", sigma=0.0),
    test_accuracies={"3": 0.25, "4": 0.5},
    few_label_test_accuracies={"5": [0.1, 0.4]},
)
SETS = {"num_images": 50, "frechet_distance": 12.5, "kernel_distance": 0.002, "precision": 0.75, "recall": 0.5}
REPORTS = [
    PretrainingReport(steps=3, loss_last_100_batches=0.5, images=96, parameters=1234567, seconds=7.5),
    VAEReport(steps=3, held_out={"psnr": 20.5, "num_images": 12}, scaling_factor=0.75, seconds=2.0),
    ProbeReport(
        options={"seed": 0, "num_views": 2, "random_flip": True, "random_crop": 0, "num_noise_samples": 2},
        checkpoint="somewhere",
        images={"fitted": 40, "held_out": 10, "train": 50, "test": 30},
        pairs=PAIRS,
        best=FIRST,
        test_accuracies={"3": 0.5, "4": 0.75},
        test_f1=0.625,
        few_label_test_accuracies={"5": [0.2, 0.3]},
        baselines={"raw pixels": PIXELS},
        calibration=Calibration(
            calibration_error=0.05,
            negative_log_likelihood=0.25,
            temperature=1.5,
            calibration_error_at_temperature=0.02,
            negative_log_likelihood_at_temperature=0.125,
        ),
        noise_curve=CURVE,
        saved_classifier_test_accuracy=0.875,
        seconds={"levels": 1.0, "in_all": 2.0},
        dataset={"name": "some", "num_images": 50},
    ),
    CurveReport(points=[Point(step=5, layer="mid_block", sigma=0.25, test_accuracy=0.5, test_loss=0.125)]),
    FineTuningReport(
        options={"seed": 0, "from_scratch": False, "latents_dir": "latents"},
        layer="mid_block",
        sigma=0.5,
        num_train_labels=1500,
        num_test_images=30,
        steps=7,
        test_accuracy=0.5,
        test_f1=0.25,
        test_own_noise_accuracy=0.75,
        saved_classifier_test_accuracy=0.375,
    ),
    NoisyReport(
        options={"sigmas": [0.1, 1.0]},
        num_train_images=50,
        num_test_images=30,
        chance=0.1,
        trained_parameters={"MLP": 12},
        test_accuracies={"MLP": [0.5, 0.25], "WRN": [0.75, 0.125]},
    ),
    GenerationReport(
        generator={"num_inference_steps": 18, "sampler": "heun", "seed": 0, "weights": "ab" * 32, "class_label": [1, 2]}
        | {"num_classes": [50, 60], "guidance_scale": 2.0},
        extractor={"name": "ddae:/home/someone/net", "width": 64, "layer": "mid_block", "sigma": 0.5},
        reference={"num_images": 100, "name": "real (train)", "source": "some"},
        results={
            "generated": SETS | {"kernel_distance_std_over_subsets": 0.0001, "another": 3.25},
            "real (test)": {**SETS, "kernel_distance_std_over_subsets": None},
        },
    ),
    CorrespondenceReport(
        layers=["mid_block"],
        sigma=0.05,
        num_images=2,
        num_points=1234,
        results={"denoiser": {"pck@1": 0.5, "mean_error": 1.25}, "pixels": {"pck@1": 0.25, "mean_error": 4.5}},
    ),
    DenoisingClassifierReport(
        options={"image_sigmas": [0.0, 0.5], "stage_draws": [2, 3], "stage_classes": [2, 1], "error": "l1"}
        | {"noise_seed": 0},
        num_images=40,
        classes=["cat", "dog", "rat"],
        told=["a cat", "a dog", "a rat"],
        levels=[0.25, 0.5, 1.0],
        draws=[2, 3],
        calls=[6, 8],
        gflop_a_call=1.5,
        accuracies=[[0.5, 0.75], [0.25, 0.5]],
        beside={
            "probe": SavedClassifier(layer="mid", sigma=0.1, same_denoiser=True, gflop=0.5, accuracies=[0.625, 0.125])
        },
    ),
    OutlierReport(
        options={"scores": ["error", "nearest"], "num_draws": 2, "noise_seed": 0, "seed": 1},
        layer="mid_block",
        sigma=0.25,
        num_features=32,
        num_train_images=50,
        num_images=30,
        outside={"noise": {"num_images": 20, "split": "test"}},
        separations={
            "distance": {"noise": Separation(auroc=0.75, auroc_interval=[0.5, 1], fpr95=0.5, fpr95_interval=[0.25, 1])}
        },
    ),
]
KINDS = [type(report) for report in REPORTS]


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: report.kind)
def test_what_is_written_is_read_again(report, tmp_path):
    report = dataclasses.replace(report, **machine("cpu"), **base_model("someone/base"))
    path = report.write(tmp_path / "new")
    assert path == tmp_path / "new" / report.file and report.folder == path.parent
    options = {} if isinstance(report, PretrainingReport) else {"options": report.options}
    for found in (Report.read(path), type(report).read(path), type(report).read(path.parent)):
        assert found == report and type(found) is type(report) and found.folder == path.parent
        assert {"options": found.options} == options or not options
    content = json.loads(path.read_text())
    assert "folder" not in content and None not in content.values() and content["versions"]["torch"]
    first = report.table()
    assert Report.read(path).table() == first and first.splitlines()[0].endswith((".", "%."))


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: report.kind)
def test_tables_have_as_many_cells_in_every_row(report):
    section = report.section()
    assert {len(row) for row in section.rows} == {len(section.head)} and section.rows
    lines = [line for line in report.table().splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert not any("None" in line or "nan" in line for line in lines)


def test_one_spread_is_used_everywhere_and_named():
    values = [0.1, 0.25, 0.7]
    assert spread(values) == f"{100 * statistics.mean(values):.2f} ± {100 * statistics.stdev(values):.2f}"
    assert spread([0.25]) == percent(0.25) == "25.00"
    table = REPORTS[2].table()
    assert "Figures with ± are mean ± standard deviation over 2 noise seeds, or 2 draws of few labels." in table
    assert f"| all 50 | {spread([0.5, 0.75])} | 62.50 |" in table
    assert f"| 5 a class | {spread([0.2, 0.3])} |" in table


def test_a_probe_tells_what_was_chosen_how():
    report = REPORTS[2]
    table = report.table()
    assert "best of 2 pairs of layer and noise level was chosen on 10 held-out training images (seed 0)" in table
    assert "in 2 views, the first as it is, the others mirrored at random" in table and "over 2 draws of noise" in table
    assert "chosen with all labels" in table and "`mid_block`, sigma 0.25 | 5 a class" in table
    assert "The saved classifier's test accuracy, with its fixed noise, is 87.50 %." in table
    gain = spread([0.2 - 0.1, 0.3 - 0.4])  # draw by draw
    assert f"| raw pixels |  | 5 a class | {spread([0.1, 0.4])} |  | {gain} |" in table
    one = dataclasses.replace(report, pairs=[FIRST], few_label_test_accuracies={}, test_accuracies={"3": 0.5})
    assert "their regularisation was chosen on 10 of them" in one.table() and "±" not in one.section().protocol
    online = dataclasses.replace(one, options={"protocol": "batch_norm", "seed": 0})
    assert "(batch norm)" in online.table() and "regularisation" not in online.table()
    figures = {figure.metric: (figure.value, figure.conditions["noise_seed"]) for figure in report.section().figures}
    assert figures == {"accuracy": (0.5, 3), "f1": (0.625, 3)}


def test_a_probe_tells_how_calibrated_it_is_and_the_shape_over_noise_levels(tmp_path):
    report = REPORTS[2]
    table = report.table()
    assert "the accuracy of `mid_block` on the 10 held-out images has an inner peak" in table
    assert "+10.00 points from sigma 0.1 to 0.25 (p = 0.03)" in table
    assert " and -40.00 points from sigma 0.25 to 1 (p < 0.0001), in exact McNemar tests" in table
    assert "expected calibration error on the test images is 5.00 %" in table and "temperature of 1.500" in table
    read = ProbeReport.read(report.write(tmp_path))
    assert read.noise_curve == CURVE and read.calibration == report.calibration
    first = dataclasses.replace(FIRST, correct="ff80", temperature=2.0)  # bits are for the sweep itself
    path = dataclasses.replace(report, best=first, pairs=[first]).write(tmp_path)
    assert "correct" not in path.read_text() and ProbeReport.read(path).best.temperature == 2.0
    old = dataclasses.replace(report, calibration=None, noise_curve=None)
    content = json.loads(old.write(tmp_path).read_text())
    assert not {"calibration", "noise_curve"} & content.keys()
    assert ProbeReport.read(tmp_path) == old and "calibration" not in old.table() and "Holm" not in old.table()


def test_a_new_figure_of_generation_shows_by_itself():
    section = REPORTS[6].section()
    assert section.head[-1] == "another" and section.rows[0][-1] == "3.25" and section.rows[1][-1] == ""
    assert "`ddae:net` (`mid_block` at sigma 0.5, 64 numbers" in section.protocol  # no path of a machine
    assert section.rows[0][3] == "2 ± 0.1" and section.rows[1][3] == "2"
    assert "the classes 1, 2 (images of the first 50 of 60), guidance 2" in section.protocol
    assert "by heun in 18 steps, with seeds from 0, weights `abababababababab`" in section.protocol
    assert [figure.metric for figure in section.figures] == ["frechet_distance"]


def test_what_lives_in_memory_is_not_in_the_file(tmp_path):
    @dataclasses.dataclass(kw_only=True)
    class Result(NoisyReport):
        classifier: object = in_memory()

    result = Result(**vars(REPORTS[5]), classifier=object())
    result.options["sigmas"] = [np.float64(0.1), 1.0]
    result.num_test_images = np.int64(30)
    path = result.write(tmp_path)
    assert "classifier" not in json.loads(path.read_text())
    assert type(Report.read(path)) is NoisyReport and type(Result.read(path)) is Result
    assert NoisyReport in Report.kinds and Result not in Report.kinds


def test_an_old_probe_is_read_as_a_probe(tmp_path):
    tried = [
        {"layer": "a", "sigma": 0.1, "C": 0.1, "validation_accuracy": 0.5},
        {"layer": "a", "sigma": 0.1, "C": 1.0, "validation_accuracy": 0.25},
        {"layer": "b", "sigma": 0.1, "C": 1.0, "validation_accuracy": 0.375},
    ]
    figures = {"test_accuracy": 0.625, "test_f1": 0.5, "few_label_test_accuracies": [0.1, 0.2]}
    pixels = {"layer": "pixels", "sigma": 0.0, "C": 1.0, "tried": [], "test_accuracy": 0.25, "test_f1": 0.125}
    old = {
        "options": {"labels_per_class": 7, "noise_seed": 3, "max_selection_samples": 100, "seed": 1}
        | {"dataset_name": "/home/someone/digits", "train_split": "train", "num_noise_samples": 1},
        "num_train_images": 211,
        "num_test_images": 97,
        "results": {
            "DDAE": {**tried[0], "tried": tried, **figures},
            "raw pixels": pixels | {"few_label_test_accuracies": [0.0, 0.1]},
        },
        "saved_classifier_test_accuracy": 0.75,
        "seconds": 3.5,
        "hardware": {"cpu": "some"},
    }
    (tmp_path / "eval_results.json").write_text(json.dumps(old))
    report = ProbeReport.read(tmp_path)
    assert report.images == {"fitted": 80, "held_out": 20, "train": 211, "test": 97}
    assert [(pair.layer, pair.validation_accuracy) for pair in report.pairs] == [("a", 0.5), ("b", 0.375)]
    assert (report.best.layer, report.test_accuracies, report.test_f1) == ("a", {"3": 0.625}, 0.5)
    assert report.few_label_test_accuracies == {"7": [0.1, 0.2]} and report.baselines["raw pixels"].test_f1 == 0.125
    assert report.dataset == {"name": "digits", "train_split": "train"} and report.hardware == {"cpu": "some"}
    report.write(tmp_path)
    assert ProbeReport.read(tmp_path) == report


def test_a_sweep_of_the_first_version_is_read(tmp_path):
    """It did not note how many images it trained on, nor F1."""
    best = {"layer": "a", "sigma": 0.1, "validation_accuracy": 0.5, "l2": 0.001, "by_l2": {"0.001": 0.5}}
    old = {
        "options": {"seed": 0, "protocol": "paper", "num_views": 1},
        "images": {"fitted": 8, "held_out": 2, "test": 5},
    }
    old |= {"checkpoint": "x", "pairs": [best], "best": best, "test_accuracies": {"0": 0.5}}
    old |= {"few_label_test_accuracies": {}, "saved_classifier_test_accuracy": 0.5, "seconds": {"in_all": 3.0}}
    (tmp_path / "eval_results.json").write_text(json.dumps(old))
    report = Report.read(tmp_path / "eval_results.json")
    assert report.images["train"] == 10 and report.best.l2 == 0.001 and len(report.section().figures) == 1


def test_folders_are_read_in_order_and_copies_once(tmp_path):
    folders = [tmp_path / name for name in "abcd"]
    for folder in folders:
        folder.mkdir()
    REPORTS[0].write(folders[1])
    (folders[1] / "training_options.yaml").write_text("seed: 3\ndataset_name: /home/someone/digits\n")
    dataclasses.replace(REPORTS[0], steps=4).write(folders[2])
    for folder in folders[2:]:
        REPORTS[4].write(folder)
    REPORTS[6].write(folders[3])
    training, reports = read_reports(folders)
    assert training.steps == 3 and training.options["seed"] == 3 and training.dataset == {"name": "digits"}
    assert [report.kind for report in reports] == ["fine_tuning", "generation"]
    assert read_reports(folders[:1]) == (None, [])


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"eval_accuracy": 0.5}', "holds eval_accuracy: allowed are the results of .*linear probe"),
        ("{}", "holds nothing"),
        ("[]", "holds a list"),
        ("{", "cannot be read"),
        ('{"pairs": []}', "missing 2 required .*: 'best' and 'test_accuracies'"),
        (
            '{"pairs": [], "images": {"train": 1, "fitted": 1, "held_out": 1}}',
            "cannot be understood: .*missing 2 required",
        ),
        ('{"pairs": 3, "images": {"train": 1, "fitted": 1, "held_out": 1}, "best": {}}', "cannot be understood"),
        ('{"results": {}, "options": {}}', "cannot be understood: 'num_train_images'"),
    ],
)
def test_a_file_that_is_no_report_is_refused(content, message, tmp_path):
    (tmp_path / "eval_results.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        Report.read(tmp_path / "eval_results.json")


def test_a_report_of_another_kind_is_refused(tmp_path):
    REPORTS[4].write(tmp_path)
    with pytest.raises(ValueError, match="allowed are the results of linear probe. Remove it"):
        ProbeReport.read(tmp_path)
    with pytest.raises(OSError, match="generation_results.json"):
        GenerationReport.read(tmp_path)


def test_cells_keep_their_place():
    assert markdown(["a|b", "c"], [["1", 2]]) == "| a\\|b | c |\n| --- | --- |\n| 1 | 2 |"
