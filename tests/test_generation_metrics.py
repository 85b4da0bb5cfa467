"""Distances between sets of features: closed forms, float64 formulas, scikit-learn and torch-fidelity."""

import builtins
import warnings

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.neighbors import NearestNeighbors

from ddae_hf.experiments.generation_metrics import frechet_distance, kernel_distance, precision_recall


def draw(count, width, seed, scale=1.0, shift=0.0):
    """Correlated features, far from the origin."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((count, width)) @ np.random.default_rng(9).standard_normal((width, width))
    return torch.from_numpy(scale * mixed + 20 + shift).float()


@pytest.fixture
def real():
    return draw(300, 8, 0)


@pytest.fixture
def generated():
    return draw(200, 8, 1, scale=1.3, shift=0.5)


def frechet_formula(real, generated):
    first, second = real.double().numpy(), generated.double().numpy()
    cov_1, cov_2 = np.cov(first.T), np.cov(second.T)
    root = scipy.linalg.sqrtm(cov_1 @ cov_2).real
    return np.sum((first.mean(0) - second.mean(0)) ** 2) + np.trace(cov_1 + cov_2 - 2 * root)


def test_frechet_is_the_formula(real, generated):
    assert frechet_distance(real, generated) == pytest.approx(frechet_formula(real, generated), rel=1e-9)


def test_frechet_of_a_set_with_itself_is_zero(real):
    assert abs(frechet_distance(real, real)) < 1e-8 * real.var(0).sum()
    assert abs(frechet_distance(real, real.flip(0))) < 1e-8 * real.var(0).sum()


def test_frechet_of_gaussians_with_one_set_of_axes():
    """Two diagonal covariances: the squared differences of means and of standard deviations, summed."""
    signs = torch.tensor(np.stack(np.meshgrid(*[[-1.0, 1.0]] * 4), -1).reshape(-1, 4))
    unit = signs * np.sqrt(15 / 16)  # 16 points of mean 0 and covariance 1, divided by N - 1
    stds = torch.tensor([[1.0, 2.0, 0.5, 3.0], [1.5, 1.0, 0.5, 2.0]], dtype=torch.float64)
    means = torch.tensor([[0.0, 1.0, 2.0, -4.0], [0.5, 1.0, -1.0, 100.0]], dtype=torch.float64)
    first, second = (unit * std + mean for std, mean in zip(stds, means, strict=True))
    expected = (means[0] - means[1]).square().sum() + (stds[0] - stds[1]).square().sum()
    assert frechet_distance(first, second) == pytest.approx(expected.item(), rel=1e-9)


def test_every_figure_is_the_same_in_turned_space_and_in_another_order(real, generated):
    rotation = torch.from_numpy(scipy.linalg.qr(np.random.default_rng(3).standard_normal((8, 8)))[0])
    turned = [(x.double() @ rotation)[torch.randperm(len(x))] for x in (real, generated)]
    assert frechet_distance(*turned) == pytest.approx(frechet_distance(real, generated), rel=1e-9)
    assert precision_recall(*turned) == precision_recall(real, generated)
    first, second = real[:200].double(), generated.double()
    options = {"subsets": 1, "subset_size": 200}
    expected = kernel_distance(first, second, **options)[0]
    assert kernel_distance(first @ rotation, second.flip(0) @ rotation, **options)[0] == pytest.approx(expected)


def test_distances_do_not_mind_which_set_is_real(real, generated):
    assert frechet_distance(real, generated) == pytest.approx(frechet_distance(generated, real), rel=1e-9)
    assert precision_recall(real, generated) == precision_recall(generated, real)[::-1]


def kernel_formula(first, second):
    """The unbiased estimate, written as sums over pairs."""
    count, width = first.shape

    def kernel(x, y):
        return (x @ y / width + 1) ** 3

    pairs = [(i, j) for i in range(count) for j in range(count)]
    within = sum(kernel(x[i], x[j]) for x in (first, second) for i, j in pairs if i != j) / (count * (count - 1))
    return within - 2 * sum(kernel(first[i], second[j]) for i, j in pairs) / count**2


def test_the_kernel_distance_of_whole_sets_is_the_unbiased_estimate(real, generated):
    first, second = real[:40], generated[:40]
    mean, spread = kernel_distance(first, second, subsets=3, subset_size=40)
    assert mean == pytest.approx(kernel_formula(first.double().numpy(), second.double().numpy()), rel=1e-9)
    assert spread < 1e-9 * abs(mean)


def test_the_kernel_distance_of_one_distribution_is_zero_on_average():
    """As an unbiased estimate is; a biased one would be above 0 by as much as the spread or more."""
    first, second = (torch.from_numpy(np.random.default_rng(seed).standard_normal((4000, 4))) for seed in (0, 1))
    mean, spread = kernel_distance(first, second, subsets=200, subset_size=20)
    assert abs(mean) < 4 * spread / 200**0.5 + 0.02 and spread > 0.01
    other = second + 1
    assert kernel_distance(first, other, subsets=200, subset_size=20)[0] > 10 * abs(mean)


def test_subsets_depend_on_the_seed_alone(real, generated):
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    first = kernel_distance(real, generated, subsets=5, subset_size=50, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(7)
    assert kernel_distance(real, generated, subsets=5, subset_size=50, seed=1) == first
    assert kernel_distance(real, generated, subsets=5, subset_size=50, seed=2)[0] != pytest.approx(first[0], rel=1e-6)
    assert first[1] > 0


def manifold_formula(real, generated, k):
    def share(points, of):
        radii = NearestNeighbors(n_neighbors=k + 1, algorithm="brute").fit(of).kneighbors(of)[0][:, -1]
        return np.mean([(np.linalg.norm(of - point, axis=1) <= radii).any() for point in points])

    return share(generated, real), share(real, generated)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_precision_and_recall_are_those_of_scikit_learns_neighbours(k):
    real, generated = draw(150, 3, 0), draw(120, 3, 1, scale=1.6)
    expected = manifold_formula(real.double().numpy(), generated.double().numpy(), k)
    found = precision_recall(real, generated, k)
    assert found == pytest.approx(expected, abs=1e-12)
    assert all(0 < share < 1 for share in found)


@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
def test_chunks_change_nothing(real, generated, chunk_size):
    assert precision_recall(real, generated, chunk_size=chunk_size) == precision_recall(real, generated)


def test_a_set_lies_among_itself_and_not_among_one_far_away(real):
    assert precision_recall(real, real) == (1.0, 1.0)
    repeated = real[:20].repeat(5, 1)  # more copies than neighbours: the radius is 0
    assert precision_recall(repeated, repeated.flip(0)) == (1.0, 1.0)
    assert precision_recall(real, real + 1000) == (0.0, 0.0)


def test_one_mode_of_two_is_precise_and_recalls_half():
    first, second = draw(100, 4, 0), draw(100, 4, 1) + 500
    assert precision_recall(torch.cat([first, second]), first) == (1.0, 0.5)
    assert precision_recall(first, torch.cat([first, second])) == (0.5, 1.0)


def test_too_few_images_for_a_covariance_are_told():
    with pytest.warns(UserWarning, match="8 images came for features of 8 numbers: their covariance is singular"):
        frechet_distance(draw(8, 8, 0), draw(50, 8, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frechet_distance(draw(9, 8, 0), draw(50, 8, 1))


FIGURES = [frechet_distance, kernel_distance, precision_recall]


@pytest.mark.parametrize("figure", FIGURES)
def test_features_that_cannot_be_compared_are_refused(figure, real):
    options = {"subset_size": 10} if figure is kernel_distance else {}
    with pytest.raises(ValueError, match=r"shapes \(300, 8\) and \(300, 7\)"):
        figure(real, real[:, :7], **options)
    with pytest.raises(ValueError, match=r"must be \(N, C\)"):
        figure(real[0], real[0], **options)
    with pytest.raises(ValueError, match="there must be at least"):
        figure(real, real[:1], **options)
    broken = real.clone()
    broken[3, 2], broken[3, 3], broken[5, 0] = torch.nan, torch.inf, torch.nan
    with pytest.raises(ValueError, match="2 of 300 generated images have features that are not finite"):
        figure(real, broken, **options)
    with pytest.raises(ValueError, match="2 of 300 real images"):
        figure(broken, real, **options)


def test_options_that_cannot_work_are_refused(real):
    with pytest.raises(ValueError, match="at least 1000 images of each kind"):
        kernel_distance(real, real)
    with pytest.raises(ValueError, match="0 subsets of 10 images are asked for"):
        kernel_distance(real, real, subsets=0, subset_size=10)
    with pytest.raises(ValueError, match="100 subsets of 1 images"):
        kernel_distance(real, real, subset_size=1)
    with pytest.raises(ValueError, match="k is 0"):
        precision_recall(real, real, k=0)
    with pytest.raises(ValueError, match="at least 4 images of each kind"):
        precision_recall(real, real[:3])


def test_without_torchmetrics_it_says_what_to_install(monkeypatch, real):
    found = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("torchmetrics"):
            raise ImportError(name)
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    for figure in (frechet_distance, lambda a, b: kernel_distance(a, b, subset_size=10)):
        with pytest.raises(ImportError, match="pip install 'torchmetrics>=1.6'"):
            figure(real, real)


def test_figures_are_torch_fidelitys(real, generated):
    pytest.importorskip("torch_fidelity", exc_type=ImportError)
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kernel_mmd
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    statistics = [fid_features_to_statistics(features.double()) for features in (generated, real)]
    expected = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(real, generated) == pytest.approx(expected, rel=1e-6)
    kernel = {"kid_kernel": "poly", "kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None}
    expected = kernel_mmd(generated.double().numpy(), real[:200].double().numpy(), kid_kernel_poly_coef0=1, **kernel)
    assert kernel_distance(real[:200], generated, subset_size=200)[0] == pytest.approx(expected, rel=1e-6)
    # Its versions differ in which set they take first.
    expected = calculate_precision_recall_full(generated.double(), real.double(), 3)
    assert sorted(precision_recall(real, generated)) == pytest.approx(sorted(expected), abs=1e-6)
