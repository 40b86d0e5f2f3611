"""Exits on modules that know nothing of rlexit."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from rlexit.attach import attach, unit_name
from rlexit.config import HeadConfig
from rlexit.costs import cost_table
from rlexit.exit_policy import ExitPolicy
from rlexit.heads import LinearHead, PooledConvHead
from rlexit.network import StagedNetwork
from rlexit.runtime import replay, run
from rlexit.students import ExitStudent
from tests.rlexit.toys import parting

ACTIONS = 5
LINEAR = HeadConfig(kind="linear")


class Block(nn.Module):
    """A residual block with a parameter of its own and work in place."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.scale = nn.Parameter(torch.full((channels, 1, 1), 0.7))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.scale * self.relu(self.norm(self.conv(inputs)))


class ResNet(nn.Module):
    """Nested names, skip connections within and across blocks, a parameter that is used twice, a head at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.stages = nn.Sequential(OrderedDict(first=nn.Sequential(Block(8), Block(8)), second=Block(8)))
        self.shift = nn.Parameter(torch.full((8, 1, 1), 0.1))
        self.unused = nn.Linear(1, 1)
        self.head = nn.Linear(8, ACTIONS)

    def forward(self, images: Tensor) -> Tensor:
        early = functional.relu(self.stem(images)) + self.shift
        features = self.stages(early)
        features = features + early * self.shift  # across every cut
        return self.head(features.mean(dim=(2, 3)))


TAPS = ("stages.first.0", "stages.first", "stages.second")


@pytest.fixture
def module() -> ResNet:
    torch.manual_seed(0)
    made = ResNet().eval()
    with torch.no_grad():
        made.head.weight.mul_(8)
    return made


@pytest.fixture
def network(module) -> StagedNetwork:
    made = attach(module, TAPS, images(1))
    with torch.no_grad():
        for exit in range(3):
            made.head(exit).linear.weight.mul_(5)  # type: ignore[union-attr]
    return made


def images(batch: int, seed: int = 1) -> Tensor:
    return torch.randn(32, 3, 6, 6, generator=torch.Generator().manual_seed(seed))[:batch]


def mlp(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


# ---- the same network ----


@pytest.mark.parametrize("batch", [0, 1, 7])
def test_the_last_exit_gives_the_logits_of_the_module(module, network, batch):
    inputs = images(batch)
    assert torch.allclose(network(inputs).logits[:, -1], module(inputs), atol=1e-6)
    answers = run(network, ExitPolicy.full(4), inputs).answers
    assert torch.allclose(answers, module(inputs).log_softmax(dim=-1), atol=1e-6)


def test_frames_of_bytes_reach_the_module_as_they_are():
    module = mlp(scale=Scale(), flat=nn.Flatten(), one=nn.Linear(12, 8), two=nn.Linear(8, ACTIONS))
    frames = torch.randint(0, 256, (5, 3, 2, 2), dtype=torch.uint8)
    network = attach(module, ["one"], frames, head=LINEAR)
    assert torch.allclose(network(frames).logits[:, -1], module(frames), atol=1e-6)


class Scale(nn.Module):
    def forward(self, frames: Tensor) -> Tensor:
        return frames.float() / 255


def test_weights_are_shared_with_the_module(module, network):
    inputs = images(4)
    with torch.no_grad():
        module.stages.second.conv.weight.zero_()
        module.shift.fill_(2.0)
    assert torch.allclose(network(inputs).logits[:, -1], module(inputs), atol=1e-6)
    ours = {parameter.data_ptr() for parameter in network.parameters()}
    theirs = {parameter.data_ptr() for name, parameter in module.named_parameters() if not name.startswith("unused")}
    assert theirs <= ours


def test_the_network_is_in_evaluation_mode_and_named_after_the_taps(network):
    assert not network.training
    assert network.exit_names == ("stages_first_0", "stages_first", "stages_second", "rest")
    assert unit_name("stages.first.0") == "stages_first_0"


def test_an_exit_reads_what_its_submodule_gives(module, network):
    seen: dict[str, Tensor] = {}
    for name in TAPS:
        module.get_submodule(name).register_forward_hook(
            lambda part, given, result, name=name: seen.__setitem__(name, result.clone())
        )
    inputs = images(3)
    module(inputs)
    *early, _ = network.taps(inputs)
    for name, features in zip(TAPS, early, strict=True):
        assert torch.allclose(features, seen[name], atol=1e-6), name


def test_what_an_exit_reads_is_not_changed_by_later_work_in_place():
    module = mlp(one=nn.Linear(4, 6), relu=nn.ReLU(inplace=True), two=nn.Linear(6, ACTIONS)).eval()
    inputs = torch.randn(9, 4)
    network = attach(module, ["one"], inputs, head=LINEAR, ensemble="none")
    tapped = network.taps(inputs)[0]
    assert float(tapped.min()) < 0
    assert torch.allclose(tapped, module.one(inputs))
    # Heads are trained on tapped features and run on live ones: both must be the same.
    trained_on = network.read([tapped])[:, 0]
    assert torch.allclose(run(network, ExitPolicy.always(0, 2), inputs).answers, trained_on.log_softmax(dim=-1))


# ---- real execution ----


def rows_per_layer(module: nn.Module, call) -> Counter[str]:
    """How many rows each layer with weights was really given."""
    counted: Counter[str] = Counter()
    handles = [
        layer.register_forward_hook(lambda part, given, result, name=name: counted.update({name: len(result)}))
        for name, layer in module.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear))
    ]
    call()
    for handle in handles:
        handle.remove()
    return counted


def test_later_parts_are_not_run_for_rows_that_left(module, network):
    inputs = images(32)
    policy = parting(network, inputs)
    expected = replay(network, policy, inputs)
    left = torch.bincount(expected.exits, minlength=4)
    assert int(left.min()) > 0
    results = []
    counted = rows_per_layer(module, lambda: results.append(run(network, policy, inputs)))
    assert torch.equal(results[0].exits, expected.exits)
    assert torch.allclose(results[0].answers, expected.answers, atol=1e-5)
    alive = [32, 32 - int(left[0]), 32 - int(left[:2].sum()), int(left[3])]
    assert counted == {
        "stem": alive[0],
        "stages.first.0.conv": alive[0],
        "stages.first.1.conv": alive[1],
        "stages.second.conv": alive[2],
        "head": alive[3],
    }


def test_a_row_alone_is_told_what_it_is_told_in_a_batch(network):
    inputs = images(16)
    policy = parting(network, inputs)
    together = run(network, policy, inputs)
    for row in range(16):
        alone = run(network, policy, inputs[row : row + 1])
        assert torch.allclose(alone.answers[0], together.answers[row], atol=1e-5)
        assert (int(alone.exits[0]), int(alone.macs[0])) == (int(together.exits[row]), int(together.macs[row]))


def test_costs_are_those_of_the_layers(module, network):
    costs = cost_table(network, images(1))
    conv, stem, head = 8 * 8 * 9 * 36, 3 * 8 * 9 * 36, 8 * ACTIONS
    assert costs.units == {
        "stages_first_0": stem + conv,
        "stages_first": conv,
        "stages_second": conv,
        "rest": head,
    }
    assert costs.heads["rest"] == 0
    assert costs.full == stem + 3 * conv + head
    assert run(network, ExitPolicy.full(4), images(2)).macs.tolist() == [costs.full] * 2


def test_gradient_reaches_the_heads_of_a_student_and_not_the_module(module, network):
    student = ExitStudent(network)
    inputs = images(6)
    features, teacher = student.observe(inputs)
    assert torch.allclose(teacher, module(inputs).log_softmax(dim=-1), atol=1e-6)
    loss = student.logits(features).square().sum()
    loss.backward()
    assert all(parameter.grad is not None for parameter in student.learners().parameters())
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize("cascade", [True, False])
@pytest.mark.parametrize("ensemble", ["none", "geometric", "additive"])
def test_heads_are_of_the_kind_that_was_asked_for(module, cascade, ensemble):
    network = attach(module, TAPS[1:], images(1), head=LINEAR, cascade=cascade, ensemble=ensemble)
    first, second = network.head(0), network.head(1)
    assert isinstance(first, LinearHead)
    assert isinstance(second, LinearHead)
    assert (first.reads_previous, second.reads_previous) == (False, cascade)
    assert network.exits == 3
    answers = run(network, ExitPolicy("confidence", (-math.inf, -math.inf)), images(3)).answers
    assert torch.allclose(answers.exp().sum(dim=1), torch.ones(3))
    assert isinstance(attach(module, TAPS, images(1)).head(0), PooledConvHead)


# ---- what cannot be cut ----


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, ACTIONS)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.one(inputs) if inputs.sum() > 0 else self.one(-inputs)


class Lengthy(Branching):
    def forward(self, inputs: Tensor) -> Tensor:
        return self.one(inputs) * len(inputs)


class Looping(Branching):
    def forward(self, inputs: Tensor) -> Tensor:
        return self.one(torch.stack([inputs for _ in range(inputs.shape[0])]).sum(dim=0))


@pytest.mark.parametrize("kind", [Branching, Lengthy, Looping])
def test_a_module_whose_control_flow_depends_on_values_cannot_be_traced(kind):
    with pytest.raises(
        ValueError, match="`module` must be traceable by torch.fx, got: .* Write it as rlexit units"
    ) as told:
        attach(kind(), ["one"], torch.zeros(1, 4))
    assert "\n" not in str(told.value)


def test_an_unknown_tap_is_answered_with_the_nearest(module):
    with pytest.raises(LookupError, match=r"'stages\.frist'.*Did you mean 'stages\.first'"):
        attach(module, ["stages.frist"], images(1))


class Twice(nn.Module):
    """Calls a layer, and a block around a layer, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.block = mlp(inner=nn.Linear(4, 4), relu=nn.ReLU())
        self.head = nn.Linear(4, ACTIONS)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.block(self.block(self.layer(self.layer(inputs)))))


@pytest.mark.parametrize("tap", ["layer", "block", "block.inner"])
def test_a_tap_that_is_called_twice_is_refused(tap):
    with pytest.raises(ValueError, match=f"called once, got '{tap}'"):
        attach(Twice(), [tap], torch.zeros(1, 4))


class EarlySize(nn.Module):
    """Asks for the batch size before the tap and uses it after: wrong as soon as a row leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 6), nn.Linear(6, ACTIONS)

    def forward(self, inputs: Tensor) -> Tensor:
        size = inputs.shape[0]
        return self.two(self.one(inputs).view(size, -1))


class Rowless(EarlySize):
    """Makes something of no row before the tap and uses it after."""

    def forward(self, inputs: Tensor) -> Tensor:
        total = inputs.sum()
        return self.two(self.one(inputs)) + total


class Averaged(EarlySize):
    """The same with a tensor whose first axis is not the rows."""

    def forward(self, inputs: Tensor) -> Tensor:
        mean = inputs.mean(dim=0, keepdim=True)
        return self.two(self.one(inputs)) + mean.sum(dim=1, keepdim=True)


@pytest.mark.parametrize("kind", [EarlySize, Rowless, Averaged])
def test_what_has_no_rows_cannot_cross_a_tap(kind):
    with pytest.raises(ValueError, match=r"must hand on tensors \(B, \.\.\.\) only, got `\w+` after 'one'"):
        attach(kind(), ["one"], torch.zeros(1, 4))


class Pair(EarlySize):
    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        hidden = self.one(inputs)
        return self.two(hidden), hidden


class Both(EarlySize):
    def forward(self, inputs: Tensor, others: Tensor) -> Tensor:  # type: ignore[override]
        return self.two(self.one(inputs) + others)


MISUSES = {
    "order": (
        lambda: mlp(a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, ACTIONS)),
        ["b", "a"],
        "in the order of execution",
    ),
    "twice": (lambda: mlp(a=nn.Linear(4, 4), c=nn.Linear(4, ACTIONS)), ["a", "a"], "must differ"),
    "same work": (lambda: mlp(a=mlp(x=nn.Linear(4, 4)), c=nn.Linear(4, ACTIONS)), ["a", "a.x"], "leave work between"),
    "last": (lambda: mlp(a=nn.Linear(4, 4), c=nn.Linear(4, ACTIONS)), ["c"], "after the last"),
    "none": (lambda: mlp(a=nn.Linear(4, 4), c=nn.Linear(4, ACTIONS)), [], "at least one submodule"),
    "unused": (lambda: ResNet(), ["unused"], "'unused', which does none"),
    "name taken": (lambda: mlp(rest=nn.Linear(4, 4), c=nn.Linear(4, ACTIONS)), ["rest"], "none may be 'rest'"),
    "two results": (Pair, ["one"], "one tensor of logits, got several"),
    "two arguments": (Both, ["one"], "one tensor, got 2 arguments"),
    "no logits": (
        lambda: mlp(a=nn.Linear(4, 4), b=nn.Linear(4, 4), s=nn.Unflatten(1, (2, 2))),
        ["a"],
        r"logits \(B, A\), got shape \(B, 2, 2\)",
    ),
    "a map for a linear layer": (
        lambda: mlp(a=nn.Linear(4, 4), c=nn.Linear(4, ACTIONS)),
        ["a"],
        "pooled_conv must read",
    ),
}


@pytest.mark.parametrize("name", MISUSES)
def test_misuse_is_told_by_what_to_do(name):
    build, taps, wanted = MISUSES[name]
    head = None if name == "a map for a linear layer" else LINEAR
    with pytest.raises(ValueError, match=wanted):
        attach(build(), taps, images(1) if name == "unused" else torch.zeros(1, 4), head=head)
