"""``import torchrl_trpo`` is light: nothing of PyTorch is imported before a name is used."""

import subprocess
import sys

import torchrl_trpo


def test_pytorch_is_not_imported_before_it_is_needed():
    code = "import sys, torchrl_trpo, torchrl_trpo.errors; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_name_is_there():
    assert set(torchrl_trpo.__all__) <= set(dir(torchrl_trpo))
    assert all(getattr(torchrl_trpo, name).__name__ == name for name in torchrl_trpo.__all__)


def test_a_recipe_names_the_extra_that_it_needs():
    code = "import sys, runpy; sys.modules['hydra'] = None; runpy._run_module_as_main('torchrl_trpo.recipes.hatrpo')"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert "torchrl_trpo.recipes needs hydra. Use: pip install 'torchrl-trpo[recipes,vmas]'" in done.stderr
    assert "Traceback" not in done.stderr
