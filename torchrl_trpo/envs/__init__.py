"""Environments: one vectorised TorchRL environment from a name, agents sorted into groups."""

from torchrl_trpo.envs.compiled_collector import CompiledCollector
from torchrl_trpo.envs.compiled_vmas import CompiledVmasEnv
from torchrl_trpo.envs.device import resolve_device
from torchrl_trpo.envs.make import make_env
from torchrl_trpo.envs.vmas import BatchedResetVmasEnv

__all__ = ["BatchedResetVmasEnv", "CompiledCollector", "CompiledVmasEnv", "make_env", "resolve_device"]
