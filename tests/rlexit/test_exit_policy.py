"""Exit policies: what is refused, what is saved, and how many are batched."""

from __future__ import annotations

import json
import math

import pytest
import torch

from rlexit.exit_policy import ExitPolicy, threshold_rows
from rlexit.rules import rules


def test_nan_is_refused_and_the_exit_is_named():
    with pytest.raises(ValueError, match=r"`thresholds\[1\]` must be a number, got nan. Use inf to close an exit."):
        ExitPolicy("confidence", (0.5, math.nan))


def test_an_unknown_rule_is_answered_with_the_nearest():
    with pytest.raises(LookupError, match=r"`rule` must be a known name, got 'confidense'. Did you mean 'confidence'"):
        ExitPolicy("confidense", (0.5,))


def test_a_policy_without_a_label_is_called_by_its_rule_and_thresholds():
    assert ExitPolicy("margin", (0.5, 0.5)).label == "margin@0.5"
    assert ExitPolicy("margin", (0.5, math.inf)).label == "margin@0.5,inf"
    assert ExitPolicy("margin", (0.5,), "mine").label == "mine"


def test_the_scorer_is_the_rule_itself():
    assert isinstance(ExitPolicy("patience", (1.0,)).scorer, rules["patience"])


def test_leaving_always_at_an_exit_closes_those_before():
    assert ExitPolicy.always(1, 4).thresholds == (math.inf, -math.inf, -math.inf)
    assert ExitPolicy.always(0, 2).thresholds == (-math.inf,)
    assert ExitPolicy.always(2, 3).thresholds == (math.inf, math.inf)
    assert ExitPolicy.always(1, 4).label == "exit 1"
    assert ExitPolicy.always(2, 3).label == "full"
    assert ExitPolicy.full(3).thresholds == (math.inf, math.inf)
    assert ExitPolicy.full(1).thresholds == ()


def test_a_policy_survives_json_with_its_infinities_and_provenance():
    policy = ExitPolicy("entropy", (-math.inf, -0.25, math.inf), "a", {"target": "target_macs=0.5", "rounds": [1]})
    text = json.dumps(policy.to_json(), allow_nan=False)
    assert ExitPolicy.from_json(json.loads(text)) == policy


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"rule": "confidence", "label": "", "provenance": {}},
        {"rule": "confidence", "thresholds": None, "label": "", "provenance": {}},
        {"rule": "confidence", "thresholds": [[]], "label": "", "provenance": {}},
        {"rule": "confidence", "thresholds": ["much"], "label": "", "provenance": {}},
        {"rule": "confidence", "thresholds": [0.5], "label": "", "provenance": 3},
        {"rule": "confidence", "thresholds": ["nan"], "label": "", "provenance": {}},
    ],
)
def test_json_that_is_no_exit_policy_is_refused(value):
    with pytest.raises(ValueError, match="must"):
        ExitPolicy.from_json(value)


def test_policies_of_one_rule_become_rows_of_thresholds():
    rows = threshold_rows([ExitPolicy("margin", (0.1, 0.2)), ExitPolicy("margin", (math.inf, -math.inf))], 3)
    torch.testing.assert_close(rows, torch.tensor([[0.1, 0.2], [math.inf, -math.inf]]))


def test_a_network_without_early_exits_has_rows_without_thresholds():
    assert threshold_rows([ExitPolicy.full(1), ExitPolicy.full(1)], 1).shape == (2, 0)


def test_a_policy_for_another_number_of_exits_is_refused():
    with pytest.raises(
        ValueError, match=r"`thresholds` must have 3 values for 4 exits, got 2 in 'margin@0.1'. Calibrate"
    ):
        threshold_rows([ExitPolicy("margin", (0.1, 0.1))], 4)


def test_policies_of_different_rules_do_not_share_a_batch():
    with pytest.raises(ValueError, match=r"`rule` must be the same within a batch, got \['entropy', 'margin'\]"):
        threshold_rows([ExitPolicy("margin", (0.1,)), ExitPolicy("entropy", (-0.1,))], 2)
