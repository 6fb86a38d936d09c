"""The trust-region step on vectors and callables: no keys, no networks."""
