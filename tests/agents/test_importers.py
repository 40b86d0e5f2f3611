"""The SB3 importer: genuine files exactly, all others refused by name, and nothing in a file is ever run.

The evil files are made here at run time; their payloads touch a canary in the test's own folder and do no more.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import hashlib
import io
import itertools
import json
import os
import pickle
import random
import runpy
import shutil
import stat
import struct
import subprocess
import sys
import time
import tracemalloc
import warnings
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.util import spawnv_passfds
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
import torch.utils.collect_env
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3 import A2C, DQN, PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.save_util import save_to_zip_file
from torch import Tensor
from torch.nn import functional as F

from agents import importers
from agents.config import EnvConfig
from agents.importers import ImportRefused, import_sb3, read_sb3_policy
from rlexit import checkpoint, statedicts

SIX = spaces.Discrete(6)
FRAMES = spaces.Box(0, 255, (84, 84, 4), np.uint8)
PONG = EnvConfig("pong")


class Still(gymnasium.Env):
    """Always the same observation; SB3 only asks it for its spaces."""

    def __init__(self, observations: spaces.Space = FRAMES, actions: spaces.Space = SIX) -> None:
        self.observation_space, self.action_space = observations, actions

    def reset(self, *, seed=None, options=None):
        return self.observation_space.sample(), {}


def make(kind: type[BaseAlgorithm], policy: str = "CnnPolicy", env: Still | None = None, **arguments) -> BaseAlgorithm:
    model = kind(policy, env or Still(), device="cpu", seed=0, **arguments)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


@dataclass(frozen=True)
class Genuine:
    """A file that SB3 wrote: its bytes, its members, those of its `policy.pth`, and the weights."""

    data: bytes
    members: dict[str, bytes]
    records: dict[str, bytes]
    state: dict[str, Tensor]


@pytest.fixture(scope="module")
def genuine() -> Genuine:
    model = make(PPO)
    buffer = io.BytesIO()
    model.save(buffer)
    members = unpacked(buffer.getvalue())
    return Genuine(buffer.getvalue(), members, unpacked(members["policy.pth"]), dict(model.policy.state_dict()))


def unpacked(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def packed(members: dict[str, bytes] | list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", compression, compresslevel=1) as archive:
        warnings.simplefilter("ignore", UserWarning)  # of names that occur twice: some files here want them
        for name, content in members.items() if isinstance(members, dict) else members:
            archive.writestr(name, content)
    return buffer.getvalue()


def torch_zip(program: bytes) -> bytes:
    return packed({"archive/data.pkl": program, "archive/version": b"3\n", "archive/data/0": bytes(16)})


def central(data: bytes, name: str) -> int:
    """Where the directory entry of that name starts."""
    place = data.rindex(b"PK\x01\x02", 0, data.rindex(name.encode()))
    assert data[place + 46 : place + 46 + len(name)] == name.encode()
    return place


def patched(data: bytes, place: int, value: bytes) -> bytes:
    return data[:place] + value + data[place + len(value) :]


def saved(path: Path, state: dict[str, Tensor]) -> Path:
    """The given state dict in a zip of SB3's own making."""
    save_to_zip_file(path, data={}, params={"policy": state})
    return path


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def refusal(path: Path) -> str:
    """The message, after the checks that hold for every one of them: one printable line that names the file."""
    with pytest.raises(ImportRefused) as caught:
        read_sb3_policy(path)
    message = str(caught.value)
    assert message.isprintable()
    assert message.endswith(".")
    assert path.name[-100:] in message
    assert "weights_only" not in message  # torch's own advice, which would run the payload
    return message


def logits(weights: dict[str, Tensor], frames: Tensor) -> Tensor:
    features = frames.float() / 255
    for layer, stride in ((0, 4), (2, 2), (4, 1)):
        kernel, bias = (weights[f"features_extractor.cnn.{layer}.{part}"] for part in ("weight", "bias"))
        features = F.relu(F.conv2d(features, kernel, bias, stride))
    linear, bias = (weights[f"features_extractor.linear.0.{part}"] for part in ("weight", "bias"))
    return F.linear(F.relu(F.linear(features.flatten(1), linear, bias)), *heads(weights, "action_net"))


def heads(weights: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    return weights[f"{name}.weight"], weights[f"{name}.bias"]


# ---- genuine files ----


@pytest.mark.parametrize("kind", [PPO, A2C])
def test_an_imported_teacher_has_exactly_the_logits_and_values_of_sb3(kind, tmp_path):
    make(kind).save(tmp_path / "actor.zip")
    policy = kind.load(tmp_path / "actor.zip", device="cpu").policy
    import_sb3(tmp_path / "actor.zip", tmp_path / "run", PONG)
    weights, _ = checkpoint.load(tmp_path / "run", "teacher")
    frames = torch.randint(0, 256, (16, 4, 84, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = policy.extract_features(frames)
        expected = policy.action_net(policy.mlp_extractor.forward_actor(features))
        assert float((logits(weights, frames) - expected).abs().max()) == 0
        assert expected.std() > 0.1
        assert torch.equal(F.linear(features, *heads(weights, "value_net")), policy.value_net(features))
        acts, _ = policy.predict(frames.numpy(), deterministic=True)
        assert logits(weights, frames).argmax(1).tolist() == acts.tolist()


def test_the_teacher_checkpoint_names_its_source_and_the_protocol(genuine, tmp_path):
    path = written(tmp_path / "zoo.zip", genuine.data)
    manifest = import_sb3(path, tmp_path / "run", PONG)
    assert manifest == tmp_path / "run" / "teacher.json"
    weights, facts = checkpoint.load(tmp_path / "run", "teacher")
    assert facts["source"] == {"kind": "sb3", "file": "zoo.zip", "sha256": hashlib.sha256(genuine.data).hexdigest()}
    assert facts["env"]["game"] == "pong"
    assert facts["action_meanings"] == ["NOOP", "FIRE", "RIGHT", "LEFT", "RIGHTFIRE", "LEFTFIRE"]
    assert facts["protocol"]["sticky"] == PONG.sticky
    assert facts["seed"] is None
    assert facts["env_steps"] is None
    own = {key: value for key, value in genuine.state.items() if not key.startswith(("pi_", "vf_"))}
    assert weights.keys() == own.keys()
    assert all(torch.equal(weights[key], own[key]) for key in own)


def test_weights_of_old_sb3_versions_without_aliases_are_read(genuine, tmp_path):
    state = {key: value for key, value in genuine.state.items() if not key.startswith(("pi_", "vf_"))}
    weights = read_sb3_policy(saved(tmp_path / "old.zip", state))
    assert all(torch.equal(weights[key], state[key]) for key in state)


def test_compressed_members_that_are_not_read_do_not_matter(genuine, tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in genuine.members.items():
            stored = name == "policy.pth"
            archive.writestr(name, content, zipfile.ZIP_STORED if stored or name == "data" else zipfile.ZIP_DEFLATED)
    assert len(read_sb3_policy(written(tmp_path / "mixed.zip", buffer.getvalue()))) == 12


# ---- other agents ----

NARROW = {"features_extractor_kwargs": {"features_dim": 64}}


@pytest.mark.parametrize(
    ("kind", "policy", "observations", "actions", "arguments", "says"),
    [
        (DQN, "CnnPolicy", FRAMES, SIX, {"buffer_size": 1}, "is a DQN"),
        (PPO, "MlpPolicy", spaces.Box(-1, 1, (4,)), SIX, {}, "is an `MlpPolicy`"),
        (PPO, "MlpPolicy", spaces.Box(-1, 1, (4,)), spaces.Box(-1, 1, (2,)), {}, "continuous actions"),
        (A2C, "CnnPolicy", FRAMES, spaces.Box(-1, 1, (6,)), {}, "continuous actions"),
        (SAC, "MlpPolicy", spaces.Box(-1, 1, (4,)), spaces.Box(-1, 1, (2,)), {"buffer_size": 1}, "is an SAC"),
        (PPO, "MultiInputPolicy", spaces.Dict({"frames": FRAMES}), SIX, {}, "is a multi-input policy"),
        (PPO, "CnnPolicy", FRAMES, SIX, {"policy_kwargs": {"share_features_extractor": False}}, "nets of their own"),
        (PPO, "CnnPolicy", FRAMES, SIX, {"policy_kwargs": {"net_arch": [64]}}, "hidden layers"),
        (PPO, "CnnPolicy", FRAMES, SIX, {"policy_kwargs": {"net_arch": [512]}}, "hidden layers"),
        (PPO, "CnnPolicy", FRAMES, SIX, {"policy_kwargs": NARROW}, "shape (512, 3136), got (64, 3136)"),
        (PPO, "CnnPolicy", spaces.Box(0, 255, (84, 84, 1), np.uint8), SIX, {}, "(32, 4, 8, 8), got (32, 1, 8, 8)"),
        (PPO, "CnnPolicy", spaces.Box(0, 255, (96, 96, 4), np.uint8), SIX, {}, "shape (512, 3136), got (512, 4096)"),
    ],
)
def test_another_kind_of_agent_is_refused_by_name(kind, policy, observations, actions, arguments, says, tmp_path):
    make(kind, policy, Still(observations, actions), **arguments).save(tmp_path / "other.zip")
    assert says in refusal(tmp_path / "other.zip")


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("lstm_actor.weight_ih_l0", "is a recurrent policy"),
        ("lstm_critic.weight_ih_l0", "is a recurrent policy"),
        ("quantile_net.features_extractor.cnn.0.weight", "is a QR-DQN"),
        ("features_extractor.cnn.6.weight", "`features_extractor.cnn.6.weight`, which no NatureCNN"),
        ("pi_features_extractor.cnn.6.weight", "which no NatureCNN"),
        ("\x1b[2J\nroot@host$ ", "`?[2J?root@host$ `"),
        ("x" * 5000, "x...x"),
    ],
)
def test_a_foreign_key_is_refused_by_name(key, says, genuine, tmp_path):
    assert says in refusal(saved(tmp_path / "forged.zip", {**genuine.state, key: torch.zeros(2)}))


def forged(change: Callable[[Tensor], Tensor], key: str = "action_net.bias") -> Callable[[dict[str, Tensor]], None]:
    def apply(state: dict[str, Tensor]) -> None:
        state[key] = change(state[key].clone())

    return apply


LINEAR = "features_extractor.linear.0.weight"


@pytest.mark.parametrize(
    ("forge", "says"),
    [
        (forged(lambda bias: bias.index_fill(0, torch.tensor([3]), torch.nan)), "must be finite"),
        (forged(lambda bias: bias.index_fill(0, torch.tensor([0]), -torch.inf)), "must be finite"),
        (forged(lambda bias: bias.index_fill(0, torch.tensor([0]), torch.nan), f"vf_{LINEAR}"), "must be finite"),
        (forged(Tensor.double), "float32, got torch.float64"),
        (forged(Tensor.half), "float32, got torch.float16"),
        (forged(Tensor.bfloat16, "value_net.weight"), "float32, got torch.bfloat16"),
        (forged(Tensor.long), "float32, got torch.int64"),
        (forged(lambda bias: bias[:5]), "shape (6), got (5,)"),
        (forged(lambda bias: bias[:0]), "shape (6), got (0,)"),
        (forged(lambda weight: weight[0], "action_net.weight"), "shape (actions, 512), got (512,)"),
        (forged(lambda weight: weight.t().contiguous().t(), LINEAR), "must be contiguous"),
        (forged(lambda weight: weight[:1, :1].expand(512, 3136), LINEAR), "must be contiguous"),
        (forged(lambda weight: weight + 1, f"pi_{LINEAR}"), f"`pi_{LINEAR}` of `policy.pth`"),
        (forged(lambda weight: weight + 1, f"vf_{LINEAR}"), "share_features_extractor"),
        (lambda state: state.pop("value_net.bias"), "it has no `value_net.bias`"),
        (lambda state: state.clear(), "state dict of tensors"),
        (lambda state: state.update(extra={"value": 1}), "state dict of tensors"),
        (lambda state: state.update({3: torch.zeros(1)}), "state dict of tensors"),
    ],
)
def test_damaged_weights_are_refused_by_name(forge, says, genuine, tmp_path):
    state = dict(genuine.state)
    forge(state)
    assert says in refusal(saved(tmp_path / "damaged.zip", state))


@pytest.mark.parametrize(
    ("env_config", "says"),
    [
        (EnvConfig("breakout"), "the 4 actions of `breakout`, got 6"),
        (EnvConfig("pong", full_action_space=True), "the 18 actions of `pong`, got 6"),
    ],
)
def test_an_actor_of_another_game_is_refused_and_nothing_is_written(env_config, says, genuine, tmp_path):
    path = written(tmp_path / "actor.zip", genuine.data)
    with pytest.raises(ImportRefused) as caught:
        import_sb3(path, tmp_path / "run", env_config)
    assert says in str(caught.value)
    assert str(caught.value).isprintable()
    assert "actor.zip" in str(caught.value)
    assert os.listdir(tmp_path) == ["actor.zip"]


def test_a_refused_file_writes_nothing(tmp_path):
    make(DQN, buffer_size=1).save(tmp_path / "dqn.zip")
    with pytest.raises(ImportRefused):
        import_sb3(tmp_path / "dqn.zip", tmp_path / "run", PONG)
    assert os.listdir(tmp_path) == ["dqn.zip"]


# ---- things that are no SB3 zip ----


def test_what_is_no_readable_file_is_refused(tmp_path):
    (tmp_path / "folder.zip").mkdir()
    os.mkfifo(tmp_path / "pipe.zip")
    (tmp_path / "endless.zip").symlink_to("/dev/zero")
    (tmp_path / "dangling.zip").symlink_to(tmp_path / "nowhere")
    with open(tmp_path / "large.zip", "wb") as file:
        file.truncate(importers.MAX_FILE_BYTES + 1)
    assert "got a folder" in refusal(tmp_path / "folder.zip")
    for name in ("pipe.zip", "endless.zip", "dangling.zip", "missing.zip"):
        assert "missing, or no regular file" in refusal(tmp_path / name)
    assert "cannot be read" in refusal(tmp_path / ("x" * 300))
    assert "must have at most" in refusal(tmp_path / "large.zip")


@pytest.mark.parametrize(
    "data", [b"", b"PK", b"hello", b"PK\x05\x06" + bytes(18), bytes(5000), pickle.dumps({"a": 1}), packed({})]
)
def test_what_is_no_zip_of_sb3_is_refused(data, tmp_path):
    refusal(written(tmp_path / "no.zip", data))


def test_a_file_name_cannot_write_to_the_terminal(tmp_path):
    with pytest.raises(ImportRefused) as caught:
        read_sb3_policy(tmp_path / "a\x1b[31m\nb.zip")
    assert str(caught.value).isprintable()


def test_a_file_cut_anywhere_is_refused(genuine, tmp_path):
    path = written(tmp_path / "cut.zip", genuine.data)
    length = len(genuine.data)
    for end in reversed([*range(40), *np.linspace(40, length - 40, 60, dtype=int), *range(length - 40, length)]):
        os.truncate(path, end)
        refusal(path)


def test_a_policy_cut_anywhere_is_refused(genuine, tmp_path):
    policy = genuine.members["policy.pth"]
    for end in [0, 1, 4, 100, *np.linspace(200, len(policy) - 1, 20, dtype=int)]:
        message = refusal(written(tmp_path / "cut.zip", packed({"policy.pth": policy[:end]})))
        assert "policy.pth" in message


def test_a_flipped_bit_is_refused_or_lies_outside_the_weights(genuine, tmp_path):
    choose = random.Random(0)
    refused = 0
    for _ in range(40):
        place = choose.randrange(len(genuine.data))
        flipped = patched(genuine.data, place, bytes([genuine.data[place] ^ (1 << choose.randrange(8))]))
        try:
            weights = read_sb3_policy(written(tmp_path / "flipped.zip", flipped))
        except ImportRefused:
            refused += 1
        else:
            assert all(torch.equal(weights[key], genuine.state[key]) for key in weights)
    assert refused > 30


def test_a_flipped_bit_inside_a_repacked_policy_is_refused(genuine, tmp_path):
    policy = genuine.members["policy.pth"]
    weights = policy.index(genuine.records["archive/data/6"])
    flipped = patched(policy, weights + 1000, bytes([policy[weights + 1000] ^ 1]))
    assert "cut or altered" in refusal(written(tmp_path / "flipped.zip", packed({"policy.pth": flipped})))


# ---- code in a file ----


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable, *arguments) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def touch(canary: Path) -> str:
    return f"touch {canary}"


def python(canary: Path) -> str:
    return f"__import__('pathlib').Path({str(canary)!r}).touch()"


def script(canary: Path) -> str:
    return str(written(canary.with_name("script.txt"), python(canary).encode()))


def spawn(canary: Path) -> tuple[bytes, list[bytes], tuple[int, ...]]:
    return str(shutil.which("touch")).encode(), [b"touch", str(canary).encode()], ()


# Pickles that touch the canary when they are loaded, each another way.
PAYLOADS: dict[str, Callable[[Path], bytes]] = {
    "os.system": lambda canary: pickle.dumps(Call(os.system, touch(canary))),
    "os.system, protocol 0": lambda canary: pickle.dumps(Call(os.system, touch(canary)), protocol=0),
    "os.system, protocol 2": lambda canary: pickle.dumps(Call(os.system, touch(canary)), protocol=2),
    "subprocess": lambda canary: pickle.dumps(Call(subprocess.check_call, ["touch", str(canary)]), protocol=2),
    "builtins.eval": lambda canary: pickle.dumps(Call(eval, python(canary)), protocol=2),
    "builtins.exec": lambda canary: pickle.dumps(Call(exec, python(canary)), protocol=2),
    "collect_env.run": lambda canary: pickle.dumps(Call(torch.utils.collect_env.run, touch(canary)), protocol=2),
    "spawnv_passfds": lambda canary: pickle.dumps(Call(spawnv_passfds, *spawn(canary)), protocol=2),
    "runpy": lambda canary: pickle.dumps(Call(runpy.run_path, script(canary)), protocol=2),
    "pathlib": lambda canary: pickle.dumps(Call(Path.touch, canary), protocol=4),
    "pickle in a pickle": lambda canary: pickle.dumps(
        Call(pickle.loads, pickle.dumps(Call(os.system, touch(canary)))), protocol=2
    ),
    "in a tensor's bytes": lambda canary: pickle.dumps(
        Call(torch.storage._load_from_bytes, legacy(pickle.dumps(Call(os.system, touch(canary)), protocol=2))),
        protocol=2,
    ),
    "getattr chain": lambda canary: (
        b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n("
        + (text("os") + b"tR" + text("system") + b"tR(" + text(touch(canary)) + b"tR.")
    ),
    "STACK_GLOBAL": lambda canary: (
        b"\x80\x04" + text("os") + text("system") + b"\x93" + text(touch(canary)) + b"\x85R."
    ),
    "STACK_GLOBAL by the memo": lambda canary: (
        b"\x80\x04" + text("system") + b"\x940" + text("os") + b"h\x00\x93" + text(touch(canary)) + b"\x85R."
    ),
    "memo overwritten": lambda canary: (
        b"\x80\x02ccollections\nOrderedDict\nq\x00cos\nsystem\nq\x000h\x00" + text(touch(canary)) + b"\x85R."
    ),
    "INST": lambda canary: b"(" + text(touch(canary)) + b"ios\nsystem\n.",
    "OBJ": lambda canary: b"(cos\nsystem\n" + text(touch(canary)) + b"o.",
    "BUILD": lambda canary: (
        b"\x80\x02ccollections\nOrderedDict\n)R}" + text("x") + b"cos\nsystem\n" + text(touch(canary)) + b"\x85Rsb."
    ),
    "as a value": lambda canary: pickle.dumps({"action_net.bias": Call(os.system, touch(canary))}, protocol=2),
    "as a key": lambda canary: pickle.dumps({Call(os.system, touch(canary)): 1}, protocol=2),
    "beside tensors": lambda canary: pickle.dumps(
        OrderedDict({"action_net.bias": torch.zeros(6), "value_net.bias": Call(os.system, touch(canary))}), protocol=2
    ),
}


def legacy(program: bytes) -> bytes:
    """What torch wrote before 1.6: five pickles in a row."""
    head = (torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {"little_endian": True})
    return b"".join(pickle.dumps(part, protocol=2) for part in head) + program + pickle.dumps([], protocol=2)


# Where an evil pickle may stand instead of the weights: the file that holds it there.
PLACES: dict[str, Callable[[bytes, Genuine], bytes]] = {
    "the file is a pickle": lambda program, genuine: program,
    "policy.pth is a pickle": lambda program, genuine: packed({"policy.pth": program}),
    "policy.pth is a legacy file": lambda program, genuine: packed({"policy.pth": legacy(program)}),
    "policy.pth is a torch zip": lambda program, genuine: packed({"policy.pth": torch_zip(program)}),
    "program of a genuine policy": lambda program, genuine: packed(
        {**genuine.members, "policy.pth": packed({**genuine.records, "archive/data.pkl": program})}
    ),
    "second program": lambda program, genuine: packed(
        {"policy.pth": packed({"evil/data.pkl": program, **genuine.records})}
    ),
    "TorchScript": lambda program, genuine: packed(
        {"policy.pth": packed({"archive/constants.pkl": program, "archive/data.pkl": program, "archive/version": b"3"})}
    ),
    "zip in a zip": lambda program, genuine: packed({"model.zip": packed({"policy.pth": torch_zip(program)})}),
    "policy in a policy": lambda program, genuine: packed({"policy.pth": packed({"policy.pth": torch_zip(program)})}),
    "two policies": lambda program, genuine: packed(
        [("policy.pth", torch_zip(program)), *genuine.members.items(), ("policy.pth", torch_zip(program))]
    ),
    "wrong extension": lambda program, genuine: packed({"policy.pkl": program, "policy.pt": torch_zip(program)}),
}


@pytest.mark.parametrize("payload", PAYLOADS)
def test_every_payload_would_run_if_it_were_unpickled(payload, tmp_path):
    result = pickle.loads(PAYLOADS[payload](tmp_path / "canary"))
    if payload == "spawnv_passfds":
        os.waitpid(result, 0)
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("place", PLACES)
def test_no_payload_in_place_of_the_weights_runs(place, genuine, tmp_path):
    for payload, program in PAYLOADS.items():
        evil = PLACES[place](program(tmp_path / "canary"), genuine)
        refusal(written(tmp_path / "evil.zip", evil))
        assert not (tmp_path / "canary").exists(), payload


def test_a_refusal_names_the_function_that_the_file_wanted(genuine, tmp_path):
    program = PAYLOADS["collect_env.run"](tmp_path / "canary")
    path = written(tmp_path / "evil.zip", PLACES["program of a genuine policy"](program, genuine))
    assert "got the name torch.utils.collect_env.run" in refusal(path)


def test_no_payload_in_members_that_are_not_read_runs(genuine, tmp_path):
    for payload, make_program in PAYLOADS.items():
        program = make_program(tmp_path / "canary")
        data = {"policy_class": {":type:": "<class 'x'>", ":serialized:": base64.b64encode(program).decode()}}
        evil = {
            **genuine.members,
            "data": json.dumps(data).encode(),
            "pytorch_variables.pth": torch_zip(program),
            "tensors.pth": program,
            "policy.optimizer.pth": legacy(program),
            "vecnormalize.pkl": program,
            "Policy.pth": program,
            "policy.pth.pkl": program,
            "system_info.txt": program,
            "_stable_baselines3_version": program,
        }
        weights = read_sb3_policy(written(tmp_path / "evil.zip", packed(evil)))
        assert torch.equal(weights[LINEAR], genuine.state[LINEAR])
        assert not (tmp_path / "canary").exists(), payload


def test_torch_is_handed_nothing_but_the_program_and_its_records(genuine, monkeypatch, tmp_path):
    given, load = [], torch.load

    def spy(file, **options):
        given.append(file.getvalue())
        return load(file, **options)

    monkeypatch.setattr(torch, "load", spy)
    other = {"data/6": b"x", "evil/data/6": b"x", "archive/data/6/x": b"x", "archive/constants.pkl": b"x"}
    policy = packed({**other, **genuine.records})
    weights = read_sb3_policy(written(tmp_path / "evil.zip", packed({"policy.pth": policy})))
    assert torch.equal(weights[LINEAR], genuine.state[LINEAR])
    names = {"archive/data.pkl", "archive/version", "archive/byteorder"} | {f"archive/data/{key}" for key in range(12)}
    assert unpacked(given[0]) == {name: genuine.records[name] for name in names}


def test_a_second_archive_that_only_torch_would_find_is_not_loaded(genuine, tmp_path):
    policy, evil = genuine.members["policy.pth"], torch_zip(PAYLOADS["os.system"](tmp_path / "canary"))
    for data in (evil + policy, policy + evil, policy[:-22] + evil + policy[-22:]):
        with contextlib.suppress(ImportRefused):
            weights = read_sb3_policy(written(tmp_path / "evil.zip", packed({"policy.pth": data})))
            assert torch.equal(weights[LINEAR], genuine.state[LINEAR])
        assert not (tmp_path / "canary").exists()


AUDIT = """
import sys
from pathlib import Path
from agents.importers import ImportRefused, read_sb3_policy

def read(path):
    try:
        return len(read_sb3_policy(path))
    except ImportRefused as error:
        return str(error)

files = sorted(Path(sys.argv[1]).glob("*.zip"))
read(files[0]), read(files[1])  # imports that torch and zipfile put off
FORBIDDEN = ("subprocess", "os.", "pty", "socket", "ctypes", "exec", "compile", "import", "pickle", "shutil")
events = []

def audit(event, arguments):
    writes = event == "open" and (set(str(arguments[1])) & set("wax+") or (arguments[2] or 0) & 0o3103)
    if watching and (writes or event.startswith(FORBIDDEN)):
        events.append((event, str(arguments)[:200]))
        raise RuntimeError(event)

watching = True
sys.addaudithook(audit)
answers = [read(path) for path in files]
watching = False
print(answers)
print(events)
watching = True
import os, pickle
for act in (lambda: os.system("true"), lambda: open("/dev/null", "w"), lambda: pickle.loads(b"cos\\nsystem\\n.")):
    try:
        act()
    except RuntimeError:
        continue
    raise SystemExit("the hook sees nothing")
"""


def test_reading_evil_files_starts_writes_imports_and_unpickles_nothing(genuine, tmp_path):
    chosen = ["builtins.exec", "collect_env.run", "STACK_GLOBAL"]
    written(tmp_path / "0.zip", genuine.data)
    for number, (place, payload) in enumerate(itertools.product(PLACES, chosen), start=1):
        evil = PLACES[place](PAYLOADS[payload](tmp_path / "canary"), genuine)
        written(tmp_path / f"{number}.zip", evil)
    root = Path(importers.__file__).parents[1]
    child = subprocess.run(
        [sys.executable, "-c", AUDIT, str(tmp_path)], cwd=root, capture_output=True, text=True, timeout=300, check=False
    )
    assert child.returncode == 0, child.stderr
    answers, events = (ast.literal_eval(line) for line in child.stdout.splitlines())
    assert events == []
    assert answers[0] == 12
    assert len(answers) == 1 + len(PLACES) * len(chosen)
    assert all(isinstance(answer, str) for answer in answers[1:])
    assert not (tmp_path / "canary").exists()


def test_the_importer_imports_no_unpickler_and_loads_weights_only():
    text = "".join(Path(module.__file__).read_text() for module in (importers, statedicts))
    tree = ast.parse(text.replace("from __future__ import annotations\n", ""))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not imported & {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "runpy"}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    loads = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr in ("load", "loads")]
    assert [ast.unparse(call.func) for call in loads] == ["torch.load"]
    assert "weights_only=True" in ast.unparse(loads[0])
    named = {call.func.id for call in calls if isinstance(call.func, ast.Name)}
    assert not named & {"eval", "exec", "compile", "__import__"}


# ---- bombs and claims ----


def bomb(name: str) -> bytes:
    """A zip of 260 KB whose one member, of that name, is 256 MiB of zeros."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = deflate.compress(bytes(1 << 20)) + deflate.flush(zlib.Z_FULL_FLUSH)
    assert len(zlib.decompressobj(-15).decompress(2 * block)) == 2 << 20
    data = packed({name: 256 * block + deflate.flush()})
    assert len(data) < 300_000
    data = patched(data, central(data, name) + 10, struct.pack("<H", zipfile.ZIP_DEFLATED))
    return patched(data, central(data, name) + 24, struct.pack("<I", 256 << 20))


def quickly(path: Path) -> str:
    """The message of a refusal that came at once and held little memory at any time."""
    tracemalloc.start()
    try:
        began = time.process_time()
        message = refusal(path)
        assert time.process_time() - began < 1
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 * path.stat().st_size + (16 << 20)
    return message


def test_a_deflated_policy_is_refused_without_inflating_it(genuine, tmp_path):
    data = bomb("policy.pth")
    assert "got 268435456" in quickly(written(tmp_path / "bomb.zip", data))
    # The same stream under a size that nobody would object to.
    liar = patched(data, central(data, "policy.pth") + 24, struct.pack("<I", 2000))
    assert "must be stored" in quickly(written(tmp_path / "liar.zip", liar))
    again = packed(genuine.members, zipfile.ZIP_DEFLATED)
    assert "must" in quickly(written(tmp_path / "again.zip", again))


def test_a_deflated_record_inside_the_policy_is_refused_without_inflating_it(tmp_path):
    data = bomb("archive/data/0")
    assert "got 268435456" in quickly(written(tmp_path / "bomb.zip", packed({"policy.pth": data})))
    liar = patched(data, central(data, "archive/data/0") + 24, struct.pack("<I", 2000))
    assert "must be stored" in quickly(written(tmp_path / "liar.zip", packed({"policy.pth": liar})))


def test_members_that_lie_about_their_size_are_refused(tmp_path):
    honest = packed({"policy.pth": b"x" * 1000})
    entry = central(honest, "policy.pth")
    for packed_size, size in ((1000, 100), (100, 1000), (2**32 - 2, 2**32 - 2), (1000, 2**31), (2**31, 1000)):
        forged = patched(honest, entry + 20, struct.pack("<II", packed_size, size))
        quickly(written(tmp_path / "liar.zip", forged))


def test_overlapping_members_are_refused(tmp_path):
    data = packed({"policy.pth": b"x" * 5000, "other": b"y" * 5000})
    forged = patched(data, central(data, "other") + 42, struct.pack("<I", 2000))
    assert "overlaps" in quickly(written(tmp_path / "overlap.zip", forged))
    same = patched(data, central(data, "other") + 42, struct.pack("<I", 0))
    assert "overlaps" in quickly(written(tmp_path / "same.zip", same))


def test_many_members_are_refused_before_they_are_parsed(tmp_path):
    members = {f"{number}": b"" for number in range(65)}
    assert "at most 64 members, got 65" in quickly(written(tmp_path / "65.zip", packed(members)))
    members = {"policy.pth": packed({f"archive/data/{number}": b"" for number in range(4097)})}
    assert "at most 4096 members, got 4097" in quickly(written(tmp_path / "inner.zip", packed(members)))
    entry = b"PK\x01\x02" + bytes(42)
    count = 300_000
    end = b"PK\x05\x06" + struct.pack("<4H2IH", 0, 0, count % 65536, count % 65536, count * 46, 0, 0)
    assert "got thousands" in quickly(written(tmp_path / "many.zip", entry * count + end))


def test_a_large_policy_is_refused_by_its_size(tmp_path):
    data = packed({"policy.pth": bytes(importers.MAX_WEIGHTS_BYTES + 1)})
    assert "must have at most 33554432 bytes, got 33554433" in refusal(written(tmp_path / "large.zip", data))


HUGE = b"J\xff\xff\xff\x7f"  # BININT 2147483647


def claim(numel: bytes, size: bytes, stride: bytes) -> bytes:
    """A state dict of one tensor whose storage says `numel`, over a record of 16 bytes."""
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + numel + b"tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00" + size + stride + b"\x89}tR"
    return b"\x80\x02}" + text("action_net.bias") + tensor + b"s."


@pytest.mark.parametrize(
    ("program", "says"),
    [
        (claim(HUGE, HUGE + b"\x85", b"K\x01\x85"), "no tensors that torch can read"),
        (claim(b"K\x04", HUGE + b"\x85", b"K\x01\x85"), "no tensors that torch can read"),
        (claim(b"K\x05", b"K\x05\x85", b"K\x01\x85"), "no tensors that torch can read"),
        (claim(b"K\x04", HUGE + b"\x85", b"K\x00\x85"), "is no NatureCNN"),
        (claim(b"K\x04", b"K\x04\x85", b"K\x01\x85"), "is no NatureCNN"),
        (b"\x80\x02cbuiltins\nbytearray\n" + HUGE + b"\x85R.", "the name builtins.bytearray"),
        (b"\x80\x02ctorch\nFloatTensor\n" + HUGE + b"\x85R.", "the name torch.FloatTensor"),
        (b"\x80\x02})q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"K\x01s.", "used twice"),
        (b"\x80\x02" + b"(" * 60_000 + b"t" * 60_000 + b".", "a pickle of 120003 bytes"),
        (b"\x80\x02)" + b"\x85" * 60_000 + b".", "state dict of tensors"),
        (b"\x80\x02" + text("x" * 60_000) + b".", "state dict of tensors"),
        (b"\x80\x02X\xff\xff\xff\xffx.", "cut or altered"),
        (b"\x80\x02\x8b\xff\xff\xff\x7f.", "cut or altered"),
        (b"\x80\x04}.", "the pickle instruction PROTO"),
        (b"\x80\x02}", "cut or altered"),
        (b"\x80\x02K\x07Q.", "no tensors that torch can read"),
        (b"", "cut or altered"),
    ],
    ids=range(17),
)
def test_a_program_that_claims_memory_or_time_is_refused_at_once(program, says, tmp_path):
    assert says in quickly(written(tmp_path / "claim.zip", packed({"policy.pth": torch_zip(program)})))


# ---- names and kinds of members ----

NAMES = [
    "../policy.pth", "../../../../etc/cron.d/policy.pth", "/policy.pth", "//policy.pth", "./policy.pth", "policy.pth/",
    "a/policy.pth", "policy.pth/../x", "..\\policy.pth", "C:\\policy.pth", "C:/policy.pth", "POLICY.PTH", "Policy.pth",
    "policy.PTH", "policy.pth ", " policy.pth", "policy.pth.", "policy.pth\0", "policy.pth\0.txt", "policy\0.pth",
    "policy.pth:stream", "\u202epolicy.pth", "\uff50olicy.pth", "~/policy.pth", "-rf", "CON", "\x1b[2J\n",
]  # fmt: skip


def named(data: bytes, name: str) -> bytes:
    """A zip with that one member; the name is put into its bytes, since `zipfile` would correct it."""
    stand_in = "n" * len(name.encode())
    return packed({stand_in: data}).replace(stand_in.encode(), name.encode())


@pytest.mark.parametrize("name", NAMES)
def test_the_weights_are_found_by_their_exact_name_only(name, tmp_path):
    before = refusal(written(tmp_path / "named.zip", named(b"x", name)))
    assert "must hold `policy.pth`" in before
    assert os.listdir(tmp_path) == ["named.zip"]


def test_members_with_evil_names_are_written_nowhere(genuine, tmp_path):
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    extra = [(name, b"x") for name in NAMES if "\0" not in name]
    path = written(inside / "slip.zip", packed([*genuine.members.items(), *extra]))
    assert len(read_sb3_policy(path)) == 12
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "a", inside, path]


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK])
def test_a_link_or_device_member_is_refused(kind, tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        info = zipfile.ZipInfo("policy.pth")
        info.external_attr = (kind | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    assert "link or a device" in refusal(written(tmp_path / "link.zip", buffer.getvalue()))


def test_an_encrypted_member_is_refused(tmp_path):
    data = packed({"policy.pth": b"x"})
    forged = patched(data, central(data, "policy.pth") + 8, b"\x01\x00")
    assert "has an encrypted member `policy.pth`" in refusal(written(tmp_path / "encrypted.zip", forged))


def test_two_members_of_one_name_are_refused(genuine, tmp_path):
    twice = packed([*genuine.members.items(), ("policy.pth", genuine.members["policy.pth"])])
    assert "two members of the same name" in refusal(written(tmp_path / "twice.zip", twice))


def test_a_member_whose_two_headers_differ_is_refused(genuine, tmp_path):
    forged = genuine.data.replace(b"policy.pth", b"policy.xxx", 1)
    assert central(forged, "policy.pth") > 0
    assert "cut or altered" in refusal(written(tmp_path / "two.zip", forged))


# ---- any bytes ----


def torch_saved() -> bytes:
    buffer = io.BytesIO()
    torch.save(OrderedDict({"action_net.bias": torch.zeros(4), "value_net.bias": torch.zeros(1)}), buffer)
    return buffer.getvalue()


SMALL = torch_saved()


@settings(max_examples=150)
@given(place=st.integers(0, len(SMALL) - 1), value=st.binary(min_size=1, max_size=8))
def test_any_change_of_a_policy_is_refused(place, value, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "fuzz.zip"
    refusal(written(path, packed({"policy.pth": patched(SMALL, place, value)})))


@settings(max_examples=150)
@given(data=st.data())
def test_any_change_of_a_program_is_refused(data, tmp_path_factory):
    records = unpacked(SMALL)
    program = records["archive/data.pkl"]
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(program) - 1))
        program = program[:place] + data.draw(st.binary(max_size=4)) + program[place + data.draw(st.integers(0, 4)) :]
    path = tmp_path_factory.getbasetemp() / "fuzz.zip"
    refusal(written(path, packed({"policy.pth": packed({**records, "archive/data.pkl": program})})))


@settings(max_examples=80)
@given(data=st.binary(max_size=300))
def test_any_bytes_are_refused(data, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "fuzz.zip"
    refusal(written(path, data))
    refusal(written(path, packed({"policy.pth": data})))
    refusal(written(path, packed({"policy.pth": torch_zip(data)})))
