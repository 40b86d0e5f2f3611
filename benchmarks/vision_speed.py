"""Speed of exits on images, as ratios: `python benchmarks/vision_speed.py [batched single training] [--depth 56]`.

batched   real execution of a batch of 256 against the plain network in its faster memory layout: the time should be at most
          time_full x relative_macs / 0.75
single    one image on one thread, leaving at every exit with all heads before it run, of the config with an exit per block
          and of the recommended one, in eager torch and in onnxruntime: relative_macs / relative time should be
          at least 0.7 from the fourth exit on
training  samples per second of training all exits side by side (SDN's and ZTW's heads) against the bare work, which is one
          frozen forward and every head's forward and backward: at least 0.6. And the peak memory of this process.

Weights are random and images generated: neither changes how long anything takes. So that the rows of `batched` leave exit by
exit all the same, as those of trained heads do, each exit has the threshold by which its share of a geometric series leaves.
Samples of `training` are ready on both sides: decoding and augmentation are left out. Each figure is a median over
alternating repeats, with the smallest and largest. Run it with nothing beside it.
"""

from __future__ import annotations

import argparse
import copy
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from speed import LAYOUTS, alternate, plain, seconds, spread
from torch import Tensor
from torch.nn import functional

from rlexit import machine
from rlexit.config import METHODS, DistillConfig
from rlexit.costs import cost_table
from rlexit.distill import Distiller
from rlexit.ensembles import ensembles
from rlexit.exit_policy import ExitPolicy
from rlexit.export import server_of
from rlexit.network import StagedNetwork
from rlexit.runtime import run
from rlexit.settings import locate, resolve
from rlexit.students import ExitStudent
from rlexit.together import SharedSamples, train_together
from vision.budgets import batch_shares, batch_thresholds
from vision.config import BackboneConfig, VisionConfig
from vision.network import classifier

Sides = tuple[dict[str, Callable[[], float]], list[Callable[[], float]]]
CLASSES = 10
SIDE = 32
EVERY_BLOCK, LIGHT = "cifar10/resnet56_given", "cifar10/resnet56_light_given"
LEAST_BATCH, LEAST_SINGLE, LEAST_TRAINING, MOST_GIGABYTES = 0.75, 0.7, 0.6, 6.0


def built(name: str, method: str, depth: int) -> StagedNetwork:
    """The network of a config, with random weights, in evaluation mode."""
    config = resolve(locate(name, Path("runs")), [])
    assert isinstance(config, VisionConfig)
    kind = METHODS[method]
    backbone = BackboneConfig(depth=depth, shortcut="A")
    network = config.network if depth == 56 else type(config.network)()
    torch.manual_seed(0)
    return classifier(
        backbone,
        CLASSES,
        SIDE,
        network=network,
        head=config.head,
        cascade=kind.cascade,
        ensemble=ensembles[kind.ensemble],
    ).eval()


def images(count: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def verdict(value: float, least: float) -> str:
    return f"{value:.2f} {'reaches' if value >= least else 'MISSES'} {least:g}"


def batched(options: argparse.Namespace) -> None:
    for name in (EVERY_BLOCK, LIGHT):
        network = built(name, "ztw", options.depth)
        rows = images(options.batch)
        costs = cost_table(network, rows)
        with torch.no_grad():
            confidences = network(rows).answers.amax(dim=-1).exp()
        layouts = {layout: plain(network, memory) for layout, memory in LAYOUTS.items()}
        for target in (0.25, 0.5, 0.75, 1.0):
            target = max(target, costs.exits[0] / costs.full)
            shares = batch_shares([float(macs) for macs in costs.exits], target * costs.full)
            policy = ExitPolicy("confidence", tuple(batch_thresholds(confidences, shares)), f"{target:g}")
            result = run(network, policy, rows)
            relative = float(result.macs.double().mean()) / costs.full
            used = len(result.exits.unique())
            sides = {layout: partial(seconds, partial(call, rows), options.calls) for layout, call in layouts.items()}
            sides["real"] = partial(seconds, partial(run, network, policy, rows), options.calls)
            found = alternate(sides, options.repeats)
            fastest = min(layouts, key=lambda layout: sorted(found[layout])[len(found[layout]) // 2])
            ratios = [real / full for real, full in zip(found["real"], found[fastest], strict=True)]
            efficiency = sorted(relative / ratio for ratio in ratios)[len(ratios) // 2]
            print(
                f"| batch {options.batch}, {name}, left at {used} exits | relative MACs {relative:.3f} "
                f"| time / full ({fastest}) {spread(ratios, 3)} | {verdict(efficiency, LEAST_BATCH)} |",
                flush=True,
            )


def leaving(exit: int, exits: int) -> ExitPolicy:
    """Nobody leaves before `exit`, whose heads are all run, and everybody there."""
    early = exits - 1
    limits = [2.0] * min(exit, early) + [-torch.inf] * (exit < early) + [torch.inf] * max(early - exit - 1, 0)
    return ExitPolicy("confidence", tuple(limits), f"exit {exit}")


def torch_sides(network: StagedNetwork, row: Tensor, calls: int) -> Sides:
    """Seconds of a call in eager torch: the plain network by memory layout, and leaving at every exit."""
    full = {layout: partial(seconds, partial(plain(network, memory), row), calls) for layout, memory in LAYOUTS.items()}
    exits = [
        partial(seconds, partial(run, network, leaving(exit, network.exits), row), calls)
        for exit in range(network.exits)
    ]
    return full, exits


def served_sides(depth: int, network: StagedNetwork, row: Tensor, calls: int) -> Sides:
    """The same in onnxruntime: exports with all heads, and of the network without any."""
    checked = images(64)
    bare = classifier(BackboneConfig(depth=depth, shortcut="A"), CLASSES, SIDE).eval()
    whole = server_of(bare, ExitPolicy.full(1), checked, 1, "onnxruntime")
    server = server_of(
        network, ExitPolicy("confidence", (2.0,) * (network.exits - 1), "all"), checked, 1, "onnxruntime"
    )
    image = row[0].numpy()
    exits = [
        partial(seconds, partial(server.with_thresholds(leaving(exit, network.exits).thresholds).act, image), calls)
        for exit in range(network.exits)
    ]
    return {"plain": partial(seconds, partial(whole.act, image), calls)}, exits


def single(options: argparse.Namespace) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name in (EVERY_BLOCK, LIGHT):
            network = built(name, "ztw", options.depth)
            row = images(1)
            for runtime, sides_of in (
                ("torch eager", torch_sides),
                ("onnxruntime", partial(served_sides, options.depth)),
            ):
                full, exits = sides_of(network, row, options.calls)
                told(f"{name}, {runtime}", network, full, exits, options.repeats)
    finally:
        torch.set_num_threads(threads)


def told(
    title: str,
    network: StagedNetwork,
    plains: dict[str, Callable[[], float]],
    exits: list[Callable[[], float]],
    repeats: int,
) -> None:
    """Prints a line per exit, against the faster of the plain ones."""
    costs = cost_table(network, images(1))
    sides = {**plains, **{f"exit {exit}": call for exit, call in enumerate(exits)}}
    for call in sides.values():
        call()
    found = alternate(sides, repeats)
    full = min((found[layout] for layout in plains), key=lambda times: sorted(times)[len(times) // 2])
    print(f"| one image, {title} | full {spread([1e6 * time for time in full])} us |", flush=True)
    for exit in range(network.exits):
        ratios = [mine / whole for mine, whole in zip(found[f"exit {exit}"], full, strict=True)]
        relative = costs.exits[exit] / costs.full
        efficiency = sorted(relative / ratio for ratio in ratios)[len(ratios) // 2]
        words = verdict(efficiency, LEAST_SINGLE) if exit >= 3 else f"{efficiency:.2f}"
        print(f"| exit {exit} | relative MACs {relative:.3f} | time / full {spread(ratios, 3)} | {words} |", flush=True)


def samples(count: int, batch: int, first: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(first)
    pixels = images(batch * count)
    while True:
        labels = torch.randint(0, CLASSES, (batch * count,), generator=generator)
        yield list(zip(pixels.split(batch), labels.split(batch), strict=True))


def ours(networks: dict[str, StagedNetwork], config: DistillConfig, options: argparse.Namespace) -> float:
    """Images per second of training all methods side by side, the first buffer left out."""
    copies = {method: copy.deepcopy(network) for method, network in networks.items()}
    shared = SharedSamples(partial(samples, 4, options.train_batch), ExitStudent(copies["sdn"]).look)
    marks: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        distillers = [
            Distiller(ExitStudent(network, shared.observe), shared, config, Path(folder) / method, 0)
            for method, network in copies.items()
        ]
        distillers[-1].progress = lambda done, total, facts: marks.append(time.perf_counter())
        train_together(distillers, lambda: False)
    buffers = config.steps // (4 * options.train_batch)
    return (buffers - 1) * 4 * options.train_batch / (marks[buffers - 1] - marks[0])


def bare(networks: dict[str, StagedNetwork], config: DistillConfig, options: argparse.Namespace) -> float:
    """The same work without anything around it: one frozen forward, every head forward and backward."""
    copies = {method: copy.deepcopy(network) for method, network in networks.items()}
    trunk = copies["sdn"]
    rows = images(options.train_batch)
    labels = torch.randint(0, CLASSES, (options.train_batch,))
    lowered: Callable[[], torch.autocast] = partial(torch.autocast, "cpu", torch.bfloat16)
    for network in copies.values():
        network.requires_grad_(False)
        network.heads.requires_grad_(True)

    def once() -> None:
        with torch.no_grad(), lowered():
            taps = trunk.taps(rows)[:-1]
        for network in copies.values():
            with lowered():
                logits = network.read(taps)
            losses = functional.cross_entropy(logits.float().flatten(0, 1), labels.repeat_interleave(logits.shape[1]))
            losses.backward()

    once()
    count = max(config.steps // options.train_batch - 4, 1)
    return options.train_batch / seconds(once, count)


def training(options: argparse.Namespace) -> None:
    networks = {method: built(EVERY_BLOCK, method, options.depth) for method in ("sdn", "ztw")}
    steps = options.buffers * 4 * options.train_batch
    config = DistillConfig(
        steps=steps,
        ensemble_steps=4 * options.train_batch,
        batch_size=options.train_batch,
        epochs=1,
        label_weight=1.0,
        weight_decay=1e-4,
        frozen_precision="bf16",
        checkpoint_buffers=98,
    )
    sides = {"ours": partial(ours, networks, config, options), "bare": partial(bare, networks, config, options)}
    found = alternate(sides, options.repeats)
    ratios = [mine / theirs for mine, theirs in zip(found["ours"], found["bare"], strict=True)]
    middle = sorted(ratios)[len(ratios) // 2]
    gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
    print(
        f"| training SDN's and ZTW's heads together | {spread(found['ours'])} images/s | bare {spread(found['bare'])} "
        f"| {verdict(middle, LEAST_TRAINING)} | peak {gigabytes:.2f} GB, "
        f"{'below' if gigabytes < MOST_GIGABYTES else 'ABOVE'} {MOST_GIGABYTES:g} |",
        flush=True,
    )


PARTS = {"batched": batched, "single": single, "training": training}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=", ".join(PARTS))
    parser.add_argument("--depth", type=int, default=56, help="of the ResNet; another than 56 has an exit per block")
    parser.add_argument("--batch", type=int, default=256, help="rows of `batched`")
    parser.add_argument("--train_batch", type=int, default=128, help="rows of a minibatch in `training`")
    parser.add_argument(
        "--buffers", type=int, default=6, help="of four minibatches in `training`, the first not counted"
    )
    parser.add_argument("--repeats", type=int, default=5, help="alternating repeats")
    parser.add_argument("--calls", type=int, default=5, help="calls per repeat")
    parser.add_argument("--threads", type=int, default=None, help="default: all cores")
    options = parser.parse_args()
    for part in options.parts:
        if part not in PARTS:
            parser.error(f"no part {part!r}; there are {', '.join(PARTS)}")
    machine.settle(options.threads)
    print(f"# {machine.describe()}, {torch.get_num_threads()} threads, torch {torch.__version__}", flush=True)
    for part in options.parts:
        PARTS[part](options)


if __name__ == "__main__":
    main()
