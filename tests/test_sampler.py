"""What the sampler says it drew is what the policy would have drawn, whatever is cached, cut or batched."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from scipy.stats import chisquare

from atp_rl.model.policy import TINY, Policy, base_path, check_adapter, load_base, load_chat
from atp_rl.model.sampler import HFSampler, TextSampler
from atp_rl.model.tiny import BuildPlan, make_model
from atp_rl.rollout import Play, rollout
from atp_rl.scenarios import load
from atp_rl.scenarios.choices import format_choice
from atp_rl.types import Chat, InputError, Sampler, SamplingParams

TOKENS = 12
"""In a reply, at most; most end sooner."""


def shake(policy, seed=1, scale=0.1):
    """Give the live adapter weights that matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.trainable:
            parameter += scale * torch.randn(parameter.shape, generator=generator)


@pytest.fixture
def policy(random_base, lora):
    """On the bare base, with a live adapter that changes it."""
    made = Policy.load(random_base, lora=lora, seed=0)
    shake(made)
    return made


@pytest.fixture
def adapter(policy, tmp_path):
    policy.save_adapter(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def anchored(random_base, lora, adapter):
    """Starts from an aligned adapter, which it has left since."""
    made = Policy.load(random_base, lora=lora, seed=0, aligned=adapter)
    shake(made, seed=2)
    return made


@pytest.fixture(scope="session")
def scenarios():
    """Of families with texts of different length."""
    return load({"families": ["ferry_pilot", "welder", "beekeeper", "tailor"], "per_family": 1})


def play(sampler, scenarios, *, rounds=3, window=5, group_size=2, tokens=TOKENS, temperature=1.0, seed=(0, "test")):
    """All turns of all episodes."""
    settings = Play(
        rounds=rounds,
        supervision="alternating",
        history_window=window,
        sampling=SamplingParams(max_new_tokens=tokens, temperature=temperature),
    )
    played = rollout(scenarios, sampler, settings, group_size=group_size, seed=seed)
    return [turn for episode in played.episodes for turn in episode.turns]


def logprobs(policy, turns, **options):
    """What the policy gives to the drawn tokens, in one plain forward of the whole rows without any cache."""
    rows = [[*t.prompt_ids, *t.completion.token_ids] for t in turns]
    acted = [range(len(t.prompt_ids), len(row)) for t, row in zip(turns, rows, strict=True)]
    with torch.no_grad():
        result = policy.acted_tokens(rows, acted, **options)
    return [values[mask].tolist() for values, mask in zip(result.logprobs, result.mask, strict=True)]


def agree(turns, expected, tolerance=1e-4):
    for turn, values in zip(turns, expected, strict=True):
        assert turn.completion.logprobs == pytest.approx(values, abs=tolerance)


def drawn(turns):
    return [turn.completion.token_ids for turn in turns]


def widths(policy):
    """Shapes [rows, tokens] of everything that the model reads from now on."""
    shapes = []

    def note(module, args, kwargs):
        shapes.append(tuple(kwargs["input_ids"].shape))

    policy.model.register_forward_pre_hook(note, with_kwargs=True)
    return shapes


def chat_of(policy, text, seed=(0,), options=("Route A", "Route B")):
    messages = [{"role": "system", "content": "You pilot."}, {"role": "user", "content": text}]
    return Chat(messages, policy.chat.encode(messages, []), options, seed)


# --- log-probabilities


@pytest.mark.parametrize(("window", "rounds"), [(5, 4), (1, 4), (0, 3)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_drawn_logprobs_are_the_policys(policy, scenarios, window, rounds, temperature):
    turns = play(HFSampler(policy), scenarios, rounds=rounds, window=window, temperature=temperature)
    lengths = {len(ids) for ids in drawn(turns)}
    assert len(turns) == 4 * 2 * rounds
    assert min(lengths) <= 2  # from replies that ended almost at once ...
    assert max(lengths) == TOKENS  # ... to those that were cut off
    agree(turns, logprobs(policy, turns, temperature=temperature))


def test_the_fixture_tells_contexts_apart(policy, scenarios):
    # otherwise equal log-probabilities would prove little: another first token of the prompt changes them
    turns = play(HFSampler(policy), scenarios, rounds=1)
    other = [replace(turn, prompt_ids=(7, *turn.prompt_ids[1:])) for turn in turns]
    pairs = zip(logprobs(policy, turns), logprobs(policy, other), strict=True)
    assert max(abs(a - b) for before, after in pairs for a, b in zip(before, after, strict=True)) > 0.01


def test_a_reply_ends_with_its_end_token_or_at_the_limit(policy, scenarios):
    eos = policy.chat.eos_id
    for turn in play(HFSampler(policy), scenarios, group_size=8):
        ids = turn.completion.token_ids
        assert eos not in ids[:-1]
        assert turn.completion.stop_reason == ("stop" if ids[-1] == eos else "length")
        assert len(ids) <= TOKENS
        assert ids[-1] == eos or len(ids) == TOKENS
        assert turn.completion.text == policy.chat.decode(ids)
        assert "<|im_end|>" not in turn.completion.text


def test_later_rounds_read_only_what_was_added(policy, scenarios):
    shapes = widths(policy)
    turns = play(HFSampler(policy), scenarios[:1], rounds=3, group_size=4)
    reads = [shape for shape in shapes if shape[1] > 1]
    by_round = [[t for t in turns if t.round == k] for k in range(3)]
    assert reads[0] == (1, len(by_round[0][0].prompt_ids))  # the group's common prompt, once
    for k in (1, 2):
        added = [
            len(now.prompt_ids) - len(before.prompt_ids) - len(before.completion.token_ids) + 1
            for before, now in zip(by_round[k - 1], by_round[k], strict=True)
        ]  # and the last token of the reply, which was drawn but not read
        distinct = len({t.prompt_ids for t in by_round[k]})
        assert reads[k] == (distinct, max(added))
        assert max(added) < len(by_round[0][0].prompt_ids) / 2


def test_where_the_window_has_cut_the_prompt_is_read_anew(policy, scenarios):
    shapes = widths(policy)
    turns = play(HFSampler(policy), scenarios[:1], rounds=2, window=0, group_size=2)
    reads = [shape for shape in shapes if shape[1] > 1]
    assert reads == [(1, len(turns[0].prompt_ids)), (1, len(turns[1].prompt_ids))]
    agree(turns, logprobs(policy, turns))


def test_chats_may_leave_return_in_another_order_and_branch(policy, scenarios):
    sampler, params = HFSampler(policy), SamplingParams(max_new_tokens=TOKENS)
    first = [
        chat_of(policy, text, (i,)) for i, text in enumerate(("One?", "Which of the two?", "What do you take now?"))
    ]
    replies = sampler.generate(first, params)
    after = policy.chat.encode_text("<|im_end|>\n<|im_start|>user\nAgain?<|im_end|>\n<|im_start|>assistant\n")

    def later(i, seed):
        return replace(first[i], prompt_ids=[*first[i].prompt_ids, *replies[i].token_ids, *after], seed=seed)

    second = [later(2, (5,)), later(0, (6,)), later(2, (7,))]  # the second chat is over, the third goes two ways
    warm = sampler.generate(second, params)
    cold = HFSampler(policy).generate(second, params)
    for a, b in zip(warm, cold, strict=True):
        assert a.token_ids == b.token_ids
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    # one chat that was never read makes the batch start over
    mixed = [later(1, (8,)), chat_of(policy, "New?", (9,))]
    for a, b in zip(sampler.generate(mixed, params), HFSampler(policy).generate(mixed, params), strict=True):
        assert a.token_ids == b.token_ids
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


# --- scores of options


def by_hand(policy, chat, **options):
    answers = [[*policy.chat.encode_text(format_choice(option)), policy.chat.eos_id] for option in chat.options]
    start = len(chat.prompt_ids)
    rows = [[*chat.prompt_ids, *answer] for answer in answers]
    with torch.no_grad():
        result = policy.acted_tokens(rows, [range(start, len(row)) for row in rows], **options)
    return tuple(result.logprobs.sum(1).tolist())


def test_scores_are_the_sum_over_the_canonical_answer_and_its_end(policy):
    chats = [
        chat_of(policy, "Route A or Route B?"),
        chat_of(
            policy, "Invest, or keep the money, or wait until spring?", options=("Invest", "Keep it", "Wait a year")
        ),
        chat_of(policy, "Route A or Route B?", options=("Route B", "Route A")),
    ]
    for sampler in (HFSampler(policy), HFSampler(policy, batch_size=2)):
        scores = sampler.score(chats)
        assert [len(s) for s in scores] == [2, 3, 2]
        for chat, score in zip(chats, scores, strict=True):
            assert score == pytest.approx(by_hand(policy, chat), abs=1e-4)
        assert scores[2] == pytest.approx(scores[0][::-1], abs=1e-4)


def test_scoring_and_playing_share_one_reading_and_do_not_disturb_each_other(policy, scenarios):
    plain = play(HFSampler(policy), scenarios)
    sampler, checked = HFSampler(policy), []

    class Scoring(TextSampler):
        """Scores every chat before it is played, and again afterwards."""

        def __init__(self):
            self.chat = policy.chat

        def generate(self, chats, params):
            before = sampler.score(chats)
            completions = sampler.generate(chats, params)
            after = sampler.score(chats)
            for chat, *scores in zip(chats, before, after, strict=True):
                for score in scores:
                    assert score == pytest.approx(by_hand(policy, chat), abs=1e-4)
                checked.append(chat)
            return completions

    scored = play(Scoring(), scenarios)
    assert len(checked) == 4 * 2 * 3
    assert drawn(scored) == drawn(plain)
    agree(scored, [turn.completion.logprobs for turn in plain])

    shapes = widths(policy)
    chat = chat_of(policy, "Route A or Route B?")
    fresh = HFSampler(policy)
    fresh.score([chat])
    fresh.generate([chat], SamplingParams(max_new_tokens=1))
    assert [shape for shape in shapes if shape[1] == len(chat.prompt_ids)] == [(1, len(chat.prompt_ids))]


def test_scores_are_probabilities_of_drawing_the_answer(policy):
    # of a model that answers nothing else, the options' probabilities sum to one; of this one, to hardly anything
    (score,) = HFSampler(policy).score([chat_of(policy, "Route A or Route B?")])
    assert all(value < 0 for value in score)
    assert sum(np.exp(score)) < 1


# --- draws


def test_a_reply_is_the_same_whatever_is_beside_it(policy, scenarios):
    reference = play(HFSampler(policy, batch_size=64), scenarios, group_size=3)
    small = play(HFSampler(policy, batch_size=3), scenarios, group_size=3)
    uneven = play(HFSampler(policy, batch_size=5), scenarios, group_size=3)
    assert drawn(small) == drawn(uneven) == drawn(reference)
    agree(small, [turn.completion.logprobs for turn in reference])
    alone = play(HFSampler(policy), scenarios[2:3], group_size=3)
    assert drawn(alone) == drawn(reference)[18:27]  # 3 rounds of 3 episodes of each scenario
    backwards = play(HFSampler(policy), scenarios[::-1], group_size=3)
    assert drawn(backwards)[:9] == drawn(reference)[-9:]
    # a smaller group is the beginning of a larger one
    assert drawn(play(HFSampler(policy), scenarios[:1], group_size=2)) == drawn(reference)[:6]
    assert drawn(play(HFSampler(policy), scenarios, group_size=3, seed=(1, "test"))) != drawn(reference)


def test_a_group_reads_its_prompt_once_and_its_samples_differ(policy):
    shapes = widths(policy)
    chats = [chat_of(policy, text, (i,)) for i, text in enumerate(["Which?", "Which one of these?"] * 8)]
    completions = HFSampler(policy).generate(chats, SamplingParams(max_new_tokens=4))
    assert shapes[0] == (2, len(chats[1].prompt_ids))
    assert {width for _, width in shapes[1:]} == {1}  # from there on, one token of every open reply at a time
    assert max(rows for rows, _ in shapes[1:]) == 16
    assert len({c.token_ids for c in completions}) == 16
    again = HFSampler(policy).generate([chats[3], replace(chats[0], seed=chats[3].seed), chats[3]], SamplingParams(4))
    assert again[0] == again[2]
    assert again[0].token_ids == completions[3].token_ids  # the seed and the prompt decide, nothing else


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_draws_follow_the_distribution(policy, temperature):
    n = 4096
    chat = chat_of(policy, "Which one do you take?")
    chats = [replace(chat, seed=(11, i)) for i in range(n)]
    completions = HFSampler(policy).generate(chats, SamplingParams(max_new_tokens=1, temperature=temperature))
    prompt = torch.tensor([chat.prompt_ids])
    with torch.no_grad():
        p = (policy.model(input_ids=prompt).logits[0, -1].double() / temperature).softmax(-1).numpy()
    counts = np.bincount([c.token_ids[0] for c in completions], minlength=len(p))
    common = p * n >= 5
    assert common.sum() > 20
    observed = [*counts[common], counts[~common].sum()]
    expected = [*p[common] * n, p[~common].sum() * n]
    assert chisquare(observed, expected).pvalue > 1e-3
    for completion in completions[:50]:
        assert completion.logprobs == pytest.approx([np.log(p[completion.token_ids[0]])], abs=1e-4)


# --- which weights


def test_sync_takes_the_new_weights_and_forgets_what_was_read(policy, scenarios):
    sampler = HFSampler(policy)
    assert isinstance(sampler, Sampler)
    assert sampler.version == policy.version == 0
    old = play(sampler, scenarios, rounds=2)
    shake(policy, seed=5)
    policy.version = 7
    sampler.sync(policy)
    assert sampler.version == 7
    new = play(sampler, scenarios, rounds=2)  # the very same prompts: nothing of the old reading may be used
    agree(new, logprobs(policy, new))
    assert drawn(new) == drawn(play(HFSampler(policy), scenarios, rounds=2))
    assert drawn(new) != drawn(old)


def test_a_sampler_of_the_aligned_adapter_plays_the_anchor(anchored, policy, scenarios):
    turns = play(HFSampler(anchored, "aligned"), scenarios)
    agree(turns, logprobs(anchored, turns, players="aligned"))
    agree(turns, logprobs(policy, turns))  # from which the anchor was saved
    assert drawn(turns) == drawn(play(HFSampler(policy), scenarios))
    live = play(HFSampler(anchored), scenarios)
    agree(live, logprobs(anchored, live))
    assert drawn(live) != drawn(turns)
    chat = chat_of(anchored, "Route A or Route B?")
    (score,) = HFSampler(anchored, "aligned").score([chat])
    assert score == pytest.approx(by_hand(anchored, chat, players="aligned"), abs=1e-4)
    assert abs(score[0] - by_hand(anchored, chat)[0]) > 0.01


def test_without_an_aligned_adapter_the_anchor_is_the_bare_base(policy, random_base, lora, scenarios):
    turns = play(HFSampler(policy, "aligned"), scenarios)
    untouched = Policy.load(random_base, lora=lora, seed=3)  # a fresh adapter adds nothing
    agree(turns, logprobs(untouched, turns))
    assert drawn(turns) == drawn(play(HFSampler(untouched), scenarios))
    assert drawn(turns) != drawn(play(HFSampler(policy), scenarios))


def test_a_script_has_no_tokens_and_no_probabilities():
    sampler = TextSampler(lambda chat: f"I take {chat.options[0]}.")
    assert isinstance(sampler, Sampler)
    chat = Chat([], [], ("A", "B"), (0,))
    (completion,) = sampler.generate([chat], SamplingParams(max_new_tokens=1))
    assert (completion.text, completion.token_ids, completion.logprobs) == ("I take A.", (), ())
    assert np.isnan(sampler.score([chat])).tolist() == [[True, True]]


# --- the policy


def test_acted_tokens_by_hand(policy):
    rows = [[5, 6, 7, 8, 9], [5, 6, 7]]
    acted = [[2, 4], [1]]  # apart from each other, and rows of different length
    for temperature in (1.0, 0.5):
        result = policy.acted_tokens(rows, acted, temperature=temperature)
        assert result.mask.tolist() == [[True, True], [True, False]]
        for i, (row, positions) in enumerate(zip(rows, acted, strict=True)):
            logp = (policy.model(input_ids=torch.tensor([row])).logits[0] / temperature).log_softmax(-1)
            for j, p in enumerate(positions):
                entropy = -(logp[p - 1].exp() * logp[p - 1]).sum().item()
                assert result.logprobs[i, j].item() == pytest.approx(logp[p - 1, row[p]].item(), abs=1e-4)
                assert result.entropy[i, j].item() == pytest.approx(entropy, abs=1e-4)
        assert result.logprobs[1, 1].item() == result.entropy[1, 1].item() == 0
        assert result.logprobs.requires_grad
        assert not result.entropy.requires_grad


def learn(policy, steps=3):
    optimizer = torch.optim.AdamW(policy.trainable, lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        anchor = policy.acted_tokens([[5, 6, 7, 8]], [[2, 3]], players="aligned").logprobs
        assert not anchor.requires_grad
        live = policy.acted_tokens([[5, 6, 7, 8]], [[2, 3]]).logprobs
        (live - anchor).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("which", ["policy", "anchored"])
def test_learning_moves_the_live_adapter_alone(which, request):
    policy = request.getfixturevalue(which)
    aligned, live, base = policy.adapter_hash("aligned"), policy.adapter_hash("policy"), policy.base_hash()
    names = {name for name, p in policy.model.named_parameters() if p.requires_grad}
    assert names
    assert all(".policy." in name and "lora_" in name for name in names)
    learn(policy)
    assert policy.adapter_hash("policy") != live
    assert policy.adapter_hash("aligned") == aligned
    assert policy.base_hash() == base
    assert {name for name, p in policy.model.named_parameters() if p.requires_grad} == names
    assert all(p.grad is None for name, p in policy.model.named_parameters() if name not in names)


def test_using_the_anchor_ends_even_where_it_fails(anchored):
    before = anchored.acted_tokens([[5, 6, 7]], [[2]]).logprobs

    def fails():
        with anchored.using("aligned") as model:
            assert not any(p.requires_grad for p in model.parameters())  # PEFT makes trainable whatever it activates
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fails()
    after = anchored.acted_tokens([[5, 6, 7]], [[2]]).logprobs
    assert torch.equal(before, after)
    assert after.requires_grad


def test_the_policy_starts_as_the_aligned_adapter(random_base, lora, adapter, policy):
    started = Policy.load(random_base, lora=lora, seed=9, aligned=adapter)
    assert started.adapter_hash("policy") == started.adapter_hash("aligned") == policy.adapter_hash("policy")
    assert started.has_aligned
    assert not policy.has_aligned
    assert started.base_hash() == policy.base_hash()


def test_a_fresh_adapter_depends_on_its_seed_alone(random_base, lora):
    def fresh(seed):
        return Policy.load(random_base, lora=lora, seed=seed).adapter_hash("policy")

    first = fresh(0)
    torch.rand(5)  # what was drawn before does not matter
    assert fresh(0) == first != fresh(1)


@pytest.mark.parametrize("which", ["policy", "anchored"])
def test_restoring_is_exact(which, request, tmp_path):
    policy = request.getfixturevalue(which)
    aligned, live, state = policy.adapter_hash("aligned"), policy.adapter_hash("policy"), policy.state()
    save_file(state, tmp_path / "state.safetensors")
    learn(policy)
    assert policy.adapter_hash("policy") != live  # and the saved state has not moved along
    policy.restore(load_file(tmp_path / "state.safetensors"))
    assert (policy.adapter_hash("policy"), policy.adapter_hash("aligned")) == (live, aligned)
    learn(policy)  # and it can still learn
    assert policy.adapter_hash("policy") != live


def test_a_state_of_another_shape_is_refused(policy):
    state, before = policy.state(), policy.adapter_hash("policy")
    key = next(iter(state))
    for wrong in (
        state | {key.replace("layers.0", "layers.9"): state[key]},
        {k: v for k, v in state.items() if k != key},
        {},
        state | {key: state[key][:1]},
    ):
        with pytest.raises(InputError, match="does not fit the adapter: missing, unexpected or reshaped"):
            policy.restore(wrong)
    assert policy.adapter_hash("policy") == before


def test_plain_peft_loads_a_saved_adapter(policy, adapter, random_base):
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["peft_type"], config["base_model_name_or_path"], config["r"]) == ("LORA", random_base, 2)
    plain = PeftModel.from_pretrained(load_base(random_base), str(adapter))
    ids = torch.randint(3, 500, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, policy.model(input_ids=ids).logits)


# --- adapters that are refused


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def other_shape(folder):
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({k: torch.zeros(3, 3) for k in weights}, folder / "adapter_model.safetensors")


def half(folder):
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({k: v for k, v in weights.items() if "layers.0" in k}, folder / "adapter_model.safetensors")


def extra_layer(folder):
    weights = load_file(folder / "adapter_model.safetensors")
    weights |= {k.replace("layers.0", "layers.9"): v.clone() for k, v in weights.items() if "layers.0" in k}
    save_file(weights, folder / "adapter_model.safetensors")


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "no LoRA adapter here"),
        (lambda f: (f / "adapter_config.json").unlink(), "no LoRA adapter here"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "no LoRA adapter here"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "the adapter cannot be read"),
        (lambda f: (f / "adapter_config.json").write_text("[]"), "the adapter cannot be read"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x" * 64), "the adapter cannot be read"),
        (lambda f: edit(f, peft_type="IA3"), "only LoRA adapters are supported, this one is 'IA3'"),
        (
            lambda f: edit(f, base_model_name_or_path="other/model"),
            "was made for the base model 'other/model', not for",
        ),
        (lambda f: save_file({"w": torch.zeros(1)}, f / "adapter_model.safetensors"), "holds no LoRA weights"),
        (other_shape, "does not fit the base model"),
        (half, "does not fit the base model"),
        (extra_layer, "does not fit the base model"),
    ],
)
def test_a_damaged_adapter_is_refused(damage, message, adapter, random_base, lora):
    damage(adapter)
    with pytest.raises(InputError, match=message) as refused:
        Policy.load(random_base, lora=lora, seed=0, aligned=adapter)
    assert str(adapter) in str(refused.value)


def test_an_adapter_of_a_larger_model_is_refused(adapter, random_base, lora, tmp_path):
    # the names agree, as those of two revisions of one model would
    larger = tmp_path / "larger"
    shutil.copytree(random_base, larger)
    make_model(BuildPlan(vocabulary=512, hidden=64, layers=2), load_chat(random_base).tokenizer).save_pretrained(larger)
    edit(adapter, base_model_name_or_path=str(larger))
    check_adapter(adapter, str(larger))  # which reads headers only
    with pytest.raises(InputError, match="does not fit the base model"):
        Policy.load(str(larger), lora=lora, seed=0, aligned=adapter)


def test_an_adapter_of_the_tiny_model_may_name_it_or_its_folder(adapter):
    for name in (TINY, base_path(TINY)):
        edit(adapter, base_model_name_or_path=name)
        check_adapter(adapter, TINY)
    edit(adapter, base_model_name_or_path=None)
    with pytest.raises(InputError, match="made for the base model None, not for 'tiny'"):
        check_adapter(adapter, TINY)


def test_a_directory_of_the_base_model_may_be_written_in_several_ways(adapter, random_base, tmp_path, monkeypatch):
    folder = Path(random_base)
    monkeypatch.chdir(folder.parent)
    (tmp_path / "link").symlink_to(folder)
    for name in (
        f"./{folder.name}",
        f"{folder.parent.name}/{folder.name}",
        f"../{folder.name}",
        str(tmp_path / "link"),
    ):
        edit(adapter, base_model_name_or_path=name)
        for base in (random_base, f"./{folder.name}"):
            check_adapter(adapter, base)
    for name in (".", "..", f"other/{folder.name}", f"/other/{folder.name}", str(tmp_path)):
        edit(adapter, base_model_name_or_path=name)
        with pytest.raises(InputError, match="made for the base model"):
            check_adapter(adapter, random_base)


def test_a_base_that_is_not_there_is_refused(tmp_path):
    for name in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match="cannot be loaded"):
            load_base(str(name))


def test_an_adapter_that_was_saved_for_inference_is_trained_nevertheless(random_base):
    frozen = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", inference_mode=True)
    model = get_peft_model(load_base(random_base), frozen, adapter_name="policy")
    assert not any(p.requires_grad for p in model.parameters())
    policy = Policy(model, load_chat(random_base), random_base)
    live = policy.adapter_hash("policy")
    learn(policy)
    assert policy.adapter_hash("policy") != live


def test_reading_an_adapter_asks_no_hub(anchored, monkeypatch):
    def ask(*_):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", ask)
    for config in anchored.model.peft_config.values():
        monkeypatch.setattr(config, "base_model_name_or_path", "tiny")  # no folder of that name
    assert any("lora_A" in name for name in anchored.state())
    assert len(anchored.adapter_hash("aligned")) == 64
