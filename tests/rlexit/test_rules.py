"""Every registered rule: one score per row, from the row alone, larger where it may leave sooner."""

from __future__ import annotations

import math

import pytest
import torch

from rlexit.config import RULES
from rlexit.rules import Rule, rules
from rlexit.state import ExitState
from tests.rlexit.toys import SCORERS


def state_of(logits: torch.Tensor) -> ExitState:
    """Rows at their newest exit, each exit answering for itself."""
    batch = len(logits)
    return ExitState(
        rows=torch.arange(batch),
        features=None,
        logits=logits,
        answer=logits[:, -1].log_softmax(dim=-1),
        macs=torch.zeros(batch, dtype=torch.int64),
        exit=logits.shape[1],
    )


def answered(probabilities: list[list[float]]) -> ExitState:
    """Rows whose answer has these probabilities at the only exit."""
    return state_of(torch.tensor(probabilities).log()[:, None])


@pytest.fixture
def logits():
    return torch.randn((7, 3, 6), generator=torch.Generator().manual_seed(0)) * 2


def test_all_five_rules_register_themselves():
    assert {"confidence", "entropy", "learned", "margin", "patience"} <= set(rules)


@pytest.mark.parametrize("name", SCORERS)
def test_every_rule_gives_one_finite_score_per_row(name, logits):
    rule = rules[name]()
    assert isinstance(rule, Rule)
    for batch in (0, 1, 7):
        score = rule.score(state_of(logits[:batch]))
        assert score.shape == (batch,)
        assert torch.isfinite(score).all()


@pytest.mark.parametrize("name", SCORERS)
def test_every_rule_reads_a_rows_own_numbers_only(name, logits):
    rule = rules[name]()
    together = rule.score(state_of(logits))
    for row in range(7):
        torch.testing.assert_close(rule.score(state_of(logits[row : row + 1])), together[row : row + 1])
    mirrored = rule.score(state_of(logits.flip(0)))
    torch.testing.assert_close(mirrored.flip(0), together)


@pytest.mark.parametrize("name", SCORERS)
def test_every_rule_lets_the_surer_row_leave_sooner(name):
    surer = torch.tensor([9.0, 0.0, 0.0]).expand(3, 3)
    unsure = torch.tensor([[0.0, 0.1, 0.0], [0.0, 0.0, 0.1], [0.1, 0.0, 0.0]])
    score = rules[name]().score(state_of(torch.stack([surer, unsure])))
    assert score[0] > score[1]


@pytest.mark.parametrize("name", SCORERS)
def test_every_rule_works_with_a_single_output(name):
    score = rules[name]().score(state_of(torch.zeros(4, 2, 1)))
    assert score.shape == (4,)
    assert torch.isfinite(score).all()


@pytest.mark.parametrize("name", SCORERS)
def test_a_rule_that_needs_no_earlier_exit_reads_none(name, logits):
    rule = rules[name]()
    blind = logits.clone()
    blind[:, :-1] = torch.nan
    if not rule.needs_every_exit:
        torch.testing.assert_close(rule.score(state_of(blind)), rule.score(state_of(logits)))


def test_confidence_is_the_largest_probability():
    score = rules["confidence"]().score(answered([[0.7, 0.2, 0.1], [0.25, 0.25, 0.5]]))
    torch.testing.assert_close(score, torch.tensor([0.7, 0.5]))


def test_confidence_of_a_one_hot_answer_is_golden():
    # One-hot logits of height 1, 2, 3, 4 over three outputs.
    logits = torch.eye(3)[:1] * torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    score = rules["confidence"]().score(state_of(logits[:, None]))
    torch.testing.assert_close(score, torch.tensor([0.576117, 0.786986, 0.909443, 0.964663]), rtol=0, atol=1e-6)


def test_entropy_is_negative_and_counts_an_impossible_output_as_0():
    score = rules["entropy"]().score(answered([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]))
    torch.testing.assert_close(score, torch.tensor([-math.log(2), 0.0]))


def test_margin_is_the_lead_of_the_first_over_the_second():
    score = rules["margin"]().score(answered([[0.7, 0.2, 0.1], [0.4, 0.4, 0.2]]))
    torch.testing.assert_close(score, torch.tensor([0.5, 0.0]))


def test_patience_counts_the_streak_that_ends_at_the_newest_exit():
    choices = [[0, 0, 0], [1, 0, 0], [0, 1, 0], [2, 2, 1]]
    logits = torch.nn.functional.one_hot(torch.tensor(choices), 3).float()
    assert rules["patience"]().score(state_of(logits)).tolist() == [3.0, 2.0, 1.0, 1.0]


def test_patience_reads_the_exits_own_logits_and_not_the_ensemble():
    logits = torch.nn.functional.one_hot(torch.tensor([[0, 0]]), 3).float()
    from dataclasses import replace

    state = replace(state_of(logits), answer=torch.tensor([[0.0, 1.0, 0.0]]).log_softmax(dim=-1))
    assert rules["patience"]().score(state).tolist() == [2.0]


def test_the_rules_that_a_config_may_name_are_those_that_are_registered():
    assert list(RULES) == sorted(rules)
