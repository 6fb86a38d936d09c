"""The trust-region family for TorchRL: TRPO, ITRPO, MATRPO and HATRPO."""

from torchrl_trpo.conjugate_gradient import CGResult, conjugate_gradient
from torchrl_trpo.divergence import entropy, kl_divergence
from torchrl_trpo.fisher import fisher_product, output_hessian_product
from torchrl_trpo.line_search import LineSearchResult, backtrack
from torchrl_trpo.updater import TrustRegionObjective, TrustRegionProblem, TrustRegionUpdater

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
    "output_hessian_product",
]
__version__ = "0.1.0"
