"""The processes ("ranks") that run one recipe together, each on a device of its own.

`torchrun` or `accelerate launch` starts them; alone, a process is the only rank and everything here does nothing. Each
rank plays whole groups of episodes. Then all ranks are told all episodes, so what is computed of them (rewards,
advantages, measures, what a defense sees) is the same everywhere, and the gradient of a step is the sum over the rows
that each rank put through the model. Only the first rank writes files.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

from atp_rl.types import InputError

T = TypeVar("T")
R = TypeVar("R")
Wrapper = Literal["none", "ddp", "fsdp2", "zero2", "zero3"]
"""How the base weights are spread: whole on every rank (ddp, zero2), or in shards."""

PROMISED = "ATP_RL_PROMISED"
"""Environment variable that says what whoever launched the ranks has promised: `<ranks>` or `<ranks> <wrapper>`."""

PATIENCE = timedelta(hours=3)
"""How long a rank waits for another one: a long evaluation is no failure."""


def join() -> None:
    """Take part in the process group that the launcher has prepared, if there is one.

    Raises:
        InputError: there are other processes, or another wrapper, than were promised; several GPUs are
            visible and a single process would leave all but one idle.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several and not dist.is_initialized():
        from accelerate import PartialState  # slow to import

        PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    if promised := os.environ.get(PROMISED):
        count, _, kind = promised.partition(" ")
        if (world_size(), wrapper()) != (int(count), kind or wrapper()):
            raise InputError(
                f"the launch promises {promised.replace(' ', ' process(es) with ')}, but here are {world_size()} with "
                f"{wrapper()}; on CPUs start them with torchrun (launch/cpu_2proc.sh), since accelerate starts only one"
            )
    elif not several and "MASTER_ADDR" in os.environ and "ACCELERATE_MIXED_PRECISION" in os.environ:
        # accelerate prepared an address where ranks meet, and then started one process: what it does with --cpu
        raise InputError(
            "accelerate was asked for several processes and started one; on CPUs use torchrun (launch/cpu_2proc.sh)"
        )
    if not several and torch.cuda.device_count() > 1:
        raise InputError(
            f"{torch.cuda.device_count()} GPUs are visible and one process was started; use --launch "
            "launch/accelerate/ddp.yaml, or choose one GPU with CUDA_VISIBLE_DEVICES=0"
        )


def wrapper() -> Wrapper:
    """What the launcher's environment asks for."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        environment = os.environ.get
        return zero(environment("ACCELERATE_DEEPSPEED_ZERO_STAGE"), environment("ACCELERATE_DEEPSPEED_CONFIG_FILE"))
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        return "fsdp2"
    return "ddp" if world_size() > 1 else "none"


def zero(stage: object, file: str | None) -> Wrapper:
    """DeepSpeed's stage as a wrapper: that of its own configuration file, where there is one."""
    if file:
        stage = json.loads(Path(file).read_text("utf-8"))["zero_optimization"]["stage"]
    return "zero3" if str(stage) == "3" else "zero2"


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the rank that writes and speaks."""
    return rank() == 0


def share(items: Sequence[T]) -> Sequence[T]:
    """This rank's part: consecutive items, as evenly as it goes."""
    count, at, of = len(items), rank(), world_size()
    return items[count * at // of : count * (at + 1) // of]


def own_rows(rows: Sequence[T]) -> list[tuple[T, bool]]:
    """The rows that this rank puts through the model, each with True; all ranks get equally many.

    Under FSDP a forward needs all ranks, so one that would come out short gets a row more, with False: it counts
    nothing.
    """
    most = -(-len(rows) // world_size())
    own = share(rows)  # neighbours, which share their beginnings
    return [(row, True) for row in own] + [(row, False) for row in rows[:1]] * (most - len(own))


_before_meeting: list[weakref.WeakMethod[Callable[[], None]]] = []


def before_meeting(wait: Callable[[], None]) -> None:
    """Have this method called, on every rank, before each exchange between them, as long as its object is there."""
    _before_meeting[:] = [weakref.WeakMethod(wait)]


def _meet() -> None:
    for method in _before_meeting:
        if wait := method():
            wait()


def gather(items: Sequence[T]) -> list[T]:
    """Every rank's items in the order of the ranks: the reverse of `share`."""
    if world_size() == 1:
        return list(items)
    _meet()
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, list(items))
    return [item for part in parts for item in part]


def in_batches(ask: Callable[[Sequence[T]], Sequence[R]], items: Sequence[T], most: int | None) -> list[R]:
    """What `ask` answers to all items, in order: each rank asks about its share, at most so many of them at once."""
    own = share(items)
    size = most or max(1, len(own))
    return gather([answer for i in range(0, len(own), size) for answer in ask(own[i : i + size])])


def any_rank(flag: bool) -> bool:
    """Whether it is true on some rank; all ranks must ask."""
    return any(gather([flag]))


def total(values: Sequence[float]) -> list[float]:
    """Element by element the sum over the ranks."""
    parts = gather([list(values)])
    return [sum(column) for column in zip(*parts, strict=True)]


def from_first(make: Callable[[], T]) -> T:
    """What `make` returns on the first rank; its error, if it raises one, is raised on all of them."""
    if world_size() == 1:
        return make()
    _meet()
    box: list[Any] = [None, None, None]
    failure: Exception | None = None
    if is_first():
        try:
            box[0] = make()
        except Exception as error:
            failure, box[1], box[2] = error, isinstance(error, InputError), str(error)  # not all errors can be sent
    dist.broadcast_object_list(box)
    made, bad_input, message = box
    if failure is not None:
        raise failure
    if message is not None:
        raise InputError(message) if bad_input else RuntimeError(message)
    return made


def sum_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Add up every parameter's gradient over the ranks; one that no rank has a gradient for keeps none."""
    if world_size() == 1:
        return
    _meet()
    has = [parameter.grad is not None for parameter in parameters]
    flat = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    found = torch.tensor(has, dtype=torch.float32, device=flat[0].device)
    sums = torch.cat([found, *(gradient.float().flatten() for gradient in flat)])
    dist.all_reduce(sums)
    found, *gradients = sums.split([len(has), *(g.numel() for g in flat)])
    for parameter, any_has, gradient in zip(parameters, found.tolist(), gradients, strict=True):
        if any_has:
            parameter.grad = gradient.view_as(parameter).to(parameter.dtype)
