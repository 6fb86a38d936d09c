"""The documentation site: make docs."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from pkgutil import walk_packages
from typing import Any

from docutils import nodes
from math_core import LatexError, LatexToMathML
from sphinx.errors import ExtensionError
from sphinx.util import logging
from sphinx.util.inspect import signature, stringify_signature

import torchrl_trpo

project = "torchrl-trpo"
version = release = torchrl_trpo.__version__
author = copyright = "the torchrl-trpo developers"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.coverage",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
html_theme = "furo"
html_title = "torchrl-trpo"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
exclude_patterns = ["results/*.png"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
# The tutorial is executed once; later builds take its outputs from the cache until it changes.
nb_execution_mode = "cache"
nb_execution_cache_path = str(Path(__file__).parents[1] / "outputs" / "docs" / "executed")
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_merge_streams = True
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
_ELSEWHERE = r"(torch|torchrl|tensordict|numpy|omegaconf|vmas|collections|multiprocessing|pathlib|pydantic|typing)"
_SHORT = "AUTO_LOSS_MASK_KEYS|BaseModel|FieldInfo|MarlGroupMapType|Tensor|NestedKey|TensorDictModuleBase"
_BASES = r"torchrl_trpo(\.\w+)+\.(_\w+|AgentOrder|CriticLoss|SurrogateLoss|Recipe)"
nitpick_ignore_regex = [(r"py:.*", rf"{_ELSEWHERE}(\..*)?|{_SHORT}|{_BASES}")]

# The site is read without a network. A page may link to others, but loads no script, style, font or picture from them.
_LOADS = re.compile(
    r"""<(?:audio|embed|iframe|img|link|object|script|source|video)\b[^>]*["'](?:https?:)?//[^"']*"""
    r"""|(?:@import|url\()\s*["']?(?:https?:)?//[^"')]*|["'](?:https?:)?//[^"'\s]*\.(?:css|m?js)["']"""
)
_mathml = LatexToMathML(fancy_error=False)

# What is public: the names that the two packages export, and what the modules on the pages hold, which
# sphinx.ext.coverage compares. A module that is on no page and not internal fails the build until it is decided.
INTERNAL = (
    r"torchrl_trpo\.(arguments|keys|seeding|(numerics|distributions|objectives|envs|kernels|networks|trainer|recipes\.studies)(\..*)?|"
    r"parallel(\.(minibatches|torchrun))?|reporting(\.style)?|config(\..*)?|"
    r"training(\.(checkpoints|collection_state|console|continuation|run_folder|signals|summary))?)"
)
coverage_ignore_functions = ["main"]
coverage_show_missing_items = True
coverage_statistics_to_stdout = False


def _check_public(app: Any, env: Any) -> None:
    """Warns of modules and exported names that are on no page."""
    python = env.domaindata["py"]
    for package in (torchrl_trpo, *map(importlib.import_module, ("torchrl_trpo.objectives", "torchrl_trpo.recipes"))):
        names = [package.__name__, *(each.name for each in walk_packages(package.__path__, f"{package.__name__}."))]
        missing = [name for name in names if name not in python["modules"] and not re.fullmatch(INTERNAL, name)]
        if hasattr(package, "__all__"):
            exported = [f"{package.__name__}.{name}" for name in package.__all__]
            missing += [name for name in exported if name not in python["objects"]]
        for name in missing:
            logging.getLogger(__name__).warning(f"{name} is public, and on no page of docs/api; see docs/conf.py.")


def _write_formula(writer: Any, node: nodes.math | nodes.math_block) -> None:
    """Writes a formula as MathML, which browsers draw by themselves."""
    display = isinstance(node, nodes.math_block)
    tag = "div" if display else "span"
    try:
        formula = _mathml.convert_with_local_state(node.astext(), displaystyle=display)
    except LatexError as error:
        raise ExtensionError(f"{writer.builder.current_docname}: formula {node.astext()!r}", error) from error
    writer.body.append(f"{writer.starttag(node, tag, '', CLASS='math notranslate nohighlight')}{formula}</{tag}>")
    raise nodes.SkipNode


def _check_self_contained(app: Any, error: Exception | None) -> None:
    """Warns of what the built pages would load from elsewhere."""
    for path in sorted(path for path in Path(app.outdir).rglob("*") if path.suffix in {".css", ".html", ".js"}):
        for loaded in sorted(set(_LOADS.findall(path.read_text()))):
            logging.getLogger(__name__).warning(f"{path} loads {loaded!r}; the site must need no network.")


def _skip_fields(app: Any, what: str, name: str, member: Any, skip: bool, options: Any) -> bool | None:
    """Leaves out the fields of named tuples, which the class docstring describes."""
    return True if type(member).__name__ == "_tuplegetter" else None


def _own_signature(
    app: Any, what: str, name: str, obj: Any, options: Any, args: str | None, returns: str | None
) -> Any:
    """The constructor's arguments, where TorchRL's metaclass hides them."""
    if what != "class" or args != "(*args, **kwargs)":
        return None
    own = signature(obj.__init__, bound_method=True)
    return stringify_signature(own, show_return_annotation=False, unqualified_typehints=True), returns


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-skip-member", _skip_fields)
    app.connect("autodoc-process-signature", _own_signature)
    app.connect("env-check-consistency", _check_public)
    app.connect("build-finished", _check_self_contained)
    app.add_html_math_renderer("mathml", (_write_formula, None), (_write_formula, None))
