r"""How much the loss rises near a point: the sharpness of Keskar et al.

Keskar, Mudigere, Nocedal, Smelyanskiy and Tang, "On Large-Batch Training for Deep Learning:
Generalization Gap and Sharp Minima", 2017, metric 2.1. With a matrix A of n x p, the box::

    C = { z in R^p : |z_i| <= epsilon (|(A+ x)_i| + 1) for all i }        A+: pseudo-inverse
    sharpness = 100 (max over y in C of f(x + A y) - f(x)) / (1 + f(x))

A is the identity for the whole space, or of independent standard normal numbers for a random subspace of
p dimensions. The maximum is looked for by 10 iterations of L-BFGS-B, so that the figure is a lower bound
of the true one. They begin at a random point of the box: at an exact minimum the gradient is zero, and
from there nothing would be found.

The figure depends on how the weights are scaled: two networks that compute the same function may differ
in it (Dinh et al., "Sharp Minima Can Generalize For Deep Nets", 2017). Compare only equal networks that
were trained in equal ways.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from jax.flatten_util import ravel_pytree


def sharpness(
    value_and_grad: Callable[[Any], tuple[float, Any]],
    params: Any,
    epsilon: float,
    iterations: int,
    dimensions: int = 0,
    seed: int = 0,
) -> float:
    """The sharpness of a loss at a point, in percent of ``1 + f``.

    0 or more; infinite where the loss in the box is not finite.

    Args:
      value_and_grad: f and its gradient, of a pytree of parameters. At a small ``epsilon`` f differs
        little within the box: add up losses in float64, see ``analysis.Loss``.
      params: x.
      epsilon: size of the box.
      iterations: of L-BFGS-B; the paper's are 10.
      dimensions: p, of a random subspace, whose matrix takes 4 n p bytes; 0 for the whole space.
      seed: of the subspace and of the point where the search begins.

    Raises:
      ValueError: epsilon is not positive, or the subspace has more dimensions than there are
        parameters.
    """
    from scipy import optimize  # scikit-learn needs it too

    flat, unravel = ravel_pytree(params)
    x, rng = np.asarray(flat, np.float64), np.random.default_rng(seed)
    if not epsilon > 0:
        raise ValueError(f'epsilon: got {epsilon}; accepted: a positive number')
    if not 0 <= dimensions <= x.size:
        raise ValueError(f'dimensions: got {dimensions}; accepted: 0 to {x.size}, the parameters')
    matrix = rng.standard_normal((x.size, dimensions), np.float32) if dimensions else None
    inside = x if matrix is None else np.linalg.solve(matrix.T @ matrix, matrix.T @ x)
    bounds = epsilon * (np.abs(inside) + 1)

    def negative(y):
        moved = x + (y if matrix is None else matrix @ y)
        loss, grads = value_and_grad(unravel(moved.astype(flat.dtype)))
        grads = np.asarray(ravel_pytree(grads)[0], np.float64)
        return -float(loss), -(grads if matrix is None else matrix.T @ grads)

    here = -negative(np.zeros_like(bounds))[0]
    found = optimize.minimize(
        negative,
        rng.uniform(-bounds, bounds),
        jac=True,
        method='L-BFGS-B',
        bounds=optimize.Bounds(-bounds, bounds),
        options={'maxiter': iterations},
    )
    rise = -float(found.fun) - here
    return 100 * max(0.0, rise) / (1 + here) if np.isfinite(rise) else np.inf
