"""Trains, evaluates or plans the run that a config file describes.

    python -m adabatch_jax.main --config=configs/NAME.py[:VARIANT] --workdir=DIR [--config.KEY=VALUE]

Exit status: 0 success; 2 a mistake in config or input, told in one line on standard error; 3 training
diverged; 130 interrupted; 143 stopped by SIGTERM after saving.
"""

from adabatch_jax import huge_pages

if __name__ == '__main__':
    huge_pages.restart()  # ahead of the imports that take time

import pathlib
import signal
import sys
import threading

from absl import flags

from adabatch_jax import command_line, evaluate, terminal, train, workdir
from adabatch_jax.config import ConfigError, resolve, user_errors
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
    command_line.define_config(values, argv)
    return values


def parse(argv: list[str]) -> flags.FlagValues:
    """The parsed command line; every mistake in it is a ``ConfigError``."""
    return command_line.parse(argv, define_flags)


def run(values: flags.FlagValues) -> int:
    """Does what the command line says; returns the exit status."""
    config, directory = values.config, values.workdir
    if values.mode != 'plan' and not directory:
        raise ConfigError('--workdir: missing; give the directory of the run')
    if config is None:
        if values.mode != 'eval':
            raise ConfigError('--config: missing; for example --config=configs/quickstart.py')
        config = workdir.read_config(directory)
    elif values.mode == 'eval':
        with user_errors('workdir'):
            workdir.check(resolve(config), pathlib.Path(directory), may_differ=('dataset.eval_split',))
    if values.mode == 'plan':
        experiment = train.fitted(config)
        terminal.print_plan(experiment.plan, experiment.normalised_over, experiment.policy.note)
        return 0
    if values.mode == 'eval':
        result = evaluate.evaluate_checkpoint(resolve(config), directory, values.checkpoint)
        terminal.print_evaluation(result)
        return 0
    stop = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        train.train(config, directory, stop, values.allow_schedule_change)
    except train.Preempted as reason:
        print(f'{reason}; the same command continues', file=sys.stderr)
        return 143
    except train.Diverged as reason:
        print(f'error: {reason}', file=sys.stderr)
        return 3
    except train.SaveFailed as reason:
        raise ConfigError(f'workdir: {reason}; make room, and the same command continues') from reason
    finally:
        signal.signal(signal.SIGTERM, before)
    terminal.print_stages(read_records(directory))
    return 0


def main(argv: list[str]) -> int:
    interrupted = '; the same command continues from the last checkpoint'
    return command_line.run(argv, __doc__, define_flags, run, interrupted)


if __name__ == '__main__':
    sys.exit(main(sys.argv))
