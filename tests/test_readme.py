"""What the README says, as it is written there."""

import pathlib
import re
import shlex
import subprocess
import sys

import pytest
from test_distributed import free_port

from adabatch_jax import benchmark, command_line, main, metrics, train
from adabatch_jax.config import default_config, resolve
from adabatch_jax.experiment import describe

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text()
BLOCKS = re.findall(r'```(\w*)\n(.*?)```', README, flags=re.DOTALL)
LINES = [
    shlex.split(line)
    for language, block in BLOCKS
    if language == 'sh'
    for line in block.replace('\\\n', ' ').replace(' &\n', '\n').splitlines()
]
COMMANDS = [line for line in LINES if line[:3] == ['python', '-m', 'adabatch_jax.main']]
BENCHMARKS = [line for line in LINES if line[:3] == ['python', '-m', 'adabatch_jax.benchmark']]


def test_continuous_integration_runs_the_test_line_of_the_readme():
    (line,) = (block for _, block in BLOCKS if 'pytest' in block)
    assert line in (ROOT / '.ci/run').read_text()


@pytest.mark.parametrize('command', COMMANDS, ids=' '.join)
def test_commands_parse_and_their_runs_have_plans(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    values = main.parse(command[2:])
    if values.config is not None and values.config.batch.policy != 'replay':  # of a run that is not here
        assert train.plan(values.config).num_updates > 0


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
        row[at + 3] = str(int(row[at + 3]) // 2)
        row[at + 4] = f'{int(row[at + 4].replace(",", "")) // 2:,}'
        assert row in printed


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
    (example,) = (block for language, block in BLOCKS if language == 'python')
    names = {}
    exec(compile(example, 'README.md', 'exec'), names)
    shown = capsys.readouterr().out
    assert '(128, 7800), (256, 3900), (512, 1940), (1024, 960), (2048, 480)' in shown
    assert float(names['learning_rate'](7_800)) == pytest.approx(0.0075)
