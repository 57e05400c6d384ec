"""Estimates of gradient noise against closed forms, float64 and the error that theory gives them."""

import doctest
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from adabatch_jax import gradient_statistics, models, optimizers, steps, train_state

TRIALS = 4000
DEVIATIONS = np.array([1.0, 2.0, 0.5, 0.0, 3.0])  # of the gradients of single examples
GRADIENT = np.array([0.3, -0.2, 0.5, 0.1, 0.0])
TRACE, TRACE_OF_SQUARE = np.sum(DEVIATIONS**2), np.sum(DEVIATIONS**4)


def draw(num_groups, group_size, trials=TRIALS):
    """Mean gradients of groups whose examples have Gaussian noise: ``[trials, groups, parameters]``."""
    noise = np.random.default_rng(0).standard_normal((trials, num_groups, len(GRADIENT)))
    return GRADIENT + noise * DEVIATIONS / np.sqrt(group_size)


@pytest.mark.parametrize('num_groups, group_size', [(2, 16), (8, 4), (3, 50)])
def test_estimates_are_unbiased_within_the_error_that_theory_gives_them(num_groups, group_size):
    n, b, batch = num_groups, group_size, num_groups * group_size
    found = jax.vmap(lambda g: gradient_statistics.from_groups(g, b))(draw(n, b))
    variance_of_s = 2 * TRACE_OF_SQUARE / (n - 1)
    along = np.sum(GRADIENT**2 * DEVIATIONS**2)
    variance_of_g2 = 4 * along / batch + 2 * TRACE_OF_SQUARE / (n * (n - 1) * b**2)
    for values, truth, variance in (
        (found.variance, TRACE, variance_of_s),
        (found.squared_gradient, GRADIENT @ GRADIENT, variance_of_g2),
    ):
        assert abs(np.mean(values) - truth) < 4 * np.sqrt(variance / TRIALS)
        assert np.var(values) == pytest.approx(variance, rel=0.25)
    assert np.mean(found.squared_norm) == pytest.approx(GRADIENT @ GRADIENT + TRACE / batch, rel=0.1)


def test_with_all_examples_apart_the_variance_is_that_of_numpy():
    grads = draw(7, 1, trials=1)[0]
    found = gradient_statistics.from_groups({'a': grads[:, :2], 'b': grads[:, 2:]})
    np.testing.assert_allclose(found.variance, np.var(grads, 0, ddof=1).sum(), rtol=1e-5)
    mean = grads.mean(0)
    np.testing.assert_allclose(found.squared_gradient, mean @ mean - found.variance / 7, rtol=1e-5)


def test_without_noise_there_is_no_variance_and_without_groups_no_estimate():
    found = gradient_statistics.from_groups(jnp.full((4, 3), 0.1), group_size=8)
    assert found.variance == 0 and found.squared_gradient == pytest.approx(0.03)
    with pytest.raises(ValueError, match='num_groups: got 1; needs at least 2'):
        gradient_statistics.from_groups(jnp.ones((1, 3)))


def test_norms_of_half_precision_gradients_are_summed_in_single_precision():
    grads = jnp.full((100_000,), 0.1, jnp.bfloat16)
    total = gradient_statistics.squared_norm(grads)
    assert total.dtype == jnp.float32
    assert total == pytest.approx(1e5 * float(grads[0]) ** 2, rel=1e-3)


def test_estimates_from_half_precision_are_those_from_the_same_numbers_in_single():
    half = jnp.asarray(draw(4, 2, 1)[0], jnp.bfloat16)
    single = jnp.asarray(half, jnp.float32)
    across = jax.vmap(lambda g: gradient_statistics.across(g, 'batch', 2), axis_name='batch')
    mean = half[0]  # any
    along = lambda g: gradient_statistics.inner_products(g, jnp.asarray(mean, g.dtype), 2)  # noqa: E731
    for measure in (gradient_statistics.from_groups, across, along):
        for found, expected in zip(*map(jax.tree.leaves, map(measure, (half, single))), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_layers_by_themselves_add_up_to_the_whole():
    grads = {'a': draw(4, 2, 1)[0], 'b': 2 * draw(4, 2, 2)[1]}
    layers = gradient_statistics.from_groups(grads, 2, per_layer=True)
    whole = gradient_statistics.from_groups(grads, 2)
    assert layers.variance.keys() == {'a', 'b'}
    for part, total in zip(layers, whole, strict=True):
        assert sum(part.values()) == pytest.approx(float(total), rel=1e-5)


def test_per_example_gradients_of_a_linear_model_have_the_variance_worked_by_hand():
    """With f_i = 1/2 |w - a_i|^2 the gradients are w - a_i: their covariance is that of the data."""
    a = np.random.default_rng(1).normal(size=(50, 3)) * [1, 2, 3]
    w = jnp.array([1.0, 0.0, -1.0])
    loss = lambda w, a: 0.5 * jnp.sum((w - a) ** 2)  # noqa: E731
    found = gradient_statistics.per_example(loss, w, a)
    np.testing.assert_allclose(found.variance, np.var(a, 0, ddof=1).sum(), rtol=1e-4)
    layers = gradient_statistics.per_example(lambda w, a: loss(w['w'], a), {'w': w}, a, per_layer=True)
    np.testing.assert_allclose(layers.variance['w'], found.variance, rtol=1e-5)


def test_across_devices_pmap_and_shard_map_agree_with_the_groups_at_hand():
    grads = {'w': jnp.asarray(draw(2, 8, 1)[0], jnp.float32)}
    expected = gradient_statistics.from_groups(grads, 8)
    measure = functools.partial(gradient_statistics.across, axis_name='batch', group_size=8)
    mapped = jax.pmap(measure, 'batch', out_axes=None)(grads)
    mesh = Mesh(jax.devices(), ('batch',))
    squeezed = lambda g: measure(jax.tree.map(lambda x: x[0], g))  # noqa: E731
    sharded = jax.shard_map(squeezed, mesh=mesh, in_specs=P('batch'), out_specs=P())(grads)
    for found in (mapped, sharded):
        np.testing.assert_allclose(jnp.stack(found), jnp.stack(expected), rtol=1e-5)


@pytest.mark.parametrize('num_groups, group_size', [(4, 8), (16, 3)])
def test_variance_along_and_orthogonal_to_the_gradient_add_up_to_the_whole(num_groups, group_size):
    grads = jnp.asarray(draw(num_groups, group_size, 1)[0], jnp.float32)
    mean = jnp.mean(grads, 0)
    found = gradient_statistics.inner_products(grads, mean, group_size)
    m = np.sum(np.asarray(mean) ** 2)
    products = np.asarray(grads) @ np.asarray(mean)
    scale = group_size / (num_groups - 1)
    np.testing.assert_allclose(found.along, scale * np.sum((products - m) ** 2), rtol=1e-4)
    sideways = np.asarray(grads) - np.outer(products / m, mean)
    orthogonal = scale * np.sum(sideways**2)
    np.testing.assert_allclose(found.statistics.variance - found.along / m, orthogonal, rtol=1e-4)


def test_in_one_dimension_nothing_is_orthogonal():
    grads = jnp.asarray(draw(6, 4, 1)[0][:, :1], jnp.float32)
    found = gradient_statistics.inner_products(grads, jnp.mean(grads, 0), 4)
    along = found.along / found.statistics.squared_norm
    assert along == pytest.approx(float(found.statistics.variance), rel=1e-4)


def test_the_example_in_the_docstring_is_right():
    assert doctest.testmod(gradient_statistics) == (0, 8)


# ------------------------------------------------------------------------- in the train step

BATCH = 16


@pytest.fixture(scope='module')
def trained():
    """Sums and new states of one step on the same batch, by kind of statistics and split."""
    model = models.get_model('cnn', num_classes=3, batch_norm='ghost:2')
    optimizer = optimizers.create('sgd', momentum=0.9, weight_decay=0.1)
    state = train_state.create(model, optimizer, (8, 8, 3))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, BATCH // 2, 8, 8, 3), np.uint8)
    labels = rng.integers(0, 3, (2, BATCH // 2), np.int32)

    @functools.cache
    def run(statistics, num_microbatches=2, num_parts=1):
        spec = steps.StepSpec(
            model, optimizer, steps.Normalize((128.0,) * 3, (64.0,) * 3), (8, 8, 3), BATCH,
            num_microbatches, num_parts=num_parts, statistics=statistics,
        )  # fmt: skip
        batch = {'image': images, 'label': labels}
        if num_parts > 1:
            size = BATCH // 2 // num_parts
            parts = [slice(k * size, (k + 1) * size) for k in range(num_parts)]
            batch = [{key: x[:, part] for key, x in batch.items()} for part in parts]
        copy = jax.tree.map(jnp.array, state)
        step = steps.compile_step(spec)
        new, sums = step(copy, batch, np.float32(0.1), np.uint32(BATCH))
        return jax.device_get((new.params, sums))

    def grads():
        """Mean gradients of the microbatches, one after the other."""

        @jax.jit
        @jax.grad
        def gradient(params, images, labels):
            normalised = (images.astype(np.float32) - 128) / 64
            variables = {'params': params, 'batch_stats': state.batch_stats}
            logits, _ = model.apply(variables, normalised, train=True, mutable=['batch_stats'])
            return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels])

        parts = [(device, half) for device in (0, 1) for half in (slice(0, 4), slice(4, 8))]
        all_ = [gradient(state.params, images[d, h], labels[d, h]) for d, h in parts]
        return jax.tree.map(lambda *g: jnp.stack(g), *all_)

    run.grads = functools.cache(grads)
    return run


def test_the_step_measures_the_gradients_of_its_microbatches_before_weight_decay(trained):
    _, sums = trained('norms')
    expected = gradient_statistics.from_groups(trained.grads(), BATCH // 4)
    assert sums['variance'] == pytest.approx(float(expected.variance), rel=1e-3)
    assert sums['squared_gradient'] == pytest.approx(float(expected.squared_gradient), rel=1e-3)


@pytest.mark.parametrize('num_microbatches, groups', [(1, 1), (8, 8), (12, 6), (16, 8), (11, 11)])
def test_groups_are_as_many_as_divide_the_microbatches_up_to_eight_or_each_by_itself(
    num_microbatches, groups
):
    spec = steps.StepSpec(
        None, None, None, (8, 8, 3), 528, num_microbatches, statistics='inner_products'
    )
    assert spec.num_groups == groups


@pytest.mark.parametrize('num_microbatches', [2, 4])  # of each device; 4 are two groups
def test_the_step_measures_inner_products(trained, monkeypatch, num_microbatches):
    monkeypatch.setattr(steps.spec, 'MOST_GROUPS', 2)
    _, sums = trained('inner_products', num_microbatches)
    grads = trained.grads()
    mean = jax.tree.map(lambda g: jnp.mean(g, 0), grads)
    expected = gradient_statistics.inner_products(grads, mean, BATCH // 4)
    assert sums['variance_along'] == pytest.approx(float(expected.along), rel=1e-3)
    assert sums['variance'] == pytest.approx(float(expected.statistics.variance), rel=1e-3)
    assert sums['squared_norm'] == pytest.approx(float(expected.statistics.squared_norm), rel=1e-3)


@pytest.mark.parametrize('statistics', ['norms', 'inner_products'])
def test_measuring_changes_no_weights_and_parts_measure_the_same(trained, statistics):
    params, sums = trained(statistics)
    for leaf, plain in zip(*map(jax.tree.leaves, (params, trained('')[0])), strict=True):
        np.testing.assert_allclose(leaf, plain, rtol=1e-4, atol=1e-6)
    in_parts = trained(statistics, num_parts=2)[1]
    for key in set(sums) - {'loss', 'correct', 'count', 'non_finite'}:
        assert in_parts[key] == pytest.approx(sums[key], rel=1e-4)
