"""Which microbatch a device's memory holds: from the compiled step's own account, before training."""

import contextlib
import math
import os
import pathlib
from collections.abc import Callable, Iterable

import jax

from adabatch_jax import distributed, steps
from adabatch_jax.config import ConfigError
from adabatch_jax.experiment import Experiment

# Beside the step a device holds the batches put ahead, the evaluation step, and what the allocator loses
# in gaps.
USABLE = 0.85


def device_bytes() -> int:
    """The memory that one device of this process can use; CPU devices share the machine's.

    Raises:
      ConfigError: an accelerator that does not tell, as those with an allocator that has no limit.
    """
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if 'bytes_limit' in stats:
        return stats['bytes_limit']
    if device.platform != 'cpu':
        raise ConfigError(
            f'config.batch.max_per_device: got 0, and the {device.device_kind} does not tell how much '
            'memory it has; give the largest number of examples that it is to take at once'
        )
    machine = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    for limit in ('memory.max', 'memory/memory.limit_in_bytes'):  # of a container, cgroup v2 and v1
        with contextlib.suppress(OSError, ValueError):
            machine = min(machine, int(pathlib.Path('/sys/fs/cgroup', limit).read_text()))
    return machine // jax.local_device_count()


def largest_spec(experiment: Experiment) -> steps.StepSpec:
    """The step that tells what a run needs: of the largest batch, one that its stage trains with."""
    return next(iter(experiment.train_specs(experiment.plan.usable[-1]).values()))


def begin_compiling(experiment: Experiment, first: int) -> None:
    """Starts to compile what a run needs first, while its data are read.

    That is the step of the largest batch, where the microbatch is yet to be found, and those of the
    batch size ``first``, unless they wait for that.
    """
    specs = experiment.stage_specs(first)
    if not experiment.plan.max_per_device:
        likely = experiment.in_parts()
        if likely.plan.split(first) != experiment.plan.split(first):
            specs = []
        specs = [largest_spec(likely), *specs]
    for spec in specs:
        steps.CACHE.precompile(spec)


def step_bytes(spec: steps.StepSpec) -> float:
    """Memory of one device while a step runs; infinite where it is too large to be compiled."""
    try:
        return steps.CACHE.precompile(spec).result().memory_bytes
    except jax.errors.JaxRuntimeError as error:
        if not distributed.is_out_of_memory(error):
            raise
        return float('inf')


def fit(
    experiment: Experiment,
    available: float | None = None,
    memory_of: Callable[[steps.StepSpec], float] = step_bytes,
) -> Experiment:
    """The experiment with the largest microbatch whose step fits into a device's memory.

    A microbatch has no more images than a device is given at once. The step of the largest batch is
    compiled, and as long as it needs too much, again with a microbatch that is smaller in proportion.
    A step needs some memory whatever its microbatch is, so a microbatch smaller in proportion may still
    be too large: the search comes down from above and stops at the first that fits.

    Args:
      experiment: one with ``batch.max_per_device=0``, and steps to run; else it is returned as it is.
      available: bytes of one device that a step may take; measured where left out.
      memory_of: bytes that a step needs.

    Raises:
      ConfigError: even the smallest microbatch needs more.
    """
    if experiment.plan.max_per_device or not experiment.plan.usable:
        return experiment
    if available is None:
        available = distributed.smallest(device_bytes() * USABLE)
    largest, as_given, experiment = experiment.plan.usable[-1], experiment, experiment.in_parts()
    # The processes have to agree, and what their compilers tell may differ.
    while (needed := distributed.largest(memory_of(largest_spec(experiment)))) > available:
        microbatch, _ = experiment.plan.split(largest)
        smallest = experiment.plan.microbatch_multiple
        if microbatch == smallest:
            raise ConfigError(
                f'config.batch.max_per_device: got 0, but the step of batch size {largest} with '
                f'microbatches of {smallest} needs {needed / 2**30:.3g} GiB of a device that has '
                f'{available / 2**30:.3g}; choose a smaller model or batch, or more devices'
            )
        ratio = available / needed if math.isfinite(needed) else 1 / 8
        guess = min(int(microbatch * ratio), microbatch - 1)
        experiment = experiment.with_microbatches_up_to(max(guess, smallest))
    if experiment is as_given:
        return experiment
    # No other batch may have a larger microbatch than the one whose step was measured.
    return experiment.with_microbatches_up_to(experiment.plan.split(largest)[0])


def smaller_microbatch(error: Exception, experiment: Experiment, batch_sizes: Iterable[int]) -> int:
    """The microbatch to go on with after ``error``: half of the largest of some batch sizes.

    Raises:
      Exception: ``error`` itself, where it is not about memory or nothing smaller is left.
    """
    if not distributed.is_out_of_memory(error):
        raise error
    smallest = experiment.plan.microbatch_multiple
    # Other devices may have trained what came before.
    at_work = filter(experiment.plan.can_split, batch_sizes)
    microbatch = max((experiment.plan.split(size)[0] for size in at_work), default=smallest)
    if microbatch == smallest:
        raise error
    return max(microbatch // 2 // smallest * smallest, smallest)
