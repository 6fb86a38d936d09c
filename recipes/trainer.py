"""ITRPO, MATRPO or HATRPO in TorchRL's Trainer, from a config alone.

    python -m torchrl_trpo.recipes.trainer --config-name hatrpo
    python -m torchrl_trpo.recipes.trainer --config-name matrpo env.name=vmas/navigation updater.max_kl=0.02 seed=1

Settings: config/trainer/base.yaml and the YAML beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from pydantic import TypeAdapter, ValidationError

import torchrl_trpo.trainer.configs  # noqa: F401 - registers them
from torchrl_trpo.config.cli import plain_errors
from torchrl_trpo.config.schema import Recipe, Section, Train
from torchrl_trpo.config.validation import one_message
from torchrl_trpo.errors import SettingError

_CHECKED = {
    "seed": Recipe.model_fields["seed"],
    "value.gamma": Recipe.model_fields["gamma"],
    "value.lmbda": Recipe.model_fields["lmbda"],
    "trainer.total_frames": Train.model_fields["total_frames"],
}
"""Settings that neither TorchRL nor the configs check, as the recipes have them."""


def check(cfg: DictConfig) -> None:
    """Raises SettingError if a setting has a value that cannot be, or the folder holds a run; it lists all problems."""
    problems = []
    for name, field in _CHECKED.items():
        value = OmegaConf.select(cfg, name)
        kind: Any = Annotated[field.annotation, field]
        try:
            TypeAdapter(kind, config=Section.model_config).validate_python(value)
        except ValidationError:
            problems.append(f"{name} must be {field.title}, got {value}.")
    if found := [name for name in ("log", "checkpoint") if Path(cfg.output_dir, name).exists()]:
        problems.append(
            f"output_dir: {cfg.output_dir!r} holds a run already, with {found[0]!r}. Legal: another folder."
        )
    if problems:
        raise SettingError(one_message(problems))


@hydra.main(version_base=None, config_path=str(Path(__file__).parent / "config" / "trainer"), config_name="hatrpo")
@plain_errors()
def main(cfg: DictConfig) -> None:
    """Trains.

    Args:
        cfg: the config.
    """
    check(cfg)
    torch.manual_seed(cfg.seed)
    hydra.utils.instantiate(cfg.trainer).train()


if __name__ == "__main__":
    main()
