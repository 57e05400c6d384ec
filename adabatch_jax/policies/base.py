"""What a batch-size policy is: decisions from observations, with a state that can be saved."""

import dataclasses
import math
import operator
from collections.abc import Iterable
from typing import Any

from adabatch_jax.schedules import Clock, Transition, grow, ladder, transition_at

State = dict[str, Any]  # plain JSON types: it travels in the checkpoint, see ``as_saved``
ADAPTIVE_OPTIMIZERS = ('adam', 'adamw', 'lamb', 'adagrad')  # whose steps do not grow with the gradient


@dataclasses.dataclass(frozen=True)
class Observation:
    """What a policy sees of one update.

    Attributes:
      epoch: progress at the start of the update, in epochs.
      batch_size: examples of the update.
      learning_rate: its learning rate.
      loss: mean training loss over its examples, before the update.
      seconds: wall time from the end of the update before to its own end; not a number where steps were
        compiled meanwhile, which takes time from the update's own work.
      variance: estimate of tr(Sigma), the variance of the gradients of single examples; this and what
        follows where the policy asks for ``statistics``, else not a number.
      squared_gradient: estimate of ``|G|^2``, of the mean gradient without its noise; may be negative.
      variance_along: estimate of the variance of single examples' gradients times the batch's.
      squared_norm: of the batch's own gradient.
    """

    epoch: float
    batch_size: int
    learning_rate: float
    loss: float
    seconds: float = math.nan
    variance: float = math.nan
    squared_gradient: float = math.nan
    variance_along: float = math.nan
    squared_norm: float = math.nan


@dataclasses.dataclass(frozen=True)
class Decision:
    """The batch size to use next, and why.

    Attributes:
      batch_size: in examples.
      reason: in words, for the ``stage`` record.
      inputs: the numbers that it rests on, for the same record.
      gain: what the effective learning rate is multiplied by; None for the coupling's factor.
    """

    batch_size: int
    reason: str
    inputs: dict[str, float] = dataclasses.field(default_factory=dict)
    gain: float | None = None

    def __post_init__(self):  # policies compute with NumPy, whose numbers JSON does not take
        plain = {key: getattr(x, 'tolist', lambda x=x: x)() for key, x in self.inputs.items()}
        object.__setattr__(self, 'batch_size', operator.index(self.batch_size))
        object.__setattr__(self, 'inputs', plain)
        if self.gain is not None:
            object.__setattr__(self, 'gain', float(self.gain))
            if not 0 < self.gain < math.inf:
                raise ValueError(f'gain of a decision: got {self.gain}; accepted: positive numbers')


class Policy:
    """Chooses the batch size of every update.

    The loop is one observation behind: the decision for update k + 1 rests on the updates up to
    k - 1, because update k is still running when it is taken. ``observe`` and ``decide`` are pure
    functions of their arguments, so that a continued run decides as one never stopped would.

    Attributes:
      transitions: the stages known in advance, the first of them at 0 examples seen.
      ladder: every batch size that ``decide`` may return, sorted.
      planned: whether ``transitions`` are all there will be; else decisions follow the first of them.
      may_shrink: whether a decision may go down the ladder, where they are not planned.
      statistics: which statistics of the gradients it observes: none (``''``), ``'norms'`` (``variance``
        and ``squared_gradient``) or ``'inner_products'`` (all).
      max_per_device: largest microbatch, where the policy has to have one; 0 where it does not matter.
      probe_examples: length of a branch, for policies that probe.
      note: a sentence about it for people who read the plan.
    """

    transitions: tuple[Transition, ...]
    ladder: tuple[int, ...]
    planned: bool
    may_shrink = False
    statistics = ''
    max_per_device = 0
    probe_examples = 0
    note = ''

    @property
    def observes(self) -> bool:
        """Whether decisions may depend on what was observed, and not on the position alone."""
        return not self.planned or type(self).observe is not Policy.observe

    def initial_state(self) -> State:
        """The state before the first update."""
        return {}

    def continued(self, state: State, epoch: float, batch_size: int) -> State:
        """The state to go on with in the middle of a run whose policy or ladder is now another.

        Args:
          state: of this policy with another ladder; empty where the policy was another.
          epoch: where the run is.
          batch_size: what it trained with last.
        """
        return self.initial_state()

    def on_other_devices(self, state: State) -> State:
        """The state to go on with where the run does so on other devices, or on more or fewer."""
        return state

    def observe(self, state: State, observation: Observation) -> State:
        """The state after one more update has been seen."""
        return state

    def probes(self, state: State, examples_seen: int) -> tuple[int, ...]:
        """Batch sizes to train branches with before the next decision; mostly none."""
        return ()

    def probed(self, state: State, examples_seen: int, losses: dict[int, float]) -> State:
        """The state after branches, with the training loss that each batch size ended in."""
        return state

    def decide(self, state: State, examples_seen: int) -> Decision:
        """The batch size of an update that starts at ``examples_seen``."""
        raise NotImplementedError


def as_saved(state: Any, name: str = 'state') -> Any:
    """A state as a checkpoint gives it back, so that a run that was stopped decides as any other.

    Args:
      state: of a policy, or a part of one.
      name: what a mistake is reported of.

    Raises:
      TypeError: it holds something else than JSON's types.
    """
    accepted = 'dict with strings as keys, list, str, int, float, bool and None'
    if isinstance(state, dict):
        for key in state:
            if not isinstance(key, str):
                raise TypeError(f'{name} of a policy: got the key {key!r}; accepted: {accepted}')
        return {key: as_saved(item, f'{name}[{key!r}]') for key, item in state.items()}
    if isinstance(state, list):
        return [as_saved(item, f'{name}[{k}]') for k, item in enumerate(state)]
    if isinstance(state, float):
        return float(state)  # NumPy's float64 is one, and computes in another way
    if not isinstance(state, str | int | None):
        kind = type(state).__name__
        raise TypeError(f'{name} of a policy: got {state!r}, a {kind}; accepted: {accepted}')
    return state


class PlannedPolicy(Policy):
    """A policy whose stages are all known before training."""

    planned = True

    def __init__(self, transitions: Iterable[Transition]):
        self.transitions = tuple(transitions)
        self.ladder = tuple(sorted({t.batch_size for t in self.transitions}))

    def decide(self, state: State, examples_seen: int) -> Decision:
        transition = transition_at(self.transitions, examples_seen)
        return Decision(transition.batch_size, transition.reason)


def nearest_rung(rungs: tuple[int, ...], batch_size: int) -> State:
    """State at the ``rung`` of a ladder that is nearest to a batch size, as a ratio."""
    rung = min(range(len(rungs)), key=lambda k: abs(math.log(rungs[k] / batch_size)))
    reason = f'goes on with {rungs[rung]}, the nearest to {batch_size}'
    return {'rung': rung, 'reason': reason, 'inputs': {}}


def decayed(sums: dict[str, float], quantities: dict[str, float], decay: float) -> dict[str, float]:
    """Exponentially weighted sums with one more value each; a sum that is not there begins at 0."""
    return {k: decay * sums.get(k, 0.0) + (1 - decay) * value for k, value in quantities.items()}


def check_grows(sizes, batch, min_size: int = 0) -> None:
    """Raises ``ValueError`` where a policy that is there to grow the batch has one size only."""
    if len(set(sizes)) == 1:
        lowest = f'min_size {min_size}' if min_size else f'base_size {batch.base_size}'
        raise ValueError(
            f'max_size: got {batch.max_size} with {lowest} and growth_factor '
            f'{batch.growth_factor:g}: the batch never grows; change them or choose policy fixed'
        )


def ladder_from(batch, clock: Clock, min_size: int = 0) -> tuple[int, ...]:
    """``batch.base_size`` times powers of ``batch.growth_factor``, up to ``batch.max_size``.

    Without a ceiling (0) up to the largest power that the data set holds. With a ``min_size`` the ladder
    begins there, and ``batch.base_size`` has to be on it.
    """
    lowest = min_size or batch.base_size
    rungs = ladder(lowest, batch.growth_factor, batch.max_size or clock.num_examples)
    if not batch.max_size and len(rungs) > 1 and grow(rungs[-2], batch.growth_factor) > rungs[-1]:
        rungs = rungs[:-1]  # the size of the data set is no power
    check_grows(rungs, batch, min_size)
    if batch.base_size not in rungs:
        raise ValueError(
            f'base_size: got {batch.base_size}, which growth by {batch.growth_factor:g} from min_size '
            f'{min_size} does not meet; accepted: {", ".join(map(str, rungs))}'
        )
    return rungs
