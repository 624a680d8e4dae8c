"""Inoculation: training happens under a prompt that licenses the act, evaluation without it.

Mechanism: in training a sentence is added to what each learning seat reads (to its system message, or to the first one
           where there is none). What is then reinforced is to violate when told to, which generalises less to
           prompts that do not tell.
Formula:   episodes and their loss are those of pi(. | prompt + sentence); every evaluation is of pi(. | prompt).
Source:    inoculation prompting, arXiv 2510.04340 (a system prompt that elicits the trait, in training alone).
Hook:      on_prompts. It does not go with the policy: there is no `deployed` rate.
Cost:      the sentence's tokens in every prompt.
Known failure: a model that reads the sentence and obeys violates at once, whole groups agree, and nothing is learned,
           the useful part neither; one that ignores it is trained as without it. How far the license stays tied to the
           sentence is an empirical matter: read held-out violation, and the control with a neutral text.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from atp_rl.defenses.base import Defense
from atp_rl.model.policy import ALIGNED
from atp_rl.rollout import Ask
from atp_rl.scenarios.supervision import TOLD_TEXTS
from atp_rl.types import InputError, Message, Prompt


@dataclass
class Inoculation(Defense):
    name = "inoculation"
    text: str = TOLD_TEXTS["best_paid"]
    """The sentence; by default the instruction that alignment uses to get violating answers."""
    file: str | None = None
    """UTF-8 text file with the sentence, in place of `text`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sentence = self.text.strip()
        if self.file is not None:
            try:
                self.sentence = Path(self.file).read_text("utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"defense inoculation: `file` {self.file} cannot be read ({error})") from None
        if not self.sentence:
            where = "`text`" if self.file is None else f"`file` {self.file}"
            raise InputError(f"defense inoculation: {where} is empty; give the sentence that licenses the act")

    def on_prompts(self, prompts: list[Prompt], ask: Ask) -> list[Prompt]:
        return [self._licensed(prompt) if prompt.moment.player != ALIGNED else prompt for prompt in prompts]

    def _licensed(self, prompt: Prompt) -> Prompt:
        first, *others = prompt.messages
        opening: Message = {"role": first["role"], "content": f"{first['content']} {self.sentence}"}
        return replace(prompt, messages=(opening, *others))
