"""Huge pages are asked for once, and only where asking makes a difference."""

import os
import subprocess
import sys

import pytest

from adabatch_jax import huge_pages

ASKED_FOR = 'always [madvise] never\n'
BOTH = 'glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1'


@pytest.mark.parametrize(
    'current, pages, expected',
    [
        ('', ASKED_FOR, BOTH),
        ('glibc.malloc.check=1', ASKED_FOR, f'glibc.malloc.check=1:{BOTH}'),
        ('glibc.malloc.hugetlb=0', ASKED_FOR, None),
        ('', '[always] madvise never\n', None),
        ('', 'always madvise [never]\n', None),
        ('', '', None),
    ],
)
def test_what_is_already_said_stands_and_nothing_is_asked_for_in_vain(current, pages, expected):
    assert huge_pages.tunables(current, pages) == expected


def test_a_process_starts_anew_once_with_the_same_command_line_and_not_beside_an_accelerator(tmp_path):
    (tmp_path / 'enabled').write_text(ASKED_FOR)
    program = (
        'import os, pathlib, sys; from adabatch_jax import huge_pages as h; '
        'h._PAGES, h._ACCELERATORS = pathlib.Path(sys.argv[1]), [sys.argv[2]]; '
        'print("start", flush=True); h.restart(); '
        'asked = os.environ.get("GLIBC_TUNABLES"); print(*([asked, sys.argv[3:]] if asked else ["no"]))'
    )
    environment = {k: v for k, v in os.environ.items() if k != 'GLIBC_TUNABLES'}
    for devices, expected in (
        ('no-such-device', ['start', 'start', f"{BOTH} ['a b', '--c=d']"]),
        ('null', ['start', 'no']),
    ):
        command = [sys.executable, '-c', program, str(tmp_path / 'enabled'), devices, 'a b', '--c=d']
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines() == expected
