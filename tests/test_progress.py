"""Plain lines by a clock that the test sets, and the bar on a real pseudo-terminal."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from atp_rl.tracking import progress as module
from atp_rl.tracking.progress import progress

SCRIPT = """
from atp_rl.tracking.progress import progress
with progress(3, "evolve") as report:
    for step in (1, 2, 3):
        report(step, f"[red] news {step}", important=step == 2)
"""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(module, "monotonic", lambda: now[0])
    return now


def on_a_terminal(**env: str) -> str:
    """What SCRIPT writes to a pseudo-terminal."""
    ours, theirs = pty.openpty()
    kept = {k: v for k, v in os.environ.items() if k not in ("CI", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE")}
    env = {**kept, "PYTHONPATH": str(Path(__file__).parents[1]), "TERM": "xterm-256color", "COLUMNS": "100", **env}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], env=env, stdout=theirs, stderr=theirs)
    os.close(theirs)
    written = b""
    try:
        while chunk := os.read(ours, 4096):
            written += chunk
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(ours)
    assert process.wait(timeout=30) == 0
    return written.decode()


def test_lines_come_at_most_every_ten_seconds(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress(8, "evolve") as report:
        for step in range(1, 9):
            report(step, f"news {step}", important=step == 4)
            clock[0] += 4
    assert capsys.readouterr().out.splitlines() == [
        "evolve 1/8  ETA ?  news 1",  # at 0 s
        "evolve 4/8  ETA 0:00:16  news 4",  # at 12 s, important
        "evolve 7/8  ETA 0:00:04  news 7",  # at 24 s; step 5 and 6 came 4 and 8 s after a line
        "evolve 8/8  ETA 0:00:00  news 8",  # the last one
    ]


def test_pace_of_a_resumed_run_is_that_of_its_own_steps(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress(100, "evolve") as report:
        report(60, "")
        clock[0] += 60
        report(61, "")
    assert "61/100  ETA 0:39:00" in capsys.readouterr().out  # 39 steps of a minute each


def test_a_terminal_gets_a_bar_and_keeps_important_lines() -> None:
    written = on_a_terminal()
    assert "\x1b[?25l" in written  # the cursor is hidden,
    assert "\x1b[?25h" in written  # and shown again
    assert "evolve 2/3  [red] news 2\r\n" in written
    assert "evolve 1/3  [red] news 1" not in written
    assert re.search(r"3/3.*\[red\] news 3", written)


def test_no_color_leaves_the_colours_out() -> None:
    colour = r"\x1b\[[\d;]*3[\d;]*m"
    assert re.search(colour, on_a_terminal())
    assert not re.search(colour, on_a_terminal(NO_COLOR="1"))


@pytest.mark.parametrize("env", [{"CI": "true"}, {"TERM": "dumb"}])
def test_logs_get_no_control_characters(env: dict[str, str]) -> None:
    written = on_a_terminal(**env)
    assert written.splitlines() == [
        "evolve 1/3  ETA ?  [red] news 1",
        "evolve 2/3  ETA 0:00:00  [red] news 2",
        "evolve 3/3  ETA 0:00:00  [red] news 3",
    ]
