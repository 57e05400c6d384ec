"""Compiled steps, and their cache by what shapes them."""

import concurrent.futures
import dataclasses
import functools
import os
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adabatch_jax import compilation_cache, malloc, optimizers, train_state
from adabatch_jax.steps.pure import (
    accumulate,
    apply_gradients,
    estimate_statistics,
    eval_step,
    snapshot,
    train_step,
    train_steps,
    zero_totals,
)
from adabatch_jax.steps.spec import AXIS_NAME, StepSpec


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


MOST_STEPS = 16  # that a ``StepCache`` keeps
# With them XLA's CPU backend compiles a small network in half the time. It makes machine code of a
# fusion without MLIR, a whole context of which it would set up for each; newer versions cannot any more.
# And LLVM does not unroll loops. Steps were seen from as fast as before to an eighth slower.
_QUICK = {'xla_cpu_use_fusion_emitters': False, 'xla_backend_optimization_level': 1}
# What makes the initial weights is as fast, and compiles in less than half the time.
_FOR_ONE_USE = {'xla_backend_optimization_level': 2}


def for_one_use() -> tuple[jax.Device | None, dict[str, Any]]:
    """For which device, and with which options, code that runs once is compiled soonest: for a CPU.

    A GPU's compiler took 22 s for the initial weights of ResNet-50, and one CPU core takes 5. Where JAX
    has no CPU, it is the default device, None.
    """
    try:
        return jax.local_devices(backend='cpu')[0], _unless_set(_FOR_ONE_USE)
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        return None, {}


def _unless_set(options: dict[str, Any]) -> dict[str, Any]:
    """Compiler options without those that the environment sets."""
    flags = os.environ.get('XLA_FLAGS', '')
    return {name: value for name, value in options.items() if name not in flags}


def _compile(spec, shapes, fn, in_axes, out_axes=None, donate=()):
    """Compiles ``fn`` mapped over all devices, for arguments of some shapes."""
    step = jax.pmap(fn, AXIS_NAME, in_axes=in_axes, out_axes=out_axes, donate_argnums=donate)
    # Abstract values: with several processes pmap takes everything else for arrays of this process.
    shapes = jax.tree.map(lambda x: jax.core.ShapedArray(x.shape, x.dtype), shapes)
    lowered = step.lower(*shapes)
    options = _unless_set(_QUICK) if spec.quick and jax.default_backend() == 'cpu' else {}
    while True:
        try:
            return lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            unknown = re.search("No such compile option: '(.*?)'", str(error))
            if not unknown:
                raise
            options = {k: value for k, value in options.items() if k != unknown[1]}


def batch_shapes(spec: StepSpec) -> dict[str, Any]:
    """The shapes of a step's batch, or of one part of it, over all devices.

    Every array has a leading axis of devices, but for ``data``, of which each device has all.
    """
    devices = jax.device_count()
    per_device = spec.batch_size // devices // spec.num_parts

    def shape(dtype, *dims):
        return jax.ShapeDtypeStruct((devices, *_updates(spec), per_device, *dims), dtype)

    if spec.train and spec.load:
        data = spec.load.data_shapes()
        return {'example': shape(jnp.int32), 'epoch': shape(jnp.int32), 'data': data}
    batch = {'image': shape(jnp.uint8, *spec.image_shape), 'label': shape(jnp.int32)}
    return batch if spec.train else {**batch, 'mask': shape(jnp.float32)}


def _updates(spec: StepSpec) -> tuple[int, ...]:
    """The axis of several updates at once, if there is one."""
    return (spec.num_updates,) if spec.num_updates > 1 else ()


def _shapes(spec: StepSpec) -> tuple:
    """The shapes of a step's arguments; of the batch those of one part."""
    state = jax.eval_shape(
        lambda: train_state.create(
            spec.model, spec.optimizer, spec.image_shape, reduction=spec.reduction
        )
    )
    if not spec.train:
        return state.variables, batch_shapes(spec)
    _check_optimizer(spec, state.opt_state)
    scalars = (jax.ShapeDtypeStruct(_updates(spec), dtype) for dtype in (jnp.float32, jnp.uint32))
    return state, batch_shapes(spec), *scalars


def _check_optimizer(spec: StepSpec, opt_state: Any) -> None:
    """Refuses an optimizer that a step cannot give a learning rate, or whose state cannot be saved."""
    rates, leaves = optimizers.learning_rates(opt_state), jax.tree.leaves(opt_state)
    if not rates:
        has = 'no learning_rate'
    elif not all(isinstance(rate, jax.ShapeDtypeStruct) for rate in rates):
        has = 'a schedule'
    elif others := [rate.dtype for rate in rates if rate.dtype != jnp.float32]:
        has = f'a learning_rate of {others[0]}'
    elif spec.rule != 'schedule' and len(rates) > 1:
        has = f'{len(rates)} learning rates where the rule {spec.rule!r} finds one'
    elif any(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in leaves):
        has = 'random keys'
    else:
        return
    raise ValueError(
        f'optimizer: got one whose state has {has}; accepted: of optimizers.create, or '
        'optax.inject_hyperparams(optax.sgd)(learning_rate=jnp.float32(0.0))'
    )


def _batch_axes(spec: StepSpec):
    """Which axis of a batch's arrays is that of the devices; every device has all the data."""
    return {'example': 0, 'epoch': 0, 'data': None} if spec.train and spec.load else 0


class AccumulatingStep:
    """A train step whose batch comes in parts: the host adds them up, then the update is made.

    It takes an iterable of parts in place of the batch, and asks for a part only when the one before
    the last is done, so that memory holds a few parts however many there are.

    Attributes:
      waited: seconds that the devices waited for parts of the last batch.
    """

    waited = 0.0

    def __init__(self, spec: StepSpec):
        state, batch, *scalars = _shapes(spec)
        index = jax.ShapeDtypeStruct((), jnp.int32)
        totals = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((jax.device_count(), *x.shape), x.dtype),
            jax.eval_shape(functools.partial(zero_totals, spec), state),
        )

        def add(state, totals, batch, first_microbatch):
            totals, _ = accumulate(spec, state, totals, batch, first_microbatch)
            return totals, totals[2]['count'] + 0  # a copy to wait for: the totals are given away

        def zero(state, _):  # pmap wants an axis to map
            return zero_totals(spec, state)

        devices = jax.ShapeDtypeStruct((jax.device_count(),), jnp.int32)
        apply = functools.partial(apply_gradients, spec)
        self._zero = _compile(spec, (state, devices), zero, (None, 0), 0)
        self._add = _compile(spec, (state, totals, batch, index), add, (None, 0, 0, None), 0, donate=1)
        self._apply = _compile(spec, (state, totals, *scalars), apply, (None, 0, None, None), donate=0)
        of_device, of_index = (step.input_shardings[0][-1] for step in (self._zero, self._add))
        self._devices = _put(np.arange(jax.device_count(), dtype=np.int32), of_device)
        microbatches = spec.num_microbatches // spec.num_parts
        self._first = [_put(np.int32(k * microbatches), of_index) for k in range(spec.num_parts)]
        self.memory_bytes = max(_memory_bytes(step) for step in (self._add, self._apply))

    def __call__(self, state, parts, learning_rate, examples_seen):
        totals, before, self.waited = self._zero(state, self._devices), None, 0.0
        asked = time.perf_counter()
        for part, first_microbatch in zip(parts, self._first, strict=True):
            if totals[2]['count'].is_ready():  # else the devices have been at work meanwhile
                self.waited += time.perf_counter() - asked
            totals, done = self._add(state, totals, part, first_microbatch)
            jax.block_until_ready(before)
            before, asked = done, time.perf_counter()
        return self._apply(state, totals, learning_rate, examples_seen)


class SnapshotStep:
    """Takes a snapshot for variance reduction, part by part of its batch.

    A part has as many examples as the batches of a stage, so that the snapshots of a stage are made by
    one executable, of whatever size they are. The host waits for each: of many that wait for one
    another, the devices of a CPU may begin different ones, and then wait for ever.
    """

    def __init__(self, spec: StepSpec):
        state, batch, *_ = _shapes(spec)
        of_examples = jax.ShapeDtypeStruct((spec.reduction.num_examples,), bool)
        about = {
            'number': jax.ShapeDtypeStruct((), jnp.int32),
            'first': jax.ShapeDtypeStruct((), bool),
            'size': jax.ShapeDtypeStruct((), jnp.float32),
            'in_batch': of_examples,
            'skipped': of_examples,
        }
        axes = (None, _batch_axes(spec), None)
        compile_ = functools.partial(_compile, spec, in_axes=axes, donate=0)
        self._add = compile_((state, batch, about), functools.partial(snapshot, spec))
        self._estimate = None
        if spec.reduction.estimator is not None:
            count = jax.ShapeDtypeStruct((), jnp.float32)
            estimate = functools.partial(estimate_statistics, spec)
            self._estimate = compile_((state, batch, count), estimate)
        self.memory_bytes = max(_memory_bytes(step) for step in (self._add, self._estimate) if step)

    def estimate(self, state, parts, put):
        """The state with running statistics of BatchNorm over some parts, if the model has any."""
        for k, part in enumerate(parts if self._estimate else (), 1):
            state = jax.block_until_ready(self._estimate(state, part, put(np.float32(k))))
        return state

    def __call__(self, state, parts, about, put):
        """The state with a snapshot from parts; ``about`` it, see ``Svrg.snapshot``."""
        about = put(about)
        for k, part in enumerate(parts):
            given = {**about, 'first': put(np.bool_(k == 0))}
            state = jax.block_until_ready(self._add(state, part, given))
        return state


def _put(value: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array | np.ndarray:
    """An argument of a compiled step on its devices; none are named where the step has no use for it."""
    if sharding is None:
        return value
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def _memory_bytes(executable) -> int:
    """Memory of one device while an executable runs, 0 where that is not told."""
    if isinstance(executable, AccumulatingStep | SnapshotStep):
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
    with malloc.compiling():
        executable = _compile_spec(spec)
    hits, misses = (b - a for a, b in zip(before, compilation_cache.counts(), strict=True))
    memory_bytes = _memory_bytes(executable)
    seconds = time.perf_counter() - start
    return CompiledStep(executable, seconds, hits > 0 and misses == 0, memory_bytes)


def _compile_spec(spec: StepSpec) -> Callable:
    if not spec.train:
        return _compile(spec, _shapes(spec), functools.partial(eval_step, spec), (None, 0))
    if spec.snapshot:
        return SnapshotStep(spec)
    if spec.num_parts > 1:
        return AccumulatingStep(spec)
    updates = functools.partial(train_step if spec.num_updates == 1 else train_steps, spec)
    return _compile(spec, _shapes(spec), updates, (None, _batch_axes(spec), None, None), donate=0)


def compile_part(spec: StepSpec, part: Callable) -> Callable:
    """Compiles ``part(spec, state, batch)`` of a train step by itself, such as ``batch_gradient``."""
    state, batch, *_ = _shapes(spec)
    return _compile(spec, (state, batch), functools.partial(part, spec), (None, _batch_axes(spec)))


class StepCache:
    """Compiled steps by their spec, the last ones used; each is compiled on a background thread.

    One for the process (``CACHE``) is enough: a run that continues in the same process finds its steps
    there. A compiled step is mapped into memory in hundreds of pieces, of which Linux lets a process
    have 65,530: with some ninety steps of a ResNet-8 on the CPU XLA would crash. What is forgotten is
    still in the persistent cache.
    """

    def __init__(self, compile_step: Callable[[StepSpec], CompiledStep] = compile_step):
        self._compile_step = compile_step
        self._futures: dict[StepSpec, concurrent.futures.Future] = {}
        self._used: set[StepSpec] = set()
        self._lock = threading.Lock()
        self._executor = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix='compile')
        self.num_compiles = 0

    def _compile_or_forget(self, spec: StepSpec) -> CompiledStep:
        try:
            return self._compile_step(spec)
        except BaseException:
            with self._lock:  # what is raised holds all that those who wait for it have at hand
                self._futures.pop(spec, None)
            raise

    def precompile(self, spec: StepSpec) -> concurrent.futures.Future:
        """Starts compiling a step unless that has been done or has begun."""
        with self._lock:
            future = self._futures.pop(spec, None)
            if future is None:
                self.num_compiles += 1
                future = self._executor.submit(self._compile_or_forget, spec)
            self._futures[spec] = future  # at the end, as the last one used
            done = [s for s, f in self._futures.items() if f.done()]
            for oldest in done[: max(0, len(self._futures) - MOST_STEPS)]:
                del self._futures[oldest]
                self._used.discard(oldest)
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

    @property
    def is_compiling(self) -> bool:
        """Whether a step is compiled at present, or waits for that."""
        with self._lock:
            return not all(future.done() for future in self._futures.values())

    def cancel_waiting(self) -> None:
        """Gives up what has not begun to compile, so that a process need not wait for it to end."""
        with self._lock:
            self._futures = {s: f for s, f in self._futures.items() if not f.cancel()}

    def clear(self) -> None:
        """Forgets all steps."""
        with self._lock:
            for future in self._futures.values():
                future.cancel()
            self._futures, self._used = {}, set()


CACHE = StepCache()
