"""Runs put together: of which seeds, and how far."""

import numpy as np
import pytest
from test_report import write_run

from adabatch_jax import comparison


def test_a_mean_curve_ends_where_the_shortest_run_does(tmp_path):
    write_run(tmp_path / 'a', seed=0, sizes=(10, 10, 10))
    write_run(tmp_path / 'b', seed=1, sizes=(10, 10), finished=False)
    (group,) = comparison.group([comparison.read_run(tmp_path / name) for name in 'ab'])
    x, *_ = group.curve('eval', 'epoch', 'error')
    np.testing.assert_allclose(x, [1, 2])
    (row,) = comparison.comparison_rows([group])
    assert row['epochs'] == 3 and row['finished'] == 1


def evaluated(folder, ends, slope):
    """A run that was evaluated after so many examples, its loss a line through 1 at none."""
    records = [
        {'kind': 'eval', 'step': n, 'examples_seen': n, 'epoch': n / 100, 'loss': 1 - slope * n}
        for n in ends
    ]
    return comparison.Run(folder, {}, records, ())


@pytest.mark.parametrize('first', [0, 1])
def test_seeds_whose_epochs_end_after_other_numbers_of_examples_have_their_whole_curve(tmp_path, first):
    runs = [
        evaluated(tmp_path, (100, 203, 304), slope=0.001),
        evaluated(tmp_path, (102, 200, 300), slope=0.002),
    ]
    group = comparison.Group('both', (runs[first], runs[1 - first]))
    epoch, mean, low, high = group.curve('eval', 'epoch', 'loss')
    expected = [1.02, (2.03, 2.0)[first], 3.0]
    np.testing.assert_allclose(epoch, expected)
    for found, slope in ((mean, 0.0015), (low, 0.002), (high, 0.001)):
        np.testing.assert_allclose(found, 1 - 100 * slope * np.array(expected))


def test_seeds_that_have_no_position_in_common_have_no_mean_curve(tmp_path):
    runs = evaluated(tmp_path, (100, 200), 0.001), evaluated(tmp_path, (300, 400), 0.001)
    assert not len(comparison.Group('both', runs).curve('eval', 'epoch', 'loss')[0])


def test_of_the_minima_that_were_measured_a_run_has_that_of_its_latest_checkpoint(tmp_path):
    measured = ({'step': 5, 'optimum': 0.1}, {'step': 9, 'optimum': 0.2})
    assert comparison.Run(tmp_path, {}, [], (), measured).minimum['step'] == 9
