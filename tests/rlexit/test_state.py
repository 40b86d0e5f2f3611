"""What is carried by row is re-indexed together, whatever its shape."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass, fields

import pytest
import torch
from torch import Tensor

from rlexit.gates import Decision
from rlexit.state import ExitState, Forecast, leaves_of, map_tensors, put, take

Scales = namedtuple("Scales", ["fine", "coarse"])


@dataclass(frozen=True)
class Box:
    value: Tensor
    name: str = "box"


def tree():
    ramp = torch.arange(4)
    return {"a": ramp, "b": [ramp + 10, (ramp + 20,)], "c": Scales(ramp + 30, None), "d": Box(ramp + 40), "e": 7}


def test_a_function_reaches_every_tensor_of_a_tree_and_keeps_the_rest():
    seen = map_tensors(lambda leaf: leaf[:1] * 2, tree())
    assert seen["a"].tolist() == [0]
    assert seen["b"][0].tolist() == [20]
    assert seen["b"][1][0].tolist() == [40]
    assert isinstance(seen["b"], list)
    assert isinstance(seen["b"][1], tuple)
    assert seen["c"] == Scales(torch.tensor([60]), None)
    assert seen["d"].value.tolist() == [80]
    assert seen["d"].name == "box"
    assert seen["e"] == 7


def test_the_leaves_of_a_tree_are_its_tensors_in_order():
    assert [int(leaf[0]) for leaf in leaves_of(tree())] == [0, 10, 20, 30, 40]
    assert leaves_of(None) == leaves_of("text") == leaves_of(()) == []


def test_trees_are_walked_side_by_side():
    ones, tens = {"x": (torch.ones(2),)}, {"x": (torch.full((2,), 10.0),)}
    assert map_tensors(lambda one, ten, other: one + ten + other, ones, tens, tens)["x"][0].tolist() == [21.0, 21.0]


def test_trees_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="zip"):
        map_tensors(lambda one, other: one, (torch.ones(1),), (torch.ones(1), torch.ones(1)))


def test_take_gives_rows_in_the_order_asked_for():
    seen = take(tree(), torch.tensor([3, 0, 3]))
    assert seen["a"].tolist() == [3, 0, 3]
    assert seen["b"][1][0].tolist() == [23, 20, 23]
    assert seen["c"].fine.tolist() == [33, 30, 33]


def test_put_replaces_rows_in_a_copy():
    before = {"x": torch.tensor([1, 2, 3])}
    after = put(before, torch.tensor([2, 0]), {"x": torch.tensor([30, 10])})
    assert after["x"].tolist() == [10, 2, 30]
    assert before["x"].tolist() == [1, 2, 3]


def full_state(batch: int) -> ExitState:
    """A state with something of every row in every field."""
    row = torch.arange(batch)
    real = row.float()
    decision = Decision(row, real[:, None, None, None].expand(batch, 1, 2, 2), real, real)
    return ExitState(
        rows=row,
        features={"fine": real[:, None], "coarse": (real, [real])},
        logits=real[:, None, None].expand(batch, 2, 3),
        answer=real[:, None].expand(batch, 3),
        macs=row,
        decisions=(decision, decision),
        leaving=(decision,),
        forecast=Forecast({"units.a": real}, real),
        carry={"hidden": real[:, None], "count": row},
        memory=(real, row),
        path=(0.5, "narrow"),
        unit=3,
        exit=2,
    )


@pytest.mark.parametrize("index", [[4, 1], [], [0, 1, 2, 3, 4], [2]])
def test_selecting_rows_forgets_no_field(index):
    state = full_state(5)
    chosen = state.select(torch.tensor(index, dtype=torch.int64))
    assert len(chosen) == len(index)
    for field in fields(ExitState):
        value = getattr(chosen, field.name)
        leaves = leaves_of(value)
        if field.name in ("path", "unit", "exit"):
            assert value == getattr(state, field.name)
            continue
        assert leaves, f"{field.name} holds no tensor here, so this test cannot see whether it is selected"
        for leaf in leaves:
            assert leaf.shape[0] == len(index)
            assert leaf.reshape(len(index), -1)[:, 0].tolist() == index if index else leaf.numel() == 0


def test_the_answer_before_the_first_exit_is_an_error():
    state = ExitState(torch.arange(2), None, torch.empty(2, 0, 0), None, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(RuntimeError, match=r"`state.answer` must be asked for after an exit"):
        _ = state.answered
    assert full_state(2).answered.shape == (2, 3)
    assert state.device == torch.device("cpu")
