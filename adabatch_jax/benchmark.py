"""Times the steps, the input and the compilation of the run that a config file describes.

    python -m adabatch_jax.benchmark --config=configs/NAME.py[:VARIANT] [--batch_sizes=128,512]
        [--input=real] [--json=FILE] [--config.KEY=VALUE]

For each batch size of the plan: seconds of compiling, cold and from the persistent cache; of a forward
pass, of forward and backward, and of a whole update; images per second; memory of a device. Then the
time of an epoch's forward and backward passes relative to the first batch size, and what the whole run
would take, adaptive and with its first batch size throughout. Medians of repeats, the batch sizes in
turn, so that a machine whose speed drifts drifts for all. Where the policy asks for more of a step than
policy fixed does, the step of the latter is measured too. Images are made up; with --input=real they are
the data set's, and the speed of the input pipeline by itself is measured too. --run trains instead, and
tells where the time goes.

--scaling also measures how long the devices at hand take to add up gradients, and predicts fixed and
adaptive runs on 1 to 4096 devices (adabatch_jax.scaling has the model; --plot draws it). Of what is not
at hand tell --latency_us and --gigabytes_per_second.
"""

from adabatch_jax import malloc

if __name__ == '__main__':
    malloc.restart()  # ahead of the imports that take time

import dataclasses
import itertools
import json
import math
import pathlib
import sys
import tempfile
from typing import Any

import jax
from absl import flags

from adabatch_jax import (
    command_line,
    distributed,
    figures,
    metrics,
    scaling,
    schedules,
    terminal,
    timing,
    train,
)
from adabatch_jax.config import ConfigError, resolve, user_errors
from adabatch_jax.experiment import Experiment, describe, fixed
from adabatch_jax.host_state import OVERHEADS
from adabatch_jax.timing import Measured

# --------------------------------------------------------------------------------- predictions


def relative_epochs(measured: list[Measured]) -> list[dict[str, float]]:
    """The paper's table: how much faster an epoch's passes are than with the first batch size.

    ``forward`` and ``backward`` are seconds an image with the first batch size over those with this one;
    the backward pass is what forward and backward take longer than forward alone, None where that is
    lost in the noise.
    """

    def per_image(m: Measured) -> tuple[float, float]:
        backward = m.gradient_seconds - m.forward_seconds
        return m.forward_seconds / m.batch_size, backward / m.batch_size

    first = per_image(measured[0])
    rows = []
    for m in measured:
        forward, backward = per_image(m)
        rows.append(
            {
                'batch_size': m.batch_size,
                'forward': first[0] / forward,
                'backward': first[1] / backward if min(first[1], backward) > 0 else None,
                'both': sum(first) / (forward + backward),
            }
        )
    return rows


def predicted_seconds(plan: schedules.Plan, measured: list[Measured]) -> float | None:
    """Seconds of all the updates of a plan; None where it has a batch size that was not measured."""
    of_update = {m.batch_size: m.step_seconds for m in measured}
    if any(stage.batch_size not in of_update for stage in plan.stages):
        return None
    return sum(stage.num_updates * of_update[stage.batch_size] for stage in plan.stages)


def control(config, experiment: Experiment) -> Experiment:
    """A config's control: its first batch size throughout, in microbatches no larger than the run's."""
    found = describe(resolve(fixed(config, experiment.plan.stages[0].batch_size)))
    return found.with_microbatches_up_to(experiment.plan.max_per_device)


def has_own_step(control: Experiment, experiment: Experiment) -> bool:
    """Whether a control's updates are not made as those of the run with the same batch size are.

    A run whose policy measures has statistics of gradients in its step, its batch in parts for them,
    and one update a call.
    """
    steps_of = (e.train_specs(control.plan.ladder[0]) for e in (control, experiment))
    own, other = (next(iter(specs.values())) for specs in steps_of)  # those that are timed
    return own != other


def prediction(
    experiment: Experiment,
    control: Experiment,
    measured: list[Measured],
    own: Measured | None = None,
) -> dict[str, Any]:
    """What the updates of the whole run and of its control take; ``speedup`` is of the former.

    The control has the run's first batch size throughout. Evaluation, checkpoints and compilation come
    on top; of policies that decide during the run only the control is predicted.

    Args:
      experiment: the run.
      control: its control.
      measured: of the run's batch sizes.
      own: of the control, where its step is its own.
    """
    of_control = [own] if own else measured
    seconds = {'fixed': predicted_seconds(control.plan, of_control), 'adaptive': None}
    if experiment.policy.planned:
        seconds['adaptive'] = predicted_seconds(experiment.plan, measured)
    known = all(seconds.values())
    return seconds | {'speedup': seconds['fixed'] / seconds['adaptive'] if known else None}


def check_network(values: flags.FlagValues) -> None:
    """Refuses to measure between devices where there is one."""
    if jax.device_count() == 1 and None in (values.latency_us, values.gigabytes_per_second):
        raise ConfigError(
            '--scaling: one device has nothing to communicate; give --latency_us and '
            '--gigabytes_per_second of the network, or use several devices (on a CPU: '
            'JAX_NUM_CPU_DEVICES=4)'
        )


def network(values: flags.FlagValues, gradient_bytes: int) -> tuple[scaling.Network, dict[int, float]]:
    """The network between the devices, and what was measured of it: seconds of an all-reduce by bytes.

    What the command line tells of latency and bandwidth is taken as told.

    Raises:
      ConfigError: one device is at hand, and the command line does not tell both.
    """
    check_network(values)
    told = values.latency_us is not None, values.gigabytes_per_second is not None
    found, seconds = scaling.Network(0.0, 0.0), {}
    if not all(told):
        sizes = sorted({2**k for k in range(10, 25, 2)} | {gradient_bytes})
        seconds = timing.all_reduce_seconds(sizes, values.repeats)
        found = scaling.fit_network(jax.device_count(), seconds)
    latency = 1e-6 * values.latency_us if told[0] else found.latency
    per_byte = 1e-9 / values.gigabytes_per_second if told[1] else found.seconds_per_byte
    return scaling.Network(latency, per_byte), seconds


def scaled(
    values: flags.FlagValues, config, experiment: Experiment, result: dict[str, Any]
) -> dict[str, Any]:
    """Predicts the run and its control on other numbers of devices, prints that and draws it.

    ``result`` is what was measured, as for the JSON file.
    """
    num_bytes = experiment.gradient_bytes
    between, seconds = network(values, num_bytes)
    found = {
        'gradient_bytes': num_bytes,
        'latency': between.latency,
        'seconds_per_byte': between.seconds_per_byte,
        'all_reduce_seconds': seconds,
    }
    model = scaling.Model.from_benchmark(result | {'scaling': found})
    plan = control(config, experiment).plan
    rows = scaling.predictions(model, plan, experiment.plan, scaling.doubled(4096))
    terminal.print_scaling(model, rows)
    if values.plot and distributed.is_first():
        with user_errors('--plot'):
            figures.save(figures.scaling(rows), values.plot)
    return found | {'predicted': rows}


# ------------------------------------------------------------------------------ where time goes


def shares(summary: dict[str, Any]) -> dict[str, float]:
    """Which share of the wall time of a run went where, from its ``summary`` record.

    ``steps`` is the time between the ends of updates, less what kept the devices waiting in it.
    """
    wall = summary['wall_seconds']
    seconds = {key: summary.get(f'{key}_seconds', 0.0) for key in OVERHEADS}
    found = {'steps': summary['train_seconds'] - seconds['input'] - seconds['log'], **seconds}
    found['other'] = max(0.0, wall - sum(found.values()))
    return {key: value / wall for key, value in found.items()}


# -------------------------------------------------------------------------------- command line


def define_flags(argv: list[str]) -> flags.FlagValues:
    """The command line's flags, fresh for every call of ``main``."""
    values = flags.FlagValues()
    flags.DEFINE_list(
        'batch_sizes', [], "What to measure; the plan's where left out.", flag_values=values
    )
    flags.DEFINE_enum(
        'input',
        'synthetic',
        ['synthetic', 'real'],
        'synthetic: made-up images; real: those of the data set, through its pipeline.',
        flag_values=values,
    )
    flags.DEFINE_integer('repeats', 5, 'Measurements of each time.', 1, flag_values=values)
    flags.DEFINE_bool('scaling', False, 'Predict the run on 1 to 4096 devices.', flag_values=values)
    flags.DEFINE_float(
        'latency_us',
        None,
        'Microseconds of a message; measured where left out.',
        0.0,
        flag_values=values,
    )
    flags.DEFINE_float(
        'gigabytes_per_second',
        None,
        'Bandwidth between two devices; measured where left out.',
        1e-9,
        flag_values=values,
    )
    command_line.define_path('plot', 'File for the figure of --scaling.', values)
    flags.DEFINE_bool('run', False, 'Train, and tell where the time goes.', flag_values=values)
    command_line.define_path('json', 'File for the results.', values)
    command_line.define_common(values, argv)
    return values


def batch_sizes(values: flags.FlagValues, experiment: Experiment) -> list[int]:
    """The batch sizes to measure, sorted.

    For --scaling also shares of a device that many devices would have: from one example on.
    """
    devices = experiment.plan.num_devices
    for text in values.batch_sizes:
        if not (text.isdecimal() and int(text) > 0 and int(text) % devices == 0):
            raise ConfigError(
                f'--batch_sizes: got {text!r}; accepted: whole numbers above 0 that the number of '
                f'devices, {devices}, divides, separated by commas'
            )
    with user_errors('--batch_sizes'):
        for text in values.batch_sizes:
            experiment.plan.split(int(text))
    if values.batch_sizes or not values.scaling:
        return sorted({int(text) for text in values.batch_sizes} or experiment.plan.ladder)
    smaller = itertools.takewhile(
        lambda size: size < experiment.plan.ladder[0], (devices * 4**k for k in itertools.count())
    )
    return sorted({*filter(experiment.plan.can_split, smaller), *experiment.plan.ladder})


def check(values: flags.FlagValues) -> None:
    """Refuses what would fail after everything has been measured."""
    if values.config is None:
        raise ConfigError('--config: missing; for example --config=configs/quickstart.py')
    for name in ('json', 'plot'):
        path = pathlib.Path(values[name].value or 'none')
        if not path.parent.is_dir() or path.is_dir():
            raise ConfigError(
                f'--{name}: got {values[name].value!r}; accepted: a file in a folder that exists'
            )
    if values.plot and pathlib.Path(values.plot).suffix not in figures.SUFFIXES:
        accepted = ', '.join(figures.SUFFIXES)
        raise ConfigError(f'--plot: got {values.plot!r}; accepted: names that end with {accepted}')
    for name in ('plot', 'latency_us', 'gigabytes_per_second'):
        if values[name].present and not values.scaling:
            raise ConfigError(f'--{name}: got {values[name].value!r}; accepted: with --scaling')
    for name in ('latency_us', 'gigabytes_per_second'):
        if not math.isfinite(values[name].value or 0):
            raise ConfigError(f'--{name}: got {values[name].value}; accepted: a number that is finite')
    for name in ('scaling', 'batch_sizes', 'input', 'repeats'):
        if values.run and values[name].present and values[name].value:
            raise ConfigError(f'--{name}: got --run as well; accepted: one of them')
    if values.scaling:
        check_network(values)
    for name in ('json', 'plot'):
        if values[name].value and distributed.is_first():
            with user_errors(f'--{name}'):
                check_can_be_written(pathlib.Path(values[name].value))


def check_can_be_written(path: pathlib.Path) -> None:
    """Raises ``OSError`` for a file that cannot be written; one that is there stays as it is."""
    is_new = not path.exists()
    path.open('a').close()
    if is_new:
        path.unlink()


def run(values: flags.FlagValues) -> int:
    """Does what the command line says; returns the exit status."""
    check(values)
    config = values.config
    result = {
        'device': jax.devices()[0].device_kind,
        'num_devices': jax.device_count(),
        'versions': metrics.versions(),
        'config': resolve(config).to_dict(),
    }
    if values.run:
        with tempfile.TemporaryDirectory(prefix='adabatch-benchmark-') as directory:
            try:
                with command_line.sigterm() as stop:  # else it would end with the directory left behind
                    summary = train.train(config, directory, stop)
            except train.Preempted:
                terminal.complain('stopped: of a benchmark nothing is kept')
                return 143
            except train.Diverged as reason:
                terminal.complain(f'error: {reason}')
                return 3
            except train.SaveFailed as reason:
                raise ConfigError(f'--run: {reason}; make room, or set TMPDIR') from reason
            stages = [r for r in metrics.read_records(directory) if r['kind'] == 'stage']
        result |= {'summary': summary, 'shares': shares(summary), 'stages': stages}
        terminal.print_shares(result['shares'], summary)
    else:
        result |= measured_steps(values, config)
        if values.scaling:
            result['scaling'] = scaled(values, config, describe(resolve(config)), result)
    if values.json and distributed.is_first():
        with user_errors('--json'), open(values.json, 'w', encoding='utf-8') as file:
            json.dump(result, file, indent=2)
            file.write('\n')
    return 0


def measured_steps(values: flags.FlagValues, config) -> dict[str, Any]:
    """Measures what the command line asks for, and prints it."""
    described = describe(resolve(config))
    if values.scaling and not described.policy.planned:
        raise ConfigError(
            f'config.batch.policy: got {config.batch.policy!r}, which decides during the run; accepted '
            'with --scaling: policies that plan, replay among them'
        )
    sizes = batch_sizes(values, described)
    experiment, pipeline = train.fitted(config), None
    if values.input == 'real':
        pipeline = experiment.open_pipeline()
    timed, matched = [(experiment, size) for size in sizes], control(config, experiment)
    has_own = matched.plan.ladder[0] in sizes and has_own_step(matched, experiment)
    if has_own:
        timed.append((matched, matched.plan.ladder[0]))
    measured = timing.measure(timed, values.repeats, pipeline)
    own = measured.pop() if has_own else None
    relative, predicted = relative_epochs(measured), prediction(experiment, matched, measured, own)
    terminal.print_benchmark(measured, relative, predicted)
    if own:
        terminal.say(f'fixed: with a step of its own, of {1000 * own.step_seconds:,.1f} ms.')
    if experiment.snapshots:
        terminal.say('Not counted: the snapshots of SVRG, a gradient for each of their examples.')
    return {
        'input': values.input,
        'repeats': values.repeats,
        'batch_sizes': [dataclasses.asdict(m) for m in measured],
        'fixed': dataclasses.asdict(own) if own else None,
        'relative_epochs': relative,
        'predicted_seconds': predicted,
    }


def main(argv: list[str]) -> int:
    """Runs the command with a command line, its name first; returns the exit status."""
    return command_line.run(argv, __doc__, define_flags, run)


if __name__ == '__main__':
    sys.exit(main(sys.argv))
