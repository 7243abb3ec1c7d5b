"""The mLSTM over a sequence.

`op` is public, `reference` holds the equations and the plain forms, `cpu` and `triton` the fast ones.
"""
