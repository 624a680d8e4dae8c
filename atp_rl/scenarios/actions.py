"""From a reply to an action in tool use: call the tool with this code, or answer this. Rests on `parse_action` alone.

The rules, in the order in which they apply:

1. Thinking is not read (as in `choices.py`). A reply that begins with `<|python_tag|>` is a call with all that follows
   as its code, unless all that follows is one JSON object.
2. A *candidate* is a closed JSON object of at most two levels with a key of its own that names an action:
   `{"tool": "python", "code": "..."}`, `{"answer": "..."}`, or `{"name": "python", "arguments": {"code": "..."}}` as
   Qwen and Hermes write it between `<tool_call>` tags, or with `parameters` as Llama 3.1 does. Tags, code fences and
   prose around it are not looked at; other keys beside it are allowed; strings may run over several lines.
   `\\boxed{...}` outside such an object is a candidate too: an answer.
3. The last candidate decides, well formed or not; never an earlier one. Last is the brace that closes last. An object
   that is cut off before its brace is no candidate.
4. A tool must be `python`, its code a string that is not blank; an answer a string that is not blank or a number, which
   counts as it is written. An answer that is all `\\boxed{...}` is what is inside.
5. Anything else is invalid: no candidate, two actions in one object, an action that is not JSON. Prose is never guessed
   at, and neither is code outside an action.

The time is linear in the text, whatever the text; nothing raises.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Literal

from atp_rl.scenarios.choices import without_thinking

OPTIONS = ("tool", "answer")
"""What a reply can decide for."""

TOOL = "python"

PYTHON_TAG = "<|python_tag|>"


@dataclass(frozen=True)
class Action:
    kind: Literal["tool", "answer"] | None
    """None when the reply holds no valid action."""
    code: str = ""
    """Of a call: what the tool is to run."""
    answer: str = ""
    """Of an answer: its text, without white space around it."""
    reason: str = ""
    """Why there is no valid action, in a few words."""


def format_tool(code: str) -> str:
    """The canonical text of a call, e.g. `{"tool": "python", "code": "print(3)"}`."""
    return json.dumps({"tool": TOOL, "code": code}, ensure_ascii=False)


def format_answer(answer: str) -> str:
    """The canonical text of an answer, e.g. `{"answer": "3"}`."""
    return json.dumps({"answer": answer}, ensure_ascii=False)


def parse_action(text: str) -> Action:
    """The one action that `text` takes, by the rules above; never raises."""
    text = without_thinking(text).strip()
    if text.startswith(PYTHON_TAG):
        text = text.removeprefix(PYTHON_TAG).strip()
        if not any(span == (0, len(text)) for span in _objects(text)):
            return _call(TOOL, text)
    deciding, closes = Action(None, reason="no action"), 0
    if boxes := _boxes(text):
        start, closes = max(boxes, key=lambda box: box[1])
        deciding = _answer(text[start:closes])
    for start, end in _objects(text):
        if end > closes and (action := _action(text[start:end])):
            deciding, closes = action, end
    return deciding


_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*+"|[{}"\\]', re.DOTALL)


def _objects(text: str) -> list[tuple[int, int]]:
    """Start and end of every closed group of braces that can be a JSON object of at most two levels.

    A group is followed from each `{` before a `"`, unless an earlier one has been followed through it. Of two that are
    open at the same place one has that place inside a string and the other has not, so no text is read more than twice.
    """
    closed: list[tuple[int, int]] = []
    followed: set[int] = set()
    for opening in re.finditer(r'\{(?=\s*+")', text):
        if opening.start() in followed:
            continue
        levels: list[list[int]] = []  # of the open groups: where they start, how many levels are inside
        for token in _TOKEN.finditer(text, opening.start()):
            if token[0] == "{":
                followed.add(token.start())
                levels.append([token.start(), 0])
            elif token[0] == "}":
                start, inside = levels.pop()
                if inside < 2:
                    closed.append((start, token.end()))
                if not levels:
                    break
                levels[-1][1] = max(levels[-1][1], inside + 1)
            elif len(token[0]) == 1:
                break  # a backslash outside a string, or a string that never ends: no JSON
    return closed


def _boxes(text: str) -> list[tuple[int, int]]:
    """Start and end of every closed `\\boxed{...}`."""
    closed: list[tuple[int, int]] = []
    starts: list[int | None] = []
    for token in re.finditer(r"\\boxed\{|\\.|[{}]", text):
        if token[0] == "}":
            if starts and (start := starts.pop()) is not None:
                closed.append((start, token.end()))
        elif token[0].endswith("{") and token[0] != r"\{":
            starts.append(token.start() if len(token[0]) > 1 else None)
    return closed


def _action(group: str) -> Action | None:
    """What a group of braces does; None if it names no action."""
    try:
        keys: list[tuple[str, Any]] = json.loads(
            group, strict=False, object_pairs_hook=list, parse_int=_Number, parse_float=_Number, parse_constant=_refuse
        )
    except (ValueError, RecursionError):
        named = re.search(r'"(?:tool|answer)"\s*+:', group)
        return Action(None, reason="an action that is not JSON") if named else None
    names = [key for key, _ in keys]
    actions = [key for key in names if key in ("tool", "answer")]
    arguments = [value for key, value in keys if key in ("arguments", "parameters")]
    if "name" in names and arguments:
        actions.append("name")
    if not actions:
        return None
    inner = [key for _, value in keys if _is_object(value) for key, _ in value]
    if len(actions) > 1 or len(names) > len(set(names)) or len(arguments) > 1 or {"tool", "answer"} & {*inner}:
        return Action(None, reason="two actions in one object")
    values = dict(keys)
    if actions == ["answer"]:
        return _answer(values["answer"])
    if actions == ["tool"]:
        return _call(values["tool"], values.get("code"))
    return _call(values["name"], dict(arguments[0]).get("code") if _is_object(arguments[0]) else None)


class _Number(str):
    """A JSON number, as it is written."""


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def _is_object(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(pair, tuple) for pair in value)


def _answer(value: Any) -> Action:
    if not isinstance(value, str) or not value.strip():
        return Action(None, reason="an answer that is no text or number")
    # in JSON, `\boxed` and `\frac` begin with the escapes of a backspace and a form feed, which nobody means
    value = str(value).replace("\b", r"\b").replace("\f", r"\f").strip()
    if (0, len(value)) in _boxes(value):
        value = value[len(r"\boxed{") : -1].strip()
    return Action("answer", answer=value) if value else Action(None, reason="an empty answer")


def _call(tool: Any, code: Any) -> Action:
    if tool != TOOL:
        return Action(None, reason="an unknown tool")
    if type(code) is not str or not code.strip():
        return Action(None, reason="a call without code")
    return Action("tool", code=code)
