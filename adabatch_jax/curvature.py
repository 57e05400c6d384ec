r"""Curvature of a loss: products with its Hessian, and what they tell of the eigenvalues.

With the loss ``f(w) = l(z(w))`` of outputs z, Jacobian J = dz/dw and H_z the Hessian of l::

    H v = (J' H_z J + sum_k dl/dz_k d2z_k/dw2) v        Hessian
    G v = J' H_z J v                                     Gauss-Newton matrix: no eigenvalue below 0
                                                         where l is convex (Schraudolph, 2002)

for the cost of a few gradients, without a matrix (Pearlmutter, "Fast Exact Multiplication by the
Hessian", 1994); Naumov, "Feedforward and Recurrent Neural Networks Backward Propagation and Hessian in
Matrix Form", 2017, has the same products written out. Everything here is a function of a fixed loss:
the examples, BatchNorm's statistics and dropout are the caller's to fix.

The classic example, softmax regression with one example x and equally likely classes::

    >>> import jax, jax.numpy as jnp
    >>> from adabatch_jax import curvature
    >>> x = jnp.array([3.0, 4.0])
    >>> loss = lambda w: -jax.nn.log_softmax(x @ w)[0]
    >>> product = lambda v: curvature.hessian_product(loss, jnp.zeros((2, 5)), v)
    >>> found = curvature.lanczos(product, jnp.zeros((2, 5)), num_steps=10)
    >>> [round(float(value), 4) for value in found.values[:5]]  # |x|^2 / 5, four times, then 0
    [5.0, 5.0, 5.0, 5.0, 0.0]
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.flatten_util import ravel_pytree

# A vector whose part outside the space so far is smaller than this share of it adds nothing to it:
# products in float32 are wrong by as much.
_INVARIANT = 1e-5


class Eigenvalues(NamedTuple):
    """Approximate eigenvalues of a symmetric matrix, from Lanczos' method.

    Attributes:
      values: float64 ``[num_steps]``, from the largest to the smallest. Those at both ends are right
        first.
      residuals: float64 ``[num_steps]``, ``|A y - value y|`` for the unit vector y that belongs to each:
        there is an eigenvalue no farther away than that, but for what the products lose by rounding,
        which is taken to be one unit in the last place of the largest value.
    """

    values: np.ndarray
    residuals: np.ndarray


class Trace(NamedTuple):
    """An estimate of a trace, and the standard error of that estimate."""

    value: float
    error: float


def hessian_product(loss: Callable[[Any], jax.Array], params: Any, vector: Any) -> Any:
    """``H v`` of a scalar loss, a pytree like ``params``.

    In reverse mode twice, which the models' convolutions can do on every backend; H is symmetric.
    """
    _, product = jax.vjp(jax.grad(loss), params)
    return product(vector)[0]


def gauss_newton_product(
    outputs: Callable[[Any], jax.Array],
    loss: Callable[[jax.Array], jax.Array],
    params: Any,
    vector: Any,
) -> Any:
    """``J' H_z J v``, a pytree like ``params``.

    Args:
      outputs: z of parameters, an array such as the logits of a batch.
      loss: scalar, of z.
      params: where to take it.
      vector: v, a pytree like ``params``.
    """
    z, to_params = jax.vjp(outputs, params)
    _, to_outputs = jax.vjp(lambda u: to_params(u)[0], jax.numpy.zeros_like(z))  # linear: J'' = J
    along = to_outputs(vector)[0]
    return to_params(jax.jvp(jax.grad(loss), (z,), (along,))[1])[0]


def lanczos(product: Callable[[Any], Any], like: Any, num_steps: int, seed: int = 0) -> Eigenvalues:
    """Eigenvalues of a symmetric matrix from ``num_steps`` products with it.

    Lanczos' method with every new vector made orthogonal to all before it, twice, in float64 (Parlett,
    "The Symmetric Eigenvalue Problem", section 6.9): none is found twice that is there once. Where the
    space that is spanned is invariant it goes on with a random vector orthogonal to it, and so finds
    multiple eigenvalues as often as they are there, with as many steps as there are dimensions.

    Args:
      product: ``A v`` of a pytree v.
      like: a pytree of v's shapes and dtypes.
      num_steps: products to take; no more than there are dimensions are taken.
      seed: of the random vectors.

    Returns:
      As many as there were steps; not numbers where a product is not finite.
    """
    flat, unravel = ravel_pytree(like)
    size, rng = flat.size, np.random.default_rng(seed)
    num_steps = min(num_steps, size)
    basis = np.zeros((num_steps, size))
    diagonal, beside = np.zeros(num_steps), np.zeros(num_steps)  # of the tridiagonal matrix
    basis[0], dropped = _unit(rng.normal(size=size)), 0.0
    for k in range(num_steps):
        result = product(unravel(np.asarray(basis[k], flat.dtype)))
        following = np.array(ravel_pytree(result)[0], np.float64)
        if not np.isfinite(following).all():  # of a run that diverged
            return Eigenvalues(*np.full((2, num_steps), np.nan))
        scale = np.linalg.norm(following)
        diagonal[k] = basis[k] @ following
        for _ in range(2):
            following -= basis[: k + 1].T @ (basis[: k + 1] @ following)
        beside[k] = np.linalg.norm(following)
        if k + 1 == num_steps:
            break
        if beside[k] <= _INVARIANT * max(scale, np.abs(diagonal[: k + 1]).max()):
            dropped, beside[k] = max(dropped, beside[k]), 0.0
            following = rng.normal(size=size)
            for _ in range(2):
                following -= basis[: k + 1].T @ (basis[: k + 1] @ following)
        basis[k + 1] = _unit(following)
    matrix = np.diag(diagonal) + np.diag(beside[:-1], 1) + np.diag(beside[:-1], -1)
    values, vectors = np.linalg.eigh(matrix)
    last = beside[-1] if num_steps < size else 0.0
    rounding = np.finfo(flat.dtype).eps * np.abs(values).max()
    residuals = np.maximum(last * np.abs(vectors[-1]), rounding) + dropped
    return Eigenvalues(values[::-1], residuals[::-1])


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def trace(product: Callable[[Any], Any], like: Any, num_samples: int, seed: int = 0) -> Trace:
    """The trace of a symmetric matrix, from products with random signs.

    The mean of ``v' A v`` over vectors v of +1 and -1 is unbiased, with the variance ``2 sum of A_ij^2
    over i != j`` of one sample (Hutchinson, "A Stochastic Estimator of the Trace of the Influence
    Matrix", 1990).

    Args:
      product: ``A v`` of a pytree v.
      like: a pytree of v's shapes and dtypes.
      num_samples: at least 2, so that the error can be told.
      seed: of the signs.

    Raises:
      ValueError: fewer than 2 samples.
    """
    if num_samples < 2:
        raise ValueError(f'num_samples: got {num_samples}; needs at least 2')
    flat, unravel = ravel_pytree(like)
    rng, found = np.random.default_rng(seed), []
    for _ in range(num_samples):
        signs = rng.choice((-1.0, 1.0), size=flat.size)
        result = ravel_pytree(product(unravel(signs.astype(flat.dtype))))[0]
        found.append(signs @ np.asarray(result, np.float64))
    return Trace(float(np.mean(found)), float(np.std(found, ddof=1) / math.sqrt(num_samples)))
