"""Samplers: a Hugging Face model, a script, a person. All of them answer chats through one protocol."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import Cache

from atp_rl.model.chat import ChatFormat
from atp_rl.model.policy import Policy
from atp_rl.model.portions import portions
from atp_rl.scenarios import random_stream
from atp_rl.scenarios.choices import format_choice
from atp_rl.types import Chat, Completion, SamplingParams


class HFSampler:
    """Draws replies from a policy's weights, in one batch, with the key-value cache kept from round to round.

    Chats with the same tokens (the G episodes of a group; histories that coincide) are read once and share that part of
    the cache. In the next round only what was added to a conversation is read. Every reply is drawn with its own random
    numbers by inverting the cumulative distribution, so it does not depend on what else is in the batch.
    """

    def __init__(self, policy: Policy, which: str = "policy", *, batch_size: int = 256) -> None:
        """Make a sampler of a policy.

        Args:
            which: the adapter that answers for the player `policy`; other players' names are those of their adapters.
            batch_size: rows decoded at once; what was read for all of them is kept until the next `sync`.
        """
        self.policy, self.which, self.batch_size = policy, which, batch_size
        self.chat: ChatFormat = policy.chat
        self.version = policy.version
        self._read: list[_Read] = []
        """Of the last call, one a batch."""

    def sync(self, policy: Policy) -> None:
        """Take over the policy's current weights; what was read with the old ones is forgotten."""
        self.policy, self.version = policy, policy.version
        self._read = []

    def generate(self, chats: Sequence[Chat], params: SamplingParams) -> list[Completion]:
        completions: list[Completion] = []
        kept: list[_Read] = []
        for batch in _chunks(chats, self.batch_size):
            with torch.no_grad(), self._playing(batch) as model:
                done, read = self._generate(model, batch, params)
            completions += done
            kept.append(read)
        self._read = kept
        return completions

    def score(self, chats: Sequence[Chat]) -> list[tuple[float, ...]]:
        scores: list[tuple[float, ...]] = []
        kept: list[_Read] = []
        for batch in _chunks(chats, self.batch_size):
            with torch.no_grad(), self._playing(batch) as model:
                done, read = self._score(model, batch)
            scores += done
            kept.append(read)
        self._read = kept
        return scores

    def _playing(self, chats: Sequence[Chat]) -> AbstractContextManager[PeftModel]:
        """The model with the one adapter that all of these chats need; or as it is, and then each row names its own."""
        players = {self._adapter(chat) for chat in chats}
        return self.policy.using(players.pop()) if len(players) == 1 else nullcontext(self.policy.model)

    def _adapter(self, chat: Chat) -> str:
        return self.which if chat.player == "policy" else chat.player

    def _generate(self, model, chats: Sequence[Chat], params: SamplingParams) -> tuple[list[Completion], _Read]:
        prompts, row_of = self._unique(chats)
        read, logits = self._prefill(model, prompts)
        read, logits = read.select(row_of), logits[row_of]
        draws = torch.from_numpy(np.stack([random_stream(*c.seed).random(params.max_new_tokens) for c in chats]))
        tokens: list[list[int]] = [[] for _ in chats]
        logprobs: list[list[float]] = [[] for _ in chats]
        open_rows = list(range(len(chats)))
        for k in range(params.max_new_tokens):
            logp = (logits.float() / params.temperature).log_softmax(-1)
            drawn = _draw(logp, draws[open_rows, k].to(logp.device))
            chosen = logp.gather(1, drawn.unsqueeze(1)).squeeze(1)
            for row, token, value in zip(open_rows, drawn.tolist(), chosen.tolist(), strict=True):
                tokens[row].append(token)
                logprobs[row].append(value)
            open_rows = [row for row in open_rows if tokens[row][-1] != self.chat.eos_id]
            if not open_rows or k + 1 == params.max_new_tokens:
                break
            logits = read.extend(model, [tokens[row][-1:] for row in open_rows], rows=open_rows)[:, -1]
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

    def _score(self, model, chats: Sequence[Chat]) -> tuple[list[tuple[float, ...]], _Read]:
        prompts, row_of = self._unique(chats)
        read, logits = self._prefill(model, prompts)
        rows = [row for chat, row in zip(chats, row_of, strict=True) for _ in chat.options]
        answers = [
            (*self.chat.encode_text(format_choice(option)), self.chat.eos_id)
            for chat in chats
            for option in chat.options
        ]
        following = read.select(rows).extend(model, answers, all_logits=True)
        ids, real = _padded(answers, left=False)
        ids, real = ids.to(logits.device), real.to(logits.device)
        logp = torch.cat([logits[rows].unsqueeze(1), following[:, :-1]], 1).float().log_softmax(-1)
        totals = (logp.gather(-1, ids.unsqueeze(-1)).squeeze(-1) * real).sum(1).tolist()
        scores, start = [], 0
        for chat in chats:
            scores.append(tuple(totals[start : start + len(chat.options)]))
            start += len(chat.options)
        return scores, read

    def _unique(self, chats: Sequence[Chat]) -> tuple[list[_Prompt], list[int]]:
        """What has to be read, each once, and which of it every chat reads."""
        index: dict[_Prompt, int] = {}
        prompts = [_Prompt(self._adapter(chat), tuple(chat.prompt_ids)) for chat in chats]
        rows = [index.setdefault(prompt, len(index)) for prompt in prompts]
        return list(index), rows

    def _prefill(self, model, prompts: list[_Prompt]) -> tuple[_Read, Tensor]:
        """Read the prompts, from where an earlier reading ends if it holds the beginning of each of them.

        Returns:
            What has been read, a row a prompt, and the logits after it [B, V].
        """
        found = next((f for f in (r.find(prompts) for r in self._read) if f is not None), None)
        fresh = _Read(self.policy, [prompt.player for prompt in prompts]), [prompt.ids for prompt in prompts]
        read, rest = found or fresh
        parts = portions([len(tokens) for tokens in rest])
        logits = torch.cat([read.extend(model, [rest[row] for row in rows], rows=rows)[:, -1] for rows in parts])
        place = {row: i for i, row in enumerate(row for rows in parts for row in rows)}
        return read, logits[[place[row] for row in range(len(prompts))]]


class _Prompt(NamedTuple):
    player: str
    ids: tuple[int, ...]


class _Read(Cache):
    """What a model has read: slot j of a row holds the keys and values of token j of its sequence.

    So a row has no gaps, however rows differ in length and whichever of them go on, and its end can be forgotten by
    shortening its sequence: what its slots hold behind that is never looked at.
    """

    def __init__(self, policy: Policy, players: list[str]) -> None:
        """`players`: the adapter through which each row is read."""
        super().__init__(layers=[])
        self.policy, self.device, self.players = policy, policy.device, players
        self.sequences: list[tuple[int, ...]] = [()] * len(players)
        self.stored: list[tuple[Tensor, Tensor]] = []
        """Keys and values of each layer, [B, H, slots, D]."""
        self.slots = 0

    def find(self, prompts: list[_Prompt]) -> tuple[_Read, list[tuple[int, ...]]] | None:
        """The rows that begin each prompt, and what is left of it to read; None unless all are found."""
        row_of = {key: row for row, key in enumerate(zip(self.players, self.sequences, strict=True))}
        lengths = sorted({len(sequence) for sequence in self.sequences}, reverse=True)
        rows, read = [], []
        for player, ids in prompts:
            length = next((n for n in lengths if n <= len(ids) and (player, ids[:n]) in row_of), None)
            if length is None:
                return None
            rows.append(row_of[player, ids[:length]])
            read.append(min(length, len(ids) - 1))  # the logits after its last token are wanted
        chosen = self.select(rows)
        chosen.sequences = [prompt.ids[:n] for prompt, n in zip(prompts, read, strict=True)]
        return chosen, [prompt.ids[n:] for prompt, n in zip(prompts, read, strict=True)]

    def select(self, rows: list[int]) -> _Read:
        """Some rows, which may repeat: a copy, or this very object for all of them in order."""
        if rows == list(range(len(self.sequences))):
            return self
        chosen = _Read(self.policy, [self.players[row] for row in rows])
        chosen.sequences = [self.sequences[row] for row in rows]
        chosen.stored = [(keys[rows], values[rows]) for keys, values in self.stored]
        chosen.slots = self.slots
        return chosen

    def extend(
        self, model, tokens: Sequence[Sequence[int]], *, rows: list[int] | None = None, all_logits: bool = False
    ) -> Tensor:
        """Read more tokens, in all rows or in the given ones.

        Returns:
            Logits after the last token of each row [B, 1, V]; or after every token [B, T, V], rows padded on the right.
        """
        every = list(range(len(self.sequences)))
        rows = every if rows is None else rows
        ids, real = _padded(tokens, left=not all_logits)
        before = torch.tensor([len(self.sequences[row]) for row in rows]).unsqueeze(1)
        positions = (before + real.long().cumsum(1) - 1).clamp(min=0)
        used = int(positions.max()) + 1
        self._reserve(used + 1)
        slots = positions.where(real, self.slots - 1)  # the last slot is for pads
        self._rows = torch.tensor(rows, device=self.device).unsqueeze(1)
        self._slots = slots.to(self.device)
        self._seen = slice(None) if rows == every else rows, slice(None), slice(used)
        positions = positions.to(self.device)
        later = torch.arange(used, device=self.device) > positions.unsqueeze(-1)
        one = len(set(self.players)) == 1
        players = [self.players[row] for row in rows]
        with nullcontext() if one else self.policy.mixed(players):
            output = model(
                input_ids=ids.to(self.device),
                attention_mask=torch.where(later, float("-inf"), 0.0).to(model.dtype).unsqueeze(1),  # [B, 1, T, used]
                position_ids=positions,
                past_key_values=self,
                use_cache=True,
                logits_to_keep=0 if all_logits else 1,
            )
        for row, added in zip(rows, tokens, strict=True):
            self.sequences[row] = (*self.sequences[row], *added)
        return output.logits

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_, **__) -> tuple[Tensor, Tensor]:
        """Called by every layer with what it made of the new tokens [B, H, T, D]: store it, return all that is seen."""
        if layer_idx == len(self.stored):
            b, (_, h, _, d) = len(self.sequences), key_states.shape
            self.stored.append((key_states.new_zeros(b, h, self.slots, d), value_states.new_zeros(b, h, self.slots, d)))
        keys, values = self.stored[layer_idx]
        keys[self._rows, :, self._slots] = key_states.transpose(1, 2)
        values[self._rows, :, self._slots] = value_states.transpose(1, 2)
        return keys[self._seen], values[self._seen]

    def _reserve(self, slots: int) -> None:
        """Make room for so many in every row, and for some more, since room is made by copying."""
        if slots > self.slots:
            more = slots + -slots % 128 - self.slots
            self.stored = [(_longer(keys, more), _longer(values, more)) for keys, values in self.stored]
            self.slots += more


def _longer(stored: Tensor, slots: int) -> Tensor:
    b, h, _, d = stored.shape
    return torch.cat([stored, stored.new_zeros(b, h, slots, d)], 2)  # never unset: nan times a weight of 0 is nan


def _padded(rows: Sequence[Sequence[int]], *, left: bool) -> tuple[Tensor, Tensor]:
    """Token ids [B, T] and which of them are real [B, T]; pads are zeros."""
    width = max(map(len, rows))
    ids = torch.tensor([[*[0] * (width - len(r)), *r] if left else [*r, *[0] * (width - len(r))] for r in rows])
    lengths = torch.tensor([len(r) for r in rows]).unsqueeze(1)
    return ids, (torch.arange(width) >= width - lengths) if left else (torch.arange(width) < lengths)


def _draw(logp: Tensor, uniform: Tensor) -> Tensor:
    """One token a row [B] by inverting the cumulative distribution of `logp` [B, V] at `uniform` [B]."""
    cumulative = logp.double().exp().cumsum(-1)
    drawn = torch.searchsorted(cumulative, (uniform.double() * cumulative[:, -1]).unsqueeze(1), right=True).squeeze(1)
    return drawn.clamp(max=logp.shape[1] - 1)


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
