"""Leave gates: asked before the head, charged to the rows asked, and the learned rule that reads them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from rlexit.exit_policy import ExitPolicy
from rlexit.gates.leave import LeaveGate
from rlexit.macs import macs_per_row
from rlexit.network import StagedNetwork
from rlexit.runtime import replay, run
from tests.rlexit.toys import EXITS, MAP, OUTPUTS, TOYS, linear_heads, staged, watched

LEARNED = ExitPolicy("learned", (0.5,) * (EXITS - 1))
GATE = 4 * 2 * 2 * 8 + 8


def leaving(**settings) -> StagedNetwork:
    """Three convolutions, exits that answer for themselves, and a leave gate that parts the rows at each early one."""
    torch.manual_seed(3)
    network = staged(**settings)
    gates = {name: LeaveGate.pooled(MAP, hidden=8, bias=0.0) for name in network.exit_names[:-1]}
    inputs = TOYS["skips"].inputs(32)
    for (name, gate), features in zip(gates.items(), network.taps(inputs), strict=False):
        logits = gate.module(features)
        with torch.no_grad():
            gate.module.logit.weight.mul_(2 / logits.std())
            gate.module.logit.bias.sub_((2 / logits.std() * logits).quantile(0.5))
        assert name in network.exit_names
    network.set_leave_gates(gates)
    return network.eval()


def plain() -> StagedNetwork:
    network = leaving(cascade=False)
    heads = linear_heads(network.exit_names, MAP)
    for name, head in heads.items():
        network.heads[name] = head
    return network.eval()


def test_rows_leave_where_the_gate_lets_them_go_with_more_than_half():
    network = plain()
    inputs = TOYS["skips"].inputs(7)
    result = run(network, LEARNED, inputs)
    for exit, features in enumerate(network.taps(inputs)[:-1]):
        gate = network.leave_gates[network.exit_names[exit]]
        wants = gate.module(features).flatten() > 0
        assert torch.equal((result.exits == exit) & (result.exits >= exit), wants & (result.exits >= exit))
    assert len(set(result.exits.tolist())) == EXITS


def test_a_shift_moves_who_leaves_and_level_tells_it():
    network = plain()
    inputs = TOYS["skips"].inputs(7)
    first = network.exit_names[0]
    gate, state = network.leave_gates[first], replace(network.begin(inputs), features=network.taps(inputs)[0])
    before = gate.level(state)
    gate.shift(100.0)
    torch.testing.assert_close(gate.level(state), before + 100.0)
    assert (run(network, LEARNED, inputs).exits == 0).all()
    gate.shift(-200.0)
    assert (run(network, LEARNED, inputs).exits > 0).all()


def test_who_goes_on_pays_for_the_gate_and_for_no_head():
    network = plain()
    inputs = TOYS["skips"].inputs(7)
    with watched(network) as work:
        result = run(network, LEARNED, inputs)
    conv, head = 4 * 4 * 9 * 64, 4 * 64 * OUTPUTS
    asked = (result.exits + 1).clamp(max=EXITS - 1)
    assert result.macs.tolist() == ((result.exits + 1) * conv + asked * GATE + head).tolist()
    assert int(result.macs.sum()) == work.macs
    for exit, name in enumerate(network.exit_names):
        assert work.rows[f"heads.{name}"] == int((result.exits == exit).sum())


@pytest.mark.parametrize("batch", [0, 1, 7])
def test_a_row_alone_is_told_what_it_is_told_in_a_batch(batch):
    network = plain()
    inputs = TOYS["skips"].inputs(batch)
    together = run(network, LEARNED, inputs)
    assert together.answers.shape == (batch, OUTPUTS)
    for row in range(batch):
        alone = run(network, LEARNED, inputs[row : row + 1])
        assert int(alone.exits) == int(together.exits[row])
        assert int(alone.macs) == int(together.macs[row])
        torch.testing.assert_close(alone.answers[0], together.answers[row])


def test_a_head_that_a_later_exit_reads_is_built_for_everybody():
    network = leaving(cascade=True)
    with watched(network) as work:
        result = run(network, LEARNED, TOYS["skips"].inputs(7))
    assert work.rows["heads.conv0"] == 7
    assert work.rows["heads.conv1"] == int((result.exits == 1).sum())
    assert int(result.macs.sum()) == work.macs


def test_expected_macs_of_hard_decisions_are_what_a_run_executes():
    inputs = TOYS["skips"].inputs(7)
    for network in (plain(), leaving(cascade=True)):
        torch.testing.assert_close(network(inputs).expected_macs, run(network, LEARNED, inputs).macs.float())


def test_the_price_of_compute_reaches_a_leave_gate_in_training_and_leaving_sooner_is_cheaper():
    network = plain().train()
    network(TOYS["skips"].inputs(7)).expected_macs.sum().backward()
    assert network.leave_gates["conv0"].module.logit.bias.grad < 0


def test_replay_acts_as_run_does_and_pays_for_everything():
    network, inputs = plain(), TOYS["skips"].inputs(7)
    real, replayed = run(network, LEARNED, inputs), replay(network, LEARNED, inputs)
    assert torch.equal(real.exits, replayed.exits)
    torch.testing.assert_close(real.answers, replayed.answers)
    assert (replayed.macs == replayed.macs[0]).all()
    assert bool((replayed.macs > real.macs).all())


@pytest.mark.parametrize(
    "limits", [(math.inf, 0.5), (0.5, math.inf), (-math.inf, 0.5), (math.inf, -math.inf), (0.5, -math.inf)]
)
def test_a_replay_asks_where_a_run_asks(limits):
    network, inputs = plain(), TOYS["skips"].inputs(7)
    shut = {
        name: gate
        for name, gate in network.leave_gates.items()
        if math.isfinite(limits[network.exit_names.index(name)])
    }
    network.set_leave_gates(shut)
    policy = ExitPolicy("learned", limits)
    real, replayed = run(network, policy, inputs), replay(network, policy, inputs)
    assert torch.equal(real.exits, replayed.exits)
    torch.testing.assert_close(real.answers, replayed.answers)
    reached = ~real.scores.isnan()
    torch.testing.assert_close(real.scores[reached], replayed.scores[reached])
    closed = torch.tensor([*limits, math.inf]).isinf()
    assert bool(replayed.scores[:, closed].isnan().all())


def test_thresholds_of_their_own_ask_the_same_rows_in_a_replay():
    network, inputs = plain(), TOYS["skips"].inputs(6)
    limits = torch.tensor([[0.5, 0.5], [math.inf, 0.5], [-math.inf, 0.5]]).repeat(2, 1)
    real, replayed = (
        run(network, LEARNED, inputs, thresholds=limits),
        replay(network, LEARNED, inputs, thresholds=limits),
    )
    assert torch.equal(real.exits, replayed.exits)
    assert bool(replayed.scores[:, 0].isnan().eq(limits[:, 0].isinf()).all())


def test_a_closed_exit_and_one_where_all_leave_ask_no_gate():
    network, inputs = plain(), TOYS["skips"].inputs(7)
    with watched(network) as work:
        result = run(network, ExitPolicy("learned", (math.inf, -math.inf)), inputs)
    assert result.exits.tolist() == [1] * 7
    assert result.leaving == ()
    assert not any(name.startswith("leave_gates") for name in work.calls)


def test_only_rows_whose_exit_is_open_are_asked():
    network, inputs = plain(), TOYS["skips"].inputs(7)
    thresholds = torch.tensor([[0.5, 0.5], [math.inf, 0.5], [-math.inf, 0.5]]).repeat(3, 1)[:7]
    with watched(network) as work:
        result = run(network, LEARNED, inputs, thresholds=thresholds)
    assert work.rows["leave_gates.conv0.module"] == 3
    assert int(result.macs.sum()) == work.macs
    assert result.exits[2] == result.exits[5] == 0


def test_sampled_decisions_count_and_have_the_log_probabilities_with_which_they_were_drawn():
    network, inputs = plain(), TOYS["skips"].inputs(7)
    result = run(network, LEARNED, inputs, mode="sample", generator=torch.Generator().manual_seed(1))
    greedy = run(network, LEARNED, inputs)
    assert not torch.equal(result.exits, greedy.exits)
    for exit, (rows, decision) in enumerate(result.leaving):
        assert torch.equal(rows, torch.nonzero(result.exits >= exit).flatten())
        assert torch.equal(decision.action == 1, result.exits[rows] == exit)
        logits = network.leave_gates[network.exit_names[exit]].module(network.taps(inputs)[exit]).flatten()[rows]
        p = logits.sigmoid()
        torch.testing.assert_close(decision.log_prob.exp(), torch.where(decision.action == 1, p, 1 - p))


def test_replayed_leave_decisions_have_the_same_log_probabilities_with_a_gradient():
    network, inputs = plain(), TOYS["skips"].inputs(7)
    sampled = network(inputs, generator=torch.Generator().manual_seed(1))
    again = network(inputs, leaving=sampled.leaving)
    for first, second in zip(sampled.leaving, again.leaving, strict=True):
        assert torch.equal(first.action, second.action)
        torch.testing.assert_close(first.log_prob, second.log_prob)
    sum(decision.log_prob.sum() for decision in again.leaving).backward()
    assert network.leave_gates["conv1"].module.logit.weight.grad.abs().sum() > 0
    assert network.units["conv0"].module[0].weight.grad is None  # the gate's input is detached by default


def test_an_exit_without_a_leave_gate_is_refused_where_it_is_open():
    network = staged(cascade=False)
    with pytest.raises(ValueError, match="`leave_gates` must have exit 'conv0' where a row may leave by them"):
        run(network, LEARNED, TOYS["cascade"].inputs(2))
    with pytest.raises(ValueError, match="`leave_gates` must name early exits, got 'conv2'"):
        network.set_leave_gates({"conv2": LeaveGate.pooled(MAP)})


def test_flat_features_need_no_pooling():
    gate = LeaveGate.pooled((12,), hidden=3)
    assert macs_per_row(gate.module, torch.zeros(1, 12)) == 12 * 3 + 3
    assert gate.module(torch.zeros(5, 12)).shape == (5, 1)


def test_a_leave_gate_may_be_any_module_with_one_logit_per_row():
    gate = LeaveGate(nn.Sequential(nn.Flatten(), nn.Linear(4 * 64, 1), nn.Flatten(0)))
    network = staged(cascade=False)
    network.set_leave_gates({"conv0": gate})
    result = run(network, ExitPolicy("learned", (0.5, math.inf)), TOYS["cascade"].inputs(7))
    assert len(result.leaving) == 1


def test_a_score_without_a_gate_is_an_error_of_order():
    network = plain()
    state = network.advance(network.begin(TOYS["skips"].inputs(1)))
    with pytest.raises(RuntimeError, match="`learned` must score rows that a leave gate was asked for"):
        LEARNED.scorer.score(state)
