"""Where batch sizes begin: transitions, growth in exact arithmetic, ladders."""

import bisect
import dataclasses
import itertools
import math
import operator
from collections.abc import Iterable
from fractions import Fraction

from adabatch_jax.schedules.clock import Clock


@dataclasses.dataclass(frozen=True)
class Transition:
    """From ``examples_seen`` on, batches have ``batch_size`` examples; ``reason`` is for people."""

    examples_seen: int
    batch_size: int
    reason: str

    def __post_init__(self):  # plans and records are JSON, which does not take NumPy's numbers
        for name in ('examples_seen', 'batch_size'):
            try:
                object.__setattr__(self, name, operator.index(getattr(self, name)))
            except TypeError as error:
                raise ValueError(
                    f'{name} of a transition: got {getattr(self, name)!r}; accepted: whole numbers of '
                    'examples, such as clock.examples(epoch)'
                ) from error


def check_transitions(transitions: Iterable[Transition]) -> tuple[Transition, ...]:
    """Returns the transitions as a tuple, or raises ``ValueError`` where they are out of order."""
    transitions = tuple(transitions)
    if not transitions or transitions[0].examples_seen != 0:
        got = f'one after {transitions[0].examples_seen} examples' if transitions else 'none'
        raise ValueError(f'got {got} first; the first stage has to start at epoch 0')
    for before, after in itertools.pairwise(transitions):
        if after.examples_seen <= before.examples_seen:
            raise ValueError(
                f'out of order: the stage of batch size {after.batch_size} starts after '
                f'{after.examples_seen} examples, the one before it (batch size '
                f'{before.batch_size}) after {before.examples_seen}; list them by rising start'
            )
    return transitions


def transition_at(transitions: tuple[Transition, ...], examples_seen: int) -> Transition:
    """The transition in force at a position."""
    return transitions[bisect.bisect(transitions, examples_seen, key=lambda t: t.examples_seen) - 1]


def grow(batch_size: int, factor: float, max_size: int = 0) -> int:
    """``floor(factor * batch_size)`` in exact arithmetic, at most ``max_size`` unless that is 0."""
    if factor <= 1:
        raise ValueError(f'growth_factor: got {factor}; needs a number above 1')
    grown = math.floor(Fraction(str(factor)) * batch_size)
    return min(grown, max_size) if max_size else grown


def ladder(base_size: int, factor: float, max_size: int) -> tuple[int, ...]:
    """The finite set of batch sizes that growth by ``factor`` from ``base_size`` can reach."""
    rungs = [base_size]
    while (rung := grow(rungs[-1], factor, max_size)) > rungs[-1]:
        rungs.append(rung)
    return tuple(rungs)


def geometric(
    clock: Clock, base_size: int, factor: float, every_epochs: float, max_size: int = 0
) -> tuple[Transition, ...]:
    """A batch that grows by ``factor`` every ``every_epochs`` epochs until ``max_size`` (0: none).

    AdaBatch (Devarakonda, Naumov, Garland, 2017), section 3: ``B <- floor(beta B)``.
    """
    return grow_at(clock, base_size, factor, clock.multiples(every_epochs, 'growth_epochs'), max_size)


def grow_at(
    clock: Clock, base_size: int, factor: float, events: Iterable[int], max_size: int = 0
) -> tuple[Transition, ...]:
    """A batch that grows by ``factor`` at each of the positions ``events``, until ``max_size``."""
    transitions = [Transition(0, base_size, f'starts with batch size {base_size}')]
    for event in events:
        size = transitions[-1].batch_size
        grown = grow(size, factor, max_size)
        if grown > size:
            reason = f'epoch {clock.epoch(event):g}: batch grows by {grown / size:g}'
            transitions.append(Transition(event, grown, reason))
    return tuple(transitions)
