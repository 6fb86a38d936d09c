"""The trust-region family for TorchRL: TRPO, ITRPO, MATRPO and HATRPO."""

from typing import TYPE_CHECKING, Any

from torchrl_trpo.distributions.divergence import entropy, kl_divergence
from torchrl_trpo.numerics.conjugate_gradient import CGResult, conjugate_gradient
from torchrl_trpo.numerics.fisher import fisher_product, output_hessian_product
from torchrl_trpo.numerics.line_search import LineSearchResult, backtrack
from torchrl_trpo.numerics.updater import TrustRegionObjective, TrustRegionProblem, TrustRegionUpdater

if TYPE_CHECKING:
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
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "load_policy":  # imported when it is used: it imports the environments
        from torchrl_trpo.training.policy import load_policy

        return load_policy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
