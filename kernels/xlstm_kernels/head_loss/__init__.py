"""The loss of an LM head from hidden states.

`op` is public, `reference` the definition; `chunks` multiplies, `cpu` and `triton` do the rows.
"""
