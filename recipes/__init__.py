"""The recipes: ITRPO, MATRPO and HATRPO as scripts that are read from top to bottom."""
