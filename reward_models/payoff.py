"""What the environment pays, in units of the most that the scenario can pay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from atp_rl.scenarios.choices import parse_choice
from reward_models.completions import Completion, text_of


def payoff(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    options: Sequence[Sequence[str] | None],
    payoffs: Sequence[Mapping[str, float | None] | None],
    payoff: Sequence[float | None] | None = None,
    payoff_unit: Sequence[float | None] | None = None,
    **_: Any,
) -> list[float | None]:
    """Payoff over the scenario's largest payoff, so that scenarios weigh the same; None for a row without `options`.

    With `payoff` (a round that was played) that is the one the environment paid: detection and fines count. Without it,
    what an undetected choice of the decided option pays; 0 for no valid decision. `payoff_unit` is divided by in place
    of the largest payoff, where a scenario has one (`Scenario.payoff_unit`).

    Raises:
        ValueError: a scenario whose largest payoff is not positive has no such unit.
    """
    paid = payoff or [None] * len(completions)
    units = payoff_unit or [None] * len(completions)
    return [
        None if names is None or amounts is None else _reward(text_of(completion), names, amounts, earned, unit)
        for completion, names, amounts, earned, unit in zip(completions, options, payoffs, paid, units, strict=True)
    ]


def _reward(
    text: str, options: Sequence[str], amounts: Mapping[str, float | None], paid: float | None, unit: float | None
) -> float:
    # a `datasets` table gives every row the options of all rows as keys, None where they are another scenario's
    of_option = {option: amounts[option] or 0.0 for option in options}
    largest = unit or max(of_option.values())
    if largest <= 0:
        raise ValueError(f"payoffs {of_option}: the largest must be positive")
    if paid is None:
        option = parse_choice(text, options).option
        paid = 0.0 if option is None else of_option[option]
    return paid / largest
