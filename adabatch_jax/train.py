"""The training loop and its set-up. To find your way, begin with ``train``."""

import contextlib
import dataclasses
import gc
import os
import pathlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections

from adabatch_jax import (
    checkpoint,
    compilation_cache,
    continuation,
    distributed,
    memory,
    metrics,
    schedules,
    steps,
    terminal,
    workdir,
)
from adabatch_jax.checkpoint import SaveFailed
from adabatch_jax.config import OF_A_MACHINE, SCHEDULE, ConfigError, flatten, resolve, user_errors
from adabatch_jax.evaluate import DATA_ERRORS, agree_on_data
from adabatch_jax.experiment import Experiment, describe
from adabatch_jax.run import Diverged, Run

__all__ = ['Diverged', 'Preempted', 'SaveFailed', 'fitted', 'plan', 'train']


class Preempted(RuntimeError):
    """Training was asked to stop, and saved where it was."""


def train(
    config: ml_collections.ConfigDict,
    directory: str | os.PathLike,
    stop: threading.Event | None = None,
    allow_schedule_change: bool = False,
) -> dict[str, Any]:
    """Trains, or continues what the work directory holds.

    Args:
      config: from ``config.default_config()``, with changes.
      directory: the work directory; made where it does not exist.
      stop: when set, the run saves after the update in progress and ends.
      allow_schedule_change: whether a run may be continued, from where it is, with other values of the
        keys in ``config.SCHEDULE``.

    Returns:
      The ``summary`` record.

    Raises:
      ConfigError: a mistake in the config, the data or the work directory; nothing is lost or
        overwritten.
      Diverged: loss, gradient or weights became infinite or not a number, and what
        ``config.divergence`` says about that did not help.
      Preempted: ``stop`` was set, and the run was saved.
      SaveFailed: it could not be saved where it ended.
    """
    config, directory = resolve(config), pathlib.Path(directory).expanduser()
    may_differ = SCHEDULE if allow_schedule_change else ()
    _agree_on(config)
    with contextlib.ExitStack() as stack:
        # Only the first of several processes touches the work directory; what it finds is told to all.
        distributed.from_first(lambda: stack.enter_context(_claimed(config, directory, may_differ)))
        attempt: Attempt | None = Attempt()
        while attempt is not None:
            summary, attempt = _try(attempt, config, directory, stop)
            if attempt:  # an error and the frames that it came through may hold one another
                gc.collect()
    return summary


def _agree_on(config: ml_collections.FrozenConfigDict) -> None:
    """Refuses configs that differ between processes, before any of them touches anything.

    Each would make the updates of another run, and the weights of none be saved.
    """
    keys = flatten(config).items()
    distributed.agree({f'config.{k}': v for k, v in keys if k not in OF_A_MACHINE}, ConfigError)


def _agree_on_plan(experiment: Experiment) -> None:
    """Refuses data, or a run to replay, that the first process has otherwise."""
    agree_on_data(experiment)
    stages = experiment.plan.stages
    sizes = ', '.join(f'{stage.num_updates} updates with {stage.batch_size}' for stage in stages)
    distributed.agree({'config.batch': sizes}, ConfigError)


@contextlib.contextmanager
def _claimed(config, directory: pathlib.Path, may_differ: tuple[str, ...]) -> Iterator[None]:
    """A work directory that belongs to this run, and is in use by nobody else."""
    with user_errors('workdir'):
        workdir.check(config, directory, may_differ, is_to_train=True)
    with workdir.locked(directory):
        yield


@dataclasses.dataclass(frozen=True)
class Attempt:
    """What to take a run up with from its last checkpoint, and why it is not what the checkpoint says.

    Attributes:
      max_per_device: largest microbatch.
      fall_backs: how often the effective learning rate has been lowered.
      reason: in words, for the ``session`` record.
      began: when the run did, on the clock ``time.perf_counter`` and had nothing come between; None of
        a first attempt, for which the checkpoint tells.
    """

    max_per_device: int | None = None
    fall_backs: int | None = None
    reason: str = ''
    began: float | None = None


def _try(attempt, config, directory, stop) -> tuple[dict[str, Any] | None, Attempt | None]:
    """The summary, or what to try next.

    The next attempt begins at the last checkpoint, since what became of donated buffers is not known.
    That this is a function frees the memory of the one before.
    """
    with open_run(config, directory, attempt) as run:
        attempt = dataclasses.replace(attempt, began=run.began)
        try:
            return loop(run, stop, attempt.reason), None
        except jax.errors.JaxRuntimeError as error:
            smaller = memory.smaller_microbatch(error, run.experiment, run.at_work)
            if not distributed.is_alone():  # the others do not know of it, and wait
                raise ConfigError(
                    f'config.batch.max_per_device: update {run.step + 1} ran out of memory; start all '
                    f'processes again with {smaller}, and with --allow_schedule_change'
                ) from error
            reason = f'update {run.step + 1}: out of memory; microbatches of at most {smaller} examples'
            return None, dataclasses.replace(attempt, max_per_device=smaller, reason=reason)
        except Diverged as error:
            options, fall_backs = config.divergence, run.host.counts['fall_backs'] + 1
            if options.action != 'fall_back' or fall_backs > options.max_fall_backs:
                raise
            lowered = options.rate_factor * run.host.lowered
            reason = f'{error}: effective learning rate x {lowered:g}'
            return None, dataclasses.replace(attempt, fall_backs=fall_backs, reason=reason)


def loop(run: Run, stop: threading.Event | None, reason: str) -> dict[str, Any]:
    """Trains from where a run is to its end; arguments, result and exceptions are those of ``train``."""
    config = run.experiment.config
    if run.step == 0 or run.schedule_changes:  # else the checkpoint has the decision
        run.decide()
    if run.upcoming is None and (summary := run.written_summary()):
        run.display.say('this run is complete: nothing is left to train')
        return summary
    run.begin(reason)
    while run.upcoming is not None:
        if run.stream is None or run.changes_stage:
            run.enter_stage()
        before = run.dispatch()
        run.observe(before)  # what ran before, while this runs: never more than one in flight
        run.decide()
        if run.upcoming is None:
            break
        if run.is_due(config.eval_every_epochs):
            run.evaluate()
        if run.is_due(config.checkpoint_every_epochs):
            run.save()
        if distributed.asked_to_stop(stop):
            run.save()
            distributed.from_first(lambda: run.checkpointer.wait())
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
    # A run that follows finds the step there.
    compilation_cache.enable(config.compile.cache_dir, distributed.is_shared)
    return memory.fit(describe(config))


@contextlib.contextmanager
def open_run(
    config: ml_collections.FrozenConfigDict,
    directory: pathlib.Path,
    attempt: Attempt,
) -> Iterator[Run]:
    """Sets up a run at the position that its work directory holds, and closes its files.

    The largest microbatch is that of the attempt where it has one, else the one of the checkpoint, so
    that a continued run computes the same on another machine, else that of the config.
    """
    start = time.perf_counter()
    compilation_cache.enable(config.compile.cache_dir, distributed.is_shared)
    folder, saved = directory / checkpoint.FOLDER, None
    is_new = distributed.from_first(lambda: not checkpoint.steps(folder))
    experiment = describe(config, begun_on_others=not is_new)
    _agree_on_plan(experiment)
    with contextlib.ExitStack() as stack:
        stack.callback(steps.CACHE.cancel_waiting)
        if not is_new:
            state, saved = continuation.restore(experiment, folder)
        if max_per_device := attempt.max_per_device or continuation.kept_microbatch(experiment, saved):
            experiment = experiment.with_microbatches_up_to(max_per_device)
        if config.compile.precompile and (batch_size := continuation.begins_with(experiment, saved)):
            memory.begin_compiling(experiment, batch_size)
        pipeline = stack.enter_context(contextlib.closing(experiment.open_pipeline()))
        if is_new:
            state = experiment.initial_state()
        experiment = memory.fit(experiment)
        state = distributed.replicate(distributed.share(state))
        writer, saver = metrics.NoWriter(), checkpoint.NoCheckpointer()  # but for the first process

        def open_files():
            nonlocal writer, saver
            workdir.create(config, experiment.plan, directory)
            with user_errors('workdir'):
                checkpoint.set_aside_after(folder, int(state.step))
                writer = metrics.MetricsWriter(directory, terminal.say, flatten(config))
                stack.enter_context(contextlib.closing(writer))
                saver = checkpoint.Checkpointer(folder, terminal.say)
                stack.enter_context(contextlib.closing(saver))

        distributed.from_first(open_files)
        host = continuation.host_state(experiment, saved, int(state.examples_seen))
        began = start - host.seconds['wall'] if attempt.began is None else attempt.began
        if attempt.fall_backs is not None:
            host.lowered *= config.divergence.rate_factor ** (
                attempt.fall_backs - host.counts['fall_backs']
            )
            host.counts['fall_backs'] = attempt.fall_backs
        run = Run(experiment, pipeline, writer, saver, state, host, began)
        stack.enter_context(contextlib.closing(run.streams))
        stack.callback(steps.CACHE.cancel_waiting)  # first, since what opens a stage waits for its steps
        stack.enter_context(run.display)
        run.host.seconds['setup'] += time.perf_counter() - start
        with user_errors('config.dataset', DATA_ERRORS):
            yield run
