"""The work directory: whose it is, and the files that describe its run."""

import contextlib
import errno
import itertools
import json
import os
import pathlib
import socket
from collections.abc import Iterator
from typing import Any

import ml_collections

from adabatch_jax import checkpoint, metrics, policies
from adabatch_jax.config import (
    CONFIG_FILE,
    SCHEDULE,
    ConfigError,
    differences,
    from_json,
    resolve,
    to_json,
)
from adabatch_jax.experiment import Experiment
from adabatch_jax.files import write_whole
from adabatch_jax.schedules import Plan

try:
    import fcntl
except ImportError:  # Windows: work directories are not locked there
    fcntl = None

PLAN_FILE, LOCK_FILE = 'plan.json', '.lock'
SCHEDULE_FILE = policies.replay.FILE
_PATTERN = {'[', ']', '\\'} - {os.sep}


def read_config(workdir: str | os.PathLike) -> ml_collections.ConfigDict:
    """The config of the run that a work directory holds.

    Raises:
      ConfigError: no run there, or a file that is not a config.
    """
    path = pathlib.Path(workdir, CONFIG_FILE).expanduser()
    try:
        return from_json(path.read_text(encoding='utf-8'))
    except FileNotFoundError:
        raise ConfigError(f'workdir: no run in {str(workdir)!r}: {CONFIG_FILE} is missing') from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f'workdir: cannot read {str(path)!r}: {error}') from error


def check(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    may_differ: tuple[str, ...] = (),
    is_to_train: bool = False,
) -> None:
    """Refuses a work directory that belongs to something else; writes nothing.

    Args:
      config: the resolved config of what is to be done with it.
      workdir: the directory.
      may_differ: beginnings of keys whose values need not be those of the run.
      is_to_train: whether another schedule could be asked for.

    Raises:
      ConfigError: it holds a run of another config, and which keys differ; or files of a run
        without its config; or it is no directory, or one that checkpoints cannot be saved in.
    """
    if bad := sorted(_PATTERN & set(str(workdir.absolute()))):
        raise ConfigError(
            f'workdir: got {str(workdir)!r}; accepted: paths without {" ".join(bad)}, which Orbax takes '
            'for a pattern of names'
        )
    there = next(path for path in (workdir, *workdir.parents) if path.exists())
    if not there.is_dir():
        raise ConfigError(f'workdir: {str(there)!r} is a file; accepted: a directory')
    if (workdir / CONFIG_FILE).exists():
        if differing := differences(config, resolve(read_config(workdir)), may_differ):
            raise ConfigError(
                f'workdir: {str(workdir)!r} holds a run of another config; differing: '
                f'{"; ".join(differing)}; choose another --workdir, or the same settings'
                f'{_advice(differing) if is_to_train else ""}'
            )
        return
    for name in (metrics.METRICS_FILE, checkpoint.FOLDER, PLAN_FILE):
        if (workdir / name).exists():
            raise ConfigError(
                f'workdir: {str(workdir)!r} holds {name} but no {CONFIG_FILE}, so it is not known '
                'whose it is; choose another --workdir'
            )


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """Keeps other processes from training in a work directory, which is made where it does not exist.

    The lock is the kernel's and ends with the process that holds it, however that ends. A directory that
    was made here and has got no other file is removed again.

    Raises:
      ConfigError: another process holds the lock, or the directory cannot be written to.
    """
    try:
        missing = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
        workdir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(workdir / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(f'workdir: cannot write to {str(workdir)!r}: {error.strerror}') from error
    try:
        _lock(descriptor, workdir)
        try:
            yield
        finally:
            _remove_unused(workdir, missing)
    finally:
        os.close(descriptor)


def _remove_unused(workdir: pathlib.Path, made: list[pathlib.Path]) -> None:
    """Removes the folders made for a work directory that has got no file but its lock."""
    if made and os.listdir(workdir) == [LOCK_FILE]:
        (workdir / LOCK_FILE).unlink()
        with contextlib.suppress(OSError):  # others may have found a use for a parent
            for folder in made:
                folder.rmdir()


def _lock(descriptor: int, workdir: pathlib.Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 200, 0).decode(errors='replace').strip() or 'another process'
        raise ConfigError(
            f'workdir: {str(workdir)!r} is in use by {holder}; wait for it to end, or choose another '
            '--workdir'
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):  # a disk without locks
            raise
    with contextlib.suppress(OSError):  # a full disk: the lock holds, only its holder is not named
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f'process {os.getpid()} on {socket.gethostname()}\n'.encode(), 0)


def create(config: ml_collections.ConfigDict, plan: Plan, workdir: pathlib.Path) -> None:
    """Writes what describes the run into its directory, which exists.

    The config stays as the run began with it, except where it is continued with another schedule; the
    plan is written anew, where that can be, since a continued run may split its batches into other
    microbatches.

    Raises:
      ConfigError: it cannot be written, or the run there had, with the same config, other stages.
    """
    has_config = (workdir / CONFIG_FILE).exists()
    is_changed = has_config and bool(differences(config, resolve(read_config(workdir))))
    if checkpoint.steps(workdir / checkpoint.FOLDER):
        _check_goes_on(plan, workdir, is_changed)
    try:
        if not has_config:
            write_whole(workdir / CONFIG_FILE, to_json(config))
        try:
            write_whole(workdir / PLAN_FILE, json.dumps(plan.to_dict(), indent=2) + '\n')
        except OSError:  # of a disk that has filled up since the run began
            if is_changed or not (workdir / PLAN_FILE).exists():
                raise
        if is_changed:  # after the plan: with a config that is the same the plan has to be
            write_whole(workdir / CONFIG_FILE, to_json(config))
    except OSError as error:
        raise ConfigError(f'workdir: cannot write to {str(workdir)!r}: {error.strerror}') from error


def write_schedule(
    experiment: Experiment, stages: list[dict[str, Any]], workdir: str | os.PathLike
) -> None:
    """Writes the batch sizes that a run decided on, for policy ``replay``.

    Args:
      stages: ``examples_seen``, ``batch_size`` and ``reason`` of each change of the batch size.
    """
    schedule = {
        'policy': experiment.config.batch.policy,
        'num_examples': experiment.clock.num_examples,
        'num_epochs': experiment.clock.num_epochs,
        'coupling': experiment.learning_rate.coupling,
        'statistics': experiment.statistics,
        'max_per_device': experiment.plan.largest_microbatch,
        'stages': stages,
    }
    write_whole(pathlib.Path(workdir, SCHEDULE_FILE), json.dumps(schedule, indent=2) + '\n')


def remove_schedule(workdir: str | os.PathLike) -> None:
    """Removes what ``write_schedule`` wrote of a run that is now prolonged, and will be another."""
    with contextlib.suppress(OSError):
        pathlib.Path(workdir, SCHEDULE_FILE).unlink()


def _advice(differing: list[str]) -> str:
    if not all(difference.startswith(SCHEDULE) for difference in differing):
        return ''
    return ', or go on with this schedule: --allow_schedule_change'


def _check_goes_on(plan: Plan, workdir: pathlib.Path, is_changed: bool) -> None:
    """Refuses a plan that is not the one that a run began with, though its config may be the same."""
    try:
        before = json.loads((workdir / PLAN_FILE).read_text(encoding='utf-8'))
        planned = before['planned']
        stages = [(stage['start'], stage['batch_size']) for stage in before['stages']]
    except (OSError, ValueError, LookupError, TypeError):
        return  # not there, or not readable: it is written anew
    now = [(stage.start, stage.batch_size) for stage in plan.stages]
    if planned and not is_changed and stages != now:  # the run to replay may be another
        differing = next(pair for pair in itertools.zip_longest(stages, now) if pair[0] != pair[1])
        then, here = (f'{x[1]} from example {x[0]} on' if x else 'no further one' for x in differing)
        raise ConfigError(
            f'workdir: {str(workdir)!r} holds a run with other stages than its config gives now: batch '
            f'size {then}, now {here}; bring back what batch.policy goes by, or choose another --workdir'
        )
