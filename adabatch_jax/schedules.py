"""Stages, plans, training progress and learning-rate coupling.

Plain Python and optax, usable without the rest of the package::

    clock = Clock(num_examples=50_000, num_epochs=100)
    rate = LearningRate(step_schedule(0.01, 0.375, [20, 40, 60, 80]), 'linear', 128)
    plan = make_plan(clock, geometric(clock, 128, 2, 20), rate)
    print([stage.batch_size for stage in plan.stages])       # [128, 256, 512, 1024, 2048]
    optimizer = optax.sgd(plan.learning_rate_schedule())      # for a training loop of your own

Everything here is a function of one clock, the integer number of training examples seen, and
raises ``ValueError`` with the offending value for arguments that no run could use.
"""

import bisect
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

REMAINDERS = ('carry', 'drop')
COUPLINGS = {'linear': 1.0, 'sqrt': 0.5, 'none': 0.0}
# The device keeps the clock as an unsigned 32-bit integer: 3,352 epochs of ImageNet.
MAX_EXAMPLES = 2**32 - 1


@dataclasses.dataclass(frozen=True)
class Update:
    """One optimizer update: the examples ``[start, start + batch_size)`` of the stream of epochs.

    ``end`` is the clock after the update. It is ``start + batch_size``, or the end of the epoch
    where what is left of the epoch is a partial batch that ``remainder='drop'`` skips.
    """

    start: int
    end: int
    batch_size: int


@dataclasses.dataclass(frozen=True)
class Clock:
    """Training progress, measured in examples seen.

    Attributes:
      num_examples: training examples in one epoch.
      num_epochs: length of the run; a run ends with the update that reaches it.
      remainder: what happens to the partial batch at the end of an epoch: with ``'carry'`` a batch
        continues into the next epoch, with ``'drop'`` the clock moves to the end of the epoch.
    """

    num_examples: int
    num_epochs: float
    remainder: str = 'carry'

    def __post_init__(self):
        if self.num_examples < 1:
            raise ValueError(f'num_examples: got {self.num_examples}; needs at least 1 example')
        if not (math.isfinite(self.num_epochs) and self.num_epochs > 0):
            raise ValueError(f'num_epochs: got {self.num_epochs}; needs a positive number')
        if self.remainder not in REMAINDERS:
            raise ValueError(f'remainder: got {self.remainder!r}; accepted: {", ".join(REMAINDERS)}')
        if not 1 <= self.total_examples <= MAX_EXAMPLES - self.num_examples:
            raise ValueError(
                f'num_epochs: {self.num_epochs:g} epochs of {self.num_examples} examples make '
                f'{self.total_examples} examples; a run has at least 1 and fewer than 2^32'
            )

    @property
    def total_examples(self) -> int:
        return self.examples(self.num_epochs)

    def examples(self, epochs: float) -> int:
        """The clock at a number of epochs, rounded to a whole example."""
        return round(Fraction(epochs) * self.num_examples)

    def epoch(self, examples_seen: int) -> float:
        """Progress in epochs; exact at every whole epoch."""
        return examples_seen / self.num_examples

    def update_at(self, examples_seen: int, batch_size: int) -> Update:
        """The update of ``batch_size`` that follows at ``examples_seen``."""
        start = self._skip_partial(examples_seen, batch_size)
        return Update(start, self._skip_partial(start + batch_size, batch_size), batch_size)

    def _skip_partial(self, examples_seen: int, batch_size: int) -> int:
        if self.remainder == 'carry':
            return examples_seen
        left = -examples_seen % self.num_examples  # 0 at the start of an epoch: a whole one is left
        return examples_seen + left if left < batch_size else examples_seen

    def updates(self, examples_seen: int, batch_size: int) -> Iterator[Update]:
        """All updates of one batch size from ``examples_seen`` on, without end."""
        while True:
            update = self.update_at(examples_seen, batch_size)
            yield update
            examples_seen = update.end

    def updates_before(
        self, examples_seen: int, stop: int, batch_size: int
    ) -> tuple[int, Update | None]:
        """How many updates of ``batch_size`` begin before ``stop``, and the last of them."""
        count, last = 0, None
        while (update := self.update_at(examples_seen, batch_size)).start < stop:
            # All updates of one epoch (with ``carry``, of the whole stretch) at once.
            left = stop - update.start
            here = math.ceil(left / batch_size)
            if self.remainder == 'drop':
                left = self.num_examples - update.start % self.num_examples
                here = min(here, left // batch_size)
            count += here
            last = self.update_at(update.start + (here - 1) * batch_size, batch_size)
            examples_seen = last.end
        return count, last


@dataclasses.dataclass(frozen=True)
class Transition:
    """From ``examples_seen`` on, batches have ``batch_size`` examples; ``reason`` is for people."""

    examples_seen: int
    batch_size: int
    reason: str


def check_transitions(transitions: Iterable[Transition]) -> tuple[Transition, ...]:
    """Returns the transitions as a tuple, or raises ``ValueError`` where they are out of order."""
    transitions = tuple(transitions)
    if not transitions or transitions[0].examples_seen != 0:
        raise ValueError('stages: the first stage has to start at epoch 0')
    for before, after in zip(transitions, transitions[1:], strict=False):
        if after.examples_seen <= before.examples_seen:
            raise ValueError(
                f'stages: out of order: the stage of batch size {after.batch_size} starts after '
                f'{after.examples_seen} examples, the one before it (batch size '
                f'{before.batch_size}) after {before.examples_seen}; list them by rising start'
            )
    return transitions


def transition_at(transitions: tuple[Transition, ...], examples_seen: int) -> Transition:
    """The transition in force at a position."""
    return transitions[bisect.bisect(transitions, examples_seen, key=lambda t: t.examples_seen) - 1]


def grow(batch_size: int, factor: float, max_size: int = 0) -> int:
    """``floor(factor * batch_size)`` in exact arithmetic, at most ``max_size`` unless that is 0."""
    grown = math.floor(Fraction(str(factor)) * batch_size)
    return min(grown, max_size) if max_size else grown


def ladder(base_size: int, factor: float, max_size: int) -> tuple[int, ...]:
    """The finite set of batch sizes that growth by ``factor`` from ``base_size`` can reach."""
    if factor <= 1:
        raise ValueError(f'growth_factor: got {factor}; needs a number above 1')
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
    if every_epochs <= 0:
        raise ValueError(f'growth_epochs: got {every_epochs}; needs a positive number of epochs')
    events = []
    while (at := clock.examples(every_epochs * (len(events) + 1))) < clock.total_examples:
        if at == (events[-1] if events else 0):
            raise ValueError(f'growth_epochs: got {every_epochs}; that is less than one example')
        events.append(at)
    return grow_at(clock, base_size, factor, events, max_size)


def grow_at(
    clock: Clock, base_size: int, factor: float, events: Iterable[int], max_size: int = 0
) -> tuple[Transition, ...]:
    """A batch that grows by ``factor`` at each of the positions ``events``, until ``max_size``."""
    if factor <= 1:
        raise ValueError(f'growth_factor: got {factor}; needs a number above 1')
    transitions = [Transition(0, base_size, f'starts with batch size {base_size}')]
    for event in events:
        size = transitions[-1].batch_size
        grown = grow(size, factor, max_size)
        if grown > size:
            reason = f'epoch {clock.epoch(event):g}: batch grows by {grown / size:g}'
            transitions.append(Transition(event, grown, reason))
    return tuple(transitions)


# ------------------------------------------------------------------------- learning rate


def step_schedule(value: float, decay_factor: float, epochs: Iterable[float]) -> optax.Schedule:
    """``value`` times ``decay_factor`` for every one of ``epochs`` that has passed."""
    return optax.piecewise_constant_schedule(value, dict.fromkeys(epochs, decay_factor))


def decay_events(every: float, at: Iterable[float], num_epochs: float) -> tuple[float, ...]:
    """The epochs, inside the run, at which a step schedule decays."""
    at = tuple(float(epoch) for epoch in at)
    if at:
        if any(b <= a for a, b in zip((0.0, *at), at, strict=False)):
            raise ValueError(f'decay_at_epochs: got {at}; needs rising positive epochs')
        return at
    if every <= 0:
        raise ValueError(f'decay_epochs: got {every}; needs a positive number of epochs')
    return tuple(every * k for k in range(1, math.ceil(num_epochs / every)))


def effective_schedule(rate, num_epochs: float) -> optax.Schedule:
    """The effective learning rate over epochs that ``config.learning_rate`` describes.

    Linear warm-up is a factor that rises from ``warmup_initial`` to 1 over ``warmup_epochs``; the
    decays of a step schedule stay where they are (Goyal et al., 2017, section 2.2), a cosine or
    polynomial decay begins when warm-up ends and reaches 0 at the end of the run.

    Args:
      rate: an object with the keys of ``config.learning_rate`` as attributes.
      num_epochs: length of the run.
    """
    warmup = rate.warmup_epochs
    if not 0 <= warmup < num_epochs:
        raise ValueError(
            f'warmup_epochs: got {warmup:g}; accepted: from 0 to below num_epochs ({num_epochs:g})'
        )
    value, decay_length = rate.effective, num_epochs - warmup
    if rate.schedule == 'constant':
        schedule = optax.constant_schedule(value)
    elif rate.schedule == 'step':
        events = decay_events(rate.decay_epochs, rate.decay_at_epochs, num_epochs)
        schedule = step_schedule(value, rate.decay_factor, events)
    elif rate.schedule == 'cosine':
        cosine = optax.cosine_decay_schedule(value, decay_length)
        schedule = lambda epoch: cosine(jnp.maximum(epoch - warmup, 0))  # noqa: E731
    elif rate.schedule == 'polynomial':
        schedule = optax.polynomial_schedule(value, 0.0, rate.power, decay_length, warmup)
    else:
        raise ValueError(
            f'schedule: got {rate.schedule!r}; accepted: constant, step, cosine, polynomial'
        )
    if warmup == 0:
        return schedule
    ramp = optax.linear_schedule(rate.warmup_initial, 1.0, warmup)
    return lambda epoch: schedule(epoch) * ramp(epoch)


@dataclasses.dataclass(frozen=True)
class LearningRate:
    """``effective(epoch) * (batch_size / reference_batch_size) ** p``.

    Attributes:
      effective: optax schedule over training progress in epochs: the learning rate at the
        reference batch size. Never over the step count, since a step is worth a different amount
        of data in each stage.
      coupling: ``'linear'`` (p = 1), ``'sqrt'`` (p = 1/2) or ``'none'`` (p = 0).
      reference_batch_size: the batch size for which the effective rate is stated.
    """

    effective: optax.Schedule
    coupling: str = 'linear'
    reference_batch_size: int = 128

    def __post_init__(self):
        if self.coupling not in COUPLINGS:
            raise ValueError(f'coupling: got {self.coupling!r}; accepted: {", ".join(COUPLINGS)}')
        if self.reference_batch_size < 1:
            raise ValueError(f'reference_batch_size: got {self.reference_batch_size}; needs >= 1')

    def __call__(self, epoch, batch_size):
        """Learning rate of an update that starts at ``epoch``; numbers or arrays, in float64."""
        scale = (np.asarray(batch_size) / self.reference_batch_size) ** COUPLINGS[self.coupling]
        rate = self.effective_at(epoch) * scale
        return rate if np.ndim(rate) else float(rate)

    def effective_at(self, epoch) -> np.ndarray:
        """The effective rate at an epoch or an array of epochs, in float64.

        Worked out on the host in double precision: in float32 the last update before a decay
        at epoch 60 of ImageNet would round to the decay, and the question would queue behind the
        training step on an accelerator.
        """
        with jax.enable_x64(True), jax.default_device(_host_device()):
            return np.asarray(self._compiled(np.asarray(epoch, np.float64)))

    def __reduce__(self):  # the compiled schedule is rebuilt, not copied
        return LearningRate, (self.effective, self.coupling, self.reference_batch_size)

    @property
    def _compiled(self):
        if '_jitted' not in self.__dict__:
            object.__setattr__(self, '_jitted', jax.jit(self.effective))
        return self.__dict__['_jitted']


def _host_device():
    try:
        return jax.local_devices(backend='cpu')[0]
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
        return None


# ---------------------------------------------------------------------------------- plan


@dataclasses.dataclass(frozen=True)
class Stage:
    """A run of consecutive updates with one batch size.

    ``start`` and ``end`` are the clock (examples seen) before the first and after the last update;
    ``first_update`` counts the updates of the stages before it. The learning rates are those of
    the first and of the last update.
    """

    index: int
    batch_size: int
    microbatch_size: int
    num_microbatches: int
    start: int
    end: int
    first_update: int
    num_updates: int
    learning_rate_start: float
    learning_rate_end: float
    reason: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """Every stage of a run, worked out before its first update.

    Attributes:
      clock: the run's length and data.
      learning_rate: the coupling rule.
      stages: in order. Where ``planned`` is false they are what would follow without a decision.
      num_devices: devices over all processes.
      ladder: sorted batch sizes that the run may use.
      planned: whether the policy's stages are all known in advance.
    """

    clock: Clock
    learning_rate: LearningRate
    stages: tuple[Stage, ...]
    num_devices: int
    ladder: tuple[int, ...]
    planned: bool

    @property
    def num_updates(self) -> int:
        return sum(stage.num_updates for stage in self.stages)

    def updates(self) -> Iterator[Update]:
        """Every update in order."""
        for stage in self.stages:
            updates = self.clock.updates(stage.start, stage.batch_size)
            for _, update in zip(range(stage.num_updates), updates, strict=False):
                yield update

    def learning_rate_schedule(self) -> optax.Schedule:
        """The plan's learning rates as an optax schedule over the update count, for any optimizer.

        A table with one float32 for each update; past the end it stays at the last value.
        """
        updates = list(self.updates())
        epochs = np.array([self.clock.epoch(update.start) for update in updates])
        sizes = np.array([update.batch_size for update in updates])
        table = np.asarray(self.learning_rate(epochs, sizes), np.float32)
        return lambda count: jnp.asarray(table)[jnp.clip(count, 0, len(table) - 1)]

    def to_dict(self) -> dict[str, Any]:
        """The plan in plain types, as ``plan.json`` holds it."""
        clock = self.clock
        stages = []
        for stage in self.stages:
            epochs = {
                'start_epoch': clock.epoch(stage.start),
                'end_epoch': clock.epoch(stage.end),
            }
            stages.append({**dataclasses.asdict(stage), **epochs})
        return {
            'num_examples': clock.num_examples,
            'num_epochs': clock.num_epochs,
            'remainder': clock.remainder,
            'num_devices': self.num_devices,
            'coupling': self.learning_rate.coupling,
            'reference_batch_size': self.learning_rate.reference_batch_size,
            'planned': self.planned,
            'ladder': list(self.ladder),
            'num_updates': self.num_updates,
            'stages': stages,
        }


def split_batch(batch_size: int, num_devices: int, max_per_device: int = 0) -> tuple[int, int]:
    """Returns ``(microbatch_size, num_microbatches)``: the fewest equal microbatches that fit.

    Args:
      batch_size: examples per update over all devices.
      num_devices: devices over all processes.
      max_per_device: largest microbatch of one device; 0 for no limit.
    """
    if batch_size < 1:
        raise ValueError(f'batch size: got {batch_size}; needs at least 1')
    if batch_size % num_devices:
        raise ValueError(
            f'batch size {batch_size} does not divide evenly over {num_devices} devices; '
            f'use a multiple of {num_devices}'
        )
    per_device = batch_size // num_devices
    num_microbatches = 1
    if max_per_device:
        smallest = math.ceil(per_device / max_per_device)
        num_microbatches = next(
            n for n in range(smallest, per_device + 1) if per_device % n == 0
        )
    return per_device // num_microbatches, num_microbatches


def make_plan(
    clock: Clock,
    transitions: Iterable[Transition],
    learning_rate: LearningRate,
    *,
    num_devices: int = 1,
    max_per_device: int = 0,
    ladder: Iterable[int] = (),
    planned: bool = True,
) -> Plan:
    """Works out every stage of a run and refuses what would fail later in it.

    Args:
      clock: the run's length and data.
      transitions: where batch sizes begin, in order, the first at 0 examples.
      learning_rate: the coupling rule.
      num_devices: devices over all processes.
      max_per_device: largest microbatch of one device; 0 for no limit.
      ladder: further batch sizes that decisions during the run may choose.
      planned: whether ``transitions`` are all there will be.

    Raises:
      ValueError: stages out of order, or a batch size that exceeds the data set or does not divide
        evenly over the devices.
    """
    transitions = check_transitions(transitions)
    sizes = sorted({*ladder, *(t.batch_size for t in transitions)})
    for size in sizes:
        split_batch(size, num_devices, max_per_device)
        if size > clock.num_examples:
            raise ValueError(
                f'batch size {size} is larger than the data set ({clock.num_examples} examples); '
                'set batch.max_size or choose fewer growth steps'
            )
    stages = []
    position = count = 0
    stops = [min(t.examples_seen, clock.total_examples) for t in transitions[1:]]
    for transition, stop in zip(transitions, [*stops, clock.total_examples], strict=True):
        size = transition.batch_size
        start = clock.update_at(position, size).start
        num_updates, last = clock.updates_before(start, stop, size)
        if last is None:  # no update begins in it
            if position < stop:  # its batch does not fit into what is left of the epoch
                position = start
            continue
        microbatch_size, num_microbatches = split_batch(size, num_devices, max_per_device)
        stages.append(
            Stage(
                index=len(stages),
                batch_size=size,
                microbatch_size=microbatch_size,
                num_microbatches=num_microbatches,
                start=start,
                end=last.end,
                first_update=count,
                num_updates=num_updates,
                learning_rate_start=learning_rate(clock.epoch(start), size),
                learning_rate_end=learning_rate(clock.epoch(last.start), size),
                reason=transition.reason,
            )
        )
        count += num_updates
        position = last.end
    return Plan(clock, learning_rate, tuple(stages), num_devices, tuple(sizes), planned)


def next_update(
    clock: Clock, examples_seen: int, decide: Callable[[int], int]
) -> Update | None:
    """The update that follows at ``examples_seen``, or None where the run is over.

    Args:
      clock: the run's length and data.
      examples_seen: the clock after the update before.
      decide: batch size for a position.
    """
    update = clock.update_at(examples_seen, decide(examples_seen))
    if update.start != examples_seen:  # a dropped partial batch: the decision is for a new epoch
        update = clock.update_at(update.start, decide(update.start))
    return update if update.start < clock.total_examples else None
