"""Runs read back from their work directories, grouped by what they have in common, and their tables."""

import dataclasses
import json
import os
import pathlib
import re
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from adabatch_jax import metrics
from adabatch_jax.config import (
    CONFIG_FILE,
    RUNTIME_KEYS,
    default_config,
    flatten,
    identifies_data,
)

Record = dict[str, Any]
# Runs that differ in this alone are seeds of one experiment.
SEED = 'seed'
# What a difference of losses in float32 can tell from 0.
RESOLUTION = 1e-7
# How a run was carried out, not what it is.
IGNORED = (*RUNTIME_KEYS, 'log_every_steps')
# What of that times depend on, with what held in versions that did not have the key.
TIMED = {
    key: flatten(default_config())[key]
    for key in (
        'compile.precompile',
        'compile.quick',
        'compile.updates_per_dispatch',
        'dataset.pipeline',
    )
}


@dataclasses.dataclass(frozen=True)
class Run:
    """What a work directory holds of a run, finished or not.

    Attributes:
      directory: the work directory.
      config: flat, ``{'batch.base_size': 128, ...}``; empty where it cannot be read.
      records: of ``metrics.jsonl``, see ``metrics.read_records``.
      skipped: what could not be read, a line each.
      analysis: of its checkpoints, see ``analysis.analyze``; empty where that was not done.
    """

    directory: pathlib.Path
    config: dict[str, Any]
    records: list[Record]
    skipped: tuple[str, ...]
    analysis: tuple[Record, ...] = ()

    def of_kind(self, kind: str) -> list[Record]:
        """The records of a kind, in order."""
        return [record for record in self.records if record['kind'] == kind]

    @property
    def name(self) -> str:
        """Of its directory."""
        return self.directory.resolve().name

    @property
    def summary(self) -> Record | None:
        """The ``summary`` record; None of a run that is not finished."""
        found = self.of_kind('summary')
        return found[-1] if found else None

    @property
    def train_seconds(self) -> float | None:
        """Of its updates, and of the probes that its policy decided by; None where it is not finished.

        Probes are updates too, which a run without that policy does not need.
        """
        if self.summary is None:
            return None
        return self.summary['train_seconds'] + (self._field(self.summary, 'probe_seconds') or 0.0)

    @property
    def epoch(self) -> float:
        """How far it has come."""
        return max((record.get('epoch') or 0.0 for record in self.records), default=0.0)

    def curve(self, kind: str, *names: str) -> tuple[np.ndarray, ...]:
        """Fields of the records of a kind, where all of them are numbers.

        ``error`` is 1 - accuracy, ``noise_scale`` the quotient of ``gradient_variance`` and
        ``squared_gradient`` where that is positive, and ``suboptimality`` the objective less its least
        value, where that is known; ``RESOLUTION`` at least.
        """
        rows = [[self._field(record, name) for name in names] for record in self.of_kind(kind)]
        rows = [row for row in rows if None not in row]
        return tuple(np.array(rows, float).reshape(-1, len(names)).T)

    def carried_out(self) -> dict[str, list[str]]:
        """On what, and how, where times depend on it: what each of its sessions had, by what it is."""
        found: dict[str, list[str]] = {}
        settings = {key: self.config.get(key, value) for key, value in TIMED.items() if self.config}
        for session in self.of_kind('session'):
            versions = session.get('versions')
            had = {
                'kind of device': session.get('device'),
                'number of devices': session.get('num_devices'),
                'version of jax': versions.get('jax') if isinstance(versions, dict) else None,
                **settings,
            }
            for what, value in had.items():
                if value is not None:  # as in records of a version that did not write it
                    found.setdefault(what, []).append(str(value))
        return found

    def _field(self, record: Record, name: str) -> float | None:
        if name == 'error':
            accuracy = record.get('accuracy')
            return None if accuracy is None else 1 - accuracy
        if name == 'noise_scale':
            variance, squared = record.get('gradient_variance'), record.get('squared_gradient')
            return variance / squared if variance and squared and squared > 0 else None
        if name == 'suboptimality':
            least = self.minimum.get('optimum') if self.minimum else None
            objective = record.get('objective')
            known = least is not None and objective is not None
            return max(objective - least, RESOLUTION) if known else None
        value = record.get(name)
        return value if isinstance(value, int | float) else None

    @property
    def minimum(self) -> Record | None:
        """The analysis of the latest checkpoint."""
        return max(self.analysis, key=lambda record: record['step'], default=None)


def read_run(directory: str | os.PathLike) -> Run:
    """Reads a work directory, as far as that is possible.

    Raises:
      ValueError: there is no run.
    """
    directory = pathlib.Path(directory).expanduser()
    skipped: list[str] = []
    records = []
    for record in metrics.read_records(directory, skipped.append):
        if missing := metrics.missing(record):
            where = f'{metrics.METRICS_FILE}, {record["kind"]} of step {record["step"]}'
            skipped.append(f'{where}: without {", ".join(missing)}')
        else:
            records.append(record)
    try:
        config = flatten(json.loads((directory / CONFIG_FILE).read_text(encoding='utf-8')))
    except (OSError, ValueError, AttributeError) as error:
        skipped.append(f'{CONFIG_FILE}: {getattr(error, "strerror", None) or error}')
        config = {}
    if not records and not config:
        raise ValueError(
            f'no run in {str(directory)!r}: neither {metrics.METRICS_FILE} nor {CONFIG_FILE}'
        )
    analysis = tuple(metrics.read_analysis(directory, skipped.append))
    return Run(directory, config, records, tuple(skipped), analysis)


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs of one config with different seeds.

    Attributes:
      label: what tells it from the other groups.
      runs: one or more.
    """

    label: str
    runs: tuple[Run, ...]

    @property
    def leading(self) -> Run:
        """The run that stands for all where one has to: the first of those that have come farthest."""
        return max(self.runs, key=lambda run: run.epoch)

    def same_seeds(self) -> dict[int, list[Run]]:
        """The runs of each seed that has several, which are not independent."""
        of_seeds: dict[int, list[Run]] = {}
        for run in self.runs:
            of_seeds.setdefault(run.config.get(SEED), []).append(run)
        return {seed: runs for seed, runs in of_seeds.items() if len(runs) > 1}

    def of_summary(self, name: str) -> 'Spread | None':
        """A field of the ``summary`` records."""
        return Spread.of(run.summary.get(name) for run in self.runs if run.summary)

    def curve(self, kind: str, x: str, y: str) -> tuple[np.ndarray, ...]:
        """Mean ``x``, and mean, smallest and largest ``y`` of the runs with such records.

        As far as all of those have come.

        They are compared where they have seen as many examples, since no two take as long; between the
        points of a run it is taken for linear. The points are those of the first run, and the ends of
        what all have: where batches differ, no two end an epoch after as many examples.
        """
        curves = [run.curve(kind, 'examples_seen', x, y) for run in self.runs]
        curves = [curve for curve in curves if len(curve[0])]
        if not curves:
            return (np.array([]),) * 4
        begin, end = max(c[0][0] for c in curves), min(c[0][-1] for c in curves)
        seen = np.unique(np.clip(curves[0][0], begin, end)) if begin <= end else np.array([])
        positions, values = (
            np.stack([np.interp(seen, curve[0], curve[k]) for curve in curves]) for k in (1, 2)
        )
        return positions.mean(0), values.mean(0), values.min(0), values.max(0)


@dataclasses.dataclass(frozen=True)
class Spread:
    """A mean over runs, the smallest and the largest, and how many they are."""

    mean: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> 'Spread | None':
        """That of the values that there are; None where there are none."""
        known = [value for value in values if value is not None]
        return cls(statistics.fmean(known), min(known), max(known), len(known)) if known else None


def group(runs: Sequence[Run]) -> list[Group]:
    """Puts the seeds of a config together, in the order in which the runs are given."""
    kept = [_kept(run.config) for run in runs]
    groups: dict[str, list[int]] = {}
    for number, (run, config) in enumerate(zip(runs, kept, strict=True)):
        own = '' if config else str(run.directory)  # of a run without a config nothing is known
        groups.setdefault(json.dumps(config, sort_keys=True) + own, []).append(number)
    configs = [kept[numbers[0]] for numbers in groups.values()]
    keys = sorted({key for config in configs for key in config})
    keys.sort(key=lambda key: key != 'batch.policy')  # that first
    differing = [key for key in keys if len({json.dumps(c.get(key)) for c in configs}) > 1]
    decay, growth = 'learning_rate.decay_epochs', 'batch.growth_epochs'
    if decay in differing and all(c.get(decay) == c.get(growth) for c in configs):
        differing.remove(decay)  # it follows the other, see config.resolve
    found = []
    for numbers, config in zip(groups.values(), configs, strict=True):
        members = tuple(runs[number] for number in numbers)
        found.append(Group(_label(members[0], config, differing), members))
    for name_of in (lambda run: run.name, lambda run: str(run.directory)):  # until all are told apart
        labels = [g.label for g in found]
        found = [
            dataclasses.replace(g, label=f'{g.label} ({name_of(g.runs[0])})')
            if labels.count(g.label) > 1
            else g
            for g in found
        ]
    return found


def _kept(config: dict[str, Any]) -> dict[str, Any]:
    """What makes a run another experiment."""
    ignored = {SEED, *IGNORED}
    if not identifies_data(config.get('dataset.name', '')):
        ignored.add('dataset.data_dir')
    return {key: value for key, value in config.items() if key not in ignored}


def _label(run: Run, config: dict[str, Any], differing: list[str]) -> str:
    if not config or not 0 < len(differing) <= 3:
        return run.name
    optimizer = config.get('optimizer.name', '')

    def is_its(key: str) -> bool:
        """Whether a setting is not one of another optimizer; DynaSAGA has those of SAGA."""
        section = re.match(r'optimizer\.(\w+)\.', key)
        return section is None or optimizer.endswith(section[1])

    keys = filter(is_its, differing)
    parts = [f'{key.rpartition(".")[2].replace("_", " ")} {config.get(key)}' for key in keys]
    return ', '.join(part.removeprefix('policy ').removeprefix('name ') for part in parts) or run.name


def unlike(groups: Sequence[Group]) -> list[str]:
    """What times depend on and is not the same in all runs, or all through one of them; a line each."""
    found: dict[str, dict[str, list[str]]] = {}
    for run in (run for group in groups for run in group.runs):
        for what, values in run.carried_out().items():
            for value in dict.fromkeys(values):
                found.setdefault(what, {}).setdefault(value, []).append(str(run.directory))
    return [
        f'times are not of the same {what}: '
        + '; '.join(f'{value} in {", ".join(runs)}' for value, runs in runs_of.items())
        for what, runs_of in found.items()
        if len(runs_of) > 1
    ]


def out_of_the_ordinary(summary: Record) -> str:
    """What a ``summary`` record counts that most runs have none of."""
    named = {'skipped': 'updates skipped', 'fall_backs': 'fallen back'}
    return ', '.join(f'{name}: {summary[key]:,}' for key, name in named.items() if summary.get(key))


# ------------------------------------------------------------------------------------- tables


def stage_rows(records: list[Record]) -> list[Record]:
    """What each stage of a run took, from its records.

    Returns:
      For each stage its ``stage`` record, without those of continuations, and ``end_epoch``,
      ``updates``, ``images_per_second`` (median) and ``loss`` (the last); None for what is not known.
    """
    entered = {r['stage']: r for r in reversed(records) if r['kind'] == 'stage'}
    stages, rows = [entered[stage] for stage in sorted(entered)], []
    if not stages:
        return rows
    trained: dict[int, list[Record]] = {}
    for record in records:
        if record['kind'] == 'train':
            trained.setdefault(record['stage'], []).append(record)
    end = max(records, key=lambda r: r['step'])
    for stage, following in zip(stages, [*stages[1:], end], strict=True):
        train = trained.get(stage['stage'], [])
        speeds = [r['examples_per_second'] for r in train if r['examples_per_second']]
        rows.append(
            stage
            | {
                'end_epoch': following['epoch'],
                'updates': following['step'] - stage['step'],
                'images_per_second': statistics.median(speeds) if speeds else None,
                'loss': train[-1]['loss'] if train else None,
            }
        )
    return rows


def comparison_rows(groups: Sequence[Group]) -> list[Record]:
    """The comparison of groups with the first of them.

    Returns:
      For each group ``label``, ``runs``, ``finished``, ``epochs``, ``batch_sizes`` (smallest and
      largest), and spreads, None where no run is finished: ``updates``, ``accuracy``, ``train_seconds``
      (with those of probes), ``epoch_seconds`` (the same, an epoch) and ``wall_seconds``;
      ``accuracy_difference`` from the first group's mean, and ``speedup`` and ``wall_speedup`` over it,
      None where it is not known.
    """
    rows = []
    for g in groups:
        sizes = [s['batch_size'] for run in g.runs for s in stage_rows(run.records)]
        finished = [run for run in g.runs if run.summary is not None]
        row = {
            'label': g.label,
            'runs': len(g.runs),
            'finished': len(finished),
            'epochs': max(run.epoch for run in g.runs),
            'batch_sizes': (min(sizes), max(sizes)) if sizes else None,
            'updates': g.of_summary('updates'),
            'accuracy': g.of_summary('final_accuracy'),
            'train_seconds': Spread.of(run.train_seconds for run in g.runs),
            'wall_seconds': g.of_summary('wall_seconds'),
            'epoch_seconds': Spread.of(run.train_seconds / run.epoch for run in finished if run.epoch),
        }
        rows.append(row)
        own, first = row['accuracy'], rows[0]['accuracy']
        row['accuracy_difference'] = own.mean - first.mean if own and first else None
        for key, name in (('speedup', 'train_seconds'), ('wall_speedup', 'wall_seconds')):
            own, first = row[name], rows[0][name]
            known = own and first and own.mean and first.mean
            row[key] = first.mean / own.mean if known else None
    return rows
