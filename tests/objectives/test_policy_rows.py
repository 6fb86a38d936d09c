"""Which entries of a batch have an agent dimension, decided by the group of the agents."""

from copy import deepcopy

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.modules import IndependentNormal, MaskedCategorical, MultiAgentMLP, ProbabilisticActor

from torchrl_trpo import TrustRegionUpdater
from torchrl_trpo.objectives import HATRPOSequentialObjective, TRPOLoss
from torchrl_trpo.objectives.policy_rows import flatten_rows
from torchrl_trpo.parallel.ranks import ALONE

B, T, AGENTS = 4, 5, 3


def make_rows(inputs, mask=None, *, group="agents"):
    ones = torch.ones(B, T, AGENTS, 1)
    settings = {"group": group, "per_agent": True, "ranks": ALONE}
    return flatten_rows(inputs, action=ones, log_prob=ones, advantage=ones, mask=mask, **settings)


@pytest.mark.parametrize("group_size", [[B, T], [B, T, AGENTS]], ids=["without the agents", "with the agents"])
def test_entries_of_the_group_are_one_per_agent(group_size):
    """Whatever the batch size of the group's TensorDict; a flag of each agent was taken for a state."""
    mask = torch.ones(B, T, AGENTS, 1, dtype=torch.bool)
    mask[0, 0, 1] = False
    agents = {"observation": torch.randn(B, T, AGENTS, 2), "speed": torch.randn(B, T, AGENTS)}
    for name in agents:
        agents[name][0, 0, 1] = torch.nan
    inputs = TensorDict({"agents": TensorDict(agents, group_size), "state": torch.randn(B, T, AGENTS)}, [B, T])
    rows = make_rows(inputs, mask)
    assert rows.advantage.isfinite().all(), "what is masked was cleared for the masked agent alone"
    speed = rows.inputs["agents", "speed"][0]
    assert (speed[1] == speed[0]) & (speed[2] != speed[0]), "a copy of the first agent that counts"
    own = rows.of_agent(2)
    assert own.inputs["agents"].batch_size == torch.Size([B * T, *[1] * (len(group_size) - 2)])
    torch.testing.assert_close(own.inputs["agents", "speed"], rows.inputs["agents", "speed"][:, 2:])
    torch.testing.assert_close(own.inputs["agents", "observation"], rows.inputs["agents", "observation"][:, 2:])
    assert own.inputs["state"].shape == (B * T, AGENTS), "a state at the root is of all agents"
    assert rows.inputs["agents", "speed"].shape == (B * T, AGENTS), "the rows of all agents are as before"


def test_entries_of_other_agents_are_not_sliced():
    """A policy may read another team's observations; as many agents there were taken for its own."""
    both = {
        name: TensorDict({"observation": torch.randn(B, T, AGENTS, 2)}, [B, T, AGENTS]) for name in ("agents", "foes")
    }
    own = make_rows(TensorDict(both, [B, T])).of_agent(0)
    assert own.inputs["agents", "observation"].shape == (B * T, 1, 2)
    assert own.inputs["foes", "observation"].shape == (B * T, AGENTS, 2)


@pytest.mark.parametrize("kind", ["an int8 mask of actions", "a unit observation"])
def test_padding_need_not_be_legal(kind):
    """Zeros stood for what is masked; where they are no legal input, the policy was NaN, and each step rejected."""

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(3, 4)

        def forward(self, observation, allowed):
            if kind == "a unit observation":
                return self.net(observation / observation.norm(dim=-1, keepdim=True))
            return self.net(observation).masked_fill(allowed == 0, -torch.inf)

    actor = ProbabilisticActor(
        TensorDictModule(Logits(), ["observation", "allowed"], ["logits"]),
        in_keys=["logits"],
        out_keys=["action"],
        distribution_class=torch.distributions.Categorical,
        return_log_prob=True,
    )
    allowed = torch.rand(B, T, 4) < 0.5
    allowed[..., 1] = True
    data = actor(TensorDict({"observation": torch.randn(B, T, 3), "allowed": allowed.to(torch.int8)}, [B, T]))
    data["advantage"] = torch.randn(B, T, 1)
    data["collector", "mask"] = torch.arange(T).expand(B, T) < 3
    rows = data.reshape(-1)
    twin = deepcopy(actor)
    stats = TrustRegionUpdater(TRPOLoss(twin)).step(rows[rows["collector", "mask"]])
    for name, value in data.items():
        if name != "collector":
            value[:, 3:] = 0
    padded = TrustRegionUpdater(TRPOLoss(actor)).step(data)
    assert padded["accepted"].all()
    torch.testing.assert_close(padded["kl"], stats["kl"])
    for own, other in zip(actor.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own, other)


class PictureToo(nn.Module):
    """A policy that reads a picture ``[C, 2]`` at the root, and all agents' observations if it is shared."""

    def __init__(self, n_channels, shared):
        super().__init__()
        sharing = {"centralized": shared, "share_params": shared}
        self.net = MultiAgentMLP(2 + 2 * n_channels, 4, n_agents=AGENTS, num_cells=4, depth=1, **sharing)

    def forward(self, observation, picture):
        picture = picture.flatten(-2).unsqueeze(-2).expand(*observation.shape[:-1], -1)
        loc, scale = self.net(torch.cat([observation, picture], -1)).chunk(2, -1)
        return loc, scale.exp()


def collect_with_pictures(n_channels, shared):
    keys = [("agents", "loc"), ("agents", "scale")]
    actor = ProbabilisticActor(
        TensorDictModule(PictureToo(n_channels, shared), [("agents", "observation"), "picture"], keys),
        in_keys=keys,
        out_keys=[("agents", "action")],
        distribution_class=IndependentNormal,
        return_log_prob=True,
    )
    agents = TensorDict({"observation": torch.randn(B, T, AGENTS, 2)}, [B, T, AGENTS])
    data = actor(TensorDict({"agents": agents, "picture": torch.randn(B, T, n_channels, 2)}, [B, T]))
    data["advantage"] = torch.randn(B, T, AGENTS, 1)
    loss = TRPOLoss(actor)
    loss.set_keys(action=("agents", "action"), sample_log_prob=("agents", "action_log_prob"))
    return loss, data.detach()


@pytest.mark.parametrize("n_channels", [AGENTS, AGENTS + 1])
def test_what_agents_read_of_each_other_stays(n_channels):
    """Masked agents' observations, and channels of a picture, were replaced although the others read them."""
    loss, data = collect_with_pictures(n_channels, shared=True)
    data["agents", "mask"] = torch.rand(B, T, AGENTS) < 0.6
    data["agents", "mask"][:, :2] = False  # of whole rows
    loss.loss_mask_key = ("agents", "mask")
    loss(data)["loss_objective"].backward()
    slopes = [parameter.grad for parameter in loss.actor_network_params.values(True, True)]
    stats = TrustRegionUpdater(loss).step(data)
    torch.testing.assert_close(stats["log_ratio_max"], torch.zeros(1))
    torch.testing.assert_close(stats["grad_norm"][0], torch.cat([slope.flatten() for slope in slopes]).norm())
    torch.testing.assert_close(stats["kl"][0], loss(data)["kl"])


@pytest.mark.parametrize("kind", ["words", "flags"])
def test_masks_of_actions_are_legal_where_agents_exchange_observations(kind):
    """An all-False mask of a masked agent made the KL NaN, and each step was rejected."""

    class Heard(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.net = nn.Embedding(5, 4), nn.Linear(5, 4)

        def forward(self, said):
            shared = (self.words(said) if kind == "words" else self.net(said.float())).mean(-2, keepdim=True)
            return shared.expand(*said.shape[: shared.ndim - 2], AGENTS, 4)

    said, logits, allowed = (("agents", name) for name in ("said", "logits", "action_mask"))
    actor = ProbabilisticActor(
        TensorDictModule(Heard(), [said], [logits]),
        in_keys={"logits": logits, "mask": allowed},
        out_keys=[("agents", "action")],
        distribution_class=MaskedCategorical,
        return_log_prob=True,
    )
    words = torch.randint(5, (B, T, AGENTS)) if kind == "words" else torch.rand(B, T, AGENTS, 5) < 0.5
    mask = torch.rand(B, T, AGENTS, 4) < 0.6
    mask[..., 0] = True
    agents = TensorDict({"said": words, "action_mask": mask}, [B, T, AGENTS])
    data = actor(TensorDict({"agents": agents}, [B, T])).detach()
    data["advantage"] = torch.randn(B, T, AGENTS, 1)
    data["agents", "mask"] = torch.rand(B, T, AGENTS) < 0.6
    data["agents", "action_mask"][~data["agents", "mask"]] = False
    loss = TRPOLoss(actor)
    loss.set_keys(action=("agents", "action"), sample_log_prob=("agents", "action_log_prob"))
    loss.loss_mask_key = ("agents", "mask")
    stats = TrustRegionUpdater(loss).step(data)
    assert stats["accepted"].all()
    torch.testing.assert_close(stats["log_ratio_max"], torch.zeros(1))


def test_an_agent_may_read_a_picture_with_a_channel_for_each_agent():
    """Each agent got one channel of it, which its network refused."""
    loss, data = collect_with_pictures(AGENTS, shared=False)
    assert TrustRegionUpdater(HATRPOSequentialObjective(loss)).step(data)["accepted"].all()


def test_where_nothing_counts_nothing_is_read():
    """What stood there was in the statistics."""
    inputs = TensorDict({"agents": TensorDict({"observation": torch.randn(B, T, AGENTS, 2)}, [B, T])}, [B, T])
    rows = make_rows(inputs, torch.zeros(B, T, AGENTS, 1, dtype=torch.bool))
    assert (rows.inputs["agents", "observation"] == 0).all()
    assert (rows.weight == 0).all()
