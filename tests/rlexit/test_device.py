"""`--device`: where networks learn and play, told in one line where it is not."""

from __future__ import annotations

import pytest
import torch

from rlexit import machine
from rlexit.students import ExitStudent, JointStudent, StaticStudent
from tests.rlexit.test_cli import refused, say  # noqa: F401  # a fixture
from tests.rlexit.toys import TOYS


def cuda(monkeypatch, count: int) -> None:
    """A torch that sees so many CUDA devices."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_a_device_is_one_that_is_here(monkeypatch):
    cuda(monkeypatch, 2)
    assert [machine.device(name) for name in ("cpu", "cuda", "cuda:1")] == ["cpu", "cuda", "cuda:1"]
    with pytest.raises(ValueError, match="`--device` must be here, got cuda:2: .* sees 2 of CUDA. Take one of these"):
        machine.device("cuda:2")


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:-1", "cudax", "tpu:0", ""])
def test_a_device_has_a_name_that_torch_knows(name):
    with pytest.raises(ValueError, match="`--device` must be cpu, cuda or cuda:N, got"):
        machine.device(name)


@pytest.mark.parametrize("verb", ["train", "distill", "evaluate", "bench"])
def test_a_device_that_is_not_here_is_one_line_and_nothing_is_written(say, monkeypatch, tmp_path, verb):  # noqa: F811
    cuda(monkeypatch, 0)
    line = refused(say(verb, "toy.yaml", "--device", "cuda"))
    assert "`--device` must be here, got cuda" in line
    assert "Use --device cpu" in line
    assert [path.name for path in tmp_path.iterdir()] == ["toy.yaml"]


def test_a_domain_that_stays_on_the_cpu_says_so(say, monkeypatch):  # noqa: F811
    assert say("train", "toy.yaml", "--device", "cpu").code == 0
    cuda(monkeypatch, 1)
    assert "`--device` must be cpu for alpha, got cuda" in refused(say("train", "toy.yaml", "--device", "cuda"))


def test_other_verbs_have_no_device(say):  # noqa: F811
    assert "--device" in refused(say("calibrate", "toy.yaml", "--device", "cpu"))


def test_students_look_where_their_weights_are():
    """On the meta device nothing is computed, but tensors of another one are refused there as on any."""
    inputs = TOYS["cascade"].inputs(4)
    features, answers = ExitStudent(TOYS["cascade"].network()).to("meta").observe(inputs)
    assert {part.device.type for part in (*features, answers)} == {"meta"}
    small, teacher = TOYS["cascade"].network(), TOYS["cascade"].network()
    for student in (
        JointStudent(small, teacher, 1.0).to("meta"),
        StaticStudent([small], teacher, teacher.ensemble).to("meta"),
    ):
        (given,), answers = student.observe(inputs)
        assert (given.device.type, answers.device.type) == ("meta", "meta")
        assert student.logits([given]).device.type == "meta"
