"""Grow the batch when the training loss has stopped falling.

The official AdaBatch code describes it as an option: instead of at fixed epochs, the batch grows when
the loss has not improved for some epochs. The decision is taken once an epoch, from the mean
training loss over all of its examples.
"""

from adabatch_jax.policies.base import (
    Decision,
    Observation,
    Policy,
    State,
    ladder_from,
    nearest_rung,
)
from adabatch_jax.schedules import Clock, LearningRate, Transition

COUPLING = 'linear'


class PlateauPolicy(Policy):
    """Grows by one rung after ``patience`` epochs without a relative fall of ``min_improvement``.

    Assumes a loss that is positive and falls while training makes progress. Growth ends at the top
    of the ladder.
    """

    planned = False

    def __init__(self, rungs: tuple[int, ...], patience: int, min_improvement: float):
        self.ladder = rungs
        self.patience = patience
        self.min_improvement = min_improvement
        self.transitions = (Transition(0, rungs[0], f'starts with batch size {rungs[0]}'),)

    def initial_state(self) -> State:
        return {
            'rung': 0,
            'reason': self.transitions[0].reason,
            'epoch': 0,  # the epoch whose losses are being summed
            'loss_sum': 0.0,
            'examples': 0,
            'best_loss': None,
            'epochs_without': 0,
            'inputs': {},  # of the last decision to grow
        }

    def continued(self, state: State, epoch: float, batch_size: int) -> State:
        state = state or self.initial_state() | {'epoch': int(epoch)}
        return state | nearest_rung(self.ladder, batch_size)

    def observe(self, state: State, observation: Observation) -> State:
        if int(observation.epoch) > state['epoch']:
            state = self._end_epoch(state) | {'epoch': int(observation.epoch)}
        size = observation.batch_size
        return state | {
            'loss_sum': state['loss_sum'] + observation.loss * size,
            'examples': state['examples'] + size,
        }

    def _end_epoch(self, state: State) -> State:
        if not state['examples']:  # all of its updates were skipped
            return state
        loss, best = state['loss_sum'] / state['examples'], state['best_loss']
        state = state | {'loss_sum': 0.0, 'examples': 0}
        if best is None or loss < best * (1 - self.min_improvement):
            return state | {'best_loss': loss, 'epochs_without': 0}
        epochs = state['epochs_without'] + 1
        if epochs < self.patience or state['rung'] + 1 == len(self.ladder):
            return state | {'epochs_without': epochs}
        reason = (
            f'epoch {state["epoch"] + 1}: mean training loss {loss:.4g}, no {self.min_improvement:g} '
            f'relative improvement on {best:.4g} for {epochs} epochs'
        )
        inputs = {'loss': loss, 'best_loss': best, 'epochs_without': epochs}
        rung = state['rung'] + 1
        return state | {'rung': rung, 'reason': reason, 'epochs_without': 0, 'inputs': inputs}

    def decide(self, state: State, examples_seen: int) -> Decision:
        return Decision(self.ladder[state['rung']], state['reason'], state['inputs'])


def create(config, rate: LearningRate, clock: Clock) -> PlateauPolicy:
    """Ladder from ``batch.base_size`` by ``batch.growth_factor`` up to ``batch.max_size``."""
    batch = config.batch
    return PlateauPolicy(ladder_from(batch, clock), batch.patience_epochs, batch.min_improvement)
