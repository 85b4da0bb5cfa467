"""Pictures are files that are complete, or not there."""

import pytest
from PIL import Image

from ddae_hf.experiments.plots import Picture, curves, image_grid, save_picture


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
