"""What the README says, as it is written there."""

import pathlib
import re
import shlex
import subprocess
import sys

import pytest
from several_processes import free_port

from adabatch_jax import (
    benchmark,
    command_line,
    input_pipeline,
    main,
    metrics,
    models,
    policies,
    report,
    train,
)
from adabatch_jax.config import default_config, resolve
from adabatch_jax.experiment import describe

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text()
BLOCKS = re.findall(r'```(\w*)\n(.*?)```', README, flags=re.DOTALL)
OWN = [block for language, block in BLOCKS if block.startswith('# my_')]
SHELL = '\n'.join(block for language, block in BLOCKS if language == 'sh')
LOOP = re.compile(r'for (\w+) in ([^;]+); do\b(.*?)\bdone\n', flags=re.DOTALL)


def split(shell):
    lines = shell.replace('\\\n', ' ').replace(' &\n', '\n').replace('; ', '\n').splitlines()
    return [shlex.split(line) for line in lines if line.strip()]


LINES = split(LOOP.sub('', SHELL))
LOOPED = [
    line
    for name, values, body in LOOP.findall(SHELL)
    for value in values.split()  # runs that a shell would look for have their configs beside them
    for line in split(body.replace(f'${name}', 'configs/quickstart' if '*' in value else value))
]
COMMANDS = [line for line in LINES if line[:3] == ['python', '-m', 'adabatch_jax.main']]
BENCHMARKS = [line for line in LINES if line[:3] == ['python', '-m', 'adabatch_jax.benchmark']]


def test_continuous_integration_runs_the_test_line_of_the_readme():
    (line,) = (block for _, block in BLOCKS if 'pytest' in block)
    assert line in (ROOT / '.ci/run').read_text()


@pytest.mark.parametrize('command', COMMANDS + LOOPED, ids=' '.join)
def test_commands_parse_and_their_runs_have_plans(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    values = main.parse(command[2:])
    if values.config is not None and values.config.batch.policy != 'replay':  # of a run that is not here
        assert train.plan(values.config).num_updates > 0


def test_training_commands_run_one_after_the_other_but_shorter(tmp_path, monkeypatch):
    """As written, from one folder, with a smaller model, fewer epochs and made-up data for CIFAR's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'configs').symlink_to(ROOT / 'configs')
    shorter = ['--config.num_epochs=0.25', '--config.model.name=cnn', '--config.log_every_steps=5']
    made_up = ['--config.dataset.name=synthetic', '--config.dataset.num_examples=10240']
    elsewhere = (
        '--sweep',
        '--benchmark',
        '--num_processes',
        '--mode=analyze',
    )  # which have tests of their own
    ran = 0
    for command in COMMANDS:
        if any(argument.startswith(elsewhere) for argument in command):
            continue
        needs_data = '--config.dataset.data_dir=DIR' in command or 'cifar' in ' '.join(command)
        arguments = [a for a in command[2:] if not a.startswith('--config.dataset.data_dir')]
        if '--mode=eval' not in command:
            arguments += shorter + (made_up if needs_data else [])
        if 'convex' in ' '.join(command):  # small as it is
            arguments.remove('--config.model.name=cnn')
        assert main.main(arguments) == 0, command
        ran += 1
    assert ran > 8
    assert {'quickstart', 'control', 'replay'} <= {path.name for path in (tmp_path / 'runs').iterdir()}


def test_report_commands_parse():
    reports = [line for line in LINES if line[:3] == ['python', '-m', 'adabatch_jax.report']]
    assert reports
    for line in reports:
        assert command_line.parse(line[2:], report.define_flags, 'runs').runs


def test_files_that_are_named_are_there():
    named = re.findall(r'\]\(([^):#]+)\)|src="([^"]+)"', README)
    named = [link or source for link, source in named]
    assert named and all((ROOT / name).exists() for name in named)


@pytest.mark.parametrize('command', BENCHMARKS, ids=' '.join)
def test_benchmark_commands_parse_and_their_batch_sizes_are_accepted(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    values = command_line.parse(command[2:], benchmark.define_flags)
    assert benchmark.batch_sizes(values, describe(resolve(values.config)))


def test_two_processes_train_one_run_as_written_but_shorter(tmp_path):
    (block,) = (block for _, block in BLOCKS if '--num_processes=2' in block)
    shorter = '--config.num_epochs=0.5 --config.model.name=cnn --num_processes=2'
    for written, here in [
        ('python ', f'{sys.executable} '),
        ('localhost:12345', f'localhost:{free_port()}'),
        ('runs/two', str(tmp_path)),
        ('--num_processes=2', shorter),
    ]:
        assert written in block
        block = block.replace(written, here)
    done = subprocess.run(['bash', '-ec', f'{block}wait'], cwd=ROOT, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    records = metrics.read_records(tmp_path)
    assert (records[0]['num_processes'], records[0]['num_devices']) == (2, 4)
    assert records[-1]['kind'] == 'summary'


def test_printed_plan_is_the_one_that_is_printed(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert main.main(['main', '--config=configs/cifar10_resnet20_adabatch.py', '--mode=plan']) == 0
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    shown = next(block for language, block in BLOCKS if not language and 'epochs' in block)
    for row in (line.split() for line in shown.splitlines() if re.match(r' +\d', line)):
        at = row.index('x')
        row[at - 1 : at + 2] = ['2', 'x', '1']  # the tests have two devices
        for k in (at + 3, at + 4):
            row[k] = f'{int(row[k].replace(",", "")) // 2:,}'
        assert row in printed


@pytest.mark.parametrize('block', OWN, ids=lambda block: block.split()[1])
def test_files_that_add_something_run_as_written(block, tmp_path, registries):
    assert len(block.splitlines()) <= 30
    file, workdir = tmp_path / block.split()[1], tmp_path / 'run'
    file.write_text(block)
    assert main.main(['main', f'--config={file}', f'--workdir={workdir}', '--quiet']) == 0
    records = metrics.read_records(workdir)
    assert records[-1]['final_accuracy'] > 0.5
    sizes = [record['batch_size'] for record in records if record['kind'] == 'stage']
    assert sizes == ([16, 32, 64, 128] * 2 if 'my_policy' in block else [128])


@pytest.fixture
def registries():
    """What the files add is gone after the test."""
    changed = models.MODELS, policies.POLICIES, input_pipeline.SOURCES
    before = [dict(registry) for registry in changed]
    yield
    for registry, content in zip(changed, before, strict=True):
        registry.clear()
        registry.update(content)


def test_library_example_runs(monkeypatch, tmp_path, capsys):
    config = default_config()
    config.num_epochs = 1.0
    config.model.name = 'resnet8'
    config.dataset.update(dict(name='synthetic', num_examples=32, image_size=8))
    config.batch.base_size = 8
    config.learning_rate.reference_batch_size = 8
    train.train(config, tmp_path / 'runs' / 'quickstart')
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    (example,) = (b for language, b in BLOCKS if language == 'python' and b not in OWN)
    names = {}
    exec(compile(example, 'README.md', 'exec'), names)
    shown = capsys.readouterr().out
    assert '(128, 7800), (256, 3900), (512, 1940), (1024, 960), (2048, 480)' in shown
    assert float(names['learning_rate'](7_800)) == pytest.approx(0.0075)
