"""Scores, significance, comparison, speed, and proofs of equivalence."""
