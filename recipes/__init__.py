"""The recipes: one script for each algorithm, read from top to bottom."""

from torchrl_trpo.errors import require

_MODULES = ("hydra", "pydantic", "tqdm", "matplotlib", "imageio", "imageio_ffmpeg", "filelock")
require("recipes,vmas", *_MODULES, importer=__name__)
