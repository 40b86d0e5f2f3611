"""Bad data and bad weights by the command line: one line that names file, row or key, and nothing half-written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rlexit.cli import main
from tests.vision.small_images import hub_folder, pairs, png
from vision.config import BackboneConfig
from vision.network import classifier, weights

pytest.importorskip("datasets", reason="needs datasets: pip install 'rlexit[vision]'")
SETTINGS = (
    "--threads",
    "1",
    "--backbone.width",
    "0.25",
    "--train.epochs",
    "1",
    "--data.crop",
    "0",
    "--data.flip",
    "false",
)


def with_train(name: str, row: int, image: bytes) -> Callable[[Path], Path]:
    """Good data but for one training image."""

    def make(root: Path) -> Path:
        rows = pairs(8)
        rows[row] = (image, 0)
        return hub_folder(root / name, rows, pairs(4))

    return make


def empty(root: Path) -> Path:
    (root / "empty").mkdir()
    return root / "empty"


def of_one_class_but_one(root: Path) -> Path:
    return hub_folder(root / "rare", [*pairs(9, classes=1), (png(50), 1)], pairs(4))


def beyond(root: Path) -> Path:
    return hub_folder(root / "beyond", pairs(8), [*pairs(2), (png(3), 4)], classes=None)


DATA = {
    "columns": (lambda root: hub_folder(root / "named", pairs(8), pairs(4), ("image", "target")), "the column 'img'"),
    "grey": (with_train("grey", 5, png(5, mode="L")), "mode L in row 5 of the train split"),
    "not square": (with_train("wide", 3, png(5, height=4)), "8 x 4 in row 3 of the train split"),
    "another size": (with_train("large", 6, png(5, side=12)), "row 6 of the train split"),
    "corrupt": (with_train("cut", 7, png(5)[:60]), "a corrupt one in row 7 of the train split"),
    "label": (beyond, "`label` in row 2 of the test split"),
    "empty": (empty, "the empty folder"),
    "absent class": (of_one_class_but_one, "of class 'dog' in the train images"),
}


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The line by which a training is refused."""
    capsys.readouterr()
    assert main(["train", "cifar10/resnet20", *words, *SETTINGS]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    left = [path.name for path in Path("runs").rglob("*") if path.is_file()] if Path("runs").is_dir() else []
    assert not [
        name for name in left if name.startswith("teacher.") or name.endswith((".safetensors", ".done.json", ".tmp"))
    ]
    return line


@pytest.mark.parametrize("case", DATA)
def test_bad_data_is_named(tmp_path, monkeypatch, capsys, case):
    monkeypatch.chdir(tmp_path)
    make, told = DATA[case]
    assert told in refused(capsys, "--data", str(make(tmp_path)), "--data.holdout", "0.2")


@pytest.mark.parametrize(
    ("classes", "width", "told"),
    [
        (7, 0.25, "`linear.weight` in `{path}` must be (2, 16), got (7, 16)"),
        (2, 0.5, "`conv1.weight` in `{path}` must be (4, "),
    ],
)
def test_weights_of_other_classes_or_another_shape_are_named(tmp_path, monkeypatch, capsys, classes, width, told):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "given.safetensors"
    save_file(weights(classifier(BackboneConfig(depth=20, width=width), classes, 8)), path)
    data = hub_folder(tmp_path / "pets", pairs(40), pairs(8))
    line = refused(capsys, "--data", str(data), "--teacher", str(path))
    assert told.format(path=path) in line


def test_weights_with_a_key_too_much_or_cut_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = str(hub_folder(tmp_path / "pets", pairs(40), pairs(8)))
    more = {**weights(classifier(BackboneConfig(depth=20, width=0.25), 2, 8)), "extra.weight": torch.zeros(3)}
    save_file(more, tmp_path / "more.safetensors")
    assert "`extra.weight`" in refused(capsys, "--data", data, "--teacher", str(tmp_path / "more.safetensors"))
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "more.safetensors").read_bytes()[:-10])
    line = refused(capsys, "--data", data, "--teacher", str(tmp_path / "cut.safetensors"))
    assert f"`{tmp_path / 'cut.safetensors'}` is cut" in line
