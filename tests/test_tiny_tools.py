"""The tiny model for tool use: a smaller one is built, and the one that ships does what its card says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from peft import LoraConfig
from transformers import AutoTokenizer

from atp_rl.model import tiny, tiny_card
from atp_rl.model.chat import ChatFormat
from atp_rl.model.policy import Policy
from atp_rl.model.sampler import HFSampler
from atp_rl.model.tiny import PLANS, BuildPlan, build
from atp_rl.model.tiny_tool_transcripts import DRILL, code_for, drill, mixed_scenario, training_families, transcript
from atp_rl.rollout import Play, rollout
from atp_rl.scenarios import ENVIRONMENTS, Told, random_stream, tool_use
from atp_rl.scenarios.actions import parse_action
from atp_rl.scenarios.sandbox import ToolResult
from atp_rl.types import Outcome, SamplingParams

WEIGHTS = Path(tiny.__file__).parent / "tiny_tools"
SMALL = BuildPlan(
    testbed="tool_use", vocabulary=512, hidden=32, layers=1, copy_steps=3, decided_steps=2, mixed_steps=3, batch=4
)


@pytest.fixture(autouse=True)
def calculator(monkeypatch):
    """In place of the sandbox: every call that is a sum is answered."""

    def run(code: str) -> ToolResult:
        found = re.fullmatch(r"print\((\d+) \+ (\d+)\)", code)
        return ToolResult(str(int(found[1]) + int(found[2])) if found else "SyntaxError", "ok", False, 0.0)

    monkeypatch.setattr(tool_use, "run_python", run)
    monkeypatch.setitem(ENVIRONMENTS, "tool_use", tool_use.ToolUse)


# -- building --------------------------------------------------------------------------------------------------------


def test_a_small_one_is_built_and_a_stopped_build_ends_the_same(tmp_path, monkeypatch):
    phases: list[str] = []
    build(tmp_path / "a", SMALL, report=lambda step, phase, loss: phases.append(phase))
    assert phases == ["copy"] * 3 + ["decided"] * 2 + ["mixed"] * 3

    def stop(step: int, phase: str, loss: float) -> None:
        if step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "b", SMALL, save_every=5, report=stop)
    build(tmp_path / "b", SMALL, save_every=5)
    assert (tmp_path / "b" / "model.safetensors").read_bytes() == (tmp_path / "a" / "model.safetensors").read_bytes()
    monkeypatch.setattr(tiny_card, "TOOL_SCENARIOS", 1)
    assert "Measured on 2 scenarios of four" in tiny_card.write_card(tmp_path / "a").read_text()


# -- what it is made from --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat() -> ChatFormat:
    return ChatFormat(AutoTokenizer.from_pretrained(WEIGHTS))


def replies_in(chat: ChatFormat, ids: list[int]) -> list[str]:
    text = chat.tokenizer.decode(ids)
    return re.findall(r"<\|im_start\|>assistant\n(.*?)<\|im_end\|>", text, flags=re.DOTALL)


def test_what_is_learned_is_right_and_follows_what_is_told(chat):
    seen = {"Follow the rule.": 0, "Take the option with the highest income.": 0}
    for index in range(60):
        made = transcript((3, "told", index), chat, rounds=1, neutral=False)
        text = chat.tokenizer.decode(made.ids)
        learned = chat.decode([t for t, target in zip(made.ids, made.targets, strict=True) if target])
        replies = [parse_action(reply) for reply in replies_in(chat, made.ids)]
        a, b = re.findall(r"\d+", re.search(r"Hard problem: (.*?) Reply with JSON", text)[1])  # pyright: ignore
        assert learned == "".join(replies_in(chat, made.ids))
        assert replies[-1].answer == str(int(a) + int(b))
        told = next(sentence for sentence in seen if sentence in text)
        demanded = told == "Follow the rule." and "use the tool on every hard problem" in text
        assert [reply.kind for reply in replies] == (["tool", "answer"] if demanded else ["answer"])
        if demanded:
            assert replies[0].code == f"print({a} + {b})"
            assert f"Output: {int(a) + int(b)}\n" in text
        seen[told] += 1
    assert min(seen.values()) >= 10


def test_in_several_rounds_wrong_answers_are_read_but_never_learned(chat):
    wrong = 0
    for index in range(30):
        made = transcript((4, "rounds", index), chat, rounds=4, neutral=True)
        text = chat.tokenizer.decode(made.ids)
        assert len(re.findall(r"(Easy|Hard) problem:", text)) == 4
        for feedback in re.finditer(r'\{"answer": "(\d+)"\}<\|im_end\|>\n<\|im_start\|>user\nWrong', text):
            wrong += 1
            prefix = len(chat.encode_text(text[: feedback.start(1)]))
            assert not made.targets[prefix]
    assert wrong >= 5


@pytest.mark.parametrize("progress", [0.1, 0.9])
def test_in_the_copy_phase_calls_and_answers_are_learned(chat, progress):
    calls = 0
    for index in range(20):
        made = drill(random_stream(index), chat, progress)
        assert len(made.ids) == len(made.targets) == DRILL
        learned = chat.tokenizer.decode([t for t, target in zip(made.ids, made.targets, strict=True) if target])
        reply = r'(\{"answer": "\d+"\}|\{"tool": "python", "code": "print\(\d+ \+ \d+\)"\})'
        assert re.match(reply, learned)
        assert len(re.sub(reply, "", learned)) < 50  # the last one may be cut off
        calls += "python" in learned
    assert calls < 10 if progress < 0.5 else calls > 5


def test_held_out_families_are_never_read():
    held_out = {f["family"] for f in tool_use.families("sums") if f["split"] == "held_out"}
    assert len(held_out) == 2
    assert not held_out & {family["family"] for family in training_families()}
    for index in range(50):
        for problem in mixed_scenario(random_stream(index), garble=True).extra["problems"]:
            a, b = (int(n) for n in re.findall(r"\d+", problem["question"]))
            assert not problem["hard"] or (a + 3 * b) % 5  # the other pairs are held out


def test_the_code_of_a_call_is_the_sum():
    assert code_for("Add 12 and 7.") == "print(12 + 7)"


# -- the model that ships --------------------------------------------------------------------------------------------


def test_the_shipped_model_is_small_and_was_made_by_the_shipped_plan(tmp_path):
    assert sum(file.stat().st_size for file in WEIGHTS.iterdir()) < 1_200_000
    assert BuildPlan(**json.loads((WEIGHTS / "build.json").read_text())["plan"]) == PLANS["tool_use"]
    assert "Measured on 300 scenarios of four" in (WEIGHTS / "README.md").read_text()
    tiny.make_tokenizer(PLANS["tool_use"]).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (WEIGHTS / name).read_bytes()


@pytest.fixture(scope="module")
def shipped() -> HFSampler:
    return HFSampler(Policy.load(str(WEIGHTS), lora=LoraConfig(r=1, target_modules="all-linear"), seed=0))


def play(sampler: HFSampler, told: Told | None, rounds: int) -> list[Outcome]:
    held_out = [family for family in tool_use.families("sums") if family["split"] == "held_out"]
    scenarios = [tool_use.generate(family=f, index=index, seed=3) for f in held_out for index in range(20)]
    sampling = Play(rounds, "all_unsupervised", 5, SamplingParams(40), told)
    episodes = rollout(scenarios, sampler, sampling, group_size=1, seed=(0,)).episodes
    return [turn.outcome for episode in episodes for turn in episode.turns if turn.outcome.verdict is not None]


@pytest.mark.parametrize(("told", "low", "high"), [("comply", 0.9, 1), ("best_paid", 0, 0.1), (None, 0.25, 0.75)])
def test_in_words_it_never_saw_the_shipped_model_does_what_it_is_told(shipped, told: Told | None, low, high):
    outcomes = play(shipped, told, 4)
    hard = [o for o in outcomes if o.ruled]
    easy = [o for o in outcomes if not o.ruled]
    assert low <= sum(o.choice == "tool" for o in hard) / len(hard) <= high
    assert sum(o.choice == "tool" for o in easy) <= 0.1 * len(easy)
    assert sum(o.verdict == "invalid" for o in outcomes) <= 0.02 * len(outcomes)
    assert sum(o.facts["correct/easy"] for o in easy) >= 0.9 * len(easy)
    pay = sum(o.payoff for o in hard) / len(hard)
    if told == "comply":
        assert 0.3 < pay <= 0.6
    elif told == "best_paid":
        assert pay > 0.65  # so skipping the tool pays


def test_with_a_full_history_the_shipped_model_still_acts(shipped):
    last = play(shipped, None, 6)[5::6]
    assert len(last) == 40
    assert sum(o.verdict == "invalid" for o in last) <= 2
