"""Atari as a domain of the verbs: seeds, protocols, and what is accepted as a teacher."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import islice

import numpy as np
import pytest
import torch

from agents import rollouts, zoo
from agents.backbones.nature import load_sb3, nature_network
from agents.config import AgentsConfig, CollectConfig, EnvConfig, NetworkConfig
from agents.domain import FIRST_SEED, MAX_EPISODES, ROW_GAMES, ROW_SPACING, AgentsDomain, domain, episode_seed
from rlexit import checkpoint
from rlexit.checkpoint import CheckpointError
from rlexit.config import METHODS, DistillConfig, EvaluateConfig, Method
from rlexit.domain import Domain, Watch
from rlexit.exit_policy import ExitPolicy
from rlexit.interrupts import Stopped
from tests.agents.small_run import CONFIG, ENV, save_teacher


@pytest.fixture(scope="module")
def pong() -> AgentsDomain:
    return domain(CONFIG)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("run") / "teacher", ENV)


# ---- what it is ----


def test_it_is_a_domain_of_its_game(pong):
    assert isinstance(pong, Domain)
    assert (pong.task, pong.metric, pong.actions) == ("pong", "score", 6)
    assert pong.action_meanings[:2] == ["NOOP", "FIRE"]
    assert pong.example().shape == (1, 4, 84, 84)
    assert pong.example().dtype == torch.uint8


def test_the_protocol_names_every_rule_and_the_rom(pong):
    names = {field.name for field in fields(EnvConfig)}
    assert set(pong.protocol()) == names | {"ale_py", "rom_md5", "score"}


def test_an_unknown_game_is_refused_at_once():
    with pytest.raises(LookupError, match=r"`env\.game` .*'pnog'.*pong"):
        domain(AgentsConfig(env=EnvConfig("pnog")))


def test_full_action_space_has_all_actions():
    assert domain(replace(CONFIG, env=replace(ENV, full_action_space=True))).actions == 18


# ---- seeds ----


def test_calibration_and_test_seeds_cannot_meet():
    ranges = {split: range(episode_seed(split, 0), episode_seed(split, MAX_EPISODES - 1) + 1) for split in FIRST_SEED}
    calibration, test = ranges["calibration"], ranges["test"]
    assert len(calibration) == len(test) == MAX_EPISODES
    assert calibration.stop <= test.start
    assert test.stop < 2**31


@pytest.mark.parametrize("episode", [-1, MAX_EPISODES])
def test_an_episode_that_would_leave_its_split_is_refused(episode):
    with pytest.raises(ValueError, match="`episode` must be in 0..999999"):
        episode_seed("calibration", episode)


def test_episodes_are_played_from_the_seeds_of_their_split(pong, teacher):
    network = pong.network(teacher, METHODS["ztw"])
    policies = [ExitPolicy.always(0, 3), ExitPolicy("confidence", (0.5, 0.5))]
    for split in ("calibration", "test"):
        games = list(pong.play(network, policies, [(0, 4), (1, 4), (1, 5)], split, 0, Watch()))
        assert {(played.policy, played.episode, played.seed) for played in games} == {
            (0, 4, FIRST_SEED[split] + 4),
            (1, 4, FIRST_SEED[split] + 4),
            (1, 5, FIRST_SEED[split] + 5),
        }
        assert {len(played.exits) for played in games} == {3}


def test_a_random_actor_costs_nothing_and_does_not_need_a_network(pong):
    told: list[tuple[int, int]] = []
    watch = Watch(progress=lambda done, total, facts: told.append((done, total)))
    games = list(pong.play(None, [ExitPolicy.full(1)], [(0, 0), (0, 1)], "test", 1, watch))
    assert [played.macs for played in games] == [0, 0]
    assert {len(played.exits) for played in games} == {1}
    (recorded,) = [played.steps["actions"] for played in games if played.steps]
    assert len(set(recorded)) > 1
    assert told == [(1, 2), (2, 2)]


# ---- teachers ----


def test_a_teacher_of_the_same_protocol_is_accepted(pong, teacher):
    pong.accept(teacher)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("game", "breakout"),
        ("sticky", 0.25),
        ("frame_skip", 5),
        ("noop_max", 30),
        ("max_frames", 400),
        ("full_action_space", True),
        ("fire_on_reset", False),
        ("fire_after_life_loss", False),
    ],
)
def test_a_teacher_of_another_protocol_is_refused_by_the_field(teacher, field, value):
    other = domain(replace(CONFIG, env=replace(ENV, **{field: value})))
    theirs = getattr(ENV, field)
    with pytest.raises(CheckpointError, match=rf"env\.{field} is {theirs!r}, the config says {value!r}"):
        other.accept(teacher)


def test_a_teacher_that_tells_no_protocol_is_refused(pong, tmp_path):
    checkpoint.save(tmp_path, "teacher", {"x": torch.zeros(1)}, {})
    with pytest.raises(CheckpointError, match=r"env\.game is None"):
        pong.accept(tmp_path)


def test_a_teacher_of_another_network_is_refused_by_its_tensor(pong, tmp_path):
    save_teacher(tmp_path, ENV, actions=9)
    with pytest.raises(ValueError, match=r"`action_net\.weight` must be \(6, 512\), got \(9, 512\)"):
        pong.accept(tmp_path)


def test_the_network_is_the_teacher_with_fresh_exits(pong, teacher):
    network = pong.network(teacher, METHODS["ztw"])
    assert network.exit_names == ("conv1", "conv2", "fc")
    assert (network.head(0).reads_previous, network.head(1).reads_previous) == (False, True)
    own = nature_network(6)
    load_sb3(own, checkpoint.load(teacher, "teacher")[0])
    frames = torch.randint(0, 256, (3, 4, 84, 84), dtype=torch.uint8)
    assert torch.allclose(network.eval()(frames).logits[:, -1], own.eval()(frames).logits[:, 0], atol=1e-6)
    assert pong.blank(Method()).exits == 3
    bare = domain(replace(CONFIG, network=NetworkConfig(taps=())))
    assert bare.network(teacher, Method()).exits == 1


def test_static_networks_are_as_narrow_as_their_names(teacher):
    made = domain(replace(CONFIG, distill=DistillConfig(static_widths=(0.5, 0.125)))).static_networks(teacher)
    assert list(made) == ["width 0.5", "width 0.125"]
    assert made["width 0.125"].get_parameter("units.conv1.module.0.weight").shape == (4, 4, 8, 8)


def test_the_shipped_teacher_is_copied_where_the_config_says_so(tmp_path):
    shipped = domain(AgentsConfig(env=EnvConfig("pong"), teacher="zoo"))
    shipped.train(tmp_path, 0, Watch())
    shipped.accept(tmp_path)
    assert checkpoint.weights_hash(tmp_path, "teacher") == checkpoint.weights_hash(zoo.folder("pong"), "teacher")


# ---- rows and batches ----


def test_rows_are_observations_of_calibration_episodes(pong, teacher, monkeypatch):
    seeds: list[int] = []
    sound = rollouts.play

    def watched(config, decide, jobs, *others, **settings):
        seeds.extend(job.seed for job in jobs)
        return sound(config, decide, jobs, *others, **settings)

    monkeypatch.setattr(rollouts, "play", watched)
    told: list[tuple[int, int]] = []
    watch = Watch(progress=lambda done, total, facts: told.append((done, total)))
    rows = pong.rows(pong.network(teacher, METHODS["sdn"]), ExitPolicy.full(3), 6, watch)
    assert rows.shape == (6, 4, 84, 84)
    assert rows.dtype == torch.uint8
    assert seeds == [FIRST_SEED["calibration"] + episode for episode in range(ROW_GAMES)]
    assert told[-1] == (ROW_GAMES, ROW_GAMES)
    assert len(torch.unique(rows.flatten(1), dim=0)) > 3


def test_rows_are_as_many_as_short_games_give(pong, teacher):
    network = pong.network(teacher, METHODS["sdn"])
    rows = pong.rows(network, ExitPolicy.always(0, 3), 4000, Watch())
    steps = ENV.max_frames // ENV.frame_skip
    assert len(rows) == ROW_GAMES * -(-steps // ROW_SPACING)


def test_rows_of_long_games_are_thinned_and_reach_to_their_ends(pong, teacher, monkeypatch):
    kept: list[np.ndarray] = []
    sound = rollouts.play

    def watched(config, decide, jobs, exits, *, keep, **settings):
        def both(observations):
            kept.append(observations.copy())
            keep(observations)

        return sound(config, decide, jobs, exits, keep=both, **settings)

    monkeypatch.setattr(rollouts, "play", watched)
    rows = pong.rows(pong.network(teacher, METHODS["sdn"]), ExitPolicy.always(0, 3), 20, Watch())
    assert len(rows) == 20
    last = torch.from_numpy(np.concatenate(kept[len(kept) // 2 :])).flatten(1)
    late = [any(torch.equal(row, one) for one in last) for row in rows.flatten(1)]
    assert sum(late) >= 5


def test_rows_are_stopped_by_a_signal(pong, teacher):
    with pytest.raises(Stopped):
        pong.rows(pong.network(teacher, METHODS["sdn"]), ExitPolicy.full(3), 100, Watch(stop=lambda: True))


def test_a_stream_of_samples_depends_on_seed_and_first_buffer_only():
    small = domain(replace(CONFIG, collect=CollectConfig(n_envs=2, n_steps=3)))

    def seen(seed: int, first: int) -> np.ndarray:
        observed: list[np.ndarray] = []

        def act(observations: torch.Tensor) -> torch.Tensor:
            observed.append(observations.numpy().copy())
            # Changing actions, so that the emulator's own dice (sticky actions) show.
            return torch.eye(6)[[(len(observed) // 2) % 6] * len(observations)]

        counts = list(islice(small.batches(seed)(act, first), 6))
        assert counts == [6] * 6
        return np.stack(observed)

    first = seen(0, 0)
    assert first.shape == (18, 2, 4, 84, 84)
    np.testing.assert_array_equal(first, seen(0, 0))
    assert not np.array_equal(first, seen(0, 5))
    assert not np.array_equal(first, seen(1, 0))


def test_settings_of_evaluation_reach_the_games(teacher):
    for actions, distinct in (("argmax", 1), ("sampled", 2)):
        config = replace(CONFIG, evaluate=EvaluateConfig(n_envs=2, actions=actions, execution="replay"))
        made = domain(config)
        network = made.network(teacher, METHODS["sdn"])
        with torch.no_grad():
            for parameter in network.head(2).parameters():
                parameter.zero_()
        (played,) = made.play(network, [ExitPolicy.full(3)], [(0, 0)], "test", 1, Watch())
        assert min(len(set(played.steps["actions"])), 2) == distinct
        assert played.macs == 9_733_120 * played.decisions  # replay computes every exit
