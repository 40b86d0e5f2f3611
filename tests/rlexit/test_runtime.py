"""Real execution: it answers as training does, and does only the work that it answers for."""

from __future__ import annotations

import math
from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rlexit.costs import cost_table
from rlexit.ensembles import GeometricEnsemble
from rlexit.exit_policy import ExitPolicy
from rlexit.heads import ModuleHead
from rlexit.metrics import hindsight_improvability
from rlexit.network import StagedNetwork
from rlexit.residual import ResidualUnit
from rlexit.runtime import RunResult, replay, run
from rlexit.units import Unit
from tests.rlexit.toys import CHANNELS, EXITS, OUTPUTS, SCORERS, TOYS, Toy, parting, staged, watched

BATCHES = (0, 1, 7)
GATED = [name for name, toy in TOYS.items() if toy.gated]
INF = math.inf


def assert_alike(first: RunResult, second: RunResult) -> None:
    torch.testing.assert_close(first.answers, second.answers, rtol=0, atol=1e-5)
    assert first.exits.tolist() == second.exits.tolist()


# ---- golden sweep ----


class Given(nn.Module):
    """Logits that were written down: one-hot at the row's choice, higher at later exits."""

    def __init__(self, choices: list[int], height: float) -> None:
        super().__init__()
        self.register_buffer("logits", nn.functional.one_hot(torch.tensor(choices), 3).float() * height)

    def forward(self, rows: Tensor) -> Tensor:
        return self.logits[rows.long()]


class Priced(Unit):
    """Hands its input on at a stated price."""

    def __init__(self, price: int) -> None:
        super().__init__()
        self.price = price

    def body(self, features, decision=None):
        return features

    def macs(self, features, decision=None):
        return torch.full((len(features),), self.price)


CHOICES = [[0, 0, 0, 0], [1, 2, 2, 2], [2, 1, 2, 1], [0, 2, 1, 0], [1, 1, 2, 2]]
LABELS = torch.tensor([0, 2, 1, 1, 1])


@pytest.fixture
def golden() -> StagedNetwork:
    prices = (10, 15, 20, 5)
    units = OrderedDict((f"unit{exit}", Priced(price)) for exit, price in enumerate(prices))
    heads = {f"unit{exit}": ModuleHead(Given([row[exit] for row in CHOICES], exit + 1.0)) for exit in range(4)}
    return StagedNetwork(units, heads, 3)


def accuracy_and_cost(network: StagedNetwork, policy: ExitPolicy) -> tuple[float, float]:
    result = run(network, policy, torch.arange(5.0))
    right = result.answers.argmax(dim=-1) == LABELS
    return float(right.float().mean()), float(result.macs.float().mean())


@pytest.mark.parametrize(
    ("threshold", "accuracy", "cost"), [(0.3, 0.4, 10), (0.6, 0.8, 25), (0.8, 0.6, 45), (0.95, 0.6, 50), (1.0, 0.6, 50)]
)
def test_the_golden_sweep_over_confidence_is_met(golden, threshold, accuracy, cost):
    policy = ExitPolicy("confidence", (threshold,) * 3)
    assert accuracy_and_cost(golden, policy) == pytest.approx((accuracy, cost))


@pytest.mark.parametrize(("patience", "accuracy", "cost"), [(1, 0.4, 10), (2, 0.8, 39), (3, 0.6, 49), (4, 0.6, 50)])
def test_the_golden_sweep_over_patience_is_met(golden, patience, accuracy, cost):
    policy = ExitPolicy("patience", (patience - 1.0,) * 3)
    assert accuracy_and_cost(golden, policy) == pytest.approx((accuracy, cost))


def test_the_golden_hindsight_improvability_is_met(golden):
    answers = torch.stack(
        [run(golden, ExitPolicy.always(exit, 4), torch.arange(5.0)).answers for exit in range(4)], dim=1
    )
    assert answers.argmax(dim=-1).tolist() == CHOICES
    assert hindsight_improvability(answers.argmax(dim=-1).numpy(), LABELS.numpy()).tolist() == [0, 0, 1, 1]
    confidences = answers.exp().amax(dim=-1)[0]
    torch.testing.assert_close(confidences, torch.tensor([0.576117, 0.786986, 0.909443, 0.964663]), rtol=0, atol=1e-6)


def test_patience_of_1_is_leaving_always_at_the_first_exit(golden):
    patient = run(golden, ExitPolicy("patience", (0.0,) * 3), torch.arange(5.0))
    assert patient.exits.tolist() == [0] * 5
    assert patient.macs.tolist() == [10] * 5


# ---- laws over every kind of network ----


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", list(TOYS))
def test_leaving_always_at_an_exit_gives_what_forward_answers_there(name, batch):
    toy = TOYS[name]
    network = toy.network()
    inputs = toy.inputs(batch)
    trace = network(inputs)
    for exit in range(EXITS):
        result = run(network, ExitPolicy.always(exit, EXITS), inputs)
        torch.testing.assert_close(result.answers, trace.answers[:, exit], rtol=0, atol=1e-5)
        assert result.exits.tolist() == [exit] * batch


@pytest.mark.parametrize("rule", SCORERS)
@pytest.mark.parametrize("name", list(TOYS))
def test_a_row_alone_is_run_as_in_a_batch(name, rule):
    toy = TOYS[name]
    network = toy.network()
    inputs = toy.inputs(7)
    policy = parting(network, inputs, rule) if rule != "patience" else ExitPolicy(rule, (0.5, 1.5))
    together = run(network, policy, inputs)
    if rule == "confidence":
        assert len(together.exits.unique()) == EXITS
    for row in range(7):
        alone = run(network, policy, inputs[row : row + 1])
        torch.testing.assert_close(alone.answers[0], together.answers[row], rtol=0, atol=1e-5)
        torch.testing.assert_close(alone.scores[0], together.scores[row], rtol=0, atol=1e-5, equal_nan=True)
        assert alone.exits[0] == together.exits[row]
        assert alone.macs[0] == together.macs[row]


@pytest.mark.parametrize("name", list(TOYS))
def test_rows_come_back_in_the_order_in_which_they_came(name):
    toy = TOYS[name]
    network = toy.network()
    inputs = toy.inputs(7)
    policy = parting(network, inputs)
    order = torch.tensor([4, 0, 6, 2, 5, 1, 3])
    straight, shuffled = run(network, policy, inputs), run(network, policy, inputs[order])
    torch.testing.assert_close(shuffled.answers, straight.answers[order], rtol=0, atol=1e-5)
    assert shuffled.exits.tolist() == straight.exits[order].tolist()
    assert shuffled.macs.tolist() == straight.macs[order].tolist()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", GATED)
def test_gathered_execution_equals_masked_training_for_random_gates(name, seed):
    toy = TOYS[name]
    network = toy.network()
    inputs = toy.inputs(7, seed)
    dense = network(inputs, generator=torch.Generator().manual_seed(seed))
    for exit in range(EXITS):
        policy = ExitPolicy.always(exit, EXITS)
        sparse = run(network, policy, inputs, mode="sample", generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(sparse.answers, dense.answers[:, exit], rtol=0, atol=1e-5)
    for (rows, decision), expected in zip(sparse.decisions, dense.decisions, strict=True):
        assert rows.tolist() == list(range(7))
        assert torch.equal(decision.action, expected.action)
    actions = torch.stack([decision.action for decision in dense.decisions])
    assert len(actions.unique()) > 1


@pytest.mark.parametrize("name", [name for name in TOYS if not TOYS[name].gated or TOYS[name].skippable])
def test_executing_everything_is_the_plain_backbone_bit_for_bit(name):
    toy = TOYS[name]
    network = toy.network(bias=100.0) if toy.skippable else toy.network()
    inputs = toy.inputs(7)
    result = run(network, ExitPolicy.full(EXITS), inputs)
    assert all(bool((decision.action == 1).all()) for _, decision in result.decisions)
    with torch.no_grad():
        features = network.begin(inputs).features
        for unit in network.units.values():
            features = unit.body(features)
        logits = network.heads[network.exit_names[-1]](unit.tap(features))
    if network.ensemble.exits == EXITS and network.ensemble.needs_every_exit:
        logits = network(inputs).logits[:, -1]  # an ensemble that covers the last exit needs them all
        assert torch.equal(run(network, ExitPolicy("confidence", (2.0, 2.0)), inputs).answers, result.answers)
        assert not torch.equal(result.answers, logits.log_softmax(dim=-1))
    else:
        assert torch.equal(result.answers, logits.log_softmax(dim=-1))


@pytest.mark.parametrize("rule", SCORERS)
@pytest.mark.parametrize("name", list(TOYS))
def test_replaying_all_exits_acts_as_running_them(name, rule):
    toy = TOYS[name]
    network = toy.network()
    for batch in BATCHES:
        inputs = toy.inputs(batch)
        seven = toy.inputs(7)
        policy = ExitPolicy("patience", (0.5, 1.5)) if rule == "patience" else parting(network, seven, rule)
        real, all_at_once = run(network, policy, inputs), replay(network, policy, inputs)
        assert_alike(real, all_at_once)
        answered = ~real.scores.isnan()
        torch.testing.assert_close(real.scores[answered], all_at_once.scores[answered], rtol=0, atol=1e-5)
        assert bool((real.macs <= all_at_once.macs).all())


def test_replay_follows_thresholds_per_row():
    network = TOYS["skips"].network()
    inputs = TOYS["skips"].inputs(3)
    limits = torch.tensor([[-INF, 0.5], [INF, -INF], [INF, INF]])
    policy = ExitPolicy.full(EXITS)
    assert replay(network, policy, inputs, thresholds=limits).exits.tolist() == [0, 1, 2]
    assert_alike(run(network, policy, inputs, thresholds=limits), replay(network, policy, inputs, thresholds=limits))


# ---- what is computed ----


@pytest.mark.parametrize("rule", ["confidence", "patience"])
@pytest.mark.parametrize("name", list(TOYS))
def test_macs_are_what_the_hooks_saw(name, rule):
    toy = TOYS[name]
    network = toy.network()
    inputs = toy.inputs(24)
    policies = [ExitPolicy.always(exit, EXITS) for exit in range(EXITS)]
    policies += [parting(network, inputs) if rule == "confidence" else ExitPolicy(rule, (0.5, 1.5))]
    for policy in policies:
        with watched(network) as work:
            result = run(network, policy, inputs)
        assert int(result.macs.sum()) == work.macs


@pytest.mark.parametrize("name", list(TOYS))
def test_no_unit_is_computed_for_a_row_that_left_or_skipped_it(name):
    toy = TOYS[name]
    network = toy.network()
    inputs = toy.inputs(24)
    policy = parting(network, inputs)
    with watched(network) as work:
        result = run(network, policy, inputs)
    assert result.exits.bincount(minlength=EXITS).tolist() == [8, 8, 8]
    decisions = dict(zip(network.gates, result.decisions, strict=True))
    exit = 0
    for unit in network.unit_names:
        here = int((result.exits >= exit).sum())
        if unit in decisions:
            rows, decision = decisions[unit]
            assert len(rows) == here
            here = int((decision.action > 0).sum())
        # A residual unit calls the parts of its block, so that the shortcut is computed once.
        part = ".module.conv1" if isinstance(network.units[unit], ResidualUnit) else ""
        assert work.rows[f"units.{unit}{part}"] == here
        if unit in network.exit_names:
            assert work.rows[f"heads.{unit}"] == int((result.exits >= exit).sum())
            exit += 1


def headed(network: StagedNetwork, policy: ExitPolicy, inputs: Tensor, **more) -> list[int]:
    """Rows that each head was called with."""
    with watched(network) as work:
        run(network, policy, inputs, **more)
    return [work.rows[f"heads.{name}"] for name in network.exit_names]


def test_a_closed_exit_has_no_head():
    network, inputs = staged(cascade=False), TOYS["cascade"].inputs(4)
    assert headed(network, ExitPolicy("confidence", (INF, INF)), inputs) == [0, 0, 4]
    assert headed(network, ExitPolicy("confidence", (INF, 2.0)), inputs) == [0, 4, 4]
    assert headed(network, ExitPolicy("confidence", (2.0, INF)), inputs) == [4, 0, 4]
    assert headed(network, ExitPolicy("confidence", (INF, -INF)), inputs) == [0, 4, 0]


def test_a_closed_exit_is_built_where_the_next_open_head_reads_it():
    network, inputs = staged(cascade=True), TOYS["cascade"].inputs(4)
    assert headed(network, ExitPolicy("confidence", (INF, 2.0)), inputs) == [4, 4, 4]
    assert headed(network, ExitPolicy("confidence", (2.0, INF)), inputs) == [4, 0, 4]
    assert headed(network, ExitPolicy("confidence", (INF, INF)), inputs) == [0, 0, 4]


def test_a_closed_exit_is_built_where_an_open_ensemble_reads_it():
    inputs = TOYS["cascade"].inputs(4)
    early = staged(cascade=False, ensemble=GeometricEnsemble(2, OUTPUTS))
    assert headed(early, ExitPolicy("confidence", (INF, 2.0)), inputs) == [4, 4, 4]
    assert headed(early, ExitPolicy("confidence", (INF, INF)), inputs) == [0, 0, 4]
    every = staged(cascade=False, ensemble=GeometricEnsemble(3, OUTPUTS))
    assert headed(every, ExitPolicy("confidence", (INF, INF)), inputs) == [4, 4, 4]


def test_a_closed_exit_is_built_where_patience_counts_it():
    network, inputs = staged(cascade=False), TOYS["cascade"].inputs(4)
    assert headed(network, ExitPolicy("patience", (INF, 5.0)), inputs) == [4, 4, 4]
    assert headed(network, ExitPolicy("patience", (5.0, INF)), inputs) == [4, 0, 4]
    assert headed(network, ExitPolicy("patience", (INF, INF)), inputs) == [0, 0, 4]


def test_a_head_is_built_for_the_rows_that_need_it_only():
    network, inputs = staged(cascade=True), TOYS["cascade"].inputs(4)
    limits = torch.tensor([[INF, INF], [2.0, INF], [INF, 2.0], [-INF, 2.0]])
    assert headed(network, ExitPolicy.full(EXITS), inputs, thresholds=limits) == [3, 1, 3]


def test_a_finite_threshold_that_nobody_passes_pays_for_its_head():
    network, inputs = staged(cascade=False), TOYS["cascade"].inputs(4)
    costs = cost_table(network, inputs)
    assert (
        run(network, ExitPolicy("confidence", (1e9, INF)), inputs).macs.tolist()
        == [costs.full + costs.heads["conv0"]] * 4
    )
    assert run(network, ExitPolicy.full(EXITS), inputs).macs.tolist() == [costs.full] * 4
    assert run(network, ExitPolicy("confidence", (1e9, 1e9)), inputs).macs.tolist() == [costs.exits[-1]] * 4


def test_scores_are_given_where_a_rule_was_asked_for_and_nan_elsewhere():
    network, inputs = staged(cascade=False), TOYS["cascade"].inputs(3)
    for rule in SCORERS:
        limits = torch.tensor([[INF, INF], [1e9, INF], [-INF, INF]])
        scores = run(network, ExitPolicy(rule, (INF, INF)), inputs, thresholds=limits).scores
        assert scores.isnan().tolist() == [[True, True, True], [False, True, True], [False, True, True]], rule


# ---- thresholds ----

LIMITS = st.sampled_from([-INF, INF, 0.0, 0.2, 0.25, 0.3, 0.35, 0.4, 0.6, 0.8, 1.0, 2.0])


@pytest.mark.parametrize("name", list(TOYS))
@settings(max_examples=6)
@given(
    table=st.lists(st.tuples(LIMITS, LIMITS), min_size=7, max_size=7), rule=st.sampled_from(["confidence", "patience"])
)
def test_thresholds_per_row_act_as_each_rows_own_policy(name, table, rule):
    toy = TOYS[name]
    network = toy.network()
    inputs = toy.inputs(7)
    with watched(network) as work:
        together = run(network, ExitPolicy(rule, (INF, INF)), inputs, thresholds=torch.tensor(table))
    assert int(together.macs.sum()) == work.macs
    for row, limits in enumerate(table):
        alone = run(network, ExitPolicy(rule, limits), inputs[row : row + 1])
        torch.testing.assert_close(alone.answers[0], together.answers[row], rtol=0, atol=1e-5)
        assert alone.exits[0] == together.exits[row]
        assert alone.macs[0] == together.macs[row]


def test_minus_infinity_lets_everybody_leave_whatever_the_score():
    for rule in SCORERS:
        for toy in TOYS.values():
            assert run(toy.network(), ExitPolicy(rule, (-INF, INF)), toy.inputs(3)).exits.tolist() == [0, 0, 0]


def test_leaving_is_strictly_above_the_threshold(golden):
    patient = run(golden, ExitPolicy("patience", (1.0, 1.0, 1.0)), torch.arange(5.0))
    assert patient.exits.tolist() == [1, 2, 3, 3, 1]


@pytest.mark.parametrize("execute", [run, replay])
def test_nan_and_wrong_lengths_are_refused(execute):
    network, inputs = staged(), TOYS["cascade"].inputs(2)
    policy = ExitPolicy.full(EXITS)
    with pytest.raises(ValueError, match=r"`thresholds` must be numbers, got nan. Use inf to close an exit."):
        execute(network, policy, inputs, thresholds=torch.tensor([[0.5, math.nan], [0.5, 0.5]]))
    with pytest.raises(ValueError, match=r"`thresholds` must be \(2, 2\), got \(2, 3\)"):
        execute(network, policy, inputs, thresholds=torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"`thresholds` must be \(2, 2\), got \(3, 2\)"):
        execute(network, policy, inputs, thresholds=torch.zeros(3, 2))
    with pytest.raises(ValueError, match="`thresholds` must have 2 values for 3 exits, got 1"):
        execute(network, ExitPolicy("confidence", (0.5,)), inputs)


@pytest.mark.parametrize("name", [name for name in TOYS if not TOYS[name].gated])
def test_mean_compute_never_falls_when_the_threshold_rises(name):
    toy = TOYS[name]
    network = toy.network()
    inputs = toy.inputs(24)
    costs = [
        int(run(network, ExitPolicy("confidence", (tau,) * 2), inputs).macs.sum())
        for tau in [-INF, *torch.linspace(0.2, 1.0, 25).tolist()]
    ]
    assert costs == sorted(costs)
    table = cost_table(network, inputs)
    assert costs[0] == 24 * table.exits[0]
    assert costs[-1] == 24 * table.exits[-1]


@pytest.mark.parametrize("name", list(TOYS))
def test_at_threshold_1_every_row_goes_to_the_last_exit(name):
    toy = TOYS[name]
    result = run(toy.network(), ExitPolicy("confidence", (1.0, 1.0)), toy.inputs(24))
    assert result.exits.tolist() == [EXITS - 1] * 24


def test_a_row_that_is_certain_goes_on_at_threshold_1():
    certain = StagedNetwork(
        {"a": Priced(1), "b": Priced(1)}, {"a": ModuleHead(Given([0], 1e4)), "b": ModuleHead(Given([1], 1.0))}, 3
    )
    result = run(certain, ExitPolicy("confidence", (1.0,)), torch.zeros(1))
    assert result.scores[0, 0] == 1.0
    assert result.exits.tolist() == [1]


def test_a_network_without_early_exits_runs():
    units = {"a": Priced(3)}
    network = StagedNetwork(units, {"a": ModuleHead(Given([0, 2], 1.0))}, 3)
    for execute in (run, replay):
        result = execute(network, ExitPolicy.full(1), torch.arange(2.0))
        assert result.answers.argmax(dim=-1).tolist() == [0, 2]
        assert result.exits.tolist() == [0, 0]
        assert result.macs.tolist() == [3, 3]


# ---- memory ----


def test_memory_goes_from_step_to_step_with_its_row_wherever_it_left():
    toy = TOYS["memory"]
    network = toy.network()
    first, second = toy.inputs(7), toy.inputs(7, seed=1)
    policy = parting(network, first)
    before = run(network, policy, first)
    assert len(before.exits.unique()) == EXITS
    assert before.memory["exit"].tolist() == before.exits.tolist()
    after = run(network, policy, second, memory=before.memory)
    forgetful = run(network, policy, second)
    assert (after.answers - forgetful.answers).abs().max() > 1e-3
    for row in range(7):
        step = run(network, policy, first[row : row + 1])
        torch.testing.assert_close(step.memory["past"][0], before.memory["past"][row], rtol=0, atol=1e-5)
        alone = run(network, policy, second[row : row + 1], memory=step.memory)
        torch.testing.assert_close(alone.answers[0], after.answers[row], rtol=0, atol=1e-5)


def test_memory_of_no_rows_is_empty():
    network = TOYS["memory"].network()
    assert run(network, ExitPolicy("confidence", (0.5, 0.5)), TOYS["memory"].inputs(0)).memory["past"].shape == (
        0,
        CHANNELS,
    )


def test_decisions_name_the_rows_that_they_were_made_for():
    toy = TOYS["carried_gate"]
    network = toy.network()
    inputs = toy.inputs(24)
    result = run(network, parting(network, inputs), inputs)
    for (rows, decision), name in zip(result.decisions, network.gates, strict=True):
        passed = 1 if name in ("block1", "block2") else 2
        assert rows.tolist() == torch.nonzero(result.exits >= passed).flatten().tolist()
        assert len(decision.action) == len(rows)


def test_running_keeps_no_gradient_and_changes_no_input():
    toy: Toy = TOYS["skips"]
    network = toy.network()
    inputs = toy.inputs(7)
    before = inputs.clone()
    assert not run(network, ExitPolicy.full(EXITS), inputs).answers.requires_grad
    assert torch.equal(inputs, before)
