"""Checkpoints: device state and host state, written by Orbax, read back, and committed whole.

In the folder of a run's checkpoints::

    120/         committed: named by its step, with the SHA-256 of each of its files in manifest.json
    unfinished/  being written, or removed; what a killed process left there means nothing
    damaged/     checkpoints that no longer were what had been written, set aside by a run that went on
"""

import concurrent.futures
import contextlib
import errno
import hashlib
import json
import operator
import os
import pathlib
import shutil
import warnings
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp

FOLDER = 'checkpoints'
UNFINISHED, DAMAGED = 'unfinished', 'damaged'
MANIFEST = 'manifest.json'
# One process reads and writes; it waits for no other.
_ALONE = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})


class Damaged(ValueError):
    """The files of a checkpoint are not what was written."""


class SaveFailed(OSError):
    """The end of a run could not be saved, for example because the disk is full."""


class Checkpointer:
    """Saves in the background, and commits a checkpoint once it was read back from the disk.

    Keeps the two latest checkpoints and the one of best accuracy; an older one is removed only after a
    newer one was committed. A save that fails is reported as soon as that is known, and harms none of
    the others.

    With several processes only the first may have one, as only the first may read: a state is the same
    in all of them.

    Args:
      directory: the folder of the checkpoints; made with the first one. Nobody else may write to it.
      report: takes a line about a failure; called from the thread that finishes a save.
    """

    def __init__(self, directory: str | os.PathLike, report: Callable[[str], Any] = warnings.warn):
        self._directory = pathlib.Path(directory).absolute()
        self._report = report
        self._executor = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix='checkpoint')
        self._finishing: concurrent.futures.Future | None = None
        self._error: tuple[int, Exception] | None = None  # of the last save, with its step
        self._saved = max(steps(directory), default=None)
        self._saving: int | None = None

    def save(self, step: int, state: Any, host: dict[str, Any], accuracy: float | None = None) -> None:
        """Begins to save; the state's buffers may be donated as soon as this returns.

        Args:
          step: updates taken, the name of the checkpoint. The latest one, and one that is being saved,
            are left as they are.
          state: pytree of arrays, the same on every device.
          host: JSON-able state of the host; not to be changed afterwards.
          accuracy: of an evaluation of this very state, for keeping the best; None without one.

        Raises:
          ValueError: there is a later one, which would be taken for what this run comes to.
        """
        if step in (self._saving, self._saved):
            return  # a best state that is due as well: to wait for it would hold training up
        self._join()
        if step < (self._saved or 0):
            raise ValueError(
                f'step: got {step}, and {str(self._directory)!r} has a checkpoint of update '
                f'{self._saved}; accepted: later ones; to go on from an earlier one, call '
                'set_aside_after before the Checkpointer is made'
            )
        try:  # a copy: the buffers are given to the next update; all are fetched at once
            state = jax.tree.map(np.array, jax.device_get(state))
        except RuntimeError as error:
            self._fail(step, error)
            return
        self._saving = step
        self._finishing = self._executor.submit(self._write, step, state, {**host, 'accuracy': accuracy})

    def _write(self, step: int, state: Any, host: dict[str, Any]) -> None:
        path = self._directory / UNFINISHED / str(step)
        try:
            if path.parent.exists():  # what a killed process left
                shutil.rmtree(path.parent)
            path.parent.mkdir(parents=True)
            _check_room(path.parent, state)
            args = ocp.args.Composite(state=ocp.args.PyTreeSave(state), host=ocp.args.JsonSave(host))
            with _checkpointer() as writer:
                writer.save(path, args=args)
            if tree_digest(_read(path)[0]) != tree_digest(state):
                raise Damaged('what was read back is not what was written')
            _write_manifest(path)
            path.rename(self._directory / str(step))
            _sync(self._directory)
        except (OSError, ValueError, RuntimeError) as error:  # TensorStore's are ValueErrors
            self._fail(step, error)
            return
        self._saved, self._error = step, None
        with contextlib.suppress(OSError):  # one too many is tried again with the next
            self._remove_old()
        self._clear()

    def _remove_old(self) -> None:
        existing = steps(self._directory)
        for step in set(existing[:-2]) - {best_step(self._directory)}:
            # Renamed first: a process that is killed here leaves no half of a checkpoint.
            removed = self._directory / UNFINISHED / f'removed-{step}'
            (self._directory / str(step)).rename(removed)
            shutil.rmtree(removed, ignore_errors=True)

    def failed(self, step: int, error: Exception) -> None:
        """Takes note that a checkpoint could not be saved, and reports it."""
        self._join()  # the one before may be sound
        self._fail(step, error)

    def _fail(self, step: int, error: Exception) -> None:
        self._error, self._saving = (step, error), None
        self._clear()  # a full disk needs the room
        last = f'the last good one is that of update {self._saved}' if self._saved else 'there is none'
        self._report(
            f'warning: the checkpoint of update {step} could not be saved ({_reason(error)}); {last}; '
            'training goes on'
        )

    def _clear(self) -> None:
        shutil.rmtree(self._directory / UNFINISHED, ignore_errors=True)

    def _join(self) -> None:
        if self._finishing is not None:
            self._finishing.result()  # what it raises is no failure of the disk
            self._finishing = None

    def wait(self) -> None:
        """Waits for what is being saved.

        Raises:
          SaveFailed: the last save failed.
        """
        self._join()
        if self._error is not None:
            step, error = self._error
            raise SaveFailed(
                f'the checkpoint of update {step} could not be saved in {str(self._directory)!r}: '
                f'{_reason(error)}'
            ) from error

    def close(self) -> None:
        """Waits for what is being saved, and ends the thread that does it."""
        try:
            self._join()
        finally:
            self._executor.shutdown()


class NoCheckpointer:
    """In place of a ``Checkpointer`` in a process that writes nothing."""

    def save(self, step: int, state: Any, host: dict[str, Any], accuracy: float | None = None) -> None:
        """Does nothing."""


def _check_room(folder: pathlib.Path, state: Any) -> None:
    """Raises ``OSError`` on a disk without room for a state: TensorStore says so in many tracebacks."""
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + 2**20
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f'{os.strerror(errno.ENOSPC)}: {free:,} bytes, needed {needed:,}')


def _reason(error: Exception) -> str:
    """An error in one short line; TensorStore's go on for many."""
    text = getattr(error, 'strerror', None) or ' '.join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f'{text[:150]} ... {text[-150:]}'


def steps(directory: str | os.PathLike) -> list[int]:
    """The committed checkpoints in a folder, oldest first; they may have been damaged since."""
    folder = pathlib.Path(directory)
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def best_step(directory: str | os.PathLike) -> int | None:
    """The checkpoint whose evaluation had the best accuracy, None where none was evaluated."""
    scored = []
    for step in steps(directory):
        try:
            host = json.loads(pathlib.Path(directory, str(step), 'host/metadata').read_text())
            if host['accuracy'] is not None:
                scored.append((host['accuracy'], step))
        except (OSError, ValueError, LookupError, TypeError):
            continue  # damaged
    return max(scored, default=(0, None))[1]


def restore(
    directory: str | os.PathLike,
    step: int | Literal['latest', 'best'] | None = None,
    target: Any = None,
    report: Callable[[str], Any] = warnings.warn,
    check: Callable[[dict[str, Any]], Any] = lambda host: None,
) -> tuple[Any, dict[str, Any]]:
    """Reads a checkpoint, or the latest one that is not damaged, after comparing it with its digests.

    Args:
      directory: the folder of the checkpoints.
      step: which one; ``'best'`` for that of ``best_step``, ``'latest'`` or None for the latest.
      target: pytree of arrays or shapes that gives the structure; None for the structure that was
        saved, in dictionaries.
      report: takes a line about each damaged one that was passed over.
      check: takes the host state, before the arrays are compared with ``target``; it may raise.

    Returns:
      The pytree of numpy arrays, and the host state.

    Raises:
      FileNotFoundError: there is no such checkpoint.
      Damaged: it is damaged, or all are. Nothing was changed.
      ValueError: it does not hold the arrays of ``target``.
    """
    directory = pathlib.Path(directory).absolute()
    existing = steps(directory)
    if step == 'best' and (step := best_step(directory)) is None:
        raise FileNotFoundError(f'no evaluated checkpoint in {str(directory)!r}')
    step = None if step in (None, 'latest') else operator.index(step)
    if not existing or (step is not None and step not in existing):
        what = 'no checkpoint' if step is None else f'no checkpoint of step {step}'
        have = f'; it has those of steps {", ".join(map(str, existing))}' if existing else ''
        raise FileNotFoundError(f'{what} in {str(directory)!r}{have}')
    damages = []
    for candidate in reversed(existing) if step is None else [step]:
        try:
            _verify(directory / str(candidate))
        except Damaged as damage:
            damages.append(f'the checkpoint of update {candidate} is damaged: {damage}')
            continue
        for line in damages:
            report(f'warning: {line}; going on from that of update {candidate}')
        state, host = _read(directory / str(candidate))
        check(host)
        return (state if target is None else _like(target, state)), host
    if step is None:
        damages.append(f'no other is left in {str(directory)!r}, and nothing was changed')
    raise Damaged('; '.join(damages))


def set_aside_after(directory: str | os.PathLike, step: int) -> None:
    """Moves checkpoints newer than ``step`` out of the way of a run that goes on from it."""
    directory = pathlib.Path(directory)
    for newer in (s for s in steps(directory) if s > step):
        aside = directory / DAMAGED / str(newer)
        aside.parent.mkdir(exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        (directory / str(newer)).rename(aside)


def tree_digest(tree: Any) -> str:
    """SHA-256 of the arrays of a pytree, by their paths.

    Hashes, for every array in the order of its path, the path, the dtype, the shape and the bytes
    (little-endian, row-major). Dictionaries, dataclasses and tuples of the same names are the same.
    """
    digest = hashlib.sha256()
    for path, leaf in sorted(_named(tree).items()):
        array = np.asarray(leaf)
        array = np.ascontiguousarray(array, array.dtype.newbyteorder('<'))
        digest.update(f'{path} {array.dtype.name} {array.shape}\n'.encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _named(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in leaves}


def _like(target: Any, tree: Any) -> Any:
    """The arrays of ``tree`` in the structure of ``target``."""
    have, wanted = _named(tree), _named(target)
    for path in sorted(have.keys() | wanted.keys()):
        a, b = have.get(path), wanted.get(path)
        if a is None or b is None or (a.shape, a.dtype) != (b.shape, b.dtype):
            held, needed = ('nothing' if x is None else f'{x.dtype} {x.shape}' for x in (a, b))
            raise ValueError(f'the checkpoint holds {held} as {path}, and the run needs {needed}')
    return jax.tree.unflatten(jax.tree.structure(target), [have[path] for path in _named(target)])


def _checkpointer() -> ocp.Checkpointer:
    handler = ocp.CompositeCheckpointHandler(
        state=ocp.PyTreeCheckpointHandler(multiprocessing_options=_ALONE),
        host=ocp.JsonCheckpointHandler(multiprocessing_options=_ALONE),
        composite_options=ocp.CompositeOptions(multiprocessing_options=_ALONE),
    )
    return ocp.Checkpointer(handler, multiprocessing_options=_ALONE)


def _read(path: pathlib.Path) -> tuple[Any, dict[str, Any]]:
    with _checkpointer() as reader:
        saved = reader.metadata(path).item_metadata['state'].tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
        state = ocp.args.PyTreeRestore(restore_args=as_numpy)
        read = reader.restore(path, args=ocp.args.Composite(state=state, host=ocp.args.JsonRestore()))
    return read['state'], read['host']


def _write_manifest(path: pathlib.Path) -> None:
    """Writes the digest of every file of a checkpoint, all of them safe on the disk."""
    files = sorted(file for file in path.rglob('*') if file.is_file())
    digests = {file.relative_to(path).as_posix(): _file_digest(file, sync=True) for file in files}
    (path / MANIFEST).write_text(json.dumps(digests, indent=1))
    _file_digest(path / MANIFEST, sync=True)
    for folder in (*(p for p in path.rglob('*') if p.is_dir()), path):
        _sync(folder)


def _verify(path: pathlib.Path) -> None:
    """Raises ``Damaged`` unless every file of a checkpoint is as it was written."""
    try:
        digests = json.loads((path / MANIFEST).read_text(encoding='utf-8'))
        digests = dict(digests.items())
    except (OSError, ValueError, AttributeError):
        raise Damaged(f'{MANIFEST} is missing or cannot be read') from None
    for name, digest in digests.items():
        try:
            if _file_digest(path / name) != digest:
                raise Damaged(f'{name} is not what was written')
        except OSError as error:
            raise Damaged(f'{name}: {error.strerror}') from None


def _file_digest(path: pathlib.Path, sync: bool = False) -> str:
    with open(path, 'rb') as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, 'sha256').hexdigest()


def _sync(folder: pathlib.Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
