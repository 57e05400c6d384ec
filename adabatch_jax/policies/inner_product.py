"""The inner product test: the step goes downhill, whatever its error to the side.

Bollapragada, Byrd and Nocedal, "Adaptive Sampling Strategies for Stochastic Optimization", 2018: with
the gradient ``G_B`` of the batch, the variance of ``g_i' G_B`` over examples i has to stay below
``theta^2 B |G_B|^4``. That allows far smaller batches than the norm test, which counts noise in all
directions. The augmented test also keeps the noise orthogonal to ``G_B`` below ``nu^2 B |G_B|^2``. The
batch never shrinks.

``|G_B|^2`` is mostly noise where the gradient is small against it, and both tests then pass with a batch
that is too small. The paper's safeguard against that, an average of the gradients of several updates in
place of ``G_B``, would cost the memory of one more gradient, and is not here.
"""

from adabatch_jax.policies.base import Observation, State
from adabatch_jax.policies.statistical import StatisticalPolicy, quotient

COUPLING = 'none'


class InnerProduct(StatisticalPolicy):
    """The larger of what the two tests ask for, rounded up to a rung; ``nu = 0``: the first only."""

    statistics = 'inner_products'
    may_shrink = False
    rounds_up = True

    def quantities(self, observation: Observation) -> dict[str, float]:
        return {
            'variance': observation.variance,
            'variance_along': observation.variance_along,
            'squared_norm': observation.squared_norm,
        }

    def wanted(self, averages: dict[str, float], state: State) -> float:
        along, squared_norm = averages['variance_along'], averages['squared_norm']
        size = quotient(along, self.own.theta**2 * squared_norm**2)
        if not self.own.nu:
            return size
        orthogonal = averages['variance'] - quotient(along, squared_norm)
        return max(size, quotient(orthogonal, self.own.nu**2 * squared_norm))


create = InnerProduct
