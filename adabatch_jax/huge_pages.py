"""Huge pages for the buffers of CPU steps, which the C library has to be asked for as a process starts.

The memory of a step's intermediate results goes back to the system after the step, and the next one gets
it page by page, each cleared first. With pages of 4 KiB that is a sixth of a ResNet-20 step; and half of
it where the buffers come from an arena of the thread that computes, to which glibc gives small pages
alone. Which one computes was a matter of luck once TensorFlow had started threads: with one arena for
all, training on CIFAR-10 went from between 400 and 760 images/s, other ones each time, to 780.
"""

import os
import pathlib
import sys

_SWITCH = 'glibc.malloc.hugetlb'
_TUNABLES = (f'{_SWITCH}=1', 'glibc.malloc.arena_max=1')
_ACCELERATORS = ('nvidia0', 'kfd', 'accel0', 'vfio/0')  # in /dev: steps do not run on the CPU
_PAGES = pathlib.Path('/sys/kernel/mm/transparent_hugepage/enabled')


def tunables(current: str, pages: str) -> str | None:
    """The ``GLIBC_TUNABLES`` that ask for huge pages; None where there is nothing to ask for.

    Args:
      current: ``GLIBC_TUNABLES`` now; what it says of huge pages stands.
      pages: how Linux hands them out, such as ``always [madvise] never``; only those that are asked
        for, as in the example, make a difference.
    """
    if '[madvise]' not in pages or _SWITCH in current:
        return None
    return ':'.join(filter(None, [current, *_TUNABLES]))


def restart() -> None:
    """Starts this process anew with huge pages, if it was started without; else returns.

    For the start of a command, before imports that take time. Beside an accelerator nothing is asked
    for: there threads that read images are better off with arenas of their own.
    """
    if any(pathlib.Path('/dev', name).exists() for name in _ACCELERATORS):
        return
    pages = _PAGES.read_text() if _PAGES.exists() else ''
    wanted = tunables(os.environ.get('GLIBC_TUNABLES', ''), pages)
    if wanted is not None:
        os.environ['GLIBC_TUNABLES'] = wanted
        os.execv(sys.executable, sys.orig_argv)
