"""The state of an AdamW as plain tensors, so that it is saved as safetensors: pickles are never written or read."""

from __future__ import annotations

import torch
from torch import Tensor


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """`optimizer.<parameter index>.<name>` -> a copy of the tensor, for every tensor of the optimizer's state.

    Copies, because AdamW updates its tensors in place: what a rolled-back step returns to must not have moved with it.
    """
    state = optimizer.state_dict()["state"]
    return {
        f"optimizer.{i}.{name}": value.detach().clone(memory_format=torch.contiguous_format)
        for i, entry in state.items()
        for name, value in entry.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put saved state back; the optimizer's options (learning rate, ...) stay as they were built."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        kind, _, rest = key.partition(".")
        if kind == "optimizer":
            index, _, name = rest.partition(".")
            state.setdefault(int(index), {})[name] = value.clone()  # the optimizer keeps it, and updates it in place
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
