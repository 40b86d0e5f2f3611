"""NatureCNN as a staged network: the published sizes and costs to the unit, and SB3's logits exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticCnnPolicy

from agents.backbones.nature import UNIT_NAMES, load_sb3, nature_network
from rlexit.config import HeadConfig
from rlexit.costs import cost_table, parameters
from rlexit.ensembles import GeometricEnsemble
from rlexit.exit_policy import ExitPolicy
from rlexit.runtime import run

TAPS = ("conv1", "conv2")
FRAMES = torch.zeros((1, 4, 84, 84), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("actions", "base", "exits"),
    [
        (4, 9_345_024, (3_509_248, 6_315_024, 9_729_040)),
        (6, 9_346_048, (3_510_272, 6_318_116, 9_733_156)),
        (8, 9_347_072, (3_511_296, 6_321_216, 9_737_280)),
        (9, 9_347_584, (3_511_808, 6_322_769, 9_739_345)),
        (18, 9_352_192, (3_516_416, 6_336_836, 9_758_020)),
    ],
)
def test_every_exit_costs_what_the_paper_s_network_costs(actions, base, exits):
    network = nature_network(actions, TAPS, cascade=True, ensemble=GeometricEnsemble(2, actions))
    table = cost_table(network, FRAMES)
    assert table.full == base
    assert table.exits == exits
    assert table.units == {"conv1": 3_276_800, "conv2": 2_654_208, "conv3": 1_806_336, "fc": 1_605_632}
    assert table.heads["conv1"] == 230_400 + 512 * actions
    assert table.heads["conv2"] == 147_456 + (1024 + actions) * actions
    assert cost_table(nature_network(actions), FRAMES).exits == (base,)


def test_running_costs_what_the_table_says():
    network = nature_network(6, TAPS, cascade=True).eval()
    rows = FRAMES.expand(3, -1, -1, -1)
    macs = [run(network, ExitPolicy("confidence", (limit, limit)), rows).macs.tolist() for limit in (-1.0, 2.0)]
    assert macs == [[3_510_272] * 3, [9_733_156] * 3]
    assert run(network, ExitPolicy("confidence", (2.0, -1.0)), rows).macs.tolist() == [6_318_116] * 3
    assert run(network, ExitPolicy.full(3), rows).macs.tolist() == [9_346_048] * 3


def test_parameters_are_the_paper_s():
    network = nature_network(6, TAPS, cascade=True, ensemble=GeometricEnsemble(2, 6))
    first, second, own = (network.head(exit) for exit in range(3))
    assert parameters(network.units) + parameters(own) == 1_687_206
    assert parameters(first) == 12_327
    assert parameters(second) == 43_127
    assert parameters(network.ensemble) == 7 + 8
    assert parameters(nature_network(6, TAPS, cascade=False).head(1)) == 43_079
    assert parameters(nature_network(6)) == 1_687_206


def test_the_smaller_second_head_reads_256_numbers():
    network = nature_network(6, TAPS, HeadConfig(upsample=False))
    assert network.head(1).linear.in_features == 256


def policy(actions: int) -> ActorCriticCnnPolicy:
    torch.manual_seed(0)
    observations = spaces.Box(0, 255, (4, 84, 84), np.uint8)
    made = ActorCriticCnnPolicy(observations, spaces.Discrete(actions), lambda _: 1e-4)
    with torch.no_grad():
        made.action_net.weight.mul_(100)  # SB3 starts near uniform, which would hide a wrong answer
    return made.eval()


def pictures(batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, 4, 84, 84), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("batch", [1, 5])
def test_a_loaded_actor_gives_sb3_s_logits_exactly(batch):
    theirs = policy(6)
    network = nature_network(6, TAPS, cascade=True).eval()
    load_sb3(network, theirs.state_dict())
    observations = pictures(batch)
    with torch.no_grad():
        latent = theirs.mlp_extractor.forward_actor(theirs.extract_features(observations))
        expected = theirs.action_net(latent)
        logits = network(observations).logits[:, -1]
    assert expected.std() > 0.1
    assert torch.equal(logits, expected)
    answer = run(network, ExitPolicy.full(3), observations).answers
    assert answer.argmax(dim=1).tolist() == theirs.predict(observations.numpy(), deterministic=True)[0].tolist()
    torch.testing.assert_close(
        answer.exp(), theirs.get_distribution(observations).distribution.probs, rtol=0, atol=1e-6
    )


def test_loading_leaves_the_early_heads_alone():
    network = nature_network(6, TAPS)
    before = {name: value.clone() for name, value in network.heads["conv1"].state_dict().items()}
    load_sb3(network, policy(6).state_dict())
    for name, value in network.heads["conv1"].state_dict().items():
        assert torch.equal(value, before[name])


def test_an_actor_of_another_network_is_refused_by_its_tensor():
    tensors = policy(6).state_dict()
    with pytest.raises(ValueError, match=r"`action_net.weight` must be \(4, 512\), got \(6, 512\). Use a NatureCNN"):
        load_sb3(nature_network(4), tensors)
    del tensors["features_extractor.cnn.2.bias"]
    with pytest.raises(ValueError, match=r"`features_extractor.cnn.2.bias` must be \(64,\), got nothing"):
        load_sb3(nature_network(6), tensors)


def test_a_narrower_network_costs_less():
    half, full = (cost_table(nature_network(6, width=width), FRAMES).full for width in (0.5, 1.0))
    # Half the channels: the first convolution halves, the others quarter, the head halves.
    assert half == 3_276_800 // 2 + (2_654_208 + 1_806_336 + 1_605_632) // 4 + 256 * 6
    assert full == 9_346_048


def test_wrong_taps_and_widths_are_refused():
    with pytest.raises(ValueError, match=r"`network.taps` must be of conv1, conv2, conv3, got 'fc'"):
        nature_network(6, ("fc",))
    with pytest.raises(ValueError, match=r"`width` must leave at least one channel, got 0.01"):
        nature_network(6, width=0.01)
    assert UNIT_NAMES[-1] == "fc"
