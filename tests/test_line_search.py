"""Step sizes on quadratics, where the right ones are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adabatch_jax import line_search

H = jnp.array([1.0, 4.0, 0.25])
X = {'w': jnp.array([1.0, -2.0, 3.0])}


def loss(x):
    return 0.5 * jnp.sum(H * x['w'] ** 2)


def search(start, direction=None):
    gradient = jax.grad(loss)(X)
    direction = direction or jax.tree.map(jnp.negative, gradient)
    slope = jnp.vdot(gradient['w'], direction['w'])
    size, is_found, _ = jax.jit(line_search.armijo, static_argnums=0)(loss, X, direction, slope, start)
    assert is_found == (slope < 0)
    return float(size)


@pytest.mark.parametrize('start', [0.01, 1.0, 100.0])
def test_armijo_takes_the_first_half_that_decreases_enough(start):
    """For a quadratic along d: l + a s + a^2 d'Hd / 2 <= l + c a s where a <= 2 (1 - c) |s| / d'Hd."""
    g = np.asarray(H * X['w'])
    largest = 2 * 0.9 * (g @ g) / (g @ (np.asarray(H) * g))
    halvings = max(0, int(np.ceil(np.log2(start / largest))))
    assert search(start) == pytest.approx(start / 2**halvings)


def test_armijo_gives_up_uphill_and_where_the_loss_is_not_finite():
    assert search(1.0, {'w': H * X['w']}) < 1e-6
    for nowhere in (lambda x: x['w'][0] * jnp.nan, lambda x: 1.0 + 0 * x['w'][0]):
        size, is_found, then = line_search.armijo(nowhere, X, X, jnp.float32(-1.0), jnp.float32(1.0))
        assert size == 2.0**-30 and not is_found and then == 1.0


def test_armijo_takes_no_step_that_it_has_not_tried_and_comes_down_to_the_right_ones():
    """Of ``x**2`` at 1 steps of up to (1 - c) along its gradient will do: from 2^40, the 41st half."""
    x, square = jnp.float32(1.0), lambda x: x**2
    size, is_found, then = line_search.armijo(square, x, -2 * x, -4 * x, 2.0**40)
    assert size == 0 and not is_found and then == 2.0**10
    size, is_found, then = line_search.armijo(square, x, -2 * x, -4 * x, then)
    assert size == then == 0.5 and is_found


@pytest.mark.parametrize('fraction', [0.25, 1.0])
def test_barzilai_borwein_finds_the_inverse_curvature_along_an_eigenvector(fraction):
    step = {'w': jnp.array([0.0, 0.3, 0.0])}
    change = {'w': H * step['w']}
    size = line_search.barzilai_borwein(step, change, 0.1, 0.0, fraction)
    assert size == pytest.approx(0.1 * (1 - fraction) + fraction / 4.0)
    noisy = line_search.barzilai_borwein(step, change, 0.1, 0.5, fraction)
    assert noisy == pytest.approx(0.1 * (1 - fraction) + 0.5 * fraction / 4.0)


def test_barzilai_borwein_with_the_whole_data_set_solves_one_dimension_in_one_step():
    step = jnp.array([0.3])
    size = line_search.barzilai_borwein(step, 5.0 * step, jnp.float32(0.1), 0.0, 1.0)
    x = jnp.array([7.0])
    assert x - size * 5.0 * x == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize('sign, noise', [(-1.0, 0.0), (0.0, 0.0), (1.0, 1.5)])
def test_barzilai_borwein_keeps_its_size_without_curvature_or_signal(sign, noise):
    step = {'w': jnp.ones(3)}
    change = {'w': sign * jnp.ones(3)}
    assert line_search.barzilai_borwein(step, change, jnp.float32(0.1), noise, 1.0) == pytest.approx(0.1)
    still = line_search.barzilai_borwein({'w': jnp.zeros(3)}, change, jnp.float32(0.1), 0.0, 1.0)
    assert still == pytest.approx(0.1)
