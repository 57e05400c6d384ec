"""Optimizers against worked examples and their definitions."""

import itertools
import types

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adabatch_jax import optimizers, records
from adabatch_jax.config import default_config


def updates_of(optimizer, params, grads, rate, count=1):
    state, history = optimizer.init(params), []
    for _ in range(count):
        state = optimizers.with_learning_rate(state, rate)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        history.append(updates)
    return history, params


def test_lars_takes_the_worked_first_step():
    """w = g = ones(3, 3): |w| = |g| = 3, ratio 0.1 * 3 / (3 + 0.1 * 3) = 1/11, step 0.01."""
    lars = optimizers.create('lars', momentum=0.9, weight_decay=0.1, trust_coefficient=0.1, epsilon=0.0)
    ones = {'kernel': jnp.ones((3, 3))}
    (first, second), _ = updates_of(lars, ones, ones, 0.1, 2)
    np.testing.assert_allclose(first['kernel'], -0.01, rtol=1e-6)
    # The rate is inside the buffer: v = 0.9 * 0.01 + 0.1 * ratio(w = 0.99) * (1 + 0.1 * 0.99).
    ratio = 0.1 * 0.99 / (1 + 0.1 * 0.99)
    np.testing.assert_allclose(second['kernel'], -(0.009 + 0.1 * ratio * 1.099), rtol=1e-6)


def test_lars_without_decay_does_not_depend_on_the_scale_of_the_gradient():
    lars = optimizers.create('lars', epsilon=0.0)
    params = {'kernel': jnp.arange(1.0, 7).reshape(2, 3)}
    grads = {'kernel': jnp.cos(params['kernel'])}
    (small,), _ = updates_of(lars, params, grads, 0.1)
    (large,), _ = updates_of(lars, params, {'kernel': 1000 * grads['kernel']}, 0.1)
    np.testing.assert_allclose(small['kernel'], large['kernel'], rtol=1e-5)


def test_lars_leaves_vectors_to_plain_momentum_and_zero_norms_alone():
    lars = optimizers.create('lars', momentum=0.9, weight_decay=0.1)
    params = {'bias': jnp.full(3, 2.0), 'kernel': jnp.zeros((2, 2))}
    grads = {'bias': jnp.ones(3), 'kernel': jnp.ones((2, 2))}
    (updates,), _ = updates_of(lars, params, grads, 0.1)
    np.testing.assert_allclose(updates['bias'], -0.1, rtol=1e-6)
    np.testing.assert_allclose(updates['kernel'], -0.1, rtol=1e-6)


@pytest.mark.parametrize('name', ['sgd', 'adam', 'adamw', 'lamb', 'adagrad', 'lars_optax'])
def test_decay_of_kernels_leaves_biases_alone(name):
    params = {'bias': jnp.full(3, 2.0), 'kernel': jnp.full((2, 2), 2.0)}
    zeros = {'bias': jnp.zeros(3), 'kernel': jnp.zeros((2, 2))}
    options = {'weight_decay': 0.1, 'epsilon': 1e-3}
    _, after = updates_of(optimizers.create(name, decayed='kernels', **options), params, zeros, 0.1)
    np.testing.assert_array_equal(after['bias'], params['bias'])
    assert np.all(after['kernel'] < params['kernel'])


@pytest.mark.parametrize('name', optimizers.OPTIMIZERS)
def test_every_optimizer_descends_with_the_rate_that_is_set(name):
    params = {'bias': jnp.ones(3), 'kernel': jnp.ones((2, 2))}
    optimizer = optimizers.create(name, momentum=0.5)
    (small,), _ = updates_of(optimizer, params, params, 0.1)
    (large,), _ = updates_of(optimizer, params, params, 0.2)
    for leaf in params:
        assert np.all(small[leaf] < 0)
        np.testing.assert_allclose(large[leaf], 2 * small[leaf], rtol=1e-5)


def test_a_name_that_is_only_listed_is_no_optimizer(monkeypatch):
    monkeypatch.setattr(optimizers, 'OPTIMIZERS', (*optimizers.OPTIMIZERS, 'mine'))
    with pytest.raises(ValueError, match="name: got 'mine'"):
        optimizers.create('mine').init({'kernel': jnp.ones((2, 2))})


def test_equal_arguments_give_the_same_object():
    assert optimizers.create('sgd', momentum=0.9) is optimizers.create('sgd', momentum=0.9)
    assert optimizers.create('sgd', momentum=0.9) is not optimizers.create('sgd', momentum=0.8)


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('decayed', optimizers.DECAYED)
@pytest.mark.parametrize('name', optimizers.OPTIMIZERS)
def test_a_gradient_that_is_not_finite_leaves_weights_that_are_not(name, decayed, value):
    """So that a train step need not look at gradients to find it out."""
    optimizer = optimizers.create(name, weight_decay=0.1, decayed=decayed)
    params = {'kernel': jnp.ones((2, 3)), 'bias': jnp.zeros(3)}
    grads, begun = optax.tree.ones_like(params), optimizer.init(params)
    _, later = optimizer.update(grads, begun, params)
    for place in ('kernel', 'bias'):
        bad = {**grads, place: grads[place].at[..., -1].set(value)}
        for state, given in itertools.product((begun, later), (grads, bad)):
            updates, _ = optimizer.update(given, state, params)
            changed = optax.apply_updates(params, updates)
            assert all(np.isfinite(x).all() for x in changed.values()) == (given is grads), place


@pytest.mark.parametrize(
    'name, eval_split, objective',
    [('sgd', 'train', 1.45), ('adamw', 'train', None), ('sgd', 'test', None)],
)
def test_an_objective_is_recorded_where_weight_decay_is_the_gradient_of_a_penalty(
    name, eval_split, objective
):
    config = default_config()
    config.dataset.eval_split = eval_split
    config.optimizer.update(dict(name=name, weight_decay=0.1, decayed='kernels'))
    state = types.SimpleNamespace(params={'kernel': np.array([[3.0]]), 'bias': np.ones(1)}, reduction={})
    run = types.SimpleNamespace(
        experiment=types.SimpleNamespace(config=config),
        host=types.SimpleNamespace(gradient_evaluations=0),
        state=state,
    )
    found = records.evaluation(run, {'loss': 1.0}).get('objective')
    assert found == (objective and pytest.approx(objective))
