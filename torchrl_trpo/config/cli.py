"""The command line of a recipe: its settings, its help, and errors without a traceback."""

from __future__ import annotations

import contextlib
import gc
import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import TextWrapper
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from torchrl_trpo.config.overrides import compose_settings, environments
from torchrl_trpo.config.schema import RECIPES
from torchrl_trpo.config.validation import choices, fields
from torchrl_trpo.errors import AgreedError, SettingError
from torchrl_trpo.parallel.ranks import RankLostError
from torchrl_trpo.parallel.torchrun import is_first

_WIDTH = 100


def run_recipe(train: Callable[[DictConfig], Any], recipe: str) -> None:
    """Runs a recipe from the command line, or shows its help or the environments.

    ``train`` is its training function, ``recipe`` its file; ``config/<its name>.yaml`` beside it is its config.
    """
    path = Path(recipe).resolve()
    config_dir, arguments = path.parent / "config", sys.argv[1:]
    flags = {"--help", "-h", "--environments"}.intersection(arguments)
    with plain_errors():
        cfg, overrides = compose_settings([each for each in arguments if each not in flags], config_dir, path.stem)
    if flags and hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # of ``| head``, which reads no further
    if "--environments" in flags:
        print(environments_text(config_dir))
    elif flags:
        print(help_text(str(sys.modules["__main__"].__doc__), cfg, config_dir, path.stem))
    else:
        sys.argv[1:] = overrides
        gc.freeze()  # what is imported stays; looking through it for garbage takes a twentieth of a short run
        hydra.main(version_base=None, config_path=str(config_dir), config_name=path.stem)(plain_errors()(train))()


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Ends the command with the message alone when a setting is wrong; other errors keep their traceback.

    An error on which all processes of a job agree is printed by the first one alone.
    """
    try:
        yield
    except SettingError as error:
        sys.exit(f"error: {error}" if is_first() or not isinstance(error, AgreedError) else 1)
    except RankLostError as error:
        sys.exit(f"error: {error}")
    finally:
        if HydraConfig.initialized():
            with contextlib.suppress(OSError):  # the folder that Hydra made stays only if something is in it
                Path(HydraConfig.get().runtime.output_dir).rmdir()


def help_text(purpose: str, cfg: DictConfig, config_dir: Path, config_name: str) -> str:
    """The help of a recipe: its settings with their values, meaning and legal values."""
    model = RECIPES[config_name].of_library(cfg.env.name.partition("/")[0])
    lines = [
        purpose.strip(),
        "",
        f"The defaults are in {config_dir / config_name}.yaml and the files that it names.",
        "",
        "  --help            this text; with other settings, such as env=vmas/navigation, the text for those",
        "  --environments    lists the environments: env=vmas/navigation chooses one with its defaults",
        "  --multirun, -m    a run for each value: -m seed=0,1,2",
        "  --cfg job         prints the config as YAML; --hydra-help shows Hydra's other flags",
    ]
    section = None
    wrapper = TextWrapper(_WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    for name, field in sorted(fields(model), key=lambda each: "." in each[0]):
        if name.rpartition(".")[0] != section:
            section = name.rpartition(".")[0]
            heading = model.model_fields[section].annotation.__doc__ if section else "The run."
            lines += ["", f"{section}: {heading}" if section else str(heading)]
        value = OmegaConf.select(cfg, name) if name != "output_dir" else "outputs/..."
        legal = " | ".join(choices(field)) or field.title
        lines += [f"  {name}={_typed(value)}", *wrapper.wrap(f"{field.description} ({legal})")]
    return "\n".join(lines)


def environments_text(config_dir: Path) -> str:
    """The environments that can be chosen, by library."""
    wrapper = TextWrapper(_WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    lines = ["Environments, as env=vmas/navigation:"]
    for library, names in environments(config_dir).items():
        missing = f"not installed: pip install 'torchrl-trpo[recipes,{library}]'"
        lines += ["", *wrapper.wrap("  ".join(names) or f"{library}/...  {missing}")]
    return "\n".join(lines)


def _typed(value: Any) -> str:
    """A value as it is typed on the command line."""
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value)
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":")).replace('"', "")
