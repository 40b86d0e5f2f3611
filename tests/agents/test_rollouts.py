"""Games in one batch: each is played as it would be alone, and every decision is the row's own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from agents import envs
from agents.backbones.nature import nature_network
from agents.config import EnvConfig
from agents.rollouts import Job, at_random, collect, exiting, play
from rlexit.config import DistillConfig, HeadConfig
from rlexit.distill import Distiller
from rlexit.domain import Played
from rlexit.ensembles import GeometricEnsemble
from rlexit.exit_policy import ExitPolicy
from rlexit.network import StagedNetwork
from rlexit.runtime import RunResult, replay
from rlexit.students import ExitStudent

ACTIONS = 6
SHORT = EnvConfig("qbert", max_frames=160)  # 40 env steps
JOBS = [Job(index % 2, index, 500 + index) for index in range(8)]


def actor() -> StagedNetwork:
    """An untrained actor whose answers differ from frame to frame."""
    torch.manual_seed(4)
    ensemble = GeometricEnsemble(2, ACTIONS)
    network = nature_network(ACTIONS, ("conv1", "conv2"), HeadConfig(), True, ensemble).eval()
    with torch.no_grad():
        for exit in range(3):
            for name, weights in network.head(exit).named_parameters():
                if name.endswith("linear.weight") or name == "module.weight":
                    weights.mul_(20)
    return network


def frames(config: EnvConfig, count: int = 48) -> Tensor:
    """Observations of games that are played at random."""
    seen: list[np.ndarray] = []
    jobs = [Job(0, index, 900 + index) for index in range(4)]
    keep = lambda observations: seen.append(observations.copy())  # noqa: E731
    for _ in play(config, at_random(ACTIONS), jobs, 1, n_envs=4, sampled=True, keep=keep):
        pass
    return torch.from_numpy(np.concatenate(seen))[:: 160 // count + 1][:count]


@pytest.fixture(scope="module")
def network() -> StagedNetwork:
    return actor()


@pytest.fixture(scope="module")
def policies(network) -> list[ExitPolicy]:
    """Two exit policies under which rows leave everywhere, the second later than the first."""
    scores = replay(network, ExitPolicy("confidence", (2.0, 2.0)), frames(SHORT)).scores[:, :2]
    return [
        ExitPolicy("confidence", tuple(scores.quantile(share, dim=0).tolist()), f"at {share}") for share in (0.5, 0.8)
    ]


def facts(played: Played) -> tuple:
    return (
        *(played.policy, played.episode, played.seed, played.value, played.decisions, played.macs),
        *played.exits.tolist(),
    )


def by_episode(games) -> dict[int, Played]:
    return {played.episode: played for played in games}


@pytest.fixture(scope="module")
def together(network, policies) -> dict[int, Played]:
    """All jobs side by side."""
    return by_episode(play(SHORT, exiting(network, policies), JOBS, 3, n_envs=8, record=8))


# ---- games are independent ----


def test_rows_leave_everywhere_in_these_games(together):
    assert np.sum([played.exits for played in together.values()], axis=0).min() > 5


def near(one: Played, other: Played) -> bool:
    """Equal steps; confidences up to what the kernels' choice by batch size changes."""
    kept = ("exits", "actions", "rewards")
    same = all(one.steps[name] == other.steps[name] for name in kept)
    return same and np.allclose(one.steps["confidences"], other.steps["confidences"], atol=1e-5)


@pytest.mark.parametrize("n_envs", [3, 32])
def test_a_game_does_not_depend_on_how_many_are_played_at_once(network, policies, together, n_envs):
    again = by_episode(play(SHORT, exiting(network, policies), JOBS[::-1], 3, n_envs=n_envs))
    assert {episode: facts(played) for episode, played in again.items()} == {
        episode: facts(played) for episode, played in together.items()
    }


@pytest.mark.parametrize("index", [0, 3])
def test_a_game_alone_is_the_game_among_seven_others(network, policies, together, index):
    (alone,) = play(SHORT, exiting(network, policies), [JOBS[index]], 3, record=1)
    assert facts(alone) == facts(together[index])
    assert near(alone, together[index])


def test_a_game_is_decided_by_its_own_policy_and_its_own_seed(network, policies, together):
    other_policy = [job._replace(policy=1 - job.policy) for job in JOBS[:3]]
    for played in play(SHORT, exiting(network, policies), other_policy, 3):
        assert played.exits.tolist() != together[played.episode].exits.tolist()
    same = [Job(0, 0, 500), Job(0, 1, 500), Job(0, 2, 501)]
    first, second, _ = (by_episode(play(SHORT, exiting(network, policies), same, 3, record=3))[n] for n in range(3))
    assert facts(first)[3:] == facts(second)[3:]


def test_costs_and_exits_are_of_the_game_s_own_decisions(together):
    costs = {0: 3_510_272, 1: 6_318_116, 2: 9_733_156}
    for played in together.values():
        assert played.exits.sum() == played.decisions == 40
        assert played.macs == sum(costs[exit] * int(count) for exit, count in enumerate(played.exits))


# ---- real and replay ----


@pytest.mark.parametrize("game", ["pong", "qbert"])
def test_real_execution_acts_as_replay_does_on_real_frames(network, policies, game):
    config = replace(SHORT, game=game)
    jobs = JOBS[:2]
    real = by_episode(play(config, exiting(network, policies, "real"), jobs, 3, record=2))
    replayed = by_episode(play(config, exiting(network, policies, "replay"), jobs, 3, record=2))
    for episode, played in real.items():
        assert played.steps["actions"] == replayed[episode].steps["actions"]
        assert played.steps["exits"] == replayed[episode].steps["exits"]
        assert len(set(played.steps["exits"])) > 1
        assert played.value == replayed[episode].value
        # Replay charges what it computed: every exit of every step.
        assert replayed[episode].macs == 9_733_156 * played.decisions > played.macs


# ---- actions ----


def test_a_sampled_action_is_drawn_by_the_game_s_own_generator():
    games = by_episode(play(SHORT, at_random(ACTIONS), JOBS, 1, n_envs=3, sampled=True, record=8))
    for job in JOBS:
        generator = np.random.default_rng(job.seed)
        expected = [int(generator.choice(ACTIONS, p=np.full(ACTIONS, 1 / ACTIONS))) for _ in range(40)]
        assert games[job.episode].steps["actions"] == expected
        assert (games[job.episode].macs, games[job.episode].exits.tolist()) == (0, [40])


def test_sampled_games_do_not_depend_on_their_neighbours_either(network, policies):
    decide = exiting(network, policies)
    many = by_episode(play(SHORT, decide, JOBS[:4], 3, sampled=True, record=4))
    (alone,) = play(SHORT, decide, [JOBS[2]], 3, sampled=True, record=1)
    assert near(alone, many[2])
    greedy = by_episode(play(SHORT, decide, JOBS[:4], 3, record=4))
    assert alone.steps["actions"] != greedy[2].steps["actions"]


def test_the_likeliest_action_is_taken_unless_actions_are_sampled():
    answers = torch.tensor([[0.1, 0.5, 0.4, 0.0, 0.0, 0.0]]).clamp_min(1e-9).log()

    def decide(observations: Tensor, jobs: np.ndarray, memory: object) -> RunResult:
        nothing = torch.zeros(len(observations), dtype=torch.int64)
        return RunResult(
            answers.expand(len(observations), -1), nothing, nothing, torch.full((len(observations), 1), torch.nan)
        )

    (played,) = play(SHORT, decide, JOBS[:1], 1, record=1)
    assert set(played.steps["actions"]) == {1}
    assert played.steps["confidences"] == pytest.approx([0.5] * 40)
    (drawn,) = play(SHORT, decide, JOBS[:1], 1, sampled=True, record=1)
    assert {1, 2} <= set(drawn.steps["actions"]) <= {0, 1, 2}


# ---- jobs ----


@pytest.mark.parametrize("n_envs", [1, 3, 5])
def test_every_job_is_yielded_once_and_progress_counts_them(n_envs):
    told: list[tuple[int, int]] = []
    games = list(
        play(
            SHORT,
            at_random(ACTIONS),
            JOBS[:5],
            1,
            n_envs=n_envs,
            sampled=True,
            progress=lambda done, total: told.append((done, total)),
        )
    )
    assert sorted((played.policy, played.episode, played.seed) for played in games) == sorted(JOBS[:5])
    assert told == [(count, 5) for count in range(1, 6)]


def test_without_jobs_nothing_is_played():
    assert list(play(SHORT, at_random(ACTIONS), [], 1)) == []


def test_steps_are_kept_for_the_first_jobs_only():
    games = by_episode(play(SHORT, at_random(ACTIONS), JOBS[:5], 1, n_envs=2, sampled=True, record=2))
    for episode, played in games.items():
        lengths = {name: len(values) for name, values in played.steps.items()}
        names = ("exits", "confidences", "actions", "rewards")
        assert lengths == (dict.fromkeys(names, played.decisions) if episode < 2 else {})
    assert sum(games[0].steps["rewards"]) == games[0].value


def test_a_stop_ends_the_playing_with_what_is_done():
    asked = iter([False] * 45 + [True] * 100)
    games = list(play(SHORT, at_random(ACTIONS), JOBS, 1, n_envs=2, sampled=True, stop=lambda: next(asked)))
    assert len(games) == 2


def test_only_running_games_are_decided_and_kept():
    rows: list[int] = []
    kept: list[int] = []

    def decide(observations, jobs, memory):
        rows.append(len(observations))
        return at_random(ACTIONS)(observations, jobs)

    games = list(
        play(
            SHORT, decide, JOBS[:3], 1, n_envs=2, sampled=True, keep=lambda observations: kept.append(len(observations))
        )
    )
    assert rows == kept
    assert sum(rows) == sum(played.decisions for played in games)
    assert set(rows) == {1, 2}


# ---- collecting for distillation ----


class FakeEnv:
    """Takes the place of the emulators and notes the actions."""

    def __init__(self, config, n_envs, *, training) -> None:
        assert not training
        self.n_envs = n_envs
        self.sent: list[list[int]] = []
        self.seeds: list[int] = []
        self.step = 0
        self.closed = False
        made.append(self)

    def _frames(self) -> np.ndarray:
        shape = (self.n_envs, 4, 84, 84)
        return np.random.default_rng(self.step).integers(0, 256, shape, dtype=np.uint8)

    def reset_games(self, games, seeds) -> np.ndarray:
        self.seeds += list(seeds)
        return self._frames()

    def step_async(self, actions) -> None:
        self.sent.append(list(actions))

    def step_wait(self):
        self.step += 1
        return self._frames(), None, None, None

    def close(self) -> None:
        self.closed = True


made: list[FakeEnv] = []


@pytest.fixture
def fake(monkeypatch) -> list[FakeEnv]:
    made.clear()
    monkeypatch.setattr(envs, "AtariVecEnv", FakeEnv)
    monkeypatch.setattr(envs, "_shelf", {})
    return made


def test_collecting_drives_every_game_by_its_own_likeliest_action(fake):
    told: list[list[int]] = []

    def act(observations: Tensor) -> Tensor:
        wanted = (observations.flatten(1).sum(dim=1) + torch.arange(5)) % ACTIONS
        told.append(wanted.tolist())
        return torch.nn.functional.one_hot(wanted, ACTIONS).float().log_softmax(dim=1)

    buffers = collect(SHORT, act, n_envs=5, n_steps=3, seed=1)
    assert [next(buffers), next(buffers)] == [15, 15]
    assert fake[0].sent == told
    assert len(told) == 6
    assert any(len(set(row)) > 1 for row in told)
    assert not fake[0].closed


def test_emulators_are_used_again_by_whoever_needs_as_many(fake):
    def act(observations: Tensor) -> Tensor:
        return torch.zeros(len(observations), ACTIONS)

    for count in (5, 5, 6, 5):
        next(collect(SHORT, act, count, 1, seed=1))
    assert [one.n_envs for one in fake] == [5, 6]
    both = [collect(SHORT, act, 5, 1, seed) for seed in (1, 2)]
    for buffers in both:
        next(buffers)
    assert [one.n_envs for one in fake] == [5, 6, 5]


def test_emulators_that_failed_are_not_used_again(fake):
    def fail(observations: Tensor) -> Tensor:
        raise RuntimeError("no answer")

    with pytest.raises(RuntimeError, match="no answer"):
        next(collect(SHORT, fail, 5, 1, seed=1))
    assert fake[0].closed
    next(collect(SHORT, lambda observations: torch.zeros(len(observations), ACTIONS), 5, 1, seed=1))
    assert len(fake) == 2


def test_seeds_of_collected_games_differ_within_and_between_starts(fake):
    for seed in (1, 2):
        next(collect(SHORT, lambda observations: torch.zeros(len(observations), ACTIONS), 6, 1, seed))
    assert len(set(fake[0].seeds)) == len(fake[0].seeds) == 12
    assert all(0 <= seed < 2**31 for seed in fake[0].seeds)


@pytest.mark.parametrize("reference", [False, True])
def test_by_default_a_game_acts_on_its_own_answer_and_as_in_the_reference_on_the_first_game_s(
    fake, tmp_path, reference
):
    network = actor()
    steps: list[tuple[Tensor, Tensor]] = []
    batches = lambda act, first: collect(SHORT, spy(act), 6, 4, first)  # noqa: E731

    def spy(act):
        def watched(observations: Tensor) -> Tensor:
            answers = act(observations)
            steps.append((observations.clone(), answers.clone()))
            return answers

        return watched

    config = DistillConfig(
        steps=48, ensemble_steps=24, batch_size=24, epochs=1, learning_rate=1e-9, reference=reference
    )
    Distiller(ExitStudent(network), batches, config, tmp_path, seed=0).run()
    observations, told = steps[0]
    every = network(observations).logits.log_softmax(dim=-1).detach()

    def distance(row: int, source: int) -> float:
        """To the nearest exit's answer to the observation of game `source`; which exit a row is given is drawn."""
        return float((told[row] - every[source]).abs().amax(dim=1).min())

    for row in range(1, 6):
        of_its_own, of_the_first = distance(row, row), distance(row, 0)
        given, other = (of_the_first, of_its_own) if reference else (of_its_own, of_the_first)
        assert given < 1e-4
        assert other > 1e-3
