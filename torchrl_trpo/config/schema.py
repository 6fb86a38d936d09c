"""The settings of each recipe: their names, meaning, types and ranges, as pydantic models.

A model is a section of the config; :data:`RECIPES` has the model of each recipe. ``recipes/config/*.yaml``: defaults.
"""

from __future__ import annotations

import functools
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, create_model

from torchrl_trpo.envs import resolve_device
from torchrl_trpo.envs.tasks import check_name
from torchrl_trpo.numerics.updater import TrustRegionUpdater
from torchrl_trpo.parallel.minibatches import ADAM_RANGES

# The title of a type says in words which values are legal.
Switch = Annotated[bool, Field(title="true or false")]
Options = Annotated[bool | dict[str, Any], Field(title="true, false or a mapping of options")]
Size = Annotated[int, Field(ge=1, title="a whole number of at least 1")]
Number = Annotated[float, Field(title="a number")]
NotNegative = Annotated[float, Field(ge=0, title="a number of at least 0")]
Share = Annotated[float, Field(ge=0, le=1, title="a number from 0 to 1")]
Layers = Annotated[list[Size], Field(title="a list of layer sizes such as [128,128]")]
Arguments = Annotated[dict[str, Any], Field(title="a mapping of arguments such as {n_agents: 3}")]
Network = Literal["mlp", "gru", "lstm"]


def _in_range(ranges: Any, name: str) -> Any:
    """The range in which an updater keeps one of its settings."""
    legal, is_legal = ranges[name]

    def check(value: float) -> float:
        if not is_legal(value):
            raise ValueError(legal)
        return value

    return Field(title=legal), AfterValidator(check)


def _check_device(name: Any) -> Any:
    resolve_device(name)
    return name


def _check_environment(name: Any) -> Any:
    check_name(str(name))
    return name


def _check_order(order: list[int]) -> list[int]:
    if not order or sorted(order) != list(range(len(order))):
        raise ValueError("not a permutation")
    return order


_Indices = Annotated[list[Annotated[int, Field(ge=0)]], AfterValidator(_check_order)]


class Section(BaseModel):
    """A section of the config: every field must be there, and no other."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class Environment(Section, extra="ignore"):  # of an unknown library any field is accepted
    """The environment, of any library."""

    name: Annotated[str, BeforeValidator(_check_environment), Field(title="an environment such as vmas/balance")]
    """Library and task, such as vmas/balance; env=vmas/balance chooses it with its defaults."""
    num_envs: Size
    """Environments side by side."""
    max_steps: Size
    """Steps after which an episode is cut off."""
    kwargs: Arguments
    """The task's own arguments, such as env.kwargs.n_agents=3."""


class Vmas(Environment, extra="forbid"):
    """An environment of VMAS."""

    continuous_actions: Switch = True
    """Whether actions are continuous; false for a Categorical policy."""
    compiled: Annotated[bool | Literal["auto"], Field(title="auto, true or false")] = "auto"
    """Whether simulator, rollouts, updates and critic fits are compiled, in C++; auto: if the run is long enough."""


class Gym(Environment, extra="forbid"):
    """An environment of Gymnasium or multi-agent MuJoCo."""

    parallel: Switch = False
    """Whether each environment has a process of its own, or one steps after the other."""


class PettingZoo(Gym):
    """An environment of PettingZoo."""

    continuous_actions: Switch = False
    """Whether actions are continuous; false for a Categorical policy."""


class Custom(Gym):
    """The user's own TorchRL environment."""

    factory: Annotated[
        str,
        Field(pattern=r"[^.]\.+[^.]", title="'package.module.function', a function that returns a torchrl EnvBase"),
    ]
    """A function of kwargs (and of num_envs, device, seed, if it takes them) that returns an EnvBase."""


ENVIRONMENTS: dict[str, type[Environment]] = {
    "vmas": Vmas,
    "pettingzoo": PettingZoo,
    "mamujoco": Gym,
    "gym": Gym,
    "custom": Custom,
}
"""The settings of environments by library, the first part of an environment's name."""


class Train(Section):
    """How long and in which portions a run learns."""

    total_frames: Size
    """Frames of the whole run; one frame is one step of one environment, all its agents."""
    frames_per_batch: Annotated[int, Field(ge=2, title="a whole number of at least 2")]
    """Frames between two updates, a multiple of env.num_envs."""


class Collector(Section):
    """How the policy acts during collection."""

    cudagraph_policy: Options
    """Whether the policy is captured as a CUDA graph for sampling."""


class Actor(Section):
    """The policy's networks."""

    network: Network
    """The first hidden layer of gru and lstm is recurrent; images are read by convolutions first."""
    hidden: Layers
    """Sizes of the hidden layers."""


class SharedActor(Actor):
    """Policies that agents may share."""

    sharing: Literal["all", "group", "none"]
    """Who shares a policy: agents of one team with the same spaces (group), of all teams (all), nobody (none)."""


class Critic(Section):
    """The critic's network and fit."""

    network: Network
    """The first hidden layer of gru and lstm is recurrent."""
    hidden: Layers
    """Sizes of the hidden layers."""
    lr: NotNegative
    """Adam's learning rate."""
    epochs: Size
    """Passes over the batch."""
    minibatch_size: Size
    """Frames per gradient step."""


class NormalizedCritic(Critic):
    """A critic beside trust-region steps."""

    value_norm: Switch
    """Whether values are normalised with running statistics, the last layer corrected (PopArt)."""


class LocalCritic(Critic):
    """A critic of each agent's own observation."""

    share_params: Switch
    """Whether a group shares one critic network, or each agent has its own."""


class CentralCritic(Critic):
    """A critic of all agents' observations, or of the state."""

    inputs: Literal["observations", "state", "both"]
    """What the critic reads: the observations of all agents, the environment's state, or both."""
    agent_one_hot: Switch
    """false: one value for the team (HARL's EP); true: the agent's index is an input, one value for each agent (FP)."""


class ITRPOCritic(LocalCritic, NormalizedCritic):
    """ITRPO's critic."""


class HATRPOCritic(CentralCritic, NormalizedCritic):
    """HATRPO's critic."""


class MATRPOCritic(HATRPOCritic):
    """MATRPO's critic."""

    others_actions: Switch
    """Whether the other agents' actions are inputs: V(s, u^-i) instead of V(s)."""


class Checkpoint(Section):
    """When the run is saved."""

    every: Size
    """Iterations between two checkpoints."""
    keep: Size
    """How many of the last checkpoints are kept; the best one is kept besides."""


class Logger(Section):
    """Where metrics go besides metrics.csv, through TorchRL's loggers."""

    backend: Literal["csv", "tensorboard", "wandb", "mlflow"] | None
    """TorchRL's logger."""
    kwargs: Annotated[dict[str, Any], Field(title="a mapping of arguments such as {project: mine}")]
    """Arguments of TorchRL's logger, such as project, offline, tracking_uri."""


class TrustRegionUpdate(Section):
    """The trust-region step of the policy."""

    max_kl: Annotated[float, *_in_range(TrustRegionUpdater.RANGES, "max_kl")]
    """δ, the trust region's radius: mean KL of an agent's joint action, in nats."""
    damping: Annotated[float, *_in_range(TrustRegionUpdater.RANGES, "damping")]
    """λ, added to the diagonal of the Fisher matrix."""
    cg_iters: Annotated[int, *_in_range(TrustRegionUpdater.RANGES, "cg_iters")]
    """Steps of conjugate gradient."""
    cg_tol: Annotated[float, *_in_range(TrustRegionUpdater.RANGES, "cg_tol")]
    """Relative residual at which conjugate gradient stops."""
    backtrack_coeff: Annotated[float, *_in_range(TrustRegionUpdater.RANGES, "backtrack_coeff")]
    """α, factor between tries of the line search."""
    max_backtracks: Annotated[int, *_in_range(TrustRegionUpdater.RANGES, "max_backtracks")]
    """Tries of the line search after the first."""
    accept_ratio: Annotated[float, *_in_range(TrustRegionUpdater.RANGES, "accept_ratio")]
    """κ, share of the predicted improvement that a step must reach."""
    fisher_subsample: Annotated[float, *_in_range(TrustRegionUpdater.RANGES, "fisher_subsample")]
    """Share of the rows on which the Fisher matrix is estimated."""
    kl_budget: Literal["agent", "team"]
    """agent: max_kl for each region; team: max_kl times their number, shared out by what each can gain."""


class ClippedUpdate(Section):
    """The clipped minibatch steps of the policy."""

    lr: Annotated[float, *_in_range(ADAM_RANGES, "lr")]
    """Adam's learning rate, of the policy."""
    epochs: Annotated[int, *_in_range(ADAM_RANGES, "epochs")]
    """Passes over the batch."""
    minibatch_size: Annotated[int, *_in_range(ADAM_RANGES, "minibatch_size")]
    """Frames per gradient step."""
    max_grad_norm: Annotated[float, *_in_range(ADAM_RANGES, "max_grad_norm")]
    """Longer gradients are shortened to this norm."""


class Recipe(Section):
    """The settings that all recipes have."""

    seed: Annotated[int, Field(ge=0, lt=2**32, title="a whole number from 0 to 4294967295")]  # NumPy's range, for VMAS
    """Seed of everything random."""
    device: Annotated[str, BeforeValidator(_check_device), Field(title="a device such as auto, cpu or cuda:1")]
    """Where everything is computed; auto is an accelerator if there is one, else the CPU."""
    output_dir: Annotated[str, Field(min_length=1, title="a folder")]
    """Folder of metrics, plots and checkpoints; Hydra's run folder by default."""
    resume: Annotated[str | None, Field(title="null or the folder of a run")]
    """Folder of a run to continue with its settings."""
    film: Switch
    """Whether the trained policy is filmed."""
    non_finite: Literal["stop", "drop"] = "stop"
    """At a NaN or infinity from the environment: stop and say where, or drop those rows and go on."""
    normalize_observations: Switch
    """Whether observations are normalised with running statistics."""
    gamma: Share
    """Discount."""
    lmbda: Share
    """λ of generalised advantage estimation."""
    entropy_coeff: Number
    """Weight of the policy's entropy in the surrogate."""
    env: Environment
    train: Train
    collector: Collector
    actor: Actor
    critic: Critic
    checkpoint: Checkpoint
    logger: Logger

    @classmethod
    @functools.cache
    def of_library(cls, library: str | None) -> type[Recipe]:
        """The settings with those of one library's environments; None leaves the section ``env`` open."""
        env: Any = (Any, None) if library is None else (ENVIRONMENTS.get(library, Environment), ...)
        return create_model(cls.__name__, __base__=cls, env=env)


class TrustRegionRecipe(Recipe):
    """The settings of recipes with trust-region steps."""

    chunk_size: Annotated[Size | None, Field(title="null or a whole number of at least 1")]
    """Environment steps that the policy update holds at a time, when memory is short; null: all."""
    updater: TrustRegionUpdate
    critic: NormalizedCritic


class ClippedRecipe(Recipe):
    """The settings of recipes with clipped steps."""

    clip_epsilon: Annotated[float, Field(gt=0, lt=1, title="a number between 0 and 1, both excluded")]
    """ε, how far the ratio of probabilities may leave 1 before a row gives no gradient."""
    updater: ClippedUpdate


class AgentSequence(Recipe):
    """The settings of recipes that update one agent after the other."""

    team_reward: Literal["mean", "sum"] | None
    """One reward for the team, the mean or sum over its agents; null: each agent's own."""
    agent_order: Annotated[
        Literal["random", "fixed", "greedy"] | _Indices,
        Field(title="random, fixed, greedy, or a list that names each agent's index once, such as [1,0,2]"),
    ]
    """In which order agents are updated; random draws anew at every update, greedy goes by what each can gain."""


class TRPO(TrustRegionRecipe):
    """The settings of TRPO."""


class ITRPO(TrustRegionRecipe):
    """The settings of ITRPO."""

    actor: SharedActor
    critic: ITRPOCritic


class MATRPO(TrustRegionRecipe):
    """The settings of MATRPO."""

    actor: SharedActor
    critic: MATRPOCritic


class HATRPO(AgentSequence, TrustRegionRecipe):
    """The settings of HATRPO."""

    critic: HATRPOCritic


class HAPPO(AgentSequence, ClippedRecipe):
    """The settings of HAPPO."""

    agent_order: Annotated[
        Literal["random", "fixed"] | _Indices,
        Field(title="random, fixed, or a list that names each agent's index once, such as [1,0,2]"),
    ]
    """In which order agents are updated; random draws anew at every update."""
    critic: CentralCritic


class MAPPO(ClippedRecipe):
    """The settings of MAPPO."""

    actor: SharedActor
    critic: CentralCritic


class IPPO(ClippedRecipe):
    """The settings of IPPO."""

    actor: SharedActor
    critic: LocalCritic


RECIPES: dict[str, type[Recipe]] = {
    "trpo": TRPO,
    "itrpo": ITRPO,
    "matrpo": MATRPO,
    "hatrpo": HATRPO,
    "happo": HAPPO,
    "mappo": MAPPO,
    "ippo": IPPO,
}
"""The settings by recipe."""
