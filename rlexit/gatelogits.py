"""Layer gates for export: the logit of running a unit, in few and plain operators.

What a gate reads is handed in and out, so that a graph keeps nothing. Equal in real numbers to the gate itself; in float32
within rounding, which the parity check of `rlexit.export` measures.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rlexit.gates.channel import ChannelGate
from rlexit.gates.composite import KIND, CompositeGate
from rlexit.gates.control import HashGate, RandomGate, StaticGate
from rlexit.gates.layer import HIDDEN, FeedForwardGate, RecurrentGate
from rlexit.gates.policy_net import PolicyNetGate, ToldGate
from rlexit.network import StagedNetwork

# What a config calls the gates that no graph can ask.
OTHERS: dict[str, tuple[type[nn.Module], ...]] = {
    KIND: (CompositeGate,),
    "random": (HashGate, RandomGate),
    "policy_net": (PolicyNetGate, ToldGate),
    "a channel gate": (ChannelGate,),
}


class RecurrentLogit(nn.Module):
    """`RecurrentGate`: the embedding is folded into the LSTM's weights, and its three sigmoids are one operator.

    Args:
        gate: the original; left as it is.
        first: of its network, so that hidden and cell state are 0.
    """

    def __init__(self, gate: RecurrentGate, first: bool) -> None:
        super().__init__()
        core = gate._shared[0]
        cell, embed = core.cell, gate.embed
        with torch.no_grad():
            weight, bias = cell.weight_ih @ embed.weight, cell.weight_ih @ embed.bias + cell.bias_ih + cell.bias_hh
            if not first:
                weight = torch.cat([weight, cell.weight_hh], dim=1)
            # torch's order is input, forget, cell, output: the three that go through a sigmoid come together here.
            i, f, g, o = torch.arange(4 * HIDDEN).split(HIDDEN)
            order = torch.cat([i, f, o, g])
            self.all = nn.Linear(weight.shape[1], 4 * HIDDEN)
            self.all.weight, self.all.bias = nn.Parameter(weight[order]), nn.Parameter(bias[order])
            self.logit = nn.Linear(HIDDEN, 1)
            self.logit.weight = nn.Parameter(core.logit.weight.clone())
            self.logit.bias = nn.Parameter(core.logit.bias + gate.offset)

    def forward(self, seen: Tensor, *carry: Tensor) -> tuple[Tensor, ...]:
        """(B, C, H, W), then hidden and cell state unless it is the first, to (B, 1) logit and the new two."""
        pooled = seen.mean(dim=(2, 3))
        found = self.all(torch.cat([pooled, carry[0]], dim=1) if carry else pooled)
        opened, fresh = found.split([3 * HIDDEN, HIDDEN], dim=1)
        enter, keep, show = opened.sigmoid().split(HIDDEN, dim=1)
        memory = enter * fresh.tanh()
        memory = memory + keep * carry[1] if carry else memory
        hidden = show * memory.tanh()
        return self.logit(hidden), hidden, memory


class FeedForwardLogit(nn.Module):
    """`FeedForwardGate`; carries nothing.

    Args:
        gate: the original; left as it is.
    """

    def __init__(self, gate: FeedForwardGate) -> None:
        super().__init__()
        self.module = gate.module

    def forward(self, seen: Tensor, *carry: Tensor) -> tuple[Tensor, ...]:
        """(B, C, H, W) to (B, 1) logit."""
        two = self.module(seen)
        return (two[:, 1:] - two[:, :1], *carry)


def exportable(gate: nn.Module) -> bool:
    """Whether a gate does no more than to run or skip a whole unit, by a logit of what it sees now and carries."""
    return isinstance(gate, (RecurrentGate, FeedForwardGate, StaticGate))


def kind_of(gate: nn.Module) -> str:
    """What a config calls a gate that is not `exportable`."""
    return next((kind for kind, classes in OTHERS.items() if isinstance(gate, classes)), type(gate).__name__)


def is_settled(gate: nn.Module) -> bool:
    """Whether a gate decides alike for every row, so that nobody needs to be asked."""
    return isinstance(gate, StaticGate)


def runs_always(network: StagedNetwork, name: str) -> bool:
    """Whether every row runs a unit of which nobody is asked: it has no gate, or one that `is_settled` to run it."""
    if name not in network.gates:
        return True
    gate: Any = network.gates[name]
    return not is_settled(gate) or bool(gate.logit > 0)


def logit_of(gate: Any, first: bool) -> nn.Module:
    """The module that gives a gate's logit and what the next gate reads.

    Args:
        gate: `exportable`, not settled.
        first: whether no gate before it carried anything.
    """
    return RecurrentLogit(gate, first) if isinstance(gate, RecurrentGate) else FeedForwardLogit(gate)
