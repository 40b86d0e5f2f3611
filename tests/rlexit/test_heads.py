"""Heads: golden values of the reference, shapes, sizes, and the cascade's gradient stop."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rlexit.config import HeadConfig
from rlexit.heads import CascadeInput, Head, LinearHead, ModuleHead, PooledConvHead, SDNPool, heads

SHAPE = (4, 9, 9)


def test_sdn_pooling_gives_the_golden_values():
    pool = SDNPool(4)
    with torch.no_grad():
        pool.mix.fill_(0.3)
    pooled = pool(torch.arange(25.0).reshape(1, 1, 5, 5))[0, 0]
    torch.testing.assert_close(pooled[0], torch.tensor([3.9, 4.9, 5.9, 6.9]))
    torch.testing.assert_close(pooled[3], torch.tensor([18.9, 19.9, 20.9, 21.9]))


def test_sdn_pooling_repeats_a_map_that_is_smaller():
    pooled = SDNPool(4)(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]))[0, 0]
    expected = [[1.0, 1.0, 2.0, 2.0], [1.0, 1.0, 2.0, 2.0], [3.0, 3.0, 4.0, 4.0], [3.0, 3.0, 4.0, 4.0]]
    torch.testing.assert_close(pooled, torch.tensor(expected))


def test_the_mix_starts_between_0_and_1_and_learns():
    pool = SDNPool(1)
    assert 0 <= pool.mix.item() <= 1
    pool(torch.tensor([[[[1.0, 5.0]]]])).sum().backward()
    # largest 5, average 3: the slope in the mix is 2.
    assert pool.mix.grad is not None
    assert pool.mix.grad.item() == 2.0


def test_the_cascade_normalises_the_logits_to_the_golden_values():
    joined = CascadeInput(3, layer_norm=True, stop_gradient=True)(torch.zeros(1, 2), torch.tensor([[2.0, 0.5, -1.0]]))
    assert joined.shape == (1, 5)
    torch.testing.assert_close(joined[0, 2:], torch.tensor([1.224741, 0.0, -1.224741]), rtol=0, atol=1e-6)


def test_the_cascade_appends_raw_logits_where_it_does_not_normalise():
    joined = CascadeInput(3, layer_norm=False, stop_gradient=True)(torch.ones(1, 2), torch.tensor([[2.0, 0.5, -1.0]]))
    assert joined.tolist() == [[1.0, 1.0, 2.0, 0.5, -1.0]]


@pytest.mark.parametrize("stop", [True, False])
def test_the_cascade_lets_no_gradient_back_unless_asked(stop):
    previous = torch.randn(2, 3, requires_grad=True)
    flat = torch.randn(2, 2, requires_grad=True)
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0, 9.0])
    (CascadeInput(3, layer_norm=True, stop_gradient=stop)(flat, previous) * weights).sum().backward()
    assert flat.grad is not None
    assert (previous.grad is None) == stop
    if not stop:
        assert previous.grad is not None
        assert previous.grad.abs().sum() > 0


@pytest.mark.parametrize("reads_previous", [False, True])
@pytest.mark.parametrize("name", list(heads))
def test_every_head_answers_each_row_by_itself(name, reads_previous):
    torch.manual_seed(0)
    head = heads[name](SHAPE, 6, HeadConfig(kind=name), reads_previous).eval()
    features, previous = torch.randn(7, *SHAPE), torch.randn(7, 6)
    assert head.reads_previous is reads_previous

    def logits(rows: slice) -> torch.Tensor:
        return head(features[rows], previous[rows]) if reads_previous else head(features[rows])

    together = logits(slice(0, 7))
    assert together.shape == (7, 6)
    assert logits(slice(0, 0)).shape == (0, 6)
    for row in range(7):
        torch.testing.assert_close(logits(slice(row, row + 1))[0], together[row], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", list(heads))
def test_every_head_in_a_cascade_depends_on_the_logits_before(name):
    torch.manual_seed(0)
    head = heads[name](SHAPE, 6, HeadConfig(kind=name), True)
    features = torch.randn(2, *SHAPE)
    first, second = head(features, torch.randn(2, 6)), head(features, torch.randn(2, 6))
    assert (first - second).abs().max() > 1e-4


def test_the_size_of_a_pooled_head_follows_its_settings():
    def linear_inputs(shape, **settings):
        return PooledConvHead(shape, 6, HeadConfig(**settings), False).linear.in_features

    assert linear_inputs((64, 9, 9)) == 1024  # 2 x 2 repeated to 4 x 4, as in the reference
    assert linear_inputs((64, 9, 9), upsample=False) == 256
    assert linear_inputs((32, 20, 20)) == 512
    assert linear_inputs((32, 20, 20), stride=0, pool=1) == 32
    assert isinstance(PooledConvHead((32, 20, 20), 6, HeadConfig(stride=0), False).conv, nn.Identity)


def test_a_pooled_head_reads_maps_only():
    with pytest.raises(ValueError, match=r"`head.kind` pooled_conv must read a \(C, H, W\) map, got shape \(512,\)"):
        PooledConvHead((512,), 6, HeadConfig(), False)


def test_a_linear_head_reads_any_shape():
    assert LinearHead((2, 3, 5), 4, HeadConfig(kind="linear"), False).linear.in_features == 30
    assert LinearHead((7,), 4, HeadConfig(kind="linear"), True).linear.in_features == 11


def test_any_module_is_a_head_that_reads_no_logits():
    head = ModuleHead(nn.Linear(3, 2))
    assert not head.reads_previous
    assert head(torch.ones(4, 3), torch.ones(4, 2)).shape == (4, 2)


def test_an_unfinished_head_says_what_is_missing():
    with pytest.raises(TypeError, match="`Head` must implement `forward`"):
        Head()(torch.ones(1))


def test_a_map_that_the_convolution_cannot_read_is_refused_when_the_head_is_built():
    with pytest.raises(ValueError, match="`head.stride` must be 0 on a map smaller than 3 x 3"):
        PooledConvHead((8, 2, 2), 4, HeadConfig(), False)
    assert PooledConvHead((8, 2, 2), 4, HeadConfig(stride=0), False)(torch.zeros(1, 8, 2, 2)).shape == (1, 4)
