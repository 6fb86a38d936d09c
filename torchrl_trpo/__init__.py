"""The trust-region family for TorchRL: TRPO, ITRPO, MATRPO and HATRPO."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchrl_trpo.distributions.divergence import entropy, kl_divergence
    from torchrl_trpo.numerics.conjugate_gradient import CGResult, conjugate_gradient
    from torchrl_trpo.numerics.fisher import fisher_product, output_hessian_product
    from torchrl_trpo.numerics.line_search import LineSearchResult, backtrack
    from torchrl_trpo.numerics.updater import TrustRegionObjective, TrustRegionProblem, TrustRegionUpdater
    from torchrl_trpo.training.policy import load_policy

__all__ = [
    "CGResult",
    "LineSearchResult",
    "TrustRegionObjective",
    "TrustRegionProblem",
    "TrustRegionUpdater",
    "backtrack",
    "conjugate_gradient",
    "entropy",
    "fisher_product",
    "kl_divergence",
    "load_policy",
    "output_hessian_product",
]
__version__ = "0.2.0"

_MODULES = {
    "distributions.divergence": ("entropy", "kl_divergence"),
    "numerics.conjugate_gradient": ("CGResult", "conjugate_gradient"),
    "numerics.fisher": ("fisher_product", "output_hessian_product"),
    "numerics.line_search": ("LineSearchResult", "backtrack"),
    "numerics.updater": ("TrustRegionObjective", "TrustRegionProblem", "TrustRegionUpdater"),
    "training.policy": ("load_policy",),
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used: PyTorch takes seconds, and ``load_policy`` needs a simulator."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
