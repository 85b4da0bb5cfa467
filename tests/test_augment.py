"""Changes of images: each is one of those that it may be, drawn as it should be.

Of non-leaking augmentation: what the labels say is what was done, and nothing leaks into the checkpoint.
"""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, EDMEulerScheduler

from ddae_hf import DDAEPipeline
from ddae_hf.augment import (
    NUM_LABELS,
    _resample,
    _rotation,
    _scaling,
    augment,
    embed_labels,
    mirror,
    mixup,
    random_changes,
    random_crop,
    random_flip,
    reduced,
)
from ddae_hf.diffusion import Diffusion
from ddae_hf.experiments.draws import augment_view
from ddae_hf.networks import network_of

from .conftest import make_dit, make_unet


@pytest.fixture
def pictures():
    return torch.rand(2000, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def seed_torch():
    torch.manual_seed(0)


def shifts(image, changed, padding, **border):
    """Return by how much an image (C, H, W) was shifted to give another, wherever that is so: (down, right)."""
    height, width = image.shape[1:]
    padded = np.pad(image.numpy(), [(0, 0), (padding, padding), (padding, padding)], **border)
    places = [(top, left) for top in range(2 * padding + 1) for left in range(2 * padding + 1)]
    windows = (padded[:, top : top + height, left : left + width] for top, left in places)
    return [place for place, window in zip(places, windows, strict=True) if np.array_equal(window, changed.numpy())]


def are_pictures(images, pictures):
    """Return which images (B,) are bit-equal to pictures."""
    return (images == pictures).flatten(1).all(dim=1)


def test_a_mirror_turns_left_and_right_around():
    rows = torch.arange(6.0).reshape(1, 1, 2, 3)
    assert mirror(rows).tolist() == [[[[2, 1, 0], [5, 4, 3]]]]


def test_a_flip_mirrors_about_half_and_leaves_the_others_as_they_are(pictures):
    seed_torch()
    images = random_flip(pictures)
    same, mirrored = are_pictures(images, pictures), are_pictures(images, pictures.flip(-1))
    assert (same ^ mirrored).all() and mirrored.float().mean().item() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("padding", [0, 1, 3])
def test_a_crop_is_a_shift_of_the_reflected_image_and_every_shift_comes(padding):
    images = torch.rand(600, 2, 5, 6, generator=seeded())
    seed_torch()
    seen = set()
    for image, crop in zip(images, random_crop(images, padding), strict=True):
        (place,) = shifts(image, crop, padding, mode="reflect")
        seen.add(place)
    assert len(seen) == (2 * padding + 1) ** 2


@pytest.mark.parametrize("padding", [-1, 5, 6])
def test_a_crop_needs_a_padding_that_can_be_reflected(padding):
    with pytest.raises(ValueError, match=rf"padding is {padding}: it must be at least 0, and smaller than both sides"):
        random_crop(torch.zeros(1, 1, 5, 6), padding)


def test_flip_and_crop_draw_only_what_is_asked_for(pictures):
    for flip, padding in [(False, 0), (True, 0), (False, 2), (True, 2)]:
        seed_torch()
        images = random_changes(pictures, flip, padding)
        state = torch.get_rng_state()
        seed_torch()
        expected = random_flip(pictures) if flip else pictures
        expected = random_crop(expected, padding) if padding else expected
        assert torch.equal(images, expected) and torch.equal(state, torch.get_rng_state())


def test_a_view_depends_on_seed_index_and_view_alone(pictures):
    pictures, numbers = pictures[:64], torch.randperm(64, generator=seeded()).tolist()
    whole = augment_view(pictures, range(64), 0, 1, True, 2)
    assert whole.shape == pictures.shape
    assert torch.equal(augment_view(pictures[10:20], range(10, 20), 0, 1, True, 2), whole[10:20])
    assert torch.equal(augment_view(pictures[numbers], np.array(numbers), 0, 1, True, 2), whole[numbers])
    state = torch.get_rng_state()
    for number in (0, 33):
        alone = augment_view(pictures[number : number + 1], [number], 0, 1, True, 2)
        assert torch.equal(alone, whole[number : number + 1])
    assert torch.equal(state, torch.get_rng_state())
    for numbers, seed, view in [(range(64), 1, 1), (range(64), 0, 2), (range(1, 65), 0, 1)]:
        assert are_pictures(augment_view(pictures, numbers, seed, view, True, 2), whole).float().mean() < 0.2


def test_views_are_mirrored_half_of_the_time(pictures):
    views = augment_view(pictures, range(2000), 0, 1, True, 0)
    same, mirrored = are_pictures(views, pictures), are_pictures(views, pictures.flip(-1))
    assert (same ^ mirrored).all() and mirrored.float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert torch.equal(augment_view(pictures, range(2000), 0, 1, False, 0), pictures)


def test_views_are_shifts_with_black_borders(pictures):
    views = augment_view(pictures[:200], range(200), 0, 1, False, 1)
    seen = set()
    for image, view in zip(pictures, views, strict=False):
        (place,) = shifts(image, view, 1, mode="constant", constant_values=-1)
        seen.add(place)
    assert len(seen) == 9


def test_mixup_mixes_images_and_targets_alike():
    """Images that are their targets are mixed into what their targets are mixed into, each with its own share."""
    targets, shares = torch.eye(40), torch.linspace(0, 1, 40)
    others = targets.roll(1, 0)
    images, other_images = (each[:, :, None, None].expand(40, 40, 2, 2) for each in (targets, others))
    images, mixed = mixup(images, targets, other_images, others, shares)
    assert images.shape == (40, 40, 2, 2) and torch.equal(images, mixed[:, :, None, None].expand_as(images))
    torch.testing.assert_close(mixed.diag(), shares)
    torch.testing.assert_close(mixed.roll(1, 1).diag(), 1 - shares)
    torch.testing.assert_close(mixed.sum(1), torch.ones(40))


def test_reduced_images_are_means_of_what_their_pixels_cover(pictures):
    halved = pictures.unflatten(3, (4, 2)).unflatten(2, (4, 2)).mean((3, 5))
    torch.testing.assert_close(reduced(pictures, 4), halved)
    assert torch.equal(reduced(pictures, 8), pictures) and reduced(pictures, 3).shape == (2000, 1, 3, 3)


def test_probability_zero_changes_nothing_and_labels_are_zero(pictures):
    images, labels = augment(pictures, 0.0, seeded())
    assert torch.equal(images, pictures) and labels.shape == (2000, NUM_LABELS) and not labels.any()


def test_images_with_zero_labels_are_untouched_and_others_are_not(pictures):
    images, labels = augment(pictures, 0.12, seeded())
    untouched = ~labels.any(dim=1)
    assert torch.equal(images[untouched], pictures[untouched])
    assert (images[~untouched] != pictures[~untouched]).flatten(1).any(dim=1).all()
    # Mirrored half of the time, 12 % mirrored upside down half of the time, 12 % each of four others.
    expected = 0.5 * (1 - 0.06) * 0.88**4
    assert untouched.float().mean().item() == pytest.approx(expected, abs=0.04)


def test_only_the_horizontal_mirror_is_always_on(pictures):
    images, labels = augment(pictures, 1e-12, seeded())
    mirrored = labels[:, 0] == 1
    assert mirrored.float().mean().item() == pytest.approx(0.5, abs=0.05) and not labels[:, 1:].any()
    assert torch.equal(images[mirrored], pictures[mirrored].flip(-1))


def test_the_distributions_are_the_papers(pictures):
    labels = augment(pictures.repeat(5, 1, 1, 1), 1.0, seeded())[1]
    assert labels[:, 1].mean().item() == pytest.approx(0.5, abs=0.03)
    for normal in (2, 7, 8):  # scale and shifts, in units of their deviation
        assert labels[:, normal].mean().abs() < 0.05 and labels[:, normal].std().item() == pytest.approx(1, abs=0.03)
    torch.testing.assert_close((labels[:, 3] + 1) ** 2 + labels[:, 4] ** 2, torch.ones(10_000))
    angles = torch.atan2(labels[:, 4], labels[:, 3] + 1)
    assert torch.histc(angles, 8, -math.pi, math.pi).sub(1250).abs().max() < 5 * 1250**0.5
    assert labels[:, 5:7].square().sum(1).mean().item() == pytest.approx(1, abs=0.05)


def where(labels, point, sign):
    """Return where a point of the image goes, by the labels: coordinates from -1 to 1, to the right and downwards."""
    x, y = point
    mirrored, upside_down, scale, cos, sin, stretch_cos, stretch_sin, right, down = labels.double().tolist()
    x, y = (-x if mirrored else x), (-y if upside_down else y)
    x, y = x * 2 ** (0.2 * scale), y * 2 ** (0.2 * scale)
    x, y = (cos + 1) * x - sin * y, sin * x + (cos + 1) * y
    stretch, direction = sign * math.hypot(stretch_cos, stretch_sin), math.atan2(stretch_sin, stretch_cos)
    along, across = x * math.cos(direction) + y * math.sin(direction), y * math.cos(direction) - x * math.sin(direction)
    along, across = along * 2 ** (0.2 * stretch), across / 2 ** (0.2 * stretch)
    x, y = (
        along * math.cos(direction) - across * math.sin(direction),
        along * math.sin(direction) + across * math.cos(direction),
    )
    return x + right / 4, y + down / 4


def test_labels_say_where_a_spot_goes():
    """One bright spot in a picture of 64 pixels; a stretch along a direction is labelled as one across its opposite."""
    side, point = 64, (0.25, -0.1)
    grid = (torch.arange(side) + 0.5) / side * 2 - 1
    spot = torch.exp(-((grid[None] - point[0]) ** 2 + (grid[:, None] - point[1]) ** 2) / 0.005)
    images, labels = augment((2 * spot - 1).expand(300, 1, side, side), 1.0, seeded())
    inside = 0
    for image, label in zip(images, labels, strict=True):
        places = [where(label, point, sign) for sign in (1, -1)]
        if max(abs(v) for place in places for v in place) > 0.9:
            continue
        inside += 1
        pixels = [[round((v + 1) / 2 * side - 0.5) for v in place] for place in places]
        assert max(image[0, y, x].item() for x, y in pixels) > 0.5
    assert inside > 200
    assert (images > 0.5).float().mean() < 0.01  # elsewhere it is dark


def test_right_angles_and_mirrors_move_pixels_exactly(pictures):
    images, some = pictures[:4], torch.ones(4, dtype=torch.bool)
    quarter = _resample(images, _rotation(torch.full((4,), -math.pi / 2)), some)
    torch.testing.assert_close(quarter, images.rot90(-1, (2, 3)), rtol=0, atol=1e-5)
    upside_down = _resample(images, _scaling(1, -1, torch.ones(4)), some)
    torch.testing.assert_close(upside_down, images.flip(2), rtol=0, atol=1e-5)


def test_images_stay_in_range_and_type(pictures):
    images, _ = augment(pictures.bfloat16(), 1.0, seeded())
    assert images.dtype == torch.bfloat16 and images.abs().max() <= 1


@pytest.mark.parametrize("probability", [-0.1, 1.5, math.nan])
def test_probabilities_are_checked(pictures, probability):
    with pytest.raises(ValueError, match="must be between 0 and 1"):
        augment(pictures, probability)


def test_images_must_be_square():
    with pytest.raises(ValueError, match="8x4 pixels came"):
        augment(torch.zeros(1, 1, 8, 4))


def test_a_trained_network_reads_labels_and_saves_as_an_unconditional_one(images, tmp_path):
    plain, unet = make_unet(), make_unet()
    network = network_of(unet)
    network.accept_vectors(unet, NUM_LABELS)
    labels = torch.zeros(5, NUM_LABELS)
    width = network.vector_width(unet)
    fed = [embed_labels(labels, width), embed_labels(labels + 1, width)]
    timestep = torch.zeros(5)
    with torch.no_grad():
        none, some = (unet(images, timestep, class_labels=numbers).sample for numbers in fed)
        assert torch.equal(none, plain(images, timestep).sample) and not torch.allclose(some, none)
    loss = Diffusion(unet, EDMEulerScheduler()).loss(images, condition=fed[1])
    assert loss.shape == (5,) and loss.isfinite().all()
    DDAEPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    for pipeline in (DDPMPipeline, DDAEPipeline):
        opened = pipeline.from_pretrained(tmp_path).unet
        assert opened.class_embedding is None and opened.config.class_embed_type is None
        assert all(torch.equal(a, b) for a, b in zip(opened.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (make_unet(num_class_embeds=3), "a class-conditional UNet2DModel came"),
        (make_dit(), "a DiTTransformer2DModel came"),
        (make_unet(time_embedding_dim=8), "has 8 channels: labels need 9"),
    ],
)
def test_networks_that_take_no_augmentation_labels_are_refused(network, message):
    with pytest.raises(ValueError, match=message):
        network_of(network).accept_vectors(network, NUM_LABELS)
