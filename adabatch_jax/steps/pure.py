"""Pure train and evaluation steps, as each device runs them inside a map over ``'batch'``."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import lax

from adabatch_jax import gradient_statistics
from adabatch_jax.train_state import TrainState

AXIS_NAME = 'batch'  # of the mapped devices
STATISTICS = ('', 'norms', 'inner_products')  # of the gradients of groups
MOST_GROUPS = 8  # of a device, whose gradients are kept for inner products
Totals = tuple[Any, Any, dict[str, jax.Array]]  # sums of gradients, of running statistics, of metrics


@dataclasses.dataclass(frozen=True)
class Normalize:
    """uint8 images to float32 with zero mean and unit variance for each channel, on the device.

    ``mean`` and ``std`` are in units of the stored pixel values.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: jax.Array) -> jax.Array:
        return (images.astype(jnp.float32) - jnp.array(self.mean)) / jnp.array(self.std)


@dataclasses.dataclass(frozen=True)
class StepSpec:
    """Everything that shapes a compiled step; two equal specs share one executable.

    The learning rate is not in it: it enters the step as an array.

    Attributes:
      model: linen module; compares by its fields, the dtype of its activations among them.
      optimizer: optax transformation with a ``learning_rate`` hyperparameter; compares by identity.
      normalize: what turns stored images into the model's input.
      image_shape: height, width, channels.
      batch_size: examples over all devices and microbatches.
      num_microbatches: sequential parts of one device's share.
      train: a train step, or else an evaluation step.
      num_parts: in how many parts the images of a train step's batch come to the devices, each of
        equally many microbatches.
      skip_non_finite: whether a train step leaves the weights as they are when the loss, the gradient or
        the new weights are not finite.
      statistics: one of ``STATISTICS``: none; ``'norms'``, of the gradients of all microbatches; or
        ``'inner_products'``, of groups of microbatches, at the memory of one gradient a group.
    """

    model: nn.Module
    optimizer: optax.GradientTransformation
    normalize: Callable[[jax.Array], jax.Array]
    image_shape: tuple[int, int, int]
    batch_size: int
    num_microbatches: int = 1
    train: bool = True
    num_parts: int = 1
    skip_non_finite: bool = False
    statistics: str = ''

    @property
    def num_groups(self) -> int:
        """The parts of one device's share whose gradients are kept apart."""
        n = self.num_microbatches
        if self.statistics != 'inner_products':
            return 1
        few = max(k for k in range(1, MOST_GROUPS + 1) if n % k == 0)
        return few if few > 1 else n


def _sums(logits, labels, mask):
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    correct = jnp.argmax(logits, axis=-1) == labels
    return {
        'loss': jnp.sum(losses * mask),
        'correct': jnp.sum(correct * mask),
        'count': jnp.sum(mask),
    }


def train_step(
    spec: StepSpec,
    state: TrainState,
    batch: dict[str, jax.Array],
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
      batch: this device's ``image`` ``[n, height, width, channels]`` and ``label`` ``[n]``; examples
        with the label -1 are left out.
      learning_rate: float32 scalar of this update.
      examples_seen: uint32 scalar, the clock after this update.

    Returns:
      The new state and the sums ``loss``, ``correct`` and ``count`` over the global batch, and
      ``non_finite``: 1 where the loss, the gradient or the new weights are not finite, else 0; with
      ``spec.statistics`` also ``variance`` and ``squared_gradient`` as in ``gradient_statistics``, and
      for inner products ``variance_along`` and ``squared_norm``.
    """
    totals = accumulate(spec, state, zero_totals(spec, state), batch, jnp.int32(0))
    return apply_gradients(spec, state, totals, learning_rate, examples_seen)


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
    batch: dict[str, jax.Array],
    first_microbatch: jax.Array,
) -> Totals:
    """Adds what a part of this device's share of a batch gives, microbatch by microbatch.

    ``first_microbatch``, an int32 scalar, is the number of microbatches in the parts before.
    """
    n = spec.num_microbatches // spec.num_parts
    update_key = jax.random.fold_in(state.rng, state.step)
    device_key = jax.random.fold_in(update_key, lax.axis_index(AXIS_NAME))
    microbatches = jax.tree.map(lambda x: x.reshape(n, -1, *x.shape[1:]), batch)

    def loss_fn(params, images, labels, key):
        variables = {'params': params, 'batch_stats': state.batch_stats}
        logits, mutated = spec.model.apply(
            variables,
            spec.normalize(images),
            train=True,
            mutable=['batch_stats'],
            rngs={'dropout': key},
        )
        sums = _sums(logits, labels, (labels >= 0).astype(jnp.float32))
        return sums['loss'] / len(labels), (mutated.get('batch_stats', {}), sums)

    def add(total, microbatch):
        index, images, labels = microbatch
        key = jax.random.fold_in(device_key, index)
        grads, (batch_stats, sums) = jax.grad(loss_fn, has_aux=True)(state.params, images, labels, key)
        if spec.statistics == 'norms':
            sums['squared_norms'] = gradient_statistics.squared_norm(grads)
        if spec.num_groups > 1:
            group = index * spec.num_groups // spec.num_microbatches
            gradient_sums = jax.tree.map(lambda x, y: x.at[group].add(y), total[0], grads)
        else:
            gradient_sums = jax.tree.map(jnp.add, total[0], grads)
        return (gradient_sums, *jax.tree.map(jnp.add, total[1:], (batch_stats, sums))), None

    parts = (first_microbatch + jnp.arange(n), microbatches['image'], microbatches['label'])
    return lax.scan(add, totals, parts)[0]


def apply_gradients(
    spec: StepSpec,
    state: TrainState,
    totals: Totals,
    learning_rate: jax.Array,
    examples_seen: jax.Array,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The update from the totals of all of a batch's microbatches; see ``train_step``."""
    grads, batch_stats, sums = totals
    n = spec.num_microbatches
    groups = grads
    if spec.num_groups > 1:
        grads = jax.tree.map(lambda x: jnp.sum(x, 0), groups)
    grads, batch_stats = jax.tree.map(lambda x: x / n, (grads, batch_stats))
    grads, batch_stats = lax.pmean((grads, batch_stats), AXIS_NAME)

    opt_state = optax.tree.set(state.opt_state, learning_rate=learning_rate)
    updates, opt_state = spec.optimizer.update(grads, opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    sums = lax.psum(sums, AXIS_NAME)
    sums |= _statistics(spec, grads, groups, sums.pop('squared_norms', None))
    finite = _all_finite((sums['loss'], grads, params, batch_stats))
    new, old = (params, batch_stats, opt_state), (state.params, state.batch_stats, state.opt_state)
    if spec.skip_non_finite:
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
    params, batch_stats, opt_state = new
    state = state.replace(
        step=state.step + 1,
        examples_seen=examples_seen,
        params=params,
        batch_stats=batch_stats,
        opt_state=opt_state,
    )
    return state, {**sums, 'non_finite': 1.0 - finite}


def _statistics(spec: StepSpec, grads: Any, groups: Any, squared_norms: Any) -> dict[str, jax.Array]:
    """What the gradients say, before anything is done to them; see ``train_step``.

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


def _all_finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))


def eval_step(
    spec: StepSpec, variables: dict[str, Any], batch: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """Sums of ``loss``, ``correct`` and ``count`` over the examples whose ``mask`` is 1."""
    logits = spec.model.apply(variables, spec.normalize(batch['image']), train=False)
    return lax.psum(_sums(logits, batch['label'], batch['mask']), AXIS_NAME)
