"""Architectures: parameter counts, output shapes, initialisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adabatch_jax import models, optimizers, train_state


@pytest.mark.parametrize('name, count', [('resnet20', 272_474), ('resnet8', 78_042)])
def test_parameter_counts_for_ten_classes(name, count):
    shapes = jax.eval_shape(
        lambda: train_state.create(models.get_model(name, 10), optimizers.create('sgd'), (32, 32, 3))
    )
    assert train_state.param_count(shapes) == count
    assert train_state.param_count(shapes.params) == count


@pytest.mark.parametrize('shape', [(32, 32, 3), (8, 8, 1), (28, 28, 1), (17, 33, 3)])
def test_models_take_images_of_any_size(shape):
    model = models.get_model('resnet8', 7)
    images = jnp.zeros((2, *shape))
    logits, _ = model.init_with_output(jax.random.PRNGKey(0), images, train=False)
    assert logits.shape == (2, 7)


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
