"""Forwards in which every row goes through an adapter of its own: the seats of a population in one batch.

PEFT has such batches too (`adapter_names`), but takes the rows of each adapter apart in every layer. Here each layer
stacks its adapters' weights and multiplies all rows at once (the gathered matrix product of S-LoRA, arXiv 2311.03285):
measured on the tiny model with eight adapters, one round takes a fifth less processor time (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor

BASE = "base"
"""Stands for no adapter at all."""


@contextmanager
def mixture(model: PeftModel, players: Sequence[str]) -> Iterator[None]:
    """While inside, row i of a forward goes through the adapter `players[i]` (`BASE`: the bare base).

    Gradients reach the adapters that require them. The model must be in evaluation mode: LoRA's dropout is not applied.

    Raises:
        ValueError: the adapters do not sit on linear layers, or differ in rank.
    """
    names = sorted({player for player in players if player != BASE})
    place = {name: i for i, name in enumerate(names)} | {BASE: len(names)}
    index = torch.tensor([place[player] for player in players], device=next(model.parameters()).device)
    with ExitStack() as hooks:
        for layer in model.modules():
            if not isinstance(layer, LoraLayer):
                continue
            linear = isinstance(layer, Linear) or isinstance(
                layer.get_base_layer(), torch.nn.Linear
            )  # or a quantized one
            if not linear or len({layer.r[name] for name in names}) > 1:
                raise ValueError("adapters of one batch must be LoRA of one rank on linear layers")
            if names:
                hook = _Delta(layer, names, index, BASE in players)
                hooks.callback(layer.base_layer.register_forward_hook(hook).remove)
            # PEFT adds nothing, the hooks all; its own switch walks the whole model, which takes as long as a forward
            hooks.callback(setattr, layer, "_disable_adapters", layer.disable_adapters)
            layer._disable_adapters = True
        yield


class _Delta:
    """A hook that adds to what a base layer gives what each row's adapter gives."""

    def __init__(self, layer: LoraLayer, names: Sequence[str], index: Tensor, base: bool) -> None:
        down: list[Tensor] = [layer.lora_A[name].weight for name in names]  # type: ignore[assignment]  # [r, in]
        up: list[Tensor] = [layer.lora_B[name].weight * layer.scaling[name] for name in names]  # [out, r]
        if base:
            down, up = [*down, torch.zeros_like(down[0])], [*up, torch.zeros_like(up[0])]
        self.down = torch.stack(down)[index].transpose(1, 2)  # [B, in, r]
        self.up = torch.stack(up)[index].transpose(1, 2)  # [B, r, out]

    def __call__(self, module: torch.nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        return output + (x.to(self.down.dtype) @ self.down @ self.up).to(output.dtype)
