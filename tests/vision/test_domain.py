"""The vision domain: from nothing to a report on generated images, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from rlexit import checkpoint, dissection, verbs
from rlexit.cli import main
from rlexit.config import METHODS, Method
from rlexit.dissection import BudgetRow, ExitRow
from rlexit.domain import Domain, Filming, Watch
from rlexit.exit_policy import ExitPolicy
from rlexit.interrupts import StopFlag
from rlexit.rows import read_latency, read_rows
from rlexit.runlog import read_scalars
from rlexit.session import Session, load_network
from rlexit.statedicts import ImportRefused
from rlexit.tables import latency_table
from tests.vision.small_images import SMALL, changed, hub_folder, pairs
from vision.config import VisionConfig
from vision.domain import VisionDomain, domain
from vision.network import weights


def session(root: Path, config: VisionConfig = SMALL) -> Session:
    return Session(domain(config), root, 0, Console(quiet=True), StopFlag())


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """Everything up to evaluated rows, once for all tests that only look."""
    root = tmp_path_factory.mktemp("runs") / "small"
    made = session(root)
    verbs.train(made)
    verbs.evaluate_teacher(made)
    for method in ("ztw", "static"):
        verbs.distill(made, method)
        verbs.calibrate(made, method)
        verbs.evaluate_method(made, method)
    return root


def test_it_is_a_domain_that_has_nothing_to_film():
    assert isinstance(VisionDomain(SMALL), Domain)
    assert not isinstance(VisionDomain(SMALL), Filming)


def test_every_operating_point_has_rows_over_the_whole_test_set(run_folder):
    rows = read_rows(run_folder / "ztw" / "s0" / "eval" / "episodes.csv")
    assert {row.metric for row in rows} == {"accuracy"}
    assert {row.execution for row in rows} == {"real"}
    labels = {row.label for row in rows}
    assert "target_macs=1.2" in labels
    assert "exit 0" not in labels  # all exits are asked at once, about all rows
    assert [row.exit for row in dissection.load(run_folder / "ztw" / "s0" / "eval", ExitRow)] == [0, 1, 2, 3]
    for label in labels:
        mine = [row for row in rows if (row.label, row.rule) == (label, rows[0].rule)]
        if mine:
            assert sum(row.decisions for row in mine) == 192
    protocol = json.loads(rows[0].protocol)
    assert protocol["test_images"] == 192
    assert protocol["thresholds_from"] == "0.4 of the training images"
    assert protocol["backbone"]["depth"] == 8


def test_exits_learn_and_leave_the_backbone_alone(run_folder):
    made = session(run_folder)
    network = load_network(made, "ztw")[""]
    teacher = checkpoint.load(made.teacher, "teacher")[0]
    mine = weights(network)  # type: ignore[arg-type]
    assert all(torch.equal(mine[key], value) for key, value in teacher.items())
    loss = [value for _, tag, value in read_scalars(made.method("ztw")) if tag == "distill/loss/exit2"]
    assert loss[-1] < loss[0]


def test_the_last_exit_has_a_place_in_the_ensemble(run_folder):
    network = load_network(session(run_folder), "ztw")[""]
    assert network.ensemble.exits == network.exits == 4
    weights_of_last = network.ensemble.weights()[-1]
    assert weights_of_last.shape == (4,)
    images = VisionDomain(SMALL).data.evaluated("test").pixels[:5]
    trace = network(images)
    alone = trace.logits[:, -1].log_softmax(dim=-1)
    assert not torch.allclose(trace.answers[:, -1], alone, atol=1e-4)


def test_a_teacher_is_judged_without_the_method_s_ensemble(tmp_path):
    config = replace(SMALL, calibrate=replace(SMALL.calibrate, target_macs=(), max_return_drop=(0.9,), candidates=2))
    made = session(tmp_path, config)
    verbs.train(made)
    verbs.distill(made, "ztw")
    verbs.calibrate(made, "ztw")
    [path] = (made.teacher / "certification").rglob("teacher.csv")
    rows = read_rows(path)
    assert {row.relative_macs for row in rows} == {1.0}
    assert not list((made.teacher / "certification").rglob("random.csv"))  # an accuracy has its floor at 0


def test_replaying_gives_the_accuracies_and_exits_of_real_execution(run_folder):
    network = load_network(session(run_folder), "ztw")[""]
    policies = [ExitPolicy("confidence", (limit,) * 3) for limit in (0.3, 0.4, 0.5, 2.0)]
    jobs = [(policy, episode) for episode in range(4) for policy in range(4)]
    found = {}
    for execution in ("real", "replay"):
        config = changed(SMALL, "evaluate", execution=execution)
        played = VisionDomain(config).play(network, policies, jobs, "test", 0, Watch())
        found[execution] = {(one.policy, one.episode): (one.value, one.exits.tolist()) for one in played}
    assert found["real"] == found["replay"]
    assert len(found["real"]) == 16


def test_real_execution_costs_less_and_a_replay_says_what_it_did(run_folder):
    network = load_network(session(run_folder), "ztw")[""]
    policy = [ExitPolicy("confidence", (-np.inf,) * 3)]
    macs = {}
    for execution in ("real", "replay"):
        config = changed(SMALL, "evaluate", execution=execution)
        [played] = VisionDomain(config).play(network, policy, [(0, 0)], "test", 0, Watch())
        macs[execution] = played.macs
    assert macs["real"] < 0.7 * macs["replay"]


def test_guessing_is_right_as_often_as_chance():
    played = list(VisionDomain(SMALL).play(None, [ExitPolicy.full(2)], [(0, e) for e in range(4)], "test", 0, Watch()))
    assert 0.1 < np.mean([one.value for one in played]) < 0.4
    assert all(one.macs == 0 for one in played)


def test_more_folds_than_images_are_refused():
    config = changed(SMALL, "calibrate", episodes=500)
    with pytest.raises(ValueError, match="`calibrate.episodes` must be at most the .* certification images, got 500"):
        VisionDomain(config).folds("certification")


def test_samples_go_on_where_they_stopped():
    collect = VisionDomain(SMALL).batches(7)
    seen: list[list[torch.Tensor]] = []

    def act(inputs, labels=None):
        seen[-1].append(labels)
        return torch.zeros(len(inputs), 4)

    for first, count in ((0, 3), (2, 1)):
        seen.append([])
        for _, buffer in zip(range(count), collect(act, first), strict=False):
            assert buffer <= 64
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(seen[0][4:], seen[1], strict=True))


def test_held_out_rows_are_of_the_calibration_split():
    made = VisionDomain(SMALL)
    rows = made.rows(made.blank(Method()), ExitPolicy.full(4), 10, Watch())
    own = {pixels.numpy().tobytes() for pixels in made.data.evaluated("calibration").pixels}
    assert rows.shape == (10, 3, 8, 8)
    assert {row.numpy().tobytes() for row in rows} <= own


# ---- given weights ----


def test_given_weights_are_the_teacher(tmp_path):
    given = VisionDomain(SMALL)._classifier()
    save_file(weights(given), tmp_path / "given.safetensors")
    config = replace(SMALL, teacher=str(tmp_path / "given.safetensors"))
    made = session(tmp_path / "run", config)
    verbs.train(made)
    network = made.domain.network(made.teacher, Method())
    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    torch.testing.assert_close(network(images).answers[:, -1], given.eval()(images).answers[:, -1])
    assert checkpoint.load_facts(made.teacher, "teacher")["source"] == "given.safetensors"


def test_given_weights_of_other_classes_leave_nothing_half_written(tmp_path):
    other = VisionDomain(changed(SMALL, "data", toy_classes=7))._classifier()
    save_file(weights(other), tmp_path / "given.safetensors")
    with pytest.raises(checkpoint.CheckpointError, match=r"`linear.weight` in `.*given.safetensors` must be \(4, 16\)"):
        verbs.train(session(tmp_path / "run", replace(SMALL, teacher=str(tmp_path / "given.safetensors"))))
    assert not list((tmp_path / "run").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("backbone", {"width": 0.5}, "whose backbone.width is 0.25, the config says 0.5"),
        ("data", {"holdout": 0.3}, "whose data.holdout is 0.4, the config says 0.3"),
        ("data", {"toy_classes": 3}, "of 4 other classes than the 3 of `data.path`"),
    ],
)
def test_a_teacher_of_something_else_is_refused(run_folder, section, values, message):
    with pytest.raises(checkpoint.CheckpointError, match=message):
        VisionDomain(changed(SMALL, section, **values)).accept(run_folder / "teacher")


def test_given_weights_of_another_depth_are_a_static_rival(tmp_path):
    deep = VisionDomain(changed(SMALL, "backbone", depth=14))._classifier()
    save_file(weights(deep), tmp_path / "deep.safetensors")
    made = session(tmp_path / "run", replace(SMALL, rivals=(f"14={tmp_path / 'deep.safetensors'}",)))
    verbs.train(made)
    verbs.evaluate_teacher(made)
    rows = read_rows(made.teacher / "eval" / "episodes.csv")
    mine = [row for row in rows if row.method == "static"]
    assert {row.label for row in mine} == {"given depth 14"}
    assert sum(row.decisions for row in mine) == 192
    assert mine[0].relative_macs > 1.5
    found = dissection.load(made.teacher / "eval", BudgetRow)
    assert {(row.method, row.label) for row in found} == {("teacher", "full"), ("static", "given depth 14")}
    assert any(row.method == "static" for row in read_latency(made.teacher / "eval" / "latency.csv"))
    # What it costs is a budget of methods with exits.
    full = round(mine[0].macs_mean / mine[0].relative_macs)
    made.domain.dissect({"": made.domain.blank(METHODS["sdn"])}, "sdn", 0, full, tmp_path, Watch())  # type: ignore[attr-defined]
    shares = {row.budget for row in dissection.load(tmp_path, BudgetRow) if row.choice == "honest"}
    assert any(0.97 < share / mine[0].relative_macs < 1 for share in shares)


def test_an_evaluation_is_done_with_the_weights_of_its_rivals(tmp_path):
    path = tmp_path / "deep.safetensors"
    config = replace(SMALL, rivals=(f"14={path}",))
    stages = []
    for seed in (0, 1, 1):
        torch.manual_seed(seed)
        save_file(weights(VisionDomain(changed(SMALL, "backbone", depth=14))._classifier()), path)
        made = session(tmp_path / "run", config)
        stages.append((made.stage("evaluate").hash, made.stage("evaluate", "ztw").hash))
    assert stages[0][0] != stages[1][0] == stages[2][0]
    assert stages[0][1] == stages[1][1] != session(tmp_path / "run").stage("evaluate", "ztw").hash


def test_a_teacher_made_beside_other_test_images_is_refused(tmp_path):
    made = VisionDomain(SMALL)
    checkpoint.save(tmp_path, "teacher", weights(made._classifier()), made._facts())
    made.accept(tmp_path)
    facts = {**made._facts(), "test_sha256": "0123456789ab"}
    checkpoint.save(tmp_path, "teacher", weights(made._classifier()), facts)
    with pytest.raises(checkpoint.CheckpointError, match="beside test images with the hash 0123456789ab, those of"):
        made.accept(tmp_path)


def test_the_halves_of_a_test_set_are_two_protocols():
    halves = [VisionDomain(changed(SMALL, "data", holdout=0.0, half=half)).protocol() for half in (0, 1)]
    assert halves[0] != halves[1]
    assert halves[0]["test_sha256"] == halves[1]["test_sha256"]


def test_a_rival_that_is_missing_is_told_when_the_config_is_proved(tmp_path):
    made = session(tmp_path / "run", replace(SMALL, rivals=("14=/nowhere/deep.pt",)))
    with pytest.raises(ImportRefused, match="`/nowhere/deep.pt` is missing"):
        made.domain.blank(METHODS["ztw"])
    with pytest.raises(ValueError, match="`rivals` must be of DEPTH=FILE, got 'deep.pt'"):
        replace(SMALL, rivals=("deep.pt",))
    with pytest.raises(ValueError, match="`rivals` must name each depth once"):
        replace(SMALL, rivals=("8=a.pt", "8=b.pt"))


# ---- the command line ----

WORDS = (
    *("--data.toy_rows", "96", "--data.toy_side", "8", "--data.crop", "0", "--train.epochs", "1", "--methods", "sdn"),
    *("--distill.steps", "256", "--evaluate.grid", "2", "--evaluate.latency_rows", "2", "--evaluate.episodes", "2"),
)


def test_one_command_goes_from_nothing_to_a_report(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["run", "toy", "--threads", "1", *WORDS]) == 0
    told = capsys.readouterr().out
    assert "toy-resnet_cifar8" in told
    assert "pbee" in told
    page = (tmp_path / "runs" / "toy" / "report" / "report.html").read_text(encoding="utf-8")
    assert "Accuracy at a compute budget" in page
    assert "Accuracy of every exit" in page
    assert "The easiest and the hardest images of every class" in page
    assert "max" in (tmp_path / "runs" / "toy" / "report" / "report.md").read_text(encoding="utf-8")
    assert (tmp_path / "runs" / "toy" / "report" / "budgets.csv").is_file()
    assert not list((tmp_path / "runs" / "toy").rglob("video"))
    assert main(["run", "toy", "--threads", "1", *WORDS]) == 0  # all done already
    assert main(["video", "toy", "--threads", "1", *WORDS]) == 2
    assert "`video` must be of episodes" in capsys.readouterr().err


def test_a_dry_run_counts_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["run", "toy", "--threads", "1", "--dry_run"]) == 0
    assert "layer1_0" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_bad_data_is_answered_in_one_line_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    rows = pairs(4)
    rows[2] = (rows[2][0][:50], 0)
    hub_folder(tmp_path / "cut", rows, pairs(4))
    capsys.readouterr()
    assert main(["train", "cifar10/resnet20", "--data", str(tmp_path / "cut"), "--threads", "1"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "row 2 of the train split" in line
    assert not list((tmp_path / "runs").rglob("*.safetensors"))


def test_calibrated_points_are_timed_in_batches_too(tmp_path):
    config = replace(SMALL, methods=("sdn",), evaluate=replace(SMALL.evaluate, latency_batches=(8, 4096)))
    made = session(tmp_path, config)
    verbs.train(made)
    verbs.evaluate_teacher(made)
    verbs.distill(made, "sdn")
    verbs.calibrate(made, "sdn")
    verbs.evaluate_method(made, "sdn")
    rows = read_latency(made.method("sdn") / "eval" / "latency.csv")
    assert {row.batch for row in rows} == {1, 8}  # there are no 4096 held-out images
    assert {row.label for row in rows if row.batch == 8} == {"target_macs=1.2", "full"} & {row.label for row in rows}
    whole = read_latency(made.teacher / "eval" / "latency.csv")
    table = latency_table([*rows, *whole])
    assert table is not None
    assert table.header[2].startswith("us per row, batch 1,")
    assert table.header[4].startswith("us per row, batch 8,")
    [teacher] = [line for line in table.rows if line[0] == "teacher"]
    assert teacher[3] == teacher[5] == "1.000"
    assert latency_table(whole[:1]) is None


def test_a_corrupt_image_in_the_middle_of_an_epoch_leaves_a_training_that_can_go_on(tmp_path, monkeypatch, capsys):
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    rows = pairs(24)
    rows[13] = (rows[13][0][:50], 1)
    words = (
        "--data.memory_gb",
        "2e-6",
        "--data.holdout",
        "0",
        "--data.crop",
        "0",
        "--data.flip",
        "false",
        "--backbone.width",
        "0.25",
    )
    words = (*words, "--train.epochs", "1", "--train.batch_size", "4", "--threads", "1")
    hub_folder(tmp_path / "pets", rows, pairs(8))
    capsys.readouterr()
    assert main(["train", "cifar10/resnet20", "--data", str(tmp_path / "pets"), *words]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "row 13 of the train split" in line
    assert not list((tmp_path / "runs").rglob("teacher*.safetensors"))
