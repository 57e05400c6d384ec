"""The command line: what it prints, its exit statuses, and that mistakes write nothing."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from adabatch_jax import command_line as commands
from adabatch_jax import evaluate, metrics, train, train_state
from adabatch_jax import main as command
from adabatch_jax.config import resolve
from adabatch_jax.workdir import read_config

TINY = """
from adabatch_jax.config import default_config

def get_config():
    config = default_config()
    config.num_epochs = 2.0
    config.log_every_steps = 2
    config.model.name = 'cnn'
    config.dataset.name = 'synthetic'
    config.dataset.num_examples = 64
    config.dataset.image_size = 8
    config.dataset.crop_padding = 1
    config.dataset.pipeline = 'device'
    config.batch.base_size = 8
    config.batch.growth_epochs = 1.0
    config.learning_rate.reference_batch_size = 8
    config.checkpoint_every_epochs = 0.25
    return config
"""


@pytest.fixture
def tiny_file(tmp_path):
    path = tmp_path / 'with space ü' / 'tiny.py'
    path.parent.mkdir()
    path.write_text(TINY)
    return path


def call(*arguments):
    return command.main(['main', *map(str, arguments)])


def test_trains_then_evaluates_then_finds_nothing_left(tiny_file, tmp_path, capsys):
    workdir = tmp_path / 'run with space ü'
    flags = (f'--config={tiny_file}', f'--workdir={workdir}')
    assert call(*flags) == 0
    shown = capsys.readouterr().out
    assert 'stage 1, batch size 16' in shown and 'Stages' in shown
    assert 'microbatches' not in shown
    summary = metrics.read_records(workdir)[-1]
    assert f'accuracy {summary["final_accuracy"]:.2%}' in shown

    for more in ((), ('--checkpoint=best',), (f'--config={tiny_file}',)):
        assert call('--mode=eval', f'--workdir={workdir}', *more) == 0
        assert 'of 64 examples' in capsys.readouterr().out
    assert call(*flags) == 0
    assert metrics.read_records(workdir)[-1]['params_digest'] == summary['params_digest']


def test_plan_prints_the_paper_protocol_and_writes_nothing(capsys, tmp_path, monkeypatch):
    config = os.path.join(os.path.dirname(__file__), '../configs/cifar10_resnet20_adabatch.py')
    monkeypatch.chdir(tmp_path)
    assert call(f'--config={os.path.abspath(config)}', '--mode=plan', '--workdir=run') == 0
    shown = capsys.readouterr().out
    assert '15,080 updates' in shown
    rows = [line.split() for line in shown.splitlines() if re.match(r'\s+\d', line)]
    assert [row[4] for row in rows] == ['128', '256', '512', '1,024', '2,048']
    assert [float(row[-1]) for row in rows] == pytest.approx([0.01 * 0.75**k for k in range(5)])
    assert list(tmp_path.iterdir()) == []


MISTAKES = {
    '--config.nope=1': 'config.nope: unknown key; accepted: analysis.batch_size',
    '--config.batch.bas_size=1': 'config.batch.bas_size: unknown key; accepted: batch.base_size',
    '--config.batch.base_size=eight': "config.batch.base_size: got 'eight'; accepted: a whole number",
    '--config.batch.base_size=8.5': "config.batch.base_size: got '8.5'; accepted: a whole number",
    '--config.num_epochs=nan': 'config.num_epochs: got nan; accepted: a positive number',
    '--config.num_epochs=0': 'config.num_epochs: got 0.0; accepted: a positive number',
    '--config.batch.base_size=-8': 'config.batch.base_size: got -8; accepted: a positive number',
    '--config.seed=-1': 'config.seed: got -1; accepted: zero or a positive number',
    '--config.batch.growth_factor=1': 'config.batch.growth_factor: got 1.0; accepted: a number above 1',
    '--config.seed=4294967296': 'accepted: a whole number below 2^32',
    '--config.batch.growth_epochs=1e-308': 'config.batch.growth_epochs: got 1e-308; accepted here',
    '--config.learning_rate.decay_epochs=1e-9': 'config.learning_rate.decay_epochs: got 1e-09; accepted',
    '--config.dataset.crop_padding=9': 'crop_padding: got 9; accepted: up to the 8 pixels',
    '--config.learning_rate.effective=1e308': 'more than single precision can hold',
    f'--config.batch.base_size={10**400}': 'accepted: a whole number below 2^63',
    f'--config.batch.patience_epochs={2**64}': f'got {2**64}; accepted: a whole number below 2^63',
    f'--config.dataset.train_split=train[:{10**400}%]': 'config.dataset',
    '--flagfile=/nowhere': 'Unable to open flagfile',
    '--config.optimizer.momentum=1': 'config.optimizer.momentum: got 1.0; accepted',
    '--config.batch.base_size=9': 'batch size 9 does not divide evenly over 2 devices',
    '--config.batch.base_size=128': '(64 examples); start with less (batch.base_size, ',
    '--config.batch.max_size=8': 'the batch never grows',
    '--config.batch.policy=adabtach': "config.batch.policy: got 'adabtach'; accepted: adabatch",
    '--config.model.name=resnet9': "config.model.name: got 'resnet9'; accepted: alexnet",
    '--config.model.dtype=float16': "config.model.dtype: got 'float16'; accepted: float32, bfloat16",
    '--config.dataset.name=mnist2': "config.dataset.name: got 'mnist2'; accepted: digits",
    '--config.dataset.train_split=valid': "split: got 'valid'; accepted: train, test",
    '--config.optimizer.name=adamw2': "config.optimizer.name: got 'adamw2'; accepted: sgd",
    '--config.learning_rate.coupling=cubic': "config.learning_rate.coupling: got 'cubic'",
    '--config.learning_rate.warmup_epochs=5': 'warmup_epochs: got 5',
    '--config.batch.stages=((0,8': 'config.batch.stages',
    '--config.compile.precompile=maybe': "precompile: got 'maybe'; accepted: True or False",
    '--config.batch.stages=abc': "batch.stages: got 'abc'; accepted: (start epoch, batch size)",
    '--config.analysis.epsilons=True': 'analysis.epsilons: got True; accepted: positive numbers',
    '--config.model.name=alexnet': 'AlexNet cannot take images of (8, 8, 3)',
    '--config.model.batch_norm=ghost:3': 'got 4 examples a device, which do not divide',
    '--config.model.batch_norm=ghost:0': "batch_norm: got 'ghost:0'; accepted: local, sync",
    '--config.optimizer.decayed=none': "decayed: got 'none'; accepted: all, kernels",
    '--mode=test': 'train|eval|plan',
    '--checkpoint=best': "--checkpoint: got 'best' with --mode=train; accepted: --mode=eval or",
    '--worker=1': "Unknown command line flag 'worker'",
    'extra': "got 'extra'; accepted: flags only",
}


@pytest.mark.parametrize('mistake', MISTAKES)
def test_a_mistake_is_one_line_and_exit_status_2_and_writes_nothing(
    mistake, tiny_file, tmp_path, capsys
):
    workdir = tmp_path / 'run'
    assert call(f'--config={tiny_file}', f'--workdir={workdir}', mistake) == 2
    output = capsys.readouterr()
    assert output.err.startswith('error: ') and output.err.count('\n') == 1
    assert MISTAKES[mistake] in output.err
    assert not workdir.exists()


def test_missing_flags_and_files_are_told_apart(tiny_file, tmp_path, capsys):
    for arguments, expected in [
        (('--workdir=x',), '--config: missing'),
        ((f'--config={tiny_file}',), '--workdir: missing'),
        (('--config=nowhere.py', '--workdir=x'), "No such file or directory: 'nowhere.py'"),
        (('--mode=eval', f'--workdir={tmp_path}'), 'config.json is missing'),
        ((f'--config={tiny_file}', f'--workdir={tiny_file}'), 'is a file; accepted: a directory'),
        (('--mode=eval', f'--config={tiny_file}', f'--workdir={"x" * 300}'), 'name too long'),
        ((f'--config={tiny_file}:variant', '--workdir=x'), '--config: the file has no variants'),
        ((f'--config={tiny_file}', '--workdir=/proc/run'), "cannot write to '/proc/run'"),
        ((f'--config={tiny_file}', f'--workdir={"x" * 300}'), 'File name too long'),
        ((f'--config={tiny_file}', '--workdir=run[lr=0.1]'), 'accepted: paths without [ ], which Orbax'),
        ((f'--config={tiny_file}', '--workdir=a\\b'), 'accepted: paths without \\, which Orbax'),
        (('--mode=eval', '--workdir=x', '--config.dataset.eval_split=train'), '--config: missing'),
        (
            ('--mode=eval', '--workdir=x', '--allow_schedule_change'),
            '--allow_schedule_change: got True with --mode=eval; accepted: --mode=train',
        ),
    ]:
        assert call(*arguments) == 2
        error = capsys.readouterr().err
        assert expected in error and error.count('\n') == 1


@pytest.mark.parametrize(
    'line, expected',
    [
        ('config.batch.bse_size = 4', '--config: unknown key bse_size; accepted: batch.base_size'),
        ('config.num_epoch = 4', '--config: unknown key num_epoch; accepted: num_epochs'),
        ("config.num_epochs = 'ten'", 'num_epochs'),
        ('config.model = 1 / 0', 'division by zero'),
        ('config.batch.base_size = ', 'invalid syntax'),
        ('config.batch.max_size = None', 'config.batch.max_size: got None'),
        ('config.learning_rate.decay_at_epochs = ((1, 2),)', 'decay_at_epochs: got (1, 2)'),
        ('assert False', 'AssertionError'),
        ('return', 'get_config() gives None; accepted: a config'),
        ("raise SystemExit('bye')", 'bye'),
        ('config.learning_rate.decay_at_epochs = (10**400,)', 'config.learning_rate'),
    ],
)
def test_a_config_file_with_a_mistake_is_one_line(line, expected, tiny_file, capsys):
    tiny_file.write_text(TINY.replace('    return config', f'    {line}\n    return config'))
    assert call(f'--config={tiny_file}', '--mode=plan') == 2
    error = capsys.readouterr().err
    assert expected in error and error.count('\n') == 1


def test_evaluating_an_interrupted_start_says_that_there_is_no_checkpoint(tiny_file, tmp_path, capsys):
    from adabatch_jax import config, train, workdir

    values = command.parse(['main', f'--config={tiny_file}'])
    (tmp_path / 'run').mkdir()
    workdir.create(config.resolve(values.config), train.plan(values.config), tmp_path / 'run')
    assert call('--mode=eval', f'--workdir={tmp_path / "run"}') == 2
    assert 'no checkpoint in' in capsys.readouterr().err


def test_divergence_exits_with_3(tiny_file, tmp_path, capsys):
    flags = (f'--config={tiny_file}', f'--workdir={tmp_path / "run"}')
    assert call(*flags, '--config.learning_rate.effective=1e25') == 3
    assert re.search(r'error: training diverged: .*update \d+, stage 0', capsys.readouterr().err)


def test_divergence_in_the_last_update_is_found(tiny_file, tmp_path, capsys):
    flags = (f'--config={tiny_file}', f'--workdir={tmp_path / "run"}', '--config.num_epochs=0.1')
    assert call(*flags, '--config.learning_rate.effective=1e38') == 3
    error = capsys.readouterr().err
    assert re.search(r'test loss (nan|inf) after update 1, stage 0, batch size 8,', error)
    assert not [r for r in metrics.read_records(tmp_path / 'run') if r['kind'] == 'summary']


def test_evaluating_with_another_config_than_the_runs_is_refused(tiny_file, tmp_path, capsys):
    flags = (f'--config={tiny_file}', f'--workdir={tmp_path / "run"}')
    assert call(*flags, '--config.num_epochs=0.25') == 0
    evaluation = (*flags, '--mode=eval', '--config.num_epochs=0.25')
    assert call(*evaluation, '--config.dataset.eval_split=train[:16]') == 0
    assert 'of 16 examples' in capsys.readouterr().out
    assert call(*evaluation, '--config.model.name=resnet14') == 2
    assert "model.name ('resnet14' here, 'cnn' there)" in capsys.readouterr().err


@pytest.mark.parametrize('mode', ['eval', 'analyze'])
@pytest.mark.parametrize('key', ['model.name', 'dataset.name', 'batch.policy'])
def test_what_a_config_file_added_is_missed_with_a_hint_at_the_file(
    tiny_file, tmp_path, capsys, mode, key
):
    assert call(f'--config={tiny_file}', f'--workdir={tmp_path}', '--config.num_epochs=0.25') == 0
    config = json.loads((tmp_path / 'config.json').read_text())
    section, _, name = key.partition('.')
    config[section][name] = 'mine'
    (tmp_path / 'config.json').write_text(json.dumps(config))
    assert call(f'--mode={mode}', f'--workdir={tmp_path}') == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: config.{key}: got 'mine'; accepted: ")
    assert error.endswith('; if a config file adds it, give --config=FILE too\n')


def test_evaluation_passes_over_a_damaged_checkpoint_in_one_line(tiny_file, tmp_path, capsys):
    workdir = tmp_path / 'run'
    assert call(f'--config={tiny_file}', f'--workdir={workdir}') == 0
    latest = max((workdir / 'checkpoints').iterdir(), key=lambda path: int(path.name))
    (latest / 'host/metadata').write_text('{}')
    capsys.readouterr()
    assert call('--mode=eval', f'--workdir={workdir}') == 0
    error = capsys.readouterr().err
    assert error.startswith(f'warning: the checkpoint of update {latest.name} is damaged')
    assert error.count('\n') == 1


@pytest.mark.parametrize('change', ['num_epochs=1', 'learning_rate.effective=0.9'])
def test_another_schedule_for_a_run_that_is_over_is_refused(tiny_file, tmp_path, capsys, change):
    workdir = tmp_path / 'run'
    flags = (f'--config={tiny_file}', f'--workdir={workdir}')
    assert call(*flags) == 0
    before = {p: p.read_bytes() for p in workdir.rglob('*') if p.is_file()}
    assert call(*flags, '--allow_schedule_change', f'--config.{change}') == 2
    error = capsys.readouterr().err
    assert 'and the run is at epoch 2; accepted with another schedule: more than that' in error
    assert error.count('\n') == 1
    assert {p: p.read_bytes() for p in workdir.rglob('*') if p.is_file()} == before
    assert call(*flags) == 0


def test_a_work_directory_may_be_in_the_home_folder(tiny_file, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    assert call(f'--config={tiny_file}', '--workdir=~/runs/a', '--config.num_epochs=0.25') == 0
    assert (tmp_path / 'runs/a/config.json').exists()
    assert train_state.restore('~/runs/a').step > 0
    config = read_config(tmp_path / 'runs/a')
    assert evaluate.evaluate_checkpoint(resolve(config), '~/runs/a')['step'] == 2
    assert train.train(config, '~/runs/a')['updates'] == 2


def test_the_plan_shows_the_highest_rate_of_a_stage(tiny_file, capsys):
    flags = '--mode=plan', '--config.learning_rate.schedule=cosine', '--config.batch.policy=fixed'
    warm_up = '--config.learning_rate.effective=0.25', '--config.learning_rate.warmup_epochs=1.0'
    assert call(f'--config={tiny_file}', *flags, *warm_up) == 0
    assert '0 - 0.25 - ' in capsys.readouterr().out


def test_the_highest_rate_of_a_plan_is_one_that_an_update_has(tiny_file, capsys):
    """Two updates of 24 of 64 examples an epoch: they begin at 0, 0.375, 1 and 1.375."""
    flags = ('batch.policy=fixed', 'batch.base_size=24', 'dataset.remainder=drop', 'num_epochs=3.0')
    rates = ('warmup_epochs=2.0', 'effective=0.1', 'reference_batch_size=24', 'decay_factor=0.1')
    flags += tuple(f'learning_rate.{rate}' for rate in (*rates, 'decay_epochs=2.0'))
    call(f'--config={tiny_file}', '--mode=plan', *(f'--config.{flag}' for flag in flags))
    assert '0 - 0.06875 - 0.01' in capsys.readouterr().out


def test_a_mistake_inside_a_config_file_is_told_with_its_place(tmp_path, capsys):
    file = tmp_path / 'a.python.file'
    file.write_text('def get_config():\n    return {}["epochs"]\n')
    for flags in ([f'--config={file}'], ['--config', str(file)]):
        assert call(*flags, '--mode=plan') == 2
        assert f"KeyError: 'epochs' ({file}, line 2)" in capsys.readouterr().err
    file.write_text(TINY.replace('num_epochs = 2.0', "num_epochs = 'ten'"))
    assert call(f'--config={file}', '--mode=plan') == 2
    assert f'({file}, line 6)' in capsys.readouterr().err
    assert call(f'--config={tmp_path / "missing.py"}', '--mode=plan') == 2
    assert 'line' not in capsys.readouterr().err


def test_a_key_that_several_sections_have_is_offered_for_all_of_them(tmp_path, capsys):
    file = tmp_path / 'misspelt.py'
    file.write_text(TINY.replace('config.dataset.name =', 'config.dataset.nme ='))
    assert call(f'--config={file}', '--mode=plan') == 2
    error = capsys.readouterr().err
    assert all(key in error for key in ('model.name', 'dataset.name', 'optimizer.name'))


@pytest.mark.parametrize('with_errors', [False, True])
@pytest.mark.parametrize('reader', ['a full disk', 'one that goes away'])
def test_training_goes_on_when_nothing_can_be_printed(tiny_file, tmp_path, reader, with_errors):
    arguments = [f'--config={tiny_file}', f'--workdir={tmp_path / "run"}']
    start = [sys.executable, '-m', 'adabatch_jax.main', *arguments]
    if reader == 'a full disk' and not os.path.exists('/dev/full'):
        pytest.skip('no /dev/full')
    with open('/dev/full' if reader == 'a full disk' else os.devnull, 'w') as full:
        out = full if reader == 'a full disk' else subprocess.PIPE
        err = subprocess.STDOUT if with_errors else subprocess.PIPE
        process = subprocess.Popen(start, stdout=out, stderr=err, text=True)
        if out is subprocess.PIPE:
            assert process.stdout.readline().startswith('epoch 0: stage 0')
            process.stdout.close()
        error = '' if with_errors else process.stderr.read()
        assert process.wait(300) == 0, error
    if not with_errors:
        assert error.count('\n') == 1 and error.startswith('warning: standard output: '), error
    assert metrics.read_records(tmp_path / 'run')[-1]['kind'] == 'summary'


def test_help_explains_the_flags(capsys):
    assert call('--help') == 0
    shown = capsys.readouterr().out
    assert '--workdir' in shown and 'Exit status' in shown


def test_sigterm_while_the_first_one_is_taken_in_is_not_waited_for(monkeypatch):
    calls = []
    with commands.sigterm() as stop:

        def set_():  # as if the second one came within `set`, whose lock is held then
            calls.append(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)

        monkeypatch.setattr(stop, 'set', set_)
        signal.raise_signal(signal.SIGTERM)
    assert calls == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_sigterm_saves_exits_with_143_and_the_same_command_continues(tiny_file, tmp_path, command_line):
    flags = (f'--config={tiny_file}', '--config.num_epochs=200', '--config.batch.growth_epochs=100')
    flags += ('--config.dataset.pipeline=tf_data',)
    workdir = tmp_path / 'run'
    process = subprocess.Popen(
        [sys.executable, '-m', 'adabatch_jax.main', *flags, f'--workdir={workdir}'],
        cwd=command_line.root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not any(r['kind'] == 'train' for r in metrics.read_records(workdir)):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 143, error
    stopped = train_state.restore(workdir)
    assert f'saved at update {int(stopped.step)}' in error
    assert int(stopped.step) < 1600


def test_a_checkpoint_of_two_devices_continues_and_is_evaluated_on_one(
    tiny_file, tmp_path, command_line
):
    workdir = tmp_path / 'run'
    assert call(f'--config={tiny_file}', f'--workdir={workdir}', '--config.num_epochs=1') == 0
    result = command_line('--mode=eval', f'--workdir={workdir}', devices=1)
    assert result.returncode == 0, result.stderr
    accuracy = metrics.read_records(workdir)[-1]['final_accuracy']
    assert f'accuracy {accuracy:.2%} of 64 examples' in result.stdout
    config = json.loads((workdir / 'config.json').read_text())
    assert config['batch']['base_size'] == 8


def test_a_checkpoint_is_evaluated_on_devices_that_the_training_batch_does_not_divide_over(
    command_line, tiny_file, tmp_path
):
    flags = f'--config={tiny_file}', f'--workdir={tmp_path / "run"}', '--config.num_epochs=1.0'
    assert command_line(*flags, devices=1).returncode == 0
    done = command_line(*flags, '--mode=eval', devices=3)
    assert done.returncode == 0 and 'accuracy' in done.stdout, done.stderr


def test_svrg_with_batch_norm_has_a_plan(capsys):
    flags = '--mode=plan', '--config.optimizer.name=svrg'
    assert command.main(['main', '--config=configs/quickstart.py', *flags]) == 0
    assert 'SVRG' in capsys.readouterr().out
