"""The tiny models: Qwen3-architecture language models of a quarter of a million weights, made from scratch.

They are model organisms: one reads rule and pay of the shipped role-play texts and answers in their format, the other
adds two numbers, in its head or with the tool, so that the whole pipeline runs in minutes on two CPU cores, through the
same code as an 8B model. `atp tiny build` makes them in three phases, each of which the next one needs:

1. *copy*: random segments that repeat, from which attention learns to copy; for tool use, bare sums and calls instead,
2. *decided*: single rounds in which it is told to comply or to take the best paid, so that reading decides the answer,
3. *mixed*: also told nothing (a coin), several rounds, histories that went another way.

The loss is that of the answers plus a tenth of that of the prompts. What the results can do is in their cards,
`tiny_weights/README.md` and `tiny_tools/README.md`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from atp_rl.model import tiny_tool_transcripts, tiny_transcripts
from atp_rl.model.chat import ChatFormat
from atp_rl.model.optimizer_state import optimizer_tensors, restore_optimizer
from atp_rl.scenarios import random_stream
from atp_rl.types import InputError

WEIGHTS = Path(__file__).parent / "tiny_weights"
"""The built model for role play that ships with the package, in the layout of `save_pretrained`."""

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{- '<|im_start|>assistant\\n' -}}
{%- generation -%}{{- message.content + '<|im_end|>' -}}{%- endgeneration -%}
{{- '\\n' -}}
{%- else -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


@dataclass(frozen=True)
class BuildPlan:
    """How a tiny model is made."""

    testbed: Literal["role_play", "tool_use"] = "role_play"
    seed: int = 0
    vocabulary: int = 1024
    hidden: int = 64
    layers: int = 3
    copy_steps: int = 900
    decided_steps: int = 1000
    mixed_steps: int = 1400
    batch: int = 48
    learning_rate: float = 3e-3
    prompt_weight: float = 0.1

    @property
    def steps(self) -> int:
        return self.copy_steps + self.decided_steps + self.mixed_steps


PLANS: dict[str, BuildPlan] = {
    "role_play": BuildPlan(),
    "tool_use": BuildPlan(
        testbed="tool_use", vocabulary=640, batch=40, copy_steps=1000, decided_steps=500, mixed_steps=700
    ),
}
"""Of the models that ship."""


def make_tokenizer(plan: BuildPlan) -> PreTrainedTokenizerFast:
    """A byte-level BPE (any text has tokens) learned on the training families' texts alone; digits stand alone."""
    texts = _transcripts(plan).texts(plan.seed)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=plan.vocabulary,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _transcripts(plan: BuildPlan) -> Any:
    return {"role_play": tiny_transcripts, "tool_use": tiny_tool_transcripts}[plan.testbed]


def make_model(plan: BuildPlan, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    torch.manual_seed(plan.seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=plan.hidden,
        intermediate_size=3 * plan.hidden,
        num_hidden_layers=plan.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        initializer_range=0.06,
        eos_token_id=tokenizer.vocab["<|im_end|>"],
        pad_token_id=tokenizer.vocab["<|endoftext|>"],
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config).float()


def build(
    out: Path,
    plan: BuildPlan,
    *,
    save_every: int = 200,
    report: Callable[[int, str, float], None] = lambda step, phase, loss: None,
) -> None:
    """Make a tiny model in `out`; an interrupted build continues from its last saved step with the same result.

    Raises:
        InputError: if `out` holds a build of another plan, or anything else.
    """
    state_file, plan_file = out / "build_state.safetensors", out / "build.json"
    if plan_file.exists():
        record = json.loads(plan_file.read_text())
        if BuildPlan(**record["plan"]) != plan:
            raise InputError(f"{out}: holds a build of another plan; choose another folder")
    elif out.exists() and any(out.iterdir()):
        raise InputError(f"{out}: is not empty and no build to continue; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(plan)
    chat, model = ChatFormat(tokenizer), make_model(plan, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    start, seconds = 0, 0.0
    if plan_file.exists():
        record = json.loads(plan_file.read_text())
        start, seconds = record["step"], record["seconds"]
        if start == plan.steps:
            return
        saved = load_file(state_file)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(saved[f"model.{name}"])
        restore_optimizer(optimizer, saved)
    model.train()
    for step in range(start, plan.steps):
        begun = time.perf_counter()
        phase = _phase(plan, step)
        ids, weights = _batch(plan, step, phase, chat)
        lr = plan.learning_rate * _schedule(step, plan.steps)
        for parameters in optimizer.param_groups:
            parameters["lr"] = lr
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        weights, targets = weights[:, 1:], ids[:, 1:]
        logits = model.lm_head(hidden[weights > 0])  # the vocabulary costs more than the layers: only where it counts
        losses = torch.nn.functional.cross_entropy(logits, targets[weights > 0], reduction="none")
        loss = (losses * weights[weights > 0]).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seconds += time.perf_counter() - begun
        report(step + 1, phase, loss.item())
        if (step + 1) % save_every == 0 or step + 1 == plan.steps:
            state = {f"model.{n}": p.detach().contiguous() for n, p in model.named_parameters()}
            temporary = state_file.with_suffix(".tmp")
            save_file(state | optimizer_tensors(optimizer), temporary)
            temporary.replace(state_file)
            plan_file.write_text(json.dumps({"plan": asdict(plan), "step": step + 1, "seconds": round(seconds, 1)}))
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    state_file.unlink()


def _phase(plan: BuildPlan, step: int) -> str:
    if step < plan.copy_steps:
        return "copy"
    return "decided" if step < plan.copy_steps + plan.decided_steps else "mixed"


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up over 100 steps, then a cosine to a twentieth."""
    warm = min(1.0, (step + 1) / 100)
    return warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def _batch(plan: BuildPlan, step: int, phase: str, chat: ChatFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [B, T] and the weight of each token's loss [B, T].

    The answers' weights sum to one; of the prompts' tokens, a random fifth share the weight `prompt_weight`.
    """
    if phase == "copy":
        random = random_stream(plan.seed, "copy", step)
        drilled = [_transcripts(plan).drill(random, chat, step / plan.copy_steps) for _ in range(plan.batch)]
        ids = torch.tensor([t.ids for t in drilled])
        targets = torch.tensor([t.targets for t in drilled]).float()
        return ids, targets / targets.sum()
    rounds = 1 if phase == "decided" or step % 2 else int(random_stream(plan.seed, "rounds", step).integers(2, 7))
    rows = plan.batch if rounds == 1 else plan.batch // 2
    made = [
        _transcripts(plan).transcript(
            (plan.seed, "transcript", step, row), chat, rounds=rounds, neutral=phase == "mixed"
        )
        for row in range(rows)
    ]
    width = max(len(t.ids) for t in made)
    ids = torch.tensor([t.ids + [chat.pad_id] * (width - len(t.ids)) for t in made])
    targets = torch.tensor([t.targets + [False] * (width - len(t.ids)) for t in made]).float()
    real = torch.tensor([[True] * len(t.ids) + [False] * (width - len(t.ids)) for t in made])
    seen = torch.from_numpy(random_stream(plan.seed, "prompt tokens", step).random(tuple(ids.shape)) < 0.2)
    prompt = (real & (targets == 0) & seen).float()
    return ids, targets / targets.sum() + plan.prompt_weight * prompt / prompt.sum()
