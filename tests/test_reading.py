"""Reading encoded images from disks that fail for a while."""

import builtins
import errno

import numpy as np
import pytest

from adabatch_jax.input_pipeline import encoded


@pytest.fixture
def split(tmp_path):
    """Two examples in one file."""
    file = tmp_path / 'records'
    file.write_bytes(b'0123456789')
    one = np.zeros(2, np.int32)
    return encoded.EncodedSplit((str(file),), one, np.array([2, 5]), np.array([3, 5]), one)


def failing(monkeypatch, split, number, times):
    """To open its file raises an error of the system for some times; the pauses that were made."""
    left, pauses, real = [number] * times, [], builtins.open

    def opening(file, *args, **kwargs):
        if left and file in split.paths:
            raise OSError(left.pop(), 'as told')
        return real(file, *args, **kwargs)

    monkeypatch.setattr(builtins, 'open', opening)
    monkeypatch.setattr(encoded.time, 'sleep', pauses.append)
    return pauses


def test_examples_are_read_whole(split):
    assert [split.read(k) for k in (0, 1)] == [b'234', b'56789']


@pytest.mark.parametrize('number', [errno.ESTALE, errno.EIO, errno.ETIMEDOUT])
def test_a_read_that_fails_is_tried_again_after_a_pause(split, number, monkeypatch):
    pauses = failing(monkeypatch, split, number, times=len(encoded.PAUSES))
    assert split.read(0) == b'234'
    assert tuple(pauses) == encoded.PAUSES


def test_a_read_that_fails_for_good_raises(split, monkeypatch):
    failing(monkeypatch, split, errno.EIO, times=len(encoded.PAUSES) + 1)
    with pytest.raises(OSError, match='as told'):
        split.read(0)


@pytest.mark.parametrize('number', [errno.ENOENT, errno.EACCES, errno.EISDIR])
def test_what_is_not_there_is_told_at_once(split, number, monkeypatch):
    pauses = failing(monkeypatch, split, number, times=1)
    with pytest.raises(OSError, match='as told'):
        split.read(0)
    assert pauses == []
