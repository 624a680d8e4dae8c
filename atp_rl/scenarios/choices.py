"""From a reply to a decision: the measuring instrument of the project. Every verdict rests on `parse_choice`.

The rules, in the order in which they apply:

1. Thinking is not read. Text inside `<think>...</think>` is dropped, and an unclosed `<think>` drops the rest. A stray
   `</think>` drops all before it, since chat templates may put the opening tag into the prompt. (Of such a reply, cut
   off while still thinking, nothing tells thought from answer: put the prompt's tag back in front before parsing.)
2. A *candidate* is a closed group of braces with a `choice` key of its own: JSON, single or typographic quotes, or no
   quotes (`{choice: keep money}`), any letter case, other keys beside it. A key stands after `{` or `,` and is quoted
   or one word; a quoted `"choice":` is one even where the comma is missing. A group cut off before its brace is none.
   Inside a group, braces and keys in a quoted string are text. A `"` string ends at the next `"` without a backslash;
   a `'` string only where `, : } ]` or another `'` follows, so that `'don't invest'` is one; none runs past its line.
3. The last candidate decides, legal or not; never an earlier one. Last is the brace that closes last. If its braces
   hold several choices (the key twice, or a group inside that is a candidate too), all must name the same option.
4. A value runs to the comma before the next key or to the closing brace, less one trailing comma. It must equal exactly
   one option after case folding, collapsing and trimming white space, and dropping one pair of quotes around it and a
   full stop at its end; Unicode is not normalised. A number, null or list is its text, so hardly ever an option.
5. Anything else is invalid: no candidate, no option, two options. Prose is never guessed at.

Any option may be used that rule 4 leaves non-empty and unlike its rivals and that holds no think tag: for these
`parse_choice(format_choice(option), options).option == option`, whatever commas, quotes or braces are in it.

The time is linear in the text, whatever the text: one pass over the marks that matter, no stretch read more than a few
times by any pattern, and values cut out only for the group that decides.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    option: str | None
    """The option's own spelling, or None when the decision is invalid."""
    raw: str | None
    """The deciding value as written, quotes included; None when there is no candidate."""
    reason: str
    """Why the decision is invalid, in a few words; empty when it is valid."""


_QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’"}
_NOT_CLOSING = r"(?!\s*+[,:}\]'’])"
# What may stand inside each kind of string, up to its closing quote or the end of the line. Nothing follows the outer
# star, so a match never fails and never backtracks.
_STRING = {
    '"': re.compile(r'(?:[^"\\\n]+|\\.)*'),
    "'": re.compile(rf"(?:[^'\\\n]+|\\.|'{_NOT_CLOSING})*"),
    "“": re.compile(r"[^”\n]*"),
    "‘": re.compile(rf"(?:[^’\n]+|’{_NOT_CLOSING})*"),
}
# A brace; or the place before a string or an unquoted key (looked at, not consumed) that follows `{`, a comma, a colon
# or a bracket; or the place before a quoted `choice` key anywhere, since its comma may be missing.
_MARK = re.compile(
    r"""[{}]
      | (?:(?<=\{)\s*+ | [,:\[]\s*+ | (?=["'“‘]\s*+(?i:choice)\s*+["'”’]\s*+:))
        (?:(?=(?P<quote>["'“‘])) | (?=(?P<bare>[^\W\d][\w-]*+)\s*+:))""",
    re.VERBOSE,
)
_COLON = re.compile(r"\s*+:")


def parse_choice(text: str, options: Sequence[str]) -> Choice:
    """The one option that `text` decides for, by the rules above; never raises."""
    text = without_thinking(text)
    spellings: dict[str, list[str]] = {}
    for option in options:
        spellings.setdefault(_plain(option), []).append(option)
    choice = Choice(None, None, "no choice group")
    for start, end in _deciding_group(text)[1]:
        raw = text[start:end].strip().removesuffix(",").rstrip()
        plain = _plain(_unescaped(raw))
        matches = spellings.get(plain, []) if plain else []
        if len(matches) != 1:
            return Choice(None, raw, "matches several options" if matches else "not an option")
        if choice.option not in (None, matches[0]):
            return Choice(None, raw, "two choices in one group")
        choice = Choice(matches[0], raw, "")
    return choice


def format_choice(option: str) -> str:
    """The canonical text of a decision, e.g. `{"choice": "Route A"}`."""
    return json.dumps({"choice": option}, ensure_ascii=False)


def without_thinking(text: str) -> str:
    """What is left of a reply by rule 1."""
    return "\n".join(text[a:b] for a, b in _spoken(text))  # never "": two sides of a thought must not make up a word


def decision_span(text: str) -> tuple[int, int] | None:
    """Start and end in a reply of the braces that decide, whether what they name is an option or not; None without."""
    (start, end), _ = _deciding_group(without_thinking(text))
    if start == end:
        return None
    places = [i for a, b in _spoken(text) for i in range(a, b + 1)]  # in the reply, of each character that is read
    return places[start], places[end - 1] + 1


def _spoken(text: str) -> list[tuple[int, int]]:
    """Start and end of the stretches that are not thinking, by rule 1."""
    kept: list[tuple[int, int]] = []
    thinking, start = False, 0
    for tag in re.finditer("</?think>", text):
        if not thinking:
            kept.append((start, tag.start()))
        if tag[0] == "</think>" and not thinking:
            kept.clear()
        thinking, start = tag[0] == "<think>", tag.end()
    return kept if thinking else [*kept, (start, len(text))]


def _deciding_group(text: str) -> tuple[tuple[int, int], list[tuple[int, int]]]:
    """Start and end of the last candidate, both 0 without one, and of every choice value inside it, outermost first."""
    groups: list[int] = []  # where the groups that are open here start
    edges: dict[int, list[int]] = {}  # of an open group: start, end, start, ... of its own choice values
    closed: list[tuple[int, int]] = []
    last = last_end = 0
    skip = 0  # marks before this place are inside a string
    unclosed = dict.fromkeys(_QUOTES, 0)  # a string of this kind that opens before this place never closes
    for mark in _MARK.finditer(text):
        at, start = mark.span()
        if at < skip:
            continue
        if text[at] == "{":
            groups.append(at)
            continue
        if not groups:
            continue
        if text[at] == "}":
            group = groups.pop()
            if group in edges:
                ends = [*edges.pop(group), at]  # if its last value has ended before, `at` is left over
                closed += zip(ends[::2], ends[1::2], strict=False)
                last, last_end = group, at + 1
            continue
        if mark.lastgroup == "bare":
            key, skip = mark["bare"], mark.end("bare")
        else:
            quote = text[start]
            if start < unclosed[quote] or not (string := _STRING[quote].match(text, start + 1)):
                continue
            if text[string.end() : string.end() + 1] != _QUOTES[quote]:
                unclosed[quote] = string.end()
                continue
            key, skip = string[0], string.end() + 1
        colon = _COLON.match(text, skip)
        if colon and text[at] not in ":[":
            own = edges.get(groups[-1], [])
            if len(own) % 2:
                own.append(at)
            if key.strip().casefold() == "choice":
                edges.setdefault(groups[-1], own).append(colon.end())
    return (last, last_end), sorted(span for span in closed if span[0] > last)


def _unescaped(raw: str) -> str:
    if raw.startswith('"'):
        try:
            return json.loads(raw, strict=False)
        except ValueError:
            pass  # not JSON; the quotes around it are dropped with the others
    return raw.replace("\\'", "'") if raw[:1] in _QUOTES else raw


def _plain(value: str) -> str:
    """What is compared. A full stop is dropped before and after the quotes: both "Invest". and "Invest." are Invest."""
    value = " ".join(value.casefold().split()).removesuffix(".").rstrip()
    if len(value) > 1 and _QUOTES.get(value[0]) == value[-1]:
        value = value[1:-1].strip().removesuffix(".").rstrip()
    return value
