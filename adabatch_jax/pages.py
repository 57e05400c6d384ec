"""How a report looks: one HTML page, Markdown, or pictures."""

import dataclasses
import html
import pathlib
import urllib.parse
from collections.abc import Sequence
from typing import Any

from adabatch_jax import figures
from adabatch_jax.files import replacing, write_whole


@dataclasses.dataclass(frozen=True)
class Table:
    """A table with a title, and a sentence below it."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ''


@dataclasses.dataclass(frozen=True)
class Page:
    """What a report says.

    Attributes:
      tables: in order; figures come after the first.
      drawn: figures by the names of their files.
      notes: what could not be read, which runs are not finished, what happened to the others, and on
        which unlike machines.
      num_runs: how many it is of.
    """

    tables: list[Table]
    drawn: dict[str, Any]
    notes: list[str]
    num_runs: int = 0


_CSS = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 0 auto;
  max-width: 1280px; padding: 1rem; }
h1 { font-size: 1.6rem; margin: .5rem 0; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
.figures { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 380px), 1fr)); }
figure { margin: 0; } figure svg { width: 100%; height: auto; display: block; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .5rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th { vertical-align: bottom; white-space: normal; min-width: 4rem; }
th:first-child, td:first-child { text-align: left; }
th.text, td.text { text-align: left; white-space: normal; min-width: 18rem; }
p.note, ul.notes { color: #555; font-size: .9rem; max-width: 60rem; }
"""


def as_html(page: Page) -> str:
    """One page that needs nothing else."""
    parts = []
    for number, table in enumerate(page.tables):
        parts.append(html_table(table))
        if number == 0:
            drawn = (
                f'<figure role="img" aria-label="{html.escape(name.replace("_", " "))}">'
                f'{figures.svg(figure)}</figure>'
                for name, figure in page.drawn.items()
            )
            parts.append(f'<div class="figures">{"".join(drawn)}</div>')
    if page.notes:
        items = ''.join(f'<li>{html.escape(line)}</li>' for line in page.notes)
        parts.append(f'<h2>Notes</h2><ul class="notes">{items}</ul>')
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>Runs compared</title><style>{_CSS}</style></head><body><h1>Runs compared</h1>'
        f'{"".join(parts)}</body></html>\n'
    )


def html_table(table: Table) -> str:
    """A table as an element of a page."""
    look = [' class=text' if column == 'reason' else '' for column in table.columns]

    def cells(begin: str, end: str, texts: Sequence[str]) -> str:
        pairs = zip(look, texts, strict=True)
        return ''.join(f'{begin}{kind}>{html.escape(text)}{end}' for kind, text in pairs)

    head = cells('<th scope="col"', '</th>', table.columns)
    body = ''.join(f'<tr>{cells("<td", "</td>", row)}</tr>' for row in table.rows)
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ''
    return (
        f'<h2>{html.escape(table.title)}</h2><div class="wide"><table><thead><tr>{head}</tr></thead>'
        f'<tbody>{body}</tbody></table></div>{note}'
    )


def as_markdown(page: Page, folder: str) -> str:
    """The same in Markdown, with figures from a folder beside the file."""

    def cell(text: str) -> str:
        return text.replace('|', '\\|')

    parts = ['# Runs compared']
    for number, table in enumerate(page.tables):
        rows = [table.columns, ['---'] * len(table.columns), *table.rows]
        lines = ('| ' + ' | '.join(map(cell, row)) + ' |' for row in rows)
        parts += [f'## {table.title}', '\n'.join(lines), table.note]
        if number == 0:
            address = urllib.parse.quote(folder)
            parts += [f'![{name.replace("_", " ")}]({address}/{name}.png)' for name in page.drawn]
    if page.notes:
        parts += ['## Notes', '\n'.join(f'- {line}' for line in page.notes)]
    return '\n\n'.join(part for part in parts if part) + '\n'


def write(page: Page, form: str, out: pathlib.Path) -> None:
    """Writes a report, each of its files whole or not at all.

    Args:
      page: what it says.
      form: ``html``, ``md`` or ``png``.
      out: a file, or for ``png`` a folder.

    Raises:
      OSError: it cannot be written.
    """
    folder = out if form == 'png' else out.with_name(f'{out.stem}_figures')
    if form != 'png':
        text = as_html(page) if form == 'html' else as_markdown(page, folder.name)
        write_whole(out, text)
    if form == 'html':
        return
    folder.mkdir(exist_ok=True)
    for name, figure in page.drawn.items():
        with replacing(folder / f'{name}.png') as file:
            figures.save(figure, file)
