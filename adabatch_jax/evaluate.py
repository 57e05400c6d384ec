"""Evaluation: every example once, with running BatchNorm statistics."""

import contextlib
import functools
import pathlib
import warnings
from collections.abc import Callable
from typing import Any

import jax

from adabatch_jax import (
    checkpoint,
    compilation_cache,
    distributed,
    input_pipeline,
    metrics,
    steps,
    train_state,
)
from adabatch_jax.config import ConfigError, user_errors
from adabatch_jax.experiment import Experiment, describe

DATA_ERRORS = (input_pipeline.DataError, metrics.NoExamples)  # found while images are read


def evaluate(state: train_state.TrainState, spec: steps.StepSpec, pipeline) -> dict[str, Any]:
    """Mean ``loss`` and ``accuracy`` over the evaluation split, and ``num_examples``.

    Raises:
      ConfigError: an evaluation batch does not fit into the device's memory.
      metrics.NoExamples: all images were left out.
    """
    total, running = {}, None
    try:
        step = steps.CACHE.get(spec)
        for batch in distributed.put_ahead(pipeline.eval_batches(spec.batch_size)):
            sums = step(state.variables, batch)
            if running is not None:  # one step in flight at most
                total = metrics.add_sums(total, jax.device_get(running))
            running = sums
        total = metrics.add_sums(total, jax.device_get(running))
    except jax.errors.JaxRuntimeError as error:
        if not distributed.is_out_of_memory(error):
            raise
        raise ConfigError(
            f'config.dataset.eval_batch_size: got {spec.batch_size}, and the device ran out of memory; '
            'choose a smaller one and go on with the same work directory'
        ) from error
    return {**metrics.mean_metrics(total), 'num_examples': round(total['count'])}


def agree_on_data(experiment: Experiment) -> None:
    """Refuses data that are not the same in all processes."""
    data = experiment.info.as_saved().items()
    distributed.agree({f'config.dataset, {key}': value for key, value in data}, ConfigError)


def evaluate_checkpoint(
    config, workdir: str, which: str = 'latest', report: Callable[[str], Any] = warnings.warn
) -> dict[str, Any]:
    """Evaluates the checkpoint of a work directory on ``config.dataset.eval_split``.

    Args:
      config: the resolved config of the run.
      workdir: the run's work directory.
      which: ``'latest'`` or ``'best'``.
      report: takes a line about a damaged checkpoint that was passed over.

    Returns:
      ``step``, ``epoch``, ``split``, ``loss``, ``accuracy`` and ``num_examples``.

    Raises:
      ConfigError: no run there, or one on other data, or no data.
    """
    compilation_cache.enable(config.compile.cache_dir, distributed.is_shared)
    experiment = describe(config, num_devices=1)  # the batches of training need not fit these devices
    agree_on_data(experiment)
    folder = pathlib.Path(workdir, checkpoint.FOLDER).expanduser()
    state = experiment.state_shapes
    check = functools.partial(experiment.info.check, but=('num_eval',))  # of another split, perhaps

    def read():
        nonlocal state
        with user_errors('workdir'):
            state, _ = checkpoint.restore(folder, which, state, report, check)

    distributed.from_first(read)
    state = distributed.replicate(distributed.share(state))
    with (
        contextlib.closing(experiment.open_pipeline()) as pipeline,
        user_errors('config.dataset', DATA_ERRORS),
    ):
        result = evaluate(state, experiment.eval_spec, pipeline)
    epoch = experiment.clock.epoch(int(state.examples_seen))
    return {
        'step': int(state.step),
        'epoch': epoch,
        'split': config.dataset.eval_split,
        **result,
    }
