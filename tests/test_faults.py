"""Runs that are killed without warning, anywhere, end as one that was never stopped."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from fault_child import POINTS

from adabatch_jax import checkpoint, metrics, train_state

FLAGS = (
    '--config=configs/quickstart.py',
    '--config.model.name=cnn',
    '--config.dataset.name=synthetic',  # scikit-learn takes a second to import
    '--config.dataset.num_examples=359',
    '--config.dataset.image_size=8',
    '--config.dataset.eval_split=test[:64]',
    '--config.dataset.eval_batch_size=32',
    '--config.num_epochs=3',
    '--config.batch.growth_epochs=1',
    '--config.checkpoint_every_epochs=0.2',
    '--config.eval_every_epochs=0.5',
    '--config.log_every_steps=3',
)
KILLS = int(os.environ.get('ADABATCH_TEST_KILLS', len(POINTS)))
TIMED = ('time', 'examples_per_second', 'compile_seconds', 'stall_seconds', 'cache_hit')


def start(workdir, *before):
    command = ['-m', 'adabatch_jax.main'] if not before else [ROOT / 'tests/fault_child.py', *before]
    return subprocess.Popen(
        [sys.executable, *map(str, command), *FLAGS, f'--workdir={workdir}'],
        cwd=ROOT,
        env=os.environ | {'PYTHONPATH': str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process, *statuses):
    output, _ = process.communicate(timeout=200)
    assert process.returncode in statuses, output
    assert 'Traceback' not in output
    return process.returncode


def result(workdir):
    """What two runs that are the same have in common: their end, and every record but for its times."""
    records = metrics.read_records(workdir)
    end = records[-1]
    assert end['kind'] == 'summary'
    assert train_state.params_digest(train_state.restore(workdir)) == end['params_digest']
    kept = [
        {key: value for key, value in record.items() if key not in TIMED}
        for record in records
        if record['kind'] in ('train', 'eval')
    ]
    sizes = {r['stage']: (r['batch_size'], r['learning_rate']) for r in reversed(records)
             if r['kind'] == 'stage'}  # fmt: skip
    assert checkpoint.best_step(workdir / checkpoint.FOLDER) is not None
    return (end['updates'], end['params_digest'], end['best_accuracy']), kept, sizes


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('whole')
    finish(start(workdir), 0)
    return result(workdir)


def test_every_point_is_a_function_that_exists():
    """Said at once, and not by a child after minutes."""
    for point, (owner, name, _) in POINTS.items():
        assert callable(getattr(owner, name, None)), point


def test_runs_killed_at_every_kind_of_point_end_in_the_same_weights_and_records(whole, tmp_path):
    """Each process is killed once, at a seeded point, and the next one goes on from what it left."""
    rng, killed, life = random.Random(11), [], 0
    points = []
    while len(killed) < KILLS:
        points = points or rng.sample(sorted(POINTS), len(POINTS))
        point, n = points.pop(), rng.randint(1, 6)
        workdir = tmp_path / str(life)
        if finish(start(workdir, 'SIGKILL', point, n), 0, -signal.SIGKILL):
            killed.append(point)
        else:  # the run was over before the point was reached so often
            assert result(workdir) == whole, killed
            life += 1
    finish(start(workdir), 0)
    assert result(workdir) == whole, killed
    assert len(set(killed)) >= min(KILLS, len(POINTS)) // 2


def test_a_run_killed_from_outside_at_any_time_ends_in_the_same_weights_and_records(whole, tmp_path):
    rng = random.Random(5)
    for _ in range(3):
        process = start(tmp_path)
        time.sleep(3 * rng.random() + 1)  # from imports and start-up to the first epochs
        process.send_signal(signal.SIGKILL)
        finish(process, 0, -signal.SIGKILL)
    finish(start(tmp_path), 0)
    assert result(tmp_path) == whole


def test_a_run_that_gets_sigterm_saves_and_ends_in_the_same_weights_and_records(whole, tmp_path):
    for point, n in [
        ('an update is on the devices', 7),
        ('an evaluation is in the middle', 2),
        ('a checkpoint is being written', 3),
        ('a stage has begun', 1),
    ]:
        if finish(start(tmp_path, 'SIGTERM', point, n), 143, 0) == 0:
            break
        stopped = metrics.read_records(tmp_path)[-1]
        assert train_state.restore(tmp_path).step >= stopped['step']
    finish(start(tmp_path), 0)
    assert result(tmp_path) == whole


def test_a_second_process_is_refused_while_the_first_one_trains(whole, tmp_path):
    first = start(tmp_path, 'SIGSTOP', 'a stage has begun', 1)
    _, status = os.waitpid(first.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    try:
        second = start(tmp_path)
        output, _ = second.communicate(timeout=200)
        assert second.returncode == 2, output
        assert f'is in use by process {first.pid} on ' in output
    finally:
        first.send_signal(signal.SIGCONT)
        finish(first, 0)
    assert result(tmp_path) == whole
