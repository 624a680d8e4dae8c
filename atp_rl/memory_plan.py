"""What `atp run --dry-run` says of GPU memory: a recipe's stages put into the formulae of `model/memory.py`."""

from __future__ import annotations

import math

import torch
from transformers import AutoConfig

from atp_rl.evolve.setup import learning_seats, lora_config, training_play
from atp_rl.model.chat import ChatFormat
from atp_rl.model.memory import (
    GIB,
    Phase,
    Shape,
    activations_bytes,
    adapters_bytes,
    decoding_bytes,
    fused_logits_bytes,
    kv_bytes,
    lines,
    logits_bytes,
    optimizer_bytes,
    shape_of,
    weights_bytes,
)
from atp_rl.model.policy import base_path, load_chat
from atp_rl.model.portions import TOKENS_AT_ONCE
from atp_rl.recipe import POPULATIONS, Recipe
from atp_rl.scenarios import make_env
from atp_rl.scenarios.suites import Suites
from atp_rl.types import InputError, Scenario

ASSUMED_GPU = 80 * GIB
"""Where there is no GPU to ask: an A100 or H100 of 80 GB."""


def memory_lines(recipe: Recipe, suites: Suites, *, ranks: int = 1, shards: int = 1) -> list[str]:
    """The table, or one line that says why there is none. Reads configuration and tokenizer from the disk alone.

    Args:
        ranks: processes that share what is played in evolution, and the rows that are learned from.
        shards: GPUs over which the base weights are spread.
    """
    model = recipe.model
    try:
        config = AutoConfig.from_pretrained(
            base_path(model.name), revision=model.revision, trust_remote_code=False, local_files_only=True
        )
        chat = load_chat(model.name, revision=model.revision, thinking=model.thinking, local_files_only=True)
    except (OSError, ValueError, InputError):
        fetch = f"`hf download {model.name} --include '*.json' '*.jinja'` fetches them"
        return [f"memory: not estimated, since configuration and tokenizer of {model.name} are not here; {fetch}"]
    try:
        shape = shape_of(config, lora_config(recipe))
    except (AttributeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        return [f"memory: not estimated, since the formulae are for decoders with gated MLPs: {reason}"]
    here = torch.cuda.is_available()
    gpu = torch.cuda.get_device_properties(0).total_memory if here else ASSUMED_GPU
    phases = [*_align(recipe, suites, shape, chat, shards), *_evolve(recipe, suites, shape, chat, ranks, shards)]
    return lines(phases, gpu, assumed=not here)


def _align(recipe: Recipe, suites: Suites, shape: Shape, chat: ChatFormat, shards: int) -> list[Phase]:
    settings, model = recipe.align, recipe.model
    unused = recipe.evolve is not None and recipe.evolve.start_from != "aligned"
    if settings is None or settings.method is None or settings.adapter or unused:
        return []
    trl, reply = settings.trl, settings.max_new_tokens
    tokens, _ = _episode(suites.align, chat, recipe.scenarios.history_window, settings.rounds, reply)
    weights = weights_bytes(shape, model.dtype, model.quantize, shards=shards)
    asked = min(recipe.evaluate.batch_size, 2 * len(suites.align))
    sample = Phase(
        "align: ask",
        {
            "base weights": weights,
            "adapters": adapters_bytes(shape, 1),
            "activations, logits": decoding_bytes(shape, model.dtype, asked, TOKENS_AT_ONCE),
            "key-value cache": kv_bytes(shape, model.dtype, asked, tokens),
        },
    )
    rows, generated = trl.get("per_device_train_batch_size", 8), 0  # transformers' default
    if settings.method == "dpo":
        rows *= 2
    if settings.method == "grpo":
        reply = trl.get("max_completion_length", 256)
        tokens += reply - settings.max_new_tokens
        steps = trl.get("steps_per_generation") or trl.get("gradient_accumulation_steps", 1)
        generated = trl.get("generation_batch_size") or rows * steps
    tokens = min(tokens, trl.get("max_length") or tokens)
    train = Phase(
        "align: train",
        {
            "base weights": weights,
            "adapters": adapters_bytes(shape, 1),
            "gradients": adapters_bytes(shape, 1),
            "optimizer": optimizer_bytes(shape, "paged_adamw_8bit" if "8bit" in str(trl.get("optim")) else "adamw"),
            "activations, logits": activations_bytes(
                shape, model.dtype, rows, tokens, checkpointing=trl.get("gradient_checkpointing", True)
            )
            + fused_logits_bytes(shape, model.dtype, rows, reply),
            "key-value cache": kv_bytes(shape, model.dtype, generated, tokens) if generated else 0,
        },
    )
    return [sample, train]


def _evolve(recipe: Recipe, suites: Suites, shape: Shape, chat: ChatFormat, ranks: int, shards: int) -> list[Phase]:
    settings, model, world, measured = recipe.evolve, recipe.model, recipe.scenarios, recipe.evaluate
    if settings is None:
        return []
    learns = settings.learner != "in_context"
    seats = len(learning_seats(suites.held_out[0], training_play(recipe)))
    live = seats if settings.learner in POPULATIONS else 1
    adapters = live + (settings.start_from != "base")  # and the anchor
    fixed = {
        "base weights": weights_bytes(shape, model.dtype, model.quantize, shards=shards),
        "adapters": adapters_bytes(shape, adapters),
    }
    trained = settings.scenarios_per_step * settings.group_size if learns else 0
    played = math.ceil(seats * max(trained, measured.samples * len(suites.held_out)) / ranks)
    most = max(world.rounds, measured.rounds or 0)
    tokens, _ = _episode([*suites.train, *suites.held_out], chat, world.history_window, most, settings.max_new_tokens)
    group = seats * (settings.group_size if learns else measured.samples)  # is played as a whole
    rows = min(max(measured.batch_size, group), played)
    play = Phase(
        "evolve: play",
        fixed
        | {
            "activations, logits": decoding_bytes(shape, model.dtype, rows, TOKENS_AT_ONCE),
            "key-value cache": kv_bytes(shape, model.dtype, rows, tokens),
        },
    )
    if not learns:
        return [play]
    tokens, acted = _episode(suites.train, chat, world.history_window, world.rounds, settings.max_new_tokens)
    own = math.ceil(trained * seats / ranks)
    rows = min(settings.micro_batch or own, own)
    update = Phase(
        "evolve: update",
        fixed
        | {
            "gradients": adapters_bytes(shape, live),
            "optimizer": optimizer_bytes(shape, settings.optimizer, live),
            "activations, logits": activations_bytes(
                shape, model.dtype, rows, tokens, checkpointing=settings.gradient_checkpointing
            )
            + logits_bytes(shape, model.dtype, rows, acted),
        },
    )
    return [play, update]


def _episode(scenarios: list[Scenario], chat: ChatFormat, window: int, rounds: int, reply: int) -> tuple[int, int]:
    """Tokens in the longest prompt with its replies, each of `reply` tokens, and those of them that were acted.

    The first prompt is that of the longest scenario; every round that stays in the history adds a reply and a question
    as long as its last message. A round with a tool has two replies and the tool's output, as long as a reply.
    """
    longest, acted = 0, 0
    shown = min(rounds - 1, window) + 1
    for scenario in scenarios:
        env = make_env(scenario, rounds=rounds, supervision="all_unsupervised", seed=0, history_window=window)
        messages = next(iter(env.observe().values()))
        prompt, question = (
            len(chat.encode_text(" ".join(m["content"] for m in part))) for part in (messages, messages[-1:])
        )
        overhead = 8 * len(messages)  # the template's marks
        replies = 2 * shown if env.runs_tools else shown
        outputs = shown * reply if env.runs_tools else 0
        longest = max(longest, prompt + overhead + (shown - 1) * (question + 8) + outputs + replies * reply)
        acted = max(acted, replies * reply)
    return longest, acted
