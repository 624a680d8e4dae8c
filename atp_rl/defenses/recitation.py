"""Recitation: before a seat decides, it is asked which option the rule requires, and its answer stays before its eyes.

Mechanism: a question is added to the last user message; the model's own answer (its very tokens) follows as its turn,
           and then it is asked to decide. Once a round, before the first reply of it. The answer is read and not
           learned from, and it is gone in the next round. If it makes no sense, that is what is read.
Source:    the conversational form of active recall; compare "self-reminders" (Xie et al. 2023, Nature Machine
           Intelligence 5).
Hook:      on_prompts, which asks.
Cost:      one more reply a round, and its tokens in the prompt.
Known failure: saying the rule is not keeping it. A recitation that is wrong misleads: look at what is said. The tiny
           model only writes decisions, so its recitations mean nothing and illustrate the protocol.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from atp_rl.defenses.base import Defense
from atp_rl.defenses.reminder import put
from atp_rl.rollout import Ask
from atp_rl.types import InputError, Message, Prompt

QUESTION = "Do not decide yet. Which option does the rule require? Answer in one sentence."
DECIDE = "Now decide."


@dataclass
class Recitation(Defense):
    name = "recitation"
    deploys = True
    asks = True
    max_new_tokens: int = 64
    """Of the recitation, >= 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_new_tokens < 1:
            raise InputError(f"defense recitation: `max_new_tokens` must be >= 1, got {self.max_new_tokens}")

    def on_prompts(self, prompts: list[Prompt], ask: Ask) -> list[Prompt]:
        fresh = [i for i, prompt in enumerate(prompts) if prompt.moment.round not in prompt.rounds]
        if not fresh:
            return prompts
        asked = [replace(prompts[i], messages=put(QUESTION, prompts[i].messages, "last")) for i in fresh]
        answers = ask(asked, [prompt.moment.player for prompt in asked], self.max_new_tokens)
        changed = list(prompts)
        for i, prompt, answer in zip(fresh, asked, answers, strict=True):
            said: Message = {"role": "assistant", "content": answer.text}
            form = prompt.moment.scenario.texts.get("format", "")
            decide: Message = {"role": "user", "content": f"{DECIDE} {form}".rstrip()}
            changed[i] = replace(
                prompt,
                messages=(*prompt.messages, said, decide),
                written=(*prompt.written, answer.token_ids),
                rounds=(*prompt.rounds, prompt.moment.round),
            )
        return changed
