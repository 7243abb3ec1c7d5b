"""Triton kernels. Nothing here is imported before a tensor asks for it: a machine without triton has everything else."""
