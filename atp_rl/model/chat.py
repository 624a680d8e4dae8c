"""Chat templates, token-in/token-out: what a model wrote is never decoded and tokenised again."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from atp_rl.types import InputError, Message

_REPLY = "\x02reply\x03"
"""Stands for an assistant's reply while the template is rendered; its tokens are spliced in afterwards."""


class ChatFormat:
    """Turns a conversation into prompt tokens with the tokenizer's chat template.

    The template must be *prefix-preserving*: adding turns to a conversation only ever appends text. Stock templates of
    reasoning models are not (they drop earlier thinking), and would make the learner train on tokens that the sampler
    never saw; such a template is refused.
    """

    def __init__(self, tokenizer: Any, *, thinking: bool = False) -> None:
        self.tokenizer, self.thinking = tokenizer, thinking
        if not tokenizer.chat_template:
            raise InputError(f"{tokenizer.name_or_path}: the tokenizer has no chat template; use an instruct model")
        self.eos_id: int = tokenizer.eos_token_id
        self.pad_id: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self._tokens = lru_cache(maxsize=1 << 16)(self._tokenise)
        self._render = lru_cache(maxsize=1 << 16)(self._render_uncached)
        self._check_prefix_property()

    def encode(self, messages: Sequence[Message], replies: Sequence[Sequence[int]]) -> list[int]:
        """Prompt tokens of a conversation that ends with a user message.

        Args:
            messages: the conversation.
            replies: for each assistant message, in order, the very tokens that the model drew for it (with its end-of-turn
                token, where it drew one).
        """
        parts = self._render(tuple((m["role"], _REPLY if m["role"] == "assistant" else m["content"]) for m in messages))
        ids = list(self._tokens(parts[0]))
        for reply, part in zip(replies, parts[1:], strict=True):
            ids += reply
            following = self._tokens(part)
            ends_turn = bool(reply) and reply[-1] == self.eos_id and following[0] == self.eos_id
            ids += following[1:] if ends_turn else following
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a reply, without the end-of-turn token."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def encode_text(self, text: str) -> tuple[int, ...]:
        """Tokens of a piece of text as such."""
        return self._tokens(text)

    def _tokenise(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _render_uncached(self, turns: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
        text = self.tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in turns],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=self.thinking,
        )
        parts = tuple(text.split(_REPLY))
        if len(parts) != 1 + sum(role == "assistant" for role, _ in turns):
            raise InputError(f"{self.tokenizer.name_or_path}: the chat template changes or drops assistant turns")
        return parts

    def _check_prefix_property(self) -> None:
        turns = (
            ("system", "s"),
            ("user", "u"),
            ("assistant", _REPLY),
            ("user", "v"),
            ("assistant", _REPLY),
            ("user", "w"),
        )
        whole = _REPLY.join(self._render_uncached(turns))
        if not all(whole.startswith(_REPLY.join(self._render_uncached(turns[:n]))) for n in (2, 4)):
            raise InputError(
                f"{self.tokenizer.name_or_path}: the chat template is not prefix-preserving (a later turn changes the "
                "tokens of an earlier one); use a training template, e.g. trl's qwen3_training.jinja"
            )
