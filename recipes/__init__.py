"""The recipes: one script for each algorithm, read from top to bottom."""

from importlib.util import find_spec

_MISSING = [
    module for module in ("hydra", "pydantic", "tqdm", "matplotlib", "imageio", "filelock") if find_spec(module) is None
]
if _MISSING:  # with its name, `python -m` prints the message without a traceback
    raise ImportError(
        f"the recipes need {', '.join(_MISSING)}. Use: pip install 'torchrl-trpo[recipes,vmas]'", name=__name__
    )
