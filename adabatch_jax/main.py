"""Trains, evaluates or plans the run that a config file describes.

    python -m adabatch_jax.main --config=configs/NAME.py[:VARIANT] --workdir=DIR [--config.KEY=VALUE]

Exit status: 0 success; 2 a mistake in config or input, told in one line on standard error; 3 training
diverged; 130 interrupted; 143 stopped by SIGTERM after saving.
"""

from adabatch_jax import huge_pages

if __name__ == '__main__':
    huge_pages.restart()  # ahead of the imports that take time

import contextlib
import json
import pathlib
import signal
import sys
import threading
from collections.abc import Iterator

from absl import flags

from adabatch_jax import command_line, distributed, evaluate, scaling, terminal, train, workdir
from adabatch_jax.config import ConfigError, resolve, user_errors
from adabatch_jax.experiment import describe
from adabatch_jax.metrics import read_records


def define_flags(argv: list[str]) -> flags.FlagValues:
    """The command line's flags, fresh for every call of ``main``."""
    values = flags.FlagValues()
    flags.DEFINE_string('workdir', None, 'Directory of the run.', flag_values=values)
    flags.DEFINE_enum(
        'mode',
        'train',
        ['train', 'eval', 'plan'],
        'train: train, or continue what the work directory holds; eval: evaluate a checkpoint; '
        'plan: print every stage and exit.',
        flag_values=values,
    )
    flags.DEFINE_bool(
        'allow_schedule_change',
        False,
        'Continue a run from where it is with other values of num_epochs, batch.*, learning_rate.* and '
        'divergence.*.',
        flag_values=values,
    )
    flags.DEFINE_enum(
        'checkpoint', 'latest', ['latest', 'best'], 'Which one to evaluate.', flag_values=values
    )
    flags.DEFINE_integer(
        'devices',
        None,
        'Of plan: devices to plan for; those at hand where left out.',
        1,
        flag_values=values,
    )
    flags.DEFINE_string(
        'benchmark',
        None,
        'Of plan: file of benchmark --scaling --json, to tell how many devices pay off.',
        flag_values=values,
    )
    command_line.define_common(values, argv)
    return values


def parse(argv: list[str]) -> flags.FlagValues:
    """The parsed command line; every mistake in it is a ``ConfigError``."""
    return command_line.parse(argv, define_flags)


def run(values: flags.FlagValues) -> int:
    """Does what the command line says; returns the exit status."""
    config, directory = values.config, values.workdir
    for name in ('devices', 'benchmark'):
        if values[name].present and values.mode != 'plan':
            raise ConfigError(
                f'--{name}: got {values[name].value!r} with --mode={values.mode}; accepted: --mode=plan'
            )
    if values.mode != 'plan' and not directory:
        raise ConfigError('--workdir: missing; give the directory of the run')
    if config is None and values.mode != 'eval':
        raise ConfigError('--config: missing; for example --config=configs/quickstart.py')
    if values.mode == 'eval':
        config = distributed.from_first(lambda: evaluated_config(config, directory))
    if values.mode == 'plan':
        print_plan(config, values.devices, values.benchmark)
        return 0
    if values.mode == 'eval':
        result = evaluate.evaluate_checkpoint(resolve(config), directory, values.checkpoint)
        terminal.print_evaluation(result)
        return 0
    try:
        with sigterm() as stop:
            train.train(config, directory, stop, values.allow_schedule_change)
    except train.Preempted as reason:
        terminal.complain(f'{reason}; the same command continues')
        return 143
    except train.Diverged as reason:
        terminal.complain(f'error: {reason}')
        return 3
    except train.SaveFailed as reason:
        raise ConfigError(f'workdir: {reason}; make room, and the same command continues') from reason
    if distributed.is_first():
        terminal.print_stages(read_records(directory))
    return 0


def print_plan(config, num_devices: int | None, benchmark: str | None) -> None:
    """Prints the plan on the devices at hand or on others, and how many of them pay off."""
    # The memory of devices that are not at hand is not known.
    experiment = describe(resolve(config), num_devices) if num_devices else train.fitted(config)
    terminal.print_plan(experiment.plan, experiment.normalised_over, experiment.policy.note)
    if benchmark:
        with user_errors('--benchmark'), open(benchmark, encoding='utf-8') as file:
            model = scaling.Model.from_benchmark(json.load(file))
        terminal.print_worthwhile(experiment.plan, model, experiment.plan.num_devices)
    elif num_devices:
        terminal.say(
            'How many devices pay off in each stage: --benchmark=FILE with what python -m '
            'adabatch_jax.benchmark --config=... --scaling --json=FILE wrote'
        )


def evaluated_config(config, directory: str):
    """The config of the run in a work directory; as it was given, where it is of the same run."""
    if config is None:
        return workdir.read_config(directory)
    with user_errors('workdir'):
        workdir.check(resolve(config), pathlib.Path(directory), may_differ=('dataset.eval_split',))
    return config


@contextlib.contextmanager
def sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets; with several processes JAX watches for it in all of them."""
    stop = threading.Event()
    if not distributed.is_alone():
        yield stop
        return
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


def main(argv: list[str]) -> int:
    interrupted = '; the same command continues from the last checkpoint'
    return command_line.run(argv, __doc__, define_flags, run, interrupted)


if __name__ == '__main__':
    sys.exit(main(sys.argv))
