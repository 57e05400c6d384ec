"""Branched probing: grow the batch where a larger one is seen to train as well from here.

Merrill et al., "Critical Batch Size Revisited", 2025: from the present state train on with several batch
sizes over the same number of examples, the learning rate coupled. The largest whose loss is no more
than a tolerance above that of every smaller one is the critical batch size there; where it is at least
the next rung, the batch grows. Nothing is assumed about gradients or their noise, which underestimate
critical batch sizes by far in that paper; the price is the probes: ``max_rungs + 1`` branches of
``batch.critical_batch.probe_epochs`` every ``batch.critical_batch.every_epochs``. Their examples and
seconds are in the ``summary`` record, and not among the examples seen.

Where the paper smooths the losses of a branch's updates (a decay of 0.5), this takes their mean over the
second half of the branch, which for batch sizes that divide the largest are the same examples for all.
"""

import math
import sys

from adabatch_jax.policies.base import Observation, State
from adabatch_jax.policies.statistical import StatisticalPolicy
from adabatch_jax.schedules import Clock, LearningRate

COUPLING = 'linear'
NEEDS_SCHEDULE = True
WORST = sys.float_info.max  # in place of a loss that is not finite


class CriticalBatch(StatisticalPolicy):
    """The largest batch size that is tolerated, by losses of branches."""

    statistics = ''
    may_shrink = False

    def __init__(self, config, rate: LearningRate, clock: Clock):
        super().__init__(config, rate, clock)
        self.clock = clock
        self.probe_examples = clock.examples(self.own.probe_epochs)
        if self.probe_examples < 2 * self.ladder[-1]:
            raise ValueError(
                f'critical_batch.probe_epochs: got {self.own.probe_epochs:g}, {self.probe_examples} '
                f'examples; needs two updates of the largest batch size at least, {2 * self.ladder[-1]} '
                'examples; probe longer, or lower max_size'
            )
        if self.probe_examples >= clock.total_examples:
            raise ValueError(
                f'critical_batch.probe_epochs: got {self.own.probe_epochs:g}, and the run has '
                f'{clock.num_epochs:g} epochs; accepted: fewer than that'
            )
        probes = len(clock.multiples(self.own.every_epochs, 'critical_batch.every_epochs'))
        self.note = (
            f'Probes, beside these updates: at most {probes} x {self.options.max_rungs + 1} branches of '
            f'{self.probe_examples:,} examples.'
        )

    def observe(self, state: State, observation: Observation) -> State:
        return self.with_times(state, observation)

    def probes(self, state: State, examples_seen: int) -> tuple[int, ...]:
        sizes = self.ladder[state['rung'] :][: self.options.max_rungs + 1]
        waited = self.clock.epoch(examples_seen) - state['epoch'] >= self.own.every_epochs
        fits = examples_seen + self.probe_examples <= self.clock.total_examples
        spent = 0 < self.options.max_switches <= state['switches']
        ended = spent or self._saturated(state) or len(sizes) == 1
        return sizes if waited and fits and not ended else ()

    def probed(self, state: State, examples_seen: int, losses: dict[int, float]) -> State:
        epoch = self.clock.epoch(examples_seen)
        found = {f'loss with {n}': x if math.isfinite(x) else WORST for n, x in losses.items()}
        state |= {'epoch': epoch, 'sums': found, 'weight': 1.0}
        return state | self._decision(state, epoch)

    def _rung_for(self, rung: int, wanted: float) -> int:
        return self.ladder.index(int(wanted))  # a rung already: no boundaries, no hysteresis

    def wanted(self, averages: dict[str, float], state: State) -> float:
        losses = {int(name.removeprefix('loss with ')): loss for name, loss in averages.items()}
        return tolerated(losses, self.own.tolerance)


def tolerated(losses: dict[int, float], tolerance: float) -> int:
    """The largest batch size whose loss is at most ``tolerance`` above that of every smaller one.

    The smallest where the losses of all are ``WORST``.

    Args:
      losses: finite, by batch size.
      tolerance: in units of the loss.
    """
    largest, lowest = min(losses), math.inf
    for size, loss in sorted(losses.items()):
        if loss <= lowest + tolerance and loss < WORST:
            largest = size
        lowest = min(lowest, loss)
    return largest


create = CriticalBatch
