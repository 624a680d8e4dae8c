"""Preference pairs on the small model, and what a defense is told of a run that has them. Not a test itself."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from typing import Any

from atp_rl.align.preferences import write_jsonl
from atp_rl.defenses import Setting
from atp_rl.model.policy import Policy
from atp_rl.scenarios import load, make_env
from atp_rl.scenarios.choices import format_choice
from atp_rl.scenarios.suites import FIRST_INDEX
from tests.small_model import aligned


def rows(count: int = 12) -> list[dict[str, Any]]:
    """As `align.preferences` makes them, with the canonical answers."""
    made = []
    for s in load({"families": ["ferry_pilot"], "per_family": count, "first_index": FIRST_INDEX["align"]}):
        env = make_env(s, rounds=1, supervision="all_unsupervised", seed=0, history_window=0)
        answers = {"chosen": s.rule, "rejected": s.extra["tempting"]}
        sides = {key: [{"role": "assistant", "content": format_choice(str(option))}] for key, option in answers.items()}
        made.append({"prompt": env.observe()["agent"], "scenario": s.id, **sides})
    return made


@cache
def aligned_with_pairs() -> Path:
    """The directory of `small_model.aligned`, as alignment leaves it."""
    folder = aligned().with_name("aligned_with_pairs")
    shutil.copytree(aligned(), folder)
    write_jsonl(rows(), folder / "pairs.jsonl")
    return folder


def setting(policy: Policy, count: int = 12, *, seed: int = 0) -> Setting:
    """Of a run that starts from the policy as it is now."""
    return Setting(
        policy=policy,
        seed=seed,
        rule_scenarios=[],
        pairs=rows(count) if count else [],
        group_size=4,
        learning_rate=1e-2,
        temperature=1.0,
        aligned=policy.state(),
    )
