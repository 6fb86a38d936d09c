"""ITRPO, MATRPO or HATRPO in TorchRL's Trainer, from a config alone.

    python -m torchrl_trpo.recipes.trainer --config-name hatrpo
    python -m torchrl_trpo.recipes.trainer --config-name matrpo env.name=vmas/navigation updater.max_kl=0.02 seed=1

Settings: config/trainer/base.yaml and the YAML beside it.
"""

from __future__ import annotations

from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig

import torchrl_trpo.trainer.configs  # noqa: F401 - registers them


@hydra.main(version_base=None, config_path=str(Path(__file__).parent / "config" / "trainer"), config_name="hatrpo")
def main(cfg: DictConfig) -> None:
    """Trains.

    Args:
        cfg: the config.
    """
    torch.manual_seed(cfg.seed)
    hydra.utils.instantiate(cfg.trainer).train()


if __name__ == "__main__":
    main()
