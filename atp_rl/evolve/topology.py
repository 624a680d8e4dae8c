"""Who sees whom in a population: graphs over the seats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import networkx as nx

from atp_rl.scenarios import random_stream

Topology = Literal["all", "ring", "random"]


def neighbours(topology: Topology, seats: Sequence[str], *, degree: float, seed: int) -> dict[str, list[str]]:
    """The other seats that each seat may copy.

    Args:
        topology: everybody; the two beside one on a ring; or an undirected random graph (Erdos-Renyi) in which each
            pair is joined with the same probability.
        degree: mean number of neighbours in the random graph, at most one less than there are seats.
        seed: of the random graph.
    """
    n = len(seats)
    if topology == "all":
        graph = nx.complete_graph(n)
    elif topology == "ring":
        graph = nx.cycle_graph(n)
    else:
        graph = nx.gnp_random_graph(n, min(1.0, degree / (n - 1)), seed=random_stream(seed, "topology"))
    around: dict[int, list[int]] = {i: sorted(graph.neighbors(i)) for i in range(n)}
    return {seat: [seats[j] for j in around[i]] for i, seat in enumerate(seats)}
