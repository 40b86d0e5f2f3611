"""Run folders: done once, resumed when unfinished, never overwritten unasked."""

from __future__ import annotations

import json

import pytest

from rlexit import runfolder
from rlexit.runfolder import FolderError, Stage, config_hash, environment, flatten, write_json

SETTINGS = {"teacher": "abc", "distill": {"steps": 100, "rate": 0.1}}
CONFIG = {"everything": True}


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path / "run", "distill", SETTINGS, CONFIG, ("state*", "tb"))


def other(stage: Stage, **changes) -> Stage:
    """The same stage of another config."""
    settings = {**SETTINGS, "distill": {**SETTINGS["distill"], **changes}}
    return Stage(stage.folder, stage.name, settings, CONFIG, stage.owns)


def work(stage: Stage) -> None:
    """Leaves what a stage leaves, and something of another."""
    for name in ("state.json", "state-1.safetensors", "teacher.json"):
        (stage.folder / name).write_text("x")
    (stage.folder / "tb").mkdir(exist_ok=True)
    (stage.folder / "tb" / "events").write_text("x")


def test_a_stage_is_begun_finished_and_then_left_alone(stage):
    assert not stage.is_done()
    assert stage.begin() is True
    assert not stage.is_done()
    stage.finish({"score": 21.0})
    assert stage.is_done()
    assert stage.begin() is False
    assert stage.result() == {"score": 21.0}


def test_a_begun_stage_says_with_what_it_was_begun(stage):
    stage.begin()
    stage.begin()
    found = json.loads((stage.folder / "distill.run.json").read_text())
    assert found["settings"] == SETTINGS
    assert found["config"] == CONFIG
    assert found["hash"] == stage.hash
    assert found["attempts"] == 2
    assert {"argv", "time", "commit", "versions", "machine", "threads"} <= found.keys()


def test_an_unfinished_stage_is_resumed_and_keeps_what_it_made(stage):
    stage.begin()
    work(stage)
    assert stage.begin() is True
    assert (stage.folder / "state.json").exists()


def test_the_result_of_an_unfinished_stage_names_the_verb(stage):
    with pytest.raises(
        FolderError, match=rf"`{stage.folder}` must hold a finished distill, got none. Run `rlexit distill`"
    ):
        stage.result()


@pytest.mark.parametrize("finished", [False, True])
def test_a_stage_of_another_config_is_refused_and_the_setting_named(stage, finished):
    stage.begin()
    work(stage)
    if finished:
        stage.finish({})
    says = r"holds distill of another config \(`distill.steps` is 100 there, 200 here\). Use --force to start it over"
    with pytest.raises(FolderError, match=says):
        other(stage, steps=200).begin()
    with pytest.raises(FolderError, match=r"\(`distill.rate` is 0.1 there, 0.5 here and 1 more\)"):
        other(stage, steps=200, rate=0.5).begin()
    with pytest.raises(FolderError, match=r"\(`distill.new` is None there, 1 here\)"):
        other(stage, new=1).begin()
    assert (stage.folder / "state.json").exists()
    assert stage.is_done() is finished


def test_a_stage_that_made_nothing_stands_in_nobodys_way(stage):
    stage.begin()
    changed = other(stage, steps=200)
    assert changed.begin() is True
    assert json.loads((stage.folder / "distill.run.json").read_text())["attempts"] == 1
    work(changed)
    with pytest.raises(FolderError, match="of another config"):
        stage.begin()


def test_force_starts_a_stage_of_another_config_over_and_leaves_other_stages(stage):
    stage.begin()
    work(stage)
    stage.finish({})
    changed = other(stage, steps=200)
    assert changed.begin(force=True) is True
    assert sorted(path.name for path in stage.folder.iterdir()) == ["distill.run.json", "teacher.json"]
    assert not changed.is_done()
    changed.finish({"new": 1})
    assert changed.begin() is False
    assert not stage.is_done()


def test_force_does_a_finished_stage_again(stage):
    stage.begin()
    work(stage)
    stage.finish({})
    assert stage.begin(force=True) is True
    assert not (stage.folder / "state.json").exists()
    assert not stage.is_done()


def test_force_goes_on_with_an_unfinished_stage_of_the_same_config(stage):
    stage.begin()
    work(stage)
    assert stage.begin(force=True) is True
    assert (stage.folder / "state.json").exists()


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00"])
def test_a_damaged_note_is_refused_by_its_name_and_force_gets_past_it(stage, text):
    stage.begin()
    work(stage)
    path = stage.folder / "distill.run.json"
    path.write_text(text)
    with pytest.raises(FolderError, match=rf"`{path}`.*Remove it, or use --force"):
        stage.begin()
    assert stage.begin(force=True) is True
    assert json.loads(path.read_text())["hash"] == stage.hash
    assert not (stage.folder / "state.json").exists()


def test_a_kill_between_the_two_notes_leaves_an_unfinished_stage(stage, monkeypatch):
    stage.begin()
    work(stage)

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runfolder.checkpoint, "write_atomic", killed)
        with pytest.raises(KeyboardInterrupt):
            stage.finish({"score": 1})
    assert not stage.is_done()
    assert stage.begin() is True


def test_notes_are_json_and_hold_no_nan(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert not (tmp_path / "a.json").exists()


def test_equal_settings_have_equal_hashes_whatever_their_order():
    assert config_hash({"a": 1, "b": [1, 2]}) == config_hash({"b": [1, 2], "a": 1})
    assert config_hash({"a": 1}) != config_hash({"a": 1.5})
    assert len(config_hash({})) == 16


def test_nested_settings_have_dotted_names():
    assert flatten({"a": {"b": {"c": 1}, "d": [2]}, "e": None}) == {"a.b.c": 1, "a.d": [2], "e": None}


def test_the_environment_names_what_numbers_depend_on():
    found = environment()
    assert {"python", "torch", "numpy"} <= found["versions"].keys()
    assert found["threads"] >= 1
    assert "cores" in found["machine"]
    json.dumps(found, allow_nan=False)
