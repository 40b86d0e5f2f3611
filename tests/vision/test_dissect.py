"""Exits on a whole test set: what is written about them, by real execution, from thresholds that are not the test's."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from rlexit import dissection
from rlexit.config import METHODS, EvaluateConfig
from rlexit.costs import cost_table
from rlexit.dissection import BudgetRow, ExitRow, GroupRow, NoteRow, PictureRow
from rlexit.domain import Watch
from rlexit.ensembles import ensembles
from rlexit.interrupts import Stopped
from rlexit.network import StagedNetwork
from tests.vision.small_images import SMALL, changed
from vision.budgets import patience_exits
from vision.data import DataSet
from vision.decoding import Images
from vision.dissect import SHOWN, Owner, dissect, sheet
from vision.domain import VisionDomain
from vision.network import classifier

CONFIG = EvaluateConfig(n_envs=50, budgets=(0.05, 0.7, 1.2))


@pytest.fixture(scope="module")
def network() -> StagedNetwork:
    """Untrained exits whose answers differ from image to image."""
    torch.manual_seed(0)
    made = classifier(SMALL.backbone, 4, 8, network=SMALL.network, head=SMALL.head, ensemble=ensembles["none"])
    with torch.no_grad():
        for name, parameter in made.heads.named_parameters():
            parameter.mul_(5.0 if name.endswith("weight") else 1.0)
    return made.eval()


def dissected(folder, network, holdout: float, method: str = "sdn"):
    data = DataSet(replace(SMALL.data, holdout=holdout))
    full = cost_table(network, data.tested.pixels[:1]).full
    dissect(Owner("toy", method, 3, full, full), {"": network}, data, CONFIG, folder, Watch())
    return data, {kind: dissection.load(folder, kind) for kind in dissection.FILES}


def test_every_exit_is_asked_about_every_test_image(tmp_path, network):
    data, found = dissected(tmp_path, network, 0.4)
    rows = found[ExitRow]
    assert [row.exit for row in rows] == [0, 1, 2, 3]
    assert {row.count for row in rows} == {192}
    with torch.no_grad():
        chosen = network(data.tested.pixels).answers.argmax(dim=-1)
    assert [row.value for row in rows] == pytest.approx(
        (chosen == data.tested.labels[:, None]).double().mean(dim=0).tolist()
    )
    assert rows[0].improvability == 0
    assert rows[-1].relative_macs > 1


@pytest.mark.parametrize("holdout", [0.4, 0.0])
def test_all_test_images_count_and_the_row_says_where_thresholds_are_from(tmp_path, network, holdout):
    _, found = dissected(tmp_path, network, holdout)
    rows = [row for row in found[BudgetRow] if row.choice in ("honest", "batch")]
    assert {row.count for row in rows} == {192}
    assert {(row.choice, row.execution) for row in rows} == {("honest", "real"), ("batch", "replay")}
    told = "0.4 of the training images" if holdout else "the other half of the test images, both halves merged"
    assert {row.source for row in rows} == {told}


def test_each_half_s_thresholds_are_for_the_other_half(network):
    from vision.dissect import _Looker, _pairs, see

    data = DataSet(replace(SMALL.data, holdout=0.0))
    seen = see(network, data.tested, 50, Watch())
    costs = cost_table(network, data.tested.pixels[:1])
    full = costs.full
    pairs = _pairs(network, seen, data, CONFIG, Watch())
    limits = _Looker(
        Owner("toy", "sdn", 0, full, full), network, seen, pairs, costs, data, CONFIG, Watch()
    )._thresholds("confidence", 1.2)
    first, second = data.crossed
    assert len(set(limits[first].flatten().tolist())) == len(set(limits[second].flatten().tolist())) == 1
    # The first half's own scores decide what the second half gets: blind them, and only the second half's move.
    blind = seen.answers.clone()
    blind[torch.from_numpy(first)] = math.log(0.25)
    other = _pairs(network, replace(seen, answers=blind), data, CONFIG, Watch())
    moved = _Looker(Owner("toy", "sdn", 0, full, full), network, seen, other, costs, data, CONFIG, Watch())._thresholds(
        "confidence", 1.2
    )
    assert torch.equal(moved[first], limits[first])
    assert not torch.equal(moved[second], limits[second])


def test_budgets_are_kept_and_one_below_the_first_exit_has_no_row(tmp_path, network):
    _, found = dissected(tmp_path, network, 0.4)
    assert {row.budget for row in found[BudgetRow] if row.choice == "reference" and row.method == "sdn"} == {
        0.7,
        1.2,
        math.inf,
    }
    for row in found[BudgetRow]:
        if row.choice == "reference" and row.budget < math.inf:
            assert row.relative_macs < row.budget
        if row.choice in ("honest", "batch"):
            assert row.budget > 0.05
            # Patience has a few lengths only, so it may stay far below.
            assert row.relative_macs <= row.budget + 0.3
            assert row.method == "pbee" or row.relative_macs >= row.budget - 0.3


def test_patience_on_sdn_s_exits_is_pbee_and_on_others_it_is_left_out(tmp_path, network):
    _, found = dissected(tmp_path / "sdn", network, 0.4)
    assert {row.method for row in found[BudgetRow]} == {"sdn", "pbee"}
    _, found = dissected(tmp_path / "ztw", network, 0.4, "ztw")
    assert {row.method for row in found[BudgetRow]} == {"ztw"}


def test_the_mean_over_budgets_lies_between_the_worst_and_the_best(tmp_path, network):
    _, found = dissected(tmp_path, network, 0.4)
    [area] = [row.value for row in found[BudgetRow] if row.choice == "area" and row.method == "sdn"]
    assert 0 < area < 1


def test_the_mean_over_budgets_of_patience_is_that_of_the_longest_patience_that_held_out_images_afford(
    tmp_path, network
):
    data, found = dissected(tmp_path, network, 0.4)
    [area] = [row for row in found[BudgetRow] if row.choice == "area" and row.method == "pbee"]
    costs = cost_table(network, data.tested.pixels[:1])
    held_out = torch.cat([data.evaluated(split).pixels for split in ("calibration", "certification")])
    with torch.no_grad():
        chosen = [network(pixels).answers.argmax(dim=-1) for pixels in (held_out, data.tested.pixels)]
    macs = torch.tensor(costs.exits, dtype=torch.float64) / costs.full
    right = chosen[1] == data.tested.labels[:, None]
    values = []
    for level in torch.linspace(float(macs[0]), 1, 41, dtype=torch.float64):
        # Waiting longer costs more, so the last one that can be paid for is the longest.
        affordable = [wait for wait in (1, 2, 3, 4) if macs[patience_exits(chosen[0], wait)].mean() <= level + 1e-9]
        left = patience_exits(chosen[1], affordable[-1])
        values.append(float(right[torch.arange(192), left].double().mean()))
    assert area.value == pytest.approx(sum(values) / 41)


def test_what_a_column_is_about_is_noted_once_per_method(tmp_path, network):
    for method in ("sdn", "sdn", "ztw"):
        dissected(tmp_path, network, 0.4, method)
    notes = dissection.load(tmp_path, NoteRow)
    assert [(note.method, note.about) for note in notes] == [("sdn", "relative_ops"), ("ztw", "relative_ops")]


def test_classes_are_told_with_where_they_leave(tmp_path, network):
    data, found = dissected(tmp_path, network, 0.4)
    rows = found[GroupRow]
    assert [row.group for row in rows] == list(data.classes)
    assert sum(row.count for row in rows) == 192
    for row in rows:
        assert sum(row.exit_fractions) == pytest.approx(1)
    [honest] = [row for row in found[BudgetRow] if (row.choice, row.method, row.budget) == ("honest", "sdn", 0.7)]
    assert sum(row.value * row.count for row in rows) / 192 == pytest.approx(honest.value)
    assert sum(row.relative_macs * row.count for row in rows) / 192 == pytest.approx(honest.relative_macs)


def test_easy_and_hard_images_are_a_picture(tmp_path, network):
    from PIL import Image

    _, found = dissected(tmp_path, network, 0.4)
    [row] = found[PictureRow]
    with Image.open(tmp_path / row.file) as picture:
        assert picture.size[0] > picture.size[1] > 4 * 60


def test_a_sheet_has_the_first_half_on_the_left_and_the_second_on_the_right():
    pixels = torch.zeros((2 * SHOWN, 3, 8, 8), dtype=torch.uint8)
    pixels[0], pixels[-1] = 50, 100
    picture = np.asarray(sheet([Images(pixels, torch.zeros(2 * SHOWN))]))
    assert picture[0, 0].tolist() == [50, 50, 50]
    assert picture[0, -3].tolist() == [100, 100, 100]


def test_images_that_are_large_are_made_smaller():
    large = Images(torch.zeros((2, 3, 224, 224), dtype=torch.uint8), torch.zeros(2))
    assert sheet([large]).size[1] < 70


def test_networks_without_exits_have_one_row_each(tmp_path):
    made = VisionDomain(SMALL)
    networks = {"width 0.5": made._classifier().eval(), "width 1": made._classifier().eval()}
    full = cost_table(networks["width 1"], made.example()).full
    made.dissect(networks, "static", 0, full, tmp_path, Watch())
    rows = dissection.load(tmp_path, BudgetRow)
    assert [(row.label, row.choice, row.relative_macs) for row in rows] == [
        ("width 0.5", "fixed", 1.0),
        ("width 1", "fixed", 1.0),
    ]
    half = VisionDomain(changed(SMALL, "backbone", width=0.125))._classifier().eval()
    made.dissect({"half": half}, "static", 0, full, tmp_path, Watch())
    [row] = dissection.load(tmp_path, ExitRow)
    assert row.relative_ops < 0.5  # of the teacher's, as MACs are


def test_a_gated_network_has_no_count_but_that_of_what_rows_spent(tmp_path):
    made = VisionDomain(SMALL)
    network = made.blank(METHODS["layer_gates"])
    full = cost_table(made._classifier().eval(), made.example()).full
    made.dissect({"": network}, "layer_gates", 0, full, tmp_path, Watch())
    rows = dissection.load(tmp_path, ExitRow)
    assert all(math.isnan(row.relative_ops) for row in rows)
    assert all(row.relative_macs > 0 for row in rows)


def test_a_stop_writes_nothing(tmp_path, network):
    data = DataSet(changed(SMALL, "data").data)
    with pytest.raises(Stopped):
        dissect(Owner("toy", "sdn", 0, 1, 1), {"": network}, data, CONFIG, tmp_path, Watch(stop=lambda: True))
    assert not list(tmp_path.iterdir())
