"""Losses against hand numbers."""

from __future__ import annotations

import math

import pytest
import torch

from rlexit.objectives import agreement, cross_entropy, hint_distance, kl_divergence, softened_divergence

TEACHER = torch.tensor([[1.0, 0.0, -1.0], [0.2, 0.1, 0.0]]).log_softmax(dim=-1)
STUDENT = torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]]).log_softmax(dim=-1)


def test_kl_gives_the_golden_values_in_both_conventions():
    per_row = kl_divergence(TEACHER, STUDENT[:, None])
    assert per_row.shape == (2, 1)
    assert per_row.mean().item() == pytest.approx(0.1472861, abs=2e-7)  # 'batchmean'
    assert (per_row.mean() / 3).item() == pytest.approx(0.0490954, abs=2e-7)  # the reference's 'mean'


def test_kl_in_the_other_direction_is_another_number():
    assert kl_divergence(STUDENT, TEACHER[:, None]).mean().item() == pytest.approx(0.1544488, abs=2e-7)


def test_kl_is_one_number_per_row_and_exit():
    exits = torch.stack([STUDENT, TEACHER, STUDENT.flip(0)], dim=1)
    losses = kl_divergence(TEACHER, exits)
    assert losses.shape == (2, 3)
    assert losses[:, 1].abs().max() < 1e-7
    torch.testing.assert_close(losses[:, 0], kl_divergence(TEACHER, STUDENT[:, None])[:, 0])


def test_softened_divergence_is_hinton_s_and_does_not_care_for_the_scale_of_logits():
    softened = [(one / 4).log_softmax(dim=-1) for one in (TEACHER, STUDENT)]
    wanted = 16 * kl_divergence(softened[0], softened[1][:, None])
    torch.testing.assert_close(softened_divergence(TEACHER, STUDENT[:, None], 4.0), wanted)
    torch.testing.assert_close(softened_divergence(TEACHER + 3, STUDENT[:, None] - 2, 4.0), wanted)
    torch.testing.assert_close(
        softened_divergence(TEACHER, STUDENT[:, None], 1.0), kl_divergence(TEACHER, STUDENT[:, None])
    )
    assert not torch.allclose(wanted, kl_divergence(TEACHER, STUDENT[:, None]), rtol=0.01)


def test_kl_counts_an_impossible_output_of_the_teacher_as_0():
    teacher = torch.tensor([[0.5, 0.5, 0.0]]).log()
    student = torch.tensor([[[0.25, 0.25, 0.5]]]).log()
    assert kl_divergence(teacher, student).item() == pytest.approx(math.log(2), abs=1e-6)


def test_kl_sends_gradient_to_the_student_only():
    teacher = TEACHER.clone().requires_grad_()
    logits = torch.zeros(2, 1, 3, requires_grad=True)
    kl_divergence(teacher, logits.log_softmax(dim=-1)).sum().backward()
    assert teacher.grad is None
    # d KL(p || softmax(z)) / d z = softmax(z) - p
    torch.testing.assert_close(logits.grad, (torch.full((2, 3), 1 / 3) - TEACHER.exp())[:, None])


def test_cross_entropy_is_the_surprise_at_the_label():
    exits = torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]], [[0.2, 0.2, 0.6], [0.25, 0.5, 0.25]]]).log()
    losses = cross_entropy(torch.tensor([1, 2]), exits)
    expected = torch.tensor([[math.log(4), -math.log(0.8)], [-math.log(0.6), math.log(4)]])
    torch.testing.assert_close(losses, expected)


def test_agreement_is_1_where_the_likeliest_output_is_the_teachers():
    exits = torch.stack([TEACHER, STUDENT, TEACHER.flip(0).flip(1)], dim=1)
    assert agreement(TEACHER, exits).tolist() == [[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]


@pytest.mark.parametrize("loss", [kl_divergence, agreement])
def test_losses_of_no_rows_are_empty(loss):
    assert loss(torch.zeros(0, 3), torch.zeros(0, 2, 3)).shape == (0, 2)
    assert cross_entropy(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 2, 3)).shape == (0, 2)


def test_a_hint_is_the_squared_distance_relative_to_the_mean_square_of_what_is_wanted():
    wanted = torch.tensor([[[3.0, 4.0]], [[0.0, 5.0]]])  # squares 25 and 25
    found = torch.tensor([[[3.0, 0.0]], [[0.0, 5.0]]], requires_grad=True)
    distance = hint_distance(wanted, found)
    torch.testing.assert_close(distance, torch.tensor([16 / 25, 0.0]))
    assert float(hint_distance(wanted, torch.zeros_like(wanted)).mean()) == 1
    distance.sum().backward()
    torch.testing.assert_close(found.grad[0], torch.tensor([[0.0, -8 / 25]]))
