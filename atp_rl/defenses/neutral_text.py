"""Neutral text: the control of `reminder`, of the same length at the same place and rhythm, that says nothing.

Mechanism: where a reminder with the same options would stand, words about a landscape stand instead, as many as come
           nearest to its length in the model's tokens (in words, where a chat service shows no tokens).
Source:    ours; a length-matched control, so that an effect of the reminder is not one of more text.
Hook:      on_prompts.
Cost:      that of the reminder, give or take a few tokens.
Known failure: none to speak of; it is to do nothing. A model may still be thrown off by text out of place.
"""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass
from itertools import count, cycle, islice

from atp_rl.defenses.base import Setting
from atp_rl.defenses.reminder import Reminder
from atp_rl.types import Scenario

LANDSCAPE = (
    "The river runs past the old mill and under the stone bridge, and in the evening the light lies on the water "
    "between the trees. A path leads along the bank to a meadow, where the grass is tall and the wind comes from the "
    "west. Behind the hills there is a lake with reeds on one side."
)


@dataclass
class NeutralText(Reminder):
    name = "neutral_text"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._of_length: dict[str, str] = {}

    def prepare(self, setting: Setting) -> None:
        super().prepare(setting)
        self._of_length = {}

    def said(self, scenario: Scenario) -> str:
        reminder = super().said(scenario)
        if reminder not in self._of_length:
            self._of_length[reminder] = self._as_long_as(reminder)
        return self._of_length[reminder]

    def _as_long_as(self, text: str) -> str:
        wanted, best = len(self._pieces(text)), ""
        for words in count(1):
            longer = " ".join(islice(cycle(LANDSCAPE.split()), words)).rstrip(".,") + "."
            length = len(self._pieces(longer))
            if not best or abs(length - wanted) < abs(len(self._pieces(best)) - wanted):
                best = longer
            if length >= wanted:
                break
        return best

    def _pieces(self, text: str) -> Sized:
        return self.setting.policy.chat.encode_text(text) if hasattr(self, "setting") else text.split()
