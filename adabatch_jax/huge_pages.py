"""Huge pages for the buffers of CPU steps, which the C library has to be asked for as a process starts.

The memory of a step's intermediate results goes back to the system after the step, and the next one gets
it page by page, each cleared first: with pages of 4 KiB that is a sixth of a ResNet-20 step.
"""

import os
import pathlib
import sys

_SWITCH = 'glibc.malloc.hugetlb'
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
    return ':'.join(filter(None, [current, f'{_SWITCH}=1']))


def restart() -> None:
    """Starts this process anew with huge pages, if it was started without; else returns.

    For the start of a command, before imports that take time.
    """
    pages = _PAGES.read_text() if _PAGES.exists() else ''
    wanted = tunables(os.environ.get('GLIBC_TUNABLES', ''), pages)
    if wanted is not None:
        os.environ['GLIBC_TUNABLES'] = wanted
        os.execv(sys.executable, sys.orig_argv)
