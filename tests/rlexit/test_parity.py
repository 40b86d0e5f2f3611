"""Whether an export acts as its network does: what the comparison sees, and what it lets pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlexit import serve
from rlexit.exit_policy import ExitPolicy
from rlexit.export import compare, export, server_of
from rlexit.parity import GAME
from rlexit.runtime import run
from tests.rlexit.test_decided_export import GAMES, STEPS
from tests.rlexit.test_export import ROWS as FRAMES
from tests.rlexit.test_export import toy
from tests.rlexit.test_gated_export import ROWS, gated
from tests.rlexit.test_reuse import repeating
from tests.rlexit.toys import EXITS, TOYS, parting

pytest.importorskip("onnx", reason="the extra `export` is not installed")
pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")


# ---- what rows spend ----


def test_a_manifest_says_what_the_checked_rows_spent_beside_the_most_that_they_can(tmp_path):
    network = gated("lstm")
    policy = parting(network, ROWS)
    manifest = export(network, policy, ROWS, tmp_path / "export", "onnx", {})
    result = run(network, policy, ROWS)
    for exit in range(EXITS):
        mean, most = manifest["macs_mean"][str(exit)], manifest["macs"][str(exit)]
        assert mean == pytest.approx(result.macs[result.exits == exit].double().mean().item())
        assert mean <= most
        share = manifest["relative_macs_mean"][str(exit)] / manifest["relative_macs"][str(exit)]
        assert share == pytest.approx(mean / most)
    assert manifest["macs_mean"]["2"] < manifest["macs"]["2"]
    assert serve.load(tmp_path / "export").manifest["macs_mean"] == manifest["macs_mean"]


def test_a_repeated_answer_has_a_mean_of_its_own(tmp_path):
    network = repeating()
    manifest = export(network, parting(network, STEPS[0]), STEPS, tmp_path / "export", "onnx", {})
    assert manifest["macs_mean"][str(EXITS)] < manifest["macs"]["0"]
    assert str(EXITS) not in manifest["macs"]


# ---- games that end ----


@pytest.mark.parametrize("broken", ["forgets nobody", "forgets everybody", "forgets another"])
def test_a_server_that_forgets_the_wrong_games_is_noticed(monkeypatch, broken):
    network = repeating(bias=-50.0)
    server = server_of(network, ExitPolicy.always(0, EXITS), STEPS)
    forgets = serve.Server.reset

    def reset(self, rows=None):
        if rows is None:
            forgets(self)
        elif broken != "forgets nobody":
            forgets(self, range(GAMES) if broken == "forgets everybody" else [(rows[0] + 1) % GAMES])

    monkeypatch.setattr(serve.Server, "reset", reset)
    assert compare(network, ExitPolicy.always(0, EXITS), server, STEPS).unexplained > 0


def test_a_game_by_itself_ends_too(monkeypatch):
    steps = torch.stack([TOYS["cascade"].inputs(32, seed)[:1] for seed in range(GAME + 2)])
    network, calls = repeating(bias=-50.0), []
    server = server_of(network, ExitPolicy.always(0, EXITS), steps)
    forgets = serve.Server.reset

    def reset(self, rows=None):
        calls.append(rows)
        if rows is None or len(calls) < 4:
            forgets(self, rows)

    monkeypatch.setattr(serve.Server, "reset", reset)
    found = compare(network, ExitPolicy.always(0, EXITS), server, steps)
    assert calls == [None, [0], None, [0], None]
    assert found.unexplained > 0


def test_rows_that_go_alone_are_compared_by_their_probabilities_too(monkeypatch):
    network = repeating(bias=-50.0)
    server = server_of(network, ExitPolicy.always(0, EXITS), STEPS)
    acts = serve.Server.act

    def act(self, observation):
        told = acts(self, observation)
        return told._replace(confidence=told.confidence - 0.01) if told.exit == EXITS else told

    assert compare(network, ExitPolicy.always(0, EXITS), server, STEPS).holds
    monkeypatch.setattr(serve.Server, "act", act)
    found = compare(network, ExitPolicy.always(0, EXITS), server, STEPS)
    assert found.answers == pytest.approx(0.01, rel=0.01)
    assert not found.holds


# ---- rules that jump ----


@pytest.mark.parametrize(("tied", "threshold", "unexplained"), [(True, 1.0, 0), (True, 1.5, 0), (False, 1.0, 1)])
def test_a_streak_that_ends_in_a_tie_may_be_told_otherwise_alone(monkeypatch, tied, threshold, unexplained):
    """That a streak is as long as its threshold is no tie."""
    network, policy = toy(), ExitPolicy("patience", (threshold, threshold))
    row = int((run(network, policy, FRAMES).exits > 0).nonzero()[0])
    if tied:
        first, second = network(FRAMES).logits[row, 0].topk(2)[1].tolist()
        with torch.no_grad():
            logits = network(FRAMES).logits[row, 0]
            network.head(0).linear.bias[second] += logits[first] - logits[second] - 2e-5
    server = server_of(network, policy, FRAMES)
    wanted = run(network, policy, FRAMES)
    acts = serve.Server.act

    def act(self, observation):
        told = acts(self, observation)
        here = observation.ndim == 3 and np.array_equal(observation, FRAMES[row].numpy())
        return told._replace(exit=1 + 2 - told.exit) if here else told

    monkeypatch.setattr(serve.Server, "act", act)
    assert server.act(FRAMES[row].numpy()).exit != int(wanted.exits[row])
    assert compare(network, policy, server, FRAMES).unexplained == unexplained
