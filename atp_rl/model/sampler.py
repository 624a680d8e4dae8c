"""Samplers: a Hugging Face model, a script, a person. All of them answer chats through one protocol."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from atp_rl.model.chat import ChatFormat
from atp_rl.model.policy import Policy, Which
from atp_rl.scenarios import random_stream
from atp_rl.scenarios.choices import format_choice
from atp_rl.types import Chat, Completion, SamplingParams


class HFSampler:
    """Draws replies from a policy's weights, in one batch, with the key-value cache kept from round to round.

    Chats with the same tokens (the G episodes of a group; histories that coincide) are read once and share that part of
    the cache. In the next round only what was added to a conversation is read. Every reply is drawn with its own random
    numbers by inverting the cumulative distribution, so it does not depend on what else is in the batch.
    """

    def __init__(self, policy: Policy, which: Which = "policy", *, batch_size: int = 256) -> None:
        """`batch_size`: rows decoded at once."""
        self.policy, self.which, self.batch_size = policy, which, batch_size
        self.chat: ChatFormat = policy.chat
        self.version = policy.version
        self._read: list[_Read] = []
        self._prefilled: tuple[list[tuple[int, ...]], _Read, Tensor] | None = None

    def sync(self, policy: Policy) -> None:
        """Take over the policy's current weights; what was read with the old ones is forgotten."""
        self.policy, self.version = policy, policy.version
        self._read, self._prefilled = [], None

    def generate(self, chats: Sequence[Chat], params: SamplingParams) -> list[Completion]:
        completions: list[Completion] = []
        kept: list[_Read] = []
        for batch in _chunks(chats, self.batch_size):
            with torch.no_grad(), self.policy.using(self.which) as model:
                done, read = self._generate(model, batch, params)
            completions += done
            kept.append(read)
        self._read = kept
        return completions

    def score(self, chats: Sequence[Chat]) -> list[tuple[float, ...]]:
        scores: list[tuple[float, ...]] = []
        for batch in _chunks(chats, self.batch_size):
            with torch.no_grad(), self.policy.using(self.which) as model:
                scores += self._score(model, batch)
        return scores

    def _generate(self, model, chats: Sequence[Chat], params: SamplingParams) -> tuple[list[Completion], _Read]:
        prompts, row_of = _unique(chats)
        read, logits = self._prefill(model, prompts)
        rows = torch.tensor(row_of, device=logits.device)
        read, logits = read.select(rows), logits[rows]
        draws = torch.from_numpy(np.stack([random_stream(*c.seed).random(params.max_new_tokens) for c in chats]))
        tokens: list[list[int]] = [[] for _ in chats]
        logprobs: list[list[float]] = [[] for _ in chats]
        open_rows = torch.ones(len(chats), dtype=torch.bool)
        for k in range(params.max_new_tokens):
            logp = (logits.float() / params.temperature).log_softmax(-1)
            drawn = _draw(logp, draws[:, k].to(logp.device))
            chosen = logp.gather(1, drawn.unsqueeze(1)).squeeze(1).tolist()
            for i, (token, value) in enumerate(zip(drawn.tolist(), chosen, strict=True)):
                if open_rows[i]:
                    tokens[i].append(token)
                    logprobs[i].append(value)
            open_rows &= (drawn != self.chat.eos_id).cpu()
            if not open_rows.any() or k + 1 == params.max_new_tokens:
                break
            logits = read.extend(model, drawn.unsqueeze(1), open_rows.to(drawn.device).unsqueeze(1))
        # the last token of a reply was drawn but never read; finished rows were fed pads, which the mask hides
        read.sequences = [(*chat.prompt_ids, *tokens[i][:-1]) for i, chat in enumerate(chats)]
        completions = [
            Completion(
                text=self.chat.decode(ids),
                token_ids=tuple(ids),
                logprobs=tuple(values),
                stop_reason="stop" if ids[-1] == self.chat.eos_id else "length",
            )
            for ids, values in zip(tokens, logprobs, strict=True)
        ]
        return completions, read

    def _score(self, model, chats: Sequence[Chat]) -> list[tuple[float, ...]]:
        prompts, row_of = _unique(chats)
        read, logits = self._prefill(model, prompts)
        rows = torch.tensor([row for chat, row in zip(chats, row_of, strict=True) for _ in chat.options])
        answers = [
            (*self.chat.encode_text(format_choice(option)), self.chat.eos_id)
            for chat in chats
            for option in chat.options
        ]
        width = max(map(len, answers))
        pad = self.chat.pad_id
        ids = torch.tensor([[*answer, *[pad] * (width - len(answer))] for answer in answers], device=logits.device)
        real = torch.tensor([[k < len(answer) for k in range(width)] for answer in answers], device=logits.device)
        rows = rows.to(logits.device)
        following = read.select(rows).extend(model, ids, real, keep=0)
        logp = torch.cat([logits[rows].unsqueeze(1), following[:, :-1]], 1).float().log_softmax(-1)
        totals = (logp.gather(-1, ids.unsqueeze(-1)).squeeze(-1) * real).sum(1).tolist()
        scores, start = [], 0
        for chat in chats:
            scores.append(tuple(totals[start : start + len(chat.options)]))
            start += len(chat.options)
        return scores

    def _prefill(self, model, prompts: list[tuple[int, ...]]) -> tuple[_Read, Tensor]:
        """Read the prompts, from where an earlier round's cache ends if it holds the beginning of each of them."""
        if self._prefilled and self._prefilled[0] == prompts:  # scored before it is played
            return self._prefilled[1:]
        device, pad = self.policy.device, self.chat.pad_id
        found = next((f for f in (r.find(prompts) for r in self._read) if f is not None), None)
        if found is None:
            read, rest = _Read.empty(len(prompts), device), prompts
        else:
            read, rest = found
        width = max(map(len, rest))
        ids = torch.tensor([[*[pad] * (width - len(r)), *r] for r in rest], device=device)  # left: the last is real
        real = torch.tensor([[k >= width - len(r) for k in range(width)] for r in rest], device=device)
        logits = read.extend(model, ids, real)
        read.sequences = prompts
        self._prefilled = prompts, read, logits
        return read, logits


class _Read:
    """What a model has read: a key-value cache with gaps, the mask of its real entries, and the tokens of each row."""

    def __init__(self, cache: DynamicCache, mask: Tensor, sequences: list[tuple[int, ...]]) -> None:
        self.cache, self.mask, self.sequences = cache, mask, sequences

    @classmethod
    def empty(cls, rows: int, device: torch.device) -> _Read:
        return cls(DynamicCache(), torch.zeros(rows, 0, dtype=torch.bool, device=device), [()] * rows)

    def find(self, prompts: list[tuple[int, ...]]) -> tuple[_Read, list[tuple[int, ...]]] | None:
        """The part of the cache that begins each prompt, and what is left of it to read; None unless all are found."""
        row_of = {sequence: row for row, sequence in enumerate(self.sequences)}
        lengths = sorted({len(sequence) for sequence in self.sequences}, reverse=True)
        rows, rest = [], []
        for prompt in prompts:
            length = next((n for n in lengths if n < len(prompt) and prompt[:n] in row_of), None)
            if length is None:
                return None
            rows.append(row_of[prompt[:length]])
            rest.append(prompt[length:])
        return self.select(torch.tensor(rows, device=self.mask.device)), rest

    def select(self, rows: Tensor) -> _Read:
        """A copy of some rows, which may repeat."""
        cache = DynamicCache([(layer.keys[rows], layer.values[rows]) for layer in self.cache.layers])
        return _Read(cache, self.mask[rows], [self.sequences[row] for row in rows.tolist()])

    def extend(self, model, ids: Tensor, real: Tensor, *, keep: int = 1) -> Tensor:
        """Read `ids` [B, T] where `real` [B, T]; logits [B, V] after the last of them, or [B, T, V] with `keep=0`."""
        before = self.mask.sum(1, keepdim=True)
        positions = (before + real.long().cumsum(1) - 1).clamp(min=0)
        self.mask = torch.cat([self.mask, real], 1)
        output = model(
            input_ids=ids,
            attention_mask=self.mask.long(),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        return output.logits[:, -1] if keep else output.logits


def _draw(logp: Tensor, uniform: Tensor) -> Tensor:
    """One token a row [B] by inverting the cumulative distribution of `logp` [B, V] at `uniform` [B]."""
    cumulative = logp.double().exp().cumsum(-1)
    drawn = torch.searchsorted(cumulative, (uniform.double() * cumulative[:, -1]).unsqueeze(1), right=True).squeeze(1)
    return drawn.clamp(max=logp.shape[1] - 1)


def _unique(chats: Sequence[Chat]) -> tuple[list[tuple[int, ...]], list[int]]:
    index: dict[tuple[int, ...], int] = {}
    rows = [index.setdefault(tuple(chat.prompt_ids), len(index)) for chat in chats]
    return list(index), rows


def _chunks(chats: Sequence[Chat], size: int) -> list[Sequence[Chat]]:
    return [chats[i : i + size] for i in range(0, len(chats), size)]


class TextSampler:
    """Answers with the text that a function makes of a chat: scripted policies, people, services without tokens."""

    version = 0
    chat = None

    def __init__(self, reply: Callable[[Chat], str]) -> None:
        self.reply = reply

    def generate(self, chats: Sequence[Chat], params: SamplingParams) -> list[Completion]:
        return [Completion(text=self.reply(chat), token_ids=(), logprobs=(), stop_reason="stop") for chat in chats]

    def score(self, chats: Sequence[Chat]) -> list[tuple[float, ...]]:
        """A function has no probabilities: nan for every option."""
        return [tuple(float("nan") for _ in chat.options) for chat in chats]
