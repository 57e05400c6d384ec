"""What decides the batch size of each update: one file a policy.

All choose from a ladder, a finite set of batch sizes known before training, so that the number of
compiled steps stays bounded.
"""

import importlib
from typing import Any

from adabatch_jax.policies.base import (
    ADAPTIVE_OPTIMIZERS,
    Decision,
    Observation,
    PlannedPolicy,
    Policy,
    State,
    as_saved,
)
from adabatch_jax.schedules import COUPLINGS, Clock, LearningRate, check_transitions, transition_at

__all__ = [
    'POLICIES',
    'Decision',
    'Observation',
    'PlannedPolicy',
    'Policy',
    'State',
    'as_saved',
    'checked',
    'control',
    'control_coupling',
    'coupling',
    'create',
]

NAMES = (
    'adabatch',
    'adascale',
    'big_batch',
    'cabs',
    'critical_batch',
    'fixed',
    'friedlander_schmidt',
    'goodput',
    'gradient_diversity',
    'increase_dont_decay',
    'inner_product',
    'noise_scale',
    'norm_test',
    'plateau',
    'replay',
    'seesaw',
    'simigrad',
    'stages',
)
POLICIES = {name: importlib.import_module(f'{__name__}.{name}') for name in NAMES}


def create(config, rate: LearningRate, clock: Clock) -> Policy:
    """The policy that ``config.batch.policy`` names.

    Raises:
      ValueError: an unknown name, or settings with which the policy could not do its work.
    """
    module, rule = _module(config), config.learning_rate.rule
    if rule != 'schedule' and getattr(module, 'NEEDS_SCHEDULE', False):
        raise ValueError(
            f'policy: got {config.batch.policy!r}, which goes with planned learning rates only, and '
            f'learning_rate.rule {rule!r}; choose another policy or rule schedule'
        )
    policy = module.create(config, rate, clock)
    _check(config.batch.policy, policy)
    return policy


def _check(name: str, policy: Any) -> None:
    needed = ('transitions', 'ladder', 'planned')
    if not isinstance(policy, Policy) or not all(hasattr(policy, attribute) for attribute in needed):
        raise ValueError(
            f'policy: got {name!r}, which creates a {type(policy).__name__}; accepted: a Policy with '
            f'{", ".join(needed)}'
        )
    if not all(type(size) is int for size in policy.ladder):
        raise ValueError(f'policy: got {name!r} with the ladder {policy.ladder}; accepted: int')
    for transition in check_transitions(policy.transitions):
        if transition.batch_size not in policy.ladder:
            raise ValueError(
                f'policy: got {name!r} with a transition to {transition.batch_size} and the ladder '
                f'{policy.ladder}; accepted: transitions to batch sizes of the ladder'
            )


def checked(name: str, policy: Policy, decision: Any, examples_seen: int, before: int = 0) -> Decision:
    """What ``decide`` of a policy has returned: what the policy has announced, as the plan has it.

    Args:
      name: that the policy is known by.
      policy: as ``create`` accepts it.
      decision: of it.
      examples_seen: what it has decided for.
      before: the batch size that it decided on last; 0 where there is none, or its ladder was another.

    Raises:
      ValueError: that is no ``Decision``, or not for a batch size of the ladder; or it leaves the
        transitions where these say all, or goes down where the policy may not.
    """
    if not isinstance(decision, Decision) or decision.batch_size not in policy.ladder:
        raise ValueError(
            f'policy: got {name!r}, which decides {decision!r}; accepted: a Decision for one of the '
            f'batch sizes {", ".join(map(str, policy.ladder))}'
        )
    size, accepted = decision.batch_size, ''
    if policy.planned or examples_seen == 0:
        announced = transition_at(policy.transitions, examples_seen).batch_size
        accepted = '' if size == announced else f'{announced}, as its transitions say'
    elif size < before and not policy.may_shrink:
        accepted = f'{before} or more, or may_shrink = True'
    if accepted:
        raise ValueError(
            f'policy: got {name!r}, which decides on batch size {size} after {examples_seen} examples; '
            f'accepted: {accepted}'
        )
    return decision


def coupling(config) -> str:
    """``config.learning_rate.coupling``, or where that is ``'auto'`` the policy's own.

    ``'none'`` where step sizes are searched for, or where the policy has something in its place.

    A linear coupling becomes ``'sqrt'`` for optimizers of the Adam type (Malladi et al., "On the SDEs
    and Scaling Rules for Adaptive Gradient Algorithms", 2022), whose steps do not grow with the
    gradient.
    """
    if _replaces_coupling(config) or config.learning_rate.rule != 'schedule':
        return 'none'
    if config.learning_rate.coupling != 'auto':
        return config.learning_rate.coupling
    if config.batch.policy == 'replay':
        return _module(config).load(config.batch.replay)['coupling']
    own = getattr(_module(config), 'COUPLING', None)
    if own is None:
        raise ValueError(
            f'policy: got {config.batch.policy!r}, which names no coupling; accepted: policies with '
            f'COUPLING = {" or ".join(map(repr, COUPLINGS))}'
        )
    return _suited(own, config)


def control_coupling(config) -> str:
    """The coupling of a run's controls: its own, or where its policy has something in its place another.

    That is then ``config.learning_rate.coupling``, or where it is ``'auto'`` the one of ``fixed``.
    """
    if not _replaces_coupling(config):
        return coupling(config)
    if config.learning_rate.coupling != 'auto':
        return config.learning_rate.coupling
    return _suited(POLICIES['fixed'].COUPLING, config)


def _replaces_coupling(config) -> bool:
    return getattr(_module(config), 'REPLACES_COUPLING', False)


def _suited(own: str, config) -> str:
    return 'sqrt' if own == 'linear' and config.optimizer.name in ADAPTIVE_OPTIMIZERS else own


def control(config, policy: Policy) -> str:
    """What the matched control of a run needs beside ``batch.policy=fixed``, in words; mostly nothing.

    The run's first batch size, where it is not ``batch.base_size``; and the coupling of its controls,
    where that of ``fixed`` would give that batch size another rate.

    Args:
      config: of the run, resolved.
      policy: what ``create`` makes of it.
    """
    first, wanted, needed = policy.transitions[0].batch_size, control_coupling(config), ''
    fixed = config.as_configdict()
    fixed.batch.policy = 'fixed'
    if first != config.batch.base_size:
        needed += f' --config.batch.base_size={first}'
    if first != config.learning_rate.reference_batch_size and coupling(fixed) != wanted:
        needed += f' --config.learning_rate.coupling={wanted}'
    return f'Its control: --config.batch.policy=fixed{needed}.' if needed else ''


def _module(config):
    if config.batch.policy not in POLICIES:
        raise ValueError(f'policy: got {config.batch.policy!r}; accepted: {", ".join(sorted(POLICIES))}')
    return POLICIES[config.batch.policy]
