r"""Gradient variance and noise scale from the gradients that a step computes anyway.

A batch of B examples comes as n groups of b = B / n: microbatches, devices, or both. With ``g_j`` the
mean gradient of group j and ``G_B`` the mean of them all, two scalars are enough::

    q = mean_j |g_j|^2          m = |G_B|^2
    tr(Sigma) ~ S  = b n / (n - 1) (q - m)
    |G|^2     ~ G2 = m - S / B

``Sigma`` is the covariance of the gradients of single examples and G their mean over the population;
both estimates are unbiased for examples drawn from it (McCandlish et al., "An Empirical Model of
Large-Batch Training", 2018, appendix A.1, with its small batch b and its large batch B). Of N training
examples that have been seen before, G2 falls short of the squared norm of their mean by S / N. For
Gaussian noise::

    Var(S)  = 2 tr(Sigma^2) / (n - 1)
    Var(G2) = 4 G' Sigma G / B + 2 tr(Sigma^2) / (n (n - 1) b^2)

so that G2 is the noisy one and may be negative: average the two apart, then divide. S is a difference
of squares in float32: below about 1e-7 B |G|^2, as where variance reduction leaves hardly any noise, it
is rounding. Take them before clipping, weight decay and momentum. Groups must be of one size. BatchNorm
over a group makes its gradient that of an objective which depends on b; keep b as it is where batch
sizes are compared.

Inside a training step of your own::

    >>> import jax, jax.numpy as jnp
    >>> from adabatch_jax import gradient_statistics
    >>> def step(params, images, targets):
    ...     loss = lambda p: jnp.mean((images @ p['w'] - targets) ** 2)
    ...     grads = jax.grad(loss)(params)
    ...     statistics = gradient_statistics.across(grads, 'batch', group_size=len(images))
    ...     return jax.lax.pmean(grads, 'batch'), statistics
    >>> params = {'w': jnp.array([1.0, -1.0])}
    >>> images = jnp.array([[[1.0, 0.0]], [[1.0, 1.0]]])  # two devices with an example each
    >>> targets = jnp.array([[0.0], [-1.0]])
    >>> grads, statistics = jax.vmap(step, (None, 0, 0), axis_name='batch')(params, images, targets)
    >>> float(statistics.variance[0]), float(statistics.squared_gradient[0])  # the same on all devices
    (2.0, 4.0)

``vmap`` stands for the devices there; in ``pmap`` and ``shard_map`` it is the same. With all gradients
at hand, along a leading axis, ``from_groups`` does without a named axis.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Statistics(NamedTuple):
    """Estimates from one batch; float32 scalars, or pytrees of them for every layer by itself.

    Attributes:
      variance: tr(Sigma), trace of the covariance of the gradients of single examples; not negative.
      squared_gradient: |G|^2 without the part of the noise; may be negative.
      squared_norm: ``|G_B|^2``, of the batch's own gradient.
    """

    variance: Any
    squared_gradient: Any
    squared_norm: Any


class InnerProducts(NamedTuple):
    """``Statistics`` and the variance along the gradient of the batch.

    Attributes:
      statistics: see there.
      along: variance of ``g_i' G_B`` over single examples i, ``b / (n - 1) sum_j (g_j' G_B - m)^2``
        (Bollapragada, Byrd and Nocedal, "Adaptive Sampling Strategies for Stochastic Optimization",
        2018, section 2). What is orthogonal to ``G_B`` has the variance ``S - along / m``.
    """

    statistics: Statistics
    along: jax.Array


def squared_norm(tree: Any) -> jax.Array:
    """Sum of squares over a pytree of arrays, in float32; 0 for an empty one."""
    squares = (jnp.sum(jnp.square(_float32(leaf))) for leaf in jax.tree.leaves(tree))
    return sum(squares, jnp.zeros((), jnp.float32))


def inner_product(a: Any, b: Any) -> jax.Array:
    """Of two pytrees of the same structure, in float32."""
    products = jax.tree.map(lambda x, y: jnp.vdot(_float32(x), _float32(y)), a, b)
    return sum(jax.tree.leaves(products), jnp.zeros((), jnp.float32))


def estimate(mean_squared_norm, squared_norm, num_groups: int, group_size: float) -> Statistics:
    """The estimates from q and m, as the head of this module has them.

    Args:
      mean_squared_norm: q, mean squared norm of the groups' gradients; numbers or arrays.
      squared_norm: m, squared norm of their mean.
      num_groups: n, at least 2.
      group_size: b, examples in each group.

    Raises:
      ValueError: fewer than 2 groups, which say nothing about the variance.
    """
    if num_groups < 2:
        raise ValueError(f'num_groups: got {num_groups}; needs at least 2 to see a variance')
    # Rounding may leave q a little below m where there is no noise; the mean of squares is never below.
    scatter = jnp.maximum(mean_squared_norm - squared_norm, 0)
    variance = scatter * (group_size * num_groups / (num_groups - 1))
    return Statistics(variance, squared_norm - variance / (num_groups * group_size), squared_norm)


def from_groups(grads: Any, group_size: int = 1, per_layer: bool = False) -> Statistics:
    """From the mean gradients of groups, along the leading axis of every leaf.

    Args:
      grads: pytree of ``[num_groups, ...]`` arrays.
      group_size: examples in each group.
      per_layer: whether every leaf is one by itself; the estimates are then pytrees like ``grads``.
    """
    if per_layer:
        leaves, structure = jax.tree.flatten(grads)
        each = [from_groups(leaf, group_size) for leaf in leaves]
        return Statistics(*(jax.tree.unflatten(structure, part) for part in zip(*each, strict=True)))
    num_groups = len(jax.tree.leaves(grads)[0])
    mean = jax.tree.map(lambda x: jnp.mean(_float32(x), 0), grads)
    return estimate(squared_norm(grads) / num_groups, squared_norm(mean), num_groups, group_size)


def across(grads: Any, axis_name: str, group_size: int) -> Statistics:
    """From the mean gradient of each device, inside ``pmap``, ``shard_map`` or ``vmap`` over an axis.

    Args:
      grads: pytree, this device's mean gradient over its examples.
      axis_name: of the mapped axis; of size 2 at least.
      group_size: examples of one device.
    """
    q = lax.pmean(squared_norm(grads), axis_name)
    m = squared_norm(lax.pmean(jax.tree.map(_float32, grads), axis_name))
    return estimate(q, m, lax.axis_size(axis_name), group_size)


def inner_products(
    grads: Any, mean: Any, group_size: int, axis_name: str | None = None
) -> InnerProducts:
    """From the mean gradients of groups along the leading axis, and over a mapped axis if there is one.

    Args:
      grads: pytree of ``[num_groups, ...]`` arrays.
      mean: pytree, the mean of all groups' gradients, over the mapped axis too.
      group_size: examples in each group.
      axis_name: of the mapped axis.
    """
    mean_of_devices = lambda x: lax.pmean(x, axis_name) if axis_name else x  # noqa: E731
    num_groups = len(jax.tree.leaves(grads)[0]) * (lax.axis_size(axis_name) if axis_name else 1)
    m = squared_norm(mean)
    q = mean_of_devices(jnp.mean(jax.vmap(squared_norm)(grads)))
    products = jax.vmap(lambda g: inner_product(g, mean))(grads)
    statistics = estimate(q, m, num_groups, group_size)
    scatter = mean_of_devices(jnp.mean((products - m) ** 2)) * num_groups
    return InnerProducts(statistics, scatter * group_size / (num_groups - 1))


def per_example(
    loss: Callable[[Any, Any], jax.Array], params: Any, examples: Any, per_layer: bool = False
) -> Statistics:
    """From the gradient of every example: the most that a batch tells, at the memory of B gradients.

    Not for models with BatchNorm, in which the gradient of one example means nothing.

    Args:
      loss: of parameters and one example; what BatchNorm, dropout and the like would need is the
        caller's to fix.
      params: pytree of parameters.
      examples: pytree of arrays ``[num_examples, ...]``.
      per_layer: as in ``from_groups``.
    """
    grads = jax.vmap(jax.grad(loss), (None, 0))(params, examples)
    return from_groups(grads, 1, per_layer)


def _float32(x: jax.Array) -> jax.Array:
    return jnp.asarray(x, jnp.float32)
