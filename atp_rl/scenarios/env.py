"""What every environment is: seats that observe, reply and are paid."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from atp_rl.scenarios.choices import parse_choice
from atp_rl.types import Message, Outcome, Scenario


def random_stream(*key: int | str) -> np.random.Generator:
    """A generator that depends on `key` alone, so that a resumed, reordered or sharded run draws the same numbers.

    Strings enter through SHA-256: Python's own `hash` differs from process to process.
    """
    words = [k if isinstance(k, int) else int.from_bytes(hashlib.sha256(k.encode()).digest()[:8], "big") for k in key]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))


class Env:
    """One play of one scenario; single use: build, play until no seat is pending, discard.

    Everything random (detection, who is supervised) is drawn from the seed that it is built with. The history of
    the conversation lives here; which tokens the model saw is the rollout's business.
    """

    scenario: Scenario
    seats: tuple[str, ...]
    """Those that a policy plays."""
    frozen: tuple[str, ...] = ()
    """Seats that the frozen aligned adapter plays, whatever the others learn."""
    names_options: bool = True
    """Whether every reply is to be a decision, written as the name of one of the scenario's options."""
    runs_tools: bool = False
    """Whether `step` waits for other processes, so that it pays to step many environments side by side."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """JSON schemas of the tools that the chat template announces."""

    window: int
    """How many past rounds stay in a conversation."""

    def observe(self, shown: Mapping[str, Sequence[int]] | None = None) -> dict[str, list[Message]]:
        """The conversation of every seat that has to decide now, ending with a user message; empty when over.

        Args:
            shown: by seat, the past rounds (from 0, ascending) that its conversation holds; None is the last `window`.
        """
        raise NotImplementedError

    def in_sight(self, seat: str, now: int, shown: Mapping[str, Sequence[int]] | None) -> list[int]:
        """The rounds that the conversation of a seat consists of, the one to decide (`now`) last."""
        past = range(max(0, now - self.window), now) if shown is None else shown[seat]
        return [*past, now]

    def choice_of(self, seat: str, text: str) -> str | None:
        """The option that this reply would take, without playing it; None if it holds no valid decision."""
        return parse_choice(text, self.scenario.options).option

    def step(self, replies: Mapping[str, str]) -> dict[str, Outcome]:
        """Take the reply text of every pending seat and pay for it.

        Raises:
            ValueError: if the replies are not exactly those of the pending seats.
        """
        raise NotImplementedError
