"""Compares runs: one page with figures and tables, from their work directories.

    python -m adabatch_jax.report DIR... [--out=FILE.html] [--format=html|md|png] [--benchmark=FILE.json]

The first directory's config is what the others are compared with. Directories whose configs differ in
the seed only are averaged. A run may still be in progress; what cannot be read is left out, and said.
--format=html writes one page that needs nothing else, md a Markdown file with its figures in a folder
beside it, png the figures alone. --benchmark adds the table of forward and backward passes that
``benchmark --json`` wrote.
"""

import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags

from adabatch_jax import command_line, comparison, figures, pages
from adabatch_jax.comparison import Group, Spread
from adabatch_jax.config import ConfigError, user_errors
from adabatch_jax.pages import Page, Table

# In the reason of a ``session`` record, where a run went on as another than the one that it began as.
CHANGED = ('schedule changed', 'effective learning rate', 'out of memory')

# -------------------------------------------------------------------------------- what it says


def page(directories: Sequence[str], benchmark: str | None = None) -> Page:
    """Reads the runs and works out what there is to say.

    Raises:
      ConfigError: none of them holds a run, or a file holds no benchmark.
    """
    runs, refused = [], []
    for directory in directories:
        try:
            runs.append(comparison.read_run(directory))
        except (ValueError, OSError) as error:
            refused.append(str(error))
    if not runs:
        raise ConfigError(f'report: {refused[0]}')
    groups = comparison.group(runs)
    tables = [comparison_table(groups)]
    if benchmark:
        with user_errors('--benchmark'):
            tables.append(passes_table(json.loads(pathlib.Path(benchmark).expanduser().read_text())))
    if any(minima(g) for g in groups):
        tables.append(minima_table(groups))
    tables += [stage_table(group) for group in groups]
    return Page(tables, all_figures(groups), [*notes(groups), *refused], len(runs))


def number(spread: Spread | None, form: str = '', scale: float = 1.0) -> str:
    """A mean, and its range where there are several values.

    Without ``form`` with three digits, and more before the decimal point where there are.
    """
    if spread is None:
        return '-'
    form = form or (',.0f' if spread.high >= 100 else '.3g')
    text = format(scale * spread.mean, form)
    if spread.count == 1 or spread.low == spread.high:
        return text
    return f'{text} ({format(scale * spread.low, form)} to {format(scale * spread.high, form)})'


def comparison_table(groups: Sequence[Group]) -> Table:
    """The paper's comparison: time and accuracy against the first group."""
    rows = []
    for row in comparison.comparison_rows(groups):
        sizes, difference = row['batch_sizes'], row['accuracy_difference']
        rows.append(
            (
                row['label'],
                f'{row["finished"]} of {row["runs"]}',
                '-' if sizes is None else ' to '.join(f'{s:,}' for s in dict.fromkeys(sizes)),
                f'{row["epochs"]:.4g}',
                number(row['updates'], ',.0f'),
                number(row['accuracy'], '.2f', 100),
                '-' if difference is None else f'{100 * difference:+.2f}',
                number(row['epoch_seconds']),
                number(row['train_seconds'], ',.1f'),
                '-' if row['speedup'] is None else f'{row["speedup"]:.2f}',
                '-' if row['wall_speedup'] is None else f'{row["wall_speedup"]:.2f}',
            )
        )
    columns = (
        'run', 'finished', 'batch size', 'epochs', 'updates', f'{evaluated(groups)} accuracy, %',
        'against the first, %', 'training, s an epoch', 'training, s', 'speed-up', 'speed-up, wall',
    )  # fmt: skip
    note = (
        'Means over seeds, with the smallest and the largest; batch sizes: of all stages. Training: '
        'forward, backward and update, and all that probes of critical_batch take, without evaluation, '
        'checkpoints and waiting for compilation; speed-ups are over the first run, the one of wall '
        'time with its set-up and all else. Curves reach as far as all seeds with such records have '
        'come, bands from the lowest seed to the highest; batch sizes, learning rates and dotted lines '
        '(transitions) are of the first seed of those that have come farthest.'
    )
    return Table('Comparison', columns, rows, note)


def evaluated(groups: Sequence[Group]) -> str:
    """The split that runs were evaluated on, without its slice, or all of them where they differ."""
    records = [r for group in groups for run in group.runs for r in run.of_kind('eval')]
    splits = {str(record.get('split')).partition('[')[0] for record in records}
    return ' or '.join(sorted(splits)) or 'test'


def passes_table(result: dict[str, Any]) -> Table:
    """What a benchmark says of forward and backward passes, relative to its first batch size.

    Raises:
      ValueError: it says nothing.
    """
    try:
        rows = [
            (
                f'{r["batch_size"]:,}',
                *('-' if r[k] is None else f'{r[k]:.2f}' for k in ('forward', 'backward', 'both')),
            )
            for r in result['relative_epochs']
        ]
        on = f'Measured on {result["num_devices"]} x {result["device"]}'
    except (KeyError, TypeError) as error:
        raise ValueError(f'no figures of adabatch_jax.benchmark: {error} is missing') from error
    note = f'{on}, jax {result.get("versions", {}).get("jax", "?")}, apart from these runs.'
    columns = ('batch size', 'forward', 'backward', 'both')
    return Table('Passes of an epoch, times as fast', columns, rows, note)


# What the table of minima shows, by fields of the analysis of a run's latest checkpoint.
_MINIMA = {
    'loss': 'training loss',
    'gradient_norm': 'norm of its gradient',
    'hessian_trace': 'trace of the Hessian',
}


def minima(group: Group) -> dict[str, list[float]]:
    """What is known of the minima of a group's runs: values by what they are."""
    found: dict[str, list[float]] = {}
    for record in (run.minimum for run in group.runs if run.minimum):
        values = {name: record.get(key) for key, name in _MINIMA.items()}
        for key, name in (('hessian', 'Hessian'), ('gauss_newton', 'Gauss-Newton')):
            values[f'largest eigenvalue, {name}'] = next(
                iter(record.get(f'{key}_eigenvalues', ())), None
            )
        for s in record.get('sharpness', ()):
            n = s['dimensions']
            where = f'epsilon {s["epsilon"]:g} in {n:,} dimension{"s" * (n != 1)}'
            values[f'sharpness, %, {where}'] = s['value']
        for name, value in values.items():
            if value is not None:
                found.setdefault(name, []).append(value)
    return found


def minima_table(groups: Sequence[Group]) -> Table:
    """Sharpness and curvature where the runs ended."""
    found = [minima(group) for group in groups]
    names = list(dict.fromkeys(name for values in found for name in values))

    def mean(values: list[float], num_runs: int) -> str:
        some = f', {len(values)} of {num_runs} runs' if 0 < len(values) < num_runs else ''
        return number(Spread.of(values)) + some

    rows = [
        (group.label, *(mean(values.get(name, []), len(group.runs)) for name in names))
        for group, values in zip(groups, found, strict=True)
    ]
    records = [run.minimum for group in groups for run in group.runs if run.minimum]
    counts = ' or '.join(f'{n:,}' for n in sorted({record['num_examples'] for record in records}))
    note = (
        f'At the latest checkpoint that was analyzed, on {counts} fixed training '
        f'example{"s" * (counts != "1")}; means over seeds, with the smallest and the largest. '
        'Sharpness: Keskar et al., 2017, in percent, in so many dimensions. It depends on the scale of '
        'the weights, as eigenvalues do: compare equal networks only.'
    )
    return Table('Minima', ('run', *names), rows, note)


def stage_table(group: Group) -> Table:
    """The stages of the run that stands for a group."""
    run, rows = group.leading, []
    for s in comparison.stage_rows(run.records):
        split = '-'
        if s.get('microbatch_size') and s.get('num_microbatches'):
            split = f'{s["num_microbatches"]:,} x {s["microbatch_size"]:,}'
        speed, loss = s['images_per_second'], s['loss']
        rows.append(
            (
                str(s['stage']),
                f'{s["epoch"]:.4g} to {s["end_epoch"]:.4g}',
                f'{s["batch_size"]:,}',
                split,
                f'{s["updates"]:,}',
                f'{s["learning_rate"]:.4g}',
                '-' if speed is None else f'{speed:,.0f}',
                '-' if loss is None else f'{loss:.4f}',
                f'{s["compile_seconds"]:.1f}' + (' (cached)' if s.get('cache_hit') else ''),
                f'{s["stall_seconds"]:.2f}',
                str(s.get('reason') or ''),
            )
        )
    columns = (
        'stage', 'epochs', 'batch size', 'microbatches', 'updates', 'learning rate', 'images/s',
        'training loss', 'compile, s', 'stall, s', 'reason',
    )  # fmt: skip
    several = f', of {len(group.runs)} seeds {run.directory}' if len(group.runs) > 1 else ''
    return Table(f'Stages: {group.label}{several}', columns, rows)


def notes(groups: Sequence[Group]) -> list[str]:
    """What could not be read, which runs are not finished or not alike, and what happened to others."""
    found = [
        f'{group.label}: seed {seed} counts {len(runs)} times: '
        + ', '.join(str(run.directory) for run in runs)
        for group in groups
        for seed, runs in group.same_seeds().items()
    ]
    for run in (run for group in groups for run in group.runs):
        if run.summary is None:
            found.append(f'{run.directory}: not finished, at epoch {run.epoch:.4g}')
        sessions = run.of_kind('session')
        if (again := len(sessions) - 1) > 0:
            found.append(
                f'{run.directory}: taken up again {again} time{"s" * (again != 1)}; its times have a '
                'set-up each time, and nothing of what was lost by a kill'
            )
        for session in sessions:
            reason = str(session.get('reason'))
            if any(what in reason for what in CHANGED):
                found.append(f'{run.directory}: epoch {session["epoch"]:.4g}: {reason}')
        if out_of_the_ordinary := comparison.out_of_the_ordinary(run.summary or {}):
            found.append(f'{run.directory}: {out_of_the_ordinary}')
        shown, more = run.skipped[:5], len(run.skipped) - 5
        found += [f'{run.directory}: left out: {line}' for line in shown]
        if more > 0:
            found.append(f'{run.directory}: left out: {more} more line{"s" * (more != 1)}')
    return found + comparison.unlike(groups)


def all_figures(groups: Sequence[Group]) -> dict[str, Any]:
    """Figures by name, of what the runs have."""
    longest = max((run.records[-1]['time'] for g in groups for run in g.runs if run.records), default=0)
    units = (('hours', 3600), ('minutes', 60), ('seconds', 1))
    unit, seconds = next(((unit, s) for unit, s in units if longest > 3 * s), units[-1])
    axes = {
        'epoch': ('epoch', 'epochs', 1),
        'update': ('step', 'updates', 1),
        'time': ('time', f'wall time, {unit}', seconds),
    }
    found = {}
    for kind, y, name, ylabel, scale in (
        ('eval', 'error', 'error', f'{evaluated(groups)} error, %', 100),
        ('eval', 'loss', 'test_loss', f'{evaluated(groups)} loss', 1),
        ('train', 'loss', 'training_loss', 'training loss', 1),
    ):
        for axis, (x, xlabel, divisor) in axes.items():
            marked = axis == 'epoch' and len(groups) <= 3
            drawn = [curve(g, kind, x, y, 1 / divisor, scale, marked) for g in groups]
            found[f'{name}_by_{axis}'] = (drawn, xlabel, ylabel, {'log_y': is_wide(drawn)})
    for y, ylabel in (('batch_size', 'batch size, examples'), ('learning_rate', 'learning rate')):
        drawn, options = [stepped(g, y) for g in groups], {'log_y': True, 'steps': y == 'batch_size'}
        found[f'{y}_by_epoch'] = (drawn, 'epochs', ylabel, options)
    drawn = [curve(g, 'train', 'epoch', 'noise_scale') for g in groups]
    found['noise_scale_by_epoch'] = (drawn, 'epochs', 'noise scale, examples', {'log_y': True})
    drawn = [curve(g, 'eval', 'gradient_evaluations', 'suboptimality') for g in groups]
    ylabel = 'objective above its least value'
    found['suboptimality_by_gradients'] = (drawn, 'gradients of examples', ylabel, {'log_y': True})
    result = {
        name: figures.lines(drawn, xlabel, ylabel, **options)
        for name, (drawn, xlabel, ylabel, options) in found.items()
        if any(line is not None for line in drawn)
    }
    return result | minima_figures(groups)


def minima_figures(groups: Sequence[Group]) -> dict[str, Any]:
    """Sharpness and the largest eigenvalue of every run, by name."""
    found = {group.label: minima(group) for group in groups}
    names = list(dict.fromkeys(name for values in found.values() for name in values))
    sharpness = next((name for name in names if name.startswith('sharpness')), None)
    chosen = {'sharpness': sharpness, 'largest_eigenvalue': 'largest eigenvalue, Hessian'}
    drawn = {
        key: ({label: values.get(name, []) for label, values in found.items()}, name)
        for key, name in chosen.items()
        if name in names
    }
    return {
        key: figures.dots(values, name, log_y=is_spread([v for vs in values.values() for v in vs]))
        for key, (values, name) in drawn.items()
    }


def is_wide(drawn: Sequence[figures.Line | None]) -> bool:
    """Whether values are positive and lie so far apart that a logarithmic axis shows more."""
    lines = (line for line in drawn if line is not None)
    return is_spread([y for line in lines for ys in (line.y, line.low) if ys is not None for y in ys])


def is_spread(values: Sequence[float]) -> bool:
    """Whether values are positive and the largest is many times the smallest."""
    return bool(values) and min(values) > 0 and max(values) > 20 * min(values)


def curve(
    group: Group,
    kind: str,
    x: str,
    y: str,
    x_scale: float = 1.0,
    y_scale: float = 1.0,
    marked: bool = False,
) -> figures.Line | None:
    """A line with the range of the seeds; None of a group that has no such records."""
    positions, mean, low, high = group.curve(kind, x, y)
    if not len(positions):
        return None
    band = (y_scale * low, y_scale * high) if len(group.runs) > 1 else (None, None)
    transitions = (
        [s['epoch'] for s in comparison.stage_rows(group.leading.records)[1:]] if marked else ()
    )
    return figures.Line(group.label, x_scale * positions, y_scale * mean, *band, transitions)


def stepped(group: Group, y: str) -> figures.Line | None:
    """What a stage has, of the run that stands for a group: the batch size, or the learning rate."""
    run = group.leading
    if y == 'learning_rate':
        # At a transition that of the last update before it, and the planned one of the first after it.
        is_planned = run.config.get('learning_rate.rule', 'schedule') == 'schedule'
        kinds = ('train', 'stage') if is_planned else ('train',)
        points = np.concatenate([run.curve(kind, 'epoch', y) for kind in kinds], axis=1)
        points = points[:, np.argsort(points[0], kind='stable')]
        points = points[:, points[1] > 0]  # the axis is logarithmic
    else:
        rows = comparison.stage_rows(run.records)
        points = [s['epoch'] for s in rows], [s[y] for s in rows]
        if rows:
            points = [*points[0], rows[-1]['end_epoch']], [*points[1], points[1][-1]]
    return figures.Line(group.label, *points) if len(points[0]) else None


# -------------------------------------------------------------------------------- command line


def define_flags(argv: list[str]) -> flags.FlagValues:
    """The command line's flags, fresh for every call of ``main``."""
    values = flags.FlagValues()
    flags.DEFINE_list(
        'runs', [], 'Work directories; as a rule given without --runs.', flag_values=values
    )
    flags.DEFINE_enum(
        'format', 'html', ['html', 'md', 'png'], 'What to write; else as --out ends.', flag_values=values
    )
    command_line.define_path('out', 'File, or folder of png; report.html, report.md or report.', values)
    command_line.define_path('benchmark', 'File of benchmark --json.', values)
    return values


def run(values: flags.FlagValues) -> int:
    """Does what the command line says; returns the exit status."""
    if not values.runs:
        raise ConfigError('report: no run given; for example python -m adabatch_jax.report runs/*')
    names = {'html': 'report.html', 'md': 'report.md', 'png': 'report'}
    out, form = pathlib.Path(values.out or names[values.format]), values.format
    if not values['format'].present:
        form = 'md' if out.suffix.lower() == '.md' else 'html'
        if out.suffix.lower() in ('.pdf', '.png', '.jpg', '.svg'):
            raise ConfigError(f'--out: got {values.out!r}; accepted: .html and .md, or --format as well')
    written = page(values.runs, values.benchmark)
    with user_errors('--out'):
        pages.write(written, form, out)
    num_runs = f'{written.num_runs} run{"s" * (written.num_runs != 1)}'
    command_line.say('\n'.join([*written.notes, f'{out}: {num_runs}']))
    return 0


def main(argv: list[str]) -> int:
    """Runs the command with a command line, its name first; returns the exit status."""
    return command_line.run(argv, __doc__, define_flags, run, rest_is='runs')


if __name__ == '__main__':
    sys.exit(main(sys.argv))
