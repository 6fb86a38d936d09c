"""The recipes: one script for each algorithm, read from top to bottom."""

import gc
import sys

from torchrl_trpo.errors import require

_MODULES = ("hydra", "pydantic", "tqdm", "matplotlib", "imageio", "imageio_ffmpeg", "filelock")
require("recipes,vmas", *_MODULES, importer=__name__)

if sys.argv[:1] == ["-m"] and gc.isenabled():  # begun by python -m, and not imported
    gc.disable()  # looking for garbage would take a fourth of the time that PyTorch and TorchRL need
    try:
        import torchrl.collectors  # noqa: F401
    finally:
        gc.freeze()  # what is imported stays
        gc.enable()
