"""One run in hand: its folders, stages and settings, and the networks that its folders hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from rlexit import checkpoint
from rlexit.config import METHODS, Method
from rlexit.domain import Dissecting, Domain, Watch
from rlexit.exit_policy import ExitPolicy
from rlexit.interrupts import StopFlag, Stopped
from rlexit.network import StagedNetwork
from rlexit.progress import Meter
from rlexit.registry import unknown
from rlexit.resources import CONFIG
from rlexit.runfolder import Stage, config_hash, hold
from rlexit.settings import to_yaml

TEACHER = "teacher"
POLICY = "policy"
EXIT_POLICIES = "exit_policies"


@dataclass(frozen=True)
class Session:
    """One run: a domain with its config, a folder, a seed, and how to talk to the person.

    Args:
        domain: the task.
        root: `runs/<name>`.
        seed: of this run's training and distillation.
        console: where to print.
        stop: true after a signal.
        force: start stages of another config over.
        methods: those of the config that are worked on.
        first: whether it is the first of several seeds; what all seeds share is started over by the first one only.
        device: that exits are distilled on; torch's name of it.
    """

    domain: Domain
    root: Path
    seed: int
    console: Console
    stop: StopFlag
    force: bool = False
    methods: tuple[str, ...] = ()
    first: bool = True
    device: str = "cpu"

    @property
    def teacher(self) -> Path:
        """Folder of the teacher; shared by all methods and seeds of the run."""
        return self.root / "teacher"

    def method(self, method: str) -> Path:
        """Folder of one method and seed."""
        return self.root / method / f"s{self.seed}"

    def settings(self, *sections: str) -> dict[str, Any]:
        """Some sections of the config as JSON values, without what cannot change a result."""
        config = self.domain.config
        return {name: jsonable(_binding(getattr(config, name))) for name in sections if hasattr(config, name)}

    def stage(self, name: str, method: str = "") -> Stage:
        """A stage with everything that its result depends on."""
        config = jsonable(dataclasses.asdict(self.domain.config))
        if name == "train":
            settings = self.settings("domain", "env", "data", "backbone", "teacher", "train")
            settings |= jsonable(self.domain.config.unusual())
            return Stage(
                self.teacher, name, settings, config, ("state*", "teacher*", "scalars.csv", "tb", "certification")
            )
        upstream = {"teacher": weights_hash(self.teacher, TEACHER)}
        if name == "evaluate" and not method:
            settings = self.settings("env", "data", "evaluate")
            if isinstance(self.domain, Dissecting):
                settings["rivals"] = jsonable(list(self.domain.given().items()))
            return Stage(self.teacher, name, {**upstream, **settings}, config, ("eval",))
        settings = {"method": method, "seed": self.seed, **upstream}
        if name == "distill":
            learns = ("gates", "gating", "refine") if METHODS[method].gates else ("distill",)
            sections = self.settings("env", "data", "network", "head", "collect", *learns)
            if METHODS[method].rates_of:
                settings["source"] = weights_hash(self.method(METHODS[method].rates_of), POLICY)
            return Stage(
                self.method(method),
                name,
                {**settings, **sections},
                config,
                ("state*", "healthy*", "policy*", "scalars.csv", "tb"),
            )
        if name == "refine":
            source = METHODS[method].refines
            settings["source"] = weights_hash(self.method(source), POLICY)
            settings |= self.settings("network", "head", "gates", "collect", "refine", "env", "data")
            return Stage(
                self.method(method), name, settings, config, ("state*", "healthy*", "policy*", "scalars.csv", "tb")
            )
        settings |= self.settings("env", "data")
        settings["policy"] = weights_hash(self.method(method), POLICY)
        if name == "calibrate":
            settings |= self.settings("calibrate")
            # Calibration episodes are played as test episodes are.
            settings["evaluate"] = {name: config["evaluate"][name] for name in ("actions", "execution", "n_envs")}
            return Stage(self.method(method), name, settings, config, ("exit_policies*", "calibration"))
        if not METHODS[method].static:
            settings["exit_policies"] = config_hash(self.calibrated(method) or [])
        if name == "video":
            return Stage(self.method(method), name, settings, config, ("video",))
        settings |= self.settings("evaluate")
        if isinstance(self.domain, Dissecting) and (rivals := self.domain.given()):
            # What exits are asked depends on which ones there are, not on their weights.
            settings["rivals"] = list(rivals)
        return Stage(self.method(method), name, settings, config, ("eval",))

    def calibrated(self, method: str) -> list[dict[str, Any]] | None:
        """The exit policies, as JSON values, that were calibrated for the method's present weights; None if none were."""
        folder = self.method(method)
        if not checkpoint.exists(folder, EXIT_POLICIES):
            return None
        facts = checkpoint.load_facts(folder, EXIT_POLICIES)
        return list(facts["policies"]) if facts.get("policy") == weights_hash(folder, POLICY) else None

    def begin(self, stage: Stage) -> bool:
        """Opens a stage for work, and keeps the config that it is made with as the run's own; False if it is done."""
        hold(self.root)
        if not stage.begin(self.force and (self.first or stage.folder != self.teacher)):
            return False
        checkpoint.write_atomic(self.root / CONFIG, to_yaml(self.domain.config).encode())
        return True

    @contextmanager
    def watch(self, name: str, unit: str = "") -> Iterator[Watch]:
        """A meter on the console, and the stop flag; raises Stopped at its end after a signal."""
        with Meter(name, self.console, unit) as meter:
            yield Watch(self.stop, meter)
        if self.stop():
            raise Stopped


def calibrated_policy(session: Session, method: str, label: str | None = None) -> ExitPolicy:
    """A calibrated exit policy by its label, the first by default.

    Raises:
        CheckpointError: no exit policy is calibrated.
        LookupError: none of that label is.
    """
    folder = session.method(method)
    facts = checkpoint.load_facts(made(folder, EXIT_POLICIES, "calibrate"), EXIT_POLICIES)
    policies = {policy.label: policy for policy in policies_of(facts["policies"])}
    if not policies:
        raise checkpoint.CheckpointError(
            f"`{folder}` must hold a calibrated exit policy, got none: no target could be met. "
            "Run `rlexit calibrate` with other targets, such as --target_macs 0.5 --force."
        )
    if label is not None and label not in policies:
        raise unknown("policy", label, policies)
    return policies[label] if label is not None else next(iter(policies.values()))


def load_network(session: Session, method: str) -> dict[str, StagedNetwork]:
    """The distilled networks of a method in evaluation mode: one named "", or the static ones by name."""
    folder = session.method(method)
    verb = "refine" if METHODS[method].refines else "distill"
    tensors, _ = checkpoint.load(made(folder, POLICY, verb), POLICY)
    session.domain.accept(made(session.teacher, TEACHER, "train"))
    networks = networks_of(session, method)
    for name, network in networks.items():
        mine = {key[len(name) + 1 :]: value for key, value in tensors.items() if key.startswith(f"{name}/")}
        wanted = learnt(session, network, method)
        if {key: value.shape for key, value in mine.items()} != {key: value.shape for key, value in wanted.items()}:
            raise checkpoint.CheckpointError(
                f"`{folder}` holds exits of another network or method. Use the config that it was made with, or --force."
            )
        network.load_state_dict(mine, strict=False)
        network.eval()
    return networks


def networks_of(session: Session, method: str) -> dict[str, StagedNetwork]:
    """Fresh networks of a method: one named "", or the static ones by name."""
    if METHODS[method].static:
        return session.domain.static_networks(session.teacher)
    return {"": session.domain.network(session.teacher, METHODS[method])}


def plain_teacher(session: Session) -> StagedNetwork:
    """The teacher itself: no early exit is ever left, and no gate asked."""
    return session.domain.network(session.teacher, Method())


def learnt(session: Session, network: StagedNetwork, method: str) -> dict[str, torch.Tensor]:
    """What training changes and so saves: early heads and ensemble, or the whole network where more than these learns."""
    state, kind = network.state_dict(), METHODS[method]
    if kind.static or kind.refines or kind.gates or session.domain.config.distill.regime != "disjoint":
        return dict(state)
    frozen = ("units.", f"heads.{network.exit_names[-1]}.")
    return {key: value for key, value in state.items() if not key.startswith(frozen)}


def made(folder: Path, name: str, verb: str) -> Path:
    """The folder, if the checkpoint is there; raises CheckpointError that names the verb which makes it."""
    if not checkpoint.exists(folder, name):
        raise checkpoint.CheckpointError(f"`{folder}` must hold `{name}.json`, got none. Run `rlexit {verb}` first.")
    return folder


def weights_hash(folder: Path, name: str) -> str:
    """SHA-256 of a checkpoint's tensors, or "" if there is none."""
    return checkpoint.weights_hash(folder, name) if checkpoint.exists(folder, name) else ""


def policies_of(values: Sequence[dict[str, Any]]) -> list[ExitPolicy]:
    """Exit policies from their JSON values."""
    return [ExitPolicy.from_json(value) for value in values]


def _binding(value: Any) -> Any:
    """A section as a dict; left out: neutral settings, and later ones (`rlexit.config.later`) that change nothing."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    found = {field: getattr(value, field.name) for field in dataclasses.fields(value)}
    changes = [
        field for field, one in found.items() if "before" not in field.metadata or one != field.metadata["before"]
    ]
    return {field.name: _binding(found[field]) for field in changes if not field.metadata.get("neutral")}


def jsonable(value: Any) -> Any:
    """Tuples as lists, all the way down, so that values equal what JSON gives back."""
    if isinstance(value, dict):
        return {key: jsonable(inner) for key, inner in value.items()}
    if isinstance(value, (tuple, list)):
        return [jsonable(inner) for inner in value]
    return value
