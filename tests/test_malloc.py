"""The C library is told how to keep memory once, and what a user told it stands."""

import os
import subprocess
import sys

import pytest

from adabatch_jax import malloc


@pytest.mark.parametrize(
    'current, expected',
    [
        ('', malloc.TUNABLES),
        ('glibc.malloc.check=1', f'glibc.malloc.check=1:{malloc.TUNABLES}'),
        ('glibc.malloc.hugetlb=0', None),
        (malloc.TUNABLES, None),
    ],
)
def test_what_is_already_said_stands(current, expected):
    assert malloc.tunables(current) == expected


def test_a_process_starts_anew_once_with_the_same_command_line_and_not_beside_an_accelerator():
    program = (
        'import os, sys; from adabatch_jax import malloc; malloc._ACCELERATORS = [sys.argv[1]]; '
        'print("start", flush=True); malloc.restart(); '
        'asked = os.environ.get("GLIBC_TUNABLES"); print(*([asked, sys.argv[2:]] if asked else ["no"]))'
    )
    environment = {k: v for k, v in os.environ.items() if k != 'GLIBC_TUNABLES'}
    for devices, expected in (
        ('no-such-device', ['start', 'start', f"{malloc.TUNABLES} ['a b', '--c=d']"]),
        ('null', ['start', 'no']),
    ):
        command = [sys.executable, '-c', program, devices, 'a b', '--c=d']
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines() == expected


@pytest.mark.skipif(sys.platform != 'linux', reason='of glibc')
def test_freed_memory_is_kept():
    """A process that has given back a buffer touches no new page for the next one of its size."""
    program = (
        'import resource, numpy as np; f = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n'
        'np.ones(2**25); before = f(); np.ones(2**25); print(f() - before)'
    )
    faults = {
        tunables: int(
            subprocess.run(
                [sys.executable, '-c', program],
                env=os.environ | {'GLIBC_TUNABLES': tunables},
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for tunables in ('glibc.malloc.hugetlb=0', malloc.TUNABLES)
    }
    assert faults[malloc.TUNABLES] < 10 < faults['glibc.malloc.hugetlb=0']
