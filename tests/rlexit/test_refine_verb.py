from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from rlexit import checkpoint, desk, verbs
from rlexit.checkpoint import CheckpointError
from rlexit.cli import main
from rlexit.config import METHODS
from rlexit.domain import Refining
from rlexit.interrupts import Stopped
from rlexit.refine_config import RefineConfig
from rlexit.rows import read_rows
from rlexit.runfolder import FolderError
from rlexit.session import load_network
from tests.rlexit import toy_domain as toy
from tests.rlexit.toy_domain import SMALL, StopAfter, changed, session

CONFIG = replace(SMALL, methods=("ztw", "refined"))


@pytest.fixture
def distilled(tmp_path):
    """A run whose exits are distilled."""
    root = tmp_path / "toy"
    made = session(root, CONFIG)
    verbs.train(made)
    verbs.distill(made, "ztw")
    return root


def test_a_refined_method_starts_from_the_distilled_weights_and_keeps_its_own(distilled):
    made = session(distilled, CONFIG)
    source = load_network(made, "ztw")[""].state_dict()
    verbs.refine(made, "refined")
    refined = load_network(made, "refined")[""].state_dict()
    moved = "heads.one.linear.bias"
    torch.testing.assert_close(refined[moved], source[moved] + 0.1 * CONFIG.refine.steps)
    assert all(torch.equal(refined[key], source[key]) for key in source if key != moved)
    assert set(checkpoint.load(made.method("refined"), "policy")[0]) == {f"/{key}" for key in refined}


def test_a_refined_method_is_calibrated_and_evaluated_like_any_other(distilled):
    made = session(distilled, CONFIG)
    verbs.refine(made, "refined")
    verbs.calibrate(made, "refined")
    verbs.evaluate_method(made, "refined")
    rows = read_rows(made.method("refined") / "eval" / "episodes.csv")
    assert {row.method for row in rows} == {"refined"}


def test_a_stopped_refinement_goes_on_and_ends_like_an_uninterrupted_one(distilled):
    with pytest.raises(Stopped):
        verbs.refine(session(distilled, CONFIG, stop=StopAfter(1)), "refined")
    made = session(distilled, CONFIG)
    verbs.refine(made, "refined")
    stopped = load_network(made, "refined")[""].state_dict()
    again = session(distilled, CONFIG, force=True)
    verbs.refine(again, "refined")
    assert all(
        torch.equal(stopped[key], value) for key, value in load_network(again, "refined")[""].state_dict().items()
    )


def test_a_done_refinement_is_skipped_and_one_of_another_price_refused(distilled):
    verbs.refine(session(distilled, CONFIG), "refined")
    verbs.refine(session(distilled, CONFIG, stop=StopAfter(0)), "refined")
    other = changed(CONFIG, "refine", price=0.5)
    with pytest.raises(FolderError, match=r"refine of another config \(`refine.price` is 0.02 there, 0.5 here"):
        verbs.refine(session(distilled, other), "refined")


def test_a_refinement_depends_on_the_weights_that_it_started_from(distilled):
    made = session(distilled, CONFIG)
    verbs.refine(made, "refined")
    tensors, facts = checkpoint.load(made.method("ztw"), "policy")
    checkpoint.save(made.method("ztw"), "policy", {key: value + 1 for key, value in tensors.items()}, facts)
    with pytest.raises(FolderError, match="source"):
        verbs.refine(session(distilled, CONFIG), "refined")


def test_refining_needs_the_distilled_weights(tmp_path):
    made = session(tmp_path / "toy", CONFIG)
    verbs.train(made)
    with pytest.raises(CheckpointError, match="Run `rlexit distill` first"):
        verbs.refine(made, "refined")


def test_what_is_not_refined_says_what_is(distilled):
    with pytest.raises(ValueError, match=r"`--methods` must be of refined.* to refine, got ztw"):
        verbs.refine(session(distilled, CONFIG), "ztw")


class Blunt:
    """A domain that has everything but `refine`."""

    def __init__(self, domain):
        self._domain = domain

    def __getattr__(self, name):
        if name == "refine":
            raise AttributeError(name)
        return getattr(self._domain, name)


def test_a_domain_that_cannot_refine_says_so(distilled):
    made = session(distilled, CONFIG)
    assert isinstance(made.domain, Refining)
    made = replace(made, domain=Blunt(made.domain))
    with pytest.raises(ValueError, match="`refine` must be of a domain that can, got alpha"):
        verbs.refine(made, "refined")


def test_the_command_line_refines_between_distillation_and_calibration(tmp_path, monkeypatch, capsys):
    toy.register(monkeypatch)
    file = tmp_path / "small.yaml"
    file.write_text(toy.YAML.replace("[ztw, static]", "[refined]"))
    assert main(["run", str(file), "--out", str(tmp_path / "runs"), "--evaluate.grid", "0"]) == 0
    root = tmp_path / "runs" / "small"
    assert checkpoint.exists(root / "ztw" / "s0", "policy")
    assert checkpoint.exists(root / "refined" / "s0", "exit_policies")
    assert not checkpoint.exists(root / "ztw" / "s0", "exit_policies")
    assert main(["refine", str(file), "--out", str(tmp_path / "runs")]) == 0
    assert "refine     done already" in capsys.readouterr().out


def test_a_plan_names_what_is_refined_and_what_it_starts_from(tmp_path):
    paper = io.StringIO()
    made = session(tmp_path, CONFIG, console=Console(file=paper, width=200))
    desk._plan(replace(made, methods=("refined",)))
    assert "distill ztw: to do" in paper.getvalue()
    assert "refine refined: to do" in paper.getvalue()


@pytest.mark.parametrize(
    ("setting", "value", "told"),
    [
        ("price", -0.1, r"`refine.price` must be at least 0, got -0.1. A negative price pays for compute."),
        ("price", float("nan"), "`refine.price` must be at least 0"),
        ("algo", "a2c", "`refine.algo` must be one of ppo, skipnet, blockdrop"),
        ("decisions", ("exits", "words"), "`refine.decisions` must be of exits, units, reuse, got 'words'"),
        ("decisions", (), "`refine.decisions` must name at least one"),
        ("clip", 0.0, "`refine.clip` must be positive"),
        ("max_reuse", 0, "`refine.max_reuse` must be at least 1"),
        ("trunk", "thawed", "`refine.trunk` must be frozen or trained"),
    ],
)
def test_settings_that_cannot_be_are_refused(setting, value, told):
    with pytest.raises(ValueError, match=told):
        RefineConfig(**{setting: value})


def test_every_refined_method_starts_from_one_that_is_distilled():
    for method in METHODS.values():
        if method.refines:
            source = METHODS[method.refines]
            assert not source.static
            assert not source.refines
            assert (source.cascade, source.ensemble) == (method.cascade, method.ensemble)
