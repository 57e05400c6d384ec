"""Step sizes that are searched for inside the train step, against NumPy and against whole runs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import StopAt, of_kind, tiny, without_times
from test_steps import make_batch, make_spec, make_state, numpy_gradient, run_step

from adabatch_jax import distributed, steps, train
from adabatch_jax.config import ConfigError

BATCH = 16


def float64(params):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), params['Dense_0'])


def moved(params, gradient, size):
    return jax.tree.map(lambda x, g: x - size * g, params, gradient)


def first_step(rule, num_microbatches, given=64.0, decay=0.0, **fields):
    spec = make_spec(num_microbatches=num_microbatches, weight_decay=decay)
    spec = dataclasses.replace(spec, rule=rule, weight_decay=(decay, 'all'), **fields)
    state, batch = make_state(spec), make_batch(BATCH)
    return float64(state.params), batch, run_step(spec, state, batch, given)


def objective(params, batch, decay):
    """Gradient and value in float64 of the mean loss and the penalty of weight decay."""
    gradient, loss, _ = numpy_gradient(params, batch)
    squares = sum(np.sum(x**2) for x in params.values())
    return {k: g + decay * params[k] for k, g in gradient.items()}, loss / BATCH + decay / 2 * squares


def armijo_in_numpy(params, batch, given, decay=0.0):
    gradient, before = objective(params, batch, decay)
    slope = sum(np.sum(g**2) for g in gradient.values())
    size = given
    while objective(moved(params, gradient, size), batch, decay)[1] > before - 0.1 * size * slope:
        size /= 2
    return gradient, size


@pytest.mark.parametrize('num_microbatches, decay', [(1, 0.0), (2, 0.0), (4, 0.0), (2, 10.0)])
def test_the_step_takes_the_size_that_armijo_gives_for_the_whole_batch(num_microbatches, decay):
    params, batch, (after, sums) = first_step('armijo', num_microbatches, decay=decay)
    gradient, size = armijo_in_numpy(params, batch, 64.0, decay)
    assert 1e-4 < size < 64.0 and sums['learning_rate'] == size
    for key, value in moved(params, gradient, size).items():
        np.testing.assert_allclose(after.params['Dense_0'][key], value, atol=2e-5)
    assert after.opt_state.hyperparams['learning_rate'] == size  # where the next search begins


@pytest.mark.parametrize('fraction, decay', [(0.5, 0.0), (1.0, 0.0), (1.0, 10.0)])
def test_the_next_search_begins_where_barzilai_borwein_says(fraction, decay):
    fields = {'statistics': 'norms', 'fraction': fraction, 'decay': decay}
    params, batch, (after, sums) = first_step('barzilai_borwein', 2, **fields)
    gradient, size = armijo_in_numpy(params, batch, 64.0, decay)
    there, _ = objective(moved(params, gradient, size), batch, decay)
    squared = sum(np.sum(g**2) for g in gradient.values())
    curvature = sum(np.sum(-(there[k] - g) * g) for k, g in gradient.items()) / (size * squared)
    noise = float(sums['variance']) / BATCH / squared if fraction < 1 else 0.0
    expected = size * (1 - fraction) + max(0.0, 1 - noise) / curvature * fraction
    if noise >= 1:
        expected = size
    found = after.opt_state.hyperparams['learning_rate']
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    assert sums['learning_rate'] == size


def test_later_searches_begin_at_a_multiple_of_where_the_last_one_ended():
    spec = dataclasses.replace(make_spec(), rule='armijo')
    batch = make_batch(BATCH)
    after, first = run_step(spec, make_state(spec), batch, 1e-4)
    assert first['learning_rate'] == jnp.float32(1e-4)  # so small that no halving was needed
    _, same = run_step(spec, after, batch, 1.0)
    _, doubled = run_step(spec, after, batch, 2.0)
    assert same['learning_rate'] == jnp.float32(1e-4)
    assert doubled['learning_rate'] == jnp.float32(2e-4)


@pytest.mark.parametrize('rule', ['armijo', 'barzilai_borwein'])
def test_a_momentum_that_leads_uphill_does_not_make_later_searches_begin_at_its_tiny_step(rule):
    fields = {'statistics': 'norms', 'fraction': 0.5} if rule == 'barzilai_borwein' else {}
    spec = dataclasses.replace(make_spec(momentum=0.9, num_microbatches=2), rule=rule, **fields)
    batch = make_batch(BATCH)
    before, _ = run_step(spec, make_state(spec), batch, 1e-3)
    start = before.opt_state.hyperparams['learning_rate']
    uphill = jax.tree.map(lambda x: -1000 * x, optax.tree.get(before.opt_state, 'trace'))
    before = before.replace(opt_state=optax.tree.set(before.opt_state, trace=uphill))
    after, sums = run_step(spec, before, batch, 1.0)
    assert sums['learning_rate'] == start / 2**30
    assert after.opt_state.hyperparams['learning_rate'] == start


def test_with_weight_decay_a_search_comes_to_the_minimum_of_loss_and_penalty():
    """Softmax regression with the whole data set: near the minimum the loss alone would have to rise."""
    decay, batch = 0.3, make_batch(BATCH)
    spec = make_spec(weight_decay=decay)
    spec = dataclasses.replace(spec, rule='armijo', weight_decay=(decay, 'all'))
    step, state = steps.compile_step(spec), make_state(spec)
    for k in range(200):
        state, _ = step(state, distributed.put(batch), np.float32(1.0), np.uint32(k))
    gradient, _ = objective(float64(state.params), batch, decay)
    assert max(np.abs(g).max() for g in gradient.values()) < 1e-3


CHANGES = {
    'learning_rate.rule': 'barzilai_borwein',
    'learning_rate.effective': 1.0,
    'optimizer.momentum': 0.0,
    'batch.policy': 'adabatch',
    'batch.growth_epochs': 1.0,
    'batch.max_size': 32,
    'num_epochs': 3.0,
}


def test_a_run_that_searches_is_stopped_anywhere_and_ends_in_the_same_weights(tmp_path):
    ends = [train.train(tiny(**CHANGES), tmp_path / 'whole')]
    for n in (3, 11):  # updates until the next stop
        with pytest.raises(train.Preempted):
            train.train(tiny(**CHANGES), tmp_path / 'stopped', StopAt(n))
    ends.append(train.train(tiny(**CHANGES), tmp_path / 'stopped'))
    assert ends[0]['params_digest'] == ends[1]['params_digest']
    whole, stopped = (without_times(of_kind(tmp_path / d, 'train')) for d in ('whole', 'stopped'))
    assert whole == stopped
    assert len({record['learning_rate'] for record in whole}) > 1  # as found, not as planned


def test_growth_of_the_batch_doubles_where_the_next_search_begins(tmp_path):
    changes = CHANGES | {
        'learning_rate.rule': 'armijo',
        'learning_rate.effective': 1e-5,
        'log_every_steps': 1,
    }
    train.train(tiny(**changes), tmp_path)
    found = {}
    for record in of_kind(tmp_path, 'train'):
        found.setdefault(record['batch_size'], record['learning_rate'])
    sizes = sorted(found)
    assert len(sizes) > 1
    assert [found[size] / 1e-5 for size in sizes] == pytest.approx([2**k for k in range(len(sizes))])


def test_a_schedule_that_becomes_a_search_begins_with_its_own_step_size(tmp_path):
    changes = CHANGES | {'batch.policy': 'fixed', 'log_every_steps': 1}
    planned = {'learning_rate.rule': 'schedule', 'learning_rate.effective': 1e-4, 'num_epochs': 1.0}
    updates = train.train(tiny(**changes | planned), tmp_path)['updates']
    searched = {'learning_rate.rule': 'armijo', 'learning_rate.effective': 1e-3}
    train.train(tiny(**changes | searched), tmp_path, allow_schedule_change=True)
    first = next(r for r in of_kind(tmp_path, 'train') if r['step'] > updates)
    assert first['learning_rate'] == pytest.approx(1e-3)  # so small that no halving was needed


@pytest.mark.parametrize(
    'changes, message',
    [
        (
            {'learning_rate.rule': 'wolfe'},
            'config.learning_rate.rule: got .*; accepted: schedule, armijo',
        ),
        ({'divergence.action': 'skip'}, r'config.divergence.action: got .*; accepted with .*: stop'),
        (
            {'batch.policy': 'adascale'},
            'config.batch.policy: got .* goes with planned learning rates only',
        ),
        (
            {'batch.policy': 'increase_dont_decay', 'learning_rate.coupling': 'linear'},
            'config.batch.policy: got .* goes with planned learning rates only',
        ),
        (
            {'batch.policy': 'seesaw', 'learning_rate.schedule': 'cosine'},
            'config.batch.policy: got .* goes with planned learning rates only',
        ),
    ],
)
def test_what_a_search_cannot_go_with_is_a_mistake(changes, message):
    with pytest.raises(ConfigError, match=message):
        train.plan(tiny(**CHANGES | changes))


def test_a_batch_at_its_ceiling_is_no_mistake_where_nothing_decays_by_plan():
    plan = train.plan(tiny(**CHANGES | {'batch.max_size': 16}))
    assert [stage.batch_size for stage in plan.stages] == [8, 16]


def test_the_plan_says_that_rates_are_searched_for():
    experiment = train.fitted(tiny(**CHANGES))
    assert 'searched for on each batch (barzilai_borwein)' in experiment.note
    assert {s.learning_rate_start for s in experiment.plan.stages} == {1.0}
