"""`atp scenarios`, through its Typer app."""

from dataclasses import replace

import pytest
from typer.testing import CliRunner

from atp_rl.scenarios import load
from atp_rl.scenarios.files import write_jsonl
from atp_rl.scenarios_cli import app
from atp_rl.types import InputError


def run(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def refused(*arguments, message):
    """Ends with InputError, which `atp` turns into a message and exit code 2."""
    with pytest.raises(InputError, match=message):
        run(*arguments)


@pytest.fixture
def scenarios():
    return load({"families": ["ferry_pilot", "archivist"], "per_family": 2})


@pytest.fixture
def file(tmp_path, scenarios):
    path = tmp_path / "mine.jsonl"
    write_jsonl(scenarios, path)
    return path


def test_a_file_that_can_be_played(file):
    assert run("validate", file) == (
        f"{file}: 4 scenarios (4 role_play; 2 held_out, 2 train) of 2 families can be played\n"
    )


def test_a_file_that_cannot_be_read(tmp_path):
    refused("validate", tmp_path / "none.yaml", message=r"none\.yaml: cannot be read as a scenario file")


def test_a_file_of_another_testbed(tmp_path, scenarios):
    path = tmp_path / "mine.jsonl"
    write_jsonl([replace(scenarios[0], testbed="role_pay")], path)
    for command in (("validate", path), ("list", "--file", path), ("show", scenarios[0].id, "--file", path)):
        refused(*command, message=r"mine\.jsonl: scenario .*: unknown testbed 'role_pay'; did you mean 'role_play'")


def test_a_file_whose_rules_the_testbed_cannot_play(tmp_path, scenarios):
    path = tmp_path / "mine.jsonl"
    write_jsonl([replace(scenarios[0], testbed="collusion")], path)  # no game
    refused("validate", path, message=r"mine\.jsonl: .*game")


def test_the_table_has_one_scenario_a_family():
    lines = [line for line in run("list").splitlines() if "role_play/" in line]
    assert len(lines) == len(load({"per_family": 1}))
    assert any("role_play/ferry_pilot/0" in line and "train" in line for line in lines)


def test_the_table_of_a_split():
    shown = run("list", "--split", "held_out")
    assert "role_play/archivist/0" in shown
    assert "ferry_pilot" not in shown


def test_the_table_of_another_testbed():
    assert "collusion/taxi_rank/0" in run("list", "--testbed", "collusion")


def test_the_table_of_a_file(file, scenarios):
    shown = run("list", "--file", file)
    assert all(scenario.id in shown for scenario in scenarios)
    assert "ferry_pilot" not in run("list", "--file", file, "--split", "held_out")
    assert "ferry_pilot" not in run("list", "--file", file, "--testbed", "collusion")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("--testbed", "role_pay", "unknown testbed 'role_pay'"), ("--split", "test", "unknown split 'test'")],
)
def test_unknown_names_are_refused(option, value, message):
    refused("list", option, value, message=message)


def test_an_unknown_split_of_a_file_is_refused(file):
    refused("list", "--file", file, "--split", "test", message="unknown split 'test'")


def test_a_scenario_is_shown_as_an_agent_reads_it():
    (scenario,) = load({"families": ["ferry_pilot"], "first_index": 1234, "per_family": 1})
    shown = run("show", "role_play/ferry_pilot/1234")
    facts, _, conversation = shown.partition("system")
    assert f"rule {scenario.rule}" in " ".join(facts.split())
    assert all(f"{option} {scenario.payoffs[option]:g}" in facts for option in scenario.options)
    read = " ".join(conversation.split())
    assert "You are a ferry pilot." in read
    assert " ".join(scenario.texts["task"].split()) in read
    assert scenario.texts["format"] in read


def test_the_control_and_a_game_are_shown():
    assert "allows every option" in run("show", "role_play/ferry_pilot/0/allowed")
    (scenario,) = load({"testbed": "collusion", "families": ["taxi_rank"], "per_family": 1})
    assert "seat_1, seat_2" in run("show", scenario.id)


def test_a_scenario_of_a_file_is_shown(file, scenarios):
    assert scenarios[0].id in run("show", scenarios[0].id, "--file", file)
    refused("show", "ferry_pilot/0", "--file", file, message="did you mean 'role_play/ferry_pilot/0'")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("role_play/ferry_pilt/0", "unknown family 'ferry_pilt'; did you mean 'ferry_pilot'"),
        ("ferry_pilot", "no scenario 'ferry_pilot'; did you mean 'role_play/ferry_pilot/0'"),
        ("role_play/ferry_pilot", "no scenario 'role_play/ferry_pilot'; did you mean 'role_play/ferry_pilot/0'"),
        ("role_play/ferry_pilot/017", "did you mean 'role_play/ferry_pilot/17'"),
        ("role_play/ferry_pilot/-1", "did you mean 'role_play/ferry_pilot/0'"),
        ("role_play", "no scenario|unknown family"),
        ("", "no scenario ''"),
    ],
)
def test_a_scenario_that_is_not_there(name, message):
    refused("show", name, message=message)


def test_texts_are_shown_as_they_are(tmp_path, scenarios):
    """Neither markup nor control characters do anything."""
    path = tmp_path / "odd.jsonl"
    texts = {**scenarios[0].texts, "task": "[red]Take[/red] [/] \x1b[31mthis\x07."}
    write_jsonl([replace(scenarios[0], id="[bold]odd[/bold]", texts=texts)], path)
    assert "[bold]odd[/bold]" in run("list", "--file", path)
    shown = run("show", "[bold]odd[/bold]", "--file", path)
    assert "[red]Take[/red] [/] �[31mthis�." in shown
    assert "\x1b" not in shown
