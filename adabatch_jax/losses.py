"""Losses of single examples by name: of logits ``[n, classes]`` and labels int32 ``[n]``, ``[n]``."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

Loss = Callable[[jax.Array, jax.Array], jax.Array]
HUBER_WIDTH = 0.5  # half of the width of the quadratic piece of the hinge loss


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """``log sum_c exp z_c - z_y``, of softmax regression."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def squared(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """``1/2 sum_c (z_c - [c = y])^2``, of least squares."""
    return jnp.sum(jnp.square(logits - jax.nn.one_hot(labels, logits.shape[-1])), -1) / 2


def hinge(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The sum over classes, each against the rest, of a hinge loss with a rounded corner.

    Of the margin m, ``z_c`` for the own class and ``-z_c`` for others: 0 above 1.5, ``1 - m`` below
    0.5, ``(1.5 - m)^2 / 2`` between: the smooth form that variance reduction needs (Rosset and Zhu,
    "Piecewise Linear Regularized Solution Paths", 2007). The gradient of an example beyond all margins
    is exactly 0.
    """
    own = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    beyond = 1 + HUBER_WIDTH - jnp.where(own, logits, -logits)
    quadratic = jnp.square(beyond) / (4 * HUBER_WIDTH)
    losses = jnp.where(
        beyond <= 0, 0.0, jnp.where(beyond < 2 * HUBER_WIDTH, quadratic, beyond - HUBER_WIDTH)
    )
    return jnp.sum(losses, -1)


LOSSES = {'cross_entropy': cross_entropy, 'squared': squared, 'hinge': hinge}


def residuals(loss: Loss, logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The derivative of each example's loss by its own logits, ``[n, classes]``."""
    return jax.grad(lambda z: jnp.sum(loss(z, labels)))(logits)
