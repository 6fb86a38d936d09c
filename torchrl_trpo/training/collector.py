"""The recipes' collector."""

from __future__ import annotations

from tensordict.nn import TensorDictModuleBase
from torchrl.collectors import Collector
from torchrl.envs import EnvBase

from torchrl_trpo.envs import CompiledCollector, CompiledVmasEnv
from torchrl_trpo.envs.torchrl_step import base_of
from torchrl_trpo.errors import SettingError
from torchrl_trpo.parallel.ranks import ALONE, Ranks


def make_collector(
    env: EnvBase,
    policy: TensorDictModuleBase,
    *,
    frames_per_batch: int,
    total_frames: int = -1,
    cudagraph_policy: bool = False,
    ranks: Ranks = ALONE,
) -> Collector:
    """Makes TorchRL's collector, without what on-policy training on one device does not need.

    Trajectory ids cost a few operations at each step, and nothing reads them. Environment and policy are on one device
    in one process, so that nothing has to wait for CUDA between them. Tensors of ``torch.inference_mode`` cannot enter
    a graph, so it is not used for training data.

    Args:
        env: the environment.
        policy: the policy, on the environment's device.

    Keyword Args:
        frames_per_batch: the number of steps of a batch, over all environments.
        total_frames: the number of steps after which the collector ends. Default: -1, never.
        cudagraph_policy: whether the policy is captured as a CUDA graph (``tensordict.nn.CudaGraphModule``).
        ranks: the processes that share the frames of a batch. Default: this one alone.

    Returns:
        The collector, which yields batches ``[num_envs, frames_per_batch / num_envs]``. In a
        :class:`~torchrl_trpo.envs.CompiledVmasEnv` it is a :class:`~torchrl_trpo.envs.CompiledCollector`.

    Raises:
        SettingError: if ``cudagraph_policy`` is set and the environment is not on a GPU.
    """
    if cudagraph_policy and (env.device is None or env.device.type != "cuda"):
        raise SettingError(
            f"cudagraph_policy=True needs an environment on a CUDA device, got {env.device}. Legal: "
            "cudagraph_policy=False."
        )
    simulator = base_of(env)
    is_compiled = isinstance(simulator, CompiledVmasEnv) and simulator.why_not_compiled is None
    return (CompiledCollector if is_compiled else Collector)(
        env,
        policy,
        frames_per_batch=frames_per_batch // ranks.size,
        total_frames=total_frames,
        track_traj_ids=False,
        cudagraph_policy=cudagraph_policy,
        no_cuda_sync=True,
        auto_register_policy_transforms=False,
    )
