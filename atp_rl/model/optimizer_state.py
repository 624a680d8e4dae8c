"""The optimizers of the evolution loop, and their state as plain tensors: pickles are never written or read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

OptimizerName = Literal["adamw", "paged_adamw_8bit"]

_WRAPPED = "__bnb_optimizer_quant_state__"
"""Under this key bitsandbytes 0.50 hides its quantized state from FSDP."""


def make_optimizer(
    name: OptimizerName, parameters: Iterable[torch.nn.Parameter], *, learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """torch's AdamW, or bitsandbytes' paged 8-bit one with the same betas and epsilon.

    bitsandbytes quantizes the state of tensors of 4096 numbers or more. It pages on a GPU alone, and not what a resume
    has restored.
    """
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    from bitsandbytes.optim import PagedAdamW8bit

    return PagedAdamW8bit(parameters, lr=learning_rate, weight_decay=weight_decay)  # type: ignore[arg-type]


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """`optimizer.<parameter index>.<name>` -> a copy of the tensor, for all of the optimizer's state.

    Plain integers become tensors of int64. Copies, because AdamW updates its tensors in place: what a rolled-back step
    returns to must not have moved with it.
    """
    state = optimizer.state_dict()["state"]
    return {
        f"optimizer.{i}.{name}": torch.tensor(value)
        if isinstance(value, int)
        else value.detach().clone(memory_format=torch.contiguous_format)
        for i, entry in state.items()
        for name, value in _flat(entry)
    }


def _flat(entry: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in entry.items():
        if name == _WRAPPED:
            yield from value.items()
        else:
            yield name, value


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put saved state back; the optimizer's options (learning rate, ...) stay as they were built."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        kind, _, rest = key.partition(".")
        if kind == "optimizer":
            index, _, name = rest.partition(".")
            # bitsandbytes counts in plain integers, torch in float32; what is kept is updated in place
            state.setdefault(int(index), {})[name] = int(value) if value.dtype == torch.int64 else value.clone()
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
