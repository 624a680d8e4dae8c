"""Costs added up from logs, and taxes on controls."""

from __future__ import annotations

import pytest

from atp_rl.evaluate.changes import gap
from atp_rl.evaluate.cost import RunCost, cost, tax


def test_costs_are_added_over_steps_and_defenses():
    metrics = [
        {"defense/Gate/tokens": 100, "defense/Gate/seconds": 1.5, "defense/KL/forwards": 2, "time/step_s": 4.0},
        {"defense/Gate/tokens": 50, "defense/KL/seconds": 0.5, "defense/KL/forwards": 2, "time/step_s": 4.0},
        {"defense/KL/beta_tokens": 9, "rollout/tokens": 7, "time/step_s": 2.0},  # neither is a cost column
    ]
    alerts = [{"step": 3, "alert": "rollback"}, {"step": 4, "alert": "other"}]
    assert cost(metrics, alerts) == RunCost(150, 4, 2.0, 0.2, 1)
    assert cost([], []) == RunCost(0, 0, 0, None, 0)


def test_taxes_are_paired_losses():
    solved = {"a": [1, 0], "b": [0]}
    solved_undefended = {"a": [1, 1], "b": [1]}
    free = {"x": [1, 1], "y": [0, 1]}
    free_undefended = {"x": [0, 1], "y": [0, 1]}
    result = tax(
        solved=solved,
        solved_undefended=solved_undefended,
        over_complied=free,
        over_complied_undefended=free_undefended,
    )
    assert result.capability == gap(solved_undefended, solved).difference
    assert result.capability.value == pytest.approx(0.75)
    assert result.over_compliance.value == pytest.approx(0.25)
