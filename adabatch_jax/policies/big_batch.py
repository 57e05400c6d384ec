"""Big Batch SGD: grow until the gradient stands out from its noise.

De, Yadav, Jacobs and Goldstein, "Automated Inference with Adaptive Batches", 2017: a batch is large
enough where ``theta^2 |G|^2 >= tr(Sigma) / B``, which holds the signal-to-noise ratio of the gradients
up as the loss falls. The batch never shrinks.

The published test takes the norm of the batch's own gradient for ``|G|^2``. That norm holds noise: its
expectation is ``|G|^2 + tr(Sigma) / B``, so that with theta = 1 every batch passes on average and
growth is left to fluctuations; below 1 growth ends at ``(1 - theta^2) / theta^2`` times the noise
scale. The default here is the estimate without that bias, which ends at ``1 / theta^2`` times the noise
scale. ``batch.big_batch.unbiased=False`` gives the published test; there, as in the method, each
failure grows the batch by one step and says nothing of how far.
"""

import math

from adabatch_jax.policies.base import State
from adabatch_jax.policies.statistical import StatisticalPolicy, quotient

COUPLING = 'none'


class BigBatch(StatisticalPolicy):
    """``variance / (theta^2 squared_gradient)``, rounded up to a rung."""

    may_shrink = False
    rounds_up = True

    def wanted(self, averages: dict[str, float], state: State) -> float:
        variance, squared_gradient = averages['variance'], averages['squared_gradient']
        if self.own.unbiased:
            return quotient(variance, self.own.theta**2 * squared_gradient)
        noise = variance / self.ladder[state['rung']]
        return math.inf if self.own.theta**2 * (squared_gradient + noise) < noise else math.nan


create = BigBatch
