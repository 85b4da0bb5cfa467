"""Which training images are near by their features, and which images are like none of them."""

import torch

from ddae_hf.demo.nearness import Nearness


def normal(count, seed):
    """Features whose scales and offsets differ by much."""
    drawn = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
    return drawn * torch.tensor([1e-2, 1, 10, 1e3]) + torch.tensor([0, 5, -20, 1e4])


def test_one_in_a_hundred_others_is_strange_and_what_is_far_in_any_direction_too():
    nearness = Nearness(normal(2000, 0), normal(2000, 1))
    strange = [nearness.strangeness(image[None]) > 1 for image in normal(1000, 2)]
    assert 2 <= sum(strange) <= 25
    for channel in range(4):
        far = normal(2000, 0).mean(0, keepdim=True)
        far[0, channel] += 10 * normal(2000, 0)[:, channel].std()
        assert nearness.strangeness(far) > 2


def test_the_nearest_are_those_of_standardised_features():
    train = normal(50, 0)
    nearness = Nearness(train, normal(20, 1))
    distances, places = nearness.nearest(train[7:9], 3)
    assert places[:, 0].tolist() == [7, 8] and distances[:, 0].max() < 1e-2
    expected = ((train - train[7]) / train.std(0, correction=0)).norm(dim=1)
    assert places[0].tolist() == expected.argsort()[:3].tolist()
    torch.testing.assert_close(distances[0, 1:], expected.sort().values[1:3])


def test_more_neighbours_than_images_are_all_images():
    assert Nearness(normal(4, 0), normal(3, 1)).nearest(normal(1, 2), 9)[1].shape == (1, 4)


def test_a_feature_that_never_varies_is_no_hindrance():
    train = torch.cat([normal(50, 0), torch.ones(50, 1)], dim=1)
    others = torch.cat([normal(20, 1), torch.ones(20, 1)], dim=1)
    assert 0 < Nearness(train, others).limit < 100
