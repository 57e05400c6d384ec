"""CABS: as many examples as make the noise cost what the step gains.

Balles, Romero and Hennig, "Coupling Adaptive Batch Sizes with Learning Rates", 2017: ``B = lr tr(Sigma)
/ F`` with the training loss F, so that a larger learning rate asks for a larger batch by itself; hence
no coupling of the learning rate to the batch.

Assumes plain SGD (``optimizer.momentum=0``) and a loss whose minimum is near 0, without a regulariser.
At the minimum of a loss that stays away from 0 the formula asks for ever smaller batches.
"""

from adabatch_jax.policies.base import Observation, State, decayed
from adabatch_jax.policies.statistical import StatisticalPolicy, quotient

COUPLING = 'none'


class Cabs(StatisticalPolicy):
    """``batch.cabs.scale * learning_rate * variance / loss``, averaged over updates.

    With ``batch.cabs.reference`` the averages are those of the authors' code, which are biased: the
    variance of a batch without Bessel's correction, a decay of 0.95 an update whatever its size, and
    averages that begin at 0 (variance) and 1 (loss).
    """

    def initial_state(self) -> State:
        start = {'sums': {'variance': 0.0, 'loss': 1.0}, 'weight': 1.0} if self.own.reference else {}
        return super().initial_state() | start

    def quantities(self, observation: Observation) -> dict[str, float]:
        bias = 1 - 1 / observation.batch_size if self.own.reference else 1.0
        return {'variance': observation.variance * bias, 'loss': observation.loss}

    def averaged(self, state: State, quantities: dict[str, float], batch_size: int) -> State:
        if not self.own.reference:
            return super().averaged(state, quantities, batch_size)
        return {'sums': decayed(state['sums'], quantities, 0.95), 'weight': 1.0}

    def wanted(self, averages: dict[str, float], state: State) -> float:
        return self.own.scale * state['learning_rate'] * quotient(averages['variance'], averages['loss'])


create = Cabs
