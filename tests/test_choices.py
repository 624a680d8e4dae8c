"""The parser by hand (one row per rule and per doubt), by property, and by the clock."""

import json
import time

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from atp_rl.scenarios.choices import Choice, _plain, decision_span, format_choice, parse_choice

ROUTES = ("Route A", "Route B")
MONEY = ("keep money", "invest")
ODD = (
    "Don't wait, act",
    "Wait, watch, and report",
    "pay 12.5",
    "Mr. K",
    "semi-open",
    "7",
    "null",
    "say “no”",
    "a {b} c",
)
A, B = ROUTES

CASES = [
    # --- the plain forms
    ('{"choice": "Route A"}', ROUTES, A),
    ('I will go. {"choice": "Route B"} Done.', ROUTES, B),
    ('```json\n{\n  "choice": "Route A"\n}\n```', ROUTES, A),
    ("{'choice': 'Route A'}", ROUTES, A),
    ("{“choice”: “Route A”}", ROUTES, A),  # typographic quotes
    ("{‘choice’: ‘Route A’}", ROUTES, A),
    ("{choice: invest}", MONEY, "invest"),
    ('{"choice": keep money}', MONEY, "keep money"),
    ("{choice:'invest'}", MONEY, "invest"),
    ('{"Choice": "Route A"}', ROUTES, A),
    ("{CHOICE : Route B }", ROUTES, B),
    ('{" choice ": "Route A"}', ROUTES, A),
    ('{"choice": "\\u0052oute A"}', ROUTES, A),  # JSON escapes are decoded
    # --- the value: case, white space, one full stop, one pair of quotes
    ('{"choice": "  rOUTE \\n a "}', ROUTES, A),
    ('{"choice": "Route\nA"}', ROUTES, A),  # a line break in a string is not JSON, but the value is plain
    ('{"choice": "Route A."}', ROUTES, A),
    ('{"choice": "Route A".}', ROUTES, A),
    ("{choice: Route A.}", ROUTES, A),
    ('{"choice": "\'Route A\'"}', ROUTES, A),
    ('{"choice": "Route A..."}', ROUTES, None),
    ('{"choice": "Route A!"}', ROUTES, None),
    ('{"choice": "**Route A**"}', ROUTES, None),
    ('{"choice": "A"}', ROUTES, None),  # part of an option
    ('{"choice": "Route A (safe)"}', ROUTES, None),
    ('{"choice": "Route A}', ROUTES, None),  # half a pair of quotes
    ('{"choice": "STRASSE"}', ("Straße", "Weg"), "Straße"),  # case folding, not lower case
    ('{"choice": "\u00a0Route\u2003A"}', ROUTES, A),  # white space is Unicode's
    ('{"choice": "cafe\u0301"}', ("café", "bar"), None),  # no Unicode normalisation
    # --- no decision
    ("", ROUTES, None),
    ("Route A", ROUTES, None),
    ("choice: Route A", ROUTES, None),
    ('"choice": "Route A"', ROUTES, None),
    ("I choose {Route A}.", ROUTES, None),
    ('{"choices": "Route A"}', ROUTES, None),
    ('{"my choice": "Route A"}', ROUTES, None),
    ("{the best choice: Route A}", ROUTES, None),  # prose in braces
    ('["choice", "Route A"]', ROUTES, None),
    ("{choice = Route A}", ROUTES, None),
    ('{"choice"}', ROUTES, None),
    ("{choice:}", ROUTES, None),
    ('{"choice": ""}', ("", "."), None),  # an empty value decides for nothing
    # --- two options in one value, and values that are not strings
    ('{"choice": "Route A or Route B"}', ROUTES, None),
    ('{"choice": "Route A" or "Route B"}', ROUTES, None),
    ('{"choice": "Route A", "Route B"}', ROUTES, None),
    ('{"choice": ["Route A", "Route B"]}', ROUTES, None),
    ('{"choice": ["Route A"]}', ROUTES, None),
    ('{"choice": 1}', ROUTES, None),
    ('{"choice": null}', ROUTES, None),
    ('{"choice": 7}', ODD, "7"),  # literally that number's text
    ('{"choice": 7.0}', ODD, None),
    ('{"choice": null}', ODD, "null"),
    # --- further keys, and where an unquoted value ends
    ('{"reason": "cheap, quick", "choice": "Route A", "sure": true}', ROUTES, A),
    ("{choice: Route A, reason: it is quick}", ROUTES, A),
    ('{choice: Route A, "my reason": it is quick}', ROUTES, A),
    ("{reason: it is quick, choice: Route A}", ROUTES, A),
    ("{choice: Route A, because it is quick}", ROUTES, None),  # no key follows the comma
    ('{"choice": "Route A",}', ROUTES, A),  # a trailing comma
    ("{choice: Wait, watch, and report}", ODD, ODD[1]),
    ("{choice: wait, watch, and report, why: habit}", ODD, ODD[1]),
    ("{choice: Don't wait, act}", ODD, ODD[0]),
    ("{'choice': 'Don't wait, act'}", ODD, ODD[0]),
    ("{'choice': 'Don\\'t wait, act'}", ODD, ODD[0]),
    ('{"choice": "Don\\\'t wait, act"}', ODD, ODD[0]),  # \' is not JSON, but is written
    ("{choice: pay 12.5, n: 1}", ODD, "pay 12.5"),
    ("{choice: mr. k.}", ODD, "Mr. K"),
    ("{choice: Semi-Open}", ODD, "semi-open"),
    ('{"choice": "say “no”"}', ODD, "say “no”"),
    ('{"choice": "the "safe" one"}', ('the "safe" one', "x"), 'the "safe" one'),  # quotes that lack their escapes
    ('{"reason": "the commas" "choice": "Route A"}', ROUTES, A),  # no comma, yet plainly a key
    ("{'reason': 'the commas' 'choice': 'Route A'}", ROUTES, A),
    ('{"choice": "Route B"} {"n": 5 "choice": "Route C"}', ROUTES, None),  # so it overrides an earlier one as well
    # --- braces and keys inside strings are text
    ('{"reason": "a } here", "choice": "Route A"}', ROUTES, A),
    ('{"reason": "a { here", "choice": "Route A"}', ROUTES, A),
    ('{"steps": ["a {", \'b }\'], "choice": "Route A"}', ROUTES, A),
    ('{"choice": "a {b} c"}', ODD, "a {b} c"),
    ('{"choice": "Route A", "reason": "not {choice: Route B}"}', ROUTES, A),
    ('{"reason": "x, choice: Route B", "choice": "Route A"}', ROUTES, A),
    ('{"a\\"b": "\\\\", "choice": "Route A", "c\\"d": 1}', ROUTES, A),
    ('{"answer": "{\\"choice\\": \\"Route A\\"}"}', ROUTES, None),
    ('My answer: "{"choice": "Route A"}"', ROUTES, A),  # outside braces a quote means nothing
    ('I don\'t mind: \'{"choice": "Route A"}\'', ROUTES, A),
    ('{"choice": "Route A}\n{"choice": "Route B"}', ROUTES, B),  # an unclosed string ends with its line
    # --- the last candidate decides, legal or not
    ('{"choice": "Route A"} no: {"choice": "Route B"}', ROUTES, B),
    ('{"choice": "Route A"}{"choice": "Route C"}', ROUTES, None),
    ('{"choice": "Route A"} {"choice": null}', ROUTES, None),
    ('{"choice": "Route A"} {"sure": true} {Route B}', ROUTES, A),  # groups without the key are no candidates
    ('{"choice": "Route A"} {"choice": "Route B', ROUTES, A),  # neither is one that was cut off
    ('{"choice": "Route A"} {"choice": "Route B"', ROUTES, A),
    ('{"choice": "Route B"', ROUTES, None),
    # --- the key twice
    ('{"choice": "Route A", "choice": "Route B"}', ROUTES, None),
    ('{"choice": "Route A", "Choice": "route a."}', ROUTES, A),
    ('{"choice": "Route C", "choice": "Route A"}', ROUTES, None),
    # --- groups in groups
    ('{"answer": {"choice": "Route A"}}', ROUTES, A),
    ('{"answer": {"choice": "Route A"}, "n": {"x": 1}}', ROUTES, A),
    ('{{"choice": "Route A"}}', ROUTES, A),  # a template's doubled braces
    ('{"steps": [{"choice": "Route A"}, {"choice": "Route B"}]}', ROUTES, B),
    ('{"choice": "Route A", "rejected": {"choice": "Route B"}}', ROUTES, None),  # which was meant is a guess
    ('{"rejected": {"choice": "Route B"}, "choice": "Route A"}', ROUTES, None),
    ('{"choice": "Route A", "again": {"choice": "Route A"}}', ROUTES, A),
    ('{"choice": {"choice": "Route A"}}', ROUTES, None),  # the outer value is a group, not an option
    ('{"choice": {"name": "Route A"}}', ROUTES, None),
    ('{"x": {"n": 1}, "choice": "Route A"}', ROUTES, A),
    ('{ a stray brace. {"choice": "Route A"}', ROUTES, A),
    ('} {"choice": "Route A"} }', ROUTES, A),
    ('Sad :{ but {"choice": "Route A"}', ROUTES, A),
    # --- thinking
    ('<think>{"choice": "Route B"}</think>{"choice": "Route A"}', ROUTES, A),
    ('{"choice": "Route A"}<think>{"choice": "Route B"}</think>', ROUTES, A),
    ('{"choice": "Route A"}<think>{"choice": "Route B"}', ROUTES, A),  # unclosed: swallows the rest
    ('<think>so {"choice": "Route A"}', ROUTES, None),
    ('so {"choice": "Route B"}</think>{"choice": "Route A"}', ROUTES, A),  # the opening tag was in the prompt
    ('so {"choice": "Route B"}</think>', ROUTES, None),
    ('<think>a<think>b</think>{"choice": "Route B"}</think>{"choice": "Route A"}', ROUTES, A),  # tags do not nest
    ('<think></think>{"choice": "Route A"}', ROUTES, A),
    ('{"choice": "Ro<think>x</think>ute A"}', ROUTES, None),  # a thought is not glue
    # --- options that are alike
    ('{"choice": "Stop"}', ("stop", "STOP"), None),
    ('{"choice": "Stop"}', ("Stop", "Stop."), None),
    ('{"choice": "go"}', ("Stop", "Stop.", "go"), "go"),  # the others are not harmed
]


@pytest.mark.parametrize(("text", "options", "expected"), CASES)
def test_parse_choice_by_hand(text, options, expected):
    choice = parse_choice(text, options)
    assert choice.option == expected
    assert (choice.reason == "") == (expected is not None)


def test_raw_and_reason():
    assert parse_choice('{"choice": "route a."}', ROUTES) == Choice(A, '"route a."', "")
    assert parse_choice("{choice: Route C, n: 1}", ROUTES) == Choice(None, "Route C", "not an option")
    assert parse_choice("{choice: x}", ("x", "X")) == Choice(None, "x", "matches several options")
    assert parse_choice('{"choice": "Route A", "choice": Route B}', ROUTES).reason == "two choices in one group"
    assert parse_choice("Route A", ROUTES) == Choice(None, None, "no choice group")


def test_format_choice():
    assert format_choice("Route A") == '{"choice": "Route A"}'
    assert format_choice('“é” "x"') == '{"choice": "“é” \\"x\\""}'


MARKS = ["{", "}", '"', "'", "“", "’", ":", ",", "[", "]", "\\", "\n", " ", ".", "<think>", "</think>"]
WORDS = ["choice", '{"choice": ', '"choice": "Route A"', "Route A", "Route B", "a", "é"]
soup = st.lists(st.sampled_from(MARKS + WORDS), max_size=40).map("".join)
anything = st.one_of(st.text(), soup)
prose = anything.map(lambda text: text.replace("{", "").replace("}", "").replace(">", ""))
legal = anything.filter(lambda option: _plain(option) != "" and "think>" not in option)
legal_options = st.lists(legal, min_size=1, max_size=4, unique_by=_plain)


@settings(deadline=None)
@given(anything, st.lists(anything, max_size=3))
def test_never_raises_and_is_consistent(text, options):
    choice = parse_choice(text, options)
    assert (choice.option is None) == (choice.reason != "")
    assert choice.option is None or choice.option in options


@settings(deadline=None)
@given(legal_options, prose, prose, st.data())
def test_round_trip_within_prose(options, before, after, data):
    option = data.draw(st.sampled_from(options))
    assert parse_choice(before + format_choice(option) + after, options).option == option


@settings(deadline=None)
@given(soup, prose)
def test_prose_after_a_closed_reply_changes_nothing(text, after):
    assume("think>" not in text)
    closed = text + "\n" + format_choice(A)
    assert parse_choice(closed + after, ROUTES) == parse_choice(closed, ROUTES)


@settings(deadline=None)
@given(anything)
def test_thinking_alone_is_invalid(text):
    assume("think>" not in text)
    assert parse_choice(f"<think>{text}</think>", ROUTES).reason == "no choice group"
    assert parse_choice(f"{text}{format_choice(A)}</think>", ROUTES).reason == "no choice group"


@settings(deadline=None)
@given(legal_options, prose, st.data())
def test_a_later_candidate_overrides(options, between, data):
    first, second = data.draw(st.sampled_from(options)), data.draw(st.sampled_from([*options, None]))
    text = format_choice(first) + between + ('{"choice": [1]}' if second is None else format_choice(second))
    assume("[1]" not in map(_plain, options))
    assert parse_choice(text, options).option == second


leaves = st.none() | st.booleans() | st.integers() | anything
keys = anything.filter(lambda key: key.strip().casefold() != "choice")
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3), max_leaves=6
)


@settings(deadline=None)
@given(
    st.dictionaries(keys, values, max_size=4),
    st.dictionaries(keys, values, max_size=4),
    st.sampled_from(ODD),
    st.booleans(),
    st.sampled_from([None, 2]),
)
def test_any_json_object_reads_as_json(before, after, option, ascii_only, indent):
    """The reference is the json module: whatever stands beside the key, and however it is quoted."""
    for key in before:
        after.pop(key, None)
    text = json.dumps(before | {"choice": option} | after, ensure_ascii=ascii_only, indent=indent)
    assume("think>" not in text)
    assert parse_choice(text, ODD).option == option


ADVERSARIAL = [
    *["{", "}", '"', "'", "“", "‘", "\\", "\n", " ", ",", ":", "[", "<think>", "</think>", "<think></think>"],
    *['{"choice": ', '{"choice": "', "{choice: x", '{"choice": "a"}', '{"choice": "a",', '"choice":', ' "choice": a'],
    *['{"', "{'", "{“", "{‘", '{"a": \'', ",'", ':"', "{'a", "{“a", "{‘a", ":'a' b", ':"\\"', ":'\\", "{'a'\n", "{'' "],
    *["{a ", "{a:", "{ choice :", "{\n", ",\n", "' ", '"choice" ', "{“choice”:‘", "a,b", "é", "</thin", "{choice: {"],
]


def seconds(text: str) -> float:
    start = time.process_time()
    parse_choice(text, ROUTES)
    return time.process_time() - start


def adversarial(unit: str, size: int) -> list[str]:
    """A unit over and over: bare, inside a group, closed again, and as one long stretch between two rare marks."""
    many = unit * (size // len(unit))
    half = many[: size // 2]
    return [
        many,
        '{"choice": ' + many,
        half + "}" * (size // 2),
        "{'" + many + "}",
        '{"choice": "Route A", ' + many + "}",
    ]


MEGABYTE = [
    "{",
    "{'",
    "{a:",
    '{"',
    ":",
    '{"choice": ',
    '{"choice": "a"}',
    '{"choice": "a",',
    ":'a' b",
    "<think>",
    "\\",
    "\n",
]


@pytest.mark.parametrize("unit", MEGABYTE)
def test_a_megabyte_takes_less_than_a_second(unit):
    for text in adversarial(unit, 10**6)[:3]:
        assert seconds(text) < 1


@pytest.mark.parametrize("unit", ADVERSARIAL)
def test_nothing_is_quadratic(unit):
    """A tenth of a megabyte takes at most 0.08 s where the time is linear, and seconds where it is not."""
    for text in adversarial(unit, 10**5):
        assert any(seconds(text) < 0.4 for _ in range(3))  # a busy machine can be slow once


def test_twice_the_text_takes_at_most_three_times_as_long():
    def best(text: str) -> float:
        return min(seconds(text) for _ in range(3))

    for variant in range(5):
        once, unit = max((best(adversarial(unit, 60_000)[variant]), unit) for unit in MEGABYTE)
        assert best(adversarial(unit, 120_000)[variant]) < 3 * once


@pytest.mark.parametrize(
    ("before", "decision", "after"),
    [
        ("", '{"choice": "Route A"}', ""),
        ('{"choice": "Route B"} no: ', '{"choice": "Route A"}', " Done."),
        ('<think>{"choice": "Route B"}</think>\n', '{"why": {"x": "}"}, "choice": "Route A"}', "<think>{choice: no}"),
        ('{"choice": "Route B"}</think>', "{choice: neither}", ""),
        ("{ {a: b} ", '{"choice": <think>hm</think> "Route A"}', " }"),
    ],
)
def test_the_span_of_a_decision(before, decision, after):
    start, end = len(before), len(before) + len(decision)
    assert decision_span(before + decision + after) == (start, end)


@pytest.mark.parametrize("text", ["", "Route A", '{"choice": "Route A"', '<think>{"choice": "Route A"}</think>'])
def test_a_reply_without_a_decision_has_no_span(text):
    assert decision_span(text) is None


@given(st.lists(st.sampled_from([*"ab{}:,\"'", "choice", "<think>", "</think>", '{"choice": "Route A"}']), max_size=20))
@settings(max_examples=300, deadline=None)
def test_a_span_reads_as_the_whole_reply(pieces):
    text = "".join(pieces)
    span, whole = decision_span(text), parse_choice(text, ROUTES)
    assert (span is None) == (whole.raw is None)
    if span is not None:
        assert parse_choice(text[slice(*span)], ROUTES) == whole
