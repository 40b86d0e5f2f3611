"""Zero Time Waste's table of a vision run that is done: `python benchmarks/time_budgets.py runs/cifar10/resnet56_ztw`.

For SDN, PBEE (patience on SDN's exits) and every other method with exits: accuracy at 25, 50, 75 and 100 % of the full
network's MACs and at most, by the reference's rule (thresholds tried on the test images, strictly below the budget, no
interpolation), then what calibrated thresholds reached on the same images, then accuracy and hindsight improvability per
exit. MACs are true ones, heads included; the published table counts in another convention, see `methods/ztw.md` 1.9.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from rlexit.config import METHODS
from rlexit.costs import cost_table
from rlexit.interrupts import StopFlag
from rlexit.metrics import hindsight_improvability
from rlexit.rows import read_rows
from rlexit.session import Session, load_network
from rlexit.settings import locate, resolve
from vision.budgets import BUDGETS, Sweep, sweep_confidence, sweep_patience
from vision.domain import domain

CHUNK = 256


@torch.no_grad()
def answers_of(network, pixels: torch.Tensor) -> torch.Tensor:
    """(N, K, A) log-probabilities of all exits."""
    return torch.cat([network(part).answers for part in pixels.split(CHUNK)])


def honest(folder: Path) -> dict[str, tuple[float, float]]:
    """Label of every calibrated point to its accuracy and relative MACs on the test images."""
    found: dict[str, tuple[float, float]] = {}
    path = folder / "eval" / "episodes.csv"
    rows = [row for row in (read_rows(path) if path.exists() else []) if row.target]
    for label in dict.fromkeys(row.label for row in rows):
        mine = [row for row in rows if row.label == label]
        count = sum(row.decisions for row in mine)
        means = (sum(getattr(row, name) * row.decisions for row in mine) / count for name in ("value", "relative_macs"))
        found[label] = tuple(means)  # type: ignore[assignment]
    return found


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    console = Console(width=160)
    place = locate(str(options.run), options.run)
    made = Session(domain(resolve(place, [])), place.root, options.seed, console, StopFlag())  # type: ignore[arg-type]
    test = made.domain.data.evaluated("test")
    sweeps: dict[str, Sweep] = {}
    exits = Table("method", "per exit", title="accuracy, then hindsight improvability, per exit (%)")
    full = 0
    for method in made.domain.config.methods:
        if METHODS[method].static or not made.method(method).is_dir():
            continue
        network = load_network(made, method)[""]
        costs = cost_table(network, made.domain.example())
        full = costs.full
        confidences, chosen = answers_of(network, test.pixels).exp().max(dim=-1)
        right = chosen == test.labels[:, None]
        sweeps[method] = sweep_confidence(confidences, right, costs.exits)
        if method == "sdn":
            sweeps["pbee"] = sweep_patience(chosen, right, costs.exits)
        improvable = hindsight_improvability(chosen.numpy(), test.labels.numpy())
        for name, values in (("", right.double().mean(dim=0).tolist()), (" HI", improvable.tolist())):
            exits.add_row(method + name, " ".join(f"{100 * value:.1f}" for value in values))
    table = Table("method", *(f"{100 * share:g} %" for share in BUDGETS), "max", title=f"{len(test)} test images")
    for name, sweep in sweeps.items():
        table.add_row(name, *(f"{100 * value:.2f}" for value in sweep.table(full).values()))
    console.print(table)
    for method in sweeps:
        for label, (accuracy, macs) in honest(made.method(method)).items():
            console.print(f"{method} {label}: {100 * accuracy:.2f} % at {macs:.3f} of the MACs (thresholds held out)")
    console.print(exits)


if __name__ == "__main__":
    main()
