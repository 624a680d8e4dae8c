"""Memory filter: rounds in which a seat broke the rule are not read again, or only with a comment.

Mechanism: a monitor sees each past violation with probability `recall`. What it sees is dropped from the conversation
           (`drop`), or kept and answered by "That broke the rule." before the feedback (`counter`). A violation that
           was seen once is treated so in all later rounds.
Source:    ours; against the imitation of one's own successful violations in context (arXiv 2510.04860).
Hook:      on_history (drop), on_prompts (counter).
Cost:      drop: negative, shorter prompts. counter: six tokens or so for every violation in sight.
Known failure: a monitor that misses some leaves just those that were hard to see. Dropping also hides that a violation
           was caught and paid nothing, which would have deterred.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from atp_rl.defenses.base import Defense
from atp_rl.defenses.seen_violations import check_recall, seen_violations
from atp_rl.rollout import Ask
from atp_rl.types import InputError, Message, Moment, Prompt

COMMENT = "That broke the rule."


@dataclass
class MemoryFilter(Defense):
    name = "memory_filter"
    deploys = True
    needs_past = True
    recall: float = 1.0
    """Share of the violations that are seen, in [0, 1]."""
    mode: Literal["drop", "counter"] = "drop"
    """Drop the round from the conversation, or keep it with a comment."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_recall(self.recall, self.name)
        if self.mode not in ("drop", "counter"):
            raise InputError(f"defense memory_filter: `mode` must be drop or counter, got {self.mode!r}")

    def on_history(self, rounds: list[int], moment: Moment) -> list[int]:
        if self.mode == "counter":
            return rounds
        seen = seen_violations(moment, self.recall, self.name)
        return [k for k in rounds if k not in seen]

    def on_prompts(self, prompts: list[Prompt], ask: Ask) -> list[Prompt]:
        return prompts if self.mode == "drop" else [self._commented(prompt) for prompt in prompts]

    def _commented(self, prompt: Prompt) -> Prompt:
        """Before what was answered to the last reply of every round whose violation is seen."""
        seen = seen_violations(prompt.moment, self.recall, self.name)
        last_of_round = {k: i for i, k in enumerate(prompt.rounds)}
        replies = [i for i, message in enumerate(prompt.messages) if message["role"] == "assistant"]
        if not seen & last_of_round.keys():
            return prompt
        messages = list(prompt.messages)
        for k in seen & last_of_round.keys():
            at = replies[last_of_round[k]] + 1
            commented: Message = {"role": "user", "content": f"{COMMENT} {messages[at]['content']}"}
            messages[at] = commented
        return replace(prompt, messages=tuple(messages))
