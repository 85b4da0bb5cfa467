"""Points looked up in warped images, whose true places are known."""

import json

import pytest
import torch
from diffusers import DDPMScheduler

from ddae_hf import DDAEModel, DDAEPipeline
from ddae_hf.experiments import Images, correspondences, find_correspondences, main_directions
from ddae_hf.experiments.correspondences import Warp, match, pixels
from ddae_hf.experiments.results import CorrespondenceReport

from . import commands
from .conftest import make_unet

SIZE = (20, 28)
SEED = 3
LAYERS = ["mid_block", "up_blocks.0.attentions.0"]


@pytest.fixture
def checkpoint(tmp_path):
    DDAEPipeline.for_denoiser(make_unet(), DDPMScheduler()).save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def run(checkpoint, digits, folder, *options):
    arguments = ["--model_name_or_path", str(checkpoint), "--dataset_name", str(digits), "--output_dir", str(folder)]
    commands.run("correspondence", *arguments, "--max_samples", "2", *options)


def inside(places):
    x, y = places.real, places.imag
    return (x >= 0) & (y >= 0) & (x <= SIZE[1] - 1) & (y <= SIZE[0] - 1)


def coordinates():
    """Return an image whose colours are the places of its pixels."""
    return torch.view_as_real(pixels(SIZE)).reshape(*SIZE, 2).permute(2, 0, 1)


def test_a_warped_image_shows_at_a_place_what_the_map_says():
    for index in range(3):
        warp, places = Warp(SIZE, SEED, index), pixels(SIZE)
        assert (warp.places(places) - places).abs().max() > 1
        torch.testing.assert_close(warp.origins(warp.places(places)), places)
        origins = warp.origins(places)
        seen = torch.complex(*warp(coordinates()).flatten(1))
        torch.testing.assert_close(seen[inside(origins)], origins[inside(origins)])
        assert torch.equal(warp.places(places), Warp(SIZE, SEED, index).places(places))  # no other randomness
    assert not torch.equal(Warp(SIZE, SEED, 0).places(places), Warp(SIZE, SEED, 1).places(places))


def test_features_that_are_coordinates_find_every_point_and_random_ones_find_points_by_chance():
    warp, points = Warp(SIZE, SEED, 0), pixels(SIZE)
    points = points[inside(warp.places(points))]
    true = warp.places(points)
    origins = torch.view_as_real(warp.origins(pixels(SIZE))).reshape(*SIZE, 2).permute(2, 0, 1)
    assert ((match(coordinates(), origins, points) - true).abs() <= 1).all()
    generator = torch.Generator().manual_seed(0)
    original, warped = torch.randn(2, 16, *SIZE, generator=generator, dtype=torch.float64)
    found = ((match(original, warped, points) - true).abs() <= 4).double().mean()
    chance = ((pixels(SIZE) - true[:, None]).abs() <= 4).double().mean()
    assert abs(found - chance) < 0.05 and chance < 0.1


def test_figures_and_picture_are_a_function_of_the_options(checkpoint, digits, tmp_path, capsys):
    for name, options in (("a", []), ("b", []), ("other", ["--seed", "1"])):
        run(checkpoint, digits, tmp_path / name, "--layers", *reversed(LAYERS), "--sigma", "0.1", *options)
    a, b, other = (json.loads((tmp_path / name / "eval_results.json").read_text()) for name in ("a", "b", "other"))
    assert a["results"] == b["results"] != other["results"]
    assert a["layers"] == LAYERS and a["sigma"] == 0.1 and a["num_images"] == 2 and 0 < a["num_points"] <= 2 * 64
    assert (tmp_path / "a" / "correspondence.png").read_bytes() == (tmp_path / "b" / "correspondence.png").read_bytes()
    printed = capsys.readouterr().out
    for name, figures in a["results"].items():
        assert f"{figures['mean_error']:.2f}" in next(
            line for line in printed.splitlines() if line.startswith(f"| {name} |")
        )
    assert a["results"]["denoiser"] != a["results"]["random weights"]


def test_an_open_model_finds_what_its_checkpoint_does_and_stays_as_it_is(checkpoint, digits):
    images = Images.open(digits)
    options = {"layers": LAYERS, "max_samples": 2}
    model = DDAEModel.from_pretrained(checkpoint).train()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    found = find_correspondences(model, images, **options)
    assert found.results == find_correspondences(checkpoint, images, **options).results
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="open already, with another sigma than is asked for"):
        find_correspondences(model, images, sigma=1.5)


def test_one_image_has_a_picture(checkpoint, digits):
    assert len(find_correspondences(checkpoint, Images.open(digits), max_samples=1).picture().axes) == 2


def test_an_image_that_does_not_move_is_found_by_its_colours(checkpoint, digits, tmp_path, monkeypatch):
    for name in ("ROTATION", "SHIFT", "BEND"):
        monkeypatch.setattr(correspondences, name, 0.0)
    run(checkpoint, digits, tmp_path, "--sigma", "2")
    results = CorrespondenceReport.read(tmp_path).results
    assert results["5x5 patches"]["pck@1"] > 0.9  # but for patches that are there twice
    # Were its noise the same in both views, the network would find every point.
    assert results["denoiser"]["mean_error"] > 0


def test_wrong_options_are_refused(checkpoint, digits, tmp_path, capsys):
    for options, message in (
        (["--layers", "mid"], "mid.*mid_block"),
        (["--sigma", "1e9"], "sigma"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(checkpoint, digits, tmp_path / "out", *options)
    with pytest.raises(SystemExit):
        run(checkpoint, digits, tmp_path / "out", "--max_samples", "0")
    assert "max_samples is 0: it must be at least 1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_main_directions_are_those_of_most_variance_of_all_images_together():
    maps = torch.randn(2, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    maps *= torch.tensor([1, 30, 1, 300, 3])[:, None, None]
    shown = main_directions(maps)
    assert shown.shape == (2, 3, 8, 8) and shown.min() == 0 and shown.max() == 1
    for direction, channel in enumerate([3, 1, 4]):
        pair = torch.stack([shown[:, direction].flatten(), maps[:, channel].flatten()])
        assert torch.corrcoef(pair)[0, 1] > 0.95
    torch.testing.assert_close(main_directions(maps + 7), shown, atol=1e-3, rtol=0)
    assert main_directions(maps[:, :2])[:, 2].max() == 0  # of two channels there is no third
