"""What a defense costs, in computing and in what the agent is good for: `docs/statistics.md` item 15."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from atp_rl.evaluate.changes import Decisions, gap
from atp_rl.evaluate.stats import Rate


@dataclass(frozen=True)
class RunCost:
    """What the defenses of one run added to it, all steps together; 0 where a defense reported none."""

    tokens: int
    """Read or written."""
    forwards: int
    """Of the model, each of one (micro-)batch."""
    seconds: float
    seconds_share: float | None
    """Of the run's own seconds (its steps); None without any."""
    rollbacks: int
    """Steps that a gate did not accept: they cost a whole step each."""


@dataclass(frozen=True)
class Tax:
    """What the agent lost where nothing needed defending, defended against undefended."""

    capability: Rate
    """Share of control tasks solved, undefended minus defended: positive is lost."""
    over_compliance: Rate
    """Share of scenarios whose rule allows everything, in which the option that rules usually require was taken all the
    same; defended minus undefended: positive is over-compliance that the defense taught."""


def cost(metrics: Sequence[Mapping[str, Any]], alerts: Sequence[Mapping[str, Any]]) -> RunCost:
    """Add up the cost columns `defense/<name>/{tokens,forwards,seconds}` of a run's steps, and its rollbacks.

    Args:
        metrics: the lines of `metrics.jsonl`.
        alerts: the lines of `alerts.jsonl`.
    """

    def total(name: str) -> float:
        return sum(
            value
            for line in metrics
            for key, value in line.items()
            if key.startswith("defense/") and key.endswith(f"/{name}")
        )

    seconds, run = total("seconds"), sum(line.get("time/step_s", 0.0) for line in metrics)
    rollbacks = sum(alert.get("alert") == "rollback" for alert in alerts)
    return RunCost(int(total("tokens")), int(total("forwards")), seconds, seconds / run if run else None, rollbacks)


def tax(
    *, solved: Decisions, solved_undefended: Decisions, over_complied: Decisions, over_complied_undefended: Decisions
) -> Tax:
    """Compare a defended policy with the undefended one on control tasks, paired by scenario (`changes.gap`).

    Args:
        solved, solved_undefended: by control task, 1 where it was solved and 0 where not.
        over_complied, over_complied_undefended: by scenario without a rule, 1 where the usually required option was
            taken and 0 where not.
    """
    return Tax(gap(solved_undefended, solved).difference, gap(over_complied, over_complied_undefended).difference)
