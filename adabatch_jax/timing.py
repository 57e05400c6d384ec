"""How long steps and their pieces take, and adding up gradients over the devices."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from adabatch_jax import compilation_cache, distributed, steps, terminal, train_state
from adabatch_jax.experiment import Experiment
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
    rng, ends = np.random.default_rng(0), {'image': 256, 'label': num_classes, 'epoch': 1, 'seed': 1}

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
        count, spec = next(iter(experiment.train_specs(batch_size).items()))
        with compilation_cache.empty(distributed.is_shared):
            self.cold, self.step = steps.compile_step(spec), steps.compile_step(spec)
        self.batch_size, self.num_updates = batch_size, count
        self.split = experiment.plan.split(batch_size)
        self.seconds: dict[str, list[float]] = {}
        self.calls: dict[str, int] = {}
        # A batch that comes in parts goes forward and backward part by part.
        num_parts, one = spec.num_parts, experiment.train_spec(batch_size)
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
        is_given = experiment.config.learning_rate.rule == 'schedule'  # or times the last step's
        rate = RATE if is_given else 1.0
        scalars = np.full(shape, rate, np.float32), np.zeros(shape, np.uint32)
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
        """Adds a measurement of seconds an update."""
        if what not in self.calls:
            self.calls[what] = enough_calls(function)
        seconds = seconds_of_a_call(function, self.calls[what]) * calls_of_an_update
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


def measure(timed: list[tuple[Experiment, int]], repeats: int, pipeline=None) -> list[Measured]:
    """Times steps, one after the other, ``repeats`` times.

    Args:
      timed: experiments with batch sizes; of one network, optimizer and data set.
      repeats: of each measurement.
      pipeline: for real input, of any of them; None for made-up images.
    """
    state = distributed.replicate(timed[0][0].initial_state())
    benches = []
    for experiment, size in timed:
        terminal.say(f'compiling the step of batch size {size:,}')
        benches.append(Bench(experiment, size, pipeline))
    for number in range(repeats):
        terminal.say(f'measurement {number + 1} of {repeats}')
        for bench in benches:
            state = bench.measure(state, real=pipeline is not None)
    return [bench.finish() for bench in benches]


def enough_calls(function: Callable[[], Any]) -> int:
    """How many calls a measurement wants: two at least; the same in all processes."""
    jax.block_until_ready(function())  # the first call of a function is not like the others
    once = seconds_of_a_call(function, 1)
    return distributed.from_first(lambda: max(2, math.ceil(MIN_SECONDS / once)))


def seconds_of_a_call(function: Callable[[], Any], calls: int) -> float:
    """Mean seconds of some calls; as in training never more than one waits for another."""
    began, before = time.perf_counter(), None
    for _ in range(calls):
        running = function()
        jax.block_until_ready(before)
        before = running
    jax.block_until_ready(before)
    return (time.perf_counter() - began) / calls


def all_reduce_seconds(num_bytes: list[int], repeats: int) -> dict[int, float]:
    """Seconds in which all devices add up float32 arrays, by bytes of each: medians, in turn."""
    sums = jax.pmap(lambda x: lax.psum(x, distributed.AXIS_NAME), distributed.AXIS_NAME)
    calls, seconds = {}, {}
    for size in num_bytes:
        shape = jax.core.ShapedArray((jax.device_count(), size // 4), jnp.float32)
        compiled = sums.lower(shape).compile()
        array = distributed.put_split(np.ones((jax.local_device_count(), size // 4), np.float32))
        calls[size] = lambda compiled=compiled, array=array: compiled(array)
    enough = {size: enough_calls(call) for size, call in calls.items()}
    for _ in range(repeats):
        for size, call in calls.items():
            seconds.setdefault(size, []).append(seconds_of_a_call(call, enough[size]))
    return {size: statistics.median(times) for size, times in seconds.items()}
