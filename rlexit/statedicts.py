"""Tensors from files that a stranger may have made: zips as torch writes them, read without running anything in them.

Nothing is extracted and nothing is inflated: torch stores its members, so a compressed one is refused. The program of a
state dict is checked word for word against what `torch.save` writes (three names, no shared objects), its records are copied
into a fresh archive, and only that goes to torch's restricted loader.
"""

from __future__ import annotations

import io
import os
import pickletools
import re
import stat
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

MAX_PROGRAM_BYTES = 64 << 10
MAX_RECORDS = 4096
MAX_EXPANSION = 1.02
EXPANSION_SLACK = 64 << 10
LOCAL_HEADER_BYTES = 30

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


class ImportRefused(ValueError):
    """A file cannot be imported; the message is one line and names the file, the thing and the way out."""


@dataclass(frozen=True)
class Reader:
    """How files of one kind are read, and what a refusal advises.

    Args:
        max_bytes: of a file.
        again: advice for a file that is damaged.
        others: advice for a file of another kind.
        old: advice for a state dict as torch before 1.6 wrote it.
        max_program: bytes of a state dict's program.
        extra_opcodes: words of programs besides those of a dict of tensors, such as for numbers beside them.
        wrappers: keys under which the tensors may lie, in a dict with other things.
    """

    max_bytes: int
    again: str
    others: str
    old: str
    max_program: int = MAX_PROGRAM_BYTES
    extra_opcodes: frozenset[str] = frozenset()
    wrappers: tuple[str, ...] = ()

    def file_bytes(self, path: Path, name: str) -> bytes:
        """The bytes of a regular file that is not too large; `name` is what a refusal calls it."""
        try:
            if path.is_dir():
                raise ImportRefused(f"{name} must be a file, got a folder. Name the file in it.")
            # Before the file is opened: a pipe or a device would block or never end.
            if not path.is_file():
                raise ImportRefused(f"{name} is missing, or no regular file. Check the path.")
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size > self.max_bytes:
                    raise ImportRefused(f"{name} must have at most {self.max_bytes} bytes, got {size}. {self.others}")
                return file.read(size)
        except OSError as error:
            raise ImportRefused(
                f"{name} cannot be read ({error.strerror}). Check the path and its permissions."
            ) from error

    def members(self, data: bytes, where: str, most: int) -> tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]:
        """The members of a zip by their exact names, after every check that needs none of their bytes."""

        def refuse(thing: str) -> NoReturn:
            raise ImportRefused(f"{where} {thing}. {self.again}")

        # `ZipFile` parses the whole directory at once. Archives inside count too, so this bound is a wide one.
        if data.count(b"PK\x01\x02") > 4 * MAX_RECORDS:
            refuse(f"must have at most {most} members, got thousands")
        try:
            archive = zipfile.ZipFile(io.BytesIO(data))
        except Exception as error:
            # zipfile raises half a dozen unrelated types on forged fields; none is the caller's business.
            raise ImportRefused(f"{where} is no zip file, or was cut. {self.again}") from error
        infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
        # Not `filename`, which is the name up to the first NUL.
        members = {info.orig_filename: info for info in infos}
        if len(infos) > most:
            refuse(f"must have at most {most} members, got {len(infos)}")
        if len(members) < len(infos):
            refuse("has two members of the same name")
        end = 0
        for info in infos:
            member = f"member `{printable(info.orig_filename)}`"
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

    def content(self, archive: zipfile.ZipFile, info: zipfile.ZipInfo, where: str) -> bytes:
        """The bytes of a member, which must be stored as they are."""
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise ImportRefused(f"{where} must be stored, got it compressed. {self.again}")
        try:
            with archive.open(info) as file:
                content = file.read()
        except Exception as error:
            raise ImportRefused(f"{where} was cut or altered. {self.again}") from error
        if len(content) != info.file_size:
            raise ImportRefused(f"{where} must have {info.file_size} bytes, got {len(content)}. {self.again}")
        return content

    def state_dict(self, data: bytes, where: str) -> dict[str, Tensor]:
        """Tensors by name, from the bytes of what `torch.save` wrote.

        Raises:
            ImportRefused: it is no zip of torch's, or holds anything else than tensors by name.
        """
        if not data.startswith(b"PK\x03\x04"):
            raise ImportRefused(
                f"{where} must be a zip as torch 1.6 and later write it, got something else. {self.old}"
            )
        archive, records = self.members(data, where, MAX_RECORDS)
        contents = {}
        for record, info in records.items():
            contents[record] = self.content(archive, info, f"`{printable(record)}` of {where}")
        roots = [record.removesuffix("/data.pkl") for record in records if record.endswith("/data.pkl")]
        if len(roots) != 1:
            raise ImportRefused(f"{where} must hold one `data.pkl`, got {len(roots)}. {self.again}")
        root = f"{roots[0]}/"
        self._check_program(contents[f"{root}data.pkl"], where)
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
            raise ImportRefused(f"{where} holds no tensors that torch can read. {self.again}") from error
        state = next((state[key] for key in self.wrappers if isinstance(state, dict) and key in state), state)
        # An OrderedDict's methods can be shadowed by what its file says; dict's own cannot.
        items = list(dict.items(state)) if isinstance(state, dict) else []
        if not items or not all(isinstance(key, str) and type(value) is Tensor for key, value in items):
            raise ImportRefused(f"{where} must be a state dict of tensors, got something else. {self.again}")
        return dict(items)

    def _check_program(self, program: bytes, where: str) -> None:
        """Refuses a pickle that is not what `torch.save` writes for a state dict; reads it without running it.

        torch's own list of allowed names has `bytearray`, which takes gigabytes at a word, and lets tuples hold the same
        tuple many times, whose hash then takes for ever. Here memory and time grow with the program's length only.
        """

        def refuse(thing: str) -> NoReturn:
            raise ImportRefused(f"{where} must be a plain state dict, got {printable(thing)}. Do not trust this file.")

        if len(program) > self.max_program:
            refuse(f"a pickle of {len(program)} bytes")
        words: set[object] = set()
        previous = ""
        try:
            for opcode, argument, _ in pickletools.genops(program):
                if opcode.name not in _OPCODES | self.extra_opcodes or (opcode.name == "PROTO" and argument != 2):
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
            raise ImportRefused(f"{where} was cut or altered. {self.again}") from error


def printable(text: str) -> str:
    """A stranger's text for one line of a terminal: no line ends, no escape codes, not long."""
    kept = "".join(letter if letter.isprintable() else "?" for letter in text)
    return kept if len(kept) <= 240 else f"{kept[:120]}...{kept[-120:]}"


def listed(members: Mapping[str, object]) -> str:
    """The first few names, for one line."""
    names = ", ".join(f"`{printable(member)}`" for member in sorted(members)[:8])
    return names or "no members"
