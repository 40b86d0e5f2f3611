"""What the names in a report mean, for whoever opens one without knowing the methods."""

from __future__ import annotations

from collections.abc import Iterable

from rlexit.pages import Table
from rlexit.summary import RANDOM, RANDOM_EXIT, STATIC, TEACHER

METHOD_WORDS = {
    TEACHER: "the original network, run whole for every decision",
    RANDOM: "acts, or guesses, by chance",
    STATIC: "a smaller network without exits: what the same compute buys without them",
    RANDOM_EXIT: "leaves at exits drawn by chance",
    "sdn": "heads that read the backbone only, each by itself; a row leaves where an exit is sure",
    "pbee": "the heads of sdn; a row leaves where enough exits in a row agree",
    "ztw": "each head also reads what the head before it said, and an exit answers with all heads so far (geometric mean)",
    "additive": "as ztw, but answers are weighted sums of the heads",
    "cascade_only": "each head also reads what the head before it said; no combined answers",
    "ensemble_only": "heads that read the backbone only, with combined answers",
    "refined": "ztw, with decisions to leave, to skip or to repeat refined by reinforcement learning",
    "layer_gates": "gates skip blocks row by row, learnt together with the network under a price on compute",
    "gates_ppo": "layer_gates, refined by reinforcement learning (PPO)",
    "iadi": "gates skip blocks and channels row by row",
    "ddi": "gates skip blocks and channels row by row, and branches are exits",
    "skipnet_sp": "SkipNet's supervised start: gates without a price on compute",
    "skipnet": "gates skip blocks, learnt by SkipNet's hybrid reinforcement learning",
    "blockdrop_policy": "BlockDrop's start: a policy net chooses all blocks at once, the network stays frozen",
    "blockdrop": "a policy net chooses all blocks at once, learnt together with the network",
    "random_gates": "control: gates that open by chance as often as those of layer_gates",
    "static_gates": "control: gates that decide the same for all rows",
}
POINT = "operating point"
TERMS = {
    "MACs": "multiply-adds that were executed for a decision, heads and gates included",
    "relative MACs": "the same over those of the full network without heads; 1 is the original's compute",
    "exits %": "how many decisions left at each exit, first to last, in %",
    "exit K": f"{POINT}: every decision leaves at that exit",
    "full": f"{POINT}: nobody leaves early",
    "confidence@T": f"{POINT}: a row leaves where an exit's confidence (its highest probability) is above T",
    "entropy@T": f"{POINT}: a row leaves where an exit's entropy, negated, is above T",
    "margin@T": f"{POINT}: a row leaves where an exit's two highest probabilities differ by more than T",
    "patience@T": f"{POINT}: a row leaves where more than T exits in a row agree",
    "target_macs=S": f"{POINT}: thresholds chosen on held-out data so that a share S of the compute is spent",
    "max_return_drop=D": f"{POINT}: the cheapest thresholds certified on held-out data to lose at most a share D",
    "budget=S": f"{POINT}: no row may cost more than a share S of the full network",
}


def glossary(methods: Iterable[str], labels: Iterable[str]) -> Table:
    """The words that a report uses.

    Args:
        methods: as tables call them; the name of a run behind one is left out.
        labels: of operating points.
    """
    plain = dict.fromkeys(name.partition(" (")[0] for name in methods)
    used = list(labels)
    terms = [
        (term, told)
        for term, told in TERMS.items()
        if not told.startswith(POINT) or any(label.startswith(term[:-1]) for label in used)
    ]
    lines = [(name, METHOD_WORDS[name]) for name in plain if name in METHOD_WORDS]
    return Table(("name", "meaning"), [*lines, *terms])
