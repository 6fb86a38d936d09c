"""Recording the operations of a function as a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx
from torch._guards import TracingContext, tracing  # private: see below
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx


def record(
    function: Callable[..., Any], *arguments: Any, decompositions: dict[Any, Callable[..., Any]] | None = None
) -> fx.GraphModule:
    """The operations of a function of tensors, as :func:`~torch.fx.experimental.proxy_tensor.make_fx` records them.

    ``make_fx`` notes the shape of each tensor with a fake mode. Without one in the context it makes one for each
    tensor, which takes as long as the rest.

    Args:
        function: the function.
        *arguments: tensors, or lists of tensors, that it is called with.

    Keyword Args:
        decompositions: what takes the place of some operations.

    Returns:
        The graph.
    """
    with tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True))):
        return make_fx(lambda *given: function(*given), decompositions)(*arguments)
