"""What the policies that are driven by gradient statistics share: averages, and steps on the ladder."""

import math

from adabatch_jax.policies.base import (
    Decision,
    Observation,
    Policy,
    State,
    decayed,
    ladder_from,
    nearest_rung,
)
from adabatch_jax.schedules import Clock, LearningRate, Transition


class StatisticalPolicy(Policy):
    """Goes up and down the ladder towards the batch size that a formula gives.

    A policy says what to average (``quantities``) and which batch size that asks for (``wanted``). All
    else is here, once, from ``config.batch.statistics``:

    - Averages are exponential with a decay for ``batch.base_size`` examples, so that their memory is a
      number of examples whatever the batch, and without bias towards their start. Quotients are taken of
      averages, never averaged.
    - Between two decisions lie ``decision_epochs``. A decision moves at most ``max_rungs`` up or down,
      and only where the size that is asked for lies beyond the boundary of two rungs by the factor ``1
      + hysteresis``: noise around a boundary does not make the batch swing, or grow where it never
      shrinks. After ``max_switches`` it stays where it is.
    - With ``min_speedup`` the batch does not grow further where it brings less than that ratio in
      examples per second over the largest smaller size that was trained with. Such decisions depend on
      measured times, which are in the state and hence in the checkpoint.

    An update whose statistics are not finite is left out. Where ``wanted`` is not a number, for example
    because ``|G|^2`` has been estimated as negative, the batch stays.
    """

    planned = False
    statistics = 'norms'
    may_shrink = True
    rounds_up = False  # to a rung that is at least what is asked for; else to the nearest, as a ratio
    needs_times = False

    def __init__(self, config, rate: LearningRate, clock: Clock):
        self.options = options = config.batch.statistics
        self.own = config.batch.get(config.batch.policy)  # the section of the policy, if it has one
        self.base_size = config.batch.base_size
        self.ladder = ladder_from(config.batch, clock, options.min_size)
        reason = f'starts with batch size {self.base_size}'
        self.transitions = (Transition(0, self.base_size, reason),)

    def quantities(self, observation: Observation) -> dict[str, float]:
        """What of an update is averaged."""
        return {
            'variance': observation.variance,
            'squared_gradient': observation.squared_gradient,
        }

    def wanted(self, averages: dict[str, float], state: State) -> float:
        """The batch size that the averages ask for: a real number, infinite, or not a number to stay."""
        raise NotImplementedError

    def initial_state(self) -> State:
        return {
            'rung': self.ladder.index(self.base_size),
            'reason': self.transitions[0].reason,
            'inputs': {},
            'sums': {},
            'weight': 0.0,
            'epoch': 0.0,  # of the last decision
            'switches': 0,
            'learning_rate': 0.0,
            'times': {},  # batch size: (updates seen, mean seconds of all but the first)
        }

    def continued(self, state: State, epoch: float, batch_size: int) -> State:
        state = state or self.initial_state() | {'epoch': epoch}
        return state | nearest_rung(self.ladder, batch_size)

    def on_other_devices(self, state: State) -> State:
        return state | {'times': {}}

    def observe(self, state: State, observation: Observation) -> State:
        quantities = self.quantities(observation)
        if not all(map(math.isfinite, quantities.values())):
            return state
        state = state | {'learning_rate': observation.learning_rate}
        state |= self.averaged(state, quantities, observation.batch_size)
        state = self.with_times(state, observation)
        if observation.epoch - state['epoch'] < self.options.decision_epochs:
            return state
        return state | {'epoch': observation.epoch} | self._decision(state, observation.epoch)

    def with_times(self, state: State, observation: Observation) -> State:
        """The state with the time of one more update, where times matter."""
        if not (self.needs_times or self.options.min_speedup):
            return state
        return state | {'times': _timed(state['times'], observation)}

    def averaged(self, state: State, quantities: dict[str, float], batch_size: int) -> State:
        """``sums`` and ``weight`` with one more update; an average is their quotient."""
        decay = self.options.decay ** (batch_size / self.base_size)
        sums = decayed(state['sums'], quantities, decay)
        return {'sums': sums, 'weight': decay * state['weight'] + 1 - decay}

    def decide(self, state: State, examples_seen: int) -> Decision:
        return Decision(self.ladder[state['rung']], state['reason'], state['inputs'])

    def _decision(self, state: State, epoch: float) -> State:
        """What of the state a decision changes: nothing where the batch stays."""
        rung, options = state['rung'], self.options
        averages = {k: total / state['weight'] for k, total in state['sums'].items()}
        wanted = self.wanted(averages, state)
        target = self._rung_for(rung, wanted)
        target = min(max(target, rung - options.max_rungs), rung + options.max_rungs)
        if target < rung and not self.may_shrink or target > rung and self._saturated(state):
            target = rung
        if target == rung or 0 < options.max_switches <= state['switches']:
            return {}
        name, now, new = type(self).__name__, self.ladder[rung], self.ladder[target]
        asks = f'a batch of {wanted:.4g}' if math.isfinite(wanted) else 'the largest batch'
        because = ', '.join(f'{k.replace("_", " ")} {v:.4g}' for k, v in averages.items())
        return {
            'rung': target,
            'switches': state['switches'] + 1,
            'reason': f'epoch {epoch:.4g}: {name} asks for {asks} ({because}): from {now} to {new}',
            'inputs': averages
            | {'wanted': wanted if math.isfinite(wanted) else None}
            | {f'seconds_of_{size}': seconds for size, seconds in measured_times(state).items()},
        }

    def _rung_for(self, rung: int, wanted: float) -> int:
        """The rung that a size asks for, seen from the present one; not a number: the present one."""

        def boundary(lower: int) -> float:
            low, high = self.ladder[lower : lower + 2]
            return low if self.rounds_up else math.sqrt(low * high)

        margin = 1 + self.options.hysteresis
        while rung + 1 < len(self.ladder) and wanted > boundary(rung) * margin:
            rung += 1
        while rung > 0 and wanted < boundary(rung - 1) / margin:
            rung -= 1
        return rung

    def _saturated(self, state: State) -> bool:
        """Whether the present rung brings too little over smaller ones, or is not yet measured."""
        if not self.options.min_speedup or state['rung'] == 0:
            return False
        here, times = self.ladder[state['rung']], measured_times(state)
        below = max((size for size in times if size < here), default=None)  # others were leapt over
        if here not in times or below is None:
            return here not in times
        return (here / times[here]) / (below / times[below]) < self.options.min_speedup


def measured_times(state: State) -> dict[int, float]:
    """Mean seconds of an update by batch size, of those seen twice at least."""
    return {int(size): seconds for size, (seen, seconds) in state['times'].items() if seen > 1}


def _timed(times: dict[str, list], observation: Observation) -> dict[str, list]:
    """The times with those of one more update.

    The first of a batch size is not in the mean, since it waits for more than itself.
    """
    if math.isnan(observation.seconds):
        return times
    seen, mean = times.get(str(observation.batch_size), (0, 0.0))
    weight = 1 / seen if seen else 0.0
    mean += (observation.seconds - mean) * weight
    return times | {str(observation.batch_size): [seen + 1, mean]}


def quotient(numerator: float, denominator: float) -> float:
    """Their quotient; not a number where the denominator is not positive."""
    return numerator / denominator if denominator > 0 else math.nan
