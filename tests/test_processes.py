"""Several processes of the command line: they begin, agree and end together."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.flatten_util
import numpy as np
import pytest
from conftest import ROOT
from runs import StopAt, of_kind
from several_processes import BOUND, FLAGS, NONE, commands, finish, free_port, start, tasks, two

from adabatch_jax import distributed, main, metrics, train, train_state


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('whole')
    (output, status), (silent, other) = finish(commands(workdir, NONE, NONE))
    assert (status, other) == (0, 0), output
    assert 'accuracy' in output and 'accuracy' not in silent
    return workdir


def digest(workdir):
    return train_state.params_digest(train_state.restore(workdir))


def test_killed_and_preempted_processes_end_together_and_a_restart_ends_in_the_same_weights(
    whole, tmp_path
):
    workdir = tmp_path / 'run'
    killed = finish(commands(workdir, NONE, ('SIGKILL', 'an update was seen', 13)), timeout=120)
    assert killed[1][1] == -signal.SIGKILL
    assert killed[0][1] not in (0, 2, 143)
    assert 'another task died' in killed[0][0] or 'process 1' in killed[0][0]

    preempted = finish(commands(workdir, NONE, ('SIGTERM', 'an update was seen', 3)))
    assert [status for _, status in preempted] == [143, 143], preempted
    assert preempted[0][0].count('stopped and saved at update') == 1
    assert 'stopped' not in preempted[1][0]
    stopped_at = int(train_state.restore(workdir).step)
    assert 0 < stopped_at < 24

    elsewhere = tmp_path / 'elsewhere'
    shutil.copytree(workdir, elsewhere)
    finish_alone = start(('-m', 'adabatch_jax.main', *FLAGS, f'--workdir={elsewhere}'), 4)
    ((output, status),) = finish([finish_alone])
    assert status == 0, output

    assert [status for _, status in finish(commands(workdir, NONE, NONE))] == [0, 0]
    assert digest(workdir) == digest(whole)
    records = [
        {key: r[key] for key in ('kind', 'step', 'loss')}
        for r in metrics.read_records(workdir)
        if r['kind'] in ('train', 'eval')
    ]
    expected = [
        {key: r[key] for key in ('kind', 'step', 'loss')}
        for r in metrics.read_records(whole)
        if r['kind'] in ('train', 'eval')
    ]
    assert records == expected

    weights, others = (train_state.restore(w).params for w in (workdir, elsewhere))
    flat = [jax.flatten_util.ravel_pytree(tree)[0] for tree in (weights, others)]
    assert np.abs(flat[0] - flat[1]).max() < BOUND * np.abs(flat[0]).max()


def test_processes_evaluate_a_checkpoint_as_one_does(whole):
    evaluate = ('-m', 'adabatch_jax.main', '--mode=eval', f'--workdir={whole}')
    (output, status), (silent, other) = finish(two(evaluate, evaluate))
    assert (status, other) == (0, 0), output + silent
    ((alone, _),) = finish([start(evaluate, 1)])
    assert alone.splitlines()[-1] in output and 'accuracy' not in silent


def test_sigterm_ends_processes_that_do_not_train(whole):
    analyze = ('-m', 'adabatch_jax.main', *FLAGS, '--mode=analyze', f'--workdir={whole}')
    started = two(*[(*analyze, '--config.analysis.trace_samples=1000000')] * 2)
    assert any('checkpoint 1 of' in line for line in started[0].stdout)
    for process in started:
        process.send_signal(signal.SIGTERM)
    ends = finish(started, timeout=60)
    assert [status for _, status in ends] == [-signal.SIGTERM] * 2, ends


@pytest.mark.parametrize(
    'name, flag, expected',
    [
        ('main', '--mode=train', 0),  # which asks for it in its loop
        ('main', '--sweep', -signal.SIGTERM),
        ('main', '--mode=plan', -signal.SIGTERM),
        ('benchmark', '--run', -signal.SIGTERM),
    ],
)
def test_sigterm_ends_a_task_of_slurm_that_does_not_train(name, flag, expected):
    code = (
        f'import signal, sys; from adabatch_jax import {name} as command; '
        'command.run = lambda values: signal.raise_signal(signal.SIGTERM) or 0; '
        f'sys.exit(command.main(["", "--config=tests/small_run.py", "{flag}"]))'
    )
    ((output, status),) = finish([start(('-c', code), 1, tasks(1)[0])])
    assert status == expected, output


def test_processes_time_steps_and_their_network_together(tmp_path):
    files = tmp_path / '0.json', tmp_path / '1.json'
    arguments = ('--config=tests/small_run.py', '--batch_sizes=16', '--repeats=1', '--scaling')
    ends = finish(two(*(('-m', 'adabatch_jax.benchmark', *arguments, f'--json={f}') for f in files)))
    assert [status for _, status in ends] == [0, 0], ends
    result = json.loads(files[0].read_text())
    assert result['num_devices'] == 4 and result['scaling']['latency'] >= 0
    assert not files[1].exists()


def test_when_the_first_process_is_killed_the_others_end(tmp_path):
    ends = finish(commands(tmp_path, ('SIGKILL', 'an update was seen', 5), NONE), timeout=120)
    assert ends[0][1] == -signal.SIGKILL and ends[1][1] not in (0, 143)


def test_what_a_lost_process_leaves_is_told_in_one_line_and_ends_the_others():
    """Also one that waits for ever, and without waiting for the one that is gone."""
    code = (
        'import os, sys, time, jax; from adabatch_jax.distributed import processes as p; '
        'p._POLL_SECONDS, p._GRACE_SECONDS = 0.1, 0.5; k = int(sys.argv[2]); p.join(sys.argv[1], 4, k); '
        'p.meet(); k == 1 and os._exit(9); k == 2 and time.sleep(100); time.sleep(0.2 * k); '
        'e = jax.errors.JaxRuntimeError("Gloo all-reduce failed: closed"); '
        'assert p.says_another_is_gone(e) and not p.says_another_is_gone(ValueError("Gloo")); '
        'sys.exit(p.abandon(e))'
    )
    address = f'localhost:{free_port()}'
    ends = finish([start(('-c', code, address, k), devices=1) for k in range(4)], timeout=90)
    assert [status for _, status in ends] == [1, 9, 1, 1], ends
    assert ends[0][0].count('error: another process has ended') == 1 and 'closed)' in ends[0][0]
    assert not any('Traceback' in output for output, _ in ends)


def test_processes_end_while_they_look_for_failures():
    """Without a pause between the looks, so that all but the first are in the store as they end."""
    code = (
        'import sys; from adabatch_jax.distributed import processes as p; p._POLL_SECONDS = 1e-5; '
        'p.join(sys.argv[1], 4, int(sys.argv[2])); p.meet()'
    )
    port = free_port()
    started = [start(('-c', code, f'localhost:{port}', k), devices=1) for k in range(4)]
    ends = finish(started, timeout=120)
    assert [status for _, status in ends] == [0] * 4, ends


def test_compiled_steps_are_kept_where_all_processes_find_them(tmp_path):
    """Else some would compile while the others do not, and GPUs' processes wait for one another."""
    code = (
        'import sys, jax; from adabatch_jax import compilation_cache as c, distributed as d; '
        'd.join(sys.argv[1], 2, int(sys.argv[2])); '
        'c.enable(sys.argv[3], d.is_shared); print("kept:", c.is_enabled()); '
        'c.enable(sys.argv[4], d.is_shared); print("kept:", c.is_enabled())'
    )
    address = f'localhost:{free_port()}'
    ends = finish([start(('-c', code, address, k, tmp_path, tmp_path / f'{k}'), 1) for k in range(2)])
    for output, status in ends:
        assert status == 0 and output.count('kept: True\nkept: False') == 1, output
    assert [list(folder.iterdir()) for folder in tmp_path.glob('jaxlib-*')] == [[]]


def test_more_processes_go_on_where_the_first_batches_do_not_divide_over_their_devices(tmp_path):
    config = main.parse(['main', f'--config={ROOT / "tests/small_run.py"}']).config
    with pytest.raises(train.Preempted):
        train.train(config, tmp_path, StopAt(18))
    command = ('-m', 'adabatch_jax.main', f'--config={ROOT / "tests/small_run.py"}')
    command += (f'--workdir={tmp_path}', f'--coordinator_address=localhost:{free_port()}')
    command += ('--num_processes=2',)
    ends = finish([start((*command, f'--process_id={k}'), devices=4) for k in range(2)], timeout=120)
    assert [status for _, status in ends] == [0, 0], ends
    assert of_kind(tmp_path, 'session')[-1]['num_devices'] == 8


def test_processes_with_different_modes_are_refused(whole):
    command = '-m', 'adabatch_jax.main', f'--workdir={whole}', *FLAGS
    ends = finish(two((*command, '--mode=plan'), (*command, '--mode=eval')), timeout=120)
    assert [status for _, status in ends] == [2, 2], ends
    assert "--mode: got 'eval' in process 1 and 'plan' in the first; accepted: the same" in ends[0][0]


def test_an_interrupt_ends_a_process_that_waits_for_others():
    address = f'localhost:{free_port()}'
    code = (
        'import sys; from adabatch_jax.distributed import processes as p; p._PATIENCE_SECONDS = 0.1; '
        'p.join(sys.argv[1], 2, 0)'
    )
    waiting = start(('-c', code, address), devices=1)
    assert any('waiting for the other processes' in line for line in waiting.stdout)
    waiting.send_signal(signal.SIGINT)
    ((_, status),) = finish([waiting], timeout=60)
    assert status == -signal.SIGINT


def test_processes_evaluate_with_their_own_folders_as_they_train(tmp_path):
    commands = []
    for k in range(2):
        data = tmp_path / f'{k}'
        data.mkdir()
        images = np.zeros((64, 8, 8, 1), np.uint8)
        for split in ('train', 'test'):
            np.savez(data / f'{split}.npz', images=images, labels=np.arange(64) % 10)
        flags = f'--workdir={tmp_path / "run"}', '--config.dataset.name=npz', '--config.num_epochs=1'
        flags += f'--config.dataset.data_dir={data}', '--config.batch.policy=fixed'
        commands.append(('-m', 'adabatch_jax.main', '--config=tests/small_run.py', *flags))
    assert [status for _, status in finish(two(*commands))] == [0, 0]
    shutil.rmtree(tmp_path / '1')
    ends = finish(two(*((*command, '--mode=eval') for command in commands)))
    assert [status for _, status in ends] == [2, 2] and f"'{tmp_path / '1'}'" in ends[1][0], ends


def test_processes_under_slurm_find_each_other():
    started = [start(('-m', 'adabatch_jax.main', *FLAGS, '--mode=plan'), 2, task) for task in tasks(2)]
    (output, status), (silent, other) = finish(started)
    assert (status, other) == (0, 0), output + silent
    assert '4 x 1 x 2' in output and 'Plan' not in silent


def test_a_process_that_is_told_nothing_is_alone():
    distributed.join()
    distributed.join(num_processes=1)
    assert distributed.is_alone() and distributed.is_first()
    assert distributed.from_first(lambda: 3) == 3


PREEMPTED = """
import sys, threading, time
import jax
jax.distributed.initialize(f'localhost:{sys.argv[1]}', 2, int(sys.argv[2]))
from adabatch_jax import distributed
assert jax.process_count() == 2
for step in range(1, 2000):
    time.sleep(0.01 * (1 + int(sys.argv[2])))  # one is slower
    if step == 3:
        print('running', flush=True)
    if distributed.asked_to_stop(threading.Event()):
        print(step, flush=True)
        break
"""


def test_processes_agree_on_the_update_to_save_at_when_one_of_them_is_preempted():
    with socket.socket() as probe:
        probe.bind(('localhost', 0))
        port = probe.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, '-c', PREEMPTED, str(port), str(k)],
            cwd=ROOT,
            env=os.environ | {'JAX_NUM_CPU_DEVICES': '1'},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for k in range(2)
    ]
    try:
        for process in processes:
            assert process.stdout.readline() == 'running\n', process.stderr.read()
        time.sleep(0.2)
        processes[1].send_signal(signal.SIGTERM)
        stopped_at = [process.stdout.readline() for process in processes]
        assert stopped_at[0] == stopped_at[1] and int(stopped_at[0]) > 3
    finally:
        for process in processes:
            process.kill()
            process.communicate()
