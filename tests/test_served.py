"""Samplers whose engine holds weights of its own: the same policy on both sides, or the run stops and says why."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from atp_rl import pipeline
from atp_rl.evolve.setup import make_sampler, make_sync_probe
from atp_rl.model.sampler import HFSampler
from atp_rl.model.served import ServedSampler
from atp_rl.model.service import RETRIES, Service
from atp_rl.model.sync_probe import MAX_PROBE_GAP, SAME, SyncProbe, decision_logprobs
from atp_rl.model.vllm_engine import VllmSampler
from atp_rl.recipe import load
from atp_rl.rollout import Play, rollout
from atp_rl.scenarios import load as load_scenarios
from atp_rl.scenarios import make_env
from atp_rl.tracking.run import Run
from atp_rl.types import Chat, InputError, Sampler, SamplingParams
from tests import small_model
from tests.small_model import base, make_policy, nudge, run_of, small_recipe
from tests.small_server import SmallEngine, serving


@pytest.fixture
def server():
    with serving(base()) as running:
        yield running


@pytest.fixture
def connect(server):
    def made(policy, **options) -> ServedSampler:
        return ServedSampler(policy, Service(server.url, **options), base())

    return made


@pytest.fixture
def quick(monkeypatch):
    """Pauses between tries take no time."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.001)


def served_recipe(folder: Path, server, *overrides: str, steps: int = 2):
    return small_recipe(folder, "sampler.engine=server", f"sampler.url={server.url}", *overrides, steps=steps)


def turns_of(sampler, *, temperature=1.0, rounds=2):
    play = Play(
        rounds=rounds,
        supervision="all_unsupervised",
        history_window=5,
        sampling=SamplingParams(max_new_tokens=10, temperature=temperature),
    )
    scenarios = load_scenarios({"families": ["ferry_pilot", "archivist"], "per_family": 2})
    played = rollout(scenarios, sampler, play, group_size=2, seed=(0, "test"))
    return [turn for episode in played.episodes for turn in episode.turns]


def gaps(policy, turns, *, temperature=1.0):
    """Distances of the reported log-probabilities from the policy's, token by token."""
    rows = [[*t.prompt_ids, *t.completion.token_ids] for t in turns]
    acted = [range(len(t.prompt_ids), len(row)) for t, row in zip(turns, rows, strict=True)]
    own = policy.acted_tokens(rows, acted, temperature=temperature)
    reported = [value for turn in turns for value in turn.completion.logprobs]
    return np.abs(own.logprobs[own.mask].detach().numpy() - np.array(reported))


def chats_of(policy, *, players=("policy",)):
    """Of each player, the first round of two scenarios."""
    chats = []
    for scenario in load_scenarios({"families": ["ferry_pilot"], "per_family": 2}):
        env = make_env(scenario, rounds=1, supervision="all_unsupervised", seed=0, history_window=0)
        messages = env.observe()["agent"]
        ids = policy.chat.encode(messages, [])
        chats += [Chat(messages, ids, scenario.options, (0,), player) for player in players]
    return chats


# --- whole evolutions


def test_an_evolution_through_a_server_learns_from_what_the_policy_would_have_drawn(tmp_path, server):
    run = run_of(served_recipe(tmp_path / "run", server))
    metrics = run.lines("metrics.jsonl")
    assert len(metrics) == 2
    for record in metrics:
        assert record["perf/sampler_gap_max"] < 1e-4
        assert record["perf/probe_gap_mean"] <= record["perf/probe_gap_max"] < 1e-4
    evaluations = run.lines("evaluations.jsonl")
    assert [e["step"] for e in evaluations] == [0, 2]
    assert all(0 < e["splits"]["held_out"]["propensity"] < 1 for e in evaluations)
    live = [name for name in server.loaded if "-policy-" in name]
    assert len(set(server.loaded)) == len(server.loaded) == len(live) + 1 == 4  # start, two steps, and the anchor once
    unloaded = [body["lora_name"] for path, body in server.asked if path.endswith("/unload_lora_adapter")]
    assert unloaded == live[:-1]


def test_a_population_has_a_name_for_every_seat(tmp_path, server):
    game = ["scenarios.testbed=collusion", "scenarios.families=null", "scenarios.collusion.n=3", "evolve.micro_batch=4"]
    game += ["scenarios.supervision=all_unsupervised", "scenarios.collusion.threshold=2", "scenarios.per_family=1"]
    game += ["evolve.learner=population", "evaluate.every=1", "evaluate.per_family=1", "evolve.scenarios_per_step=1"]
    run = run_of(served_recipe(tmp_path / "run", server, *game, steps=1))
    (record,) = run.lines("metrics.jsonl")
    assert record["perf/sampler_gap_max"] < 1e-4
    assert record["perf/probe_gap_max"] < 1e-4
    seats = {name.split("-")[2] for name in server.loaded}
    assert len(seats) == 4
    assert "aligned" in seats


@pytest.mark.parametrize("engine", ["hf", "server"])
def test_the_probe_is_logged_for_every_engine(engine, tmp_path, server):
    recipe = (
        small_recipe(tmp_path / "run", steps=1) if engine == "hf" else served_recipe(tmp_path / "r", server, steps=1)
    )
    (record,) = run_of(recipe).lines("metrics.jsonl")
    assert 0 <= record["perf/probe_gap_mean"] <= record["perf/probe_gap_max"] < 1e-4


def test_a_server_that_keeps_old_weights_stops_the_run(tmp_path, server):
    server.keeps_old_weights = True
    with pytest.raises(RuntimeError, match=r"the sampler kept old weights: .* from those of 1 syncs ago"):
        run_of(served_recipe(tmp_path / "run", server))
    assert len(Run.open(tmp_path / "run").checkpoint_folders()) == 1  # of step 0; nothing was learned from stale tokens


def test_a_server_with_other_base_weights_stops_the_run_before_anything_is_measured(tmp_path, server, monkeypatch):
    def load_and_disturb(name, folder, load=server.engine.load):
        load(name, folder)
        weights = server.engine.models[name].get_parameter("base_model.model.model.embed_tokens.weight")
        weights.data += 0.1 * torch.randn(weights.shape, generator=torch.Generator().manual_seed(0))

    monkeypatch.setattr(server.engine, "load", load_and_disturb)
    with pytest.raises(RuntimeError, match="the sampler is not the policy that learns"):
        run_of(served_recipe(tmp_path / "run", server))
    assert not Run.open(tmp_path / "run").lines("evaluations.jsonl")


def test_an_interrupted_run_continues_through_the_server(tmp_path, server):
    undisturbed = run_of(served_recipe(tmp_path / "a", server, steps=3))
    recipe = served_recipe(tmp_path / "b", server, steps=3)
    with pytest.raises(pipeline.Interrupted):
        run_of(recipe, stop=small_model.stop_before(2))
    resumed = run_of(recipe)
    a, b = (small_model.checkpoint_files(run, 3)["adapter_model.safetensors"] for run in (undisturbed, resumed))
    assert a == b


# --- the sampler by itself


def test_served_and_local_samplers_score_alike(connect):
    policy = make_policy()
    nudge(policy, 0.05, seed=3)
    sampler = connect(policy)
    assert isinstance(sampler, Sampler)
    chats = chats_of(policy, players=("policy", "aligned"))
    served, local = sampler.score(chats), HFSampler(policy).score(chats)
    assert np.abs(np.array(served) - np.array(local)).max() < 1e-4
    assert abs(served[0][0] - served[1][0]) > 0.01  # the live adapter and the anchor differ


def test_without_an_anchor_aligned_is_the_bare_base(connect):
    policy = make_policy(anchored=False)
    nudge(policy, 0.05, seed=3)
    chats = chats_of(policy, players=("aligned",))
    sampler = connect(policy)
    assert np.abs(np.array(sampler.score(chats)) - np.array(HFSampler(policy).score(chats))).max() < 1e-4
    assert len(sampler._loaded) == 1


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probabilities_are_the_learners_at_any_temperature(temperature, connect):
    policy = make_policy()
    turns = turns_of(connect(policy), temperature=temperature)
    assert gaps(policy, turns, temperature=temperature).max() < 1e-4
    assert {turn.completion.stop_reason for turn in turns} >= {"stop"}
    assert all(
        (t.completion.token_ids[-1] == policy.chat.eos_id) == (t.completion.stop_reason == "stop") for t in turns
    )


def test_prompts_hold_the_very_tokens_that_were_drawn(connect, server):
    policy = make_policy()
    turns = turns_of(connect(policy), rounds=2)
    drawn = {(*t.prompt_ids, *t.completion.token_ids) for t in turns if t.round == 0}
    second = [t.prompt_ids for t in turns if t.round == 1]
    assert all(any(prompt[: len(row)] == row for row in drawn) for prompt in second)
    sent = [tuple(body["prompt"]) for path, body in server.asked if path == "/v1/completions"]
    assert set(second) <= set(sent)


def test_a_reply_depends_on_its_own_seed_alone(connect):
    policy = make_policy()
    sampler = connect(policy)
    (chat, _) = chats_of(policy)
    other = Chat(chat.messages, chat.prompt_ids, chat.options, (1,))
    params = SamplingParams(max_new_tokens=10, temperature=3.0)
    both, alone = sampler.generate([chat, other], params), sampler.generate([other], params)
    assert both[1] == alone[0] != both[0]


def test_a_sync_sends_what_has_changed_and_nothing_else(connect, server):
    policy = make_policy()
    sampler = connect(policy)
    assert len(server.loaded) == 2
    sampler.sync(policy)
    assert len(server.loaded) == 2
    state = policy.state()
    nudge(policy, 0.05, seed=3)
    sampler.sync(policy)
    policy.restore(state)  # a gate rejected the step: the weights are those of before, the name is new all the same
    sampler.sync(policy)
    assert [name.split("-", 2)[2] for name in server.loaded] == ["policy-1", "aligned", "policy-2", "policy-3"]
    names = [name for name in server.engine.models if name != base()]
    assert sorted(names) == sorted([server.loaded[1], server.loaded[3]])
    assert sorted(folder.name for folder in Path(sampler._folder.name).iterdir()) == sorted(names)


def test_two_samplers_share_no_name(connect, server):
    policy = make_policy()
    for _ in range(2):
        connect(policy)
    assert len(set(server.loaded)) == 4


# --- the probe


def test_the_probe_tells_old_weights_where_the_distance_alone_would_not():
    policy, behind = make_policy(), make_policy()
    probe = SyncProbe(chats_of(policy))
    for seed in range(2):
        assert probe.check(policy, HFSampler(policy))["perf/probe_gap_max"] < 1e-4
        nudge(policy, 0.005, seed=seed)
    distance = np.abs(
        np.array(decision_logprobs(policy, probe.chats)) - np.array(decision_logprobs(behind, probe.chats))
    ).mean()
    assert SAME < distance < MAX_PROBE_GAP / 2
    with pytest.raises(RuntimeError, match=r"the sampler kept old weights: .* from those of 2 syncs ago"):
        probe.check(policy, HFSampler(behind))


def test_the_probe_takes_no_probabilities_for_no_agreement():
    class Silent:
        version = 0

        def score(self, chats):
            return [tuple(float("nan") for _ in chat.options) for chat in chats]

    policy = make_policy()
    with pytest.raises(RuntimeError, match="is not the policy that learns"):
        SyncProbe(chats_of(policy)).check(policy, Silent())  # type: ignore[arg-type]


def test_a_step_taken_back_is_not_old_weights():
    policy = make_policy()
    probe, state = SyncProbe(chats_of(policy)), policy.state()
    probe.check(policy, HFSampler(policy))
    nudge(policy, 0.05, seed=1)
    probe.check(policy, HFSampler(policy))
    policy.restore(state)
    assert probe.check(policy, HFSampler(policy))["perf/probe_gap_max"] < 1e-4


def test_the_probe_looks_at_four_chats_or_at_every_player(tmp_path):
    policy = make_policy()

    def players(*overrides):
        recipe = small_recipe(tmp_path / "run", "scenarios.families=null", *overrides)
        probe = make_sync_probe(recipe, pipeline.suites_of(recipe), policy)
        assert len({(chat.player, *chat.prompt_ids) for chat in probe.chats}) == len(probe.chats)
        return [chat.player for chat in probe.chats]

    game = ["scenarios.testbed=collusion", "scenarios.supervision=all_unsupervised", "scenarios.collusion.n=9"]
    game += ["scenarios.collusion.fixed=2", "scenarios.collusion.fixed_as=aligned"]
    assert players() == ["policy"] * 4
    assert sorted(players(*game)) == ["aligned"] * 2 + ["policy"] * 2  # all seats read the same in the first round
    seats = players(*game, "evolve.learner=population", "evolve.steps=1")
    assert len(set(seats)) == 8


# --- servers that cannot be used


def test_a_server_that_is_down(quick):
    with serving(base()) as gone:
        url = gone.url
    with pytest.raises(InputError, match=r"no server answers .*start it, or correct `sampler.url`"):
        ServedSampler(make_policy(), Service(url), base())


def test_a_slow_server(connect, server, quick):
    sampler = connect(make_policy(), timeout_s=2.0)
    sampler.service = Service(server.url, timeout_s=0.05)
    server.delay_s = 0.3
    with pytest.raises(InputError, match=rf"no answer within 0.05 s, {RETRIES + 1} times; raise `sampler.timeout_s`"):
        sampler.generate(chats_of(sampler.policy), SamplingParams(max_new_tokens=2))


def test_two_errors_and_then_an_answer(connect, server, quick):
    sampler = connect(make_policy())
    (chat, _) = chats_of(sampler.policy)
    (before,) = sampler.score([chat])[:1]
    server.errors = 2
    assert len(chat.options) == 2  # two requests, of which the first tries both fail
    assert sampler.score([chat]) == [before]
    assert server.errors == 0
    server.errors = 1000
    with pytest.raises(InputError, match=r"the server answers .*try again"):
        sampler.score([chat])
    assert 1000 - server.errors == 2 * (RETRIES + 1)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("token_ids", r"returns no token ids \(`return_token_ids`\); vLLM does from 0.10.2 on"),
        ("prompt_token_ids", "returns no token ids"),
        ("logprobs", r"2 tokens with 0 log-probabilities|1 tokens with 0 log-probabilities"),
        ("prompt_logprobs", r"no log-probabilities of the prompt \(`prompt_logprobs`\)"),
    ],
)
def test_a_server_that_leaves_something_out(field, message, connect, server):
    server.leave_out = {field}
    with pytest.raises(InputError, match=message):
        connect(make_policy())


COMPLETION = {"token_ids": [5], "prompt_token_ids": [], "logprobs": {"token_logprobs": [-1.0]}}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"choices": [', "no valid JSON"),
        (b"<html>a proxy</html>", "no completion: <html>a proxy"),
        (b'{"choices": []}', "no completion"),
        (b'{"model": "m", "choices": []}', "no completion"),
        (json.dumps({"model": "m", "choices": [{"token_ids": ["a"]}]}).encode(), "no completion"),
        (json.dumps({"model": "m", "choices": [COMPLETION]}).encode(), "the server answered as 'm'"),
    ],
)
def test_a_server_that_answers_nonsense(raw, message, connect, server):
    sampler = connect(make_policy())
    server.raw = raw
    with pytest.raises(InputError, match=message):
        sampler.score(chats_of(sampler.policy))


def test_a_server_that_cuts_the_prompt(connect, server):
    sampler = connect(make_policy())
    (chat, _) = chats_of(sampler.policy)
    server.raw = json.dumps({"model": server.loaded[0], "choices": [COMPLETION | {"prompt_token_ids": [1]}]}).encode()
    with pytest.raises(InputError, match="read other tokens than it was sent"):
        sampler.generate([chat], SamplingParams(max_new_tokens=2))


def test_a_server_of_another_model(server):
    with pytest.raises(InputError, match=r"has no model 'Qwen/Qwen3-8B' but .*set `sampler.model`"):
        ServedSampler(make_policy(), Service(server.url), "Qwen/Qwen3-8B")


def test_a_server_without_adapters(connect, server):
    server.loads_adapters = False
    with pytest.raises(InputError, match="--enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"):
        connect(make_policy())


def test_a_server_that_cannot_read_the_folder(connect, server, quick, monkeypatch):
    def unreadable(path, body, answer=server.answer):
        return (400, b'{"error": {"message": "no such folder"}}') if "load_lora" in path else answer(path, body)

    monkeypatch.setattr(server, "answer", unreadable)
    with pytest.raises(InputError, match=r"must be able to read .*TMPDIR.*no such folder"):
        connect(make_policy())


def test_the_key_goes_to_the_server_and_nowhere_else(tmp_path, server, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-secret-4711")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-another")
    run = run_of(served_recipe(tmp_path / "run", server, "sampler.api_key_env=MY_KEY", steps=1))
    written = b"".join(file.read_bytes() for file in run.path.rglob("*") if file.is_file())
    assert b"sk-secret-4711" not in written
    assert b"MY_KEY" in written
    assert server.keys == {"Bearer sk-secret-4711"}


def test_a_key_that_is_not_there(server, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(InputError, match="the environment variable NO_SUCH_KEY is not set"):
        Service(server.url, api_key_env="NO_SUCH_KEY")


def test_without_a_key_none_is_sent(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-another")
    Service(server.url).get("/models")
    assert server.keys == {"Bearer none"}


def test_a_refused_key(server, monkeypatch):
    monkeypatch.setattr(server, "answer", lambda path, body: (401, b'{"error": {"message": "bad key sk-secret"}}'))
    with pytest.raises(InputError, match=r"refuses the key \(401\).*`sampler.api_key_env`") as refused:
        Service(server.url).get("/models")
    assert "sk-secret" not in str(refused.value)


def test_without_the_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(InputError, match=r"pip install 'atp-rl\[served\]'"):
        Service("http://127.0.0.1:1/v1")


def test_the_server_is_asked_before_anything_is_written(tmp_path, quick):
    with serving(base()) as gone:
        url = gone.url
    recipe = small_recipe(tmp_path / "run", "sampler.engine=server", f"sampler.url={url}")
    with pytest.raises(InputError, match="no server answers"):
        pipeline.run(recipe)
    assert not (tmp_path / "run").exists()


# --- vLLM in this process, by a module that does what its documentation says


class FakeLLM:
    made: FakeLLM

    def __init__(self, model, **options):
        self.engine, self.options, self.asleep = SmallEngine(model), options, False
        self.seen, self.calls = {}, []
        FakeLLM.made = self

    def sleep(self, level):
        assert level == 1
        assert not self.asleep
        self.asleep = True
        self.calls.append("sleep")

    def wake_up(self):
        assert self.asleep
        self.asleep = False
        self.calls.append("wake")

    def generate(self, prompts, params, *, lora_request, use_tqdm):
        assert not self.asleep
        outputs = []
        for prompt, p, lora in zip(prompts, params, lora_request, strict=True):
            ids, name = prompt["prompt_token_ids"], self.engine.base
            if lora is not None:
                name = lora.lora_name
                if (name, lora.lora_int_id) not in self.seen:  # read once, with the first prompt
                    assert lora.lora_int_id not in {number for _, number in self.seen}
                    self.seen[name, lora.lora_int_id] = lora.lora_path
                    self.engine.load(name, lora.lora_path)
            scored = drawn = logprobs = None
            if hasattr(p, "prompt_logprobs"):
                values = self.engine.score(name, ids)
                scored = [None, *({t: SimpleNamespace(logprob=v)} for t, v in zip(ids[1:], values, strict=True))]
            else:
                drawn, values = self.engine.draw(
                    name, ids, most=p.max_tokens, temperature=p.temperature, seed=p.seed, stop=p.stop_token_ids
                )
                logprobs = [{t: SimpleNamespace(logprob=v)} for t, v in zip(drawn, values, strict=True)]
            output = SimpleNamespace(token_ids=drawn, logprobs=logprobs)
            outputs.append(SimpleNamespace(outputs=[output], prompt_logprobs=scored))
        return outputs


class FakeRequest:
    def __init__(self, lora_name, lora_int_id, lora_path):
        self.lora_name, self.lora_int_id, self.lora_path = lora_name, lora_int_id, lora_path


@pytest.fixture
def fake_vllm(monkeypatch):
    vllm, lora, request = (types.ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.request"))
    vllm.__dict__.update(LLM=FakeLLM, SamplingParams=SimpleNamespace)
    request.__dict__.update(LoRARequest=FakeRequest)
    for module in (vllm, lora, request):
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.usefixtures("fake_vllm")
def test_an_evolution_with_vllm_in_this_process(tmp_path):
    run = run_of(small_recipe(tmp_path / "run", "sampler.engine=vllm", steps=2))
    for record in run.lines("metrics.jsonl"):
        assert record["perf/sampler_gap_max"] < 1e-4
        assert record["perf/probe_gap_max"] < 1e-4
    llm = FakeLLM.made
    assert [number for _, number in llm.seen] == [1, 3, 4]  # the anchor, 2, answers nobody here
    assert llm.options["max_lora_rank"] == 8
    assert llm.options["trust_remote_code"] is False
    assert llm.calls[:2] == ["sleep", "wake"]
    assert all(a != b for a, b in zip(llm.calls, llm.calls[1:], strict=False))


def test_vllm_is_not_installed():
    with pytest.raises(InputError, match=r"pip install 'atp-rl\[vllm\]'"):
        VllmSampler(make_policy(), revision=None, dtype="float32", gpu_memory=0.4, seed=0)


# --- recipes

API = ["sampler.engine=api", "sampler.url=http://h/v1", "sampler.model=m"]
IN_CONTEXT = ["evolve.learner=in_context", "evolve.start_from=base"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sampler.engine=server"], "`sampler` needs `sampler.url` for the engine server"),
        (["sampler.engine=api", "sampler.url=http://h/v1"], "`sampler` needs `sampler.model` for the engine api"),
        (["sampler.url=http://h/v1"], "`sampler` has `url`, but the engine hf asks no server"),
        (["sampler.engine=vllm", "sampler.model=m"], "`sampler` has `model`, but the engine vllm asks no server"),
        (["sampler.api_key_env=KEY"], "`sampler` has `api_key_env`, but the engine hf asks no server"),
        (["sampler.engine=vllm", "sampler.mode=choice"], "set `sampler.mode` to free"),
        (["sampler.engine=vlm"], "`sampler.engine` must be"),
        (["sampler.url=h:8000"], "`sampler.url` must match pattern"),
        (API, "set `evolve.learner` to in_context"),
        ([*API, "evolve.learner=in_context", "evolve.start_from=x"], "`evolve.start_from` to base"),
        ([*API, *IN_CONTEXT, "align.method=dpo"], "set `align` to null"),
    ],
)
def test_samplers_that_make_no_sense(overrides, message):
    with pytest.raises(InputError) as refused:
        load(overrides)
    assert message in str(refused.value)


def test_samplers_that_do():
    recipe = load([*API, *IN_CONTEXT])
    assert recipe.sampler.engine == "api"
    assert load(["sampler.mode=choice"]).sampler.mode == "choice"


def test_the_recipe_decides_who_answers(tmp_path, server):
    policy = make_policy()
    assert isinstance(make_sampler(small_recipe(tmp_path), policy), HFSampler)
    assert isinstance(make_sampler(served_recipe(tmp_path, server), policy), ServedSampler)
