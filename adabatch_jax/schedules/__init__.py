"""Stages, plans, training progress and learning-rate coupling.

Plain Python and optax, usable without the rest of the package::

    clock = Clock(num_examples=50_000, num_epochs=100)
    rate = LearningRate(step_schedule(0.01, 0.375, [20, 40, 60, 80]), 'linear', 128)
    plan = make_plan(clock, geometric(clock, 128, 2, 20), rate)
    print([stage.batch_size for stage in plan.stages])       # [128, 256, 512, 1024, 2048]
    optimizer = optax.sgd(plan.learning_rate_schedule())      # for a training loop of your own

Everything here is a function of one clock, the integer number of training examples seen, and
raises ``ValueError`` with the offending value for arguments that no run could use.
"""

from adabatch_jax.schedules.clock import MAX_EXAMPLES, Clock, Update, next_update
from adabatch_jax.schedules.learning_rate import (
    COUPLINGS,
    ENDING,
    LearningRate,
    decay_events,
    effective_schedule,
    step_schedule,
)
from adabatch_jax.schedules.plan import Plan, Stage, make_plan, split_batch
from adabatch_jax.schedules.transitions import (
    Transition,
    check_transitions,
    geometric,
    grow,
    grow_at,
    ladder,
    transition_at,
)

__all__ = [
    'COUPLINGS',
    'ENDING',
    'MAX_EXAMPLES',
    'Clock',
    'LearningRate',
    'Plan',
    'Stage',
    'Transition',
    'Update',
    'check_transitions',
    'decay_events',
    'effective_schedule',
    'geometric',
    'grow',
    'grow_at',
    'ladder',
    'make_plan',
    'next_update',
    'split_batch',
    'step_schedule',
    'transition_at',
]
