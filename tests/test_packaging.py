"""What is shipped: names, versions, files, and rules that hold for every module of the three packages."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest

import agents
import rlexit
import vision
from rlexit.resources import config_files

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("rlexit", "agents", "vision")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MAX_LINES = 400

# Modules that run code when they load data, or that write such data.
PICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {"print", "eval", "exec", "compile", "breakpoint"}
FORBIDDEN_MEMBERS = {
    "yaml.load": "it builds any object; yaml.safe_load does not",
    "yaml.load_all": "it builds any object; yaml.safe_load_all does not",
    "yaml.unsafe_load": "it builds any object; yaml.safe_load does not",
    "yaml.full_load": "it builds any object; yaml.safe_load does not",
    "torch.save": "it pickles; rlexit.checkpoint does not",
    "torch.load": "it may unpickle; only statedicts.py may read foreign files",
    "torch.utils.tensorboard": "rlexit.runlog is the one writer",
}
ALLOWED = {
    ("rlexit/statedicts.py", "torch.load"),
    ("rlexit/runlog.py", "torch.utils.tensorboard"),
}


def dotted(node: ast.expr) -> str:
    """`torch.load` of the expression torch.load; empty for anything but names joined by dots."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        owner = dotted(node.value)
        return f"{owner}.{node.attr}" if owner else ""
    return ""


def named_in(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a module imports or reaches through an import, aliases resolved."""
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for item in node.names:
                yield node.lineno, item.name
                aliases[item.asname or item.name.partition(".")[0]] = (
                    item.name if item.asname else item.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.lineno, node.module
            for item in node.names:
                yield node.lineno, f"{node.module}.{item.name}"
                aliases[item.asname or item.name] = f"{node.module}.{item.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (name := dotted(node)):
            first, _, rest = name.partition(".")
            if first in aliases:
                yield node.lineno, f"{aliases[first]}.{rest}"


def faults(name: str, source: str) -> list[str]:
    """Everything in a module that library code must not have, one line each."""
    tree = ast.parse(source)
    found: dict[str, None] = {}
    for node in ast.walk(tree):
        where = f"{name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Assert):
            found[f"{where} assert: raise an error that says what to do"] = None
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS:
            found[f"{where} {node.func.id}()"] = None
        if isinstance(node, ast.Call) and any(
            word.arg == "allow_pickle" and not (isinstance(word.value, ast.Constant) and word.value.value is False)
            for word in node.keywords
        ):
            found[f"{where} allow_pickle: such a file may run code"] = None
        if (
            isinstance(node, ast.Call)
            and dotted(node.func) == "torch.load"
            and not any(
                word.arg == "weights_only" and isinstance(word.value, ast.Constant) and word.value.value is True
                for word in node.keywords
            )
        ):
            found[f"{where} torch.load without weights_only=True"] = None
    for line, full in named_in(tree):
        if full.partition(".")[0] in PICKLES:
            found[f"{name}:{line} {full}: such a file may run code"] = None
        for member, reason in FORBIDDEN_MEMBERS.items():
            if (full == member or full.startswith(member + ".")) and (name, member) not in ALLOWED:
                found[f"{name}:{line} {member}: {reason}"] = None
    return list(found)


def test_the_three_names_belong_to_this_distribution_alone():
    owners = importlib.metadata.packages_distributions()
    assert {package: set(owners.get(package, ())) for package in PACKAGES} == {
        package: {"rlexit"} for package in PACKAGES
    }


def test_the_three_packages_are_imported_from_one_place():
    homes = {Path(str(package.__file__)).resolve().parents[1] for package in (rlexit, agents, vision)}
    assert len(homes) == 1


def test_version_of_the_code_is_the_version_of_the_distribution():
    assert rlexit.__version__ == importlib.metadata.version("rlexit")


def test_constraints_satisfy_the_requirements_of_the_core_and_of_dev():
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = [Requirement(text) for text in project["dependencies"] + project["optional-dependencies"]["dev"]]
    unmet = [str(need) for need in needed if not need.specifier.contains(pins.get(canonicalize_name(need.name), "0"))]
    unpinned = [need.name for need in needed if canonicalize_name(need.name) not in pins]
    assert (unmet, unpinned) == ([], [])


def test_torch_is_pinned_exactly_and_without_a_local_version():
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert re.search(r"^torch==\d+\.\d+\.\d+$", text, re.MULTILINE)


def test_every_config_lies_below_a_domain_and_is_found():
    in_the_tree = set((ROOT / "configs").rglob("*.y*ml"))
    assert set(config_files().values()) == in_the_tree


def test_every_folder_of_code_is_a_package():
    folders = {path.parent for path in MODULES}
    assert [folder for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_module_says_what_it_is_and_is_short(path):
    source = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(source)), "has no docstring"
    assert len(source.splitlines()) <= MAX_LINES, "split it by idea"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_library_code_has_no_assert_print_pickle_or_eval(path):
    assert faults(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "assert x",
        "print('x')",
        "eval('1')",
        "exec('1')",
        "import pickle",
        "from pickle import loads",
        "import pickle as p",
        "import yaml\nyaml.load(text)",
        "from yaml import load",
        "import torch\ntorch.load(path, weights_only=True)",
        "import torch as t\nt.load(path, weights_only=True)",
        "from torch import load",
        "import torch\ntorch.save(x, path)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "from torch.utils.tensorboard import SummaryWriter",
    ],
)
def test_the_lint_finds_what_it_looks_for(source):
    assert faults("rlexit/anything.py", source)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("rlexit/anything.py", "network.eval()\nimport yaml\nyaml.safe_load(text)\nimport re\nre.compile('x')"),
        ("rlexit/anything.py", "import numpy as np\nnp.load(path, allow_pickle=False)"),
        ("rlexit/runlog.py", "from torch.utils.tensorboard import SummaryWriter"),
        ("rlexit/statedicts.py", "import torch\ntorch.load(path, weights_only=True)"),
    ],
)
def test_the_lint_lets_honest_code_pass(name, source):
    assert faults(name, source) == []


def test_types_of_the_core_are_checked_at_every_call_in_tests():
    with pytest.raises(jaxtyping.TypeCheckError):
        config_files("configs")  # type: ignore[arg-type]


def test_foreign_weights_must_be_loaded_as_weights_only():
    assert faults("rlexit/statedicts.py", "import torch\ntorch.load(path)") != []


def test_help_answers_without_importing_torch():
    program = (
        "import sys\n"
        "sys.argv = ['rlexit', '--help']\n"
        "from rlexit.cli import main\n"
        "try:\n"
        "    code = main()\n"
        "except SystemExit as stop:\n"
        "    code = stop.code\n"
        "heavy = {'torch', 'stable_baselines3', 'gymnasium', 'ale_py', 'matplotlib', 'scipy', 'tensorboard'}\n"
        "sys.stderr.write(f'code={code or 0} heavy={sorted(heavy & set(sys.modules))}')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stderr.splitlines()[-1] == "code=0 heavy=[]", done.stderr
    assert "usage: rlexit" in done.stdout.lower()
