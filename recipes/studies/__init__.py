"""Many runs of the recipes: the comparison of the algorithms, the search for settings, their sensitivity."""
