"""Answers that a reply may turn out to be, as one tree of tokens that a model reads in a single forward."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Drafts:
    """The answers' common beginnings are there once. Node 0 is the end of the prompt, before any of their tokens.

    A path of nodes is the beginning of some answer. The nodes of the first answer are numbered in order.
    """

    def __init__(self, answers: Sequence[tuple[int, ...]]) -> None:
        """`answers`: their tokens, without the one that ends the turn."""
        self.tokens: list[int] = [0]
        """Of each node; node 0 has none."""
        self.paths: list[list[int]] = [[]]
        """The nodes from the first after node 0 to each node itself."""
        self.following: list[dict[int, int]] = [{}]
        """The nodes that follow each node, by their tokens."""
        for answer in answers:
            self._add(answer)
        n = len(self.tokens)
        self.sees = np.zeros((n, n), bool)
        """[node, node]: whether the second is on the path to the first."""
        for node, path in enumerate(self.paths):
            self.sees[node, path] = True

    def _add(self, answer: tuple[int, ...]) -> None:
        node = 0
        for token in answer:
            if token not in self.following[node]:
                self.following[node][token] = len(self.tokens)
                self.tokens.append(token)
                self.paths.append([*self.paths[node], len(self.paths)])
                self.following.append({})
            node = self.following[node][token]

    def __len__(self) -> int:
        """Tokens to read."""
        return len(self.tokens) - 1

    def path(self, tokens: Sequence[int]) -> list[int]:
        """The nodes that `tokens` begins with."""
        node = 0
        for token in tokens:
            if token not in self.following[node]:
                break
            node = self.following[node][token]
        return self.paths[node]


drafts_of = lru_cache(maxsize=1 << 14)(Drafts)
"""They are the same in every round of an episode."""


class Padded(NamedTuple):
    """The drafts of several rows, without node 0, padded on the right to the most tokens."""

    ids: Tensor
    """[B, T]; pads are zeros."""
    real: Tensor
    """[B, T] bool."""
    depth: Tensor
    """[B, T]: the how manieth token after the prompt, from 1."""
    sees: Tensor
    """[B, T, T] bool."""


def pad_drafts(rows: Sequence[Drafts]) -> Padded:
    b, t = len(rows), max(map(len, rows))
    ids, depth = np.zeros((b, t), np.int64), np.zeros((b, t), np.int64)
    real, sees = np.zeros((b, t), bool), np.zeros((b, t, t), bool)
    for row, drafts in enumerate(rows):
        n = len(drafts)
        ids[row, :n], real[row, :n] = drafts.tokens[1:], True
        depth[row, :n] = drafts.sees[1:].sum(1)
        sees[row, :n, :n] = drafts.sees[1:, 1:]
    return Padded(torch.from_numpy(ids), torch.from_numpy(real), torch.from_numpy(depth), torch.from_numpy(sees))
