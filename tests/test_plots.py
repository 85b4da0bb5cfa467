"""Pictures are files that are complete, or not there."""

import numpy as np
import pytest
import torch
from PIL import Image

from ddae_hf.experiments.calibration import reliability
from ddae_hf.experiments.pairs import Pair
from ddae_hf.experiments.plots import (
    Picture,
    accuracy_over_sigma,
    curves,
    image_grid,
    reliability_diagram,
    save_picture,
)
from ddae_hf.experiments.report import accuracy_interval


def test_a_picture_is_written_as_png_whatever_it_is_made_of(tmp_path):
    save_picture(curves([1.0, 2.0], {"a": [3.0, 4.0]}, title="", xlabel="", ylabel=""), tmp_path / "figure.png", dpi=50)
    save_picture(image_grid([Image.new("L", (8, 8))] * 4), tmp_path / "grid.png")
    assert Image.open(tmp_path / "figure.png").format == Image.open(tmp_path / "grid.png").format == "PNG"
    assert Image.open(tmp_path / "grid.png").size == (129, 129)


def test_a_picture_that_cannot_be_finished_leaves_the_one_before(tmp_path, monkeypatch):
    save_picture(Image.new("L", (8, 8)), tmp_path / "it.png")
    before = (tmp_path / "it.png").read_bytes()

    def stops(self, path, **options):
        path.write_bytes(before[:9])
        raise KeyboardInterrupt

    monkeypatch.setattr(Picture, "savefig", stops)
    with pytest.raises(KeyboardInterrupt):
        save_picture(Picture(), tmp_path / "it.png")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("it.png", before)]


def drawn_intervals(axes):
    """The ends of the error bars of every line that has some, by its label."""
    return {
        each.get_label(): np.array([segment[:, 1] for segment in each[2][0].get_segments()])
        for each in axes.containers
        if each.has_yerr
    }


def test_accuracy_over_noise_levels_has_the_best_layers_intervals():
    accuracies = {("a", 0.1): 0.5, ("a", 1.0): 0.25, ("b", 1.0): 0.75, ("b", 0.1): 1.0}
    pairs = [Pair(layer=layer, sigma=sigma, validation_accuracy=value) for (layer, sigma), value in accuracies.items()]
    axes = accuracy_over_sigma(pairs, pairs[3], 40).axes[0]
    (found,) = drawn_intervals(axes).values()
    np.testing.assert_allclose(found, 100 * np.array([accuracy_interval(1.0, 40), accuracy_interval(0.75, 40)]))
    assert [text.get_text() for text in axes.get_legend().get_texts()][1] == "b, with 95 % intervals"


@pytest.mark.parametrize("temperature", [None, 2.0])
def test_a_reliability_diagram_shows_bins_with_images_and_the_calibration_error(temperature):
    rng = np.random.default_rng(0)
    logits, labels = torch.from_numpy(rng.normal(0, 3, (60, 4))), rng.integers(0, 4, 60)
    upper, lower = reliability_diagram(logits, labels, temperature).axes
    found = drawn_intervals(upper)
    assert len(found) == len(lower.patches) == (1 if temperature is None else 2)
    for (name, ends), divisor in zip(found.items(), (1, temperature), strict=False):
        bins = reliability(logits / divisor, labels)
        assert name.endswith(f"calibration error {100 * bins.error:.2f} %")
        some = bins.count > 0
        expected = [accuracy_interval(*each) for each in zip(bins.accuracy[some], bins.count[some], strict=True)]
        np.testing.assert_allclose(ends, 100 * np.array(expected), atol=1e-9)
