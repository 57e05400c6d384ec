"""The training loop and its set-up. To find your way, begin with ``train``."""

import contextlib
import os
import pathlib
import threading
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections

from adabatch_jax import (
    checkpoint,
    distributed,
    input_pipeline,
    memory,
    metrics,
    schedules,
    steps,
    train_state,
    workdir,
)
from adabatch_jax.config import resolve, user_errors
from adabatch_jax.evaluate import DATA_ERRORS
from adabatch_jax.experiment import Experiment, describe
from adabatch_jax.run import Diverged, Run

__all__ = ['Diverged', 'Preempted', 'fitted', 'plan', 'train']


class Preempted(RuntimeError):
    """Training was asked to stop, and saved where it was."""


def train(
    config: ml_collections.ConfigDict,
    directory: str | os.PathLike,
    stop: threading.Event | None = None,
) -> dict[str, Any]:
    """Trains, or continues what the work directory holds.

    Args:
      config: from ``config.default_config()``, with changes.
      directory: the work directory; made where it does not exist.
      stop: when set, the run saves after the update in progress and ends.

    Returns:
      The ``summary`` record.

    Raises:
      ConfigError: a mistake in the config, the data or the work directory; nothing is lost or
        overwritten.
      Diverged: the training loss became infinite or not a number.
      Preempted: ``stop`` was set.
    """
    config = resolve(config)
    summary, max_per_device = None, None  # as config and checkpoint say
    while summary is None:
        summary, max_per_device = _attempt(config, pathlib.Path(directory), max_per_device, stop)
    return summary


def _attempt(config, directory, max_per_device, stop) -> tuple[dict[str, Any] | None, int | None]:
    """The summary, or after running out of memory the microbatch to try again with.

    The next attempt begins at the last checkpoint, since what became of donated buffers is not known.
    That this is a function frees the memory of the one before.
    """
    with open_run(config, directory, max_per_device) as run:
        try:
            return loop(run, stop), None
        except jax.errors.JaxRuntimeError as error:
            size = run.upcoming.batch_size if run.upcoming else run.batch_size
            smaller = memory.smaller_microbatch(error, run.experiment, size)
            run.display.say(
                f'update {run.step + 1}: out of memory; microbatches of at most {smaller} examples '
                'from the last checkpoint on'
            )
            return None, smaller


def loop(run: Run, stop: threading.Event | None = None) -> dict[str, Any]:
    """Trains from where a run is to its end; the arguments and results are those of ``train``."""
    config = run.experiment.config
    if run.upcoming is None and (summary := run.written_summary()):
        run.display.say('this run is complete: nothing is left to train')
        return summary
    while run.upcoming is not None:
        if run.step_fn is None or run.changes_stage:
            run.enter_stage()
        flight = run.dispatch()
        run.observe()  # update k - 1, while update k runs: never more than one in flight
        run.in_flight = flight
        run.decide()
        if run.upcoming is None:
            break
        if run.is_due(config.eval_every_epochs):
            run.evaluate()
        if run.is_due(config.checkpoint_every_epochs):
            run.save()
        if stop is not None and stop.is_set():
            run.save()
            raise Preempted(f'stopped and saved at update {run.step}, epoch {run.epoch:.4g}')
    return run.finish()


def plan(config: ml_collections.ConfigDict) -> schedules.Plan:
    """Every stage of the run that a config describes; raises ``ConfigError`` for one that fails.

    Compiles nothing: with ``batch.max_per_device=0`` no batch is split. ``fitted`` splits them as a run
    on this machine would.
    """
    return describe(resolve(config)).plan


def fitted(config: ml_collections.ConfigDict) -> Experiment:
    """The experiment of a config, its batches split as the memory of this machine's devices asks for."""
    config = resolve(config)
    steps.enable_persistent_cache(config.compile.cache_dir)  # a run that follows finds the step there
    return memory.fit(describe(config))


@contextlib.contextmanager
def open_run(
    config: ml_collections.FrozenConfigDict,
    directory: pathlib.Path,
    max_per_device: int | None = None,
) -> Iterator[Run]:
    """Sets up a run at the position that its work directory holds, and closes its files.

    The largest microbatch is ``max_per_device`` where that is given, else the one of the checkpoint, so
    that a continued run computes the same on another machine, else that of the config.
    """
    steps.enable_persistent_cache(config.compile.cache_dir)
    experiment = describe(config)
    with user_errors('workdir'):
        workdir.check(config, directory)
    folder, host = directory / checkpoint.FOLDER, None
    state = train_state.create(
        experiment.model, experiment.optimizer, experiment.info.image_shape, config.seed
    )
    if checkpoint.steps(folder):
        state, host = checkpoint.restore(folder, target=state)
    upcoming = host['upcoming'] if host else {'batch_size': experiment.plan.stages[0].batch_size}
    max_per_device = max_per_device or (host or {}).get('max_per_device')  # older ones do not say
    if max_per_device:
        experiment = experiment.with_microbatches_up_to(max_per_device)
    with contextlib.ExitStack() as stack:
        stack.callback(steps.CACHE.cancel_waiting)
        with user_errors('config.dataset'):
            pipeline = input_pipeline.create(config, experiment.info, experiment.clock)
        stack.enter_context(contextlib.closing(pipeline))
        experiment = memory.fit(experiment)
        if config.compile.precompile and upcoming:
            steps.CACHE.precompile(experiment.train_spec(upcoming['batch_size']))
        state = jax.device_put(state, distributed.replicated())
        workdir.create(config, experiment.plan, directory)
        with user_errors('workdir'):
            writer = stack.enter_context(contextlib.closing(metrics.MetricsWriter(directory)))
            saver = stack.enter_context(contextlib.closing(checkpoint.Checkpointer(folder)))
        run = Run(experiment, pipeline, writer, saver, state, host)
        stack.enter_context(run.display)
        with user_errors('config.dataset', DATA_ERRORS):
            yield run
