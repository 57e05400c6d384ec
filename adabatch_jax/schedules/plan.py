"""Plans: every stage of a run, worked out before its first update."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from adabatch_jax.schedules.clock import Clock, Update
from adabatch_jax.schedules.learning_rate import LearningRate
from adabatch_jax.schedules.transitions import Transition, check_transitions


@dataclasses.dataclass(frozen=True)
class Stage:
    """A run of consecutive updates with one batch size.

    ``start`` and ``end`` are the clock (examples seen) before the first and after the last update;
    ``first_update`` counts the updates of the stages before it. The learning rates are those of
    the first and of the last update. ``microbatch_size`` and ``num_microbatches`` are 0 where the batch
    does not divide over the devices, in the plan of a run that others have begun.
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
      max_per_device: largest microbatch of one device; 0 for no limit.
      microbatch_multiple: what every microbatch is a multiple of.
      min_groups: in how many parts, devices and microbatches, every batch comes at least.
    """

    clock: Clock
    learning_rate: LearningRate
    stages: tuple[Stage, ...]
    num_devices: int
    ladder: tuple[int, ...]
    planned: bool
    max_per_device: int = 0
    microbatch_multiple: int = 1
    min_groups: int = 1

    @property
    def num_updates(self) -> int:
        """Updates of the whole run."""
        return sum(stage.num_updates for stage in self.stages)

    def split(self, batch_size: int) -> tuple[int, int]:
        """``(microbatch_size, num_microbatches)`` of a batch size, as ``split_batch`` says."""
        return split_batch(
            batch_size,
            self.num_devices,
            self.max_per_device,
            self.microbatch_multiple,
            self.min_groups,
        )

    def can_split(self, batch_size: int, num_devices: int | None = None) -> bool:
        """Whether there is a split over its devices, or over another number of them."""
        try:
            dataclasses.replace(self, num_devices=num_devices or self.num_devices).split(batch_size)
        except ValueError:
            return False
        return True

    @property
    def usable(self) -> tuple[int, ...]:
        """The batch sizes of the ladder that its devices can share."""
        return tuple(filter(self.can_split, self.ladder))

    def with_microbatches_up_to(self, max_per_device: int) -> 'Plan':
        """The same plan with its batches split for a largest microbatch; 0 for no limit.

        Raises:
          ValueError: a batch size cannot be split so.
        """
        plan = dataclasses.replace(self, max_per_device=max_per_device)
        splits = {batch_size: plan.split(batch_size) for batch_size in self.usable}
        stages = []
        for stage in plan.stages:
            size, count = splits.get(stage.batch_size, (0, 0))
            stages.append(dataclasses.replace(stage, microbatch_size=size, num_microbatches=count))
        return dataclasses.replace(plan, stages=tuple(stages))

    @property
    def largest_microbatch(self) -> int:
        """Of all batch sizes that the run may use; as ``max_per_device`` it gives the same splits."""
        sizes = (self.split(batch_size)[0] for batch_size in self.usable)
        return max(sizes, default=self.max_per_device)

    def updates(self) -> Iterator[Update]:
        """Every update in order."""
        for stage in self.stages:
            updates = self.clock.updates(stage.start, stage.batch_size)
            yield from itertools.islice(updates, stage.num_updates)

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
            'max_per_device': self.max_per_device,
            'coupling': self.learning_rate.coupling,
            'reference_batch_size': self.learning_rate.reference_batch_size,
            'planned': self.planned,
            'ladder': list(self.ladder),
            'num_updates': self.num_updates,
            'stages': stages,
        }


def split_batch(
    batch_size: int,
    num_devices: int,
    max_per_device: int = 0,
    multiple_of: int = 1,
    min_groups: int = 1,
) -> tuple[int, int]:
    """Returns ``(microbatch_size, num_microbatches)``: the fewest equal microbatches that fit.

    Args:
      batch_size: examples per update over all devices.
      num_devices: devices over all processes.
      max_per_device: largest microbatch of one device; 0 for no limit.
      multiple_of: what a microbatch has to be a multiple of, such as the groups of ghost BatchNorm.
      min_groups: microbatches over all devices that there have to be.

    Raises:
      ValueError: there is no such split.
    """
    if batch_size < 1:
        raise ValueError(f'batch size: got {batch_size}; needs at least 1')
    devices = f'{num_devices} device{"s" * (num_devices != 1)}'
    if batch_size % num_devices:
        raise ValueError(
            f'batch size {batch_size} does not divide evenly over {devices}; '
            f'use a multiple of {num_devices}'
        )
    per_device = batch_size // num_devices
    fewest = -(-per_device // max_per_device) if max_per_device else 1
    fewest = max(fewest, -(-min_groups // num_devices))
    for num_microbatches in range(fewest, per_device // multiple_of + 1):
        if per_device % (num_microbatches * multiple_of) == 0:
            return per_device // num_microbatches, num_microbatches
    at_most = f' of at most {max_per_device} examples' if max_per_device else ''
    asked = {
        f'multiples of {multiple_of}: model.batch_norm': multiple_of > 1,
        f'{min_groups} parts on all devices: batch.statistics.min_groups': min_groups > num_devices,
    }
    raise ValueError(
        f'batch size {batch_size} on {devices}: got {per_device} example{"s" * (per_device != 1)} a '
        f'device, which do not divide into {fewest} or more microbatches{at_most} '
        f'({"; ".join(text for text, is_asked in asked.items() if is_asked)})'
    )


def make_plan(
    clock: Clock,
    transitions: Iterable[Transition],
    learning_rate: LearningRate,
    *,
    num_devices: int = 1,
    max_per_device: int = 0,
    microbatch_multiple: int = 1,
    min_groups: int = 1,
    ladder: Iterable[int] = (),
    planned: bool = True,
    begun_on_others: bool = False,
) -> Plan:
    """Works out every stage of a run and refuses what would fail later in it.

    Args:
      clock, learning_rate, num_devices, max_per_device, microbatch_multiple, min_groups, planned: of
        the ``Plan``.
      transitions: where batch sizes begin, in order, the first at 0 examples.
      ladder: further batch sizes that decisions during the run may choose.
      begun_on_others: whether batch sizes that do not divide over these devices may be those of a part
        that others train.

    Raises:
      ValueError: stages out of order, or a batch size that exceeds the data set or does not divide
        evenly over the devices.
    """
    transitions = check_transitions(transitions)
    sizes = sorted({*ladder, *(t.batch_size for t in transitions)})
    _check_fit(sizes, transitions[0].batch_size, clock.num_examples)
    plan = Plan(
        clock,
        learning_rate,
        (),
        num_devices,
        tuple(sizes),
        planned,
        max_per_device,
        microbatch_multiple,
        min_groups,
    )
    for size in sizes:
        if not begun_on_others or size < 1:
            plan.split(size)
    stages = _stages(clock, transitions, learning_rate)
    highest = max(max(stage.learning_rate_start, stage.learning_rate_end) for stage in stages)
    if not highest <= float(np.finfo(np.float32).max):
        raise ValueError(f'a learning rate of {highest:g} is more than single precision can hold')
    return dataclasses.replace(plan, stages=stages).with_microbatches_up_to(max_per_device)


def _check_fit(sizes: Iterable[int], first: int, num_examples: int) -> None:
    for size in sizes:
        if size > num_examples:
            advice = 'set batch.max_size or choose fewer growth steps'
            if size == first:
                advice = 'start with less (batch.base_size, batch.stages)'
            raise ValueError(
                f'batch size {size} is larger than the data set ({num_examples} '
                f'example{"s" * (num_examples != 1)}); {advice}'
            )


def _stages(
    clock: Clock, transitions: tuple[Transition, ...], learning_rate: LearningRate
) -> tuple[Stage, ...]:
    """The stages that transitions in order lead to: those in which an update begins; not yet split."""
    stages = []
    position = 0
    stops = [min(t.examples_seen, clock.total_examples) for t in transitions[1:]]
    for transition, stop in zip(transitions, [*stops, clock.total_examples], strict=True):
        size = transition.batch_size
        start = clock.update_at(position, size).start
        num_updates, last = clock.updates_before(start, stop, size)
        if last is None:  # no update begins in it
            if position < stop:  # its batch does not fit into what is left of the epoch
                position = start
            continue
        before = stages[-1] if stages else None
        stage = Stage(
            index=len(stages),
            batch_size=size,
            microbatch_size=0,
            num_microbatches=0,
            start=start,
            end=last.end,
            first_update=before.first_update + before.num_updates if before else 0,
            num_updates=num_updates,
            learning_rate_start=learning_rate(clock.epoch(start), size),
            learning_rate_end=learning_rate(clock.epoch(last.start), size),
            reason=transition.reason,
        )
        if before and (before.batch_size, before.end) == (size, start):  # nothing lay between them
            stages[-1] = dataclasses.replace(
                before,
                end=stage.end,
                num_updates=before.num_updates + num_updates,
                learning_rate_end=stage.learning_rate_end,
            )
        else:
            stages.append(stage)
        position = last.end
    return tuple(stages)
