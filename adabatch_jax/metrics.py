"""Sums and counts of a run, and the records that it writes."""

import json
import math
import os
import pathlib
from collections.abc import Iterator
from typing import Any

METRICS_FILE = 'metrics.jsonl'


class NoExamples(ValueError):
    """All the images of an update or of an evaluation were left out."""


def mean_metrics(sums: dict[str, float]) -> dict[str, float]:
    """``loss`` and ``accuracy`` from the sums ``loss``, ``correct`` and ``count`` over examples.

    Raises:
      NoExamples: there are none.
    """
    count = sums['count']
    if not count:
        raise NoExamples('none of the images can be decoded')
    return {'loss': sums['loss'] / count, 'accuracy': sums['correct'] / count}


def add_sums(total: dict[str, float], sums: dict[str, float]) -> dict[str, float]:
    """Sums over two sets of examples, in double precision."""
    return {key: total.get(key, 0.0) + float(value) for key, value in sums.items()}


class MetricsWriter:
    """Appends records to ``metrics.jsonl`` and their numbers to TensorBoard event files."""

    def __init__(self, workdir: str | os.PathLike):
        from tensorboardX import SummaryWriter

        self.workdir = workdir
        path = pathlib.Path(workdir, METRICS_FILE)
        _drop_broken_tail(path)
        self._file = open(path, 'a', encoding='utf-8')  # noqa: SIM115  closed by close()
        self._tensorboard = SummaryWriter(str(workdir))

    def write(self, kind: str, **fields: Any) -> None:
        """Writes one record; it is on disk, whole, before the next one begins.

        Args:
          kind: ``train``, ``eval``, ``stage`` or ``summary``.
          **fields: ``step``, ``epoch``, ``examples_seen``, ``time`` and those of the kind. A number
            that is not finite is written as null.
        """
        record = {'kind': kind} | {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in fields.items()
        }
        self._file.write(json.dumps(record) + '\n')
        self._file.flush()
        for key, value in fields.items():
            if key not in ('step', 'time') and isinstance(value, int | float):
                self._tensorboard.add_scalar(f'{kind}/{key}', value, fields['step'])

    def close(self) -> None:
        """Flushes and closes both."""
        self._file.close()
        self._tensorboard.close()


def _drop_broken_tail(path: pathlib.Path) -> None:
    """Cuts off the half-written last line that a killed process may have left."""
    if path.exists() and (content := path.read_bytes()) and not content.endswith(b'\n'):
        os.truncate(path, content.rfind(b'\n') + 1)


def read_records(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """The records of a run, in order of their steps, each step's last one of a kind.

    A continued run writes the records after its checkpoint again; lines that are not whole are
    left out.
    """
    latest = {}
    for record in _lines(pathlib.Path(workdir, METRICS_FILE)):
        key = (record.get('kind'), record.get('step'))
        latest.pop(key, None)
        latest[key] = record
    return sorted(latest.values(), key=lambda record: record.get('step', 0))


def _lines(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    with open(path, encoding='utf-8', errors='replace') as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record
