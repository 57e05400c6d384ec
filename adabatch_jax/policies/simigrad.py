"""SimiGrad: the two halves of a batch should agree this much.

Qin et al., "SimiGrad: Fine-Grained Adaptive Batching for Large Scale Training using Gradient Similarity
Measurement", 2021: where the cosine of the gradients of two halves of the batch is below a target, the
batch grows by a tenth, else it shrinks by a tenth; the learning rate follows with the square root.

With ``S = tr(Sigma)`` the cosine is ``|G|^2 / (|G|^2 + 2 S / B)`` in expectation, numerator and
denominator averaged apart, and the target c is met at ``B = 2 S / |G|^2 c / (1 - c)``. The ladder
replaces the steps of a tenth, which would compile a step each.
"""

import math

from adabatch_jax.policies.base import State
from adabatch_jax.policies.statistical import StatisticalPolicy

COUPLING = 'sqrt'


class SimiGrad(StatisticalPolicy):
    """The batch at which the cosine meets its target, to the nearest rung.

    Halves that do not agree at all, ``squared_gradient`` not above 0, ask for the largest batch.
    """

    def wanted(self, averages: dict[str, float], state: State) -> float:
        variance, squared_gradient = averages['variance'], averages['squared_gradient']
        if squared_gradient <= 0:
            return math.inf if variance > 0 else math.nan
        return 2 * variance / squared_gradient * self.own.cosine / (1 - self.own.cosine)


create = SimiGrad
