"""The processes of a run: how they begin, agree and end together.

JAX's own runtime connects them (``jax.distributed``): train steps run over the devices of all, and the
first process serves the others with a store of keys and values, with heartbeats and with notices of
preemption. Whatever must not differ between processes is made once, by the first, which tells the
others: what the work directory holds, and which batch size comes next. The store is used for that, not
the devices, so that nobody waits for the update in flight.
"""

import atexit
import contextlib
import itertools
import json
import os
import pickle
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax._src import distributed  # the store has no public name
from jax.experimental import multihost_utils

from adabatch_jax.distributed import cluster

T = TypeVar('T')

HEARTBEAT_SECONDS = 60  # without a sign of life from a process all others end
SHUTDOWN_SECONDS = 60  # that the first to end waits for the others
_PATIENCE_SECONDS = 15.0  # with processes that have not begun
_MEETING_SECONDS = 0.02  # between two looks at who is there
_POLL_SECONDS = 1.0  # between two looks at whether another process has failed
_GRACE_SECONDS = 5.0  # for a process that fails by itself, as the others do
_LONG = 7 * 24 * 3600 * 1000  # milliseconds; a process that is gone is noticed by its heartbeat
_FAILED = 'adabatch_jax/failed'
_GONE = re.compile('Gloo|remote process exited|[Cc]onnection (closed|reset) by peer')
_BLOCK = 1000  # messages that are removed from the store together

_messages = itertools.count()
_meetings = itertools.count()
_asked = itertools.count(1)
_joined = threading.Event()
_ending = threading.Event()  # this process: it is done, or it or another has failed
_in_use = threading.Lock()  # the store, by who waits in ``meet``


def join(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Makes this process one of those of a run; to be called before anything else is done with JAX.

    Args:
      coordinator_address: ``HOST:PORT`` of the first process, the same in all.
      num_processes: how many there are; 1: this one alone, whatever it runs on.
      process_id: which of them this is, from 0.

    What is left out is found by JAX under SLURM, Open MPI, Kubernetes or on a TPU pod. Where nothing is
    given or found, this process is alone.

    Raises:
      ValueError: the arguments do not go together, something is missing that cannot be found, or the
        processes have different numbers of devices.
    """
    given = {
        'coordinator_address': coordinator_address,
        'num_processes': num_processes,
        'process_id': process_id,
    }
    cluster.check(**given)
    some = any(value is not None for value in given.values())
    if num_processes == 1 or jax.distributed.is_initialized():
        return
    if not some and cluster.is_in_use():
        return  # a notebook
    waiting = _say_later(coordinator_address)
    try:
        with _interruptible():
            jax.distributed.initialize(
                **given,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                shutdown_timeout_seconds=SHUTDOWN_SECONDS,
            )
        devices = [len(jax.local_devices(process_index=k)) for k in range(jax.process_count())]
    except (ValueError, RuntimeError) as error:
        if not some and isinstance(error, ValueError):
            return  # nothing was found
        missing = [key for key, value in given.items() if value is None]
        advice = f'; give {" and ".join(missing)}, or num_processes=1 to go on alone' if missing else ''
        raise ValueError(
            f'num_processes: got {num_processes}, and the processes cannot be brought together: '
            f'{" ".join(str(error).split())}{advice}'
        ) from error
    finally:
        waiting.cancel()
    if len(set(devices)) > 1:
        raise ValueError(
            f'num_processes: got processes with {devices} devices; accepted: as many in each process'
        )
    if jax.process_count() > 1:
        _joined.set()
        watch = threading.Thread(target=_watch, name='watch', daemon=True)
        watch.start()
        atexit.register(_end, watch)


def _say_later(coordinator_address: str | None) -> threading.Timer:
    """Will tell who waits for processes that have not begun."""
    at = f' at {coordinator_address}' if coordinator_address else ''
    line = f'waiting for the other processes{at}; each --process_id from 0 on has to be started once'
    timer = threading.Timer(_PATIENCE_SECONDS, complain, [line])
    timer.daemon = True
    timer.start()
    return timer


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Has an interrupt end this process at once: a handler would not run while JAX waits for others."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def is_joined() -> bool:
    """Whether ``join`` has found other processes; asks no device."""
    return _joined.is_set()


def is_alone() -> bool:
    """Whether there is one process only."""
    return jax.process_count() == 1


def is_first() -> bool:
    """Whether this is the process that writes and speaks for all."""
    return jax.process_index() == 0


# ------------------------------------------------------------------------------------- to agree


def from_first(make: Callable[[], T]) -> T:
    """What ``make`` returns in the first process, in all; or what it raises there.

    Every process calls it in the same order, from one thread. ``make`` is called in the first process
    only, which waits for the others only at every thousandth message. What it returns has to be
    picklable and small.
    """
    if is_alone():
        return make()
    number = next(_messages)
    block = f'adabatch_jax/messages/{number // _BLOCK}'
    if is_first():
        try:
            message = True, make()
        except Exception as error:
            message = False, error
        _store().key_value_set_bytes(f'{block}/{number}', pickle.dumps(message))
    else:
        message = pickle.loads(_store().blocking_key_value_get_bytes(f'{block}/{number}', _LONG))
    if (number + 1) % _BLOCK == 0:  # all have read it
        meet()
        if is_first():
            _store().key_value_delete(f'{block}/')
    succeeded, value = message
    if not succeeded:
        raise value
    return value


def agree(values: Mapping[str, Any], error: type[Exception]) -> None:
    """Has every process end, by raising ``error``, where one was given other values than the first.

    Args:
      values: what they were given, by the name that an error shall have for it; small and picklable.
      error: made with a line that has the name, both values and the process.
    """
    first = from_first(lambda: values)
    for name in {**first, **values}:
        ours, theirs = values.get(name), first.get(name)
        if ours != theirs:
            raise error(
                f'{name}: got {ours!r} in process {jax.process_index()} and {theirs!r} in the first; '
                'accepted: the same in all'
            )
    meet()


def meet() -> None:
    """Waits, however long, until all processes have come here.

    A first collective opens connections between the devices, which gives up after half a minute. This is
    no barrier of the store's, since ``_watch`` may end a process that waits here, and the store with it.
    """
    if is_alone():
        return
    place = f'adabatch_jax/meetings/{next(_meetings)}'
    _store().key_value_set(f'{place}/{jax.process_index()}', 'here')
    present = 0
    while present < jax.process_count():
        with _in_use:
            present = 0 if _ending.is_set() else len(_store().key_value_dir_get(place))
        time.sleep(_MEETING_SECONDS)


def share(tree: Any) -> Any:
    """The arrays of the first process, in all, bit for bit, as numpy arrays.

    Args:
      tree: pytree of arrays; the other processes give the same structure, of arrays or their shapes.
    """
    if is_alone():
        return tree
    leaves, structure = jax.tree.flatten(tree)
    leaves = [np.asarray(x) if is_first() else np.zeros(x.shape, x.dtype) for x in leaves]
    # As bytes: the broadcast is a sum, which would turn -0.0 into 0.0.
    sent = [np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in leaves]
    meet()
    received = multihost_utils.broadcast_one_to_all(sent)
    arrays = [np.array(y).view(x.dtype).reshape(x.shape) for x, y in zip(leaves, received, strict=True)]
    return jax.tree.unflatten(structure, arrays)


def smallest(value: float) -> float:
    """The smallest of the values that the processes give, in single precision."""
    if is_alone():
        return value
    meet()
    return float(multihost_utils.process_allgather(np.float32(value)).min())


def is_shared(folder: str) -> bool:
    """Whether every process finds in a folder what the first one writes there; it is made if need be."""
    if is_alone():
        return bool(folder)

    def mark():
        try:
            os.makedirs(folder, exist_ok=True)
            return tempfile.NamedTemporaryFile(prefix='shared-', dir=folder)  # until all have looked
        except OSError:  # there is none, or nothing can be written there
            return None

    marked = mark() if is_first() else None
    name = from_first(lambda: marked and os.path.basename(marked.name))
    found = bool(name) and os.path.exists(os.path.join(folder, name))
    all_found = bool(smallest(float(found)))
    if marked:
        marked.close()
    return all_found


def largest(value: float) -> float:
    """The largest of the values that the processes give, in single precision."""
    return -smallest(-value)


def asked_to_stop(stop: threading.Event | None) -> bool:
    """Whether to save and end; the same answer in every process after the same dispatch.

    With one process: whether ``stop`` is set. With several, JAX's preemption service watches for SIGTERM
    in each of them, and they agree on a dispatch that none has passed yet; every process has to ask
    after every dispatch.
    """
    if is_alone():
        return stop is not None and stop.is_set()
    return multihost_utils.reached_preemption_sync_point(next(_asked))


def _store():
    return distributed.global_state.client


# --------------------------------------------------------------------------------------- to end


def complain(line: str) -> None:
    """Prints a line on standard error, where that can be; the status to end with is worth more."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def fail(status: int, line: str) -> int:
    """Tells the other processes that this one ends, so that none waits for it; returns ``status``.

    The first process that fails prints its ``line``; one that fails after it, as all do after a mistake
    in the config, has nothing to add. Those that would go on end with the same status.
    """
    if not is_joined():
        complain(line)
    else:
        _tell(status, line, can_meet=True)
    return status


def says_another_is_gone(error: Exception) -> bool:
    """Whether what JAX raised comes from a process that was killed or cannot be reached any more."""
    is_from_jax = is_joined() and isinstance(error, jax.errors.JaxRuntimeError)
    return is_from_jax and bool(_GONE.search(str(error)))


def abandon(error: Exception) -> int:
    """Ends this process, and with it the others, where one of them has gone without a word.

    JAX's own way to leave would wait for the one that is gone, and abort. Returns the status to end with
    where that one did say why.
    """
    line = (
        'error: another process has ended, or cannot be reached; start all of them again, and the run '
        f'goes on from its last checkpoint ({str(error).splitlines()[0]})'
    )
    if not _tell(1, line, can_meet=False) and _told().can_meet:
        return 1
    if is_first():  # with it goes the store, where the others still look
        time.sleep(_POLL_SECONDS + _GRACE_SECONDS)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(1)


class _Told(NamedTuple):
    """What the first process that fails tells the others.

    Attributes:
      who: which process it is.
      status: to end with.
      line: why.
      can_meet: whether all processes are there to leave JAX's runtime together.
    """

    who: int
    status: int
    line: str
    can_meet: bool


def _told() -> _Told:
    return _Told(*json.loads(_store().key_value_try_get(_FAILED)))


def _tell(status: int, line: str, can_meet: bool) -> bool:
    """Prints why this process fails and tells the others, if it is the first that does."""
    if _ending.is_set():  # what failed here is that another process has
        return False
    _ending.set()
    try:
        told = _Told(jax.process_index(), status, line, can_meet)
        _store().key_value_set(_FAILED, json.dumps(told))
    except jax.errors.JaxRuntimeError as error:
        if 'ALREADY_EXISTS' in str(error):  # another was first
            return False
    complain(line if is_first() else f'process {jax.process_index()}: {line}')
    return True


def _end(watch: threading.Thread) -> None:
    """Has ``watch`` leave the store before the interpreter goes, which would abort the process there."""
    _ending.set()
    watch.join()


def _watch() -> None:
    """Ends this process when another has failed, also where it waits for what will never come."""
    while not _ending.wait(_POLL_SECONDS):
        try:
            told = _told()
            break
        except jax.errors.JaxRuntimeError:  # nobody has
            continue
        except AttributeError:  # the runtime has been shut down
            return
    if _ending.wait(_GRACE_SECONDS) or not jax.distributed.is_initialized():
        return  # it ends by itself
    _ending.set()
    if is_first():
        complain(f'process {told.who} failed: {told.line}')
    try:
        if told.can_meet:
            with _in_use:
                jax.distributed.shutdown()
    finally:
        os._exit(told.status)
