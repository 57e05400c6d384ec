"""Initial weights: their distributions, from a seed, however they are compiled."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import tiny

from adabatch_jax import experiment, models, optimizers, steps, train_state
from adabatch_jax.config import resolve


def initial(model, side):
    init = jax.jit(functools.partial(model.init, train=False))
    return init(jax.random.key(0), jnp.zeros((1, side, side, 3)))['params']


def uniform(p):
    """The p-th moment of the uniform distribution from -1 to 1."""
    return (1 - p % 2) / (p + 1)


def normal(p):
    """The p-th moment of the standard normal distribution."""
    return (1 - p % 2) * math.prod(range(1, p, 2))


def pytorch(shape):
    return uniform, math.prod(shape[:-1]) ** -0.5


def fan_out(shape):
    return normal, (2 / (shape[0] * shape[1] * shape[-1])) ** 0.5


@pytest.mark.parametrize(
    'make, side, convolution, linear',
    [
        (models.MODELS['alexnet_cifar'], 32, pytorch, pytorch),
        (models.MODELS['alexnet'], 63, pytorch, pytorch),
        (models.MODELS['vgg11_bn'], 32, fan_out, lambda shape: (normal, 0.01)),
        (functools.partial(models.resnet.ResNet, True, (1, 1)), 32, fan_out, pytorch),
    ],
    ids=['alexnet_cifar', 'alexnet', 'vgg11_bn', 'bottleneck'],
)
def test_initial_weights_have_the_distributions_of_their_family(make, side, convolution, linear):
    params = initial(make(num_classes=10), side)
    layers = jax.tree.leaves(params, is_leaf=lambda x: 'kernel' in x or 'scale' in x)
    for layer in layers:
        if 'scale' in layer:
            assert (layer['scale'] == 1).all() and not layer['bias'].any()
            continue
        kernel = layer['kernel']
        moment, scale = (convolution if kernel.ndim == 4 else linear)(kernel.shape)
        for key, x in layer.items():
            if key == 'bias' and moment is normal:
                assert not x.any()
                continue
            for p in (1, 2, 4):
                mean = np.mean((np.asarray(x, np.float64) / scale) ** p)
                standard_error = ((moment(2 * p) - moment(p) ** 2) / x.size) ** 0.5
                assert mean == pytest.approx(moment(p), abs=4 * standard_error), (kernel.shape, key, p)


@pytest.mark.parametrize('bottleneck, last', [(False, {2, 4, 6}), (True, {3, 7, 10})])
def test_zero_initialised_residuals_start_as_the_identity(bottleneck, last):
    """The last BatchNorm of each block alone, in the order in which they are made."""
    params = initial(models.resnet.ResNet(bottleneck, (2, 1), 10, zero_init_residual=True), 32)
    scales = {name: layer['scale'] for name, layer in params.items() if name.startswith('BatchNorm')}
    zeros = {int(name.removeprefix('BatchNorm_')) for name, scale in scales.items() if not scale.any()}
    assert zeros == last


def test_initialisation_is_that_of_the_official_code():
    model = models.get_model('resnet20', 10)
    params = model.init(jax.random.PRNGKey(0), jnp.zeros((1, 32, 32, 3)), train=False)['params']
    kernel = params['Block_8']['Conv_1']['kernel']  # 3x3, 64 to 64
    # The sample deviation of 36,864 normal draws lies within 1.5 % (4 standard errors).
    np.testing.assert_allclose(kernel.std(), (2 / (9 * 64)) ** 0.5, rtol=0.015)
    head = params['Classifier_0']['Dense_0']
    for leaf in head.values():
        assert np.abs(leaf).max() <= 64**-0.5
    assert np.abs(head['kernel']).max() > 0.95 * 64**-0.5


def test_the_same_seed_gives_the_same_state_and_another_one_another():
    def digest(seed):
        model, optimizer = models.get_model('resnet8', 10), optimizers.create('sgd')
        return train_state.params_digest(train_state.create(model, optimizer, (8, 8, 1), seed))

    assert digest(0) == digest(0) != digest(1)


def test_initial_weights_are_the_same_however_they_are_compiled(monkeypatch):
    monkeypatch.delenv('XLA_FLAGS')  # which has options for the tests
    model, optimizer = models.get_model('cnn', 10), optimizers.create('sgd')

    def digest(**options):
        create = train_state.create
        return train_state.params_digest(create(model, optimizer, (8, 8, 1), compiler_options=options))

    _, options = steps.for_one_use()
    assert options and digest(**options) == digest(xla_backend_optimization_level=3)
    in_a_jit = jax.jit(lambda: train_state.create(model, optimizer, (8, 8, 1)))()
    assert train_state.params_digest(in_a_jit) == digest()


def test_initial_weights_are_made_on_a_cpu_where_there_is_one(monkeypatch):
    local_devices = jax.local_devices

    def where(*, backend):
        assert backend == 'cpu'
        return local_devices()[1:]

    monkeypatch.setattr(jax, 'local_devices', where)
    parts = experiment.describe(resolve(tiny()))
    devices = {x.device for x in jax.tree.leaves(parts.initial_state())}
    assert devices == {local_devices()[1]}
    monkeypatch.setenv('XLA_FLAGS', '--xla_backend_optimization_level=1')
    assert steps.for_one_use() == (local_devices()[1], {})

    def unknown(*, backend):
        raise RuntimeError(f'Unknown backend {backend}')  # as JAX does with JAX_PLATFORMS=cuda

    monkeypatch.setattr(jax, 'local_devices', unknown)
    assert steps.for_one_use() == (None, {})
    assert {x.device for x in jax.tree.leaves(parts.initial_state())} == {jax.devices()[0]}
