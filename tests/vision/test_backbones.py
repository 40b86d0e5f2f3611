"""Backbones: published sizes and costs to the unit, exits anywhere, and the given weights' logits exactly."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from rlexit.checkpoint import CheckpointError
from rlexit.config import HeadConfig
from rlexit.costs import cost_table, parameters
from rlexit.exit_policy import ExitPolicy
from rlexit.runtime import run
from rlexit.state import leaves_of
from rlexit.statedicts import ImportRefused
from rlexit.units import Unit
from vision.backbones import backbones
from vision.config import BACKBONES, BackboneConfig, NetworkConfig, VisionConfig
from vision.data import NORMALISATION
from vision.importers import MAX_BYTES, given_weights, read_weights
from vision.network import classifier, load_weights, weights

HEAD = VisionConfig().head
EVERY = NetworkConfig(every=1)
DATA = os.environ.get("RLEXIT_DATA", "")
SIDES = {"vgg": 32, "resnet50": 32}
NARROW = {
    name: BackboneConfig(name, width=0.125, depth={"resnet_cifar": 8, "wrn": 8, "densenet": 16}.get(name, 0))
    for name in BACKBONES
}
RESNET = BackboneConfig("resnet_cifar", 56)
WRN = BackboneConfig("wrn", 32, 4.0)


def side(name: str) -> int:
    return SIDES.get(name, 16)


def test_every_file_of_a_backbone_registers_it_under_its_own_name():
    assert tuple(backbones) == BACKBONES


# Parameters of the base and with all heads in a cascade, MACs of both, number of early exits: methods/ztw.md 3.3. The
# official head has no learnt mix where it does not pool: 4 numbers fewer on VGG, 2 fewer on MobileNet.
@pytest.mark.parametrize(
    ("config", "classes", "base", "heads", "unpooled", "full", "every", "exits"),
    [
        (RESNET, 10, 855_770, 1_456_411, 0, 125.75, 189.61, 27),
        (RESNET, 100, 861_620, 3_173_611, 0, 125.75, 191.33, 27),
        (BackboneConfig("vgg"), 10, 15_253_578, 31_972_979, 4, 313.73, 599.62, 14),
        (BackboneConfig("vgg"), 100, 15_299_748, 35_927_669, 4, 313.77, 603.58, 14),
        (WRN, 10, 7_404_074, 11_636_999, 0, 1185.34, 1751.93, 15),
        (WRN, 100, 7_427_204, 15_025_679, 0, 1185.36, 1755.31, 15),
        (BackboneConfig("mobilenet"), 10, 3_217_226, 38_472_647, 2, 46.35, 537.80, 13),
        (BackboneConfig("mobilenet"), 100, 3_309_476, 45_043_907, 2, 46.45, 544.37, 13),
    ],
    ids=lambda value: f"{value.name}" if isinstance(value, BackboneConfig) else None,
)
def test_sizes_and_costs_are_the_published_ones(config, classes, base, heads, unpooled, full, every, exits):
    network = classifier(config, classes, 32, network=EVERY, head=HEAD, cascade=True).eval()
    table = cost_table(network, torch.zeros((1, 3, 32, 32), dtype=torch.uint8))
    assert parameters(classifier(config, classes, 32)) == base
    assert parameters(network) == heads + unpooled
    assert network.exits == exits + 1
    assert round(table.full / 1e6, 2) == full
    assert round(table.exits[-1] / 1e6, 2) == every


def test_resnet_50_has_the_sizes_and_costs_of_torchvision_s():
    network = classifier(BackboneConfig("resnet50"), 1000, 224).eval()
    assert parameters(network) == 25_557_032
    assert cost_table(network, torch.zeros((1, 3, 224, 224), dtype=torch.uint8)).full == 4_089_184_256


# Million MACs by depth: methods/ddi_skipnet_blockdrop.md 3.1.
MACS = {
    "A": {8: 12.24, 14: 26.40, 20: 40.55, 26: 54.71, 32: 68.86, 38: 83.02, 44: 97.17, 56: 125.49, 74: 167.95}
    | {110: 252.89, 128: 295.36, 152: 351.98},
    "B": {8: 12.50, 14: 26.66, 20: 40.81, 26: 54.97, 32: 69.12, 38: 83.28, 44: 97.44, 56: 125.75, 74: 168.22}
    | {110: 253.15, 128: 295.62, 152: 352.24},
    "densenet": {40: 72.4, 76: 187.2, 82: 210.6, 88: 235.2, 94: 260.9, 100: 287.9},
}


@pytest.mark.parametrize(("family", "depth"), [(family, depth) for family in MACS for depth in MACS[family]])
def test_every_published_depth_costs_what_is_published(family, depth):
    named = BackboneConfig(family, depth) if family == "densenet" else BackboneConfig(depth=depth, shortcut=family)
    found = cost_table(classifier(named, 10, 32).eval(), torch.zeros((1, 3, 32, 32), dtype=torch.uint8)).full / 1e6
    assert round(found, 1 if family == "densenet" else 2) == MACS[family][depth]


def test_a_block_costs_the_same_in_every_group_and_less_where_it_strides():
    network = classifier(BackboneConfig(depth=38, shortcut="A"), 10, 32).eval()
    units = cost_table(network, torch.zeros((1, 3, 32, 32), dtype=torch.uint8)).units
    blocks = {name: macs for name, macs in units.items() if name.startswith("layer")}
    assert {macs for name, macs in blocks.items() if name not in ("layer2_0", "layer3_0")} == {4_718_592}
    assert blocks["layer2_0"] == blocks["layer3_0"] == 3_538_944


def test_resnets_with_option_a_have_no_weights_in_their_shortcuts():
    sizes = {depth: parameters(classifier(BackboneConfig(depth=depth, shortcut="A"), 10, 32)) for depth in (20, 56)}
    assert sizes == {20: 269_722, 56: 853_018}


@pytest.mark.parametrize("name", BACKBONES)
def test_every_block_can_have_an_exit_and_real_execution_agrees_with_all_at_once(name):
    torch.manual_seed(0)
    network = classifier(NARROW[name], 5, side(name), NORMALISATION["toy"], EVERY, HEAD, cascade=True).eval()
    images = torch.randint(0, 256, (3, 3, side(name), side(name)), dtype=torch.uint8)
    answers = network(images).answers
    assert answers.shape == (3, network.exits, 5)
    assert network.exits == sum(block.counts for block in backbones[name](NARROW[name], 5, side(name)).blocks) + 1
    for exit in (0, network.exits // 2, network.exits - 1):
        result = run(network, ExitPolicy.always(exit, network.exits), images)
        torch.testing.assert_close(result.answers, answers[:, exit], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", BACKBONES)
def test_declared_shapes_are_what_blocks_give(name):
    backbone = backbones[name](NARROW[name], 5, side(name))
    features: Any = torch.zeros(2, 3, side(name), side(name))
    for block in backbone.blocks:
        unit = block.module.eval()
        features = unit(features)
        seen = unit.tap(features) if isinstance(unit, Unit) else features
        assert seen.shape == (2, *block.shape), block.name
    assert backbone.head(features).shape == (2, 5)


@pytest.mark.parametrize("name", BACKBONES)
def test_units_leave_what_they_read_untouched(name):
    network = classifier(NARROW[name], 5, side(name), network=EVERY, head=HEAD).eval()
    state = network.begin(torch.randint(0, 256, (2, 3, side(name), side(name)), dtype=torch.uint8))
    while not network.finished(state):
        before = [leaf.clone() for leaf in leaves_of(state.features)]
        after = network.advance(state)
        assert all(map(torch.equal, leaves_of(state.features), before))
        state = after


@pytest.mark.parametrize("name", BACKBONES)
def test_plain_weights_come_back_and_heads_stay(name):
    first, second = (classifier(NARROW[name], 5, side(name), network=EVERY, head=HEAD) for _ in range(2))
    plain = {key: value.clone() for key, value in weights(first).items()}
    head = {key: value.clone() for key, value in second.head(0).state_dict().items()}
    load_weights(second, plain, "here")
    images = torch.rand(2, 3, side(name), side(name))
    torch.testing.assert_close(first.eval()(images).answers[:, -1], second.eval()(images).answers[:, -1])
    assert all(torch.equal(second.head(0).state_dict()[key], value) for key, value in head.items())


def test_weights_of_another_network_are_refused_and_change_nothing():
    network = classifier(NARROW["resnet_cifar"], 5, 16)
    before = {key: value.clone() for key, value in weights(network).items()}
    plain = {key: value + 1 for key, value in before.items()}
    with pytest.raises(CheckpointError, match=r"`linear.weight` in here must be \(5, 8\), got \(7, 8\)"):
        load_weights(network, {**plain, "linear.weight": torch.zeros(7, 8)}, "here")
    with pytest.raises(CheckpointError, match=r"`conv1.weight` in here must be .*, got nothing \(but 'stem.weight'\)"):
        load_weights(network, {("stem.weight" if k == "conv1.weight" else k): v for k, v in plain.items()}, "here")
    with pytest.raises(CheckpointError, match="`extra` in here belongs to no part"):
        load_weights(network, {**plain, "extra": torch.zeros(1)}, "here")
    assert all(torch.equal(value, before[key]) for key, value in weights(network).items())


def test_the_given_images_are_normalised_inside_whether_bytes_or_floats():
    network = classifier(NARROW["resnet_cifar"], 5, 8, ((0.5, 0.25, 0.0), (0.5, 0.5, 1.0))).eval()
    images = torch.tensor([0, 128, 255], dtype=torch.uint8).reshape(1, 3, 1, 1).expand(1, 3, 8, 8)
    prepared = network.prepare(images)
    torch.testing.assert_close(prepared[0, :, 0, 0], torch.tensor([-1.0, (128 / 255 - 0.25) / 0.5, 1.0]))
    torch.testing.assert_close(network.prepare(images / 255), prepared)
    assert not any(key in ("mean", "deviation") for key in network.state_dict())


@pytest.mark.parametrize(
    ("config", "side", "message"),
    [
        (BackboneConfig("resnet_cifar", 21), 32, r"`backbone.depth` must be 6n \+ 2 for resnet_cifar, got 21"),
        (BackboneConfig("vgg"), 48, "`data.side` must be a multiple of 32 for vgg"),
        (BackboneConfig("vgg", 19), 32, "`backbone.depth` must be 16 for vgg, got 19"),
        (BackboneConfig("mobilenet", 3), 32, "`backbone.depth` must be 0 for mobilenet"),
        (BackboneConfig("densenet", 41), 32, r"`backbone.depth` must be 6n \+ 4 for densenet, got 41"),
        (BackboneConfig("densenet", 40), 30, "`data.side` must be a multiple of 4 for densenet, got 30"),
        (BackboneConfig("resnet50", 51), 224, "`backbone.depth` must be one of 50, 101, 152"),
        (BackboneConfig("resnet50"), 16, "`data.side` must be at least 32 for resnet50"),
    ],
)
def test_a_backbone_that_cannot_be_built_says_why(config, side, message):
    with pytest.raises(ValueError, match=message):
        classifier(config, 10, side)


def test_exits_are_where_the_config_says():
    config = NARROW["resnet_cifar"]

    def names(**network) -> tuple[str, ...]:
        return classifier(config, 5, 16, network=NetworkConfig(**network), head=HEAD).exit_names

    assert names(every=1) == ("layer1_0", "layer2_0", "layer3_0", "pool")
    assert names(every=2) == ("layer2_0", "pool")
    assert names(taps=("layer3_0", "stem")) == ("stem", "layer3_0", "pool")
    with pytest.raises(ValueError, match="`network.every` must be at most 3, the number of blocks, got 4"):
        names(every=4)
    with pytest.raises(
        LookupError, match=r"`network.taps` must be a known name, got 'layer1.0'. Did you mean 'layer1_0'\?"
    ):
        names(taps=("layer1.0",))


@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, 1), (4, 1), (4, 0)])
def test_a_head_learns_from_gathered_features_what_it_reads_from_a_map(stride, padding):
    torch.manual_seed(0)
    settings = HeadConfig(stride=stride, padding=padding, channels=0.5, upsample=False)
    head = classifier(NARROW["resnet_cifar"], 5, 16, network=EVERY, head=settings).head(0)
    features = torch.randn(3, 2, 16, 16)
    torch.testing.assert_close(head.from_gathered(head.gather(features)), head(features), rtol=1e-5, atol=1e-5)


# ---- the given weights ----


def plain_resnet(tensors: dict[str, Tensor], images: Tensor) -> Tensor:
    """ResNet with option A, written straight from its description; no module of ours."""

    def norm(x: Tensor, name: str) -> Tensor:
        values = [tensors[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return functional.batch_norm(x, *values)

    mean, deviation = (torch.tensor(values).reshape(1, 3, 1, 1) for values in NORMALISATION["cifar10"])
    x = (images.float() / 255 - mean) / deviation
    x = norm(functional.conv2d(x, tensors["conv1.weight"], padding=1), "bn1").relu()
    blocks = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("layer1."))
    for group in (1, 2, 3):
        for index in range(blocks):
            name = f"layer{group}.{index}"
            stride = 2 if group > 1 and index == 0 else 1
            y = functional.conv2d(x, tensors[f"{name}.conv1.weight"], stride=stride, padding=1)
            y = functional.conv2d(norm(y, f"{name}.bn1").relu(), tensors[f"{name}.conv2.weight"], padding=1)
            if stride == 2:
                added = x.shape[1] // 2
                x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, added, added))
            x = (norm(y, f"{name}.bn2") + x).relu()
    return functional.linear(x.mean(dim=(2, 3)), tensors["linear.weight"], tensors["linear.bias"])


@pytest.mark.skipif(not DATA, reason="set RLEXIT_DATA to the folder of the given data and weights")
@pytest.mark.parametrize("depth", [20, 56])
def test_given_weights_give_the_logits_of_a_plain_resnet(depth):
    tensors = read_weights(Path(DATA) / "weights" / f"cifar10_resnet{depth}.safetensors")
    config = BackboneConfig("resnet_cifar", depth, shortcut="A")
    network = classifier(config, 10, 32, NORMALISATION["cifar10"], EVERY, HEAD, cascade=True).eval()
    load_weights(network, tensors, "here")
    torch.manual_seed(1)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(network(images).logits[:, -1], plain_resnet(tensors, images), rtol=1e-4, atol=1e-4)


# ---- files of weights ----


@pytest.mark.parametrize("name", ["nan.pt", "nan.safetensors"])
def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path, name):
    tensors = {"linear.weight": torch.full((2, 3), torch.nan)}
    torch.save(tensors, tmp_path / "nan.pt")
    save_file(tensors, tmp_path / "nan.safetensors")
    with pytest.raises(ImportRefused, match=rf"`linear.weight` in `.*{name}` must be finite"):
        read_weights(tmp_path / name)


def test_odd_numbers_and_doubled_names_are_refused(tmp_path):
    save_file({"a": torch.zeros(2).to(torch.float8_e5m2)}, tmp_path / "small.safetensors")
    with pytest.raises(ImportRefused, match="`a` in .* must be of ordinary numbers, got torch.float8"):
        read_weights(tmp_path / "small.safetensors")
    save_file({"a": torch.zeros(2), "module.a": torch.ones(2)}, tmp_path / "twice.safetensors")
    with pytest.raises(ImportRefused, match="must name each tensor once"):
        read_weights(tmp_path / "twice.safetensors")


def test_a_file_that_runs_something_is_refused_and_runs_nothing(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "canary",))

    torch.save({"linear.weight": torch.ones(2), "more": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ImportRefused, match="evil.pt` must be a plain state dict, got the name"):
        read_weights(tmp_path / "evil.pt")
    assert not (tmp_path / "canary").exists()


def test_numbers_beside_the_weights_are_no_matter(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(2)}, "best_prec1": 93.5, "arch": None}, tmp_path / "model.th")
    assert set(read_weights(tmp_path / "model.th")) == {"a"}


def test_a_folder_a_missing_file_and_a_huge_one_are_refused(tmp_path):
    with pytest.raises(ImportRefused, match="must be a file, got a folder"):
        read_weights(tmp_path)
    with pytest.raises(ImportRefused, match="no.pt` is missing"):
        read_weights(tmp_path / "no.pt")
    with (tmp_path / "huge.pt").open("wb") as file:
        file.truncate(MAX_BYTES + 1)  # of holes
    with pytest.raises(ImportRefused, match=f"huge.pt` must have at most {MAX_BYTES} bytes"):
        read_weights(tmp_path / "huge.pt")


def test_weights_of_timm_need_timm():
    if importlib.util.find_spec("timm") is not None:
        pytest.skip("timm is installed: a pretrained model would be downloaded")
    with pytest.raises(ImportError, match=r"`teacher` timm:resnet50 needs timm: pip install 'rlexit\[timm\]'"):
        given_weights("timm:resnet50")


def test_timm_s_names_are_those_of_the_backbone():
    timm = pytest.importorskip("timm", reason="needs timm: pip install 'rlexit[timm]'")
    network = classifier(BackboneConfig("resnet50"), 1000, 224)
    load_weights(network, timm.create_model("resnet50", pretrained=False).state_dict(), "timm")


def test_a_state_dict_of_torch_is_read_whatever_it_is_wrapped_in(tmp_path):
    torch.save({"state_dict": {"module.linear.weight": torch.ones(2, 3)}, "epoch": 3}, tmp_path / "model.th")
    assert read_weights(tmp_path / "model.th")["linear.weight"].shape == (2, 3)


@pytest.mark.parametrize("name", ["module.pt", "cut.safetensors", "cut.pt", "notes.txt", "none.pt", "numbers.pt"])
def test_a_file_that_holds_no_weights_is_refused_by_its_name(tmp_path, name):
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    torch.save({"epoch": 3}, tmp_path / "numbers.pt")
    for cut in ("cut.safetensors", "cut.pt", "notes.txt"):
        (tmp_path / cut).write_bytes(b"\x10\x00\x00")
    with pytest.raises(ImportRefused, match=name):
        read_weights(tmp_path / name)
