"""Action distributions that TorchRL does not have, and exact KL divergences and entropies."""

from torchrl_trpo.distributions.bounded_tanh_normal import BoundedTanhNormal
from torchrl_trpo.distributions.divergence import entropy, kl_divergence
from torchrl_trpo.distributions.multi_categorical import MultiCategorical

__all__ = ["BoundedTanhNormal", "MultiCategorical", "entropy", "kl_divergence"]
