"""The comparison that everybody wants first: several policies and seeds, one run after the other.

Each run is a process of its own, and continues where an earlier sweep was stopped. All have the same
epochs, data and effective learning rate, and the coupling of the adaptive one. In the directory of the
sweep each has its work directory and, beside it, its config; a report compares them.
"""

import contextlib
import pathlib
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence

import jax
import ml_collections

from adabatch_jax import report
from adabatch_jax.config import ConfigError, resolve, to_json
from adabatch_jax.experiment import describe

# The first batch size throughout, the largest throughout, and what the config says.
FIXED_SMALL, FIXED_LARGE, ADAPTIVE = POLICIES = ('fixed_small', 'fixed_large', 'adaptive')
_CONFIG = '''"""Of a sweep: {name}, seed {seed}."""

from adabatch_jax.config import from_json


def get_config():
    return from_json(
        r\'\'\'{text}\'\'\'
    )
'''


def configs(
    config: ml_collections.ConfigDict, names: Sequence[str], seeds: Sequence[int]
) -> dict[str, ml_collections.ConfigDict]:
    """The configs of a sweep by the names of their runs, the seeds of a policy together.

    Args:
      config: of the adaptive run.
      names: of ``POLICIES``, or any ``batch.policy``.
      seeds: of each.

    Raises:
      ConfigError: one of them has a mistake.
    """
    adaptive = describe(resolve(config))
    found = {}
    for name in names:
        for seed in seeds:
            run = config.copy_and_resolve_references()
            run.seed = seed
            run.learning_rate.coupling = adaptive.learning_rate.coupling
            if name == FIXED_LARGE:
                run.batch.base_size = adaptive.plan.ladder[-1]
            if name != ADAPTIVE:
                run.batch.policy = 'fixed' if name in POLICIES else name
            describe(resolve(run))
            found[f'{name}-{seed}'] = run
    return found


def run(
    config: ml_collections.ConfigDict,
    directory: pathlib.Path,
    names: Sequence[str],
    seeds: Sequence[int],
    quiet: bool = False,
) -> int:
    """Trains the runs of a sweep and compares them.

    Args:
      config, names, seeds: as for ``configs``.
      directory: of the sweep.
      quiet: for the runs.

    Returns:
      The exit status: 0, or that of a run. A run that diverges does not keep the others from training;
      a mistake, or a signal, ends the sweep.

    Raises:
      ConfigError: a mistake, found before the first run.
    """
    if jax.distributed.is_initialized():
        raise ConfigError('--sweep: got several processes; accepted: one, which starts the others')
    jax.config.update('jax_platforms', 'cpu')  # the accelerator's memory is for the runs
    runs, worst = configs(config, names, seeds), 0
    for number, (name, run_config) in enumerate(runs.items(), 1):
        file, workdir = directory / f'{name}.py', directory / name
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            policy, _, seed = name.rpartition('-')
            file.write_text(_CONFIG.format(name=policy, seed=seed, text=to_json(run_config)))
        except OSError as error:
            raise ConfigError(
                f'workdir: cannot write to {str(directory)!r}: {error.strerror}'
            ) from error
        if not quiet:
            print(f'run {number} of {len(runs)}: {name}', flush=True)
        status = _train(file, workdir, quiet)
        if status not in (0, 3):
            return status
        worst = max(worst, status)
    page = report.page([str(directory / name) for name in runs])
    report.write(page, 'html', directory / 'report.html')
    for line in page.notes:
        print(line)
    print(f'{directory / "report.html"}: {len(runs)} runs compared')
    return worst


def _train(file: pathlib.Path, workdir: pathlib.Path, quiet: bool) -> int:
    command = [sys.executable, '-m', 'adabatch_jax.main', f'--config={file}', f'--workdir={workdir}']
    process = subprocess.Popen([*command, *(['--quiet'] if quiet else [])])
    with _passing_on(signal.SIGTERM, process):
        try:
            status = process.wait()
        except KeyboardInterrupt:  # the run has got it too
            status = process.wait()
    return status if status >= 0 else 128 - status


@contextlib.contextmanager
def _passing_on(number: int, process: subprocess.Popen) -> Iterator[None]:
    """A signal to this process goes to the run, which saves and ends, and with it the sweep."""
    before = signal.signal(number, lambda *_: process.send_signal(number))
    try:
        yield
    finally:
        signal.signal(number, before)
