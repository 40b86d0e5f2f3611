"""Teachers that come with rlexit: whole, named, and what they say of themselves."""

from __future__ import annotations

import math

import pytest

from agents import zoo
from agents.backbones.nature import load_sb3, nature_network
from agents.config import EnvConfig, PPOConfig
from agents.envs import protocol
from rlexit import checkpoint
from rlexit.checkpoint import CheckpointError

SHIPPED = zoo.shipped()
MAX_BYTES = 10_000_000  # a wheel should stay small


def test_a_pong_teacher_is_shipped_that_plays_well():
    assert "pong" in SHIPPED
    played = checkpoint.load_facts(zoo.folder("pong"), zoo.TEACHER)["evaluation"]
    assert played["games"] >= 30
    assert played["mean"] >= 17


@pytest.mark.parametrize("game", SHIPPED)
def test_a_shipped_teacher_loads_with_every_byte_checked(game):
    tensors, facts = checkpoint.load(zoo.folder(game), zoo.TEACHER)
    load_sb3(nature_network(len(facts["action_meanings"])), tensors)
    files = [path for path in zoo.folder(game).iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) < MAX_BYTES
    assert sorted(path.suffix for path in files) == [".csv", ".json", ".safetensors"]


@pytest.mark.parametrize("game", SHIPPED)
def test_a_shipped_teacher_states_its_protocol_its_training_and_its_seed(game):
    facts = checkpoint.load_facts(zoo.folder(game), zoo.TEACHER)
    env = EnvConfig(**facts["env"])
    assert env.game == game
    assert facts["protocol"] == {**protocol(env), "ale_py": facts["protocol"]["ale_py"]}
    assert isinstance(PPOConfig(**facts["ppo"]), PPOConfig)
    assert isinstance(facts["seed"], int)
    rollout = facts["ppo"]["n_envs"] * facts["ppo"]["n_steps"]
    assert 0 < facts["env_steps"] < facts["ppo"]["total_steps"] + rollout
    assert facts["action_meanings"][0] == "NOOP"


@pytest.mark.parametrize("game", SHIPPED)
def test_what_a_shipped_teacher_says_of_its_score_is_a_score(game):
    stated = checkpoint.load_facts(zoo.folder(game), zoo.TEACHER).get("evaluation")
    if stated is None:
        pytest.skip("states none")
    assert stated["games"] >= 1
    assert math.isfinite(stated["mean"])


def test_a_copy_is_the_same_teacher_and_says_where_it_comes_from(tmp_path):
    zoo.copy("pong", tmp_path / "teacher")
    ours, theirs = tmp_path / "teacher", zoo.folder("pong")
    assert checkpoint.weights_hash(ours, zoo.TEACHER) == checkpoint.weights_hash(theirs, zoo.TEACHER)
    copied, original = (checkpoint.load_facts(folder, zoo.TEACHER) for folder in (ours, theirs))
    assert copied.pop("source") == {"kind": "zoo", "game": "pong"}
    original.pop("source", None)
    assert copied == original


def test_a_game_without_a_teacher_is_answered_with_those_that_have_one(tmp_path):
    with pytest.raises(LookupError, match=r"zoo.*'pnog'.*Did you mean 'pong'"):
        zoo.copy("pnog", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_altered_shipped_teacher_is_not_copied(tmp_path, monkeypatch):
    (source,) = zoo.folder("pong").glob("*.safetensors")
    fake = tmp_path / "zoo" / "pong"
    fake.mkdir(parents=True)
    data = bytearray(source.read_bytes())
    data[-5] ^= 1
    (fake / source.name).write_bytes(bytes(data))
    (fake / "teacher.json").write_bytes((zoo.folder("pong") / "teacher.json").read_bytes())
    monkeypatch.setattr(zoo, "folder", lambda game: fake)
    with pytest.raises(CheckpointError, match=source.name):
        zoo.copy("pong", tmp_path / "run")
    assert not (tmp_path / "run").exists()
