"""Curvature and sharpness: closed forms, a dense Hessian, and the analysis of a run."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from adabatch_jax import accepted_values, analysis, curvature, losses, models, sharpness
from adabatch_jax.config import ConfigError, default_config, resolve
from adabatch_jax.experiment import describe
from adabatch_jax.train import train

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


# -------------------------------------------------------------------------------- sharpness


def quadratic(h, c):
    def value_and_grad(x):
        x = np.asarray(x, np.float64)
        return c + np.sum(h * x**2) / 2, h * x

    return value_and_grad


@pytest.mark.parametrize('epsilon', [1e-3, 5e-4])
def test_sharpness_of_a_quadratic_is_the_closed_form(epsilon):
    """f = c + 1/2 sum h x^2: the maximum is at the corner away from 0."""
    h, c = np.array([1.0, 5, 0, 20]), 0.3
    for x in (np.zeros(4, np.float32), np.array([0.5, -2, 1, 0.1], np.float32)):
        here = c + np.sum(h * x**2) / 2
        highest = c + np.sum(h * (np.abs(x) + epsilon * (np.abs(x) + 1)) ** 2) / 2
        expected = 100 * (highest - here) / (1 + here)
        for seed in range(3):
            found = sharpness.sharpness(quadratic(h, c), x, epsilon, 50, seed=seed)
            assert found == pytest.approx(expected, rel=1e-3)
    assert sharpness.sharpness(quadratic(h, c), np.zeros(4, np.float32), epsilon, 10) == pytest.approx(
        50 * epsilon**2 * h.sum() / (1 + c), rel=1e-3
    )


@pytest.mark.parametrize('seed', [0, 3])
def test_sharpness_in_a_subspace_is_that_of_its_box(seed):
    """With one dimension the maximum is at an end of a segment that can be worked out."""
    h, c, x = np.array([1.0, 5, 2]), 0.3, np.array([0.4, -1, 2], np.float32)
    direction = np.random.default_rng(seed).standard_normal((3, 1), np.float32)[:, 0]
    inside = direction @ x / (direction @ direction)
    reach = 1e-3 * (abs(inside) + 1)
    value = quadratic(h, c)
    best = max(value(x + s * reach * direction)[0] for s in (-1, 1))
    expected = 100 * (best - value(x)[0]) / (1 + value(x)[0])
    found = sharpness.sharpness(value, x, 1e-3, 10, dimensions=1, seed=seed)
    assert found == pytest.approx(expected, rel=1e-3)


def test_a_flat_loss_has_no_sharpness_and_mistakes_are_named():
    flat = lambda x: (1.0, np.zeros(3))  # noqa: E731
    x = np.ones(3, np.float32)
    assert sharpness.sharpness(flat, x, 1e-3, 10) == 0
    steep = lambda y: (1.0 if (y == x).all() else np.nan, np.zeros(3))  # noqa: E731
    assert sharpness.sharpness(steep, x, 1e-3, 10) == np.inf
    with pytest.raises(ValueError, match='epsilon: got 0'):
        sharpness.sharpness(flat, x, 0, 10)
    with pytest.raises(ValueError, match='dimensions: got 4; accepted: 0 to 3'):
        sharpness.sharpness(flat, x, 1e-3, 10, dimensions=4)


# -------------------------------------------------------------------------------- a run


def config_of(name='cnn', **analysis_options):
    config = default_config()
    config.num_epochs = 1.0
    config.checkpoint_every_epochs = 0.5
    config.model.name = name
    config.dataset.update(
        dict(name='synthetic', num_examples=48, image_size=8, crop_padding=1, pipeline='device')
    )
    config.batch.update(dict(base_size=8, growth_epochs=1.0, policy='fixed'))
    small = dict(num_examples=20, batch_size=8, subspace=5, lanczos_steps=4, trace_samples=2)
    config.analysis.update(small | analysis_options)
    return config


def test_the_loss_is_that_of_all_examples_whatever_the_batch_size():
    """Its derivatives too, with a last batch that is not full."""
    experiment = describe(resolve(config_of()))
    state = experiment.initial_state()
    images, labels = analysis.fixed_examples(experiment, 20)
    assert len(labels) == 20 and images.shape == (20, 8, 8, 3)

    def of(batch_size):
        loss = analysis.Loss(experiment, state.batch_stats, images, labels, batch_size)
        value, grads = loss.value_and_grad(state.params)
        products = (loss.hessian_product, loss.gauss_newton_product)
        return value, grads, *(product(state.params, state.params) for product in products)

    spec = experiment.eval_spec
    logits = spec.model.apply(state.variables, spec.normalize(jnp.asarray(images)), train=False)
    expected = np.mean(np.asarray(losses.cross_entropy(logits, labels)), dtype=np.float64)
    assert of(8)[0] == pytest.approx(expected, rel=1e-6)
    for got, want in zip(*(jax.tree.leaves(of(size)) for size in (8, 20)), strict=True):
        got, want = np.asarray(got), np.asarray(want)
        np.testing.assert_allclose(got, want, atol=2e-5 * max(1, np.abs(want).max()))


def test_every_checkpoint_is_analyzed_and_told(tmp_path, command_line):
    train(config_of(), tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
    result = command_line('--mode=analyze', f'--workdir={tmp_path}')
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in (tmp_path / 'analysis.jsonl').read_text().splitlines()]
    assert [record['step'] for record in records] == [3, 6]
    for record in records:
        assert record['num_examples'] == 20 and record['loss'] > 0
        assert [(s['epsilon'], s['dimensions']) for s in record['sharpness']] == [
            (epsilon, dimensions) for epsilon in (1e-3, 5e-4) for dimensions in (5466, 5)
        ]
        assert all(s['value'] > 0 for s in record['sharpness'])
        assert len(record['hessian_eigenvalues']) == len(record['gauss_newton_residuals']) == 4
        assert 'optimum' not in record
    assert 'Hessian, eigenvalue 1' in result.stdout and 'update 6' in result.stdout
    for path, content in before.items():  # nothing else was touched
        assert path.read_bytes() == content
    latest = command_line('--mode=analyze', f'--workdir={tmp_path}', '--checkpoint=latest')
    assert latest.returncode == 0
    (record,) = map(json.loads, (tmp_path / 'analysis.jsonl').read_text().splitlines())
    assert record['step'] == 6 and record['hessian_trace'] == records[1]['hessian_trace']
    (tmp_path / 'checkpoints/6/host/metadata').write_text('{}')
    damaged = command_line('--mode=analyze', f'--workdir={tmp_path}')
    assert damaged.returncode == 0
    assert damaged.stderr.startswith('warning: the checkpoint of update 6 is damaged')
    assert damaged.stderr.count('\n') == 1 and 'no other is left' not in damaged.stderr
    (record,) = map(json.loads, (tmp_path / 'analysis.jsonl').read_text().splitlines())
    assert record == records[0] | {'seconds': record['seconds']}
    with pytest.raises(ConfigError, match='the checkpoint of update 6 is damaged'):
        analysis.analyze(resolve(config_of()), tmp_path, 'latest')


def test_the_least_objective_of_a_linear_model_is_where_its_gradient_vanishes(tmp_path):
    """Against Newton's method in float64, written out for two classes."""
    config = config_of('linear', lanczos_steps=0, trace_samples=0)
    config.dataset.num_classes, config.dataset.augment = 2, 'none'
    config.optimizer.weight_decay = 0.1
    experiment = describe(resolve(config))
    images, labels = analysis.fixed_examples(experiment, 48)
    found = analysis.minimum(experiment, images, labels)
    x = (images - np.array(experiment.info.mean)) / np.array(experiment.info.std)
    x = np.concatenate([x.reshape(48, -1), np.ones((48, 1))], 1)
    # By symmetry the two columns are opposite: w and -w, with the margin 2 x w.
    y, w = np.where(labels == 1, 1.0, -1.0), np.zeros(193)
    for _ in range(30):
        p = 1 / (1 + np.exp(2 * y * (x @ w)))
        gradient = -2 * x.T @ (p * y) / 48 + 2 * 0.1 * w
        hessian = 4 * (x.T * (p * (1 - p))) @ x / 48 + 2 * 0.1 * np.eye(193)
        w -= np.linalg.solve(hessian, gradient)
    expected = np.mean(np.log1p(np.exp(-2 * y * (x @ w)))) + 0.1 * w @ w
    assert found == pytest.approx(expected, abs=1e-10)
    train(config, tmp_path)
    (*_, record) = analysis.analyze(resolve(config), tmp_path)
    assert record['optimum'] == found


def test_mistakes_are_told_in_a_line(tmp_path, command_line):
    result = command_line('--mode=analyze', f'--workdir={tmp_path / "none"}')
    assert result.returncode == 2 and 'no run in' in result.stderr
    with pytest.raises(ConfigError, match='no checkpoint in'):
        analysis.analyze(resolve(config_of()), tmp_path)
    config = config_of()
    config.analysis.epsilons = (1e-3, -1.0)
    with pytest.raises(ConfigError, match='analysis.epsilons: got -1.0'):
        resolve(config)
    with pytest.raises(ConfigError, match='analysis.trace_samples: got 1; accepted: 0, or at least 2'):
        resolve(config_of(trace_samples=1))


def test_the_subspace_is_measured_only_where_it_is_one():
    experiment = describe(resolve(config_of('linear', subspace=10_000, lanczos_steps=0)))
    images, labels = analysis.fixed_examples(experiment, 20)
    state = experiment.initial_state()
    loss = analysis.Loss(experiment, {}, images, labels, 20)
    found = analysis.measure(loss, state.params, experiment.config.analysis)
    assert [s['dimensions'] for s in found['sharpness']] == [1930, 1930]


def test_what_is_measured_does_not_depend_on_the_dtype_of_activations():
    def loss(dtype):
        config = config_of()
        config.model.dtype = dtype
        experiment = describe(resolve(config))
        state = experiment.initial_state()
        images, labels = analysis.fixed_examples(experiment, 20)
        return analysis.Loss(experiment, state.batch_stats, images, labels, 20).value_and_grad(
            state.params
        )[0]

    assert loss('bfloat16') == loss('float32')


# -------------------------------------------------------------------------------- losses


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
