"""The settings of a recipe, from the command line and from YAML."""
