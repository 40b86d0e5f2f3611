from __future__ import annotations

import csv
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from rlexit import plots, report, summary
from rlexit.rows import Row, write_rows
from rlexit.tables import latency_table, shares_text, verdict_items
from tests.rlexit.test_pages import Page
from tests.rlexit.toy_rows import PROTOCOL, episodes, latency, plain, references, row

NASTY = "<script>alert(1)</script>&amp;\"'|$x$_a_`b`[c](http://d)../../e"


def save_steps(folder: Path, count: int = 40) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    exits = np.arange(count) % 3
    rewards = np.where(np.arange(count) % 10 == 9, 1.0, 0.0)
    np.savez(folder / "steps_0.npz", exits=exits, confidences=np.full(count, 0.8), rewards=rewards, actions=exits)


def save_scalars(folder: Path, tags: dict[str, list[float]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{step},{tag},{value}" for tag, values in tags.items() for step, value in enumerate(values)]
    (folder / "scalars.csv").write_text("\n".join(["step,tag,value", *lines]) + "\n")


@dataclass
class Report:
    runs: Path
    out: Path
    html: str
    page: Page
    markdown: str
    rows: list[dict[str, str]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Two games, two seeds, and holes: pong has everything, qbert has no random rows, no latency and broken steps."""
    root = tmp_path_factory.mktemp("project")
    runs, out = root / "runs", root / "runs" / "report"
    for seed in (0, 1):
        pong = [
            *references(run_seed=seed),
            *plain("static", [0.0, 2.0], 0.5, run_seed=seed, label="width=0.5"),
            *episodes([10.0, 12.0 + seed], run_seed=seed),
            *episodes([6.0, 8.0], run_seed=seed, label="confidence@0.50", macs_mean=2e6, relative_macs=0.25),
            *episodes([11.0, 13.0], run_seed=seed, label="target_macs=0.5", target="target_macs=0.5"),
            *episodes([-21.0], run_seed=seed, label="calibration only", split="calibration"),
        ]
        folder = runs / "pong" / "ztw" / f"s{seed}"
        write_rows(folder / "eval" / "episodes.csv", pong)
        write_rows(folder / "eval" / "latency.csv", [latency(run_seed=seed), latency(run_seed=seed, batch=32)])
        save_steps(folder / "eval")
        save_scalars(folder, {"distill/kl/exit0": [1.0, 0.5], "distill/agree/exit0": [0.5, 0.9], "other": [1.0]})
    (runs / "pong" / "ztw" / "s0" / "video").mkdir()
    frames = [Image.fromarray(np.full((8, 8, 3), shade, np.uint8)) for shade in (0, 200)]
    frames[0].save(runs / "pong/ztw/s0/video/ep0.webp", save_all=True, append_images=frames[1:])
    save_scalars(runs / "pong" / "teacher", {"rollout/ep_rew_mean": [-20.0, 20.0]})
    qbert = plain("teacher", [400.0, 500.0], task="qbert") + episodes([300.0, 310.0], task="qbert")
    write_rows(runs / "qbert" / "ztw" / "s0" / "eval" / "episodes.csv", qbert)
    (runs / "qbert" / "ztw" / "s0" / "eval" / "steps_0.npz").write_bytes(b"PK torn")
    html = report.write_report([runs], out)
    with open(out / "report.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    text = html.read_text()
    return Report(runs, out, text, Page(text), (out / "report.md").read_text(), rows)


def test_the_page_loads_nothing_from_elsewhere_and_forbids_it(whole: Report) -> None:
    links = [tag[name] for _, tag in whole.page.tags for name in ("src", "href") if name in tag]
    assert links
    assert all(link.startswith(("data:image/", "#")) for link in links)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in whole.page.tags}
    assert "url(" not in whole.html
    assert "@import" not in whole.html
    policy = next(tag["content"] for tag in whole.page.all("meta") if tag.get("http-equiv"))
    assert policy.startswith("default-src 'none'")


def test_every_figure_says_seeds_episodes_and_how_it_came_about(whole: Report) -> None:
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", whole.html)
    assert len(captions) == len(whole.page.all("figure")) >= 8
    for caption in captions:
        assert "training seed" in caption
        if "while training" not in caption:
            assert "episode" in caption
            assert "execution real" in caption
            assert "sticky 0.25" in caption


def test_every_picture_of_the_page_also_lies_in_plots_twice(whole: Report) -> None:
    names = {path.stem for path in (whole.out / "plots").iterdir()}
    assert {"pareto-pong", "exits-pong", "pareto-qbert", "timeline-pong-ztw-0", "learning-pong-teacher"} <= names
    for name in names:
        assert (whole.out / "plots" / f"{name}.svg").is_file()
        with Image.open(whole.out / "plots" / f"{name}.png") as picture:
            assert picture.info["dpi"][0] == pytest.approx(150, abs=1)


def test_pictures_in_the_markdown_exist(whole: Report) -> None:
    links = re.findall(r"!\[.*?\]\((.*?)\)", whole.markdown)
    assert len(links) >= 8
    assert all((whole.out / link).is_file() for link in links)


def test_the_animation_is_embedded(whole: Report) -> None:
    assert any(tag["src"].startswith("data:image/webp;base64,UklGR") for tag in whole.page.all("img"))


def test_report_csv_has_one_row_per_task_method_seed_and_label(whole: Report) -> None:
    keys = [(line["task"], line["method"], line["run_seed"], line["label"]) for line in whole.rows]
    assert len(keys) == len(set(keys)) == 6 * 2 + 2
    found = whole.rows[keys.index(("pong", "ztw", "1", "confidence@0.90"))]
    assert (found["episodes"], found["mean"], found["mean_low"], found["mean_high"]) == ("2", "11.5", "10.0", "13.0")
    assert float(found["normalised_return"]) == pytest.approx(31.5 / 40)
    assert (found["relative_macs"], found["macs_mean"], found["exit_shares"]) == ("0.5", "4000000.0", "[0.5, 0.0, 0.5]")
    assert (found["latency_us_p50"], found["latency_us_p95"]) == ("200.0", "300.0")
    assert (found["execution"], found["actions"]) == ("real", "argmax")
    assert json.loads(found["thresholds"]) == [0.9, "inf"]


def test_unknown_numbers_are_empty_cells(whole: Report) -> None:
    qbert = next(line for line in whole.rows if line["task"] == "qbert" and line["method"] == "ztw")
    assert qbert["normalised_return"] == qbert["latency_us_p50"] == ""
    assert not any(cell.lower() == "nan" for line in whole.rows for cell in line.values())


def test_calibration_rows_are_shown_nowhere(whole: Report) -> None:
    for text in (whole.html, whole.markdown, *(line["label"] for line in whole.rows)):
        assert "calibration only" not in text


def test_seeds_are_averaged_in_the_tables_and_listed(whole: Report) -> None:
    assert "| ztw | confidence@0.90 | 11.25 [11.00, 11.50] |" in whole.markdown
    assert "11.00 / 11.50 |" in whole.markdown


def test_the_report_says_who_wins_at_the_compute_of_the_static_network(whole: Report) -> None:
    assert "exits win at 4 M MACs per decision (static width=0.5): ztw target_macs=0.5" in whole.page.text
    assert "- **exits win**: at 4 M MACs" in whole.markdown
    assert "No static network was evaluated beside exits" in whole.page.text  # of qbert


def test_holes_are_named(whole: Report) -> None:
    assert "qbert has no random rows, so its returns are not normalised." in whole.page.text
    assert "steps_0.npz of qbert/ztw cannot be read" in whole.page.text
    assert "fewer than five training seeds" in whole.page.text


def test_the_report_ends_with_its_command(whole: Report) -> None:
    command = f"rlexit report {whole.runs} --out {whole.out}"
    assert whole.markdown.rstrip().removesuffix("```").rstrip().endswith(command)
    assert whole.page.text.endswith(command)


def test_a_report_inside_the_runs_is_not_read_again(whole: Report) -> None:
    (whole.out / "eval").mkdir(exist_ok=True)
    assert whole.out not in report.find_runs([whole.runs], whole.out)
    assert len(report.find_runs([whole.runs, whole.runs / "pong"], whole.out)) == 4


def test_the_same_runs_give_the_same_report(whole: Report, tmp_path: Path) -> None:
    run = whole.runs / "qbert"
    first, second = (report.write_report([run], tmp_path / name) for name in ("a", "b"))
    assert first.read_text().replace(str(tmp_path / "a"), "") == second.read_text().replace(str(tmp_path / "b"), "")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are built but not drawn, for tests that look at the text only."""

    def save(figure: plots.Figure, folder: Path, name: str) -> tuple[Path, Path]:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.svg").write_text("<svg/>")
        (folder / f"{name}.png").write_bytes(b"")
        return folder / f"{name}.svg", folder / f"{name}.png"

    monkeypatch.setattr(plots, "save", save)


def reported(folder: Path, rows: list[Row], **more: Any) -> str:
    write_rows(folder / "run" / "eval" / "episodes.csv", rows)
    return Page(report.write_report([folder / "run"], folder / "out", **more).read_text()).text


@pytest.mark.parametrize("rows", [[], [row(split="calibration")]])
def test_without_test_rows_the_verb_that_makes_them_is_named(tmp_path: Path, rows: list[Row]) -> None:
    (tmp_path / "eval").mkdir()
    if rows:
        write_rows(tmp_path / "eval" / "episodes.csv", rows)
    with pytest.raises(ValueError, match="`rlexit evaluate`"):
        report.write_report([tmp_path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no_such_run"):
        report.write_report([tmp_path / "no_such_run"], tmp_path / "out")


def test_training_alone_is_reported_with_its_curves(tmp_path: Path, quick: None) -> None:
    save_scalars(tmp_path / "pong" / "teacher", {"rollout/ep_rew_mean": [-20.0, 20.0]})
    page = Page(report.write_report([tmp_path / "pong"], tmp_path / "out").read_text())
    assert "Nothing is evaluated yet" in page.text
    assert len(page.all("figure")) == 1
    assert (tmp_path / "out" / "report.csv").read_text() == ""


def test_one_seed_is_reported_as_one(tmp_path: Path, quick: None) -> None:
    text = reported(tmp_path, references() + episodes([1.0, 2.0]))
    assert "n = 1 training seed: intervals are over episodes, not over training runs." in text


def test_mixed_protocols_are_refused_without_the_flag(tmp_path: Path, quick: None) -> None:
    rows = [row(), row(protocol='{"sticky":0.0}')]
    with pytest.raises(ValueError, match=r"sticky .*--allow-mixed"):
        reported(tmp_path, rows)
    text = reported(tmp_path, rows, allow_mixed=True)
    assert "pong (protocol 1 of 2)" in text
    assert "pong (protocol 2 of 2)" in text
    assert text.endswith("--allow-mixed")


def test_ways_of_acting_stand_in_parts_of_their_own(tmp_path: Path, quick: None) -> None:
    text = reported(tmp_path, references() + episodes([1.0, 2.0]) + episodes([1.0], actions="sampled", label="other"))
    assert "pong (argmax actions)" in text
    assert "pong (sampled actions)" in text
    assert "normalised only where the teacher acted in the same way" in text


def test_replayed_rows_are_marked(tmp_path: Path, quick: None) -> None:
    assert "Points marked replay" in reported(tmp_path, episodes([1.0, 2.0], execution="replay"))


def test_accuracies_are_reported_without_random_rows(tmp_path: Path, quick: None) -> None:
    text = reported(tmp_path, episodes([0.9], metric="accuracy", task="cifar10"))
    assert text.startswith("rlexit report Accuracy against compute")
    assert "has no" not in text


def test_rows_without_any_count_of_compute_are_reported(tmp_path: Path, quick: None) -> None:
    uncounted = {"macs_mean": math.nan, "relative_macs": math.nan, "exit_fractions": ()}
    assert "confidence@0.90" in reported(tmp_path, episodes([1.0, 2.0], **uncounted))


def test_games_are_aggregated_where_all_have_the_operating_point(tmp_path: Path, quick: None) -> None:
    rows = []
    for game in ("pong", "qbert", "freeway"):
        rows += references(task=game) + episodes([0.0, 20.0], task=game, target="x")
    rows += episodes([0.0, 20.0], label="one game only")
    text = reported(tmp_path, rows)
    assert "Over 3 games" in text
    assert "1 of 2 operating points were not evaluated on every game" in text
    assert "3 games, resampled within each: episodes, as n = 1 training seed in some game." in text
    assert "0.75 [0.50, 1.00]" in text


def test_nasty_names_stay_text(tmp_path: Path) -> None:
    rows = [row(task=NASTY, method=name, label=NASTY, rule=NASTY, value=k) for k, name in enumerate((NASTY, "_hidden"))]
    rows += [*plain("teacher", [3.0], task=NASTY), *plain("static", [1.0], 0.5, task=NASTY, label=NASTY)]
    write_rows(tmp_path / "run" / "eval" / "episodes.csv", rows)
    page = Page(report.write_report([tmp_path / "run"], tmp_path / "out").read_text())
    assert page.all("script") == []
    assert NASTY in page.text
    markdown = re.sub(r"```.*?```", "", (tmp_path / "out" / "report.md").read_text(), flags=re.DOTALL)
    assert "<script" not in markdown
    assert not re.search(r"(?<!\\)\]\(http", markdown)
    assert {path.parent for path in (tmp_path / "out").rglob("*.svg")} == {tmp_path / "out" / "plots"}


def test_the_terminal_table_says_common_things_once_and_leaves_out_what_is_unknown() -> None:
    rows = references() + episodes([0.0, 20.0], label="[bold]x")
    console = Console(width=140, record=True)
    with console.capture() as capture:
        console.print(report.summary_table(report.summary_rows(rows)))
    lines = capture.get().splitlines()
    assert lines[0].split() == ["task", "pong,", "execution", "real,", "actions", "argmax,", "seed", "0"]
    assert "us p50" not in lines[1]
    assert "[bold]x" in lines[-1]
    assert "10.00 [0.00, 20.00]" in lines[-1]
    assert "0.75" in lines[-1]


def test_the_terminal_table_of_nothing_is_empty() -> None:
    assert report.summary_table([]).row_count == 0


def test_the_whole_protocol_is_listed(whole: Report) -> None:
    assert json.dumps(json.loads(PROTOCOL), indent=2) in whole.markdown


def test_latencies_are_compared_with_the_teacher_of_the_same_task() -> None:
    rows = [
        latency(
            task=task, method=method, label="full" if method == "teacher" else "half", batch=batch, latency_us_p50=time
        )
        for task, method, time in (("a", "teacher", 1000.0), ("a", "ztw", 500.0), ("b", "teacher", 100.0))
        for batch in (1, 8)
    ]
    table = latency_table(rows)
    assert table is not None
    assert {line[0]: line[3] for line in table.rows} == {"a teacher": "1.000", "a ztw": "0.500", "b teacher": "1.000"}


def test_methods_that_are_dearer_than_a_static_network_share_a_sentence() -> None:
    rows = [*plain("static", [1.0, 2.0], 0.1, label="width 0.1"), *plain("static", [1.0, 2.0], 0.6, label="width 0.6")]
    rows += [each for method in ("sdn", "ztw") for each in episodes([5.0, 6.0], method=method)]
    items = verdict_items(summary.verdicts(summary.points(rows)))
    assert [badge for badge, _, _ in items] == ["cannot tell", "exits win", "exits win"]
    assert (
        items[0][2] == "at 800 k MACs per decision (static width 0.1): sdn and ztw have no operating point that cheap."
    )


def test_a_report_explains_its_words(whole: Report) -> None:
    assert "each head also reads what the head before it said" in whole.markdown
    assert "| target\\_macs=S |" in whole.markdown or "| target_macs=S |" in whole.markdown
    assert "patience@T" not in whole.markdown


def test_parts_of_a_test_set_are_no_episodes_and_nobody_acts(tmp_path: Path, quick: None) -> None:
    rows = [*plain("teacher", [0.9, 0.8], metric="accuracy"), *episodes([0.7, 0.8], metric="accuracy")]
    write_rows(tmp_path / "run" / "eval" / "episodes.csv", rows)
    report.write_report([tmp_path / "run"], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "2 parts of the test set per point" in text
    assert "episode" not in text
    assert "actions" not in text.partition("## Protocol")[0]


def test_many_exits_are_told_by_their_mean() -> None:
    assert shares_text((0.5, 0.2, 0.3)) == "50 / 20 / 30"
    assert shares_text((0.5, *(0.0,) * 8, 0.5)) == "mean exit 4.5 of 0..9"


def test_accuracies_have_four_digits() -> None:
    table = report.summary_table(report.summary_rows(episodes([0.8546, 0.8546], metric="accuracy")))
    assert any("0.8546 [0.8546, 0.8546]" in cell for column in table.columns for cell in map(str, column.cells))
