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
    metrics,
    schedules,
    steps,
    train_state,
    workdir,
)
from adabatch_jax.config import resolve, user_errors
from adabatch_jax.experiment import describe
from adabatch_jax.run import Diverged, Run

__all__ = ['Diverged', 'Preempted', 'plan', 'train']


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
      ConfigError: a mistake in the config or the work directory; nothing was written.
      Diverged: the training loss became infinite or not a number.
      Preempted: ``stop`` was set.
    """
    config = resolve(config)
    with open_run(config, pathlib.Path(directory)) as run:
        if run.upcoming is None:
            run.display.say('this run is complete: nothing is left to train')
        while run.upcoming is not None:
            if run.step_fn is None or run.upcoming.batch_size != run.batch_size:
                run.enter_stage()
            flight = run.dispatch()
            run.observe()  # update k - 1, while update k runs: never more than one in flight
            run.in_flight = flight
            run.decide()
            if run.is_due(config.eval_every_epochs):
                run.evaluate()
            if run.is_due(config.checkpoint_every_epochs):
                run.save()
            if stop is not None and stop.is_set() and run.upcoming is not None:
                run.save()
                raise Preempted(f'stopped and saved at update {run.step}, epoch {run.epoch:.4g}')
        return run.finish()


def plan(config: ml_collections.ConfigDict) -> schedules.Plan:
    """Every stage of the run that a config describes; raises ``ConfigError`` for one that fails."""
    return describe(resolve(config)).plan


@contextlib.contextmanager
def open_run(config: ml_collections.FrozenConfigDict, directory: pathlib.Path) -> Iterator[Run]:
    """Sets up a run at the position that its work directory holds, and closes its files."""
    steps.enable_persistent_cache(config.compile.cache_dir)
    experiment = describe(config)
    workdir.check(config, directory)
    folder = directory / checkpoint.FOLDER
    host = None
    state = train_state.create(
        experiment.model, experiment.optimizer, experiment.info.image_shape, config.seed
    )
    if checkpoint.steps(folder):
        state, host = checkpoint.restore(folder, target=state)
    state = jax.device_put(state, distributed.replicated())
    if config.compile.precompile:  # the first step compiles while the data is read
        first = experiment.plan.stages[0].batch_size
        size = host['decision']['batch_size'] if host else first
        steps.CACHE.precompile(experiment.train_spec(size))
    with user_errors('config.dataset'):
        pipeline = input_pipeline.create(config, experiment.clock)
    workdir.create(config, experiment.plan, directory)
    with (
        contextlib.closing(metrics.MetricsWriter(directory)) as writer,
        contextlib.closing(checkpoint.Checkpointer(folder)) as checkpointer,
    ):
        run = Run(experiment, pipeline, writer, checkpointer, state, host)
        with run.display:
            yield run
