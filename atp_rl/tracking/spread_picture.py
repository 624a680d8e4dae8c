"""The picture of how violations spread from seat to seat: a heat map, drawn as the charts of the report are."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import PercentFormatter
from numpy.typing import ArrayLike

COLORS = colormaps["Oranges"].resampled(20)
"""Light to dark in one hue, so that the order survives every kind of colour vision and a print in grey; a shade per 5 %
(of 50 or more, matplotlib's colour bar would be an image, which the report's content security policy forbids)."""
LONGEST = 24
"""Characters of a seat's name that are shown."""
UNMEASURED, CROSS = "#dfe4ea", {"color": "#6b7785", "marker": "x", "ms": 4, "linestyle": "none"}


def spread_heatmap(
    rates: ArrayLike, steps: Sequence[int], seats: Sequence[str], *, deviants: Collection[str] = ()
) -> Markup:
    """Violation rate by seat (row) and checkpoint (column) as inline SVG, as wide as the page: for `figure.wide`.

    Args:
        rates: [K, S] in [0, 1]; NaN, where nothing valid was measured, is grey with a cross.
        steps: of the K checkpoints, which are drawn equally wide.
        deviants: the seats that start out violating; they are marked.
    """
    from atp_rl.tracking.report import COLORS as ARMS
    from atp_rl.tracking.report import MUTED, svg  # here, so that the report can import this file

    v = np.asarray(rates, dtype=float)
    if v.shape != (len(steps), len(seats)) or not v.size:
        raise ValueError(f"rates must be [{len(steps)} steps, {len(seats)} seats] and not empty, got {v.shape}")
    if ((v < 0) | (v > 1)).any():
        raise ValueError("rates must lie in [0, 1]")
    k, s = v.shape
    missing = np.argwhere(np.isnan(v))

    def draw(figure: Figure) -> None:
        ax = figure.subplots()
        lines = {"edgecolor": "white", "linewidth": 1 if k <= 40 else 0.3}
        cells = ax.pcolormesh(np.ma.masked_invalid(v.T), cmap=COLORS, vmin=0, vmax=1, **lines)
        for column, row in missing:
            ax.add_patch(Rectangle((column, row), 1, 1, facecolor=UNMEASURED, **lines))
        ax.plot(*(missing.T + 0.5), **CROSS)
        ax.grid(visible=False)
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
        ax.set(xlabel="step", ylabel="seat", ylim=(s, 0))
        shown = range(0, k, -(-k // 12))
        ax.set_xticks([i + 0.5 for i in shown], [str(steps[i]) for i in shown])
        names = [seat if len(seat) <= LONGEST else f"{seat[: LONGEST - 1]}…" for seat in seats]
        marked = [f"◆ {name}" if seat in deviants else name for seat, name in zip(seats, names, strict=True)]
        ax.set_yticks(np.arange(s) + 0.5, marked)
        for label, seat in zip(ax.get_yticklabels(), seats, strict=True):
            if seat in deviants:
                label.set(color=ARMS[0], fontweight="bold")
        size: dict[str, Any] = {"fraction": 0.05, "pad": 0.02, "shrink": min(1, 10 / s), "anchor": (0, 1)}
        bar = figure.colorbar(cells, ax=ax, format=PercentFormatter(1), ticks=[0, 0.25, 0.5, 0.75, 1], **size)
        bar.set_label("violation rate")
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0)
        key = {}
        if len(missing):
            key["not measured"] = (Patch(facecolor=UNMEASURED), Line2D([], [], **CROSS))
        if any(seat in deviants for seat in seats):
            key["deviant seat"] = Line2D([], [], color=ARMS[0], marker="D", ms=5, linestyle="none")
        if key:
            figure.legend(key.values(), key.keys(), loc="outside lower right", ncols=2, frameon=False, labelcolor=MUTED)

    return svg(12, max(2.2, 1 + 0.26 * s), _title(v, steps, seats, deviants), draw)


def _title(v: np.ndarray, steps: Sequence[int], seats: Sequence[str], deviants: Collection[str]) -> str:
    """What a reader who cannot see the picture learns from it."""
    ends = [
        f"{seat}{' (deviant)' if seat in deviants else ''} {_percent(first)} and {_percent(last)}"
        for seat, first, last in zip(seats, v[0], v[-1], strict=True)
    ]
    return f"Violation rate by seat at {len(steps)} checkpoints, at steps {steps[0]} and {steps[-1]}: {', '.join(ends)}"


def _percent(rate: float) -> str:
    return "not measured" if np.isnan(rate) else f"{100 * rate:.1f} %"
