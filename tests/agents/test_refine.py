from __future__ import annotations

import warnings
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from rich.console import Console
from stable_baselines3 import PPO
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import DummyVecEnv

from agents import rollouts
from agents.actor import ExitingActor
from agents.backbones.nature import load_sb3, nature_network
from agents.config import NetworkConfig
from agents.critics import Critics, advantages
from agents.domain import domain, episode_seed
from agents.paths import REUSE, Asked, Batch, cloned, evaluate, stored
from agents.refine import HEALTHY, STATE, Refiner, losses
from agents.settling import settle, shift
from rlexit import checkpoint, report, verbs
from rlexit.calibrate import refined_policy
from rlexit.config import METHODS, GateConfig, Method
from rlexit.domain import Refining, Watch
from rlexit.exit_policy import ExitPolicy
from rlexit.interrupts import StopFlag, Stopped
from rlexit.refine_config import RefineConfig
from rlexit.rows import read_rows
from rlexit.runlog import read_scalars
from rlexit.runtime import run
from rlexit.session import Session
from tests.agents.small_run import CONFIG, ENV, save_teacher
from tests.rlexit.toys import MAP, residual, watched

REFINE = RefineConfig(
    steps=64,
    clone_steps=32,
    n_envs=4,
    n_steps=4,
    batch_size=8,
    epochs=2,
    max_reuse=2,
    checkpoint_updates=2,
    target_macs=0.3,
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teacher"), ENV)


def gated(teacher, config=REFINE, seed=0):
    """A network with fresh gates that differ in what they say."""
    torch.manual_seed(seed)
    network = domain(replace(CONFIG, refine=config)).network(teacher, METHODS["refined"])
    with torch.no_grad():
        if network.reuse is not None:
            network.reuse.net[-1].weight.normal_(std=0.5)
            network.reuse.net[-1].bias.zero_()
    return network


def refiner(teacher, folder, config=REFINE, stop=lambda: False):
    original = domain(CONFIG).network(teacher, Method())
    return Refiner(gated(teacher, config), original, None, ENV, config, folder, 0, Watch(stop))


@pytest.fixture
def rollout(teacher, tmp_path):
    """A refiner in the stage of PPO, and what it met with drawn decisions."""
    made = refiner(teacher, tmp_path, replace(REFINE, clone_steps=0, n_steps=12))
    from agents.envs import AtariVecEnv

    env = AtariVecEnv(ENV, REFINE.n_envs, training=True, seed=3)
    yield made, next(made._rollouts(env))
    env.close()


# ---- acting and replaying ----


def test_replayed_decisions_have_the_log_probabilities_with_which_they_were_drawn(rollout):
    made, met = rollout
    now = evaluate(made.network, met.batch)
    torch.testing.assert_close(now.log_prob, met.batch.log_prob, rtol=1e-4, atol=1e-5)
    assert set(now.gates) == set(met.batch.gates) == {"leave_gates.conv1", "leave_gates.conv2", REUSE}
    for name, before in met.batch.gates.items():
        assert before.asked.any(), name
        again = now.gates[name].log_prob[before.asked]
        torch.testing.assert_close(again, before.log_prob[before.asked], rtol=1e-4, atol=1e-5)
        ratio = (again - before.log_prob[before.asked]).exp()
        torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=1e-4, atol=1e-4)


def test_what_is_stored_tells_the_path_of_every_row(rollout):
    made, met = rollout
    batch, last = met.batch, made.network.exits
    assert set(batch.exits.tolist()) == {0, 1, 2, 3}
    assert torch.equal(batch.repeated, batch.exits == last)
    assert torch.equal(batch.gates[REUSE].action == 0, batch.repeated)
    first = batch.gates["leave_gates.conv1"]
    assert torch.equal(first.asked, ~batch.repeated)
    assert torch.equal((first.action == 1) & first.asked, batch.exits == 0)
    second = batch.gates["leave_gates.conv2"]
    assert torch.equal(second.asked, (batch.exits == 1) | (batch.exits == 2))


def test_compute_is_charged_as_executed_and_the_critics_path_is_not(teacher, tmp_path):
    from agents.envs import AtariVecEnv

    made = refiner(teacher, tmp_path, replace(REFINE, clone_steps=0))
    env = AtariVecEnv(ENV, REFINE.n_envs, training=True, seed=3)
    with watched(made.network) as acting, watched(made.teacher) as reference:
        met = next(made._rollouts(env))
    assert acting.macs == round(float(met.costs.sum()) * made.full_macs)
    assert reference.macs == 0
    env.close()


def test_memory_is_forgotten_where_a_game_begins(teacher, tmp_path):
    from agents.envs import AtariVecEnv

    made = refiner(teacher, tmp_path, replace(REFINE, clone_steps=0, n_steps=60))
    shift(made.network, REUSE, -50.0)
    env = AtariVecEnv(ENV, 4, training=True, seed=3)
    met = next(made._rollouts(env))
    env.close()
    starts = torch.from_numpy(met.starts).flatten() > 0
    assert starts.sum() > 4  # games of 160 frames end within 60 steps
    assert (met.batch.memory["left"][starts] == 0).all()
    assert not met.batch.repeated[starts].any()
    assert met.batch.repeated.any()


# ---- losses ----


class Noise(gymnasium.Env):
    """Random pictures and rewards."""

    observation_space = spaces.Box(0, 255, (4, 84, 84), np.uint8)
    action_space = spaces.Discrete(6)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), float(self.np_random.normal()), False, False, {}


def test_without_gates_and_price_the_losses_are_those_of_stable_baselines3():
    env = DummyVecEnv([Noise])
    env.envs[0].observation_space.seed(0)
    model = PPO("CnnPolicy", env, n_steps=16, batch_size=16, n_epochs=1, learning_rate=0.0, clip_range=0.1, seed=0)
    model.set_logger(configure(None, []))
    _, callback = model._setup_learn(16)
    model.collect_rollouts(env, callback, model.rollout_buffer, 16)
    with torch.no_grad():
        for parameter in model.policy.parameters():  # away from the weights that acted, so that ratios are clipped
            parameter.add_(0.01 * torch.randn_like(parameter))
    model.train()
    told = model.logger.name_to_value
    buffer = model.rollout_buffer
    network = nature_network(6)
    load_sb3(network, model.policy.state_dict())
    observations = torch.from_numpy(buffer.observations).to(torch.uint8)
    actions, before = torch.from_numpy(buffer.actions).long().flatten(), torch.from_numpy(buffer.log_probs).flatten()
    nothing = torch.zeros(16, dtype=torch.bool)
    batch = Batch(observations, None, {}, nothing.long(), nothing, actions, before)
    with torch.no_grad():
        found = losses(evaluate(network.eval(), batch), batch, torch.from_numpy(buffer.advantages).flatten(), 0.1)
    assert told["train/clip_fraction"] > 0
    torch.testing.assert_close(float(found["policy"]), float(told["train/policy_gradient_loss"]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(float(-found["entropy"]), float(told["train/entropy_loss"]), rtol=1e-4, atol=1e-5)
    assert found["gates"] == found["gate_entropy"] == 0


def test_a_price_of_zero_makes_compute_of_no_account(rollout):
    made, met = rollout
    cheap = replace(met, costs=np.zeros_like(met.costs))
    found = []
    for one in (met, cheap):
        torch.manual_seed(0)
        again = refiner_like(made, one)
        found.append(again)
    assert found[0] == found[1]


def refiner_like(made, met):
    """The losses of an update at price 0, with fresh critics and the same draws."""
    made.prices["ppo"] = 0.0
    made.generator.manual_seed(0)
    made.critics = Critics(512)
    made.optimizer = torch.optim.SGD(made.network.parameters(), lr=0.0)
    features, full = made._taught(met.batch.observations)
    facts = made._improve(met, features, full)
    return {name: facts[name] for name in ("refine/policy", "refine/gates", "refine/entropy", "refine/value")}


def test_compute_is_priced_after_rewards_are_clipped(rollout):
    _, met = rollout
    assert set(np.unique(met.rewards)) <= {-1.0, 0.0, 1.0}
    generator = np.random.default_rng(0)
    rewards = generator.integers(-1, 2, size=met.rewards.shape).astype(np.float32)
    values, after = torch.randn(48, 2), torch.randn(4, 2)
    price = 0.3

    def of(signal, one):
        return advantages(signal, values[:, one], met.starts, after[:, one], met.ended, REFINE)[0]

    joint, joint_after = values[:, 0] - price * values[:, 1], after[:, 0] - price * after[:, 1]
    whole = advantages(rewards - price * met.costs, joint, met.starts, joint_after, met.ended, REFINE)[0]
    torch.testing.assert_close(of(rewards, 0) - price * of(met.costs, 1), whole, rtol=1e-4, atol=1e-5)


def test_a_gate_learns_from_the_rows_that_asked_it_alone(rollout):
    made, met = rollout
    advantage = torch.randn(len(met.batch), generator=torch.Generator().manual_seed(0))
    now = evaluate(made.network, met.batch)
    name = "leave_gates.conv2"
    before = met.batch.gates[name]
    elsewhere = torch.where(before.asked, before.log_prob, before.log_prob + 3.0)
    changed = replace(met.batch, gates={**met.batch.gates, name: Asked(before.action, elsewhere, before.asked)})
    same = losses(now, changed, advantage, 0.1)["gates"]
    torch.testing.assert_close(same, losses(now, met.batch, advantage, 0.1)["gates"])


def test_advantages_reach_their_own_rows(rollout):
    made, met = rollout
    advantage = torch.randn(len(met.batch), generator=torch.Generator().manual_seed(0))
    grads = []
    for given in (advantage, advantage.flip(0)):
        made.network.zero_grad()
        losses(evaluate(made.network, met.batch), met.batch, given, 0.1)["gates"].backward()
        grads.append(made.network.reuse.net[-1].weight.grad.clone())
    assert not torch.allclose(grads[0], grads[1])


def test_a_cloned_gates_gradient_is_the_difference_between_its_two_ways(rollout):
    made, met = rollout
    network = made.network.train()
    batch = met.batch.take(torch.nonzero(met.batch.gates[REUSE].asked).flatten())
    full = made._taught(batch.observations)[1]
    price = 0.7
    kl, macs, _ = cloned(network, batch, full)
    (kl + price * macs / made.full_macs).sum().backward()
    found = network.reuse.net[-1].bias.grad
    with torch.no_grad():
        shift(network, REUSE, 100.0)
        computed, dear, _ = cloned(network, batch, full)
        shift(network, REUSE, -200.0)
        repeated, cheap, _ = cloned(network, batch, full)
        shift(network, REUSE, 100.0)
        logits = network.reuse.logits(network.reuse.view(network.prepare(batch.observations)), batch.memory)
        slope = logits.sigmoid() * (1 - logits.sigmoid())
        gain = computed - repeated + price * (dear - cheap) / made.full_macs
    torch.testing.assert_close(found, (slope * gain).sum()[None], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(repeated, ((full - batch.memory["answer"]) * full.exp()).sum(dim=1))


# ---- the whole of it ----


def test_refinement_runs_to_the_end_and_leaves_curves(teacher, tmp_path):
    made = refiner(teacher, tmp_path)
    facts = made.run()
    assert made.samples == made.total == 96
    tags = {tag for _, tag, _ in read_scalars(tmp_path)}
    wanted = {"refine/cost", "refine/lambda", "refine/kl", "refine/policy", "refine/cost_value", "refine/cost_settled"}
    assert wanted | {"gate/open_frac/reuse", "gate/open_frac/leave_gates.conv1"} <= tags
    assert 0 < facts["refine/cost_settled"] < 1.2


@pytest.mark.parametrize("trunk", ["frozen", "trained"])
def test_the_trunk_moves_only_if_it_is_asked_to(teacher, tmp_path, trunk):
    made = refiner(teacher, tmp_path, replace(REFINE, trunk=trunk))
    before = {key: value.clone() for key, value in made.network.state_dict().items()}
    made.run()
    after = made.network.state_dict()
    moved = {key for key, value in after.items() if not torch.equal(value, before[key])}
    still = {key for key in after if key.startswith(("units.", "heads.fc."))}
    assert moved & still == (set() if trunk == "frozen" else still)
    assert {"heads.conv1.linear.weight", "reuse.net.0.weight", "leave_gates.conv1.module.hidden.weight"} <= moved
    assert not {key for key in moved if key.startswith("ensemble")}


def test_a_stopped_refinement_goes_on_with_weights_moments_and_prices(teacher, tmp_path):
    asked = iter([False, False, True])
    first = refiner(teacher, tmp_path, stop=lambda: next(asked))
    with pytest.raises(Stopped):
        first.run()
    second = refiner(teacher, tmp_path)
    second._restore()
    assert second.samples == first.samples == 48
    assert second.prices == first.prices != {"clone": REFINE.clone_price, "ppo": REFINE.price}
    for key, value in first.network.state_dict().items():
        assert torch.equal(value, second.network.state_dict()[key])
    assert torch.equal(second.generator.get_state(), first.generator.get_state())
    assert (
        checkpoint.pack_optimizer(second.optimizer, "o").keys()
        == checkpoint.pack_optimizer(first.optimizer, "o").keys()
    )
    second.run()
    assert second.samples == second.total


@pytest.mark.filterwarnings("ignore:No shift of the gates meets")
def test_a_price_with_a_target_rises_above_it_and_falls_below_and_never_under_zero(teacher, tmp_path):
    for target, rises in ((0.01, True), (5.0, False)):
        made = refiner(teacher, tmp_path / str(target), replace(REFINE, target_macs=target, dual_rate=0.1))
        made.run()
        for stage, first in (("clone", REFINE.clone_price), ("ppo", REFINE.price)):
            assert (made.prices[stage] > first) is rises
    made = refiner(teacher, tmp_path / "low", replace(REFINE, target_macs=5.0, dual_rate=100.0))
    made.run()
    assert made.prices == {"clone": 0.0, "ppo": 0.0}
    made = refiner(teacher, tmp_path / "fixed", replace(REFINE, target_macs=0.0))
    made.run()
    assert made.prices == {"clone": REFINE.clone_price, "ppo": REFINE.price}


@pytest.mark.filterwarnings("ignore:No shift of the gates meets")
def test_collapsed_gates_are_told_loudly_and_the_healthy_state_is_kept(teacher, tmp_path):
    config = replace(REFINE, collapse_after=2, checkpoint_updates=1, steps=96)
    made = refiner(teacher, tmp_path, config)
    asked = iter([False, True])
    made.watch = Watch(lambda: next(asked))
    with pytest.raises(Stopped):
        made.run()
    healthy = checkpoint.load_facts(tmp_path, HEALTHY)["samples"]
    again = refiner(teacher, tmp_path, config)
    again._restore()
    for name in ("leave_gates.conv1", "leave_gates.conv2", REUSE):
        shift(again.network, name, 80.0)
    again._save()
    with pytest.warns(RuntimeWarning, match=r"gates were open for 2 updates.*kept as `healthy`"):
        refiner(teacher, tmp_path, config).run()
    assert checkpoint.load_facts(tmp_path, STATE)["samples"] > healthy


def test_greedy_decisions_are_settled_at_the_rates_of_the_drawn_ones(teacher, tmp_path):
    made = refiner(
        teacher, tmp_path, replace(REFINE, clone_steps=0, n_steps=40, n_envs=8, max_reuse=30, target_macs=0.0)
    )
    shift(made.network, REUSE, 1.5)  # drawn in one of five steps, greedily in hardly any
    from agents.envs import AtariVecEnv

    env = AtariVecEnv(ENV, 8, training=True, seed=3)
    games = made._rollouts(env)
    drawn = next(games).batch.open_shares()[REUSE]
    made.settling = True
    greedy = next(games).batch.open_shares()[REUSE]
    made.settling = False
    facts = made._settle(games)
    env.close()
    assert abs(facts["gate/greedy_frac/reuse"] - drawn) < abs(greedy - drawn)


@pytest.mark.parametrize("kind", ["lstm", "ff2"])
def test_every_gate_before_a_unit_is_settled_at_its_own_rate(kind):
    torch.manual_seed(2)
    network = residual("none", GateConfig(kind, bias=0.0)).eval()
    inputs = torch.randn(300, *MAP, generator=torch.Generator().manual_seed(3))
    policy, generator = ExitPolicy.full(network.exits), torch.Generator().manual_seed(4)

    def play(mode):
        result = run(network, policy, inputs, mode=mode, generator=generator)
        return stored(network, inputs, None, result, result.answers.argmax(dim=1))

    for gate, by in zip(network.gates.values(), (-1.0, 2.0, 0.5), strict=True):
        gate.shift(by)
    drawn = play("sample")
    before = play("greedy").open_shares()
    told = settle(network, drawn, lambda: (play("greedy"), 0.5), 0.0)
    shares = drawn.open_shares()
    assert any(abs(before[name] - share) > 0.1 for name, share in shares.items())
    for name, share in shares.items():
        assert told[f"gate/greedy_frac/{name}"] == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize(("target", "least"), [(0.3, 0.2), (0.6, 0.05)])
def test_greedy_decisions_are_settled_at_the_target_or_below_where_gates_agree(teacher, tmp_path, target, least):
    made = refiner(teacher, tmp_path, replace(REFINE, n_steps=40, n_envs=8, target_macs=target))
    from agents.envs import AtariVecEnv

    env = AtariVecEnv(ENV, 8, training=True, seed=3)
    facts = made._settle(made._rollouts(env))
    env.close()
    # Untrained leave gates say nearly the same of every state: no shift parts them, and costs jump from exit to exit.
    assert least < facts["refine/cost_settled"] < target + 0.08


def test_the_critics_start_from_the_teachers_own(teacher):
    head = torch.nn.Linear(512, 1)
    features = torch.randn(5, 512)
    found = Critics(512, head)(features, torch.zeros(5))
    torch.testing.assert_close(found[:, 0], head(features)[:, 0])
    assert (found[:, 1] == 0).all()
    assert (Critics(512)(features, torch.zeros(5)) == 0).all()


# ---- as a domain ----


def test_games_are_a_domain_that_refines(teacher, tmp_path):
    pong = domain(replace(CONFIG, refine=REFINE))
    assert isinstance(pong, Refining)
    network = pong.network(teacher, METHODS["refined"])
    facts = pong.refine(network, teacher, METHODS["refined"], tmp_path, 0, Watch())
    assert "refine/cost_settled" in facts
    other = domain(replace(CONFIG, refine=replace(REFINE, algo="blockdrop")))
    with pytest.raises(ValueError, match="`refine.algo` must be ppo for games, got blockdrop"):
        other.refine(network, teacher, METHODS["refined"], tmp_path, 0, Watch())


def test_exits_cannot_be_decided_where_there_are_none(teacher):
    bare = replace(CONFIG, network=NetworkConfig(taps=()), refine=REFINE)
    with pytest.raises(ValueError, match="`network.taps` must name a unit to decide exits at, got none"):
        domain(bare).blank(METHODS["refined"])


def test_a_refined_actor_plays_every_game_as_if_alone(teacher):
    network = gated(teacher)
    policy = refined_policy(network)
    jobs = [rollouts.Job(0, episode, episode_seed("test", episode)) for episode in range(3)]

    def played(jobs, n_envs):
        decide = rollouts.exiting(network, [policy])
        found = rollouts.play(ENV, decide, jobs, rollouts.outcomes(network), n_envs=n_envs, record=len(jobs))
        return {one.episode: one for one in found}

    together = played(jobs, 3)
    in_turn = played(jobs, 2)
    for job in jobs:
        alone = played([job], 1)[job.episode]
        for other in (together[job.episode], in_turn[job.episode]):
            assert (alone.exits == other.exits).all()
            assert alone.macs == other.macs
            assert alone.steps["exits"] == other.steps["exits"]
        assert alone.exits[network.exits] == alone.steps["exits"].count(-1) > 0
        assert alone.exits.sum() == alone.decisions


def test_an_actor_hands_its_memory_over_as_sb3_hands_a_state(teacher):
    network = gated(teacher)
    shift(network, REUSE, -50.0)
    actor = ExitingActor(network, refined_policy(network))
    observations = np.random.default_rng(0).integers(0, 255, (3, 4, 84, 84), dtype=np.uint8)
    actions, state = actor.predict(observations, None, np.ones(3, dtype=bool), deterministic=True)
    assert (actor.last.exits < network.exits).all()
    again, state = actor.predict(observations[::-1].copy(), state, np.array([False, True, False]), deterministic=True)
    assert (actor.last.exits == network.exits).tolist() == [True, False, True]
    assert again[0] == actions[0]
    assert again[2] == actions[2]


def test_no_warning_is_given_while_gates_decide(teacher, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refiner(teacher, tmp_path, replace(REFINE, collapse_after=3)).run()


def test_a_refined_run_is_calibrated_evaluated_filmed_and_reported(tmp_path):
    settings = replace(CONFIG, methods=("ztw", "refined"), refine=REFINE)
    evaluated = replace(settings.evaluate, episodes=2, grid=2, rules=("confidence", "learned"))
    session = Session(
        domain(replace(settings, evaluate=evaluated)), tmp_path / "pong", 0, Console(quiet=True), StopFlag()
    )
    save_teacher(session.teacher, ENV)
    verbs.distill(session, "ztw")
    verbs.refine(session, "refined")
    (first, *_) = verbs.calibrate(session, "refined")
    assert (first.label, first.rule, first.provenance["target"]) == ("refined", "learned", "refined")
    verbs.evaluate_teacher(session)
    verbs.evaluate_method(session, "refined")
    rows = read_rows(session.method("refined") / "eval" / "episodes.csv")
    assert {len(row.exit_fractions) for row in rows} == {4}
    assert {"confidence", "learned"} <= {row.rule for row in rows}
    assert all(sum(row.exit_fractions) == pytest.approx(1) for row in rows)
    assert max(row.exit_fractions[3] for row in rows) > 0
    page = report.write_report([tmp_path / "pong"], tmp_path / "report")
    assert "reuse %" in page.read_text(encoding="utf-8")
    assert verbs.video(session, "refined", 0, None, 12).is_file()
