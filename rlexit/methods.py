"""The methods that a config may name: what distinguishes the ways to train exits and gates. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """What distinguishes the ways to train exits.

    Args:
        cascade: each early head reads the logits of the one before it.
        ensemble: registered ensemble, fitted after the heads.
        static: no exits at all but small networks, trained on the same data.
        refines: the method whose distilled weights, of the same seed, `refine` starts from; "" where it is distilled itself.
        gates: registered kind of gates before units, for classifiers; trunk and gates then learn together.
        exits: whether there are early exits.
        priced: whether compute enters the supervised loss.
        algo: of refinement, in place of the config's; of a method that is not refined: how its gates learn at all.
        rates_of: `random` gates only: the method whose gates' shares they repeat.
    """

    cascade: bool = False
    ensemble: str = "none"
    static: bool = False
    refines: str = ""
    gates: str = ""
    exits: bool = True
    priced: bool = True
    algo: str = ""
    rates_of: str = ""


METHODS = {
    "ztw": Method(cascade=True, ensemble="geometric"),
    "sdn": Method(),
    "additive": Method(cascade=True, ensemble="additive"),
    "cascade_only": Method(cascade=True),
    "ensemble_only": Method(ensemble="geometric"),
    "static": Method(static=True),
    "refined": Method(cascade=True, ensemble="geometric", refines="ztw"),
    "layer_gates": Method(gates="lstm", exits=False),
    "gates_ppo": Method(gates="lstm", exits=False, refines="layer_gates", algo="ppo"),
    "iadi": Method(gates="mgl2s", exits=False),
    "ddi": Method(gates="mgl2s"),
    "skipnet_sp": Method(gates="lstm", exits=False, priced=False),
    "skipnet": Method(gates="lstm", exits=False, refines="skipnet_sp", algo="skipnet"),
    "blockdrop_policy": Method(gates="policy_net", exits=False, algo="blockdrop"),
    "blockdrop": Method(gates="policy_net", exits=False, refines="blockdrop_policy", algo="blockdrop"),
    "random_gates": Method(gates="random", exits=False, rates_of="layer_gates"),
    "static_gates": Method(gates="static", exits=False),
}
