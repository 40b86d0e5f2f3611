"""What a person meets: plans, tables and paths printed around the verbs, and how a run ends."""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib import import_module, metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from rlexit import __version__
from rlexit.config import METHODS, CoreConfig
from rlexit.registry import unknown
from rlexit.resources import CONFIG, config_files
from rlexit.settings import DOMAINS, Parser, Place

if TYPE_CHECKING:
    from rlexit.domain import Domain
    from rlexit.session import Session

LISTS = ("configs", "games", "methods", "rules", "runs")
EXTRAS = {
    "vision": ("datasets", "kornia"),
    "export": ("onnx", "onnxruntime"),
    "openvino": ("openvino",),
    "cluster": ("ray",),
    "timm": ("timm",),
}


def console() -> Console:
    """Where everything is printed; wide enough for tables where it is no terminal."""
    # No markup: a path or a list of thresholds may look like it.
    return Console(
        highlight=False,
        markup=False,
        emoji=False,
        width=None if sys.stdout.isatty() else 140,
        soft_wrap=not sys.stdout.isatty(),
    )


def work(verb: str, options: argparse.Namespace, config: CoreConfig, place: Place, seeds: Sequence[int]) -> int:
    """Does a verb of one run for every seed; a signal ends it at a safe point with the way to go on."""
    from rlexit.domain import Placed
    from rlexit.interrupts import Stopped, stop_on_signals
    from rlexit.machine import device, settle
    from rlexit.session import Session

    settle(options.threads)
    place_of_work = device(getattr(options, "device", "cpu"))
    if verb == "train" and len(seeds) > 1:
        raise ValueError("`--seeds` of train must be one: all seeds of a run share its teacher. Use another --out.")
    out = console()
    domain: Domain = import_module(f"{config.domain}.domain").domain(config)
    if isinstance(domain, Placed):
        domain.device = place_of_work
    elif place_of_work != "cpu":
        raise ValueError(f"`--device` must be cpu for {domain.task}, got {place_of_work}.")
    methods = place.methods or config.methods
    _prove(domain, verb, methods)
    with stop_on_signals() as stop:
        # The teacher belongs to all seeds: only the first one may start it over.
        sessions = [
            Session(domain, place.root, seed, out, stop, options.force, methods, index == 0, place_of_work)
            for index, seed in enumerate(seeds)
        ]
        try:
            _header(sessions[0])
            if options.dry_run:
                _plan(sessions[0])
                return 0
            for session in sessions:
                WORK[verb](session, options)
            if verb in ("run", "evaluate"):
                _report([place.root], place.root / "report", out)
        except Stopped:
            again = [word for word in sys.argv[1:] if word != "--force"]
            out.print("stopped at a safe point; what was saved is intact. Go on with the same command:")
            out.print(f"  rlexit {shlex.join(again)}")
            return 128 + (stop.signum or 0)
    return 0


def _prove(domain: Domain, verb: str, methods: Sequence[str]) -> None:
    """Builds and asks what a verb will need: a config that cannot work is told before hours of work, not after."""
    from rlexit.calibrate import check_target
    from rlexit.costs import cost_table
    from rlexit.domain import Labelled, Refining

    config = domain.config
    for method in methods:
        kind = METHODS[method]
        blank = domain.blank(kind)
        if kind.refines and verb in ("run", "refine") and not isinstance(domain, Refining):
            raise ValueError(f"`--methods` must be of those that {domain.task} has, got {method!r}, which is refined.")
        if verb in ("run", "calibrate") and kind.exits and not kind.static and not kind.refines:
            for target in () if blank.gates else config.calibrate.target_macs:
                check_target(cost_table(blank, domain.example()), target)
    if config.distill.regime != "disjoint" and not isinstance(domain, Labelled):
        advice = "Only samples with labels train the backbone too."
        raise ValueError(
            f"`distill.regime` must be disjoint for {domain.task}, got {config.distill.regime!r}. {advice}"
        )


def _header(session: Session) -> None:
    domain, out = session.domain, session.console
    rules = {key: value for key, value in domain.protocol().items() if key not in ("game", "rom_md5")}
    short = ", ".join(f"{key} {value}" for key, value in rules.items())
    out.print(f"rlexit {__version__} | {domain.task} | {session.root}")
    out.print(f"protocol   {short}")


def _plan(session: Session) -> None:
    """Builds everything that a run needs, counts it, and says what would be done."""
    from rlexit.costs import cost_table, parameters

    domain, out = session.domain, session.console
    refined = (f"refine {method}" for method in session.methods if METHODS[method].refines)
    for stage in ("train", *(f"distill {method}" for method in _distilled(session.methods)), *refined):
        name, _, method = stage.partition(" ")
        state = "done" if session.stage(name, method).is_done() else "to do"
        out.print(f"plan       {stage}: {state}")
    network = domain.blank(METHODS[session.methods[0]])
    costs = cost_table(network, domain.example())
    table = Table("leave after", "MACs", "relative", title=f"one decision; full network {costs.full:,} MACs")
    for name, macs in zip(network.exit_names, costs.exits, strict=True):
        table.add_row(name, f"{macs:,}", f"{costs.relative(macs):.3f}")
    out.print(table)
    out.print(f"parameters {parameters(network):,}; nothing was written (--dry_run)")


def _train(session: Session, options: argparse.Namespace) -> None:
    from rlexit import verbs

    verbs.train(session)
    session.console.print(f"teacher    {session.teacher}")


def _import(session: Session, options: argparse.Namespace) -> None:
    from rlexit.runfolder import FolderError
    from rlexit.session import TEACHER, weights_hash

    # First elsewhere: a file that is refused must leave everything as it is.
    with tempfile.TemporaryDirectory() as scratch:
        session.domain.adopt(options.file, Path(scratch))
        adopted = weights_hash(Path(scratch), TEACHER)
    stage = session.stage("train")
    if session.begin(stage):
        # An unfinished training of the same config may have left its own state and curves.
        stage.clear()
        session.begin(stage)
        session.domain.adopt(options.file, session.teacher)
        stage.finish({"imported": options.file.name, "teacher": adopted})
    elif weights_hash(session.teacher, TEACHER) != adopted:
        raise FolderError(f"`{session.teacher}` holds another teacher. Use --force to replace it, or another --out.")
    session.console.print(f"teacher    {session.teacher}")


def _each_method(verb: str) -> Callable[[Any, argparse.Namespace], None]:
    def do(session: Session, options: argparse.Namespace) -> None:
        from rlexit import verbs

        if verb == "evaluate":
            verbs.evaluate_teacher(session)
        for method in session.methods:
            found = getattr(verbs, {"evaluate": "evaluate_method"}.get(verb, verb))(session, method)
            for policy in found or ():
                thresholds = ", ".join(f"{value:.4g}" for value in policy.thresholds)
                session.console.print(f"calibrate  {method} {policy.label}: {policy.rule} thresholds [{thresholds}]")

    return do


def _distilled(methods: Sequence[str]) -> tuple[str, ...]:
    """The methods that distillation makes: those that are refined start from another one, controls repeat one's rates."""
    firsts = (METHODS[method].refines or method for method in methods)
    return tuple(dict.fromkeys(name for first in firsts for name in (METHODS[first].rates_of, first) if name))


def _distill(session: Session, options: argparse.Namespace) -> None:
    from rlexit import verbs

    verbs.distill(session, *_distilled(session.methods))


def _refine(session: Session, options: argparse.Namespace) -> None:
    from rlexit import verbs

    # Where none is, the first one's error says which methods are refined.
    for method in [name for name in session.methods if METHODS[name].refines] or session.methods[:1]:
        verbs.refine(session, method)


def _run(session: Session, options: argparse.Namespace) -> None:
    from rlexit.domain import Filming

    refined = any(METHODS[method].refines for method in session.methods)
    for verb in ("train", "distill", *(("refine",) if refined else ()), "calibrate", "evaluate"):
        WORK[verb](session, options)
    for method in session.methods if isinstance(session.domain, Filming) else ():
        if session.calibrated(method):  # a film needs an exit policy; without one there is still a grid to report
            stage = session.stage("video", method)
            if session.begin(stage):
                _video(session, argparse.Namespace(episode=0, policy=None, steps=300), method)
                stage.finish({})
            break


def _video(session: Session, options: argparse.Namespace, method: str = "") -> None:
    from rlexit import verbs

    exiting = [name for name in session.methods if not METHODS[name].static]
    if not exiting:
        raise ValueError("`--methods` must name one with exits to film, got static only. Use --methods ztw.")
    path = verbs.video(session, method or exiting[0], options.episode, options.policy, options.steps)
    session.console.print(f"video      {path}")


def _with_exits(session: Session, method: str | None) -> str:
    if method is not None:
        return method
    exiting = [name for name in session.methods if not METHODS[name].static]
    if not exiting:
        raise ValueError("`--methods` must name one with exits, got static only. Use --method ztw.")
    return exiting[0]


def _export(session: Session, options: argparse.Namespace) -> None:
    from rlexit import deploy

    if options.rows < 1:
        raise ValueError(f"`--rows` must be at least 1, got {options.rows}.")
    method = _with_exits(session, options.method)
    path = deploy.export_method(session, method, options.format, options.policy, options.to, options.rows)
    session.console.print(f"export     {path}")


def _bench(session: Session, options: argparse.Namespace) -> None:
    from rlexit import deploy

    for name in ("rows", "repeats"):
        if getattr(options, name) < 1:
            raise ValueError(f"`--{name}` must be at least 1, got {getattr(options, name)}.")
    method = _with_exits(session, options.method)
    if min(options.batches, default=1) < 1:
        raise ValueError(f"`--batches` must be at least 1, got {options.batches}.")
    sizes = [size for size in dict.fromkeys(options.batches) if size > 1]
    path = deploy.bench(session, method, options.policy, options.rows, options.repeats, options.runtimes, sizes)
    session.console.print(f"bench      {path}")


WORK: dict[str, Callable[[Any, argparse.Namespace], None]] = {
    "run": _run,
    "train": _train,
    "import": _import,
    "distill": _distill,
    "refine": _refine,
    "calibrate": _each_method("calibrate"),
    "evaluate": _each_method("evaluate"),
    "video": _video,
    "export": _export,
    "bench": _bench,
}


def _report(runs: Sequence[Path], folder: Path, out: Console, allow_mixed: bool = False) -> None:
    from rlexit.evidence import gather
    from rlexit.report import find_runs, write_report
    from rlexit.tables import summary_rows, summary_table

    page = write_report(runs, folder, allow_mixed)
    evidence = gather(find_runs(runs, folder))
    rows = [row for found in evidence.rows.values() for row in found]
    out.print(summary_table(summary_rows(rows, evidence.latency)))
    out.print(f"report     {page.with_suffix('.html')}")
    out.print(f"plots      {folder / 'plots'}")
    out.print(f"curves     tensorboard --logdir {runs[0]}")


def report_verb(words: Sequence[str]) -> int:
    """`rlexit report RUNS... [--out FOLDER] [--allow-mixed]`."""
    parser = Parser(prog="rlexit report", description="tables, plots and one HTML page", allow_abbrev=False)
    parser.add_argument("runs", metavar="RUNS", nargs="+", help="run folders, or folders of them")
    parser.add_argument("--out", type=Path, default=None, help="default: report/ in the first run folder")
    parser.add_argument("--allow-mixed", action="store_true", help="put different protocols side by side")
    options = parser.parse_args(words)
    runs = [
        Path(run) if Path(run).is_dir() or run not in config_files() else Path("runs") / run for run in options.runs
    ]
    _report(runs, options.out or runs[0] / "report", console(), options.allow_mixed)
    return 0


def list_verb(words: Sequence[str]) -> int:
    """`rlexit list [configs|games|methods|rules|runs]`."""
    parser = Parser(prog="rlexit list", description="what there is", allow_abbrev=False)
    parser.add_argument("what", nargs="?", default="configs", help=", ".join(LISTS))
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of all runs (default: runs)")
    options = parser.parse_args(words)
    if options.what not in LISTS:
        raise unknown("list", options.what, LISTS)
    out = console()
    for line in _lists(options.what, options.out):
        out.print(line)
    return 0


def _lists(what: str, runs: Path) -> list[str]:
    if what == "configs":
        return [f"{name:<24} {_comment(path)}" for name, path in config_files().items()]
    if what == "methods":
        return [f"{name:<16} cascade {kind.cascade!s:<6} ensemble {kind.ensemble}" for name, kind in METHODS.items()]
    if what == "runs":
        found = sorted(path.parent for path in runs.glob(f"**/{CONFIG}"))
        return [str(path) for path in found] or [f"no runs in {runs}; `rlexit run pong` makes one"]
    if what == "rules":
        return list(import_module("rlexit.rules").rules)
    return list(import_module("agents.envs").known_games())


def _comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    return first.lstrip("# ") if first.startswith("#") else ""


def doctor_verb(words: Sequence[str]) -> int:
    """`rlexit doctor`: what is here, what is missing, and how to get it."""
    Parser(prog="rlexit doctor", description=doctor_verb.__doc__).parse_args(words)
    import torch

    from rlexit.machine import cores, describe

    out = console()
    out.print(f"rlexit     {__version__}, python {sys.version.split()[0]}")
    for name in ("torch", "stable-baselines3", "gymnasium", "ale-py", "numpy", "tensorboard", "safetensors"):
        out.print(f"{name:<18} {metadata.version(name)}")
    capability = torch.backends.cpu.get_cpu_capability()
    out.print(f"machine    {describe()}; {cores()} threads, {capability}")
    out.print(f"gpu        {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none seen; not needed'}")
    games = _lists("games", Path())
    out.print(
        f"games      {len(games)} ROMs, teachers shipped for {', '.join(import_module('agents.zoo').shipped()) or 'none'}"
    )
    for extra, modules in EXTRAS.items():
        missing = [module for module in modules if util.find_spec(module) is None]
        advice = f"missing {', '.join(missing)}: pip install 'rlexit[{extra}]'" if missing else "here"
        out.print(f"extra      {extra:<10} {advice}")
    out.print(f"domains    {', '.join(domain for domain in DOMAINS if util.find_spec(domain + '.domain') is not None)}")
    return 0
