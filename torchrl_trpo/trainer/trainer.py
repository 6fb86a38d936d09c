"""Trust-region steps in TorchRL's ``Trainer``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.collectors import BaseCollector
from torchrl.trainers import LogScalar, OptimizationStepper, Trainer, UpdateWeights
from torchrl.trainers.algorithms.on_policy import OnPolicyTrainer

from torchrl_trpo.arguments import positive_whole
from torchrl_trpo.keys import group_of, key_list, next_key, path, return_key
from torchrl_trpo.numerics.updater import TrustRegionUpdater
from torchrl_trpo.objectives import HATRPOSequentialObjective, TRPOLoss
from torchrl_trpo.trainer.episode_return import LogEpisodeReturn
from torchrl_trpo.training.critic_fit import fit_critics, trained_parameters
from torchrl_trpo.training.estimators import estimate_advantages

_STATISTICS = (
    "kl",
    "accepted",
    "improvement",
    "expected_improvement",
    "step_fraction",
    "grad_norm",
    "cg_residual",
)
_ONE_UPDATE = (
    "A batch serves one trust-region step: after it, the policy is no longer the one that collected the batch."
)
_WHOLE_BATCH = "The step takes the whole batch, in the order of time, as the collector gives it. Leave it out."
_OWN_ESTIMATOR = (
    "The advantages are those of the loss: loss.make_value_estimator(gamma=..., lmbda=...), or another estimator there."
)
_LEGAL: Mapping[str, tuple[Any, str]] = {
    "optim_steps_per_batch": (1, _ONE_UPDATE),
    "num_epochs": (1, _ONE_UPDATE + " critic_epochs is for the critic."),
    "replay_buffer": (None, _WHOLE_BATCH),
    "batch_size": (None, _WHOLE_BATCH + " minibatch_size is for the critic."),
    "async_collection": (False, "The step is taken from the policy that collected the batch."),
    "add_gae": (False, _OWN_ESTIMATOR),
    "gae": (None, _OWN_ESTIMATOR),
    "gamma": (None, _OWN_ESTIMATOR),
    "lmbda": (None, _OWN_ESTIMATOR),
    "clip_norm": (None, "The policy's step is bounded by max_kl, and the critic's gradients are not clipped."),
    "target_net_updater": (None, "A TRPOLoss has no target networks."),
}


class TrustRegionStepper(OptimizationStepper):
    """Takes one trust-region step on the policy and fits the critic, for TorchRL's ``Trainer``.

    For each batch: the losses' own value estimators, where the data has no advantage; one
    :meth:`TrustRegionUpdater.step <torchrl_trpo.TrustRegionUpdater.step>` on all of it; then
    :func:`~torchrl_trpo.training.critic_fit.fit_critics`. Give it to ``Trainer(optimization_stepper=...)``, or use
    :class:`TRPOTrainer`. Its state is the updater's settings, and the state of an optimiser of its own.

    Args:
        updater: on the trainer's ``loss_module``, a ``TRPOLoss`` or ``HATRPOSequentialObjective`` with critics.

    Keyword Args:
        optimizer: over the parameters of all critics, and of nothing else of the losses. Default: the trainer's.
        critic_epochs: the critic's passes over the batch.
        minibatch_size: rows (environment steps) per gradient step of the critic.

    Raises:
        TypeError: if the updater is on another kind of objective.
        ValueError: if a loss has no critic, or ``critic_epochs`` or ``minibatch_size`` is below 1; when registered, if
            the updater is not on the trainer's loss, the optimiser is missing or not over the critics' parameters
            alone, or the trainer takes several steps on a batch; at a step, if a hook of the trainer has left other
            steps than were collected.

    Examples:
        >>> from torchrl.trainers import Trainer
        >>> from torchrl_trpo import TrustRegionUpdater
        >>> from torchrl_trpo.trainer import TrustRegionStepper, critic_parameters
        >>> stepper = TrustRegionStepper(TrustRegionUpdater(loss, max_kl=0.01))  # doctest: +SKIP
        >>> critic_optim = torch.optim.Adam(critic_parameters(loss))  # doctest: +SKIP
        >>> trainer = Trainer(  # doctest: +SKIP
        ...     collector=collector, total_frames=240_000, frame_skip=1, optim_steps_per_batch=1, loss_module=loss,
        ...     optimizer=critic_optim, optimization_stepper=stepper,
        ... )
    """

    def __init__(
        self,
        updater: TrustRegionUpdater,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        critic_epochs: int = 5,
        minibatch_size: int = 300,
    ) -> None:
        self.updater = updater
        self.optimizer = optimizer
        self.critic_epochs = positive_whole("critic_epochs", critic_epochs)
        self.minibatch_size = positive_whole("minibatch_size", minibatch_size)
        self._collected: TensorDictBase | None = None  # what the next step is to have whole
        self._losses = losses_by_group(updater.objective)
        for group, loss in self._losses.items():
            if loss.critic_network is None:
                raise ValueError(
                    f"the loss{f' of group {group!r}' if len(self._losses) > 1 else ''} has no critic to compute "
                    "advantages with. Give TRPOLoss a critic_network."
                )
            _ = loss.value_estimator  # makes the default one: a new trainer has what a checkpoint holds

    def register(self, trainer: Trainer, name: str = "optimization_stepper") -> None:
        """Checks that the stepper fits the trainer, and registers it for the trainer's checkpoints.

        Args:
            trainer: the trainer.
            name: the name in the checkpoint.

        Raises:
            ValueError: if it does not fit; the class docstring lists the reasons.
        """
        if self.updater.objective is not trainer.loss_module:
            raise ValueError(
                f"updater: it steps on another {type(self.updater.objective).__name__} than the trainer's loss_module. "
                "Legal: TrustRegionUpdater(loss_module)."
            )
        for setting in ("optim_steps_per_batch", "num_epochs"):
            _check_legal(setting, getattr(trainer, setting))
        self._check_optimizer(self.optimizer or trainer.optimizer)
        trainer.register_op("batch_process", self._note_collected)  # before hooks that are added later
        super().register(trainer, name)

    def step(self, trainer: Trainer, sub_batch: TensorDictBase) -> TensorDict:
        """Updates the policy once, then the critic.

        Args:
            trainer: the trainer, whose optimiser fits the critic unless the stepper has its own.
            sub_batch: the batch as the collector gave it, ``[*B, T]``; not modified. Advantages that it lacks are
                estimated.

        Returns:
            Detached scalars. Of the policy, as :meth:`~torchrl_trpo.TrustRegionUpdater.step` returns them, the mean
            over its regions: ``kl``, ``accepted``, ``improvement``, ``expected_improvement``, ``step_fraction``,
            ``grad_norm`` and ``cg_residual``. Of the critic, as
            :func:`~torchrl_trpo.training.critic_fit.fit_critics` returns them: ``loss_critic``, ``explained_variance``
            and ``dropped``.
        """
        self._check_whole(sub_batch)
        losses = self._losses.values()
        sub_batch = sub_batch.clone(False)  # a collector may fill the same tensordict again
        missing = [loss for loss in losses if sub_batch.get(loss.tensor_keys.advantage, None) is None]
        estimate_advantages(missing, sub_batch)
        statistics = self.updater.step(sub_batch)
        fit = fit_critics(
            losses,
            self.optimizer or trainer.optimizer,
            sub_batch,
            epochs=self.critic_epochs,
            minibatch_size=self.minibatch_size,
            process_group=next(iter(losses)).ranks.group,
        )
        return TensorDict({**{name: statistics[name].float().mean() for name in _STATISTICS}, **fit})

    def state_dict(self) -> dict[str, Any]:
        """Returns the updater's settings, and the state of the stepper's own optimiser if it has one."""
        own = {} if self.optimizer is None else {"optimizer": self.optimizer.state_dict()}
        return {"updater": self.updater.state_dict(), **own}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores the state.

        Args:
            state_dict: what :meth:`state_dict` returned.
        """
        self.updater.load_state_dict(state_dict["updater"])
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state_dict["optimizer"])

    def _note_collected(self, batch: TensorDictBase) -> TensorDictBase:
        self._collected = batch
        return batch

    def _check_whole(self, batch: TensorDictBase) -> None:
        """Checks that hooks such as a replay buffer's have neither split the collected batch nor mixed its steps."""
        collected, self._collected = self._collected, None
        if collected is None or batch is collected:
            return
        for key in (key for loss in self._losses.values() for key in key_list(loss.tensor_keys.action)):
            theirs = collected.get(key)
            ours = batch.get(key).to(theirs.device)
            if ours.shape != theirs.shape or bool(((ours != theirs) & (ours == ours)).any()):  # padding may be NaN
                raise ValueError(
                    f"hooks: the trainer's leave a batch {[*batch.shape]} with other steps than were collected, "
                    f"{[*collected.shape]}. Legal: hooks that leave all steps in their places."
                )

    def _check_optimizer(self, optimizer: torch.optim.Optimizer | None) -> None:
        legal = (
            "Legal: one over the critic's parameters alone, such as Adam(critic_parameters(loss)), with "
            "critic_parameters of torchrl_trpo.trainer."
        )
        if optimizer is None:
            raise ValueError(f"optimizer: there is none to fit the critic with. {legal}")
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for loss in self._losses.values():
            if held & {id(parameter) for parameter in loss.actor_parameters.values(True, True)}:
                raise ValueError(
                    "optimizer: it holds parameters of the policy, which may only move by trust-region steps. " + legal
                )
            if not {id(parameter) for parameter in critic_parameters(loss)} <= held:
                raise ValueError(f"optimizer: parameters of a critic are missing in it. {legal}")


class TRPOTrainer(OnPolicyTrainer):
    """TRPO, ITRPO, MATRPO or HATRPO in TorchRL's ``Trainer``, beside its ``PPOTrainer``.

    Each batch of the collector is one trust-region step and one fit of the critic, see :class:`TrustRegionStepper`.
    The advantages come from the loss's own value estimator. The collector may hold another instance of the policy than
    the loss, as when Hydra makes both: it gets the loss's weights before the first batch and after every step.

    The log has the entries of ``OnPolicyTrainer``, those that the stepper returns, and ``episode_return``, see
    :class:`LogEpisodeReturn`. With several groups of agents the names end in ``_<group>``. Each part of a composite
    action has an entry ``action_norm_<key>``.

    Keyword Args:
        collector: the collector; its batches are ``[*B, T]``.
        total_frames: the environment steps to train for.
        loss_module: a ``TRPOLoss`` or ``HATRPOSequentialObjective``, with critics.
        optimizer: the optimiser of the critics, over their parameters and no other of the losses.
        updater: on ``loss_module``. Default: a :class:`~torchrl_trpo.TrustRegionUpdater` with its defaults.
        critic_epochs: the critic's passes over a batch.
        minibatch_size: rows (environment steps) per gradient step of the critic.
        frame_skip: the environment's, for the count of frames.
        optim_steps_per_batch: 1.
        done_key: for the loss and the log, with several groups a mapping ``{group: key}``. Default: the loss's; so are
            ``terminated_key``, ``reward_key`` and ``action_key``.
        terminated_key: see ``done_key``.
        reward_key: see ``done_key``.
        action_key: see ``done_key``.
        episode_reward_key: what ``r_total`` in the log sums, as ``OnPolicyTrainer`` does. Default: the reward.
        observation_key: for the log with ``log_observations``. Default: what the policy reads first.
        **kwargs: further keywords of :class:`~torchrl.trainers.algorithms.on_policy.OnPolicyTrainer`: ``logger``,
            ``lr_scheduler`` (the critic's), ``checkpoint``, ``save_trainer_file``, ``progress_bar``, ... Those that
            split or repeat a batch are refused.

    Raises:
        TypeError: if ``loss_module`` is another kind of loss.
        ValueError: if a keyword has a value that a trust-region step cannot have, the collector's policy has other
            parameters than the loss's; see also :class:`TrustRegionStepper`.
    """

    _algo_name = "TRPO"  # in the errors of OnPolicyTrainer

    def __init__(
        self,
        *,
        collector: BaseCollector,
        total_frames: int,
        loss_module: TRPOLoss | HATRPOSequentialObjective,
        optimizer: torch.optim.Optimizer,
        updater: TrustRegionUpdater | None = None,
        critic_epochs: int = 5,
        minibatch_size: int = 300,
        frame_skip: int = 1,
        optim_steps_per_batch: int = 1,
        done_key: NestedKey | Mapping[str, NestedKey] | None = None,
        terminated_key: NestedKey | Mapping[str, NestedKey] | None = None,
        reward_key: NestedKey | Mapping[str, NestedKey] | None = None,
        action_key: NestedKey | Mapping[str, NestedKey] | None = None,
        episode_reward_key: NestedKey | None = None,
        observation_key: NestedKey | None = None,
        **kwargs: Any,
    ) -> None:
        for name, value in {"optim_steps_per_batch": optim_steps_per_batch, **kwargs}.items():
            if name in _LEGAL:
                _check_legal(name, value)
        self._losses = losses_by_group(loss_module)
        _check_same_parameters(getattr(collector, "policy", None), loss_module.actor_network)
        stepper = TrustRegionStepper(
            TrustRegionUpdater(loss_module) if updater is None else updater,
            critic_epochs=critic_epochs,
            minibatch_size=minibatch_size,
        )
        reward_key = reward_key or self._loss_keys("reward")
        super().__init__(
            collector=collector,
            total_frames=total_frames,
            frame_skip=frame_skip,
            optim_steps_per_batch=1,
            loss_module=loss_module,
            add_gae=False,
            done_key=done_key or self._loss_keys("done"),
            terminated_key=terminated_key or self._loss_keys("terminated"),
            reward_key=reward_key,
            action_key=action_key or self._loss_keys("action"),
            episode_reward_key=episode_reward_key or reward_key,
            observation_key=observation_key or loss_module.actor_network.in_keys[0],
            **{name: value for name, value in kwargs.items() if name not in _LEGAL},
        )
        self.optimizer = optimizer  # not before: TorchRL would add a hook that steps with it
        self.optimization_stepper = stepper
        stepper.register(self)
        # TorchRL looks at the same private attribute; there is no public one that says whether schemes are set.
        weight_map = kwargs.get("weight_update_map") if getattr(collector, "_weight_sync_schemes", None) else None
        self.register_op("setup", UpdateWeights(collector, 1, self._policy_weights, weight_map, self))

    def _policy_weights(self) -> TensorDictBase:
        return TensorDict.from_module(self.loss_module.actor_network)

    def _loss_keys(self, name: str) -> NestedKey | dict[str, NestedKey]:
        """A key of the loss; with several groups a mapping from each to its key."""
        keys = {group: getattr(loss.tensor_keys, name) for group, loss in self._losses.items()}
        return keys if len(keys) > 1 else next(iter(keys.values()))

    def _setup_logging(self) -> None:
        """Logs what ``OnPolicyTrainer`` does, of each group and each part of an action, and episode returns.

        ``OnPolicyTrainer`` calls this private method where it sets up its own log; it has no public one for it.
        """
        several = len(self._losses) > 1
        for group, loss in self._losses.items():
            keys, end = loss.tensor_keys, f"_{group}" if several else ""
            reward, actions = next_key(keys.reward), key_list(keys.action)
            logs = [LogScalar(next_key(keys.done), f"done_percentage{end}", log_pbar=not several, include_std=False)]
            if self.log_rewards:
                total = reward if several else next_key(self.episode_reward_key)
                logs += [
                    LogScalar(reward, f"r_training{end}", log_pbar=True),
                    LogScalar(reward, f"r_max{end}", include_std=False, reduction="max"),
                    LogScalar(total, f"r_total{end}", include_std=False, reduction="sum"),
                ]
                done = keys.done if group_of(keys.reward) else "done"  # a team's return ends with the episode
                LogEpisodeReturn(return_key(keys.reward), done_key=done, logname=f"episode_return{end}").register(self)
            for key in actions if self.log_actions else []:
                part = "_".join(["", *path(key)]) if len(actions) > 1 else ""
                logs.append(LogScalar(key, f"action_norm{part}{end}"))
            if self.log_observations:
                observation = loss.actor_network.in_keys[0] if several else self.observation_key
                logs += [LogScalar(observation, f"obs_norm{end}")]
            for log in logs:
                self.register_op("pre_steps_log", log)


def losses_by_group(objective: Any) -> dict[str, TRPOLoss]:
    """Lists the losses of a trainer's loss module.

    Args:
        objective: a ``TRPOLoss``, or the objective of several.

    Returns:
        The losses by group.

    Raises:
        TypeError: if it is neither.
    """
    if isinstance(objective, TRPOLoss):
        return {"agents": objective}
    if isinstance(objective, HATRPOSequentialObjective):
        return cast("dict[str, TRPOLoss]", dict(objective.losses.items()))
    raise TypeError(
        f"loss_module: {type(objective).__name__}. Legal: a TRPOLoss or a HATRPOSequentialObjective, on which the "
        "updater steps."
    )


def critic_parameters(loss: TRPOLoss) -> list[Tensor]:
    """Lists the parameters for the critic's optimiser.

    Args:
        loss: a loss with a critic.

    Returns:
        The critic's parameters, without those that it shares with the policy.
    """
    policy = {id(parameter) for parameter in loss.actor_parameters.values(True, True)}
    return [parameter for parameter in trained_parameters(loss) if id(parameter) not in policy]


def _check_same_parameters(policy: Any, actor_network: TensorDictModuleBase) -> None:
    """Checks that the collector's policy can take the weights of the policy that is trained."""
    if not isinstance(policy, TensorDictModuleBase):
        return
    theirs, ours = (
        {key: value.shape for key, value in TensorDict.from_module(module).items(True, True)}
        for module in (policy, actor_network)
    )
    if theirs != ours:
        raise ValueError(
            f"collector: its policy is a {type(policy).__name__} with other parameters than loss_module.actor_network, "
            f"a {type(actor_network).__name__}. Legal: that one, or one made alike."
        )


def _check_legal(name: str, value: Any) -> None:
    legal, reason = _LEGAL[name]
    if value is legal or (isinstance(legal, int) and value == legal):
        return
    raise ValueError(f"{name}: {value!r}. Legal: {legal}. {reason}")
