"""Rows of tokens that share their beginnings, packed so that each shared token is computed once.

The episodes of a group have one prompt, and with several rounds they part and part again: as a tree of tokens they are
a fraction of the rows. A tree is one row of a forward in which every token sees its ancestors and itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SHARED = 0.5
"""A row joins the tree before it when it shares at least this part of its tokens."""

MOST = 4
"""A tree grows to at most so many times its longest row: every node looks at the whole width of its tree."""

WORTH = 0.3
"""A tree's attention has a mask, and with one the fastest kernels are not taken; so it must save this much at least."""


class Tree(NamedTuple):
    tokens: list[int]
    """Of each node; a node comes after its ancestors."""
    depth: list[int]
    """The position of each node in its rows, from 0."""
    sees: list[tuple[int, list[int]]]
    """For each stretch of new nodes: its first node, and the nodes before it that all of it sees."""


class Forest(NamedTuple):
    trees: list[Tree]
    tree_of: list[int]
    """Of each row."""
    paths: list[list[int]]
    """Of each row: the node of its tree at each of its positions."""

    def attention(self, width: int) -> np.ndarray:
        """Which nodes see which, [trees, width, width] bool; pads see themselves, since a softmax of nothing is nan."""
        sees = np.zeros((len(self.trees), width, width), bool)
        for i, tree in enumerate(self.trees):
            ends = [start for start, _ in tree.sees[1:]] + [len(tree.tokens)]
            for (start, before), end in zip(tree.sees, ends, strict=True):
                sees[i, start:end, before] = True
                sees[i, start:end, start:end] = np.tri(end - start, dtype=bool)
            pads = range(len(tree.tokens), width)
            sees[i, pads, pads] = True
        return sees


def forest(rows: Sequence[Sequence[int]], players: Sequence[str]) -> Forest:
    """Trees of rows: neighbours in lexicographic order, of one player, that share at least `SHARED` of their tokens.

    None is larger than `MOST` times its longest row.

    Of sorted rows, the one before shares the most with each of them; so it is enough to compare neighbours.
    """
    trees: list[Tree] = []
    tree_of, paths = [0] * len(rows), [list[int]()] * len(rows)
    before: Sequence[int] = ()
    path: list[int] = []
    player, longest = None, 0
    for i in sorted(range(len(rows)), key=lambda i: (players[i], tuple(rows[i]))):
        row = rows[i]
        shared = _shared(before, row) if players[i] == player else 0
        full = trees and len(trees[-1].tokens) + len(row) - shared > MOST * max(longest, len(row))
        if not trees or full or shared < SHARED * len(row):
            trees.append(Tree([], [], []))
            shared = longest = 0
        longest = max(longest, len(row))
        tree = trees[-1]
        if shared < len(row):
            start = len(tree.tokens)
            tree.sees.append((start, path[:shared]))
            path = [*path[:shared], *range(start, start + len(row) - shared)]
            tree.tokens.extend(row[shared:])
            tree.depth.extend(range(shared, len(row)))
        else:
            path = path[:shared]
        tree_of[i], paths[i] = len(trees) - 1, path
        before, player = row, players[i]
    return Forest(trees, tree_of, paths)


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    n = min(len(one), len(other))
    differ = np.flatnonzero(np.asarray(one[:n]) != np.asarray(other[:n]))
    return int(differ[0]) if len(differ) else n


class Packed(NamedTuple):
    """Rows as they go through a model, and where in it the acted tokens are predicted."""

    ids: Tensor
    """[R, T] token ids, padded on the right."""
    positions: Tensor | None
    """[R, T] of each token in its rows; None where they simply count on."""
    sees: Tensor | None
    """[R, T, T] bool; None where attention is causal. No real token ever sees a pad."""
    players: list[str]
    """Of each of the R rows."""
    places: tuple[Tensor, Tensor]
    """Row and column of the hidden state that predicts each of Q different tokens."""
    targets: Tensor
    """[Q] those tokens."""
    index: Tensor
    """[B, A] which of the Q each acted token is; anything where masked."""
    mask: Tensor
    """[B, A] bool."""


def pack(rows: Sequence[Sequence[int]], acted: Sequence[Sequence[int]], players: Sequence[str]) -> Packed:
    """As trees where that leaves out at least `WORTH` of the tokens, else as they are."""
    width = max(map(len, rows))
    trees = forest(rows, players)
    tree_width = max(len(tree.tokens) for tree in trees.trees)
    if len(trees.trees) * tree_width <= (1 - WORTH) * len(rows) * width:
        tokens = [tree.tokens for tree in trees.trees]
        positions = _padded([tree.depth for tree in trees.trees], tree_width)
        sees = torch.from_numpy(trees.attention(tree_width))
        row_of, paths = trees.tree_of, trees.paths
        names = dict(zip(trees.tree_of, players, strict=True))
        players = [names[i] for i in range(len(tokens))]
    else:
        tokens, positions, sees = rows, None, None
        row_of, paths = list(range(len(rows))), [range(len(row)) for row in rows]
    index: dict[tuple[int, int, int], int] = {}
    most = max(map(len, acted))
    where = [
        [index.setdefault((row_of[i], paths[i][p - 1], rows[i][p]), len(index)) for p in acted[i]]
        + [0] * (most - len(acted[i]))
        for i in range(len(rows))
    ]
    picked = torch.tensor(list(index)).reshape(-1, 3)
    mask = torch.arange(most) < torch.tensor([len(each) for each in acted]).unsqueeze(1)
    return Packed(
        ids=_padded(tokens, max(map(len, tokens))),
        positions=positions,
        sees=sees,
        players=list(players),
        places=(picked[:, 0], picked[:, 1]),
        targets=picked[:, 2],
        index=torch.tensor(where),
        mask=mask,
    )


def _padded(rows: Sequence[Sequence[int]], width: int) -> Tensor:
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
