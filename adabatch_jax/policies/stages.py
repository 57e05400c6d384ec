"""An explicit list of stages: any batch sizes, growing or shrinking."""

import math

from adabatch_jax.policies.base import PlannedPolicy
from adabatch_jax.schedules import Clock, LearningRate, Transition, check_transitions

COUPLING = 'linear'


def create(config, rate: LearningRate, clock: Clock) -> PlannedPolicy:
    """``batch.stages = ((start epoch, batch size), ...)`` with rising starts, the first at 0.

    Raises:
      ValueError: the list is empty, malformed, out of order, or goes past the end of the run.
    """
    transitions = []
    for entry in config.batch.stages:
        if not (isinstance(entry, tuple) and len(entry) == 2):
            raise ValueError(f'stages: got {entry!r}; accepted: (start epoch, batch size)')
        epoch, size = entry
        if type(epoch) not in (int, float) or type(size) is not int or size < 1:
            raise ValueError(
                f'stages: got {entry!r}; accepted: a start in epochs and a positive whole batch size'
            )
        if not 0 <= epoch < math.inf or clock.examples(epoch) >= clock.total_examples:
            raise ValueError(
                f'stages: the stage of batch size {size} starts at epoch {epoch:g}, outside the '
                f'run of {clock.num_epochs:g} epochs'
            )
        reason = f'epoch {epoch:g}: listed stage of batch size {size}'
        transitions.append(Transition(clock.examples(epoch), size, reason))
    try:
        return PlannedPolicy(check_transitions(transitions))
    except ValueError as error:
        raise ValueError(f'stages: {error}') from error
