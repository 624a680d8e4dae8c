"""The parser of tool actions by hand (one row per rule and per doubt), by property, and by the clock."""

import time

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from atp_rl.scenarios.actions import Action, format_answer, format_tool, parse_action

CODE = "print(3)"
CALL = '{"tool": "python", "code": "print(3)"}'

CALLS = [
    (CALL, CODE),
    (f"I compute.\n```json\n{CALL}\n```\nWait.", CODE),
    ('{"code": "print(3)", "why": "sure", "tool": "python"}', CODE),  # other keys, any order
    ('{"tool": "python", "code": "a = {1: 2}\\nprint(\\"{\\", a)"}', 'a = {1: 2}\nprint("{", a)'),
    ('{"tool": "python", "code": "a = 1\nprint(a)"}', "a = 1\nprint(a)"),  # raw line breaks in a string
    ('<tool_call>\n{"name": "python", "arguments": {"code": "print(3)"}}\n</tool_call>', CODE),
    ('{"name": "python", "arguments": {"code": "print(3)"}}', CODE),
    ('{"name": "python", "parameters": {"code": "print(3)"}}', CODE),
    ('{"type": "function", "name": "python", "parameters": {"code": "print(3)"}}', CODE),
    ("<|python_tag|>print(3)", CODE),
    ('<|python_tag|>\nprint({"answer": 5})\n', 'print({"answer": 5})'),  # all of it is code
    ('<|python_tag|>{"name": "python", "parameters": {"code": "print(3)"}}', CODE),
    (f"<think>{format_answer('3')}</think>{CALL}", CODE),
    (f'{{"answer": "3"}} or rather {CALL}', CODE),  # the last one decides
    (f"\\boxed{{3}} {CALL}", CODE),
]

ANSWERS = [
    ('{"answer": "3"}', "3"),
    ('{"answer": 3}', "3"),
    ('{"answer": -0.10}', "-0.10"),  # a number counts as it is written
    ('{"answer": 12345678901234567890123}', "12345678901234567890123"),
    ('{"answer": " 2 × 3\\n"}', "2 × 3"),
    ('It is {"steps": "two", "answer": "3"}, I think {not sure}.', "3"),
    ('{"final": {"answer": "3"}}', "3"),  # inside another object
    (f'{CALL} shows {{"answer": "3"}}', "3"),
    ('<think>{"answer": "4"}</think>{"answer": "3"}', "3"),
    ('{"answer": "4"}</think>{"answer": "3"}', "3"),
    (r"So it is \boxed{3}.", "3"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{4} no, \boxed{3}", "3"),
    (r'{"answer": "4"} no, \boxed{3}', "3"),
    (r'\boxed{4} no, {"answer": "3"}', "3"),
    (r'{"answer": "\\boxed{3}"}', "3"),
    (r'{"answer": "\boxed{3}"}', "3"),  # \b is JSON's backspace
    (r'{"answer": "\frac{1}{2}"}', r"\frac{1}{2}"),  # \f is JSON's form feed
    ('He said {"hm {"answer": "3"}', "3"),  # a string that never ends swallows nothing
    ('{"answer": "3"} {"tool": "python", "code": "prin', "3"),  # cut off: none
]

INVALID = [
    ("", "no action"),
    ("The answer is 3.", "no action"),
    ("```python\nprint(3)\n```", "no action"),
    ("answer: 3", "no action"),
    ("{'answer': '3'}", "no action"),  # not JSON
    ("{answer: 3}", "no action"),
    ('{"tool": "python", "code": "print(3)"', "no action"),
    ('<think>{"answer": "3"}', "no action"),
    ("<tool_call>print(3)</tool_call>", "no action"),
    ('{"name": "python"}', "no action"),
    (r"\boxed{3", "no action"),
    (r"\boxed{ }", "an empty answer"),
    ('{"answer": ""}', "an answer that is no text or number"),
    ('{"answer": " "}', "an answer that is no text or number"),
    (r'{"answer": "\\boxed{}"}', "an empty answer"),
    ('{"answer": null}', "an answer that is no text or number"),
    ('{"answer": true}', "an answer that is no text or number"),
    ('{"answer": [3]}', "an answer that is no text or number"),
    ('{"answer": {"value": 3}}', "an answer that is no text or number"),
    ('{"answer": NaN}', "an action that is not JSON"),
    (r'{"answer": "\sqrt{3}"}', "an action that is not JSON"),
    ('{"answer": "3",}', "an action that is not JSON"),
    (f'{{"answer": {"[" * 100_000}{"]" * 100_000}}}', "an action that is not JSON"),
    ('{"answer": "4"} {"answer": "3",}', "an action that is not JSON"),  # never an earlier one
    ('{"answer": "3", "answer": "3"}', "two actions in one object"),
    ('{"answer": "3", "tool": "python", "code": "print(3)"}', "two actions in one object"),
    ('{"tool": "python", "code": "print(3)", "then": {"answer": "3"}}', "two actions in one object"),
    ('{"tool": "bash", "code": "ls"}', "an unknown tool"),
    ('{"tool": "Python", "code": "print(3)"}', "an unknown tool"),
    ('{"tool": null, "code": "print(3)"}', "an unknown tool"),
    ('{"name": "search", "arguments": {"code": "print(3)"}}', "an unknown tool"),
    ('{"tool": "python"}', "a call without code"),
    ('{"tool": "python", "code": ""}', "a call without code"),
    ('{"tool": "python", "code": 3}', "a call without code"),
    ('{"name": "python", "arguments": "print(3)"}', "a call without code"),
    ('{"name": "python", "arguments": {"source": "print(3)"}}', "a call without code"),
    ('{"answer": "3"} {"tool": "python", "code": ""}', "a call without code"),
    ("<|python_tag|>", "a call without code"),
]


@pytest.mark.parametrize(("text", "code"), CALLS)
def test_calls(text, code):
    assert parse_action(text) == Action("tool", code=code)


@pytest.mark.parametrize(("text", "answer"), ANSWERS)
def test_answers(text, answer):
    assert parse_action(text) == Action("answer", answer=answer)


@pytest.mark.parametrize(("text", "reason"), INVALID)
def test_everything_else_is_invalid(text, reason):
    assert parse_action(text) == Action(None, reason=reason)


def test_the_canonical_texts():
    assert format_tool('print("é")\n') == '{"tool": "python", "code": "print(\\"é\\")\\n"}'
    assert format_answer("3") == '{"answer": "3"}'


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
PIECES = st.lists(
    st.sampled_from(
        [*'{}":,\\ \n', "tool", "python", "code", "answer", "name", "arguments", r"\boxed{", "<think>", "</think>", "3"]
    )
    | TEXT,
    max_size=40,
).map("".join)


@given(TEXT, PIECES)
def test_the_canonical_texts_are_read_back_whatever_stands_before_them(text, before):
    assume(text.strip() and not any(tag in text + before for tag in ("<think>", "</think>")))
    assume(not before.strip().startswith("<|python_tag|>"))
    assume("{" not in before)  # what is open before an action may hold it
    assert parse_action(f"{before}\n{format_tool(text)}") == Action("tool", code=text)


@given(TEXT)
def test_canonical_answers_are_read_back(text):
    assume(text.strip() and not any(odd in text for odd in ("<think>", "</think>", "\\boxed{", "\b", "\f")))
    assert parse_action(format_answer(text)) == Action("answer", answer=text.strip())


@given(PIECES)
@settings(max_examples=300)
def test_whatever_the_text_it_never_raises_and_is_one_thing(text):
    action = parse_action(text)
    assert (action.kind == "tool") == bool(action.code)
    assert (action.kind == "answer") == bool(action.answer)
    assert (action.kind is None) == bool(action.reason)


@given(PIECES, st.sampled_from([CALL, '{"answer": "3"}', r"\boxed{3}"]))
def test_text_after_an_action_that_closes_nothing_changes_nothing(text, action):
    after = "".join(c for c in text if c not in "}<>")
    assert parse_action(f"{action} {after}") == parse_action(action)


@pytest.mark.parametrize(
    "unit",
    ['{"a":', '{"', '{"a":"{",', '{"answer":"', '{"answer":', "\\boxed{", '{"tool":{', '{"a":{"a":1},', "\\", "{ "],
)
def test_the_time_is_linear_in_the_text(unit):
    def seconds(text):
        begun = time.perf_counter()
        parse_action(text)
        return time.perf_counter() - begun

    short, long = (min(seconds(unit * n + "}" * m) for _ in range(3) for m in (0, n)) for n in (2_000, 32_000))
    assert long < 16 * 6 * short + 0.5  # quadratic would be minutes
