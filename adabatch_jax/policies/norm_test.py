"""The norm test: the error of the gradient stays below a fraction of its norm.

Byrd, Chin, Nocedal and Wu, "Sample size selection in optimization methods for machine learning", 2012:
a batch passes where ``tr(Sigma) / B <= theta^2 |G_B|^2`` with the norm of the batch's own gradient,
else the next has ``ceil(tr(Sigma) / (theta^2 |G_B|^2))`` examples. The batch never shrinks. Since the
norm holds the noise of the batch, growth ends at ``(1 - theta^2) / theta^2`` times the noise scale.

Here the batch grows where the test asks for more than ``1 + batch.statistics.hysteresis`` times its
size, so that theta^2 in this is as much larger: with the default of 0.1 and theta = 0.96 no noise is
large enough. ``hysteresis=0`` is the published test.
"""

from adabatch_jax.policies.base import State
from adabatch_jax.policies.statistical import StatisticalPolicy, quotient

COUPLING = 'none'


class NormTest(StatisticalPolicy):
    """``variance / (theta^2 squared_norm)``, rounded up to a rung.

    The squared norm at the present batch size B is taken from the averages as ``squared_gradient +
    variance / B``; an average of the norms themselves would lag behind a change of B.
    """

    may_shrink = False
    rounds_up = True

    def wanted(self, averages: dict[str, float], state: State) -> float:
        noise = averages['variance'] / self.ladder[state['rung']]
        squared_norm = averages['squared_gradient'] + noise
        return quotient(averages['variance'], self.own.theta**2 * squared_norm)


create = NormTest
