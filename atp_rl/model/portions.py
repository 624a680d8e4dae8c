"""Splits rows of tokens into forwards of a bearable size."""

from __future__ import annotations

from collections.abc import Sequence

TOKENS_AT_ONCE = 4096
"""In one forward: with more, activations leave a processor's cache and fill a GPU's memory."""


def portions(lengths: Sequence[int], *, most: int = TOKENS_AT_ONCE) -> list[list[int]]:
    """Indices of rows of like length, together at most `most` tokens when padded (or a single row), each in order."""
    parts: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not parts or (len(parts[-1]) + 1) * lengths[row] > most:
            parts.append([])
        parts[-1].append(row)
    return [sorted(rows) for rows in parts]


def stretches(lengths: Sequence[int], *, most: int = TOKENS_AT_ONCE) -> list[list[int]]:
    """The same for rows that stay in order, each part of neighbours."""
    parts: list[list[int]] = []
    longest = 0
    for row, length in enumerate(lengths):
        longest = max(longest, length)
        if not parts or (len(parts[-1]) + 1) * longest > most:
            parts.append([])
            longest = length
        parts[-1].append(row)
    return parts
