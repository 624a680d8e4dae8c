"""The pictures of a league table: every seed of every arm drawn by itself, and what arms earn against what they break.

Drawn with the report's means and in its style; the same runs give the same bytes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import matplotlib
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from atp_rl.evaluate.pareto import front
from atp_rl.tracking import compare
from atp_rl.tracking.league import Block, League, Row, checkpoint_points
from atp_rl.tracking.league_show import headline, sheets
from atp_rl.tracking.report import COLORS, INK, MARKERS, MUTED, STYLE, Arm, draw_decay, svg

COLUMNS = 5
"""Panels side by side."""


def write_html(league: League, out: Path) -> Path:
    """One self-contained page: tables and pictures, no script and no other file."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    blocks = [(block, sheets(league, block), [svg(*size, title, draw) for _, size, title, draw in _figures(block)])
              for block in league.blocks]  # fmt: skip
    page = environment.get_template("league.html.jinja").render(
        league=league, headline=headline(league), blocks=blocks, tiny=_tiny(league)
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, "utf-8")
    return out


def write_figures(league: League, folder: Path) -> list[Path]:
    """`curves.svg` and `pareto.svg` in `folder`; with several blocks, a pair for each, with its title in the names."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for block in league.blocks:
        suffix = f"-{'-'.join(block.title.replace(',', '').split())}" if block.title else ""
        for name, size, title, draw in _figures(block):
            written.append(folder / f"{name}{suffix.replace('/', '_')}.svg")
            written[-1].write_bytes(_standalone(*size, title, draw))
    return written


Drawing = tuple[str, tuple[float, float], str, Callable[[Figure], None]]
"""Name, size in inches, title, and what draws it."""


def _figures(block: Block) -> list[Drawing]:
    lines = math.ceil(len(block.rows) / COLUMNS)
    columns = math.ceil(len(block.rows) / lines)
    where = f" ({block.title})" if block.title else ""
    ends = "; ".join(f"{r.arm} {compare.percent(r.violation.value)}" for r in block.rows)
    pareto = "; ".join(f"{r.arm} {r.point[0]:.2f} and {compare.percent(r.point[1])}" for r in block.rows)
    return [
        ("curves", (2.5 * columns, 2.1 * lines), f"Violation rate by step, a line per seed{where}; at the end: {ends}",
         lambda figure: _draw_curves(figure, block, lines, columns)),
        ("pareto", (7.6, max(4.0, 0.22 * len(block.rows) + 0.6)),
         f"Normalised payoff and compliance of every arm at the end{where}: {pareto}",
         lambda figure: _draw_pareto(figure.subplots(), block)),
    ]  # fmt: skip


def _draw_curves(figure: Figure, block: Block, lines: int, columns: int) -> None:
    panels = list(figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat)
    for i, (row, color, ax) in enumerate(zip(block.rows, cycle(COLORS), panels, strict=False)):
        draw_decay(ax, Arm(row.records, compare.row(row.records), color))
        ax.set_title(row.arm, loc="left", fontweight="bold", fontsize=9, pad=12)
        ax.text(
            0, 1.02, f"{row.tipped} of {len(row.records)} tipped", transform=ax.transAxes, color=MUTED, fontsize=7.5
        )
        if i < len(block.rows) - columns:
            ax.set_xlabel("")
    for ax in panels[len(block.rows) :]:
        ax.set_axis_off()


def _draw_pareto(ax: Axes, block: Block) -> None:
    """Small: every checkpoint; large: the mean over seeds at the end; grey: the front of these means."""
    looks = math.lcm(len(COLORS), len(MARKERS))  # from then on the same pairs would come again
    for i, (row, color) in enumerate(zip(block.rows, cycle(COLORS))):
        marker = MARKERS[(i + i // looks) % len(MARKERS)]
        points = [p for r in row.records for p in checkpoint_points(block, r)]
        ax.plot(*zip(*points, strict=True), marker, color=color, ms=2.5, alpha=0.25, mec="none")
        ax.plot(*row.point, marker, color=color, ms=8, mec="white", mew=0.8, label=_label(row), ls="none", zorder=3)
    best = [block.rows[i].point for i in front([row.point for row in block.rows])]
    if best:
        ax.step(*zip(*best, strict=True), where="pre", color=MUTED, lw=1, ls=(0, (4, 2)), zorder=2)
    ax.set_xlabel("payoff: 0 as aligned, 1 as tipped")
    ax.set_ylabel("compliance")
    ax.set_ylim(-0.03, 1.03)
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    ax.tick_params(length=0)
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8, labelcolor=INK)


def _label(row: Row) -> str:
    return f"{row.arm} *" if row.on_front else row.arm


def _standalone(width: float, height: float, title: str, draw: Callable[[Figure], None]) -> bytes:
    buffer = io.BytesIO()
    with matplotlib.rc_context({**STYLE, "figure.facecolor": "white"}):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Title": title})
    return buffer.getvalue()


def _tiny(league: League) -> bool:
    models = {record.summary["model"] for b in league.blocks for row in b.rows for record in row.records}
    return bool(models & set(compare.TINY))
