"""Training progress, measured in examples seen: the one clock of a run."""

import dataclasses
import math
import numbers
import operator
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction

REMAINDERS = ('carry', 'drop')
# The device keeps the clock as an unsigned 32-bit integer: 3,352 epochs of ImageNet.
MAX_EXAMPLES = 2**32 - 1
MAX_EVENTS = 1000  # growths or decays at an interval, in one run


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

    Its methods take positions and batch sizes of any integer type, ``TrainState.examples_seen`` among
    them, and compute in ``int``; a float for one is a ``TypeError``.

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
        if not isinstance(self.num_examples, numbers.Integral) or self.num_examples < 1:
            raise ValueError(f'num_examples: got {self.num_examples!r}; needs at least 1 example')
        object.__setattr__(self, 'num_examples', operator.index(self.num_examples))
        if not (math.isfinite(self.num_epochs) and self.num_epochs > 0):
            raise ValueError(f'num_epochs: got {self.num_epochs}; needs a positive number')
        object.__setattr__(self, 'num_epochs', float(self.num_epochs))
        if self.remainder not in REMAINDERS:
            raise ValueError(f'remainder: got {self.remainder!r}; accepted: {", ".join(REMAINDERS)}')
        if not 1 <= self.total_examples <= MAX_EXAMPLES - self.num_examples:
            raise ValueError(
                f'num_epochs: {self.num_epochs:g} epochs of {self.num_examples} examples make '
                f'{self.total_examples} examples; a run has at least 1 and fewer than 2^32'
            )

    @property
    def total_examples(self) -> int:
        """The clock at the end of the run, in examples."""
        return self.examples(self.num_epochs)

    def examples(self, epochs: float) -> int:
        """The clock at a number of epochs, rounded to a whole example."""
        return round(Fraction(epochs) * self.num_examples)

    def passes(self, every_epochs: float, before: int, after: int) -> bool:
        """Whether a multiple of an interval of epochs lies between two positions, or on the latter."""
        interval = self._interval(every_epochs)
        return operator.index(after) // interval > operator.index(before) // interval

    def _interval(self, every_epochs: float) -> Fraction:
        # The decimal number that was written, not the nearest binary one: ten tenths are a whole.
        return Fraction(str(every_epochs)) * self.num_examples

    def multiples(self, every_epochs: float, name: str) -> tuple[int, ...]:
        """The positions, inside the run, at whole multiples of an interval of epochs.

        Raises:
          ValueError: naming ``name``, for less than an example or more than ``MAX_EVENTS`` of them.
        """
        shortest = max(self.num_epochs / MAX_EVENTS, 1 / self.num_examples)
        if not every_epochs >= shortest:
            raise ValueError(
                f'{name}: got {every_epochs}; accepted here: {shortest:.3g} epochs or more (an example '
                f'at least, and {MAX_EVENTS} times a run at most)'
            )
        if every_epochs >= self.num_epochs:
            return ()
        events = (self.examples(every_epochs * k) for k in range(1, MAX_EVENTS + 2))
        return tuple(event for event in events if event < self.total_examples)

    def epoch(self, examples_seen: int) -> float:
        """Progress in epochs; exact at every whole epoch."""
        return operator.index(examples_seen) / self.num_examples

    def update_at(self, examples_seen: int, batch_size: int) -> Update:
        """The update of ``batch_size`` that follows at ``examples_seen``."""
        examples_seen, batch_size = map(operator.index, (examples_seen, batch_size))
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
        stop, batch_size = map(operator.index, (stop, batch_size))
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

    def stretches(
        self, start: int, stop: int, batch_size: int, every_epochs: Iterable[float]
    ) -> Iterator[int]:
        """How many updates come one after the other until a multiple of an interval has passed.

        Args:
          start: where the first of them begins.
          stop: where no more begin.
          batch_size: of all of them.
          every_epochs: the intervals.

        Yields:
          Each such number; their sum is the number of updates that begin before ``stop``. A multiple
          that the clock skips with a part of an epoch has passed before the update that comes then.
        """
        start, stop = map(operator.index, (start, stop))
        intervals = [self._interval(every) for every in every_epochs]
        while (first := self.update_at(start, batch_size)).start < stop:
            start = first.start
            multiple = min(math.ceil((start // interval + 1) * interval) for interval in intervals)
            count, last = self.updates_before(start, min(multiple, stop), batch_size)
            yield count
            start = last.end


def next_update(clock: Clock, examples_seen: int, decide: Callable[[int], int]) -> Update | None:
    """The update that follows at ``examples_seen``, or None where the run is over.

    Args:
      clock: the run's length and data.
      examples_seen: the clock after the update before.
      decide: batch size for a position.
    """
    examples_seen = operator.index(examples_seen)
    update = clock.update_at(examples_seen, decide(examples_seen))
    if update.start != examples_seen:  # a dropped partial batch: the decision is for a new epoch
        update = clock.update_at(update.start, decide(update.start))
    return update if update.start < clock.total_examples else None
