"""What a stage trains with: its compiled steps and its batches, opened ahead; and what is in flight."""

import concurrent.futures
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from adabatch_jax import distributed, malloc, steps
from adabatch_jax.experiment import Experiment
from adabatch_jax.schedules import Clock, LearningRate, Update
from adabatch_jax.schedules.learning_rate import AT_ONCE
from adabatch_jax.train_state import TrainState


@dataclasses.dataclass(frozen=True)
class Stream:
    """The steps and batches of one batch size.

    Attributes:
      train_spec: see ``Experiment``.
      batch_size: of the stage.
      steps: compiled train steps by the number of updates that they make.
      take: the batch of an update, or those of several as their step takes them. The updates of a
        stream are taken in their order.
      snapshot: takes the snapshot that an update goes by, unless that was done; None without any.
    """

    train_spec: Callable[[int, int], steps.StepSpec]
    batch_size: int
    steps: dict[int, steps.CompiledStep]
    take: Callable[[Sequence[Update]], Any]
    snapshot: 'Snapshotter | None' = None

    def update(
        self, state: TrainState, batch: Any, updates: Sequence[Update], learning_rates: Sequence[float]
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """Starts updates whose batch was taken, with a learning rate for each; see ``train_step``."""
        if self.snapshot:
            state = self.snapshot(state, updates[0])
        clocks = [update.end for update in updates]
        scalars = np.array(learning_rates, np.float32), np.array(clocks, np.uint32)
        if len(updates) == 1:
            scalars = tuple(x[0] for x in scalars)
        return self.steps[len(updates)](state, batch, *distributed.put_everywhere(scalars))

    def compile(self, count: int) -> float:
        """Waits for the step that makes a number of updates; seconds of compiling it."""
        self.steps[count] = steps.CACHE.get(self.train_spec(self.batch_size, count))
        return self.steps[count].compile_seconds

    @property
    def waited(self) -> float:
        """Seconds that the devices waited for parts of the last batch, where it came in parts."""
        return sum(getattr(step.executable, 'waited', 0.0) for step in self.steps.values())

    @property
    def compile_seconds(self) -> float:
        """Seconds of compiling its steps."""
        return sum(step.compile_seconds for step in self._compiled)

    @property
    def cache_hit(self) -> bool:
        """Whether nothing had to be compiled."""
        return all(step.cache_hit for step in self._compiled)

    @property
    def memory_bytes(self) -> int:
        """Memory of one device while a step runs."""
        return max(step.memory_bytes for step in self._compiled)

    @property
    def _compiled(self) -> list[steps.CompiledStep]:
        return [*self.steps.values(), *([self.snapshot.step] if self.snapshot else [])]


@dataclasses.dataclass(frozen=True)
class InFlight:
    """Updates that were dispatched together and whose sums have not been read.

    Attributes:
      step: number of the first of them; the first of a run is 1.
      updates: one after the other.
      learning_rates: of each.
      sums: as the train step gives them.
    """

    step: int
    updates: list[Update]
    learning_rates: list[float]
    sums: dict[str, jax.Array]

    def is_ready(self) -> bool:
        """Whether the devices are done."""
        return all(x.is_ready() for x in self.sums.values())


class EffectiveRates:
    """Effective learning rates of updates, worked out for many at once.

    That is a computation of its own, which on a CPU would wait for the update in flight.
    """

    def __init__(self, clock: Clock, rate: LearningRate):
        self._clock, self._rate = clock, rate
        self._known: dict[int, float] = {}  # by the start of the update

    def __call__(self, update: Update) -> float:
        """That of an update."""
        if update.start not in self._known:
            following = self._clock.updates(update.start, update.batch_size)
            starts = [u.start for u in itertools.islice(following, AT_ONCE)]
            rates = self._rate.effective_at([self._clock.epoch(start) for start in starts])
            self._known = dict(zip(starts, rates.tolist(), strict=True))
        return self._known[update.start]


class Snapshotter:
    """Takes the snapshots of a stage for variance reduction.

    Attributes:
      step: the compiled step that makes them.
    """

    def __init__(self, experiment: Experiment, pipeline, batch_size: int):
        self._experiment, self._pipeline, self._batch_size = experiment, pipeline, batch_size
        self.step = steps.CACHE.get(experiment.snapshot_spec(batch_size))
        self._taken: int | None = None  # number of the last one

    def __call__(self, state: TrainState, update: Update) -> TrainState:
        """The state with the snapshot that an update goes by: of its own weights, if it is a new one."""
        number = self._experiment.snapshots.number(update.start)
        if self._taken is None:
            self._taken = int(state.reduction['number'])
        if number != self._taken:
            state = self._take(state, number, int(self._experiment.clock.epoch(update.start)))
        self._taken = number
        return state

    def _take(self, state: TrainState, number: int, epoch: int) -> TrainState:
        batch = self._experiment.snapshots.batch(self._experiment.config.seed, number)
        in_batch, skipped = np.zeros((2, self._experiment.info.num_train), bool)
        in_batch[batch] = True
        if self._experiment.reduction.skip:
            skipped = in_batch & (np.asarray(state.reduction['skips_left']) > 0)
        step, put = self.step.executable, distributed.put_everywhere
        whole = batch[: len(batch) // self._batch_size * self._batch_size]  # as in training
        state = step.estimate(state, self._parts(whole if len(whole) else batch, epoch), put)
        about = {
            'number': np.int32(number),
            'size': np.float32(len(batch)),
            'in_batch': in_batch,
            'skipped': skipped,
        }
        return step(state, self._parts(batch[~skipped[batch]], epoch), about, put)

    def _parts(self, examples: np.ndarray, epoch: int) -> Iterator[Any]:
        """Examples in parts of the batch size; the last is filled up, marked by their complements."""
        size = self._batch_size
        missing = -len(examples) % size if len(examples) else size
        filled = np.concatenate([examples, ~np.resize(examples if len(examples) else [0], missing)])
        for part in filled.reshape(-1, size):
            yield self._pipeline.take_examples(part, epoch)


def open_stream(experiment: Experiment, pipeline, update: Update) -> Stream:
    """The stream of the stage that begins with an update; its first batches are on the devices."""
    specs = experiment.train_specs(update.batch_size)
    for spec in experiment.stage_specs(update.batch_size):  # queued together, ahead of later stages'
        steps.CACHE.precompile(spec)
    compiled = {count: steps.CACHE.get(spec) for count, spec in specs.items()}
    stream = functools.partial(Stream, experiment.train_spec, update.batch_size, compiled)
    if experiment.load:
        snapshot = Snapshotter(experiment, pipeline, update.batch_size) if experiment.snapshots else None
        return stream(pipeline.take, snapshot)
    num_parts = specs[1].num_parts
    batches = distributed.put_ahead(
        {'image': batch['image'], 'label': batch['label']}
        for batch in pipeline.train_batches(update.start, update.batch_size, num_parts)
    )
    batches = itertools.chain([next(batches)], batches)
    if num_parts > 1:  # one after the other: a batch is an iterator of its parts
        return stream(lambda _: itertools.islice(batches, num_parts))
    return stream(lambda _: next(batches))


class Streams:
    """Opens the stream of the next stage in the background, while the one before it trains.

    Args:
      open_: as ``open_stream``, for an update.
    """

    def __init__(self, open_: Callable[[Update], Stream]):
        self._open = open_
        self._executor = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix='next-stage')
        self._ahead: tuple[Update, concurrent.futures.Future] | None = None

    def prepare(self, update: Update) -> None:
        """Begins to open the stream that begins with an update; one at a time."""
        self._ahead = update, self._executor.submit(self._open, update)

    def take(self, update: Update) -> Stream:
        """The stream that begins with an update, waited for where necessary.

        Raises:
          Exception: what opening it raised.
        """
        malloc.give_back()
        ahead, self._ahead = self._ahead, None
        if ahead and ahead[0] == update:
            return ahead[1].result()
        return self._open(update)

    def close(self) -> None:
        """Ends the thread; a stream that has not begun to open is given up."""
        self._ahead = None
        self._executor.shutdown(wait=True, cancel_futures=True)
