"""Reports: tables, pictures and one HTML page, made from the rows and curves of run folders and from nothing else."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from rlexit import curveplots, metrics, plots, sections, summary, tables
from rlexit.checkpoint import write_atomic
from rlexit.curveplots import Scalars
from rlexit.evidence import Evidence, gather, read_if_there
from rlexit.glossary import glossary
from rlexit.pages import Block, Bullets, Code, Heading, Paragraph, Picture, Table, to_html, to_markdown
from rlexit.rows import LatencyRow, Row, read_reliability
from rlexit.runlog import Board, read_scalars
from rlexit.summary import Point
from rlexit.tables import summary_rows, summary_table

__all__ = ["find_runs", "summary_rows", "summary_table", "write_report"]

MAX_ANIMATION_BYTES = 8 << 20
MAX_PROFILE_CURVES = 8


def write_report(runs: Sequence[Path], out: Path, allow_mixed: bool = False) -> Path:
    """Writes `report.html`, `report.md`, `report.csv` and `plots/` about everything found in run folders.

    Args:
        runs: run folders, or parents of them; a run folder has an `eval` folder or a `scalars.csv`.
        out: made if missing; files of an earlier report are replaced.
        allow_mixed: also report tasks whose rows were measured under several protocols, each in a part of its own.
    Returns:
        The path of `report.html`.
    Raises:
        ValueError: a run does not exist, nothing was evaluated, a file is damaged, or protocols are mixed.
    """
    folders = find_runs(runs, out)
    evidence = gather(folders)
    rows, latency = evidence.rows, evidence.latency
    scalars = {folder: read_scalars(folder) for folder in folders}
    tested = summary.tested(row for found in rows.values() for row in found)
    if not tested and not any(scalars.values()):
        raise ValueError(
            f"`runs` must hold evaluated episodes, got none in {', '.join(map(str, runs)) or 'no folder'}. "
            "Make them with `rlexit evaluate`."
        )
    summary.check_protocols(tested, allow_mixed)
    shown = summary.points(tested, latency)
    with Board(out) as board:
        blocks = _blocks(tested, shown, evidence, scalars, _Album(out, board))
    command = ["rlexit", "report", *map(str, runs), "--out", str(out), *(["--allow-mixed"] if allow_mixed else [])]
    blocks += [Heading("How this was made"), Code(shlex.join(command))]
    write_atomic(out / "report.csv", tables.to_csv(summary_rows(tested, latency)).encode())
    for name, content in sections.csv_files(evidence).items():
        write_atomic(out / name, content.encode())
    write_atomic(out / "report.md", to_markdown(blocks, out).encode())
    write_atomic(out / "report.html", to_html(blocks, "rlexit report").encode())
    return out / "report.html"


def _blocks(
    tested: Sequence[Row],
    shown: Sequence[Point],
    evidence: Evidence,
    scalars: Mapping[Path, Scalars],
    album: _Album,
) -> list[Block]:
    """The page from top to bottom."""
    subject = "Accuracy" if shown and {point.metric for point in shown} == {"accuracy"} else "Return"
    blocks: list[Block] = [Heading(f"{subject} against compute", level=1), Paragraph(_overview(shown), "lead")]
    blocks += [Paragraph(note, "note") for note in _notes(tested, shown)]
    blocks += _games_blocks(shown, album)
    for title, part in _parts(shown).items():
        blocks += _part_blocks(title, part, album)
    blocks += sections.blocks(evidence)
    blocks += _episode_blocks(evidence.rows, album)
    blocks += _reliability_blocks(evidence.rows, album)
    blocks += _curve_blocks(scalars, album)
    blocks += _latency_blocks(evidence.latency)
    if shown:
        methods = [*(point.method for point in shown), *(row.method for row in evidence.budgets)]
        blocks += [Heading("Words"), glossary(methods, [point.label for point in shown])]
    blocks += _protocol_blocks(shown)
    return blocks


def find_runs(runs: Iterable[Path], out: Path | None = None) -> list[Path]:
    """Run folders at or below the given ones, sorted, each once; links, hidden folders and `out` are not entered.

    Raises:
        ValueError: one of them is no folder.
    """
    found = set()
    for run in runs:
        if not run.is_dir():
            raise ValueError(f"`runs` must be folders, got {str(run)!r}. Evaluate it first: `rlexit evaluate {run}`.")
        for here, below, files in os.walk(run):
            folder = Path(here).resolve()
            if "eval" in below or "scalars.csv" in files:
                found.add(folder)
            below[:] = [
                name
                for name in below
                if not name.startswith(".")
                and name not in ("eval", "calibration")
                and (out is None or folder / name != out.resolve())
            ]
    return sorted(found)


class _Album:
    """Saves figures under safe, unique names below `<out>/plots`, and shows some on TensorBoard."""

    def __init__(self, out: Path, board: Board) -> None:
        self.folder, self.board = out / "plots", board
        self.names: set[str] = set()

    def add(self, name: str, figure: plots.Figure, alt: str, caption: str, tag: str = "") -> Picture:
        stem = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:60].lower() or "plot"
        unique, count = stem, 1
        while unique in self.names:
            count += 1
            unique = f"{stem}-{count}"
        self.names.add(unique)
        if tag:
            self.board.figure(f"{tag}/{unique.partition('-')[2]}", figure, 0)
        return Picture(plots.save(figure, self.folder, unique)[0], alt, caption)


def _parts(shown: Sequence[Point]) -> dict[str, list[Point]]:
    """Title to the points that may share a picture: same task, same protocol, same way of acting."""
    groups: dict[tuple[str, str], dict[str, list[Point]]] = defaultdict(lambda: defaultdict(list))
    for point in shown:
        groups[point.task, point.protocol][point.actions if point.method != summary.RANDOM else ""].append(point)
    parts: dict[str, list[Point]] = {}
    for (task, protocol), ways in sorted(groups.items()):
        protocols = sorted(other for name, other in groups if name == task)
        chance = ways.pop("", [])  # it has no likeliest action, so it belongs to every way of acting
        for actions, part in sorted(ways.items()) or [("", [])]:
            told = [f"{actions} actions"] if len(ways) > 1 else []
            told += [f"protocol {protocols.index(protocol) + 1} of {len(protocols)}"] if len(protocols) > 1 else []
            parts[f"{task} ({', '.join(told)})" if told else task] = summary.in_order([*part, *chance])
    return parts


def _part_blocks(title: str, part: Sequence[Point], album: _Album) -> list[Block]:
    caption = tables.caption(part)
    main = [point for point in part if point.method in summary.REFERENCES or point.target]
    blocks: list[Block] = [Heading(title)]
    if len(main) < len(part) and any(point.target for point in part):
        blocks += [tables.points_table(main, per_seed=False), Paragraph(caption, "caption")]
        blocks += [tables.points_table(part, folded=f"All {len(part)} operating points, seed by seed")]
    else:
        blocks += [tables.points_table(part), Paragraph(caption, "caption")]
    found = summary.verdicts(part)
    if found:
        blocks += [Heading("Exits or a static network at the same compute?", level=3)]
        blocks += [Bullets(tables.verdict_items(found))]
    else:
        unknown = (
            "No static network was evaluated beside exits, so nothing here says that exits beat a smaller network."
        )
        blocks.append(Paragraph(unknown, "note"))
    if any(not math.isnan(point.relative_macs.mean) for point in part):
        figure = plots.pareto(part, title)
        blocks.append(album.add(f"pareto-{title}", figure, f"Value against compute: {title}", caption, "eval/pareto"))
    if any(point.exit_shares for point in part if point.method not in summary.REFERENCES):
        figure, caption = plots.exit_shares(part, title), tables.caption(part, latency=False)
        blocks.append(album.add(f"exits-{title}", figure, f"Where decisions leave: {title}", caption))
    return blocks


def _games_blocks(shown: Sequence[Point], album: _Album) -> list[Block]:
    """IQM and profile over games, for the operating points that every game has."""
    scaled = [point for point in shown if point.normalised_values]
    games = sorted({point.task for point in scaled})
    groups: dict[tuple[str, str, str], dict[str, Point]] = defaultdict(dict)
    for point in scaled:
        if point.method not in (summary.TEACHER, summary.RANDOM):
            groups[point.method, point.label, point.actions].setdefault(point.task, point)
    whole = {key: found for key, found in groups.items() if len(found) == len(games)}
    if len(games) < 2 or not groups:
        return []
    blocks: list[Block] = [Heading(f"Over {len(games)} games")]
    if len(whole) < len(groups):
        left = f"{len(groups) - len(whole)} of {len(groups)} operating points were not evaluated on every game"
        blocks.append(Paragraph(f"{left}; they are left out here.", "note"))
    if not whole:
        return blocks
    of_all = [point for found in whole.values() for point in found.values()]
    several = min(len(point.run_seeds) for point in of_all) > 1
    scores = {key: [_scores(found[game], several) for game in games] for key, found in whole.items()}
    unit = "training runs" if several else "episodes, as n = 1 training seed in some game"
    caption = f"{tables.caption(of_all, latency=False)} {len(games)} games, resampled within each: {unit}."
    bars = [(key[0], key[1], metrics.stratified_interval(values)) for key, values in scores.items()]
    lines = [[method, label, tables.interval_text(interval)] for method, label, interval in bars]
    figure = plots.aggregate(bars, "Interquartile mean over games")
    blocks.append(album.add("aggregate", figure, "Interquartile mean over games", caption))
    header = ("method", "operating point", "IQM of normalised return [95%]")
    blocks.append(Table(header, lines, folded=f"The same as a table ({len(lines)} operating points)"))
    calibrated_first = sorted(whole, key=lambda key: (not next(iter(whole[key].values())).target, bool(key[0])))
    drawn = calibrated_first[:MAX_PROFILE_CURVES]
    seen = [value for key in drawn for game in scores[key] for value in game]
    taus = np.linspace(min(0.0, *seen), max(1.1, *seen), 200)
    curves = [(key[0], key[1], metrics.performance_profile(scores[key], taus)) for key in drawn]
    caption += f" {len(drawn)} of {len(whole)} operating points are drawn." if len(drawn) < len(whole) else ""
    figure = plots.profile(taus, curves, "Performance profile")
    blocks.append(album.add("profile", figure, "Share of runs above a normalised return", caption))
    return blocks


def _scores(point: Point, several: bool) -> list[float]:
    """Normalised return per training run, or per episode where some game has one training seed only."""
    if several:
        return [float(np.mean(seed)) for seed in point.normalised_values]
    return [value for seed in point.normalised_values for value in seed]


def _episode_blocks(rows: Mapping[Path, Sequence[Row]], album: _Album) -> list[Block]:
    """One episode per method: its timeline and its animated picture."""
    blocks: list[Block] = []
    drawn = set()
    for folder, found in rows.items():
        steps = sorted((folder / "eval").glob("steps_*.npz"), key=lambda path: (len(path.name), path.name))
        videos = sorted(path for suffix in ("webp", "gif") for path in (folder / "video").glob(f"*.{suffix}"))
        if _sisters(folder) in drawn or not (steps or videos):
            continue
        drawn.add(_sisters(folder))
        name, how = _name(folder), tables.how_text(found)
        for path in steps[:1]:
            title = f"{name}, {path.stem.removeprefix('steps_')}"
            try:
                with np.load(path, allow_pickle=False) as arrays:
                    figure = plots.exit_timeline(arrays["exits"], arrays["confidences"], arrays["rewards"], title)
                    told = f"{len(arrays['exits'])} decisions, score {tables.number(float(arrays['rewards'].sum()))}"
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
                blocks.append(Paragraph(f"{path.name} of {name} cannot be read ({error}).", "note"))
                continue
            caption = f"{title}: n = 1 training seed, 1 episode, {told}; {how}. It shows behaviour, it proves nothing."
            blocks.append(
                album.add(f"timeline-{title}", figure, f"Exits of one episode: {title}", caption, "eval/exit_timeline")
            )
        for path in videos[:1]:
            if path.stat().st_size <= MAX_ANIMATION_BYTES:
                caption = f"{name}, {path.name}: n = 1 training seed, 1 episode; {how}."
                blocks.append(Picture(path, f"One episode of {name}", caption))
            else:
                blocks.append(Paragraph(f"The animation {path.name} of {name} is too large for this page.", "note"))
    return [Heading("Episodes"), *blocks] if blocks else []


def _curve_blocks(scalars: Mapping[Path, Scalars], album: _Album) -> list[Block]:
    groups: dict[Path, list[Scalars]] = defaultdict(list)
    for folder, triples in scalars.items():
        if triples:
            groups[_sisters(folder)].append(triples)
    blocks: list[Block] = []
    for sisters, seeds in groups.items():
        name = _name(sisters)
        if figure := curveplots.learning_curves(seeds, name):
            count = f"n = {len(seeds)} training seed{'s' if len(seeds) > 1 else ''}"
            caption = f"{name}: {count}; measured while training, so not comparable with the evaluations above."
            blocks.append(album.add(f"learning-{name}", figure, f"Learning curves: {name}", caption))
    return [Heading("Training"), *blocks] if blocks else []


def _reliability_blocks(folders: Iterable[Path], album: _Album) -> list[Block]:
    """How far each exit's confidence can be trusted, one picture per method."""
    found = {
        _name(folder): read_if_there(folder / "calibration" / "reliability.csv", read_reliability) for folder in folders
    }
    blocks: list[Block] = []
    for name, bins in found.items():
        if bins:
            figure, count = (
                curveplots.reliability(bins, name),
                sum(row.count for row in bins if row.exit == bins[0].exit),
            )
            caption = (
                f"{name}: {count:,} held-out rows, met with nobody leaving early, in 15 bins. Below the diagonal an exit is "
                "more confident than its agreement with the full network justifies."
            )
            blocks.append(album.add(f"reliability-{name}", figure, f"Reliability: {name}", caption, "eval/reliability"))
    return [Heading("Confidence and agreement"), *blocks] if blocks else []


def _latency_blocks(latency: Sequence[LatencyRow]) -> list[Block]:
    if not latency:
        return []
    names = ("task", "method", "label", "runtime", "machine")
    numbers = ("run_seed", "batch", "threads", "latency_us_p50", "latency_us_p95")
    lines = [
        [getattr(row, name) for name in names]
        + [tables.number(getattr(row, name), 0 if name in numbers[:3] else 2) for name in numbers]
        for row in dict.fromkeys(latency)
    ]
    several = tables.latency_table(latency)
    told = (
        "Microseconds of one call on a batch of rows, median (p50) and 95th percentile (p95). What else the machine did "
        "meanwhile shows in them."
    )
    return [
        Heading("Measured latency"),
        Paragraph(told, "caption"),
        *([several] if several else []),
        Table((*names, *numbers), lines, names=len(names), folded=f"All {len(lines)} measurements"),
    ]


def _protocol_blocks(shown: Sequence[Point]) -> list[Block]:
    protocols = sorted({(point.task, point.protocol) for point in shown})
    if not protocols:
        return []
    text = "\n".join(f"{task}: {json.dumps(json.loads(protocol), indent=2)}" for task, protocol in protocols)
    return [Heading("Protocol"), Code(text, folded="Everything that the values depend on, in full")]


def _overview(shown: Sequence[Point]) -> str:
    if not shown:
        return "Nothing is evaluated yet; these are the curves of the training so far. Evaluate with `rlexit evaluate`."
    tasks, methods = sorted({point.task for point in shown}), list(dict.fromkeys(point.method for point in shown))
    seeds = {seed for point in shown for seed in point.run_seeds}
    played = sum(point.episodes for point in shown if point.metric == "score")
    counted = f"{played:,} test episodes" if played else "a decision is one row of the test set"
    return (
        f"{', '.join(tasks) if len(tasks) <= 6 else f'{len(tasks)} tasks'}: {len(shown)} operating points of "
        f"{', '.join(methods)}; {len(seeds)} training seed{'s' if len(seeds) > 1 else ''}, "
        f"{counted}. 1 MAC is one multiply-add; MACs are per decision, "
        "relative MACs against the full network without exit heads. Square brackets are 95 % bootstrap intervals."
    )


def _notes(rows: Sequence[Row], shown: Sequence[Point]) -> list[str]:
    trained = [len(point.run_seeds) for point in shown if point.method != summary.RANDOM]
    notes = []
    parts = " and ".join(tables.WHOLES[metric][1] for metric in sorted({point.metric for point in shown}))
    if trained and max(trained) == 1:
        notes.append(f"n = 1 training seed: intervals are over {parts}, not over training runs.")
    elif trained and min(trained) == 1:
        notes.append(f"Intervals of points with one training seed are over {parts}, the others over training runs.")
    if any(1 < count < 5 for count in trained):
        notes.append("Intervals over fewer than five training seeds are rough, and mostly too narrow.")
    missing = summary.missing_references(rows)
    for task, names in missing.items():
        notes.append(f"{task} has no {' and no '.join(names)} rows, so its returns are not normalised.")
    for task in sorted({point.task for point in shown if point.metric == "score" and not point.normalised_values}):
        if task not in missing:
            notes.append(
                f"{task}: returns are normalised only where the teacher acted in the same way (argmax, sampled) "
                "and does not score like the random agent."
            )
    if any(point.execution == "replay" for point in shown):
        notes.append(
            "Points marked replay computed all exits at once, and their MACs say so: they tell values, not savings."
        )
    if any(point.normalised_values for point in shown):
        notes.append("Normalised return is (score - random) / (teacher - random); the two means are taken as exact.")
    return notes


def _sisters(folder: Path) -> Path:
    """What the run shares with the same run under other seeds: `.../pong/ztw` of `.../pong/ztw/s0`."""
    return folder.parent if re.fullmatch(r"s\d+", folder.name) else folder


def _name(folder: Path) -> str:
    return "/".join(_sisters(folder).parts[-2:])
