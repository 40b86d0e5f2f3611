"""Measured time of skipped blocks: ResNet-56 whose gates skip a share of the MACs, against the plain net.

    python benchmarks/gated_speed.py                 # half of the MACs, batches of 128 and of 1
    python benchmarks/gated_speed.py --keep 0.7 --repeats 20

Gates are random with a hash of the image, so nothing is trained; an LSTM layer gate costs 0.03 % of a block and is timed
apart. Times are medians in turn with the plain net in channels_last, its fastest layout. A quiet machine is assumed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from rlexit.config import GateConfig
from rlexit.costs import cost_table
from rlexit.exit_policy import ExitPolicy
from rlexit.network import StagedNetwork
from rlexit.runtime import run
from vision.config import BackboneConfig
from vision.network import Gating, classifier

# Batch size to the share of the MAC prediction that measured time must reach.
WANTED = {128: 0.65, 1: 0.6}


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


def medians(calls: list[Callable[[], object]], repeats: int) -> list[float]:
    """Median seconds of each call, one after the other in turn."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats + 3):
        for call, found in zip(calls, seconds, strict=True):
            began = time.perf_counter()
            call()
            found.append(time.perf_counter() - began)
    return [float(torch.tensor(found[3:]).median()) for found in seconds]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, default=0.5, help="share of the MACs that is executed")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    plain, skipping, gated = network("", 1.0), network("random", options.keep), network("lstm", 1.0)
    full = cost_table(plain, torch.zeros((1, 3, 32, 32), dtype=torch.uint8)).full
    whole = ExitPolicy.full(1)
    print(f"threads {options.threads}, torch {torch.__version__}, ResNet-56 option A, {full:,} MACs")
    print("batch  relative_macs  plain ms  skipping ms  time ratio  allowed  lstm gates ms")
    for batch, share in WANTED.items():
        images = torch.randint(0, 256, (max(batch, 64), 3, 32, 32), dtype=torch.uint8)
        parts = images.split(batch)
        macs = torch.cat([run(skipping, whole, part).macs for part in parts]).double().mean() / full

        def forward(parts: tuple[torch.Tensor, ...] = parts) -> None:
            for part in parts:
                state = plain.begin(part)
                while not plain.finished(state):
                    state = plain.advance(state)

        def gathered(net: StagedNetwork, parts: tuple[torch.Tensor, ...] = parts) -> None:
            for part in parts:
                run(net, whole, part)

        calls: list[Callable[[], object]] = [forward, lambda g=gathered: g(skipping), lambda g=gathered: g(gated)]
        times = [1e3 * seconds / len(parts) for seconds in medians(calls, options.repeats)]
        ratio, allowed = times[1] / times[0], float(macs) / share
        print(
            f"{batch:5}  {float(macs):13.3f}  {times[0]:8.2f}  {times[1]:11.2f}  {ratio:10.3f}"
            f"  {allowed:7.3f}  {times[2]:13.2f}  {'met' if ratio <= allowed else 'MISSED'}"
        )


if __name__ == "__main__":
    main()
