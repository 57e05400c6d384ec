"""Figures; matplotlib is imported here only, and when it is used.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart; each line also has a mark
of its own. Nothing here needs a display.
"""

import dataclasses
import io
import math
import os
import textwrap
from collections.abc import Sequence
from typing import Any

SUFFIXES = ('.png', '.svg', '.pdf')
# For any number of groups, in their order.
_COLORS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')
_MARKERS, _LINES = 'os^Dv<>', ('-', '--', ':')
_WIDTH, _HEIGHT = 5.2, 3.9  # inches
_LEGEND_LINE, _LEGEND_LINES = 0.17, 4  # inches of each, and how many there is room for


def style(number: int) -> dict[str, str]:
    """Colour, mark and line of a group."""
    return {
        'color': _COLORS[number % len(_COLORS)],
        'marker': _MARKERS[number % len(_MARKERS)],
        'linestyle': _LINES[number // len(_COLORS) % len(_LINES)],
    }


@dataclasses.dataclass(frozen=True)
class Line:
    """What is drawn of a group.

    Attributes:
      label: of the group.
      x, y: points.
      low, high: of a band around them; None for none.
      marked: positions on the x axis to mark, such as transitions.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    marked: Sequence[float] = ()


def lines(
    drawn: Sequence[Line | None], xlabel: str, ylabel: str, log_y: bool = False, steps=False
) -> Any:
    """Lines of groups over one axis.

    Args:
      drawn: one for each group, None for a group that has none; the place gives the style.
      xlabel: with its unit.
      ylabel: the same.
      log_y: whether the y axis is logarithmic.
      steps: whether a value holds until the next.
    """
    figure, axes = _axes()
    for number, line in enumerate(drawn):
        if line is None or not len(line.x):
            continue
        look = style(number)
        many = {'markevery': max(1, len(line.x) // 12), 'markersize': 4, 'linewidth': 1.5}
        axes.plot(
            line.x,
            line.y,
            label=_printed(line.label),
            drawstyle='steps-post' if steps else 'default',
            **look | many,
        )
        if line.low is not None:
            axes.fill_between(line.x, line.low, line.high, color=look['color'], alpha=0.15, linewidth=0)
        for position in line.marked:
            axes.axvline(position, color=look['color'], linestyle=':', linewidth=0.8, alpha=0.6)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    if axes.get_xlim()[1] >= 1e4:
        from matplotlib.ticker import EngFormatter

        axes.xaxis.set_major_formatter(EngFormatter(sep=''))
    if log_y:
        axes.set_yscale('log', base=2 if steps else 10)
        axes.yaxis.set_major_formatter('{x:,g}')
        axes.yaxis.set_minor_formatter('' if steps else _minor(*axes.get_ylim()))
    _legend(figure, axes)
    return figure


def _minor(low: float, high: float) -> Any:
    """Labels between the powers of ten of a logarithmic axis, so that it has two at least."""
    powers = math.floor(math.log10(high)) - math.ceil(math.log10(low)) + 1
    if powers >= 2:
        return ''
    few = powers == 1 and high > 4 * low  # a 2 or a 5 is among them
    return lambda y, _: f'{y:,g}' if not few or f'{y:e}'[0] in '25' else ''


def dots(groups: dict[str, Sequence[float]], ylabel: str, log_y: bool = False) -> Any:
    """A dot for each value of a group, and a bar at their mean.

    Args:
      groups: values by the label of their group, those that are finite are drawn; none of a group that
        has none. Its place gives the style.
      ylabel: with its unit.
      log_y: whether the y axis is logarithmic.
    """
    figure, axes = _axes()
    groups = {label: [v for v in values if math.isfinite(v)] for label, values in groups.items()}
    highest = max((v for values in groups.values() for v in values), default=0)
    for number, (label, values) in enumerate(groups.items()):
        if not values:
            continue
        look = {key: value for key, value in style(number).items() if key != 'linestyle'}
        spread = [number + 0.06 * (k - (len(values) - 1) / 2) for k in range(len(values))]
        hollow = {'markerfacecolor': 'none'} if number >= len(_COLORS) else {}
        axes.plot(spread, values, label=_printed(label), linestyle='', markersize=6, **look, **hollow)
        mean = sum(values) / len(values)
        axes.hlines(mean, number - 0.3, number + 0.3, color=look['color'], linewidth=1.5)
    axes.set(xlim=(-0.6, len(groups) - 0.4), xticks=[], ylabel=textwrap.fill(ylabel, 36))
    if log_y:
        axes.set_yscale('log')
    elif highest > 0:
        axes.set_ylim(0, 1.1 * highest)
    _legend(figure, axes)
    return figure


def _axes() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, _HEIGHT), layout='constrained')
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    axes.spines[['top', 'right']].set_visible(False)
    return figure, axes


def _legend(figure: Any, axes: Any) -> None:
    """Below the axes, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        columns = 2 if max(map(len, labels)) < 32 else 1
        figure.legend(handles, labels, loc='outside lower center', ncols=columns, frameon=False)
        count = sum(label.count('\n') + 1 for label in labels) / columns
        figure.set_figheight(_HEIGHT + _LEGEND_LINE * max(0, count - _LEGEND_LINES))


def _printed(label: str) -> str:
    """A label as matplotlib prints it: no formula, and not left out for an underscore before it."""
    label = textwrap.fill(label, 60).replace('$', r'\$')
    return f' {label}' if label.startswith('_') else label


def scaling(rows: list[dict[str, float]]) -> Any:
    """How many times as fast runs are on some numbers of devices; see ``scaling.predictions``."""
    figure, axes = _axes()
    devices, first = [row['devices'] for row in rows], rows[0]['fixed']
    labels = {
        'fixed': 'fixed batch',
        'adaptive': 'adaptive batch',
        'worthwhile': 'adaptive, devices that pay off',
    }
    for number, (name, label) in enumerate(labels.items()):
        look = style(number) | ({'linestyle': '--'} if name == 'worthwhile' else {})
        axes.plot(devices, [first / row[name] for row in rows], label=label, **look)
    axes.plot(devices, devices, color='0.6', linestyle=':', label='as many times as devices')
    axes.set(
        xlabel='devices',
        ylabel='speed-up over fixed, one device',
        ylim=(0.5, 2 * max(first / row[name] for row in rows for name in labels)),
    )
    axes.set_xscale('log', base=2)
    axes.set_yscale('log', base=2)
    axes.xaxis.set_major_formatter('{x:,g}')
    axes.yaxis.set_major_formatter('{x:g}')
    _legend(figure, axes)
    return figure


def svg(figure: Any) -> str:
    """A figure as an ``svg`` element, its letters as outlines, as wide as there is room."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({'svg.hashsalt': 'adabatch_jax'}):  # the same figure is the same text
        figure.savefig(buffer, format='svg', metadata={'Date': None, 'Creator': None})
    text = buffer.getvalue()
    return text[text.index('<svg') :]


def save(figure: Any, path: str | os.PathLike) -> None:
    """Writes a figure; the ending of the name says in which format.

    Raises:
      ValueError: an ending that is no format.
      OSError: the file cannot be written.
    """
    figure.savefig(path, dpi=150)
