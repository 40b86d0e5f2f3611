from __future__ import annotations

import errno
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlexit import checkpoint, report, verbs
from rlexit.calibrate import TargetError
from rlexit.checkpoint import CheckpointError
from rlexit.config import METHODS, Method
from rlexit.domain import Domain, Watch
from rlexit.evaluate import Subject, evaluate
from rlexit.exit_policy import ExitPolicy
from rlexit.interrupts import Diverged, Stopped
from rlexit.rows import read_latency, read_reliability, read_rows
from rlexit.runfolder import FolderError
from rlexit.runlog import read_scalars
from rlexit.session import Session, calibrated_policy, load_network
from rlexit.settings import to_yaml
from tests.rlexit import toy_domain as toy
from tests.rlexit.toy_domain import SMALL, StopAfter, changed, files, session


def whole_run(made: Session) -> None:
    verbs.train(made)
    for method in made.domain.config.methods:
        verbs.distill(made, method)
        verbs.calibrate(made, method)
    verbs.evaluate_teacher(made)
    for method in made.domain.config.methods:
        verbs.evaluate_method(made, method)


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """A finished run; tests read it and leave it as it is."""
    root = tmp_path_factory.mktemp("runs") / "toy"
    whole_run(session(root))
    return root


@pytest.fixture
def copy(done, tmp_path) -> Path:
    """A copy of the finished run to alter."""
    root = tmp_path / "toy"
    for name, data in files(done).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


@pytest.fixture
def distilled(copy) -> Path:
    """The same before calibration and evaluation."""
    for path in [*copy.glob("*/s0/cali*"), *copy.glob("*/s0/exit_*"), *copy.glob("**/eval*")]:
        made = sorted(path.rglob("*")) if path.is_dir() else []
        for inner in [*made[::-1], path]:
            inner.rmdir() if inner.is_dir() else inner.unlink()
    return copy


def on_paper(paper: io.StringIO) -> Console:
    return Console(file=paper, width=400, markup=False, highlight=False)


# ---- one run from end to end ----


def test_the_toy_is_a_domain():
    assert isinstance(toy.domain(SMALL), Domain)


def test_a_run_from_end_to_end_leaves_one_artefact_per_verb(done, tmp_path):
    assert checkpoint.exists(done / "teacher", "teacher")
    for method in SMALL.methods:
        assert checkpoint.exists(done / method / "s0", "policy")
        assert (done / method / "s0" / "eval" / "episodes.csv").is_file()
    assert checkpoint.exists(done / "ztw" / "s0", "exit_policies")
    assert not checkpoint.exists(done / "static" / "s0", "exit_policies")
    page = report.write_report([done], tmp_path / "report")
    assert "target_macs=0.8" in page.read_text(encoding="utf-8")


def test_every_operating_point_plays_the_same_test_episodes(done):
    rows = [row for path in done.glob("**/episodes.csv") for row in read_rows(path)]
    played: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for row in rows:
        assert row.split == "test"
        played.setdefault((row.method, row.label), []).append((row.episode, row.episode_seed))
    assert set(map(tuple, played.values())) == {tuple((n, toy.FIRST_SEED["test"] + n) for n in range(3))}
    labels = {label for method, label in played if method == "ztw"}
    assert {"target_macs=0.8", "max_return_drop=0.5", "exit 0", "exit 1"} < labels
    assert {method for method, _ in played} == {"teacher", "random", "ztw", "static"}
    assert {label for method, label in played if method == "static"} == {"width 0.5", "width 0.25"}


def test_rows_tell_what_was_really_computed(done):
    rows = read_rows(done / "ztw" / "s0" / "eval" / "episodes.csv")
    first = [row for row in rows if row.label == "exit 0"]
    assert {row.exit_fractions for row in first} == {(1.0, 0.0, 0.0)}
    assert {row.decisions for row in rows} == {toy.STEPS}
    teacher, random = (
        [row for row in read_rows(done / "teacher" / "eval" / "episodes.csv") if row.method == name]
        for name in ("teacher", "random")
    )
    assert {row.relative_macs for row in teacher} == {1.0}
    assert {row.relative_macs for row in random} == {0.0}
    assert {row.actions for row in random} == {"sampled"}
    assert all(row.relative_macs < 0.5 for row in first)
    assert np.mean([row.value for row in teacher]) > 2 * np.mean([row.value for row in random])


def test_a_compute_target_is_met_on_the_rows_it_was_calibrated_on(done):
    found = checkpoint.load_facts(done / "ztw" / "s0", "exit_policies")["policies"]
    macs = [policy for policy in found if policy["label"] == "target_macs=0.8"]
    rounds = macs[0]["provenance"]["rounds"]
    assert len(rounds) == SMALL.calibrate.rounds
    assert all(entry["relative_macs_solved"] <= 0.8 for entry in rounds)


def test_latency_is_measured_once_per_operating_point(done):
    rows = read_latency(done / "ztw" / "s0" / "eval" / "latency.csv")
    labels = {row.label for row in read_rows(done / "ztw" / "s0" / "eval" / "episodes.csv")}
    assert sorted(row.label for row in rows) == sorted(labels)
    assert {row.threads for row in rows} == {1}
    assert [row.label for row in read_latency(done / "static" / "s0" / "eval" / "latency.csv")] == list(
        toy.domain(SMALL).static_networks(done)
    )


def test_steps_are_recorded_for_the_first_episode_of_calibrated_policies_only(done):
    names = {path.name for path in (done / "ztw" / "s0" / "eval").glob("*.npz")}
    assert names == {"steps_ztw_target_macs=0.8_0.npz", "steps_ztw_max_return_drop=0.5_0.npz"}
    with np.load(done / "ztw" / "s0" / "eval" / "steps_ztw_target_macs=0.8_0.npz") as steps:
        assert steps["exits"].shape == (toy.STEPS,)


def test_calibration_plays_no_test_episode_and_evaluation_no_calibration_episode(distilled):
    made = session(distilled)
    domain: toy.ToyDomain = made.domain  # type: ignore[assignment]
    verbs.calibrate(made, "ztw")
    assert {split for split, _, _ in domain.played} == {"certification"}
    domain.played.clear()
    verbs.evaluate_teacher(made)
    verbs.evaluate_method(made, "ztw")
    assert {split for split, _, _ in domain.played} == {"test"}


def test_a_second_run_does_nothing(copy):
    before = files(copy)
    times = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    made = session(copy)
    whole_run(made)
    domain: toy.ToyDomain = made.domain  # type: ignore[assignment]
    assert (domain.played, domain.collected) == ([], 0)
    assert files(copy) == before
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == times


def test_another_seed_makes_another_folder_and_shares_the_teacher(copy):
    before = files(copy / "teacher")
    other = session(copy, seed=1)
    verbs.train(other)
    verbs.distill(other, "ztw")
    assert files(copy / "teacher") == before
    assert checkpoint.weights_hash(copy / "ztw" / "s1", "policy") != checkpoint.weights_hash(
        copy / "ztw" / "s0", "policy"
    )


def test_what_is_loaded_is_the_teacher_with_the_distilled_heads(done):
    made = session(done)
    network = load_network(made, "ztw")[""]
    inputs = torch.randn(5, toy.OBSERVED)
    teacher = made.domain.network(made.teacher, Method())
    assert torch.equal(network(inputs).answers[:, -1], teacher(inputs).answers[:, -1])
    fresh = made.domain.network(made.teacher, METHODS["ztw"])
    assert not torch.allclose(network(inputs).answers[:, 0], fresh(inputs).answers[:, 0])
    assert not network.training


def test_distillation_teaches_the_early_exits(done):
    curve = [value for _, tag, value in read_scalars(done / "ztw" / "s0") if tag == "distill/kl/exit1"]
    assert np.mean(curve[-4:]) < 0.5 * curve[0]


# ---- missing stages ----


@pytest.mark.parametrize(
    ("verb", "missing"),
    [
        (lambda made: verbs.distill(made, "ztw"), "train"),
        (lambda made: verbs.distill(made, "static"), "train"),
        (lambda made: verbs.calibrate(made, "ztw"), "distill"),
        (verbs.evaluate_teacher, "train"),
        (lambda made: verbs.evaluate_method(made, "ztw"), "distill"),
        (lambda made: verbs.evaluate_method(made, "static"), "distill"),
        (lambda made: verbs.video(made, "ztw", 0, None, 9), "calibrate"),
        (lambda made: calibrated_policy(made, "ztw"), "calibrate"),
    ],
)
def test_a_missing_stage_is_named_with_the_verb_that_makes_it(verb, missing, tmp_path):
    made = session(tmp_path / "toy")
    with pytest.raises(CheckpointError, match=rf"Run `rlexit {missing}` first\.$"):
        verb(made)
    assert files(tmp_path) == {}


# ---- other settings ----


@pytest.mark.parametrize(
    ("verb", "section", "setting", "value"),
    [
        ("train", "train", "total_steps", 50),
        ("train", "env", "noise", 0.25),
        ("distill", "distill", "batch_size", 16),
        ("distill", "head", "layer_norm", False),
        ("distill", "network", "taps", ("two",)),
        ("calibrate", "calibrate", "episodes", 5),
        ("calibrate", "evaluate", "actions", "sampled"),
        ("evaluate_method", "evaluate", "episodes", 4),
    ],
)
def test_a_changed_setting_is_refused_by_its_name_and_nothing_is_touched(done, verb, section, setting, value):
    before = files(done)
    made = session(done, changed(SMALL, section, **{setting: value}))
    with pytest.raises(FolderError, match=rf"`{section}\.{setting}` is .* Use --force to start it over") as caught:
        getattr(verbs, verb)(*((made,) if verb == "train" else (made, "ztw")))
    assert str(made.stage(verb.split("_")[0], "" if verb == "train" else "ztw").folder) in str(caught.value)
    assert files(done) == before


def test_a_setting_that_a_stage_does_not_depend_on_does_not_undo_it(done):
    before = files(done)
    made = session(done, changed(changed(SMALL, "evaluate", grid=5), "calibrate", episodes=9))
    verbs.train(made)
    verbs.distill(made, "ztw")
    assert files(done) == before


def test_force_starts_a_stage_of_another_config_over_and_keeps_the_others(copy):
    before = files(copy)
    config = changed(SMALL, "evaluate", episodes=2)
    verbs.evaluate_method(session(copy, config, force=True), "ztw")
    after = files(copy)
    rows = read_rows(copy / "ztw" / "s0" / "eval" / "episodes.csv")
    assert {row.episode for row in rows} == {0, 1}
    touched = {name for name in before | after if before.get(name) != after.get(name)}
    assert touched - {"config.yaml"} <= {name for name in before | after if name.startswith("ztw/s0/eval")}
    assert b"episodes: 2" in after["config.yaml"]


def test_evaluating_again_does_not_calibrate_again(copy):
    before = (copy / "ztw" / "s0" / "calibrate.done.json").stat().st_mtime_ns
    verbs.evaluate_method(session(copy, force=True), "ztw")
    assert (copy / "ztw" / "s0" / "calibrate.done.json").stat().st_mtime_ns == before


def test_an_evaluation_uses_what_was_calibrated_whatever_for(distilled):
    verbs.calibrate(session(distilled, changed(SMALL, "calibrate", target_macs=(0.7,), max_return_drop=())), "ztw")
    verbs.evaluate_method(session(distilled), "ztw")
    rows = read_rows(distilled / "ztw" / "s0" / "eval" / "episodes.csv")
    assert {row.target for row in rows} == {"", "target_macs=0.7"}


def test_only_the_first_of_several_seeds_starts_over_what_all_seeds_share(copy):
    before = checkpoint.weights_hash(copy / "teacher", "teacher")
    second = replace(session(copy, force=True), seed=1, first=False)
    verbs.train(second)
    verbs.evaluate_teacher(second)
    assert checkpoint.weights_hash(copy / "teacher", "teacher") == before
    assert second.stage("train").is_done()


def test_exits_that_cannot_be_built_leave_nothing_even_when_forced(copy):
    before = files(copy)
    with pytest.raises((ValueError, LookupError)):
        verbs.distill(session(copy, changed(SMALL, "network", taps=("nowhere",)), force=True), "ztw")
    assert files(copy) == before


# ---- TensorBoard ----


def board(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder / "tb"), size_guidance={"scalars": 0, "histograms": 0})
    return found.Reload()


def test_every_operating_point_has_a_board_that_says_what_its_rows_say(done):
    folder = done / "ztw" / "s0" / "eval"
    rows = read_rows(folder / "episodes.csv")
    labels = {row.label for row in rows}
    assert {path.name for path in (folder / "boards").iterdir()} == {f"ztw {label}" for label in labels}
    for label in labels:
        mine = [row for row in rows if row.label == label]
        shown = board(folder / "boards" / f"ztw {label}")
        (mean,) = shown.Scalars("eval/return_mean")
        assert mean.step == SMALL.distill.steps
        assert mean.value == pytest.approx(np.mean([row.value for row in mine]), rel=1e-5)
        macs = np.average([row.relative_macs for row in mine], weights=[row.decisions for row in mine])
        assert shown.Scalars("eval/macs_ratio")[0].value == pytest.approx(macs, rel=1e-5)
        shares = [shown.Scalars(f"eval/exit_frac/{exit}")[0].value for exit in range(3)]
        assert sum(shares) == pytest.approx(1.0, abs=1e-5)
        assert {"eval/return_iqm", "eval/length_mean", "eval/macs_mean"} <= set(shown.Tags()["scalars"])


def test_calibration_shows_thresholds_and_how_far_confidence_can_be_trusted(done):
    folder = done / "ztw" / "s0"
    bins = read_reliability(folder / "calibration" / "reliability.csv")
    assert {row.exit for row in bins} == {0, 1}
    shown = board(folder / "calibration")
    for exit in range(2):
        mine = [row for row in bins if row.exit == exit]
        total = sum(row.count for row in mine)
        assert total == checkpoint.load_facts(folder, "exit_policies")["rows"]
        error = sum(row.count * abs(row.confidence - row.agreement) for row in mine) / total
        assert shown.Scalars(f"calib/ece/exit{exit}")[0].value == pytest.approx(error, abs=1e-5)
        assert f"eval/confidence/exit{exit}" in shown.Tags()["histograms"]
    policies = checkpoint.load_facts(folder, "exit_policies")["policies"]
    finite = [
        (policy["label"], exit, float(threshold))
        for policy in policies
        for exit, threshold in enumerate(policy["thresholds"])
        if math.isfinite(float(threshold))
    ]
    assert finite
    for label, exit, threshold in finite:
        shown = board(folder / "calibration" / label)
        assert shown.Scalars(f"calib/threshold/exit{exit}")[0].value == pytest.approx(threshold)


def test_distillation_shows_margins_and_the_weights_of_the_ensembles(done):
    shown = board(done / "ztw" / "s0")
    assert {"distill/logit_margin/exit0", "distill/logit_margin/exit1"} <= set(shown.Tags()["histograms"])
    shares = [shown.Scalars(f"distill/ensemble_weight/exit1/of{earlier}")[-1].value for earlier in range(2)]
    assert sum(shares) == pytest.approx(1.0, abs=1e-5)


def test_distilling_again_makes_later_stages_of_the_old_exits_invalid(copy):
    config = changed(SMALL, "distill", learning_rate=0.02)
    verbs.distill(session(copy, config, force=True), "ztw")
    with pytest.raises(FolderError, match="`policy` is"):
        verbs.calibrate(session(copy, config), "ztw")


def test_the_run_keeps_the_config_it_was_made_with(done):
    assert (done / "config.yaml").read_text(encoding="utf-8") == to_yaml(SMALL)


def test_a_run_of_another_game_is_refused_by_that_field(done):
    before = files(done)
    made = session(done, changed(SMALL, "env", game="beta"))
    for verb in (verbs.distill, verbs.evaluate_method):
        with pytest.raises(CheckpointError, match=r"env\.game is 'alpha', the config says 'beta'"):
            verb(made, "ztw")
    with pytest.raises(CheckpointError, match=r"env\.game"):
        verbs.evaluate_teacher(made)
    assert files(done) == before


def test_exits_of_another_network_are_refused(done):
    made = session(done, changed(SMALL, "network", taps=("two",)))
    with pytest.raises(CheckpointError, match="exits of another network or method"):
        load_network(made, "ztw")
    with pytest.raises(CheckpointError, match="exits of another network or method"):
        verbs.calibrate(made, "ztw")


# ---- damaged files ----


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [cut, flip])
@pytest.mark.parametrize("suffix", ["json", "safetensors"])
@pytest.mark.parametrize(
    ("name", "verb"),
    [
        ("teacher/teacher", lambda made: verbs.evaluate_teacher(made)),
        ("teacher/teacher", lambda made: verbs.calibrate(made, "ztw")),
        ("ztw/s0/policy", lambda made: verbs.evaluate_method(made, "ztw")),
        ("static/s0/policy", lambda made: verbs.evaluate_method(made, "static")),
        ("ztw/s0/exit_policies", lambda made: verbs.video(made, "ztw", 0, None, 5)),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_its_name(copy, damage, suffix, name, verb):
    if (name, suffix) == ("ztw/s0/exit_policies", "safetensors"):
        pytest.skip("thresholds are in the manifest")
    (path,) = copy.glob(f"{name}*.{suffix}")
    damage(path)
    with pytest.raises(CheckpointError, match=path.name):
        verb(session(copy))


def test_a_damaged_note_of_a_finished_stage_is_refused_by_its_name(copy):
    cut(copy / "ztw" / "s0" / "distill.done.json")
    with pytest.raises(FolderError, match=r"distill\.done\.json"):
        verbs.distill(session(copy), "ztw")


# ---- stopped and resumed ----


def stopped_and_resumed(root: Path, verb, stride: int = 1) -> int:
    """Runs a verb that is stopped, each time a little later, until it ends; returns how often it was stopped."""
    for count in range(60):
        try:
            verb(session(root, stop=StopAfter(2 + count * stride)))
        except Stopped:
            continue
        return count
    raise AssertionError("it never ends")


def test_an_evaluation_that_was_stopped_many_times_is_the_uninterrupted_one(done, distilled):
    verbs.calibrate(session(distilled), "ztw")
    for method in ("ztw", "static"):
        assert stopped_and_resumed(distilled, lambda made, method=method: verbs.evaluate_method(made, method)) > 2
    assert stopped_and_resumed(distilled, verbs.evaluate_teacher) > 1
    ours, theirs = files(done), files(distilled)
    names = [name for name in ours if name.endswith("episodes.csv")]
    assert len(names) == 3
    assert [name for name in names if ours[name] != theirs.get(name)] == []
    kept, wanted = ({name for name in found if "/eval/" in name and "/tb/" not in name} for found in (theirs, ours))
    assert kept == wanted
    for method in ("ztw", "static"):
        labels = [row.label for row in read_latency(distilled / method / "s0" / "eval" / "latency.csv")]
        assert len(labels) == len(set(labels))


def test_a_stopped_evaluation_is_not_done_and_plays_no_episode_twice(done, distilled):
    verbs.calibrate(session(distilled), "ztw")
    first = session(distilled, stop=StopAfter(12))
    with pytest.raises(Stopped):
        verbs.evaluate_method(first, "ztw")
    assert not first.stage("evaluate", "ztw").is_done()
    assert len(read_rows(distilled / "ztw" / "s0" / "eval" / "episodes.csv")) == len(first.domain.played) > 0
    second = session(distilled)
    verbs.evaluate_method(second, "ztw")
    total = len(read_rows(done / "ztw" / "s0" / "eval" / "episodes.csv"))
    assert len(first.domain.played) + len(second.domain.played) == total


def test_what_was_played_before_a_stop_is_kept_and_the_caller_is_told(tmp_path):
    made = toy.domain(SMALL)
    subject = Subject("random", 0, None, [ExitPolicy("confidence", (), "random")], 1)
    path = tmp_path / "episodes.csv"
    with pytest.raises(Stopped):
        evaluate(made, subject, 5, "test", path, None, Watch(stop=StopAfter(2)))
    assert [row.episode for row in read_rows(path)] == [0, 1]
    told: list[tuple[int, int]] = []
    watch = Watch(progress=lambda done, total, facts: told.append((done, total)))
    assert len(evaluate(made, subject, 5, "test", path, None, watch)) == 5
    assert told == [(3, 5), (4, 5), (5, 5)]


def test_an_evaluation_whose_rows_are_all_there_only_has_to_be_closed(copy):
    before = (copy / "ztw" / "s0" / "eval" / "episodes.csv").read_bytes()
    (copy / "ztw" / "s0" / "evaluate.done.json").unlink()
    made = session(copy)
    verbs.evaluate_method(made, "ztw")
    assert made.domain.played == []
    assert (copy / "ztw" / "s0" / "eval" / "episodes.csv").read_bytes() == before


@pytest.mark.parametrize("torn", [1, 40])
def test_a_row_that_a_kill_has_cut_is_played_again(done, copy, torn):
    path = copy / "ztw" / "s0" / "eval" / "episodes.csv"
    path.write_bytes(path.read_bytes()[:-torn])
    (copy / "ztw" / "s0" / "evaluate.done.json").unlink()
    verbs.evaluate_method(session(copy), "ztw")
    assert path.read_bytes() == (done / "ztw" / "s0" / "eval" / "episodes.csv").read_bytes()


@pytest.mark.parametrize("method", ["ztw", "static"])
def test_a_distillation_that_was_stopped_many_times_is_the_uninterrupted_one(done, tmp_path, method):
    root = tmp_path / "toy"
    verbs.train(session(root))
    assert stopped_and_resumed(root, lambda made: verbs.distill(made, method)) > 3
    for name in ("policy.json", "scalars.csv", "state.json"):
        assert (root / method / "s0" / name).read_bytes() == (done / method / "s0" / name).read_bytes(), name


def test_a_training_that_was_stopped_goes_on(tmp_path):
    made = session(tmp_path, stop=StopAfter(2))
    with pytest.raises(Stopped):
        verbs.train(made)
    assert not made.stage("train").is_done()
    assert checkpoint.load_facts(made.teacher, "state") == {"step": 30}
    verbs.train(session(tmp_path))
    assert made.stage("train").is_done()


def test_a_calibration_that_was_stopped_starts_again_and_ends_the_same(done, distilled):
    assert stopped_and_resumed(distilled, lambda made: verbs.calibrate(made, "ztw"), stride=6) > 2
    for name in ("exit_policies.json", "calibration/ztw.csv"):
        assert (distilled / "ztw/s0" / name).read_bytes() == (done / "ztw/s0" / name).read_bytes()


# ---- targets ----


def test_a_target_that_cannot_be_certified_is_said_plainly_and_does_not_fail(distilled):
    config = changed(SMALL, "calibrate", max_return_drop=(0.0,), target_macs=(0.8,))
    paper = io.StringIO()
    (found,) = verbs.calibrate(session(distilled, config, console=on_paper(paper)), "ztw")
    assert found.label == "target_macs=0.8"
    assert "max_return_drop=0 is not certifiable with 4 episodes" in paper.getvalue()
    assert "calibrate.episodes" in paper.getvalue()
    assert session(distilled, config).stage("calibrate", "ztw").is_done()
    missed = checkpoint.load_facts(distilled / "ztw" / "s0", "exit_policies")["missed"]
    assert len(missed) == 1


def test_without_any_calibrated_policy_the_rest_goes_on_and_a_video_says_why_not(distilled):
    config = changed(SMALL, "calibrate", max_return_drop=(0.0,), target_macs=())
    made = session(distilled, config)
    assert verbs.calibrate(made, "ztw") == []
    verbs.evaluate_method(made, "ztw")
    assert {row.target for row in read_rows(distilled / "ztw" / "s0" / "eval" / "episodes.csv")} == {""}
    with pytest.raises(CheckpointError, match="got none: no target could be met"):
        verbs.video(made, "ztw", 0, None, 5)


def test_a_target_below_the_cheapest_exit_is_refused_with_that_number_and_leaves_nothing(distilled):
    before = files(distilled)
    made = session(distilled, changed(SMALL, "calibrate", target_macs=(0.9, 0.1)))
    with pytest.raises(TargetError, match=r"at least 0\.238.* got 0\.1\."):
        verbs.calibrate(made, "ztw")
    assert files(distilled) == before
    assert len(verbs.calibrate(session(distilled), "ztw")) == 2


def test_a_target_below_the_cheapest_exit_leaves_an_earlier_calibration_even_when_forced(copy):
    before = files(copy)
    with pytest.raises(TargetError):
        verbs.calibrate(session(copy, changed(SMALL, "calibrate", target_macs=(0.1,)), force=True), "ztw")
    assert files(copy) == before


def test_a_calibrated_policy_is_found_by_its_label(done):
    made = session(done)
    assert calibrated_policy(made, "ztw").label == "target_macs=0.8"
    assert calibrated_policy(made, "ztw", "max_return_drop=0.5").label == "max_return_drop=0.5"
    with pytest.raises(LookupError, match="Did you mean 'target_macs=0.8'"):
        calibrated_policy(made, "ztw", "target_macs=0.7")


def test_nothing_is_calibrated_for_static_networks(done):
    before = files(done)
    assert verbs.calibrate(session(done), "static") == []
    assert files(done) == before


def test_without_grid_and_targets_an_evaluation_ends_with_no_rows(distilled):
    config = changed(changed(SMALL, "calibrate", max_return_drop=(), target_macs=()), "evaluate", grid=0)
    verbs.evaluate_method(session(distilled, config), "ztw")
    assert not (distilled / "ztw" / "s0" / "eval" / "episodes.csv").exists()


def test_operating_points_that_look_the_same_are_measured_once(distilled, monkeypatch):
    near = [0.99999991, 0.99999992, 0.99999993]
    monkeypatch.setattr(verbs.calibration, "threshold_grid", lambda scores, points: near)
    verbs.evaluate_method(session(distilled, changed(SMALL, "calibrate", max_return_drop=())), "ztw")
    keys = [(row.label, row.episode) for row in read_rows(distilled / "ztw" / "s0" / "eval" / "episodes.csv")]
    assert len(set(keys)) == len(keys)
    assert [label for label, episode in keys if episode == 0].count("confidence@1") == 1


def test_a_grid_is_measured_for_every_rule(distilled):
    config = changed(SMALL, "evaluate", rules=("confidence", "patience", "entropy"), episodes=1)
    verbs.evaluate_method(session(distilled, config), "ztw")
    rows = read_rows(distilled / "ztw" / "s0" / "eval" / "episodes.csv")
    assert {row.rule for row in rows} == {"confidence", "patience", "entropy"}
    assert len({(row.method, row.label) for row in rows}) == len(rows)


# ---- NaN and a full disk ----


def test_a_loss_that_is_nan_ends_the_run_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    made = session(tmp_path)
    verbs.train(made)
    sound = toy.ToyDomain.batches

    def spoilt(self, seed):
        def collect(act, first):
            for number, count in enumerate(sound(self, seed)(act, first), start=first):
                if number == 7:
                    act(torch.full((8, toy.OBSERVED), torch.nan))
                yield count

        return collect

    monkeypatch.setattr(toy.ToyDomain, "batches", spoilt)
    with pytest.raises(Diverged, match="`distill/kl` became .*nan.* lower `distill.learning_rate`"):
        verbs.distill(made, "ztw")
    folder = made.method("ztw")
    tensors, facts = checkpoint.load(folder, "state")
    assert facts["buffers"] == SMALL.distill.checkpoint_buffers
    assert all(bool(torch.isfinite(value).all()) for value in tensors.values() if value.is_floating_point())
    assert not checkpoint.exists(folder, "policy")
    monkeypatch.setattr(toy.ToyDomain, "batches", sound)
    verbs.distill(session(tmp_path), "ztw")


@pytest.mark.parametrize("save", [2, 3, 4])
def test_a_full_disk_leaves_the_last_checkpoint_and_the_run_goes_on_from_it(done, tmp_path, monkeypatch, save):
    made = session(tmp_path)
    verbs.train(made)
    sound, saved = checkpoint.save, []

    def full(folder, name, tensors, facts):
        saved.append(name)
        if len(saved) == save:
            with monkeypatch.context() as inner:
                inner.setattr(checkpoint.os, "fsync", no_space)
                return sound(folder, name, tensors, facts)
        return sound(folder, name, tensors, facts)

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(OSError, match="No space left"):
        verbs.distill(made, "ztw")
    checkpoint.load(made.method("ztw"), "state")
    monkeypatch.setattr(checkpoint, "save", sound)
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".tmp")]
    verbs.distill(session(tmp_path), "ztw")
    assert (tmp_path / "ztw/s0/policy.json").read_bytes() == (done / "ztw/s0/policy.json").read_bytes()


def no_space(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


# ---- the session ----


def test_settings_are_json_and_all_of_them_are_stored_with_a_stage(done):
    stored = json.loads((done / "ztw" / "s0" / "distill.run.json").read_bytes())
    assert stored["config"]["evaluate"]["rules"] == ["confidence", "patience"]
    assert stored["settings"]["distill"]["static_widths"] == [0.5, 0.25]
    assert stored["settings"]["seed"] == 0
    assert {"torch", "numpy"} <= set(stored["versions"])


def test_a_watch_raises_after_a_signal_and_not_before(tmp_path):
    with session(tmp_path).watch("work") as watch:
        assert isinstance(watch, Watch)
    with pytest.raises(Stopped), session(tmp_path, stop=StopAfter(0)).watch("work"):
        pass


def test_film_and_curve_of_an_episode_lie_in_the_folder_of_the_method(copy):
    path = verbs.video(session(copy), "ztw", 1, None, 9)
    assert path == copy / "ztw" / "s0" / "video" / "ep1.webp"
    assert b"target_macs=0.8 1 9" in path.read_bytes()


def test_a_domain_without_episodes_has_nothing_to_film(copy):
    class Still(toy.ToyDomain):
        film = None  # type: ignore[assignment]

    made = replace(session(copy), domain=Still(SMALL))
    assert isinstance(made.domain, Domain)
    with pytest.raises(ValueError, match="`video` must be of episodes, got alpha, which has none"):
        verbs.video(made, "ztw", 1, None, 9)


def test_a_seed_changes_the_exits_and_nothing_else(tmp_path):
    config = replace(SMALL, methods=("sdn",))
    verbs.train(session(tmp_path, config))
    for seed in (0, 1):
        verbs.distill(session(tmp_path, config, seed=seed), "sdn")
    networks = [load_network(session(tmp_path, config, seed=seed), "sdn")[""] for seed in (0, 1)]
    inputs = torch.randn(4, toy.OBSERVED)
    ours, theirs = (network(inputs).answers for network in networks)
    assert torch.equal(ours[:, -1], theirs[:, -1])
    assert not torch.allclose(ours[:, 0], theirs[:, 0])
