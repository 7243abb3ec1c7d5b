"""One token at a time, in place.

`op` is public, `cpu` a few torch operations, `triton` one fused kernel for a whole hybrid layer.
"""
