"""From a name and the shell's words to a typed config; the only place that knows jsonargparse."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import yaml

from rlexit.config import CoreConfig
from rlexit.registry import unknown
from rlexit.resources import CONFIG, config_files

DOMAINS = ("agents", "vision")
MAX_CONFIG_BYTES = 256 << 10
MAX_DEPTH = 20


@dataclass(frozen=True)
class Place:
    """What a NAME stands for.

    Args:
        file: the config to start from.
        root: folder of the run, `<out>/<name>`.
        methods: the one method that a deeper folder names, or ().
        seed: the seed that a deeper folder names, or 0.
    """

    file: Path
    root: Path
    methods: tuple[str, ...] = ()
    seed: int = 0


class Parser(argparse.ArgumentParser):
    """Complains by ValueError, so that a misspelt command is answered with one line like any other bad input.

    `flags` are its own options; every other one is a setting.
    """

    flags: frozenset[str] = frozenset()

    def add_argument(self, *names: Any, **rules: Any) -> argparse.Action:
        """Adds an option or argument, as argparse does, and remembers its flags."""
        action = super().add_argument(*names, **rules)
        self.flags = self.flags.union(action.option_strings)
        return action

    def error(self, message: str) -> NoReturn:
        """Raises ValueError with argparse's complaint."""
        raise ValueError(f"{message}. `{self.prog} --help` shows the usage.")


def locate(name: str, out: Path) -> Place:
    """Finds a config that comes with rlexit, a YAML file, or a run folder (or one method's folder in it).

    Raises:
        LookupError: there is no such config; names the nearest.
        FileNotFoundError: the folder holds no run.
    """
    known = config_files()
    if name in known:
        return Place(known[name], out / name)
    path = Path(name)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return Place(path, out / path.stem)
    if not path.is_dir():
        raise unknown("NAME", name, known)
    for depth, root in enumerate([path, *path.absolute().parents][:3]):
        if (root / CONFIG).is_file():
            parts = path.absolute().relative_to(root.absolute()).parts
            seed = int(parts[1][1:]) if depth > 1 and re.fullmatch(r"s\d+", parts[1]) else 0
            methods = (parts[0],) if parts and parts[0] != "teacher" else ()
            return Place(root / CONFIG, root, methods, seed)
    raise FileNotFoundError(f"`{path}` must be a run folder, got one without `{CONFIG}`. Give a config's name.")


def resolve(place: Place, words: Sequence[str]) -> CoreConfig:
    """The typed config: the place's file, then `--config` files and names, then single settings, in order.

    Raises:
        ValueError: an unknown key (the nearest valid one is named), a wrong type, a value out of range.
    """
    from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser  # type: ignore[attr-defined]

    files = config_files()
    kind = _kind(_read(place.file), place.file)
    keys = _keys(kind)
    arguments = ["--config", str(place.file), *_prepared(words, keys, files)]
    for path in (Path(value) for flag, value in pairwise(arguments) if flag == "--config"):
        _check_keys(_read(path), keys, path)
    parser = ArgumentParser(prog="rlexit", exit_on_error=False, add_help=False)
    parser.add_argument("--config", action=ActionConfigFile)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parser.add_class_arguments(kind, nested_key=None)
        try:
            parsed = parser.parse_args(arguments)
            made = parser.instantiate(parsed)
        except ArgumentError as error:
            raise ValueError(_explain(str(error), keys)) from error
    config: CoreConfig = kind(
        **{field.name: made[field.name] for field in dataclasses.fields(kind) if field.name in made}
    )
    return config


def to_yaml(config: CoreConfig) -> str:
    """A config as YAML that `--config` reads back."""
    text: str = yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False)
    return text


def _kind(content: dict[str, Any], path: Path) -> type[CoreConfig]:
    domain = content.get("domain")
    if domain not in DOMAINS:
        raise ValueError(
            f"`domain` in `{path.name}` must be one of {', '.join(DOMAINS)}, got {domain!r}. "
            "Give a preset after a config's name: NAME --config PRESET."
        )
    kind: type[CoreConfig] = import_module(f"{domain}.config").CONFIG
    return kind


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"`--config` must be a file or a config's name, got {str(path)!r}.")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ValueError(f"`{path}` must have at most {MAX_CONFIG_BYTES} bytes, got {path.stat().st_size}.")
    try:
        text = path.read_text(encoding="utf-8")
        _check_tokens(text, path)
        content = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"`{path}` is no YAML that rlexit reads: {str(error).splitlines()[0]}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"`{path}` must hold settings by name, got {type(content).__name__}.")
    strange = [key for key in content if not isinstance(key, str)]
    if strange:
        raise ValueError(f"`{strange[0]!r}` in `{path.name}` is no setting. `--print_config` shows all settings.")
    return {str(key): value for key, value in content.items()}


def _check_tokens(text: str, path: Path) -> None:
    """Refuses, before anything is built, what makes a few bytes many and what takes a parser minutes."""
    depth = 0
    for token in yaml.scan(text):
        if isinstance(token, (yaml.AnchorToken, yaml.AliasToken)):
            raise ValueError(f"`{path}` must hold no YAML anchors or aliases. Write the values out.")
        kind = type(token).__name__
        depth += kind.endswith("StartToken") - kind.endswith("EndToken")
        if depth > MAX_DEPTH:
            raise ValueError(f"`{path}` must nest at most {MAX_DEPTH} levels deep, got more. Write it flatter.")


def _keys(kind: type[Any], prefix: str = "") -> dict[str, Any]:
    """Dotted names of all settings with their defaults (or MISSING)."""
    found: dict[str, Any] = {}
    hints = _hints(kind)
    for field in dataclasses.fields(kind):
        name, hint = f"{prefix}{field.name}", hints[field.name]
        if dataclasses.is_dataclass(hint):
            found |= _keys(hint, f"{name}.")  # type: ignore[arg-type]
        else:
            found[name] = field.default
    return found


def _hints(kind: type[Any]) -> dict[str, Any]:
    import typing

    return typing.get_type_hints(kind)


def _check_keys(content: dict[Any, Any], keys: dict[str, Any], path: Path, prefix: str = "") -> None:
    for key, value in content.items():
        name = f"{prefix}{key}"
        if name in keys:
            continue
        if isinstance(value, dict) and any(known.startswith(f"{name}.") for known in keys):
            _check_keys(value, keys, path, f"{name}.")
            continue
        raise ValueError(f"`{name}` in `{path.name}` is no setting.{_nearest(name, keys)}")


def _prepared(words: Sequence[str], keys: dict[str, Any], files: dict[str, Path]) -> list[str]:
    """Files first, whatever their place; single values of lists and powers of ten as the parser reads them."""
    configs: list[str] = []
    prepared: list[str] = []
    pending: str | None = None
    for word in words:
        if pending is None and word.startswith("--"):
            flag, equals, value = word.partition("=")
            name = flag[2:]
            if name != "config" and name not in keys:
                raise ValueError(f"`{flag}` is no setting.{_nearest(name, keys, '--')}")
            if not equals:
                pending = name
                continue
        elif pending is not None:
            name, value = pending, word
            pending = None
        else:
            raise ValueError(f"`{word}` was not expected here. Settings are given as --section.key value.")
        if name == "config":
            configs += ["--config", str(files.get(value, value))]
        else:
            prepared += [f"--{name}", _spell(value, keys[name])]
    if pending is not None:
        raise ValueError(f"`--{pending}` needs a value, got none.")
    return configs + prepared


def _spell(value: str, default: Any) -> str:
    if isinstance(default, int) and re.fullmatch(r"\d+(\.\d+)?[eE]\+?\d+", value) and float(value).is_integer():
        return str(int(float(value)))
    if isinstance(default, float) and re.fullmatch(r"[+-]?(nan|inf)", value, re.IGNORECASE):
        return re.sub(r"(?i)(nan|inf)", r".\1", value)
    if isinstance(default, tuple) and not value.startswith("["):
        return f"[{value}]"
    return value


def _nearest(name: str, keys: dict[str, Any], dashes: str = "") -> str:
    last = {key.rsplit(".", 1)[-1]: key for key in keys}
    near = difflib.get_close_matches(name, keys, n=1, cutoff=0.6)
    near = near or [last[match] for match in difflib.get_close_matches(name.rsplit(".", 1)[-1], last, n=1, cutoff=0.6)]
    return f" Did you mean `{dashes}{near[0]}`?" if near else " `--print_config` shows all settings."


def _explain(message: str, keys: dict[str, Any]) -> str:
    found = re.search(r'Parser key "([^"]+)":?\s*(.*)', message, re.DOTALL)
    if not found:
        return message
    name, detail = found.group(1), re.sub(r"\s+", " ", found.group(2)).strip()
    detail = re.sub(r"<class '(\w+)'>", r"\1", detail)
    expected = re.search(r"Expected an? (\w+)\.? Got value: (.*)", detail)
    if expected:
        return f"`{name}` must be of type {expected.group(1)}, got {expected.group(2).strip()!r}."
    return f"`{name}`: {detail}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (tuple, list)) else value
