"""What the folder of a run says, for those who look at it."""

from torchrl_trpo.errors import require

require("recipes", "hydra", "omegaconf", "matplotlib", importer=__name__)
