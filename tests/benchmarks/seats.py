"""Eight seats: one model with eight adapters against the paper's way, a copy of the model for every seat.

`python -m tests.benchmarks.seats one|adapters|copies` prints the peak memory of a process that plays so.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen3Config

from atp_rl.model.policy import TINY, Policy
from atp_rl.model.sampler import HFSampler
from atp_rl.rollout import Play, rollout
from atp_rl.scenarios import load
from atp_rl.types import Chat, Completion, SamplingParams
from tests.benchmarks.generate import GenerateSampler

SEATS = tuple(f"seat_{i}" for i in range(1, 9))
LORA = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
PLAY = Play(
    rounds=1, supervision="all_unsupervised", history_window=3, sampling=SamplingParams(max_new_tokens=16),
    population=True,
)  # fmt: skip


class CopiesSampler:
    """A model of its own for every seat, one conversation at a time."""

    version = 0

    def __init__(self, policies: dict[str, Policy]) -> None:
        self.samplers = {seat: GenerateSampler(policy) for seat, policy in policies.items()}
        self.chat = next(iter(policies.values())).chat

    def generate(self, chats: list[Chat], params: SamplingParams) -> list[Completion]:
        return [self.samplers[chat.player].generate([chat], params)[0] for chat in chats]

    def score(self, chats: list[Chat]) -> list[tuple[float, ...]]:
        raise NotImplementedError


def games() -> list[Any]:
    """Seven games, as in the paper."""
    return load({"testbed": "collusion", "split": "train", "per_family": 1, "n": 8})[:7]


def eight_adapters() -> Policy:
    return Policy.load(TINY, lora=LORA, seed=0, seats=SEATS)


def eight_copies() -> dict[str, Policy]:
    return {seat: Policy.load(TINY, lora=LORA, seed=0) for seat in SEATS}


def play(sampler: Any, *, population: bool = True) -> tuple[int, int, int]:
    """Decisions, tokens, invalid decisions of one round of all games."""
    played = rollout(games(), sampler, replace(PLAY, population=population), group_size=1, seed=(0,))
    turns = [turn for episode in played.episodes for turn in episode.turns]
    return len(turns), played.tokens, sum(turn.outcome.verdict == "invalid" for turn in turns)


def memory() -> list[dict[str, Any]]:
    """Peak memory of processes that play one seat, eight adapters and eight copies; and the same for 8B weights."""
    peaks = {}
    for way in ("one", "adapters", "copies"):
        command = [sys.executable, "-m", "tests.benchmarks.seats", way]
        peaks[way] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    base, adapter = qwen3_8b_bytes()
    weights = {"one": base + adapter, "adapters": base + 8 * adapter, "copies": 8 * (base + adapter)}
    names = {"one": "one seat", "adapters": "eight seats, eight adapters", "copies": "eight copies of the model"}
    return [
        {"what": what, "way": names[way], "megabytes": used[way] / 1e6, "times_one_seat": used[way] / used["one"]}
        for what, used in (
            ("peak memory of a process, tiny model", peaks),
            ("weights of Qwen3-8B's shape in bf16, LoRA r 8 (computed)", weights),
        )
        for way in names
    ]


def qwen3_8b_bytes() -> tuple[int, int]:
    """Bytes of the base and of one adapter (float32, as PEFT keeps it); nothing is allocated."""
    config = Qwen3Config(
        vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = get_peft_model(AutoModelForCausalLM.from_config(config), LORA)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    adapter = sum(size for name, size in sizes.items() if "lora_" in name)
    return 2 * (sum(sizes.values()) - adapter), 4 * adapter


def main(way: str) -> None:
    if way == "one":
        play(_AnySeat(HFSampler(Policy.load(TINY, lora=LORA, seed=0))))
    elif way == "adapters":
        play(HFSampler(eight_adapters()))
    else:
        play(CopiesSampler(eight_copies()))
    status = Path("/proc/self/status").read_text()  # getrusage would report the parent's peak after a fork
    print(1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]))


class _AnySeat:
    """One adapter that answers for the first seat alone; the others say nothing."""

    version = 0

    def __init__(self, sampler: HFSampler) -> None:
        self.sampler, self.chat = sampler, sampler.chat

    def generate(self, chats: list[Chat], params: SamplingParams) -> list[Completion]:
        first = [Chat(c.messages, c.prompt_ids, c.options, c.seed) for c in chats if c.player == SEATS[0]]
        replies = iter(self.sampler.generate(first, params))
        silent = Completion("", (self.chat.eos_id,), (0.0,), "stop")
        return [next(replies) if c.player == SEATS[0] else silent for c in chats]

    def score(self, chats: list[Chat]) -> list[tuple[float, ...]]:
        raise NotImplementedError


if __name__ == "__main__":
    main(sys.argv[1])
