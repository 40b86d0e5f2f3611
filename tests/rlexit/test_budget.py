"""Hard budgets: no row costs more than it may, whatever the gates, heads and rules; more budget never answers earlier."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlexit.config import GateConfig
from rlexit.costs import cost_table
from rlexit.evaluate import budgeted
from rlexit.exit_policy import ExitPolicy
from rlexit.runtime import run
from tests.rlexit.test_leave import LEARNED, plain
from tests.rlexit.toy_domain import SMALL, ToyDomain
from tests.rlexit.toys import EXITS, OUTPUTS, TOYS, executed, parting, residual, scatter, staged, watched

INF = math.inf
SHUT = ExitPolicy("confidence", (INF,) * (EXITS - 1))
ACCOUNTS = ("reserve", "anytime")


def dynamic():
    """Layers and channels skipped for real, and exits that answer for themselves."""
    torch.manual_seed(3)
    network = residual("both", GateConfig("mgl2s", bias=0.0))
    scatter(network)
    return network.eval()


def within(network, budgets, inputs, policy=SHUT, **more):
    return run(network, policy, inputs, budgets=torch.as_tensor(budgets), infeasible="violated", **more)


@pytest.mark.parametrize("accounting", ACCOUNTS)
@pytest.mark.parametrize("name", list(TOYS))
@settings(max_examples=5)
@given(shares=st.lists(st.floats(0.0, 1.2), min_size=7, max_size=7))
def test_no_row_costs_more_than_its_budget_unless_it_is_said_so(name, accounting, shares):
    toy = TOYS[name]
    network, inputs = toy.network(), toy.inputs(7)
    table = cost_table(network, inputs)
    budgets = torch.tensor([int(share * table.exits[-1]) for share in shares])
    with watched(network) as work:
        result = within(network, budgets, inputs, accounting=accounting)
    assert work.macs == int(result.macs.sum())
    assert bool((result.macs <= budgets)[~result.violated].all())
    assert bool((result.exits == 0)[result.violated].all())
    assert bool((result.exits == EXITS - 1)[budgets >= table.exits[-1]].all())
    assert result.answers.isfinite().all()


@pytest.mark.parametrize("accounting", ACCOUNTS)
def test_no_row_of_a_dynamic_network_costs_more_than_its_budget(accounting):
    network, inputs = dynamic(), torch.randn(32, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    table = cost_table(network, inputs)
    budgets = torch.linspace(0.1, 1.0, 32).mul(table.exits[-1]).to(torch.int64)
    result = executed(lambda: within(network, budgets, inputs, accounting=accounting))
    assert bool((result.macs <= budgets)[~result.violated].all())
    assert len(set(result.exits.tolist())) == EXITS


@pytest.mark.parametrize("accounting", ACCOUNTS)
@pytest.mark.parametrize("build", [dynamic, lambda: staged(cascade=True), lambda: staged(cascade=False)])
def test_a_larger_budget_never_leads_to_an_earlier_exit(build, accounting):
    network = build()
    row = TOYS["skips"].inputs(1)
    table = cost_table(network, row)
    budgets = torch.linspace(0, 1, 60).mul(table.exits[-1]).ceil().to(torch.int64)
    result = within(network, budgets, row.expand(len(budgets), -1, -1, -1), accounting=accounting)
    assert bool((result.exits.diff() >= 0).all())
    assert result.exits[0] == 0
    assert result.exits[-1] == 2
    assert bool((result.violated.int().diff() <= 0).all())


@pytest.mark.parametrize("name", list(TOYS))
@pytest.mark.parametrize("rule", ["confidence", "patience"])
def test_a_full_budget_changes_nothing(name, rule):
    toy = TOYS[name]
    network, inputs = toy.network(), toy.inputs(7)
    policy = parting(network, inputs) if rule == "confidence" else ExitPolicy(rule, (1.0,) * (EXITS - 1))
    full = torch.full((7,), cost_table(network, inputs).exits[-1])
    free, bound = run(network, policy, inputs), run(network, policy, inputs, budgets=full)
    assert torch.equal(free.exits, bound.exits)
    torch.testing.assert_close(free.answers, bound.answers)
    assert not bound.violated.any()
    assert bool((bound.macs >= free.macs).all())  # a head that a later exit may need is built in time


def test_a_hard_budget_for_a_whole_set_pays_for_the_row_that_skips_nothing():
    torch.manual_seed(3)
    network, inputs = TOYS["residual_layers"].network().eval(), 3 * torch.randn(64, 4, 8, 8)
    first = run(network, ExitPolicy.always(0, EXITS), inputs).macs
    cheapest, dearest = inputs[first.argmin()][None], inputs[first.argmax()][None]
    table = cost_table(network, inputs)
    between = int(first.min()) / table.full + 1e-6
    run(network, SHUT, cheapest, budgets=torch.tensor([int(between * table.full)]))  # the example alone could pay
    with pytest.raises(ValueError, match=r"`budgets\[0\]` must pay"):
        run(network, SHUT, dearest, budgets=torch.tensor([int(between * table.full)]))

    def domain(share):
        made = ToyDomain(replace(SMALL, evaluate=replace(SMALL.evaluate, hard_budgets=(share,))))
        made.metric, made.example = "accuracy", lambda: cheapest
        return made

    with pytest.raises(ValueError, match="`evaluate.hard_budgets` must be at least .* where every gate is open"):
        budgeted(domain(between), network)
    (policy,) = budgeted(domain(table.exits[0] / table.full + 1e-6), network)
    assert not run(network, policy, inputs).violated.any()


def test_a_row_answers_at_the_latest_exit_that_its_budget_pays_for():
    network, inputs = staged(cascade=False), TOYS["cascade"].inputs(4)
    conv = 4 * 4 * 9 * 64
    table = cost_table(network, inputs)
    heads = list(table.heads.values())
    firsts = [conv + heads[0], 2 * conv + heads[1], 3 * conv + heads[2]]  # the returned head alone is built
    # On its way to the last exit a row keeps in hand what answering at the one before would cost.
    budgets = torch.tensor([firsts[0], firsts[1] - 1, firsts[1], 3 * conv + max(heads[1:])])
    with watched(network) as work:
        result = run(network, SHUT, inputs, budgets=budgets)
    assert result.exits.tolist() == [0, 0, 1, 2]
    # The second row runs no unit behind which it could not pay for an answer.
    assert result.macs.tolist() == [firsts[0], firsts[0], firsts[1], firsts[2]]
    assert [work.rows[f"heads.{name}"] for name in network.exit_names] == [2, 1, 1]


def test_anytime_builds_every_head_that_is_passed():
    network, inputs = staged(cascade=False), TOYS["cascade"].inputs(4)
    table = cost_table(network, inputs)
    budgets = torch.tensor([table.exits[0], table.exits[1] - 1, table.exits[1], table.exits[2]])
    with watched(network) as work:
        result = run(network, SHUT, inputs, budgets=budgets, accounting="anytime")
    assert result.exits.tolist() == [0, 0, 1, 2]
    assert [work.rows[f"heads.{name}"] for name in network.exit_names] == [4, 2, 1]
    assert result.macs[2:].tolist() == list(table.exits[1:])


@pytest.mark.parametrize("accounting", ACCOUNTS)
def test_the_answer_is_that_of_the_exit_where_the_row_stopped(accounting):
    network, inputs = dynamic(), TOYS["skips"].inputs(7)
    trace = network(inputs)
    budgets = torch.linspace(0.3, 1.0, 7).mul(cost_table(network, inputs).exits[-1]).to(torch.int64)
    result = within(network, budgets, inputs, accounting=accounting)
    told = trace.answers[torch.arange(7), result.exits]
    torch.testing.assert_close(result.answers, told, rtol=1e-4, atol=1e-4)


def test_rows_that_skip_more_get_further_within_the_same_budget():
    network, inputs = residual("none", GateConfig("random", rates=(0.5,))), TOYS["skips"].inputs(32)
    table = cost_table(network, inputs)
    result = within(network, torch.full((32,), int(0.6 * table.exits[-1])), inputs)
    assert len(result.exits.unique()) > 1


def test_a_sure_row_does_not_spend_its_budget():
    network, inputs = staged(), TOYS["cascade"].inputs(4)
    full = torch.full((4,), cost_table(network, inputs).exits[2])
    assert run(network, ExitPolicy("confidence", (-1.0, 2.0)), inputs, budgets=full).exits.tolist() == [0] * 4


@pytest.mark.parametrize("accounting", ACCOUNTS)
def test_leave_gates_are_paid_from_the_budget_too(accounting):
    network, inputs = plain(), TOYS["skips"].inputs(20)
    table = cost_table(network, inputs)
    gates = 2 * (4 * 2 * 2 * 8 + 8)
    budgets = torch.linspace(0.2, 1.0, 20).mul(table.exits[-1] + gates).to(torch.int64)
    with watched(network) as work:
        result = within(network, budgets, inputs, LEARNED, accounting=accounting)
    assert bool((result.macs <= budgets)[~result.violated].all())
    assert work.macs == int(result.macs.sum())
    full = run(network, LEARNED, inputs, budgets=torch.full((20,), table.exits[-1] + gates), accounting=accounting)
    assert torch.equal(full.exits, run(network, LEARNED, inputs).exits)


def test_an_infeasible_budget_is_an_error_or_said_to_be_violated():
    network, inputs = staged(), TOYS["cascade"].inputs(3)
    first = cost_table(network, inputs).exits[0]
    budgets = torch.tensor([first, first - 1, 10**9])
    with pytest.raises(ValueError, match=rf"`budgets\[1\]` must pay for the first exit, got {first - 1} .* to {first}"):
        run(network, SHUT, inputs, budgets=budgets)
    result = run(network, SHUT, inputs, budgets=budgets, infeasible="violated")
    assert result.violated.tolist() == [False, True, False]
    assert result.exits.tolist() == [0, 0, 2]
    assert int(result.macs[1]) == first


@pytest.mark.parametrize("accounting", ACCOUNTS)
def test_no_rows_need_no_budget(accounting):
    network = staged()
    none = torch.zeros(0, dtype=torch.int64)
    result = run(network, SHUT, TOYS["cascade"].inputs(0), budgets=none, accounting=accounting)
    assert result.answers.shape == (0, OUTPUTS)
    assert result.violated.shape == (0,)


def test_memory_is_that_of_the_exit_where_the_row_stopped():
    toy = TOYS["memory"]
    network, inputs = toy.network(), toy.inputs(4)
    table = cost_table(network, inputs)
    result = within(network, [table.exits[0], table.exits[1], table.exits[2], table.exits[2]], inputs)
    assert result.memory["exit"].tolist() == result.exits.tolist() == [0, 1, 2, 2]


def test_unknown_accounting_and_budgets_of_another_length_are_refused():
    network, inputs = staged(), TOYS["cascade"].inputs(2)
    budgets = torch.tensor([10**9, 10**9])
    with pytest.raises(ValueError, match="`accounting` must be reserve or anytime, got 'later'"):
        run(network, SHUT, inputs, budgets=budgets, accounting="later")
    with pytest.raises(ValueError, match="`infeasible` must be raise or violated, got 'ignore'"):
        run(network, SHUT, inputs, budgets=budgets, infeasible="ignore")
    with pytest.raises(ValueError, match=r"`budgets` must have 2 numbers, got \(1,\)"):
        run(network, SHUT, inputs, budgets=budgets[:1])
