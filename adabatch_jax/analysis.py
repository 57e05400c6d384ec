"""What the checkpoints of a run say of the minimum that it found: sharpness and curvature.

All of it on one fixed subset of the training split, without augmentation, with running BatchNorm
statistics and without dropout, on the first device, in float32 whatever the model's dtype is. Losses of
examples, and the gradients of batches, are added up in float64.
"""

import contextlib
import copy
import functools
import itertools
import json
import os
import pathlib
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from adabatch_jax import (
    checkpoint,
    compilation_cache,
    curvature,
    input_pipeline,
    metrics,
    optimizers,
    sharpness,
)
from adabatch_jax.config import ConfigError, user_errors
from adabatch_jax.experiment import Experiment, describe
from adabatch_jax.files import write_whole

FILE = metrics.ANALYSIS_FILE


class Loss:
    """The mean loss over fixed examples as a function of the parameters, and its derivatives.

    Args:
      experiment: of the run.
      batch_stats: the running statistics to use throughout.
      images: uint8 ``[n, height, width, channels]``.
      labels: int32 ``[n]``; examples with the label -1 are left out.
      batch_size: examples at once.
    """

    def __init__(self, experiment: Experiment, batch_stats: Any, images, labels, batch_size: int):
        self._count, size = int(np.sum(labels >= 0)), min(batch_size, len(labels))
        missing = -len(labels) % size
        images = np.concatenate([images, images[:missing]]).reshape(-1, size, *images.shape[1:])
        labels = np.concatenate([labels, np.full(missing, -1, np.int32)]).reshape(-1, size)
        self._batches = [tuple(map(jnp.asarray, batch)) for batch in zip(images, labels, strict=True)]
        self._batch_stats, spec = batch_stats, experiment.eval_spec
        model = spec.model.clone(dtype=jnp.float32)

        def outputs(images, batch_stats, params):
            variables = {'params': params, 'batch_stats': batch_stats}
            return model.apply(variables, spec.normalize(images), train=False)

        def of_outputs(labels, logits):
            each = spec.loss(logits, labels) * (labels >= 0)
            return jnp.sum(each), each

        def total(images, labels, batch_stats, params):
            return of_outputs(labels, outputs(images, batch_stats, params))

        def gauss_newton(images, labels, batch_stats, params, vector):
            def loss(z):
                return of_outputs(labels, z)[0]

            z = functools.partial(outputs, images, batch_stats)
            return curvature.gauss_newton_product(z, loss, params, vector)

        def hessian(images, labels, batch_stats, params, vector):
            def loss(params):
                return total(images, labels, batch_stats, params)[0]

            return curvature.hessian_product(loss, params, vector)

        self._value_and_grad = jax.jit(jax.value_and_grad(total, argnums=3, has_aux=True))
        self._hessian, self._gauss_newton = jax.jit(hessian), jax.jit(gauss_newton)

    def at(self, batch_stats: Any) -> 'Loss':
        """The same loss with other running statistics; nothing is compiled again."""
        other = copy.copy(self)
        other._batch_stats = batch_stats
        return other

    def _parts(self, function, *args) -> list:
        """A function of each batch, on the host."""
        with jax.default_matmul_precision('highest'):
            return [jax.device_get(function(*b, self._batch_stats, *args)) for b in self._batches]

    def _mean(self, parts: list) -> Any:
        """Of sums over the batches, in float64."""
        sums = jax.tree.map(lambda *x: np.sum(np.stack(x), 0, dtype=np.float64), *parts)
        return jax.tree.map(lambda x: x / self._count, sums)

    def value_and_grad(self, params: Any) -> tuple[float, Any]:
        """The loss, and a pytree of float64 arrays."""
        parts = self._parts(self._value_and_grad, params)
        each = np.concatenate([each for (_, each), _ in parts])
        return np.sum(each, dtype=np.float64) / self._count, self._mean([grads for _, grads in parts])

    def hessian_product(self, params: Any, vector: Any) -> Any:
        """``H v``, a pytree of float64 arrays."""
        return self._mean(self._parts(self._hessian, params, vector))

    def gauss_newton_product(self, params: Any, vector: Any) -> Any:
        """``J' H_z J v``, a pytree of float64 arrays."""
        return self._mean(self._parts(self._gauss_newton, params, vector))


def _sound(
    folder: pathlib.Path,
    steps: list[int],
    target: Any,
    report: Callable[[str], Any],
    check: Callable[[dict[str, Any]], Any],
) -> Iterator[tuple[int, Any, dict[str, Any]]]:
    """Step, state and host state of checkpoints, without those damaged or gone, unless all are."""
    num_sound = 0
    for step in steps:
        with user_errors('workdir'):
            try:
                state, host = checkpoint.restore(folder, step, target, check=check)
            except (checkpoint.Damaged, FileNotFoundError) as error:  # a run in progress removes some
                if step == steps[-1] and not num_sound:
                    raise
                report(f'warning: {error}; it is left out')
                continue
        num_sound += 1
        yield step, state, host


def _chosen(folder: pathlib.Path, which: str) -> list[int]:
    steps, best = checkpoint.steps(folder), checkpoint.best_step(folder)
    if which != 'all':
        steps = [step for step in (best if which == 'best' else max(steps, default=None),) if step]
    if not steps:
        raise ConfigError(f'workdir: no {"evaluated " * (which == "best")}checkpoint in {str(folder)!r}')
    return steps


def analyze(
    config,
    workdir: str | os.PathLike,
    which: str = 'all',
    report: Callable[[str], Any] = warnings.warn,
    progress: Callable[[str], Any] = lambda line: None,
) -> list[dict[str, Any]]:
    """Analyzes checkpoints of a work directory, and writes ``analysis.jsonl`` there.

    What an earlier analysis found is replaced when the first checkpoint is done.

    Args:
      config: the resolved config of the run; ``config.analysis`` says what to measure.
      workdir: the run's work directory.
      which: ``'all'``, ``'latest'`` or ``'best'``.
      report: takes a line about each of all that is damaged, or gone by then, and left out.
      progress: takes a line before each checkpoint.

    Returns:
      The records, from the oldest checkpoint to the latest.

    Raises:
      ConfigError: no run there, or one on other data, or no data.
    """
    compilation_cache.enable(config.compile.cache_dir)
    workdir = pathlib.Path(workdir).expanduser()
    experiment = describe(config, num_devices=1)  # which is the first
    folder = workdir / checkpoint.FOLDER
    steps = _chosen(folder, which)
    with user_errors('config.dataset'):
        images, labels = fixed_examples(experiment, config.analysis.num_examples)
    target, options = experiment.state_shapes, config.analysis
    loss = Loss(experiment, target.batch_stats, images, labels, options.batch_size)
    records, file = [], workdir / FILE
    for step, state, host in _sound(folder, steps, target, report, experiment.info.check):
        progress(f'checkpoint {steps.index(step) + 1} of {len(steps)}: update {step:,}')
        began = time.perf_counter()
        if not records:  # a folder that cannot be written to says so now, not after an hour
            _write(file, file.read_text(encoding='utf-8', errors='replace') if file.exists() else '')
        records.append(
            {
                'kind': 'analysis',
                'step': step,
                'epoch': experiment.clock.epoch(int(state.examples_seen)),
                'examples_seen': int(state.examples_seen),
                'batch_size': host['batch_size'],
                'num_examples': len(labels),
                **measure(loss.at(state.batch_stats), state.params, options),
                'seconds': time.perf_counter() - began,
            }
        )
        _write(file, _lines(records))
    if config.model.name == 'linear' and not experiment.info.is_encoded:
        optimum = minimum(experiment, *fixed_examples(experiment, experiment.info.num_train))
        if optimum is not None:
            records = [record | {'optimum': optimum} for record in records]
            _write(file, _lines(records))
    return records


def _write(file: pathlib.Path, text: str) -> None:
    with user_errors('workdir'):
        write_whole(file, text)


def _lines(records: list[dict[str, Any]]) -> str:
    return ''.join(f'{json.dumps(metrics.finite(record))}\n' for record in records)


def fixed_examples(experiment: Experiment, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of a random part of the training split, the same for every seed of a run."""
    config, n = experiment.config, experiment.info.num_train
    count = min(count, n)
    if not experiment.info.is_encoded:
        images, labels = input_pipeline.load_split(
            config.dataset, config.dataset.train_split, config.seed
        )
        chosen = np.random.default_rng(0).permutation(n)[:count]
        return images[chosen], labels[chosen]
    if jax.process_count() > 1:
        raise ConfigError('--num_processes: analyze takes images on disk in one process only')
    config = config.as_configdict()
    config.seed, config.dataset.augment = 0, 'none'
    pipeline = input_pipeline.create(config, experiment.info, experiment.clock)
    with contextlib.closing(pipeline):
        batches = itertools.islice(pipeline.train_batches(0, 1), count)
        images, labels = zip(*((b['image'][0], b['label'][0]) for b in batches), strict=True)
    return np.stack(images), np.stack(labels)


def measure(loss: Loss, params: Any, options) -> dict[str, Any]:
    """Sharpness and curvature at a point, as ``config.analysis`` says; fields of a record."""
    value, grads = loss.value_and_grad(params)
    found: dict[str, Any] = {
        'loss': float(value),
        'gradient_norm': float(np.linalg.norm(ravel_pytree(grads)[0])),
        'sharpness': [],
    }
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    for epsilon in options.epsilons:
        for dimensions in sorted({0, options.subspace if options.subspace < size else 0}):
            result = sharpness.sharpness(
                loss.value_and_grad, params, epsilon, options.iterations, dimensions
            )
            found['sharpness'].append(
                {'epsilon': epsilon, 'dimensions': dimensions or size, 'value': result}
            )
    products = {'hessian': loss.hessian_product, 'gauss_newton': loss.gauss_newton_product}
    for name, product in products.items():
        if options.lanczos_steps:
            at = functools.partial(product, params)
            eigenvalues = curvature.lanczos(at, params, options.lanczos_steps)
            shown = slice(options.eigenvalues)
            found[f'{name}_eigenvalues'] = eigenvalues.values[shown].tolist()
            found[f'{name}_residuals'] = eigenvalues.residuals[shown].tolist()
            found[f'{name}_smallest'] = float(eigenvalues.values[-1])
    if options.trace_samples:
        trace = curvature.trace(
            functools.partial(loss.hessian_product, params), params, options.trace_samples
        )
        found |= {'hessian_trace': trace.value, 'hessian_trace_error': trace.error}
    return found


def minimum(experiment: Experiment, images: np.ndarray, labels: np.ndarray) -> float | None:
    """The least value of a linear model's objective: its mean loss and SGD's term of weight decay.

    By L-BFGS in float64; None where the gradient does not come down to 1e-6.
    """
    from scipy import optimize

    spec, options = experiment.eval_spec, experiment.config.optimizer
    with jax.enable_x64(True):
        params = spec.model.init(jax.random.key(0), jnp.zeros((1, *spec.image_shape)), train=False)
        flat, unravel = ravel_pytree(jax.tree.map(np.float64, params['params']))
        normalized = np.asarray(spec.normalize(images), np.float64)
        x = normalized.reshape(len(images), -1)

        @jax.jit
        def objective(flat, x, labels):
            layer = unravel(flat)
            (dense,) = layer.values()
            values = spec.loss(x @ dense['kernel'] + dense['bias'], labels)
            return jnp.mean(values) + optimizers.penalty(layer, options.weight_decay, options.decayed)

        value_and_grad = jax.jit(jax.value_and_grad(objective))
        best = optimize.minimize(
            lambda w: jax.device_get(value_and_grad(w, x, labels)),
            np.asarray(flat),
            jac=True,
            method='L-BFGS-B',
            options={'maxiter': 100_000, 'maxfun': 200_000, 'gtol': 1e-12, 'ftol': 0.0, 'maxcor': 50},
        )
    return float(best.fun) if np.linalg.norm(best.jac) < 1e-6 else None
