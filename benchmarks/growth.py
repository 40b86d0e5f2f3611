"""How cost grows: `python -m benchmarks.growth [--folder FOLDER]`, a table, growth.csv and growth.png.

Time per 1,000 decisions of distillation (two heads, 5 epochs) and of evaluation (the exits' mix) against the number of
games side by side, of exits, and time of all against the number of different games. Exits are untrained: they cost the same.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from agents import rollouts
from agents.backbones.nature import UNIT_NAMES, nature_network
from agents.config import EnvConfig
from agents.envs import AtariVecEnv
from benchmarks.speed import distilling
from rlexit import machine
from rlexit.config import HeadConfig
from rlexit.ensembles import ensembles
from rlexit.exit_policy import ExitPolicy
from rlexit.network import StagedNetwork

ENVS, GAMES = (4, 8, 16, 32, 64), ("pong", "breakout", "freeway", "ms_pacman")
SAMPLES, TICKS = 8_192, 60


def network_of(exits: int, game: str = "pong") -> StagedNetwork:
    env = AtariVecEnv(EnvConfig(game=game), 1, training=False)
    actions = len(env.action_meanings)
    env.close()
    torch.manual_seed(0)
    ensemble = ensembles["geometric"](exits, actions)
    return nature_network(actions, UNIT_NAMES[:exits], HeadConfig(), True, ensemble)


def distillation(envs: int = 16, exits: int = 2, game: str = "pong") -> float:
    """Seconds per 1,000 samples."""
    return 1000 / distilling(network_of(exits, game), SAMPLES, envs, EnvConfig(game=game))


def evaluation(envs: int = 16, exits: int = 2, game: str = "pong") -> float:
    """Seconds per 1,000 decisions, the first ticks not counted."""
    network = network_of(exits, game).eval()
    decide = rollouts.exiting(network, [ExitPolicy("confidence", (0.3,) * exits)])
    collected = rollouts.collect(
        EnvConfig(game=game), lambda rows: decide(rows, np.zeros(len(rows), dtype=np.int64)).answers, envs, TICKS, 0
    )
    next(collected)
    began = time.perf_counter()
    decisions = next(collected)
    spent = time.perf_counter() - began
    collected.close()
    return 1000 * spent / decisions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/growth"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    machine.settle(options.threads)
    print(f"# {machine.describe()}, {torch.get_num_threads()} threads, torch {torch.__version__}", flush=True)
    works: dict[str, Callable[..., float]] = {"distillation": distillation, "evaluation": evaluation}
    asked = [("games side by side", {"envs": count}, count) for count in ENVS]
    asked += [("exits", {"exits": count}, count) for count in (1, 2, 3)]
    found: dict[tuple[str, str], list[tuple[int, float, float, float]]] = {}
    for (what, settings, count), (work, measure) in itertools.product(asked, works.items()):
        times = sorted(measure(**settings) for _ in range(options.repeats))
        found.setdefault((what, work), []).append((count, float(np.median(times)), times[0], times[-1]))
    for work, measure in works.items():
        totals = np.zeros(options.repeats)
        for count, game in enumerate(GAMES, start=1):
            totals = totals + [measure(game=game) for _ in range(options.repeats)]
            row = (count, float(np.median(totals)), float(totals.min()), float(totals.max()))
            found.setdefault(("different games", work), []).append(row)
    options.folder.mkdir(parents=True, exist_ok=True)
    with (options.folder / "growth.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("against", "work", "count", "seconds_per_1000_median", "low", "high"))
        for (what, work), rows in found.items():
            for row in rows:
                table.writerow((what, work, *row))
                print(
                    f"| {work} | {what} {row[0]} | {row[1]:.3f} [{row[2]:.3f} .. {row[3]:.3f}] s per 1,000 |",
                    flush=True,
                )
    _draw(found, options.folder / "growth.png")


def _draw(found: dict[tuple[str, str], list[tuple[int, float, float, float]]], path: Path) -> None:
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    names = list(dict.fromkeys(what for what, _ in found))
    for axes, what in zip(figure.subplots(1, len(names)), names, strict=True):
        for (other, work), rows in found.items():
            if other == what:
                counts, middle, low, high = np.array(rows).T
                axes.errorbar(counts, middle, yerr=[middle - low, high - middle], marker="o", capsize=2, label=work)
        axes.set(xlabel=what, ylabel="s per 1,000 decisions" + (", summed" if what == "different games" else ""))
        axes.set_xticks(counts)
        axes.set_ylim(bottom=0)
        axes.margins(y=0.08)
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
