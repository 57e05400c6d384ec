"""Divergence, changed schedules, other hardware, locks: a run goes on where that is right."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import ROOT
from test_train import StopAt, of_kind, tiny

from adabatch_jax import checkpoint, metrics, run, train, train_state, workdir
from adabatch_jax.config import ConfigError


@pytest.fixture
def broken_rate(monkeypatch):
    """Gives updates a learning rate that no weights survive, as long as it has not been lowered."""

    def at(*steps):
        original = run.Run.learning_rate

        def learning_rate(self, update):
            rate = original(self, update)
            return np.inf if self.step in steps and not self.host.counts['fall_backs'] else rate

        monkeypatch.setattr(run.Run, 'learning_rate', learning_rate)

    return at


# ------------------------------------------------------------------------------- divergence


def test_divergence_stops_with_place_and_rate_and_keeps_the_last_checkpoint(broken_rate, tmp_path):
    broken_rate(9)
    where = 'update 10, stage 0, batch size 8, learning rate inf'
    with pytest.raises(train.Diverged, match=f'gradient or weights not finite at {where}'):
        train.train(tiny(), tmp_path)
    state = train_state.restore(tmp_path)
    assert 0 < int(state.step) < 10
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_skipped_updates_leave_the_weights_and_are_counted(broken_rate, tmp_path):
    broken_rate(4, 5, 9)
    config = tiny(**{'divergence.action': 'skip', 'checkpoint_every_epochs': 0.08})
    summary = train.train(config, tmp_path)
    assert (summary['skipped'], summary['updates']) == (3, 23) and 'fall_backs' not in summary
    records = of_kind(tmp_path, 'train')
    assert [(r['step'], r['skipped']) for r in records if 'skipped' in r] == [(8, 2), (12, 1)]
    assert all(np.isfinite(r['loss']) for r in records)


def test_a_skipped_update_changes_nothing_but_the_clock(broken_rate, tmp_path):
    broken_rate(4, 5)
    states = []
    for stop_at in (4, 6):
        with pytest.raises(train.Preempted):
            config = tiny(**{'divergence.action': 'skip'})
            train.train(config, tmp_path / str(stop_at), StopAt(stop_at - 1))
        states.append(train_state.restore(tmp_path / str(stop_at)))
    assert train_state.params_digest(states[0]) == train_state.params_digest(states[1])
    assert [(int(s.step), int(s.examples_seen)) for s in states] == [(4, 32), (6, 48)]


def test_too_many_skipped_updates_in_a_row_stop_the_run(broken_rate, tmp_path):
    broken_rate(4, 5, 6)
    config = tiny(**{'divergence.action': 'skip', 'divergence.max_skipped': 2})
    with pytest.raises(train.Diverged, match='at update 7, .*, 3 in a row'):
        train.train(config, tmp_path)


def test_a_window_of_skipped_updates_alone_has_no_loss(broken_rate, tmp_path):
    broken_rate(4, 5, 6, 7)
    train.train(tiny(**{'divergence.action': 'skip'}), tmp_path)
    (record,) = (r for r in of_kind(tmp_path, 'train') if r['step'] == 8)
    assert (record['loss'], record['accuracy'], record['skipped']) == (None, None, 4)


def test_wall_time_goes_on_when_a_run_falls_back(broken_rate, tmp_path, monkeypatch):
    broken_rate(9)
    begun = []
    begin = run.Run.begin
    monkeypatch.setattr(run.Run, 'begin', lambda self, why: begun.append(self.began) or begin(self, why))
    summary = train.train(tiny(**{'divergence.action': 'fall_back'}), tmp_path)
    assert summary['fall_backs'] == 1 and len(begun) == 2
    assert begun[0] == begun[1] and summary['setup_seconds'] > 0


def test_falling_back_goes_on_from_the_last_checkpoint_with_a_lower_rate(broken_rate, tmp_path):
    broken_rate(9)
    config = tiny(**{'divergence.action': 'fall_back', 'divergence.rate_factor': 0.25})
    summary = train.train(config, tmp_path)
    assert summary['fall_backs'] == 1
    session = of_kind(tmp_path, 'session')[-1]
    assert 'diverged' in session['reason'] and 'effective learning rate x 0.25' in session['reason']
    begun = session['step']
    assert 0 < begun < 10
    for record in of_kind(tmp_path, 'train'):
        full = 0.02 * 0.75 ** record['stage']
        assert record['learning_rate'] == pytest.approx(full if record['step'] < begun else full / 4)


def test_falling_back_ends_after_so_many_times(tmp_path):
    config = tiny(
        **{
            'learning_rate.effective': 1e30,
            'divergence.action': 'fall_back',
            'divergence.max_fall_backs': 2,
        }
    )
    with pytest.raises(train.Diverged):
        train.train(config, tmp_path)
    lines = (tmp_path / metrics.METRICS_FILE).read_text().splitlines()
    reasons = [json.loads(line).get('reason') for line in lines]
    assert [r for r in reasons if r and 'x 0.5' in r] and [r for r in reasons if r and 'x 0.25' in r]
    assert not [r for r in reasons if r and 'x 0.125' in r]


# ------------------------------------------------------------------------- changed schedules

CHANGES = {'batch.growth_epochs': 0.75, 'num_epochs': 2.0, 'learning_rate.effective': 0.01}


def test_a_changed_schedule_is_refused_with_its_differences(tmp_path):
    with pytest.raises(train.Preempted):
        train.train(tiny(), tmp_path, StopAt(4))
    before = {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
    with pytest.raises(ConfigError) as refused:
        train.train(tiny(**CHANGES), tmp_path)
    for expected in (
        'num_epochs (2.0 here, 3.0 there)',
        'batch.growth_epochs',
        '--allow_schedule_change',
    ):
        assert expected in str(refused.value)
    with pytest.raises(ConfigError, match='model.name') as refused:
        train.train(tiny(**CHANGES, **{'model.name': 'resnet14'}), tmp_path, allow_schedule_change=True)
    assert 'num_epochs' not in str(refused.value)
    assert {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()} == before


def test_an_accepted_schedule_keeps_the_position_and_is_recorded(tmp_path):
    with pytest.raises(train.Preempted):
        train.train(tiny(), tmp_path, StopAt(9))
    train.train(tiny(**CHANGES), tmp_path, allow_schedule_change=True)
    session = of_kind(tmp_path, 'session')[-1]
    assert (session['step'], session['examples_seen']) == (10, 80)
    assert 'schedule changed: batch.growth_epochs (1.0 before, 0.75 now)' in session['reason']
    assert 'num_epochs (3.0 before, 2.0 now)' in session['reason']
    sizes = [(s['examples_seen'], s['batch_size']) for s in of_kind(tmp_path, 'stage')]
    assert sizes == [(0, 8), (80, 16), (160, 32)]
    assert json.loads((tmp_path / 'config.json').read_text())['num_epochs'] == 2.0
    assert metrics.read_records(tmp_path)[-1]['examples_seen'] >= 200
    train.train(tiny(**CHANGES), tmp_path)  # it is the run's own now
    with pytest.raises(ConfigError, match='differing'):
        train.train(tiny(), tmp_path)


def test_a_run_killed_right_after_its_schedule_changed_goes_on_with_the_new_one(tmp_path, monkeypatch):
    def killed(self):
        raise KeyboardInterrupt

    ends = []
    for kill in (False, True):
        directory = tmp_path / str(kill)
        with pytest.raises(train.Preempted):
            train.train(tiny(), directory, StopAt(9))
        if kill:
            with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
                patched.setattr(run.Run, 'dispatch', killed)
                train.train(tiny(**CHANGES), directory, allow_schedule_change=True)
            ends.append(train.train(tiny(**CHANGES), directory))
        else:
            ends.append(train.train(tiny(**CHANGES), directory, allow_schedule_change=True))
    assert ends[0]['params_digest'] == ends[1]['params_digest']


def test_another_microbatch_can_be_asked_for(tmp_path):
    with pytest.raises(train.Preempted):
        train.train(tiny(**{'batch.max_per_device': 4}), tmp_path, StopAt(4))
    smaller = tiny(**{'batch.max_per_device': 2})
    train.train(smaller, tmp_path, allow_schedule_change=True)
    assert [s['microbatch_size'] for s in of_kind(tmp_path, 'stage')] == [4, 2, 2, 2]


def sizes_from(directory, step):
    return [s['batch_size'] for s in of_kind(directory, 'stage') if s['step'] >= step]


GROWS = {
    'batch.policy': 'plateau',
    'batch.patience_epochs': 1,
    'batch.min_improvement': 0.9,
    'batch.max_size': 32,
    'num_epochs': 4.0,
}


@pytest.fixture(scope='module')
def grown(tmp_path_factory):
    """A run that was stopped at epoch 2.4 with a batch of 16, the second of three, growth to come."""
    directory = tmp_path_factory.mktemp('grown')
    with pytest.raises(train.Preempted):
        train.train(tiny(**GROWS), directory, StopAt(29))
    assert sizes_from(directory, 0) == [8, 16]
    return directory


@pytest.mark.parametrize(
    'changes, sizes',
    [
        ({'batch.max_per_device': 2}, [16, 32]),  # the state as it was: grows at epoch 3
        ({'batch.max_size': 16}, [16]),  # up to the new ceiling
        ({'batch.base_size': 4}, [16, 32]),
        ({'batch.base_size': 12, 'batch.max_size': 24}, [12, 24]),  # the nearest rung
        ({'batch.policy': 'norm_test', 'batch.statistics.decision_epochs': 9.0}, [16]),
        ({'batch.policy': 'fixed', 'batch.base_size': 4}, [4]),  # which has nothing to go on with
    ],
)
def test_a_policy_goes_on_where_it_was_as_far_as_its_ladder_allows(grown, tmp_path, changes, sizes):
    shutil.copytree(grown, tmp_path / 'run')
    train.train(tiny(**GROWS | changes), tmp_path / 'run', allow_schedule_change=True)
    (session,) = of_kind(tmp_path / 'run', 'session')[1:]
    assert sizes_from(tmp_path / 'run', session['step']) == sizes


def test_a_policy_that_begins_in_mid_run_sums_losses_from_there_on(tmp_path):
    with pytest.raises(train.Preempted):
        train.train(tiny(**GROWS | {'batch.policy': 'fixed'}), tmp_path, StopAt(20))
    train.train(tiny(**GROWS), tmp_path, allow_schedule_change=True)
    (session,) = of_kind(tmp_path, 'session')[1:]
    assert session['epoch'] > 1.5 and sizes_from(tmp_path, session['step']) == [8, 16]


def test_a_larger_batch_than_before_gets_the_microbatch_that_memory_allows(tmp_path):
    train.train(tiny(**{'batch.max_size': 8, 'num_epochs': 1.0}), tmp_path)
    changed = tiny(**{'batch.max_size': 32, 'num_epochs': 2.0, 'batch.growth_epochs': 0.5})
    train.train(changed, tmp_path, allow_schedule_change=True)
    stages = of_kind(tmp_path, 'stage')
    assert stages[-1]['batch_size'] == 32 and {s['num_microbatches'] for s in stages} == {1}


def test_a_finished_run_can_be_prolonged(tmp_path):
    first = train.train(tiny(num_epochs=1.0), tmp_path)
    longer = train.train(tiny(num_epochs=2.0), tmp_path, allow_schedule_change=True)
    assert longer['updates'] > first['updates']
    assert [r['step'] for r in of_kind(tmp_path, 'summary')] == [longer['updates']]


def test_a_checkpoint_of_a_version_that_lacked_a_key_is_continued_as_if_it_had_the_default(
    tmp_path, monkeypatch
):
    with pytest.raises(train.Preempted):
        train.train(tiny(), tmp_path, StopAt(5))
    original = checkpoint.restore

    def restore(*args, **kwargs):
        state, host = original(*args, **kwargs)
        del host['schedule']['batch.statistics.min_groups']
        return state, host

    monkeypatch.setattr(checkpoint, 'restore', restore)
    train.train(tiny(), tmp_path)
    assert of_kind(tmp_path, 'session')[-1]['reason'] == 'continues from the checkpoint of update 6'


# -------------------------------------------------------------------------------- work directory


def hold(directory, held, release):
    with workdir.locked(directory):
        held.set()
        release.wait(60)


def test_a_locked_directory_is_refused_and_the_lock_of_a_killed_process_is_not_in_the_way(tmp_path):
    spawn = multiprocessing.get_context('spawn')
    held, release = spawn.Event(), spawn.Event()
    process = spawn.Process(target=hold, args=(tmp_path / 'run', held, release))
    process.start()
    assert held.wait(60)
    with (
        pytest.raises(ConfigError, match=f'in use by process {process.pid} on {socket.gethostname()}'),
        workdir.locked(tmp_path / 'run'),
    ):
        pass
    process.kill()
    process.join()
    assert (tmp_path / 'run' / workdir.LOCK_FILE).exists()
    with workdir.locked(tmp_path / 'run'):
        pass


def test_a_directory_that_was_made_for_nothing_is_removed_again(tmp_path):
    with workdir.locked(tmp_path / 'a' / 'b'):
        assert (tmp_path / 'a' / 'b').is_dir()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / 'c').mkdir()
    with workdir.locked(tmp_path / 'c'):
        pass
    assert (tmp_path / 'c').is_dir()


def damage(directory, *steps):
    for step in steps:
        for path in (directory / checkpoint.FOLDER / str(step)).rglob('*'):
            if path.is_file():
                os.truncate(path, 0)


def test_a_run_with_a_damaged_checkpoint_says_so_and_ends_in_the_same_weights(tmp_path, capsys):
    whole = train.train(tiny(), tmp_path / 'whole')
    with pytest.raises(train.Preempted):
        train.train(tiny(), tmp_path / 'run', StopAt(12))
    before, newest = checkpoint.steps(tmp_path / 'run' / checkpoint.FOLDER)[-2:]
    damage(tmp_path / 'run', newest)
    capsys.readouterr()
    assert train.train(tiny(), tmp_path / 'run')['params_digest'] == whole['params_digest']
    said = ' '.join(capsys.readouterr().out.split())
    assert f'the checkpoint of update {newest} is damaged' in said
    assert f'going on from that of update {before}' in said
    assert of_kind(tmp_path / 'run', 'train') and (
        [r['loss'] for r in of_kind(tmp_path / 'run', 'train')]
        == [r['loss'] for r in of_kind(tmp_path / 'whole', 'train')]
    )


def test_a_run_whose_checkpoints_are_all_damaged_is_refused_and_left_as_it_is(tmp_path):
    with pytest.raises(train.Preempted):
        train.train(tiny(), tmp_path, StopAt(12))
    damage(tmp_path, *checkpoint.steps(tmp_path / checkpoint.FOLDER))
    before = {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file() and p.name != '.lock'}
    with pytest.raises(ConfigError, match='no other is left'):
        train.train(tiny(), tmp_path)
    after = {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file() and p.name != '.lock'}
    assert after == before


def test_a_checkpoint_is_never_ahead_of_the_records(tmp_path, monkeypatch):
    """A disk that refuses records for a while: the run saves nothing until they are written."""
    original = metrics.MetricsWriter.flush

    def flush(self):
        if 0 < getattr(self, 'refused', 0) < 8 or b'"step": 8' in self._unwritten:
            self.refused = getattr(self, 'refused', 0) + 1
        if 0 < getattr(self, 'refused', 0) < 8:
            raise OSError(28, 'No space left on device')
        original(self)

    saved, save = [], checkpoint.Checkpointer.save
    monkeypatch.setattr(metrics.MetricsWriter, 'flush', flush)
    monkeypatch.setattr(
        checkpoint.Checkpointer,
        'save',
        lambda self, step, *rest: (
            saved.append((step, metrics.read_records(tmp_path)[-1]['step'])) or save(self, step, *rest)
        ),
    )
    train.train(tiny(log_every_steps=1, checkpoint_every_epochs=0.1), tmp_path)
    assert saved[-1][0] == 23 and 8 not in [step for step, _ in saved]
    assert all(step - recorded <= 0 for step, recorded in saved)
    assert [r['step'] for r in of_kind(tmp_path, 'train')] == list(range(1, 24))


def test_a_run_goes_on_through_failed_saves_and_says_so_at_its_end(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, '_check_room', full)
        with pytest.raises(train.SaveFailed, match='No space left on device'):
            train.train(tiny(), tmp_path)
    assert 'the checkpoint of update' in capsys.readouterr().out
    records = of_kind(tmp_path, 'train')
    assert records[-1]['step'] == 23 and not of_kind(tmp_path, 'summary')
    assert train.train(tiny(), tmp_path)['updates'] == 23


# ------------------------------------------------------------------------------ several processes

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
