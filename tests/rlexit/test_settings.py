"""Settings: where they come from, who wins, and what a wrong one is told."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from rlexit import cli
from rlexit.resources import CONFIG
from rlexit.settings import Place, locate, resolve, to_yaml


def pong(*words: str):
    """The Pong config with the shell's words on top."""
    return resolve(locate("pong", Path("runs")), words)


def written(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def refusal(*words: str) -> str:
    with pytest.raises((ValueError, LookupError)) as caught:
        pong(*words)
    text = str(caught.value)
    assert "\n" not in text
    return text


def file_refusal(path: Path) -> str:
    """What is said of a file that is put on top of Pong."""
    return refusal("--config", str(path))


# ---- who wins ----


def test_a_config_is_its_file_on_top_of_the_defaults():
    config = pong()
    assert config.env.game == "pong"
    assert config.domain == "agents"
    assert config.train.total_steps == 10_000_000
    assert config.train.n_envs == 8


def test_the_shell_wins_over_a_file_and_a_file_over_the_name(tmp_path):
    file = written(tmp_path / "mine.yaml", {"train": {"n_envs": 4, "gamma": 0.5}})
    config = pong("--config", "fast", "--config", str(file), "--train.n_envs", "2")
    assert config.train.n_envs == 2  # shell
    assert config.train.gamma == 0.5  # file
    assert config.train.anneal is True  # preset
    assert config.train.n_steps == 128  # default
    assert config.env.game == "pong"  # name


def test_of_two_files_the_later_wins(tmp_path):
    first = written(tmp_path / "first.yaml", {"train": {"n_envs": 4}})
    second = written(tmp_path / "second.yaml", {"train": {"n_envs": 2}})
    assert pong("--config", str(first), "--config", str(second)).train.n_envs == 2
    assert pong("--config", str(second), "--config", str(first)).train.n_envs == 4


def test_the_shell_wins_wherever_it_stands():
    assert pong("--train.n_envs", "2", "--config", "fast").train.n_envs == 2
    assert pong("--config", "fast").train.n_envs == 16


def test_of_two_words_the_later_wins():
    assert pong("--train.n_envs", "4", "--train.n_envs=2").train.n_envs == 2


def test_a_preset_does_not_reset_what_it_does_not_name():
    assert pong("--config", "fast").train.gamma == pong().train.gamma


# ---- how values are spelled ----


def test_a_power_of_ten_is_an_integer():
    assert pong("--train.total_steps", "1e6").train.total_steps == 1_000_000
    assert pong("--train.total_steps=2.5e6").train.total_steps == 2_500_000
    assert pong("--distill.steps", "3E+5").distill.steps == 300_000
    assert isinstance(pong("--train.total_steps", "1e6").train.total_steps, int)


def test_a_fraction_is_no_integer():
    assert refusal("--train.total_steps", "1.5") == "`train.total_steps` must be of type int, got '1.5'."
    assert "train.total_steps" in refusal("--train.total_steps", "1e-3")


def test_a_single_value_makes_a_tuple_and_so_do_several():
    assert pong("--calibrate.target_macs", "0.4").calibrate.target_macs == (0.4,)
    assert pong("--calibrate.target_macs", "0.4,0.6").calibrate.target_macs == (0.4, 0.6)
    assert pong("--calibrate.target_macs", "[0.4, 0.6]").calibrate.target_macs == (0.4, 0.6)
    assert pong("--calibrate.target_macs", "[]").calibrate.target_macs == ()
    assert pong("--methods", "sdn").methods == ("sdn",)
    assert pong("--methods=sdn,ztw").methods == ("sdn", "ztw")


def test_booleans_and_floats_are_read():
    config = pong("--distill.reference", "true", "--env.sticky", "0", "--train.learning_rate", "1e-3")
    assert config.distill.reference is True
    assert config.env.sticky == 0
    assert config.train.learning_rate == 0.001


def test_files_spell_values_as_yaml_does(tmp_path):
    content = {"train": {"total_steps": 500}, "methods": ["sdn"], "calibrate": {"target_macs": [0.5, 1]}}
    config = pong("--config", str(written(tmp_path / "mine.yaml", content)))
    assert config.train.total_steps == 500
    assert config.methods == ("sdn",)
    assert config.calibrate.target_macs == (0.5, 1.0)


# ---- what a wrong setting is told ----


def test_an_unknown_key_in_the_shell_names_the_nearest():
    assert refusal("--train.n_env", "4") == "`--train.n_env` is no setting. Did you mean `--train.n_envs`?"
    assert refusal("--total_steps", "4") == "`--total_steps` is no setting. Did you mean `--train.total_steps`?"
    assert refusal("--zzzzzz", "4") == "`--zzzzzz` is no setting. `--print_config` shows all settings."


def test_an_unknown_key_in_a_file_names_the_nearest_and_the_file(tmp_path):
    file = written(tmp_path / "mine.yaml", {"train": {"n_env": 4}})
    assert file_refusal(file) == "`train.n_env` in `mine.yaml` is no setting. Did you mean `train.n_envs`?"
    file = written(tmp_path / "mine.yaml", {"trian": {"n_envs": 4}})
    assert "`trian` in `mine.yaml` is no setting." in file_refusal(file)
    file = written(tmp_path / "mine.yaml", {"train": {"n_envs": {"deep": 1}}})
    assert "train.n_envs" in file_refusal(file)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--train.n_envs", "many"), "`train.n_envs` must be of type int, got 'many'"),
        (("--distill.reference", "maybe"), "`distill.reference` must be of type bool, got 'maybe'"),
        (("--env.sticky", "often"), "`env.sticky` must be of type float, got 'often'"),
        (("--calibrate.target_macs", "half"), "`calibrate.target_macs`"),
        (("--train.n_envs", "null"), "`train.n_envs`"),
        (("--train", "5"), "`--train` is no setting"),
    ],
)
def test_a_wrong_type_names_the_setting_and_the_value(words, says):
    assert says in refusal(*words)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--env.sticky", "1.5"), "`env.sticky` must be in [0, 1], got 1.5."),
        (("--env.sticky", "nan"), "`env.sticky` must be"),
        (("--env.sticky", ".nan"), "`env.sticky` must be in [0, 1], got nan."),
        (("--train.n_envs", "0"), "`train.n_envs` must be at least 1, got 0."),
        (("--train.batch_size", "300"), "`train.batch_size` must divide the rollout, got 300."),
        (("--calibrate.confidence", "1"), "`calibrate.confidence` must be in [0.5, 1), got 1"),
        (("--calibrate.target_macs", "0.5,-1"), "`calibrate.target_macs` must be positive, got -1"),
        (
            ("--calibrate.rule", "guess"),
            "`calibrate.rule` must be one of confidence, entropy, learned, margin, patience",
        ),
        (("--methods", "stw"), "`methods` must be of ztw, sdn"),
        (("--methods", "[]"), "`methods` must name at least one"),
        (("--distill.learning_rate", ".inf"), "`distill.learning_rate` must be between 0 and 1, got inf"),
        (("--head.stride", "-1"), "`head.stride` must be in 0..64, got -1. 0 leaves the convolution out."),
    ],
)
def test_a_value_out_of_range_is_told_its_range(words, says):
    assert says in refusal(*words)


def test_words_without_a_place_are_refused():
    assert refusal("fast") == "`fast` was not expected here. Settings are given as --section.key value."
    assert refusal("--train.n_envs") == "`--train.n_envs` needs a value, got none."
    assert "must be a file or a config's name, got 'nowhere'" in file_missing("nowhere")


def file_missing(name: str) -> str:
    with pytest.raises(FileNotFoundError) as caught:
        pong("--config", name)
    return str(caught.value)


def test_a_setting_that_has_no_default_is_asked_for(tmp_path):
    file = written(tmp_path / "gameless.yaml", {"domain": "agents"})
    with pytest.raises(ValueError, match="game"):
        resolve(locate(str(file), Path("runs")), [])


def test_a_config_without_a_domain_is_refused(tmp_path):
    for content in ({"train": {"n_envs": 4}}, {"domain": "robots"}):
        file = written(tmp_path / "nowhere.yaml", content)
        with pytest.raises(ValueError, match=r"`domain` in `nowhere.yaml` must be one of agents, vision, got"):
            resolve(locate(str(file), Path("runs")), [])


# ---- files that are no settings ----

ANCHORS = [
    "train: &a {n_envs: 4}\n",
    "train: {&a n_envs: 4}\n",
    "? &a train\n: {n_envs: 4}\n",
    "methods: [&a ztw, *a]\n",
    'methods: [&a "ztw"]\n',
    "train:\n  <<: *defaults\n",
]


@pytest.mark.parametrize("text", ANCHORS)
def test_anchors_and_aliases_are_refused(tmp_path, text):
    said = file_refusal(written(tmp_path / "mine.yaml", text))
    assert "mine.yaml` must hold no YAML anchors or aliases. Write the values out." in said


def test_a_few_bytes_that_would_become_many_are_refused(tmp_path):
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n"
    for last, name in pairwise("abcdefghi"):
        bomb += f"{name}: &{name} [{','.join(['*' + last] * 9)}]\n"
    assert "anchors" in file_refusal(written(tmp_path / "mine.yaml", bomb))


def test_a_star_or_ampersand_in_a_comment_or_a_string_is_no_anchor(tmp_path):
    text = "# the *paper* has 8 &more\ntrain:\n  n_envs: 4  # *not* an alias\n"
    assert pong("--config", str(written(tmp_path / "mine.yaml", text))).train.n_envs == 4


@pytest.mark.parametrize(
    "text",
    [
        "teacher: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['CANARY']]\n",
        "teacher: !!python/object/new:pathlib.Path ['CANARY']\n",
        "teacher: !!python/object/apply:os.system ['touch CANARY']\n",
        "teacher: !!python/name:os.system\n",
        "teacher: !unknown x\n",
    ],
)
def test_a_file_runs_nothing(tmp_path, text):
    canary = tmp_path / "canary"
    said = file_refusal(written(tmp_path / "mine.yaml", text.replace("CANARY", str(canary))))
    assert "mine.yaml` is no YAML that rlexit reads" in said
    assert not canary.exists()


def test_a_word_of_the_shell_runs_nothing(tmp_path):
    canary = tmp_path / "canary"
    for name in ("--teacher", "--methods", "--train.n_envs", "--env.game"):
        refusal_or_text(name, f"!!python/object/apply:os.system ['touch {canary}']")
    assert not canary.exists()


def refusal_or_text(*words: str) -> None:
    try:
        config = pong(*words)
    except (ValueError, LookupError):
        return
    assert isinstance(config.env.game, str)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[1, 2]", "must hold settings by name, got list"),
        ("just words", "must hold settings by name, got str"),
        ("", "must hold settings by name, got NoneType"),
        ("a: [", "is no YAML that rlexit reads"),
        ("\x00", "is no YAML that rlexit reads"),
        ("a: " + "[" * 200_000, "must nest at most 20 levels deep"),
        ("- " * 100_000, "must nest at most 20 levels deep"),
        ("#" * (256 << 10) + "\n\n", "must have at most 262144 bytes"),
        ("3: 4", "`3` in `mine.yaml` is no setting"),
        ("train: {3: 4}", "`train.3` in `mine.yaml` is no setting"),
    ],
)
def test_a_file_that_holds_no_settings_is_refused(tmp_path, text, says):
    assert says in file_refusal(written(tmp_path / "mine.yaml", text))


def test_a_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xff\xfe\xfa")
    assert "is no YAML that rlexit reads" in file_refusal(path)


# ---- back and forth ----

CHANGES = ("--train.total_steps", "1e6", "--methods=sdn", "--calibrate.target_macs=0.3,0.7", "--env.sticky", "0.25")


def test_a_config_written_out_reads_back_equal(tmp_path):
    config = pong("--config", "fast", *CHANGES)
    file = written(tmp_path / "again.yaml", to_yaml(config))
    assert resolve(locate(str(file), Path("runs")), []) == config
    assert pong("--config", str(file)) == config


def test_what_print_config_prints_reads_back_equal(tmp_path, capsys):
    assert cli.main(["distill", "pong", *CHANGES, "--print_config"]) == 0
    printed = capsys.readouterr().out
    file = written(tmp_path / "again.yaml", printed)
    assert resolve(locate(str(file), Path("runs")), []) == pong(*CHANGES)
    names = {field.name for field in dataclasses.fields(type(pong()))}
    assert yaml.safe_load(printed).keys() == names


# ---- what NAME is ----


def test_a_name_is_a_config_a_file_or_a_run(tmp_path):
    out = tmp_path / "runs"
    assert locate("pong", out).root == out / "pong"
    file = written(tmp_path / "my_pong.yaml", to_yaml(pong()))
    assert locate(str(file), out) == Place(file, out / "my_pong")
    run = out / "pong"
    written(run / CONFIG, to_yaml(pong("--train.n_envs", "2")))
    assert locate(str(run), out) == Place(run / CONFIG, run)
    assert resolve(locate(str(run), out), []).train.n_envs == 2


def test_a_folder_of_a_method_and_seed_stands_for_that_one_only(tmp_path):
    run = tmp_path / "pong"
    written(run / CONFIG, to_yaml(pong()))
    for name in ("sdn/s3", "sdn", "teacher"):
        (run / name).mkdir(parents=True, exist_ok=True)
    deep = locate(str(run / "sdn" / "s3"), tmp_path)
    assert (deep.root, deep.methods, deep.seed) == (run, ("sdn",), 3)
    assert resolve(deep, []) == pong()
    middle = locate(str(run / "sdn"), tmp_path)
    assert (middle.methods, middle.seed) == (("sdn",), 0)
    assert locate(str(run / "teacher"), tmp_path).methods == ()


def test_a_name_that_is_nothing_is_answered_with_the_nearest(tmp_path):
    with pytest.raises(LookupError, match=r"`NAME` must be a known name, got 'pogn'. Did you mean 'pong'\?"):
        locate("pogn", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"must be a run folder, got one without `config.yaml`"):
        locate(str(tmp_path), tmp_path)
