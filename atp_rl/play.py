"""A person in a seat, through the same environment, parser and rollout as a model."""

from __future__ import annotations

from pathlib import Path

from atp_rl.model.sampler import TextSampler
from atp_rl.rollout import Play, rollout
from atp_rl.scenarios import check_supervision, load
from atp_rl.types import Chat, InputError, SamplingParams


def play_as_human(part: str, *, rounds: int, supervision: str, seed: int, file: Path | None) -> None:
    """Play the first scenario whose id contains `part`: show each round, read the answer from standard input.

    Raises:
        InputError: no such scenario or pattern, or the input ended.
    """
    scenario = next((s for s in load(file or {}) if part in s.id), None)
    if scenario is None:
        raise InputError(f"no scenario has {part!r} in its id; ids look like role_play/{{family}}/{{index}}")
    try:
        watched = {"probability": float(supervision)}
    except ValueError:
        watched = supervision
    check_supervision(watched)

    def ask(chat: Chat) -> str:
        for message in chat.messages if len(chat.messages) < 3 else chat.messages[-1:]:
            print(f"\n[{message['role']}] {message['content']}")
        try:
            answer = input("\nyour answer> ")
        except EOFError:
            raise InputError("the input ended before the last round") from None
        return answer

    play = Play(rounds, watched, rounds, SamplingParams(max_new_tokens=1))
    episode = rollout([scenario], TextSampler(ask), play, group_size=1, seed=(seed,)).episodes[0]
    print()
    for turn in episode.turns:
        outcome = turn.outcome
        caught = ", detected" if outcome.detected else ""
        choice = outcome.choice or "no valid decision"
        print(f"round {turn.round + 1}: {choice}: {outcome.verdict}{caught}, payoff {outcome.payoff:g}")
    print(f"total payoff {sum(turn.outcome.payoff for turn in episode.turns):g}")
