"""Models of random weights, made on the device: no file, no network."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen3Config, set_seed

from atp_rl.model.policy import TINY, Policy, load_chat


@dataclass(frozen=True)
class Shape:
    """A model, and how much of everything is measured with it."""

    name: str
    config: dict[str, Any]
    dtype: torch.dtype
    lora_rank: int
    rollout_batches: tuple[int, ...]
    """Conversations at once; the first is measured before all else."""
    reply_tokens: int
    step_scenarios: int
    group_size: int
    micro_batches: tuple[int, ...]
    """Rows of one forward of the step's update, tried in this order until one fits."""
    lengths: tuple[int, ...]
    """Of the sequences that are trained on."""
    train_tokens: tuple[int, ...]
    """In one forward and backward, tried in this order until one fits; never less than one sequence."""


QWEN3_8B = Shape(
    name="qwen3-8b",
    config={
        "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0}, "tie_word_embeddings": False,
    },
    dtype=torch.bfloat16,
    lora_rank=16,
    rollout_batches=(256, 512, 1024, 128, 64),
    reply_tokens=64,
    step_scenarios=64,
    group_size=8,
    micro_batches=(16, 8, 4, 2),
    lengths=(2048, 4096),
    train_tokens=(16384, 8192, 4096, 2048),
)  # fmt: skip

TINY_SHAPE = Shape(
    name="tiny",
    config={
        "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}, "tie_word_embeddings": False,
    },
    dtype=torch.float32,
    lora_rank=4,
    rollout_batches=(8, 16),
    reply_tokens=8,
    step_scenarios=2,
    group_size=2,
    micro_batches=(2,),
    lengths=(64, 128),
    train_tokens=(256, 128),
)  # fmt: skip

SHAPES = {shape.name: shape for shape in (QWEN3_8B, TINY_SHAPE)}

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_policy(shape: Shape, *, nf4: bool = False, adapters_in_float32: bool = True) -> Policy:
    """Random weights with a fresh adapter on all linear layers, as `Policy.load` would make it.

    The tokenizer is the tiny model's, whose ids all lie within the vocabulary. Random weights draw its end token about
    once in as many tokens as the vocabulary has, so replies have the full length, and are nonsense.

    Args:
        nf4: quantise the layers' weights to 4 bits, as QLoRA does; computing stays in `shape.dtype`.
        adapters_in_float32: as PEFT does by default and `Policy.load` leaves it; else in the type of the base.
    """
    set_seed(0)
    with torch.device(DEVICE):
        base = AutoModelForCausalLM.from_config(Qwen3Config(**shape.config), dtype=shape.dtype)
    base.requires_grad_(False)
    if nf4:
        quantise(base)
    lora = LoraConfig(
        r=shape.lora_rank, lora_alpha=2 * shape.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, lora, adapter_name="policy", autocast_adapter_dtype=adapters_in_float32)
    return Policy(model, load_chat(TINY), f"random weights of the shape of {shape.name}")  # pyright: ignore[reportArgumentType]


def quantise(base: Any) -> None:
    """Replace the layers' linear maps by bitsandbytes' NF4 ones with double quantisation, one after the other."""
    from bitsandbytes import nn

    typed: Any = nn

    for name, linear in list(base.model.layers.named_modules()):
        if type(linear) is not torch.nn.Linear:
            continue
        with torch.device("meta"):
            packed = typed.Linear4bit(
                linear.in_features, linear.out_features, bias=False, compute_dtype=linear.weight.dtype, quant_type="nf4"
            )
        weight = typed.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        packed.weight = weight.to(DEVICE)
        base.model.layers.set_submodule(name, packed)
    base.is_loaded_in_4bit = True  # by this PEFT knows it


def matmul_weights(policy: Policy) -> tuple[int, int]:
    """Weights that every token is multiplied by: of the base (without the embedding, which is looked up) and of the
    adapter."""
    config: Any = policy.model.config
    heads = config.head_dim * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
    layer = config.hidden_size * (heads + 3 * config.intermediate_size)
    base = config.num_hidden_layers * layer + config.hidden_size * config.vocab_size
    return base, sum(parameter.numel() for parameter in policy.trainable)


warnings.filterwarnings("ignore", message=".*use_cache=True.*gradient checkpointing.*")
