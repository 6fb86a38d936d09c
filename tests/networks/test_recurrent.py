"""Recurrent and convolutional networks: sequences, episode borders, padding, and the same trust-region code."""

from __future__ import annotations

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.data import Categorical, Composite, Unbounded
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import (
    GRUModule,
    IndependentNormal,
    LSTMModule,
    MultiAgentConvNet,
    MultiAgentMLP,
    NormalParamExtractor,
    ProbabilisticActor,
    set_recurrent_mode,
)

from tests.cases import (
    ACTION,
    GROUP,
    LOG_PROB,
    OBSERVATION,
    OLD_DATA,
    VALUE,
    bits,
    dense_fisher,
    dense_gradient,
    distribution,
    flat_parameters,
    make_policy,
    region_mean,
    same_bits,
    textbook_kl,
)
from tests.environments import Memory, make_specified
from torchrl_trpo import TrustRegionUpdater
from torchrl_trpo.envs import make_env
from torchrl_trpo.errors import PlainKeyError, SettingError
from torchrl_trpo.keys import GroupKeys, group_keys
from torchrl_trpo.networks import make_actor, make_central_critic, make_critic
from torchrl_trpo.networks.recurrent import RecurrentModule, carry_states
from torchrl_trpo.numerics import line_search
from torchrl_trpo.objectives import AgentGAE, CentralCriticValueEstimator, HATRPOSequentialObjective, TRPOLoss
from torchrl_trpo.training.critic_fit import fit_critic

STATE, FEATURES = (GROUP, "state"), (GROUP, "features")
SHARING = pytest.mark.parametrize("share_params", [True, False], ids=["shared", "per_agent"])
CELLS = pytest.mark.parametrize("cell", ["gru", "lstm"])


def recurrent_layer(cell="gru", share_params=False, hidden=3, n_agents=2, n_obs=3, device=None):
    return RecurrentModule(
        n_obs,
        hidden,
        cell=cell,
        in_keys=[OBSERVATION, STATE, "is_init"],
        out_keys=[FEATURES, ("next", *STATE)],
        n_agents=n_agents,
        share_params=share_params,
        device=device,
    ).double()


def recurrent_actor(cell="gru", share_params=False, kind="normal", hidden=3, n_agents=2, device=None, **keywords):
    sharing = {"centralized": False, "share_params": share_params, "device": device}
    policy = make_policy(MultiAgentMLP(hidden, 4, n_agents=n_agents, depth=0, **sharing).double(), kind, **keywords)
    policy.module[0].in_keys = [FEATURES]
    layer = recurrent_layer(cell, share_params, hidden, n_agents, device=device)
    return ProbabilisticTensorDictSequential(layer, *policy.module)


def sequences(actor, batch=(4, 6), n_agents=2, n_obs=3):
    """Collected step by step: episodes begin anywhere, and the first steps go on from earlier ones."""
    data = TensorDict({GROUP: TensorDict({}, [*batch, n_agents])}, batch)
    data[OBSERVATION] = torch.randn(*batch, n_agents, n_obs, dtype=torch.float64)
    data["is_init"] = torch.rand(*batch, 1) < 0.3
    size = actor[0].state_size
    state, steps = torch.randn(*batch[:-1], n_agents, size, dtype=torch.float64), []
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        for step in data.unbind(-1):
            state = torch.where(step["is_init"].unsqueeze(-1), torch.zeros_like(state), state)
            step[STATE] = state
            step = actor(step.clone())
            state = step[("next", *STATE)]
            steps.append(step)
    data = torch.stack(steps, -1)
    data["advantage"] = torch.randn(*batch, n_agents, 1, dtype=torch.float64)
    return data


# ------------------------------------------------------------------ the layer


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_the_layer_is_that_of_torch(cell):
    layer = recurrent_layer(cell, share_params=True, n_agents=1)
    theirs = (nn.GRU if cell == "gru" else nn.LSTM)(3, 3, batch_first=True).double()
    parameters = layer.network.params.data
    (kind,) = parameters.keys()
    theirs.weight_ih_l0.data = parameters[kind, "input", "weight"]
    theirs.bias_ih_l0.data = parameters[kind, "input", "bias"].clone()
    theirs.weight_hh_l0.data = parameters[kind, "recurrence", "weight"]
    theirs.bias_hh_l0.data = parameters[kind, "recurrence", "bias"]
    if cell == "lstm":
        theirs.bias_ih_l0.data[3:6] += 1  # ours remembers at first
    data = TensorDict({OBSERVATION: torch.randn(5, 7, 1, 3, dtype=torch.float64)}, [5, 7])
    data["is_init"] = torch.zeros(5, 7, 1, dtype=torch.bool)
    with set_recurrent_mode(True):
        ours = layer(data)[FEATURES]
    torch.testing.assert_close(ours.squeeze(2), theirs(data[OBSERVATION].squeeze(2))[0])


@SHARING
@CELLS
def test_sequences_are_the_steps(cell, share_params):
    """Evaluated at once, with episode borders inside, a policy says what it said step by step."""
    actor = recurrent_actor(cell, share_params)
    data = sequences(actor)
    assert 3 < data["is_init"].sum() < 20
    with set_recurrent_mode(True):
        dist = actor.get_dist(data.select(OBSERVATION, STATE, "is_init"))
    torch.testing.assert_close(dist.log_prob(data[ACTION]), data[LOG_PROB])


@pytest.mark.parametrize(
    ("settings", "left_out", "message"),
    [
        ({"cell": "rnn"}, [], r"cell: 'rnn'\. Legal: 'gru', 'lstm'"),
        ({"in_keys": ["observation", "state"]}, [], r"in_keys: \['observation', 'state'\]\. Legal: three"),
        (
            {},
            ["is_init"],
            r"in_keys \(TorchRL's InitTracker adds .*: 'is_init' is not in the data\. Legal: 'observation'",
        ),
        ({}, ["observation"], r"in_keys: 'observation' is not in the data\. Legal: 'is_init'"),
    ],
)
def test_what_a_layer_cannot_be_or_read(settings, left_out, message):
    keys = {"in_keys": ["observation", "state", "is_init"], "out_keys": ["features", ("next", "state")]}
    data = TensorDict({"observation": torch.randn(4, 3), "is_init": torch.ones(4, 1, dtype=torch.bool)}, [4])
    with pytest.raises((ValueError, PlainKeyError), match=message):
        RecurrentModule(3, 8, **{"cell": "gru", **keys, **settings})(data.exclude(*left_out))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"network": "rnn"}, r"network: 'rnn'\. Legal: 'mlp', 'gru', 'lstm'"),
        ({"hidden": []}, r"hidden: \[\]\. Legal with"),
    ],
    ids=["network", "hidden"],
)
def test_a_recurrent_network_that_cannot_be(settings, message):
    env = make_specified(name="integers")
    with pytest.raises(SettingError, match=message):
        make_actor(env, *group_keys(env), share_params=True, **{"network": "gru", **settings})


def test_agents_have_layers_of_their_own():
    layer = recurrent_layer()
    data = TensorDict({OBSERVATION: torch.ones(1, 4, 2, 3, dtype=torch.float64)}, [1, 4])
    data["is_init"] = torch.zeros(1, 4, 1, dtype=torch.bool)
    with set_recurrent_mode(True):
        features = layer(data)[FEATURES]
    assert not torch.allclose(features[..., 0, :], features[..., 1, :])


# ------------------------------------------------------------------ the policy update


@SHARING
@CELLS
def test_the_step_is_the_definition(cell, share_params):
    actor = recurrent_actor(cell, share_params)
    data, damping, max_kl = sequences(actor), 0.05, 0.02
    per_agent, n = not share_params, 1 if share_params else 2
    theta = flat_parameters(actor, n)
    old = distribution(actor, theta, data)
    g = dense_gradient(actor, data, per_agent)
    damped = dense_fisher(actor, data, per_agent) + damping * torch.eye(theta.shape[1], dtype=torch.float64)
    x = torch.linalg.solve(damped, g)
    full_step = (2 * max_kl / (x * (damped @ x.unsqueeze(-1)).squeeze(-1)).sum(-1, keepdim=True)).sqrt() * x
    stats = TrustRegionUpdater(TRPOLoss(actor), max_kl=max_kl, damping=damping, cg_iters=200, cg_tol=1e-13).step(data)
    kept = flat_parameters(actor, n)
    torch.testing.assert_close(kept, theta + stats["step_fraction"].unsqueeze(-1) * full_step, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(stats["kl"], region_mean(textbook_kl(old, distribution(actor, kept, data)), per_agent))
    assert stats["accepted"].all()


@pytest.mark.parametrize(("cell", "sequential"), [("lstm", False), ("gru", True)], ids=["batched", "sequential"])
def test_the_whole_step_on_the_meta_device(cell, sequential, monkeypatch):
    """Apart from the accept decision of the line search nothing waits for the device or sits on the CPU."""
    monkeypatch.setattr(line_search, "_all_decided", lambda decided: False)
    data = sequences(recurrent_actor(cell)).to("meta")
    actor = recurrent_actor(cell, device="meta", validate_args=False)
    loss = TRPOLoss(actor, entropy_bonus=False)
    objective = HATRPOSequentialObjective(loss) if sequential else loss
    stats = TrustRegionUpdater(objective, fisher_subsample=0.5).step(data)
    assert stats["kl"].device.type == "meta"
    assert stats.batch_size == (2,)


@pytest.mark.parametrize("sequential", [False, True], ids=["batched", "sequential"])
def test_chunks_hold_whole_sequences(sequential):
    """A chunk of 13 steps holds two of the four sequences of six."""
    actor = recurrent_actor()
    data = sequences(actor)
    results = []
    for chunk_size in (None, 13):
        policy = deepcopy(actor)
        loss = TRPOLoss(policy, chunk_size=chunk_size, entropy_bonus=False)
        objective = HATRPOSequentialObjective(loss, agent_order="fixed") if sequential else loss
        TrustRegionUpdater(objective, cg_iters=4).step(data)
        results.append(flat_parameters(policy))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


@SHARING
@pytest.mark.parametrize("padding", [torch.nan, -1e3])
def test_padding_and_its_states_count_nowhere(share_params, padding):
    """RNN padding counts in MARLlib's KL and Fisher."""
    actor = recurrent_actor(share_params=share_params)
    data = sequences(actor)
    padded = torch.cat(
        [data, data[:, :3].apply(lambda x: torch.full_like(x, padding) if x.is_floating_point() else x)], 1
    )
    padded["mask"] = (torch.arange(9) < 6).expand(4, 9).clone()
    updated = []
    for batch in (data, padded):
        twin = recurrent_actor(share_params=share_params)
        twin.load_state_dict(actor.state_dict())
        loss = TRPOLoss(twin)
        loss.loss_mask_key = "mask" if batch is padded else None
        stats = TrustRegionUpdater(loss).step(batch)
        updated.append((flat_parameters(twin), stats))
    torch.testing.assert_close(updated[0][0], updated[1][0])
    assert updated[1][1]["accepted"].all()
    for name in ("kl", "improvement", "grad_norm"):
        torch.testing.assert_close(updated[0][1][name], updated[1][1][name])


def test_a_masked_agent_keeps_its_memory():
    """An agent that does not count for some steps, but acts, has still seen them."""
    actor = recurrent_actor()
    data = sequences(actor)
    data["mask"] = torch.rand(4, 6, 2) < 0.6
    loss = TRPOLoss(actor)
    loss.loss_mask_key = "mask"
    rows = loss.policy_rows(data)
    with set_recurrent_mode(True):
        dist = actor.get_dist(rows.inputs.copy())
    log_prob = torch.where(data["mask"], dist.log_prob(data[ACTION]), 0.0)
    torch.testing.assert_close(log_prob, torch.where(data["mask"], data[LOG_PROB], 0.0))


@OLD_DATA
def test_a_recurrent_sequence_of_agents():
    """HATRPO's factor is over the steps of the sequences; a group without a memory may be beside one with."""
    actor = recurrent_actor()
    data = sequences(actor)
    data["cars", "observation"] = torch.randn(4, 6, 2, 3, dtype=torch.float64)
    net = MultiAgentMLP(3, 4, n_agents=2, centralized=False, share_params=False, num_cells=[4], depth=1).double()
    cars = ProbabilisticActor(
        TensorDictModule(
            nn.Sequential(net, NormalParamExtractor()), [("cars", "observation")], [("cars", "loc"), ("cars", "scale")]
        ),
        in_keys=[("cars", "loc"), ("cars", "scale")],
        out_keys=[("cars", "action")],
        distribution_class=IndependentNormal,
        return_log_prob=True,
    )
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        cars(data)
    losses = {GROUP: TRPOLoss(actor), "cars": TRPOLoss(cars)}
    losses[GROUP].set_keys(action=ACTION, sample_log_prob=LOG_PROB)
    losses["cars"].set_keys(action=("cars", "action"), sample_log_prob=("cars", "action_log_prob"))
    losses["cars"].set_keys(advantage=("cars", "advantage"))
    data["cars", "advantage"] = torch.randn_like(data["advantage"])
    theta = flat_parameters(actor, 2)
    objective = HATRPOSequentialObjective(losses, agent_order=[0, 1, 2, 3])
    regions = objective.trust_regions(data)
    first = next(regions)
    step = 0.05 * torch.randn_like(first.parameters)
    first.write(first.parameters + step, torch.ones(1, dtype=torch.bool))
    moved = theta.clone()
    moved[0] += step[0]
    ratio = (distribution(actor, moved, data).log_prob(data[ACTION]) - data[LOG_PROB]).exp()[..., 0]
    next(regions)
    cars_region = next(regions)
    factor = cars_region._rows.factor.reshape(4, 6)
    torch.testing.assert_close(factor, ratio)
    assert TrustRegionUpdater(objective).step(data)["accepted"].sum() >= 3


def test_gradients_flow_through_masked_steps():
    """An agent that does not count at a step has a memory of it; a masked step once cut the sequence."""
    actor = recurrent_actor(share_params=True)
    data = sequences(actor)
    data["is_init"][:] = False
    data["mask"] = torch.ones(4, 6, dtype=torch.bool)
    data["mask"][:, 3] = False
    loss = TRPOLoss(actor)
    loss.loss_mask_key = "mask"
    region = next(iter(loss.trust_regions(data)))
    theta = flat_parameters(actor).requires_grad_()
    ratio = (distribution(actor, theta, data).log_prob(data[ACTION]) - data[LOG_PROB]).exp()
    counted = data["mask"].unsqueeze(-1).expand_as(ratio)
    surrogate = (ratio * data["advantage"].squeeze(-1))[counted].mean()
    torch.testing.assert_close(region.gradient(), torch.autograd.grad(surrogate, theta)[0])


def torchrl_layer(module):
    """TorchRL's own layer, for one agent, and the names of its states."""
    states = ["h"] if module is GRUModule else ["h", "c"]
    keys = {
        "in_keys": ["observation", *states, "is_init"],
        "out_keys": ["features", *[("next", name) for name in states]],
    }
    return module(input_size=3, hidden_size=4, python_based=True, **keys).double(), states


@pytest.mark.parametrize("module", [GRUModule, LSTMModule])
def test_torchrls_recurrent_modules(module):
    """One agent, TorchRL's own module in its Python form, which can be differentiated twice."""
    layer, states = torchrl_layer(module)
    head = nn.Sequential(nn.Linear(4, 4), NormalParamExtractor()).double()
    actor = ProbabilisticActor(
        TensorDictSequential(layer, TensorDictModule(head, ["features"], ["loc", "scale"])),
        in_keys=["loc", "scale"],
        out_keys=["action"],
        distribution_class=IndependentNormal,
        return_log_prob=True,
    )
    data = TensorDict({"observation": torch.randn(4, 6, 3, dtype=torch.float64)}, [4, 6])
    data["is_init"] = torch.rand(4, 6, 1) < 0.3
    for name in states:
        data[name] = torch.zeros(4, 6, 1, 4, dtype=torch.float64)
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM), set_recurrent_mode(True):
        actor(data)
    data["advantage"] = torch.randn(4, 6, 1, dtype=torch.float64)
    loss = TRPOLoss(actor)
    stats = TrustRegionUpdater(loss, max_kl=0.02).step(data)
    assert stats["accepted"].all()
    torch.testing.assert_close(loss(data)["kl"], stats["kl"][0])
    assert 0.005 < stats["kl"] <= 0.02


# ------------------------------------------------------------------ recurrent critics


def recurrent_critic(share_params=True):
    head = MultiAgentMLP(3, 1, n_agents=2, centralized=False, share_params=share_params, depth=0).double()
    return TensorDictSequential(recurrent_layer("gru", share_params), TensorDictModule(head, [FEATURES], [VALUE]))


def rollout(batch=(3, 7)):
    data = TensorDict({GROUP: TensorDict({}, [*batch, 2])}, batch)
    data[OBSERVATION] = torch.randn(*batch, 2, 3, dtype=torch.float64)
    following = TensorDict({GROUP: TensorDict({}, [*batch, 2])}, batch)
    following[OBSERVATION] = torch.randn(*batch, 2, 3, dtype=torch.float64)
    done = torch.rand(*batch, 1) < 0.3
    done[:, 2] = True
    following["done"], following["terminated"] = done, done & (torch.rand(*batch, 1) < 0.5)
    following["reward"] = torch.randn(*batch, 1, dtype=torch.float64)
    data["is_init"] = torch.cat([torch.ones(batch[0], 1, 1, dtype=torch.bool), done[:, :-1]], 1)
    following[OBSERVATION][:, :-1] = torch.where(
        done[:, :-1].unsqueeze(-1), following[OBSERVATION][:, :-1], data[OBSERVATION][:, 1:]
    )
    return data.set("next", following)


@SHARING
def test_values_of_a_recurrent_critic(share_params):
    """V(o_{t+1}) starts from the state after o_t, also at the end of an episode: step by step, by hand."""
    critic, data = recurrent_critic(share_params), rollout()
    gae = AgentGAE(gamma=0.9, lmbda=0.8, value_network=critic)
    gae.set_keys(value=VALUE)
    gae(data)
    state = torch.zeros(3, 2, 3, dtype=torch.float64)
    for t in range(7):
        state = torch.where(data["is_init"][:, t].unsqueeze(-1), torch.zeros_like(state), state)
        now = TensorDict({OBSERVATION: data[OBSERVATION][:, t], STATE: state}, [3])
        now["is_init"] = torch.zeros(3, 1, dtype=torch.bool)
        now = critic(now)
        torch.testing.assert_close(data[VALUE][:, t], now[VALUE])
        state = now[("next", *STATE)]
        later = TensorDict({OBSERVATION: data[("next", *OBSERVATION)][:, t], STATE: state}, [3])
        later["is_init"] = torch.zeros(3, 1, dtype=torch.bool)
        torch.testing.assert_close(data[("next", *VALUE)][:, t], critic(later)[VALUE])


@pytest.mark.parametrize("module", [GRUModule, LSTMModule])
def test_values_of_torchrls_recurrent_critics(module):
    """TorchRL's modules write their states at the ends of trajectories alone, in sequences."""
    layer, states = torchrl_layer(module)
    critic = TensorDictSequential(layer, TensorDictModule(nn.Linear(4, 1).double(), ["features"], ["state_value"]))
    data = rollout()
    observation, following = data[OBSERVATION][:, :, 0], data[("next", *OBSERVATION)][:, :, 0]
    data = data.exclude(GROUP, ("next", GROUP))
    data["observation"], data["next", "observation"] = observation, following
    for name in states:
        data[name] = torch.zeros(3, 7, 1, 4, dtype=torch.float64)
    AgentGAE(gamma=0.9, lmbda=0.8, value_network=critic)(data)
    carried = {name: torch.zeros(3, 1, 4, dtype=torch.float64) for name in states}
    for t in range(7):
        begins = data["is_init"][:, t].unsqueeze(-1)
        carried = {name: torch.where(begins, torch.zeros_like(value), value) for name, value in carried.items()}
        never = torch.zeros(3, 1, dtype=torch.bool)
        now = critic(TensorDict({"observation": observation[:, t], "is_init": never, **carried}, [3]))
        torch.testing.assert_close(data["state_value"][:, t], now["state_value"])
        carried = {name: now["next", name] for name in states}
        later = critic(TensorDict({"observation": following[:, t], "is_init": never, **carried}, [3]))
        torch.testing.assert_close(data["next", "state_value"][:, t], later["state_value"])


def test_the_loss_of_a_recurrent_critic_is_that_of_sequences():
    """It was that of a critic without memory, unless its caller knew of TorchRL's recurrent mode."""
    loss, data = TRPOLoss(recurrent_actor(), recurrent_critic(), loss_critic_type="l2"), rollout()
    loss.set_keys(value=VALUE)
    loss.make_value_estimator(gamma=0.9, lmbda=0.8)
    loss.value_estimator(data)
    data["value_target"] = data[VALUE]
    assert loss.loss_critic(data)[0].abs().max() < 1e-20
    assert loss.mean_critic_loss(data) < 1e-20


def test_a_recurrent_critic_is_fitted_on_sequences():
    critic, data = recurrent_critic(), rollout()
    policy = recurrent_actor()
    loss = TRPOLoss(policy, critic, loss_critic_type="l2")
    loss.set_keys(value=VALUE)
    loss.make_value_estimator(gamma=0.9, lmbda=0.8)
    with torch.no_grad():
        loss.value_estimator(data, params=loss.critic_network_params, target_params=loss.target_critic_network_params)
    assert not data["value_target"].requires_grad, "the critic's own parameters stay where they are"
    optimizer = torch.optim.Adam(loss.critic_network_params.flatten_keys().values(), lr=1e-2)
    first = fit_critic(loss, optimizer, data, epochs=1, minibatch_size=21)
    expected = (data["value_target"] - data[VALUE]).square().mean()
    torch.testing.assert_close(first["loss_critic"], float(expected), rtol=1e-6, atol=0)
    assert fit_critic(loss, optimizer, data, epochs=60, minibatch_size=7)["loss_critic"] < first["loss_critic"]
    data["next", "reward"][1, 3] = data["value_target"][1, 3] = torch.nan
    before = fit_critic(loss, optimizer, data, epochs=1, minibatch_size=7)
    assert before["dropped"] == 7, "the whole sequence"


# ------------------------------------------------------------------ in an environment


@pytest.mark.parametrize("network", ["gru", "lstm"])
def test_an_environment_carries_the_states(network):
    settings = {"num_envs": 5, "max_steps": 20, "kwargs": {}, "seed": 0, "device": torch.device("cpu")}
    env = make_env("custom", factory="tests.environments.make_memory", **settings)
    (keys,) = group_keys(env)
    actor = make_actor(env, keys, share_params=False, hidden=[8, 4], network=network)
    carry_states(env, actor)
    data = env.rollout(12, actor, break_when_any_done=False)
    assert data["is_init"][:, 1:].any()
    state = data["agents", "policy_state"]
    fresh = data["is_init"].squeeze(-1)
    assert (state[fresh] == 0).all()
    assert (state[~fresh] != 0).any(-1).all()
    with set_recurrent_mode(True):
        dist = actor.get_dist(data.select(*actor.in_keys))
    torch.testing.assert_close(dist.log_prob(data[keys.action]), data[keys.log_prob], rtol=1e-4, atol=1e-5)


def test_an_environment_that_does_not_carry_the_states_is_refused():
    """The policy acted without its memory, and nothing said so."""
    settings = {"num_envs": 2, "max_steps": 20, "kwargs": {}, "seed": 0, "device": torch.device("cpu")}
    env = make_env("custom", factory="tests.environments.make_memory", **settings)
    (keys,) = group_keys(env)
    actor = make_actor(env, keys, share_params=False, hidden=[8], network="gru")
    with pytest.raises(PlainKeyError, match=r"policy_state.* is missing where no episode begins.*carry_states\(env"):
        env.rollout(3, actor)


def train_memory(network, iterations, padding=0):
    """HATRPO on the memory task, on batches with episode borders inside and ``padding`` steps of NaN at the end."""
    settings = {"num_envs": 20, "max_steps": 50, "kwargs": {}, "seed": 0, "device": torch.device("cpu")}
    env = make_env("custom", factory="tests.environments.make_memory", **settings)
    (keys,) = group_keys(env)
    actor = make_actor(env, keys, share_params=False, hidden=[32, 32], network=network)
    critic = make_central_critic(env, keys, hidden=[32, 32], network=network)
    carry_states(env, actor)
    loss = TRPOLoss(actor, critic, normalize_advantage=True, normalize_advantage_exclude_dims=(-2,))
    loss.set_keys(**keys.loss_keys)
    loss.loss_mask_key = "counts"
    loss.make_value_estimator(
        CentralCriticValueEstimator,
        gamma=0.95,
        lmbda=0.9,
        value_network=critic,
        observation_keys=[keys.observation],
        central_key=keys.central,
    )
    updater = TrustRegionUpdater(HATRPOSequentialObjective(loss), fisher_subsample=0.2)
    optimizer = torch.optim.Adam(loss.critic_network_params.flatten_keys().values(), lr=1e-3)
    returns, data = [], env.reset()
    for _ in range(iterations):
        with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
            data = env.rollout(50, actor, auto_reset=False, tensordict=data, break_when_any_done=False)
        batch = torch.cat([data, data[:, :padding].apply(lambda x: x * torch.nan if x.is_floating_point() else x)], 1)
        batch["counts"] = (torch.arange(50 + padding) < 50).expand(20, -1).clone()
        with torch.no_grad():
            loss.value_estimator(
                batch, params=loss.critic_network_params, target_params=loss.target_critic_network_params
            )
        assert updater.step(batch)["grad_norm"].isfinite().all()
        assert fit_critic(loss, optimizer, batch, epochs=4, minibatch_size=250)["dropped"] == 0
        ended = data["next", "done"].squeeze(-1)
        returns.append(float(data["next", "episode_reward"].squeeze(-1)[ended].mean()))
        data = env.step_mdp(data[:, -1])
        data = env.maybe_reset(data)
    return returns


@pytest.mark.slow
def test_a_memory_solves_what_its_memoryless_twin_cannot():
    """Batches have resets inside and padding at the end; 0.5 is chance, 1 is a memory."""
    returns = {network: train_memory(network, 50, padding=7) for network in ("mlp", "gru", "lstm")}
    print({network: [round(value, 2) for value in curve[::7]] for network, curve in returns.items()})
    assert max(returns["mlp"][-10:]) < 0.6
    assert min(returns["gru"][-10:]) > 0.95
    assert min(returns["lstm"][-10:]) > 0.95


def test_a_batch_with_padding_and_resets():
    assert len(train_memory("gru", 2, padding=7)) == 2


def test_the_memory_task_is_what_it_says():
    env = Memory(4)
    env.set_seed(0)
    data = env.rollout(40, break_when_any_done=False)
    cues = data[OBSERVATION][..., 0]
    starts = torch.cat([torch.ones(4, 1, dtype=torch.bool), data["next", "done"][:, :-1, 0]], 1)
    assert ((cues != 0).all(-1) == starts).all()
    assert (data["next", "reward"][~data["next", "done"]] == 0).all()
    lengths = starts.sum(1)
    assert (lengths >= 40 // 8).all()


# ------------------------------------------------------------------ pictures


@SHARING
def test_pictures(share_params):
    """A convolutional policy through the same trust-region code, against the dense truth."""
    settings = {"n_agents": 2, "centralized": False, "share_params": share_params}
    images = MultiAgentConvNet(**settings, in_features=1, num_cells=[2], kernel_sizes=2, strides=2)
    head = MultiAgentMLP(8, 4, depth=0, **settings)
    actor = make_policy(nn.Sequential(images, head).double(), "normal")
    data = TensorDict({OBSERVATION: torch.randn(3, 5, 2, 1, 4, 4, dtype=torch.float64)}, [3, 5])
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        actor(data)
    data["advantage"] = torch.randn(3, 5, 2, 1, dtype=torch.float64)
    n = 1 if share_params else 2
    theta, per_agent = flat_parameters(actor, n), not share_params
    g = dense_gradient(actor, data, per_agent)
    damped = dense_fisher(actor, data, per_agent) + 0.1 * torch.eye(theta.shape[1], dtype=torch.float64)
    x = torch.linalg.solve(damped, g)
    full_step = (0.02 / (x * (damped @ x.unsqueeze(-1)).squeeze(-1)).sum(-1, keepdim=True)).sqrt() * x
    stats = TrustRegionUpdater(TRPOLoss(actor), cg_iters=100, cg_tol=1e-13).step(data)
    step = stats["step_fraction"].unsqueeze(-1) * full_step
    torch.testing.assert_close(flat_parameters(actor, n), theta + step, rtol=1e-6, atol=1e-9)
    assert stats["accepted"].all()


def test_pictures_of_a_single_agent():
    pictures = Composite({"observation": Unbounded((1, 7, 7))})
    env = SimpleNamespace(
        device=None,
        full_observation_spec_unbatched=pictures,
        full_action_spec_unbatched=Composite({"action": Categorical(3)}),
    )
    keys = GroupKeys(
        None,
        1,
        observation="observation",
        reward="reward",
        done="done",
        terminated="terminated",
        action_mask=None,
        mask=None,
    )
    actor = make_actor(env, keys, share_params=True, hidden=[8])
    data = actor(TensorDict({"observation": torch.randn(6, 1, 7, 7)}, [6]))
    assert data["action"].shape == (6,)
    critic = make_critic(env, keys, share_params=True, hidden=[8])
    assert critic(data)["state_value"].shape == (6, 1)


def test_nothing_moves_when_a_state_is_not_finite():
    actor = recurrent_actor()
    data, before = sequences(actor), bits(actor)
    data[STATE][1, 0, 0] = torch.inf
    with pytest.warns(UserWarning, match="gradient of region 0 is not finite"):
        stats = TrustRegionUpdater(TRPOLoss(actor, trust_region="shared")).step(data)
    assert not stats["accepted"].any()
    assert same_bits(actor, before)


def test_sequences_run_along_the_last_dimension():
    """Along the first one, a recurrent policy stepped from environment to environment."""
    actor = recurrent_actor()
    data = sequences(actor).transpose(0, 1).contiguous().refine_names("time", ...)
    with pytest.raises(ValueError, match=r"named \('time', None\).*along the last dimension"):
        TrustRegionUpdater(TRPOLoss(actor)).step(data)


def test_critics_of_the_recipes_are_recurrent_too():
    settings = {"num_envs": 3, "max_steps": 20, "kwargs": {}, "seed": 0, "device": torch.device("cpu")}
    env = make_env("custom", factory="tests.environments.make_memory", **settings)
    (keys,) = group_keys(env)
    for critic in (
        make_critic(env, keys, share_params=False, network="gru"),
        make_central_critic(env, keys, network="lstm"),
    ):
        assert "is_init" in critic.in_keys


def test_steps_of_a_recurrent_policy_out_of_order_are_told():
    actor = recurrent_actor(share_params=True)
    data = sequences(actor)
    with pytest.warns(UserWarning, match="recurrent policy out of order"):
        TrustRegionUpdater(TRPOLoss(actor)).step(data[:, torch.tensor([3, 1, 5, 0, 2, 4])])
