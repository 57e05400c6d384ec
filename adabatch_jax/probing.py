"""Branches of a run: a few updates with another batch size from the present state, then thrown away."""

import itertools
import math
from collections.abc import Iterable

from adabatch_jax import distributed, metrics
from adabatch_jax.stream import open_stream


def probe(run, sizes: tuple[int, ...]) -> None:
    """Shows the policy of a run how branches with other batch sizes train from where it is."""
    policy = run.experiment.policy
    losses = branch_losses(run, sizes, policy.probe_examples)
    run.host.policy = policy.probed(run.host.policy, run.examples_seen, losses)
    found = ', '.join(f'{loss:.4f} with {size}' for size, loss in losses.items())
    run.display.say(f'epoch {run.epoch:.4g}: probed batch sizes, loss {found}')


def branch_losses(run, sizes: Iterable[int], num_examples: int) -> dict[int, float]:
    """Mean training loss over the second half of a branch, its last update at least, by batch size.

    Every branch begins with a copy of the train state of ``run`` and sees the ``num_examples`` that
    would come next, as far as the largest batch size fits in; half of them is whole updates of it too.
    Where the largest is a multiple of each, so all losses are of the same examples; else the first and
    last updates of a half reach beyond others' by less than a batch, and with ``remainder='drop'`` each
    skips its own examples at the end of an epoch. The run itself stays as it is.
    """
    largest = max(sizes)
    end = num_examples // largest * largest
    half = max(1, num_examples // 2 // largest) * largest
    return {size: _branch_loss(run, size, end - half, end) for size in sizes}


def _branch_loss(run, batch_size: int, first: int, end: int) -> float:
    """The mean loss of the updates that begin from ``first`` on, of those before ``end``, from now."""
    begin = run.examples_seen
    stream = open_stream(run.experiment, run.pipeline, run.clock.update_at(begin, batch_size))
    run.host.seconds['compile'] += stream.compile_seconds
    state, totals = distributed.replicate(run.state), {}
    updates = run.clock.updates(begin, batch_size)
    updates = list(itertools.takewhile(lambda u: u.start < begin + end, updates))
    for update in updates:
        rate = run.learning_rate(update)
        state, sums = stream.update(state, stream.take([update]), [update], [rate])
        run.host.counts['probe_examples'] += batch_size
        sums = {key: float(sums[key]) for key in ('loss', 'correct', 'count')}
        if update.start >= begin + first or update is updates[-1]:
            totals = metrics.add_sums(totals, sums)
    return metrics.mean_metrics(totals)['loss'] if totals.get('count') else math.nan
