"""Pure train and evaluation steps, as each device runs them inside a map over ``'batch'``."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from adabatch_jax import gradient_statistics, line_search, optimizers
from adabatch_jax.steps.spec import AXIS_NAME, Batch, StepSpec
from adabatch_jax.train_state import TrainState
from adabatch_jax.variance_reduction import Outputs, real_examples

_LARGE = 2**17  # elements of an array that is not copied to be checked
Totals = tuple[Any, Any, dict[str, jax.Array]]  # sums of gradients, of running statistics, of metrics


def _sums(spec, logits, labels, mask):
    of_examples = spec.loss(logits, labels)
    if jnp.shape(of_examples) != labels.shape:  # with a mask it would be broadcast to what is no loss
        shapes = f'shape {jnp.shape(of_examples)} for labels {labels.shape}'
        raise ValueError(f'loss: gives {shapes}; accepted: one number for each example')
    correct = jnp.argmax(logits, axis=-1) == labels
    return {
        'loss': jnp.sum(of_examples * mask),
        'correct': jnp.sum(correct * mask),
        'count': jnp.sum(mask),
    }


def train_step(
    spec: StepSpec,
    state: TrainState,
    batch: Batch,
    learning_rate: jax.Array,
    examples_seen: jax.Array,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update, as each device runs it inside a map over ``'batch'``.

    The gradient is the mean over the global batch: over microbatches one after the other, then
    over devices. Each microbatch starts from the same running statistics and the results are
    averaged, so they move once an update whatever the split.

    Args:
      spec: the step's shape.
      state: replicated train state.
      batch: this device's ``image`` ``[n, height, width, channels]`` and ``label`` ``[n]``, or what
        ``spec.load`` makes them of: the whole data set, ``data``, and the ``example`` and ``epoch``
        ``[n]`` to take from it. An example with the label -1 counts in no sum and adds nothing to the
        gradient, which is divided by the size of the batch all the same; BatchNorm sees its pixels.
      learning_rate: float32 scalar of this update. With another rule than ``'schedule'`` it is where the
        search begins in the first update, and later a factor of where the last one ended.
      examples_seen: uint32 scalar, the clock after this update.

    Returns:
      The new state and the sums ``loss``, ``correct`` and ``count`` over the global batch, and
      ``non_finite``: 1 where the loss or the new weights are not finite, which with the optimizers of
      ``optimizers`` tells of gradients too, else 0; with ``spec.statistics`` also ``variance`` and
      ``squared_gradient`` as in ``gradient_statistics``, and for inner products ``variance_along`` and
      ``squared_norm``; and ``learning_rate`` where that was searched for.
    """
    totals, found = accumulate(spec, state, zero_totals(spec, state), batch, jnp.int32(0))
    reduction = spec.reduction and spec.reduction.after(state.reduction, found, AXIS_NAME)
    if spec.rule == 'schedule':
        batch = None
    return apply_gradients(spec, state, totals, learning_rate, examples_seen, batch, reduction)


def train_steps(
    spec: StepSpec,
    state: TrainState,
    batch: Batch,
    learning_rates: jax.Array,
    examples_seen: jax.Array,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """``spec.num_updates`` updates one after the other, in one call.

    A small batch keeps an accelerator busy for less time than the host takes to start its step; here the
    host starts many updates at once. Arguments and results are those of ``train_step``, with a leading
    axis of updates on everything but the state and ``data``.
    """
    data, of_updates = _apart(batch)

    def update(state, given):
        batch, learning_rate, examples_seen = given
        return train_step(spec, state, {**batch, 'data': data}, learning_rate, examples_seen)

    return lax.scan(update, state, (of_updates, learning_rates, examples_seen))


def zero_totals(spec: StepSpec, state: TrainState) -> Totals:
    """The sums of gradients, running statistics and metrics before the first microbatch.

    Those of gradients have a leading axis of groups where there are several.
    """
    groups = (spec.num_groups,) if spec.num_groups > 1 else ()
    sums = ('loss', 'correct', 'count', *(['squared_norms'] if spec.statistics == 'norms' else []))
    return (
        jax.tree.map(lambda x: jnp.zeros(groups + x.shape, x.dtype), state.params),
        jax.tree.map(jnp.zeros_like, state.batch_stats),
        dict.fromkeys(sums, jnp.zeros(())),
    )


def accumulate(
    spec: StepSpec,
    state: TrainState,
    totals: Totals,
    batch: Batch,
    first_microbatch: jax.Array,
) -> tuple[Totals, Any]:
    """Adds what a part of this device's share of a batch gives, microbatch by microbatch.

    ``first_microbatch``, an int32 scalar, is the number of microbatches in the parts before. The second
    result is what variance reduction wants to know of each microbatch.
    """
    microbatches = _microbatches(spec, batch, first_microbatch)
    gradient = _microbatch_gradient(spec, state, batch, microbatches)

    def add(total, microbatch):
        index, _ = microbatch
        grads, (_, _, batch_stats, sums), found = gradient(state.params, microbatch)
        if spec.statistics == 'norms':
            sums['squared_norms'] = gradient_statistics.squared_norm(grads)
        if spec.num_groups > 1:
            group = index * spec.num_groups // spec.num_microbatches
            gradient_sums = jax.tree.map(lambda x, y: x.at[group].add(y), total[0], grads)
        else:
            gradient_sums = jax.tree.map(jnp.add, total[0], grads)
        return (gradient_sums, *jax.tree.map(jnp.add, total[1:], (batch_stats, sums))), found

    return lax.scan(add, totals, microbatches)


def _apart(batch: Batch) -> tuple[Any, Batch]:
    """The data set that lives on the device, if there is one, and what is of the batch alone."""
    return batch.get('data'), {key: value for key, value in batch.items() if key != 'data'}


def _microbatches(spec: StepSpec, batch: Batch, first: jax.Array) -> tuple[jax.Array, Batch]:
    """Numbers and examples of the microbatches of a part, along a leading axis."""
    n = spec.num_microbatches // spec.num_parts
    _, examples = _apart(batch)
    return first + jnp.arange(n), {k: x.reshape(n, -1, *x.shape[1:]) for k, x in examples.items()}


def predictor(spec: StepSpec, state: TrainState, batch: Batch) -> Callable:
    """The logits of a microbatch, as a function of parameters, and what comes with them."""
    update_key = jax.random.fold_in(state.rng, state.step)
    device_key = jax.random.fold_in(update_key, lax.axis_index(AXIS_NAME))
    data, _ = _apart(batch)

    def predict(params, microbatch):
        index, examples = microbatch
        if spec.load is None:
            images, labels = examples['image'], examples['label']
        else:
            images, labels = spec.load(data, examples)
        variables = {'params': params, 'batch_stats': state.batch_stats}
        logits, mutated = spec.model.apply(
            variables,
            spec.normalize(images),
            train=True,
            mutable=['batch_stats'],
            rngs={'dropout': jax.random.fold_in(device_key, index)},
        )
        sums = _sums(spec, logits, labels, (labels >= 0).astype(jnp.float32))
        return logits, Outputs(logits, labels, mutated.get('batch_stats', {}), sums)

    return predict


def _microbatch_loss(spec: StepSpec, state: TrainState, batch: Batch) -> Callable:
    """The mean loss over a microbatch, as a function of parameters, and what comes with it."""
    predict = predictor(spec, state, batch)

    def loss(params, microbatch):
        logits, outputs = predict(params, microbatch)
        return outputs.sums['loss'] / len(logits), outputs

    return loss


def _microbatch_gradient(
    spec: StepSpec, state: TrainState, batch: Batch, microbatches: tuple[jax.Array, Batch]
) -> Callable:
    """The gradient of that loss, or one with less noise; its outputs; and what reduced the noise."""
    if spec.reduction:
        predict = predictor(spec, state, batch)
        return spec.reduction.gradient(predict, spec.loss, state, microbatches, AXIS_NAME)
    gradient = jax.grad(_microbatch_loss(spec, state, batch), has_aux=True)
    return lambda params, microbatch: (*gradient(params, microbatch), None)


def snapshot(spec: StepSpec, state: TrainState, batch: Batch, about: Batch) -> TrainState:
    """Adds a part of a batch to a snapshot for variance reduction; see ``Svrg.snapshot``.

    ``about`` is what that takes of the part, but for its microbatches.
    """
    about = {**about, 'microbatches': _microbatches(spec, batch, jnp.int32(0))}
    predict = predictor(spec, state, batch)
    reduced = spec.reduction.snapshot(predict, spec.loss, state, about, AXIS_NAME)
    return state.replace(reduction=reduced)


def estimate_statistics(spec: StepSpec, state: TrainState, batch: Batch, count: jax.Array) -> TrainState:
    """Makes the running statistics of BatchNorm the mean over ``count`` parts of a snapshot's batch."""
    spec = dataclasses.replace(spec, model=spec.reduction.estimator)
    predict, n = predictor(spec, state, batch), spec.num_microbatches

    def add(total, microbatch):
        _, outputs = predict(state.params, real_examples(microbatch))
        return jax.tree.map(lambda x, y: x + y / n, total, outputs.batch_stats), None

    zeros = jax.tree.map(jnp.zeros_like, state.batch_stats)
    moved, _ = lax.scan(add, zeros, _microbatches(spec, batch, jnp.int32(0)))
    moved = lax.pmean(moved, AXIS_NAME)
    return state.replace(batch_stats=spec.reduction.statistics(moved, state.batch_stats, count))


def batch_loss(spec: StepSpec, state: TrainState, batch: Batch, params: Any = None) -> jax.Array:
    """Mean training loss over the global batch, with ``params`` instead of the state's if given."""
    loss = _microbatch_loss(spec, state, batch)
    params = state.params if params is None else params
    microbatches = _microbatches(spec, batch, jnp.int32(0))
    means = lax.map(lambda microbatch: loss(params, microbatch)[0], microbatches)
    return lax.pmean(jnp.mean(means), AXIS_NAME)


def batch_gradient(spec: StepSpec, state: TrainState, batch: Batch) -> Any:
    """The mean gradient over the global batch."""
    totals, _ = accumulate(spec, state, zero_totals(spec, state), batch, jnp.int32(0))
    return _mean_gradient(spec, totals[0])


def apply_gradients(
    spec: StepSpec,
    state: TrainState,
    totals: Totals,
    learning_rate: jax.Array,
    examples_seen: jax.Array,
    batch: Batch | None = None,
    reduction: Any = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The update from the totals of all of a batch's microbatches; see ``train_step``.

    The batch itself is for rules that search for the step size on it. ``reduction`` is what the state
    keeps for variance reduction after the update; as it is where left out.
    """
    groups, batch_stats, sums = totals
    grads = _mean_gradient(spec, groups)
    batch_stats = lax.pmean(jax.tree.map(lambda x: x / spec.num_microbatches, batch_stats), AXIS_NAME)
    if spec.reduction:  # running statistics change with snapshots alone
        batch_stats = state.batch_stats
    sums = lax.psum(sums, AXIS_NAME)
    sums |= _statistics(spec, grads, groups, sums.pop('squared_norms', None))

    if batch is not None:
        params, opt_state, size = _search(spec, state, grads, sums, batch, learning_rate)
        sums['learning_rate'] = size
    else:
        opt_state = optimizers.with_learning_rate(state.opt_state, learning_rate)
        updates, opt_state = spec.optimizer.update(grads, opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
    finite = _all_finite((sums['loss'], params, batch_stats, _moments(opt_state)))
    new = {
        'params': params,
        'batch_stats': batch_stats,
        'opt_state': opt_state,
        'reduction': state.reduction if reduction is None else reduction,
    }
    if spec.skip_non_finite:
        old = {name: getattr(state, name) for name in new}
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
    state = state.replace(step=state.step + 1, examples_seen=examples_seen, **new)
    return state, {**sums, 'non_finite': 1.0 - finite}


def _mean_gradient(spec: StepSpec, sums: Any) -> Any:
    """Of the batch, from the sums over this device's microbatches, in groups or not."""
    if spec.num_groups > 1:
        sums = jax.tree.map(lambda x: jnp.sum(x, 0), sums)
    return lax.pmean(jax.tree.map(lambda x: x / spec.num_microbatches, sums), AXIS_NAME)


def _search(
    spec: StepSpec,
    state: TrainState,
    grads: Any,
    sums: dict[str, jax.Array],
    batch: Batch,
    given: jax.Array,
) -> tuple[Any, Any, jax.Array]:
    """New parameters and optimizer state, and the step size, searched for on the batch.

    The direction is the optimizer's with a learning rate of 1, and what is to fall is what it minimises:
    the loss and the penalty of weight decay. Where the next search begins is kept as the optimizer's
    learning rate.
    """
    coefficient, decayed = spec.weight_decay
    penalty = functools.partial(optimizers.penalty, weight_decay=coefficient, decayed=decayed)

    def objective(params):
        return batch_loss(spec, state, batch, params) + penalty(params)

    def with_penalty(grads, params):
        return jax.tree.map(jnp.add, grads, jax.grad(penalty)(params))

    [last] = optimizers.learning_rates(state.opt_state)
    start = jnp.where(state.step == 0, given, last * given)
    opt_state = optimizers.with_learning_rate(state.opt_state, jnp.ones_like(start))
    direction, opt_state = spec.optimizer.update(grads, opt_state, state.params)
    grads = with_penalty(grads, state.params)
    slope = gradient_statistics.inner_product(grads, direction)
    size, is_found, following = line_search.armijo(objective, state.params, direction, slope, start)
    step = jax.tree.map(lambda d: size * d, direction)
    params = optax.apply_updates(state.params, step)
    if spec.rule == 'barzilai_borwein':
        there = with_penalty(batch_gradient(spec, state.replace(params=params), batch), params)
        change = jax.tree.map(jnp.subtract, there, grads)
        noise = sums['variance'] / spec.batch_size / gradient_statistics.squared_norm(grads)
        noise = jnp.where(spec.fraction < 1, noise, 0.0)
        curved = line_search.barzilai_borwein(step, change, size, noise, spec.fraction)
        following = jnp.where(is_found, curved, following)
    return params, optimizers.with_learning_rate(opt_state, following), size


def _statistics(spec: StepSpec, grads: Any, groups: Any, squared_norms: Any) -> dict[str, jax.Array]:
    """What the gradients say, before the optimizer does anything to them; see ``train_step``.

    With variance reduction they are the corrected ones, and say how much noise is left.

    Args:
      spec: the step's shape.
      grads: the mean gradient of the batch.
      groups: sums of this device's gradients, over groups of microbatches where there are several.
      squared_norms: sum over the microbatches of all devices.
    """
    devices, n = lax.axis_size(AXIS_NAME), spec.num_microbatches
    if spec.statistics == 'norms':
        q, m = squared_norms / (n * devices), gradient_statistics.squared_norm(grads)
        found = gradient_statistics.estimate(q, m, n * devices, spec.batch_size / (n * devices))
        return {'variance': found.variance, 'squared_gradient': found.squared_gradient}
    if spec.statistics == 'inner_products':
        k = spec.num_groups
        means = jax.tree.map(lambda x, g: x.reshape(k, *g.shape) * (k / n), groups, grads)
        size = spec.batch_size / (k * devices)
        found, along = gradient_statistics.inner_products(means, grads, size, AXIS_NAME)
        return found._asdict() | {'variance_along': along}
    return {}


def _moments(opt_state: Any) -> list[Any]:
    """What of an optimizer's state may overflow where gradients and weights do not.

    The squares of Adam and its kin, whose weights would never move again; a momentum buffer does not,
    since the weights move by it.
    """

    def is_buffer(x):
        return isinstance(x, optax.TraceState)

    return [x for x in jax.tree.leaves(opt_state, is_leaf=is_buffer) if not is_buffer(x)]


def _all_finite(tree: Any) -> jax.Array:
    """Whether all floating-point numbers are, in few operations.

    A check for each array would take a tenth of a model's compilation, and on a GPU many of the kernels
    that a small update consists of, which could not write weights in place where a check reads them too.
    Large ones have one each all the same, since a copy of them would take more time than that.
    """
    arrays = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    arrays = lax.optimization_barrier(arrays)
    large = [x for x in arrays if x.size > _LARGE]
    small = [jnp.ravel(x) for x in arrays if x.size <= _LARGE]
    checked = [*large, jnp.concatenate(small)] if small else large
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in checked]))


def eval_step(spec: StepSpec, variables: dict[str, Any], batch: Batch) -> dict[str, jax.Array]:
    """Sums of ``loss``, ``correct`` and ``count`` over the examples whose ``mask`` is 1."""
    logits = spec.model.apply(variables, spec.normalize(batch['image']), train=False)
    return lax.psum(_sums(spec, logits, batch['label'], batch['mask']), AXIS_NAME)
