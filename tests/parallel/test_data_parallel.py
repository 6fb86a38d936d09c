"""Several processes with rows of their own take the step that one process with all rows takes."""

from __future__ import annotations

import copy
import os
import signal

import pytest
import torch
import torch.distributed as dist
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.modules import PopArtValueNorm

from tests.cases import (
    GROUP,
    OBSERVATION,
    OLD_DATA,
    REWARD,
    VALUE,
    bits,
    flat_parameters,
    make_actor,
    make_data,
    make_loss,
    make_single,
    same_bits,
    single_data,
)
from tests.rank_processes import on_ranks
from torchrl_trpo import TrustRegionUpdater
from torchrl_trpo.envs.normalization import ObservationNorm
from torchrl_trpo.numerics.statistics import standardize, variance
from torchrl_trpo.objectives import HATRPOSequentialObjective, TRPOLoss
from torchrl_trpo.objectives.agent_order import drawn_order
from torchrl_trpo.parallel.ranks import RankLostError, Ranks, check_same_length
from torchrl_trpo.training.critic_fit import fit_critic

ENVS, STEPS, AGENTS = 6, 7, 3
ALONE = None


def share_of(data):
    """This rank's environments: 2 of 6 and 4 of 6, or equal shares of 3 ranks; all of them without a group."""
    if not dist.is_initialized():
        return data
    cuts = {1: [6], 2: [2, 4], 3: [2, 2, 2]}[dist.get_world_size()]
    return data.split(cuts)[dist.get_rank()]


def make_batch(actor, masked):
    data = make_data(actor, (ENVS, STEPS))
    if masked:
        data[GROUP, "counts"] = torch.rand(ENVS, STEPS, AGENTS, 1) < 0.7
        data[GROUP, "counts"][0] = False  # the first rank has few rows that count
    return data


def one_update(kind, algorithm, masked, chunk_size=None, kl_budget="agent", **settings):
    """The parameters and the statistics after an update on the rows of this rank, with a converged solution."""
    torch.manual_seed(0)
    actor = make_actor(kind, share_params=algorithm == "shared")
    data = share_of(make_batch(actor, masked))
    group = dist.group.WORLD if dist.is_initialized() else ALONE
    loss = make_loss(
        actor,
        normalize_advantage=True,
        normalize_advantage_exclude_dims=(-2,),
        entropy_coeff=0.01,
        chunk_size=chunk_size,
        process_group=group,
    )
    loss.loss_mask_key = (GROUP, "counts") if masked else "auto"
    order = "greedy" if algorithm == "greedy" else "random"
    objective = HATRPOSequentialObjective(loss, agent_order=order) if algorithm in {"hatrpo", "greedy"} else loss
    torch.manual_seed(7 + Ranks(group).rank)  # ranks differ in what they draw, but the order
    stats = TrustRegionUpdater(objective, cg_iters=60, cg_tol=1e-13, kl_budget=kl_budget, **settings).step(data)
    return flat_parameters(actor), stats.to_dict()


@pytest.mark.parametrize("algorithm", ["shared", "per_agent", "hatrpo", "greedy"])
@pytest.mark.parametrize(
    ("size", "masked", "kl_budget"), [(2, True, "agent"), (3, False, "team")], ids=["2, masked", "3, all rows, team"]
)
def test_ranks_take_the_step_of_one_process(size, algorithm, masked, kl_budget):
    case = ("composite" if masked else "normal", algorithm, masked, None, kl_budget)
    alone, stats = one_update(*case)
    results = on_ranks(size, one_update, *case)
    assert bool(stats["accepted"].all())
    for parameters, own_stats in results:
        torch.testing.assert_close(parameters, alone, rtol=0, atol=1e-9)
        del own_stats["cg_residual"]  # rounding alone
        for name, value in own_stats.items():
            torch.testing.assert_close(value, stats[name], rtol=1e-6, atol=1e-9, msg=name)
        assert torch.equal(parameters, results[0][0]), "ranks agree to the bit"


def test_a_fisher_matrix_on_a_share_of_the_rows_is_the_same_in_all_ranks():
    (first, stats), (second, other) = on_ranks(2, one_update_subsampled)
    assert torch.equal(first, second)
    assert all(torch.equal(stats[name], other[name]) for name in stats)
    assert bool(stats["accepted"].all())


def one_update_subsampled():
    return one_update("normal", "per_agent", True, chunk_size=5, fisher_subsample=0.5)


def train(value_norm, masked):
    """Twenty updates of policy and critic on recorded batches, of which this rank has its environments."""
    torch.manual_seed(0)
    actor = make_actor(share_params=False, n_agents=AGENTS)
    critic = TensorDictModule(
        nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double(), in_keys=[OBSERVATION], out_keys=[VALUE]
    )
    group = dist.group.WORLD if dist.is_initialized() else ALONE
    norm = PopArtValueNorm(beta=0.9).double() if value_norm else None
    loss = TRPOLoss(
        actor,
        critic,
        normalize_advantage=True,
        normalize_advantage_exclude_dims=(-2,),
        value_norm=norm,
        process_group=group,
    )
    loss.set_keys(reward=REWARD, value=VALUE)
    loss.loss_mask_key = (GROUP, "counts") if masked else "auto"
    loss.make_value_estimator(gamma=0.9, lmbda=0.8, value_norm=norm)
    updater = TrustRegionUpdater(HATRPOSequentialObjective(loss), damping=1.0, cg_iters=10)
    optimizer = torch.optim.Adam(loss.critic_network_params.values(True, True), lr=1e-2)
    template = copy.deepcopy(actor)
    fits = []
    for update in range(20):
        torch.manual_seed(100 + update)
        batch = make_batch(template, masked)  # of a policy that does not move: the same for all
        del batch["advantage"]
        done = torch.rand(ENVS, STEPS, 1) < 0.2
        batch["next"] = TensorDict(
            {
                GROUP: TensorDict(
                    {
                        "observation": torch.randn(ENVS, STEPS, AGENTS, 3, dtype=torch.float64),
                        "reward": torch.randn(ENVS, STEPS, 1, 1, dtype=torch.float64).expand(-1, -1, AGENTS, -1),
                    },
                    [ENVS, STEPS, AGENTS],
                ),
                "done": done,
                "terminated": done,
            },
            [ENVS, STEPS],
        )
        data = share_of(batch)
        with torch.no_grad():
            loss.value_estimator(
                data, params=loss.critic_network_params, target_params=loss.target_critic_network_params
            )
        updater.step(data)
        fits.append(fit_critic(loss, optimizer, data, epochs=1, minibatch_size=7, process_group=group))
        loss(data)  # the statistics of normalised values move once more
    parameters = torch.cat([value.detach().flatten() for value in critic.parameters()])
    return flat_parameters(actor), parameters, fits


@OLD_DATA
@pytest.mark.parametrize(
    ("value_norm", "masked"),
    [pytest.param(False, False, id="plain", marks=pytest.mark.slow), pytest.param(True, True, id="PopArt, masked")],
)
def test_twenty_updates_of_policy_and_critic_stay_together(value_norm, masked):
    """The first rank's draws are those of one process alone: the agents' order and the minibatches are the same."""
    policy, critic, fits = train(value_norm, masked)
    for own_policy, own_critic, own_fits in (results := on_ranks(2, train, value_norm, masked)):
        torch.testing.assert_close(own_policy, policy, rtol=0, atol=1e-9)
        torch.testing.assert_close(own_critic, critic, rtol=0, atol=1e-9)
        assert torch.equal(own_policy, results[0][0])
        assert torch.equal(own_critic, results[0][1])
        for fit, own_fit in zip(fits, own_fits, strict=True):
            assert own_fit == pytest.approx(fit, rel=1e-6)


def with_a_nan_in_one_rank():
    torch.manual_seed(0)
    actor = make_actor(share_params=True)
    loss = TRPOLoss(actor, process_group=dist.group.WORLD)
    data = make_data(actor)
    if dist.get_rank() == 1:
        data["advantage"][0, 0] = torch.nan
    before = bits(actor)
    stats = TrustRegionUpdater(loss).step(data)
    return bool(stats["accepted"]), same_bits(actor, before)


def test_a_nan_in_one_rank_is_a_rejected_step_in_all():
    assert on_ranks(2, with_a_nan_in_one_rank) == [(False, True)] * 2


def statistics():
    torch.manual_seed(0)
    values = torch.randn(ENVS, STEPS, AGENTS, 1, dtype=torch.float64) + 100
    mask = torch.rand(values.shape) < 0.5
    ranks = Ranks(dist.group.WORLD if dist.is_initialized() else ALONE)
    own = [share_of(part) for part in (values, mask)]
    same = torch.full((4, 1), 0.1 + ranks.rank * 1e-17, dtype=torch.float64)
    return {
        "standardize": ranks.concat(standardize(*own, [0, 1], ranks)),
        "no spread": standardize(same, None, [0], ranks),
        "variance": variance(own[0].flatten(), ranks),
        "concat": ranks.concat(own[0][own[1]]),
        "max": ranks.max_(own[0].amax()),
    }


@pytest.mark.parametrize("size", [1, 2, 3])
def test_statistics_are_of_all_ranks(size):
    alone = statistics()
    for own in on_ranks(size, statistics):
        for name in ("standardize", "variance", "concat", "max"):
            torch.testing.assert_close(own[name], alone[name], rtol=1e-12, atol=1e-12, msg=name)
        assert not own["no spread"].any()


def begin():
    """Starts with parameters of this rank's own."""
    torch.manual_seed(dist.get_rank())
    actor, critic = make_single()
    loss = TRPOLoss(actor, critic, process_group=dist.group.WORLD)
    copied = copy.deepcopy(loss)
    order = [drawn_order("random", 5, torch.device("cpu"), loss.ranks) for _ in range(3)]
    return bits(actor), bits(critic), bits(copied), order, copied.ranks.size


def test_ranks_begin_with_the_first_ones_parameters_and_agree_on_the_order():
    first, second = on_ranks(2, begin)
    for own, other in zip(first[:3], second[:3], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(own, other, strict=True))
    assert first[3] == second[3]
    assert len({tuple(order) for order in first[3]}) > 1
    assert first[4] == 2, "a copy is of the same group"


def lose_one():
    """One rank dies in the middle of the policy's update."""
    torch.manual_seed(0)
    actor, _ = make_single()
    loss = TRPOLoss(actor, process_group=dist.group.WORLD)
    data = single_data(actor)
    data["advantage"] = torch.randn(5, 8, 1, dtype=torch.float64)
    before = bits(actor)
    if dist.get_rank() == 1:
        loss.ranks.sum_(torch.zeros(1))
        os.kill(os.getpid(), signal.SIGKILL)
    loss.ranks.sum_(torch.zeros(1))
    with pytest.raises(RankLostError, match="rank 0 of 2: another process of the job has ended"):
        TrustRegionUpdater(loss).step(data)
    return same_bits(actor, before)


def test_a_rank_that_dies_is_told_by_the_others():
    assert on_ranks(2, lose_one, lost=[1]) == [True]


@pytest.mark.parametrize("argument", ["advantage_norm", "average_gae", "group"])
def test_statistics_of_each_process_alone_are_refused(argument):
    on_ranks(2, refuse, argument)


def refuse(argument):
    actor, critic = make_single()
    if argument == "advantage_norm":
        with pytest.raises(ValueError, match=r"advantage_norm: .* Legal: normalize_advantage"):
            TRPOLoss(actor, critic, advantage_norm=PopArtValueNorm(), process_group=dist.group.WORLD)
        return
    if argument == "group":
        losses = {"a": TRPOLoss(make_actor(), process_group=dist.group.WORLD), "b": TRPOLoss(make_actor())}
        with pytest.raises(ValueError, match="process_group: the losses have different ones"):
            HATRPOSequentialObjective(losses)
        return
    loss = TRPOLoss(actor, critic, process_group=dist.group.WORLD)
    with pytest.raises(ValueError, match=r"average_gae=True .* Legal: average_gae=False"):
        loss.make_value_estimator(average_gae=True)


def observe():
    """Statistics of observations after three batches of which this rank has seen its part."""
    ranks = Ranks(dist.group.WORLD if dist.is_initialized() else ALONE)
    norm = ObservationNorm(["observation"], {})
    torch.manual_seed(0)
    for batch in range(3):
        observation = torch.randn(ENVS, STEPS, 2) * (batch + 1) + batch
        for step in share_of(observation).unbind(1):
            data = TensorDict({"observation": step}, [len(step)])
            norm._step(data, data)
        norm.merge(ranks)
        norm.merge(ranks)  # nothing was seen in between
    return norm.loc["observation"], norm.scale["observation"]


def test_observations_are_normalised_with_what_all_ranks_have_seen():
    alone = observe()
    for own in on_ranks(2, observe):
        torch.testing.assert_close(own, alone)


def unequal_sequences():
    with pytest.raises(ValueError, match="sequences of 3 to 4 steps"):
        check_same_length(3 + dist.get_rank(), Ranks(dist.group.WORLD), torch.device("cpu"))


def test_sequences_of_different_lengths_are_refused_in_all_ranks():
    on_ranks(2, unequal_sequences)
