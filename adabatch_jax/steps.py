"""Pure train and evaluation steps, and the cache of compiled steps by batch size."""

import concurrent.futures
import dataclasses
import os
import pathlib
import threading
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxlib
import optax
from jax import lax
from jax.experimental.compilation_cache import compilation_cache

from adabatch_jax import train_state
from adabatch_jax.train_state import TrainState

AXIS_NAME = 'batch'  # of the mapped devices


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
    """

    model: nn.Module
    optimizer: optax.GradientTransformation
    normalize: Callable[[jax.Array], jax.Array]
    image_shape: tuple[int, int, int]
    batch_size: int
    num_microbatches: int = 1
    train: bool = True


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
      The new state and the sums ``loss``, ``correct`` and ``count`` over the global batch.
    """
    n = spec.num_microbatches
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

    def accumulate(total, microbatch):
        index, images, labels = microbatch
        key = jax.random.fold_in(device_key, index)
        grads, (batch_stats, sums) = jax.grad(loss_fn, has_aux=True)(state.params, images, labels, key)
        part = (grads, batch_stats, sums)
        return jax.tree.map(jnp.add, total, part), None

    zeros = (
        jax.tree.map(jnp.zeros_like, state.params),
        jax.tree.map(jnp.zeros_like, state.batch_stats),
        dict.fromkeys(('loss', 'correct', 'count'), jnp.zeros(())),
    )
    parts = (jnp.arange(n), microbatches['image'], microbatches['label'])
    (grads, batch_stats, sums), _ = lax.scan(accumulate, zeros, parts)
    grads, batch_stats = jax.tree.map(lambda x: x / n, (grads, batch_stats))
    grads, batch_stats = lax.pmean((grads, batch_stats), AXIS_NAME)

    opt_state = optax.tree.set(state.opt_state, learning_rate=learning_rate)
    updates, opt_state = spec.optimizer.update(grads, opt_state, state.params)
    state = state.replace(
        step=state.step + 1,
        examples_seen=examples_seen,
        params=optax.apply_updates(state.params, updates),
        batch_stats=batch_stats,
        opt_state=opt_state,
    )
    return state, lax.psum(sums, AXIS_NAME)


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


def _mapped(spec: StepSpec):
    """The pmapped step and the shapes of its arguments."""
    devices = jax.device_count()
    per_device = spec.batch_size // devices

    def shape(dtype, *dims):
        return jax.ShapeDtypeStruct((devices, per_device, *dims), dtype)

    batch = {'image': shape(jnp.uint8, *spec.image_shape), 'label': shape(jnp.int32)}
    state = jax.eval_shape(lambda: train_state.create(spec.model, spec.optimizer, spec.image_shape))
    if not spec.train:
        fn = jax.pmap(
            lambda variables, batch: eval_step(spec, variables, batch),
            axis_name=AXIS_NAME,
            in_axes=(None, 0),
            out_axes=None,
        )
        return fn, (state.variables, {**batch, 'mask': shape(jnp.float32)})
    fn = jax.pmap(
        lambda *args: train_step(spec, *args),
        axis_name=AXIS_NAME,
        in_axes=(None, 0, None, None),
        out_axes=None,
        donate_argnums=0,
    )
    scalars = (jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((), jnp.uint32))
    return fn, (state, batch, *scalars)


def compile_step(spec: StepSpec) -> CompiledStep:
    """Lowers and compiles a step ahead of time, without running it."""
    start = time.perf_counter()
    before = _persistent_cache_counts()
    fn, shapes = _mapped(spec)
    executable = fn.lower(*shapes).compile()
    hits, misses = (b - a for a, b in zip(before, _persistent_cache_counts(), strict=True))
    memory = executable.memory_analysis()
    memory_bytes = 0
    if memory is not None:
        memory_bytes = (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes
        )
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


# --------------------------------------------------------------- persistent compilation cache

_counts = threading.local()


def _count_event(event: str, **_) -> None:
    for name in ('cache_hits', 'cache_misses'):
        if event == f'/jax/compilation_cache/{name}':
            setattr(_counts, name, getattr(_counts, name, 0) + 1)


jax.monitoring.register_event_listener(_count_event)


def _persistent_cache_counts() -> tuple[int, int]:
    """Hits and misses of the persistent cache on this thread so far."""
    return getattr(_counts, 'cache_hits', 0), getattr(_counts, 'cache_misses', 0)


def enable_persistent_cache(directory: str) -> None:
    """Keeps compiled code on disk from one process to the next.

    Args:
      directory: ``'auto'`` for ``~/.cache/adabatch_jax``, or the one that the environment variable
        ``JAX_COMPILATION_CACHE_DIR`` names; ``''`` for none. Each version of jaxlib has its own folder.
    """
    if directory == 'auto':
        if os.environ.get('JAX_COMPILATION_CACHE_DIR'):
            return
        home = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
        directory = os.path.join(home, 'adabatch_jax')
    if directory:
        directory = os.path.join(os.path.expanduser(directory), f'jaxlib-{jaxlib.__version__}')
    jax.config.update('jax_compilation_cache_dir', directory or None)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
    jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
    compilation_cache.reset_cache()  # it may have been opened elsewhere, by an earlier compilation
