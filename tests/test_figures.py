"""What is drawn of runs, and how figures have room for it."""

import json

import numpy as np
import pytest
from made_up_runs import analyzed, write_run

from adabatch_jax import comparison, figures, report


def test_an_error_is_drawn_in_percent_by_hours_with_the_band_of_its_seeds(tmp_path):
    for seed in (0, 1):  # errors of 60 and 20, of 55 and 10
        write_run(tmp_path / str(seed), 'x', seed, (10, 50), accuracy=0.8 + 0.1 * seed, seconds=7200.0)
    (axes,) = report.page([tmp_path / '0', tmp_path / '1']).drawn['error_by_time'].axes
    (line,), (band,) = axes.lines, axes.collections
    assert (axes.get_xlabel(), axes.get_ylabel()) == ('wall time, hours', 'test error, %')
    np.testing.assert_allclose(line.get_xydata(), [(2, 57.5), (4, 15)])
    np.testing.assert_allclose(band.get_paths()[0].get_extents().get_points(), [(2, 10), (4, 60)])
    assert axes.get_yscale() == 'linear'


def test_values_are_spread_where_the_largest_is_many_times_the_smallest_and_all_are_positive():
    values = [], [0.0, 99.0], [1.0, 20.0], [1.0, 21.0]
    assert [report.is_spread(v) for v in values] == [False, False, False, True]


def test_batch_sizes_and_rates_hold_from_stage_to_stage_and_transitions_are_marked(tmp_path):
    """A rate is that of the last update before a transition, and of the first one after it."""
    file = write_run(tmp_path / 'run', sizes=(10, 50)) / 'metrics.jsonl'

    def group():
        return comparison.Group('run', (comparison.read_run(tmp_path / 'run'),))

    def points(y):
        line = report.stepped(group(), y)
        return [*zip(line.x, line.y, strict=True)]

    assert points('batch_size') == [(0, 10), (1, 50), (2, 50)]
    assert points('learning_rate') == [(0, 1), (1, 1), (1, 5), (2, 5)]
    assert report.curve(group(), 'eval', 'epoch', 'error', marked=True).marked == [1]
    file.write_text(file.read_text().replace('"learning_rate": 1.0', '"learning_rate": 0.0'))
    assert points('learning_rate') == [(1, 5), (2, 5)]  # of a logarithmic axis 0 is no part


def test_the_noise_scale_is_drawn_by_epochs(tmp_path):
    page = report.page([write_run(tmp_path / 'run')])
    (axes,) = page.drawn['noise_scale_by_epoch'].axes
    assert axes.get_xlabel() == 'epochs' and axes.lines[0].get_xydata().tolist() == [[2, 15]]


def test_suboptimality_is_the_objective_above_its_least_value(tmp_path):
    folder = write_run(tmp_path / 'run', sizes=(10, 10, 10))
    lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    for record, objective in zip(
        (r for r in lines if r['kind'] == 'eval'), (0.75, 0.5 + 1e-3, 0.5 - 1e-9), strict=True
    ):
        record |= {'objective': objective, 'gradient_evaluations': 3 * record['examples_seen']}
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in lines))
    analyzed(folder, 30, 1.0, optimum=0.5)
    x, y = comparison.read_run(folder).curve('eval', 'gradient_evaluations', 'suboptimality')
    assert list(x) == [300, 600, 900]
    assert list(y) == pytest.approx([0.25, 1e-3, comparison.RESOLUTION])
    (axes,) = report.page([folder]).drawn['suboptimality_by_gradients'].axes
    assert axes.get_yscale() == 'log'


def test_every_group_has_its_label_and_a_legend_its_room():
    names = ['_hidden', '$5_to_$10', *(f'{k}: ' + 'a label of many words, ' * 8 for k in range(12))]
    drawn = [figures.Line(name, [1, 2], [k + 1.0, k + 2.0]) for k, name in enumerate(names)]
    figure = figures.lines(drawn, 'x', 'y', log_y=True)
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(texts) == 14 and texts[0].strip() == '_hidden' and texts[1] == r'\$5_to_\$10'
    assert max(len(line) for text in texts for line in text.splitlines()) <= 60
    figures.svg(figure)  # lays it out
    assert figure.axes[0].get_window_extent().height > figure.dpi


@pytest.mark.parametrize(
    'low, high', [(0.103, 2.85), (1.86, 88.3), (0.0023, 0.058), (2.0, 5.0), (5.8, 18.0), (1, 1e5)]
)
def test_a_logarithmic_axis_has_two_numbers_at_least(low, high):
    figure = figures.lines([figures.Line('a', [1, 2], [low, high])], 'x', 'y', log_y=True)
    figures.svg(figure)
    axis = figure.axes[0].yaxis
    bottom, top = figure.axes[0].get_ylim()
    ticks = [
        (t.get_loc(), t.label1.get_text()) for t in [*axis.get_major_ticks(), *axis.get_minor_ticks()]
    ]
    assert len([text for at, text in ticks if text and bottom <= at <= top]) >= 2
