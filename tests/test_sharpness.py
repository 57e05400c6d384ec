"""Sharpness, against closed forms."""

import numpy as np
import pytest

from adabatch_jax import sharpness


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
