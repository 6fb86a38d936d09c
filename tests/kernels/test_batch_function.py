"""Functions of a batch that end in sums over its rows, compiled, against themselves in double precision."""

import itertools

import pytest
import torch
from torch import nn

from tests.cases import needs_compiler
from torchrl_trpo.kernels.batch_function import BatchFunction, Blocks
from torchrl_trpo.kernels.buffers import NotCompiled

pytestmark = needs_compiler


def as_double(tensors):
    return [tensor.double() if tensor.is_floating_point() else tensor for tensor in tensors]


def check(function, shared, rows):
    """Compares the results for several blocks of rows, the last of them not full, with the exact ones."""
    compiled = BatchFunction(function, shared, rows)
    for n in (3, 2500):
        some = [torch.cat([tensor] * (n // len(tensor) + 1))[:n] for tensor in rows]
        exact = function(as_double(shared), as_double(some))
        for ours, expected in zip(compiled(shared, Blocks(some)), exact, strict=True):
            assert ours.shape == expected.shape
            assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max(), n


def gradient_of(loss):
    """The loss of each row, ``[N, ...]``, their sum, and its gradient by what all rows share."""

    def function(shared, rows):
        leaves = [tensor.detach().requires_grad_() for tensor in shared]
        with torch.enable_grad():
            losses = loss(leaves, rows)
            slopes = torch.autograd.grad(losses.sum(), leaves)
        return [losses.detach(), losses.detach().sum(), *slopes]

    return function


ACTIVATIONS = [torch.tanh, torch.relu, nn.functional.silu, nn.functional.elu, nn.functional.softplus]


@pytest.mark.parametrize("agents", [(), (4,)], ids=["rows", "agents that share"])
def test_gradient_of_a_network(agents):
    torch.manual_seed(0)
    sizes = [3, *[20] * len(ACTIVATIONS), 2]

    def loss(weights, rows):
        hidden, target = rows
        for number, activation in enumerate(ACTIVATIONS):
            hidden = activation(nn.functional.linear(hidden, *weights[2 * number : 2 * number + 2]))
        return (nn.functional.linear(hidden, *weights[-2:]) - target).square()

    weights = [
        torch.randn(shape) / 3 for n_in, n_out in itertools.pairwise(sizes) for shape in ((n_out, n_in), (n_out,))
    ]
    check(gradient_of(loss), weights, [torch.randn(90, *agents, 3), torch.randn(90, *agents, 2)])


def test_gradient_of_stacked_networks():
    torch.manual_seed(0)

    def loss(weights, rows):
        hidden = torch.bmm(rows[0].transpose(0, 1), weights[0]).tanh()
        return torch.log_softmax(torch.bmm(hidden, weights[1]), -1)[..., 0].transpose(0, 1)

    check(gradient_of(loss), [torch.randn(4, 3, 20), torch.randn(4, 20, 2)], [torch.randn(90, 4, 3)])


def test_many_results_that_are_reduced_and_read_besides():
    def function(shared, rows):
        scaled = (rows[0] @ shared[0]) * 0.5
        return [scaled.sum(0), scaled.exp().sum(0)]

    check(function, [torch.rand(3, 20)], [torch.rand(90, 3)])


def test_writing_into_a_part_of_a_tensor_is_refused():
    def function(shared, rows):
        changed = rows[0] * shared[0]
        changed[..., 0].masked_fill_(changed[..., 1] > 0, 0.0)
        return [changed.sum(0)]

    with pytest.raises(NotCompiled, match="masked_fill_ of a tensor that is read besides"):
        BatchFunction(function, [torch.ones(())], [torch.randn(90, 2)])


def test_largest_numbers_of_the_rows():
    def function(shared, rows):
        return [(rows[0] - 10 * shared[0]).amax(0), (rows[0] * rows[1].unsqueeze(-1)).sum()]

    check(function, [torch.ones(2)], [torch.rand(90, 2), torch.rand(90) < 0.5])


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (
            lambda shared, rows: [(rows[0] - rows[0].sum(0)).exp().sum()],
            "what is computed of all rows is needed for each",
        ),
        (lambda shared, rows: [torch.bernoulli(rows[0].sigmoid()).sum()], "bernoulli"),
        (lambda shared, rows: [(rows[0] + torch.randn_like(rows[0])).sum()], "randn_like|random"),
        (lambda shared, rows: [rows[0].double().sum()], "float64"),
    ],
    ids=["centred", "unknown", "random", "double"],
)
def test_what_cannot_be_compiled(function, reason):
    with pytest.raises(NotCompiled, match=reason):
        BatchFunction(function, [], [torch.randn(9, 2)])


def test_whole_numbers_that_a_float_cannot_hold():
    compiled = BatchFunction(lambda shared, rows: [(rows[0] + 1).float().sum()], [], [torch.arange(9)])
    assert compiled([], Blocks([torch.arange(5)]))[0] == 15
    with pytest.raises(ValueError, match="beyond"):
        compiled([], Blocks([torch.arange(5) + 2**23]))
