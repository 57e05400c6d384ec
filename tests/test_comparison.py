"""Runs put together: of which seeds, and how far."""

import numpy as np
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


def test_of_the_minima_that_were_measured_a_run_has_that_of_its_latest_checkpoint(tmp_path):
    measured = ({'step': 5, 'optimum': 0.1}, {'step': 9, 'optimum': 0.2})
    assert comparison.Run(tmp_path, {}, [], (), measured).minimum['step'] == 9
