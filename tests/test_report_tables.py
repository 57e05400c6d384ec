"""What reports tell of runs, finished, in progress or broken: tables and notes."""

import json

import pytest
from made_up_runs import analyzed, control_and_adaptive, write_run

from adabatch_jax import comparison, report


@pytest.fixture
def runs(tmp_path):
    return control_and_adaptive(tmp_path)


def test_the_comparison_is_with_the_first_group(runs):
    groups = comparison.group([comparison.read_run(folder) for folder in runs])
    fixed, adaptive = comparison.comparison_rows(groups)
    assert fixed['updates'].mean == 20 and adaptive['updates'].mean == 12
    assert fixed['accuracy_difference'] == 0 and fixed['speedup'] == 1
    assert adaptive['accuracy'] == comparison.Spread(pytest.approx(0.91), 0.9, 0.92, 3)
    assert adaptive['accuracy_difference'] == pytest.approx(0.0)
    assert adaptive['speedup'] == pytest.approx(20 / 12)
    assert adaptive['epoch_seconds'].mean == pytest.approx(6.0)
    assert adaptive['batch_sizes'] == (10, 50)


def test_the_table_has_seconds_of_training_and_two_speed_ups(tmp_path):
    write_run(tmp_path / 'a', accuracy=0.5)
    file = write_run(tmp_path / 'b', 'adabatch', accuracy=0.75, seconds=5.0) / 'metrics.jsonl'
    file.write_text(file.read_text().replace('"wall_seconds": 15.0', '"wall_seconds": 60.0'))
    groups = comparison.group([comparison.read_run(tmp_path / name) for name in 'ab'])
    row = report.comparison_table(groups).rows[1]
    assert row[4:] == ('20', '75.00', '+25.00', '5', '10.0', '2.00', '0.50')


def test_accuracies_on_several_splits_are_called_by_all_of_them(tmp_path):
    folders = [write_run(tmp_path / policy, policy) for policy in ('fixed', 'adabatch')]
    file = folders[1] / 'metrics.jsonl'
    file.write_text(file.read_text().replace('"split": "test"', '"split": "train[:50%]"'))
    groups = comparison.group([comparison.read_run(folder) for folder in folders])
    assert report.comparison_table(groups).columns[5] == 'test or train accuracy, %'
    assert report.comparison_table(groups[1:]).columns[5] == 'train accuracy, %'


def test_stages_are_told_with_compilation_and_stall(runs):
    rows = comparison.stage_rows(comparison.read_run(runs[-1]).records)
    assert [(r['batch_size'], r['updates'], r['end_epoch']) for r in rows] == [
        (10, 10, 1.0),
        (50, 2, 2.0),
    ]
    table = report.stage_table(comparison.Group('a', (comparison.read_run(runs[-1]),)))
    assert table.rows[1][-3:] == ('1.5 (cached)', '0.25', 'why')


def test_minima_are_compared_where_they_were_analyzed(runs):
    for folder, sharpness in zip(runs, (4.0, 6.0, 1.0, 2.0), strict=False):  # the last one was not
        analyzed(folder, 5, 99.0)
        analyzed(folder, 20, sharpness)
    page = report.page(runs)
    (table,) = (table for table in page.tables if table.title == 'Minima')
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    name = 'sharpness, %, epsilon 0.001 in 7,000 dimensions'
    assert [row[name] for row in rows] == ['5 (4 to 6)', '1.5 (1 to 2), 2 of 3 runs']
    eigenvalue = 'largest eigenvalue, Hessian'
    assert [row[eigenvalue] for row in rows] == ['10 (8 to 12)', '3 (2 to 4), 2 of 3 runs']
    assert '40 fixed training examples' in table.note
    (axes,) = page.drawn['sharpness'].axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert drawn == {'fixed': [4.0, 6.0], 'adabatch': [1.0, 2.0]}
    assert axes.get_ylabel().split() == name.split()  # in lines that the figure has room for
    assert 'largest_eigenvalue' in page.drawn
    page = report.page([write_run(runs[0].parent / 'unanalyzed', 'plateau'), *runs])
    (axes,) = page.drawn['sharpness'].axes
    assert [line.get_label() for line in axes.lines] == ['fixed', 'adabatch']


def test_without_an_analysis_nothing_is_said_of_minima(runs):
    page = report.page(runs)
    assert not any(table.title == 'Minima' for table in page.tables)
    assert not {'sharpness', 'largest_eigenvalue', 'suboptimality_by_gradients'} & page.drawn.keys()


def test_a_damaged_analysis_is_left_out(runs):
    (runs[0] / 'analysis.jsonl').write_text('{"kind": "anal')
    assert comparison.read_run(runs[0]).minimum is None
    whole = {'kind': 'analysis', 'step': 1, 'num_examples': 8, 'loss': 1.0}
    sharpness = {'epsilon': 1e-3, 'dimensions': 5, 'value': None}
    damages = (
        {'num_examples': 'x'},
        {'num_examples': None},
        {'step': 'a'},
        {'loss': 10**400},
        {'hessian_trace': 'x'},
        {'hessian_eigenvalues': None},
        {'gauss_newton_eigenvalues': ['x']},
        {'sharpness': [{'epsilon': 1e-3}]},
        {'sharpness': [sharpness | {'epsilon': 'a'}]},
    )
    for damaged in ({'kind': 'analysis', 'loss': 1.0}, *(whole | damage for damage in damages)):
        (runs[0] / 'analysis.jsonl').write_text(json.dumps(damaged) + '\n')
        run = comparison.read_run(runs[0])
        assert run.minimum is None and 'analysis.jsonl, line 1: not a record' in run.skipped
    (runs[0] / 'analysis.jsonl').write_text(json.dumps(whole | {'sharpness': [sharpness]}) + '\n')
    assert comparison.read_run(runs[0]).minimum['sharpness'] == [sharpness]


def test_what_happened_to_a_run_is_among_the_notes(tmp_path, capsys):
    folder = write_run(tmp_path / 'run')
    file = folder / 'metrics.jsonl'
    records = [json.loads(line) for line in file.read_text().splitlines()]
    records[-1] |= {'skipped': 7, 'fall_backs': 1}
    reason = 'continues; schedule changed: num_epochs (1 before, 2 now)'
    end = {key: records[-1][key] for key in ('step', 'epoch', 'examples_seen', 'time')}
    records.insert(-1, records[0] | end | {'reason': reason})
    file.write_text(''.join(json.dumps(record) + '\n' for record in records))
    assert report.main(['report', str(folder), f'--out={tmp_path / "page.html"}']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f'{folder}: epoch 2: {reason}' in lines
    assert f'{folder}: updates skipped: 7, fallen back: 1' in lines
    assert not any('begins' in line for line in lines)


def test_a_session_that_went_on_as_another_run_is_among_the_notes():
    reasons = (
        'continues; schedule changed: num_epochs (1 before, 2 now)',
        'the loss of update 20 is nan: effective learning rate x 0.25',
        'update 20: out of memory; microbatches of at most 5 examples',
    )
    sessions = [
        {'kind': 'session', 'epoch': 2.0, 'reason': reason}
        for reason in ('begins', *reasons, 'continues')
    ]
    group = comparison.Group('run', (comparison.Run('run', {}, sessions, ()),))
    told = [f'run: epoch 2: {reason}' for reason in reasons]
    again = (
        'run: taken up again 4 times; its times have a set-up each time, and nothing of what was lost'
    )
    assert report.notes([group]) == ['run: not finished, at epoch 2', f'{again} by a kill', *told]


def test_runs_of_one_seed_are_told_since_they_are_not_independent(tmp_path, capsys):
    folders = [write_run(tmp_path / f'{k}', seed=seed) for k, seed in enumerate((0, 1, 0))]
    assert report.main(['report', *map(str, folders), f'--out={tmp_path / "page.html"}']) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if 'counts' in line]
    assert told == [f'0: seed 0 counts 2 times: {folders[0]}, {folders[2]}']


def test_a_benchmark_adds_the_table_of_passes(runs, tmp_path):
    rows = [{'batch_size': 10, 'forward': 1.0, 'backward': 1.0, 'both': 1.0}]
    rows.append({'batch_size': 20, 'forward': 1.5, 'backward': None, 'both': 2.0})
    result = {'relative_epochs': rows, 'num_devices': 1, 'device': 'cpu'}
    result['versions'] = {'numpy': '2', 'jax': '1'}
    (tmp_path / 'b.json').write_text(json.dumps(result))
    page = report.page([str(runs[0])], str(tmp_path / 'b.json'))
    assert page.tables[1].rows == [('10', '1.00', '1.00', '1.00'), ('20', '1.50', '-', '2.00')]
    assert page.tables[1].note == 'Measured on 1 x cpu, jax 1, apart from these runs.'


def test_broken_lines_and_runs_in_progress_are_told_and_the_rest_is_shown(runs, tmp_path, capsys):
    running = write_run(tmp_path / 'running', 'plateau', finished=False)
    with open(running / 'metrics.jsonl', 'a') as file:
        file.write('{"kind": "eval", "step": 99, "epoch": 3.0}\nnonsense\n[1]\n{"kind": "train", "st')
    unknown = write_run(tmp_path / 'unknown')
    (unknown / 'config.json').write_text('{')
    out = tmp_path / 'page.html'
    assert report.main(['report', str(runs[0]), str(running), str(unknown), f'--out={out}']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f'{running}: not finished, at epoch 2' in lines
    assert sum('metrics.jsonl, line 10: not a record' in line for line in lines) == 1
    assert any('eval of step 99: without examples_seen, time, loss, accuracy' in line for line in lines)
    assert any('unknown' in line and 'config.json' in line for line in lines)
    text = out.read_text()
    assert '0 of 1' in text and '>unknown<' in text and 'line 10' in text


@pytest.mark.parametrize(
    'kind, key, value',
    [
        ('summary', 'train_seconds', None),
        ('stage', 'epoch', None),
        ('stage', 'learning_rate', None),
        ('stage', 'compile_seconds', 'long'),
        ('eval', 'time', None),
        ('eval', 'accuracy', 'good'),
        ('train', 'batch_size', '16'),
        pytest.param('train', 'loss', 10**400, id='a loss of 401 digits'),
        pytest.param('train', 'step', 10**400, id='a step of 401 digits'),
        ('train', 'gradient_variance', 'x'),
        ('stage', 'microbatch_size', []),
        ('summary', 'skipped', 'x'),
    ],
)
def test_a_record_without_a_number_where_one_is_needed_is_left_out(runs, capsys, kind, key, value):
    file = runs[0] / 'metrics.jsonl'
    records = [json.loads(line) for line in file.read_text().splitlines()]
    broken = max(k for k, record in enumerate(records) if record['kind'] == kind)
    records[broken][key] = value
    file.write_text(''.join(json.dumps(record) + '\n' for record in records))
    assert report.main(['report', *map(str, runs), f'--out={runs[0] / "page.html"}']) == 0
    assert f'{kind} of step {records[broken]["step"]}: without {key}' in capsys.readouterr().out


def test_what_is_no_run_is_told_beside_the_runs(runs, tmp_path, capsys):
    (tmp_path / 'other').mkdir()
    out = tmp_path / 'page.html'
    assert report.main(['report', str(runs[0]), str(tmp_path / 'other'), f'--out={out}']) == 0
    assert 'no run in' in capsys.readouterr().out and 'no run in' in out.read_text()
