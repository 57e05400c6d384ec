"""Several processes: the same run in any layout, and all of them begin, agree and end together."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import jax
import jax.flatten_util
import numpy as np
import pytest
from conftest import ROOT
from layout_child import BASIS, RUNS, SHARED
from test_train import StopAt, of_kind

from adabatch_jax import distributed, main, metrics, schedules, train, train_state
from adabatch_jax.input_pipeline import order

LAYOUTS = {  # processes, devices of each, and what they train
    '1 x 4': (1, 4, list(RUNS)),
    '2 x 2': (2, 2, list(RUNS)),
    '4 x 1': (4, 1, ['accumulated', 'local', 'noise scale']),
}
CASES = [(layout, name) for layout, (*_, names) in LAYOUTS.items() for name in names]
# Of the largest weight: what another order of summation makes of it in some twenty updates.
BOUND = 1e-5


def free_port():
    with socket.socket() as probe:
        probe.bind(('localhost', 0))
        return probe.getsockname()[1]


def start(arguments, devices, environment=()):
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ
        | {'PYTHONPATH': str(ROOT), 'JAX_NUM_CPU_DEVICES': str(devices)}
        | dict(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(started, timeout=300):
    """Output and exit status of each; none outlives the test."""
    try:
        return [(process.communicate(timeout=timeout)[0], process.returncode) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()


# -------------------------------------------------------------------- the same run in any layout


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """What each process of each layout took part in, and the weights, by layout and name of the run."""
    found = {}
    for layout, (num_processes, devices, names) in LAYOUTS.items():
        out, port = tmp_path_factory.mktemp('layout'), free_port()
        child = ROOT / 'tests/layout_child.py'
        ends = finish(
            [start((child, out, port, num_processes, k, *names), devices) for k in range(num_processes)]
        )
        assert [status for _, status in ends] == [0] * num_processes, ends
        for name in names:
            of_processes = [
                json.loads((out / f'{name}-{k}.json').read_text()) for k in range(num_processes)
            ]
            with np.load(out / f'{name}.npz') as file:
                found[layout, name] = of_processes, list(file.values())
        found[layout] = out
    return found


@pytest.mark.parametrize('layout, name', CASES)
def test_all_processes_take_the_same_updates_and_end_in_the_same_weights(runs, layout, name):
    processes_, _ = runs[layout, name]
    taken = [[update[:2] for update in process['updates']] for process in processes_]
    assert all(updates == taken[0] for updates in taken)
    assert len({process['digest'] for process in processes_}) == 1
    assert all(process['evaluations'] == processes_[0]['evaluations'] for process in processes_)


@pytest.mark.parametrize('layout, name', [case for case in CASES if case[1] != 'in parts'])
def test_the_processes_have_every_example_of_a_batch_once(runs, layout, name):
    """Against the order of examples, drawn here from its seeds: also past the end of an epoch."""
    processes_, _ = runs[layout, name]
    n = BASIS['dataset.num_examples']
    stream = np.concatenate([np.random.default_rng((0, epoch)).permutation(n) for epoch in range(4)])
    for updates in zip(*(process['updates'] for process in processes_), strict=True):
        start, size, _ = updates[0]
        assert sum((examples for _, _, examples in updates), []) == stream[start : start + size].tolist()


@pytest.mark.parametrize(
    'layout, name', [case for case in CASES if case[0] != '1 x 4' and case[1] != 'goodput']
)
def test_a_run_is_the_same_in_any_layout(runs, layout, name):
    (alone, *_), expected = runs['1 x 4', name]
    (first, *_), weights = runs[layout, name]
    assert [u[:2] for u in first['updates']] == [u[:2] for u in alone['updates']]
    largest = max(np.abs(x).max() for x in expected)
    for x, y in zip(weights, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=BOUND * largest)
    for a, b in zip(first['evaluations'], alone['evaluations'], strict=True):
        assert a['num_examples'] == b['num_examples'] == BASIS['dataset.num_examples']
        assert abs(a['loss'] - b['loss']) < BOUND * b['loss']


def test_runs_change_their_batch_inside_epochs_and_by_decisions(runs):
    for name in RUNS:
        (alone, *_), _ = runs['1 x 4', name]
        sizes = [size for _, size, _ in alone['updates']]
        assert len(set(sizes)) > 1, name
        inside = [s for (s, a, _), b in zip(alone['updates'][1:], sizes, strict=False) if a != b]
        assert any(start % BASIS['dataset.num_examples'] for start in inside) or name == 'local'


@pytest.mark.parametrize('layout', ['2 x 2', '4 x 1'])
def test_shared_arrays_are_those_of_the_first_process_bit_for_bit(runs, layout):
    for k in range(LAYOUTS[layout][0]):
        with np.load(runs[layout] / f'shared-{k}.npz') as file:
            received = list(file.values())
        for x, y in zip(received, SHARED, strict=True):
            assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())


# ------------------------------------------------------------------------ each has its own share


@pytest.mark.parametrize('num_processes', [1, 2, 4])
def test_a_process_reads_its_share_of_each_batch_and_nothing_else(monkeypatch, num_processes):
    """Twelve updates that change their size inside an epoch, some in two parts a device."""
    clock, seed = schedules.Clock(50, 10), 3
    shares = []
    for k in range(num_processes):
        monkeypatch.setattr(distributed.devices.jax, 'process_count', lambda: num_processes)
        monkeypatch.setattr(distributed.devices.jax, 'process_index', lambda k=k: k)
        monkeypatch.setattr(distributed.devices.jax, 'local_device_count', lambda: 4 // num_processes)
        position, drawn = 0, []
        for size, parts in [(8, 1), (16, 2), (40, 1), (8, 2)]:
            batches = order.update_examples(seed, clock, position, size, parts)
            for _ in range(3):
                parts_ = [next(batches)[0] for _ in range(parts)]
                per_device = [x.reshape(4 // num_processes, -1) for x in parts_]
                drawn.append(np.concatenate(per_device, 1).ravel())
                position += size
        shares.append(drawn)
    position = 0
    for batch in zip(*shares, strict=True):
        together = np.concatenate(batch)
        assert len({len(share) for share in batch}) == 1
        expected, _ = order.examples_at(seed, 50, position, len(together))
        np.testing.assert_array_equal(together, expected)
        position += len(together)


# -------------------------------------------------------------------------------- the command line

FLAGS = ('--config=tests/small_run.py', '--config.checkpoint_every_epochs=0.5')


def two(*beginnings):
    """Two processes with two devices each, with what their command lines begin with."""
    together = (f'--coordinator_address=localhost:{free_port()}', '--num_processes=2')
    return [
        start((*beginning, *together, f'--process_id={k}'), 2) for k, beginning in enumerate(beginnings)
    ]


def tasks(count):
    """The variables that srun sets for some tasks on one node."""
    job = {'SLURM_JOB_ID': str(free_port()), 'SLURM_STEP_NODELIST': 'localhost'}
    job['SLURM_NTASKS'] = str(count)
    return [job | {'SLURM_PROCID': str(k), 'SLURM_LOCALID': str(k)} for k in range(count)]


def commands(workdir, *faults, flags=()):
    """Two processes of the command, which get the signals at the points that ``faults`` say."""
    child, arguments = ROOT / 'tests/fault_child.py', (*FLAGS, *flags, f'--workdir={workdir}')
    return two(*((child, *fault, *arguments) for fault in faults))


NONE = ('SIGTERM', 'an update was seen', 10**6)


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
    ends = finish([start(('-c', code, address, k), devices=1) for k in range(4)], timeout=30)
    assert [status for _, status in ends] == [1, 9, 1, 1], ends
    assert ends[0][0].count('error: another process has ended') == 1 and 'closed)' in ends[0][0]
    assert not any('Traceback' in output for output, _ in ends)


def test_a_mistake_that_all_processes_see_is_told_once(tmp_path):
    workdir = tmp_path / 'run'
    ends = finish(commands(workdir, NONE, NONE, flags=('--config.batch.base_size=6',)))
    assert [status for _, status in ends] == [2, 2]
    together = ends[0][0] + ends[1][0]
    assert together.count('error: config.batch: batch size 6 does not divide evenly over 4') == 1
    assert 'Traceback' not in together
    assert not workdir.exists()


def test_a_mistake_that_one_process_sees_ends_all_with_its_message(tmp_path):
    data = tmp_path / 'data'
    data.mkdir()
    images = np.zeros((64, 8, 8, 1), np.uint8)
    for split in ('train', 'test'):
        np.savez(data / f'{split}.npz', images=images, labels=np.arange(64) % 10)
    flags = (*FLAGS, '--config.dataset.name=npz', f'--workdir={tmp_path / "run"}')
    folders = (f'--config.dataset.data_dir={folder}' for folder in (data, tmp_path / 'nowhere'))
    started = two(*(('-m', 'adabatch_jax.main', *flags, folder) for folder in folders))
    ends = finish(started, timeout=120)
    assert [status for _, status in ends] == [2, 2], ends
    assert 'process 1 failed: error: config.dataset' in ends[0][0] and 'nowhere' in ends[0][0]
    assert 'process 1: error: config.dataset' in ends[1][0]
    assert not any('Traceback' in output for output, _ in ends)


def test_processes_with_different_configs_are_refused_before_anything_is_written(tmp_path):
    workdir = tmp_path / 'run'
    command = ('-m', 'adabatch_jax.main', *FLAGS, f'--workdir={workdir}')
    ends = finish(two(command, (*command, '--config.seed=7')), timeout=120)
    assert [status for _, status in ends] == [2, 2], ends
    assert 'config.seed: got 7 in process 1 and 0 in the first; accepted: the same in all' in ends[0][0]
    assert not any('Traceback' in output for output, _ in ends) and not workdir.exists()


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


def test_processes_that_replay_different_runs_are_refused(tmp_path):
    schedule = {'policy': 'noise_scale', 'num_examples': 128, 'num_epochs': 2.0, 'coupling': 'linear'}
    schedule |= {'statistics': '', 'max_per_device': 4}
    command = ('-m', 'adabatch_jax.main', *FLAGS, f'--workdir={tmp_path / "run"}')
    command += ('--config.batch.policy=replay', '--config.batch.replay=~/replayed')
    command += (f'--coordinator_address=localhost:{free_port()}', '--num_processes=2')
    started = []
    for k, size in enumerate((8, 16)):  # each with a home of its own
        stages = [{'examples_seen': 0, 'batch_size': size, 'reason': ''}]
        folder = tmp_path / f'{k}' / 'replayed'
        folder.mkdir(parents=True)
        (folder / 'schedule.json').write_text(json.dumps(schedule | {'stages': stages}))
        home = {'HOME': str(tmp_path / f'{k}')}
        started.append(start((*command, f'--process_id={k}'), 2, home))
    ends = finish(started, timeout=120)
    assert [status for _, status in ends] == [2, 2], ends
    refusal = "got '16 updates with 16' in process 1 and '32 updates with 8' in the first"
    assert f'config.batch: {refusal}; accepted: the same in all' in ends[0][0] + ends[1][0]


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


def test_a_config_file_that_uses_jax_is_for_one_process(tmp_path):
    config = tmp_path / 'of_devices.py'
    config.write_text(
        'import jax\nfrom tests.small_run import get_config as small\ndef get_config():\n'
        '    config = small()\n    config.batch.base_size = 4 * jax.device_count()\n    return config\n'
    )
    command = '-m', 'adabatch_jax.main', f'--config={config}', '--mode=plan'
    found = [start(command, 2, tasks(n)[0]) for n in (1, 2)]
    given = start((*command, '--coordinator_address=localhost:1', '--num_processes=2'), 2)
    (alone, status), *refused = finish([*found, given])
    assert status == 0 and '2 x 1 x 4' in alone, alone
    for output, status in refused:
        assert status == 2 and output.count('\n') == 1, output
        assert f'--config: got {str(config)!r}, which uses JAX' in output


@pytest.mark.parametrize(
    'arguments, message',
    [
        (('localhost:1', 2, 2), 'process_id: got 2 of 2 processes; accepted: 0 to num_processes - 1'),
        (('localhost:1', 0, 0), 'num_processes: got 0; accepted: 1 or more'),
        (('localhost', 2, 0), "coordinator_address: got 'localhost'; accepted: HOST:PORT"),
        ((None, 2, None), 'num_processes: got 2, and the processes cannot be brought together'),
    ],
)
def test_processes_that_do_not_go_together_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        distributed.join(*arguments)


def test_a_process_that_is_told_nothing_is_alone():
    distributed.join()
    distributed.join(num_processes=1)
    assert distributed.is_alone() and distributed.is_first()
    assert distributed.from_first(lambda: 3) == 3


# ------------------------------------------------------------------------------ no deadlock


def test_a_thousand_small_updates_on_four_devices_of_the_cpu(command_line, tmp_path):
    """Collectives of many updates in flight would wait for threads that never run (XLA's CPU client)."""
    done = command_line(
        *('--config=tests/small_run.py', f'--workdir={tmp_path}', '--config.dataset.pipeline=device'),
        *('--config.batch.policy=fixed', '--config.num_epochs=63', '--config.eval_every_epochs=63'),
        *('--config.checkpoint_every_epochs=63', '--config.log_every_steps=100'),
        devices=4,
    )
    assert done.returncode == 0, done.stderr
    assert metrics.read_records(tmp_path)[-1]['updates'] == 1008
