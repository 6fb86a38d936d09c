"""Trust-region steps in TorchRL's Trainer."""

from __future__ import annotations

import copy

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictSequential,
)
from torchrl.checkpoint import Checkpoint
from torchrl.collectors import Collector
from torchrl.data import Categorical, LazyTensorStorage, TensorDictReplayBuffer, Unbounded
from torchrl.modules import PopArtValueNorm
from torchrl.record.loggers import CSVLogger
from torchrl.trainers import BatchSubSampler, ReplayBufferTrainer, Trainer

from tests.cases import make_actor as make_double_actor
from tests.cases import make_loss
from tests.environments import Specified
from torchrl_trpo import TrustRegionUpdater
from torchrl_trpo.envs import make_env
from torchrl_trpo.keys import group_keys
from torchrl_trpo.networks import make_actor, make_critic
from torchrl_trpo.objectives import HATRPOSequentialObjective, TRPOLoss
from torchrl_trpo.trainer import LogEpisodeReturn, TRPOTrainer, TrustRegionStepper, critic_parameters, losses_by_group
from torchrl_trpo.training.critic_fit import fit_critics
from torchrl_trpo.training.policy import make_policy

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is an experimental/prototype feature:UserWarning"),
    pytest.mark.filterwarnings("ignore:The agents' rewards differ"),
]
FRAMES = 24


def environment(factory="make_mixed", num_envs=4):
    settings = {"num_envs": num_envs, "max_steps": 5, "kwargs": {}, "seed": 0, "device": torch.device("cpu")}
    return make_env("custom", factory=f"tests.environments.{factory}", **settings)


def losses(env, *, share_params=False, value_norm=False):
    """A loss for each group of the environment's agents."""
    made = {}
    for keys in group_keys(env):
        sizes = {"share_params": share_params, "hidden": [8]}
        norm = PopArtValueNorm() if value_norm else None
        loss = TRPOLoss(make_actor(env, keys, **sizes), make_critic(env, keys, **sizes), value_norm=norm)
        loss.set_keys(**keys.loss_keys)
        loss.make_value_estimator(gamma=0.9, lmbda=0.9, value_norm=norm)
        made[keys.group] = loss
    return made


def objective(env, *, several=True, **settings):
    made = losses(env, **settings)
    return HATRPOSequentialObjective(made if several else next(iter(made.values())), agent_order="fixed")


def adam(objective):
    return torch.optim.Adam([p for loss in losses_by_group(objective).values() for p in critic_parameters(loss)])


def collector(env, policy, **settings):
    settings = {"frames_per_batch": FRAMES, "total_frames": -1, "auto_register_policy_transforms": False, **settings}
    return Collector(env, policy, **settings)


def trainer(objective, env, policy=None, **keywords):
    settings = {"total_frames": 2 * FRAMES, "critic_epochs": 2, "minibatch_size": 10, "progress_bar": False}
    settings = {"optimizer": adam(objective), **settings, **keywords}
    if "collector" not in settings:
        settings["collector"] = collector(env, objective.actor_network if policy is None else policy)
    return TRPOTrainer(loss_module=objective, **settings)


def state(trainer):
    """Everything that learns."""
    return {
        **{f"loss {key}": value.clone() for key, value in trainer.loss_module.state_dict().items()},
        **{f"adam {i} {key}": torch.as_tensor(value).clone()
           for i, values in trainer.optimizer.state_dict()["state"].items() for key, value in values.items()},
        **{f"updater {key}": torch.as_tensor([*str(value).encode()])
           for key, value in trainer.optimization_stepper.updater.state_dict().items()},
    }  # fmt: skip


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key


def by_hand(objective, env, iterations=2):
    """What the trainer does, as a loop; updater and optimiser are returned."""
    updater, optimizer = TrustRegionUpdater(objective), adam(objective)
    batches = iter(collector(env, objective.actor_network))
    for _ in range(iterations):
        data = next(batches)
        with torch.no_grad():
            for loss in losses_by_group(objective).values():
                loss.value_estimator(
                    data, params=loss.critic_network_params, target_params=loss.target_critic_network_params
                )
        updater.step(data)
        fit_critics(losses_by_group(objective).values(), optimizer, data, epochs=2, minibatch_size=10)
    return objective.state_dict()


@pytest.mark.parametrize("kind", ["shared", "one group", "several groups"])
def test_it_is_the_updater_and_the_critics_fit_by_hand(kind):
    factory = "make_mixed" if kind == "several groups" else "make_copy"

    def start():
        torch.manual_seed(1)
        env = environment(factory)
        made = losses(env, share_params=True)["agents"] if kind == "shared" else objective(env)
        return made, env

    made, env = start()
    before = {key: value.clone() for key, value in made.state_dict().items()}
    trainer(made, env).train()
    expected = by_hand(*start())
    assert_equal(dict(made.state_dict()), dict(expected))
    assert any(not torch.equal(before[key], value) for key, value in expected.items() if "actor" in key)
    assert any(not torch.equal(before[key], value) for key, value in expected.items() if "critic" in key)


@pytest.mark.parametrize("own", [False, True], ids=["the trainer's optimiser", "the stepper's optimiser"])
def test_the_stepper_does_the_same_in_the_plain_trainer(own):
    def start():
        torch.manual_seed(1)
        env = environment("make_copy")
        return losses(env)["agents"], env

    made, env = start()
    optimizer = adam(made)
    stepper = TrustRegionStepper(
        TrustRegionUpdater(made), optimizer=optimizer if own else None, critic_epochs=2, minibatch_size=10
    )
    plain = Trainer(
        collector=collector(env, made.actor_network),
        total_frames=2 * FRAMES,
        frame_skip=1,
        optim_steps_per_batch=1,
        loss_module=made,
        optimizer=None if own else optimizer,
        optimization_stepper=stepper,
        progress_bar=False,
    )
    plain.train()
    assert_equal(dict(made.state_dict()), dict(by_hand(*start())))
    saved = stepper.state_dict()
    assert set(saved) == {"updater", "optimizer"} if own else {"updater"}
    if own:
        again = TrustRegionStepper(TrustRegionUpdater(made, max_kl=1.0), optimizer=adam(made))
        again.load_state_dict(copy.deepcopy(saved))
        assert again.updater.max_kl == 0.01
        assert_equal(again.optimizer.state_dict()["state"][0], optimizer.state_dict()["state"][0])


def test_a_collector_may_fill_the_same_batch_again():
    """The advantages of its first batch were in it, and were those of all others."""

    def trained(**settings):
        torch.manual_seed(1)
        env = environment("make_copy")
        made = losses(env)["agents"]
        own = collector(env, made.actor_network, **settings)
        trainer(made, env, collector=own).train()
        return dict(made.state_dict())

    assert_equal(trained(return_same_td=True), trained())


def test_advantages_that_are_there_are_used():
    made = losses(environment("make_copy"))["agents"]
    learner = trainer(made, environment("make_copy"))
    seen = []
    learner.register_op("pre_epoch", lambda data: data.update({("agents", "advantage"): torch.zeros(4, 6, 3, 1)}))
    learner.register_op("pre_epoch", lambda data: data.update({("agents", "value_target"): torch.zeros(4, 6, 3, 1)}))
    learner.register_op("pre_epoch", lambda data: data.update({("agents", "state_value"): torch.rand(4, 6, 3, 1)}))
    learner.register_op("post_steps", lambda: seen.append(learner._log_dict["grad_norm"][-1]))
    before = made.actor_network_params.clone()
    learner.train()
    assert (made.actor_network_params == before).all()
    assert seen == [0, 0]


def weights(policy):
    return TensorDict.from_module(policy).data.clone()


@pytest.mark.parametrize("factory", ["make_copy", "make_mixed"])
def test_another_instance_of_the_policy_gets_the_losss_weights(factory):
    env = environment(factory)
    made = objective(env)
    groups = group_keys(env)
    policy = make_policy(env, groups, hidden=[8]) if factory == "make_mixed" else make_actor(
        env, groups[0], share_params=False, hidden=[8]
    )  # fmt: skip
    first = weights(made.actor_network)
    assert (weights(policy) != first).any()
    learner = trainer(made, env, policy)
    collected_with = []
    learner.register_op("pre_steps_log", lambda data: collected_with.append(weights(policy)))
    learner.train()
    assert (collected_with[0] == first).all()
    assert (collected_with[1] != first).any()
    assert (weights(policy) == weights(made.actor_network)).all()


def test_keys_are_those_of_the_loss():
    made = losses(environment("make_copy"))["agents"]
    keys = copy.copy(made.tensor_keys)
    learner = trainer(made, environment("make_copy"))
    assert made.tensor_keys == keys
    assert learner.reward_key == ("agents", "reward")
    assert learner.action_key == ("agents", "action")
    assert learner.done_key == "done"


def test_the_log_has_returns_and_what_the_step_did(tmp_path):
    made = losses(environment("make_copy"))["agents"]
    learner = trainer(
        made,
        environment("make_copy"),
        logger=CSVLogger("log", log_dir=str(tmp_path)),
        log_interval=0,
        log_observations=True,
        progress_bar=True,
    )
    batches = []
    learner.register_op("pre_steps_log", lambda data: batches.append(data.clone()))
    learner.train()

    def logged(name):
        rows = (tmp_path / "log" / "scalars" / f"{name}.csv").read_text().split()
        return [float(row.split(",")[1]) for row in rows]

    data = batches[0]
    ended = data["next", "done"].squeeze(-1)
    assert logged("episode_return")[0] == pytest.approx(data["next", "agents", "episode_reward"][ended].mean().item())
    assert logged("r_training")[0] == pytest.approx(data["next", "agents", "reward"].mean().item())
    assert logged("obs_norm")[0] == pytest.approx(data["agents", "observation"].mean().item(), rel=1e-4)
    assert set(logged("accepted")) <= {0.0, 1 / 3, 2 / 3, 1.0}
    assert all(0 <= kl <= 0.0101 for kl in logged("kl"))
    for name in ("improvement", "cg_residual", "step_fraction", "loss_critic", "explained_variance", "action_norm"):
        assert len(logged(name)) == 2, name
    assert "episode_return" in learner._pbar_str


def test_with_several_groups_the_log_is_by_group():
    learner = trainer(objective(environment()), environment(), total_frames=FRAMES, log_observations=True)
    learner.train()
    names = ("episode_return", "r_training", "r_max", "r_total", "done_percentage", "action_norm", "obs_norm")
    assert {f"{name}_{group}" for name in names for group in ("drivers", "callers")} <= set(learner._log_dict)


def test_each_part_of_a_composite_action_is_logged():
    seen = {"agents": {"observation": Unbounded((3, 3))}}
    env = Specified(4, seen, {"agents": {"move": Unbounded((3, 2)), "gear": Categorical(3, (3,))}})
    critic = TensorDictModule(torch.nn.Linear(3, 1), [("agents", "observation")], [("agents", "state_value")])
    made = make_loss(make_double_actor("composite").float(), critic_network=critic)
    made.set_keys(value=("agents", "state_value"))
    learner = trainer(made, env, total_frames=FRAMES)
    learner.train()
    assert {"action_norm_agents_move", "action_norm_agents_gear"} <= set(learner._log_dict)


def test_logging_can_be_left_out():
    learner = trainer(
        objective(environment()), environment(), total_frames=FRAMES, log_rewards=False, log_actions=False
    )
    learner.train()
    assert not {name for name in learner._log_dict if name.startswith(("r_", "episode", "action"))}


def test_returns_of_episodes_that_ended():
    data = TensorDict(
        {
            ("next", "agents", "episode_reward"): torch.arange(12.0).reshape(1, 3, 4, 1),
            ("next", "done"): torch.tensor([False, True, False]).reshape(1, 3, 1),
        },
        [1, 3],
    )
    log = LogEpisodeReturn(("agents", "episode_reward"))
    assert log(data) == {"episode_return": (4 + 5 + 6 + 7) / 4, "log_pbar": True}
    data["next", "agents", "done"] = torch.tensor([9]).eq(torch.arange(12)).reshape(1, 3, 4, 1)
    assert LogEpisodeReturn(("agents", "episode_reward"), done_key=("agents", "done"))(data)["episode_return"] == 9
    data["agents", "done"] = data["next", "agents", "done"]  # dead since the step before
    assert LogEpisodeReturn(("agents", "episode_reward"), done_key=("agents", "done"))(data) is None
    data["next", "done"].zero_()
    assert log(data) is None
    assert LogEpisodeReturn()(data) is None


@pytest.mark.parametrize("unified", [True, False], ids=["torchrl.checkpoint", "CKPT_BACKEND"])
@pytest.mark.filterwarnings("ignore:.*CKPT_BACKEND")
def test_a_trainer_that_is_restored_has_everything(unified, tmp_path):
    def fresh(**settings):
        made = objective(environment(), value_norm=True)
        return trainer(
            made,
            environment(),
            updater=TrustRegionUpdater(made, **settings),
            total_frames=2 * FRAMES,
            save_trainer_file=tmp_path / "saved",
            checkpoint=Checkpoint() if unified else None,
        )

    first = fresh(max_kl=0.02, cg_iters=7)
    first.train()
    second = fresh()
    assert any(not torch.equal(value, state(first)[key]) for key, value in state(second).items() if "loss" in key)
    second.load_from_file(tmp_path / "saved")
    assert_equal(state(first), state(second))
    assert any("value_norm" in key for key in state(first))
    assert second.optimization_stepper.updater.state_dict() == first.optimization_stepper.updater.state_dict()
    assert (weights(second.collector.policy) == weights(first.loss_module.actor_network)).all()
    assert second.collected_frames == 2 * FRAMES
    second.total_frames = 3 * FRAMES
    second.train()
    assert second.collected_frames == 3 * FRAMES
    assert all(torch.isfinite(value).all() for value in state(second).values())
    assert any(not torch.equal(value, state(first)[key]) for key, value in state(second).items() if "actor" in key)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_epochs", 4),
        ("optim_steps_per_batch", 2),
        ("replay_buffer", lambda: TensorDictReplayBuffer(storage=LazyTensorStorage(FRAMES), batch_size=FRAMES)),
        ("batch_size", 12),
        ("async_collection", True),
        ("add_gae", True),
        ("gamma", 0.9),
        ("clip_norm", 1.0),
        ("critic_epochs", 0),
        ("minibatch_size", 0.5),
        ("optimizer", None),
    ],
)
def test_what_cannot_be_is_refused(name, value):
    made = losses(environment("make_copy"))["agents"]
    with pytest.raises(ValueError, match=f"(?s)^{name}: .* Legal: "):
        trainer(made, environment("make_copy"), **{name: value() if callable(value) else value})


def test_unknown_keywords_are_refused():
    made = losses(environment("make_copy"))["agents"]
    with pytest.raises(TypeError, match="no_such_keyword"):
        trainer(made, environment("make_copy"), no_such_keyword=1)


def test_parts_that_do_not_fit_are_refused():
    env = environment("make_copy")
    made, other = losses(env)["agents"], losses(env)["agents"]
    with pytest.raises(ValueError, match=r"another TRPOLoss than the trainer's.*Legal: TrustRegionUpdater"):
        trainer(made, env, updater=TrustRegionUpdater(other))
    with pytest.raises(
        ValueError, match=r"holds parameters of the policy.* Legal: .*Adam\(critic_parameters\(loss\)\)"
    ):
        trainer(made, env, optimizer=torch.optim.Adam(made.parameters()))
    with pytest.raises(ValueError, match="parameters of a critic are missing"):
        trainer(made, env, optimizer=torch.optim.Adam(critic_parameters(made)[1:]))
    with pytest.raises(ValueError, match=r"no critic.*Give TRPOLoss a critic_network"):
        TrustRegionStepper(TrustRegionUpdater(TRPOLoss(make_double_actor())))
    with pytest.raises(TypeError, match="Legal: a TRPOLoss or a HATRPOSequentialObjective"):
        losses_by_group(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"(?s)collector: .*other parameters.* Legal: that one"):
        trainer(made, env, TensorDictSequential(made.actor_network))
    stepper = TrustRegionStepper(TrustRegionUpdater(made))
    with pytest.raises(ValueError, match="num_epochs: 3"):
        Trainer(
            collector=collector(env, made.actor_network),
            total_frames=FRAMES,
            frame_skip=1,
            optim_steps_per_batch=1,
            num_epochs=3,
            loss_module=made,
            optimizer=adam(made),
            optimization_stepper=stepper,
        )


@pytest.mark.filterwarnings("ignore:.*will be replaced by OptimizationStepper:FutureWarning")
@pytest.mark.parametrize("hook", ["replay buffer", "sub-batches", "flat"])
def test_hooks_that_split_or_mix_a_batch_are_refused(hook):
    """Advantages went along steps that were drawn at random."""
    env = environment("make_copy")
    made = losses(env)["agents"]
    whole = trainer(made, env)
    if hook == "replay buffer":
        buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(FRAMES), batch_size=FRAMES)
        ReplayBufferTrainer(buffer, flatten_tensordicts=True).register(whole)
    elif hook == "flat":
        whole.register_op("batch_process", lambda batch: batch.reshape(-1))
    else:
        whole.register_op("process_optim_batch", BatchSubSampler(batch_size=8, sub_traj_len=2))
    with pytest.raises(ValueError, match=r"hooks: .*other steps than were collected, .*Legal: hooks"):
        whole.train()


def test_hooks_that_leave_all_steps_in_their_places_are_taken():
    env = environment("make_copy")
    made = losses(env)["agents"]
    whole, reward = trainer(made, env), ("next", *made.tensor_keys.reward)
    whole.register_op("process_optim_batch", lambda batch: batch.clone().set(reward, 2 * batch[reward]))
    whole.train()
    assert whole.collected_frames == 2 * FRAMES


def test_a_network_that_policy_and_critic_share_is_not_the_critics_to_fit():
    common = TensorDictModule(torch.nn.Linear(6, 8), [("agents", "observation")], ["features"])
    policy = TensorDictModule(torch.nn.Linear(8, 4), ["features"], ["logits"])
    value = TensorDictModule(torch.nn.Linear(8, 1), ["features"], ["state_value"])
    sample = ProbabilisticTensorDictModule(
        ["logits"], ["action"], distribution_class=torch.distributions.Categorical, return_log_prob=True
    )
    actor = ProbabilisticTensorDictSequential(common, policy, sample)
    made = TRPOLoss(actor, TensorDictSequential(common, value))
    assert {id(parameter) for parameter in critic_parameters(made)} == {id(p) for p in value.parameters()}
