"""Curvature and sharpness: closed forms, a dense Hessian, and the analysis of a run."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from adabatch_jax import curvature, losses, models

# -------------------------------------------------------------------------------- products


def softmax_regression(num_classes, scale=1.0):
    """One example: the Hessian is (diag p - p p') times x x' (Kronecker)."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=6)
    w = scale * rng.normal(size=(6, num_classes))
    z = x @ w
    p = np.exp(z) / np.exp(z).sum()
    hessian = np.einsum('i,j,ab->iajb', x, x, np.diag(p) - np.outer(p, p))
    loss = lambda w: -jax.nn.log_softmax(jnp.asarray(x, jnp.float32) @ w)[1]  # noqa: E731
    size = 6 * num_classes
    return loss, jnp.asarray(w, jnp.float32), hessian.reshape(size, size), x


def test_the_hessian_of_softmax_regression_is_the_closed_form():
    loss, w, hessian, x = softmax_regression(4)
    z = lambda w: (jnp.asarray(x, jnp.float32) @ w)[None]  # noqa: E731
    of_z = lambda z: losses.cross_entropy(z, jnp.array([1]))[0]  # noqa: E731
    for column in np.eye(24, dtype=np.float32):
        v = column.reshape(6, 4)
        product = curvature.hessian_product(loss, w, v)
        np.testing.assert_allclose(product.ravel(), hessian @ column, atol=1e-6)
        np.testing.assert_allclose(
            curvature.gauss_newton_product(z, of_z, w, v), product, atol=1e-6
        )  # z is linear in w


def test_equal_probabilities_give_one_eigenvalue_many_times():
    """|x|^2 / C, C - 1 times; the rest is 0."""
    loss, w, _, x = softmax_regression(5, scale=0.0)
    product = lambda v: curvature.hessian_product(loss, w, v)  # noqa: E731
    found = curvature.lanczos(product, w, num_steps=30)
    expected = np.zeros(30)
    expected[:4] = x @ x / 5
    np.testing.assert_allclose(found.values, expected, atol=1e-5)


class Network(nn.Module):
    """Convolution, BatchNorm and a linear layer, small enough for a dense Hessian."""

    @nn.compact
    def __call__(self, images, *, train):
        x = models.conv.enter(images)
        x = models.layers.residual_conv(2, 3, 2, jnp.float32)(x)
        x = jnp.tanh(models.layers.norm_layer('local', jnp.float32, train)()(x))
        return nn.Dense(3)(models.layers.flatten(x))


@pytest.fixture(scope='module')
def network():
    """Its loss over a batch, the same by logits, parameters, and the dense matrices in float64."""
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(6, 4, 4, 1)), jnp.float32)
    labels = jnp.asarray(rng.integers(3, size=6))
    model = Network()
    variables = model.init(jax.random.key(0), images, train=False)
    flat, unravel = ravel_pytree(variables['params'])

    def outputs(params):
        return model.apply({**variables, 'params': params}, images, train=False)

    def of_outputs(z):
        return jnp.mean(losses.cross_entropy(z, labels))

    # Finite differences of the gradient in float64: apart from how products are made.
    with jax.enable_x64(True):

        def plain(flat):
            params = unravel_as(flat, variables['params'])
            x = jnp.asarray(images, jnp.float64)
            x = jax.lax.conv_general_dilated(
                x, params['Conv_0']['kernel'], (2, 2), [(1, 1)] * 2, None, None,
                ('NHWC', 'HWIO', 'NHWC'),
            )  # fmt: skip
            norm = params['BatchNorm_0']
            x = jnp.tanh(x / np.sqrt(1 + 1e-5) * norm['scale'] + norm['bias'])
            layer = params['Dense_0']
            return x.reshape(6, -1) @ layer['kernel'] + layer['bias']

        point = jnp.asarray(flat, jnp.float64)
        gradient = jax.jit(jax.grad(lambda flat: of_outputs(plain(flat))))
        step = 1e-5
        hessian = np.stack(
            [
                (gradient(point + step * e) - gradient(point - step * e)) / (2 * step)
                for e in np.eye(len(flat))
            ]
        )
        jacobian = np.asarray(jax.jacobian(plain)(point)).reshape(18, -1)
        z = plain(point)
        of_z = np.asarray(jax.hessian(of_outputs)(z)).reshape(18, 18)
    loss = lambda params: of_outputs(outputs(params))  # noqa: E731
    return loss, outputs, of_outputs, variables['params'], hessian, jacobian.T @ of_z @ jacobian


def unravel_as(flat, tree):
    leaves, structure = jax.tree.flatten(tree)
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1]
    parts = jnp.split(flat, ends)
    return jax.tree.unflatten(
        structure, [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
    )


@pytest.fixture(scope='module')
def products(network):
    """With the Hessian, and with the Gauss-Newton matrix."""
    loss, outputs, of_outputs, params, *_ = network
    return (
        jax.jit(lambda v: curvature.hessian_product(loss, params, v)),
        jax.jit(lambda v: curvature.gauss_newton_product(outputs, of_outputs, params, v)),
    )


def test_products_are_those_of_the_dense_matrices(network, products):
    *_, params, hessian, gauss_newton = network
    _, unravel = ravel_pytree(params)
    v = np.random.default_rng(1).normal(size=len(hessian)).astype(np.float32)
    for product, dense in zip(products, (hessian, gauss_newton), strict=True):
        np.testing.assert_allclose(ravel_pytree(product(unravel(v)))[0], dense @ v, atol=2e-5)
    assert np.abs(hessian - gauss_newton).max() > 1e-3  # they are not the same


def test_lanczos_finds_the_spectrum_of_a_small_network(network, products):
    *_, params, hessian, gauss_newton = network
    for product, dense in zip(products, (hessian, gauss_newton), strict=True):
        expected = np.linalg.eigvalsh(dense)[::-1]
        whole = curvature.lanczos(product, params, num_steps=1000)
        np.testing.assert_allclose(whole.values, expected, atol=3e-5)
        few = curvature.lanczos(product, params, num_steps=25)
        for value, residual in zip(few.values, few.residuals, strict=True):
            assert np.abs(expected - value).min() <= residual + 3e-5
        np.testing.assert_allclose(few.values[:2], expected[:2], atol=1e-4)


def test_gauss_newton_has_no_negative_eigenvalue_and_the_hessian_has(network, products):
    *_, params, hessian, _ = network
    of_hessian, of_gauss_newton = (curvature.lanczos(product, params, 1000) for product in products)
    smallest = np.linalg.eigvalsh(hessian)[0]
    assert smallest < -1e-3 and of_hessian.values[-1] == pytest.approx(smallest, abs=3e-5)
    assert of_gauss_newton.values[-1] > -3e-5


def test_what_is_not_finite_has_no_eigenvalues():
    found = curvature.lanczos(lambda v: v * np.nan, np.zeros(5, np.float32), 3)
    np.testing.assert_array_equal(found.values, [np.nan] * 3)
    np.testing.assert_array_equal(found.residuals, [np.nan] * 3)


def test_lanczos_finds_multiple_eigenvalues_and_none_twice():
    spectrum = np.array([7.0, 7, 7, 3, 3, -5, 1, 0, 0, 0], np.float32)
    basis, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(10, 10)))
    matrix = (basis * spectrum) @ basis.T
    found = curvature.lanczos(lambda v: matrix @ v, np.zeros(10, np.float32), num_steps=10)
    np.testing.assert_allclose(found.values, np.sort(spectrum)[::-1], atol=1e-5)


def test_lanczos_takes_double_precision():
    with jax.enable_x64(True):
        found = curvature.lanczos(lambda v: jnp.array([3.0, 1.0]) * v, jnp.zeros(2), 2)
    np.testing.assert_allclose(found.values, [3.0, 1.0], atol=1e-12)


def test_a_residual_holds_where_neighbours_cannot_be_told_apart():
    """One eigenvalue and many within 1e-5 of each other: the bound counts what is taken for 0."""
    for seed in range(5):
        spread = np.random.default_rng(seed).uniform(0, 8e-6, 59)
        spectrum = np.concatenate([[1.0], spread])
        found = curvature.lanczos(lambda v, s=spectrum: s * v, np.zeros(60), num_steps=6, seed=seed)
        for value, residual in zip(found.values, found.residuals, strict=True):
            assert np.abs(spectrum - value).min() <= residual


def test_the_trace_is_unbiased_and_its_error_is_the_stated_one(network, products):
    *_, params, hessian, _ = network
    product, _ = products
    found = curvature.trace(product, params, num_samples=400)
    assert abs(found.value - np.trace(hessian)) < 4 * found.error
    off = hessian - np.diag(np.diag(hessian))
    assert found.error == pytest.approx(np.sqrt(2 * np.sum(off**2) / 400), rel=0.15)
    diagonal = curvature.trace(lambda v: 3 * v, np.zeros(7, np.float32), 2)
    assert diagonal == (21.0, 0.0)
    # Of two samples of 2 or -2 each: half their difference.
    swap = lambda v: v[::-1]  # noqa: E731
    errors = {curvature.trace(swap, np.zeros(2, np.float32), 2, seed).error for seed in range(8)}
    assert sorted(errors) == pytest.approx([0.0, 2.0])
