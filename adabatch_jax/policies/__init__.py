"""Batch-size policies by name. One file each: formula, assumptions and source in its docstring.

To add one, write ``create(config, rate, clock)`` in a file of its own and name it in ``POLICIES``.
"""

from adabatch_jax.policies import (
    adabatch,
    fixed,
    friedlander_schmidt,
    increase_dont_decay,
    plateau,
    stages,
)
from adabatch_jax.policies.base import Decision, Observation, PlannedPolicy, Policy, State
from adabatch_jax.schedules import Clock, LearningRate

__all__ = [
    'POLICIES',
    'Decision',
    'Observation',
    'PlannedPolicy',
    'Policy',
    'State',
    'create',
]

POLICIES = {
    'fixed': fixed.create,
    'adabatch': adabatch.create,
    'stages': stages.create,
    'plateau': plateau.create,
    'increase_dont_decay': increase_dont_decay.create,
    'friedlander_schmidt': friedlander_schmidt.create,
}


def create(config, rate: LearningRate, clock: Clock) -> Policy:
    """The policy that ``config.batch.policy`` names.

    Raises:
      ValueError: an unknown name, or settings with which the policy could not do its work.
    """
    if config.batch.policy not in POLICIES:
        raise ValueError(f'policy: got {config.batch.policy!r}; accepted: {", ".join(sorted(POLICIES))}')
    return POLICIES[config.batch.policy](config, rate, clock)
