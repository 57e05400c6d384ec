"""Seesaw: a schedule of the learning rate turned into a ramp of the batch.

Meterez et al., "Seesaw: Accelerating Training by Balancing Learning Rate and Batch Size Scheduling",
2025: where a schedule divides the learning rate by a, divide it by the square root of a and multiply
the batch by a. For SGD the batch alone does it, as with Smith et al. (2018). Holds up to the critical
batch size.

In this project's rule that is one and the same ramp, the batch growing as ``effective`` falls, with
coupling ``sqrt`` (Adam) or ``linear`` (SGD). It takes any schedule that falls, cosine among them. The
updates of a run are then the integral of ``effective`` over its highest value: 2 / pi of those of the
fixed batch for a quarter of a cosine, 1 / 2 for half a period, where the ladder is fine and has no end.
"""

import bisect

import numpy as np

from adabatch_jax.policies.base import PlannedPolicy, ladder_from
from adabatch_jax.schedules import Clock, LearningRate, Transition

COUPLING = 'linear'
NEEDS_SCHEDULE = True
POINTS = 10_000  # of a run, at which its schedule is looked at


def create(config, rate: LearningRate, clock: Clock) -> PlannedPolicy:
    """Rungs of ``batch.growth_factor`` from ``batch.base_size`` to ``batch.max_size``.

    A rung B begins where the effective rate has fallen to ``base_size / B`` of its highest value.

    Raises:
      ValueError: the schedule never falls that far, so that nothing would grow, or the coupling would
        not turn what it falls by into batch.
    """
    if rate.coupling == 'none':
        raise ValueError(
            "policy seesaw: got coupling 'none'; needs linear or sqrt, which hold the learning rate up "
            'while the effective rate falls'
        )
    rungs = ladder_from(config.batch, clock)
    points = np.linspace(0, clock.total_examples, POINTS + 1, dtype=np.int64)[:-1]
    rates = rate.effective_at(points / clock.num_examples)
    peak = int(np.argmax(rates))
    transitions = [Transition(0, rungs[0], f'starts with batch size {rungs[0]}')]
    for rung in rungs[1:]:
        share = rungs[0] / rung
        threshold = rates[peak] * share * (1 + 1e-9)
        fallen = np.flatnonzero(rates[peak:] <= threshold)
        if not len(fallen):
            break
        after = peak + int(fallen[0])
        between = range(int(points[after - 1]) + 1, int(points[after]) + 1)
        has_fallen = lambda p: bool(rate.effective_at(clock.epoch(p)) <= threshold)  # noqa: B023, E731
        position = between[bisect.bisect_left(between, True, key=has_fallen)]
        reason = f'epoch {clock.epoch(position):.4g}: schedule at 1/{1 / share:.4g} of its highest rate'
        if transitions[-1].examples_seen == position:  # it falls by several rungs at once
            transitions.pop()
        transitions.append(Transition(position, rung, reason))
    if len(transitions) == 1:
        raise ValueError(
            f'policy seesaw: got schedule {config.learning_rate.schedule!r}, which never falls to '
            f'1/{rungs[1] / rungs[0]:g} of its highest rate; needs one that does'
        )
    return PlannedPolicy(tuple(transitions))
