"""Import of actors that stable-baselines3 or the RL Zoo saved, from files that a stranger may have made.

One member of the zip is read, `policy.pth`; `data` and all others, where SB3 puts pickled objects, are never opened.
Nothing is extracted and nothing is inflated: SB3 and torch store their members, so a compressed one is refused.
The program in `policy.pth` is checked word for word against what `torch.save` writes for a state dict (three names,
no shared objects), its records are copied into a fresh archive, and only that goes to torch's restricted loader.
"""

from __future__ import annotations

import io
import os
import pickletools
import re
import stat
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from agents.config import EnvConfig
from agents.envs import AtariVecEnv, protocol
from agents.teacher import TEACHER
from rlexit import checkpoint

WEIGHTS = "policy.pth"
MAX_FILE_BYTES = 64 << 20
MAX_WEIGHTS_BYTES = 32 << 20
MAX_PROGRAM_BYTES = 64 << 10
MAX_MEMBERS = 64
MAX_RECORDS = 4096
MAX_EXPANSION = 1.02
EXPANSION_SLACK = 64 << 10
LOCAL_HEADER_BYTES = 30

_OTHERS = "Only `CnnPolicy` actors of PPO and A2C can be imported; train one with SB3, or here with `rlexit train`."
_SAVE_AGAIN = "Get the file again, or save it again with SB3's `model.save`."

# What 109 zips of the RL Zoo (SB3 1.0 to 2.4) and today's `torch.save` use, and the other dtypes' storages.
_GLOBALS = frozenset(
    {"collections OrderedDict", "torch._utils _rebuild_tensor_v2"}
    | {f"torch {kind}Storage" for kind in ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Byte", "Bool")}
)
_OPCODES = frozenset(
    {"PROTO", "STOP", "GLOBAL", "REDUCE", "BUILD", "BINPERSID", "MARK", "BINPUT", "LONG_BINPUT", "BINGET"}
    | {"LONG_BINGET", "BINUNICODE", "BININT", "BININT1", "BININT2", "NEWFALSE", "NEWTRUE", "EMPTY_DICT"}
    | {"SETITEM", "SETITEMS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}
)
_STORAGE = re.compile(r"data/[0-9]{1,20}")

_FOREIGN = (
    ("q_net", "a DQN"),
    ("quantile_net", "a QR-DQN"),
    ("lstm_", "a recurrent policy"),
    ("features_extractor.extractors.", "a multi-input policy"),
    ("log_std", "a policy with continuous actions"),
    ("actor.", "an SAC, TD3 or DDPG"),
    ("critic.", "an SAC, TD3 or DDPG"),
)
_HIDDEN = "a policy with hidden layers behind its features, `net_arch`"
_ALIASES = ("pi_features_extractor.", "vf_features_extractor.")
_SHAPES: dict[str, tuple[int | str, ...]] = {
    "features_extractor.cnn.0.weight": (32, 4, 8, 8),
    "features_extractor.cnn.0.bias": (32,),
    "features_extractor.cnn.2.weight": (64, 32, 4, 4),
    "features_extractor.cnn.2.bias": (64,),
    "features_extractor.cnn.4.weight": (64, 64, 3, 3),
    "features_extractor.cnn.4.bias": (64,),
    "features_extractor.linear.0.weight": (512, 3136),
    "features_extractor.linear.0.bias": (512,),
    "action_net.weight": ("actions", 512),
    "action_net.bias": ("actions",),
    "value_net.weight": (1, 512),
    "value_net.bias": (1,),
}


class ImportRefused(ValueError):
    """A file cannot be imported; the message is one line and names the file, the thing and the way out."""


def import_sb3(path: Path, folder: Path, env_config: EnvConfig) -> Path:
    """Saves the actor in an SB3 zip as the teacher of `folder`; returns its manifest.

    What the actor was trained on is not in the weights: the game is the caller's word, as is `normalize_images`,
    which must be SB3's default (frames divided by 255).

    Args:
        path: what `model.save` of PPO or A2C wrote.
        folder: run folder of the teacher, made if missing.
        env_config: the protocol that the teacher will be played under.

    Raises:
        ImportRefused: see `read_sb3_policy`; or the game has another number of actions. Nothing is written.
        LookupError: ale-py has no such game.
        OSError: the disk is full or not writable.
    """
    tensors, digest = _read(path)
    games = AtariVecEnv(env_config, 1, training=False)
    games.close()
    meanings = games.action_meanings
    name, game = _printable(str(path)), env_config.game
    actions = len(tensors["action_net.bias"])
    if actions != len(meanings):
        raise ImportRefused(
            f"`{name}` must have the {len(meanings)} actions of `{game}`, got {actions}. Name the game that it was "
            "trained on, or set `env.full_action_space` as in its training."
        )
    return checkpoint.save(
        folder,
        TEACHER,
        tensors,
        {
            "env": asdict(env_config),
            "protocol": protocol(env_config),
            "action_meanings": meanings,
            "seed": None,
            "env_steps": None,
            "source": {"kind": "sb3", "file": _printable(path.name), "sha256": digest},
        },
    )


def read_sb3_policy(path: Path) -> dict[str, Tensor]:
    """The weights of a PPO or A2C `CnnPolicy` (NatureCNN, discrete actions) in an SB3 zip.

    Returns:
        SB3's state-dict keys to float32 on the CPU, each tensor once and with memory of its own.

    Raises:
        ImportRefused: the file is missing, cut, altered, too large, no such zip, or holds another kind of policy,
            other shapes, another dtype, NaN or infinity. Nothing in the file was run.
    """
    return _read(path)[0]


def _read(path: Path) -> tuple[dict[str, Tensor], str]:
    name = f"`{_printable(str(path))}`"
    data = _file_bytes(path, name)
    archive, members = _members(data, name, MAX_MEMBERS)
    if WEIGHTS not in members:
        raise ImportRefused(f"{name} must hold `{WEIGHTS}`, got {_listed(members)}. {_SAVE_AGAIN}")
    where = f"`{WEIGHTS}` in {name}"
    size = members[WEIGHTS].file_size
    if size > MAX_WEIGHTS_BYTES:
        raise ImportRefused(f"{where} must have at most {MAX_WEIGHTS_BYTES} bytes, got {size}. {_OTHERS}")
    state = _state_dict(_content(archive, members[WEIGHTS], where), where)
    return _nature_actor(state, where), checkpoint.sha256(data)


def _file_bytes(path: Path, name: str) -> bytes:
    try:
        if path.is_dir():
            raise ImportRefused(f"{name} must be a file, got a folder. Name the zip in it.")
        # Before the file is opened: a pipe or a device would block or never end.
        if not path.is_file():
            raise ImportRefused(f"{name} is missing, or no regular file. Check the path.")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_FILE_BYTES:
                raise ImportRefused(f"{name} must have at most {MAX_FILE_BYTES} bytes, got {size}. {_OTHERS}")
            return file.read(size)
    except OSError as error:
        raise ImportRefused(f"{name} cannot be read ({error.strerror}). Check the path and its permissions.") from error


def _members(data: bytes, where: str, most: int) -> tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]:
    """The members of a zip by their exact names, after every check that needs none of their bytes."""

    def refuse(thing: str) -> NoReturn:
        raise ImportRefused(f"{where} {thing}. {_SAVE_AGAIN}")

    # `ZipFile` parses the whole directory at once. Archives inside count too, so this bound is a wide one.
    if data.count(b"PK\x01\x02") > 4 * MAX_RECORDS:
        refuse(f"must have at most {most} members, got thousands")
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
    except Exception as error:
        # zipfile raises half a dozen unrelated types on forged fields; none is the caller's business.
        raise ImportRefused(f"{where} is no zip file, or was cut. {_SAVE_AGAIN}") from error
    infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    # Not `filename`, which is the name up to the first NUL.
    members = {info.orig_filename: info for info in infos}
    if len(infos) > most:
        refuse(f"must have at most {most} members, got {len(infos)}")
    if len(members) < len(infos):
        refuse("has two members of the same name")
    end = 0
    for info in infos:
        member = f"member `{_printable(info.orig_filename)}`"
        if info.flag_bits & 0x1:
            refuse(f"has an encrypted {member}")
        if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
            refuse(f"has a {member} that is a link or a device")
        if info.header_offset < end:
            refuse(f"has a {member} that overlaps another")
        end = info.header_offset + LOCAL_HEADER_BYTES + info.compress_size
    expanded = sum(info.file_size for info in infos)
    if end > len(data) or expanded > len(data) * MAX_EXPANSION + EXPANSION_SLACK:
        refuse(f"must expand to at most its own {len(data)} bytes, got {expanded}")
    return archive, members


def _content(archive: zipfile.ZipFile, info: zipfile.ZipInfo, where: str) -> bytes:
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise ImportRefused(f"{where} must be stored, got it compressed. {_SAVE_AGAIN}")
    try:
        with archive.open(info) as file:
            content = file.read()
    except Exception as error:
        raise ImportRefused(f"{where} was cut or altered. {_SAVE_AGAIN}") from error
    if len(content) != info.file_size:
        raise ImportRefused(f"{where} must have {info.file_size} bytes, got {len(content)}. {_SAVE_AGAIN}")
    return content


def _state_dict(data: bytes, where: str) -> dict[str, Tensor]:
    if not data.startswith(b"PK\x03\x04"):
        raise ImportRefused(
            f"{where} must be a zip as torch 1.6 and later write it, got something else. Load the model with a recent "
            "SB3 (only if you trust its maker: SB3 unpickles) and save it again."
        )
    archive, records = _members(data, where, MAX_RECORDS)
    contents = {}
    for record, info in records.items():
        contents[record] = _content(archive, info, f"`{_printable(record)}` of {where}")
    roots = [record.removesuffix("/data.pkl") for record in records if record.endswith("/data.pkl")]
    if len(roots) != 1:
        raise ImportRefused(f"{where} must hold one `data.pkl`, got {len(roots)}. {_SAVE_AGAIN}")
    root = f"{roots[0]}/"
    _check_program(contents[f"{root}data.pkl"], where)
    # torch finds and reads records by a zip reader of its own, which need not see what was checked above, and checks
    # no sums. In this copy there is nothing else to see.
    copy = io.BytesIO()
    with zipfile.ZipFile(copy, "w") as writer:
        writer.writestr("archive/data.pkl", contents[f"{root}data.pkl"])
        writer.writestr("archive/version", "3\n")
        if contents.get(f"{root}byteorder") in (b"little", b"big"):
            writer.writestr("archive/byteorder", contents[f"{root}byteorder"])
        for record, content in contents.items():
            if record.startswith(root) and _STORAGE.fullmatch(record, len(root)):
                writer.writestr(f"archive/{record.removeprefix(root)}", content)
    copy.seek(0)
    try:
        state = torch.load(copy, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch's own message advises to load without `weights_only`.
        raise ImportRefused(f"{where} holds no tensors that torch can read. {_SAVE_AGAIN}") from error
    # An OrderedDict's methods can be shadowed by what its file says; dict's own cannot.
    items = list(dict.items(state)) if isinstance(state, dict) else []
    if not items or not all(isinstance(key, str) and type(value) is Tensor for key, value in items):
        raise ImportRefused(f"{where} must be a state dict of tensors, got something else. {_SAVE_AGAIN}")
    return dict(items)


def _check_program(program: bytes, where: str) -> None:
    """Refuses a pickle that is not what `torch.save` writes for a state dict; reads it without running it.

    torch's own list of allowed names has `bytearray`, which takes gigabytes at a word, and lets tuples hold the same
    tuple many times, whose hash then takes for ever. Here memory and time grow with the program's length only.
    """

    def refuse(thing: str) -> NoReturn:
        raise ImportRefused(f"{where} must be a plain state dict, got {_printable(thing)}. Do not trust this file.")

    if len(program) > MAX_PROGRAM_BYTES:
        refuse(f"a pickle of {len(program)} bytes")
    words: set[object] = set()
    previous = ""
    try:
        for opcode, argument, _ in pickletools.genops(program):
            if opcode.name not in _OPCODES or (opcode.name == "PROTO" and argument != 2):
                refuse(f"the pickle instruction {opcode.name}")
            if opcode.name == "GLOBAL" and argument not in _GLOBALS:
                refuse(f"the name {str(argument).replace(' ', '.')}")
            if opcode.name in ("BINGET", "LONG_BINGET") and argument not in words:
                refuse("an object that is used twice")
            if opcode.name in ("BINPUT", "LONG_BINPUT"):
                words.discard(argument)
                words |= {argument} if previous in ("GLOBAL", "BINUNICODE") else set()
            else:
                previous = opcode.name
    except ImportRefused:
        raise
    except Exception as error:
        raise ImportRefused(f"{where} was cut or altered. {_SAVE_AGAIN}") from error


def _nature_actor(state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The twelve tensors of SB3's `CnnPolicy`, or a refusal that says what else this is."""
    cnn = any(key.startswith("features_extractor.") for key in state)
    for start, kind in (*_FOREIGN, ("mlp_extractor.", _HIDDEN if cnn else "an `MlpPolicy`")):
        found = next((key for key in state if key.startswith(start)), None)
        if found:
            raise ImportRefused(f"{where} is {kind} (it has `{_printable(found)}`). {_OTHERS}")
    sizes: dict[str, int] = {}
    actor = {}
    for key, shape in _SHAPES.items():
        if key not in state:
            raise ImportRefused(f"{where} is no NatureCNN (it has no `{key}`). {_OTHERS}")
        _check_tensor(key, state[key], shape, sizes, where)
        actor[key] = state[key].detach().clone()
    for key, value in state.items():
        if key in actor:
            continue
        alias = next((key.removeprefix(start) for start in _ALIASES if key.startswith(start)), "")
        own = f"features_extractor.{alias}"
        if own not in actor:
            raise ImportRefused(f"{where} has `{_printable(key)}`, which no NatureCNN `CnnPolicy` has. {_OTHERS}")
        _check_tensor(key, value, _SHAPES[own], sizes, where)
        if not torch.equal(value, actor[own]):
            raise ImportRefused(
                f"`{key}` of {where} differs from `{own}`: actor and critic see by nets of their own. "
                "Only `share_features_extractor=True`, SB3's default, can be imported; train so."
            )
    return actor


def _check_tensor(key: str, tensor: Tensor, shape: tuple[int | str, ...], sizes: dict[str, int], where: str) -> None:
    got = tuple(tensor.shape)
    fits = len(got) == len(shape) and all(
        size > 0 and size == (sizes.setdefault(want, size) if isinstance(want, str) else want)
        for size, want in zip(got, shape, strict=True)
    )
    if not fits:
        wanted = "(" + ", ".join(str(sizes.get(str(want), want)) for want in shape) + ")"
        raise ImportRefused(f"`{key}` of {where} must have NatureCNN's shape {wanted}, got {got}. {_OTHERS}")
    if tensor.dtype != torch.float32:
        raise ImportRefused(f"`{key}` of {where} must be float32, got {tensor.dtype}. {_SAVE_AGAIN}")
    # A view with stride 0 claims terabytes that the file does not hold.
    if tensor.layout != torch.strided or not tensor.is_contiguous():
        raise ImportRefused(f"`{key}` of {where} must be contiguous. {_SAVE_AGAIN}")
    if not bool(torch.isfinite(tensor).all()):
        raise ImportRefused(f"`{key}` of {where} must be finite, got NaN or infinity. Take an earlier save of it.")


def _printable(text: str) -> str:
    """A stranger's text for one line of a terminal: no line ends, no escape codes, not long."""
    kept = "".join(letter if letter.isprintable() else "?" for letter in text)
    return kept if len(kept) <= 240 else f"{kept[:120]}...{kept[-120:]}"


def _listed(members: Mapping[str, object]) -> str:
    names = ", ".join(f"`{_printable(member)}`" for member in sorted(members)[:8])
    return names or "no members"
