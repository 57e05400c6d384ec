"""The shared convolution against the plain operation: values and both gradients."""

import functools
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from adabatch_jax.models import conv


def with_gradients(function, x, w, stride, padding):
    """Values of a convolution, and its gradients for one and the same cotangent."""

    @jax.jit
    def all_of(x, w):
        y, vjp = jax.vjp(lambda x, w: function(x, w, (stride, stride), padding), x, w)
        return y, *vjp(jnp.sin(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape))

    return all_of(x, w)


@functools.lru_cache(1)  # both settings of a case are compared with it
def plain_operation(stride, kernel, padding, shape):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=shape), jnp.float32)
    w = jnp.asarray(rng.normal(size=(kernel, kernel, shape[-1], 6)), jnp.float32)
    return x, w, with_gradients(conv._convolve, x, w, stride, padding)


@pytest.mark.parametrize(
    'group_pixels, chunk_sum, fewest_for_matrix', [(2**16, 2**12, 64), (2**10, 2**4, 1)]
)
@pytest.mark.parametrize('stride', [1, 2, 4])
@pytest.mark.parametrize('kernel, padding', [(1, 0), (3, 1), (3, 0), (5, 2), (11, 5)])
@pytest.mark.parametrize(
    'shape', [(3, 16, 16, 3), (16, 12, 13, 8), (37, 11, 12, 4), (5, 4, 6, 16), (21, 20, 22, 4)]
)
def test_values_and_gradients_are_those_of_the_plain_operation(
    stride, kernel, padding, shape, group_pixels, chunk_sum, fewest_for_matrix, monkeypatch
):
    monkeypatch.setattr(conv, '_GROUP_PIXELS', group_pixels)  # the smaller: several groups and chunks
    monkeypatch.setattr(conv, '_CHUNK_SUM', chunk_sum)
    monkeypatch.setattr(conv, '_FEWEST_FOR_MATRIX', fewest_for_matrix)
    x, w, expected = plain_operation(stride, kernel, padding, shape)

    def ours(x, *args):
        return conv.leave(conv._convolve_groups(conv.enter(x), *args))

    for got, plain in zip(with_gradients(ours, x, w, stride, padding), expected, strict=True):
        assert got.dtype == plain.dtype
        scale = np.abs(plain).max()
        np.testing.assert_allclose(got / scale, plain / scale, atol=2e-5)


@pytest.mark.parametrize('chunk_sum', [2**12, 2**4])
@pytest.mark.parametrize('stride, kernel, padding', [(1, 3, 1), (2, 3, 1), (1, 1, 0), (2, 5, 2)])
def test_second_derivatives_are_those_of_the_plain_operation(
    stride, kernel, padding, chunk_sum, monkeypatch
):
    monkeypatch.setattr(conv, '_CHUNK_SUM', chunk_sum)
    rng = np.random.default_rng(0)
    x, dx = (jnp.asarray(rng.normal(size=(9, 8, 7, 3)), jnp.float32) for _ in range(2))
    w, dw = (jnp.asarray(rng.normal(size=(kernel, kernel, 3, 4)), jnp.float32) for _ in range(2))

    def product(function):
        loss = lambda x, w: jnp.sum(jnp.sin(function(x, w, (stride, stride), padding)))  # noqa: E731
        _, to_second = jax.vjp(jax.grad(loss, (0, 1)), x, w)
        return to_second((dx, dw))

    def ours(x, *args):
        return conv.leave(conv._convolve_groups(conv.enter(x), *args))

    for got, plain in zip(product(ours), product(conv._convolve), strict=True):
        np.testing.assert_allclose(got, plain, atol=1e-5 * np.abs(plain).max())


@pytest.mark.parametrize(
    'kernel, channels, features, columns',
    [(3, 3, 16, 4), (3, 16, 16, 4), (3, 24, 32, 2), (5, 8, 8, 8), (11, 16, 12, 4), (3, 5, 5, 16)],
)
def test_columns_that_are_taken_for_one_give_what_the_plain_operation_gives(
    kernel, channels, features, columns
):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(5, 12, 16, channels)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(kernel, kernel, channels, features)), jnp.float32)

    def ours(x, w, strides, padding):
        return conv._convolve_columns(x, w, padding, columns)

    plain = with_gradients(conv._convolve, x, w, 1, kernel // 2)
    for got, expected in zip(with_gradients(ours, x, w, 1, kernel // 2), plain, strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    'dtype, kernel, stride, padding, channels, features, columns',
    [
        ('bfloat16', 3, 1, 1, 3, 16, 4),
        ('bfloat16', 3, 1, 1, 24, 32, 2),
        ('bfloat16', 5, 1, 2, 8, 8, 8),
        ('bfloat16', 3, 1, 1, 5, 5, 8),  # 12 columns of 16 would leave a rest
        ('bfloat16', 3, 1, 1, 16, 33, 1),  # many channels
        ('bfloat16', 3, 1, 0, 16, 16, 1),  # the output has other columns
        ('bfloat16', 3, 2, 1, 16, 16, 1),
        ('bfloat16', 1, 1, 0, 16, 16, 1),
        ('float32', 3, 1, 1, 3, 16, 1),  # of which no gain was seen
    ],
)
def test_a_gpu_takes_columns_of_few_channels_for_one(
    dtype, kernel, stride, padding, channels, features, columns, monkeypatch
):
    monkeypatch.setattr(conv, '_wastes_channels', lambda: True)
    x = jnp.zeros((5, 12, 16, channels), dtype)
    w = jnp.zeros((kernel, kernel, channels, features), dtype)
    program = jax.make_jaxpr(lambda x, w: conv._convolve(x, w, (stride, stride), padding))(x, w)
    seen = [e.invars[0].aval.shape for e in program.eqns if e.primitive is lax.conv_general_dilated_p]
    assert seen == [(5, 12, 16 // columns, channels * columns)]


@pytest.mark.parametrize(
    'kernel, stride, padding, height, width, channels, seen_by_kernel',
    [
        (7, 2, 3, 16, 16, 3, (11, 11, 12)),  # ResNet's: 2 blocks before, 1 behind
        (11, 4, 2, 23, 20, 3, (8, 7, 48)),
        (11, 4, 5, 16, 18, 1, (7, 8, 16)),
        (3, 2, 1, 9, 8, 4, (6, 5, 16)),
        (3, 2, 1, 9, 8, 5, (11, 10, 5)),  # more channels than an image has: as it is
    ],
)
def test_a_gpu_strides_over_images_by_blocks_and_gives_what_the_plain_operation_gives(
    kernel, stride, padding, height, width, channels, seen_by_kernel, monkeypatch
):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(-2, 3, (5, height, width, channels)), 'bfloat16')  # sums are exact
    w = jnp.asarray(rng.integers(-1, 2, (kernel, kernel, channels, 6)), 'bfloat16')

    def all_of(x, w):
        y, vjp = jax.vjp(lambda x, w: conv._convolve(x, w, (stride, stride), padding), x, w)
        return y, *vjp((jnp.arange(y.size) % 5 - 2).reshape(y.shape).astype(y.dtype))

    expected = all_of(x, w)
    monkeypatch.setattr(conv, '_wastes_channels', lambda: True)
    for got, plain in zip(all_of(x, w), expected, strict=True):
        np.testing.assert_array_equal(got, plain)
    program = jax.make_jaxpr(lambda x, w: conv._convolve(x, w, (stride, stride), padding))(x, w)
    [seen] = [e for e in program.eqns if e.primitive is lax.conv_general_dilated_p]
    _, *sizes, seen_channels = seen.invars[0].aval.shape
    padded = (n + sum(pads) for n, pads in zip(sizes, seen.params['padding'], strict=True))
    assert (*padded, seen_channels) == seen_by_kernel


@pytest.mark.parametrize(
    'backend, capability, expected',
    [('gpu', '9.0', True), ('gpu', '10.0', True), ('gpu', '8.6', False), ('gpu', 'gfx942', False)]
    + [('gpu', None, False), ('tpu', None, False), ('cpu', None, False)],
)
def test_columns_are_taken_for_one_on_gpus_where_that_was_seen_to_be_faster(
    backend, capability, expected, monkeypatch
):
    device = types.SimpleNamespace(**({'compute_capability': capability} if capability else {}))
    monkeypatch.setattr(jax, 'default_backend', lambda: backend)
    monkeypatch.setattr(jax, 'devices', lambda: [device])
    assert conv._wastes_channels() == expected


def test_layer_is_flax_convolution_with_the_same_parameters():
    x = jax.random.normal(jax.random.PRNGKey(1), (2, 9, 9, 3))
    ours = conv.Conv(5, (3, 3), (2, 2), padding=1)
    theirs = nn.Conv(5, (3, 3), (2, 2), padding=1)
    key = jax.random.PRNGKey(0)
    variables = ours.init(key, conv.enter(x))
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, theirs.init(key, x))
    y = conv.leave(ours.apply(variables, conv.enter(x)))
    np.testing.assert_allclose(y, theirs.apply(variables, x), atol=1e-6)


def test_gradients_stay_in_the_layout_that_the_cpu_compiler_knows():
    """Every convolution of a backward pass is NHWC/HWIO, inside the loop over chunks too."""
    layer = conv.Conv(8, (3, 3), padding=1)
    x = conv.enter(jnp.zeros((40, 8, 8, 4)))
    variables = layer.init(jax.random.PRNGKey(0), x)
    gradient = jax.make_jaxpr(jax.grad(lambda v, x: layer.apply(v, x).sum(), (0, 1)))(variables, x)

    def convolutions(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive is lax.conv_general_dilated_p:
                yield eqn.params['dimension_numbers']
            for value in eqn.params.values():
                inner = getattr(value, 'jaxpr', None)
                if inner is not None:
                    yield from convolutions(inner)

    found = set(convolutions(gradient.jaxpr))
    canonical = lax.conv_dimension_numbers((1,) * 4, (1,) * 4, ('NHWC', 'HWIO', 'NHWC'))
    assert found == {canonical}


def test_what_convolutions_read_is_computed_once():
    """Forward pass, input gradient and kernel gradient take their operands in one shape."""
    x = conv.enter(jnp.zeros((128, 32, 32, 24)))
    assert len(x) == 2  # groups
    layers = [conv.Conv(24, (3, 3), padding=1, use_bias=False) for _ in range(2)]
    kernels = [layer.init(jax.random.PRNGKey(1), x) for layer in layers]

    def loss(kernels):
        hidden = nn.relu(2 * layers[0].apply(kernels[0], x))
        return jnp.sum(jnp.sin(layers[1].apply(kernels[1], hidden)))

    program = jax.jit(jax.grad(loss)).lower(kernels).compile().as_text()
    # ReLU is what the second convolution reads, the cosine what its two gradients read.
    assert (program.count(' maximum('), program.count(' cosine(')) == (1, 1)
