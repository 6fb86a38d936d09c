"""Recorded operations against the function itself, on inputs that it was not recorded with."""

import pytest
import torch
from torch.func import functionalize, vmap

from torchrl_trpo.kernels.record import record

WEIGHTS = torch.randn(3, 3)


def gradient(x, y):
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (found,) = torch.autograd.grad((x @ WEIGHTS).tanh().square().sum() * y.sum(), x)
    return [found, found.T]


def written_through_a_view(x, y):
    first, second = torch.tensor([1.0, 2.0]), torch.zeros(2)
    first[0] = x.sum()
    second[1:].add_(y.mean())
    return [first * 2, second, first + second]


def several_results(x, y):
    values, places = (x + y).max(1)
    return [values, places, *torch.unbind(x, 1), x[torch.tensor([2, 0])]]


def numbers_of_its_own(x, y):
    factor = torch.tensor(3.0) + 1
    return [x * factor.item() if bool(factor > 2) else x, y + WEIGHTS.sum()]


def nested(x, y):
    return [vmap(lambda row: row @ WEIGHTS)(x), x.to(torch.float64).float().reshape(-1)]


@pytest.mark.parametrize(
    "function",
    [
        gradient,
        written_through_a_view,
        functionalize(written_through_a_view, remove="mutations"),
        several_results,
        numbers_of_its_own,
        nested,
    ],
)
def test_the_graph_is_the_function(function):
    graph = record(function, torch.randn(4, 3), torch.randn(4, 3))
    x, y = torch.randn(4, 3), torch.randn(4, 3)
    expected = function(x, y)
    for _ in range(2):
        for own, value in zip(graph(x, y), expected, strict=True):
            assert torch.equal(own, value)


def test_other_operations_take_the_place_of_some():
    graph = record(lambda x: [x.sigmoid()], torch.randn(4), decompositions={torch.ops.aten.sigmoid.default: torch.exp})
    assert torch.equal(graph(torch.ones(4))[0], torch.ones(4).exp())


def read_what_a_view_wrote(x):
    new = torch.zeros(2)
    new[1:].add_(x[0])
    return new.sum().item()


@pytest.mark.parametrize(
    "read",
    [
        lambda x: bool((x > 0).all()),
        lambda x: torch.rand(()).item(),
        lambda x: (torch.tensor(2.0) * x.sum()).item(),
        read_what_a_view_wrote,
        lambda x: (WEIGHTS * 2).sum().item(),
        lambda x: sum(1 for _ in (x > 0).nonzero()),
        lambda x: len(torch.where(x > 0)[0]),
        lambda x: x.masked_select(x > 0).numel(),
        lambda x: torch.stack([x, x])[:, x > 0].shape[1],
        lambda x: x.tolist()[0],
        lambda x: float(x.detach().numpy()[0]),
    ],
)
@pytest.mark.parametrize("wrap", [lambda function: function, functionalize], ids=["plain", "functional"])
def test_no_value_is_read_that_may_change(read, wrap):
    with pytest.raises(RuntimeError, match="Python reads a tensor's value"):
        record(wrap(lambda x: [x * read(x)]), torch.randn(4))


def test_a_generator_of_its_own_is_refused():
    """No graph has it: it moves on at each call."""
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(RuntimeError, match="from a generator of its own"):
        record(lambda x: [x + torch.rand(4, generator=generator)], torch.randn(4))
