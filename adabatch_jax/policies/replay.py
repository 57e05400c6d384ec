"""The batch sizes that another run decided on, as a planned schedule.

``batch.replay`` names the work directory of a finished run that was driven by statistics. With the rest
of its config the replay ends in the same weights: it splits its batches in the same way and has its
coupling.
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
    path = pathlib.Path(workdir, FILE)
    if not str(workdir) or not path.is_file():
        raise ValueError(
            f'replay: got {str(workdir)!r}; accepted: the work directory of a finished run whose batch '
            f'sizes were decided by a policy, which holds {FILE}'
        )
    try:
        schedule = json.loads(path.read_text(encoding='utf-8'))
        for stage in schedule['stages']:
            int(stage['examples_seen']), int(stage['batch_size']), str(stage['reason'])
        int(schedule['num_examples']), int(schedule['max_per_device'])
        str(schedule['coupling']), str(schedule['statistics']), str(schedule['policy'])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f'replay: {str(path)!r} is not the schedule of a run: {error!r}') from error
    return schedule


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
