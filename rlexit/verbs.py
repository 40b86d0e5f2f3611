"""The verbs as functions: each reads earlier artefacts of a run, makes one, and names the verb of a missing one."""

from __future__ import annotations

import dataclasses
import operator
import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rlexit import boards, checkpoint, summary
from rlexit import calibrate as calibration
from rlexit.config import METHODS
from rlexit.costs import cost_table, parameters
from rlexit.domain import Dissecting, Filming, Refining, Watch
from rlexit.evaluate import Subject, budgeted, evaluate, exit_costs, latencies, method_name
from rlexit.exit_policy import ExitPolicy
from rlexit.interrupts import Stopped
from rlexit.lessons import distill as distill
from rlexit.network import StagedNetwork
from rlexit.rows import append_rows, read_latency, read_rows, write_rows
from rlexit.runlog import Board
from rlexit.session import (
    EXIT_POLICIES,
    POLICY,
    TEACHER,
    Session,
    calibrated_policy,
    learnt,
    load_network,
    made,
    networks_of,
    plain_teacher,
    policies_of,
    weights_hash,
)

CALIBRATION_ROWS = 4000


def train(session: Session) -> None:
    """Makes the teacher."""
    stage = session.stage("train")
    if not session.begin(stage):
        session.console.print(f"train      done already  {session.teacher}")
        return
    with session.watch("train", "steps") as watch:
        session.domain.train(session.teacher, session.seed, watch)
    stage.finish({"teacher": weights_hash(session.teacher, TEACHER)})


def refine(session: Session, method: str) -> None:
    """Refines the decisions of one method by reinforcement learning, from the distilled weights that it starts from.

    Raises:
        CheckpointError: those weights are missing.
        ValueError: the method is not refined, or the domain cannot refine.
    """
    kind, domain = METHODS[method], session.domain
    if not kind.refines:
        known = ", ".join(name for name, one in METHODS.items() if one.refines)
        raise ValueError(f"`--methods` must be of {known} to refine, got {method}.")
    if not isinstance(domain, Refining):
        raise ValueError(f"`refine` must be of a domain that can, got {domain.task}. Distill instead.")
    source = load_network(session, kind.refines)[""]
    stage = session.stage("refine", method)
    folder = session.method(method)
    torch.manual_seed(session.seed)
    network = networks_of(session, method)[""]
    network.load_state_dict(source.state_dict(), strict=False)
    if not session.begin(stage):
        session.console.print(f"refine     done already  {folder}")
        return
    with session.watch(f"refine {method}", "samples") as watch:
        facts = domain.refine(network, session.teacher, kind, folder, session.seed, watch)
    tensors = {f"/{key}": value for key, value in learnt(session, network, method).items()}
    checkpoint.save(folder, POLICY, tensors, {"method": method, "seed": session.seed, "curves": facts})
    stage.finish(facts)


def calibrate(session: Session, method: str) -> list[ExitPolicy]:
    """Chooses thresholds for the config's targets on calibration episodes; networks without early exits have none.

    Raises:
        TargetError: a compute target is below the cheapest exit.
    """
    folder = session.method(method)
    if METHODS[method].static or not METHODS[method].exits:
        return []
    network = load_network(session, method)[""]
    stage = session.stage("calibrate", method)
    settings = session.domain.config.calibrate
    costs = cost_table(network, session.domain.example())
    # Before the stage is opened: a target that cannot be met must not stand in the way of the next one.
    # What may be repeated costs less than held-out rows tell: they have no step before. Its target is refinement's.
    refined, repeats = calibration.refined_policy(network), network.reuse is not None
    targets = () if repeats else settings.target_macs
    for target in () if network.gates else targets:  # what rows that skip units cost is known when they were run
        calibration.check_target(costs, target)
    if not session.begin(stage):
        session.console.print(f"calibrate  done already  {folder}")
        return policies_of(session.calibrated(method) or [])
    found: list[ExitPolicy] = [] if refined is None else [refined]
    missed: list[str] = []

    def rows(policy: ExitPolicy) -> torch.Tensor:
        with session.watch("calibrate", "games") as watch:
            return session.domain.rows(network, policy, CALIBRATION_ROWS, watch)

    def score(inputs: torch.Tensor) -> calibration.Scores:
        return calibration.score_rows(network, settings.rule, inputs, costs)

    for target in targets:
        policy = calibration.calibrate_macs(rows, score, network.exits, target, settings.rounds)
        found.append(policy)
        if (cost := policy.provenance["relative_macs"]) > target:
            session.console.print(
                f"calibrate  target_macs={target:g}: its own games cost {cost:.3f}, the nearest found in "
                f"{settings.rounds} rounds. Ask for more `calibrate.rounds`."
            )
    if settings.max_return_drop and not repeats:
        candidates, teacher, floor = _candidates(session, method, network, score(rows(ExitPolicy.full(network.exits))))
        for drop in settings.max_return_drop:
            policy_or_none = calibration.calibrate_loss(candidates, teacher, floor, drop, settings.confidence)
            if policy_or_none is None:
                missed.append(
                    f"max_return_drop={drop:g} is not certifiable with {settings.episodes} episodes at less than full "
                    "compute. Ask for more `calibrate.episodes` or a larger drop, with --force."
                )
            else:
                found.append(policy_or_none)
    for line in missed:
        session.console.print(f"calibrate  {line}")
    held_out = rows(ExitPolicy.full(network.exits))
    bins = calibration.reliability(network, held_out)
    write_rows(folder / "calibration" / "reliability.csv", bins)
    confidences = calibration.score_rows(network, "confidence", held_out, costs)
    boards.show_calibration(folder / "calibration", found, confidences, bins)
    facts = {"rows": len(held_out), **{name: stage.settings[name] for name in ("policy", "calibrate", "evaluate")}}
    facts["protocol"] = session.domain.protocol()
    policies = [policy.to_json() for policy in found]
    checkpoint.save(folder, EXIT_POLICIES, {}, {"policies": policies, "missed": missed, **facts})
    stage.finish({"missed": missed})
    return found


def _candidates(
    session: Session, method: str, network: StagedNetwork, scores: calibration.Scores
) -> tuple[list[calibration.Candidate], list[float], float]:
    """Plays a grid of thresholds, the teacher and a random actor on certification episodes."""
    settings = session.domain.config.calibrate
    full = scores.costs.full
    # Not the method's own network: its ensemble may have a say in the last exit too.
    whole = plain_teacher(session)
    grid = calibration.threshold_grid(scores, settings.candidates)
    tried = (calibration.shared_policy(settings.rule, threshold, network.exits) for threshold in grid)
    # Rows are told apart by labels, which have six digits.
    policies = list({policy.label: policy for policy in tried}.values())
    # What is played of the teacher and at random does not depend on the method: once is enough for all of them.
    shared = session.teacher / "certification" / session.domain.config.evaluate.actions
    played: dict[str, list[Any]] = {}
    subjects = [
        (Subject(method, session.seed, network, policies, full), session.method(method) / "calibration"),
        (Subject("teacher", 0, whole, [ExitPolicy.full(whole.exits)], full), shared),
    ]
    if session.domain.metric == "score":  # an accuracy has its floor at 0, not at chance
        subjects.append((Subject("random", 0, None, [ExitPolicy.full(2)], full), shared))
    for subject, folder in subjects:
        with session.watch("certify", "episodes") as watch:
            path = folder / f"{subject.method}.csv"
            rows = evaluate(session.domain, subject, settings.episodes, "certification", path, None, watch)
            played[subject.method] = [row for row in rows if row.episode < settings.episodes]
    candidates = []
    for policy in policies:
        mine = [row for row in played[method] if row.label == policy.label]
        # From where the decisions left, not from what was executed: a replay computes every exit.
        costs = [sum(map(operator.mul, row.exit_fractions, scores.costs.exits)) for row in mine]
        macs = sum(costs) / len(costs) / full
        candidates.append(calibration.Candidate(policy, [row.value for row in mine], macs))
    teacher = [row.value for row in played["teacher"]]
    random = [row.value for row in played.get("random", ())]
    return candidates, teacher, sum(random) / len(random) if random else 0.0


def evaluate_teacher(session: Session) -> None:
    """Plays the teacher and a random actor on the test episodes."""
    session.domain.accept(made(session.teacher, TEACHER, "train"))
    stage = session.stage("evaluate")
    if not session.begin(stage):
        return
    network = plain_teacher(session)
    full = cost_table(network, session.domain.example()).full
    whole = ExitPolicy.full(network.exits)
    subject = Subject("teacher", 0, network, [whole], full)
    blind = Subject("random", 0, None, [replace(whole, label="random")], full)
    episodes = session.domain.config.evaluate.episodes
    folder = session.teacher / "eval"
    for player in (subject, blind):
        with session.watch(player.method, "episodes") as watch:
            evaluate(session.domain, player, episodes, "test", folder / "episodes.csv", None, watch)
    _measure_latency(session, subject, folder)
    if isinstance(session.domain, Dissecting):
        plain = session.domain.plain_networks(session.teacher)
        teachers = {name: one for name, one in plain.items() if name == whole.label}
        rivals = {name: one for name, one in plain.items() if name != whole.label}
        for method, networks in (("teacher", teachers), ("static", rivals)):
            with session.watch(f"look at {method}", "rows") as watch:
                session.domain.dissect(networks, method, 0, full, folder, watch)
        for name, one in rivals.items():
            rival = Subject("static", 0, one, [replace(ExitPolicy.full(1), label=name)], full)
            with session.watch(name, "episodes") as watch:
                evaluate(session.domain, rival, episodes, "test", folder / "episodes.csv", None, watch)
            _measure_latency(session, rival, folder)
    _show(session, folder, 0)
    stage.finish({"episodes": episodes})


def evaluate_method(session: Session, method: str) -> None:
    """Plays a grid of thresholds, every exit alone and the calibrated exit policies on the test episodes."""
    networks = load_network(session, method)
    calibrated = _calibrated(session, method)
    bounded = [] if METHODS[method].static else budgeted(session.domain, networks[""])
    stage = session.stage("evaluate", method)
    folder = session.method(method)
    if not session.begin(stage):
        session.console.print(f"evaluate   done already  {folder}")
        return
    teacher = plain_teacher(session)
    full = cost_table(teacher, session.domain.example()).full
    settings = session.domain.config.evaluate
    path = folder / "eval" / "episodes.csv"
    for name, network in networks.items():
        policies = (
            [replace(ExitPolicy.full(1), label=name)]
            if name
            else _operating_points(session, method, network, [*calibrated, *bounded])
        )
        subject = Subject(method, session.seed, network, policies, full)
        if not name:
            _print_costs(session, network)
        with session.watch(f"evaluate {method}", "episodes") as watch:
            evaluate(session.domain, subject, settings.episodes, "test", path, folder / "eval", watch)
        _measure_latency(session, subject, folder / "eval")
    if isinstance(session.domain, Dissecting):
        with session.watch(f"look at {method}", "rows") as watch:
            session.domain.dissect(networks, method, session.seed, full, folder / "eval", watch)
    _show(session, folder / "eval", session.domain.config.distill.steps)
    stage.finish({"episodes": settings.episodes})


def _calibrated(session: Session, method: str) -> list[ExitPolicy]:
    """What was calibrated for the present weights, whatever for; or what the config asks for, if nothing was."""
    known = session.calibrated(method)
    if METHODS[method].static or not METHODS[method].exits or known is None:
        return calibrate(session, method)
    return policies_of(known)


def _operating_points(
    session: Session, method: str, network: StagedNetwork, calibrated: Sequence[ExitPolicy]
) -> list[ExitPolicy]:
    """The grid of every rule from calibration rows, each exit alone, and the calibrated policies; labels are unique."""
    settings = session.domain.config.evaluate
    if network.exits == 1:
        return [replace(ExitPolicy.full(1), label="gates")]
    costs = cost_table(network, session.domain.example())
    policies = list(calibrated)
    if settings.grid:
        if not isinstance(session.domain, Dissecting):  # which asks every exit about all rows at once
            policies += [ExitPolicy.always(exit, network.exits) for exit in range(network.exits - 1)]
        with session.watch("evaluate", "games") as watch:
            inputs = session.domain.rows(network, ExitPolicy.full(network.exits), CALIBRATION_ROWS, watch)
        for rule in calibration.rules_for(network, settings.rules):
            scores = calibration.score_rows(network, rule, inputs, costs)
            grid = calibration.threshold_grid(scores, settings.grid)
            policies += [calibration.shared_policy(rule, threshold, network.exits) for threshold in grid]
    # A grid may end in what is there already, such as everybody leaving at the first exit.
    unique = {(one.rule, one.thresholds, one.provenance.get("target")): one for one in reversed(policies)}
    # A label has six digits: of thresholds that differ behind them, one is enough.
    named = {(method_name(method, one.rule), one.label): one for one in unique.values()}
    return list(named.values())[::-1]


def _show(session: Session, folder: Path, samples: int) -> None:
    """Puts the operating points in `folder` on TensorBoard."""
    episodes, latency = folder / "episodes.csv", folder / "latency.csv"
    if not episodes.exists():  # a grid of 0 and no target: nothing was played
        return
    shown = summary.points(read_rows(episodes), read_latency(latency) if latency.exists() else ())
    boards.show_points(folder / "boards", shown, dataclasses.asdict(session.domain.config), samples)


def _measure_latency(session: Session, subject: Subject, folder: Path) -> None:
    count = session.domain.config.evaluate.latency_rows
    if not count or subject.network is None:
        return
    network, path = subject.network, folder / "latency.csv"
    known = {(row.method, row.label, row.batch) for row in read_latency(path)} if path.exists() else set()
    # Single decisions are timed last, so a point that has them is complete.
    missing = [one for one in subject.policies if (method_name(subject.method, one.rule), one.label, 1) not in known]
    if not missing:
        return
    inputs = session.domain.rows(network, ExitPolicy.full(network.exits), CALIBRATION_ROWS, Watch(session.stop))
    batches = session.domain.config.evaluate.latency_batches
    for row in latencies(session.domain, replace(subject, policies=missing), inputs, count, batches):
        if (row.method, row.label, row.batch) not in known:
            append_rows(path, [row])
        if session.stop():
            raise Stopped


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
        ValueError: the domain has nothing to film.
    """
    if not isinstance(session.domain, Filming):
        raise ValueError(f"`video` must be of episodes, got {session.domain.task}, which has none. Use the report.")
    folder = session.method(method)
    policy = calibrated_policy(session, method, label)
    network = load_network(session, method)[""]
    webp, gif = session.domain.film(network, policy, episode, steps, folder / "video" / f"ep{episode}")
    data = gif.read_bytes()
    width, height = struct.unpack("<HH", data[6:10])
    with Board(folder / "video" / f"ep{episode}") as board:
        board.animation("eval/episode", data, height, width, episode)
    return webp


def _print_costs(session: Session, network: StagedNetwork) -> None:
    costs = cost_table(network, session.domain.example())
    cells = [f"{name} {macs / 1e6:.2f} M ({relative:.3f})" for name, macs, relative in exit_costs(network, costs)]
    session.console.print(
        f"cost       full {costs.full / 1e6:.2f} M MACs, {parameters(network):,} parameters; exits: {', '.join(cells)}"
    )
