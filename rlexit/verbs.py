"""The verbs as functions: each reads earlier artefacts of a run, makes one, and names the verb of a missing one."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from rlexit import calibrate as calibration
from rlexit import checkpoint
from rlexit.config import METHODS
from rlexit.costs import cost_table, parameters
from rlexit.distill import Distiller, ExitStudent, StaticStudent
from rlexit.domain import Domain, Watch
from rlexit.ensembles import ensembles
from rlexit.evaluate import Subject, evaluate, exit_costs, latencies, method_name
from rlexit.exit_policy import ExitPolicy
from rlexit.interrupts import StopFlag, Stopped
from rlexit.network import StagedNetwork
from rlexit.progress import Meter
from rlexit.registry import unknown
from rlexit.rows import append_rows, read_latency
from rlexit.runfolder import Stage
from rlexit.runlog import RunLog
from rlexit.settings import CONFIG, to_yaml

TEACHER = "teacher"
POLICY = "policy"
EXIT_POLICIES = "exit_policies"
CALIBRATION_ROWS = 4000


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
    """

    domain: Domain
    root: Path
    seed: int
    console: Console
    stop: StopFlag
    force: bool = False

    @property
    def teacher(self) -> Path:
        """Folder of the teacher; shared by all methods and seeds of the run."""
        return self.root / "teacher"

    def method(self, method: str) -> Path:
        """Folder of one method and seed."""
        return self.root / method / f"s{self.seed}"

    def settings(self, *sections: str) -> dict[str, Any]:
        """Some sections of the config as JSON values."""
        config = dataclasses.asdict(self.domain.config)
        return {name: _jsonable(config[name]) for name in sections if name in config}

    def stage(self, name: str, method: str = "") -> Stage:
        """A stage with everything that its result depends on."""
        config = _jsonable(dataclasses.asdict(self.domain.config))
        if name == "train":
            settings = self.settings("domain", "env", "data", "teacher", "train")
            return Stage(self.teacher, name, settings, config, ("state*", "teacher*", "scalars.csv", "tb"))
        upstream = {"teacher": _weights_hash(self.teacher, TEACHER)}
        if name == "evaluate" and not method:
            return Stage(self.teacher, name, {**upstream, **self.settings("evaluate")}, config, ("eval",))
        settings = {"method": method, "seed": self.seed, **upstream}
        if name == "distill":
            sections = self.settings("network", "head", "collect", "distill")
            return Stage(
                self.method(method), name, {**settings, **sections}, config, ("state*", "policy*", "scalars.csv", "tb")
            )
        settings["policy"] = _weights_hash(self.method(method), POLICY)
        if name == "calibrate":
            settings |= self.settings("calibrate")
            # Calibration episodes are played as test episodes are.
            settings["evaluate"] = {name: config["evaluate"][name] for name in ("actions", "execution", "n_envs")}
            return Stage(self.method(method), name, settings, config, ("exit_policies*", "calibration"))
        settings["calibrated"] = self.settings("calibrate")
        return Stage(self.method(method), name, {**settings, **self.settings("evaluate")}, config, ("eval",))

    def begin(self, stage: Stage) -> bool:
        """Opens a stage for work, and keeps the config that it is made with as the run's own; False if it is done."""
        if not stage.begin(self.force):
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


def train(session: Session) -> None:
    """Makes the teacher."""
    stage = session.stage("train")
    if not session.begin(stage):
        session.console.print(f"train      done already  {session.teacher}")
        return
    with session.watch("train", "steps") as watch:
        session.domain.train(session.teacher, session.seed, watch)
    stage.finish({"teacher": _weights_hash(session.teacher, TEACHER)})


def distill(session: Session, method: str) -> None:
    """Trains the exits of one method on the frozen teacher, or the small static networks."""
    session.domain.accept(_made(session.teacher, TEACHER, "train"))
    stage = session.stage("distill", method)
    folder = session.method(method)
    if not session.begin(stage):
        session.console.print(f"distill    done already  {folder}")
        return
    torch.manual_seed(session.seed)
    networks = _networks(session, method)
    if METHODS[method].static:
        teacher = session.domain.network(session.teacher, False, "none")
        none = ensembles["none"](len(networks), teacher.outputs)
        student: Any = StaticStudent(list(networks.values()), teacher, none)
    else:
        student = ExitStudent(networks[""])
    config = session.domain.config.distill
    if METHODS[method].static:
        config = replace(config, learning_rate=config.static_learning_rate, decay_at=config.static_decay_at)
    with session.watch(f"distill {method}", "samples") as watch:
        batches = session.domain.batches(session.seed)
        facts = Distiller(student, batches, config, folder, session.seed, watch.stop, watch.progress).run()
    tensors = {
        f"{name}/{key}": value for name, network in networks.items() for key, value in _learnt(network, method).items()
    }
    checkpoint.save(folder, POLICY, tensors, {"method": method, "seed": session.seed, "curves": facts})
    stage.finish(facts)


def calibrate(session: Session, method: str) -> list[ExitPolicy]:
    """Chooses thresholds for the config's targets on calibration episodes; static networks have none.

    Raises:
        TargetError: a compute target is below the cheapest exit.
    """
    folder = session.method(method)
    if METHODS[method].static:
        return []
    network = load_network(session, method)[""]
    stage = session.stage("calibrate", method)
    settings = session.domain.config.calibrate
    costs = cost_table(network, session.domain.example())
    # Before the stage is opened: a target that cannot be met must not stand in the way of the next one.
    for target in settings.target_macs:
        calibration.check_target(costs, target)
    if not session.begin(stage):
        session.console.print(f"calibrate  done already  {folder}")
        return _policies(stage.result()["policies"])
    found: list[ExitPolicy] = []
    missed: list[str] = []

    def rows(policy: ExitPolicy) -> torch.Tensor:
        with session.watch("calibrate", "rows") as watch:
            return session.domain.rows(network, policy, CALIBRATION_ROWS, watch)

    def score(inputs: torch.Tensor) -> calibration.Scores:
        return calibration.score_rows(network, settings.rule, inputs, costs)

    for target in settings.target_macs:
        policy = calibration.calibrate_macs(rows, score, network.exits, target, settings.rounds)
        found.append(policy)
    if settings.max_return_drop:
        candidates, teacher, floor = _candidates(session, method, network, score(rows(ExitPolicy.full(network.exits))))
        for drop in settings.max_return_drop:
            policy_or_none = calibration.calibrate_loss(candidates, teacher, floor, drop, settings.confidence)
            if policy_or_none is None:
                missed.append(
                    f"max_return_drop={drop:g} is not certifiable with {settings.episodes} episodes: even with all heads "
                    "and the full network the interval is too wide. Ask for more `calibrate.episodes` or a larger drop."
                )
            else:
                found.append(policy_or_none)
    for line in missed:
        session.console.print(f"calibrate  {line}")
    checkpoint.save(folder, EXIT_POLICIES, {}, {"policies": [policy.to_json() for policy in found], "missed": missed})
    stage.finish({"policies": [policy.to_json() for policy in found], "missed": missed})
    return found


def _candidates(
    session: Session, method: str, network: StagedNetwork, scores: calibration.Scores
) -> tuple[list[calibration.Candidate], list[float], float]:
    """Plays a grid of thresholds, the teacher and a random actor on calibration episodes."""
    settings = session.domain.config.calibrate
    full = scores.costs.full
    grid = calibration.threshold_grid(scores, settings.candidates)
    policies = [calibration.shared_policy(settings.rule, threshold, network.exits) for threshold in grid]
    folder = session.method(method) / "calibration"
    played: dict[str, list[Any]] = {}
    for name, subject in (
        ("candidates", Subject(method, session.seed, network, policies, full)),
        ("teacher", Subject("teacher", session.seed, network, [ExitPolicy.full(network.exits)], full)),
        ("random", Subject("random", session.seed, None, [ExitPolicy.full(2)], full)),
    ):
        with session.watch("calibrate", "games") as watch:
            path = folder / f"{name}.csv"
            path.unlink(missing_ok=True)
            played[name] = evaluate(session.domain, subject, settings.episodes, "calibration", path, None, watch)
    candidates = []
    for policy in policies:
        mine = [row for row in played["candidates"] if row.label == policy.label]
        macs = sum(row.relative_macs for row in mine) / len(mine)
        candidates.append(calibration.Candidate(policy, [row.value for row in mine], macs))
    teacher = [row.value for row in played["teacher"]]
    random = [row.value for row in played["random"]]
    return candidates, teacher, sum(random) / len(random)


def evaluate_teacher(session: Session) -> None:
    """Plays the teacher and a random actor on the test episodes."""
    session.domain.accept(_made(session.teacher, TEACHER, "train"))
    stage = session.stage("evaluate")
    if not session.begin(stage):
        return
    network = session.domain.network(session.teacher, False, "none")
    full = cost_table(network, session.domain.example()).full
    whole = ExitPolicy.full(network.exits)
    subject = Subject("teacher", 0, network, [whole], full)
    blind = Subject("random", 0, None, [replace(whole, label="random")], full)
    episodes = session.domain.config.evaluate.episodes
    folder = session.teacher / "eval"
    for player in (subject, blind):
        with session.watch(player.method, "games") as watch:
            evaluate(session.domain, player, episodes, "test", folder / "episodes.csv", None, watch)
    _measure_latency(session, subject, folder)
    stage.finish({"episodes": episodes})


def evaluate_method(session: Session, method: str) -> None:
    """Plays a grid of thresholds, every exit alone and the calibrated exit policies on the test episodes."""
    networks = load_network(session, method)
    # Evaluating again with --force is no reason to calibrate again.
    fresh = session.stage("calibrate", method).is_done()
    calibrated = (
        [] if METHODS[method].static else calibrate(replace(session, force=session.force and not fresh), method)
    )
    stage = session.stage("evaluate", method)
    folder = session.method(method)
    if not session.begin(stage):
        session.console.print(f"evaluate   done already  {folder}")
        return
    teacher = session.domain.network(session.teacher, False, "none")
    full = cost_table(teacher, session.domain.example()).full
    settings = session.domain.config.evaluate
    path = folder / "eval" / "episodes.csv"
    for name, network in networks.items():
        policies = (
            [replace(ExitPolicy.full(1), label=name)]
            if name
            else _operating_points(session, method, network, calibrated)
        )
        subject = Subject(method, session.seed, network, policies, full)
        if not name:
            _print_costs(session, network)
        with session.watch(f"evaluate {method}", "games") as watch:
            evaluate(session.domain, subject, settings.episodes, "test", path, folder / "eval", watch)
        _measure_latency(session, subject, folder / "eval")
    stage.finish({"episodes": settings.episodes})


def _operating_points(
    session: Session, method: str, network: StagedNetwork, calibrated: Sequence[ExitPolicy]
) -> list[ExitPolicy]:
    """The grid of every rule from calibration rows, each exit alone, and the calibrated policies; labels are unique."""
    settings = session.domain.config.evaluate
    costs = cost_table(network, session.domain.example())
    policies = list(calibrated)
    if settings.grid:
        with session.watch("evaluate", "rows") as watch:
            inputs = session.domain.rows(network, ExitPolicy.full(network.exits), CALIBRATION_ROWS, watch)
        for rule in settings.rules:
            scores = calibration.score_rows(network, rule, inputs, costs)
            grid = calibration.threshold_grid(scores, settings.grid)
            policies += [calibration.shared_policy(rule, threshold, network.exits) for threshold in grid]
        policies += [ExitPolicy.always(exit, network.exits) for exit in range(network.exits - 1)]
    return list({(method_name(method, policy.rule), policy.label): policy for policy in policies}.values())


def _measure_latency(session: Session, subject: Subject, folder: Path) -> None:
    count = session.domain.config.evaluate.latency_rows
    if not count or subject.network is None:
        return
    network, path = subject.network, folder / "latency.csv"
    known = {(row.method, row.label) for row in read_latency(path)} if path.exists() else set()
    if all((method_name(subject.method, policy.rule), policy.label) in known for policy in subject.policies):
        return
    inputs = session.domain.rows(network, ExitPolicy.full(network.exits), CALIBRATION_ROWS, Watch(session.stop))
    spread = inputs[torch.linspace(0, len(inputs) - 1, min(count, len(inputs))).long()]
    append_rows(
        path, [row for row in latencies(session.domain, subject, spread) if (row.method, row.label) not in known]
    )


def calibrated_policy(session: Session, method: str, label: str | None = None) -> ExitPolicy:
    """A calibrated exit policy by its label, the first by default.

    Raises:
        CheckpointError: no exit policy is calibrated.
        LookupError: none of that label is.
    """
    folder = session.method(method)
    facts = checkpoint.load_facts(_made(folder, EXIT_POLICIES, "calibrate"), EXIT_POLICIES)
    policies = {policy.label: policy for policy in _policies(facts["policies"])}
    if not policies:
        raise checkpoint.CheckpointError(
            f"`{folder}` must hold a calibrated exit policy, got none: no target could be met. "
            "Run `rlexit calibrate` with other targets, such as --target_macs 0.5 --force."
        )
    if label is not None and label not in policies:
        raise unknown("policy", label, policies)
    return policies[label] if label is not None else next(iter(policies.values()))


def video(session: Session, method: str, episode: int, label: str | None, steps: int) -> Path:
    """Films a test episode under a calibrated exit policy, for the folder `video` and for TensorBoard.

    Args:
        session: the run.
        method: with exits.
        episode: index of the test episode.
        label: of the exit policy; None for the first.
        steps: at most so many decisions.
    Returns:
        The path of the WebP; the GIF lies beside it.
    Raises:
        CheckpointError: no exit policy is calibrated.
        LookupError: none of that label is.
    """
    folder = session.method(method)
    policy = calibrated_policy(session, method, label)
    network = load_network(session, method)[""]
    webp, gif = session.domain.film(network, policy, episode, steps, folder / "video" / f"ep{episode}")
    data = gif.read_bytes()
    width, height = struct.unpack("<HH", data[6:10])
    with RunLog(folder / "video") as log:
        log.animation("eval/episode", data, height, width, episode)
    return webp


def load_network(session: Session, method: str) -> dict[str, StagedNetwork]:
    """The distilled networks of a method in evaluation mode: one named "", or the static ones by name."""
    folder = session.method(method)
    tensors, _ = checkpoint.load(_made(folder, POLICY, "distill"), POLICY)
    session.domain.accept(_made(session.teacher, TEACHER, "train"))
    networks = _networks(session, method)
    for name, network in networks.items():
        mine = {key[len(name) + 1 :]: value for key, value in tensors.items() if key.startswith(f"{name}/")}
        wanted = _learnt(network, method)
        if {key: value.shape for key, value in mine.items()} != {key: value.shape for key, value in wanted.items()}:
            raise checkpoint.CheckpointError(
                f"`{folder}` holds exits of another network or method. Use the config that it was made with, or --force."
            )
        network.load_state_dict(mine, strict=False)
        network.eval()
    return networks


def _networks(session: Session, method: str) -> dict[str, StagedNetwork]:
    if METHODS[method].static:
        return session.domain.static_networks(session.teacher)
    kind = METHODS[method]
    return {"": session.domain.network(session.teacher, kind.cascade, kind.ensemble)}


def _learnt(network: StagedNetwork, method: str) -> dict[str, torch.Tensor]:
    """What distillation changes and so saves: early heads and ensemble; static networks whole."""
    state = network.state_dict()
    if METHODS[method].static:
        return dict(state)
    frozen = ("units.", f"heads.{network.exit_names[-1]}.")
    return {key: value for key, value in state.items() if not key.startswith(frozen)}


def _print_costs(session: Session, network: StagedNetwork) -> None:
    costs = cost_table(network, session.domain.example())
    cells = [f"{name} {macs / 1e6:.2f} M ({relative:.3f})" for name, macs, relative in exit_costs(network, costs)]
    session.console.print(
        f"cost       full {costs.full / 1e6:.2f} M MACs, {parameters(network):,} parameters; exits: {', '.join(cells)}"
    )


def _made(folder: Path, name: str, verb: str) -> Path:
    if not checkpoint.exists(folder, name):
        raise checkpoint.CheckpointError(f"`{folder}` must hold `{name}.json`, got none. Run `rlexit {verb}` first.")
    return folder


def _weights_hash(folder: Path, name: str) -> str:
    return checkpoint.weights_hash(folder, name) if checkpoint.exists(folder, name) else ""


def _policies(values: Sequence[dict[str, Any]]) -> list[ExitPolicy]:
    return [ExitPolicy.from_json(value) for value in values]


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _jsonable(inner) for key, inner in value.items()}
    if isinstance(value, (tuple, list)):
        return [_jsonable(inner) for inner in value]
    return value
