"""Train and evaluation steps against NumPy in double precision, and what is compiled when."""

import dataclasses
import functools
import types

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adabatch_jax import accepted_values, distributed, models, optimizers, steps, train_state
from adabatch_jax.steps import compiled, pure

TRACES = []


class Softmax(nn.Module):
    """Softmax regression on pixels: gradients have a closed form. Counts its traces in training."""

    num_classes: int = 3

    @nn.compact
    def __call__(self, images, *, train):
        if train:
            TRACES.append(images.shape)
        return nn.Dense(self.num_classes)(images.reshape(len(images), -1))


class Scaled(nn.Module):
    """BatchNorm alone, to look at its statistics."""

    batch_norm: str = 'local'

    @nn.compact
    def __call__(self, images, *, train):
        norm = models.layers.norm_layer(self.batch_norm, jnp.float32, train)
        return norm()(images).mean(axis=(1, 2))


class Dropped(nn.Module):
    """Dropout alone: from 0, a class's weights show what its only example left out."""

    @nn.compact
    def __call__(self, images, *, train):
        kept = nn.Dropout(0.5, deterministic=not train)(jnp.ones((len(images), 64)))
        return nn.Dense(4, use_bias=False, kernel_init=nn.initializers.zeros)(kept)


SHAPE = (4, 4, 3)
NORMALIZE = steps.Normalize((100.0, 110.0, 120.0), (50.0, 60.0, 70.0))


def make_spec(model=None, batch_size=16, num_microbatches=1, train=True, **optimizer):
    return steps.StepSpec(
        model or Softmax(),
        optimizers.create('sgd', **optimizer),
        NORMALIZE,
        SHAPE,
        batch_size,
        num_microbatches,
        train,
    )


def make_batch(batch_size=16, seed=0):
    rng = np.random.default_rng(seed)
    return {
        'image': rng.integers(256, size=(batch_size, *SHAPE), dtype=np.uint8),
        'label': rng.integers(3, size=batch_size, dtype=np.int32),
    }


def make_state(spec, seed=0):
    state = train_state.create(spec.model, spec.optimizer, spec.image_shape, seed)
    return jax.device_put(state, distributed.replicated())


def run_step(spec, state, batch, learning_rate=0.1, examples_seen=16):
    step = steps.compile_step(spec)
    state = jax.tree.map(jnp.copy, state)  # the step donates it
    return step(state, distributed.put(batch), np.float32(learning_rate), np.uint32(examples_seen))


def numpy_gradient(params, batch):
    """Loss and gradient of softmax regression in float64."""
    pixels = (batch['image'].astype(np.float64) - NORMALIZE.mean) / NORMALIZE.std
    x = pixels.reshape(len(pixels), -1)
    logits = x @ params['kernel'] + params['bias']
    rows, logits = np.arange(len(x)), logits - logits.max(axis=1, keepdims=True)
    p = np.exp(logits)
    total = p.sum(axis=1, keepdims=True)
    p /= total
    loss = np.log(total[:, 0]) - logits[rows, batch['label']]
    correct = (logits.argmax(axis=1) == batch['label']).sum()
    p[rows, batch['label']] -= 1
    return {'kernel': x.T @ p / len(x), 'bias': p.mean(axis=0)}, loss.sum(), correct


@pytest.mark.parametrize('num_microbatches', [1, 2])
def test_examples_labelled_minus_one_are_left_out_of_the_gradient_and_the_sums(num_microbatches):
    spec = make_spec(num_microbatches=num_microbatches)
    state, batch = make_state(spec), make_batch(16)
    batch['label'][[3, 8]] = -1
    kept = {key: np.delete(value, [3, 8], axis=0) for key, value in batch.items()}
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), state.params['Dense_0'])
    gradient, loss, correct = numpy_gradient(params, kept)
    after, sums = run_step(spec, state, batch)
    for key, value in params.items():
        expected = value - 0.1 * gradient[key] * 14 / 16  # a mean over the places of the batch
        np.testing.assert_allclose(after.params['Dense_0'][key], expected, atol=1e-6)
    assert [sums['correct'], sums['count']] == [correct, 14]
    np.testing.assert_allclose(sums['loss'], loss, rtol=1e-6)


@pytest.mark.parametrize('num_microbatches', [1, 2, 4])
@pytest.mark.parametrize('nesterov', [False, True])
def test_updates_are_those_of_sgd_in_numpy_whatever_the_split(num_microbatches, nesterov):
    options = {'momentum': 0.9, 'weight_decay': 0.01, 'nesterov': nesterov}
    spec = make_spec(num_microbatches=num_microbatches, **options)
    state = make_state(spec)
    weights = {k: np.float64(v) for k, v in state.params['Dense_0'].items()}
    buffer = {k: np.zeros_like(v) for k, v in weights.items()}
    for k, rate in enumerate((0.1, 0.05, 0.2)):
        batch = make_batch(seed=k)
        grads, loss, correct = numpy_gradient(weights, batch)
        for name, weight in weights.items():
            g = grads[name] + 0.01 * weight
            buffer[name] = 0.9 * buffer[name] + g
            step = g + 0.9 * buffer[name] if nesterov else buffer[name]
            weights[name] = weight - rate * step
        state, sums = run_step(spec, state, batch, rate, 16 * (k + 1))
        assert float(sums['loss']) == pytest.approx(loss, rel=1e-5)
        assert (int(sums['correct']), int(sums['count'])) == (correct, 16)
        for name, weight in weights.items():
            np.testing.assert_allclose(state.params['Dense_0'][name], weight, atol=2e-6)
    assert (int(state.step), int(state.examples_seen)) == (3, 48)


def test_running_statistics_are_the_mean_over_devices_and_microbatches():
    spec = make_spec(Scaled(), batch_size=16, num_microbatches=2)
    state = make_state(spec)
    batch = make_batch()
    after, _ = run_step(spec, state, batch)
    x = (batch['image'].astype(np.float64) - NORMALIZE.mean) / NORMALIZE.std
    groups = x.reshape(4, 4, *SHAPE)  # 2 devices x 2 microbatches of 4 examples
    mean = groups.mean(axis=(1, 2, 3)).mean(axis=0)
    var = groups.var(axis=(1, 2, 3)).mean(axis=0)
    stats = after.batch_stats['BatchNorm_0']
    np.testing.assert_allclose(stats['mean'], 0.1 * mean, rtol=1e-4)
    np.testing.assert_allclose(stats['var'], 0.9 + 0.1 * var, rtol=1e-4)


def test_every_update_device_and_microbatch_leaves_out_other_units():
    spec = make_spec(Dropped(), batch_size=4, num_microbatches=2)
    batch, state = make_batch(4) | {'label': np.arange(4, dtype=np.int32)}, make_state(spec)
    states = [run_step(spec, state.replace(step=state.step + k), batch)[0] for k in (0, 1)]
    of_classes = [column for s in states for column in np.asarray(s.params['Dense_0']['kernel']).T]
    assert len(np.unique(of_classes, axis=0)) == 8


def test_sync_statistics_are_those_of_the_whole_batch():
    spec = make_spec(Scaled('sync'))
    batch = make_batch()
    after, _ = run_step(spec, make_state(spec), batch)
    x = (batch['image'].astype(np.float64) - NORMALIZE.mean) / NORMALIZE.std
    var = x.var(axis=(0, 1, 2))
    np.testing.assert_allclose(after.batch_stats['BatchNorm_0']['var'], 0.9 + 0.1 * var, rtol=1e-4)


def test_evaluation_uses_running_statistics_and_the_mask():
    spec = make_spec(Scaled(), batch_size=8, train=False)
    state = make_state(spec)
    state = state.replace(
        batch_stats={'BatchNorm_0': {'mean': jnp.full(3, 0.5), 'var': jnp.full(3, 4.0)}}
    )
    batch = make_batch(8)
    mask = np.array([1, 1, 1, 0, 1, 0, 0, 0], np.float32)
    sums = steps.compile_step(spec)(
        jax.device_put(state.variables, distributed.replicated()),
        distributed.put({**batch, 'mask': mask}),
    )
    x = (batch['image'].astype(np.float64) - NORMALIZE.mean) / NORMALIZE.std
    logits = ((x - 0.5) / np.sqrt(4 + 1e-5)).mean(axis=(1, 2))
    expected = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(8), batch['label']]
    assert float(sums['loss']) == pytest.approx((expected * mask).sum(), rel=1e-5)
    assert float(sums['count']) == 4
    assert float(sums['correct']) == ((logits.argmax(axis=1) == batch['label']) * mask).sum()


def test_memory_of_a_step_grows_with_its_batch():
    small, large = (
        steps.compile_step(make_spec(models.get_model('cnn', 3), batch_size=n)).memory_bytes
        for n in (4, 64)
    )
    assert 0 < small < large


def test_results_in_the_memory_of_arguments_are_counted_once():
    told = {'argument_size_in_bytes': 10, 'output_size_in_bytes': 7, 'alias_size_in_bytes': 5}
    analysis = types.SimpleNamespace(**told, temp_size_in_bytes=3)
    assert compiled._memory_bytes(types.SimpleNamespace(memory_analysis=lambda: analysis)) == 15


@pytest.mark.parametrize('needs', [(1, 2), (2, 1)])
def test_memory_of_a_step_for_parts_is_that_of_its_larger_half(monkeypatch, needs):
    needed, half = iter(needs), types.SimpleNamespace(input_shardings=[[None]])
    monkeypatch.setattr(compiled, '_compile', lambda *_, **__: half)
    monkeypatch.setattr(compiled, '_memory_bytes', lambda step: next(needed))
    spec = dataclasses.replace(make_spec(batch_size=32, num_microbatches=4), num_parts=2)
    assert compiled.AccumulatingStep(spec).memory_bytes == 2


def test_bfloat16_keeps_parameters_statistics_and_loss_in_float32():
    spec = make_spec(models.get_model('cnn', 3, dtype=jnp.bfloat16))
    state, sums = run_step(spec, make_state(spec), make_batch())
    kept = (state.params, state.batch_stats, sums)
    assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {jnp.dtype('float32')}
    outputs = functools.partial(spec.model.apply, train=False)
    logits = jax.eval_shape(outputs, state.variables, jnp.zeros((2, *SHAPE)))
    assert logits.dtype == jnp.float32


@pytest.mark.parametrize('large', [2**17, 3, 0])  # elements that are checked in place: of none, one, all
@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_is_seen_in_whichever_array(value, large, monkeypatch):
    monkeypatch.setattr(pure, '_LARGE', large)
    arrays = [np.full(shape, np.finfo(np.float32).max) for shape in ((), (3,), (2, 3, 4))]
    all_finite = jax.jit(pure._all_finite)
    assert all_finite(arrays)
    for k, array in enumerate(arrays):
        changed = array.copy()
        changed.flat[-1] = value
        assert not all_finite([*arrays[:k], changed, *arrays[k + 1 :]])


@pytest.mark.parametrize('name', ['adam', 'adamw', 'lamb', 'adagrad'])
def test_moments_that_overflow_count_as_not_finite_though_the_weights_are(name):
    spec = dataclasses.replace(make_spec(), optimizer=optimizers.create(name), skip_non_finite=True)
    spec = dataclasses.replace(spec, normalize=steps.Normalize(NORMALIZE.mean, (1e-20,) * 3))
    before = make_state(spec)
    zeros = jax.tree.map(jnp.zeros_like, before.params)  # equal logits, and gradients of about 1e20
    after, sums = run_step(spec, before.replace(params=zeros), make_batch())
    assert np.isfinite(sums['loss']) and sums['non_finite'] == 1
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(after.opt_state))


def test_values_are_looked_at_once_however_many_arrays_there_are():
    arrays = [np.zeros(k) for k in range(1, 9)]
    lowered = jax.jit(pure._all_finite).lower(arrays)
    assert lowered.compile().as_text().count(' is-finite(') == 1
    assert lowered.as_text().count('optimization_barrier') == 1  # apart from what writes the weights


def test_running_statistics_that_overflow_count_as_not_finite():
    spec = make_spec(models.get_model('resnet8', 3))
    state = make_state(spec)
    huge = jax.tree.map(lambda x: jnp.full_like(x, jnp.inf), state.batch_stats)
    _, sums = run_step(spec, state.replace(batch_stats=huge), make_batch())
    assert np.isfinite(sums['loss']) and sums['non_finite'] == 1


def test_a_loss_that_is_not_finite_is_seen_though_the_weights_are():
    spec = make_spec()
    state, batch = make_state(spec), make_batch() | {'label': np.ones(16, np.int32)}
    bias = jnp.array([3e38, -3e38, 0.0])
    params = {'Dense_0': {'kernel': jnp.zeros_like(state.params['Dense_0']['kernel']), 'bias': bias}}
    after, sums = run_step(spec, state.replace(params=params), batch)
    assert np.isinf(sums['loss']) and sums['non_finite'] == 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after.params))


def test_learning_rate_enters_through_the_optimizers_hyperparameter():
    optimizer = optimizers.create('sgd', momentum=0.0)
    state = optimizers.with_learning_rate(optimizer.init({'w': jnp.ones(2)}), 0.25)
    updates, _ = optimizer.update({'w': jnp.array([1.0, 2.0])}, state, {'w': jnp.ones(2)})
    np.testing.assert_allclose(updates['w'], [-0.25, -0.5])


@pytest.mark.parametrize('axes', [{'axis': -1, 'keepdims': True}, {}])
def test_a_loss_of_other_than_one_number_for_each_example_is_refused(axes):
    spec = dataclasses.replace(make_spec(), loss=lambda z, y: jnp.sum(z**2, **axes))
    with pytest.raises(ValueError, match=r'loss: gives shape \(.*\) for labels \(8,\); accepted: one'):
        steps.compile_step(spec)


class Named(nn.Module):
    parameter: str

    @nn.compact
    def __call__(self, images, *, train):
        return images.mean((1, 2)) @ self.param(self.parameter, nn.initializers.ones, (3, 4))


@pytest.mark.parametrize('rule', ['schedule', 'armijo'])
def test_a_parameter_may_be_called_learning_rate(rule):
    def trained(parameter):
        spec = dataclasses.replace(make_spec(Named(parameter), momentum=0.9), rule=rule)
        state = make_state(spec)
        for seed in range(2):
            state, _ = run_step(spec, state, make_batch(seed=seed))
        return state.params[parameter]

    np.testing.assert_array_equal(trained('learning_rate'), trained('w'))


def test_unknown_optimizer_and_model_list_what_exists():
    with pytest.raises(ValueError, match="name: got 'sdg'; accepted: sgd, lars"):
        optimizers.create('sdg')
    with pytest.raises(ValueError, match="got 'resnet21'; accepted: alexnet, .*resnet20"):
        models.get_model('resnet21', 10)
    with pytest.raises(ValueError, match="batch_norm: got 'global'"):
        models.get_model('resnet20', 10, batch_norm='global')
    with pytest.raises(ValueError, match='depth'):
        models.get_model('resnet20', 10, depth=3)
    with pytest.raises(ValueError, match="statistics: got 'norm'; accepted: '', 'norms', 'inner_prod"):
        dataclasses.replace(make_spec(), statistics='norm')
    with pytest.raises(ValueError, match="rule: got 'amijo'; accepted: 'schedule', 'armijo', 'barzi"):
        dataclasses.replace(make_spec(), rule='amijo')
    with pytest.raises(ValueError, match="statistics: got ''; accepted: 'norms', 'inner_products'"):
        dataclasses.replace(make_spec(), rule='barzilai_borwein')
    assert accepted_values.CHOICES['learning_rate.rule'] == steps.RULES


def injected(rate=0.0, **options):
    return optax.inject_hyperparams(optax.sgd)(learning_rate=rate, **options)


KEYED = optax.GradientTransformation(lambda params: jax.random.key(0), lambda g, key, _=None: (g, key))


@pytest.mark.parametrize(
    'optimizer, rule, has',
    [
        (optax.sgd(0.1), 'schedule', 'no learning_rate'),
        (injected(rate=optax.constant_schedule(0.1)), 'schedule', 'a schedule'),
        (injected(rate=0), 'schedule', 'a learning_rate of int32'),
        (
            optax.chain(injected(), injected()),
            'armijo',
            "2 learning rates where the rule 'armijo' finds",
        ),
        (optax.chain(KEYED, injected()), 'schedule', 'random keys'),
    ],
)
def test_an_optimizer_that_a_step_cannot_use_is_refused(optimizer, rule, has):
    spec = dataclasses.replace(make_spec(), optimizer=optimizer, rule=rule)
    with pytest.raises(ValueError, match=f'state has {has}.*; accepted: .* optax.inject_hyperparams'):
        steps.compile_step(spec)


def test_an_optimizer_of_optax_whose_learning_rate_can_be_set_is_used():
    plain = make_spec(momentum=0.9)
    spec = dataclasses.replace(plain, optimizer=injected(momentum=0.9))
    batch = make_batch(spec.batch_size)
    ours, theirs = (run_step(s, make_state(s), batch)[0].params for s in (spec, plain))
    chex.assert_trees_all_close(ours, theirs, rtol=1e-6)


@pytest.mark.parametrize('model', [Softmax(), Dropped()], ids=['softmax', 'dropout'])
def test_a_batch_that_comes_in_parts_gives_the_update_of_the_whole(model):
    whole = make_spec(model, batch_size=32, num_microbatches=4, momentum=0.9)
    in_parts = dataclasses.replace(whole, num_parts=2)
    batch = make_batch(32)
    parts = [
        {key: distributed.split_parts(value, 2)[k] for key, value in batch.items()} for k in range(2)
    ]
    expected, expected_sums = run_step(whole, make_state(whole), batch)
    step = steps.compile_step(in_parts)
    after, sums = step(make_state(whole), map(distributed.put, parts), np.float32(0.1), np.uint32(16))
    for ours, theirs in zip(jax.tree.leaves(after), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)
    for key, value in expected_sums.items():
        assert float(sums[key]) == pytest.approx(float(value))
    assert step.memory_bytes > 0
