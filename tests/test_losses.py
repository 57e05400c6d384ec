"""The losses of the config, and the linear model that they are convex for."""

import jax
import jax.numpy as jnp
import numpy as np

from adabatch_jax import accepted_values, losses, models


def test_the_config_accepts_the_losses_there_are():
    assert accepted_values.CHOICES['model.loss'] == tuple(losses.LOSSES)


def test_losses_are_those_of_their_formulas():
    rng = np.random.default_rng(0)
    z, labels = rng.normal(0, 2, size=(50, 4)), rng.integers(4, size=50)
    own = np.eye(4, dtype=bool)[labels]
    expected = {
        'cross_entropy': np.log(np.exp(z).sum(1)) - z[own],
        'squared': ((z - own) ** 2).sum(1) / 2,
    }
    margin = np.where(own, z, -z)
    pieces = np.where(margin > 1.5, 0, np.where(margin < 0.5, 1 - margin, (1.5 - margin) ** 2 / 2))
    expected['hinge'] = pieces.sum(1)
    assert expected.keys() == losses.LOSSES.keys()
    for name, values in expected.items():
        loss = losses.LOSSES[name]
        found = loss(jnp.asarray(z, jnp.float32), labels)
        np.testing.assert_allclose(found, values, rtol=1e-5, atol=1e-6)
        slopes = losses.residuals(loss, jnp.asarray(z, jnp.float32), labels)
        step = 1e-2 * rng.normal(size=z.shape)
        moved = [loss(jnp.asarray(z + s * step), labels) for s in (-0.5, 0.5)]
        np.testing.assert_allclose((slopes * step).sum(1), moved[1] - moved[0], atol=2e-4)


def test_the_hinge_loss_has_no_gradient_beyond_the_margins():
    z, labels = jnp.array([[2.0, -1.6], [1.4, -1.6]]), jnp.array([0, 0])
    slopes = losses.residuals(losses.hinge, z, labels)
    assert (slopes[0] == 0).all() and slopes[1, 0] < 0


def test_the_linear_model_is_linear_and_begins_at_zero():
    model = models.get_model('linear', num_classes=3)
    images = jax.random.normal(jax.random.key(0), (5, 2, 2, 1))
    variables = model.init(jax.random.key(1), images, train=False)
    assert jax.tree.map(jnp.shape, variables['params']) == {'Dense_0': {'kernel': (4, 3), 'bias': (3,)}}
    assert not any(leaf.any() for leaf in jax.tree.leaves(variables))
