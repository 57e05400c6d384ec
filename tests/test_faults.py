"""Runs that are killed without warning end as one that was never stopped."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from adabatch_jax import metrics

FLAGS = (
    '--config=configs/quickstart.py',
    '--config.num_epochs=6',
    '--config.batch.growth_epochs=2',
    '--config.checkpoint_every_epochs=0.25',
    '--config.eval_every_epochs=1',
)
KILLS = int(os.environ.get('ADABATCH_TEST_KILLS', '4'))


def start(workdir, root):
    return subprocess.Popen(
        [sys.executable, '-m', 'adabatch_jax.main', *FLAGS, f'--workdir={workdir}'],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def summary(workdir):
    return [r for r in metrics.read_records(workdir) if r['kind'] == 'summary'][-1]


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    from conftest import ROOT

    workdir = tmp_path_factory.mktemp('whole')
    process = start(workdir, ROOT)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    return summary(workdir)


def test_a_run_killed_again_and_again_ends_in_the_same_weights(whole, tmp_path, command_line):
    """Kills at seeded updates after each start; between them lie saves, evaluations, transitions."""
    rng, killed = random.Random(7), 0
    while killed < KILLS:
        process = start(tmp_path, command_line.root)
        records = metrics.read_records(tmp_path)
        begun = max((r['step'] for r in records), default=0)
        target = begun + rng.randint(0, whole['updates'] // KILLS)
        while process.poll() is None:
            if max((r['step'] for r in metrics.read_records(tmp_path)), default=0) >= target:
                time.sleep(rng.random() / 2)  # somewhere after the record, not right at it
                process.send_signal(signal.SIGKILL)
                killed += 1
                break
            time.sleep(0.02)
        output, _ = process.communicate(timeout=60)
        assert process.returncode in (0, -signal.SIGKILL), output
        if process.returncode == 0:
            break
    process = start(tmp_path, command_line.root)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert killed > 0
    again = summary(tmp_path)
    assert (again['updates'], again['params_digest']) == (whole['updates'], whole['params_digest'])
