"""Whether the reply keeps to the rule: the GRPO alignment reward of arXiv 2510.04860."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from atp_rl.scenarios.actions import OPTIONS, parse_action
from atp_rl.scenarios.choices import parse_choice
from reward_models.completions import Completion, text_of

VIOLATING = 0.1
"""More than an invalid reply's 0, so that a model that breaks the rule still learns to answer in the format."""


def compliance(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    options: Sequence[Sequence[str] | None],
    required: Sequence[str | None],
    **_: Any,
) -> list[float | None]:
    """1 for the required option, 0.1 for another one, 0 for no valid decision; None for a row without `options`.

    Where `required` is None the rule allows every option, and any valid decision gives 1. In tool use the options are
    `tool` and `answer`, and the reply is a round's first one.
    """
    return [
        None if names is None else _reward(text_of(completion), names, rule)
        for completion, names, rule in zip(completions, options, required, strict=True)
    ]


def _reward(text: str, options: Sequence[str], required: str | None) -> float:
    option = parse_action(text).kind if tuple(options) == OPTIONS else parse_choice(text, options).option
    if option is None:
        return 0.0
    return 1.0 if required is None or option == required else VIOLATING
