"""Locks, damaged checkpoints, disks that are full: a run goes on where that is right."""

import multiprocessing
import os
import socket

import pytest
from runs import StopAt, of_kind, tiny

from adabatch_jax import checkpoint, metrics, train, workdir
from adabatch_jax.config import ConfigError


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


def test_a_directory_is_removed_again_where_it_was_made_for_nothing_and_else_keeps_its_lock(tmp_path):
    with workdir.locked(tmp_path / 'a' / 'b'):
        assert (tmp_path / 'a' / 'b').is_dir()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / 'c').mkdir()
    with workdir.locked(tmp_path / 'c'):
        pass
    assert (tmp_path / 'c').is_dir()
    with workdir.locked(tmp_path / 'd'):
        (tmp_path / 'd' / 'kept').touch()
    assert (tmp_path / 'd' / workdir.LOCK_FILE).exists()


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
    original = metrics._Appended.flush

    def flush(self):
        if 0 < getattr(self, 'refused', 0) < 8 or b'"step": 8' in self.waiting:
            self.refused = getattr(self, 'refused', 0) + 1
        if 0 < getattr(self, 'refused', 0) < 8:
            raise OSError(28, 'No space left on device')
        original(self)

    saved, save = [], checkpoint.Checkpointer.save
    monkeypatch.setattr(metrics._Appended, 'flush', flush)
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
