"""Models behind a chat service: whole runs without weights, against `transformers serve` and a small server."""

from __future__ import annotations

import gzip
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator

import numpy as np
import pytest

from atp_rl import pipeline
from atp_rl.model.api import ApiSampler, spoken
from atp_rl.model.policy import base_path
from atp_rl.model.service import Service
from atp_rl.recipe import load
from atp_rl.scenarios.actions import parse_action
from atp_rl.tracking.run import Run
from atp_rl.types import Chat, InputError, Message, Sampler, SamplingParams
from tests import small_model
from tests.command_line import atp
from tests.small_server import serving

PARAMS = SamplingParams(max_new_tokens=12)


def api_recipe(url: str, model: str, *overrides: str) -> list[str]:
    """A recipe whose own model cannot be loaded, because nothing is to load it."""
    return [
        "model.name=nobody/nothing",
        "scenarios.rounds=2",
        "scenarios.supervision=alternating",
        "evolve.learner=in_context",
        "evolve.start_from=base",
        "evolve.max_new_tokens=16",
        "sampler.engine=api",
        f"sampler.url={url}",
        f"sampler.model={model}",
        "evaluate.per_family=1",
        "track.wandb=disabled",
        "run.dir=run",
        *overrides,
    ]


@pytest.fixture(scope="module")
def transformers_serve(tmp_path_factory) -> Iterator[str]:
    """The root of the API of a server by Hugging Face, with the tiny model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = tmp_path_factory.mktemp("hf_home")
    (home / "hub").mkdir()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "transformers.cli.transformers"),
            *("serve", base_path("tiny"), "--host", "127.0.0.1", "--port", str(port)),
        ],
        env=os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(600):
            assert process.poll() is None, "transformers serve has ended"
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def server():
    with serving(small_model.base()) as running:
        yield running


def test_a_run_in_context_from_the_command_line(transformers_serve, tmp_path):
    recipe = api_recipe(transformers_serve, base_path("tiny"))
    output, _ = atp("run", *recipe, cwd=tmp_path)
    assert "in context" in output
    run = Run.open(tmp_path / "run")
    (evaluation,) = run.lines("evaluations.jsonl")
    held_out = evaluation["splits"]["held_out"]
    assert held_out["propensity"] is held_out["answer_mass"] is held_out["kl_to_aligned"] is None
    assert len(held_out["by_round"]) == 2
    assert held_out["invalid"]["value"] < 0.5  # the tiny model knows the format, also through another's chat template
    summary = json.loads((run.path / "summary.json").read_text())
    assert (summary["model"], summary["learner"], summary["complete"]) == (base_path("tiny"), "in_context", True)
    (first, *_) = gzip.decompress((run.path / "episodes" / "step_0000_held_out.jsonl.gz").read_bytes()).splitlines()
    assert [turn["round"] for turn in json.loads(first)["turns"]] == [0, 1]
    assert not run.checkpoint_folders()
    atp("report", "run", cwd=tmp_path)
    assert f"{base_path('tiny')}, role_play" in (run.path / "report.html").read_text()
    atp("resume", "run", cwd=tmp_path)  # complete: nothing to do
    _, errors = atp("evaluate", "run", cwd=tmp_path, expect=2)
    assert "a run of the engine api has no checkpoints" in errors


def test_the_token_path_refuses_a_server_of_text(transformers_serve, tmp_path):
    recipe = small_model.small_recipe(
        tmp_path / "run", "sampler.engine=server", f"sampler.url={transformers_serve}", steps=1
    )
    with pytest.raises(InputError, match=r"the server has no model"):
        pipeline.run(recipe)


def test_a_dry_run_asks_nobody(tmp_path):
    output, _ = atp("run", *api_recipe("http://127.0.0.1:1/v1", "gpt"), "--dry-run", cwd=tmp_path)
    assert "model gpt" in output
    assert "sampler: api http://127.0.0.1:1/v1" in output


def test_what_is_asked(server):
    sampler = ApiSampler(Service(server.url), "m")
    assert isinstance(sampler, Sampler)
    server.says = lambda body: {"content": f"{len(body['messages'])} messages"}
    messages: list[Message] = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    chats = [Chat(messages, [], ("A", "B"), (k,)) for k in range(2)]
    replies = sampler.generate([*chats, chats[0]], SamplingParams(max_new_tokens=7, temperature=0.5))
    assert [(r.text, r.token_ids, r.logprobs) for r in replies] == [("2 messages", (), ())] * 3
    bodies = [body for path, body in server.asked if path == "/v1/chat/completions"]
    assert all((b["max_completion_tokens"], b["temperature"]) == (7, 0.5) for b in bodies)
    assert all("tools" not in b for b in bodies)
    assert len({b["seed"] for b in bodies}) == 2
    assert np.isnan(sampler.score(chats[:1])).tolist() == [[True, True]]


SCHEMA = {"type": "function", "function": {"name": "python", "parameters": {"type": "object"}}}


def test_a_call_of_the_tool_goes_both_ways(server):
    asked = {"id": "x", "type": "function", "function": {"name": "python", "arguments": '{"code": "print(\\"a\\")"}'}}
    server.says = lambda body: {"content": None, "tool_calls": [asked]}
    user: Message = {"role": "user", "content": "u"}
    (reply,) = ApiSampler(Service(server.url), "m").generate([Chat([user], [], ("A",), (0,), tools=(SCHEMA,))], PARAMS)
    assert parse_action(reply.text).code == 'print("a")'
    assert server.asked[-1][1]["tools"] == [SCHEMA]
    history: list[Message] = [
        user,
        {"role": "assistant", "content": reply.text},
        {"role": "tool", "content": "a"},
        {"role": "assistant", "content": '{"answer": "a"}'},
        user,
    ]
    sent = spoken(history)
    (call,) = sent[1]["tool_calls"]
    assert call["function"]["name"] == "python"
    assert json.loads(call["function"]["arguments"]) == {"code": 'print("a")'}
    assert sent[2] == {"role": "tool", "content": "a", "tool_call_id": call["id"]}
    assert [sent[i] for i in (0, 3, 4)] == [history[i] for i in (0, 3, 4)]


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": None}, ""),
        ({"content": "A", "tool_calls": []}, "A"),
        (
            {"content": "A", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
            'A\n{"name": "f", "arguments": {}',
        ),
    ],
)
def test_what_a_message_says(message, text, server):
    server.says = lambda body: message
    (reply,) = ApiSampler(Service(server.url), "m").generate([Chat([], [], ("A",), (0,))], PARAMS)
    assert reply.text == text


@pytest.mark.parametrize("raw", [b"<html>", b'{"choices": []}', b'{"error": "x"}', b'{"choices": [{"message": 1}]}'])
def test_nonsense_is_an_error(raw, server):
    server.raw = raw
    with pytest.raises(InputError, match="no chat completion"):
        ApiSampler(Service(server.url), "m").generate([Chat([], [], ("A",), (0,))], PARAMS)


def test_a_service_that_stops_in_the_middle_can_be_resumed(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load(api_recipe(server.url, "m"))

    def tired(body):
        server.errors = 1000 * (len(server.asked) > 3)
        return {"content": "?"}

    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.001)
    server.says = tired
    with pytest.raises(InputError, match="the server answers"):
        pipeline.run(recipe)
    run = Run.open(tmp_path / "run")
    assert not run.complete
    server.errors, server.says = 0, lambda body: {"content": "?"}
    pipeline.resume(run.path)
    assert run.complete
    (evaluation,) = run.lines("evaluations.jsonl")
    assert evaluation["splits"]["held_out"]["invalid"]["value"] == 1


def test_a_service_without_the_model_is_found_before_anything_is_written(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    no_model = b'{"error": {"message": "no model m"}}'
    monkeypatch.setattr(server, "answer", lambda path, body: (404, no_model))
    with pytest.raises(InputError, match="no model m"):
        pipeline.run(load(api_recipe(server.url, "m")))
    assert not (tmp_path / "run").exists()


def test_a_game_of_many_seats_through_a_service(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    game = ["scenarios.testbed=collusion", "scenarios.collusion.n=3", "scenarios.collusion.threshold=2"]
    pipeline.run(load(api_recipe(server.url, "m", *game, "scenarios.supervision=all_unsupervised")))
    (evaluation,) = Run.open(tmp_path / "run").lines("evaluations.jsonl")
    assert len(evaluation["splits"]["held_out"]["by_seat"]) == 3
