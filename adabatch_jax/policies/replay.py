"""The batch sizes that another run decided on, as a planned schedule.

``batch.replay`` names the work directory of a finished run that was driven by statistics. With the rest
of its config the replay ends in the same weights: it splits its batches in the same way and has its
coupling. A run leaves no schedule whose decisions gave gains in place of the coupling, as those of
``adascale``, which fell back, or which was continued with other learning rates or another coupling.
"""

import json
import os
import pathlib
from typing import Any

from adabatch_jax.policies.base import PlannedPolicy
from adabatch_jax.schedules import Clock, LearningRate, Transition, check_transitions

FILE = 'schedule.json'


def load(workdir: str | os.PathLike) -> dict[str, Any]:
    """The schedule that a finished run left in its work directory.

    Raises:
      ValueError: there is none, or the file is not one.
    """
    path = pathlib.Path(os.path.expanduser(workdir), FILE)
    if not str(workdir) or not path.is_file():
        raise ValueError(
            f'replay: got {str(workdir)!r}; accepted: the work directory of a finished run whose batch '
            'sizes, and no gains of its learning rates, were decided by a policy, and that went on with '
            f'its learning rates wherever it was continued, which holds {FILE}'
        )
    try:
        schedule = json.loads(path.read_text(encoding='utf-8'))
        _check_kinds(schedule)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f'replay: {str(path)!r} is not the schedule of a run: {error!r}') from error
    return schedule


def _check_kinds(schedule: dict[str, Any]) -> None:
    numbers = [schedule['num_examples'], schedule['max_per_device']]
    texts = [schedule['coupling'], schedule['statistics'], schedule['policy']]
    for stage in schedule['stages']:
        numbers += [stage['examples_seen'], stage['batch_size']]
        texts.append(stage['reason'])
    for values, kind in ((numbers, int), (texts, str)):
        if wrong := [value for value in values if type(value) is not kind]:
            raise TypeError(f'got {wrong[0]!r} in place of {kind.__name__}')
    if min(numbers) < 0:
        raise ValueError(f'got {min(numbers)}; accepted: no negative numbers')


def create(config, rate: LearningRate, clock: Clock) -> PlannedPolicy:
    """The stages of ``batch.replay``.

    Raises:
      ValueError: no schedule there, or it is of another number of training examples.
    """
    schedule = load(config.batch.replay)
    if schedule['num_examples'] != clock.num_examples:
        raise ValueError(
            f'replay: the run in {config.batch.replay!r} had {schedule["num_examples"]} training '
            f'examples, this one has {clock.num_examples}; use the same data'
        )
    policy = PlannedPolicy(
        check_transitions(
            Transition(s['examples_seen'], s['batch_size'], f'replay: {s["reason"]}')
            for s in schedule['stages']
        )
    )
    policy.statistics, policy.max_per_device = schedule['statistics'], schedule['max_per_device']
    return policy
