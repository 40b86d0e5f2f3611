"""Every registered gate: decides row by row, repeatably, at the price that hooks see."""

from __future__ import annotations

import copy
import io
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save

from rlexit.config import ESTIMATORS, GateConfig
from rlexit.exit_policy import ExitPolicy
from rlexit.gates import Gate, Site, build_gates, gates
from rlexit.gates.estimators import Estimator, choose, entropy, estimators, explored, log_prob
from rlexit.gates.policy_net import PolicyNet
from rlexit.macs import macs_per_row
from rlexit.runtime import run
from rlexit.state import take
from tests.rlexit.toys import CHANNELS, SIDE, executed, residual, scatter, watched

KINDS = list(gates)
WIDE = ("conv_channel", "dense_channel", "pooled_channel", "mgl2s")
ENTRY = ("policy_net", "random")


def network_of(kind: str, side: int = SIDE, **settings):
    torch.manual_seed(5)
    network = residual("inner" if kind in WIDE else "none", GateConfig(kind, bias=0.0, **settings), side=side)
    if kind not in ("random", "static"):
        scatter(network)
    return network.eval()


def inputs(batch: int, side: int = SIDE):
    return torch.randn((32, CHANNELS, side, side), generator=torch.Generator().manual_seed(0))[:batch]


def full(network) -> ExitPolicy:
    return ExitPolicy.full(network.exits)


@pytest.mark.parametrize(
    ("parts", "field"),
    [
        ({"layer": "mgl2s"}, "layer"),
        ({"layer": "conv_channel", "channel": "lstm"}, "layer"),
        ({"channel": "lstm"}, "channel"),
        ({"channel": "static"}, "channel"),
        ({"channel": "mgl2s"}, "channel"),
        ({"layer": "random"}, "layer"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(parts, field):
    kind = parts[field]
    with pytest.raises(ValueError, match=rf"`gates.{field}` must skip .* got '{kind}'"):
        residual("inner", GateConfig("mgl2s", **parts))


@pytest.mark.parametrize("parts", [{"layer": "ff2"}, {"layer": "policy_net"}, {"channel": "pooled_channel"}])
def test_parts_that_fit_decide_together(parts):
    network = residual("inner", GateConfig("mgl2s", **parts)).eval()
    assert run(network, full(network), inputs(3)).answers.isfinite().all()


# ---- laws over the registry ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [0, 1, 7])
def test_every_gate_decides_for_any_number_of_rows(kind, batch):
    network = network_of(kind)
    result = run(network, full(network), inputs(batch))
    assert len(result.decisions) == len(network.gates)
    for (rows, decision), gate in zip(result.decisions, network.gates.values(), strict=True):
        assert decision.action.shape == decision.log_prob.shape == decision.entropy.shape == (len(rows),)
        assert bool((decision.log_prob <= 1e-6).all())
        assert bool((decision.entropy >= -1e-6).all())
        if gate.width:
            assert decision.channels.shape == (len(rows), gate.width)
            assert set(decision.channels.unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", [1, 5, 7])
def test_every_gate_takes_maps_of_odd_sides(kind, side):
    network = network_of(kind, side)
    assert run(network, full(network), inputs(3, side)).answers.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_is_deterministic_and_decides_each_row_by_itself(kind):
    network = network_of(kind)
    first, second = (run(network, full(network), inputs(7)) for _ in range(2))
    for (_, one), (_, other) in zip(first.decisions, second.decisions, strict=True):
        assert torch.equal(one.action, other.action)
    for row in range(7):
        alone = run(network, full(network), inputs(7)[row : row + 1])
        assert int(alone.macs) == int(first.macs[row])
        torch.testing.assert_close(alone.answers[0], first.answers[row], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        (kind, mode)
        for kind in KINDS
        for mode in ("none", "inner", "both")
        if kind in ("static", "random") or (kind in WIDE) == (mode != "none")
    ],
)
def test_networks_with_gates_are_charged_what_is_executed(kind, mode):
    torch.manual_seed(5)
    network = residual(mode, GateConfig(kind, bias=0.0, channel_rate=0.5)).eval()
    if kind not in ("random", "static"):
        scatter(network)
    executed(lambda: run(network, full(network), inputs(7)))


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_decisions_are_replayed_with_their_log_probabilities(kind):
    network = network_of(kind)
    drawn = network(inputs(7), generator=torch.Generator().manual_seed(1))
    again = network(inputs(7), decisions=drawn.decisions)
    other = network(inputs(7), generator=torch.Generator().manual_seed(2))
    for one, two in zip(drawn.decisions, again.decisions, strict=True):
        assert torch.equal(one.action, two.action)
        torch.testing.assert_close(one.log_prob, two.log_prob)
    assert any(
        not torch.equal(one.action, two.action)
        or (one.channels is not None and not torch.equal(one.channels, two.channels))
        for one, two in zip(drawn.decisions, other.decisions, strict=True)
    )


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "random"])
def test_the_price_of_compute_and_the_log_probability_reach_every_learned_gate(kind):
    network = network_of(kind).train()
    trace = network(inputs(7))
    parameters = [p for p in network.gates.parameters() if p.requires_grad]
    by_price = torch.autograd.grad(trace.expected_macs.sum(), parameters, retain_graph=True, allow_unused=True)
    by_chance = torch.autograd.grad(sum(d.log_prob.sum() for d in trace.decisions), parameters, allow_unused=True)
    for found in (by_price, by_chance):
        assert sum(float(gradient.abs().sum()) for gradient in found if gradient is not None) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_every_gate_is_saved_once_and_copied_whole(kind):
    network = network_of(kind)
    assert save({name: tensor.contiguous() for name, tensor in network.state_dict().items()})
    twin = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in network.gates.parameters():
            parameter.add_(7.0)
    twin.load_state_dict(torch.load(as_file(twin), weights_only=True))
    first, second = run(twin, full(twin), inputs(7)), run(network_of(kind), full(twin), inputs(7))
    torch.testing.assert_close(first.answers, second.answers)


def as_file(network) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    return file


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ENTRY])
def test_a_detached_gate_sends_no_gradient_into_the_features(kind):
    for detach in (True, False):
        network = network_of(kind, detach=detach)
        stem = network.units["stem"].module[0].weight
        trace = network.train()(inputs(7))
        total = sum(decision.log_prob.sum() for decision in trace.decisions)
        gradient = torch.autograd.grad(total, stem, allow_unused=True)[0] if total.requires_grad else None
        reached = gradient is not None and float(gradient.abs().sum()) > 0
        assert reached is (not detach and kind != "static")


# ---- published costs ----


@pytest.mark.parametrize(("channels", "macs"), [(16, 970), (32, 1130), (64, 1450)])
def test_the_lstm_gate_costs_what_was_counted_for_skipnet(channels, macs):
    assert gate_macs("lstm", channels, 8) == macs


@pytest.mark.parametrize("channels", [16, 32, 64])
def test_feed_forward_and_channel_gates_cost_their_published_share_of_a_basic_block(channels):
    side = 512 // channels
    block = 18 * channels * channels * side * side
    assert block == 4_718_592
    assert gate_macs("ff1", channels, side) == block * 5 // 32 + 2 * channels
    assert gate_macs("ff2", channels, side) == block // 8 + 2 * channels
    assert gate_macs("conv_channel", channels, side, channels) == block // 8 + channels * channels


def test_the_light_dense_gate_costs_an_eighth_of_a_dense_layer():
    growth, channels, side = 12, 60, 32
    layer = side * side * (channels * 4 * growth + 9 * 4 * growth * growth)
    assert gate_macs("dense_channel", channels, side, growth) == layer // 8 + growth * growth


def test_the_policy_net_costs_12_million_on_small_images():
    assert macs_per_row(PolicyNet(3, 54, 0.0), torch.zeros(1, 3, 32, 32)) == 12_238_848 + 64 * 54


def gate_macs(kind: str, channels: int, side: int, width: int = 0) -> int:
    from rlexit.state import ExitState

    gate = build_gates([Site("a", channels, width)], GateConfig(kind))["a"]
    zeros = torch.zeros(1, dtype=torch.int64)
    state = ExitState(zeros, torch.zeros(1, channels, side, side), torch.empty(1, 0, 0), None, zeros)
    return int(gate.macs(state))


# ---- the recurrent, the composite, the told ----


@pytest.mark.parametrize("kind", ["lstm", "ff1", "ff2", "static", "conv_channel", "dense_channel", "pooled_channel"])
def test_a_gate_decides_in_full_precision_whatever_the_units_compute_in(kind):
    network = network_of(kind)
    gate = network.gates[next(iter(network.gates))]
    features = inputs(8).to(torch.bfloat16)
    state = network.begin(inputs(8))
    with torch.autocast("cpu", torch.bfloat16):
        lowered, _ = gate.decide(replace(state, features=features), "greedy")
    exact, _ = gate.decide(replace(state, features=features.float()), "greedy")
    torch.testing.assert_close(lowered.log_prob, exact.log_prob, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ENTRY])
def test_scaled_gates_decide_alike_and_are_surer_by_that_factor(kind):
    network = network_of(kind)
    before = run(network, full(network), inputs(16))
    for gate in network.gates.values():
        gate.scale(3.0)
    after = run(network, full(network), inputs(16))
    assert torch.equal(after.answers, before.answers)
    for (_, unsure), (_, sure) in zip(before.decisions, after.decisions, strict=True):
        assert torch.equal(sure.action, unsure.action)
        assert bool((sure.entropy <= unsure.entropy).all())
        if unsure.channels is None:
            # -log p of the likelier action is softplus(-|logit|).
            sizes = [-(-decision.log_prob.double()).expm1().log() for decision in (unsure, sure)]
            torch.testing.assert_close(sizes[1], 3 * sizes[0], rtol=1e-3, atol=1e-4)


def test_the_recurrent_gate_starts_afresh_in_every_pass_and_remembers_within_one():
    network = network_of("lstm")
    first = network(inputs(7))
    network(inputs(7).flip(0))
    torch.testing.assert_close(network(inputs(7)).decisions[2].log_prob, first.decisions[2].log_prob)
    state = network.begin(inputs(7))
    state = network.advance(state)
    state, _ = network.decide(state)
    told, _ = network.decide(state)
    fresh, _ = network.decide(take_carry(state))
    assert not torch.allclose(told.decisions[-1].log_prob, fresh.decisions[-1].log_prob)


def take_carry(state):
    return replace(state, carry=None)


def test_a_row_that_skips_the_unit_is_never_shown_to_the_channel_gate():
    network = network_of("mgl2s")
    with watched(network) as work:
        result = run(network, full(network), inputs(7), mode="sample", generator=torch.Generator().manual_seed(1))
    parted = False
    for name, (_, decision) in zip(network.gates, result.decisions, strict=True):
        runs = int((decision.action > 0).sum())
        assert work.rows[f"gates.{name}.channel.module"] == runs
        assert int(decision.channels[decision.action == 0].sum()) == 0
        parted |= 0 < runs < 7
    assert parted
    with torch.no_grad():
        network.gates["block0"].layer.core.logit.bias.fill_(-1e4)
    with watched(network) as work:
        run(network, full(network), inputs(7))
    assert not any(".channel" in name for name in work.calls)


def test_the_policy_net_is_asked_once_and_charged_once():
    network = network_of("policy_net")
    with watched(network) as work:
        run(network, full(network), inputs(7))
    assert work.rows["gates.stem.module"] == 7
    assert not network.gates["stem"].decides
    del network.gates["stem"]
    with pytest.raises(RuntimeError, match="`policy_net` must be asked before the first unit"):
        run(network, full(network), inputs(2))


def test_random_gates_run_the_given_share_of_rows_and_know_nothing_of_them():
    torch.manual_seed(0)
    many = torch.randn(4000, CHANNELS, SIDE, SIDE)
    network = residual("inner", GateConfig("random", rates=(0.2, 0.5, 0.9), channel_rate=0.7))
    with torch.no_grad():
        trace = network(many)
    for rate, decision in zip((0.2, 0.5, 0.9), trace.decisions[1:], strict=True):
        assert abs(float(decision.action.float().mean()) - rate) < 0.03
        assert abs(float(decision.channels.mean()) - 0.7) < 0.02
    one, two = trace.decisions[1].action.float(), trace.decisions[2].action.float()
    assert abs(float(torch.corrcoef(torch.stack([one, two]))[0, 1])) < 0.06
    other = residual("inner", GateConfig("random", rates=(0.2, 0.5, 0.9), seed=1))
    assert not torch.equal(other(many[:99]).decisions[2].action, trace.decisions[2].action[:99])


def test_a_static_gate_decides_all_rows_alike():
    network = network_of("static")
    with torch.no_grad():
        network.gates["block1"].logit.fill_(-1.0)
    result = run(network, full(network), inputs(7))
    assert [decision.action.unique().tolist() for _, decision in result.decisions][1] == [0]


# ---- estimators ----

LOGITS = torch.tensor([-2.0, -0.1, 0.3, 4.0])


def test_the_estimators_that_a_config_may_name_are_those_that_are_registered():
    assert list(ESTIMATORS) == list(estimators)


@pytest.mark.parametrize("name", list(estimators))
def test_every_estimator_is_hard_in_evaluation_and_greedy_above_one_half(name):
    estimator = estimators[name]()
    assert isinstance(estimator, Estimator)
    hard, relaxed = choose(LOGITS, "greedy", estimator)
    assert hard.tolist() == relaxed.tolist() == [0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("name", ["ste_det", "ste_bernoulli"])
@pytest.mark.parametrize("mode", ["greedy", "sample"])
def test_straight_through_is_0_or_1_forwards_and_the_identity_onto_p_backwards(name, mode):
    logits = LOGITS.clone().requires_grad_()
    generator = torch.Generator().manual_seed(0)
    hard, relaxed = choose(logits, mode, estimators[name](), generator=generator, training=True)
    assert torch.equal(relaxed, hard)
    assert set(relaxed.tolist()) <= {0.0, 1.0}
    relaxed.sum().backward()
    p = LOGITS.sigmoid()
    torch.testing.assert_close(logits.grad, p * (1 - p))


def test_gumbel_has_the_gradient_of_its_relaxed_draw():
    logits = LOGITS.clone().requires_grad_()
    hard, relaxed = choose(
        logits, "sample", estimators["gumbel_sigmoid"](), generator=torch.Generator().manual_seed(0), training=True
    )
    uniform = torch.rand(4, generator=torch.Generator().manual_seed(0))
    soft = (LOGITS + torch.logit(uniform)).sigmoid()
    assert relaxed.tolist() == (soft > 0.5).float().tolist() == hard.tolist()
    relaxed.sum().backward()
    torch.testing.assert_close(logits.grad, soft * (1 - soft))


def test_soft_weighs_by_p_and_reinforce_gives_no_gradient():
    logits = LOGITS.clone().requires_grad_()
    _, soft = choose(logits, "greedy", estimators["soft"](), training=True)
    torch.testing.assert_close(soft, LOGITS.sigmoid())
    _, hard = choose(logits, "sample", estimators["reinforce"](), generator=torch.Generator(), training=True)
    assert not hard.requires_grad


def test_draws_have_the_probability_that_they_say():
    logits = LOGITS.expand(20000, 4)
    hard, _ = choose(logits, "sample", estimators["ste_det"](), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(hard.mean(dim=0), LOGITS.sigmoid(), rtol=0, atol=0.012)
    torch.testing.assert_close(log_prob(LOGITS, torch.ones(4)).exp(), LOGITS.sigmoid())
    torch.testing.assert_close(log_prob(LOGITS, torch.zeros(4)).exp(), 1 - LOGITS.sigmoid())


def test_entropy_is_the_full_bernoulli_entropy_and_largest_at_one_half():
    p = LOGITS.sigmoid()
    torch.testing.assert_close(entropy(LOGITS), -(p * p.log() + (1 - p) * (1 - p).log()))
    assert float(entropy(torch.zeros(1))) == pytest.approx(0.693147, abs=1e-6)
    assert entropy(torch.tensor([1e4, -1e4])).tolist() == [0.0, 0.0]


def test_exploration_keeps_probabilities_away_from_0_and_1_and_decisions_as_they_are():
    p = explored(LOGITS, 0.8).sigmoid()
    torch.testing.assert_close(p, 0.8 * LOGITS.sigmoid() + 0.2 * (1 - LOGITS.sigmoid()))
    assert torch.equal(p > 0.5, LOGITS > 0)
    assert explored(torch.tensor([99.0]), 0.8).sigmoid().item() == pytest.approx(0.8)


def test_replay_without_a_stored_decision_is_refused():
    with pytest.raises(ValueError, match="`given` must be the stored decision in replay, got None"):
        choose(LOGITS, "replay", estimators["ste_det"]())


# ---- bad input ----


def test_a_gate_before_a_unit_without_skip_path_is_refused():
    network = residual()
    with pytest.raises(
        ValueError, match=r"`gates\['stem'\]` must stand before a unit with a skip path, got ModuleUnit"
    ):
        network.set_gates(build_gates([Site("stem", CHANNELS)], GateConfig()))


def test_a_gate_for_other_channels_than_the_unit_has_is_refused():
    network = residual("inner")
    with pytest.raises(ValueError, match=r"`gates\['block0'\]` must decide about 4 channels, as its unit takes, got 3"):
        network.set_gates(build_gates([Site("block0", CHANNELS, 3)], GateConfig("pooled_channel")))
    with pytest.raises(ValueError, match=r"`sites\['block0'\].width` must be positive for a channel gate, got 0"):
        build_gates([Site("block0", CHANNELS)], GateConfig("pooled_channel"))


def test_kinds_rates_and_entries_that_do_not_fit_are_refused():
    sites = [Site("a", 4), Site("b", 4)]
    with pytest.raises(LookupError, match="`gate` must be a known name, got 'lstn'. Did you mean 'lstm'?"):
        build_gates(sites, GateConfig("lstn"))
    with pytest.raises(ValueError, match="`gates.rates` must have 1 or 2 shares"):
        build_gates(sites, GateConfig("random", rates=(0.1, 0.2, 0.3)), Site("stem", 3))
    for kind in ENTRY:
        with pytest.raises(ValueError, match="`entry` must be given, got None"):
            build_gates(sites, GateConfig(kind))
    for settings in ({"estimator": "x"}, {"bound": 0.5}, {"rates": ()}, {"rates": (1.5,)}, {"bias": float("nan")}):
        with pytest.raises(ValueError, match="`gates."):
            GateConfig(**settings)


def test_an_unfinished_gate_says_what_is_missing():
    state = residual().begin(inputs(1))
    with pytest.raises(TypeError, match="`Gate` must implement `decide`"):
        Gate().decide(state, "greedy")


def test_decisions_are_taken_by_row_with_their_channels():
    network = network_of("mgl2s")
    decision = network(inputs(7)).decisions[0]
    assert take(decision, torch.tensor([3])).channels.shape == (1, CHANNELS)
