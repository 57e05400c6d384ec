"""Gradient diversity: batches may be large where examples pull in different directions.

Yin et al., "Gradient Diversity: a Key Ingredient for Scalable Distributed Learning", 2018: with ``Delta
= sum |g_i|^2 / |sum g_i|^2`` over the N examples, batches up to the order of ``N Delta`` lose nothing
against single examples. DiveBatch (Chen et al., 2025) grows the batch to ``delta N Delta`` and never
shrinks it. ``delta`` is 1 here, the bound itself, if not set; DiveBatch's code has 1e-4.

In expectation over examples ``N Delta = 1 + tr(Sigma) / |G|^2``, which is how it is measured here:
summing gradients over an epoch, while the weights move, would measure the path as well.
"""

from adabatch_jax.policies.base import State
from adabatch_jax.policies.statistical import StatisticalPolicy, quotient

COUPLING = 'linear'


class GradientDiversity(StatisticalPolicy):
    """``delta * (1 + variance / squared_gradient)``, to the nearest rung."""

    may_shrink = False

    def wanted(self, averages: dict[str, float], state: State) -> float:
        return self.own.delta * (1 + quotient(averages['variance'], averages['squared_gradient']))


create = GradientDiversity
