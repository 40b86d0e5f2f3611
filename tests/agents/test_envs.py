"""The Atari adapter: ends, scores, seeds, FIRE, and how far it is from stable-baselines3's own wrappers."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields, replace

import numpy as np
import pytest
from ale_py.vector_env import AtariVectorEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from agents.config import EnvConfig
from agents.envs import AtariVecEnv, known_games, protocol, rom_md5

BREAKOUT = EnvConfig("breakout")
QBERT = EnvConfig("qbert")  # rewards of 25 and more, lives, short games


def random_actions(env, steps, seed=0):
    return np.random.default_rng(seed).integers(len(env.action_meanings), size=(steps, env.num_envs))


def play(env, actions):
    """Observations (T, B, 4, 84, 84), rewards (T, B), dones (T, B) and infos of a rollout."""
    steps = [env.step(row) for row in actions]
    observations, rewards, dones, infos = zip(*steps, strict=True)
    return np.stack(observations), np.stack(rewards), np.stack(dones), infos


def started(config, n_envs, *, training=False, seed=3):
    env = AtariVecEnv(config, n_envs, training=training, n_threads=1, seed=seed)
    env.reset()
    return env


@pytest.fixture(scope="module")
def breakout():
    """Two started games for calls that are refused."""
    return started(BREAKOUT, 2)


def test_training_rewards_are_the_signs_of_evaluation_rewards():
    training, evaluation = started(QBERT, 2, training=True), started(QBERT, 2)
    actions = random_actions(training, 60)
    _, signal, _, _ = play(training, actions)
    _, points, _, _ = play(evaluation, actions)
    assert points.max() > 1
    np.testing.assert_array_equal(signal, np.sign(points))
    assert signal.dtype == points.dtype == np.float32


def test_a_lost_life_is_done_in_training_only_and_the_game_goes_on():
    training, evaluation = started(BREAKOUT, 2, training=True), started(BREAKOUT, 2)
    actions = random_actions(training, 120)
    observations, _, dones, infos = play(training, actions)
    same_observations, _, game_ends, _ = play(evaluation, actions)
    np.testing.assert_array_equal(observations, same_observations)
    lost_lives = [(step, game) for step, game in np.argwhere(dones[:-1]) if "episode" not in infos[step][game]]
    assert len(lost_lives) >= 4
    for step, game in lost_lives:
        assert not game_ends[step, game]
        np.testing.assert_array_equal(observations[step + 1, game, :3], observations[step, game, 1:])
        np.testing.assert_array_equal(infos[step][game]["terminal_observation"], observations[step, game])
        assert infos[step][game]["TimeLimit.truncated"] is False


def test_a_game_is_reported_once_at_its_end_with_its_unclipped_score_and_length():
    config = replace(QBERT, fire_after_life_loss=False)
    env = started(config, 2, training=True)
    # Without life_loss_info, the emulator's own `terminated` is the true end.
    judge = AtariVectorEnv(
        "qbert",
        2,
        num_threads=1,
        repeat_action_probability=config.sticky,
        autoreset_mode="SameStep",
        noop_max=0,
        reward_clipping=False,
    )
    judge.reset(seed=3)
    reported, expected, score, length = [], [], np.zeros(2), np.zeros(2, dtype=int)
    for step, row in enumerate(random_actions(env, 450)):
        observations, _, dones, infos = env.step(row)
        judged, points, over, _, facts = judge.step(row)
        np.testing.assert_array_equal(observations, judged)
        score += points
        length += 1
        for game in np.flatnonzero(over):
            expected.append((step, game, score[game], length[game]))
            np.testing.assert_array_equal(infos[game]["terminal_observation"], facts["final_obs"][game])
            assert dones[game]
        for game in np.flatnonzero(["episode" in info for info in infos]):
            reported.append((step, game, infos[game]["episode"]["r"], infos[game]["episode"]["l"]))
        score[over], length[over] = 0, 0
    assert len(expected) >= 2
    assert max(score for _, _, score, _ in expected) > 100
    assert reported == expected


def test_every_end_is_seen_though_a_game_is_shorter_than_the_no_ops_of_the_next():
    env = started(EnvConfig("ms_pacman", max_frames=4, noop_max=30), 4)
    _, _, dones, infos = play(env, random_actions(env, 10))
    assert dones.all()
    assert all(info["episode"]["l"] == 1 for step in infos for info in step)


@pytest.mark.parametrize("training", [True, False])
def test_a_game_cut_at_max_frames_is_truncated_and_keeps_its_last_picture(training):
    config = EnvConfig("pong", sticky=0.0, max_frames=40)
    cut = started(config, 2, training=training)
    uncut = started(replace(config, max_frames=108_000), 2)
    actions = random_actions(cut, 20)
    observations, _, dones, infos = play(cut, actions)
    whole, _, _, _ = play(uncut, actions[:10])
    assert np.flatnonzero(dones[:, 0]).tolist() == [9, 19]
    for info, picture in zip(infos[9], whole[9], strict=True):
        assert info["TimeLimit.truncated"] is True
        assert info["episode"]["l"] == 10
        np.testing.assert_array_equal(info["terminal_observation"][:3], picture[:3])
        # The emulator stops before it has taken in the very last frame.
        assert (info["terminal_observation"][3] != picture[3]).mean() < 0.01
    assert not observations[9, 0, :3].any()  # already the next game: its stack is black but for the newest frame
    assert observations[9, 0, 3].any()


def test_same_seeds_give_same_bytes_whatever_the_threads_and_the_split():
    config = replace(BREAKOUT, sticky=0.25, noop_max=10)

    actions = np.random.default_rng(0).integers(4, size=(40, 3))

    def rollout(sizes, n_threads):
        parts, first = [], 0
        for size in sizes:
            env = AtariVecEnv(config, size, training=True, n_threads=n_threads, seed=10 + first)
            start = env.reset()
            observations, rewards, dones, _ = play(env, actions[:, first : first + size])
            parts.append((np.concatenate([start[None], observations]), rewards, dones))
            first += size
        return [np.concatenate(leaf, axis=1) for leaf in zip(*parts, strict=True)]

    expected = rollout([3], 1)
    for other in (rollout([3], 2), rollout([1, 2], 2)):
        for leaf, expected_leaf in zip(other, expected, strict=True):
            assert leaf.tobytes() == expected_leaf.tobytes()
    assert expected[0][:, 0].tobytes() != expected[0][:, 1].tobytes()


def test_a_seed_holds_for_one_reset():
    env = AtariVecEnv(replace(BREAKOUT, sticky=0.25), 2, training=True, n_threads=1)
    actions = random_actions(env, 40)

    def hashed(seed=None):
        if seed is not None:
            assert env.seed(seed) == [seed, seed + 1]
        env.reset()
        return hashlib.sha256(play(env, actions)[0].tobytes()).hexdigest()

    first, unseeded, again = hashed(3), hashed(), hashed(3)
    assert first == again != unseeded


def test_no_seed_means_one_from_numpys_global_generator(breakout):
    env = breakout
    np.random.seed(0)
    drawn = env.seed()
    np.random.seed(0)
    assert env.seed(None) == drawn == [drawn[0], drawn[0] + 1]


def test_reset_games_leaves_the_other_games_untouched_and_starts_the_chosen_as_a_fresh_environment_would():
    config = EnvConfig("phoenix", sticky=0.25, noop_max=10, max_frames=200)  # scores early
    partly, whole = started(config, 4, training=True), started(config, 4, training=True)
    before, after = random_actions(partly, 20), random_actions(partly, 60, seed=1)
    assert play(partly, before)[1][:, 2].sum() > 0  # a score that must not go on after the reset
    play(whole, before)
    fresh = AtariVecEnv(config, 2, training=True, n_threads=1)

    given = partly.reset_games([2, 0], [900, 17])
    np.testing.assert_array_equal(given, fresh.reset_games([0, 1], np.array([900, 17])))

    observations, rewards, dones, infos = play(partly, after)
    others, other_rewards, other_dones, _ = play(whole, after)
    games, game_rewards, game_dones, game_infos = play(fresh, after[:, [2, 0]])
    for ours, theirs, ours_alone in (
        (observations, others, games),
        (rewards, other_rewards, game_rewards),
        (dones, other_dones, game_dones),
    ):
        assert ours[:, [1, 3]].tobytes() == theirs[:, [1, 3]].tobytes()
        assert ours[:, [2, 0]].tobytes() == ours_alone.tobytes()
    episodes = [[info[game].get("episode") for info in infos] for game in (2, 0)]
    assert episodes == [[info[game].get("episode") for info in game_infos] for game in (0, 1)]
    assert any(episodes[0])


def test_reset_games_of_no_game_does_nothing():
    env, same = started(BREAKOUT, 2), started(BREAKOUT, 2)
    assert env.reset_games([], []).shape == (0, 4, 84, 84)
    actions = random_actions(env, 5)
    assert play(env, actions)[0].tobytes() == play(same, actions)[0].tobytes()


@pytest.mark.parametrize(
    ("games", "seeds", "word"),
    [
        ([0, 0], [1, 2], "games"),
        ([2], [1], "games"),
        ([-1], [1], "games"),
        ([0, 1], [1], "seeds"),
        ([0], [-1], "seeds"),
        ([0], [2**31], "seeds"),
        ([0], [0.5], "seeds"),
        ([0], [[1]], "seeds"),
    ],
)
def test_reset_games_refuses_bad_games_and_seeds(games, seeds, word, breakout):
    with pytest.raises(ValueError, match=f"^`{word}` must be"):
        breakout.reset_games(games, seeds)


@pytest.mark.parametrize("seed", [-1, 2**31 - 1, 2**70])
def test_seeds_beyond_the_emulators_range_are_refused(seed, breakout):
    with pytest.raises(ValueError, match=r"^`seeds` must be 2 integers in \[0, 2\*\*31\)"):
        breakout.seed(seed)


@pytest.mark.parametrize("actions", [[0, 4], [-1, 0], [0], [[0, 0]], [0.0, 1.0]])
def test_actions_that_the_game_does_not_have_are_refused_and_do_no_harm(actions, breakout):
    with pytest.raises(ValueError, match=r"^`actions` must be 2 integers below 4, got .* NOOP, FIRE, RIGHT, LEFT"):
        breakout.step(np.array(actions))
    breakout.step(np.zeros(2, dtype=np.int64))


def test_calls_in_the_wrong_order_are_refused_and_a_reset_drops_a_step_under_way():
    env, fresh = AtariVecEnv(BREAKOUT, 2, training=True, seed=3), started(BREAKOUT, 2, training=True)
    still = np.zeros(2, dtype=np.int64)
    with pytest.raises(RuntimeError, match="got no game"):
        env.step(still)
    with pytest.raises(RuntimeError, match="name all games"):
        env.reset_games([1], [4])
    with pytest.raises(RuntimeError, match="Call `step_async` first"):
        env.step_wait()
    env.reset()
    env.step_async(still)
    with pytest.raises(RuntimeError, match="a step under way"):
        env.step_async(still)
    env.seed(3)
    env.reset()
    actions = random_actions(env, 20)
    assert play(env, actions)[0].tobytes() == play(fresh, actions)[0].tobytes()
    env.close()
    env.close()
    with pytest.raises(RuntimeError, match="got no game"):
        env.step(still)


def sent_actions(env, monkeypatch, steps):
    sent = []
    send = env._games.send

    def spy(actions):
        sent.append(actions.copy())
        send(actions)

    monkeypatch.setattr(env._games, "send", spy)
    still = np.zeros(env.num_envs, dtype=np.int64)
    _, _, dones, infos = play(env, [still] * steps)
    assert not still.any()
    lost_life = np.array(
        [
            [done and "episode" not in info for done, info in zip(*step, strict=True)]
            for step in zip(dones, infos, strict=True)
        ]
    )
    return np.stack(sent), lost_life


def test_fire_is_sent_exactly_once_after_a_lost_life(monkeypatch):
    env = started(replace(BREAKOUT, sticky=0.0), 2, training=True)
    sent, lost_life = sent_actions(env, monkeypatch, 150)
    assert env.action_meanings[1] == "FIRE"
    assert lost_life.sum() >= 6
    assert not sent[0].any()
    np.testing.assert_array_equal(sent[1:] == 1, lost_life[:-1])


def test_evaluation_fires_at_the_same_steps_as_training(monkeypatch):
    config = replace(BREAKOUT, sticky=0.0)
    trained, _ = sent_actions(started(config, 2, training=True), monkeypatch, 100)
    evaluated, _ = sent_actions(started(config, 2), monkeypatch, 100)
    assert trained.any()
    np.testing.assert_array_equal(trained, evaluated)


@pytest.mark.parametrize("config", [replace(BREAKOUT, fire_after_life_loss=False), EnvConfig("ms_pacman")])
def test_fire_is_never_sent_where_the_field_is_off_or_the_game_has_none(config, monkeypatch):
    sent, lost_life = sent_actions(started(replace(config, sticky=0.0), 2, training=True), monkeypatch, 250)
    assert lost_life.any()
    assert not sent.any()


def test_a_partial_reset_cancels_a_pending_fire(monkeypatch):
    env = started(replace(BREAKOUT, sticky=0.0), 2, training=True)
    while not env.step(np.zeros(2, dtype=np.int64))[2].all():
        pass
    assert env.fires_next.tolist() == [True, True]
    env.reset_games([1], [5])
    assert env.fires_next.tolist() == [True, False]
    sent, _ = sent_actions(env, monkeypatch, 1)
    assert sent.tolist() == [[1, 0]]


def test_observations_survive_later_steps():
    env = AtariVecEnv(BREAKOUT, 2, training=True, seed=3)
    kept = [env.reset()]
    for row in random_actions(env, 40):
        observations, _, dones, infos = env.step(row)
        kept.append(np.asarray(observations))
        kept.extend(infos[game]["terminal_observation"] for game in np.flatnonzero(dones))
    kept.append(env.reset_games([1], [8]))
    copies = [observation.copy() for observation in kept]
    play(env, random_actions(env, 20, seed=1))
    assert len(kept) > 43
    for observation, copy in zip(kept, copies, strict=True):
        np.testing.assert_array_equal(observation, copy)


class RandomPolicy:
    """Random actions through the interface that SB3's evaluation calls."""

    def __init__(self, n_actions):
        self.n_actions = n_actions
        self.random = np.random.default_rng(0)

    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        return self.random.integers(self.n_actions, size=len(observation)), None


@pytest.mark.parametrize("training", [True, False])
def test_sb3_evaluates_full_unclipped_games(training):
    config = replace(QBERT, max_frames=480)
    env = AtariVecEnv(config, 2, training=training, n_threads=1, seed=3)
    assert env.env_is_wrapped(Monitor) == [True, True]
    found = evaluate_policy(RandomPolicy(6), env, n_eval_episodes=3, return_episode_rewards=True, warn=True)
    scores, lengths = map(np.asarray, found)

    summed, policy = started(config, 2), RandomPolicy(6)
    games: list[list[float]] = [[], []]
    total = np.zeros(2)
    for _ in range(2 * lengths.max()):
        _, rewards, dones, _ = summed.step(policy.predict(total)[0])
        total += rewards
        for game in np.flatnonzero(dones):
            games[game].append(float(total[game]))
            total[game] = 0
    assert sorted(scores) == sorted(games[0][:1] + games[1][:2])
    assert scores.max() > 20
    assert lengths.max() == 120


def test_the_protocol_block_has_every_field_and_can_be_written_as_json():
    config = EnvConfig("pong", sticky=0.25, fire_after_life_loss=False)
    block = protocol(config)
    for field in fields(EnvConfig):
        assert block[field.name] == getattr(config, field.name)
    assert set(block) - {field.name for field in fields(EnvConfig)} == {"ale_py", "rom_md5", "score"}
    assert len(rom_md5("pong")) == 32
    assert rom_md5("pong") != rom_md5("breakout")
    assert json.loads(json.dumps(block)) == block


@pytest.mark.parametrize(
    ("game", "nearest"),
    [("MsPacman", "ms_pacman"), ("brekout", "breakout"), ("PongNoFrameskip-v4", "pong"), ("ALE/Qbert-v5", "qbert")],
)
def test_an_unknown_game_is_refused_with_the_nearest_names(game, nearest):
    assert nearest in known_games()
    config = EnvConfig(game)
    for call in (lambda: rom_md5(game), lambda: protocol(config), lambda: AtariVecEnv(config, 1, training=True)):
        with pytest.raises(LookupError, match=f"^`env.game` must be one of .* got '{game}'. Nearest: {nearest}"):
            call()


def test_a_game_like_no_other_is_refused_without_a_guess():
    with pytest.raises(LookupError, match=r"got 'zzzzz'\. `rlexit list games` shows them all"):
        rom_md5("zzzzz")


def test_attributes_are_read_from_the_batch_and_single_games_cannot_be_changed(breakout):
    env = breakout
    assert env.get_attr("config") == [BREAKOUT, BREAKOUT]
    assert env.get_attr("num_envs", indices=1) == [2]
    assert env.has_attr("action_meanings")
    assert not env.has_attr("lives")
    with pytest.raises(AttributeError, match="must name an attribute of AtariVecEnv, got 'lives'"):
        env.get_attr("lives")
    with pytest.raises(AttributeError, match="`training` cannot be set"):
        env.set_attr("training", True)
    with pytest.raises(AttributeError, match="got 'seed'"):
        env.env_method("seed", 1)
    assert env.get_images() == [None, None]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("game", "start_offset", "life_offset"), [("breakout", 8, 12), ("ms_pacman", 0, 4)])
def test_rewards_and_dones_equal_sb3s_once_its_wrappers_own_steps_are_taken(game, start_offset, life_offset, training):
    pytest.importorskip("cv2")
    from benchmarks.atari_parity import play as compare

    parity = compare(game, 200, training=training)
    assert parity.steps == 200
    assert parity.reward_differences == parity.done_differences == 0
    assert parity.equal_scores == parity.games
    assert parity.start_offset == start_offset
    assert parity.life_offset == (life_offset if training else 0)  # none seen: no lost life was done


@pytest.mark.parametrize("game", ["breakout", "ms_pacman"])
def test_pictures_equal_sb3s_bit_for_bit_where_both_take_the_maximum_of_greys(game):
    pytest.importorskip("cv2")
    from benchmarks.atari_parity import play as compare

    same_order = compare(game, 200, training=True, ale_grey=True)
    assert same_order.ends >= 1
    assert same_order.different_pixels == same_order.stack_differences == 0
    # SB3 takes the maximum of two frames in colour and turns it to grey; the emulator turns to grey first.
    own_order = compare(game, 200, training=True)
    assert own_order.different_pixels / own_order.pixels < 0.01
    assert (own_order.different_pixels > 0) == (game == "ms_pacman")
