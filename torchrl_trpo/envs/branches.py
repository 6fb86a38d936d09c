"""Methods whose ``if`` statements run inside a context, so that a trace can have both ways in one."""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

_BRANCH, _MAKE = "_branch_of_trace", "_make_method"


def branching_by(
    branch: Callable[[Callable[[], Any]], Iterator[None]], cls: type, until: type
) -> dict[str, types.FunctionType]:
    """Methods of a class with ``for _ in branch(lambda: test): body`` in the place of ``if test: body``.

    That is done where ``body`` has no effect but on attributes, and on tensors that they hold. It may assign variables
    that nothing else reads, and that it assigns before it reads them.

    Args:
        branch: yields if the body is to run.
        cls: the class.
        until: a base class, whose own methods stay.

    Returns:
        By their names the methods with such statements. Those with a closure, or without a source, are not there.
    """
    names = {name for each in cls.__mro__[: cls.__mro__.index(until)] for name in vars(each)}
    functions = {name: getattr(cls, name) for name in names}
    found = {
        name: _rewritten(function)
        for name, function in functions.items()
        if isinstance(function, types.FunctionType) and function.__closure__ is None
    }
    return {name: make(branch) for name, make in found.items() if make is not None}


@contextlib.contextmanager
def replaced(cls: type, functions: Mapping[str, Any]) -> Iterator[None]:
    """Replaces attributes of a class inside the context."""
    own = {name: vars(cls)[name] for name in functions if name in vars(cls)}
    try:
        for name, function in functions.items():
            setattr(cls, name, function)
        yield
    finally:
        for name in functions:
            if name in own:
                setattr(cls, name, own[name])
            else:
                delattr(cls, name)


@functools.lru_cache  # the methods of a scenario are traced a dozen times
def _rewritten(function: types.FunctionType) -> Callable[[Any], types.FunctionType] | None:
    """Makes the function with its ``if`` statements replaced by a ``branch``; None if there is none that can be."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):
        return None
    definition = tree.body[0]
    names = [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    is_private = any(name.startswith("__") and not name.endswith("__") for name in names)  # it depends on the class
    is_private |= any(isinstance(node, ast.Global | ast.Nonlocal) for node in ast.walk(tree))
    if not isinstance(definition, ast.FunctionDef) or definition.decorator_list or is_private:
        return None
    rewriter = _Rewriter(definition)
    rewriter.visit(definition)
    if not rewriter.n_replaced:
        return None
    definition.args.defaults, definition.returns = [], None
    definition.args.kw_defaults = [None] * len(definition.args.kwonlyargs)
    for argument in (*definition.args.args, *definition.args.kwonlyargs):
        argument.annotation = None
    make = ast.parse(f"def {_MAKE}({_BRANCH}):\n    pass\n    return {definition.name}")
    make.body[0].body[0] = definition  # type: ignore[attr-defined]
    found: dict[str, Any] = {}
    code = compile(ast.fix_missing_locations(make), inspect.getfile(function), "exec")
    exec(code, function.__globals__, found)

    def make_method(branch: Any) -> types.FunctionType:
        new = found[_MAKE](branch)
        new.__defaults__, new.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
        return new

    return make_method


def _stored(*nodes: ast.AST) -> set[str]:
    """The variables that some code assigns."""
    found = (each for node in nodes for each in ast.walk(node) if isinstance(each, ast.Name))
    return {each.id for each in found if isinstance(each.ctx, ast.Store)}


def _loaded(node: ast.AST) -> set[str]:
    """The variables that some code reads, but for those of its comprehensions."""
    found = [*ast.walk(node)]
    own = _stored(*(each.target for each in found if isinstance(each, ast.comprehension)))
    changed = _stored(*(each.target for each in found if isinstance(each, ast.AugAssign)))
    return changed | {each.id for each in found if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Load)} - own


def _reads_before(body: Sequence[ast.stmt], unset: set[str] | None = None) -> bool:
    """Whether statements may read a variable of ``unset`` before they assign it. Default: all that they assign."""
    unset = _stored(*body) if unset is None else set(unset)
    for statement in body:
        if isinstance(statement, ast.If | ast.For):
            head = statement.test if isinstance(statement, ast.If) else statement.iter
            within = unset if isinstance(statement, ast.If) else unset - _stored(statement.target)
            if _loaded(head) & unset or any(_reads_before(part, within) for part in (statement.body, statement.orelse)):
                return True
        elif _loaded(statement) & unset:
            return True
        else:
            unset -= _stored(statement)
    return False


class _Rewriter(ast.NodeTransformer):
    def __init__(self, definition: ast.FunctionDef) -> None:
        self._definition = definition
        self.n_replaced = 0

    def visit_If(self, node: ast.If) -> ast.AST:
        """Replaces an ``if`` statement, if nothing is lost."""
        is_simple = not node.orelse and self._has_attributes_only(node.body) and not _reads_before(node.body)
        self.generic_visit(node)
        if not is_simple or any(isinstance(each, ast.NamedExpr) for each in ast.walk(node.test)):
            return node
        self.n_replaced += 1
        test = ast.Lambda(ast.arguments([], [], None, [], [], None, []), node.test)
        call = ast.Call(ast.Name(_BRANCH, ast.Load()), [test], [])
        return ast.copy_location(ast.For(ast.Name("_", ast.Store()), call, node.body, []), node)

    def _has_attributes_only(self, body: Sequence[ast.stmt]) -> bool:
        """Whether statements assign to nothing but attributes, their items, and variables of their own."""
        nodes = [node for statement in body for node in ast.walk(statement)]
        inside = {id(node) for node in nodes}
        read_outside = {
            node.id
            for node in ast.walk(self._definition)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and id(node) not in inside
        }
        allowed = (ast.Assign, ast.AugAssign, ast.If, ast.For, ast.Pass)
        for node in nodes:
            if isinstance(node, ast.stmt) and not isinstance(node, allowed):
                return False
            if not isinstance(getattr(node, "ctx", None), ast.Store):
                continue
            if isinstance(node, ast.Subscript) and not isinstance(node.value, ast.Attribute):
                return False
            if isinstance(node, ast.Name) and node.id in read_outside:
                return False
        return True
