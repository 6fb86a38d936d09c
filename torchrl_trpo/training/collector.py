"""The recipes' collector."""

from __future__ import annotations

from tensordict.nn import TensorDictModuleBase
from torchrl.collectors import Collector
from torchrl.envs import EnvBase

from torchrl_trpo.errors import SettingError
from torchrl_trpo.parallel.ranks import ALONE, Ranks


def make_collector(
    env: EnvBase,
    policy: TensorDictModuleBase,
    *,
    frames_per_batch: int,
    total_frames: int = -1,
    compile_policy: bool = False,
    cudagraph_policy: bool = False,
    ranks: Ranks = ALONE,
) -> Collector:
    """TorchRL's collector, without what on-policy training on one device does not need.

    Trajectory ids cost a few operations at each step, and nothing reads them; environment and policy live on one device
    in one process, so that CUDA need not be waited for between them. ``torch.inference_mode`` is not for training data:
    its tensors cannot enter a graph.

    Args:
        env: the environment.
        policy: the policy, on the environment's device.

    Keyword Args:
        frames_per_batch: the environment steps of a batch, of all environments together.
        total_frames: the environment steps after which it ends. Default: -1, no end.
        compile_policy: whether the policy is compiled (``torch.compile``).
        cudagraph_policy: whether the policy is captured as a CUDA graph (``tensordict.nn.CudaGraphModule``).
        ranks: the processes that collect a batch together, each its share of the frames. Default: this one alone.

    Returns:
        The collector; it gives batches ``[num_envs, frames_per_batch / num_envs]``.

    Raises:
        SettingError: if a CUDA graph is asked for elsewhere than on a GPU.
    """
    if cudagraph_policy and (env.device is None or env.device.type != "cuda"):
        raise SettingError(f"collector.cudagraph_policy=true needs device=cuda, got {env.device}. Legal: false.")
    return Collector(
        env,
        policy,
        frames_per_batch=frames_per_batch // ranks.size,
        total_frames=total_frames,
        track_traj_ids=False,
        compile_policy=compile_policy,
        cudagraph_policy=cudagraph_policy,
        no_cuda_sync=True,
        auto_register_policy_transforms=False,
    )
