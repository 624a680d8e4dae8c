"""How much GPU memory a model, its adapters and their training take, from the model's configuration alone.

Bytes per GPU. Pure functions; each says its formula. H hidden size, F width of the MLP, L layers, N heads, K key-value
heads, D their dimension, V vocabulary, T tokens, B rows, c bytes of the compute type (2 in bfloat16).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from atp_rl.model.optimizer_state import OptimizerName
from atp_rl.model.policy import Quantize
from atp_rl.model.token_logprobs import CHUNK

GIB = 1 << 30
BYTES = {"float32": 4, "bfloat16": 2}
ADAPTER_BYTES = 4
"""PEFT keeps adapters in single precision, whatever the type of the base."""

FUSED_TOKENS, FUSED_VOCABULARY = 4096, 32768
"""The tile of logits that TRL's fused head has at once."""


@dataclass(frozen=True)
class Shape:
    """What the formulae need to know of a model with LoRA adapters."""

    linears: tuple[int, ...]
    """Numbers in each weight that NF4 quantizes: the linear layers, without the last."""
    others: int
    """Numbers in the other weights: embeddings, norms, the last layer (once, where it is that of the embeddings)."""
    adapter: tuple[int, ...]
    """Numbers in each weight of one adapter."""
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    qk_norm: bool
    """Whether queries and keys are normalised (Qwen3)."""


def shape_of(config: Any, lora: LoraConfig) -> Shape:
    """Build the model on the meta device, where weights have shapes and take nothing, and count."""
    lora = copy.deepcopy(lora)  # PEFT writes into it
    lora.base_model_name_or_path = None
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        head = base.get_output_embeddings()
        linears = [m.weight for m in base.modules() if isinstance(m, torch.nn.Linear) and m is not head]
        others = sum(p.numel() for p in base.parameters()) - sum(w.numel() for w in linears)
        qk_norm = any(name.endswith("q_norm") for name, _ in base.named_modules())
        model = get_peft_model(base, lora)
    return Shape(
        linears=tuple(w.numel() for w in linears),
        others=others,
        adapter=tuple(p.numel() for p in model.parameters() if p.requires_grad),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        ffn=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocab=config.vocab_size,
        qk_norm=qk_norm,
    )


def nf4_bytes(numbers: int) -> int:
    """Of one doubly quantized weight of n numbers.

    Half a byte each; a byte of scale per 64; a float32 scale of those per 256; and the two code books (16 and 256
    float32) and an offset, which each weight has of its own: n/2 + n/64 + 4 n/16384 + 1092, about 0.516 n.
    """
    blocks = math.ceil(numbers / 64)
    return math.ceil(numbers / 2) + blocks + 4 * math.ceil(blocks / 256) + 4 * (16 + 256 + 1)


def weights_bytes(shape: Shape, dtype: str, quantize: Quantize | None = None, *, shards: int = 1) -> int:
    """Of the frozen base: c per number, or NF4 for the linear layers and c per other number.

    With FSDP2 or ZeRO-3 over `shards` GPUs each holds its share, and while it computes, all of two layers (the one at
    work and the next, gathered ahead) and of what is in no layer.
    """
    size = BYTES[dtype]
    linears = sum(map(nf4_bytes, shape.linears)) if quantize else size * sum(shape.linears)
    total = linears + size * shape.others
    if shards == 1:
        return total
    return min(total, math.ceil(total / shards) + 2 * linears // shape.layers + size * shape.others)


def adapters_bytes(shape: Shape, count: int, *, shards: int = 1) -> int:
    """Of `count` adapters: 4 per number. The gradients of the live ones take as much again."""
    return math.ceil(count * ADAPTER_BYTES * sum(shape.adapter) / shards)


def optimizer_bytes(shape: Shape, name: OptimizerName, count: int = 1, *, shards: int = 1) -> int:
    """Of the state for `count` live adapters.

    AdamW: two float32 per number. 8-bit: two bytes per number and two float32 per 256 for weights of 4096 numbers or
    more, else as AdamW; and two code books of 256 float32, once.
    """
    if name == "adamw":
        return math.ceil(8 * count * sum(shape.adapter) / shards)
    one = sum(8 * n if n < 4096 else 2 * n + 8 * math.ceil(n / 256) for n in shape.adapter)
    books = 2 * 256 * 4 if any(n >= 4096 for n in shape.adapter) else 0
    return math.ceil(count * one / shards) + books


def activations_bytes(shape: Shape, dtype: str, rows: int, tokens: int, *, checkpointing: bool) -> int:
    """Of what a forward keeps for its backward pass, for LoRA on all linear layers with memory-efficient attention.

    A token in a layer: 8 H for the two norms, which keep their input in float32; 4 (5 H + N D + F) for the inputs of
    the seven adapters, each cast to float32 (with c = 4: (2 H + N D + F), since those with one input share it);
    2c (N + K) D for attention's inputs and output; 4 (N + K) D for the norms of queries and keys, where there are
    some; 3 c F for the MLP's product. With checkpointing: c H a layer, and one layer as above while it is computed
    again.
    """
    c, h, f = BYTES[dtype], shape.hidden, shape.ffn
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    adapters = 4 * ((5 if c == 2 else 2) * h + queries + f)
    attention = 2 * c * (queries + keys) + (4 * (queries + keys) if shape.qk_norm else 0)
    layer = 8 * h + adapters + attention + 3 * c * f
    per_token = c * h * shape.layers + layer if checkpointing else layer * shape.layers
    return rows * tokens * per_token


def logits_bytes(shape: Shape, dtype: str, rows: int, acted: int) -> int:
    """Of an update of the evolution loop, whose rows acted `acted` tokens each.

    2 c V a token: the logits and their gradients. And five float32 tensors of at most `token_logprobs.CHUNK` logits.
    """
    numbers = rows * acted * shape.vocab
    return 2 * BYTES[dtype] * numbers + 5 * 4 * min(numbers, CHUNK)


def fused_logits_bytes(shape: Shape, dtype: str, rows: int, acted: int) -> int:
    """Of TRL's trainers, which never hold all logits: a tile of them, c each, and (c + 4) H a token: hidden states and
    their gradient in float32."""
    tokens = rows * acted
    tile = min(tokens, FUSED_TOKENS) * min(shape.vocab, FUSED_VOCABULARY)
    return BYTES[dtype] * tile + (BYTES[dtype] + 4) * tokens * shape.hidden


def kv_bytes(shape: Shape, dtype: str, rows: int, tokens: int) -> int:
    """Of the sampler's cache: 2 L K D c for each place of each row; `tokens` and one for pads, in steps of 128."""
    places = tokens + 1 + -(tokens + 1) % 128
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * BYTES[dtype] * rows * places


def decoding_bytes(shape: Shape, dtype: str, rows: int, tokens_at_once: int) -> int:
    """Of one step of the sampler: logits of each row (c), three float32 and two float64 tensors of them; and what one
    layer makes of the `tokens_at_once` that are read in one forward, c (4 H + 3 F) each."""
    c = BYTES[dtype]
    drawing = rows * shape.vocab * (c + 3 * 4 + 2 * 8)
    return max(drawing, tokens_at_once * c * (4 * shape.hidden + 3 * shape.ffn))


@dataclass(frozen=True)
class Phase:
    """What is in memory at once, by name."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def lines(phases: Sequence[Phase], gpu: int, assumed: bool) -> list[str]:
    """A table of the phases in GiB, and a warning for each that is larger than the GPU (`gpu` bytes)."""
    names = list(dict.fromkeys(part for phase in phases for part in phase.parts))
    width = max(map(len, (*names, "sum")))
    columns = [max(10, len(phase.name)) for phase in phases]

    def row(label: str, values: Sequence[str]) -> str:
        return "  ".join([f"{label:{width}}", *(f"{v:>{w}}" for v, w in zip(values, columns, strict=True))])

    def gib(value: int) -> str:
        return f"{value / GIB:.2f}" if value else "-"

    whose = "assumed, since there is none here" if assumed else "the one here"
    return [
        "memory on one GPU, GiB, estimated (without CUDA's own, fragmentation, and copies while the cache grows):",
        row("", [phase.name for phase in phases]),
        *(row(name, [gib(phase.parts.get(name, 0)) for phase in phases]) for name in names),
        row("sum", [gib(phase.total) for phase in phases]),
        *(
            f"WARNING: {phase.name} needs {phase.total / GIB:.1f} GiB and a GPU has {gpu / GIB:.0f} ({whose})"
            for phase in phases
            if phase.total > gpu
        ),
        *([f"a GPU of {gpu / GIB:.0f} GiB is {whose}"] if assumed else []),
    ]
