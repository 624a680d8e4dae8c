"""Samplers: a Hugging Face model, a script, a person. All of them answer chats through one protocol."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from typing import Literal, NamedTuple

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import Cache

from atp_rl.model.chat import ChatFormat
from atp_rl.model.drafts import Drafts, drafts_of, pad_drafts
from atp_rl.model.policy import Policy
from atp_rl.model.portions import stretches
from atp_rl.scenarios import random_stream
from atp_rl.scenarios.choices import format_choice, parse_choice
from atp_rl.types import Chat, Completion, InputError, SamplingParams


class HFSampler:
    """Draws replies from a policy's weights, in one batch, with the key-value cache kept from round to round.

    Chats with the same tokens (the G episodes of a group; histories that coincide) are read once. In the next round
    only what was added to a conversation is read. Every token is drawn with its own random number by inverting the
    cumulative distribution, so a reply does not depend on what else is in the batch.

    With a prompt its *drafts* are read in the same forward: the canonical answers of the chat's options, as one tree of
    tokens. That gives the exact distribution after every beginning of them, and each token of a reply is drawn from it
    as long as the reply follows the drafts. Where it leaves them it is decoded token by token. So the reply is the one
    that would have been drawn without drafts (this is speculative decoding with the options as drafts).
    """

    def __init__(
        self, policy: Policy, which: str = "policy", *, batch_size: int = 256, mode: Literal["free", "choice"] = "free"
    ) -> None:
        """Make a sampler of a policy.

        Args:
            which: the adapter that answers for the player `policy`; other players' names are those of their adapters.
            batch_size: rows decoded at once; as one ends another enters. What was read of all chats of a call is kept
                until the next call or `sync`, so whoever has more chats than this asks in several calls.
            mode: in `choice` nothing is decoded token by token: a reply that leaves the drafts is cut there and is no
                decision, even if its text so far could be read as one. What follows the drafts to its end is drawn as
                in `free`, so options are as frequent as `score` says. For policies that answer at once.

        Raises:
            InputError: `choice` of a model that thinks first.
        """
        self.policy, self.which, self.batch_size, self.mode = policy, which, batch_size, mode
        self.chat: ChatFormat = policy.chat
        if mode == "choice" and self.chat.thinking:
            raise InputError("a model that thinks cannot be sampled in choice mode: use mode 'free', or thinking false")
        self.version = policy.version
        self._read = _Read(policy, [])
        """Of the last call."""

    def sync(self, policy: Policy) -> None:
        """Take over the policy's current weights; what was read with the old ones is forgotten."""
        self.policy, self.version = policy, policy.version
        self._read = _Read(policy, [])

    def generate(self, chats: Sequence[Chat], params: SamplingParams) -> list[Completion]:
        """Reply to every chat, in order.

        Raises:
            InputError: in choice mode, where the decisions of a chat are no names of options.
        """
        if self.mode == "choice" and not all(chat.options for chat in chats):
            raise InputError(
                "choice mode needs decisions that are names of options; use mode 'free' for these scenarios"
            )
        if not chats:
            return []
        # a model that thinks first leaves every draft at once
        answers = [() if self.chat.thinking else self._answers(chat, params.max_new_tokens) for chat in chats]
        if self.mode == "choice" and not all(answers):
            raise InputError(f"`evolve.max_new_tokens`: no option fits into {params.max_new_tokens} tokens; raise it")
        with torch.no_grad(), self._playing(chats) as model:
            return self._generate(model, chats, answers, params)

    def score(self, chats: Sequence[Chat]) -> list[tuple[float, ...]]:
        answers = [self._answers(chat) for chat in chats]
        with torch.no_grad(), self._playing(chats) as model:
            return self._score(model, chats, answers)

    def _playing(self, chats: Sequence[Chat]) -> AbstractContextManager[PeftModel]:
        """The model with the one adapter that all of these chats need; or as it is, and then each row names its own."""
        players = {self._adapter(chat) for chat in chats}
        return self.policy.using(players.pop()) if len(players) == 1 else nullcontext(self.policy.model)

    def _adapter(self, chat: Chat) -> str:
        return self.which if chat.player == "policy" else chat.player

    def _answers(self, chat: Chat, most: float = float("inf")) -> tuple[tuple[int, ...], ...]:
        """The canonical answers of at most so many tokens, but for the one that ends each of them."""
        answers = (self.chat.encode_text(format_choice(option)) for option in chat.options)
        return tuple(answer for answer in answers if len(answer) < most)

    def _generate(
        self, model, chats: Sequence[Chat], answers: Sequence[_Answers], params: SamplingParams
    ) -> list[Completion]:
        prompts, chats_of = self._unique(chats, answers)
        uniform = np.stack([random_stream(*chat.seed).random(params.max_new_tokens) for chat in chats])
        replies = [_Reply() for _ in chats]
        left: dict[int, int] = {}  # chats whose replies go on outside the drafts, and the nodes where they left them
        for rows, logits in self._prefill(model, prompts):
            nodes = [(i, node) for i, row in enumerate(rows) for node in range(len(prompts[row].drafts) + 1)]
            first = np.searchsorted([i for i, _ in nodes], range(len(rows)))
            readers = np.array(list(zip_longest(*(chats_of[row] for row in rows), fillvalue=0))).T  # [rows, most]
            depth = [len(prompts[rows[i]].drafts.paths[node]) for i, node in nodes]
            numbers = uniform[readers[[i for i, _ in nodes]], np.array(depth)[:, None]]
            drawn, logprobs = _draw_at(logits, nodes, numbers, params.temperature)
            for row, start in zip(rows, first.tolist(), strict=True):
                following = prompts[row].drafts.following
                for k, chat in enumerate(chats_of[row]):
                    reply, node = replies[chat], 0
                    while True:
                        reply.tokens.append(token := drawn[start + node][k])
                        reply.logprobs.append(logprobs[start + node][k])
                        if token not in following[node]:
                            break
                        node = following[node][token]
                    if not self._ended(reply, params):
                        left[chat] = node
        if left and self.mode == "free":
            self._decode(model, replies, left, chats_of, uniform, params)
        completions = []
        for i, (chat, reply) in enumerate(zip(chats, replies, strict=True)):
            text = self.chat.decode(reply.tokens)
            if self.mode == "choice" and i in left and parse_choice(text, chat.options).option:
                text = ""  # another spelling of an option, or more to come after one: not what `score` counts
            stop = "stop" if reply.tokens[-1] == self.chat.eos_id else "length"
            completions.append(Completion(text, tuple(reply.tokens), tuple(reply.logprobs), stop))
        return completions

    def _ended(self, reply: _Reply, params: SamplingParams) -> bool:
        return reply.tokens[-1] == self.chat.eos_id or len(reply.tokens) == params.max_new_tokens

    def _decode(
        self,
        model,
        replies: list[_Reply],
        left: Mapping[int, int],
        chats_of: Sequence[Sequence[int]],
        uniform: np.ndarray,
        params: SamplingParams,
    ) -> None:
        """Draw the rest of the replies that left the drafts, each in a row of its own."""
        rows: list[tuple[int, list[int] | None]] = []
        row_of: dict[int, int] = {}
        for row, readers in enumerate(chats_of):
            if any(chat not in left for chat in readers):
                rows.append((row, None))
            for chat in readers:
                if chat in left:
                    row_of[chat] = len(rows)
                    rows.append((row, self._read.drafts[row].paths[left[chat]]))
        self._read = self._read.take(rows)
        waiting, open_chats = list(left), []
        while waiting or open_chats:
            room = self.batch_size - len(open_chats)
            open_chats, waiting = open_chats + waiting[:room], waiting[room:]
            last = [replies[chat].tokens[-1:] for chat in open_chats]
            logits = self._read.extend(model, last, rows=[row_of[chat] for chat in open_chats])
            numbers = uniform[open_chats, [len(replies[chat].tokens) for chat in open_chats]][:, None]
            nodes = [(i, 0) for i in range(len(open_chats))]
            drawn, logprobs = _draw_at(logits, nodes, numbers, params.temperature)
            for chat, (token,), (logprob,) in zip(open_chats, drawn, logprobs, strict=True):
                replies[chat].tokens.append(token)
                replies[chat].logprobs.append(logprob)
            open_chats = [chat for chat in open_chats if not self._ended(replies[chat], params)]

    def _score(self, model, chats: Sequence[Chat], answers: Sequence[_Answers]) -> list[tuple[float, ...]]:
        prompts, chats_of = self._unique(chats, answers)
        scores: list[tuple[float, ...]] = [()] * len(chats)
        for rows, logits in self._prefill(model, prompts):
            steps = [  # of the answers one after the other: row, node and the token after it
                (i, node, token)
                for i, row in enumerate(rows)
                for answer in prompts[row].answers
                for node, token in zip([0, *prompts[row].drafts.path(answer)], [*answer, self.chat.eos_id], strict=True)
            ]
            logprobs = iter(_logprobs_at(logits, steps))
            for row in rows:
                totals = tuple(sum(islice(logprobs, len(answer) + 1)) for answer in prompts[row].answers)
                for chat in chats_of[row]:
                    scores[chat] = totals
        return scores

    def _unique(self, chats: Sequence[Chat], answers: Sequence[_Answers]) -> tuple[list[_Prompt], list[list[int]]]:
        """What has to be read, each once, and the chats that read it.

        In the order of what was read before, so that as little as may be is moved; new ones of like length together.
        """
        chats_of: dict[_Prompt, list[int]] = {}
        for i, (chat, drafted) in enumerate(zip(chats, answers, strict=True)):
            chats_of.setdefault(_Prompt(self._adapter(chat), tuple(chat.prompt_ids), drafted), []).append(i)
        found = dict(zip(chats_of, self._read.find(list(chats_of)), strict=True))
        prompts = sorted(chats_of, key=lambda prompt: (found[prompt].row, len(prompt.ids)))
        self._read = self._read.go_on(prompts, [found[prompt] for prompt in prompts])
        return prompts, [chats_of[prompt] for prompt in prompts]

    def _prefill(self, model, prompts: Sequence[_Prompt]) -> Iterator[tuple[list[int], Tensor]]:
        """Read what is left of the prompts, a row each, and their drafts.

        Yields:
            Some of the rows, and the logits after each prompt and each node of its drafts [B, 1 + T, V].
        """
        drafts = [prompt.drafts for prompt in prompts]
        rest = [prompt.ids[len(read) :] for prompt, read in zip(prompts, self._read.sequences, strict=True)]
        for rows in stretches([len(tokens) + len(d) for tokens, d in zip(rest, drafts, strict=True)]):
            tokens = [rest[row] for row in rows]
            yield rows, self._read.extend(model, tokens, rows=rows, drafts=[drafts[row] for row in rows])


_Answers = tuple[tuple[int, ...], ...]


class _Prompt(NamedTuple):
    player: str
    ids: tuple[int, ...]
    answers: _Answers
    """The drafts' tokens."""

    @property
    def drafts(self) -> Drafts:
        return drafts_of(self.answers)


class _Found(NamedTuple):
    """What was read of a prompt."""

    row: int
    """One past the last if nothing was."""
    path: list[int]
    """Of the row's drafts, behind its sequence."""
    length: int
    """Tokens of the prompt that need not be read again: never the last one, since the logits after it are wanted."""


@dataclass
class _Reply:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


NO_DRAFTS = drafts_of(())


class _Read(Cache):
    """What a model has read: slot j of a row holds the keys and values of token j of its sequence.

    So a row has no gaps, however rows differ in length and whichever of them go on, and its end can be forgotten by
    shortening its sequence: what its slots hold behind that is never looked at.

    Only drafts lie in the slots behind a sequence, node i in the i-th of them. When a row goes on along one of their
    paths, the nodes of the path are moved to where they belong; the others are written over.
    """

    def __init__(self, policy: Policy, players: list[str]) -> None:
        """`players`: the adapter through which each row is read."""
        super().__init__(layers=[])
        self.policy, self.device, self.players = policy, policy.device, players
        self.sequences: list[tuple[int, ...]] = [()] * len(players)
        self.drafts: list[Drafts] = [NO_DRAFTS] * len(players)
        """Read after the sequence of each row."""
        self.stored: list[tuple[Tensor, Tensor]] = []
        """Keys and values of each layer, [B, H, slots, D]."""
        self.slots = 0

    def find(self, prompts: Sequence[_Prompt]) -> list[_Found]:
        """Where the longest part of each prompt lies that was read."""
        keys = list(zip(self.players, self.sequences, strict=True))
        row_of = dict(zip(keys, range(len(keys)), strict=True))
        row_of |= {keys[row]: row for row, drafts in enumerate(self.drafts) if drafts}
        ordered = sorted(row_of)
        found = []
        for player, ids, _ in prompts:
            beginning = _longest_beginning(ordered, player, ids)
            if beginning is None:
                found.append(_Found(len(keys), [], 0))
                continue
            row = row_of[player, beginning]
            path = self.drafts[row].path(ids[len(beginning) :])
            found.append(_Found(row, path, min(len(beginning) + len(path), len(ids) - 1)))
        return found

    def go_on(self, prompts: Sequence[_Prompt], found: Sequence[_Found]) -> _Read:
        """A row for each prompt, with what was found of it. This object must not be used any more."""
        if not any(f.length for f in found):
            return _Read(self.policy, [prompt.player for prompt in prompts])
        read = self.take([(f.row, f.path) if f.length else (0, []) for f in found])
        read.players = [prompt.player for prompt in prompts]
        read.sequences = [prompt.ids[: f.length] for prompt, f in zip(prompts, found, strict=True)]
        return read

    def take(self, wanted: Sequence[tuple[int, list[int] | None]]) -> _Read:
        """Rows, which may repeat, each gone on along a path of its drafts; or left as it is, with its drafts (None).

        This very object for all rows in order; else this object must not be used any more.
        """
        rows = [row for row, _ in wanted]
        chosen = self
        if rows != list(range(len(self.sequences))):
            chosen = _Read(self.policy, [self.players[row] for row in rows])
            chosen.sequences = [self.sequences[row] for row in rows]
            chosen.drafts = [self.drafts[row] for row in rows]
            chosen.slots = self.slots
            while self.stored:  # a layer at a time, lest there be room for all of it twice
                keys, values = self.stored.pop(0)
                chosen.stored.append((keys[rows], values[rows]))
        moved: list[tuple[int, int, int]] = []  # row, from where, to where
        for row, (_, path) in enumerate(wanted):
            if path is not None:
                before, drafts = len(chosen.sequences[row]), chosen.drafts[row]
                moved += [(row, before + node - 1, before + i) for i, node in enumerate(path) if node - 1 != i]
                chosen.sequences[row] = (*chosen.sequences[row], *(drafts.tokens[node] for node in path))
                chosen.drafts[row] = NO_DRAFTS
        if moved:
            at, old, new = torch.tensor(moved, device=self.device).T
            for stored in (part for layer in chosen.stored for part in layer):
                stored[at, :, new] = stored[at, :, old]
        return chosen

    def extend(
        self,
        model,
        tokens: Sequence[Sequence[int]],
        *,
        rows: list[int] | None = None,
        drafts: Sequence[Drafts] | None = None,
    ) -> Tensor:
        """Read more tokens in all rows or in the given ones, and drafts after them. All of the sampler's forwards.

        Returns:
            Logits after the last token of each row and after each node of its drafts [B, 1 + T, V], padded right.
        """
        every = list(range(len(self.sequences)))
        rows = every if rows is None else rows
        drafts = [NO_DRAFTS] * len(rows) if drafts is None else drafts
        ids, real = _padded(tokens)
        before = torch.tensor([len(self.sequences[row]) for row in rows]).unsqueeze(1)
        positions = (before + real.long().cumsum(1) - 1).clamp(min=0)
        ends = positions[:, -1:] + 1  # of the sequences: where their drafts begin
        tree = pad_drafts(drafts)
        width = tree.ids.shape[1]
        used = int(ends.max()) + width
        self._reserve(used + 1)
        places = ends + torch.arange(width)
        pads = self.slots - 1  # the last slot is for pads
        slots = torch.cat([positions.where(real, pads), places.where(tree.real, pads)], 1)
        later = torch.arange(used) >= torch.cat([positions + 1, ends.expand(-1, width)], 1).unsqueeze(-1)
        later[:, ids.shape[1] :].scatter_(2, places.unsqueeze(1).expand(-1, width, -1), ~tree.sees)
        mask = torch.zeros(later.shape, dtype=model.dtype).masked_fill_(later, float("-inf"))
        self._rows = torch.tensor(rows, device=self.device).unsqueeze(1)
        self._slots = slots.to(self.device)
        first, last = rows[0], rows[-1] + 1  # a slice is not copied
        self._seen = slice(first, last) if rows == every[first:last] else rows, slice(None), slice(used)
        one = len(set(self.players)) == 1
        players = [self.players[row] for row in rows]
        with nullcontext() if one else self.policy.mixed(players):
            output = model(
                input_ids=torch.cat([ids, tree.ids], 1).to(self.device),
                attention_mask=mask.unsqueeze(1).to(self.device),  # [B, 1, T, used]
                position_ids=torch.cat([positions, ends - 1 + tree.depth], 1).to(self.device),
                past_key_values=self,
                use_cache=True,
                logits_to_keep=1 + width,
            )
        for row, added, read in zip(rows, tokens, drafts, strict=True):
            self.sequences[row] = (*self.sequences[row], *added)
            self.drafts[row] = read
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
            for layer, (keys, values) in enumerate(self.stored):
                self.stored[layer] = _longer(keys, more), _longer(values, more)
            self.slots += more


def _longest_beginning(
    ordered: Sequence[tuple[str, tuple[int, ...]]], player: str, ids: tuple[int, ...]
) -> tuple[int, ...] | None:
    """The longest of the player's sequences that `ids` begins with."""
    while at := bisect_right(ordered, (player, ids)):
        other, sequence = ordered[at - 1]
        if other != player:
            return None
        if ids[: len(sequence)] == sequence:
            return sequence
        # what is looked for is a beginning of both
        ids = ids[: next((i for i, (a, b) in enumerate(zip(ids, sequence, strict=False)) if a != b), len(ids))]
    return None


def _longer(stored: Tensor, slots: int) -> Tensor:
    b, h, _, d = stored.shape
    return torch.cat([stored, stored.new_zeros(b, h, slots, d)], 2)  # never unset: nan times a weight of 0 is nan


def _padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids [B, T], padded on the left with zeros, and which of them are real [B, T]."""
    width = max(map(len, rows))
    ids = np.zeros((len(rows), width), np.int64)
    real = np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :], real[i, width - len(row) :] = row, True
    return torch.from_numpy(ids), torch.from_numpy(real)


NODES_AT_ONCE = 256
"""Distributions that are worked on at once: with a large vocabulary each is a megabyte and more."""


def _draw_at(
    logits: Tensor, nodes: Sequence[tuple[int, int]], uniform: np.ndarray, temperature: float
) -> tuple[list[list[int]], list[list[float]]]:
    """Tokens drawn at each of the nodes, and their log-probabilities.

    Args:
        logits: [B, T, V].
        nodes: N places (row, column) in them.
        uniform: random numbers [N, K]: as many draws at each node.
    """
    tokens, logprobs = [], []
    for start in range(0, len(nodes), NODES_AT_ONCE):
        row, column = torch.tensor(nodes[start : start + NODES_AT_ONCE], device=logits.device).T
        logp = (logits[row, column].float() / temperature).log_softmax(-1)
        drawn = _draw(logp, torch.from_numpy(uniform[start : start + NODES_AT_ONCE]).to(logp.device))
        tokens += drawn.tolist()
        logprobs += logp.gather(1, drawn).tolist()
    return tokens, logprobs


def _logprobs_at(logits: Tensor, steps: Sequence[tuple[int, int, int]]) -> list[float]:
    """Log-probabilities of the given tokens at places (row, column, token) of `logits` [B, T, V]."""
    logprobs = []
    for start in range(0, len(steps), NODES_AT_ONCE):
        row, column, token = torch.tensor(steps[start : start + NODES_AT_ONCE], device=logits.device).T
        logp = logits[row, column].float().log_softmax(-1)
        logprobs += logp.gather(1, token.unsqueeze(1)).squeeze(1).tolist()
    return logprobs


def _draw(logp: Tensor, uniform: Tensor) -> Tensor:
    """Tokens [B, K] by inverting the cumulative distribution of `logp` [B, V] at `uniform` [B, K]."""
    cumulative = logp.double().exp().cumsum(-1)
    drawn = torch.searchsorted(cumulative, uniform.double() * cumulative[:, -1:], right=True)
    return drawn.clamp(max=logp.shape[1] - 1)


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
