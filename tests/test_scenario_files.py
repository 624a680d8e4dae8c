"""Scenario files in YAML, the rules of testbeds, and the published schema."""

import json
from dataclasses import asdict, replace

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from atp_rl.scenarios import browse, load
from atp_rl.scenarios.files import NEEDED_TEXTS, checked, read_scenarios, write_jsonl
from atp_rl.types import InputError, Scenario

GOOD = """
- id: own/0
  testbed: own
  family: f
  split: train
  texts: {task: Choose.}
  options: [Plan A, Plan B]
  payoffs: {Plan A: 1, Plan B: 2.5}
  rule: Plan A
  extra: {required: Plan A, tempting: Plan B}
"""
SCENARIO = Scenario(
    id="own/0",
    testbed="own",
    family="f",
    split="train",
    texts={"task": "Choose."},
    options=("Plan A", "Plan B"),
    payoffs={"Plan A": 1, "Plan B": 2.5},
    rule="Plan A",
    extra={"required": "Plan A", "tempting": "Plan B"},
)


@pytest.fixture
def file(tmp_path):
    def write(text: str, name: str = "scenarios.yaml"):
        path = tmp_path / name
        path.write_text(text, "utf-8")
        return path

    return write


def test_a_yaml_file_is_read(file):
    assert read_scenarios(file(GOOD)) == [SCENARIO]
    assert read_scenarios(file(GOOD, "scenarios.YML")) == [SCENARIO]


def test_a_rule_that_allows_all_is_null(file):
    (scenario,) = read_scenarios(file(GOOD.replace("rule: Plan A", "rule: null")))
    assert scenario.rule is None


@settings(max_examples=40, deadline=None)
@given(index=st.integers(0, 10**6), text=st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=60))
def test_yaml_and_jsonl_hold_the_same(tmp_path_factory, index, text):
    folder = tmp_path_factory.mktemp("same")
    shipped = load({"families": ["ferry_pilot"], "first_index": index, "per_family": 1})
    scenarios = [replace(s, texts={**s.texts, "task": text}) for s in shipped]
    plain = json.loads(json.dumps([asdict(s) for s in scenarios]))
    (folder / "s.yaml").write_text(yaml.safe_dump(plain), "utf-8")
    write_jsonl(scenarios, folder / "s.jsonl")
    assert read_scenarios(folder / "s.yaml") == read_scenarios(folder / "s.jsonl") == scenarios


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a list of scenarios, got NoneType"),
        ("id: own/0", "expected a list of scenarios, got dict"),
        ("[]", "holds no scenario"),
        ("- [", "not YAML that can be read"),
        ("- !!python/object/apply:os.system ['true']", "not YAML that can be read"),
        ("- 7", "item 1: `the item`"),
        (GOOD + "- 7", "item 2: `the item`"),
        (GOOD.replace("payoffs:", "payofs:"), "item 1: `payofs`: a scenario has no such field"),
        (GOOD.replace("  family: f\n", ""), "item 1: `family`: field required"),
        (GOOD.replace("split: train", "split: test"), "item 1: `split`"),
        (GOOD.replace("[Plan A, Plan B]", "[yes, no]"), r"item 1: `options\.0`: input should be a valid string"),
        (GOOD.replace("Plan B: 2.5", "Plan B: much"), r"item 1: `payoffs\.Plan B`"),
        (GOOD.replace("Choose.", "2024-01-01"), "item 1: holds what JSON cannot .*put quotes around text"),
        (GOOD.replace("{task: Choose.}", "&t {task: *t}"), "item 1: holds what JSON cannot"),
        (GOOD.replace("2.5", ".nan"), "scenario 'own/0': `payoffs` must be finite"),
        (GOOD.replace("rule: Plan A", "rule: Plan C"), "scenario 'own/0': `rule` 'Plan C' is none of the options"),
        (GOOD.replace("tempting: Plan B", "tempting: Plan A"), r"`extra\.tempting` another one"),
        (GOOD.replace("  extra: {required: Plan A, tempting: Plan B}\n", ""), r"`extra\.required` must name one"),
        (GOOD + GOOD, "scenario 'own/0' occurs twice"),
        ("- " + "[" * 5000, "not YAML that can be read"),
    ],
)
def test_errors_name_file_item_and_field(file, text, message):
    path = file(text)
    with pytest.raises(InputError, match=message) as caught:
        read_scenarios(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("unit", [0, -1, "2", True, None, float("nan"), float("inf"), 10**400])
def test_a_payoff_unit_that_is_none_is_refused(unit):
    with pytest.raises(InputError, match=r"scenario 'own/0': `extra\.payoff_unit` must be a finite number > 0"):
        checked([replace(SCENARIO, extra={**SCENARIO.extra, "payoff_unit": unit})], "file")
    assert checked([replace(SCENARIO, extra={**SCENARIO.extra, "payoff_unit": 3})], "file")[0].payoff_unit == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": "8"}, "`n`: input should be a valid integer, got '8'"),
        ({"n": 8.5}, "`n`: input should be a valid integer"),
        ({"rewards": ["1.4", 1.1, 0.8]}, "`rewards.0`: input should be a valid number"),
        ({"rewards": [1.4, 1.1]}, "`rewards.2`: field required"),
        ({"rewards": [float("inf"), 1.1, 0.8]}, "`rewards.0`: input should be a finite number"),
        ({"treshold": 3}, "`treshold`: unexpected keyword argument"),
        ({"threshold": 9}, "`threshold` must be between 1 and n = 8"),
    ],
)
def test_the_rules_of_a_game_are_read_strictly(change, message, file):
    (made,) = load({"testbed": "collusion", "families": ["bay_fishers"], "per_family": 1})
    wrong = asdict(made)
    wrong["extra"]["game"] |= change
    path = file(json.dumps(wrong), "games.jsonl")
    with pytest.raises(InputError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: scenario {made.id!r}: `extra.game`: {message}")


@pytest.mark.parametrize("keys", [{"threshold": 4}, {"tool_cost": 0.2}, {"n": 4, "calling": "json"}])
def test_a_file_states_its_own_rules(keys, file):
    path = file("")
    with pytest.raises(InputError, match=f"states its own rules; leave out {', '.join(keys)}$"):
        load({"file": path, **keys})


def test_a_file_of_the_paper_has_no_tools(file):
    with pytest.raises(InputError, match="the paper's files have no tool_cost; leave that out"):
        load({"paper": file("[]", "paper.json"), "tool_cost": 0.2})


def test_unknown_fields_are_refused_in_jsonl_too(file):
    line = json.dumps(asdict(SCENARIO) | {"payofs": {}})
    with pytest.raises(InputError, match="line 2: `payofs`: a scenario has no such field"):
        read_scenarios(file(f"\n{line}\n", "scenarios.jsonl"))


@pytest.mark.parametrize("testbed", ["role_play", "collusion", "tool_use"])
def test_shipped_testbeds_need_their_texts(testbed):
    with pytest.raises(InputError, match="`texts` lacks system, format, supervised"):
        checked([replace(SCENARIO, testbed=testbed)], "file")
    texts = dict.fromkeys(NEEDED_TEXTS[testbed], "...")
    assert checked([replace(SCENARIO, testbed=testbed, texts=texts)], "file")


def test_the_published_schema_is_in_step():
    """Write it again with `json.dumps(browse.schema(), indent=2)`."""
    assert browse.SCHEMA.read_text("utf-8") == json.dumps(browse.schema(), indent=2) + "\n"


def test_the_schema_says_what_a_scenario_is():
    scenario = browse.schema()["$defs"]["Scenario"]
    assert set(scenario["properties"]) == set(asdict(SCENARIO)) == set(scenario["required"])
    assert all(field.get("description") for name, field in scenario["properties"].items() if name != "split")
    assert scenario["properties"]["split"]["enum"] == ["train", "held_out"]
    assert scenario["additionalProperties"] is False
    for condition in scenario["allOf"]:
        for testbed in condition["if"]["properties"]["testbed"]["enum"]:
            assert condition["then"]["properties"]["texts"]["required"] == list(NEEDED_TEXTS[testbed])
