"""Times the steps, the input and the compilation of the run that a config file describes.

    python -m adabatch_jax.benchmark --config=configs/NAME.py[:VARIANT] [--batch_sizes=128,512]
        [--input=real] [--json=FILE] [--config.KEY=VALUE]

For each batch size of the plan: seconds of compiling, cold and from the persistent cache; of a forward
pass, of forward and backward, and of a whole update; images per second; memory of a device. Then the
time of an epoch's forward and backward passes relative to the first batch size, and what the whole run
would take, adaptive and with its first batch size throughout. Medians of repeats, the batch sizes in
turn, so that a machine whose speed drifts drifts for all. Images are made up; with --input=real they
are the data set's, and the speed of the input pipeline by itself is measured too. --run trains
instead, and tells where the time goes.
"""

from adabatch_jax import huge_pages

if __name__ == '__main__':
    huge_pages.restart()  # ahead of the imports that take time

import dataclasses
import json
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import flags

from adabatch_jax import (
    command_line,
    compilation_cache,
    distributed,
    input_pipeline,
    metrics,
    schedules,
    steps,
    terminal,
    train,
    train_state,
)
from adabatch_jax.config import ConfigError, resolve, user_errors
from adabatch_jax.experiment import Experiment, describe
from adabatch_jax.host_state import OVERHEADS
from adabatch_jax.stream import open_stream

MIN_SECONDS = 0.2  # of one measurement; short steps are repeated until they take that long
RATE = np.float32(1e-4)  # small enough for weights to stay finite on made-up images


@dataclasses.dataclass
class Measured:
    """What was measured of one batch size; seconds are of one update, and medians.

    Attributes:
      batch_size: examples.
      microbatch_size: examples that a device has in a forward and backward pass.
      num_microbatches: of a device.
      updates_per_dispatch: that ``step_seconds`` were measured with.
      compile_seconds: of the train step, with an empty persistent cache.
      cached_compile_seconds: with the step in it.
      cache_hit: whether it was found there.
      memory_bytes: of a device.
      forward_seconds: of a forward pass in training.
      gradient_seconds: of forward and backward.
      step_seconds: of the whole update.
      images_per_second: of the whole update.
      input_images_per_second: of the input pipeline by itself; None with made-up images.
    """

    batch_size: int
    microbatch_size: int
    num_microbatches: int
    updates_per_dispatch: int
    compile_seconds: float
    cached_compile_seconds: float
    cache_hit: bool
    memory_bytes: int
    forward_seconds: float
    gradient_seconds: float
    step_seconds: float
    images_per_second: float
    input_images_per_second: float | None = None


def made_up_batch(spec: steps.StepSpec, num_classes: int) -> Any:
    """A batch of noise on the devices, as a train step takes it."""
    rng, ends = np.random.default_rng(0), {'image': 256, 'label': num_classes, 'epoch': 1}

    def draw(shapes, axis_of_devices):
        arrays = {}
        for name, x in shapes.items():
            end = ends.get(name) or spec.load.num_examples
            shape = (jax.local_device_count(), *x.shape[1:]) if axis_of_devices else x.shape
            arrays[name] = rng.integers(end, size=shape, dtype=x.dtype)
        return arrays

    shapes = steps.batch_shapes(spec)
    data = shapes.pop('data', None)
    batch = distributed.put_split(draw(shapes, True))
    if data:
        batch['data'] = distributed.put_everywhere(draw(data, False))
    return [batch] * spec.num_parts if spec.num_parts > 1 else batch


class Bench:
    """One batch size of an experiment: what is compiled for it, and how long each piece takes.

    Args:
      experiment: what is timed.
      batch_size: of its ladder, or another that its devices divide.
      pipeline: for real input; None for made-up images.
    """

    def __init__(self, experiment: Experiment, batch_size: int, pipeline=None):
        specs = experiment.train_specs(batch_size)
        count, spec = next(iter(specs.items()))
        with compilation_cache.empty():
            self.cold, self.step = steps.compile_step(spec), steps.compile_step(spec)
        self.batch_size, self.num_updates = batch_size, count
        self.split = experiment.plan.split(batch_size)
        self.seconds: dict[str, list[float]] = {}
        # A batch that comes in parts goes forward and backward part by part.
        num_parts, one = spec.num_parts, specs[1]
        one = dataclasses.replace(
            one,
            num_parts=1,
            batch_size=batch_size // num_parts,
            num_microbatches=one.num_microbatches // num_parts,
        )
        self.part, self.num_parts = made_up_batch(one, experiment.info.num_classes), num_parts
        self.forward = steps.compile_part(one, steps.batch_loss)
        self.gradient = steps.compile_part(one, steps.batch_gradient)
        if pipeline is None:
            batch = made_up_batch(spec, experiment.info.num_classes)
            self.take = lambda: batch
        else:
            updates = experiment.clock.updates(0, batch_size)
            stream = open_stream(experiment, pipeline, experiment.clock.update_at(0, batch_size))
            self.take = lambda: stream.take([next(updates) for _ in range(count)])
        shape = () if count == 1 else (count,)
        scalars = np.full(shape, RATE, np.float32), np.zeros(shape, np.uint32)
        self.scalars = distributed.put_everywhere(scalars)

    def measure(self, state: train_state.TrainState, real: bool) -> train_state.TrainState:
        """Times every piece once more; returns the state, which the train step replaces."""
        self._time('forward', lambda: self.forward(state, self.part), self.num_parts)
        self._time('gradient', lambda: self.gradient(state, self.part), self.num_parts)

        def step():
            nonlocal state
            state, sums = self.step(state, self.take(), *self.scalars)
            return sums

        self._time('step', step, 1 / self.num_updates)
        if real:
            self._time('input', lambda: _parts(self.take()), 1 / self.num_updates)
        return state

    def _time(self, what: str, function: Callable[[], Any], calls_of_an_update: float) -> None:
        """Adds a measurement of seconds an update, over two calls at least."""
        if what not in self.seconds:
            jax.block_until_ready(function())  # the first call of a function is not like the others
        began, calls, before = time.perf_counter(), 0, None
        while time.perf_counter() - began < MIN_SECONDS or calls < 2:
            running = function()
            jax.block_until_ready(before)  # as in training, never more than one in flight
            before, calls = running, calls + 1
        jax.block_until_ready(before)
        seconds = (time.perf_counter() - began) / calls * calls_of_an_update
        self.seconds.setdefault(what, []).append(seconds)

    def finish(self) -> Measured:
        """The medians of what was measured."""
        median = {what: statistics.median(seconds) for what, seconds in self.seconds.items()}
        return Measured(
            self.batch_size,
            *self.split,
            self.num_updates,
            self.cold.compile_seconds,
            self.step.compile_seconds,
            self.step.cache_hit,
            self.step.memory_bytes,
            median['forward'],
            median['gradient'],
            median['step'],
            self.batch_size / median['step'],
            self.batch_size / median['input'] if 'input' in median else None,
        )


def _parts(batch: Any) -> Any:
    return batch if isinstance(batch, dict) else list(batch)


def measure(experiment: Experiment, sizes: list[int], repeats: int, pipeline=None) -> list[Measured]:
    """Times the steps of some batch sizes, one after the other, ``repeats`` times."""
    state = train_state.create(experiment.model, experiment.optimizer, experiment.info.image_shape)
    state = distributed.replicate(state)
    benches = []
    for size in sizes:
        terminal.say(f'compiling the step of batch size {size:,}')
        benches.append(Bench(experiment, size, pipeline))
    for number in range(repeats):
        terminal.say(f'measurement {number + 1} of {repeats}')
        for bench in benches:
            state = bench.measure(state, real=pipeline is not None)
    return [bench.finish() for bench in benches]


# --------------------------------------------------------------------------------- predictions


def relative_epochs(measured: list[Measured]) -> list[dict[str, float]]:
    """The paper's table: how much faster an epoch's passes are than with the first batch size.

    ``forward`` and ``backward`` are seconds an image with the first batch size over those with this one;
    the backward pass is what forward and backward take longer than forward alone.
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
                'backward': first[1] / backward,
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


def prediction(config, experiment: Experiment, measured: list[Measured]) -> dict[str, Any]:
    """What the updates of the whole run and of its control take; ``speedup`` is of the former.

    The control has the run's first batch size throughout. Evaluation, checkpoints and compilation come
    on top; of policies that decide during the run only the control is predicted.
    """
    control = config.copy_and_resolve_references()
    control.batch.policy = 'fixed'
    seconds = {'fixed': predicted_seconds(train.plan(control), measured), 'adaptive': None}
    if experiment.policy.planned:
        seconds['adaptive'] = predicted_seconds(experiment.plan, measured)
    known = all(seconds.values())
    return seconds | {'speedup': seconds['fixed'] / seconds['adaptive'] if known else None}


# ------------------------------------------------------------------------------ where time goes


def shares(summary: dict[str, Any]) -> dict[str, float]:
    """Which share of the wall time of a run went where, from its ``summary`` record.

    ``steps`` is the time between the ends of updates, less what kept the devices waiting in it;
    ``other`` is mostly the start of the run.
    """
    wall = summary['wall_seconds']
    seconds = {key: summary.get(f'{key}_seconds', 0.0) for key in OVERHEADS}
    steps_ = summary['train_seconds'] - seconds['input'] - seconds['log']
    found = {'steps': steps_, **seconds}
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
    flags.DEFINE_bool('run', False, 'Train, and tell where the time goes.', flag_values=values)
    flags.DEFINE_string('json', None, 'File for the results.', flag_values=values)
    command_line.define_config(values, argv)
    return values


def batch_sizes(values: flags.FlagValues, experiment: Experiment) -> list[int]:
    """The batch sizes to measure, sorted."""
    devices = experiment.plan.num_devices
    for text in values.batch_sizes:
        if not (text.isdecimal() and int(text) > 0 and int(text) % devices == 0):
            raise ConfigError(
                f'--batch_sizes: got {text!r}; accepted: whole numbers above 0 that the number of '
                f'devices, {devices}, divides, separated by commas'
            )
    return sorted({int(text) for text in values.batch_sizes} or experiment.plan.ladder)


def run(values: flags.FlagValues) -> int:
    """Does what the command line says; returns the exit status."""
    if values.config is None:
        raise ConfigError('--config: missing; for example --config=configs/quickstart.py')
    config = values.config
    if values.json and not pathlib.Path(values.json).parent.is_dir():
        raise ConfigError(f'--json: got {values.json!r}; accepted: a file in a folder that exists')
    result = {
        'device': jax.devices()[0].device_kind,
        'num_devices': jax.device_count(),
        'versions': metrics.versions(),
        'config': resolve(config).to_dict(),
    }
    if values.run:
        with tempfile.TemporaryDirectory(prefix='adabatch-benchmark-') as directory:
            summary = train.train(config, directory)
            stages = [r for r in metrics.read_records(directory) if r['kind'] == 'stage']
        result |= {'summary': summary, 'shares': shares(summary), 'stages': stages}
        terminal.print_shares(result['shares'], summary)
    else:
        result |= measured_steps(values, config)
    if values.json:
        with user_errors('--json'), open(values.json, 'w', encoding='utf-8') as file:
            json.dump(result, file, indent=2)
            file.write('\n')
    return 0


def measured_steps(values: flags.FlagValues, config) -> dict[str, Any]:
    """Measures what the command line asks for, and prints it."""
    sizes = batch_sizes(values, describe(resolve(config)))
    experiment, pipeline = train.fitted(config), None
    if values.input == 'real':
        parts = (experiment.config, experiment.info, experiment.clock, experiment.load)
        with user_errors('config.dataset'):
            pipeline = input_pipeline.create(*parts)
    measured = measure(experiment, sizes, values.repeats, pipeline)
    relative, predicted = relative_epochs(measured), prediction(config, experiment, measured)
    terminal.print_benchmark(measured, relative, predicted)
    return {
        'input': values.input,
        'repeats': values.repeats,
        'batch_sizes': [dataclasses.asdict(m) for m in measured],
        'relative_epochs': relative,
        'predicted_seconds': predicted,
    }


def main(argv: list[str]) -> int:
    return command_line.run(argv, __doc__, define_flags, run)


if __name__ == '__main__':
    sys.exit(main(sys.argv))
