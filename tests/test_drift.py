"""Drift at the decision: which tokens decide, and their share of the KL, against a computation by other means.

The KL of whole replies is tested in `test_evaluator.py`.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atp_rl.evaluate.drift import Drift, decision_tokens, drift_to_aligned, kl_to_aligned
from atp_rl.model.policy import ALIGNED
from tests.small_model import make_policy, nudge, turn


@pytest.fixture(scope="module")
def policy():
    policy = make_policy()
    nudge(policy, 0.05, seed=4)
    return policy


odd = st.text("ab {}é日", max_size=12)


@given(odd, st.sampled_from(["Route A", "Fähre", "守る"]), odd)
@settings(max_examples=60, deadline=None)
def test_the_deciding_tokens_hold_the_decision_and_no_token_more(policy, before, option, after):
    chat, decision = policy.chat, '{"choice": "' + option + '"}'
    ids = chat.encode_text(before + decision + after)
    where = decision_tokens(chat, ids)
    assert where is not None
    assert decision in chat.decode(ids[where.start : where.stop])
    for shorter in (where[1:], where[:-1]):
        assert decision not in chat.decode(ids[shorter.start : shorter.stop])


def test_replies_without_a_decision_have_no_deciding_tokens(policy):
    chat = policy.chat
    assert decision_tokens(chat, chat.encode_text("I will not say.")) is None
    assert decision_tokens(chat, ()) is None


def test_the_kl_at_the_decision_is_that_of_its_tokens(policy):
    chat = policy.chat
    texts = ['I think {"choice": "Safe"} now', '{"choice": "Fast"}', "no decision", '{"choice": "Fast"}']
    prompt = chat.encode_text("Which one?")
    turns = [turn(prompt, (*chat.encode_text(text), chat.eos_id)) for text in texts]
    per_token = []
    for each in turns:
        ids = torch.tensor([[*each.prompt_ids, *each.completion.token_ids]])
        rows = []
        for adapter in ("policy", ALIGNED):
            with torch.no_grad(), policy.using(adapter):
                rows.append(policy.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1))
        p, q = rows
        per_token.append((p.exp() * (p - q)).sum(-1))
    where = decision_tokens(chat, turns[0].completion.token_ids)
    assert where is not None
    assert 0 < where.start < where.stop < len(per_token[0])
    at_decision = [per_token[0][where.start : where.stop].sum(), *[per_token[i][:-1].sum() for i in (1, 3)]]
    drift = drift_to_aligned(policy, turns)
    assert drift.decided == 3
    assert drift.decision == pytest.approx(float(sum(at_decision)) / 3, rel=1e-4)
    assert drift.reply == pytest.approx(float(sum(x.sum() for x in per_token)) / 4, rel=1e-4)
    assert drift.reply == pytest.approx(kl_to_aligned(policy, turns))


def test_nothing_decided_is_none_and_not_zero(policy):
    prompt = policy.chat.encode_text("Which one?")
    drift = drift_to_aligned(policy, [turn(prompt, policy.chat.encode_text("Neither."))])
    assert drift.reply is not None
    assert (drift.decision, drift.decided) == (None, 0)
    assert drift_to_aligned(policy, []) == Drift(None, None, 0)
