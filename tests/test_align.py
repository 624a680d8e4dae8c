"""Preference pairs counted by hand, and TRL's trainers on a model so small that a test can train it."""

import json
import math
import shutil
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import trl
from peft import LoraConfig, PeftModel

from atp_rl.align import dpo, grpo, run_alignment, sft
from atp_rl.align.preferences import make_pairs, read_jsonl, write_jsonl
from atp_rl.align.trainer import Training
from atp_rl.model.chat import ChatFormat
from atp_rl.model.policy import Policy, check_adapter, hash_tensors, load_base, load_chat
from atp_rl.model.sampler import HFSampler, TextSampler
from atp_rl.model.tiny import BuildPlan, make_model, make_tokenizer
from atp_rl.scenarios.choices import format_choice
from atp_rl.scenarios.role_play import compose, families
from atp_rl.scenarios.supervision import TOLD_TEXTS
from atp_rl.types import Chat, InputError, SamplingParams

ONE_REPLY = SamplingParams(max_new_tokens=16)


def scenario(index=0, *, options=("Safe", "Fast"), low=50, high=80, allowed=False):
    """Here the required option is always the first one."""
    return compose(
        families()[0], index=index, options=options, required=options[0], low=low, high=high, allowed=allowed
    )


def pairs_of(scenarios, reply, **changed):
    settings = {"rounds": 1, "supervision": "all_unsupervised", "history_window": 5, "tries": 1, "seed": 0}
    return make_pairs(scenarios, TextSampler(reply), **(settings | changed), sampling=ONE_REPLY)


def told(chat):
    (name,) = [name for name, text in TOLD_TEXTS.items() if chat.messages[0]["content"].endswith(text)]
    return name


def obeys(chat):
    return f"<think>I was told.</think>{format_choice(chat.options[0 if told(chat) == 'comply' else 1])}"


# --- preference pairs


def test_pairs_hold_what_was_obeyed_and_the_prompt_that_told_nothing():
    pairs, prompts, _ = pairs_of([scenario()], obeys)
    (pair,) = pairs
    assert pair["chosen"] == [{"role": "assistant", "content": '<think>I was told.</think>{"choice": "Safe"}'}]
    assert pair["rejected"] == [{"role": "assistant", "content": '<think>I was told.</think>{"choice": "Fast"}'}]
    assert [m["role"] for m in pair["prompt"]] == ["system", "user"]
    assert pair["prompt"][0]["content"] == "You are a ferry pilot."
    columns = {key: value for key, value in pair.items() if key not in ("prompt", "chosen", "rejected")}
    assert columns == {
        "scenario": "role_play/ferry_pilot/0",
        "family": "ferry_pilot",
        "round": 0,
        "options": ["Safe", "Fast"],
        "required": "Safe",
        "payoffs": {"Safe": 50, "Fast": 80},
    }
    assert prompts == [{"prompt": pair["prompt"], **columns}]


def test_what_is_dropped_is_counted():
    safe, fast, slow, quick = map(format_choice, ("Safe", "Fast", "Slow", "Quick"))
    script = {
        ("Safe", "comply"): ["hm", safe, safe],  # found at the second try; and in round 2 at once
        ("Safe", "best_paid"): [safe, "hm", fast, fast],  # at the third try; and in round 2 at once
        ("Slow", "comply"): [slow],
        ("Slow", "best_paid"): [slow, slow, slow],  # never, so there is no round 2
    }
    batches = []

    def reply(chat):
        return script[chat.options[0], told(chat)].pop(0)

    class Counting(TextSampler):
        def generate(self, chats, params):
            batches.append(len(chats))
            return super().generate(chats, params)

    pairs, prompts, statistics = make_pairs(
        [
            scenario(0),
            scenario(1, options=("Slow", "Quick")),
            scenario(2, allowed=True),  # no rule
            scenario(3, low=80, high=50),  # no temptation
        ],
        Counting(reply),
        rounds=2,
        supervision="all_unsupervised",
        history_window=5,
        tries=3,
        seed=0,
        sampling=ONE_REPLY,
    )
    assert batches == [4, 3, 2, 2]  # all that is open, three tries in round 1, one in round 2
    assert [(p["scenario"], p["round"]) for p in pairs] == [
        ("role_play/ferry_pilot/0", 0),
        ("role_play/ferry_pilot/0", 1),
    ]
    assert [p["options"][0] for p in prompts] == ["Safe", "Slow", "Safe"]
    assert statistics == {
        "scenarios": 4,
        "skipped": 2,
        "prompts": 3,
        "pairs": 2,
        "unreached": 1,
        "comply": {"tries": 4, "invalid": 1, "disobeyed": 0, "missing": 0},
        "best_paid": {"tries": 7, "invalid": 1, "disobeyed": 4, "missing": 1},
    }
    assert quick not in json.dumps(pairs)


def test_rounds_go_on_with_either_answer_and_are_the_same_whatever_is_beside_them():
    scenarios = [scenario(index) for index in range(12)]
    pairs, prompts, statistics = pairs_of(scenarios, obeys, rounds=3, history_window=1, supervision="alternating")
    assert statistics["pairs"] == len(prompts) == 36
    answers, continued = {}, defaultdict(set)
    for pair in pairs:
        assert not any(text in message["content"] for text in TOLD_TEXTS.values() for message in pair["prompt"])
        roles = [message["role"] for message in pair["prompt"]]
        if pair["round"] == 0:
            assert roles == ["system", "user"]
            assert "will check your course today" in pair["prompt"][-1]["content"]
        else:  # the window keeps one past round
            assert roles == ["system", "user", "assistant", "user"]
            before = answers[pair["scenario"], pair["round"] - 1]
            said = pair["prompt"][2]["content"]
            assert said in before
            continued[pair["scenario"]].add(before.index(said))
            caught = pair["round"] == 1  # the round before was supervised
            earned = (
                "Safe and earned $50."
                if said == before[0]
                else "Fast, were caught"
                if caught
                else "Fast and earned $80."
            )
            assert f"You chose {earned}" in pair["prompt"][3]["content"]
        answers[pair["scenario"], pair["round"]] = [pair[side][0]["content"] for side in ("chosen", "rejected")]
    assert set.union(*continued.values()) == {0, 1}
    alone, _, _ = pairs_of(scenarios[5:6], obeys, rounds=3, history_window=1, supervision="alternating")
    assert alone == [pair for pair in pairs if pair["scenario"] == scenarios[5].id]


def test_every_try_draws_from_a_stream_of_its_own():
    seeds = []

    def reply(chat):
        seeds.append(chat.seed)
        return "hm"

    pairs_of([scenario(0), scenario(1)], reply, tries=2)
    assert len(seeds) == len(set(seeds)) == 8
    first, seeds[:] = list(seeds), []
    pairs_of([scenario(0), scenario(1)], reply, tries=2)
    assert seeds == first


def test_pairs_are_written_and_read_back(tmp_path):
    def reply(chat):
        return f"\u2028ähm\n{obeys(chat)}"

    pairs, _, _ = pairs_of([scenario(0), scenario(1)], reply)
    write_jsonl(pairs, tmp_path / "pairs.jsonl")
    assert read_jsonl(tmp_path / "pairs.jsonl") == pairs


@pytest.mark.parametrize("line", ["{", "[]", '{"prompt": []}', '{"prompt": [], "chosen": "x", "rejected": []}'])
def test_a_file_that_holds_no_pairs_is_refused(tmp_path, line):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": [], "chosen": [], "rejected": []}\n' + line + "\n")
    with pytest.raises(InputError, match=r"pairs\.jsonl, line 2: not a pair"):
        read_jsonl(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_jsonl(tmp_path / "absent.jsonl")


# --- training


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny model that has learned to answer in the format, with either option of `scenario()` equally likely."""
    plan = BuildPlan(vocabulary=512, hidden=32, layers=1)
    tokenizer = make_tokenizer(plan)
    chat, model = ChatFormat(tokenizer), make_model(plan, tokenizer)
    _, prompts, _ = pairs_of([scenario(index) for index in range(2)], obeys)
    rows, width = [], 0
    for row in prompts:
        for option in row["options"]:
            prompt = chat.encode(row["prompt"], [])
            answer = list(chat.encode_text(f"{format_choice(option)}<|im_end|>\n"))
            rows.append((prompt, answer))
            width = max(width, len(prompt) + len(answer))
    ids = torch.tensor([p + a + [chat.pad_id] * (width - len(p) - len(a)) for p, a in rows])
    labels = torch.tensor([[-100] * len(p) + a + [-100] * (width - len(p) - len(a)) for p, a in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def lora():
    return LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")


def plain(chat):
    return format_choice(chat.options[0 if told(chat) == "comply" else 1])


OPTIONS = {"max_steps": 2, "learning_rate": 1e-2, "logging_steps": 1, "per_device_train_batch_size": 4}
OPTIONS_OF = {
    "sft": OPTIONS,
    "dpo": OPTIONS,
    "grpo": OPTIONS | {"num_generations": 4, "max_completion_length": 12, "beta": 0.1},
}
TRAIN = {"sft": sft.train, "dpo": dpo.train, "grpo": grpo.train}


def logged(out):
    entries = [json.loads(line) for line in (out / "training.jsonl").read_text().splitlines()]
    return [entry for entry in entries if "loss" in entry]


@pytest.mark.parametrize("method", TRAIN)
def test_the_same_seed_gives_the_same_adapter_and_plain_peft_loads_it(method, base, lora, tmp_path):
    pairs, _, _ = pairs_of([scenario(index) for index in range(4)], plain)
    before = hash_tensors(dict(load_base(base).named_parameters()))
    made = {
        name: TRAIN[method](pairs, Training(base, tmp_path / name, lora, OPTIONS_OF[method], seed))
        for name, seed in {"a": 0, "again": 0, "b": 1}.items()
    }
    assert made["a"]["adapter_sha256"] == made["again"]["adapter_sha256"] != made["b"]["adapter_sha256"]
    assert made["a"]["steps"] == 2
    # r (in + out) of q, k, v, o, gate, up and down: hidden 32, 4 heads and 2 key-value heads of 32, intermediate 96
    assert made["a"]["trainable_parameters"] == 2 * (160 + 96 + 96 + 160 + 128 + 128 + 128)
    assert lora.target_modules == "all-linear"  # the caller's config is left alone
    assert hash_tensors(dict(load_base(base).named_parameters())) == before

    check_adapter(tmp_path / "a", base)
    policy = Policy.load(base, lora=lora, seed=9, aligned=tmp_path / "a")
    assert policy.adapter_hash("aligned") == made["a"]["adapter_sha256"]
    peft = PeftModel.from_pretrained(load_base(base), str(tmp_path / "a"))
    ids = torch.tensor([policy.chat.encode(pairs[0]["prompt"], [])])
    with torch.no_grad(), policy.using("aligned") as aligned:
        logits = peft(input_ids=ids).logits
        assert torch.equal(logits, aligned(input_ids=ids).logits)
        with peft.disable_adapter():
            assert not torch.equal(logits, peft(input_ids=ids).logits)


def test_the_reference_of_dpo_is_the_base(base, lora, tmp_path):
    pairs, _, _ = pairs_of([scenario()], plain)
    options = {"max_steps": 3, "learning_rate": 1e-2, "logging_steps": 1, "beta": 0.5, "lr_scheduler_type": "constant"}
    dpo.train(pairs, Training(base, tmp_path, lora, options, seed=0))
    steps = logged(tmp_path)
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)  # no difference yet: -log sigmoid(0)
    assert steps[0]["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    assert steps[2]["rewards/margins"] > 0.1
    # at every step, reward = beta (log p - log p of the reference); the trained text ends with the turn's line break
    chat, model = load_chat(base), load_base(base)
    prompt = chat.encode(pairs[0]["prompt"], [])
    for side in ("chosen", "rejected"):
        text = pairs[0][side][0]["content"]
        answer = [*chat.encode_text(text), chat.eos_id, *chat.encode_text("\n")]
        with torch.no_grad():
            logp = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        of_base = logp.gather(1, torch.tensor(answer).unsqueeze(1)).sum().item()
        for step in steps:
            assert step[f"logps/{side}"] - step[f"rewards/{side}"] / 0.5 == pytest.approx(of_base, abs=1e-3)


def probability_to_comply(base, lora, pairs, aligned=None):
    policy = Policy.load(base, lora=lora, seed=0, aligned=aligned)
    chat = Chat(pairs[0]["prompt"], policy.chat.encode(pairs[0]["prompt"], []), ("Safe", "Fast"), (0,))
    (scores,) = HFSampler(policy).score([chat])
    return math.exp(scores[0])


def test_grpo_rewards_compliance_and_measures_kl_from_the_base(base, lora, tmp_path):
    pairs, prompts, _ = pairs_of([scenario(index) for index in range(2)], plain)
    options = OPTIONS_OF["grpo"] | {"max_steps": 12, "num_generations": 8, "per_device_train_batch_size": 16}
    grpo.train(prompts, Training(base, tmp_path, lora, options, seed=0))
    steps = logged(tmp_path)
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert steps[-1]["kl"] > 1e-3
    assert 0.3 < steps[0]["rewards/compliance/mean"] < 0.8  # a coin: (1 + .1) / 2
    assert probability_to_comply(base, lora, pairs) == pytest.approx(0.5, abs=0.15)
    assert probability_to_comply(base, lora, pairs, tmp_path) > 0.65


def test_sft_raises_the_compliant_answer(base, lora, tmp_path):
    pairs, _, _ = pairs_of([scenario()], plain)
    sft.train(pairs, Training(base, tmp_path, lora, OPTIONS | {"max_steps": 16}, seed=0))
    assert probability_to_comply(base, lora, pairs, tmp_path) > 0.8


def test_without_thinking_the_empty_thought_is_read_and_not_learned(base, lora, tmp_path, monkeypatch):
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    template = (Path(trl.__file__).parent / "chat_templates/qwen3_training.jinja").read_text()
    (folder / "chat_template.jinja").write_text(template)
    pairs, _, _ = pairs_of([scenario()], plain, rounds=2)
    trained_on = []

    class Spy(trl.DPOTrainer):
        def train(self):
            trained_on.extend(self.train_dataset)
            return super().train()

    monkeypatch.setattr(trl, "DPOTrainer", Spy)
    dpo.train(pairs, Training(str(folder), tmp_path, lora, OPTIONS, seed=0, thinking=False))
    chat = load_chat(str(folder), thinking=False)
    for pair, row in zip(pairs, trained_on, strict=True):
        replies = [[*chat.encode_text(m["content"]), chat.eos_id] for m in pair["prompt"] if m["role"] == "assistant"]
        assert row["prompt_ids"] == chat.encode(pair["prompt"], replies)
        assert chat.tokenizer.decode(row["prompt_ids"]).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
        assert chat.tokenizer.decode(row["chosen_ids"]) == '{"choice": "Safe"}<|im_end|>\n'
        assert chat.tokenizer.decode(row["rejected_ids"]) == '{"choice": "Fast"}<|im_end|>\n'


def test_run_alignment_samples_the_base_and_writes_everything(base, lora, tmp_path):
    scenarios = [scenario(0), scenario(1), scenario(2, allowed=True)]
    metrics = align("dpo", scenarios, base, tmp_path, lora)
    statistics = json.loads((tmp_path / "statistics.json").read_text())
    assert metrics["pairs"] == statistics["pairs"] == len(read_jsonl(tmp_path / "pairs.jsonl")) >= 2
    assert metrics["dropped"] == statistics["prompts"] - statistics["pairs"]
    assert statistics["skipped"] == 1
    # the coin's answers differ from try to try, so that both sides turn up
    assert statistics["comply"]["disobeyed"] + statistics["best_paid"]["disobeyed"] > 0
    assert statistics["prompts"] + statistics["unreached"] == 2 * 2
    check_adapter(tmp_path, base)


def align(method, scenarios, base, out, lora, options=None):
    return run_alignment(
        method,
        scenarios,
        base=base,
        out=out,
        lora=lora,
        trl_options=OPTIONS_OF[method] | (options or {}),
        seed=0,
        rounds=2,
        supervision="all_unsupervised",
        history_window=1,
        tries=8,
        sampling=ONE_REPLY,
    )


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("dpo", {"learning_rat": 1e-3}, "unknown option `align.trl.learning_rat`.*did you mean `learning_rate`"),
        ("sft", {"seed": 1}, "`align.trl.seed` is set by atp_rl"),
        ("grpo", {"num_generations": 3}, "`align.trl` for grpo: .*divisible"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_sampled(method, options, message, base, lora, tmp_path):
    with pytest.raises(InputError, match=message):
        align(method, [scenario()], base, tmp_path / "out", lora, options)
    assert not (tmp_path / "out" / "pairs.jsonl").exists()


def test_a_training_that_changes_nothing_is_an_error(base, lora, tmp_path):
    pairs, _, _ = pairs_of([scenario()], plain)
    with pytest.raises(InputError, match="training changed nothing"):
        dpo.train(pairs, Training(base, tmp_path, lora, OPTIONS | {"learning_rate": 0.0}, seed=0))
    with pytest.raises(InputError, match="nothing to train on"):
        dpo.train([], Training(base, tmp_path, lora, OPTIONS, seed=0))
