"""`atp scenarios`: look at scenarios and check files of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Look at scenarios and check files of them.", no_args_is_help=True)

File = Annotated[Path | None, typer.Option(help="Scenario file (JSONL or YAML); default: the shipped ones.")]


@app.command()
def validate(file: Annotated[Path, typer.Argument(help="Scenario file (JSONL or YAML).")]) -> None:
    """Check that every scenario of a file can be played."""
    from atp_rl.scenarios import browse

    print(browse.validate(file))


@app.command("list")
def list_(
    testbed: Annotated[str | None, typer.Option(help="Default: role_play, or all that are in the file.")] = None,
    split: Annotated[str | None, typer.Option(help="train or held_out; default: both.")] = None,
    file: File = None,
) -> None:
    """Print a table of scenarios."""
    from atp_rl.scenarios import browse

    _print(browse.table(testbed=testbed, split=split, file=file))


@app.command()
def show(
    scenario: Annotated[str, typer.Argument(metavar="ID", help="As `atp scenarios list` has it; quote spaces.")],
    file: File = None,
) -> None:
    """Print a scenario: its rule, its options, and what an agent reads in round 1."""
    from atp_rl.scenarios import browse

    _print(browse.show(scenario, file=file))


def _print(renderable: object) -> None:
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 160).print(renderable)
