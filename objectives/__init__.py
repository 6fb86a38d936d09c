"""The objective modules: parts that drop into a TorchRL pipeline."""

from torchrl_trpo.objectives.agent_gae import AgentGAE
from torchrl_trpo.objectives.central_critic import CentralCriticValueEstimator
from torchrl_trpo.objectives.clipped import ClippedUpdater
from torchrl_trpo.objectives.happo import HAPPOUpdater
from torchrl_trpo.objectives.hatrpo import HATRPOSequentialObjective
from torchrl_trpo.objectives.policy_region import PolicyTrustRegion
from torchrl_trpo.objectives.policy_rows import PolicyRows
from torchrl_trpo.objectives.trpo import TRPOLoss

__all__ = [
    "AgentGAE",
    "CentralCriticValueEstimator",
    "ClippedUpdater",
    "HAPPOUpdater",
    "HATRPOSequentialObjective",
    "PolicyRows",
    "PolicyTrustRegion",
    "TRPOLoss",
]
