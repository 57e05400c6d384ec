"""What a person sees: the plan, lines about a run, and tables of what it took."""

import contextlib
import errno
import functools
import io
import itertools
import os
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import rich.box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from adabatch_jax.scaling import WORTH, Model
from adabatch_jax.schedules import Plan, Stage


class _Console(Console):
    """One whose reader may go away, or whose disk may be full: what it shows is not worth a run."""

    def on_broken_pipe(self) -> None:
        self.give_up(BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)))

    def give_up(self, error: OSError) -> None:
        """Shows nothing from here on, and says so on standard error."""
        self.quiet = True
        complain(f'warning: standard output: {error.strerror}; nothing more is written there')


_MOST_RATES = 10_000  # of a stage, among which its highest is looked for

console = _Console(highlight=False, markup=False)
if not console.is_terminal:
    console = _Console(highlight=False, markup=False, width=120)  # a log file has no width of its own


def _print(what: Any) -> None:
    """Prints, in the first of several processes."""
    if jax.process_index() == 0:
        is_table = isinstance(what, Table)
        try:
            # A log file has no width, and a table whose digits are cut off is of no use.
            unwrapped = is_table or not console.is_terminal
            console.print(_whole(what) if is_table else what, soft_wrap=unwrapped)
        except OSError as error:
            console.give_up(error)


def _whole(table: Table) -> Text:
    """A table as wide as it is."""
    file = io.StringIO()
    options = {'force_terminal': console.is_terminal, 'force_jupyter': False}
    wide = Console(file=file, width=10_000, highlight=False, markup=False, **options)
    wide.print(table)
    return Text.from_ansi(file.getvalue().removesuffix('\n'))


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=title, title_justify='left', box=rich.box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    for column in columns:
        table.add_column(column, justify='right', no_wrap=True)
    return table


def _digits(value: float) -> str:
    """Three digits, and more before the decimal point where there are."""
    return f'{value:,.0f}' if value >= 100 else f'{value:.3g}'


def _count(number: float, noun: str, form: str = ',') -> str:
    """So many of something."""
    return f'{number:{form}} {noun}{"s" * (number != 1)}'


def _rates(plan: Plan, stage: Stage) -> str:
    """The first and the last learning rate of a stage, and between them the highest, if it is there."""
    if stage.num_updates > _MOST_RATES:
        positions = np.linspace(stage.start, stage.end, _MOST_RATES, endpoint=False)
    else:
        updates = plan.clock.updates(stage.start, stage.batch_size)
        positions = np.array([u.start for u in itertools.islice(updates, stage.num_updates)])
    rates = plan.learning_rate(positions / plan.clock.num_examples, stage.batch_size)
    first, highest, last = stage.learning_rate_start, float(np.max(rates)), stage.learning_rate_end
    shown = [first, highest, last] if highest > 1.001 * max(first, last) else [first, last]
    return ' - '.join(text for text, _ in itertools.groupby(f'{rate:.6g}' for rate in shown))


def print_plan(plan: Plan, normalised_over: Callable[[Stage], int], note: str = '') -> None:
    """Prints every stage of a plan and its totals.

    Args:
      plan: of the run.
      normalised_over: examples that BatchNorm takes its statistics over in a stage; 0 for none.
      note: what else there is to say.
    """
    clock = plan.clock
    table = _table('Plan', 'stage', 'epochs', 'batch', 'split', 'BatchNorm', 'updates', 'learning rate')
    for stage in plan.stages:
        n, over = stage.num_microbatches, normalised_over(stage)
        table.add_row(
            str(stage.index),
            f'{clock.epoch(stage.start):.5g} - {clock.epoch(stage.end):.5g}',
            f'{stage.batch_size:,}',
            f'{plan.num_devices:,} x {n:,} x {stage.microbatch_size:,}' if n else '-',
            f'{over:,}' if over else '-',
            f'{stage.num_updates:,}',
            _rates(plan, stage),
        )
    _print(table)
    rate = plan.learning_rate
    _print(
        f'{_count(plan.num_updates, "update")}, {_count(clock.num_epochs, "epoch", "g")} of '
        f'{_count(clock.num_examples, "example")}, partial batches: {clock.remainder}; learning rate '
        f'stated for batch size {rate.reference_batch_size:,}, coupling {rate.coupling}; split: devices '
        'x microbatches x examples of a microbatch; BatchNorm: examples behind each of its statistics'
    )
    if not plan.planned:
        sizes = ', '.join(map(str, plan.ladder))
        _print(f'Batch sizes are decided during the run, from {sizes}; shown: no change.')
    if note:
        _print(note)


def say(message: str) -> None:
    """Prints a line; above the progress bar, where there is one."""
    _print(message)


def complain(message: str) -> None:
    """Prints a line on standard error, where that can be."""
    if jax.process_index() == 0:
        with contextlib.suppress(OSError):
            print(message, file=sys.stderr, flush=True)


def print_stages(stages: list[dict[str, Any]], end: dict[str, Any], unusual: str = '') -> None:
    """Prints what each stage of a finished run took, and its end.

    Args:
      stages: see ``comparison.stage_rows``.
      end: the ``summary`` record.
      unusual: what else there is to say of it.
    """
    table = _table(
        'Stages', 'stage', 'epochs', 'batch', 'updates', 'rate', 'images/s', 'loss', 'compile', 'stall',
    )  # fmt: skip
    for s in stages:
        speed, loss = s['images_per_second'], s['loss']
        table.add_row(
            str(s['stage']),
            f'{s["epoch"]:.3g} - {s["end_epoch"]:.3g}',
            f'{s["batch_size"]:,}',
            f'{s["updates"]:,}',
            f'{s["learning_rate"]:.4g}',
            '-' if speed is None else f'{speed:,.0f}',
            '-' if loss is None else f'{loss:.3f}',
            f'{s["compile_seconds"]:.1f} s' + (' cached' if s.get('cache_hit') else ''),
            f'{s["stall_seconds"]:.2f} s',
        )
    _print(table)
    compiled = 'no persistent cache of compiled code'
    if {'cache_hits', 'cache_misses'} <= end.keys():
        compiled = (
            f'compiled by this process: {end["cache_misses"]}, from the persistent cache: '
            f'{end["cache_hits"]}'
        )
    _print(
        f'{_count(end["updates"], "update")} in {end["wall_seconds"]:.1f} s (training '
        f'{end["train_seconds"]:.1f} s); accuracy {end["final_accuracy"]:.2%}, best '
        f'{end["best_accuracy"]:.2%}; {compiled}' + (f'; {unusual}' if unusual else '')
    )


def print_benchmark(measured: list, relative: list[dict], predicted: dict[str, float | None]) -> None:
    """Prints what the benchmark measured of each batch size, and what follows for a run."""
    table = _table(
        'Steps', 'batch', 'split', 'dispatch', 'compile', 'cached', 'forward', '+ backward', 'step',
        'images/s', 'input images/s', 'memory',
    )  # fmt: skip
    for m in measured:
        input_speed = m.input_images_per_second
        table.add_row(
            f'{m.batch_size:,}',
            f'{m.num_microbatches} x {m.microbatch_size}',
            str(m.updates_per_dispatch),
            f'{m.compile_seconds:.1f} s',
            f'{m.cached_compile_seconds:.1f} s' if m.cache_hit else 'no',
            f'{1000 * m.forward_seconds:,.1f} ms',
            f'{1000 * m.gradient_seconds:,.1f} ms',
            f'{1000 * m.step_seconds:,.1f} ms',
            f'{m.images_per_second:,.0f}',
            f'{input_speed:,.0f}' if input_speed else '-',
            f'{_digits(m.memory_bytes / 2**20)} MiB',
        )
    _print(table)
    table = _table('Time of an epoch, times as fast', 'batch', 'forward', 'backward', 'both')
    for row in relative:
        times = (row[key] for key in ('forward', 'backward', 'both'))
        times = ('-' if x is None else f'{x:.2f}' for x in times)
        table.add_row(f'{row["batch_size"]:,}', *times)
    _print(table)
    parts = [
        f'{key} {_digits(s)} s' for key, s in predicted.items() if key != 'speedup' and s is not None
    ]
    if predicted['speedup']:
        parts.append(f'{predicted["speedup"]:.2f} times as fast')
    _print(
        f'All updates of the run: {", ".join(parts) or "not predicted"}. split: microbatches of a '
        'device x their examples; dispatch: updates of one call; cached: compiled again with a '
        'persistent cache'
    )


def print_scaling(model: Model, rows: list[dict[str, float]]) -> None:
    """Prints what a run and its control would take on other numbers of devices."""
    first = rows[0]['fixed']
    names = ('fixed', 'adaptive', 'worthwhile')
    table = _table('Devices', 'devices', *(f'{name} {what}' for name in names for what in ('s', 'x')))
    for row in rows:
        cells = (text for n in names for text in (_digits(row[n]), f'{first / row[n]:,.2f}'))
        table.add_row(f'{row["devices"]:,}', *cells)
    _print(table)
    network = model.network
    bandwidth = 1e-9 / network.seconds_per_byte if network.seconds_per_byte else float('inf')
    _print(
        'Predicted seconds of all updates, and how many times as fast as fixed on one device. Between '
        f'devices: {1e6 * network.latency:,.1f} us a message, {bandwidth:,.3g} GB/s; gradients: '
        f'{model.gradient_bytes / 2**20:,.2f} MiB. worthwhile: adaptive, with as many devices in each '
        'stage as pay off'
    )


def print_worthwhile(plan: Plan, model: Model) -> None:
    """Prints how many devices pay off in each stage of a plan, or with each batch size that may be."""
    num_devices = plan.num_devices
    table = _table(
        'Devices that pay off', 'stage', 'batch', 'devices', 'images/s', 'time', 'device hours',
        f'images/s on {num_devices:,}', 'time', 'device hours',
    )  # fmt: skip
    stages = [(str(stage.index), stage.batch_size, stage.num_updates) for stage in plan.stages]
    if not plan.planned:
        stages = [('-', size, 0) for size in plan.ladder]
    for name, size, updates in stages:
        can_split = functools.partial(plan.can_split, size)
        paying, cells = model.worthwhile(size, num_devices, can_split), []
        for count in (paying, num_devices):
            seconds = model.update(size, count)
            hours = updates * seconds / 3600
            time = [f'{_digits(hours)} h', _digits(count * hours)] if updates else ['-', '-']
            cells += [f'{size / seconds:,.0f}', *time] if can_split(count) else ['-', '-', '-']
        table.add_row(name, f'{size:,}', f'{paying:,}', *cells)
    _print(table)
    _print(
        f'Twice the devices pay off where they are {WORTH:g} times as fast. To use more of them from a '
        'stage on, stop the run after its first checkpoint and start the same command on more'
    )


def print_shares(shares: dict[str, float], summary: dict[str, Any]) -> None:
    """Prints where the wall time of a run went."""
    table = _table('Wall time', 'part', 'seconds', 'share')
    for part, share in shares.items():
        table.add_row(part, f'{share * summary["wall_seconds"]:,.2f}', f'{share:.1%}')
    _print(table)
    _print(
        f'{_count(summary["updates"], "update")} in {summary["wall_seconds"]:,.1f} s; compilation of '
        f'train steps, mostly beside others: {summary["compile_seconds"]:.1f} s. steps: less what kept '
        'devices waiting; setup: until state and data were there; stall: at the beginning of stages'
    )


def print_evaluation(result: dict[str, Any]) -> None:
    """Prints what an evaluation of a checkpoint gave."""
    _print(
        f'update {result["step"]:,}, epoch {result["epoch"]:.4g}: {result["split"]} loss '
        f'{result["loss"]:.4f}, accuracy {result["accuracy"]:.2%} of '
        f'{_count(result["num_examples"], "example")}'
    )


def print_analysis(records: list[dict[str, Any]]) -> None:
    """Prints what an analysis found at each checkpoint; see ``analysis.analyze``."""
    found = [(f'update {r["step"]:,}', r) for r in records]
    examples = _count(records[0]['num_examples'], 'training example')
    table = _table(f'Minima, on {examples}', '', *(n for n, _ in found))
    rows = [('epoch', [f'{r["epoch"]:.4g}' for _, r in found])]
    rows += [
        (name, [f'{r[key]:.4g}' for _, r in found])
        for name, key in (('loss', 'loss'), ('norm of the gradient', 'gradient_norm'))
    ]
    for k, first in enumerate(records[0]['sharpness']):
        where = f'epsilon {first["epsilon"]:g} in {_count(first["dimensions"], "dimension")}'
        rows.append((f'sharpness, %, {where}', [f'{r["sharpness"][k]["value"]:.4g}' for _, r in found]))
    for key, name in (('hessian', 'Hessian'), ('gauss_newton', 'Gauss-Newton')):
        for k, _ in enumerate(records[0].get(f'{key}_eigenvalues', ())):
            pairs = ((r[f'{key}_eigenvalues'][k], r[f'{key}_residuals'][k]) for _, r in found)
            values = [f'{x:.4g} +- {error:.1g}' for x, error in pairs]
            rows.append((f'{name}, eigenvalue {k + 1}', values))
    if 'hessian_trace' in records[0]:
        values = [f'{r["hessian_trace"]:.4g} +- {r["hessian_trace_error"]:.2g}' for _, r in found]
        rows.append(('Hessian, trace', values))
    if 'optimum' in records[0]:
        rows.append(('least objective', [f'{r["optimum"]:.9g}' for _, r in found]))
    for name, values in rows:
        table.add_row(name, *values)
    table.columns[0].justify = 'left'
    _print(table)
