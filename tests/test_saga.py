"""SAGA and DynaSAGA: which examples come, and their steps, against an independent reference."""

import jax
import numpy as np
import pytest
from test_variance_reduction import after_updates, bias, digits, features, points, slopes, weights

from adabatch_jax.config import resolve
from adabatch_jax.experiment import describe
from adabatch_jax.input_pipeline import order


def test_the_sample_grows_with_every_second_example_and_is_whole_at_2n_minus_1():
    n = 50
    sizes = order.sample_sizes(np.arange(2 * n + 3), n, 4)
    assert list(sizes[:12]) == [4] * 9 + [5, 5, 6]
    assert sizes[2 * n - 2] == n - 1 and sizes[2 * n - 1] == n and sizes[-1] == n


def test_the_sample_begins_with_two_examples_for_each_feature_where_there_are_as_many():
    for split, first in (('train', 128), ('train[:120]', 120)):
        experiment = describe(resolve(digits('dynasaga', dataset__train_split=split)))
        assert experiment.note.endswith(f'Sample: {first} examples at first.')


def test_the_doubling_sample_waits_for_two_passes():
    sizes = order.sample_sizes(np.arange(70), 50, 4, doubling=True)
    assert [int(np.argmax(sizes == size)) for size in (8, 16, 32, 50)] == [9, 17, 33, 65]


@pytest.mark.parametrize('first_size, doubling', [(4, False), (4, True), (50, False)])
def test_examples_come_from_the_sample_and_new_ones_at_once(first_size, doubling):
    n, count = 50, 400
    examples, _ = order.growing_sample(3, n, first_size, doubling, 0, count)
    rank = np.argsort(order.epoch_order(3, 0, n))[examples]
    sizes = order.sample_sizes(np.arange(count), n, first_size, doubling)
    assert (rank < sizes).all()
    grown = np.flatnonzero(np.diff(sizes, prepend=first_size))
    if not doubling:
        np.testing.assert_array_equal(rank[grown], sizes[grown] - 1)
    newest = np.delete(rank == sizes - 1, grown)
    assert newest[:50].mean() < 0.3  # between them from the whole sample
    later, _ = order.growing_sample(3, n, first_size, doubling, 130, 7)
    np.testing.assert_array_equal(later, examples[130:137])  # a function of the position alone
    counts = np.bincount(order.growing_sample(3, n, first_size, doubling, 10_000, 50_000)[0])
    assert counts.min() > 850 and counts.max() < 1150  # uniform at the end: 1000 +- 32


@pytest.mark.parametrize('from_zero', [False, True])
@pytest.mark.parametrize(
    'optimizer, batch_size, max_per_device', [('dynasaga', 8, 0), ('saga', 16, 0), ('saga', 16, 2)]
)
def test_saga_is_that_of_an_independent_reference(optimizer, batch_size, max_per_device, from_zero):
    """With examples that are in a batch twice, on two devices."""
    config = digits(optimizer, batch_size, optimizer__saga__from_zero=from_zero)
    config.batch.max_per_device = max_per_device
    config.optimizer.saga.first_size = 20
    experiment, states = after_updates(config, 40)
    x, labels = features(experiment)
    w = buffer = np.zeros((65, 10))
    memory, seen, twice = np.zeros((120, 10)), np.zeros(120, bool), 0
    for k, state in enumerate(states):
        index, _ = experiment.examples_at(k * batch_size, batch_size)
        twice += len(index) - len(set(index))
        s = slopes(w, x[index], labels[index])
        known = np.ones(batch_size, bool) if from_zero else seen[index]
        direction = x[index].T @ (known[:, None] * (s - memory[index])) / batch_size
        if from_zero:
            direction += x.T @ memory / max(1, seen.sum())
        memory[index[~known]], seen[index[~known]] = s[~known], True
        if not from_zero:
            direction += x.T @ memory / seen.sum()
        memory[index], seen[index] = s, True
        buffer = 0.9 * buffer + direction + 0.01 * w
        w = w - 0.02 * buffer
        np.testing.assert_allclose(weights(state), w, atol=5e-6)
    np.testing.assert_allclose(state.reduction['memory'], memory, atol=2e-6)
    assert twice


def test_a_full_memory_gives_the_exact_gradient_of_the_sample(tmp_path):
    """On quadratics: once every example was seen, a step from anywhere goes by the mean alone."""
    config, targets = points(tmp_path, 2, optimizer__name='saga')
    experiment, states = after_updates(config, 400)
    assert states[-1].reduction['seen'].all()
    x = np.array(bias(states[-2]))
    index, _ = experiment.examples_at(2 * 399, 2)
    memory = states[-2].reduction['memory']
    direction = (x - targets[index] - memory[index]).mean(0) + memory.mean(0)
    np.testing.assert_allclose(bias(states[-1]), x - 0.02 * direction, atol=1e-6)
    # Filled at x itself, the memory's mean is the gradient, and the rest of the direction is zero.
    filled = states[-2].replace(
        reduction={
            **states[-2].reduction,
            'memory': (x - targets).astype(np.float32),
            'sum': jax.tree.map(np.zeros_like, states[-2].reduction['sum'])
            | {
                next(iter(states[-2].params)): {
                    'bias': (x - targets).sum(0).astype(np.float32),
                    'kernel': np.zeros((4, 3), np.float32),
                }
            },
        }
    )
    _, (moved,) = after_updates(config, 1, 800, filled)
    np.testing.assert_allclose(bias(moved), x - 0.02 * (x - targets.mean(0)), atol=1e-6)


def test_a_skipped_update_leaves_the_memory_of_saga_as_it_was():
    config = digits('saga', 8, divergence__action='skip')
    _, (state,) = after_updates(config, 1)
    broken = state.replace(params=jax.tree.map(lambda x: x * np.nan, state.params))
    _, (after,) = after_updates(config, 1, 8, broken)
    for name in ('memory', 'seen'):
        np.testing.assert_array_equal(after.reduction[name], state.reduction[name])
