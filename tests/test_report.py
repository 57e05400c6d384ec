"""Reports: averages, comparisons and stages of runs, finished, in progress or broken."""

import html.parser
import json
import re
import subprocess
import sys
import urllib.parse

import numpy as np
import pytest

from adabatch_jax import comparison, figures, report
from adabatch_jax.config import default_config, resolve, to_json

N = 100  # examples of an epoch


def write_run(
    folder, policy='fixed', seed=0, sizes=(10, 10), accuracy=0.9, seconds=10.0, finished=True, **config
):
    """The files of a made-up run of one epoch for each of ``sizes``, linear in everything."""
    folder.mkdir(parents=True)
    batch = {'policy': policy, 'base_size': sizes[0], **config}
    (folder / 'config.json').write_text(json.dumps({'seed': seed, 'batch': batch}))
    records, step = [], 0
    common = {'kind': 'session', 'step': 0, 'epoch': 0.0, 'examples_seen': 0, 'time': 0.0}
    records.append(common | {'reason': 'begins'})
    for stage, size in enumerate(sizes):
        if not stage or size != sizes[stage - 1]:
            described = {
                'kind': 'stage',
                'stage': stage,
                'batch_size': size,
                'learning_rate': 0.1 * size,
            }
            times = {
                'compile_seconds': 1.5,
                'stall_seconds': 0.25,
                'cache_hit': stage > 0,
                'reason': 'why',
            }
            split = {'microbatch_size': size, 'num_microbatches': 1}
            now = {'step': step, 'epoch': float(stage), 'time': seconds * stage}
            records.append(common | now | described | times | split)
        step += N // size
        now = {'step': step, 'epoch': stage + 1.0, 'examples_seen': N * (stage + 1)}
        now |= {'time': seconds * (stage + 1)}
        fields = {'stage': stage, 'batch_size': size, 'learning_rate': 0.1 * size}
        fields |= {'loss': 2.0 - stage, 'accuracy': 0.5, 'examples_per_second': N / seconds}
        noise = {'gradient_variance': 30.0, 'squared_gradient': 2.0 if stage else -1.0}
        records.append(common | now | {'kind': 'train'} | fields | noise)
        at = accuracy * (stage + 1) / len(sizes)
        evaluated = {'split': 'test', 'loss': 1.0 - at, 'accuracy': at, 'num_examples': 50}
        records.append(common | now | {'kind': 'eval'} | evaluated)
    if finished:
        end = {'updates': step, 'wall_seconds': 1.5 * seconds * len(sizes), 'final_accuracy': accuracy}
        end |= {'train_seconds': seconds * len(sizes), 'best_accuracy': accuracy, 'compile_seconds': 3.0}
        records.append(common | now | {'kind': 'summary'} | end)
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in records))
    return folder


@pytest.fixture
def runs(tmp_path):
    """Two seeds of a control, three of an adaptive run."""
    found = [
        write_run(tmp_path / f'fixed-{seed}', seed=seed, accuracy=0.9 + 0.02 * seed) for seed in (0, 1)
    ]
    return found + [
        write_run(
            *(tmp_path / f'adabatch-{seed}', 'adabatch', seed, (10, 50)),
            accuracy=0.9 + 0.01 * seed,
            seconds=5.0 + seed,
        )
        for seed in (0, 1, 2)
    ]


def test_seeds_of_a_config_are_one_group_named_by_what_differs(runs):
    groups = comparison.group([comparison.read_run(folder) for folder in runs])
    assert [(g.label, len(g.runs)) for g in groups] == [('fixed', 2), ('adabatch', 3)]


def test_how_a_run_was_carried_out_makes_no_group_of_its_own(tmp_path):
    folders = [write_run(tmp_path / str(k), seed=k) for k in range(2)]
    for k, folder in enumerate(folders):
        config = json.loads((folder / 'config.json').read_text())
        config['compile'], config['dataset'] = {'cache_dir': str(k)}, {'data_dir': str(k)}
        (folder / 'config.json').write_text(json.dumps(config))
    assert len(comparison.group([comparison.read_run(folder) for folder in folders])) == 1


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


def test_stages_are_told_with_compilation_and_stall(runs):
    rows = comparison.stage_rows(comparison.read_run(runs[-1]).records)
    assert [(r['batch_size'], r['updates'], r['end_epoch']) for r in rows] == [
        (10, 10, 1.0),
        (50, 2, 2.0),
    ]
    table = report.stage_table(comparison.Group('a', (comparison.read_run(runs[-1]),)))
    assert table.rows[1][-3:] == ('1.5 (cached)', '0.25', 'why')


class Parser(html.parser.HTMLParser):
    """Whether every element that is opened is closed, and what the page refers to."""

    void = {'meta', 'link', 'br', 'img', 'path', 'use', 'rect', 'stop'}

    def __init__(self):
        super().__init__()
        self.open, self.links, self.tags = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ('src', 'href')]
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.void:
            assert self.open.pop() == tag


def analyzed(folder, step, sharpness, optimum=None):
    """Adds an analysis of a checkpoint to a made-up run."""
    record = {
        'kind': 'analysis',
        'step': step,
        'num_examples': 40,
        'loss': 0.25,
        'gradient_norm': 0.5,
        'sharpness': [{'epsilon': 1e-3, 'dimensions': 7000, 'value': sharpness}],
        'hessian_eigenvalues': [2 * sharpness, 1.0],
        'hessian_trace': 9.0,
    }
    with open(folder / 'analysis.jsonl', 'a') as file:
        file.write(json.dumps(record | ({'optimum': optimum} if optimum is not None else {})) + '\n')


def test_minima_are_compared_where_they_were_analyzed(runs):
    for folder, sharpness in zip(runs, (4.0, 6.0, 1.0, 2.0), strict=False):  # the last one was not
        analyzed(folder, 5, 99.0)
        analyzed(folder, 20, sharpness)
    page = report.page(runs)
    (table,) = (table for table in page.tables if table.title == 'Minima')
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    name = 'sharpness, %, epsilon 0.001 in 7,000 dimensions'
    assert [row[name] for row in rows] == ['5 (4 to 6)', '1.5 (1 to 2)']
    eigenvalue = 'largest eigenvalue, Hessian'
    assert [row[eigenvalue] for row in rows] == ['10 (8 to 12)', '3 (2 to 4)']
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


def test_a_page_is_whole_and_needs_nothing_else(runs, tmp_path):
    out = tmp_path / 'page.html'
    assert report.main(['report', *map(str, runs), f'--out={out}']) == 0
    parser = Parser()
    parser.feed(out.read_text())
    assert not parser.open and not parser.links
    assert parser.tags.count('svg') == 12 and parser.tags.count('table') == 3
    text = re.sub(r'<svg.*?</svg>', '', out.read_text(), flags=re.DOTALL)
    assert '91.00 (90.00 to 92.00)' in text and '1.67' in text and '+0.00' in text


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


def test_runs_of_one_seed_are_told_since_they_are_not_independent(tmp_path, capsys):
    folders = [write_run(tmp_path / f'{k}', seed=seed) for k, seed in enumerate((0, 1, 0))]
    assert report.main(['report', *map(str, folders), f'--out={tmp_path / "page.html"}']) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if 'counts' in line]
    assert told == [f'0: seed 0 counts 2 times: {folders[0]}, {folders[2]}']


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


def test_markdown_and_pictures(runs, tmp_path):
    assert report.main(['report', *map(str, runs), '--format=md', f'--out={tmp_path / "r.md"}']) == 0
    text = (tmp_path / 'r.md').read_text()
    pictures = re.findall(r'!\[.*?\]\((.*?)\)', text)
    assert len(pictures) == 12
    assert all((tmp_path / name).read_bytes().startswith(b'\x89PNG') for name in pictures)
    assert '| adabatch | 3 of 3 | 10 to 50 |' in text
    assert pictures[0].startswith('r_figures/')
    assert report.main(['report', str(runs[0]), '--format=png', f'--out={tmp_path / "png"}']) == 0
    assert len(list((tmp_path / 'png').glob('*.png'))) == 12


def test_the_end_of_its_name_says_what_a_file_is(runs, tmp_path, capsys):
    assert report.main(['report', str(runs[0]), f'--out={tmp_path / "r.md"}']) == 0
    assert (tmp_path / 'r.md').read_text().startswith('# Runs compared')
    assert report.main(['report', str(runs[0]), f'--out={tmp_path / "r.pdf"}']) == 2
    assert '--out: got ' in capsys.readouterr().err and not (tmp_path / 'r.pdf').exists()


def test_markdown_finds_its_pictures_beside_a_name_with_spaces(runs, tmp_path):
    out = tmp_path / 'two runs (a).md'
    assert report.main(['report', str(runs[0]), '--format=md', f'--out={out}']) == 0
    pictures = re.findall(r'!\[.*?\]\((\S*?)\)', out.read_text())
    assert len(pictures) == 12
    assert all((tmp_path / urllib.parse.unquote(name)).exists() for name in pictures)


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


def test_a_run_that_has_just_begun_has_a_report(tmp_path):
    folder = write_run(tmp_path / 'new')
    (folder / 'metrics.jsonl').write_text('')
    assert report.main(['report', str(folder), f'--out={tmp_path / "page.html"}']) == 0


def test_a_benchmark_adds_the_table_of_passes(runs, tmp_path):
    rows = [{'batch_size': 10, 'forward': 1.0, 'backward': 1.0, 'both': 1.0}]
    rows.append({'batch_size': 20, 'forward': 1.5, 'backward': None, 'both': 2.0})
    result = {'relative_epochs': rows, 'num_devices': 1, 'device': 'cpu', 'versions': {'jax': '1'}}
    (tmp_path / 'b.json').write_text(json.dumps(result))
    page = report.page([str(runs[0])], str(tmp_path / 'b.json'))
    assert page.tables[1].rows == [('10', '1.00', '1.00', '1.00'), ('20', '1.50', '-', '2.00')]


@pytest.mark.parametrize(
    'arguments, message',
    [
        ([], 'error: report: no run given'),
        (
            ['nowhere', 'nor here'],
            "error: report: no run in 'nowhere': neither metrics.jsonl nor config.json",
        ),
        (['RUN', '--out=nowhere/page.html'], 'error: --out: '),
        (['RUN', '--format=pdf'], '--format'),
        (['RUN', '--benchmark=nowhere.json'], 'error: --benchmark: '),
    ],
)
def test_mistakes_are_told_in_a_line(runs, arguments, message, capsys):
    arguments = [argument.replace('RUN', str(runs[0])) for argument in arguments]
    assert report.main(['report', *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count('\n') == 1


def test_reports_need_neither_a_display_nor_tensorflow_nor_a_device(runs, tmp_path):
    code = (
        'import sys; sys.modules["tensorflow"] = None; from adabatch_jax import report\n'
        f'status = report.main(["report", {str(runs[0])!r}, "--out={tmp_path / "page.html"}"])\n'
        'from jax._src import xla_bridge; sys.exit(status or xla_bridge.backends_are_initialized())'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_is_no_run_is_told_beside_the_runs(runs, tmp_path, capsys):
    (tmp_path / 'other').mkdir()
    out = tmp_path / 'page.html'
    assert report.main(['report', str(runs[0]), str(tmp_path / 'other'), f'--out={out}']) == 0
    assert 'no run in' in capsys.readouterr().out and 'no run in' in out.read_text()


def test_other_data_are_no_other_seed(tmp_path):
    folders = [write_run(tmp_path / str(k), seed=k) for k in range(2)]
    for name, groups in (('cifar10', 1), ('npz', 2)):
        for k, folder in enumerate(folders):
            config = json.loads((folder / 'config.json').read_text())
            config['dataset'] = {'name': name, 'data_dir': str(k)}
            (folder / 'config.json').write_text(json.dumps(config))
        assert len(comparison.group([comparison.read_run(folder) for folder in folders])) == groups
