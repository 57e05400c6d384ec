"""Several processes that were told what does not go together: refused in one line by all of them."""

import json

import numpy as np
import pytest
from several_processes import FLAGS, NONE, commands, finish, free_port, start, tasks, two

from adabatch_jax import distributed


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


def test_processes_with_different_numbers_of_devices_are_refused():
    command = ('-m', 'adabatch_jax.main', *FLAGS, '--mode=plan', '--num_processes=2')
    command += (f'--coordinator_address=localhost:{free_port()}',)
    ends = finish([start((*command, f'--process_id={k}'), devices=k + 1) for k in range(2)], timeout=120)
    for output, status in ends:
        assert status == 2 and output.count('got processes with [1, 2] devices; accepted: as many') == 1
        assert 'Traceback' not in output


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
