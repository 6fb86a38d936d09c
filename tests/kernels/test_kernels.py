"""Functions of rows, compiled into one loop, against PyTorch on the whole batch."""

import math

import numpy as np
import pytest
import torch
from torch.func import functionalize

from tests.cases import needs_compiler
from tests.kernels import emulated_gpu
from torchrl_trpo.kernels import compiler, cuda, writer
from torchrl_trpo.kernels.aten import Operations
from torchrl_trpo.kernels.lanes import DTYPES, KINDS, Unsupported
from torchrl_trpo.kernels.record import record
from torchrl_trpo.kernels.rows import compile_rows

pytestmark = needs_compiler
N_TRACED, N = 5, 37
PADDED = 48


@pytest.fixture(params=["C++", "CUDA"])
def target(request, monkeypatch):
    """What compiles for the CPU: C++, or CUDA's kernels in an emulated GPU."""
    if request.param == "CUDA":
        monkeypatch.setattr(cuda, "load", emulated_gpu.load)
        return cuda.Kernel
    return compile_rows


def inputs_of(n):
    torch.manual_seed(n)
    x, y = torch.randn(n, 3), torch.randn(n, 3)
    x[:: max(1, n // 4), 0], y[:: max(1, n // 3), 1] = 0.0, float("nan")
    x[1, 1], x[2, 1] = float("inf"), -float("inf")
    return x, y, torch.rand(n, 3) < 0.5, torch.randint(-7, 8, (n,)), torch.tensor([2.0, -0.5, 3.0])


def lowered(function, inputs=None):
    inputs = inputs or inputs_of(N_TRACED)
    graph = record(functionalize(function, remove="mutations"), *inputs)
    axes = [0 if tensor.shape[0] == N_TRACED else None for tensor in inputs]
    named = [(f"input{k}", *pair) for k, pair in enumerate(zip(inputs, axes, strict=True))]
    return Operations(graph, N_TRACED).lower(named)


def compiled(function, inputs, guards=(), target=compile_rows):
    """The results of a function that was traced with fewer rows, and whether the guards hold."""
    low = lowered(function)
    stores, shapes, n_guards = [], [], len(guards)
    results = low.outputs[: len(low.outputs) - n_guards]
    for number, lanes in enumerate(results):
        values = lanes.of_rows()
        shapes.append((lanes.kind, values.shape[1:]))
        for lane, value in enumerate(values.flat):
            stores.append(writer.Store(low.statements.convert(value, lanes.kind), lanes.kind, number, lane))
    checks = [
        writer.Guard(lanes.values.reshape(-1)[0], expected)
        for lanes, expected in zip(low.outputs[len(results) :], guards, strict=True)
    ]
    names = {f"input{number}": (number, 0) for number in range(len(inputs))}
    run = target(torch.device("cpu"), low.statements.all, names, stores, checks)
    columns = []
    for tensor in inputs:
        column = tensor.clone()
        if tensor.shape[0] == N:
            column = torch.zeros(tensor[0].numel(), PADDED, dtype=tensor.dtype)
            column[:, :N] = tensor.reshape(N, -1).T
        columns.append(column)
    written = [torch.zeros(max(1, math.prod(shape)), PADDED, dtype=DTYPES[kind]) for kind, shape in shapes]
    addresses = [np.array([t.data_ptr() for t in each], np.uint64) for each in (columns, written)]
    holds = run(N, PADDED, *addresses)
    assert not any(tensor[:, N:].any() for tensor in written), "what is behind the rows is zero"
    return [t[:, :N].T.reshape(N, *shape) for t, (_, shape) in zip(written, shapes, strict=True)], bool(holds)


def arithmetic(x, y, flag, whole, shared):
    small = x.nan_to_num(posinf=3.0, neginf=-3.0)
    count = whole.unsqueeze(-1)
    return [
        x + y, x - 2 * y, torch.add(x, y, alpha=3), 1.5 - x, x * y, x / y, x / shared, -x, x.abs(), small.exp(),
        small.sin(), small.cos(), small.tan(), torch.log(small.abs() + 0.1), torch.sqrt(small.abs()), 1 / x, x.sign(),
        torch.atan2(y, small), torch.logaddexp(small, y), torch.logaddexp(x, x), torch.minimum(x, y),
        torch.maximum(x, y), x.clamp(-0.5, 0.25), y.clamp(min=0.1), small**2, small**3, small.abs() ** 0.5,
        small.abs() ** 1.7, small % 0.7, small // 0.7, torch.nan_to_num(y), torch.nan_to_num(x, nan=1.0, posinf=5.0),
        count + 3, count * count, count // 2, count % 3, -count, count.float() / 2, count.clamp(-2, 2),
        (count == 3), count.to(torch.float32) * x, count.to(torch.int32) + 1,
        x.sum(-1).nan_to_num(0, 0, 0).int() * whole, flag.float() + flag, flag.sum(-1), flag * x,
    ]  # fmt: skip


def logic(x, y, flag, whole, shared):
    other = x > 0
    return [
        x < y, x <= 0, x > shared, x >= 0.0, x == 0, x != y, torch.isnan(y), flag & other, flag | other, flag ^ other,
        ~flag, torch.logical_and(flag, other), torch.logical_not(x), torch.where(flag, x, y), torch.where(flag, x, 0.0),
        torch.where(flag, other, ~other), torch.where(x.isnan(), 1.0, x), flag.any(-1), flag.all(-1), flag * other,
    ]  # fmt: skip


def shapes(x, y, flag, whole, shared):
    stacked = torch.stack([x, y], 1)  # [n, 2, 3]
    finite = stacked.nan_to_num(0.0, 0.0, 0.0)
    matrix = torch.stack([x, y, x + 1.0], -1)
    written = x.clone()
    written[:, 1] = 7.0
    written[:, :1] += y[:, 2:]
    one_hot = torch.zeros(len(x), 4)
    one_hot.scatter_(1, (whole % 4).unsqueeze(-1), 1)
    filled = torch.full_like(x, 2.5)
    filled[:] = shared
    return [
        stacked, stacked.sum(1), stacked.mean((1, 2)), stacked.flatten(1), stacked.transpose(1, 2), stacked[:, 1, ::2],
        stacked.permute(0, 2, 1).reshape(len(x), 6), torch.cat([x, y, shared.expand(len(x), 3)], -1),
        x.unsqueeze(1) - y.unsqueeze(2), torch.linalg.vector_norm(x[:, ::2], dim=-1),
        torch.cdist(finite[:, :1], finite), matrix @ matrix, torch.diagonal(matrix, 0, 1, 2), written, one_hot, filled,
        x.repeat(1, 2), torch.zeros_like(x), torch.ones(len(x)), *torch.unbind(x, -1), *y.split(2, -1), *stacked.min(1),
        *stacked.max(-1), x[:, 0].expand(2, len(x)).T, shared + torch.zeros(len(x), 3), x[:, 1:],
    ]  # fmt: skip


@pytest.mark.parametrize("function", [arithmetic, logic, shapes])
def test_a_row_is_computed_as_pytorch_computes_the_batch(function, target):
    inputs = inputs_of(N)
    results, holds = compiled(function, inputs, target=target)
    expected = function(*inputs)
    assert holds
    assert len(results) == len(expected)
    for number, (ours, theirs) in enumerate(zip(results, expected, strict=True)):
        torch.testing.assert_close(
            ours, theirs, rtol=2e-6, atol=1e-6, equal_nan=True, msg=lambda m, n=number: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    ("expected", "holds"),
    [
        ((False, True, True, False), True),
        ((True, True, True, False), False),
        ((False, False, True, False), False),
        ((False, True, False, False), False),
        ((False, True, True, True), False),
    ],
)
def test_guards_are_about_all_rows_and_no_more(expected, holds, target):
    """The rows that pad a buffer are zeros, and would change each of these."""

    def function(x, y, flag, whole, shared):
        return x + 1, (whole == 0).any(), (whole != 0).all(), (whole == 6).any(), (whole < 6).all()

    x, y, flag, _, shared = inputs_of(N)
    whole = torch.arange(1, N + 1).clamp(max=6)
    (result,), found = compiled(function, (x, y, flag, whole, shared), expected, target)
    assert found == holds
    torch.testing.assert_close(result, x + 1)


def test_places_that_are_computed(target):
    """One number in a row is read, or replaced. If there is no such place, PyTorch is to say so."""

    def function(x, y, flag, whole, shared):
        rows, column = torch.arange(len(x)), whole.abs() // 3
        written, flags, grid = x.clone(), flag.clone(), x.reshape(len(x), 1, 3)
        written[rows, column] = 7.0
        flags[rows, column] = True
        return [x[rows, column], grid[rows, 0 * whole, column], written, written[rows, 2 - column], flags, column]

    inputs = inputs_of(N)
    results, holds = compiled(function, inputs, target=target)
    assert holds
    assert set(results[-1].tolist()) == {0, 1, 2}
    for ours, theirs in zip(results, function(*inputs), strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=0, atol=0)
    inputs[3][N - 1] = 9
    assert not compiled(function, inputs, target=target)[1]


def test_a_triangular_solve():
    def function(x, y, flag, whole, shared):
        lower = torch.tensor([[1.0, 0.0], [1.0, 1.0]]) + x.nan_to_num(0.0, 1.0, 1.0)[:, :1, None].abs() * torch.eye(2)
        return [torch.linalg.solve_triangular(lower, y[:, :2, None].nan_to_num(0.0), upper=False)]

    inputs = inputs_of(N)
    torch.testing.assert_close(compiled(function, inputs)[0], function(*inputs))


def over_all_rows(x, y, flag, whole, shared):
    first = (x > 1.5).any()
    second = (torch.where(first, x, y) > -5.0).all()  # it depends on the first
    columns = flag.all(0, keepdim=True) | (y > 2.0).any(0)
    return [torch.where(first, x, 2 * x), torch.where(second, y, x), torch.where(columns, x, y), x + flag.all()]


def test_pairs_of_rows_that_any_or_all_follows():
    """A product of ``[n, 1]`` and ``[n]`` has a number for each pair of rows, for instance in VMAS's joint_passage."""

    def function(x, y, flag, whole, shared):
        row, column = flag[:, :1], whole > -7
        return [torch.all(row * column, dim=1), (column * row).any(1), torch.any(row * (whole > 100), dim=1)]

    inputs = inputs_of(N)
    for ours, theirs in zip(compiled(function, inputs)[0], function(*inputs), strict=True):
        assert torch.equal(ours, theirs)


def test_what_any_row_has_is_computed_with(target):
    """It is known after the loop, which runs again if it is not as in the call before."""
    for large in (0.0, 2.0, 0.0, 2.0, 2.0):
        x, y, *others = inputs_of(N)
        x, y = x.nan_to_num(0.0, 0.0, 0.0).clamp(-1.0, 1.0), y.nan_to_num(-6.0)
        x[5, 2], y[7, 1] = large, 2.5
        results, _ = compiled(over_all_rows, (x, y, *others), target=target)
        for ours, theirs in zip(results, over_all_rows(x, y, *others), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_a_whole_number_that_float32_cannot_hold_is_told(target):
    def function(x, y, flag, whole, shared):
        return (whole + 1,)

    x, y, flag, whole, shared = inputs_of(N)
    assert compiled(function, (x, y, flag, whole, shared), target=target)[1]
    whole[5] = 2**24 + 1
    assert not compiled(function, (x, y, flag, whole, shared), target=target)[1]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x, *_: x - x.mean(0), "rows"),
        (lambda x, *_: x.max(0)[0], "rows"),
        (lambda x, *_: torch.cat([x, x]), "joined"),
        (lambda x, *_: x[2] + x, "some rows"),
        (lambda x, *_: x + torch.arange(5.0).unsqueeze(-1), "differs from row to row"),
        (lambda x, y, flag, *_: (flag[:, :1] * flag[:, 1]) + x[:, :1], "other rows"),
        (lambda x, *_: x.unsqueeze(1) - x.unsqueeze(0), "other rows"),
        (lambda x, *_: x.reshape(3, -1), "view"),
        (lambda x, *_: x.cumsum(-1), "cumsum"),
        (lambda x, *_: x.double(), "float64"),
        (lambda x, *_: torch.rand(3) + x, "all rows share"),
    ],
)
def test_what_is_not_one_row_at_a_time_is_refused(function, reason):
    with pytest.raises(Unsupported, match=reason):
        lowered(function)


def test_random_tensors_are_inputs():
    low = lowered(lambda x, *_: (x + torch.rand(5, 3) * torch.randn(5, 1), torch.empty(5, 2).uniform_(-1, 2)))
    assert low.draws == [
        ((5, 3), "uniform_", (0.0, 1.0)),
        ((5, 1), "normal_", (0.0, 1.0)),
        ((5, 2), "uniform_", (-1, 2)),
    ]


def test_constants_are_computed_beforehand():
    low = lowered(
        lambda x, y, flag, whole, shared: (torch.full((5, 3), 2.0).sqrt().sin() * 3 + x * 1, x + 2.0, x + 2.0)
    )
    assert [each.operation for each in low.statements.all].count("add") == 6
    assert not [each for each in low.statements.all if each.operation in {"sqrt", "sin"}]


def test_without_a_compiler(monkeypatch):
    monkeypatch.setattr(compiler.shutil, "which", lambda name: None)
    compiler._compiler.cache_clear()
    with pytest.raises(compiler.CompilerError, match="Install g"):
        compiler.Function("int run();")()
    compiler._compiler.cache_clear()


def test_code_that_does_not_compile(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHRL_TRPO_CACHE", str(tmp_path))
    with pytest.raises(compiler.CompilerError, match="failed"):
        compiler.Function("no code")()
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCHRL_TRPO_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(compiler.CompilerError, match="cannot be written or loaded"):
        compiler.Function("int run();")()


def test_functions_that_wait_are_compiled_together(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHRL_TRPO_CACHE", str(tmp_path))
    monkeypatch.setattr(compiler.Function, "_waiting", [])
    code = (
        'extern "C" int run(int64_t n, int64_t, const void* const*, void* const*, const int64_t*) {{ return n + {}; }}'
    )
    one, two = (compiler.Function(code.format(number)) for number in (1, 2))
    assert (two(5, 0, 0, 0, 0), one(5, 0, 0, 0, 0)) == (7, 6)
    assert len(list(tmp_path.iterdir())) == 1
    wrong, right = compiler.Function("no code"), compiler.Function(code.format(3))
    assert right(5, 0, 0, 0, 0) == 8
    with pytest.raises(compiler.CompilerError, match="failed"):
        wrong()


def test_kinds():
    assert set(KINDS.values()) == set(DTYPES)
