"""What a report says about labelled sets, from rows that are checked by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from rlexit import dissection, sections
from rlexit.dissection import BudgetRow, ExitRow, GroupRow, NoteRow, PictureRow
from rlexit.evidence import gather
from rlexit.pages import Bullets, Heading, Paragraph, Picture, Table

BUDGET = BudgetRow("pets", "ztw", 0, "exits", "honest", "the other half", "real", 0.5, 0.8, 0.49, 1000, "accuracy")
EXIT = ExitRow("pets", "ztw", 0, "exits", 0, "block 1", 0.6, 0.0, 1e6, 0.3, 0.3, 1000, "accuracy")
GROUP = GroupRow("pets", "ztw", 0, "0.5 of the MACs", "cat", 0.7, 0.4, (0.75, 0.25), 500, "accuracy")
PICTURE = PictureRow("pets", "ztw", 0, "images.png", "cats", "easy ones")


def folder_of(path, *rows):
    (path / "eval").mkdir(parents=True)
    for kind in dict.fromkeys(type(row) for row in rows):
        dissection.write(path / "eval", [row for row in rows if type(row) is kind])
    return path


def tables_in(blocks):
    return [block for block in blocks if isinstance(block, Table)]


def told(folders):
    return sections.blocks(gather(folders))


@pytest.mark.parametrize("row", [BUDGET, EXIT, GROUP, PICTURE, replace(BUDGET, choice="reference", budget=math.inf)])
def test_rows_come_back_from_their_file(tmp_path, row):
    folder_of(tmp_path, row)
    assert dissection.load(tmp_path / "eval", type(row)) == [row]


@pytest.mark.parametrize(
    ("row", "changes", "message"),
    [
        (BUDGET, {"choice": "guessed"}, "`choice` must be one of reference, honest"),
        (BUDGET, {"budget": math.nan}, "`budget` must be a number, got nan"),
        (BUDGET, {"value": math.nan}, "`value` must be finite"),
        (PICTURE, {"file": "../secret.png"}, "`file` must be the plain name of a .png"),
        (PICTURE, {"file": "page.html"}, "`file` must be the plain name of a .png"),
    ],
)
def test_a_row_that_breaks_a_rule_is_refused(row, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(row, **changes)


def test_folders_without_such_rows_say_nothing(tmp_path):
    assert told([tmp_path]) == []
    assert sections.csv_files(gather([tmp_path])) == {}


def test_the_budget_table_has_a_line_per_method_and_way_of_choosing(tmp_path):
    rows = [
        replace(BUDGET, choice="reference", source="all test rows", budget=share, value=value)
        for share, value in ((0.25, 0.5), (0.5, 0.81), (math.inf, 0.9))
    ]
    rows += [BUDGET, replace(BUDGET, choice="area", budget=1.0, value=0.75), replace(BUDGET, method="sdn", value=0.7)]
    [table, spent] = tables_in(told([folder_of(tmp_path / "ztw", *rows)]))
    assert table.header == ["method", "thresholds", "25 %", "50 %", "max", "mean up to 100 %"]
    assert table.rows == [
        ["ztw", "reference", "50.00", "81.00", "90.00", "-"],
        ["ztw", "honest", "-", "80.00", "-", "75.00"],
        ["sdn", "honest", "-", "70.00", "-", "-"],
    ]
    assert spent.folded
    assert spent.rows[1] == ["ztw", "honest", "real", "-", "0.490", "-"]


def test_the_caption_says_what_thresholds_were_chosen_on(tmp_path):
    blocks = told([folder_of(tmp_path, BUDGET)])
    [caption] = [block.text for block in blocks if isinstance(block, Paragraph)]
    assert "1000 test rows" in caption
    assert "the other half" in caption


@pytest.mark.parametrize(
    ("fixed", "badge"),
    [(0.7, "exits win"), (0.9, "static is better here"), (0.8, "no clear difference")],
)
def test_a_network_without_exits_is_compared_at_its_own_compute(tmp_path, fixed, badge):
    static = replace(
        BUDGET, method="static", label="depth 20", choice="fixed", budget=0.5, relative_macs=0.5, value=fixed
    )
    dear = replace(BUDGET, budget=0.75, relative_macs=0.75, value=0.95)
    [bullets] = [block for block in told([folder_of(tmp_path, BUDGET, dear, static)]) if isinstance(block, Bullets)]
    [(found, _, text)] = bullets.items
    assert found == badge
    assert "ztw reaches 80.00 % with 0.490" in text


def test_a_rival_that_is_cheaper_than_every_budget_is_said_to_be(tmp_path):
    static = replace(BUDGET, method="static", label="tiny", choice="fixed", budget=0.1, relative_macs=0.1)
    blocks = told([folder_of(tmp_path, BUDGET, static)])
    [bullets] = [block for block in blocks if isinstance(block, Bullets)]
    assert "ztw has no budget that small" in bullets.items[0][2]
    rows = [BUDGET, replace(BUDGET, method="sdn"), replace(BUDGET, method="pbee"), static]
    [bullets] = [block for block in told([folder_of(tmp_path / "all", *rows)]) if isinstance(block, Bullets)]
    [(_, _, text)] = bullets.items
    assert "ztw, sdn and pbee have no budget that small" in text


def test_a_budget_far_below_a_rival_says_nothing_about_who_is_better(tmp_path):
    static = replace(BUDGET, method="static", label="large", choice="fixed", budget=0.9, relative_macs=0.9, value=0.99)
    blocks = told([folder_of(tmp_path, BUDGET, static)])
    [bullets] = [block for block in blocks if isinstance(block, Bullets)]
    assert bullets.items[0][0] == "cannot tell"
    assert "spends only 0.490" in bullets.items[0][2]
    beaten = replace(static, value=0.6)
    [bullets] = [block for block in told([folder_of(tmp_path / "won", BUDGET, beaten)]) if isinstance(block, Bullets)]
    assert bullets.items[0][0] == "exits win"


def test_every_exit_has_a_line_and_every_method_its_columns(tmp_path):
    rows = [
        EXIT,
        replace(EXIT, exit=1, group="block 2", value=0.8, improvability=0.25, relative_macs=1.1, relative_ops=1.1),
        replace(EXIT, method="sdn", value=0.5, improvability=math.nan),
        replace(EXIT, method="sdn", exit=2, group="block 3"),
        replace(EXIT, method="teacher", label="full"),
        replace(EXIT, method="gates"),
    ]
    [table] = tables_in(told([folder_of(tmp_path, *rows)]))
    assert table.header[2:5] == ["ztw MACs", "ztw accuracy %", "ztw HI"]
    assert table.header[5:] == ["sdn MACs", "sdn accuracy %", "sdn HI"]
    assert table.rows == [
        ["0", "block 1", "0.300", "60.00", "0.0", "0.300", "50.00", "-"],
        ["1", "block 2", "1.100", "80.00", "25.0", "-", "-", "-"],
        ["2", "block 3", "-", "-", "-", "0.300", "60.00", "0.0"],
    ]


def test_a_second_count_is_shown_where_it_says_something_else(tmp_path):
    rows = [replace(EXIT, relative_ops=0.35), replace(EXIT, exit=1, group="block 2", relative_ops=0.9)]
    note = NoteRow("pets", "ztw", 0, "relative_ops", "Counted by hand.")
    other = replace(note, about="value", text="Nothing to do with it.")
    found = told([folder_of(tmp_path, *rows, note, other)])
    [table] = tables_in(found)
    assert table.header[-1] == "ztw ops"
    assert [line[-1] for line in table.rows] == ["0.350", "0.900"]
    [caption] = [block.text for block in found if isinstance(block, Paragraph)]
    assert caption.endswith("Ops: the same as MACs by another count. Counted by hand.")


def test_groups_are_told_from_the_cheapest_on(tmp_path):
    dear = replace(GROUP, group="dog", relative_macs=0.6)
    blocks = told([folder_of(tmp_path, BUDGET, dear, GROUP)])
    table = tables_in(blocks)[-1]
    assert [line[0] for line in table.rows] == ["cat", "dog"]
    assert table.rows[0] == ["cat", "70.00", "0.400", "75 / 25", "500"]


def test_a_picture_is_shown_or_said_to_be_missing(tmp_path):
    folder = folder_of(tmp_path / "run", PICTURE)
    assert any(isinstance(block, Paragraph) and "missing" in block.text for block in told([folder]))
    (folder / "eval" / "images.png").write_bytes(b"png")
    assert any(isinstance(block, Picture) and block.caption == "easy ones" for block in told([folder]))


def of_two_seeds(path):
    """Exits that gain 2 and lose 4 points on the static network of their own seed, at about half of the MACs."""
    static = replace(BUDGET, method="static", label="width 0.5", choice="fixed", budget=0.5, relative_macs=0.5)
    values = {0: (0.8, 0.78), 1: (0.9, 0.94)}
    folders = []
    for seed, (exits, fixed) in values.items():
        rows = [BUDGET, replace(BUDGET, choice="area", budget=1.0, value=0.6 + 0.1 * seed)]
        rows = [replace(row, value=exits if row is BUDGET else row.value, run_seed=seed) for row in rows]
        folders.append(
            folder_of(path / "ztw" / f"s{seed}", *rows, replace(GROUP, run_seed=seed, value=0.5 + 0.2 * seed))
        )
        folders.append(folder_of(path / "static" / f"s{seed}", replace(static, run_seed=seed, value=fixed)))
    return folders


def test_a_line_of_means_is_told_first_and_the_seeds_behind_it(tmp_path):
    folders = of_two_seeds(tmp_path)
    blocks = told([*folders, folder_of(tmp_path / "again", BUDGET)])
    means, seeds, spent, fixed, groups = tables_in(blocks)
    assert means.rows == [["ztw", "honest", "85.00", "65.00"]]
    assert seeds.folded
    assert seeds.rows == [["ztw, seed 0", "honest", "80.00", "60.00"], ["ztw, seed 1", "honest", "90.00", "70.00"]]
    assert spent.rows == [["ztw", "honest", "real", "0.490"]]
    assert fixed.rows == [["static width 0.5", "0.500", "86.00", "78.00 / 94.00"]]
    assert groups.rows == [["cat", "60.00", "0.400", "75 / 25", "500"]]
    assert "mean of 2 seeds" in groups.folded
    [caption] = [block.text for block in blocks if isinstance(block, Paragraph) and "budget is a share" in block.text]
    assert "Means over 2 training seeds." in caption
    assert sections.csv_files(gather(folders))["budgets.csv"].count("\n") == 7


def test_a_seed_is_compared_with_the_network_of_its_own_seed(tmp_path):
    [bullets] = [block for block in told(of_two_seeds(tmp_path)) if isinstance(block, Bullets)]
    [(badge, _, text)] = bullets.items
    assert badge == "no clear difference"
    assert text.startswith("static width 0.5 has 86.00 % at 0.500 of the MACs: ztw reaches 85.00 % with 0.490")
    assert "difference -1.00 [" in text
    assert text.endswith("seed by seed +2.00, -4.00.")


def test_networks_without_a_seed_in_common_are_not_compared(tmp_path):
    static = replace(BUDGET, method="static", label="width 0.5", choice="fixed", budget=0.5, relative_macs=0.5)
    folders = [
        folder_of(tmp_path / f"s{seed}", replace(BUDGET, run_seed=seed), replace(static, run_seed=seed + 2))
        for seed in (0, 1)
    ]
    assert not [block for block in told(folders) if isinstance(block, Bullets)]
    both = told([*folders, folder_of(tmp_path / "s4", replace(static, run_seed=1))])
    [bullets] = [block for block in both if isinstance(block, Bullets)]
    assert len(bullets.items) == 1


def test_seeds_that_were_tested_on_other_numbers_of_rows_have_a_line_each(tmp_path):
    fixed = replace(BUDGET, method="layer_gates", choice="fixed", budget=0.5, relative_macs=0.5)
    folders = [
        folder_of(tmp_path / "s0", BUDGET, fixed),
        folder_of(tmp_path / "s1", replace(fixed, run_seed=1, count=500, value=0.6)),
        folder_of(tmp_path / "s2", replace(fixed, run_seed=2, value=0.9)),
    ]
    lines = [line for table in tables_in(told(folders)) for line in table.rows if line[0].startswith("layer_gates")]
    assert lines == [
        ["layer_gates (1000 rows)", "0.500", "85.00", "80.00 / 90.00"],
        ["layer_gates (500 rows)", "0.500", "60.00", ""],
    ]


def test_what_one_seed_lacks_has_no_mean_and_a_network_trained_once_meets_all_seeds(tmp_path):
    folders = [
        folder_of(tmp_path / "s0", BUDGET, replace(BUDGET, budget=0.25, relative_macs=0.2)),
        folder_of(tmp_path / "s1", replace(BUDGET, run_seed=1, value=0.9)),
        folder_of(tmp_path / "given", replace(BUDGET, method="static", label="given", choice="fixed", value=0.7)),
    ]
    blocks = told(folders)
    assert tables_in(blocks)[0].header[2:4] == ["25 %", "50 %"]
    assert tables_in(blocks)[0].rows == [["ztw", "honest", "-", "85.00", "-"]]
    [bullets] = [block for block in blocks if isinstance(block, Bullets)]
    assert bullets.items[0][2].endswith("seed by seed +10.00, +20.00.")


def test_exits_and_pictures_of_several_seeds_are_told_once(tmp_path):
    folders = []
    for seed in (0, 1):
        rows = [replace(EXIT, exit=exit, run_seed=seed, value=0.5 + 0.1 * seed) for exit in (0, 1)]
        folders.append(folder_of(tmp_path / f"s{seed}", *rows, replace(PICTURE, run_seed=seed)))
        (folders[-1] / "eval" / "images.png").write_bytes(b"png")
    blocks = told(folders)
    [table] = tables_in(blocks)
    assert [line[2:] for line in table.rows] == [["0.300", "55.00", "0.0"]] * 2
    assert sum(isinstance(block, Picture) for block in blocks) == 1


def test_networks_of_one_exit_are_no_table_of_exits_and_of_budgets(tmp_path):
    row = replace(BUDGET, method="gates", choice="fixed", budget=0.49)
    other = replace(row, run_seed=1, budget=0.51, relative_macs=0.51)
    blocks = told([folder_of(tmp_path, row, replace(EXIT, method="gates")), folder_of(tmp_path / "s1", other)])
    assert [block.text for block in blocks if isinstance(block, Heading)] == ["Networks without early exits"]
    [table] = tables_in(blocks)
    assert table.rows == [["gates", "0.500", "80.00", "80.00 / 80.00"]]


def test_the_section_has_a_title_per_task(tmp_path):
    [title] = [block.text for block in told([folder_of(tmp_path / "one", BUDGET)]) if isinstance(block, Heading)]
    assert title == "Accuracy at a compute budget"
    blocks = told([folder_of(tmp_path, BUDGET, replace(BUDGET, task="birds"))])
    titles = [block.text for block in blocks if isinstance(block, Heading)]
    assert titles == ["Accuracy at a compute budget: pets", "Accuracy at a compute budget: birds"]
