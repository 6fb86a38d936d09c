"""A training run: collecting, fitting the critic, checkpoints, metrics, and the trained policy."""
