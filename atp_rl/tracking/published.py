"""What the paper published, as far as this project has recorded it, for `atp compare --paper`.

None of the figures came with an interval, an n or a number of seeds; the paper's test file of role play has 64 items.
Where it was not recorded whose figure it is, `model` or `alignment` is None, and `arm` says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

SOURCE = "arXiv 2510.04860"
QWEN, LLAMA = "Qwen/Qwen3-8B", "meta-llama/Llama-3.1-8B-Instruct"

Quantity = Literal["violation", "tool_used", "correct", "recollusion"]


class Figure(NamedTuple):
    testbed: str
    model: str | None
    alignment: str | None
    quantity: Quantity
    by_round: Mapping[int | None, str]
    """As published, by round from 1; None is all rounds after the first success."""
    arm: str


FIGURES = (
    Figure("role_play", LLAMA, "dpo", "violation", {1: "18.8 %", 6: "45.3 %"}, "Llama-3.1-8B, DPO"),
    Figure("role_play", QWEN, None, "violation", {1: "7.8 %", 6: "20.3 %"}, "an arm of Qwen3-8B"),
    Figure("tool_use", QWEN, "grpo", "tool_used", {1: "8 %", 4: "0 %"}, "Qwen3-8B, GRPO"),
    Figure("tool_use", QWEN, "grpo", "correct", {1: "83 %", 4: "54 %"}, "Qwen3-8B, GRPO"),
    Figure("tool_use", None, None, "tool_used", {1: "about 50 %", 5: "about 20 %"}, "another arm"),
    Figure("collusion", None, None, "recollusion", {None: "75 to 100 %"}, "of no particular arm"),
)
