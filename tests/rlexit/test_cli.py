from __future__ import annotations

import errno
import fcntl
import os
import pickle
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml

from rlexit import checkpoint, desk, settings
from rlexit.cli import VERBS, main, one_line
from rlexit.domain import Watch
from rlexit.interrupts import Stopped
from rlexit.rows import read_rows
from rlexit.settings import Place, locate, resolve
from tests.rlexit import toy_domain as toy
from tests.rlexit.toy_domain import files

ROOT = Path(__file__).resolve().parents[2]


class Answer(NamedTuple):
    code: int
    out: str
    err: str


Say = Callable[..., Answer]


@pytest.fixture
def say(monkeypatch, tmp_path, capsys) -> Say:
    """Runs the command line in an empty folder that holds the toy's config."""
    toy.register(monkeypatch)
    monkeypatch.chdir(tmp_path)
    Path("toy.yaml").write_text(toy.YAML, encoding="utf-8")

    def run(*words: str) -> Answer:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["rlexit", *words])
        code = main(words)
        out, err = capsys.readouterr()
        return Answer(code, out, err)

    return run


def refused(answer: Answer) -> str:
    """The one line on stderr, after the checks that hold for every refusal."""
    assert answer.code == 2, answer
    assert answer.err.startswith("rlexit: ")
    assert answer.err.endswith("\n")
    assert answer.err.count("\n") == 1, answer.err
    assert "Traceback" not in answer.out + answer.err
    return answer.err.removeprefix("rlexit: ").strip()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The `runs` folder after `rlexit run toy.yaml`."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        toy.register(patch)
        patch.chdir(home)
        Path("toy.yaml").write_text(toy.YAML, encoding="utf-8")
        assert main(["run", "toy.yaml", "--threads", "1"]) == 0
    return home / "runs"


@pytest.fixture
def runs(finished, tmp_path, say) -> Path:
    """A copy of it where the command line works."""
    for name, data in files(finished).items():
        path = tmp_path / "runs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "runs"


# ---- what works ----


def test_run_leaves_every_artefact_of_the_run_folder(finished):
    made = {path.relative_to(finished / "toy").as_posix() for path in (finished / "toy").rglob("*")}
    assert {
        "config.yaml",
        "teacher/teacher.json",
        "teacher/eval/episodes.csv",
        "ztw/s0/policy.json",
        "ztw/s0/exit_policies.json",
        "ztw/s0/eval/episodes.csv",
        "ztw/s0/eval/latency.csv",
        "ztw/s0/video/ep0.webp",
        "static/s0/policy.json",
        "static/s0/eval/episodes.csv",
        "report/report.html",
        "report/report.md",
        "report/report.csv",
    } <= made


def test_a_second_run_changes_nothing_but_the_report(say, runs):
    def lasting() -> dict[str, bytes]:
        return {name: data for name, data in files(runs).items() if "/report/" not in name}

    before = lasting()
    answer = say("run", "toy.yaml", "--threads", "1")
    assert answer.code == 0
    assert answer.out.count("done already") == 6
    assert lasting() == before


def test_a_run_goes_on_from_its_folder_and_prints_tables_and_paths(say, runs):
    answer = say("evaluate", "runs/toy", "--threads", "1")
    assert answer.code == 0
    assert answer.err == ""
    assert "target_macs=0.8" in answer.out
    assert f"report     {Path('runs/toy/report/report.html')}" in answer.out
    assert "tensorboard --logdir runs/toy" in answer.out


def test_the_folder_of_one_method_and_seed_names_just_that(say, runs):
    for path in (runs / "toy" / "ztw" / "s0").rglob("*"):
        path.unlink() if path.is_file() else None
    before = files(runs / "toy" / "static")
    answer = say("distill", "runs/toy/ztw/s0", "--threads", "1")
    assert answer.code == 0
    assert checkpoint.exists(runs / "toy" / "ztw" / "s0", "policy")
    assert files(runs / "toy" / "static") == before


def test_two_seeds_make_two_folders_of_one_method(say, runs):
    answer = say("distill", "toy.yaml", "--methods", "sdn", "--seeds", "0", "1", "--threads", "1")
    assert (answer.code, answer.err) == (0, "")
    hashes = {checkpoint.weights_hash(runs / "toy" / "sdn" / f"s{seed}", "policy") for seed in (0, 1)}
    assert len(hashes) == 2


def test_shorthands_choose_the_targets(say, runs):
    answer = say("calibrate", "toy.yaml", "--methods", "ztw", "--target_macs", "0.9", "--max_return_drop=[]", "--force")
    assert answer.code == 0
    found = checkpoint.load_facts(runs / "toy" / "ztw" / "s0", "exit_policies")["policies"]
    assert [policy["label"] for policy in found] == ["target_macs=0.9"]
    assert "calibrate  ztw target_macs=0.9: confidence thresholds [" in answer.out


def test_what_stands_in_brackets_is_printed(capsys):
    desk.console().print("thresholds [inf, 0.5] of [/x] :smile:")
    assert capsys.readouterr().out == "thresholds [inf, 0.5] of [/x] :smile:\n"


def test_a_preset_lies_between_the_config_and_the_shell(say):
    Path("half.yaml").write_text("distill: {epochs: 9, batch_size: 16}", encoding="utf-8")
    answer = say("train", "toy.yaml", "--config", "half.yaml", "--distill.batch_size", "8", "--print_config")
    assert answer.code == 0
    made = yaml.safe_load(answer.out)["distill"]
    assert (made["steps"], made["epochs"], made["batch_size"]) == (512, 9, 8)


def test_settings_may_stand_before_the_name(say):
    before = say("run", "--methods", "[sdn]", "--threads", "1", "--distill.steps=700", "toy.yaml", "--print_config")
    after = say("run", "toy.yaml", "--methods", "[sdn]", "--distill.steps", "700", "--print_config")
    assert (before.code, before.err) == (0, "")
    assert before.out == after.out


@pytest.mark.parametrize("words", [(), ("--distill.steps", "7e2", "--methods=sdn,ztw", "--env.noise", "0.25")])
def test_print_config_is_read_back_as_an_equal_config_and_writes_nothing(say, tmp_path, words):
    answer = say("run", "toy.yaml", *words, "--print_config")
    assert (answer.code, answer.err) == (0, "")
    assert set(files(tmp_path)) == {"toy.yaml"}
    Path("again.yaml").write_text(answer.out, encoding="utf-8")
    config = resolve(locate("toy.yaml", tmp_path), words)
    assert resolve(Place(Path("again.yaml"), tmp_path), []) == config
    assert resolve(locate("toy.yaml", tmp_path), ["--config", "again.yaml"]) == config


def test_print_config_of_a_shipped_config_needs_no_torch():
    program = (
        "import sys\n"
        "from rlexit.cli import main\n"
        "code = main(['train', 'pong', '--config', 'fast', '--print_config'])\n"
        "heavy = {'torch', 'stable_baselines3', 'gymnasium', 'ale_py', 'matplotlib', 'scipy'}\n"
        "sys.stderr.write(f'{code} {sorted(heavy & set(sys.modules))}')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stderr == "0 []"
    assert yaml.safe_load(done.stdout)["train"]["n_envs"] == 16


@pytest.mark.parametrize("verb", ["run", "train", "distill", "calibrate", "evaluate"])
def test_a_dry_run_counts_and_writes_nothing(say, tmp_path, verb):
    answer = say(verb, "toy.yaml", "--dry_run", "--threads", "1")
    assert (answer.code, answer.err) == (0, "")
    assert set(files(tmp_path)) == {"toy.yaml"}
    assert "distill ztw: to do" in answer.out
    assert "nothing was written" in answer.out
    assert "0.238" in answer.out


def test_a_dry_run_of_a_finished_run_says_so(say, runs):
    before = files(runs)
    answer = say("run", "toy.yaml", "--dry_run")
    assert answer.out.count(": done") == 3
    assert files(runs) == before


def test_a_dry_run_of_a_shipped_config_builds_the_real_network(say, tmp_path):
    answer = say("run", "pong", "--dry_run", "--threads", "1")
    assert (answer.code, answer.err) == (0, "")
    assert set(files(tmp_path)) == {"toy.yaml"}
    assert "conv1" in answer.out
    assert "0.376" in answer.out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_help(say, verb):
    answer = say(verb, "--help")
    assert (answer.code, answer.err) == (0, "")
    assert f"usage: rlexit {verb}" in answer.out


def test_help_names_every_verb_and_version_is_printed(say):
    answer = say("--help")
    assert answer.code == 0
    assert all(f"\n  {verb} " in answer.out for verb in VERBS)
    assert say().out == answer.out
    assert say("--version").out.startswith("rlexit ")


def test_lists_name_what_there_is(say, runs):
    assert {"pong", "fast"} <= {line.split()[0] for line in say("list").out.splitlines()}
    assert {line.split()[0] for line in say("list", "methods").out.splitlines()} >= {"ztw", "sdn", "static"}
    assert {"confidence", "patience"} <= set(say("list", "rules").out.split())
    assert {"pong", "breakout"} <= set(say("list", "games").out.split())
    assert say("list", "runs").out.split() == ["runs/toy"]
    assert "rlexit run pong" in say("list", "runs", "--out", "elsewhere").out


def test_the_doctor_says_what_is_there(say):
    answer = say("doctor")
    assert (answer.code, answer.err) == (0, "")
    for word in (torch.__version__.split("+")[0], "ROMs", "cores", "extra", "agents"):
        assert word in answer.out


def test_a_report_of_several_runs_goes_where_it_is_told_to(say, runs):
    answer = say("report", "runs/toy/ztw", "runs/toy/teacher", "--out", "page")
    assert (answer.code, answer.err) == (0, "")
    assert Path("page/report.html").is_file()


# ---- what is refused: one line, exit code 2, nothing is touched ----

REFUSALS: dict[str, tuple[tuple[str, ...], str]] = {
    "unknown verb": (("trian", "toy.yaml"), r"`VERB` .*'trian'.* Did you mean 'train'\?"),
    "no name": (("train",), r"required: NAME.* `rlexit train --help`"),
    "no zip": (("import", "--as", "toy.yaml"), "required: --sb3"),
    "unknown name": (("train", "pnog"), r"`NAME` .*'pnog'.* Did you mean 'pong'\?"),
    "name is a folder without a run": (("train", "."), r"must be a run folder"),
    "unknown key": (("train", "toy.yaml", "--distill.step", "5"), r"Did you mean `--distill\.steps`\?"),
    "unknown section": (("train", "toy.yaml", "--distil.steps", "5"), r"Did you mean `--distill\.steps`\?"),
    "key without section": (("train", "toy.yaml", "--total_steps", "5"), r"Did you mean `--train\.total_steps`\?"),
    "wrong type": (("train", "toy.yaml", "--train.total_steps", "many"), r"`train\.total_steps` .*'?many"),
    "a float for an int": (("train", "toy.yaml", "--train.total_steps", "1.5"), r"`train\.total_steps`.*1\.5"),
    "a word in a list of numbers": (("train", "toy.yaml", "--target_macs", "half"), r"`calibrate\.target_macs`.*half"),
    "out of range": (("train", "toy.yaml", "--distill.epochs", "0"), r"`distill\.epochs` must be at least 1, got 0"),
    "out of range in the domain": (("train", "toy.yaml", "--train.total_steps=0"), r"`train\.total_steps` must be at"),
    "nan": (("train", "toy.yaml", "--calibrate.confidence", "nan"), r"`calibrate\.confidence` must be in .*nan"),
    "unknown method": (("distill", "toy.yaml", "--methods", "zwt"), r"`methods` must be of ztw.*'zwt'"),
    "no method": (("distill", "toy.yaml", "--methods", "[]"), r"`methods` must name at least one"),
    "unknown rule": (("distill", "toy.yaml", "--calibrate.rule", "luck"), r"`calibrate\.rule` .*'luck'"),
    "unknown unit": (("train", "toy.yaml", "--network.taps", "four", "--dry_run"), r"`network\.taps` .*'four'"),
    "unknown game": (("train", "toy.yaml", "--env.game", "gamma"), r"`env\.game` .*'gamma'"),
    "unknown Atari game": (("train", "pong", "--env.game", "pnog"), r"`env\.game` .*'pnog'.* Nearest: pong"),
    "batch that does not fit": (
        ("train", "pong", "--train.n_envs", "3", "--train.n_steps", "5"),
        r"`train\.batch_size`",
    ),
    "no value": (("train", "toy.yaml", "--distill.steps"), r"`--distill\.steps` needs a value"),
    "a word too many": (("train", "toy.yaml", "now"), r"`now` was not expected"),
    "equal seeds": (("train", "toy.yaml", "--seeds", "1", "1"), r"`--seeds` .*\[1, 1\]"),
    "a regime without labels": (
        ("run", "toy.yaml", "--distill.regime", "mixed"),
        r"`distill\.regime` must be disjoint",
    ),
    "negative seed": (("train", "toy.yaml", "--seeds", "-1"), r"`--seeds` .*\[-1\]"),
    "a word for a seed": (("train", "toy.yaml", "--seeds", "one"), r"--seeds: invalid int value: 'one'"),
    "no thread": (("train", "toy.yaml", "--threads", "0"), r"`--threads` must be at least 1"),
    "missing config": (("train", "toy.yaml", "--config", "nope.yaml"), r"nope\.yaml"),
    "a preset as a name": (("train", "fast"), r"`domain` in `fast\.yaml` .* --config PRESET"),
    "distill before train": (("distill", "toy.yaml"), r"runs/toy/teacher.* Run `rlexit train` first"),
    "calibrate before distill": (("calibrate", "toy.yaml"), r"runs/toy/ztw/s0.* Run `rlexit distill` first"),
    "evaluate before train": (("evaluate", "toy.yaml"), r"Run `rlexit train` first"),
    "video before calibrate": (("video", "toy.yaml"), r"Run `rlexit calibrate` first"),
    "report of nothing": (("report", "nowhere"), r"'nowhere'.*rlexit evaluate"),
    "report without a folder": (("report",), r"required: RUNS.* `rlexit report --help`"),
    "report without rows": (("report", "."), r"rlexit evaluate"),
    "unknown list": (("list", "gmaes"), r"'gmaes'.* Did you mean 'games'\?"),
    "doctor with a word": (("doctor", "please"), r"unrecognized arguments: please"),
    "import of nothing": (("import", "--sb3", "nope.zip", "--as", "pong"), r"`nope\.zip` is missing"),
    "import into an unknown config": (("import", "--sb3", "nope.zip", "--as", "pnog"), r"Did you mean 'pong'\?"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_bad_input_is_answered_with_one_line_and_nothing_is_written(say, tmp_path, name):
    import re

    words, wanted = REFUSALS[name]
    assert re.search(wanted, refused(say(*words)))
    assert set(files(tmp_path)) == {"toy.yaml"}


FILES: dict[str, tuple[str, str]] = {
    "unknown key": (
        "domain: toy\nenv: {game: alpha}\ndistill: {stepz: 5}",
        r"`distill\.stepz` in `bad\.yaml`.*distill\.steps",
    ),
    "unknown section": ("domain: toy\nenv: {game: alpha}\ndistil: {steps: 5}", r"`distil` in `bad\.yaml`"),
    "wrong type": ("domain: toy\nenv: {game: alpha}\ndistill: {steps: [1]}", r"`distill\.steps`"),
    "out of range": (
        "domain: toy\nenv: {game: alpha}\ndistill: {steps: -1}",
        r"`distill\.steps` must be at least 1, got -1",
    ),
    "missing game": ("domain: toy", r"`?env\.game"),
    "unknown domain": ("domain: sound", r"`domain` in `bad\.yaml` .*'sound'"),
    "a list": ("- 1\n- 2", r"bad\.yaml.* must hold settings by name, got list"),
    "no YAML": ("domain: [", r"bad\.yaml.* is no YAML"),
    "an object": ("domain: !!python/object/apply:os.system [touch canary]", r"bad\.yaml.* is no YAML"),
    "an alias": ("domain: toy\na: &x [1]\nb: *x", r"no YAML anchors or aliases"),
    "too large": ("#" * 300_000, r"at most 262144 bytes"),
    "not text": ("\udcff", r"bad\.yaml.* is no YAML"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_bad_config_file_is_answered_with_one_line(say, tmp_path, name):
    import re

    text, wanted = FILES[name]
    Path("bad.yaml").write_bytes(text.encode("utf-8", "surrogateescape"))
    before = files(tmp_path)
    assert re.search(wanted, refused(say("train", "bad.yaml")))
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("train", "--train.total_steps", "50"), "`train.total_steps` is 40 there, 50 here"),
        (("run", "--env.noise", "0.25"), "`env.noise` is 0.5 there, 0.25 here"),
        (("distill", "--distill.learning_rate", "0.1"), "`distill.learning_rate` is 0.05 there, 0.1 here"),
        (("calibrate", "--target_macs", "0.7"), "`calibrate.target_macs` is [0.8] there, [0.7] here"),
        (("evaluate", "--evaluate.episodes", "5"), "`evaluate.episodes` is 3 there, 5 here"),
        (("evaluate", "--env.game", "beta"), "env.game is 'alpha', the config says 'beta'"),
        (("distill", "--env.game", "beta"), "env.game is 'alpha', the config says 'beta'"),
        (("calibrate", "--network.taps", "two"), "exits of another network or method"),
        (("calibrate", "--target_macs", "0.1"), "at least 0.238"),
    ],
)
def test_a_run_of_other_settings_is_refused_and_stays_as_it_is(say, runs, words, wanted):
    before = files(runs)
    verb, *others = words
    line = refused(say(verb, "toy.yaml", "--threads", "1", *others))
    assert wanted in line
    assert files(runs) == before


@pytest.mark.parametrize("damage", ["cut", "altered"])
@pytest.mark.parametrize(
    ("pattern", "verb"),
    [
        ("teacher/teacher.json", "distill"),
        ("teacher/teacher-*.safetensors", "evaluate"),
        ("ztw/s0/policy-*.safetensors", "calibrate"),
        ("ztw/s0/policy.json", "evaluate"),
        ("ztw/s0/exit_policies.json", "video"),
        ("teacher/train.done.json", "train"),
    ],
)
def test_a_damaged_file_is_named(say, runs, damage, pattern, verb):
    if (pattern, damage) == ("teacher/train.done.json", "altered"):
        pytest.skip("a note, not a checkpoint: it has no hash of its own")
    (path,) = (runs / "toy").glob(pattern)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data) if damage == "altered" else path.read_bytes()[:-9])
    before = files(runs)
    assert path.name in refused(say(verb, "toy.yaml", "--threads", "1"))
    assert files(runs) == before


def test_an_evil_zip_is_refused_before_anything_is_touched(say, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, ("touch canary",)

    with zipfile.ZipFile("evil.zip", "w") as archive:
        archive.writestr("policy.pth", pickle.dumps(Evil()))
    before = files(tmp_path)
    line = refused(say("import", "--sb3", "evil.zip", "--as", "pong"))
    assert "policy.pth" in line
    assert "evil.zip" in line
    assert files(tmp_path) == before


def test_an_import_is_done_once_and_never_replaces_another_teacher_unasked(say, tmp_path):
    assert say("import", "--sb3", "a.zip", "--as", "toy.yaml").code == 0
    before = files(tmp_path / "runs")
    assert say("import", "--sb3", "a.zip", "--as", "toy.yaml").code == 0
    assert "another teacher" in refused(say("import", "--sb3", "b.zip", "--as", "toy.yaml"))
    assert files(tmp_path / "runs") == before
    assert say("import", "--sb3", "b.zip", "--as", "toy.yaml", "--force").code == 0
    assert say("distill", "toy.yaml", "--methods", "sdn", "--threads", "1").code == 0


def test_an_import_into_a_training_that_was_stopped_leaves_nothing_of_it(say, tmp_path):
    assert say("train", "toy.yaml", "--threads", "1").code == 0
    teacher = tmp_path / "runs" / "toy" / "teacher"
    (teacher / "train.done.json").unlink()
    (teacher / "scalars.csv").write_text("step,tag,value\n")
    assert say("import", "--sb3", "a.zip", "--as", "toy.yaml").code == 0
    assert not (teacher / "scalars.csv").exists()


def test_a_run_folder_that_another_process_works_on_is_left_alone(say, tmp_path):
    root = tmp_path / "runs" / "toy"
    root.mkdir(parents=True)
    with open(root / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        line = refused(say("train", "toy.yaml", "--threads", "1"))
    assert "is being worked on by another rlexit" in line
    assert files(root) == {".lock": b""}
    assert say("train", "toy.yaml", "--threads", "1").code == 0


def test_a_teacher_is_trained_with_one_seed(say):
    assert "`--seeds` of train must be one" in refused(say("train", "toy.yaml", "--seeds", "0", "1"))


def test_what_cannot_be_built_or_met_is_told_before_the_teacher_is_trained(say, tmp_path):
    for words in (["--network.taps", "nowhere"], ["--target_macs", "0.0001"]):
        refused(say("run", "toy.yaml", *words))
        assert not (tmp_path / "runs").exists()


def test_a_film_of_static_networks_is_refused(say, runs):
    assert "`--methods` must name one with exits" in refused(say("video", "toy.yaml", "--methods", "static"))


def test_a_refused_import_leaves_the_teacher_even_when_forced(say, runs, monkeypatch):
    def refuse(self, path, folder):
        raise ValueError(f"`{path}` is no zip file.")

    monkeypatch.setattr(toy.ToyDomain, "adopt", refuse)
    before = files(runs)
    refused(say("import", "--sb3", "x.zip", "--as", "toy.yaml", "--force"))
    assert files(runs) == before


def test_a_full_disk_while_training_is_told_in_one_line_and_the_run_goes_on_later(say, tmp_path, monkeypatch):
    synced = []

    def full(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) > 8:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "fsync", full)
        line = refused(say("train", "toy.yaml", "--threads", "1"))
    assert "the disk is full" in line
    assert "run the same command" in line
    assert checkpoint.load_facts(tmp_path / "runs" / "toy" / "teacher", "state")["step"] >= 10
    assert not list((tmp_path / "runs").rglob("*.tmp"))
    assert say("train", "toy.yaml", "--threads", "1").code == 0


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_named_with_its_file_where_that_is_known(number):
    line = one_line(OSError(number, "no", "runs/x.csv"))
    assert "the disk is full while writing `runs/x.csv`" in line
    assert one_line(OSError(errno.EACCES, "Permission denied", "x")) == "[Errno 13] Permission denied: 'x'"
    assert one_line(KeyError("a  b")) == "a b"


def test_a_loss_that_is_nan_is_told_in_one_line(say, runs, monkeypatch):
    def spoilt(self, seed):
        def collect(act, first):
            while True:
                act(torch.full((8, toy.OBSERVED), torch.nan))
                yield 8

        return collect

    before = files(runs)
    monkeypatch.setattr(toy.ToyDomain, "batches", spoilt)
    line = refused(say("distill", "toy.yaml", "--methods", "sdn", "--threads", "1"))
    assert "`distill/kl` became" in line
    assert "distill.learning_rate" in line
    after = files(runs)
    assert {name: after[name] for name in before if not name.endswith("config.yaml")} == {
        name: data for name, data in before.items() if not name.endswith("config.yaml")
    }


def test_a_traceback_is_there_for_those_who_ask(say, monkeypatch):
    monkeypatch.setenv("RLEXIT_TRACEBACK", "1")
    with pytest.raises(LookupError):
        say("train", "pnog")


# ---- signals ----


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_at_a_safe_point_and_the_same_command_goes_on(say, tmp_path, monkeypatch, number, code):
    sound = toy.ToyDomain.train

    def signalled(self, folder: Path, seed: int, watch: Watch) -> None:
        def progress(done, total, facts):
            if done == 20:
                signal.raise_signal(number)

        sound(self, folder, seed, Watch(watch.stop, progress))

    monkeypatch.setattr(toy.ToyDomain, "train", signalled)
    before = signal.getsignal(number)
    answer = say("train", "toy.yaml", "--threads", "1", "--force")
    assert (answer.code, answer.err) == (code, "")
    assert "Go on with the same command:\n  rlexit train toy.yaml --threads 1\n" in answer.out
    assert signal.getsignal(number) is before
    assert checkpoint.load_facts(tmp_path / "runs" / "toy" / "teacher", "state") == {"step": 20}
    monkeypatch.setattr(toy.ToyDomain, "train", sound)
    answer = say("train", "toy.yaml", "--threads", "1")
    assert answer.code == 0
    assert checkpoint.exists(tmp_path / "runs" / "toy" / "teacher", "teacher")


def test_a_stop_before_the_end_makes_no_report(say, tmp_path, monkeypatch):
    monkeypatch.setitem(desk.WORK, "evaluate", stop_there)
    assert say("evaluate", "toy.yaml").code == 128
    assert not (tmp_path / "runs").exists()


def stop_there(made, options) -> None:
    raise Stopped


def test_a_keyboard_interrupt_outside_of_the_work_is_no_traceback(say, monkeypatch):
    def interrupted(*words):
        raise KeyboardInterrupt

    monkeypatch.setattr(desk, "doctor_verb", interrupted)
    assert say("doctor") == Answer(130, "", "")


# ---- as a program ----


def program(*words: str, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    code = "import sys; from rlexit.cli import main; sys.exit(main())"
    if limit is not None:
        code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); {code}"
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=300)


def test_the_program_ends_with_code_2_and_one_line(tmp_path):
    done = program("train", "pong", "--train.total_stepz", "5", "--out", str(tmp_path))
    assert refused(Answer(done.returncode, done.stdout, done.stderr)).startswith("`--train.total_stepz`")
    assert list(tmp_path.iterdir()) == []


def test_the_program_on_a_really_full_disk_saves_nothing_by_halves(tmp_path):
    words = ("train", "pong_demo", "--out", str(tmp_path), "--threads", "1")
    done = program(*words, limit=1 << 20)
    assert "the disk is full" in refused(Answer(done.returncode, done.stdout, done.stderr))
    assert not list(tmp_path.rglob("*.safetensors")) + list(tmp_path.rglob("*.tmp"))
    done = program(*words)
    assert (done.returncode, done.stderr) == (0, "")
    assert checkpoint.exists(tmp_path / "pong_demo" / "teacher", "teacher")


def test_every_verb_that_does_work_is_wired():
    assert set(desk.WORK) | {"report", "list", "doctor"} == set(VERBS)
    assert settings.DOMAINS == ("agents", "vision")


def test_the_table_of_a_run_is_made_of_its_rows(finished):
    rows = read_rows(finished / "toy" / "ztw" / "s0" / "eval" / "episodes.csv")
    text = (finished / "toy" / "report" / "report.csv").read_text(encoding="utf-8")
    assert all(row.label in text for row in rows)
