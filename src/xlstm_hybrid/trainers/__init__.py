"""Trainers, one file each; they need the extra `train` (trl, datasets)."""
