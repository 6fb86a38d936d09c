"""The documentation site: make docs."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from sphinx.util import logging

import torchrl_trpo

project = "torchrl-trpo"
version = release = torchrl_trpo.__version__
author = copyright = "the torchrl-trpo developers"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.coverage",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
html_theme = "furo"
html_title = "torchrl-trpo"
html_static_path = ["static"]
html_css_files = ["site.css"]
exclude_patterns = ["results/*.png"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
# The tutorial is executed once; later builds take its outputs from the cache until it changes.
nb_execution_mode = "cache"
nb_execution_cache_path = str(Path(__file__).parents[1] / "outputs" / "docs" / "executed")
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_mime_priority_overrides = [("*", "image/gif", 5)]

autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
maximum_signature_line_length = 100
napoleon_numpy_docstring = False
napoleon_use_rtype = False
copybutton_exclude = ".linenos, .gp, .go"

# Every reference must lead somewhere, but for those into packages whose pages cannot be read while building offline.
nitpicky = True
_ELSEWHERE = r"(torch|torchrl|tensordict|numpy|omegaconf|vmas|collections|multiprocessing|pathlib|typing)"
_SHORT = "Tensor|NestedKey|TensorDictModuleBase"
nitpick_ignore_regex = [(r"py:.*", rf"{_ELSEWHERE}(\..*)?|{_SHORT}|torchrl_trpo\.\w+\._Result")]

# What is public: the names that the two packages export, and what these modules hold. What another module holds is
# internal; a module that is in neither list fails the build, until it is decided which one it belongs to.
EXPORTING = ["torchrl_trpo", "torchrl_trpo.objectives"]
coverage_modules = ["torchrl_trpo"]
_INTERNAL = (
    "action_features|batched_reset|checkpoints|conjugate_gradient|divergence|fisher|layout|line_search|minibatches|"
    r"object_snapshot|object_state|ranged|row_statistics|score_statistics|seeding|simulators|stopping|torchrun|updater|vectors|objectives\..*|"
    r"recipes\.(comparison|comparison_report|experiments|sensitivity|tuning)"
)
coverage_ignore_modules = [rf"torchrl_trpo\.({_INTERNAL})$"]
coverage_ignore_functions = ["main"]
coverage_show_missing_items = True
coverage_statistics_to_report = False


def _check_exports(app: Any, env: Any) -> None:
    """Warns of exported names that are on no page; sphinx.ext.coverage looks at those defined in a module alone."""
    for module in EXPORTING:
        for name in importlib.import_module(module).__all__:
            if f"{module}.{name}" not in env.domaindata["py"]["objects"]:
                logging.getLogger(__name__).warning(f"{module}.{name} is exported, and not on a page of docs/api.")


def _skip_fields(app: Any, what: str, name: str, member: Any, skip: bool, options: Any) -> bool | None:
    """Leaves out the fields of named tuples, which the class docstring describes."""
    return True if type(member).__name__ == "_tuplegetter" else None


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-skip-member", _skip_fields)
    app.connect("env-check-consistency", _check_exports)
