"""The verb distill: which student learns what, alone or side by side with others, and what is kept of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from rlexit import checkpoint
from rlexit.config import METHODS
from rlexit.distill import Distiller
from rlexit.domain import Labelled
from rlexit.ensembles import ensembles
from rlexit.gatestages import learn_gates
from rlexit.network import StagedNetwork
from rlexit.session import POLICY, TEACHER, Session, learnt, made, networks_of, plain_teacher
from rlexit.students import ExitStudent, JointStudent, StaticStudent, Student
from rlexit.together import SharedSamples, train_together


def distill(session: Session, *methods: str) -> None:
    """Trains the exits of methods on the frozen teacher, or gates together with it, or the small static networks.

    Methods whose heads learn from labels on the same frozen backbone are trained side by side, each as if alone.
    """
    session.domain.accept(made(session.teacher, TEACHER, "train"))
    config = session.domain.config.distill
    for method in methods:
        if METHODS[method].gates:
            if session.device != "cpu":
                raise ValueError(
                    f"`--device` must be cpu for methods whose gates learn, got {session.device}: {method}."
                )
            learn_gates(session, method)
    opened = [method for method in methods if not METHODS[method].gates and _opened(session, method)]
    shared: list[str] = []
    if isinstance(session.domain, Labelled) and config.regime == "disjoint":
        shared = [method for method in opened if not METHODS[method].static]
    if len(shared) > 1:
        _distill_shared(session, shared)
    for method in opened:
        if len(shared) < 2 or method not in shared:
            _distill_alone(session, method)


def _opened(session: Session, method: str) -> bool:
    """Whether there is something to do; what cannot be built is told before anything is written."""
    networks_of(session, method)
    if session.begin(session.stage("distill", method)):
        return True
    session.console.print(f"distill    done already  {session.method(method)}")
    return False


def _drawn(session: Session, method: str) -> dict[str, StagedNetwork]:
    """Fresh networks of a method, the same for every call; the whole of it is drawn where all is trained jointly."""
    torch.manual_seed(session.seed)
    kind = METHODS[method]
    if session.domain.config.distill.regime == "joint" and not kind.static:
        return {"": session.domain.blank(kind)}
    return networks_of(session, method)


def _distill_alone(session: Session, method: str) -> None:
    folder = session.method(method)
    networks = _drawn(session, method)
    config = session.domain.config.distill
    student: Student
    if METHODS[method].static:
        teacher = plain_teacher(session)
        none = ensembles["none"](len(networks), teacher.outputs)
        student = StaticStudent(list(networks.values()), teacher, none)
        config = replace(config, learning_rate=config.static_learning_rate)
    elif config.regime == "disjoint":
        student = ExitStudent(networks[""])
    else:
        teacher = plain_teacher(session)
        student = JointStudent(networks[""], teacher, config.backbone_share)
    student.to(session.device)
    with session.watch(f"distill {method}", "samples") as watch:
        batches = session.domain.batches(session.seed)
        facts = Distiller(student, batches, config, folder, session.seed, watch.stop, watch.progress).run()
    _keep(session, method, networks, facts)


def _distill_shared(session: Session, methods: Sequence[str]) -> None:
    """One pass over the frozen backbone per batch for all methods."""
    if not isinstance(session.domain, Labelled):
        raise TypeError(f"`{session.domain.task}` must be of a domain with labels.")
    networks = {method: _drawn(session, method) for method in methods}
    for method in methods:
        networks[method][""].to(session.device)
    samples = partial(session.domain.samples, session.seed)
    shared = SharedSamples(samples, ExitStudent(networks[methods[0]][""]).look)
    with session.watch(f"distill {' + '.join(methods)}", "samples") as watch:
        distillers: list[Distiller] = []
        for method in methods:
            student, folder = ExitStudent(networks[method][""], shared.observe), session.method(method)
            distillers.append(Distiller(student, shared, session.domain.config.distill, folder, session.seed))
        # Who is done last tells how far all are.
        max(distillers, key=_total).progress = watch.progress
        found = train_together(distillers, watch.stop)
    for method, facts in zip(methods, found, strict=True):
        _keep(session, method, networks[method], facts)


def _total(distiller: Distiller) -> int:
    return distiller.total


def _keep(session: Session, method: str, networks: dict[str, StagedNetwork], facts: dict[str, float]) -> None:
    """Saves what was learnt, and ends the stage."""
    tensors = {
        f"{name}/{key}": value
        for name, network in networks.items()
        for key, value in learnt(session, network, method).items()
    }
    checkpoint.save(session.method(method), POLICY, tensors, {"method": method, "seed": session.seed, "curves": facts})
    session.stage("distill", method).finish(facts)
