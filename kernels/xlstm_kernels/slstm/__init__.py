"""The sLSTM of Distil-xLSTM. `op` is public, `reference` holds the equations, `cpu` and `triton` the loops with
backwards of their own.
"""
