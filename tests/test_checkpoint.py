"""Checkpoints: what is committed was read back, damage is found, and failures harm nothing."""

import errno
import hashlib
import os
import pathlib
import shutil
import threading

import jax.numpy as jnp
import numpy as np
import pytest

from adabatch_jax import analysis, checkpoint
from adabatch_jax.config import ConfigError

STATE = {'params': {'w': jnp.arange(6.0).reshape(2, 3)}, 'step': jnp.int32(4)}


def save(folder, *accuracies, first=1):
    """Checkpoints of updates 1, 2, ...; returns the lines that were reported."""
    lines = []
    saver = checkpoint.Checkpointer(folder, lines.append)
    for step, accuracy in enumerate(accuracies, start=first):
        saver.save(step, {**STATE, 'step': jnp.int32(step)}, {'note': f'ü {step}'}, accuracy)
    saver.close()
    return lines


def files(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}


def test_what_was_saved_is_read_back_bit_for_bit(tmp_path):
    save(tmp_path, 0.25)
    state, host = checkpoint.restore(tmp_path, target={**STATE})
    assert host == {'note': 'ü 1', 'accuracy': 0.25}
    np.testing.assert_array_equal(state['params']['w'], STATE['params']['w'])
    assert checkpoint.tree_digest(state) == checkpoint.tree_digest({**STATE, 'step': jnp.int32(1)})


def test_the_digest_is_that_of_paths_dtypes_shapes_and_bytes():
    w, b = np.ones((1, 1), np.float32), np.arange(2, dtype=np.int32)
    hashed = b'a/b int32 (2,)\n' + b.tobytes() + b'w float32 (1, 1)\n' + w.tobytes()
    assert checkpoint.tree_digest({'w': w, 'a': {'b': b}}) == hashlib.sha256(hashed).hexdigest()


@pytest.mark.parametrize(
    'accuracies, kept',
    [
        ((None,), [1]),
        ((None, None, None, None), [3, 4]),
        ((0.9, None, 0.1, None), [1, 3, 4]),
        ((0.1, 0.9, 0.9, 0.2, None), [3, 4, 5]),  # of equally good ones the later
        ((0.1, 0.9), [1, 2]),
    ],
)
def test_the_two_latest_and_the_best_are_kept(tmp_path, accuracies, kept):
    save(tmp_path, *accuracies)
    assert checkpoint.steps(tmp_path) == kept
    if any(accuracies):
        assert checkpoint.best_step(tmp_path) in kept


def test_a_failure_beside_a_save_leaves_it_to_its_end(tmp_path):
    lines = []
    saver = checkpoint.Checkpointer(tmp_path, lines.append)
    saver.save(1, STATE, {})
    saver.failed(2, OSError(errno.ENOSPC, 'No space left on device'))
    assert checkpoint.steps(tmp_path) == [1]
    assert len(lines) == 1 and 'the last good one is that of update 1' in lines[0]
    with pytest.raises(checkpoint.SaveFailed, match='update 2'):
        saver.wait()
    saver.close()


def test_a_step_that_is_saved_already_is_left_as_it_is(tmp_path):
    save(tmp_path, 0.5)
    before = files(tmp_path)
    assert save(tmp_path, 0.7) == []
    assert files(tmp_path) == before


@pytest.fixture
def may_write(monkeypatch):
    """An event that a save waits for before it writes anything."""
    event, write = threading.Event(), checkpoint.Checkpointer._write

    def write_late(*args):
        event.wait(120)
        write(*args)

    monkeypatch.setattr(checkpoint.Checkpointer, '_write', write_late)
    return event


def test_a_state_that_is_being_saved_is_not_waited_for_when_it_is_to_be_saved_again(tmp_path, may_write):
    saver = checkpoint.Checkpointer(tmp_path)
    saver.save(1, STATE, {}, 0.5)
    again = threading.Thread(target=saver.save, args=(1, STATE, {}, 0.5), daemon=True)
    again.start()
    again.join(60)
    has_returned = not again.is_alive()
    may_write.set()
    saver.close()
    assert has_returned and checkpoint.steps(tmp_path) == [1]


def test_what_is_saved_is_the_state_at_that_time_whatever_becomes_of_its_arrays(tmp_path, may_write):
    saver, state = checkpoint.Checkpointer(tmp_path), {'w': np.arange(3.0)}
    saver.save(1, state, {})
    state['w'][:] = 7
    may_write.set()
    saver.close()
    np.testing.assert_array_equal(checkpoint.restore(tmp_path)[0]['w'], [0, 1, 2])


def test_a_state_whose_save_failed_is_saved_when_it_is_due_again(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, '_write_manifest', lambda path: os.stat(path / 'missing'))
    lines = []
    saver = checkpoint.Checkpointer(tmp_path, lines.append)
    saver.save(1, STATE, {})
    with pytest.raises(checkpoint.SaveFailed):
        saver.wait()
    monkeypatch.undo()
    saver.save(1, STATE, {})
    saver.close()
    assert checkpoint.steps(tmp_path) == [1] and len(lines) == 1


def truncate(file):
    os.truncate(file, file.stat().st_size // 2)


def fill_with_zeros(file):
    file.write_bytes(bytes(file.stat().st_size))


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize('damage', [truncate, fill_with_zeros, flip_a_bit, pathlib.Path.unlink])
def test_damage_to_any_file_is_found_and_the_one_before_is_taken(tmp_path, damage):
    save(tmp_path / 'whole', None, None)
    names = [p.relative_to(tmp_path / 'whole') for p in files(tmp_path / 'whole' / '2')]
    assert len(names) > 8
    for name in names:
        folder = tmp_path / 'damaged'
        shutil.copytree(tmp_path / 'whole', folder)
        if (folder / name).stat().st_size:
            damage(folder / name)
            lines = []
            state, _ = checkpoint.restore(folder, report=lines.append)
            assert state['step'] == 1, name
            (line,) = lines
            assert 'the checkpoint of update 2 is damaged' in line and 'that of update 1' in line
            with pytest.raises(checkpoint.Damaged, match='the checkpoint of update 2 is damaged'):
                checkpoint.restore(folder, step=2)
        shutil.rmtree(folder)


def test_an_empty_folder_is_a_damaged_checkpoint(tmp_path):
    save(tmp_path, None)
    (tmp_path / '2').mkdir()
    lines = []
    assert checkpoint.restore(tmp_path, report=lines.append)[0]['step'] == 1
    assert 'update 2 is damaged: manifest.json is missing' in lines[0]


def test_without_an_undamaged_checkpoint_nothing_is_changed_and_all_are_named(tmp_path):
    save(tmp_path, None, None)
    for step in (1, 2):
        truncate(tmp_path / str(step) / checkpoint.MANIFEST)
    before = files(tmp_path)
    with pytest.raises(checkpoint.Damaged, match='update 2 is damaged.*update 1 is damaged.*no other'):
        checkpoint.restore(tmp_path)
    assert files(tmp_path) == before


def test_an_analysis_leaves_out_checkpoints_that_are_removed_meanwhile_unless_all_are(tmp_path):
    save(tmp_path, 0.9, None, None)
    lines = []
    found = analysis._sound(tmp_path, [1, 2, 3], STATE, lines.append, bool)
    assert next(found)[0] == 1
    shutil.rmtree(tmp_path / '2')
    assert [step for step, *_ in found] == [3]
    (line,) = lines
    assert line.startswith('warning: no checkpoint of step 2 in') and line.endswith('; it is left out')
    with pytest.raises(ConfigError, match='workdir: no checkpoint of step 5'):
        list(analysis._sound(tmp_path, [4, 5], STATE, lines.append, bool))


def test_a_checkpoint_of_an_earlier_update_than_the_latest_is_refused_and_none_is_removed(tmp_path):
    save(tmp_path, None, None, None, first=10)
    saver = checkpoint.Checkpointer(tmp_path)
    for step in (5, 11):
        with pytest.raises(
            ValueError, match=f'step: got {step}, and .* of update 12; .*set_aside_after'
        ):
            saver.save(step, STATE, {})
    saver.close()
    assert checkpoint.steps(tmp_path) == [11, 12]
    checkpoint.set_aside_after(tmp_path, 11)
    save(tmp_path, None, first=12)
    assert checkpoint.steps(tmp_path) == [11, 12]


def test_newer_checkpoints_are_set_aside_not_deleted(tmp_path):
    save(tmp_path, None, None)
    truncate(tmp_path / '2' / checkpoint.MANIFEST)
    checkpoint.set_aside_after(tmp_path, 1)
    assert checkpoint.steps(tmp_path) == [1]
    assert (tmp_path / checkpoint.DAMAGED / '2' / 'host' / 'metadata').exists()
    assert save(tmp_path, None, first=2) == []
    assert checkpoint.steps(tmp_path) == [1, 2]


def test_a_checkpoint_of_other_arrays_is_refused_by_name(tmp_path):
    save(tmp_path, None)
    with pytest.raises(ValueError, match=r'holds float32 \(2, 3\) as params/w, and the run needs float'):
        checkpoint.restore(tmp_path, target={**STATE, 'params': {'w': jnp.zeros((3, 3))}})
    with pytest.raises(ValueError, match='holds float32 .* as params/w, and the run needs int32'):
        checkpoint.restore(tmp_path, target={**STATE, 'params': {'w': jnp.zeros((2, 3), jnp.int32)}})
    with pytest.raises(ValueError, match='holds nothing as params/b'):
        checkpoint.restore(tmp_path, target={**STATE, 'params': {**STATE['params'], 'b': jnp.zeros(1)}})


def fail_with(number):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize('where', ['_check_room', '_read', '_write_manifest', '_checkpointer'])
def test_a_save_that_fails_is_reported_and_the_others_stay(tmp_path, monkeypatch, where):
    save(tmp_path, 0.9, None, None)
    before = {step: files(tmp_path / str(step)) for step in (1, 2, 3)}
    lines = []
    saver = checkpoint.Checkpointer(tmp_path, lines.append)
    with monkeypatch.context() as broken:
        broken.setattr(f'adabatch_jax.checkpoint.{where}', fail_with(errno.ENOSPC))
        saver.save(4, STATE, {})
        with pytest.raises(checkpoint.SaveFailed, match='update 4 .*No space left on device'):
            saver.wait()
    (line,) = lines
    assert 'No space left on device' in line and 'the last good one is that of update 3' in line
    assert {step: files(tmp_path / str(step)) for step in checkpoint.steps(tmp_path)} == before
    assert not (tmp_path / checkpoint.UNFINISHED).exists()
    saver.save(5, STATE, {})
    saver.wait()
    saver.close()
    assert checkpoint.steps(tmp_path) == [1, 3, 5]


def test_a_save_goes_where_a_killed_process_had_begun_the_same(tmp_path):
    (tmp_path / checkpoint.UNFINISHED / '1').mkdir(parents=True)
    assert save(tmp_path, None) == []
    assert checkpoint.steps(tmp_path) == [1]


def test_old_ones_that_cannot_be_removed_are_no_failure_of_a_save(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.Checkpointer, '_remove_old', fail_with(errno.EACCES))
    assert save(tmp_path, None, None, None) == []
    assert checkpoint.steps(tmp_path) == [1, 2, 3]


def test_nothing_is_removed_before_the_newer_one_was_read_back(tmp_path, monkeypatch):
    save(tmp_path, None, None)
    seen, original = [], checkpoint._read
    monkeypatch.setattr(
        checkpoint, '_read', lambda path: seen.append(checkpoint.steps(tmp_path)) or original(path)
    )
    save(tmp_path, None, first=3)
    assert seen == [[1, 2]] and checkpoint.steps(tmp_path) == [2, 3]


def test_content_that_is_not_what_was_given_is_not_committed(tmp_path, monkeypatch):
    save(tmp_path, None)
    original = checkpoint._read

    def read(path):
        state, host = original(path)
        return {**state, 'step': state['step'] + 1}, host

    monkeypatch.setattr(checkpoint, '_read', read)
    (line,) = save(tmp_path, None, first=2)
    assert 'what was read back is not what was written' in line
    assert checkpoint.steps(tmp_path) == [1]


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() != 0, reason='needs root to mount')
def test_a_disk_that_fills_up_and_gets_room_again(tmp_path):
    """A small disk in memory; where mounting is not allowed, the fakes above have to do."""
    import subprocess

    mount = ['mount', '-t', 'tmpfs', '-o', 'size=64k', 'tmpfs', str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('may not mount')
    try:
        (line,) = save(tmp_path / 'c', None)
        assert 'No space left on device' in line and 'there is none' in line
        subprocess.run(['mount', '-o', 'remount,size=8m', str(tmp_path)], check=True)
        assert save(tmp_path / 'c', None, None) == []
        subprocess.run(['mount', '-o', 'remount,ro', str(tmp_path)], check=True)
        (line,) = save(tmp_path / 'c', None, first=3)
        assert 'Read-only file system' in line and 'that of update 2' in line
        assert checkpoint.restore(tmp_path / 'c')[0]['step'] == 2
    finally:
        subprocess.run(['umount', str(tmp_path)], check=True)
