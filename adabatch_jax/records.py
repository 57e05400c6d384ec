"""The fields of the records that a run writes of itself, from where it is."""

import os
import time
from typing import Any

import jax

from adabatch_jax import compilation_cache, metrics, optimizers, train_state
from adabatch_jax.host_state import OVERHEADS


def why(run, reason: str) -> str:
    """Why a process does not simply begin: where it continues, ``reason``, and what has changed."""
    if run.step:
        reason = f'continues from the checkpoint of update {run.step}; {reason}'.removesuffix('; ')
    if run.schedule_changes:
        reason = f'{reason}; schedule changed: {"; ".join(run.schedule_changes)}'
        if run.host.lowered != 1:
            reason = f'{reason}; effective learning rate x {run.host.lowered:g}, as the run fell back'
    return reason


def session(run, reason: str) -> dict[str, Any]:
    """Of a ``session`` record: on what, and why a process does not simply begin, if it does not.

    ``window_open`` is there where the checkpoint holds sums of updates that no ``train`` record has yet.
    A record of them, by a process that got further than its last checkpoint, no longer counts.
    """
    fields = {
        'reason': reason or 'begins',
        'num_processes': jax.process_count(),
        'num_devices': jax.device_count(),
        'device': jax.devices()[0].device_kind,
        'versions': metrics.versions(),
    }
    return fields | ({'window_open': True} if run.host.window else {})


def stage(run, stall_seconds: float, continued: bool) -> dict[str, Any]:
    """Of a ``stage`` record, for a run that has just entered one."""
    update, stream, decision = run.upcoming, run.stream, run.decision
    microbatch_size, num_microbatches = run.experiment.plan.split(update.batch_size)
    fields = {
        'stage': run.host.stage,
        'batch_size': update.batch_size,
        'microbatch_size': microbatch_size,
        'num_microbatches': num_microbatches,
        'updates_per_dispatch': max(stream.steps),
        'learning_rate': run.learning_rate(update),
        'compile_seconds': stream.compile_seconds,
        'stall_seconds': stall_seconds,
        'cache_hit': stream.cache_hit,
        'memory_bytes': stream.memory_bytes,
        'reason': f'continued: {decision.reason}' if continued else decision.reason,
    }
    return fields | ({'inputs': decision.inputs} if decision.inputs else {})


def evaluation(run, result: dict[str, Any]) -> dict[str, Any]:
    """Of an ``eval`` record, from what ``evaluate`` found.

    ``gradient_evaluations``: of single examples since the beginning, in updates and SVRG's snapshots.
    ``objective``: the loss and the penalty that weight decay is the gradient of, where it is and
    the loss is that of the training split.
    """
    config, state = run.experiment.config, run.state
    evaluations = int(state.reduction.get('evaluations', run.host.gradient_evaluations))
    fields = {'split': config.dataset.eval_split, **result, 'gradient_evaluations': evaluations}
    is_penalised = config.optimizer.name in optimizers.PENALISED
    if config.dataset.eval_split == config.dataset.train_split and is_penalised:
        options, params = config.optimizer, jax.device_get(state.params)
        penalty = optimizers.penalty(params, options.weight_decay, options.decayed)
        fields['objective'] = result['loss'] + float(penalty)
    return fields


def summary(run) -> dict[str, Any]:
    """Of the ``summary`` record of a run that has ended.

    ``cache_hits`` and ``cache_misses`` count what this process found in the persistent cache of compiled
    code, and what it compiled. They, seconds of probes, and counts of what is out of the ordinary are
    there where there are any.
    """
    host = run.host
    fields = {
        'updates': run.step,
        'wall_seconds': time.perf_counter() - run.began,
        'train_seconds': host.seconds['train'],
        'compile_seconds': host.seconds['compile'],
        'final_accuracy': host.evaluation['accuracy'],
        'best_accuracy': host.best_accuracy,
        'params_digest': train_state.params_digest(run.state),
    }
    if compilation_cache.is_enabled():
        fields |= dict(zip(compilation_cache.NAMES, compilation_cache.totals(), strict=True))
    fields |= {f'{key}_seconds': host.seconds[key] for key in OVERHEADS}
    if not host.seconds['probe']:
        del fields['probe_seconds']
    return fields | {key: n for key, n in host.counts.items() if n and not key.endswith('_in_a_row')}


def last_summary(workdir: str | os.PathLike, step: int) -> dict[str, Any] | None:
    """The ``summary`` record of a run that ended with a step, None where there is none of use."""
    records = reversed(metrics.read_records(workdir))
    last = next((r for r in records if r['kind'] == 'summary'), None)
    return last if last and last['step'] == step and not metrics.missing(last) else None
