"""PPO of the teacher: what is restored when it goes on, and that nothing healthy is ever lost."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3.common.policies import ActorCriticCnnPolicy

from agents import teacher
from agents.backbones.nature import load_sb3, nature_network
from agents.config import EnvConfig, PPOConfig
from agents.envs import AtariVecEnv, protocol
from agents.teacher import MixedPrecisionCnnPolicy, build
from rlexit import checkpoint
from rlexit.checkpoint import CheckpointError
from rlexit.interrupts import Diverged, Stopped
from rlexit.runlog import read_scalars

ROOT = Path(__file__).resolve().parents[2]
PONG = EnvConfig("pong", max_frames=240)
# Four updates of sixteen steps; games of at most sixty.
TINY = PPOConfig(total_steps=64, n_envs=2, n_steps=8, batch_size=16, n_epochs=1, precision="fp32", anneal=True)
ROLLOUT = 16


def after(asked: int) -> Callable[[], bool]:
    """True from the given question on, counted from 0: before the first update it is asked once, then once each."""
    counter = count()
    return lambda: next(counter) >= asked


def equal(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, torch.Tensor):
        return ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(equal(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, tuple):
        return len(ours) == len(theirs) and all(map(equal, ours, theirs))
    return bool(ours == theirs)


class Spy:
    """Everything that is saved, and everything that is there right after a restore."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.saved: list[tuple[dict[str, torch.Tensor], dict[str, Any]]] = []
        self.restored: list[tuple[dict[str, torch.Tensor], dict[str, Any]]] = []
        state, restore = teacher._state, teacher._restore

        def copied(model):
            tensors, counters = state(model)
            return {key: value.detach().clone() for key, value in tensors.items()}, counters

        def saving(model):
            self.saved.append(copied(model))
            return state(model)

        def restoring(model, tensors, facts):
            restore(model, tensors, facts)
            self.restored.append(copied(model))

        monkeypatch.setattr(teacher, "_state", saving)
        monkeypatch.setattr(teacher, "_restore", restoring)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "teacher"
    teacher.train(folder, PONG, TINY, seed=3)
    return folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A training that was stopped after two of four updates; tests copy it."""
    folder = tmp_path_factory.mktemp("half") / "teacher"
    with pytest.raises(Stopped):
        teacher.train(folder, PONG, TINY, seed=3, stop=after(2))
    return folder


@pytest.fixture
def half(stopped, tmp_path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "teacher"))


# ---- a whole training ----


def test_a_teacher_is_saved_with_everything_that_a_user_of_it_must_know(uninterrupted):
    tensors, facts = checkpoint.load(uninterrupted, teacher.TEACHER)
    assert facts["env"] == asdict(PONG)
    assert facts["ppo"] == asdict(TINY)
    assert facts["protocol"] == protocol(PONG)
    assert (facts["seed"], facts["env_steps"]) == (3, 64)
    assert facts["action_meanings"][:2] == ["NOOP", "FIRE"]
    network = nature_network(6)
    load_sb3(network, tensors)
    assert not any(key.startswith(("pi_features", "vf_features")) for key in tensors)


def test_the_saved_weights_answer_as_the_policy_did(tmp_path, monkeypatch):
    models = []
    made = build
    monkeypatch.setattr(teacher, "build", lambda *given: models.append(made(*given)) or models[-1])
    teacher.train(tmp_path, PONG, replace(TINY, total_steps=16), seed=0)
    network = nature_network(6).eval()
    load_sb3(network, checkpoint.load(tmp_path, teacher.TEACHER)[0])
    frames = torch.randint(0, 256, (5, 4, 84, 84), dtype=torch.uint8)
    with torch.no_grad():
        logits = models[0].policy.get_distribution(frames).distribution.logits
    assert torch.allclose(network(frames).answers[:, 0], logits, atol=1e-5)


def test_the_same_seed_gives_the_same_teacher_and_another_one_another(uninterrupted, tmp_path):
    for seed in (3, 4):
        teacher.train(tmp_path / str(seed), PONG, TINY, seed=seed)
    hashes = [checkpoint.weights_hash(tmp_path / str(seed), teacher.TEACHER) for seed in (3, 4)]
    assert hashes[0] == checkpoint.weights_hash(uninterrupted, teacher.TEACHER) != hashes[1]


def test_training_changes_the_weights_and_tells_of_its_progress(tmp_path):
    told: list[int] = []
    teacher.train(tmp_path, PONG, TINY, seed=3, progress=lambda step, facts: told.append(step))
    assert told == [16, 32, 48, 64]
    env = AtariVecEnv(PONG, 2, training=True)
    fresh = build(env, TINY, 3)
    env.close()
    trained = checkpoint.load(tmp_path, teacher.TEACHER)[0]
    assert all(not torch.equal(value, trained[key]) for key, value in teacher.weights(fresh).items() if "weight" in key)


def test_a_finished_training_that_is_started_again_only_saves_its_teacher(uninterrupted, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(uninterrupted, tmp_path / "teacher"))
    (folder / "teacher.json").unlink()
    monkeypatch.setattr(AtariVecEnv, "step_async", None)
    teacher.train(folder, PONG, TINY, seed=3)
    assert (folder / "teacher.json").read_bytes() == (uninterrupted / "teacher.json").read_bytes()


# ---- stopped and resumed ----


def test_a_stop_saves_between_two_updates_and_leaves_no_teacher(half):
    facts = checkpoint.load_facts(half, teacher.STATE)
    assert facts["counters"]["num_timesteps"] == 2 * ROLLOUT
    assert facts["counters"]["n_updates"] == 2
    assert not checkpoint.exists(half, teacher.TEACHER)


def test_weights_moments_counters_and_random_states_are_restored_exactly(tmp_path, monkeypatch):
    spy = Spy(monkeypatch)
    with pytest.raises(Stopped):
        teacher.train(tmp_path, PONG, TINY, seed=3, stop=after(2))
    for scramble in (torch.manual_seed, np.random.seed, random.seed):
        scramble(99)
    with pytest.raises(Stopped):
        teacher.train(tmp_path, PONG, TINY, seed=3, stop=after(0))
    (saved, again), (restored,) = spy.saved, spy.restored
    for kept, found in zip(saved, restored, strict=True):
        assert [key for key in kept if not equal(kept[key], found.get(key))] == []
    # Nothing is drawn between the restore and the first update either.
    assert [k for k in saved[0] if not equal(saved[0][k], again[0].get(k))] == []
    assert [k for k in saved[1] if not equal(saved[1][k], again[1].get(k))] == []
    tensors, counters = saved
    assert {key.split(".")[0] for key in tensors} == {"policy", "optimizer", "random"}
    assert {key.rsplit(".", 1)[-1] for key in tensors if key.startswith("optimizer")} == {
        "step",
        "exp_avg",
        "exp_avg_sq",
    }
    assert float(tensors["optimizer.0.step"]) == 2
    assert set(counters) == {"num_timesteps", "n_updates", "episodes", "numpy", "python"}


def test_random_numbers_go_on_where_they_were(half, monkeypatch):
    drawn = []
    restore = teacher._restore

    def watched(model, tensors, facts):
        restore(model, tensors, facts)
        drawn.append((random.random(), float(np.random.rand()), float(torch.rand(()))))

    monkeypatch.setattr(teacher, "_restore", watched)
    for scramble in (7, 8):
        random.seed(scramble)
        with pytest.raises(Stopped):
            teacher.train(Path(shutil.copytree(half, half.parent / str(scramble))), PONG, TINY, seed=3, stop=after(0))
    assert drawn[0] == drawn[1]
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    assert drawn[0] != (random.random(), float(np.random.rand()), float(torch.rand(())))


def test_schedules_go_on_as_if_nothing_had_happened(uninterrupted, half):
    teacher.train(half, PONG, TINY, seed=3)
    whole, resumed = (
        {(step, tag): value for step, tag, value in read_scalars(folder)} for folder in (uninterrupted, half)
    )
    for tag in ("train/learning_rate", "train/clip_range"):
        ours = {step: value for (step, name), value in resumed.items() if name == tag}
        assert ours
        assert ours == {step: whole[step, tag] for step in ours}
    # What the update after the first 48 of 64 steps was made with.
    assert resumed[64, "train/learning_rate"] == pytest.approx(TINY.learning_rate * (1 - 48 / 64))
    assert checkpoint.load_facts(half, teacher.TEACHER)["env_steps"] == 64


def test_curves_have_no_point_twice_after_a_resume(half):
    teacher.train(half, PONG, TINY, seed=3)
    points = Counter((step, tag) for step, tag, _ in read_scalars(half))
    assert max(points.values()) == 1
    assert {step for step, _ in points} == {16, 32, 48, 64}


def test_curves_have_no_point_twice_after_a_kill_behind_the_last_checkpoint(half):
    def killed(step: int, facts: dict[str, float]) -> None:
        if step == 64:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        teacher.train(half, PONG, TINY, seed=3, progress=killed)
    assert checkpoint.load_facts(half, teacher.STATE)["counters"]["num_timesteps"] == 32
    assert max(step for step, _, _ in read_scalars(half)) == 48
    teacher.train(half, PONG, TINY, seed=3)
    points = Counter((step, tag) for step, tag, _ in read_scalars(half))
    assert max(points.values()) == 1
    assert {step for step, _ in points} == {16, 32, 48, 64}


def test_what_follows_a_resume_is_always_the_same(half):
    folders = [half, Path(shutil.copytree(half, half.parent / "again"))]
    for folder in folders:
        teacher.train(folder, PONG, TINY, seed=3)
    first, second = (checkpoint.weights_hash(folder, teacher.TEACHER) for folder in folders)
    assert first == second


def test_games_start_afresh_from_other_seeds_at_a_resume(half, tmp_path, monkeypatch):
    seeds: list[int | None] = []
    sound = AtariVecEnv.seed
    monkeypatch.setattr(AtariVecEnv, "seed", lambda env, seed=None: seeds.append(seed) or sound(env, seed))
    used = []
    for folder in (tmp_path / "fresh", half):
        seeds.clear()
        with pytest.raises(Stopped):
            teacher.train(folder, PONG, TINY, seed=3, stop=after(0))
        used.append(seeds[-1])
    assert used[0] != used[1]
    assert None not in used


def test_checkpoints_come_by_the_clock(tmp_path, monkeypatch):
    spy = Spy(monkeypatch)
    teacher.train(tmp_path / "often", PONG, replace(TINY, checkpoint_seconds=1e-9), seed=3)
    assert [counters["num_timesteps"] for _, counters in spy.saved] == [0, 16, 32, 48, 64, 64]
    spy.saved.clear()
    teacher.train(tmp_path / "once", PONG, TINY, seed=3)
    assert [counters["num_timesteps"] for _, counters in spy.saved] == [64]


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_a_cut_state_is_refused_by_its_name_and_left_as_it_is(half, suffix):
    (path,) = half.glob(f"state*.{suffix}")
    data = path.read_bytes()[:-3]
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=path.name):
        teacher.train(half, PONG, TINY, seed=3)
    assert path.read_bytes() == data


# ---- NaN ----


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("last", [False, True])
def test_a_loss_that_is_nan_ends_the_training_and_the_last_state_is_healthy(tmp_path, monkeypatch, last):
    config = replace(TINY, checkpoint_seconds=1e-9)
    spoilt_from = 3 * 8 if last else 2 * 8
    calls = count()
    sound = AtariVecEnv.step_wait

    def step_wait(env):
        observations, rewards, dones, infos = sound(env)
        return observations, rewards * np.nan if next(calls) >= spoilt_from else rewards, dones, infos

    monkeypatch.setattr(AtariVecEnv, "step_wait", step_wait)
    with pytest.raises(Diverged, match="`train/loss` became nan at env step .* lower `train.learning_rate`") as told:
        teacher.train(tmp_path, PONG, config, seed=3)
    assert f"env step {64 if last else 48}" in str(told.value)
    tensors, facts = checkpoint.load(tmp_path, teacher.STATE)
    assert facts["counters"]["num_timesteps"] == (48 if last else 32)
    assert all(bool(torch.isfinite(value).all()) for value in tensors.values() if value.is_floating_point())
    assert not checkpoint.exists(tmp_path, teacher.TEACHER)
    monkeypatch.setattr(AtariVecEnv, "step_wait", sound)
    teacher.train(tmp_path, PONG, config, seed=3)
    assert checkpoint.exists(tmp_path, teacher.TEACHER)


# ---- precision ----


def test_features_in_half_precision_are_near_those_in_full_and_everything_else_is_full():
    env = AtariVecEnv(PONG, TINY.n_envs, training=True)
    half_model = build(env, replace(TINY, precision="bf16"), 0)
    full_model = build(env, TINY, 0)
    env.close()
    assert isinstance(half_model.policy, MixedPrecisionCnnPolicy)
    assert type(full_model.policy) is ActorCriticCnnPolicy
    frames = torch.randint(0, 256, (6, 4, 84, 84), dtype=torch.uint8)
    with torch.no_grad():
        ours, theirs = (model.policy.extract_features(frames) for model in (half_model, full_model))
        logits = half_model.policy.get_distribution(frames).distribution.logits
    assert ours.dtype == theirs.dtype == logits.dtype == torch.float32
    assert ours.shape == (6, 512)
    assert float((ours - theirs).norm() / theirs.norm()) < 0.03
    assert not torch.equal(ours, theirs)
    assert all(parameter.dtype == torch.float32 for parameter in half_model.policy.parameters())


def half_precision() -> MixedPrecisionCnnPolicy:
    env = AtariVecEnv(PONG, TINY.n_envs, training=True)
    try:
        return build(env, replace(TINY, precision="bf16"), 0).policy  # type: ignore[return-value]
    finally:
        env.close()


def acted(policy: MixedPrecisionCnnPolicy, frames: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return policy.extract_features(frames)


def test_acting_and_updating_see_the_same_features_to_the_bit():
    policy = half_precision()
    frames = torch.randint(0, 256, (5, 4, 84, 84), dtype=torch.uint8)
    assert torch.equal(acted(policy, frames), policy.extract_features(frames).detach())


def test_acting_follows_the_weights_however_they_change():
    policy = half_precision()
    frames = torch.randint(0, 256, (5, 4, 84, 84), dtype=torch.uint8)
    first = acted(policy, frames)
    assert acted(policy, frames) is not first
    policy.extract_features(frames).square().mean().backward()
    policy.optimizer.step()
    stepped = acted(policy, frames)
    assert not torch.equal(stepped, first)
    assert torch.equal(stepped, policy.extract_features(frames).detach())
    policy.load_state_dict(half_precision().state_dict())
    assert torch.equal(acted(policy, frames), first)


def test_the_copy_for_acting_is_no_part_of_the_policy():
    policy = half_precision()
    names = set(policy.state_dict())
    acted(policy, torch.zeros((1, 4, 84, 84), dtype=torch.uint8))
    assert set(policy.state_dict()) == names
    assert all(parameter.dtype == torch.float32 for parameter in policy.parameters())


@pytest.mark.parametrize("anneal", [False, True])
def test_rates_fall_only_where_they_are_annealed(anneal):
    env = AtariVecEnv(PONG, TINY.n_envs, training=True)
    model = build(env, replace(TINY, anneal=anneal), 0)
    env.close()
    for schedule, start in ((model.lr_schedule, TINY.learning_rate), (model.clip_range, TINY.clip_range)):
        ends = [schedule(1.0), schedule(0.25)]  # type: ignore[operator]
        assert ends == pytest.approx([start, start * (0.25 if anneal else 1.0)])


# ---- a signal ----


def test_sigterm_ends_the_program_with_143_the_way_on_and_a_state_that_loads(tmp_path):
    words = ["train", "pong", "--out", str(tmp_path), "--threads", "1", "--train.checkpoint_seconds", "0.001"]
    for name in ("n_envs", "n_steps", "batch_size", "n_epochs"):
        words += [f"--train.{name}", str(getattr(TINY, name))]
    child = subprocess.Popen(
        [sys.executable, "-m", "rlexit", *words], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    folder = tmp_path / "pong" / "teacher"
    try:
        began = time.monotonic()
        while not checkpoint.exists(folder, teacher.STATE) and child.poll() is None and time.monotonic() - began < 240:
            time.sleep(0.1)
        child.send_signal(signal.SIGTERM)
        out, err = child.communicate(timeout=120)
    finally:
        child.kill()
    assert (child.returncode, err) == (143, ""), out
    assert "Go on with the same command:" in out
    assert f"  rlexit {' '.join(words)}" in out
    tensors, facts = checkpoint.load(folder, teacher.STATE)
    assert facts["counters"]["num_timesteps"] % ROLLOUT == 0
    assert "random.torch" in tensors
    assert not checkpoint.exists(folder, teacher.TEACHER)
    assert not list(tmp_path.rglob("*.tmp"))
