"""Policy distillation: a teacher of one architecture learns from one of another, on data that it helps to drive."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import torch

from agents import teacher, zoo
from agents.backbones import backbone_of
from agents.backbones.nature import initialise
from agents.config import AgentsConfig
from rlexit import checkpoint
from rlexit.distill import Distiller
from rlexit.domain import Batches, Watch
from rlexit.ensembles import NoEnsemble
from rlexit.network import StagedNetwork
from rlexit.students import StaticStudent


def source_of(config: AgentsConfig, actions: int) -> StagedNetwork:
    """The NatureCNN that is learnt from.

    Raises:
        CheckpointError: its folder holds none of this game and protocol, or it was altered.
        LookupError: none is shipped for this game.
    """
    folder = zoo.folder(config.env.game) if config.student.source == "zoo" else Path(config.student.source).expanduser()
    tensors, facts = checkpoint.load(folder, teacher.TEACHER)
    theirs, ours = dict(facts.get("env") or {}), asdict(config.env)
    for name in ours:
        if theirs.get(name) != ours[name]:
            raise checkpoint.CheckpointError(
                f"`student.source` must be of env.{name} {ours[name]!r}, got {theirs.get(name)!r}. Use another source."
            )
    nature = backbone_of("nature")
    network = nature.network(actions)
    nature.load(network, tensors)
    return network.eval()


def distill_teacher(
    config: AgentsConfig, actions: int, folder: Path, seed: int, batches: Batches, watch: Watch
) -> Path:
    """Makes the teacher of a run by cloning another's answers, KL(source || student), or goes on where it stopped.

    Games are driven by student and source in turn, drawn for every step, so that the student learns where it leads itself.

    Args:
        config: backbone, source and steps.
        actions: A.
        folder: for checkpoints and curves; the teacher is left in it, its tensors named as SB3 names an actor's.
        seed: of weights, minibatches and games.
        batches: games driven by what acts.
        watch: stop and progress.
    Returns:
        The manifest.
    Source: Rusu et al. 2016, arXiv 1511.06295; driven by the student as in Czarnecki et al. 2019, arXiv 1902.02186.
    """
    settings = config.student
    source = source_of(config, actions)
    torch.manual_seed(seed)
    network = initialise(backbone_of(config.network.backbone).network(actions))
    student = StaticStudent([network], source, NoEnsemble(1, actions))
    learning = replace(
        config.distill,
        steps=settings.steps,
        batch_size=settings.batch_size,
        epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        decay_at=settings.decay_at,
        label_weight=0.0,
        reference=False,
    )
    facts = Distiller(student, batches, learning, folder, seed, watch.stop, watch.progress).run()
    tensors = {f"features_extractor.{key}": value for key, value in network.state_dict().items() if key[:6] == "units."}
    for kind, value in network.head(0).state_dict().items():
        tensors[f"action_net.{kind.removeprefix('module.')}"] = value
    known = {"env": asdict(config.env), "student": asdict(settings), "seed": seed, "curves": facts}
    return checkpoint.save(folder, teacher.TEACHER, tensors, known)
