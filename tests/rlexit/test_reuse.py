from __future__ import annotations

import pytest
import torch

from rlexit.costs import cost_table
from rlexit.exit_policy import ExitPolicy
from rlexit.gates.leave import LeaveGate
from rlexit.gates.reuse import ReuseGate, forget
from rlexit.macs import macs_per_row
from rlexit.runtime import replay, run
from tests.rlexit.toys import EXITS, MAP, OUTPUTS, TOYS, parting, watched

FIRST = ExitPolicy.always(0, EXITS)


def repeating(limit: int = 3, bias: float = 0.0):
    """A network that repeats answers, by a gate that has opinions."""
    network = TOYS["cascade"].network()
    torch.manual_seed(5)
    network.reuse = ReuseGate(OUTPUTS, limit, side=4, hidden=8, bias=bias)
    with torch.no_grad():
        network.reuse.net[-1].weight.normal_(std=4.0)
    return network.eval()


def frames(batch: int, seed: int = 0) -> torch.Tensor:
    return TOYS["cascade"].inputs(32, seed)[:batch]


def steps(network, count: int, batch: int = 7, **settings):
    """So many env steps of a batch of games, one result each."""
    found, memory = [], None
    for step in range(count):
        found.append(run(network, FIRST, frames(batch, step), memory=memory, **settings))
        memory = found[-1].memory
    return found


def test_nothing_is_repeated_at_the_start_of_a_game():
    network = repeating(bias=-50.0)
    first, second = steps(network, 2)
    assert (first.exits == 0).all()
    assert (first.reuse.action == 1).all()
    assert (first.reuse.log_prob == 0).all()
    assert (second.exits == EXITS).all()


def test_a_shift_moves_who_computes_and_level_tells_it():
    network = repeating()
    memory = run(network, FIRST, frames(7)).memory
    state = network.begin(frames(7, 1), memory)
    before = network.reuse.level(state)
    network.reuse.shift(100.0)
    torch.testing.assert_close(network.reuse.level(state), before + 100.0)
    assert (run(network, FIRST, frames(7, 1), memory=memory).reuse.action == 1).all()
    network.reuse.shift(-200.0)
    assert (run(network, FIRST, frames(7, 1), memory=memory).reuse.action == 0).all()


def test_a_repeated_answer_is_the_last_one_and_costs_the_gate_alone():
    network = repeating(bias=-50.0)
    first, second = steps(network, 2)
    torch.testing.assert_close(second.answers, first.answers)
    gate = macs_per_row(network.reuse.net, torch.empty(1, 2 * 16 + OUTPUTS + 1))
    assert second.macs.tolist() == [gate] * 7
    assert second.scores.isnan().all()
    costs = cost_table(network, frames(1))
    assert first.macs.tolist() == [costs.exits[0] - gate] * 7


def test_no_unit_runs_for_a_row_that_repeats():
    network = repeating()
    first = run(network, FIRST, frames(7))
    with watched(network) as work:
        second = run(network, FIRST, frames(7, 1), memory=first.memory)
    computed = int((second.exits < EXITS).sum())
    assert 0 < computed < 7
    assert work.rows["units.conv0"] == computed
    assert work.rows["reuse.net"] == 7
    assert work.macs == int(second.macs.sum())


def test_the_gate_does_not_run_where_nothing_may_be_repeated():
    with watched(repeating()) as work:
        steps(repeating(), 1)
    assert work.rows["reuse.net"] == 0


def test_runs_of_repeated_answers_are_bounded():
    found = steps(repeating(limit=3, bias=-50.0), 9, batch=1)
    assert [int(one.exits[0]) for one in found] == [0, EXITS, EXITS, EXITS, 0, EXITS, EXITS, EXITS, 0]


def test_every_game_has_its_own_memory():
    network = repeating()
    memory = run(network, FIRST, frames(7)).memory
    later = run(network, FIRST, frames(7, 1), memory=forget(memory, torch.tensor([2, 5])))
    same = run(network, FIRST, frames(7, 1), memory=memory)
    assert later.exits[[2, 5]].tolist() == [0, 0]
    others = torch.tensor([0, 1, 3, 4, 6])
    assert torch.equal(later.exits[others], same.exits[others])


def test_a_row_alone_repeats_as_it_does_in_a_batch():
    network = repeating()
    together = steps(network, 4)
    for row in range(7):
        memory = None
        for step in range(4):
            alone = run(network, FIRST, frames(7, step)[row : row + 1], memory=memory)
            memory = alone.memory
            assert int(alone.exits[0]) == int(together[step].exits[row])
            torch.testing.assert_close(alone.answers[0], together[step].answers[row], rtol=1e-5, atol=1e-5)


def test_computing_all_exits_acts_as_real_execution():
    network = repeating()
    policy = parting(network, frames(7))
    real_memory = replay_memory = None
    seen = set()
    for step in range(6):
        real = run(network, policy, frames(7, step), memory=real_memory)
        dense = replay(network, policy, frames(7, step), memory=replay_memory)
        real_memory, replay_memory = real.memory, dense.memory
        assert torch.equal(real.exits, dense.exits)
        torch.testing.assert_close(real.answers, dense.answers, rtol=1e-5, atol=1e-5)
        seen |= set(real.exits.tolist())
    assert EXITS in seen
    assert len(seen) > 2


def test_stored_decisions_are_repeated_with_their_log_probabilities():
    network = repeating()
    generator = torch.Generator().manual_seed(1)
    first, second = steps(network, 2, batch=16, mode="sample", generator=generator)
    state = network.begin(frames(16, 1), first.memory)
    again, _ = network.reuse.decide(state, "replay", second.reuse)
    assert torch.equal(again.action, second.reuse.action)
    torch.testing.assert_close(again.log_prob, second.reuse.log_prob)
    assert (again.log_prob < 0).all()


def test_reuse_and_learned_exits_work_in_one_network():
    network = repeating()
    shapes = dict.fromkeys(network.exit_names[:-1], MAP)
    network.set_leave_gates({name: LeaveGate.pooled(shape, 2, 4, 0.0) for name, shape in shapes.items()})
    with torch.no_grad():
        for gate in network.leave_gates.values():
            gate.module.logit.weight.normal_(std=5.0)
    policy = ExitPolicy("learned", (0.5,) * (EXITS - 1))
    memory, seen = None, set()
    for step in range(8):
        result = run(network, policy, frames(16, step), memory=memory, mode="sample", generator=torch.Generator())
        memory = result.memory
        seen |= set(result.exits.tolist())
        assert all(len(rows) <= int((result.exits < EXITS).sum()) for rows, _ in result.leaving)
    assert seen == {0, 1, 2, EXITS}


def test_an_empty_batch_repeats_nothing():
    result = run(repeating(), FIRST, frames(0))
    assert len(result.answers) == 0


def test_a_run_length_of_nothing_is_refused():
    with pytest.raises(ValueError, match="`max_reuse` must be at least 1, got 0"):
        ReuseGate(OUTPUTS, 0)
