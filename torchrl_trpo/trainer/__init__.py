"""The trust-region family in TorchRL's ``Trainer``, and its configs."""

from torchrl_trpo.trainer.episode_return import LogEpisodeReturn
from torchrl_trpo.trainer.trainer import (
    TRPOTrainer,
    TrustRegionStepper,
    critic_parameters,
    losses_by_group,
)

__all__ = ["LogEpisodeReturn", "TRPOTrainer", "TrustRegionStepper", "critic_parameters", "losses_by_group"]
