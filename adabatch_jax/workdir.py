"""The work directory: whose it is, and the files that describe its run."""

import json
import os
import pathlib

import ml_collections

from adabatch_jax import checkpoint, metrics
from adabatch_jax.config import ConfigError, differences, from_json, resolve, to_json
from adabatch_jax.schedules import Plan

CONFIG_FILE, PLAN_FILE = 'config.json', 'plan.json'


def read_config(workdir: str | os.PathLike) -> ml_collections.ConfigDict:
    """The config of the run that a work directory holds.

    Raises:
      ConfigError: no run there, or a file that is not a config.
    """
    path = pathlib.Path(workdir, CONFIG_FILE)
    try:
        return from_json(path.read_text(encoding='utf-8'))
    except FileNotFoundError:
        raise ConfigError(f'workdir: no run in {str(workdir)!r}: {CONFIG_FILE} is missing') from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f'workdir: cannot read {str(path)!r}: {error}') from error


def check(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, may_differ: tuple[str, ...] = ()
) -> None:
    """Refuses a work directory that belongs to something else; writes nothing.

    Args:
      config: the resolved config of what is to be done with it.
      workdir: the directory.
      may_differ: keys whose values need not be those of the run.

    Raises:
      ConfigError: it holds a run of another config, and which keys differ; or files of a run
        without its config; or it is no directory.
    """
    if workdir.exists() and not workdir.is_dir():
        raise ConfigError(f'workdir: {str(workdir)!r} is a file; accepted: a directory')
    if (workdir / CONFIG_FILE).exists():
        if differing := differences(config, resolve(read_config(workdir)), may_differ):
            raise ConfigError(
                f'workdir: {str(workdir)!r} holds a run of another config; differing: '
                f'{"; ".join(differing)}; choose another --workdir, or the same settings'
            )
        return
    for name in (metrics.METRICS_FILE, checkpoint.FOLDER, PLAN_FILE):
        if (workdir / name).exists():
            raise ConfigError(
                f'workdir: {str(workdir)!r} holds {name} but no {CONFIG_FILE}, so it is not known '
                'whose it is; choose another --workdir'
            )


def create(config: ml_collections.ConfigDict, plan: Plan, workdir: pathlib.Path) -> None:
    """Makes the directory and writes what describes the run.

    The config stays as the run began with it; the plan is written anew, since a continued run may split
    its batches into other microbatches.

    Raises:
      ConfigError: it cannot be written, or the run there had another number of training examples.
    """
    before = _num_examples(workdir / PLAN_FILE)
    if before not in (None, plan.clock.num_examples):
        raise ConfigError(
            f'workdir: {str(workdir)!r} holds a run on {before} training examples, and the data set has '
            f'{plan.clock.num_examples} now; bring it back as it was, or choose another --workdir'
        )
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if not (workdir / CONFIG_FILE).exists():
            _write(workdir / CONFIG_FILE, to_json(config))
        _write(workdir / PLAN_FILE, json.dumps(plan.to_dict(), indent=2) + '\n')
    except OSError as error:
        raise ConfigError(f'workdir: cannot write to {str(workdir)!r}: {error.strerror}') from error


def _num_examples(plan_file: pathlib.Path) -> int | None:
    try:
        return json.loads(plan_file.read_text(encoding='utf-8'))['num_examples']
    except (OSError, ValueError, LookupError, TypeError):
        return None  # not there, or not readable: it is written anew


def _write(path: pathlib.Path, text: str) -> None:
    """Whole or not at all, also where the process is killed."""
    temporary = path.with_name(f'.{path.name}.{os.getpid()}')
    temporary.write_text(text, encoding='utf-8')
    temporary.replace(path)
