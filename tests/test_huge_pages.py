"""Huge pages are asked for once, and only where asking makes a difference."""

import os
import subprocess
import sys

import pytest

from adabatch_jax import huge_pages

ASKED_FOR = 'always [madvise] never\n'


@pytest.mark.parametrize(
    'current, pages, expected',
    [
        ('', ASKED_FOR, 'glibc.malloc.hugetlb=1'),
        ('glibc.malloc.check=1', ASKED_FOR, 'glibc.malloc.check=1:glibc.malloc.hugetlb=1'),
        ('glibc.malloc.hugetlb=0', ASKED_FOR, None),
        ('', '[always] madvise never\n', None),
        ('', 'always madvise [never]\n', None),
        ('', '', None),
    ],
)
def test_what_is_already_said_stands_and_nothing_is_asked_for_in_vain(current, pages, expected):
    assert huge_pages.tunables(current, pages) == expected


def test_a_process_starts_anew_once_with_the_same_command_line(tmp_path):
    (tmp_path / 'enabled').write_text(ASKED_FOR)
    program = (
        'import os, pathlib, sys; from adabatch_jax import huge_pages as h; '
        'print("start", flush=True); h._PAGES = pathlib.Path(sys.argv[1]); h.restart(); '
        'print(os.environ["GLIBC_TUNABLES"], sys.argv[2:])'
    )
    environment = {k: v for k, v in os.environ.items() if k != 'GLIBC_TUNABLES'}
    command = [sys.executable, '-c', program, str(tmp_path / 'enabled'), 'a b', '--c=d']
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ['start', 'start', "glibc.malloc.hugetlb=1 ['a b', '--c=d']"]
