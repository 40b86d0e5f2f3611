"""The film of an episode: the very game that is evaluated, pictures that say what happened, files that play."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops
from PIL.ImageColor import getrgb
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agents import panel, rollouts, video
from agents.backbones.nature import nature_network
from agents.config import AgentsConfig, EnvConfig
from agents.domain import AgentsDomain, episode_seed
from agents.envs import AtariVecEnv
from agents.panel import Panel, Step
from rlexit import checkpoint, verbs
from rlexit import session as session_module
from rlexit.config import METHODS, EvaluateConfig, HeadConfig
from rlexit.costs import cost_table
from rlexit.exit_policy import ExitPolicy
from rlexit.gates.reuse import ReuseGate
from rlexit.interrupts import StopFlag
from rlexit.plots import REUSED, exit_colours

PACMAN = EnvConfig("ms_pacman")
BREAKOUT = EnvConfig("breakout")
SEED = 5
STEPS = 24


def actor(actions=9):
    torch.manual_seed(0)
    return nature_network(actions, ["conv1", "conv2"], HeadConfig(), cascade=True).eval()


def action_names(config):
    env = AtariVecEnv(config, 1, training=False)
    names = env.action_meanings
    env.close()
    return names


def choosy_policy(network, config=PACMAN):
    """Thresholds that about half of the rows pass at each exit."""
    steps = islice(video.play(config, network, ExitPolicy("confidence", (2.0, 2.0)), SEED, 1, sampled=True), 40)
    middles = np.median(np.stack([step.scores for step in steps])[:, :2], axis=0)
    return ExitPolicy("confidence", tuple(middles.tolist()), "half")


@pytest.fixture(scope="module")
def network():
    return actor()


@pytest.fixture(scope="module")
def policy(network):
    return choosy_policy(network)


def filmed(network, policy, seed=SEED, **options):
    full = cost_table(network, torch.zeros((1, 4, 84, 84), dtype=torch.uint8)).full
    return video.film(PACMAN, network, policy, seed, action_names(PACMAN), full, STEPS, "half", sampled=True, **options)


@pytest.fixture(scope="module")
def film(network, policy):
    return filmed(network, policy)


def toy_step(exit=0, scores=(0.5, math.nan, math.nan), reward=0.0, **facts):
    screen = np.full((210, 160, 3), (200, 72, 72), dtype=np.uint8)
    step = Step(screen, exit, np.array(scores, dtype=np.float32), 1, 0.5, False, reward, 0.25 * (exit + 1))
    return replace(step, **facts)


def toy_panel(*steps, thresholds=(0.4, 0.6), title=""):
    names = ("conv1", "conv2", "full")
    return Panel(steps, ExitPolicy("confidence", thresholds), names, ["NOOP", "UPRIGHTFIRE"], "Pong", title)


def opened(path) -> Any:
    return Image.open(path)


def is_empty(picture, box):
    return set(np.asarray(picture.crop(box)).reshape(-1, 3).flatten().tolist()) == set(getrgb(panel.GROUND))


# ---- the game ----


@pytest.mark.parametrize("config", [PACMAN, BREAKOUT], ids=lambda config: config.game)
def test_the_picture_and_the_actor_see_the_same_game_despite_sticky_actions(config):
    assert config.sticky == 0.1
    acting, shown, other = (AtariVecEnv(config, 1, training=False, picture=picture) for picture in (False, True, False))
    for env, seed in ((acting, SEED), (shown, SEED), (other, SEED + 1)):
        env.reset_games([0], [seed])
    actions = np.random.default_rng(0)
    picture: Any
    seen: Any
    points, likeness, differs, ended = [], [], False, False
    while not ended:
        action = np.array([actions.integers(len(acting.action_meanings))])
        seen, rewards, ends, _ = acting.step(action)
        picture, same_rewards, same_ends, _ = shown.step(action)
        assert (float(same_rewards[0]), bool(same_ends[0])) == (float(rewards[0]), bool(ends[0]))
        grey = Image.fromarray(picture[0, 0]).convert("L").resize((84, 84), Image.Resampling.BOX)
        likeness.append(np.corrcoef(np.asarray(grey).ravel(), seen[0, -1].ravel())[0, 1])
        differs = differs or bool((other.step(action)[0] != seen).any())
        points.append(float(rewards[0]))
        ended = bool(ends[0])
    assert picture.shape == (1, 1, 210, 160, 3)
    assert sum(points) > 0
    assert differs  # the games are random: equal rewards are no matter of course
    assert np.median(likeness) > 0.95


@pytest.mark.parametrize("sampled", [False, True])
def test_a_film_is_of_the_game_that_an_evaluation_plays(network, policy, sampled):
    config = replace(PACMAN, max_frames=240)
    job = rollouts.Job(0, 0, SEED)
    decide = rollouts.exiting(network, [policy])
    (played,) = rollouts.play(config, decide, [job], 3, n_envs=1, sampled=sampled, record=1)
    steps = list(video.play(config, network, policy, SEED, 1, sampled))
    assert 50 <= len(steps) == played.decisions
    assert [step.exit for step in steps] == played.steps["exits"]
    assert [step.action for step in steps] == played.steps["actions"]
    assert [step.reward for step in steps] == played.steps["rewards"]
    assert sum(step.relative_macs for step in steps) == played.macs


def test_a_picture_of_another_game_is_refused(network, policy, monkeypatch):
    start = AtariVecEnv.reset_games

    def elsewhere(env, games, seeds):
        return start(env, games, [seeds[0] + (env.observation_space.shape[0] == 1)])

    monkeypatch.setattr(AtariVecEnv, "reset_games", elsewhere)
    with pytest.raises(RuntimeError, match="`picture` must show the game that is played"):
        list(video.play(PACMAN, network, policy, SEED, 1, sampled=True))


def test_fire_after_a_lost_life_is_told_apart_from_the_actors_choice():
    network, policy = actor(4), ExitPolicy.full(3)
    for pressed in (True, False):
        config = replace(BREAKOUT, fire_after_life_loss=pressed)
        forced = [step.forced for step in islice(video.play(config, network, policy, SEED, 1, sampled=True), 100)]
        assert any(forced) is pressed
        assert not all(forced)


def test_a_film_needs_at_least_one_step(network, policy):
    with pytest.raises(ValueError, match="`steps` must be at least 1, got 0"):
        video.film(PACMAN, network, policy, SEED, action_names(PACMAN), 1, 0)


# ---- the film ----


def test_a_film_has_one_frame_and_one_entry_of_everything_per_step(film):
    assert [frame.size for frame in film.frames] == [panel.SIZE] * STEPS
    for values in (film.exits, film.actions, film.rewards, film.relative_macs):
        assert values.shape == (STEPS,)
    assert film.confidences.shape == (STEPS, 3)
    assert set(film.exits.tolist()) == {0, 1, 2}
    np.testing.assert_array_equal(np.isnan(film.confidences[:, 1]), film.exits == 0)


def test_films_of_one_seed_are_equal_and_of_another_are_not(film, network, policy):
    again, other = filmed(network, policy), filmed(network, policy, seed=SEED + 1)
    for one, same in zip(film.frames, again.frames, strict=True):
        assert one.getpalette() == same.getpalette()
        assert one.tobytes() == same.tobytes()
    for name in ("exits", "confidences", "actions", "rewards", "relative_macs"):
        np.testing.assert_array_equal(getattr(film, name), getattr(again, name))
    assert film.actions.tolist() != other.actions.tolist()


def test_frames_show_the_exit_that_was_taken_in_its_colour(film, network, policy):
    board = toy_panel(toy_step())
    for index, frame in enumerate(film.frames):
        picture = frame.convert("RGB")
        for exit, colour in enumerate(panel.panel_colours(3)):
            _, top, right, bottom = board.badge(exit)
            lit = picture.getpixel((right - 4, (top + bottom) // 2)) == getrgb(colour)
            assert lit == (exit == film.exits[index])
        for age in range(index + 1):
            left, top, _, _ = board.cell(age)
            assert picture.getpixel((left + 1, top + 5)) == getrgb(panel.panel_colours(3)[film.exits[index - age]])


def test_early_exits_have_the_colours_of_the_plots():
    assert panel.panel_colours(4)[:-1] == exit_colours(4)[:-1]


def test_the_palette_of_a_film_keeps_the_games_colours(film, network, policy):
    steps = islice(video.play(PACMAN, network, policy, SEED, 1, sampled=True), STEPS)
    left, top = panel.MARGIN, panel.SCREEN_TOP
    for frame, step in zip(film.frames, steps, strict=True):
        shown = frame.convert("RGB").crop((left, top, left + panel.SCREEN_WIDTH, top + panel.SCREEN_HEIGHT))
        wanted = Image.fromarray(step.screen).resize(shown.size, Image.Resampling.NEAREST)
        difference = np.asarray(ImageChops.difference(shown, wanted))
        assert difference.max() <= video.COLOUR_DISTANCE


# ---- the picture ----


def test_a_confidence_that_was_not_computed_is_not_drawn():
    board = toy_panel(toy_step(0, (0.5, math.nan, math.nan)), toy_step(1, (0.3, 0.7, math.nan)))
    for index, computed in ((0, [True, False]), (1, [True, True])):
        picture = board.draw(index)
        for exit, there in enumerate(computed):
            left, top, right, bottom = board.bar(exit)
            filled = picture.getpixel((left + 2, (top + bottom) // 2)) != getrgb(panel.TRACK)
            assert filled is there
            assert is_empty(picture, (right + 1, top, panel.RIGHT + 1, bottom)) is not there


def test_a_bar_is_as_long_as_the_score_and_the_tick_stands_at_the_threshold():
    board = toy_panel(toy_step(1, (0.25, 0.75, math.nan)), thresholds=(0.5, 0.6))
    picture = board.draw(0)
    for exit, (score, threshold) in enumerate(((0.25, 0.5), (0.75, 0.6))):
        left, top, right, bottom = board.bar(exit)
        row = [picture.getpixel((column, bottom - 1)) for column in range(left, right + 1)]
        filled = [colour not in (getrgb(panel.TRACK), getrgb(panel.INK)) for colour in row]
        length = 1 + max(place for place, is_filled in enumerate(filled) if is_filled)
        assert length == pytest.approx(score * (right - left), abs=2)
        above = [picture.getpixel((column, top - 3)) == getrgb(panel.INK) for column in range(left, right + 1)]
        assert np.flatnonzero(above).mean() == pytest.approx(threshold * (right - left), abs=2)


def test_a_closed_exit_has_neither_bar_nor_tick():
    board = toy_panel(toy_step(2, (math.nan, math.nan, math.nan)), thresholds=(math.inf, 0.6))
    picture = board.draw(0)
    closed, open_ = (picture.crop(board.bar(exit)).convert("RGB") for exit in (0, 1))
    assert getrgb(panel.TRACK) not in [colour for _, colour in closed.getcolors(10_000)]
    assert getrgb(panel.TRACK) in [colour for _, colour in open_.getcolors(10_000)]
    assert getrgb(panel.INK) not in [colour for _, colour in closed.getcolors(10_000)]


def test_rewards_stand_over_their_steps_and_their_numbers_never_touch():
    rewards = [0, 1, 1, -1, *[0] * 12, 1, 0]
    board = toy_panel(*(toy_step(reward=float(reward)) for reward in rewards))
    picture = board.draw(len(rewards) - 1)
    for index, reward in enumerate(rewards):
        left, top, _, _ = board.cell(len(rewards) - 1 - index)
        wanted = panel.GROUND if reward == 0 else panel.GAIN if reward > 0 else panel.LOSS
        assert picture.getpixel((left + 1, top - 6)) == getrgb(wanted)
    assert panel._spaced(rewards) == {1, 16}
    wide = sorted(panel._spaced([1000.0] * 60))
    assert all((late - early) * panel.CELL > panel._width("+1,000", 12) for early, late in pairwise(wide))


def test_the_strip_ends_with_the_newest_step_below_the_panels_edge_and_fills_the_width():
    board = toy_panel(toy_step())
    assert panel.RIGHT - panel.CELL <= board.cell(0)[2] <= panel.RIGHT
    assert panel.MARGIN <= board.cell(panel.CELLS - 1)[0] < panel.MARGIN + panel.CELL


def test_a_number_of_a_reward_does_not_come_and_go_while_it_moves():
    rewards = [1.0] * 400
    told = panel._spaced(rewards)
    assert {index for index in told if index < 200} == panel._spaced(rewards[:200])
    assert 20 < len(told) < 200


def test_long_words_are_cut_before_they_touch_their_neighbours():
    steps = [toy_step(reward=123_456.0)] * 3
    policy, names = ExitPolicy("confidence", (0.4, 0.6)), ["a_very_long_unit_name"] * 3
    long = Panel(steps, policy, names, ["X", "Y"], "G" * 90, "t" * 90)
    picture = long.draw(2)
    score, count = panel._width("score 370,368", 20), panel._width("step 3", 14)
    for right, told in ((panel.MARGIN + panel.SCREEN_WIDTH, score), (panel.RIGHT, count)):
        assert is_empty(picture, (right - told - 10, 0, right - told - 2, panel.SCREEN_TOP - 1))
    for exit in (1, 2):
        _, top, right, bottom = long.badge(exit)
        assert is_empty(picture, (right - 3, top + 5, right, bottom - 5))


@pytest.mark.parametrize("exits", [1, 2, 3, 5, 9])
def test_any_number_of_exits_fits_into_the_ladder(exits):
    policy = ExitPolicy("confidence", (0.5,) * (exits - 1))
    step = toy_step(exits - 1, (0.25,) * exits)
    board = Panel([step], policy, [f"unit{exit}" for exit in range(exits)], ["A", "B"], "Pong")
    boxes = [board.badge(exit) for exit in range(exits)]
    for (_, _, _, above), (_, below, _, _) in pairwise(boxes):
        assert above < below
    assert boxes[-1][3] < panel.COMPUTE_TOP - 13
    assert board.draw(0).size == panel.SIZE


# ---- the files ----


def test_files_are_animations_of_all_frames_at_the_games_speed(film, tmp_path):
    webp, gif = film.save(tmp_path / "new" / "ep0.5")
    assert [path.name for path in (webp, gif)] == ["ep0.5.webp", "ep0.5.gif"]
    for path in (webp, gif):
        assert path.stat().st_size < video.MAX_BYTES
        with opened(path) as animation:
            assert animation.n_frames == STEPS
            assert animation.size == panel.SIZE
            assert animation.info["loop"] == 0
            durations = []
            for index, frame in enumerate(film.frames):
                animation.seek(index)
                animation.load()
                durations.append(animation.info["duration"])
                assert animation.convert("RGB").tobytes() == frame.convert("RGB").tobytes()
    palette = bytes(film.frames[0].getpalette(None) or ())
    assert gif.read_bytes().count(palette) == 1  # once for all frames
    assert durations == [*[video.FRAME_MS] * (STEPS - 1), video.LAST_FRAME_MS]


def test_a_file_that_is_too_large_is_made_smaller(film, tmp_path):
    whole = film.save(tmp_path / "whole")
    limit = min(path.stat().st_size for path in whole) - 1
    for path in film.save(tmp_path / "small", max_bytes=limit):
        assert path.stat().st_size <= limit
        with opened(path) as animation:
            assert animation.n_frames == STEPS
            assert animation.width < panel.SIZE[0]
            assert animation.width / animation.height == pytest.approx(panel.SIZE[0] / panel.SIZE[1], rel=0.01)


def test_a_film_of_one_step_is_a_picture(network, policy, tmp_path):
    taken = video.film(PACMAN, network, policy, SEED, action_names(PACMAN), 1, 1)
    for path in taken.save(tmp_path / "one"):
        with opened(path) as picture:
            assert picture.size == panel.SIZE


# ---- the verb ----


@pytest.fixture
def session(tmp_path):
    """A run with a random teacher and random exits, where nothing is calibrated yet."""
    config = AgentsConfig(env=PACMAN, evaluate=EvaluateConfig(actions="sampled"))
    domain: Any = AgentsDomain(config)
    session = verbs.Session(domain, tmp_path / "run", 0, Console(file=io.StringIO()), StopFlag())
    network = actor()
    state = network.state_dict()
    names = {
        "features_extractor.cnn.0": "units.conv1.module.0",
        "features_extractor.cnn.2": "units.conv2.module.0",
        "features_extractor.cnn.4": "units.conv3.module.0",
        "features_extractor.linear.0": "units.fc.module.1",
        "action_net": "heads.fc.module",
    }
    kinds = ("weight", "bias")
    tensors = {f"{theirs}.{kind}": state[f"{ours}.{kind}"] for theirs, ours in names.items() for kind in kinds}
    checkpoint.save(session.teacher, "teacher", tensors, {"env": domain.protocol()})
    exits = domain.network(session.teacher, METHODS["ztw"])
    learnt = {f"/{key}": value for key, value in session_module.learnt(session, exits, "ztw").items()}
    checkpoint.save(session.method("ztw"), "policy", learnt, {})
    return session


def calibrated(session, *policies):
    facts = {"policies": [policy.to_json() for policy in policies], "missed": []}
    checkpoint.save(session.method("ztw"), "exit_policies", {}, facts)


def test_the_verb_writes_both_files_and_shows_the_gif_on_tensorboard(session):
    calibrated(session, ExitPolicy.always(1, 3), ExitPolicy.full(3))
    path = verbs.video(session, "ztw", 2, None, 5)
    folder = session.method("ztw") / "video"
    assert path == folder / "ep2.webp"
    with opened(path) as animation:
        assert animation.n_frames == 5
        picture = animation.convert("RGB")
    _, top, right, bottom = toy_panel(toy_step()).badge(1)
    assert picture.getpixel((right - 4, (top + bottom) // 2)) == getrgb(exit_colours(3)[1])
    board = EventAccumulator(str(folder / "ep2" / "tb"))
    board.Reload()
    (shown,) = board.Images("eval/episode")
    assert (shown.step, shown.width, shown.height) == (2, *panel.SIZE)
    assert shown.encoded_image_string == (folder / "ep2.gif").read_bytes()


def test_a_domain_films_the_test_episode_under_the_policy_asked_for(session, monkeypatch):
    calibrated(session, ExitPolicy.always(1, 3), ExitPolicy.full(3))
    asked = []

    class Taken:
        def save(self, path):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("P", (2, 2)).save(path.with_suffix(".gif"))
            return [path.with_suffix(".webp"), path.with_suffix(".gif")]

    def take(*args, **options):
        asked.append((args, options))
        return Taken()

    monkeypatch.setattr(video, "film", take)
    verbs.video(session, "ztw", 3, "full", 7)
    ((config, network, policy, seed, names, full, steps, title), options) = asked[0]
    assert (config, seed, steps, names) == (PACMAN, episode_seed("test", 3), 7, action_names(PACMAN))
    assert (policy.label, options) == ("full", {"sampled": True})
    assert title == "full, episode 3"
    assert full == cost_table(nature_network(9), session.domain.example()).full
    assert not network.training


def test_without_calibrated_policies_the_verb_names_the_one_that_makes_them(session):
    with pytest.raises(checkpoint.CheckpointError, match="Run `rlexit calibrate`"):
        verbs.video(session, "ztw", 0, None, 5)
    calibrated(session)
    with pytest.raises(checkpoint.CheckpointError, match="Run `rlexit calibrate` with other targets"):
        verbs.video(session, "ztw", 0, None, 5)


def test_an_unknown_label_is_answered_with_the_nearest_one(session):
    calibrated(session, replace(ExitPolicy.full(3), label="target_macs=0.5"))
    with pytest.raises(LookupError, match=r"Did you mean 'target_macs=0\.5'\?"):
        verbs.video(session, "ztw", 0, "target_mac=0.5", 5)


def test_repeated_steps_are_drawn_as_such():
    network = actor()
    torch.manual_seed(1)
    network.reuse = ReuseGate(9, 2, bias=-9.0)
    steps = list(islice(video.play(PACMAN, network.eval(), ExitPolicy.always(0, 3), SEED, 1), 6))
    assert [step.exit for step in steps] == [0, 3, 3, 0, 3, 3]
    assert [step.action for step in steps[:3]] == [steps[0].action] * 3
    shown = Panel(steps, ExitPolicy.always(0, 3), ("conv1", "conv2", "full"), action_names(PACMAN), "Pacman")
    computed, repeated = shown.draw(3), shown.draw(5)

    def colour_at(picture, box):
        left, _, right, bottom = box
        return "#{:02x}{:02x}{:02x}".format(*picture.getpixel(((left + right) // 2, bottom - 2)))

    assert colour_at(repeated, shown.cell(0)) == REUSED
    assert colour_at(repeated, shown.cell(2)) == shown.colours[0] == colour_at(computed, shown.cell(0))
    assert repeated.getpixel((shown.badge(0)[0] + 2, shown.badge(0)[3] - 12)) != getrgb(shown.colours[0])
