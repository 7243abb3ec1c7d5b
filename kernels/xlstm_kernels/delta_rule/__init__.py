"""The gated delta rule, the other memory, as torch operations.

`op` is public, `reference` holds the equations and both forms.
"""
