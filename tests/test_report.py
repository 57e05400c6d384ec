"""Reports: what is written, in which form, and mistakes."""

import errno
import html.parser
import os
import re
import resource
import subprocess
import sys
import urllib.parse

import pytest
from made_up_runs import control_and_adaptive, write_run

from adabatch_jax import report


@pytest.fixture
def runs(tmp_path):
    return control_and_adaptive(tmp_path)


class Parser(html.parser.HTMLParser):
    """Whether every element that is opened is closed, and what the page refers to."""

    void = {'meta', 'link', 'br', 'img', 'path', 'use', 'rect', 'stop'}

    def __init__(self):
        super().__init__()
        self.open, self.links, self.tags = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ('src', 'href')]
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.void:
            assert self.open.pop() == tag


def test_a_page_is_whole_and_needs_nothing_else(runs, tmp_path):
    out = tmp_path / 'page.html'
    assert report.main(['report', *map(str, runs), f'--out={out}']) == 0
    parser = Parser()
    parser.feed(out.read_text())
    assert not parser.open and not parser.links
    assert parser.tags.count('svg') == 12 and parser.tags.count('table') == 3
    text = re.sub(r'<svg.*?</svg>', '', out.read_text(), flags=re.DOTALL)
    assert '91.00 (90.00 to 92.00)' in text and '1.67' in text and '+0.00' in text


def test_markdown_and_pictures(runs, tmp_path):
    assert report.main(['report', *map(str, runs), '--format=md', f'--out={tmp_path / "r.md"}']) == 0
    text = (tmp_path / 'r.md').read_text()
    pictures = re.findall(r'!\[.*?\]\((.*?)\)', text)
    assert len(pictures) == 12
    assert all((tmp_path / name).read_bytes().startswith(b'\x89PNG') for name in pictures)
    assert '| adabatch | 3 of 3 | 10 to 50 |' in text
    assert pictures[0].startswith('r_figures/')
    assert report.main(['report', str(runs[0]), '--format=png', f'--out={tmp_path / "png"}']) == 0
    assert len(list((tmp_path / 'png').glob('*.png'))) == 12


def test_the_end_of_its_name_says_what_a_file_is(runs, tmp_path, capsys):
    assert report.main(['report', str(runs[0]), f'--out={tmp_path / "r.md"}']) == 0
    assert (tmp_path / 'r.md').read_text().startswith('# Runs compared')
    assert report.main(['report', str(runs[0]), f'--out={tmp_path / "r.pdf"}']) == 2
    assert '--out: got ' in capsys.readouterr().err and not (tmp_path / 'r.pdf').exists()


def test_markdown_finds_its_pictures_beside_a_name_with_spaces(runs, tmp_path):
    out = tmp_path / 'two runs (a).md'
    assert report.main(['report', str(runs[0]), '--format=md', f'--out={out}']) == 0
    pictures = re.findall(r'!\[.*?\]\((\S*?)\)', out.read_text())
    assert len(pictures) == 12
    assert all((tmp_path / urllib.parse.unquote(name)).exists() for name in pictures)


def test_a_run_that_has_just_begun_has_a_report(tmp_path):
    folder = write_run(tmp_path / 'new')
    (folder / 'metrics.jsonl').write_text('')
    assert report.main(['report', str(folder), f'--out={tmp_path / "page.html"}']) == 0


@pytest.mark.parametrize(
    'arguments, message',
    [
        ([], 'error: report: no run given'),
        (
            ['nowhere', 'nor here'],
            "error: report: no run in 'nowhere': neither metrics.jsonl nor config.json",
        ),
        (['RUN', '--out=nowhere/page.html'], 'error: --out: '),
        (['RUN', '--format=pdf'], '--format'),
        (['RUN', '--benchmark=nowhere.json'], 'error: --benchmark: '),
    ],
)
def test_mistakes_are_told_in_a_line(runs, arguments, message, capsys):
    arguments = [argument.replace('RUN', str(runs[0])) for argument in arguments]
    assert report.main(['report', *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count('\n') == 1


def test_reports_need_neither_a_display_nor_tensorflow_nor_a_device(runs, tmp_path):
    code = (
        'import sys; sys.modules["tensorflow"] = None; from adabatch_jax import report\n'
        f'status = report.main(["report", {str(runs[0])!r}, "--out={tmp_path / "page.html"}"])\n'
        'from jax._src import xla_bridge; sys.exit(status or xla_bridge.backends_are_initialized())'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('form, broken', [('html', 'r'), ('md', 'r'), ('png', 'r/error_by_epoch.png')])
def test_a_report_that_cannot_be_written_leaves_the_one_before(runs, tmp_path, capsys, form, broken):
    out = tmp_path / 'reports' / 'r'
    out.parent.mkdir()
    arguments = ['report', str(runs[0]), f'--format={form}', f'--out={out}']
    assert report.main(arguments) == 0
    before = {path: path.read_bytes() for path in out.parent.rglob('*') if path.is_file()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # as on a disk with room for so much
    try:
        assert report.main(arguments) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path: path.read_bytes() for path in out.parent.rglob('*') if path.is_file()} == before
    error = capsys.readouterr().err
    assert error == f'error: --out: [Errno 27] File too large: {str(out.parent / broken)!r}\n'


def test_a_report_goes_where_a_link_or_a_device_leads(runs, tmp_path):
    (tmp_path / 'link').symlink_to(tmp_path / 'page.html')
    for out in (tmp_path / 'link', os.devnull):
        assert report.main(['report', str(runs[0]), f'--out={out}']) == 0
    assert (tmp_path / 'link').is_symlink() and (tmp_path / 'page.html').stat().st_size
    assert not os.path.isfile(os.devnull)


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no /dev/full')
def test_a_report_is_written_where_nothing_can_be_printed(runs, tmp_path, monkeypatch, capsys):
    with open('/dev/full', 'w') as full, monkeypatch.context() as patch:
        patch.setattr(sys, 'stdout', full)
        assert report.main(['report', str(runs[0]), f'--out={tmp_path / "page.html"}']) == 0
    assert (tmp_path / 'page.html').exists()
    assert capsys.readouterr().err == f'warning: standard output: {os.strerror(errno.ENOSPC)}\n'
