"""A classifier's exits on the whole test set: every exit alone, compute budgets, classes, easy and hard images."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rlexit import dissection
from rlexit.calibrate import Scores, TargetError, solve_macs
from rlexit.checkpoint import write_atomic
from rlexit.config import EvaluateConfig
from rlexit.costs import CostTable, measured_costs
from rlexit.dissection import (
    AREA,
    BATCH,
    EXITS,
    FIXED,
    HONEST,
    REFERENCE,
    BudgetRow,
    ExitRow,
    GroupRow,
    NoteRow,
    PictureRow,
)
from rlexit.domain import Watch
from rlexit.evaluate import method_name
from rlexit.exit_policy import ExitPolicy, first_exit
from rlexit.interrupts import Stopped
from rlexit.metrics import hindsight_improvability
from rlexit.network import StagedNetwork
from rlexit.runtime import run
from vision import budgets
from vision.data import DataSet
from vision.decoding import Images
from vision.reference_ops import NOTE, reference_ops

METRIC = "accuracy"
LEVELS = 41
SHOWN = 8
CLASSES_SHOWN = 10
SCALE_TO = 64
MIDDLE = 0.5


@dataclass(frozen=True)
class Owner:
    """Whose rows are written.

    Args:
        task: as tables call it.
        method: see `rlexit.rows.Row`.
        run_seed: of its training.
        full_macs: that everything is relative to.
        full_ops: the same by the reference's count.
    """

    task: str
    method: str
    run_seed: int
    full_macs: int
    full_ops: int


@dataclass(frozen=True)
class Seen:
    """What every exit tells about some images.

    Args:
        answers: (N, K, A) log-probabilities.
        labels: (N,).
        shape: of an image.
    """

    answers: Tensor
    labels: Tensor
    shape: tuple[int, ...]

    @property
    def chosen(self) -> Tensor:
        """(N, K) likeliest class."""
        return self.answers.argmax(dim=-1)

    @property
    def right(self) -> Tensor:
        """(N, K) whether it is right."""
        return self.chosen == self.labels[:, None]

    def scores(self, rule: str) -> Tensor:
        """(N, K) what a rule says at every exit: confidence, or for patience the length of the streak."""
        return budgets.streaks(self.chosen).float() if rule == "patience" else self.answers.amax(dim=-1).exp()

    def take(self, index: np.ndarray) -> Seen:
        """The images of these indices."""
        where = torch.from_numpy(index)
        return Seen(self.answers[where], self.labels[where], self.shape)


@torch.no_grad()
def see(network: StagedNetwork, images: Images, batch: int, watch: Watch) -> Seen:
    """All exits of all images; raises Stopped if `watch` says so."""
    parts: list[Tensor] = []
    for pixels in images.pixels.split(batch):
        if watch.stop():
            raise Stopped
        parts.append(network(pixels).answers)
        watch.progress(sum(map(len, parts)), len(images), {})
    return Seen(torch.cat(parts), images.labels, tuple(images.pixels.shape[1:]))


def dissect(
    owner: Owner,
    networks: Mapping[str, StagedNetwork],
    data: DataSet,
    config: EvaluateConfig,
    folder: Path,
    watch: Watch,
) -> None:
    """Writes the files of `rlexit.dissection` into `folder`.

    Args:
        owner: whose.
        networks: one named "" with exits, or some without by name.
        data: whose test images are looked at, all of them.
        config: budgets, rules, execution, images per batch.
        folder: of the evaluation.
        watch: stop and progress.
    Raises:
        Stopped: `watch` says so; nothing of this network is written.
    """
    exits: list[ExitRow] = []
    found: list[BudgetRow] = []
    for name, network in networks.items():
        seen = see(network, data.tested, config.n_envs, watch)
        costs = measured_costs(network, data.tested.pixels.split(config.n_envs))
        exits += _exit_rows(owner, name or EXITS, network, seen, costs)
        if network.exits == 1:
            spent = costs.exits[-1] / owner.full_macs
            value = float(seen.right[:, 0].double().mean())
            found.append(_budget(owner, len(seen.labels), FIXED, "", "real", spent, value, spent, name or EXITS))
            continue
        pairs = _pairs(network, seen, data, config, watch)
        looker = _Looker(owner, network, seen, pairs, costs, data, config, watch)
        for rule in ("confidence", "patience"):
            method = method_name(owner.method, rule)
            if rule == "confidence" or (method != owner.method and rule in config.rules):
                found += looker.rows(rule, method)
        looker.show(folder)
    dissection.write(folder, exits)
    if exits:
        note = NoteRow(owner.task, owner.method, owner.run_seed, "relative_ops", NOTE)
        dissection.write(folder, [note])
    dissection.write(folder, found)


def _exit_rows(owner: Owner, label: str, network: StagedNetwork, seen: Seen, costs: CostTable) -> Iterator[ExitRow]:
    values = seen.right.double().mean(dim=0).tolist()
    improvable = hindsight_improvability(seen.chosen.numpy(), seen.labels.numpy()).tolist()
    counted = reference_ops(network, torch.zeros((1, *seen.shape), dtype=torch.uint8))
    for exit, (name, value, hindsight) in enumerate(zip(network.exit_names, values, improvable, strict=True)):
        macs = costs.exits[exit]
        place = (owner.task, owner.method, owner.run_seed, label, exit, name)
        # Counted with every gate open, which is not what rows of a gated network spend.
        ops = math.nan if network.gates else counted.exits[exit] / owner.full_ops
        costs_here = float(macs), macs / owner.full_macs, ops
        yield ExitRow(*place, value, hindsight, *costs_here, len(seen.labels), METRIC)


def _budget(
    owner: Owner,
    count: int,
    choice: str,
    source: str,
    execution: str,
    budget: float,
    value: float,
    spent: float,
    label: str = EXITS,
) -> BudgetRow:
    place = (owner.task, owner.method, owner.run_seed, label, choice, source, execution)
    return BudgetRow(*place, budget, value, spent, count, METRIC)


def _pairs(
    network: StagedNetwork, seen: Seen, data: DataSet, config: EvaluateConfig, watch: Watch
) -> list[tuple[Seen, np.ndarray]]:
    """Images that choose thresholds, and indices of the test images that these are for; every test image is in one."""
    if data.crossed is not None:
        first, second = data.crossed
        return [(seen.take(first), second), (seen.take(second), first)]
    parts = [data.evaluated(split) for split in ("calibration", "certification")]
    held_out = Images(torch.cat([part.pixels for part in parts]), torch.cat([part.labels for part in parts]))
    return [(see(network, held_out, config.n_envs, watch), np.arange(len(seen.labels)))]


class _Looker:
    """One network with exits, everything of it computed."""

    def __init__(
        self,
        owner: Owner,
        network: StagedNetwork,
        seen: Seen,
        pairs: Sequence[tuple[Seen, np.ndarray]],
        costs: CostTable,
        data: DataSet,
        config: EvaluateConfig,
        watch: Watch,
    ) -> None:
        self.owner, self.network, self.seen, self.pairs = owner, network, seen, pairs
        self.data, self.config, self.watch = data, config, watch
        self.costs = costs
        self.count = len(seen.labels)
        held_out = f"{data.config.holdout:g} of the training images"
        crossed = "the other half of the test images, both halves merged"
        self.source = held_out if data.crossed is None else crossed
        self.kept: dict[float, tuple[Tensor, Tensor]] = {}

    def rows(self, rule: str, method: str) -> list[BudgetRow]:
        """The time-budget table of one rule."""
        owner = replace(self.owner, method=method)
        found = [*self._reference(owner, rule), *self._honest(owner, rule)]
        return found if rule == "patience" else [*found, *self._batch(owner)]

    def _reference(self, owner: Owner, rule: str) -> Iterator[BudgetRow]:
        """Thresholds tried on the test images, as published: a replay, because it is a search."""
        seen, costs = self.seen, [float(macs) for macs in self.costs.exits]
        if rule == "patience":
            sweep = budgets.sweep_patience(seen.chosen, seen.right, costs)
        else:
            sweep = budgets.sweep_confidence(seen.scores(rule), seen.right, costs)
        told = (REFERENCE, "all test images", "replay")
        for share in self.config.budgets:
            if not math.isnan(value := sweep.at(share * owner.full_macs)):
                spent = float(sweep.cost[sweep.cost < share * owner.full_macs][-1]) / owner.full_macs
                yield _budget(owner, self.count, *told, share, value, spent)
        best = int(sweep.accuracy.argmax())
        spent = float(sweep.cost[best]) / owner.full_macs
        yield _budget(owner, self.count, *told, math.inf, float(sweep.accuracy[best]), spent)

    def _honest(self, owner: Owner, rule: str) -> Iterator[BudgetRow]:
        """One threshold from held-out images, and the mean over many budgets up to the full network's."""
        for share in self.config.budgets:
            thresholds = self._thresholds(rule, share)
            if thresholds is not None:
                yield self._measured(owner, rule, share, thresholds)
        first = self.costs.exits[0] / owner.full_macs
        if first < 1:
            curve = [self._replayed(rule, float(level)) for level in np.linspace(first, 1, LEVELS)]
            spent, value = zip(*curve, strict=True)
            told = (AREA, self.source, "replay", 1.0, float(np.mean(value)), float(np.mean(spent)))
            yield _budget(owner, self.count, *told)

    def _thresholds(self, rule: str, share: float) -> Tensor | None:
        """(N, K - 1) the threshold of every test image, chosen for a share of the MACs; None if none is cheap enough."""
        found = torch.empty((self.count, self.network.exits - 1))
        for held_out, index in self.pairs:
            try:
                # As everywhere, a little room for the rounding of means.
                limit = solve_macs(Scores(held_out.scores(rule)[:, :-1], self.costs, rule), share + 1e-9)
            except TargetError:
                return None
            found[torch.from_numpy(index)] = limit
        return found

    def _replayed(self, rule: str, share: float) -> tuple[float, float]:
        """Spent share of the MACs, and accuracy, with thresholds from held-out images."""
        thresholds = self._thresholds(rule, share)
        return (math.nan, math.nan) if thresholds is None else self._left(rule, thresholds)

    def _left(self, rule: str, thresholds: Tensor) -> tuple[float, float]:
        """Spent share of the MACs, and accuracy, where every image leaves by its own thresholds; a replay."""
        left = first_exit(self.seen.scores(rule)[:, :-1] > thresholds)
        macs = torch.tensor(self.costs.exits, dtype=torch.float64)[left]
        right = self.seen.right[torch.arange(self.count), left].double()
        return float(macs.mean()) / self.owner.full_macs, float(right.mean())

    def _batch(self, owner: Owner) -> Iterator[BudgetRow]:
        """A threshold per exit, so that a batch of test images meets its budget whatever the single image costs."""
        for share in self.config.budgets:
            if share * owner.full_macs < self.costs.exits[0]:
                continue
            shares = budgets.batch_shares([float(macs) for macs in self.costs.exits], share * owner.full_macs)
            thresholds = torch.empty((self.count, self.network.exits - 1))
            for held_out, index in self.pairs:
                limits = budgets.batch_thresholds(held_out.scores("confidence"), shares)
                thresholds[torch.from_numpy(index)] = torch.tensor(limits)
            spent, value = self._left("confidence", thresholds)
            yield _budget(owner, self.count, BATCH, self.source, "replay", share, value, spent)

    def _measured(self, owner: Owner, rule: str, share: float, thresholds: Tensor) -> BudgetRow:
        """Runs all test images, each with its own thresholds."""
        exits: list[Tensor] = []
        macs: list[Tensor] = []
        right = 0
        policy = ExitPolicy.full(self.network.exits)
        policy = replace(policy, rule=rule, label="")
        chunks = (part.split(self.config.n_envs) for part in (self.data.tested.pixels, self.seen.labels, thresholds))
        for pixels, labels, limits in zip(*chunks, strict=True):
            if self.watch.stop():
                raise Stopped
            result = run(self.network, policy, pixels, thresholds=limits)
            right += int((result.answers.argmax(dim=1) == labels).sum())
            exits.append(result.exits)
            macs.append(result.macs)
        spent = torch.cat(macs).double()
        if rule == "confidence":
            self.kept[share] = torch.cat(exits), spent
        relative = float(spent.mean()) / owner.full_macs
        return _budget(owner, self.count, HONEST, self.source, "real", share, right / self.count, relative)

    def show(self, folder: Path) -> None:
        """Classes and pictures at the budget nearest to half of the MACs; nothing where no budget could be met."""
        if not self.kept:
            return
        share = min(self.kept, key=lambda known: abs(known - MIDDLE))
        exits, macs = self.kept[share]
        rows = torch.arange(self.count)
        right = self.seen.right[rows, exits]
        place = (self.owner.task, self.owner.method, self.owner.run_seed)
        label = f"{share:g} of the MACs"
        groups: list[GroupRow] = []
        for index, name in enumerate(self.data.classes):
            mine = self.seen.labels == index
            if not bool(mine.any()):
                continue
            shares = torch.bincount(exits[mine], minlength=self.network.exits).double() / int(mine.sum())
            value = float(right[mine].double().mean())
            spent = float(macs[mine].mean()) / self.owner.full_macs
            groups.append(GroupRow(*place, label, name, value, spent, tuple(shares.tolist()), int(mine.sum()), METRIC))
        dissection.write(folder, groups)
        sure = self.seen.answers[rows, exits].amax(dim=-1)
        # Earliest first, the surest of an exit first.
        order = np.lexsort((-sure.numpy(), exits.numpy()))
        names = self.data.classes[:CLASSES_SHOWN]
        rows_of_images = [self.data.tested.take(_own(order, self.seen.labels, index)) for index in range(len(names))]
        packed = io.BytesIO()
        sheet(rows_of_images).save(packed, "PNG")
        write_atomic(folder / "images.png", packed.getvalue())
        caption = (
            f"{self.owner.method} at {label}, thresholds from {self.source}: a row per class ({', '.join(names)}); on "
            f"the left its {SHOWN} easiest images, which left first, on the right its {SHOWN} hardest, which left last."
        )
        row = PictureRow(*place, "images.png", "The easiest and the hardest images of every class", caption)
        dissection.write(folder, [row])


def _own(order: np.ndarray, labels: Tensor, index: int) -> np.ndarray:
    """The first and the last images of a class, in an order of all."""
    mine = order[labels.numpy()[order] == index]
    count = min(SHOWN, len(mine) // 2)
    return np.concatenate([mine[:count], mine[len(mine) - count :]])


def sheet(rows: Sequence[Images]) -> Image.Image:
    """Rows of images, each one's first half on the left and its second half on the right of a gap."""
    side = rows[0].pixels.shape[-1]
    # Small images by whole factors, so that their pixels stay square; large ones are made smaller.
    shown = side * max(SCALE_TO // side, 1) if side <= SCALE_TO else SCALE_TO
    way = Image.Resampling.NEAREST if side <= SCALE_TO else Image.Resampling.BICUBIC
    cell, gap = shown + 2, shown // 2
    picture = Image.new("RGB", (2 * SHOWN * cell + gap, len(rows) * cell), "white")
    for line, images in enumerate(rows):
        half = len(images) // 2
        for place, pixels in enumerate(images.pixels):
            column, right = (place, 0) if place < half else (2 * SHOWN - len(images) + place, gap)
            tile = Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
            tile = tile.resize((shown, shown), way)
            picture.paste(tile, (column * cell + right, line * cell))
    return picture
