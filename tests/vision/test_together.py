"""Methods that share one frozen backbone: trained side by side as if alone, resumed, and trained with the backbone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from rlexit import checkpoint, verbs
from rlexit.distill import Distiller
from rlexit.domain import Labelled
from rlexit.interrupts import StopFlag, Stopped
from rlexit.rows import read_rows
from rlexit.session import Session, load_network
from rlexit.students import ExitStudent, JointStudent
from rlexit.together import SharedSamples, train_together
from tests.rlexit.toy_domain import StopAfter
from tests.vision.small_images import SMALL, changed
from vision.config import VisionConfig
from vision.domain import VisionDomain, domain
from vision.network import Classifier

CONFIG = replace(SMALL, methods=("sdn", "ztw"))


def session(root: Path, config: VisionConfig = CONFIG) -> Session:
    return Session(domain(config), root, 0, Console(quiet=True), StopFlag())


def learnt(root: Path, method: str) -> dict[str, torch.Tensor]:
    return checkpoint.load(root / method / "s0", "policy")[0]


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.fixture(scope="module")
def apart(tmp_path_factory) -> Path:
    """Both methods, one after the other."""
    root = tmp_path_factory.mktemp("runs") / "apart"
    verbs.train(session(root))
    for method in ("sdn", "ztw"):
        verbs.distill(session(root), method)
    return root


def test_images_come_with_labels():
    assert isinstance(VisionDomain(SMALL), Labelled)


def test_methods_trained_side_by_side_are_what_they_are_alone(apart, tmp_path):
    made = session(tmp_path)
    verbs.train(made)
    verbs.distill(made, "sdn", "ztw")
    for method in ("sdn", "ztw"):
        assert equal(learnt(tmp_path, method), learnt(apart, method))
        assert made.stage("distill", method).is_done()


class Counting:
    """Rows that passed the backbone."""

    def __init__(self, network: Classifier) -> None:
        self.rows = 0
        next(iter(network.units.values())).register_forward_hook(self)

    def __call__(self, module, inputs, output) -> None:
        self.rows += 0 if output.is_meta else len(output)  # what is only counted is not computed


def pair(root: Path, shared: bool) -> tuple[list[Distiller], list[Counting]]:
    made = session(root)
    networks = []
    for method in _methods():
        torch.manual_seed(0)  # the heads that the verb draws
        networks.append(made.domain.network(made.teacher, method))
    counts = [Counting(network) for network in networks]  # type: ignore[arg-type]
    samples = SharedSamples(lambda first: made.domain.samples(0, first), ExitStudent(networks[0]).look)  # type: ignore[attr-defined]
    observe = samples.observe if shared else None
    students = [ExitStudent(network, observe) for network in networks]
    folders = [root / f"pair{index}" for index in range(2)]
    config = CONFIG.distill
    return [
        Distiller(student, samples, config, folder, 0) for student, folder in zip(students, folders, strict=True)
    ], counts


def _methods():
    from rlexit.config import METHODS

    return [METHODS["sdn"], METHODS["ztw"]]


def test_each_batch_passes_the_backbone_once_for_all(tmp_path):
    verbs.train(session(tmp_path))
    distillers, counts = pair(tmp_path, shared=True)
    train_together(distillers, lambda: False)
    # 115 images train: two buffers of 64 and 51 an epoch; sdn ends with the heads, ztw fits its ensemble on some more.
    assert counts[0].rows == distillers[1].samples
    assert counts[1].rows == 0
    assert distillers[0].samples < distillers[1].samples


@pytest.mark.parametrize("rounds", [1, 4, 6])
def test_a_stopped_pair_goes_on_to_the_same_end(apart, tmp_path, rounds):
    made = session(tmp_path)
    verbs.train(made)
    stopped = Session(made.domain, tmp_path, 0, Console(quiet=True), StopAfter(rounds))
    with pytest.raises(Stopped):
        verbs.distill(stopped, "sdn", "ztw")
    assert not made.stage("distill", "ztw").is_done()
    verbs.distill(session(tmp_path), "sdn", "ztw")
    for method in ("sdn", "ztw"):
        assert equal(learnt(tmp_path, method), learnt(apart, method))


def test_one_that_is_behind_catches_up_first(apart, tmp_path):
    verbs.train(session(tmp_path))
    distillers, _ = pair(tmp_path, shared=True)
    distillers[0].stop = StopAfter(5)
    with pytest.raises(Stopped):
        distillers[0].run()
    distillers, _ = pair(tmp_path, shared=True)
    train_together(distillers, lambda: False)
    for distiller, method in zip(distillers, ("sdn", "ztw"), strict=True):
        mine = distiller.student.network.state_dict()  # type: ignore[attr-defined]
        assert all(torch.equal(mine[key[1:]], value) for key, value in learnt(apart, method).items())
    assert distillers[0].buffers < distillers[1].buffers


@pytest.mark.parametrize("regime", ["mixed", "joint"])
def test_backbone_and_heads_are_trained_together_and_the_teacher_stays(tmp_path, regime):
    config = changed(replace(CONFIG, methods=("ztw",)), "distill", regime=regime, label_weight=0.5, backbone_share=0.5)
    made = session(tmp_path, config)
    verbs.train(made)
    before = checkpoint.load(made.teacher, "teacher")[0]
    verbs.distill(made, "ztw")
    verbs.calibrate(made, "ztw")
    verbs.evaluate_method(made, "ztw")
    assert equal(before, checkpoint.load(made.teacher, "teacher")[0])
    network = load_network(made, "ztw")[""]
    mine = network.state_dict()
    names = network.plain_names()  # type: ignore[operator]
    moved = [ours for ours, plain in names.items() if plain in before and not torch.equal(mine[ours], before[plain])]
    assert any("conv" in name for name in moved)
    assert any("running_mean" in name for name in moved)
    rows = read_rows(made.method("ztw") / "eval" / "episodes.csv")
    assert max(row.value for row in rows) > 0.4  # chance is 0.25


@pytest.mark.parametrize("regime", ["mixed", "joint"])
def test_a_backbone_that_learns_along_goes_on_to_the_same_end(tmp_path, regime):
    config = changed(replace(CONFIG, methods=("ztw",)), "distill", regime=regime, steps=320, ensemble_steps=64)
    found = []
    for rounds in (0, 3):
        root = tmp_path / str(rounds)
        made = session(root, config)
        verbs.train(made)
        if rounds:
            with pytest.raises(Stopped):
                verbs.distill(Session(made.domain, root, 0, Console(quiet=True), StopAfter(rounds)), "ztw")
        verbs.distill(session(root, config), "ztw")
        found.append(learnt(root, "ztw"))
    assert equal(*found)


def test_joint_training_does_not_start_from_the_teacher(tmp_path):
    config = changed(CONFIG, "distill", regime="joint", steps=32, ensemble_steps=32, learning_rate=1e-9)
    made = session(tmp_path, config)
    verbs.train(made)
    verbs.distill(made, "sdn")
    network = load_network(made, "sdn")[""]
    teacher = checkpoint.load(made.teacher, "teacher")[0]
    names = network.plain_names()  # type: ignore[operator]
    [conv] = [ours for ours, plain in names.items() if plain == "conv1.weight"]
    assert not torch.allclose(network.state_dict()[conv], teacher["conv1.weight"], atol=1e-3)


def test_the_backbone_learns_at_its_share_of_the_rate():
    made = VisionDomain(CONFIG)
    network = made.blank(_methods()[1])
    student = JointStudent(network, made.blank(_methods()[0]), 0.25)
    groups = student.groups()
    assert set(groups) == {0.25, 1.0}
    assert sum(map(len, groups.values())) == len(list(student.learners().parameters()))
    stem = next(iter(network.units.values()))
    assert {id(parameter) for parameter in stem.parameters()} <= {id(parameter) for parameter in groups[0.25]}
    assert set(JointStudent(network, network, 1.0).groups()) == {1.0}


def test_a_regime_that_is_none_is_refused():
    with pytest.raises(ValueError, match="`distill.regime` must be one of disjoint, mixed, joint, got 'half'"):
        changed(CONFIG, "distill", regime="half")
