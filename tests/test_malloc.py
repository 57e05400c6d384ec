"""The C library is told how to keep memory once, and what a user told it stands."""

import os
import platform
import signal
import subprocess
import sys

import pytest
from absl import flags

from adabatch_jax import command_line, malloc


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


def run_with(tunables, program):
    return subprocess.run(
        [sys.executable, '-c', program],
        env=os.environ | {'GLIBC_TUNABLES': tunables},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='of glibc')
def test_freed_memory_is_kept():
    """A process that has freed a buffer touches no new page for the next one of its size."""
    program = (
        'import resource, numpy as np; f = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n'
        'np.ones(2**25); before = f(); np.ones(2**25); print(f() - before)'
    )
    kept, as_usual = (int(run_with(t, program)) for t in (malloc.TUNABLES, 'glibc.malloc.hugetlb=0'))
    assert kept < 10 < as_usual


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='of glibc')
def test_freed_memory_is_given_back_between_stages():
    """Also where a buffer that is still in use lies above it."""
    program = (
        'import pathlib, numpy as np; from adabatch_jax import malloc\n'
        'f = lambda: int(pathlib.Path("/proc/self/statm").read_text().split()[1])\n'
        'before, a, b = f(), np.ones(2**25), np.ones(2**20); del a; kept = f(); malloc.give_back()\n'
        'print(kept - before, f() - before)'
    )
    kept, left = (
        int(pages) * os.sysconf('SC_PAGE_SIZE') for pages in run_with(malloc.TUNABLES, program).split()
    )
    assert kept > 2**28 > 2**25 > left


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='of glibc')
def test_holes_that_a_compilation_leaves_are_taken_until_the_next_one_begins():
    program = (
        'from adabatch_jax import malloc; get, free = malloc._library().malloc, malloc._library().free\n'
        'def is_in_a_hole(): free(piece := get(5000)); return piece in holes\n'
        'with malloc.compiling():\n'
        '    holes, large, _ = [get(6000) for _ in range(2000)][::2], get(2**24), get(2**24)\n'
        '    for piece in (*holes, large): free(piece)\n'
        '    before = is_in_a_hole()\n'
        'after, free_for_steps = is_in_a_hole(), get(2**24) == large\n'
        'with malloc.compiling(): print(before, after, free_for_steps, is_in_a_hole())'
    )
    assert run_with(malloc.TUNABLES, program).split() == ['True', 'False', 'True', 'True']


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='of glibc')
def test_settings_that_came_too_late_to_hold_do_no_harm():
    program = (
        'import os; from adabatch_jax import malloc; os.environ["GLIBC_TUNABLES"] = malloc.TUNABLES\n'
        'with malloc.compiling(): pass\n'
        'print(len(malloc._holes))'
    )
    assert run_with('', program).split() == ['0']


def test_an_interrupt_before_a_command_has_begun_ends_the_process_at_once(monkeypatch):
    """Raised in the middle of an import it may get lost."""
    monkeypatch.setattr(malloc, 'tunables', lambda given: None)
    before = signal.getsignal(signal.SIGINT)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        malloc.restart()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
        command_line.run(['command', '--help'], '', lambda argv: flags.FlagValues(), lambda values: 0)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
