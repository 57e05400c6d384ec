"""Architectures: parameter counts, output shapes and layers."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import tiny

from adabatch_jax import experiment, models, optimizers, train, train_state
from adabatch_jax.config import ConfigError, resolve
from adabatch_jax.models import conv

COUNTS = {  # name: (classes, image size, parameters)
    'cnn': (10, 32, 5_466),
    'resnet8': (10, 32, 78_042),
    'resnet20': (10, 32, 272_474),
    'resnet110': (10, 32, 1_730_714),
    'wrn16_4': (10, 32, 2_748_890),
    'alexnet_cifar': (10, 32, 2_472_266),
    'vgg19_bn': (10, 32, 20_040_522),
    'alexnet': (1000, 224, 61_100_840),
    'resnet18': (1000, 224, 11_689_512),
    'resnet50': (1000, 224, 25_557_032),
}


@pytest.mark.parametrize('name', COUNTS)
def test_parameter_counts(name):
    classes, size, count = COUNTS[name]
    model, optimizer = models.get_model(name, classes), optimizers.create('sgd')
    shapes = jax.eval_shape(lambda: train_state.create(model, optimizer, (size, size, 3)))
    assert train_state.param_count(shapes) == count
    assert train_state.param_count(shapes.params) == count


@pytest.mark.parametrize(
    'arguments, message',
    [
        (('resnet20', '10'), "num_classes: got '10'"),
        (('resnet20', 10.5), 'num_classes: got 10.5'),
        (('resnet20', 10, 'float99'), 'model resnet20: data type .float99. not understood'),
    ],
)
def test_wrong_kinds_of_arguments_are_refused(arguments, message):
    name, num_classes, *dtype = arguments
    with pytest.raises(ValueError, match=message):
        models.get_model(name, num_classes, **({'dtype': dtype[0]} if dtype else {}))


@pytest.mark.parametrize(
    'name, key, value, accepted',
    [
        ('vgg13', 'shortcut', 'identity', 'projection'),
        ('resnet50', 'shortcut', 'identity', 'projection'),
        ('resnet8', 'zero_init_residual', True, 'False'),
    ],
)
def test_an_option_of_another_family_is_told_with_what_is_accepted(name, key, value, accepted):
    message = f'^config.model.{key}: got {value!r}; accepted for {name}: {accepted}$'
    with pytest.raises(ConfigError, match=message):
        train.plan(tiny(**{'model.name': name, f'model.{key}': value}))


def test_an_option_that_is_given_is_never_lost_to_the_default_of_ones_own_model(monkeypatch):
    class Mine(models.linear.Linear):
        shortcut: str = 'none'

    monkeypatch.setitem(models.MODELS, 'mine', Mine)
    monkeypatch.setitem(models.MODELS, 'made', lambda **options: Mine(**options))
    for name in ('mine', 'made'):
        config = resolve(tiny(**{'model.name': name}))
        assert experiment.describe(config).model.shortcut == 'none'
    assert models.get_model('mine', 10, shortcut='projection').shortcut == 'projection'
    assert models.get_model('linear', 10, shortcut='projection') == models.get_model('linear', 10)


def test_identity_shortcuts_have_no_parameters():
    model = models.get_model('resnet20', 10, shortcut='identity')
    params = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
    )['params']
    projections = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    assert train_state.param_count(params) == 272_474 - projections


@pytest.mark.parametrize('name', models.MODELS)
@pytest.mark.parametrize('batch_norm', ['local', 'ghost:2'])
def test_every_model_gives_float32_logits_in_half_precision_too(name, batch_norm):
    size = 224 if name in ('alexnet', 'alexnet_bn') else 32
    model = models.get_model(name, 7, batch_norm=batch_norm, dtype=jnp.bfloat16)
    images = jax.ShapeDtypeStruct((4, size, size, 3), jnp.float32)
    variables = jax.eval_shape(lambda key, x: model.init(key, x, train=False), jax.random.key(0), images)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
    logits, _ = jax.eval_shape(
        lambda v, x: model.apply(
            v, x, train=True, mutable=['batch_stats'], rngs={'dropout': jax.random.key(0)}
        ),
        variables,
        images,
    )
    assert logits.shape == (4, 7) and logits.dtype == jnp.float32


@pytest.mark.parametrize('in_memory', [12, 2, 6])
def test_ghost_statistics_are_those_of_each_group(monkeypatch, in_memory):
    """Also where they lie across the groups in which the CPU has its examples, whole or in halves."""
    monkeypatch.setattr(conv, '_GROUP_PIXELS', in_memory * 5 * 5)
    x = np.random.default_rng(0).normal(2, 3, size=(12, 5, 5, 3)).astype(np.float32)
    layer = models.layers.BatchNorm(True, jnp.float32, 4)
    assert conv.enter(x).shape == (12 // in_memory, 5, 5, in_memory, 3)
    variables = layer.init(jax.random.key(0), conv.enter(x))
    y, mutated = layer.apply(variables, conv.enter(x), mutable=['batch_stats'])
    groups = x.astype(np.float64).reshape(3, 4, 5, 5, 3)
    mean = groups.mean(axis=(1, 2, 3), keepdims=True)
    var = groups.var(axis=(1, 2, 3), keepdims=True)
    expected = ((groups - mean) / np.sqrt(var + 1e-5)).reshape(x.shape)
    np.testing.assert_allclose(conv.leave(y), expected, atol=1e-5)
    stats = mutated['batch_stats']
    np.testing.assert_allclose(stats['mean'], 0.1 * mean.mean(axis=(0, 1, 2, 3)), rtol=1e-4)
    np.testing.assert_allclose(stats['var'], 0.9 + 0.1 * var.mean(axis=(0, 1, 2, 3)), rtol=1e-4)


@pytest.mark.parametrize('height, channels', [(5, 3), (6, 3), (6, 16), (6, 17)])
def test_batchnorm_is_that_of_flax_in_values_gradients_and_statistics(height, channels):
    """Also where it takes two rows of few channels as one of twice as many."""
    x = jax.random.normal(jax.random.key(0), (8, height, 5, channels)) * 3 + 1
    ours = models.layers.BatchNorm(True, jnp.float32)
    theirs = nn.BatchNorm(False, momentum=0.9, epsilon=1e-5)
    variables = theirs.init(jax.random.key(1), x)
    assert jax.tree.map(jnp.shape, ours.init(jax.random.key(1), x)) == jax.tree.map(jnp.shape, variables)

    def loss(variables, x, layer):
        x = conv.enter(x) if layer is ours else x
        y, mutated = layer.apply(variables, x, mutable=['batch_stats'])
        y = conv.leave(y) if layer is ours else y
        return jnp.sum(jnp.sin(y) * jnp.arange(y.size).reshape(y.shape)), (y, mutated)

    results = [jax.value_and_grad(loss, (0, 1), has_aux=True)(variables, x, m) for m in (ours, theirs)]
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4 * np.abs(b).max())


def test_statistics_of_few_channels_need_no_copy_of_what_a_convolution_wrote(monkeypatch):
    x = conv.enter(jnp.zeros((64, 32, 32, 16)))
    layers = (
        models.layers.residual_conv(16, 3, 1, jnp.float32),
        models.layers.BatchNorm(True, jnp.float32),
    )
    variables = [layer.init(jax.random.key(0), x) for layer in layers]

    def loss(variables):
        y, _ = layers[1].apply(variables[1], layers[0].apply(variables[0], x), mutable=['batch_stats'])
        return jnp.sum(jnp.sin(layers[0].apply(variables[0], nn.relu(y))))

    def memory():
        gradient = jax.grad(lambda v: loss(v))  # a function of its own, which is traced anew
        compiled = jax.jit(gradient).lower(variables).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    without_copy = memory()
    monkeypatch.setattr(models.layers, 'rows_at_once', lambda x: 1)
    assert memory() > without_copy + 0.9 * x.nbytes


def test_ghost_groups_of_the_whole_batch_are_batchnorm():
    x = jax.random.normal(jax.random.key(0), (8, 5, 5, 3)) * 3 + 1
    ghost, local = (models.layers.norm_layer(b, jnp.float32, True)() for b in ('ghost:8', 'local'))
    x = conv.enter(x)
    variables = ghost.init(jax.random.key(0), x)
    a, b = (m.apply(variables, x, mutable=['batch_stats']) for m in (ghost, local))
    for ours, theirs in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize('shape', [(32, 32, 3), (8, 8, 1), (28, 28, 1), (17, 33, 3)])
def test_models_take_images_of_any_size(shape):
    model = models.get_model('resnet8', 7)
    images = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    init = functools.partial(model.init_with_output, train=False)
    logits, _ = jax.eval_shape(init, jax.random.key(0), images)
    assert logits.shape == (2, 7)


def test_each_block_of_a_network_moves_as_much_memory_however_many_come_before_it():
    def moved(num_blocks):
        model = models.resnet_cifar.ResNetCifar(num_blocks, num_classes=10, width=4)
        x = jnp.zeros((4, 8, 8, 3))
        variables = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), x)
        apply = functools.partial(model.apply, train=True, mutable=['batch_stats'])
        return jax.jit(apply).lower(variables, x).compile().cost_analysis()['bytes accessed']

    second, third = np.diff([moved(num_blocks) for num_blocks in (1, 2, 3)])
    assert third == pytest.approx(second, rel=0.01)


def test_the_relu_of_a_sum_is_relu_with_its_gradient_and_hides_no_value_that_is_not_a_number():
    x = jnp.array([-jnp.inf, -2, -0.0, 0, 1, jnp.inf, jnp.nan])
    zeros = jnp.zeros_like(x)
    np.testing.assert_array_equal(models.layers.relu_of_sum(x, zeros), nn.relu(x))
    gradient = jax.grad(lambda x: models.layers.relu_of_sum(x, zeros)[:-1].sum())(x)
    np.testing.assert_array_equal(gradient, [0, 0, 0, 0, 1, 1, 0])


@pytest.mark.parametrize(
    'window, stride, padding', [(2, 2, 0), (3, 3, 0), (3, 2, 1), (3, 2, 0), (2, 3, 1)]
)
@pytest.mark.parametrize('backend', ['cpu', 'gpu'])
@pytest.mark.parametrize('shape', [(4, 8, 12, 3), (2, 7, 9, 5, 3)])
def test_pooling_is_xlas_with_its_gradient_which_goes_to_the_first_of_equals(
    shape, backend, window, stride, padding, monkeypatch
):
    monkeypatch.setattr(jax, 'default_backend', lambda: backend)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(0, 4, shape), jnp.float32)  # most windows have several largest
    others = len(shape) - 3

    def of_xla(x):
        sizes = ((1, n, n, *[1] * others) for n in (window, stride))
        around = ((0, 0), *[(padding, padding)] * 2, *[(0, 0)] * others)
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, *sizes, around)

    expected, to_expected = jax.vjp(of_xla, x)
    got, to_ours = jax.vjp(lambda x: models.layers.max_pool(x, window, stride, padding), x)
    np.testing.assert_array_equal(got, expected)
    change = jnp.asarray(rng.integers(-4, 5, got.shape), jnp.float32)  # sums of which are exact
    np.testing.assert_array_equal(to_ours(change)[0], to_expected(change)[0])
    _, to_second = jax.vjp(lambda change: to_ours(change)[0], change)
    there = rng.normal(size=x.shape).astype(np.float32)

    def windows(x, outside):
        around = [(padding, padding) if axis in (1, 2) else (0, 0) for axis in range(len(shape))]
        padded = np.pad(x, around, constant_values=outside)
        views = np.lib.stride_tricks.sliding_window_view(padded, (window, window), (1, 2))
        return views[:, ::stride, ::stride].reshape(*got.shape, -1)

    largest = windows(x, -np.inf).argmax(-1)[..., None]
    picked = np.take_along_axis(windows(there, 0), largest, -1)[..., 0]
    np.testing.assert_array_equal(to_second(jnp.asarray(there))[0], picked)


@pytest.mark.parametrize('backend', ['cpu', 'gpu'])
@pytest.mark.parametrize('place', range(4))
def test_pooling_hides_no_value_that_is_not_a_number(place, backend, monkeypatch):
    monkeypatch.setattr(jax, 'default_backend', lambda: backend)
    x = np.arange(4.0)
    x[place] = np.nan
    assert np.isnan(models.layers.max_pool(x.reshape(1, 2, 2, 1), 2, 2)).all()
