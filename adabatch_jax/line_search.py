"""Step sizes found on the batch at hand, for batches that are large enough to be trusted.

De, Yadav, Jacobs and Goldstein, "Automated Inference with Adaptive Batches", 2017: with a batch whose
gradient stands out from its noise (policy ``big_batch``), step sizes need no schedule. Pure functions
over pytrees.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from adabatch_jax import gradient_statistics

SUFFICIENT_DECREASE = 0.1  # c of the Armijo condition
MAX_HALVINGS = 30


def armijo(
    loss: Callable[[Any], jax.Array], params: Any, direction: Any, slope: jax.Array, start: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Halves a step size until ``loss(x + a d) <= loss(x) + c a slope``, with c = 0.1.

    Args:
      loss: of parameters, on one batch. Inside a mapped axis it has to be the same on every device.
      params: x.
      direction: d, a pytree like ``params``.
      slope: derivative of the loss along d at x; where it is not negative, d does not go downhill.
      start: the step size to try first.

    Returns:
      The step size, whether one was found, and where the next search begins. Where the slope is not
      negative, or the decrease asked for is lost in rounding, there is nothing to find: the step is
      ``start / 2**30``, and the next search begins at ``start``. Where ``MAX_HALVINGS`` did not suffice
      the step is 0, and the next search begins at the smallest that was tried.
    """
    before = loss(params)

    def asks(halvings, size):
        bound = before + SUFFICIENT_DECREASE * size * slope
        return bound, (halvings <= MAX_HALVINGS) & (bound < before)

    def fails(carry):
        moved = jax.tree.map(lambda x, d: x + carry[1] * d, params, direction)
        bound, goes_on = asks(*carry)
        return goes_on & ~(loss(moved) <= bound)  # a loss that is not a number fails

    halve = lambda carry: (carry[0] + 1, carry[1] / 2)  # noqa: E731
    halvings, size = lax.while_loop(fails, halve, (jnp.int32(0), start))
    _, is_found = asks(halvings, size)
    smallest, is_exhausted = start / 2**MAX_HALVINGS, halvings > MAX_HALVINGS
    following = jnp.where(is_found, size, jnp.where(is_exhausted, smallest, start))
    return jnp.where(is_found, size, jnp.where(is_exhausted, 0.0, smallest)), is_found, following


def barzilai_borwein(
    step: Any,
    gradient_change: Any,
    size: jax.Array,
    noise: jax.Array,
    fraction: float,
) -> jax.Array:
    """The step size to try next, from the curvature along the last step on the same batch.

    With the curvature ``v = <dx, dg> / |dx|^2`` the step size of a quadratic is 1 / v, which is taken
    back by the share of the gradient that is noise, and by the share of the data set that the batch is
    not::

        a <- a (1 - B/N) + (1 - noise) / v  B/N

    Args:
      step: dx, a pytree.
      gradient_change: dg, difference of the gradients of one batch after and before the step.
      size: a, of that step.
      noise: ``tr(Sigma) / (B |G_B|^2)``; 0 for the whole data set.
      fraction: B / N.

    Returns:
      The step size; ``size`` itself where the curvature is not positive, or all is noise.
    """
    squared = gradient_statistics.squared_norm(step)
    curvature = gradient_statistics.inner_product(step, gradient_change) / squared
    good = (curvature > 0) & (noise < 1) & jnp.isfinite(curvature)
    suggested = (1 - noise) / jnp.where(good, curvature, 1.0)
    return jnp.where(good, size * (1 - fraction) + suggested * fraction, size)
