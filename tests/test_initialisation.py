"""Initial weights: their distributions, from a seed, however they are compiled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from adabatch_jax import models, optimizers, steps, train_state


def test_zero_initialised_residuals_start_as_the_identity():
    model = models.resnet.ResNet(False, (2, 1), 10, zero_init_residual=True)
    init = jax.jit(functools.partial(model.init, train=False))
    params = init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))['params']
    scales = [params[name]['scale'] for name in params if name.startswith('BatchNorm')]
    assert sum(1 for scale in scales if not scale.any()) == 3  # one in each block


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


def test_initial_weights_are_the_same_however_they_are_compiled():
    model, optimizer = models.get_model('cnn', 10), optimizers.create('sgd')

    def digest(**options):
        create = train_state.create
        return train_state.params_digest(create(model, optimizer, (8, 8, 1), compiler_options=options))

    assert digest(**steps.FOR_ONE_USE) == digest(xla_backend_optimization_level=3)
    in_a_jit = jax.jit(lambda: train_state.create(model, optimizer, (8, 8, 1)))()
    assert train_state.params_digest(in_a_jit) == digest()
