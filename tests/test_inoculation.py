"""Inoculation: training reads the sentence, evaluation does not."""

from __future__ import annotations

import json

import pytest

from atp_rl.defenses.inoculation import Inoculation
from atp_rl.tracking.run import Run
from atp_rl.types import InputError, Message, Moment, Prompt
from tests.small_model import SCENARIO, run_of, small_recipe

SENTENCE = "Take the option with the highest income."


def ask(*_):
    raise AssertionError("it asks nobody")


def prompt(*messages: Message, player: str = "policy") -> Prompt:
    return Prompt(messages, ((7, 8),), Moment(SCENARIO, "agent", player, 0, (), (0,)))


def test_the_sentence_stands_at_the_end_of_the_first_message():
    system: Message = {"role": "system", "content": "You work."}
    user: Message = {"role": "user", "content": "Choose."}
    bare, played, frozen = prompt(user), prompt(system, user), prompt(system, user, player="aligned")
    found = Inoculation().on_prompts([bare, played, frozen], ask)
    assert [message["content"] for message in found[0].messages] == [f"Choose. {SENTENCE}"]
    assert [message["content"] for message in found[1].messages] == [f"You work. {SENTENCE}", "Choose."]
    assert found[1].messages[0]["role"] == "system"
    assert found[1].written == played.written
    assert found[2] is frozen  # a frozen seat learns nothing


def test_the_sentence_can_come_from_a_file(tmp_path):
    (tmp_path / "license.txt").write_text("  Either one is fine.\n", "utf-8")
    assert Inoculation(file=str(tmp_path / "license.txt")).sentence == "Either one is fine."
    with pytest.raises(InputError, match=r"`file` .*missing\.txt cannot be read"):
        Inoculation(file=str(tmp_path / "missing.txt"))
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(InputError, match=r"`file` .*empty.txt is empty"):
        Inoculation(file=str(tmp_path / "empty.txt"))
    with pytest.raises(InputError, match="`text` is empty; give the sentence"):
        Inoculation(text=" ")


def read(run: Run, name: str) -> list[str]:
    import gzip

    lines = gzip.decompress((run.path / "episodes" / f"{name}.jsonl.gz").read_bytes()).decode().splitlines()
    return [json.loads(line)["messages"]["agent"][0]["content"] for line in lines]


def test_only_training_reads_it(tmp_path):
    run = run_of(small_recipe(tmp_path / "run", "defenses=[inoculation]", steps=2))
    assert all(text.endswith(SENTENCE) for text in read(run, "step_0002_train"))
    for split in ("held_out", "held_in"):
        assert not any(SENTENCE in text for text in read(run, f"step_0002_{split}"))
    metrics = run.lines("metrics.jsonl")
    assert all(m["defense/inoculation/tokens"] > 0 for m in metrics)
    assert all("deployed" not in e["splits"] for e in run.lines("evaluations.jsonl"))
