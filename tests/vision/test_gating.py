"""Classifiers with gates: every system from a teacher to evaluated rows on generated images, and what is refused."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import vision.gating
from rlexit import checkpoint, dissection, verbs
from rlexit.calibrate import score_rows
from rlexit.config import METHODS, GateConfig, Method
from rlexit.costs import cost_table
from rlexit.domain import Gating, Refining, Watch
from rlexit.evaluate import budgeted
from rlexit.exit_policy import ExitPolicy
from rlexit.gating_config import GatingConfig
from rlexit.interrupts import StopFlag, Stopped
from rlexit.network import StagedNetwork
from rlexit.objectives import hint_distance
from rlexit.refine import PathRefiner
from rlexit.rows import read_rows
from rlexit.runlog import read_scalars
from rlexit.runtime import run
from rlexit.session import Session, load_network
from tests.vision.small_images import SMALL, changed
from vision.config import BackboneConfig, NetworkConfig, VisionConfig
from vision.domain import VisionDomain, domain

TINY = replace(
    changed(SMALL, "backbone", depth=14),
    gates=GateConfig(bias=0.5),
    gating=GatingConfig(
        steps=960,
        checkpoint_buffers=4,
        target_macs=0.6,
        anneal=0.0,
        price=2.0,
        dual_rate=0.5,
        warmup=0.0,
        fresh_learning_rate=0.1,
        recalibrate=96,
        precision="fp32",
    ),
    refine=replace(SMALL.refine, steps=192, checkpoint_updates=2, target_macs=0.6, paths=2, learning_rate=0.01),
    calibrate=replace(SMALL.calibrate, target_macs=(0.9,)),
    evaluate=replace(SMALL.evaluate, grid=0, latency_rows=0),
)
# Made in this order: refined ones and controls come after those that they start from.
SYSTEMS = [name for name, method in METHODS.items() if method.gates]
UNITS = ["layer1_1", "layer2_0", "layer2_1", "layer3_0", "layer3_1"]


def session(root: Path, config: VisionConfig = TINY) -> Session:
    return Session(domain(config), root, 0, Console(quiet=True), StopFlag())


def make(made: Session, method: str) -> None:
    (verbs.refine if METHODS[method].refines else verbs.distill)(made, method)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("runs") / "tiny"
    verbs.train(session(root))
    return root


@pytest.fixture(scope="module")
def layer_gates(teacher) -> Path:
    """The run with layer gates learnt; what others start from."""
    make(session(teacher), "layer_gates")
    return teacher


def curve(folder: Path, tag: str) -> list[float]:
    return [value for _, name, value in read_scalars(folder) if name == tag]


def test_vision_is_a_domain_that_learns_and_refines_gates():
    assert isinstance(VisionDomain(TINY), Gating)
    assert isinstance(VisionDomain(TINY), Refining)


@pytest.mark.parametrize("method", SYSTEMS)
def test_every_system_goes_from_the_teacher_to_rows(layer_gates, method):
    made = session(layer_gates)
    for needed in (METHODS[method].refines, METHODS[method].rates_of, method):
        if needed:
            make(made, needed)
    verbs.calibrate(made, method)
    verbs.evaluate_method(made, method)
    rows = read_rows(layer_gates / method / "s0" / "eval" / "episodes.csv")
    assert {row.execution for row in rows} == {"real"}
    labels = {row.label for row in rows}
    assert labels == ({"target_macs=0.9"} if METHODS[method].exits else {"gates"})
    assert sum(row.decisions for row in rows) == 192
    if not METHODS[method].exits:
        # What is told of the whole test set is what its rows really executed.
        [told] = dissection.load(layer_gates / method / "s0" / "eval", dissection.BudgetRow)
        assert told.relative_macs == pytest.approx(sum(r.relative_macs * r.decisions for r in rows) / 192, abs=1e-3)


def test_a_dual_price_brings_layer_gates_to_their_target_and_says_so_on_the_way(layer_gates):
    made = session(layer_gates)
    folder = made.method("layer_gates")
    spent = curve(folder, "gating/relative_cost")
    assert spent[-1] < 0.75 < spent[0]
    assert max(curve(folder, "gating/price")) > 0
    assert len(curve(folder, "gate/open_frac/layer3_1")) == len(spent)
    network = load_network(made, "layer_gates")[""]
    assert list(network.gates) == UNITS
    full = cost_table(network, made.domain.example()).full
    pixels = VisionDomain(TINY).data.evaluated("test").pixels
    spent_for_real = run(network, ExitPolicy.full(1), pixels).macs.double().mean() / full
    assert spent_for_real < 0.8


def test_random_gates_repeat_the_rates_of_the_learned_ones(layer_gates):
    from rlexit.gatestages import open_rates

    made = session(layer_gates)
    make(made, "random_gates")
    learnt, control = (load_network(made, name)[""] for name in ("layer_gates", "random_gates"))
    rows = VisionDomain(TINY).data.evaluated("calibration").pixels
    wanted = open_rates(learnt, rows)
    for name in UNITS:
        rates: Any = control.gates[name].rates
        torch.testing.assert_close(rates[:1], wanted[name])


def test_static_gates_treat_every_image_alike(layer_gates):
    made = session(layer_gates)
    make(made, "static_gates")
    network = load_network(made, "static_gates")[""]
    result = run(network, ExitPolicy.full(1), VisionDomain(TINY).data.evaluated("test").pixels)
    assert len(torch.unique(result.macs)) == 1


def test_a_price_of_nothing_leaves_gates_open_and_the_teacher_s_accuracy(teacher, tmp_path):
    config = replace(TINY, gating=replace(TINY.gating, cost="linear", price=0.0, fresh_learning_rate=0.001, steps=64))
    made = session(tmp_path, config)
    verbs.train(made)
    make(made, "layer_gates")
    network = load_network(made, "layer_gates")[""]
    images = VisionDomain(TINY).data.evaluated("test")
    result = run(network, ExitPolicy.full(1), images.pixels)
    assert float(torch.stack([(d.action > 0).float().mean() for _, d in result.decisions]).mean()) > 0.95


@pytest.mark.parametrize(
    "ways", [{}, {"explore": 0.4, "rank": 16, "hint": 0.5, "distillation": 0.5, "batch_norm": "train"}]
)
def test_a_stopped_training_goes_on_to_the_same_weights(teacher, tmp_path, ways):
    made = VisionDomain(replace(TINY, gating=replace(TINY.gating, **ways)))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    method = METHODS["layer_gates"]

    def learn(folder: Path, watch: Watch) -> Any:
        torch.manual_seed(3)
        network = made.network(teacher / "teacher", method)
        made.learn_gates(network, teacher / "teacher", method, folder, 0, watch)
        return network.state_dict()

    expected = learn(whole, Watch())
    told: list[int] = []
    with pytest.raises(Stopped):
        learn(parts, Watch(lambda: len(told) > 9, lambda done, total, facts: told.append(done)))
    found = learn(parts, Watch())
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert read_scalars(whole) == read_scalars(parts)


def learnt(teacher: Path, folder: Path, method: str, **ways: Any) -> tuple[Any, dict[str, list[float]]]:
    """The network and its curves."""
    made = VisionDomain(replace(TINY, gating=replace(TINY.gating, **ways)))
    torch.manual_seed(3)
    network = made.network(teacher / "teacher", METHODS[method])
    made.learn_gates(network, teacher / "teacher", METHODS[method], folder, 0, Watch())
    curves: dict[str, list[float]] = {}
    for _, tag, value in read_scalars(folder):
        curves.setdefault(tag, []).append(value)
    return network, curves


def start(teacher: Path, method: str = "layer_gates") -> dict[str, Any]:
    """Weights before anything is learnt."""
    torch.manual_seed(3)
    return VisionDomain(TINY).network(teacher / "teacher", METHODS[method]).state_dict()


def test_units_are_dropped_by_chance_before_gates_learn_anything(teacher, tmp_path):
    network, curves = learnt(teacher, tmp_path, "layer_gates", explore=0.999, rank=32, recalibrate=0)
    assert len(set(curves["gating/price"])) == 1  # nothing presses yet
    cost = curves["gating/relative_cost"]
    assert cost[-1] < cost[0]
    assert all(0 < curves[f"gate/open_frac/{name}"][-1] < 1 for name in UNITS)
    kept, first = network.state_dict(), start(teacher)
    assert all(torch.equal(kept[key], value) for key, value in first.items() if key.startswith("gates."))
    assert not torch.equal(kept["units.layer1_1.module.conv1.weight"], first["units.layer1_1.module.conv1.weight"])


def test_ranked_gates_go_on_from_the_target(teacher, tmp_path):
    ways = {"target_macs": 0.5, "learning_rate": 1e-9, "fresh_learning_rate": 1e-9, "recalibrate": 0}
    _, alike = learnt(teacher, tmp_path / "alike", "layer_gates", **ways)
    _, ranked = learnt(teacher, tmp_path / "ranked", "layer_gates", rank=32, **ways)
    assert alike["gating/relative_cost"][0] > 0.9
    assert ranked["gating/relative_cost"][0] < 0.7
    assert ranked["gating/shut_at_start"][-1] >= 1
    assert alike["gating/shut_at_start"][-1] == 0


def test_a_person_sees_units_being_ranked(teacher, tmp_path):
    made = VisionDomain(replace(TINY, gating=replace(TINY.gating, rank=16, steps=64, recalibrate=0)))
    network = made.network(teacher / "teacher", METHODS["layer_gates"])
    seen: list[tuple[int, int, dict[str, float]]] = []
    watch = Watch(progress=lambda done, total, facts: seen.append((done, total, facts)))
    made.learn_gates(network, teacher / "teacher", METHODS["layer_gates"], tmp_path, 0, watch)
    ranking = [one for one in seen if "units_ranked" in one[2]]
    assert ranking == [(0, 64, {"units_ranked": done, "of_units": 5}) for done in range(6)]
    assert seen[: len(ranking)] == ranking


def test_without_a_target_units_are_neither_dropped_nor_ranked(teacher, tmp_path):
    ways = {"cost": "linear", "price": 0.0, "explore": 0.5, "rank": 32, "recalibrate": 0}
    _, curves = learnt(teacher, tmp_path, "layer_gates", **ways)
    assert curves["gating/shut_at_start"][-1] == 0
    assert min(curves["gating/relative_cost"]) > 0.9


@pytest.mark.parametrize(("begins", "moved"), [(0.999, False), (0.3, True)])
def test_what_rows_differ_in_is_learnt_from_its_time_on(teacher, tmp_path, begins, moved):
    network, _ = learnt(teacher, tmp_path, "layer_gates", input_from=begins, recalibrate=0)
    kept, first = network.state_dict(), start(teacher)
    embedding = "gates.layer1_1.embed.weight"
    assert torch.equal(kept[embedding], first[embedding]) != moved
    assert not torch.equal(kept["gates.layer1_1.offset"], first["gates.layer1_1.offset"])


def test_refined_paths_end_greedily_at_their_target(layer_gates, tmp_path):
    made = VisionDomain(replace(TINY, gating=replace(TINY.gating, recalibrate=0)))
    network = made.network(layer_gates / "teacher", METHODS["gates_ppo"])
    facts = made.refine(network, layer_gates / "teacher", METHODS["gates_ppo"], tmp_path, 0, Watch())
    assert facts["refine/cost_settled"] <= TINY.refine.target_macs
    told = [value for _, tag, value in read_scalars(tmp_path) if tag == "refine/cost_settled"]
    assert told == [facts["refine/cost_settled"]]


def test_who_is_killed_after_the_last_checkpoint_tells_the_same_and_once(layer_gates, tmp_path):
    made = VisionDomain(TINY)
    found = []
    for _ in range(2):
        network = made.network(layer_gates / "teacher", METHODS["gates_ppo"])
        found.append(made.refine(network, layer_gates / "teacher", METHODS["gates_ppo"], tmp_path, 0, Watch()))
    assert found[0] == found[1]
    assert len([tag for _, tag, _ in read_scalars(tmp_path) if tag == "refine/cost_settled"]) == 1


def captured(monkeypatch) -> dict[str, Any]:
    """What a refiner is made of, by name; it then does nothing."""
    found: dict[str, Any] = {}
    names = list(inspect.signature(PathRefiner).parameters)

    class Captured:
        def __init__(self, *given: Any) -> None:
            found.update(zip(names, given, strict=True))

        def run(self) -> dict[str, float]:
            return {}

    monkeypatch.setattr(vision.gating, "PathRefiner", Captured)
    return found


def test_refined_paths_are_settled_on_held_out_images_as_they_are(layer_gates, tmp_path, monkeypatch):
    found = captured(monkeypatch)
    made = VisionDomain(TINY)
    network = made.network(layer_gates / "teacher", METHODS["gates_ppo"])
    made.refine(network, layer_gates / "teacher", METHODS["gates_ppo"], tmp_path, 0, Watch())
    assert torch.equal(found["settled_on"], made.data.evaluated("calibration").pixels)


def test_blockdrop_s_curriculum_has_the_penalty_and_the_entropy_of_the_original(layer_gates, tmp_path, monkeypatch):
    found = captured(monkeypatch)
    made = VisionDomain(TINY)
    network = made.network(layer_gates / "teacher", METHODS["blockdrop"])
    made.learn_gates(network, layer_gates / "teacher", METHODS["blockdrop"], tmp_path, 0, Watch())
    config = found["config"]
    assert (config.penalty, config.entropy, config.trunk, config.target_macs) == (1.0, 0.1, "frozen", 0.0)
    made.refine(network, layer_gates / "teacher", METHODS["blockdrop"], tmp_path, 0, Watch())
    assert found["config"] == TINY.refine


@pytest.mark.parametrize("entropy", [0.05, 0.3])
def test_drawn_paths_start_as_sure_as_they_are_told_to(layer_gates, tmp_path, entropy):
    config = replace(TINY, refine=replace(TINY.refine, steps=32, start_entropy=entropy, learning_rate=1e-9))
    made = VisionDomain(config)
    network = load_network(session(layer_gates), "layer_gates")[""]
    facts = made.refine(network, layer_gates / "teacher", METHODS["gates_ppo"], tmp_path, 0, Watch())
    assert facts["refine/entropy"] == pytest.approx(entropy, rel=0.35)


def test_gates_learn_on_the_cpu_only_and_say_so_before_anything_is_trained():
    made = VisionDomain(TINY)
    made.device = "cuda"
    made.blank(METHODS["sdn"])
    with pytest.raises(ValueError, match="`--device` must be cpu for methods with gates, got 'cuda'"):
        made.blank(METHODS["layer_gates"])


def test_images_too_small_for_mirrored_borders_are_told_before_anything_is_trained():
    pytest.importorskip("kornia")
    made = VisionDomain(changed(TINY, "data", crop=8, border="reflect"))
    with pytest.raises(ValueError, match="`data.crop` must be below the images' side of 8"):
        made.blank(METHODS["sdn"])


def test_units_that_are_shut_are_computed_in_one_update_of_so_many(teacher, tmp_path, monkeypatch):
    lean: list[bool] = []
    forward = StagedNetwork.forward

    def seen(self, *inputs, **settings):
        lean.extend([settings["lean"]] if "lean" in settings else [])
        return forward(self, *inputs, **settings)

    monkeypatch.setattr(StagedNetwork, "forward", seen)
    learnt(teacher, tmp_path, "layer_gates", steps=320, peek=3, recalibrate=0)
    assert lean == [place % 3 > 0 for place in range(len(lean))]
    assert len(lean) >= 6


@pytest.mark.parametrize("method", ["layer_gates", "iadi"])
def test_a_gate_whose_unit_is_left_out_gets_no_gradient_from_its_own_cost_either(teacher, method):
    made = VisionDomain(TINY)
    network = made.network(teacher / "teacher", METHODS[method]).train()
    gate: Any = network.gates["layer2_1"]
    gate.shift(-100.0)
    for lean in (False, True):
        network.zero_grad(set_to_none=True)
        trace = network(made.data.evaluated("test").pixels[:16], lean=lean)
        (trace.logits.square().sum() + trace.expected_macs.sum()).backward()
        [offset, *_] = gate.offsets()
        assert (offset.grad is None) == lean


def test_hints_keep_features_near_those_of_the_original(teacher, tmp_path):
    made = VisionDomain(TINY)
    full = made.network(teacher / "teacher", METHODS["static"]).eval()
    inputs = made.data.evaluated("test").pixels[:32]
    distances = []
    for hint in (0.0, 5.0):
        network, _ = learnt(teacher, tmp_path / str(hint), "layer_gates", hint=hint, recalibrate=0)
        with torch.no_grad():
            found, wanted = network.eval()(inputs).features, full(inputs).features
        distances.append([float(hint_distance(*pair).mean()) for pair in zip(wanted, found, strict=True)])
    assert len(distances[0]) == 4  # three stages, and their mean over positions
    assert sum(distances[1]) < sum(distances[0])


def test_ddi_s_exits_start_to_learn_when_they_are_told_to(teacher):
    made = VisionDomain(replace(TINY, gating=replace(TINY.gating, exits_from=1.0, steps=64)))
    network = made.network(teacher / "teacher", METHODS["ddi"])
    before = {key: value.clone() for key, value in network.head(0).state_dict().items()}
    made.learn_gates(network, teacher / "teacher", METHODS["ddi"], teacher / "late", 0, Watch())
    assert all(
        torch.equal(network.head(0).state_dict()[key], value) for key, value in before.items() if "norm" not in key
    )


def test_every_channel_decision_of_iadi_is_kept_from_rows_that_skip_the_block(teacher):
    network = VisionDomain(TINY).network(teacher / "teacher", METHODS["iadi"]).eval()
    calls: list[int] = []

    def seen(module: Any, inputs: Any, output: Any) -> None:
        if not inputs[0].is_meta:
            calls.append(len(inputs[0]))

    gate: Any = network.gates["layer2_1"]
    gate.channel.module.register_forward_hook(seen)
    core: Any = network.gates["layer1_1"]
    pixels = VisionDomain(TINY).data.evaluated("test").pixels[:7]
    run(network, ExitPolicy.full(1), pixels)
    assert calls == [7]
    with torch.no_grad():
        core.layer.core.logit.bias.fill_(-50.0)  # shared over depth: every layer gate shuts
    run(network, ExitPolicy.full(1), pixels)
    assert calls == [7]


def test_no_row_exceeds_a_hard_budget_and_who_skips_comes_further(teacher):
    shares = (0.4, 0.6, 0.8, 1.0, 1.3, 1.8)
    made = VisionDomain(changed(TINY, "evaluate", hard_budgets=shares))
    network = made.network(teacher / "teacher", METHODS["ddi"]).eval()
    pixels = made.data.evaluated("test").pixels[:48]
    reached: list[float] = []
    for share, policy in zip(shares, budgeted(made, network), strict=True):
        assert policy.label == f"budget={share:g}"
        result = run(network, policy, pixels)
        assert int(result.macs.max()) <= policy.budget
        assert result.violated is not None
        assert not bool(result.violated.any())
        reached.append(float(result.exits.double().mean()))
    assert reached == sorted(reached)
    assert reached[0] < reached[-1] == network.exits - 1


def test_hard_budgets_are_operating_points_and_one_below_the_cheapest_path_is_refused(teacher, tmp_path):
    config = replace(
        changed(TINY, "evaluate", hard_budgets=(0.6, 1.8)),
        gating=replace(TINY.gating, steps=64),
        calibrate=replace(TINY.calibrate, target_macs=()),
    )
    made = session(tmp_path, config)
    verbs.train(made)
    make(made, "ddi")
    low = session(tmp_path, changed(config, "evaluate", hard_budgets=(0.01,)))
    with pytest.raises(ValueError, match="`evaluate.hard_budgets` must be at least .*, got 0.01"):
        verbs.evaluate_method(low, "ddi")
    verbs.evaluate_method(made, "ddi")
    rows = read_rows(made.method("ddi") / "eval" / "episodes.csv")
    assert {row.label for row in rows} == {"budget=0.6", "budget=1.8"}
    assert all(row.relative_macs <= float(row.label.removeprefix("budget=")) for row in rows)


def test_a_warm_up_opens_gates_that_start_shut_and_moves_nothing_else(teacher, tmp_path):
    gating = replace(TINY.gating, warm_up=960, steps=32, price=0.0, cost="linear", learning_rate=1e-9, recalibrate=0)
    made = VisionDomain(replace(TINY, gates=GateConfig(bias=-0.5), gating=gating))
    network = made.network(teacher / "teacher", METHODS["layer_gates"])
    before = {key: value.clone() for key, value in network.units.state_dict().items()}
    facts = made.learn_gates(network, teacher / "teacher", METHODS["layer_gates"], tmp_path, 0, Watch())
    assert facts["gate/legacy_cp"] > 0.9
    for key, value in network.units.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=1e-5, atol=1e-6)


def test_what_gated_rows_skip_counts_when_thresholds_are_solved(teacher):
    made = VisionDomain(replace(TINY, gates=GateConfig(bias=-3.0)))
    network = made.network(teacher / "teacher", METHODS["ddi"]).eval()
    table, pixels = cost_table(network, made.example()), made.data.evaluated("calibration").pixels
    scores = score_rows(network, "confidence", pixels, table)
    spent = scores.macs.mean(dim=0)
    assert spent[-1] < 0.8 * table.exits[-1]
    result = run(network, ExitPolicy.always(2, network.exits), pixels)
    heads = sum(table.heads[name] for name in network.exit_names[:2])
    assert float(spent[2]) == pytest.approx(float(result.macs.double().mean()) + heads, rel=1e-6)


def test_energy_can_be_what_is_priced_and_its_constants_are_told(teacher, tmp_path):
    gating = replace(TINY.gating, resource="energy", steps=64, recalibrate=0)
    made = VisionDomain(replace(TINY, gating=gating))
    network = made.network(teacher / "teacher", METHODS["iadi"])
    facts = made.learn_gates(network, teacher / "teacher", METHODS["iadi"], tmp_path, 0, Watch())
    assert facts["energy/dram"] == 200
    assert facts["energy/mac"] == 1
    assert 0 < facts["gating/relative_cost"] < 3


def test_heads_that_are_not_built_on_the_way_are_not_priced(teacher, tmp_path):
    gating = replace(TINY.gating, steps=64, cost="linear", price=0.0, fresh_learning_rate=1e-9, recalibrate=0)
    made = VisionDomain(replace(TINY, gates=GateConfig(bias=5.0), gating=gating))
    network = made.network(teacher / "teacher", METHODS["ddi"])
    facts = made.learn_gates(network, teacher / "teacher", METHODS["ddi"], tmp_path, 0, Watch())
    table = cost_table(network, made.example())
    heads = sum(table.heads[name] for name in network.exit_names[:-1]) / table.full
    assert facts["gating/macs_all_exits"] - facts["gating/relative_cost"] == pytest.approx(heads, rel=1e-3)


# ---- what is refused ----


def test_a_gate_on_a_unit_without_a_skip_path_is_refused_before_anything_is_written(tmp_path):
    made = session(tmp_path, replace(TINY, network=NetworkConfig(gated=("pool",))))
    verbs.train(made)
    with pytest.raises(ValueError, match=r"`gates\['pool'\]` must stand before a unit with a skip path"):
        make(made, "layer_gates")
    assert not made.method("layer_gates").exists()


def test_a_gated_unit_that_is_not_there_is_answered_with_the_nearest():
    with pytest.raises(LookupError, match="`network.gated` must be a known name, got 'layer1.1'"):
        VisionDomain(replace(TINY, network=NetworkConfig(gated=("layer1.1",)))).blank(METHODS["layer_gates"])


def test_a_backbone_whose_blocks_cannot_be_skipped_takes_no_gates():
    config = replace(TINY, backbone=BackboneConfig("mobilenet", width=0.125))
    with pytest.raises(ValueError, match="`backbone` must have units that can be skipped for gates"):
        VisionDomain(config).blank(METHODS["layer_gates"])


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("gating", {"price": -0.1}, "`gating.price` must be at least 0, got -0.1. A negative price pays for compute."),
        ("refine", {"price": -0.1}, "`refine.price` must be at least 0"),
        ("gating", {"cost": "exact"}, "`gating.cost` must be one of linear, sign_target"),
        ("gating", {"target_macs": 0.0}, "`gating.target_macs` must be positive"),
        ("network", {"channels": "all"}, "`network.channels` must be one of inner, block_out, both"),
        ("refine", {"price": 0.0}, "`refine.price` must be positive where refine.target_macs stands"),
        ("gating", {"resource": "watts"}, "`gating.resource` must be macs or energy"),
        ("refine", {"paths": 1}, "`refine.paths` must be in 2..64, got 1"),
    ],
)
def test_a_wrong_setting_is_refused(section, values, message):
    with pytest.raises(ValueError, match=message):
        changed(TINY, section, **values)


def test_gates_that_are_all_shut_for_long_are_told_and_the_healthy_state_is_kept(teacher, tmp_path):
    config = replace(
        TINY,
        gating=replace(TINY.gating, cost="linear", price=50.0, collapse_after=4, checkpoint_buffers=1, steps=960),
    )
    made, method = VisionDomain(config), METHODS["layer_gates"]
    torch.manual_seed(3)
    network = made.network(teacher / "teacher", method)
    with pytest.warns(RuntimeWarning, match="all 5 gates were shut for 4 updates.*Lower `gating.price`.*`healthy`"):
        made.learn_gates(network, teacher / "teacher", method, tmp_path, 0, Watch())
    healthy = checkpoint.load_facts(tmp_path, "healthy")["samples"]
    assert 0 < healthy < checkpoint.load_facts(tmp_path, "state")["samples"]


def test_rates_are_not_there_before_the_method_that_they_are_of(teacher, tmp_path):
    made = session(tmp_path)
    verbs.train(made)
    with pytest.raises(checkpoint.CheckpointError, match="distill"):
        make(made, "random_gates")


def test_the_plain_network_has_no_gates():
    assert not VisionDomain(TINY).blank(Method()).gates
