"""Causal attention over a window and sink tokens.

`op` is public, `reference` the definition, `cpu` and `triton` the fast forms.
"""
