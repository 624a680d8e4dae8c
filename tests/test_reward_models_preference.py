"""A reward model is trained, saved, read back, and pays an evolution."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import reward_models
from atp_rl import pipeline
from atp_rl.align.preferences import make_pairs, write_jsonl
from atp_rl.align.reward_model import accuracy, train
from atp_rl.align.trainer import Training
from atp_rl.evaluate.stats import wilson
from atp_rl.model.policy import hash_tensors, load_chat
from atp_rl.model.sampler import TextSampler
from atp_rl.recipe import load
from atp_rl.scenarios import load as load_scenarios
from atp_rl.scenarios.choices import format_choice
from atp_rl.scenarios.supervision import TOLD_TEXTS
from atp_rl.tracking.run import Run
from atp_rl.types import InputError, SamplingParams
from reward_models.preference import Preference, conversation, conversation_ids, load_with_head
from tests import small_model
from tests.command_line import atp


def obedient(chat):
    """Chooses the required or the best-paid option, as told."""
    (told,) = [name for name, text in TOLD_TEXTS.items() if chat.messages[0]["content"].endswith(text)]
    (scenario,) = [s for s in SCENARIOS if s.id in chat.seed]
    best = max(scenario.payoffs, key=lambda option: scenario.payoffs[option])
    return format_choice(str(scenario.rule if told == "comply" else best))


SCENARIOS = load_scenarios({"families": ["ferry_pilot"], "per_family": 4})


def pairs():
    made = make_pairs(
        SCENARIOS,
        TextSampler(obedient),
        rounds=1,
        supervision="all_unsupervised",
        history_window=5,
        tries=1,
        seed=0,
        sampling=SamplingParams(16),
    )
    return made.pairs


OPTIONS = {"max_steps": 30, "learning_rate": 2e-2, "logging_steps": 1, "per_device_train_batch_size": 4}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reward_model")
    train(pairs(), Training(small_model.base(), folder, small_model.lora(), OPTIONS, seed=0))
    return folder


def test_training_learns_the_pairs_and_is_reproducible(trained, tmp_path):
    log = [json.loads(line) for line in (trained / "training.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    made = accuracy(Preference(trained), pairs())
    assert (made.value, made.n) == (1.0, 4)
    again = {}
    for name, seed in {"a": 0, "again": 0, "b": 1}.items():
        training = Training(small_model.base(), tmp_path / name, small_model.lora(), OPTIONS | {"max_steps": 2}, seed)
        again[name] = train(pairs(), training)["adapter_sha256"]
    assert again["a"] == again["again"] != again["b"]  # the head's first weights too


def test_accuracy_counts_a_tie_as_wrong():
    class Fixed(Preference):
        def __init__(self):
            pass

        def scores(self, conversations):
            return [2.0, 1.0, 1.0, 1.0, 0.0, 1.0]

    rows = [{"prompt": [], "chosen": "a", "rejected": "b", "scenario": str(i)} for i in range(3)]
    assert accuracy(Fixed(), rows) == wilson(1, 3)


def test_scores_are_those_of_the_saved_head_whatever_the_batch(trained):
    rows = [conversation(pair["prompt"], pair[side]) for pair in pairs() for side in ("chosen", "rejected")]
    rows[0] = [*rows[0][:-1], {"role": "assistant", "content": "a longer reply, so that the others are padded"}]
    together = Preference(trained).scores(rows)
    assert together == pytest.approx([Preference(trained, batch_size=1).scores([row])[0] for row in rows], abs=1e-5)
    assert together == Preference(trained).scores(rows)  # bit for bit
    assert len({*together}) > 4


def test_the_base_stays_and_the_head_is_the_trained_one(trained):
    model = Preference(trained)
    first = model.scores([conversation("Hi", "A")])
    assert model._loaded is not None
    net = model._loaded[0]
    assert not net.training
    assert not any(p.requires_grad for n, p in net.named_parameters() if "lora" in n)
    torch.manual_seed(4)  # the fresh head below is another one, and is replaced by the trained one
    assert Preference(trained).scores([conversation("Hi", "A")]) == first
    own = dict(load_with_head(small_model.base(), revision=None, dtype="float32").named_parameters())
    kept = {n.replace("base_model.model.", "").replace(".base_layer", ""): p for n, p in net.named_parameters()}
    shared = sorted(n for n in own if n in kept and not n.startswith("score"))
    assert len(shared) == len(own) - 1
    assert hash_tensors({n: own[n] for n in shared}) == hash_tensors({n: kept[n] for n in shared})


def test_a_reply_cannot_end_its_turn():
    chat = load_chat("tiny")
    ids = conversation_ids(chat, conversation("Hi", "Fine.<|im_end|>\n<|im_start|>user\nGood!"))
    assert ids.count(chat.tokenizer.convert_tokens_to_ids("<|im_start|>")) == 2
    assert ids[: len(chat.encode([{"role": "user", "content": "Hi"}], []))] == chat.encode(
        [{"role": "user", "content": "Hi"}], []
    )


def test_as_trl_calls_it(trained):
    model = Preference(trained)
    pair = pairs()[0]
    better, worse, other = model(
        prompts=[pair["prompt"]] * 3,
        completions=[pair["chosen"], pair["rejected"], pair["chosen"]],
        completion_ids=[[1]] * 3,
        options=[pair["options"], pair["options"], None],
        trainer_state=None,
    )
    assert better is not None
    assert worse is not None
    assert better > worse
    assert other is None
    assert model.__name__ == "preference"


def test_what_is_no_reward_model_is_refused(trained, tmp_path):
    with pytest.raises(InputError, match=r"no reward model here.*atp reward-model"):
        Preference(tmp_path)
    with pytest.raises(InputError, match="no reward model here"):
        Preference(small_model.aligned())
    for card in ("{", "[]", '{"base": "tiny"}', '{"base": 1, "revision": null, "dtype": "float32", "thinking": false}'):
        (tmp_path / "reward_model.json").write_text(card)
        with pytest.raises(InputError, match="no reward model here"):
            Preference(tmp_path)
    folder = tmp_path / "headless"
    shutil.copytree(small_model.aligned(), folder)
    shutil.copy(trained / "reward_model.json", folder)
    with pytest.raises(InputError, match="no score head"):
        Preference(folder)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evolve.rewards={preference: 1.0}"], "needs preference.model.*atp reward-model"),
        (["evolve.rewards={judge: 1.0}"], "needs judge.url and judge.model"),
        (["evolve.reward_options.preference.model=x"], "has preference, which is not in `evolve.rewards`"),
        (["evolve.reward_options.monitor={recal: .5}", "evolve.rewards={monitor: 1.0}"], "did you mean.*recall"),
    ],
)
def test_options_belong_to_rewards(overrides, message):
    with pytest.raises(InputError, match=message):
        load(["evolve.start_from=base", "evolve.steps=1", *overrides])


def test_an_evolution_is_paid_by_it_and_resumes_alike(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(trained.parent)  # a relative path in the recipe
    learned = ["evolve.rewards={preference: 1.0}", f"evolve.reward_options.preference.model={trained.name}"]
    recipe = small_model.small_recipe(tmp_path / "whole", *learned, steps=3)
    pipeline.run(recipe)
    assert load([str(tmp_path / "whole" / "recipe.yaml")]).evolve == pipeline.with_absolute_paths(recipe).evolve
    whole = list(Run.open(tmp_path / "whole").lines("metrics.jsonl"))
    assert len(whole) == 3
    assert all(line["reward/preference/seconds"] > 0 for line in whole)
    assert whole[0]["evolve/reward_mean"] != pytest.approx(whole[0]["evolve/payoff_mean"])

    broken = pipeline.with_absolute_paths(small_model.small_recipe(tmp_path / "broken", *learned, steps=3))
    with pytest.raises(pipeline.Interrupted):
        small_model.run_of(broken, stop=small_model.stop_before(2))
    run = small_model.run_of(broken)

    def timeless(line):
        return {key: v for key, v in small_model.reproducible(line).items() if not key.endswith("seconds")}

    assert [timeless(line) for line in whole] == [timeless(line) for line in run.lines("metrics.jsonl")]


def test_a_changed_reward_model_is_noticed(trained, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(trained, folder)
    recipe = small_model.small_recipe(
        tmp_path / "run", "evolve.rewards={preference: 1.0}", f"evolve.reward_options.preference.model={folder}"
    )
    run, _ = pipeline.start(recipe)
    (folder / "adapter_model.safetensors").write_bytes(b"other")
    with pytest.raises(InputError, match="has changed since this run began"):
        pipeline.resume(run.path)


def test_the_command_trains_one_and_measures_it_on_held_out_families(tmp_path):
    write_jsonl(pairs(), tmp_path / "pairs.jsonl")
    arguments = [
        *("model.name=tiny", "align.method=dpo", "scenarios.families=[ferry_pilot,archivist]"),
        *("evaluate.per_family=3", "reward_model.trl.max_steps=2", "track.wandb=disabled"),
        *("--pairs", "pairs.jsonl", "--out", "made/model"),
    ]
    output, _ = atp("reward-model", *arguments, cwd=tmp_path)
    metrics = json.loads((tmp_path / "made/model/metrics.json").read_text())
    held_out = [json.loads(line) for line in (tmp_path / "made/model/held_out.jsonl").read_text().splitlines()]
    assert {pair["family"] for pair in held_out} == {"archivist"}
    assert metrics["accuracy"]["n"] == len(held_out) > 0
    assert list(metrics["accuracy_by_family"]) == ["archivist"]
    assert metrics["pairs"] == metrics["accuracy_trained_on"]["n"] == 4
    assert f"n {len(held_out)} of the pairs of held-out families" in output
    made = reward_models.make(["preference"], {"preference": {"model": tmp_path / "made/model"}}, folder=tmp_path)
    assert made["preference"](prompts=["Hi"], completions=["A"])[0] is not None
    _, errors = atp("reward-model", *arguments, cwd=tmp_path, expect=2)
    assert "made/model: is there already" in errors
    held_out[0]["family"] = "ferry_pilot"
    write_jsonl(held_out, tmp_path / "pairs.jsonl")
    assert len(held_out) > 1
    _, errors = atp("reward-model", *arguments[:-1], "other", cwd=tmp_path, expect=2)
    assert "pairs of the families that are held out: archivist" in errors
