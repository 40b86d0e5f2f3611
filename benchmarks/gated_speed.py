"""Measured time of skipped blocks: ResNet-56 whose gates skip a share of the MACs, against the plain net.

    python benchmarks/gated_speed.py                 # half of the MACs, batches of 128 and of 1
    python benchmarks/gated_speed.py --keep 0.7 --repeats 20
    python benchmarks/gated_speed.py --run runs/cifar10/resnet56_gates --method layer_gates   # a trained one, on its images

In torch, gates are random with a hash of the image, and LSTM gates that read it; in onnxruntime, LSTM gates. Without --run
nothing is trained: the LSTM's first weights are spread, so that images are decided differently, and its logit is shifted
until the wanted share is kept. Times are medians, in turn with the plain net: in torch in channels_last, its fastest
layout; in onnxruntime as one exported graph. A quiet machine is assumed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from rlexit.config import GateConfig
from rlexit.costs import cost_table
from rlexit.domain import Watch
from rlexit.exit_policy import ExitPolicy
from rlexit.export import server_of
from rlexit.interrupts import StopFlag
from rlexit.network import StagedNetwork
from rlexit.runtime import run
from rlexit.session import Session, load_network, plain_teacher
from rlexit.settings import locate, resolve
from vision.config import BackboneConfig
from vision.domain import domain
from vision.network import Gating, classifier

# Batch size to the share of the MAC prediction that measured time must reach.
WANTED = {128: 0.65, 1: 0.6}
WHOLE = ExitPolicy.full(1)
ROWS = 128


def network(kind: str, keep: float) -> StagedNetwork:
    """ResNet-56 with option A whose gated blocks run for a share of the images that keeps `keep` of all MACs."""
    config = BackboneConfig(depth=56, shortcut="A")
    if not kind:
        return classifier(config, 10, 32).eval()
    plain = cost_table(classifier(config, 10, 32).eval(), torch.zeros((1, 3, 32, 32), dtype=torch.uint8))
    gates = classifier(config, 10, 32, gating=Gating(GateConfig(kind=kind, bias=20.0))).gates
    gated = sum(plain.units[name] for name in gates if gates[name].decides)
    rate = 1 - (1 - keep) * plain.full / gated
    settings = GateConfig(kind=kind, rates=(rate,), bias=20.0)
    return classifier(config, 10, 32, gating=Gating(settings)).eval()


@torch.no_grad()
def reading(keep: float, images: torch.Tensor) -> StagedNetwork:
    """ResNet-56 whose LSTM gates, untrained, keep about `keep` of the MACs on these images, each its own blocks."""
    made = network("lstm", 1.0)
    gates: list[Any] = list(made.gates.values())
    for gate in gates:
        gate.embed.weight.mul_(20)
    core = gates[0].core
    core.cell.weight_ih.mul_(3)
    core.logit.weight.mul_(5)
    full, low, high = cost_table(made, images).full, -20.0, 20.0
    for _ in range(10):
        core.logit.bias.fill_((low + high) / 2)
        kept = float(run(made, WHOLE, images).macs.double().mean()) / full
        low, high = (low, (low + high) / 2) if kept > keep else ((low + high) / 2, high)
    return made


def trained(folder: Path, method: str) -> tuple[StagedNetwork, StagedNetwork, torch.Tensor]:
    """The plain net and the gated one of a run, and held-out images."""
    place = locate(str(folder), folder.parent)
    session = Session(domain(resolve(place, [])), place.root, place.seed, Console(quiet=True), StopFlag())
    gated, plain = load_network(session, method)[""], plain_teacher(session).eval()
    return plain, gated, session.domain.rows(gated, ExitPolicy.full(gated.exits), ROWS, Watch())


def medians(calls: list[Callable[[], object]], repeats: int) -> list[float]:
    """Median seconds of each call, one after the other in turn."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats + 3):
        for call, found in zip(calls, seconds, strict=True):
            began = time.perf_counter()
            call()
            found.append(time.perf_counter() - began)
    return [float(torch.tensor(found[3:]).median()) for found in seconds]


def eager(net: StagedNetwork, parts: tuple[torch.Tensor, ...]) -> Callable[[], object]:
    """Every unit of the plain net, or real execution of a gated one."""

    def whole() -> None:
        for part in parts:
            state = net.begin(part)
            while not net.finished(state):
                state = net.advance(state)

    def gathered() -> None:
        for part in parts:
            run(net, ExitPolicy.full(net.exits), part)

    return gathered if net.gates else whole


def served(net: StagedNetwork, images: torch.Tensor, batch: int, threads: int) -> Callable[[], object]:
    """An export, one image after the other or in batches."""
    server = server_of(net, ExitPolicy.full(net.exits), images, threads)
    stacks = [part.numpy() for part in images.split(batch)]

    def call() -> None:
        for stack in stacks:
            server.act(stack[0] if batch == 1 else stack)

    return call


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, default=0.5, help="share of the MACs that is executed")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--run", type=Path, default=None, metavar="FOLDER", help="of a run with trained layer gates")
    parser.add_argument("--method", default="layer_gates", help="of that run")
    parser.add_argument("--batches", type=int, nargs="+", default=list(WANTED), choices=list(WANTED))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.run is not None:
        plain, gated, images = trained(options.run, options.method)
        skipping = {"gates of the run": gated}
    else:
        images = torch.randint(0, 256, (ROWS, 3, 32, 32), dtype=torch.uint8)
        plain, gated = network("", 1.0), reading(options.keep, images)
        skipping = {"random gates": network("random", options.keep), "lstm gates": gated}
    full = cost_table(plain, images).full
    print(f"threads {options.threads}, torch {torch.__version__}, {full:,} MACs")
    print("runtime      gates             batch  relative_macs  plain ms  skipping ms  time ratio  allowed")
    for batch in options.batches:
        few = images if batch > 1 else images[:64]
        parts = few.split(batch)
        ways = [("torch eager", name, eager(plain, parts), eager(net, parts), net) for name, net in skipping.items()]
        calls = (served(plain, few, batch, options.threads), served(gated, few, batch, options.threads))
        ways.append(("onnxruntime", list(skipping)[-1], *calls, gated))
        times = medians([call for way in ways for call in way[2:4]], options.repeats)
        for number, (runtime, name, _, _, net) in enumerate(ways):
            macs = float(run(net, ExitPolicy.full(net.exits), few).macs.double().mean()) / full
            whole, part = (1e3 * seconds / len(parts) for seconds in times[2 * number : 2 * number + 2])
            ratio, allowed = part / whole, macs / WANTED[batch]
            print(
                f"{runtime:<12} {name:<16} {batch:6}  {macs:13.3f}  {whole:8.2f}  {part:11.2f}  {ratio:10.3f}"
                f"  {allowed:7.3f}  {'met' if ratio <= allowed else 'MISSED'}"
            )


if __name__ == "__main__":
    main()
