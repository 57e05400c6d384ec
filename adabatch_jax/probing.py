"""Branches of a run: a few updates with another batch size from the present state, then thrown away."""

import itertools
import math
from collections.abc import Iterable

import numpy as np

from adabatch_jax import distributed, metrics


def branch_losses(run, sizes: Iterable[int], num_examples: int) -> dict[int, float]:
    """Mean training loss over the second half of a branch, by batch size.

    Every branch begins with a copy of the train state of ``run`` and sees the ``num_examples`` that
    would come next, in updates that begin before their end. The run itself stays as it is.
    """
    return {size: _branch_loss(run, size, num_examples) for size in sizes}


def _branch_loss(run, batch_size: int, num_examples: int) -> float:
    begin = run.examples_seen
    step, batches = run.experiment.stream(run.pipeline, run.clock.update_at(begin, batch_size))
    run.host.seconds['compile'] += step.compile_seconds
    state, totals = distributed.replicate(run.state), {}
    updates = run.clock.updates(begin, batch_size)
    for update in itertools.takewhile(lambda u: u.start < begin + num_examples, updates):
        rate = np.float32(run.learning_rate(update))
        state, sums = step(state, next(batches), rate, np.uint32(update.end))
        sums = {key: float(sums[key]) for key in ('loss', 'correct', 'count')}
        if update.start >= begin + num_examples // 2:
            totals = metrics.add_sums(totals, sums)
    return metrics.mean_metrics(totals)['loss'] if totals else math.nan
