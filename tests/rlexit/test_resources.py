"""Configs are found by name."""

from __future__ import annotations

import pytest
import yaml

from rlexit.resources import config_files


@pytest.fixture
def folder(tmp_path):
    for name in ("agents/pong.yaml", "vision/cifar10/resnet56_ztw.yaml", "sweeps/three_seeds.yaml"):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text("domain: x\n")
    return tmp_path


def test_a_config_is_named_by_its_path_below_the_domain(folder):
    assert config_files(folder) == {
        "cifar10/resnet56_ztw": folder / "vision" / "cifar10" / "resnet56_ztw.yaml",
        "pong": folder / "agents" / "pong.yaml",
        "three_seeds": folder / "sweeps" / "three_seeds.yaml",
    }


def test_names_come_in_alphabetical_order(folder):
    assert list(config_files(folder)) == ["cifar10/resnet56_ztw", "pong", "three_seeds"]


def test_only_yaml_files_are_configs(folder):
    (folder / "agents" / "notes.md").write_text("no config")
    (folder / "agents" / "pong.yaml~").write_text("no config")
    assert len(config_files(folder)) == 3


def test_a_name_in_two_domains_is_an_error_that_names_both(folder):
    (folder / "vision" / "pong.yaml").write_text("domain: vision\n")
    with pytest.raises(ValueError, match="'pong' in agents and vision"):
        config_files(folder)


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="`folder` must be a folder of configs"):
        config_files(tmp_path / "absent")


def test_pong_comes_with_the_package():
    config = yaml.safe_load(config_files()["pong"].read_text(encoding="utf-8"))
    assert config["domain"] == "agents"
    assert config["env"]["game"] == "pong"
