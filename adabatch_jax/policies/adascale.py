"""AdaScale: the learning rate follows what a larger batch gains, as measured.

Johnson, Agrawal, Gu and Guestrin, "AdaScale SGD: A User-Friendly Algorithm for Distributed Training",
2020: for a batch ``s`` times the base batch B0 the learning rate is that of the base batch times the
gain ::

    r = (V + |G|^2) / (V / s + |G|^2)        V = tr(Sigma) / B0

which is s where there is only noise and 1 where there is none; for optimizers of the Adam type times the
square root of r, as their coupling is one of the square root. It takes the place of the coupling. The
batch itself is planned: ``batch.stages``, or ``batch.base_size`` throughout. B0 is
``learning_rate.reference_batch_size``, so that the schedule is the one of the base batch.

The paper also counts progress in sums of gains and trains until these reach the base run's updates. Here
progress stays the number of examples seen, so that runs of one length have seen the same data.
"""

import math

from adabatch_jax.policies import fixed, stages
from adabatch_jax.policies.base import (
    ADAPTIVE_OPTIMIZERS,
    Decision,
    Observation,
    PlannedPolicy,
    State,
    decayed,
)

COUPLING = 'none'
REPLACES_COUPLING = True
NEEDS_SCHEDULE = True


def gain(variance: float, squared_gradient: float, scale: float) -> float:
    """The gain r of a batch ``scale`` times the base batch; 1 where nothing is known.

    Args:
      variance: V, of the gradient of a base batch; below 0 counts as 0.
      squared_gradient: ``|G|^2``; below 0 counts as 0.
      scale: s.
    """
    variance, squared_gradient = max(variance, 0.0), max(squared_gradient, 0.0)
    below = variance / scale + squared_gradient
    return (variance + squared_gradient) / below if below > 0 else 1.0


class AdaScale(PlannedPolicy):
    """Planned batch sizes, with a gain of the learning rate from averages of the statistics."""

    statistics = 'norms'

    def __init__(self, transitions, reference: int, decay: float, power: float = 1.0):
        super().__init__(transitions)
        self.reference, self.decay, self.power = reference, decay, power
        most = 'batch size / reference batch size'
        most = most if power == 1 else f'({most}) ** {power:g}'
        self.note = (
            'In place of a coupling the learning rate is multiplied by the gain that AdaScale measures: '
            f'from 1 up to {most}; shown: 1.'
        )

    def initial_state(self) -> State:
        return {'variance': 0.0, 'squared_gradient': 0.0}  # what both are divided by is the same

    def continued(self, state: State, epoch: float, batch_size: int) -> State:
        return state or self.initial_state()  # which is of gradients, whatever the batches

    def observe(self, state: State, observation: Observation) -> State:
        seen = {key: getattr(observation, key) for key in state}
        if not all(map(math.isfinite, seen.values())):
            return state
        return decayed(state, seen, self.decay ** (observation.batch_size / self.reference))

    def decide(self, state: State, examples_seen: int) -> Decision:
        planned = super().decide(state, examples_seen)
        variance = state['variance'] / self.reference
        r = gain(variance, state['squared_gradient'], planned.batch_size / self.reference) ** self.power
        return Decision(planned.batch_size, planned.reason, {'gain': r}, r)


def create(config, rate, clock) -> AdaScale:
    """The stages of ``batch.stages`` where there are any, else ``batch.base_size``."""
    planned = (stages if config.batch.stages else fixed).create(config, rate, clock)
    options = config.batch.statistics
    reference = config.learning_rate.reference_batch_size
    power = 0.5 if config.optimizer.name in ADAPTIVE_OPTIMIZERS else 1.0
    return AdaScale(planned.transitions, reference, options.decay, power)
