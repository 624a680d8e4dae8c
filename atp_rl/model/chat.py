"""Chat templates, token-in/token-out: what a model wrote is never decoded and tokenised again."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError

from atp_rl.types import InputError, Message

Tools = Sequence[Mapping[str, Any]]

_REPLY = "\x02reply\x03"
"""Stands for an assistant's reply while the template is rendered; its tokens are spliced in afterwards."""

_SYSTEM: Message = {"role": "system", "content": "s"}
_USER: Message = {"role": "user", "content": "u"}
_ASSISTANT: Message = {"role": "assistant", "content": "a"}


class ChatFormat:
    """Turns a conversation into prompt tokens with the tokenizer's chat template.

    A prompt is the text up to the first reply, the tokens of that reply, the text from there to the next reply, and so
    on, each piece as the template renders it at that point of the conversation. So adding turns only ever appends
    tokens, also with templates of reasoning models that would rewrite earlier turns (drop their thinking, add an empty
    one).
    """

    def __init__(self, tokenizer: Any, *, thinking: bool = False) -> None:
        """Raises InputError for a tokenizer without a chat template, or with one that changes or drops replies."""
        self.tokenizer, self.thinking = tokenizer, thinking
        if not tokenizer.chat_template:
            raise InputError(f"{tokenizer.name_or_path}: the tokenizer has no chat template; use an instruct model")
        self.eos_id: int = tokenizer.eos_token_id
        self.pad_id: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        special = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        self._marks = re.compile("|".join(map(re.escape, [_REPLY, *special])))
        self._tokens = lru_cache(maxsize=1 << 16)(self._tokenise)
        self._text_before_reply = lru_cache(maxsize=1 << 16)(self._render)
        self.encode([_SYSTEM, _USER, _ASSISTANT, _USER], [(self.eos_id,)])

    def encode(self, messages: Sequence[Message], replies: Sequence[Sequence[int]], tools: Tools = ()) -> list[int]:
        """Prompt tokens of a conversation that ends with a message of the user or of a tool.

        Marks of the template that occur in the text of a message (a scenario's, a tool's, another agent's) are broken
        up by a space: no text can end its own turn or speak as another role.

        Args:
            messages: the conversation.
            replies: for each assistant message, in order, the very tokens that the model drew for it (with its
                end-of-turn token, where it drew one).
            tools: JSON schemas of the tools that the template announces.
        """
        announced = json.dumps(list(tools)) if tools else ""
        turns = tuple(
            (m["role"], _REPLY if m["role"] == "assistant" else self.harmless(m["content"])) for m in messages
        )
        ends = [i for i, (role, _) in enumerate(turns) if role == "assistant"] + [len(turns)]
        ids = list(self._tokens(self._text_before_reply(turns[: ends[0]], announced)))
        for reply, end in zip(replies, ends[1:], strict=True):
            ids += reply
            following = self._tokens(self._text_before_reply(turns[:end], announced))
            ends_turn = bool(reply) and reply[-1] == self.eos_id and following[0] == self.eos_id
            ids += following[1:] if ends_turn else following
        return ids

    def check_rendering(self, rounds: int, *, replies: bool) -> None:
        """Find out whether the template alone renders conversations as `encode` does, for trainers that do so.

        Args:
            rounds: replies in the longest conversation.
            replies: whether the trainer also renders the last reply, behind its prompt.

        Raises:
            InputError: it changes earlier turns, or the prompt once a reply follows.
        """
        reply = "<think>\nt\n</think>\n\na" if self.thinking else "a"
        drawn = [*self.encode_text(reply), self.eos_id]
        messages = [_SYSTEM, _USER]
        for k in range(rounds):
            prompt, answered = self.encode(messages, [drawn] * k), [*messages, Message(role="assistant", content=reply)]
            same = self._rendered(messages, prompt=True) == prompt
            if replies and same:
                same = self._rendered(answered, prompt=False)[: len(prompt) + len(drawn)] == [*prompt, *drawn]
            if not same:
                raise InputError(
                    f"{self.tokenizer.name_or_path}: the chat template rewrites earlier turns, so TRL would align on "
                    "other prompts than those that are played; set `align.rounds` to 1, or use a model with the stock "
                    "template of Qwen3 or Llama-3.1 (they are replaced), or one that leaves replies as they are"
                )
            messages = [*answered, _USER]

    def _rendered(self, messages: Sequence[Message], *, prompt: bool) -> list[int]:
        text = self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=prompt, enable_thinking=self.thinking
        )
        return list(self._tokenise(text))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a reply, without the end-of-turn token."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def encode_text(self, text: str) -> tuple[int, ...]:
        """Tokens of a piece of text as such."""
        return self._tokens(text)

    def _tokenise(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def harmless(self, content: str) -> str:
        """A text in which the template's marks are broken up by a space."""
        return self._marks.sub(lambda mark: f"{mark[0][:1]} {mark[0][1:]}", content)

    def _render(self, turns: tuple[tuple[str, str], ...], tools: str, *, whole: bool = False) -> str:
        """The text from the last reply (or from the start, or the whole of it) to where the next reply begins."""
        try:
            text: str = self.tokenizer.apply_chat_template(
                [{"role": role, "content": content} for role, content in turns],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=self.thinking,
                tools=json.loads(tools) if tools else None,
            )
        except TemplateError as error:
            raise InputError(f"{self.tokenizer.name_or_path}: the chat template refuses: {error}") from None
        if tools and text == self._render(turns, "", whole=True):
            raise InputError(
                f"{self.tokenizer.name_or_path}: the chat template announces no tools; use another way of calling them"
            )
        if whole:
            return text
        _, found, after = text.rpartition(_REPLY)
        if bool(found) != any(role == "assistant" for role, _ in turns):
            raise InputError(f"{self.tokenizer.name_or_path}: the chat template changes or drops assistant turns")
        return after if found else text
