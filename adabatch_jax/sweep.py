"""The comparison that everybody wants first: several policies and seeds, one run after the other.

Each run is a process of its own, and continues where an earlier sweep was stopped. All have the same
epochs, data, effective learning rate and coupling, and all but the largest begin with the same batch.
In the directory of the sweep each has its work directory and, beside it, its config; a report compares
them.
"""

import contextlib
import pathlib
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence

import jax
import ml_collections

from adabatch_jax import distributed, pages, report, terminal, workdir
from adabatch_jax.config import ConfigError, resolve, to_json, user_errors
from adabatch_jax.experiment import describe, fixed

# The first batch size throughout, the largest throughout, and what the config says.
FIXED_SMALL, FIXED_LARGE, ADAPTIVE = POLICIES = ('fixed_small', 'fixed_large', 'adaptive')
_PATIENCE_SECONDS = 5.0  # with a run that an interrupt may have reached
_CONFIG = '''"""Of a sweep: {name}, seed {seed}."""

import runpy

from adabatch_jax.config import from_json

# With the models, data sets and policies that it may add, as a whole or for its config.
{begin}


def get_config():
    return from_json(
        r\'\'\'{text}\'\'\'
    )
'''


def configs(
    config: ml_collections.ConfigDict,
    names: Sequence[str],
    seeds: Sequence[int],
    num_devices: int | None = None,
) -> dict[str, ml_collections.ConfigDict]:
    """The configs of a sweep by the names of their runs, the seeds of a policy together.

    What would be the same as one before it is left out.

    Args:
      config: of the adaptive run.
      names: of ``POLICIES``, or any ``batch.policy``.
      seeds: of each.
      num_devices: that each run will have; those at hand where left out.

    Raises:
      ConfigError: one of them has a mistake.
    """
    plan = describe(resolve(config), num_devices).plan
    found = {}
    for name in names:
        size = plan.ladder[-1] if name == FIXED_LARGE else plan.stages[0].batch_size
        for seed in seeds:
            run = fixed(config, size)
            if name == ADAPTIVE:
                run.batch.policy, run.batch.base_size = config.batch.policy, config.batch.base_size
            elif name not in (FIXED_SMALL, FIXED_LARGE):
                run.batch.policy = name
            run.seed = seed
            describe(resolve(run), num_devices)
            if run not in found.values():
                found[f'{name}-{seed}'] = run
    return found


def run(
    config: ml_collections.ConfigDict,
    original: str,
    directory: pathlib.Path,
    names: Sequence[str],
    seeds: Sequence[int],
    quiet: bool = False,
) -> int:
    """Trains the runs of a sweep and compares them.

    Args:
      config, names, seeds: as for ``configs``.
      original: the file that the config is from, with its variant if it has one: ``FILE:VARIANT``.
      directory: of the sweep.
      quiet: for the runs.

    Returns:
      The exit status: 0, or that of a run. A run that diverges does not keep the others from training;
      a mistake ends the sweep, and so does SIGTERM or an interrupt, with 143 or 130 unless the run
      has failed.

    Raises:
      ConfigError: a mistake, found before the first run.
    """
    if distributed.is_joined():
        raise ConfigError('--sweep: got several processes; accepted: one, which starts the others')
    jax.config.update('jax_platforms', 'cpu')  # the accelerator's memory is for the runs
    path, has_variant, variant = original.partition(':')
    path = pathlib.Path(path).absolute()
    argument = repr(variant) if has_variant else ''
    begin = f"runpy.run_path({str(path)!r})['get_config']({argument})"
    runs, worst = configs(config, names, seeds, _num_devices(begin)), 0
    _check(runs, directory)  # before anything is written
    left_out = sorted({f'{name}-{seed}' for name in names for seed in seeds} - runs.keys())
    if left_out and not quiet:
        terminal.say(f'the same as another run, and left out: {", ".join(left_out)}')
    for number, (name, run_config) in enumerate(runs.items(), 1):
        file = directory / f'{name}.py'
        policy, _, seed = name.rpartition('-')
        text = _CONFIG.format(name=policy, seed=seed, text=to_json(run_config), begin=begin)
        with user_errors('workdir'):
            directory.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        if not quiet:
            terminal.say(f'run {number} of {len(runs)}: {name}')
        status = _train(file, directory / name, quiet)
        if status not in (0, 3):
            return status
        worst = max(worst, status)
    page = report.page([str(directory / name) for name in runs])
    with user_errors('workdir'):
        pages.write(page, 'html', directory / 'report.html')
    if not quiet:
        compared = f'{page.num_runs} run{"s" * (page.num_runs != 1)} compared'
        terminal.say('\n'.join([*page.notes, f'{directory / "report.html"}: {compared}']))
    return worst


def _num_devices(begin: str) -> int:
    """How many devices the runs will have, as a process says that leaves them free again.

    Args:
      begin: what they begin with, since a config file may choose the devices.
    """
    code = f'import runpy\n{begin}\nimport jax\nprint(jax.device_count())'
    counted = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    if counted.returncode:
        reason = counted.stderr.strip().splitlines() or [f'exit status {counted.returncode}']
        raise ConfigError(f'--sweep: the devices of the runs could not be counted: {reason[-1]}')
    return int(counted.stdout.split()[-1])


def _check(runs: dict[str, ml_collections.ConfigDict], directory: pathlib.Path) -> None:
    """Refuses a directory that the runs cannot have."""
    if ':' in str(directory):
        raise ConfigError(
            f'--workdir: got {str(directory)!r} with --sweep; accepted: paths without a colon, after '
            'which --config names a variant; choose another name'
        )
    with user_errors('workdir'):
        for name, config in runs.items():
            workdir.check(resolve(config), directory / name)


def _train(file: pathlib.Path, directory: pathlib.Path, quiet: bool) -> int:
    command = [sys.executable, '-m', 'adabatch_jax.main', f'--config={file}', f'--workdir={directory}']
    command.append('--num_processes=1')  # whatever this process is one of
    process = subprocess.Popen([*command, *(['--quiet'] if quiet else [])])
    with _passing_on(signal.SIGTERM, process) as received:
        try:
            status = process.wait()
        except KeyboardInterrupt:
            received.append(signal.SIGINT)
            try:  # from a keyboard the run has got it too, and a second one would break off how it ends
                status = process.wait(_PATIENCE_SECONDS)
            except (KeyboardInterrupt, subprocess.TimeoutExpired):
                process.send_signal(signal.SIGINT)
                status = process.wait()
    if received and status in (0, 3):  # with which the sweep would go on
        return 128 + received[0]
    return status if status >= 0 else 128 - status


@contextlib.contextmanager
def _passing_on(number: int, process: subprocess.Popen) -> Iterator[list[int]]:
    """A signal to this process goes to the run, which saves and ends; yields those that came."""
    received: list[int] = []

    def pass_on(*_):
        received.append(number)
        process.send_signal(number)

    before = signal.signal(number, pass_on)
    try:
        yield received
    finally:
        signal.signal(number, before)
