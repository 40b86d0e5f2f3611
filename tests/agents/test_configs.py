"""Every config that comes with rlexit resolves to settings that can be used."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from agents import zoo
from agents.config import AgentsConfig
from agents.domain import AgentsDomain
from rlexit import checkpoint
from rlexit.config import METHODS
from rlexit.resources import config_folder
from rlexit.settings import Place, locate, resolve, to_yaml

FOLDER = config_folder() / "agents"
CONTENTS = {
    path.relative_to(FOLDER).with_suffix("").as_posix(): yaml.safe_load(path.read_text(encoding="utf-8"))
    for path in sorted(FOLDER.rglob("*.yaml"))
}
# A config says what it is a config of; a preset says nothing of that, and goes on top of one.
CONFIGS = [name for name, content in CONTENTS.items() if "domain" in content]
PRESETS = [name for name, content in CONTENTS.items() if "domain" not in content]
GAMES = ("air_raid", "breakout", "ms_pacman", "phoenix", "pong", "qbert", "riverraid", "seaquest")


def resolved(name: str, *words: str) -> AgentsConfig:
    config = resolve(locate(name, Path("runs")), words)
    assert isinstance(config, AgentsConfig)
    return config


def test_there_are_configs_and_presets():
    assert set(GAMES) < set(CONFIGS)
    assert "fast" in PRESETS


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_resolves_and_comes_back_from_its_own_yaml(name, tmp_path):
    config = resolved(name)
    assert set(config.methods) <= set(METHODS)
    (tmp_path / "again.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert resolve(Place(tmp_path / "again.yaml", tmp_path), []) == config


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_of_a_game_that_is_there(name):
    domain = AgentsDomain(resolved(name))
    assert domain.protocol()["game"] == domain.task
    assert domain.blank(METHODS["ztw"]).exits == len(resolved(name).network.taps) + 1


@pytest.mark.parametrize("name", CONTENTS)
def test_a_config_says_in_its_first_line_what_it_is(name):
    first = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ")
    assert first.endswith((".", ":")) or len(first) > 40


@pytest.mark.parametrize("game", GAMES)
def test_the_games_of_the_paper_are_played_with_the_paper_s_settings(game):
    assert CONTENTS[game] == {"domain": "agents", "env": {"game": game}}
    config = resolved(game)
    assert (config.env.sticky, config.env.frame_skip, config.env.frame_stack) == (0.1, 4, 4)
    assert config.train.total_steps == 10_000_000
    assert config.network.taps == ("conv1", "conv2")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_goes_on_top_of_any_game(name):
    content = CONTENTS[name]
    assert "env" not in content
    for game in ("pong", "seaquest"):
        plain, preset = resolved(game), resolved(game, "--config", name)
        assert preset != plain
        assert preset.env == plain.env
        for section, values in content.items():
            for key, value in values.items():
                assert getattr(getattr(preset, section), key) == value
        last = resolved(game, "--config", name, "--train.total_steps", "64000")
        assert last.train.total_steps == 64_000


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_alone_is_refused_with_how_to_use_it(name):
    with pytest.raises(ValueError, match=rf"`domain` in `{name}\.yaml` .* NAME --config PRESET"):
        resolve(locate(name, Path("runs")), [])


@pytest.mark.parametrize("name", [name for name in CONFIGS if CONTENTS[name].get("teacher") == "zoo"])
def test_a_config_of_a_shipped_teacher_plays_by_its_protocol(name, tmp_path):
    config = resolved(name)
    assert checkpoint.load_facts(zoo.folder(config.env.game), zoo.TEACHER)["env"]["game"] == config.env.game
    zoo.copy(config.env.game, tmp_path)
    AgentsDomain(config).accept(tmp_path)
