"""The propensity of an option: read off the model exactly, or estimated from replies.

64 replies of a scenario leave a standard error of up to 0.06 (of sqrt(p (1 - p) / 64)); the exact one has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from atp_rl.model.policy import Policy
from atp_rl.model.sampler import HFSampler
from atp_rl.rollout import Play
from atp_rl.scenarios import make_env
from atp_rl.types import Chat, Sampler
from tests.benchmarks.generate import GenerateSampler
from tests.benchmarks.rollouts import SAMPLING, make_policy, pick_scenarios
from tests.benchmarks.timing import Contest, Report, clocked

SCENARIOS, SAMPLES = 16, 64

AT_ONCE = 256
"""Rows that `generate` is given at once, each prompt `SAMPLES` times among them; `HFSampler`'s own default too."""


def measure(repeats: int, report: Report) -> list[dict[str, Any]]:
    policy = make_policy()
    asked = chats(policy)
    many = [Chat(c.messages, c.prompt_ids, c.options, (*c.seed, i)) for c in asked for i in range(SAMPLES)]

    def sampled(sampler: Sampler, replies: Sequence[Chat] = many) -> dict[str, Any]:
        for start in range(0, len(replies), AT_ONCE):
            sampler.generate(replies[start : start + AT_ONCE], SAMPLING)
        return {"decisions": len(replies)}

    def exact() -> dict[str, Any]:
        return {"decisions": len(HFSampler(policy).score(asked))}

    sampled(GenerateSampler(policy), many[:SAMPLES])  # what torch and transformers do once
    exact()
    ways = {
        f"{SAMPLES} replies each, batched generate": clocked(lambda: sampled(GenerateSampler(policy))),
        f"{SAMPLES} replies each, atp_rl's sampler": clocked(lambda: sampled(HFSampler(policy))),
        "exact, HFSampler.score": clocked(exact),
    }
    return Contest(f"propensity of {SCENARIOS} scenarios", ways).run(repeats, report).rows()


def chats(policy: Policy) -> list[Chat]:
    """The first round of held-out scenarios."""
    play = Play(rounds=1, supervision="all_unsupervised", history_window=0, sampling=SAMPLING)
    asked = []
    for scenario in pick_scenarios("held_out", SCENARIOS):
        env = make_env(
            scenario, rounds=1, supervision=play.supervision, seed=(0, scenario.id), history_window=play.history_window
        )
        messages = env.observe()["agent"]
        asked.append(Chat(messages, policy.chat.encode(messages, []), scenario.options, (0, scenario.id)))
    return asked
