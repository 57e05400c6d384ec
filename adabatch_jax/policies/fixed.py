"""One batch size for the whole run: the control of every comparison."""

from adabatch_jax.policies.base import PlannedPolicy
from adabatch_jax.schedules import Clock, LearningRate, Transition

COUPLING = 'linear'


def create(config, rate: LearningRate, clock: Clock) -> PlannedPolicy:
    """``batch.base_size`` throughout; with the same effective rate it matches any other policy."""
    size = config.batch.base_size
    return PlannedPolicy((Transition(0, size, f'fixed batch size {size}'),))
