"""An experiment whose optimizer reduces the variance of its gradients: what that asks for and adds."""

import dataclasses
import functools
import math

from adabatch_jax import input_pipeline, models, optimizers, schedules, variance_reduction
from adabatch_jax.config import ConfigError, flatten, user_errors


def reduced(experiment):
    """An ``Experiment`` with what takes noise out of its gradients, as ``config.optimizer`` says.

    Raises:
      ConfigError: what variance reduction does not go with.
    """
    name, rule = experiment.config.optimizer.name, experiment.config.learning_rate.rule
    if rule != 'schedule':
        raise ConfigError(
            f'config.learning_rate.rule: got {rule!r}; accepted with optimizer {name!r}: schedule'
        )
    return _with_saga(experiment) if name in optimizers.SAGA else _with_svrg(experiment)


def _with_saga(experiment):
    config, info = experiment.config, experiment.info
    name, saga = config.optimizer.name, config.optimizer.saga
    for key, accepted in (('model.name', 'linear'), ('dataset.augment', 'none')):
        if (got := flatten(config)[key]) != accepted:
            raise ConfigError(
                f'config.{key}: got {got!r}; accepted with optimizer {name!r}: {accepted} (it keeps '
                'a number of each example and class)'
            )
    first = saga.first_size or 2 * math.prod(info.image_shape)
    first = min(first, info.num_train) if name == 'dynasaga' else info.num_train
    examples_at = functools.partial(
        input_pipeline.growing_sample, config.seed, info.num_train, first, saga.doubling
    )
    note = f'{experiment.note} Sample: {first:,} examples at first.'.strip()
    reduction = variance_reduction.Saga(info.num_train, saga.from_zero)
    return dataclasses.replace(experiment, reduction=reduction, examples_at=examples_at, note=note)


def _with_svrg(experiment):
    config, info, svrg = experiment.config, experiment.info, experiment.config.optimizer.svrg
    model, estimator = experiment.model, None
    if experiment.has_batch_norm:
        with user_errors('config.model'):
            frozen = models.frozen(model, info.image_shape, "optimizer 'svrg'")
        model, estimator = frozen, model
    reduction = variance_reduction.Svrg(
        info.num_train, svrg.mixed, svrg.skip_zeros, estimator, models.MOMENTUM
    )
    lowest = config.batch.base_size
    snapshots = variance_reduction.Snapshots(
        info.num_train,
        svrg.snapshot_passes,
        svrg.first_size or info.num_train,
        svrg.growth_factor,
        svrg.error_decay,
        schedules.ladder(lowest, config.batch.growth_factor, max(lowest, info.num_train)),
    )
    total = experiment.clock.total_examples
    with user_errors('config.optimizer.svrg'):
        last = snapshots.number(total - 1)
        if last >= variance_reduction.MOST_SNAPSHOTS:
            raise ValueError(
                f'snapshot_passes: got {svrg.snapshot_passes:g}, which makes {last:,} snapshots; '
                f'accepted: what makes {variance_reduction.MOST_SNAPSHOTS:,} at most'
            )
        sizes = [snapshots.size(number) for number in range(last + 1)]
        evaluations = 2 * total + sum(sizes)
        if evaluations > schedules.MAX_EXAMPLES:
            raise ValueError(
                f'snapshot_passes: got {svrg.snapshot_passes:g}, which makes up to {evaluations:,} '
                f'gradients of examples; accepted: what makes {schedules.MAX_EXAMPLES:,} at most'
            )
    note = (
        f'{experiment.note} SVRG: {len(sizes):,} snapshots, of {sizes[0]:,} to {sizes[-1]:,} examples; '
        f'{evaluations:,} gradients of examples at most.'
    ).strip()
    return dataclasses.replace(
        experiment, model=model, reduction=reduction, snapshots=snapshots, note=note
    )
