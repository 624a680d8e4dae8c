"""Rows packed as trees: every token sees what it saw in its row, and what comes out is the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atp_rl.model import prefix_trees
from atp_rl.model.policy import Policy
from atp_rl.model.prefix_trees import forest, pack
from tests.small_model import lora, make_policy, nudge

ROWS = [(1, 2, 3, 4), (1, 2, 3, 5, 6), (1, 2, 3, 4), (9, 8, 7), (1, 2, 3, 5)]


def test_rows_that_share_half_of_their_tokens_make_one_tree():
    trees, tree_of, paths = forest(ROWS, ["policy"] * 5)
    assert [tree.tokens for tree in trees] == [[1, 2, 3, 4, 5, 6], [9, 8, 7]]
    assert [tree.depth for tree in trees] == [[0, 1, 2, 3, 3, 4], [0, 1, 2]]
    assert tree_of == [0, 0, 0, 1, 0]
    assert paths == [[0, 1, 2, 3], [0, 1, 2, 4, 5], [0, 1, 2, 3], [0, 1, 2], [0, 1, 2, 4]]
    sees = forest(ROWS, ["policy"] * 5).attention(6)
    assert sees[0].astype(int).tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 0, 1, 0],
        [1, 1, 1, 0, 1, 1],
    ]
    assert sees[1].astype(int).tolist()[3:] == [[0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1]]  # pads


def test_rows_of_two_adapters_share_nothing():
    trees, tree_of, _ = forest([(1, 2, 3), (1, 2, 3)], ["seat_1", "seat_2"])
    assert [tree.tokens for tree in trees] == [[1, 2, 3], [1, 2, 3]]
    assert tree_of == [0, 1]


@given(
    rows=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8).map(tuple), min_size=1, max_size=12),
    data=st.data(),
)
def test_every_path_is_its_row_and_every_node_sees_the_path_to_it(rows, data):
    players = data.draw(st.lists(st.sampled_from(["a", "b"]), min_size=len(rows), max_size=len(rows)))
    found = forest(rows, players)
    width = max(len(tree.tokens) for tree in found.trees)
    sees = found.attention(width)
    for row, player, tree, path in zip(rows, players, found.tree_of, found.paths, strict=True):
        assert tuple(found.trees[tree].tokens[node] for node in path) == row
        for position, node in enumerate(path):
            assert np.flatnonzero(sees[tree, node]).tolist() == path[: position + 1]
            assert found.trees[tree].depth[node] == position
        others = {p for p, t in zip(players, found.tree_of, strict=True) if t == tree}
        assert others == {player}
    for number, tree in enumerate(found.trees):  # each beginning is there once
        own = {row[:n] for row, t in zip(rows, found.tree_of, strict=True) if t == number for n in range(1, 9)}
        assert len(tree.tokens) == len(own)


def episodes() -> tuple[list[tuple[int, ...]], list[list[int]]]:
    """Five groups of four rows of three rounds, as training has them."""
    random = np.random.default_rng(0)
    rows, acted = [], []
    for _ in range(5):
        prompt = tuple(random.integers(5, 400, 40).tolist())
        for _ in range(4):
            row, positions = prompt, []
            for _ in range(3):
                answer = ((7, 8, 9, 2), (7, 8, 10, 11, 2))[random.integers(2)]
                positions += range(len(row), len(row) + len(answer))
                row = (*row, *answer, 5, 6, 7, 12)
            rows.append(row)
            acted.append(positions)
    return rows, acted


@pytest.mark.parametrize("players", ["policy", "aligned", ["s0", "s1"]])
def test_trees_change_neither_values_nor_gradients(players, monkeypatch):
    seats = ("s0", "s1") if isinstance(players, list) else ("policy",)
    policy = make_policy() if seats == ("policy",) else Policy.load("tiny", lora=lora(), seed=0, seats=seats)
    nudge(policy, 0.05, seed=1)
    rows, acted = episodes()
    names = [players[i % 2] for i in range(len(rows))] if isinstance(players, list) else players

    def result(worth: float):
        monkeypatch.setattr(prefix_trees, "WORTH", worth)
        tokens = policy.acted_tokens(rows, acted, players=names, temperature=0.7)
        if tokens.logprobs.requires_grad:
            policy.model.zero_grad()
            (tokens.logprobs * torch.linspace(0, 1, tokens.logprobs.shape[1])).sum().backward()
        gradients = [p.grad.clone() for p in policy.trainable if p.grad is not None]
        return tokens, gradients, policy.acted_distribution(rows, acted, names)

    plain, plain_gradients, plain_all = result(worth=2.0)
    trees, trees_gradients, trees_all = result(worth=0.0)
    assert len(pack(rows, acted, [names] * 20 if isinstance(names, str) else names).ids) <= 10  # of 20 rows
    torch.testing.assert_close(trees.logprobs, plain.logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(trees.entropy, plain.entropy, rtol=1e-5, atol=1e-5)
    assert torch.equal(trees.mask, plain.mask)
    torch.testing.assert_close(trees_all[0][plain.mask], plain_all[0][plain.mask], rtol=1e-4, atol=1e-4)
    assert bool(plain_gradients) == (players != "aligned")
    for ours, theirs in zip(trees_gradients, plain_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_rows_that_share_nothing_stay_rows_without_a_mask():
    packed = pack([(1, 2, 3), (4, 5)], [(1, 2), (1,)], ["policy"] * 2)
    assert packed.ids.tolist() == [[1, 2, 3], [4, 5, 0]]
    assert packed.sees is None
    assert packed.positions is None
    assert [place.tolist() for place in packed.places] == [[0, 0, 1], [0, 1, 0]]
    assert packed.targets.tolist() == [2, 3, 5]
    assert packed.index.tolist() == [[0, 1], [2, 0]]
    assert packed.mask.tolist() == [[True, True], [True, False]]


def test_one_long_beginning_does_not_chain_all_rows_into_one_tree():
    rows = [(*range(100), *range(1000 + 90 * i, 1090 + 90 * i)) for i in range(30)]  # 190 tokens, of which 100 shared
    trees, tree_of, paths = forest(rows, ["policy"] * 30)
    assert max(len(tree.tokens) for tree in trees) <= prefix_trees.MOST * 190
    assert len(trees) == 5
    assert [tuple(trees[t].tokens[n] for n in path) for t, path in zip(tree_of, paths, strict=True)] == rows
