"""Runs put together: of which seeds, how far, and what tells groups apart."""

import json

import numpy as np
import pytest
from made_up_runs import analyzed, control_and_adaptive, write_run

from adabatch_jax import comparison, figures, report, workdir
from adabatch_jax.config import ConfigError, default_config, resolve, to_json


@pytest.fixture
def runs(tmp_path):
    return control_and_adaptive(tmp_path)


def test_seeds_of_a_config_are_one_group_named_by_what_differs(runs):
    groups = comparison.group([comparison.read_run(folder) for folder in runs])
    assert [(g.label, len(g.runs)) for g in groups] == [('fixed', 2), ('adabatch', 3)]


def test_how_a_run_was_carried_out_makes_no_group_of_its_own(tmp_path):
    folders = [write_run(tmp_path / str(k), seed=k) for k in range(2)]
    for k, folder in enumerate(folders):
        config = json.loads((folder / 'config.json').read_text())
        config['compile'], config['dataset'] = {'cache_dir': str(k)}, {'data_dir': str(k)}
        config['log_every_steps'] = 1 + k
        (folder / 'config.json').write_text(json.dumps(config))
    assert len(comparison.group([comparison.read_run(folder) for folder in folders])) == 1


def test_runs_of_which_nothing_is_known_are_no_seeds_of_one_another(tmp_path):
    for name in 'ab':
        (write_run(tmp_path / name) / 'config.json').unlink()
    groups = comparison.group([comparison.read_run(tmp_path / name) for name in 'ab'])
    assert [group.label for group in groups] == ['a', 'b']


def test_other_data_are_no_other_seed(tmp_path):
    folders = [write_run(tmp_path / str(k), seed=k) for k in range(2)]
    for name, groups in (('cifar10', 1), ('npz', 2)):
        for k, folder in enumerate(folders):
            config = json.loads((folder / 'config.json').read_text())
            config['dataset'] = {'name': name, 'data_dir': str(k)}
            (folder / 'config.json').write_text(json.dumps(config))
        assert len(comparison.group([comparison.read_run(folder) for folder in folders])) == groups


def test_labels_leave_out_the_settings_of_other_optimizers(tmp_path):
    for name, changes in {
        'a': {'optimizer.name': 'sgd'},
        'b': {'optimizer.name': 'svrg', 'optimizer.svrg.first_size': 64},
        'c': {'optimizer.name': 'dynasaga', 'optimizer.saga.first_size': 8},
    }.items():
        config = default_config()
        config.update_from_flattened_dict(changes)
        (tmp_path / name).mkdir()
        (tmp_path / name / 'config.json').write_text(to_json(config))
        (tmp_path / name / 'metrics.jsonl').write_text('')
    groups = comparison.group([comparison.read_run(tmp_path / name) for name in 'abc'])
    assert [group.label for group in groups] == ['sgd', 'svrg, first size 64', 'dynasaga, first size 8']


def test_labels_leave_out_what_follows_from_another_setting(tmp_path):
    for name, changes in {
        'a': {},
        'b': {'batch.policy': 'adabatch', 'batch.max_size': 2048, 'batch.growth_epochs': 5.0},
    }.items():
        config = default_config()
        config.update_from_flattened_dict({'batch.policy': 'fixed', **changes})
        (tmp_path / name).mkdir()
        (tmp_path / name / 'config.json').write_text(to_json(resolve(config)))
        (tmp_path / name / 'metrics.jsonl').write_text('')
    labels = [g.label for g in comparison.group([comparison.read_run(tmp_path / name) for name in 'ab'])]
    assert labels[1] == 'adabatch, growth epochs 5.0, max size 2048'


def test_curves_are_means_over_seeds_with_their_range(runs):
    _, adaptive = comparison.group([comparison.read_run(folder) for folder in runs])
    x, mean, low, high = adaptive.curve('eval', 'epoch', 'error')
    np.testing.assert_allclose(x, [1, 2])
    np.testing.assert_allclose(mean, [1 - 0.455, 1 - 0.91])
    np.testing.assert_allclose(low, [1 - 0.46, 1 - 0.92])
    np.testing.assert_allclose(high, [1 - 0.45, 1 - 0.90])
    x, mean, *_ = adaptive.curve('eval', 'time', 'error')  # from 5, 6, 7 to 10, 12, 14 seconds
    np.testing.assert_allclose(x, [6, 12])
    np.testing.assert_allclose(mean, [1 - 0.455, 1 - 0.91])  # no seed's end is lost


def test_the_noise_scale_is_left_out_where_it_was_estimated_as_negative(runs):
    run = comparison.read_run(runs[-1])
    np.testing.assert_allclose(run.curve('train', 'epoch', 'noise_scale'), [[2.0], [15.0]])


def test_a_mean_curve_ends_where_the_shortest_run_does(tmp_path):
    write_run(tmp_path / 'a', seed=0, sizes=(10, 10, 10))
    write_run(tmp_path / 'b', seed=1, sizes=(10, 10), finished=False)
    (group,) = comparison.group([comparison.read_run(tmp_path / name) for name in 'ab'])
    x, *_ = group.curve('eval', 'epoch', 'error')
    np.testing.assert_allclose(x, [1, 2])
    (row,) = comparison.comparison_rows([group])
    assert row['epochs'] == 3 and row['finished'] == 1


def test_files_are_found_from_home(tmp_path, monkeypatch):
    write_run(tmp_path / 'run')
    (tmp_path / 'times.json').write_text('{}')
    monkeypatch.setenv('HOME', str(tmp_path))
    assert report.page(['~/run']).num_runs == 1 and workdir.read_config('~/run')
    with pytest.raises(ConfigError, match='--benchmark: no figures of'):
        report.page(['~/run'], '~/times.json')


def test_the_seconds_of_probes_are_training_of_the_run_that_needs_them(tmp_path):
    write_run(tmp_path / 'fixed', sizes=(10, 10), seconds=10.0)
    folder = write_run(tmp_path / 'probing', 'critical_batch', sizes=(10, 50), seconds=6.0)
    file = folder / 'metrics.jsonl'
    records = [json.loads(line) for line in file.read_text().splitlines()]
    records[-1] |= {'probe_seconds': 4.0}
    file.write_text(''.join(json.dumps(record) + '\n' for record in records))
    groups = comparison.group([comparison.read_run(tmp_path / name) for name in ('fixed', 'probing')])
    fixed, probing = comparison.comparison_rows(groups)
    assert fixed['train_seconds'].mean == 2 * 10
    assert probing['train_seconds'].mean == 2 * 6 + 4
    assert probing['epoch_seconds'].mean == (2 * 6 + 4) / 2
    assert probing['speedup'] == 20 / 16
    assert 'probes' in report.comparison_table(groups).note


def test_a_later_group_is_told_by_its_difference_from_the_first(tmp_path):
    write_run(tmp_path / 'a', seconds=10.0, accuracy=0.9)
    write_run(tmp_path / 'b', 'plateau', sizes=(50, 10, 20), seconds=5.0, accuracy=0.8)
    groups = comparison.group([comparison.read_run(tmp_path / name) for name in 'ab'])
    first, later = comparison.comparison_rows(groups)
    assert (first['wall_seconds'].mean, later['wall_seconds'].mean) == (1.5 * 20, 1.5 * 15)
    assert later['wall_speedup'] == 20 / 15
    assert later['accuracy_difference'] == pytest.approx(-0.1)
    assert later['batch_sizes'] == (10, 50)


def test_the_accuracy_of_a_run_is_that_of_its_end():
    summary = {'kind': 'summary', 'updates': 1, 'wall_seconds': 1.0, 'train_seconds': 1.0}
    summary |= {'final_accuracy': 0.7, 'best_accuracy': 0.8}
    run = comparison.Run(None, {}, [summary], ())
    (row,) = comparison.comparison_rows([comparison.Group('a', (run,))])
    assert row['accuracy'].mean == 0.7 and row['epoch_seconds'] is None  # at no epoch


def test_a_stage_begins_where_it_was_entered_first_and_has_its_last_loss_and_median_speed():
    def record(kind, stage, step, **fields):
        return {'kind': kind, 'stage': stage, 'step': step, 'epoch': step / 10, **fields}

    def trained(stage, step, loss, speed):
        return record('train', stage, step, loss=loss, examples_per_second=speed)

    first, second = (record('stage', k, 10 * k, reason='why') for k in (0, 1))
    rows = comparison.stage_rows(
        [first, trained(0, 4, 4.0, 10.0), record('stage', 0, 4, reason='continued: why')]
        + [trained(0, 7, 3.0, 60.0), trained(0, 10, 2.0, 20.0), second, trained(1, 16, 1.0, None)]
    )
    of_stages = {'updates': (10, 6), 'end_epoch': (1.0, 1.6), 'loss': (2.0, 1.0)}
    of_stages |= {'images_per_second': (20.0, None), 'reason': ('why', 'why')}
    assert {name: tuple(row[name] for row in rows) for name in of_stages} == of_stages


def test_runs_are_compared_with_one_that_learnt_nothing_and_of_no_time_only_the_quotient_is_unknown(
    tmp_path,
):
    write_run(tmp_path / 'a', accuracy=0.0)
    write_run(tmp_path / 'b', 'adabatch', accuracy=0.25, seconds=0.5)
    write_run(tmp_path / 'c', 'plateau', accuracy=0.5, seconds=1e-9)
    file = tmp_path / 'c' / 'metrics.jsonl'
    file.write_text(file.read_text().replace('"train_seconds": 2e-09', '"train_seconds": 0'))
    runs = [comparison.read_run(tmp_path / name) for name in 'abc']
    rows = comparison.comparison_rows(comparison.group(runs))
    assert [row['accuracy_difference'] for row in rows] == [0.0, 0.25, 0.5]
    assert [row['speedup'] for row in rows] == [1.0, 20.0, None]


def test_one_run_is_one_and_one_example_too(tmp_path, capsys):
    folder, out = write_run(tmp_path / 'a', sizes=(1000,)), tmp_path / 'page.html'
    analyzed(folder, 1, 2.0)
    file = folder / 'analysis.jsonl'
    file.write_text(file.read_text().replace('7000', '1').replace('40', '1'))
    assert report.main(['report', str(folder), f'--out={out}']) == 0
    assert capsys.readouterr().out == f'{out}: 1 run\n'
    text = out.read_text()
    assert 'in 1 dimension<' in text and 'on 1 fixed training example;' in text and '1 x 1,000' in text


ONE = {'device': 'cpu', 'num_devices': 1, 'versions': {'jax': '0.10.1', 'numpy': '2'}}


def on(folder, *sessions, policy='fixed', seed=0, **config):
    """A made-up run of sessions on these machines, the second from the end of the first epoch on."""
    write_run(folder, policy, seed=seed, sizes=(10, 10, 10))
    described = json.loads((folder / 'config.json').read_text()) | config
    (folder / 'config.json').write_text(json.dumps(described))
    file = folder / 'metrics.jsonl'
    first, *records = (json.loads(line) for line in file.read_text().splitlines())
    records.insert(0, first | sessions[0])
    for later in sessions[1:]:
        (at,) = (k for k, r in enumerate(records) if (r['kind'], r['step']) == ('eval', 10))
        records.insert(at + 1, records[at] | {'kind': 'session'} | later)
    file.write_text(''.join(json.dumps(record) + '\n' for record in records))
    return folder


@pytest.mark.parametrize(
    'what, there, shown',
    [
        ('kind of device', {'device': 'NVIDIA H100'}, ('cpu', 'NVIDIA H100')),
        ('number of devices', {'num_devices': 4}, ('1', '4')),
        ('version of jax', {'versions': {'jax': '0.11.0'}}, ('0.10.1', '0.11.0')),
    ],
)
def test_times_of_unlike_machines_are_told_in_a_line(tmp_path, what, there, shown):
    a, b, c, d = (tmp_path / name for name in 'abcd')
    on(a, ONE)
    on(b, ONE | there, seed=1)
    on(c, ONE, policy='adabatch')
    on(d, ONE, ONE | there)
    line = f'times are not of the same {what}: {shown[0]} in {{}}; {shown[1]} in {{}}'
    assert report.page([a, b]).notes == [line.format(a, b)]  # seeds of a group
    assert report.page([b, c]).notes == [
        f'times are not of the same {what}: {shown[1]} in {b}; {shown[0]} in {c}'
    ]
    again = (
        f'{d}: taken up again 1 time; its times have a set-up each time, and nothing of what was lost'
    )
    assert report.page([d]).notes == [
        f'{again} by a kill',
        line.format(d, d),
    ]  # its parts here and there
    assert report.page([a, c]).notes == []


@pytest.mark.parametrize(
    'key, by_default, other',
    [
        ('compile.quick', False, True),
        ('compile.precompile', True, False),
        ('compile.updates_per_dispatch', 0, 15),
        ('dataset.pipeline', 'auto', 'tf_data'),
    ],
)
def test_runs_that_were_carried_out_in_another_way_are_told(tmp_path, key, by_default, other):
    section, _, name = key.partition('.')
    a = on(tmp_path / 'a', ONE)  # of a version that did not have the key
    b = on(tmp_path / 'b', ONE, seed=1, **{section: {name: other}})
    line = f'times are not of the same {key}: {by_default} in {a}; {other} in {b}'
    assert report.page([a, b]).notes == [line]


def test_the_run_of_a_group_that_stands_for_all_has_come_farthest(tmp_path):
    whole, unfinished = (write_run(tmp_path / name, seed=k) for k, name in enumerate(('whole', 'begun')))
    file = unfinished / 'metrics.jsonl'
    file.write_text(''.join(line + '\n' for line in file.read_text().splitlines()[:2]))
    page = report.page([unfinished, whole])
    (stages,) = (table for table in page.tables if table.title.startswith('Stages'))
    assert stages.title.endswith(f', of 2 seeds {whole}')
    for name in ('batch_size_by_epoch', 'learning_rate_by_epoch'):
        (axes,) = page.drawn[name].axes
        assert max(axes.lines[0].get_xdata()) == 2.0


def test_an_axis_is_not_logarithmic_where_a_band_reaches_zero():
    points = 'a', [1, 2], [50.0, 0.5]
    assert report.is_wide([figures.Line(*points), None])
    assert not report.is_wide([figures.Line(*points, low=[50.0, 0.0], high=[50.0, 1.0]), None])


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


def test_a_mean_curve_is_that_of_the_runs_that_have_begun(tmp_path):
    runs = evaluated(tmp_path, (), 0.001), evaluated(tmp_path, (100, 200), 0.001)
    epoch, mean, *_ = comparison.Group('both', runs).curve('eval', 'epoch', 'loss')
    np.testing.assert_allclose((epoch, mean), [(1, 2), (0.9, 0.8)])


def test_of_the_minima_that_were_measured_a_run_has_that_of_its_latest_checkpoint(tmp_path):
    measured = ({'step': 5, 'optimum': 0.1}, {'step': 9, 'optimum': 0.2})
    assert comparison.Run(tmp_path, {}, [], (), measured).minimum['step'] == 9
