"""What a run goes on with: what its checkpoint holds, under the present config and on these devices.

``saved`` is what a checkpoint holds beside the train state, and None for a run that begins.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from adabatch_jax import checkpoint, distributed, optimizers, policies, schedules, terminal, train_state
from adabatch_jax.config import ConfigError, default_config, schedule_of, user_errors
from adabatch_jax.experiment import Experiment
from adabatch_jax.host_state import HostState


def restore(
    experiment: Experiment, folder: pathlib.Path
) -> tuple[train_state.TrainState, dict[str, Any]]:
    """Reads the last checkpoint of a run.

    Args:
      experiment: of the present config, which may have another schedule.
      folder: of the checkpoints.

    Returns:
      The train state (shapes, but in the first process), and what the checkpoint holds beside it.

    Raises:
      ConfigError: no checkpoint can be read, it is of a run on other data, nothing is left to train with
        another schedule, or the devices cannot share the batches to come.
    """
    state = experiment.state_shapes

    def read():
        nonlocal state
        with user_errors('workdir'):
            state, saved = checkpoint.restore(
                folder, target=state, report=terminal.say, check=experiment.info.check
            )
        # Keys that its version did not have yet.
        saved['schedule'] = schedule_of(default_config()) | saved['schedule']
        saved.setdefault('other_rates', saved.get('gains', False))
        factor, fall_backs = saved['schedule']['divergence.rate_factor'], saved['counts']['fall_backs']
        saved.setdefault('lowered', factor**fall_backs)
        return saved, int(state.examples_seen)

    saved, examples_seen = distributed.from_first(read)
    _check_is_before_the_end(experiment, saved, examples_seen)
    check_devices(experiment, saved, examples_seen)
    return _search_from_effective(experiment, saved, state), saved


def host_state(experiment: Experiment, saved: dict[str, Any] | None, examples_seen: int) -> HostState:
    """What the training loop goes on with on the host.

    A policy keeps its state through changes of the config that leave it its ladder.
    """
    policy, now = experiment.policy, schedule_of(experiment.config)
    devices = f'{jax.device_count()} x {jax.devices()[0].device_kind}'
    if saved is None:
        initial = policies.as_saved(policy.initial_state())
        saved = {'schedule': now, 'policy': initial, 'devices': devices}
    names = {field.name for field in dataclasses.fields(HostState)}
    host = HostState(**{name: value for name, value in saved.items() if name in names})
    is_same = host.schedule['batch.policy'] == now['batch.policy']
    if host.schedule != now and not (is_same and host.ladder == list(policy.ladder)):
        known, epoch = host.policy if is_same else {}, experiment.clock.epoch(examples_seen)
        host.policy = policy.continued(known, epoch, host.batch_size)
    if host.devices != devices:
        host.policy = policy.on_other_devices(host.policy)
    host.other_rates |= _had_other_rates(experiment, host)
    host.ladder, host.devices = list(policy.ladder), devices
    host.coupling = experiment.learning_rate.coupling
    host.decides |= not policy.planned
    host.data = experiment.info.as_saved()
    return host


def begins_with(experiment: Experiment, saved: dict[str, Any] | None) -> int | None:
    """The batch size of the first update to come, where that is known before anything is decided."""
    if saved is None:
        return experiment.policy.transitions[0].batch_size
    goes_on = _has_schedule(experiment, saved)
    return saved['upcoming']['batch_size'] if goes_on and saved['upcoming'] else None


def kept_microbatch(experiment: Experiment, saved: dict[str, Any] | None) -> int | None:
    """The largest microbatch that a checkpoint was trained with, unless it or the ladder is another."""
    if saved is None or saved['ladder'] != list(experiment.policy.ladder):
        return None
    is_same = saved['schedule']['batch.max_per_device'] == experiment.config.batch.max_per_device
    return saved['max_per_device'] if is_same else None


def check_devices(experiment: Experiment, saved: dict[str, Any], examples_seen: int) -> None:
    """Refuses devices that cannot share the batches still to come; those before may have had others."""
    policy, plan, upcoming = experiment.policy, experiment.plan, saved['upcoming']
    goes_on = _has_schedule(experiment, saved)
    if goes_on and upcoming is None:  # nothing is left
        return
    if policy.planned:
        update = schedules.next_update(
            experiment.clock,
            examples_seen,
            lambda seen: schedules.transition_at(policy.transitions, seen).batch_size,
        )
        later = [stage.batch_size for stage in plan.stages if update and stage.start > update.start]
        to_come = [update.batch_size, *later] if update else []
    else:
        lowest = upcoming['batch_size'] if goes_on and not policy.may_shrink else 0
        to_come = [size for size in policy.ladder if size >= lowest]
    with user_errors('config.batch'):
        for size in to_come:
            plan.split(size)


def _has_schedule(experiment: Experiment, saved: dict[str, Any]) -> bool:
    """Whether a run has the schedule of its checkpoint, which then has the decision that comes next."""
    return saved['schedule'] == schedule_of(experiment.config)


def _had_other_rates(experiment: Experiment, host: HostState) -> bool:
    """Whether the present config gives other learning rates for what a checkpoint has behind it."""
    now = schedule_of(experiment.config)
    ends_with_run = now['learning_rate.schedule'] in schedules.ENDING
    before = host.coupling or experiment.learning_rate.coupling  # that earlier versions did not note
    return before != experiment.learning_rate.coupling or any(
        value != host.schedule[key]
        for key, value in now.items()
        if key.startswith('learning_rate.') or key == 'num_epochs' and ends_with_run
    )


def _check_is_before_the_end(experiment: Experiment, saved: dict[str, Any], examples_seen: int) -> None:
    """Refuses another schedule for a run that has nothing left to train with it."""
    clock = experiment.clock
    if not _has_schedule(experiment, saved) and examples_seen >= clock.total_examples:
        raise ConfigError(
            f'config.num_epochs: got {clock.num_epochs:g}, and the run is at epoch '
            f'{clock.epoch(examples_seen):.6g}; accepted with another schedule: more than that'
        )


def _search_from_effective(
    experiment: Experiment, saved: dict[str, Any], state: train_state.TrainState
) -> train_state.TrainState:
    """The state where step sizes are searched for now, or from another size on, and were not before."""
    now, before = schedule_of(experiment.config), saved['schedule']
    keys = ('learning_rate.rule', 'learning_rate.effective')
    is_another = any(before[key] != now[key] for key in keys)
    if experiment.config.learning_rate.rule == 'schedule' or not is_another:
        return state
    start = experiment.config.learning_rate.effective
    saved['observed']['learning_rate'] = start
    rates = [jnp.full_like(rate, start) for rate in optimizers.learning_rates(state.opt_state)]
    return state.replace(opt_state=optimizers.with_learning_rate(state.opt_state, *rates))
