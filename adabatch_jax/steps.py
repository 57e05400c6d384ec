"""Pure train and evaluation steps, and the cache of compiled steps by batch size."""

import concurrent.futures
import dataclasses
import functools
import threading
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from adabatch_jax import compilation_cache, train_state
from adabatch_jax.train_state import TrainState

AXIS_NAME = 'batch'  # of the mapped devices
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
      ``non_finite``: 1 where the loss, the gradient or the new weights are not finite, else 0.
    """
    totals = accumulate(spec, state, zero_totals(state), batch, jnp.int32(0))
    return apply_gradients(spec, state, totals, learning_rate, examples_seen)


def zero_totals(state: TrainState) -> Totals:
    """The sums of gradients, running statistics and metrics before the first microbatch."""
    return (
        jax.tree.map(jnp.zeros_like, state.params),
        jax.tree.map(jnp.zeros_like, state.batch_stats),
        dict.fromkeys(('loss', 'correct', 'count'), jnp.zeros(())),
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
        part = (grads, batch_stats, sums)
        return jax.tree.map(jnp.add, total, part), None

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
    grads, batch_stats = jax.tree.map(lambda x: x / n, (grads, batch_stats))
    grads, batch_stats = lax.pmean((grads, batch_stats), AXIS_NAME)

    opt_state = optax.tree.set(state.opt_state, learning_rate=learning_rate)
    updates, opt_state = spec.optimizer.update(grads, opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    sums = lax.psum(sums, AXIS_NAME)
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


def _all_finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))


def eval_step(
    spec: StepSpec, variables: dict[str, Any], batch: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """Sums of ``loss``, ``correct`` and ``count`` over the examples whose ``mask`` is 1."""
    logits = spec.model.apply(variables, spec.normalize(batch['image']), train=False)
    return lax.psum(_sums(logits, batch['label'], batch['mask']), AXIS_NAME)


# ------------------------------------------------------------------------ compiled steps


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """An executable step and what it took to get it.

    Attributes:
      executable: call it with arrays of the step's shapes; a train step donates its state.
      compile_seconds: seconds of tracing and compiling.
      cache_hit: whether XLA had nothing to compile: the step was in the persistent cache, or in
        use in this process before.
      memory_bytes: memory of one device while the step runs: arguments, results and temporaries;
        0 where the backend does not tell.
    """

    executable: Callable
    compile_seconds: float
    cache_hit: bool
    memory_bytes: int

    def __call__(self, *args):
        return self.executable(*args)


def _pmap(fn, in_axes, out_axes=None, donate=()):
    return jax.pmap(fn, AXIS_NAME, in_axes=in_axes, out_axes=out_axes, donate_argnums=donate)


def _shapes(spec: StepSpec) -> tuple:
    """The shapes of a step's arguments; of the batch those of one part."""
    devices = jax.device_count()
    per_device = spec.batch_size // devices // spec.num_parts

    def shape(dtype, *dims):
        return jax.ShapeDtypeStruct((devices, per_device, *dims), dtype)

    batch = {'image': shape(jnp.uint8, *spec.image_shape), 'label': shape(jnp.int32)}
    state = jax.eval_shape(lambda: train_state.create(spec.model, spec.optimizer, spec.image_shape))
    if not spec.train:
        return state.variables, {**batch, 'mask': shape(jnp.float32)}
    scalars = (jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((), jnp.uint32))
    return state, batch, *scalars


class AccumulatingStep:
    """A train step whose batch comes in parts: the host adds them up, then the update is made.

    It takes an iterable of parts in place of the batch, and asks for a part only when the one before
    the last is done, so that memory holds a few parts however many there are.
    """

    def __init__(self, spec: StepSpec):
        state, batch, *scalars = _shapes(spec)
        index = jax.ShapeDtypeStruct((), jnp.int32)
        totals = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((jax.device_count(), *x.shape), x.dtype),
            jax.eval_shape(zero_totals, state),
        )

        def add(state, totals, batch, first_microbatch):
            totals = accumulate(spec, state, totals, batch, first_microbatch)
            return totals, totals[2]['count'] + 0  # a copy to wait for: the totals are given away

        zero = _pmap(lambda state, _: zero_totals(state), (None, 0), 0)  # pmap wants an axis to map
        add = _pmap(add, (None, 0, 0, None), 0, donate=1)
        apply = _pmap(functools.partial(apply_gradients, spec), (None, 0, None, None), donate=0)
        self._microbatches = spec.num_microbatches // spec.num_parts
        self._devices = np.arange(jax.device_count(), dtype=np.int32)
        self._zero = zero.lower(state, self._devices).compile()
        self._add = add.lower(state, totals, batch, index).compile()
        self._apply = apply.lower(state, totals, *scalars).compile()
        self.memory_bytes = max(_memory_bytes(step) for step in (self._add, self._apply))

    def __call__(self, state, parts, learning_rate, examples_seen):
        totals, before = self._zero(state, self._devices), None
        for k, part in enumerate(parts):
            totals, done = self._add(state, totals, part, np.int32(k * self._microbatches))
            jax.block_until_ready(before)
            before = done
        return self._apply(state, totals, learning_rate, examples_seen)


def _memory_bytes(executable) -> int:
    """Memory of one device while an executable runs, 0 where that is not told."""
    if isinstance(executable, AccumulatingStep):
        return executable.memory_bytes
    memory = executable.memory_analysis()
    if memory is None:
        return 0
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )


def compile_step(spec: StepSpec) -> CompiledStep:
    """Lowers and compiles a step ahead of time, without running it."""
    start = time.perf_counter()
    before = compilation_cache.counts()
    if not spec.train:
        step = _pmap(functools.partial(eval_step, spec), (None, 0))
    else:
        step = _pmap(functools.partial(train_step, spec), (None, 0, None, None), donate=0)
    in_parts = spec.num_parts > 1
    executable = AccumulatingStep(spec) if in_parts else step.lower(*_shapes(spec)).compile()
    hits, misses = (b - a for a, b in zip(before, compilation_cache.counts(), strict=True))
    memory_bytes = _memory_bytes(executable)
    seconds = time.perf_counter() - start
    return CompiledStep(executable, seconds, hits > 0 and misses == 0, memory_bytes)


class StepCache:
    """Compiled steps by their spec; each is compiled once, on a background thread.

    One for the process (``CACHE``) is enough: a run that continues in the same process finds its
    steps there.
    """

    def __init__(self, compile_step: Callable[[StepSpec], CompiledStep] = compile_step):
        self._compile_step = compile_step
        self._futures: dict[StepSpec, concurrent.futures.Future] = {}
        self._used: set[StepSpec] = set()
        self._lock = threading.Lock()
        self._executor = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix='compile')
        self.num_compiles = 0

    def precompile(self, spec: StepSpec) -> concurrent.futures.Future:
        """Starts compiling a step unless that has been done or has begun."""
        with self._lock:
            future = self._futures.get(spec)
            failed = future is not None and future.done() and future.exception() is not None
            if future is None or failed:
                self.num_compiles += 1
                future = self._futures[spec] = self._executor.submit(self._compile_step, spec)
            return future

    def get(self, spec: StepSpec) -> CompiledStep:
        """The step, waited for where necessary.

        The first call for a spec tells what compiling took; for later ones nothing was compiled.

        Raises:
          Exception: what compiling raised.
        """
        step = self.precompile(spec).result()
        with self._lock:
            if spec in self._used:
                return dataclasses.replace(step, compile_seconds=0.0, cache_hit=True)
            self._used.add(spec)
        return step

    def cancel_waiting(self) -> None:
        """Gives up what has not begun to compile, so that a process need not wait for it to end."""
        with self._lock:
            self._futures = {s: f for s, f in self._futures.items() if not f.cancel()}


CACHE = StepCache()
