"""Sums and counts of a run, and the records that it writes."""

import contextlib
import importlib.metadata
import itertools
import json
import math
import os
import pathlib
import platform
import socket
import struct
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

METRICS_FILE = 'metrics.jsonl'
ANALYSIS_FILE = 'analysis.jsonl'  # see analysis.analyze
# The numbers that a record has to have for the rest to be of use.
_ALL = ('step', 'epoch', 'examples_seen', 'time')
_NEEDED = {
    'train': ('stage', 'batch_size', 'learning_rate', 'loss', 'examples_per_second'),
    'eval': ('loss', 'accuracy'),
    'stage': ('stage', 'batch_size', 'learning_rate', 'compile_seconds', 'stall_seconds'),
    'summary': ('updates', 'wall_seconds', 'train_seconds', 'final_accuracy', 'best_accuracy'),
}
_OF_ANALYSIS = ('step', 'num_examples', 'loss')
# Where they are not finite, or nothing was timed.
_MAY_BE_NULL = ('loss', 'examples_per_second', 'value')
# Numbers that are not in every record.
_MAY_HAVE = (
    'accuracy', 'fall_backs', 'gradient_evaluations', 'gradient_variance', 'microbatch_size',
    'num_microbatches', 'objective', 'probe_seconds', 'skipped', 'squared_gradient', 'gradient_norm',
    'hessian_trace', 'optimum',
)  # fmt: skip


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


def window_metrics(sums: dict[str, float]) -> dict[str, float]:
    """The measured fields of a ``train`` record, from the sums over its updates.

    ``loss`` and ``accuracy`` are not numbers where every update was skipped. ``gradient_variance`` and
    ``squared_gradient`` are there where they were measured, ``left_out`` (images that could not be
    decoded) and ``skipped`` (updates) where there are any.
    """
    none = {'loss': math.nan, 'accuracy': math.nan}
    fields = mean_metrics(sums) if sums.get('count') else none
    fields['examples_per_second'] = sums.get('count', 0) / sums['seconds']
    if measured := sums.get('measured'):
        fields['gradient_variance'] = sums['variance'] / measured
        fields['squared_gradient'] = sums['squared_gradient'] / measured
    return fields | {k: round(sums[k]) for k in ('left_out', 'skipped') if sums.get(k)}


def add_sums(total: dict[str, float], sums: dict[str, float]) -> dict[str, float]:
    """Sums over two sets of examples, in double precision."""
    return total | {key: total.get(key, 0.0) + float(value) for key, value in sums.items()}


def finite(value: Any) -> Any:
    """JSON types with None for every number that is not finite: JSON has null for it."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that results may depend on."""
    packages = ('adabatch_jax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')
    found = {'python': platform.python_version()}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


class MetricsWriter:
    """Appends records to ``metrics.jsonl`` and their numbers to TensorBoard event files.

    Where the disk refuses a record, for example because it is full, that is reported once, the record is
    kept in memory and written with the next one, so that no line is lost or broken.

    Args:
      workdir: the work directory, which exists. Nobody else may write to it.
      report: takes a line about a failure.
      hparams: the config of the run, flat, for TensorBoard's table of runs.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        report: Callable[[str], Any] = warnings.warn,
        hparams: dict[str, Any] | None = None,
    ):
        self.workdir = workdir
        self._report = report
        path = pathlib.Path(workdir, METRICS_FILE)
        _drop_broken_tail(path)
        self._file = _Appended(path)
        # Over updates; and over examples seen, where runs with different batch sizes compare.
        plain = {
            k: v if isinstance(v, int | float | str) else str(v) for k, v in (hparams or {}).items()
        }
        self._event_files = [
            _EventFile(workdir, 'step', plain),
            _EventFile(os.path.join(workdir, 'by_examples'), 'examples_seen', {}),
        ]

    def write(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Writes one record, and returns it; it is in the file, whole, before the next one begins.

        Args:
          kind: ``session``, ``train``, ``eval``, ``stage`` or ``summary``.
          **fields: ``step``, ``epoch``, ``examples_seen``, ``time`` and those of the kind. A number
            that is not finite is written as null, and left out for TensorBoard.
        """
        record = finite({'kind': kind, **fields})
        failing = bool(self._file.waiting)
        try:
            self._file.add(json.dumps(record).encode() + b'\n')
        except OSError as error:
            if not failing:
                self._report(
                    f'warning: cannot write to {METRICS_FILE} ({error.strerror}); its records are kept '
                    'in memory until that is possible again'
                )
        for events in self._event_files:
            with contextlib.suppress(OSError):  # the same disk, of which the line above tells
                events.write(kind, record)
        return record

    def sync(self) -> None:
        """Waits until all would survive a loss of power; raises ``OSError`` where they cannot."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the files; what could not be written is reported."""
        for events in self._event_files:
            with contextlib.suppress(OSError):
                events.close()
        try:
            self._file.close()
        except OSError as error:
            lost = self._file.waiting.count(b'\n')
            self._report(f'warning: {lost} records are not in {METRICS_FILE}: {error.strerror}')


class NoWriter:
    """In place of a ``MetricsWriter`` in a process that writes nothing."""

    def write(self, kind: str, **fields: Any) -> None:
        """Does nothing; so do the others."""

    def sync(self) -> None:
        """Does nothing."""


class _Appended:
    """A file that pieces are added to, each whole: what the disk refuses waits in memory.

    A piece is with the system at once, and survives the end of the process. Nobody waits for the disk.

    Attributes:
      waiting: what is not in the file yet.
    """

    def __init__(self, path: str | os.PathLike):
        self._file = open(path, 'ab', buffering=0)  # noqa: SIM115  closed by close()
        self.fileno, self.waiting = self._file.fileno, bytearray()

    def add(self, piece: bytes) -> None:
        """Adds a piece, after those that wait; raises ``OSError`` where they have to wait on."""
        self.waiting += piece
        self.flush()

    def flush(self) -> None:
        """Writes what waits; raises ``OSError`` where it still cannot be written."""
        end, done = os.fstat(self.fileno()).st_size, 0
        try:
            while done < len(self.waiting):
                with memoryview(self.waiting) as waiting, waiting[done:] as rest:
                    done += self._file.write(rest)
        except OSError:
            self._file.truncate(end)
            raise
        self.waiting.clear()

    def close(self) -> None:
        """Closes the file; raises ``OSError`` where something waits that cannot be written."""
        with self._file:
            self.flush()


class _EventFile:
    """A TensorBoard event file, begun with its first record.

    tensorboardX's own writers wait for the disk with every flush, or write from a thread that ends with
    the first failure of the disk, after which every ``add_scalar`` waits for it in vain.

    Args:
      directory: made where it does not exist.
      position: the field that the numbers are over.
      hparams: what the table of runs shows of this one.
    """

    def __init__(self, directory: str | os.PathLike, position: str, hparams: dict[str, Any]):
        self._directory, self._position, self._hparams = directory, position, hparams
        self._file: _Appended | None = None

    def write(self, kind: str, fields: dict[str, Any]) -> None:
        with _without_torch():
            from tensorboardX import summary
            from tensorboardX.proto.event_pb2 import Event, SessionLog

        events, now = [], time.time()
        if self._file is None:
            os.makedirs(self._directory, exist_ok=True)
            name = f'events.out.tfevents.{now:.6f}.{socket.gethostname()}'
            self._file = _Appended(os.path.join(self._directory, name))
            events.append({'file_version': 'brain.Event:2', 'step': 0})
            if self._hparams:
                parts = summary.hparams(self._hparams, {'eval/accuracy': 0, 'eval/loss': 0})
                events += [{'summary': part} for part in parts]
        if kind == 'session':  # TensorBoard forgets what an earlier process wrote from that step on
            after = fields[self._position] + 1
            events.append({'session_log': SessionLog(status=SessionLog.START), 'step': after})
        for key, value in fields.items():
            if key not in ('step', 'time') and isinstance(value, int | float):
                events.append({'summary': summary.scalar(f'{kind}/{key}', value)})
        now_and_here = {'wall_time': now, 'step': fields[self._position]}
        framed = (_framed(Event(**now_and_here | what).SerializeToString()) for what in events)
        self._file.add(b''.join(framed))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _framed(event: bytes) -> bytes:
    """As a file of records holds it: length, checksum, data, checksum."""
    from tensorboardX.record_writer import masked_crc32c

    def checksum(part):
        return struct.pack('<I', masked_crc32c(part))

    length = struct.pack('<Q', len(event))
    return length + checksum(length) + event + checksum(event)


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """As if PyTorch were not there, unless it is in use: tensorboardX would import it, for seconds."""
    if not {'torch', 'tensorboardX'}.isdisjoint(sys.modules):
        yield
        return
    sys.modules['torch'] = None
    try:
        yield
    finally:
        if sys.modules.get('torch', '') is None:
            del sys.modules['torch']


def _drop_broken_tail(path: pathlib.Path) -> None:
    """Cuts off the half-written last line that a killed process may have left."""
    if path.exists() and (content := path.read_bytes()) and not content.endswith(b'\n'):
        os.truncate(path, content.rfind(b'\n') + 1)


def read_records(
    workdir: str | os.PathLike, report: Callable[[str], Any] = lambda line: None
) -> list[dict[str, Any]]:
    """The records of a run, in order of their steps, each step's last one of a kind.

    A ``session`` that continues at a step takes back what was written of later steps before it, and an
    earlier end; where its window is open, also a ``train`` record of the updates in it up to that step.
    Lines that are not whole are left out.

    Args:
      workdir: the work directory.
      report: takes a line about each line that is left out.
    """
    latest: dict[tuple[Any, int], dict[str, Any]] = {}
    for number, record in enumerate(_lines(pathlib.Path(workdir, METRICS_FILE)), 1):
        kind, step = record.get('kind'), record.get('step')
        if not isinstance(kind, str) or not isinstance(step, int):
            report(f'{METRICS_FILE}, line {number}: not a record')
            continue
        if kind == 'session':
            latest = {k: r for k, r in latest.items() if k[1] <= step and k[0] != 'summary'}
            if record.get('window_open'):
                latest.pop(('train', step), None)
        latest.pop((kind, step), None)
        latest[kind, step] = record
    return sorted(latest.values(), key=lambda record: record['step'])


def missing(record: dict[str, Any]) -> list[str]:
    """Names of the fields of a record of ``read_records`` that should have a number and have none."""
    return _missing(record, *_ALL, *_NEEDED.get(record['kind'], ()))


def _missing(record: dict[str, Any], *needed: str) -> list[str]:
    def is_usable(key: str) -> bool:
        if record.get(key) is None:  # null, where it may be
            return key not in needed or (key in record and key in _MAY_BE_NULL)
        return _is_number(record[key])

    return [key for key in dict.fromkeys((*needed, *_MAY_HAVE)) if not is_usable(key)]


def _is_number(value: Any) -> bool:
    """Whether it is one that a float can hold."""
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


def read_analysis(
    workdir: str | os.PathLike, report: Callable[[str], Any] = lambda line: None
) -> list[dict[str, Any]]:
    """What ``--mode=analyze`` found, a record for each checkpoint; arguments as of ``read_records``."""

    def is_whole(record: dict[str, Any]) -> bool:
        spectra = [record.get(f'{name}_eigenvalues', []) for name in ('hessian', 'gauss_newton')]
        measures = record.get('sharpness', [])
        if _missing(record, *_OF_ANALYSIS) or not all(isinstance(x, list) for x in (*spectra, measures)):
            return False
        return all(x is None or _is_number(x) for x in itertools.chain(*spectra)) and all(
            isinstance(s, dict) and not _missing(s, 'epsilon', 'dimensions', 'value') for s in measures
        )

    found = []
    for number, record in enumerate(_lines(pathlib.Path(workdir, ANALYSIS_FILE)), 1):
        if is_whole(record):
            found.append(record)
        else:
            report(f'{ANALYSIS_FILE}, line {number}: not a record')
    return found


def _lines(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Each line's object; an empty one for a line that holds none."""
    if not path.exists():
        return
    with open(path, encoding='utf-8', errors='replace') as file:
        for line in file:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = {}
            yield record if isinstance(record, dict) else {}
