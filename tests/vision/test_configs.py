"""Every vision config that comes with rlexit resolves to settings that can be used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlexit.calibrate import check_target
from rlexit.config import METHODS
from rlexit.costs import cost_table
from rlexit.resources import config_files, config_folder
from rlexit.settings import Place, locate, resolve, to_yaml
from vision.config import VisionConfig
from vision.network import classifier

FOLDER = config_folder() / "vision"
NAMES = [path.relative_to(FOLDER).with_suffix("").as_posix() for path in sorted(FOLDER.rglob("*.yaml"))]
SIDES = {"cifar10": (10, 32), "cifar100": (100, 32), "toy": (4, 16)}


def resolved(name: str, *words: str) -> VisionConfig:
    config = resolve(locate(name, Path("runs")), words)
    assert isinstance(config, VisionConfig)
    return config


def test_there_are_configs():
    assert {"toy", "cifar10/resnet20", "cifar10/resnet56_ztw"} < set(NAMES) <= set(config_files())


@pytest.mark.parametrize("name", NAMES)
def test_a_config_resolves_and_comes_back_from_its_own_yaml(name, tmp_path):
    config = resolved(name)
    assert set(config.methods) <= set(METHODS)
    (tmp_path / "again.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert resolve(Place(tmp_path / "again.yaml", tmp_path), []) == config


@pytest.mark.parametrize("name", NAMES)
def test_a_config_can_be_built_and_its_targets_can_be_met(name):
    config = resolved(name)
    classes, side = SIDES[config.data.kind]
    network = classifier(config.backbone, classes, side, network=config.network, head=config.head, cascade=True)
    costs = cost_table(network.eval(), torch.zeros((1, 3, side, side), dtype=torch.uint8))
    for target in config.calibrate.target_macs:
        check_target(costs, target)


@pytest.mark.parametrize("name", NAMES)
def test_a_config_says_in_its_first_line_what_it_is(name):
    first = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ")
    assert first.endswith((".", ":")) or len(first) > 40


def test_what_a_config_leaves_open_is_the_paper_s():
    config = resolved("cifar10/resnet56_ztw")
    assert (config.head.stride, config.head.padding, config.head.layer_norm) == (1, 1, False)
    assert (config.train.epochs, config.train.learning_rate, config.train.weight_decay) == (100, 0.1, 1e-4)
    assert config.distill.label_weight == 1
    assert config.evaluate.episodes == 10


def test_the_place_of_the_data_has_a_short_name():
    from rlexit.cli import _shorthand

    words = [_shorthand(word) for word in ("--data", "/somewhere")]
    assert resolved("cifar10/resnet20", *words).data.path == "/somewhere"


def test_settings_are_read_without_torch():
    code = "import sys, vision.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--backbone.nam", "vgg"), r"`--backbone.nam` is no setting. Did you mean `--backbone.name`\?"),
        (("--backbone.name", "vggg"), "`backbone.name` must be one of .*resnet50"),
        (("--backbone.depth", "deep"), "`backbone.depth` must be of type int, got 'deep'"),
        (("--network.every", "0"), "`network.every` must be at least 1"),
        (("--head.padding", "2"), "`head.padding` must be 0 or 1"),
        (("--distill.frozen_precision", "bf16", "--distill.precision", "fp32"), "`distill.frozen_precision` must"),
    ],
)
def test_a_wrong_setting_is_answered_in_one_line(words, message):
    with pytest.raises(ValueError, match=message) as error:
        resolved("toy", *words)
    assert "\n" not in str(error.value)
