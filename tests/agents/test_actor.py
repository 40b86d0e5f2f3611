"""An exiting actor in the hands of stable-baselines3."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.evaluation import evaluate_policy

from agents.actor import ExitingActor, load_actor
from agents.backbones.nature import nature_network
from agents.envs import AtariVecEnv
from rlexit import checkpoint
from rlexit.checkpoint import CheckpointError
from rlexit.config import HeadConfig
from rlexit.exit_policy import ExitPolicy
from rlexit.runtime import run
from rlexit.session import load_network
from tests.agents.small_run import ENV, make_run, small_session


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(2)
    made = nature_network(6, ("conv1", "conv2"), HeadConfig(), cascade=True)
    with torch.no_grad():
        for exit in range(3):
            for parameter in made.head(exit).parameters():
                if parameter.dim() == 2:
                    parameter.mul_(20)
    return made


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (7, 4, 84, 84), dtype=np.uint8)


@pytest.fixture(scope="module")
def policy(network, frames) -> ExitPolicy:
    """Some rows leave at each exit."""
    network.eval()
    scores = run(network, ExitPolicy("confidence", (2.0, 2.0)), torch.from_numpy(frames)).scores[:, :2]
    return ExitPolicy("confidence", tuple(scores.median(dim=0).values.tolist()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "pong")


def test_one_observation_gives_one_action_and_a_batch_gives_as_many(network, policy, frames):
    actor = ExitingActor(network, policy)
    one, state = actor.predict(frames[0])
    many, _ = actor.predict(frames)
    assert state is None
    assert np.shape(one) == ()
    assert many.shape == (7,)
    assert actor.action_space == spaces.Discrete(6)
    assert int(one) in range(6)


def test_the_likeliest_action_is_taken_where_asked_for(network, policy, frames):
    actor = ExitingActor(network, policy)
    expected = run(network, policy, torch.from_numpy(frames))
    actions, _ = actor.predict(frames, deterministic=True)
    assert actions.tolist() == expected.answers.argmax(dim=1).tolist()
    alone = [int(actor.predict(row, deterministic=True)[0]) for row in frames]
    assert alone == actions.tolist()
    assert len(set(expected.exits.tolist())) > 1


def test_otherwise_actions_are_drawn_from_the_answer(frames):
    flat = nature_network(6)
    with torch.no_grad():
        flat.head(0).get_parameter("module.weight").zero_()
        flat.head(0).get_parameter("module.bias").copy_(torch.tensor([0.7, 0.3, 0, 0, 0, 0]).clamp_min(1e-12).log())
    actor = ExitingActor(flat, ExitPolicy.full(1))
    torch.manual_seed(0)
    drawn = np.concatenate([actor.predict(frames)[0] for _ in range(60)])
    assert set(drawn) == {0, 1}
    assert 0.6 < np.mean(drawn == 0) < 0.8
    torch.manual_seed(0)
    np.testing.assert_array_equal(np.concatenate([actor.predict(frames)[0] for _ in range(60)]), drawn)


def test_what_the_last_call_cost_is_kept(network, policy, frames):
    actor = ExitingActor(network, policy)
    assert actor.last is None
    actor.predict(frames, deterministic=True)
    assert actor.last is not None
    assert torch.equal(actor.last.exits, run(network, policy, torch.from_numpy(frames)).exits)
    assert actor.last.macs.shape == (7,)


def test_the_network_is_put_into_evaluation_mode(network, policy):
    network.train()
    assert not ExitingActor(network, policy).network.training


def test_observations_of_another_shape_are_refused(network, policy):
    with pytest.raises(ValueError, match="Unexpected observation shape"):
        ExitingActor(network, policy).predict(np.zeros((5, 84, 84), dtype=np.uint8))


def test_stable_baselines3_evaluates_it(network):
    env = AtariVecEnv(ENV, 2, training=False, seed=5)
    actor = ExitingActor(network, ExitPolicy.always(0, 3))
    scores, lengths = evaluate_policy(actor, env, n_eval_episodes=2, return_episode_rewards=True)  # type: ignore[arg-type]
    env.close()
    assert lengths == [ENV.max_frames // ENV.frame_skip] * 2
    assert all(math.isfinite(score) for score in scores)
    assert actor.last is not None
    assert set(actor.last.exits.tolist()) == {0}


# ---- from a run folder ----


def test_an_actor_is_loaded_from_the_folder_of_its_method(folder, frames):
    actor = load_actor(folder)
    assert actor.exit_policy.label == "target_macs=0.9"
    session = small_session(folder.parents[1])
    network = load_network(session, "ztw")[""]
    expected = run(network, actor.exit_policy, torch.from_numpy(frames)).answers.argmax(dim=1)
    assert actor.predict(frames, deterministic=True)[0].tolist() == expected.tolist()


def test_an_exit_policy_is_chosen_by_its_label(folder):
    assert load_actor(folder, "target_macs=0.5").exit_policy.label == "target_macs=0.5"
    with pytest.raises(LookupError, match="'target_macs=0.6'.*Did you mean 'target_macs=0"):
        load_actor(folder, "target_macs=0.6")


def test_a_folder_that_belongs_to_no_run_or_no_method_is_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="must be a run folder"):
        load_actor(tmp_path)
    with pytest.raises(FileNotFoundError, match="of a method and seed, such as ztw/s0"):
        load_actor(folder.parents[1])


def test_an_actor_that_is_not_calibrated_names_the_verb(tmp_path):
    folder = make_run(tmp_path / "pong")
    (folder / "exit_policies.json").unlink()
    with pytest.raises(CheckpointError, match="Run `rlexit calibrate` first"):
        load_actor(folder)
    assert checkpoint.exists(folder, "policy")
