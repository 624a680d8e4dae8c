"""FSDP2: the base weights in shards over the ranks, the adapters whole on every rank.

A forward then gathers each layer from all ranks, so all of them must make equally many, although each plays other
episodes and needs more or fewer. So every forward announces itself, and a rank that has come to where all meet takes
part in the others' forwards, with one token of its own, until they are there too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from atp_rl import ranks


def shard(model: PeftModel) -> None:
    """Spread the base weights of a model over the ranks, in place: a layer at a time, then what is left.

    The model comes from main memory, and no GPU ever holds more than its shards and a layer.
    """
    base: Any = model.get_base_model()
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    adapters = {parameter for name, parameter in model.named_parameters() if "lora_" in name}
    settings = {"mesh": init_device_mesh(device.type, (ranks.world_size(),)), "ignored_params": adapters}
    for layer in [module for module in base.modules() if type(module).__name__ in base._no_split_modules]:
        fully_shard(layer, **settings)
    fully_shard(base, **settings)
    whole = [name for name, p in model.named_parameters() if p not in adapters and not isinstance(p, DTensor)]
    if whole:
        raise RuntimeError(f"FSDP2 left base weights whole: {whole[:3]}")
    for parameter in adapters:
        parameter.data = parameter.data.to(device)  # the shards are there already
    _Lockstep(base, device)


class _Lockstep:
    """Keeps the ranks' forwards together."""

    def __init__(self, base: torch.nn.Module, device: torch.device) -> None:
        self.base, self.device, self.waiting = base, device, False
        base.register_forward_pre_hook(lambda *_: self._announce())
        ranks.before_meeting(self._wait)

    def _announce(self) -> None:
        if not self.waiting:
            dist.all_reduce(torch.ones(1, device=self.device))

    def _wait(self) -> None:
        """Take part in forwards until no rank announces one."""
        self.waiting = True
        token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        try:
            while self._others_go_on():
                with torch.no_grad():
                    self.base(input_ids=token, use_cache=False)
        finally:
            self.waiting = False

    def _others_go_on(self) -> bool:
        announced = torch.zeros(1, device=self.device)
        dist.all_reduce(announced)
        return announced.item() > 0
