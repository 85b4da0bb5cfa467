"""Many minimisations at once against closed forms and scipy."""

import numpy as np
import torch
from scipy.optimize import minimize, rosen, rosen_der

from ddae_hf.experiments.lbfgs import minimise


def test_quadratics_of_very_different_scale_all_reach_their_minimum():
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(4, 12, 12, generator=generator, dtype=torch.float64)
    matrices = factors @ factors.mT + 0.1 * torch.eye(12)
    matrices *= torch.tensor([1e-2, 1.0, 1e2, 1e3], dtype=torch.float64)[:, None, None]
    targets = torch.randn(4, 12, generator=generator, dtype=torch.float64)

    def evaluate(x):
        gradient = ((x - targets)[:, None] @ matrices).squeeze(1)
        return 0.5 * ((x - targets) * gradient).sum(1), gradient

    x, value, done = minimise(evaluate, torch.zeros(4, 12, dtype=torch.float64), 1e-14, 500)
    assert done.all() and value.max() < 1e-10
    torch.testing.assert_close(x, targets, rtol=1e-4, atol=1e-4)


def test_a_curved_valley_agrees_with_scipy():
    starts = np.array([[-1.2, 1.0], [2.0, -1.0], [0.3, 0.7]])

    def evaluate(x):
        points = x.numpy()
        values = np.array([rosen(p) for p in points]), np.array([rosen_der(p) for p in points])
        return torch.from_numpy(values[0]), torch.from_numpy(values[1])

    x, value, done = minimise(evaluate, torch.from_numpy(starts), 1e-12, 500)
    expected = [minimize(rosen, start, jac=rosen_der, method="L-BFGS-B").x for start in starts]
    assert done.all()
    np.testing.assert_allclose(x.numpy(), expected, atol=1e-3)


def test_what_is_solved_together_is_solved_as_it_would_be_alone():
    centres = torch.tensor([[1.0, -2.0], [30.0, 5.0]], dtype=torch.float64)

    def problem(centre):
        def evaluate(x):
            distance = x - centre
            return distance.pow(4).sum(1) + distance.square().sum(1), 4 * distance.pow(3) + 2 * distance

        return evaluate

    start = torch.zeros(2, 2, dtype=torch.float64)
    together, *_ = minimise(problem(centres), start, 1e-12, 200)
    for i in range(2):
        alone, *_ = minimise(problem(centres[i : i + 1]), start[i : i + 1], 1e-12, 200)
        torch.testing.assert_close(together[i], alone[0], rtol=1e-9, atol=1e-9)


def test_too_few_iterations_are_told():
    def evaluate(x):
        return x.pow(4).sum(1), 4 * x.pow(3)

    *_, done = minimise(evaluate, torch.full((1, 2), 100.0, dtype=torch.float64), 1e-12, 2)
    assert not done.any()
