r"""Gradients with less noise: practical SVRG, SAGA and DynaSAGA, as pure functions.

With ``g(w)`` the mean gradient of a minibatch at the weights w, over its examples i:

    SVRG     d = g(w) - g(s) + mu             s: a snapshot of the weights, mu: mean gradient of a large
                                              batch B at s, both renewed now and then
    mixed    only the examples in B get the correction; the others count with ``f_i'(w)`` alone
    SAGA     d = mean_i (f_i'(w) - a_i) + a   a_i: the last gradient seen of example i, a: their mean

Johnson and Zhang, "Accelerating Stochastic Gradient Descent using Predictive Variance Reduction", 2013;
Babanezhad, Ahmed, Virani, Schmidt, Konecny and Sallinen, "Stop Wasting My Gradients: Practical SVRG",
2015: batches B that grow, and the mixed form; Defazio, Bach and Lacoste-Julien, "SAGA: A Fast
Incremental Gradient Method", 2014; Daneshmand, Lucchi and Hofmann, "Starting Small: Learning with
Adaptive Sample Sizes", 2016: SAGA on a sample that grows (``input_pipeline.order.growing_sample``).

Of SVRG, with a batch B that is not all of the data, d is biased by the difference of the two means, and
its noise vanishes as w approaches s; the mixed form is unbiased whatever B is, and keeps the noise of
the examples outside B. Weight decay stays outside: the optimizer adds it exactly. What differs from one
evaluation of a gradient to the next, such as crops, dropout and BatchNorm's statistics, has to be the
same for ``f_i'(w)`` and ``f_i'(s)``: both are taken of the same images, with the same random key, and
with running statistics, which are estimated anew on B at each snapshot and then stay as they are. Only
mu is of the crops and the dropout of the snapshot's own moment: with those the mixed form is unbiased
but for what they make of mu.
"""

import bisect
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from adabatch_jax import losses

MOST_SNAPSHOTS = 100_000  # of a run
Reduced = dict[str, Any]  # what variance reduction keeps in the train state
Predict = Callable[[Any, Any], tuple[jax.Array, 'Outputs']]  # of parameters and a microbatch: logits


class Outputs(NamedTuple):
    """What a model gives for a microbatch.

    Attributes:
      logits: ``[n, classes]``.
      labels: int32 ``[n]``.
      batch_stats: BatchNorm's running statistics after it.
      sums: of the metrics over its examples.
    """

    logits: jax.Array
    labels: jax.Array
    batch_stats: Any
    sums: dict[str, jax.Array]


def _gradient(predict: Predict, loss: losses.Loss) -> Callable:
    """Of (parameters, microbatch, weights): that of the weighted sum of losses over their number."""

    def mean(params, microbatch, weights):
        logits, outputs = predict(params, microbatch)
        return jnp.mean(weights * loss(logits, outputs.labels)), outputs

    return jax.grad(mean, has_aux=True)


def real_examples(microbatch: tuple[jax.Array, dict]) -> tuple[jax.Array, dict]:
    """A microbatch of a snapshot, in which a complement stands for an example that only fills it up."""
    number, examples = microbatch
    index = examples['example']
    return number, {**examples, 'example': jnp.where(index >= 0, index, ~index)}


# ------------------------------------------------------------------------------------ SVRG


@dataclasses.dataclass(frozen=True)
class Svrg:
    """SVRG with snapshots on batches of any size.

    Attributes:
      num_examples: N, of the data set.
      mixed: whether examples outside of the snapshot's batch count with their own gradient alone.
      skip: whether snapshots leave out examples whose gradient was zero several times in a row.
      estimator: the model with BatchNorm in training mode, to estimate running statistics; None for a
        model without BatchNorm.
      momentum: of its running statistics.
    """

    num_examples: int
    mixed: bool = False
    skip: bool = False
    estimator: Any = None
    momentum: float = 0.0

    def init(self, params: Any, num_classes: int) -> Reduced:
        """Before the first snapshot."""
        counters = ('zeros_in_a_row', 'skips_left') if self.skip else ()
        return {
            'params': jax.tree.map(jnp.zeros_like, params),
            'gradient': jax.tree.map(jnp.zeros_like, params),
            'number': jnp.full((), -1, jnp.int32),  # of the last snapshot
            'in_batch': jnp.zeros(self.num_examples, bool),
            'skipped': jnp.zeros(self.num_examples, bool),
            'evaluations': jnp.zeros((), jnp.uint32),  # of gradients of single examples
            **{name: jnp.zeros(self.num_examples, jnp.int32) for name in counters},
        }

    def gradient(
        self, predict: Predict, loss: losses.Loss, state: Any, microbatches: Any, axis_name: str
    ) -> Callable:
        """The corrected mean gradient of a microbatch, and what comes with it.

        Args:
          predict: of (parameters, microbatch); gives logits and ``Outputs``.
          loss: of each example, such as those of ``losses.LOSSES``.
          state: the train state.
          microbatches: of this device, along a leading axis.
          axis_name: of the mapped devices.

        Returns:
          A function of (parameters, microbatch) that gives the gradient, ``Outputs``, and what ``after``
          takes.
        """
        gradient, reduced = _gradient(predict, loss), state.reduction

        def corrected(params, microbatch):
            index = microbatch[1]['example']
            grads, outputs = gradient(params, microbatch, jnp.ones(len(index)))
            belongs = reduced['in_batch'][index] if self.mixed else jnp.ones(len(index), bool)
            known = (belongs & ~reduced['skipped'][index]).astype(jnp.float32)
            there, _ = gradient(reduced['params'], microbatch, known)
            share = jnp.mean(belongs.astype(jnp.float32))
            grads = jax.tree.map(
                lambda here, there, mean: here - there + share * mean, grads, there, reduced['gradient']
            )
            return grads, outputs, len(index) + jnp.sum(known)

        return corrected

    def after(self, reduced: Reduced, found: Any, axis_name: str) -> Reduced:
        """After an update, from what ``gradient`` gave for its microbatches, stacked."""
        evaluations = lax.psum(jnp.sum(found), axis_name).astype(jnp.uint32)
        return {**reduced, 'evaluations': reduced['evaluations'] + evaluations}

    def statistics(self, moved: Any, before: Any, count: jax.Array) -> Any:
        """Running statistics as the mean over ``count`` parts of a batch, of which one more is known.

        Args:
          moved: what BatchNorm made of ``before``.
          before: the mean over ``count - 1`` parts; anything for the first.
          count: 1 for the first.
        """

        def mean(moved, before):
            of_part = before + (moved - before) / (1 - self.momentum)
            return before + (of_part - before) / count

        return jax.tree.map(mean, moved, before)

    def snapshot(
        self, predict: Predict, loss: losses.Loss, state: Any, batch: Any, axis_name: str
    ) -> Reduced:
        """Adds a part of a batch to a snapshot of the state's weights, or begins one with it.

        Args:
          predict: as in ``gradient``.
          loss: the same.
          state: the train state.
          batch: microbatches of this device along a leading axis, with ``first``, whether the part is
            the first; ``number`` of the snapshot; its ``size``, the examples of the batch; ``in_batch``
            and ``skipped``, bool ``[N]``. The complement of an index stands for an example that only
            fills the part up.
          axis_name: of the mapped devices.
        """
        reduced, first, microbatches = dict(state.reduction), batch['first'], batch['microbatches']
        gradient = _gradient(predict, loss)

        def add(total, microbatch):
            index = microbatch[1]['example']
            weights = (index >= 0).astype(jnp.float32)
            grads, outputs = gradient(state.params, real_examples(microbatch), weights)
            total = jax.tree.map(lambda t, g: t + len(index) * g, total, grads)
            slopes = losses.residuals(loss, outputs.logits, outputs.labels)
            return total, (index, jnp.all(slopes == 0, -1))

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        total, (index, is_zero) = lax.scan(add, zeros, microbatches)
        total = lax.psum(total, axis_name)
        before = jax.tree.map(lambda x: jnp.where(first, 0.0, x), reduced['gradient'])
        reduced['gradient'] = jax.tree.map(lambda x, t: x + t / batch['size'], before, total)
        reduced['params'] = state.params
        reduced |= {name: batch[name] for name in ('number', 'in_batch', 'skipped')}
        count = lax.psum(jnp.sum(index >= 0), axis_name).astype(jnp.uint32)
        reduced['evaluations'] = reduced['evaluations'] + count
        if self.skip:
            left = reduced['skips_left'] - (first & batch['skipped'])
            index, is_zero = (lax.all_gather(x.ravel(), axis_name, tiled=True) for x in (index, is_zero))
            zeros = jnp.where(is_zero, reduced['zeros_in_a_row'][index] + 1, 0)
            index = jnp.where(index >= 0, index, self.num_examples)  # dropped
            reduced['zeros_in_a_row'] = reduced['zeros_in_a_row'].at[index].set(zeros, mode='drop')
            reduced['skips_left'] = left.at[index].set(evaluations_to_skip(zeros), mode='drop')
        return reduced


def evaluations_to_skip(zeros_in_a_row: jax.Array) -> jax.Array:
    """``2^max(0, k - 2)`` after k gradients of zero in a row, 0 after another one; int32.

    Babanezhad et al., 2015, with hinge losses in mind, whose gradient is zero beyond the margin.
    """
    doubled = 2 ** jnp.clip(zeros_in_a_row - 2, 0, 30)
    return jnp.where(zeros_in_a_row > 0, doubled, 0).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Snapshots:
    """When SVRG takes snapshots, and of how many examples; plain numbers.

    Attributes:
      num_examples: N, of the data set.
      passes: from one to the next, in units of its batch: small ones are soon replaced.
      first_size: examples of the first.
      growth_factor: of the size, from one to the next.
      error_decay: rho; above 0 the sizes are those with which the error of mu falls by rho from one to
        the next, instead.
      rungs: the sizes that there are, sorted; a size is rounded up to one of them.
    """

    num_examples: int
    passes: float
    first_size: int
    growth_factor: float
    error_decay: float
    rungs: tuple[int, ...]

    def number(self, examples_seen: int) -> int:
        """Of the snapshot that an update at a position goes by, from 0."""
        number, last = bisect.bisect(self._starts, examples_seen) - 1, len(self._starts) - 1
        if number < last:
            return number
        return last + (examples_seen - self._starts[last]) // self._interval(last)

    @functools.cached_property
    def _starts(self) -> list[int]:
        """Where snapshots begin to be gone by, up to the first of all the data."""
        starts = [0]
        while self.size(number := len(starts) - 1) < self.num_examples:
            starts.append(starts[-1] + self._interval(number))
            if len(starts) > MOST_SNAPSHOTS:
                raise ValueError(
                    f'growth_factor: got {self.growth_factor} with error_decay {self.error_decay} and '
                    f'first_size {self.first_size}: snapshots hold all the data after more than '
                    f'{MOST_SNAPSHOTS:,} only; let them grow faster'
                )
        return starts

    def _interval(self, number: int) -> int:
        """Examples from a snapshot to the next."""
        return max(1, round(self.passes * self.size(number)))

    def wanted(self, number: int) -> float:
        """The size of a snapshot before rounding.

        ``B_0 growth^s``; or, since the variance of a mean drawn without replacement is ``S^2 / B
        (1 - B / N)``, the B for which that has fallen to ``rho^(2 s)`` of the first one (Babanezhad et
        al., 2015): ``N r / (r + N rho^(2 s))`` with ``r = N B_0 / (N - B_0)``.
        """
        n, first = self.num_examples, self.first_size
        if first >= n:
            return n
        if self.error_decay:
            ratio = n * first / (n - first)
            return n * ratio / (ratio + n * self.error_decay ** (2 * number))
        doublings = number * math.log(self.growth_factor)
        return n if doublings > math.log(n / first) else first * self.growth_factor**number

    def size(self, number: int) -> int:
        """Examples of a snapshot."""
        wanted = self.wanted(number) * (1 - 1e-12)  # powers are not exact
        fitting = (rung for rung in self.rungs if wanted <= rung < self.num_examples)
        return next(fitting, self.num_examples)

    def batch(self, seed: int, number: int) -> np.ndarray:
        """Which examples, int64 ``[size]``: a random part of the data set, without replacement."""
        order = np.random.default_rng((seed, number, 1)).permutation(self.num_examples)
        return order[: self.size(number)]


# ------------------------------------------------------------------------------------ SAGA


@dataclasses.dataclass(frozen=True)
class Saga:
    """SAGA for models whose logits are linear in the weights.

    There the gradient of an example is its features times the derivative of its loss by its logits, so
    that one number for each class is all that has to be kept of it.

    An example that is seen for the first time has no ``a_i``. Its present gradient is taken for it, so
    that it adds to the mean and brings no noise. With 0 instead it would count beside a mean that stands
    for all examples already; where every second example is new, as in DynaSAGA, the noise is then that
    of SGD until all are seen.

    Attributes:
      num_examples: N, of the data set.
      from_zero: whether ``a_i`` is 0 for an example that is seen for the first time.
    """

    num_examples: int
    from_zero: bool = False

    def init(self, params: Any, num_classes: int) -> Reduced:
        """Nothing has been seen: the mean is over those examples that were."""
        return {
            'memory': jnp.zeros((self.num_examples, num_classes)),
            'seen': jnp.zeros(self.num_examples, bool),
            'sum': jax.tree.map(jnp.zeros_like, params),
        }

    def gradient(
        self, predict: Predict, loss: losses.Loss, state: Any, microbatches: Any, axis_name: str
    ) -> Callable:
        """As ``Svrg.gradient``."""
        reduced = state.reduction
        index = lax.all_gather(microbatches[1]['example'].ravel(), axis_name, tiled=True)
        times = jnp.zeros(self.num_examples).at[index].add(1.0)  # that an example is in the batch
        seen = jnp.ones_like(reduced['seen']) if self.from_zero else reduced['seen']

        def slopes(params, microbatch):
            _, to_params, outputs = jax.vjp(lambda p: predict(p, microbatch), params, has_aux=True)
            return losses.residuals(loss, outputs.logits, outputs.labels), to_params, outputs

        def add_new(total, microbatch):
            here, to_params, _ = slopes(state.params, microbatch)
            index = microbatch[1]['example']
            of_new = to_params(here * jnp.where(seen[index], 0.0, 1 / times[index])[:, None])[0]
            return jax.tree.map(jnp.add, total, of_new), None

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        new = jnp.sum((times > 0) & ~seen)
        of_new = lax.cond(new > 0, lambda: lax.scan(add_new, zeros, microbatches)[0], lambda: zeros)
        count = jnp.maximum(1, jnp.sum(reduced['seen']) + new)
        mean = jax.tree.map(lambda x, y: (x + lax.psum(y, axis_name)) / count, reduced['sum'], of_new)

        def corrected(params, microbatch):
            index = microbatch[1]['example']
            here, to_params, outputs = slopes(params, microbatch)
            change = here - reduced['memory'][index]
            known = to_params(change * seen[index][:, None] / len(index))[0]
            share = 1 / times[index][:, None]
            found = {'example': index, 'memory': here * share, 'sum': to_params(change * share)[0]}
            return jax.tree.map(jnp.add, known, mean), outputs, found

        return corrected

    def after(self, reduced: Reduced, found: Any, axis_name: str) -> Reduced:
        """After an update, from what ``gradient`` gave for its microbatches, stacked."""
        index, memory = (
            lax.all_gather(x.reshape(-1, *x.shape[2:]), axis_name, tiled=True)
            for x in (found['example'], found['memory'])
        )
        return {
            'memory': reduced['memory'].at[index].set(0.0).at[index].add(memory),
            'seen': reduced['seen'].at[index].set(True),
            'sum': jax.tree.map(
                lambda total, change: total + lax.psum(jnp.sum(change, 0), axis_name),
                reduced['sum'],
                found['sum'],
            ),
        }
