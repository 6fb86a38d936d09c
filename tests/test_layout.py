"""Imports go one way: a part of the package imports those before it in the list, never those after it."""

import ast
from pathlib import Path

import torchrl_trpo.objectives
import torchrl_trpo.recipes

PARTS = (
    "errors",
    "arguments",
    "keys",
    "seeding",
    "parallel",
    "numerics",
    "kernels",
    "distributions",
    "objectives",
    "envs",
    "networks",
    "reporting",
    "config",
    "training",
    "trainer",
    "evaluate",
    "sweep",
    "recipes",
)
PACKAGES = (torchrl_trpo, torchrl_trpo.objectives, torchrl_trpo.recipes)
FILES = sorted(path for package in PACKAGES for path in Path(package.__file__).parent.rglob("*.py"))


def imported_parts(file):
    # The parts of the package that a file imports from, wherever in the file.
    for node in ast.walk(ast.parse(file.read_text())):
        modules = [each.name for each in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}:{node.lineno}: imports are absolute here"
            modules = [f"torchrl_trpo.{name.name}" for name in node.names if node.module == "torchrl_trpo"]
            modules = modules or [node.module]
        for module in modules:
            package, _, rest = module.partition(".")
            if package == "torchrl_trpo" and rest.split(".")[0] in PARTS:
                yield rest.split(".")[0], node.lineno


def part_of(file):
    for package in PACKAGES[1:]:
        if Path(package.__file__).parent in file.parents:
            return package.__name__.rpartition(".")[2]
    return file.relative_to(Path(torchrl_trpo.__file__).parent).parts[0].removesuffix(".py")


def test_imports_go_one_way():
    upward = []
    for file in FILES:
        part = part_of(file)
        if part != "__init__":  # of the whole package: it exports from its parts
            found = [each for each in imported_parts(file) if PARTS.index(each[0]) > PARTS.index(part)]
            upward += [f"{file}:{line}: {part} imports {imported}" for imported, line in found]
    assert not upward, "\n".join(upward)
