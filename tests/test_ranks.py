"""What ranks share and exchange; here alone, and in two processes that meet over loopback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from atp_rl import ranks
from atp_rl.model.service import StatusError
from atp_rl.types import InputError


def test_one_process_is_the_only_rank_and_nothing_is_exchanged():
    assert (ranks.rank(), ranks.world_size(), ranks.is_first(), ranks.wrapper()) == (0, 1, True, "none")
    assert ranks.share([1, 2, 3]) == [1, 2, 3]
    assert ranks.gather([1, 2]) == [1, 2]
    assert ranks.total([1.5, 2]) == [1.5, 2]
    assert ranks.any_rank(True) is True
    assert ranks.any_rank(False) is False
    assert ranks.from_first(lambda: "made") == "made"
    parameter = torch.nn.Parameter(torch.ones(2))
    ranks.sum_gradients([parameter])
    assert parameter.grad is None


@given(items=st.lists(st.integers()), world=st.integers(1, 9))
def test_shares_are_everything_once_in_order_and_as_even_as_it_goes(items, world):
    shares = []
    for rank in range(world):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ranks, "rank", lambda rank=rank: rank)
            patch.setattr(ranks, "world_size", lambda: world)
            shares.append(ranks.share(items))
    assert [item for share in shares for item in share] == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "fsdp2"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, "zero2"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "zero3"),
    ],
)
def test_the_wrapper_is_what_the_launcher_asks_for(environment, expected, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert ranks.wrapper() == expected


def test_the_stage_of_a_deepspeed_file_counts(tmp_path, monkeypatch):
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 3}}')
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "zero.json"))
    assert ranks.wrapper() == "zero3"


@pytest.mark.parametrize("promised", ["2 ddp", "1 fsdp2", "2"])
def test_a_broken_promise_of_the_launch_file_is_an_error(promised, monkeypatch):
    monkeypatch.setenv(ranks.PROMISED, promised)
    with pytest.raises(InputError, match=f"promises {promised[0]}.* but here are 1 with none"):
        ranks.join()


@pytest.mark.parametrize("promised", ["1 none", "1"])
def test_a_kept_promise_is_none(promised, monkeypatch):
    monkeypatch.setenv(ranks.PROMISED, promised)
    ranks.join()


def test_several_gpus_and_one_process_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    with pytest.raises(InputError, match="8 GPUs are visible and one process was started; use --launch"):
        ranks.join()


TWO = """
import sys
import torch
import torch.distributed as dist
from tests.test_ranks import meet_two
meet_two(int(sys.argv[1]), int(sys.argv[2]))
"""


def meet_two(rank: int, port: int) -> None:
    """What one of two processes does; any failed assertion makes it exit with 1."""
    store = dist.TCPStore("127.0.0.1", port, 2, rank == 0, timeout=timedelta(seconds=60))
    dist.init_process_group("gloo", rank=rank, world_size=2, store=store)
    assert (ranks.rank(), ranks.world_size(), ranks.is_first()) == (rank, 2, rank == 0)
    assert ranks.gather([rank, "x"]) == [0, "x", 1, "x"]
    assert ranks.gather(ranks.share("abcde")) == list("abcde")
    assert ranks.gather(ranks.share("a")) == ["a"]
    assert ranks.total([1, rank + 0.5]) == [2, 2.0]
    assert [ranks.any_rank(rank == 1), ranks.any_rank(False)] == [True, False]
    assert ranks.from_first(lambda: f"by {rank}") == "by 0"

    def fail() -> None:
        raise StatusError(503, f"rank {rank} saw it")  # it cannot be pickled and made again

    with pytest.raises(InputError, match="rank 0 saw it"):
        ranks.from_first(fail)

    def break_down() -> None:
        raise KeyError("rank 0 broke down")

    with pytest.raises(KeyError if rank == 0 else RuntimeError, match="rank 0 broke down"):
        ranks.from_first(break_down)

    both, one, none = (torch.nn.Parameter(torch.zeros(2, 2)) for _ in range(3))
    both.grad = torch.full((2, 2), 1.0 + rank)
    if rank == 1:
        one.grad = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    ranks.sum_gradients([both, one, none])
    assert both.grad.tolist() == [[3.0, 3.0], [3.0, 3.0]]
    assert one.grad is not None
    assert one.grad.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert none.grad is None  # so the optimizer leaves it alone, as it does in one process
    dist.destroy_process_group()


def test_two_processes_exchange_what_they_should():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, str(rank), str(port)],
            env=os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
