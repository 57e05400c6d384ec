"""Trains, evaluates or plans the run that a config file describes.

    python -m adabatch_jax.main --config=configs/NAME.py[:VARIANT] --workdir=DIR [--config.KEY=VALUE]

Exit status: 0 success; 1 a failure inside, or another one of several processes lost (134 where JAX saw
it first); 2 a mistake in config or input, told in one line on standard error; 3 training diverged; 130
interrupted; 143 stopped by SIGTERM after saving.
"""

from adabatch_jax import malloc

if __name__ == '__main__':
    malloc.restart()  # ahead of the imports that take time

import json
import pathlib
import re
import sys

from absl import flags

from adabatch_jax import (
    analysis,
    command_line,
    comparison,
    distributed,
    evaluate,
    progress,
    scaling,
    sweep,
    terminal,
    train,
    workdir,
)
from adabatch_jax.config import OF_A_MACHINE, ConfigError, flatten, resolve, user_errors
from adabatch_jax.experiment import describe

# What a config file can add, and the work directory has only the name of.
UNKNOWN_NAME = re.compile(r'config\.(model\.name|dataset\.name|batch\.policy): got .*; accepted: ')


def define_flags(argv: list[str]) -> flags.FlagValues:
    """The command line's flags, fresh for every call of ``main``."""
    values = flags.FlagValues()
    command_line.define_path('workdir', 'Directory of the run.', values)
    flags.DEFINE_enum(
        'mode',
        'train',
        ['train', 'eval', 'plan', 'analyze'],
        'train: train, or continue what the work directory holds; eval: evaluate a checkpoint; '
        'analyze: sharpness and curvature at every checkpoint; plan: print every stage and exit.',
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
        'checkpoint',
        None,
        ['latest', 'best'],
        'Which one to evaluate or to analyze; where left out the latest, and all.',
        flag_values=values,
    )
    flags.DEFINE_integer(
        'devices',
        None,
        'Of plan: devices to plan for; those at hand where left out.',
        1,
        flag_values=values,
    )
    command_line.define_path(
        'benchmark',
        'Of plan: file of benchmark --scaling --json, to tell how many devices pay off.',
        values,
    )
    flags.DEFINE_bool(
        'sweep',
        False,
        'Train several policies and seeds, one run after the other, and compare them in a report.',
        flag_values=values,
    )
    flags.DEFINE_list('seeds', [], "Of a sweep; the config's where left out.", flag_values=values)
    flags.DEFINE_list(
        'policies',
        list(sweep.POLICIES),
        'Of a sweep: the first batch size throughout, the largest, and the config as it is; or any '
        'batch.policy.',
        flag_values=values,
    )
    flags.DEFINE_bool('quiet', False, 'Print warnings and errors only.', flag_values=values)
    command_line.define_common(values, argv)
    return values


def parse(argv: list[str]) -> flags.FlagValues:
    """The parsed command line; every mistake in it is a ``ConfigError``."""
    return command_line.parse(argv, define_flags)


def trains(values: flags.FlagValues) -> bool:
    """Whether this process itself trains."""
    return values.mode == 'train' and not values.sweep


def run(values: flags.FlagValues) -> int:
    """Does what the command line says; returns the exit status."""
    check(values)
    if distributed.is_joined():  # with another mode the others would wait for ever
        distributed.agree({'--mode': values.mode}, ConfigError)
    if values.mode == 'plan':
        print_plan(values.config, values.devices, values.benchmark)
        return 0
    if values.mode in ('eval', 'analyze'):
        try:
            (evaluate_run if values.mode == 'eval' else analyze_run)(values)
        except ConfigError as error:
            if values.config is None and UNKNOWN_NAME.match(str(error)):
                raise ConfigError(
                    f'{error}; if a config file adds it, give --config=FILE too'
                ) from error
            raise
        return 0
    if values.sweep:
        directory, seeds = pathlib.Path(values.workdir), values.seeds or [values.config.seed]
        seeds = [int(seed) for seed in seeds]
        original = values['config'].config_filename
        return sweep.run(values.config, original, directory, values.policies, seeds, values.quiet)
    progress.quiet = values.quiet
    try:
        return train_run(values.config, values.workdir, values.allow_schedule_change)
    finally:
        progress.quiet = False


def check(values: flags.FlagValues) -> None:
    """Refuses flags that do not go together."""

    def refuse(name, accepted):
        got = values[name].value
        raise ConfigError(f'--{name}: got {got!r} with --mode={values.mode}; accepted: {accepted}')

    for name in ('devices', 'benchmark'):
        if values[name].present and values.mode != 'plan':
            refuse(name, '--mode=plan')
    if values.checkpoint and values.mode not in ('eval', 'analyze'):
        refuse('checkpoint', '--mode=eval or --mode=analyze')
    for name in ('seeds', 'policies'):
        if values[name].present and not values.sweep:
            refuse(name, '--sweep')
        if values[name].present and not values[name].value:
            refuse(name, 'one or more, separated by commas')
    for name in ('sweep', 'allow_schedule_change'):
        if values[name].value and values.mode != 'train':
            refuse(name, '--mode=train')
    if values.sweep and values.allow_schedule_change:
        raise ConfigError('--allow_schedule_change: got --sweep as well; accepted: one of them')
    if not all(seed.isdecimal() for seed in values.seeds):
        refuse('seeds', 'whole numbers, separated by commas')
    if values.mode != 'plan' and not values.workdir:
        raise ConfigError('--workdir: missing; give the directory of the run')
    if values.config is None and values.mode not in ('eval', 'analyze'):
        raise ConfigError('--config: missing; for example --config=configs/quickstart.py')


def train_run(config, directory: str, allow_schedule_change: bool) -> int:
    """Trains, tells how it ended, and returns the exit status."""
    try:
        with command_line.sigterm() as stop:
            train.train(config, directory, stop, allow_schedule_change)
    except train.Preempted as reason:
        terminal.complain(f'{reason}; the same command continues')
        return 143
    except train.Diverged as reason:
        terminal.complain(f'error: {reason}')
        return 3
    except train.SaveFailed as reason:
        raise ConfigError(f'workdir: {reason}; make room, and the same command continues') from reason
    if distributed.is_first() and not progress.quiet:
        run = comparison.read_run(directory)
        unusual = comparison.out_of_the_ordinary(run.summary)
        terminal.print_stages(comparison.stage_rows(run.records), run.summary, unusual)
    return 0


def print_plan(config, num_devices: int | None, benchmark: str | None) -> None:
    """Prints the plan on the devices at hand or on others, and how many of them pay off."""
    # The memory of devices that are not at hand is not known.
    # Those that do not pay off in a stage need not be able to share its batches.
    others = bool(num_devices and benchmark)
    experiment = describe(resolve(config), num_devices, others) if num_devices else train.fitted(config)
    terminal.print_plan(experiment.plan, experiment.normalised_over, experiment.note)
    if benchmark:
        with user_errors('--benchmark'), open(benchmark, encoding='utf-8') as file:
            model = scaling.Model.from_benchmark(json.load(file), experiment.gradient_bytes)
        terminal.print_worthwhile(experiment.plan, model)
    elif num_devices:
        terminal.say(
            'How many devices pay off in each stage: --benchmark=FILE with what python -m '
            'adabatch_jax.benchmark --config=... --scaling --json=FILE wrote'
        )


def config_of_run(config, directory: str, may_differ: tuple[str, ...] = ()):
    """The config of the run in a work directory; as it was given, where it is of the same run."""
    if config is None:
        return workdir.read_config(directory)
    with user_errors('workdir'):
        workdir.check(resolve(config), pathlib.Path(directory), may_differ)
    return config


def evaluate_run(values: flags.FlagValues) -> None:
    """Evaluates a checkpoint of a run, and prints what was found."""
    config = distributed.from_first(
        lambda: config_of_run(values.config, values.workdir, ('dataset.eval_split',))
    )
    if values.config is not None:
        own = flatten(values.config)
        config.update_from_flattened_dict({key: own[key] for key in OF_A_MACHINE})
    result = evaluate.evaluate_checkpoint(
        resolve(config), values.workdir, values.checkpoint or 'latest', terminal.complain
    )
    terminal.print_evaluation(result)


def analyze_run(values: flags.FlagValues) -> None:
    """Analyzes checkpoints of a run in the first process, and prints what was found."""

    def analyze():
        config = resolve(config_of_run(values.config, values.workdir))
        which = values.checkpoint or 'all'
        found = analysis.analyze(config, values.workdir, which, terminal.complain, terminal.say)
        terminal.print_analysis(found)
        terminal.say(f'written to {pathlib.Path(values.workdir, analysis.FILE)}')

    distributed.from_first(analyze)


def main(argv: list[str]) -> int:
    """Runs the command with a command line, its name first; returns the exit status."""
    interrupted = '; the same command goes on from the last checkpoint, where there is one'
    return command_line.run(argv, __doc__, define_flags, run, interrupted, trains=trains)


if __name__ == '__main__':
    sys.exit(main(sys.argv))
