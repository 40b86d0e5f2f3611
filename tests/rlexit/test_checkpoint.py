"""Checkpoints: whoever reads sees the old one or the new one, whole, whatever happened in between."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from rlexit import checkpoint
from rlexit.checkpoint import CheckpointError, load, load_facts, save, sha256, weights_hash


def tensors(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {
        "a.weight": torch.full((3, 4), value),
        "count": torch.tensor(7, dtype=torch.int64),
        "half": torch.tensor([0.1, 0.2], dtype=torch.bfloat16),
        "empty": torch.zeros(0, 5),
        "bytes": torch.arange(250, dtype=torch.uint8),
        "strided": torch.arange(6.0).reshape(2, 3).T,
    }


FACTS = {"step": 3, "name": "pong", "list": [1, 2.5, None, True]}


@pytest.fixture
def saved(tmp_path):
    save(tmp_path, "policy", tensors(), FACTS)
    return tmp_path


def files(folder: Path) -> set[str]:
    return set(os.listdir(folder))


# ---- round trips ----


def test_tensors_and_facts_come_back_as_they_were(saved):
    found, facts = load(saved, "policy")
    assert facts == FACTS
    assert found.keys() == tensors().keys()
    for name, value in tensors().items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)
    assert load_facts(saved, "policy") == FACTS
    assert checkpoint.exists(saved, "policy")
    assert not checkpoint.exists(saved, "teacher")


def test_a_checkpoint_is_a_manifest_and_one_file_named_by_its_hash(saved):
    digest = weights_hash(saved, "policy")
    assert files(saved) == {"policy.json", f"policy-{digest[:12]}.safetensors"}
    assert sha256((saved / f"policy-{digest[:12]}.safetensors").read_bytes()) == digest


def test_a_newer_save_replaces_the_older_and_leaves_others_alone(saved):
    save(saved, "policy2", tensors(5.0), {})
    save(saved, "policy", tensors(2.0), {"step": 4})
    assert len(files(saved)) == 4
    assert torch.equal(load(saved, "policy")[0]["a.weight"], torch.full((3, 4), 2.0))
    assert torch.equal(load(saved, "policy2")[0]["a.weight"], torch.full((3, 4), 5.0))


def test_the_same_tensors_may_be_saved_again_with_other_facts(saved):
    save(saved, "policy", tensors(), {"step": 9})
    assert load(saved, "policy")[1] == {"step": 9}
    assert len(files(saved)) == 2


def test_a_checkpoint_may_hold_facts_only(tmp_path):
    save(tmp_path / "made" / "here", "exit_policies", {}, {"x": 1})
    assert load(tmp_path / "made" / "here", "exit_policies") == ({}, {"x": 1})


def test_an_optimiser_goes_on_where_it_was(tmp_path):
    torch.manual_seed(0)
    layers = [nn.Linear(3, 2), nn.Linear(3, 2)]
    layers[1].load_state_dict(layers[0].state_dict())
    optimizers = [torch.optim.Adam(layer.parameters(), lr=0.1, fused=True) for layer in layers]

    def step(which: int) -> None:
        optimizers[which].zero_grad()
        layers[which](torch.ones(4, 3)).square().sum().backward()
        optimizers[which].step()

    for _ in range(3):
        step(0)
    packed = checkpoint.pack_optimizer(optimizers[0], "adam")
    save(tmp_path, "state", {**packed, **{f"net.{k}": v for k, v in layers[0].state_dict().items()}}, {})
    found, _ = load(tmp_path, "state")
    layers[1].load_state_dict(checkpoint.subset(found, "net"))
    checkpoint.unpack_optimizer(optimizers[1], "adam", found)
    step(0)
    step(1)
    assert torch.equal(layers[0].weight, layers[1].weight)


def test_moments_lie_in_memory_as_their_weights_do(tmp_path):
    layer = nn.Conv2d(4, 3, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(layer.parameters(), fused=True)
    layer(torch.ones(1, 4, 3, 3)).sum().backward()
    optimizer.step()
    save(tmp_path, "state", checkpoint.pack_optimizer(optimizer, "adam"), {})
    again = torch.optim.Adam(layer.parameters(), fused=True)
    checkpoint.unpack_optimizer(again, "adam", load(tmp_path, "state")[0])
    assert again.state[layer.weight]["exp_avg"].stride() == layer.weight.stride() != layer.weight.contiguous().stride()
    assert torch.equal(again.state[layer.weight]["exp_avg"], optimizer.state[layer.weight]["exp_avg"])


# ---- what is refused ----


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_not_saved_and_the_last_checkpoint_stays(saved, bad):
    before = {name: (saved / name).read_bytes() for name in files(saved)}
    with pytest.raises(ValueError, match=r"`a.weight` must be finite, got NaN or infinity"):
        save(saved, "policy", {**tensors(), "a.weight": torch.tensor([1.0, bad])}, FACTS)
    assert {name: (saved / name).read_bytes() for name in files(saved)} == before


def test_facts_that_are_not_finite_are_not_saved_and_the_last_checkpoint_stays(saved):
    with pytest.raises(ValueError, match="JSON"):
        save(saved, "policy", tensors(2.0), {"loss": math.nan})
    assert torch.equal(load(saved, "policy")[0]["a.weight"], torch.ones(3, 4))


def forge(folder: Path, **changes) -> None:
    """A manifest with changed fields and the right hash of itself."""
    path = folder / "policy.json"
    body = {key: value for key, value in json.loads(path.read_text()).items() if key != "sha256"} | changes
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    path.write_text(json.dumps({**body, "sha256": sha256(text.encode())}))


def test_nan_that_was_smuggled_into_a_checkpoint_is_not_loaded(saved):
    from safetensors.torch import save as pack

    data = pack({"a.weight": torch.tensor([1.0, math.nan])})
    name = next(name for name in files(saved) if name.endswith(".safetensors"))
    (saved / name).write_bytes(data)
    forge(saved, weights={"file": name, "sha256": sha256(data), "bytes": len(data)})
    with pytest.raises(CheckpointError, match=rf"`a.weight` in `{saved / name}` holds NaN or infinity"):
        load(saved, "policy")


def test_bytes_that_are_no_tensors_are_refused(saved):
    name = next(name for name in files(saved) if name.endswith(".safetensors"))
    (saved / name).write_bytes(b"\x80\x04cos\nsystem\n")
    data = (saved / name).read_bytes()
    forge(saved, weights={"file": name, "sha256": sha256(data), "bytes": len(data)})
    with pytest.raises(CheckpointError, match="is no safetensors file"):
        load(saved, "policy")


def test_a_newer_schema_is_refused(saved):
    forge(saved, schema_version=2)
    with pytest.raises(CheckpointError, match=r"policy.json` has schema 2, this rlexit reads up to 1. Update rlexit."):
        load(saved, "policy")


def test_weights_of_another_checkpoint_are_refused(saved):
    save(saved, "other", tensors(2.0), FACTS)
    mine = saved / f"policy-{weights_hash(saved, 'policy')[:12]}.safetensors"
    theirs = saved / f"other-{weights_hash(saved, 'other')[:12]}.safetensors"
    assert mine.stat().st_size == theirs.stat().st_size
    shutil.copy(theirs, mine)
    with pytest.raises(CheckpointError, match=rf"`{mine}` does not match its SHA-256 in the manifest"):
        load(saved, "policy")


def test_missing_files_are_named(saved, tmp_path):
    with pytest.raises(CheckpointError, match=r"absent.json` is missing"):
        load(tmp_path, "absent")
    weights = next(saved.glob("*.safetensors"))
    weights.unlink()
    with pytest.raises(CheckpointError, match=rf"`{weights}` is missing"):
        load(saved, "policy")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "..", "", "."])
def test_a_manifest_reaches_no_file_outside_its_folder(tmp_path, name):
    folder = tmp_path / "inside"
    save(folder, "policy", tensors(), FACTS)
    outside = tmp_path / "outside.safetensors"
    shutil.copy(next(folder.glob("*.safetensors")), outside)
    data = outside.read_bytes()
    forge(folder, weights={"file": name, "sha256": sha256(data), "bytes": len(data)})
    with pytest.raises(CheckpointError, match=r"is missing|no manifest"):
        load(folder, "policy")


HONEST = {"file": "policy-x.safetensors", "sha256": "0" * 64, "bytes": 5}


@pytest.mark.parametrize(
    "changes",
    [
        {"weights": "x"},
        {"weights": []},
        {"weights": {}},
        {"weights": {**HONEST, "file": 3}},
        {"weights": {**HONEST, "bytes": "many"}},
        {"weights": {**HONEST, "bytes": None}},
        {"weights": {**HONEST, "sha256": 7}},
        {"facts": [1]},
        {"facts": None},
        {"facts": {"x": math.nan}},
        {"schema_version": None},
        {"schema_version": math.inf},
        {"schema_version": "new"},
        {"schema_version": True},
        {"schema_version": 0},
    ],
)
def test_a_manifest_of_wrong_types_is_refused_by_name(saved, changes):
    forge(saved, **changes)
    with pytest.raises(CheckpointError, match=r"policy"):
        load(saved, "policy")


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "3", "{}", "[" * 100_000, '{"a":' * 100_000, "\ud800", "9" * 10_000]
)
def test_a_manifest_that_is_none_is_refused_by_name(saved, text):
    (saved / "policy.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(CheckpointError, match=r"policy.json` is cut or no manifest of rlexit"):
        load(saved, "policy")


def test_a_manifest_of_absurd_size_is_not_read(saved):
    with open(saved / "policy.json", "ab") as file:
        file.truncate(checkpoint.MAX_MANIFEST_BYTES + 1)
    with pytest.raises(CheckpointError, match="must have at most 8388608 bytes"):
        load(saved, "policy")


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_any_flipped_byte_is_refused_and_the_file_named(saved, suffix):
    path = next(saved.glob(f"policy*{suffix}"))
    data = path.read_bytes()
    generator = random.Random(0)
    places = {*range(0, len(data), max(1, len(data) // 80)), *generator.sample(range(len(data)), 20), len(data) - 1}
    for place in places:
        # A space for another space in the manifest means the same; every other change must be seen.
        for mask in (0xFF, 0x01) if data[place : place + 1].strip() else (0xFF,):
            path.write_bytes(data[:place] + bytes([data[place] ^ mask]) + data[place + 1 :])
            with pytest.raises(CheckpointError) as caught:
                load(saved, "policy")
            assert str(saved) in str(caught.value)
            assert "policy" in str(caught.value)
    path.write_bytes(data)
    assert load(saved, "policy")[1] == FACTS


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_any_truncation_or_addition_is_refused_and_the_file_named(saved, suffix):
    path = next(saved.glob(f"policy*{suffix}"))
    data = path.read_bytes()
    for length in [*range(0, len(data), max(1, len(data) // 100)), len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=str(path)):
            load(saved, "policy")
    path.write_bytes(data + b"x")
    with pytest.raises(CheckpointError, match=str(path)):
        load(saved, "policy")


# ---- the order of a save ----


class Spy:
    """Notes what a save asks of the system, and may fail at the n-th time."""

    def __init__(self, monkeypatch, fail_at: int = -1) -> None:
        self.events: list[str] = []
        self.fail_at = fail_at
        self.real = {"fsync": os.fsync, "replace": os.replace, "open": open}
        monkeypatch.setattr(os, "fsync", self.fsync)
        monkeypatch.setattr(os, "replace", self.replace)
        monkeypatch.setattr(checkpoint, "open", self.open, raising=False)

    def note(self, event: str) -> None:
        self.events.append(event)
        if len(self.events) - 1 == self.fail_at:
            raise OSError(errno.ENOSPC, "No space left on device", event)

    def fsync(self, descriptor: int) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        self.note(f"fsync {'folder' if os.path.isdir(name) else kind(name)}")
        self.real["fsync"](descriptor)

    def replace(self, source, target) -> None:
        self.note(f"rename {kind(str(target))}")
        self.real["replace"](source, target)

    def open(self, path, mode):
        self.note(f"open {kind(str(path))}")
        return Half(self.real["open"](path, mode), lambda: self.note(f"write {kind(str(path))}"))


class Half:
    """A file that writes half of the bytes, and says so, before it writes the rest."""

    def __init__(self, file, note) -> None:
        self.file, self.note = file, note

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, data):
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        self.note()
        return self.file.write(data[len(data) // 2 :])


def kind(path: str) -> str:
    return "tensors" if ".safetensors" in path else "manifest"


ORDER = [
    "open tensors", "write tensors", "fsync tensors", "rename tensors", "fsync folder",
    "open manifest", "write manifest", "fsync manifest", "rename manifest", "fsync folder",
]  # fmt: skip


def test_bytes_are_written_then_synced_then_renamed_and_the_manifest_comes_last(saved, monkeypatch):
    spy = Spy(monkeypatch)
    save(saved, "policy", tensors(2.0), FACTS)
    assert spy.events == ORDER
    assert len(files(saved)) == 2


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="file descriptors are named by /proc")
@pytest.mark.parametrize("step", range(len(ORDER)))
def test_a_full_disk_at_any_step_leaves_a_whole_checkpoint_and_no_litter(saved, monkeypatch, step):
    with monkeypatch.context() as patch:
        Spy(patch, fail_at=step)
        with pytest.raises(OSError, match="No space left"):
            save(saved, "policy", tensors(2.0), {"step": 4})
    found, facts = load(saved, "policy")
    # Once the manifest is renamed, the new checkpoint is there; the folder's fsync comes after.
    new = step > ORDER.index("rename manifest")
    assert facts == ({"step": 4} if new else FACTS)
    assert torch.equal(found["a.weight"], torch.full((3, 4), 2.0 if new else 1.0))
    assert not [name for name in files(saved) if name.endswith(".tmp")]
    save(saved, "policy", tensors(3.0), {"step": 5})
    assert load(saved, "policy")[1] == {"step": 5}
    assert len(files(saved)) == 2


# One process that forks a child per point of death: importing torch each time would take minutes.
KILLED = """
    import os, resource, signal, sys
    from pathlib import Path
    import torch
    from rlexit import checkpoint

    def state(value):
        return {"w": torch.full((2000,), float(value)), "v": torch.full((500,), float(value))}

    folder = Path(sys.argv[1])
    checkpoint.save(folder, "policy", state(1), {"value": 1})

    def child(act):
        pid = os.fork()
        if pid == 0:
            try:
                act()
            finally:
                os._exit(0)
        return os.waitpid(pid, 0)[1]

    def die_at(point):
        count = 0
        def note():
            nonlocal count
            if count == point:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
        def around(function):
            def called(*arguments, **named):
                note()
                result = function(*arguments, **named)
                note()
                return result
            return called
        real_open = open
        def opened(path, mode):
            note()
            file = real_open(path, mode)
            write = file.write
            class Slow:
                def __getattr__(self, name): return getattr(file, name)
                def __enter__(self): return self
                def __exit__(self, *error): file.close()
                def write(self, data):
                    for part in range(4):
                        write(data[len(data) * part // 4 : len(data) * (part + 1) // 4])
                        file.flush()
                        note()
            return Slow()
        def act():
            checkpoint.open = opened
            os.fsync, os.replace = around(os.fsync), around(os.replace)
            Path.unlink = around(Path.unlink)
            checkpoint.save(folder, "policy", state(2), {"value": 2})
        return act

    def report(what):
        tensors, facts = checkpoint.load(folder, "policy")
        values = {float(x) for tensor in tensors.values() for x in tensor.unique()}
        print(what, facts["value"], sorted(values))

    point = 0
    while True:
        status = child(die_at(point))
        report(f"died={os.WIFSIGNALED(status)}")
        checkpoint.save(folder, "policy", state(1), {"value": 1})
        if not os.WIFSIGNALED(status):
            break
        point += 1

    def full_disk():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
        try:
            checkpoint.save(folder, "policy", state(2), {"value": 2})
        except OSError as error:
            os._exit(error.errno)

    errno = os.waitstatus_to_exitcode(child(full_disk))
    report(f"errno={errno}")
    print("litter", sorted(path.suffix for path in folder.iterdir() if str(os.getpid()) not in path.name
                           and path.suffix != ".tmp"))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_kill_9_at_any_point_of_a_save_leaves_the_old_or_the_new_checkpoint_never_a_mix(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(textwrap.dedent(KILLED))
    root = Path(checkpoint.__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "made")],
        capture_output=True, text=True, timeout=300, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *deaths, full_disk, litter = done.stdout.splitlines()
    old, new = "1 [1.0]", "2 [2.0]"
    assert len(deaths) >= 20
    assert deaths[-1] == f"died=False {new}"
    found = [line.removeprefix("died=True ") for line in deaths[:-1]]
    # First the old one at every point, then, from the rename of the manifest on, the new one.
    assert found == [old] * found.count(old) + [new] * found.count(new)
    assert found.count(old) >= 15
    assert found.count(new) >= 3
    assert full_disk == f"errno={errno.EFBIG} {old}"
    assert litter == "litter ['.json', '.safetensors']"
