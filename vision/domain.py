"""Image classifiers as a domain: what the verbs of rlexit need to know about images."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from rlexit import checkpoint
from rlexit.config import Method, require
from rlexit.costs import cost_table
from rlexit.domain import Act, Batches, Played, Split, Watch
from rlexit.ensembles import Ensemble, ensembles
from rlexit.exit_policy import ExitPolicy, first_exit, threshold_rows
from rlexit.network import StagedNetwork
from rlexit.runtime import replay, run
from vision import train
from vision.batches import Stream, variation
from vision.config import BackboneConfig, NetworkConfig, VisionConfig
from vision.data import DataSet
from vision.decoding import Images
from vision.dissect import Owner, dissect
from vision.gating import gating_of, learn_gates, refine
from vision.importers import TIMM, given_weights
from vision.network import Classifier, Gating, classifier, load_weights, weights
from vision.reference_ops import reference_ops

# Settings of the data set that a teacher is bound to; where it lies is not among them, what is in it is.
BOUND = ("kind", "side", "holdout", "half", "long_tail", "relabel")
FULL = "full"
# Thresholds from held-out images spend a little more or less on others.
RIVAL_SHARE = 0.98


class VisionDomain:
    """One data set and backbone with their config; implements `rlexit.domain.Domain`."""

    metric = "accuracy"
    device = "cpu"

    def __init__(self, config: VisionConfig) -> None:
        self.config = config
        self.data = DataSet(config.data)
        depth = config.backbone.depth or ""
        self.task = f"{config.data.relabel or config.data.kind}-{config.backbone.name}{depth}"

    @cached_property
    def _protocol(self) -> dict[str, Any]:
        held_out = self.config.data.holdout
        return {
            "data": self.config.data.relabel or self.config.data.kind,
            "test_images": len(self.data.evaluated("test")),
            "test_sha256": self.data.fingerprint,
            "classes": len(self.data.classes),
            "side": self.data.side,
            "long_tail": self.config.data.long_tail,
            "backbone": asdict(self.config.backbone),
            "thresholds_from": f"{held_out:g} of the training images"
            if held_out
            else "the other half of the test images",
            **({} if held_out else {"half": self.config.data.half}),
            "torch": torch.__version__,
        }

    def protocol(self) -> dict[str, Any]:
        """The protocol block of every row."""
        return self._protocol

    def _classifier(
        self,
        backbone: BackboneConfig | None = None,
        network: NetworkConfig | None = None,
        cascade: bool = False,
        ensemble: type[Ensemble] | None = None,
        gating: Gating | None = None,
    ) -> Classifier:
        sizes = len(self.data.classes), self.data.side, self.data.normalisation
        config = backbone or self.config.backbone
        return classifier(config, *sizes, network, self.config.head, cascade, ensemble, gating)

    def _of_method(self, method: Method) -> Classifier:
        """Freshly initialised, with the method's exits and gates."""
        exits = self.config.network if method.exits else None
        return self._classifier(None, exits, method.cascade, ensembles[method.ensemble], gating_of(self.config, method))

    def _facts(self) -> dict[str, Any]:
        data = asdict(self.config.data)
        return {
            "backbone": asdict(self.config.backbone),
            "data": {name: data[name] for name in BOUND},
            "classes": list(self.data.classes),
            "test_sha256": self.data.fingerprint,
        }

    def train(self, folder: Path, seed: int, watch: Watch) -> None:
        """Trains the backbone by SGD, or takes the given weights."""
        if self.config.teacher != "train":
            self._adopt(self.config.teacher, folder)
            return
        settings = self.config.train
        torch.manual_seed(seed)
        stream = Stream(self.data.train, self.config.data, settings.batch_size, seed, least=2)
        held_out = self.data.evaluated("calibration")
        network = self._classifier().to(self.device)
        train.train(folder, network, stream, held_out, settings, seed, self._facts(), watch)

    def accept(self, folder: Path) -> None:
        """Refuses a teacher of another backbone, of other classes, of another split or of other test images."""
        tensors, facts = checkpoint.load(folder, train.TEACHER)
        ours = self._facts()
        for section in ("backbone", "data"):
            theirs = dict(facts.get(section) or {})
            for name, value in ours[section].items():
                if theirs.get(name) != value:
                    raise checkpoint.CheckpointError(
                        f"`{folder}` holds a teacher whose {section}.{name} is {theirs.get(name)!r}, the config says "
                        f"{value!r}. Use the config that it was made with, or another --out."
                    )
        if facts.get("classes") != ours["classes"]:
            raise checkpoint.CheckpointError(
                f"`{folder}` holds a teacher of {len(facts.get('classes') or ())} other classes than the "
                f"{len(ours['classes'])} of `data.path`. Use the data that it was trained on, or another --out."
            )
        # Teachers made before this was kept say nothing of it.
        if facts.get("test_sha256", ours["test_sha256"]) != ours["test_sha256"]:
            raise checkpoint.CheckpointError(
                f"`{folder}` holds a teacher made beside test images with the hash {facts['test_sha256']}, those of "
                f"`data.path` have {ours['test_sha256']}. Use the data that it was made with, or another --out."
            )
        load_weights(self._classifier(), tensors, f"`{folder}`")

    def network(self, teacher: Path, method: Method) -> StagedNetwork:
        """The frozen classifier with fresh early heads; its own exit takes part in the ensemble."""
        network = self._of_method(method)
        load_weights(network, checkpoint.load(teacher, train.TEACHER)[0], f"`{teacher}`")
        return network.eval()

    def static_networks(self, teacher: Path) -> dict[str, StagedNetwork]:
        """The same backbone with fewer channels."""
        return self._static_networks()

    def _static_networks(self) -> dict[str, StagedNetwork]:
        own = self.config.backbone
        widths = self.config.distill.static_widths
        return {f"width {width:g}": self._classifier(replace(own, width=width * own.width)) for width in widths}

    def plain_networks(self, teacher: Path) -> dict[str, StagedNetwork]:
        """The teacher without early exits, and rivals of other depths."""
        network = self._classifier()
        load_weights(network, checkpoint.load(teacher, train.TEACHER)[0], f"`{teacher}`")
        return {FULL: network.eval(), **self._rivals()}

    def _rivals(self) -> dict[str, StagedNetwork]:
        found: dict[str, StagedNetwork] = {}
        for name, (depth, path) in self._given.items():
            network = self._classifier(replace(self.config.backbone, depth=int(depth)))
            load_weights(network, *given_weights(path))
            found[name] = network.eval()
        return found

    @property
    def _given(self) -> dict[str, tuple[str, str]]:
        """Name of every rival to its depth and where its weights are."""
        pairs = (rival.partition("=")[::2] for rival in self.config.rivals)
        return {f"given depth {depth}": (depth, path) for depth, path in pairs}

    @cached_property
    def _hashes(self) -> dict[str, str]:
        return {name: checkpoint.sha256(save(given_weights(path)[0])) for name, (_, path) in self._given.items()}

    def given(self) -> dict[str, str]:
        """Names of the rivals, and the hashes of their weights."""
        return self._hashes

    def dissect(
        self,
        networks: Mapping[str, StagedNetwork],
        method: str,
        run_seed: int,
        full_macs: int,
        folder: Path,
        watch: Watch,
    ) -> None:
        """Every exit on all test images, compute budgets, classes, easy and hard images; see `vision.dissect`."""
        ops = reference_ops(self._classifier().eval(), self.example()).full
        owner = Owner(self.task, method, run_seed, full_macs, ops)
        rivals = [*self._rivals().values()]
        if "static" in self.config.methods:
            rivals += self._static_networks().values()
        # A little below what rivals cost is a budget too, so that exits are asked what they reach with no more.
        costs = (cost_table(rival, self.example()).full / full_macs for rival in rivals)
        shares = {*self.config.evaluate.budgets, *(math.floor(RIVAL_SHARE * share * 1e4) / 1e4 for share in costs)}
        config = replace(self.config.evaluate, budgets=tuple(sorted(shares)))
        dissect(owner, networks, self.data, config, folder, watch)

    def example(self) -> Tensor:
        """(1, 3, H, W) uint8."""
        return torch.zeros((1, 3, self.data.side, self.data.side), dtype=torch.uint8)

    def blank(self, method: Method) -> StagedNetwork:
        """The network with exits, untrained; for counting. What of the config cannot work is told here."""
        variation(self.config.data, self.data.side)
        if method.gates:
            require(self.device == "cpu", "--device", "be cpu for methods with gates", self.device, "Leave it out.")
        self._rivals()
        return self._of_method(method).eval()

    def adopt(self, path: Path, folder: Path) -> None:
        """Makes given weights the teacher."""
        self._adopt(str(path), folder)

    def _adopt(self, source: str, folder: Path) -> None:
        network = self._classifier()
        load_weights(network, *given_weights(source))
        name = source if source.startswith(TIMM) else Path(source).name
        checkpoint.save(folder, train.TEACHER, weights(network), {**self._facts(), "source": name})

    def samples(self, seed: int, first: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Buffers of training images, shuffled and varied, with their labels."""
        settings = self.config.collect
        stream = Stream(self.data.train, self.config.data, settings.batch, seed)
        index = first * settings.batches
        while True:
            yield [stream[index + place] for place in range(settings.batches)]
            index += settings.batches

    def learn_gates(
        self, network: StagedNetwork, teacher: Path, method: Method, folder: Path, seed: int, watch: Watch
    ) -> dict[str, float]:
        """Gates and trunk learn together on the training images; see `vision.gating`."""
        return learn_gates(self, network, teacher, method, folder, seed, watch)

    def refine(
        self, network: StagedNetwork, teacher: Path, method: Method, folder: Path, seed: int, watch: Watch
    ) -> dict[str, float]:
        """Gates are refined by reinforcement learning on the training images; see `vision.gating`."""
        return refine(self, network, teacher, method, folder, seed, watch)

    def batches(self, seed: int) -> Batches:
        """The same as what `act` is called with."""

        def collect(act: Act, first: int) -> Iterator[int]:
            for buffer in self.samples(seed, first):
                for images, labels in buffer:
                    act(images, labels)
                yield sum(len(labels) for _, labels in buffer)

        return collect

    def rows(self, network: StagedNetwork, policy: ExitPolicy, count: int, watch: Watch) -> Tensor:
        """(N, 3, H, W) uint8, at most `count` images of the calibration split; whatever the exits, the same ones."""
        pixels = self.data.evaluated("calibration").pixels
        chosen = np.linspace(0, len(pixels) - 1, min(count, len(pixels))).astype(np.int64)
        return pixels[torch.from_numpy(chosen)]

    def folds(self, split: Split) -> list[Images]:
        """The images of a split dealt into as many episodes as the config asks for, sizes differing by one at most.

        Raises:
            ValueError: there are fewer images than episodes.
        """
        config, images = self.config, self.data.evaluated(split)
        section = "evaluate" if split == "test" else "calibrate"
        count = getattr(config, section).episodes
        if len(images) < count:
            raise ValueError(f"`{section}.episodes` must be at most the {len(images)} {split} images, got {count}.")
        return [images.take(np.arange(episode, len(images), count)) for episode in range(count)]

    def play(
        self,
        network: StagedNetwork | None,
        policies: Sequence[ExitPolicy],
        jobs: Sequence[tuple[int, int]],
        split: Split,
        record: int,
        watch: Watch,
    ) -> Iterator[Played]:
        """Classifies folds of a split under exit policies of one rule; without a network, by guessing."""
        folds = self.folds(split)
        there: StagedNetwork | None = None
        replayed: dict[int, _Replayed] = {}
        for number, (policy, episode) in enumerate(jobs):
            if watch.stop():
                return
            images = folds[episode]
            if network is None:
                guesses = np.random.default_rng([episode, len(images)]).integers(
                    len(self.data.classes), size=len(images)
                )
                value = float((guesses == images.labels.numpy()).mean())
                yield Played(policy, episode, episode, value, len(images), 0, np.array([len(images)]))
            elif self.config.evaluate.execution == "real":
                # A copy: what else is asked of the network is asked on the CPU.
                there = there or (network if self.device == "cpu" else copy.deepcopy(network).to(self.device))
                yield self._classified(there, policies[policy], images, policy, episode)
            else:
                if episode not in replayed:
                    # Jobs come episode by episode: the last one is enough to remember.
                    rule, batch = policies[policy].rule, self.config.evaluate.n_envs
                    replayed = {episode: _Replayed(network, rule, images, batch)}
                yield replayed[episode].played(policies[policy], policy, episode)
            watch.progress(number + 1, len(jobs), {})

    def _classified(
        self, network: StagedNetwork, policy: ExitPolicy, images: Images, index: int, episode: int
    ) -> Played:
        right = macs = 0
        exits = np.zeros(network.exits, dtype=np.int64)
        batch = self.config.evaluate.n_envs
        for pixels, labels in zip(images.pixels.split(batch), images.labels.split(batch), strict=True):
            result = run(network, policy, pixels.to(self.device))
            right += int((result.answers.argmax(dim=1).cpu() == labels).sum())
            macs += int(result.macs.sum())
            exits += np.bincount(result.exits.cpu().numpy(), minlength=network.exits)
        return Played(index, episode, episode, right / len(images), len(images), macs, exits)


class _Replayed:
    """All exits of some images, computed once for every exit policy of a rule."""

    @torch.no_grad()
    def __init__(self, network: StagedNetwork, rule: str, images: Images, batch: int) -> None:
        # Never reached, and not inf: a leave gate is asked only where an exit is open.
        closed = ExitPolicy(rule, (float(np.finfo(np.float32).max),) * (network.exits - 1))
        parts = images.pixels.split(batch)
        results = [replay(network, closed, part) for part in parts]
        self.scores = torch.cat([result.scores[:, :-1] for result in results])
        self.macs = int(torch.cat([result.macs for result in results]).sum())
        chosen = torch.cat([network(part).answers.argmax(dim=-1) for part in parts])
        self.right = chosen == images.labels[:, None]

    def played(self, policy: ExitPolicy, index: int, episode: int) -> Played:
        """Where everybody would have left, and who was right there."""
        rows, exits = self.right.shape
        left = first_exit(self.scores > threshold_rows([policy], exits))
        right = float(self.right[torch.arange(rows), left].double().mean())
        counts = np.bincount(left.numpy(), minlength=exits)
        return Played(index, episode, episode, right, rows, self.macs, counts)


def domain(config: VisionConfig) -> VisionDomain:
    """The domain of a config; what the command line asks for."""
    return VisionDomain(config)
