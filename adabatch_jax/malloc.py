"""Memory for the buffers of CPU steps, of which the C library has to be told as a process starts.

Left alone, glibc gives a step's intermediate results back to the system after each step, and the next
one gets them page by page, each cleared first. So freed memory is kept, in huge pages: the steps
of ResNet-20 with 128, 512 and 2,048 examples became 8, 21 and 49 % faster by the former alone. There is
one arena for all threads, because the arenas of others than the first get small pages only, and which
thread computes is a matter of luck.
"""

import contextlib
import ctypes
import functools
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Iterator

_SWITCH = 'glibc.malloc.hugetlb'
_KEPT = 2**40  # bytes: more than there are, so that nothing goes back by itself
TUNABLES = ':'.join(
    (
        f'{_SWITCH}=1',
        'glibc.malloc.arena_max=1',
        'glibc.malloc.mmap_max=0',  # not mmap_threshold, which tf.data sets anew
        f'glibc.malloc.trim_threshold={_KEPT}',
    )
)
# Bytes of the holes to take: from where glibc searches lists on, to what steps may have a use for.
_SMALLEST, _LARGEST = 1040, 2**22
_BEYOND = 2**26  # larger than any hole
_ACCELERATORS = ('nvidiactl', 'kfd', 'accel0', 'vfio/0')  # in /dev: steps do not run on the CPU


def tunables(current: str) -> str | None:
    """``GLIBC_TUNABLES`` for a process that trains on the CPU; None where they stand already.

    Args:
      current: ``GLIBC_TUNABLES`` now; if it says something of huge pages, it stands as it is.
    """
    return None if _SWITCH in current else ':'.join(filter(None, [current, TUNABLES]))


def restart() -> None:
    """Starts this process anew with these settings, if it was started without; else returns.

    For the start of a command, before imports that take time. Beside an accelerator nothing is set:
    there threads that read images are better off with arenas of their own.

    An interrupt ends the process at once until ``command_line.run`` takes over: raised in the middle
    of an import it may get lost, or end in a traceback.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.platform != 'linux' or any(pathlib.Path('/dev', name).exists() for name in _ACCELERATORS):
        return
    wanted = tunables(os.environ.get('GLIBC_TUNABLES', ''))
    if wanted is not None:
        os.environ['GLIBC_TUNABLES'] = wanted
        os.execv(sys.executable, sys.orig_argv)


def _is_tuned() -> bool:
    return TUNABLES in os.environ.get('GLIBC_TUNABLES', '')


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(None)
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.restype, library.free.argtypes = None, [ctypes.c_void_p]
    library.sbrk.restype, library.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
    return library


_holes: list[int] = []
_lock = threading.Lock()


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """While something is compiled: what the compiler leaves behind does not slow later steps down.

    It leaves tens of thousands of holes in the one heap. For each buffer of a step glibc would go
    through a list of them, and no other thread could ask for memory meanwhile: a run on the digits with
    16 took 12.7 and 14.9 s, and takes 10.2 and 10.7 s since the holes are taken. The next compilation
    gets them back. Without these settings nothing is done.
    """
    if not _is_tuned():
        yield
        return
    with _lock:
        while _holes:
            _library().free(_holes.pop())
    try:
        yield
    finally:
        with _lock:
            _take_holes()


def _take_holes() -> None:
    library = _library()
    malloc, free = library.malloc, library.free
    free(end := malloc(_BEYOND))  # of what is in use
    if not end or end >= library.sbrk(0):  # no heap of glibc's that grows upwards
        return

    def largest_hole() -> int:
        low, high = _LARGEST, _BEYOND
        while high - low > 16:  # glibc's grain
            size = (low + high) // 2
            free(piece := malloc(size))
            low, high = (size, high) if piece and piece < end else (low, size)
        return low

    whole = []  # large ones stay as they are: a step may need just their size
    while (size := largest_hole()) > _LARGEST:
        whole.append(malloc(size))
    while size >= _SMALLEST:
        while (piece := malloc(size)) and piece < end:
            _holes.append(piece)
        free(piece)
        size = size * 3 // 4
    for piece in whole:
        free(piece)


def give_back() -> None:
    """Gives the freed memory that these settings keep back to the system; nothing without them.

    For the end of a stage: the next one's buffers are larger, and would come on top.
    """
    if _is_tuned():
        with contextlib.suppress(AttributeError):  # another C library, which knows nothing of them
            ctypes.CDLL(None).malloc_trim(0)
