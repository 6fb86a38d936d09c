"""What an operation is as code. ``F`` is a number and ``B`` a flag, see :mod:`~torchrl_trpo.kernels.writer`."""

from __future__ import annotations

import math
from typing import Any

from torchrl_trpo.kernels.lanes import Lane

C_TYPES = {"f": "float", "b": "uint8_t", "i": "int64_t", "j": "int32_t"}
"""The types of the numbers in buffers, by kind."""
FUNCTIONS = ("sqrt", "sin", "cos", "tan", "exp", "log", "log1p", "expm1", "atanh", "trunc", "floor")
"""Functions of a number that the code calls with ``_of`` behind their names."""
FUNCTIONS_OF_TWO = ("atan2", "pow", "fmod")
"""Such functions of two numbers."""
CODE = {
    "add": "{} + {}",
    "sub": "{} - {}",
    "mul": "{} * {}",
    "div": "{} / {}",
    "min": "minimum({}, {})",
    "max": "maximum({}, {})",
    "lt": "{} < {}",
    "le": "{} <= {}",
    "gt": "{} > {}",
    "ge": "{} >= {}",
    "eq": "{} == {}",
    "ne": "{} != {}",
    "and": "{} & {}",
    "or": "{} | {}",
    "xor": "{} ^ {}",
    "not": "{} ^ TRUE",
    "where": "where({}, {}, {})",
    "neg": "neg_of({})",
    "abs": "abs_of({})",
    "tanh": "tanh_of({})",
    "reciprocal": "F(1.0f) / {}",
    "sign": "sign({})",
    "logaddexp": "logaddexp({}, {})",
    "isnan": "{0} != {0}",
    "floordiv": "floordiv({}, {})",
    "mod": "mod({}, {})",
    "nonzero": "{} != F(0.0f)",
    "one": "where({}, F(1.0f), F(0.0f))",
    "same": "{}",
    **{name: f"{name}_of({{}})" for name in FUNCTIONS},
    **{name: f"{name}_of({{}}, {{}})" for name in FUNCTIONS_OF_TWO},
}
"""Operations of statements as code, with places for their arguments."""
DERIVED = r"""
FN F sign(F a) { return where(a > F(0.0f), F(1.0f), where(a < F(0.0f), F(-1.0f), F(0.0f))); }
FN F logaddexp(F a, F b) {
  F sum = maximum(a, b) + log1p_of(exp_of(neg_of(abs_of(a - b))));
  return where((a == b) & (abs_of(a) == F(INFINITY)), a, sum);
}
FN F mod(F a, F b) {
  F r = fmod_of(a, b);
  return where((r != F(0.0f)) & ((r < F(0.0f)) ^ (b < F(0.0f))), r + b, r);
}
FN F floordiv(F a, F b) {
  F r = fmod_of(a, b);
  F q = (a - r) / b;
  q = where((r != F(0.0f)) & ((r < F(0.0f)) ^ (b < F(0.0f))), q - F(1.0f), q);
  F f = floor_of(q);
  f = where(q - f > F(0.5f), f + F(1.0f), f);
  return where(b == F(0.0f), a / b, where(q == F(0.0f), F(0.0f), f));
}
"""
"""Functions of the others."""


def term(value: Any) -> str:
    """A lane or a constant as code."""
    if isinstance(value, Lane):
        return f"v{value.number}"
    if isinstance(value, bool):
        return "TRUE" if value else "FALSE"
    if math.isinf(value):
        return "F(INFINITY)" if value > 0 else "F(-INFINITY)"
    return "F(NAN)" if math.isnan(value) else f"F({float(value)!r}f)"
