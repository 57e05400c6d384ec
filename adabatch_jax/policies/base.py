"""What a batch-size policy is: decisions from observations, with a state that can be saved."""

import dataclasses
from typing import Any

from adabatch_jax.schedules import Clock, Transition, grow, ladder, transition_at

State = dict[str, Any]  # plain JSON types: it travels in the checkpoint


@dataclasses.dataclass(frozen=True)
class Observation:
    """What a policy sees of one update.

    Attributes:
      epoch: progress at the start of the update, in epochs.
      batch_size: examples of the update.
      learning_rate: its learning rate.
      loss: mean training loss over its examples, before the update.
    """

    epoch: float
    batch_size: int
    learning_rate: float
    loss: float


@dataclasses.dataclass(frozen=True)
class Decision:
    """The batch size to use next, and why, in words for the ``stage`` record."""

    batch_size: int
    reason: str


class Policy:
    """Chooses the batch size of every update.

    The loop is one observation behind: the decision for update k + 1 rests on the updates up to
    k - 1, because update k is still running when it is taken. ``observe`` and ``decide`` are pure
    functions of their arguments, so that a continued run decides as one never stopped would.

    Attributes:
      transitions: the stages known in advance, the first of them at 0 examples seen.
      ladder: every batch size that ``decide`` may return, sorted.
      planned: whether ``transitions`` are all there will be.
    """

    transitions: tuple[Transition, ...]
    ladder: tuple[int, ...]
    planned: bool

    def initial_state(self) -> State:
        """The state before the first update."""
        return {}

    def observe(self, state: State, observation: Observation) -> State:
        """The state after one more update has been seen."""
        return state

    def decide(self, state: State, examples_seen: int) -> Decision:
        """The batch size of an update that starts at ``examples_seen``."""
        raise NotImplementedError


class PlannedPolicy(Policy):
    """A policy whose stages are all known before training."""

    planned = True

    def __init__(self, transitions: tuple[Transition, ...]):
        self.transitions = transitions
        self.ladder = tuple(sorted({t.batch_size for t in transitions}))

    def decide(self, state: State, examples_seen: int) -> Decision:
        transition = transition_at(self.transitions, examples_seen)
        return Decision(transition.batch_size, transition.reason)


def check_grows(sizes, batch) -> None:
    """Raises ``ValueError`` where a policy that is there to grow the batch has one size only."""
    if len(set(sizes)) == 1:
        raise ValueError(
            f'max_size: got {batch.max_size} with base_size {batch.base_size} and growth_factor '
            f'{batch.growth_factor:g}: the batch never grows; change them or choose policy fixed'
        )


def ladder_from(batch, clock: Clock) -> tuple[int, ...]:
    """``batch.base_size`` times powers of ``batch.growth_factor``, up to ``batch.max_size``.

    Without a ceiling (0) up to the largest power that the data set holds.
    """
    rungs = ladder(batch.base_size, batch.growth_factor, batch.max_size or clock.num_examples)
    if not batch.max_size and len(rungs) > 1 and grow(rungs[-2], batch.growth_factor) > rungs[-1]:
        rungs = rungs[:-1]  # the size of the data set is no power
    check_grows(rungs, batch)
    return rungs
