"""A sample that grows a little with every update.

Friedlander and Schmidt, "Hybrid Deterministic-Stochastic Methods for Data Fitting", 2012: the sample
of iteration k + 1 has ``min(ceil(1.1 B_k + 1), N)`` examples, which keeps the linear rate of the full
gradient. Each batch size is a compiled step of its own, so the batch is the next rung of the
ladder at or above the sample: never smaller than the method asks for, up to the end of the ladder, which
is N where ``batch.max_size`` says so.
"""

import math
from fractions import Fraction

from adabatch_jax.policies.base import PlannedPolicy, ladder_from
from adabatch_jax.schedules import Clock, LearningRate, Transition

COUPLING = 'none'


def next_sample(sample: int, factor: float, limit: int) -> int:
    """``min(ceil(factor * sample + 1), limit)`` in exact arithmetic.

    In floating point ``ceil(1.1 * 50 + 1)`` is 57; the method's number is 56.
    """
    return min(math.ceil(Fraction(str(factor)) * sample + 1), limit)


def create(config, rate: LearningRate, clock: Clock) -> PlannedPolicy:
    """Starts at ``batch.base_size``, grows by ``batch.update_growth_factor`` with every update."""
    batch = config.batch
    rungs = ladder_from(batch, clock)
    transitions = []
    position, sample = 0, batch.base_size
    while position < clock.total_examples:
        rung = next((rung for rung in rungs if rung >= sample), rungs[-1])
        if not transitions or rung != transitions[-1].batch_size:
            reason = f'the sample has grown to {sample} examples'
            transitions.append(Transition(position, rung, reason))
        if rung == rungs[-1]:
            break
        position = clock.update_at(position, rung).end
        sample = next_sample(sample, batch.update_growth_factor, rungs[-1])
    return PlannedPolicy(tuple(transitions))
