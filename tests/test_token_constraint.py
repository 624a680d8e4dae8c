"""Token constraint: weights of tokens by hand, and which tokens decide."""

from __future__ import annotations

import math

import pytest
import torch

from atp_rl.defenses import LossBatch
from atp_rl.defenses.token_constraint import Decisions, TokenConstraint, damping
from atp_rl.model.policy import load_chat
from atp_rl.types import InputError
from tests.small_model import make_policy
from tests.small_pairs import setting

TWO = math.log(2)
"""A token that is twice as likely as under the aligned adapter."""


@pytest.mark.parametrize(
    ("moved", "advantage", "b", "weight"),
    [
        (0.0, 1.0, 2.0, 1.0),  # where it was
        (TWO, 1.0, 1.0, 2 / 3),  # 2 / (1 + 2)
        (TWO, 0.3, 2.0, 2 / 5),  # 2 / (1 + 4), whatever the advantage's size
        (TWO, -1.0, 2.0, 8 / 5),  # pushed back: 2 / (1 + 1/4)
        (-TWO, -1.0, 1.0, 2 / 3),  # pushed down, and already down
        (-TWO, 1.0, 1.0, 4 / 3),
        (TWO, 0.0, 2.0, 1.0),
    ],
)
def test_the_weight_of_a_token_by_hand(moved, advantage, b, weight):
    anchor = torch.tensor([[-3.0]])
    found = damping(anchor + moved, anchor, torch.tensor([[advantage]]), torch.tensor([[b]]))
    assert float(found) == pytest.approx(weight, abs=1e-6)


def test_the_loss_changes_by_weight_less_one_most_on_the_decision():
    policy = make_policy()
    constraint = TokenConstraint(b=0.5, factor=2.0)
    constraint.prepare(setting(policy, 0))
    constraint.begin(1)
    ids = [*policy.chat.encode_text('the rule. {"choice": "Route A"}'), policy.chat.eos_id]
    decides = constraint.spans.of(ids)
    assert any(decides)
    assert not all(decides)
    anchor = torch.full((1, len(ids) + 1), -2.0)
    mask = torch.tensor([[True] * len(ids) + [False]])
    logprobs = (anchor + TWO).masked_fill(~mask, 0.0).requires_grad_()
    weights = mask / len(ids)
    surrogate = logprobs * 3
    batch = LossBatch(
        logprobs,
        logprobs.detach(),
        lambda: anchor,
        mask,
        weights,
        torch.tensor([[*ids, 0]]),
        torch.tensor([[1.0]]),
        surrogate,
        torch.zeros(1),
    )
    loss = constraint.extra_loss(batch)
    # b = .5 elsewhere: 2 / (1 + sqrt 2); b = 1 on the decision: 2 / (1 + 2)
    change = [2 / 3 - 1 if d else 2 / (1 + math.sqrt(2)) - 1 for d in decides]
    assert loss.item() == pytest.approx(sum(c / len(ids) * 3 * (-2 + TWO) for c in change), abs=1e-5)
    assert constraint.metrics["damped"] == pytest.approx(-sum(change) / len(ids), abs=1e-6)
    loss.backward()
    assert logprobs.grad is not None
    wanted = [*(c / len(ids) * 3 for c in change), 0.0]
    assert logprobs.grad[0].tolist() == pytest.approx(wanted, abs=1e-6)  # weights are constants


@pytest.mark.parametrize(
    ("replies", "decision"),
    [
        (['{"choice": "Route A"}'], '{"choice": "Route A"}'),
        (['the rule. {"choice": "A"} the time {"choice": "Route B"}'], '{"choice": "Route B"}'),  # the last one
        (['the rule. {"choice": "Route A'], '{"choice": "Route A'),  # cut off
        (["the rule says so"], ""),
        (['{"other": 1} the'], ""),
        (['{"choice": "A"}', 'the rule. {"choice": "B"}'], '{"choice": "A"}{"choice": "B"}'),  # two rounds
        ([], ""),
    ],
)
def test_the_tokens_that_decide(replies, decision):
    chat = load_chat("tiny")
    ids = [token for reply in replies for token in (*chat.encode_text(reply), chat.eos_id)]
    spans = Decisions(chat).of(ids)
    assert len(spans) == len(ids)
    text = "".join(chat.tokenizer.decode([token]) for token, decides in zip(ids, spans, strict=True) if decides)
    assert text.replace(" {", "{") == decision


@pytest.mark.parametrize(
    ("options", "message"),
    [({"b": 0.0}, "`b` must be > 0, got 0.0"), ({"factor": 0.5}, "`factor` must be >= 1, got 0.5")],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        TokenConstraint(**options)
