"""Ensembles: golden values, conformance of every registered one, and the fit."""

from __future__ import annotations

import pytest
import torch

from rlexit.ensembles import AdditiveEnsemble, Ensemble, GeometricEnsemble, ensembles, fit_ensemble
from rlexit.objectives import cross_entropy

FIRST, SECOND = [2.0, 0.5, -1.0], [0.3, 1.2, 0.1]


def pair() -> torch.Tensor:
    """(1, 2, 3) log-probabilities of two exits; a leading row of another exit's weights would show."""
    return torch.tensor([[FIRST, SECOND]]).log_softmax(dim=-1)


def weighted(kind, a, c):
    ensemble = kind(2, 3)
    with torch.no_grad():
        ensemble.log_weights[1].copy_(torch.tensor(a))
        ensemble.log_bias[1].copy_(torch.tensor(c))
    return ensemble


def test_the_geometric_ensemble_gives_the_golden_values():
    answer = weighted(GeometricEnsemble, [0.1, -0.2], [0.05, 0.0, -0.05]).combine(pair())[0]
    expected = torch.tensor([0.568472, 0.341211, 0.090317])
    torch.testing.assert_close(answer.exp(), expected, rtol=0, atol=1e-6)
    logits = torch.tensor([-0.678384, -1.188833, -2.518013])
    torch.testing.assert_close(answer - answer[0], logits - logits[0], rtol=0, atol=2e-6)
    assert answer.exp().max().item() == pytest.approx(0.568472, abs=1e-6)


def test_the_additive_ensemble_gives_the_golden_values_but_for_its_floor():
    answer = weighted(AdditiveEnsemble, [0.1, -0.2], [0.05, 0.0, -0.05]).combine(pair())[0]
    torch.testing.assert_close(answer.exp(), torch.tensor([0.428478, 0.337855, 0.233666]), rtol=0, atol=1e-5)


def test_equal_weights_without_a_bias_are_the_unweighted_mean():
    answer = weighted(AdditiveEnsemble, [0.0, 0.0], [-40.0, -40.0, -40.0]).combine(pair())[0]
    torch.testing.assert_close(answer.exp(), torch.tensor([0.509666, 0.375094, 0.115240]), rtol=0, atol=1e-5)


def test_an_impossible_output_costs_the_additive_ensemble_a_finite_loss():
    certain = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]).log()
    ensemble = AdditiveEnsemble(2, 2)
    with torch.no_grad():
        ensemble.log_bias[1].fill_(-60.0)
    assert torch.isfinite(ensemble.combine(certain)).all()


def test_a_product_of_one_exit_with_neutral_numbers_is_the_exit_itself():
    ensemble = GeometricEnsemble(2, 3)
    with torch.no_grad():
        ensemble.log_weights[0].zero_()
    alone = pair()[:, :1]
    torch.testing.assert_close(ensemble.combine(alone), alone[:, 0], rtol=0, atol=1e-6)


def test_the_ensembles_of_zero_time_waste_have_7_and_8_numbers():
    sizes = [w.numel() + b.numel() for w, b in zip(*vars_of(GeometricEnsemble(2, 6)), strict=True)]
    assert sizes == [7, 8]


def vars_of(ensemble):
    return ensemble.log_weights, ensemble.log_bias


def test_weights_start_near_an_equal_product():
    torch.manual_seed(0)
    ensemble = GeometricEnsemble(40, 3)
    everything = torch.cat([weights.detach() for weights in ensemble.log_weights])
    assert everything.std().item() == pytest.approx(0.01, rel=0.2)
    assert all(bias.abs().sum() == 0 for bias in ensemble.log_bias)


@pytest.fixture
def log_probabilities():
    generator = torch.Generator().manual_seed(1)
    return torch.randn((7, 4, 5), generator=generator).mul(3).log_softmax(dim=-1)


@pytest.mark.parametrize("name", list(ensembles))
def test_every_ensemble_answers_with_a_distribution_at_every_exit(name, log_probabilities):
    ensemble = ensembles[name](4, 5)
    answers = ensemble.combine_all(log_probabilities)
    assert answers.shape == (7, 4, 5)
    torch.testing.assert_close(answers.exp().sum(dim=-1), torch.ones(7, 4), rtol=0, atol=1e-5)
    for exit in range(4):
        torch.testing.assert_close(answers[:, exit], ensemble.combine(log_probabilities[:, : exit + 1]))


@pytest.mark.parametrize("name", list(ensembles))
def test_every_ensemble_treats_rows_by_themselves(name, log_probabilities):
    ensemble = ensembles[name](4, 5)
    together = ensemble.combine(log_probabilities)
    assert ensemble.combine(log_probabilities[:0]).shape == (0, 5)
    for row in range(7):
        torch.testing.assert_close(ensemble.combine(log_probabilities[row : row + 1])[0], together[row])


@pytest.mark.parametrize("name", list(ensembles))
def test_every_ensemble_leaves_an_exit_that_it_does_not_cover_to_itself(name, log_probabilities):
    answer = ensembles[name](2, 5).combine(log_probabilities[:, :3])
    torch.testing.assert_close(answer, log_probabilities[:, 2])


@pytest.mark.parametrize("name", list(ensembles))
def test_an_ensemble_that_needs_no_earlier_exit_reads_none(name, log_probabilities):
    ensemble = ensembles[name](4, 5)
    blind = log_probabilities.clone()
    blind[:, :3] = torch.nan
    assert bool(ensemble.combine(blind).isnan().any()) is ensemble.needs_every_exit


@pytest.mark.parametrize("name", list(ensembles))
def test_the_fit_lowers_every_exits_loss_or_leaves_it(name):
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(0, 5, (400,), generator=generator)
    # Each exit sees the label through its own noise, with a wrong scale and a bias: there is something to gain.
    signal = torch.nn.functional.one_hot(labels, 5).float()[:, None]
    noise = torch.randn((400, 3, 5), generator=generator)
    seen = (4 * (signal + noise) + torch.tensor([2.0, 0.0, 0.0, 0.0, -2.0])).log_softmax(dim=-1)
    torch.manual_seed(0)
    ensemble = ensembles[name](3, 5)

    def loss(answers):
        return cross_entropy(labels, answers)

    before = loss(ensemble.combine_all(seen)).mean(dim=0)
    after = fit_ensemble(ensemble, seen, loss)
    assert len(after) == 3
    measured = loss(ensemble.combine_all(seen)).mean(dim=0).tolist()
    assert after == pytest.approx(measured, abs=1e-5)
    if list(ensemble.parameters()):
        assert all(late < early - 0.02 for early, late in zip(before.tolist(), after, strict=True))
    else:
        assert after == pytest.approx(before.tolist())


def test_the_fit_covers_the_exits_of_the_ensemble_only():
    generator = torch.Generator().manual_seed(2)
    seen = torch.randn((50, 3, 5), generator=generator).log_softmax(dim=-1)
    labels = torch.randint(0, 5, (50,), generator=generator)
    assert len(fit_ensemble(GeometricEnsemble(2, 5), seen, lambda answers: cross_entropy(labels, answers))) == 2


def test_an_unfinished_ensemble_says_what_is_missing():
    with pytest.raises(TypeError, match="`Ensemble` must implement `combine`"):
        Ensemble(1, 2).combine(pair())
