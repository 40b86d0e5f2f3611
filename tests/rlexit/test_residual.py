"""Residual units: what is skipped, row by row and channel by channel, is not computed, and the rest is the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rlexit.gates import Decision
from rlexit.macs import macs_per_row
from rlexit.residual import ResidualUnit
from tests.rlexit.toys import Block, watched

MODES = ("none", "inner", "block_out", "both")
SHAPES = {"identity": (4, 4, 1), "projection": (4, 6, 2)}


def unit_of(mode: str, shape: str, narrow: bool = True) -> ResidualUnit:
    torch.manual_seed(2)
    return ResidualUnit(Block(*SHAPES[shape]), mode, narrow=narrow).eval()


def features_of(batch: int, side: int = 8):
    return torch.randn((9, 4, side, side), generator=torch.Generator().manual_seed(1))[:batch]


def drawn(unit: ResidualUnit, batch: int, seed: int, rate: float = 0.5) -> Decision:
    generator = torch.Generator().manual_seed(seed)
    action = (torch.rand(batch, generator=generator) < 0.6).to(torch.int64)
    masks = (torch.rand((batch, unit.width), generator=generator) < rate).float() if unit.width else None
    nothing = torch.zeros(batch)
    return Decision(action, action.float(), nothing, nothing, masks)


@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize(
    ("batch", "side", "rate"), [(7, 8, 0.5), (1, 8, 0.5), (0, 8, 0.5), (7, 5, 0.5), (7, 8, 0.0), (7, 1, 1.0)]
)
@torch.no_grad()
def test_gathered_execution_equals_the_masked_dense_one(shape, mode, narrow, batch, side, rate):
    unit, features = unit_of(mode, shape, narrow), features_of(batch, side)
    for seed in range(3):
        decision = drawn(unit, batch, seed, rate)
        result, macs = unit.execute(features, decision)
        torch.testing.assert_close(result, unit.relax(features, decision), rtol=0, atol=1e-5)
        expected = unit.expected_macs(features, decision)
        torch.testing.assert_close(macs.float(), expected, rtol=1e-6, atol=0.5)


@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_executing_everything_is_the_plain_block_bit_for_bit(shape, mode):
    unit, features = unit_of(mode, shape), features_of(7)
    plain = unit.module(features)
    everything = Decision(torch.ones(7, dtype=torch.int64), torch.ones(7), torch.zeros(7), torch.zeros(7))
    assert torch.equal(unit.execute(features, None)[0], plain)
    assert torch.equal(unit.execute(features, everything)[0], plain)
    assert torch.equal(unit.relax(features, everything), plain)
    if unit.width:
        kept = Decision(
            everything.action, everything.relaxed, torch.zeros(7), torch.zeros(7), torch.ones(7, unit.width)
        )
        assert torch.equal(unit.execute(features, kept)[0], plain)


@torch.no_grad()
def test_a_skipped_transition_is_its_projection_without_relu_and_costs_it():
    unit, features = unit_of("none", "projection"), features_of(7)
    skip = Decision(torch.zeros(7, dtype=torch.int64), torch.zeros(7), torch.zeros(7), torch.zeros(7))
    with watched(unit) as work:
        result, macs = unit.execute(features, skip)
    assert torch.equal(result, unit.module.shortcut(features))
    assert (result < 0).any()
    assert macs.tolist() == [4 * 6 * 16] * 7
    assert work.macs == int(macs.sum())


@pytest.mark.parametrize("shape", list(SHAPES))
@torch.no_grad()
def test_no_shortcut_is_computed_twice_and_no_convolution_for_a_row_that_skips(shape):
    unit, features = unit_of("none", shape), features_of(7)
    decision = drawn(unit, 7, 0)
    runs = int(decision.action.sum())
    assert 0 < runs < 7
    with watched(unit) as work:
        _, macs = unit.execute(features, decision)
    assert work.rows["module.conv1"] == work.rows["module.conv2"] == runs
    assert work.rows["module.shortcut"] == 7
    assert work.macs == int(macs.sum())


@pytest.mark.parametrize("mode", MODES[1:])
@torch.no_grad()
def test_channels_that_are_not_kept_are_not_computed(mode, monkeypatch):
    unit, features = unit_of(mode, "projection"), features_of(7)
    decision = drawn(unit, 7, 0)
    done = []
    real = nn.functional.conv2d

    def counted(seen, weight, *rest):
        result = real(seen, weight, *rest)
        done.append(result.numel() * weight[0].numel())
        return result

    _, macs = unit.execute(features, decision)  # counts the shapes once, before the spy looks
    monkeypatch.setattr("rlexit.residual.functional.conv2d", counted)
    _, macs = unit.execute(features, decision)
    assert sum(done) == int(macs.sum())
    assert int(macs.sum()) < int(unit.macs(features)[decision.action > 0].sum())


@torch.no_grad()
def test_channels_that_are_computed_anyway_are_charged():
    unit, features = unit_of("inner", "identity", narrow=False), features_of(7)
    decision = drawn(unit, 7, 0)
    with watched(unit) as work:
        _, macs = unit.execute(features, decision)
    assert macs.tolist() == (decision.action * macs_per_row(unit.module, features)).tolist()
    assert work.macs == int(macs.sum())


@torch.no_grad()
def test_rows_that_keep_the_same_channels_are_computed_together(monkeypatch):
    unit, features = unit_of("inner", "identity"), features_of(7)
    masks = torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 0]])[[0, 1, 0, 0, 1, 0, 1]]
    ones = torch.ones(7)
    calls = []
    few = unit._few
    monkeypatch.setattr(unit, "_few", lambda *arguments: calls.append(len(arguments[0])) or few(*arguments))
    _, macs = unit.execute(features, Decision(ones.long(), ones, ones, ones, masks))
    assert sorted(calls) == [3, 4]
    block = macs_per_row(unit.module, features)
    assert macs.tolist() == [int(block * kept / 4) for kept in masks.sum(dim=1)]


def test_a_channel_that_is_passed_by_is_the_shortcuts_and_an_inner_one_is_0():
    unit, features = unit_of("block_out", "identity"), features_of(2)
    mask = torch.tensor([[1.0, 0, 1, 0], [0, 0, 1, 1]])
    ones = torch.ones(2)
    with torch.no_grad():
        result, _ = unit.execute(features, Decision(ones.long(), ones, ones, ones, mask))
        plain = unit.module(features)
    assert torch.equal(result[0, 1], features[0, 1])
    torch.testing.assert_close(result[0, 0], plain[0, 0])


@pytest.mark.parametrize("mode", MODES)
def test_the_gradient_of_dense_training_follows_the_equations(mode):
    unit, features = unit_of(mode, "identity").double(), features_of(3).double()
    layer = torch.rand(3, dtype=torch.float64, requires_grad=True)
    masks = torch.rand(3, unit.width, dtype=torch.float64, requires_grad=True) if unit.width else None

    def relaxed(weight, channels=None):
        # The annotated shapes are those of floats; 64 bits are for the finite differences.
        decision = Decision(torch.ones(3, dtype=torch.int64), weight, weight, weight, channels)
        return unit.relax(features, decision)

    given = (layer,) if masks is None else (layer, masks)
    assert torch.autograd.gradcheck(relaxed, given, eps=1e-6, atol=1e-5)


def test_a_price_reaches_channels_through_the_layer_decision():
    unit, features = unit_of("both", "identity"), features_of(2)
    layer = torch.tensor([1.0, 0.0], requires_grad=True)
    masks = torch.full((2, 8), 0.5, requires_grad=True)
    unit.expected_macs(features, Decision(torch.tensor([1, 0]), layer, layer, layer, masks)).sum().backward()
    assert masks.grad[0].abs().min() > 0
    assert masks.grad[1].abs().max() == 0  # the unit is skipped: its channels are free
    first = second = 4 * 4 * 9 * 64
    assert layer.grad.tolist() == [first * 0.5 + second * 0.25] * 2


@pytest.mark.parametrize(
    "settings", [{"bias": True}, {"groups": 2}, {"dilation": 2, "padding": 2}, {"padding_mode": "circular"}]
)
def test_convolutions_whose_channels_cannot_be_chosen_are_refused_where_channels_are(settings):
    block = Block(4, 4)
    block.conv2 = nn.Conv2d(4, 4, 3, **{"bias": False, "padding": 1, **settings})
    for channels in MODES[1:]:
        with pytest.raises(
            ValueError, match="`module.conv2` must have no bias, one group, dilation 1 and zero padding"
        ):
            ResidualUnit(block, channels)
    assert ResidualUnit(block).eval().execute(features_of(3), drawn(ResidualUnit(block), 3, 0))[0].isfinite().all()


def test_a_block_without_its_parts_and_unknown_channels_are_refused():
    with pytest.raises(ValueError, match="`module` must have a part 'conv1', got 'Identity'"):
        ResidualUnit(nn.Identity())
    with pytest.raises(ValueError, match="`channels` must be one of none, inner, block_out, both, got 'out'"):
        ResidualUnit(Block(4, 4), "out")
