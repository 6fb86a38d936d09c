"""The recipes: one script for each algorithm, read from top to bottom."""
