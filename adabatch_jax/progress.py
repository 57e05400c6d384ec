"""How far a run has come and how long it still takes: a bar, or plain lines without a terminal."""

import time
from collections.abc import Sequence
from typing import Any

import jax
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from adabatch_jax import terminal
from adabatch_jax.scaling import fit_line
from adabatch_jax.schedules import Plan, Stage

# Fields of a run, and how they are shown.
_SHOWN = {'batch_size': ',', 'learning_rate': '.4g', 'loss': '.4f', 'examples_per_second': ',.0f'}

quiet = False  # whether to show nothing; a switch of the command line


def update_seconds(batch_size: int, measured: dict[int, float]) -> float:
    """Seconds of an update, measured or from what was measured of other batch sizes.

    From two sizes on time is a line over the size; with one, an example is taken to cost the same.

    Args:
      batch_size: in examples.
      measured: seconds by batch size, one or more.
    """
    if batch_size in measured:
        return measured[batch_size]
    if len(measured) == 1:
        ((size, seconds),) = measured.items()
        return seconds * batch_size / size
    fixed, per_example = fit_line(measured)
    return fixed + per_example * batch_size


def remaining_seconds(stages: Sequence[Stage], examples_seen: int, measured: dict[int, float]) -> float:
    """Seconds of the updates that are left of some stages.

    Args:
      stages: of a plan.
      examples_seen: the clock.
      measured: seconds of an update by batch size, one or more.
    """
    total = 0.0
    for stage in stages:
        left = (stage.end - max(stage.start, examples_seen)) / (stage.end - stage.start)
        if left > 0:
            total += left * stage.num_updates * update_seconds(stage.batch_size, measured)
    return total


class _Remaining(ProgressColumn):
    """Hours, minutes and seconds until the predicted end."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        end = task.fields['end']
        if end is None:
            return Text('-:--:--')
        minutes, seconds = divmod(round(max(0.0, end - time.monotonic())), 60)
        return Text(f'{minutes // 60}:{minutes % 60:02}:{seconds:02}')


class ProgressDisplay:
    """A progress bar over the epochs, or plain lines where the output is no terminal."""

    def __init__(self, plan: Plan, examples_seen: int):
        self._plan, self._clock = plan, plan.clock
        self._measured: dict[int, float] = {}
        self._bar = Progress(
            TextColumn('epoch {task.fields[epoch]:.2f}/{task.total:g}'),
            BarColumn(bar_width=20),
            TextColumn('batch {task.fields[batch_size]}'),
            TextColumn('lr {task.fields[learning_rate]}'),
            TextColumn('loss {task.fields[loss]}'),
            TextColumn('{task.fields[examples_per_second]} images/s'),
            _Remaining(),
            console=terminal.console,
            disable=quiet or not terminal.console.is_terminal or jax.process_index() > 0,
        )
        epoch = self._clock.epoch(examples_seen)
        self._task = self._bar.add_task(
            'train',
            total=self._clock.num_epochs,
            completed=epoch,
            epoch=epoch,
            end=None,
            **dict.fromkeys(_SHOWN, '-'),
        )

    def __enter__(self):
        self._bar.start()
        return self

    def __exit__(self, *_):
        if not self._bar.disable:  # or it prints an empty line, with rich before 14.3
            self._bar.stop()

    def update(self, examples_seen: int, paused_seconds: float, **fields: Any) -> None:
        """Shows where a run is.

        Args:
          examples_seen: the clock.
          paused_seconds: what of the run so far was no training, such as evaluation.
          **fields: ``batch_size``, ``learning_rate``, ``loss`` and ``examples_per_second`` of late.
        """
        epoch = self._clock.epoch(examples_seen)
        left = self.seconds_left(examples_seen, paused_seconds, **fields)
        end = None if left is None else time.monotonic() + left
        shown = {name: format(fields[name], form) for name, form in _SHOWN.items()}
        self._bar.update(self._task, completed=epoch, epoch=epoch, end=end, **shown)

    def seconds_left(
        self,
        examples_seen: int,
        paused_seconds: float,
        batch_size: int,
        examples_per_second: float,
        **_: Any,
    ) -> float | None:
        """Seconds until the end, with pauses as frequent as so far; None where nothing was measured."""
        if examples_per_second:
            self._measured[batch_size] = batch_size / examples_per_second
        if not self._measured or not examples_seen:
            return None
        rest = self._clock.total_examples - examples_seen
        if self._plan.planned:
            training = remaining_seconds(self._plan.stages, examples_seen, self._measured)
        else:  # as if nothing were decided any more
            training = rest / batch_size * update_seconds(batch_size, self._measured)
        return max(0.0, training + paused_seconds * rest / examples_seen)

    def say(self, message: str) -> None:
        """Prints a line above the bar."""
        if not quiet:
            terminal.say(message)
