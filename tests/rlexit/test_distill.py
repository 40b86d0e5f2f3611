"""Distillation in a toy world: it teaches, it touches nothing else, and it resumes bit for bit."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from rlexit import checkpoint
from rlexit.config import DistillConfig, HeadConfig
from rlexit.distill import STATE, Distiller, learning_rate, loss_of
from rlexit.domain import Act, Batches
from rlexit.ensembles import GeometricEnsemble, NoEnsemble
from rlexit.heads import Head, LinearHead, ModuleHead
from rlexit.interrupts import Diverged, Stopped
from rlexit.network import StagedNetwork
from rlexit.runlog import read_scalars
from rlexit.students import ExitStudent, StaticStudent, Student
from rlexit.units import ModuleUnit
from tests.rlexit.toys import watched

ACTIONS = 4
GAMES, STEPS = 16, 4
BUFFER = GAMES * STEPS
HEADS, ENSEMBLE = 14, 4  # buffers of each stage
CONFIG = DistillConfig(
    steps=HEADS * BUFFER,
    ensemble_steps=ENSEMBLE * BUFFER,
    batch_size=32,
    epochs=2,
    learning_rate=0.05,
    schedule="steps",
    warmup=0.0,
    decay_at=(0.6, 0.9),
    checkpoint_buffers=4,
)


def block(inputs: int, channels: int = 4) -> ModuleUnit:
    """Has batch statistics, which a frozen backbone must not move."""
    layers = (nn.Conv2d(inputs, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())
    return ModuleUnit(nn.Sequential(*layers))


def network(ensemble: bool = True) -> StagedNetwork:
    torch.manual_seed(4)
    units = OrderedDict(first=block(1), second=block(4), third=block(4))
    config = HeadConfig(kind="linear")
    last = nn.Linear(4 * 36, ACTIONS)
    nn.init.normal_(last.weight, std=0.7)
    heads: dict[str, Head] = {
        "first": LinearHead((4, 6, 6), ACTIONS, config, False),
        "second": LinearHead((4, 6, 6), ACTIONS, config, True),
        "third": ModuleHead(nn.Sequential(nn.Flatten(), last)),
    }
    made = StagedNetwork(units, heads, ACTIONS, GeometricEnsemble(2, ACTIONS) if ensemble else None)
    pictures = torch.randint(0, 256, (256, 1, 6, 6), dtype=torch.uint8)
    with torch.no_grad():
        # The teacher prefers no action for all pictures alike, and is rather sure of the one that it takes.
        last.bias.sub_(made.eval()(pictures).logits[:, -1].mean(dim=0))
        last.weight.mul_(12)
        last.bias.mul_(12)
    return made.train()


class World:
    """Games whose next picture depends on the action, so that where a run resumes is seen in what it learns.

    Args:
        trouble: called before every buffer with its index.
    """

    def __init__(self, trouble=lambda buffer: None) -> None:
        self.trouble = trouble
        self.starts: list[int] = []
        self.told: list[Tensor] = []
        self.shown: list[Tensor] = []

    def __call__(self, act: Act, first: int) -> Iterator[int]:
        self.starts.append(first)
        generator = torch.Generator().manual_seed(1000 + first)
        pictures = torch.randint(0, 256, (GAMES, 1, 6, 6), generator=generator, dtype=torch.uint8)
        buffer = first
        while True:
            self.trouble(buffer)
            for _ in range(STEPS):
                answers = act(pictures)
                self.shown.append(pictures)
                self.told.append(answers)
                rolled = [
                    picture.roll(1 + int(action), dims=2)
                    for picture, action in zip(pictures, answers.argmax(1), strict=True)
                ]
                fresh = torch.randint(0, 256, pictures.shape, generator=generator, dtype=torch.uint8)
                pictures = torch.where(
                    torch.rand(pictures.shape, generator=generator) < 0.3, fresh, torch.stack(rolled)
                )
            yield BUFFER
            buffer += 1


def distiller(folder, student: Student | None = None, world=None, config=CONFIG, **more) -> Distiller:
    return Distiller(student or ExitStudent(network()), world or World(), config, folder, seed=3, **more)


def ends(folder, config=CONFIG, stops=(), kills=()) -> tuple[dict[str, Tensor], list, dict[str, float]]:
    """Runs to the end, over stops by signal or kills at the given buffers; weights, curves and last facts."""
    for place in stops:
        run = distiller(folder, config=config)
        run.stop = lambda run=run, place=place: run.buffers >= place
        with pytest.raises(Stopped):
            run.run()
    for place in kills:

        def die(buffer: int, place: int = place) -> None:
            if buffer == place:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            distiller(folder, world=World(die), config=config).run()
    student = ExitStudent(network())
    facts = distiller(folder, student, config=config).run()
    return dict(student.state_dict()), read_scalars(folder), facts


# ---- it teaches ----


def test_agreement_rises_and_the_loss_falls_at_every_exit(tmp_path):
    _, curves, facts = ends(tmp_path)
    assert facts.keys() >= {"kl/exit0", "kl/exit1", "agree/exit0", "agree/exit1", "kl_without_ensemble/exit0"}
    for exit in range(2):
        agree = [value for _, tag, value in curves if tag == f"distill/agree/exit{exit}"]
        loss = [value for _, tag, value in curves if tag == f"distill/kl/exit{exit}"]
        assert sum(agree[HEADS - 4 : HEADS]) / 4 > agree[0] + 0.25
        assert agree[-1] > 0.55
        assert sum(loss[HEADS - 4 : HEADS]) / 4 < 0.7 * loss[0]
    # The fitted ensembles are no worse than the heads alone on what they were fitted on.
    for exit in range(2):
        assert facts[f"kl/exit{exit}"] <= facts[f"kl_without_ensemble/exit{exit}"] + 1e-6


def test_curves_have_one_point_per_buffer_and_count_samples(tmp_path):
    _, curves, _ = ends(tmp_path)
    steps = [step for step, tag, _ in curves if tag == "distill/kl/exit0"]
    assert steps == [*range(BUFFER, (HEADS + 1) * BUFFER, BUFFER), (HEADS + ENSEMBLE) * BUFFER]


def test_only_heads_and_ensembles_change(tmp_path):
    before = {key: value.clone() for key, value in ExitStudent(network()).state_dict().items()}
    after, _, _ = ends(tmp_path)
    learnt = ("network.heads.first.", "network.heads.second.", "network.ensemble.", "ensemble.")
    for key, value in before.items():
        assert torch.equal(after[key], value) is not key.startswith(learnt), key


def test_only_heads_and_ensembles_get_gradients(tmp_path):
    student = ExitStudent(network())
    distiller(tmp_path, student).run()
    trained = {name for name, parameter in student.network.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"heads", "ensemble"}
    assert not any(name.startswith("heads.third") for name in trained)


def test_features_are_computed_once_per_sample(tmp_path):
    student = ExitStudent(network())
    with watched(student.network) as work:
        distiller(tmp_path, student).run()
    total = (HEADS + ENSEMBLE) * BUFFER
    assert work.rows["units.first"] == work.rows["units.third"] == total
    assert work.rows["heads.third"] == total
    # Heads: once to act, and `epochs` times to learn; in the ensemble stage once more to fit.
    assert work.rows["heads.first"] == total + 2 * HEADS * BUFFER + ENSEMBLE * BUFFER


def test_without_an_ensemble_there_is_one_stage(tmp_path):
    student = ExitStudent(network(ensemble=False))
    run = distiller(tmp_path, student)
    assert run.total == HEADS * BUFFER
    assert run.run().keys() == {"kl/exit0", "kl/exit1", "agree/exit0", "agree/exit1"}
    assert isinstance(student.ensemble, NoEnsemble)


# ---- who drives ----


def test_every_exit_and_the_teacher_drive_and_each_row_by_its_own_answer(tmp_path):
    student, world = ExitStudent(network()), World()
    trace_before = {}

    def snapshot(buffer: int) -> None:
        if buffer == 0:
            with torch.no_grad():
                trace_before["network"] = network().eval()

    world.trouble = snapshot
    distiller(tmp_path, student, world).run()
    shown, told = world.shown[0], world.told[0]
    every = trace_before["network"](shown).logits.log_softmax(dim=-1)
    distance = (every - told[:, None]).abs().amax(dim=-1)
    assert bool((distance.amin(dim=1) < 1e-5).all())
    assert distance.argmin(dim=1).unique().tolist() == [0, 1, 2]


def test_in_the_ensemble_stage_the_ensembles_drive(tmp_path):
    student, world = ExitStudent(network()), World()
    run = distiller(tmp_path, student, world)
    run.run()
    network_now = student.network.eval()
    first = HEADS * STEPS  # the first step of the ensemble stage: the heads are done, the ensembles at their start
    logits = network_now(world.shown[first]).logits
    start = network().ensemble
    answers = start.combine_all(logits.log_softmax(dim=-1))
    distance = (answers - world.told[first][:, None]).abs().amax(dim=-1)
    assert bool((distance.amin(dim=1) < 1e-5).all())


def test_the_reference_drives_every_row_by_the_first_rows_answer(tmp_path):
    config = DistillConfig(steps=BUFFER, ensemble_steps=BUFFER, batch_size=32, epochs=1, reference=True)
    world = World()
    distiller(tmp_path, world=world, config=config).run()
    every = network().eval()(world.shown[0][:1]).logits.log_softmax(dim=-1)[0]
    distance = (every[None] - world.told[0][:, None]).abs().amax(dim=-1)
    assert bool((distance.amin(dim=1) < 1e-5).all())
    assert distance.argmin(dim=1).unique().tolist() == [0, 1, 2]


def test_the_reference_trains_ensembles_while_acting(tmp_path):
    config = DistillConfig(
        steps=4 * BUFFER, ensemble_steps=4 * BUFFER, batch_size=32, epochs=2, checkpoint_buffers=3, reference=True
    )
    weights, curves, facts = ends(tmp_path, config)
    assert "kl_without_ensemble/exit0" not in facts
    assert len([tag for _, tag, _ in curves if tag == "distill/kl/exit1"]) == 8
    assert not torch.equal(weights["ensemble.log_bias.1"], network().ensemble.state_dict()["log_bias.1"])


# ---- it resumes ----


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    return ends(tmp_path_factory.mktemp("calm"))


def assert_same_run(first, second) -> None:
    weights, curves, facts = first
    assert weights.keys() == second[0].keys()
    for name, value in weights.items():
        assert torch.equal(value, second[0][name]), name
    assert curves == second[1]
    assert facts == second[2]


@pytest.mark.parametrize("stops", [[1], [4], [6], [HEADS], [HEADS + 2], [5, 9, 13, 15]])
def test_a_stopped_and_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, calm, stops):
    assert_same_run(ends(tmp_path, stops=stops), calm)


@pytest.mark.parametrize("kills", [[0], [7], [9, 9, 14], [HEADS + 3]])
def test_a_killed_and_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, calm, kills):
    assert_same_run(ends(tmp_path, kills=kills), calm)


def test_dropout_draws_the_same_after_a_resume(tmp_path):
    def trained(folder, *draws: int, stop_at: int = HEADS + 1) -> dict[str, Tensor]:
        for draw in draws:
            torch.manual_seed(5)
            head = ModuleHead(nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(4 * 36, ACTIONS)))
            dropping = StagedNetwork({"only": block(1, 4)}, {"only": head}, ACTIONS)
            student = StaticStudent([dropping], network().eval(), NoEnsemble(1, ACTIONS))
            torch.manual_seed(draw)  # whatever else was drawn in the process
            run = distiller(folder, student)
            if draw != draws[-1]:
                run.stop = lambda run=run: run.buffers >= stop_at
            with nullcontext() if draw == draws[-1] else pytest.raises(Stopped):
                run.run()
        return dict(dropping.state_dict())

    whole, resumed = trained(tmp_path / "whole", 6), trained(tmp_path / "resumed", 6, 7, stop_at=4)
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())


def test_the_reference_resumes_bit_for_bit_too(tmp_path):
    config = DistillConfig(
        steps=5 * BUFFER, ensemble_steps=6 * BUFFER, batch_size=32, epochs=2, checkpoint_buffers=2, reference=True
    )
    assert_same_run(ends(tmp_path / "a", config, stops=[3, 8]), ends(tmp_path / "b", config))


def test_games_start_afresh_at_checkpoints_only(tmp_path):
    world = World()
    distiller(tmp_path, world=world).run()
    assert world.starts == [0, 4, 8, 12, HEADS]


def test_a_stop_after_the_last_sample_does_not_undo_the_end(tmp_path):
    run = distiller(tmp_path, ExitStudent(network(ensemble=False)))
    run.stop = lambda: run.samples >= run.total
    assert run.run()["agree/exit0"] > 0


def test_progress_is_told_for_every_buffer(tmp_path):
    told: list[tuple[int, int]] = []
    distiller(tmp_path, progress=lambda done, total, facts: told.append((done, total))).run()
    total = (HEADS + ENSEMBLE) * BUFFER
    assert told == [(done, total) for done in range(BUFFER, total + 1, BUFFER)]


# ---- it diverges ----


def test_a_loss_that_is_not_a_number_is_an_error_and_the_saved_state_stays(tmp_path, calm):
    student = ExitStudent(network())

    def poison(buffer: int) -> None:
        if buffer == 6:
            with torch.no_grad():
                student.network.heads["first"].linear.weight.fill_(math.nan)

    with pytest.raises(
        Diverged, match=r"`distill/kl` became \[nan, .*after 448 samples. The last checkpoint is kept; lower"
    ):
        distiller(tmp_path, student, World(poison)).run()
    tensors, facts = checkpoint.load(tmp_path, STATE)
    assert facts == {"buffers": 4, "samples": 4 * BUFFER}
    assert all(bool(torch.isfinite(value).all()) for value in tensors.values() if value.is_floating_point())
    assert_same_run(ends(tmp_path), calm)


# ---- labels, and a last exit that is combined too ----


class Pictures:
    """Pictures with labels that the teacher would never give: whether the upper or the lower half is brighter."""

    def __init__(self) -> None:
        self.told: list[Tensor] = []

    def __call__(self, act: Act, first: int) -> Iterator[int]:
        generator = torch.Generator().manual_seed(first)
        while True:
            labels = torch.randint(0, 2, (BUFFER,), generator=generator)
            pictures = torch.randint(0, 100, (BUFFER, 1, 6, 6), generator=generator, dtype=torch.uint8)
            for row, label in enumerate(labels.tolist()):
                pictures[row, :, 3 * label : 3 * label + 3] += 100
            self.told.append(act(pictures, labels))
            yield BUFFER


LABELLED = replace(CONFIG, label_weight=1.0, checkpoint_buffers=100)


def test_labels_are_learnt_where_they_are_given_and_nobody_acts(tmp_path):
    student, world = ExitStudent(network(ensemble=False)), Pictures()
    with watched(student.network) as work:
        curves = distiller(tmp_path, student, world, LABELLED).run()
    assert curves["loss/exit0"] < 0.3  # two labels at chance: 0.69; no teacher would bring it below
    # To act no head is run: once per sample and epoch, to learn.
    assert work.rows["heads.first"] == 2 * HEADS * BUFFER
    last = student.network.head(2)
    assert torch.equal(world.told[0], last(student.network.taps(images_of(0))[-1]).log_softmax(dim=-1))


def images_of(first: int) -> Tensor:
    found: list[Tensor] = []

    def see(inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        found.append(inputs)
        return inputs

    next(Pictures()(see, first))
    return found[0]


def test_the_loss_takes_the_label_in_place_of_the_teacher_s_choice():
    teacher, student = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[[0.25, 0.5, 0.25]]]).log()
    labels = torch.tensor([1])
    assert loss_of(DistillConfig(label_weight=1.0))(teacher, student, labels).item() == pytest.approx(math.log(2))
    mixed = loss_of(DistillConfig(label_weight=0.25))(teacher, student, labels).item()
    assert mixed == pytest.approx(0.75 * 0.25 * math.log(2) + 0.25 * math.log(2))


def test_an_ensemble_with_a_place_for_the_last_exit_is_fitted_there_too(tmp_path):
    made = network(ensemble=False)
    made.ensemble = GeometricEnsemble(3, ACTIONS)
    before = [parameter.clone() for parameter in made.ensemble.log_weights]
    curves = distiller(tmp_path, ExitStudent(made), Pictures(), LABELLED).run()
    assert {"loss/exit2", "loss_without_ensemble/exit2", "agree/exit2"} < curves.keys()
    assert curves["loss/exit2"] <= curves["loss/exit1"] + 1e-3  # one more opinion does no harm
    for old, new in zip(before, made.ensemble.log_weights, strict=True):
        assert not torch.allclose(old, new)


def test_weights_decay_in_heads_and_not_in_ensembles(tmp_path):
    optimizers = distiller(tmp_path, config=replace(CONFIG, weight_decay=0.01)).optimizers
    decays = {name: optimizer.param_groups[0]["weight_decay"] for name, optimizer in optimizers.items()}
    assert decays == {"heads": 0.01, "ensemble": 0.0}


def test_features_are_kept_in_the_precision_of_the_frozen_backbone(tmp_path):
    config = replace(LABELLED, frozen_precision="bf16")
    run = distiller(tmp_path, world=Pictures(), config=config)
    run._act(images_of(0), torch.zeros(BUFFER, dtype=torch.int64))
    features, teacher, labels = run.buffer.joined()
    assert {feature.dtype for feature in features} == {torch.bfloat16}
    assert teacher.dtype == torch.float32
    assert labels is not None
    run.buffer.clear()
    assert run.run()["loss/exit0"] < 0.5
    with pytest.raises(
        ValueError, match="`distill.frozen_precision` must be fp32 where distill.precision is, got 'bf16'"
    ):
        replace(config, precision="fp32")


# ---- parts ----


def test_the_loss_mixes_imitation_and_labels():
    teacher = torch.tensor([[0.5, 0.25, 0.25]]).log()
    student = torch.tensor([[[0.25, 0.5, 0.25]]]).log()
    kl = 0.25 * math.log(2)
    assert loss_of(DistillConfig())(teacher, student).item() == pytest.approx(kl)
    assert loss_of(DistillConfig(label_weight=1.0))(teacher, student).item() == pytest.approx(math.log(4))
    mixed = loss_of(DistillConfig(label_weight=0.25))(teacher, student).item()
    assert mixed == pytest.approx(0.75 * kl + 0.25 * math.log(4))


def test_the_reference_divides_the_golden_kl_by_the_outputs():
    teacher = torch.tensor([[1.0, 0.0, -1.0], [0.2, 0.1, 0.0]]).log_softmax(dim=-1)
    student = torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]]).log_softmax(dim=-1)[:, None]
    assert loss_of(DistillConfig(reference=True))(teacher, student).mean().item() == pytest.approx(0.0490954, abs=2e-7)
    assert loss_of(DistillConfig())(teacher, student).mean().item() == pytest.approx(0.1472861, abs=2e-7)


def test_in_steps_the_learning_rate_falls_twice():
    config = DistillConfig(learning_rate=0.01, schedule="steps", warmup=0.0)
    rates = [learning_rate(config, done) for done in (0.0, 0.09, 0.1, 0.74, 0.75, 1.0)]
    assert rates == pytest.approx([0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001])


def test_the_learning_rate_rises_and_then_falls_by_a_cosine():
    config = DistillConfig(learning_rate=0.01, warmup=0.1)
    rates = [learning_rate(config, done) for done in (0.0, 0.05, 0.5, 1.0)]
    assert rates == pytest.approx([0.0, 0.005 * (1 + math.cos(math.pi * 0.05)) / 2, 0.005, 0.0])


def test_a_network_without_early_exits_cannot_be_distilled():
    one = StagedNetwork({"a": block(1)}, {"a": ModuleHead(nn.Sequential(nn.Flatten(), nn.Linear(144, 2)))}, 2)
    with pytest.raises(ValueError, match=r"`network.taps` must name at least one unit to distill, got none"):
        ExitStudent(one)


def test_an_unfinished_student_says_what_is_missing():
    for ask, what in (
        (lambda: Student().observe(None), "observe"),
        (lambda: Student().logits([]), "logits"),
        (lambda: Student().learners(), "learners"),
    ):
        with pytest.raises(TypeError, match=f"`Student` must implement `{what}`"):
            ask()


def test_a_function_is_a_source_of_batches():
    assert isinstance(World(), Batches)


def small(channels: int) -> StagedNetwork:
    torch.manual_seed(5)
    head = ModuleHead(nn.Sequential(nn.Flatten(), nn.Linear(channels * 36, ACTIONS)))
    return StagedNetwork({"only": block(1, channels)}, {"only": head}, ACTIONS)


def test_small_networks_learn_from_the_same_teacher(tmp_path):
    teacher = network().eval()
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    student = StaticStudent([small(2), small(4)], teacher, NoEnsemble(2, ACTIONS))
    run = distiller(tmp_path, student)
    assert run.total == HEADS * BUFFER
    run.run()
    curves = read_scalars(tmp_path)
    for exit in range(2):
        agree = [value for _, tag, value in curves if tag == f"distill/agree/exit{exit}"]
        assert sum(agree[-4:]) / 4 > agree[0] + 0.15
    for key, value in teacher.state_dict().items():
        assert torch.equal(value, before[key]), key
