"""Networks and distributions, compiled into one loop over the rows, against PyTorch."""

import pytest
import torch
from torch import nn

from tests.cases import needs_compiler
from torchrl_trpo.kernels.buffers import Buffers, Columns
from torchrl_trpo.kernels.lanes import Unsupported
from torchrl_trpo.kernels.networks import NetworkOperations
from torchrl_trpo.kernels.record import record
from torchrl_trpo.kernels.row_function import RowFunction

pytestmark = needs_compiler
N_TRACED, N = 7, 37


def compiled(function, inputs, parameters=None):
    """The results of a function that was traced with fewer rows."""
    parameters = parameters or {}
    traced = [tensor[:N_TRACED] for tensor in inputs]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        graph = record(function, *traced)
        expected = function(*inputs)
    names = [f"input{number}" for number in range(len(inputs))]
    named = [(name, tensor, 0) for name, tensor in zip(names, traced, strict=True)]
    lowered = NetworkOperations(graph, N_TRACED, parameters).lower(named)
    layout = Buffers(N)
    run = RowFunction(lowered, layout, [*names, *parameters], by_lane=lowered.outputs)
    columns = Columns.like(N, inputs)
    columns.put(inputs)
    results = Columns.like(N, expected)
    run.inputs[:] = [*columns.addresses, *(tensor.data_ptr() for tensor in parameters.values())]
    run.outputs[:] = results.addresses
    assert run()
    return [tensor.clone() for tensor in results.tensors]


def check(function, *inputs, parameters=None, tolerance=1e-6):
    torch.manual_seed(0)
    ours = compiled(function, inputs, parameters)
    torch.manual_seed(0)
    with torch.no_grad():
        theirs = function(*inputs)
    for result, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=tolerance)


def test_layers_read_their_weights_where_they_are():
    """A network for each agent, a shared one, an even and an uneven number of outputs, and weights that change."""
    torch.manual_seed(0)
    shared = nn.Sequential(nn.Linear(5, 33), nn.Tanh(), nn.Linear(33, 16), nn.ReLU(), nn.Linear(16, 3))
    weights = nn.ParameterList([torch.randn(4, 5, 20), torch.randn(4, 20), torch.randn(4, 1, 20).mT])
    parameters = {**dict(shared.named_parameters()), **dict(weights.named_parameters(prefix="own"))}

    def function(x):  # [n, 4, 5]
        hidden = torch.bmm(x.transpose(0, 1), weights[0]) + weights[1].unsqueeze(1)
        return [shared(x), torch.bmm(hidden.tanh(), weights[2]).transpose(0, 1), shared(x[:, 0])]

    x = torch.randn(N, 4, 5)
    for _ in range(2):
        check(function, x, parameters=parameters, tolerance=1e-5)
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.mul_(-0.7)


ACTIVATIONS = [nn.Tanh(), nn.ReLU(), nn.ELU(0.7), nn.SiLU(), nn.LeakyReLU(0.1), nn.Sigmoid(), nn.Softplus(2.0)]


def test_activations():
    """Of few numbers one after the other, and of many in a loop."""
    few, many = 8 * torch.randn(N, 3), 8 * torch.randn(N, 40)
    few[:3, 0] = many[:3, 0] = torch.tensor([0.0, 60.0, -60.0])
    check(lambda *inputs: [activation(x) for activation in ACTIVATIONS for x in inputs], few, many)


def test_tanh_is_within_two_units_of_the_last_place():
    x = torch.cat([torch.linspace(-10, 10, N * 100), torch.logspace(-8, 1, N * 100)])[: N * 200].reshape(N, 200)
    (ours,) = compiled(lambda x: [x.tanh()], [x])
    exact = x.double().tanh()
    unit = torch.finfo(torch.float32).eps / 2 * 2 ** exact.abs().log2().ceil()
    assert ((ours.double() - exact).abs() <= 2 * unit).all()
    special = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0]).repeat(N, 1)
    assert torch.equal(compiled(lambda x: [x.tanh()], [special])[0].nan_to_num(7), special.tanh().nan_to_num(7))


@pytest.mark.parametrize("shape", [(6,), (3, 6)])
def test_samples_of_distributions_are_pytorchs(shape):
    """With the random numbers that PyTorch draws: two categorical samples, then two normal ones."""

    def function(logits):
        categorical = torch.distributions.Categorical(logits=logits, validate_args=False)
        action = categorical.sample()
        other = torch.multinomial(logits.softmax(-1).reshape(-1, 6), 1).reshape(logits.shape[:-1])
        normal = torch.distributions.Normal(logits, logits.exp(), validate_args=False).rsample()
        return [
            action,
            categorical.log_prob(action),
            other,
            normal,
            torch.normal(logits, logits.exp()),
            logits.log_softmax(-1),
        ]

    check(function, torch.randn(N, *shape))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: [x @ torch.ones(4, 4)], "weights that are computed"),
        (lambda x: [x.mean(0) + x], "over rows"),
        (lambda x: [torch.multinomial(x.exp(), 2)], "several samples"),
        (lambda x: [x * torch.rand(4)], "random numbers that all rows share"),
        (lambda x: [x * torch.eye(4)[0].argmax()], "argmax.default with arguments that are not known"),
        (lambda x: [torch.where(x > 0, 2**24 + 1, 0)], "the whole number 16777217"),
    ],
)
def test_what_cannot_be_compiled(function, reason):
    with pytest.raises(Unsupported, match=reason):
        compiled(function, [torch.rand(N, 4)])
