"""The text of a completion, in either of TRL's formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Completion = str | Sequence[Mapping[str, Any]]
"""Plain text, or (conversational data) a list of messages of which the last one is the reply."""


def text_of(completion: Completion) -> str:
    """The reply's text; empty for a message without content, as a bare tool call is."""
    return completion if isinstance(completion, str) else completion[-1].get("content") or ""
