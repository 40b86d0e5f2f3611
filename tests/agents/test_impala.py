from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticCnnPolicy

from agents import teacher as sb3_teacher
from agents.backbones import backbone_of, backbones
from agents.backbones.impala import Impala, ImpalaExtractor, impala_units
from agents.config import BACKBONES, NetworkConfig, StudentConfig
from agents.decisions import add_decisions
from agents.domain import domain
from agents.envs import AtariVecEnv
from agents.refine import Refiner
from rlexit import checkpoint
from rlexit.calibrate import refined_policy
from rlexit.config import METHODS, HeadConfig, Method
from rlexit.costs import cost_table
from rlexit.domain import Watch
from rlexit.exit_policy import ExitPolicy
from rlexit.refine_config import RefineConfig
from rlexit.runtime import run
from tests.agents.small_run import CONFIG, ENV, save_teacher
from tests.agents.test_refine import REFINE
from tests.rlexit.toys import watched

FRAMES = torch.zeros((1, 4, 84, 84), dtype=torch.uint8)
IMPALA = replace(CONFIG, network=NetworkConfig("impala", ("block1b", "block2b")), teacher="distilled")


def frames(batch: int) -> torch.Tensor:
    return torch.randint(0, 256, (batch, 4, 84, 84), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def skipping(**settings):
    """An IMPALA actor with opinions on units, exits and reuse."""
    torch.manual_seed(0)
    network = Impala.network(6, Impala.taps, HeadConfig())
    add_decisions(network, FRAMES, replace(REFINE, decisions=("exits", "units", "reuse"), **settings))
    with torch.no_grad():
        for name, parameter in network.gates.named_parameters():
            if name.endswith("weight"):
                parameter.normal_(std=1.0)
    return network.eval()


# ---- the backbone ----


def test_every_backbone_is_registered_under_the_name_of_its_file():
    assert tuple(backbones) == BACKBONES == ("impala", "nature")


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_answers_at_its_usual_exits_and_reads_its_own_tensors(name):
    backbone = backbone_of(name)
    network = backbone.network(6, backbone.taps, HeadConfig(), True).eval()
    assert network.exits == len(backbone.taps) + 1
    assert network(frames(2)).answers.shape == (2, network.exits, 6)
    assert backbone.network(6, width=0.5)(frames(1)).answers.shape == (1, 1, 6)
    with pytest.raises(ValueError, match="`network.taps` must be of"):
        backbone.network(6, ("attic",))
    with pytest.raises(ValueError, match="got nothing. Use a"):
        backbone.load(network, {})
    with pytest.raises(ValueError, match="`width` must leave at least one channel"):
        backbone.network(6, width=0.01)


def test_impala_costs_what_is_published_and_two_thirds_of_it_are_skippable():
    network = Impala.network(18)
    costs = cost_table(network, FRAMES)
    assert costs.full == 54_227_456 == pytest.approx(54.23e6, abs=5e3)
    skippable = sum(macs for name, macs in costs.units.items() if network.units[name].skippable)
    assert skippable / costs.full == pytest.approx(0.682, abs=5e-4)
    millions = {name: round(macs / 1e6, 2) for name, macs in costs.units.items()}
    assert [millions[f"stage{n}"] for n in (1, 2, 3)] == [4.06, 8.13, 4.06]
    assert [millions[f"block{n}{m}"] for n in (1, 2, 3) for m in "ab"] == [8.13, 8.13, 8.13, 8.13, 2.23, 2.23]
    assert millions["fc"] == 0.99


def test_exits_after_two_stages_cost_what_the_specification_says():
    network = Impala.network(18, Impala.taps, HeadConfig())
    costs = cost_table(network, FRAMES)
    reached = 0
    found = {}
    for name, macs in costs.units.items():
        reached += macs
        found[name] = reached / costs.full
    assert found["block1b"] == pytest.approx(0.375, abs=5e-4)
    assert found["block2b"] == pytest.approx(0.824, abs=5e-4)


def test_recurrent_gates_cost_next_to_nothing():
    network = add_decisions(Impala.network(18), FRAMES, RefineConfig(decisions=("units",)))
    bare = Impala.network(18)
    share = cost_table(network, FRAMES).exits[-1] / cost_table(bare, FRAMES).exits[-1] - 1
    assert 0 < share < 2e-4


def test_a_skipped_block_is_the_map_as_it_is():
    block = impala_units()["block2a"]
    features = torch.randn(3, 32, 42, 42)
    assert torch.equal(block.skip(features), features)
    assert not torch.equal(block(features), features)


def test_rows_that_skip_a_block_are_not_computed_in_it():
    network = skipping()
    with watched(network) as work:
        result = run(network, ExitPolicy.full(3), frames(7), mode="sample", generator=torch.Generator().manual_seed(0))
    ran = sum(int((decision.action > 0).sum()) for _, decision in result.decisions)
    assert 0 < ran < 7 * len(result.decisions) == 42
    assert sum(work.rows[f"units.block{n}{m}.conv1"] for n in (1, 2, 3) for m in "ab") == ran
    assert work.macs <= int(result.macs.sum())  # an LSTM cell is no linear layer to these hooks


def test_nature_has_no_unit_to_skip():
    with pytest.raises(ValueError, match="`refine.decisions` must not name `units` on a backbone without skip paths"):
        add_decisions(backbone_of("nature").network(6), FRAMES, RefineConfig(decisions=("units",)))


# ---- as a teacher ----


def test_ppo_trains_it_as_the_network_that_is_served(tmp_path):
    env = AtariVecEnv(ENV, 2, training=True, seed=0)
    config = replace(CONFIG.train, n_envs=2, n_steps=4, batch_size=8, n_epochs=1, precision="fp32")
    model = sb3_teacher.build(env, config, 0, extractor=ImpalaExtractor)
    before = {key: value.clone() for key, value in sb3_teacher.weights(model).items()}
    model.learn(8)
    env.close()
    tensors = sb3_teacher.weights(model)
    moved = {key for key, value in tensors.items() if not torch.equal(value, before[key])}
    assert "features_extractor.units.block3b.conv2.weight" in moved
    network = Impala.network(6)
    Impala.load(network, tensors)
    seen = frames(3)
    with torch.no_grad():
        theirs = model.policy.get_distribution(seen).distribution.logits
        torch.testing.assert_close(network.eval()(seen).answers[:, 0], theirs, rtol=1e-4, atol=1e-5)


def test_the_extractor_shares_its_names_with_the_staged_network():
    policy = ActorCriticCnnPolicy(
        spaces.Box(0, 255, (4, 84, 84), "uint8"),
        spaces.Discrete(6),
        lambda _: 0.0,
        features_extractor_class=ImpalaExtractor,
        net_arch=[],
    )
    units = {key for key in Impala.network(6).state_dict() if key.startswith("units.")}
    assert {f"features_extractor.{key}" for key in units} <= set(policy.state_dict())


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    """An IMPALA teacher that learnt a little from an untrained NatureCNN."""
    source = save_teacher(tmp_path_factory.mktemp("source"), ENV)
    config = replace(IMPALA, student=StudentConfig(str(source), steps=64, batch_size=16, epochs=1))
    folder = tmp_path_factory.mktemp("impala")
    made = domain(config)
    made.train(folder, 0, Watch())
    return made, folder, source


def test_a_teacher_of_one_architecture_is_distilled_from_another(distilled):
    made, folder, _ = distilled
    made.accept(folder)
    network = made.network(folder, Method())
    assert cost_table(network, FRAMES).full == pytest.approx(54.23e6, rel=1e-3)
    facts = checkpoint.load_facts(folder, "teacher")
    assert facts["student"]["steps"] == 64
    assert facts["curves"]["kl/exit0"] > 0


def test_cloning_brings_the_student_nearer_to_its_source(distilled, tmp_path):
    made, _, source = distilled
    more = replace(made.config, student=replace(made.config.student, steps=256, epochs=3))
    domain(more).train(tmp_path, 0, Watch())
    target = domain(replace(CONFIG, network=NetworkConfig(taps=()))).network(source, Method())
    torch.manual_seed(0)
    fresh = made.backbone.network(6)
    learnt = made.network(tmp_path, Method())
    seen = made.rows(target, ExitPolicy.full(1), 64, Watch())
    with torch.no_grad():
        full = target.eval()(seen).answers[:, -1]

        def apart(network):
            return float(((full - network.eval()(seen).answers[:, -1]) * full.exp()).sum(dim=1).mean())

        assert apart(learnt) < apart(fresh)


def test_a_nature_teacher_is_refused_where_impala_is_asked_for(distilled, tmp_path):
    made, _, source = distilled
    with pytest.raises(ValueError, match="Use an IMPALA teacher"):
        made.accept(source)
    other = replace(made.config, env=replace(ENV, sticky=0.25))
    with pytest.raises(checkpoint.CheckpointError, match=r"`student.source` must be of env.sticky 0.25, got 0.1"):
        domain(other).train(tmp_path, 0, Watch())
    with pytest.raises(ValueError, match="must be nature where the teacher is zoo, got 'impala'"):
        replace(IMPALA, teacher="zoo")


def test_units_exits_and_reuse_are_refined_in_one_network(distilled, tmp_path):
    made, folder, _ = distilled
    config = replace(REFINE, decisions=("exits", "units", "reuse"), steps=32, clone_steps=16, target_macs=0.0)
    pong = domain(replace(made.config, refine=config))
    network = pong.network(folder, METHODS["refined"])
    refiner = Refiner(network, pong.network(folder, Method()), None, ENV, config, tmp_path, 0, Watch())
    refiner.run()
    assert refiner.samples == 48
    result = run(network, refined_policy(network), frames(5))
    assert len(result.decisions) >= 2
    assert int(result.macs.max()) < 1.1 * refiner.full_macs
