"""L-BFGS (Liu and Nocedal 1989) on many independent functions at once, which torch's optimiser takes for one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

HISTORY = 10
_Evaluate = Callable[[Tensor], tuple[Tensor, Tensor]]


def minimise(
    evaluate: _Evaluate, variables: Tensor, tolerance: float, max_iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Minimise B independent smooth functions by L-BFGS, each along its own direction and with its own step length.

    Args:
        evaluate: Gives the functions' values (B,) and gradients (B, D) at variables (B, D).
        variables: Where to start.
        tolerance: A function is done when the quadratic model expects less than this from the next step.
        max_iterations: Where to stop in any case.

    Returns:
        Variables (B, D), values (B,), and which functions are done (B,): by the tolerance, or because rounding lets no
        further step descend.
    """
    value, gradient = evaluate(variables)
    history: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=HISTORY)
    scale = torch.ones_like(gradient[:, :1])
    done = torch.zeros(len(variables), dtype=torch.bool, device=variables.device)
    for _ in range(max_iterations):
        direction = _direction(gradient, history, scale)
        slope = (gradient * direction).sum(1)
        done |= -0.5 * slope < tolerance
        if done.all():
            break
        # What is done stays where it is, and keeps no other waiting.
        direction, slope = direction * ~done[:, None], slope * ~done
        step, new_value, new_gradient, found = _line_search(evaluate, variables, direction, value, slope)
        done |= ~found  # down to rounding
        moved = step[:, None] * direction
        change = new_gradient - gradient
        curvature = (moved * change).sum(1, keepdim=True)
        # A pair without curvature would spoil the model: it is left out.
        good = curvature > 1e-8 * moved.norm(dim=1, keepdim=True) * change.norm(dim=1, keepdim=True)
        history.append((moved * good, change * good, torch.where(good, 1 / curvature, 0.0)))
        scale = torch.where(good, curvature / change.square().sum(1, keepdim=True).clamp_min(1e-30), scale)
        variables, value, gradient = variables + moved, new_value, new_gradient
    return variables, value, done


def _direction(gradient: Tensor, history: Sequence[tuple[Tensor, Tensor, Tensor]], scale: Tensor) -> Tensor:
    """Return minus the approximate inverse Hessian times the gradient (B, D): the two loops of L-BFGS."""
    direction, shares = -gradient, []
    for moved, change, inverse in reversed(history):
        shares.append(inverse * (moved * direction).sum(1, keepdim=True))
        direction = direction - shares[-1] * change
    direction = direction * scale
    for moved, change, inverse in history:
        correction = inverse * (change * direction).sum(1, keepdim=True)
        direction = direction + (shares.pop() - correction) * moved
    return direction


def _line_search(
    evaluate: _Evaluate, variables: Tensor, direction: Tensor, value: Tensor, slope: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Halve each function's step until it descends (Armijo); one that never does keeps its place.

    Returns steps (B,), values and gradients there, and which functions found a step.
    """
    step = torch.ones_like(slope)
    for _ in range(20):
        new_value, gradient = evaluate(variables + step[:, None] * direction)
        found = new_value <= value + 1e-4 * step * slope
        if found.all():
            return step, new_value, gradient, found
        step = torch.where(found, step, 0.5 * step)
    step = torch.where(found, step, 0.0)
    new_value, gradient = evaluate(variables + step[:, None] * direction)
    return step, new_value, gradient, found
