"""Figures; matplotlib is imported here only, and when it is used."""

import os
from typing import Any

# Of Okabe and Ito, told apart by colour-blind readers too; each line also has a mark of its own.
STYLES = {
    'fixed': {'color': '#0072B2', 'marker': 'o'},
    'adaptive': {'color': '#D55E00', 'marker': 's'},
    'worthwhile': {'color': '#009E73', 'marker': '^', 'linestyle': '--'},
}


def scaling(rows: list[dict[str, float]]) -> Any:
    """How many times as fast runs are on some numbers of devices; see ``scaling.predictions``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout='constrained')
    axes = figure.subplots()
    devices, first = [row['devices'] for row in rows], rows[0]['fixed']
    labels = {
        'fixed': 'fixed batch',
        'adaptive': 'adaptive batch',
        'worthwhile': 'adaptive, devices that pay off',
    }
    for name, label in labels.items():
        axes.plot(devices, [first / row[name] for row in rows], label=label, **STYLES[name])
    axes.plot(devices, devices, color='0.6', linestyle=':', label='as many times as devices')
    axes.set(
        xlabel='devices',
        ylabel='speed-up over the fixed batch on one device',
        ylim=(0.5, 2 * max(first / row[name] for row in rows for name in labels)),
    )
    axes.set_xscale('log', base=2)
    axes.set_yscale('log', base=2)
    axes.xaxis.set_major_formatter('{x:,g}')
    axes.yaxis.set_major_formatter('{x:g}')
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def save(figure: Any, path: str | os.PathLike) -> None:
    """Writes a figure; the ending of the name says in which format.

    Raises:
      ValueError: an ending that is no format.
      OSError: the file cannot be written.
    """
    figure.savefig(path, dpi=150)
