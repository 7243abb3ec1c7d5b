"""Recipes: one YAML file that says what a run does, read strictly."""
